"""Imported once by the process from which an experiment's commands are forked: what they would all import."""

from pact_tune.log import quiet_torchao

quiet_torchao()

import pact_lora_finetune  # noqa: E402, F401

import pact_tune.evaluation.harness  # noqa: E402
import pact_tune.evaluation.report  # noqa: E402
import pact_tune.tools.configs  # noqa: E402, F401
