"""The wheel, as a user gets it: built from a copy of the sources, installed apart, and used from an unrelated folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent
# How the packages and metadata that extras bring are called; accelerate comes with PEFT and TRL.
EXTRAS = (
    "torchtune",
    "torchao",
    "peft",
    "trl",
    "scipy",
    "openai",
    "matplotlib",
    "gguf",
    "accelerate",
    "__editable__",
    "pact_tune",
)


def run(*command, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """A command without the checkout on its path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def pip(*arguments, cwd: Path) -> None:
    result = run(sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--quiet", cwd=cwd)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    # All that git tracks at the top, tests and benchmarks too: these must not find their way into the wheel.
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in ("outputs", "build", "dist", "shared"):
            continue
        if path.is_dir():
            shutil.copytree(path, sources / path.name, ignore=leave_out)
        else:
            shutil.copyfile(path, sources / path.name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder / "dist", sources, cwd=folder)
    (file,) = (folder / "dist").iterdir()
    return file


def environment_with(wheel: Path, folder: Path, dependencies: Path | str) -> Path:
    """A virtual environment with the wheel, that finds everything else in another folder."""
    result = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    assert result.returncode == 0, result.stderr
    python = folder / "bin" / "python"
    pip("--python", python, "install", wheel, cwd=folder)
    site_packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).stdout.strip())
    # A path in a .pth file is searched last, and .pth files in it, such as an editable install's, are not read.
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return folder


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The wheel beside everything that is installed here."""
    return environment_with(wheel, tmp_path_factory.mktemp("environment"), sysconfig.get_path("purelib"))


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory) -> Path:
    """The wheel beside the core's dependencies: what the extras bring is not there, nor its metadata."""
    installed = tmp_path_factory.mktemp("core_packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(EXTRAS):
            (installed / path.name).symlink_to(path)
    return environment_with(wheel, tmp_path_factory.mktemp("core"), installed)


@pytest.fixture(scope="module")
def result(environment, tmp_path_factory) -> Path:
    """`tune run` of the demo config, which finds recipe, config, model, data and safety tokens in the wheel."""
    folder = tmp_path_factory.mktemp("run")
    command = ["run", "pact_lora_finetune", "--config", "demo/pact_lora"]
    overrides = ["max_steps_per_epoch=1", "epochs=1", "dataset.n=20", "output_dir=here"]
    done = run(environment / "bin" / "python", SCRIPTS / "tune", *command, *overrides, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout + done.stderr
    return folder / "here" / "epoch_0"


def files_below(folder: str) -> set[str]:
    """Files of the checkout, as they should be called in the wheel."""
    ignored = {"__pycache__"}
    return {
        str(path.relative_to(ROOT / folder))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not ignored & set(path.parts) and not path.name.startswith(".")
    }


def test_the_wheel_holds_what_is_used_and_no_more(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"pact_tune", "pact_lora_finetune.py", info}

    configs = {name for name in files_below("configs") if name.endswith(".yaml")}
    assert "demo/pact_lora.yaml" in configs
    assert configs <= {name.removeprefix("pact_tune/configs/") for name in names}
    tools = {name for name in files_below("tools") if name.endswith(".py")}
    assert {"__init__.py", "demo.py"} <= tools
    assert tools == {name.removeprefix("pact_tune/tools/") for name in names if name.startswith("pact_tune/tools/")}
    package = {f"pact_tune/{name}" for name in files_below("pact_tune")}
    assert {"pact_tune/demo/family/aligned/model.safetensors", "pact_tune/torchtune/__init__.py"} <= package
    assert package <= names, sorted(package - names)
    assert f"{info}/licenses/LICENSE" in names


def test_commands_work_from_any_folder(environment, tmp_path):
    find = "from importlib.util import find_spec; print(*(find_spec(m).origin for m in ('pact_tune', 'pact_lora_finetune')))"
    where = run(environment / "bin" / "python", "-c", find, cwd=tmp_path)
    assert where.returncode == 0, where.stderr
    assert all(Path(file).is_relative_to(environment) for file in where.stdout.split()), where.stdout

    pact = environment / "bin" / "pact"
    version = run(pact, "--version", cwd=tmp_path)
    assert version.returncode == 0 and f"pact_tune-{version.stdout.strip()}.dist-info" in os.listdir(
        Path(where.stdout.split()[1]).parent
    )
    assert "tokens compute" in run(pact, "--help", cwd=tmp_path).stdout
    wrong = run(pact, "tokns", cwd=tmp_path)
    assert wrong.returncode == 1 and "'tokns' is no command" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_the_recipe_runs_from_any_folder(result):
    assert (result / "adapter" / "adapter_model.safetensors").is_file()
    assert (result / "model.safetensors").is_file()


EVERY_PUBLIC_NAME = """
import importlib.util, sys
import pact_tune, pact_tune.objectives, pact_tune.reference.source, pact_tune.decoder, pact_tune.run_state
assert not any(importlib.util.find_spec(name) for name in ("torchtune", "torchao", "peft"))
print(*(name for name in pact_tune.__all__ if getattr(pact_tune, name) is None), sep="")
print(len(pact_tune.objectives.__all__) > 3)
"""


def test_the_core_needs_no_extra(core, result, tmp_path):
    """Public names and the commands that train nothing, where torchtune, torchao, PEFT, TRL and the rest are not installed."""
    names = run(core / "bin" / "python", "-c", EVERY_PUBLIC_NAME, cwd=tmp_path)
    assert names.returncode == 0 and names.stdout == "\nTrue\n", names.stderr

    def pact(*arguments) -> str:
        done = run(core / "bin" / "pact", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    model = result.parent.parent / "model"
    shutil.copytree(ROOT / "pact_tune" / "demo" / "family" / "aligned", model)
    pact("tokens", "from-templates", "--tokenizer", model, "--output", "tokens")
    assert "sorry" in pact("tokens", "show", "tokens")
    assert "--aligned" in pact("tokens", "compute", "--help")
    assert "was trained with the constraint" in pact("verify", result, "--base", model, "--rows", "2")


def test_env_says_what_is_missing_and_commands_say_how_to_get_it(core, environment, tmp_path):
    def features(where: Path) -> dict[str, dict]:
        report = json.loads(run(where / "bin" / "pact", "env", "--json", cwd=tmp_path).stdout)
        assert report["versions"]["pact-tune"] and report["devices"][0].startswith("cpu")
        return {feature["name"].split(":")[0]: feature for feature in report["features"]}

    assert features(environment)["torchtune recipe"]["problems"] == []
    missing = features(core)
    for name in ("torchtune recipe", "TRL trainer", "evaluation", "GGUF files"):
        assert missing[name]["problems"], name
    assert missing["torchtune recipe"]["mend"] == "pip install 'pact-tune[torchtune]'"
    shown = run(core / "bin" / "pact", "env", cwd=tmp_path).stdout
    assert "missing  torchtune recipe" in shown and "torchtune is not installed" in shown

    for command in (["ls"], ["run", "pact_lora_finetune"], ["validate", "demo/pact_lora"]):
        refused = run(core / "bin" / "pact", *command, cwd=tmp_path)
        assert refused.returncode == 1 and "pip install 'pact-tune[torchtune]'" in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
