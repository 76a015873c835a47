"""TRL's SFTTrainer with an objective of ours:

args = PACTTrainingConfig(output_dir="out", objective={"safety_tokens": "safety_tokens", "preset": "tail"})
trainer = PACTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=LoraConfig(...))
trainer.train()
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from pact_tune.conversations import load_tokenizer
from pact_tune.data import ChatDataset, chat_rows
from pact_tune.errors import UserError
from pact_tune.hf.constraint import Constraint
from pact_tune.log import logger


@dataclass
class PACTTrainingConfig(SFTConfig):
    """SFTConfig with an objective.

    Attributes:
        objective (dict[str, Any] | str | None): the recipe's section ``loss``: settings and, for another method than PACT,
            ``_component_``.
        reference_cache (dict[str, Any] | str | None): the recipe's section of that name; None computes the reference in
            every step.
        reference (str): "base" is the model without an adapter; "initial" keeps the adapter that training goes on from.
        audit (dict[str, Any] | str | None): the recipe's section ``dataset.audit``: what becomes of rows of
            ``train_dataset`` that the aligned model would have refused.
        analysis (dict[str, Any] | str | None): the recipe's section of that name: records for the paper's figures.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "objective", "reference_cache", "audit", "analysis"]

    objective: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of the objective, as in the recipe's section loss."}
    )
    reference_cache: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "As in the recipe; None computes the reference in every step."}
    )
    reference: Literal["base", "initial"] = field(
        default="base", metadata={"help": "Whether the reference keeps the adapter that training goes on from."}
    )
    audit: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "file and action, as in the recipe's section dataset.audit."}
    )
    analysis: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "source, safety_tokens and rows, as in the recipe's section analysis."}
    )


class PACTTrainer(SFTTrainer):
    """SFTTrainer that minimises an objective of :mod:`pact_tune.objectives`.

    Rows are rendered and cut into responses by :mod:`pact_tune.conversations`, so tokens, positions and cached references
    are the recipe's. Rows of more than ``max_length`` tokens are left out and counted, never cut.

    Args:
        model (str | PreTrainedModel | PeftModel): with an adapter, or ``peft_config`` makes one.
        args (PACTTrainingConfig): with ``objective``.
        train_dataset (Dataset | ChatDataset): rows in any layout that the recipe reads, or :func:`pact_tune.chat_dataset`'s.
        eval_dataset (Dataset | ChatDataset | None): the same.
        processing_class (PreTrainedTokenizerBase | None): the model's tokenizer.
        peft_config (PeftConfig | None): of LoRA.
        **more: what SFTTrainer takes beside them.

    Raises:
        UserError: bad input, with the mend.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: PACTTrainingConfig,
        train_dataset: Dataset | ChatDataset,
        eval_dataset: Dataset | ChatDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **more: Any,
    ) -> None:
        _check(args, more)
        name = model if isinstance(model, str) else model.config._name_or_path
        tokenizer = processing_class or load_tokenizer(name)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        audit: Any = args.audit
        train = _rows(tokenizer, train_dataset, "train_dataset", args, audit)
        held_out = None if eval_dataset is None else _rows(tokenizer, eval_dataset, "eval_dataset", args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict(Constraint.columns(train)),
            eval_dataset=None if held_out is None else Dataset.from_dict(Constraint.columns(held_out)),
            processing_class=tokenizer,
            peft_config=peft_config,
            **more,
        )
        # What transformers annotates these with also holds for its command line, where they may be text or nothing.
        settings: Any = args
        trained: Any = self.model
        self.constraint = Constraint(
            settings.objective,
            "objective",
            trained,
            tokenizer,
            [train, *([] if held_out is None else [held_out])],
            settings.reference_cache,
            initial=settings.reference == "initial",
            packed=self.padding_free,
            analysis=settings.analysis,
        )
        self.data_collator = self.constraint.collate
        self.model_accepts_loss_kwargs = True  # our loss is divided by the tokens of the whole step

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        counted = super()._get_num_items_in_batch(batch_samples, device)
        return self.constraint.items(counted, batch_samples, self)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The objective's loss; see :meth:`Constraint.trainer_loss`."""
        loss = self.constraint.trainer_loss(self, model, inputs["rows"], inputs["batch"], num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the objective's terms."""
        assert self.model is not None
        self.constraint.add_to(logs, self.model.training)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        self._stamp(Path(output_dir or str(self.args.output_dir)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # a stamp names all files, the other processes' too
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.is_dir():
            self._stamp(folder)

    def _stamp(self, folder: Path) -> None:
        arguments = {"trainer": {"learning_rate": self.args.learning_rate, "seed": self.args.seed}}
        self.constraint.stamp(folder, "trl", arguments, self.state.global_step)


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | ChatDataset,
    title: str,
    args: PACTTrainingConfig,
    audit: dict[str, Any] | None = None,
) -> ChatDataset:
    if isinstance(dataset, ChatDataset):
        if audit is not None:
            raise UserError(f"{title} is a ChatDataset, whose rows are chosen: give audit to chat_dataset instead.")
        if (
            args.max_length is not None
            and (longest := max(len(c.tokens) for c in dataset.conversations)) > args.max_length
        ):
            raise UserError(
                f"The longest row of {title} has {longest} tokens, and max_length is {args.max_length}: raise it, or set "
                "max_seq_len of chat_dataset to leave longer ones out."
            )
        return dataset
    rows = chat_rows(tokenizer, dataset, title, max_seq_len=args.max_length, audit=audit)
    for counts in rows.counts:
        logger.info(f"Data: {counts}")
    return rows


def _check(args: PACTTrainingConfig, more: dict[str, Any]) -> None:
    """Raises UserError for what SFTTrainer would do to a loss, or to rows, that is not the objective's."""
    if not isinstance(args, PACTTrainingConfig) or not args.objective:
        raise UserError(
            "PACTTrainer needs args=PACTTrainingConfig(..., objective={...}) with the objective's settings, such as "
            "safety_tokens and preset."
        )
    refused = {
        "label_smoothing_factor": args.label_smoothing_factor > 0,
        "loss_type": args.loss_type != "nll",
        "compute_loss_func": "compute_loss_func" in more,
        "compute_metrics": "compute_metrics" in more,
        "data_collator": "data_collator" in more,
        "formatting_func": "formatting_func" in more,
        'packing_strategy="wrapped"': args.packing and args.packing_strategy == "wrapped",
    }
    for key, given in refused.items():
        if given:
            raise UserError(
                f"{key} is not used with PACTTrainer, whose objective is the loss and whose rows are whole: remove it."
            )
