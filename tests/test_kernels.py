"""The Triton kernels of a HyperLSTM's and HyperRNN's steps, against operations of torch.

Without a GPU, Triton's interpreter runs the kernels. It has to be switched on before Triton is
imported, so those tests run in a process of their own, which one test here starts. Whether the
compiler takes the kernels is seen without a GPU as well.
"""

import contextlib
import copy
import importlib
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hyperize import HyperLSTM, HyperLSTMCell, HyperRNN, HyperRNNCell, dynamic, kernels, recurrence
from hyperize.recurrence import WEIGHTS, hyper_lstm, hyper_rnn, plain, plain_rnn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process of test_all_in_the_interpreter"
)
compiled = pytest.mark.skipif(
    INTERPRETED or kernels.triton is None, reason="there is no compiler of Triton"
)

TOLERANCE = 1e-5
"""Of float32 to float64, relative to the largest entry: 80 roundings, over a few steps."""
NOT_WORSE = 1.5
"""In half precision, the kernels' error over that of the torch loop, which rounds more often.

Not 1, because single roundings are luck.
"""
TRUNCATED = 3.0
"""The same for bfloat16 in the interpreter, which cuts digits off: twice the error of rounding."""
GPU_TOLERANCE = 1e-4
"""Of float32 on a GPU, whose exponentials and divisions are less exact, over a hundred steps."""
FLAGS = list(itertools.product((True, False), (False, True), (False, True)))
"""With and without bias, layer norms and dropout."""

SIZE, HIDDEN, HYPER, EMBEDDING = 3, 21, 13, 3  # none a power of two
TIME, BATCH = 2, 2


@torch.no_grad()
def case(
    bias=True, norm=False, dropped=False, *, hidden=HIDDEN, hyper=HYPER, embedding=EMBEDDING,
    time=TIME, batch=BATCH, device="cpu",
):  # fmt: skip
    """The operator's tensors and the gradients of its outputs, in float64."""
    torch.manual_seed(hidden + time)
    options = {"hyper_size": hyper, "embedding_dim": embedding, "layer_norm": norm}
    cell = HyperLSTMCell(SIZE, hidden, bias, dtype=torch.float64, **options)
    for param in cell.parameters():
        param.add_(0.3 * torch.randn_like(param))
    x = torch.randn(time, batch, SIZE, dtype=torch.float64)
    s0, c0 = (x.new_empty(batch, hidden + hyper).uniform_(-1, 1) for _ in range(2))
    mask = x.new_empty(time, batch, hidden).bernoulli_(0.6) / 0.6 if dropped else x.new_empty(0)
    weights = [x.new_empty(0) if (w := getattr(cell, n)) is None else w.detach() for n in WEIGHTS]
    grads = [torch.randn(time + 1, batch, hidden + hyper, dtype=torch.float64) for _ in range(2)]
    return [t.to(device) for t in (x, s0, c0, mask, *weights)], [t.to(device) for t in grads]


def operator(x, s0, c0, mask, weights):
    return hyper_lstm(x, s0, c0, mask, weights, True)[:2]


def results(function, tensors, grads, dtype):
    """s, c and the gradients of x, s0, c0 and the weights."""
    x, s0, c0, mask, *weights = (t.to(dtype, copy=True) for t in tensors)
    inputs = [x, s0, c0, *(w for w in weights if w.numel())]
    for t in inputs:
        t.requires_grad_()
    outputs = function(x, s0, c0, mask, weights)
    found = torch.autograd.grad(outputs, inputs, [d.to(dtype) for d in grads])
    return [t.detach() for t in (*outputs, *found)]


def error(found, exact):
    return float(
        max(
            ((a.double() - b).abs().max() / b.abs().max().clamp(min=1))
            for a, b in zip(found, exact, strict=True)
        )
    )


@pytest.fixture
def by_kernels(monkeypatch):
    """The kernels run on whatever device the tensors are."""
    for module in (recurrence, dynamic):
        monkeypatch.setattr(module, "takes_triton", lambda *args: True)


def check(dtype=torch.float32, **sizes):
    tensors, grads = case(**sizes)
    exact = results(plain, tensors, grads, torch.float64)
    found = results(operator, tensors, grads, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrence, "takes_triton", lambda *args: False)
        by_loop = results(operator, tensors, grads, dtype)
    assert all(a.dtype == dtype for a in found)
    if dtype == torch.float32:
        assert error(found, exact) < TOLERANCE
        assert error(found, [t.double() for t in by_loop]) < TOLERANCE
    else:
        factor = TRUNCATED if dtype == torch.bfloat16 else NOT_WORSE
        assert 0 < error(found, exact) < factor * error(by_loop, exact)


# ----------------------------------------------------------------------------- in the interpreter


@compiled
def test_all_in_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            __file__,
        ],
        env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert int(passed[1]) > len(FLAGS)  # so they were not skipped


@interpreted
@pytest.mark.parametrize(("bias", "norm", "dropped"), FLAGS)
def test_values_and_gradients(by_kernels, bias, norm, dropped):
    check(bias=bias, norm=norm, dropped=dropped)


@interpreted
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden": 1, "hyper": 1, "embedding": 1, "time": 1, "batch": 1},
        {"hidden": 16, "hyper": 32, "embedding": 4, "batch": 1, "time": 2},  # whole blocks
        {"hidden": 5, "hyper": 70, "embedding": 2, "batch": 3, "time": 1, "bias": False},
    ],
)
def test_sizes(by_kernels, sizes):
    check(norm=True, **sizes)


@interpreted
def test_embeddings_in_pieces(by_kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_TILE", 1)
    assert kernels._blocks(HIDDEN, HYPER, 5)["BLOCK_E"] < 5
    check(embedding=5, batch=1, time=2)


@interpreted
def test_several_chunks(by_kernels, monkeypatch):
    monkeypatch.setattr(recurrence, "_CHUNK", 2)
    monkeypatch.setattr(recurrence, "_CHUNK_BYTES", 0)
    check(time=5, batch=1, norm=True, dropped=True)  # the last chunk is a part of one


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
def test_half_precision(by_kernels, dtype, norm):
    check(dtype, norm=norm)


@interpreted
@pytest.mark.parametrize("norm", [False, True])
def test_without_a_tape(by_kernels, norm):
    x, s0, c0, mask, *weights = (t.float() for t in case(norm=norm, dropped=True)[0])
    s, c, *tape = hyper_lstm(x, s0, c0, mask, weights, False)
    assert all(len(t) <= 1 for t in tape[1:])
    expected = plain(x, s0, c0, mask, weights)
    assert error((s, c), [t.double() for t in expected]) < TOLERANCE


@interpreted
def test_gradients_that_are_no_own_memory(by_kernels):
    """Such as a sum's, whose entries are all one number."""
    (x, s0, c0, mask, *weights), _ = case(time=2)
    mask, weights = mask.float(), [w.float() for w in weights]

    def gradients(function):
        a, b, c = (t.float().requires_grad_() for t in (x, s0, c0))
        return torch.autograd.grad(function(a, b, c, mask, weights)[0].sum(), (a, b, c))

    found, expected = gradients(operator), gradients(plain)
    assert error(found, [t.double() for t in expected]) < TOLERANCE


def rnn_case(bias, norm, relu, *, hidden=HIDDEN, hyper=HYPER, time=TIME, batch=BATCH):
    """A HyperRNN cell in float64, its input, its state and the gradients of its results."""
    torch.manual_seed(hidden + time)
    options = {"hyper_size": hyper, "embedding_dim": EMBEDDING, "layer_norm": norm}
    nonlinearity = "relu" if relu else "tanh"
    cell = HyperRNNCell(SIZE, hidden, bias, nonlinearity, dtype=torch.float64, **options)
    with torch.no_grad():
        for param in cell.parameters():
            param.add_(0.1 * torch.randn_like(param))
    x = torch.randn(time, batch, SIZE, dtype=torch.float64)
    state = x.new_empty(batch, hidden + hyper).uniform_(-1, 1)
    grads = torch.randn(time, batch, hidden, dtype=torch.float64), torch.randn_like(state)
    return cell, x, state, grads


def rnn_results(given, dtype, device="cpu"):
    """The outputs, the last state and the gradients of all that went in."""
    cell, x, state, grads = given
    cell = copy.deepcopy(cell).to(device, dtype)
    x, state = (t.to(device, dtype, copy=True).requires_grad_() for t in (x, state))
    y, (last,) = cell.sequence(x, (state,))
    inputs = [x, state, *cell.parameters()]
    found = torch.autograd.grad((y, last), inputs, [d.to(device, dtype) for d in grads])
    return [t.detach() for t in (y, last, *found)]


def check_rnn(dtype=torch.float32, **sizes):
    given = rnn_case(**sizes)
    found = rnn_results(given, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "takes_triton", lambda *args: False)
        exact = rnn_results(given, torch.float64)
        by_loop = rnn_results(given, dtype)
    assert all(a.dtype == dtype for a in found)
    if dtype == torch.float32:
        assert error(found, exact) < TOLERANCE
    else:
        factor = TRUNCATED if dtype == torch.bfloat16 else NOT_WORSE
        assert 0 < error(found, exact) < factor * error(by_loop, exact)


@interpreted
@pytest.mark.parametrize(("bias", "norm", "relu"), FLAGS)
def test_rnn(by_kernels, bias, norm, relu):
    check_rnn(bias=bias, norm=norm, relu=relu)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rnn_in_half_precision(by_kernels, dtype):
    check_rnn(dtype, bias=True, norm=True, relu=False)


@interpreted
def test_rnn_in_several_chunks(by_kernels, monkeypatch):
    monkeypatch.setattr(recurrence, "_CHUNK", 2)
    monkeypatch.setattr(recurrence, "_CHUNK_BYTES", 0)
    check_rnn(bias=True, norm=True, relu=True, time=5, batch=1)
    check_rnn(bias=True, norm=False, relu=False, time=1, batch=1, hidden=1, hyper=1)


@interpreted
def test_rnn_without_a_tape(by_kernels):
    cell, x, state, _ = rnn_case(True, True, False)
    cell, x, state = cell.float(), x.float(), state.float()
    weights = [getattr(cell, name) for name in WEIGHTS]
    with torch.no_grad():
        expected = plain_rnn(x, state, weights, False)
        given = [x.new_empty(0) if w is None else w for w in weights]
        s, *tape = hyper_rnn(x, state, given, False, False)
        assert not any(t.numel() for t in tape[1:])
        assert error([s[1:]], [expected.double()]) < TOLERANCE
        assert torch.equal(cell.sequence(x, (state,))[1][0], s[-1])


@interpreted
def test_rnn_under_autocast(by_kernels):
    cell, x, state, _ = rnn_case(True, False, False)
    cell, x, state = cell.float(), x.float(), state.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, (last,) = cell.sequence(x, (state,))
    assert y.dtype == last.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(param.grad.dtype == torch.float32 for param in cell.parameters())


@interpreted
def test_rnn_derivatives_of_derivatives_and_transforms(by_kernels):
    """Torch has to look inside, so these are the plain path's."""
    cell, x, state, _ = rnn_case(True, True, False, time=1, batch=1)
    cell, x, state = cell.float(), x.float(), state.float()

    def loss(x):
        return cell.sequence(x, (state,))[0].square().sum()

    def seconds(x):
        x.requires_grad_()
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)

    found = [*seconds(x.clone()), torch.func.grad(loss)(x)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "takes_triton", lambda *args: False)
        expected = [*seconds(x.clone()), torch.func.grad(loss)(x)]
    assert error(found, [t.double() for t in expected]) < TOLERANCE


@interpreted
def test_rnn_operator_as_a_compiler_sees_it(by_kernels):
    cell, x, state, _ = rnn_case(True, True, False, time=2, batch=1)
    cell, x, state = cell.float(), x.float().requires_grad_(), state.float()
    weights = [x.new_empty(0) if (w := getattr(cell, n)) is None else w for n in WEIGHTS]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(hyper_rnn, (x, state, weights, False, True), test_utils=tests)


@interpreted
def test_extreme_preactivations(by_kernels):
    """Neither an exponential overflows, nor does a tanh of almost nothing lose its digits."""
    x = torch.tensor([-1e38, -200.0, -1.0, -0.25, -1e-3, -1e-20, 0.0, 1e-6, 0.2499, 0.3, 9.0, 1e38])
    for function, expected in ((kernels._tanh, torch.tanh), (kernels._sigmoid, torch.sigmoid)):
        found = torch.empty_like(x)
        _apply[(1,)](x, found, function, len(x))
        exact = expected(x.double())
        relative = (found - exact).abs() / exact.abs().clamp(min=1e-37)
        assert relative.max() < 5e-7  # four units in the last place


def _apply_to(
    x: "object",
    y: "object",
    function: "tl.constexpr",  # noqa: F821
    n: "tl.constexpr",  # noqa: F821
) -> None:
    at = kernels.tl.arange(0, 16)
    value = function(kernels.tl.load(x + at, mask=at < n, other=0.0))
    kernels.tl.store(y + at, value, mask=at < n)


_apply = kernels._compiled(_apply_to)


# ------------------------------------------------------------------------------ what is launched


OPERATORS = {
    "hyper_lstm": hyper_lstm,
    "hyper_lstm_backward": recurrence._hyper_lstm_backward,
    "hyper_rnn": hyper_rnn,
    "hyper_rnn_backward": recurrence._hyper_rnn_backward,
}
KERNELS = ("_forward_step", "_backward_step", "_rnn_forward_step", "_rnn_backward_step")


class Operations(TorchDispatchMode):
    """Counts operations of torch, those inside the operator included."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hyperize":  # counts what it does, in the operator's place
            with self:
                return OPERATORS[func._opname]._init_fn(*args, **(kwargs or {}))
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def launched_by_rnn(steps):
    given = rnn_case(True, True, False, time=steps)
    return lambda: rnn_results(given, torch.float32)


def launched_by_lstm(steps):
    tensors, grads = case(norm=True, dropped=True, time=steps)
    return lambda: results(operator, tensors, grads, torch.float32)


def launched(monkeypatch, function):
    """Of a forward and backward pass: operations of torch, and kernels, which do not run."""
    operations = Operations()

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            assert grid == (BATCH,)
            return self

        def __call__(self, *args, **constants):
            operations.counts[self.name] += 1

    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Launch(name))
    with operations:
        function()
    return operations.counts


@pytest.mark.parametrize(
    ("of", "prefix"), [(launched_by_lstm, "_"), (launched_by_rnn, "_rnn_")], ids=["lstm", "rnn"]
)
def test_a_step_is_two_launches(by_kernels, monkeypatch, of, prefix):
    per_step = launched(monkeypatch, of(30))
    per_step.subtract(launched(monkeypatch, of(20)))
    counts = {name: count / 10 for name, count in per_step.items() if count}
    # The products before and after the loops are the same number for any length
    assert counts == {"aten.mm.out": 2, f"{prefix}forward_step": 1, f"{prefix}backward_step": 1}


# --------------------------------------------------------------------------- where they may run


def like(device="cuda", dtype=torch.float32, numbers=1):
    return SimpleNamespace(device=torch.device(device), dtype=dtype, numel=lambda: numbers)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(kernels, "_BUILDS", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))


def test_where_kernels_run(gpu, monkeypatch):
    assert kernels.takes_triton(like(), 512, 128)
    assert kernels.takes_triton(like(dtype=torch.float16), kernels.LARGEST, 1)
    assert not kernels.takes_triton(like(dtype=torch.bfloat16), 512, 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernels.takes_triton(like(dtype=torch.bfloat16), 512, 128)


@pytest.mark.parametrize(
    ("x", "units"),
    [
        (like("cpu"), (512, 128)),
        (like("meta"), (512, 128)),
        (like(dtype=torch.float64), (512, 128)),
        (like(numbers=0), (512, 128)),
        (like(), (kernels.LARGEST + 1, 128)),
        (like(), (512, kernels.LARGEST + 1)),
    ],
)
def test_where_they_do_not(gpu, x, units):
    assert not kernels.takes_triton(x, *units)


def test_not_on_another_makers_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not kernels.takes_triton(like(), 512, 128)


def imported_anew():
    spec = importlib.util.spec_from_file_location("kernels_anew", kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_triton(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # so that importing it fails
    without = imported_anew()
    assert without.triton is None
    assert not without.takes_triton(like(), 512, 128)


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_without_what_triton_builds_with(gpu, monkeypatch, missing, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/gcc" if name == "gcc" else None)
    assert imported_anew().takes_triton(like(), 512, 128) == (kernels.triton is not None)
    if missing == "headers":
        (tmp_path / "Python.h").unlink()
    else:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not imported_anew().takes_triton(like(), 512, 128)


# ------------------------------------------------------------------------------- by the compiler


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_compiler_takes_them(kernel, norm, dtype, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", minversion="3.3")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 80, 32)
    source = importlib.import_module("triton.compiler").ASTSource
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    flags = {"SAVE": True, "EPS": recurrence.EPS} if "forward" in kernel else {}
    if "rnn" in kernel:
        cell = rnn_case(norm, norm, norm)[0]
        weights = [torch.empty(0) if (w := getattr(cell, n)) is None else w for n in WEIGHTS]
        constants = kernels._constants(weights, RELU=norm, **flags)
    else:
        (_, _, _, _, *weights), _ = case(norm=norm, bias=norm)
        constants = kernels._constants(weights, DROPPED=norm, **flags)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    function = getattr(kernels, kernel)
    numbers = dict.fromkeys(("t", "n", "at", "size"), "i32")
    kinds = numbers | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, f"*{dtype}") for name in function.arg_names}
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    made = triton.compile(source(function, signature, values), target=target, options=options)
    assert made.asm["cubin"]


# --------------------------------------------------------------------------------------- on a GPU


def on_gpu(test):
    skip = pytest.mark.skipif(
        not torch.cuda.is_available() or INTERPRETED, reason="there is no GPU, or it is not used"
    )
    return pytest.mark.cuda(skip(test))


@on_gpu
@pytest.mark.parametrize(("bias", "norm", "dropped"), FLAGS)
def test_on_a_gpu(bias, norm, dropped):
    sizes = {"hidden": 100, "hyper": 40, "embedding": 5, "time": 100, "batch": 7}
    tensors, grads = case(bias, norm, dropped, **sizes, device="cuda")
    assert kernels.takes_triton(tensors[0].float(), 100, 40)
    exact = results(plain, tensors, grads, torch.float64)
    assert error(results(operator, tensors, grads, torch.float32), exact) < GPU_TOLERANCE


@on_gpu
@pytest.mark.parametrize(("bias", "norm", "relu"), FLAGS)
def test_rnn_on_a_gpu(bias, norm, relu, monkeypatch):
    given = rnn_case(bias, norm, relu, hidden=100, hyper=40, time=20, batch=7)
    found = rnn_results(given, torch.float32, "cuda")
    monkeypatch.setattr(dynamic, "takes_triton", lambda *args: False)
    assert error(found, rnn_results(given, torch.float64, "cuda")) < GPU_TOLERANCE


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu(dtype, monkeypatch):
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bfloat16")
    tensors, grads = case(norm=True, hidden=100, hyper=40, time=20, batch=7, device="cuda")
    exact = results(plain, tensors, grads, torch.float64)
    found = results(operator, tensors, grads, dtype)
    monkeypatch.setattr(recurrence, "takes_triton", lambda *args: False)
    assert error(found, exact) < NOT_WORSE * error(results(operator, tensors, grads, dtype), exact)


@on_gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cls", [HyperLSTM, HyperRNN])
def test_in_a_cuda_graph(cls, autocast):
    """One that is captured once and replayed with other numbers."""
    torch.manual_seed(0)
    layer = cls(SIZE, 100, hyper_size=40, layer_norm=True, device="cuda")
    x = torch.randn(20, 7, SIZE, device="cuda")
    cast = torch.autocast("cuda", torch.float16) if autocast else contextlib.nullcontext()

    def run():
        with cast:
            y, _ = layer(x)
        return y, torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and lets the libraries get their memory
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grads = run()
    x.normal_()
    graph.replay()
    expected, expected_grads = run()
    assert torch.equal(y, expected)
    assert error(grads, [t.double() for t in expected_grads]) < GPU_TOLERANCE
