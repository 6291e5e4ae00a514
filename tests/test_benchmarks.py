"""The benchmarks run, and what they write agrees with itself. No time is asserted."""

import gc
import importlib.metadata
import json
import statistics
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
ROUNDING = 1e-12
"""Between a ratio before and after it was written as JSON: nothing."""


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules by name; the zoo is of three models."""
    monkeypatch.syspath_prepend(ROOT)
    modules = {
        name: importlib.import_module(f"benchmarks.{name}")
        for name in ("__main__", "generation", "making", "memory", "output", "peers", "timing")
    }
    monkeypatch.setattr(timm, "list_models", lambda: ["resnet10t", "test_vit", "test_resnet"] * 25)
    gc.freeze()  # garbage is collected before each call that is timed, and pytest's is none of it
    yield modules
    gc.unfreeze()


def table(folder):
    return (folder / "benchmarks.md").read_text()


def results(folder):
    return json.loads((folder / "benchmarks.json").read_text())


def run(benchmarks, folder, *subjects):
    benchmarks["__main__"].main([*subjects, "--quick", "--out", str(folder)])


@pytest.mark.parametrize(
    "subject", ["generation", "rewriting", "planning", "training", "inference", "hyperlstm"]
)
def test_a_subject_runs_and_its_files_agree(subject, benchmarks, tmp_path):
    run(benchmarks, tmp_path, subject)
    data, text = results(tmp_path), table(tmp_path)
    assert list(data["subjects"]) == [subject]
    rows = data["subjects"][subject]["rows"]
    assert len(rows) >= 2
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert len(row["subject"]) == len(row["yardstick"]) >= 1
        ratios = [a / b for a, b in zip(row["subject"], row["yardstick"], strict=True)]
        assert row["ratio"] == pytest.approx(statistics.median(ratios), rel=ROUNDING)
        assert min(ratios) <= row["quartiles"][0] <= row["ratio"] <= row["quartiles"][2]
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['name']} |"))
        assert f"| {row['ratio']:.3f}" in line
        assert (f"{row['target']:.2f}: " in line) if row["target"] else (": " not in line)
    assert torch.__version__.partition("+")[0] in text
    assert data["settings"]["seed"] == 0
    assert data["settings"]["versions"]["timm"] == timm.__version__
    assert (tmp_path / "benchmarks.png").read_bytes()[1:4] == b"PNG"


def test_a_second_run_measures_only_what_is_missing(benchmarks, tmp_path, monkeypatch, capsys):
    main, calls = benchmarks["__main__"], []
    Row = benchmarks["timing"].Row

    def subject(name):
        def rows(quick):
            calls.append(name)
            yield Row(f"{name} / other", (2.0, 3.0, 4.0), (1.0, 1.0, 1.0))
            if name in failing:
                raise KeyboardInterrupt

        return rows

    monkeypatch.setattr(main, "SUBJECTS", {name: subject(name) for name in "abc"})
    failing = {"b"}
    with pytest.raises(KeyboardInterrupt):
        run(benchmarks, tmp_path)
    assert list(results(tmp_path)["subjects"]) == ["a"]
    failing.clear()
    run(benchmarks, tmp_path)
    assert calls == ["a", "b", "b", "c"]
    assert "a: kept, of" in capsys.readouterr().out
    assert list(results(tmp_path)["subjects"]) == ["a", "b", "c"]
    assert "| a / other | 3 s | 1 s | 3.000 (2.500 to 3.500) |" in table(tmp_path)

    main.main(["b", "--quick", "--seed", "1", "--out", str(tmp_path)])
    assert calls[-1] == "b"
    assert list(results(tmp_path)["subjects"]) == ["b"]  # of one seed
    assert "all is measured again" in capsys.readouterr().out


def test_targets_are_judged_by_the_median(benchmarks):
    Row = benchmarks["timing"].Row
    ones = (1.0,) * 5
    for amounts, verdict in {
        (0.9, 1.0, 1.004, 1.2, 1.3): "yes",
        (0.9, 1.0, 1.02, 1.2, 1.3): "within the spread",
        (1.0, 1.1, 1.1, 1.2, 1.3): "no",
    }.items():
        assert Row("", amounts, ones, target=1.0).verdict == verdict
    assert Row("", ones, ones).verdict == ""
    assert Row("", target=1.0, note="not measured").verdict == ""


def test_pairs_are_timed_within_the_bounds(benchmarks):
    timing, calls = benchmarks["timing"], []
    effort = timing.Effort(3, 10, 0)
    row = timing.alternate("", lambda: calls.append("a"), lambda: calls.append("b"), effort)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert len(row.subject) == len(row.yardstick) == 3
    row = timing.alternate("", lambda: None, lambda: None, timing.Effort(1, 4, 60))
    assert len(row.subject) == 4


@pytest.mark.parametrize("options", [{}, {"embeddings": "channel"}, {"hidden_dim": 16}])
def test_the_bare_products_are_those_of_the_plan(options, benchmarks):
    from hyperize import hyperize
    from hyperize.parts import generated_layers

    convolutions = [nn.Conv2d(32, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 1)]
    hyper = hyperize(nn.Sequential(*convolutions), compression=4, seed=0, **options)
    macs = sum(
        left.shape[0] * left.shape[1] * right.shape[1]
        for layer in generated_layers(hyper).values()
        for left, right in benchmarks["generation"]._operands(layer, "weight")
    )
    assert macs == hyper.hypernet.plan.generator_macs


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_measured(benchmarks, tmp_path, monkeypatch, capsys):
    memory = benchmarks["memory"]

    def in_this_process(*arguments):
        memory.main([str(argument) for argument in arguments])
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(memory, "_in_a_process", in_this_process)
    run(benchmarks, tmp_path, "memory")
    rows = {row["name"]: row for row in results(tmp_path)["subjects"]["memory"]["rows"]}
    (state,) = (row for name, row in rows.items() if name.startswith("parameters, gradients"))
    assert state["ratio"] < 0.15  # a count
    assert all(row["unit"] == "bytes" for row in rows.values())
    for name, row in rows.items():
        if name.startswith("less the interpreter's"):
            whole = rows[name.replace("less the interpreter's own", "peak memory of an Adam step")]
            assert 0 < row["yardstick"][0] < whole["yardstick"][0]


def test_peers_that_are_missing_or_broken_are_marked(benchmarks, tmp_path, monkeypatch):
    peers = benchmarks["peers"]

    def generator(dense, plan):
        weights = [nn.Parameter(torch.zeros(p.site.shape)) for p in plan.sites]
        return peers.Made(lambda: [weight * 2 for weight in weights], weights, None)

    def broken(dense, plan):
        raise RuntimeError("needs an older | torch")

    monkeypatch.setattr(
        peers,
        "PEERS",
        {
            "absent": ("a-package-that-is-absent", broken),
            "broken": ("torch", broken),
            "generator": ("torch", generator),
        },
    )
    run(benchmarks, tmp_path, "peers")
    text = table(tmp_path)
    assert "| hyperize / absent | | | | | a-package-that-is-absent is not installed |" in text
    assert text.count("does not run: RuntimeError: needs an older / torch |") == len(peers.WORKS)
    rows = {row["name"]: row for row in results(tmp_path)["subjects"]["peers"]["rows"]}
    assert "ratio" not in rows["making resnet10t, hyperize / broken"]
    assert len(rows["making resnet10t, hyperize / generator"]["subject"]) == 2
    assert len(rows["generating the weights of resnet10t, hyperize / generator"]["subject"]) == 2
    assert rows["training step of resnet10t, hyperize / generator"]["note"].startswith("cannot: ")


def installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_every_peer_that_is_installed_runs(benchmarks, tmp_path):
    run(benchmarks, tmp_path, "peers")
    rows = results(tmp_path)["subjects"]["peers"]["rows"]
    for title, (package, _) in benchmarks["peers"].PEERS.items():
        of_peer = [row for row in rows if row["name"].endswith(f"hyperize / {title}")]
        if installed(package):
            assert len(of_peer) == len(benchmarks["peers"].WORKS)
            assert not [row for row in of_peer if row["note"].startswith("does not run")]
        else:
            assert [row["note"] for row in of_peer] == [f"{package} is not installed"]


def test_unknown_subjects_are_refused(benchmarks, capsys):
    with pytest.raises(SystemExit):
        benchmarks["__main__"].main(["speed"])
    assert "no subject 'speed'; there are generation, " in capsys.readouterr().err
