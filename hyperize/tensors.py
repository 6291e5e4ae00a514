"""What kinds of tensors there are that other code has to tell apart."""

from __future__ import annotations

import torch
from torch import Tensor

__all__: list[str] = []

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format of images and volumes whose channels come last, by the number of axes."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, as FSDP2 makes it; torch need not have torch.distributed."""
    return type(tensor).__name__ == "DTensor"
