"""Safety tokens: checks, selection, files, templates; with the real tokenizers where their folder is given."""

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from pact_tune import cli
from pact_tune.conversations import encode, load_tokenizer
from pact_tune.errors import UserError
from pact_tune.safety_tokens import SafetyTokens, decode_tokens, safety_tokens_from_templates, token_weights

DATA = os.environ.get("PACT_TUNE_TEST_DATA")
real_tokenizers = pytest.mark.skipif(not DATA, reason="PACT_TUNE_TEST_DATA is not set")


def make(**changes) -> SafetyTokens:
    candidates = {
        "ids": torch.tensor([2, 5, 7, 9]),
        "scores": torch.tensor([0.1, 0.4, -0.2, 0.3]),
        "reference_probability": torch.tensor([0.6, 0.5, 0.7, 0.1]),
    }
    fields = {
        "ids": torch.tensor([5, 9]),
        "weights": torch.tensor([0.4, 0.3]),
        "scores": torch.tensor([0.4, 0.3]),
        "reference_probability": torch.tensor([0.5, 0.1]),
        "candidates": candidates,
        "provenance": {"method": "measured", "tokenizer_fingerprint": "f" * 32, "vocab_size": 12},
        "tokens": ["five", "nine"],
        "candidate_tokens": ["two", "five", "seven", "nine"],
    }
    return SafetyTokens(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.tensor([5, 5])}, "unique"),
        ({"ids": torch.tensor([-1, 5])}, "not negative"),
        ({"ids": torch.tensor([5, 9], dtype=torch.int32)}, "int64"),
        ({"ids": torch.tensor([], dtype=torch.int64)}, "non-empty"),
        ({"weights": torch.tensor([0.4])}, "one weight"),
        ({"weights": torch.tensor([0.4, -0.1])}, "not negative"),
        ({"weights": torch.tensor([0.4, float("nan")])}, "finite"),
        ({"weights": torch.tensor([0.4, float("inf")])}, "finite"),
        ({"weights": torch.zeros(2)}, "not all 0"),
        ({"provenance": {"method": "measured", "vocab_size": 12}}, "tokenizer_fingerprint"),
    ],
)
def test_bad_vectors_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_dense_has_the_weights_at_the_ids_and_nothing_else():
    dense = make().dense(12)
    assert dense.nonzero()[:, 0].tolist() == [5, 9]
    assert dense[[5, 9]].tolist() == pytest.approx([0.4, 0.3])
    with pytest.raises(UserError, match="id 9 lies past the model's vocabulary of 9"):
        make().dense(9)


def test_select_ranks_the_candidates_anew():
    by_score = make().select(3, "score", "raw")
    assert by_score.tokens == ["five", "nine", "two"]
    by_probability = make().select(2, "reference_probability", "uniform")
    assert by_probability.tokens == ["seven", "two"]
    assert by_probability.weights.tolist() == [1.0, 1.0]
    assert by_probability.provenance["options"]["ranking"] == "reference_probability"


def test_weightings():
    scores = torch.tensor([0.5, 0.25, -0.25, -0.125])  # mean 0.09375
    assert token_weights(scores, "raw").tolist() == [0.5, 0.25, 0.0, 0.0]
    assert token_weights(scores, "centred").tolist() == [0.40625, 0.15625, 0.0, 0.0]
    with pytest.raises(UserError, match="centred"):
        token_weights(torch.ones(3), "centred")


def test_style_is_what_benign_answers_use_as_much():
    assert make().style is None
    candidates = make().candidates | {"benign_probability": torch.tensor([0.0, 0.5, 0.0, 0.05])}
    assert make(candidates=candidates).style.tolist() == [True, False]


def test_saved_and_loaded_again(tmp_path):
    make().save(tmp_path / "a")
    loaded = SafetyTokens.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    for file in ("safety_tokens.safetensors", "safety_tokens.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert loaded.tokens == ["five", "nine"]
    assert loaded.select(4, "score", "raw").tokens == ["five", "nine", "two", "seven"]
    assert SafetyTokens.load(tmp_path, subfolder="a").ids.tolist() == [5, 9]


def _truncate(folder: Path) -> None:
    file = folder / "safety_tokens.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _drop_tensor(folder: Path) -> None:
    file = folder / "safety_tokens.safetensors"
    tensors = load_file(file)
    del tensors["weights"]
    save_file(tensors, file)


def _other_schema(folder: Path) -> None:
    file = folder / "safety_tokens.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "damaged"),
        (_drop_tensor, "lack the tensor 'weights'"),
        (_other_schema, "schema version 99, this pact-tune reads 1"),
        (lambda folder: (folder / "safety_tokens.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "safety_tokens.json").unlink(), "safety_tokens.json is missing"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    make().save(tmp_path / "s")
    damage(tmp_path / "s")
    with pytest.raises(UserError, match=message):
        SafetyTokens.load(tmp_path / "s")


def test_another_tokenizer_is_refused_naming_both(tmp_path):
    plain = load_tokenizer(str(tiny.tiny_tokenizer(tmp_path / "t")))
    tokens = safety_tokens_from_templates(plain)
    tokens.check_tokenizer(plain)
    plain.add_tokens(["<extra>"])
    with pytest.raises(UserError, match=tokens.provenance["tokenizer_fingerprint"][:8]):
        tokens.check_tokenizer(plain)


def test_templates_give_words_and_no_special_tokens(tmp_path):
    tokenizer = load_tokenizer(str(tiny.tiny_tokenizer(tmp_path / "t")))
    tokens = safety_tokens_from_templates(tokenizer, ["I cannot", "I won't<|im_end|>"])
    assert set(tokens.ids.tolist()) & set(tokenizer.all_special_ids) == set()
    assert set(encode(tokenizer, "I cannot")) <= set(tokens.ids.tolist())
    assert tokens.weights.unique().tolist() == [1.0]
    with pytest.raises(UserError, match="no token"):
        safety_tokens_from_templates(tokenizer, ["..."])


@real_tokenizers
@pytest.mark.parametrize("name", ["qwen2.5-hf", "llama3-hf"])
def test_templates_with_the_real_tokenizers(name):
    tokenizer = load_tokenizer(f"{DATA}/tokenizers/{name}")
    tokens = safety_tokens_from_templates(tokenizer)
    assert 20 <= len(tokens) <= 100
    assert {"I", " cannot", " can", " sorry", " assist"} <= set(tokens.tokens)
    assert set(tokens.ids.tolist()) & set(tokenizer.all_special_ids) == set()


@real_tokenizers
def test_the_published_qwen_tokens_are_single_ids_and_shown_as_such(tmp_path, capsys):
    tokenizer = load_tokenizer(f"{DATA}/tokenizers/qwen2.5-hf")
    words = ("I", "'m", ",", "or", "Such", "provide", "can", "cannot", "but", "assistant")
    encoded = [encode(tokenizer, word) for word in words]
    assert [len(ids) for ids in encoded] == [1] * len(words)
    ids = torch.tensor(encoded)[:, 0]
    assert decode_tokens(tokenizer, ids) == list(words)

    scores = torch.linspace(1, 0.1, len(words))
    candidates = {"ids": ids, "scores": scores, "reference_probability": scores}
    fields = {"ids": ids, "weights": scores, "scores": scores, "reference_probability": scores}
    provenance = {"method": "measured", "tokenizer_fingerprint": "f" * 32, "vocab_size": 152064}
    texts = decode_tokens(tokenizer, ids)
    made = make(**fields, candidates=candidates, provenance=provenance, tokens=texts, candidate_tokens=texts)
    made.save(tmp_path / "tokens")
    assert cli.main(["tokens", "show", str(tmp_path / "tokens")]) == 0
    table = capsys.readouterr().out.splitlines()
    for rank, (word, number) in enumerate(zip(words, ids.tolist(), strict=True), 1):
        assert any(line.split()[:3] == [str(rank), str(number), json.dumps(word)] for line in table), (word, table)
