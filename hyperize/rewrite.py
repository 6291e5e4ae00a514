"""`hyperize`, `to_dense`, `dense_state_dict`: mirror images of each other.

`hyperize` plans first, which raises every error, then computes what it needs, and only then edits
the tree. Neither direction touches the user's model unless `inplace=True`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from hyperize.calls import as_in_a_call, install, uninstall
from hyperize.conditions import conditions_of, held
from hyperize.config import ConfigError, HyperConfig, ModelError, Overrides
from hyperize.dynamic import HyperLSTM, HyperRNN, dynamic_twin
from hyperize.factorized import Factoring
from hyperize.hypernet import HyperNet, moments
from hyperize.layers import (
    HYPERNET,
    Generated,
    densify_params,
    generate_params,
    generated_class,
)
from hyperize.parts import dynamic_layers, find_groups, generated_layers, own_tables
from hyperize.plan import Plan
from hyperize.private import Private, make_dense, make_private, repeat
from hyperize.search import make_plan
from hyperize.sites import (
    M,
    check_patterns,
    fresh_hooks,
    is_plain,
    matches,
    parameters_of,
    structural_copy,
)

__all__ = ["dense_state_dict", "hyperize", "to_dense"]


def hyperize(
    model: M,
    config: HyperConfig | Plan | None = None,
    *,
    inplace: bool = False,
    **overrides: Unpack[Overrides],
) -> M:
    """Rewrites a model so that one shared hypernetwork generates its convolution and LSTM weights.

    The result has the model's class, tree and methods. In each target's place for a weight are
    embeddings, of the weight's name in the state dict, from which a hypernetwork computes it
    whenever it is read (static hypernetwork, arXiv 1609.09106, sec. 3.1). All these layers share
    the hypernetwork, and each owns it, so that a part of the result is whole: its parameters, its
    state dict and copies of it hold everything that its weights depend on. `hyper.hypernet` refers
    to it. At initialisation each generated weight has the mean and standard deviation of the weight
    that it replaces; a constant weight starts exactly so. Values are not fitted.

    Args:
        model: A plain model on one device; on meta, the result is on meta too and has to be loaded.
        config: The request, or a plan of this model; the default request if `None`.
        inplace: Rewrite `model` itself, instead of a copy that shares nothing with it.
        **overrides: Fields of `HyperConfig` that replace the config's, e.g. `compression=20`;
            none with a plan.

    Returns:
        The hyperized model, of the same class (unless the model is itself a recurrent layer, and
        becomes dynamic). Training flags, buffers and all other parameters are as they were.

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


def apply_plan(model: M, plan: Plan, *, inplace: bool = False) -> M:
    """Rewrites a model as planned; `hyperize` without the planning.

    Args:
        model: The model that the plan was made for, or one with the same layers.
        plan: A plan from `make_plan`.
        inplace: Rewrite `model` itself instead of a copy.

    Raises:
        ModelError: The model does not have the plan's layers and shapes, holds weights that are
            not finite, cannot be copied, or is itself a recurrent layer to be replaced in place.
    """
    root = _check_root(model, plan)
    twins = _dynamic_twins(model, plan, inplace)
    weights = parameters_of(model, [planned.site for planned in plan.sites])
    _check_private(model, plan)
    for path, sites in _by_layer(plan).items():
        generated_class(type(model.get_submodule(path)), tuple(sites))  # may not be registered
    dtype, device = _widest(weights or list(twins[0].parameters()))
    hypernet = HyperNet(plan, dtype, device)
    with torch.no_grad():
        embeddings, constants = _initialise(hypernet, weights, _generator(plan.config.seed))
    if not inplace:
        model = copied(model, shared=weights)
    private = {site.path: site.names for site in plan.private if site.generated}
    for path, sites in _by_layer(plan).items():
        repeat(model.get_submodule(path), private.get(path, ()), plan.networks)
        generate_params(
            model.get_submodule(path),
            {param: embeddings[at] for param, at in sites.items()},
            {param: constants[at] for param, at in sites.items()},
            {param: plan.sites[at] for param, at in sites.items()},
            hypernet,
            _factoring(model.get_submodule(path), plan, sites.values()),
            private.get(path, ()),
        )
    for own in plan.private:
        if not own.generated and hypernet.conditions:
            make_private(model.get_submodule(own.path), own.names, hypernet.conditions)
    for site, twin in zip(plan.dynamic, twins, strict=True):
        twin.train(model.get_submodule(site.path).training)
        if site.path == "":
            model = cast(M, twin)  # the one case in which the class is another
        for path in (site.path, *site.aliases) if site.path else ():
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent)._modules[name] = twin
    if HYPERNET not in (host := model.get_submodule(root))._modules:
        vars(host).setdefault(HYPERNET, hypernet)  # a reference; the layers own it
    install(host)
    return model


def apply_plans(model: M, plans: Sequence[Plan]) -> M:
    """Rewrites a copy of a model by several plans, one for each hypernetwork.

    Raises:
        ModelError: As in `apply_plan`.
    """
    for at, plan in enumerate(plans):
        model = apply_plan(model, plan, inplace=at > 0)
    return model


def to_dense(
    hyper: M,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    condition: Any = None,
    inplace: bool = False,
) -> M:
    """The dense model with the weights that the hypernetwork generates now.

    With `include` or `exclude` only some layers become dense, to freeze, prune, quantize or adapt
    them, and the others stay generated. Output layers of the hypernetwork that no layer needs any
    more are dropped.

    Args:
        hyper: A hyperized model, a part of one, or a model with such parts; not wrapped by DDP,
            FSDP or torch.compile.
        include: Globs over module paths, as `HyperConfig.include`; only matching layers change.
        exclude: Globs over module paths; matching layers stay generated. Wins over `include`.
        condition: Of a model with conditions, which network: as `hyperize.condition` takes it. None
            is the one that such a block around the call names. All layers become dense.
        inplace: Convert `hyper` itself, instead of a copy that shares nothing with it.

    Returns:
        A model of the original's classes with plain parameters, the same outputs bit for bit, and
        nothing of hyperize left: its state dict loads strictly into a fresh original.

    Raises:
        ModelError: The model is not hyperized, is wrapped or sharded, cannot be copied, or has
            dynamic layers among those to convert.
        ConfigError: A pattern is not a string, or matches no layer.
        ConditionError: The model has conditions and none is given, or none of them.
    """
    groups = find_groups(hyper)
    chosen = HyperConfig(include=include, exclude=exclude)
    dynamic = list(dynamic_layers(hyper, groups))
    targets = [*(path for group in groups for path in group.layers), *dynamic]
    for option in ("include", "exclude"):
        paths = ([path] for path in targets)
        check_patterns(option, getattr(chosen, option), paths, "generated layer")
    selected = [
        path
        for path in targets
        if matches([path], chosen.include) and not matches([path], chosen.exclude)
    ]
    if found := [path or "the model itself" for path in dynamic if path in selected]:
        raise ModelError(
            f"{', '.join(found)} is a dynamic hypernetwork (HyperLSTM, HyperRNN): its weights "
            "depend on the input, so it has no dense equivalent. Save and run the hyperized model "
            'as it is, hyperize with lstm="static", or leave it out with exclude=(...).'
        )
    if len(selected) < len(targets) and conditions_of(hyper):
        raise ConfigError(
            "include and exclude leave some layers generated, which have conditions, beside dense "
            "ones of one condition; make all layers dense."
        )
    with held(hyper, condition):
        weights = _dense_weights(hyper, selected)
    if not inplace:
        hyper = copied(hyper)
    _densify(hyper, weights)
    whole = {vars(module).get(HYPERNET) for module in hyper.modules()}
    for group in find_groups(hyper) if len(selected) < len(targets) else ():
        if group.hypernet in whole or not inplace:  # otherwise layers elsewhere may need them
            used = {grid.kernel for layer in group.layers.values() for grid in layer.grids.values()}
            for kernel in [kernel for kernel in group.hypernet.heads if kernel not in used]:
                del group.hypernet.heads[kernel]
    return hyper


def dense_state_dict(hyper: nn.Module, *, condition: Any = None) -> dict[str, Tensor]:
    """The state dict of the dense model: the original's keys, order and dtypes.

    Args:
        hyper: As in `to_dense`; not changed. Tensors other than the generated ones are shared with
            it, as in any state dict.
        condition: As in `to_dense`.

    Raises:
        ModelError: As in `to_dense`.
        ConditionError: As in `to_dense`.
    """
    groups = find_groups(hyper)
    if next(dynamic_layers(hyper, groups), None) is not None:
        to_dense(hyper)  # which says why it cannot be
    with held(hyper, condition):
        weights = _dense_weights(hyper, [path for group in groups for path in group.layers])
    twin = structural_copy(hyper, lambda tensor: tensor)
    _densify(twin, weights)
    return twin.state_dict()


_Weights = dict[str, dict[str, Tensor]]
"""By the layer's path and the name of the parameter or buffer."""


def _dense_weights(hyper: nn.Module, selected: Iterable[str]) -> _Weights:
    """The weights of some generated layers as parameters; nothing is changed."""
    layers = {path: cast(Generated, hyper.get_submodule(path)) for path in selected}
    shapes: dict[Any, Tensor] = {}
    weights: _Weights = {}
    with torch.no_grad(), as_in_a_call(hyper):
        for path, layer in layers.items():
            weights[path] = {n: _dense_parameter(layer, n, shapes) for n in layer.generated}
        for path, owner, name, table in own_tables(hyper):
            conditions = (owner if isinstance(owner, Private) else owner.hypernet).conditions
            weights.setdefault(path, {})[name] = entry_like(table, conditions.select(table))
    return weights


def entry_like(table: Tensor, entry: Tensor) -> Tensor:
    """A copy of an entry of a table, as a parameter or a buffer, as the table is."""
    entry = entry.detach().clone()
    if isinstance(table, nn.Parameter):
        return nn.Parameter(entry, requires_grad=table.requires_grad)
    return entry


def _densify(hyper: nn.Module, weights: _Weights) -> None:
    """Makes some generated layers dense, and forgets hypernetworks without any."""
    for path, tensors in weights.items():
        layer = hyper.get_submodule(path)
        uninstall(layer)
        if isinstance(layer, Private):
            make_dense(layer, tensors)
        else:
            densify_params(cast(Generated, layer), tensors)
    left = {layer.hypernet for layer in generated_layers(hyper).values()}
    for module in hyper.modules():
        referred = vars(module).get(HYPERNET)
        if isinstance(referred, HyperNet) and referred not in left and referred.plan.sites:
            del vars(module)[HYPERNET]
            uninstall(module)


def _dense_parameter(layer: Generated, name: str, shapes: dict[Any, Tensor]) -> nn.Parameter:
    """The weight as a parameter; on meta, where it is only a shape, each of `shapes` once."""
    embedding = layer.embedding(name)
    if not embedding.is_meta:
        weight = layer.generate(name).clone()
    else:
        key = layer.hypernet, layer.grids[name], embedding.dtype
        if key not in shapes:
            shapes[key] = layer.generate(name).detach()
        weight = torch.empty_like(shapes[key])
    return nn.Parameter(weight, requires_grad=embedding.requires_grad)


def _check_root(model: nn.Module, plan: Plan) -> str:
    """The path of the module that is to refer to the hypernetwork."""
    try:
        root = model.get_submodule(plan.root)
    except AttributeError as error:
        raise ModelError(f"the plan names {plan.root}, which the model lacks.") from error
    if hasattr(root, HYPERNET) and not isinstance(vars(root).get(HYPERNET), HyperNet):
        raise ModelError(
            f"{type(root).__name__} has an attribute {HYPERNET!r} already, the name under which "
            "the generator is to be had; rename the attribute."
        )
    return plan.root


def _check_private(model: nn.Module, plan: Plan) -> None:
    for site in plan.private:
        try:
            module = model.get_submodule(site.path)
        except AttributeError as error:
            raise ModelError(f"the plan names {site.path}, which the model lacks.") from error
        own = module._parameters | module._buffers
        if lacking := [name for name in site.names if own.get(name) is None]:
            raise ModelError(f"the plan names {site.path}.{lacking[0]}, which the model lacks.")


def _by_layer(plan: Plan) -> dict[str, dict[str, int]]:
    """Layer path -> generated parameter -> the site's number in the plan."""
    layers: dict[str, dict[str, int]] = {}
    for at, planned in enumerate(plan.sites):
        layers.setdefault(planned.site.path, {})[planned.site.param] = at
    return layers


def _factoring(layer: nn.Module, plan: Plan, sites: Iterable[int]) -> Factoring | None:
    """What decides whether a layer computes with factors; None if it cannot."""
    for at in sites if is_plain(layer) else ():
        planned = plan.sites[at]
        counts = plan.family.factorized_macs(planned.grid, plan.fan_in + 1)
        if plan.factorized_macs(planned) is not None and counts is not None:
            return Factoring(planned.site.dense_params, counts[1])
    return None


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
        for path in (site.path, *site.aliases) if site.path else ():
            if model.get_submodule(path) is not layer:
                raise ModelError(f"the plan has one layer at {site.path} and {path}, not so here.")
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


def _initialise(
    hypernet: HyperNet, weights: list[nn.Parameter], generator: torch.Generator
) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Draws hypernetwork and embeddings, and sets each site's constants by its dense weight.

    One random draw has neither exactly the variance nor the mean that it has in expectation, so
    each site's embeddings and offset are corrected by the moments of what they would generate.

    Returns:
        Embeddings, and scale and offset (2,), of each site; tables of them with conditions.
    """
    sites, config = hypernet.plan.sites, hypernet.plan.config
    if not weights:
        return [], []
    like = next(hypernet.parameters()).detach()
    constants = [like.new_tensor([1.0, 0.0]) for _ in sites]
    shapes = [(planned.grid.tiles, hypernet.embedding_dim) for planned in sites]
    if like.is_meta:
        sets = (config.rows,) if hypernet.conditions else ()
        pairs = zip(weights, shapes, strict=True)
        empty = (weight.detach().new_empty(*sets, *shape) for weight, shape in pairs)
        ends = (config.networks, 2) if config.conditions else (2,)
        return [nn.Parameter(z) for z in empty], [like.new_empty(ends) for _ in sites]
    statistics = [_mean_std(weight, p.site.name) for weight, p in zip(weights, sites, strict=True)]
    hypernet.reset(generator)
    embeddings = []
    grams: dict[tuple[str, int], Tensor] = {}
    for at, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
        mean, std = statistics[at]
        grid = sites[at].grid
        drawn: list[Tensor] = []
        affine: list[list[float]] = []  # scales and offsets
        for _ in range(1 if config.share else config.rows):
            z = torch.randn(shape, generator=generator, device="cpu").to(like)
            if std > 0:
                drawn_mean, drawn_std = hypernet.moments(z, constants[at], grid, grams)
                z /= drawn_std if hypernet.family.degree == 1 else drawn_std.sqrt()
                scale, offset = std, float(mean - std * drawn_mean / drawn_std)
            else:
                # Constant weights (those of zero-initialised layers among them) start exactly so,
                # and learn through their embeddings at the pace of a layer of fan-in variance.
                hypernet.family.silence(z, grid)
                scale, offset = 1 / math.sqrt(math.prod(weight.shape[1:])), mean
            affine.append([hypernet.family.absorb(hypernet, z, grid, scale), offset])
            drawn.append(z)
        if config.conditions:
            times = config.conditions if config.share else 1
            constants[at] = like.new_tensor(affine * times)
        else:  # with a vector, of its slopes too
            constants[at] = like.new_tensor(affine).mean(0)
        z = _table(drawn, config) if hypernet.conditions else drawn[0]
        embeddings.append(nn.Parameter(z.to(weight.dtype)))
    return embeddings, constants


def _table(sets: list[Tensor], config: HyperConfig) -> Tensor:
    """The embeddings of all conditions, (B, tiles, Nz), of one set for each, or one for all."""
    length = config.condition_dim
    if length is None:
        return torch.stack(sets * config.rows if config.share else sets)
    if config.share:
        return torch.stack([sets[0], *(torch.zeros_like(sets[0]) for _ in range(length))])
    # Of unit variance where the vector's components are independent and have it
    base, *slopes = sets
    return torch.stack([math.sqrt(0.5) * base, *(math.sqrt(0.5 / length) * z for z in slopes)])


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


def _widest(weights: list[nn.Parameter]) -> tuple[torch.dtype, torch.device]:
    """The dtype that holds the values of all weights, and the device of the first."""
    dtype = weights[0].dtype
    for weight in weights:
        dtype = torch.promote_types(dtype, weight.dtype)
    return dtype, weights[0].device


def copied(model: M, shared: Iterable[Tensor] = ()) -> M:
    """A deep copy, except for tensors that the caller is about to replace."""
    try:
        return copy.deepcopy(model, fresh_hooks(model) | {id(tensor): tensor for tensor in shared})
    except Exception as error:  # any model code can run here, and raise anything
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); convert "
            "it with inplace=True."
        ) from error
