"""What a run minimises: each class below says which numbers it needs and turns them into a loss.

The training loop knows this interface and no names:

    columns            Columns | None: which logits beside the label's are read, of student and reference
    views              reference views needed, of "full" and "response_only"
    response_only_bos  whether the response-only view begins with BOS
    response_only_tokens  how many response tokens of that view are needed at most; None is all
    metric_names       names of the numbers that __call__ returns beside the loss, each summed over positions
    total(...)         the loss, from the means of those numbers
    settings()         method and every setting, for the stamp that a result carries
    prepare(...)       checks against tokenizer and vocabulary, before any weight is loaded; a line for the log
    __call__(...)      the loss summed over positions, and the metrics
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from pact_tune.config import Fields, PathText, Text, Weight
from pact_tune.errors import UserError
from pact_tune.head import Columns, Readout
from pact_tune.hub import NotPublishedError
from pact_tune.losses import VOCABULARY, PACTConfig, pact_loss, str_loss
from pact_tune.safety_tokens import SafetyTokens, safety_tokens_from_templates

# Beyond the response position where the mixing weight of Eq. 8 has fallen to this, the response-only view is left out.
NEGLIGIBLE_GATE = 1e-3


@dataclass(frozen=True)
class Reference:
    """The frozen aligned model at n response positions.

    Attributes:
        full (torch.Tensor | None): columns with the whole conversation, ``[n, C]``.
        response_only (torch.Tensor | None): columns with the response only, ``[n, C]``.
    """

    full: torch.Tensor | None = None
    response_only: torch.Tensor | None = None

    def __getitem__(self, rows: slice) -> "Reference":
        full, response_only = (None if view is None else view[rows] for view in (self.full, self.response_only))
        return Reference(full, response_only)


class SFT:
    """Plain supervised fine-tuning: cross-entropy on the response tokens."""

    columns: Columns | None = None
    views: tuple[str, ...] = ()
    response_only_bos = True
    response_only_tokens: int | None = None
    metric_names: tuple[str, ...] = ("ce",)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
        """Nothing to check."""
        return "Objective: plain SFT, without a constraint."

    def to(self, device: torch.device) -> None:
        """Nothing to move."""

    def settings(self) -> dict[str, Any]:
        """Method, whether it constrains, and every setting; JSON-serialisable."""
        return {"method": "sft", "constrained": False}

    def total(self, metrics: dict[str, float]) -> float:
        """The loss, from its means: the cross-entropy."""
        return metrics["ce"]

    def __call__(
        self, student: Readout, reference: Reference, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the cross-entropy over positions, and the metrics ``[1]``."""
        ce = -student.label_logprobs.sum()
        return ce, ce.detach()[None]


@dataclass(frozen=True)
class TokenSource:
    """Where the safety tokens of a run come from.

    Attributes:
        source (str | None): folder, Hub repository or known name; None only with ``k: vocabulary``.
        revision (str | None): of the Hub repository.
        subfolder (str | None): of the folder or repository.
        template_fallback (bool): take tokens from refusal templates where nobody has published a known name's.
    """

    source: str | None
    revision: str | None = None
    subfolder: str | None = None
    template_fallback: bool = False

    def load(self, tokenizer: PreTrainedTokenizerBase) -> tuple[SafetyTokens, bool]:
        """The safety tokens, and whether they are the source's own rather than the fallback."""
        try:
            return SafetyTokens.load(self.source, revision=self.revision, subfolder=self.subfolder), True
        except NotPublishedError as error:
            if not self.template_fallback:
                raise UserError(
                    f"{error}; or use tokens from refusal templates, loss.template_fallback=True."
                ) from error
            return safety_tokens_from_templates(tokenizer), False


class _Constrained(SFT):
    """Cross-entropy plus a constraint on the logits of safety tokens."""

    tail = False

    def __init__(self, source: TokenSource) -> None:
        self.source = source
        self.safety_tokens: SafetyTokens | None = None

    def select(self, tokens: SafetyTokens) -> SafetyTokens:
        return tokens

    def prepare(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
        """Loads the safety tokens and checks that they belong to this model.

        Args:
            tokenizer (PreTrainedTokenizerBase): the run's tokenizer.
            vocab_size (int): rows of the model's output head.

        Returns:
            str: which tokens are used, for the log.

        Raises:
            UserError: not found, damaged, of another tokenizer, or past the vocabulary.
        """
        tokens, own = self.source.load(tokenizer)
        tokens.check_vocabulary(vocab_size)
        tokens.check_tokenizer(tokenizer)
        self.safety_tokens = self.select(tokens)
        self.columns = Columns(self.safety_tokens.ids, self.tail)
        self.weights = self.safety_tokens.weights
        source, k = self.source.source, len(self.safety_tokens)
        if own:
            return f"Safety tokens: {k} of '{source}' ({tokens.provenance['method']})."
        return (
            f"WARNING: nobody has published safety tokens for '{source}', so {k} tokens from refusal templates are used "
            "(loss.template_fallback); their weights were not measured."
        )

    def to(self, device: torch.device) -> None:
        """Moves the safety tokens to ``device``."""
        self.columns = Columns(self.columns.ids.to(device), self.columns.tail)
        self.weights = self.weights.to(device)


class PACT(_Constrained):
    """PACT (arXiv 2603.07445, Eq. 9): cross-entropy + lambda_kl * KL on the safety tokens.

    Args:
        source (TokenSource): where the safety tokens come from.
        config (PACTConfig): the knobs.
    """

    metric_names = ("ce", "kl", "gate")

    def __init__(self, source: TokenSource, config: PACTConfig) -> None:
        super().__init__(source)
        if source.source is None and config.k != VOCABULARY:
            raise UserError(
                "Section 'loss' names no safety_tokens: give a folder made by `pact tokens compute`, a Hub repository, "
                "or a known model name."
            )
        self.config = config
        self.tail = config.tail
        self.response_only_bos = config.response_only_bos
        self.views = ("full", "response_only") if config.response_only else ("full",)
        if config.tau < math.inf:
            self.response_only_tokens = config.decay_start + math.ceil(config.tau * math.log(1 / NEGLIGIBLE_GATE))

    def settings(self) -> dict[str, Any]:
        """Method and every field of :class:`pact_tune.PACTConfig`."""
        values = dataclasses.asdict(self.config)
        return {"method": "pact", "constrained": True, **values, "tau": str(values["tau"])}  # JSON has no infinity

    def total(self, metrics: dict[str, float]) -> float:
        """The loss, from its means (Eq. 9)."""
        return metrics["ce"] + self.config.lambda_kl * metrics["kl"]

    def select(self, tokens: SafetyTokens) -> SafetyTokens:
        return tokens.select(self.config.k, self.config.ranking, self.config.weighting)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
        if self.config.k != VOCABULARY:
            return super().prepare(tokenizer, vocab_size)
        self.columns = Columns(torch.arange(vocab_size), tail=False)
        self.weights = torch.ones(vocab_size)
        return f"Safety tokens: all {vocab_size} of the vocabulary."

    def __call__(
        self, student: Readout, reference: Reference, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """CE + lambda_kl * KL, summed over positions, and the metrics ``[3]``: CE, KL (before lambda) and gate."""
        ce = -student.label_logprobs.sum()
        kl = pact_loss(student.columns, reference.full, reference.response_only, position, self.weights, self.config)
        return ce + self.config.lambda_kl * kl.sum, torch.stack([ce, kl.sum, kl.gate.sum()]).detach()


class STR(_Constrained):
    """STR (arXiv 2604.17210), our reading of the abstract: cross-entropy + lambda_str * squared logit difference.

    Args:
        source (TokenSource): where the refusal tokens come from; all of them are used.
        lambda_str (float): weight of the constraint.
    """

    views = ("full",)
    metric_names = ("ce", "str")

    def __init__(self, source: TokenSource, lambda_str: float) -> None:
        super().__init__(source)
        self.lambda_str = lambda_str

    def settings(self) -> dict[str, Any]:
        """Method and lambda_str."""
        return {"method": "str", "constrained": True, "lambda_str": self.lambda_str}

    def total(self, metrics: dict[str, float]) -> float:
        """The loss, from its means."""
        return metrics["ce"] + self.lambda_str * metrics["str"]

    def __call__(
        self, student: Readout, reference: Reference, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """CE + lambda_str * STR, summed over positions, and the metrics ``[2]``: CE and STR (before lambda)."""
        ce = -student.label_logprobs.sum()
        penalty = str_loss(student.columns, reference.full).sum()
        return ce + self.lambda_str * penalty, torch.stack([ce, penalty]).detach()


# The builders below are what a config names (`loss._component_`); they return one of the classes above.


def sft() -> SFT:
    """Plain supervised fine-tuning."""
    return SFT()


def pact(
    safety_tokens: Text | None = None,
    preset: Literal["paper", "official", "tail"] = "paper",
    revision: Text | None = None,
    subfolder: PathText | None = None,
    template_fallback: bool = False,
    **overrides: Annotated[Any, Fields(PACTConfig)],
) -> SFT:
    """PACT, or plain SFT when lambda_kl is 0: no reference is run then, and the numbers are the same bit for bit.

    Args:
        safety_tokens (str | None): folder, Hub repository or known name; None only with ``k: vocabulary``.
        preset (str): "paper", "official" or "tail".
        revision (str | None): of the Hub repository.
        subfolder (str | None): of the folder or repository.
        template_fallback (bool): take tokens from refusal templates where nobody has published a known name's.
        **overrides: fields of :class:`pact_tune.PACTConfig`.

    Returns:
        SFT: the objective.

    Raises:
        UserError: unknown preset or field, a value out of range, or no safety tokens named.
    """
    config = PACTConfig.preset(preset, **overrides)
    if config.lambda_kl == 0:
        return SFT()
    return PACT(TokenSource(safety_tokens, revision, subfolder, template_fallback), config)


def str_(
    safety_tokens: Text,
    lambda_str: Weight = 0.1,
    revision: Text | None = None,
    subfolder: PathText | None = None,
    template_fallback: bool = False,
) -> SFT:
    """STR (our reading), or plain SFT when lambda_str is 0.

    Args:
        safety_tokens (str): folder, Hub repository or known name of the refusal tokens; all of them are used.
        lambda_str (float): weight of the constraint; 0.1 is our choice, the paper's text was not available.
        revision (str | None): of the Hub repository.
        subfolder (str | None): of the folder or repository.
        template_fallback (bool): take tokens from refusal templates where nobody has published a known name's.

    Returns:
        SFT: the objective.
    """
    if lambda_str == 0:
        return SFT()
    return STR(TokenSource(safety_tokens, revision, subfolder, template_fallback), lambda_str)
