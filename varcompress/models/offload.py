"""Layers that only the bridge zone runs, kept in host memory and streamed to the device while it computes.

After the bridge a schedule such as d2 reads two layers; the other twenty-eight are needed a few times, for few tokens.
So the device holds the layers that run to the end, and two slots: while one layer computes in the one, the next is
copied into the other.
"""

from __future__ import annotations

import torch
from torch import nn

from varcompress.models.linear import weight_state
from varcompress.models.transformer import VAR, Block, cast
from varcompress.schedule import Schedule

SLOTS = 2


class StreamedBlocks:
    """The blocks of `var` as a call needs them, its own blocks being in host memory.

    Holds on the device the layers of the schedule's last scale, and SLOTS more where it has others. Weights may change
    between calls, once the images of the last one are there: until then a GPU may still be copying.
    """

    def __init__(self, var: VAR, device: torch.device) -> None:
        self.device, self.config, self.host = device, var.config, var.blocks
        self.dtype = var.pos_start.dtype
        self._resident: dict[int, Block] = {}
        self._copied: dict[int, tuple] = {}  # the state of each resident layer's weights when they were copied
        self._slots: list[Block] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrived = [torch.cuda.Event() for _ in range(SLOTS)] if self._copies else []
        self._order: list[tuple[int, int]] = []
        self._run = self._fetched = 0

    def begin(self, schedule: Schedule) -> StreamedBlocks:
        """Get ready for a call under `schedule`: bring the layers that stay, and the first that does not."""
        resident, streamed = split(schedule)
        self._resident = {layer: block for layer, block in self._resident.items() if layer in resident}
        self._copied = {layer: state for layer, state in self._copied.items() if layer in self._resident}
        self._slots = (self._slots or [self._empty() for _ in range(SLOTS)]) if streamed else []
        for layer in resident:
            state = tuple(map(weight_state, self.host[layer].parameters()))
            if layer not in self._resident:
                self._resident[layer] = self._empty()
            elif self._copied.get(layer) == state:
                continue
            _copy(self.host[layer], self._resident[layer], adaln=True)
            self._copied[layer] = state
        self._order = [(scale, i) for scale, layers in enumerate(schedule.layers) for i in layers if i in streamed]
        self._run = self._fetched = 0
        self._fetch()
        return self

    def __call__(self, scale: int, layer: int) -> Block:
        """The block of a layer, on the device. Must be asked for in the order in which the schedule runs them."""
        if layer in self._resident:
            return self._resident[layer]
        slot = self._run % SLOTS
        if self._copies:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[slot])
        self._run += 1
        self._fetch()
        return self._slots[slot]

    def _fetch(self) -> None:
        """Start to copy the layer after the one that runs next into the slot whose layer has had its last work given.

        Only that work is waited for: what the caller queues from now on computes beside the copy.
        """
        if self._fetched >= len(self._order):
            return
        (scale, layer), slot = self._order[self._fetched], self._fetched % SLOTS
        self._fetched += 1
        if self._copies is None:
            _copy(self.host[layer], self._slots[slot], adaln=scale == 0)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            _copy(self.host[layer], self._slots[slot], adaln=scale == 0)
            self._arrived[slot].record(self._copies)

    def _empty(self) -> Block:
        with torch.device("meta"):
            block = Block(self.config)
        cast(block, self.dtype)
        return block.to_empty(device=self.device)


def split(schedule: Schedule) -> tuple[frozenset[int], frozenset[int]]:
    """The layers that stay on the device, and those that are streamed."""
    resident = frozenset(schedule.layers[-1])
    return resident, frozenset(schedule.layers[0]) - resident


def device_blocks(schedule: Schedule) -> int:
    """Blocks of which the device holds the weights, slots included."""
    resident, streamed = split(schedule)
    return len(resident) + (SLOTS if streamed else 0)


def move_all_but_blocks(var: VAR, device: torch.device) -> None:
    """The transformer to `device`, its blocks to host memory from which a GPU can copy on its own."""
    blocks, var.blocks = var.blocks, nn.ModuleList()
    var.to(device)
    var.blocks = blocks.to("cpu")
    if device.type == "cuda":
        for parameter in blocks.parameters():
            parameter.data = parameter.data.pin_memory()


def _copy(source: Block, target: Block, *, adaln: bool) -> None:
    """Copy a block's weights, those of its AdaLN only if asked: they are read once a call, at the first scale."""
    for (name, value), there in zip(source.named_parameters(), target.parameters(), strict=True):
        if adaln or not name.startswith("ada_"):
            there.data.copy_(value.data, non_blocking=True)
