"""Memory of a call: what is held and what grows, against arithmetic, and a leak that must not pass."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.conftest import placed, random_model
from varcompress import hardware, memory
from varcompress.cost import cache_bytes, packed_bytes, peak_bytes, weight_bytes
from varcompress.errors import InputError
from varcompress.hardware import fitting_memory, free_bytes
from varcompress.memory import PeakMemory, fitting_batch, held_bytes
from varcompress.models import generation
from varcompress.models.offload import StreamedBlocks

CPU = torch.device("cpu")
CLOSE = 1 / 20  # of the activations; the weights are equal


def wide_model(**shape):
    """Of a width that packed copies have no need to round up."""
    return random_model(**{"depth": 6, "width": 64, "heads": 2, "patch_nums": (1, 2, 4, 6), "vocab": 64} | shape)


def peak_of(model, schedule, images) -> PeakMemory:
    schedule = model.schedule(schedule)
    with PeakMemory(model, schedule) as peak:
        model.generate([1] * images, schedule, runtime=model.runtime.eager())
    return peak


def assert_near_prediction(model, schedule, images):
    peak, schedule = peak_of(model, schedule, images), model.schedule(schedule)
    weights = weight_bytes(model, schedule, model.runtime)
    assert peak.held_bytes == weights
    growth, predicted = peak.bytes - weights, peak_bytes(model, schedule, images) - weights
    assert growth == pytest.approx(predicted, rel=CLOSE)
    assert growth > cache_bytes(model, schedule, images, model.runtime, guided=True)


# -- predicted and measured -----------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 2, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [{}, {"kernels": "torch"}, {"cache_dtype": "int8"}, {"cache_dtype": "float8"}])
def test_peak_is_near_its_prediction(images, dtype, way):
    model = placed(wide_model().cast(dtype), **way)
    for schedule in ("full", "d2@2"):
        assert_near_prediction(model, schedule, images)


@pytest.mark.parametrize("way", [{}, {"cache_dtype": "int8"}])
def test_peak_of_a_batch_in_parts_is_near_its_prediction(way, monkeypatch):
    model = placed(wide_model(depth=2), **way)
    together = peak_of(model, "full", 12).bytes
    for at_a_time in (200, 40):  # of 864 at the last scale
        monkeypatch.setitem(generation.TOKENS_AT_A_TIME, "cpu", at_a_time)
        assert_near_prediction(model, "full", 12)
        assert peak_of(model, "full", 12).bytes < together


def test_peak_of_many_layers_is_near_its_prediction():
    """What they compute once per call weighs as much as what runs, and is gone when the last tokens are drawn."""
    assert_near_prediction(wide_model(depth=24, patch_nums=(1, 2, 3, 4), vocab=256), "full", 16)


def test_peak_of_shared_adaln_is_near_its_prediction():
    assert_near_prediction(wide_model(shared_aln=True), "d2@2", 4)


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_the_decoders_where_that_is_larger(images, dtype):
    model = wide_model(depth=2, patch_nums=(1, 2, 8)).cast(dtype)
    assert_near_prediction(model, "full", images)
    cache = cache_bytes(model, model.schedule(), images, model.runtime, guided=True)
    assert peak_of(model, "full", images).bytes - held_bytes(model) > 2 * cache


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_peak_of_images_decoded_a_few_at_a_time(at_a_time, monkeypatch):
    model = wide_model(depth=2, patch_nums=(1, 2, 8))
    per_image = 32 * model.tokenizer.config.image_size**2
    monkeypatch.setattr("varcompress.models.tokenizer.CPU_MAP_ELEMENTS", at_a_time * per_image)
    assert_near_prediction(model, "full", 7)


def test_an_offloaded_model_holds_what_is_predicted_after_every_switch():
    model = placed(wide_model(depth=8), offload="bridge")
    for schedule in ("full", "d2@1", "d4@2", "d2@1", "full"):
        assert_near_prediction(model, schedule, 1)
    block = sum(p.nbytes for p in model.var.blocks[0].parameters())
    full, subnet = (held_bytes(ready(model, schedule)) for schedule in ("full", "d2@1"))
    assert full - subnet == (8 - 4) * block  # two layers stay, two pass through


def ready(model, schedule):
    model.prepare(model.schedule(schedule))
    return model


# -- a leak is seen -------------------------------------------------------------------------------


def test_streamed_layers_that_stay_are_seen(monkeypatch):
    """Measured is not predicted: blocks that a call hoards, or that the last schedule left, are in the peak."""
    model = placed(wide_model(depth=8), offload="bridge")
    block = sum(p.nbytes for p in model.var.blocks[0].parameters())
    honest = peak_of(model, "d2@1", 1)
    hoard, run = [], StreamedBlocks.__call__

    def hoarding(self, scale, layer):
        hoard.append(copy.deepcopy(run(self, scale, layer)))
        return hoard[-1]

    with monkeypatch.context() as patch:
        patch.setattr(StreamedBlocks, "__call__", hoarding)
        leaking = peak_of(model, "d2@1", 1)
    calls = 8 + 3 * 2  # all layers at scale 1, two later
    assert calls * block * 0.9 < leaking.bytes - honest.bytes
    assert held_bytes(model) == honest.held_bytes

    model._streamed._left = model._streamed._empty()
    assert held_bytes(model) - honest.held_bytes == block


def test_packed_copies_that_stay_are_seen():
    model = ready(wide_model(), "full")
    packed, before = packed_bytes(model, model.runtime), held_bytes(model)
    plain = replace(model.runtime, kernels="torch")
    assert before - weight_bytes(model, model.schedule(), plain) == packed > 0
    model.prepare(model.schedule(), plain)
    assert before - held_bytes(model) == packed


def test_peak_memory_counts_what_lives_at_once(tiny):
    with PeakMemory(tiny, tiny.schedule()) as peak:
        for _ in range(3):
            block = torch.zeros(1000, 256)  # 1,024,000 bytes, dropped before the next is made
            view = block[10:].t()
            del block, view
        first = torch.zeros(250)
        second = first + 1
    assert peak.bytes - peak.held_bytes == 1_024_000
    assert second.sum() == 250
    with PeakMemory(tiny, tiny.schedule()) as peak:
        kept = [torch.ones(250) for _ in range(3)]
        kept[0].add_(1)  # in place: nothing new
    assert peak.bytes - peak.held_bytes == 3 * 1000


def test_every_weight_counts_once_and_packed_ones_twice():
    model = ready(wide_model(), "full")
    parameters = sum(p.numel() for p in model.parameters())
    packed = packed_bytes(model, model.runtime)
    assert held_bytes(model) == weight_bytes(model, model.schedule(), model.runtime) == 4 * parameters + packed


# -- a batch that does not fit --------------------------------------------------------------------


def test_too_large_a_batch_is_named(tiny):
    message = r"a batch of 1 image does not fit.*: free some memory"
    with pytest.raises(InputError, match=message), fitting_batch(tiny, [tiny.schedule()], 1):
        raise MemoryError
    with pytest.raises(InputError, match="a batch of 64 images does not fit"), fitting_memory("cpu", 64):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(InputError, match="choose a smaller one"), fitting_memory("cpu", 64):
        torch.empty(2**60)  # the CPU's allocator refuses
    with pytest.raises(RuntimeError, match="another"), fitting_memory("cpu", 64):
        raise RuntimeError("another")


def test_a_batch_that_arithmetic_says_is_too_large_is_refused_before_it_begins(tiny, monkeypatch):
    schedules = [tiny.schedule("full")]
    message = r"10,000,000 images needs [\d,]+ MiB more than the model.* smaller one"
    with pytest.raises(InputError, match=message), fitting_batch(tiny, schedules, 10_000_000):
        pytest.fail("it began")
    needed = peak_bytes(tiny, schedules[0], 8) - held_bytes(tiny)
    for free, fits in ((needed, True), (needed - 1, False), (None, True)):
        monkeypatch.setattr(memory, "free_bytes", lambda free=free: free)
        if fits:
            with fitting_batch(tiny, schedules, 8):
                pass
        else:
            with pytest.raises(InputError, match="are free: "), fitting_batch(tiny, schedules, 8):
                pass


def test_a_batch_that_only_packed_weights_make_too_large_is_told_so(monkeypatch):
    model = wide_model()
    schedule = model.schedule("full")
    free = peak_bytes(model, schedule, 1, replace(model.runtime, kernels="torch")) - held_bytes(model)
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    message = r"1 image needs [\d,]+ MiB .* and [\d,]+ are free: use kernels torch, which packs no weights$"
    with pytest.raises(InputError, match=message), fitting_batch(model, [schedule], 1):
        pytest.fail("it began")
    monkeypatch.setattr(memory, "free_bytes", lambda: free - 1)
    with pytest.raises(InputError, match="free some memory"), fitting_batch(model, [schedule], 1):
        pytest.fail("it began")


def test_free_memory_is_the_systems_or_the_containers(tmp_path, monkeypatch):
    assert free_bytes() is None or 0 < free_bytes() < 2**50
    monkeypatch.setattr(hardware, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert free_bytes() is None
    for path, content in (
        ("proc/meminfo", "MemTotal: 24 kB\nMemAvailable:   20 kB\n"),
        ("sys/fs/cgroup/memory.max", "max\n"),
        ("sys/fs/cgroup/memory.current", "4096\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    assert free_bytes() == 20 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("6144\n")
    assert free_bytes() == 2048
    (tmp_path / "sys/fs/cgroup/memory.stat").write_text("anon 1000\ninactive_file 3000\n")
    assert free_bytes() == 2048 + 3000  # files that were read, and whose copies in memory can go
