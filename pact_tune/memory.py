"""How much GPU memory a run needs, by formula: an estimate to choose hardware by, not a measurement."""

from typing import NamedTuple

import torch

from pact_tune.head import CHUNK

GIB = 2**30
OVERHEAD = GIB  # CUDA context, kernels' workspaces, the allocator's slack


class Sizes(NamedTuple):
    """What an estimate needs to know of a model.

    Attributes:
        weights (float): bytes of all parameters.
        trained (float): bytes of those that are trained.
        layers (int): decoder layers.
        layer (float): bytes of one layer's parameters.
        embedding (torch.Tensor): ``[V, H]``; may lie on the meta device.
        inner (int): width of the feed-forward.
        whole_scores (int): heads whose attention scores are held in full; 0: a fused kernel computes them.
    """

    weights: float
    trained: float
    layers: int
    layer: float
    embedding: torch.Tensor
    inner: int
    whole_scores: int


def estimate_memory(sizes: Sizes, rows: int, tokens: int, checkpointing: bool, processes: int = 1) -> float:
    """Peak memory of one GPU: weights + gradients and AdamW's state of what is trained + activations + one chunk of logits.

    With FSDP2 weights and optimizer are divided by the number of processes; the layer at work is whole.

    Args:
        sizes (Sizes): of the model, as trained.
        rows (int): conversations per process and forward.
        tokens (int): length of each.
        checkpointing (bool): activation checkpointing: a layer's inner activations are computed again.
        processes (int): GPUs that share the model.

    Returns:
        float: bytes.
    """
    itemsize, (vocabulary, hidden) = sizes.embedding.element_size(), sizes.embedding.shape
    head = sizes.embedding.numel() * itemsize
    whole = 0 if processes == 1 else 2 * sizes.layer + head
    # Kept for the backward per token: attention's and the norms' inputs and outputs (about 10 H), three inner ones.
    per_layer = rows * tokens * (10 * hidden + 3 * sizes.inner) * itemsize
    per_layer += 4 * rows * sizes.whole_scores * tokens**2 * 4
    kept = sizes.layers * per_layer
    if checkpointing:
        kept = per_layer + sizes.layers * rows * tokens * hidden * itemsize
    logits = 3 * CHUNK * vocabulary * torch.float32.itemsize
    return (sizes.weights + 3 * sizes.trained) / processes + whole + kept + logits + OVERHEAD
