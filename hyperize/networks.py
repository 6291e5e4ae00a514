"""The networks of a model with conditions: one of them alone, and one more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hyperize.conditions import condition, conditions_of
from hyperize.config import ConditionError
from hyperize.hypernet import HyperNet
from hyperize.layers import CONSTANTS, Generated, generated_class, put
from hyperize.parts import find_groups, generated_layers, private_layers
from hyperize.plan import Plan, PlannedSite
from hyperize.private import make_dense
from hyperize.rewrite import copied, entry_like
from hyperize.sites import M

__all__ = ["add_condition", "at_condition"]


def at_condition(hyper: M, k: Any) -> M:
    """The hyperized model of one condition alone, which needs none to be called.

    For what works on one network: `report`, `as_graph`, `shard`, `save` of a single one.

    Args:
        hyper: A model that was hyperized with conditions; not changed.
        k: As `hyperize.condition` takes it, one for all samples.

    Returns:
        A copy that shares nothing with it. Outputs are equal bit for bit.

    Raises:
        ConditionError: The model has no conditions, or this is none of them.
        ModelError: The model is not hyperized, is wrapped or sharded, or cannot be copied.
    """
    find_groups(hyper)
    with torch.no_grad(), condition(hyper, k):
        if any(conditions.now.each for conditions in conditions_of(hyper)):
            raise ConditionError("one network has one condition; got one for each of some samples.")
        chosen = {
            path: {name: entry_like(table, row) for name, table, row in _rows(layer)}
            for path, layer in generated_layers(hyper).items()
        }
        own = {
            path: {name: entry_like(t, layer.conditions.select(t)) for name, t in _tensors(layer)}
            for path, layer in private_layers(hyper).items()
        }
    alone = copied(hyper)
    for path, private in private_layers(alone).items():
        make_dense(private, own[path])
    for path, layer in generated_layers(alone).items():
        for name, row in chosen[path].items():
            put(layer, name, row)
        layer.__class__ = generated_class(layer.dense_class, layer.generated)
    one = {"conditions": None, "condition_dim": None, "share": False, "private": ()}
    _replan(alone, lambda hypernet: one)
    return alone


def add_condition(hyper: M, like: int = 0) -> M:
    """A model with one more network, which starts equal to another and alone is trained.

    The new network is the last one. Everything but its embeddings, norms and biases is frozen: the
    parameters that all networks share have `requires_grad=False`, and no gradient reaches the
    embeddings of the others. They stay as they are with an optimizer made anew, over `param_groups`
    of the result; saved and loaded again, all of them train.

    Args:
        hyper: A model that was hyperized with `conditions=K`; not changed.
        like: The network that it starts as, from 0 to K - 1.

    Returns:
        A copy with K + 1 networks that shares nothing with it.

    Raises:
        ConditionError: The model has no numbered conditions, or `like` is none of them.
        ModelError: As in `at_condition`.
    """
    find_groups(hyper)
    if any(conditions.length for conditions in conditions_of(hyper)):
        raise ConditionError(
            "the conditions of this model are vectors, to which none can be added."
        )
    if not isinstance(like, int):
        raise ConditionError(f"like must be the number of a network, got {like!r}.")
    with condition(hyper, like):  # which checks it
        longer = copied(hyper)
    longer.requires_grad_(False)
    for layer in generated_layers(longer).values():
        for name, table, _ in list(_tables(layer)) if layer.hypernet.conditions else ():
            put(layer, name, _longer(table, like))
    for private in private_layers(longer).values():
        for name, table in list(_tensors(private)):
            put(private, name, _longer(table, like))
    for conditions in conditions_of(longer):
        conditions.networks += 1
        conditions.trains = torch.arange(conditions.networks) == conditions.networks - 1
    _replan(longer, lambda hypernet: {"conditions": hypernet.conditions.networks})
    return longer


def _tables(layer: Generated) -> Iterator[tuple[str, Tensor, bool]]:
    """Names and tensors with one entry for each condition; whether the tensor is an embedding."""
    for name in layer.generated:
        yield name, layer.embedding(name), True
        if (constants := layer.all_constants(name)).ndim > 1:
            yield name + CONSTANTS, constants, False
    for name in layer.private:
        table = (layer._parameters | layer._buffers)[name]
        assert table is not None
        yield name, table, False


def _rows(layer: Generated) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Names, tables, and what holds of them."""
    for name, table, is_embedding in _tables(layer):
        row = layer.chosen(name) if is_embedding else layer.hypernet.conditions.select(table)
        yield name, table, row


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _longer(table: Tensor, like: int) -> Tensor:
    longer = torch.cat([table.detach(), table.detach()[like : like + 1]])
    return nn.Parameter(longer) if isinstance(table, nn.Parameter) else longer


def _replan(hyper: nn.Module, changes: Callable[[Any], dict[str, Any]]) -> None:
    """Gives hypernetworks that have conditions, and their layers, plans with other requests."""
    replanned = {m for m in hyper.modules() if isinstance(m, HyperNet) and m.conditions}
    for hypernet in replanned:
        plan, config = hypernet.plan, hypernet.plan.config.replace(**changes(hypernet))
        private = plan.private if config.conditions else ()
        hypernet.plan = replace(plan, config=config, private=private)
        hypernet.plan = replace(hypernet.plan, sites=tuple(_placed(hypernet.plan, plan.sites)))
        hypernet.conditions = hypernet.conditions if config.conditions else None
    for layer in generated_layers(hyper).values():
        if layer.hypernet in replanned:
            placed = _placed(layer.hypernet.plan, layer.sites.values())
            layer.sites = dict(zip(layer.sites, placed, strict=True))


def _placed(plan: Plan, sites: Iterable[PlannedSite]) -> Iterator[PlannedSite]:
    """Sites with their places in another plan."""
    heads = {head.kernel: head for head in plan.heads}
    return (plan.place(planned.site, heads) for planned in sites)
