"""LoRA fine-tuning that keeps refusals, for one process or many.

    tune run pact_lora_finetune --config qwen2_5/7B_pact_lora
    tune run --nproc_per_node 4 pact_lora_finetune --config llama3_1/8B_pact_lora

One class serves both: with several processes the model is sharded with FSDP2 (gloo on CPUs, NCCL on GPUs).
"""

import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torchtune import config, modules, training, utils
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm

from pact_tune.batching import (
    Batch,
    collate,
    epoch_order,
    group_by_length,
    rank_rows,
    response_only_views,
    to_device,
)
from pact_tune.conversations import Conversation, response_only_prefix, show
from pact_tune.distributed import finish
from pact_tune.errors import UserError
from pact_tune.files import atomic_file, remove_partial
from pact_tune.fingerprints import fingerprint
from pact_tune.objectives import Reference
from pact_tune.reference_cache import ReferenceCache, batches_of, shards_of
from pact_tune.stamp import data_fingerprint
from pact_tune.torchtune import lora
from pact_tune.torchtune.config import read_command_line
from pact_tune.torchtune.model import Decoder
from pact_tune.version import __version__

STATE_FILE = "recipe_state.pt"
SAMPLED_ROWS = 256  # rows on which the reference's mass on S is reported where it has to be computed for that
CHECKED_ROWS = 4  # rows whose cached reference is compared with the live one at the start of a run
# Mean total variation between cached and live reference that storage and the shape of a batch account for.
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
SECONDS_FOR_RANK_0 = 60  # after which a rank that alone met an error says so itself
MASS_RANGES = {"0": (0, 1), "1-7": (1, 8), "8+": (8, None)}


class PACTLoRAFinetuneRecipe(FTRecipeInterface):
    """LoRA fine-tuning with any objective of :mod:`pact_tune.objectives`.

    The order of the rows, the initial adapter and dropout depend on the seed and the step alone. So a run that was
    killed and resumed ends with the same adapter as one that was not, and a run on N processes sees the same global
    batches as a run on one.

    Args:
        cfg (DictConfig): a complete config, see :func:`pact_tune.torchtune.config.complete`.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.device = utils.get_device(cfg.device)
        if self.device.type != torch.device(cfg.device).type:  # torchtune falls back to the CPU without a word
            raise UserError(f"device: {cfg.device} is not available here: set device: {self.device.type}.")
        try:
            self.dtype = training.get_dtype(cfg.dtype, device=self.device)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"dtype: {cfg.dtype} cannot be used here: {error}") from error
        self.adapter_dtype = training.get_dtype(cfg.adapter_dtype, device=self.device)
        self.world_size, self.rank = utils.get_world_size_and_rank()
        self.output_dir = Path(cfg.output_dir)
        self.global_step = 0
        self.logger = None

    # Set-up ----------------------------------------------------------------------------------------------------------

    def setup(self, cfg: DictConfig) -> None:
        """Builds everything; what needs no weights is checked before they are loaded.

        Args:
            cfg (DictConfig): the complete config.

        Raises:
            UserError: bad input, with the mend.
        """
        if self.rank == 0:
            remove_partial(self.output_dir)
        self.tokenizer = config.instantiate(cfg.tokenizer)
        self.checkpointer = config.instantiate(cfg.checkpointer)
        self.objective = config.instantiate(cfg.loss)
        self._say(self.objective.prepare(self.tokenizer, self.checkpointer.vocab_size))
        if "response_only" in self.objective.views:
            self.prefix = response_only_prefix(self.tokenizer, self.objective.response_only_bos)
        self.dataset = config.instantiate(cfg.dataset, self.tokenizer)
        for counts in self.dataset.counts:
            self._say(f"Data: {counts}")
        self._say(f"A row, its response marked by >>> and <<<:\n{show(self.tokenizer, self.dataset.conversations[0])}")
        self.objective.to(self.device)
        self._setup_steps()
        state = self.load_checkpoint() if cfg.resume_from_checkpoint else None
        if state and state["global_step"] >= self.total_steps:
            raise UserError(
                f"The run in '{self.output_dir}' is complete ({self.total_steps} steps): nothing to resume."
            )

        self.decoder = Decoder(self._setup_model(state), self.tokenizer.pad_token_id, self.device)
        self.model = self.decoder.model
        self._setup_optimizer(state)
        self._setup_reference()
        if state and not self.adapters:  # only now: the reference was the model as it was before the first step
            lora.load(self.model, state["trained"])

    def _setup_steps(self) -> None:
        """How rows become steps; a last batch that is not full is trained on like any other."""
        cfg = self.cfg
        if len(self.dataset) < self.world_size:
            raise UserError(
                f"The data has {len(self.dataset)} row(s), fewer than the {self.world_size} processes: use fewer processes."
            )
        self.lengths = [len(c.tokens) for c in self.dataset.conversations]
        self.rows_per_step = cfg.batch_size * self.world_size * cfg.gradient_accumulation_steps
        response_tokens = sum(c.num_response_tokens for c in self.dataset.conversations)
        self.tokens_per_step = response_tokens * min(1, self.rows_per_step / len(self.dataset))
        self.steps_per_epoch = -(-len(self.dataset) // self.rows_per_step)
        if cfg.max_steps_per_epoch is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, cfg.max_steps_per_epoch)
        self.total_steps = self.steps_per_epoch * cfg.epochs
        used = {row for epoch in range(cfg.epochs) for row in self._rows(epoch)}
        self.used = [self.dataset.conversations[row] for row in sorted(used)]

    def _rows(self, epoch: int) -> list[int]:
        """Row numbers of an epoch, in the order in which its steps take them."""
        cfg = self.cfg
        order = epoch_order(len(self.dataset), cfg.seed, epoch, cfg.shuffle)
        if cfg.batch_by_length:
            order = group_by_length(order, self.lengths, self.rows_per_step, cfg.seed, epoch)
        return order[: self.steps_per_epoch * self.rows_per_step]

    def _setup_model(self, state: dict[str, Any] | None) -> torch.nn.Module:
        """Base weights from the checkpoint, adapter from the seed or from the state of the run to resume."""
        cfg = self.cfg
        distributed = self.world_size > 1
        with training.set_default_dtype(self.dtype), torch.device("meta" if distributed else self.device):
            model = lora.build(cfg.model, self.world_size, self.adapter_dtype)
        self._check_length(model)
        self.quantized = lora.quantized_names(model)
        self.adapters = bool(lora.modules(model))
        if self.adapters:
            set_trainable_params(model, get_adapter_params(model))
        else:
            self._check_full()
        self.checkpointer.check(model)
        base = self.checkpointer.load()
        adapter = {}
        if self.adapters:
            fresh = lora.initial_adapter(model, base, cfg.seed)
            adapter = state["trained"] if state else self.checkpointer.start(fresh, lora.spec(model))
        if cfg.compile:
            training.compile_model(model, verbose=self.rank == 0)
        if cfg.enable_activation_checkpointing:
            training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
        if distributed:
            lora.shard(model, self.device, self.dtype, cfg.fsdp_reshard_after_forward)
        lora.fill(model, base, adapter, self.device)
        return model

    def _check_length(self, model: torch.nn.Module) -> None:
        """Raises UserError when a row of the data does not fit into the model."""
        in_a_row = self.cfg.batch_size if self.cfg.packed else 1
        longest = sum(sorted(self.lengths, reverse=True)[:in_a_row])
        if longest > model.max_seq_len:
            raise UserError(
                f"The longest row{'s that may be packed have' if self.cfg.packed else ' has'} {longest} tokens, and the model "
                f"takes {model.max_seq_len}: set dataset.max_seq_len to leave longer ones out."
            )

    def _check_full(self) -> None:
        """Raises UserError where training all weights needs something that the config does not give."""
        self._say("The model builder has no adapters: all weights are trained.")
        if self.dtype is torch.bfloat16:
            self._say(
                "WARNING: weights trained in bf16 lose steps below 0.2 % of a weight's size (most, at lr 1e-5): set dtype: "
                "fp32 where memory allows, or train an adapter, which is kept in float32."
            )
        if self.objective.views and (self.cfg.reference_cache is None or self.cfg.reference_cache.lazy):
            raise UserError(
                "Full fine-tuning moves the weights that the reference is computed with, so it must be stored before the "
                "first step: set reference_cache, with lazy: False, or name a lora_* builder in model._component_."
            )
        if self.cfg.save_adapter_weights_only:
            raise UserError("save_adapter_weights_only needs an adapter: set it to False, or name a lora_* builder.")

    def _setup_optimizer(self, state: dict[str, Any] | None) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = config.instantiate(self.cfg.optimizer, parameters)
        self.scheduler = None
        if self.cfg.lr_scheduler is not None:
            self.scheduler = config.instantiate(
                self.cfg.lr_scheduler, self.optimizer, num_training_steps=self.total_steps, last_epoch=-1
            )
        if state is None:
            return
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.world_size > 1)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.global_step = state["global_step"]
        self._say(f"Resuming after step {self.global_step} of {self.total_steps}.")

    def _setup_reference(self) -> None:
        """Opens the cache and fills it, unless steps are to do that, or the objective needs none, or it runs live."""
        self.cache, self.lazy = None, False
        if not self.objective.views:
            return
        if self.cfg.reference_cache is not None:
            self._setup_cache()
        self._report_mass()

    def _setup_cache(self) -> None:
        columns = self.objective.columns
        network = OmegaConf.to_container(self.cfg.model, resolve=True)
        reference = {
            "weights": self.checkpointer.weights_hash,
            # What the files do not fix, such as the scaling of rotary embeddings; the adapter is off in the reference.
            "network": {key: value for key, value in network.items() if "lora" not in key},
            "dtype": str(self.dtype),
            "quantized": self.quantized,
            "safety_tokens": columns.ids.tolist(),
            "tail": columns.tail,
        }
        options = dict(self.cfg.reference_cache)
        self.lazy = options.pop("lazy")
        self.cache = ReferenceCache(reference=reference, **options)
        self._fill_cache()
        self._check_cache()

    def _fill_cache(self) -> None:
        """Stores what is missing; under FSDP every rank runs the same number of forwards."""
        plan = [self._plan_fill() if self.rank == 0 else None]
        if self.world_size > 1:  # rank 0 decides: another process may be filling the same cache meanwhile
            dist.broadcast_object_list(plan)
        (plan,) = plan
        if isinstance(plan, UserError):
            raise plan
        shards, stored = plan
        if self.lazy:
            self.cache.refresh(stored)
            self._say(f"Reference cache: steps compute what {self.cache.directory} lacks")
            return
        if not shards:
            self._say(f"Reference cache: nothing to compute, all views are in {self.cache.directory}")
            return
        mine = rank_rows(shards, self.rank, self.world_size)
        random.shuffle(mine)  # two processes that fill the same cache find much of each other's work done
        forwards = max(
            sum(len(batches_of(shard)) for shard in rank_rows(shards, rank, self.world_size))
            for rank in range(self.world_size)
        )
        tokens = sum(len(c.tokens) for shard in shards for c in shard)
        self._say(f"Reference cache: computing {sum(map(len, shards))} views into {self.cache.directory}")
        with tqdm(total=tokens, unit="tok", unit_scale=True, desc="Reference", disable=self.rank != 0) as bar:
            for shard in mine:
                if not self.cache.has_shard(shard):
                    parts = []
                    for batch in batches_of(shard):
                        parts += self._reference_of(batch)
                        forwards -= 1
                        done = sum(len(c.tokens) for c in batch) * self.world_size  # as if all ranks were equally fast
                        bar.update(min(done, tokens - bar.n))
                    self.cache.store(shard, parts)
            for _ in range(forwards if self.world_size > 1 else 0):
                self._reference_of([])
        if self.world_size > 1:
            dist.barrier()
        self.cache.refresh()

    def _plan_fill(self) -> tuple[list[list[Conversation]], list[Path]] | UserError:
        """What to compute and which shards there are, with room made; an error is returned, so that all ranks raise it."""
        try:
            shards = self.cache.plan(view for c in self.used for view in self._views(c))
            for name in self.cache.make_room(shards, self.objective.columns.width):
                self._say(f"Reference cache: removed {name}, the least recently used, to keep within max_gb")
        except UserError as error:
            return error
        return shards, shards_of(self.cache.directory)

    def _fill_lazily(self, rows: list[int]) -> None:
        """Computes what the cache lacks of a step's rows; ranks share the work, and all keep all of it.

        So all ranks know the same cache, and agree without a word whether a forward of the reference is needed.
        """
        missing = self.cache.missing(view for row in rows for view in self._views(self.dataset.conversations[row]))
        if not missing:
            return
        shares = [batches_of(rank_rows(missing, rank, self.world_size)) for rank in range(self.world_size)]
        mine = shares[self.rank] + [[]] * (max(map(len, shares)) - len(shares[self.rank]))
        views = [view for batch in mine for view in batch]
        computed = views, [columns.cpu() for batch in mine for columns in self._reference_of(batch)]
        of_ranks = [computed] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(of_ranks, computed)
        for views, columns in of_ranks:
            self.cache.add(views, columns)

    def _check_cache(self) -> None:
        """Compares the cache with the live reference on a few rows.

        Raises:
            UserError: they differ, as they do when a cache was filled with an adapter left on, or by a faulty kernel.
        """
        rows = self.used[:: max(1, len(self.used) // CHECKED_ROWS)][:CHECKED_ROWS]
        views = [view for row in rows for view in self._views(row) if view in self.cache]
        if not views:
            return  # nothing is stored yet that steps have to fill
        views.sort(key=lambda c: -len(c.tokens))
        live = torch.cat([part for batch in batches_of(views) for part in self._reference_of(batch)]).cpu()
        distance = (live.softmax(-1) - self.cache.get(views).softmax(-1)).abs().sum(-1).mean() / 2
        self._say(f"Reference cache: {len(views)} views checked, distance to the live reference {distance:.1e}")
        if not distance <= CHECK_TOLERANCE[self.dtype]:
            raise UserError(
                f"The reference cache in '{self.cache.directory}' does not hold what this model computes (mean distance "
                f"{distance:.2g} of the safety tokens' probabilities on {len(views)} views): delete that folder."
            )

    def _views(self, conversation: Conversation) -> Iterator[Conversation]:
        """The reference views of a conversation that the objective needs."""
        yield conversation
        if "response_only" in self.objective.views:
            yield from self._response_only(conversation)

    def _response_only(self, conversation: Conversation) -> list[Conversation]:
        return response_only_views(conversation, self.prefix, self.objective.response_only_tokens)

    def _reference_of(self, conversations: Sequence[Conversation]) -> list[torch.Tensor]:
        """Columns of one batch of conversations, one tensor ``[n, C]`` each."""
        columns = self.decoder.reference_columns(conversations, self.objective.columns)
        return list(columns.split([c.num_response_tokens for c in conversations]))

    def _report_mass(self) -> None:
        """Says how much probability the reference gives to S on the training rows (with the tail alone it is known).

        Much of it at position 0 means that the rows begin unlike the aligned model's own answers, or that S holds mere
        style tokens: the constraint will then fight the task.
        """
        if not self.objective.columns.tail:
            return
        total, count = torch.zeros(len(MASS_RANGES)), torch.zeros(len(MASS_RANGES))
        stored = self.cache is not None and not self.lazy
        conversations = self.used if stored else self.used[:: max(1, len(self.used) // SAMPLED_ROWS)]
        for batch in batches_of(conversations):
            full = self.cache.get(batch) if stored else torch.cat(self._reference_of(batch)).cpu()
            mass = 1 - full.softmax(-1)[:, -1]
            position = collate(batch, 0).position
            for i, (start, end) in enumerate(MASS_RANGES.values()):
                inside = (position >= start) & (position < (end or torch.inf))
                total[i] += mass[inside].sum()
                count[i] += inside.sum()
        shares = dict(zip(MASS_RANGES, (total / count.clamp(min=1)).tolist(), strict=True))
        text = ", ".join(f"{name}: {share:.3f}" for name, share in shares.items())
        self._say(f"Reference's mean probability mass on the safety tokens, by response position: {text}")
        if shares["0"] > 0.5:
            self._say(
                "WARNING: more than half of the mass at response position 0 lies on the safety tokens: the training "
                "rows begin unlike the aligned model's own answers, or the safety tokens include mere style tokens; "
                "the constraint will fight the task (see docs/method.md, 'When the constraint fights the task')."
            )

    # Training --------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Runs the remaining steps, writing a result after each epoch."""
        cfg = self.cfg
        self.logger = config.instantiate(cfg.metric_logger) if self.rank == 0 else None
        while self.global_step < self.total_steps:
            epoch, done = divmod(self.global_step, self.steps_per_epoch)
            rows = self._rows(epoch)
            steps = range(done, self.steps_per_epoch)
            self._start_interval()
            with tqdm(
                steps, desc=f"Epoch {epoch + 1}/{cfg.epochs}", initial=done, total=self.steps_per_epoch,
                unit="step", disable=self.rank != 0,
            ) as bar:  # fmt: skip
                for step in bar:
                    self._step(rows[step * self.rows_per_step : (step + 1) * self.rows_per_step])
                    last = step + 1 == self.steps_per_epoch
                    if self.global_step % cfg.log_every_n_steps == 0 or last:
                        bar.set_postfix_str(self._log())
                    if cfg.save_every_n_steps and self.global_step % cfg.save_every_n_steps == 0 and not last:
                        self._save_state()
            self.save_checkpoint(epoch)
        self._say(f"Done: the result is {self.output_dir / f'epoch_{cfg.epochs - 1}'}")

    def _step(self, rows: list[int]) -> None:
        """One optimiser step on a global batch, given by its row numbers."""
        # Dropout depends on seed, step and rank alone, so that a resumed run draws the same.
        torch.manual_seed((self.cfg.seed * 1_000_003 + self.global_step) * 1024 + self.rank)
        if self.lazy:
            self._fill_lazily(rows)
        # The loss of a step does not depend on how it is cut into micro-batches: like lengths together pad least.
        rows = sorted(rows, key=lambda row: self.lengths[row])
        response_tokens = sum(self.dataset.conversations[row].num_response_tokens for row in rows)
        # A step of short rows must not weigh as much as one of long rows: by length, every step has the same divisor.
        divisor = self.tokens_per_step if self.cfg.batch_by_length else response_tokens
        micro_rows = self.cfg.batch_size * self.world_size
        for start in range(0, len(rows), micro_rows):
            mine = rank_rows(rows[start : start + micro_rows], self.rank, self.world_size)
            conversations = [self.dataset.conversations[row] for row in mine]
            batch = collate(conversations, self.decoder.pad_id, self.cfg.packed)
            reference = self._reference(conversations, batch)
            batch = batch.to(self.device)
            # All ranks know the global batch, so its token count needs no communication. FSDP averages over ranks.
            loss, metrics = self.decoder.loss(batch, self.objective, reference, self.world_size / divisor)
            loss.backward()
            self.interval_metrics += metrics
        self.interval_tokens += response_tokens
        if self.cfg.clip_grad_norm is not None:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), float(self.cfg.clip_grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        self.global_step += 1

    def _reference(self, conversations: list[Conversation], batch: Batch) -> Reference:
        """The reference views at a batch's positions, from the cache or from a forward of the frozen network."""
        if not self.objective.views:
            return Reference()

        def read(views: list[Conversation]) -> torch.Tensor:
            if self.cache is None:
                return self.decoder.reference_columns(views, self.objective.columns)
            if not views:
                return torch.empty(0, self.objective.columns.width, device=self.device)
            return to_device(self.cache.get(views), self.device)

        full = read(conversations)
        if "response_only" not in self.objective.views:
            return Reference(full)
        short = read([view for c in conversations for view in self._response_only(c)])
        if len(short) < len(full):
            # Where the view was cut the gate is negligible: the full view stands in, which Eq. 7 then leaves as it is.
            (kept,) = torch.nonzero(batch.position < self.objective.response_only_tokens, as_tuple=True)
            short = full.index_copy(0, to_device(kept, self.device), short)
        return Reference(full, short)

    # Logging ---------------------------------------------------------------------------------------------------------

    def _start_interval(self) -> None:
        self.interval_metrics = torch.zeros(len(self.objective.metric_names), device=self.device)
        self.interval_tokens = 0
        self.interval_start = time.perf_counter()

    def _log(self) -> str:
        """Logs the means since the last call; the one place where the loop waits for the device."""
        if self.world_size > 1:
            dist.all_reduce(self.interval_metrics)
        values = (self.interval_metrics / self.interval_tokens).tolist()
        metrics = dict(zip(self.objective.metric_names, values, strict=True))
        metrics["loss"] = self.objective.total(metrics)
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        metrics["tokens_per_second"] = self.interval_tokens / (time.perf_counter() - self.interval_start)
        if self.cfg.clip_grad_norm is not None:
            norm = self.grad_norm
            metrics["grad_norm"] = (norm.full_tensor() if self.world_size > 1 else norm).item()
        if self.cfg.log_peak_memory_stats and self.device.type != "cpu":
            metrics |= training.get_memory_stats(device=self.device)
        self.final = {name: metrics[name] for name in ("loss", *self.objective.metric_names)}
        if self.logger is not None:
            self.logger.log_dict(metrics, step=self.global_step)
        self._start_interval()
        shown = [f"{name} {metrics[name]:.3f}" for name in self.objective.metric_names]
        return ", ".join([*shown, f"{metrics['tokens_per_second']:.0f} tok/s"])

    def _say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def load_checkpoint(self) -> dict[str, Any]:
        """State of the run to resume.

        Returns:
            dict[str, Any]: trained weights, optimizer, scheduler, global_step and the run's identity.

        Raises:
            UserError: there is none, or it belongs to a run with other data or steps.
        """
        path = self.output_dir / STATE_FILE
        if not path.is_file():
            raise UserError(
                f"There is no {STATE_FILE} in '{self.output_dir}' to resume from: set resume_from_checkpoint: False."
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        then, now = state["identity"], self._identity()
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key):
                raise UserError(
                    f"The run in '{self.output_dir}' cannot be resumed with this config: its {key} was {then.get(key)}, "
                    f"now it is {now.get(key)}."
                )
        return state

    def _identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        cfg = self.cfg
        identity = {
            key: cfg[key] for key in ("seed", "shuffle", "batch_by_length", "clip_grad_norm", "dtype", "adapter_dtype")
        }
        identity |= {
            "data": data_fingerprint(self.dataset.conversations),
            "rows per step": self.rows_per_step,
            "total steps": self.total_steps,
            "reference": self.checkpointer.weights_hash,
        }
        sections = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("model", "optimizer")}
        sections["lr_scheduler"] = OmegaConf.to_container(cfg.lr_scheduler, resolve=True) if cfg.lr_scheduler else {}
        sections["loss"] = self.objective.settings()
        return identity | {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}

    def _save_state(self) -> None:
        """Writes all that a resumption needs to one file, which is replaced as a whole."""
        if self.lazy:
            self.cache.flush()
        trained = lora.gather(self.model)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        if self.rank == 0:
            state = {
                "trained": trained,
                "optimizer": optimizer,
                "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
                "global_step": self.global_step,
                "identity": self._identity(),
            }
            with atomic_file(self.output_dir / STATE_FILE) as file:
                torch.save(state, file)
        if self.world_size > 1:
            dist.barrier()

    def save_checkpoint(self, epoch: int) -> None:
        """Writes an epoch's result (merged model, PEFT adapter, pact.json), then the state to resume from.

        Args:
            epoch (int): counted from 0; names the folder.
        """
        trained = lora.gather(self.model)
        if self.rank == 0:
            name, stamp = f"epoch_{epoch}", self._stamp(epoch)
            directory = self.checkpointer.save(
                name,
                trained,
                lora.spec(self.model) if self.adapters else None,
                stamp,
                quantized=self.quantized,
                dtype=self.dtype,
                merge=not self.cfg.save_adapter_weights_only,
            )
            self._say(f"Saved {directory}")
        self._save_state()

    def _stamp(self, epoch: int) -> dict[str, Any]:
        """How the result was made, for pact.json."""
        tokens = None
        if self.objective.columns is not None:
            tokens = fingerprint({"ids": self.objective.columns.ids, "weights": self.objective.weights})
        return {
            "pact_tune": __version__,
            "epoch": epoch,
            "steps": self.global_step,
            "loss": self.objective.settings(),
            "safety_tokens": {"source": self.cfg.loss.get("safety_tokens"), "fingerprint": tokens},
            "data": {
                "fingerprint": data_fingerprint(self.dataset.conversations),
                "sources": [vars(counts) for counts in self.dataset.counts],
            },
            # With QLoRA the reference is the quantised base: these weights are in NF4, under torchtune's names.
            "reference": {
                "fingerprint": self.checkpointer.weights_hash,
                "dtype": str(self.dtype).removeprefix("torch."),
                "quantized": self.quantized,
            },
            "final": self.final,
            "config": OmegaConf.to_container(self.cfg, resolve=True),
        }

    def cleanup(self) -> None:
        """Closes the metric logger."""
        if self.logger is not None:
            self.logger.close()


def run(argv: Sequence[str], work: Callable[[PACTLoRAFinetuneRecipe], None]) -> str | None:
    """Sets the recipe up, on one process or on those that torchrun started, and does some work with it.

    Args:
        argv (Sequence[str]): the command line, see :func:`pact_tune.torchtune.config.read_command_line`.
        work (Callable): is given the recipe.

    Returns:
        str | None: the message of a user error. With several processes a success does not return: it ends the process.
    """
    try:
        cfg = read_command_line(argv)
        if training.is_distributed():
            backend = "gloo" if cfg.device == "cpu" else "cuda:nccl,cpu:gloo"
            dist.init_process_group(backend)
        recipe = PACTLoRAFinetuneRecipe(cfg)
        recipe.setup(cfg)
        work(recipe)
        recipe.cleanup()
        if dist.is_initialized():
            finish()
    except UserError as error:
        # Every rank meets the same error; one says it. torchrun ends all with the first that fails: let that be rank 0.
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SECONDS_FOR_RANK_0)
        return f"pact_lora_finetune: {error}"
    return None


def main() -> None:
    """Entry point of `tune run pact_lora_finetune`; ends the process."""
    sys.exit(run(sys.argv[1:], PACTLoRAFinetuneRecipe.train))


if __name__ == "__main__":
    main()
