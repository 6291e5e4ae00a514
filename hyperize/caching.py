"""Weights that are generated together and kept for a while: for one call of a model, or in a block.

On an accelerator a weight costs the launches of its operations rather than their arithmetic. So the
weights of all layers are made by one product for each head of the hypernetwork, when the first of
them is read. A `Cache` keeps them, for the layers and in the thread that it was opened for.

A layer that reads its weight gets the kept one only if a weight generated at this moment would be
the same: under the same modes of autograd and autocast, of the same parameters at the same
versions, and outside of checkpointed regions that began since. Otherwise it generates its own.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hyperize.conditions import top_hooks
from hyperize.products import is_transformed
from hyperize.tensors import CHANNELS_LAST, is_sharded
from hyperize.tiling import Grid

__all__: list[str] = []

TOGETHER = 2**25
"""Weights that are made by one product, at most; a larger one is alone.

The gradients of weights that were made together are kept until the last of them is there. Several
products let the memory of the one be used for the next.
"""
TAKES_HOOKS = top_hooks is not None
"""Whether this torch exports models with hooks; those that hide the hooks on tensors do not."""
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


class Layer(Protocol):
    """A generated layer, as far as a cache sees it.

    Attributes:
        hypernet: Its generator.
        generated: Names of the generated parameters.
        apart: Whether all its parameters have to lie in one piece of memory of their own.
        beside: Names of the parameters that lie there behind the generated ones.
        room: Numbers that lie there behind all parameters, and are not used.
        grids: How each generated parameter is cut.
        may_multiply: Whether it may compute with factors, so that its weight is not needed.
        lowered: Whether its forward uses the weight only in what autocast computes in its dtype.
    """

    hypernet: Any
    generated: tuple[str, ...]
    grids: dict[str, Grid]
    lowered: bool
    _parameters: dict[str, Any]

    @property
    def apart(self) -> bool: ...

    @property
    def beside(self) -> tuple[str, ...]: ...

    @property
    def room(self) -> int: ...

    def embedding(self, name: str) -> nn.Parameter: ...

    def chosen(self, name: str) -> Tensor: ...

    def constants(self, name: str) -> Tensor: ...

    def all_constants(self, name: str) -> Tensor: ...

    @property
    def may_multiply(self) -> bool: ...


class _Surroundings(NamedTuple):
    """What must be as it was when the cache was opened."""

    hooks: Any  # on saved tensors; every checkpointed region sets its own
    backward: int  # number of the backward pass that is running, or -1
    modes: int  # number of modes that see every operation


class _Open(threading.local):
    """The open caches of a thread, the innermost last."""

    def __init__(self) -> None:
        self.caches: list[Cache] = []


_open = _Open()
_Member = tuple[Layer, str]


class Cache:
    """Keeps the weights of some layers, each from the first time that it or another is read.

    Args:
        layers: The layers, in the order in which they will probably run.
        model: The model for one call of which the weights are; None if it is for a block.
        call: The frame of that call. When it has ended, the cache serves nobody any more, also
            where it was not closed, as after an interrupt from the keyboard.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        model: nn.Module | None = None,
        call: FrameType | None = None,
    ) -> None:
        self._layers = list(layers)
        self.model = model
        self._call = call
        self._surroundings = _surroundings()
        self._chunks: dict[_Member, _Chunk] | None = None

    def open(self) -> None:
        """Serves this thread from now on."""
        for cache in [cache for cache in _open.caches if cache.is_over()]:
            cache.close()
        _open.caches.append(self)

    def close(self) -> None:
        """Forgets the weights; who holds one keeps it."""
        if self in _open.caches:
            _open.caches.remove(self)
        self._chunks = None

    def __enter__(self) -> None:
        self.open()

    def __exit__(self, *error: object) -> None:
        self.close()

    def is_over(self) -> bool:
        """Whether the call has ended."""
        return self._call is not None and not _is_running(self._call)

    def read(self, layer: Layer, name: str, own: bool, x: Any = None) -> Tensor | None:
        """A weight; None if it has to be generated by itself.

        Args:
            layer: The layer.
            name: The parameter's, generated or `beside`.
            own: Whether the layer's own forward reads it, and not somebody else.
            x: The layer's input, whose memory format a convolution wants its weight to have.
        """
        if self._chunks is None:
            self._chunks = {key: chunk for chunk in _chunks(self._layers) for key in chunk.names()}
        chunk = self._chunks.get((layer, name))
        if chunk is None or _surroundings() != self._surroundings or is_transformed():
            return None
        return None if self.is_over() else chunk.read(layer, name, own, x)


class _Chunk:
    """Weights that are made by one product for each head.

    Attributes:
        members: Layers and parameters, all of one hypernetwork.
    """

    def __init__(self) -> None:
        self.members: list[_Member] = []
        self._made: dict[tuple[Any, ...], _Made] = {}  # by all that decides which tensor is read

    def names(self) -> list[_Member]:
        """Everything that can be read: the members, and what lies behind them."""
        first = self.members[0][0]
        return [*self.members, *((first, name) for name in (first.beside if first.apart else ()))]

    def read(self, layer: Layer, name: str, own: bool, x: Any) -> Tensor | None:
        """As `Cache.read`."""
        z = layer.embedding(name if name in layer.generated else layer.generated[0])
        dtype = _autocast_dtype(z.device.type) if layer.lowered else None
        if dtype is not None and not own:
            return None  # somebody else gets the dtype of the dense parameter
        grad, conditions = torch.is_grad_enabled(), layer.hypernet.conditions
        if conditions is not None and conditions.now.each:
            return None
        condition = None if conditions is None else conditions.key()
        # Weights are kept for each numbered condition, and for the last one that was a tensor
        number = condition if isinstance(condition, int) else None
        mode = grad, torch.is_inference_mode_enabled(), dtype, z.requires_grad, number
        made = self._made.get(mode)
        if made is None or made.condition != condition or not made.is_current(layer, name, z):
            members = [member for member in self.members if _alike(member, z)]
            if forward_ad._current_level >= 0 or not any(other is layer for other, _ in members):
                return None
            # Ordinary tensors in any mode, as parameters are
            with torch.inference_mode(False), torch.set_grad_enabled(grad):
                made = self._made[mode] = _Made(members, dtype, condition)
        return made.read(layer, name, x)


class _Made:
    """Weights that were made together, with what they were made of."""

    def __init__(
        self, members: Sequence[_Member], dtype: torch.dtype | None, condition: Any
    ) -> None:
        self.condition = condition
        first = members[0][0]
        embeddings = [layer.embedding(name) for layer, name in members]
        tables = [layer.all_constants(name) for layer, name in members]
        self._own = {
            member: (z, version_of(z), c, version_of(c))
            for member, z, c in zip(members, embeddings, tables, strict=True)
        }
        self._shared = [
            (owner, key, param, version_of(param)) for owner, key, param in first.hypernet.sources()
        ]
        weights = first.hypernet.together(
            [layer.chosen(name) for layer, name in members],
            [layer.constants(name) for layer, name in members],
            [layer.grids[name] for layer, name in members],
            dtype,
        )
        keys = list(members)
        if first.apart:
            own = [(name, first._parameters[name]) for name in first.beside]
            self._shared += [(first._parameters, n, p, version_of(p)) for n, p in own]
            beside = [getattr(first, name) for name in first.beside]
            trains = weights[0].requires_grad
            buffer = _in_one_buffer([*weights, *beside], first.room)
            weights = [like_a_parameter(w, trains) for w in buffer]
            keys += [(first, name) for name in first.beside]
            self._own |= {(first, name): self._own[members[0]] for name in first.beside}
        self._weights: dict[_Member, Tensor] = dict(zip(keys, weights, strict=True))

    def is_current(self, layer: Layer, name: str, z: Tensor) -> bool:
        """Whether a weight is here, and all that it was made of is as it was."""
        own = self._own.get((layer, name))
        if own is None or own[0] is not z or version_of(z) != own[1]:
            return False
        if version_of(own[2]) != own[3]:
            return False
        for owner, key, param, before in self._shared:
            if owner.get(key) is not param or version_of(param) != before:
                return False
        return True

    def read(self, layer: Layer, name: str, x: Any) -> Tensor:
        """A weight, in the memory format of the layer's input."""
        weight = self._weights[layer, name]
        last = CHANNELS_LAST.get(weight.ndim)
        if last is None or not isinstance(x, Tensor) or x.ndim != weight.ndim:
            return weight
        wanted = x.is_contiguous(memory_format=last) and not x.is_contiguous()
        format = last if wanted else torch.contiguous_format
        if not weight.is_contiguous(memory_format=format):
            # Kept, so that the backward pass need not convert it once more, as cuDNN would
            weight = self._weights[layer, name] = weight.contiguous(memory_format=format)
        return weight


def find(layer: Layer, name: str, own: bool, x: Any = None) -> Tensor | None:
    """A weight from an open cache; None if none serves the layer. Arguments as in `Cache.read`."""
    for cache in reversed(_open.caches):
        if (weight := cache.read(layer, name, own, x)) is not None:
            return weight
    return None


def close_innermost(model: nn.Module) -> None:
    """Closes the cache of the innermost call of a model in this thread, if one is open."""
    for cache in reversed(_open.caches):
        if cache.model is model:
            cache.close()
            return


def pays(tensor: Tensor) -> bool:
    """Whether weights on the tensor's device are made together unless the user says otherwise.

    On a CPU a weight that has just been made is still in the processor's cache when it is used.
    """
    return tensor.device.type != "cpu"


def _in_one_buffer(tensors: Sequence[Tensor], room: int) -> list[Tensor]:
    """The tensors again, one behind the other in memory of their own, attached to the graph.

    It is where cuDNN's recurrent kernels want all weights, followed by all biases, or by room for
    them. Where they lie apart, torch warns and copies them in each call.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    buffer = torch.cat([*flat, flat[0].new_zeros(room)])
    parts = buffer.split([*(len(one) for one in flat), room])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=False)]


def like_a_parameter(weight: Tensor, trains: bool) -> Tensor:
    """The weight, which requires a gradient under no_grad too, as a dense parameter does.

    torch.matmul chooses its kernel by this flag, and different kernels round differently. Without
    it the outputs would not be those of the dense model bit for bit. Under autocast the products
    are of casts, which have no such flag; and autocast would keep the cast of each weight that has
    it, as if it were a parameter.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not trains or torch.is_grad_enabled() or traced or _autocast_dtype(weight.device.type):
        return weight
    with suppress(RuntimeError):  # inside a transform of torch.func, where nothing is a leaf
        return weight.detach().requires_grad_()  # detached, as a view's views do not say so
    return weight


def _chunks(layers: Iterable[Layer]) -> list[_Chunk]:
    """The weights that are made together, in the order of the layers."""
    filling: dict[tuple[Any, ...], _Chunk] = {}
    sizes: dict[tuple[Any, ...], int] = {}
    done = []
    for layer in layers:
        alone = layer.apart or layer.may_multiply
        key = (id(layer.hypernet), layer.lowered, layer if alone else None)
        for name in layer.generated:
            size = math.prod(layer.grids[name].shape)
            if key in filling and not layer.apart and sizes[key] + size > TOGETHER:
                done.append(filling.pop(key))
            if key not in filling:
                filling[key], sizes[key] = _Chunk(), 0
            filling[key].members.append((layer, name))
            sizes[key] += size
    return done + list(filling.values())


def _alike(member: _Member, z: Tensor) -> bool:
    """Whether a weight can be made together with that of the embedding z.

    Frameworks that shard a model or move it piece by piece have put other things in the places of
    the embeddings of layers that are not about to run.
    """
    layer, name = member
    other = layer._parameters.get(name)
    return (
        other is not None
        and type(other) is type(z)
        and not is_sharded(other)
        and other.shape == (*z.shape[:-2], layer.grids[name].tiles, z.shape[-1])
        and other.device == z.device
        and other.dtype == z.dtype
        and other.requires_grad == z.requires_grad
    )


def _surroundings() -> _Surroundings:
    hooks = _checkpoints() if top_hooks is None else top_hooks(True)
    return _Surroundings(hooks, torch._C._current_graph_task_id(), _dispatch_modes())


def _checkpoints() -> int:
    """In how many functions of torch.utils.checkpoint this is; for torch 2.6, which hides hooks."""
    number = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        number += frame.f_globals.get("__name__") == "torch.utils.checkpoint"
        frame = frame.f_back
    return number


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast casts to; None if it is off, which "meta" cannot be asked."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def version_of(tensor: Tensor) -> tuple[int, int, bool]:
    """What changes when a tensor is changed in place, has its data exchanged or is frozen.

    Changes of the values of `tensor.data` cannot be seen by anyone.
    """
    try:
        return tensor._version, tensor.data_ptr(), tensor.requires_grad
    except RuntimeError:  # inference tensors have no version, and stand-ins have no data
        return -1, 0, tensor.requires_grad


def _is_running(call: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is call
