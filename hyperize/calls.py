"""When the weights of a model are generated together: in each call, or where the user says so.

A hyperized model has two hooks for that. On an accelerator they open a cache (`hyperize.caching`)
when the model is called, and close it when the call ends. A third hook refuses dense state dicts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from hyperize.caching import TAKES_HOOKS, Cache, close_innermost, pays
from hyperize.config import ModelError
from hyperize.hypernet import HyperNet
from hyperize.layers import CONSTANTS, HYPERNET, Generated
from hyperize.parts import find_groups, generated_layers

__all__ = ["cached"]


@contextmanager
def cached(hyper: nn.Module) -> Iterator[None]:
    """Generates each weight once inside the block, together with the others, and keeps it.

    For many calls with the same parameters: evaluation, steps of a recurrent cell, the samples of
    an accumulated gradient. On an accelerator each call of a hyperized model does this by itself,
    for that call; the block is for longer, and for what is called without the model, as
    `hyper.forward_features(x)` or a part.

        with hyperize.cached(hyper), torch.no_grad():
            for images, _ in loader:
                hyper(images)

    Only the thread that entered the block reads the kept weights. Weights are generated anew as
    soon as a parameter has been changed in place, as by an optimizer, and wherever a kept one would
    not do: in another mode of autograd or autocast they are kept besides, and in a checkpointed
    region or a compiled function each layer generates its own. All weights are in memory until the
    block ends, and no graph is kept for a second backward pass.

    The values are those of single weights, but for the rounding of a larger product. Under autocast
    to bfloat16 the products that feed convolutions and linear layers are made in bfloat16.

    Args:
        hyper: A hyperized model, a part of one, or a model with such parts.

    Raises:
        ModelError: It is not hyperized, or is wrapped or sharded.
    """
    find_groups(hyper)
    with Cache(generated_layers(hyper).values()):
        yield


def as_in_a_call(hyper: nn.Module) -> AbstractContextManager[Any]:
    """A context in which weights are those, bit for bit, that a call of the model computes with."""
    layers = [m for m in generated_layers(hyper).values() if _is_automatic(m.hypernet)]
    real = [layer for layer in layers if not layer.embedding(layer.generated[0]).is_meta]
    return Cache(real) if real else nullcontext()


def install(model: nn.Module) -> None:
    """Adds the hooks to a model that refers to its hypernetwork; once.

    Those of calls not with torch 2.6, whose strict export does not take a model with such hooks.
    `cached` works there.
    """
    if not _load_hooks(model):
        model.register_load_state_dict_pre_hook(_refuse_dense)
    if TAKES_HOOKS and _open_call not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_open_call)
        model.register_forward_hook(_close_call, always_call=True)


def uninstall(model: nn.Module) -> None:
    """Removes the hooks."""
    for hooks, ours in (
        (model._forward_pre_hooks, _open_call),
        (model._forward_hooks, _close_call),
    ):
        for number in [number for number, hook in hooks.items() if hook is ours]:
            del hooks[number]
            model._forward_hooks_always_called.pop(number, None)
    for number in _load_hooks(model):
        del model._load_state_dict_pre_hooks[number]


def _load_hooks(model: nn.Module) -> list[int]:
    """The numbers of our hooks among those that run before a state dict is loaded."""
    hooks = model._load_state_dict_pre_hooks
    return [number for number in hooks if getattr(hooks[number], "hook", None) is _refuse_dense]


def _refuse_dense(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Says what to do with the state dict of a dense model, before anything is loaded."""
    for path, layer in generated_layers(model).items():
        for name, grid in layer.grids.items():
            key = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
            given = state.get(key)
            if key + CONSTANTS not in state and getattr(given, "shape", None) == grid.shape:
                raise ModelError(
                    f"the state dict is of a dense model: {key}, of shape {grid.shape}, is "
                    "generated here. fit_(hyper, state_dict) fits the generator to it; "
                    "load_state_dict takes the state dict of a hyperized model."
                )


def _open_call(model: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    hypernet = getattr(model, HYPERNET, None)  # a reference, or a generated layer's own
    if isinstance(hypernet, HyperNet) and _is_automatic(hypernet):
        layers = [m for m in model.modules() if isinstance(m, Generated)]
        Cache(layers, model, sys._getframe(1)).open()


def _close_call(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_compiling():
        close_innermost(model)


def _is_automatic(hypernet: HyperNet) -> bool:
    # Who recomputes weights wants none of them in memory for longer than its layer runs
    first = next(hypernet.parameters(), None)
    return first is not None and not hypernet.recompute and pays(first)
