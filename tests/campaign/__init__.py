"""Campaigns: many faults at a time, each counted as right, traceback or silent. `make campaign` runs them all."""

import sys
from pathlib import Path

from pact_tune import log

log.quiet_torchao()  # before torchtune is imported
sys.path.append(str(Path(__file__).parent.parent))  # the tests' helpers are modules of their folder, as for pytest
