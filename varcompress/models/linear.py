"""Linear layers of the transformer: as torch has them, and with their weight in the processor's own layout.

On a CPU, torch multiplies float32 matrices with MKL, weights laid out as the checkpoint has them. oneDNN, which torch
ships too, multiplies with a weight in blocks of its own: on some processors several times faster for the few tokens of
an early scale, on others not at all. So it is measured, once per process, and `pack` swaps it in where it wins. The
operators for it are private ones of torch's; nothing outside this file names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcompress.hardware import is_faster

TRIAL_ROWS = 32  # of a matrix product of an early scale: some milliseconds
STATE_SAMPLES = 32  # numbers by which a copy of a weight knows that it is old


class Linear(nn.Linear):
    """A linear layer whose bias may come from elsewhere, and that a GELU may follow.

    What is swapped in for it from outside must have its `forward`.
    """

    def forward(self, x: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
        """x (..., in) -> (..., out), with `bias` where the layer has none of its own, then tanh-GELU if asked."""
        y = F.linear(x, self.weight, self.bias if bias is None else bias)
        if not gelu:
            return y
        # in place where nothing asks for a gradient: the hidden layer is the largest map of a transformer
        return F.gelu(y, approximate="tanh") if y.requires_grad else torch.ops.aten.gelu_(y, approximate="tanh")


class PackedLinear(Linear):
    """A `Linear` with a second copy of its weight in oneDNN's layout, for inference on a CPU.

    It shares the parameters of the layer in whose place it stands. The copy is of the weight at the last `refresh`;
    whoever calls it refreshes first, once a call, which is cheap where nothing has changed.
    """

    _copy: tuple[tuple[float, ...], Tensor] | None = None

    def refresh(self) -> None:
        """Copy the weight, unless there is a copy of it as it is now."""
        state = weight_state(self.weight)
        if self._copy is None or self._copy[0] != state:
            self._copy = (state, torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None))

    def _apply(self, *args: object, **kwargs: object) -> PackedLinear:
        self._copy = None  # of another dtype or device
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        """For a copy or a pickle, which cannot hold a tensor in oneDNN's layout."""
        return {name: value for name, value in self.__dict__.items() if name != "_copy"}

    def forward(self, x: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
        """As `Linear.forward`; with gradients enabled from the weight itself, whose copy goes: training changes it."""
        if torch.is_grad_enabled():
            self._copy = None
        if self._copy is None or torch.is_autocast_enabled("cpu"):  # which casts the operators that it knows
            return super().forward(x, bias, gelu=gelu)
        activation = ("gelu", [], "tanh") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, self._copy[1], self.bias if bias is None else bias, *activation)


class ConditionLinear(nn.Linear):
    """A linear layer of one row per image, read once per call. Never packed: its bytes are a third of a model's.

    On a CPU the weight stands on the left of the product, where MKL reads it several times faster for few rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in) -> (B, out)."""
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        return torch.addmm(self.bias[:, None], self.weight, x.t()).t().contiguous()


# -- swapping -----------------------------------------------------------------------------------


def linear_layers(module: nn.Module) -> list[Linear]:
    """The layers of a module that may be packed."""
    return [layer for layer in module.modules() if isinstance(layer, Linear)]


def pack(module: nn.Module) -> None:
    """Put a `PackedLinear` in the place of every `Linear` of a module, and bring all copies up to date."""
    for layer in _swapped(module, Linear, PackedLinear):
        layer.refresh()


def unpack(module: nn.Module) -> None:
    """Put plain layers back, and free the copies."""
    for _ in _swapped(module, PackedLinear, Linear):
        pass


def packing_pays(module: nn.Module) -> bool:
    """Whether the linear layers of a module are better packed: on a CPU, where a trial at their width says so."""
    layers = linear_layers(module)
    on_cpu = all(layer.weight.device.type == "cpu" for layer in layers)
    return on_cpu and packing_wins(layers[0].weight.dtype, layers[0].in_features)


def _swapped(module: nn.Module, old: type[Linear], new: type[Linear]) -> Iterator[Linear]:
    """The layers of a module as `new`, each in the place of one that was exactly `old`."""
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if type(layer) is old:
                setattr(parent, name, _as(layer, new))
            if isinstance(layer, Linear):
                yield getattr(parent, name)


def _as(layer: Linear, kind: type[Linear]) -> Linear:
    """A layer of another kind with the parameters, and the hooks, of `layer`."""
    other = kind.__new__(kind)
    other.__dict__.update({name: value for name, value in layer.__dict__.items() if name != "_copy"})
    return other


@lru_cache
def packing_wins(dtype: torch.dtype, width: int) -> bool:
    """Whether a packed product of `width` x `width` weights is faster on this processor than torch's own: measured."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    with torch.inference_mode():
        x = torch.randn(TRIAL_ROWS, width).to(dtype)
        plain, packed = Linear(width, width, dtype=dtype), PackedLinear(width, width, dtype=dtype)
        try:
            packed.refresh()
            return is_faster(lambda: packed(x), lambda: plain(x))
        except RuntimeError:  # oneDNN has no such product for this type or processor
            return False


# -- whether a copy is old, and the bytes and FLOPs of packed weights -----------------------------


def weight_state(weight: Tensor) -> tuple[float, ...]:
    """Where a weight is, its version, and a few of its numbers: by these a copy of it knows whether it is old.

    The version tells of any edit but a fused optimiser's and one through `.data`: the numbers tell of those, unless the
    edit is of few numbers. Their stride is odd, so that they are of many rows and columns.
    """
    numbers = weight.detach().flatten()
    version = 0 if weight.is_inference() else weight._version  # inference tensors have none
    return weight.data_ptr(), version, *numbers[:: len(numbers) // STATE_SAMPLES | 1].tolist()


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes behind a tensor, one in oneDNN's layout included."""
    return torch.ops.mkldnn._nbytes(tensor) if tensor.is_mkldnn else tensor.untyped_storage().nbytes()


def packed_flops() -> dict[object, Callable[..., int]]:
    """For torch's FlopCounterMode, which does not know it: the packed product's operator and its FLOPs by shapes."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return {}
    return {
        torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, out_shape=None, **__: 2 * math.prod(x) * weight[0]
    }
