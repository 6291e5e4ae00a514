"""The benchmarks run, and what they write agrees with itself. No time is asserted."""

import gc
import importlib.metadata
import json
import statistics
import time
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
        for name in (
            "__main__",
            "gpu",
            "device",
            "fit",
            "generation",
            "making",
            "memory",
            "output",
            "peers",
            "timing",
        )
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
    "subject",
    [
        "generation",
        "rewriting",
        "planning",
        "training",
        "inference",
        "hyperlstm",
        "optimizer",
        "fit",
    ],
)
def test_a_subject_runs_and_its_files_agree(subject, benchmarks, tmp_path):
    run(benchmarks, tmp_path, subject)
    check_files(tmp_path, subject)


def check_files(tmp_path, subject):
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
        judged = f"| {row['target']:.2f}: " if row["target"] else "|  |"
        assert judged in line
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


# --------------------------------------------------------------------------------------- on a GPU
@pytest.fixture
def card(benchmarks, monkeypatch):
    """A device that is this CPU, as far as the benchmarks ask; torch's compiler only traces."""

    class Card(benchmarks["device"].Cuda):
        type = "cpu"
        backend = "eager"
        peak = 0

        def machine(self):
            return {"": "a card of paper", "driver": "1.2", "tf32": "off"}

        def synchronize(self):
            pass

        def seconds(self, work, calls=1):
            start = time.perf_counter()
            for _ in range(calls):
                work()
            return (time.perf_counter() - start) / calls

        def peak_memory(self, work):
            work()
            self.peak += 1000
            return self.peak

        def free(self):
            pass

    found = Card()
    monkeypatch.setattr(benchmarks["device"], "find", lambda: found)
    return found


def run_on(benchmarks, folder, *arguments):
    benchmarks["__main__"].main(["--device", "cuda", "--out", str(folder), *arguments])


CUDA = (
    "training",
    "inference",
    "lstm",
    "hyperlstm",
    "generation",
    "memory",
    "compiled",
    "peers",
    "others",
)


def test_a_gpu_has_these_subjects(benchmarks):
    assert tuple(benchmarks["gpu"].SUBJECTS) == CUDA


@pytest.mark.parametrize("subject", [name for name in CUDA if name != "peers"])
def test_a_subject_of_a_gpu_runs(subject, benchmarks, card, tmp_path):
    run_on(benchmarks, tmp_path, "--quick", subject)
    check_files(tmp_path, subject)
    assert ", a card of paper, driver 1.2, tf32 off, " in table(tmp_path)
    assert results(tmp_path)["settings"]["device"]["driver"] == "1.2"
    assert not [row for row in rows_of(tmp_path, subject) if row["note"].startswith("failed")]


def rows_of(folder, subject):
    return results(folder)["subjects"][subject]["rows"]


def test_peers_on_a_gpu(benchmarks, card, tmp_path, monkeypatch):
    peers = benchmarks["peers"]

    def generator(dense, plan):
        weights = [nn.Parameter(torch.zeros(p.site.shape)) for p in plan.sites]
        return peers.Made(lambda: [weight * 2 for weight in weights], weights, dense)

    monkeypatch.setattr(peers, "PEERS", {"generator": ("torch", generator)})
    run_on(benchmarks, tmp_path, "--quick", "peers")
    rows = rows_of(tmp_path, "peers")
    assert len(rows) == len(peers.WORKS)
    assert all(row["subject"] for row in rows)
    made = peers._on("meta", lambda dense, plan: peers.Made(list, [], nn.Linear(2, 2)))
    assert made(None, None).network.weight.is_meta


def test_all_models_of_a_gpu_can_be_made(benchmarks):
    gpu = benchmarks["gpu"]
    groups = [value for name, value in vars(gpu).items() if name.isupper()]
    cases = [c for g in groups if isinstance(g, tuple) for c in g if isinstance(c, gpu.Case)]
    assert len(cases) > 15
    for case in {case.model: case for case in cases}.values():
        with torch.device("meta"):
            dense, inputs = case.make()
            assert case.hyperize(dense, "factorized") is not dense
            assert len(inputs) == case.batch


@pytest.mark.parametrize("subject", ["training", "inference", "compiled", "others"])
def test_the_full_subjects_do_as_the_quick_ones(subject, benchmarks, card, monkeypatch):
    gpu = benchmarks["gpu"]
    effort = benchmarks["timing"].QUICK
    monkeypatch.setattr(gpu, "FULL", effort)
    monkeypatch.setattr(gpu, "REPETITION", 0)
    for name in ("TRAINING", "INFERENCE", "OTHER_TRAINING", "OTHER_INFERENCE"):
        monkeypatch.setattr(gpu, name, gpu.SMALL[:1])
    for name in ("COMPILED", "OTHER_COMPILED", "OTHER_COMPILED_INFERENCE"):
        monkeypatch.setattr(gpu, name, gpu.SMALL_COMPILED[:1])
    rows = list(gpu.SUBJECTS[subject](gpu.Bench(card)))
    assert all(len(row.subject) == effort.least for row in rows)
    assert not [row.name for row in rows if not row.subject]


def test_what_fails_is_a_row_and_the_run_goes_on(benchmarks, card):
    gpu, calls = benchmarks["gpu"], []

    def fails():
        raise torch.OutOfMemoryError("no memory\nat all")

    def fails_late():
        calls.append(0)
        if len(calls) > gpu.WARM_UP + 1:
            raise RuntimeError("late")

    bench = gpu.Bench(card, quick=True)
    makers = {"dense": lambda: lambda: None, "a": fails, "b": lambda: lambda: None}
    pairs = [gpu.Pair("a / dense", "a"), gpu.Pair("b / dense", "b"), gpu.Pair("a / b", "a", "b")]
    a, b, both = gpu.compare(bench, pairs, makers)
    assert a.note == both.note == "failed: OutOfMemoryError: no memory"
    assert not a.subject
    assert len(b.subject) == 2
    late = gpu.compare(bench, pairs[:1], makers | {"a": lambda: fails_late})
    assert late[0].note == "failed: RuntimeError: late"
    case = gpu.Case("no_such_model", 32, 2, 1.0)
    rows = [*gpu._training(bench, [case]), *gpu._inference(bench, [case])]
    assert len(rows) == 6
    assert all(row.note.startswith("failed: ") for row in rows)
    assert gc.isenabled()


def test_nothing_is_begun_that_would_end_too_late(benchmarks, card, tmp_path, monkeypatch, capsys):
    gpu = benchmarks["gpu"]
    monkeypatch.setattr(gpu, "FULL", benchmarks["timing"].QUICK)
    monkeypatch.setattr(gpu, "TRAINING", gpu.SMALL[:1])
    run_on(benchmarks, tmp_path, "training", "--seconds", "1")
    rows = rows_of(tmp_path, "training")
    assert all(row["note"].startswith("not measured: no time left") for row in rows)
    run_on(benchmarks, tmp_path, "training")  # which has more time, and is not kept from it
    assert all(row["subject"] for row in rows_of(tmp_path, "training"))
    run_on(benchmarks, tmp_path, "training")
    assert "training: kept, of" in capsys.readouterr().out
    bench = gpu.Bench(card, seconds=60, slowest=70)  # compiling has taken longer than is left
    assert gpu.is_short([{"note": row.note} for row in gpu.compiled(bench)])


def test_without_a_device_there_is_one_line(benchmarks, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        run_on(benchmarks, tmp_path)
    assert error.value.code == (
        "python -m benchmarks: error: --device cuda: torch sees no CUDA device"
    )


def test_a_device_is_asked_as_torch_has_it(benchmarks, monkeypatch, tmp_path):
    """With all that only CUDA has replaced, by names that torch must have."""
    device, log = benchmarks["device"], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("waited")

        def elapsed_time(self, end):
            return 3000.0

    replaced = {
        "Event": Event,
        "synchronize": lambda: log.append("synchronized"),
        "empty_cache": lambda: log.append("emptied"),
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 350,
        "reset_peak_memory_stats": lambda: log.append("reset"),
        "get_device_name": lambda: "a card",
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert all(hasattr(torch.Event, name) for name in ("record", "synchronize", "elapsed_time"))
    with monkeypatch.context() as during:
        during.setattr(torch.cuda, "is_available", lambda: True)
        found = device.find()
    assert found.type == "cuda"
    assert found.seconds(lambda: log.append("work"), 2) == 1.5
    assert log == ["synchronized", "event", "work", "work", "event", "waited"]
    log.clear()
    assert found.peak_memory(lambda: log.append("work")) == 250
    assert log == ["emptied", "reset", "work", "synchronized"]
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    with found.settings():
        assert torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32
    assert before == (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32)

    monkeypatch.setattr(device, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert found.machine()["driver"] == "unknown"
    device.DRIVER.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat\n")
    facts = device.facts(found, "all of it")
    assert facts[""] == "a card"
    assert facts["driver"] == "535.104.05"
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 580.1\n")
    command.chmod(0o755)
    monkeypatch.setattr(device.shutil, "which", lambda name: str(command))
    assert found.machine()["driver"] == "580.1"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_quick_run_on_a_gpu(benchmarks, tmp_path):
    run_on(benchmarks, tmp_path, "--quick")
    for subject in CUDA:
        rows = rows_of(tmp_path, subject)
        assert not [row["note"] for row in rows if row["note"].startswith("failed")]
    assert torch.cuda.get_device_name() in table(tmp_path)
