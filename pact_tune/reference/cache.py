"""Readings of the reference on disk, content-addressed: computed once, shared between epochs, runs, sweeps and seeds.

Below one root lies a folder per reference (named by a hash of all that its numbers depend on) with a
``manifest.json`` and safetensors shards. A shard holds

    keys     [n, 16] uint8    hash of each conversation (token ids and response ranges)
    offsets  [n + 1] int64    its rows in ``values``
    values   [P, W]           the reading at the response positions; centred readings (safety columns) less each
                              position's maximum, float16 or float32; others (hidden states) as they were computed
    maximum  [P] float32      that maximum; 0 where nothing was subtracted

and a checksum of these. The response-only view of a response is a conversation like any other, so both views live here,
and equal responses are stored once. Shards appear atomically and are never changed, so any number of processes may fill
a cache at a time, and one that is killed loses the shard it was at.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pact_tune.batching import batches_by_prefix
from pact_tune.conversations import Conversation
from pact_tune.errors import UserError
from pact_tune.files import atomic_file, remove_folder, remove_partial
from pact_tune.fingerprints import fingerprint
from pact_tune.log import EVERY_RANK, logger

DTYPES = {"float16": torch.float16, "float32": torch.float32}
FORMAT = 2
MANIFEST = "manifest.json"
SHARD_TOKENS = 65_536  # tokens per shard: what a killed fill loses at most
BATCH_TOKENS = 4_096  # tokens per reference forward, padding included
LEFTOVER_SECONDS = 3_600  # a half-written file of this age belongs to a process that was killed
GB = 1e9


def default_directory() -> Path:
    """Where caches live unless a config says otherwise: ``$PACT_TUNE_CACHE``, or ``~/.cache/pact_tune``."""
    return Path(os.environ.get("PACT_TUNE_CACHE", Path.home() / ".cache" / "pact_tune")) / "reference"


def check_options(dtype: str, max_gb: float | None) -> None:
    """Raises UserError on an unknown dtype, or a limit that is not positive."""
    if dtype not in DTYPES:
        raise UserError(f"reference_cache.dtype is '{dtype}'; it must be one of: {', '.join(DTYPES)}.")
    if max_gb is not None and not max_gb > 0:
        raise UserError(f"reference_cache.max_gb is {max_gb}; it must be above 0, or null for no limit.")


@dataclass(frozen=True)
class _Entry:
    """Where a conversation's rows are: those from ``start`` to ``end`` of the tensors of one shard."""

    shard: Path | None  # None: not on disk yet
    tensors: dict[str, torch.Tensor]
    start: int
    end: int


class ReferenceCache:
    """Content-addressed store of one reference's columns.

    Shards are memory-mapped: opening a cache reads their keys alone, and :meth:`plan` the shards that a run needs, once,
    for their checksums.

    Args:
        directory (str | Path | None): root of all caches; None is :func:`default_directory`.
        reference (dict[str, Any]): everything that the numbers depend on: hash of the weights, constants of the network,
            dtype, backbone, reading. Two references share entries exactly when this is equal.
        dtype (str): of centred readings: "float16" (less the maximum: 2 bytes a number) or "float32" (exact).
        max_gb (float | None): what all caches below ``directory`` may take together, in 10^9 bytes; see :func:`prune`.
        centred (bool): the reading is stored less each position's maximum; False: as it is computed.

    Raises:
        UserError: unknown dtype, or a limit that is not positive.
    """

    def __init__(
        self,
        directory: str | Path | None,
        reference: dict[str, Any],
        dtype: str = "float16",
        max_gb: float | None = None,
        centred: bool = True,
    ) -> None:
        check_options(dtype, max_gb)
        description = {"format": FORMAT, "dtype": dtype if centred else None, "reference": reference}
        self._manifest = json.dumps(description, sort_keys=True) + "\n"
        self.dtype = DTYPES[dtype]
        self.centred = centred
        self.max_gb = max_gb
        self.root = default_directory() if directory is None else Path(directory)
        self.directory = self.root / hashlib.blake2b(self._manifest.encode(), digest_size=12).hexdigest()
        self._write_manifest()
        _remove_leftovers(self.directory)
        self._verified: set[Path] = set()
        self._pending: list[tuple[Conversation, torch.Tensor]] = []
        self.refresh()

    def _write_manifest(self) -> None:
        """Makes sure that the manifest lies there, whole, and that its time says when the reference was last used.

        Another process may remove the reference at any time, and a damaged manifest is mended, since it is known what
        stands in it. On a read-only mount a manifest that is as it should be is enough.
        """
        manifest = self.directory / MANIFEST
        try:
            if manifest.read_text(errors="replace") == self._manifest:
                with contextlib.suppress(OSError):
                    os.utime(manifest)
                return
        except FileNotFoundError:
            pass
        with atomic_file(manifest) as file:
            file.write_text(self._manifest)

    def __contains__(self, conversation: Conversation) -> bool:
        return conversation.key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def refresh(self, shards: Iterable[Path] | None = None) -> None:
        """Looks anew at which shards there are.

        Args:
            shards (Iterable[Path] | None): only these, so that all ranks know the same while another process fills.
        """
        self._entries: dict[bytes, _Entry] = {}
        for shard in shards_of(self.directory) if shards is None else shards:
            self._enter(shard)

    def _enter(self, shard: Path) -> None:
        try:
            tensors, _ = _open_shard(shard)
        except FileNotFoundError:  # another process has just removed it
            return
        except (SafetensorError, OSError):
            self._discard(shard)
            return
        offsets = tensors["offsets"].tolist()
        for row, key in enumerate(tensors["keys"].numpy()):
            self._entries[key.tobytes()] = _Entry(shard, tensors, offsets[row], offsets[row + 1])

    def get(self, conversations: Iterable[Conversation]) -> torch.Tensor:
        """The stored readings of conversations, one after the other.

        Args:
            conversations (Iterable[Conversation]): at least one; each must have been stored.

        Returns:
            torch.Tensor: ``[T, W]``, T = response tokens of all of them; float32 if centred, else as computed.

        Raises:
            KeyError: a conversation that was not stored.
        """
        found = [self._entries[c.key] for c in conversations]
        values = torch.cat([entry.tensors["values"][entry.start : entry.end] for entry in found])
        if not self.centred:
            return values
        maximum = torch.cat([entry.tensors["maximum"][entry.start : entry.end] for entry in found])
        return values.float().add_(maximum[:, None])

    def plan(self, conversations: Iterable[Conversation]) -> list[list[Conversation]]:
        """Groups the conversations that are not stored yet, or whose shard is damaged, into shards.

        The grouping starts from all conversations, stored or not, so that a fill that was interrupted and one that was
        not compute the same batches and store the same bytes.

        Args:
            conversations (Iterable[Conversation]): all that a run needs; equal ones count once.

        Returns:
            list[list[Conversation]]: the work of each shard, longest conversations first.
        """
        unique = {c.key: c for c in conversations}
        self._verify(unique)
        shards: list[list[Conversation]] = []
        size = 0
        for _, conversation in sorted(unique.items(), key=lambda item: (-len(item[1].tokens), item[0])):
            if not shards or size + len(conversation.tokens) > SHARD_TOKENS:
                shards.append([])
                size = 0
            shards[-1].append(conversation)
            size += len(conversation.tokens)
        return [pending for shard in shards if (pending := [c for c in shard if c not in self])]

    def missing(self, conversations: Iterable[Conversation]) -> list[Conversation]:
        """The conversations that are not stored, each once, the longest first."""
        unique = {c.key: c for c in conversations}
        return sorted((c for key, c in unique.items() if key not in self._entries), key=lambda c: -len(c.tokens))

    def add(self, conversations: Sequence[Conversation], columns: Sequence[torch.Tensor]) -> None:
        """Keeps columns in memory, readable at once, until there are enough for a shard.

        Args:
            conversations (Sequence[Conversation]): none of them stored.
            columns (Sequence[torch.Tensor]): their readings, ``[n_i, W]``.
        """
        for conversation, part in zip(conversations, columns, strict=True):
            self._entries[conversation.key] = _Entry(None, self._stored(part), 0, len(part))
            self._pending.append((conversation, part))
        if sum(len(conversation.tokens) for conversation, _ in self._pending) >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Writes what :meth:`add` has kept, as one shard."""
        if self._pending:
            conversations, columns = zip(*self._pending, strict=True)
            self.store(conversations, columns)
            self._enter(self._path_of(conversations))
            self._pending.clear()

    def has_shard(self, conversations: Sequence[Conversation]) -> bool:
        """Whether a shard of exactly these conversations lies there, which another process may have stored meanwhile."""
        shard = self._path_of(conversations)
        if shard.exists() and is_damaged(shard):
            self._discard(shard)
        return shard.exists()

    def _path_of(self, conversations: Sequence[Conversation]) -> Path:
        keys = b"".join(c.key for c in conversations)
        return self.directory / f"shard-{hashlib.blake2b(keys, digest_size=12).hexdigest()}.safetensors"

    def store(self, conversations: Sequence[Conversation], columns: Sequence[torch.Tensor]) -> None:
        """Writes one shard.

        Args:
            conversations (Sequence[Conversation]): the shard's conversations.
            columns (Sequence[torch.Tensor]): their readings, ``[n_i, W]``.
        """
        keys = b"".join(c.key for c in conversations)
        tensors = {
            "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, 16),
            "offsets": torch.tensor([0] + [len(part) for part in columns]).cumsum(0),
            **self._stored(torch.cat(list(columns))),
        }
        self._write_manifest()  # the reference may have been pruned during the run
        with atomic_file(self._path_of(conversations)) as file:
            save_file(tensors, file, metadata={"checksum": fingerprint(tensors)})

    def _stored(self, columns: torch.Tensor) -> dict[str, torch.Tensor]:
        """A reading ``[n, W]`` as it is stored."""
        if not self.centred:
            return {"values": columns.cpu(), "maximum": torch.zeros(len(columns))}
        columns = columns.float().cpu()
        maximum = columns.max(dim=-1).values
        return {"values": (columns - maximum[:, None]).to(self.dtype), "maximum": maximum}

    def make_room(self, coming: float) -> list[str]:
        """Removes least recently used references, never this one, until ``max_gb`` holds after a fill.

        Args:
            coming (float): what is going to be stored, in bytes.

        Returns:
            list[str]: the names of the removed references.

        Raises:
            UserError: this reference alone exceeds the limit.
        """
        if self.max_gb is None:
            return []
        coming = coming / GB
        own = _size(self.directory) / GB
        if own + coming > self.max_gb:
            raise UserError(
                f"The reference of this run takes {own + coming:.3g} GB, and reference_cache.max_gb is {self.max_gb}: "
                "raise the limit, or set reference_cache: null to compute the reference in every step."
            )
        return prune(self.root, max_gb=self.max_gb - coming, keep=self.directory.name)

    def _verify(self, keys: Iterable[bytes]) -> None:
        """Compares the checksums of the shards that hold ``keys``, each once; damaged ones are removed, and said so."""
        shards = {self._entries[key].shard for key in keys if key in self._entries}
        for shard in sorted(shard for shard in shards - self._verified if shard is not None):
            if is_damaged(shard):
                self._discard(shard)
                self._entries = {key: entry for key, entry in self._entries.items() if entry.shard != shard}
            else:
                self._verified.add(shard)

    @staticmethod
    def _discard(shard: Path) -> None:
        logger.warning(
            f"Reference cache: {shard} is damaged; it is removed and will be computed again.", extra=EVERY_RANK
        )
        shard.unlink(missing_ok=True)


@dataclass(frozen=True)
class Summary:
    """One reference below a root, as `pact cache` shows it.

    Attributes:
        name (str): its folder.
        description (dict[str, Any]): the manifest: format, dtype, and what the numbers depend on.
        shards (int): files.
        conversations (int): entries of both views.
        positions (int): response positions of all entries.
        bytes (int): on disk.
        last_used (float): when a run last opened it, seconds since 1970.
    """

    name: str
    description: dict[str, Any]
    shards: int
    conversations: int
    positions: int
    bytes: int
    last_used: float


def summaries(root: Path) -> list[Summary]:
    """All references below ``root``, the most recently used first; other processes may remove some meanwhile."""
    found = (_summary(directory) for directory in _entries(root) if (directory / MANIFEST).is_file())
    return sorted((summary for summary in found if summary is not None), key=lambda s: -s.last_used)


def _summary(directory: Path) -> Summary | None:
    """What lies in one folder; None when another process has just removed it."""
    conversations = positions = 0
    shards = shards_of(directory)
    for shard in shards:
        try:
            tensors, _ = _open_shard(shard)
        except (SafetensorError, OSError):
            continue  # counted as a file; `pact cache verify` names it
        conversations += len(tensors["keys"])
        positions += len(tensors["maximum"])
    manifest = directory / MANIFEST
    try:
        last_used = manifest.stat().st_mtime
        description = json.loads(manifest.read_text(errors="replace"))
    except FileNotFoundError:
        return None
    except ValueError:
        description = {"damaged": f"{MANIFEST} cannot be read; the next run that uses this reference mends it"}
    return Summary(directory.name, description, len(shards), conversations, positions, _size(directory), last_used)


def _size(directory: Path) -> int:
    size = 0
    for file in _entries(directory):
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed or removed it
            size += file.stat().st_size
    return size


def prune(root: Path, max_gb: float | None = None, older_than_days: float | None = None, keep: str = "") -> list[str]:
    """Removes references, the least recently used first.

    Args:
        root (Path): of all caches.
        max_gb (float | None): remove until all that is left takes at most this much, in 10^9 bytes.
        older_than_days (float | None): remove what was last used before that.
        keep (str): a reference that is never removed.

    Returns:
        list[str]: the names of the removed references.
    """
    removed = []
    remove_partial(root)  # of references whose removal was killed
    found = summaries(root)
    size = sum(summary.bytes for summary in found)
    for summary in reversed(found):
        too_old = older_than_days is not None and time.time() - summary.last_used > older_than_days * 86_400
        too_much = max_gb is not None and size > max_gb * GB
        if summary.name != keep and (too_old or too_much):
            with contextlib.suppress(FileNotFoundError):  # another process is removing it, too
                remove_folder(root / summary.name)
            removed.append(summary.name)
            size -= summary.bytes
    return removed


def shards_of(directory: Path) -> list[Path]:
    """The finished shards of one reference."""
    return sorted(file for file in _entries(directory) if fnmatch.fnmatchcase(file.name, "shard-*.safetensors"))


def _entries(directory: Path) -> list[Path]:
    """What lies in a folder; nothing once another process has removed it, at whatever moment (Path.glob may raise then)."""
    try:
        return [directory / name for name in os.listdir(directory)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_damaged(shard: Path) -> bool:
    """Reads a whole shard and compares its checksum; one that another process has just removed counts as damaged."""
    try:
        tensors, checksum = _open_shard(shard)
    except (SafetensorError, OSError):
        return True
    return checksum != fingerprint(tensors)


def batches_of(conversations: Sequence[Conversation]) -> list[list[Conversation]]:
    """Cuts conversations into the batches of a reference's forwards."""
    return [[conversations[i] for i in batch] for batch in batches_by_prefix(conversations, BATCH_TOKENS)]


def _remove_leftovers(directory: Path) -> None:
    """Removes what processes killed in the middle of writing a shard have left."""
    for file in _entries(directory):
        if not fnmatch.fnmatchcase(file.name, ".*.partial"):
            continue
        with contextlib.suppress(OSError):  # renamed by the process that writes it, or on a read-only mount
            if time.time() - file.stat().st_mtime > LEFTOVER_SECONDS:
                file.unlink()


def _open_shard(shard: Path) -> tuple[dict[str, torch.Tensor], str]:
    """A shard's tensors, memory-mapped, and its stored checksum; SafetensorError when they cannot be found in it."""
    with safe_open(shard, framework="pt") as file:
        names = ("keys", "maximum", "offsets", "values")
        return {name: file.get_tensor(name) for name in names}, (file.metadata() or {}).get("checksum", "")
