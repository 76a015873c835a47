"""Fine-tune a chat model without losing its refusals: PACT (arXiv 2603.07445), its tail variant, and STR (2604.17210)."""

import importlib

from pact_tune.version import __version__

# Imported on first use: `import pact_tune` alone must not take the seconds that torch and transformers need.
_EXPORTS = {
    "SafetyTokens": "pact_tune.safety_tokens",
    "safety_tokens_from_templates": "pact_tune.safety_tokens",
    "identify_safety_tokens": "pact_tune.identification",
    "PACTConfig": "pact_tune.losses",
    "pact_loss": "pact_tune.losses",
    "str_loss": "pact_tune.losses",
    "constrained_sft_loss": "pact_tune.losses",
    "ReferenceCache": "pact_tune.reference.cache",
    "UserError": "pact_tune.errors",
    "chat_dataset": "pact_tune.data",
    "load_tokenizer": "pact_tune.conversations",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pact_tune' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
