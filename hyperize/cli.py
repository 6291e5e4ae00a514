"""The console command `hyperize report | convert | zoo`: thin; flags are named as in timm."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

from hyperize.config import FileError, HyperConfig, HyperizeError
from hyperize.files import load
from hyperize.planning import make_plan
from hyperize.reporting import WIDTH, report
from hyperize.rewrite import dense_state_dict

__all__ = ["main"]

OK, FAILED, USAGE = 0, 1, 2
"""Exit codes: done; a request that cannot be carried out; a wrong command line (argparse)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if `None`.

    Returns:
        The exit code: 0, or 1 with one line on stderr if the request cannot be carried out.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except HyperizeError as error:
        print(f"hyperize: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _report(args: argparse.Namespace) -> int:
    """The compression report of one timm model, planned on the meta device."""
    result = report(make_plan(_meta_model(args), _config(args)))
    print(result.to_json() if args.json else result)
    return OK


def _convert(args: argparse.Namespace) -> int:
    """A file of hyperize.save, to the dense model's state dict."""
    if not Path(args.checkpoint).is_file():
        raise FileError(f"--checkpoint {args.checkpoint} is not a file.")
    hyper = load(_meta_model(args), args.checkpoint)
    state = {name: t.contiguous().clone() for name, t in dense_state_dict(hyper).items()}
    out = Path(args.out)
    part = out.with_name(f".{out.name}.part")
    try:
        save_file(state, part, metadata={"format": "pt"})
        part.replace(out)
    except OSError as error:
        raise FileError(f"--out {out} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    weights = sum(tensor.numel() for tensor in state.values())
    sizes = f"{_megabytes(args.checkpoint)} -> {_megabytes(out)}"
    print(f"{out}: {len(state)} tensors, {weights:,} numbers, {sizes}")
    return OK


_FIGURES = tuple(
    scope + figure
    for scope in ("", "total_")
    for figure in ("dense_params", "hyper_params", "compression")
)


def _zoo(args: argparse.Namespace) -> int:
    """One row per timm model, planned on the meta device."""
    names = timm.list_models(args.filter or "")
    if not names:
        raise HyperizeError(f"--filter {args.filter!r} matches no timm model.")
    config = _config(args)
    progress = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    for name in track(names, "planning", console=progress, disable=not progress.is_terminal):
        args.model = name
        try:
            result = report(make_plan(_meta_model(args), config))
        except HyperizeError as error:
            rows.append({"model": name, "refused": str(error)})
            continue
        rows.append({"model": name} | {figure: getattr(result, figure) for figure in _FIGURES})
    if args.json:
        print(json.dumps(rows, indent=2))
        return OK
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold", ratio=1)
    for column in ("targets", "hyper", "ratio", "model", "hyper", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if "refused" in row:
            table.add_row(row["model"], "-", "-", "-", "-", "-", "-")
            continue
        cells = []
        for scope in ("", "total_"):
            cells += [f"{row[f'{scope}{side}_params'] / 1e6:,.2f}M" for side in ("dense", "hyper")]
            cells.append(f"{row[f'{scope}compression']:.2f}")
        table.add_row(row["model"], *cells)
    console = Console(width=WIDTH, markup=False, highlight=False)
    console.print(table)
    if refused := [row for row in rows if "refused" in row]:
        console.print(f"\n{len(refused)} of {len(rows)} models refused:")
        for row in refused:
            console.print(f"{row['model']}: {row['refused']}")
    return OK


def _meta_model(args: argparse.Namespace) -> nn.Module:
    """The timm model of `args` on the meta device."""
    flags = {"num_classes": args.num_classes, "in_chans": args.in_chans}
    flags["img_size"] = args.img_size
    kwargs = {k: v for k, v in flags.items() if v is not None} | (args.model_kwargs or {})
    if not timm.is_model(args.model):
        near = timm.list_models(f"*{args.model}*")[:3]
        hint = f"; near misses: {', '.join(near)}" if near else ""
        raise HyperizeError(f"timm has no model {args.model!r}{hint}.")
    with torch.device("meta"):
        try:
            return timm.create_model(args.model, **kwargs)
        except (TypeError, RuntimeError, ValueError) as error:
            raise HyperizeError(f"timm cannot create {args.model} so: {error}") from error


def _config(args: argparse.Namespace) -> HyperConfig:
    names = [field.name for field in fields(HyperConfig) if hasattr(args, field.name)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return HyperConfig(**given)


def _megabytes(path: str | Path) -> str:
    return f"{Path(path).stat().st_size / 1e6:.1f} MB"


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hyperize",
        description="Generate a model's weights from one shared hypernetwork.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    group = model.add_argument_group("model (as in timm)")
    group.add_argument("--num-classes", type=int, metavar="N")
    group.add_argument("--in-chans", type=int, metavar="N")
    group.add_argument("--img-size", type=int, metavar="N")
    group.add_argument(
        "--model-kwargs",
        type=_key_value,
        action=_Collect,
        nargs="*",
        metavar="KEY=VALUE",
        help="further arguments of timm.create_model",
    )

    request = argparse.ArgumentParser(add_help=False)
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
    group.add_argument("--targets", nargs="+", metavar="KIND", help="default: conv2d lstm")
    group.add_argument("--include", nargs="+", metavar="GLOB", help="module paths to rewrite")
    group.add_argument("--exclude", nargs="+", metavar="GLOB", help="module paths to leave dense")
    group.add_argument("--embedding-dim", type=int, metavar="N", help="default: planned")
    group.add_argument("--hidden-dim", type=int, metavar="N", help="default: planned")
    group.add_argument(
        "--tile", nargs=2, type=int, metavar=("OUT", "IN"), help="default: planned by kernel size"
    )
    group.add_argument(
        "--lstm", choices=("static", "dynamic"), help="generate LSTM weights, or put HyperLSTMs"
    )
    request.add_argument("--json", action="store_true", help="print JSON")

    command = commands.add_parser(
        "report", parents=[model, request], help="what compressing a timm model saves"
    )
    command.add_argument("model", help="timm model name, as resnet50")
    command.set_defaults(run=_report)

    command = commands.add_parser(
        "convert", parents=[model], help="a checkpoint of hyperize.save to dense weights"
    )
    command.add_argument("model", help="timm model name, as resnet50")
    command.add_argument("--checkpoint", required=True, metavar="F", help="file of hyperize.save")
    command.add_argument("--out", required=True, metavar="F", help="dense .safetensors to write")
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        "zoo", parents=[model, request], help="a table over many timm models"
    )
    command.add_argument("--filter", metavar="GLOB", help="timm model names, as 'resnet*'")
    command.set_defaults(run=_zoo)
    return parser


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


if __name__ == "__main__":
    sys.exit(main())
