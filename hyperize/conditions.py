"""Conditions: which of the networks that one generator makes is meant, and for how long.

A hyperized model with `conditions=K` has K sets of embeddings, one with `condition_dim=c` has
embeddings that are an affine function of a vector. Both are a table whose rows are weighed: a
condition is the number of a row, or the weights 1, v_1, ..., v_c. `condition` says which holds
inside a block, and each layer asks for it when it reads its embeddings (task embeddings of von
Oswald et al. 2019, arXiv 1906.00695; the client embeddings of pFedHN, arXiv 2103.04628).

Letters of shapes: B rows of a table, which are K or 1 + c; N samples.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from hyperize.config import ConditionError, HyperConfig, ModelError

__all__ = ["condition"]

_KEPT = "_hyperize_conditions"
"""Attribute of a checkpointed region: the conditions that held when it ran first."""
top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


@dataclass(frozen=True, eq=False)
class Active:
    """A condition that holds.

    Attributes:
        rows: Numbers of rows (1,), or weights (1, B); for each sample (N,) or (N, B).
        each: Whether there is one for each sample.
        backward: Number of the backward pass that it was entered in, or -1.
        regions: The checkpointed regions that it was entered in.
        number: Of the one row, where a user has given an integer, which nobody changes.
    """

    rows: Tensor
    each: bool
    backward: int
    regions: tuple[Any, ...]
    number: int | None


class _Local(threading.local):
    now: Active | None = None


class Conditions:
    """The conditions of one hyperized model, which its layers share.

    Args:
        networks: Number K of networks; 0 with a vector.
        length: Length c of the vector; 0 without.

    Attributes:
        trains: Which networks get gradients, (K,); None for all.
    """

    def __init__(self, networks: int, length: int) -> None:
        self.networks, self.length = networks, length
        self.trains: Tensor | None = None
        self._local = _Local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _local=_Local())

    @property
    def now(self) -> Active:
        """The condition that holds in this thread.

        A checkpointed region that runs again in a backward pass, in whatever thread, has the one
        that held when it ran first.

        Raises:
            ConditionError: There is none.
        """
        now = self._local.now
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            now = self._in_regions(now)
        if now is None:
            raise ConditionError(
                "this model has conditions, and none was given. Call it inside "
                f"`with hyperize.condition(model, {'v' if self.length else 'k'}):`, in the same "
                "thread."
            )
        return now

    def _in_regions(self, now: Active | None) -> Active | None:
        """The condition with which the running checkpointed regions ran first, or else `now`."""
        backward = torch._C._current_graph_task_id()
        if backward == -1 and torch.is_grad_enabled() and top_hooks and top_hooks(True) is None:
            return now
        inner: list[dict[Conditions, Active]] = []
        for region in _regions():
            if now is not None and region in now.regions:
                break  # the block was entered in this region, which enters it again when it runs
            inner.append(region.__dict__.setdefault(_KEPT, {}))
            again = backward != -1 and (now is None or now.backward != backward)
            if again and self in inner[-1]:
                now = inner[-1][self]
                break
        if now is not None:
            for kept in inner:
                kept.setdefault(self, now)
        return now

    def select(self, table: Tensor) -> Tensor:
        """What holds of a table: (B, *) -> (*), or (N, *) with one condition for each sample."""
        now = self.now
        rows = now.rows.to(table.device)
        if self.length:
            # (N, B) @ (B, numbers) -> (N, numbers) -> (N, *)
            chosen = (rows.to(table.dtype) @ table.flatten(1)).unflatten(1, table.shape[1:])
        else:
            chosen = table.index_select(0, rows)
            if self.trains is not None:
                trains = self.trains.to(table.device)[rows]
                trains = trains.view(-1, *[1] * (table.ndim - 1))  # (N,) -> (N, 1, ..., 1)
                chosen = torch.where(trains, chosen, chosen.detach())
        result: Tensor = chosen if now.each else chosen.squeeze(0)
        return result

    def key(self) -> int | tuple[Active, int]:
        """What changes with the condition that holds: its number, or who holds it and a version."""
        now = self.now
        return (now, now.rows._version) if now.number is None else now.number

    def read(self, given: Any, device: torch.device) -> Active:
        """A condition as a user gives it.

        Raises:
            ConditionError: It is not one of this model.
        """
        rows = self._vectors(given) if self.length else self._numbers(given)
        each = rows.ndim == (2 if self.length else 1)
        rows = rows.to(device)
        rows = rows if each else rows[None]
        if self.length:
            rows = torch.cat([rows.new_ones(len(rows), 1), rows], 1)  # (N, c) -> (N, 1 + c)
        return Active(
            rows=rows,
            each=each,
            backward=torch._C._current_graph_task_id(),
            regions=tuple(_regions()),
            number=given if isinstance(given, int) else None,
        )

    def _numbers(self, given: Any) -> Tensor:
        rule = (
            f"this model has {self.networks} conditions, so that one is an integer from 0 to "
            f"{self.networks - 1}, or a tensor of those, one for each sample"
        )
        if isinstance(given, bool) or not isinstance(given, (int, Tensor, Sequence)):
            raise ConditionError(f"{rule}; got {given!r}.")
        try:
            numbers = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConditionError(f"{rule}; got {given!r}.") from error
        if numbers.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise ConditionError(f"{rule}; got {numbers.dtype}.")
        if numbers.ndim > 1 or numbers.numel() == 0:
            raise ConditionError(f"{rule}; got the shape {tuple(numbers.shape)}.")
        if _can_look(numbers):
            low, high = int(numbers.min()), int(numbers.max())
            if low < 0 or high >= self.networks:
                raise ConditionError(f"{rule}; got {low if low < 0 else high}.")
        return numbers.to(torch.int64)

    def _vectors(self, given: Any) -> Tensor:
        rule = (
            f"the conditions of this model are vectors of {self.length} numbers, ({self.length},), "
            f"or (N, {self.length}) for one for each sample"
        )
        if not isinstance(given, (Tensor, Sequence)) or isinstance(given, str):
            raise ConditionError(f"{rule}; got {given!r}.")
        try:
            vectors = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConditionError(f"{rule}; got {given!r}.") from error
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != self.length or len(vectors) == 0:
            raise ConditionError(f"{rule}; got the shape {tuple(vectors.shape)}.")
        if vectors.is_complex() or vectors.dtype == torch.bool:
            raise ConditionError(f"{rule}; got {vectors.dtype}.")
        return vectors if vectors.is_floating_point() else vectors.to(torch.get_default_dtype())


def samplewise(
    function: Callable[[dict[str, Tensor], Tensor], Tensor], rows: dict[str, Tensor], x: Tensor
) -> Tensor:
    """Applies a function to each sample with tensors of its own.

    Args:
        function: From the tensors and the sample of one condition to an output.
        rows: The tensors of all N, (N, *).
        x: The samples, (N, *).

    Raises:
        ConditionError: There are not as many samples as conditions.
    """
    n = len(next(iter(rows.values())))
    if len(x) != n:
        raise ConditionError(
            f"{n} conditions were given, one for each sample, and a layer's input has {len(x)} "
            "samples along its first axis."
        )
    result: Tensor = torch.vmap(function, randomness="different")(rows, x)
    return result


def conditions_for(config: HyperConfig) -> Conditions | None:
    """The conditions that a request names; None if there are none."""
    if not config.conditions and not config.condition_dim:
        return None
    return Conditions(config.conditions or 0, config.condition_dim or 0)


@contextmanager
def condition(hyper: nn.Module, k: Any) -> Iterator[None]:
    """Says under which condition a model computes, inside the block.

        hyper = hyperize(model, conditions=4)
        with hyperize.condition(hyper, 3):
            logits = hyper(images)

        hyper = hyperize(model, condition_dim=2)
        with hyperize.condition(hyper, torch.tensor([0.1, 0.7])):
            logits = hyper(images)

    Only this thread is concerned. Blocks can be nested; the innermost counts. The backward pass may
    follow after the block, also through checkpointed regions. Under torch.compile and in a CUDA
    graph the condition is an input: give a tensor on the model's device and write another number
    into it between two replays.

    With one condition for each sample of a batch, convolutions and linear layers compute with
    weights of their own for each. Layers that cannot, such as recurrent ones, raise an error.

    Args:
        hyper: A model that was hyperized with conditions, a part of one, or a model with such
            parts; wrapped or not. Not changed.
        k: With `conditions=K` a number from 0 to K - 1, an integer or an integer tensor. With
            `condition_dim=c` a vector, a tensor (c,) or a sequence; gradients flow to it. With a
            further axis in front, (N,) or (N, c), one for each of N samples.

    Raises:
        ConditionError: The model has no conditions, or this is none of them.
        ModelError: `hyper` is not a module.
    """
    if not isinstance(hyper, nn.Module):
        raise ModelError(f"expected a hyperized torch.nn.Module, got {type(hyper).__name__}.")
    found = conditions_of(hyper)
    if not found:
        raise ConditionError(
            f"{type(hyper).__name__} has no conditions. Hyperize it with conditions=K or "
            "condition_dim=c."
        )
    device = next(hyper.parameters()).device
    for conditions in found:
        if conditions.trains is not None:
            conditions.trains = conditions.trains.to(device)
    given = [(conditions, conditions.read(k, device)) for conditions in found]
    before = [conditions._local.now for conditions in found]
    for conditions, active in given:
        conditions._local.now = active
    try:
        yield
    finally:
        for conditions, outer in zip(found, before, strict=True):
            conditions._local.now = outer


def held(hyper: nn.Module, k: Any) -> AbstractContextManager[None]:
    """`condition`, or for None whatever holds already."""
    return nullcontext() if k is None else condition(hyper, k)


def each_network(hyper: nn.Module) -> Iterator[AbstractContextManager[None]]:
    """A block for each network of a model; with vectors one for that of zero, without any one."""
    found = conditions_of(hyper)
    if not found:
        yield nullcontext()
    for k in range(max((conditions.networks for conditions in found), default=0)):
        yield condition(hyper, k)
    if found and found[0].length:
        yield condition(hyper, [0.0] * found[0].length)


def conditions_of(module: nn.Module) -> list[Conditions]:
    """The conditions of all hyperized parts of a module."""
    found = (vars(part).get("conditions") for part in module.modules())
    return list(dict.fromkeys(c for c in found if isinstance(c, Conditions)))


def _can_look(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be had now."""
    if tensor.is_meta or torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _regions() -> Iterator[Any]:
    """What the checkpointed regions that are running are recorded in, the innermost first.

    torch.utils.checkpoint keeps an object for each region, from its first run to its last. It is
    found among the variables of the functions that are running.
    """
    at: FrameType | None = None if torch.compiler.is_compiling() else sys._getframe(1)
    while at is not None:
        if at.f_globals.get("__name__") == "torch.utils.checkpoint":
            values = at.f_locals
            if (generator := values.get("gen")) is not None and generator.gi_frame is not None:
                values = generator.gi_frame.f_locals
            found = (values.get(name) for name in ("ctx", "frame", "new_frame"))
            yield from (region for region in found if hasattr(region, "__dict__"))
        at = at.f_back
