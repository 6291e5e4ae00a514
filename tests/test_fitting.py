"""fit_: as near to trained weights as the form allows, and nothing else touched.

Bounds are computed here on their own: principal components and Tucker decompositions of tiles that
are cut by numpy, layers' outputs by running the layers.
"""

import copy
import math
import random
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from models import (
    CRNN,
    Cells,
    Convolutions,
    Stage,
    Tied,
    Transposed,
    Uncopyable,
    UsedTwice,
    randomise,
    same,
)
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from hyperize import (
    ConfigError,
    HyperizeError,
    ModelError,
    fit_,
    fit_plan,
    hyperize,
    make_plan,
    to_dense,
)
from hyperize.layers import Generated, registered_kinds
from hyperize.parts import find_groups

ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.05}
"""Of an error that is computed a second time, relative. float32 has 24 bits, and differences of
weights and sums over them lose some; in bfloat16 embeddings and generator are rounded, to 8 bits,
after the error was taken."""
OPTIMAL = 1e-3
"""By which an error may exceed the least possible, relative: the decompositions are of float32
sums."""
NEAR = 0.02
"""The same against HOOI for two layers, where neither has to reach the global optimum."""
PLANTED = 2e-3
"""Relative error that counts as none: a sweep that gains less than a thousandth ends the fit."""
THINNED = 0.05
"""Of an output error over some of the positions: 1 / sqrt(their number) and more, as neighbouring
patches share entries."""

ALL = registered_kinds()
TWO_LAYERS = {"tile": (16, 4), "hidden_dim": 16, "embedding_dim": 8}
SMALL = {"tile": (1, 8), "hidden_dim": 0, "embedding_dim": 2, "targets": ALL}
"""A generator for layers of some hundred weights."""

# name -> (model, shape of its input, options of hyperize)
MODELS = {
    "convolutions": (Convolutions, (4, 3, 16, 16), {}),
    "no-hidden-layer": (Convolutions, (4, 3, 16, 16), {"hidden_dim": 0, "targets": ALL}),
    "paper-axis": (Convolutions, (4, 3, 16, 16), {**TWO_LAYERS, "trunk_axis": 1}),
    "channels": (Convolutions, (4, 3, 16, 16), {"embeddings": "channel", "targets": ALL}),
    "channels-recurrent": (CRNN, (2, 1, 8, 16), {"embeddings": "channel", "targets": ALL}),
    "separable, stored": (
        lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3)),
        (4, 3, 16, 16),
        {"embeddings": "separable", "compression": 2},
    ),
    "separable": (Convolutions, (4, 3, 16, 16), {"embeddings": "separable", "targets": ALL}),
    "channels-transposed": (
        lambda: Transposed(dims=1),
        (4, 2, 16),
        {"embeddings": "channel", "trunk_axis": 1, "targets": ALL, "compression": 3},
    ),
    "stage": (Stage, (4, 3, 8, 8), {"targets": ALL}),
    "crnn": (CRNN, (2, 1, 8, 16), {"targets": ALL}),
    "autoencoder-1d": (lambda: Transposed(dims=1), (4, 2, 16), {"targets": ALL, "compression": 4}),
    "autoencoder-2d": (lambda: Transposed(dims=2), (4, 2, 8, 8), {"targets": ALL, **TWO_LAYERS}),
    "autoencoder-3d": (lambda: Transposed(dims=3), (2, 2, 4, 4, 4), {"targets": ALL}),
    "cells": (Cells, (5, 4, 24), {"targets": ALL, "compression": 4}),
    "gru": (lambda: nn.GRU(24, 32), (5, 4, 24), {"targets": ALL, "compression": 4}),
    "rnn": (lambda: nn.RNN(24, 32, 2), (5, 4, 24), {"targets": ALL, "compression": 4}),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(48, 4, 96, batch_first=True),
        (4, 6, 48),
        {"targets": ALL, "compression": 4},
    ),
    "used-twice": (UsedTwice, (2, 3, 8, 8), {}),
    "tied": (Tied, (2, 3, 8, 8), {"compression": 3}),
    "timm": (lambda: timm.create_model("test_resnet"), (4, 3, 32, 32), {"targets": ALL}),
}
over_models = pytest.mark.parametrize("name", MODELS)
with_and_without_data = pytest.mark.parametrize("with_data", [False, True], ids=["", "data"])


def make(name, seed=1, **options):
    """A teacher, a hyperized model of it, and two batches."""
    build, shape, given = MODELS[name]
    torch.manual_seed(0)
    teacher = randomise(build())
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    return teacher, hyperize(teacher, seed=seed, **given | options), batches


def plan_of(hyper):
    return find_groups(hyper)[0].hypernet.plan


def relative(difference, whole):
    return float(difference.double().norm() / whole.double().norm())


def generates(key, generated):
    """Whether a key of a state dict is of what generates the weights of these names."""
    return "hypernet." in key or key.removesuffix("_constants") in generated


class Snapshot:
    """All that can be seen of a model, and of the random numbers to come."""

    def __init__(self, *models):
        self.models = models
        self.before = [self._of(model) for model in models]
        self.values = [{k: t.clone() for k, t in m.state_dict().items()} for m in models]
        self.random = self._random()

    def check(self, *changed):
        """Nothing is different but the values that `changed`, one test per model, lets be."""
        assert [self._of(model) for model in self.models] == self.before
        assert self._random() == self.random
        tests = changed or [lambda name: False] * len(self.models)
        for model, values, may_change in zip(self.models, self.values, tests, strict=True):
            for name, tensor in model.state_dict().items():
                if not may_change(name):
                    old = values[name]
                    assert tensor.is_meta or torch.equal(tensor.nan_to_num(7), old.nan_to_num(7)), (
                        name
                    )

    @staticmethod
    def _of(model):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        modules = list(model.named_modules())
        return (
            [(n, id(t), t.requires_grad, t.dtype, t.shape, t.grad is None) for n, t in tensors],
            [(n, type(m), m.training, getattr(m, "momentum", None)) for n, m in modules],
            [(*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks) for _, m in modules],
        )

    @staticmethod
    def _random():
        return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


# ------------------------------------------------------------------------------ what is changed


@over_models
@with_and_without_data
def test_nothing_changes_but_what_generates_weights_and_statistics_of_norms(name, with_data):
    teacher, hyper, batches = make(name)
    if not with_data:  # flags of all sorts
        next(hyper.children(), hyper).eval()
    next(teacher.children(), teacher).register_forward_hook(lambda *_: None)
    before = Snapshot(hyper, teacher)
    generated = tuple(
        f"{path}.{name}" if path else name
        for path, m in hyper.named_modules(remove_duplicate=False)
        if isinstance(m, Generated)
        for name in m.generated
    )
    assert {planned.site.name for planned in plan_of(hyper).sites} <= {*generated}
    norms = tuple(
        f"{path}.{buffer}"
        for path, module in hyper.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and with_data
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    )
    fit_(hyper, teacher, data=batches if with_data else None, sweeps=2)
    before.check(
        lambda key: generates(key, generated) or key in norms,
        lambda key: False,
    )
    state = hyper.state_dict()
    for key in generated + norms:
        assert not torch.equal(state[key], before.values[0][key]), key


def test_norms_have_the_statistics_of_the_fitted_weights():
    teacher, hyper, batches = make("stage")
    fit_(hyper, teacher, data=batches)
    again = copy.deepcopy(hyper)
    update_bn(batches, again)
    assert torch.allclose(hyper.norm.running_mean, again.norm.running_mean, atol=1e-6)
    assert torch.allclose(hyper.norm.running_var, again.norm.running_var, rtol=1e-5)
    assert not torch.allclose(hyper.norm.running_var, teacher.norm.running_var, rtol=0.1)


@pytest.mark.parametrize("frozen", [True, False])
def test_with_data_too_each_part_keeps_its_training_flag(frozen):
    teacher, hyper, batches = make("stage")
    hyper.train().norm.train(not frozen)
    hyper.drop.eval()
    before = Snapshot(hyper)
    fit_(hyper, teacher, data=batches, sweeps=1)
    before.check(lambda key: True)


@pytest.mark.parametrize("kind", ["random", "buffer"])
def test_a_teacher_with_side_effects_is_run_without_them(kind):
    class Teacher(Stage):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            if kind == "random":
                return super().forward(x + torch.randn_like(x))
            self.calls += 1
            return super().forward(x)

    teacher = randomise(Teacher())
    hyper = hyperize(teacher, seed=1)
    before = Snapshot(teacher)
    fit_(hyper, teacher, data=[torch.randn(2, 3, 8, 8, generator=torch.Generator())], sweeps=1)
    before.check()


def test_what_was_removed_since_is_skipped():
    teacher, hyper, _ = make("timm")
    hyper.reset_classifier(5)
    before = Snapshot(hyper)
    fitted = fit_(hyper, teacher, sweeps=2)
    names = [planned.site.name for planned in plan_of(hyper).sites]
    assert "fc.weight" in names
    generated = [name for name in names if name != "fc.weight"]
    assert [site.name for site in fitted.sites] == generated
    before.check(lambda key: generates(key, generated))


def test_a_kernel_size_may_have_lost_all_its_layers():
    teacher = randomise(Stage())
    options = {"targets": ALL, "include": ("conv1", "head")}
    hyper = hyperize(teacher, seed=1, **SMALL | options)
    assert [head.kernel for head in plan_of(hyper).heads] == ["3x3", "1"]
    hyper.head = nn.Linear(32, 5)
    assert [site.name for site in fit_(hyper, teacher).sites] == ["conv1.weight"]
    assert all(tensor.isfinite().all() for tensor in hyper.state_dict().values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_fits_where_gradients_are_off(context):
    teacher, hyper, _ = make("stage")
    other = copy.deepcopy(hyper)
    fit_(hyper, teacher, sweeps=2)
    with context():
        fit_(other, teacher, sweeps=2)
    assert same(other.state_dict(), hyper.state_dict())


# ------------------------------------------------------------------------------ history and report


@over_models
@with_and_without_data
def test_the_objective_never_grows_and_nothing_depends_on_the_initial_values(name, with_data):
    results = []
    for seed in (1, 2):
        teacher, hyper, batches = make(name, seed)
        assert hyper.state_dict().keys() == make(name, seed)[1].state_dict().keys()
        report = fit_(hyper, teacher, data=batches if with_data else None, sweeps=4)
        history = report.history
        assert all(after <= before for before, after in pairwise(history))
        assert 1 <= len(history) <= 5
        assert history[-1] < history[0] <= 1.1 or history[0] < 1
        results.append((hyper, report))
    (one, first), (two, second) = results
    assert (first.history, first.sites, first.error) == (second.history, second.sites, second.error)
    if not with_data:  # dropout moves the statistics of norms
        assert same(one.state_dict(), two.state_dict())
    for planned in plan_of(one).sites:
        name = planned.site.name
        assert same(one.get_parameter(name), two.get_parameter(name))


@over_models
@with_and_without_data
def test_the_dense_model_has_the_reported_errors(name, with_data):
    teacher, hyper, batches = make(name)
    report = fit_(hyper, teacher, data=batches if with_data else None, sweeps=3)
    dense = to_dense(hyper)
    assert [s.name for s in report.sites] == [p.site.name for p in plan_of(hyper).sites]
    missed = whole = 0.0
    for site in report.sites:
        target = teacher.get_parameter(site.name).detach()
        error = dense.get_parameter(site.name).detach() - target
        assert site.error == pytest.approx(relative(error, target), rel=ROUNDING[torch.float32])
        variance = float(target.double().var(correction=0))
        missed += float(error.double().square().sum()) / variance
        whole += float(target.double().square().sum()) / variance
    assert report.error == pytest.approx(math.sqrt(missed / whole), rel=ROUNDING[torch.float32])
    outputs = [site.output_error for site in report.sites]
    if not with_data:  # the objective is the error then, each site by its variance
        # and with channels a thousandth of the square of each term
        most = 1.1 if "channels" in name else 1 + ROUNDING[torch.float32]
        assert report.error**2 / (1 + ROUNDING[torch.float32]) <= report.history[-1]
        assert report.history[-1] <= most * report.error**2
        assert outputs == [None] * len(outputs)
    elif None not in outputs:
        # Here the mean over the sites, of errors of outputs mixed with those of weights
        pairs = [sorted((site.error**2, site.output_error**2)) for site in report.sites]
        least, most = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        rounding = 1 + ROUNDING[torch.float32]
        assert least / rounding <= report.history[-1] <= most * rounding


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", ["stage", "crnn", "autoencoder-2d"])
@with_and_without_data
def test_other_dtypes_have_the_reported_errors_too(name, dtype, with_data):
    build, _, options = MODELS[name]
    teacher = randomise(build()).to(dtype)
    hyper = hyperize(teacher, seed=1, **options)
    data = [batch.to(dtype) for batch in make(name)[2]] if with_data else None
    report = fit_(hyper, teacher, data=data, sweeps=3)
    dense = to_dense(hyper)
    assert {tensor.dtype for tensor in hyper.parameters()} == {dtype}
    for site in report.sites:
        target = teacher.get_parameter(site.name).detach()
        error = dense.get_parameter(site.name).detach().double() - target.double()
        assert site.error == pytest.approx(relative(error, target), rel=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_teacher_of_another_dtype_serves(dtype):
    teacher, hyper, _ = make("stage")
    other = copy.deepcopy(hyper)
    cast = copy.deepcopy(teacher).to(dtype)
    error, expected = fit_(other, cast).error, fit_(hyper, teacher).error
    assert error == pytest.approx(expected, rel=ROUNDING[torch.bfloat16])
    assert {tensor.dtype for tensor in other.parameters()} == {torch.float32}


def test_a_teacher_of_another_dtype_serves_with_data_too():
    teacher, hyper, batches = make("convolutions")
    other = copy.deepcopy(hyper)
    wide = fit_(other, copy.deepcopy(teacher).double(), data=[x.double() for x in batches])
    error = fit_(hyper, teacher, data=batches).history[-1]
    assert wide.history[-1] == pytest.approx(error, rel=NEAR)


def test_a_state_dict_serves_as_a_module_does():
    for data in (None, make("stage")[2]):
        teacher, hyper, _ = make("stage")
        other = copy.deepcopy(hyper)
        fit_(hyper, teacher, data=data, sweeps=2)
        fit_(other, dict(teacher.state_dict()), data=data, sweeps=2)
        before = {k: v for k, v in hyper.state_dict().items() if "norm" not in k}
        assert same(before, {k: v for k, v in other.state_dict().items() if "norm" not in k})


def test_sweeps_and_tolerance_end_the_fit():
    teacher, hyper, _ = make("convolutions")
    lengths = {
        (sweeps, tolerance): len(fit_(hyper, teacher, sweeps=sweeps, tolerance=tolerance).history)
        for sweeps, tolerance in [(0, 0.0), (1, 0.0), (6, 0.0), (6, 0.5)]
    }
    assert lengths == {(0, 0.0): 1, (1, 0.0): 2, (6, 0.0): 7, (6, 0.5): 2}


def test_the_report_can_be_printed_and_kept():
    teacher, hyper, batches = make("transformer")
    with torch.no_grad():
        hyper.norm1.bias += 1
    report = fit_(hyper, teacher, data=batches, sweeps=1)
    text = " ".join(str(report).split())
    worst = max(report.sites, key=lambda site: site.error)
    for part in (f"{len(report.sites)} weights", f"{report.error:.3f}", worst.name, "outputs"):
        assert part in text
    differs, blind = report.notes
    assert differs.startswith("1 other tensors differ")
    assert "norm1.bias" in differs
    assert "self_attn.out_proj.weight first" in blind
    assert all(note in text for note in report.notes)
    assert report.to_dict()["sites"][0]["name"] == report.sites[0].name
    assert fit_(make("stage")[1], make("stage")[0], sweeps=0).notes == ()


# ------------------------------------------------------------------------------- the best there is


def rows_of(teacher, plan, kernel, axis=0):
    """Per site of a kernel size: deviation, and the scaled weight in memory order cut to tiles."""
    head = next(head for head in plan.heads if head.kernel == kernel)
    rows = []
    for planned in plan.sites:
        if planned.grid.kernel == kernel:
            weight = teacher.get_parameter(planned.site.name).detach().double().numpy()
            deviation = weight.std()
            scaled = (weight - weight.mean()) / deviation
            scaled = scaled.swapaxes(0, 1) if axis else scaled
            width = head.trail * head.kernel_elements
            flat = np.pad(scaled.ravel(), (0, -scaled.size % width))
            rows.append((deviation, flat.reshape(-1, width), scaled.size))
    return rows


def left_by_components(rows, weights, rank):
    """Weighted squares that the best affine space of this dimension leaves of the rows."""
    mean = np.average(rows, axis=0, weights=weights)
    singular = np.linalg.svd((rows - mean) * np.sqrt(weights)[:, None], compute_uv=False)
    return float((singular[rank:] ** 2).sum())


def linears():
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.Linear(64, 32))


def one_kernel():
    return nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 16, 3, groups=4))


def several_kernels():
    return nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, (1, 5)))


def uneven(model):
    """Weights with some structure, whose sites differ in mean and deviation."""
    with torch.no_grad():
        for at, weight in enumerate(p for p in model.parameters() if p.ndim > 1):
            flat = weight.flatten(1)
            spectrum = torch.linspace(1, 0, min(flat.shape)) ** 3
            u, _, v = torch.linalg.svd(torch.randn_like(flat), full_matrices=False)
            weight.copy_(((u * spectrum) @ v).view_as(weight) * (1 + at))
            weight.add_(0.3 * at * weight.std())
    return model


FULL = {
    "linear": (linears, (1, 64), ("linear",)),
    "conv": (one_kernel, (1, 8), ("conv2d",)),
    "several": (several_kernels, (1, 16), ("conv2d",)),
    "lstm": (lambda: nn.LSTM(32, 32, 2, bidirectional=True), (1, 64), ("lstm",)),
}


@pytest.mark.parametrize("weighting", ["relative", "absolute"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", FULL)
def test_without_a_hidden_layer_the_error_is_that_of_principal_components(name, axis, weighting):
    build, tile, targets = FULL[name]
    teacher = uneven(build())
    hyper = hyperize(
        teacher,
        tile=tile[::-1] if axis else tile,
        trunk_axis=axis,
        targets=targets,
        hidden_dim=0,
        embedding_dim=6,
        seed=1,
    )
    plan = plan_of(hyper)
    least = whole = 0.0
    for head in plan.heads:
        sites = rows_of(teacher, plan, head.kernel, axis)
        assert all(rows.size == size for _, rows, size in sites)  # full tiles
        power = 2 if weighting == "absolute" else 0
        weights = np.concatenate([np.full(len(rows), std**power) for std, rows, _ in sites])
        least += left_by_components(np.concatenate([rows for _, rows, _ in sites]), weights, 6)
    for planned in plan.sites:
        target = teacher.get_parameter(planned.site.name).detach().double()
        variance = float(target.var(correction=0)) if weighting == "relative" else 1.0
        whole += float(target.square().sum()) / variance
    report = fit_(hyper, teacher, weighting=weighting)
    share = report.history[-1] / (least / whole)
    assert 0 < least < 0.95 * whole
    assert 1 - OPTIMAL <= share <= 1 + OPTIMAL


def test_partial_tiles_are_fitted_between_the_bounds_with_and_without_them():
    teacher = uneven(nn.Sequential(nn.Linear(31, 70), nn.Linear(70, 33)))
    options = {"targets": ("linear",), "tile": (1, 64), "hidden_dim": 0, "embedding_dim": 5}
    hyper = hyperize(teacher, seed=1, **options)
    sites = rows_of(teacher, plan_of(hyper), "1")
    assert all(rows.size > size for _, rows, size in sites)
    full = np.concatenate([rows[: size // 64] for _, rows, size in sites])
    padded = np.concatenate([rows for _, rows, _ in sites])
    weights = [p.detach().double() for p in teacher.parameters() if p.ndim > 1]
    whole = sum(float(w.square().sum() / w.var(correction=0)) for w in weights)
    reached = fit_(hyper, teacher, tolerance=0.0).history[-1] * whole
    assert left_by_components(full, np.ones(len(full)), 5) * (1 - OPTIMAL) <= reached
    assert reached <= left_by_components(padded, np.ones(len(padded)), 5) * (1 + OPTIMAL)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("embedding", "hidden"), [(4, 8), (8, 8), (12, 4)])
def test_two_layers_fit_as_well_as_alternating_tucker_decompositions(axis, embedding, hidden):
    tensorly = pytest.importorskip("tensorly")
    decomposition = pytest.importorskip("tensorly.decomposition")
    teacher = uneven(nn.Conv2d(32, 64, 3))
    tile = (16, 4)
    hyper = hyperize(
        teacher, seed=1, tile=tile, trunk_axis=axis, embedding_dim=embedding, hidden_dim=hidden
    )
    weight = teacher.weight.detach().double().numpy()
    scaled = (weight - weight.mean()) / weight.std()
    # (out tiles, 16, in tiles, 4, k) -> (tiles, lead, trail * k)
    cut = scaled.reshape(4, 16, 8, 4, 9)
    cut = cut.transpose(2, 0, 3, 1, 4) if axis else cut.transpose(0, 2, 1, 3, 4)
    tensor = np.ascontiguousarray(cut).reshape(32, tile[axis], -1)
    with tensorly.backend_context("numpy"):  # the benchmarks set another for the process
        (core, factors), _ = decomposition.partial_tucker(
            tensor, rank=[embedding, hidden], modes=[0, 2], init="svd", n_iter_max=200, tol=1e-7
        )
    approximation = np.einsum("abc,ta,wc->tbw", core, *factors)
    tucker = np.linalg.norm(tensor - approximation) / np.linalg.norm(tensor)
    # The biases are worth one more component along each mode, of whose unfoldings no approximation
    # can leave less than their smallest components
    least = 0.0
    for mode, rank in ((0, embedding + 1), (2, hidden + 1)):
        unfolded = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
        tail = np.linalg.svd(unfolded, compute_uv=False)[rank:]
        least = max(least, np.linalg.norm(tail) / np.linalg.norm(tensor))
    report = fit_(hyper, teacher, sweeps=60, tolerance=1e-4)
    share = math.sqrt(report.history[-1] * float((weight**2).sum())) / (
        weight.std() * math.sqrt(weight.size)
    )
    assert least <= share <= (1 + NEAR) * tucker


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"tile": FULL[name][1], "hidden_dim": 0, "embedding_dim": 6}) for name in FULL),
        ("conv", {"tile": (8, 8), "hidden_dim": 6, "embedding_dim": 6}),
        ("conv", {"tile": (8, 8), "hidden_dim": 6, "embedding_dim": 6, "trunk_axis": 1}),
        ("linear", {"tile": (16, 16), "hidden_dim": 6, "embedding_dim": 6}),
        ("linear", {"tile": (8, 32), "hidden_dim": 8, "embedding_dim": 4}),
        ("lstm", {"tile": (16, 16), "hidden_dim": 6, "embedding_dim": 6}),
    ],
    ids=str,
)
def test_what_another_hypernetwork_of_the_plan_generated_is_recovered(name, options):
    build, _, targets = FULL[name]
    model = build()
    planter, hyper = (hyperize(model, seed=s, targets=targets, **options) for s in (1, 2))
    with torch.no_grad():  # rows of zero mean, so that the sites' offsets do not matter
        for head in find_groups(planter)[0].hypernet.heads.values():
            head.weight -= head.weight.mean(0)
    report = fit_(hyper, to_dense(planter), sweeps=200, tolerance=1e-3)
    assert report.error < PLANTED


def test_tiles_that_fill_little_of_a_head_are_decomposed():
    # Cells of 24 columns in tiles of 4: the hidden layer is wider than what is made of it
    teacher, hyper, _ = make("cells", **TWO_LAYERS)
    assert plan_of(hyper).hidden_dim > max(head.width for head in plan_of(hyper).heads)
    assert fit_(hyper, teacher).error < 0.9


# ------------------------------------------------------------------------------- unusual weights


@pytest.mark.parametrize("options", [{"hidden_dim": 0}, TWO_LAYERS], ids=["linear", "two-layers"])
@pytest.mark.parametrize(
    ("value", "with_data", "limit"),
    [
        (0.0, False, 0.1),
        (0.3, False, 0.1),
        (0.0, True, 0.2),
        (0.3, True, 0.4),
    ],
)
def test_a_constant_weight_stays_nearly_constant(options, value, with_data, limit):
    """To a share of the deviation that weights of its shape have at initialisation."""
    teacher, _, batches = make("convolutions")
    with torch.no_grad():
        teacher.dilated.weight.fill_(value)
    hyper = hyperize(teacher, seed=1, **options)
    report = fit_(hyper, teacher, data=batches if with_data else None, sweeps=20)
    assert all(tensor.isfinite().all() for tensor in hyper.state_dict().values())
    assert all(math.isfinite(site.error) for site in report.sites)
    usual = 1 / math.sqrt(teacher.dilated.weight[0].numel())
    deviations = (to_dense(hyper).dilated.weight.detach() - value) / usual
    assert float(deviations.square().mean().sqrt()) < limit


def test_a_model_of_constants_alone_is_fitted_exactly():
    teacher = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    with torch.no_grad():
        teacher[0].weight.zero_()
        teacher[1].weight.fill_(-0.5)
    hyper = hyperize(teacher, seed=1)
    report = fit_(hyper, teacher)
    assert report.error < ROUNDING[torch.float32]
    assert report.history[-1] < ROUNDING[torch.float32]


def test_an_embedding_longer_than_its_hidden_layer_serves_as_well():
    teacher = uneven(nn.Conv2d(32, 64, 3))
    errors = []
    for length in (16, 24):  # the hidden layer has 16 numbers per tile
        options = {"tile": (4, 4), "hidden_dim": 4, "embedding_dim": length}
        errors.append(fit_(hyperize(teacher, seed=1, **options), teacher).error)
    assert errors[1] == pytest.approx(errors[0], rel=NEAR)


# ---------------------------------------------------------------------------------- with data


def expected(difference, weight, vectors):
    """Relative error of the products of a weight, (rows, columns), and vectors."""
    return relative(vectors @ difference.t(), vectors @ weight.t())


def outputs_of(layer, weight, inputs):
    """What a layer without bias makes of the inputs with this weight, flattened."""
    layer = copy.deepcopy(layer)
    layer.bias = None
    layer.weight = nn.Parameter(weight)
    with torch.no_grad():
        return torch.cat([layer(x).flatten() for x in inputs])


def inputs_of(model, batches, *kinds):
    """The arguments of every call of the layers of these kinds, by path."""
    seen = {}
    model = copy.deepcopy(model).eval()
    for path, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(
                lambda _, args, path=path: seen.setdefault(path, []).append(args)
            )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return seen


LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (3, 5, 24)),
    "conv1d": (lambda: nn.Conv1d(8, 16, 3, padding=1), (3, 8, 12)),
    "conv3d": (lambda: nn.Conv3d(4, 16, 3, padding=(0, 1, 2), stride=(1, 2, 1)), (2, 4, 5, 6, 4)),
    "grouped": (lambda: nn.Conv2d(16, 24, 3, groups=4), (3, 16, 6, 7)),
    "depthwise": (lambda: nn.Conv2d(32, 32, 5, groups=32, padding=2), (3, 32, 6, 6)),
    "dilated": (lambda: nn.Conv2d(8, 16, 3, dilation=(1, 2), padding=2), (3, 8, 6, 7)),
    "strided": (lambda: nn.Conv2d(8, 16, (3, 5), stride=(2, 3), padding=(1, 2)), (3, 8, 9, 11)),
    "same": (lambda: nn.Conv2d(8, 16, (4, 3), dilation=(1, 2), padding="same"), (3, 8, 7, 6)),
    "valid": (lambda: nn.Conv2d(8, 16, 3, padding="valid"), (3, 8, 7, 6)),
    "reflect": (lambda: nn.Conv2d(8, 16, 3, padding=(1, 2), padding_mode="reflect"), (3, 8, 5, 4)),
    "circular": (
        lambda: nn.Conv2d(8, 16, 3, padding="same", padding_mode="circular"),
        (3, 8, 5, 4),
    ),
    "unbatched": (lambda: nn.Conv2d(8, 16, 3, padding=1), (8, 6, 7)),
    # Outputs of neighbouring inputs do not overlap
    "transposed1d": (lambda: nn.ConvTranspose1d(16, 16, 3, stride=4, groups=2), (3, 16, 7)),
    "transposed2d": (lambda: nn.ConvTranspose2d(16, 12, 2, stride=2), (3, 16, 5, 4)),
    "transposed3d": (
        lambda: nn.ConvTranspose3d(16, 8, 2, stride=3, dilation=2, groups=4),
        (16, 3, 3, 2),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_output_errors_are_those_of_the_layers_outputs(name):
    build, shape = LAYERS[name]
    teacher = build()
    hyper = hyperize(teacher, seed=1, **SMALL)
    # Inputs with a mean and correlations; batches of different sizes count by their samples
    batches = [torch.randn(shape).cumsum(-1) + 0.5, torch.randn(shape)]
    batches[1] = batches[1][: max(1, len(batches[1]) // 2)] if name[:2] != "un" else batches[1]
    if name in ("unbatched", "transposed3d"):
        batches[1] = torch.randn(shape)
    (site,) = fit_(hyper, teacher, data=batches, sweeps=1).sites
    weight = teacher.weight.detach()
    error = to_dense(hyper).weight.detach() - weight
    actual = relative(*(outputs_of(teacher, w, batches) for w in (error, weight)))
    assert 0.05 < actual < 1
    assert site.output_error == pytest.approx(actual, rel=ROUNDING[torch.float32])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 16, 3, padding=1), (4, 4, 160, 160)),
        (nn.Linear(24, 40), (40000, 24)),
        (nn.ConvTranspose2d(16, 12, 2, stride=2), (4, 16, 120, 120)),
    ],
    ids=["conv2d", "linear", "transposed"],
)
def test_output_errors_over_many_positions_are_estimates(layer, shape):
    hyper = hyperize(layer, seed=1, **SMALL)
    # Channels that are loud in different parts of the data, so that every part counts
    loud = torch.linspace(0, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    batch = torch.randn(shape) + loud * torch.randn(shape[1], *[1] * (len(shape) - 2))
    (site,) = fit_(hyper, layer, data=[batch], sweeps=0).sites
    weight = layer.weight.detach()
    error = to_dense(hyper).weight.detach() - weight
    actual = relative(*(outputs_of(layer, w, [batch]) for w in (error, weight)))
    assert site.output_error == pytest.approx(actual, rel=THINNED)


class Recurrent(nn.Module):
    """A recurrent layer over sequences of these lengths, packed, or all of the full length."""

    def __init__(self, layer, lengths=None):
        super().__init__()
        self.layer, self.lengths = layer, lengths

    def forward(self, x):
        if self.lengths:
            x = pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=False)
        return self.layer(x)[0]


def step(layer, suffix, x, state):
    """One step by the textbook's formulas: (hidden state, cell state or None)."""
    w_ih, w_hh = (getattr(layer, f"weight_{part}{suffix}") for part in ("ih", "hh"))
    b_ih, b_hh = (getattr(layer, f"bias_{part}{suffix}", 0) for part in ("ih", "hh"))
    h, c = state
    of_x, of_h = w_ih @ x + b_ih, w_hh @ h + b_hh
    if isinstance(layer, nn.RNN):
        return getattr(torch, layer.nonlinearity)(of_x + of_h), None
    if isinstance(layer, nn.GRU):
        (xr, xz, xn), (hr, hz, hn) = of_x.chunk(3), of_h.chunk(3)
        z = torch.sigmoid(xz + hz)
        return (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h, None
    i, f, g, o = (of_x + of_h).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (getattr(layer, f"weight_hr{suffix}") @ h if layer.proj_size else h), c


@torch.no_grad()
def multiplied(layer, sequences):
    """Weight -> the vectors that it multiplies over all steps; hidden states those after a step."""
    vectors = {}
    hidden = getattr(layer, "proj_size", 0) or layer.hidden_size
    for level in range(layer.num_layers):
        directions = []
        for reverse in range(1 + layer.bidirectional):
            suffix = f"_l{level}" + "_reverse" * reverse
            states = []
            for sequence in sequences:
                state = torch.zeros(hidden), torch.zeros(layer.hidden_size)
                steps = []
                for x in sequence.flip(0) if reverse else sequence:
                    state = step(layer, suffix, x, state)
                    steps.append(state[0])
                states.append(torch.stack(steps[::-1] if reverse else steps))
            vectors[f"weight_ih{suffix}"] = torch.cat(sequences)
            vectors[f"weight_hh{suffix}"] = torch.cat(states)
            directions.append(states)
        sequences = [torch.cat(parts, 1) for parts in zip(*directions, strict=True)]
    return vectors


@pytest.mark.parametrize("lengths", [None, [5, 2, 4]], ids=["", "packed"])
@pytest.mark.parametrize(
    ("cls", "flags"),
    [
        (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
        (nn.LSTM, {"proj_size": 8, "num_layers": 2, "batch_first": True}),
        (nn.LSTM, {"bias": False}),
        (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5}),
        (nn.GRU, {}),
        (nn.RNN, {"nonlinearity": "relu", "batch_first": True, "num_layers": 3}),
        (nn.RNN, {"bidirectional": True, "nonlinearity": "tanh"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(map(str, value)),
)
def test_recurrent_weights_count_by_the_inputs_and_states_they_multiply(cls, flags, lengths):
    if lengths and not flags.get("batch_first"):
        flags = flags | {"batch_first": True}
    teacher = Recurrent(cls(12, 24, **flags), lengths)
    hyper = hyperize(teacher, seed=1, **SMALL)
    batch = torch.randn(3, 5, 12) + 0.5
    report = fit_(
        hyper, teacher, data=[batch if flags.get("batch_first") else batch.mT.mT.transpose(0, 1)]
    )
    sequences = [sequence[:n] for sequence, n in zip(batch, lengths or [5] * 3, strict=True)]
    vectors = multiplied(teacher.layer, sequences)
    dense = to_dense(hyper)
    assert {site.name for site in report.sites} >= {f"layer.{name}" for name in vectors}
    for site in report.sites:
        name = site.name.removeprefix("layer.")
        if name not in vectors:
            assert (name[:9], site.output_error) == ("weight_hr", None)
            continue
        weight = teacher.get_parameter(site.name).detach()
        error = dense.get_parameter(site.name).detach() - weight
        actual = expected(error, weight, vectors[name])
        assert site.output_error == pytest.approx(actual, rel=ROUNDING[torch.float32] * 10)


def test_cells_count_by_the_inputs_and_states_they_multiply():
    teacher, hyper, batches = make("cells")
    report = fit_(hyper, teacher, data=batches)
    dense = to_dense(hyper)
    seen = inputs_of(teacher, batches, nn.RNNCellBase)
    assert len(report.sites) == 6
    for site in report.sites:
        path, _, param = site.name.partition(".")
        calls = seen[path]
        if param == "weight_ih":
            vectors = [args[0] for args in calls]
        else:
            vectors = [args[1][0] if isinstance(args[1], tuple) else args[1] for args in calls]
        weight = teacher.get_parameter(site.name).detach()
        error = dense.get_parameter(site.name).detach() - weight
        actual = expected(error, weight, torch.cat(vectors))
        assert site.output_error == pytest.approx(actual, rel=ROUNDING[torch.float32])


class Attending(nn.Module):
    """Attention whose queries, keys and values differ, in widths too if it is asked."""

    def __init__(self, kdim=32, vdim=32, keys=6):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, kdim=kdim, vdim=vdim, batch_first=True)
        self.kdim, self.vdim, self.keys = kdim, vdim, keys

    def parts(self, x):
        key = x[:, : self.keys, : self.kdim].flip(-1) + 0.5
        return x, key, 2 * x[:, : self.keys, : self.vdim] - 1

    def forward(self, x):
        query, key, value = self.parts(x)
        return self.attention(query, key, value=value, need_weights=False)[0]


@pytest.mark.parametrize("widths", [(32, 32), (24, 16)], ids=["one-weight", "three-weights"])
def test_attention_counts_by_its_queries_keys_and_values(widths):
    teacher = Attending(*widths)
    hyper = hyperize(teacher, seed=1, **SMALL)
    batch = torch.randn(5, 6, 32)
    report = fit_(hyper, teacher, data=[batch])
    dense, parts = to_dense(hyper), [part.flatten(0, 1) for part in teacher.parts(batch)]
    known = [site for site in report.sites if "out_proj" not in site.name]
    assert len(known) == (1 if widths == (32, 32) else 3)
    for at, site in enumerate(known):
        weight = teacher.get_parameter(site.name).detach()
        error = dense.get_parameter(site.name).detach() - weight
        if len(known) == 1:
            products = [
                torch.cat([x @ w.t() for x, w in zip(parts, matrix.chunk(3), strict=True)])
                for matrix in (error, weight)
            ]
            actual = relative(*products)
        else:
            actual = expected(error, weight, parts[at])
        assert site.output_error == pytest.approx(actual, rel=ROUNDING[torch.float32])


def test_weights_that_the_data_does_not_inform_are_fitted_all_the_same_and_noted():
    class Partly(Stage):
        def forward(self, x):
            return self.stem(x)

    teacher = randomise(Partly())
    hyper = hyperize(teacher, seed=1, targets=ALL)
    report = fit_(hyper, teacher, data=[torch.randn(4, 3, 8, 8)])
    reached = {site.name: site.output_error is not None for site in report.sites}
    assert [name for name, data in reached.items() if data] == ["stem.weight"]
    assert all(site.error < 1 for site in report.sites if site.name != "stem.weight")
    (note,) = (note for note in report.notes if "without the data" in note)
    assert f"{len(reached) - 1} weights" in note


def test_data_that_informs_no_weight_is_noted():
    class Nothing(Stage):
        def forward(self, x):
            return self.norm(x.repeat(1, 11, 1, 1)[:, :32])

    teacher = randomise(Nothing())
    report = fit_(hyperize(teacher, seed=1), teacher, data=[torch.randn(4, 3, 8, 8)])
    assert any("without the data" in note for note in report.notes)


def test_a_layer_that_pads_its_input_itself_can_be_reached():
    # TensorFlow's "same", whose input can be smaller than the kernel
    teacher = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Conv2dSame(16, 32, 5, stride=2))
    hyper = hyperize(teacher, seed=1, **SMALL)
    report = fit_(hyper, teacher, data=[torch.randn(4, 3, 4, 4)])
    assert all(site.error < 2 for site in report.sites)


def test_a_loader_serves_as_a_list_of_its_inputs_does():
    teacher, hyper, batches = make("stage")
    other, third = copy.deepcopy(hyper), copy.deepcopy(hyper)
    inputs = torch.cat(batches)
    loader = DataLoader(TensorDataset(inputs, torch.arange(len(inputs))), batch_size=4)
    reports = [
        fit_(hyper, teacher, data=batches, sweeps=2),
        fit_(other, teacher, data=loader, sweeps=2),
        fit_(third, teacher, data=(batch for batch in batches), sweeps=2),
    ]
    assert len({(report.sites, report.history) for report in reports}) == 1


def images(seed, count=64):
    """Smooth noise, so that neighbouring pixels are alike as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, 8, 8, generator=generator)
    return F.interpolate(small, scale_factor=4, mode="bilinear") * 1.5


@pytest.fixture(scope="module")
def compared():
    """A residual network's teacher, and the models that were fitted to it without and with data."""
    torch.manual_seed(0)
    teacher = randomise(timm.create_model("test_resnet", num_classes=10)).train()
    data = list(images(1).split(32))
    update_bn(data, teacher)
    plain, informed = (hyperize(teacher, seed=1, compression=4, hidden_dim=0) for _ in range(2))
    fit_(plain, teacher)
    update_bn(data, plain)
    report = fit_(informed, teacher, data=data, sweeps=8)
    return teacher.eval(), plain.eval(), informed.eval(), data, report


def test_with_data_the_layers_outputs_are_nearer(compared):
    teacher, plain, _, data, report = compared
    dense, inputs = to_dense(plain), inputs_of(teacher, data, nn.Conv2d)
    without = []
    for site in report.sites:
        path = site.name.rpartition(".")[0]
        layer, calls = teacher.get_submodule(path), [args[0] for args in inputs[path]]
        weight = layer.weight.detach()
        error = dense.get_parameter(site.name).detach() - weight
        without.append(relative(*(outputs_of(layer, w, calls) for w in (error, weight))) ** 2)
    with_data = [site.output_error**2 for site in report.sites]
    assert sum(with_data) < 0.8 * sum(without)


@pytest.mark.parametrize("seed", [1, 5], ids=["the-data", "other-data"])
def test_with_data_the_networks_output_is_nearer(compared, seed):
    teacher, plain, informed, *_ = compared
    x = images(seed)
    with torch.no_grad():
        without, with_data = (F.mse_loss(m(x), teacher(x)) for m in (plain, informed))
    assert with_data < 0.9 * without


@pytest.mark.parametrize("samples", [8, 32, 128])
def test_few_samples_do_no_harm_to_other_inputs(samples):
    teacher = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    mix = torch.randn(128, 128) / 16
    held = torch.randn(1000, 128) @ mix
    missed = []
    for data in (None, [torch.randn(samples, 128) @ mix]):
        hyper = hyperize(teacher, seed=1, targets=("linear",), compression=4)
        fit_(hyper, teacher, data=data)
        with torch.no_grad():
            missed.append(float(F.mse_loss(hyper(held), teacher(held))))
    assert missed[1] <= 1.05 * missed[0]


# ------------------------------------------------------------------------------------- refusals


def stage():
    return randomise(Stage())


def nan_weight():
    teacher = stage()
    with torch.no_grad():
        teacher.conv1.weight[0, 0, 0, 0] = math.nan
    return teacher


def without(name):
    return {k: v for k, v in stage().state_dict().items() if k != name}


X = [torch.zeros(2, 3, 8, 8)]

# name -> (teacher, options of fit_, error, words of its message)
REFUSED = {
    "other-widths": (lambda: Stage(16), {}, ModelError, ("stem.weight", "(16, 3, 3, 3)")),
    "other-layers": (CRNN, {}, ModelError, ("no stem.weight", "architecture")),
    "a-part": (lambda: without("conv1.weight"), {}, ModelError, ("no conv1.weight",)),
    "a-part-with-data": (
        lambda: without("norm.bias"),
        {"data": X},
        ModelError,
        ("norm.bias", "state dict"),
    ),
    "nan": (nan_weight, {}, ModelError, ("conv1.weight", "not finite")),
    "nan-state": (lambda: nan_weight().state_dict(), {}, ModelError, ("conv1.weight",)),
    "on-meta": (lambda: Stage().to("meta"), {}, ModelError, ("stem.weight", "load")),
    "integers": (
        lambda: {k: v.long() for k, v in stage().state_dict().items()},
        {},
        ModelError,
        ("stem.weight", "finite"),
    ),
    "arrays": (
        lambda: {k: v.numpy() for k, v in stage().state_dict().items()},
        {},
        ModelError,
        ("stem.weight", "ndarray"),
    ),
    "hyperized": (lambda: hyperize(stage()), {}, ModelError, ("hyperized", "to_dense()")),
    "hyperized-state": (
        lambda: hyperize(stage()).state_dict(),
        {},
        ModelError,
        ("hyperized model's",),
    ),
    "wrapped": (lambda: nn.DataParallel(stage()), {}, ModelError, ("DataParallel", "inside")),
    "compiled": (lambda: torch.compile(stage()), {}, ModelError, ("torch.compile", "inside")),
    "no-module": (lambda: "stage.pt", {}, ModelError, ("state dict", "str")),
    "no-teacher": (lambda: None, {}, ModelError, ("state dict", "NoneType")),
    "uncopyable": (
        lambda: type("Stage", (Uncopyable, Stage), {"__init__": Stage.__init__})(),
        {"data": X},
        ModelError,
        ("copied", "open file"),
    ),
    "empty-data": (stage, {"data": []}, ConfigError, ("data is empty",)),
    "empty-batches": (stage, {"data": [torch.zeros(0, 3, 8, 8)]}, ConfigError, ("data is empty",)),
    "a-batch": (stage, {"data": X[0]}, ConfigError, ("list of tensors", "Tensor")),
    "a-path": (stage, {"data": "images"}, ConfigError, ("list of tensors", "str")),
    "a-number": (stage, {"data": 3}, ConfigError, ("list of tensors", "int")),
    "no-tensors": (stage, {"data": [{"x": X[0]}]}, ConfigError, ("batch", "dict")),
    "other-channels": (
        stage,
        {"data": [*X, torch.zeros(2, 4, 8, 8)]},
        ModelError,
        ("(2, 4, 8, 8)", "inputs of the model"),
    ),
    "nan-data": (
        stage,
        {"data": [*X, torch.full((2, 3, 8, 8), math.nan)]},
        ModelError,
        ("stem", "not finite"),
    ),
    "weighting": (stage, {"weighting": "equal"}, ConfigError, ("weighting", "'equal'")),
    "no-weighting": (stage, {"weighting": None}, ConfigError, ("weighting", "None")),
    **{
        f"{option}={value}": (stage, {option: value}, ConfigError, (option, repr(value)))
        for option, values in {
            "sweeps": (-1, 2.0, True, None, "3"),
            "tolerance": (-1e-3, True, None, "0.1", math.nan),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fitted_is_refused_and_the_model_left_as_it_was(name):
    make_teacher, options, error, words = REFUSED[name]
    hyper = hyperize(stage(), seed=1)
    hyper.train().drop.eval()
    teacher = make_teacher()
    before = Snapshot(*(m for m in (hyper, teacher) if isinstance(m, nn.Module)))
    with pytest.raises(HyperizeError) as refusal:
        fit_(hyper, teacher, **options)
    assert type(refusal.value) is error
    for word in words:
        assert word in str(refusal.value)
    before.check()


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        (stage, ("Stage", "not hyperized")),
        (lambda: hyperize(stage()).norm, ("BatchNorm2d", "not hyperized", "a part of it")),
        (lambda: nn.DataParallel(hyperize(stage())), ("DataParallel", "inside")),
        (lambda: hyperize(Stage().to("meta")), ("on meta",)),
        (lambda: hyperize(nn.Sequential(nn.LSTM(8, 8)), lstm="dynamic"), ("no generated weights",)),
        (lambda: None, ("NoneType",)),
    ],
    ids=["dense", "part", "wrapped", "on-meta", "only-dynamic", "none"],
)
def test_what_generates_nothing_is_refused(hyper, words):
    hyper, teacher = hyper(), stage()
    before = Snapshot(*([hyper] if isinstance(hyper, nn.Module) else []))
    with pytest.raises(HyperizeError) as refusal:
        fit_(hyper, teacher)
    assert type(refusal.value) is ModelError
    for word in words:
        assert word in str(refusal.value)
    before.check()


@pytest.mark.parametrize(
    "kind",
    [
        "one-sample",
        "other-dtype",
    ],
)
def test_data_on_which_statistics_cannot_be_taken_changes_nothing(kind):
    """The hyperized model runs the data in training mode, at the end."""
    teacher = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(32)
    )
    hyper = hyperize(teacher, seed=1, **SMALL)
    data = [torch.randn(4, 3, 8, 8)]
    if kind == "one-sample":
        data.append(torch.randn(1, 3, 8, 8))
    else:
        teacher.double()
        data = [batch.double() for batch in data]
    before = Snapshot(hyper)
    with pytest.raises(ModelError):
        fit_(hyper, teacher, data=data)
    before.check()


def test_an_empty_batch_among_others_changes_nothing():
    teacher, hyper, batches = make("stage")
    other = copy.deepcopy(hyper)
    report = fit_(hyper, teacher, data=batches, sweeps=2)
    again = fit_(other, teacher, data=[*batches, batches[0][:0]], sweeps=2)
    assert again.sites == report.sites
    assert all(tensor.isfinite().all() for tensor in other.state_dict().values())


def test_a_model_with_extra_state_is_fitted():
    class Versioned(Stage):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state): ...

    teacher = randomise(Versioned())
    assert fit_(hyperize(teacher, seed=1), teacher).notes == ()


# --------------------------------------------------------------------------------------- fit_plan


def planned(name, with_data, **options):
    build, shape, given = MODELS[name]
    torch.manual_seed(0)
    teacher = randomise(build())
    data = [torch.randn(shape, generator=torch.Generator().manual_seed(1))] if with_data else None
    before = Snapshot(teacher)
    given = {k: v for k, v in given.items() if k in ("targets", "compression")}
    plan = fit_plan(teacher, data=data, seed=0, **given | options)
    before.check()
    return teacher, data, plan


@pytest.mark.parametrize("name", ["convolutions", "stage", "crnn", "timm"])
@with_and_without_data
def test_planned_tiles_meet_the_request_and_miss_no_more_than_the_default(name, with_data):
    teacher, data, plan = planned(name, with_data, compression=3)
    assert plan.compression >= 3
    assert plan.hidden_dim == 0
    default = make_plan(teacher, plan.config.replace(tile=None, hidden_dim=None))
    # What a plan skips is not missed, so only plans of the same weights can be compared
    if {p.site for p in default.sites} == {p.site for p in plan.sites}:
        ours, theirs = (
            fit_(hyperize(teacher, p), teacher, data=data, sweeps=10, tolerance=0).history[-1]
            for p in (plan, default)
        )
        assert ours <= theirs * (1 + OPTIMAL)


def test_planning_by_weights_finds_the_tile_that_they_were_made_of():
    generator = torch.Generator().manual_seed(0)
    teacher = nn.Sequential(*(nn.Conv2d(32, 32, 3) for _ in range(4)))
    basis = torch.randn(4, 8 * 9, generator=generator)
    for conv in teacher:
        chunks = torch.randn(128, 4, generator=generator) @ basis
        conv.weight.data = chunks.view_as(conv.weight) / 10
    plan = fit_plan(teacher, compression=8)
    assert plan.tile == {"3x3": (1, 8)}
    assert make_plan(teacher, compression=8).tile != plan.tile
    assert fit_(hyperize(teacher, plan), teacher).error < PLANTED


@pytest.mark.parametrize("noise", [0, 0.3])
@pytest.mark.parametrize("trunk_axis", [0, 1])
def test_separable_weights_are_found_at_once_in_weights_that_are_nearly_such(trunk_axis, noise):
    generator = torch.Generator().manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(32, 24, 3), nn.Conv2d(24, 48, 3), nn.Conv2d(48, 32, 3))
    basis = torch.randn(4, 9, generator=generator)
    for conv in teacher:
        rows, columns = conv.weight.transpose(0, trunk_axis).shape[:2]
        folds = math.ceil(rows / columns)
        numbers = torch.randn(math.ceil(rows / folds), columns * folds, 1, generator=generator)
        kernels = torch.randn(columns * folds, 4, generator=generator) @ basis
        weight = numbers * kernels
        weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
        weight -= weight.mean()  # the offset, which a product would have to make up for
        conv.weight.data = weight.view(rows, columns, 3, 3).transpose(0, trunk_axis).contiguous()
    hyper = hyperize(teacher, embeddings="separable", compression=4, trunk_axis=trunk_axis)
    assert hyper.hypernet.plan.embedding_dim == hyper.hypernet.plan.lead  # numbers are stored
    history = fit_(hyper, teacher, sweeps=20, tolerance=0).history
    assert history[0] <= history[-1] * (1 + OPTIMAL) + PLANTED**2


def test_tiles_are_planned_where_no_embeddings_are_named():
    teacher = nn.Sequential(*(nn.Conv2d(32, 32, 3) for _ in range(4)))
    assert make_plan(teacher, compression=6).family.embeddings == "separable"
    assert fit_plan(teacher, compression=6).family.embeddings == "tile"


@pytest.mark.parametrize("options", [{"tile": (1, 8)}, {"hidden_dim": 16}])
def test_what_planning_by_weights_chooses_cannot_be_given(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        fit_plan(stage(), **options)


def test_channels_leave_no_tiles_to_plan():
    teacher, _, plan = planned("convolutions", False, embeddings="channel", targets=ALL)
    assert plan == make_plan(teacher, embeddings="channel", targets=ALL, seed=0)
