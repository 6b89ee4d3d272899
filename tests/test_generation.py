"""Every way in which generation may run gives what plain torch on one device gives."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.conftest import placed, random_model
from tests.kernels import DEVICE, needs_triton
from tests.test_models import random_tokens, schedules
from varcompress.errors import InputError
from varcompress.hardware import exact_float32
from varcompress.kernels.backend import TORCH, TRITON, choose
from varcompress.models import generation
from varcompress.models.autoencoder import TokenizerConfig
from varcompress.models.linear import ConditionLinear, Linear, PackedLinear, pack
from varcompress.models.runtime import GRAPHED_ELEMENTS, Runtime
from varcompress.models.strips import STRIP_ELEMENTS, largest_map
from varcompress.models.tokenizer import VQVAE
from varcompress.sampling import PUBLISHED, Sampling
from varcompress.schedule import Schedule

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCHEDULES = ["full", "d2@2", "d3@1", "6x1,4x1,2x2"]


def logits_of(model, tokens, labels, schedule):
    collected = []
    model.generate_tokens(labels, schedule, forced=tokens, logits_out=collected)
    return torch.cat(collected, dim=1)


# -- kernels --------------------------------------------------------------------------------------


def test_auto_is_plain_torch_on_a_cpu():
    assert choose("auto", CPU) is TORCH


@needs_triton
@pytest.mark.parametrize("shared_aln", [False, True])
def test_fused_kernels_give_the_same_images(shared_aln):
    model = random_model(depth=3, patch_nums=(1, 2), shared_aln=shared_aln)
    plain_tokens, plain = model.generate_tokens([1, 2], "d2@1", sampling=Sampling(seed=1))
    placed(model, device=torch.device(DEVICE), kernels="triton")  # in the interpreter where there is no GPU
    tokens, f_hat = model.generate_tokens([1, 2], "d2@1", sampling=Sampling(seed=1))
    assert torch.equal(tokens.cpu(), plain_tokens)
    torch.testing.assert_close(f_hat.cpu(), plain, atol=1e-5, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize("cache_dtype", ["int8", "float8"])
def test_fused_kernels_write_into_an_eight_bit_cache(cache_dtype):
    logits = []
    for kernels in ("torch", "triton"):
        model = random_model(depth=3, patch_nums=(1, 2))
        placed(model, device=torch.device(DEVICE), kernels=kernels, cache_dtype=cache_dtype)
        logits.append(logits_of(model, random_tokens(model, 2).to(DEVICE), [1, 2], "d2@1"))
    # a rounding of a key may tip the rounding to eight bits of one of its numbers
    assert (logits[1] - logits[0]).norm() / logits[0].norm() < 1e-3


@needs_triton
def test_the_decoder_with_fused_kernels_is_the_decoder():
    torch.manual_seed(0)
    vae = VQVAE(TokenizerConfig(32, (1, 1, 2), 1, 8, 40, 4, 3, (1, 2, 4))).to(DEVICE)
    for parameter in vae.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    z = torch.randn(2, 8, 4, 4, device=DEVICE)
    with torch.no_grad(), exact_float32(torch.device(DEVICE)):
        plain = vae.decoder(z)
        vae.decoder.to(memory_format=torch.channels_last)
        torch.testing.assert_close(vae.decoder(z, TRITON), plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernels": "cuda"}, "kernels 'cuda' are unknown: use auto, torch, triton"),
        ({"cache_dtype": "int4"}, "cache dtype 'int4' is unknown: use int8 or float8"),
        ({"offload": "all"}, "offload 'all' is unknown: use bridge"),
    ],
)
def test_unknown_ways_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        placed(random_model(), **arguments)


# -- nothing is computed twice --------------------------------------------------------------------


@pytest.mark.parametrize("shared_aln", [False, True])
def test_what_no_scale_changes_is_computed_once_per_call(shared_aln):
    model = random_model(shared_aln=shared_aln)
    once = [part for name, part in model.var.named_modules() if name.endswith("ada_lin")]
    assert len(once) == (2 if shared_aln else model.var.config.depth + 1)
    once.append(model.var.class_emb)
    calls = dict.fromkeys(once, 0)

    def count(part, *_):
        calls[part] += 1

    for part in once:
        part.register_forward_hook(count)
    model.generate([1, 2], "d2@2")
    assert set(calls.values()) == {1}


# -- nothing waits for the device -----------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("cache_dtype", "guided"), [(None, True), (None, False), ("int8", True), ("float8", True)])
def test_generation_reads_nothing_back(schedule, cache_dtype, guided):
    """On a GPU's tensors that have shapes and no values, whatever depends on a value raises: a graph can hold it all.

    Plain torch only: Triton's launchers want real ones.
    """
    with FakeTensorMode(allow_non_fake_inputs=False) as fake, torch.device("cuda"), torch.inference_mode():
        model = random_model()
        runtime = Runtime(torch.device("cuda"), kernels="torch", cache_dtype=cache_dtype)
        call = generation.Call(model.schedule(schedule), 3, PUBLISHED, runtime, guided)
        inputs = (torch.zeros(3, dtype=torch.int64), torch.zeros((), dtype=torch.int64), torch.arange(3))
        tokens, f_hat = generation.generate_tokens(
            call, model.var, model.tokenizer.quantize, lambda scale, layer: model.var.blocks[layer], *inputs
        )
        images = model.tokenizer.decode_features(f_hat)
        assert images.fake_mode is fake
        assert (images.device.type, tokens.shape, images.shape) == ("cuda", (3, 30), (3, 3, 8, 8))


@needs_packing
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_autocast_around_a_call_changes_nothing(kernels):
    model = placed(random_model(), kernels=kernels)
    tokens, f_hat = model.generate_tokens([1, 2], "d2@2")
    images = model.decode(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        now_tokens, now = model.generate_tokens([1, 2], "d2@2")
        assert torch.equal(model.decode(tokens), images)
        with torch.no_grad():  # packed copies of float32 weights take no bfloat16
            rounded = model([1, 2], tokens, "d2@2")
    with torch.no_grad():
        exact = model([1, 2], tokens, "d2@2")
    assert (rounded - exact).norm() / exact.norm() < 0.05
    assert torch.equal(now_tokens, tokens)
    assert torch.equal(now, f_hat)


@given(
    num_images=st.integers(1, 64),
    depth=st.sampled_from([2, 30]),
    offload=st.sampled_from([None, "bridge"]),
    on=st.booleans(),
    guided=st.booleans(),
)
def test_large_calls_and_streamed_ones_run_without_a_graph(num_images, depth, offload, on, guided):
    schedule = Schedule.parse("full", depth=depth, patch_nums=(1, 4, 16), bridge=1)
    runtime = Runtime(torch.device("cuda"), torch.bfloat16, kernels="torch", offload=offload, graphs=on)
    call = generation.Call(schedule, num_images, PUBLISHED, runtime, guided)
    small = (1 + guided) * num_images * 256 * 1920 <= GRAPHED_ELEMENTS
    assert runtime.graphed(call.largest_elements(1920)) == (small and on and offload is None)
    assert not Runtime(CPU).graphed(1)


def test_a_call_changes_only_what_needs_no_other_weights(tiny):
    assert tiny.generate([1], runtime=replace(tiny.runtime, cache_dtype="int8")).shape == (1, 3, 8, 8)
    for change in (
        {"dtype": torch.bfloat16},
        {"offload": "bridge"},
        {"device": torch.device("cuda"), "kernels": "torch"},
    ):
        with pytest.raises(InputError, match="for another device or dtype use place"):
            tiny.generate([1], runtime=replace(tiny.runtime, **change))


# -- the cache in eight bits ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache_dtype", ["int8", "float8"])
def test_a_head_of_zeros_stays_zero_in_eight_bits(dtype, cache_dtype):
    model = random_model(depth=2, patch_nums=(1, 2)).cast(dtype)
    attention, width = model.var.blocks[1].attn, model.var.config.width
    with torch.no_grad():
        attention.mat_qkv.weight[2 * width : 2 * width + attention.head_dim] = 0
        attention.v_bias[: attention.head_dim] = 0
    tokens = random_tokens(model, 2)
    exact = logits_of(model, tokens, [1, 2], "full")
    placed(model, cache_dtype=cache_dtype)
    assert (logits_of(model, tokens, [1, 2], "full") - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize("cache_dtype", ["int8", "float8"])
@given(data=st.data())
def test_an_eight_bit_cache_changes_logits_little(cache_dtype, data):
    model = random_model(depth=6)
    schedule, tokens = data.draw(schedules(model)), random_tokens(model, 2)
    exact = logits_of(model, tokens, [1, 2], schedule)
    placed(model, cache_dtype=cache_dtype)
    error = (logits_of(model, tokens, [1, 2], schedule) - exact).norm() / exact.norm()
    assert 0 < error < (0.02 if cache_dtype == "int8" else 0.06)


# -- a large batch in parts -----------------------------------------------------------------------


@given(batch=st.integers(1, 600), scale=st.integers(0, 2), streamed=st.booleans())
def test_parts_are_the_batch_and_small(batch, scale, streamed):
    schedule = Schedule.parse("d2@1", depth=4, patch_nums=(70, 2, 30), bridge=1)
    call = generation.Call(schedule, batch, PUBLISHED, Runtime(CPU, offload="bridge" if streamed else None), False)
    found = generation.parts(call, scale)
    assert [row for part in found for row in range(part.start, part.stop)] == list(range(batch))
    if streamed and scale == 0:  # the only one that runs layers which the last does not
        assert len(found) == 1
    else:
        most = max(1, generation.TOKENS_AT_A_TIME["cpu"] // schedule.patch_nums[scale] ** 2)
        assert all(part.stop - part.start <= most for part in found)


@pytest.mark.parametrize("at_a_time", [1, 12, 40])
@pytest.mark.parametrize("way", [{}, {"cache_dtype": "int8"}, {"offload": "bridge"}])
@pytest.mark.parametrize("shared_aln", [False, True])
def test_parts_of_a_batch_are_the_batch(at_a_time, way, shared_aln, monkeypatch):
    model, labels = random_model(shared_aln=shared_aln), [1, 2, 3]
    placed(model, kernels="torch", **way)
    together = [model.generate_tokens(labels, schedule, sampling=Sampling(seed=3)) for schedule in SCHEDULES]
    monkeypatch.setitem(generation.TOKENS_AT_A_TIME, "cpu", at_a_time)
    for schedule, (tokens, f_hat) in zip(SCHEDULES, together, strict=True):
        now_tokens, now = model.generate_tokens(labels, schedule, sampling=Sampling(seed=3))
        assert torch.equal(now_tokens, tokens)
        torch.testing.assert_close(now, f_hat, atol=1e-4, rtol=1e-4)


@needs_triton
def test_fused_kernels_take_parts_of_a_batch(monkeypatch):
    model = placed(random_model(depth=3, patch_nums=(1, 2)), device=torch.device(DEVICE), kernels="triton")
    together = model.generate_tokens([1, 2, 3], "d2@1", sampling=Sampling(seed=1))
    monkeypatch.setitem(generation.TOKENS_AT_A_TIME, "cpu", 8)
    tokens, f_hat = model.generate_tokens([1, 2, 3], "d2@1", sampling=Sampling(seed=1))
    assert torch.equal(tokens, together[0])
    torch.testing.assert_close(f_hat, together[1], atol=1e-5, rtol=1e-5)


# -- packed weights -------------------------------------------------------------------------------


@needs_packing
@given(rows=st.integers(1, 40), inside=st.integers(1, 70), outside=st.integers(1, 70), gelu=st.booleans())
def test_a_packed_product_is_the_product(rows, inside, outside, gelu):
    layers, x = torch.nn.Sequential(Linear(inside, outside)), torch.randn(2, rows, inside)
    with torch.inference_mode():
        plain = layers[0](x, gelu=gelu)
        pack(layers)
        assert type(layers[0]) is PackedLinear
        torch.testing.assert_close(layers[0](x, gelu=gelu), plain, atol=1e-5, rtol=1e-5)


def by_fused_optimiser(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()  # leaves the version counter as it was


def in_place(weight):
    with torch.no_grad():
        weight.mul_(1.5)


def in_all_columns_but_one(weight):
    with torch.no_grad():
        weight[:, 1:] *= -3


def in_all_columns_but_one_through_data(weight):
    weight.data[:, 1:] *= -3


def through_data(weight):
    weight.data.mul_(1.5)


@needs_packing
@pytest.mark.parametrize(
    "change", [in_all_columns_but_one, in_all_columns_but_one_through_data, by_fused_optimiser, in_place, through_data]
)
def test_a_packed_copy_is_never_older_than_its_weight(change):
    model, labels = random_model(), [1, 2]
    before = model.generate_tokens(labels)[1]
    twin = copy.deepcopy(model)
    change(model.var.blocks[0].ffn.fc1.weight)
    after = model.generate_tokens(labels)[1]
    assert not torch.equal(before, after)
    placed(model, kernels="torch")
    torch.testing.assert_close(model.generate_tokens(labels)[1], after, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())  # freed
    assert torch.equal(twin.generate_tokens(labels)[1], before)


@needs_packing
def test_training_drops_packed_copies():
    """The teacher-forced pass after a step reads the new weights, whatever was packed before."""
    model, tokens = random_model(), random_tokens(random_model(), 2)
    model.generate_tokens([1, 2])
    optimiser = torch.optim.AdamW(model.var.parameters(), lr=0.1, fused=True)
    model([1, 2], tokens).sum().backward()
    optimiser.step()
    with torch.no_grad():
        logits = model([1, 2], tokens)
    torch.testing.assert_close(logits, model([1, 2], tokens).detach(), atol=1e-4, rtol=1e-4)


@needs_packing
@pytest.mark.parametrize(
    "change", [lambda model: model.cast(torch.bfloat16), lambda model: through_data(model.var.blocks[0].ffn.fc1.weight)]
)
def test_the_teacher_forced_pass_reads_no_old_copy(change):
    model, tokens = random_model(), random_tokens(random_model(), 2)
    model.generate_tokens([1, 2])
    change(model)
    with torch.no_grad():
        logits = model([1, 2], tokens)
    torch.testing.assert_close(logits, model([1, 2], tokens).detach(), atol=0.1, rtol=0.1)


@given(rows=st.integers(1, 9))
def test_a_condition_layer_is_a_linear_layer(rows):
    layer, x = ConditionLinear(12, 30), torch.randn(rows, 12)
    with torch.inference_mode():
        fast = layer(x)
    torch.testing.assert_close(fast, layer(x), atol=1e-5, rtol=1e-5)


# -- the decoder in strips ------------------------------------------------------------------------


@pytest.mark.parametrize("strip", [1, 5000, STRIP_ELEMENTS])
@pytest.mark.parametrize("multipliers", [(1,), (1, 1), (1, 1, 2), (2, 1, 1, 4)])
@pytest.mark.parametrize("images", [1, 3])
def test_strips_compute_the_decoder(strip, multipliers, images, monkeypatch):
    torch.manual_seed(0)
    vae = VQVAE(TokenizerConfig(32, multipliers, 1, 8, 40, 4, 3, (1, 2, 5)))
    for parameter in vae.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr("varcompress.models.strips.STRIP_ELEMENTS", strip)
    f_hat = torch.randn(images, 8, 5, 5)
    plain = vae.decode_features(f_hat).detach()  # with gradients: the modules themselves
    with torch.inference_mode():
        torch.testing.assert_close(vae.decode_features(f_hat), plain, atol=2e-5, rtol=1e-4)
    assert largest_map(vae.decoder, 5) >= 32 * vae.config.image_size**2


def test_strips_keep_a_mean_that_is_large_beside_its_spread():
    vae = VQVAE(TokenizerConfig(32, (1, 1), 1, 8, 40, 4, 3, (1, 2, 4)))
    with torch.no_grad():
        vae.decoder.conv_in.bias += 100
    f_hat = torch.randn(2, 8, 4, 4)
    plain = vae.decode_features(f_hat).detach()
    with torch.inference_mode():
        torch.testing.assert_close(vae.decode_features(f_hat), plain, atol=2e-3, rtol=0)


def test_images_are_decoded_a_few_at_a_time(tiny, monkeypatch):
    tokens = random_tokens(tiny, 5)
    together = tiny.decode(tokens)
    monkeypatch.setattr("varcompress.models.tokenizer.CPU_MAP_ELEMENTS", 1)
    assert tiny.tokenizer.images_at_a_time == 1
    torch.testing.assert_close(tiny.decode(tokens), together, atol=1e-5, rtol=0)


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_stays_near_float32_where_the_result_needs_it(dtype, limit):
    """Logits under every kind of schedule, and f_hat and the guided draw in float32 whatever the model's dtype."""
    exact, rounded = random_model(depth=6), random_model(depth=6).cast(dtype)
    tokens = random_tokens(exact, 2)
    for schedule in SCHEDULES:
        wanted = logits_of(exact, tokens, [1, 2], schedule)
        assert (logits_of(rounded, tokens, [1, 2], schedule) - wanted).norm() / wanted.norm() < limit
    f_hat = rounded.generate_tokens([1, 2], forced=tokens)[1]
    assert f_hat.dtype == torch.float32
    torch.testing.assert_close(f_hat, exact.generate_tokens([1, 2], forced=tokens)[1])


def test_temperatures_stay_float32():
    """Their exponential multiplies every logit of a head: in bfloat16 it would be 1 % off."""
    model = random_model(depth=2)
    for block in model.var.blocks:
        torch.nn.init.normal_(block.attn.scale_mul_1H11, mean=2.0)
    before = [block.attn.temperature() for block in model.var.blocks]
    model.cast(torch.bfloat16)
    assert all(torch.equal(block.attn.temperature(), t) for block, t in zip(model.var.blocks, before, strict=True))
    placed(model, kernels="torch", offload="bridge")
    model.generate([1, 2], "d2@1")
    assert {block.attn.scale_mul_1H11.dtype for block in model._streamed._resident.values()} == {torch.float32}


def test_settings_of_other_whole_types_are_taken():
    model = random_model(depth=2, patch_nums=(1, 2))
    plain = model.generate_tokens([1], first_index=2, sampling=Sampling(top_k=5, seed=1))[0]
    assert torch.equal(
        model.generate_tokens([1], first_index=np.int32(2), sampling=Sampling(top_k=np.int64(5), seed=True))[0], plain
    )
    with pytest.raises(InputError, match="first_index must be a whole number from 0 to"):
        model.generate([1], first_index=0.5)
