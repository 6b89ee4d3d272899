"""The machine: what a device is called, what it is fast at, and what to say when its memory is too small."""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from varcompress.errors import InputError

TRIAL_WIDTH, TRIAL_RUNS = 512, 9  # a matrix product of some milliseconds
T = TypeVar("T")
SHAPES = 64  # that torch.compile makes code for; its own limit is 8
MARGIN = 0.9  # of the other's time, below which a call counts as faster: less is noise


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device called so; None is a GPU when there is one. Raises InputError for one that is not there."""
    if device is None:
        return _numbered(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is unknown: use cpu, cuda or cuda:1") from error
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not supported: use cpu or cuda")
    count = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= count:
        raise InputError(f"device {device!r}: torch sees {count or 'no'} CUDA devices here: use cpu")
    return _numbered(place)


def _numbered(device: torch.device) -> torch.device:
    """A GPU by its number: "cuda" is the current one, which may be another at the next call."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


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


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """A function by torch.compile, which makes code for each shape that it is called with. InputError: see below."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    made = torch.compile(function, dynamic=False)

    @wraps(function)
    def call(*args: object, **kwargs: object) -> T:
        with compiling():
            return made(*args, **kwargs)

    return call


@contextmanager
def compiling() -> Iterator[None]:
    """A block that may run torch.compile. Raises InputError where no code can be made, as for want of a C compiler."""
    try:
        yield
    except RuntimeError as error:  # such of torch._dynamo, which nobody imports who compiles nothing
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"torch.compile fails here ({reason}): a C compiler such as gcc may be missing") from error


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """A block whose float32 products and convolutions are in float32, whatever the process allows, and no autocast.

    A GPU may otherwise round their inputs to TF32, and a processor to bfloat16: tokens and scores must be exact.
    """
    with without_autocast(device), _PRECISION:
        yield


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A block in the dtypes that its tensors have, whatever autocast surrounds it."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class _ExactPrecision:
    """torch's precision settings are the process's: the first thread to enter makes them exact, the last undoes it."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._undo = [_changed(*setting) for setting in _precision_settings()]
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for undo in self._undo:
                    undo()


_PRECISION = _ExactPrecision()


def _precision_settings() -> list[tuple[Callable[[], object], Callable[[object], None], object]]:
    """How each of torch's precision settings is read and written, and its exact value.

    There is one for each kind of operator, and torch raises where its older flags are mixed with them. What an operator
    has no setting of its own for it takes from those that come first here.
    """
    backends = torch.backends
    values = dict.fromkeys((backends, backends.cudnn), "none")
    operators = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    values |= dict.fromkeys(operators, "ieee")
    name = "fp32_precision"
    return [(partial(getattr, part, name), partial(setattr, part, name), exact) for part, exact in values.items()]


def _changed(read: Callable[[], object], write: Callable[[object], None], value: object) -> Callable[[], None]:
    """Write a setting; what writes it back as it was."""
    before = read()
    write(value)
    return partial(write, before)


@lru_cache
def bfloat16_wins(device: str) -> bool:
    """Whether "cuda" or "cpu" multiplies matrices faster in bfloat16 than in float32.

    A processor without instructions for it can be far slower with it, so it is measured, once per process.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    with torch.inference_mode():
        plain = torch.randn(TRIAL_WIDTH, TRIAL_WIDTH)
        half = plain.bfloat16()
        return is_faster(lambda: half @ half, lambda: plain @ plain)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor of any device, with or without gradient, as an array of the same shape in the host's memory."""
    return tensor.detach().cpu().numpy()


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, call: Callable[[], T]) -> tuple[T, float]:
    """What `call` returns, and the milliseconds until the device has finished it."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return result, (time.perf_counter() - start) * 1e3


def is_faster(call: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether a call is clearly faster than another: the fastest of a few, in turns, so that other work slows both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + TRIAL_RUNS):
        for run, spent in zip((call, other), times, strict=True):
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
    fastest, fastest_other = (min(spent[1:]) for spent in times)  # the first warms up
    return fastest < MARGIN * fastest_other


def most_held_bytes(device: torch.device) -> int | None:
    """The most memory that this process has held so far: of a GPU in tensors, on a CPU all of it; None if untold."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def free_bytes() -> int | None:
    """Memory that processes may still take, or this one's container (cgroup v2) where that is less; None if untold.

    The system overcommits: no allocation fails, and a process that uses too much is killed.
    """
    found = []
    info, container = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if info.is_file():
        found.append(1024 * int(_lines(info)["MemAvailable:"].split()[0]))
    limit, usage = container / "memory.max", container / "memory.stat"
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        files = int(_lines(usage)["inactive_file"]) if usage.is_file() else 0  # copies of what was read, which can go
        found.append(int(most) - int((container / "memory.current").read_text()) + files)
    return min(found, default=None)


def _lines(path: Path) -> dict[str, str]:
    """A file of names and values."""
    return dict(line.split(maxsplit=1) for line in path.read_text().splitlines())


@contextmanager
def fitting_memory(device: torch.device | str, num_images: int, remedy: str = "choose a smaller one") -> Iterator[None]:
    """Turns running out of memory, a GPU's or the processor's, into an InputError that names the batch and a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError on a GPU is a RuntimeError
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and "can't allocate memory" not in str(error):
            raise
        raise InputError(
            f"a batch of {num_images:,} image{'' if num_images == 1 else 's'} does not fit in the memory of "
            f"{device_name(device)}: {remedy}"
        ) from error
