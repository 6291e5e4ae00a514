"""What leaves for other tools: the rewritten graph."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

from hyperize.config import ModelError
from hyperize.layers import EMBEDDING, Generated
from hyperize.rewrite import find_hypernet, generated_layers
from hyperize.sites import HYPERNET, SiteTracer, structural_copy

__all__ = ["as_graph"]


def as_graph(hyper: nn.Module, *, hoist: bool = False) -> fx.GraphModule:
    """The rewritten graph: the hypernetwork's calls are nodes, whose results feed the layers.

    A derived view for reading and for compilers. It shares all tensors with `hyper`, has its
    state-dict keys and outputs, and has the training mode that `hyper` has now, where the model's
    own Python code looks at it.

    Args:
        hyper: A hyperized model that torch.fx can trace; not changed.
        hoist: One call of the hypernetwork at the graph's head generates all weights, each once;
            otherwise each layer's weights are generated where it is called. Layers inside modules
            that timm marks as not to be traced generate their own weights in either case;
            `graph_module.meta["opaque_sites"]` names them.

    Raises:
        ModelError: The model is not hyperized, or cannot be traced.
    """
    host, _ = find_hypernet(hyper)
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
    hypernet = f"{host}.{HYPERNET}" if host else HYPERNET
    insert = _insert_hoisted if hoist else _insert_at_calls
    insert(graph, calls, hypernet)
    reached = {id(module) for _, module in calls}
    module = fx.GraphModule(root, graph, type(hyper).__name__)
    # Opaque modules call the hypernetwork without the graph's knowledge, which may then lack it.
    module.add_submodule(hypernet, root.get_submodule(hypernet))
    for node, layer in calls:
        module.set_submodule(node.target, _Fed(layer))
    module.meta["opaque_sites"] = [path for path, m in layers.items() if id(m) not in reached]
    graph.lint()
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
    graph: fx.Graph, calls: list[tuple[fx.Node, Generated]], hypernet: str
) -> None:
    for node, layer in calls:
        with graph.inserting_before(node):
            weights = tuple(
                graph.call_module(
                    hypernet,
                    (graph.get_attr(f"{node.target}.{name}{EMBEDDING}"), layer._site_index[name]),
                )
                for name in layer.generated
            )
        node.args = (weights, *node.args)


def _insert_hoisted(graph: fx.Graph, calls: list[tuple[fx.Node, Generated]], hypernet: str) -> None:
    slots: dict[int, int] = {}  # site -> its place in the one call's result
    sources = []
    for node, layer in calls:
        for name in layer.generated:
            site = layer._site_index[name]
            if site not in slots:
                slots[site] = len(slots)
                sources.append(f"{node.target}.{name}{EMBEDDING}")
    if not sources:  # every layer is inside an opaque module
        return
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        embeddings = tuple(graph.get_attr(source) for source in sources)
        generated = graph.call_module(hypernet, (embeddings, tuple(slots)))
        weight = [
            graph.call_function(operator.getitem, (generated, at)) for at in range(len(slots))
        ]
    for node, layer in calls:
        feed = tuple(weight[slots[layer._site_index[name]]] for name in layer.generated)
        node.args = (feed, *node.args)
