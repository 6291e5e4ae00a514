"""The examples run, on data of the formats that they read."""

import argparse
import importlib
import re
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
    with pytest.raises(SystemExit, match="1"):
        example("train_mnist").main(["--data-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert f"--data-dir {tmp_path} does not hold MNIST" in error
    assert "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte" in error
    assert error.count("\n") == 1


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
    with pytest.raises(SystemExit, match="1"):
        example("train_cifar").main(["--data-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cifar-10-batches-py" in error
    assert "train/CLASS/IMAGE" in error


def test_cifar10_from_folders(example, cifar, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--data-dir", str(cifar), "--epochs", "4", "--out", str(out)]
    accuracy = example("cifar10").main(flags)
    assert f"test accuracy {accuracy:.2%}" in capsys.readouterr().out
    student = hyperize.load_timm(out / "hyper.safetensors")
    assert sum(p.numel() for p in student.parameters()) < 1.3e6
    plain = timm.create_model("resnet18", num_classes=3)
    plain.load_state_dict(load_file(out / "dense.safetensors"), strict=True)


def test_cifar10_learns_and_downloads(example, tmp_path, monkeypatch, capsys):
    script, asked = example("cifar10"), []

    class Colours(torch.utils.data.Dataset):
        """In the place of torchvision's: ten classes, each of one grey."""

        classes = tuple("abcdefghij")

        def __init__(self, root, train, transform, download=False):
            asked.append((root, train, download))
            self.transform = transform

        def __len__(self):
            return 200

        def __getitem__(self, at):
            grey = np.full((32, 32, 3), 25 * (at % 10), np.uint8)
            return self.transform(Image.fromarray(grey)), at % 10

    monkeypatch.setattr(script, "CIFAR10", Colours)
    monkeypatch.setattr(script, "DataLoader", lambda data, size, shuffle=False, num_workers=0: (
        torch.utils.data.DataLoader(data, 40, shuffle)  # a class of a test goes to no other process
    ))  # fmt: skip
    flags = ["--data-dir", str(tmp_path), "--download", "--epochs", "4", "--out"]
    script.main([*flags, str(tmp_path / "out")])
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < 0.6 * losses[0]
    assert asked == [(tmp_path, True, True), (tmp_path, False, False)]


def test_cifar10_says_what_is_missing(example, tmp_path, capsys):
    (tmp_path / "half" / "train" / "red").mkdir(parents=True)
    for folder in (tmp_path / "nowhere", tmp_path / "half"):
        with pytest.raises(SystemExit, match="1"):
            example("cifar10").main(["--data-dir", str(folder), "--out", str(tmp_path / "out")])
        captured = capsys.readouterr()
        assert f"--data-dir {folder} has neither CIFAR-10 (--download fetches it)" in captured.err
        assert captured.err.count("\n") == 1
        assert not captured.out
    assert not (tmp_path / "out").exists()


def test_own_model(example, tmp_path, capsys):
    script = example("own_model")
    untrained = script.overlap(script.UNet(), *script.scenes(50))
    reached = script.main(["--steps", "40", "--out", str(tmp_path)])
    assert reached > max(0.5, 2 * untrained)
    out = capsys.readouterr().out
    assert "conv_transpose2d" in out
    assert "100" not in out.partition("loss")[2]
    assert hyperize.load(script.UNet(), tmp_path / "unet.safetensors").hypernet


def test_own_model_scenes_show_their_disks(example):
    torch.manual_seed(0)
    images, disks = example("own_model").scenes(50)
    assert images.shape == disks.shape == (50, 1, 32, 32)
    assert 0.02 < disks.mean() < 0.3
    inside, outside = images[disks > 0], images[disks == 0]
    assert inside.mean() == pytest.approx(1, abs=0.1)  # noise of unit variance over thousands
    assert outside.mean() == pytest.approx(0, abs=0.1)


def test_transformer(example, capsys):
    dense, hyper = example("transformer").main(["--steps", "40", "--batch-size", "16"])
    assert hyper.params < dense.params / 8
    assert min(dense.accuracy, hyper.accuracy) > 0.15  # one of ten digits, by chance 0.1
    captured = capsys.readouterr()
    assert "encoder.layers.2.linear2" in captured.out
    assert "attention" in captured.out
    assert not captured.err


def test_transformer_sequences_are_sorted(example):
    script = example("transformer")
    digits, target = next(script.sequences(8, 0, "cpu"))
    assert digits.shape == target.shape == (8, script.LENGTH)
    assert (target.diff(dim=1) >= 0).all()
    for given, in_order in zip(digits, target, strict=True):
        assert torch.equal(given.bincount(minlength=10), in_order.bincount(minlength=10))


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
        with pytest.raises(SystemExit, match="1"):
            example("continual").main(["--data-dir", str(tmp_path), "--dataset", dataset])
        error = capsys.readouterr().err
        assert f"--data-dir {tmp_path} " in error
        assert error.count("\n") == 1
