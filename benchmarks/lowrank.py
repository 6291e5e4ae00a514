"""Layers as chains of smaller ones: truncated SVD, Tucker and CP decompositions, by tensorly.

What `benchmarks/compress.py` and `benchmarks/accuracy.py` compare with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor, nn

tensorly.set_backend("pytorch")

SHRINK = 0.98
"""Factor by which the ranks are lowered until the model has few enough parameters."""
LEAST = 1e-4
"""A share at which all ranks are 1."""

Chain = tuple[Sequence[nn.Module], Callable[[], Sequence[Tensor]]]
"""Layers in place of one, and what decomposes its weight to theirs."""
Replace = Callable[[nn.Module, float], Chain]
"""From a layer and the share of its weights to keep to a chain."""


def shrunk(
    model: nn.Module,
    paths: Iterable[str],
    replace: Replace,
    most: int,
    share: float | None = None,
) -> nn.Module:
    """A copy of a model that has chains in place of layers, of the highest ranks that fit.

    Args:
        model: The model; not changed.
        paths: Of the layers.
        replace: What makes a chain.
        most: Parameters that the result may have.
        share: Of the layers' weights, to begin with; lowered until the result is small enough.

    Raises:
        ValueError: It is too large with ranks of 1.
    """
    layers = {path: model.get_submodule(path) for path in paths}
    weights = sum(cast(Tensor, layer.weight).numel() for layer in layers.values())
    rest = size(model) - weights
    share = share or (most - rest) / weights
    while True:
        chains = {path: replace(layer, share) for path, layer in layers.items()}
        total = rest + sum(size(link) for links, _ in chains.values() for link in links)
        if total <= most:
            break
        if share < LEAST:
            raise ValueError(f"with ranks of 1 there are {total:,} parameters, more than {most:,}")
        share *= SHRINK
    small = copy.deepcopy(model)
    for path, (links, decompose) in chains.items():
        for link, weight in zip(links, decompose(), strict=True):
            like = cast(Tensor, link.weight)
            link.weight = nn.Parameter(weight.contiguous().view_as(like))
        links[-1].bias = copy.deepcopy(layers[path].bias)
        small.set_submodule(path, nn.Sequential(*links))
    return small


def size(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def spatial(conv: nn.Conv2d) -> dict[str, Any]:
    return {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding}


def svd(layer: nn.Module, share: float) -> Chain:
    """A layer as two: onto the largest singular directions, and from there."""
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    weight = layer.weight.detach()
    n_out, n_in = weight.shape[:2]
    rank = max(1, int(share * weight.numel() / (n_out + weight[0].numel())))
    rank = min(rank, n_out, weight[0].numel())

    def decompose() -> Sequence[Tensor]:
        u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        return s[:rank, None] * v[:rank], u[:, :rank]

    if isinstance(layer, nn.Linear):
        return [nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=False)], decompose
    first = nn.Conv2d(n_in, rank, bias=False, **spatial(layer))
    return [first, nn.Conv2d(rank, n_out, 1, bias=False)], decompose


def tucker(conv: nn.Module, share: float) -> Chain:
    """A convolution as three: a small one between changes of its channels."""
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight.detach()
    n_out, n_in = weight.shape[:2]
    # Ranks in proportion to the channels: a^2 * core + a * factors = share * weights
    core, factors = weight.numel(), n_out**2 + n_in**2
    a = (math.sqrt(factors**2 + 4 * core * share * weight.numel()) - factors) / (2 * core)
    ranks = [min(n, max(1, int(a * n))) for n in (n_out, n_in)]

    def decompose() -> Sequence[Tensor]:
        (core, (u_out, u_in)), _ = partial_tucker(weight, rank=ranks, modes=[0, 1], init="svd")
        return u_in.t(), core, u_out

    links = (
        nn.Conv2d(n_in, ranks[1], 1, bias=False),
        nn.Conv2d(ranks[1], ranks[0], bias=False, **spatial(conv)),
        nn.Conv2d(ranks[0], n_out, 1, bias=False),
    )
    return links, decompose


def cp(conv: nn.Module, share: float) -> Chain:
    """A convolution as four, the middle two over one axis of the kernel and each channel alone."""
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight.detach()
    n_out, n_in, height, width = weight.shape
    rank = max(1, int(share * weight.numel() / sum(weight.shape)))

    def decompose() -> Sequence[Tensor]:
        scale, factors = parafac(weight, rank=rank, init="random", random_state=0, n_iter_max=200)
        out, into, rows, columns = factors
        return into.t(), rows.t(), columns.t(), out * scale

    (sh, sw), (ph, pw) = spatial(conv)["stride"], spatial(conv)["padding"]
    deep: dict[str, Any] = {"groups": rank, "bias": False}
    links = (
        nn.Conv2d(n_in, rank, 1, bias=False),
        nn.Conv2d(rank, rank, (height, 1), (sh, 1), (ph, 0), **deep),
        nn.Conv2d(rank, rank, (1, width), (1, sw), (0, pw), **deep),
        nn.Conv2d(rank, n_out, 1, bias=False),
    )
    return links, decompose
