"""Every shipped config: complete, buildable, and of the very network that the published checkpoint holds."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torchao.dtypes import nf4tensor
from torchtune.models import gemma2, llama3_1, llama3_2, llama3_3, qwen2_5
from transformers import AutoConfig, AutoModelForCausalLM

from pact_tune import cli, hub, rows
from pact_tune.families import network_of
from pact_tune.generation import default_device
from pact_tune.memory import GIB
from pact_tune.tools.configs import check, load, memory
from pact_tune.torchtune import from_checkpoint, lora
from pact_tune.torchtune.checkpoint import Names, constants_of_model, constants_of_network
from pact_tune.torchtune.config import config_names, find_config, method_names

OTHERS = ("demo", "qwen3", "gemma3", "mistral", "phi4", "smollm2", "smollm3", "olmo2")  # the last seven: transformers'
NAMES = [name for name in config_names() if name.split("/")[0] not in OTHERS]
TRANSFORMERS = [name for name in config_names() if name.split("/")[0] in OTHERS[1:]]
# Shipped config -> torchtune's own builder of the same model, whose sizes another hand has copied.
BUILDERS = {
    "qwen2_5/0.5B": qwen2_5.qwen2_5_0_5b,
    "qwen2_5/1.5B": qwen2_5.qwen2_5_1_5b_instruct,
    "qwen2_5/3B": qwen2_5.qwen2_5_3b,
    "qwen2_5/7B": qwen2_5.qwen2_5_7b_instruct,
    "qwen2_5/14B": qwen2_5.qwen2_5_14b_instruct,
    "qwen2_5/32B": qwen2_5.qwen2_5_32b_instruct,
    "llama3_1/8B": llama3_1.llama3_1_8b,
    "llama3_1/70B": llama3_1.llama3_1_70b,
    "llama3_2/1B": llama3_2.llama3_2_1b,
    "llama3_2/3B": llama3_2.llama3_2_3b,
    "llama3_3/70B": llama3_3.llama3_3_70b,
    "gemma2/2B": gemma2.gemma2_2b,
    "gemma2/9B": gemma2.gemma2_9b,
    "gemma2/27B": gemma2.gemma2_27b,
}


def text_of(name: str) -> str:
    return find_config(name).read_text()


def published_weights(config: dict) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors on the meta device, as transformers names them."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


@pytest.fixture(autouse=True)
def nf4_once_a_shape(monkeypatch):
    """torchao takes some hundred small operations to quantise a weight on the meta device; a 70B model has 560."""
    quantized = {}

    def to_nf4(weight, **options):
        key = (tuple(weight.shape), weight.dtype)
        if not weight.is_meta or key not in quantized:
            quantized[key] = nf4tensor.to_nf4(weight, **options)
        return quantized[key]

    monkeypatch.setattr("torchtune.modules.peft.lora.to_nf4", to_nf4)
    monkeypatch.setattr("torchtune.modules.low_precision.nf4_linear.to_nf4", to_nf4)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_builds_and_fits_the_published_checkpoint(name, tmp_path):
    cfg = load(name)
    model = check(cfg)
    config = hub.KNOWN[cfg.loss.safety_tokens].config
    network = network_of(config, "published")
    published = {Names(network.family).to_tune(n): t.shape for n, t in published_weights(config).items()}
    base = {n: p.shape for n, p in model.named_parameters() if ".lora_" not in n}
    assert base == published and constants_of_model(model) == constants_of_network(network)
    assert model.max_seq_len == network.max_seq_len == AutoConfig.for_model(**config).max_position_embeddings

    header = find_config(name).read_text().split("\n\n")[0]
    assert cfg.loss.safety_tokens in hub.KNOWN
    family = hub.KNOWN[cfg.loss.safety_tokens]
    assert f"tune download {family.aligned} --output-dir {cfg.checkpoint_dir}" in header
    command = (
        f"--aligned {family.aligned} --base {family.base} --prompts wildjailbreak --output {cfg.loss.safety_tokens}"
    )
    assert f"pact tokens compute {command}" in header and f"pact_lora_finetune --config {name}" in header
    estimates = [int(number) for number in re.findall(r"\d x (\d+) GiB", header)]
    for processes in {int(number) for number in re.findall(r"nproc_per_node (\d+)", header)}:
        lora._check(model, processes)
    assert estimates == [round(memory(cfg, model, processes) / GIB) for processes in (1, 2, 4, 8)]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_shipped_config_of_a_transformers_model_builds(name):
    cfg = load(name)
    family = hub.KNOWN[cfg.loss.safety_tokens]
    model = check(cfg)
    assert any(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "vision" in n or "lm_head" in n)
    header = find_config(name).read_text().split("\n\n")[0]
    assert f"tune download {family.aligned} --output-dir {cfg.checkpoint_dir}" in header
    assert f"pact_lora_finetune --config {name}\n" in header and f"outputs/{name.replace('/', '_')}" == cfg.output_dir
    measured = (
        f"--aligned {family.aligned} --base {family.base} --prompts wildjailbreak --output {cfg.loss.safety_tokens}"
    )
    assert (measured in header) == (family.base is not None)
    assert cfg.base_dir == (f"/tmp/{family.base.split('/')[1]}" if family.base else None)
    estimates = [int(number) for number in re.findall(r"\d x (\d+) GiB", header)]
    assert estimates == [round(memory(cfg, model, processes) / GIB) for processes in (1, 2, 4, 8)]
    settings = (cfg.optimizer.lr, cfg.epochs, cfg.batch_size, cfg.model.r, cfg.loss.preset, cfg.loss.k)
    assert settings == (3e-5, 3, 2, 8, "paper", 50)


@pytest.mark.parametrize("name", BUILDERS)
def test_published_sizes_are_those_of_torchtunes_builders(name):
    cfg = load(f"{name}_pact_lora")
    with torch.device("meta"):
        theirs, ours = BUILDERS[name](), from_checkpoint(cfg.checkpoint_dir)
    shapes = [sorted(tuple(p.shape) for p in model.parameters()) for model in (theirs, ours)]
    assert shapes[0] == shapes[1]
    if not name.startswith("gemma2/"):  # torchtune's Gemma 2 is another network
        assert constants_of_model(theirs) == constants_of_model(ours)


def test_the_papers_settings_are_the_default_of_all_configs():
    assert {name.split("_pact")[0] for name in NAMES} == BUILDERS.keys()
    for name in NAMES:
        cfg = load(name)
        assert (cfg.optimizer._component_, cfg.epochs, cfg.batch_size) == ("torch.optim.AdamW", 3, 2)
        assert (cfg.loss.preset, cfg.loss.k, cfg.loss.lambda_kl) == ("paper", 50, 3.0)
        if not name.endswith("_full"):
            assert (cfg.model.lora_rank, cfg.optimizer.lr, cfg.gradient_accumulation_steps) == (8, 3e-5, 1)
        for adapter in ("lora", "qlora"):
            assert f"{name.split('_pact')[0]}_pact_{adapter}" in NAMES


def test_configs_and_readme_name_every_kind_of_file_that_is_read():
    kinds = {kind[1:] for kind in rows._READERS} - {"txt"}  # whose lines are prompts
    readme = (
        (Path(__file__).parents[1] / "README.md").read_text().split("## Bring your own data\n\n")[1].split("\n\n")[0]
    )
    headers = {
        text.split("# Data: ")[1].split("\ndataset:")[0]
        for text in map(text_of, [*NAMES, *TRANSFORMERS])
        if "# Data" in text
    }
    assert len(headers) == 1
    for text in (readme, *headers):
        assert kinds == set(re.findall("|".join(sorted(kinds, reverse=True)), text.lower())), text
        assert "gz" in text and "folder" in text and "list" in text


def test_pact_ls_cp_and_validate(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ls"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in config_names()) and "pact_lora_finetune" in listed
    assert cli.main(["cp", "qwen2_5/0.5B_pact_lora", "mine"]) == 0
    assert (tmp_path / "mine.yaml").read_text() == find_config("qwen2_5/0.5B_pact_lora").read_text()
    (tmp_path / "mine.yaml").write_text("changed")
    assert cli.main(["cp", "qwen2_5/0.5B_pact_lora", "mine.yaml", "-n"]) == 0
    assert cli.main(["cp", "qwen2_5/0.5B_pact_lora", "mine"]) == 1
    assert "replace it with --force" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "changed"
    assert cli.main(["cp", "qwen2_5/0.5B_pact_lora", "mine", "--force"]) == 0
    assert (tmp_path / "mine.yaml").read_text() != "changed"
    assert cli.main(["cp", "pact_lora_finetune", "new/recipe.py", "--make-parents"]) == 0
    assert "class PACTLoRAFinetuneRecipe" in (tmp_path / "new" / "recipe.py").read_text()
    assert cli.main(["cp", "pact_lora_finetune", "nowhere/recipe.py"]) == 1
    capsys.readouterr()
    assert cli.main(["cp", "qwen2_5/0.5B_pact_lora", "."]) == 0
    assert cli.main(["validate", "./0.5B_pact_lora.yaml", "device=cuda"]) == 0
    out = capsys.readouterr().out
    assert "494,032,768 parameters" not in out and "well-formed" in out and "estimated by formula" in out
    assert cli.main(["validate", "demo/pact_lora"]) == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["bacth_size=3"], "did you mean 'batch_size'"),
        (["model.lora_rank=0"], "model.lora_rank is 0; it must be a whole number from 1"),
        (["model.lora_attn_modules=[qproj]"], "did you mean 'q_proj'"),
        (["optimizer.lr=-1"], "optimizer.lr is -1; it must be a number above 0"),
        (["loss.lambda_kl=-1"], "lambda_kl"),
        (["shuffle=False", "batch_by_length=True"], "shuffle: False keeps the order of the data"),
        (["output_dir=${nowhere}"], "nowhere"),
    ],
)  # fmt: skip
def test_pact_validate_says_what_is_wrong_in_one_sentence(capsys, overrides, words):
    assert cli.main(["validate", "demo/pact_lora", *overrides]) == 1
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "other", "words"),
    [
        ("  checkpoint_dir: ${checkpoint_dir}\n", "", "Section 'checkpointer' lacks the key 'checkpoint_dir'"),
        (
            "pact_tune.torchtune.from_checkpoint  # Llama, Qwen2 and Gemma 2; sizes come from its config.json\n"
            "  path: ${checkpoint_dir}\n",
            "torchtune.models.gemma2.lora_gemma2_2b\n",
            "soft-cap the hidden state",
        ),
        ("/tmp/gemma-2-2b-it", "/nowhere/mine", "There is no Hugging Face checkpoint in '/nowhere/mine'"),
    ],
)
def test_pact_validate_of_an_edited_config(tmp_path, capsys, line, other, words):
    text = find_config("gemma2/2B_pact_lora").read_text()
    assert line in text
    (tmp_path / "mine.yaml").write_text(text.replace(line, other))
    assert cli.main(["validate", str(tmp_path / "mine.yaml")]) == 1
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_pact_validate_of_a_file_that_is_no_config(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("model: [\n")
    assert cli.main(["validate", str(tmp_path / "broken.yaml")]) == 1
    assert "not valid YAML" in capsys.readouterr().err
    assert cli.main(["validate", "qwen2_5/7B_pact_laro"]) == 1
    assert "did you mean 'qwen2_5/7B_pact_lora'" in capsys.readouterr().err


def test_pact_run_is_tune_run(monkeypatch):
    seen = []
    monkeypatch.setattr("torchtune._cli.run.Run._run_cmd", lambda self, args: seen.extend(sys.argv))
    monkeypatch.setattr(sys, "argv", [])
    assert cli.main(["run", "pact_lora_finetune", "--config", "demo/pact_lora"]) == 0
    assert seen == ["tune", "run", "pact_lora_finetune", "--config", "demo/pact_lora"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("run", "`pact run` needs a recipe and a config: write `pact run [options of torchrun] pact_lora_finetune --config NAME"),
        ("run pact_lora_finetune", "`pact run` needs a config: write `pact run"),
        ("run pact_lora_finetune --config", "--config stands without a name"),
        ("run --nproc_per_node 2 --config demo/pact_lora", "'--config' stands before the recipe's name"),
        ("run pact_lora_finetun --config demo/pact_lora", "did you mean 'pact_lora_finetune'?"),
        ("run ./nothing.py --config demo/pact_lora", "'./nothing.py' is no recipe"),
        ("run --nproc_per_node --config demo/pact_lora", "expected one argument; see"),
        ("validate demo/pact_lora --lambda 3", "Unknown option '--lambda': `pact validate` takes --method, key=value and ~key."),
        ("validate", "the following arguments are required: name; see `pact validate --help`."),
        ("cp demo/pact_lora mine.yaml --forse", "unrecognized arguments: --forse; see `pact cp --help`."),
        ("audit rows.jsonl", "the following arguments are required: --aligned, --output; see `pact audit --help`."),
        ("experiment guard --jobs many", "argument --jobs: invalid int value: 'many'; see `pact experiment --help`."),
        ("tokens shwo", "'tokens shwo' is no command of `pact --help`; did you mean 'tokens show'?"),
    ],
)  # fmt: skip
def test_a_command_line_that_is_not_right(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 1
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["epochs=0"], "epochs is 0; it must be a whole number from 1 to 10000."),
        (["batch_size=-1"], "batch_size is -1; it must be a whole number from 1"),
        (["max_steps_per_epoch=0"], "max_steps_per_epoch is 0; it must be a whole number from 1"),
        (["clip_grad_norm=-1"], "clip_grad_norm is -1; it must be a number above 0"),
        (["shuffle=abc"], "shuffle is 'abc'; it must be True or False."),
        (["seed=null"], "seed is null; it must be a whole number from 0"),
        (["optimizer.lr=abc"], "optimizer.lr is 'abc'; it must be a number above 0"),
        (["optimizer.lr=1e9"], "optimizer.lr is 1000000000.0; it must be a number above 0 and at most 1 (fine-tuning takes"),
        (["dtype=fp64"], "dtype is 'fp64'; it must be one of: bf16, fp32"),
        (["device=gpu"], "device is 'gpu'; it must be cpu, cuda"),
        (["loss.preset=null"], "loss.preset is null; it must be one of: paper, official, tail."),
        (["loss.lambda_kl=.inf"], "loss.lambda_kl is inf; it must be a number from 0"),
        (["loss.gate_slope=.nan"], "loss.gate_slope is nan; it must be a number"),
        (["reference_cache=5"], "reference_cache is 5; it must be a section with the keys directory, dtype, max_gb, lazy, or null."),
        (["~nosuch"], "Unknown key 'nosuch' in '~nosuch' (nothing to remove)"),
        (["~model.lora_rnak"], "did you mean 'lora_rank'"),
        (["epochs"], "'epochs' on the command line is no override"),
        (["loss=os.path"], "loss._component_ 'os.path' is a module"),
        (["loss=pact_tune.objectives.pcat"], "loss._component_ 'pact_tune.objectives.pcat' cannot be imported"),
    ],
)  # fmt: skip
def test_values_are_typed_and_bounded(capsys, overrides, words):
    assert cli.main(["validate", "demo/pact_lora", *overrides]) == 1
    message = capsys.readouterr().err
    assert words in message and message.count("\n") <= 3  # dataset.seed is ${seed}, and named too


def test_validate_lists_everything_at_once(capsys):
    assert cli.main(["validate", "demo/pact_lora", "epochs=0", "bacth_size=3", "optimizer.lr=.nan", "loss.kk=1"]) == 1
    message = capsys.readouterr().err
    assert "4 things are wrong" in message and message.count("\n") == 5
    for words in ("epochs is 0", "did you mean 'batch_size'", "optimizer.lr is nan", "Unknown key 'kk'"):
        assert words in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- 1\n- 2\n", "must hold keys with values"),
        (b"epochs: 1\nepochs: 2\n", "found duplicate key epochs"),
        (b"epochs: \xff\n", "is not text in UTF-8"),
        (b"model: [\n", "is not valid YAML"),
        (b"", "lacks the key 'output_dir'"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, capsys, content, words):
    (tmp_path / "mine.yaml").write_bytes(content)
    assert cli.main(["validate", str(tmp_path / "mine.yaml")]) == 1
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message


def test_overrides_of_the_command_line():
    cfg = load("demo/pact_lora", ["output_dir=runs/lr=3/a", "optimizer=torch.optim.SGD", "~optimizer.weight_decay"])
    assert cfg.output_dir == "runs/lr=3/a" and cfg.metric_logger.log_dir == "runs/lr=3/a/logs"
    assert cfg.optimizer == {"_component_": "torch.optim.SGD", "lr": 2e-3}
    for word in ("lr_scheduler=null", "lr_scheduler=None", "~lr_scheduler"):
        assert load("demo/pact_lora", [word]).lr_scheduler is None
    assert load("demo/pact_lora", ["optimizer.lr=1e-3"]).optimizer.lr == 1e-3


@pytest.mark.parametrize("method", method_names())
def test_every_method_goes_over_every_kind_of_config(tmp_path, monkeypatch, capsys, method):
    monkeypatch.chdir(tmp_path)
    base = load("demo/pact_lora")
    for name in ("demo/pact_lora", "qwen2_5/0.5B"):
        cfg = load(name, methods=[method])
        assert method in cfg.output_dir and cfg.checkpointer.output_dir == cfg.output_dir
        if "safety_tokens" in cfg.loss:
            assert cfg.loss.safety_tokens == load(name).loss.safety_tokens
        assert cli.main(["cp", name, f"{method}.yaml", "--method", method, "--force"]) == 0
        assert load(tmp_path / f"{method}.yaml") == cfg
    assert load("demo/pact_lora", ["output_dir=here"], [method]).output_dir == "here"
    assert load("demo/pact_lora").loss == base.loss  # the base is as it was
    capsys.readouterr()
    assert cli.main(["validate", "demo/pact_lora", "--method", method, "epochs=2"]) == 0
    assert cli.main(["ls"]) == 0 and f"\n{method} " in capsys.readouterr().out


def test_another_component_starts_its_section_anew():
    cfg = load("demo/pact_lora", methods=["str"])
    assert set(cfg.loss) == {"_component_", "safety_tokens", "lambda_str"}
    assert set(load("demo/pact_lora", methods=["sft"]).loss) == {"_component_"}


def test_methods_over_each_other():
    """Plain SFT between two takes no safety tokens and does not lose those of the config."""
    cfg = load("demo/pact_lora", methods=["safeinstruct", "pact_tail"])
    assert cfg.loss.safety_tokens == load("demo/pact_lora").loss.safety_tokens and cfg.loss.preset == "tail"
    assert cfg.dataset.anchors.source == "anchors.jsonl" and cfg.dataset.mix.fraction == 0.1


def test_a_method_that_is_not_there(capsys):
    assert cli.main(["validate", "demo/pact_lora", "--method", "pact_tial"]) == 1
    assert "did you mean 'pact_tail'" in capsys.readouterr().err


def test_device_auto_is_a_gpu_where_there_is_one(monkeypatch, capsys):
    from pact_tune.experiments import plan
    from pact_tune.torchtune.backbone import device_and_dtype

    assert device_and_dtype(load("demo/pact_lora", ["device=auto"]))[0].type == default_device()
    for there, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert plan.read("smollm2_quick").device == device
        assert plan.read("demo/overview").device == "cpu"  # its config says so
        assert cli.main(["validate", "demo/pact_lora", "device=auto"]) == 0
        assert ("GPU memory" in capsys.readouterr().out) == there
