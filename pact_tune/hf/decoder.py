"""Any causal language model of transformers as the core sees it, with PEFT adapters or without.

Shapes: B rows of S tokens, T response tokens of a batch, H hidden size, V vocabulary, K ids.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from pact_tune.batching import Batch, collate
from pact_tune.conversations import Conversation
from pact_tune.decoder import Decoder, TrainableHead
from pact_tune.errors import UserError
from pact_tune.hf.prefix import TOLERANCE, below_head, find_longest_shared, inputs_of

# What a config calls a factor of the logits, and whether the network multiplies by it or divides.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, ...
DIVISORS = ("logits_scaling",)  # Granite
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
CHECKED_TOKENS = 12  # length of the row on which the head is compared with the model's own


def setting(config: Any, names: Sequence[str]) -> Any:
    """What a config says under the first of some names, by which families call one thing; None where it says nothing."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def logit_scale(config: Any) -> float:
    """The factor of a network's logits, 1 where it has none.

    Args:
        config (Any): of the text model.

    Returns:
        float: before a soft-cap.
    """
    if (multiplier := setting(config, MULTIPLIERS)) is not None:
        return float(multiplier)
    divisor = setting(config, DIVISORS)
    return 1.0 if divisor is None else 1.0 / float(divisor)


class HFHead:
    """The output head of a transformers model; to be used inside its forward only.

    Args:
        model (PreTrainedModel): the causal LM itself, not PEFT's or DDP's wrapper.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.model = model
        self.scale = logit_scale(config)
        self.cap = setting(config, CAPS)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._scaled(self.model.get_output_embeddings()(hidden))

    @torch.no_grad()
    def frozen_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        base = self._base()
        return self._scaled(F.linear(hidden, base.weight, base.bias))

    def columns(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        base = self._base()
        return self._scaled(F.linear(hidden, base.weight[ids], None if base.bias is None else base.bias[ids]))

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.get_output_embeddings().parameters() if p.requires_grad]

    def _base(self) -> nn.Linear:
        """The head itself, without LoRA."""
        head = self.model.get_output_embeddings()
        base: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        return base

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's and DDP's wrappers.

    Args:
        model (nn.Module): wrapped or not.

    Returns:
        PreTrainedModel: where the head is.

    Raises:
        UserError: there is none, or it has no head.
    """
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    while not isinstance(inner, PreTrainedModel):
        if not hasattr(inner, "get_base_model"):
            raise UserError(f"A {type(inner).__name__} is no model of transformers: give a causal language model.")
        inner = inner.get_base_model()
    if inner.get_output_embeddings() is None:
        raise UserError(f"{type(inner).__name__} has no output head: load it with AutoModelForCausalLM.")
    return inner


class HFDecoder(Decoder):
    """Gives a transformers model our last step in the place of its own, for calls that ask for it.

    The step runs inside the root module's forward: there, under FSDP2 and DDP, the head's weights are whole. Calls
    without ``pact_read`` (generation, evaluation) find the model's own forward.

    Args:
        model (nn.Module): a causal LM, perhaps in PEFT's wrapper.
        pad_id (int): id to pad batches with.
        device (torch.device): where batches go.
        reference_adapter (str | None): the adapter that the reference has; None: the reference is the model without any.
    """

    def __init__(
        self, model: nn.Module, pad_id: int, device: torch.device, reference_adapter: str | None = None
    ) -> None:
        super().__init__(pad_id, device)
        self.model = model  # what is called; a trainer may put its wrapper here
        self.causal_lm = causal_lm_of(model)
        self.reference_adapter = reference_adapter
        self.head = HFHead(self.causal_lm)
        self._token_types = self.causal_lm.config.model_type == "gemma3"  # its vision models want them in training
        self._layers = [m for m in self.causal_lm.modules() if isinstance(m, BaseTunerLayer)]
        if getattr(self.causal_lm.config.get_text_config(), "output_router_logits", False):
            raise UserError(
                "output_router_logits in the model's config.json adds a loss of its own, which is not computed here: set it "
                "to false."
            )
        self._install()

    def _install(self) -> None:
        model, head = self.causal_lm, self.head
        original = model.forward

        # Wrapped around the class's function, not the bound one: trainers read the signature to see what a model takes.
        @functools.wraps(type(model).forward)
        def forward(self: PreTrainedModel, *args: Any, pact_read: Any = None, **kwargs: Any) -> Any:
            if pact_read is None:
                return original(*args, **kwargs)
            index, read = pact_read
            kwargs.pop("return_dict", None)
            trunk = below_head(self, self.base_model)
            hidden = trunk(*args, **kwargs, use_cache=False, return_dict=True).last_hidden_state
            return read(hidden.flatten(0, 1).index_select(0, index), head)

        model.forward = types.MethodType(forward, model)

    def run(self, batch: Batch, read: Callable[[torch.Tensor, TrainableHead], Any]) -> Any:
        # What Gemma 3's vision models want in training.
        types = {"token_type_ids": torch.zeros_like(batch.tokens)} if self._token_types else {}
        with inputs_of(self.causal_lm, batch) as inputs:
            return self.model(**inputs, **types, pact_read=(batch.index, read))

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Adapters, dropout and gradient checkpointing are off: a reference is the same each time it is read."""
        training = [module for module in self.causal_lm.modules() if module.training]
        active = {layer: layer._active_adapter for layer in self._layers}
        for module in training:
            module.training = False
        # Not by PEFT's own methods: these also switch requires_grad, which FSDP2 reads when it first gathers a weight.
        for layer in self._layers:
            if self.reference_adapter is None:
                layer._disable_adapters = True
            else:
                layer._active_adapter = [self.reference_adapter]
        try:
            yield
        finally:
            for module in training:
                module.training = True
            for layer, adapters in active.items():
                layer._disable_adapters, layer._active_adapter = False, adapters

    def check(self, packed: bool) -> None:
        """All that must be known of a network before it is trained; all ranks must call it.

        Args:
            packed (bool): whether rows will be packed.

        Raises:
            UserError: a head that is not reproduced, or rows that are not kept apart.
        """
        self.check_head()
        self.check_rows(packed)
        self.find_longest_shared()

    def find_longest_shared(self) -> None:
        """Sets up to which length rows are computed behind a shared prefix; all ranks must call it."""

        def hidden(batch: Batch) -> torch.Tensor:
            return self.run(batch.to(self.device), lambda hidden, head: hidden)

        with self.frozen():
            self.longest_shared = find_longest_shared(self.causal_lm, hidden)

    def check_rows(self, packed: bool) -> None:
        """Finds out whether a token sees what it must not: tokens behind it, or rows that its own is packed with.

        Where it does not, the gradient of its hidden state with respect to their embeddings is exactly zero. All ranks must
        call it.

        Args:
            packed (bool): whether rows will be packed.

        Raises:
            UserError: it does: losses would be others than those of the rows.
        """
        length, vocabulary = 5, self.causal_lm.config.get_text_config().vocab_size
        tokens = [token % vocabulary for token in range(5, 5 + 3 * length)]
        # The hidden state of each row's third token is looked at; a row's last token, 0, is only a label.
        rows = [Conversation([*tokens[start : start + length], 0], [(3, 4)]) for start in range(0, 3 * length, length)]
        batch = collate(rows if packed else rows[:1], self.pad_id, packed).to(self.device)
        looked_at = len(batch.index) // 2  # of three rows the second: it has one before it and one behind
        embedded: list[torch.Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1].clone()  # which a model may change in place

        hook = self.causal_lm.get_input_embeddings().register_forward_hook(keep)
        try:
            with self.frozen(), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                hidden = self.run(batch, lambda hidden, head: hidden[looked_at].float())
                factors = torch.arange(
                    1.0, 1.0 + len(hidden), device=hidden.device
                )  # a norm may fix sums of equal parts
                gradient = torch.autograd.grad(hidden @ factors, embedded)[0]
        finally:
            hook.remove()
        seen = gradient[0].ne(0).any(-1).nonzero()[:, 0] - looked_at * length  # places in the row that is looked at
        name = type(self.causal_lm).__name__
        if not gradient.isfinite().all():
            raise UserError(f"The hidden states of {name} are not finite in {gradient.dtype}: set another dtype.")
        if ((seen > 2) & (seen < length)).any():
            raise UserError(
                f"In {name} a token sees those behind it: only causal language models can be trained (perhaps config.json "
                "lacks is_decoder: true)."
            )
        if ((seen < 0) | (seen >= length)).any():
            raise UserError(
                f"{name} does not keep packed rows apart: train it without packing (packed=False; with TRL packing=False and "
                "padding_free=False; with Axolotl sample_packing: false and batch_flattening: false)."
            )

    @torch.no_grad()
    def check_head(self) -> None:
        """Compares the head as it is computed here with the model's own logits, on one row; all ranks must call it.

        Raises:
            UserError: they differ: the model does something to its logits that is not known here.
        """
        tokens = (
            torch.arange(CHECKED_TOKENS, device=self.device)[None] % self.causal_lm.config.get_text_config().vocab_size
        )
        index = torch.arange(CHECKED_TOKENS, device=self.device)
        ids = torch.arange(0, 7, 2, device=self.device)
        everywhere = Batch(tokens, index, *[index] * 5)

        def read(hidden: torch.Tensor, head: TrainableHead) -> tuple[torch.Tensor, ...]:
            return head.logits(hidden), head.frozen_logits(hidden), head.columns(hidden, ids)

        with self.frozen():
            found = self.run(everywhere, read)
            more = {"token_type_ids": torch.zeros_like(tokens)} if self._token_types else {}
            own = self.model(input_ids=tokens, use_cache=False, **more).logits[0].float()
        expected = (own, own, own[:, ids])
        limit = TOLERANCE[self.head._base().weight.dtype] * own.abs().max()
        for ours, theirs in zip(found, expected, strict=True):
            if ours.shape != theirs.shape or not (ours - theirs).abs().max() <= limit:
                raise UserError(
                    f"The output head of {type(self.causal_lm).__name__} does something to its logits that pact-tune does "
                    "not reproduce: this model cannot be trained with it."
                )
