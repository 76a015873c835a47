"""Where a run's reference comes from: computed live, or once and stored; before the first step, or as steps need it.

A source plans, fills, checks and reads. It is given a function that computes a reading and knows neither a trainer nor a
model. Every rank of a distributed run has one and calls the same methods at the same time.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pact_tune.batching import rank_rows, response_only_views, to_device
from pact_tune.conversations import Conversation
from pact_tune.errors import UserError
from pact_tune.files import check_space
from pact_tune.log import logger, progress
from pact_tune.objectives.base import Objective, View
from pact_tune.reference.cache import ReferenceCache, batches_of, shards_of

SAMPLED_ROWS = 256  # rows on which a report is made where the reference has to be computed for it
CHECKED_ROWS = 4  # rows whose stored reference is compared with the live one at the start of a run
# Mean difference between stored and live reference that storage and the shape of a batch account for.
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
Compute = Callable[[Sequence[Conversation]], torch.Tensor]


class _Row(NamedTuple):
    """What is needed of a row at every step, made once.

    Attributes:
        response_only (list[Conversation]): its response-only views, cut where the gate is negligible; empty if not needed.
        kept (torch.Tensor | None): response positions of the row that these cover; None: all.
    """

    response_only: list[Conversation]
    kept: torch.Tensor | None


class ReferenceSource:
    """The reference of a run's rows.

    Args:
        rows (Sequence[Conversation]): all rows that a run may use; steps name them by number.
        objective (Objective): what is read, and in which views.
        prefix (Sequence[int]): what precedes a response in its response-only view.
        compute (Compute): the objective's reading of one batch of conversations, ``[T, W]``, on the model's device; called
            equally often on all ranks.
        hidden_size (int): H of the network.
        dtype (torch.dtype): of the network.
        device (torch.device): where readings are wanted.
        network (dict[str, Any]): all that the numbers depend on beside the reading.
        options (Mapping[Any, Any] | None): directory, dtype, max_gb and lazy of the cache; None: computed in every step.
    """

    def __init__(
        self,
        rows: Sequence[Conversation],
        objective: Objective,
        prefix: Sequence[int],
        compute: Compute,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        network: dict[str, Any],
        options: Mapping[Any, Any] | None,
    ) -> None:
        self.rows = rows
        self.objective = objective
        self.reading = objective.reading
        self.prefix = prefix
        self.compute = compute
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = device
        self._prepared: dict[int, _Row] = {}
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.cache: ReferenceCache | None = None
        self.lazy = False
        if options is None or not objective.views:
            return
        options = dict(options)
        self.lazy = options.pop("lazy")
        manifest = {**network, "dtype": str(dtype), **self.reading.describe()}
        self.cache = ReferenceCache(reference=manifest, centred=self.reading.centred, **options)
        itemsize = self.cache.dtype.itemsize if self.reading.centred else dtype.itemsize
        self.bytes_per_position = self.reading.width(hidden_size) * itemsize + torch.float32.itemsize

    # Before the first step -------------------------------------------------------------------------------------------

    def prepare(self, used: Sequence[int]) -> None:
        """Fills the cache for the rows that a run uses, unless steps are to do that, and compares it with the live network.

        Args:
            used (Sequence[int]): row numbers.

        Raises:
            UserError: the cache exceeds its limit, or holds other numbers than the network computes.
        """
        if not self.objective.views:
            return
        used = [row for row in used if self.rows[row].weight]
        if self.cache is not None:
            self.fill(self.cache, used)
            self._check(self.cache, used)
        if self.objective.report is not None:
            for line in self.objective.report(self._samples(used)):
                logger.info(line)

    def fill(self, cache: ReferenceCache, used: Sequence[int]) -> None:
        """Stores what is missing; under FSDP every rank runs the same number of forwards.

        Args:
            cache (ReferenceCache): the source's own.
            used (Sequence[int]): row numbers.
        """
        plan = [self._plan(cache, used) if self.rank == 0 else None]
        if self.world_size > 1:  # rank 0 decides: another process may be filling the same cache meanwhile
            dist.broadcast_object_list(plan)
        (decided,) = plan
        if isinstance(decided, UserError):
            raise decided
        assert decided is not None
        shards, stored = decided
        if self.lazy:
            cache.refresh(stored)
            logger.info(f"Reference cache: steps compute what {cache.directory} lacks")
            return
        if not shards:
            logger.info(f"Reference cache: nothing to compute, all views are in {cache.directory}")
            return
        mine = rank_rows(shards, self.rank, self.world_size)
        random.shuffle(mine)  # two processes that fill the same cache find much of each other's work done
        forwards = max(
            sum(len(batches_of(shard)) for shard in rank_rows(shards, rank, self.world_size))
            for rank in range(self.world_size)
        )
        tokens = sum(len(c.tokens) for shard in shards for c in shard)
        logger.info(
            f"Reference cache: computing {sum(map(len, shards))} views, {self._bytes(shards) / 1e6:.1f} MB, into "
            f"{cache.directory}"
        )
        with progress(total=tokens, unit="tok", unit_scale=True, desc="Reference") as bar:
            for shard in mine:
                if not cache.has_shard(shard):
                    parts: dict[bytes, torch.Tensor] = {}
                    for batch in batches_of(shard):
                        parts |= zip([c.key for c in batch], self._compute_each(batch), strict=True)
                        forwards -= 1
                        done = sum(len(c.tokens) for c in batch) * self.world_size  # as if all ranks were equally fast
                        bar.update(min(done, tokens - bar.n))
                    cache.store(shard, [parts[c.key] for c in shard])
            for _ in range(forwards if self.world_size > 1 else 0):
                self._compute_each([])
        if self.world_size > 1:
            dist.barrier()
        cache.refresh()

    def _plan(
        self, cache: ReferenceCache, used: Sequence[int]
    ) -> tuple[list[list[Conversation]], list[Path]] | UserError:
        """What to compute and which shards there are, with room made; an error is returned, so that all ranks raise it."""
        try:
            shards = cache.plan(view for row in used for view in self._views(row))
            for name in cache.make_room(self._bytes(shards)):
                logger.info(f"Reference cache: removed {name}, the least recently used, to make room")
            if not self.lazy:
                check_space(cache.directory, self._bytes(shards), "The reference cache")
        except UserError as error:
            return error
        return shards, shards_of(cache.directory)

    def _bytes(self, shards: Iterable[Sequence[Conversation]]) -> int:
        return sum(c.num_response_tokens for shard in shards for c in shard) * self.bytes_per_position

    def _check(self, cache: ReferenceCache, used: Sequence[int]) -> None:
        """Raises UserError where the cache holds other numbers, as when it was filled with an adapter left on."""
        rows = used[:: max(1, len(used) // CHECKED_ROWS)][:CHECKED_ROWS]
        views = [view for row in rows for view in self._views(row) if view in cache]
        if not views:
            return  # nothing is stored yet that steps have to fill
        # One by one: neither padding nor a prefix that was computed once for many has a part in it.
        live = torch.cat([self.compute([view]) for view in views]).float().cpu()
        stored = cache.get(views).float()
        if not live.isfinite().all():
            raise UserError(
                "The frozen model computes numbers that are not finite (NaN or infinity) on the training rows: its weights are "
                "damaged, or dtype has too small a range for them."
            )
        if self.reading.centred and stored.shape[1] > 1:  # logits: compared as what they make of probability
            distance = (live.softmax(-1) - stored.softmax(-1)).abs().sum(-1).mean() / 2
        else:
            distance = (live - stored).abs().mean() / live.abs().mean().clamp(min=1e-6)
        logger.info(f"Reference cache: {len(views)} views checked, distance to the live reference {distance:.1e}")
        if not distance <= CHECK_TOLERANCE[self.dtype]:
            raise UserError(
                f"The reference cache in '{cache.directory}' does not hold what this model computes (mean distance "
                f"{distance:.2g} of the {self.reading.name} on {len(views)} views): delete that folder."
            )

    def _samples(self, used: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Full view and positions, batch by batch: of all used rows where they are stored, else of some."""
        stored = self.cache is not None and not self.lazy
        rows = [self.rows[row] for row in (used if stored else used[:: max(1, len(used) // SAMPLED_ROWS)])]
        for batch in batches_of(rows):
            if stored and self.cache is not None:
                full = self.cache.get(batch)
            else:
                full = torch.cat(self._compute_each(batch)).cpu()
            position = torch.tensor([t for c in batch for start, end in c.responses for t in range(end - start)])
            yield full, position

    # In steps --------------------------------------------------------------------------------------------------------

    def fill_lazily(self, rows: Sequence[int]) -> None:
        """Computes what the cache lacks of a step's rows; ranks share the work, and all keep all of it.

        So all ranks know the same cache, and agree without a word whether a forward of the reference is needed.

        Args:
            rows (Sequence[int]): of the global batch.
        """
        if self.cache is None or not self.lazy:
            return
        missing = self.cache.missing(view for row in rows for view in self._views(row))
        if not missing:
            return
        shares = [batches_of(rank_rows(missing, rank, self.world_size)) for rank in range(self.world_size)]
        mine = shares[self.rank] + [[]] * (max(map(len, shares)) - len(shares[self.rank]))
        views = [view for batch in mine for view in batch]
        computed = views, [part.cpu() for batch in mine for part in self._compute_each(batch)]
        of_ranks: list[Any] = [computed] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(of_ranks, computed)
        for views, parts in of_ranks:
            self.cache.add(views, parts)

    def flush(self) -> None:
        """Writes what lazy steps have computed and not written yet."""
        if self.cache is not None and self.lazy:
            self.cache.flush()

    def read(self, rows: Sequence[int]) -> dict[View, torch.Tensor]:
        """The reference at the positions of some rows, one after the other.

        Args:
            rows (Sequence[int]): row numbers of one micro-batch; may be empty.

        Returns:
            dict[View, torch.Tensor]: ``[T, W]`` a view, on the device; zeros for rows that are not constrained, of which
            nothing is computed or stored.
        """
        if not self.objective.views:
            return {}
        constrained = [row for row in rows if self.rows[row].weight]
        found = self._read_rows(constrained)
        if len(constrained) == len(rows):
            return found
        weights = [self.rows[row].weight for row in rows for _ in range(self.rows[row].num_response_tokens)]
        where = to_device(torch.tensor(weights).nonzero()[:, 0], self.device)
        return {
            view: values.new_zeros(len(weights), values.shape[1]).index_copy(0, where, values)
            for view, values in found.items()
        }

    def _read_rows(self, rows: Sequence[int]) -> dict[View, torch.Tensor]:
        full = self._read([self.rows[row] for row in rows])
        if "response_only" not in self.objective.views:
            return {"full": full}
        prepared = [self._prepare(row) for row in rows]
        short = self._read([view for row in prepared for view in row.response_only])
        if len(short) < len(full):
            # Where the view was cut the gate is negligible: the full view stands in, which Eq. 7 then leaves as it is.
            kept, start = [], 0
            for number, row in zip(rows, prepared, strict=True):
                length = self.rows[number].num_response_tokens
                kept.append((torch.arange(length) if row.kept is None else row.kept) + start)
                start += length
            short = full.index_copy(0, to_device(torch.cat(kept), self.device), short)
        return {"full": full, "response_only": short}

    def _read(self, views: list[Conversation]) -> torch.Tensor:
        if self.cache is None:
            return self.compute(views)
        if not views:
            dtype = torch.float32 if self.reading.centred else self.dtype
            return torch.empty(0, self.reading.width(self.hidden_size), dtype=dtype, device=self.device)
        return to_device(self.cache.get(views), self.device)

    # Views -----------------------------------------------------------------------------------------------------------

    def _views(self, row: int) -> Iterator[Conversation]:
        """The reference views of a row that the objective needs; none where it is not constrained."""
        if self.rows[row].weight:
            yield self.rows[row]
            yield from self._prepare(row).response_only

    def _prepare(self, row: int) -> _Row:
        if row not in self._prepared:
            self._prepared[row] = self._make_row(self.rows[row])
        return self._prepared[row]

    def _make_row(self, conversation: Conversation) -> _Row:
        if "response_only" not in self.objective.views:
            return _Row([], None)
        limit = self.objective.response_only_tokens
        views = response_only_views(conversation, self.prefix, limit)
        lengths = [end - start for start, end in conversation.responses]
        if limit is None or max(lengths) <= limit:
            return _Row(views, None)
        kept = [t < limit for length in lengths for t in range(length)]
        return _Row(views, torch.tensor(kept).nonzero()[:, 0])

    def _compute_each(self, conversations: Sequence[Conversation]) -> list[torch.Tensor]:
        """The reading of one batch, one tensor ``[n, W]`` a conversation."""
        return list(self.compute(conversations).split([c.num_response_tokens for c in conversations]))
