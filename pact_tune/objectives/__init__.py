"""What a config names in ``loss._component_``: one function a method, each in a file of its own."""

from pact_tune.objectives.anchored_sft import anchored_sft
from pact_tune.objectives.asft import asft
from pact_tune.objectives.base import Chunk, Context, Objective, Stream
from pact_tune.objectives.constrained_sft import constrained_sft
from pact_tune.objectives.lisa import lisa
from pact_tune.objectives.pact import pact
from pact_tune.objectives.safelora import safelora
from pact_tune.objectives.sbr import sbr
from pact_tune.objectives.sft import sft
from pact_tune.objectives.str_ import str_

__all__ = [
    "Chunk",
    "Context",
    "Objective",
    "Stream",
    "anchored_sft",
    "asft",
    "constrained_sft",
    "lisa",
    "pact",
    "safelora",
    "sbr",
    "sft",
    "str_",
]
