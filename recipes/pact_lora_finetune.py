"""LoRA fine-tuning that keeps refusals, for one process or many.

    tune run pact_lora_finetune --config qwen2_5/7B_pact_lora
    tune run --nproc_per_node 4 pact_lora_finetune --config llama3_1/8B_pact_lora

One class serves both: with several processes the model is sharded with FSDP2 (gloo on CPUs, NCCL on GPUs).
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pact_tune import log

if __name__ == "__main__":
    log.quiet_torchao()  # before torchtune, and torchao with it, is imported

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training, utils
from torchtune.recipe_interfaces import FTRecipeInterface

from pact_tune.analysis import Analysis
from pact_tune.backbones import open_backbone
from pact_tune.batching import collate
from pact_tune.conversations import response_only_prefix, show
from pact_tune.distributed import run_ranks, wait_for_all
from pact_tune.errors import UserError
from pact_tune.files import check_space
from pact_tune.full_finetuning import check_full_finetuning
from pact_tune.log import logger, progress
from pact_tune.metrics import Interval
from pact_tune.objectives.base import Step
from pact_tune.objectives.penalty import add_penalty
from pact_tune.reference.source import ReferenceSource
from pact_tune.run_lock import claim_output
from pact_tune.run_state import capture, load_state, restore, save_state
from pact_tune.schedule import Schedule
from pact_tune.signals import StopRequest
from pact_tune.stamp import data_fingerprint, machine
from pact_tune.torchtune.backbone import device_and_dtype
from pact_tune.torchtune.config import read_command_line
from pact_tune.version import __version__

# What must not change between a run and its resumption, beside data, steps, network and sections.
IDENTITY = ("seed", "shuffle", "batch_by_length", "clip_grad_norm", "dtype", "adapter_dtype")


class PACTLoRAFinetuneRecipe(FTRecipeInterface):
    """LoRA or full fine-tuning with any objective of :mod:`pact_tune.objectives`.

    The order of the rows, the initial adapter and dropout depend on the seed and the step alone. So a run that was
    killed and resumed ends with the same adapter as one that was not, and a run on N processes sees the same global
    batches as a run on one.

    Args:
        cfg (DictConfig): a complete config, see :func:`pact_tune.torchtune.config.complete`.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.device, self.dtype = device_and_dtype(cfg)
        self.world_size, self.rank = utils.get_world_size_and_rank()
        self.output_dir = Path(cfg.output_dir)
        self.global_step = 0
        self.final: dict[str, float] = {}  # what was logged last
        self.validation: dict[str, float] = {}  # loss on the validation rows after each epoch
        self.analysis: Analysis | None = None
        self.metric_logger = None

    # Set-up ----------------------------------------------------------------------------------------------------------

    def setup(self, cfg: DictConfig) -> None:
        """Builds everything; what needs no weights is checked before they are loaded.

        Args:
            cfg (DictConfig): the complete config.

        Raises:
            UserError: bad input, with the mend.
        """
        self.tokenizer = config.instantiate(cfg.tokenizer)
        self.backbone = open_backbone(cfg, self.device, self.dtype, self.world_size)
        self.objective = config.instantiate(cfg.loss, self.backbone.context(self.tokenizer))
        for note in self.objective.notes:
            logger.info(note)
        if not self.backbone.has_adapters:
            check_full_finetuning(cfg, self.objective, self.dtype)
        self._setup_rows()
        state = self.load_checkpoint() if cfg.resume_from_checkpoint else None
        if state and state["global_step"] >= self.schedule.total_steps and self._missing(state["global_step"]) is None:
            raise UserError(
                f"The run in '{self.output_dir}' is complete ({self.schedule.total_steps} steps): nothing to resume."
            )
        self.backbone.load(self.tokenizer, state["trained"] if state else None, cfg.seed)
        self.model, self.decoder = self.backbone.model, self.backbone.decoder
        self._setup_optimizer(state)
        self._check_space()
        self.setup_reference(cfg.reference_cache)
        if state and not self.backbone.has_adapters:  # only now: the reference is the model before the first step
            self.backbone.restore(state["trained"])
        if cfg.analysis is not None:
            self.analysis = Analysis(
                cfg.analysis, self.backbone.context(self.tokenizer), self.decoder, self.dataset, self.schedule.used,
                self.objective, self.loss, self.reference, self.output_dir if self.rank == 0 else None,
            )  # fmt: skip
        self._start_interval()

    def _setup_rows(self) -> None:
        """Reads the data and decides which rows make up which steps."""
        cfg = self.cfg
        self.dataset = config.instantiate(cfg.dataset, self.tokenizer)
        for counts in self.dataset.counts:
            logger.info(f"Data: {counts}")
        main, stream = self.dataset.conversations, self.objective.stream
        logger.info(f"One row as it is trained on, the response marked:\n{show(self.tokenizer, main[0])}")
        held_out = []
        if cfg.validation_dataset is not None:
            validation = config.instantiate(cfg.validation_dataset, self.tokenizer)
            logger.info(f"Validation data: {'; '.join(map(str, validation.counts))}")
            held_out = validation.conversations
        if stream is not None:
            main, held_out = stream.beside(main), stream.beside(held_out)
        trained = [*main, *(stream.rows if stream else ())]
        self.rows = [*trained, *held_out]
        self.validation_rows = range(len(trained), len(self.rows))
        self.schedule = Schedule(
            rows=self.rows,
            main=len(main),
            batch_size=cfg.batch_size,
            world_size=self.world_size,
            accumulation=cfg.gradient_accumulation_steps,
            epochs=cfg.epochs,
            seed=cfg.seed,
            shuffle=cfg.shuffle,
            by_length=cfg.batch_by_length,
            max_steps_per_epoch=cfg.max_steps_per_epoch,
            stream=stream,
        )
        self.schedule.check_lengths(self.backbone.max_seq_len, cfg.packed)

    def _setup_optimizer(self, state: dict[str, Any] | None) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = config.instantiate(self.cfg.optimizer, parameters)
        self.scheduler = None
        if self.cfg.lr_scheduler is not None:
            self.scheduler = config.instantiate(
                self.cfg.lr_scheduler, self.optimizer, num_training_steps=self.schedule.total_steps, last_epoch=-1
            )
        if state is None:
            return
        restore(state, self.model, self.optimizer, self.scheduler, self.objective, self.world_size > 1)
        self.global_step, self.validation, self.final = (state[key] for key in ("global_step", "validation", "final"))
        logger.info(f"Resuming after step {self.global_step} of {self.schedule.total_steps}.")

    def _check_space(self) -> None:
        """Raises UserError where the results of all epochs, and the state to resume from, will not fit."""
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        result = trained + (0 if self.cfg.save_adapter_weights_only else self.backbone.weight_bytes)
        # The state holds the weights and AdamW's two moments; a new one is whole before the old one goes.
        epochs = self.cfg.epochs - self.global_step // self.schedule.steps_per_epoch
        check_space(self.output_dir, epochs * result + 2 * 3 * trained, "What this run saves")

    def setup_reference(self, options: DictConfig | None) -> None:
        """Opens the cache and fills it, unless steps are to do that, or the objective needs none, or it runs live.

        Args:
            options (DictConfig | None): section `reference_cache`.
        """
        prefix: Sequence[int] = ()
        if "response_only" in self.objective.views:
            prefix = response_only_prefix(self.tokenizer, self.objective.response_only_bos)
        self.reference = ReferenceSource(
            self.rows,
            self.objective,
            prefix,
            lambda conversations: self.decoder.read_reference(conversations, self.objective.reading),
            hidden_size=self.backbone.hidden_size,
            dtype=self.dtype,
            device=self.device,
            network=self.backbone.reference,
            options=options,
        )
        self.reference.prepare([*self.schedule.used, *self.validation_rows])

    # Training --------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Runs the remaining steps, writing a result after each epoch.

        Raises:
            UserError: a loss that is not finite.
            Interrupted: after SIGINT or SIGTERM, with the state saved.
        """
        cfg, per_epoch, total = self.cfg, self.schedule.steps_per_epoch, self.schedule.total_steps
        self.metric_logger = config.instantiate(cfg.metric_logger) if self.rank == 0 else None
        if self.analysis is not None and self.global_step == 0:
            self.analysis.look(0, 0)
        with StopRequest() as stop:
            if (missing := self._missing(self.global_step)) is not None:
                self.save_checkpoint(missing)
            while self.global_step < total:
                epoch, done = divmod(self.global_step, per_epoch)
                self._start_interval()
                name = f"Epoch {epoch + 1}/{cfg.epochs}"
                with progress(total=per_epoch, initial=done, desc=name, unit="step") as bar:
                    for step in range(done, per_epoch):
                        self.step(self.schedule.epoch(epoch)[step])
                        last = step + 1 == per_epoch
                        if self.global_step % cfg.log_every_n_steps == 0 or last:
                            bar.set_postfix_str(self._log())
                        bar.update(1)
                        if cfg.save_every_n_steps and self.global_step % cfg.save_every_n_steps == 0 and not last:
                            self._save_state()
                        if not last:
                            stop.check(self.global_step, total, self._save_state)
                self._validate(epoch)
                if self.analysis is not None:
                    self.analysis.look(self.global_step, epoch + 1)
                self.save_checkpoint(epoch)
                if self.global_step < total:
                    stop.check(self.global_step, total)
        logger.info(f"Done: the result is {self.output_dir / f'epoch_{cfg.epochs - 1}'}")

    def _missing(self, step: int) -> int | None:
        """The epoch that ended with a step and whose result was not written, as on a full disk."""
        epochs, rest = divmod(step, self.schedule.steps_per_epoch)
        return epochs - 1 if epochs and not rest and not (self.output_dir / f"epoch_{epochs - 1}").exists() else None

    def step(self, step: Step) -> None:
        """One optimiser step on a global batch, given by its row numbers."""
        # Dropout depends on seed, step and rank alone, so that a resumed run draws the same.
        torch.manual_seed((self.cfg.seed * 1_000_003 + self.global_step) * 1024 + self.rank)
        self.reference.fill_lazily(step)
        if self.objective.before_step is not None:
            self.objective.before_step(step)
        divisor, factor = self.schedule.divisor(step), self.schedule.constraint_factor(step)
        terms = torch.zeros(len(self.objective.names), device=self.device)
        for rows in self.schedule.micro_batches(step, self.rank):
            # All ranks know the global batch, so its token count needs no communication. FSDP averages over ranks.
            loss, more = self.loss(rows, self.world_size / divisor, factor)
            loss.backward()
            terms += more
        self.interval.add(self.global_step + 1, step, terms)
        if self.objective.penalty is not None:
            self.penalty = add_penalty(self.backbone.trained().items(), self.objective.penalty)
        if self.cfg.clip_grad_norm is not None:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), float(self.cfg.clip_grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        self.global_step += 1
        if self.objective.after_step is not None:
            self.objective.after_step(self._means_of(step, terms))

    def loss(self, rows: list[int], scale: float, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and terms of one forward on this rank's rows; ``factor`` is of the constraint's weights."""
        batch = collate([self.rows[row] for row in rows], self.decoder.pad_id, self.cfg.packed)
        reference = self.reference.read(rows)
        batch = batch.to(self.device)
        weight = batch.weight * factor
        if self.objective.weigh is not None:
            weight = weight * self.objective.weigh(reference["full"], batch.position, batch.row)
        batch = dataclasses.replace(batch, weight=weight)
        return self.decoder.loss(batch, self.objective, reference, scale)

    def _validate(self, epoch: int) -> None:
        """The loss on the validation rows, without training on them."""
        if not self.validation_rows:
            return
        rows = list(self.validation_rows)
        terms = torch.zeros(len(self.objective.names), device=self.device)
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(rows), self.schedule.batch_size * self.world_size):
                size = self.schedule.batch_size * self.world_size
                self.reference.fill_lazily(rows[start : start + size])
                for mine in self.schedule.micro_batches(rows[start : start + size], self.rank):
                    terms += self.loss(mine, 1.0)[1]
        self.model.train()
        means = self._means_of(rows, terms)
        means["loss"] = self.objective.total(means)
        self.validation[f"epoch_{epoch}"] = means["loss"]
        best = min(self.validation, key=lambda name: self.validation[name])
        values = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        logger.info(f"Validation: {values}; the lowest loss so far has {best}")
        if self.metric_logger is not None:
            self.metric_logger.log_dict({f"validation_{k}": v for k, v in means.items()}, step=self.global_step)

    # Logging ---------------------------------------------------------------------------------------------------------

    def _start_interval(self) -> None:
        self.interval = Interval(self.objective.names)
        self.interval_start = time.perf_counter()

    def _means_of(self, rows: list[int], terms: torch.Tensor) -> dict[str, float]:
        interval = Interval(self.objective.names)
        interval.add(self.global_step, rows, terms)
        return interval.means(self.schedule.tokens)

    def _log(self) -> str:
        """Logs the means since the last call."""
        metrics = self.interval.means(self.schedule.tokens)
        metrics["loss"] = self.objective.total(metrics)
        if self.objective.penalty is not None:
            metrics["penalty"] = self.penalty.item()
            metrics["loss"] += metrics["penalty"]
        if self.objective.after_step is not None:
            metrics |= {f"coefficient_{name}": value for name, value in self.objective.coefficients.items()}
        self.final = dict(metrics)
        shown = [f"{name} {round(value, 3) + 0.0:.3f}" for name, value in metrics.items() if name != "loss"]
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        tokens = sum(self.rows[row].num_response_tokens for row in self.interval.rows)
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - self.interval_start)
        if self.cfg.clip_grad_norm is not None:
            norm: Any = self.grad_norm
            metrics["grad_norm"] = (norm.full_tensor() if self.world_size > 1 else norm).item()
        if self.cfg.log_peak_memory_stats and self.device.type != "cpu":
            metrics |= training.get_memory_stats(device=self.device)
        if self.metric_logger is not None:
            self.metric_logger.log_dict(metrics, step=self.global_step)
        self._start_interval()
        return ", ".join([*shown, f"{metrics['tokens_per_second']:.0f} tok/s"])

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def load_checkpoint(self) -> dict[str, Any]:
        """State of the run to resume."""
        return load_state(self.output_dir, self._identity())

    def _identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        cfg = self.cfg
        identity = {key: cfg[key] for key in IDENTITY}
        identity |= {
            "data": data_fingerprint(self.rows),
            "rows per step": self.schedule.rows_per_step,
            "total steps": self.schedule.total_steps,
            "reference": self.backbone.reference["weights"],
        }
        sections: dict[str, Any] = {
            name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("model", "optimizer")
        }
        sections["lr_scheduler"] = OmegaConf.to_container(cfg.lr_scheduler, resolve=True) if cfg.lr_scheduler else {}
        sections["loss"] = self.objective.settings
        return identity | {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}

    def _save_state(self) -> None:
        """Writes all that a resumption needs to one file, which is replaced as a whole."""
        self.reference.flush()
        trained = self.backbone.gather()
        state = capture(self.model, self.optimizer, self.scheduler, self.objective) | {
            "trained": trained,
            "validation": self.validation,
            "final": self.final,
            "global_step": self.global_step,
            "identity": self._identity(),
        }
        if self.rank == 0:
            save_state(self.output_dir, state)
        wait_for_all()

    def save_checkpoint(self, epoch: int) -> None:
        """Writes the state to resume from, then an epoch's result: PEFT adapter, merged model, pact.json.

        In this order, so that a disk that is full or a kill costs no step: a resumed run writes a result that is missing.

        Args:
            epoch (int): counted from 0; names the folder.

        Raises:
            UserError: weights that are not finite, or a full disk.
        """
        trained = self.backbone.gather()
        if not all(tensor.isfinite().all() for tensor in trained.values()):
            raise UserError(
                f"The trained weights are not finite after step {self.global_step}: nothing of this epoch is saved; lower "
                "optimizer.lr, or set clip_grad_norm."
            )
        self._save_state()
        if self.rank == 0:
            adapter_only = self.cfg.save_adapter_weights_only
            stamp, end = self._stamp(epoch), self.objective.finish
            directory = self.backbone.save(f"epoch_{epoch}", trained, stamp, adapter_only=adapter_only, finish=end)
            logger.info(f"Saved {directory}")
        wait_for_all()

    def _stamp(self, epoch: int) -> dict[str, Any]:
        """How the result was made, for pact.json."""
        return {
            "pact_tune": __version__,
            "machine": machine(self.device),
            "epoch": epoch,
            "steps": self.global_step,
            "loss": self.objective.settings,
            "safety_tokens": {"source": self.cfg.loss.get("safety_tokens"), **self.objective.reading.describe()},
            "data": {
                "fingerprint": data_fingerprint(self.dataset.conversations),
                "sources": [vars(counts) for counts in self.dataset.counts],
            },
            "reference": self.backbone.stamp,
            "final": self.final,
            "validation": self.validation,
            "config": OmegaConf.to_container(self.cfg, resolve=True),
        }

    def cleanup(self) -> None:
        """Closes the metric logger."""
        if self.metric_logger is not None:
            self.metric_logger.close()


def run(argv: Sequence[str], work: Callable[[PACTLoRAFinetuneRecipe], None], writes: bool = True) -> int | str | None:
    """Sets the recipe up, on one process or on those that torchrun started, and does some work with it.

    Args:
        argv (Sequence[str]): the command line, see :func:`pact_tune.torchtune.config.read_command_line`.
        work (Callable): is given the recipe.
        writes (bool): the work writes to output_dir, which is then claimed.

    Returns:
        int | str | None: see :func:`pact_tune.distributed.run_ranks`.
    """

    def everything() -> None:
        recipe = PACTLoRAFinetuneRecipe(read_command_line(argv))
        claimed = claim_output(recipe.cfg, recipe.rank) if writes else contextlib.nullcontext()
        with claimed, contextlib.ExitStack() as at_the_end:
            at_the_end.callback(recipe.cleanup)
            recipe.setup(recipe.cfg)
            work(recipe)

    return run_ranks(everything)


def main() -> None:
    """Entry point of `tune run pact_lora_finetune`; ends the process."""
    log.setup()
    sys.exit(run(sys.argv[1:], PACTLoRAFinetuneRecipe.train))


if __name__ == "__main__":
    main()
