"""The operators that run a HyperLSTM or HyperRNN cell over a sequence, each with a backward pass.

The equations, and the names and shapes of the weights, are documented at `HyperLSTMCell` (arXiv
1609.09106, app. A.2.2). `hyper_lstm` is fast: the products that need no earlier step are computed
at once, before the loop over the steps, and the gradients of the weights are products over many
steps. It is one operator of torch's dispatcher, so that torch.compile and torch.export see one
operation; they would otherwise unroll the loop. On a GPU kernels of Triton run the steps
(kernels.py), where they can; elsewhere operations of torch do.

`plain` computes the same in ordinary operations of torch. It is slower, and takes the operator's
place where torch has to look inside: under the transforms of torch.func, in forward-mode
derivatives, and for derivatives of derivatives.

Both give two buffers for a sequence of T steps of a batch of N. Names that begin with u are the
small cell's.

    s  (T + 1, N, H + K)   h and the small cell's output; s[0] is the one before the first step
    c  (T + 1, N, H + K)   the memories of both; c[0] is the one before the first step

`hyper_rnn` is a HyperRNN's operator. It has no c, and only kernels of Triton run its steps;
elsewhere a HyperRNN is `plain_rnn`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperize.products import by_onednn, is_transformed, laid_out, product, takes_onednn

__all__: list[str] = []

_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward

EPS = 1e-3
"""What every layer norm adds to the variance, as in the author's code."""
_CHUNK = 16
"""The backward pass multiplies this many steps at once for the gradients of the weights.

A chunk is large enough for these products to be efficient, and small enough to stay in a
processor's cache.
"""
_CHUNK_BYTES = 2**28
"""With kernels of Triton, a chunk's gradients may take this much memory.

A GPU's cache does not hold a chunk, and its products gain from more steps. A chunk takes about as
much memory as the tape does for its steps, so the whole of a long sequence would double the memory.
"""
_LONG = 8
"""From this number of steps on, copying a weight into a layout for faster products pays off."""

INPUT, FORGET, CANDIDATE, OUTPUT = range(4)
"""The order of the gates in every stacked parameter and buffer. It is nn.LSTM's: i, f, g, o."""

WEIGHTS = (
    "weight_ih",
    "weight_hh",
    "bias",
    "hyper_weight_ih",
    "hyper_weight_hh",
    "hyper_bias",
    "hyper_ln_weight",
    "hyper_ln_bias",
    "embedding_weight",
    "embedding_bias",
    "scale_weight",
    "ln_weight",
    "ln_bias",
)
"""The parameters of a HyperLSTMCell, in the operator's order."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes_triton(x: Tensor, *units: int) -> bool:
    """Whether the kernels can run a cell of so many units on tensors like x.

    They are imported only where there is a GPU, as Triton and what it imports take longer than
    torch. The arguments are those of `hyperize.kernels.takes_triton`.
    """
    if x.device.type != "cuda":
        return False
    from hyperize.kernels import takes_triton

    return takes_triton(x, *units)


def autocasts(kind: str) -> bool:
    """Whether autocast is on for that type of device; torch itself refuses to say for "meta"."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _without_autocast(function: _Function) -> _Function:
    """Has the function, whose first argument is a tensor, run as if there were no autocast.

    Autocast would cast single products inside, whose results then do not fit the other tensors.
    The caller of the operator casts its inputs instead, all alike.
    """

    @functools.wraps(function)
    def wrapped(x: Tensor, *args: Any) -> Any:
        if not autocasts(x.device.type):
            return function(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    return wrapped  # type: ignore[return-value]


class _Sizes:
    """The sizes of one call of the operator, read from the shapes of its tensors."""

    def __init__(self, x: Tensor, weights: list[Tensor]) -> None:
        self.steps, self.batch, self.input = x.shape
        self.hidden = weights[1].shape[1]
        self.hyper = weights[4].shape[1]
        self.parts, self.gates, _, self.embedding = weights[10].shape
        self.bias = weights[2].numel() > 0
        self.layer_norm = weights[11].numel() > 0


def _tape_shapes(z: _Sizes, save: bool) -> list[tuple[int, ...]]:
    """The shapes of the tape, which is what the forward pass keeps for the backward pass.

    Without `save` there will be no backward pass, and every step overwrites the one before.
    """
    steps, n, h, k = (z.steps if save else 1), z.batch, z.hidden, z.hyper
    norms = 1 if z.layer_norm else 0
    return [
        (z.steps, n, 4 * h),  # W_x x
        (steps, n, 4 * h),  # W_h h
        (steps, n, 4 * z.parts * z.embedding),  # the embeddings z
        (steps, 4, n, h),  # gates
        (steps, n, h),  # tanh of the (normalised) memory
        (steps, n, 4, k),  # small cell: normalised preactivations
        (steps, n, 4, 1),  # their inverse deviations
        (steps, n, 4, k),  # its gates
        (steps, n, k),  # its normalised memory
        (steps, n, 1),  # the inverse deviation
        (steps, n, k),  # tanh of it
        (norms * steps, 4, n, h),  # main cell, if it has layer norms: as above
        (norms * steps, 4, n, 1),
        (norms * steps, n, h),
        (norms * steps, n, 1),
    ]


class _Factor:
    """Multiplies with the transpose of a matrix w, x -> x @ w.T, in every step.

    w is copied into a layout for faster products once, if the sequence is long enough.
    """

    def __init__(self, w: Tensor, z: _Sizes) -> None:
        long = z.steps >= _LONG
        self.onednn = z.batch > 0 and takes_onednn(w)
        if self.onednn:
            w = w.contiguous()
            self.w = laid_out(w, z.batch) if long else w
        else:
            self.w = w.t().contiguous() if long else w.t()

    def __call__(self, x: Tensor) -> Tensor:
        return by_onednn(x, self.w) if self.onednn else torch.mm(x, self.w)


def _normalise(x: Tensor, out: Tensor, rstd: Tensor) -> Tensor:
    """Layer norm over the last axis, without gain and shift, written to `out` and returned.

    The inverse of the standard deviation is written to `rstd`.
    """
    normalised, _, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
    rstd.copy_(inverse)
    return out.copy_(normalised)


def _normalise_backward(grad: Tensor, normalised: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of `_normalise`'s input."""
    # torch's operator normalises its input itself. Of ours, which is normalised already, the mean
    # is 0 and the inverse deviation 1, and what is left is to divide by the true deviation.
    half = grad.dtype in (torch.float16, torch.bfloat16)
    # Of half-precision inputs, kernels of accelerators want these two in float32
    dtype = torch.float32 if half and grad.device.type != "cpu" else grad.dtype
    zero, one = torch.zeros_like(rstd, dtype=dtype), torch.ones_like(rstd, dtype=dtype)
    shape = list(grad.shape[-1:])
    mask = [True, False, False]
    backward = torch.ops.aten.native_layer_norm_backward
    to_input: Tensor = backward(grad, normalised, shape, zero, one, None, None, mask)[0]
    return to_input * rstd


@torch.library.custom_op(
    "hyperize::hyper_lstm",
    mutates_args=(),
    schema="(Tensor x, Tensor s0, Tensor c0, Tensor mask, Tensor[] weights, bool save) -> Tensor[]",
)
@_without_autocast
def hyper_lstm(
    x: Tensor, s0: Tensor, c0: Tensor, mask: Tensor, weights: list[Tensor], save: bool
) -> list[Tensor]:
    """Runs a sequence.

    Args:
        x: Inputs, (T, N, input).
        s0: h and the small cell's output before the first step, (N, H + K).
        c0: The memories of both, (N, H + K).
        mask: Factors of the candidate, (T, N, H); empty for none.
        weights: As in `WEIGHTS`, empty tensors for those that the cell lacks.
        save: Whether to keep what the backward pass needs.

    Returns:
        s (T + 1, N, H + K), c (T + 1, N, H + K), and the tape.
    """
    z = _Sizes(x, weights)
    steps, n, h, k = z.steps, z.batch, z.hidden, z.hyper
    w_ih, u_ih, u_bias = weights[0], weights[3], weights[5]
    flat = x.reshape(steps * n, z.input)  # (T, N, input) -> (T * N, input)
    # (T * N, 4 H) -> (T, N, 4 H), and with K
    xs = product(flat, w_ih.t()).view(steps, n, 4 * h)
    u_xs = product(flat, u_ih[:, h:].t()).view(steps, n, 4 * k)
    if z.bias:
        u_xs += u_bias
    tape = [xs, *(x.new_empty(shape) for shape in _tape_shapes(z, save)[1:])]
    s, c = x.new_empty(steps + 1, n, h + k), x.new_empty(steps + 1, n, h + k)
    s[0], c[0] = s0, c0
    if takes_triton(x, h, k):
        from hyperize.kernels import forward_steps

        forward_steps(u_xs, mask, weights, s, c, tape, save, EPS)
    else:
        _forward_steps(z, u_xs, mask, weights, s, c, tape, save)
    return [s, c, *tape]


def _forward_steps(
    z: _Sizes,
    u_xs: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    s: Tensor,
    c: Tensor,
    tape: list[Tensor],
    save: bool,
) -> None:
    """Runs all steps of `hyper_lstm` in operations of torch.

    Args:
        z: The sizes.
        u_xs: The small cell's products with the inputs, (T, N, 4 K), with its bias.
        mask: As in `hyper_lstm`.
        weights: As in `WEIGHTS`.
        s: Its first entry is read and the others are written, as in `c`.
        c: The memories.
        tape: Its first entry is read and the others are written.
        save: Whether the tape has a place for each step.
    """
    steps, n, h, k = z.steps, z.batch, z.hidden, z.hyper
    _, w_hh, bias, u_ih, u_hh, _, u_gain, u_shift, v, v_bias, scale, gain, shift = weights
    xs, hs, zs, gates, tanhs, u_norm, u_rstd, u_gates, uc_norm, uc_rstd, u_tanhs = tape[:11]
    norm, rstd, c_norm, c_rstd = tape[11:]
    by_w, by_u = _Factor(w_hh, z), _Factor(torch.cat([u_ih[:, :h], u_hh], 1), z)
    v_t = v.t()  # (K, P * 4 * E)
    # (P, 4, H, E) -> (P * 4, E, H)
    scale_t = scale.view(-1, h, z.embedding).transpose(1, 2)
    if steps >= _LONG:
        scale_t = scale_t.contiguous()
    # Only the embeddings of h and x have a bias; those that make the bias get zeros
    z_bias = F.pad(v_bias, (0, v.shape[0] - v_bias.shape[0]))

    for t in range(steps):
        at = t if save else 0
        past, new_s, new_c = s[t], s[t + 1], c[t + 1]

        # The small LSTM, with layer norm on its preactivations and on its memory
        a = by_u(past).add_(u_xs[t])
        a = _normalise(a.view(n, 4, k), u_norm[at], u_rstd[at])  # (N, 4 K) -> (N, 4, K)
        a = torch.addcmul(u_shift[:4], a, u_gain[:4])
        torch.sigmoid(a, out=u_gates[at])
        torch.tanh(a[:, CANDIDATE], out=u_gates[at][:, CANDIDATE])
        u_i, u_f, u_g, u_o = u_gates[at].unbind(1)
        u_c = torch.mul(u_f, c[t][:, h:], out=new_c[:, h:]).addcmul_(u_i, u_g)
        u_c = _normalise(u_c, uc_norm[at], uc_rstd[at])
        torch.tanh(torch.addcmul(u_shift[4], u_c, u_gain[4]), out=u_tanhs[at])
        u_h = torch.mul(u_o, u_tanhs[at], out=new_s[:, h:])

        # Its output makes the embeddings, and these the scales and the bias of the main cell
        torch.addmm(z_bias, u_h, v_t, out=zs[at])
        # (N, P * 4 * E) -> (P * 4, N, E)
        embeddings = zs[at].view(n, 4 * z.parts, z.embedding).transpose(0, 1)
        d = torch.bmm(embeddings, scale_t).view(z.parts, 4, n, h)  # (P * 4, N, H) -> (P, 4, N, H)
        hs[at] = by_w(past[:, :h])
        # (N, 4 H) -> (4, N, H)
        w_h, w_x = hs[at].view(n, 4, h).transpose(0, 1), xs[t].view(n, 4, h).transpose(0, 1)
        if z.bias:
            pre = torch.addcmul(d[2], d[1], w_x).addcmul_(d[0], w_h).add_(bias.view(4, 1, h))
        else:
            pre = torch.mul(d[1], w_x).addcmul_(d[0], w_h)
        if z.layer_norm:
            pre = _normalise(pre, norm[at], rstd[at])
            pre = torch.addcmul(shift[:4, None], pre, gain[:4, None])

        # The main LSTM
        torch.sigmoid(pre[:CANDIDATE], out=gates[at][:CANDIDATE])
        torch.tanh(pre[CANDIDATE], out=gates[at][CANDIDATE])
        torch.sigmoid(pre[OUTPUT], out=gates[at][OUTPUT])
        i, f, g, o = gates[at].unbind(0)
        memory = torch.mul(f, c[t][:, :h], out=new_c[:, :h])
        memory.addcmul_(i, g if mask.numel() == 0 else g * mask[t])
        if z.layer_norm:
            memory = _normalise(memory, c_norm[at], c_rstd[at])
            memory = torch.addcmul(shift[4], memory, gain[4])
        torch.tanh(memory, out=tanhs[at])
        torch.mul(o, tanhs[at], out=new_s[:, :h])


@_without_autocast
def plain(
    x: Tensor, s0: Tensor, c0: Tensor, mask: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Computes `hyper_lstm` in ordinary operations, of which torch knows every derivative.

    Args:
        x: As in `hyper_lstm`, like all other arguments.
        s0: h and the small cell's output before the first step.
        c0: The memories of both.
        mask: Factors of the candidate.
        weights: As in `WEIGHTS`.

    Returns:
        s and c of `hyper_lstm`, but for rounding.
    """
    z = _Sizes(x, weights)
    n, h, k = z.batch, z.hidden, z.hyper
    w_ih, w_hh, bias, u_ih, u_hh, u_bias, u_gain, u_shift, v, v_bias, scale, gain, shift = weights
    xs = F.linear(x, w_ih)  # (T, N, input) -> (T, N, 4 H)
    u_xs = F.linear(x, u_ih[:, h:], u_bias if z.bias else None)
    u_w = torch.cat([u_ih[:, :h], u_hh], 1)
    # (P, 4, H, E) -> (P * 4, E, H)
    scale_t = scale.reshape(-1, h, z.embedding).transpose(1, 2)
    z_bias = F.pad(v_bias, (0, v.shape[0] - v_bias.shape[0]))

    def normalised(x: Tensor) -> Tensor:
        # torch's own layer norm has a wrong third derivative
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()

    s, c = [s0], [c0]
    for t in range(z.steps):
        past, memory, u_memory = s[t], c[t][:, :h], c[t][:, h:]

        # The small LSTM
        a = normalised((u_xs[t] + F.linear(past, u_w)).reshape(n, 4, k))
        i, f, g, o = (u_shift[:4] + a * u_gain[:4]).unbind(1)
        u_memory = f.sigmoid() * u_memory + i.sigmoid() * g.tanh()
        u_h = o.sigmoid() * (u_shift[4] + normalised(u_memory) * u_gain[4]).tanh()

        # The scales and the bias of the main cell
        embeddings = F.linear(u_h, v, z_bias).reshape(n, 4 * z.parts, z.embedding).transpose(0, 1)
        d = torch.bmm(embeddings, scale_t).reshape(z.parts, 4, n, h)
        # (N, 4 H) -> (4, N, H)
        w_h = F.linear(past[:, :h], w_hh).reshape(n, 4, h).transpose(0, 1)
        w_x = xs[t].reshape(n, 4, h).transpose(0, 1)
        pre = d[0] * w_h + d[1] * w_x
        if z.bias:
            pre = pre + d[2] + bias.reshape(4, 1, h)
        if z.layer_norm:
            pre = shift[:4, None] + normalised(pre) * gain[:4, None]

        # The main LSTM
        i, f, g, o = pre.unbind(0)
        g = g.tanh() if mask.numel() == 0 else g.tanh() * mask[t]
        memory = f.sigmoid() * memory + i.sigmoid() * g
        seen = shift[4] + normalised(memory) * gain[4] if z.layer_norm else memory
        s.append(torch.cat([o.sigmoid() * seen.tanh(), u_h], 1))
        c.append(torch.cat([memory, u_memory], 1))
    return torch.stack(s), torch.stack(c)


@torch.library.custom_op(
    "hyperize::hyper_lstm_backward",
    mutates_args=(),
    schema="(Tensor grad_s, Tensor grad_c, Tensor x, Tensor mask, Tensor[] weights, "
    "Tensor[] outputs, bool needs_x) -> Tensor[]",
)
@_without_autocast
def _hyper_lstm_backward(
    grad_s: Tensor,
    grad_c: Tensor,
    x: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    outputs: list[Tensor],
    needs_x: bool,
) -> list[Tensor]:
    """Gradients of `hyper_lstm`.

    Returns:
        Those of x (empty if not needed), s0, c0 and of each weight.
    """
    z = _Sizes(x, weights)
    triton = takes_triton(x, z.hidden, z.hyper)
    chunk = _Chunk(x, z, triton)
    s, c, *tape = outputs
    sums = _Sums(z, x, weights, s, tape[2], needs_x)
    run_steps: Any = _BackwardSteps
    if triton:
        from hyperize.kernels import BackwardSteps as run_steps
    steps = run_steps(grad_s, grad_c, mask, weights, c, tape)
    for end in range(z.steps, 0, -chunk.size):
        start = max(end - chunk.size, 0)
        steps.run(start, end, *chunk.tensors)
        sums.add(start, end, chunk)
        _add_norms(sums.d_weights, start, end, chunk, tape)
    return [sums.d_x, *steps.initial(), *sums.of_weights()]


class _Chunk:
    """The gradients of what the products gave, for `size` steps at a time.

    Multiplied with what went into the products, they give the gradients of the weights. `tensors`
    are these:

        d_as   (size, N, 4 K)         of the small cell's preactivations, without the inputs' part
        d_hs   (size, N, 4 H)         of W_h h
        d_xs   (size, N, 4 H)         of W_x x
        d_ds   (P * 4, size, N, H)    of the scales and the bias
        d_zs   (size, N, P * 4 * E)   of the embeddings z
        d_us   (size, N, 4, K)        of the small cell's preactivations after the layer norm
        d_ucs  (size, N, K)           of its memory, after the layer norm
        d_ps   (size, 4, N, H)        as d_us of the main cell, if it has layer norms
        d_mcs  (size, N, H)           as d_ucs

    For Triton the first two are one, (size, N, 4 K + 4 H), so that one product gives the gradient
    of the states. A HyperRNN has one gate instead of four, and neither d_us nor d_ucs nor d_mcs.
    """

    def __init__(self, x: Tensor, z: _Sizes, triton: bool) -> None:
        n, h, k, g = z.batch, z.hidden, z.hyper, z.gates
        d, e = g * z.parts, g * z.parts * z.embedding
        norms, lstm = 1 if z.layer_norm else 0, 1 if g > 1 else 0
        numbers = n * (2 * g * h + g * k + d * h + e + lstm * 5 * k + norms * (g + lstm) * h)
        chunk = max(_CHUNK, _CHUNK_BYTES // (numbers * x.element_size())) if triton else _CHUNK
        size = self.size = min(chunk, z.steps)
        self.d_ds = x.new_empty(d, size, n, h)
        if triton:
            products = x.new_empty(size, n, g * k + g * h)
            self.d_as, self.d_hs = products[..., : g * k], products[..., g * k :]
        else:
            self.d_as, self.d_hs = x.new_empty(size, n, g * k), x.new_empty(size, n, g * h)
        self.d_xs, self.d_zs = x.new_empty(size, n, g * h), x.new_empty(size, n, e)
        self.d_us = x.new_empty(lstm * size, n, g, k)
        self.d_ucs = x.new_empty(lstm * size, n, k)
        self.d_ps = x.new_empty(norms * size, g, n, h)
        self.d_mcs = x.new_empty(norms * lstm * size, n, h)
        self.tensors: tuple[Tensor, ...] = (products,) if triton else (self.d_as, self.d_hs)
        self.tensors += (self.d_xs, self.d_ds, self.d_zs, self.d_us, self.d_ucs)
        self.tensors += (self.d_ps, self.d_mcs)


class _BackwardSteps:
    """Runs the steps of the backward pass, from the last to the first, in operations of torch.

    Args:
        grad_s: The gradient of s.
        grad_c: The gradient of c.
        mask: As in `hyper_lstm`.
        weights: As in `WEIGHTS`.
        c: The memories.
        tape: What the forward pass saved.
    """

    def __init__(
        self,
        grad_s: Tensor,
        grad_c: Tensor,
        mask: Tensor,
        weights: list[Tensor],
        c: Tensor,
        tape: list[Tensor],
    ) -> None:
        z = self._z = _Sizes(grad_s, weights)
        z.steps -= 1  # s and c have one more
        self._grad_s, self._grad_c, self._mask, self._c = grad_s, grad_c, mask, c
        self._weights, self._tape = weights, tape
        w_hh, u_ih, u_hh, scale = weights[1], weights[3], weights[4], weights[10]
        u_w = torch.cat([u_ih[:, : z.hidden], u_hh], 1)  # (4 K, H + K)
        self._by_w_t, self._by_u_t = _Factor(w_hh.t(), z), _Factor(u_w.t(), z)
        self._scales = scale.view(-1, z.hidden, z.embedding)  # (P, 4, H, E) -> (P * 4, H, E)
        self._scales_t = self._scales.transpose(1, 2).contiguous()
        self._d_s, self._d_c = grad_s[z.steps], grad_c[z.steps]

    def run(
        self,
        start: int,
        end: int,
        d_as: Tensor,
        d_hs: Tensor,
        d_xs: Tensor,
        d_ds: Tensor,
        d_zs: Tensor,
        d_us: Tensor,
        d_ucs: Tensor,
        d_ps: Tensor,
        d_mcs: Tensor,
    ) -> None:
        """Runs the steps from the one before `end` down to `start`; step t writes at t - start."""
        z, mask, c = self._z, self._mask, self._c
        n, h, k, e, parts = z.batch, z.hidden, z.hyper, z.embedding, 4 * z.parts
        u_gain, v, gain = self._weights[6], self._weights[8], self._weights[11]
        scales, scales_t, dropped = self._scales, self._scales_t, mask.numel() > 0
        xs, hs, zs, gates, tanhs, u_norm, u_rstd, u_gates, uc_norm, uc_rstd, u_tanhs = self._tape[
            :11
        ]
        norm, rstd, c_norm, c_rstd = self._tape[11:]
        d_s, d_c = self._d_s, self._d_c
        for t in reversed(range(start, end)):
            at = t - start
            d_h, d_u = d_s[:, :h], d_s[:, h:]
            d_memory, d_u_memory = d_c[:, :h], d_c[:, h:]

            # The main LSTM
            i, f, g, o = gates[t].unbind(0)
            d_tanh = _tanh_backward(d_h * o, tanhs[t])
            if z.layer_norm:
                d_mcs[at] = d_tanh
                d_tanh = _normalise_backward(d_tanh * gain[4], c_norm[t], c_rstd[t])
            d_memory = d_memory + d_tanh
            d_gates = torch.empty_like(gates[t])
            torch.mul(d_memory, g * mask[t] if dropped else g, out=d_gates[INPUT])
            torch.mul(d_memory, c[t][:, :h], out=d_gates[FORGET])
            torch.mul(d_memory, i, out=d_gates[CANDIDATE])
            if dropped:
                d_gates[CANDIDATE] *= mask[t]
            torch.mul(d_h, tanhs[t], out=d_gates[OUTPUT])
            direct = z.bias and not z.layer_norm
            d_pre = d_ds[8:, at] if direct else torch.empty_like(d_gates)
            _sigmoid_backward(
                d_gates[:CANDIDATE], gates[t][:CANDIDATE], grad_input=d_pre[:CANDIDATE]
            )
            _tanh_backward(d_gates[CANDIDATE], g, grad_input=d_pre[CANDIDATE])
            _sigmoid_backward(d_gates[OUTPUT], o, grad_input=d_pre[OUTPUT])
            if z.layer_norm:
                d_ps[at] = d_pre
                d_pre = _normalise_backward(d_pre * gain[:4, None], norm[t], rstd[t])
                if z.bias:
                    d_ds[8:, at] = d_pre

            # The scales are too large to keep, so they are computed again. The part that makes the
            # bias is not needed.
            # (N, P * 4 * E) -> (P * 4, N, E)
            embeddings = zs[t].view(n, parts, e).transpose(0, 1)[:8]
            d = torch.bmm(embeddings, scales_t[:8])  # (8, N, H)
            # (N, 4 H) -> (4, N, H)
            torch.mul(d_pre, hs[t].view(n, 4, h).transpose(0, 1), out=d_ds[:4, at])
            torch.mul(d_pre, xs[t].view(n, 4, h).transpose(0, 1), out=d_ds[4:8, at])
            torch.mul(d_pre, d[:4], out=d_hs[at].view(n, 4, h).transpose(0, 1))
            torch.mul(d_pre, d[4:], out=d_xs[at].view(n, 4, h).transpose(0, 1))
            # (P * 4, N, E) -> (N, P * 4 * E)
            d_zs[at].view(n, parts, e).copy_(torch.bmm(d_ds[:, at], scales).transpose(0, 1))
            d_u = torch.addmm(d_u, d_zs[at], v)

            # The small LSTM
            u_i, u_f, u_g, u_o = u_gates[t].unbind(1)
            _tanh_backward(d_u * u_o, u_tanhs[t], grad_input=d_ucs[at])
            d_tanh = _normalise_backward(d_ucs[at] * u_gain[4], uc_norm[t], uc_rstd[t])
            d_u_memory = d_u_memory + d_tanh
            d_gates = torch.stack(
                (d_u_memory * u_g, d_u_memory * c[t][:, h:], d_u_memory * u_i, d_u * u_tanhs[t]), 1
            )
            _sigmoid_backward(d_gates, u_gates[t], grad_input=d_us[at])
            _tanh_backward(d_gates[:, CANDIDATE], u_g, grad_input=d_us[at][:, CANDIDATE])
            d_a = _normalise_backward(d_us[at] * u_gain[:4], u_norm[t], u_rstd[t])
            d_as[at] = d_a.view(n, 4 * k)  # (N, 4, K) -> (N, 4 K)

            # What the step before receives
            d_s = self._by_u_t(d_as[at]).add_(self._grad_s[t])
            d_s[:, :h] += self._by_w_t(d_hs[at])
            d_c = self._grad_c[t].clone()
            d_c[:, :h].addcmul_(d_memory, f)
            d_c[:, h:].addcmul_(d_u_memory, u_f)
        self._d_s, self._d_c = d_s, d_c

    def initial(self) -> tuple[Tensor, Tensor]:
        """The gradients of the states before the first step, after all steps."""
        return self._d_s, self._d_c


class _Sums:
    """Adds up the gradients of the weights, and collects those of the inputs."""

    def __init__(
        self, z: _Sizes, x: Tensor, weights: list[Tensor], s: Tensor, zs: Tensor, needs_x: bool
    ) -> None:
        h, k, g = z.hidden, z.hyper, z.gates
        self._z, self._x, self._weights, self._s, self._zs = z, x, weights, s, zs
        self._needs_x = needs_x
        self.d_x = x.new_empty(x.shape if needs_x else (0,))
        self.d_weights = [torch.zeros_like(w) for w in weights]
        # These gradients are kept transposed, because their products are faster that way
        self._d_w_ih, self._d_w_hh = x.new_zeros(z.input, g * h), x.new_zeros(h, g * h)
        self._d_u_w = x.new_zeros(h + k, g * k)
        self._d_scales_t = x.new_zeros(g * z.parts, z.embedding, h)

    def add(self, start: int, end: int, chunk: _Chunk) -> None:
        """Adds those of the steps from `start` to before `end`, but for the layer norms'."""
        z, x, s, d_weights = self._z, self._x, self._s, self.d_weights
        n, h, e, parts = z.batch, z.hidden, z.embedding, z.gates * z.parts
        w_ih, u_ih, v_bias = self._weights[0], self._weights[3], self._weights[9]
        # (chunk, N, ...) -> (chunk * N, ...)
        m = end - start
        rows = m * n
        products = (chunk.d_hs, chunk.d_xs, chunk.d_as, chunk.d_zs)
        d_h, d_x, d_a, d_z = (d[:m].flatten(0, 1) for d in products)
        past, now = s[start:end].flatten(0, 1), s[start + 1 : end + 1].flatten(0, 1)
        inputs = x[start:end].flatten(0, 1)
        if self._needs_x:
            d_inputs = product(d_x, w_ih).add_(product(d_a, u_ih[:, h:]))
            # (chunk * N, input) -> (chunk, N, input)
            self.d_x[start:end] = d_inputs.view(m, n, x.shape[2])
        self._d_w_ih += product(inputs.t(), d_x)
        self._d_w_hh += product(past[:, :h].t(), d_h)
        self._d_u_w += product(past.t(), d_a)
        d_weights[3][:, h:] += product(d_a.t(), inputs)
        d_weights[8] += product(d_z.t(), now[:, h:])
        d_weights[9] += d_z[:, : v_bias.shape[0]].sum(0)
        # (chunk, N, P * 4 * E) -> (P * 4, chunk * N, E)
        embeddings = self._zs[start:end].view(rows, parts, e).transpose(0, 1)
        # (P * 4, chunk, N, H) -> (P * 4, chunk * N, H)
        d_d = chunk.d_ds[:, :m].flatten(1, 2)
        self._d_scales_t.baddbmm_(embeddings.transpose(1, 2), d_d)
        if z.bias:
            d_weights[2] += d_d[2 * z.gates :].sum(1).view(-1)  # (4, H) -> (4 H,)
            d_weights[5] += d_a.sum(0)

    def of_weights(self) -> list[Tensor]:
        """The gradients of all weights, after the last chunk."""
        h, e, d_weights = self._z.hidden, self._z.embedding, self.d_weights
        d_weights[0].copy_(self._d_w_ih.t())
        d_weights[1].copy_(self._d_w_hh.t())
        d_weights[3][:, :h].copy_(self._d_u_w[:h].t())
        d_weights[4].copy_(self._d_u_w[h:].t())
        d_weights[10].view(-1, h, e).copy_(self._d_scales_t.transpose(1, 2))
        return d_weights


def _add_norms(
    d_weights: list[Tensor], start: int, end: int, chunk: _Chunk, tape: list[Tensor]
) -> None:
    """Adds the gradients of the gains and shifts of a HyperLSTM's layer norms, as `_Sums.add`."""
    m = end - start
    u_norm, uc_norm, norm, c_norm = (tape[at][start:end] for at in (5, 8, 11, 13))
    d_us, d_ucs, d_ps, d_mcs = (d[:m] for d in (chunk.d_us, chunk.d_ucs, chunk.d_ps, chunk.d_mcs))
    d_weights[6][:4] += (d_us * u_norm).sum((0, 1))
    d_weights[6][4] += (d_ucs * uc_norm).sum((0, 1))
    d_weights[7][:4] += d_us.sum((0, 1))
    d_weights[7][4] += d_ucs.sum((0, 1))
    if len(norm):
        d_weights[11][:4] += (d_ps * norm).sum((0, 2))
        d_weights[11][4] += (d_mcs * c_norm).sum((0, 1))
        d_weights[12][:4] += d_ps.sum((0, 2))
        d_weights[12][4] += d_mcs.sum((0, 1))


@hyper_lstm.register_fake
def _(
    x: Tensor, s0: Tensor, c0: Tensor, mask: Tensor, weights: list[Tensor], save: bool
) -> list[Tensor]:
    z = _Sizes(x, weights)
    states = (z.steps + 1, z.batch, z.hidden + z.hyper)
    return [x.new_empty(shape) for shape in (states, states, *_tape_shapes(z, save))]


@_hyper_lstm_backward.register_fake
def _(
    grad_s: Tensor,
    grad_c: Tensor,
    x: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    outputs: list[Tensor],
    needs_x: bool,
) -> list[Tensor]:
    inputs = x.new_empty(x.shape if needs_x else (0,))
    return [inputs, *(torch.empty_like(t) for t in (grad_s[0], grad_c[0], *weights))]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, s0, c0, mask, weights, _ = inputs
    ctx.save_for_backward(x, s0, c0, mask, *weights, *output)
    # The tape never has gradients, and zeros in their place would be as large as the tape
    ctx.set_materialize_grads(False)
    ctx.weights = len(weights)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    inputs, outputs = saved[: 4 + ctx.weights], saved[4 + ctx.weights :]
    given = [(at, d) for at, d in enumerate(grads[:2]) if d is not None]
    if _is_watched(given):

        def run(x: Tensor, s0: Tensor, c0: Tensor, mask: Tensor, *weights: Tensor) -> Any:
            return plain(x, s0, c0, mask, list(weights))

        needs = ctx.needs_input_grad
        gradients = _plain_backward(run, [*needs[:4], *needs[4]], list(inputs), given)
        return *gradients[:4], gradients[4:], None
    d_states = [
        torch.zeros_like(t) if d is None else d for t, d in zip(outputs[:2], grads[:2], strict=True)
    ]
    x, _, _, mask, *weights = inputs
    needs_x = ctx.needs_input_grad[0]
    d_x, d_s, d_c, *d_weights = _hyper_lstm_backward(*d_states, x, mask, weights, outputs, needs_x)
    return d_x if needs_x else None, d_s, d_c, None, d_weights, None


def _is_watched(given: list[tuple[int, Tensor]]) -> bool:
    """Whether torch has to see each operation of a backward pass that starts from these."""
    # With create_graph=True torch enables gradients here: it will differentiate what this computes
    return torch.is_grad_enabled() or is_transformed(*(d for _, d in given))


def _plain_backward(
    function: Callable[..., Any],
    needed: list[bool],
    inputs: list[Tensor],
    given: list[tuple[int, Tensor]],
) -> list[Tensor | None]:
    """The gradients of an operator's inputs, in operations that can be differentiated again.

    Args:
        function: Computes what the operator does, of the same tensors.
        needed: For each input whether its gradient is needed.
        inputs: The operator's tensors.
        given: The gradients of the function's results, each with the result's number.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One input may have been computed from another. Aliases keep the gradient of the other from
        # also counting the way through the one.
        aliases = [t.view_as(t) for t in inputs]
        outputs = function(*aliases)
        found = iter(
            torch.autograd.grad(
                [outputs[at] for at, _ in given],
                [t for t, need in zip(aliases, needed, strict=True) if need],
                [d for _, d in given],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [next(found) if need else None for need in needed]


hyper_lstm.register_autograd(_backward, setup_context=_setup_context)


# ------------------------------------------------------------------------------------ the HyperRNN


@torch.library.custom_op(
    "hyperize::hyper_rnn",
    mutates_args=(),
    schema="(Tensor x, Tensor s0, Tensor[] weights, bool relu, bool save) -> Tensor[]",
)
@_without_autocast
def hyper_rnn(x: Tensor, s0: Tensor, weights: list[Tensor], relu: bool, save: bool) -> list[Tensor]:
    """Runs a sequence of a HyperRNN cell, only where `takes_triton`.

    Args:
        x: Inputs, (T, N, input).
        s0: h and the small cell's output before the first step, (N, H + K).
        weights: As in `WEIGHTS`, empty tensors for those that the cell lacks.
        relu: Whether the nonlinearity is that, instead of tanh.
        save: Whether to keep what the backward pass needs.

    Returns:
        s (T + 1, N, H + K), and the tape.
    """
    from hyperize.kernels import rnn_forward_steps

    z = _Sizes(x, weights)
    steps, n, h, k = z.steps, z.batch, z.hidden, z.hyper
    w_ih, u_ih, u_bias = weights[0], weights[3], weights[5]
    flat = x.reshape(steps * n, z.input)  # (T, N, input) -> (T * N, input)
    # (T * N, H) -> (T, N, H), and with K
    xs = product(flat, w_ih.t()).view(steps, n, h)
    u_xs = product(flat, u_ih[:, h:].t()).view(steps, n, k)
    if z.bias:
        u_xs += u_bias
    tape = [xs, *(x.new_empty(shape) for shape in _rnn_tape_shapes(z, save)[1:])]
    s = x.new_empty(steps + 1, n, h + k)
    s[0] = s0
    rnn_forward_steps(u_xs, weights, s, tape, relu, save, EPS)
    return [s, *tape]


def _rnn_tape_shapes(z: _Sizes, save: bool) -> list[tuple[int, ...]]:
    """As `_tape_shapes`; nothing but the first is kept without `save`."""
    steps, n, h = (z.steps if save else 0), z.batch, z.hidden
    norms = 1 if z.layer_norm else 0
    return [
        (z.steps, n, h),  # W_x x
        (steps, n, h),  # W_h h
        (steps, n, z.parts * z.embedding),  # the embeddings z
        (norms * steps, n, h),  # normalised preactivations
        (norms * steps, n, 1),  # their inverse deviations
    ]


def plain_rnn(x: Tensor, s0: Tensor, weights: Sequence[Any], relu: bool) -> Tensor:
    """Computes `hyper_rnn` in ordinary operations of torch.

    Args:
        x: As in `hyper_rnn`, like all other arguments.
        s0: h and the small cell's output before the first step.
        weights: As in `WEIGHTS`: tensors, and None for those that the cell lacks.
        relu: Whether the nonlinearity is that, instead of tanh.

    Returns:
        s of `hyper_rnn` without its first entry, (T, N, H + K).
    """
    w_ih, w_hh, bias, u_ih, u_hh, u_bias, _, _, v, v_bias, scale, gain, shift = weights
    (parts, _, size, e), phi = scale.shape, (torch.relu if relu else torch.tanh)
    products = F.linear(x, w_ih)  # (T, N, H)
    hyper_products = F.linear(x, u_ih[:, size:], u_bias)
    h, u = s0[:, :size], s0[:, size:]
    z_bias = F.pad(v_bias, (0, (parts - 2) * e))
    scales = scale[:, 0].transpose(1, 2)  # (P, 1, H, E) -> (P, E, H)
    u_w = torch.cat((u_ih[:, :size], u_hh), 1)  # (K, H + K)
    states = []
    for w_x, u_x in zip(products, hyper_products, strict=True):
        u = phi(u_x + F.linear(torch.cat((h, u), 1), u_w))
        z = F.linear(u, v, z_bias)
        # (N, P * E) -> (P, N, E), then (P, N, H)
        d = torch.bmm(z.view(len(z), parts, e).transpose(0, 1), scales)
        pre = d[0] * F.linear(h, w_hh) + d[1] * w_x
        if bias is not None:
            pre = pre + d[2] + bias
        if gain is not None and shift is not None:
            pre = F.layer_norm(pre, (size,), gain[0], shift[0], EPS)
        h = phi(pre)
        states.append(torch.cat((h, u), 1))
    return torch.stack(states)


@torch.library.custom_op(
    "hyperize::hyper_rnn_backward",
    mutates_args=(),
    schema="(Tensor grad_s, Tensor x, Tensor[] weights, Tensor[] outputs, bool relu, bool needs_x)"
    " -> Tensor[]",
)
@_without_autocast
def _hyper_rnn_backward(
    grad_s: Tensor,
    x: Tensor,
    weights: list[Tensor],
    outputs: list[Tensor],
    relu: bool,
    needs_x: bool,
) -> list[Tensor]:
    """Gradients of `hyper_rnn`.

    Returns:
        Those of x (empty if not needed), s0 and of each weight.
    """
    from hyperize.kernels import RNNBackwardSteps

    z = _Sizes(x, weights)
    s, *tape = outputs
    chunk = _Chunk(x, z, True)
    sums = _Sums(z, x, weights, s, tape[2], needs_x)
    steps = RNNBackwardSteps(grad_s, weights, s, tape, relu)
    products, d_xs, d_ds, d_zs, _, _, d_ps, _ = chunk.tensors
    for end in range(z.steps, 0, -chunk.size):
        start = max(end - chunk.size, 0)
        steps.run(start, end, products, d_xs, d_ds, d_zs, d_ps)
        sums.add(start, end, chunk)
        if z.layer_norm:
            d_p = d_ps[: end - start, 0]  # (chunk, 1, N, H) -> (chunk, N, H)
            sums.d_weights[11][0] += (d_p * tape[3][start:end]).sum((0, 1))
            sums.d_weights[12][0] += d_p.sum((0, 1))
    return [sums.d_x, steps.initial(), *sums.of_weights()]


@hyper_rnn.register_fake
def _(x: Tensor, s0: Tensor, weights: list[Tensor], relu: bool, save: bool) -> list[Tensor]:
    z = _Sizes(x, weights)
    states = (z.steps + 1, z.batch, z.hidden + z.hyper)
    return [x.new_empty(shape) for shape in (states, *_rnn_tape_shapes(z, save))]


@_hyper_rnn_backward.register_fake
def _(
    grad_s: Tensor,
    x: Tensor,
    weights: list[Tensor],
    outputs: list[Tensor],
    relu: bool,
    needs_x: bool,
) -> list[Tensor]:
    inputs = x.new_empty(x.shape if needs_x else (0,))
    return [inputs, *(torch.empty_like(t) for t in (grad_s[0], *weights))]


def _setup_rnn_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, s0, weights, ctx.relu, _ = inputs
    ctx.save_for_backward(x, s0, *weights, *output)
    ctx.set_materialize_grads(False)
    ctx.weights = len(weights)


def _rnn_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    saved, relu, needs = ctx.saved_tensors, ctx.relu, ctx.needs_input_grad
    inputs, outputs = saved[: 2 + ctx.weights], saved[2 + ctx.weights :]
    given = [(0, d) for d in grads[:1] if d is not None]
    if _is_watched(given):

        def run(x: Tensor, s0: Tensor, *weights: Tensor) -> Any:
            there = [w if w.numel() else None for w in weights]
            return (torch.cat([s0[None], plain_rnn(x, s0, there, relu)]),)

        gradients = _plain_backward(run, [*needs[:2], *needs[2]], list(inputs), given)
        return *gradients[:2], gradients[2:], None, None
    x, _, *weights = inputs
    grad_s = given[0][1] if given else torch.zeros_like(outputs[0])
    d_x, d_s, *d_weights = _hyper_rnn_backward(grad_s, x, weights, outputs, relu, needs[0])
    return d_x if needs[0] else None, d_s, d_weights, None, None


hyper_rnn.register_autograd(_rnn_backward, setup_context=_setup_rnn_context)
