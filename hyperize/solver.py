"""The least-squares problem of a fit, and the alternation over blocks that lowers it.

The weights of all sites are affine in each block of a family, with the others held. In general a
block is solved by conjugate gradients through the generator itself, so that padding, folding and
every shape of site are what they are in the forward pass. Where weights are sums of products of two
channels' embeddings and a head, blocks have closed solutions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from hyperize.families import eigh
from hyperize.hypernet import Affine, HyperNet
from hyperize.teacher import Moments, times
from hyperize.tiling import Grid

__all__: list[str] = []

_INNER = 5
"""Conjugate gradients per block and sweep; more of them wait for the other blocks."""
_STEPS = 2
"""Preconditioned conjugate gradients per block and sweep, for blocks that do not separate."""
_RIDGE = 1e-6
"""Added to the diagonal of a normal matrix, as a share of each of its entries.

What is solved for is a change, so that the ridge makes steps smaller, and moves no optimum.
"""
_DAMPING = 1e-3
"""The same of a preconditioner, which need not be exact, as a share of the mean."""
_GRAMS = 2**24
"""Numbers of the normal matrices of a weight's groups that are made at a time."""
_APPROACH = 100
"""Sweeps from a random start, at most."""


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
    ) -> None:
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
            at: of.to(dtype)
            for at, target in enumerate(targets)
            if (of := target.moments) is not None and of.values.any()
        }
        self.marginals: dict[int, Marginals] = {}
        """What the moments of a weight are near to, for preconditioners."""
        self.constants = {at: self.targets[at].new_zeros(2) for at in self.z}
        """Scale and offset of each weight."""
        self.factor: dict[int, float] = {}
        """Weight of a site's error in the objective."""
        for at, target in self.targets.items():
            std, mean = (float(t) for t in torch.std_mean(target, correction=0))
            if std <= 1e-6 * abs(mean) or std == 0:  # constant: any scale does
                std = 1 / math.sqrt(math.prod(target.shape[1:]))
            self.constants[at] = target.new_tensor([std, mean])
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
        return max(0.0, float((error * weighed).sum(dtype=torch.float64))), weighed

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

    def decompose(self, rows: dict[int, Tensor], weight: Tensor) -> Tensor:
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
            self.z[at][0].zero_()
            self.z[at][0][:, :rank] = (x - mean[:used]) @ vectors[:used] / deviations
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
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("fitting", total=sweeps)
            history = [self.objective() / whole]
            for _ in range(sweeps):
                tensors = [*self.net.parameters(), *chain.from_iterable(self.z.values())]
                before = [tensor.clone() for tensor in tensors]
                self.family.sweep(self)
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

    @torch.enable_grad()
    def descend(self, block: list[Tensor]) -> None:
        """Lowers the objective over one block by conjugate gradients with exact steps."""
        self.balance()
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
    def solve_products(self) -> None:
        """Lowers the objective over the channels of each weight, then over the heads.

        Only for the weights K_ojk = s (sum_r a_or b_jr w_kr + B_k) + t of channels.
        """
        self.balance()
        for kernel in self.net.heads:
            members = [at for at, grid in enumerate(self.grids) if grid.kernel == kernel]
            if not members:  # all layers of a kernel size may have been replaced since
                continue
            head = Head(*self.net.head(kernel))
            for at in members:
                product = self._product(at)
                product.solve_outer()
                product.solve_inner(head)
            head.solve([self._product(at) for at in members])

    def _product(self, at: int) -> Product:
        grid = self.grids[at]
        outer, inner = self.z[at] if grid.axis == 0 else self.z[at][::-1]
        moments = self.moments.get(at)
        if moments is not None and at not in self.marginals:
            self.marginals[at] = Marginals(moments, grid.elements)
        return Product(
            target=self.targets[at],
            outer=outer,
            inner=inner,
            head=self.net.head(grid.kernel),
            constants=self.constants[at],
            factor=self.factor[at],
            moments=moments,
            marginals=None if moments is None else self.marginals[at],
        )

    @torch.no_grad()
    def balance(self) -> None:
        """Rescales each component of the embeddings to unit variance, which changes no weight.

        The layer that reads the embeddings takes the inverse factors. Its gradients are then of
        the same size for all components, as they are at initialisation.
        """
        for part in zip(*self.z.values(), strict=True):
            squares = torch.stack([z.square().sum(0) for z in part]).sum(0)
            deviation = (squares / sum(len(z) for z in part)).sqrt()
            deviation = torch.where(deviation > 0, deviation, 1.0)
            for z in part:
                z /= deviation
            for layer in self.family.readers(self.net):
                cast(Affine, layer).weight.mul_(deviation)

    # The end

    @torch.no_grad()
    def errors(self, at: int) -> tuple[float, float | None]:
        """The relative errors of one weight and of its layer's outputs, where these are known."""
        target = self.targets[at]
        error = self.generate(at) - target
        output = None
        if at in self.moments:
            output = relative(*(self.moments[at].norm(e) for e in (error, target)))
        squares = (float(t.square().sum(dtype=torch.float64)) for t in (error, target))
        return relative(*squares), output

    @torch.no_grad()
    def squares(self) -> tuple[float, float]:
        """Squared errors and squared targets, in units of each weight's standard deviation."""
        missed = whole = 0.0
        for at, target in self.targets.items():
            factor = float(self.constants[at][0]) ** -2
            missed += factor * float((self.generate(at) - target).square().sum())
            whole += factor * float(target.square().sum())
        return missed, whole


class Marginals:
    """A Kronecker product that is near a weight's moments: of channels, and of kernels' elements.

    Args:
        moments: Of the weight.
        elements: Of its kernel.

    Attributes:
        channels: (J, J).
        kernel: (K, K), with the trace K.
    """

    def __init__(self, moments: Moments, elements: int) -> None:
        self.channels, self.kernel = moments.marginals(elements)
        self._factor: Tensor | None = None

    def divide(self, x: Tensor) -> Tensor:
        """The inverse of the channels' moments times x, (J, n)."""
        if self._factor is None:
            self._factor = cholesky(self.channels, _DAMPING)
        return torch.cholesky_solve(x, self._factor.to(x.dtype))


@dataclass
class Product:
    """One weight of channels, and the blocks of it that are solved on their own.

    The weight is sum_r a_or b_jr w_kr with two more components for bias and offset: of [s a, s, t],
    [b, 1, 1] and [W, B, 1]. Letters: G groups of I channels o along axis 0, J channels j along axis
    1, K elements k of the kernel, R components r.

    The moments C of a layer's inputs couple the numbers of the columns (j, k) in general, and those
    of o where they are transposed. What is coupled on both sides of an equation alike cancels, so
    that a closed solution remains for all blocks but those of b and W where the moments are of (j,
    k): there a component's column is a product b_jr w_kr, of which C makes no such product. These
    are lowered by conjugate gradients, with the Kronecker product of C's marginals as their
    preconditioner.

    Attributes:
        target: The teacher's weight.
        outer: a, (G * I, R); written.
        inner: b, (J, R); written.
        head: W, (K, R), and B, (K,).
        constants: s and t.
        factor: Of its errors in the objective.
        moments: C, or None for the identity.
        marginals: Of C.
    """

    target: Tensor
    outer: Tensor
    inner: Tensor
    head: tuple[Tensor, Tensor]
    constants: Tensor
    factor: float
    moments: Moments | None
    marginals: Marginals | None

    def __post_init__(self) -> None:
        groups = 1 if self.moments is None else len(self.moments.values)
        # (G, I, J * K)
        self.target = self.target.reshape(groups, len(self.outer) // groups, -1)
        self.scale, self.offset = self.constants
        self.coupled = self.moments is not None and not self.moments.transposed
        """Whether the moments are those of columns."""

    @property
    def cancels(self) -> bool:
        """Whether b has a closed solution."""
        return not self.coupled or (len(self.target) == 1 and len(self.head[1]) == 1)

    def left(self) -> Tensor:
        """[s a, s, t], (G, I, R + 2)."""
        ends = self.constants.expand(len(self.outer), 2)
        left = torch.cat([self.outer * self.scale, ends], 1)
        return left.view(*self.target.shape[:2], -1)

    def right(self) -> Tensor:
        """[b, 1, 1], (J, R + 2)."""
        return torch.cat([self.inner, self.inner.new_ones(len(self.inner), 2)], 1)

    def kernel(self) -> Tensor:
        """[W, B, 1], (K, R + 2)."""
        weight, bias = self.head
        return torch.cat([weight, bias[:, None], torch.ones_like(bias)[:, None]], 1)

    def solve_outer(self) -> None:
        """Sets a, whose rows have the same normal matrix within a group."""
        right = pairs(self.right(), self.kernel())[None]  # (1, J * K, R + 2)
        left, target, count = self.left(), self.target, self.outer.shape[1]
        weighed = right
        if self.coupled:
            assert self.moments is not None
            weighed = self.moments.times(right)
        if len(weighed) == 1:
            left, target = (t.flatten(0, 1)[None] for t in (left, target))
        outer = self.outer.view(*target.shape[:2], -1)
        for at in torch.arange(len(target)).split(max(1, _GRAMS // left.shape[2] ** 2)):
            part = slice(int(at[0]), int(at[-1]) + 1)
            gram = times(right.transpose(1, 2), weighed[part])
            pull = times(target[part], weighed[part])[..., :count] - left[part] @ gram[..., :count]
            outer[part] += solved(gram[:, :count, :count], pull) / self.scale

    def solve_inner(self, head: Head) -> None:
        """Lowers the objective over b, and tells the head what its block has to know."""
        closed = self._close() if self.cancels else None
        if closed is None or self.coupled:
            residual = self._residual()
            if closed is None:
                self._descend(residual)
            closed = self._open(residual)
        head.add(self, *closed)

    def _close(self) -> tuple[Tensor, Tensor]:
        """Sets b; returns half of the head's negative gradient, and its normal matrix."""
        left, kernel, count = self.left(), self.kernel(), self.outer.shape[1]
        transposed = self.moments is not None and self.moments.transposed
        weighed = left
        if transposed:
            assert self.moments is not None
            weighed = self.moments.times(left)
        left, weighed = left.flatten(0, 1), weighed[..., :-1].flatten(0, 1)
        # (J * K, G * I) @ (G * I, R + 1)
        along = times(self.target.flatten(0, 1).t()[None], weighed[None])[0]
        gram = left.t() @ weighed  # (R + 2, R + 1)
        normal = (kernel.t() @ kernel[:, :-1] * gram)[:, :count]
        pull = over_kernel(along[:, :count], kernel[:, :count]) - self.right() @ normal
        self.inner += solved(normal[:count], pull)
        right = self.right()
        normal = right.t() @ right[:, :-1] * gram
        return over_channels(along, right[:, :-1]) - kernel @ normal, normal[:-1]

    def _residual(self) -> Tensor:
        """Half of the negative gradient over the products b_jr w_kr, (J * K, R + 1)."""
        assert self.moments is not None
        left, right = self.left(), pairs(self.right(), self.kernel())
        some = left[..., :-1]
        if left.shape[1] < left.shape[2]:  # errors are fewer than products
            error = self.target - left @ right.t()
            return self.moments.weigh(error).flatten(0, 1).t() @ some.flatten(0, 1)
        along = times(self.target.transpose(1, 2), some)
        return self.moments.times(along - right @ (left.transpose(1, 2) @ some)).sum(0)

    def curve(self, change: Tensor) -> Tensor:
        """What a change of b_jr w_kr takes from the residual, for (J * K, R) or (J * K, R + 1)."""
        some = self.left()[..., :-1]
        left = some[..., : change.shape[1]]
        if self.moments is None or not self.coupled:
            weighed = some if self.moments is None else self.moments.times(some)
            return change @ (left.transpose(1, 2) @ weighed).sum(0)
        if left.shape[1] < left.shape[2]:
            errors = self.moments.weigh(left @ change.t())
            return errors.flatten(0, 1).t() @ some.flatten(0, 1)
        return (self.moments.times(change[None]) @ (left.transpose(1, 2) @ some)).sum(0)

    def _descend(self, residual: Tensor) -> None:
        """Lowers the objective over b by conjugate gradients, and the residual with it."""
        assert self.marginals is not None
        marginals, weight = self.marginals, self.head[0]
        left = self.left().flatten(0, 1)[:, :-2]
        normal = weight.t() @ (marginals.kernel @ weight) * (left.t() @ left)
        self.inner += conjugate_gradients(
            residual,
            lambda full: over_kernel(full[:, :-1], weight),
            lambda pull: marginals.divide(solved(normal, pull)),
            lambda change: self.curve(pairs(change, weight)),
        )

    def _open(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """As `_close` returns, of which the second is exact for kernels of one element only."""
        assert self.marginals is not None
        left, right = self.left().flatten(0, 1)[:, :-1], self.right()[:, :-1]
        normal = right.t() @ (self.marginals.channels @ right) * (left.t() @ left)
        return over_channels(residual, right), normal


class Head:
    """W and B of a kernel size, solved for all weights of that size together.

    Args:
        weight: W, (K, R); written.
        bias: B, (K,); written.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        count, length = weight.shape[0], weight.shape[1] + 1
        self.pull = weight.new_zeros(count, length)
        """Half of the negative gradient."""
        self.normal = weight.new_zeros(length, length)
        self.kernel = weight.new_zeros(count, count)
        """Moments of the elements of a kernel, over the weights."""
        self.coupled = False

    def add(self, product: Product, pull: Tensor, normal: Tensor) -> None:
        """Counts a weight."""
        self.pull += pull * product.factor
        self.normal += normal * product.factor
        share = product.factor * normal.diagonal().sum()
        if product.coupled and product.marginals is not None:
            self.coupled |= len(self.bias) > 1
            self.kernel += product.marginals.kernel * share
        else:
            self.kernel.diagonal().add_(share)

    def solve(self, products: Sequence[Product]) -> None:
        """Sets W and B, or lowers the objective over them where moments couple a kernel."""

        def curve(change: Tensor) -> Tensor:
            total = torch.zeros_like(change)
            for product in products:
                right = product.right()[:, :-1]
                pulled = product.curve(pairs(right, change))
                total += over_channels(pulled, right) * product.factor
            return total

        if self.coupled:
            factor = cholesky(self.kernel, _DAMPING)
            change = conjugate_gradients(
                self.pull,
                lambda pull: pull,
                lambda pull: torch.cholesky_solve(solved(self.normal, pull), factor),
                curve,
            )
        else:
            change = solved(self.normal, self.pull)
        self.weight += change[:, :-1]
        self.bias += change[:, -1]


def pairs(inner: Tensor, kernel: Tensor) -> Tensor:
    """The products b_jr w_kr, (J * K, R), of (J, R) and (K, R)."""
    return (inner[:, None] * kernel).flatten(0, 1)


def over_kernel(x: Tensor, kernel: Tensor) -> Tensor:
    """The sum over k of x_jkr w_kr: (J * K, R), (K, R) -> (J, R)."""
    return (x.view(-1, *kernel.shape) * kernel).sum(1)


def over_channels(x: Tensor, inner: Tensor) -> Tensor:
    """The sum over j of x_jkr b_jr: (J * K, R), (J, R) -> (K, R)."""
    return (x.view(len(inner), -1, inner.shape[1]) * inner[:, None]).sum(0)


def cholesky(matrix: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of a positive matrix with a share of its mean diagonal added to it."""
    added = ridge * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(added > 0, added, 1.0)
    ones = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(matrix + added[..., None, None] * ones)
    return cholesky(matrix, 10 * ridge) if bool(failed.any()) else factor


def solved(normal: Tensor, pull: Tensor) -> Tensor:
    """The changes X of X N = P: (..., R, R), (..., n, R) -> (..., n, R), with a ridge."""
    normal, wide = normal.double(), pull.double()
    # Each component in units of its own, so that rounding and ridge touch all alike
    unit = normal.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    unit = torch.where(unit > 0, 1 / unit, 0.0)
    factor = cholesky(normal * unit[..., None] * unit[..., None, :], _RIDGE)
    change = torch.cholesky_solve((wide * unit[..., None, :]).transpose(-1, -2), factor)
    return (change.transpose(-1, -2) * unit[..., None, :]).to(pull.dtype)


def conjugate_gradients(
    residual: Tensor,
    reduce: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    curve: Callable[[Tensor], Tensor],
) -> Tensor:
    """A few steps with exact lengths, none of which raises the objective.

    Args:
        residual: Of which `reduce` makes half of the negative gradient; written.
        reduce: Linear.
        precondition: From a gradient to a direction.
        curve: What a change takes from the residual.

    Returns:
        The change.
    """
    change = direction = torch.zeros_like(reduce(residual))
    last = 1.0
    for _ in range(_STEPS):
        pull = reduce(residual)
        better = precondition(pull)
        gain = _dot([pull], [better])
        if not gain > 0:
            break
        direction = better + gain / last * direction
        last = gain
        curved = curve(direction)
        curvature = _dot([reduce(curved)], [direction])
        if not curvature > 0:
            break
        length = _dot([pull], [direction]) / curvature
        change = change + length * direction
        residual -= length * curved
    return change


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x * y).sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True))


def relative(missed: float, whole: float) -> float:
    """A relative error from two sums of squares; 0 / 0 is none."""
    return math.sqrt(max(missed, 0.0) / whole) if whole > 0 else math.sqrt(max(missed, 0.0))
