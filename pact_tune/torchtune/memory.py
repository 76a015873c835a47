"""How much GPU memory a run needs, by formula: an estimate to choose hardware by, not a measurement."""

import torch
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor

from pact_tune.head import CHUNK
from pact_tune.torchtune.gemma2 import Gemma2Decoder

GIB = 2**30
OVERHEAD = GIB  # CUDA context, kernels' workspaces, the allocator's slack
NF4_BYTES = 0.5 + 1 / 64  # four bits, and one byte of scale per 64 weights


def estimate_memory(model: nn.Module, rows: int, tokens: int, checkpointing: bool, processes: int = 1) -> float:
    """Peak memory of one GPU: weights + gradients and AdamW's state of what is trained + activations + one chunk of logits.

    With FSDP2 weights and optimizer are divided by the number of processes; the layer at work is whole.

    Args:
        model (nn.Module): as trained, on the meta device; what is trained has ``requires_grad``.
        rows (int): conversations per process and forward.
        tokens (int): length of each.
        checkpointing (bool): activation checkpointing: a layer's inner activations are computed again.
        processes (int): GPUs that share the model.

    Returns:
        float: bytes.
    """
    layer, layers = model.layers[0], len(model.layers)
    output = model.tok_embeddings.weight
    itemsize, (vocabulary, hidden) = output.element_size(), output.shape
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(_bytes(p) for p in model.parameters())
    whole = 0 if processes == 1 else 2 * sum(_bytes(p) for p in layer.parameters()) + _bytes(output)
    inner = layer.mlp.w1.out_dim if hasattr(layer.mlp.w1, "out_dim") else layer.mlp.w1.out_features
    # Kept for the backward per token: attention's and the norms' inputs and outputs (about 10 H), three inner ones.
    per_layer = rows * tokens * (10 * hidden + 3 * inner) * itemsize
    if isinstance(model, Gemma2Decoder):  # soft-capped scores are held in full: no fused kernel knows them
        per_layer += 4 * rows * layer.attn.num_heads * tokens**2 * 4
    kept = per_layer + layers * rows * tokens * hidden * itemsize if checkpointing else layers * per_layer
    logits = 3 * CHUNK * vocabulary * torch.float32.itemsize
    return (weights + 3 * trained) / processes + whole + kept + logits + OVERHEAD


def _bytes(parameter: nn.Parameter) -> float:
    return parameter.numel() * (NF4_BYTES if isinstance(parameter, NF4Tensor) else parameter.element_size())
