"""How a model runs: one frozen object that a model is placed with, and that a single call may differ from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from varcompress.errors import InputError
from varcompress.kernels.backend import CHOICES, Kernels, choose

CACHE_DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
OFFLOADS = ("bridge",)
# Of the largest tensor of a call. Beyond, operators take so much longer than their launches that a graph saves less
# than the memory is worth that it holds for good: here it saves 9 to 17 % of a call of VAR-d30 (docs/performance.md).
GRAPHED_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Runtime:
    """Where and in what numbers a model runs, and by which means.

    device, dtype: of the transformer and the decoder (encoder and quantiser are float32 always);
    kernels: "torch" for plain torch alone, "triton" for the fused kernels, "auto" for what is fast on the device;
    cache_dtype: "int8" or "float8" stores keys and values in eight bits, None in `dtype`;
    offload: "bridge" keeps the layers that a schedule's last scale does not run in host memory;
    graphs: whether calls are recorded as CUDA graphs, on a GPU where that pays.
    Raises InputError for a value that is unknown, or that the device cannot do.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    kernels: str = "auto"
    cache_dtype: str | None = None
    offload: str | None = None
    graphs: bool = True

    def __post_init__(self) -> None:
        if self.kernels not in CHOICES:
            raise InputError(f"kernels {self.kernels!r} are unknown: use {', '.join(CHOICES)}")
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            known = " or ".join(CACHE_DTYPES)
            raise InputError(f"cache dtype {self.cache_dtype!r} is unknown: use {known}, or leave it out")
        if self.offload not in (None, *OFFLOADS):
            raise InputError(f"offload {self.offload!r} is unknown: use {OFFLOADS[0]}, or leave it out")
        try:
            choose(self.kernels, self.device)
        except ValueError as error:
            raise InputError(f"kernels {self.kernels!r}: {error}: use auto or torch") from error

    @property
    def operations(self) -> Kernels:
        """The operations that `kernels` means on the device."""
        return choose(self.kernels, self.device)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the cache's keys and values."""
        return CACHE_DTYPES.get(self.cache_dtype, self.dtype)

    def graphed(self, elements: int) -> bool:
        """Whether work on tensors of at most so many elements is recorded as a CUDA graph."""
        return self.graphs and self.device.type == "cuda" and self.offload is None and elements <= GRAPHED_ELEMENTS

    def eager(self) -> Runtime:
        """The same without graphs: on a GPU, operators run one by one, visible to counters."""
        return replace(self, graphs=False)
