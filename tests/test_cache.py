"""The cache holds exactly the schedule's rows, and a layer that survives reads exactly what it wrote."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varcompress.models.cache import KVCache, token_bytes
from varcompress.schedule import Schedule

BATCH, HEADS, HEAD_DIM = 4, 2, 3


@st.composite
def schedules(draw):
    """Any schedule that narrows, subsets of layers of every kind, not only the equidistant ones."""
    depth = draw(st.integers(1, 8))
    in_use, layers = list(range(depth)), []
    patch_nums = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=6)))
    for _ in patch_nums:
        in_use = sorted(draw(st.lists(st.sampled_from(in_use), min_size=1, max_size=len(in_use), unique=True)))
        layers.append(tuple(in_use))
        in_use = draw(st.sampled_from([in_use, in_use, list(layers[-1])]))
    return Schedule(depth, patch_nums, tuple(layers))


def new_cache(schedule: Schedule, dtype=torch.float32, batch=BATCH) -> KVCache:
    return KVCache(schedule, batch=batch, heads=HEADS, head_dim=HEAD_DIM, dtype=dtype, device=torch.device("cpu"))


def decode(schedule: Schedule, cache: KVCache):
    """Write random keys and values as generation does; yields (read, written so far), each a pair, for every write."""
    batch = cache.rows.shape[1]
    written = {layer: torch.empty(2, batch, HEADS, 0, HEAD_DIM) for layer in range(schedule.depth)}
    for scale, layers in enumerate(schedule.layers):
        cache.begin(scale)
        for layer in layers:
            new = torch.randn(2, batch, HEADS, schedule.patch_nums[scale] ** 2, HEAD_DIM)
            written[layer] = torch.cat((written[layer], new), dim=3)
            room = cache.new(layer, new.shape[3])
            room.copy_(new)
            yield cache.read(layer, room), written[layer]


def equal(read, written) -> bool:
    return all(map(torch.equal, read, written))


@given(schedules())
@settings(deadline=None)
def test_reads_what_was_written(schedule):
    cache = new_cache(schedule)
    cache.rows.fill_(torch.nan)  # a row that was never written must never be read
    for read, written in decode(schedule, cache):
        assert equal(read, written)


@given(schedules())
@settings(deadline=None)
def test_layers_do_not_overwrite_each_other(schedule):
    """At the end of each scale, all its layers still hold their own, not only the one just written."""
    cache = new_cache(schedule)
    views, held = {}, {}
    steps = decode(schedule, cache)
    for layers in schedule.layers:
        for layer in layers:
            views[layer], held[layer] = next(steps)
        for layer in layers:
            assert equal(views[layer], held[layer])


@given(schedules(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(1, 5))
@settings(deadline=None)
def test_bytes_are_the_schedules(schedule, dtype, images):
    cache = new_cache(schedule, dtype, 2 * images)
    assert cache.rows.shape == (2, 2 * images, HEADS, schedule.peak_rows, HEAD_DIM)
    expected = schedule.cache_bytes(batch=images, token_bytes=HEADS * HEAD_DIM * dtype.itemsize, guided=True)
    assert cache.nbytes == cache.rows.untyped_storage().nbytes() == expected
    storage = cache.rows.data_ptr()
    for _ in decode(schedule, cache):
        pass
    assert cache.rows.data_ptr() == storage  # allocated once


@given(schedules(), st.sampled_from([torch.int8, torch.float8_e4m3fn]), st.integers(1, 5))
def test_bytes_of_an_eight_bit_cache_are_the_schedules(schedule, stored, images):
    where = {"dtype": torch.float32, "device": torch.device("cpu"), "stored": stored}
    cache = KVCache(schedule, batch=2 * images, heads=HEADS, head_dim=HEAD_DIM, **where)
    size = token_bytes(width=HEADS * HEAD_DIM, heads=HEADS, dtype=stored)
    assert size == HEADS * (HEAD_DIM + 2)  # a byte each, and a scale of two per head
    assert cache.nbytes == schedule.cache_bytes(batch=images, token_bytes=size, guided=True)


def test_the_peak_is_the_larger_of_bridge_and_flexible_zone():
    flexible = Schedule.parse("d2@2", depth=4, patch_nums=(1, 1, 3), bridge=1)
    assert (flexible.scale_rows, flexible.peak_rows) == ((8, 8, 22), 22)
    bridge = Schedule.parse("d2@2", depth=8, patch_nums=(1, 3, 1), bridge=1)
    assert (bridge.scale_rows, bridge.peak_rows) == ((80, 80, 22), 80)
    assert new_cache(bridge).rows.shape[3] == 80
