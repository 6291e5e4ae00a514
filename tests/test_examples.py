"""The examples run, on data of the formats that they read."""

import argparse
import importlib
import struct
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import hyperize

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports an example as a script would be: with its own folder on the path."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_quickstart_as_a_script(tmp_path):
    out = tmp_path / "dense.safetensors"
    command = [sys.executable, EXAMPLES / "quickstart.py", "--model", "resnet18", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("EQUAL bit for bit") == 1
    assert "DIFFER" not in done.stdout
    assert not done.stderr
    assert load_file(out).keys() == timm.create_model("resnet18").state_dict().keys()


def test_quickstart_compares_outputs_that_depend_on_every_convolution(example, monkeypatch, capsys):
    quickstart = example("quickstart")
    flags = ["--model", "resnet18", "--batch-size", "1"]
    convert = quickstart.convert

    def convert_then_change(hyper, path):
        convert(hyper, path)
        hyper.layer4[1].conv1.weight_embedding.mul_(1.01)

    monkeypatch.setattr(quickstart, "convert", convert_then_change)
    assert not quickstart.main(flags)
    assert "DIFFER by up to" in capsys.readouterr().out


def test_crnn(example, capsys):
    dense, hyper = example("crnn").main(["--steps", "3", "--batch-size", "16"])
    assert (dense.name, hyper.name) == ("dense", "hyper")
    assert hyper.params < dense.params / 5
    captured = capsys.readouterr()
    assert "to_dense: outputs EQUAL bit for bit" in captured.out
    assert "reader.weight_hh_l0_reverse" in captured.out
    assert not captured.err


def test_crnn_decodes_and_scores(example):
    crnn = example("crnn")
    blank = crnn.BLANK
    classes = torch.tensor([[1, 1, blank, 1, 2, blank], [blank, blank, 3, 3, 3, blank]])

    def model(_):
        return torch.nn.functional.one_hot(classes, blank + 1)

    assert crnn.read(model, None) == [[1, 1, 2], [3]]
    assert crnn.read_correctly(model, None, torch.tensor([[1, 1, 2], [3, 3, 3]])) == 0.5


def test_crnn_strips_show_their_digits(example):
    crnn = example("crnn")
    strips, digits = next(crnn.strips(64, 0, "cpu"))
    assert strips.shape == (64, 1, crnn.HEIGHT, crnn.DIGITS * crnn.CELL)
    ink = crnn.font().sum((1, 2))[digits].sum(1)
    # Noise of standard deviation 0.4 over 960 pixels sums to 12 or so
    assert (strips.sum((1, 2, 3)) - ink).std() < 20


def write_idx(path, array):
    """Writes a uint8 array in the idx format."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path):
    """A root with a tiny MNIST: digit k is a bright square in the k-th of ten places."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 128), ("t10k", 30)):
        labels = np.arange(count) % 10
        images = np.random.default_rng(0).integers(0, 60, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            row, column = 13 * (label // 5) + 2, 5 * (label % 5) + 2
            image[row : row + 10, column : column + 4] = 255
        write_idx(raw / f"{split}-images-idx3-ubyte", images)
        write_idx(raw / f"{split}-labels-idx1-ubyte", labels)
    return tmp_path


def test_train_mnist(example, mnist, tmp_path, capsys):
    script = example("train_mnist")
    out = tmp_path / "hyper.safetensors"
    flags = ["--data-dir", str(mnist), "--batch-size", "32", "--steps", "40", "--out", str(out)]
    dense, hyper = script.main(flags)
    assert dense.accuracy > 0.8
    assert hyper.accuracy > 0.8
    captured = capsys.readouterr()
    assert f"{dense.params:,}" in captured.out
    assert f"{hyper.params:,}" in captured.out
    assert not captured.err
    loaded = hyperize.load(script.ConvNet(), out)
    assert sum(p.numel() for p in loaded.parameters()) == hyper.params
    assert example("twins").classified(loaded.eval(), script.read(mnist, False)) == hyper.accuracy


def test_train_mnist_epochs_and_a_learning_rate_for_the_hyper_twin(example, mnist):
    flags = ["--data-dir", str(mnist), "--batch-size", "100", "--epochs", "2"]
    results = example("train_mnist").main([*flags, "--hyper-lr", "0.03"])
    assert len(results) == 2


def test_train_mnist_says_what_is_missing(example, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        example("train_mnist").main(["--data-dir", str(tmp_path)])
    assert "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte" in capsys.readouterr().err


@pytest.fixture
def cifar(tmp_path):
    """A root with a tiny ImageFolder data set: three classes, each of one colour, in noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for channel, name in enumerate(("blue", "green", "red")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def test_train_cifar(example, cifar, tmp_path, capsys):
    script = example("train_cifar")
    out = tmp_path / "hyper.safetensors"
    flags = ["--data-dir", str(cifar), "--batch-size", "12", "--steps", "30", "--out", str(out)]
    dense, hyper = script.main(flags)
    assert dense.accuracy > 0.6
    assert hyper.accuracy > 0.6
    assert not capsys.readouterr().err
    loaded = hyperize.load(script.ResNet(num_classes=3), out)
    assert sum(p.numel() for p in loaded.parameters()) == hyper.params


def test_train_cifar_with_a_timm_model(example, cifar, capsys):
    flags = ["--data-dir", str(cifar), "--batch-size", "4", "--steps", "1", "--model", "resnet10t"]
    dense, hyper = example("train_cifar").main([*flags, "--compression", "20"])
    assert hyper.params < dense.params / 10
    assert "factorized" not in capsys.readouterr().out


def test_train_cifar_with_factors(example, cifar, tmp_path, capsys):
    flags = ["--data-dir", str(cifar), "--batch-size", "4", "--steps", "1", "--model", "resnet10t"]
    out = tmp_path / "hyper.safetensors"
    example("train_cifar").main([*flags, "--factorized", "--out", str(out)])
    assert "weights are not generated" in capsys.readouterr().out
    loaded = hyperize.load(timm.create_model("resnet10t", num_classes=3), out)
    assert loaded.hypernet.factorized


def test_train_cifar_keeps_the_decoded_images(example, cifar, monkeypatch):
    script = example("train_cifar")
    cache = cifar / "images.npz"
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda path, mode: False)
        train, test = script.read(cifar)
    assert not cache.exists()  # the folder was read-only
    assert (train.pixels.shape, test.pixels.shape) == ((36, 3, 32, 32), (12, 3, 32, 32))

    script.read(cifar)
    with monkeypatch.context() as patched:
        patched.setattr(script, "decode", None)
        cached, _ = script.read(cifar)
    assert torch.equal(cached.pixels, train.pixels)
    assert torch.equal(cached.labels, train.labels)

    (cifar / "train" / "red" / "0.png").unlink()
    assert len(script.read(cifar)[0].labels) == 35


def test_train_cifar_says_what_it_expects(example, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        example("train_cifar").main(["--data-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert "cifar-10-batches-py" in error
    assert "train/CLASS/IMAGE" in error


def test_batches_hold_every_image_once_per_epoch(example):
    twins = example("twins")
    pixels = torch.arange(10 * 3 * 4 * 4).remainder(251).byte().view(10, 3, 4, 4)
    images = twins.Images(pixels, torch.arange(10))
    batches = list(islice(twins.shuffled(images, 4, seed=0), 6))
    assert [len(labels) for _, labels in batches] == [4, 4, 2] * 2
    for epoch in (batches[:3], batches[3:]):
        assert sorted(torch.cat([labels for _, labels in epoch]).tolist()) == list(range(10))
    for inputs, labels in batches:
        assert torch.equal(inputs, twins.to_floats(pixels[labels]))


def test_batches_are_cropped_and_flipped(example):
    twins = example("twins")
    pixels = torch.randint(1, 256, (1, 3, 4, 4)).byte()
    images = twins.Images(pixels, torch.zeros(1, dtype=torch.long))
    padded = torch.nn.functional.pad(pixels, (1,) * 4)
    crops = [padded[..., i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    allowed = {twins.to_floats(c).numpy().tobytes() for x in crops for c in (x, x.flip(3))}
    batches = islice(twins.shuffled(images, 1, seed=0, pad=1, flip=True), 300)
    assert {inputs.numpy().tobytes() for inputs, _ in batches} == allowed


def test_only_dense_weights_decay(example):
    twins = example("twins")
    model = hyperize.hyperize(example("train_mnist").ConvNet())
    twin = twins.make_twin("hyper", model, 0.1, 0.5, 10)
    decayed = [p for g in twin.optimizer.param_groups if g["weight_decay"] for p in g["params"]]
    assert [id(p) for p in decayed] == [id(model.classifier.weight)]
    assert sum(len(g["params"]) for g in twin.optimizer.param_groups) == len(
        list(model.parameters())
    )


def test_continual(example, mnist, tmp_path, capsys):
    flags = ["--data-dir", str(mnist), "--batch-size", "16", "--steps", "20", "--width", "64"]
    flags += ["--plot", str(tmp_path / "plot.png")]
    rows = example("continual").main(flags)
    assert [row.name for row in rows] == ["generated", "fine-tuned", "separate", "separate, small"]
    by_name = {row.name: row for row in rows}
    for row in rows:
        assert [len(accuracies) for accuracies in row.accuracies] == [1, 2, 3, 4, 5]
        assert row.final > 0.9
    separate, small = by_name["separate"], by_name["separate, small"]
    assert separate.params > 4 * by_name["generated"].params
    assert 0.8 * by_name["generated"].params < small.params <= by_name["generated"].params
    assert separate.forgotten == small.forgotten == 0
    assert by_name["generated"].forgotten < 0.1
    captured = capsys.readouterr()
    assert "networks: 5" in captured.out
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"
    assert not captured.err


def test_the_penalty_of_continual_holds_the_weights_of_earlier_tasks(example, mnist, monkeypatch):
    script = example("continual")
    train_set, test_set = (script.train_mnist.read(mnist, train) for train in (True, False))
    tasks = script.split(train_set, test_set)
    assert [len(task.test.labels) for task in tasks] == [6] * 5
    assert all(set(task.train.labels.tolist()) == {0, 1} for task in tasks)
    trained, drifts = script.trained, []
    for beta in (0.0, 10.0):
        first = []

        def recording(model, *rest, first=first):
            trained(model, *rest)
            with torch.no_grad(), hyperize.condition(model, 0):
                first.append(torch.clone(model.second.weight))

        monkeypatch.setattr(script, "trained", recording)
        args = argparse.Namespace(
            beta=beta, compression=6.0, seed=0, device="cpu", steps=20, batch_size=16, lr=3e-3,
            dataset="mnist",
        )  # fmt: skip
        script.generated(lambda: script.Perceptron(64), tasks, args)
        drifts.append(float((first[-1] - first[0]).norm() / first[0].norm()))
    assert drifts[1] < 0.2 * drifts[0]


def test_continual_says_what_is_missing(example, tmp_path, capsys):
    for dataset in ("mnist", "cifar10"):
        with pytest.raises(SystemExit):
            example("continual").main(["--data-dir", str(tmp_path), "--dataset", dataset])
        assert f"holds no {dataset}" in capsys.readouterr().err
