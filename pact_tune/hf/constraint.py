"""An objective in a training loop that somebody else wrote: rows, batches, reference, loss, metrics and stamp.

Trainers of transformers (TRL's, Axolotl's) call a loss with a model and a batch; this is what they share.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import cached_file

from pact_tune.adapters import CONFIG, WEIGHTS, read_adapter
from pact_tune.analysis import Analysis
from pact_tune.batching import Batch, collate
from pact_tune.components import build_objective
from pact_tune.config import AnalysisSettings, ReferenceCacheSettings, defaults, settings
from pact_tune.conversations import Conversation, response_only_prefix, tokenizer_fingerprint
from pact_tune.data import ChatDataset
from pact_tune.errors import UserError
from pact_tune.evaluation.records import ANALYSIS_FILE
from pact_tune.fingerprints import fingerprint, model_fingerprint
from pact_tune.hf.decoder import HFDecoder, causal_lm_of
from pact_tune.hf.model import checkpoint_names, trained_parameters
from pact_tune.log import logger
from pact_tune.objectives.base import Context, Objective
from pact_tune.reference.source import ReferenceSource
from pact_tune.stamp import data_fingerprint, machine, write_stamp
from pact_tune.version import __version__
from pact_tune.weights import ModelFolder

# What only the recipe's own loop can do for an objective, and what it does it with.
OF_THE_RECIPE = ("penalty", "after_step", "stream", "state", "finish")
INITIAL = "reference"  # name of the frozen copy of the adapter that training goes on from


def checkpoint_folder(name: str) -> Path:
    """The folder that a model was loaded from.

    Args:
        name (str): a folder, or a Hub name whose files lie in the Hub's cache.

    Returns:
        Path: with config.json.

    Raises:
        UserError: there is none.
    """
    if (Path(name) / "config.json").is_file():
        return Path(name)
    try:
        file: Any = cached_file(name, "config.json", local_files_only=True)
    except OSError as error:
        raise UserError(
            f"The model's checkpoint '{name}' is not on this machine, so that its reference could not be told from another "
            "model's: load the model from a folder or by its Hub name."
        ) from error
    return Path(file).parent


class Constraint:
    """An objective at work in a trainer.

    Args:
        section (Mapping[str, Any]): the objective: ``_component_`` and settings, as in the recipe's section ``loss``.
        where (str): what the trainer calls that section.
        model (nn.Module): a causal LM with a PEFT adapter.
        tokenizer (PreTrainedTokenizerBase): of the model.
        data (Sequence[ChatDataset]): what is trained on, then what is evaluated on.
        reference_cache (Mapping[str, Any] | None): as in the recipe; None: computed in every step.
        initial (bool): the reference keeps the adapter that training goes on from.
        packed (bool): batches hold rows end to end, without padding.
        analysis (Mapping[str, Any] | None): as in the recipe; None: nothing is recorded.

    Raises:
        UserError: settings that are wrong, an objective that needs the recipe, a model without an adapter, or a row that
            stands twice with different weights.
    """

    def __init__(
        self,
        section: Mapping[str, Any],
        where: str,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        data: Sequence[ChatDataset],
        reference_cache: Mapping[str, Any] | None,
        initial: bool = False,
        packed: bool = False,
        analysis: Mapping[str, Any] | None = None,
    ) -> None:
        causal_lm = causal_lm_of(model)
        self.tokenizer, self.model, self.data = tokenizer, model, data
        self.initial, self.packed = initial, packed
        self.folder = checkpoint_folder(causal_lm.config._name_or_path)
        self.weights_hash = model_fingerprint(self.folder)
        self.device = next(model.parameters()).device
        self.text_config = causal_lm.config.get_text_config()
        modules = [
            n.removesuffix(".lora_a.weight") for n in trained_parameters(causal_lm) if n.endswith(".lora_a.weight")
        ]
        folder = ModelFolder(self.folder, "the model")
        vocabulary, adapted = self.text_config.vocab_size, dict(zip(modules, modules, strict=True))
        self.context = Context(tokenizer, vocabulary, self.device, self.weights_hash, folder, adapted)
        self.objective: Objective = build_objective(section, self.context, where)
        self.section = dict(section)
        for note in self.objective.notes:
            logger.info(note)
        self._check(where)
        self.cache_options = None
        if reference_cache is not None:
            given = settings(ReferenceCacheSettings, reference_cache, "reference_cache")
            self.cache_options = defaults(ReferenceCacheSettings) | given
            if self.cache_options["lazy"]:
                raise UserError(
                    "reference_cache.lazy needs the recipe's loop: set it to False, or reference_cache to null."
                )
        self.analysis_options = None
        if analysis is not None:
            self.analysis_options = AnalysisSettings(**settings(AnalysisSettings, analysis, "analysis"))
        self.analysis: Analysis | None = None
        self.rows = [row for part in data for row in part.conversations]
        self._all_trained = all(row.ce_weight for row in self.rows)
        self._row_of: dict[bytes, int] = {}
        for number, row in enumerate(self.rows):
            self._row_of.setdefault(row.key, number)  # in training also where evaluation has the same row
        if initial:
            self._keep_initial_adapter(causal_lm)
        self.decoder: HFDecoder | None = None
        self.reference: ReferenceSource | None = None
        self.final: dict[str, float] = {}
        self._sums: dict[str, torch.Tensor] = {}

    def _check(self, where: str) -> None:
        if needed := [name for name in OF_THE_RECIPE if getattr(self.objective, name) is not None]:
            raise UserError(
                f"{where}: the method '{self.objective.settings['method']}' needs the recipe's own loop ({needed[0]}): run "
                "`tune run pact_lora_finetune` with model._component_: pact_tune.hf.causal_lm."
            )
        if self.objective.views and not isinstance(self.model, PeftModel):
            raise UserError(
                "Without an adapter training moves the weights that the reference is computed with: give the trainer a "
                "peft_config, or use the recipe, which stores the reference first."
            )
        if any(row.ce_weight not in (0.0, 1.0) for part in self.data for row in part.conversations):
            raise UserError(
                "Rows with a ce_weight other than 0 and 1 need the recipe: a trainer counts tokens, not weights."
            )
        for part in self.data:
            _check_equal_rows(part)

    def _keep_initial_adapter(self, causal_lm: nn.Module) -> None:
        """A frozen copy of the adapter, which the reference then has."""
        assert isinstance(self.model, PeftModel)
        active = self.model.active_adapter
        self.model.add_adapter(INITIAL, self.model.peft_config[active])
        parameters = dict(causal_lm.named_parameters())
        with torch.no_grad():
            for name in [name for name in parameters if f".{INITIAL}." in name]:
                parameters[name].copy_(parameters[name.replace(f".{INITIAL}.", f".{active}.")])
                parameters[name].requires_grad = False
        self.model.set_adapter(active)

    # Rows and batches ------------------------------------------------------------------------------------------------

    @staticmethod
    def columns(part: ChatDataset) -> dict[str, list[list[int]]]:
        """Rows as trainers hold them: input_ids, and labels of -100 outside the responses.

        Also of rows that are only constrained: trainers leave out those without a label.
        """
        return {
            "input_ids": [row.tokens for row in part.conversations],
            "labels": [_labels(row) for row in part.conversations],
        }

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of a trainer's examples, which may each be several rows packed; called in the loader's processes.

        Args:
            examples (Sequence[Mapping[str, Any]]): input_ids and labels and, of packed ones, seq_lengths.

        Returns:
            dict[str, Any]: "labels" for the trainer's count of tokens, "rows" and "batch" for :meth:`loss`.
        """
        rows = [self.number(ids, labels) for example in examples for ids, labels in documents(example)]
        conversations = [self.rows[row] for row in rows]
        width = max(len(row.tokens) for row in conversations)
        labels = [_labels(row) if row.ce_weight else [-100] * len(row.tokens) for row in conversations]
        return {
            "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
            "rows": rows,
            "batch": collate(conversations, self.tokenizer.pad_token_id, self.packed),
        }

    def number(self, ids: list[int], labels: list[int]) -> int:
        """Which row a trainer's example is.

        Raises:
            UserError: none that the constraint was given.
        """
        row = Conversation(ids, spans(labels))
        number = self._row_of.get(row.key)
        if number is None:
            raise UserError(
                "A batch holds a row that the trainer was not given: rows must not be cut or changed on the way."
            )
        return number

    # The loss --------------------------------------------------------------------------------------------------------

    def open(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Finds the head, checks it, and stores the reference; before the first step, on all ranks.

        Args:
            model (nn.Module): as the trainer calls it, wrapped or not.
            dtype (torch.dtype): that it computes in.

        Raises:
            UserError: a head that is not reproduced, rows that are not kept apart, or a cache that holds other numbers.
        """
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        adapter = INITIAL if self.initial else None
        decoder = HFDecoder(inner, self.tokenizer.pad_token_id, self.device, adapter)
        decoder.check(self.packed)
        prefix: tuple[int, ...] = ()
        if "response_only" in self.objective.views:
            prefix = response_only_prefix(self.tokenizer, self.objective.response_only_bos)

        def compute(conversations: Sequence[Conversation]) -> torch.Tensor:
            decoder.model = inner  # not DDP's wrapper: ranks need not run equally many
            return decoder.read_reference(conversations, self.objective.reading)

        source = ReferenceSource(
            self.rows,
            self.objective,
            prefix,
            compute,
            hidden_size=self.text_config.hidden_size,
            dtype=dtype,
            device=self.device,
            network=self.network,
            options=self.cache_options,
        )
        source.prepare(range(len(self.rows)))
        self.decoder, self.reference = decoder, source

    @property
    def network(self) -> dict[str, Any]:
        """All that the reference's numbers depend on beside the reading; the recipe's, so that caches are shared."""
        causal_lm = causal_lm_of(self.model)
        network = {
            "backbone": "transformers",
            "weights": self.weights_hash,
            "attention": causal_lm.config._attn_implementation,
            "quantized": "bitsandbytes NF4" if getattr(causal_lm, "is_loaded_in_4bit", False) else [],
        }
        if self.initial:
            copies = {name: p for name, p in causal_lm.named_parameters() if f".{INITIAL}." in name}
            network["adapter"] = fingerprint(copies)
        return network

    def loss(
        self, model: nn.Module, rows: list[int], batch: Batch, scale: float | torch.Tensor, mode: str
    ) -> torch.Tensor:
        """The loss of one forward, differentiable; its terms are added to the sums of ``mode``.

        Args:
            model (nn.Module): as the trainer calls it.
            rows (list[int]): row numbers.
            batch (Batch): of these rows.
            scale (float | torch.Tensor): factor of the loss summed over positions.
            mode (str): "train" or "eval".

        Returns:
            torch.Tensor: scalar.
        """
        assert self.decoder is not None
        self.decoder.model = model
        loss, terms = self._terms(rows, batch.to(self.device))
        tokens = torch.stack([batch.ce_weight.sum(), batch.weight.sum()]).to(self.device)
        sums = torch.cat([terms, tokens]).double()
        self._sums[mode] = self._sums[mode] + sums if mode in self._sums else sums
        return loss * scale

    def _terms(self, rows: list[int], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and terms of a batch on the model's device, summed over positions."""
        assert self.decoder is not None and self.reference is not None
        reference = self.reference.read(rows)
        if self.objective.weigh is not None:
            factor = self.objective.weigh(reference["full"], batch.position, batch.row)
            batch = dataclasses.replace(batch, weight=batch.weight * factor)
        return self.decoder.loss(batch, self.objective, reference, 1.0)

    def trainer_loss(
        self, trainer: Trainer, model: nn.Module, rows: list[int], batch: Batch, items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """What a trainer's ``compute_loss`` returns: a mean over the trained tokens of the whole step, of all processes.

        Args:
            trainer (Trainer): whose loss it is.
            model (nn.Module): as the trainer calls it.
            rows (list[int]): row numbers.
            batch (Batch): of these rows.
            items (torch.Tensor | int | None): trained tokens of the whole step; None: of this batch.

        Returns:
            torch.Tensor: scalar.
        """
        if self.decoder is None:
            dtype = torch.bfloat16 if trainer.args.bf16 else causal_lm_of(self.model).dtype
            self.open(model, dtype)
        if self.analysis is None:
            self._start_analysis(trainer)
        scale: float | torch.Tensor
        if items is None:
            scale = 1.0 / max(batch.ce_weight.sum().item() or batch.weight.sum().item(), 1.0)
        else:
            scale = 1.0 / torch.as_tensor(items).clamp(min=1)
            if trainer.args.average_tokens_across_devices:  # counted on all processes, whose gradients are averaged
                scale = scale * trainer.accelerator.num_processes
        assert trainer.model is not None  # only a trainer that makes its model anew for a search has none
        return self.loss(model, rows, batch, scale, "train" if trainer.model.training else "eval")

    def add_to(self, logs: dict[str, float], training: bool) -> None:
        """Adds the objective's terms to a trainer's logs: sums over tokens, not means of batches' means."""
        if training and "loss" not in logs:  # the summary of a run
            return
        mode, prefix = ("train", "") if training else ("eval", "eval_")
        logs.update({f"{prefix}{name}": value for name, value in self.means(mode).items()})

    def means(self, mode: str) -> dict[str, float]:
        """Terms by trained tokens since the last call, over all ranks, and the loss; all ranks must call it."""
        if mode not in self._sums:
            return {}
        sums = self._sums.pop(mode)
        if dist.is_initialized():
            dist.all_reduce(sums)
        means = self._means(sums)
        if mode == "train":
            self.final = dict(means)
        return means

    def _means(self, sums: torch.Tensor) -> dict[str, float]:
        *terms, trained, constrained = sums.tolist()
        tokens = trained or constrained or 1
        means = {name: term / tokens for name, term in zip(self.objective.names, terms, strict=True)}
        return means | {"loss": self.objective.total(means)}

    def items(self, counted: torch.Tensor | int | None, batches: Sequence[Any], trainer: Trainer) -> Any:
        """What a step's sums are divided by: its trained tokens; where none is trained, the constrained ones.

        Args:
            counted (torch.Tensor | int | None): trained tokens of the step, by the trainer; of all processes.
            batches (Sequence[Any]): of the step, on this process, each with what :meth:`collate` gives.
            trainer (Trainer): whose step it is.

        Returns:
            Any: ``counted``, or a number in its place.
        """
        # A look at a number on a GPU waits for it, and only such rows can make it zero.
        if counted is None or self._all_trained or int(counted) > 0:
            return counted
        tokens = torch.stack([batch["batch"].weight.sum() for batch in batches]).sum()
        if trainer.args.average_tokens_across_devices:
            tokens = trainer.accelerator.gather(tokens.to(self.device)).sum()
        return tokens

    # Analysis --------------------------------------------------------------------------------------------------------

    def _start_analysis(self, trainer: Trainer) -> None:
        """Records of the initial model, and of each epoch's end to come; none while the trainer only evaluates."""
        options = self.analysis_options
        if options is None or trainer.model is None or not trainer.model.training:
            return
        assert self.decoder is not None and self.reference is not None
        folder = Path(str(trainer.args.output_dir))
        train = self.data[0]

        def loss(rows: list[int], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
            batch = collate([self.rows[row] for row in rows], self.tokenizer.pad_token_id)
            return self._terms(rows, batch.to(self.device))

        self.analysis = Analysis(
            options, self.context, self.decoder, train, range(len(train)), self.objective, loss, self.reference,
            folder if trainer.args.process_index == 0 else None,
        )  # fmt: skip
        trainer.add_callback(_AtEpochEnd(self))
        if trainer.state.global_step == 0:
            if self.analysis.folder is not None:
                (folder / ANALYSIS_FILE).unlink(missing_ok=True)  # another run's
            self.look(0, 0)

    def look(self, step: int, epoch: int) -> None:
        """Writes the records of one moment; all ranks must call it."""
        assert self.decoder is not None and self.analysis is not None
        self.decoder.model = self.model  # not DDP's wrapper
        self.analysis.look(step, epoch)

    # Results ---------------------------------------------------------------------------------------------------------

    def stamp(self, folder: Path, trainer: str, arguments: Mapping[str, Any], steps: int) -> None:
        """Writes pact.json beside an adapter; the last thing that is written there. Calling it again is harmless.

        Args:
            folder (Path): with the adapter.
            trainer (str): which wrote it.
            arguments (Mapping[str, Any]): of the trainer; JSON-serialisable.
            steps (int): optimiser steps so far.
        """
        final = self.final
        if not final and "train" in self._sums:  # a run too short to have logged anything: this process's own
            final = self._means(self._sums["train"])
        if not (folder / CONFIG).is_file() or not final:
            return
        _, spec = read_adapter(folder)
        train = self.data[0]
        network = self.network
        weights = dict.fromkeys(ModelFolder(self.folder, "the model"))
        write_stamp(
            folder,
            {
                "pact_tune": __version__,
                "machine": machine(causal_lm_of(self.model).device),
                "trainer": trainer,
                "steps": steps,
                "loss": self.objective.settings,
                "safety_tokens": {"source": self.section.get("safety_tokens"), **self.objective.reading.describe()},
                "data": {
                    "fingerprint": data_fingerprint(train.conversations),
                    "sources": [vars(counts) for counts in train.counts],
                    "tokenizer": tokenizer_fingerprint(self.tokenizer),
                },
                "reference": {
                    "fingerprint": self.weights_hash,
                    "dtype": str(causal_lm_of(self.model).dtype).removeprefix("torch."),
                    "quantized": network["quantized"],
                    "adapter": network.get("adapter"),
                },
                "adapter": {**spec._asdict(), "fingerprint": fingerprint(load_file(folder / WEIGHTS))},
                "base": str(self.folder.resolve()),
                "renamed": checkpoint_names(causal_lm_of(self.model), weights),
                "final": final,
                "validation": {},
                "config": {"dataset": train.section, "loss": self.section, **arguments},
            },
        )


class _AtEpochEnd(TrainerCallback):
    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.constraint.look(state.global_step, math.ceil(state.epoch or 0))


def _check_equal_rows(part: ChatDataset) -> None:
    """Raises UserError for equal rows of different weights: a trainer passes on tokens alone."""
    first: dict[bytes, int] = {}
    for number, row in enumerate(part.conversations):
        other = first.setdefault(row.key, number)
        earlier = part.conversations[other]
        if (row.ce_weight, row.weight) != (earlier.ce_weight, earlier.weight):
            names = " and ".join(f"'{part.counts[part.sources[i]].label}'" for i in (other, number))
            raise UserError(
                f"A row stands twice with different weights, in {names}, and a trainer cannot tell the two apart: leave "
                "it out once, give both the same weights, or use the recipe."
            )


def _labels(row: Conversation) -> list[int]:
    labels = [-100] * len(row.tokens)
    for start, end in row.responses:
        labels[start:end] = row.tokens[start:end]
    return labels


def spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Responses: runs of labels other than -100."""
    trained = [False, *(label != -100 for label in labels), False]
    starts = [i for i in range(len(labels)) if trained[i + 1] and not trained[i]]
    ends = [i + 1 for i in range(len(labels)) if trained[i + 1] and not trained[i + 2]]
    return list(zip(starts, ends, strict=True))


def documents(example: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """input_ids and labels of each row in an example, which may hold several."""
    lengths = example.get("seq_lengths") or [len(example["input_ids"])]
    found, start = [], 0
    for length in lengths:
        found.append((example["input_ids"][start : start + length], example["labels"][start : start + length]))
        start += length
    return found
