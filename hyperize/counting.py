"""Multiply-adds of a dense model's forward pass, counted on the meta device."""

from __future__ import annotations

import torch
from torch import nn

from hyperize.conditions import conditions_of
from hyperize.rewrite import to_dense
from hyperize.sites import structural_copy, to_meta

__all__: list[str] = []


def forward_macs(hyper: nn.Module) -> tuple[int, tuple[int, ...]]:
    """What the dense model of a hyperized one does for one input, of the size that timm gives it.

    Args:
        hyper: A hyperized model; not changed.

    Returns:
        The multiply-adds and the size; 0 and () where the size is not known, or the model does not
        run on the meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode  # nothing else needs it

    size = (getattr(hyper, "pretrained_cfg", None) or {}).get("input_size")
    if not size:
        return 0, ()
    try:
        twin = structural_copy(hyper, to_meta)
        dense = to_dense(twin, inplace=True, condition=0 if conditions_of(twin) else None).eval()
        x = torch.empty(1, *size, device="meta", dtype=next(dense.parameters()).dtype)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), counter:
            dense(x)
    except Exception:  # any model code can run here, and raise anything
        return 0, ()
    macs = counter.get_total_flops() // 2
    return macs, tuple(size) if macs else ()
