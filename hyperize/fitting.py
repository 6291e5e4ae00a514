"""`fit_`: brings a hypernetwork as near to trained weights as its form allows, without training.

The weights of all sites are affine in the embeddings, in the trunk and in the heads, each with the
others held. From the truncated singular value decomposition of the tiles, alternating least squares
goes over these blocks; each is solved by conjugate gradients through the generator itself, so that
padding, folding and every shape of site are what they are in the forward pass.

With data, the error E of a site's weight counts by what it does to the layer's output: trace(E S
E^T), where S are the second moments of the layer's inputs in the teacher.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence
from torch.optim.swa_utils import update_bn

from hyperize.config import BudgetError, ConfigError, HyperConfig, ModelError
from hyperize.hypernet import HyperNet
from hyperize.layers import EMBEDDING, Generated
from hyperize.planning import Grid, Plan, make_plan
from hyperize.rewrite import find_hypernet, generated_layers, to_dense
from hyperize.sites import Site, find_sites, structural_copy, wrapper_of

__all__ = ["FitReport", "SiteFit", "fit_", "fit_plan"]

Teacher = nn.Module | Mapping[str, Tensor]
Batch = Tensor | Sequence[Tensor]

_INNER = 5
"""Conjugate gradients per block and sweep; more of them wait for the other blocks."""
_SCORING = 10
"""Sweeps by which `fit_plan` compares plans."""
_APPROACH = 100
"""Sweeps from a random start, at most."""
_SAMPLES = 8192
"""Input vectors per batch and layer, about, from which second moments are estimated."""


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


@dataclass(frozen=True)
class FitReport:
    """What `fit_` reached. `print(report)` is a summary.

    Attributes:
        sites: One entry per generated weight, in the plan's order.
        error: The relative error over all weights, each site's divided by its standard deviation.
        history: The objective after each sweep, from the start on, as a share of that of zero
            weights; never grows.
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

    def __str__(self) -> str:
        worst = max(self.sites, key=lambda site: site.error)
        lines = [
            f"{len(self.sites)} weights fitted in {self.seconds:.1f} s: relative error "
            f"{self.error:.3f}, at most {worst.error:.3f} ({worst.name})"
        ]
        if outputs := [s.output_error for s in self.sites if s.output_error is not None]:
            mean = math.sqrt(sum(e * e for e in outputs) / len(outputs))
            lines.append(f"of the layers' outputs {mean:.3f}, root mean square over the layers")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@torch.inference_mode(False)
@torch.enable_grad()
def fit_(
    hyper: nn.Module,
    teacher: Teacher,
    *,
    data: Iterable[Batch] | None = None,
    weighting: Literal["relative", "absolute"] = "relative",
    sweeps: int = 50,
    tolerance: float = 1e-3,
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
            changed.
        data: Batches of unlabelled inputs of the model, a few hundred samples in all. A batch is a
            tensor, or a sequence of which the first is used, so that a data loader serves. All are
            kept in memory. The teacher runs on them in evaluation mode.
        weighting: Without data, whether the error of a site is divided by the standard deviation
            of its weights (which batch norm would scale away) or taken as it is.
        sweeps: Alternations over the blocks, at most.
        tolerance: A sweep that lowers the objective by less than this share ends the fit.

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
    _, hypernet = find_hypernet(hyper)
    layers = generated_layers(hyper)
    sites = [
        at
        for at, planned in enumerate(hypernet.plan.sites)
        if planned.site.param in getattr(layers.get(planned.site.path), "generated", ())
    ]
    if not sites:
        raise ModelError(f"{type(hyper).__name__} has no generated weights to fit.")
    targets = _targets(hypernet, sites, _state(teacher))
    embeddings = {at: _embedding(layers, hypernet.plan, at) for at in sites}
    batches = None if data is None else _batches(data)
    moments: dict[int, _Moments] = {}
    if batches is not None:
        which = {at: hypernet.plan.sites[at].site for at in sites}
        found = _second_moments(_module(hyper, teacher), which.values(), batches)
        moments = {at: found[site.name] for at, site in which.items() if site.name in found}
    problem = _Problem(hypernet, embeddings, targets, moments, weighting)
    problem.start()
    history = problem.alternate(sweeps, tolerance)
    report = FitReport(
        sites=tuple(problem.site_fit(at) for at in sites),
        error=problem.error(),
        history=tuple(history),
        seconds=time.perf_counter() - start,
        notes=tuple(_notes(hyper, teacher, problem, batches is not None)),
    )
    statistics = {} if batches is None else _statistics(hyper, problem, batches)
    problem.write(hyper)
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
    **overrides: Any,
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
            planner; generators without a hidden layer are compared.
        data: As in `fit_`.
        **overrides: Fields of `HyperConfig` that replace the config's.

    Returns:
        The plan that misses least.

    Raises:
        ConfigError: `tile` or `hidden_dim` is given, or as in `make_plan` and `fit_`.
        ModelError: As in `make_plan` and `fit_`.
        BudgetError: As in `make_plan`.
    """
    base = make_plan(teacher, config, **overrides)
    if base.config.tile is not None or base.config.hidden_dim:
        raise ConfigError(
            "fit_plan chooses the tiles of a generator without a hidden layer, so tile and "
            f"hidden_dim must be None, got tile={base.config.tile!r}, "
            f"hidden_dim={base.config.hidden_dim!r}."
        )
    if base.hidden_dim or not base.sites or base.config.channelwise:
        # Nothing else meets so small a request; or there are dynamic layers alone; or no tiles
        return base
    state = _state(teacher)
    by_name: dict[str, _Moments] = {}
    if data is not None:
        every = find_sites(teacher, base.config).sites
        by_name = _second_moments(_module(teacher, teacher), every, _batches(data))
    missed: dict[tuple[tuple[str, int], ...], tuple[float, Plan]] = {}

    def score(trails: Mapping[str, int]) -> float:
        """What a plan with these tiles misses; infinite where it does not meet the request."""
        key = tuple(sorted(trails.items()))
        if key not in missed:
            axis = base.config.trunk_axis
            tile = {k: (1, trail) if axis == 0 else (trail, 1) for k, trail in trails.items()}
            try:
                plan = make_plan(teacher, base.config.replace(tile=tile, hidden_dim=0))
            except BudgetError:
                return math.inf
            missed[key] = _missed(plan, state, by_name), plan
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


def _missed(plan: Plan, state: Mapping[str, Tensor], by_name: Mapping[str, _Moments]) -> float:
    """The objective that a short fit of a plan's generator reaches."""
    names = [planned.site.name for planned in plan.sites]
    device = state[names[0]].device
    hypernet = HyperNet(plan, device=device)
    targets = _targets(hypernet, range(len(names)), state)
    shapes = [(planned.grid.tiles, plan.embedding_dim) for planned in plan.sites]
    embeddings = {at: nn.Parameter(torch.zeros(s, device=device)) for at, s in enumerate(shapes)}
    moments = {at: by_name[name] for at, name in enumerate(names) if name in by_name}
    problem = _Problem(hypernet, embeddings, targets, moments, "relative")
    problem.start()
    if moments:
        problem.alternate(_SCORING, 0.0)
    return problem.objective()


@dataclass(frozen=True)
class _Moments:
    """Second moments of the vectors that a weight multiplies.

    Attributes:
        matrix: (groups, columns, columns); the weight is seen as (groups, rows, columns).
        transposed: The weight is seen as (groups, columns, rows) instead.
    """

    matrix: Tensor
    transposed: bool = False

    def weigh(self, error: Tensor) -> Tensor:
        """E S for an error E in the weight's shape."""
        groups, columns, _ = self.matrix.shape
        if self.transposed:
            # (columns of all groups, ...) -> (groups, columns, rows)
            return (self.matrix @ error.reshape(groups, columns, -1)).view_as(error)
        # (rows of all groups, ...) -> (groups, rows, columns)
        return (error.reshape(groups, -1, columns) @ self.matrix).view_as(error)

    def norm(self, weight: Tensor) -> float:
        """Mean square of the outputs that a weight makes, summed over them."""
        return max(0.0, float((weight * self.weigh(weight)).sum(dtype=torch.float64)))

    def norm_of_noise(self, weight: Tensor) -> float:
        """The expectation of `norm` for random values of unit variance in a weight's place."""
        groups, columns, _ = self.matrix.shape
        trace = float(self.matrix.diagonal(dim1=1, dim2=2).sum())
        return trace * weight.numel() / (groups * columns)


class _Problem:
    """The least-squares problem, over copies of the hypernetwork and the embeddings."""

    def __init__(
        self,
        hypernet: HyperNet,
        embeddings: dict[int, nn.Parameter],
        targets: dict[int, Tensor],
        moments: dict[int, _Moments],
        weighting: str,
    ) -> None:
        self.net = copy.deepcopy(hypernet).requires_grad_(False)
        self.net.to(torch.promote_types(hypernet.scale.dtype, torch.float32))
        dtype = self.net.scale.dtype
        self.z = {
            at: list(z.detach().to(dtype, copy=True).split(self._lengths(at)))
            for at, z in embeddings.items()
        }
        """The embeddings of each site; with those of channels, of its two axes apart."""
        self.targets = {at: target.to(dtype) for at, target in targets.items()}
        # Inputs that are always zero say nothing of a weight
        self.moments = {
            at: _Moments(of.matrix.to(dtype), of.transposed)
            for at, of in moments.items()
            if of.matrix.any()
        }
        self.factor: dict[int, float] = {}
        """Weight of a site's error in the objective."""
        for at, target in self.targets.items():
            std, mean = (float(t) for t in torch.std_mean(target, correction=0))
            if std <= 1e-6 * abs(mean) or std == 0:  # constant: any scale does
                std = 1 / math.sqrt(math.prod(target.shape[1:]))
            self.net.scale[at], self.net.offset[at] = std, mean
            if at in self.moments:
                of = self.moments[at]
                self.factor[at] = 1 / (of.norm(target) or std**2 * of.norm_of_noise(target))
            elif self.moments:
                norm = float(target.square().sum())
                self.factor[at] = 1 / (norm or std**2 * target.numel())
            else:
                self.factor[at] = std**-2 if weighting == "relative" else 1.0
        self.whole = sum(self._squares(at, t)[0] for at, t in self.targets.items())

    def generate(self, at: int) -> Tensor:
        """The weight of a site as it is now."""
        z = self.z[at]
        return self.net._generate(z[0] if len(z) == 1 else torch.cat(z), at)

    def _lengths(self, at: int) -> list[int]:
        grid = self._grid(at)
        return [grid.rows, grid.width] if self.net.channelwise else [grid.tiles]

    def _weigh(self, at: int, error: Tensor) -> Tensor:
        weighed = self.moments[at].weigh(error) if at in self.moments else error
        return weighed * self.factor[at]

    def _squares(self, at: int, error: Tensor) -> tuple[float, Tensor]:
        """A site's part of the objective, and half of its gradient."""
        weighed = self._weigh(at, error)
        # Rounding can make next to nothing negative
        return max(0.0, float((error * weighed).sum(dtype=torch.float64))), weighed

    # The start: singular value decompositions, or random channels

    @torch.no_grad()
    def start(self) -> None:
        """Sets all blocks, without regard to what they were."""
        if self.net.channelwise:
            self._start_channels()
        elif self.net.trunk is None:
            self._start_tiles()
        else:
            self._start_two_layers(self.net.trunk)

    def _start_channels(self) -> None:
        """At random, as usual for CP decompositions."""
        generator = torch.Generator("cpu").manual_seed(0)
        for tensor in (*self.net.heads.parameters(), *chain.from_iterable(self.z.values())):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device="cpu"))
        for layer in self.net.heads.values():
            cast(nn.Linear, layer).bias.zero_()
            cast(nn.Linear, layer).weight.div_(math.sqrt(self.net.fan_in))
        for rows, _ in self.z.values():
            rows.zero_()  # the first to be solved for
        if self.moments:
            self._approach()

    def _start_tiles(self) -> None:
        """By the truncated decomposition of the tiles, padding taken as zero."""
        for head in self.net.plan.heads:
            members = [at for at in self.z if self._grid(at).kernel == head.kernel]
            layer = cast(nn.Linear, self.net.heads[head.kernel])
            if members:  # all layers of a kernel size may have been replaced since
                rows = {at: self._tiles(at).flatten(1) for at in members}
                layer.bias.copy_(self._decompose(rows, layer.weight))

    def _start_two_layers(self, trunk: nn.Linear) -> None:
        """By the decomposition of the tiles' rows, then that of what it leaves of the tiles."""
        bases = {}
        for head in self.net.plan.heads:
            layer = cast(nn.Linear, self.net.heads[head.kernel])
            gram = layer.weight.new_zeros(head.width, head.width)
            for at in self.z:
                if self._grid(at).kernel == head.kernel:
                    x = self._tiles(at).flatten(0, 1)  # (tiles, lead, width) -> (rows, width)
                    gram[: x.shape[1], : x.shape[1]] += x.t() @ x * self._pull(at)
            basis = _eigh(gram)[1].flip(1)[:, : self.net.fan_in]
            bases[head.kernel] = F.pad(basis, (0, self.net.fan_in - basis.shape[1]))
            layer.weight.copy_(bases[head.kernel])
            layer.bias.zero_()
        rows = {}
        for at in self.z:
            x = self._tiles(at)
            # (tiles, lead, width) @ (width, d) -> (tiles, lead * d)
            rows[at] = (x @ bases[self._grid(at).kernel][: x.shape[2]]).flatten(1)
        trunk.bias.copy_(self._decompose(rows, trunk.weight))

    @torch.enable_grad()
    def _approach(self) -> None:
        """Fits the weights alone before the outputs, for which a random start is too far away."""
        informed = self.moments, self.factor
        self.moments, self.factor = {}, {at: float(self.net.scale[at]) ** -2 for at in self.z}
        self.alternate(_APPROACH, 1e-3)
        self.moments, self.factor = informed

    def _decompose(self, rows: dict[int, Tensor], weight: Tensor) -> Tensor:
        """Sets a layer's weight and the embeddings by principal components.

        Args:
            rows: What the layer shall make of each site's embeddings, (tiles, features) or fewer.
            weight: The layer's weight, (features, Nz); written.

        Returns:
            The layer's bias, (features,).
        """
        features, length = weight.shape
        total, mean = 0.0, weight.new_zeros(features)
        gram = weight.new_zeros(features, features)
        for at, x in rows.items():
            pull, used = self._pull(at), x.shape[1]
            mean[:used] += x.sum(0) * pull
            gram[:used, :used] += x.t() @ x * pull
            total += len(x) * pull
        mean /= total
        values, vectors = _eigh(gram / total - torch.outer(mean, mean))
        rank = min(length, features)
        deviations = values.flip(0)[:rank].clamp_min(0).sqrt()
        vectors = vectors.flip(1)[:, :rank]
        # Components without any variance keep a direction, but their embeddings are zero
        deviations = deviations.clamp_min(1e-6 * float(deviations[0]) or 1.0)
        weight[:, :rank] = vectors * deviations
        for at, x in rows.items():
            used = x.shape[1]
            self.z[at][0].zero_()
            self.z[at][0][:, :rank] = (x - mean[:used]) @ vectors[:used] / deviations
        return mean

    def _grid(self, at: int) -> Grid:
        return self.net.plan.sites[at].grid

    def _pull(self, at: int) -> float:
        """Weight of a site in the start, in units of its scaled weights."""
        if at in self.moments:
            return 1.0
        return self.factor[at] * float(self.net.scale[at]) ** 2

    def _tiles(self, at: int) -> Tensor:
        """A site's scaled target as tiles, (tiles, lead, width * k)."""
        target = (self.targets[at] - self.net.offset[at]) / self.net.scale[at]
        grid, lead = self._grid(at), self.net.lead
        if self.net.trunk_axis == 1 and target.ndim > 1:
            target = target.transpose(0, 1)
        width = grid.width * math.prod(grid.shape[2:])
        # (shape) -> (rows, parts * width * k), padded where the forward pass cuts off
        flat = target.reshape(grid.rows, -1) if grid.parts > 1 else target.reshape(1, -1)
        columns = grid.parts * width if grid.parts > 1 else grid.rows * width
        flat = F.pad(flat, (0, columns - flat.shape[1]))
        tiles = flat.reshape(grid.rows, grid.parts, width)
        tiles = F.pad(tiles, (0, 0, 0, 0, 0, -grid.rows % lead))
        # (row tiles * lead, parts, width * k) -> (tiles, lead, width * k)
        tiles = tiles.view(-1, lead, grid.parts, width).transpose(1, 2)
        return tiles.reshape(-1, lead, width)

    # The sweeps: alternating least squares

    def blocks(self) -> list[list[Tensor]]:
        """Groups of tensors in each of which all weights are affine."""
        layers = [m for m in (self.net.trunk, self.net.heads) if m is not None]
        embeddings = [list(part) for part in zip(*self.z.values(), strict=True)]
        return [*embeddings, *(list[Tensor](m.parameters()) for m in layers)]

    def alternate(self, sweeps: int, tolerance: float) -> list[float]:
        """Sweeps over the blocks until the objective stands.

        Returns:
            The objective at the start and after each sweep, as a share of `whole`.
        """
        whole = self.whole or 1.0
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("fitting", total=sweeps)
            history = [self.objective() / whole]
            for _ in range(sweeps):
                tensors = [*self.net.parameters(), *chain.from_iterable(self.z.values())]
                before = [tensor.clone() for tensor in tensors]
                for block in self.blocks():
                    self._solve(block)
                reached = self.objective() / whole
                if reached > history[-1]:  # by rounding, at the optimum
                    for tensor, old in zip(tensors, before, strict=True):
                        tensor.copy_(old)
                    break
                history.append(reached)
                progress.update(
                    task, advance=1, description=f"fitting: error {math.sqrt(history[-1]):.4f}"
                )
                if history[-1] > (1 - tolerance) * history[-2]:
                    break
            progress.update(task, total=len(history) - 1)
        return history

    @torch.no_grad()
    def objective(self) -> float:
        """The weighted sum of squared errors."""
        return sum(self._squares(at, self.generate(at) - self.targets[at])[0] for at in self.z)

    def _solve(self, block: list[Tensor]) -> None:
        """Lowers the objective over one block by conjugate gradients with exact steps."""
        self._balance()
        for tensor in block:
            tensor.requires_grad_(True)
        # Affine, so that these graphs serve for every step
        graphs = {at: self.generate(at) for at in self.z}
        residuals = {at: w.detach().sub_(self.targets[at]) for at, w in graphs.items()}
        # Where weighing is a large product it is not done twice
        weighed = {at: self._weigh(at, residuals[at]) for at in self.moments}
        direction: list[Tensor] = []
        last = 0.0
        before: list[Tensor] = []
        for _ in range(_INNER):
            gradient = self._gradient(block, graphs, residuals, weighed)
            square = sum(float((g * g).sum(dtype=torch.float64)) for g in gradient)
            if square == 0:
                break
            if direction:
                overlap = _dot(gradient, before)
                beta = max((square - overlap) / last, 0.0)
                direction = [beta * d - g for d, g in zip(direction, gradient, strict=True)]
            else:
                direction = [-g for g in gradient]
            before, last = gradient, square
            if not self._step(block, direction, residuals, weighed):
                break
        for tensor in block:
            tensor.requires_grad_(False)

    def _gradient(
        self,
        block: list[Tensor],
        graphs: dict[int, Tensor],
        residuals: dict[int, Tensor],
        weighed: dict[int, Tensor],
    ) -> list[Tensor]:
        """Half of the objective's gradient."""
        gradient = [torch.zeros_like(tensor) for tensor in block]
        for at, weight in graphs.items():
            pull = weighed[at] if at in weighed else self._weigh(at, residuals[at])
            parts = torch.autograd.grad(weight, block, pull, retain_graph=True, allow_unused=True)
            for whole, part in zip(gradient, parts, strict=True):
                if part is not None:
                    whole += part
        return gradient

    @torch.no_grad()
    def _step(
        self,
        block: list[Tensor],
        direction: list[Tensor],
        residuals: dict[int, Tensor],
        weighed: dict[int, Tensor],
    ) -> bool:
        """Goes along a direction to the minimum; tells whether there was anything to gain."""
        for tensor, d in zip(block, direction, strict=True):
            tensor += d
        slope = curvature = 0.0
        changes, of_weighed = {}, {}
        for at, residual in residuals.items():
            changes[at] = change = self.generate(at).sub_(self.targets[at]).sub_(residual)
            part, pull = self._squares(at, change)
            curvature += part
            slope += float((residual * pull).sum(dtype=torch.float64))
            if at in weighed:
                of_weighed[at] = pull
        length = -slope / curvature if curvature > 0 else 0.0
        gains = length > 0 and math.isfinite(length)
        for tensor, d in zip(block, direction, strict=True):
            tensor += ((length if gains else 0.0) - 1) * d
        for all_of, steps in ((residuals, changes), (weighed, of_weighed)):
            for at, change in steps.items() if gains else ():
                all_of[at].add_(change, alpha=length)
        return gains

    @torch.no_grad()
    def _balance(self) -> None:
        """Rescales each component of the embeddings to unit variance, which changes no weight.

        Gradients of the layer that reads them are even then; they start that way, so that what
        alternation does to them is put right.
        """
        readers = self.net.heads.values() if self.net.trunk is None else [self.net.trunk]
        for part in zip(*self.z.values(), strict=True):
            squares = torch.stack([z.square().sum(0) for z in part]).sum(0)
            deviation = (squares / sum(len(z) for z in part)).sqrt()
            deviation = torch.where(deviation > 0, deviation, 1.0)
            for z in part:
                z /= deviation
            for layer in readers:
                cast(nn.Linear, layer).weight.mul_(deviation)

    # The end

    @torch.no_grad()
    def site_fit(self, at: int) -> SiteFit:
        """The errors of one site."""
        target = self.targets[at]
        error = self.generate(at) - target
        output = None
        if at in self.moments:
            output = _ratio(*(self.moments[at].norm(e) for e in (error, target)))
        squares = (float(t.square().sum(dtype=torch.float64)) for t in (error, target))
        return SiteFit(self.net.plan.sites[at].site.name, _ratio(*squares), output)

    @torch.no_grad()
    def error(self) -> float:
        """The relative error over all sites, in units of each site's standard deviation."""
        missed = whole = 0.0
        for at, target in self.targets.items():
            factor = float(self.net.scale[at]) ** -2
            missed += factor * float((self.generate(at) - target).square().sum())
            whole += factor * float(target.square().sum())
        return _ratio(missed, whole)

    @torch.no_grad()
    def write(self, hyper: nn.Module) -> None:
        """Copies the result into the model, or a copy of it."""
        self._balance()
        _, hypernet = find_hypernet(hyper)
        layers = generated_layers(hyper)
        hypernet.load_state_dict(self.net.state_dict())
        for at, z in self.z.items():
            _embedding(layers, hypernet.plan, at).copy_(torch.cat(z))


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of a symmetric matrix."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # many eigenvalues that only rounding tells apart
        values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x * y).sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True))


def _ratio(missed: float, whole: float) -> float:
    """A relative error from two sums of squares; 0 / 0 is none."""
    return math.sqrt(max(missed, 0.0) / whole) if whole > 0 else math.sqrt(max(missed, 0.0))


# What is fitted, and to what


def _check_options(weighting: Any, sweeps: Any, tolerance: Any) -> None:
    if weighting not in ("relative", "absolute"):
        raise ConfigError(f'weighting must be "relative" or "absolute", got {weighting!r}.')
    if not isinstance(sweeps, int) or isinstance(sweeps, bool) or sweeps < 0:
        raise ConfigError(f"sweeps must be a non-negative integer, got {sweeps!r}.")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise ConfigError(f"tolerance must be a non-negative number, got {tolerance!r}.")


def _embedding(layers: dict[str, Generated], plan: Plan, at: int) -> nn.Parameter:
    site = plan.sites[at].site
    return layers[site.path].get_parameter(site.param + EMBEDDING)


def _targets(
    hypernet: HyperNet, sites: Iterable[int], state: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """The teacher's weight of each site, on the hypernetwork's device."""
    if hypernet.scale.is_meta:
        raise ModelError("the hyperized model is on meta, so there is nothing to fit; load it.")
    targets: dict[int, Tensor] = {}
    for at in sites:
        site = hypernet.plan.sites[at].site
        weight = state.get(site.name)
        if weight is None:
            raise ModelError(
                f"the teacher has no {site.name}, which the hyperized model generates; the teacher "
                "must be of the architecture that was hyperized."
            )
        if not isinstance(weight, Tensor):
            raise ModelError(
                f"the teacher's {site.name} must be a tensor, got {type(weight).__name__}."
            )
        if tuple(weight.shape) != site.shape:
            raise ModelError(
                f"the teacher's {site.name} has the shape {tuple(weight.shape)}, the hyperized "
                f"model generates {site.shape}; the teacher must be of the same architecture."
            )
        if weight.is_meta or not weight.is_floating_point() or not weight.isfinite().all():
            raise ModelError(
                f"the teacher's {site.name} holds values that are not finite numbers; load its "
                "weights first."
            )
        targets[at] = weight.detach().to(hypernet.scale.device)
    return targets


def _state(teacher: Teacher) -> Mapping[str, Tensor]:
    if isinstance(teacher, Mapping):
        return teacher
    if not isinstance(teacher, nn.Module):
        raise ModelError(
            f"the teacher must be a torch.nn.Module or a state dict, got {type(teacher).__name__}."
        )
    if wrapper := wrapper_of(teacher):
        raise ModelError(f"the teacher is wrapped by {wrapper[0]}; pass the model inside it.")
    if any(isinstance(module, Generated) for module in teacher.modules()):
        raise ModelError("the teacher is hyperized; convert it with to_dense() first.")
    return teacher.state_dict()


def _module(hyper: nn.Module, teacher: Teacher) -> nn.Module:
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
    dense = to_dense(hyper)
    try:
        dense.load_state_dict(teacher)
    except RuntimeError as error:
        raise ModelError(
            f"the teacher's state dict does not fit the dense model, so that data cannot be run "
            f"through it: {error}"
        ) from error
    return dense.eval()


def _notes(hyper: nn.Module, teacher: Teacher, problem: _Problem, with_data: bool) -> Iterator[str]:
    state = {n: t for n, t in _state(teacher).items() if isinstance(t, Tensor)}
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
    blind = [at for at in problem.z if at not in problem.moments]
    if with_data and blind:
        first = problem.net.plan.sites[blind[0]].site.name
        yield (
            f"{len(blind)} weights ({first} first) were fitted without the data: their layers were "
            "not reached, or are of a kind whose inputs are not known"
        )


# The second moments of what the weights multiply


def _batches(data: Iterable[Batch]) -> list[Tensor]:
    if isinstance(data, (Tensor, str, Mapping)) or not isinstance(data, Iterable):
        raise ConfigError(
            "data must be an iterable of batches, as a list of tensors or a data loader, got "
            f"{type(data).__name__}."
        )
    batches = []
    for batch in data:
        first = batch[0] if isinstance(batch, (list, tuple)) and len(batch) else batch
        if not isinstance(first, Tensor):
            raise ConfigError(
                "a batch of data must be a tensor, or a sequence that starts with one, got "
                f"{type(batch).__name__}."
            )
        batches.append(first)
    if not batches or not any(batch.numel() for batch in batches):
        raise ConfigError("data is empty; pass a few batches of inputs, or data=None.")
    return batches


def _statistics(hyper: nn.Module, problem: _Problem, batches: list[Tensor]) -> dict[str, Tensor]:
    """The buffers of all batch norms for the fitted weights, of a copy of the model."""
    try:
        twin = copy.deepcopy(hyper)
        problem.write(twin)
        with torch.random.fork_rng(devices=[]):  # dropout
            update_bn(batches, twin)
    except Exception as error:  # any model code can run here, and raise anything
        raise ModelError(
            "the statistics of the batch norms cannot be estimated from this data "
            f"({type(error).__name__}: {error}); pass larger batches."
        ) from error
    norms = [path for path, m in twin.named_modules() if isinstance(m, _BatchNorm)]
    return {n: b for n, b in twin.named_buffers() if n.rpartition(".")[0] in norms}


@torch.no_grad()
def _second_moments(
    teacher: nn.Module, sites: Iterable[Site], batches: list[Tensor]
) -> dict[str, _Moments]:
    """Runs the teacher on the data.

    Returns:
        Moments by the names of the dense parameters; sites that it does not reach are left out.
    """
    numbers: dict[str, dict[str, str]] = {}
    for site in sites:
        numbers.setdefault(site.path, {})[site.param] = site.name
    sums: dict[str, _Moments] = {}
    counts = Counter[str]()

    def collect(of: dict[str, str]) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for param, vectors, transposed in _vectors(layer, args, kwargs):
                if param in of:
                    name, x = of[param], vectors
                    x = x.to(torch.promote_types(x.dtype, torch.float32))
                    product = x.transpose(1, 2) @ x  # (groups, columns, columns)
                    if name in sums:
                        product += sums[name].matrix
                    sums[name] = _Moments(product, transposed)
                    counts[name] += x.shape[1]

        return hook

    for path, of in numbers.items():
        teacher.get_submodule(path).register_forward_hook(collect(of), with_kwargs=True)
    console = Console(stderr=True)
    bar = Progress(console=console, disable=not console.is_terminal)
    with torch.random.fork_rng(devices=[]), bar as progress:
        for batch in progress.track(batches, description="running the teacher"):
            try:
                teacher(batch)
            except Exception as error:  # any model code can run here, and raise anything
                raise ModelError(
                    f"the teacher cannot run a batch of shape {tuple(batch.shape)} "
                    f"({type(error).__name__}: {error}); data must hold inputs of the model."
                ) from error
    for name, moments in sums.items():
        if not moments.matrix.isfinite().all():
            raise ModelError(
                f"what {name} multiplies in the teacher is not finite for this data; check the "
                "data and the teacher."
            )
    return {name: _Moments(s.matrix / counts[name], s.transposed) for name, s in sums.items()}


_Vectors = tuple[str, Tensor, bool]
"""Name of a parameter, what it multiplies as (groups, samples, columns), and whether the groups and
columns lie along axis 0 of the weight."""


def _vectors(layer: nn.Module, args: Any, kwargs: Any) -> Iterator[_Vectors]:
    """What the parameters of a layer multiply in one call of it."""
    inputs = (*args, *kwargs.values())
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        # The outputs of neighbouring inputs overlap where the stride is less than the kernel; the
        # correlation of neighbours is not counted
        x = _batched(inputs[0], layer).flatten(2)  # (N, C, positions)
        # -> (groups, N * positions, C / groups)
        x = x.transpose(1, 2).reshape(-1, layer.groups, layer.in_channels // layer.groups)
        yield "weight", _thinned(x).transpose(0, 1), True
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        x = _batched(inputs[0], layer)
        if isinstance(layer, Conv2dSame):  # pads in its forward
            x = pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
        yield "weight", _patches(x, layer), False
    elif isinstance(layer, nn.Linear):
        yield "weight", _rows(inputs[0]), False
    elif isinstance(layer, nn.RNNBase):
        yield from _recurrent_vectors(layer, inputs[0])
    elif isinstance(layer, nn.RNNCellBase):
        yield "weight_ih", _rows(inputs[0]), False
        state = inputs[1] if len(inputs) > 1 else None
        state = state[0] if isinstance(state, tuple) else state
        if state is not None:
            yield "weight_hh", _rows(state), False
    elif isinstance(layer, nn.MultiheadAttention):
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        parts = [_rows(named[name]) for name in ("query", "key", "value")]
        for name, x in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts, strict=True):
            yield name, x, False
        if len({part.shape for part in parts}) == 1:
            yield "in_proj_weight", torch.cat(parts), False  # (3, samples, columns)


def _thinned(x: Tensor) -> Tensor:
    """About `_SAMPLES` entries along axis 0, evenly spread."""
    return x[:: max(1, len(x) // _SAMPLES)]


def _rows(x: Tensor | PackedSequence) -> Tensor:
    """(..., features) -> (1, samples, features)."""
    x = x.data if isinstance(x, PackedSequence) else x
    return _thinned(x.reshape(-1, x.shape[-1]))[None]


def _batched(x: Tensor, layer: Any) -> Tensor:
    """A convolution's input with the batch axis that it may lack."""
    return x if x.ndim == layer.weight.ndim else x[None]


def _patches(x: Tensor, layer: Any) -> Tensor:
    """What a convolution's kernels see, (groups, samples, C / groups * k)."""
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    elif layer.padding == "same":
        x = F.pad(x, layer._reversed_padding_repeated_twice)
    elif layer.padding != "valid":
        x = F.pad(x, [side for size in reversed(layer.padding) for side in (size, size)])
    dims = len(layer.kernel_size)
    for axis, (size, step, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    # Positions are thinned while this is still a view
    positions = x.shape[0] * math.prod(x.shape[2 : 2 + dims])
    thin = max(1, math.floor((positions / _SAMPLES) ** (1 / dims)))
    for axis in range(2, 2 + dims):
        x = x[(slice(None),) * axis + (slice(None, None, thin),)]
    # (N, C, *positions, *kernel) -> (N, *positions, C, *kernel) -> (samples, groups, columns)
    x = x.movedim(1, 1 + dims).reshape(-1, layer.groups, layer.weight[0].numel())
    return x.transpose(0, 1)


def _recurrent_vectors(layer: nn.RNNBase, x: Tensor | PackedSequence) -> Iterator[_Vectors]:
    """Runs the layers of a stack one by one, from zero states, to see between them."""
    kind = next(k for k in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(layer, k))
    options = {"nonlinearity": layer.nonlinearity} if kind is nn.RNN else {}
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    for level in range(layer.num_layers):
        one = kind(
            layer.input_size
            if level == 0
            else (layer.proj_size or layer.hidden_size) * len(directions),
            layer.hidden_size,
            bias=layer.bias,
            batch_first=layer.batch_first,
            bidirectional=layer.bidirectional,
            device="meta",
            **({"proj_size": layer.proj_size} if kind is nn.LSTM else options),
        )
        for name in one._flat_weights_names:
            setattr(one, name, getattr(layer, name.replace("_l0", f"_l{level}")))
        y = one(x)[0]
        hidden = (y.data if isinstance(y, PackedSequence) else y).chunk(len(directions), -1)
        for direction, h in zip(directions, hidden, strict=True):
            yield f"weight_ih_l{level}{direction}", _rows(x), False
            # The states after all steps, in place of those before them
            yield f"weight_hh_l{level}{direction}", _rows(h), False
        x = y
