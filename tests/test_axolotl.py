"""The Axolotl plugin: its section, rows and batches without Axolotl; the shipped example, and what goes wrong, with it."""

from pathlib import Path

import axolotl_environment
import pytest
import torch
import yaml
from pydantic import ValidationError

from pact_tune.axolotl.args import PACTArgs
from pact_tune.axolotl.rows import dataset_rows, rows_of_batch, section_of
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


def test_a_stamp_names_one_file_of_messages(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    one = {"path": str(tmp_path / "rows.jsonl"), "type": "chat_template", "field_messages": "turns"}
    section = section_of([one])
    assert section is not None and (section["source"], section["columns"]) == (one["path"], {"messages": "turns"})
    assert (
        section_of([one, one])
        is section_of([one | {"type": "alpaca"}])
        is section_of([one | {"path": "hub/name"}])
        is None
    )


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


# Axolotl itself -------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


def example(tmp_path: Path, **changes) -> Path:
    """The shipped example, writing elsewhere and ending early."""
    text = (ROOT / "examples" / "axolotl.yaml").read_text().replace("outputs/", f"{tmp_path}/")
    path = tmp_path / "example.yaml"
    path.write_text(
        yaml.safe_dump({**yaml.safe_load(text), "max_steps": 6, "save_steps": 3, "logging_steps": 1, **changes})
    )
    return path


@pytest.mark.axolotl
def test_the_example_is_trained_packed_and_verified(tmp_path, capsys):
    """The adapter is stamped as it lies there in the end, and so are the checkpoints on the way."""
    run = axolotl_environment.train(example(tmp_path, sample_packing=True, pad_to_sequence_len=True), ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    for folder in (tmp_path / "axolotl", tmp_path / "axolotl" / "checkpoint-3"):
        assert verify.main([str(folder), "--rows", "2"]) == 0
        assert "was trained with the constraint 'pact'" in capsys.readouterr().out


@pytest.mark.axolotl
@pytest.mark.parametrize("name", ["pact_tune.axolotel.PACTPlugin", "pact_tune.axolotl.PACTPlugn"])
def test_a_misspelt_plugin_trains_on_and_is_found_out(tmp_path, name):
    run = axolotl_environment.train(example(tmp_path, plugins=[name]), ROOT)
    if run.returncode == 0:
        assert (tmp_path / "axolotl" / "adapter_model.safetensors").is_file()
    with pytest.raises(UserError, match="trained without it"):
        verify.main([str(tmp_path / "axolotl")])


@pytest.mark.axolotl
@pytest.mark.parametrize(
    ("changes", "words"), [({"pact": {"lambda_k": 1}}, "lambda_kl"), ({"pact": None}, "section pact")]
)
def test_axolotl_stops_at_bad_input(tmp_path, changes, words):
    run = axolotl_environment.train(example(tmp_path, **changes), ROOT)
    assert run.returncode != 0 and words in run.stdout + run.stderr
    assert not (tmp_path / "axolotl" / "adapter_model.safetensors").exists()
