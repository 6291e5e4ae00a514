"""The compression of pretrained models, on images and a teacher made here."""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from models import count
from PIL import Image
from safetensors.torch import load_file, save_file

import hyperize

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).parents[1] / "examples"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = ("blue", "green", "red")


@pytest.fixture
def script(monkeypatch):
    """The example, imported as a script would be, with a ResNet-8 among its models."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("compress_pretrained")
    monkeypatch.setitem(module.SIZES, "tiny", 1)
    return module


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny ImageFolder data set: three classes, each of one colour, in noise."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, size in (("train", 9), ("test", 5)):
        for channel, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(size):
                pixels = rng.integers(0, 200, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 20
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def images_of(root, split):
    """What a model is to see, (x / 255 - mean) / std, and the labels."""
    files = sorted((root / split).glob("*/*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files]))
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    return ((pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2), labels


def plain_model(classes=3):
    return sys.modules["train_cifar"].ResNet(1, classes)


@pytest.fixture(scope="module")
def trained(root):
    """The state dict of a ResNet-8 that was trained on the images."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(EXAMPLES)
        importlib.import_module("train_cifar")
    torch.manual_seed(0)
    model = plain_model()
    inputs, labels = images_of(root, "train")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model.state_dict()


@pytest.fixture
def weights(trained, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(trained, path)
    return path


@pytest.fixture
def flags(root, weights, tmp_path):
    """The flags of a short run, which writes to `tmp_path / "out"`."""
    return [
        *("--data-dir", str(root), "--model", "tiny", "--checkpoint", str(weights)),
        *(
            "--compression",
            "2",
            "--embeddings",
            "tile",
            "--fit-samples",
            "20",
            "--batch-size",
            "8",
            "--epochs",
            "2",
        ),
        *("--device", "cpu", "--out", str(tmp_path / "out")),
    ]


def correct(model, root):
    """The share of the test set that a model gets right."""
    inputs, labels = images_of(root, "test")
    with torch.no_grad():
        return (model.eval()(inputs).argmax(1) == labels).float().mean().item()


# ------------------------------------------------------------------------------------ a whole run
def test_a_run_and_its_files(script, root, flags, trained, tmp_path, capsys):
    stages = script.main(flags)
    captured = capsys.readouterr()
    assert not captured.err
    out = tmp_path / "out"
    small, exported = out / "hyper.safetensors", out / "dense.safetensors"

    # The files alone give what the table says, on inputs made by the formula
    teacher, dense = plain_model(), plain_model()
    teacher.load_state_dict(trained)
    dense.load_state_dict(load_file(exported), strict=True)
    student = hyperize.load(plain_model(), small)
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)["runs"][0]
    fitted, *epochs = checkpoint["curve"]
    assert [(row.name, row.accuracy) for row in stages] == [
        ("teacher", correct(teacher, root)),
        ("fitted", fitted),
        ("fine-tuned", correct(student, root)),
        ("exported, dense", correct(dense, root)),
    ]
    assert stages[0].accuracy > 0.9
    assert len(epochs) == 2
    assert epochs[-1] == stages[2].accuracy
    assert [row.params for row in stages] == [count(m) for m in (teacher, student, student, dense)]
    assert count(student) < 0.55 * count(teacher)
    sizes = [path.stat().st_size for path in (exported, small)]
    assert [row.size for row in stages] == [sizes[0], sizes[1], sizes[1], sizes[0]]
    for row in stages:
        figures = (f"{row.accuracy:.2%}", f"{row.params:,}", f"{row.size:,}")
        line = next(x for x in captured.out.splitlines() if x.startswith(f"{row.name}  "))
        assert line.removeprefix(row.name).split() == list(figures)

    # The small file holds the model that was trained, and the dense one what it generates
    assert student.state_dict().keys() == checkpoint["model"].keys()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, checkpoint["model"][name]), name
    inputs, _ = images_of(root, "test")
    assert torch.equal(student(inputs), dense(inputs))
    with Image.open(out / "accuracy.png") as picture:
        assert picture.size == (990, 396)


def test_fine_tuning_wins_back_what_a_fit_without_data_lost(script, flags):
    options = ["--fit-samples", "0", "--steps", "40", "--lr", "0.01"]
    epochs = flags.index("--epochs")
    teacher, fitted, tuned, _ = script.main([*flags[:epochs], *flags[epochs + 2 :], *options])
    assert teacher.accuracy > 0.9
    assert fitted.accuracy < 0.7
    assert tuned.accuracy > 0.8


def test_what_the_fit_looks_at(script, root, flags, monkeypatch):
    seen = []

    def fit(student, teacher, data):
        seen.append(data)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "fit_", fit)
    for options in ([], [], ["--seed", "1"], ["--fit-samples", "0"]):
        with pytest.raises(KeyboardInterrupt):
            script.main([*flags, *options])
    first, again, other, none = seen
    assert none is None
    assert [len(batch) for batch in first] == [7, 7, 6]  # no batch of a few for batch norm
    first, again, other = (torch.cat(batches) for batches in (first, again, other))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # As they are, neither cropped nor flipped
    found = (first[:, None] - images_of(root, "train")[0]).abs().flatten(2).amax(2).min(1)
    assert found.values.max() < 1e-5
    assert len(found.indices.unique()) == 20
    assert (found.indices >= 18).any()  # not the first of a set sorted by class
    assert (found.indices < 9).any()


def test_amp_changes_the_training_alone(script, flags, tmp_path):
    states, stages = [], []
    for name, options in (("float", []), ("half", ["--amp"])):
        stages.append(
            script.main([*flags, *options, "--fit-samples", "0", "--out", str(tmp_path / name)])
        )
        states.append(load_file(tmp_path / name / "hyper.safetensors"))
    assert stages[0][:2] == stages[1][:2]
    name = "linear.weight"
    assert not torch.equal(states[0][name], states[1][name])
    torch.testing.assert_close(states[0][name], states[1][name], atol=0.02, rtol=0.2)


def test_a_missing_matplotlib_costs_the_picture_alone(script, flags, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "matplotlib.figure", None)
        stages = script.main(flags)
    assert len(stages) == 4
    assert "pip install 'hyperize[plot]'" in capsys.readouterr().out
    assert not (tmp_path / "out" / "accuracy.png").exists()
    script.main(flags)
    assert (tmp_path / "out" / "accuracy.png").exists()


def test_an_export_that_predicts_otherwise_is_an_error(script, flags, monkeypatch, capsys):
    convert = script.convert

    def convert_otherwise(student, path):
        convert(student, path)
        state = load_file(path)
        state["linear.bias"][1] += 100
        save_file(state, path)

    monkeypatch.setattr(script, "convert", convert_otherwise)
    with pytest.raises(SystemExit, match="1"):
        script.main(flags)
    assert "dense.safetensors gives other predictions for" in capsys.readouterr().err


# -------------------------------------------------------------------------------- kill and resume
def test_a_stopped_run_ends_as_if_it_had_not_stopped(script, flags, tmp_path, monkeypatch, capsys):
    class Dropping(type(plain_model())):  # draws random numbers as it trains
        def forward(self, images):
            return F.dropout(super().forward(images), 0.2, self.training)

    monkeypatch.setattr(script, "create_model", lambda name, classes: Dropping(1, classes))
    whole, again = ([*flags, "--out", str(tmp_path / name)] for name in ("whole", "again"))
    stages = script.main(whole)
    suspend = script.suspend

    def suspend_and_stop(path, runs, settings, done):
        suspend(path, runs, settings, done)
        raise KeyboardInterrupt

    for epochs in (0, 1):  # after the fit, and, gone on from there, after an epoch
        with monkeypatch.context() as patched:
            patched.setattr(script, "suspend", suspend_and_stop)
            with pytest.raises(KeyboardInterrupt):
                script.main(again)
        half = torch.load(tmp_path / "again" / "checkpoint.pt", weights_only=True)
        assert half["epochs"] == epochs
        assert len(half["runs"][0]["curve"]) == epochs + 1
        monkeypatch.setattr(script, "fit_", None)  # is done once
    capsys.readouterr()
    assert script.main(again) == stages
    assert "resumed after epoch 1" in capsys.readouterr().out
    for name in ("hyper.safetensors", "dense.safetensors"):
        a, b = ((tmp_path / run / name).read_bytes() for run in ("whole", "again"))
        assert a == b, name
    curves = [
        torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["runs"][0]["curve"]
        for run in ("whole", "again")
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 3

    monkeypatch.setattr(script, "fine_tune", None)
    monkeypatch.setattr(script, "suspend", None)
    assert script.main(again) == stages  # finished: only evaluated


def test_a_run_is_known_by_its_flags_and_its_teacher(script, flags, trained, tmp_path, capsys):
    flags = [*flags, "--epochs", "1", "--fit-samples", "0"]
    script.main(flags)
    with pytest.raises(SystemExit, match="1"):
        script.main([*flags, "--lr", "0.1"])
    assert "was made with {'lr': 0.003}, not {'lr': 0.1}" in capsys.readouterr().err

    moved = tmp_path / "moved.pt"
    torch.save({"state_dict": trained}, moved)  # as timm's own training writes it
    script.main([*flags, "--checkpoint", str(moved)])
    assert "resumed after epoch 1" in capsys.readouterr().out
    torch.save(trained | {"linear.bias": trained["linear.bias"] + 1}, moved)
    with pytest.raises(SystemExit, match="1"):
        script.main([*flags, "--checkpoint", str(moved)])
    assert "was made with {'checkpoint': '" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- training
def test_the_loss(script):
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    labels = torch.arange(4)
    p, q = ((logits / 3).softmax(1) for logits in (teacher, student))
    kl = (p * (p / q).log()).sum() / 4
    expected = 0.7 * 9 * kl + 0.3 * F.cross_entropy(student, labels)
    torch.testing.assert_close(script.distillation(student, teacher, labels, 3.0, 0.7), expected)


def test_the_learning_rate(script, root):
    train = script.read(root)[0]
    args = script.make_parser().parse_args(
        ["--data-dir", "x", "--pretrained", "--steps", "50", "--lr", "2"]
    )
    student = hyperize.hyperize(plain_model(), compression=2)
    run = script.make_student_run(student, script.steps_of(args, train), args)
    rates = []
    for _ in range(run.steps):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        run.schedule.step()
    assert len(rates) == 50
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * i / 40) for i in range(40)])
    assert run.optimizer.param_groups[0]["lr"] == 0
    decays = [group["weight_decay"] for group in run.optimizer.param_groups]
    assert decays == [0.01, 0]


def test_the_last_epoch_ends_with_the_steps(script, flags, tmp_path):
    at = flags.index("--epochs")
    # 4 make an epoch
    script.main([*flags[:at], "--steps", "6", *flags[at + 2 :], "--fit-samples", "0"])
    run = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["runs"][0]
    assert run["schedule"]["last_epoch"] == 6
    assert len(run["curve"]) == 3


# ----------------------------------------------------------------------------- timm and its weights
def test_weights_of_timm(script, root, flags, tmp_path, monkeypatch, capsys):
    create = timm.create_model
    pretrained = create("test_resnet", num_classes=3)
    asked = []

    def create_model(name, **options):
        asked.append(options)
        return pretrained if options.get("pretrained") else create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    at = flags.index("--model")
    flags = [*flags[:at], *flags[at + 4 :], "--model", "test_resnet", "--pretrained"]
    stages = script.main([*flags, "--epochs", "1", "--fit-samples", "0"])
    assert asked[0] == {"pretrained": True}
    assert {"num_classes": 3} in asked
    assert sum(options.get("pretrained", False) for options in asked) == 1
    assert stages[0].params == stages[3].params == count(pretrained)
    assert stages[0].accuracy == correct(pretrained, root)
    create(  # the export is timm's own checkpoint
        "test_resnet", num_classes=3, checkpoint_path=tmp_path / "out" / "dense.safetensors"
    )

    capsys.readouterr()
    pretrained = create("test_resnet")
    with pytest.raises(SystemExit, match="1"):
        script.main(flags)
    assert "outputs of the shape (1, 1000) for one image; --data-dir has 3" in _error(capsys)


# ----------------------------------------------------------------------------------------- errors
def _error(capsys):
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--kd-weight", "1.5"], "argument --kd-weight: must be from 0 to 1, got 1.5"),
        (["--kd-temperature", "0"], "argument --kd-temperature: must be above 0, got 0"),
        (["--std", "1", "0", "1"], "argument --std: must be above 0, got 0"),
        (["--lr", "x"], "argument --lr: invalid number value: 'x'"),
        (["--fit-samples", "-1"], "argument --fit-samples: must be at least 0, got -1"),
        (["--steps", "1"], "argument --steps: not allowed with argument --epochs"),
        (["--pretrained"], "argument --pretrained: not allowed with argument --checkpoint"),
        (["--compression", "1e9"], "compression"),
        (["--data-dir", "nowhere"], "--data-dir nowhere"),
        (["--model", "resnet19"], "--model resnet19: Unknown model (resnet19)"),
        (["--model", "vit_tiny_patch16_224"], "does not fit the model: it lacks"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_that_are_wrong(options, error, script, flags, tmp_path, capsys):
    code = "2" if error.startswith("argument") else "1"
    with pytest.raises(SystemExit, match=code):
        script.main([*flags, *options])
    assert error in _error(capsys)
    assert not (tmp_path / "out").exists()


def test_weights_have_to_be_named(script, flags, capsys):
    at = flags.index("--checkpoint")
    flags = [*flags[:at], *flags[at + 2 :]]
    with pytest.raises(SystemExit, match="2"):
        script.main(flags)
    assert "one of the arguments --checkpoint --pretrained is required" in _error(capsys)
    with pytest.raises(SystemExit, match="1"):
        script.main([*flags, "--pretrained"])
    assert "--model tiny: timm has no weights of it; give a --checkpoint" in _error(capsys)


class Trap:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_files_that_are_not_the_weights(script, flags, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    junk, trap, nested = Path("junk.safetensors"), Path("trap.pt"), Path("list.pt")
    junk.write_bytes(b"no weights")
    torch.save({"conv1.weight": Trap()}, trap)
    torch.save([1, 2], nested)
    less, classes = Path("less.pt"), Path("classes.pt")
    torch.save({("other." + n if "linear" in n else n): t for n, t in trained.items()}, less)
    torch.save(plain_model(4).state_dict(), classes)
    for path, error in (
        (Path("none.pt"), "none.pt: no such file"),
        (tmp_path, f"{tmp_path}: no such file"),
        (junk, "junk.safetensors is not a file of weights: Error while deserializing header"),
        (trap, "trap.pt is not a file of weights: "),
        (nested, "list.pt is not a file of weights: "),
        (
            less,
            "less.pt does not fit the model: it lacks 2 of its tensors (linear.weight first) and "
            "has 2 others (other.linear.weight first)",
        ),
        (
            classes,
            "classes.pt does not fit the model, or has other classes than --data-dir: its "
            "linear.weight has the shape (4, 64), needed is (3, 64)",
        ),
    ):
        with pytest.raises(SystemExit, match="1"):
            script.main([*flags, "--checkpoint", str(path)])
        assert f": --checkpoint {error}" in _error(capsys)
    assert not Path("trapped").exists()


def test_a_model_that_cannot_run_the_images(script, flags, tmp_path, capsys):
    name = "test_convnext"  # halves the sides five times
    path = tmp_path / "convnext.pt"
    torch.save(timm.create_model(name, num_classes=3).state_dict(), path)
    with pytest.raises(SystemExit, match="1"):
        script.main([*flags, "--model", name, "--checkpoint", str(path)])
    assert "--model test_convnext cannot run images of the shape (3, 16, 16)" in _error(capsys)


def test_images_of_several_sizes(script, flags, tmp_path, capsys):
    for split in ("train", "test"):
        for name in CLASSES:
            folder = tmp_path / "mixed" / split / name
            folder.mkdir(parents=True)
            size = 9 if name == "red" else 8
            Image.new("RGB", (size, size)).save(folder / "0.png")
    with pytest.raises(SystemExit, match="1"):
        script.main([*flags, "--data-dir", str(tmp_path / "mixed")])
    assert f"--data-dir {tmp_path / 'mixed'}: all input arrays must have the same shape" in _error(
        capsys
    )


# ------------------------------------------------------------------------------------ the benchmark
def test_the_benchmark_trains_every_method_once(
    script, root, weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(EXAMPLES.parent)
    benchmark = importlib.import_module("benchmarks.compress")
    flags = [
        *("--data-dir", str(root), "--model", "tiny", "--checkpoint", str(weights)),
        *("--fit-samples", "8", "--batch-size", "8", "--epochs", "1", "--ratios", "2"),
        *("--device", "cpu", "--out", str(tmp_path / "out")),
    ]
    benchmark.main(flags)
    table = capsys.readouterr().out
    for name in benchmark.METHODS:
        assert f"| 2x | {name} |" in table
    results = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json")}
    assert len(results) == len(benchmark.METHODS)
    counts = {r["settings"]["method"]: r["parameters"] for r in map(json.loads, results.values())}
    dense = sum(p.numel() for p in plain_model().parameters())
    assert counts["dense"] == counts["continued"] == dense
    assert max(counts[name] for name in counts if name not in ("dense", "continued")) < dense
    before = {r["settings"]["method"]: r["before"] for r in map(json.loads, results.values())}
    assert before["continued"] == correct(_filled(weights), root)

    monkeypatch.setattr(benchmark, "fine_tune", None)  # nothing is trained a second time
    benchmark.main(flags)
    assert capsys.readouterr().out.splitlines()[-1] == table.splitlines()[-1]


def test_files_in_all_bits(script, root, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES.parent)
    benchmark = importlib.import_module("benchmarks.compress")
    frontier = benchmark.frontier
    made = {}
    measure = frontier.measure

    def kept(model, accuracy, train):
        before = {name: t.clone() for name, t in model.state_dict().items()}
        rows = measure(model, accuracy, train)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        made[type(model).__name__, frontier.generated_layers(model) != {}] = model
        return rows

    monkeypatch.setattr(frontier, "measure", kept)
    methods = ("channel", "continued", "svd")
    flags = [
        *("--data-dir", str(root), "--model", "tiny", "--checkpoint", str(weights)),
        *("--fit-samples", "8", "--batch-size", "8", "--epochs", "1", "--ratios", "2", "4"),
        *("--device", "cpu", "--out", str(tmp_path / "out"), "--bit-steps", "2"),
        *("--methods", *methods),
    ]
    benchmark.main(flags)
    table = capsys.readouterr().out
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert len(results) == 5  # the continued one only once
    names = ("hyperize 2x", "hyperize 4x", "dense", "svd 2x", "svd 4x")
    for result in results:
        files = {row["bits"]: row for row in result["files"]}
        assert files[32]["as_is"] == result["curve"][-1]
        sizes = [files[bits]["bytes"] for bits in (32, 16, 8, 4)]
        assert sizes == sorted(sizes, reverse=True)
    for bits in (32, 16, 8, 4):
        assert all(f"| {name}, {bits} bits | " in table for name in names)
    assert (tmp_path / "out" / "tiny-files.png").exists()

    x = torch.randn(3, 3, 16, 16)
    for (_, generated), model in made.items():
        model.eval()
        for bits in (16, 8, 4):
            path = tmp_path / "file.safetensors"
            if generated:
                dtype = {16: torch.float16, 8: "int8", 4: "int4"}[bits]
                hyperize.save(model, path, dtype=dtype)
                again = hyperize.load(hyperize.to_dense(model), path).eval()
                assert torch.equal(again(x), frontier.in_bits(model, bits)(x))
                assert path.stat().st_size == frontier.size_of(model, bits)
            else:
                assert not torch.equal(model(x), frontier.in_bits(model, bits)(x))
    output = frontier.in_bits(model, 4)(x).square().sum()
    output.backward()  # through the rounding, to the parameters themselves
    assert all(p.grad is not None for p in model.parameters())


def _filled(weights):
    model = plain_model()
    model.load_state_dict(load_file(weights))
    return model


@pytest.mark.parametrize(("name", "layers"), [(f"resnet{n}", n) for n in (20, 32, 44, 56, 110)])
def test_the_networks_of_cifar(script, name, layers):
    model = script.create_model(name, 10)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == layers
