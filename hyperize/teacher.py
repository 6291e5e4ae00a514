"""Teachers: the weights that are wanted, and what layers multiply for a few batches of data."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hyperize.config import ConfigError, ModelError
from hyperize.layers import CONSTANTS, Generated
from hyperize.moments import Moments, Sum
from hyperize.parts import Group
from hyperize.progress import progress_bar
from hyperize.sites import Site, wrapper_of

__all__: list[str] = []

Batch = Tensor | Sequence[Tensor]
Teacher = nn.Module | Mapping[str, Tensor]

_VECTORS = 2**15
"""Input vectors of a layer, about, from which second moments are estimated."""
_NUMBERS = 2**24
"""Numbers in these vectors, at most about. Of long vectors fewer are taken."""


def teachers_of(groups: list[Group], given: Teacher | Sequence[Teacher]) -> list[Teacher]:
    """One teacher for each network."""
    networks = {group.plan.config.conditions for group in groups}
    if any(group.plan.config.condition_dim for group in groups):
        raise ModelError(
            "the networks of this model are numbered by a vector, so that there are none to fit "
            "to teachers; train it, or hyperize with conditions=K."
        )
    if len(networks) > 1:
        raise ModelError(
            "the parts of this model have different numbers of networks; fit them one by one."
        )
    (count,) = networks
    several = isinstance(given, Sequence) and not isinstance(given, str)
    teachers: list[Any] = [*given] if isinstance(given, Sequence) and several else [given]
    if several != (count is not None) or len(teachers) != (count or 1):
        wanted = "one teacher" if count is None else f"a list of {count} teachers"
        got = f"a list of {len(teachers)}" if several else type(given).__name__
        raise ModelError(f"this model is to be fitted to {wanted}; got {got}.")
    return teachers


def weight_of(site: Site, state: Mapping[str, Tensor]) -> Tensor:
    """The teacher's weight of a site."""
    weight = state.get(site.name)
    if weight is None:
        raise ModelError(
            f"the teacher has no {site.name}, which the hyperized model generates; the teacher "
            "must be of the architecture that was hyperized."
        )
    if not isinstance(weight, Tensor):
        raise ModelError(
            f"the teacher's {site.name} must be a tensor, got {type(weight).__name__}."
        )
    if tuple(weight.shape) != site.shape:
        raise ModelError(
            f"the teacher's {site.name} has the shape {tuple(weight.shape)}, the hyperized "
            f"model generates {site.shape}; the teacher must be of the same architecture."
        )
    if weight.is_meta or not weight.is_floating_point() or not weight.isfinite().all():
        raise ModelError(
            f"the teacher's {site.name} holds values that are not finite numbers; load its "
            "weights first."
        )
    return weight.detach()


def state_of(teacher: Teacher) -> Mapping[str, Tensor]:
    if isinstance(teacher, Mapping):
        if any(str(name).endswith(CONSTANTS) for name in teacher):
            raise ModelError("the teacher's state dict is a hyperized model's; take a dense one's.")
        return teacher
    if not isinstance(teacher, nn.Module):
        raise ModelError(
            f"the teacher must be a torch.nn.Module or a state dict, got {type(teacher).__name__}."
        )
    if wrapper := wrapper_of(teacher):
        raise ModelError(f"the teacher is wrapped by {wrapper[0]}; pass the model inside it.")
    if any(isinstance(module, Generated) for module in teacher.modules()):
        raise ModelError("the teacher is hyperized; convert it with to_dense() first.")
    return teacher.state_dict()


def relative(missed: float, whole: float) -> float:
    """A relative error from two sums of squares; 0 / 0 is none."""
    return math.sqrt(max(missed, 0.0) / whole) if whole > 0 else math.sqrt(max(missed, 0.0))


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


def in_passes(
    teacher: nn.Module, sites: Sequence[Site], batches: list[Tensor], progress: bool = False
) -> Iterator[dict[str, Moments]]:
    """Runs the teacher as often as is needed for the moments of all sites to take little memory.

    Yields:
        What `second_moments` returns, for some sites after the other: as many numbers at a time as
        there are weights, `_NUMBERS`, or in the moments of one site, whichever is most.
    """
    limit = max(_NUMBERS, sum(site.dense_params for site in sites))
    chunk: list[Site] = []
    held = 0
    for site in sites:
        groups = getattr(teacher.get_submodule(site.path), "groups", 1)
        numbers = min(_NUMBERS, groups * math.prod(site.shape[1:]) ** 2)
        if chunk and held + numbers > limit:
            yield second_moments(teacher, chunk, batches, progress)
            chunk, held = [], 0
        chunk.append(site)
        held += numbers
    if chunk:
        yield second_moments(teacher, chunk, batches, progress)


@torch.no_grad()
def second_moments(
    teacher: nn.Module, sites: Iterable[Site], batches: list[Tensor], progress: bool = False
) -> dict[str, Moments]:
    """Runs the teacher on the data.

    Returns:
        Moments by the names of the dense parameters; sites that it does not reach are left out.
    """
    numbers: dict[str, dict[str, str]] = {}
    for site in sites:
        numbers.setdefault(site.path, {})[site.param] = site.name
    sums: dict[str, Sum] = {}
    share = 1.0  # of all data, in this batch

    def collect(of: dict[str, str]) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for param, vectors, transposed in _vectors(layer, args, kwargs, share):
                if param in of and vectors.shape[1]:
                    sums.setdefault(of[param], Sum(transposed)).add(vectors)

        return hook

    hooks = [
        teacher.get_submodule(path).register_forward_hook(collect(of), with_kwargs=True)
        for path, of in numbers.items()
    ]
    whole = sum(batch.numel() for batch in batches)
    with torch.random.fork_rng(devices=[]), progress_bar(progress) as bar:
        for batch in bar.track(batches, description="running the teacher"):
            share = batch.numel() / whole
            try:
                teacher(batch)
            except Exception as error:  # any model code can run here, and raise anything
                raise ModelError(
                    f"the teacher cannot run a batch of shape {tuple(batch.shape)} "
                    f"({type(error).__name__}: {error}); data must hold inputs of the model."
                ) from error
    for hook in hooks:
        hook.remove()
    found = {}
    for name in list(sums):
        found[name] = sums.pop(name).moments()
        if not found[name].values.isfinite().all():
            raise ModelError(
                f"what {name} multiplies in the teacher is not finite for this data; check the "
                "data and the teacher."
            )
    return found


_Vectors = tuple[str, Tensor, bool]
"""Name of a parameter, what it multiplies as (groups, samples, columns), and whether the groups and
columns lie along axis 0 of the weight."""


def _vectors(layer: nn.Module, args: Any, kwargs: Any, share: float) -> Iterator[_Vectors]:
    """What the parameters of a layer multiply in one call of it, with a share of all data."""
    inputs = (*args, *kwargs.values())
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        # The outputs of neighbouring inputs overlap where the stride is less than the kernel; the
        # correlation of neighbours is not counted
        x = _batched(inputs[0], layer).flatten(2)  # (N, C, positions)
        # -> (groups, N * positions, C / groups)
        x = x.transpose(1, 2).reshape(-1, layer.groups, layer.in_channels // layer.groups)
        yield "weight", _thinned(x, share).transpose(0, 1), True
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        x = _batched(inputs[0], layer)
        timm = sys.modules.get("timm.layers")  # if it is not there, the layer is not timm's
        if timm and isinstance(layer, timm.Conv2dSame):  # pads in its forward
            x = timm.pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
        yield "weight", _patches(x, layer, share), False
    elif isinstance(layer, nn.Linear):
        yield "weight", _rows(inputs[0], share), False
    elif isinstance(layer, nn.RNNBase):
        yield from _recurrent_vectors(layer, inputs[0], share)
    elif isinstance(layer, nn.RNNCellBase):
        yield "weight_ih", _rows(inputs[0], share), False
        state = inputs[1] if len(inputs) > 1 else None
        state = state[0] if isinstance(state, tuple) else state
        if state is not None:
            yield "weight_hh", _rows(state, share), False
    elif isinstance(layer, nn.MultiheadAttention):
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        parts = [_rows(named[name], share) for name in ("query", "key", "value")]
        for name, x in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts, strict=True):
            yield name, x, False
        if len({part.shape for part in parts}) == 1:
            yield "in_proj_weight", torch.cat(parts), False  # (3, samples, columns)


def _limit(length: int, share: float) -> float:
    """How many vectors of this length are taken of a share of the data, about."""
    return max(1.0, share * min(_VECTORS, _NUMBERS / length))


def _thinned(x: Tensor, share: float) -> Tensor:
    """Some vectors, evenly spread along axis 0."""
    length = math.prod(x.shape[1:])
    return x[:: max(1, int(len(x) / _limit(length, share)))] if x.numel() else x


def _rows(x: Tensor | PackedSequence, share: float) -> Tensor:
    """(..., features) -> (1, samples, features)."""
    x = x.data if isinstance(x, PackedSequence) else x
    return _thinned(x.reshape(-1, x.shape[-1]), share)[None]


def _batched(x: Tensor, layer: Any) -> Tensor:
    """A convolution's input with the batch axis that it may lack."""
    return x if x.ndim == layer.weight.ndim else x[None]


def _patches(x: Tensor, layer: Any, share: float) -> Tensor:
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
    columns = layer.weight[0].numel()
    many = positions / _limit(layer.groups * columns, share)
    thin = max(1, math.floor(many ** (1 / dims)))
    for axis in range(2, 2 + dims):
        x = x[(slice(None),) * axis + (slice(None, None, thin),)]
    # (N, C, *positions, *kernel) -> (N, *positions, C, *kernel) -> (samples, groups, columns)
    x = x.movedim(1, 1 + dims).reshape(-1, layer.groups, columns)
    return _thinned(x, share).transpose(0, 1)


def _recurrent_vectors(
    layer: nn.RNNBase, x: Tensor | PackedSequence, share: float
) -> Iterator[_Vectors]:
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
            yield f"weight_ih_l{level}{direction}", _rows(x, share), False
            # The states after all steps, in place of those before them
            yield f"weight_hh_l{level}{direction}", _rows(h, share), False
        x = y
