"""A character language model: LSTM, generated weights, and the dynamic HyperLSTM, side by side.

    python examples/char_lm.py --text input.txt --out runs/char_lm
    python examples/char_lm.py --text input.txt --models lstm hyperlstm --steps 200  # a quick look
    python examples/char_lm.py --text input.txt --out runs/char_lm --sample 500 --prompt "ROMEO:"

The text is any UTF-8 file; Shakespeare's plays (1.1 MB, known as tinyshakespeare) are a usual one.
The variants are trained one after the other, at the same hidden size, from the same seed, on the
same batches, with the same recipe:

    lstm          nn.LSTM
    static        the same model after `hyperize`: one generator writes the LSTM's weights
    hyperlstm     HyperLSTM: a small LSTM rescales the weights at every character
    ln-hyperlstm  HyperLSTM with layer normalisation in the main cell too
    lstm-wide     nn.LSTM, widened until it has at least as many parameters as hyperlstm

The task is that of "HyperNetworks" (arXiv 1609.09106, sec. 4.3) on a small scale: one-hot
characters in, one layer, dropout on input and output, Adam, clipped gradients, bits per character.
The LSTM starts as a HyperLSTM does: orthogonal recurrent weights, a forget gate biased by 1.

With `--out`, each variant has a checkpoint. The same command goes on where it was interrupted, to
the same result as if it had not been, and does not train again what is trained: so variants can be
added to a table one by one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from twins import progress_bar, refuse

from hyperize import HyperizeError, HyperLSTM, hyperize, to_dense

VARIANTS = ("lstm", "static", "hyperlstm", "ln-hyperlstm", "lstm-wide")
CLIP = 1.0
"""The largest norm of a gradient, as in the paper's character models."""
CHUNK = 256
"""Characters per call when a model reads a whole split: more would only take more memory."""
PADDING = -100
"""The target that `cross_entropy` does not count."""

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Text:
    """A text as numbers.

    Attributes:
        characters: The vocabulary, in order of code points; a number is an index into it.
        train: int64, (L,), the first 90 % of the text.
        valid: The next 5 %.
        test: The rest.
    """

    characters: str
    train: Tensor
    valid: Tensor
    test: Tensor

    def to(self, device: str) -> Text:
        """The same text on a device."""
        splits = (split.to(device) for split in (self.train, self.valid, self.test))
        return Text(self.characters, *splits)

    def encode(self, characters: str) -> Tensor:
        """Characters as numbers, int64, (L,).

        Raises:
            ValueError: One of them is not in the vocabulary.
        """
        unknown = sorted(set(characters) - set(self.characters))
        if unknown:
            raise ValueError(f"the text has no {', '.join(map(repr, unknown))}")
        return torch.tensor([self.characters.index(c) for c in characters], dtype=torch.long)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Numbers as characters."""
        return "".join(self.characters[i] for i in ids)


@dataclass(frozen=True)
class Recipe:
    """All that decides what a training run computes; a checkpoint goes on only under its own.

    Attributes:
        text: Digest of the text.
        hidden: Units of the (main) LSTM.
        hyper_size: Units of the small LSTM of a HyperLSTM.
        embedding_dim: Numbers that scale one gate of a HyperLSTM, before their projection.
        compression: Of `hyperize`, for the static variant.
        steps: Training steps.
        seq_len: Characters through which a gradient flows.
        batch_size: Parallel streams of text.
        lr: Learning rate before its decay.
        dropout: Share of inputs and outputs that are dropped.
        seed: Of the initialisation, the dropout and the sample.
        eval_every: Steps from one validation, and one checkpoint, to the next.
    """

    text: str
    hidden: int
    hyper_size: int
    embedding_dim: int
    compression: float
    steps: int
    seq_len: int
    batch_size: int
    lr: float
    dropout: float
    seed: int
    eval_every: int


@dataclass
class Run:
    """A variant in training: with its recipe, all that a checkpoint holds.

    Attributes:
        name: The variant.
        model: The model.
        optimizer: Over all parameters of the model.
        step: Training steps done.
        state: Of the LSTM after the last step, detached; `None` before the first.
        seconds: Wall time of each training step.
        curve: (step, bits per character of the validation split), one per validation.
        best: State dict of the model at its best validation.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    state: State | None = None
    seconds: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A row of the final table, and what else is worth keeping.

    Attributes:
        name: The variant.
        params: Parameters of the model in training.
        valid_bpc: Bits per character of the validation split, at the best validation.
        test_bpc: The same model's on the test split.
        step_ms: Median time of a training step.
        curve: (step, seconds of training, bits per character) of each validation.
        sample: Text that the model wrote, after the prompt.
    """

    name: str
    params: int
    valid_bpc: float
    test_bpc: float
    step_ms: float
    curve: list[tuple[int, float, float]]
    sample: str


class CharModel(nn.Module):
    """One-hot characters, a recurrent layer, a classifier of the next character.

    Args:
        lstm: Called as `nn.LSTM` with `batch_first=True`.
        vocabulary: Number of characters V.
        hidden: Size of the recurrent layer's output.
        dropout: On the layer's input and on its output.
    """

    def __init__(self, lstm: nn.Module, vocabulary: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.dropout = nn.Dropout(dropout)
        self.lstm = lstm
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits of each next character, and the state after the last.

        Args:
            ids: int64, (N, T).
            state: As returned by the call on the T characters before; `None` is the zero state.
        """
        x = F.one_hot(ids, self.vocabulary).float()  # (N, T) -> (N, T, V)
        x, state = self.lstm(self.dropout(x), state)  # (N, T, V) -> (N, T, hidden)
        return self.head(self.dropout(x)), state  # (N, T, hidden) -> (N, T, V)


def make_model(name: str, vocabulary: int, recipe: Recipe) -> nn.Module:
    """A variant, initialised from the recipe's seed.

    Raises:
        HyperizeError: The compression cannot be reached, or a size of the HyperLSTM is invalid.
    """
    torch.manual_seed(recipe.seed)
    if name == "lstm":
        return make_lstm(vocabulary, recipe.hidden, recipe.dropout)
    if name == "static":
        dense = make_lstm(vocabulary, recipe.hidden, recipe.dropout)
        return hyperize(dense, compression=recipe.compression, seed=recipe.seed)
    if name == "lstm-wide":
        hidden = width(vocabulary, count(make_model("hyperlstm", vocabulary, recipe)))
        torch.manual_seed(recipe.seed)
        return make_lstm(vocabulary, hidden, recipe.dropout)
    lstm = HyperLSTM(
        vocabulary,
        recipe.hidden,
        batch_first=True,
        hyper_size=recipe.hyper_size,
        embedding_dim=recipe.embedding_dim,
        layer_norm=name == "ln-hyperlstm",
    )
    return CharModel(lstm, vocabulary, recipe.hidden, recipe.dropout)


def make_lstm(vocabulary: int, hidden: int, dropout: float) -> CharModel:
    lstm = nn.LSTM(vocabulary, hidden, batch_first=True)
    with torch.no_grad():
        _, recurrent, *biases = lstm.all_weights[0]
        for gate in recurrent.chunk(4):  # (4 hidden, hidden) -> (hidden, hidden)
            nn.init.orthogonal_(gate)
        for bias in biases:
            bias.zero_()
        biases[0].chunk(4)[1].fill_(1.0)  # the gates are i, f, g, o
    return CharModel(lstm, vocabulary, hidden, dropout)


def width(vocabulary: int, params: int) -> int:
    """The fewest units H with which the LSTM variant of V characters has so many parameters.

    It has 4 H (V + H + 2) in the LSTM and (H + 1) V in the classifier: 4 H^2 + (5 V + 8) H + V.
    """
    linear = 5 * vocabulary + 8
    return math.ceil((math.sqrt(linear**2 + 16 * (params - vocabulary)) - linear) / 8)


def count(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def read(path: Path) -> tuple[Text, str]:
    """The text of a file, and its digest.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, or is too short to be split.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    if len(text) < 60:  # two characters of the smaller splits: one to read, one to predict
        raise ValueError(f"{path} has {len(text)} characters; the three splits need 60")
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    points, ids = np.unique(codes, return_inverse=True)
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    splits = torch.from_numpy(ids.astype(np.int64)).tensor_split((first, second))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Text("".join(map(chr, points)), *splits), digest


def window(ids: Tensor, step: int, recipe: Recipe) -> Tensor:
    """The characters of one training step: a stream's window goes on where its last one ended.

    The streams start at equal distances and read the text round and round. So no state is ever
    reset, and the windows of the next round are cut elsewhere.

    Returns:
        (batch_size, seq_len + 1): all but the last column are inputs, all but the first targets.
    """
    starts = torch.arange(recipe.batch_size, device=ids.device) * len(ids) // recipe.batch_size
    columns = torch.arange(recipe.seq_len + 1, device=ids.device) + step * recipe.seq_len
    return ids[(starts[:, None] + columns) % len(ids)]  # (L,) -> (N, T + 1)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Constant for the first half of the steps, then falling to zero in a straight line."""
    return recipe.lr * min(1.0, 2 * (recipe.steps - step) / recipe.steps)


def train(
    run: Run,
    text: Text,
    recipe: Recipe,
    save: Callable[[Run], None],
    show: Callable[[Run, float], None],
) -> None:
    """Trains a variant from where it is to the recipe's last step.

    Args:
        run: The variant; changed in place.
        text: On the model's device.
        recipe: The recipe.
        save: Called after each validation, of which the last step has one.
        show: Called after each step, with its loss in bits per character.

    Raises:
        FloatingPointError: The loss is no longer finite.
    """
    while run.step < recipe.steps:
        start = time.perf_counter()
        bits = train_step(run, window(text.train, run.step, recipe), recipe)
        run.seconds.append(time.perf_counter() - start)
        run.step += 1
        show(run, bits)
        if run.step % recipe.eval_every and run.step < recipe.steps:
            continue
        bpc = bits_per_character(run.model, text.valid, recipe.batch_size)
        if not math.isfinite(bpc):
            raise FloatingPointError(
                f"{run.name}: the loss is no longer finite at step {run.step}; take a lower --lr "
                f"than {recipe.lr:g}"
            )
        if not run.curve or bpc < min(bpc for _, bpc in run.curve):
            run.best = {name: t.clone() for name, t in run.model.state_dict().items()}
        run.curve.append((run.step, bpc))
        save(run)


def train_step(run: Run, ids: Tensor, recipe: Recipe) -> float:
    """One step of truncated backpropagation through time.

    Args:
        run: The variant; changed in place, but for its `step`.
        ids: (N, T + 1), from `window`.
        recipe: The recipe.

    Returns:
        The loss in bits per character.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, recipe)
    # A dropout that depends on the step alone is the same for all variants and after a resume
    torch.manual_seed(recipe.seed + 1_000_003 * (run.step + 1))
    logits, state = run.model.train()(ids[:, :-1], run.state)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())  # (N T, V), (N T,)
    run.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
    run.optimizer.step()
    run.state = tuple(s.detach() for s in state)
    if ids.is_cuda:
        torch.cuda.synchronize()  # the caller takes the time
    return loss.item() / math.log(2)


@torch.no_grad()
def bits_per_character(model: nn.Module, ids: Tensor, streams: int = 1) -> float:
    """The mean surprise at every character of a split but its first, the state carried along.

    Args:
        model: A `CharModel`; it is left in evaluation mode.
        ids: The split, (L,).
        streams: Parts that are read in parallel, each from the zero state: faster, and a little
            worse at the start of each. One reads the split as it is.
    """
    model.eval()
    length = math.ceil((len(ids) - 1) / streams)
    spare = streams * length - (len(ids) - 1)
    inputs = F.pad(ids[:-1], (0, spare)).view(streams, length)  # (L - 1,) -> (streams, length)
    targets = F.pad(ids[1:], (0, spare), value=PADDING).view(streams, length)
    total, state = 0.0, None
    for x, y in zip(inputs.split(CHUNK, 1), targets.split(CHUNK, 1), strict=True):
        logits, state = model(x, state)
        total += F.cross_entropy(
            logits.flatten(0, 1), y.flatten(), ignore_index=PADDING, reduction="sum"
        ).item()
    return total / (len(ids) - 1) / math.log(2)


@torch.no_grad()
def sample(
    model: nn.Module, prompt: Tensor, length: int, temperature: float, seed: int
) -> list[int]:
    """Characters that a model writes after a prompt, drawn one by one.

    Args:
        model: A `CharModel`; it is left in evaluation mode.
        prompt: (P,), at least one character, on the model's device.
        length: Characters to draw.
        temperature: Below 1 the likely characters become likelier.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, state, drawn = prompt[None], None, []
    model.eval()
    for _ in range(length):
        logits, state = model(ids, state)
        chances = (logits[0, -1].cpu().double() / temperature).softmax(0)  # (V,)
        ids = torch.multinomial(chances, 1, generator=generator)[None].to(prompt.device)  # (1, 1)
        drawn.append(int(ids))
    return drawn


def make_run(name: str, text: Text, recipe: Recipe, device: str) -> Run:
    model = make_model(name, len(text.characters), recipe).to(device)
    return Run(name, model, torch.optim.Adam(model.parameters(), recipe.lr))


def save_run(run: Run, recipe: Recipe, path: Path) -> None:
    """Writes a checkpoint; whenever this is interrupted, `path` holds the old one or the new."""
    contents = {f.name: getattr(run, f.name) for f in fields(run)}
    contents |= {name: contents[name].state_dict() for name in ("model", "optimizer")}
    part = path.with_suffix(".part")
    torch.save({"recipe": asdict(recipe), "run": contents}, part)
    os.replace(part, path)


def load_run(run: Run, recipe: Recipe, path: Path, device: str) -> None:
    """Puts a fresh run where the checkpoint is.

    Raises:
        ValueError: The file is no checkpoint of this program, or one of another recipe.
    """
    try:
        # To the CPU, where Adam keeps its step counters; load_state_dict moves the rest
        contents = torch.load(path, map_location="cpu", weights_only=True)
        theirs, values = Recipe(**contents["recipe"]), contents["run"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a checkpoint of this program ({error})") from error
    if theirs.text != recipe.text:
        raise ValueError(f"{path} was trained on another text; take another --out")
    differ = [(k, v) for k, v in asdict(theirs).items() if v != getattr(recipe, k)]
    if differ:
        flags = ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in differ)
        raise ValueError(f"{path} was trained with {flags}; take the same, or another --out")
    run.model.load_state_dict(values.pop("model"))
    run.optimizer.load_state_dict(values.pop("optimizer"))
    h, c = values.pop("state")
    run.state = h.to(device), c.to(device)
    for name, value in values.items():
        setattr(run, name, value)


def finish(run: Run, text: Text, prompt: Tensor, args: argparse.Namespace) -> Result:
    """Measures a trained variant at its best validation, and lets it write."""
    params = count(run.model)
    run.model.load_state_dict(run.best)
    # Generated weights are written out once, instead of at each character
    model = to_dense(run.model) if run.name == "static" else run.model
    valid, test = (
        bits_per_character(model, ids, args.eval_streams) for ids in (text.valid, text.test)
    )
    drawn = sample(model, prompt, args.sample, args.temperature, args.seed)
    # The first step pays for what is set up once
    step_ms = 1e3 * statistics.median(run.seconds[1:] or run.seconds)
    curve = [(step, sum(run.seconds[:step]), bpc) for step, bpc in run.curve]
    return Result(run.name, params, valid, test, step_ms, curve, text.decode(drawn))


def print_table(results: Sequence[Result]) -> None:
    """Prints one row per variant."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for name in ("parameters", "validation bpc", "test bpc", "step time (median)"):
        table.add_column(name, justify="right")
    for row in results:
        bpc = (f"{row.valid_bpc:.3f}", f"{row.test_bpc:.3f}")
        table.add_row(row.name, f"{row.params:,}", *bpc, f"{row.step_ms:.1f} ms")
    Console(width=80, highlight=False).print(table)


def plot(results: Sequence[Result], path: Path) -> None:
    """Draws bits per character over steps and over time; the early fall is cut off.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # not needed to train
    except ImportError as error:
        raise ImportError(
            "the chart needs matplotlib: pip install 'hyperize[plot]' and run this again; nothing "
            "is trained twice"
        ) from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    over_steps, over_time = figure.subplots(1, 2, sharey=True)
    for i, row in enumerate(results):
        steps, seconds, bpc = zip(*row.curve, strict=True)
        label = f"{row.name} ({row.params / 1e3:,.0f} k)"
        over_steps.plot(steps, bpc, f"C{i}", label=label)
        over_time.plot([s / 60 for s in seconds], bpc, f"C{i}", label=label)
    lowest = min(bpc for row in results for *_, bpc in row.curve)
    early = max(row.curve[len(row.curve) // 6][2] for row in results)
    margin = 0.05 * (early - lowest) or 0.1
    over_steps.set(xlabel="training steps", ylabel="validation bits per character")
    over_steps.set_ylim(lowest - margin, early + margin)
    over_time.set(xlabel="minutes of training")
    over_time.legend(title="variant (parameters)", frameon=False)
    for axes in (over_steps, over_time):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def above(bound: int, kind: type) -> Callable[[str], Any]:
    """A type of flag: finite numbers of a kind, above a bound."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not bound < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be above {bound}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its errors
    return parse


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="a UTF-8 text file")
    add(
        "--models",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=f"variants to train, of {', '.join(VARIANTS)} (default: all)",
    )
    for name, kind, default, text in (
        ("hidden", int, 256, "units of the LSTM"),
        ("hyper-size", int, 64, "units of HyperLSTM's small LSTM"),
        ("embedding-dim", int, 8, "numbers behind each scale of HyperLSTM"),
        ("compression", float, 4.0, "weights per generating parameter of static"),
        ("steps", int, 1500, "training steps"),
        ("seq-len", int, 100, "characters through which a gradient flows"),
        ("batch-size", int, 32, "streams of text in parallel"),
        ("lr", float, 8e-3, "learning rate, constant for half of the steps, then falling to 0"),
        ("eval-every", int, 100, "steps between validations, each followed by a checkpoint"),
        ("eval-streams", int, 1, "parts of a split read in parallel for the table"),
        ("temperature", float, 0.8, "of the sample; below 1, likely characters become likelier"),
    ):
        add(f"--{name}", type=above(0, kind), default=default, help=f"{text} (default: {default})")
    add("--dropout", type=float, default=0.1, help="on input and output (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, dropout, sample (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--out", type=Path, metavar="FOLDER", help="keep checkpoints, results.json, char_lm.png")
    length: dict[str, Any] = {"type": above(-1, int), "default": 200, "metavar": "N"}
    add("--sample", **length, help="characters to write (default: %(default)s)")
    add("--prompt", help="what the sample goes on from (default: the text's first character)")
    return parser


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Trains, or goes on training, the chosen variants; prints the table and the samples.

    Returns:
        The rows of the final table.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        text, digest = read(args.text)
        needed = args.batch_size * args.seq_len
        if len(text.train) < needed:
            raise ValueError(
                f"{args.text} has {len(text.train):,} characters for training; --batch-size x "
                f"--seq-len is {needed:,}"
            )
    except (OSError, ValueError) as error:
        refuse(parser, f"--text: {error}")
    try:
        prompt = text.encode(args.prompt or text.decode(text.train[:1])).to(args.device)
    except ValueError as error:
        refuse(parser, f"--prompt: {error}")
    shared = {f.name: getattr(args, f.name) for f in fields(Recipe) if f.name != "text"}
    recipe = Recipe(digest, **shared)
    text = text.to(args.device)
    names = list(dict.fromkeys(args.models))
    try:  # every mistake is found now rather than after the first training
        runs = {name: make_run(name, text, recipe, args.device) for name in names}
        paths = {name: args.out / f"{name}.pt" for name in names} if args.out else {}
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        for name, path in paths.items():
            if path.is_file():
                load_run(runs[name], recipe, path, args.device)
    except (HyperizeError, OSError, ValueError) as error:
        refuse(parser, error)

    try:
        results = train_all(runs, paths, text, recipe, prompt, args)
    except FloatingPointError as error:
        refuse(parser, error)
    except KeyboardInterrupt:
        kept = f"the same command goes on from {args.out}" if args.out else "nothing was kept"
        parser.exit(130, f"interrupted; {kept}\n")
    print_table(results)
    for row in results if args.sample else ():
        print(f"\n--- {row.name} ---\n{text.decode(prompt)}{row.sample}")
    if args.out:
        table = json.dumps([asdict(row) for row in results], indent=1, ensure_ascii=False)
        (args.out / "results.json").write_text(table, encoding="utf-8")
        try:
            plot(results, args.out / "char_lm.png")
            print(f"\nchart: {args.out / 'char_lm.png'}")
        except ImportError as error:
            print(f"\nno chart: {error}")
    return results


def train_all(
    runs: dict[str, Run],
    paths: dict[str, Path],
    text: Text,
    recipe: Recipe,
    prompt: Tensor,
    args: argparse.Namespace,
) -> list[Result]:
    """Trains the variants one after the other; on a terminal, under a progress bar."""
    results = []
    with progress_bar() as progress:
        tasks = {
            name: progress.add_task(name, total=recipe.steps, completed=run.step)
            for name, run in runs.items()
        }

        def save(run: Run) -> None:
            if paths:
                save_run(run, recipe, paths[run.name])

        def show(run: Run, bits: float) -> None:
            valid = f", validation {run.curve[-1][1]:.3f}" if run.curve else ""
            description = f"{run.name}: {bits:.3f} bpc{valid}"
            progress.update(tasks[run.name], completed=run.step, description=description)

        for run in runs.values():
            train(run, text, recipe, save, show)
            results.append(finish(run, text, prompt, args))
    return results


if __name__ == "__main__":
    main()
