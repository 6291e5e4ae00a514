"""Layers that compute with the factors of a weight: what the weight would give, and no weight."""

import copy
import math
import pickle

import pytest
import timm
import torch
from models import CRNN, Convolutions, UsedTwice, randomise
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hyperize import (
    ConfigError,
    HyperConfig,
    Plan,
    as_graph,
    dense_state_dict,
    export_onnx,
    generated_l2,
    hyperize,
    load,
    make_plan,
    report,
    save,
)
from hyperize import plan as plans
from hyperize.factorized import Factoring, expand, multiply
from hyperize.hypernet import HyperNet
from hyperize.parts import find_groups, generated_layers
from hyperize.sites import is_plain

EXACT = 1e-11
"""Relative error, in norm, of products in another order in float64; 1e-14 was measured."""
SINGLE = 1e-5
"""The same in float32; 1e-6 was measured."""


def error(got, wanted):
    return float((got - wanted).detach().norm() / wanted.detach().norm())


@pytest.fixture
def everywhere(monkeypatch):
    """Factors wherever tiles line up, though the layers of small models are faster without."""
    monkeypatch.setattr(plans, "BALANCE", -(10**9))


# ----------------------------------------------------------------------------------- one layer
LAYERS = {
    "linear": (lambda bias: nn.Linear(24, 36, bias), (2, 5, 24)),
    "linear of a vector": (lambda bias: nn.Linear(24, 36, bias), (24,)),
    "conv1d": (lambda bias: nn.Conv1d(24, 36, 5, 2, 3, bias=bias), (2, 24, 11)),
    "conv2d": (lambda bias: nn.Conv2d(24, 36, 3, padding=1, bias=bias), (2, 24, 7, 6)),
    "strided": (lambda bias: nn.Conv2d(24, 36, 3, 2, (0, 1), bias=bias), (2, 24, 7, 6)),
    "dilated": (lambda bias: nn.Conv2d(24, 36, (1, 3), dilation=2, bias=bias), (2, 24, 7, 6)),
    "same": (lambda bias: nn.Conv2d(24, 36, 4, padding="same", bias=bias), (2, 24, 7, 6)),
    "reflect": (
        lambda bias: nn.Conv2d(24, 36, 3, padding=(2, 1), padding_mode="reflect", bias=bias),
        (2, 24, 7, 6),
    ),
    "pointwise": (lambda bias: nn.Conv2d(24, 36, 1, 2, 1, bias=bias), (2, 24, 7, 6)),
    "without a batch": (lambda bias: nn.Conv2d(24, 36, 3, bias=bias), (24, 7, 6)),
    "empty batch": (lambda bias: nn.Conv2d(24, 36, 3, bias=bias), (0, 24, 7, 6)),
    "conv3d": (
        lambda bias: nn.Conv3d(24, 36, (3, 1, 2), (1, 2, 1), 1, bias=bias),
        (2, 24, 4, 3, 5),
    ),
}
FORMS = {  # (parts, folds, spare channels)
    "tiles of one row": (1, 1, 0),
    "several tiles in a row": (3, 1, 0),
    "several rows in a tile": (1, 4, 0),
    "several tiles, spare channels": (5, 1, 1),
    "several rows, a spare one": (1, 5, 1),
    "channels": None,
}
TURNS = (1, 2, 5)
"""Kernels of each column of a separable weight; 5 of them leave spare rows."""


def random_factors(layer, form, axis, size=7):
    shape, kernel = layer.weight.shape, layer.weight.shape[2:]
    draw = torch.randn
    if form is None:
        return draw(shape[0], size), draw(shape[1], size), draw(*kernel, size)
    rows, columns = shape[axis], shape[1 - axis]
    if form in TURNS:
        width = columns * form
        return draw(math.ceil(rows / form), width), draw(width, *kernel), draw(())
    parts, folds, _ = form
    outer = draw(math.ceil(rows / folds), parts, size)
    return outer, draw(folds, math.ceil(columns / parts), *kernel, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", [name for name in LAYERS if "linear" not in name])
def test_a_convolution_computes_what_its_separable_weight_would(name, turns, axis, dtype):
    """In bfloat16 by another way where it has a stride."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(True).requires_grad_(False), torch.randn(shape)
    factors = random_factors(layer, turns, axis)
    layer.weight.copy_(expand(factors, layer.weight.shape, axis))
    wanted = layer(x)
    got = multiply(layer.to(dtype), x.to(dtype), tuple(f.to(dtype) for f in factors), axis)
    assert got.shape == wanted.shape
    if got.numel():
        tolerance = 1e-5 if dtype == torch.float32 else 0.03  # a bfloat16 has 8 bits
        assert (got.float() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_its_weight_would(name, form, bias, axis):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(bias).double().requires_grad_(False), torch.randn(shape, dtype=torch.double)
    factors = [f.double() for f in random_factors(layer, FORMS[form], axis)]
    if FORMS[form] and FORMS[form][2]:  # the form is to have what it is named after
        outer, inner = factors
        lengths = (len(outer) * len(inner), outer.shape[1] * inner.shape[1])
        assert lengths != (layer.weight.shape[axis], layer.weight.shape[1 - axis])
    weight = expand(factors, layer.weight.shape, axis)
    layer.weight.copy_(weight)
    wanted, got = layer(x), multiply(layer, x, factors, axis)
    assert got.shape == wanted.shape
    assert got.numel() == 0 or error(got, wanted) < EXACT


@pytest.mark.parametrize("form", [*FORMS, *TURNS])
@pytest.mark.parametrize("axis", [0, 1])
def test_channels_last_stays_channels_last(form, axis):
    layer = nn.Conv2d(24, 36, 3, padding=1)
    x = torch.randn(2, 24, 7, 6).contiguous(memory_format=torch.channels_last)
    factors = random_factors(layer, FORMS.get(form, form), axis)
    layer.weight = nn.Parameter(expand(factors, layer.weight.shape, axis))
    y = multiply(layer, x, factors, axis)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, layer(x)) < SINGLE


def test_which_layers_are_plain():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    class OwnProduct(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight, bias)

    changed = nn.Linear(4, 4)
    changed.forward = lambda x: x
    plain = [nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv3d(4, 4, 1)]
    plain.append(type("Sub", (nn.Conv2d,), {})(4, 4, 1))
    others = [
        *(Own(4, 4, 1), OwnProduct(4, 4, 1), Conv2dSame(4, 4, 1), StdConv2d(4, 4, 1), changed),
        *(nn.Conv2d(4, 4, 1, groups=2), nn.ConvTranspose2d(4, 4, 1), nn.LSTM(4, 4), nn.Identity()),
    ]
    assert all(map(is_plain, plain))
    assert not any(map(is_plain, others))


# -------------------------------------------------------------------------------- whole models
def vision(name):
    return lambda: randomise(timm.create_model(name, num_classes=5), 0)


class Volumes(nn.Module):
    """Convolutions over one and three axes."""

    def __init__(self):
        super().__init__()
        self.three = nn.Conv3d(8, 32, 3, padding=1)
        self.one = nn.Conv1d(32, 48, 5, stride=2, bias=False)

    def forward(self, x):
        return self.one(torch.tanh(self.three(x)).flatten(2))


MODELS = {
    "resnet": (vision("test_resnet"), (2, 3, 48, 48), ("conv2d", "linear")),
    "resnet18": (vision("resnet18"), (2, 3, 48, 48), ("conv2d", "linear")),
    "convnext": (vision("test_convnext"), (2, 3, 64, 64), ("conv2d", "linear")),
    "vit": (vision("test_vit"), (2, 3, 160, 160), ("conv2d", "linear")),
    "efficientnet": (vision("test_efficientnet"), (2, 3, 64, 64), ("conv2d", "linear")),
    "convolutions": (lambda: randomise(Convolutions(), 0), (2, 3, 20, 20), ("conv2d", "linear")),
    "used twice": (UsedTwice, (2, 3, 8, 8), ("conv2d",)),
    "crnn": (CRNN, (2, 1, 16, 32), ("conv2d", "linear", "lstm")),
    "volumes": (Volumes, (2, 8, 3, 4, 5), ("conv1d", "conv3d")),
    "attention": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64),
        (5, 2, 32),
        ("attention", "linear"),
    ),
}
GENERATORS = {
    "tiles": {},
    "tiles, turned": {"trunk_axis": 1},
    "channels": {"embeddings": "channel"},
    "channels, turned": {"embeddings": "channel", "trunk_axis": 1},
    "separable": {"embeddings": "separable"},
    "separable, turned": {"embeddings": "separable", "trunk_axis": 1},
    "hidden layer": {"hidden_dim": 8, "tile": (4, 8), "embedding_dim": 6},
    "hidden layer, turned": {
        "hidden_dim": 8,
        "tile": (8, 4),
        "embedding_dim": 6,
        "trunk_axis": 1,
    },
    "hidden layer, spare": {"hidden_dim": 5, "tile": (3, 7), "embedding_dim": 6},
}


def hypernet_of(model):
    return find_groups(model)[0].hypernet


def factorable(model):
    """The planned sites of the layers that use factors."""
    return [m.sites["weight"] for m in generated_layers(model).values() if m.factoring]


def embeddings_of(model, factorable):
    """The embeddings, by identity, of all layers that use factors, or of all that do not."""
    layers = generated_layers(model).values()
    return {
        id(m.embedding(n)) for m in layers if bool(m.factoring) is factorable for n in m.generated
    }


def pair(name, dtype=torch.double, **options):
    """The same model twice, with weights and with factors, and its input."""
    make, shape, targets = MODELS[name]
    torch.manual_seed(0)
    options = {"compression": 2, "targets": targets, "seed": 0} | options
    factorized = hyperize(make().to(dtype).eval(), factorized=True, **options)
    weights = copy.deepcopy(factorized)
    hypernet_of(weights).factorized = False
    return weights, factorized, torch.randn(shape, dtype=dtype)


def target_loss(y):
    """Not a mean square, which a norm at the model's end would make constant."""
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    return (y * noise.to(y.dtype)).sum()


def outputs_and_gradients(model, x, penalty=False):
    model.zero_grad()
    with generated_l2(model) as l2:
        y = model(x)
    (target_loss(y) + (l2() if penalty else 0)).backward()
    return {"output": y.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_close(got, wanted, tolerance=EXACT):
    """Each by its norm, unless that is rounding, as where gradients cancel in a norm layer."""
    assert got.keys() == wanted.keys()
    norms = {name: float(value.norm()) for name, value in wanted.items()}
    least = 1e-5 * max(norms.values())
    assert sum(norm > least for norm in norms.values()) > len(norms) / 2
    for name, value in wanted.items():
        assert float((got[name] - value).norm()) < tolerance * max(norms[name], least), name


@pytest.mark.parametrize("penalty", [False, True], ids=["", "penalty"])
@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_with_weights(name, generator, penalty, everywhere):
    weights, factorized, x = pair(name, **GENERATORS[generator])
    plan = hypernet_of(factorized).plan
    if plan.family_name == "separable":  # whose matrices have no factors
        plain = [p for p in plan.sites if p.site.plain and p.grid.elements > 1]
        assert factorable(factorized) == plain
    else:
        assert factorable(factorized)
    wanted = outputs_and_gradients(weights, x, penalty)
    assert_close(outputs_and_gradients(factorized, x, penalty), wanted)


@pytest.fixture
def products(monkeypatch):
    """Lists that grow by an embedding's identity whenever its weight, or its factors, are made."""
    weights, factors = [], []
    for sites, name in ((weights, "_generate"), (factors, "_factorize")):
        made = getattr(HyperNet, name)

        def counted(self, embedding, constants, grid, made=made, sites=sites):
            sites.append(id(embedding))
            return made(self, embedding, constants, grid)

        monkeypatch.setattr(HyperNet, name, counted)
    return weights, factors


@pytest.mark.parametrize("name", MODELS)
def test_no_weight_is_made_where_factors_are(name, everywhere, products):
    _, model, x = pair(name)
    weights, factors = products
    weights.clear()  # some are made for the statistics of the start
    model(x)
    assert set(factors) == embeddings_of(model, factorable=True)
    assert set(weights) == embeddings_of(model, factorable=False)
    assert len(set(factors)) + len(set(weights)) == len(hypernet_of(model).plan.sites)


def test_only_plain_layers_use_factors(everywhere):
    _, model, _ = pair("convolutions", embeddings="channel")
    paths = {planned.site.path for planned in factorable(model)}
    assert {"dilated", "row", "column", "reflect"} <= paths
    assert not {"depthwise", "grouped"} & paths  # by their groups
    for name in ("attention", "crnn"):
        _, model, _ = pair(name)
        assert {planned.site.kind for planned in factorable(model)} <= {"conv2d", "linear"}
        assert {"attention", "lstm"} & {p.site.kind for p in hypernet_of(model).plan.sites}


def test_a_plan_that_calls_a_layer_plain_is_not_believed(everywhere):
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    def model(layer):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 32, 3), layer(32, 32, 3))

    plan = make_plan(model(nn.Conv2d), compression=2, factorized=True, seed=0)
    hyper = hyperize(model(Scaled), plan)
    x = torch.randn(2, 3, 8, 8)
    got = hyper(x)
    hypernet_of(hyper).factorized = False
    assert error(got, hyper(x)) < SINGLE


def test_large_layers_of_a_network_use_factors_and_small_ones_do_not():
    plan = make_plan(timm.create_model("resnet50"), factorized=True)
    used = [planned for planned in plan.sites if plan.factorized_macs(planned)]
    assert sum(p.site.dense_params for p in used) > 0.8 * plan.dense_params
    assert {p.site.path for p in used} > {"layer4.0.conv1", "layer4.2.conv2", "layer4.2.conv3"}
    assert not any(p.site.path.startswith("layer1") for p in used)


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("name", ["resnet18", "attention", "used twice"])
def test_multiply_adds_are_those_that_torch_counts(name, generator, everywhere):
    _, model, _ = pair(name, **GENERATORS[generator])
    hypernet = hypernet_of(model)
    plan = hypernet.plan
    layers = generated_layers(model)
    counted = 0
    for planned in factorable(model):
        layer = layers[planned.site.path]
        if not all(side % 2 for side in planned.site.shape[2:]):
            continue  # the output cannot have as many positions as the input
        counted += 1
        factors = hypernet(layer.weight_embedding, layer.weight_constants, planned.grid, True)
        if isinstance(layer, nn.Linear):
            x = torch.randn(1, layer.in_features, dtype=torch.double)
        else:  # one position of the output, and for the products before a kernel as many
            layer.stride = (1, 1)
            layer.padding = tuple(side // 2 for side in layer.kernel_size)
            x = torch.randn(1, layer.in_channels, 9, 9, dtype=torch.double)
        with FlopCounterMode(display=False) as counter:
            y = multiply(layer, x, factors, planned.grid.axis)
        positions = y[0, 0].numel() if y.ndim > 2 else 1
        assert counter.get_total_flops() == 2 * positions * plan.factorized_macs(planned)
    assert counted or (plan.family_name == "separable" and not factorable(model))


# --------------------------------------------------------------------------------- the planner
@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224"]
)
def test_tiles_end_with_rows_where_factors_are_asked_for(name):
    with torch.device("meta"):
        model = timm.create_model(name)

    def share(plan):
        used = [p.site.dense_params for p in plan.sites if plan.factorized_macs(p)]
        return sum(used) / plan.dense_params

    options = {"targets": ("conv2d", "linear"), "compression": 10}
    factorized = make_plan(model, factorized=True, **options)
    assert factorized.compression >= 10
    assert share(factorized) > 0.7 > 0.4 > share(make_plan(model, **options))


def test_tiles_that_are_given_stay():
    model = timm.create_model("resnet18")
    given = {"tile": {"3x3": (1, 100), "1": (1, 250)}, "embedding_dim": 8}
    plan = make_plan(model, factorized=True, **given)
    assert {head.kernel: head.trail for head in plan.heads} == {"3x3": 100, "1": 250}
    assert not any(map(plan.factorized_macs, plan.sites))  # rows end within tiles


def test_a_plan_says_if_no_layer_gains():
    small = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    for factorized, notes in ((False, 0), (True, 1)):
        plan = make_plan(small, compression=2, factorized=factorized)
        assert sum("factorized changes nothing" in note for note in plan.notes) == notes
    plan = make_plan(timm.create_model("resnet18"), factorized=True)
    assert not plan.notes
    assert "factors 9 weights are not generated" in str(plan)


def test_older_plans_have_no_plain_layers():
    plan = make_plan(timm.create_model("resnet18"), factorized=True)
    data = plan.to_dict()
    assert Plan.from_dict(data) == plan
    for site in data["sites"]:
        del site["plain"]
    older = Plan.from_dict(data)
    assert any(map(plan.factorized_macs, plan.sites))
    assert not any(map(older.factorized_macs, older.sites))


# ------------------------------------------------------------------------------- what goes with it
def test_the_switch_works_at_any_time_and_the_dense_model_is_the_same():
    weights, factorized, x = pair("resnet18", torch.float, compression=10)
    assert 8 < len(factorable(factorized)) < len(factorized.hypernet.plan.sites)
    got, wanted = factorized(x), weights(x)
    assert not torch.equal(got, wanted)
    assert error(got, wanted) < SINGLE
    factorized.hypernet.factorized = False
    assert torch.equal(factorized(x), wanted)
    factorized.hypernet.factorized = True
    assert torch.equal(factorized(x), got)
    dense, same = dense_state_dict(weights), dense_state_dict(factorized)
    assert all(torch.equal(dense[name], same[name]) for name in dense)
    assert torch.equal(factorized.layer4[1].conv1.weight, weights.layer4[1].conv1.weight)


def test_copies_pickles_and_files_keep_the_choice(tmp_path, everywhere):
    _, model, x = pair("resnet", torch.float)
    wanted = model(x)
    save(model, tmp_path / "f.safetensors")
    torch.manual_seed(0)
    again = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        load(MODELS["resnet"][0](), tmp_path / "f.safetensors").eval(),
    ]
    for other in again:
        assert other.hypernet.factorized
        assert factorable(other) == factorable(model) != []
        assert torch.equal(other(x), wanted)


@pytest.mark.parametrize("generator", ["tiles", "tiles, turned", "channels"])
def test_it_works_inside_torch_compile(generator, everywhere):
    _, model, x = pair("convolutions", **GENERATORS[generator])
    wanted = outputs_and_gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(compiled._orig_mod, x), wanted)
    compiled.zero_grad()
    y = compiled(x)
    target_loss(y).backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close({"output": y.detach()} | got, wanted)


@pytest.mark.parametrize("generator", ["tiles", "channels"])
def test_it_can_be_exported_with_a_free_batch(generator, tmp_path, everywhere):
    _, model, x = pair("resnet", torch.float, **GENERATORS[generator])
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (x,), dynamic_shapes=[{0: batch}])
    more = torch.cat([x, x, x])
    assert error(program.module()(more), model(more)) < SINGLE
    written = export_onnx(model, tmp_path / "m.onnx", x, dense=False, dynamic=[{0: "batch"}])
    assert written.max_error < SINGLE
    dense = export_onnx(model, tmp_path / "d.onnx", x, dynamic=[{0: "batch"}])
    assert written.bytes < dense.bytes


@pytest.mark.parametrize("hoist", [False, True])
def test_the_rewritten_graph_has_the_weights(hoist, everywhere):
    weights, model, x = pair("resnet")
    assert torch.equal(as_graph(model, hoist=hoist)(x), weights(x))


def test_checkpointing_and_double_backward(everywhere):
    weights, model, x = pair("convolutions")
    wanted = outputs_and_gradients(weights, x)
    model.zero_grad()
    y = checkpoint(model, x, use_reentrant=False)
    target_loss(y).backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close({"output": y.detach()} | got, wanted)
    norms = []
    for each in (weights, model):
        parameters = list(each.parameters())
        first = torch.autograd.grad(each(x).square().sum(), parameters, create_graph=True)
        norm = sum(gradient.square().sum() for gradient in first)
        second = torch.autograd.grad(norm, parameters, allow_unused=True)
        norms.append({str(at): g for at, g in enumerate(second) if g is not None and g.any()})
    assert_close(*norms)


def test_nothing_is_recomputed_where_no_weight_is_kept(everywhere, products):
    _, model, x = pair("resnet")
    kept = outputs_and_gradients(model, x)
    model.hypernet.recompute = True
    weights, factors = products
    weights.clear()
    factors.clear()
    again = outputs_and_gradients(model, x)
    assert len(factors) == len(factorable(model)) > 0
    assert len(weights) == 2 * (len(model.hypernet.plan.sites) - len(factors))
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_transforms_of_torch_func(everywhere):
    weights, model, x = pair("convolutions")
    state = dict(model.named_parameters())
    each = vmap(lambda image: functional_call(model, state, (image[None],))[0])(x)
    assert error(each, weights(x)) < EXACT


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, everywhere):
    weights, model, x = pair("resnet")
    with mode():
        assert error(model(x), weights(x)) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_half_precision(dtype, everywhere):
    """Whole and under autocast: as near to float32 as with weights, or twice as far."""
    weights, model, x = pair("resnet", torch.float)
    wanted = weights(x)
    errors = []
    for each in (weights, model):
        with torch.autocast("cpu", dtype):
            y = each(x)
        whole = copy.deepcopy(each).to(dtype)(x.to(dtype))
        assert whole.dtype == dtype
        errors.append((error(y, wanted), error(whole.float(), wanted)))
    (auto, whole), (auto_factors, whole_factors) = errors
    assert 0 < auto_factors < 2 * auto
    assert 0 < whole_factors < 2 * whole


def test_the_penalty_is_exact_under_autocast(everywhere):
    weights, model, x = pair("resnet", torch.float)
    values = []
    for each in (weights, model):
        with torch.autocast("cpu", torch.bfloat16), generated_l2(each) as l2:
            each(x)
            values.append(l2())
    assert values[1].dtype == torch.float32
    # Roundings to bfloat16 nearly cancel in the sum: 7e-6 was measured
    assert error(values[1], values[0]) < 0.1 * SINGLE


def test_the_report_says_what_is_not_generated():
    model = timm.create_model("resnet18")
    plan = make_plan(model, factorized=True)
    hyper = hyperize(model, plan)
    of_plan, of_model = report(plan), report(hyper)
    used = [p for p in plan.sites if plan.factorized_macs(p)]
    assert 8 < len(used) < len(plan.sites)
    for each in (of_plan, of_model):
        assert each.factorized_params == sum(p.site.dense_params for p in used)
        assert each.factorized_macs == sum(map(plan.factorized_macs, used))
        rest = [p for p in plan.sites if p not in used]
        assert each.generator_macs == sum(map(plan.macs_of, rest))
        assert f"factorized: {each.factorized_params:,} weights" in str(each)
        assert each.factorized_macs < 0.5 * each.factorized_params
    hyper.hypernet.factorized = False
    assert report(hyper).factorized_params == 0
    assert "factorized" not in str(report(hyper))
    assert report(hyper).generator_macs == plan.generator_macs


def test_it_is_true_or_false():
    with pytest.raises(ConfigError, match="factorized"):
        HyperConfig(factorized="yes")


@pytest.mark.parametrize(
    ("weights", "layer", "shape", "pays"),
    [
        (2**24, nn.Linear(4096, 4096), (8, 4096), True),
        (2**24, nn.Linear(4096, 4096), (2**18, 4096), False),  # more between than in the weight
        (2**20, nn.Linear(1024, 1024), (8, 1024), False),  # launches cost more
        (2**22, nn.Conv2d(1024, 4096, 1), (1, 1024, 7, 7), True),
        (2**22, nn.Conv2d(1024, 4096, 1), (64, 1024, 112, 112), False),
        (2**22, nn.Conv2d(1024, 4096, 1, stride=16), (4, 1024, 112, 112), True),
    ],
)
def test_on_an_accelerator_factors_are_for_large_weights_and_few_positions(
    weights, layer, shape, pays
):
    factoring = Factoring(weights, between=100)
    assert factoring.pays(layer, torch.empty(shape, device="meta")) is pays
    assert factoring.pays(layer, torch.empty(1, *shape[1:]))  # on a CPU in any case


def test_a_layer_too_small_for_factors_on_an_accelerator_makes_its_weight():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(512, 512))
        hyper = hyperize(model, targets="linear", compression=20, factorized=True)
        assert hyper[0].factoring is not None
        assert hyper(torch.empty(2, 512)).shape == (2, 512)
    assert not hyper[0].may_multiply
