"""`pact ls | cp | run | validate`: the recipe's configs, listed, copied, run and checked as `tune` does with its own."""

import argparse
import inspect
import shutil
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torchtune import config, training
from torchtune._cli import tune
from torchtune.config._utils import _get_component_from_path
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from pact_tune.errors import UserError
from pact_tune.torchtune import lora
from pact_tune.torchtune.config import complete, config_names, find_config, register_resolvers
from pact_tune.torchtune.memory import GIB, estimate_memory

RECIPE = "pact_lora_finetune"
# What the recipe itself hands to a component beside the config's keys.
GIVEN = {
    "dataset": ("tokenizer",),
    "optimizer": ("params",),
    "lr_scheduler": ("optimizer", "num_training_steps", "last_epoch"),
}
DEFAULT_TOKENS = 2048  # row length for the memory estimate of a config without dataset.max_seq_len


def main(argv: list[str]) -> int:
    """Runs one of the four commands.

    Args:
        argv (list[str]): the command line after `pact`: "ls", "cp", "run" or "validate", and its arguments.

    Returns:
        int: exit code.

    Raises:
        UserError: no such config, or one that is not right.
    """
    if argv[0] == "run":  # torchtune's own command: it finds the recipe as an installed module
        sys.argv = ["tune", *argv]
        tune.main()
        return 0
    parser = argparse.ArgumentParser(prog="pact", description=__doc__)
    commands = parser.add_subparsers(required=True)
    list_parser = commands.add_parser("ls", help="list the recipe and its configs")
    list_parser.set_defaults(run=_list)
    copy_parser = commands.add_parser("cp", help="copy a config, or the recipe, to edit it")
    copy_parser.add_argument("name", help=f"a name that `pact ls` lists, or {RECIPE}")
    copy_parser.add_argument("destination", type=Path)
    copy_parser.add_argument("-n", "--no-clobber", action="store_true", help="leave a file that is there already")
    copy_parser.add_argument("--make-parents", action="store_true", help="make the destination's folder")
    copy_parser.set_defaults(run=_copy)
    validate_parser = commands.add_parser("validate", help="check a config; no data or weights are read")
    validate_parser.add_argument("name", help="a name that `pact ls` lists, or a path")
    validate_parser.add_argument("overrides", nargs="*", help="key=value, as for `tune run`")
    validate_parser.set_defaults(run=_validate)
    args = parser.parse_args(argv)
    args.run(args)
    return 0


def _list(args: argparse.Namespace) -> None:
    print(f"{'RECIPE':<24} CONFIG")
    for i, name in enumerate(config_names()):
        print(f"{RECIPE if i == 0 else '':<24} {name}")


def _copy(args: argparse.Namespace) -> None:
    source = _recipe_file() if args.name == RECIPE else find_config(args.name)
    destination: Path = args.destination
    if destination.is_dir():
        destination /= source.name
    destination = destination.with_suffix(source.suffix)
    if args.no_clobber and destination.exists():
        print(f"{destination} exists and is left as it is.")
        return
    if args.make_parents:
        destination.parent.mkdir(parents=True, exist_ok=True)
    if not destination.parent.is_dir():
        raise UserError(f"There is no folder '{destination.parent}': make it, or use --make-parents.")
    shutil.copyfile(source, destination)
    print(f"Copied {args.name} to {destination}")


def _recipe_file() -> Path:
    import pact_lora_finetune

    return Path(pact_lora_finetune.__file__)


def _validate(args: argparse.Namespace) -> None:
    register_resolvers()
    cfg = load(find_config(args.name), args.overrides)
    model = check(cfg)
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    print(f"{args.name} is well-formed.")
    print(f"Model: {sum(p.numel() for p in parameters):,} parameters, {trained:,} of them trained.")
    if cfg.device != "cpu":
        sizes = [f"{processes} x {memory(cfg, model, processes) / GIB:.0f} GiB" for processes in (1, 2, 4, 8)]
        print(f"GPU memory for rows of {_tokens(cfg)} tokens, estimated by formula: {', '.join(sizes)}.")


def load(path: Path, overrides: list[str] = ()) -> DictConfig:
    """A complete config.

    Args:
        path (Path): YAML file.
        overrides (list[str]): "key=value".

    Returns:
        DictConfig: with every default filled in.

    Raises:
        UserError: not YAML, a wrong key, or a reference to a key that is not there.
    """
    try:
        cfg = complete(OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))))
        OmegaConf.resolve(cfg)
    except UserError:
        raise
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise UserError(f"The config '{path}' cannot be read: {str(error).splitlines()[0]}") from error
    except Exception as error:  # YAML's own exceptions
        raise UserError(f"The config '{path}' is not valid YAML: {' '.join(str(error).split())}") from error
    return cfg


def check(cfg: DictConfig) -> nn.Module:
    """Builds every component that needs no data: the model, optimizer and loss for real, the others by signature.

    Args:
        cfg (DictConfig): a complete config.

    Returns:
        nn.Module: the model, on the meta device.

    Raises:
        UserError: names the section that cannot be built.
    """
    for name, section in cfg.items():
        if OmegaConf.is_dict(section) and "_component_" in section:
            _check_arguments(str(name), section)
    dtype = training.get_dtype(cfg.dtype, device=torch.device("cpu"))
    with training.set_default_dtype(dtype), torch.device("meta"):
        model = lora.build(cfg.model)
    if lora.modules(model):
        set_trainable_params(model, get_adapter_params(model))
    config.instantiate(cfg.loss)
    try:
        config.instantiate(cfg.optimizer, [p for p in model.parameters() if p.requires_grad])
    except (TypeError, ValueError) as error:
        raise UserError(f"Section 'optimizer' cannot be built: {error}") from error
    return model


def memory(cfg: DictConfig, model: nn.Module, processes: int = 1) -> float:
    """Estimated peak memory of one GPU, in bytes; see :func:`pact_tune.torchtune.memory.estimate_memory`."""
    return estimate_memory(model, cfg.batch_size, _tokens(cfg), cfg.enable_activation_checkpointing, processes)


def _tokens(cfg: DictConfig) -> int:
    return cfg.dataset.get("max_seq_len") or DEFAULT_TOKENS


def _check_arguments(name: str, section: DictConfig) -> None:
    """Raises UserError when a component lacks an argument that it must have."""
    parameters = inspect.signature(_get_component_from_path(section["_component_"])).parameters
    for key, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if needed and key not in section and key not in GIVEN.get(name, ()):
            raise UserError(f"Section '{name}' lacks the key '{key}', which {section['_component_']} must be given.")
