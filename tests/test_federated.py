"""The federated example: what goes from client to server, and that it learns and resumes."""

import argparse
import copy
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hyperize import condition

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = ["--visits", "40", "--steps", "6", "--batch-size", "8"]
ROUNDING = 1e-4
"""Of a gradient in single precision, in parts of its norm."""


@pytest.fixture
def federated(monkeypatch):
    """The example, imported as a script would be: with its own folder on the path."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("federated")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A root with four classes: one half of the image is bright, in noise."""
    root = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    halves = [np.s_[:16], np.s_[16:], np.s_[:, :16], np.s_[:, 16:]]
    for split, count in (("train", 60), ("test", 5)):
        for label, half in enumerate(halves):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (32, 32, 3), dtype=np.uint8)
                pixels[half] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def made_images(federated, classes, count):
    """Images of which each has its own number as its first pixels."""
    n = classes * count
    pixels = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = torch.arange(n) // 256, torch.arange(n) % 256
    return federated.Images(pixels, torch.arange(n) % classes)


def numbers(images):
    return (images.pixels[:, 0, 0, 0].int() * 256 + images.pixels[:, 0, 0, 1]).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_each_client_has_two_classes_and_no_image_is_given_twice(federated, seed):
    train, test = made_images(federated, 10, 41), made_images(federated, 10, 3)
    clients = federated.divided(train, test, seed)
    assert len(clients) == 20
    hands = [set(client.train.labels.tolist()) for client in clients]
    assert all(len(hand) == 2 for hand in hands)
    assert [sum(label in hand for hand in hands) for label in range(10)] == [4] * 10
    given = [number for client in clients for number in numbers(client.train)]
    assert sorted(given) == sorted(numbers(train))
    for client, hand in zip(clients, hands, strict=True):
        assert set(client.test.labels.tolist()) == hand
        assert len(client.test.labels) == 6
        held = federated.held_out(client)
        judged, trained = numbers(held.test), numbers(held.train)
        assert sorted(judged + trained) == sorted(numbers(client.train))
        assert 0.15 < len(judged) / (len(judged) + len(trained)) < 0.25
        assert set(held.test.labels.tolist()) == hand


def test_a_division_that_does_not_come_out_even_is_refused(federated):
    for classes in (5, 6):  # odd, and no divisor of 40
        with pytest.raises(ValueError, match=f"divides 40, such as 10; got {classes}"):
            federated.divided(*[made_images(federated, classes, 50)] * 2, 0)
    with pytest.raises(ValueError, match="at least 20 training images; class 0 has 19"):
        federated.divided(*[made_images(federated, 10, 19)] * 2, 0)


def test_the_server_gets_the_gradient_that_the_client_has(federated):
    """After one plain step, what is pulled back is its rate times the end-to-end gradient."""
    torch.manual_seed(0)
    args = argparse.Namespace(vector=3, compression=1.5, lr=1e-3)
    way = federated.Generated(federated.make_network(4), args)
    with torch.no_grad():  # no longer at the start, where the weights do not depend on the vector
        for param in way.hyper.parameters():
            param.add_(0.01 * torch.randn_like(param))
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    k, rate = 5, 0.1
    with condition(way.hyper, way.vectors[k]):
        F.cross_entropy(way.heads[k](way.hyper(images)), labels).backward()
    generating = [p for group in way.optimizer.param_groups for p in group["params"]]
    expected = [rate * param.grad.clone() for param in generating]

    before = way.network(k)
    after = copy.deepcopy(before)
    optimizer = torch.optim.SGD(after.parameters(), rate)
    F.cross_entropy(after(images), labels).backward()
    optimizer.step()
    received = []
    way.optimizer.step = lambda: received.extend(p.grad.clone() for p in generating)
    way.receive([(k, before, after)])
    assert len(received) == len(expected)
    for ours, theirs in zip(received, expected, strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= ROUNDING * theirs.norm()
    vectors = received[[p is way.vectors for p in generating].index(True)]
    assert vectors[k].norm() > 0
    assert vectors[:k].norm() == vectors[k + 1 :].norm() == 0
    assert torch.equal(way.heads[k].weight, after.head.weight)
    assert torch.equal(way.hyper[0].bias, after.features[0].bias)


@pytest.mark.parametrize("name", ["generated", "FedAvg, own heads"])
def test_heads_stay_on_their_clients(federated, name):
    args = argparse.Namespace(vector=3, compression=1.5, lr=1e-3)
    way = federated.WAYS[name](federated.make_network(4), args)
    others = way.network(7).head.weight.clone()
    before = way.network(2)
    after = copy.deepcopy(before)
    with torch.no_grad():
        for param in after.parameters():
            param.add_(0.1)
    way.receive([(2, before, after)])
    assert torch.equal(way.network(7).head.weight, others)
    assert torch.equal(way.network(2).head.weight, after.head.weight)
    assert not torch.equal(way.network(7).features[0].weight, before.features[0].weight)


def test_fedavg_is_the_mean(federated):
    way = federated.FedAvg(federated.make_network(4), argparse.Namespace())
    visits = []
    for k in range(3):
        before = way.network(k)
        after = copy.deepcopy(before)
        with torch.no_grad():
            for param in after.parameters():
                param.fill_(k)
        visits.append((k, before, after))
    way.receive(visits)
    for k in range(20):
        assert all(bool((param == 1).all()) for param in way.network(k).parameters())


def test_clients_alone_do_not_see_each_other(federated):
    way = federated.Local(federated.make_network(4), argparse.Namespace())
    before = way.network(3)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.head.bias.add_(1)
    way.receive([(3, before, after)])
    assert torch.equal(way.network(3).head.bias, after.head.bias)
    assert torch.equal(way.network(0).head.bias, before.head.bias)


def test_it_learns_and_reports(federated, cifar, tmp_path, capsys):
    flags = ["--data-dir", str(cifar), "--out", str(tmp_path), "--visits", "80", "--steps", "10"]
    rows = federated.main([*flags, "--batch-size", "8"])
    by_way = {row.job.way: row for row in rows}
    assert list(by_way) == ["generated", "FedAvg", "FedAvg, own heads", "local"]
    assert all(len(row.accuracies) == 20 for row in rows)
    for way in ("generated", "FedAvg, own heads", "local"):
        assert by_way[way].mean > 0.8
    assert by_way["generated"].params < 1.5 * by_way["FedAvg"].params
    assert by_way["local"].params == 20 * by_way["FedAvg"].params
    captured = capsys.readouterr()
    assert not captured.err
    for row in rows:
        assert f"{row.mean:.2%}" in captured.out
        assert f"{min(row.accuracies):.2%}" in captured.out
    assert (tmp_path / "clients.png").read_bytes()[1:4] == b"PNG"
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [row["accuracies"] for row in kept] == [row.accuracies for row in rows]


@pytest.mark.long
def test_a_run_that_was_interrupted_goes_on(federated, cifar, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(federated, "STEPS", 42)  # 7 visits; 4 of those of local training
    flags = ["--data-dir", str(cifar), *QUICK]
    visit, classified, calls, judged = federated.visit, federated.classified, [], []

    def recorded(model, images):
        judged.append([param.sum().item() for param in model.parameters()])
        return classified(model, images)

    monkeypatch.setattr(federated, "classified", recorded)
    whole = federated.main([*flags, "--out", str(tmp_path / "whole")])
    networks = judged.copy()
    judged.clear()
    for limit in (17, 20, 100):  # twice in the first way, once in the last
        calls.clear()

        def interrupted(*given, limit=limit):
            calls.append(given)
            if len(calls) > limit:
                raise KeyboardInterrupt
            visit(*given)

        monkeypatch.setattr(federated, "visit", interrupted)
        with pytest.raises(SystemExit, match="130"):
            federated.main([*flags, "--out", str(tmp_path / "parts")])
        assert "the same command goes on" in capsys.readouterr().err
    calls.clear()
    monkeypatch.setattr(federated, "visit", lambda *given: (calls.append(given), visit(*given)))
    assert federated.main([*flags, "--out", str(tmp_path / "parts")]) == whole
    assert judged == networks
    assert len(calls) == 20 - 8
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^1$"):
        federated.main([*flags, "--steps", "9", "--out", str(tmp_path / "parts")])
    assert "{'steps': 6}, not {'steps': 9}" in capsys.readouterr().err


@pytest.mark.long
def test_further_seeds_join_the_table(federated, cifar, tmp_path, monkeypatch, capsys):
    flags = ["--data-dir", str(cifar), *QUICK, "--visits", "20", "--out", str(tmp_path)]
    first = federated.main(flags)
    seeds = set()
    trained = federated.trained
    monkeypatch.setattr(
        federated, "trained", lambda job, *rest: (seeds.add(job.seed), trained(job, *rest))[1]
    )
    both = federated.main([*flags, "--seeds", "0", "1"])
    assert seeds == {1}
    assert both[: len(first)] == first
    assert "±" in capsys.readouterr().out


@pytest.mark.long
def test_rates_are_chosen_without_a_look_at_test_images(
    federated, cifar, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(federated, "GRID", (1e-6, 0.01))
    two = {name: federated.WAYS[name] for name in ("generated", "local")}
    monkeypatch.setattr(federated, "WAYS", two)
    test = federated.read(cifar)[1]
    trained, classified, looked = federated.trained, federated.classified, []

    def recorded(model, images):
        looked.append(any(torch.equal(images.pixels[0], pixels) for pixels in test.pixels))
        return classified(model, images)

    jobs = []
    monkeypatch.setattr(federated, "classified", recorded)
    monkeypatch.setattr(
        federated, "trained", lambda job, *rest: (jobs.append(job), trained(job, *rest))[1]
    )
    flags = ["--data-dir", str(cifar), "--out", str(tmp_path), "--visits", "40", "--tune"]
    federated.main([*flags, "--steps", "10", "--batch-size", "8"])
    assert [job.tuning for job in jobs] == [True] * 4 + [False] * 2
    assert looked == [False] * 80 + [True] * 40
    assert [job.rate for job in jobs[4:]] == [0.01] * 2  # with the other nothing is learnt
    assert "held-out images" in capsys.readouterr().out


def test_it_says_what_is_wrong(federated, cifar, tmp_path, capsys):
    for flags, code, message in (
        (["--data-dir", str(tmp_path / "absent")], r"^1$", "holds no images in a known layout"),
        (["--data-dir", str(cifar), "--compression", "1e6"], r"^1$", "cannot be met"),
        (["--data-dir", str(cifar), "--visits", "30"], "2", "must be a multiple of 20"),
    ):
        with pytest.raises(SystemExit, match=code):
            federated.main([*flags, "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert message in error
        assert code == "2" or error.count("\n") == 1
        assert not (tmp_path / "out").exists()
