"""What a module holds of hyperized models: generated layers by hypernetwork, with plans as of now.

A module can be the model that `hyperize` returned, a part of it, a model with several such parts,
or one in which layers were copied, replaced or made dense since. Everything here is told from the
layers that are there, and all paths are relative to the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from hyperize.config import ModelError
from hyperize.dynamic import HyperLSTM, HyperRNN
from hyperize.hypernet import HyperNet
from hyperize.layers import HYPERNET, Generated
from hyperize.plan import Plan, PlannedSite
from hyperize.private import Private
from hyperize.sites import Skip, wrapper_of
from hyperize.tensors import is_sharded

__all__: list[str] = []

GATHER = "gather a full state dict and load it into an unsharded hyperized model first"
_GONE = "dense again, or replaced by another layer, since the rewrite"


@dataclass(frozen=True)
class Group:
    """A hypernetwork, and what a module holds of it.

    Attributes:
        hypernet: The hypernetwork.
        layers: The layers it generates for, by path.
        plan: Its plan, of these layers only.
    """

    hypernet: HyperNet
    layers: Mapping[str, Generated]
    plan: Plan


def generated_layers(module: nn.Module) -> dict[str, Generated]:
    """The generated layers of a module by path."""
    return {path: m for path, m in module.named_modules() if isinstance(m, Generated)}


def private_layers(module: nn.Module) -> dict[str, Private]:
    """The layers of a module that exist once for each of several networks, by path."""
    return {path: m for path, m in module.named_modules() if isinstance(m, Private)}


def own_tables(module: nn.Module) -> Iterator[tuple[str, Generated | Private, str, Tensor]]:
    """What is not generated and each network has for itself: path, layer, name and table."""
    for path, layer in module.named_modules():
        if not isinstance(layer, (Generated, Private)):
            continue
        held = layer._parameters | layer._buffers
        for name in layer.private if isinstance(layer, Generated) else held:
            if (table := held[name]) is not None:
                yield path, layer, name, table


def tables(module: nn.Module) -> set[int]:
    """The ids of parameters that hold one entry for each of several conditions."""
    found = {id(table) for *_, table in own_tables(module)}
    for layer in generated_layers(module).values():
        if layer.hypernet.conditions is not None:
            found.update(id(layer.embedding(name)) for name in layer.generated)
    return found


def find_groups(hyper: nn.Module) -> list[Group]:
    """The hypernetworks of a module, in the order of its layers; at least one.

    Raises:
        ModelError: There is none, or the module is wrapped or sharded.
    """
    if not isinstance(hyper, nn.Module):
        raise ModelError(f"expected a hyperized torch.nn.Module, got {type(hyper).__name__}.")
    if wrapper := wrapper_of(hyper):
        advice = GATHER if "FSDP2" in wrapper[0] else "pass the model inside it"
        raise ModelError(f"the model is wrapped by {wrapper[0]}; {advice}.")
    paths: dict[Generated, list[str]] = {}
    roots: dict[HyperNet, str] = {}
    for path, module in hyper.named_modules(remove_duplicate=False):
        if isinstance(module, Generated):
            paths.setdefault(module, []).append(path)
        if isinstance(hypernet := vars(module).get(HYPERNET), HyperNet):
            roots.setdefault(hypernet, path)
    members: dict[HyperNet, dict[Generated, list[str]]] = {}
    for layer, names in paths.items():
        members.setdefault(layer.hypernet, {})[layer] = names
    for hypernet in roots:
        if hypernet.plan.dynamic and not hypernet.plan.sites:
            members.setdefault(hypernet, {})
    if not members:
        dynamic = any(isinstance(m, (HyperLSTM, HyperRNN)) for m in hyper.modules())
        part = "at most a part of a hyperized model with dynamic layers" if dynamic else ""
        raise ModelError(
            f"{type(hyper).__name__} is {part or 'not hyperized'}: it has no hypernetwork. Pass "
            "the model that hyperize() returned, or a part of it with generated layers."
        )
    for hypernet in members:
        if any(map(is_sharded, hypernet.parameters())):
            raise ModelError(
                f"the hypernetwork is sharded (its parameters are DTensors); {GATHER}."
            )
    return [
        Group(
            hypernet,
            {names[0]: layer for layer, names in layers.items()},
            _current(hypernet, layers, roots.get(hypernet)),
        )
        for hypernet, layers in members.items()
    ]


def _current(hypernet: HyperNet, layers: Mapping[Generated, list[str]], root: str | None) -> Plan:
    """The plan of a hypernetwork, of the layers that are there, under the paths that they have."""
    plan = hypernet.plan
    left = {planned.site.name: at for at, planned in enumerate(plan.sites)}
    found: list[tuple[int, PlannedSite]] = []
    steady = True  # whether all layers are where they were, relative to each other
    here, there = (plan.root, root) if root is not None else _shift(layers)
    for layer, names in layers.items():
        for planned in layer.sites.values():
            before = planned.site
            steady &= _moved(before.path, here, there) == names[0]
            site = replace(before, path=names[0], aliases=tuple(names[1:]))
            at = left.pop(before.name, len(plan.sites))
            found.append((at, replace(planned, site=site)))
    skips: list[Skip] = []
    dynamic = []
    if steady:
        gone = (planned.site for planned in plan.sites if planned.site.name in left)
        for skip in (*plan.skips, *(Skip(site.name, _GONE, site.dense_params) for site in gone)):
            if (path := _moved(skip.path, here, there)) is not None:
                skips.append(replace(skip, path=path))
        for site in plan.dynamic:
            if (path := _moved(site.path, here, there)) is not None:
                dynamic.append(replace(site, path=path))
    return replace(
        plan,
        sites=tuple(planned for _, planned in sorted(found, key=lambda pair: pair[0])),
        skips=tuple(skips),
        dynamic=tuple(dynamic),
        heads=tuple(head for head in plan.heads if head.kernel in hypernet.heads),
        root=root if root is not None else there,
    )


def _shift(layers: Mapping[Generated, list[str]]) -> tuple[str, str]:
    """What the paths of a plan start with, and what the layers' paths start with in its place."""
    for layer, (path, *_) in layers.items():
        planned = next(iter(layer.sites.values())).site.path.split(".")
        actual = path.split(".")
        same = 0
        while same < min(len(planned), len(actual)) and planned[-1 - same] == actual[-1 - same]:
            same += 1
        return ".".join(planned[: len(planned) - same]), ".".join(actual[: len(actual) - same])
    return "", ""


def _moved(path: str, here: str, there: str) -> str | None:
    """A path of a plan, with another beginning; None if it does not begin so."""
    if here and path != here and not path.startswith(f"{here}."):
        return None
    rest = path[len(here) :].strip(".")
    return ".".join(part for part in (there, rest) if part)


def difference(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """How a state dict differs from the one that a model has, in a few words; "" if it doesn't.

    Args:
        wanted: The model's own.
        given: The other one.
    """
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    both = [name for name in wanted if name in given]
    others = [name for name in both if given[name].shape != wanted[name].shape]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", others))
    return ", ".join(f"{len(names)} {kind} ({names[0]} first)" for kind, names in kinds if names)


def dynamic_layers(hyper: nn.Module, groups: list[Group]) -> Iterator[str]:
    """The paths of the layers that are dynamic now, of those that the plans made so."""
    planned = {site.path for group in groups for site in group.plan.dynamic}
    for path, module in hyper.named_modules():
        if isinstance(module, (HyperLSTM, HyperRNN)) and path in planned:
            yield path
