"""Random architectures and requests: what is planned is what is built, and it converts back.

Each property is stated once; hypothesis looks for the architecture or the request that breaks it.
"""

import json

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from models import count, same, signature
from torch import nn

from hyperize import (
    BudgetError,
    ConfigError,
    HyperConfig,
    HyperLSTM,
    ModelError,
    Plan,
    hyperize,
    make_plan,
    report,
    to_dense,
)

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

ROUNDING = 1e-10
"""Of float64 outputs, by their scale: factors and weights sum the products in another order."""
TARGETS = ("conv2d", "lstm", "linear", "gru", "conv_transpose2d")

random_models = settings(
    max_examples=60,
    deadline=None,  # a first example compiles kernels; machines differ
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,  # the same examples on each run: a failure in CI is one that can be repeated
)


class Net(nn.Module):
    """Convolutions, then an optional recurrent layer over the columns, then an optional head."""

    def __init__(self, convs, recurrent, head):
        super().__init__()
        self.convs = nn.Sequential(*(cls(*args, **options) for cls, args, options in convs))
        self.recurrent = recurrent[0](*recurrent[1], **recurrent[2]) if recurrent else None
        self.head = nn.Linear(*head) if head else None

    def forward(self, x):
        x = torch.tanh(self.convs(x)).mean(2).transpose(1, 2)  # (N, C, H, W) -> (N, W, C)
        if self.recurrent is not None:
            x = self.recurrent(x)[0]
        return x if self.head is None else self.head(x)


@st.composite
def nets(draw):
    """A description of a `Net`, which also prints well when it fails."""
    channels = draw(st.integers(1, 40))
    inputs, convs = channels, []
    for _ in range(draw(st.integers(1, 4))):
        groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
        out = groups * draw(st.integers(1, max(1, 48 // groups)))
        kernel = (draw(st.sampled_from([1, 2, 3, 5, 7])), draw(st.sampled_from([1, 3, 5])))
        options = {"groups": groups, "bias": draw(st.booleans())}
        options["stride"] = draw(st.sampled_from([1, 1, 2]))
        if draw(st.sampled_from([False, False, False, True])):
            cls = nn.ConvTranspose2d
        else:
            cls = nn.Conv2d
            options["padding"] = tuple(size // 2 for size in kernel)
            options["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "circular"]))
            if options["padding_mode"] == "circular":
                options["padding"] = 0
                kernel = (1, 1)
        convs.append((cls, (channels, out, kernel), options))
        channels = out
    recurrent = None
    if draw(st.booleans()):
        hidden = draw(st.integers(2, 32))
        options = {
            "num_layers": draw(st.integers(1, 2)),
            "bidirectional": draw(st.booleans()),
            "bias": draw(st.booleans()),
            "batch_first": draw(st.booleans()),
        }
        cls = draw(st.sampled_from([nn.LSTM, nn.LSTM, nn.GRU]))
        if cls is nn.LSTM and draw(st.booleans()):
            options["proj_size"] = draw(st.integers(1, hidden - 1))
        recurrent = (cls, (channels, hidden), options)
        channels = options.get("proj_size", hidden) * (2 if options["bidirectional"] else 1)
    head = (channels, draw(st.integers(1, 64))) if draw(st.booleans()) else None
    return inputs, (convs, recurrent, head)


@st.composite
def requests(draw):
    """Fields of a `HyperConfig`, with any of the sizes fixed."""
    options = {"targets": TARGETS, "trunk_axis": draw(st.sampled_from([0, 1])), "seed": 0}
    options["compression"] = draw(st.floats(1.01, 30))
    if draw(st.sampled_from([False, False, False, True])):  # which has no other sizes to fix
        options["embeddings"] = draw(st.sampled_from(["channel", "separable"]))
        if draw(st.booleans()):
            options["embedding_dim"] = draw(st.integers(1, 16))
        return options
    for name, sizes in (("embedding_dim", 16), ("hidden_dim", 16)):
        if draw(st.sampled_from([False, False, True])):
            options[name] = draw(st.integers(1, sizes))
    if draw(st.sampled_from([False, False, True])):
        options["tile"] = (draw(st.integers(1, 20)), draw(st.integers(1, 40)))
    return options


def build(net):
    torch.manual_seed(0)
    inputs, parts = net
    return Net(*parts).eval(), torch.randn(2, inputs, 8, 9)


def planned(net, request):
    """The model, its input and its plan; rejects the example if the request is refused."""
    model, x = build(net)
    try:
        return model, x, make_plan(model, **request)
    except BudgetError:
        assume(False)


@random_models
@given(nets(), requests())
def test_a_request_is_met_or_refused(net, request):
    model, _ = build(net)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    refusal, plan = None, None
    try:
        plan = make_plan(model, **request)
    except BudgetError as error:
        refusal = str(error)
    assert same(model.state_dict(), before)
    if plan is None:
        assert "grow" in refusal or "cannot be met" in refusal
        return
    assert "embedding_dim" in request or plan.compression >= request["compression"]
    # Unmet only where the user set the length of the embeddings, and the plan says so
    assert bool(plan.notes) == (plan.compression < request["compression"])
    assert plan.embedding_dim == request.get("embedding_dim", plan.embedding_dim)
    assert plan.hidden_dim == request.get("hidden_dim", plan.hidden_dim)
    assert plan.family.embeddings == request.get("embeddings", "tile")
    assert all(t == request.get("tile", t) for t in plan.tile.values())


@random_models
@given(nets(), requests())
def test_counts_of_the_plan_are_those_of_the_model(net, request):
    model, _, plan = planned(net, request)
    hyper = hyperize(model, **request)
    assert plan.total_params == count(model)
    assert plan.total_hyper_params == count(hyper)
    generated = {planned.site.name for planned in plan.sites}
    assert plan.dense_params == sum(
        p.numel() for name, p in model.named_parameters() if name in generated
    )
    embeddings = dict(hyper.named_parameters())
    for entry in plan.sites:
        assert embeddings[entry.site.name].numel() == entry.hyper_params
    assert plan.dense_params - plan.hyper_params == count(model) - count(hyper)


@random_models
@given(nets(), requests())
def test_every_target_is_a_site_or_a_skip_with_a_reason(net, request):
    model, _, plan = planned(net, request)
    weights = {
        name: p.numel()
        for name, p in model.named_parameters()
        if name.rpartition(".")[2].startswith("weight")  # not the biases
    }
    found = {planned.site.name: planned.site.dense_params for planned in plan.sites}
    skipped = {skip.path: skip.params for skip in plan.skips}
    assert found.keys().isdisjoint(skipped)
    assert found | skipped == weights
    assert all(skip.reason for skip in plan.skips)


@random_models
@given(nets(), requests())
def test_one_more_in_the_embedding_breaks_the_request(net, request):
    assume("embedding_dim" not in request)
    model, _, plan = planned(net, request)
    sizes = {"hidden_dim": plan.hidden_dim, "tile": plan.tile}
    sizes = request if "embeddings" in request else sizes | request
    try:
        more = make_plan(model, **sizes | {"embedding_dim": plan.embedding_dim + 1})
    except BudgetError:
        return  # with it, every layer would grow
    assert more.compression < request["compression"]


@random_models
@given(nets(), requests())
def test_the_dense_model_has_the_outputs_bit_for_bit(net, request):
    model, x, _ = planned(net, request)
    hyper = hyperize(model, **request)
    dense = to_dense(hyper)
    assert same(dense(x), hyper(x))
    assert signature(dense.state_dict()) == signature(model.state_dict())
    assert [type(m) for m in dense.modules()] == [type(m) for m in model.modules()]


@random_models
@given(nets(), requests())
def test_factors_compute_what_the_weight_does(net, request):
    model, x, _ = planned(net, request | {"factorized": True})
    hyper = hyperize(model.double(), **request, factorized=True)
    dense = to_dense(hyper)(x.double())
    difference = (hyper(x.double()) - dense).abs().max()
    assert difference <= ROUNDING * dense.abs().max().clamp_min(1)


@random_models
@given(nets(), st.floats(0.05, 1.2), st.sampled_from(["tile", "channel", "separable"]))
def test_a_total_is_met_by_the_built_model_or_refused(net, share, embeddings):
    model, _ = build(net)
    most = max(1, int(share * count(model)))
    request = {"max_params": most, "embeddings": embeddings, "targets": TARGETS}
    refusal, plan = "", None
    try:
        plan = make_plan(model, **request)
    except (BudgetError, ConfigError) as error:
        refusal = str(error)
    if plan is None:
        reasons = ("cannot be met", "would grow", "is no less than", "no targets", "skipped")
        assert any(reason in refusal for reason in reasons), refusal
        return
    assert count(hyperize(model, plan)) == plan.total_hyper_params <= most < count(model)


@random_models
@given(nets(), st.sampled_from([False, True]))
def test_a_dynamic_layer_is_counted_as_it_is_built(net, layer_norm):
    model, x = build(net)
    recurrent = model.recurrent
    assume(isinstance(recurrent, nn.LSTM) and not recurrent.proj_size)
    options = {"lstm": "dynamic", "lstm_options": {"hyper_size": 4, "layer_norm": layer_norm}}
    try:
        plan = make_plan(model, compression=1.1, **options)
    except BudgetError:
        assume(False)
    hyper = hyperize(model, plan)
    assert count(hyper) == plan.total_hyper_params
    assert [site.path for site in plan.dynamic] == ["recurrent"]
    assert type(hyper.recurrent) is HyperLSTM
    assert hyper(x).shape == model(x).shape
    rows = sum(row.hyper_params for row in report(hyper).sites)
    assert report(hyper).hyper_params == rows + report(hyper).hypernet_params
    with pytest.raises(ModelError, match="dynamic"):
        to_dense(hyper)


@random_models
@given(nets(), requests())
def test_every_embedding_gets_a_gradient(net, request):
    model, x, _ = planned(net, request)
    hyper = hyperize(model, **request)
    hyper(x).square().sum().backward()
    for name, param in hyper.named_parameters():
        assert param.grad is not None, name
        assert torch.isfinite(param.grad).all(), name


@random_models
@given(nets(), requests())
def test_rows_of_the_report_add_up(net, request):
    model, _, plan = planned(net, request)
    hyper = hyperize(model, **request)
    for result in (report(plan), report(hyper)):
        assert result.dense_params == sum(row.dense_params for row in result.sites)
        rows = sum(row.hyper_params for row in result.sites)
        assert result.hyper_params == rows + result.hypernet_params
        assert result.total_dense_params == count(model)
        assert result.total_hyper_params == count(hyper)
        assert result.compression == result.dense_params / result.hyper_params
    assert report(plan) == report(hyper)


@random_models
@given(nets(), requests())
def test_plans_and_configs_survive_json(net, request):
    _, _, plan = planned(net, request)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert HyperConfig.from_json(plan.config.to_json()) == plan.config
    assert json.loads(report(plan).to_json())["compression"] == plan.compression


@settings(random_models, max_examples=100)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "compression": st.one_of(st.none(), st.floats(), st.integers(-5, 50)),
            "max_params": st.one_of(st.none(), st.integers(-5, 10**7)),
            "embedding_dim": st.one_of(st.none(), st.integers(-5, 500)),
            "hidden_dim": st.one_of(st.none(), st.integers(-5, 500)),
            "tile": st.one_of(
                st.none(),
                st.tuples(st.integers(-2, 64), st.integers(-2, 64)),
                st.dictionaries(
                    st.sampled_from(["1", "3x3", "1x7"]),
                    st.tuples(st.integers(0, 64), st.integers(0, 64)),
                ),
            ),
            "include": st.lists(st.text(max_size=5), max_size=3).map(tuple),
            "exclude": st.lists(st.text(max_size=5), max_size=3).map(tuple),
            "trunk_axis": st.integers(-1, 2),
            "seed": st.one_of(st.none(), st.integers()),
        },
    )
)
def test_a_config_is_refused_or_survives_json(options):
    try:
        config = HyperConfig(**options)
    except ConfigError:
        return
    again = HyperConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
