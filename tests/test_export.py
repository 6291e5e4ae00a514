"""The rewritten graph and checkpoint files."""

import json

import pytest
import safetensors
import timm
import torch
from models import CRNN, randomise
from safetensors.torch import load_file, save_file
from torch import fx, nn

from hyperize import FileError, HyperizeError, as_graph, hyperize, load, save

MODELS = ["resnet18", "tf_efficientnet_b0", "nf_resnet26", "mobilenetv3_small_050", "convnext_atto"]


def small(name):
    return randomise(timm.create_model(name), 0).eval()


def images():
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("hoist", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_graph_computes_the_model(name, hoist):
    hyper = hyperize(small(name))
    graph = as_graph(hyper, hoist=hoist)
    x = images()
    with torch.no_grad():
        assert torch.equal(graph(x), hyper(x))
    assert isinstance(graph, fx.GraphModule)
    assert graph.state_dict().keys() == hyper.state_dict().keys()
    calls = [n for n in graph.graph.nodes if n.op == "call_module" and n.target == "hypernet"]
    opaque = set(graph.meta["opaque_sites"])  # in the blocks of nf_resnet, which timm marks so
    assert bool(opaque) == (name == "nf_resnet26")
    seen = [p for p in hyper.hypernet.plan.sites if p.site.path not in opaque]
    assert len(calls) == (bool(seen) if hoist else len(seen))
    graph(x).sum().backward()  # shares the parameters
    assert all(p.grad is not None for p in hyper.hypernet.parameters())


@pytest.mark.parametrize("hoist", [False, True])
def test_graph_of_convolutions_and_lstm(hoist):
    hyper = hyperize(CRNN(), compression=4).eval()
    x = torch.randn(2, 1, 16, 32)
    graph = as_graph(hyper, hoist=hoist)
    assert torch.equal(graph(x), hyper(x))


def test_hoisting_generates_the_weight_of_a_shared_layer_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x))

    hyper = hyperize(Twice(), compression=3)
    x = torch.randn(1, 32, 8, 8)
    for hoist, calls in ((False, 2), (True, 1)):
        graph = as_graph(hyper, hoist=hoist)
        assert torch.equal(graph(x), hyper(x))
        assert sum(n.target == "hypernet" for n in graph.graph.nodes) == calls


def test_untraceable_models_have_no_graph():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(32, 32, 3)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    hyper = hyperize(Branches(), compression=3)
    assert "could not trace" in hyper.hypernet.plan.order
    with pytest.raises(HyperizeError, match="trace"):
        as_graph(hyper)
    with pytest.raises(HyperizeError, match="not hyperized"):
        as_graph(Branches())


@pytest.mark.parametrize("name", MODELS)
def test_files_round_trip(name, tmp_path):
    model = small(name)
    hyper = hyperize(model, seed=3)
    path = tmp_path / "hyper.safetensors"
    save(hyper, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    x = images()
    with torch.device("meta"):
        architecture = timm.create_model(name).eval()
    for dense in (timm.create_model(name).eval(), architecture):
        again = load(dense, path)
        with torch.no_grad():
            assert torch.equal(again(x), hyper(x))
        assert again.hypernet.plan == hyper.hypernet.plan
        assert not any(p.is_meta for p in again.parameters())
    assert path.stat().st_size < 0.7 * sum(p.numel() * 4 for p in model.parameters())


def test_damaged_and_foreign_files_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(32, 64, 3))
    hyper = hyperize(model, compression=3)
    good = tmp_path / "good"
    save(hyper, good)
    data = good.read_bytes()
    with safetensors.safe_open(good, "pt") as file:
        header = json.loads(file.metadata()["hyperize"])
    tensors = load_file(good)
    other = nn.Sequential(nn.Conv2d(32, 65, 3))
    bad = tmp_path / "bad"

    bad.write_bytes(data[: len(data) // 2])
    with pytest.raises(FileError, match="read"):
        load(model, bad)
    bad.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(FileError):
        load(model, bad)
    with pytest.raises(FileError):
        load(model, tmp_path / "absent")
    save_file(tensors, bad)
    with pytest.raises(FileError, match="not one that"):
        load(model, bad)
    save_file(tensors, bad, {"hyperize": json.dumps(header | {"format": 99})})
    with pytest.raises(FileError, match="upgrade"):
        load(model, bad)
    del tensors["0.weight_embedding"]
    save_file(tensors, bad, {"hyperize": json.dumps(header)})
    with pytest.raises(FileError, match="weight_embedding"):
        load(model, bad)
    with pytest.raises(FileError, match="64"):
        load(other, good)
    assert type(model[0]) is nn.Conv2d
