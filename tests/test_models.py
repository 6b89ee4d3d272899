"""The two properties that carry everything, over many schedules."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import random_model
from varcompress.drawing import draw_images
from varcompress.errors import InputError
from varcompress.models.autoencoder import widened
from varcompress.models.tokenizer import by_products, upsample
from varcompress.models.transformer import VAR
from varcompress.sampling import Sampling
from varcompress.schedule import Schedule, equidistant

MODELS = {
    "plain": random_model(depth=6),
    "shared": random_model(depth=5, width=48, heads=3, patch_nums=(1, 2, 4), shared_aln=True, seed=1),
    "wide start": random_model(depth=4, patch_nums=(2, 3, 3, 5), seed=2),
}


@st.composite
def schedules(draw, model):
    """Any schedule that only shrinks: equidistant depths, or arbitrary nested sets of layers."""
    config = model.var.config
    in_use, layers = tuple(range(config.depth)), []
    for _ in config.patch_nums:
        if draw(st.booleans()):
            if draw(st.booleans()) and len(in_use) > 2:
                in_use = equidistant(in_use, draw(st.integers(2, len(in_use))))
            else:
                in_use = tuple(sorted(draw(st.sets(st.sampled_from(in_use), min_size=1))))
        layers.append(in_use)
    return Schedule(config.depth, config.patch_nums, tuple(layers))


def random_tokens(model, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.var.config.vocab, (batch, model.var.config.tokens), generator=generator)


def teacher_forced(model, tokens, schedule, **options):
    """Logits of classes 1, 2 … and tokens, ready for a backward pass."""
    labels, teacher_input = torch.arange(1, len(tokens) + 1), model.tokenizer.teacher_input(tokens).detach()
    return model.var(labels, teacher_input, model.schedule(schedule), **options)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_cached_generation_equals_the_teacher_forced_pass(name, data):
    model = MODELS[name]
    schedule = data.draw(schedules(model))
    batch = data.draw(st.integers(1, 3))
    tokens, labels = random_tokens(model, batch), list(range(batch))
    collected = []
    model.generate_tokens(labels, schedule, forced=tokens, logits_out=collected)
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat(collected, dim=1), model(labels, tokens, schedule), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cached_generation_equals_the_teacher_forced_pass_in_half_precision(dtype):
    model = random_model(depth=6)
    tokens, labels = random_tokens(model, 3), [1, 2, 3]
    with torch.inference_mode():
        exact = model(labels, tokens, "d3@2")
        model.cast(dtype)
        collected = []
        model.generate_tokens(labels, "d3@2", forced=tokens, logits_out=collected)
        cached, forced = torch.cat(collected, dim=1), model(labels, tokens, "d3@2")
    error = {"cached": (cached - exact).norm() / exact.norm(), "forced": (forced - exact).norm() / exact.norm()}
    assert max(error.values()) < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert (cached - forced).norm() / exact.norm() < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("name", MODELS)
def test_later_tokens_do_not_reach_earlier_scales(name):
    model = MODELS[name]
    tokens = random_tokens(model, 2)
    changed = tokens.clone()
    last = model.schedule("full").ends[-2]
    changed[:, last:] = (changed[:, last:] + 1) % model.var.config.vocab
    with torch.inference_mode():
        assert torch.equal(model([0, 1], tokens, "d2@1"), model([0, 1], changed, "d2@1"))


def test_a_subnet_changes_only_the_scales_after_the_bridge(tiny):
    tokens = random_tokens(tiny, 2)
    with torch.inference_mode():
        full, subnet = tiny([3, 4], tokens), tiny([3, 4], tokens, "d2@2")
    bridge = tiny.schedule("full").ends[1]
    torch.testing.assert_close(full[:, :bridge], subnet[:, :bridge])
    assert (full[:, bridge:] - subnet[:, bridge:]).abs().mean() > 0.1


def test_skipped_layers_get_gradients_from_the_bridge_only(tiny):
    tokens = random_tokens(tiny, 2)
    tiny.zero_grad()
    tiny([3, 4], tokens, "d2@0").sum().backward()
    assert all(p.grad is None for p in tiny.var.blocks[2].parameters())
    tiny([3, 4], tokens, "d2@1").sum().backward()
    assert tiny.var.blocks[2].attn.proj.weight.grad.abs().sum() > 0
    tiny.zero_grad()


def test_recomputing_activations_gives_the_same_gradients(tiny):
    tokens = random_tokens(tiny, 2)
    gradients = []
    for checkpointing in (False, True):
        teacher_forced(tiny, tokens, "d3@1", checkpointing=checkpointing).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in tiny.var.named_parameters()})
        tiny.zero_grad()
    torch.testing.assert_close(*gradients)


class Saved:
    """Counts what autograd keeps for the backward pass: each storage once, parameters left out."""

    def __init__(self, model):
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.kept = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    @property
    def nbytes(self):
        return sum(storage.nbytes() for storage in self.kept.values())


def saved_bytes(model, schedule, **options):
    saved = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        teacher_forced(model, random_tokens(model, 4), schedule, **options)
    return saved.nbytes


@pytest.mark.parametrize("schedule", ["d2@2", "d2@1", "12x1,6x1,4x1,2x1"])
def test_a_layer_keeps_only_the_tokens_that_it_sees_for_the_backward_pass(schedule):
    model = random_model(depth=12, patch_nums=(1, 2, 3, 6))
    rows = {text: sum(model.schedule(text).layer_tokens) for text in ("full", "d2@0", schedule)}
    full, least, found = (saved_bytes(model, text) for text in ("full", "d2@0", schedule))
    per_row = (full - least) / (rows["full"] - rows["d2@0"])  # of 10 layers and all tokens
    assert found == pytest.approx(full - per_row * (rows["full"] - rows[schedule]), rel=0.05)


@pytest.mark.parametrize("shared_aln", [False, True])
def test_activation_checkpointing_keeps_one_input_per_layer(shared_aln):
    """Only the residual (B, n, C): the condition, the shared AdaLN vectors and the mask are one for all layers."""
    small, large = (random_model(depth=depth, shared_aln=shared_aln) for depth in (6, 12))
    for schedule, rows in (("full", 30), ("d2@2", 5)):
        added = saved_bytes(large, schedule, checkpointing=True) - saved_bytes(small, schedule, checkpointing=True)
        assert added == 6 * 4 * rows * small.var.config.width * 4


def test_masked_attention_avoids_the_backward_pass_of_cudnn(tiny, monkeypatch):
    """At some lengths, 2,240 among them, cuDNN's gradients under a mask are NaN."""
    attention, found = F.scaled_dot_product_attention, []

    def attend(*args, attn_mask=None, **kwargs):
        found.append((attn_mask is not None, torch.backends.cuda.cudnn_sdp_enabled()))
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    tokens = random_tokens(tiny, 2)
    for checkpointing in (False, True):  # which calls attention again in the backward pass
        teacher_forced(tiny, tokens, "d2@2", checkpointing=checkpointing).sum().backward()
    tiny.zero_grad()
    assert found == [(True, False)] * 18
    tiny.generate_tokens([1, 2])
    assert (False, True) in found  # generation has no mask, and keeps the choice
    assert torch.backends.cuda.cudnn_sdp_enabled()


class FromHost(TorchDispatchMode):
    """Collects operations that bring numbers of the host to a device: the host waits for each."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        hosts = [value for value in args if isinstance(value, torch.Tensor) and value.is_cpu]
        if func is torch.ops.aten.lift_fresh.default or (hosts and isinstance(out, torch.Tensor) and not out.is_cpu):
            self.operations.append(func)
        return out


@pytest.mark.parametrize("schedule", ["full", "d2@2", "6x1,4x1,2x2"])
def test_a_training_pass_neither_reads_back_nor_waits(schedule, monkeypatch):
    """On a GPU's tensors that have shapes and no values, whatever depends on a value raises."""
    monkeypatch.setattr(
        "varcompress.models.masks.blockwise", lambda device: False
    )  # of whose code there are no shapes alone
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"):
        model = random_model()
        tokens, labels = torch.zeros(3, 30, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        passes = FromHost(), FromHost()
        for operations in passes:
            with operations:
                teacher_input = model.tokenizer.teacher_input(tokens)
                logits = model.var(labels, teacher_input, model.schedule(schedule))
        assert len(passes[0].operations) > 0  # the layout of the tokens, once
        assert passes[1].operations == []
        assert (teacher_input.dtype, logits.device.type, logits.shape) == (torch.float32, "cuda", (3, 30, 40))


def test_a_model_that_generated_can_be_trained_and_moved():
    model = random_model()
    with torch.inference_mode():
        model([1, 2], random_tokens(model, 2))
    teacher_forced(model, random_tokens(model, 2), "d2").sum().backward()
    model.var.to("meta")
    labels, teacher_input = torch.zeros(2, dtype=torch.int64, device="meta"), torch.zeros(2, 29, 8, device="meta")
    assert model.var(labels, teacher_input, model.schedule("full")).is_meta


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # of logits that are a view, which nothing changes in place
def test_blocks_may_be_sharded(tmp_path):
    """FSDP2 gathers the weights of a block when the block is called, and not before."""
    model = random_model()
    tokens = random_tokens(model, 2)
    teacher_forced(model, tokens, "d3@1").square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.var.named_parameters()}
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.var.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model.var, mesh=mesh)
        for checkpointing in (False, True):
            teacher_forced(model, tokens, "d3@1", checkpointing=checkpointing).square().mean().backward()
            found = {name: parameter.grad.full_tensor() for name, parameter in model.var.named_parameters()}
            torch.testing.assert_close(found, expected)
            model.var.zero_grad()
    finally:
        dist.destroy_process_group()


def test_guidance_is_zero_at_the_first_scale_and_cfg_at_the_last(tiny):
    first = tiny.schedule("full").ends[0]
    weak, _ = tiny.generate_tokens([1, 2], sampling=Sampling(cfg=0.0, seed=3))
    strong, _ = tiny.generate_tokens([1, 2], sampling=Sampling(cfg=8.0, seed=3))
    assert torch.equal(weak[:, :first], strong[:, :first])
    assert not torch.equal(weak, strong)


def test_images_are_in_range_and_of_the_tokenizers_size(tiny):
    images = tiny.generate([0, 9, 5], "d2", seed=1)
    size = tiny.tokenizer.config.image_size
    assert images.shape == (3, 3, size, size)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("labels", [[10], [-1], [], [[1]]])
def test_unknown_classes_are_refused(tiny, labels):
    with pytest.raises(InputError, match="class"):
        tiny.generate(labels)


def test_images_of_another_size_are_refused(tiny):
    with pytest.raises(InputError, match="8, 8"):
        tiny.encode(torch.zeros(1, 3, 9, 8))


def test_a_schedule_of_another_model_is_refused(tiny):
    with pytest.raises(InputError, match="another model"):
        tiny.generate([0], MODELS["shared"].schedule("full"))


def test_parameters_of_the_real_checkpoints_are_counted_without_allocating_them():
    import json
    from pathlib import Path

    from varcompress.checkpoint import var_config

    for name, spec in json.loads((Path(__file__).parent / "golden/official_checkpoints.json").read_text()).items():
        if name.startswith("var"):
            shapes = {
                key.replace("*", str(layer)): tuple(shape)
                for key, shape in spec["keys"].items()
                for layer in range(spec["depth"] if "*" in key else 1)
            }
            with torch.device("meta"):
                var = VAR(var_config(shapes, tuple(spec["patch_nums"])))
            assert sum(p.numel() for p in var.parameters()) == spec["parameters"]


@pytest.mark.parametrize("labels", [[1.7], ["a"], [None], torch.tensor([1.0]), [True], [2**70], 3])
def test_labels_are_whole_numbers(tiny, labels):
    with pytest.raises(InputError, match="labels must be a list of at least one class index"):
        tiny.generate(labels)


@pytest.mark.parametrize(
    "setting",
    [
        {"cfg": float("nan")},
        {"cfg": float("inf")},
        {"cfg": "1.5"},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 1.0},
    ],
)
def test_settings_that_mean_nothing_are_refused(tiny, setting):
    with pytest.raises(InputError, match=f"{next(iter(setting))} must be "):
        tiny.generate([1], **setting)


def test_the_bounds_of_settings_are_allowed(tiny):
    for setting in ({"top_k": 0, "top_p": 0}, {"top_p": 1}, {"seed": 2**63 - 1}, {"cfg": 0}):
        assert tiny.generate([1], **setting).isfinite().all()


def test_a_schedule_that_is_none_is_refused(tiny):
    with pytest.raises(InputError, match="a schedule is text, such as full or d8, or a Schedule, not None"):
        tiny.generate([0], None)


def test_tokens_that_are_none_are_refused(tiny):
    tokens = random_tokens(tiny, 2)
    cases = {
        "shape": tokens[:, :-1],
        "of shape \\(30,\\)": tokens[0],
        "whole numbers": tokens.float(),
        "token 40 is unknown: the codebook has 0 to 39": tokens.clone().fill_(40),
        "token -1 is unknown": tokens.clone().fill_(-1),
    }
    for message, wrong in cases.items():
        with pytest.raises(InputError, match=message):
            tiny.decode(wrong)
        with pytest.raises(InputError, match=message):
            tiny([1, 2], wrong)
        with pytest.raises(InputError, match=message):
            tiny.generate_tokens([1, 2], forced=wrong)
    with pytest.raises(InputError, match="tokens of 2 images for 3 labels"):
        tiny([1, 2, 3], tokens)
    assert torch.equal(tiny.decode(tokens.int()), tiny.decode(tokens))


def test_logits_that_overflow_spoil_the_image_visibly_and_no_other():
    model = random_model()
    with torch.no_grad():
        model.var.class_emb.weight[3] = torch.inf  # one class alone grows beyond the dtype
    sound, spoilt = model.generate([2, 3], "d2")
    assert sound.isfinite().all()
    assert spoilt.isnan().all()
    with pytest.raises(InputError, match=r"schedule d2@2 draws images that are not finite in torch\.float32"):
        draw_images(model, [2, 3], "d2")


# -- what a GPU computes in another way -----------------------------------------------------------


@given(small=st.integers(1, 16), large=st.integers(1, 20))
def test_interpolation_as_products_is_torchs(small, large):
    maps = torch.randn(2, 3, small, small, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(by_products(maps, large), upsample(maps, large), rtol=0, atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 3, 8, 9])
def test_added_outputs_change_no_other(outputs):
    conv, maps = torch.nn.Conv2d(4, outputs, 3, padding=1), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(widened(conv, maps), conv(maps))
