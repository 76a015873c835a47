"""What torchtune lacks: chat-template data, safety columns from its models, exports that load elsewhere."""

from pact_tune.torchtune.builder import from_checkpoint
from pact_tune.torchtune.checkpoint import HFCheckpointer

__all__ = ["HFCheckpointer", "from_checkpoint"]
