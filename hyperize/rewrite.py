"""`hyperize`, `to_dense`, `dense_state_dict`: mirror images of each other.

`hyperize` plans first, which raises every error, then computes what it needs, and only then edits
the tree. Neither direction touches the user's model unless `inplace=True`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from hyperize.config import ConfigError, HyperConfig, ModelError
from hyperize.dynamic import HyperLSTM, HyperRNN, dynamic_twin
from hyperize.hypernet import HyperNet, moments
from hyperize.layers import EMBEDDING, Generated, densify_params, generate_params
from hyperize.planning import Plan, PlannedSite, make_plan
from hyperize.sites import HYPERNET, fresh_hooks, structural_copy, wrapper_of

__all__ = ["dense_state_dict", "hyperize", "to_dense"]

_GATHER = "gather a full state dict and load it into an unsharded hyperized model first"


def hyperize(
    model: nn.Module,
    config: HyperConfig | Plan | None = None,
    *,
    inplace: bool = False,
    **overrides: Any,
) -> nn.Module:
    """Rewrites a model so that one shared hypernetwork generates its convolution and LSTM weights.

    The result has the model's class, tree and methods. Each target's weight is replaced by
    embeddings, `<path>.<param>_embedding`, from which the hypernetwork, registered once as
    `hypernet`, computes it whenever it is read (static hypernetwork, arXiv 1609.09106, sec. 3.1).
    At initialisation each generated weight has the mean and standard deviation of the weight that
    it replaces; a constant weight starts exactly so. Values are not fitted.

    Args:
        model: A plain model on one device; on meta, the result is on meta too and has to be loaded.
        config: The request, or a plan of this model; the default request if `None`.
        inplace: Rewrite `model` itself, instead of a copy that shares nothing with it.
        **overrides: Fields of `HyperConfig` that replace the config's, e.g. `compression=20`;
            none with a plan.

    Returns:
        The hyperized model. Training flags, buffers and all other parameters are as they were.

    Raises:
        ModelError: The model, or a selected layer, is of a kind that cannot be rewritten, holds
            weights that are not finite, or cannot be copied.
        ConfigError: An option is invalid, or a target or pattern matches nothing.
        BudgetError: The request cannot be met.
    """
    if isinstance(config, Plan) and overrides:
        raise ConfigError(
            f"a plan was given, which {next(iter(overrides))} cannot change any more; pass it to "
            "make_plan or fit_plan."
        )
    plan = config if isinstance(config, Plan) else make_plan(model, config, **overrides)
    return apply_plan(model, plan, inplace=inplace)


def apply_plan(model: nn.Module, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """Rewrites a model as planned; `hyperize` without the planning.

    Args:
        model: The model that the plan was made for, or one with the same layers.
        plan: A plan from `make_plan`.
        inplace: Rewrite `model` itself instead of a copy.

    Raises:
        ModelError: The model does not have the plan's layers and shapes, holds weights that are
            not finite, cannot be copied, or is itself a recurrent layer to be replaced in place.
    """
    twins = _dynamic_twins(model, plan, inplace)
    weights = [_planned_weight(model, planned) for planned in plan.sites]
    if weights:
        hypernet = HyperNet(plan, _widest(weights), weights[0].device)
    else:
        hypernet = HyperNet(plan, device=next(twins[0].parameters()).device)
    with torch.no_grad():
        embeddings = _initialise(hypernet, weights, _generator(plan.config.seed))
    if not inplace:
        model = _copy(model, shared=weights)
    for path, indices in plan.layers().items():
        generate_params(
            model.get_submodule(path),
            {param: embeddings[at] for param, at in indices.items()},
            indices,
            hypernet,
        )
    for site, twin in zip(plan.dynamic, twins, strict=True):
        twin.train(model.get_submodule(site.path).training)
        if site.path == "":
            model = twin
        for path in (site.path, *site.aliases) if site.path else ():
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent)._modules[name] = twin
    model.get_submodule(plan.host).add_module(HYPERNET, hypernet.train(model.training))
    return model


def to_dense(hyper: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The dense model with the weights that the hypernetwork generates now.

    Args:
        hyper: A hyperized model; not wrapped by DDP, FSDP or torch.compile.
        inplace: Convert `hyper` itself, instead of a copy that shares nothing with it.

    Returns:
        A model of the original's classes with plain parameters, the same outputs bit for bit, and
        nothing of hyperize left: its state dict loads strictly into a fresh original.

    Raises:
        ModelError: The model is not hyperized, is wrapped or sharded, cannot be copied, or has
            dynamic layers.
    """
    host, _ = _convertible(hyper)
    if not inplace:
        hyper = _copy(hyper)
    return _densify(hyper, host)


def dense_state_dict(hyper: nn.Module) -> dict[str, Tensor]:
    """The state dict of the dense model: the original's keys, order and dtypes.

    Args:
        hyper: A hyperized model; not changed. Tensors other than the generated ones are shared
            with it, as in any state dict.

    Raises:
        ModelError: As in `to_dense`.
    """
    host, _ = _convertible(hyper)
    return _densify(structural_copy(hyper, lambda tensor: tensor), host).state_dict()


def find_hypernet(hyper: nn.Module) -> tuple[str, HyperNet]:
    """The hypernetwork of a hyperized model, and the path of the module that it is registered in.

    Raises:
        ModelError: There is none, or the model is wrapped or sharded.
    """
    if not isinstance(hyper, nn.Module):
        raise ModelError(f"expected a hyperized torch.nn.Module, got {type(hyper).__name__}.")
    if wrapper := wrapper_of(hyper):
        advice = _GATHER if "FSDP2" in wrapper[0] else "pass the model inside it"
        raise ModelError(f"the model is wrapped by {wrapper[0]}; {advice}.")
    for path, module in hyper.named_modules():
        if isinstance(module, HyperNet):
            if any(type(p).__name__ == "DTensor" for p in module.parameters()):
                raise ModelError(
                    f"the hypernetwork is sharded (its parameters are DTensors); {_GATHER}."
                )
            return path.rpartition(".")[0], module
    part = "only a part of a hyperized model" if generated_layers(hyper) else "not hyperized"
    raise ModelError(
        f"{type(hyper).__name__} is {part}: it has no hypernetwork. Pass the model that "
        "hyperize() returned."
    )


def generated_layers(hyper: nn.Module) -> dict[str, Generated]:
    """The generated layers of a hyperized model by path."""
    return {path: m for path, m in hyper.named_modules() if isinstance(m, Generated)}


def _densify(hyper: nn.Module, host: str) -> nn.Module:
    # Every weight is computed before the first layer is changed.
    layers = list(generated_layers(hyper).values())
    shapes: dict[Any, Tensor] = {}
    with torch.no_grad():
        weights = [
            {name: _dense_parameter(layer, name, shapes) for name in layer.generated}
            for layer in layers
        ]
    for layer, params in zip(layers, weights, strict=True):
        densify_params(layer, params)
    del hyper.get_submodule(host)._modules[HYPERNET]
    return hyper


def _dense_parameter(layer: Generated, name: str, shapes: dict[Any, Tensor]) -> nn.Parameter:
    """The weight as a parameter; on meta, where it is only a shape, each of `shapes` once."""
    embedding = getattr(layer, name + EMBEDDING)
    if not embedding.is_meta:
        weight = layer.generate(name).clone()
    else:
        plan = cast(HyperNet, layer._hypernet).plan
        key = plan.sites[layer._site_index[name]].grid, embedding.dtype
        if key not in shapes:
            shapes[key] = layer.generate(name).detach()
        weight = torch.empty_like(shapes[key])
    return nn.Parameter(weight, requires_grad=embedding.requires_grad)


def _convertible(hyper: nn.Module) -> tuple[str, HyperNet]:
    """`find_hypernet` of a model that has a dense equivalent."""
    host, hypernet = find_hypernet(hyper)
    dynamic = [path for path, m in hyper.named_modules() if isinstance(m, (HyperLSTM, HyperRNN))]
    planned = {site.path for site in hypernet.plan.dynamic}
    if found := [path or "the model itself" for path in dynamic if path in planned]:
        raise ModelError(
            f"{', '.join(found)} is a dynamic hypernetwork (HyperLSTM, HyperRNN): its weights "
            "depend on the input, so it has no dense equivalent. Save and run the hyperized model "
            'as it is, or hyperize with lstm="static".'
        )
    return host, hypernet


def _dynamic_twins(model: nn.Module, plan: Plan, inplace: bool) -> list[HyperLSTM | HyperRNN]:
    """A freshly drawn layer for each that the plan makes dynamic."""
    layers = []
    for site in plan.dynamic:
        try:
            layer = model.get_submodule(site.path)
        except AttributeError as error:
            raise ModelError(f"the plan names {site.path}, which the model lacks.") from error
        if not isinstance(layer, (nn.LSTM, nn.RNN)):
            raise ModelError(
                f"the plan makes {site.path or 'the model'!r} dynamic, which is a "
                f"{type(layer).__name__} and not an nn.LSTM or nn.RNN."
            )
        if site.path == "" and inplace:
            raise ModelError(
                "the model is itself the recurrent layer to be replaced, which cannot be done in "
                "place; use the model that hyperize() returns without inplace=True."
            )
        layers.append(layer)
    if not layers:
        return []
    options = dict(plan.config.lstm_options)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(_generator(plan.config.seed).get_state())
        twins = []
        for layer in layers:
            device = next(layer.parameters()).device
            # Drawn on the CPU, so that a seed gives the same everywhere
            drawn = dynamic_twin(layer, options, "meta" if device.type == "meta" else "cpu")
            twins.append(drawn.to(device))
    for site, twin in zip(plan.dynamic, twins, strict=True):
        if sum(p.numel() for p in twin.parameters()) != site.hyper_params:
            raise ModelError(f"{site.path or 'the model'!r} has other sizes than the plan's.")
    return twins


def _planned_weight(model: nn.Module, planned: PlannedSite) -> nn.Parameter:
    site = planned.site
    try:
        weight = model.get_parameter(site.name)
    except AttributeError as error:
        raise ModelError(f"the plan names {site.name}, which the model does not have.") from error
    if tuple(weight.shape) != site.shape:
        raise ModelError(
            f"the plan has {site.name} of shape {site.shape}, the model {tuple(weight.shape)}."
        )
    return weight


def _initialise(
    hypernet: HyperNet, weights: list[nn.Parameter], generator: torch.Generator
) -> list[nn.Parameter]:
    """Draws hypernetwork and embeddings, and sets each site's constants by its dense weight.

    One random draw has neither exactly the variance nor the mean that it has in expectation, so
    each site's embeddings and offset are corrected by the moments of what they would generate.
    """
    sites = hypernet.plan.sites
    shapes = [(planned.grid.tiles, hypernet.embedding_dim) for planned in sites]
    if not weights:
        return []
    if weights[0].is_meta:
        return [
            nn.Parameter(torch.empty_like(weight).new_empty(shape))
            for weight, shape in zip(weights, shapes, strict=True)
        ]
    statistics = [_mean_std(weight, p.site.name) for weight, p in zip(weights, sites, strict=True)]
    hypernet.reset_parameters(generator)
    embeddings = []
    grams: dict[tuple[str, int], Tensor] = {}
    for at, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
        mean, std = statistics[at]
        z = torch.randn(shape, generator=generator, device="cpu").to(hypernet.scale)
        if std > 0:
            drawn_mean, drawn_std = hypernet.moments(z, at, grams)
            # Of channels, two embeddings are multiplied
            z /= drawn_std.sqrt() if hypernet.channelwise else drawn_std
            hypernet.scale[at] = std
            hypernet.offset[at] = mean - std * drawn_mean / drawn_std
        else:
            # Constant weights (those of zero-initialised layers among them) start exactly so, and
            # learn through their embeddings at the pace of a layer of fan-in variance.
            z[: sites[at].grid.rows if hypernet.channelwise else None] = 0
            hypernet.scale[at] = 1 / math.sqrt(math.prod(weight.shape[1:]))
            hypernet.offset[at] = mean
        embeddings.append(nn.Parameter(z.to(weight.dtype)))
    return embeddings


def _mean_std(weight: Tensor, name: str) -> tuple[float, float]:
    """Mean and standard deviation of a dense weight; exactly (value, 0) of a constant one."""
    weight = weight.detach()
    single = torch.promote_types(weight.dtype, torch.float32)
    mean, std = (float(t) for t in moments(weight.to(single)))
    if not (math.isfinite(std) and math.isfinite(mean)):
        raise ModelError(
            f"{name} holds values that are not finite, so there is nothing to start from; "
            "initialise or load the model first."
        )
    # The standard deviation of a constant is rounding noise, and so needs a second look.
    if std <= 1e-5 * abs(mean) and bool((weight == (first := weight.flatten()[0])).all()):
        return float(first), 0.0
    return mean, std


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator("cpu")
    if seed is None:
        generator.set_state(torch.get_rng_state())  # reads the global state, does not advance it
    else:
        generator.manual_seed(seed)
    return generator


def _widest(weights: list[nn.Parameter]) -> torch.dtype:
    dtype = weights[0].dtype
    for weight in weights:
        dtype = torch.promote_types(dtype, weight.dtype)
    return dtype


def _copy(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy, except for tensors that the caller is about to replace."""
    try:
        return copy.deepcopy(model, fresh_hooks(model) | {id(tensor): tensor for tensor in shared})
    except Exception as error:  # any model code can run here, and raise anything
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); convert "
            "it with inplace=True."
        ) from error
