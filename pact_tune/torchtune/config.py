"""The recipe's configs: found by name, composed with methods and overrides, and checked before anything is loaded."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import pact_tune.configs
import pact_tune.demo
from pact_tune.arguments import Parser
from pact_tune.backbones import TRANSFORMERS
from pact_tune.components import find_component
from pact_tune.config import (
    AnalysisSettings,
    RecipeSettings,
    ReferenceCacheSettings,
    Section,
    check,
    defaults,
    refuse,
    signature_of,
)
from pact_tune.errors import UserError, unknown_key, unknown_name

RECIPE = "pact_lora_finetune"
CONFIG_ROOT = Path(pact_tune.configs.__file__).parent
METHOD_ROOT = CONFIG_ROOT / "methods"
EXPERIMENT_ROOT = CONFIG_ROOT / "experiments"  # files of `pact experiment`
SUFFIX = "_pact_lora"  # what may be left out of a config's name: "qwen2_5/7B" is "qwen2_5/7B_pact_lora"
# What the recipe itself hands to a component beside the config's keys.
GIVEN = {
    "loss": ("context",),
    "dataset": ("tokenizer",),
    "validation_dataset": ("tokenizer",),
    "optimizer": ("params",),
    "lr_scheduler": ("optimizer", "num_training_steps", "last_epoch"),
}
# Keys of section 'loss' that belong to the model and not to the method: another method keeps them.
OF_THE_MODEL = ("safety_tokens", "revision", "subfolder", "template_fallback")


def register_resolvers() -> None:
    """Makes ``${demo:NAME}`` in a config the path of a file of the demo family, wherever the package is installed."""
    OmegaConf.register_resolver("demo", lambda name: str(pact_tune.demo.demo_family_path() / name), replace=True)


# Names -----------------------------------------------------------------------------------------------------------------


def config_names() -> list[str]:
    """Names of the shipped configs, as `--config` takes them."""
    files = (path for path in CONFIG_ROOT.rglob("*.yaml") if not {METHOD_ROOT, EXPERIMENT_ROOT} & set(path.parents))
    return sorted(str(path.relative_to(CONFIG_ROOT).with_suffix("")) for path in files)


def method_names() -> list[str]:
    """Names of the shipped methods, as `--method` takes them."""
    return sorted(path.stem for path in METHOD_ROOT.glob("*.yaml"))


def experiment_names() -> list[str]:
    """Names of the shipped experiments, as `pact experiment` takes them."""
    return sorted(str(path.relative_to(EXPERIMENT_ROOT).with_suffix("")) for path in EXPERIMENT_ROOT.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """The file of a config.

    Args:
        name (str): a path, or the name of a shipped config, with or without "_pact_lora"; a file of that path wins.

    Returns:
        Path: the YAML file.

    Raises:
        UserError: neither a file nor a name; names the nearest.
    """
    if Path(name).is_file():
        return Path(name)
    plain = name.removesuffix(".yaml")
    for shipped in (plain, plain + SUFFIX):
        if shipped in config_names():
            return CONFIG_ROOT / f"{shipped}.yaml"
    raise unknown_name("config of `pact ls`, and no file either", name, config_names())


def find_method(name: str) -> Path:
    """The file of a method's overlay: a path, or the name of a shipped method.

    Raises:
        UserError: neither a file nor a name; names the nearest.
    """
    if name in method_names():
        return METHOD_ROOT / f"{name}.yaml"
    if Path(name).is_file():
        return Path(name)
    raise unknown_name("method of `pact ls`, and no file either", name, method_names())


# Composition -----------------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> DictConfig:
    """The keys of a YAML file.

    Raises:
        UserError: it cannot be read, is not YAML, has a key twice, or holds no keys.
    """
    try:
        cfg = OmegaConf.load(path)
    except YAMLError as error:
        raise UserError(f"The config '{path}' is not valid YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The config '{path}' is not text in UTF-8 (byte {error.start}): save it as UTF-8.") from error
    except (OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise UserError(f"The config '{path}' cannot be read: {_first_line(error)}") from error
    if not isinstance(cfg, DictConfig):
        raise UserError(f"The config '{path}' must hold keys with values (epochs: 3), and holds something else.")
    return cfg


def merged(one: DictConfig, other: DictConfig) -> DictConfig:
    """``other`` over ``one``; what is a list in the one and a section in the other is replaced as a whole."""
    try:
        both = OmegaConf.merge(one, other)
    except TypeError:  # omegaconf does not lay a list over a section
        both = one.copy()
        for key in other:
            under, over = both._get_node(key), other._get_node(key)
            if isinstance(under, DictConfig) and isinstance(over, DictConfig):
                both[key] = merged(under, over)
            else:
                both[key] = over
    assert isinstance(both, DictConfig)
    return both


def read_whole(path: Path) -> DictConfig:
    """The keys of a config's file, over those of the config that its key ``base`` names; one model size over another.

    Raises:
        UserError: see :func:`read_yaml`; or the base has a base itself, or is not there.
    """
    cfg = read_yaml(path)
    if "base" not in cfg:
        return cfg
    base = read_yaml(find_config(str(cfg.pop("base"))))
    if "base" in base:
        raise UserError(f"The config '{path}' lies over one that has a base itself: name that one in 'base'.")
    return merged(base, cfg)


def compose(config: str, methods: Sequence[str] = (), overrides: Sequence[str] = ()) -> DictConfig:
    """A config with methods laid over it, then overrides; nothing is checked yet.

    Args:
        config (str): name or path.
        methods (Sequence[str]): names or paths of overlays, the later over the earlier.
        overrides (Sequence[str]): "key=value", or "~key" to remove one.

    Returns:
        DictConfig: as if one file had held it all.

    Raises:
        UserError: no such file or name, not YAML, or a word that is no override.
    """
    register_resolvers()
    cfg = read_whole(find_config(config))
    named = cfg.get("loss")  # a method between that takes no safety tokens must not lose them to the next one
    for name in methods:
        file = find_method(name)
        cfg = lay_over(cfg, read_yaml(file), file.stem, named)
    for word in overrides:
        cfg = override(cfg, word)
    return cfg


def lay_over(cfg: DictConfig, overlay: DictConfig, method: str, loss: DictConfig | None = None) -> DictConfig:
    """A config with a method's few keys.

    A section that names another ``_component_`` starts anew, since what the old one was told means nothing to the new
    one, or worse, something else; of ``loss``, the keys that belong to the model stay. ``output_dir`` takes the
    method's name, so that two methods do not write to one place.

    Args:
        cfg (DictConfig): the base.
        overlay (DictConfig): the method's keys.
        method (str): its name.
        loss (DictConfig | None): section ``loss`` before any method.

    Returns:
        DictConfig: both.
    """
    cfg = OmegaConf.create(cfg)
    for name, section in overlay.items():
        component = section.get("_component_") if OmegaConf.is_dict(section) else None
        old = cfg.get(name)
        if component and OmegaConf.is_dict(old) and old.get("_component_") != component:
            kept = _of_the_model(old, component) if name == "loss" else {}
            if name == "loss" and isinstance(loss, DictConfig):
                kept = _of_the_model(loss, component) | kept
            cfg[name] = OmegaConf.create(kept)
    output = cfg.get("output_dir")
    if isinstance(output, str) and "output_dir" not in overlay:
        place = Path(output)
        last = place.name.replace("pact", method, 1) if "pact" in place.name else f"{place.name}_{method}"
        cfg.output_dir = str(place.with_name(last))
    return merged(cfg, overlay)


def _of_the_model(old: DictConfig, component: str) -> dict[str, Any]:
    known = signature_of(find_component("loss", component)).keys
    content: Any = OmegaConf.to_container(old)
    return {key: content[key] for key in OF_THE_MODEL if key in content and key in known}


def override(cfg: DictConfig, word: str) -> DictConfig:
    """A config with one word of the command line.

    Args:
        cfg (DictConfig): before.
        word (str): "key=value" (everything after the first "=" is the value), or "~key" to remove one. A section's name
            with a text sets its ``_component_``, and with null removes it.

    Returns:
        DictConfig: after.

    Raises:
        UserError: the word is no override, or there is nothing to remove.
    """
    if word.startswith("~"):
        return _without(cfg, word)
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise UserError(
            f"'{word}' on the command line is no override: write key=value (epochs=3, optimizer.lr=1e-4), or ~key to remove one."
        )
    try:
        change = OmegaConf.from_dotlist([f"{key}={'null' if value == 'None' else value}"])
        section = _node(cfg, key)
        names_component = OmegaConf.is_dict(section) and "_component_" in section
        if names_component and isinstance(change[key], str):
            change = OmegaConf.from_dotlist([f"{key}._component_={value}"])
        return merged(cfg, change)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"'{word}' on the command line cannot be read ({_first_line(error)[:-1]}): write the value as YAML has it, a text "
            "with brackets or colons in quotes."
        ) from error


def _node(cfg: DictConfig, key: str) -> Any:
    """A top-level section as it is written; None where there is none."""
    return cfg._get_node(key) if key in cfg else None


def _without(cfg: DictConfig, word: str) -> DictConfig:
    *parents, last = word[1:].split(".")
    cfg = OmegaConf.create(cfg)
    holder: Any = cfg
    section: Any = cfg
    for key in (*parents, last):
        if not OmegaConf.is_dict(section) or key not in section:
            known = map(str, section) if OmegaConf.is_dict(section) else ()
            raise unknown_key(key, known, f"'{word}' (nothing to remove)")
        holder, section = section, section._get_node(key)
    del holder[last]
    return cfg


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") + "."


# The command line ------------------------------------------------------------------------------------------------------


def read_command_line(argv: Sequence[str]) -> DictConfig:
    """The complete config that a recipe's command line asks for.

    Args:
        argv (Sequence[str]): ``--config NAME_OR_PATH [--method NAME_OR_PATH ...] [key=value ...] [~key ...]``.

    Returns:
        DictConfig: checked, see :func:`complete`.

    Raises:
        UserError: anything that is wrong with it.
    """
    parser = Parser(prog="tune run pact_lora_finetune", allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument("--config", required=True, metavar="NAME", help="a name that `pact ls` lists, or a path")
    args, rest = parser.parse_known_args(list(argv))
    refuse_options(
        rest, "the recipe takes --config, --method, key=value and ~key (options of torchrun stand before its name)"
    )
    return complete(compose(args.config, args.method, args.overrides + rest))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the recipe and `pact validate` take beside a config."""
    parser.add_argument(
        "--method", action="append", default=[], metavar="NAME", help="a method that `pact ls` lists, or a path"
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="any key; ~key removes one")


def refuse_options(words: Sequence[str], takes: str) -> None:
    """Raises UserError for an option among words that are to be overrides; ``takes`` says what there may be."""
    if options := [word for word in words if word.startswith("-")]:
        raise UserError(f"Unknown option '{options[0]}': {takes}.")


# Checks ----------------------------------------------------------------------------------------------------------------


def complete(cfg: DictConfig) -> DictConfig:
    """Checks every key of a config and fills in the defaults.

    Args:
        cfg (DictConfig): as the user wrote it, overrides included.

    Returns:
        DictConfig: with every key of :class:`pact_tune.config.RecipeSettings`; references to other keys are resolved.

    Raises:
        UserError: everything that is wrong: keys that nobody reads, that are missing, that are not what they must be, or
            that contradict each other.
    """
    values, unresolved = _resolved(cfg)
    problems = check(RecipeSettings, values, given=unresolved)
    plain = sorted(unresolved, key=lambda key: OmegaConf.is_config(cfg._get_node(key)))  # sections refer to plain keys
    reasons = {unresolved[key]: key for key in reversed(plain)}  # one key a reason: the others refer to that one
    problems += [f"{key} cannot be resolved: {reason}" for reason, key in reasons.items()]
    for name, parameter in signature_of(RecipeSettings).keys.items():
        section = values.get(name)
        if isinstance(section, dict) and parameter.annotation in (Section, Section | None):
            problems += check_section(name, section)
    refuse(problems)
    values = defaults(RecipeSettings) | values
    if values["reference_cache"] is not None:
        values["reference_cache"] = defaults(ReferenceCacheSettings) | values["reference_cache"]
    if values["analysis"] is not None:
        values["analysis"] = defaults(AnalysisSettings) | values["analysis"]
    refuse(contradictions(values))
    return OmegaConf.create(values)


def contradictions(values: dict[str, Any]) -> list[str]:
    """Keys that are right one by one and wrong together, and what this recipe cannot do."""
    problems = []
    if values["batch_by_length"] and not values["shuffle"]:
        problems.append(
            "shuffle: False keeps the order of the data, which batch_by_length: True changes: set batch_by_length: False too."
        )
    of_transformers = values["model"].get("_component_") == TRANSFORMERS
    if of_transformers and values["checkpointer"] is not None:
        problems.append(
            f"{TRANSFORMERS} reads and writes checkpoints itself: remove the section 'checkpointer' (an adapter that training "
            "goes on from is model.adapter)."
        )
    if not of_transformers and values["checkpointer"] is None:
        problems.append(
            "The config lacks the key 'checkpointer': it must be a section with a _component_ that says what to build."
        )
    return problems


def _resolved(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """All keys as plain values, references to other keys resolved; and those that lead nowhere, with the reason."""
    values: dict[str, Any] = {}
    unresolved: dict[str, str] = {}
    for key in cfg:
        try:
            value = cfg[key]
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            values[str(key)] = value
        except (OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
            unresolved[str(key)] = _first_line(error)
    return values, unresolved


def check_section(name: str, section: dict[str, Any]) -> list[str]:
    """Everything that is wrong with a section that names a component."""
    if "_component_" not in section:
        return [f"Section '{name}' needs a _component_ that says what to build."]
    try:
        component = find_component(name, section["_component_"])
    except UserError as error:
        return [str(error)]
    keys = {key: value for key, value in section.items() if key != "_component_"}
    return check(component, keys, name, GIVEN.get(name, ()))
