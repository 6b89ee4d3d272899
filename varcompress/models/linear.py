"""Linear layers that keep their weight in the processor's own layout.

On a CPU, torch multiplies float32 matrices with MKL, weights laid out as the checkpoint has them. oneDNN, which torch
ships too, multiplies with a weight in blocks of its own: on some processors several times faster for the few tokens of
an early scale, on others not at all. So it is measured, once per process, and used where it wins.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcompress.hardware import is_faster

TRIAL_ROWS = 32  # of a matrix product of an early scale: some milliseconds
STATE_SAMPLES = 32  # numbers by which a packed copy knows its weight


class Linear(nn.Linear):
    """A linear layer, state-dict keys unchanged, that `pack` gives a second copy of its weight.

    For inference on a CPU, and for one call: whoever calls it packs first, which is cheap where nothing has changed.
    """

    _packed: tuple[tuple[float, ...], Tensor] | None = None

    def pack(self) -> None:
        """Keep a copy of the weight in oneDNN's layout, unless there is one of this weight as it is now."""
        state = weight_state(self.weight)
        if self._packed is None or self._packed[0] != state:
            self._packed = (state, torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None))

    def unpack(self) -> None:
        """Free the copy."""
        self._packed = None

    def _apply(self, *args: object, **kwargs: object) -> Linear:
        self._packed = None  # of another dtype or device
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        """For a copy or a pickle, which cannot hold a tensor in oneDNN's layout."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def forward(self, x: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
        """x (..., in) -> (..., out), with `bias` where the layer has none of its own, then tanh-GELU if asked."""
        bias = self.bias if bias is None else bias
        if torch.is_grad_enabled():  # training begins, after which the copy would be old
            self._packed = None
        if self._packed:
            activation = ("gelu", [], "tanh") if gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, self._packed[1], bias, *activation)
        y = F.linear(x, self.weight, bias)
        if not gelu:
            return y
        # in place where nothing asks for a gradient: the hidden layer is the largest map of a transformer
        return F.gelu(y, approximate="tanh") if y.requires_grad else torch.ops.aten.gelu_(y, approximate="tanh")


def weight_state(weight: Tensor) -> tuple[float, ...]:
    """Where a weight is, its version, and a few of its numbers: by these a copy of it knows whether it is old.

    The version tells of any edit but a fused optimiser's and one through `.data`: the numbers tell of those, unless the
    edit is of few numbers. Their stride is odd, so that they are of many rows and columns.
    """
    numbers = weight.detach().flatten()
    version = 0 if weight.is_inference() else weight._version  # inference tensors have none
    return weight.data_ptr(), version, *numbers[:: len(numbers) // STATE_SAMPLES | 1].tolist()


class ConditionLinear(nn.Linear):
    """A linear layer of one row per image, read once per call. Never packed: its bytes are a third of a model's.

    On a CPU the weight stands on the left of the product, where MKL reads it several times faster for few rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in) -> (B, out)."""
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        return torch.addmm(self.bias[:, None], self.weight, x.t()).t().contiguous()


def packable(module: nn.Module) -> list[Linear]:
    """The linear layers of a module that are to be packed: all on a CPU where that is faster, else none."""
    layers = [layer for layer in module.modules() if isinstance(layer, Linear)]
    on_cpu = all(layer.weight.device.type == "cpu" for layer in layers)
    return layers if on_cpu and packing_wins(layers[0].weight.dtype, layers[0].in_features) else []


@lru_cache
def packing_wins(dtype: torch.dtype, width: int) -> bool:
    """Whether a packed product of `width` x `width` weights is faster on this processor than torch's own: measured."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    with torch.inference_mode():
        x = torch.randn(TRIAL_ROWS, width).to(dtype)
        plain, packed = (Linear(width, width, dtype=dtype) for _ in range(2))
        try:
            packed.pack()
            return is_faster(lambda: packed(x), lambda: plain(x))
        except RuntimeError:  # oneDNN has no such product for this type or processor
            return False
