"""Layers in host memory give what resident ones give, whatever threads, streams and schedules come between."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.conftest import in_threads, placed, random_model
from tests.emulated_cuda import Device
from tests.test_models import random_tokens, schedules
from varcompress.errors import InputError
from varcompress.models import offload
from varcompress.models.offload import ALIGNMENT, PINNED_BYTES, pieces
from varcompress.sampling import Sampling

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def offloaded(model, device=None, **how):
    """The one place that says how this file's models are offloaded."""
    return placed(model, device, **{"kernels": "torch", "offload": "bridge"} | how)


@settings(max_examples=30)
@given(data=st.data())
def test_offloading_changes_nothing(data):
    model = random_model(depth=6)
    chosen = [data.draw(schedules(model)) for _ in range(2)]  # the layers that stay change from call to call
    expected = [model.generate_tokens([1, 2], schedule, sampling=Sampling(seed=4)) for schedule in chosen]
    offloaded(model)
    for schedule, (tokens, f_hat) in zip(chosen, expected, strict=True):
        now_tokens, now = model.generate_tokens([1, 2], schedule, sampling=Sampling(seed=4))
        assert torch.equal(now_tokens, tokens)
        torch.testing.assert_close(now, f_hat, atol=1e-4, rtol=1e-4)


def by_loading(model, other):
    model.load_state_dict(other.state_dict())


def by_copying_through_data(model, other):
    for weight, value in zip(model.parameters(), other.parameters(), strict=True):
        weight.data.copy_(value.data)


@pytest.mark.parametrize("change", [by_loading, by_copying_through_data])
def test_an_offloaded_model_generates_from_weights_that_have_changed(change):
    """A layer that stayed on the device from the call before is not older than the one in host memory."""
    model, other = random_model(), random_model(seed=1)
    offloaded(model).generate([1, 2], "d2@1")
    change(model, other)
    placed(other, kernels="torch")
    assert torch.equal(model.generate_tokens([1, 2], "d2@1")[0], other.generate_tokens([1, 2], "d2@1")[0])


def test_an_offloaded_model_only_generates():
    model = offloaded(random_model())
    with pytest.raises(InputError, match="load it again without offload"):
        model([1], random_tokens(model, 1))
    with pytest.raises(InputError, match="only generates, as it is"):
        model.cast(torch.bfloat16)
    with pytest.raises(InputError, match="only generates, as it is"):
        model.to(torch.bfloat16)
    assert not placed(model).offloaded
    assert model([1], random_tokens(model, 1)).shape == (1, 30, 40)


# -- threads and streams, emulated ----------------------------------------------------------------


SCHEDULES = ["d2@1", "full", "d3@1", "4x1,1+2x1"]


def small_model():
    return random_model(depth=4, patch_nums=(1, 2))


@pytest.fixture
def model():
    """Made before there is a device, which would draw its weights again."""
    return offloaded(small_model())


@pytest.fixture
def device(model, monkeypatch):
    device = Device().install(monkeypatch)
    with device.queueing():
        yield device


@pytest.fixture
def streaming(model, device):
    """An offloaded model that copies on a stream of its own."""
    model._streamed._copies = torch.cuda.Stream()
    model._streamed._arrived = [torch.cuda.Event() for _ in range(offload.SLOTS)]
    return model


@pytest.fixture(scope="module")
def resident():
    """Tokens by label and schedule, of a model whose layers are all there."""
    model = placed(small_model(), kernels="torch")
    return {(label, s): model.generate_tokens([label], s)[0] for label in range(4) for s in SCHEDULES}


def test_calls_on_several_streams_wait_for_each_other(device, streaming, resident):
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    for i, call in enumerate(resident):
        with device.stream(streams[i % 2]):
            found.append((call, streaming.generate_tokens([call[0]], call[1])[0]))
    device.run()
    assert [call for call, tokens in found if not torch.equal(tokens, resident[call])] == []


def test_threads_do_not_share_slots(device, streaming, resident):
    found = []

    def work(calls):
        with device.queueing(), device.stream(torch.cuda.Stream()):
            for call in calls:
                found.append((call, streaming.generate_tokens([call[0]], call[1])[0]))

    in_threads(work, [(list(resident)[first::2],) for first in range(2)])
    device.run()
    assert [call for call, tokens in found if not torch.equal(tokens, resident[call])] == []


def test_a_call_after_one_that_failed_half_way(device, streaming, resident):
    """It finds no lock held, and nothing counted or copied for the other."""
    for call in list(resident)[:8]:
        with device.stream(torch.cuda.Stream()), pytest.raises(ZeroDivisionError):
            fail_half_way(streaming)
        with device.stream(torch.cuda.Stream()):
            tokens = streaming.generate_tokens([call[0]], call[1])[0]
        device.run()
        assert torch.equal(tokens, resident[call])


def fail_half_way(model):
    with model._streamed.running(model.schedule("d2@1")) as blocks:
        torch.ones(8, 32) @ blocks(0, 0).attn.proj.weight.T
        1 / 0  # noqa: B018


def test_a_copy_of_an_offloaded_model_is_one():
    model = offloaded(small_model())
    expected = model.generate_tokens([1], "d2@1")[0]
    twin = copy.deepcopy(model)
    assert twin._streamed.host is twin.var.blocks
    assert not twin._streamed._resident
    with torch.no_grad():
        model.var.blocks[0].ffn.fc1.weight.zero_()
    assert torch.equal(twin.generate_tokens([1], "d2@1")[0], expected)


# -- pinned memory --------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 1 << 29) | st.integers(1, 5000), max_size=60))
def test_pieces_hold_every_weight_once(sizes):
    found = pieces(sizes)
    assert sorted(index for _, within in found for index, _ in within) == list(range(len(sizes)))
    for size, within in found:
        assert size & (size - 1) == 0
        assert size <= PINNED_BYTES or max(sizes[index] for index, _ in within) > PINNED_BYTES
        ends = [0]
        for index, offset in sorted(within, key=lambda pair: pair[1]):
            assert offset % ALIGNMENT == 0
            assert ends[-1] <= offset
            ends.append(offset + sizes[index])
        assert ends[-1] <= size


@pytest.mark.parametrize("width", [1024, 1280, 1536, 1920])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_little_pinned_memory_is_lost(width, element_bytes):
    """Of VAR-d16 to d30, where rounding each weight up to a power of two would take up to a half more."""
    block = [n * width * element_bytes for n in (*(6 * width, 3 * width, 4 * width, 4 * width, width), 6, 4, *[1] * 4)]
    sizes = [*block, 4 * width // 64] * (width // 64)
    pinned = sum(size for size, _ in pieces(sizes))
    assert sum(sizes) <= pinned < 1.03 * sum(sizes)


@pytest.fixture
def pinned(monkeypatch):
    """Memory that says it is pinned where there is no GPU: -> the pieces taken."""
    taken, empty = [], torch.empty

    def empty_pinned(*args, pin_memory=False, **kwargs):
        result = empty(*args, **kwargs)
        if pin_memory:
            taken.append(result.nbytes)
        return result

    monkeypatch.setattr(torch, "empty", empty_pinned)
    monkeypatch.setattr(offload, "PINNED_BYTES", 1 << 16)
    return taken


def test_pinned_weights_are_the_weights(pinned, tmp_path):
    model = offloaded(small_model().cast(torch.bfloat16))
    expected = model.generate_tokens([1, 2], "d2@1")[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = model._streamed.host_bytes
    assert held == sum(value.nbytes for value in model.var.blocks.parameters())
    offload._pin(list(model.var.blocks.parameters()))
    assert held <= model._streamed.host_bytes == sum(pinned) < 1.2 * held
    assert torch.equal(model.generate_tokens([1, 2], "d2@1")[0], expected)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


# -- on a GPU -------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloading_changes_nothing_on_a_gpu(dtype):
    model, way = random_model(depth=12).cast(dtype), {"device": torch.device("cuda"), "kernels": "auto"}
    chosen = ["d2@2", "full", "d4@1", "d2@2", "12x1,6x1,3x2", "full", "d3@1"]
    model = placed(model, **way)
    expected = [model.generate(range(5), schedule, runtime=model.runtime.eager()) for schedule in chosen]
    offloaded(model, **way)
    assert model._streamed.device.index is not None
    assert all(parameter.is_pinned() for parameter in model.var.blocks.parameters())
    found = [model.generate(range(5), schedule) for schedule in chosen]
    for images, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(images, wanted, rtol=0, atol=0)


@needs_cuda
def test_threads_and_streams_of_an_offloaded_model_on_a_gpu():
    model, way = random_model(depth=12), {"device": torch.device("cuda"), "kernels": "auto"}
    calls = [([label, label + 1], schedule) for label in range(8) for schedule in ("full", "d2@2")]
    placed(model, **way)
    expected = [model.generate(*call, runtime=model.runtime.eager()) for call in calls]
    offloaded(model, **way)
    torch.cuda.synchronize()

    def work(first):
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(first, len(calls), 2):
                assert torch.equal(model.generate(*calls[i]), expected[i]), calls[i]

    in_threads(work, [(0,), (1,)])
