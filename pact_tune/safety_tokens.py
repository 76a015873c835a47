"""Safety tokens: which token ids the constraint looks at, and how much each weighs.

A folder holds ``safety_tokens.safetensors`` (tensors) and ``safety_tokens.json`` (provenance, and the tokens as text
for people). Never pickle.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from pact_tune.conversations import encode, special_ids, tokenizer_fingerprint
from pact_tune.errors import UserError
from pact_tune.files import atomic_folder, check_replaceable
from pact_tune.version import __version__

SCHEMA_VERSION = 1
TENSORS_FILE = "safety_tokens.safetensors"
JSON_FILE = "safety_tokens.json"
FILES = (JSON_FILE, TENSORS_FILE)

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


@dataclass(frozen=True)
class SafetyTokens:
    """The safety tokens S of a model, best first.

    Attributes:
        ids (torch.Tensor): token ids, ``[K]`` int64, unique.
        weights (torch.Tensor): V_safety of the paper's Eq. 3 on S, ``[K]`` float32, at least 0, not all 0.
        scores (torch.Tensor): d(v) of Eq. 2, ``[K]`` float32, as a difference of probabilities; all 1 when the
            tokens come from templates and nothing was measured.
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
                f"made for another model ({self.provenance.get('aligned_model', 'unknown')}); compute or choose those "
                "of this one."
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError when the tokens were made with another tokenizer."""
        mine, theirs = self.provenance["tokenizer_fingerprint"], tokenizer_fingerprint(tokenizer)
        if mine != theirs:
            raise UserError(
                f"The safety tokens were made with tokenizer {mine[:8]} "
                f"({self.provenance.get('aligned_model', 'unknown model')}), but this run's tokenizer is {theirs[:8]} "
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
        values = {"score": "scores", "reference_probability": "reference_probability"}[ranking]
        order = top_k(self.candidates[values], self.candidates["ids"], k)
        chosen = {name: self.candidates[name][order] for name in ("ids", "scores", "reference_probability")}
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
                **self.provenance,
                "package_version": __version__,
                "tokens": self.tokens,
                "candidate_tokens": self.candidate_tokens,
            }
            (folder / JSON_FILE).write_text(
                json.dumps(description, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
            )

    @property
    def style(self) -> torch.Tensor | None:
        """Which of S are mere style, ``[K]`` bool: at least as probable in benign answers; None when not measured."""
        if "benign_probability" not in self.candidates:
            return None
        where = (self.candidates["ids"][None] == self.ids[:, None]).int().argmax(1)
        return is_style(self.candidates["benign_probability"], self.candidates["reference_probability"])[where]

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> "SafetyTokens":
        """Loads safety tokens from a folder, a Hugging Face Hub repository or a known short name.

        Args:
            source (str | Path): a local folder, "namespace/repository", or a short name such as
                "qwen2.5-7b-instruct".
            revision (str | None): branch, tag or commit of the repository.
            subfolder (str | None): folder inside the source.

        Returns:
            SafetyTokens: the checked tokens.

        Raises:
            UserError: nothing there, or what is there is damaged or of another schema.
        """
        folder = Path(source)
        if not folder.is_dir():
            from pact_tune import hub  # the Hub client takes a second to import; local folders do not need it

            return cls.load(hub.download(str(source), revision=revision, subfolder=subfolder))
        if subfolder:
            folder = folder / subfolder
        try:
            description = json.loads((folder / JSON_FILE).read_text())
            tensors = load_file(folder / TENSORS_FILE)
        except FileNotFoundError as error:
            raise UserError(
                f"'{folder}' holds no safety tokens ({Path(error.filename or TENSORS_FILE).name} is missing): "
                "make them with `pact tokens compute`."
            ) from error
        except Exception as error:  # safetensors has an exception type of its own, json another
            raise UserError(
                f"The safety tokens in '{folder}' are damaged ({error}): download or compute them again."
            ) from error
        version = description.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise UserError(
                f"The safety tokens in '{folder}' have schema version {version}, this pact-tune reads {SCHEMA_VERSION}: "
                "update pact-tune or compute them again."
            )
        description.pop("k")
        names = ("ids", "weights", "scores", "reference_probability")
        candidates = {n.removeprefix("candidates."): t for n, t in tensors.items() if n.startswith("candidates.")}
        if missing := [n for n in names if n not in tensors] + [
            n for n in names if n not in candidates and n != "weights"
        ]:
            raise UserError(
                f"The safety tokens in '{folder}' lack the tensor '{missing[0]}': download or compute them again."
            )
        return cls(
            **{n: tensors[n] for n in names},
            candidates=candidates,
            tokens=description.pop("tokens"),
            candidate_tokens=description.pop("candidate_tokens", []),
            provenance=description,
        )


def check_output(directory: str | Path) -> None:
    """Raises UserError where :meth:`SafetyTokens.save` would find something that is not safety tokens."""
    check_replaceable(directory, JSON_FILE, FILES)


def token_weights(scores: torch.Tensor, weighting: Weighting) -> torch.Tensor:
    """V_safety on S from d(v).

    Args:
        scores (torch.Tensor): d(v) of the tokens of S, ``[K]``.
        weighting (Weighting): "raw" = max(d, 0) (paper, section 3.1); "centred" = max(d - mean over S of d, 0), which is
            what the released code's standardisation, normalisation and clamp amount to; "uniform" = 1.

    Returns:
        torch.Tensor: ``[K]`` float32.

    Raises:
        UserError: all weights would be 0.
    """
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


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    """The text of each id of ``ids`` ``[K]`` on its own; a leading space is kept."""
    return [tokenizer.decode([i]) for i in ids.tolist()]


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
        ids = set(encode(tokenizer, template)) | set(encode(tokenizer, " " + template))
        for token in sorted(ids - special):
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
        scores=ones,
        reference_probability=frequency,
        candidates={"ids": ids, "scores": ones, "reference_probability": frequency},
        provenance={
            "method": "templates",
            "aligned_model": tokenizer.name_or_path,
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
            "options": {"templates": list(templates)},
            "note": "not measured: weights are uniform, reference_probability is the share of templates that use the token",
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
    if not torch.isfinite(weights).all() or (weights < 0).any() or not (weights > 0).any():
        raise UserError("Safety token weights must be finite, not negative and not all 0: compute them again.")
    if missing := {"method", "tokenizer_fingerprint", "vocab_size"} - set(tokens.provenance):
        raise UserError(f"The provenance of the safety tokens lacks '{sorted(missing)[0]}': compute them again.")
