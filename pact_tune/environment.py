"""What is installed here, and what is missing for which feature.

The requirements of each feature are those that the package itself declares (its extras), read from its metadata.
"""

import importlib
import importlib.metadata
import json
import platform
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from packaging.requirements import Requirement

from pact_tune.errors import UserError, one_line
from pact_tune.version import __version__

DISTRIBUTION = "pact-tune"
# extra -> what it is for
EXTRAS = {
    "torchtune": "torchtune recipe: pact run, validate, demo",
    "trl": "TRL trainer",
    "axolotl": "Axolotl plugin",
    "eval": "evaluation: pact evaluate, compare, audit",
    "gguf": "GGUF files: pact import-gguf",
}
APART = ("axolotl",)  # pins what the others and the constraints have otherwise
CORE = ("torch", "transformers", "huggingface-hub", "safetensors", "datasets", "omegaconf", "pydantic")


@dataclass(frozen=True)
class Feature:
    """Something that pact-tune does only where more is installed.

    Attributes:
        name (str): what it is, for people.
        problems (tuple[str, ...]): what is missing, empty where it works.
        mend (str): what to do about them.
    """

    name: str
    problems: tuple[str, ...]
    mend: str


def missing_package(error: ModuleNotFoundError) -> UserError | None:
    """The error for a command that needs a package which is not installed.

    Args:
        error (ModuleNotFoundError): what the import raised.

    Returns:
        UserError | None: names the extra that brings the package; None where no extra does.
    """
    module = (error.name or "").split(".")[0]
    for extra in EXTRAS:
        if any(module == _module(requirement) for requirement in _requirements(extra)):
            return UserError(f"This needs {module}: {install(extra)} (`pact env` lists what is missing).")
    return None


def install(extra: str) -> str:
    """The command that adds an extra: from the folder that pact-tune was installed from, where that is still there."""
    try:
        origin = json.loads(importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        origin = {}
    folder = Path(url2pathname(urlparse(origin.get("url", "")).path))
    apart = extra in APART
    if "dir_info" not in origin or not (folder / "constraints.txt").is_file():
        command = f"pip install '{DISTRIBUTION}[{extra}]'"
    else:
        options = ("" if apart else "-c constraints.txt ") + ("-e " if origin["dir_info"].get("editable") else "")
        command = f"cd {shlex.quote(str(folder))} && pip install {options}'.[{extra}]'"
    return f"{command}, in an environment of its own" if apart else command


def versions() -> dict[str, str]:
    """Names and versions of Python, pact-tune and what the core needs."""
    found = {"python": platform.python_version(), DISTRIBUTION: __version__}
    return found | {name: _installed(name) or "not installed" for name in CORE}


def devices() -> list[str]:
    """The devices that PyTorch sees, each with its memory where it has one of its own."""
    names = [f"cpu ({torch.get_num_threads()} threads)"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        names.append(f"cuda:{i} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def features() -> Iterator[Feature]:
    """Everything that more than the core is needed for; packages are imported, since some are installed and broken."""
    for extra, name in EXTRAS.items():
        yield Feature(name, tuple(_problems(_requirements(extra))), install(extra))
    yield Feature(
        "vLLM: pact evaluate --engine vllm",
        tuple(_problems([Requirement("vllm")])),
        "pip install vllm, in an environment of its own",
    )
    cuda = () if torch.cuda.is_available() else ("PyTorch sees no GPU",)
    yield Feature("CUDA: training and evaluation on GPUs", cuda, "install the PyTorch build of your driver")
    compiler = () if shutil.which("gcc") or shutil.which("clang") else ("no gcc or clang",)
    yield Feature("compile: true", compiler, "install a C compiler")


def _requirements(extra: str) -> list[Requirement]:
    """What an extra of the installed package asks for; empty where pact-tune runs without being installed."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = [Requirement(text) for text in declared]
    return [
        r for r in found if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    ]


def _module(requirement: Requirement) -> str:
    return requirement.name.replace("-", "_")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _problems(requirements: Iterable[Requirement]) -> Iterator[str]:
    """Why these requirements are not met: nothing where they are."""
    for requirement in requirements:
        version = _installed(requirement.name)
        if version is None:
            yield f"{requirement.name} is not installed"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} is {version}, and has to be {requirement.specifier}"
        else:
            yield from _import_problem(requirement)


def _import_problem(requirement: Requirement) -> Iterator[str]:
    try:
        importlib.import_module(_module(requirement))
    except Exception as error:  # a package built for other versions of its neighbours raises anything
        yield f"{requirement.name} cannot be imported ({one_line(error)})"
