"""What training all weights needs that training an adapter does not."""

import torch
from omegaconf import DictConfig

from pact_tune.errors import UserError
from pact_tune.log import logger
from pact_tune.objectives.base import Objective


def check_full_finetuning(cfg: DictConfig, objective: Objective, dtype: torch.dtype) -> None:
    """Says that all weights are trained, and what that costs.

    Args:
        cfg (DictConfig): the complete config.
        objective (Objective): of the run.
        dtype (torch.dtype): of the weights.

    Raises:
        UserError: the config does not give what it needs.
    """
    logger.info("The model builder has no adapters: all weights are trained.")
    if dtype is torch.bfloat16:
        logger.warning(
            "weights trained in bf16 lose steps below 0.2 % of a weight's size (most, at lr 1e-5): set dtype: fp32 where "
            "memory allows, or train an adapter, which is kept in float32."
        )
    if objective.views and (cfg.reference_cache is None or cfg.reference_cache.lazy):
        raise UserError(
            "Full fine-tuning moves the weights that the reference is computed with, so it must be stored before the "
            "first step: set reference_cache, with lazy: False, or name layers in model.lora_attn_modules (of pact_tune.hf.causal_lm: set model.r)."
        )
    if objective.reading.frozen_head:
        raise UserError(
            f"This loss reads the {objective.reading.name} through the frozen head, which full fine-tuning moves: name "
            "layers in model.lora_attn_modules (of pact_tune.hf.causal_lm: set model.r), or choose another loss."
        )
    if cfg.save_adapter_weights_only:
        raise UserError(
            "save_adapter_weights_only needs an adapter: set it to False, or name layers in model.lora_attn_modules (of pact_tune.hf.causal_lm: set model.r)."
        )
