"""Parameters in few bits: as files store them, and as training sees them that prepares for it.

A matrix is rounded row by row: the largest value of a row becomes the largest whole number of the
bits, and all its values are multiples of one step. Kernels are matrices of a row for each output
channel. Vectors (biases, norms) are few, and become half precision.

torchao's training with rounding puts other classes in the place of linear and embedding layers;
what a weight is generated from is held by neither. So this is hyperize's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperize.caching import version_of
from hyperize.config import ConfigError, ModelError
from hyperize.parts import find_groups, tables

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
    numbers, step, fits = _round(tensor, bits)
    return numbers.to(torch.int8).view(tensor.shape), step.half() if bool(fits) else step


def decode(numbers: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that `encode` has rounded to."""
    return (rows_of(numbers).float() * step.float()[:, None]).view(numbers.shape).to(dtype)


def rows_of(tensor: Tensor) -> Tensor:
    """The matrix whose rows have a step each: one for each index of the first axis of several."""
    while tensor.ndim > 2 and len(tensor) == 1:  # as positions in a ViT, (1, patches, channels)
        tensor = tensor[0]
    return tensor.flatten(1)


def merged(table: Tensor) -> Tensor:
    """The entries of all conditions in one tensor, whose rows are the entries': (B * n, *)."""
    return table.flatten(0, min(1, table.ndim - 1))  # (B, n, *) -> (B * n, *)


def _round(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers and steps in float32, and whether float16 holds all steps.

    The latter is not looked at here, as a GPU would have to be waited for.
    """
    rows = rows_of(tensor.detach().float())
    top = 2 ** (bits - 1) - 1
    step = rows.abs().amax(1) / top
    half = step.half()
    fits = ((step == 0) | (half >= _NORMAL) & half.isfinite()).all()
    step = torch.where(fits, half.float(), step)
    divisor = torch.where(step == 0, torch.ones_like(step), step)
    return (rows / divisor[:, None]).round().clamp(-top, top), step, fits


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
    """Whether a parameter is rounded row by row: a row is longer than its step."""
    return param.is_floating_point() and param.ndim > 1 and param.numel() > 2 * len(rows_of(param))


def nearest(param: Tensor, bits: int, table: bool = False) -> Tensor:
    """What a file of so many bits holds for a parameter, in its dtype; without a graph.

    Args:
        param: The parameter.
        bits: 8 or 4.
        table: Whether it holds one entry for each condition.
    """
    if table:
        return nearest(merged(param), bits).view(param.shape)
    if is_matrix(param):
        numbers, step, _ = _round(param, bits)
        return decode(numbers.view(param.shape), step, param.dtype)
    if not param.is_floating_point() or param.dtype.itemsize <= 2:
        return param.detach()
    half = param.detach().half()
    return torch.where(half.isfinite().all(), half.to(param.dtype), param.detach())


@contextmanager
def quantized(hyper: nn.Module, bits: int) -> Iterator[None]:
    """Inside the block the model computes with the parameters that a file of few bits would hold.

    Training then gets used to the rounding. Gradients pass through it unchanged (straight-through
    estimator, Bengio et al. 2013, arXiv 1308.3432) and arrive at the parameters themselves, which
    an optimizer changes as ever. Enter the block anew for each step, and leave it before gradients
    are clipped and the optimizer makes its step:

        with hyperize.quantized(hyper, 8):
            loss = F.cross_entropy(hyper(images), labels)
            loss.backward()
        optimizer.step()

    All parameters are rounded: embeddings, hypernetwork and what is not generated; buffers are
    stored as they are. Outputs are those of the model that `save(hyper, path, dtype="int8")` and
    `load` give. Inside the block `hyper.parameters()` and the state dict are the rounded values,
    without a `.grad`, so that an optimizer is made before; a copy of the model has them as
    parameters of its own. The backward pass may follow after the block, but with
    `HyperConfig.recompute`. Where the model is checkpointed otherwise, it has to be inside.

    Args:
        hyper: A hyperized model, or a part of one. Its parameters are replaced inside the block and
            come back when it ends.
        bits: 8 or 4.

    Raises:
        ConfigError: `bits` is another number.
        ModelError: The model is not hyperized, is on meta, is wrapped or sharded, or is in such a
            block. When the block ends: parameters were changed or replaced inside. In the backward
            pass: they were changed since the block began; or weights are recomputed and it is over.
    """
    if bits not in BITS or isinstance(bits, bool):
        raise ConfigError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}.")
    block = _Block(recomputes=any(group.hypernet.recompute for group in find_groups(hyper)))
    places: list[tuple[dict[str, Any], str, nn.Parameter]] = [
        (module._parameters, name, param)
        for module in hyper.modules()
        for name, param in module._parameters.items()
        if param is not None
    ]
    for _, name, param in places:
        if not isinstance(param, nn.Parameter):
            raise ModelError(
                f"{name} of the model is no parameter now; quantized() takes a model that is not "
                "in such a block already, and not in a functional call."
            )
        if param.is_meta:
            raise ModelError(f"{name} of the model is on meta, so there is nothing to round.")
    params = {id(param): param for _, _, param in places}
    with torch.inference_mode(False), torch.enable_grad():  # as parameters are, in any mode
        several = tables(hyper)
        rounded = {key: _through(p, bits, block, key in several) for key, p in params.items()}
    before = {key: (version_of(params[key]), version_of(rounded[key])) for key in params}
    try:
        for table, name, param in places:
            table[name] = rounded[id(param)]
        _replace_in_lists(hyper, rounded)
        yield
    finally:
        block.is_open = False
        changed = [
            name
            for table, name, param in places
            if table.get(name) is not rounded[id(param)]
            or (version_of(param), version_of(rounded[id(param)])) != before[id(param)]
        ]
        for table, name, param in places:
            table[name] = param
        _replace_in_lists(hyper, {id(rounded[key]): param for key, param in params.items()})
    if changed:
        raise ModelError(
            f"{changed[0]} was changed inside the block of quantized(), where the rounded values "
            "do not follow, and changes of them are lost. Load and move the model outside, and "
            "leave the block before the optimizer's step."
        )


@dataclass
class _Block:
    """What backward passes need to know of a block.

    Attributes:
        recomputes: Whether weights are generated again in the backward pass.
        is_open: Whether the model has its rounded parameters.
    """

    recomputes: bool
    is_open: bool = True


def _through(param: nn.Parameter, bits: int, block: _Block, table: bool) -> Tensor:
    """The rounded value of a parameter, attached to it."""
    value = nearest(param, bits, table)
    through: Tensor = _Through.apply(param, value, block)
    # Copies are made of this one, as torch copies leaves only and would pickle no parameter
    leaf = nn.Parameter(value, param.requires_grad)
    vars(through).update(__deepcopy__=leaf.__deepcopy__, __reduce_ex__=leaf.__reduce_ex__)
    return through


class _Through(torch.autograd.Function):
    """The rounded value of a parameter, with the parameter's gradient."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, value: Tensor, block: _Block) -> Tensor:
        ctx.param, ctx.version, ctx.block = param, version_of(param), block
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if version_of(ctx.param) != ctx.version:
            raise ModelError(
                "parameters have changed since the block of quantized() began, so that their "
                "rounded values are old; enter it anew for each step of an optimizer."
            )
        if ctx.block.recomputes and not ctx.block.is_open:
            raise ModelError(
                "with HyperConfig.recompute the backward pass generates weights again, which are "
                "not rounded after the block of quantized(); call backward() inside."
            )
        return gradient, None, None


def _replace_in_lists(module: nn.Module, replacements: dict[int, Any]) -> None:
    """Also where dense recurrent layers keep their parameters a second time."""
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase) and "_flat_weights" in vars(layer):
            values = vars(layer)["_flat_weights"]
            values[:] = [replacements.get(id(value), value) for value in values]
