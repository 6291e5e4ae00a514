"""The console command `hyperize`: its arguments; flags are named as in timm.

Nothing here imports torch, so that help and wrong arguments are answered at once. What the commands
do is in `hyperize.commands`, which imports it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from hyperize import __version__
from hyperize.config import HyperConfig, HyperizeError, did_you_mean
from hyperize.outputs import check_inputs, check_outputs

__all__ = ["main"]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: done; a request that cannot be carried out; a wrong command line; Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if `None`.

    Returns:
        The exit code: 0; or with one line on stderr, 1 if the request cannot be carried out, and
        130 after Ctrl-C. A wrong command line raises `SystemExit`, as argparse does.
    """
    try:
        args = _parser().parse_args(argv)
        if hasattr(args, "compression"):  # a command with a request
            args.config = _config(args)
        check_outputs(args)
        check_inputs(args)
        from hyperize import commands

        commands.COMMANDS[args.command](args)
        sys.stdout.flush()
    except (HyperizeError, ImportError) as error:
        lines = (line.strip() for line in str(error).splitlines())
        print(f"hyperize: {' '.join(line for line in lines if line)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("hyperize: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OK


def _config(args: argparse.Namespace) -> HyperConfig:
    if args.command == "fit" and args.conditions is None and len(args.checkpoint or ()) > 1:
        args.conditions = len(args.checkpoint)
    names = [field.name for field in fields(HyperConfig) if hasattr(args, field.name)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return HyperConfig(**given)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and what may have been meant."""

    commands: dict[str, _Parser]

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        command = self.commands[found.command]
        if unknown:
            flag = unknown[0].partition("=")[0]
            flags = [flag for action in command._actions for flag in action.option_strings]
            hint = did_you_mean(flag, flags).rstrip(".") if flag.startswith("-") else ""
            command.error(f"unknown argument {flag}{hint}")
        if (model := found.__dict__.pop("model_flag", None)) is not None:
            if found.model is not None:
                command.error(f"two models are named, {found.model} and {model}")
            found.model = model
        if getattr(found, "model", "") is None and found.command in ("report", "plan", "fit"):
            command.error("no model is named; name it before all flags, or by --model")
        return found

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith("?") else ";"
        self.exit(USAGE, f"hyperize: {message}{end} {self.prog} --help has all arguments\n")


class _Flat(argparse.Action):
    """Gathers values that are divided by spaces, commas or both."""

    def __init__(self, *args: Any, count: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.count = count

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        flat = tuple(value for group in values for value in group)
        if self.count not in (None, len(flat)):
            raise argparse.ArgumentError(self, f"expected {self.count} values, got {len(flat)}")
        setattr(namespace, self.dest, flat)


class _Collect(argparse.Action):
    """Gathers key=value pairs into a dict."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, dict(values))


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _counts(text: str) -> list[int]:
    return [_count(word) for word in _words(text)]


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _parser() -> _Parser:
    parser = _Parser(
        prog="hyperize",
        description="Generate a model's weights from one shared hypernetwork.",
    )
    parser.add_argument("--version", action="version", version=f"hyperize {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    parser.commands = commands.choices

    def add(
        name: str,
        parents: list[_Parser],
        text: str,
        example: str,
        model: str = "",
    ) -> _Parser:
        command = commands.add_parser(
            name,
            parents=parents,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example: {example}",
        )
        if model:
            command.add_argument("model", nargs="?", metavar="MODEL", help=model)
            command.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same")
        return command

    names = "name of a timm model, package.module:factory, or transformers:NAME"
    model = _Parser(add_help=False)
    group = model.add_argument_group("arguments of the model, as in timm")
    group.add_argument("--num-classes", type=int, metavar="N")
    group.add_argument("--in-chans", type=int, metavar="N")
    group.add_argument("--img-size", type=int, metavar="N")
    group.add_argument(
        "--model-kwargs",
        type=_key_value,
        action=_Collect,
        nargs="*",
        metavar="KEY=VALUE",
        help="further arguments of timm.create_model, of the factory or of the configuration",
    )

    # Values after a flag may be divided by spaces or commas
    words: dict[str, Any] = {"nargs": "+", "type": _words, "action": _Flat}
    counts: dict[str, Any] = {"nargs": "+", "type": _counts, "action": _Flat}
    request = _Parser(add_help=False)
    group = request.add_argument_group("request")
    group.add_argument(
        "--compression",
        type=float,
        metavar="X",
        help="dense target weights over what they are generated from, at least (default 10)",
    )
    group.add_argument(
        "--max-params", type=int, metavar="N", help="a total for the whole model instead"
    )
    group.add_argument("--targets", **words, metavar="KIND", help="default: conv2d lstm")
    group.add_argument("--include", **words, metavar="GLOB", help="module paths to rewrite")
    group.add_argument("--exclude", **words, metavar="GLOB", help="module paths to leave dense")
    group.add_argument("--embedding-dim", type=int, metavar="N", help="default: planned")
    group.add_argument("--hidden-dim", type=int, metavar="N", help="default: planned")
    group.add_argument(
        "--tile",
        **counts,
        count=2,
        metavar="N",
        help="channels out and in; default: planned by kernel size",
    )
    group.add_argument(
        "--trunk-axis", type=int, choices=(0, 1), help="1 is the paper's form (default: 0)"
    )
    group.add_argument(
        "--lstm", choices=("static", "dynamic"), help="generate LSTM weights, or put HyperLSTMs"
    )
    group.add_argument(
        "--lstm-options",
        type=_key_value,
        action=_Collect,
        nargs="*",
        metavar="KEY=VALUE",
        help="of HyperLSTMs, as hyper_size=32",
    )
    group.add_argument(
        "--embeddings",
        choices=("tile", "channel", "separable"),
        help="what has an embedding of its own; of fit: channel; else what suits the model",
    )
    group.add_argument(
        "--recompute",
        action="store_true",
        default=None,
        help="generate weights again for the backward pass: less memory, more time",
    )
    group.add_argument(
        "--factorized",
        action="store_true",
        default=None,
        help="compute with the factors of weights where that is faster",
    )
    group.add_argument(
        "--conditions", type=int, metavar="K", help="networks of one architecture to generate"
    )
    group.add_argument(
        "--condition-dim", type=int, metavar="C", help="length of a vector to depend on instead"
    )
    group.add_argument(
        "--share", action="store_true", default=None, help="let all networks start equal"
    )
    group.add_argument(
        "--private", **words, metavar="GLOB", help="further layers of which each has its own"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the initial hypernetwork")

    output = _Parser(add_help=False)
    output.add_argument("--json", action="store_true", help="print JSON")
    page = _Parser(add_help=False)
    page.add_argument("--html", metavar="F", help="write a page to look at as well")
    page.add_argument(
        "--all", action="store_true", help="print a row for each weight, of repeated blocks too"
    )
    force = _Parser(add_help=False)
    force.add_argument(
        "--force", action="store_true", help="overwrite files that exist; never the input"
    )
    rounding = _Parser(add_help=False)
    rounding.add_argument(
        "--dtype", choices=("float16", "bfloat16"), help="round the parameters for the file"
    )
    few_bits = _Parser(add_help=False)
    few_bits.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "int8", "int4"),
        help="round the parameters for the file; in int8 it is a quarter as long",
    )

    command = add(
        "report",
        [model, request, output, page, force],
        "what compressing a model saves",
        "hyperize report resnet50 --compression 20 --html report.html",
        f"{names}, as resnet50",
    )

    command = add(
        "plan",
        [model, request, output],
        "all sizes that hyperize() would choose for a model",
        "hyperize plan resnet50 --compression 20 --targets conv2d linear",
        f"{names}, as resnet50",
    )

    command = add(
        "fit",
        [model, request, output, few_bits, force],
        "fit a generator to a model's trained weights",
        "hyperize fit resnet18 --checkpoint resnet18.safetensors --data-dir images --out "
        "hyper.safetensors",
        f"{names}, as resnet18.a1_in1k",
    )
    command.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="F",
        help="its state dict; otherwise the weights that timm or transformers fetch, or those of "
        "the factory; of several one generator makes all the networks",
    )
    command.add_argument(
        "--out", required=True, metavar="F", help="file of hyperize.save to write: .safetensors"
    )
    command.add_argument(
        "--data-dir",
        metavar="DIR",
        help="images, unlabelled, of which the fit minimises the layers' output errors; far better "
        "than weights alone",
    )
    command.add_argument(
        "--samples", type=_count, default=512, metavar="N", help="of them (default: %(default)s)"
    )

    hyper = _Parser(add_help=False)
    hyper.add_argument("--checkpoint", required=True, metavar="F", help="file of hyperize.save")
    hyper.add_argument(
        "--condition", type=int, metavar="K", help="which of several networks in the file, from 0"
    )

    command = add(
        "convert",
        [model, hyper, rounding, force],
        "a file of hyperize.save to dense weights",
        "hyperize convert --checkpoint hyper.safetensors --out dense.safetensors",
        f"{names}; default: the one of timm that the file names",
    )
    command.add_argument(
        "--out",
        required=True,
        metavar="OUT",
        help="a .safetensors file of a state dict, or a folder, whose name has no ending, for "
        "timm.create_model('local-dir:')",
    )

    command = add(
        "export",
        [model, hyper, force],
        "a file of hyperize.save to ONNX or torch.export",
        "hyperize export --checkpoint hyper.safetensors --out model.onnx",
        f"{names}; default: the one of timm that the file names",
    )
    command.add_argument("--out", required=True, metavar="F", help="file to write: .onnx or .pt2")
    command.add_argument(
        "--input-size",
        **counts,
        count=3,
        metavar="N",
        help="channels, height and width; default: the model's",
    )
    command.add_argument(
        "--batch-size", type=_count, metavar="N", help="fix the batch size; default: it is free"
    )
    command.add_argument(
        "--keep-generator",
        action="store_true",
        help="keep the generator in the file, which is small then and generates at run time",
    )

    command = add(
        "info",
        [output, page, force],
        "what is in a file of hyperize.save",
        "hyperize info hyper.safetensors --html report.html",
    )
    command.add_argument("file", metavar="FILE", help="file of hyperize.save")

    command = add(
        "zoo",
        [model, request, output],
        "a table over many timm models",
        "hyperize zoo --filter 'resnet*' --compression 20",
    )
    command.add_argument(
        "--filter", **words, metavar="GLOB", help="timm model names, as 'resnet*' 'vit_tiny*'"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
