"""The loss of a step: schedules that share a pass, the teacher, what chance decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import random_model
from varcompress.data.tokens import Samples
from varcompress.models.transformer import VAR
from varcompress.sampling import Sampling
from varcompress.schedule import Together
from varcompress.training.losses import CrossEntropy, Distribution, KullbackLeibler, Targets
from varcompress.training.objective import Objective
from varcompress.training.recipe import Recipe
from varcompress.training.teacher import Teacher, guided_logits

RECIPE = Recipe(
    name="small",
    depths=(4, 3, 2),
    bridge=2,
    depth_probability={"full": 1, "4": 1, "3": 1, "2": 1},
    epochs=1,
    loss={"kl": 1.0},
    teacher="frozen",
    label_drop=0.0,
    batch_size=4,
    dtype="float32",
)
SCHEDULES = ("full", "d4@2", "d3@2", "d2@2", "d2@1", "d3@0", "6x1,4x1,2x2", "6x2,3x1,2x1", "6x2,0+3x2", "6x1,4x1,3x2")
MIXES = st.lists(st.sampled_from(SCHEDULES), min_size=1, max_size=5, unique=True)


@pytest.fixture(scope="module")
def taught():
    """A model, and another one that is its teacher."""
    model = random_model()
    return model, Teacher(random_model(seed=1).var, model.schedule("full"))


def samples(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Samples(
        torch.randint(0, 11, (count,), generator=generator),  # 10 is the null class
        torch.randint(0, 40, (count, 30), generator=generator),
        None,
        None,
    )


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.var.named_parameters() if p.grad is not None}
    model.var.zero_grad()
    return found


# -- several schedules in one pass ----------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(MIXES)
def test_logits_of_a_shared_pass_are_those_of_single_passes(texts):
    model = random_model()
    together = Together(tuple(model.schedule(text) for text in texts))
    given = samples()
    with torch.no_grad():
        teacher_input = model.tokenizer.teacher_input(given.tokens)
        pieces = model.var(given.labels, teacher_input, together).split(together.lengths, dim=1)
        for i, schedule in enumerate(together.schedules):
            alone = model.var(given.labels, teacher_input, schedule)
            shared = torch.cat((pieces[0], pieces[1 + i]), dim=1) if len(pieces) > 1 else pieces[0]
            torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(MIXES)
def test_logits_of_a_shared_pass_are_those_of_cached_generation(texts):
    model, given = random_model(), samples()
    labels = given.labels.clamp_max(9)
    together = Together(tuple(model.schedule(text) for text in texts))
    with torch.no_grad():
        pieces = model.var(labels, model.tokenizer.teacher_input(given.tokens), together).split(together.lengths, 1)
    for i, schedule in enumerate(together.schedules):
        found = []
        model.generate_tokens(labels, schedule, forced=given.tokens, logits_out=found)
        shared = torch.cat((pieces[0], *pieces[1 + i : 2 + i]), 1)
        torch.testing.assert_close(shared, torch.cat(found, 1), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(MIXES, st.booleans())
def test_gradients_of_a_shared_pass_are_the_sum_of_single_passes(taught, texts, checkpointing):
    model, teacher = taught
    recipe = replace(RECIPE, activation_checkpointing=checkpointing, loss={"kl": 0.7, "cross_entropy": 0.3})
    schedules = [model.schedule(text) for text in texts]
    found = {}
    for together in (True, False):
        objective = Objective(model, replace(recipe, together=together), teacher)
        losses = objective.backward(samples(), slice(0, 3), 1, schedules)
        found[together] = losses, gradients(model)
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-6)
    for schedule in schedules:
        objective.backward(samples(), slice(0, 3), 1, [schedule])
    summed = {name: gradient / len(schedules) for name, gradient in gradients(model).items()}
    torch.testing.assert_close(found[True][1], summed, rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_step_weighs_shared_tokens_by_their_share(taught):
    """E/L KL(early) + (1 - E/L) mean over depths of KL(late)."""
    model, teacher = taught
    objective = Objective(model, RECIPE, teacher)
    schedules = [model.schedule(text) for text in ("d4@2", "d2@2")]
    with torch.no_grad():
        given = objective.given(samples())
        kl = objective.measure(given, schedules)[1]
        share = 5 / 30
        expected = share * kl[0, :5].mean() + (1 - share) * kl[:, 5:].mean()
    assert torch.equal(kl[0, :5], kl[1, :5])
    torch.testing.assert_close(objective.total(objective.measure(given, schedules)), expected)


def test_a_layer_that_no_schedule_of_a_step_runs_late_sees_the_trunk_alone():
    model, seen = random_model(), {}
    for layer, block in enumerate(model.var.blocks):
        block.register_forward_pre_hook(lambda block, given, layer=layer: seen.update({layer: given[0].shape[1]}))
    given = samples()
    together = Together((model.schedule("d3@2"), model.schedule("d2@2")))
    model.var(given.labels, model.tokenizer.teacher_input(given.tokens), together)
    assert seen == {0: 55, 1: 5, 2: 30, 3: 5, 4: 5, 5: 55}


# -- losses and the teacher -----------------------------------------------------------------------


def test_kl_is_nothing_for_a_network_that_is_its_teacher():
    model = random_model()
    objective = Objective(model, RECIPE, Teacher(model.var, model.schedule("full")))
    kl, cross_entropy = (objective.evaluate(samples(), [model.schedule("full")])[i, 0] for i in (1, 0))
    assert kl.abs().max() < 1e-6 < cross_entropy.min()


def test_kl_is_the_expected_difference_of_log_probabilities():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 3, 40, generator=generator).log_softmax(-1) for _ in range(2))
    targets = Targets(torch.zeros(2, 3, dtype=torch.int64), Distribution(p))
    torch.testing.assert_close(KullbackLeibler()(q, targets), (p.exp() * (p - q)).sum(-1))
    torch.testing.assert_close(CrossEntropy()(q, targets), -q[..., 0])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 39), st.integers(0, 1000))
def test_kl_to_the_largest_probabilities_is_a_lower_bound_that_tightens(top, seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = (3 * torch.randn(2, 3, 40, generator=generator)).log_softmax(-1), torch.randn(2, 3, 40, generator=generator)
    q = q.log_softmax(-1)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    whole = KullbackLeibler()(q, Targets(tokens, Distribution(p)))
    fewer, more = (KullbackLeibler()(q, Targets(tokens, Distribution(p).largest(k))) for k in (top, top + 1))
    assert (fewer >= -1e-5).all()
    assert (fewer <= more + 1e-4).all()
    assert (more <= whole + 1e-4).all()


def test_kl_to_the_largest_probabilities_of_a_sure_student_is_no_more_than_the_whole():
    """Whose rest is less than float32 tells from 1 minus the others."""
    p, q = torch.zeros(1, 1, 40).log_softmax(-1), torch.zeros(1, 1, 40)
    q[..., 0] = 40
    q.requires_grad_()
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    whole, largest = (
        KullbackLeibler()(q.log_softmax(-1), Targets(tokens, teacher))
        for teacher in (Distribution(p), Distribution(p).largest(8))
    )
    assert 5 < largest.item() <= whole.item() < 40
    assert torch.autograd.grad(largest.sum(), q)[0].abs().max() > 0.1


def test_a_teacher_does_not_change_with_the_network_that_it_teaches():
    model = random_model()
    teacher = Teacher(model.var, model.schedule("full"))
    given = samples()
    teacher_input = model.tokenizer.teacher_input(given.tokens)
    before, digest = teacher(given, teacher_input).log_probs, teacher.digest
    with torch.no_grad():
        for parameter in model.var.parameters():
            parameter.mul_(1.1)
    assert torch.equal(teacher(given, teacher_input).log_probs, before)
    assert teacher.digest == digest
    assert not before.requires_grad


def test_a_teacher_in_bfloat16_says_nearly_the_same():
    model, given = random_model(), samples()
    teacher_input = model.tokenizer.teacher_input(given.tokens)
    exact, rounded = (
        Teacher(model.var, model.schedule("full"), dtype=dtype)(given, teacher_input).log_probs
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.3


@pytest.mark.parametrize("cfg", [2.5, -0.5, -2.0])
@torch.no_grad()
def test_a_guided_teacher_says_what_generation_draws_from(cfg):
    model, given = random_model(), samples()
    labels = given.labels.clamp_max(9)
    teacher = Teacher(model.var, model.schedule("full"), guided=True)
    heads = []
    hook = model.var.head.register_forward_hook(lambda module, given, logits: heads.append(logits.clone()))
    generated, _ = model.generate_tokens(labels, "full", Sampling(cfg=cfg, seed=3))
    hook.remove()
    found = teacher(
        given._replace(labels=labels), model.tokenizer.teacher_input(generated), torch.full((3,), cfg)
    ).log_probs
    # the draw reads the conditional and, after the first scale, the unconditional logits
    conditional, unconditional = [heads[0], *heads[1::2]], [heads[0], *heads[2::2]]
    expected = torch.cat(
        [
            (1 + cfg * scale / 3) * c - cfg * scale / 3 * u
            for scale, (c, u) in enumerate(zip(conditional, unconditional, strict=True))
        ],
        dim=1,
    )
    torch.testing.assert_close(found, expected.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_guidance_of_nothing_is_the_conditional_logits():
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, 2, 30, 40, generator=generator)
    scale = VAR(random_model().var.config).layout.scale
    torch.testing.assert_close(guided_logits(conditional, unconditional, torch.zeros(2), scale), conditional)
    strong = guided_logits(conditional, unconditional, torch.tensor([0.0, 2.0]), scale)
    torch.testing.assert_close(strong[0], conditional[0])
    torch.testing.assert_close(strong[1, -1], 3 * conditional[1, -1] - 2 * unconditional[1, -1])


# -- chance ---------------------------------------------------------------------------------------


def test_what_chance_decides_of_an_image_does_not_depend_on_the_others(taught):
    model, _ = taught
    recipe = replace(RECIPE, guidance="none", cfg=(0.5, 3.0))
    objective = Objective(model, recipe, Teacher(model.var, model.schedule("full"), guided=True))
    whole, part = objective._drawn_cfg(7, slice(0, 40)), objective._drawn_cfg(7, slice(10, 20))
    assert torch.equal(whole[10:20], part)
    assert 0.5 <= whole.min() < 1 < 2.5 < whole.max() <= 3
    assert not torch.equal(objective._drawn_cfg(8, slice(0, 40)), whole)
