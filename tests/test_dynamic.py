"""HyperLSTM and HyperRNN: against a literal transcription of the paper's equations, and nn.LSTM."""

import copy
import functools
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import CRNN, count, over, same
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, stack_module_state
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)
from torch.utils._python_dispatch import TorchDispatchMode

from hyperize import (
    BudgetError,
    ConfigError,
    HyperConfig,
    HyperLSTM,
    HyperLSTMCell,
    HyperRNN,
    HyperRNNCell,
    ModelError,
    dense_state_dict,
    dynamic,
    hyperize,
    load,
    make_plan,
    products,
    recurrence,
    report,
    save,
    to_dense,
)
from hyperize.recurrence import WEIGHTS, hyper_lstm, plain

TOLERANCE = 1e-6
"""Of the transcription, in float64: the issue's figure; the sums come in another order."""
HALF_TOLERANCE = 0.05
"""Of bfloat16, which has 8 bits: its error of 0.4 % in each operation, over a few steps."""
SINGLE_TOLERANCE = 1e-5
"""Between two ways through one sequence in float32: matrix products of other sizes round apart."""

SIZE, HIDDEN, TIME, BATCH = 6, 5, 20, 3  # more steps than a chunk of the backward pass
SMALL = {"hyper_size": 4, "embedding_dim": 3}
LSTM_FLAGS = [
    {"bias": bias, "layer_norm": norm, "recurrent_dropout": dropout}
    for bias, norm, dropout in itertools.product((True, False), (False, True), (0.0, 0.4))
]
RNN_FLAGS = [
    {"bias": bias, "layer_norm": norm, "nonlinearity": phi}
    for bias, norm, phi in itertools.product((True, False), (False, True), ("tanh", "relu"))
]
CASES = [(HyperLSTM, flags) for flags in LSTM_FLAGS] + [(HyperRNN, flags) for flags in RNN_FLAGS]
ONE_OF_EACH = [
    (HyperLSTM, {"num_layers": 2, "bidirectional": True}),
    (HyperLSTM, {"layer_norm": True, "batch_first": True, "bias": False}),
    (HyperRNN, {"num_layers": 2, "bidirectional": True, "layer_norm": True}),
    (HyperRNN, {"batch_first": True}),
]


@torch.no_grad()
def make(cls, flags, dtype=torch.float64, **options):
    """A module none of whose parameters is at a constant or zero."""
    module = cls(SIZE, HIDDEN, dtype=dtype, **(SMALL | flags | options))
    noise = 0.1 if flags.get("nonlinearity") == "relu" else 0.3  # which has no bound
    for param in module.parameters():
        param.add_(noise * torch.randn_like(param))
    return module


def close(a, b):
    assert b.any()
    assert (a - b).abs().max() < TOLERANCE * max(1, b.abs().max())


# ------------------------------------------------------------------- the equations, word for word


def norm(x, gain, shift):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return gain * (x - mean) / (variance + 1e-3).sqrt() + shift


def lstm_step(p, x, h, c, u, m, mask=1.0):
    """Eq. 10 to 13 of arXiv 1609.09106 for one step; u and m are the small cell's h^ and c^."""
    gates = range(4)
    size, small, e = p.weight_hh.shape[1], p.hyper_weight_hh.shape[1], p.embedding_dim
    xhat = torch.cat((h, x), -1)
    small_gates = []
    for y in gates:
        row = slice(y * small, (y + 1) * small)
        a = xhat @ p.hyper_weight_ih[row].T + u @ p.hyper_weight_hh[row].T
        if p.hyper_bias is not None:
            a = a + p.hyper_bias[row]
        small_gates.append(norm(a, p.hyper_ln_weight[y], p.hyper_ln_bias[y]))
    i, f, g, o = small_gates
    m = f.sigmoid() * m + i.sigmoid() * g.tanh()
    u = o.sigmoid() * norm(m, p.hyper_ln_weight[4], p.hyper_ln_bias[4]).tanh()

    def embedding(part, y):
        block = part * 4 + y
        z = u @ p.embedding_weight[block * e : (block + 1) * e].T
        return z if part == 2 else z + p.embedding_bias[block * e : (block + 1) * e]

    main_gates = []
    for y in gates:
        row = slice(y * size, (y + 1) * size)
        d_h = embedding(0, y) @ p.scale_weight[0, y].T
        d_x = embedding(1, y) @ p.scale_weight[1, y].T
        a = d_h * (h @ p.weight_hh[row].T) + d_x * (x @ p.weight_ih[row].T)
        if p.bias is not None:
            a = a + embedding(2, y) @ p.scale_weight[2, y].T + p.bias[row]
        if p.ln_weight is not None:
            a = norm(a, p.ln_weight[y], p.ln_bias[y])
        main_gates.append(a)
    i, f, g, o = main_gates
    c = f.sigmoid() * c + i.sigmoid() * (mask * g.tanh())
    memory = c if p.ln_weight is None else norm(c, p.ln_weight[4], p.ln_bias[4])
    return o.sigmoid() * memory.tanh(), c, u, m


def rnn_step(p, x, h, u):
    """Eq. 4 to 6 for one step."""
    e, phi = p.embedding_dim, torch.tanh if p.nonlinearity == "tanh" else torch.relu
    a = torch.cat((h, x), -1) @ p.hyper_weight_ih.T + u @ p.hyper_weight_hh.T
    u = phi(a if p.hyper_bias is None else a + p.hyper_bias)

    def scale(part):
        z = u @ p.embedding_weight[part * e : (part + 1) * e].T
        z = z if part == 2 else z + p.embedding_bias[part * e : (part + 1) * e]
        return z @ p.scale_weight[part, 0].T

    a = scale(0) * (h @ p.weight_hh.T) + scale(1) * (x @ p.weight_ih.T)
    if p.bias is not None:
        a = a + scale(2) + p.bias
    if p.ln_weight is not None:
        a = norm(a, p.ln_weight[0], p.ln_bias[0])
    return phi(a), u


def transcribed(cell, x, state, mask=None):
    """A sequence through one cell by the equations; state and results in the library's layout."""
    size, outputs = cell.hidden_size, []
    if isinstance(cell, HyperRNNCell):
        h, u = state[0].split((size, cell.hyper_size), 1)
        for step in x:
            h, u = rnn_step(cell, step, h, u)
            outputs.append(h)
        return torch.stack(outputs), (torch.cat((h, u), 1),)
    h, (c, u, m) = state[0], state[1].split((size, cell.hyper_size, cell.hyper_size), 1)
    for t, step in enumerate(x):
        h, c, u, m = lstm_step(cell, step, h, c, u, m, 1.0 if mask is None else mask[t])
        outputs.append(h)
    return torch.stack(outputs), (h, torch.cat((c, u, m), 1))


def states_of(module, batch=(BATCH,), dtype=torch.float64):
    cell = module.cells[0]
    states = [torch.randn(len(module.cells), *batch, n, dtype=dtype) for n in cell.state_sizes]
    return [s.requires_grad_() for s in states]


@over(CASES)
def test_outputs_and_gradients_are_those_of_the_equations(cls, flags):
    module = make(cls, flags)
    cell = module.cells[0]
    x = torch.randn(TIME, BATCH, SIZE, dtype=torch.float64, requires_grad=True)
    states = states_of(module)
    torch.manual_seed(1)
    dropout = flags.get("recurrent_dropout", 0.0)
    mask = F.dropout(torch.ones(TIME, BATCH, HIDDEN, dtype=torch.float64), dropout)
    torch.manual_seed(1)  # the same draw again
    output, after = module(x, tuple(states) if cls is HyperLSTM else states[0])
    after = after if isinstance(after, tuple) else (after,)
    expected, final = transcribed(cell, x, [s[0] for s in states], mask)
    assert (output - expected).abs().max() < TOLERANCE
    for a, b in zip(after, final, strict=True):
        assert (a[0] - b).abs().max() < TOLERANCE

    inputs = {"x": x, **{f"state{i}": s for i, s in enumerate(states)}}
    inputs |= dict(cell.named_parameters())
    directions = [torch.randn_like(t) for t in (expected, *final)]
    ours = sum(
        (t * d).sum() for t, d in zip((output, *(a[0] for a in after)), directions, strict=True)
    )
    theirs = sum((t * d).sum() for t, d in zip((expected, *final), directions, strict=True))
    grads = torch.autograd.grad(ours, list(inputs.values()))
    for name, a, b in zip(
        inputs, grads, torch.autograd.grad(theirs, list(inputs.values())), strict=True
    ):
        assert b.any(), name
        assert (a - b).abs().max() < TOLERANCE * max(1, b.abs().max()), name


@over([case for case in CASES if not case[1].get("recurrent_dropout")])
def test_gradcheck(cls, flags):
    module = make(cls, flags)
    x = torch.randn(4, 2, SIZE, dtype=torch.float64, requires_grad=True)
    states = states_of(module, (2,))
    params = dict(module.named_parameters())

    def run(x, *tensors):
        values = dict(zip(params, tensors[len(states) :], strict=True))
        hx = tensors[: len(states)]
        args = (x, hx if len(hx) == 2 else hx[0])
        output, after = torch.func.functional_call(module, values, args)
        return output, *(after if isinstance(after, tuple) else (after,))

    inputs = (x, *states, *params.values())
    assert torch.autograd.gradcheck(
        run, inputs, fast_mode=True, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True, check_fwd_over_rev=True)


@over(CASES)
def test_gradient_penalties_are_those_of_the_equations(cls, flags):
    module = make(cls, flags)
    cell = module.cells[0]
    x = torch.randn(4, BATCH, SIZE, dtype=torch.float64, requires_grad=True)
    states = [s[0] for s in states_of(module)]
    torch.manual_seed(1)
    ones = torch.ones(4, BATCH, HIDDEN, dtype=torch.float64)
    mask = F.dropout(ones, flags.get("recurrent_dropout", 0.0))
    torch.manual_seed(1)  # the same draw again
    results = []
    for output, after in (cell.sequence(x, states), transcribed(cell, x, states, mask)):
        loss = sum(t.square().sum() for t in (output, *after))
        first = torch.autograd.grad(loss, (x, *states), create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        inputs = (x, *states, *cell.parameters())
        second = torch.autograd.grad(penalty, inputs, create_graph=True)
        third = ()
        if not (cls is HyperRNN and flags["layer_norm"]):  # torch's has a wrong third derivative
            third = torch.autograd.grad(sum(g.square().sum() for g in second), x)
        results.append([*first, *second, *third])
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.parametrize("steps", [TIME, 3])
@pytest.mark.parametrize("flags", LSTM_FLAGS, ids=str)
def test_products_of_onednn_are_those_of_torch(flags, steps, monkeypatch):
    """The other tests of the equations are in float64, of which oneDNN has no products."""
    module = make(HyperLSTM, flags, torch.float32)
    x = torch.randn(BATCH, steps, SIZE).transpose(0, 1).requires_grad_()
    states = states_of(module, dtype=torch.float32)
    inputs, runs = [x, *states, *module.parameters()], []
    for use in (products._ONEDNN, False):
        monkeypatch.setattr(products, "_ONEDNN", use)
        torch.manual_seed(1)  # of the dropout
        output, after = module(x, tuple(states))
        loss = sum((t * t.detach().cos()).sum() for t in (output, *after))
        runs.append([output, *after, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*runs, strict=True):
        assert b.any()
        assert (a - b).abs().max() < SINGLE_TOLERANCE * max(1, b.abs().max())


@pytest.mark.skipif(not products._ONEDNN, reason="a torch without oneDNN")
@pytest.mark.filterwarnings("ignore:TF32")  # from setting the flag
@pytest.mark.parametrize("enabled", [True, False])
def test_onednn_is_asked_unless_it_is_disabled(enabled):
    module = HyperLSTM(SIZE, HIDDEN, **SMALL)
    with torch.backends.mkldnn.flags(enabled=enabled), torch.profiler.profile() as profile:
        module(torch.randn(TIME, BATCH, SIZE))[0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert ("mkldnn::_linear_pointwise" in names) == enabled
    assert ("mkldnn::_reorder_linear_weight" in names) == enabled


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("cls", [HyperLSTM, HyperRNN])
def test_an_empty_batch_has_empty_outputs_and_gradients(cls, layer_norm):
    layer = cls(6, 8, hyper_size=4, embedding_dim=2, layer_norm=layer_norm)
    x = torch.randn(5, 0, 6, requires_grad=True)
    output = layer(x)[0]
    output.sum().backward()
    assert output.shape == (5, 0, 8)
    assert x.grad.shape == x.shape
    assert not any(parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("layer_norm", [False, True])
def test_layers_and_directions_are_cells_one_after_another(layer_norm):
    module = make(HyperLSTM, {"num_layers": 2, "bidirectional": True, "layer_norm": layer_norm})
    x = torch.randn(TIME, BATCH, SIZE, dtype=torch.float64)
    states = states_of(module)
    output, after = module(x, tuple(states))
    layer, finals = x, []
    for at in (0, 2):
        forward, one = transcribed(module.cells[at], layer, [s[at] for s in states])
        back, two = transcribed(module.cells[at + 1], layer.flip(0), [s[at + 1] for s in states])
        layer = torch.cat((forward, back.flip(0)), 2)
        finals += [one, two]
    assert (output - layer).abs().max() < TOLERANCE
    for which, state in enumerate(after):
        assert (state - torch.stack([f[which] for f in finals])).abs().max() < TOLERANCE


# ------------------------------------------------------------------------------ counts, first draw


@pytest.mark.parametrize(
    ("size", "hidden", "classes", "options", "expected"),
    [
        (50, 1000, 50, {}, 4_913_154),
        (50, 1000, 50, {"layer_norm": True}, 4_923_154),
        (50, 1000, 50, {"num_layers": 2, "layer_norm": True, "embedding_dim": 16}, 14_407_714),
        (205, 1800, 205, {"hyper_size": 256, "embedding_dim": 64}, 18_710_773),
        (205, 2048, 205, {"hyper_size": 512, "embedding_dim": 64, "layer_norm": True}, 26_541_773),
        (3, 900, 121, {}, 3_942_461),
    ],
)
def test_parameters_of_the_papers_models(size, hidden, classes, options, expected):
    with torch.device("meta"):
        model = nn.ModuleList([HyperLSTM(size, hidden, **options), nn.Linear(hidden, classes)])
    assert count(model) == expected


@pytest.mark.parametrize("cls", [HyperLSTM, HyperRNN])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_initialisation(cls, layer_norm):
    cell = cls(24, 32, hyper_size=16, embedding_dim=4, layer_norm=layer_norm).cells[0]
    for weight in (cell.weight_hh, cell.hyper_weight_hh):
        for gate in weight.chunk(cell.gates):
            assert torch.allclose(gate @ gate.T, torch.eye(len(gate)), atol=1e-5)  # float32 QR
    x = torch.randn(8, 24)
    u = torch.randn(8, 16)
    z = (u @ cell.embedding_weight.T)[:, : len(cell.embedding_bias)] + cell.embedding_bias
    scales = torch.einsum("npge,pghe->npgh", z.view(8, 2, cell.gates, 4), cell.scale_weight[:2])
    assert torch.allclose(scales, torch.tensor(0.1))  # whatever the small cell says
    assert not cell.scale_weight[2].any()
    of_bias = cell.embedding_weight[len(cell.embedding_bias) :]
    assert 0 < of_bias.std() < 0.02  # drawn with 0.01
    if cls is HyperLSTM:
        shift = cell.ln_bias if layer_norm else cell.bias.view(4, 32)
        assert shift[1].eq(1).all()  # of the forget gate
        assert not shift[0].any()
        assert cell.hyper_ln_bias[1].eq(1).all()
    assert torch.isfinite(cell.sequence(x[None], cell.states(None, (8,), x))[0]).all()


# ------------------------------------------------------------------------ the contract of nn.LSTM


def twin_of(cls):
    return nn.LSTM if cls is HyperLSTM else nn.RNN


@pytest.mark.parametrize("cls", [HyperLSTM, HyperRNN])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_shapes_are_those_of_the_dense_layer(cls, layers, both, first):
    flags = {"num_layers": layers, "bidirectional": both, "batch_first": first}
    hyper, dense = cls(SIZE, HIDDEN, **SMALL, **flags), twin_of(cls)(SIZE, HIDDEN, **flags)
    for x in (torch.randn(4, 4, SIZE), torch.randn(4, SIZE)):
        (a, states), (b, expected) = hyper(x), dense(x)
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        h = states[0] if cls is HyperLSTM else states
        wanted = expected[0] if cls is HyperLSTM else expected
        assert h[..., :HIDDEN].shape == wanted.shape
        # nn.LSTM's own states are taken too, and zeros are what is taken without any
        zeros = (torch.zeros_like(wanted),) * 2 if cls is HyperLSTM else torch.zeros_like(wanted)
        assert same(hyper(x, zeros), hyper(x))


@over(ONE_OF_EACH)
def test_a_sequence_in_parts_is_the_whole(cls, flags):
    flags = {k: v for k, v in flags.items() if k != "bidirectional"}
    module = cls(SIZE, HIDDEN, **(SMALL | flags))
    x = torch.randn(12, 12, SIZE)  # as long as wide, so that batch_first needs no other
    axis = 1 if flags.get("batch_first") else 0
    whole, final = module(x)
    for sizes in ([5, 7], [1] * 12):
        state, parts = None, []
        for part in x.split(sizes, axis):
            output, state = module(part, state)
            parts.append(output)
        assert (torch.cat(parts, axis) - whole).abs().max() < SINGLE_TOLERANCE
        for a, b in zip(state, final, strict=True):
            assert (a - b).abs().max() < SINGLE_TOLERANCE


@pytest.mark.parametrize("cls", [HyperLSTMCell, HyperRNNCell])
def test_cells_step_through_a_sequence(cls):
    cell = cls(SIZE, HIDDEN, **SMALL)
    x = torch.randn(5, BATCH, SIZE)
    expected, final = cell.sequence(x, cell.states(None, (BATCH,), x))
    state = None
    for step, wanted in zip(x, expected, strict=True):
        state = cell(step, state)
        h = state[0] if cls is HyperLSTMCell else state[:, :HIDDEN]
        assert (h - wanted).abs().max() < SINGLE_TOLERANCE
    state = state if cls is HyperLSTMCell else (state,)
    assert all((a - b).abs().max() < SINGLE_TOLERANCE for a, b in zip(state, final, strict=True))
    alone = cell(x[0, 0])
    batch = cell(x[0])
    for a, b in zip(*((s,) if cls is HyperRNNCell else s for s in (alone, batch)), strict=True):
        assert (a - b[0]).abs().max() < SINGLE_TOLERANCE


@pytest.mark.parametrize("enforce_sorted", [True, False])
@over([(cls, flags) for cls, flags in ONE_OF_EACH if "batch_first" not in flags])
def test_packed_sequences_are_run_to_their_ends(cls, flags, enforce_sorted):
    module = make(cls, flags)
    lengths = [6, 4, 1] if enforce_sorted else [1, 6, 4]
    parts = [torch.randn(n, SIZE, dtype=torch.float64) for n in lengths]
    states = states_of(module)
    hx = tuple(states) if cls is HyperLSTM else states[0]
    output, after = module(pack_sequence(parts, enforce_sorted=enforce_sorted), hx)
    padded, found = pad_packed_sequence(output)
    assert found.tolist() == lengths
    for at, part in enumerate(parts):
        own = [s[:, at] for s in states]
        alone, final = module(part, tuple(own) if cls is HyperLSTM else own[0])
        assert (padded[: len(part), at] - alone).abs().max() < TOLERANCE
        pairs = zip(after, final, strict=True) if cls is HyperLSTM else [(after, final)]
        for a, b in pairs:
            assert (a[:, at] - b).abs().max() < TOLERANCE
    output.data.square().sum().backward()
    assert all(p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("cls", [HyperLSTM, HyperRNN])
def test_wrong_inputs_are_refused_as_by_the_dense_layer(cls):
    hyper, dense = cls(SIZE, HIDDEN, **SMALL), twin_of(cls)(SIZE, HIDDEN)
    good = torch.randn(TIME, BATCH, SIZE)
    state = torch.zeros(1, BATCH + 1, HIDDEN)
    bad_state = (state, state) if cls is HyperLSTM else state
    for args in (
        (torch.randn(TIME, BATCH, SIZE + 1),),
        (torch.randn(2, 2, 2, 2),),
        (torch.randn(0, BATCH, SIZE),),
        (good.double(),),
        (good, bad_state),
    ):
        kinds = []
        for layer in (hyper, dense):
            with pytest.raises((RuntimeError, ValueError)) as refusal:
                layer(*args)
            kinds.append(refusal.type)
        assert kinds[0] == kinds[1]
    with pytest.raises(RuntimeError, match="greater than 0"):
        nn.utils.rnn.pack_padded_sequence(good, [3, 0, 1], enforce_sorted=False)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 0},
        {"input_size": -1},
        {"num_layers": 0},
        {"hyper_size": 1.5},
        {"embedding_dim": True},
        {"dropout": 1.5},
        {"recurrent_dropout": -0.1},
    ],
    ids=str,
)
def test_options_that_are_none(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        HyperLSTM(**({"input_size": SIZE, "hidden_size": HIDDEN} | options))
    if "recurrent_dropout" not in options:
        with pytest.raises(ConfigError, match=next(iter(options))):
            HyperRNN(**({"input_size": SIZE, "hidden_size": HIDDEN} | options))


def test_a_nonlinearity_that_is_none():
    with pytest.raises(ConfigError, match="sigmoid"):
        HyperRNN(SIZE, HIDDEN, nonlinearity="sigmoid")


def test_dropout_only_in_training():
    module = HyperLSTM(SIZE, HIDDEN, 2, dropout=0.5, recurrent_dropout=0.5, **SMALL)
    x = torch.randn(TIME, BATCH, SIZE)
    assert not same(module(x), module(x))
    module.eval()
    assert same(module(x), module(x))


@pytest.mark.parametrize("norm", [False, True])
def test_memory_is_what_the_docstring_says(norm):
    cell = HyperLSTM(SIZE, HIDDEN, layer_norm=norm, **SMALL).cells[0]
    x, state = torch.randn(TIME, BATCH, SIZE), torch.zeros(BATCH, HIDDEN + SMALL["hyper_size"])
    weights = [torch.empty(0) if (w := getattr(cell, n)) is None else w for n in WEIGHTS]
    kept = hyper_lstm(x, state, state, torch.empty(0), weights, True)
    numbers = sum(t.numel() for t in kept) - 2 * state.numel()  # less the initial states
    small, e = cell.hyper_size, cell.embedding_dim
    per_step = 15 * HIDDEN + 12 * small + 12 * e + 5 + (5 * HIDDEN + 5 if norm else 0)
    assert numbers == TIME * BATCH * per_step


# -------------------------------------------------------------------------- the rest of the world


@over(ONE_OF_EACH)
def test_deepcopy_pickle_and_state_dict(cls, flags):
    module = make(cls, flags)
    x = torch.randn(4, 4, SIZE, dtype=torch.float64)
    expected = module(x)
    fresh = cls(SIZE, HIDDEN, dtype=torch.float64, **(SMALL | flags))
    assert not same(fresh(x)[0], expected[0])
    fresh.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert same(twin(x), expected)


@over(ONE_OF_EACH)
def test_compiles_as_one_graph(cls, flags):
    module = cls(SIZE, HIDDEN, **(SMALL | flags))
    twin = copy.deepcopy(module)
    torch.compiler.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 4, SIZE)
    for model in (module, compiled):
        model(x)[0].square().sum().backward()
    assert (compiled(x)[0] - module(x)[0]).abs().max() < SINGLE_TOLERANCE
    for (name, a), b in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < SINGLE_TOLERANCE, name


@pytest.mark.parametrize("cls", [HyperLSTM, HyperRNN])
def test_transforms_compile_as_one_graph(cls):
    module, values, x = example(cls, {})
    torch.compiler.reset()
    transform = torch.func.grad(functools.partial(loss_of, module))
    found = torch.compile(transform, fullgraph=True, backend="eager")(values, x)
    for name, wanted in transform(values, x).items():
        close(found[name], wanted)


def test_exports():
    module = HyperLSTM(SIZE, HIDDEN, **SMALL).eval()
    x = torch.randn(4, 2, SIZE)
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        assert same(program.module()(x), module(x))
    operators = [node.target for node in program.graph.nodes]
    assert operators.count(torch.ops.hyperize.hyper_lstm.default) == 1


@over(ONE_OF_EACH)
def test_autocast(cls, flags):
    module = cls(SIZE, HIDDEN, **(SMALL | flags))
    x = torch.randn(4, 4, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x)[0]
    output.float().square().sum().backward()
    exact = module(x)[0]
    assert (output - exact).abs().max() < HALF_TOLERANCE
    for name, param in module.named_parameters():
        assert param.grad.dtype == torch.float32, name
        assert torch.isfinite(param.grad).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_autocast_does_not_reach_into_the_operator(norm, dtype):
    cell = make(HyperLSTM, {"layer_norm": norm}, dtype).cells[0]
    x = torch.randn(4, BATCH, SIZE, dtype=dtype, requires_grad=True)
    state = torch.randn(BATCH, HIDDEN + SMALL["hyper_size"], dtype=dtype)
    weights = [torch.empty(0) if (w := getattr(cell, n)) is None else w for n in WEIGHTS]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            s, c, *_ = hyper_lstm(x, state, state, torch.empty(0), weights, True)
            gradients = torch.autograd.grad([s, c], [x, *cell.parameters()], [s, c])
            results.append([s, c, *gradients, *plain(x, state, state, torch.empty(0), weights)])
    assert all(t.dtype == dtype for t in results[1])
    assert same(*results)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kernels_of_accelerators_get_statistics_in_float32(dtype):
    """Their gradient of a layer norm refuses others; FakeTensorMode needs no accelerator."""
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator is torch.ops.aten.native_layer_norm_backward.default:
                seen.extend(t.dtype for t in args[3:5])
            return operator(*args, **(kwargs or {}))

    with FakeTensorMode(), Spy():
        x, rstd = (torch.empty(3, n, device="cuda", dtype=dtype) for n in (4, 1))
        assert recurrence._normalise_backward(x, x, rstd).dtype == dtype
    assert seen == [torch.float32] * 2


# ------------------------------------ transforms: as nn.LSTM, which on a CPU is ordinary operations

LAYERS = [*ONE_OF_EACH, (HyperLSTM, {"bidirectional": True, "layer_norm": True})]
packings = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


def outputs_of(module, values, x, packed=False):
    """The outputs and states for parameters and an input, a batch of 3 sequences, as one tuple."""
    if packed:
        first = module.batch_first
        lengths = torch.tensor([3, 4, 1])
        x = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
    output, after = functional_call(module, values, (x,))
    output = output.data if isinstance(output, PackedSequence) else output
    return output, *(after if isinstance(after, tuple) else (after,))


def loss_of(module, values, x, packed=False):
    return sum(t.cos().sum() for t in outputs_of(module, values, x, packed))


def example(cls, flags, copies=None):
    """A module, its parameters, and an input; of the latter several if wanted."""
    module = make(cls, flags)
    shape = (BATCH, 4, SIZE) if module.batch_first else (4, BATCH, SIZE)
    x = torch.randn(*([] if copies is None else [copies]), *shape, dtype=torch.float64)
    return module, {name: p.detach() for name, p in module.named_parameters()}, x


@over(LAYERS)
def test_gradients_of_torch_func_are_those_of_autograd(cls, flags):
    module, values, x = example(cls, flags)
    found = torch.func.grad(loss_of, argnums=(1, 2))(module, values, x)
    x.requires_grad_()
    loss_of(module, dict(module.named_parameters()), x).backward()
    close(found[1], x.grad)
    for name, param in module.named_parameters():
        close(found[0][name], param.grad)


@packings
@over(LAYERS)
def test_gradient_penalties_of_layers_are_those_of_plain_operations(
    cls, flags, packed, monkeypatch
):
    module, _, x = example(cls, flags)
    x.requires_grad_()
    results = []
    for plainly in (False, True):
        if plainly:
            monkeypatch.setattr(dynamic, "is_transformed", lambda *tensors: True)
        loss = loss_of(module, dict(module.named_parameters()), x, packed)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append([gradient, *torch.autograd.grad(gradient.norm(), [x, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        close(a, b)


@over(LAYERS)
def test_vmap_over_inputs_is_a_loop(cls, flags):
    module, values, x = example(cls, flags, copies=2)
    for function in (outputs_of, torch.func.grad(loss_of, argnums=1)):
        found = torch.func.vmap(lambda x, f=function: f(module, values, x))(x)
        looped = [function(module, values, one) for one in x]
        for name in values if isinstance(found, dict) else range(len(found)):
            close(found[name], torch.stack([one[name] for one in looped]))


@packings
@over(LAYERS)
def test_vmap_over_an_ensemble_is_a_loop(cls, flags, packed):
    module, _, x = example(cls, flags)
    ensemble = [module, make(cls, flags)]
    stacked, _ = stack_module_state(ensemble)
    found = torch.func.vmap(lambda values: outputs_of(module, values, x, packed))(stacked)
    looped = [outputs_of(m, dict(m.named_parameters()), x, packed) for m in ensemble]
    for a, b in zip(found, zip(*looped, strict=True), strict=True):
        close(a, torch.stack(b))


@over(LAYERS)
def test_jvp_is_the_transpose_of_the_backward_pass(cls, flags):
    """With J the Jacobian, u (J v) is (u J) v. The backward pass is checked by other tests."""
    module, values, x = example(cls, flags)
    directions = {name: torch.randn_like(t) for name, t in values.items()}
    way = torch.randn_like(x)
    run = functools.partial(outputs_of, module)
    outputs, found = torch.func.jvp(run, (values, x), (directions, way))
    params = dict(module.named_parameters())
    again = outputs_of(module, params, x.requires_grad_())
    for a, b in zip(outputs, again, strict=True):
        close(a, b)
    weights = [torch.randn_like(t) for t in outputs]
    grads = torch.autograd.grad(again, [x, *params.values()], weights)
    wanted = sum((g * d).sum() for g, d in zip(grads, [way, *directions.values()], strict=True))
    close(sum((a * w).sum() for a, w in zip(found, weights, strict=True)), wanted)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cls", [HyperLSTMCell, HyperRNNCell])
def test_cells_are_transformed_too(cls, norm):
    layer = HyperLSTM if cls is HyperLSTMCell else HyperRNN
    cell = make(layer, {"layer_norm": norm}).cells[0]
    x = torch.randn(BATCH, SIZE, dtype=torch.float64)

    def loss(x):
        state = cell(x, cell(x.flip(-1)))
        return sum(s.cos().sum() for s in (state if isinstance(state, tuple) else (state,)))

    first, second = torch.func.grad(loss)(x), torch.func.hessian(loss)(x)
    x.requires_grad_()
    close(first, torch.autograd.grad(loss(x), x)[0])
    close(second, torch.autograd.functional.hessian(loss, x))
    rows = torch.autograd.functional.jacobian(
        lambda x: torch.stack([loss(r) for r in x]), x, vectorize=True
    )
    close(rows, torch.stack([torch.autograd.grad(loss(x[i]), x)[0] for i in range(BATCH)]))
    close(torch.func.vmap(loss)(x), torch.stack([loss(row) for row in x]))


def test_an_input_that_another_was_computed_from_has_its_own_gradient():
    """The penalty's backward pass must not count the way from x through the initial state twice."""
    cell = make(HyperLSTM, {}).cells[0]
    x = torch.randn(4, BATCH, SIZE, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (cell.sequence, lambda x, state: transcribed(cell, x, state)):
        h = x.sum(0)[:, :HIDDEN]
        output, _ = run(x, (h, torch.cat([h, h, h], 1)[:, : cell.state_sizes[1]]))
        results.append(torch.autograd.grad(output.sum(), x, create_graph=True)[0])
    close(*results)


def test_only_transforms_leave_the_operator(monkeypatch):
    module = make(HyperLSTM, {})
    x = torch.randn(4, BATCH, SIZE, dtype=torch.float64, requires_grad=True)

    def refuse(*args):
        raise AssertionError("the slow way")

    for place in (dynamic, recurrence):
        monkeypatch.setattr(place, "plain", refuse)
    module(x)[0].sum().backward()
    loss = module(x)[0].sum()
    with pytest.raises(AssertionError, match="the slow way"):
        torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(AssertionError, match="the slow way"):
        torch.func.grad(lambda x: module(x)[0].sum())(x)


@over(ONE_OF_EACH)
def test_on_the_meta_device_shapes_are_those_of_the_cpu(cls, flags):
    module = make(cls, flags, torch.float32)
    x = torch.randn(4, BATCH, SIZE)
    results = []
    for device in ("cpu", "meta"):
        module, x = module.to(device), x.detach().to(device).requires_grad_()
        module.zero_grad()
        output, after = module(x)
        output.sum().backward()
        tensors = [output, *(after if cls is HyperLSTM else (after,)), x.grad]
        tensors += [p.grad for p in module.parameters()]
        assert all(t.device.type == device for t in tensors)
        results.append([(t.shape, t.dtype, t.stride()) for t in tensors])
    assert results[0] == results[1]
    with pytest.raises(ValueError, match="type"):  # as on a CPU
        module(x.double())


@pytest.mark.parametrize("cls", [HyperLSTM, HyperRNN])
def test_inference_modes_have_the_outputs_of_training(cls):
    module = cls(SIZE, HIDDEN, **SMALL)
    x = torch.randn(TIME, BATCH, SIZE)
    expected = module(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert same(module(x), expected)


def test_ddp(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = HyperLSTM(SIZE, HIDDEN, **SMALL)
        twin = copy.deepcopy(module)
        wrapped = nn.parallel.DistributedDataParallel(twin)
        x = torch.randn(TIME, BATCH, SIZE)
        for model in (module, wrapped):
            model(x)[0].square().sum().backward()
        for a, b in zip(module.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    finally:
        dist.destroy_process_group()


def test_ten_thousand_steps_of_streaming():
    module = HyperLSTM(SIZE, HIDDEN, **SMALL).eval()
    state = None
    with torch.no_grad():
        for step in torch.randn(10_000, 1, 1, SIZE):
            output, state = module(step, state)
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(s).all() for s in state)


@pytest.mark.parametrize("flags", [{}, {"layer_norm": True}], ids=str)
def test_learns_to_remember(flags):
    """The first of eight inputs has to be told at the end, which needs the memory."""
    torch.manual_seed(0)
    module = nn.ModuleList([HyperLSTM(2, 16, hyper_size=8, **flags), nn.Linear(16, 2)])
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(120):
        bits = torch.randint(2, (8, 32))
        logits = module[1](module[0](F.one_hot(bits, 2).float())[0][-1])
        loss = F.cross_entropy(logits, bits[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


# ------------------------------------------------------------------ hyperize(model, lstm="dynamic")

OPTIONS = {"hyper_size": 16, "layer_norm": True}


class Twice(nn.Module):
    """One LSTM under two names, a second one, and an RNN."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(SIZE, 24, batch_first=True)
        self.again = self.encoder
        self.decoder = nn.LSTM(24, 24, 2, batch_first=True, dropout=0.1)
        self.tail = nn.RNN(24, SIZE, nonlinearity="relu", batch_first=True, bias=False)

    def forward(self, x):
        return self.tail(self.decoder(self.again(x)[0])[0])[0]


def test_dynamic_layers_take_the_place_of_the_dense_ones():
    model = CRNN().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    hyper = hyperize(model, lstm="dynamic", lstm_options=OPTIONS, compression=2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert type(hyper) is CRNN
    assert type(hyper.lstm) is HyperLSTM
    assert not hyper.lstm.training
    for name in ("input_size", "hidden_size", "num_layers", "bidirectional", "batch_first"):
        assert getattr(hyper.lstm, name) == getattr(model.lstm, name)
    assert hyper.lstm.hyper_size == 16
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    x = torch.randn(2, 1, 8, 16)
    assert hyper(x).shape == model(x).shape
    hyper(x).square().sum().backward()
    for name, param in hyper.named_parameters():
        assert param.grad is not None, name


def test_the_report_says_that_parameters_grew():
    model = CRNN()
    options = {"lstm": "dynamic", "compression": 2}
    plan, hyper = make_plan(model, **options), hyperize(model, **options)
    row = next(row for row in report(hyper).sites if row.path == "lstm")
    assert row.kind == "lstm, dynamic"
    assert row.dense_params == count(model.lstm)
    assert row.hyper_params == count(hyper.lstm) > row.dense_params
    for found in (report(plan), report(hyper)):
        assert found.total_dense_params == count(model)
        assert found.total_hyper_params == count(hyper)
        assert found.compression == plan.compression < 1
        assert "grow from" in str(found)
    assert report(plan).to_dict() == report(hyper).to_dict()
    static = [p for p in plan.sites if p.site.kind == "conv2d"]
    assert sum(p.site.dense_params for p in static) >= 2 * (
        plan.hypernet_params + plan.embedding_params
    )


def test_there_is_no_dense_equivalent():
    hyper = hyperize(CRNN(), lstm="dynamic", compression=2)
    for call in (to_dense, dense_state_dict):
        with pytest.raises(ModelError, match=r"lstm is a dynamic.*depend on the input"):
            call(hyper)
    assert type(hyper.lstm) is HyperLSTM


def test_static_and_dynamic_are_mixed_by_glob():
    model = Twice()
    hyper = hyperize(model, lstm={"enc*": "dynamic", "tail": "dynamic"}, compression=1.5)
    assert type(hyper.encoder) is HyperLSTM
    assert hyper.again is hyper.encoder
    assert type(hyper.decoder) is not HyperLSTM
    assert set(hyper.decoder.generated) == {
        f"weight_{which}_l{layer}" for which in ("ih", "hh") for layer in (0, 1)
    }
    assert type(hyper.tail) is HyperRNN
    assert hyper.tail.nonlinearity == "relu"
    assert hyper.tail.bias is False
    assert hyper(torch.randn(2, 4, SIZE)).shape == (2, 4, SIZE)
    with pytest.raises(ModelError, match="encoder, tail"):
        to_dense(hyper)


@pytest.mark.parametrize("make_model", [CRNN, lambda: nn.Sequential(nn.RNN(SIZE, HIDDEN))])
def test_dynamic_models_save_and_load(make_model, tmp_path):
    hyper = hyperize(make_model(), lstm="dynamic", lstm_options=OPTIONS, compression=2).eval()
    save(hyper, tmp_path / "hyper.safetensors")
    again = load(make_model(), tmp_path / "hyper.safetensors").eval()
    x = torch.randn(2, 1, 8, 16) if isinstance(hyper, CRNN) else torch.randn(3, 2, SIZE)
    for twin in (again, copy.deepcopy(hyper), pickle.loads(pickle.dumps(hyper))):
        assert same(twin(x), hyper(x))
    with torch.device("meta"):
        blank = make_model()
    assert same(load(blank, tmp_path / "hyper.safetensors").eval()(x), hyper(x))


def test_a_layer_alone_becomes_dynamic():
    layer = nn.LSTM(SIZE, HIDDEN, batch_first=True)
    hyper = hyperize(layer, lstm="dynamic", lstm_options=SMALL)
    assert type(hyper) is HyperLSTM
    assert hyper(torch.randn(2, 3, SIZE))[0].shape == (2, 3, HIDDEN)
    assert report(hyper).total_hyper_params == count(hyper)
    with pytest.raises(ModelError, match="in place"):
        hyperize(layer, lstm="dynamic", inplace=True)
    with pytest.raises(ModelError, match="itself is a dynamic"):
        to_dense(hyper)


def test_a_seed_gives_the_same_dynamic_layers():
    one, again, two = (hyperize(Twice(), lstm="dynamic", seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["encoder.cells.0.weight_hh"], two["encoder.cells.0.weight_hh"])


def test_what_has_no_dynamic_form_stays_dense_with_the_reason():
    class Own(nn.LSTM):
        pass

    model = nn.ModuleDict(
        {
            "good": nn.LSTM(SIZE, 24),
            "projected": nn.LSTM(SIZE, 24, proj_size=4),
            "own": Own(SIZE, 24),
            "frozen": nn.LSTM(SIZE, 24).requires_grad_(False),
        }
    )
    plan = make_plan(model, lstm="dynamic")
    assert [site.path for site in plan.dynamic] == ["good"]
    reasons = {skip.path: skip.reason for skip in plan.skips}
    assert "proj_size" in reasons["projected"]
    assert "Own" in reasons["own"]
    assert "frozen" in reasons["frozen"]


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"lstm": "dynamical"}, ConfigError, "static"),
        ({"lstm": {"lstm": "other"}}, ConfigError, "static"),
        ({"lstm": {"lsmt": "dynamic"}}, ConfigError, "near misses: lstm"),
        ({"lstm": "dynamic", "lstm_options": {"size": 3}}, ConfigError, "hyper_size"),
        ({"lstm": "dynamic", "lstm_options": {"hyper_size": 0}}, ConfigError, "hyper_size"),
        ({"lstm": "dynamic", "max_params": 30_000}, BudgetError, "cannot be met"),
    ],
    ids=str,
)
def test_dynamic_requests_that_cannot_be_met(options, error, word):
    model = CRNN()
    with pytest.raises(error, match=word):
        hyperize(model, **options)
    assert type(model.lstm) is nn.LSTM


def test_dynamic_configs_round_trip_through_json():
    for form in ("dynamic", {"a.*": "dynamic", "b": "static"}):
        config = HyperConfig(lstm=form, lstm_options=OPTIONS)
        assert HyperConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("kind", [HyperLSTM, HyperRNN])
def test_a_move_to_channels_last_changes_nothing(kind):
    layer = kind(12, 20, hyper_size=8, embedding_dim=3)
    x = torch.randn(5, 2, 12)
    wanted = layer(x)[0]
    wanted.sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer.to(memory_format=torch.channels_last)
    got = layer(x)[0]
    got.sum().backward()
    assert torch.equal(got, wanted)
    for param, gradient in zip(layer.parameters(), gradients, strict=True):
        assert torch.equal(param.grad, gradient)
