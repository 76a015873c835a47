"""Axolotl's tokenized rows and batches as conversations."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pact_tune.conversations import Conversation
from pact_tune.data import ChatDataset, Counts
from pact_tune.errors import UserError
from pact_tune.hf.constraint import spans


def rows_of_batch(inputs: dict[str, torch.Tensor]) -> list[tuple[Conversation, list[int]]]:
    """The rows of a batch, padded or packed, each up to its last trained token, with its labels.

    Args:
        inputs (dict[str, torch.Tensor]): input_ids, labels and, where rows are packed, position_ids, ``[B, S]``.

    Returns:
        list[tuple[Conversation, list[int]]]: rows without a trained token, and padding, are left out.
    """
    ids, labels = inputs["input_ids"].tolist(), inputs["labels"].tolist()
    positions = inputs["position_ids"].tolist() if "position_ids" in inputs else [range(len(row)) for row in ids]
    rows = []
    for tokens, marks, places in zip(ids, labels, positions, strict=True):
        starts = [i for i, place in enumerate(places) if place == 0]
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            if (row := _trimmed(tokens[start:end], marks[start:end])) is not None:
                rows.append(row)
    return rows


def _trimmed(tokens: Sequence[int], labels: Sequence[int]) -> tuple[Conversation, list[int]] | None:
    found = spans(labels)
    if not found:
        return None
    end = found[-1][1]
    return Conversation(list(tokens[:end]), found), list(labels[:end])


def dataset_rows(dataset: Iterable[Mapping[str, Any]], title: str) -> ChatDataset:
    """Axolotl's tokenized rows; UserError where none is trained."""
    rows = (_trimmed(row["input_ids"], row["labels"]) for row in dataset)
    conversations = [row[0] for row in rows if row is not None]
    if not conversations:
        raise UserError(f"No row of {title} has a trained token: see roles_to_train and train_on_eos.")
    return ChatDataset(conversations, [Counts(title, used=len(conversations))], [0] * len(conversations))


def section_of(datasets: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The recipe's section that reads the rows of Axolotl's section ``datasets``; None where they are no file of messages."""
    if len(datasets) != 1 or datasets[0].get("type") != "chat_template" or not Path(str(datasets[0]["path"])).is_file():
        return None
    columns = {"messages": datasets[0].get("field_messages") or "messages"}
    return {"_component_": "pact_tune.chat_dataset", "source": str(datasets[0]["path"]), "columns": columns}
