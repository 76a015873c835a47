"""The reference cache: what it holds after kills, damage and company, and what it refuses."""

import hashlib
import multiprocessing
import os
import random
import time
from contextlib import nullcontext
from pathlib import Path

import pact_lora_finetune
import pytest
import torch
from omegaconf import OmegaConf
from recipe import count_reference_rows, logged, tune_run, tune_run_processes, write_workspace
from safetensors.torch import load_file
from test_hf_recipe import write_hf

from pact_tune import ReferenceCache, UserError, cli, log
from pact_tune.conversations import Conversation
from pact_tune.reference import cache as reference_cache
from pact_tune.reference.cache import is_damaged, shards_of
from pact_tune.reference.source import ReferenceSource
from pact_tune.torchtune import decoder as torchtune_decoder
from pact_tune.torchtune.config import complete

REFERENCE = {"weights": "0" * 32, "dtype": "torch.float32", "safety_tokens": [1, 2, 3], "tail": False}


def conversation(*tokens: int, prompt: int = 1) -> Conversation:
    return Conversation(list(tokens), [(prompt, len(tokens))])


def columns_of(c: Conversation) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(c.tokens))
    return 20 * torch.randn(c.num_response_tokens, 3, generator=generator)


def filled(root, conversations, reference=REFERENCE, **options) -> ReferenceCache:
    cache = ReferenceCache(root, reference, **options)
    for shard in cache.plan(conversations):
        cache.store(shard, [columns_of(c) for c in shard])
    cache.refresh()
    return cache


def in_fork(function, *arguments) -> multiprocessing.Process:
    """Starts a function in a child that shares this process's state, and can be killed without harm to it."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


@pytest.fixture
def recipe(workspace, tmp_path, monkeypatch):
    """A recipe that is set up but for its reference; shards are small, so that there are many."""
    monkeypatch.setattr(reference_cache, "SHARD_TOKENS", 100)

    def make(config=workspace, **overrides) -> pact_lora_finetune.PACTLoRAFinetuneRecipe:
        cfg = OmegaConf.merge(
            OmegaConf.load(config), {"output_dir": str(tmp_path / "out")}, OmegaConf.create(overrides)
        )
        cfg.reference_cache = None
        made = pact_lora_finetune.PACTLoRAFinetuneRecipe(complete(cfg))
        made.setup(made.cfg)
        return made

    return make


def fill(made, directory, dtype="float16") -> ReferenceCache:
    made.setup_reference({"directory": str(directory), "dtype": dtype, "max_gb": None, "lazy": False})
    return made.reference.cache


def content(cache: ReferenceCache) -> dict[str, str]:
    return {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards_of(cache.directory)}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
def test_what_is_stored_comes_back(tmp_path, dtype, tolerance):
    rows = [conversation(1, 2, 3), conversation(4, 5), conversation(1, 2, 3), conversation(1, 2, 3, prompt=2)]
    cache = filled(tmp_path, rows, dtype=dtype)
    assert len(cache) == 3  # the third equals the first; the last has another response range
    for order in (rows, rows[::-1]):
        expected = torch.cat([columns_of(c) for c in order])
        torch.testing.assert_close(cache.get(order), expected, atol=40 * tolerance, rtol=tolerance)
        near = (cache.get(order).softmax(-1) - expected.softmax(-1)).abs().max()
        assert near < tolerance
    again = ReferenceCache(tmp_path, REFERENCE, dtype)
    assert torch.equal(again.get(rows), cache.get(rows)) and again.plan(rows) == []
    with pytest.raises(KeyError):
        cache.get([conversation(9, 9)])


def test_only_what_the_numbers_depend_on_separates_references(tmp_path):
    rows = [conversation(1, 2, 3)]
    filled(tmp_path, rows)
    assert conversation(1, 2, 3) in ReferenceCache(tmp_path, dict(reversed(REFERENCE.items())))
    changes = [{"weights": "1" * 32}, {"dtype": "torch.bfloat16"}, {"safety_tokens": [1, 3, 2]}, {"tail": True}]
    for change in changes:
        assert conversation(1, 2, 3) not in ReferenceCache(tmp_path, REFERENCE | change)
    assert conversation(1, 2, 3) not in ReferenceCache(tmp_path, REFERENCE, "float32")


def test_bad_options_are_one_sentence(tmp_path):
    for options, words in (({"dtype": "int8"}, "must be one of"), ({"max_gb": 0}, "above 0")):
        with pytest.raises(UserError, match=words):
            ReferenceCache(tmp_path, REFERENCE, **options)


def test_equal_responses_are_computed_once(recipe, tmp_path, monkeypatch):
    """24 rows whose responses are four labels: 24 full views and four response-only ones."""
    made = recipe()
    rows = [conversation(50 + i, 60 + i, 7, 10 + i % 4, 3, prompt=3) for i in range(24)]
    computed = []

    def compute(views):
        computed.extend(views)
        return made.decoder.read_reference(views, made.objective.reading)

    source = ReferenceSource(
        rows, made.objective, [1, 2], compute, hidden_size=32, dtype=torch.float32, device=torch.device("cpu"), network={},
        options={"directory": tmp_path / "cache", "lazy": False},
    )  # fmt: skip
    monkeypatch.setattr(source, "_check", lambda *_: None)
    source.prepare(range(24))
    cache = source.cache
    assert len(computed) == len(cache) == 24 + 4


@pytest.mark.parametrize("write", [write_workspace, write_hf], ids=["torchtune", "transformers"])
def test_what_rows_share_is_computed_once_to_the_same_values(recipe, tmp_path, monkeypatch, write):
    """All rows have one system message: the forwards of a fill see it once, and store what they would without."""
    monkeypatch.setattr(reference_cache, "SHARD_TOKENS", 2000)
    made = recipe(
        write(tmp_path / "workspace"), dataset={"system": "What is seven plus nine? The answer is positive. " * 2}
    )
    tokens = []
    own = made.decoder.run
    monkeypatch.setattr(
        made.decoder, "run", lambda batch, read: tokens.append(batch.tokens.numel()) or own(batch, read)
    )
    shared = fill(made, tmp_path / "shared", "float32")
    used = sum(tokens)
    tokens.clear()
    made.decoder.longest_shared = 0
    apart = fill(made, tmp_path / "apart", "float32")
    assert used < 0.7 * sum(tokens)  # of both views, and with the rows that are checked one by one
    assert set(content(shared)) == set(content(apart))  # the same shards
    views = [view for row in range(len(made.rows)) for view in made.reference._views(row)]
    torch.testing.assert_close(shared.get(views), apart.get(views), atol=1e-4, rtol=0)


def test_any_flipped_byte_is_found_and_mended(recipe, tmp_path, capsys):
    """Wherever it lies in a file that a run needs: reported, and computed again to the same bytes."""
    made = recipe()
    cache = fill(made, tmp_path / "cache")
    before = content(cache)
    rng = random.Random(0)
    for shard in rng.sample(shards_of(cache.directory), 6):
        good = shard.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little")
        places = [0, 9, rng.randrange(8, header), *(rng.randrange(header, len(good)) for _ in range(12)), len(good) - 1]
        for place in places:
            if good[place : place + 1] == b" ":
                continue  # padding of the header
            bad = bytearray(good)
            bad[place] ^= 1 << rng.randrange(7)
            shard.write_bytes(bad)
            assert is_damaged(shard), place
        assert cli.main(["cache", "verify", "--directory", str(tmp_path / "cache")]) == 1
        assert f"damaged: {shard}" in capsys.readouterr().out
    mended = fill(made, tmp_path / "cache")
    assert capsys.readouterr().err.count("is damaged; it is removed and will be computed again") == 6
    assert content(mended) == before
    assert cli.main(["cache", "verify", "--directory", str(tmp_path / "cache")]) == 0


def test_truncated_and_empty_shards_are_found(tmp_path, capsys):
    log.setup()
    rows = [conversation(1, 2, 3), conversation(4, 5, 6)]
    cache = filled(tmp_path, rows)
    (shard,) = shards_of(cache.directory)
    for size in (0, 5, 200, shard.stat().st_size - 1):
        shard.write_bytes(shard.read_bytes()[:size])
        assert ReferenceCache(tmp_path, REFERENCE).plan(rows) != []
        assert "is damaged" in capsys.readouterr().err
        filled(tmp_path, rows)


LAZY = "reference_cache.lazy=True"


def keys_below(root: Path) -> list[bytes]:
    """Of all that is stored, sorted; one that was stored twice comes twice."""
    return sorted(key.numpy().tobytes() for shard in root.rglob("shard-*") for key in load_file(shard)["keys"])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_cache_that_steps_fill_is_as_good(workspace, tmp_path, processes):
    for name, cache, *overrides in (("eager", "a"), ("lazy", "b", LAZY), ("next", "b", LAZY)):
        arguments = [f"output_dir={tmp_path}/{name}", f"reference_cache.directory={tmp_path}/{cache}", "epochs=2"]
        done = tune_run_processes(workspace, *arguments, *overrides, processes=processes)
        assert done.returncode == 0, done.stderr
        assert ("views checked" in done.stdout + done.stderr) == (name != "lazy")  # what was stored before is checked
    assert keys_below(tmp_path / "a") == keys_below(tmp_path / "b")
    for metric in ("ce", "kl"):
        expected = logged(tmp_path / "eager", metric)
        for name in ("lazy", "next"):
            assert logged(tmp_path / name, metric) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_steps_compute_each_view_once(workspace, tmp_path, monkeypatch):
    forwards = count_reference_rows(monkeypatch)
    arguments = [LAZY, f"reference_cache.directory={tmp_path}/cache", "save_every_n_steps=3"]
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/one", "epochs=2", *arguments) is None
    views = sum(forwards)
    assert 40 < views <= 80  # two views of 40 rows, of which some are equal
    assert views == len(keys_below(tmp_path / "cache"))
    forwards.clear()
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/two", "seed=3", *arguments) is None
    assert sum(forwards) == 8  # the views that are checked


def test_only_rows_that_steps_take_are_computed(workspace, tmp_path, monkeypatch):
    forwards = count_reference_rows(monkeypatch)
    arguments = [f"output_dir={tmp_path}/out", f"reference_cache.directory={tmp_path}/cache", "max_steps_per_epoch=2"]
    assert tune_run(monkeypatch, workspace, *arguments) is None
    assert sum(forwards) == 2 * 8 + 8  # two steps of 4 rows; both views; 4 rows are checked


def test_killed_at_twenty_random_points_the_cache_is_the_same_to_the_byte(recipe, tmp_path):
    """Kill -9 in the middle of filling, again and again, then a fill to the end."""
    made = recipe()
    whole = content(fill(made, tmp_path / "whole"))
    assert len(whole) > 25
    rng = random.Random(0)
    shards = tmp_path / "killed"

    def finished() -> int:
        return len(list(shards.glob("*/shard-*")))

    kills = 0
    for _ in range(20):
        # One more shard at most between kills, so that all twenty fall into the filling.
        target = min(finished() + rng.randrange(2), len(whole) - 2)
        process = in_fork(fill, made, shards)
        while finished() < target and process.is_alive():
            time.sleep(1e-4)
        time.sleep(rng.random() * 4e-3)
        process.kill()
        process.join()
        kills += process.exitcode == -9
    assert kills == 20
    assert finished() < len(whole)
    assert content(fill(made, shards)) == whole


def test_two_processes_fill_one_cache_at_once(recipe, tmp_path):
    made = recipe()
    whole = content(fill(made, tmp_path / "whole"))
    both = [in_fork(fill, made, tmp_path / "shared") for _ in range(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert content(fill(made, tmp_path / "shared")) == whole


def test_what_killed_processes_left_is_swept_up_later(tmp_path):
    cache = ReferenceCache(tmp_path, REFERENCE)
    for name, age in ((".shard-a.partial", 7200), (".shard-b.partial", 60)):
        (cache.directory / name).write_bytes(b"x")
        os.utime(cache.directory / name, (time.time() - age,) * 2)
    ReferenceCache(tmp_path, REFERENCE)
    assert [path.name for path in cache.directory.glob(".*.partial")] == [".shard-b.partial"]


@pytest.mark.parametrize("preset", ["paper", "tail"])
def test_a_cache_filled_with_the_adapter_left_on_is_refused(recipe, tmp_path, monkeypatch, preset):
    made = recipe(loss={"preset": preset})
    for name, parameter in made.model.named_parameters():
        if "lora_b" in name:  # as after some steps of a run that is resumed
            torch.nn.init.normal_(parameter, std=0.02)
    with monkeypatch.context() as patch:
        patch.setattr(torchtune_decoder, "disable_adapter", lambda model: nullcontext())
        fill(made, tmp_path / "cache")
    with pytest.raises(UserError, match="does not hold what this model computes"):
        fill(made, tmp_path / "cache")
    fill(made, tmp_path / "clean")


def test_size_limit_removes_the_least_recently_used(tmp_path):
    rows = [conversation(*range(i, i + 50)) for i in range(40)]
    caches = [filled(tmp_path, rows, REFERENCE | {"weights": str(i)}) for i in range(3)]
    for age, cache in zip((30, 10, 20), caches, strict=True):
        os.utime(cache.directory / "manifest.json", (time.time() - age,) * 2)
    size = sum(file.stat().st_size for file in caches[0].directory.iterdir()) / 1e9
    new = ReferenceCache(tmp_path, REFERENCE, max_gb=3.5 * size)
    assert new.make_room(40 * 49 * (3 * 2 + 4)) == [caches[0].directory.name]
    new.store(rows, [columns_of(c) for c in rows])
    assert {path.name for path in tmp_path.iterdir()} == {c.directory.name for c in (caches[1], caches[2], new)}
    tight = ReferenceCache(tmp_path, REFERENCE | {"weights": "9"}, max_gb=0.5 * size)
    with pytest.raises(UserError, match="max_gb is .* raise the limit"):
        tight.make_room(40 * 49 * (3 * 2 + 4))


def test_limit_that_is_too_small_ends_a_run_in_one_sentence(workspace, tmp_path, monkeypatch):
    limit = ["reference_cache.max_gb=1e-6", f"reference_cache.directory={tmp_path}/cache"]
    message = tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/out", *limit)
    assert "max_gb" in message and "\n" not in message


def test_opening_a_large_cache_reads_keys_alone(tmp_path, monkeypatch):
    """Values are mapped, not read, until a row of theirs is asked for; other rows' shards are not even verified."""
    monkeypatch.setattr(reference_cache, "SHARD_TOKENS", 60)
    rows = [conversation(*range(i, i + 50)) for i in range(30)]
    filled(tmp_path, rows)
    verified = []
    monkeypatch.setattr(reference_cache, "is_damaged", lambda shard: bool(verified.append(shard)))
    cache = ReferenceCache(tmp_path, REFERENCE)
    assert len(cache) == 30 and verified == []
    assert cache.plan(rows[:2]) == [] and len(verified) == 2
    assert cache.plan(rows[:2]) == [] and len(verified) == 2
    maps = Path("/proc/self/maps").read_text()
    assert str(cache.directory) in maps


def test_tools(tmp_path, capsys, workspace, monkeypatch):
    root = ["--directory", str(tmp_path)]
    old, new = (filled(tmp_path, [conversation(1, 2, 3)], REFERENCE | {"weights": w}) for w in ("a" * 32, "b" * 32))
    os.utime(old.directory / "manifest.json", (time.time() - 86_400 * 9,) * 2)
    assert cli.main(["cache", "list", *root]) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 reference(s)") and out.index("bbbbbbbb") < out.index("aaaaaaaa")
    assert cli.main(["cache", "info", old.directory.name[:6], *root]) == 0
    assert '"views": 1' in (out := capsys.readouterr().out) and "b" * 32 not in out
    assert cli.main(["cache", "info", "nothing", *root]) == 1
    assert "pact cache list" in capsys.readouterr().err
    assert cli.main(["cache", "prune", *root]) == 1
    assert cli.main(["cache", "list", "--bytes", *root]) == 1
    capsys.readouterr()
    assert cli.main(["cache", "prune", "--older-than", "7", *root]) == 0
    assert old.directory.name in capsys.readouterr().out and not old.directory.exists() and new.directory.exists()
    assert cli.main(["cache", "prune", "--max-gb", "0", *root]) == 0
    assert not new.directory.exists()


def test_build_fills_and_a_run_then_computes_nothing(tmp_path, monkeypatch, capsys):
    config = write_workspace(tmp_path, rows=8)
    assert cli.main(["cache", "build", str(config), "loss.k=5", LAZY]) == 0  # what a run leaves to its steps, too
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert tune_run(monkeypatch, config, "loss.k=5") is None
    assert "nothing to compute" in capsys.readouterr().out
    for override, words in (
        ("bacth_size=3", "did you mean 'batch_size'"),
        ("reference_cache=null", "remove that line"),
    ):
        assert cli.main(["cache", "build", str(config), override]) == 1
        assert words in capsys.readouterr().err


def test_shards_hold_two_bytes_a_number(recipe, tmp_path):
    cache = fill(recipe(), tmp_path / "cache")
    for shard in shards_of(cache.directory):
        tensors = load_file(shard)
        positions, width = tensors["values"].shape
        assert tensors["values"].dtype == torch.float16 and width == 10
        assert tensors["values"].nbytes + tensors["maximum"].nbytes == positions * (2 * width + 4)


def test_cold_and_warm_runs_have_the_same_bits_and_partly_filled_ones_the_same_numbers(
    workspace, tmp_path, monkeypatch
):
    """As docs/performance.md says: what a cache was filled with before decides on the shapes of the batches that are left."""

    def adapter(name: str, cache: str, *overrides: str) -> dict[str, torch.Tensor]:
        where = "reference_cache=null" if cache == "none" else f"reference_cache.directory={tmp_path}/{cache}"
        assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/{name}", where, *overrides) is None
        return load_file(tmp_path / name / "epoch_0" / "adapter" / "adapter_model.safetensors")

    cold, warm = adapter("cold", "a"), adapter("warm", "a")
    assert all(torch.equal(cold[name], warm[name]) for name in cold)
    adapter("some", "b", "max_steps_per_epoch=3")
    partly = adapter("partly", "b")
    live = adapter("live", "none")
    for other in (partly, live):
        assert all(torch.allclose(other[name], cold[name], atol=1e-4, rtol=1e-4) for name in cold)
