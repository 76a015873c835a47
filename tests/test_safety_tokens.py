"""Safety tokens: checks, selection, files, templates; with the real tokenizers where their folder is given."""

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from pact_tune import cli, log
from pact_tune.conversations import encode, load_tokenizer
from pact_tune.errors import UserError
from pact_tune.safety_tokens import SafetyTokens, decode_tokens, safety_tokens_from_templates, token_weights

log.setup()
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
        (_other_schema, "schema version 99, this pact-tune reads 2"),
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


def _edit(**changes):
    """Writes other values into safety_tokens.json."""

    def damage(folder: Path) -> None:
        file = folder / "safety_tokens.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def _forget(key: str):
    def damage(folder: Path) -> None:
        file = folder / "safety_tokens.json"
        content = json.loads(file.read_text())
        del content[key]
        file.write_text(json.dumps(content))

    return damage


def _tensor(**changes):
    """Writes other tensors; None removes one."""

    def damage(folder: Path) -> None:
        file = folder / "safety_tokens.safetensors"
        names = {name.replace("__", "."): tensor for name, tensor in changes.items()}
        tensors = load_file(file) | names
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)

    return damage


def _write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


JSON, TENSORS = "safety_tokens.json", "safety_tokens.safetensors"
MANY = torch.arange(5_000_000)
HOSTILE = {
    **{f"no {key}": (_forget(key), key) for key in ("k", "method", "tokenizer_fingerprint", "vocab_size", "tokens")},
    "no version": (_forget("schema_version"), "schema version None"),
    "no checksum": (_forget("checksum"), "checksum"),
    **{
        f"no {name}": (_tensor(**{name.replace(".", "__"): None}), f"lack the tensor '{name}'")
        for name in ("ids", "scores", "candidates.ids", "candidates.scores", "candidates.reference_probability")
    },
    "k is text": (_edit(k="2"), "k: Input should be a valid integer"),
    "k is another": (_edit(k=3), "say k 3 and hold 2"),
    "k is huge": (_edit(k=10**30), "k: "),
    "version is text": (_edit(schema_version="\x1b[2J"), "schema version"),
    "version is a list": (_edit(schema_version=[[]]), "schema version"),
    "version is true": (_edit(schema_version=True), "schema_version: "),
    "method is a list": (_edit(method=[1]), "method: "),
    "method is long": (_edit(method="x" * 2000), "method: "),
    "fingerprint is a number": (_edit(tokenizer_fingerprint=7), "tokenizer_fingerprint: "),
    "fingerprint is short": (_edit(tokenizer_fingerprint="f"), "tokenizer_fingerprint: "),
    "fingerprint has codes": (_edit(tokenizer_fingerprint="\x1b[2J" * 8), "tokenizer_fingerprint: "),
    "vocabulary is negative": (_edit(vocab_size=-1), "vocab_size: "),
    "options are a list": (_edit(options=[]), "options: "),
    "aligned_model is a dict": (_edit(aligned_model={}), "aligned_model: "),
    "tokens are a text": (_edit(tokens="ab"), "tokens: "),
    "a token is a number": (_edit(tokens=["a", 1]), "tokens.1: "),
    "a token of 1 MB": (_edit(tokens=["a", "x" * 1_000_000]), "tokens.1: "),
    "one token too few": (_edit(tokens=["a"]), "one text per id"),
    "many tokens": (_edit(tokens=["a"] * 100_000), "tokens: "),
    "one candidate too many": (_edit(candidate_tokens=["a"] * 5), "one text per id"),
    "another checksum": (_edit(checksum="0" * 32), "checksum"),
    "other weights": (_tensor(weights=torch.tensor([0.3, 0.4])), "checksum"),
    "other ids": (_tensor(ids=torch.tensor([9, 5])), "checksum"),
    "NaN in JSON": (_write(JSON, b'{"schema_version": 2, "k": NaN}'), "NaN is not JSON"),
    "not UTF-8": (_write(JSON, b"\xff\xfe{}"), "damaged"),
    "a list": (_write(JSON, b"[]"), "damaged"),
    "nothing": (_write(JSON, b""), "damaged"),
    "deep": (_write(JSON, b"[" * 100_000), "damaged"),
    "huge JSON": (_write(JSON, b" " * (1 << 24) + b"{}"), "too large"),
    "nothing in tensors": (_write(TENSORS, b""), "damaged"),
    "a pickle": (_write(TENSORS, b"\x80\x04\x95\x00\x00\x00."), "damaged"),
    "a huge header": (_write(TENSORS, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"), "damaged"),
    "5 M ids": (_tensor(ids=MANY, weights=MANY.float()), "too large"),
    "100 k ids": (_tensor(ids=torch.arange(100_000), weights=torch.ones(100_000)), "checksum"),
    "float ids": (_tensor(ids=torch.tensor([5.0, 9.0])), "another type"),
    "float64 scores": (_tensor(scores=torch.tensor([0.4, 0.3], dtype=torch.float64)), "another type"),
    "scores of another length": (_tensor(scores=torch.ones(3)), "per id"),
    "scores of two dimensions": (_tensor(scores=torch.ones(2, 1)), "per id"),
    "NaN scores": (_tensor(scores=torch.tensor([0.4, float("nan")])), "finite"),
    "infinite candidates": (_tensor(candidates__scores=torch.tensor([0.1, 0.4, float("inf"), 0.3])), "finite"),
    "candidates without S": (_tensor(candidates__ids=torch.tensor([2, 5, 7, 8])), "hold the tokens themselves"),
    "candidates twice": (_tensor(candidates__ids=torch.tensor([5, 5, 7, 9])), "unique"),
    "negative candidates": (_tensor(candidates__ids=torch.tensor([-2, 5, 7, 9])), "between 0 and"),
    "vast candidates": (_tensor(candidates__ids=torch.tensor([1 << 40, 5, 7, 9])), "between 0 and"),
    "a candidate too few": (_tensor(candidates__ids=torch.tensor([5, 7, 9])), "per id"),
    "unknown tensor": (_tensor(evil=torch.ones(1)), "unknown name"),
    "unknown candidates": (_tensor(candidates__evil=torch.ones(4)), "unknown name"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(tmp_path, capsys, name):
    damage, message = HOSTILE[name]
    make().save(tmp_path / "s")
    damage(tmp_path / "s")
    assert cli.main(["tokens", "show", str(tmp_path / "s")]) == 1
    out, error = capsys.readouterr()
    assert out == "" and message in error and error.count("\n") == 1 and len(error) < 1000
    assert all(c.isprintable() for c in error.rstrip("\n"))


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_a_pipe_or_a_folder_is_no_file(tmp_path, name):
    for kind in (os.mkfifo, os.mkdir):
        make().save(tmp_path / "s")
        (tmp_path / "s" / name).unlink()
        kind(tmp_path / "s" / name)
        with pytest.raises(UserError, match="no plain file"):
            SafetyTokens.load(tmp_path / "s")
        (tmp_path / "s" / name).unlink() if kind is os.mkfifo else (tmp_path / "s" / name).rmdir()
        make().save(tmp_path / "s") if (tmp_path / "s" / JSON).exists() else (tmp_path / "s" / TENSORS).unlink()


def test_version_1_had_no_checksum_and_is_read(tmp_path):
    make().save(tmp_path / "s")
    _edit(schema_version=1)(tmp_path / "s")
    _forget("checksum")(tmp_path / "s")
    assert SafetyTokens.load(tmp_path / "s").ids.tolist() == [5, 9]


def test_what_is_printed_of_others_moves_no_cursor(tmp_path, capsys):
    texts = ["\x1b[2J\x9b31m", 'a\u202eb\\"\n']
    provenance = make().provenance | {"aligned_model": "evil\x1b]0;x\x07", "method": "\x1b[31m"}
    make(tokens=texts, candidate_tokens=[], provenance=provenance).save(tmp_path / "s")
    assert cli.main(["tokens", "show", str(tmp_path / "s")]) == 0
    assert cli.main(["tokens", "show", str(tmp_path / "s"), "--diff", str(tmp_path / "s")]) == 0
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert r'"\x1b[2J\x9b31m"' in out and r'"a\u202eb\\\"\n"' in out


def test_two_equal_models_are_never_called_uniform():
    for weighting in ("raw", "centred", "uniform"):
        with pytest.raises(UserError, match="answer alike and nothing was measured"):
            token_weights(torch.zeros(3), weighting)


def test_tokens_from_templates_are_ranked_by_how_many_use_them(tmp_path, capsys):
    tokenizer = load_tokenizer(str(tiny.tiny_tokenizer(tmp_path / "t")))
    tokens = safety_tokens_from_templates(tokenizer, ["I cannot", "I cannot help", "I am", "sorry"])
    few = tokens.select(3, "score", "raw")
    assert set(few.ids.tolist()) <= set(tokens.ids.tolist()) and few.weights.tolist() == [1.0] * 3
    assert few.scores.tolist() == sorted(tokens.scores.tolist(), reverse=True)[:3] and few.scores[0] == 0.75
    assert few.ids[0] == encode(tokenizer, "I")[0] or few.tokens[0].strip() == "I"
    capsys.readouterr()
    tokens.select(len(tokens) - 1, "score", "raw")  # the rarest are used once each
    assert "have the same score at the end of the best" in capsys.readouterr().err
    tokens.select(len(tokens), "score", "raw")
    assert capsys.readouterr().err == ""


def test_a_token_that_decodes_to_nothing_is_shown_by_its_piece():
    class Pieces:
        def decode(self, ids):
            return "" if ids == [3] else "word"

        def convert_ids_to_tokens(self, token):
            return {3: "▁", 4: "▁word"}[token]

    assert decode_tokens(Pieces(), torch.tensor([3, 4])) == ["▁", "word"]


def test_another_models_weights_are_warned_of(capsys):
    tokens = make(provenance=make().provenance | {"aligned_weights": "a" * 32, "aligned_model": "m\x1b"})
    tokens.check_model("a" * 32)
    make().check_model("b" * 32)  # from templates, or of an older version: not known
    assert capsys.readouterr().err == ""
    tokens.check_model("b" * 32)
    error = capsys.readouterr().err
    assert "aaaaaaaa" in error and "bbbbbbbb" in error and r"m\x1b" in error


def test_the_stored_style_finds_each_token(tmp_path):
    ids = torch.tensor([9, 2, 7, 5])
    benign = torch.tensor([0.05, 0.0, 0.9, 0.6])
    candidates = make().candidates | {"ids": ids, "benign_probability": benign}
    candidates["reference_probability"] = torch.tensor([0.1, 0.6, 0.7, 0.5])
    assert make(candidates=candidates).style.tolist() == [True, False]
