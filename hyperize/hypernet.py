"""The generator: embeddings in, weights out. It knows shapes, not modules.

The two-layer linear hypernetwork of "HyperNetworks" (Ha, Dai, Le, arXiv 1609.09106, sec. 3.1 and
eq. 4), with one trunk for all sites and one output layer per kernel size. It scales and shifts each
site's weights by two constants, so that they start with the mean and the standard deviation of the
weights they replace, as the main network's initialisation wants it (the aim of "hyperfan-in":
Chang, Flokas, Lipson 2020, arXiv 2312.08399):

    W = scale * (W_out (W_i z + B_i) + B_out) + offset

Without a hidden layer W_i z + B_i is z itself. With embeddings of channels it is u_i * v_j, of a
kernel's two channels, which makes each weight a CP decomposition.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor, nn

from hyperize.factorized import expand
from hyperize.planning import Plan
from hyperize.products import linear

__all__ = ["HyperNet"]


SAMPLED = 2**18
"""Random numbers that stand for all; the standard deviation is then right to 0.14 percent."""


class HyperNet(nn.Module):
    """The shared hypernetwork of a plan.

    Shapes of its state, with the plan's lead, d, Nz, and trail and k of each head:

    - `trunk.weight` (lead * d, Nz), `trunk.bias` (lead * d); none without a hidden layer
    - `heads.<kernel>.weight` (trail * k, d or Nz), `heads.<kernel>.bias` (trail * k)
    - `scale`, `offset` (sites,): buffers, constants of each site

    Args:
        plan: The sites' tiles and all sizes.
        dtype: Of all parameters and buffers.
        device: Of all parameters and buffers.
    """

    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        plan: Plan,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.trunk_axis = plan.config.trunk_axis
        self.lead = plan.lead
        self.recompute = plan.config.recompute
        self.factorized = plan.config.factorized
        self.factorable = frozenset(
            site for site, p in enumerate(plan.sites) if plan.factorized_macs(p) is not None
        )
        self.channelwise = plan.config.channelwise
        self.fan_in = plan.fan_in
        self.embedding_dim = plan.embedding_dim
        device = torch.get_default_device() if device is None else device

        def empty(n_in: int, n_out: int) -> nn.Linear:
            # Made on meta, as nn.Linear's own initialisation would draw from the global generator.
            return nn.Linear(n_in, n_out, device="meta", dtype=dtype).to_empty(device=device)

        sites = len(plan.sites)
        self.trunk = (
            empty(plan.embedding_dim, plan.lead * plan.hidden_dim) if plan.hidden_dim else None
        )
        self.heads = nn.ModuleDict(
            {head.kernel: empty(plan.fan_in, head.width) for head in plan.heads}
        )
        self.register_buffer("scale", torch.ones(sites, dtype=dtype, device=device))
        self.register_buffer("offset", torch.zeros(sites, dtype=dtype, device=device))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draws the parameters so that embeddings of unit variance give weights of unit variance.

        Args:
            generator: A CPU generator; the draw is the same on every device.
        """
        for layer in (self.trunk, *self.heads.values()):
            if layer is None:
                continue
            assert isinstance(layer, nn.Linear)
            noise = torch.randn(layer.weight.shape, generator=generator, device="cpu")
            layer.weight.copy_(noise / math.sqrt(layer.in_features))
            layer.bias.zero_()

    def forward(
        self,
        embedding: Tensor | tuple[Tensor, ...],
        site: int | tuple[int, ...],
        factors: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Generates a site's weight, or the weights of several sites in one call.

        Args:
            embedding: The site's embeddings, (tiles, Nz), or (rows + columns, Nz) of channels.
            site: The site's number in the plan.
            factors: Stop before the last product. Only for one of the sites that
                `Plan.factorized_macs` has a number for.

        Returns:
            The weight, contiguous, in the dense parameter's shape and the embedding's dtype; a
            tuple of weights for tuples of embeddings and sites. Or the weight's factors, as
            `hyperize.factorized.multiply` takes them, in the embedding's dtype.
        """
        if isinstance(site, tuple):
            return tuple(self._generate(z, s) for z, s in zip(embedding, site, strict=True))
        assert isinstance(embedding, Tensor)
        return (self._factorize if factors else self._generate)(embedding, site)

    def _generate(self, embedding: Tensor, site: int) -> Tensor:
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():  # an ordinary tensor, as a parameter
                return self._generate(embedding, site)
        grid = self.plan.sites[site].grid
        with _no_autocast(embedding.device.type):
            weight = linear(*self._factors(embedding, site))  # (rows * parts, width * k)
            # (rows, columns) -> shape; what folding or tiling padded is cut off
            if grid.parts > 1:
                columns = math.prod(grid.shape[1:])
                weight = weight.view(grid.rows, -1)[:, :columns].contiguous().view(grid.shape)
            else:
                weight = _first(weight.view(-1), math.prod(grid.shape)).view(grid.shape)
            if self.trunk_axis == 1:
                weight = weight.transpose(0, 1).contiguous()
            return _like_a_parameter(weight.to(embedding.dtype), embedding.requires_grad)

    def _factorize(self, embedding: Tensor, site: int) -> tuple[Tensor, ...]:
        grid = self.plan.sites[site].grid
        with _no_autocast(embedding.device.type):
            factors: tuple[Tensor, ...]
            if self.channelwise:
                head = self.heads[grid.kernel]
                assert isinstance(head, nn.Linear)
                z = embedding.to(head.weight.dtype)
                scale, offset = self.scale[site], self.offset[site]
                rows, columns = _and_one(z[: grid.rows] * scale), _and_one(z[grid.rows :])
                kernel = _and(head.weight, head.bias * scale + offset)  # (k, Nz + 1)
                kernel = kernel.view(*grid.shape[2:], -1)
                factors = (columns, rows, kernel) if self.trunk_axis else (rows, columns, kernel)
            else:
                assert grid.blocks is not None
                parts, folds = grid.blocks
                outer, inner, bias = self._factors(embedding, site)
                outer, inner = _and_one(outer), _and(inner, bias)
                factors = (
                    outer.view(-1, parts, outer.shape[-1]),  # (rows, parts, d + 1)
                    inner.view(folds, -1, *grid.shape[2:], inner.shape[-1]),  # (folds, w, *k, d+1)
                )
            return tuple(factor.to(embedding.dtype) for factor in factors)

    def expand(self, factors: tuple[Tensor, ...], site: int) -> Tensor:
        """A site's weight, of the factors that `forward` has returned; equal but for rounding."""
        with _no_autocast(factors[0].device.type):
            return expand(factors, self.plan.sites[site].site.shape, self.trunk_axis)

    @torch.no_grad()
    def moments(
        self, embedding: Tensor, site: int, grams: dict[tuple[str, int], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the weight that `forward` would generate.

        The latter is that of `SAMPLED` numbers of either factor where there are more, all drawn
        alike.

        Args:
            embedding: As in `forward`.
            site: As in `forward`.
            grams: What sites of the same head share, kept from call to call; empty at first.
        """
        with _no_autocast(embedding.device.type):
            rows, weight, bias = (t.float() for t in self._factors(embedding, site))
        grid = self.plan.sites[site].grid
        if rows.shape[0] * weight.shape[0] != math.prod(grid.shape):
            return moments(self._generate(embedding, site).float())  # less what is padding
        # All products of two sets of vectors, whose moments follow from those of the sets
        row = rows.mean(0)  # (d,)
        mean = row @ weight.mean(0) + bias.mean()
        enough = max(1, SAMPLED // self.fan_in)
        some = rows[:enough]
        gram = grams.get((grid.kernel, len(weight)))
        if gram is None:
            k = math.prod(grid.shape[2:])
            few = weight[: math.ceil(enough / k) * k]  # whole kernels
            gram = few.t() @ few / len(few)
            if not self.channelwise:  # where the weight is a part of the head's own
                grams[grid.kernel, len(weight)] = gram
        square = (some.t() @ some * gram).sum() / len(some)
        square += 2 * (row @ (bias @ weight)) / len(weight) + bias.square().mean()
        return mean, (square - mean.square()).sqrt()

    def _factors(self, embedding: Tensor, site: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `linear` makes the scaled and shifted weight of, in its memory order.

        Returns:
            The hidden layer, (rows * parts, d), weight (width * k, d) and bias (width * k,); d is
            Nz where the embeddings are the hidden layer.
        """
        grid = self.plan.sites[site].grid
        head = self.heads[grid.kernel]
        assert isinstance(head, nn.Linear)
        embedding = embedding.to(head.weight.dtype)  # FSDP's mixed precision casts no buffers
        scale, offset = self.scale[site], self.offset[site]
        used = grid.width * math.prod(grid.shape[2:])
        if self.channelwise:
            rows, columns = embedding[: grid.rows], embedding[grid.rows :]
            # (columns, 1, Nz) * (k, Nz) -> (columns * k, Nz)
            kernels = (columns[:, None] * head.weight).flatten(0, 1)
            return rows * scale, kernels, (head.bias * scale + offset).repeat(len(columns))
        # The scale enters where the numbers are few
        a = embedding * scale  # (tiles, Nz)
        if self.trunk is None:
            return a, _first(head.weight, used), _first(head.bias, used) * scale + offset
        # (tiles, Nz) @ (Nz, lead * d)
        a = linear(a, self.trunk.weight, self.trunk.bias * scale)
        # Rearranging a, which is small, lets the last product write the weight in memory order:
        # (row tiles, parts, lead, d) -> (row tiles * lead, parts, d), less the spare rows
        a = a.view(-1, grid.parts, self.lead, self.fan_in).transpose(1, 2)
        a = _first(a.reshape(-1, grid.parts, self.fan_in), grid.rows)
        a = a.reshape(-1, self.fan_in)  # (rows * parts, d)
        return a, _first(head.weight, used), _first(head.bias, used) * scale + offset

    def extra_repr(self) -> str:  # noqa: D102
        return (
            f"{len(self.plan.sites)} sites, embedding_dim={self.embedding_dim}, "
            f"hidden_dim={self.plan.hidden_dim}, lead={self.lead}"
        )


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation; twenty times as fast as torch.std_mean on a CPU."""
    mean, size = x.mean(), x.numel()
    square = torch.linalg.vector_norm(x).square() / size
    if mean.square() < 0.5 * square:  # otherwise too little would be left of the difference
        return mean, (square - mean.square()).sqrt()
    return mean, torch.linalg.vector_norm(x - mean) / math.sqrt(size)


def _first(x: Tensor, length: int) -> Tensor:
    """`x[:length]`, whose backward pass fills and copies, also where nothing is cut off."""
    return x if len(x) == length else x[:length]


def _and(x: Tensor, column: Tensor) -> Tensor:
    """One more column: (n, d), (n,) -> (n, d + 1)."""
    return torch.cat([x, column[:, None]], 1)


def _and_one(x: Tensor) -> Tensor:
    """A column of ones, which the bias is multiplied by."""
    return _and(x, x.new_ones(len(x)))


def _like_a_parameter(weight: Tensor, trains: bool) -> Tensor:
    """Lets a weight say under no_grad that it trains, as a dense parameter does there.

    torch.matmul looks at it when it chooses a kernel, and kernels round differently.
    """
    if trains and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        with suppress(RuntimeError):  # inside a transform of torch.func, where nothing is a leaf
            return weight.detach().requires_grad_()  # detached, as a view's views do not say so
    return weight


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """A dense parameter keeps its dtype under autocast, and so does a generated one."""
    # Compilers of older torch versions cannot ask, and what they compile for has autocast
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # the meta device has no autocast
