"""`pact ls | cp | run | validate`: the recipe's configs, listed, copied, run and checked as `tune` does with its own."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import config, training
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from transformers import PreTrainedModel

from pact_tune.arguments import Parser
from pact_tune.backbones import TRANSFORMERS
from pact_tune.config import refuse
from pact_tune.errors import UserError
from pact_tune.files import atomic_file
from pact_tune.generation import device_here
from pact_tune.hf.backbone import DTYPES, HFBackbone, plan, transformers_sizes
from pact_tune.memory import GIB, estimate_memory
from pact_tune.torchtune import launch, lora
from pact_tune.torchtune.config import (
    EXPERIMENT_ROOT,
    RECIPE,
    add_arguments,
    complete,
    compose,
    config_names,
    experiment_names,
    find_config,
    find_method,
    method_names,
    refuse_options,
)
from pact_tune.torchtune.memory import sizes_of
from pact_tune.weights import ModelFolder

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
    if argv[0] == "run":
        return launch.run(argv)
    parser = Parser(prog="pact", description=__doc__)
    commands = parser.add_subparsers(required=True)
    list_parser = commands.add_parser("ls", help="list the recipe and its configs")
    list_parser.set_defaults(run=_list)
    copy_parser = commands.add_parser("cp", help="copy a config, or the recipe, to edit it")
    copy_parser.add_argument("name", help=f"a config or experiment that `pact ls` lists, or {RECIPE}")
    copy_parser.add_argument("destination", type=Path)
    copy_parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME",
        help="lay a method over the config, and write the result",
    )
    exists = copy_parser.add_mutually_exclusive_group()
    exists.add_argument("-n", "--no-clobber", action="store_true", help="leave a file that is there already")
    exists.add_argument("-f", "--force", action="store_true", help="replace a file that is there already")
    copy_parser.add_argument("--make-parents", action="store_true", help="make the destination's folder")
    copy_parser.set_defaults(run=_copy)
    validate_parser = commands.add_parser("validate", help="check a config; no data or weights are read")
    validate_parser.add_argument("name", help="a name that `pact ls` lists, or a path")
    add_arguments(validate_parser)
    validate_parser.set_defaults(run=_validate)
    args, rest = parser.parse_known_args(argv)
    if args.run is _validate:
        refuse_options(rest, "`pact validate` takes --method, key=value and ~key")
        args.overrides += rest  # overrides that stand after an option
    elif rest:
        commands.choices[argv[0]].error(f"unrecognized arguments: {' '.join(rest)}")
    args.run(args)
    return 0


def _list(args: argparse.Namespace) -> None:
    print(f"{'RECIPE':<24} CONFIG")
    for i, name in enumerate(config_names()):
        print(f"{RECIPE if i == 0 else '':<24} {name}")
    print("\nMETHOD (--method NAME lays one over any config)")
    for name in method_names():
        print(f"{name:<24} {_title(find_method(name))}")
    print("\nEXPERIMENT (pact experiment NAME)")
    for name in experiment_names():
        print(f"{name:<24} {_title(EXPERIMENT_ROOT / f'{name}.yaml')}")


def _title(file: Path) -> str:
    """The first line of a file's comment."""
    return file.read_text().splitlines()[0].lstrip("# ")


def _copy(args: argparse.Namespace) -> None:
    if args.name == RECIPE and args.method:
        raise UserError(f"--method lays a method over a config, and {RECIPE} is the recipe: name a config.")
    source = _source(args.name)
    destination: Path = args.destination
    if destination.is_dir():
        destination /= source.name
    destination = destination.with_suffix(source.suffix)
    if args.no_clobber and destination.exists():
        print(f"{destination} exists and is left as it is.")
        return
    if destination.exists() and not args.force:
        raise UserError(f"'{destination}' exists: choose another name, or replace it with --force.")
    text = _merged(args.name, args.method) if args.method else source.read_text()
    if args.make_parents:
        destination.parent.mkdir(parents=True, exist_ok=True)
    if not destination.parent.is_dir():
        raise UserError(f"There is no folder '{destination.parent}': make it, or use --make-parents.")
    with atomic_file(destination) as file:
        file.write_text(text)
    print(f"Copied {' with '.join([args.name, *args.method])} to {destination}")


def _source(name: str) -> Path:
    if name == RECIPE:
        return _recipe_file()
    return EXPERIMENT_ROOT / f"{name}.yaml" if name in experiment_names() else find_config(name)


def _merged(name: str, methods: Sequence[str]) -> str:
    """The text of a config with methods laid over it; a merge keeps no comments but those of the methods."""
    comments = [line for method in methods for line in find_method(method).read_text().splitlines() if line[:1] == "#"]
    header = [
        f"# {name} with the method {', '.join(methods)}; what the keys mean: `pact cp {name} FILE`.",
        "#",
        *comments,
    ]
    return "\n".join(header) + "\n\n" + OmegaConf.to_yaml(compose(name, methods))


def _recipe_file() -> Path:
    import pact_lora_finetune

    return Path(pact_lora_finetune.__file__)


def _validate(args: argparse.Namespace) -> None:
    cfg = load(args.name, args.overrides, args.method)
    model = check(cfg)
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    print(f"{args.name} is well-formed.")
    print(f"Model: {sum(p.numel() for p in parameters):,} parameters, {trained:,} of them trained.")
    if device_here(cfg.device) != "cpu":
        sizes = [f"{processes} x {memory(cfg, model, processes) / GIB:.0f} GiB" for processes in (1, 2, 4, 8)]
        print(f"GPU memory for rows of {_tokens(cfg)} tokens, estimated by formula: {', '.join(sizes)}.")


def load(name: str | Path, overrides: Sequence[str] = (), methods: Sequence[str] = ()) -> DictConfig:
    """A complete config, as the recipe reads it.

    Args:
        name (str | Path): name or path.
        overrides (Sequence[str]): "key=value" or "~key".
        methods (Sequence[str]): names or paths of overlays.

    Returns:
        DictConfig: checked, with every default filled in.

    Raises:
        UserError: everything that is wrong with it.
    """
    return complete(compose(str(name), methods, overrides))


def check(cfg: DictConfig) -> nn.Module:
    """Builds the model and the optimizer and, where the checkpoint is there, compares them with it; reads no weights.

    Args:
        cfg (DictConfig): a complete config.

    Returns:
        nn.Module: the model, on the meta device.

    Raises:
        UserError: everything that cannot be built.
    """
    there = cfg.checkpoint_dir is not None and Path(cfg.checkpoint_dir).is_dir()
    if there:
        ModelFolder(
            cfg.checkpoint_dir, "checkpoint_dir"
        )  # one that is damaged is a single fault, not one of each reader
    problems: list[str] = []
    model = _built(problems, lambda: _model(cfg))
    if model is not None:
        _built(problems, lambda: _optimizer(cfg, model))
    if there:
        _built(problems, lambda: _checkpoint(cfg, model))
    refuse(problems)
    assert model is not None  # else there is a problem
    return model


def _built(problems: list[str], build: Callable[[], nn.Module | None]) -> nn.Module | None:
    """What ``build`` returns; None, and the reason added to ``problems``, where it cannot be built."""
    try:
        return build()
    except UserError as error:
        problems.append(str(error))
        return None


def _model(cfg: DictConfig) -> nn.Module:
    if cfg.model._component_ == TRANSFORMERS:
        return plan(cfg)[1]
    dtype = training.get_dtype(cfg.dtype, device=torch.device("cpu"))
    with training.set_default_dtype(dtype), torch.device("meta"):
        model = lora.build(cfg.model)
    if lora.modules(model):
        set_trainable_params(model, get_adapter_params(model))
    return model


def _checkpoint(cfg: DictConfig, model: nn.Module | None) -> None:
    """Compares the checkpoint's config.json and the shapes of its weights with the model, and loads its tokenizer."""
    if cfg.model._component_ == TRANSFORMERS:
        HFBackbone(cfg, torch.device("cpu"), DTYPES[cfg.dtype], 1)
    else:
        checkpointer = config.instantiate(cfg.checkpointer)
        if model is not None:
            checkpointer.check(model)
    path = cfg.tokenizer.get("path")
    if path is not None and Path(path).is_dir():
        config.instantiate(cfg.tokenizer)


def _optimizer(cfg: DictConfig, model: nn.Module) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        optimizer = config.instantiate(cfg.optimizer, trained)
        if cfg.lr_scheduler is not None:
            config.instantiate(cfg.lr_scheduler, optimizer, num_training_steps=1, last_epoch=-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"Section 'optimizer' or 'lr_scheduler' cannot be built: {error}") from error


def memory(cfg: DictConfig, model: nn.Module, processes: int = 1) -> float:
    """Estimated peak memory of one GPU, in bytes; see :func:`pact_tune.memory.estimate_memory`."""
    sizes = transformers_sizes(model) if isinstance(model, PreTrainedModel) else sizes_of(model)
    return estimate_memory(sizes, cfg.batch_size, _tokens(cfg), cfg.enable_activation_checkpointing, processes)


def _tokens(cfg: DictConfig) -> int:
    return cfg.dataset.get("max_seq_len") or DEFAULT_TOKENS
