"""The key/value cache: allocated once, each layer exactly as long as the schedule reads it.

One arena holds the keys and values of all layers in use. Each segment of the schedule lays it
out afresh: layer of rank r owns rows [r * t, (r + 1) * t), t being the tokens at the segment's
end. Ranks put the longest-lived layers first, so the layers that survive a segment are the first
ranks of the next, a survivor only ever moves to higher rows, and moving from the last rank to the
first never overwrites what has not moved yet. The arena is therefore exactly
`Schedule.peak_rows` long, with no second buffer and no concatenation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varcompress.schedule import Schedule


class KVCache:
    """Keys and values of one generation call.

    rows: (2, batch, heads, peak_rows, head_dim); index 0 keys, 1 values. `batch` counts guided
    rows, so it is twice the number of images.
    """

    def __init__(
        self, schedule: Schedule, *, batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.schedule = schedule
        self.rows = torch.empty(2, batch, heads, schedule.peak_rows, head_dim, dtype=dtype, device=device)
        by_life = sorted(schedule.layers[0], key=lambda layer: -schedule.layer_tokens[layer])
        self._rank = {layer: rank for rank, layer in enumerate(by_life)}
        self._segment = 0
        self._start = 0

    @property
    def nbytes(self) -> int:
        """Bytes the cache holds, from its creation to its end."""
        return self.rows.nbytes

    def begin(self, scale: int) -> None:
        """Enter `scale` (from 0). Drops the layers that the schedule no longer reads and makes room for the others."""
        segments = self.schedule.segments
        self._start = self.schedule.ends[scale - 1] if scale else 0
        if scale not in segments[self._segment].scales:
            old, self._segment = segments[self._segment].tokens, self._segment + 1
            segment = segments[self._segment]
            for rank in reversed(range(len(segment.layers))):
                self._move(rank * old, rank * segment.tokens, old)

    def _move(self, source: int, target: int, length: int) -> None:
        """Copy rows upwards in pieces no longer than the distance, so that a piece never overlaps its target."""
        shift = target - source
        end = length if shift else 0
        while end > 0:
            begin = max(0, end - shift)
            self.rows[:, :, :, target + begin : target + end] = self.rows[:, :, :, source + begin : source + end]
            end = begin

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store this scale's keys and values, each (batch, heads, tokens, head_dim); return all there are so far."""
        base = self._rank[layer] * self.schedule.segments[self._segment].tokens
        end = self._start + keys.shape[2]
        self.rows[0, :, :, base + self._start : base + end] = keys
        self.rows[1, :, :, base + self._start : base + end] = values
        return self.rows[0, :, :, base : base + end], self.rows[1, :, :, base : base + end]
