"""What a teacher's layers multiply: the second moments of their inputs, from a few batches of data.

With them a fit weighs the error E of a weight by what it does to the layer's output:
trace(E S E^T), where S are the second moments of the layer's inputs in the teacher.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hyperize.config import ConfigError, ModelError
from hyperize.sites import Site

__all__: list[str] = []

Batch = Tensor | Sequence[Tensor]

_SAMPLES = 8192
"""Input vectors per batch and layer, about, from which second moments are estimated."""


@dataclass(frozen=True)
class Moments:
    """Second moments of the vectors that a weight multiplies.

    Attributes:
        matrix: (groups, columns, columns); the weight is seen as (groups, rows, columns).
        transposed: The weight is seen as (groups, columns, rows) instead.
    """

    matrix: Tensor
    transposed: bool = False

    def weigh(self, error: Tensor) -> Tensor:
        """E S for an error E in the weight's shape."""
        groups, columns, _ = self.matrix.shape
        if self.transposed:
            # (columns of all groups, ...) -> (groups, columns, rows)
            return (self.matrix @ error.reshape(groups, columns, -1)).view_as(error)
        # (rows of all groups, ...) -> (groups, rows, columns)
        return (error.reshape(groups, -1, columns) @ self.matrix).view_as(error)

    def norm(self, weight: Tensor) -> float:
        """Mean square of the outputs that a weight makes, summed over them."""
        return max(0.0, float((weight * self.weigh(weight)).sum(dtype=torch.float64)))

    def norm_of_noise(self, weight: Tensor) -> float:
        """The expectation of `norm` for random values of unit variance in a weight's place."""
        groups, columns, _ = self.matrix.shape
        trace = float(self.matrix.diagonal(dim1=1, dim2=2).sum())
        return trace * weight.numel() / (groups * columns)


def as_batches(data: Iterable[Batch]) -> list[Tensor]:
    if isinstance(data, (Tensor, str, Mapping)) or not isinstance(data, Iterable):
        raise ConfigError(
            "data must be an iterable of batches, as a list of tensors or a data loader, got "
            f"{type(data).__name__}."
        )
    batches = []
    for batch in data:
        first = batch[0] if isinstance(batch, (list, tuple)) and len(batch) else batch
        if not isinstance(first, Tensor):
            raise ConfigError(
                "a batch of data must be a tensor, or a sequence that starts with one, got "
                f"{type(batch).__name__}."
            )
        batches.append(first)
    if not batches or not any(batch.numel() for batch in batches):
        raise ConfigError("data is empty; pass a few batches of inputs, or data=None.")
    return batches


@torch.no_grad()
def second_moments(
    teacher: nn.Module, sites: Iterable[Site], batches: list[Tensor]
) -> dict[str, Moments]:
    """Runs the teacher on the data.

    Returns:
        Moments by the names of the dense parameters; sites that it does not reach are left out.
    """
    numbers: dict[str, dict[str, str]] = {}
    for site in sites:
        numbers.setdefault(site.path, {})[site.param] = site.name
    sums: dict[str, Moments] = {}
    counts = Counter[str]()

    def collect(of: dict[str, str]) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for param, vectors, transposed in _vectors(layer, args, kwargs):
                if param in of:
                    name, x = of[param], vectors
                    x = x.to(torch.promote_types(x.dtype, torch.float32))
                    product = x.transpose(1, 2) @ x  # (groups, columns, columns)
                    if name in sums:
                        product += sums[name].matrix
                    sums[name] = Moments(product, transposed)
                    counts[name] += x.shape[1]

        return hook

    for path, of in numbers.items():
        teacher.get_submodule(path).register_forward_hook(collect(of), with_kwargs=True)
    console = Console(stderr=True)
    bar = Progress(console=console, disable=not console.is_terminal)
    with torch.random.fork_rng(devices=[]), bar as progress:
        for batch in progress.track(batches, description="running the teacher"):
            try:
                teacher(batch)
            except Exception as error:  # any model code can run here, and raise anything
                raise ModelError(
                    f"the teacher cannot run a batch of shape {tuple(batch.shape)} "
                    f"({type(error).__name__}: {error}); data must hold inputs of the model."
                ) from error
    for name, moments in sums.items():
        if not moments.matrix.isfinite().all():
            raise ModelError(
                f"what {name} multiplies in the teacher is not finite for this data; check the "
                "data and the teacher."
            )
    return {name: Moments(s.matrix / counts[name], s.transposed) for name, s in sums.items()}


_Vectors = tuple[str, Tensor, bool]
"""Name of a parameter, what it multiplies as (groups, samples, columns), and whether the groups and
columns lie along axis 0 of the weight."""


def _vectors(layer: nn.Module, args: Any, kwargs: Any) -> Iterator[_Vectors]:
    """What the parameters of a layer multiply in one call of it."""
    inputs = (*args, *kwargs.values())
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        # The outputs of neighbouring inputs overlap where the stride is less than the kernel; the
        # correlation of neighbours is not counted
        x = _batched(inputs[0], layer).flatten(2)  # (N, C, positions)
        # -> (groups, N * positions, C / groups)
        x = x.transpose(1, 2).reshape(-1, layer.groups, layer.in_channels // layer.groups)
        yield "weight", _thinned(x).transpose(0, 1), True
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        x = _batched(inputs[0], layer)
        if isinstance(layer, Conv2dSame):  # pads in its forward
            x = pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
        yield "weight", _patches(x, layer), False
    elif isinstance(layer, nn.Linear):
        yield "weight", _rows(inputs[0]), False
    elif isinstance(layer, nn.RNNBase):
        yield from _recurrent_vectors(layer, inputs[0])
    elif isinstance(layer, nn.RNNCellBase):
        yield "weight_ih", _rows(inputs[0]), False
        state = inputs[1] if len(inputs) > 1 else None
        state = state[0] if isinstance(state, tuple) else state
        if state is not None:
            yield "weight_hh", _rows(state), False
    elif isinstance(layer, nn.MultiheadAttention):
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        parts = [_rows(named[name]) for name in ("query", "key", "value")]
        for name, x in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts, strict=True):
            yield name, x, False
        if len({part.shape for part in parts}) == 1:
            yield "in_proj_weight", torch.cat(parts), False  # (3, samples, columns)


def _thinned(x: Tensor) -> Tensor:
    """About `_SAMPLES` entries along axis 0, evenly spread."""
    return x[:: max(1, len(x) // _SAMPLES)]


def _rows(x: Tensor | PackedSequence) -> Tensor:
    """(..., features) -> (1, samples, features)."""
    x = x.data if isinstance(x, PackedSequence) else x
    return _thinned(x.reshape(-1, x.shape[-1]))[None]


def _batched(x: Tensor, layer: Any) -> Tensor:
    """A convolution's input with the batch axis that it may lack."""
    return x if x.ndim == layer.weight.ndim else x[None]


def _patches(x: Tensor, layer: Any) -> Tensor:
    """What a convolution's kernels see, (groups, samples, C / groups * k)."""
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    elif layer.padding == "same":
        x = F.pad(x, layer._reversed_padding_repeated_twice)
    elif layer.padding != "valid":
        x = F.pad(x, [side for size in reversed(layer.padding) for side in (size, size)])
    dims = len(layer.kernel_size)
    for axis, (size, step, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    # Positions are thinned while this is still a view
    positions = x.shape[0] * math.prod(x.shape[2 : 2 + dims])
    thin = max(1, math.floor((positions / _SAMPLES) ** (1 / dims)))
    for axis in range(2, 2 + dims):
        x = x[(slice(None),) * axis + (slice(None, None, thin),)]
    # (N, C, *positions, *kernel) -> (N, *positions, C, *kernel) -> (samples, groups, columns)
    x = x.movedim(1, 1 + dims).reshape(-1, layer.groups, layer.weight[0].numel())
    return x.transpose(0, 1)


def _recurrent_vectors(layer: nn.RNNBase, x: Tensor | PackedSequence) -> Iterator[_Vectors]:
    """Runs the layers of a stack one by one, from zero states, to see between them."""
    kind = next(k for k in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(layer, k))
    options = {"nonlinearity": layer.nonlinearity} if kind is nn.RNN else {}
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    for level in range(layer.num_layers):
        one = kind(
            layer.input_size
            if level == 0
            else (layer.proj_size or layer.hidden_size) * len(directions),
            layer.hidden_size,
            bias=layer.bias,
            batch_first=layer.batch_first,
            bidirectional=layer.bidirectional,
            device="meta",
            **({"proj_size": layer.proj_size} if kind is nn.LSTM else options),
        )
        for name in one._flat_weights_names:
            setattr(one, name, getattr(layer, name.replace("_l0", f"_l{level}")))
        y = one(x)[0]
        hidden = (y.data if isinstance(y, PackedSequence) else y).chunk(len(directions), -1)
        for direction, h in zip(directions, hidden, strict=True):
            yield f"weight_ih_l{level}{direction}", _rows(x), False
            # The states after all steps, in place of those before them
            yield f"weight_hh_l{level}{direction}", _rows(h), False
        x = y
