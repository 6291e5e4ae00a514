"""The rewritten graph of a hyperized model, for reading and for compilers."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

from hyperize.conditions import conditions_of
from hyperize.config import ConditionError, ModelError
from hyperize.hypernet import HyperNet
from hyperize.layers import CONSTANTS, HYPERNET, Generated
from hyperize.parts import find_groups, generated_layers
from hyperize.sites import SiteTracer, structural_copy

__all__ = ["as_graph"]


def as_graph(hyper: nn.Module, *, hoist: bool = False) -> fx.GraphModule:
    """The rewritten graph: the hypernetwork's calls are nodes, whose results feed the layers.

    A derived view for reading and for compilers. It shares all tensors with `hyper`, has its
    state-dict keys and outputs, and has the training mode that `hyper` has now, where the model's
    own Python code looks at it. Its layers compute with weights, also where those of `hyper` do
    with factors (`HyperConfig.factorized`).

    Args:
        hyper: A hyperized model that torch.fx can trace; not changed.
        hoist: One call of each hypernetwork at the graph's head generates all weights, each once;
            otherwise each layer's weights are generated where it is called. Layers inside modules
            that timm marks as not to be traced generate their own weights in either case;
            `graph_module.meta["opaque_sites"]` names them.

    Raises:
        ModelError: The model is not hyperized, or cannot be traced.
        ConditionError: It has conditions.
    """
    find_groups(hyper)
    if conditions_of(hyper):
        raise ConditionError(
            f"{type(hyper).__name__} has conditions, and a graph is of one network: "
            "as_graph(at_condition(hyper, k))."
        )
    root = structural_copy(hyper, lambda tensor: tensor)
    layers = generated_layers(root)
    tracer = SiteTracer(root, layers.values())
    try:
        graph = tracer.trace_defaults(root)
    except Exception as error:  # any model code can run here, and raise anything
        raise ModelError(
            f"torch.fx cannot trace {type(hyper).__name__} ({type(error).__name__}: {error}), so "
            "it has no graph; the hyperized model itself works without one."
        ) from error
    modules = dict(root.named_modules(remove_duplicate=False))
    calls = [
        (node, module)
        for node in graph.nodes
        if node.op == "call_module" and isinstance(module := modules[node.target], Generated)
    ]
    module = fx.GraphModule(root, graph, type(hyper).__name__)
    # The layers own the hypernetworks; these are further names for the graph to call
    names: dict[HyperNet, str] = {}
    for _, layer in calls:
        if layer.hypernet not in names:
            names[layer.hypernet] = f"{HYPERNET}_{len(names)}" if names else HYPERNET
    for hypernet, name in names.items():
        vars(module).pop(name, None)  # what the root refers to by this name is the same
        module.add_submodule(name, hypernet)
    (_insert_hoisted if hoist else _insert_at_calls)(graph, calls, names)
    for node, layer in calls:
        module.set_submodule(node.target, _Fed(layer))
    module.graph = graph
    reached = {id(layer) for _, layer in calls}
    module.meta["opaque_sites"] = [path for path, m in layers.items() if id(m) not in reached]
    module.graph.lint()
    module.recompile()
    return module


class _Fed(nn.Module):
    """A generated layer whose weights arrive as arguments; shares the layer's tensors and keys."""

    def __init__(self, layer: Generated) -> None:
        super().__init__()
        self._parameters = layer._parameters
        self._buffers = layer._buffers
        self._modules = layer._modules
        self.training = layer.training
        self.__dict__["layer"] = layer

    def forward(self, weights: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        layer = self.__dict__["layer"]
        layer.__dict__["training"] = self.training
        return layer.dense_forward(
            dict(zip(layer.generated, weights, strict=True)), *args, **kwargs
        )


def _insert_at_calls(
    graph: fx.Graph, calls: list[tuple[fx.Node, Generated]], names: dict[HyperNet, str]
) -> None:
    for node, layer in calls:
        with graph.inserting_before(node):
            weights = tuple(
                graph.call_module(
                    names[layer.hypernet],
                    (*_sources(graph, node.target, name), layer.grids[name]),
                )
                for name in layer.generated
            )
        node.args = (weights, *node.args)


def _insert_hoisted(
    graph: fx.Graph, calls: list[tuple[fx.Node, Generated]], names: dict[HyperNet, str]
) -> None:
    weights: dict[tuple[Generated, str], fx.Node] = {}
    start = next(iter(graph.nodes))
    for hypernet, target in names.items():
        sources = {
            (layer, name): node.target
            for node, layer in calls
            if layer.hypernet is hypernet
            for name in layer.generated
        }
        with graph.inserting_before(start):
            given = [_sources(graph, path, name) for (_, name), path in sources.items()]
            grids = tuple(layer.grids[name] for layer, name in sources)
            generated = graph.call_module(target, (*map(tuple, zip(*given, strict=True)), grids))
            for at, key in enumerate(sources):
                weights[key] = graph.call_function(operator.getitem, (generated, at))
    for node, layer in calls:
        node.args = (tuple(weights[layer, name] for name in layer.generated), *node.args)


def _sources(graph: fx.Graph, path: Any, name: str) -> tuple[fx.Node, fx.Node]:
    """Nodes of the embeddings and the constants of a generated parameter."""
    return graph.get_attr(f"{path}.{name}"), graph.get_attr(f"{path}.{name}{CONSTANTS}")
