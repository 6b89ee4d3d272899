"""The teacher-forced pass in other ways: attention in blocks, as on a GPU, and layers by torch.compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention

from tests.conftest import random_model
from tests.test_models import random_tokens
from tests.test_training import changed, losses
from tests.test_training import images as images
from varcompress.errors import InputError
from varcompress.hardware import compiled
from varcompress.models import masks
from varcompress.schedule import Together
from varcompress.training import distill

MODEL = random_model(depth=6, patch_nums=(1, 2, 3, 6, 9))  # 131 tokens: two blocks of FlexAttention's, or more


@pytest.fixture
def in_blocks(monkeypatch):
    """Attention as on a GPU, by FlexAttention's own operators: a CPU has no code of it that knows gradients."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"):
        yield lambda on: monkeypatch.setattr(masks, "blockwise", lambda device: on)


def gradients(model, tokens, together):
    """Logits of a pass, and the gradients of their squares."""
    model.var.zero_grad()
    teacher_input = model.tokenizer.teacher_input(tokens).detach()
    logits = model.var(torch.arange(1, len(tokens) + 1), teacher_input, together)
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.var.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(depths=st.sets(st.sampled_from(("full", "d4@2", "d3@2", "d2@2")), min_size=1), bridge=st.integers(0, 4))
def test_attention_in_blocks_equals_the_mask(in_blocks, depths, bridge):
    texts = [depth.replace("@2", f"@{bridge}") for depth in sorted(depths)]
    together = Together(tuple(map(MODEL.schedule, texts)))
    tokens, found = random_tokens(MODEL, 2), []
    for on in (True, False):
        in_blocks(on)
        found.append(gradients(MODEL, tokens, together))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_blocks_leave_out_what_nothing_sees(in_blocks):
    in_blocks(True)
    layout = masks.Layout((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), torch.device("cpu"))
    assert layout.mask(680, (680,)).sparsity() == pytest.approx(100 * 8 / 36)
    assert layout.mask(255, (255, 425, 0, 425)) is layout.mask(255, (255, 425, 425))  # made once


def test_compiled_layers_learn_the_same(tmp_path, images, one_thread):
    for name in (False, True):
        recipe = changed(epochs_full=1, epochs_ramp=0, epochs_subnet=0, p_start=0, compile=name)
        model = distill(random_model(), recipe, data=images, out=tmp_path / str(name))
        assert not any("forward" in vars(block) for block in model.var.blocks)
    one, two = losses(tmp_path / "True"), losses(tmp_path / "False")
    assert one != two  # it was other code that ran
    assert [step["loss"] for step in one] == pytest.approx([step["loss"] for step in two], rel=1e-5)


def test_code_that_cannot_be_made_is_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    with pytest.raises(InputError, match=r"torch\.compile fails here \(.+\): a C compiler"):
        compiled(lambda x: (x * 3).sin().sum())(torch.ones(7))
