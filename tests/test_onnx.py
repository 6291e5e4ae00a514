"""Compiled forms: ONNX files against torch, torch.export and AOTInductor."""

import copy
import math
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from models import CRNN, Stage, Uncopyable, Untraceable, count, randomise, same, tensors
from torch import nn
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.export import Dim

from hyperize import (
    ConfigError,
    FileError,
    ModelError,
    OnnxReport,
    export_onnx,
    hyperize,
    to_dense,
)
from hyperize import onnx as export

pytestmark = pytest.mark.long

CLOSE = 1e-5
"""Of the outputs' scale: some fifty roundings of float32 in another order; measured below 1e-6."""
GRAPH = 2_000
"""Bytes per layer of an ONNX file that are not parameters: its nodes, names and shapes."""

FORMS = pytest.mark.parametrize("dense", [True, False], ids=["dense", "hyper"])


class Tagger(nn.Module):
    """A recurrent layer of any kind, then a linear one; the state is an output too."""

    def __init__(self, cls=nn.LSTM, **options):
        super().__init__()
        self.rnn = cls(24, 32, **options)
        self.head = nn.Linear(64 if self.rnn.bidirectional else 32, 5)

    def forward(self, x):
        out, state = self.rnn(x)
        return {"tags": self.head(out), "state": state}


def small(**options):
    return hyperize(Stage(), compression=4, **options)


def images(n=2):
    return torch.randn(n, 3, 16, 16)


def run(path, *inputs):
    """What onnxruntime computes, read from the file, outside the library."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {x.name: t.numpy() for x, t in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(np.asarray(out)) for out in session.run(None, feed)]


def distance(model, path, *inputs):
    """Largest difference between torch and the file, over each output's scale."""
    with torch.no_grad():
        wanted = tensors(copy.deepcopy(model).eval()(*inputs))
    got = run(path, *inputs)
    assert [a.shape for a in got] == [b.shape for b in wanted]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("resnet18", True),
        ("resnet18", False),
        ("mobilenetv3_small_050", True),
    ],
)
def test_convolutional_models(name, dense, tmp_path):
    model = randomise(timm.create_model(name)).train()
    hyper = hyperize(model)
    path = tmp_path / "model.onnx"
    report = export_onnx(hyper, path, torch.randn(1, 3, 64, 64), dense=dense, dynamic=BATCH)
    assert report.max_error < CLOSE
    for n in (1, 3):  # the example's size, and one that the export has not tried
        assert distance(hyper, path, torch.randn(n, 3, 64, 64)) < CLOSE
    parameters = 4 * count(model if dense else hyper)
    layers = len(list(model.modules()))
    assert abs(report.bytes - parameters) < GRAPH * layers  # less: norms are folded
    assert report.bytes == path.stat().st_size


BATCH = [{0: "batch"}]


@FORMS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"batch_first": True, "bias": False},
        {"cls": nn.GRU, "num_layers": 2, "bidirectional": True},
        {"cls": nn.RNN, "nonlinearity": "relu", "bidirectional": True},
    ],
    ids=["LSTM", "deep-BiLSTM", "batch-first", "BiGRU", "BiRNN"],
)
def test_recurrent_models_of_any_length_and_batch(options, dense, tmp_path):
    model = Tagger(**options)
    hyper = hyperize(model, compression=3, targets=type(model.rnn).__name__.lower())
    path = tmp_path / "model.onnx"
    axes = [{0: "batch", 1: "time"}] if model.rnn.batch_first else [{0: "time", 1: "batch"}]
    # Two axes of one size, which are not one axis
    report = export_onnx(hyper, path, torch.randn(3, 3, 24), dense=dense, dynamic=axes)
    assert report.max_error < CLOSE
    for shape in ((3, 3, 24), (1, 5, 24), (11, 1, 24)):
        assert distance(hyper, path, torch.randn(shape)) < CLOSE
    file = onnx.load(path)
    kind = type(model.rnn).__name__
    assert sum(node.op_type == kind for node in file.graph.node) == model.rnn.num_layers
    outputs = [output.name for output in file.graph.output]
    assert outputs == [f"output_{at}" for at in range(3 if kind == "LSTM" else 2)]
    stored = sum(math.prod(t.dims) for t in file.graph.initializer)
    assert (stored >= count(model)) == dense  # generated weights are not in the small file


@FORMS
def test_convolutions_and_lstm_of_any_width(dense, tmp_path):
    hyper = hyperize(randomise(CRNN()), compression=4)
    path = tmp_path / "model.onnx"
    export_onnx(
        hyper, path, torch.randn(1, 1, 16, 32), dense=dense, dynamic=[{0: "batch", 3: "width"}]
    )
    for n, width in ((1, 32), (3, 46)):
        assert distance(hyper, path, torch.randn(n, 1, 16, width)) < CLOSE


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 32)
        self.conv = nn.Conv2d(3, 32, 3)
        self.proj = nn.Conv2d(32, 32, 1)

    def forward(self, image, ids):
        seen = self.proj(self.conv(image)).mean((2, 3))  # (N, 3, H, W) -> (N, C)
        return (seen[:, None] * self.words(ids)).sum(2)  # (N, 1, C) * (N, L, C) -> (N, L)


def test_several_inputs_whose_values_stay_valid_at_other_sizes(tmp_path):
    hyper = hyperize(TwoInputs(), compression=2)
    path = tmp_path / "model.onnx"
    examples = images(), torch.randint(20, (2, 4))
    export_onnx(hyper, path, examples, dynamic=[{0: "batch"}, {0: "batch", 1: "length"}])
    assert distance(hyper, path, images(5), torch.randint(20, (5, 7))) < CLOSE
    assert [x.name for x in onnx.load(path).graph.input] == ["image", "ids"]
    with pytest.raises(ConfigError, match="'n' differ in size"):
        export_onnx(hyper, path, examples, dynamic=[{0: "n"}, {1: "n"}])


def test_sizes_are_the_examples_unless_named(tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(small(), path, images())
    (size,) = (
        [d.dim_value for d in x.type.tensor_type.shape.dim] for x in onnx.load(path).graph.input
    )
    assert size == [2, 3, 16, 16]
    with pytest.raises(Exception, match="invalid dimensions"):
        run(path, images(3))


@FORMS
def test_report_and_file(dense, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("an older file")
    report = export_onnx(small(), path, images(), dense=dense, opset=20)
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert [o.version for o in file.opset_import if not o.domain] == [20]
    assert report == OnnxReport(path, path.stat().st_size, 20, report.max_error)
    assert f"{report.bytes:,} bytes, opset 20" in str(report)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert b"hyperize/" not in path.read_bytes()  # no stack traces
    assert (b"hyper" in path.read_bytes()) != dense


def test_onnxruntime_generates_the_weights_once_when_it_loads_the_file(tmp_path):
    hyper, kept = small(), {}
    for dense in (True, False):
        export_onnx(hyper, tmp_path / "model.onnx", images(), dense=dense)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
        options.log_severity_level = 3  # not the warning that such a file is for this machine
        onnxruntime.InferenceSession(
            tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        graph = onnx.load(tmp_path / "loaded.onnx").graph
        kept[dense] = sorted(node.op_type for node in graph.node)
    assert kept[False] == kept[True]


@FORMS
def test_model_is_not_changed(dense, tmp_path):
    hyper = small(seed=1).train()
    hyper.conv1.eval()
    flags = [m.training for m in hyper.modules()]
    state, hooks = copy.deepcopy(hyper.state_dict()), hooks_of(hyper)
    x = images().requires_grad_()
    random = torch.get_rng_state()
    export_onnx(hyper, tmp_path / "model.onnx", x, dense=dense)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in hyper.modules()] == flags
    assert same(hyper.state_dict(), state)
    assert hooks_of(hyper) == hooks
    hyper(images()).sum().backward()
    assert all(p.grad is not None for p in hyper.parameters())


class Counter(nn.Module):
    """Reads Python state that is no part of the graph, and so computes something else each time."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.more = nn.Conv2d(32, 32, 3)
        self.calls = [0]

    def forward(self, x):
        self.calls[0] += 1
        return self.more(self.conv(x)) * self.calls[0]


class TwoRows(nn.Module):
    """Decides by a size, and so has no one graph: at other sizes it would be wrong."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.more = nn.Conv2d(32, 32, 3)

    def forward(self, x):
        return self.more(self.conv(x)) * int(x.shape[0] > 2 or 2)


def refused(error, match, tmp_path, hyper, *args, **options):
    """The export raises the error, and leaves neither a file nor a part of one."""
    with pytest.raises(error, match=match):
        export_onnx(hyper, tmp_path / "model.onnx", *args, **options)
    assert not list(tmp_path.iterdir())


def test_a_wrong_onnx_model_is_refused(tmp_path, monkeypatch):
    counter = hyperize(Counter(), compression=2)
    refused(ModelError, "differs from torch by", tmp_path, counter, images())
    refused(ModelError, "tolerance=1.0e-12", tmp_path, small(), images(), tolerance=1e-12)
    # A translation with torch's order of gates, which gives other numbers of the same shapes
    monkeypatch.setitem(export._CELLS, "lstm", ("LSTM", (0, 1, 2, 3)))
    lstm = hyperize(Tagger(), compression=3)
    refused(ModelError, "differs from torch by", tmp_path, lstm, torch.randn(3, 2, 24))


def test_models_that_are_fixed_to_a_size_are_refused(tmp_path):
    hyper = hyperize(TwoRows(), compression=2)
    refused(ModelError, "differs from torch by", tmp_path, hyper, images(), dynamic=BATCH)
    vit = hyperize(timm.create_model("vit_tiny_patch16_224", depth=1), targets="linear")
    image = torch.randn(1, 3, 224, 224)
    refused(ModelError, "448, 224", tmp_path, vit, image, dynamic=[{2: "height"}])


def test_models_without_an_onnx_form_are_refused(tmp_path, monkeypatch):
    x = images()
    refused(ModelError, "not hyperized", tmp_path, Stage(), x)
    refused(ModelError, "torch.onnx cannot export", tmp_path, hyperize(Untraceable()), x)
    with torch.device("meta"):
        on_meta = Stage()
    refused(ModelError, "meta device", tmp_path, hyperize(on_meta, compression=4), x)
    uncopyable = hyperize(Uncopyable(), compression=2, inplace=True)
    refused(ModelError, "holds an open file", tmp_path, uncopyable, torch.randn(1, 32, 8, 8))
    sequence = torch.randn(3, 2, 24)
    for dense in (True, False):
        dynamic = hyperize(Tagger(), lstm="dynamic")
        refused(ModelError, "rnn is a dynamic", tmp_path, dynamic, sequence, dense=dense)
    projecting = hyperize(nn.LSTM(24, 32, proj_size=8), compression=2)
    refused(ModelError, "proj_size=8", tmp_path, projecting, sequence)
    monkeypatch.setattr(export, "LARGEST_ONNX", 10_000)
    refused(ModelError, "2 GiB. Use dense=False", tmp_path, small(), x)


def hooks_of(model):
    tables = (
        table
        for m in model.modules()
        for table in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
    )
    return [hook for table in tables for hook in table.values()]


@pytest.mark.parametrize(
    ("dynamic", "match"),
    [
        ([{4: "batch"}], "axis 4 is not one of 0 to 3"),
        ([{-1: "width"}], "axis -1"),
        ([{"batch": 0}], "axis 'batch'"),
        ([{0: "the batch"}], "'the batch' is not a name"),
        ([{0: 7}], "7 is not a name"),
        ([], "give 1 of them"),
        ([{}, {}], "give 1 of them"),
        ({0: "batch"}, "give 1 of them"),
        ([0], "0 is not a mapping"),
    ],
)
def test_bad_dynamic_axes(dynamic, match, tmp_path):
    refused(ConfigError, match, tmp_path, small(), images(), dynamic=dynamic)


def test_bad_inputs_and_options(tmp_path):
    hyper = small()
    for bad in (None, (), [images().numpy()], (images(), None), torch.empty(0, 3, 16, 16)):
        refused(ConfigError, "example_inputs must be a tensor", tmp_path, hyper, bad)
    refused(ModelError, r"shapes \(2, 4, 16, 16\)", tmp_path, hyper, torch.randn(2, 4, 16, 16))
    refused(ModelError, "does not run", tmp_path, hyper, (images(), images()))
    for bad in (0, 1, -1e-3, float("nan")):
        refused(ConfigError, "tolerance", tmp_path, hyper, images(), tolerance=bad)
    for bad in ("18", True):
        refused(ConfigError, "opset must be", tmp_path, hyper, images(), opset=bad)
    refused(ConfigError, "cannot make opset 99", tmp_path, hyper, images(), opset=99)


def test_unwritable_paths(tmp_path):
    with pytest.raises(FileError, match="is not a folder"):
        export_onnx(small(), tmp_path / "absent" / "model.onnx", images())
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileError, match="cannot be written"):
        export_onnx(small(), folder, images())
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    refused(ImportError, r"pip install 'hyperize\[export\]'", tmp_path, small(), images())


class Both(nn.Module):
    """The two forms of one model side by side, as compiling is what takes the test's time."""

    def __init__(self, hyper):
        super().__init__()
        self.hyper = hyper
        self.dense = to_dense(hyper)

    def forward(self, x):
        return self.hyper(x), self.dense(x)


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # of nn.LSTM, in torch.export
@pytest.mark.parametrize("kind", ["convolutions", "lstm"])
def test_torch_export_and_aot_inductor(kind, tmp_path):
    if kind == "lstm":
        hyper = hyperize(Tagger(bidirectional=True, batch_first=True), compression=3)
        x, grown = torch.randn(2, 4, 24), torch.randn(5, 4, 24)
    else:
        hyper = hyperize(randomise(Stage()), compression=4)
        x, grown = images(2), images(5)
    both = Both(hyper).eval()
    batch = ({0: Dim("batch")},)
    with torch.no_grad():
        for model in (both.hyper, both.dense):
            program = torch.export.export(model, (x,), dynamic_shapes=batch)
            for inputs in (x, grown):
                assert same(program.module()(inputs), model(inputs))
        program = torch.export.export(both, (x,), dynamic_shapes=batch)
        compiled = aoti_load_package(
            aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        )
        for inputs in (x, grown):
            got, wanted = tensors(compiled(inputs)), tensors(both(inputs))
            for a, b in zip(got, wanted, strict=True):
                assert float((a - b).abs().max() / b.abs().max()) < CLOSE
