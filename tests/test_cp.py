"""The closed solutions of the fit, and the moments that they take, against what they stand for."""

from itertools import pairwise

import pytest
import torch
from models import CRNN, Convolutions, Transposed, randomise
from torch import nn

from hyperize import (
    channels,
    cp,
    fit_,
    fit_plan,
    fitting,
    hyperize,
    moments,
    quantized,
    search,
    teacher,
)
from hyperize.cp import NOISE, Outputs, TransposedOutputs, solved
from hyperize.layers import registered_kinds
from hyperize.moments import Moments, Sum
from hyperize.parts import find_groups
from hyperize.solver import Problem, Target

EXACT = 1e-9
"""Relative, between two ways to one number in float64."""
ROUNDING = 1e-4
"""The same in float32."""
FOUND = 0.02
"""Relative error that counts as none of a sum of products, which alternation only approaches."""


def problem_of(model, **options):
    """The problem of a fit without data, at its start."""
    torch.manual_seed(0)
    dense = randomise(model).eval()
    options = {"compression": 3, "embeddings": "channel", "targets": registered_kinds()} | options
    (group,) = find_groups(hyperize(dense, seed=0, **options))
    sites = group.plan.sites
    targets = [
        Target(p.site.name, p.grid, dense.get_parameter(p.site.name).detach()) for p in sites
    ]
    embeddings = [group.layers[p.site.path].embedding(p.site.param) for p in sites]
    problem = Problem(group.hypernet, targets, embeddings, "relative")
    problem.start()
    return problem


def gradients(problem, tensors):
    """Of the objective, computed here on its own."""
    with torch.enable_grad():
        for tensor in tensors:
            tensor.requires_grad_(True)
        errors = [problem.generate(at) - problem.targets[at] for at in problem.z]
        loss = sum(problem.factor[at] * e.square().sum() for at, e in enumerate(errors))
        for at, z in problem.z.items():
            parts = [*z, problem.net.head(problem.grids[at].kernel)[0]]
            squares = [part.square().sum(0) for part in parts]
            loss = loss + problem.pull(at) * NOISE * (squares[0] * squares[1] * squares[2]).sum()
        found = torch.autograd.grad(loss, tensors)
    for tensor in tensors:
        tensor.requires_grad_(False)
    return found


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("model", [Convolutions, CRNN, lambda: Transposed(dims=2)])
def test_a_sweep_sets_each_block_to_its_optimum_and_knows_the_objective(model, axis):
    problem = problem_of(model().double(), trunk_axis=axis)
    before = problem.objective()
    with torch.no_grad():
        reached = [problem.family.sweep(problem) for _ in range(3)]
    assert reached[0] < before
    assert all(b < a for a, b in pairwise(reached))
    assert reached[-1] == pytest.approx(problem.objective(), rel=EXACT)
    # The heads come last, so that their gradient is zero: it was not before
    heads = list(problem.net.parameters())
    largest = max(float(g.abs().max()) for g in gradients(problem, heads))
    assert largest < 1e-6 * reached[-1]
    with torch.no_grad():
        heads[0].mul_(1.1)
    assert max(float(g.abs().max()) for g in gradients(problem, heads)) > 1e-3 * reached[-1]


def test_the_history_never_grows_and_ends_below_that_of_conjugate_gradients(monkeypatch):
    closed = problem_of(Convolutions()).alternate(50, 1e-3)
    assert all(b <= a for a, b in pairwise(closed))
    problem = problem_of(Convolutions())
    monkeypatch.setattr(type(problem.family), "closed", False)
    assert closed[-1] < 1.005 * problem.alternate(50, 1e-3)[-1]


def test_momentum_reaches_further_in_as_many_sweeps(monkeypatch):
    with_momentum = problem_of(Convolutions()).alternate(20, 0.0)
    problem = problem_of(Convolutions())
    with torch.no_grad():
        for _ in range(20):
            without = problem.family.sweep(problem) / problem.whole
    assert with_momentum[-1] < without


def test_a_sweep_that_went_too_far_is_taken_back(monkeypatch):
    problem = problem_of(Convolutions())
    sweep, calls = type(problem.family).sweep, []

    def spoilt(family, problem):
        calls.append(None)
        reached = sweep(family, problem)
        if len(calls) == 6:
            for z in problem.z[0]:
                z.mul_(3)
            return problem.objective()
        return reached

    monkeypatch.setattr(type(problem.family), "sweep", spoilt)
    history = problem.alternate(12, 0.0)
    assert len(calls) == 12
    assert len(history) == 12  # the start and eleven that count
    assert all(b < a for a, b in pairwise(history))
    assert history[-1] == pytest.approx(problem.objective() / problem.whole, rel=ROUNDING)


def test_a_weight_of_few_enough_terms_is_found(monkeypatch):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(24, 32, 3))
    for module in (cp, channels):
        monkeypatch.setattr(module, "NOISE", 0.0)
    hyper = hyperize(dense, compression=4, embeddings="channel", seed=0)
    rank = hyper.hypernet.embedding_dim // 4
    parts = torch.randn(32, rank), torch.randn(24, rank), torch.randn(9, rank)
    with torch.no_grad():
        dense[0].weight.copy_(torch.einsum("or,ir,kr->oik", *parts).view(32, 24, 3, 3))
    report = fit_(hyper, dense, sweeps=200, tolerance=1e-6)
    assert report.error < FOUND
    # So small an objective is no difference of large numbers
    assert report.history[-1] == pytest.approx(report.error**2, rel=ROUNDING)


@pytest.mark.parametrize("with_data", [False, True], ids=["", "data"])
@pytest.mark.parametrize("change", ["zeros", "constant", "one zero channel", "equal channels"])
def test_weights_that_say_little_are_fitted(change, with_data):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3))
    with torch.no_grad():
        if change == "zeros":
            dense[0].weight.zero_()
        elif change == "constant":
            dense[0].weight.fill_(0.3)
        elif change == "one zero channel":
            dense[0].weight[3] = 0
        else:
            dense[0].weight.copy_(dense[0].weight[:1].expand_as(dense[0].weight))
    hyper = hyperize(dense, compression=2, embeddings="channel", seed=0)
    data = [torch.randn(2, 16, 8, 8)] if with_data else None
    report = fit_(hyper, dense, data=data)
    assert all(p.isfinite().all() for p in hyper.parameters())
    assert report.history[-1] <= report.history[0]
    if change != "one zero channel":
        assert torch.allclose(hyper[0].weight, dense[0].weight, atol=0.02)


def test_what_is_fitted_bears_rounding(monkeypatch):
    """Terms that cancel out would be off by more than the weight is, in 8 bits."""

    def rounded():
        torch.manual_seed(0)
        dense = nn.Sequential(*(nn.Conv2d(32, 32, 3) for _ in range(4)))
        hyper = hyperize(dense, compression=2, embeddings="channel", seed=0)
        report = fit_(hyper, dense, tolerance=0)
        weights = [conv.weight.detach().clone() for conv in hyper]
        with quantized(hyper, 8):
            off = [(conv.weight - w).norm() for conv, w in zip(hyper, weights, strict=True)]
        norm = sum(w.square().sum() for w in weights).sqrt()
        return float(torch.stack(off).norm() / norm), report.error

    off, error = rounded()
    for module in (cp, channels):
        monkeypatch.setattr(module, "NOISE", 0.0)
    without, least = rounded()
    assert off < 0.1
    assert off < 0.75 * without
    assert error < 1.05 * least


def test_directions_of_which_nothing_is_known_stay():
    gram = torch.diag(torch.tensor([4.0, 0.0, 1.0]))
    change = solved(gram, torch.tensor([[8.0, 0.0, 3.0]]))
    assert torch.allclose(change, torch.tensor([[2.0, 0.0, 3.0]]), atol=1e-4)


# ------------------------------------------------------------------------------------- outputs


def case(groups, samples, transposed, seed=0):
    """A weight, its factors, and moments of what it multiplies, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    d, k, c, o = 5, 4, 6, 7
    columns = c if transposed else c * k
    x = draw(groups, samples, columns) @ (draw(columns, columns) / columns**0.5)
    sums = Sum(transposed)
    sums.add(x[:, : samples // 2])
    sums.add(x[:, samples // 2 :])
    rows, width = (groups * c, o) if transposed else (groups * o, c)
    weight, head = draw(rows, width * k), draw(k, d)
    u, v = draw(o if transposed else groups * o, d), draw(groups * c if transposed else c, d)
    return x, sums.moments(), weight, u, v, head


def outputs_error(x, weight, u, v, head, transposed):
    """The mean square of the errors of outputs, by making them, and that of each term's."""
    groups, samples, _ = x.shape
    one, two = (v, u) if transposed else (u, v)
    terms = torch.einsum("ad,bd,kd->dabk", one, two, head).flatten(2)

    def square(of):
        of = of.view(groups, -1, of.shape[1])
        return float((x @ (of if transposed else of.mT)).square().sum()) / samples

    return square(weight - terms.sum(0)) + NOISE * sum(map(square, terms))


FORMS = [(groups, samples) for groups in (1, 3) for samples in (4, 100)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("groups", "samples"), FORMS)
def test_steps_lower_the_error_of_outputs_and_know_it(groups, samples, transposed):
    x, known, weight, u, v, head = case(groups, samples, transposed)
    fit = (TransposedOutputs if transposed else Outputs)(weight, u, v, head, known)
    history = [fit.objective()]
    assert history[0] == pytest.approx(
        outputs_error(x, weight, u, v, head, transposed), rel=EXACT, abs=EXACT
    )
    for _ in range(20):
        fit.step()
        reached = outputs_error(x, weight, u, v, head, transposed)
        assert fit.objective() == pytest.approx(reached, rel=1e-6, abs=1e-6 * history[0])
        history.append(fit.objective())
    assert all(b <= a + 1e-9 * history[0] for a, b in pairwise(history))
    assert history[-1] < 0.7 * history[0]


def test_a_step_is_exact_where_moments_are_a_product_of_channels_and_kernels():
    _, _, weight, u, v, head = case(1, 4, False)
    generator = torch.Generator().manual_seed(1)
    roots = [torch.randn(n, 2 * n, generator=generator, dtype=torch.double) for n in (6, 4)]
    product = torch.kron(*(root @ root.t() for root in roots))

    def gradient():
        v.requires_grad_(True)
        with torch.enable_grad():
            error = weight - torch.einsum("ad,bd,kd->abk", u, v, head).flatten(1)
            (found,) = torch.autograd.grad((error @ product * error).sum(), v)
        v.requires_grad_(False)
        return float(found.norm())

    before = gradient()
    Outputs(weight, u, v, head, Moments(product[None])).step()
    assert gradient() < 0.01 * before  # damping and ridge are what is left


@pytest.mark.parametrize("transposed", [False, True])
def test_with_independent_inputs_outputs_are_fitted_as_weights_are(transposed):
    _, _, weight, u, v, head = case(1, 4, transposed)
    columns = len(v) if transposed else weight.shape[1]
    known = Moments(torch.eye(columns, dtype=torch.double)[None], transposed)
    fit = (TransposedOutputs if transposed else Outputs)(weight, u, v, head, known)
    for _ in range(400):
        fit.step()
    x = known.values * columns**0.5  # whose mean square is one
    reached = outputs_error(x, weight, u, v, head, transposed)
    assert fit.objective() == pytest.approx(reached, rel=1e-6)


# ------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_samples_and_matrices_say_the_same(groups, transposed, ridge):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, 5, 12, generator=generator, dtype=torch.double)
    sums = Sum(transposed)
    sums.add(x)
    samples = sums.moments()
    assert samples.sampled
    samples = Moments(samples.values, transposed, True, ridge)
    matrix = Moments(x.mT @ x / 5, transposed, False, ridge)
    shape = (groups * 12, 7) if transposed else (groups * 7, 12)
    weight = torch.randn(shape, generator=generator, dtype=torch.double)
    many = torch.randn(groups, 12, 4, generator=generator, dtype=torch.double)
    assert torch.allclose(samples.times(many), matrix.times(many))
    assert torch.allclose(samples.weigh(weight), matrix.weigh(weight))
    assert samples.norm(weight) == pytest.approx(matrix.norm(weight))
    assert samples.norm_of_noise(weight) == pytest.approx(matrix.norm_of_noise(weight))
    assert samples.shrunk().ridge == pytest.approx(matrix.shrunk().ridge)
    for one, two in zip(samples.marginals(3), matrix.marginals(3), strict=True):
        assert torch.allclose(one, two)
    dense = x.mT @ x / 5 + ridge * torch.eye(12, dtype=torch.double)
    assert torch.allclose(matrix.times(many), dense @ many)
    assert float(matrix.marginals(3)[1].diagonal().mean()) == pytest.approx(1)


def test_marginals_give_back_a_kronecker_product():
    channels, kernel = (
        torch.tensor([[2.0, 1.0], [1.0, 3.0]]),
        torch.tensor([[1.5, 0.2], [0.2, 0.5]]),
    )
    groups = torch.kron(channels, kernel)[None].expand(3, -1, -1)
    found = Moments(groups).marginals(2)
    assert torch.allclose(found[0], channels)
    assert torch.allclose(found[1], kernel)


def test_samples_become_a_matrix_when_they_are_as_many_as_the_columns():
    sums = Sum(False)
    sums.add(torch.randn(1, 3, 8))
    sums.add(torch.randn(1, 4, 8))
    assert sums.total is None
    sums.add(torch.randn(1, 1, 8))
    assert not sums.samples
    assert sums.moments().values.shape == (1, 8, 8)


def test_a_model_that_writes_into_its_activations_does_not_change_the_samples():
    sums, x = Sum(False), torch.ones(1, 2, 8)
    sums.add(x)
    x.zero_()
    assert sums.moments().values.any()


# ------------------------------------------------------------------------------------- the data


def stack():
    torch.manual_seed(0)
    widths = [(3, 24), (24, 24), (24, 32)]
    layers = [layer for pair in widths for layer in (nn.Conv2d(*pair, 3), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def test_moments_come_in_as_many_passes_as_memory_needs(monkeypatch):
    dense, x = stack(), torch.randn(4, 3, 8, 8)
    hyper = hyperize(dense, compression=2, embeddings="channel", targets="conv2d", seed=0)
    sites = [planned.site for planned in find_groups(hyper)[0].plan.sites]
    assert len(sites) > 1
    once = list(teacher.in_passes(dense, sites, [x]))
    assert len(once) == 1
    at_once = fit_(hyper, dense, data=[x])
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(None))
    monkeypatch.setattr(teacher, "_NUMBERS", 1)
    monkeypatch.setattr(teacher, "_limit", lambda length, share: 1e9)
    monkeypatch.setattr(type(sites[0]), "dense_params", 0)
    passes = list(teacher.in_passes(dense, sites, [x]))
    assert [list(found) for found in passes] == [[site.name] for site in sites]
    assert len(calls) == len(sites)
    for found in passes:
        for name, of in found.items():
            assert torch.equal(of.values, once[0][name].values)
    assert not any(layer._forward_hooks for layer in dense)
    monkeypatch.undo()
    assert fit_(hyper, dense, data=[x]).sites == at_once.sites


@pytest.mark.parametrize("batches", [1, 7])
def test_the_number_of_vectors_does_not_grow_with_the_data(batches, monkeypatch):
    counts = {}

    class Counting(Sum):
        def moments(self):
            counts[id(self)] = self.count
            return super().moments()

    monkeypatch.setattr(teacher, "Sum", Counting)
    monkeypatch.setattr(teacher, "_VECTORS", 500)
    dense = stack()
    hyper = hyperize(dense, compression=2, embeddings="channel", targets="conv2d", seed=0)
    fit_(hyper, dense, data=[torch.randn(8, 3, 24, 24) for _ in range(batches)])
    assert all(250 <= count <= 2000 for count in counts.values()), counts
    assert counts


def test_few_samples_do_not_lead_the_weights_astray(monkeypatch):
    dense, x = stack(), torch.randn(1, 3, 8, 8)
    options = {"compression": 2, "embeddings": "channel", "targets": "conv2d", "seed": 0}

    def error():
        return fit_(hyperize(dense, **options), dense, data=[x]).error

    shrunk = error()
    monkeypatch.setattr(moments, "_SHRINKAGE", 0.0)
    assert shrunk < 0.9 * error()
    assert shrunk < 1


def test_outputs_are_nearer_than_after_a_fit_of_the_weights():
    dense, batches = stack(), [torch.randn(16, 3, 12, 12).cumsum(2) for _ in range(2)]
    options = {"compression": 4, "embeddings": "channel", "targets": "conv2d", "seed": 0}
    with_data, without = (hyperize(dense, **options) for _ in range(2))
    fit_(with_data, dense, data=batches)
    fit_(without, dense)
    x = torch.cat(batches)
    missed = [(model(x) - dense(x)).norm() for model in (with_data, without)]
    assert missed[0] < 0.8 * missed[1]


def test_planning_by_weights_traces_the_model_once(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(None)
        return found(*args)

    found = search.find_sites
    for module in (search, fitting):
        monkeypatch.setattr(module, "find_sites", counted)
    dense = randomise(Convolutions())
    plan = fit_plan(dense, data=[torch.randn(2, 3, 16, 16)], seed=0, compression=2)
    assert len(calls) == 1
    assert plan.sites
