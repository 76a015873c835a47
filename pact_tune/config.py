"""What a setting may be, stated once: types and bounds of every key, and one sentence for each value that is not right.

A section of a config is checked against the *signature* of what takes it: a function, a class, or a dataclass that lists
the keys. Whoever adds a key writes its type and its bounds where the key is defined, and nowhere else:

    def builder(context, lambda_kl: Weight = 3.0, k: Count | None = None): ...

The recipe's sections, an objective's settings in any trainer, and the recipe's own keys (:class:`RecipeSettings`) all go
through :func:`check`. Values are taken as JSON is: "abc" is not true, 3.0 is not a whole number, and nothing is infinite.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import re
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticUserError,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from pydantic.errors import PydanticUndefinedAnnotation
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from pact_tune.errors import UserError, unknown_key

STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
SHOWN = 60  # characters of a value that a message repeats


def _number_of_text(value: Any) -> Any:
    """YAML readers other than OmegaConf's take 1e-3 for text."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _path(value: str) -> str:
    if "\0" in value or any(len(part.encode()) > 255 for part in Path(value).parts):
        raise ValueError("no file system has such a name")
    return value


# The types that keys are annotated with. Both ends are bounded: a number that no run can mean is a slip of the keyboard.
Number = Annotated[float, BeforeValidator(_number_of_text)]
Positive = Annotated[Number, Field(gt=0, le=1e9)]
Weight = Annotated[Number, Field(ge=0, le=1e6)]  # of a term of the loss
Fraction = Annotated[Number, Field(ge=0, le=1)]
Dropout = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=100_000_000)]
Natural = Annotated[int, Field(ge=0, le=100_000_000)]
Size = Annotated[int, Field(ge=1, le=10_000_000)]  # of a network
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=10_000)]
PathText = Annotated[
    str,
    StringConstraints(min_length=1, max_length=4_000),
    AfterValidator(_path),
    Field(description="the path of a file or folder"),
]
Section = Annotated[dict[str, Any], Field(description="a section with a _component_ that says what to build")]


@dataclass(frozen=True)
class Fields:
    """Says what a function's ``**settings`` are: ``**settings: Annotated[Any, Fields(PACTConfig)]``.

    Attributes:
        of (type): a dataclass, whose fields they are.
        make (Callable | None): called with those of the keys that it takes, raises UserError where they contradict each
            other; None where the fields can be anything together.
    """

    of: type
    make: Callable[..., Any] | None = None


@dataclass(frozen=True, kw_only=True)
class MixSettings:
    """Section ``mix`` of a dataset, or an item of a list of them, or section ``anchors``; see :func:`pact_tune.chat_dataset`."""

    source: Text | list[Text]
    fraction: Annotated[Number, Field(ge=0, lt=1)]
    name: Text | None = None
    split: Text | None = None
    columns: dict[str, Any] | None = None
    ce_weight: Weight = 1.0
    constraint_weight: Weight = 1.0


@dataclass(frozen=True, kw_only=True)
class AlignmentSettings:
    """Section ``alignment`` of a method that trains on alignment data, too; see :func:`pact_tune.chat_dataset`."""

    source: Text | list[Text]
    name: Text | None = None
    split: Text | None = None
    columns: dict[str, Any] | None = None
    system: Text | None = None
    n: Count | None = None
    max_seq_len: Count | None = None
    seed: Seed = 0


# Parameters by the names that libraries (torch.optim, torchtune) give them, with a type at best, and never a range.
LIBRARY: dict[str, Any] = {
    "lr": Annotated[
        Number,
        Field(
            gt=0,
            le=1,
            description="a number above 0 and at most 1 (fine-tuning takes 1e-5 to 1e-2; a larger one diverges)",
        ),
    ],  # fmt: skip
    "weight_decay": Annotated[Number, Field(ge=0, le=10)],
    "momentum": Dropout,
    "betas": tuple[Dropout, Dropout],
    "eps": Fraction,
    "num_warmup_steps": Natural,
    "num_cycles": Positive,
    "lora_rank": Annotated[int, Field(ge=1, le=65_536)],
    "lora_alpha": Positive,
    "lora_dropout": Dropout,
    "attn_dropout": Dropout,
    "vocab_size": Size,
    "num_layers": Annotated[int, Field(ge=1, le=1_000)],
    "num_heads": Size,
    "num_kv_heads": Size,
    "head_dim": Size,
    "embed_dim": Size,
    "intermediate_dim": Size,
    "max_seq_len": Size,
    "norm_eps": Annotated[Number, Field(gt=0, le=1)],
    "rope_base": Positive,
    "scale_factor": Positive,
    "n": Count,
    "seed": Seed,
    "mix": MixSettings | list[MixSettings],
    "anchors": MixSettings,
    "log_dir": PathText,
    "filename": PathText,
}


@dataclass(frozen=True, kw_only=True)
class ReferenceCacheSettings:
    """Section ``reference_cache``; see :class:`pact_tune.ReferenceCache`."""

    directory: PathText | None = None
    dtype: Literal["float16", "float32"] = "float16"
    max_gb: Positive | None = None
    lazy: bool = False


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """Section ``analysis``: records for the paper's figures, in ``output_dir/analysis.jsonl``.

    Attributes:
        source (str): held-out harmful prompts with the aligned model's answers, as rows of a data set.
        safety_tokens (str): folder, Hub repository or known name of the tokens to watch, also where the loss has none.
        rows (int): rows of each source of the training data whose loss is recorded.
    """

    source: PathText
    safety_tokens: Text
    rows: Count = 32


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """The recipe's own keys. Sections are checked against what their ``_component_`` names."""

    output_dir: PathText
    tokenizer: Section
    model: Section
    checkpointer: Section | None = None  # of torchtune's models; pact_tune.hf.causal_lm reads and writes its own
    dataset: Section
    loss: Section
    optimizer: Section
    metric_logger: Section
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)]
    epochs: Annotated[int, Field(ge=1, le=10_000)]
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|mps|(cuda|xpu|npu)(:\d{1,3})?)$"), Field(description="cpu, cuda, xpu, npu, mps, or auto (a CUDA GPU where there is one)")]  # fmt: skip
    dtype: Literal["bf16", "fp32"]
    adapter_dtype: Literal["fp32", "bf16"] = "fp32"  # of LoRA's own weights; bf16 as in the released code
    checkpoint_dir: PathText | None = None  # read by other keys as ${checkpoint_dir}, not by the recipe
    base_dir: PathText | None = None  # the base model of the aligned one; methods read it as ${base_dir}
    resume_from_checkpoint: bool = False
    overwrite: bool = False  # delete the results of another run in output_dir
    seed: Seed = 0
    shuffle: bool = True
    batch_by_length: bool = True
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    max_steps_per_epoch: Count | None = None
    clip_grad_norm: Positive | None = None
    lr_scheduler: Section | None = None
    validation_dataset: Section | None = None  # like dataset; its loss is logged after each epoch
    reference_cache: ReferenceCacheSettings | None = ReferenceCacheSettings()
    analysis: AnalysisSettings | None = None
    packed: bool = False
    enable_activation_checkpointing: bool = False
    compile: bool = False
    fsdp_reshard_after_forward: bool = True
    log_every_n_steps: Count = 1
    log_peak_memory_stats: bool = False
    save_every_n_steps: Count | None = None
    save_adapter_weights_only: bool = False


class Parameter(NamedTuple):
    """One key that something takes."""

    annotation: Any
    required: bool


class Signature(NamedTuple):
    """The keys that something takes, and whether it takes others beside them."""

    keys: dict[str, Parameter]
    others: bool


def signature_of(component: Callable[..., Any]) -> Signature:
    """The keys that something takes, with their types.

    Args:
        component (Callable): a function, a class or a dataclass.

    Returns:
        Signature: by name.
    """
    try:
        signature = inspect.signature(component)
    except (TypeError, ValueError):  # written in C
        return Signature({}, True)
    hints = _hints(component)
    keys: dict[str, Parameter] = {}
    others = False
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        annotation = hints.get(name, Any)
        if parameter.kind is parameter.VAR_KEYWORD:
            fields = _fields(annotation)
            if fields is None:
                others = True
            else:
                keys |= signature_of(fields.of).keys
            continue
        if name in LIBRARY and not hasattr(annotation, "__metadata__"):
            annotation = _bounded(annotation, LIBRARY[name])
        keys[name] = Parameter(annotation, parameter.default is parameter.empty)
    return Signature(keys, others)


def _fields(annotation: Any) -> Fields | None:
    marks = (mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Fields))
    return next(marks, None)


def _hints(component: Callable[..., Any]) -> dict[str, Any]:
    function = component.__init__ if inspect.isclass(component) else component
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # annotations for type checkers alone
        return {}


def _bounded(annotation: Any, bounds: Any) -> Any:
    """The bounds of a known name, with null where the library takes it."""
    if (typing.get_origin(annotation) is tuple) != (typing.get_origin(bounds) is tuple):
        return annotation  # one name for two things: eps of Adafactor is a pair
    return bounds | None if type(None) in typing.get_args(annotation) else bounds


def check(
    component: Callable[..., Any], values: Mapping[str, Any], where: str = "", given: Iterable[str] = ()
) -> list[str]:
    """Everything that is wrong with a section.

    Args:
        component (Callable): what takes its keys; see :func:`signature_of`.
        values (Mapping[str, Any]): the keys, as YAML or JSON would hold them.
        where (str): the section's name in the config; "" at the top.
        given (Iterable[str]): parameters that do not come from the section.

    Returns:
        list[str]: a sentence each, which names the key and what it must be; empty when all is right.
    """
    signature = signature_of(component)
    known = {name: parameter for name, parameter in signature.keys.items() if name not in given}
    place = f"section '{where}'" if where else "the config"
    problems = [
        str(unknown_key(str(key), known, place))
        for key in values
        if key not in signature.keys and (not signature.others or _nearest(key, list(known)))  # a slip, if it is near
    ]
    for name, parameter in known.items():
        key = f"{where}.{name}" if where else name
        if name not in values:
            if parameter.required:
                problems.append(
                    f"{place[0].upper()}{place[1:]} lacks the key '{name}': it must be {describe(parameter.annotation)}."
                )
            continue
        value, nested = values[name], _section_in(parameter.annotation)
        if nested is not None and isinstance(value, dict):
            problems += check(nested, value, key)
            continue
        if nested is not None and isinstance(value, list) and all(isinstance(item, dict) for item in value):
            problems += [problem for i, item in enumerate(value) for problem in check(nested, item, f"{key}[{i}]")]
            continue
        try:
            convert(parameter.annotation, value)
        except ValidationError:
            problems.append(refusal(key, values[name], parameter.annotation))
    return problems or _contradictions(component, values)


def _section_in(annotation: Any) -> type | None:
    """The dataclass that a section below a section is, or a list of them holds; None where there is none."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return annotation
    found = (_section_in(argument) for argument in typing.get_args(annotation))
    return next((section for section in found if section is not None), None)


def _contradictions(component: Callable[..., Any], values: Mapping[str, Any]) -> list[str]:
    """What is wrong with keys that are right one by one, as far as ``**settings`` tell (:class:`Fields`)."""
    hints = _hints(component)
    for make in (fields.make for hint in hints.values() if (fields := _fields(hint)) and fields.make):
        taken = signature_of(make).keys
        try:
            make(**{key: value for key, value in values.items() if key in taken})
        except UserError as error:
            return [str(error)]
    return []


def settings(
    component: Callable[..., Any], values: Mapping[str, Any], where: str = "", given: Iterable[str] = ()
) -> dict[str, Any]:
    """The keys of a section, checked.

    Args:
        component (Callable): what takes them; see :func:`signature_of`.
        values (Mapping[str, Any]): the keys.
        where (str): the section's name.
        given (Iterable[str]): parameters that do not come from the section.

    Returns:
        dict[str, Any]: the same, numbers that were written as text being numbers.

    Raises:
        UserError: all that is wrong, see :func:`check`.
    """
    refuse(check(component, values, where, given))
    known = signature_of(component).keys
    return {key: _plain(known[key].annotation, value) if key in known else value for key, value in values.items()}


def _plain(annotation: Any, value: Any) -> Any:
    converted = convert(annotation, value)
    return converted if isinstance(value, str) and isinstance(converted, float) else value


def refuse(problems: Iterable[str]) -> None:
    """Raises one UserError with all problems, if there are any."""
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} things are wrong in the config:" + "".join(f"\n  - {p}" for p in problems))


def convert(annotation: Any, value: Any) -> Any:
    """A value as its type; raises pydantic's ValidationError when it is not of that type."""
    return _adapter(annotation).validate_json(json.dumps(value, default=str))


def refusal(key: str, value: Any, annotation: Any) -> str:
    """The sentence for a value that its type does not allow.

    Args:
        key (str): where it stands, as on the command line ("optimizer.lr").
        value (Any): what was given.
        annotation (Any): what it must be.

    Returns:
        str: names key, value and mend, and the nearest choice where there are choices.
    """
    near = _nearest(value, _choices(_schema(annotation)))
    return f"{key} is {_shown(value)}; it must be {describe(annotation)}" + (
        f" (did you mean '{near}'?)." if near else "."
    )


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _nearest(value: Any, choices: list[str]) -> str | None:
    for word in value if isinstance(value, list) else [value]:
        if word not in choices and (near := difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)):
            return near[0]
    return None


@functools.cache
def _cached_adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation, config=STRICT)
    except PydanticUserError as error:
        if error.code == "type-adapter-config-unused":  # a TypedDict or dataclass brings its own
            return TypeAdapter(annotation)
        return TypeAdapter(Any)  # a type that nothing in a config can be, such as a torch.dtype
    except (PydanticUndefinedAnnotation, TypeError):
        return TypeAdapter(Any)


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        hash(annotation)
    except TypeError:
        return _cached_adapter.__wrapped__(annotation)
    return _cached_adapter(annotation)


class _Schema(GenerateJsonSchema):
    """Types that JSON cannot hold (a tensor) are left out of what a message offers."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {}


def _schema(annotation: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _adapter(annotation).json_schema(schema_generator=_Schema)


def describe(annotation: Any) -> str:
    """What a value must be, in words: "a whole number from 1 to 10000, or null"."""
    schema = _schema(annotation)
    return _words(schema, schema.get("$defs", {})) or "a value of another type"


def _words(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _words(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    if "description" in schema and "properties" not in schema:
        return schema["description"]
    if "anyOf" in schema:
        options = [words for option in schema["anyOf"] if (words := _words(option, definitions))]
        return ", or ".join(dict.fromkeys(options))
    if "enum" in schema:
        return "one of: " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return repr(schema["const"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(schema)
    if kind == "array":
        if "prefixItems" in schema:
            parts = dict.fromkeys(_words(item, definitions) for item in schema["prefixItems"])
            return f"a list of {len(schema['prefixItems'])}, each {' / '.join(parts)}"
        items = _words(schema.get("items", {}), definitions)
        return f"a list, each item {items}" if items else "a list"
    if kind == "object":
        names = ", ".join(schema.get("properties", {}))
        return f"a section with the keys {names}" if names else "a section of keys"
    return {"boolean": "True or False", "string": "text", "null": "null"}.get(kind or "", "")


def _range(schema: dict[str, Any]) -> str:
    # pydantic names the bounds of a type with a validator before it in its own words.
    low, above = schema.get("minimum", schema.get("ge")), schema.get("exclusiveMinimum", schema.get("gt"))
    high, below = schema.get("maximum", schema.get("le")), schema.get("exclusiveMaximum", schema.get("lt"))
    start = f"from {low:g}" if low is not None else f"above {above:g}" if above is not None else ""
    end = f"to {_end(high)}" if high is not None else f"and below {_end(below)}" if below is not None else ""
    if above is not None and high is not None:
        end = f"and at most {_end(high)}"
    return "".join(f" {words}" for words in (start, end) if words)


def _end(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _choices(schema: Any) -> list[str]:
    """All words that a schema offers anywhere in it."""
    if isinstance(schema, dict):
        own = [str(word) for word in schema.get("enum", [])]
        return own + [word for value in schema.values() for word in _choices(value)]
    if isinstance(schema, list):
        return [word for value in schema for word in _choices(value)]
    return []


def defaults(cls: type) -> dict[str, Any]:
    """The keys of a dataclass that may be left out, and what they then are."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            value = field.default
            found[field.name] = defaults(type(value)) if dataclasses.is_dataclass(value) else value
    return found
