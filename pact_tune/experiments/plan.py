"""What an experiment's file says, checked, and the runs that it stands for. Nothing is run here, and no weights are read."""

import functools
import hashlib
import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from pact_tune.config import Count, Fraction, Number, PathText, Seed, Text, check, defaults, refuse
from pact_tune.errors import UserError, one_line, unknown_key, unknown_name
from pact_tune.experiments import inputs
from pact_tune.files import atomic_file, slug
from pact_tune.generation import device_here
from pact_tune.torchtune.config import (
    EXPERIMENT_ROOT,
    RECIPE,
    complete,
    compose,
    experiment_names,
    merged,
    override,
    read_yaml,
    register_resolvers,
)

INITIAL = "Initial"  # the aligned model before any training
Named = Annotated[dict[str, Any], Field(min_length=1, description="a section of named sections")]
Vars = Annotated[dict[str, Any], Field(description="a section of names and values")]
Grid = Annotated[dict[str, list[Any]], Field(description="a section of keys, each with a list of values")]


# The file ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """An item of ``stages``: a command that is run once, before the grid.

    Attributes:
        run (str): the command, as in a terminal; ``pact`` and ``python`` are this environment's.
        makes (str | list[str]): files or folders that it leaves; it is skipped when all are there.
    """

    run: Text
    makes: Text | list[Text]


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """An item of ``methods``: a row of the table.

    Attributes:
        method (str | list[str]): overlays, as ``--method`` takes them; empty: the config as it is.
        overrides (list[str]): key=value or ~key, as on the command line.
        tune (dict[str, list]): keys and their values; the best of all combinations on the tuning seed is taken.
        sweep (dict[str, list]): keys and their values; each is one more row, in which that key alone differs.
    """

    method: Text | list[Text] | None = None
    overrides: list[Text] | None = None
    tune: Grid | None = None
    sweep: Grid | None = None


@dataclass(frozen=True, kw_only=True)
class CaseSettings:
    """An item of ``cases``: a data set or a model, which gets a table of its own.

    Attributes:
        config (str | None): instead of the experiment's.
        overrides (list[str]): after the experiment's.
        evaluate (str | None): instead of the experiment's.
    """

    config: Text | None = None
    overrides: list[Text] | None = None
    evaluate: Text | None = None


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """Section ``tuning``: how the values of ``tune`` are chosen.

    Of a method's settings those are looked at whose task accuracy is within ``tolerance`` of the best of all methods (or,
    where none is, of its own best); of these the one with the smallest sum of ASR, broken answers and refused benign requests.

    Attributes:
        seed (int): of the tuning runs; must not be one of ``seeds``.
        case (str | None): in which they run; default: the first.
        poison (float | None): with which share; default: the largest.
        tolerance (float): percentage points of accuracy.
    """

    seed: Seed
    case: Text | None = None
    poison: Fraction | None = None
    tolerance: Annotated[Number, Field(ge=0, le=100)] = 2.0


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
    """The keys of an experiment's file.

    Attributes:
        output_dir (str): everything is below it. Experiments may share it, and then share runs of equal names.
        config (str): the recipe's config, a name or a path.
        methods (dict[str, MethodSettings]): by the name that the table shows.
        seeds (list[int]): each method is run with each; the table has means and standard deviations.
        evaluate (str): what ``pact evaluate`` is told, such as "--benchmarks sst2 strongreject".
        title (str): above the tables.
        vars (dict[str, Any] | None): names of the file's own, for ``${vars.NAME}`` in other keys.
        overrides (list[str]): of every run: key=value or ~key.
        cases (dict[str, CaseSettings] | None): data sets or models.
        poison (list[float] | None): values of dataset.mix.fraction.
        stages (list[StageSettings]): what is made first.
        tuning (TuningSettings | None): needed where a method has ``tune``.
        processes (int): of each run; more than one: FSDP.
    """

    output_dir: PathText
    config: Text
    methods: Named
    seeds: Annotated[list[Seed], Field(min_length=1)]
    evaluate: Text
    title: Text = "Experiment"
    vars: Vars | None = None
    overrides: list[Text] | None = None
    cases: Named | None = None
    poison: Annotated[list[Fraction], Field(min_length=1)] | None = None
    stages: list[StageSettings] | None = None
    tuning: TuningSettings | None = None
    processes: Count = 1


# The plan ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A command and what it leaves.

    Attributes:
        words (tuple[str, ...]): the command.
        makes (tuple[Path, ...]): it is done when all of these are there ...
        words_in (Path | None): ... and when this file says that the same command has made them; None: whoever did.
    """

    words: tuple[str, ...]
    makes: tuple[Path, ...]
    words_in: Path | None = None

    @property
    def done(self) -> bool:
        same = self.words_in is None or self.words_in.exists() and self.words_in.read_text() == shlex.join(self.words)
        return same and all(path.exists() for path in self.makes)

    def note(self) -> None:
        """Writes beside what was made which command has made it."""
        if self.words_in is not None:
            with atomic_file(self.words_in) as file:
                file.write_text(shlex.join(self.words))


@dataclass(frozen=True)
class Case:
    """A case at one poison share: what one table is about.

    Attributes:
        title (str): of the table; empty where the experiment has one case and no poison.
        place (str): its folder below those of runs and tables; "." where there is one.
        config (str): the recipe's config.
        overrides (tuple[str, ...]): of its runs, the poison share's included.
        evaluate (tuple[str, ...]): words for ``pact evaluate``.
        initial (Path): where the aligned model is evaluated; the same at every poison share.
    """

    title: str
    place: str
    config: str
    overrides: tuple[str, ...]
    evaluate: tuple[str, ...]
    initial: Path


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    overlays: tuple[str, ...]
    overrides: tuple[str, ...]
    tune: Mapping[str, list[Any]]
    tuned_as: str  # the method whose choice it takes: its own name, but for rows of a sweep
    swept: tuple[str, Any] | None = None

    @property
    def folder(self) -> str:
        return slug(self.name)

    def settings(self) -> list[tuple[str, ...]]:
        """Every combination of the values to choose from, as overrides."""
        values = [[word(key, value) for value in choices] for key, choices in self.tune.items()]
        return list(itertools.product(*values))


@dataclass(frozen=True)
class Run:
    """One training and the evaluation of its last epoch.

    Attributes:
        name (str): "runs/CASE/METHOD/seed_0", its folder below the experiment's.
        folder (Path): that folder.
        settings (str): fingerprint of its whole config, but for seed and folder.
        train (tuple[str, ...]): words of a command, without what depends on an earlier try.
        evaluate (tuple[str, ...]): the same.
        result (Path): the last epoch's folder.
        evaluation (Path): the folder that holds summary.json.
        device (str): of the training.
        reads (Mapping[str, str]): files and folders of this machine that its config names: path -> key.
    """

    name: str
    folder: Path
    settings: str
    train: tuple[str, ...]
    evaluate: tuple[str, ...]
    result: Path
    evaluation: Path
    device: str
    reads: Mapping[str, str]


@dataclass(frozen=True)
class Experiment:
    """A checked file.

    Attributes:
        file (Path): where it was read.
        settings (dict[str, Any]): its keys, with defaults.
        stages (tuple[Stage, ...]): in order.
        cases (tuple[Case, ...]): one a table.
        methods (tuple[Method, ...]): one a row, those of sweeps included.
    """

    file: Path
    settings: dict[str, Any]
    stages: tuple[Stage, ...]
    cases: tuple[Case, ...]
    methods: tuple[Method, ...]

    @property
    def output(self) -> Path:
        return Path(self.settings["output_dir"])

    @functools.cached_property
    def device(self) -> str:
        """Of the first run, on this machine; decides how processes are made."""
        return device_here(self.runs_of(self.cases[0], self.methods[0], {})[0].device)

    @property
    def tables(self) -> Path:
        """Where this file's tables go; other files that share the runs have theirs beside it."""
        return self.output / "tables" / self.file.stem

    def runs_of(self, case: Case, method: Method, chosen: Mapping[str, Sequence[str]]) -> list[Run]:
        """The runs of one row of one table, a seed each.

        Args:
            case (Case): the table.
            method (Method): the row.
            chosen (Mapping[str, Sequence[str]]): overrides that tuning has found, by method.
        """
        tuned = chosen.get(method.tuned_as, ())
        swept = () if method.swept is None else (word(*method.swept),)
        places = ((seed, f"runs/{case.place}/{method.folder}/seed_{seed}") for seed in self.settings["seeds"])
        return [self._run(place, case, method, (*tuned, *swept), seed) for seed, place in places]

    def tuning_runs(self, method: Method) -> dict[tuple[str, ...], Run]:
        """Runs to choose a method's settings by: overrides -> run; empty where there is nothing to choose."""
        if not method.tune or method.swept is not None:
            return {}
        case, seed = self.tuning_case, self.settings["tuning"]["seed"]
        root = f"tuning/{case.place}/{method.folder}"
        return {
            words: self._run(f"{root}/{slug(','.join(words))}", case, method, words, seed)
            for words in method.settings()
        }

    @property
    def tuning_case(self) -> Case:
        tuning = self.settings["tuning"]
        names = list(self.settings["cases"] or {"": None})
        shares = self.settings["poison"] or [None]
        name = names[0] if tuning["case"] is None else tuning["case"]
        poison = tuning["poison"]
        if poison is None and shares != [None]:
            poison = max(shares)
        return _case(self.settings, name, poison)

    def initial_stage(self, case: Case) -> Stage:
        """The evaluation of the aligned model, which every run of a case is compared with."""
        aligned = self._aligned(compose(case.config, (), case.overrides))
        words = ("pact", "evaluate", "--aligned", aligned, "--output", str(case.initial), *case.evaluate)
        return Stage(words, (case.initial / INITIAL / "summary.json",), case.initial / "command.txt")

    def _aligned(self, cfg: DictConfig) -> str:
        if cfg.get("checkpoint_dir") is None:
            raise UserError(f"The config of '{self.file}' has no checkpoint_dir, the aligned model's folder: set it.")
        return str(cfg.checkpoint_dir)

    def _run(self, name: str, case: Case, method: Method, more: Sequence[str], seed: int) -> Run:
        name = str(Path(name))
        folder = self.output / name
        shared = ("save_adapter_weights_only=True", f"reference_cache.directory={self.output / 'reference_cache'}")
        overrides = (*shared, *case.overrides, *method.overrides, *more)
        try:
            cfg = _checked(case.config, method.overlays, overrides)
        except UserError as error:
            raise UserError(f"In '{self.file}', {name}: {error}") from error
        processes = self.settings["processes"]
        launcher = ("--nproc_per_node", str(processes)) if processes > 1 else ()
        overlays = [part for overlay in method.overlays for part in ("--method", overlay)]
        own = (f"seed={seed}", f"output_dir={folder}")
        result = folder / f"epoch_{cfg.epochs - 1}"
        model = result / "adapter" if cfg.save_adapter_weights_only else result
        return Run(
            name=name,
            folder=folder,
            settings=hashlib.blake2b(OmegaConf.to_yaml(cfg, resolve=True).encode(), digest_size=16).hexdigest(),
            train=("pact", "run", *launcher, RECIPE, "--config", case.config, *overlays, *overrides, *own),
            evaluate=(
                *("pact", "evaluate", f"{method.folder}={model}", "--aligned", self._aligned(cfg)),
                *("--initial", str(case.initial / INITIAL), "--output", str(folder / "evaluation"), *case.evaluate),
            ),
            result=result,
            evaluation=folder / "evaluation" / method.folder,
            device=cfg.device,
            reads=_reads(case.config, method.overlays, overrides),
        )

    def grid(self) -> Iterator[tuple[Case, Method]]:
        """All tables' rows."""
        return itertools.product(self.cases, self.methods)


# Reading -----------------------------------------------------------------------------------------------------------------


def read(name: str, seeds: list[int] | None = None) -> Experiment:
    """Reads and checks an experiment's file, and the config of every run.

    Args:
        name (str): a path, or the name of a shipped experiment.
        seeds (list[int] | None): in the place of the file's.

    Returns:
        Experiment: ready to be run.

    Raises:
        UserError: everything that is wrong with it.
    """
    register_resolvers()
    file = find(name)
    try:
        whole = _read_whole(file)
        values: Any = OmegaConf.to_container(whole, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]  # what follows names omegaconf's types
        raise UserError(
            f"In '{file}', {error.full_key} cannot be resolved ({reason}): correct it, or define what it names."
        ) from error
    for key in ("methods", "cases"):  # null takes away what the base names
        if isinstance(values.get(key), dict):
            values[key] = {name: item for name, item in values[key].items() if item is not None}
    if seeds is not None:
        values["seeds"] = seeds
    refuse(_problems(values) or _unused(file, whole))
    values = defaults(ExperimentSettings) | values
    if values["tuning"] is not None:
        values["tuning"] = defaults(TuningSettings) | values["tuning"]
    methods = tuple(method for name, item in values["methods"].items() for method in _methods(name, item))
    cases = tuple(_case(values, name, p) for name in values["cases"] or [""] for p in values["poison"] or [None])
    experiment = Experiment(file, values, tuple(map(_stage, values["stages"] or ())), cases, methods)
    _check_names(experiment)
    for case, method in experiment.grid():
        experiment.runs_of(case, method, {name: settings[0] for name, settings in _first_choices(methods)})
    for method in methods:
        experiment.tuning_runs(method)
    return experiment


def _read_whole(file: Path, over: tuple[Path, ...] = ()) -> DictConfig:
    """The keys of a file over those of the one that its key ``base`` names, which may have a base itself."""
    cfg = read_yaml(file)
    if "base" not in cfg:
        return cfg
    base = find(str(cfg.pop("base")), file.parent)
    if base in (file, *over):
        raise UserError(f"The experiment '{base}' lies over itself: correct the key 'base' in '{file}'.")
    return merged(_read_whole(base, (file, *over)), cfg)


def find(name: str, beside: Path = Path()) -> Path:
    """The file of an experiment: a path, also one seen from ``beside``, or the name of a shipped one."""
    for path in (beside / name, Path(name), EXPERIMENT_ROOT / f"{name.removesuffix('.yaml')}.yaml"):
        if path.is_file():
            return path
    raise unknown_name("experiment of `pact ls`, and no file either", name, experiment_names())


def _first_choices(methods: Sequence[Method]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    return ((method.name, method.settings()) for method in methods if method.tune)


def _problems(values: dict[str, Any]) -> list[str]:
    problems = check(ExperimentSettings, values)
    for key, section in (("methods", MethodSettings), ("cases", CaseSettings)):
        for name, item in (values.get(key) or {}).items() if isinstance(values.get(key), dict) else ():
            if not isinstance(item, dict):
                problems.append(f"{key}.{name} is {item!r}; it must be a section, such as {{method: sft}}.")
                continue
            problems += check(section, item, f"{key}.{name}")
    return problems or _contradictions(values)


def _unused(file: Path, whole: DictConfig) -> list[str]:
    """A name in a file's own ``vars`` that no key takes is a slip of one that some key does."""
    text = OmegaConf.to_yaml(whole)
    names = [str(name) for name in read_yaml(file).get("vars") or ()]
    return [
        f"vars.{name} is used nowhere: write ${{vars.{name}}} in another key, or remove it."
        for name in names
        if not re.search(rf"\bvars\.{re.escape(name)}\b", text)
    ]


def _contradictions(values: dict[str, Any]) -> list[str]:
    problems = []
    if len(set(values["seeds"])) < len(values["seeds"]):
        problems.append("'seeds' names one twice: give each once.")
    tuned = [name for name, item in values["methods"].items() if item.get("tune")]
    tuning = values.get("tuning")
    for name, item in values["methods"].items():
        for key in ("tune", "sweep"):
            problems += [
                f"methods.{name}.{key}.{k} has no values: give a list of some."
                for k, choices in (item.get(key) or {}).items()
                if not choices
            ]
    if tuned and tuning is None:
        problems.append(f"methods.{tuned[0]}.tune needs a section 'tuning' with a seed that is not reported.")
    if tuning is not None:
        if tuning["seed"] in values["seeds"]:
            problems.append(
                f"tuning.seed is {tuning['seed']}, which is one of 'seeds': what is chosen on a seed cannot be reported on it; "
                "take another."
            )
        case, cases = tuning.get("case"), values.get("cases") or {}
        if case is not None and case not in cases:
            problems.append(str(unknown_key(case, cases, "tuning.case")))
        poison, shares = tuning.get("poison"), values.get("poison") or []
        if poison is not None and poison not in shares:
            problems.append(f"tuning.poison is {poison}, which is none of 'poison' ({shares}): take one of them.")
    return problems


def _methods(name: str, item: dict[str, Any]) -> Iterator[Method]:
    """A row, and one more for each value of its sweeps."""
    overlays = item.get("method") or []
    overlays = tuple([overlays] if isinstance(overlays, str) else overlays)
    tune, overrides = item.get("tune") or {}, tuple(item.get("overrides") or ())
    yield Method(name, overlays, overrides, tune, name)
    for key, values in (item.get("sweep") or {}).items():
        for value in values:
            title = f"{name} {key.rpartition('.')[2]}={value}"
            yield Method(title, overlays, overrides, {}, name, (key, value))


@functools.cache
def _checked(config: str, overlays: tuple[str, ...], overrides: tuple[str, ...]) -> DictConfig:
    """A run's config but for its seed and its folder."""
    return complete(_composed(config, overlays, overrides))


@functools.cache
def _reads(config: str, overlays: tuple[str, ...], overrides: tuple[str, ...]) -> dict[str, str]:
    """See :attr:`Run.reads`; the same for all seeds."""
    values: Any = OmegaConf.to_container(_checked(config, overlays, overrides), resolve=True)
    return inputs.of_config(values)


@functools.cache
def _composed(config: str, overlays: tuple[str, ...], overrides: tuple[str, ...]) -> DictConfig:
    """Runs differ in their last overrides, so what they share is composed once."""
    if not overrides:
        return compose(config, overlays)
    return override(_composed(config, overlays, overrides[:-1]), overrides[-1])


def _case(settings: dict[str, Any], name: str, poison: float | None) -> Case:
    """A case at a poison share; "" is the only case, None the config's own share."""
    own = defaults(CaseSettings) | ((settings["cases"] or {}).get(name) or {})
    parts = [name] if name else []
    overrides = [*(settings["overrides"] or ()), *(own["overrides"] or ())]
    if poison is not None:
        parts.append(f"poison {poison:g}")
        overrides.append(f"dataset.mix.fraction={poison:g}")
    return Case(
        title=", ".join(parts),
        place="/".join(map(slug, parts)) or ".",
        config=own["config"] or settings["config"],
        overrides=tuple(overrides),
        evaluate=tuple(split(own["evaluate"] or settings["evaluate"], "evaluate")),
        initial=Path(settings["output_dir"], "initial", slug(name)),
    )


def _stage(item: dict[str, Any]) -> Stage:
    makes = [item["makes"]] if isinstance(item["makes"], str) else item["makes"]
    return Stage(tuple(split(item["run"], "stages.run")), tuple(map(Path, makes)))


def _check_names(experiment: Experiment) -> None:
    for what, found in (
        ("methods", [method.folder for method in experiment.methods]),
        ("cases", [case.place for case in experiment.cases]),
    ):
        twice = next((name for name in found if found.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"Two of the {what} of '{experiment.file}' have the folder '{twice}': name them apart.")
        if INITIAL in found:
            raise UserError(f"'{INITIAL}' is the aligned model itself: give that one of {what} another name.")


def split(text: str, key: str) -> list[str]:
    """Words of a command line.

    Raises:
        UserError: a quotation mark is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{key} cannot be split into words ({one_line(error)}): {text!r}.") from error


def word(key: str, value: Any) -> str:
    """An override of a key."""
    return f"{key}={'null' if value is None else value}"
