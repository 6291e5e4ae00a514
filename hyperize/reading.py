"""What a reader from outside gets for a generated weight: a tensor to read, not to write.

A generated weight is made anew each time it is read, so what is written to it, or hung on it, would
be gone with the next read, without a word. Reading operations give plain tensors here. Operations
that write into the weight's memory, or that ask for its gradient, raise an error with the remedy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from hyperize.config import WeightError

__all__ = ["GeneratedWeight"]

_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
_READING = ("__int__", "__index__", "__invert__", "__iter__")
"""Methods of tensors that are named like the in-place operators, but read."""
_REMEDY = (
    "it is computed by the hypernetwork whenever it is read. Change the parameters it is computed "
    "from, prepare the dense model before hyperize(), or make this layer dense with "
    "to_dense(hyper, include=...)"
)


class GeneratedWeight(Tensor):
    """A generated weight, or a view of one, in the hands of a reader.

    Make it with `guarded`. It answers `isinstance(weight, nn.Parameter)` as the dense parameter
    does, so that loops which sort parameters by type find it, and optimizers refuse it aloud.
    """

    _is_param = True
    _plain: Tensor
    _title: str

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        weights = list(_weights((*args, *given.values())))
        name = getattr(func, "__name__", "").split(".")[0]  # of an operator, less its overload
        owner = getattr(getattr(func, "__self__", None), "__name__", "")  # of a property
        if func is torch.autograd.grad:
            return _grad(args, given)
        if problem := _problem(name, owner, args, given):
            raise WeightError(f"{weights[0]._title} cannot {problem}: {_REMEDY}.")
        if name == "__get__" and owner == "is_leaf":
            if sys._getframe(1).f_globals.get("__name__") == "torch.optim.optimizer":
                raise WeightError(
                    f"{weights[0]._title} cannot be optimized: {_REMEDY}. The parameters to "
                    "optimize are those of hyper.parameters(), or of hyperize.param_groups(hyper)."
                )
            return False  # also under no_grad
        result = func(*_plain(args), **_plain(given))
        if name == "numpy":
            result.flags.writeable = False  # it may lie in the weight's memory
        if isinstance(result, Tensor):
            return _guarded_view(result, weights)
        if type(result) in (tuple, list):  # chunks and such
            return type(result)(
                _guarded_view(part, weights) if isinstance(part, Tensor) else part
                for part in result
            )
        return result

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Refused; of all operators this one does not ask `__torch_function__`."""
        raise WeightError(f"{self._title} cannot be changed in place by set_: {_REMEDY}.")


def guarded(weight: Tensor, title: str) -> GeneratedWeight:
    """A weight that has just been generated, for a reader from outside.

    Args:
        weight: A plain tensor; it shares its memory and its graph with the result.
        title: What errors call it, as "weight of GeneratedConv2d".
    """
    with torch._C.DisableTorchFunctionSubclass():
        result = weight.as_subclass(GeneratedWeight)
    result._plain, result._title = weight, title
    return result


def _problem(name: str, owner: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What a call would do to a weight that it cannot do; empty if it only reads."""
    first = args[0] if args else next(iter(kwargs.values()), None)  # torch.nn.init names it
    if name == "__set__":
        return f"have its {owner} set"
    if name == "__get__" and owner == "grad":
        return "have a gradient that lasts"
    if name in _HOOKS:
        return f"keep what {name} is for"
    if _has_weight(kwargs.get("out")):
        return "be written to by out="
    if name == "backward" and _has_weight(kwargs.get("inputs")):
        return "have a gradient that lasts"
    if kwargs.get("inplace") or kwargs.get("max_norm") is not None:
        return f"be changed in place by {name}"
    if name == "__get__" and owner == "grad_fn" and _registers():
        return "become a parameter of another layer"
    # PyTorch names what works in place with an underscore at the end, or as Python's operators
    in_place = name.endswith("_") and not name.endswith("__")
    operator = name.startswith("__i") and name not in _READING
    if (in_place or operator or name == "__setitem__") and _has_weight(first):
        return f"be changed in place by {name}" if in_place else f"take {name}"
    return ""


def _registers() -> bool:
    """Whether nn.Module asks, which registers a tensor without a graph as a parameter."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "register_parameter"


def _grad(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """torch.autograd.grad; a weight that was read is only in graphs that were made of it."""
    asked = args[1] if len(args) > 1 else kwargs["inputs"]
    inputs = (asked,) if isinstance(asked, Tensor) else tuple(asked)
    message = (
        "torch.autograd.grad is asked for the gradient of a generated weight that this graph does "
        f"not hold: {_REMEDY}; what a layer's own forward made is another tensor than this one."
    )
    try:
        grads = torch.autograd.grad(*_plain(args), **_plain(kwargs))
    except RuntimeError as error:
        if "appears to not have been used" in str(error):
            raise WeightError(message) from error
        raise
    for grad, source in zip(grads, inputs, strict=True):
        if grad is None and isinstance(source, GeneratedWeight):
            raise WeightError(message)
    return grads


def _weights(values: Iterable[Any]) -> Iterator[GeneratedWeight]:
    """The guarded weights among arguments, also inside lists."""
    for value in values:
        if isinstance(value, GeneratedWeight):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _weights(value)
        elif isinstance(value, dict):
            yield from _weights(value.values())


def _has_weight(value: Any) -> bool:
    """Whether an argument is a guarded weight, or a list with one."""
    return next(_weights((value,)), None) is not None


def _plain(value: Any) -> Any:
    """Arguments with plain tensors in the places of guarded weights."""
    if isinstance(value, GeneratedWeight):
        return value._plain
    if isinstance(value, (tuple, list)):
        parts = [_plain(part) for part in value]
        if hasattr(value, "_fields"):
            return type(value)(*parts)
        return type(value)(parts)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return value


def _guarded_view(result: Tensor, weights: list[GeneratedWeight]) -> Tensor:
    """The result of reading; guarded if it lies in a weight's memory, and plain otherwise."""
    if type(result) is not Tensor:
        return result
    with suppress(NotImplementedError):  # inside vmap, where nothing has a storage to ask for
        for weight in weights:
            if result is weight._plain or _storage(result) == _storage(weight._plain):
                return guarded(result, weight._title)
    return result


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
