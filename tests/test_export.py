"""The rewritten graph."""

import pytest
import timm
import torch
from models import CRNN, randomise
from torch import fx, nn

from hyperize import HyperizeError, as_graph, hyperize

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
