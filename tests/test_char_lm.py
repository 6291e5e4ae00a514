"""The character language model of the examples, on small texts made here."""

import builtins
import importlib
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).parents[1] / "examples"
RTOL = 1e-5
"""Of sums of float32 losses that are taken in another order."""
SMALL = ["--hidden", "32", "--hyper-size", "8", "--embedding-dim", "2", "--compression", "2"]
SMALL += ["--steps", "6", "--seq-len", "8", "--batch-size", "4", "--eval-every", "2"]
SMALL += ["--sample", "20", "--dropout", "0.2", "--device", "cpu"]


@pytest.fixture
def char_lm(monkeypatch):
    """The example, imported as a script would be."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("char_lm")


@pytest.fixture
def path(tmp_path):
    """A file of 2,000 characters, of 13 kinds and one, two, three and four bytes."""
    words = ["abc", "defg", "bad", "\N{GREEK SMALL LETTER PI}", "\N{EURO SIGN}\N{GRINNING FACE}h"]
    picks = torch.randint(len(words), (1000,)).tolist()
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words[i] for i in picks)[:1999] + "\n", encoding="utf-8")
    return path


@pytest.fixture
def text(char_lm, path):
    return char_lm.read(path)[0]


def make_recipe(char_lm, **changes):
    values = {
        "text": "",
        "hidden": 8,
        "hyper_size": 4,
        "embedding_dim": 2,
        "compression": 2.0,
        "steps": 10,
        "seq_len": 7,
        "batch_size": 3,
        "lr": 0.01,
        "dropout": 0.0,
        "seed": 0,
        "eval_every": 5,
    }
    return char_lm.Recipe(**values | changes)


def test_all_variants_and_their_files(char_lm, path, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    results = char_lm.main(["--text", str(path), *SMALL, "--out", str(out), "--prompt", "bad "])
    assert tuple(row.name for row in results) == char_lm.VARIANTS
    by_name = {row.name: row for row in results}
    assert by_name["static"].params < by_name["lstm"].params < by_name["hyperlstm"].params
    assert by_name["hyperlstm"].params < by_name["ln-hyperlstm"].params
    assert by_name["hyperlstm"].params <= by_name["lstm-wide"].params
    captured = capsys.readouterr()
    assert not captured.err
    for row in results:
        assert [step for step, *_ in row.curve] == [2, 4, 6]
        assert 0 < row.curve[0][1] < row.curve[1][1] < row.curve[2][1]
        # Not far from a uniform distribution over 13 characters after so few steps
        assert 0.5 * math.log2(13) < row.test_bpc < 1.1 * math.log2(13)
        assert len(row.sample) == 20
        assert f"--- {row.name} ---\nbad {row.sample}" in captured.out
        line = next(x for x in captured.out.splitlines() if x.startswith(f"{row.name} "))
        assert line.split() == [
            row.name,
            f"{row.params:,}",
            f"{row.valid_bpc:.3f}",
            f"{row.test_bpc:.3f}",
            f"{row.step_ms:.1f}",
            "ms",
        ]
    kept = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [row["test_bpc"] for row in kept] == [row.test_bpc for row in results]
    assert not list(out.glob("*.part"))


def test_the_chart_has_a_line_per_variant_on_both_panels(char_lm, tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []

    class Figure(figure_module.Figure):
        def savefig(self, *args, **kwargs):
            drawn.append(self)
            super().savefig(*args, **kwargs)

    monkeypatch.setattr(figure_module, "Figure", Figure)
    curve = [(10, 60.0, 3.0), (20, 150.0, 2.5)]
    results = [
        char_lm.Result("lstm", 1000, 2.5, 2.6, 1.0, curve, ""),
        char_lm.Result("static", 2000, 2.5, 2.6, 1.0, [curve[0]], ""),
    ]
    char_lm.plot(results, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    steps, minutes = (axes.lines for axes in drawn[0].axes)
    assert [line.get_label() for line in steps] == ["lstm (1 k)", "static (2 k)"]
    assert steps[0].get_xydata().tolist() == [[10, 3.0], [20, 2.5]]
    assert minutes[0].get_xydata().tolist() == [[1, 3.0], [2.5, 2.5]]


def test_without_matplotlib_all_but_the_chart_is_made(char_lm, path, tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    flags = ["--text", str(path), *SMALL, "--models", "lstm", "--out", str(tmp_path)]
    char_lm.main(flags)
    assert "pip install 'hyperize[plot]'" in capsys.readouterr().out
    assert (tmp_path / "results.json").is_file()
    assert not (tmp_path / "char_lm.png").exists()


def test_the_splits_are_the_text(char_lm, path, text):
    original = path.read_text(encoding="utf-8")
    assert text.characters == "".join(sorted(set(original)))
    assert [len(text.train), len(text.valid), len(text.test)] == [1800, 100, 100]
    assert text.decode(torch.cat((text.train, text.valid, text.test)).tolist()) == original
    assert torch.equal(text.encode(original[:50]), text.train[:50])


def test_windows_go_on_where_the_last_ended_and_cover_the_text(char_lm):
    recipe = make_recipe(char_lm)
    ids = torch.arange(100)
    windows = [char_lm.window(ids, step, recipe) for step in range(5)]
    assert [row[0].item() for row in windows[0]] == [0, 33, 66]
    for before, after in pairwise(windows):
        assert torch.equal(before[:, -1], after[:, 0])
    for row in torch.cat([w[:, 1:] for w in windows], 1):
        assert (row.diff() % 100 == 1).all()
    assert set(torch.cat(windows).flatten().tolist()) == set(range(100))


def test_bits_of_a_uniform_model(char_lm, text):
    model = char_lm.make_lstm(13, 8, 0.0)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    for streams in (1, 7):
        bpc = char_lm.bits_per_character(model, text.valid, streams)
        assert bpc == pytest.approx(math.log2(13), rel=RTOL)


@torch.no_grad()
def test_bits_carry_the_state_as_one_long_call(char_lm, text, monkeypatch):
    model = char_lm.make_lstm(13, 8, 0.5)
    nn.init.normal_(model.lstm.weight_hh_l0)  # a long memory
    logits, _ = model.eval()(text.test[None, :-1])
    expected = F.cross_entropy(logits[0], text.test[1:]).item() / math.log(2)
    monkeypatch.setattr(char_lm, "CHUNK", 9)  # 11 calls of 9 characters
    assert char_lm.bits_per_character(model.train(), text.test) == pytest.approx(expected, rel=RTOL)


@torch.no_grad()
def test_bits_in_streams_count_each_character_once(char_lm, text, monkeypatch):
    model = char_lm.make_lstm(13, 8, 0.0).eval()
    monkeypatch.setattr(char_lm, "CHUNK", 4)
    bits = 0.0
    for part in (slice(0, 25), slice(25, 50), slice(50, 75), slice(75, 99)):  # 99 to predict
        logits, _ = model(text.test[:-1][part][None])
        bits += F.cross_entropy(logits[0], text.test[1:][part], reduction="sum").item()
    expected = bits / 99 / math.log(2)
    assert char_lm.bits_per_character(model, text.test, 4) == pytest.approx(expected, rel=RTOL)
    for streams in (98, 200):  # some have nothing to read
        assert char_lm.bits_per_character(model, text.test, streams) > 0


def test_training_carries_the_detached_state(char_lm, text):
    recipe = make_recipe(char_lm)
    run = char_lm.make_run("lstm", text, recipe, "cpu")
    calls = []
    run.model.register_forward_hook(lambda _, args, output: calls.append((args[1], output[1])))
    char_lm.train_step(run, char_lm.window(text.train, 0, recipe), recipe)
    run.step = 1
    char_lm.train_step(run, char_lm.window(text.train, 1, recipe), recipe)
    (first, after_first), (second, _) = calls
    assert first is None
    for carried, returned in zip(second, after_first, strict=True):
        assert torch.equal(carried, returned)
        assert returned.requires_grad
        assert not carried.requires_grad


def test_gradients_are_clipped(char_lm, text):
    recipe = make_recipe(char_lm)
    run = char_lm.make_run("lstm", text, recipe, "cpu")
    nn.init.normal_(run.model.head.weight, std=100)
    char_lm.train_step(run, char_lm.window(text.train, 0, recipe), recipe)
    norm = torch.cat([param.grad.flatten() for param in run.model.parameters()]).norm()
    assert norm.item() == pytest.approx(char_lm.CLIP, rel=1e-4)


def test_training_learns(char_lm, text):
    recipe = make_recipe(char_lm, hidden=32, steps=60, eval_every=20, lr=0.02)
    run = char_lm.make_run("lstm", text, recipe, "cpu")
    char_lm.train(run, text, recipe, lambda run: None, lambda run, bits: None)
    assert [step for step, _ in run.curve] == [20, 40, 60]
    assert run.curve[-1][1] < 0.7 * math.log2(13)


def test_the_learning_rate_falls_in_the_second_half(char_lm):
    recipe = make_recipe(char_lm)
    rates = [char_lm.learning_rate(step, recipe) for step in range(10)]
    assert rates == pytest.approx([0.01] * 6 + [0.008, 0.006, 0.004, 0.002])


def test_the_best_validation_is_kept(char_lm, text, monkeypatch):
    recipe = make_recipe(char_lm, eval_every=2)
    figures = iter([3.0, 1.0, 2.0, 1.5, 4.0])
    monkeypatch.setattr(char_lm, "bits_per_character", lambda *args: next(figures))
    run = char_lm.make_run("lstm", text, recipe, "cpu")
    weights = {}

    def save(run):
        weights[run.step] = {k: v.clone() for k, v in run.model.state_dict().items()}

    char_lm.train(run, text, recipe, save, lambda run, bits: None)
    assert sorted(weights) == [2, 4, 6, 8, 10]
    assert all(torch.equal(run.best[k], v) for k, v in weights[4].items())
    assert not all(torch.equal(run.best[k], v) for k, v in weights[10].items())


def test_the_table_is_of_the_best_validation(char_lm, path, monkeypatch):
    train = char_lm.train

    def train_and_flatten(run, *args):
        train(run, *args)
        for name in ("head.weight", "head.bias"):
            run.best[name].zero_()  # uniform

    monkeypatch.setattr(char_lm, "train", train_and_flatten)
    for name in ("lstm", "static"):
        (row,) = char_lm.main(["--text", str(path), *SMALL, "--models", name])
        for bpc in (row.valid_bpc, row.test_bpc):
            assert bpc == pytest.approx(math.log2(13), rel=RTOL)


def trained_weights(out, name):
    run = torch.load(out / f"{name}.pt", weights_only=True)["run"]
    return [*run["model"].values(), *run["best"].values(), *run["state"]]


@pytest.mark.parametrize("name", ["lstm", "static", "ln-hyperlstm"])
def test_interrupted_is_uninterrupted(char_lm, path, tmp_path, monkeypatch, capsys, name):
    flags = ["--text", str(path), *SMALL, "--models", name, "--out"]
    (through,) = char_lm.main([*flags, str(tmp_path / "through")])
    train_step = char_lm.train_step

    def interrupt(run, *args):
        if run.step == 5:  # the last checkpoint is of step 4
            raise KeyboardInterrupt
        return train_step(run, *args)

    with monkeypatch.context() as patched:
        patched.setattr(char_lm, "train_step", interrupt)
        with pytest.raises(SystemExit, match="130"):
            char_lm.main([*flags, str(tmp_path / "twice")])
    assert f"goes on from {tmp_path / 'twice'}" in capsys.readouterr().err

    steps = []
    with monkeypatch.context() as patched:
        patched.setattr(
            char_lm,
            "train_step",
            lambda run, *args: steps.append(run.step) or train_step(run, *args),
        )
        (resumed,) = char_lm.main([*flags, str(tmp_path / "twice")])
        (again,) = char_lm.main([*flags, str(tmp_path / "twice")])
    assert steps == [4, 5]  # and what is trained is not trained again
    assert again == resumed
    for row in (through, resumed):
        assert len(row.curve) == 3
    assert [(s, bpc) for s, _, bpc in resumed.curve] == [(s, bpc) for s, _, bpc in through.curve]
    for key in ("params", "valid_bpc", "test_bpc", "sample"):
        assert getattr(resumed, key) == getattr(through, key)
    ours, theirs = (trained_weights(tmp_path / out, name) for out in ("twice", "through"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_another_recipe_does_not_go_on(char_lm, path, tmp_path, capsys):
    flags = ["--text", str(path), *SMALL, "--models", "lstm", "--out", str(tmp_path)]
    char_lm.main(flags)
    with pytest.raises(SystemExit, match="1"):
        char_lm.main([*flags, "--lr", "0.1", "--seq-len", "9"])
    error = capsys.readouterr().err
    assert "lstm.pt was trained with --seq-len 8, --lr 0.008" in error
    path.write_text(path.read_text(encoding="utf-8") + "a", encoding="utf-8")
    with pytest.raises(SystemExit, match="1"):
        char_lm.main(flags)
    assert "lstm.pt was trained on another text" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04"])
def test_a_damaged_checkpoint_is_named(char_lm, path, tmp_path, capsys, content):
    (tmp_path / "lstm.pt").write_bytes(content)
    with pytest.raises(SystemExit, match="1"):
        char_lm.main(["--text", str(path), *SMALL, "--models", "lstm", "--out", str(tmp_path)])
    assert "lstm.pt is not a checkpoint" in capsys.readouterr().err


def test_a_foreign_torch_file_is_named(char_lm, path, tmp_path, capsys):
    torch.save({"recipe": {}, "run": {}}, tmp_path / "lstm.pt")
    with pytest.raises(SystemExit, match="1"):
        char_lm.main(["--text", str(path), *SMALL, "--models", "lstm", "--out", str(tmp_path)])
    assert "lstm.pt is not a checkpoint" in capsys.readouterr().err


def test_samples_depend_on_the_seed_alone(char_lm, text):
    model = char_lm.make_lstm(13, 8, 0.5)
    prompt = text.train[:5]
    first = char_lm.sample(model, prompt, 30, 1.0, seed=1)
    torch.rand(1)
    assert char_lm.sample(model, prompt, 30, 1.0, seed=1) == first
    assert char_lm.sample(model, prompt, 30, 1.0, seed=2) != first
    assert len(first) == 30


@torch.no_grad()
def test_samples_follow_the_text_so_far(char_lm, text):
    model = char_lm.make_lstm(13, 8, 0.0).eval()
    nn.init.normal_(model.lstm.weight_hh_l0)
    nn.init.normal_(model.head.weight)
    written = text.train[:5].tolist()
    drawn = char_lm.sample(model, text.train[:5], 30, 1e-4, seed=0)  # as good as the likeliest
    for character in drawn:
        assert character == model(torch.tensor([written]))[0][0, -1].argmax()
        written.append(character)
    assert len(set(drawn)) > 1


def test_variants_start_alike(char_lm):
    recipe = make_recipe(char_lm, hidden=32)
    lstm = char_lm.make_model("lstm", 13, recipe)
    static = char_lm.make_model("static", 13, recipe)
    assert torch.equal(static.head.weight, lstm.head.weight)
    assert torch.equal(static.lstm.bias_ih_l0, lstm.lstm.bias_ih_l0)
    recurrent = lstm.lstm.weight_hh_l0[:32]
    assert torch.allclose(recurrent @ recurrent.T, torch.eye(32), atol=1e-5)
    biases = lstm.lstm.bias_ih_l0 + lstm.lstm.bias_hh_l0
    assert biases.view(4, 32).mean(1).tolist() == [0, 1, 0, 0]


def test_models_of_the_paper_have_its_parameters(char_lm):
    """Character PTB with 50 symbols (arXiv 1609.09106, sec. 4.3)."""
    recipe = make_recipe(char_lm, hidden=1000, hyper_size=128, embedding_dim=4)
    counts = [char_lm.count(char_lm.make_model(n, 50, recipe)) for n in char_lm.VARIANTS[2:4]]
    assert counts == [4_913_154, 4_923_154]
    # nn.LSTM has two biases per gate, the paper's one
    assert char_lm.count(char_lm.make_lstm(50, 1000, 0.0)) - 4 * 1000 == 4_254_050


def test_the_wide_lstm_has_as_many_parameters_and_no_unit_more(char_lm):
    for vocabulary, params in ((13, 5000), (65, 400_000), (50, 900_000)):
        hidden = char_lm.width(vocabulary, params)
        ours, narrower = (
            char_lm.count(char_lm.make_lstm(vocabulary, h, 0.0)) for h in (hidden, hidden - 1)
        )
        assert narrower < params <= ours


def test_a_diverged_training_stops(char_lm, path, monkeypatch, capsys):
    monkeypatch.setattr(char_lm, "bits_per_character", lambda *args: math.nan)
    flags = [*SMALL, "--models", "lstm"]
    with pytest.raises(SystemExit, match="1"):
        char_lm.main(["--text", str(path), *flags])
    assert (
        "lstm: the loss is no longer finite at step 2; take a lower --lr than 0.008"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "No such file"),
        (b"\xff" * 100, [], "is not UTF-8"),
        (b"ab" * 20, [], "has 40 characters; the three splits need 60"),
        (
            b"ab" * 40,
            ["--batch-size", "9"],
            "72 characters for training; --batch-size x --seq-len is 9,000",
        ),
        (b"ab" * 40, ["--prompt", "abc"], "--prompt: the text has no 'c'"),
        (b"ab" * 40, ["--hidden", "0"], "--hidden: must be above 0, got 0"),
        (b"ab" * 40, ["--hidden", "x"], "--hidden: invalid int value: 'x'"),
        (b"ab" * 40, ["--lr", "nan"], "--lr: must be above 0, got nan"),
        (b"ab" * 40, ["--dropout", "2"], "dropout probability has to be between 0 and 1"),
        (b"ab" * 40, ["--compression", "1000"], "compression"),
        (b"ab" * 40, ["--models", "gru"], "invalid choice: 'gru'"),
    ],
)
def test_mistakes_are_named(char_lm, tmp_path, capsys, content, flags, message):
    path = tmp_path / "short.txt"
    if content is not None:
        path.write_bytes(content)
    room = [] if "--batch-size" in flags else ["--batch-size", "2", "--seq-len", "3"]
    if "--batch-size" in flags:
        room = ["--seq-len", "1000"]
    wrong_command_line = "must be above" in message or "invalid" in message
    with pytest.raises(SystemExit, match="2" if wrong_command_line else "1"):
        char_lm.main(["--text", str(path), *room, *flags])
    error = capsys.readouterr().err
    assert message in error
    assert wrong_command_line or error.count("\n") == 1
