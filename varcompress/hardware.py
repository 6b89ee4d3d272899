"""The machine: what a device is called, and what to say when its memory is too small."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from varcompress.errors import InputError


def device_name(device: torch.device | str) -> str:
    """The hardware behind a device: the GPU's name, or the processor's with the threads torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


@contextmanager
def fitting_memory(device: torch.device | str, images: int, remedy: str = "choose a smaller one") -> Iterator[None]:
    """Turns running out of memory, a GPU's or the processor's, into an InputError that names the batch and a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError on a GPU is a RuntimeError
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and "can't allocate memory" not in str(error):
            raise
        raise InputError(
            f"a batch of {images} images does not fit in the memory of {device_name(device)}: {remedy}"
        ) from error
