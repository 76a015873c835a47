"""The wheel, as a user gets it: built from a copy of the sources, installed apart, and used from an unrelated folder."""

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


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel; everything else it takes from this one, whose editable install it lacks."""
    folder = tmp_path_factory.mktemp("environment")
    result = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    assert result.returncode == 0, result.stderr
    python = folder / "bin" / "python"
    pip("--python", python, "install", wheel, cwd=folder)
    site_packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).stdout.strip())
    # A path in a .pth file is searched last, and .pth files in it, such as an editable install's, are not read.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


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
    assert wrong.returncode == 2 and "unknown command 'tokns'" in wrong.stderr


def test_the_recipe_runs_from_any_folder(environment, tmp_path):
    """`tune run` of the demo config finds recipe, config, model, data and safety tokens in the wheel."""
    command = ["run", "pact_lora_finetune", "--config", "demo/pact_lora"]
    overrides = ["max_steps_per_epoch=1", "epochs=1", "dataset.n=20", "output_dir=here"]
    result = run(environment / "bin" / "python", SCRIPTS / "tune", *command, *overrides, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "here" / "epoch_0" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "here" / "epoch_0" / "model.safetensors").is_file()
    assert str(ROOT) not in result.stdout + result.stderr
