"""The zoo's example: what comes back from the files, and that it is trained once."""

import copy
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

EXAMPLES = Path(__file__).parents[1] / "examples"
ROUNDING = 0.01
"""Of 8 bits with a step for each row, in parts of a weight's norm."""


@pytest.fixture
def zoo(monkeypatch):
    """The example, imported as a script would be, with a ResNet-8 as its network."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("model_zoo")
    monkeypatch.setitem(module.SIZES, "resnet20", 1)
    return module


@pytest.fixture
def networks(zoo):
    """A start, and three networks that differ from it by matrices of rank 2."""
    start = zoo.ResNet(1, 10).eval()
    found = []
    for k in range(3):
        network = copy.deepcopy(start)
        with torch.no_grad():
            for param in network.parameters():
                if param.ndim > 1:
                    rows = param.flatten(1)
                    change = torch.randn(len(rows), 2) @ torch.randn(2, rows.shape[1])
                    param.add_(0.1 * rows.std() * change.view_as(param))
                else:
                    param.add_(0.1 * k)
        found.append(network)
    return start, found


def off(network, other):
    """The largest relative error of a parameter."""
    return max(
        ((a - b).norm() / (1e-6 + b.norm())).item()
        for a, b in zip(network.parameters(), other.parameters(), strict=True)
    )


def test_dense_files(zoo, networks, tmp_path):
    start, found = networks
    whole, rounded = (zoo.dense(start, found, tmp_path, bits) for bits in (None, 8))
    assert all(off(a, b) == 0 for a, b in zip(whole.networks, found, strict=True))
    errors = [off(a, b) for a, b in zip(rounded.networks, found, strict=True)]
    assert 0 < max(errors) < ROUNDING
    params = 3 * sum(param.numel() for param in start.parameters())
    assert 4 * params < whole.size < 4.5 * params
    assert 0.25 * whole.size < rounded.size < 0.4 * whole.size


def test_differences_of_the_rank_that_they_have(zoo, networks, tmp_path):
    start, found = networks
    one, two = (zoo.differences(start, found, tmp_path, rank) for rank in (1, 2))
    assert max(off(a, b) for a, b in zip(two.networks, found, strict=True)) < ROUNDING
    assert min(off(a, b) for a, b in zip(one.networks, found, strict=True)) > 0.05
    files = {path.name for path in tmp_path.iterdir()}
    assert {"start.safetensors", "rank-2-0.safetensors", "rank-2-2.safetensors"} <= files
    lengths = [(tmp_path / f"rank-2-{k}.safetensors").stat().st_size for k in range(3)]
    assert two.size == sum(lengths) + (tmp_path / "start.safetensors").stat().st_size


def test_the_nearest_product_of_low_rank(zoo):
    matrix = torch.randn(6, 9)
    for rank in (1, 3, 20):
        left, right = zoo.low_rank(matrix, rank)
        assert left.shape == (6, min(rank, 6))
        missed = torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt()
        torch.testing.assert_close((matrix - left @ right).norm(), missed, atol=1e-5, rtol=1e-5)


def test_variants_change_bytes_and_nothing_else(zoo):
    pixels = torch.randint(256, (5, 3, 32, 32)).byte()
    before = pixels.clone()
    seen = []
    for name in zoo.VARIANTS:
        images = zoo.changed(zoo.Images(pixels, torch.arange(5)), name)
        assert images.pixels.shape == pixels.shape
        assert images.pixels.dtype == torch.uint8
        assert torch.equal(pixels, before)
        assert not any(torch.equal(images.pixels, other) for other in seen)
        seen.append(images.pixels)


@pytest.fixture
def root(tmp_path):
    """Images of two classes, bright above or below, and weights of a start."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for label, half in enumerate((np.s_[:16], np.s_[16:])):
            folder = tmp_path / "data" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (32, 32, 3), dtype=np.uint8)
                pixels[half] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


@pytest.mark.long
def test_model_zoo(zoo, root, monkeypatch, capsys):
    start = root / "start.safetensors"
    save_file(zoo.ResNet(1, 2).state_dict(), start)
    flags = ["--data-dir", str(root / "data"), "--checkpoint", str(start), "--ranks", "1", "4"]
    flags += ["--out", str(root / "out"), "--batch-size", "8", "--compressions", "3"]
    tuned, calls = zoo.fine_tuned, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return tuned(*given)

    monkeypatch.setattr(zoo, "fine_tuned", interrupted)
    with pytest.raises(SystemExit, match="130"):
        zoo.main([*flags, "--steps", "12"])
    calls.clear()
    monkeypatch.setattr(zoo, "fine_tuned", lambda *given: (calls.append(given), tuned(*given))[1])
    capsys.readouterr()
    rows = zoo.main([*flags, "--steps", "12"])
    assert len(calls) == 10 - 4
    names = ["not fine-tuned", "dense, float32", "dense, 8 bits"]
    names += [f"start and differences of rank {rank}" for rank in (1, 4)]
    assert [row.name for row in rows] == [
        *names,
        "start and one generator, 3x",
        "one generator, 3x",
    ]
    by_name = {row.name: row for row in rows}
    assert by_name["dense, float32"].mean > 0.7
    assert abs(by_name["dense, float32"].mean - by_name["dense, 8 bits"].mean) < 0.05
    # With few of their parameters the differences are nearly all there; the whole networks are not
    assert by_name["start and one generator, 3x"].mean > by_name["one generator, 3x"].mean
    assert by_name["start and one generator, 3x"].size < 0.5 * by_name["dense, float32"].size
    sizes = [row.size for row in rows[2:5]]
    assert sizes[1] < sizes[2] < sizes[0] < by_name["dense, float32"].size
    captured = capsys.readouterr()
    assert "resumed with 4 networks" in captured.out
    assert f"{by_name['dense, 8 bits'].size:,}" in captured.out
    assert not captured.err
    assert (root / "out" / "zoo.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(SystemExit, match=r"^1$"):
        zoo.main([*flags, "--steps", "13"])
    assert "{'steps': 12}, not {'steps': 13}" in capsys.readouterr().err


def test_model_zoo_says_what_is_missing(zoo, root, capsys):
    start = root / "start.safetensors"
    save_file(zoo.ResNet(1, 2).state_dict(), start)
    for data, checkpoint, more, message in (
        ("absent", start, [], "holds no images in a known layout"),
        ("data", root / "absent", [], "no such file"),
        ("data", start, ["--compressions", "1e6"], "cannot be met"),
    ):
        flags = ["--data-dir", str(root / data), "--checkpoint", str(checkpoint), *more]
        with pytest.raises(SystemExit, match=r"^1$"):
            zoo.main([*flags, "--out", str(root / "out")])
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (root / "out").exists()
