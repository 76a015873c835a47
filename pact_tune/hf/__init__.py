"""Any causal language model of Hugging Face transformers: in the recipe, and in TRL's trainer."""

import importlib

# Imported on first use: transformers' models, PEFT and TRL take seconds.
_EXPORTS = {
    "causal_lm": "pact_tune.hf.model",
    "PACTTrainer": "pact_tune.hf.trainer",
    "PACTTrainingConfig": "pact_tune.hf.trainer",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pact_tune.hf' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
