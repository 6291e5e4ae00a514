"""Parameters in few bits: as files store them, and as training sees them that prepares for it.

A matrix is rounded row by row: the largest value of a row becomes the largest whole number of the
bits, and all its values are multiples of one step. Kernels are matrices of a row for each output
channel. Vectors (biases, norms) are few, and become half precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hyperize.config import ConfigError, ModelError
from hyperize.parts import find_groups

__all__ = ["quantized"]

BITS = (4, 8)
_NORMAL = torch.finfo(torch.float16).smallest_normal
"""Below it, a float16 loses bits."""


def encode(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers and the step of each row.

    Args:
        tensor: Of two axes or more, finite.
        bits: Of a number, which goes from -(2^(bits - 1) - 1) to the same above 0.

    Returns:
        int8 in the tensor's shape, and (rows,) in float16, or in float32 if that does not hold one
        of them. A row of zeros has the step 0.
    """
    rows = tensor.detach().float().flatten(1)
    top = 2 ** (bits - 1) - 1
    step = rows.abs().amax(1) / top
    half = step.half()
    if bool(((step == 0) | (half >= _NORMAL) & half.isfinite()).all()):
        step = half
    divisor = torch.where(step > 0, step, torch.ones_like(step)).float()
    numbers = (rows / divisor[:, None]).round().clamp(-top, top)
    return numbers.to(torch.int8).view(tensor.shape), step


def decode(numbers: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that `encode` has rounded to."""
    rows = numbers.flatten(1).float() * step.float()[:, None]
    return rows.view(numbers.shape).to(dtype)


def pack(numbers: Tensor) -> Tensor:
    """Numbers of 4 bits, two to a byte: uint8 (ceil(count / 2),)."""
    flat = (numbers.reshape(-1) & 15).to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(len(flat) % 2)])
    return flat[::2] | flat[1::2] << 4


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`, for numbers of a shape."""
    both = torch.stack([packed & 15, packed >> 4], 1).view(-1)  # (bytes, 2) -> (count,)
    flat = both[: torch.Size(shape).numel()].to(torch.int8)
    return torch.where(flat > 7, flat - 16, flat).view(shape)


def is_matrix(param: Tensor) -> bool:
    """Whether a parameter is rounded row by row."""
    return param.is_floating_point() and param.ndim > 1 and param.numel() > 0


def nearest(param: Tensor, bits: int) -> Tensor:
    """What a file of so many bits holds for a parameter, in its dtype; without a graph."""
    if is_matrix(param):
        return decode(*encode(param, bits), param.dtype)
    if not param.is_floating_point():
        return param.detach()
    half = param.detach().to(torch.float16)
    return half.to(param.dtype) if bool(half.isfinite().all()) else param.detach()


@contextmanager
def quantized(hyper: nn.Module, bits: int) -> Iterator[None]:
    """Inside the block the model computes with the parameters that a file of few bits would hold.

    Training then gets used to the rounding. Gradients pass through it unchanged (straight-through
    estimator, Bengio et al. 2013, arXiv 1308.3432) and arrive at the parameters themselves, which
    an optimizer changes as ever. Enter the block anew for each step, and leave it before the
    optimizer's:

        with hyperize.quantized(hyper, 8):
            loss = F.cross_entropy(hyper(images), labels)
            loss.backward()
        optimizer.step()

    All parameters are rounded: embeddings, hypernetwork and what is not generated; buffers are
    stored as they are. Outputs are those of the model that `save(hyper, path, dtype="int8")` and
    `load` give. Inside the block `hyper.parameters()` are the rounded values, so that an optimizer
    is made before.

    Args:
        hyper: A hyperized model, or a part of one. Its parameters are replaced inside the block and
            come back when it ends.
        bits: 8 or 4.

    Raises:
        ConfigError: `bits` is another number.
        ModelError: The model is not hyperized, is wrapped or sharded, or is in such a block.
    """
    if bits not in BITS or isinstance(bits, bool):
        raise ConfigError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}.")
    find_groups(hyper)
    held: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    for module in hyper.modules():
        for name, param in module._parameters.items():
            if param is not None and not isinstance(param, nn.Parameter):
                raise ModelError(
                    f"{name} of a {type(module).__name__} is no parameter now; quantized() takes a "
                    "model that is not in such a block already, and not in a functional call."
                )
            if param is not None:
                held.append((module._parameters, name, param))
    rounded: dict[int, Tensor] = {}
    for _, _, param in held:
        if id(param) not in rounded:
            rounded[id(param)] = _Through.apply(param, nearest(param, bits))
    lists = _recurrent_lists(hyper)
    try:
        for table, name, param in held:
            table[name] = rounded[id(param)]
        for values in lists:
            values[:] = [rounded.get(id(value), value) for value in values]
        yield
    finally:
        back = {id(rounded[id(param)]): param for _, _, param in held}
        for table, name, param in held:
            table[name] = param
        for values in lists:
            values[:] = [back.get(id(value), value) for value in values]


class _Through(torch.autograd.Function):
    """The rounded value of a parameter, with the parameter's gradient."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _recurrent_lists(module: nn.Module) -> list[list[Any]]:
    """The lists in which dense recurrent layers keep their parameters a second time."""
    layers = (m for m in module.modules() if isinstance(m, nn.RNNBase))
    return [vars(m)["_flat_weights"] for m in layers if "_flat_weights" in vars(m)]
