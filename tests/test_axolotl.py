"""What of the Axolotl plugin needs no Axolotl: its section, rows and batches, and a folder that it did not write."""

import pytest
import torch
from pydantic import ValidationError

from pact_tune.axolotl.args import PACTArgs
from pact_tune.axolotl.rows import dataset_rows, rows_of_batch
from pact_tune.errors import UserError
from pact_tune.tools import verify

ROWS = [([1, 2, 3, 4, 5, 6], [-100, -100, 3, 4, -100, 6]), ([7, 8, 9, 10], [-100, 8, 9, -100])]


def test_rows_of_a_padded_and_of_a_packed_batch_are_those_of_the_data_set():
    data = dataset_rows([{"input_ids": ids, "labels": labels} for ids, labels in ROWS], "datasets")
    assert [(c.tokens, c.responses) for c in data.conversations] == [
        ([1, 2, 3, 4, 5, 6], [(2, 4), (5, 6)]),
        ([7, 8, 9], [(1, 3)]),  # what follows the last response is nobody's context
    ]
    (a, la), (b, lb) = ROWS
    padded = {"input_ids": torch.tensor([a, [*b, 0, 0]]), "labels": torch.tensor([la, [*lb, -100, -100]])}
    packed = {
        "input_ids": torch.tensor([[*a, *b, 0]]),
        "labels": torch.tensor([[*la, *lb, -100]]),
        "position_ids": torch.tensor([[*range(6), *range(4), 0]]),
    }
    for batch in (padded, packed):
        assert [row for row, _ in rows_of_batch(batch)] == data.conversations
    with pytest.raises(UserError, match="no row|No row"):
        dataset_rows([{"input_ids": [1], "labels": [-100]}], "datasets")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"lambda_k": 1}, "lambda_kl"),
        ({"lambda_kl": -1}, "lambda_kl"),
        ({"reference": "both"}, "base or initial"),
        ({"reference_cache": {"dtype": "int8"}}, "float16"),
    ],
)
def test_the_section_is_strict(section, words):
    with pytest.raises(ValidationError, match=words):
        PACTArgs(pact={"safety_tokens": "x", **section})
    assert PACTArgs(pact={"safety_tokens": "x", "preset": "tail", "reference_cache": None}).pact is not None


def test_a_folder_without_the_plugins_stamp_was_trained_without_the_constraint(tmp_path):
    with pytest.raises(UserError, match="trained without it"):
        verify.main([str(tmp_path)])
