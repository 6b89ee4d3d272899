"""The key/value cache: allocated once, each layer exactly as long as the schedule reads it.

One arena holds the keys and values of all layers in use. Each segment of the schedule lays it
out afresh: layer of rank r owns rows [r * t, (r + 1) * t), t being the tokens at the segment's
end. Ranks put the longest-lived layers first, so the layers that survive a segment are the first
ranks of the next, a survivor only ever moves to higher rows, and moving from the last rank to the
first never overwrites what has not moved yet. The arena is therefore exactly
`Schedule.peak_rows` long, with no second buffer and no concatenation.

Stored in eight bits (int8, float8), every key and value of a head and token has a quantisation scale of
its own beside it, and a layer's are turned back into the model's dtype while the layer runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varcompress.schedule import Gapped, Schedule

QUANT_SCALE_DTYPE = torch.bfloat16
# The largest value of each eight-bit type.
QUANTISED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def token_bytes(*, width: int, heads: int, dtype: torch.dtype) -> int:
    """Bytes that one layer's keys, or values, of one token take when stored in `dtype`."""
    return width * dtype.itemsize + (heads * QUANT_SCALE_DTYPE.itemsize if dtype in QUANTISED else 0)


class KVCache:
    """Keys and values of one generation call.

    rows: (2, batch, heads, peak_rows, head_dim); index 0 keys, 1 values. `batch` is the
    number of images, twice that where they are guided. dtype: of the model; stored: of the rows, int8 and
    float8_e4m3fn besides the model's own; those have quant_scales (2, batch, heads, peak_rows, 1).
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        batch: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        stored: torch.dtype | None = None,
    ) -> None:
        self.schedule, self.dtype = schedule, dtype
        shape = (2, batch, heads, schedule.peak_rows)
        self.rows = torch.empty(*shape, head_dim, dtype=stored or dtype, device=device)
        self.quant_scales = (
            torch.empty(*shape, 1, dtype=QUANT_SCALE_DTYPE, device=device) if stored in QUANTISED else None
        )
        by_life = sorted(schedule.layers[0], key=lambda layer: -schedule.layer_tokens[layer])
        self._rank = {layer: rank for rank, layer in enumerate(by_life)}
        self._segment = 0
        self._start = 0

    @property
    def nbytes(self) -> int:
        """Bytes the cache holds, from its creation to its end."""
        return sum(part.nbytes for part in self._parts())

    def _parts(self) -> list[Tensor]:
        return [self.rows] if self.quant_scales is None else [self.rows, self.quant_scales]

    def begin(self, scale: int) -> None:
        """Enter `scale` (from 0). Drops the layers that the schedule no longer reads and makes room for the others."""
        segments = self.schedule.segments
        self._start = self.schedule.ends[scale - 1] if scale else 0
        if scale not in segments[self._segment].scales:
            old, self._segment = segments[self._segment].tokens, self._segment + 1
            segment = segments[self._segment]
            for rank in reversed(range(len(segment.layers))):
                for part in self._parts():
                    _move(part, rank * old, rank * segment.tokens, old)

    def new(self, layer: int, tokens: int, batch: slice = slice(None)) -> Tensor:
        """Where to write this scale's keys and values of a layer, for part of the batch.

        Returns (2, batch, heads, tokens, head_dim).
        """
        rows = self._of(self.rows, layer, self._start, self._start + tokens)[:, batch]
        return rows if self.quant_scales is None else torch.empty(rows.shape, dtype=self.dtype, device=rows.device)

    def read(self, layer: int, new: Tensor, batch: slice = slice(None)) -> Tensor:
        """All keys and values of a layer, once `new` is written: (2, batch, heads, tokens so far, head_dim).

        `new` is what `new` gave for this part of the batch, and is written over.
        """
        end = self._start + new.shape[3]
        rows = self._of(self.rows, layer, 0, end)[:, batch]
        if self.quant_scales is None:
            return rows
        quant_scales = self._of(self.quant_scales, layer, 0, end)[:, batch]
        largest = QUANTISED[rows.dtype]
        # in float32, because float16 has no number as small as the least scale
        quant_scale = (new.abs().amax(dim=-1, keepdim=True).float() / largest).clamp_min(
            torch.finfo(QUANT_SCALE_DTYPE).tiny
        )
        quant_scales[:, :, :, -new.shape[3] :] = quant_scale
        # divided by the scale as it is stored, whose rounding may put the largest value a little past the type's end
        new.div_(quant_scales[:, :, :, -new.shape[3] :]).clamp_(-largest, largest)
        rows[:, :, :, -new.shape[3] :] = new if rows.dtype.is_floating_point else new.round_()
        return rows.to(self.dtype).mul_(quant_scales)

    def _of(self, part: Tensor, layer: int, start: int, end: int) -> Tensor:
        base = self._rank[layer] * self.schedule.segments[self._segment].tokens
        return part[:, :, :, base + start : base + end]


class GappedCache(KVCache):
    """The cache of a `Gapped` schedule: each layer holds the tokens that it ran, and keeps them to the end."""

    schedule: Gapped

    def begin(self, scale: int) -> None:
        self._start = self.schedule.ends[scale - 1] if scale else 0

    def _of(self, part: Tensor, layer: int, start: int, end: int) -> Tensor:
        held, all_tokens = self.schedule.held, self.schedule.ends[-1]
        base = sum(held(before, all_tokens) for before in range(layer))
        return part[:, :, :, base + held(layer, start) : base + held(layer, end)]


def _move(part: Tensor, source: int, target: int, length: int) -> None:
    """Copy rows upwards in pieces no longer than the distance, so that a piece never overlaps its target."""
    shift = target - source
    end = length if shift else 0
    while end > 0:
        begin = max(0, end - shift)
        part[:, :, :, target + begin : target + end] = part[:, :, :, source + begin : source + end]
        end = begin
