"""Layers that only the bridge zone runs, kept in host memory and streamed to the device while it computes.

After the bridge a schedule such as d2 reads two layers; the other twenty-eight are needed a few times, for few tokens.
So the device holds the layers that run to the end, and two slots: while one layer computes in the one, the next is
copied into the other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from varcompress.models.linear import weight_state
from varcompress.models.transformer import VAR, Block, VARConfig, to_dtype
from varcompress.schedule import Schedule

SLOTS = 2
# Of pinned memory, at most. torch's allocator rounds every piece up to a power of two, so blocks share large ones.
PINNED_BYTES = 1 << 28
ALIGNMENT = 256  # bytes, of a weight within a piece


class StreamedBlocks:
    """The blocks of `var` as a call needs them, its own blocks being in host memory. Safe for threads and streams.

    Holds on the device the layers of the schedule's last scale, and SLOTS more where it has others. Weights may change
    between calls, once the images of the last one are there: until then a GPU may still be copying.

    The stream of the copies also links the calls: each begins when what was queued on it is done, and it waits for all
    work of each. The memory of the blocks is allocated on it, so that nobody gets it while a call still reads it.
    """

    def __init__(self, var: VAR) -> None:
        self._begin_empty(var.blocks, var.config, var.device, var.pos_start.dtype)

    def _begin_empty(self, host: nn.ModuleList, config: VARConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.host, self.config, self.device, self.dtype = host, config, device, dtype
        self._lock = threading.Lock()
        self._resident: dict[int, Block] = {}
        self._copied: dict[int, tuple] = {}  # the state of each resident layer's weights when they were copied
        self._slots: list[Block] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrived = [torch.cuda.Event() for _ in range(SLOTS)] if self._copies else []
        self._order: list[tuple[int, int]] = []
        self._run = self._fetched = 0

    def __getstate__(self) -> tuple:
        return self.host, self.config, self.device, self.dtype  # a copy of a model brings its own layers to the device

    def __setstate__(self, state: tuple) -> None:
        self._begin_empty(*state)

    @property
    def host_bytes(self) -> int:
        """Host memory that the blocks take: pinned pieces count whole, as torch's allocator rounds them."""
        storages = (parameter.untyped_storage() for parameter in self.host.parameters())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def prepare(self, schedule: Schedule) -> None:
        """Bring the layers that a call under `schedule` holds from beginning to end, and make room for the others."""
        with self._lock, self._linked():
            self._hold(schedule)

    @contextlib.contextmanager
    def running(self, schedule: Schedule) -> Iterator[StreamedBlocks]:
        """The blocks for one call under `schedule`, which has them to itself: other threads wait until it ends."""
        with self._lock, self._linked():
            _, streamed = self._hold(schedule)
            self._order = [(scale, i) for scale, layers in enumerate(schedule.layers) for i in layers if i in streamed]
            self._run = self._fetched = 0
            self._fetch()
            yield self

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

    @contextlib.contextmanager
    def _linked(self) -> Iterator[None]:
        """On the model's device, after all work and copies of earlier calls, and before those of later ones."""
        if self._copies is None:
            yield
            return
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._copies)
            try:
                yield
            finally:  # also for a call that fails half-way
                self._copies.wait_stream(current)

    def _hold(self, schedule: Schedule) -> tuple[frozenset[int], frozenset[int]]:
        """Have on the device what stays through a call, and slots for the rest; -> the layers of either kind."""
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
            self._copied.pop(layer, None)  # until all of it is there
            _copy(self.host[layer], self._resident[layer], adaln=True)
            self._copied[layer] = state
        return resident, streamed

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
        """A block on the device, its weights not yet there."""
        with torch.device("meta"):
            block = Block(self.config)
        to_dtype(block, self.dtype)
        with torch.cuda.stream(self._copies) if self._copies else contextlib.nullcontext():
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
        with torch.cuda.device(
            var.device
        ):  # else memory is taken on the current GPU too, which need not be the model's
            _pin(list(blocks.parameters()))


def _pin(parameters: list[nn.Parameter]) -> None:
    """Move parameters into pinned memory."""
    for size, placed in pieces([parameter.nbytes for parameter in parameters]):
        piece = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for index, offset in placed:
            value = parameters[index].data
            there = piece[offset : offset + value.nbytes].view(value.dtype).view(value.shape)
            parameters[index].data = there.copy_(value)


def pieces(sizes: Sequence[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """How to lay out weights of `sizes` bytes in pieces of powers of two: each piece's bytes, and (index, offset).

    The largest weights first, and small ones where these leave room, so that little is lost.
    """
    found = []
    left = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    while left:
        total, largest = (sum(_aligned(sizes[index]) for index in some) for some in (left, left[:1]))
        size = max(_power_of_two(largest), min(PINNED_BYTES, 1 << (total.bit_length() - 1)))
        placed, rest, used = [], [], 0
        for index in left:
            if used + sizes[index] <= size:
                placed.append((index, used))
                used += _aligned(sizes[index])
            else:
                rest.append(index)
        found.append((size, placed))
        left = rest
    return found


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _power_of_two(size: int) -> int:
    """The next power of two, as torch's allocator of pinned memory rounds."""
    return 1 << max(size - 1, 0).bit_length()


def _copy(source: Block, target: Block, *, adaln: bool) -> None:
    """Copy a block's weights, those of its AdaLN only if asked: they are read once a call, at the first scale."""
    for (name, value), there in zip(source.named_parameters(), target.parameters(), strict=True):
        if adaln or not name.startswith("ada_"):
            there.data.copy_(value.data, non_blocking=True)
