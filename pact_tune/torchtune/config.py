"""The recipe's configs: found by name, and checked to the last key before anything is loaded."""

import inspect
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

import pact_tune.configs
import pact_tune.demo
from pact_tune.errors import UserError, unknown_key
from pact_tune.reference_cache import check_options

CONFIG_ROOT = Path(pact_tune.configs.__file__).parent

REQUIRED = (
    "output_dir",
    "tokenizer",
    "model",
    "checkpointer",
    "dataset",
    "loss",
    "optimizer",
    "batch_size",
    "epochs",
    "device",
    "dtype",
    "metric_logger",
)
# Keys that a config may leave out, and what they then are.
DEFAULTS: dict[str, Any] = {
    "checkpoint_dir": None,  # read by other keys as ${checkpoint_dir}, not by the recipe
    "resume_from_checkpoint": False,
    "seed": 0,
    "shuffle": True,
    "batch_by_length": True,
    "gradient_accumulation_steps": 1,
    "max_steps_per_epoch": None,
    "clip_grad_norm": None,
    "lr_scheduler": None,
    "reference_cache": {"directory": None, "dtype": "float16", "max_gb": None, "lazy": False},
    "packed": False,
    "enable_activation_checkpointing": False,
    "enable_activation_offloading": False,
    "compile": False,
    "fsdp_reshard_after_forward": True,
    "log_every_n_steps": 1,
    "log_peak_memory_stats": False,
    "save_every_n_steps": None,
    "save_adapter_weights_only": False,
}


def register_resolvers() -> None:
    """Makes ``${demo:NAME}`` in a config the path of a file of the demo family, wherever the package is installed."""
    OmegaConf.register_resolver("demo", lambda name: str(pact_tune.demo.demo_family_path() / name), replace=True)


def config_names() -> list[str]:
    """Names of the shipped configs, as `--config` takes them."""
    return sorted(str(path.relative_to(CONFIG_ROOT).with_suffix("")) for path in CONFIG_ROOT.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """The file of a config.

    Args:
        name (str): a path, or the name of a shipped config; a file of that path wins.

    Returns:
        Path: the YAML file.

    Raises:
        UserError: neither a file nor a name; names the nearest.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = CONFIG_ROOT / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    raise unknown_key(name, config_names(), "--config (no such file, and no shipped config of that name)")


def resolve_argv(argv: list[str]) -> list[str]:
    """A recipe's command line with the name after `--config` replaced by the file's path."""
    argv = list(argv)
    for i, word in enumerate(argv):
        if word == "--config" and i + 1 < len(argv):
            argv[i + 1] = str(find_config(argv[i + 1]))
        elif word.startswith("--config="):
            argv[i] = f"--config={find_config(word.removeprefix('--config='))}"
    return argv


def complete(cfg: DictConfig) -> DictConfig:
    """Checks every key of a config and fills in the defaults.

    Args:
        cfg (DictConfig): as the user wrote it, overrides included.

    Returns:
        DictConfig: with every key of :data:`REQUIRED` and :data:`DEFAULTS`.

    Raises:
        UserError: a key that nobody reads, one that is missing, or two that contradict each other.
    """
    valid = (*REQUIRED, *DEFAULTS)
    for key in cfg:
        if key not in valid:
            raise unknown_key(str(key), valid, "the config")
    for key in REQUIRED:
        if cfg.get(key) is None:
            raise UserError(f"The config lacks the key '{key}': see a shipped config for what it holds (`pact ls`).")
    for name, section in cfg.items():
        if OmegaConf.is_dict(section) and "_component_" in section:
            check_component(name, section)
        elif name in ("tokenizer", "model", "checkpointer", "dataset", "loss", "optimizer", "metric_logger"):
            raise UserError(f"Section '{name}' needs a _component_ that says what to build.")
    if OmegaConf.is_dict(cache := cfg.get("reference_cache")):
        for key in cache:
            if key not in DEFAULTS["reference_cache"]:
                raise unknown_key(str(key), DEFAULTS["reference_cache"], "section 'reference_cache'")
    defaults = OmegaConf.create(DEFAULTS)
    if "reference_cache" in cfg and cfg.reference_cache is None:
        defaults.reference_cache = None  # null means no cache, not the default one
    cfg = OmegaConf.merge(defaults, cfg)
    if cfg.batch_by_length and not cfg.shuffle:
        raise UserError(
            "shuffle: False keeps the order of the data, which batch_by_length: True changes: set batch_by_length: False too."
        )
    if cfg.reference_cache is not None:
        check_options(cfg.reference_cache.dtype, cfg.reference_cache.max_gb)
    return cfg


def check_component(name: str, section: DictConfig) -> None:
    """Raises UserError when a section names a component that does not exist, or a key that it does not take."""
    sys.path.append(str(Path.cwd()))  # a component may live in the user's folder, as in torchtune
    try:
        component = _get_component_from_path(section["_component_"])
    except (InstantiationError, ValueError) as error:
        raise UserError(f"{name}._component_ '{section['_component_']}' cannot be imported: {error}") from error
    parameters = inspect.signature(component).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return  # takes any key, and checks them itself
    for key in section:
        if key != "_component_" and key not in parameters:
            raise unknown_key(str(key), parameters, f"section '{name}'")
