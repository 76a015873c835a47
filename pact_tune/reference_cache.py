"""Reference logits on disk, content-addressed: computed once, shared between epochs, runs, sweeps and seeds.

A cache is a folder per reference (``fingerprint``) with a ``manifest.json`` and safetensors shards. A shard holds

    keys     [n, 16] uint8    hash of each conversation (token ids and response ranges)
    offsets  [n + 1] int64    its rows in ``values``
    values   [P, C]           columns at the response positions, less each row's maximum, float16 or float32
    maximum  [P] float32      that maximum

The response-only view of a response is a conversation like any other, so both views live here, and equal responses are
stored once. Shards appear atomically and are never changed, so any number of processes may fill a cache at a time.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import safe_open, save_file

from pact_tune.conversations import Conversation
from pact_tune.files import atomic_file

DTYPES = {"float16": torch.float16, "float32": torch.float32}
SHARD_TOKENS = 65_536  # tokens per shard: what a killed fill loses at most
BATCH_TOKENS = 4_096  # tokens per reference forward, padding included

# Maps conversations to their columns at the response positions: one [n_i, C] float32 tensor each.
Compute = Callable[[Sequence[Conversation]], list[torch.Tensor]]


def default_directory() -> Path:
    """Where caches live unless a config says otherwise: ``$PACT_TUNE_CACHE``, or ``~/.cache/pact_tune``."""
    return Path(os.environ.get("PACT_TUNE_CACHE", Path.home() / ".cache" / "pact_tune")) / "reference"


def conversation_key(conversation: Conversation) -> bytes:
    """Content address of a conversation: 16 bytes, a hash of its token ids and response ranges."""
    numbers = [len(conversation.tokens), *conversation.tokens, *(n for span in conversation.responses for n in span)]
    return hashlib.blake2b(array("q", numbers).tobytes(), digest_size=16).digest()


class ReferenceCache:
    """Content-addressed store of one reference's columns.

    Args:
        directory (str | Path | None): root of all caches; None is :func:`default_directory`.
        reference (dict[str, Any]): everything that the numbers depend on: hash of the weights, dtype, safety token
            ids, tail. Two references share entries exactly when this is equal.
        dtype (str): "float16" (less the maximum: 2 bytes a number) or "float32" (exact).
    """

    def __init__(self, directory: str | Path | None, reference: dict[str, Any], dtype: str = "float16") -> None:
        description = {"format": 1, "dtype": dtype, "reference": reference}
        text = json.dumps(description, sort_keys=True)
        self.dtype = DTYPES[dtype]
        root = default_directory() if directory is None else Path(directory)
        self.directory = root / hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        self.directory.mkdir(parents=True, exist_ok=True)
        manifest = self.directory / "manifest.json"
        if not manifest.exists():
            with atomic_file(manifest) as file:
                file.write_text(text + "\n")
        self._entries: dict[bytes, tuple[dict[str, torch.Tensor], int, int]] = {}
        self._shards: set[str] = set()
        self.refresh()

    def __contains__(self, conversation: Conversation) -> bool:
        return conversation_key(conversation) in self._entries

    def refresh(self) -> None:
        """Reads the shards that have appeared since the last look; damaged ones are removed, and said so."""
        for path in sorted(self.directory.glob("shard-*.safetensors")):
            if path.name in self._shards:
                continue
            tensors = _read_shard(path)
            if tensors is None:
                print(f"Reference cache: {path} is damaged; it is removed and will be computed again.", flush=True)
                path.unlink()
                continue
            self._shards.add(path.name)
            offsets = tensors["offsets"].tolist()
            for row, key in enumerate(tensors["keys"].numpy()):
                self._entries[key.tobytes()] = (tensors, offsets[row], offsets[row + 1])

    def get(self, conversations: Iterable[Conversation]) -> torch.Tensor:
        """The stored columns of conversations, one after the other.

        Args:
            conversations (Iterable[Conversation]): each must have been stored.

        Returns:
            torch.Tensor: ``[T, C]`` float32, T = response tokens of all of them.

        Raises:
            KeyError: a conversation that was not stored.
        """
        found = [self._entries[conversation_key(c)] for c in conversations]
        values = torch.cat([tensors["values"][start:end] for tensors, start, end in found])
        maximum = torch.cat([tensors["maximum"][start:end] for tensors, start, end in found])
        return values.float() + maximum[:, None]

    def plan(self, conversations: Iterable[Conversation]) -> list[list[Conversation]]:
        """Groups the conversations that are not stored yet into shards.

        The grouping starts from all conversations, stored or not, so that a fill that was interrupted and one that was
        not compute the same batches and store the same bytes.

        Args:
            conversations (Iterable[Conversation]): all that a run needs; equal ones count once.

        Returns:
            list[list[Conversation]]: the work of each shard, longest conversations first.
        """
        unique = {conversation_key(c): c for c in conversations}
        shards: list[list[Conversation]] = []
        size = 0
        for _, conversation in sorted(unique.items(), key=lambda item: (-len(item[1].tokens), item[0])):
            if not shards or size + len(conversation.tokens) > SHARD_TOKENS:
                shards.append([])
                size = 0
            shards[-1].append(conversation)
            size += len(conversation.tokens)
        return [pending for shard in shards if (pending := [c for c in shard if c not in self])]

    def store(self, conversations: Sequence[Conversation], columns: Sequence[torch.Tensor]) -> None:
        """Writes one shard.

        Args:
            conversations (Sequence[Conversation]): the shard's conversations.
            columns (Sequence[torch.Tensor]): their columns, ``[n_i, C]`` float32.
        """
        keys = [conversation_key(c) for c in conversations]
        values = torch.cat(list(columns)).float().cpu()
        maximum = values.max(dim=-1).values
        offsets = torch.tensor([0] + [len(part) for part in columns]).cumsum(0)
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16),
            "offsets": offsets,
            "values": (values - maximum[:, None]).to(self.dtype),
            "maximum": maximum,
        }
        name = hashlib.blake2b(b"".join(keys), digest_size=12).hexdigest()
        with atomic_file(self.directory / f"shard-{name}.safetensors") as file:
            save_file(tensors, file, metadata={"checksum": _checksum(tensors)})


def batches_of(conversations: Sequence[Conversation], max_tokens: int = BATCH_TOKENS) -> list[list[Conversation]]:
    """Cuts conversations, sorted by length, into batches of at most ``max_tokens`` tokens, padding included."""
    batches: list[list[Conversation]] = []
    for conversation in conversations:
        # Sorted longest first, the first one's length is the width of the batch.
        if not batches or len(batches[-1][0].tokens) * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(conversation)
    return batches


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_shard(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a shard, memory-mapped; None when the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors if file.metadata()["checksum"] == _checksum(tensors) else None
    except Exception:  # safetensors has its own exception type; whatever it cannot read is damaged
        return None
