"""A part of a hyperized model is whole: what users do with parts, over every part of many models.

A part is any module that holds a generated layer. Each test runs over all parts of all models here,
unless it is about how several generators in one model get along.
"""

import copy
import functools
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import safetensors.torch
import timm
import torch
from models import (
    CRNN,
    Convolutions,
    OverChildren,
    Stage,
    Tied,
    UsedTwice,
    count,
    randomise,
    same,
    signature,
    tensors,
)
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations, prune

from hyperize import (
    ConfigError,
    ModelError,
    WeightError,
    as_graph,
    dense_state_dict,
    export_onnx,
    fit_,
    from_pretrained,
    generated_l2,
    load,
    make_plan,
    param_groups,
    report,
    save,
    save_pretrained,
    to_dense,
)
from hyperize import hyperize as rewrite
from hyperize.hypernet import HyperNet
from hyperize.parts import generated_layers

ROUNDING = 1e-5
"""Relative, of sums over a few thousand numbers in float32, added in another order."""
HALF = 0.02
"""Relative, of weights whose factors were rounded to float16, of 11 bits, before a product."""


def _sequential():
    inner = nn.Sequential(nn.Conv2d(32, 48, 3), nn.BatchNorm2d(48))
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), inner, nn.Conv2d(48, 32, 1))


TWO = {"targets": ("conv2d", "linear")}

# name -> (model, shape of its input, options of hyperize)
MODELS = {
    "convolutions": (Convolutions, (2, 3, 24, 24), {}),
    "channels": (Convolutions, (2, 3, 24, 24), {"embeddings": "channel", "factorized": True}),
    "separable": (Convolutions, (2, 3, 24, 24), {"embeddings": "separable"}),
    "crnn": (CRNN, (2, 1, 8, 16), {}),
    "stage": (Stage, (4, 3, 8, 8), TWO),
    "tied": (Tied, (2, 3, 8, 8), {}),
    "used-twice": (UsedTwice, (2, 3, 8, 8), {}),
    "over-children": (OverChildren, (2, 3, 8, 8), {}),
    "sequential": (_sequential, (2, 3, 8, 8), {}),
    "an-lstm-alone": (lambda: nn.LSTM(32, 32, 2), (5, 2, 32), {}),
    "a-conv-alone": (lambda: nn.Conv2d(48, 64, 3), (2, 48, 8, 8), {}),
    "attention": (
        lambda: nn.TransformerEncoderLayer(64, 4, 96, batch_first=True),
        (2, 5, 64),
        {"targets": ("linear", "attention")},
    ),
    "resnet": (lambda: timm.create_model("test_resnet"), (2, 3, 64, 64), TWO),
    "convnext": (lambda: timm.create_model("test_convnext"), (2, 3, 64, 64), TWO),
    "vit": (lambda: timm.create_model("test_vit", img_size=64), (2, 3, 64, 64), TWO),
}


class Case:
    """A dense model in evaluation mode, its hyperized form, an input."""

    def __init__(self, name):
        self.make, shape, self.options = MODELS[name]
        torch.manual_seed(0)
        self.dense = randomise(self.make()).eval()
        self.hyper = rewrite(self.dense, seed=0, **self.options)
        self.x = torch.randn(shape)

    def other(self):
        """Of the same plan, with other weights."""
        return rewrite(self.dense, seed=1, **self.options)


@functools.cache
def case_of(name):
    return Case(name)


@pytest.fixture(params=MODELS)
def case(request):
    return case_of(request.param)


def parts(hyper):
    """Every module that holds a generated layer, by path."""
    return {path: m for path, m in hyper.named_modules() if generated_layers(m)}


def some(hyper):
    """At most six of the parts, of all sizes, for what copies a model for each."""
    found = list(parts(hyper))
    chosen = found[:: max(1, len(found) // 5)]
    return {path: hyper.get_submodule(path) for path in (*chosen, found[-1])}


def generators(module):
    return [m for m in module.modules() if isinstance(m, HyperNet)]


def weights(module):
    """The generated weights by name."""
    return {
        f"{path}.{name}": layer.generate(name).detach()
        for path, layer in generated_layers(module).items()
        for name in layer.generated
    }


def equal(a, b):
    """Whether two modules generate the same weights, bit for bit."""
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loss_of(output):
    return sum(t.float().square().mean() for t in tensors(output))


# --------------------------------------------------------------------- parameters and modules


def test_a_part_reaches_its_generator_once(case):
    for path, part in parts(case.hyper).items():
        (generator,) = generators(part)
        shared = {id(p) for p in generator.parameters()}
        for once in (True, False):
            named = list(part.named_parameters(remove_duplicate=once))
            found = [id(p) for _, p in named if id(p) in shared]
            assert sorted(found) == sorted(shared), path
            assert len({name for name, _ in named}) == len(named), path
        numbers = [id(p) for p in part.parameters()]
        assert len(set(numbers)) == len(numbers), path


def test_a_step_of_the_rest_leaves_a_frozen_part_as_it_is(case):
    for path in some(case.hyper):
        hyper = copy.deepcopy(case.hyper)
        part = hyper.get_submodule(path)
        part.requires_grad_(False)
        before = weights(part)
        free = [p for p in hyper.parameters() if p.requires_grad]
        if not free:
            continue
        loss_of(hyper(case.x)).backward()
        torch.optim.SGD(free, lr=1.0, weight_decay=0.1).step()
        after = weights(part)
        assert all(torch.equal(before[name], after[name]) for name in before), path
        assert any(p.grad is not None and p.grad.any() for p in free), path


def test_gradients_of_a_part_are_cleared_and_clipped_with_it(case):
    hyper = copy.deepcopy(case.hyper)
    for path, part in some(hyper).items():
        (generator,) = generators(part)
        loss_of(hyper(case.x)).backward()
        norm = nn.utils.clip_grad_norm_(part.parameters(), 1e-3)
        total = nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None])
        assert total <= 1e-3 * (1 + ROUNDING) or norm <= 1e-3, path
        assert all(p.grad is not None for p in generator.parameters()), path
        part.zero_grad()
        assert all(p.grad is None for p in generator.parameters()), path
        hyper.zero_grad()


def test_every_parameter_gets_a_gradient(case):
    hyper = copy.deepcopy(case.hyper).train()
    loss_of(hyper(case.x)).backward()
    assert [name for name, p in hyper.named_parameters() if p.grad is None] == []


def test_groups_by_part_that_share_a_generator_are_refused_aloud():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3)

    hyper = rewrite(Net(), compression=4)
    groups = [{"params": part.parameters()} for part in (hyper.body, hyper.head)]
    with pytest.raises(ValueError, match="more than one parameter group"):
        torch.optim.SGD(groups, lr=0.1)


# --------------------------------------------------------------------------------- state dicts


def test_a_state_dict_of_a_part_fits_the_same_part_elsewhere(case):
    for path, part in some(case.hyper).items():
        state = part.state_dict()
        for assign in (False, True):
            other = case.other()
            target = other.get_submodule(path)
            assert not equal(target, part)
            target.load_state_dict(state, assign=assign)
            assert equal(target, part), path
            assert len(generators(other)) == 1
        body = target.state_dict()
        assert body.keys() == state.keys()


def test_a_state_dict_is_assigned_to_a_part_on_meta(case):
    for path, part in some(case.hyper).items():
        target = copy.deepcopy(part).to("meta")
        target.load_state_dict(part.state_dict(), assign=True)
        assert equal(target, part), path


def test_a_state_dict_holds_every_tensor_once(case):
    for path, part in parts(case.hyper).items():
        state = part.state_dict()
        (generator,) = generators(part)
        stored = [t.data_ptr() for t in state.values()]
        assert all(stored.count(p.data_ptr()) == 1 for p in generator.parameters()), path
        if path == "" and not isinstance(part, (UsedTwice, Tied)):  # which share in any case
            assert safetensors.torch.load(safetensors.torch.save(state)).keys() == state.keys()


def test_what_is_missing_of_a_generator_is_reported_once(case):
    for path, part in some(case.hyper).items():
        state = part.state_dict()
        lost = next(name for name in state if ".heads." in f".{name}")
        rest = {name: t for name, t in state.items() if name != lost}
        target = copy.deepcopy(part)
        with pytest.raises(RuntimeError) as error:
            target.load_state_dict(rest)
        assert str(error.value).count(lost) == 1, path
        result = target.load_state_dict(rest, strict=False)
        assert result.missing_keys == [lost], path
        assert result.unexpected_keys == [], path


def test_two_generators_in_the_place_of_one_are_an_error():
    hyper, other = (rewrite(Convolutions(), seed=seed) for seed in (0, 1))
    own = hyper.get_submodule("grouped").state_dict(prefix="grouped.")
    hyper.load_state_dict(hyper.state_dict() | own)  # the same once more
    state = hyper.state_dict() | other.get_submodule("grouped").state_dict(prefix="grouped.")
    with pytest.raises(RuntimeError, match="is one hypernetwork with other parts"):
        hyper.load_state_dict(state)


def test_state_dicts_of_the_children_together_are_the_models():
    hyper, other = (rewrite(Convolutions(), seed=seed) for seed in (0, 1))
    state = {}
    for name, child in reversed(list(hyper.named_children())):
        state.update(child.state_dict(prefix=f"{name}."))
    other.load_state_dict(state)
    assert equal(hyper, other)


def test_threads_read_and_copy_at_once():
    hyper = rewrite(Convolutions(), seed=0)
    keys = list(hyper.state_dict())

    def read(_):
        states = (hyper.state_dict() for _ in range(50))
        return all(list(state) == keys for state in states) and equal(copy.deepcopy(hyper), hyper)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_threads_load_at_once():
    hyper = rewrite(Convolutions(), seed=0)
    state = copy.deepcopy(hyper.state_dict())

    def write(_):
        for _ in range(20):
            hyper.load_state_dict(state)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(8)))


class Ordered(nn.Module):
    """Its layers run in the opposite of their order; with a check that torch.fx cannot trace."""

    def __init__(self, check):
        super().__init__()
        self.check = check
        self.head = nn.Conv2d(32, 32, 3, padding=1)
        self.stem = nn.Conv2d(32, 32, 3, padding=1)
        nn.init.normal_(self.head.weight, std=1.0)

    def forward(self, x):
        if self.check:
            assert x.shape[1] == 32
        return self.head(torch.relu(self.stem(x)))


def test_a_state_dict_knows_no_order():
    registered = rewrite(Ordered(check=True), compression=4, seed=0)
    traced = rewrite(Ordered(check=False), compression=4, seed=1)
    first = [plan.sites[0].site.path for plan in (m.hypernet.plan for m in (registered, traced))]
    assert first == ["head", "stem"]  # otherwise this shows nothing
    traced.load_state_dict(registered.state_dict())
    assert equal(registered, traced)


# -------------------------------------------------------------------------------------- copies


def test_copies_are_complete_and_their_own(case):
    for path, part in some(case.hyper).items():
        file = io.BytesIO()
        torch.save(part, file)
        file.seek(0)
        own = {id(p) for p in part.parameters()}
        for copied in (
            copy.deepcopy(part),
            pickle.loads(pickle.dumps(part)),
            torch.load(file, weights_only=False),
        ):
            assert equal(copied, part), path
            assert not own & {id(p) for p in copied.parameters()}, path
            assert signature(copied.state_dict()) == signature(part.state_dict()), path
            assert len(generators(copied)) == 1, path


def test_parts_are_converted_whole(case):
    for path, part in some(case.hyper).items():
        for dtype in (torch.float64, torch.float16):
            cast = copy.deepcopy(part).to(dtype)
            assert all(t.dtype == dtype for t in cast.parameters()), path
            for name, weight in weights(cast).items():
                assert weight.dtype == dtype, name
                exact = weights(part)[name]
                assert (weight - exact).norm() <= HALF * exact.norm(), name
        empty = copy.deepcopy(part).to("meta")
        assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers())), path
        empty.to_empty(device="cpu")
        empty.load_state_dict(part.state_dict())
        assert equal(empty, part), path


def test_a_copied_block_owns_what_it_needs(case, tmp_path):
    for path in list(some(case.hyper))[-3:]:
        if not path or (isinstance(case.dense, UsedTwice) and path != "stem"):
            continue
        hyper = copy.deepcopy(case.hyper)
        parent, _, name = path.rpartition(".")
        block = copy.deepcopy(hyper.get_submodule(path))
        hyper.get_submodule(parent)._modules[name] = block
        output = hyper(case.x)
        everything(hyper, case.make, case.x, tmp_path / "model")
        with torch.no_grad():
            for param in generators(block)[0].parameters():
                param.mul_(1.5)
        moved = hyper(case.x)
        assert not same(moved, output), path
        everything(hyper, case.make, case.x, tmp_path / "model")


def alike(a, b, hyper):
    """Equal bit for bit; but for rounding where layers of `hyper` compute with factors."""
    if not any(generator.factorized for generator in generators(hyper)):
        return same(a, b)
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all((x - y).norm() <= 10 * ROUNDING * y.norm() for x, y in pairs)


def everything(hyper, make, x, file):
    """What holds of any model with generated layers, also of several generators."""
    output = hyper(x)
    dense = to_dense(hyper)
    assert alike(dense(x), output, hyper)
    assert not generators(dense)
    assert not any("hypernet" in vars(m) for m in dense.modules())
    fresh = make().eval()
    assert signature(dense.state_dict()) == signature(fresh.state_dict())
    fresh.load_state_dict(dense_state_dict(hyper))
    assert same(fresh(x), dense(x))

    shown = report(hyper)
    assert shown.total_hyper_params == count(hyper)
    assert shown.total_dense_params == count(fresh)
    assert shown.hypernet_params == sum(count(g) for g in generators(hyper))
    assert len(shown.sites) == len(weights(hyper))
    assert str(shown)

    for graph in graphs_of(hyper):
        assert same(graph(x), to_dense(hyper)(x))
        assert graph.state_dict().keys() <= hyper.state_dict().keys()

    save(hyper, file)
    loaded = load(make(), file).eval()
    assert same(loaded(x), output)
    assert equal(loaded, hyper)

    with generated_l2(hyper) as penalty:
        hyper(x)
    exact = sum(w.square().sum() for w in weights(hyper).values())
    assert torch.isclose(penalty(), exact, rtol=ROUNDING * 10)

    grouped = [id(p) for group in param_groups(hyper) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in hyper.parameters())


def graphs_of(hyper):
    """Its graphs; none of a model whose dense twin torch.fx cannot trace."""
    try:
        torch.fx.symbolic_trace(to_dense(hyper))
    except Exception:  # any model code can run here, and raise anything
        return []
    return [as_graph(hyper, hoist=hoist) for hoist in (False, True)]


# ------------------------------------------------------------------------------------ structure


def test_children_are_those_of_the_dense_model(case):
    dense = dict(case.dense.named_modules())
    for path, module in case.hyper.named_modules():
        if path in dense:
            classes = [getattr(m, "dense_class", type(m)) for m in module.children()]
            assert classes == [type(m) for m in dense[path].children()], path
    leaves = [p for p, m in case.hyper.named_modules() if p in dense and not list(m.children())]
    assert leaves == [path for path, m in dense.items() if not list(m.children())]


@pytest.mark.parametrize("name", ["over-children", "sequential", "resnet"])
def test_a_model_is_cut_at_its_children(name):
    case = case_of(name)
    dense = to_dense(case.hyper)
    cut = [nn.Sequential(*list(m.children())[:-1]) for m in (case.hyper, dense)]
    assert same(cut[0](case.x), cut[1](case.x))


def test_no_generator_is_shown(case):
    shown = repr(case.hyper)
    assert "HyperNet" not in shown
    assert "Affine" not in shown
    assert shown.replace("Generated", "") == repr(case.dense)


# --------------------------------------------------------------------------- several generators


def _pair():
    return nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)
    )


class Gan(nn.Module):
    def __init__(self, part=_pair):
        super().__init__()
        self.g, self.d = part(), part()

    def forward(self, x):
        return self.d(self.g(x))


class Detector(nn.Module):
    """A backbone, a neck in a dictionary, and layers of its own before and after."""

    def __init__(self, part=_pair):
        super().__init__()
        self.stem = nn.Conv2d(32, 32, 3, padding=1)
        self.net = part()
        self.mid = nn.ModuleDict({"a": part()})
        self.out = nn.Conv2d(32, 4, 1)

    def forward(self, x):
        return self.out(self.mid["a"](self.net(self.stem(x))))


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.LSTM(32, 32), nn.LSTM(32, 32)

    def forward(self, x):
        return self.dec(self.enc(x)[0])[0]


def gan():
    seeds = iter((1, 2))
    return Gan(lambda: rewrite(_pair(), compression=4, seed=next(seeds)))


def backbone():
    hyper = Detector()
    hyper.net = rewrite(hyper.net, compression=4, seed=1)
    return hyper


def backbone_and_neck():
    hyper = backbone()
    hyper.mid["a"] = rewrite(hyper.mid["a"], compression=3, seed=2)
    return hyper


def part_after_part():
    hyper = rewrite(Detector(), include="net", compression=4, seed=1)
    hyper.mid = rewrite(hyper.mid, compression=3, seed=2)
    return hyper


def anew():
    hyper = rewrite(Detector(), compression=4, seed=1)
    hyper.net = rewrite(to_dense(hyper.net), compression=3, seed=2)
    return hyper


def dense_part():
    return to_dense(rewrite(Detector(), compression=4, seed=1), include="net")


def dense_part_anew():
    hyper = dense_part()
    hyper.net = rewrite(hyper.net, compression=3, seed=2)
    return hyper


def replaced():
    hyper = rewrite(Detector(), compression=4, seed=1)
    hyper.net[0] = nn.Conv2d(32, 32, 3, padding=1)
    return hyper


def copied():
    hyper = rewrite(Detector(), compression=4, seed=1)
    hyper.mid["a"] = copy.deepcopy(hyper.net)
    return hyper


def a_layer():
    hyper = Detector()
    hyper.stem = rewrite(hyper.stem, compression=2, seed=3)
    return hyper


def deep():
    hyper = rewrite(Detector(Gan), include="net.g", compression=4, seed=3)
    hyper.net.d = rewrite(hyper.net.d, compression=3, seed=4)
    hyper.mid["a"].g = rewrite(hyper.mid["a"].g, compression=5, seed=5)
    return hyper


def recurrent():
    hyper = Translator()
    hyper.enc = rewrite(hyper.enc, compression=3, seed=1)
    hyper.dec = rewrite(hyper.dec, compression=2, seed=2)
    return hyper


# how it is made -> (its dense architecture, number of generators)
SEVERAL = {
    gan: (Gan, 2),
    backbone: (Detector, 1),
    backbone_and_neck: (Detector, 2),
    part_after_part: (Detector, 2),
    anew: (Detector, 2),
    dense_part: (Detector, 1),
    dense_part_anew: (Detector, 2),
    replaced: (Detector, 1),
    copied: (Detector, 2),
    a_layer: (Detector, 1),
    deep: (lambda: Detector(Gan), 3),
    recurrent: (Translator, 2),
}

several = pytest.mark.parametrize("make", SEVERAL, ids=lambda make: make.__name__)


def _input(make):
    return torch.randn(4, 2, 32) if make is recurrent else torch.randn(1, 32, 8, 8)


@several
def test_any_number_of_generators_at_any_depth(make, tmp_path):
    hyper, (dense, number) = make().eval(), SEVERAL[make]
    assert len(generators(hyper)) == number
    everything(hyper, dense, _input(make), tmp_path / "model")


@several
def test_parts_of_models_with_several_generators(make, tmp_path):
    hyper, (dense, _) = make().eval(), SEVERAL[make]
    for path, part in parts(hyper).items():
        if path:
            save(part, tmp_path / "part")
            loaded = load(dense().get_submodule(path), tmp_path / "part")
            assert equal(loaded, part), path
            shown = report(part)
            assert shown.total_hyper_params == count(part), path
            assert len(shown.sites) == len(weights(part)), path


@several
def test_folders_with_several_generators(make, tmp_path):
    hyper, x = make().eval(), _input(make)
    save_pretrained(hyper, tmp_path)
    assert same(from_pretrained(tmp_path, SEVERAL[make][0]()).eval()(x), hyper(x))


@several
def test_fits_with_several_generators(make):
    hyper, teacher = make(), SEVERAL[make][0]()
    untouched = copy.deepcopy(hyper)
    result = fit_(hyper, teacher)
    assert len(result.sites) == len(weights(hyper))
    state = teacher.state_dict()

    def off(model):
        return sum((w - state[name]).square().sum() for name, w in weights(model).items())

    assert off(hyper) < off(untouched)


@several
def test_a_report_names_no_weight_both_generated_and_skipped(make):
    shown = report(make())
    rows = {f"{row.path}.{row.param}" for row in shown.sites} | {row.path for row in shown.sites}
    assert not rows & {skip.path for skip in shown.skipped}


def test_onnx_of_two_generators(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    hyper = gan().eval()
    export_onnx(hyper, tmp_path / "model.onnx", torch.randn(1, 32, 8, 8), dense=True)
    assert (tmp_path / "model.onnx").stat().st_size > 2 * 2 * 32 * 32 * 9 * 4


def test_a_generated_part_is_not_hyperized_again():
    hyper = backbone()
    with pytest.raises(ModelError, match="hyperized already"):
        rewrite(hyper, compression=4)


# -------------------------------------------------------------------------- partly dense models


def _choices(hyper):
    layers = list(generated_layers(hyper))
    yield {"include": layers[0]}
    yield {"exclude": layers[0]}
    yield {"include": layers[-1]}
    yield {"exclude": [layers[-1]]}


@pytest.mark.parametrize("name", [n for n in MODELS if "alone" not in n])
def test_a_part_becomes_dense(name, tmp_path):
    case = case_of(name)
    output = case.hyper(case.x)
    for choice in _choices(case.hyper):
        before = copy.deepcopy(case.hyper)
        partly = to_dense(before, **choice)
        assert equal(before, case.hyper)
        assert alike(partly(case.x), output, partly), choice
        left = generated_layers(partly)
        assert 0 < len(left) < len(generated_layers(before)), choice
        (generator,) = generators(partly)
        used = {grid.kernel for layer in left.values() for grid in layer.grids.values()}
        assert set(generator.heads) == used, choice
        assert same(to_dense(before, inplace=True, **choice)(case.x), partly(case.x))
        assert to_dense(before, include=list(left)) is not before
        loss_of(partly(case.x)).backward()
        assert [n for n, p in partly.named_parameters() if p.grad is None] == [], choice
        partly.zero_grad()
        kept_by_files(partly, case, tmp_path / "model")


def kept_by_files(partly, case, file):
    save(partly, file)
    loaded = load(case.make(), file).eval()
    assert same(loaded(case.x), partly(case.x))
    assert str(report(loaded)) == str(report(partly))
    assert report(partly).total_hyper_params == count(partly)
    assert report(partly).total_dense_params == count(case.dense)
    case.make().load_state_dict(dense_state_dict(partly))


def test_the_dense_part_is_frozen_pruned_and_normalised():
    hyper = rewrite(Stage(), seed=0, **TWO).eval()
    partly = to_dense(hyper, include=["conv1", "head"])
    assert type(partly.conv1) is nn.Conv2d
    prune.l1_unstructured(partly.conv1, "weight", 0.5)
    assert (partly.conv1.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    parametrizations.weight_norm(partly.head)
    x = torch.randn(2, 3, 8, 8)
    partly(x).sum().backward()
    partly.head.requires_grad_(False)
    frozen, moving = partly.head.weight.clone(), partly.conv2.weight.clone()
    free = [p for p in partly.parameters() if p.requires_grad]
    torch.optim.SGD(free, lr=0.1).step()
    assert torch.equal(partly.head.weight, frozen)
    assert not torch.equal(partly.conv2.weight, moving)


@pytest.mark.parametrize(
    "bad",
    [{"include": "nothing"}, {"exclude": "nothing.*"}, {"include": 3}, {"include": ["stem", 2]}],
    ids=str,
)
def test_patterns_that_match_nothing(bad):
    hyper = rewrite(Stage(), seed=0)
    before = copy.deepcopy(hyper)
    with pytest.raises(ConfigError):
        to_dense(hyper, inplace=True, **bad)
    assert equal(hyper, before)


# ------------------------------------------------------------------------- compilers and tracers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.norm(self.conv1(x))))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


def _compilations(model, x):
    """How often torch.compile compiles the blocks of a model, and the output."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for block in model:
        block.compile(backend=backend)
    output = model(x)
    output.sum().backward()
    torch._dynamo.reset()
    return len(graphs), output


@pytest.mark.parametrize(
    ("block", "shape", "options"),
    [
        (Block, (1, 32, 8, 8), {}),
        (Block, (1, 32, 8, 8), {"factorized": True}),
        (Mlp, (5, 64), {"targets": ("linear",)}),
        (Mlp, (5, 64), {"targets": ("linear",), "factorized": True, "embeddings": "channel"}),
        (Mlp, (5, 64), {"targets": ("linear",), "recompute": True}),
    ],
)
def test_equal_blocks_compile_once(block, shape, options):
    dense = nn.Sequential(*[block() for _ in range(12)]).eval()
    hyper = rewrite(dense, seed=0, **options)
    x = torch.randn(shape)
    expected = hyper(x)
    number, output = _compilations(hyper, x)
    assert number == _compilations(dense, x)[0]
    assert torch.allclose(output, expected, rtol=ROUNDING, atol=ROUNDING)


def test_a_generated_lstm_is_exported_and_compiled_as_a_dense_one():
    hyper, x = rewrite(nn.LSTM(32, 32), seed=0), torch.randn(5, 2, 32)
    exported = torch.export.export(hyper, (x,), strict=True).module()
    assert same(exported(x), hyper(x))
    with torch._dynamo.config.patch(allow_rnn=True):
        torch._dynamo.reset()
        compiled = torch.compile(hyper, backend="eager", fullgraph=True)
        assert same(compiled(x), hyper(x))
        torch._dynamo.reset()


def test_exports(case):
    if isinstance(case.dense, UsedTwice):
        pytest.skip("torch.func leaves wrappers in a layer of two names, also in a dense one")
    for strict in (False,) if "timm" in type(case.dense).__module__ else (False, True):
        exported = torch.export.export(case.hyper, (case.x,), strict=strict).module()
        assert same(exported(case.x), case.hyper(case.x)), strict


def test_functional_calls(case):
    if isinstance(case.dense, UsedTwice):
        pytest.skip("torch.func leaves wrappers in a layer of two names, also in a dense one")
    hyper = copy.deepcopy(case.hyper)
    params = {name: p.detach() + 0.01 for name, p in hyper.named_parameters()}
    output = torch.func.functional_call(hyper, params, (case.x,))
    assert equal(hyper, case.hyper)
    with torch.no_grad():
        for name, param in hyper.named_parameters():
            param.copy_(params[name])
    for a, b in zip(tensors(output), tensors(hyper(case.x)), strict=True):
        assert torch.allclose(a, b, rtol=ROUNDING, atol=ROUNDING * float(b.abs().max()))


@pytest.mark.parametrize("name", ["convolutions", "over-children", "resnet", "vit"])
def test_vmap_over_functional_calls(name):
    case = case_of(name)
    call = torch.func.functional_call
    params = {name: p.detach() for name, p in case.hyper.named_parameters()}
    stacked = {name: torch.stack([p, p + 0.01]) for name, p in params.items()}
    output = torch.func.vmap(lambda p: call(case.hyper, p, (case.x,)))(stacked)
    for at in range(2):
        exact = call(case.hyper, {name: p[at] for name, p in stacked.items()}, (case.x,))
        assert (output[at] - exact).norm() <= 10 * ROUNDING * exact.norm()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_traces_of_torchscript(case):
    if isinstance(case.dense, nn.TransformerEncoderLayer):
        pytest.skip("its fast path cannot be traced, dense or not")
    for grad in (True, False):
        hyper = copy.deepcopy(case.hyper)
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(hyper, case.x, check_trace=False)
        other = torch.randn_like(case.x)
        assert same(traced(other), hyper(other))
        loss_of(traced(case.x)).backward()
        got = {name for name, p in traced.named_parameters() if p.grad is not None}
        assert {name for name, _ in hyper.named_parameters()} <= got


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scripting_is_refused(case):
    with pytest.raises(ModelError, match=r"torch\.jit\.script cannot compile"):
        torch.jit.script(case.hyper)


@pytest.mark.parametrize("name", ["convolutions", "crnn", "stage", "sequential", "over-children"])
def test_symbolic_traces(name):
    case = case_of(name)
    graph = torch.fx.symbolic_trace(copy.deepcopy(case.hyper))
    assert same(graph(case.x), case.hyper(case.x))
    assert graph.state_dict().keys() == case.hyper.state_dict().keys()
    loss_of(graph(case.x)).backward()
    assert all(p.grad is not None for p in graph.parameters())


def test_no_weight_becomes_a_constant_of_a_trace():
    hyper = rewrite(nn.Sequential(nn.Conv2d(32, 32, 3), Conv2dSame(32, 32, 3)).eval(), seed=0)
    with pytest.raises(ModelError, match="as_graph"):
        torch.fx.symbolic_trace(hyper)
    x = torch.randn(1, 32, 8, 8)
    assert same(as_graph(hyper)(x), hyper(x))


def test_features_of_a_trace():
    """As torchvision's create_feature_extractor: cut the graph at a node, drop what is after it."""
    case = case_of("sequential")
    hyper = copy.deepcopy(case.hyper)
    graph = torch.fx.symbolic_trace(hyper)
    node = next(n for n in graph.graph.nodes if n.target == "2.0")
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    output.args = (node,)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    assert same(graph(case.x), hyper[2][0](hyper[1](hyper[0](case.x))))


def _replicate(model):
    """What nn.DataParallel does on two devices, of which "meta" stands for the second."""
    module = sys.modules["torch.nn.parallel.replicate"]

    def broadcast(tensors, devices, detach=False):
        return [[tensor.to(device) for tensor in tensors] for device in devices]

    with (
        mock.patch.object(module, "_get_device_index", lambda device, *_: device),
        mock.patch.object(module, "_broadcast_coalesced_reshape", broadcast),
    ):
        return module.replicate(model, ["cpu", "meta"])


def test_replicas_of_data_parallel(case):
    hyper = copy.deepcopy(case.hyper)
    first, second = _replicate(hyper)
    output = first(case.x)
    assert same(output, hyper(case.x))
    assert all(t.is_meta for t in tensors(second(case.x.to("meta"))))
    loss_of(output).backward()
    assert all(p.grad is not None for p in hyper.parameters())


# ----------------------------------------------------------------- all or nothing, plainly said


class Writes(nn.Conv2d):
    def forward(self, input):
        self.weight.data.clamp_(-1, 1)
        return super().forward(input)


class NotRegistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32, 3, 3))


class Planned(nn.Module):
    def __init__(self, change=lambda model: None):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(32, 32, 3) for _ in range(3))
        self.d = nn.LSTM(32, 32)
        change(self)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def _nan(model):
    with torch.no_grad():
        model.c.weight[0] = float("nan")


MISFITS = {
    "tied": lambda m: setattr(m.c, "weight", m.b.weight),
    "replaced": lambda m: setattr(m, "b", nn.Identity()),
    "missing": lambda m: delattr(m, "b"),
    "not-registered": lambda m: setattr(m, "c", NotRegistered()),
    "attribute": lambda m: setattr(m, "hypernet", 1),
    "module": lambda m: setattr(m, "hypernet", nn.Linear(1, 1)),
    "attribute-of-a-layer": lambda m: setattr(m.c, "hypernet", 1),
    "constants-of-a-layer": lambda m: setattr(m.c, "weight_constants", 1),
    "writes": lambda m: setattr(m, "c", Writes(32, 32, 3)),
    "shape": lambda m: setattr(m, "c", nn.Conv2d(32, 16, 3)),
    "not-finite": _nan,
    "frozen": lambda m: m.c.requires_grad_(False),
    "parametrized": lambda m: parametrizations.weight_norm(m.c),
    "generated": lambda m: setattr(m, "c", rewrite(m.c)),
    "on-meta": lambda m: m.c.to("meta"),
    "other-layer": lambda m: setattr(m, "d", nn.Conv2d(1, 1, 1)),
}


def _state(model):
    """Everything of a model that a rewrite changes."""
    fields = [
        (path, type(m), sorted(set(vars(m)) - {"_seen", "_loading"}), list(m._modules))
        for path, m in model.named_modules()
    ]
    entries = [(name, id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()]
    return fields, entries


@pytest.mark.parametrize("change", MISFITS)
@pytest.mark.parametrize("inplace", [True, False])
def test_a_plan_that_does_not_fit_changes_nothing(change, inplace):
    plan = make_plan(Planned(), compression=4)
    model = Planned(MISFITS[change])
    before = _state(model)
    with pytest.raises(ModelError):
        rewrite(model, plan, inplace=inplace)
    assert _state(model) == before


def test_a_plan_that_fits_is_applied():
    plan = make_plan(Planned(), compression=4)
    model = Planned()
    assert rewrite(model, plan, inplace=True) is model
    assert len(generated_layers(model)) == 4


def test_an_attribute_error_while_generating_is_shown():
    hyper = rewrite(Planned(), compression=4)
    del hyper.a.hypernet.family
    for read in (lambda: hyper.a.weight, lambda: hyper(torch.randn(1, 32, 9, 9))):
        with pytest.raises(WeightError, match="family") as error:
            read()
        assert isinstance(error.value.__cause__, AttributeError)


@pytest.mark.parametrize("embeddings", ["tile", "channel"])
def test_factors_in_half_precision_do_not_overflow(embeddings):
    dense = nn.Linear(1024, 1024).eval()
    nn.init.normal_(dense.weight)
    options = {"compression": 20, "targets": ("linear",), "embeddings": embeddings}
    hyper = rewrite(dense, factorized=True, seed=0, **options).half()
    assert hyper.factoring
    x = torch.randn(4, 1024)
    x = (x * 30000 / to_dense(hyper).float()(x).abs().max()).half()
    exact = to_dense(hyper)(x)
    assert exact.isfinite().all()
    assert exact.abs().max() > 20000  # otherwise this shows nothing
    assert hyper(x).isfinite().all()
    assert (hyper(x).float() - exact.float()).norm() <= HALF * exact.float().norm()
