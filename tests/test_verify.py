"""`pact verify`, the stamp that it reads, and that saving leaves the model in training as it was."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from recipe import logged, tune_run, write_workspace
from safetensors.torch import load_file, save_file

from pact_tune import cli
from pact_tune.conversations import Conversation
from pact_tune.errors import UserError
from pact_tune.reference.readings import Columns
from pact_tune.stamp import check_files, read_stamp, write_stamp
from pact_tune.tools.verify import verify
from pact_tune.torchtune.checkpoint import HFCheckpointer
from pact_tune.torchtune.decoder import TorchtuneDecoder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("verify"), "llama", rows=16)


@pytest.fixture(scope="module")
def result(workspace):
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert tune_run(monkeypatch, workspace, f"output_dir={workspace.parent}/pact", "loss.preset=tail") is None
    return workspace.parent / "pact" / "epoch_0"


def test_stamp_says_how_the_result_was_made(result, workspace):
    stamp = json.loads((result / "pact.json").read_text())
    assert stamp["loss"]["method"] == "pact" and stamp["loss"]["tail"] and stamp["loss"]["lambda_kl"] == 3.0
    assert stamp["final"]["kl"] == pytest.approx(logged(workspace.parent / "pact", "kl")[-1], abs=1e-6)
    assert stamp["adapter"]["rank"] == 4 and not stamp["adapter"]["dora"]
    hashes = [stamp[name]["fingerprint"] for name in ("data", "reference", "adapter")] + [
        stamp["loss"]["safety_tokens"]
    ]
    assert all(len(text) == 32 for text in hashes)
    other = json.loads((result / "adapter" / "pact.json").read_text())
    own = ("files", "checksum")
    assert {k: v for k, v in stamp.items() if k not in own} == {k: v for k, v in other.items() if k not in own}
    assert sorted(other["files"]) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "adapter/pact.json"} <= stamp["files"].keys()


def test_paths_of_a_config_are_stamped_as_text(tmp_path):
    write_stamp(tmp_path, {"config": {"dataset": {"mix": [{"source": tmp_path / "more.jsonl"}]}}})
    assert read_stamp(tmp_path)["config"] == {"dataset": {"mix": [{"source": f"{tmp_path}/more.jsonl"}]}}


@pytest.mark.parametrize("part", [".", "adapter"])
def test_verify_reports_the_kl_to_the_reference(result, part, capsys):
    assert cli.main(["verify", str(result / part), "--rows", "4"]) == 0
    assert "was trained with the constraint 'pact'" in capsys.readouterr().out
    report = verify(result / part, rows=4)
    assert report["rows"] == 4 and 1e-4 < report["kl"]["all"] < 50
    assert report["kl"] == pytest.approx(verify(result, rows=4)["kl"], rel=1e-3)


def copy_of(result, folder):
    return shutil.copytree(result, folder / "copy")


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def alter_first(tensors):
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def stamped_anew(folder, change):
    """As a wrong exporter would: the stamp itself is in order."""
    stamp = json.loads((folder / "pact.json").read_text())
    change(stamp)
    write_stamp(folder, stamp)


def make_nan(tensors):
    tensors[sorted(tensors)[0]].fill_(torch.nan)


def rewrite_and_stamp(folder, name, change):
    rewrite(folder / name, change)
    stamped_anew(folder, lambda s: None)


def scale_all(tensors):
    tensors.update({name: tensor * 1.015 for name, tensor in tensors.items()})


ADAPTER = "adapter/adapter_model.safetensors"
DAMAGE = {
    "no stamp": (lambda d: (d / "pact.json").unlink(), "no pact.json"),
    "half a stamp": (lambda d: (d / "pact.json").write_text("{"), "damaged"),
    "a stamp that is no object": (lambda d: (d / "pact.json").write_text("[]"), "damaged"),
    "later format": (lambda d: edit_json(d / "pact.json", lambda s: s.update(format=9)), "format 9"),
    "edited stamp": (lambda d: edit_json(d / "pact.json", lambda s: s["loss"].update(lambda_kl=9)), "edited after"),
    "other adapter": (lambda d: rewrite(d / ADAPTER, alter_first), "adapter_model.safetensors' is not the file"),
    "no adapter": (lambda d: (d / ADAPTER).unlink(), "adapter_model.safetensors' is missing"),
    "other alpha": (lambda d: edit_json(d / "adapter/adapter_config.json", lambda c: c.update(lora_alpha=9)), "adapter_config.json' is not"),
    "no adapter config": (lambda d: (d / "adapter/adapter_config.json").unlink(), "adapter_config.json' is missing"),
    "other merged weights": (lambda d: rewrite(d / "model.safetensors", alter_first), "model.safetensors' is not the file"),
    "scaled weights": (lambda d: rewrite(d / "model.safetensors", scale_all), "model.safetensors' is not the file"),
    "other rope": (lambda d: edit_json(d / "config.json", lambda c: c["rope_parameters"].update(rope_theta=9)), "config.json' is not"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json' is missing"),
    "other tokenizer": (lambda d: (d / "tokenizer.json").write_text("garbage"), "tokenizer.json' is not"),
    "an adapter beside the weights": (lambda d: (d / "adapter_config.json").write_text("{}"), "was added after"),
    "other base": (lambda d: stamped_anew(d, lambda s: s["reference"].update(fingerprint="0" * 32)), "name that one with --base"),
    "wrong merge, stamped": (lambda d: rewrite_and_stamp(d, "model.safetensors", scale_all), "is not its base with its adapter"),
    "other adapter, stamped": (lambda d: rewrite_and_stamp(d, ADAPTER, alter_first), "not the one that"),
    "NaN adapter, stamped": (lambda d: rewrite_and_stamp(d, ADAPTER, make_nan), "NaN or infinity"),
    "half an adapter, stamped": (lambda d: ((d / ADAPTER).write_bytes(b"1234"), stamped_anew(d, lambda s: None)), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_fails_in_one_sentence(result, tmp_path, capsys, damage):
    change, words = DAMAGE[damage]
    folder = copy_of(result, tmp_path)
    change(folder)
    assert cli.main(["verify", str(folder)]) == 1
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_verify_takes_other_rows_with_their_columns(result, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "What is 3 plus 4?", "a": "The answer is 7."}\n')
    columns = ["--columns", "prompt=q", "response=a"]
    assert cli.main(["verify", str(result), "--data", str(rows), *columns]) == 0
    assert "on 1 rows" in capsys.readouterr().out
    assert cli.main(["verify", str(result), "--data", str(rows), "--columns", "q"]) == 1
    assert "--columns takes ROLE=NAME" in capsys.readouterr().err


def test_verify_takes_any_dataset_component_and_needs_no_torchtune(result, tmp_path):
    """The component lies in the working directory, as it may in training."""
    folder = copy_of(result, tmp_path)
    stamped_anew(folder, lambda s: s["config"]["dataset"].update(_component_="my_rows.two"))
    (tmp_path / "my_rows.py").write_text(
        "from pact_tune import chat_dataset\ndef two(tokenizer, **keys):\n    return chat_dataset(tokenizer, n=2, **keys)\n"
    )
    code = (
        "import sys; sys.modules.update(torchtune=None, torchao=None); from pact_tune.cli import main; "
        f"sys.exit(main(['verify', {str(folder)!r}]))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "on 2 rows" in process.stdout


def test_verify_fails_without_the_constraint(workspace, tmp_path, monkeypatch, capsys):
    words = ["loss.lambda_kl=0", "tokenizer.trust_remote_code=True"]
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/sft", *words) is None
    result = tmp_path / "sft" / "epoch_0"
    capsys.readouterr()
    assert cli.main(["verify", str(result), "--rows", "2"]) == 1
    said = capsys.readouterr()
    assert "is whole, and was trained without a constraint (method 'sft'), as its stamp says" in said.err
    assert "without a constraint ('sft') and is what its stamp says" in said.out and "KL(reference" in said.out
    assert read_stamp(result)["config"]["tokenizer"]["trust_remote_code"] is True
    (result / "config.json").write_text("{}")  # all checks are the same
    assert cli.main(["verify", str(result), "--rows", "2"]) == 1
    assert "config.json' is not the file" in capsys.readouterr().err


def test_saving_moves_neither_base_weights_nor_the_reference(workspace, tmp_path, monkeypatch):
    """Around every save of a run with states in the middle of epochs: the same bits."""
    decoders, saves = [], []
    original = TorchtuneDecoder.__init__

    def remember(self, *arguments):
        original(self, *arguments)
        decoders.append(self)

    monkeypatch.setattr(TorchtuneDecoder, "__init__", remember)
    save = HFCheckpointer.save

    def checked(self, *arguments, **options):
        def state():
            (decoder,) = decoders
            frozen = {n: p.detach().clone() for n, p in decoder.model.named_parameters() if not p.requires_grad}

            rows = [Conversation(list(range(5, 25)), [(8, 20)])]
            return frozen | {"reference": decoder.read_reference(rows, Columns(torch.arange(9), True))}

        before = state()
        folder = save(self, *arguments, **options)
        after = state()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        saves.append(before)
        return folder

    monkeypatch.setattr(HFCheckpointer, "save", checked)
    arguments = [f"output_dir={tmp_path}/out", "epochs=3", "save_every_n_steps=1", "optimizer.lr=3e-2"]
    assert tune_run(monkeypatch, workspace, *arguments) is None
    assert len(saves) == 3  # and training has not moved them either
    assert all(torch.equal(saves[0][name], saves[2][name]) for name in saves[0])


def test_a_merge_keeps_the_stamp_and_replaces_only_an_earlier_merge(result, tmp_path, capsys):
    command = ["merge", str(result / "adapter"), "--output"]
    for _ in range(2):
        assert cli.main([*command, str(tmp_path / "merged")]) == 0
    assert verify(tmp_path / "merged", rows=4)["kl"] == pytest.approx(verify(result, rows=4)["kl"], rel=1e-3)
    own = copy_of(result, tmp_path)
    (tmp_path / "merged" / "notes.txt").write_text("precious")
    for output, words in (("copy", "result of a training run"), ("merged", "notes.txt")):
        capsys.readouterr()
        assert cli.main([*command, str(tmp_path / output)]) == 1
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
    assert (tmp_path / "merged" / "notes.txt").read_text() == "precious"
    check_files(own, read_stamp(own))
    (tmp_path / "merged" / "notes.txt").unlink()
    rewrite(tmp_path / "merged" / "model.safetensors", alter_first)
    with pytest.raises(UserError, match="is not the file"):
        verify(tmp_path / "merged")
