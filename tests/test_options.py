"""Packing, activation checkpointing and offloading with the constraint, and bad input of models and checkpoints."""

import json
import shutil

import pytest
from omegaconf import OmegaConf
from recipe import logged, tune_run, tune_run_processes, write_rows, write_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("options"), "llama3_1", rows=24)


@pytest.mark.parametrize("architecture", ["qwen2", "llama3_1", "gemma2"])
@pytest.mark.parametrize("preset", ["paper", "tail"])
def test_packed_and_unpacked_runs_have_the_same_losses(tmp_path, monkeypatch, architecture, preset):
    """Gemma's sliding window of 12 tokens lies inside a conversation, and over the border of two."""
    config = write_workspace(tmp_path, architecture, rows=24)
    for name, packed in (("padded", False), ("packed", True)):
        arguments = [f"output_dir={tmp_path}/{name}", f"packed={packed}", f"loss.preset={preset}"]
        assert tune_run(monkeypatch, config, *arguments) is None
    for metric in ("ce", "kl"):
        padded, packed = (logged(tmp_path / name, metric) for name in ("padded", "packed"))
        assert len(padded) == 6 and packed == pytest.approx(padded, abs=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_activation_checkpointing_changes_nothing(workspace, tmp_path, monkeypatch, packed):
    for name, enabled in (("without", False), ("with", True)):
        arguments = [f"output_dir={tmp_path}/{name}", f"enable_activation_checkpointing={enabled}", f"packed={packed}"]
        assert tune_run(monkeypatch, workspace, *arguments) is None
    assert logged(tmp_path / "with", "loss") == pytest.approx(logged(tmp_path / "without", "loss"), abs=1e-6)


def changed_checkpoint(workspace, folder, change):
    shutil.copytree(workspace.parent / "model", folder / "model")
    change(folder / "model")
    return [f"checkpoint_dir={folder}/model"]


def sharded(folder):
    """An index that names two shards, one of which was not downloaded."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"model.norm.weight": names[0], "lm_head.weight": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def without_template(folder):
    (folder / "chat_template.jinja").unlink()


BAD_INPUT = {
    "another family": (lambda f: edit_config(f, model_type="mistral"), [], "holds a mistral model"),
    "missing shard": (sharded, [], "lacks model-00002-of-00002.safetensors"),
    "shard cut short": (cut_short, [], "is damaged"),
    "no chat template": (without_template, [], "has no chat template"),
    "yarn": (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}), [], "rope_type is yarn"),
    "misspelt LoRA module": (lambda f: None, ["model.lora_attn_modules=[q_proj,vproj]"], "did you mean 'v_proj'"),
    "rows too long": (lambda f: None, ["model.max_seq_len=30"], "set dataset.max_seq_len"),
    "packed rows too long": (lambda f: None, ["model.max_seq_len=100", "packed=True"], "set dataset.max_seq_len"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence(workspace, tmp_path, monkeypatch, case):
    change, overrides, words = BAD_INPUT[case]
    checkpoint = changed_checkpoint(workspace, tmp_path, change)
    message = tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/out", *checkpoint, *overrides)
    assert isinstance(message, str) and words in message and "\n" not in message.strip()


def test_more_processes_than_rows(workspace, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"instruction": "Say hello.", "output": "Hello."}\n')
    arguments = [f"output_dir={tmp_path}/out", f"dataset.source={tmp_path}/one.jsonl"]
    process = tune_run_processes(workspace, *arguments, processes=2)
    assert process.returncode != 0
    assert process.stderr.count("has 1 row(s), fewer than the 2 processes") == 1


def test_a_method_and_all_that_is_wrong_with_a_run(workspace, tmp_path, monkeypatch):
    out = f"output_dir={tmp_path}/lr=1"  # the value holds an "="
    assert (
        tune_run(monkeypatch, workspace, "--method", "sft", out, "max_steps_per_epoch=1", "lr_scheduler=null") is None
    )
    assert (tmp_path / "lr=1" / "epoch_0" / "pact.json").is_file()
    message = tune_run(monkeypatch, workspace, out, "epochs=0", "loss.lambda_kl=.nan", "shuffle=abc")
    assert "3 things are wrong" in message and not (tmp_path / "epoch_0").exists()
    for words in ("epochs is 0", "loss.lambda_kl is nan", "shuffle is 'abc'"):
        assert words in message
    assert "is no override" in tune_run(monkeypatch, workspace, "epochs")
    assert "Unknown option '--epochs=3'" in tune_run(monkeypatch, workspace, "--epochs=3")


def test_a_list_of_a_config_takes_the_place_of_its_bases_section(workspace, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "more.jsonl", 10)
    (tmp_path / "mine.yaml").write_text(
        f"base: {workspace}\ndataset:\n  mix: [{{source: {rows}, fraction: 0.1}}, {{source: {rows}, fraction: 0.05, ce_weight: 0}}]\n"
    )
    (tmp_path / "over.yaml").write_text(
        f"base: {tmp_path}/base.yaml\ndataset:\n  mix: [{{source: {rows}, fraction: 0.1}}]\n"
    )
    cfg = OmegaConf.load(workspace)
    cfg.dataset.mix = {"source": str(rows), "fraction": 0.2}
    OmegaConf.save(cfg, tmp_path / "base.yaml")
    for name in ("mine", "over"):
        run = [f"output_dir={tmp_path}/{name}", "max_steps_per_epoch=1"]
        assert tune_run(monkeypatch, tmp_path / f"{name}.yaml", *run) is None
