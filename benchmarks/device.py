"""A CUDA device as the benchmarks use it: the only place with calls that a CPU does not have."""

from __future__ import annotations

import gc
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DRIVER = Path("/proc/driver/nvidia/version")


class Cuda:
    """The current CUDA device.

    Attributes:
        type: Of its tensors.
        backend: Of `torch.compile`.
    """

    type = "cuda"
    backend = "inductor"

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Float32 products without tf32, and cuDNN chooses by measuring; as before afterwards."""
        cudnn = torch.backends.cudnn
        before = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
        cudnn.benchmark, cudnn.allow_tf32 = True, False
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.allow_tf32 = before[:2]
            torch.set_float32_matmul_precision(before[2])

    def machine(self) -> dict[str, str]:
        """What stands above the table; a value without a key speaks for itself."""
        return {
            "": torch.cuda.get_device_name(),
            "driver": self._driver(),
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "tf32": "off",
        }

    def _driver(self) -> str:
        """The driver's version, from its own command or what Linux says of it."""
        command = shutil.which("nvidia-smi")
        if command is not None:
            query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
            done = subprocess.run(query, capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout.strip():
                return done.stdout.split()[0]
        words = DRIVER.read_text().split() if DRIVER.exists() else []
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 ..."
        return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast to bfloat16."""
        return torch.autocast(self.type, torch.bfloat16)

    def place(self, network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Moves a network here, in place, with the weights of convolutions in channels_last."""
        return network.to(self.type, dtype).to(memory_format=torch.channels_last)

    def put(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor here; images in channels_last."""
        format = torch.channels_last if x.ndim == 4 else torch.preserve_format
        return x.to(device=self.type, dtype=dtype, memory_format=format)

    def synchronize(self) -> None:
        """Waits for all work that was begun."""
        torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], calls: int = 1) -> float:
        """The time of one of some calls, between two events; it waits only after the last.

        Garbage is collected before and not meanwhile.
        """
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        gc.collect()
        gc.disable()
        try:
            self.synchronize()
            begin.record()
            for _ in range(calls):
                work()
            end.record()
            end.synchronize()
        finally:
            gc.enable()
        return begin.elapsed_time(end) / 1000 / calls

    def peak_memory(self, work: Callable[[], object]) -> int:
        """The allocator's peak in a call, in bytes, less what was allocated before.

        cuDNN takes its own choice meanwhile: where it measures, it allocates for what it tries.
        """
        self.free()
        before, chooses = torch.cuda.memory_allocated(), torch.backends.cudnn.benchmark
        torch.cuda.reset_peak_memory_stats()
        torch.backends.cudnn.benchmark = False
        try:
            work()
            self.synchronize()
        finally:
            torch.backends.cudnn.benchmark = chooses
        return torch.cuda.max_memory_allocated() - before

    def free(self) -> None:
        """Gives back what nobody holds."""
        gc.collect()
        torch.cuda.empty_cache()


def find() -> Cuda | None:
    """The device; None if torch sees none."""
    return Cuda() if torch.cuda.is_available() else None


def facts(device: Cuda, precision: str) -> dict[str, Any]:
    """What results of the device depend on, for the JSON and above the table."""
    return {**device.machine(), "cuDNN's choice": "by measuring", "precision:": precision}
