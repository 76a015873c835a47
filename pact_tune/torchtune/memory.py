"""What the estimate of memory needs to know of a torchtune model."""

from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.modules import TransformerDecoder

from pact_tune.memory import Sizes
from pact_tune.torchtune.gemma2 import Gemma2Decoder

NF4_BYTES = 0.5 + 1 / 64  # four bits, and one byte of scale per 64 weights


def sizes_of(model: TransformerDecoder) -> Sizes:
    """Sizes of a model.

    Args:
        model (TransformerDecoder): as trained, on the meta device; what is trained has ``requires_grad``.

    Returns:
        Sizes: see there.
    """
    layer = model.layers[0]
    inner = layer.mlp.w1.out_dim if hasattr(layer.mlp.w1, "out_dim") else layer.mlp.w1.out_features
    return Sizes(
        weights=sum(_bytes(p) for p in model.parameters()),
        trained=sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        layers=len(model.layers),
        layer=sum(_bytes(p) for p in layer.parameters()),
        embedding=model.tok_embeddings.weight,
        inner=inner,
        whole_scores=layer.attn.num_heads if isinstance(model, Gemma2Decoder) else 0,  # no fused kernel caps them
    )


def _bytes(parameter: nn.Parameter) -> float:
    return parameter.numel() * (NF4_BYTES if isinstance(parameter, NF4Tensor) else parameter.element_size())
