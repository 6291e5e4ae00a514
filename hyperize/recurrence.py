"""The operator that runs a HyperLSTM cell over a sequence, with a backward pass written by hand.

Equations, names and shapes of the weights are documented at `HyperLSTMCell` (arXiv 1609.09106, app.
A.2.2). What does not depend on the recurrence is one product before the loop over the steps, and
the gradients of the weights are products of many steps at once. As one operator of torch's
dispatcher it is opaque to torch.compile and torch.export, which would otherwise unroll the loop.

Buffers of a sequence of T steps of a batch of N, with the small cell's in names that begin with u:

    s  (T + 1, N, H + K)   h and the small cell's output, s[0] the initial ones
    c  (T + 1, N, H + K)   the memories of both, likewise
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperize.products import by_onednn, product, takes_onednn

__all__: list[str] = []

_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward

EPS = 1e-3
"""Of every layer norm, as in the author's code."""
_CHUNK = 16
"""Steps whose gradients of weights are one product."""
_LONG = 8
"""Steps from which on a weight is laid out anew once: its products are faster then."""

INPUT, FORGET, CANDIDATE, OUTPUT = range(4)
"""Order of the gates in every stacked parameter and buffer, that of nn.LSTM; g is the candidate."""

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


class _Sizes:
    """Sizes of one call of the operator, told from its tensors."""

    def __init__(self, x: Tensor, weights: list[Tensor]) -> None:
        self.steps, self.batch, self.input = x.shape
        self.hidden = weights[1].shape[1]
        self.hyper = weights[4].shape[1]
        self.parts, _, _, self.embedding = weights[10].shape
        self.bias = weights[2].numel() > 0
        self.layer_norm = weights[11].numel() > 0


def _tape_shapes(z: _Sizes, save: bool) -> list[tuple[int, ...]]:
    """Shapes of what the forward pass hands to the backward pass; one step of each if not saved."""
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
    """A matrix w that each step multiplies with, laid out for it once: x -> x @ w.T."""

    def __init__(self, w: Tensor, z: _Sizes) -> None:
        long = z.steps >= _LONG
        self.onednn = z.batch > 0 and takes_onednn(w)
        if self.onednn:
            w = w.contiguous()
            self.w = torch.ops.mkldnn._reorder_linear_weight(w, z.batch) if long else w
        else:
            self.w = w.t().contiguous() if long else w.t()

    def __call__(self, x: Tensor) -> Tensor:
        return by_onednn(x, self.w) if self.onednn else torch.mm(x, self.w)


def _normalise(x: Tensor, out: Tensor, rstd: Tensor) -> Tensor:
    """Layer norm over the last axis without gain and bias; also writes the inverse deviation."""
    normalised, _, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
    rstd.copy_(inverse)
    return out.copy_(normalised)


def _normalise_backward(grad: Tensor, normalised: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of `_normalise`'s input."""
    # The formula of the operator, whose input is normalised here already
    zero, one = torch.zeros_like(rstd), torch.ones_like(rstd)
    shape = list(grad.shape[-1:])
    mask = [True, False, False]
    backward = torch.ops.aten.native_layer_norm_backward
    return backward(grad, normalised, shape, zero, one, None, None, mask)[0] * rstd


@torch.library.custom_op(
    "hyperize::hyper_lstm",
    mutates_args=(),
    schema="(Tensor x, Tensor s0, Tensor c0, Tensor mask, Tensor[] weights, bool save) -> Tensor[]",
)
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
        save: Keep what the backward pass needs.

    Returns:
        s (T + 1, N, H + K), c (T + 1, N, H + K), and the tape.
    """
    z = _Sizes(x, weights)
    steps, n, h, k = z.steps, z.batch, z.hidden, z.hyper
    w_ih, w_hh, bias, u_ih, u_hh, u_bias, u_gain, u_shift, v, v_bias, scale, gain, shift = weights
    flat = x.reshape(steps * n, z.input)  # (T, N, input) -> (T * N, input)
    # (T * N, 4 H) -> (T, N, 4 H), and with K
    xs = product(flat, w_ih.t()).view(steps, n, 4 * h)
    u_xs = product(flat, u_ih[:, h:].t()).view(steps, n, 4 * k)
    if z.bias:
        u_xs += u_bias
    tape = [xs, *(x.new_empty(shape) for shape in _tape_shapes(z, save)[1:])]
    hs, zs, gates, tanhs, u_norm, u_rstd, u_gates, uc_norm, uc_rstd, u_tanhs = tape[1:11]
    norm, rstd, c_norm, c_rstd = tape[11:]
    s, c = x.new_empty(steps + 1, n, h + k), x.new_empty(steps + 1, n, h + k)
    s[0], c[0] = s0, c0

    by_w, by_u = _Factor(w_hh, z), _Factor(torch.cat([u_ih[:, :h], u_hh], 1), z)
    v_t = v.t()  # (K, P * 4 * E)
    # (P, 4, H, E) -> (P * 4, E, H)
    scale_t = scale.view(-1, h, z.embedding).transpose(1, 2)
    if steps >= _LONG:
        scale_t = scale_t.contiguous()
    # The embeddings of the bias have no bias themselves
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
    return [s, c, *tape]


@torch.library.custom_op(
    "hyperize::hyper_lstm_backward",
    mutates_args=(),
    schema="(Tensor grad_s, Tensor grad_c, Tensor x, Tensor mask, Tensor[] weights, "
    "Tensor[] outputs, bool needs_x) -> Tensor[]",
)
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
    n, h, k, e = z.batch, z.hidden, z.hyper, z.embedding
    w_ih, w_hh, _, u_ih, u_hh, _, u_gain, _, v, v_bias, scale, gain, _ = weights
    s, c, xs, hs, zs, gates, tanhs, u_norm, u_rstd, u_gates = outputs[:10]
    uc_norm, uc_rstd, u_tanhs, norm, rstd, c_norm, c_rstd = outputs[10:]
    u_w = torch.cat([u_ih[:, :h], u_hh], 1)  # (4 K, H + K)
    by_w_t, by_u_t = _Factor(w_hh.t(), z), _Factor(u_w.t(), z)
    scales = scale.view(-1, h, e)  # (P, 4, H, E) -> (P * 4, H, E)
    scales_t = scales.transpose(1, 2).contiguous()
    parts = len(scales)
    dropped = mask.numel() > 0

    # Gradients of the products, of _CHUNK steps at a time: enough for an efficient product with
    # what was multiplied, which is where the gradients of the weights come from, and few enough to
    # stay in the processor's cache.
    size = min(_CHUNK, z.steps)
    d_ds = x.new_empty(4 * z.parts, size, n, h)  # of the scales and the bias
    d_hs, d_xs = x.new_empty(size, n, 4 * h), x.new_empty(size, n, 4 * h)
    d_as, d_zs = x.new_empty(size, n, 4 * k), x.new_empty(size, n, v.shape[0])
    d_us, d_ucs = x.new_empty(size, n, 4, k), x.new_empty(size, n, k)
    d_ps, d_mcs = (x.new_empty(size if z.layer_norm else 0, *t.shape[1:]) for t in (norm, c_norm))
    d_x = x.new_empty(x.shape if needs_x else (0,))
    d_weights = [torch.zeros_like(w) for w in weights]
    # Transposed, as they are computed: these products are faster so
    d_w_ih, d_w_hh = w_ih.new_zeros(z.input, 4 * h), w_hh.new_zeros(h, 4 * h)
    d_u_w, d_scales_t = u_w.new_zeros(h + k, 4 * k), torch.zeros_like(scales_t)

    d_s, d_c = grad_s[z.steps], grad_c[z.steps]
    for end in range(z.steps, 0, -size):
        start = max(end - size, 0)
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

            # The scales, computed again as they are large, and the products that they scale
            # (N, P * 4 * E) -> (P * 4, N, E); no need for the bias
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

            # The step before
            d_s = by_u_t(d_as[at]).add_(grad_s[t])
            d_s[:, :h] += by_w_t(d_hs[at])
            d_c = grad_c[t].clone()
            d_c[:, :h].addcmul_(d_memory, f)
            d_c[:, h:].addcmul_(d_u_memory, u_f)

        # (chunk, N, ...) -> (chunk * N, ...)
        m = end - start
        rows = m * n
        d_h, d_x_, d_a, d_z = (d[:m].flatten(0, 1) for d in (d_hs, d_xs, d_as, d_zs))
        past, now = s[start:end].flatten(0, 1), s[start + 1 : end + 1].flatten(0, 1)
        inputs = x[start:end].flatten(0, 1)
        if needs_x:
            d_inputs = product(d_x_, w_ih).add_(product(d_a, u_ih[:, h:]))
            # (chunk * N, input) -> (chunk, N, input)
            d_x[start:end] = d_inputs.view(m, n, x.shape[2])
        d_w_ih += product(inputs.t(), d_x_)
        d_w_hh += product(past[:, :h].t(), d_h)
        d_u_w += product(past.t(), d_a)
        d_weights[3][:, h:] += product(d_a.t(), inputs)
        d_weights[8] += product(d_z.t(), now[:, h:])
        d_weights[9] += d_z[:, : v_bias.shape[0]].sum(0)
        # (chunk, N, P * 4 * E) -> (P * 4, chunk * N, E)
        embeddings = zs[start:end].view(rows, parts, e).transpose(0, 1)
        d_d = d_ds[:, :m].flatten(1, 2)  # (P * 4, chunk, N, H) -> (P * 4, chunk * N, H)
        d_scales_t.baddbmm_(embeddings.transpose(1, 2), d_d)
        if z.bias:
            d_weights[2] += d_d[8:].sum(1).view(-1)  # (4, H) -> (4 H,)
            d_weights[5] += d_a.sum(0)
        d_weights[6][:4] += (d_us[:m] * u_norm[start:end]).sum((0, 1))
        d_weights[6][4] += (d_ucs[:m] * uc_norm[start:end]).sum((0, 1))
        d_weights[7][:4] += d_us[:m].sum((0, 1))
        d_weights[7][4] += d_ucs[:m].sum((0, 1))
        if z.layer_norm:
            d_weights[11][:4] += (d_ps[:m] * norm[start:end]).sum((0, 2))
            d_weights[11][4] += (d_mcs[:m] * c_norm[start:end]).sum((0, 1))
            d_weights[12][:4] += d_ps[:m].sum((0, 2))
            d_weights[12][4] += d_mcs[:m].sum((0, 1))
    d_weights[0].copy_(d_w_ih.t())
    d_weights[1].copy_(d_w_hh.t())
    d_weights[3][:, :h].copy_(d_u_w[:h].t())
    d_weights[4].copy_(d_u_w[h:].t())
    d_weights[10].view(-1, h, e).copy_(d_scales_t.transpose(1, 2))
    return [d_x, d_s, d_c, *d_weights]


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
    x, _, _, mask, weights, _ = inputs
    ctx.save_for_backward(x, mask, *weights, *output)
    ctx.set_materialize_grads(False)  # of the tape, which is large and has none
    ctx.needs_x = ctx.needs_input_grad[0]
    ctx.weights = len(weights)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, mask, *rest = ctx.saved_tensors
    weights, outputs = rest[: ctx.weights], rest[ctx.weights :]
    d_states = [
        torch.zeros_like(t) if d is None else d for t, d in zip(outputs[:2], grads[:2], strict=True)
    ]
    d_x, d_s, d_c, *d_weights = _hyper_lstm_backward(
        *d_states, x, mask, weights, outputs, ctx.needs_x
    )
    return d_x if ctx.needs_x else None, d_s, d_c, None, d_weights, None


hyper_lstm.register_autograd(_backward, setup_context=_setup_context)
