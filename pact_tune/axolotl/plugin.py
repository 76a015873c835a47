"""The plugin: a trainer class with our loss, and a stamp beside the adapter.

Axolotl trains on, and succeeds, when a plugin cannot be imported. So nothing but this file writes the stamp: a result
without one was trained without the constraint, which `pact verify` says.
"""

from pathlib import Path
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from torch import nn

from pact_tune.adapters import WEIGHTS
from pact_tune.axolotl.args import OWN_KEYS
from pact_tune.axolotl.rows import dataset_rows, rows_of_batch, section_of
from pact_tune.batching import collate
from pact_tune.errors import UserError
from pact_tune.hf.constraint import Constraint


class PACTAxolotlTrainer(AxolotlTrainer):
    """Axolotl's trainer, minimising an objective of :mod:`pact_tune.objectives`."""

    constraint: Constraint  # set by the plugin, once there is a model

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # Axolotl turns it off, and accumulation becomes a mean of means

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The objective's loss; see :meth:`Constraint.trainer_loss`."""
        found = rows_of_batch(inputs)
        rows = [self.constraint.number(row.tokens, labels) for row, labels in found]
        packed = len(rows) > len(inputs["input_ids"])
        conversations = [self.constraint.rows[row] for row in rows]
        batch = collate(conversations, self.constraint.tokenizer.pad_token_id, packed)
        loss = self.constraint.trainer_loss(self, model, rows, batch, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the objective's terms."""
        self.constraint.add_to(logs, self.model.training)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(model, trial, **kwargs)
        self.accelerator.wait_for_everyone()  # a stamp names all files, the other processes' too
        self.stamp(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def stamp(self, folder: Path) -> None:
        """Writes pact.json beside an adapter."""
        if self.args.should_save and folder.is_dir():
            arguments = {"trainer": {"learning_rate": self.args.learning_rate, "seed": self.args.seed}}
            self.constraint.stamp(folder, "axolotl", arguments, self.state.global_step)


class PACTPlugin(BasePlugin):
    """Reads section ``pact`` and trains with it."""

    def __init__(self) -> None:
        super().__init__()
        self.trainer: PACTAxolotlTrainer | None = None
        self.earlier: int | None = None

    def get_input_args(self) -> str:
        """Where Axolotl finds the keys."""
        return "pact_tune.axolotl.args.PACTArgs"

    def get_trainer_cls(self, cfg: Any) -> type[PACTAxolotlTrainer]:
        """The trainer; UserError without a section ``pact``, which would be training without the constraint."""
        if not cfg.pact:
            raise UserError("plugins names pact_tune.axolotl.PACTPlugin, but there is no section pact: write one.")
        return PACTAxolotlTrainer

    def post_trainer_create(self, cfg: Any, trainer: PACTAxolotlTrainer) -> None:
        """Puts the objective to work; all input errors are raised here, before the first step."""
        section = dict(cfg.pact)
        data = [dataset_rows(trainer.train_dataset, "datasets")]
        data[0].section = section_of(cfg.datasets)
        if trainer.eval_dataset is not None:
            data.append(dataset_rows(trainer.eval_dataset, "test_datasets"))
        settings = {key: value for key, value in section.items() if key not in OWN_KEYS[1:]}
        cache = section.get("reference_cache", {})
        self.trainer, self.earlier = trainer, _written(cfg)
        trainer.constraint = Constraint(
            settings,
            "pact",
            trainer.model,
            trainer.processing_class,
            data,
            None if cache is None else dict(cache),
            initial=section.get("reference", "base") == "initial",
            packed=bool(cfg.sample_packing or cfg.batch_flattening),
            analysis=section.get("analysis"),
        )

    def post_train(self, cfg: Any, model: nn.Module) -> None:
        """Writes the stamp. Axolotl calls this before and after it saves the adapter: an earlier run's gets none."""
        if self.trainer is not None and _written(cfg) != self.earlier:
            self.trainer.stamp(Path(cfg.output_dir))


def _written(cfg: Any) -> int | None:
    """When the adapter in the output folder was written; None: there is none."""
    file = Path(cfg.output_dir) / WEIGHTS
    return file.stat().st_mtime_ns if file.is_file() else None
