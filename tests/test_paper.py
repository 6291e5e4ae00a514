"""The networks of "HyperNetworks" (arXiv 1609.09106): exact counts, and their experiments."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from models import count
from PIL import Image
from torch import nn

import hyperize
from hyperize import HyperConfig
from hyperize.parts import generated_layers

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports an example as a script would be: with its own folder on the path."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


# --------------------------------------------------------------------- counts that the paper states
def test_counts_of_the_mnist_network(example):
    script = example("mnist_paper")
    dense = script.MnistNet()
    hyper = hyperize.hyperize(dense, script.paper_config())
    plan = hyper.hypernet.plan
    assert [planned.site.name for planned in plan.sites] == ["conv2.weight"]
    assert (plan.dense_params, plan.tiles) == (12_544, 1)
    assert count(hyper.hypernet) == plan.hypernet_params == 4_240
    assert plan.hyper_params == 4_244
    assert (count(dense), count(hyper)) == (21_210, 12_910)


@pytest.mark.parametrize(
    ("width", "kernels", "tiles", "hyper", "rest", "millions"),
    [
        (1, 557_568, 242, 91_408, 5_162, (0.563, 0.097)),
        (2, 2_225_664, 966, 137_744, 9_834, (2.236, 0.148)),
    ],
    ids=["WRN 40-1", "WRN 40-2"],
)
def test_counts_of_the_wide_residual_networks(
    example, width, kernels, tiles, hyper, rest, millions
):
    with torch.device("meta"):
        dense = example("cifar_wrn_paper").WideResNet(40, width)
    twin = hyperize.hyperize(dense, HyperConfig.paper(exclude="conv1"))
    plan = twin.hypernet.plan
    assert len(plan.sites) == 36
    assert (plan.dense_params, plan.tiles) == (kernels, tiles)
    assert count(twin.hypernet) == plan.hypernet_params == 75_920
    assert plan.hyper_params == hyper
    assert (count(dense) - kernels, count(twin) - hyper) == (rest, rest)
    # The paper's totals have three decimals. Our 2,235,498 would need two more to round to 2.236.
    for model, million in zip((dense, twin), millions, strict=True):
        assert abs(count(model) / 1e6 - million) < 0.00051


def test_the_generator_is_the_formula_of_the_paper(example):
    script = example("mnist_paper")
    hyper = hyperize.hyperize(script.MnistNet(), script.paper_config(seed=0))
    net, z = hyper.hypernet, hyper.conv2.weight_embedding[0]
    w, b = net.trunk.weight.view(16, 4, 4), net.trunk.bias.view(16, 4)  # one W_i, B_i per input
    head = net.heads["7x7"]
    w_out, b_out = head.weight.view(16, 7, 7, 4), head.bias.view(16, 7, 7)
    a = torch.einsum("idn,n->id", w, z) + b
    kernel = torch.einsum("ofgd,id->oifg", w_out, a) + b_out[:, None]
    scale, offset = hyper.conv2.weight_constants
    torch.testing.assert_close(hyper.conv2.weight, scale * kernel + offset)


# -------------------------------------------------------------------------------------- networks
def test_the_wide_residual_network_computes_as_it_should(example):
    script = example("cifar_wrn_paper")
    model = script.WideResNet(16, 1).eval()
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 10)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, script.Block):
                nn.init.zeros_(module.conv2.weight)  # what is left is the shortcuts
    x = model.conv1(images)[:, :, ::4, ::4]
    features = torch.zeros(2, 64, 8, 8)
    features[:, 24:40] = x  # 8 channels on each side at 32, 16 more at 64
    expected = model.fc(torch.relu(model.bn(features)).mean((2, 3)))
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("depth", [4, 20, 39])
def test_depths_that_do_not_exist(example, depth):
    with pytest.raises(ValueError, match=f"depth must be 6n \\+ 4 and at least 10, got {depth}"):
        example("cifar_wrn_paper").WideResNet(depth)


def test_only_the_first_convolution_stays_dense(example):
    hyper = hyperize.hyperize(
        example("cifar_wrn_paper").WideResNet(16, 1), HyperConfig.paper(exclude="conv1")
    )
    convolutions = {name for name, m in hyper.named_modules() if isinstance(m, nn.Conv2d)}
    assert convolutions - generated_layers(hyper).keys() == {"conv1"}


# -------------------------------------------------------------------------------- learning rates
def test_the_learning_rates_of_the_paper(example):
    script = example("cifar_wrn_paper")
    rate = script.stairs(script.STAIRS["hyper"], script.STEPS["hyper"])
    at = [0, 167_999, 168_000, 335_999, 336_000, 503_999, 504_000, 672_000]
    assert [rate(step) for step in at] == [2e-3, 2e-3, 1e-3, 1e-3, 2e-4, 2e-4, 5e-5, 5e-5]
    dense = script.stairs(script.STAIRS["dense"], script.STEPS["dense"])
    assert [dense(step) for step in (0, 42_000, 84_000, 112_000)] == [0.1, 0.02, 0.004, 0.0008]


def test_one_cycle_of_the_learning_rate(example):
    rate = example("cifar_wrn_paper").one_cycle(2.0, 100)
    rates = [rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.08)
    assert max(rates) == rates[30] == 2.0
    assert rates[65] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0)
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)


# -------------------------------------------------------------------- the experiments, in the small
@pytest.fixture
def mnist(example, monkeypatch):
    """The MNIST experiment on a tiny set: digit k is a bright square in the k-th of ten places."""
    script, twins = example("mnist_paper"), example("twins")

    def read(root, train):
        labels = torch.arange(100 if train else 30) % 10
        generator = torch.Generator().manual_seed(int(train))
        pixels = torch.randint(60, (len(labels), 1, 28, 28), generator=generator).byte()
        for image, label in zip(pixels[:, 0], labels.tolist(), strict=True):
            row, column = 13 * (label // 5) + 2, 5 * (label % 5) + 2
            image[row : row + 10, column : column + 4] = 255
        return twins.Images(pixels, labels)

    monkeypatch.setattr(script, "read", read)
    return script


@pytest.fixture
def cifar(example, monkeypatch):
    """The CIFAR experiment on a tiny set of three classes, each of one colour, in noise."""
    script, twins = example("cifar_wrn_paper"), example("twins")

    def half(n, seed):
        labels = torch.arange(n) % 3
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(128, (n, 3, 32, 32), generator=generator).byte()
        pixels[torch.arange(n), labels] += 100
        return twins.Images(pixels, labels)

    monkeypatch.setattr(script, "read", lambda root: (half(20, 0), half(9, 1)))
    return script


MNIST = ["--data-dir", "none", "--batch-size", "32", "--epochs", "4"]
CIFAR = ["--data-dir", "none", "--batch-size", "8", "--depth", "16", "--epochs", "3", "--short"]


def stop_after(epochs, monkeypatch, paper):
    """Ends a run as a kill would, right after it has written its checkpoint of that epoch."""
    suspend = paper.suspend

    def suspend_and_stop(path, runs, settings, done):
        suspend(path, runs, settings, done)
        if done == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(paper, "suspend", suspend_and_stop)


def same_state(a, b):
    """Whether two checkpoints are equal bit for bit, but for the times of their steps."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


@pytest.mark.parametrize("name", ["mnist", "cifar"])
def test_a_stopped_run_ends_as_if_it_had_not_stopped(
    name, example, request, tmp_path, monkeypatch, capsys
):
    script, flags = request.getfixturevalue(name), {"mnist": MNIST, "cifar": CIFAR}[name]
    whole = script.main([*flags, "--out", str(tmp_path / "whole")])
    again = [*flags, "--out", str(tmp_path / "again")]
    with monkeypatch.context() as patched:
        stop_after(2, patched, example("paper"))
        with pytest.raises(KeyboardInterrupt):
            script.main(again)
    half = torch.load(tmp_path / "again" / "checkpoint.pt", weights_only=True)
    resumed = script.main(again)

    captured = capsys.readouterr()
    assert not captured.err
    assert captured.out.count("resumed after epoch 2") == 1
    assert [r.accuracy for r in resumed] == [r.accuracy for r in whole]
    states = [
        torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)
        for run in ("whole", "again")
    ]
    assert len(states[0]["runs"]) == 2
    assert same_state(*states)
    assert not same_state(states[0], half)
    files = [(tmp_path / run / "hyper.safetensors").read_bytes() for run in ("whole", "again")]
    assert files[0] == files[1]

    finished = script.main(again)  # nothing is left to do
    assert "resumed after" in capsys.readouterr().out
    assert [r.accuracy for r in finished] == [r.accuracy for r in whole]


def test_epochs_differ_and_can_be_repeated(mnist, example):
    paper, images = example("paper"), mnist.read(None, True)

    def labels(seed, epoch):
        batches = paper.one_epoch(images, 32, seed, epoch, pad=1, flip=False)
        return torch.cat([labels for _, labels in batches]).tolist()

    orders = [labels(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == sorted(images.labels.tolist()) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert labels(1, 1) == orders[3]


def test_a_kill_while_writing_leaves_the_last_checkpoint(mnist, tmp_path, monkeypatch):
    flags = [*MNIST, "--out", str(tmp_path)]
    save, saved = torch.save, []

    def fail(state, file):
        saved.append(state["epochs"])
        if len(saved) == 3:
            file.write(b"half a check")
            raise KeyboardInterrupt
        save(state, file)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fail)
        with pytest.raises(KeyboardInterrupt):
            mnist.main(flags)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epochs"] == 2
    mnist.main(flags)


def test_a_checkpoint_of_another_run_is_refused(mnist, tmp_path):
    mnist.main([*MNIST, "--epochs", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"made with \{'epochs': 1\}, not \{'epochs': 2\}"):
        mnist.main([*MNIST, "--epochs", "2", "--out", str(tmp_path)])


def test_mnist_learns_draws_and_saves(mnist, tmp_path, capsys):
    dense, hyper = mnist.main([*MNIST, "--epochs", "15", "--out", str(tmp_path)])
    assert (dense.params, hyper.params) == (21_210, 12_910)
    assert dense.accuracy > 0.8
    assert hyper.accuracy > 0.8
    out = capsys.readouterr().out
    assert "21,210" in out
    assert "12,910" in out
    with Image.open(tmp_path / "kernels.png") as picture:
        assert picture.size == (800, 425)
    loaded = hyperize.load(mnist.MnistNet(), tmp_path / "hyper.safetensors")
    assert count(loaded) == hyper.params


def test_the_rate_of_the_generator(mnist):
    hyper = hyperize.hyperize(mnist.MnistNet(), mnist.paper_config())
    others, generating = mnist.make_optimizer(hyper, 5.0).param_groups
    assert (others["lr"], generating["lr"]) == (1.0, 5.0)
    assert sum(p.numel() for p in generating["params"]) == 4_244
    assert sum(p.numel() for p in others["params"]) == 12_910 - 4_244


def test_kernels_are_drawn_in_their_places(mnist):
    kernels = torch.arange(2 * 3 * 4 * 5).float().view(2, 3, 4, 5)
    image = mnist.mosaic(kernels)
    assert image.shape == (2 * 5 - 1, 3 * 6 - 1)
    assert torch.equal(image[5:9, 6:11], kernels[1, 1])
    assert image[4].isnan().all()
    assert image[:, 5].isnan().all()
    assert image.isfinite().sum() == kernels.numel()


def test_a_missing_matplotlib_is_found_before_the_training(mnist, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="1"):
        mnist.main(MNIST)
    assert "pip install 'hyperize[plot]'" in capsys.readouterr().err


def test_missing_data(example, tmp_path, capsys):
    for name in ("mnist_paper", "cifar_wrn_paper"):
        with pytest.raises(SystemExit, match="1"):
            example(name).main(["--data-dir", str(tmp_path)])
        assert f"--data-dir {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--depth", "41"], ["--epochs", "0"]])
def test_flags_that_make_no_network_or_no_run(cifar, flags, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cifar.main(["--data-dir", "none", "--out", str(tmp_path), *flags])
    assert flags[0] in capsys.readouterr().err


def runs_of(cifar, example, flags):
    """The runs that `main` would make, without training them."""
    seen = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cifar, "experiment", lambda runs, images, args, **kwargs: seen.extend(runs))
        cifar.main(["--data-dir", "none", "--depth", "16", *flags])
    return seen


def test_the_recipe_of_the_paper(cifar, example):
    dense, hyper = runs_of(cifar, example, [])
    assert (dense.steps, hyper.steps) == (140_000, 672_000)
    assert (dense.l2, hyper.l2) == (0, 0.0005)
    assert isinstance(dense.optimizer, torch.optim.SGD)
    assert isinstance(hyper.optimizer, torch.optim.Adam)
    for run, rate in ((dense, 0.1), (hyper, 0.002)):
        decayed, free = run.optimizer.param_groups
        assert (decayed["weight_decay"], free["weight_decay"]) == (0.0005, 0)
        assert decayed["lr"] == free["lr"] == rate
    assert dense.optimizer.param_groups[0]["nesterov"]
    assert len(hyper.optimizer.param_groups[0]["params"]) == 2  # first convolution, classifier


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--short", "--batch-size", "8"], 9),  # three epochs of three batches
        (["--short", "--epochs", "2", "--batch-size", "8"], 6),
        (["--epochs", "2", "--batch-size", "8"], 6),
        (["--steps", "7"], 7),
    ],
)
def test_shorter_runs_are_as_long_for_both(cifar, example, flags, steps):
    dense, hyper = runs_of(cifar, example, flags)
    assert dense.steps == hyper.steps == steps
    short = "--short" in flags
    for name, run in (("dense", dense), ("hyper", hyper)):
        start = 0.04 * cifar.SHORT_PEAK if short else cifar.STAIRS[name][0][1]
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(start)


def test_the_short_recipe_is_muon_for_both(cifar, example, capsys):
    dense, hyper = runs_of(cifar, example, ["--short", "--batch-size", "8"])
    for run in (dense, hyper):
        assert type(run.optimizer).__name__ == "HyperMuon"
        assert run.l2 == 0
    decays = [{g["weight_decay"] for g in run.optimizer.param_groups} for run in (dense, hyper)]
    factors = 3  # embeddings, trunk and head share the decay of the weights
    assert decays[0] == {cifar.SHORT_DECAY, 0.0}
    assert decays[1] == {cifar.SHORT_DECAY, cifar.SHORT_DECAY / factors, 0.0}
    with pytest.raises(SystemExit):
        cifar.main(["--data-dir", "none", "--short", "--l2", "0.1"])
    assert "--short has another" in capsys.readouterr().err


def test_each_run_takes_its_own_number_of_steps(cifar, example, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "STEPS", {"dense": 2, "hyper": 5})
    flags = ["--data-dir", "none", "--depth", "16", "--batch-size", "8", "--out", str(tmp_path)]
    cifar.main(flags)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert [len(run["seconds"]) for run in state["runs"]] == [2, 5]
    assert [run["schedule"]["last_epoch"] for run in state["runs"]] == [2, 5]
    assert state["epochs"] == math.ceil(5 / 3)


def test_the_penalty_reaches_the_generated_kernels(cifar, example, tmp_path):
    norms = []
    for l2 in ("0", "1"):
        run = runs_of(cifar, example, ["--steps", "9", "--l2", l2])[1]
        images, labels = torch.randn(4, 3, 32, 32), torch.arange(4) % 3
        example("twins").train([run], 3 * [(images, labels)], example("paper").penalised)
        layers = generated_layers(run.model).values()
        norms.append(sum(m.weight.square().sum().item() for m in layers))
    assert norms[1] < 0.9 * norms[0]
