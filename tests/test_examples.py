"""The examples, run as they are printed."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def plain():
    specification = importlib.util.spec_from_file_location("plain_pytorch", EXAMPLES / "plain_pytorch.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_plain_loop_keeps_the_reference_near(plain, tmp_path, capsys):
    """The constraint holds what plain fine-tuning moves, the task is learnt, and what is saved loads elsewhere."""
    options = ["--steps", "50", "--requests", "10"]
    free = plain.main(["--lambda-kl", "0", *options])
    held = plain.main(["--lambda-kl", "3", *options, "--output", str(tmp_path / "model")])
    assert free["before"] == held["before"] == 0.0
    assert held["kl"] < 0.5 * free["kl"]
    assert held["ce"] < 1.0
    assert "sorry" in capsys.readouterr().out
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.float32


def test_examples_import_no_trainer():
    """They use the core: nothing of torchtune, nor an edge of pact-tune."""
    for file in EXAMPLES.glob("plain_*.py"):
        text = file.read_text()
        assert not any(name in text for name in ("torchtune", "pact_tune.hf", "import trl")), file
