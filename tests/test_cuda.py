"""hyperize on a GPU: `pytest -m cuda`. Everything here is skipped without one.

On a GPU the weights of a model are made together in each call, as tests/test_caching.py checks on
the CPU in all its cases. Here are the kernels, dtypes, graphs and memory of the device itself.
"""

import copy
import importlib
import pickle
import warnings
from pathlib import Path

import pytest
import timm
import torch
from models import CRNN, Convolutions, randomise
from torch import nn

from hyperize import (
    HyperLSTM,
    HyperRNN,
    cached,
    fit_,
    generated_l2,
    hyperize,
    load,
    param_groups,
    save,
    to_dense,
)

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

ROUNDING = 2e-4
"""Of float32 through a network, in sums of another order, against the largest value."""
HALF = 5e-2
"""Of outputs in half precision: each layer rounds to 8 bits (bfloat16) or 11 (float16)."""
MODELS = {
    "resnet18": {},
    "resnet18, channels": {"embeddings": "channel"},
    "resnet18, two layers": {"hidden_dim": 32},
    "resnet18, paper": {
        "tile": (16, 16),
        "hidden_dim": 64,
        "embedding_dim": 64,
        "compression": None,
    },
    "convnext_atto": {"targets": ("conv2d", "linear")},
    "vit_tiny_patch16_224": {"targets": ("conv2d", "linear")},
    "mobilenetv3_small_100": {},
    "eca_nfnet_l0": {},
}


@pytest.fixture(autouse=True)
def _float32():
    """Products in float32, not in TF32, and kernels that give the same result each time."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    cudnn.deterministic = True
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = before


def image_model(name, **options):
    torch.manual_seed(0)
    options = {"compression": 6, "seed": 0} | MODELS.get(name, {}) | options
    model = randomise(timm.create_model(name.split(",")[0], num_classes=7)).eval()
    return hyperize(model, **options).to(DEVICE)


def images(name, size=2):
    side = 224 if name.startswith("vit") else 64
    return torch.randn(size, 3, side, side, device=DEVICE)


def close(a, b, tolerance=ROUNDING):
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return torch.allclose(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(got, wanted, tolerance=ROUNDING):
    assert got.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        atol = tolerance * max(float(gradient.abs().max()), 1e-2 * largest)
        error = float((got[name].cpu() - gradient.cpu()).abs().max())
        assert error <= atol, (name, error, atol)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_dense_model_bit_for_bit(name):
    hyper, x = image_model(name), images(name)
    dense = to_dense(hyper)
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            assert torch.equal(hyper(x), dense(x))
    with torch.no_grad(), cached(hyper):
        assert torch.equal(hyper(x), to_dense(hyper)(x))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_cpu(name):
    hyper, x = image_model(name), images(name)
    got = gradients(hyper, hyper(x).square().mean())
    other = copy.deepcopy(hyper).cpu()
    wanted = gradients(other, other(x.cpu()).square().mean())
    assert close(hyper(x), other(x.cpu()))
    same_gradients(got, wanted, 20 * ROUNDING)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_other_dtypes(dtype):
    hyper = image_model("resnet18").to(dtype)
    x = images("resnet18").to(dtype)
    dense = to_dense(hyper)
    assert torch.equal(hyper(x), dense(x))
    assert all(
        g.dtype == dtype for g in gradients(hyper, hyper(x).float().square().mean()).values()
    )


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "resnet18, channels"])
def test_autocast_and_channels_last(name, dtype, last):
    hyper, x = image_model(name), images(name)
    if last:
        hyper, x = (t.to(memory_format=torch.channels_last) for t in (hyper, x))
    wanted = hyper(x)
    with torch.autocast(DEVICE, dtype):
        output = hyper(x)
        dense = to_dense(hyper)(x)
    assert output.dtype == dense.dtype
    assert close(output, wanted, HALF)
    assert close(output, dense, HALF)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.half)
    optimizer = torch.optim.SGD(param_groups(hyper, 0.01), lr=1e-3, momentum=0.9, fused=True)
    before = copy.deepcopy(hyper.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype), generated_l2(hyper) as l2:
            loss = hyper(x).float().square().mean() + 1e-4 * l2()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    after = hyper.state_dict()
    assert all(t.isfinite().all() for t in after.values())
    assert any(not torch.equal(t, before[name]) for name, t in after.items())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_layers(kind, bias):
    torch.manual_seed(0)
    dense = kind(24, 40, 2, bidirectional=True, batch_first=True, bias=bias).to(DEVICE)
    hyper = hyperize(dense, compression=3, targets=kind.__name__.lower(), seed=0)
    x = torch.randn(5, 9, 24, device=DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # cuDNN's about weights that are not one piece of memory
        got = hyper(x)[0]
        found = gradients(hyper, got.square().mean())
        with torch.autocast(DEVICE, torch.bfloat16):
            assert close(hyper(x)[0], got, HALF)
    assert torch.equal(got, to_dense(hyper)(x)[0])
    other = copy.deepcopy(hyper).cpu()
    same_gradients(found, gradients(other, other(x.cpu())[0].square().mean()))
    with cached(hyper), torch.no_grad():
        assert torch.equal(hyper(x)[0], hyper(x)[0])


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"layer_norm": True, "bias": False}])
@pytest.mark.parametrize("kind", [HyperLSTM, HyperRNN])
def test_dynamic_layers(kind, options):
    torch.manual_seed(0)
    layer = kind(24, 40, 2, hyper_size=16, embedding_dim=4, bidirectional=True, **options)
    x = torch.randn(21, 3, 24)
    wanted = layer(x)[0]
    expected = gradients(layer, wanted.square().mean())
    moved = copy.deepcopy(layer).to(DEVICE)
    got = moved(x.to(DEVICE))[0]
    assert close(got, wanted)
    same_gradients(gradients(moved, got.square().mean()), expected)
    for dtype in (torch.half, torch.bfloat16):
        with torch.autocast(DEVICE, dtype):
            half = moved(x.to(DEVICE))[0]
        assert close(half, wanted, 4 * HALF)  # after many steps
        assert all(g.isfinite().all() for g in gradients(moved, half.float().sum()).values())
    moved.double()
    assert close(moved(x.to(DEVICE).double())[0], wanted)


def captured(step, warmups=3):
    """A CUDA graph of a step, after some on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph, output


@pytest.mark.parametrize("name", ["resnet18", "resnet18, channels", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("autocasts", [False, True])
def test_a_training_step_is_captured_in_a_cuda_graph(name, autocasts):
    hyper, x = image_model(name), images(name)
    again = copy.deepcopy(hyper)

    def stepper(model):
        optimizer = torch.optim.SGD(param_groups(model, 0.01), lr=1e-2)

        def step():
            optimizer.zero_grad(set_to_none=False)
            with (
                torch.autocast(DEVICE, torch.bfloat16, enabled=autocasts, cache_enabled=False),
                generated_l2(model) as l2,
            ):
                loss = model(x).float().square().mean() + 1e-4 * l2()
            loss.backward()
            optimizer.step()
            return loss

        return step

    step = stepper(hyper)
    graph, loss = captured(step)
    for _ in range(4):  # what was captured has not run
        graph.replay()
    torch.cuda.synchronize()
    plain = stepper(again)
    for _ in range(7):
        wanted = plain()
    assert close(loss, wanted, HALF if autocasts else ROUNDING)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_the_training_loop_of_the_examples_captures_its_steps(optimizer, monkeypatch):
    """Also with batches of two sizes, and a rate that changes from step to step."""
    root = Path(__file__).parents[1]
    for folder in (root, root / "examples"):
        monkeypatch.syspath_prepend(folder)
    recipes = importlib.import_module("benchmarks.recipes")
    paper, twins = (importlib.import_module(name) for name in ("paper", "twins"))
    hyper = image_model("resnet18")
    recipe = recipes.Recipe(optimizer, 0.01)
    runs = []
    for capture in (False, True):
        model = copy.deepcopy(hyper)
        made = recipes.optimizer_of(model, recipe, DEVICE)
        run = paper.make_run("hyper", model, made, lambda step: 1e-3 / (1 + step), 6, l2=1e-4)
        generator = torch.Generator(DEVICE).manual_seed(0)
        sizes = (4, 4, 3, 4, 3, 4)
        batches = [
            (
                torch.randn(n, 3, 64, 64, device=DEVICE, generator=generator),
                torch.randint(7, (n,), device=DEVICE, generator=generator),
            )
            for n in sizes
        ]
        twins.train([run], batches, paper.penalised, None, capture=capture)
        assert run.schedule.last_epoch == len(sizes)
        runs.append(run.model.eval())
    x = images("resnet18")
    assert not close(runs[0](x), hyper.eval()(x), 10 * ROUNDING)
    assert close(runs[1](x), runs[0](x), 10 * ROUNDING)  # six steps


def test_a_hyper_lstm_is_captured_in_a_cuda_graph():
    layer = HyperLSTM(24, 40, hyper_size=16, embedding_dim=4).to(DEVICE)
    x = torch.randn(12, 3, 24, device=DEVICE)

    def step():
        layer.zero_grad(set_to_none=False)
        loss = layer(x)[0].square().mean()
        loss.backward()
        return loss

    graph, loss = captured(step)
    graph.replay()
    torch.cuda.synchronize()
    found = {name: p.grad.clone() for name, p in layer.named_parameters()}
    assert close(loss, step())
    same_gradients(found, {name: p.grad for name, p in layer.named_parameters()})


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_models(mode):
    hyper, x = image_model("resnet18"), images("resnet18")
    compiled = torch.compile(hyper, mode=mode, fullgraph=True)
    wanted = gradients(hyper, hyper(x).square().mean())
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        hyper.zero_grad()
        output = compiled(x)
        output.square().mean().backward()
        assert close(output, hyper(x))
    same_gradients({n: p.grad for n, p in hyper.named_parameters()}, wanted, 20 * ROUNDING)


def test_factors_are_taken_where_they_pay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 2048), nn.ReLU(), nn.Linear(2048, 64)).to(DEVICE)
    options = {"compression": 20, "targets": "linear", "seed": 0}
    fast = hyperize(model, factorized=True, **options)
    slow = hyperize(model, fast.hypernet.plan)
    slow.hypernet.factorized = False
    x = torch.randn(8, 4096, device=DEVICE)
    assert close(fast(x), slow(x))
    many = torch.randn(2**14, 4096, device=DEVICE)
    assert close(fast(many), slow(many))
    with generated_l2(fast) as l2:
        loss = fast(x).square().mean()
    same_gradients(
        gradients(fast, loss + 1e-6 * l2()), gradients(slow, _penalised(slow, x)), 20 * ROUNDING
    )


def _penalised(model, x):
    with generated_l2(model) as l2:
        loss = model(x).square().mean()
    return loss + 1e-6 * l2()


def test_recomputed_weights_take_less_memory():
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8))).to(DEVICE)
    x = torch.randn(4, 2048, device=DEVICE)
    peaks = []
    for recompute in (False, True):
        hyper = hyperize(model, compression=10, targets="linear", seed=0, recompute=recompute)
        hyper(x).sum().backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hyper(x).sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.6 * peaks[0]


def test_nothing_stays_in_memory():
    hyper, x = image_model("resnet18"), images("resnet18")
    with torch.no_grad():
        hyper(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            hyper(x)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("embeddings", ["tile", "channel", "separable"])
def test_fits(embeddings):
    torch.manual_seed(0)
    teacher = randomise(Convolutions()).eval().to(DEVICE)
    hyper = hyperize(teacher, compression=3, embeddings=embeddings, seed=0)
    other = copy.deepcopy(hyper).cpu()
    data = [torch.randn(8, 3, 16, 16, device=DEVICE)]
    for given in (None, data):
        got = fit_(hyper, teacher, **({"data": given} if given else {}))
        wanted = fit_(
            other,
            copy.deepcopy(teacher).cpu(),
            **({"data": [x.cpu() for x in given]} if given else {}),
        )
        assert next(hyper.parameters()).device.type == DEVICE
        assert got.error == pytest.approx(wanted.error, rel=0.05)


def test_files_and_moves(tmp_path):
    torch.manual_seed(0)
    model = randomise(CRNN()).eval().to(DEVICE)
    hyper = hyperize(model, compression=3, seed=0)
    x = torch.randn(2, 1, 8, 16, device=DEVICE)
    wanted = hyper(x)
    save(hyper, tmp_path / "crnn.safetensors")
    assert torch.equal(load(model, tmp_path / "crnn.safetensors").to(DEVICE)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(hyper))(x), wanted)
    assert torch.equal(copy.deepcopy(hyper).cpu().to(DEVICE)(x), wanted)
    assert close(copy.deepcopy(hyper).cpu()(x.cpu()), wanted)
