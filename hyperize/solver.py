"""The least-squares problem of a fit, and the alternation over blocks that lowers it.

The weights of all sites are affine in each block of a family, with the others held. A block is
solved by conjugate gradients through the generator itself, so that padding, folding and every shape
of site are what they are in the forward pass; or by a closed solution, if the family has one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from hyperize.cp import OutputFit
from hyperize.family import eigh
from hyperize.hypernet import Affine, HyperNet
from hyperize.moments import Moments
from hyperize.products import dot
from hyperize.progress import progress_bar
from hyperize.teacher import relative
from hyperize.tiling import Grid

__all__: list[str] = []

_INNER = 5
"""Conjugate gradients per block and sweep; more of them wait for the other blocks."""
_APPROACH = 100
"""Sweeps from a random start, at most."""
_CANCELLED = 1e-3
"""Share of the objective at zero below which it is computed from the errors themselves."""


@dataclass(frozen=True)
class Target:
    """One weight to fit.

    Attributes:
        name: Name of the dense parameter.
        grid: How it is tiled.
        weight: The teacher's.
        moments: Of what it multiplies; None to count all its numbers alike.
    """

    name: str
    grid: Grid
    weight: Tensor
    moments: Moments | None = None


class Problem:
    """The least-squares problem, over copies of the hypernetwork and the embeddings."""

    def __init__(
        self,
        hypernet: HyperNet,
        targets: Sequence[Target],
        embeddings: list[Tensor],
        weighting: str,
        progress: bool = False,
    ) -> None:
        self.progress = progress
        self.net = copy.deepcopy(hypernet).requires_grad_(False)
        like = next(self.net.parameters())
        self.net.to(torch.promote_types(like.dtype, torch.float32))
        self.family = self.net.family
        dtype = next(self.net.parameters()).dtype
        self.names = [target.name for target in targets]
        self.grids = [target.grid for target in targets]
        self.z = {
            at: list(z.detach().to(dtype, copy=True).split(self.family.split(self.grids[at])))
            for at, z in enumerate(embeddings)
        }
        """The embeddings of each weight, divided into the family's blocks."""
        self.targets = {at: target.weight.to(dtype) for at, target in enumerate(targets)}
        # Inputs that are always zero say nothing of a weight
        self.moments = {
            at: of.to(dtype).shrunk()
            for at, target in enumerate(targets)
            if (of := target.moments) is not None and of.values.any()
        }
        self.constants = {at: self.targets[at].new_zeros(2) for at in self.z}
        """Scale and offset of each weight."""
        self.factor: dict[int, float] = {}
        """Weight of a site's error in the objective."""
        self.output_error: dict[int, float] = {}
        """What `fit_outputs` has reached."""
        for at, target in self.targets.items():
            std, mean = (float(t) for t in torch.std_mean(target, correction=0))
            if std <= 1e-6 * abs(mean) or std == 0:  # constant: any scale does
                std = 1 / math.sqrt(math.prod(target.shape[1:]))
            self.constants[at] = target.new_tensor([std, mean])
            if self.moments:
                self.factor[at] = self._share(at)
            else:
                self.factor[at] = std**-2 if weighting == "relative" else 1.0
        self.whole = sum(self._squares(at, t)[0] for at, t in self.targets.items())

    @cached_property
    def centred(self) -> float:
        """The objective of weights that are their offset."""
        return sum(
            self._squares(at, t - self.constants[at][1])[0] for at, t in self.targets.items()
        )

    def _share(self, at: int) -> float:
        """The factor by which the target of a site counts 1."""
        target, variance = self.targets[at], float(self.constants[at][0]) ** 2
        if at not in self.moments:
            return 1 / (dot(target, target) or variance * target.numel())
        of = self.moments[at]
        return 1 / (of.norm(target) or variance * of.norm_of_noise(target))

    def generate(self, at: int) -> Tensor:
        """The weight of a site as it is now."""
        return cast(Tensor, self.net(self.embedding(at), self.constants[at], self.grids[at]))

    def embedding(self, at: int) -> Tensor:
        """Its embeddings, undivided."""
        z = self.z[at]
        return z[0] if len(z) == 1 else torch.cat(z)

    def _weigh(self, at: int, error: Tensor) -> Tensor:
        weighed = self.moments[at].weigh(error) if at in self.moments else error
        return weighed * self.factor[at]

    def _squares(self, at: int, error: Tensor) -> tuple[float, Tensor]:
        """A site's part of the objective, and half of its gradient."""
        weighed = self._weigh(at, error)
        # Rounding can make next to nothing negative
        return max(0.0, dot(error, weighed)), weighed

    # What families start with

    @torch.no_grad()
    def start(self) -> None:
        """Sets all blocks, without regard to what they were."""
        self.family.start(self)

    def randomise(self) -> None:
        """Draws all blocks, and fits the weights alone before the outputs, if there are moments."""
        generator = torch.Generator("cpu").manual_seed(0)
        for tensor in (*self.net.parameters(), *chain.from_iterable(self.z.values())):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device="cpu"))
        for layer in self.net.modules():
            if isinstance(layer, Affine):
                layer.bias.zero_()
                layer.weight.div_(math.sqrt(layer.weight.shape[1]))
        for at, grid in enumerate(self.grids):
            z = self.embedding(at)
            self.family.silence(z, grid)  # so that these are the first to be solved for
            for part, silent in zip(self.z[at], z.split(self.family.split(grid)), strict=True):
                part.copy_(silent)
        if not self.moments:
            return
        informed = self.moments, self.factor
        self.moments = {}
        self.factor = {at: float(self.constants[at][0]) ** -2 for at in self.z}
        with torch.enable_grad():
            self.alternate(_APPROACH, 1e-3)
        self.moments, self.factor = informed

    def decompose(self, rows: dict[int, Tensor], weight: Tensor, block: int = 0) -> Tensor:
        """Sets a layer's weight and the embeddings by principal components.

        Args:
            rows: What the layer shall make of each site's embeddings, (tiles, features) or fewer.
            weight: The layer's weight, (features, Nz); written.
            block: Which embeddings of each site, as the family's `split` numbers them.

        Returns:
            The layer's bias, (features,).
        """
        features, length = weight.shape
        total, mean = 0.0, weight.new_zeros(features)
        gram = weight.new_zeros(features, features)
        for at, x in rows.items():
            pull, used = self.pull(at), x.shape[1]
            mean[:used] += x.sum(0) * pull
            gram[:used, :used] += x.t() @ x * pull
            total += len(x) * pull
        mean /= total
        values, vectors = eigh(gram / total - torch.outer(mean, mean))
        rank = min(length, features)
        deviations = values.flip(0)[:rank].clamp_min(0).sqrt()
        vectors = vectors.flip(1)[:, :rank]
        # Components without any variance keep a direction, but their embeddings are zero
        deviations = deviations.clamp_min(1e-6 * float(deviations[0]) or 1.0)
        weight[:, :rank] = vectors * deviations
        for at, x in rows.items():
            used = x.shape[1]
            z = self.z[at][block].zero_()
            z[:, :rank] = (x - mean[:used]) @ vectors[:used] / deviations
        return mean

    def pull(self, at: int) -> float:
        """How much a site counts in the start, where targets are divided by their deviation."""
        if at in self.moments:
            return 1.0
        return self.factor[at] * float(self.constants[at][0]) ** 2

    def rows(self, at: int) -> Tensor:
        """A site's scaled target as rows of tiles, (rows * parts, width * k)."""
        scale, offset = self.constants[at]
        return self.grids[at].cut((self.targets[at] - offset) / scale)

    # The sweeps: alternating least squares

    def alternate(self, sweeps: int, tolerance: float) -> list[float]:
        """Sweeps over the blocks until the objective stands.

        Returns:
            The objective at the start and after each sweep, as a share of `whole`.
        """
        whole = self.whole or 1.0
        closed = self.family.closed and not self.moments
        with progress_bar(self.progress) as bar:
            task = bar.add_task("fitting", total=sweeps)
            history = [self.objective() / whole]
            tensors = [*self.net.parameters(), *chain.from_iterable(self.z.values())]
            earlier: list[Tensor] = []
            run = 0  # sweeps since the start, or since momentum went too far
            for _ in range(sweeps):
                now = [tensor.clone() for tensor in tensors]
                # Closed solutions are steps of a fixed-point iteration, which momentum speeds up
                # (Mitchell, Ye and De Sterck 2020, arXiv 1810.05846)
                momentum = (run - 1) / (run + 2) if closed and run > 1 else 0.0
                for tensor, old in zip(tensors, earlier, strict=True) if momentum else ():
                    tensor.add_(tensor - old, alpha=momentum)
                reached = self._sweep(closed) / whole
                if reached > history[-1]:
                    for tensor, old in zip(tensors, now, strict=True):
                        tensor.copy_(old)
                    if not momentum:  # by rounding, at the optimum
                        break
                    run = 0
                    continue
                earlier, run = now, run + 1
                history.append(reached)
                bar.update(
                    task, advance=1, description=f"fitting: error {math.sqrt(history[-1]):.4f}"
                )
                if history[-1] > (1 - tolerance) * history[-2]:
                    break
            bar.update(task, total=len(history) - 1)
        return history

    def _sweep(self, closed: bool) -> float:
        """Lowers the objective over each block in turn, and returns it."""
        if closed:
            with torch.no_grad():
                reached = self.family.sweep(self)
            # A difference of large numbers says little of a small one
            return reached if reached > _CANCELLED * self.whole else self.objective()
        for block in self.family.blocks(self.net, self.z):
            self.balance()
            self._solve(block, self.z)
        return self.objective()

    # The sweeps over one weight after the other

    @torch.no_grad()
    def fit_outputs(
        self, passes: Iterable[Mapping[str, Moments]], sweeps: int, tolerance: float
    ) -> list[float]:
        """Fits weights to their layers' outputs, each over its own embeddings, the rest held.

        Args:
            passes: Moments by the names of the weights, each of which is fitted when it comes.
            sweeps: Over the blocks of a weight, at most.
            tolerance: As in `alternate`.

        Returns:
            The objective at the start and after each sweep, as a share of `whole`, which is that of
            the outputs then; empty if there were no moments.
        """
        histories: dict[int, list[float]] = {}
        for moments in passes:
            histories |= self._fit_pass(moments, sweeps, tolerance)
            del moments  # before those of the next pass are there
        if not histories:
            return []
        for at in self.z.keys() - histories.keys():
            self.factor[at] = self._share(at)
            histories[at] = [self._reached(at, None)]
        self.whole = float(len(histories))
        return combined(list(histories.values()), [1.0] * len(histories))

    def _fit_pass(
        self, moments: Mapping[str, Moments], sweeps: int, tolerance: float
    ) -> dict[int, list[float]]:
        """Fits the weights of one pass, and returns their objectives."""
        number = {name: at for at, name in enumerate(self.names)}
        histories = {}
        with progress_bar(self.progress) as bar:
            for name, of in bar.track(moments.items(), description="fitting outputs"):
                at = number[name]
                if not of.values.any():  # inputs that are always zero say nothing of a weight
                    continue
                self.moments[at] = of.to(self.targets[at].dtype).shrunk()
                self.factor[at] = self._share(at)
                histories[at] = self._fit_output(at, sweeps, tolerance)
                self.output_error[at] = self._output_error(at)
                del self.moments[at]
        return histories

    def _fit_output(self, at: int, sweeps: int, tolerance: float) -> list[float]:
        """Fits one weight, and returns its objective, of which its target's is 1."""
        closed = self.family.outputs(self, at)
        history = [self._reached(at, closed)]
        for _ in range(sweeps):
            before = [z.clone() for z in self.z[at]]
            if closed is not None:
                closed.step()
            else:
                with torch.enable_grad():
                    for z in self.z[at]:
                        self._solve([z], [at])
            reached = self._reached(at, closed)
            if reached > history[-1]:  # by rounding, at the optimum
                for z, old in zip(self.z[at], before, strict=True):
                    z.copy_(old)
                break
            history.append(reached)
            if history[-1] > (1 - tolerance) * history[-2]:
                break
        return history

    def _reached(self, at: int, closed: OutputFit | None) -> float:
        if closed is None:
            return self._squares(at, self.generate(at).sub_(self.targets[at]))[0]
        return closed.objective() * float(self.constants[at][0]) ** 2 * self.factor[at]

    @torch.no_grad()
    def objective(self) -> float:
        """The weighted sum of squared errors, and the family's penalty."""
        return sum(
            self._reached(at, None) + self.pull(at) * self.family.penalty(self, at) for at in self.z
        )

    def _solve(self, block: list[Tensor], sites: Iterable[int]) -> None:
        """Lowers the objective of some sites over one block by conjugate gradients."""
        for tensor in block:
            tensor.requires_grad_(True)
        # Affine, so that these graphs serve for every step
        graphs = {at: self.generate(at) for at in sites}
        residuals = {at: w.detach().sub_(self.targets[at]) for at, w in graphs.items()}
        # Where weighing is a large product it is not done twice
        weighed = {at: self._weigh(at, residuals[at]) for at in graphs if at in self.moments}
        direction: list[Tensor] = []
        last = 0.0
        before: list[Tensor] = []
        for _ in range(_INNER):
            gradient = self._gradient(block, graphs, residuals, weighed)
            square = sum(dot(g, g) for g in gradient)
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
            slope += dot(residual, pull)
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
    def balance(self) -> None:
        """Rescales each component of the embeddings to unit variance, which changes no weight.

        The layer that reads the embeddings takes the inverse factors. Its gradients are then of
        the same size for all components, as they are at initialisation.
        """
        for block, part in enumerate(zip(*self.z.values(), strict=True)):
            readers = self.family.readers(self.net, block)
            if not readers:
                continue
            squares = torch.stack([z.square().sum(0) for z in part]).sum(0)
            deviation = (squares / sum(len(z) for z in part)).sqrt()
            deviation = torch.where(deviation > 0, deviation, 1.0)
            for z in part:
                z /= deviation
            for layer in readers:
                cast(Affine, layer).weight.mul_(deviation)

    # The end

    @torch.no_grad()
    def errors(self, at: int) -> tuple[float, float | None]:
        """The relative errors of one weight and of its layer's outputs, where these are known."""
        target = self.targets[at]
        error = self.generate(at).sub_(target)
        squares = (dot(t, t) for t in (error, target))
        output = self._output_error(at) if at in self.moments else self.output_error.get(at)
        return relative(*squares), output

    def _output_error(self, at: int) -> float:
        of, target = replace(self.moments[at], ridge=0.0), self.targets[at]
        return relative(*(of.norm(e) for e in (self.generate(at) - target, target)))

    @torch.no_grad()
    def squares(self) -> tuple[float, float]:
        """Squared errors and squared targets, in units of each weight's standard deviation."""
        missed = whole = 0.0
        for at, target in self.targets.items():
            factor = float(self.constants[at][0]) ** -2
            error = self.generate(at).sub_(target)
            missed += factor * dot(error, error)
            whole += factor * dot(target, target)
        return missed, whole


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(dot(x, y) for x, y in zip(a, b, strict=True))


def combined(histories: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """The weighted mean of histories at each step; the shorter ones stay at their ends."""
    whole = sum(weights) or 1.0
    return [
        sum(w * h[min(step, len(h) - 1)] for w, h in zip(weights, histories, strict=True)) / whole
        for step in range(max(map(len, histories)))
    ]
