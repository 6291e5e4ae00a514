"""`fit_`: brings a hypernetwork as near to trained weights as its form allows, without training.

`hyperize.solver` lowers the squared error by alternating least squares, and `hyperize.teacher` says
what an error of a weight does to its layer's output.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from typing_extensions import Unpack

from hyperize.conditions import conditions_of, each_network
from hyperize.config import BudgetError, ConfigError, HyperConfig, ModelError, Overrides
from hyperize.hypernet import HyperNet
from hyperize.moments import Moments
from hyperize.parts import Group, find_groups, own_tables
from hyperize.plan import Plan
from hyperize.private import Private
from hyperize.rewrite import to_dense
from hyperize.search import plan_sites, requested
from hyperize.sites import Site, find_sites, name_of, structural_copy
from hyperize.solver import Problem, Target, combined
from hyperize.tables import ROWS, Column, Printed, notebook
from hyperize.tables import table as as_table
from hyperize.teacher import (
    Batch,
    Teacher,
    as_batches,
    in_passes,
    relative,
    second_moments,
    state_of,
    teachers_of,
    weight_of,
)

__all__ = ["FitReport", "SiteFit", "fit_", "fit_plan"]

_WORST = 10
"""Weights in the table of a fit of more than `ROWS`."""
_SCORING = 10
"""Sweeps by which `fit_plan` compares plans."""


@dataclass(frozen=True)
class SiteFit:
    """How well one weight was fitted.

    Attributes:
        name: Name of the dense parameter.
        error: Norm of the difference to the teacher's weight over the norm of that weight.
        output_error: The same of the layer's outputs (before the bias) for the teacher's inputs;
            `None` without data, for layers that the data did not reach, and for kinds of layer
            whose inputs are not known.
    """

    name: str
    error: float
    output_error: float | None


@dataclass(frozen=True, repr=False)
class FitReport(Printed):
    """What `fit_` reached. `print(report)` is a summary and a table of the weights.

    Attributes:
        sites: One entry per generated weight, in the plan's order.
        error: The relative error over all weights, each site's divided by its standard deviation.
        history: The objective after each sweep, from the start on, as a share of that of zero
            weights; never grows. With data it is that of the outputs, for inputs to which a tenth
            of equal and independent ones has been added, so that few samples do not lead astray.
        seconds: Wall time.
        notes: Remarks, e.g. on other tensors in which the model differs from the teacher.
    """

    sites: tuple[SiteFit, ...]
    error: float
    history: tuple[float, ...]
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON-ready values."""
        return asdict(self)

    @property
    def output_error(self) -> float | None:
        """The root mean square of the sites' output errors; `None` if there are none."""
        if outputs := [s.output_error for s in self.sites if s.output_error is not None]:
            return math.sqrt(sum(e * e for e in outputs) / len(outputs))
        return None

    @property
    def worst(self) -> SiteFit:
        """The weight with the largest error."""
        return max(self.sites, key=lambda site: site.error)

    def _remarks(self) -> list[str]:
        worst = self.worst
        lines = [
            f"{len(self.sites)} weights fitted in {self.seconds:.1f} s: relative error "
            f"{self.error:.3f}, at most {worst.error:.3f} ({worst.name})"
        ]
        if self.output_error is not None:
            lines.append(
                f"of the layers' outputs {self.output_error:.3f}, root mean square over the layers"
            )
        return [*lines, *(f"note: {note}" for note in self.notes)]

    def _parts(self, width: int) -> Iterator[RenderableType]:
        yield from map(Text, self._remarks())
        yield ""
        shown = list(self.sites)
        if len(shown) > ROWS:
            shown = sorted(shown, key=lambda site: -site.error)[:_WORST]
            yield Text(f"the {_WORST} largest errors; .sites has those of all weights:")
        columns = [Column("weight"), Column("error", number=True, style="yellow")]
        columns += [Column("of outputs", number=True)] if self.output_error is not None else []
        rows = (
            (s.name, f"{s.error:.3f}", "" if s.output_error is None else f"{s.output_error:.3f}")
            for s in shown
        )
        yield as_table(columns, [row[: len(columns)] for row in rows], width)

    def _repr_html_(self) -> str:
        rows = [
            ("all weights", self.error),
            ("outputs of the layers", self.output_error),
            (f"largest: {self.worst.name}", self.worst.error),
        ]
        bars = [(name, (0.0, e), f"{e:.3f}") for name, e in rows if e is not None]
        return notebook(f"{type(self).__name__}: relative errors", bars, self._remarks())


@torch.inference_mode(False)
@torch.enable_grad()
def fit_(
    hyper: nn.Module,
    teacher: Teacher | Sequence[Teacher],
    *,
    data: Iterable[Batch] | None = None,
    weighting: Literal["relative", "absolute"] = "relative",
    sweeps: int = 50,
    tolerance: float = 1e-3,
    progress: bool = True,
) -> FitReport:
    """Fits the hypernetwork and the embeddings to a teacher's weights, in place.

    Nothing else is changed, but that with data the running statistics of batch norms are estimated
    anew, for the fitted weights. The result is deterministic, and does not depend on the values
    that hypernetwork and embeddings had, unless the embeddings are longer than a tile.

    At high compression weights alone fit badly, whatever the generator: at a quarter of a
    ResNet-20's weights two thirds of their norm are missed. A few batches of data help much; the
    rest is won back by training.

    Args:
        hyper: A hyperized model, not wrapped or sharded.
        teacher: A dense model of the architecture that was hyperized, or its state dict; not
            changed. Of a model with `conditions=K` a list of K, one for each network; what is not
            generated and each network has for itself is then copied from them.
        data: Batches of unlabelled inputs of the model, a few hundred samples in all. A batch is a
            tensor, or a sequence of which the first is used, so that a data loader serves. All are
            kept in memory. The teacher runs on them in evaluation mode.
        weighting: Without data, whether the error of a site is divided by the standard deviation
            of its weights (which batch norm would scale away) or taken as it is.
        sweeps: Alternations over the blocks, at most. With data and embeddings of channels the
            weights themselves are fitted first, and then the outputs of one layer after the other,
            each with so many.
        tolerance: A sweep that lowers the objective by less than this share ends the fit.
        progress: Show progress bars, on a terminal and in notebooks.

    Returns:
        The errors of each weight.

    Raises:
        ModelError: `hyper` is not hyperized, is wrapped or has no generated weights; the teacher
            is of another architecture, lacks weights, holds values that are not finite, is itself
            hyperized, or cannot run the data. Nothing is changed then.
        ConfigError: An option is out of its range, or the data is empty. Nothing is changed then.
    """
    start = time.perf_counter()
    _check_options(weighting, sweeps, tolerance)
    groups = find_groups(hyper)
    sites = [planned for group in groups for planned in group.plan.sites]
    if not sites:
        raise ModelError(f"{type(hyper).__name__} has no generated weights to fit.")
    if any(next(group.hypernet.parameters()).is_meta for group in groups):
        raise ModelError("the hyperized model is on meta, so there is nothing to fit; load it.")
    teachers = teachers_of(groups, teacher)
    states = [state_of(one) for one in teachers]
    weights = [{p.site.name: weight_of(p.site, state) for p in sites} for state in states]
    own = [_own(hyper, state) for state in states]
    batches = [] if data is None else as_batches(data)
    runs = [_module(hyper, one, k) for k, one in enumerate(teachers)] if batches else []
    # With closed solutions weights are fitted as they are first, then to outputs, one by one
    at_once = [p.site for g in groups if not g.hypernet.family.closed for p in g.plan.sites]
    known = [second_moments(run, at_once, batches, progress) if at_once else {} for run in runs]
    problems, histories = [], []
    for group in groups:
        of = [planned.site for planned in group.plan.sites]
        like = next(group.hypernet.parameters())
        targets, embeddings = [], []
        for k, wanted in enumerate(weights):
            moments = known[k] if known else {}
            targets += _targets(group.plan, wanted, moments, like, len(weights), k)
            embeddings += [_of_network(_embedding(group, site), group, k) for site in of]
        problem = Problem(group.hypernet, targets, embeddings, weighting, progress)
        problem.start()
        history = problem.alternate(sweeps, tolerance)
        if runs and problem.family.closed:
            passes = (
                {_label(name, len(runs), k): m for name, m in found.items()}
                for k, run in enumerate(runs)
                for found in in_passes(run, of, batches, progress)
            )
            history = problem.fit_outputs(passes, sweeps, tolerance) or history
        problems.append(problem)
        histories.append(history)
    errors = [(p.names[at], *p.errors(at)) for p in problems for at in range(len(p.names))]
    report = FitReport(
        sites=tuple(SiteFit(*site) for site in errors),
        error=relative(*map(sum, zip(*(problem.squares() for problem in problems), strict=True))),
        history=tuple(combined(histories, [problem.whole for problem in problems])),
        seconds=time.perf_counter() - start,
        notes=tuple(_notes(hyper, states[0], [name for name, _, o in errors if o is None], data)),
    )
    statistics = _statistics(hyper, problems, own, batches) if runs else {}
    _write(problems, own, hyper)
    with torch.no_grad():
        for name, buffer in hyper.named_buffers():
            if name in statistics:
                buffer.copy_(statistics[name])
    return report


@torch.inference_mode(False)
@torch.enable_grad()
def fit_plan(
    teacher: nn.Module,
    config: HyperConfig | None = None,
    *,
    data: Iterable[Batch] | None = None,
    progress: bool = True,
    **overrides: Unpack[Overrides],
) -> Plan:
    """Plans a rewrite with the tiles that fit a model's own weights best under the request.

    It fits generators of several tile sizes per kernel size, all within the request, and compares
    what they miss. Data matters here: weights alone are fitted best by smaller tiles than their
    outputs are.

        plan = fit_plan(pretrained, compression=4, data=batches)
        hyper = hyperize(pretrained, plan)
        fit_(hyper, pretrained, data=batches)

    Args:
        teacher: A dense model with trained weights; not changed.
        config: The request; the default one if `None`. It leaves `tile` and `hidden_dim` to the
            planner; generators without a hidden layer are compared. Its `embeddings`, if `None`,
            are "tile".
        data: As in `fit_`.
        progress: As in `fit_`.
        **overrides: Fields of `HyperConfig` that replace the config's.

    Returns:
        The plan that misses least.

    Raises:
        ConfigError: `tile` or `hidden_dim` is given, or as in `make_plan` and `fit_`.
        ModelError: As in `make_plan` and `fit_`.
        BudgetError: As in `make_plan`.
    """
    config = requested(config, overrides)
    if config.embeddings is None:
        config = config.replace(embeddings="tile")
    found, name = find_sites(teacher, config), name_of(teacher)
    base = plan_sites(found, config, name)
    if base.config.tile is not None or base.config.hidden_dim:
        raise ConfigError(
            "fit_plan chooses the tiles of a generator without a hidden layer, so tile and "
            f"hidden_dim must be None, got tile={base.config.tile!r}, "
            f"hidden_dim={base.config.hidden_dim!r}."
        )
    if base.hidden_dim or not base.sites or base.config.embeddings != "tile":
        # Nothing else meets so small a request; or there are dynamic layers alone; or no tiles
        return base
    state = state_of(teacher)
    by_name: dict[str, Moments] = {}
    if data is not None:
        run = _module(teacher, teacher)
        by_name = second_moments(run, found.sites, as_batches(data), progress)
    missed: dict[tuple[tuple[str, int], ...], tuple[float, Plan]] = {}

    def score(trails: Mapping[str, int]) -> float:
        """What a plan with these tiles misses; infinite where it does not meet the request."""
        key = tuple(sorted(trails.items()))
        if key not in missed:
            axis = base.config.trunk_axis
            tile = {k: (1, trail) if axis == 0 else (trail, 1) for k, trail in trails.items()}
            try:
                plan = plan_sites(found, base.config.replace(tile=tile, hidden_dim=0), name)
            except BudgetError:
                return math.inf
            missed[key] = _missed(plan, state, by_name, progress), plan
        return missed[key][0]

    trails = {head.kernel: head.trail for head in base.heads}
    for factor in (0.5, 2):  # first all kernel sizes together, then one by one
        trails = _descend(trails, list(trails), factor, score)
    for kernel in trails if len(trails) > 1 else ():
        for factor in (0.5, 2):
            trails = _descend(trails, [kernel], factor, score)
    _, best = min(missed.values(), key=lambda pair: pair[0])
    return best


def _descend(
    trails: dict[str, int],
    kernels: Sequence[str],
    factor: float,
    score: Callable[[Mapping[str, int]], float],
) -> dict[str, int]:
    """Halves or doubles the tiles of some kernel sizes for as long as less is missed."""
    while True:
        changed = trails | {kernel: max(1, int(trails[kernel] * factor)) for kernel in kernels}
        if changed == trails or score(changed) >= score(trails):
            return trails
        trails = changed


def _missed(
    plan: Plan, state: Mapping[str, Tensor], by_name: Mapping[str, Moments], progress: bool
) -> float:
    """The objective that a short fit of a plan's generator reaches."""
    weights = {planned.site.name: weight_of(planned.site, state) for planned in plan.sites}
    like = next(iter(weights.values()))
    hypernet = HyperNet(plan, device=like.device)
    targets = _targets(plan, weights, by_name, next(hypernet.parameters()))
    shapes = [(planned.grid.tiles, plan.embedding_dim) for planned in plan.sites]
    zeros = [torch.zeros(shape, device=like.device) for shape in shapes]
    problem = Problem(hypernet, targets, zeros, "relative", progress)
    problem.start()
    if any(target.moments for target in targets):
        problem.alternate(_SCORING, 0.0)
    return problem.objective()


_Own = dict[tuple[str, str], Tensor]
"""What a network has for itself and is not generated: by path and name of a table, its entry."""


@torch.no_grad()
def _write(problems: list[Problem], own: list[_Own], hyper: nn.Module) -> None:
    """Copies the results into the model, or a copy of it."""
    for problem, group in zip(problems, find_groups(hyper), strict=True):
        problem.balance()
        group.hypernet.load_state_dict(problem.net.state_dict())
        numbered = ((k, planned.site) for k in range(len(own)) for planned in group.plan.sites)
        for at, (k, site) in enumerate(numbered):
            layer = group.layers[site.path]
            z, (scale, offset) = problem.embedding(at), problem.constants[at].tolist()
            scale = problem.family.absorb(problem.net, z, problem.grids[at], scale)
            _of_network(layer.embedding(site.param), group, k).copy_(z)
            constants = _of_network(layer.all_constants(site.param), group, k)
            constants.copy_(constants.new_tensor([scale, offset]))
    for path, _, name, entries in own_tables(hyper):
        for entry, tensors in zip(entries, own, strict=True):
            if (path, name) in tensors:
                entry.copy_(tensors[path, name])


def _own(hyper: nn.Module, state: Mapping[str, Tensor]) -> _Own:
    """What a teacher has where each network has its own."""
    found = {}
    for path, layer, name, table in own_tables(hyper):
        if name in layer._non_persistent_buffers_set:
            continue
        title = f"{path}.{name}" if path else name
        tensor = state.get(title)
        if not isinstance(tensor, Tensor) or tensor.shape != table.shape[1:]:
            got = None if tensor is None else tuple(tensor.shape)
            raise ModelError(
                f"each network has a {title} of the shape {tuple(table.shape[1:])}, a teacher "
                f"{got}; teachers must be of the architecture that was hyperized."
            )
        found[path, name] = tensor.detach()
    return found


def _of_network(table: Tensor, group: Group, k: int) -> Tensor:
    """A network's part of embeddings or constants."""
    return table[k] if group.plan.config.conditions else table


def _label(name: str, networks: int, k: int) -> str:
    return name if networks == 1 else f"{name} of network {k}"


def _check_options(weighting: Any, sweeps: Any, tolerance: Any) -> None:
    if weighting not in ("relative", "absolute"):
        raise ConfigError(f'weighting must be "relative" or "absolute", got {weighting!r}.')
    if not isinstance(sweeps, int) or isinstance(sweeps, bool) or sweeps < 0:
        raise ConfigError(f"sweeps must be a non-negative integer, got {sweeps!r}.")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise ConfigError(f"tolerance must be a non-negative number, got {tolerance!r}.")


def _embedding(group: Group, site: Site) -> Tensor:
    return group.layers[site.path].embedding(site.param)


def _targets(
    plan: Plan,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    like: Tensor,
    networks: int = 1,
    k: int = 0,
) -> list[Target]:
    """What a plan's generator is fitted to for one network, on its device."""
    return [
        Target(
            name=_label(planned.site.name, networks, k),
            grid=planned.grid,
            weight=weights[planned.site.name].to(like.device),
            moments=moments.get(planned.site.name),
        )
        for planned in plan.sites
    ]


def _module(hyper: nn.Module, teacher: Teacher, k: int = 0) -> nn.Module:
    """The teacher as a module to run, in evaluation mode; shares parameters with the one given."""
    if isinstance(teacher, nn.Module):
        try:  # running it may write into buffers
            return structural_copy(
                teacher, lambda t: t if isinstance(t, nn.Parameter) else t.clone()
            ).eval()
        except Exception as error:  # any model code can run here, and raise anything
            raise ModelError(
                f"the teacher cannot be copied ({type(error).__name__}: {error}); pass its state "
                "dict, or fit without data."
            ) from error
    dense = to_dense(hyper, condition=k if conditions_of(hyper) else None)
    try:
        dense.load_state_dict(teacher)
    except RuntimeError as error:
        raise ModelError(
            f"the teacher's state dict does not fit the dense model, so that data cannot be run "
            f"through it: {error}"
        ) from error
    return dense.eval()


def _notes(
    hyper: nn.Module, state: Mapping[str, Any], blind: list[str], data: Any
) -> Iterator[str]:
    state = {n: t for n, t in state.items() if isinstance(t, Tensor)}
    others = {
        name: tensor
        for name, tensor in hyper.state_dict().items()
        if name in state and isinstance(tensor, Tensor) and state[name].shape == tensor.shape
    }
    differ = [n for n, t in others.items() if not torch.equal(t, state[n].to(t))]
    if differ:
        yield (
            f"{len(differ)} other tensors differ from the teacher's ({differ[0]} first) and were "
            "left as they are"
        )
    if data is not None and blind:
        yield (
            f"{len(blind)} weights ({blind[0]} first) were fitted without the data: their layers "
            "were not reached, or are of a kind whose inputs are not known"
        )


def _statistics(
    hyper: nn.Module, problems: list[Problem], own: list[_Own], batches: list[Tensor]
) -> dict[str, Tensor]:
    """The buffers of all batch norms for the fitted weights, of a copy of the model."""
    try:
        twin = copy.deepcopy(hyper)
        _write(problems, own, twin)
        norms = {path: m for path, m in twin.named_modules() if isinstance(m, _BatchNorm)}
        found: dict[str, list[Tensor]] = {}
        for k, block in enumerate(each_network(twin)):
            with block, torch.random.fork_rng(devices=[]):  # dropout
                update_bn(batches, twin)  # which forgets what it has found for other networks
            for name, buffer in twin.named_buffers():
                if (path := name.rpartition(".")[0]) in norms:
                    private = isinstance(norms[path], Private)
                    found.setdefault(name, []).append((buffer[k] if private else buffer).clone())
    except Exception as error:  # any model code can run here, and raise anything
        raise ModelError(
            "the statistics of the batch norms cannot be estimated from this data "
            f"({type(error).__name__}: {error}); pass larger batches."
        ) from error
    return {
        name: torch.stack(rows) if isinstance(norms[name.rpartition(".")[0]], Private) else rows[-1]
        for name, rows in found.items()
    }
