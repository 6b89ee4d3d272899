"""Which layers run at which scale, and what that costs. Plain Python, no torch.

A model of `depth` layers decodes an image in K scales; scale k is a patch_nums[k] x patch_nums[k]
map of tokens. A `Schedule` names the layers that run at each scale (VARiant, arXiv 2511.16546).
The layers in use may only shrink from scale to scale: a layer that was skipped has no cache for
the tokens it missed. Everything else here is arithmetic on that: tokens, cache bytes, FLOPs.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from varcompress.errors import InputError

FORMS = "write full, d8, d8@6 or 30x6,8x4"


def equidistant(layers: Iterable[int], depth: int) -> tuple[int, ...]:
    """The `depth` members of `layers` at equal distances, first and last always among them.

    On all D layers this is I_d = { floor(i (D-1) / (d-1)) } of VARiant, section 3.
    """
    layers = tuple(layers)
    if depth == len(layers):
        return layers
    if not 2 <= depth < len(layers):
        raise InputError(f"depth {depth}: a subnet of {len(layers)} layers has 2 to {len(layers)} of them")
    return tuple(layers[i * (len(layers) - 1) // (depth - 1)] for i in range(depth))


@dataclass(frozen=True)
class Segment:
    """Consecutive scales that run the same layers."""

    scales: range
    layers: tuple[int, ...]
    tokens: int  # tokens of the image when the segment ends: the cache length of each of its layers


@dataclass(frozen=True)
class Schedule:
    """The layers that run at each scale.

    depth: layers of the model; patch_nums: side of each scale's token map;
    layers: for each scale the indices that run, ascending.
    Raises InputError when a layer comes back after it was skipped, naming layer and scale (counted from 1).
    """

    depth: int
    patch_nums: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.patch_nums):
            raise InputError(f"a schedule of {len(self.layers)} scales: this model has {len(self.patch_nums)}")
        allowed = set(range(self.depth))
        for scale, layers in enumerate(self.layers, start=1):
            if not layers or list(layers) != sorted(set(layers)):
                raise InputError(f"scale {scale}: layers must be ascending and at least one, not {layers}")
            back = sorted(set(layers) - allowed)
            if back and back[0] >= self.depth:
                raise InputError(f"scale {scale} names layer {back[-1]}: this model has layers 0 to {self.depth - 1}")
            if back:
                raise InputError(
                    f"layer {back[0]} comes back at scale {scale}: it was skipped before and has no cache; "
                    "from scale to scale a schedule may only shrink"
                )
            allowed = set(layers)

    @classmethod
    def parse(cls, text: str, *, depth: int, patch_nums: Iterable[int], bridge: int) -> Schedule:
        """Read `full`, `d8` (subnet of 8 after the model's own bridge), `d8@6` or `30x6,8x4` (depth x scales).

        In a list of depths each is drawn at equal distances from the layers still in use, so that
        30x6,16x2,8x2 shrinks although the 8 of 30 are not all among the 16 of 30.
        """
        patch_nums = tuple(patch_nums)
        count = len(patch_nums)
        text = text.strip().lower()
        if text == "full":
            runs = [(depth, count)]
        elif match := re.fullmatch(r"d(\d+)(?:@(\d+))?", text):
            zone = int(match[2]) if match[2] else bridge
            if zone > count:
                raise InputError(f"schedule {text!r}: a bridge of {zone} scales, but this model has {count}")
            runs = [(depth, zone), (int(match[1]), count - zone)]
        elif re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text):
            runs = [(int(d), int(n)) for d, n in (part.split("x") for part in text.split(","))]
            if sum(n for _, n in runs) != count or any(n == 0 for _, n in runs):
                raise InputError(f"schedule {text!r}: {sum(n for _, n in runs)} scales, but this model has {count}")
        else:
            raise InputError(f"schedule {text!r} is not understood: {FORMS}")
        in_use: tuple[int, ...] = tuple(range(depth))
        layers: list[tuple[int, ...]] = []
        for width, scales in runs:
            if width > depth:
                raise InputError(f"schedule {text!r}: {width} layers, but this model has {depth}")
            if width > len(in_use):
                missing = next(i for i in range(depth) if i not in in_use)
                raise InputError(
                    f"schedule {text!r} widens to {width} layers at scale {len(layers) + 1}: "
                    f"layer {missing} was skipped before and has no cache; list depths from large to small"
                )
            if width < 2 <= depth:
                raise InputError(f"schedule {text!r}: a subnet has at least 2 layers, the first and the last")
            in_use = equidistant(in_use, width)
            layers += [in_use] * scales
        return cls(depth, patch_nums, tuple(layers))

    def __str__(self) -> str:
        text = self._depths_text()
        with contextlib.suppress(InputError):  # a single layer has no text form
            if Schedule.parse(text, depth=self.depth, patch_nums=self.patch_nums, bridge=0) == self:
                return text
        return f"custom {text}"

    def _depths_text(self) -> str:
        """The text form that has the same depths, whichever layers they are."""
        depths = [(len(segment.layers), len(segment.scales)) for segment in self.segments]
        if depths == [(self.depth, len(self.patch_nums))]:
            return "full"
        if len(depths) == 1:
            return f"d{depths[0][0]}@0"
        if len(depths) == 2 and depths[0][0] == self.depth:
            return f"d{depths[1][0]}@{depths[0][1]}"
        return ",".join(f"{depth}x{scales}" for depth, scales in depths)

    # -- tokens ---------------------------------------------------------------------------------

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens of the image after each scale; the last is L."""
        return tuple(accumulate(p * p for p in self.patch_nums))

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Runs of scales with equal layers, in order."""
        runs = [list(run) for _, run in groupby(range(len(self.layers)), key=lambda k: self.layers[k])]
        return tuple(Segment(range(r[0], r[-1] + 1), self.layers[r[0]], self.ends[r[-1]]) for r in runs)

    @cached_property
    def layer_tokens(self) -> tuple[int, ...]:
        """Tokens each layer of the model ever sees (0 for a layer that never runs)."""
        return tuple(max((s.tokens for s in self.segments if i in s.layers), default=0) for i in range(self.depth))

    # -- cost -----------------------------------------------------------------------------------

    @cached_property
    def scale_rows(self) -> tuple[int, ...]:
        """Layers x tokens the cache holds during each scale, at the length its segment needs."""
        return tuple(len(s.layers) * s.tokens for s in self.segments for _ in s.scales)

    @property
    def peak_rows(self) -> int:
        """Layers x tokens of cache at its largest."""
        return max(self.scale_rows)

    def cache_bytes(self, *, batch: int, token_bytes: int) -> int:
        """Peak bytes of keys and values for `batch` guided images (guidance doubles the batch).

        token_bytes: what one layer's keys of one token take, width x element bytes and the like.
        """
        return 2 * (2 * batch) * self.peak_rows * token_bytes

    def flops(self, *, width: int, vocab: int, mlp_ratio: float = 4.0) -> int:
        """FLOPs of the transformer for one guided image: linear layers, attention and head.

        Two FLOPs per multiply-add. Guidance doubles the rows, but at the first scale its weight is 0, so the head
        reads half of them. The AdaLN vectors are left out: they are computed once per image.
        """
        start, total = 0, -2 * self.ends[0] * width * vocab
        for layers, end in zip(self.layers, self.ends, strict=True):
            tokens = end - start
            linear = 2 * tokens * round((4 + 2 * mlp_ratio) * width * width)
            attention = 4 * tokens * end * width
            total += 2 * (len(layers) * (linear + attention) + 2 * tokens * width * vocab)
            start = end
        return total

    def weights(self, *, width: int, mlp_ratio: float = 4.0) -> tuple[int, ...]:
        """Block weights (matrix elements) read at each scale, AdaLN left out."""
        return tuple(len(layers) * round((4 + 2 * mlp_ratio) * width * width) for layers in self.layers)
