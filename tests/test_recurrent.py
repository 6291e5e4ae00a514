"""Recurrent layers: every option of torch's own, through torch's own kernels."""

import copy
import itertools
import pickle

import pytest
import torch
from models import CRNN, Cells, calls_of, count, embeddings_of, over, same, signature
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from hyperize import ModelError, dense_state_dict, hyperize, make_plan, to_dense
from hyperize.layers import Generated

SIZE, HIDDEN, TIME, BATCH = 40, 32, 6, 3

FLAGS = [
    {"num_layers": layers, "bidirectional": both, "bias": bias, "batch_first": first}
    for layers, both, bias, first in itertools.product(
        (1, 2), (False, True), (True, False), (False, True)
    )
]
LAYERS = (
    [(nn.LSTM, flags) for flags in FLAGS]
    + [(nn.LSTM, flags | {"proj_size": 12}) for flags in FLAGS]
    + [(nn.GRU, flags) for flags in FLAGS]
    + [(nn.RNN, flags | {"nonlinearity": "relu"}) for flags in FLAGS]
)
ONE_OF_EACH = [
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.LSTM, {"proj_size": 12, "batch_first": True}),
    (nn.GRU, {"num_layers": 2, "bias": False}),
    (nn.RNN, {"bidirectional": True}),
]
CELLS = [
    (cls, {"bias": bias}) for cls in (nn.LSTMCell, nn.GRUCell, nn.RNNCell) for bias in (True, False)
]
TARGETS = ("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell")

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def pair(cls, flags, dtype=torch.float32):
    """A hyperized layer alone, and its dense twin."""
    layer = cls(SIZE, HIDDEN, dtype=dtype, **flags)
    hyper = hyperize(layer, targets=TARGETS, compression=2)
    assert type(layer) is cls
    return hyper, to_dense(hyper)


def sequence(flags, *, batch=BATCH, dtype=torch.float32):
    shape = (batch, TIME, SIZE) if flags.get("batch_first") else (TIME, batch, SIZE)
    return torch.randn(shape, dtype=dtype)


def states(layer, *, batch=BATCH):
    """Random initial states in the layer's shapes."""
    stacked = layer.num_layers * (2 if layer.bidirectional else 1)
    out = layer.proj_size or HIDDEN
    batched = () if batch is None else (batch,)
    h = torch.randn(stacked, *batched, out)
    if isinstance(layer, nn.LSTM):
        return h, torch.randn(stacked, *batched, HIDDEN)
    return h


@over(LAYERS)
def test_every_weight_is_generated(cls, flags):
    hyper, dense = pair(cls, flags)
    weights = [name for name in dense._flat_weights_names if name.startswith("weight")]
    assert list(hyper.generated) == weights
    for name in dense._flat_weights_names:
        assert torch.equal(getattr(hyper, name), getattr(dense, name)), name
        assert torch.equal(getattr(hyper, name), dense.state_dict()[name]), name
    assert count(hyper) < count(dense)


@over(LAYERS)
def test_outputs_and_states(cls, flags):
    hyper, dense = pair(cls, flags)
    x = sequence(flags)
    assert same(hyper(x), dense(x))


@over(LAYERS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_outputs_and_states_without_gradients(cls, flags, mode):
    hyper, dense = pair(cls, flags)
    x = sequence(flags)
    with mode():
        assert same(hyper(x), dense(x))


@over(LAYERS)
def test_initial_states(cls, flags):
    hyper, dense = pair(cls, flags)
    x, hx = sequence(flags), states(dense)
    assert same(hyper(x, hx), dense(x, hx))
    assert not same(hyper(x, hx), hyper(x))


@over(LAYERS)
def test_unbatched(cls, flags):
    hyper, dense = pair(cls, flags)
    x, hx = torch.randn(TIME, SIZE), states(dense, batch=None)
    assert same(hyper(x), dense(x))
    assert same(hyper(x, hx), dense(x, hx))


@pytest.mark.parametrize("enforce_sorted", [True, False])
@over(LAYERS)
def test_packed_sequences(cls, flags, enforce_sorted):
    hyper, dense = pair(cls, flags)
    lengths = [6, 4, 1] if enforce_sorted else [1, 6, 4]
    packed = pack_padded_sequence(
        sequence(flags), lengths, flags["batch_first"], enforce_sorted=enforce_sorted
    )
    (a, states_a), (b, states_b) = hyper(packed), dense(packed)
    assert same(pad_packed_sequence(a), pad_packed_sequence(b))
    assert same(states_a, states_b)


@over(ONE_OF_EACH)
def test_dropout_draws_the_same_in_training(cls, flags):
    flags = flags | {"dropout": 0.5, "num_layers": 2}
    hyper, dense = pair(cls, flags)
    x = sequence(flags)
    outputs = []
    for layer in (hyper, dense, hyper):
        torch.manual_seed(7)
        outputs.append(layer(x))
    assert same(outputs[0], outputs[1])
    assert same(outputs[0], outputs[2])
    assert not same(hyper(x), hyper(x))
    assert same(hyper.eval()(x), dense.eval()(x))


@over(LAYERS)
def test_gradients_are_those_of_the_dense_weights(cls, flags):
    hyper, dense = pair(cls, flags)
    x = sequence(flags)
    for layer in (hyper, dense):
        layer(x)[0].square().sum().backward()
    for name in dense._flat_weights_names:
        grad = getattr(dense, name).grad
        if name not in hyper.generated:
            assert torch.equal(getattr(hyper, name).grad, grad), name
            continue
        embedding = getattr(hyper, name + "_embedding")
        (through,) = torch.autograd.grad(getattr(hyper, name), embedding, grad)
        assert embedding.grad.any(), name
        assert torch.equal(embedding.grad, through), name
    for param in hyper.hypernet.parameters():
        assert param.grad.any()


@over(LAYERS + CELLS)
def test_state_dict_is_that_of_the_class(cls, flags):
    hyper, dense = pair(cls, flags)
    fresh = cls(SIZE, HIDDEN, **flags)
    assert type(dense) is cls
    assert signature(dense.state_dict()) == signature(fresh.state_dict())
    assert same(dense_state_dict(hyper), dense.state_dict())
    fresh.load_state_dict(dense.state_dict(), strict=True)
    x = sequence(flags) if "num_layers" in flags else torch.randn(BATCH, SIZE)
    assert same(fresh(x), hyper(x))


@over(ONE_OF_EACH + CELLS)
def test_deepcopy_and_pickle(cls, flags):
    hyper, _ = pair(cls, flags)
    x = sequence(flags) if cls in (nn.LSTM, nn.GRU, nn.RNN) else torch.randn(BATCH, SIZE)
    expected = hyper(x)
    for twin in (copy.deepcopy(hyper), pickle.loads(pickle.dumps(hyper))):
        assert same(twin(x), expected)
        assert same(to_dense(twin)(x), expected)
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(0.1)
        assert not same(twin(x), expected)
    assert same(hyper(x), expected)


@over(ONE_OF_EACH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moving_to_another_dtype(cls, flags, dtype):
    hyper, _ = pair(cls, flags)
    x = sequence(flags).to(dtype)
    moved = copy.deepcopy(hyper).to(dtype)
    output = moved(x)
    assert output[0].dtype == dtype
    assert same(output, to_dense(moved)(x))
    back = moved.to(torch.float32)  # each conversion rebuilds nn.LSTM's list of weights
    assert same(back(x.float()), to_dense(back)(x.float()))


@over(ONE_OF_EACH)
def test_the_list_of_weights_follows_every_change(cls, flags):
    hyper, _ = pair(cls, flags)
    x = sequence(flags)
    before = hyper(x)
    hyper.flatten_parameters()
    assert same(hyper(x), before)
    hyper.bias = hyper.bias  # an attribute of the dense class, not a weight
    with torch.no_grad():
        for p in hyper.hypernet.parameters():
            p.mul_(1.5)
    assert not same(hyper(x), before)
    dense = to_dense(hyper)
    assert same(hyper(x), dense(x))
    assert all(a is b for a, b in zip(dense._flat_weights, dense.parameters(), strict=True))
    assert [w.shape for w in hyper.all_weights[0]] == [w.shape for w in dense.all_weights[0]]


@over(ONE_OF_EACH)
def test_state_dict_between_seeds(cls, flags):
    layer = cls(SIZE, HIDDEN, **flags)
    one, two = (hyperize(layer, targets=TARGETS, compression=2, seed=s) for s in (1, 2))
    x = sequence(flags)
    assert not same(one(x), two(x))
    two.load_state_dict(one.state_dict())
    assert same(one(x), two(x))


@over(ONE_OF_EACH)
def test_assigning_loads_what_was_made_on_meta(cls, flags):
    source, _ = pair(cls, flags)
    with torch.device("meta"):
        blank = cls(SIZE, HIDDEN, **flags)
    hyper = hyperize(blank, targets=TARGETS, compression=2)
    hyper.load_state_dict(source.state_dict(), assign=True)
    x = sequence(flags)
    assert same(hyper(x), source(x))


@over([(cls, flags) for cls, flags in ONE_OF_EACH if flags.get("bias", True)])
def test_biases_can_be_replaced(cls, flags):
    hyper, _ = pair(cls, flags)
    x = sequence(flags)
    before = hyper(x)
    hyper.bias_ih_l0 = nn.Parameter(torch.ones_like(hyper.bias_ih_l0))
    assert not same(hyper(x), before)
    dense = to_dense(hyper)
    assert torch.equal(dense.bias_ih_l0, torch.ones_like(dense.bias_ih_l0))
    assert same(hyper(x), dense(x))


@over(ONE_OF_EACH + CELLS)
def test_each_weight_is_generated_once_per_forward(cls, flags):
    hyper, _ = pair(cls, flags)
    calls = calls_of(hyper)
    x = sequence(flags) if cls in (nn.LSTM, nn.GRU, nn.RNN) else torch.randn(BATCH, SIZE)
    hyper(x)
    assert sorted(calls) == sorted(embeddings_of(hyper))


@over(ONE_OF_EACH)
def test_each_weight_is_generated_once_per_packed_forward(cls, flags):
    hyper, _ = pair(cls, flags)
    calls = calls_of(hyper)
    hyper(pack_sequence([torch.randn(4, SIZE), torch.randn(2, SIZE)]))
    assert sorted(calls) == sorted(embeddings_of(hyper))


@over(ONE_OF_EACH)
def test_wrong_inputs_are_refused_as_by_the_dense_layer(cls, flags):
    hyper, dense = pair(cls, flags)
    wrong = (torch.randn(TIME, BATCH, SIZE + 1), torch.randn(2, 2, 2, 2))
    for x in (*wrong, sequence(flags, dtype=torch.float64)):
        messages = []
        for layer in (hyper, dense):
            with pytest.raises((RuntimeError, ValueError)) as refusal:
                layer(x)
            messages.append((refusal.type, str(refusal.value)))
        assert messages[0] == messages[1]


@over(ONE_OF_EACH + CELLS)
def test_generated_weights_cannot_be_assigned(cls, flags):
    hyper, _ = pair(cls, flags)
    name = hyper.generated[0]
    before = hyper.state_dict()
    for value in (nn.Parameter(getattr(hyper, name).detach().clone()), getattr(hyper, name)):
        with pytest.raises(ModelError, match=f"{name}_embedding"):
            setattr(hyper, name, value)
    assert same(hyper.state_dict(), before)


@over(CELLS)
def test_cells(cls, flags):
    hyper, dense = pair(cls, flags)
    x = torch.randn(BATCH, SIZE)
    state = torch.randn(BATCH, HIDDEN)
    state = (state, torch.randn(BATCH, HIDDEN)) if cls is nn.LSTMCell else state
    for args in ((x,), (x, state)):
        assert same(hyper(*args), dense(*args))
    assert same(hyper(torch.randn(SIZE)), hyper(torch.randn(SIZE))) is False


def test_cells_in_a_loop_share_the_generator_and_learn():
    hyper = hyperize(Cells(), targets=TARGETS, compression=1.5)
    hyper(torch.randn(4, 2, 24)).square().sum().backward()
    for name, param in hyper.named_parameters():
        assert param.grad is not None, name
        assert param.grad.any(), name


def test_a_crnn_shares_one_generator_and_trains():
    model = CRNN()
    plan = make_plan(model, compression=4)
    assert {p.site.kind for p in plan.sites} == {"conv2d", "lstm"}
    hyper = hyperize(model, compression=4)
    generators = {id(m.hypernet) for m in hyper.modules() if isinstance(m, Generated)}
    assert generators == {id(hyper.hypernet)}
    optimizer = torch.optim.Adam(hyper.parameters(), lr=1e-2)
    x, target = torch.randn(4, 1, 8, 16), torch.randn(4, 8, 11)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (hyper(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
