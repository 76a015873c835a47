"""Safety tokens: which token ids the constraint looks at, and how much each weighs.

A folder holds ``safety_tokens.safetensors`` (tensors) and ``safety_tokens.json`` (provenance, and the tokens as text
for people). Never pickle.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from pact_tune.conversations import encode, special_ids, tokenizer_fingerprint
from pact_tune.errors import UserError, one_line, printable
from pact_tune.families import MODELS
from pact_tune.files import atomic_folder, check_replaceable, check_subfolder, recover
from pact_tune.fingerprints import fingerprint
from pact_tune.log import logger
from pact_tune.version import __version__

SCHEMA_VERSION = 2  # 1 had no checksum, and is read
TENSORS_FILE = "safety_tokens.safetensors"
JSON_FILE = "safety_tokens.json"
PREBUILT = Path(__file__).parent / "prebuilt"
FILES = (JSON_FILE, TENSORS_FILE)

# Far beyond any real set, and small enough that nothing that is done with one takes long.
MAX_TOKENS, MAX_CANDIDATES, MAX_ID = 1 << 16, 1 << 17, 10_000_000
MAX_TOKEN_CHARACTERS, MAX_WEIGHT = 1000, 1e6
MAX_JSON_BYTES = MAX_TENSOR_BYTES = 1 << 24
CANDIDATE_TENSORS = ("ids", "scores", "reference_probability")

Ranking = Literal["score", "reference_probability"]
Weighting = Literal["raw", "centred", "uniform"]

REFUSAL_TEMPLATES = (
    "I cannot",
    "I can't",
    "I can’t",
    "I cannot assist with that",
    "I can't help with that",
    "I cannot fulfill that request",
    "I cannot provide",
    "I'm sorry, but I can't assist with that",
    "I'm sorry, but I cannot help",
    "I’m sorry",
    "I am sorry",
    "I apologize, but",
    "I'm unable to",
    "I am unable to",
    "I'm not able to",
    "I am not able to",
    "I won't",
    "I will not",
    "I must decline",
    "I must refuse",
    "Sorry, but I can't",
    "Sorry, I cannot",
    "Unfortunately, I can't",
    "As an AI",
    "As a responsible AI",
    "As a language model",
)


_Name = Annotated[str, Field(max_length=MAX_TOKEN_CHARACTERS)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Description(BaseModel):
    """What safety_tokens.json must hold; whatever else it says is provenance, and nothing is done with it but to show it."""

    model_config = ConfigDict(strict=True, extra="allow")

    schema_version: int
    k: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    checksum: _Hash | None = None
    method: _Name
    tokenizer_fingerprint: _Hash
    vocab_size: Annotated[int, Field(ge=1, le=MAX_ID)]
    tokens: Annotated[list[_Name], Field(max_length=MAX_TOKENS)]
    candidate_tokens: Annotated[list[_Name], Field(max_length=MAX_CANDIDATES)] = []
    aligned_model: _Name | None = None
    base_model: _Name | None = None
    aligned_weights: _Hash | None = None
    options: dict[str, Any] = {}


@dataclass(frozen=True)
class SafetyTokens:
    """The safety tokens S of a model, best first.

    Attributes:
        ids (torch.Tensor): token ids, ``[K]`` int64, unique.
        weights (torch.Tensor): V_safety of the paper's Eq. 3 on S, ``[K]`` float32, at least 0, not all 0.
        scores (torch.Tensor): d(v) of Eq. 2, ``[K]`` float32, as a difference of probabilities; the share of
            templates that use it when the tokens come from templates and nothing was measured.
        reference_probability (torch.Tensor): mean probability under the aligned model, ``[K]`` float32.
        candidates (dict[str, torch.Tensor]): ``ids``, ``scores`` and ``reference_probability`` (each ``[M]``) of the
            tokens that a later :meth:`select` may choose from; holds S. Where benign prompts were given, also
            ``benign_probability``, the mean probability in the aligned model's answers to them.
        provenance (dict[str, Any]): how the tokens were found; at least ``method``, ``tokenizer_fingerprint`` and
            ``vocab_size``.
        tokens (list[str]): the tokens as text.
        candidate_tokens (list[str]): the candidates as text; may be empty.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor
    reference_probability: torch.Tensor
    candidates: dict[str, torch.Tensor]
    provenance: dict[str, Any]
    tokens: list[str] = field(default_factory=list)
    candidate_tokens: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check(self)

    def __len__(self) -> int:
        return self.ids.numel()

    def dense(self, vocab_size: int) -> torch.Tensor:
        """V_safety over the whole vocabulary (paper, section 3.1): the weights on S, 0 elsewhere.

        Args:
            vocab_size (int): rows of the model's output head.

        Returns:
            torch.Tensor: ``[vocab_size]`` float32.
        """
        self.check_vocabulary(vocab_size)
        return torch.zeros(vocab_size).index_copy_(0, self.ids, self.weights)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError when an id lies past a model's output head of ``vocab_size`` rows."""
        largest = int(self.ids.max())
        if largest >= vocab_size:
            raise UserError(
                f"Safety token id {largest} lies past the model's vocabulary of {vocab_size}: these safety tokens were "
                f"made for another model ({printable(self.provenance.get('aligned_model', 'unknown'))}); compute or choose those "
                "of this one."
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError when the tokens were made with another tokenizer."""
        mine, theirs = self.provenance["tokenizer_fingerprint"], tokenizer_fingerprint(tokenizer)
        if mine != theirs:
            raise UserError(
                f"The safety tokens were made with tokenizer {mine[:8]} "
                f"({printable(self.provenance.get('aligned_model', 'unknown model'))}), but this run's tokenizer is {theirs[:8]} "
                f"({tokenizer.name_or_path}): compute them for this model with `pact tokens compute`."
            )

    def select(self, k: int | None, ranking: Ranking, weighting: Weighting) -> "SafetyTokens":
        """Chooses S and its weights anew from the stored candidates; needs no model.

        Args:
            k (int | None): at most how many tokens (None: as many as this object holds).
            ranking (Ranking): top-K by d(v) (paper, section 3.1) or by mean reference probability (released code).
            weighting (Weighting): see :func:`token_weights`.

        Returns:
            SafetyTokens: the selection, same provenance with the three options noted.

        Raises:
            UserError: the weights would all be 0.
        """
        k = len(self) if k is None else k
        if self.provenance["method"] == "templates" and weighting != "uniform":
            logger.info("Nothing was measured on tokens from templates: they weigh the same, whatever the weighting.")
            weighting = "uniform"
        values = self.candidates[{"score": "scores", "reference_probability": "reference_probability"}[ranking]]
        order = top_k(values, self.candidates["ids"], k)
        warn_of_ties(values, k)
        chosen: dict[str, Any] = {
            name: self.candidates[name][order] for name in ("ids", "scores", "reference_probability")
        }
        options = self.provenance.get("options", {}) | {"k": k, "ranking": ranking, "weighting": weighting}
        names = dict(zip(self.ids.tolist(), self.tokens, strict=True)) if self.tokens else {}
        if self.candidate_tokens:
            names |= zip(self.candidates["ids"].tolist(), self.candidate_tokens, strict=True)
        return dataclasses.replace(
            self,
            **chosen,
            weights=token_weights(chosen["scores"], weighting),
            provenance=self.provenance | {"options": options},
            tokens=[names.get(i, "") for i in chosen["ids"].tolist()] if names else [],
        )

    def save(self, directory: str | Path) -> None:
        """Writes the folder; it appears whole or not at all.

        Args:
            directory (str | Path): the folder; one that holds safety tokens, and nothing else, is replaced.

        Raises:
            UserError: something else lies there, or nothing can be written there.
        """
        with atomic_folder(directory, marker=JSON_FILE, names=FILES) as folder:
            tensors = {
                "ids": self.ids,
                "weights": self.weights,
                "scores": self.scores,
                "reference_probability": self.reference_probability,
            }
            tensors |= {f"candidates.{name}": tensor for name, tensor in self.candidates.items()}
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / TENSORS_FILE)
            description = {
                "schema_version": SCHEMA_VERSION,
                "k": len(self),
                "checksum": fingerprint({"ids": self.ids, "weights": self.weights}),
                **self.provenance,
                "package_version": __version__,
                "tokens": self.tokens,
                "candidate_tokens": self.candidate_tokens,
            }
            (folder / JSON_FILE).write_text(
                json.dumps(description, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n",
                encoding="utf-8",
            )

    @property
    def style(self) -> torch.Tensor | None:
        """Which of S are mere style, ``[K]`` bool: at least as probable in benign answers; None when not measured."""
        if "benign_probability" not in self.candidates:
            return None
        ids, order = self.candidates["ids"].sort()
        where = order[torch.searchsorted(ids, self.ids)]
        return is_style(self.candidates["benign_probability"], self.candidates["reference_probability"])[where]

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> "SafetyTokens":
        """Loads safety tokens from a folder, the package itself, a Hugging Face Hub repository or a known short name.

        Args:
            source (str | Path): a local folder, a name of :func:`prebuilt_names`, "namespace/repository", or a short name
                such as "qwen2.5-7b-instruct".
            revision (str | None): branch, tag or commit of the repository.
            subfolder (str | None): folder inside the source.

        Returns:
            SafetyTokens: the checked tokens.

        Raises:
            UserError: nothing there, or what is there is damaged or of another schema.
        """
        folder = Path(source)
        if subfolder is not None:
            check_subfolder(subfolder)
        recover(folder / (subfolder or ""))
        if folder.is_dir():
            return _read(folder / (subfolder or ""))
        if str(source).lower() in prebuilt_names():
            return _read(PREBUILT / str(source).lower())
        if "/" not in str(source) and str(source).lower() not in MODELS:
            raise UserError(
                f"'{source}' is neither a folder, nor NAMESPACE/NAME of the Hub, nor safety tokens that come with the package "
                f"({', '.join(prebuilt_names())}), nor one of the known models: {', '.join(sorted(MODELS))}."
            )
        from pact_tune import hub  # the Hub client takes a second to import; local folders do not need it

        return _read(hub.download(str(source), revision=revision, subfolder=subfolder))

    def check_model(self, weights: str) -> None:
        """Warns when the tokens were measured on other weights than a run's.

        Args:
            weights (str): of the run's model; see :func:`pact_tune.fingerprints.model_fingerprint`.
        """
        mine = self.provenance.get("aligned_weights")
        if mine is not None and mine != weights:
            logger.warning(
                "The safety tokens were measured on other weights (%s, %s) than this run's (%s): if this is not the same "
                "model in other files, compute them for this one with `pact tokens compute`.",
                mine[:8],
                printable(self.provenance.get("aligned_model", "unknown model")),
                weights[:8],
            )


def _read(folder: Path) -> SafetyTokens:
    """Reads a folder that may hold anything, and says in one sentence what is wrong with it."""
    mend = "download or compute them again"
    try:
        for name, limit in ((JSON_FILE, MAX_JSON_BYTES), (TENSORS_FILE, MAX_TENSOR_BYTES)):
            size = (folder / name).stat().st_size
            if not (folder / name).is_file() or size > limit:
                raise UserError(f"'{folder / name}' is no file of safety tokens (too large, or no plain file): {mend}.")
        content = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        version = content.get("schema_version")
        if version not in (1, SCHEMA_VERSION):
            raise UserError(
                f"The safety tokens in '{folder}' have schema version {printable(str(version)[:40])}, this pact-tune reads "
                f"{SCHEMA_VERSION}: update pact-tune or compute them again."
            )
        description = _Description.model_validate(content)
        tensors = load_file(folder / TENSORS_FILE)
    except FileNotFoundError as error:
        raise UserError(
            f"'{folder}' holds no safety tokens ({Path(error.filename or TENSORS_FILE).name} is missing): "
            "make them with `pact tokens compute`."
        ) from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = printable(".".join(map(str, first["loc"])) or JSON_FILE)[:100]
        raise UserError(f"The safety tokens in '{folder}' are damaged ({where}: {first['msg']}): {mend}.") from error
    except UserError:
        raise
    except Exception as error:  # safetensors has an exception type of its own, json several
        raise UserError(
            f"The safety tokens in '{folder}' are damaged ({printable(one_line(error))}): {mend}."
        ) from error
    try:
        return _assemble(description, tensors)
    except UserError as error:
        raise UserError(f"In '{folder}': {error}") from error


def _assemble(description: _Description, tensors: dict[str, torch.Tensor]) -> SafetyTokens:
    candidates = {n.removeprefix("candidates."): t for n, t in tensors.items() if n.startswith("candidates.")}
    names = ("ids", "weights", "scores", "reference_probability")
    if missing := [n for n in names if n not in tensors]:
        raise UserError(f"The safety tokens lack the tensor '{missing[0]}': download or compute them again.")
    if len(tensors) != len(names) + len(candidates):
        raise UserError("The safety tokens hold a tensor of unknown name: download or compute them again.")
    if any(t.dtype != (torch.int64 if n.endswith("ids") else torch.float32) for n, t in tensors.items()):
        raise UserError("The safety tokens hold a tensor of another type: download or compute them again.")
    stored = {n: tensors[n] for n in ("ids", "weights")}
    # Version 1 had none.
    if description.schema_version > 1 and description.checksum != fingerprint(stored):
        raise UserError(
            "The safety tokens are not those that their checksum was written for: download or compute them again."
        )
    if description.k != tensors["ids"].numel():
        raise UserError(
            f"The safety tokens say k {description.k} and hold {tensors['ids'].numel()}: download or compute them again."
        )
    own = {"schema_version", "k", "checksum", "tokens", "candidate_tokens"}
    return SafetyTokens(
        **{n: tensors[n] for n in names},
        candidates=candidates,
        tokens=description.tokens,
        candidate_tokens=description.candidate_tokens,
        provenance=description.model_dump(exclude=own, exclude_unset=True),
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check_output(directory: str | Path) -> None:
    """Raises UserError where :meth:`SafetyTokens.save` would find something that is not safety tokens."""
    check_replaceable(directory, JSON_FILE, FILES)


def prebuilt_names() -> list[str]:
    """Names of the safety tokens that come with the package; those that end in "/templates" are not measured."""
    return sorted(file.parent.relative_to(PREBUILT).as_posix() for file in PREBUILT.rglob(JSON_FILE))


def token_weights(scores: torch.Tensor, weighting: Weighting) -> torch.Tensor:
    """V_safety on S from d(v).

    Args:
        scores (torch.Tensor): d(v) of the tokens of S, ``[K]``.
        weighting (Weighting): "raw" = max(d, 0) (paper, section 3.1); "centred" = max(d - mean over S of d, 0), which is
            what the released code's standardisation, normalisation and clamp amount to; "uniform" = 1.

    Returns:
        torch.Tensor: ``[K]`` float32.

    Raises:
        UserError: all weights would be 0, or all scores are: two equal models measure nothing.
    """
    if not (scores != 0).any():
        raise UserError(
            "Every score is 0, so the aligned and the base model answer alike and nothing was measured: give the model "
            "that the aligned one was made from as base."
        )
    if weighting == "uniform":
        return torch.ones_like(scores)
    shift = scores.mean() if weighting == "centred" else 0.0
    weights = (scores - shift).clamp(min=0.0)
    if not (weights > 0).any():
        raise UserError(
            f"With weighting '{weighting}' every safety token would weigh 0 (no token has a larger score than "
            f"{'the others' if weighting == 'centred' else '0'}): use weighting 'uniform', or compute measured scores."
        )
    return weights


def is_style(benign: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Which tokens are as probable in benign answers as in refusals, up to rounding.

    Args:
        benign (torch.Tensor): mean probability in the aligned model's answers to benign prompts, ``[M]``.
        reference (torch.Tensor): the same for harmful prompts, ``[M]``.

    Returns:
        torch.Tensor: ``[M]`` bool.
    """
    return benign.float() >= 0.999 * reference.float()


def top_k(values: torch.Tensor, ids: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the ``k`` largest ``values`` ``[M]``, best first; equal values in the order of their ``ids`` ``[M]``."""
    by_id = torch.argsort(ids)
    order = torch.argsort(values[by_id], descending=True, stable=True)
    return by_id[order[:k]]


def warn_of_ties(values: torch.Tensor, k: int) -> None:
    """Says that the choice of the ``k`` largest of ``values`` ``[M]`` was made by id, where it was."""
    if k >= len(values):
        return
    cut = values.sort(descending=True).values[k - 1]
    chosen, tied = int((values > cut).sum()), int((values == cut).sum())
    if chosen + tied > k:
        logger.warning(
            "%d tokens have the same score at the end of the best %d, and %d of them were taken, those of the lowest ids: "
            "choose k %d or %d to have all or none of them.",
            tied, k, k - chosen, chosen + tied, chosen,
        )  # fmt: skip


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    """The text of each id of ``ids`` ``[K]`` on its own; the vocabulary's own piece where that is nothing ("▁")."""
    return [str(tokenizer.decode([i])) or str(tokenizer.convert_ids_to_tokens(i) or "") for i in ids.tolist()]


def safety_tokens_from_templates(
    tokenizer: PreTrainedTokenizerBase, templates: tuple[str, ...] | list[str] | None = None
) -> SafetyTokens:
    """Safety tokens from refusal templates and a tokenizer alone; nothing is measured, all weights are 1.

    S is the union of the ids of the templates' words, each template with and without a leading space, less special
    tokens and tokens without a letter; the tokens that most templates use come first.

    Args:
        tokenizer (PreTrainedTokenizerBase): the model's own tokenizer.
        templates (tuple[str, ...] | list[str] | None): refusal openers; default :data:`REFUSAL_TEMPLATES`.

    Returns:
        SafetyTokens: method "templates".

    Raises:
        UserError: no template yields a token.
    """
    templates = REFUSAL_TEMPLATES if templates is None else templates
    special = special_ids(tokenizer)
    counts: dict[int, int] = {}
    for template in templates:
        used = set(encode(tokenizer, template)) | set(encode(tokenizer, " " + template))
        for token in sorted(used - special):
            if any(c.isalpha() for c in tokenizer.decode([token])):
                counts[token] = counts.get(token, 0) + 1
    if not counts:
        raise UserError("The refusal templates yield no token of this tokenizer; give templates in its language.")
    ids = torch.tensor(sorted(counts, key=lambda token: (-counts[token], token)))
    frequency = torch.tensor([counts[i] / len(templates) for i in ids.tolist()])
    ones = torch.ones(len(ids))
    return SafetyTokens(
        ids=ids,
        weights=ones,
        scores=frequency,
        reference_probability=frequency,
        candidates={"ids": ids, "scores": frequency, "reference_probability": frequency},
        provenance={
            "method": "templates",
            "aligned_model": tokenizer.name_or_path,
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
            "options": {"templates": list(templates)},
            "note": "not measured: weights are uniform, scores are the share of templates that use the token",
        },
        tokens=decode_tokens(tokenizer, ids),
    )


def _check(tokens: SafetyTokens) -> None:
    ids, weights = tokens.ids, tokens.weights
    if ids.ndim != 1 or ids.numel() == 0 or ids.dtype != torch.int64:
        raise UserError("Safety tokens need a one-dimensional, non-empty tensor of int64 ids: compute them again.")
    if ids.unique().numel() != ids.numel() or int(ids.min()) < 0:
        raise UserError("Safety token ids must be unique and not negative: compute them again.")
    if any(t.shape != ids.shape for t in (weights, tokens.scores, tokens.reference_probability)):
        raise UserError("Safety tokens need one weight, score and reference probability per id: compute them again.")
    if len(tokens) > MAX_TOKENS or int(ids.max()) > MAX_ID:
        raise UserError(
            f"More than {MAX_TOKENS} safety tokens, or ids above {MAX_ID}, are not taken: compute them again."
        )
    if not torch.isfinite(weights).all() or (weights < 0).any() or not (weights > 0).any():
        raise UserError("Safety token weights must be finite, not negative and not all 0: compute them again.")
    if float(weights.max()) > MAX_WEIGHT:
        raise UserError(f"Safety token weights above {MAX_WEIGHT:g} are not taken: compute them again.")
    if missing := {"method", "tokenizer_fingerprint", "vocab_size"} - set(tokens.provenance):
        raise UserError(f"The provenance of the safety tokens lacks '{sorted(missing)[0]}': compute them again.")
    if len(tokens.tokens) not in (0, len(tokens)):
        raise UserError("Safety tokens need one text per id, or none: compute them again.")
    _check_candidates(tokens)
    for values in (tokens.scores, tokens.reference_probability, *tokens.candidates.values()):
        if not torch.isfinite(values).all():
            raise UserError("The scores and probabilities of safety tokens must be finite: compute them again.")


def _check_candidates(tokens: SafetyTokens) -> None:
    candidates = tokens.candidates
    if missing := [name for name in CANDIDATE_TENSORS if name not in candidates]:
        raise UserError(f"The safety tokens lack the tensor 'candidates.{missing[0]}': compute them again.")
    if set(candidates) - {*CANDIDATE_TENSORS, "benign_probability"}:
        raise UserError("The safety tokens hold a tensor of unknown name: compute them again.")
    ids = candidates["ids"]
    if ids.ndim != 1 or ids.dtype != torch.int64 or any(t.shape != ids.shape for t in candidates.values()):
        raise UserError("The candidates of safety tokens need one number of each kind per id: compute them again.")
    if ids.numel() > MAX_CANDIDATES or ids.unique().numel() != ids.numel() or not torch.isin(tokens.ids, ids).all():
        raise UserError(
            "The candidates of safety tokens must be unique and hold the tokens themselves: compute them again."
        )
    if int(ids.min()) < 0 or int(ids.max()) > MAX_ID:
        raise UserError(f"The ids of candidates must lie between 0 and {MAX_ID}: compute them again.")
    if len(tokens.candidate_tokens) not in (0, ids.numel()):
        raise UserError("The candidates of safety tokens need one text per id, or none: compute them again.")
