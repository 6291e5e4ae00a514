"""Dynamic hypernetworks: recurrent layers whose weights change with the time step and the input.

`HyperLSTM` and `HyperRNN` have the call contract of `nn.LSTM` and `nn.RNN`. They follow
"HyperNetworks" (Ha, Dai, Le, arXiv 1609.09106, sec. 3.2 and app. A.2): in each step a small
recurrent cell looks at the input and the main cell's state, and its output scales the rows of the
main cell's weights. This form ADDS parameters, and its weights depend on the input, so it has no
dense equivalent.

In one point the author's code differs from the paper's text, and this module follows the code: the
scales of step t come from the small cell's output of step t, where eq. 6 and 11 print t - 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from hyperize.config import ConfigError
from hyperize.products import is_transformed
from hyperize.recurrence import (
    FORGET,
    WEIGHTS,
    autocasts,
    hyper_lstm,
    hyper_rnn,
    plain,
    plain_rnn,
    takes_triton,
)

__all__ = ["HyperLSTM", "HyperLSTMCell", "HyperRNN", "HyperRNNCell"]

INITIAL_SCALE = 0.1
"""The scales of the main cell's weights at the start (app. A.2.2, after arXiv 1603.09025)."""
BIAS_STD = 0.01
"""The deviation with which the weights that make the bias's embeddings are drawn."""

# ------------------------------------------------------------------------------------------- cells


class _Cell(nn.Module):
    """What both cells share: parameters, their initialisation and the checks of one step."""

    gates: int
    weight_ih: nn.Parameter
    weight_hh: nn.Parameter
    bias: nn.Parameter | None
    hyper_weight_ih: nn.Parameter
    hyper_weight_hh: nn.Parameter
    hyper_bias: nn.Parameter | None
    hyper_ln_weight: nn.Parameter | None
    hyper_ln_bias: nn.Parameter | None
    embedding_weight: nn.Parameter
    embedding_bias: nn.Parameter
    scale_weight: nn.Parameter
    ln_weight: nn.Parameter | None
    ln_bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        hyper_size: int,
        embedding_dim: int,
        layer_norm: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.input_size = _positive("input_size", input_size)
        self.hidden_size = _positive("hidden_size", hidden_size)
        self.hyper_size = _positive("hyper_size", hyper_size)
        self.embedding_dim = _positive("embedding_dim", embedding_dim)
        gates, h, k, e = self.gates, hidden_size, hyper_size, embedding_dim
        parts = 3 if bias else 2  # scales of h and of x, and the bias
        norms = gates + 1 if gates > 1 else 1  # of each gate, and of the memory
        small_norms = norms if gates > 1 else 0
        shapes: dict[str, tuple[int, ...] | None] = {
            "weight_ih": (gates * h, input_size),
            "weight_hh": (gates * h, h),
            "bias": (gates * h,) if bias else None,
            "hyper_weight_ih": (gates * k, h + input_size),
            "hyper_weight_hh": (gates * k, k),
            "hyper_bias": (gates * k,) if bias else None,
            "hyper_ln_weight": (small_norms, k) if small_norms else None,
            "hyper_ln_bias": (small_norms, k) if small_norms else None,
            "embedding_weight": (parts * gates * e, k),
            "embedding_bias": (2 * gates * e,),
            "scale_weight": (parts, gates, h, e),
            "ln_weight": (norms, h) if layer_norm else None,
            "ln_bias": (norms, h) if layer_norm else None,
        }
        for name in WEIGHTS:
            shape = shapes[name]
            made = None if shape is None else torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, None if made is None else nn.Parameter(made))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the parameters anew, as HyperLSTMCell describes."""
        for recurrent in (self.weight_hh, self.hyper_weight_hh):
            for gate in recurrent.chunk(self.gates):
                # torch has no QR decomposition in half precision
                single = torch.empty_like(gate, dtype=torch.float32)
                gate.copy_(nn.init.orthogonal_(single))
        for weight in (self.weight_ih, self.hyper_weight_ih):
            for gate in weight.chunk(self.gates):
                nn.init.xavier_uniform_(gate)
        # The first rows make the scales of h and x, the others the bias
        scaled = 2 * self.gates * self.embedding_dim
        self.embedding_weight[:scaled].zero_()
        self.embedding_weight[scaled:].normal_(std=BIAS_STD)
        self.embedding_bias.fill_(1.0)
        self.scale_weight[:2].fill_(INITIAL_SCALE / self.embedding_dim)
        self.scale_weight[2:].zero_()
        for gain in (self.hyper_ln_weight, self.ln_weight):
            if gain is not None:
                gain.fill_(1.0)
        for shift in (self.bias, self.hyper_bias, self.hyper_ln_bias, self.ln_bias):
            if shift is not None:
                shift.zero_()

    def _in_order(self) -> list[Tensor | None]:
        """The parameters as `WEIGHTS` has them, contiguous also after a move to channels_last."""
        found = (getattr(self, name) for name in WEIGHTS)
        return [None if weight is None else weight.contiguous() for weight in found]

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Features of each state."""
        raise NotImplementedError

    def sequence(
        self, x: Tensor, state: tuple[Tensor, ...], lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs a sequence from its first step to its last.

        Args:
            x: (T, N, input_size).
            state: The states before it, each (N, features) as in `state_sizes`.
            lengths: Steps of each example, (N,) on x's device; T for all if None.

        Returns:
            h of each step, (T, N, H), and the states after each example's last step.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, hyper_size={self.hyper_size}"
        text += f", embedding_dim={self.embedding_dim}"
        text += "" if self.bias is not None else ", bias=False"
        return text + ("" if self.ln_weight is None else ", layer_norm=True")

    def _step(self, input: Tensor, hx: Any) -> tuple[Tensor, ...]:
        """The states after one step, with the checks of torch's cells."""
        if input.dim() not in (1, 2):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead"
            )
        batched = input.dim() == 2
        x = input if batched else input[None]  # (input,) -> (1, input)
        if x.shape[1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {x.shape[1]} expected {self.input_size}"
            )
        states = self.states(hx, (len(x),) if batched else (), x)
        _, after = self.sequence(x[None], states if batched else tuple(t[None] for t in states))
        return after if batched else tuple(t[0] for t in after)

    def states(self, hx: Any, batch: tuple[int, ...], like: Tensor) -> tuple[Tensor, ...]:
        """The initial states, each (*batch, features), of what the user gave for them.

        Raises:
            RuntimeError: They do not fit, as from nn.LSTM.
        """
        sizes = self.state_sizes
        if hx is None:
            return tuple(like.new_zeros(*batch, size) for size in sizes)
        given = (hx,) if len(sizes) == 1 else hx
        if not isinstance(given, (tuple, list)) or len(given) != len(sizes):
            raise RuntimeError(f"expected hx to be a pair (h, c), got {type(hx).__name__}")
        states = []
        for name, state, size in zip(("h", "c")[: len(sizes)], given, sizes, strict=True):
            # Some states carry the small cell's at their end; the caller may leave it out
            allowed = sorted({self.hidden_size, size}, reverse=True)
            if state.shape[:-1] != batch or state.shape[-1] not in allowed:
                expected = " or ".join(str((*batch, features)) for features in allowed)
                raise RuntimeError(
                    f"Expected hidden {name} size {expected}, got {tuple(state.shape)}"
                )
            states.append(F.pad(state.to(like.dtype), (0, size - state.shape[-1])))
        return tuple(states)


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
    return value


def _probability(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"{name} must be a probability, at least 0 and below 1, got {value!r}.")
    return float(value)


def _last(sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """Of a sequence (T, N, ...), what each example has at its last step, (N, ...)."""
    if lengths is None:
        return sequence[-1]
    return sequence[lengths - 1, torch.arange(len(lengths), device=sequence.device)]


class HyperLSTMCell(_Cell):
    """An LSTM cell whose weights a smaller LSTM scales anew in each step.

    HyperLSTM of arXiv 1609.09106, app. A.2.2. With H = `hidden_size`, K = `hyper_size`,
    E = `embedding_dim`, gates in the order i, f, g, o (nn.LSTM's), LN a layer norm with eps 1e-3,
    * a product element by element, and the small cell's symbols with a hat:

        a^     = hyper_weight_ih (h; x) + hyper_weight_hh h^ + hyper_bias            eq. 10
        a^     = LN(a^_y), gain and shift hyper_ln_weight[y], hyper_ln_bias[y], y = i, f, g, o
        c^'    = sigmoid(f^) * c^ + sigmoid(i^) * tanh(g^)
        h^'    = sigmoid(o^) * tanh(LN(c^'))                       gain and shift: row 4
        z_p^y  = embedding_weight[p, y] h^' + embedding_bias[p, y]     p = h, x, b   eq. 11
        d_p^y  = scale_weight[p, y] z_p^y                                            eq. 12
        y      = LN(d_h^y * (weight_hh h)_y + d_x^y * (weight_ih x)_y + d_b^y + bias_y)
        c'     = sigmoid(f) * c + sigmoid(i) * dropout(tanh(g))                      eq. 13
        h'     = sigmoid(o) * tanh(LN(c'))

    where the main cell's LN are left out unless `layer_norm`, and z_b has no bias. The paper prints
    the old h^ in eq. 11; here it is the new one, as in the author's code. Parameters:

    - `weight_ih` (4 H, input), `weight_hh` (4 H, H), `bias` (4 H)
    - `hyper_weight_ih` (4 K, H + input), `hyper_weight_hh` (4 K, K), `hyper_bias` (4 K)
    - `hyper_ln_weight`, `hyper_ln_bias` (5, K): rows i, f, g, o, memory
    - `embedding_weight` (3 * 4 * E, K), `embedding_bias` (2 * 4 * E): rows by p, then gate, then E
    - `scale_weight` (3, 4, H, E)
    - `ln_weight`, `ln_bias` (5, H), with `layer_norm`: rows i, f, g, o, memory

    Initialisation (app. A.2.2 and the author's code): each gate's recurrent matrix orthogonal, its
    input matrix Glorot-uniform; embeddings of h and x constant 1 and their scales 0.1; those of the
    bias drawn with deviation 0.01 and their scales 0; a forget bias of 1 in both cells, which sits
    in the layer norm's shift where there is one; all other biases 0.

    Args:
        input_size: Features of the input.
        hidden_size: Units H of the main cell.
        bias: Without, the main cell has neither `bias` nor d_b (the sizes 3 above become 2), and
            the small cell no `hyper_bias`.
        hyper_size: Units K of the small cell.
        embedding_dim: Length E of each embedding z.
        layer_norm: Layer norms in the main cell (the paper's Layer Norm HyperLSTM).
        recurrent_dropout: Of the candidate tanh(g), in training mode (arXiv 1603.05118).
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ConfigError: A size is not a positive integer, or the dropout not a probability.
    """

    gates = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        hyper_size: int = 128,
        embedding_dim: int = 4,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, bias, hyper_size, embedding_dim, layer_norm, device, dtype
        )
        self.recurrent_dropout = _probability("recurrent_dropout", recurrent_dropout)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the parameters anew, as the class describes."""
        super().reset_parameters()
        assert self.hyper_ln_bias is not None
        self.hyper_ln_bias[FORGET].fill_(1.0)
        if self.ln_bias is not None:
            self.ln_bias[FORGET].fill_(1.0)
        elif self.bias is not None:
            self.bias.view(4, -1)[FORGET].fill_(1.0)

    @property
    def state_sizes(self) -> tuple[int, int]:
        """Features of h and of c; c carries the small cell's h^ and c^ behind its first H."""
        return self.hidden_size, self.hidden_size + 2 * self.hyper_size

    def extra_repr(self) -> str:  # noqa: D102
        dropout = f", recurrent_dropout={self.recurrent_dropout}" if self.recurrent_dropout else ""
        return super().extra_repr() + dropout

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: (N, input_size), or (input_size,) for a single example.
            hx: h (N, H) and c (N, H + 2 K): the memory, then the small cell's output and memory.
                A c of H features, as nn.LSTMCell's, starts the small cell at zero. None is zeros.

        Returns:
            The new h and c, in these shapes.

        Raises:
            RuntimeError: Sizes do not fit, as from nn.LSTMCell.
            ValueError: The input is not 1-D or 2-D.
        """
        h, c = self._step(input, hx)
        return h, c

    def sequence(
        self, x: Tensor, state: tuple[Tensor, ...], lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs a sequence from its first step to its last.

        Args:
            x: (T, N, input_size).
            state: h (N, H) and c (N, H + 2 K) before it.
            lengths: Steps of each example, (N,) on x's device; T for all if None.

        Returns:
            h of each step, (T, N, H), and h and c after each example's last step.
        """
        (h, c), (size, small) = state, (self.hidden_size, self.hyper_size)
        s0 = torch.cat((h, c[:, size : size + small]), 1)
        c0 = torch.cat((c[:, :size], c[:, size + small :]), 1)
        weights = [x.new_empty(0) if w is None else w for w in self._in_order()]
        mask = x.new_empty(0)
        if self.training and self.recurrent_dropout:
            ones = x.new_ones(*x.shape[:2], size)
            mask = F.dropout(ones, self.recurrent_dropout)
        tensors = [x, s0, c0, mask, *weights]
        kind = x.device.type
        if autocasts(kind):  # everything is in the lower precision, as in nn.LSTM
            tensors = [t.to(torch.get_autocast_dtype(kind)) for t in tensors]
        x, s0, c0, mask, *weights = tensors
        if is_transformed(*tensors):  # then torch has to see every operation
            s, c = plain(x, s0, c0, mask, weights)
        else:
            save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
            s, c, *_ = hyper_lstm(x, s0, c0, mask, weights, save)
        last_s, last_c = _last(s[1:], lengths), _last(c[1:], lengths)
        after = torch.cat((last_c[:, :size], last_s[:, size:], last_c[:, size:]), 1)
        # Copies, because nn.LSTM's outputs are no views either and callers may view them anew
        return s[1:, :, :size].contiguous(), (last_s[:, :size].contiguous(), after)


class HyperRNNCell(_Cell):
    """An RNN cell whose weights a smaller RNN scales anew in each step.

    HyperRNN of arXiv 1609.09106, sec. 3.2 and app. A.2.1; symbols as at `HyperLSTMCell`, with phi
    the nonlinearity:

        h^'  = phi(hyper_weight_ih (h; x) + hyper_weight_hh h^ + hyper_bias)             eq. 4
        z_p  = embedding_weight[p] h^' + embedding_bias[p]        p = h, x, b            eq. 5
        d_p  = scale_weight[p] z_p
        h'   = phi(LN(d_h * (weight_hh h) + d_x * (weight_ih x) + d_b + bias))           eq. 6

    Parameters are as the HyperLSTMCell's, with one gate instead of four and without the small
    cell's layer norms: `weight_ih` (H, input), `weight_hh` (H, H), `bias` (H), `hyper_weight_ih`
    (K, H + input), `hyper_weight_hh` (K, K), `hyper_bias` (K), `embedding_weight` (3 * E, K),
    `embedding_bias` (2 * E), `scale_weight` (3, 1, H, E), and with `layer_norm` `ln_weight`,
    `ln_bias` (1, H).

    Args:
        input_size: Features of the input.
        hidden_size: Units H of the main cell.
        bias: Without, neither `bias` nor d_b nor `hyper_bias`.
        nonlinearity: "tanh" or "relu", of both cells.
        hyper_size: Units K of the small cell.
        embedding_dim: Length E of each embedding z.
        layer_norm: A layer norm before the main cell's nonlinearity.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ConfigError: A size is not a positive integer, or the nonlinearity is another one.
    """

    gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        *,
        hyper_size: int = 128,
        embedding_dim: int = 4,
        layer_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ConfigError(f'nonlinearity must be "tanh" or "relu", got {nonlinearity!r}.')
        super().__init__(
            input_size, hidden_size, bias, hyper_size, embedding_dim, layer_norm, device, dtype
        )
        self.nonlinearity = nonlinearity

    @property
    def state_sizes(self) -> tuple[int]:
        """Features of the state: h, then the small cell's h^."""
        return (self.hidden_size + self.hyper_size,)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, nonlinearity={self.nonlinearity}"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: (N, input_size), or (input_size,) for a single example.
            hx: (N, H + K): h, then the small cell's output. One of H features, as nn.RNNCell's,
                starts the small cell at zero. None is zeros.

        Returns:
            The new state, (N, H + K); its first H features are h.

        Raises:
            RuntimeError: Sizes do not fit, as from nn.RNNCell.
            ValueError: The input is not 1-D or 2-D.
        """
        return self._step(input, hx)[0]

    def sequence(
        self, x: Tensor, state: tuple[Tensor, ...], lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs a sequence from its first step to its last; as HyperLSTMCell's, with one state."""
        weights = self._in_order()
        relu = self.nonlinearity == "relu"
        sequence = None
        if takes_triton(x, self.hidden_size, self.hyper_size):
            sequence = _by_operator(x, state[0], weights, relu)
        if sequence is None:
            sequence = plain_rnn(x, state[0], weights, relu)
        return sequence[..., : self.hidden_size].contiguous(), (_last(sequence, lengths),)


def _by_operator(x: Tensor, s0: Tensor, weights: list[Tensor | None], relu: bool) -> Tensor | None:
    """Computes `plain_rnn` by the operator; None if torch has to see every operation."""
    tensors = [x, s0, *(x.new_empty(0) if w is None else w for w in weights)]
    kind = x.device.type
    if autocasts(kind):  # everything is in the lower precision, as in nn.RNN
        tensors = [t.to(torch.get_autocast_dtype(kind)) for t in tensors]
    x, s0, *given = tensors
    # The lower precision may be one that this GPU lacks
    if is_transformed(*tensors) or not takes_triton(x):
        return None
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    s: Tensor = hyper_rnn(x, s0, given, relu, save)[0]
    return s[1:]


# --------------------------------------------------------------------------------- layers of cells


class _Recurrent(nn.Module):
    """What HyperLSTM and HyperRNN share: layers, directions, dropout between layers, packing."""

    cell: type[Any]
    """Of which class the cells are."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(num_layers, int) or isinstance(num_layers, bool) or num_layers < 1:
            raise ConfigError(f"num_layers must be a positive integer, got {num_layers!r}.")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.num_layers, self.bias = num_layers, bias
        self.batch_first, self.bidirectional = batch_first, bidirectional
        self.dropout = _probability("dropout", dropout)
        directions = 2 if bidirectional else 1
        widths = [input_size] + [directions * hidden_size] * (num_layers - 1)
        self.cells = nn.ModuleList(
            self.cell(width, hidden_size, bias, **options)
            for width in widths
            for _ in range(directions)
        )
        first = self._cell(0)
        self.hyper_size, self.embedding_dim = first.hyper_size, first.embedding_dim

    def _cell(self, at: int) -> _Cell:
        return cast(_Cell, self.cells[at])

    def reset_parameters(self) -> None:
        """Draws the parameters of all cells anew."""
        for at in range(len(self.cells)):
            self._cell(at).reset_parameters()

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0}
        for name, default in (defaults | {"bidirectional": False}).items():
            if (value := getattr(self, name)) != default:
                text += f", {name}={value}"
        return text

    def _run(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, tuple[Tensor, ...]]:
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead"
            )
        batched = input.dim() == 3
        x = input if batched else input[:, None]  # (T, input) -> (T, 1, input)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        if len(x) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        output, states = self._layers(x, self._initial(hx, x, batched), None)
        if not batched:
            return output[:, 0], tuple(t[:, 0] for t in states)
        return output.transpose(0, 1) if self.batch_first else output, states

    def _run_packed(self, packed: PackedSequence, hx: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """Runs the padded batch; each example's state is the one after its own last step."""
        x, lengths = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes))
        states = self._initial(hx, x, True)
        lengths = lengths.to(x.device)
        if packed.sorted_indices is not None:  # the states come, and go, in the user's order
            states = tuple(t.index_select(1, packed.sorted_indices) for t in states)
        output, states = self._layers(x, states, lengths)
        steps = torch.arange(len(x), device=x.device)
        data = output[steps[:, None] < lengths]  # (sum of lengths, features), as packed
        if packed.unsorted_indices is not None:
            states = tuple(t.index_select(1, packed.unsorted_indices) for t in states)
        return packed._replace(data=data), states

    def _initial(self, hx: Any, x: Tensor, batched: bool) -> tuple[Tensor, ...]:
        """The initial states of all cells, each (layers * directions, N, features)."""
        if x.shape[2] != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {x.shape[2]}"
            )
        weight = self._cell(0).weight_ih
        if x.dtype != weight.dtype and not autocasts(x.device.type):
            raise ValueError(f"input must have the type {weight.dtype}, got type {x.dtype}")
        # A single sequence has states without the batch axis
        cells = len(self.cells)
        stacked = (cells, x.shape[1]) if batched else (cells,)
        states = self._cell(0).states(hx, stacked, x)
        return states if batched else tuple(t.unsqueeze(1) for t in states)

    def _layers(
        self, x: Tensor, states: tuple[Tensor, ...], lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        directions = 2 if self.bidirectional else 1
        finals = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                at = layer * directions + direction
                turn = direction == 1
                sequence = _reversed(x, lengths) if turn else x
                state = tuple(t[at] for t in states)
                output, final = self._cell(at).sequence(sequence, state, lengths)
                outputs.append(_reversed(output, lengths) if turn else output)
                finals.append(final)
            x = torch.cat(outputs, 2) if self.bidirectional else outputs[0]
            if self.dropout and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(t) for t in zip(*finals, strict=True))


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """A sequence (T, N, ...) from each example's last step to its first; padding stays behind."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(len(x), device=x.device)[:, None]
    source = torch.where(steps < lengths, lengths - 1 - steps, steps)  # (T, N)
    return x[source, torch.arange(x.shape[1], device=x.device)]


class HyperLSTM(_Recurrent):
    """Layers of `HyperLSTMCell`, with the call contract of nn.LSTM.

    HyperLSTM of arXiv 1609.09106, app. A.2.2; the equations and parameters are documented at
    `HyperLSTMCell`. The cell of layer l and direction d is `cells[l * directions + d]`.

    Training keeps 15 H + 12 K + 12 E + 5 numbers per step, example and cell, and 5 H + 5 more with
    `layer_norm`, so the memory is linear in the length.

    Args:
        input_size: Features of the input.
        hidden_size: Units H of each main cell.
        num_layers: Layers; each sees the outputs of the one below.
        bias: As in `HyperLSTMCell`.
        batch_first: Input and output are (N, T, features) instead of (T, N, features).
        dropout: Of each layer's output but the last's, in training mode.
        bidirectional: A second cell per layer reads the sequence from its end.
        hyper_size: Units K of each small cell.
        embedding_dim: Length E of each embedding.
        layer_norm: Layer norms in the main cells.
        recurrent_dropout: Of the candidates, in training mode.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ConfigError: A size is not a positive integer, or a dropout not a probability.
    """

    cell = HyperLSTMCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        hyper_size: int = 128,
        embedding_dim: int = 4,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            hyper_size=hyper_size, embedding_dim=embedding_dim, layer_norm=layer_norm,
            recurrent_dropout=recurrent_dropout, device=device, dtype=dtype,
        )  # fmt: skip

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Runs a batch of sequences.

        Args:
            input: (T, N, input_size), (N, T, input_size) with `batch_first`, (T, input_size) for a
                single sequence, or a PackedSequence.
            hx: h (cells, N, H) and c (cells, N, H + 2 K): the memory, then the small cell's output
                and memory. A c of H features, as nn.LSTM's, starts the small cell at zero. None is
                zeros.

        Returns:
            The outputs, as from nn.LSTM, and (h, c) after the last step. Passed back as they are,
            they go on as one long call would.

        Raises:
            RuntimeError: Sizes do not fit, as from nn.LSTM.
            ValueError: The input has another number of dimensions or another dtype.
        """
        output, (h, c) = self._run(input, hx)
        return output, (h, c)


class HyperRNN(_Recurrent):
    """Layers of `HyperRNNCell`, with the call contract of nn.RNN.

    HyperRNN of arXiv 1609.09106, sec. 3.2 and app. A.2.1; the equations and parameters are
    documented at `HyperRNNCell`. The cell of layer l and direction d is
    `cells[l * directions + d]`.

    Args:
        input_size: Features of the input.
        hidden_size: Units H of each main cell.
        num_layers: Layers; each sees the outputs of the one below.
        nonlinearity: "tanh" or "relu".
        bias: As in `HyperRNNCell`.
        batch_first: Input and output are (N, T, features) instead of (T, N, features).
        dropout: Of each layer's output but the last's, in training mode.
        bidirectional: A second cell per layer reads the sequence from its end.
        hyper_size: Units K of each small cell.
        embedding_dim: Length E of each embedding.
        layer_norm: A layer norm in each main cell.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ConfigError: A size is not a positive integer, the dropout not a probability, or the
            nonlinearity another one.
    """

    cell = HyperRNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        hyper_size: int = 128,
        embedding_dim: int = 4,
        layer_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            nonlinearity=nonlinearity, hyper_size=hyper_size, embedding_dim=embedding_dim,
            layer_norm=layer_norm, device=device, dtype=dtype,
        )  # fmt: skip
        self.nonlinearity = nonlinearity

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        """Runs a batch of sequences.

        Args:
            input: As in `HyperLSTM`.
            hx: (cells, N, H + K): h, then the small cell's output. One of H features, as nn.RNN's,
                starts the small cell at zero. None is zeros.

        Returns:
            The outputs, as from nn.RNN, and the state after the last step, (cells, N, H + K), whose
            first H features are h. Passed back as it is, it goes on as one long call would.

        Raises:
            RuntimeError: Sizes do not fit, as from nn.RNN.
            ValueError: The input has another number of dimensions or another dtype.
        """
        output, (h,) = self._run(input, hx)
        return output, h


def dynamic_twin(
    layer: nn.RNNBase, options: Mapping[str, Any], device: torch.device | str
) -> HyperLSTM | HyperRNN:
    """A freshly drawn HyperLSTM for an nn.LSTM, or HyperRNN for an nn.RNN.

    Args:
        layer: The dense layer, without a projection; only its sizes, dtype and flags are read.
        options: `HyperConfig.lstm_options`; an RNN has no recurrent dropout, so it is left out.
        device: Of the parameters.
    """
    flags = {
        name: getattr(layer, name)
        for name in ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
    }
    flags |= {"device": device, "dtype": layer.get_parameter("weight_ih_l0").dtype}
    if isinstance(layer, nn.LSTM):
        return HyperLSTM(layer.input_size, layer.hidden_size, **flags, **options)
    rest = {name: value for name, value in options.items() if name != "recurrent_dropout"}
    flags["nonlinearity"] = layer.nonlinearity
    return HyperRNN(layer.input_size, layer.hidden_size, **flags, **rest)
