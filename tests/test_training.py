"""Distillation: the progressive strategy, the step, and a run that was interrupted."""

from __future__ import annotations

import contextlib
import copy
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.conftest import random_model
from varcompress.checkpoint import is_elastic, load_elastic
from varcompress.data.tokens import Samples
from varcompress.distributed import Ranks
from varcompress.errors import InputError
from varcompress.fingerprint import weights_digest
from varcompress.training import distill, loop
from varcompress.training.batches import Batches, passes
from varcompress.training.checks import check_fit
from varcompress.training.log import read_steps, summary
from varcompress.training.objective import Objective
from varcompress.training.optimizer import optimizer_of
from varcompress.training.recipe import FULL, Recipe
from varcompress.training.state import RunDirectory, _compare
from varcompress.training.strategy import plan

SMALL = Recipe(
    name="small",
    depths=(4, 2),
    bridge=2,
    epochs_full=1,
    epochs_ramp=2,
    epochs_subnet=1,
    learning_rate=1e-3,
    learning_rate_end=0.5,
    weight_decay=0.01,
    batch_size=8,
    dtype="float32",
    checkpoint_every=3,
    views=2,
)
STEPS = 20  # of SMALL on `images`
IN_WORK = ["lock", "run.json", "start", "step-3", "subnets.json", "tokens", "writer"]  # after three steps of it
pytestmark = pytest.mark.usefixtures("one_thread")


def changed(**values) -> Recipe:
    return Recipe.from_dict({**SMALL.to_dict(), **values})


def token_losses(model, labels, tokens, schedule):
    """Cross-entropy of each token under a schedule, the mean over images: (L,)."""
    objective = Objective(model, SMALL)
    return objective.measure(objective.given(Samples(labels, tokens, None, None)), [schedule])[0, 0]


class Interrupt(Exception):
    """Raised out of the progress callback, as a person's Ctrl-C would be."""


def interrupt_at(step):
    def progress(done, total, what):
        if what.startswith("distill") and done == step:
            raise Interrupt

    return progress


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten classes of four flat, slightly noisy images: easy to learn."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in range(10):
        (root / str(label)).mkdir()
        for i in range(4):
            pixels = rng.normal(25 * label, 8, (9, 11, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / str(label) / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def undisturbed(tiny, images, tmp_path_factory):
    """A run of SMALL from the first step to the last."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    distill(copy.deepcopy(tiny), SMALL, data=images, out=out)
    return out


def weights(out) -> bytes:
    return (Path(out) / "model.safetensors").read_bytes()


def losses(out) -> list[dict]:
    return [
        {k: v for k, v in step.items() if k not in ("seconds", "waited", "between", "memory_bytes")}
        for step in read_steps(Path(out) / "steps.jsonl")
    ]


# -- the progressive strategy ---------------------------------------------------------------------


def test_the_plan_is_variants_three_phases():
    recipe = changed(epochs_full=5, epochs_ramp=15, epochs_subnet=10, depths=[5, 4, 3, 2])
    steps = plan(recipe, steps_per_epoch=200)
    assert [step.number for step in steps] == list(range(1, 6001))
    assert Counter(step.phase for step in steps) == {"full": 1000, "ramp": 3000, "subnet": 2000}
    assert [step.number for step in steps if step.ends_phase] == [1000, 4000, 6000]
    assert {step.p for step in steps if step.phase == "full"} == {0.2}
    assert {step.p for step in steps if step.phase == "subnet"} == {1.0}
    ramp = [step.p for step in steps if step.phase == "ramp"]
    assert ramp[0] == pytest.approx(0.2)
    assert np.allclose(np.diff(ramp), 0.8 / 3000)
    assert (steps[399].epoch, steps[399].place, steps[400].epoch, steps[400].place) == (1, 199, 2, 0)


def test_depths_are_drawn_with_their_probabilities():
    recipe = changed(epochs_full=5, epochs_ramp=15, epochs_subnet=10, depths=[5, 4, 3, 2])
    steps = plan(recipe, steps_per_epoch=200)
    subnets = [step.depths != (FULL,) for step in steps]
    assert 0.16 < np.mean(subnets[:1000]) < 0.24
    assert 0.56 < np.mean(subnets[1000:4000]) < 0.64
    assert all(subnets[4000:])
    counts = Counter(depth for step in steps[4000:] for depth in step.depths)
    assert set(counts) == {5, 4, 3, 2}
    assert all(420 < count < 580 for count in counts.values())


def test_the_plan_depends_on_seed_and_step_alone():
    assert plan(SMALL, 10) == plan(SMALL, 10)
    longer = plan(changed(epochs_subnet=5), 10)
    assert longer[:39] == plan(SMALL, 10)[:39]
    assert [step.depths for step in plan(changed(seed=1), 10)] != [step.depths for step in plan(SMALL, 10)]


# -- one step -------------------------------------------------------------------------------------


def test_token_losses_are_cross_entropy_of_teacher_forced_logits(tiny):
    tokens, labels = torch.randint(0, 40, (3, 30)), torch.tensor([1, 2, 9])
    logits = tiny.forward(labels, tokens, "d2@2")
    expected = torch.stack([F.cross_entropy(logits[:, i], tokens[:, i]) for i in range(30)])
    found = token_losses(tiny, labels, tokens, tiny.schedule("d2@2"))
    torch.testing.assert_close(found, expected)


@torch.compiler.set_stance("force_eager")  # the same arithmetic as its compiled code has
def test_moments_in_8_bits_are_continued_bit_for_bit(tiny, images, tmp_path):
    recipe, out = changed(optimizer="adamw8bit"), tmp_path / "interrupted"
    distill(copy.deepcopy(tiny), recipe, data=images, out=tmp_path / "whole")
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), recipe, data=images, out=out, progress=interrupt_at(10))
    codes = [key for key in RunDirectory(out).states.shapes(9) if key.startswith("exp_avg_codes.")]
    assert len(codes) > 2 * tiny.var.config.depth
    distill(copy.deepcopy(tiny), recipe, data=images, out=out, resume=True)
    assert losses(out) == losses(tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")


def test_moments_in_8_bits_stay_near_those_in_float32(tiny, images, undisturbed, tmp_path):
    with torch.compiler.set_stance("force_eager"):
        distill(copy.deepcopy(tiny), changed(optimizer="adamw8bit"), data=images, out=tmp_path / "out")
    found, exact = losses(tmp_path / "out"), losses(undisturbed)
    assert found != exact
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in exact], rel=0.01)


def test_moments_in_8_bits_are_for_one_device(tiny):
    with pytest.raises(InputError, match="adamw8bit is for one device: on several set optimizer=adamw and parallel"):
        check_fit(changed(optimizer="adamw8bit"), tiny, Ranks(rank=0, count=2))


def test_layers_outside_a_subnet_without_bridge_stay_untouched(tiny):
    model = copy.deepcopy(tiny)
    optimizer = optimizer_of(model.var, changed(weight_decay=0.5))
    before = {name: value.clone() for name, value in model.var.state_dict().items()}
    tokens, labels = torch.randint(0, 40, (3, 30)), torch.tensor([1, 2, 9])
    token_losses(model, labels, tokens, model.schedule("d3@0")).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.var.parameters(), 1.0)
    optimizer.step(0.1)
    moved = {name for name, value in model.var.state_dict().items() if not torch.equal(value, before[name])}
    runs = {name for name in before if not name.startswith(("blocks.1.", "blocks.3.", "blocks.4."))}
    assert moved == runs  # layers 0, 2 and 5 of 6, and all that is no layer
    assert {name for name, parameter in model.var.named_parameters() if optimizer.state(parameter)} == runs & {
        name for name, _ in model.var.named_parameters()
    }


def test_the_bridge_trains_the_layers_outside_a_subnet(tiny):
    model = copy.deepcopy(tiny)
    tokens, labels = torch.randint(0, 40, (3, 30)), torch.tensor([1, 2, 9])
    token_losses(model, labels, tokens, model.schedule("d2@1")).mean().backward()
    assert all(parameter.grad is not None for parameter in model.var.parameters())


def test_clipping_limits_the_gradient_and_the_norm_before_it_is_logged(tiny, images, tmp_path):
    found = {}
    for clip in (0, 1e6, 1e-12):
        recipe = changed(gradient_clip=clip, epochs_ramp=0, epochs_subnet=0)
        distill(copy.deepcopy(tiny), recipe, data=images, out=tmp_path / str(clip))
        found[clip] = losses(tmp_path / str(clip))
    assert found[0] == found[1e6]
    assert 0 < found[0][0]["gradient_norm"] == found[1e-12][0]["gradient_norm"]
    # what is left of the gradient is small beside AdamW's epsilon, so that nothing moves
    assert abs(found[1e-12][-1]["loss"] - found[0][-1]["loss"]) > 0.01


def test_a_step_that_raises_leaves_nothing_behind(tiny, images, tmp_path):
    model, runs = copy.deepcopy(tiny), []

    def count(module, given):
        runs.append(module)
        if len(runs) == 8:  # in the backward pass of the fourth step, where layers run again
            raise Interrupt

    model.var.blocks[0].register_forward_pre_hook(count)
    with pytest.raises(Interrupt):
        distill(model, changed(activation_checkpointing=True), data=images, out=tmp_path / "out")
    assert all(parameter.grad is None for parameter in model.var.parameters())
    runs.clear()
    tokens, labels = torch.randint(0, 40, (3, 30)), torch.tensor([1, 2, 9])
    token_losses(model, labels, tokens, model.schedule("full")).mean().backward()
    assert len(runs) == 1  # nothing is recomputed where nobody asks for it


def test_passes_and_processes_cover_the_batch_once():
    recipe = changed(batch_size=24, accumulation=3)
    step = plan(recipe, 5)[3]
    places = [i for rank in range(4) for part in passes(step, recipe, Ranks(rank, 4)) for i in range(100)[part]]
    assert sorted(places) == list(range(72, 96))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depths": [6, 2]}, "depths names 6, but the model has 6 layers"),
        ({"bridge": 4}, "a bridge of 4 leaves nothing to thin out: the model has 4 scales"),
        ({"batch_size": 6, "accumulation": 2}, "batch_size 6 does not divide into 4 processes x 2 passes"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(tiny, values, message):
    with pytest.raises(InputError, match=message):
        check_fit(changed(**values), tiny, Ranks(0, 4))


# -- a whole run ----------------------------------------------------------------------------------


def test_a_run_writes_one_elastic_checkpoint_and_its_steps(undisturbed, tiny):
    assert sorted(p.name for p in undisturbed.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "phase-full",
        "phase-ramp",
        "recipe.yaml",
        "steps.jsonl",
    ]
    model = load_elastic(undisturbed)
    assert (model.bridge, model.depths) == (2, (4, 2))
    assert model.provenance.recipe == SMALL.to_dict()
    assert model.provenance.name == tiny.provenance.name
    assert weights_digest(model.tokenizer) == weights_digest(tiny.tokenizer)
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert [str(s) for s in model.default_schedules()] == ["full", "d4@2", "d2@2"]


def test_every_step_is_logged(undisturbed):
    steps, expected = read_steps(undisturbed / "steps.jsonl"), plan(SMALL, 5)
    assert len(steps) == len(expected) == STEPS
    shares = [p * p / 30 for p in (1, 2, 3, 4)]
    for line, step in zip(steps, expected, strict=True):
        assert (line["step"], line["epoch"], line["phase"]) == (step.number, step.epoch, step.phase)
        assert line["p"] == pytest.approx(step.p)
        (depth,) = step.depths
        schedule = "full" if depth == FULL else f"d{depth}@2"
        assert line["losses"] == {schedule: pytest.approx(line["loss"])}
        assert line["loss"] == pytest.approx(np.dot(line["cross_entropy"][schedule], shares), rel=1e-5)
        assert "kl" not in line
        assert line["learning_rate"] == pytest.approx(SMALL.learning_rate * (1 - 0.5 * step.number / STEPS))
        assert line["seconds"] > 0


def test_a_step_says_what_of_its_time_it_waited_and_what_went_by_before_it(tiny, images, tmp_path, monkeypatch):
    """By what a slow reader, and slow losses of images held out, take at the least."""

    def slow(function):
        def called(*arguments):
            time.sleep(0.05)
            return function(*arguments)

        return called

    monkeypatch.setattr(Batches, "__getitem__", slow(Batches.__getitem__))
    monkeypatch.setattr(loop, "measure_heldout", slow(loop.measure_heldout))
    recipe = changed(epochs_ramp=0, epochs_subnet=0, batch_size=4, holdout=0.2, holdout_every=3)
    distill(copy.deepcopy(tiny), recipe, data=images, out=tmp_path / "out")
    first, *lines = read_steps(tmp_path / "out" / "steps.jsonl")
    assert first["between"] == 0
    for before, line in zip((first, *lines), lines, strict=False):
        assert 0.05 <= line["waited"] < line["seconds"]
        assert line["between"] > (0.05 if "heldout" in before else 0)


def test_training_helps_the_subnets(tiny, images, tmp_path):
    model = distill(copy.deepcopy(tiny), changed(epochs_subnet=6), data=images, out=tmp_path / "out")
    result = summary(tmp_path / "out")
    lines = read_steps(tmp_path / "out" / "steps.jsonl")
    assert result["seconds"] == pytest.approx(sum(line["seconds"] + line["between"] for line in lines))
    assert result["steps"] == 45
    for row in result["schedules"]:
        assert row["schedule"] == "full" or row["loss_last"] < row["loss_first"]
    tokens, labels = tiny.encode(torch.full((4, 3, 8, 8), 0.5)), torch.tensor([4, 5, 5, 6])
    for depth in (4, 2):
        with torch.no_grad():
            before, after = (
                token_losses(m, labels, tokens, m.schedule(f"d{depth}@2")).mean().item() for m in (tiny, model)
            )
        assert after < before - 0.5


def test_passes_change_nothing_but_rounding(undisturbed, tiny, images, tmp_path):
    distill(copy.deepcopy(tiny), changed(accumulation=4), data=images, out=tmp_path / "out")
    for one, four in zip(losses(undisturbed), losses(tmp_path / "out"), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_activation_checkpointing_changes_nothing(undisturbed, tiny, images, tmp_path):
    distill(copy.deepcopy(tiny), changed(activation_checkpointing=True), data=images, out=tmp_path / "out")
    for kept, recomputed in zip(losses(undisturbed), losses(tmp_path / "out"), strict=True):
        assert recomputed["loss"] == pytest.approx(kept["loss"], rel=1e-5)


def test_bfloat16_arithmetic_keeps_float32_weights(undisturbed, tiny, images, tmp_path):
    model = distill(copy.deepcopy(tiny), changed(dtype="bfloat16"), data=images, out=tmp_path / "out")
    assert model.dtype == torch.float32
    pairs = list(zip(losses(undisturbed), losses(tmp_path / "out"), strict=True))
    assert any(a["loss"] != b["loss"] for a, b in pairs)
    for exact, rounded in pairs:
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.03)


def test_a_key_that_a_run_did_not_say_was_as_by_default(tmp_path):
    """So that a run goes on under a version whose recipes have more keys, or say fewer."""
    started, now = {"recipe": SMALL.to_dict()}, {"recipe": SMALL.to_dict() | {"teacher_dtype": "float32"}}
    for one, other in ((started, now), (now, started)):
        _compare(tmp_path, one, other)
    with pytest.raises(InputError, match="another recipe: teacher_dtype was float32, now bfloat16"):
        _compare(tmp_path, started, {"recipe": SMALL.to_dict() | {"teacher_dtype": "bfloat16"}})


def test_warmup_raises_the_learning_rate_linearly(tiny, images, tmp_path):
    distill(
        copy.deepcopy(tiny),
        changed(warmup_steps=4, learning_rate_end=1.0, epochs_ramp=0, epochs_subnet=1),
        data=images,
        out=tmp_path,
    )
    rates = [step["learning_rate"] for step in losses(tmp_path)]
    assert rates[:6] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_the_learning_rate_falls_linearly_to_its_end(tiny, images, tmp_path):
    recipe = changed(learning_rate_end=0.2, epochs_ramp=0, epochs_subnet=1)
    distill(copy.deepcopy(tiny), recipe, data=images, out=tmp_path)
    rates = [step["learning_rate"] / recipe.learning_rate for step in losses(tmp_path)]
    assert rates == pytest.approx([1 - 0.8 * (i + 1) / len(rates) for i in range(len(rates))])


def test_a_shared_token_store_is_kept(tiny, images, tmp_path):
    once = changed(epochs_ramp=0, epochs_subnet=0)
    for name in ("first", "second"):
        distill(copy.deepcopy(tiny), once, data=images, out=tmp_path / name, tokens=tmp_path / "tokens")
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    assert (tmp_path / "tokens" / "store.json").is_file()
    with pytest.raises(InputError, match="holds tokens with views 2, not 1"):
        distill(copy.deepcopy(tiny), changed(views=1), data=images, out=tmp_path / "third", tokens=tmp_path / "tokens")
    assert not (tmp_path / "third").exists()


def test_unreadable_images_are_named(tiny, images, tmp_path):
    for folder in images.iterdir():
        (tmp_path / "images" / folder.name).mkdir(parents=True)
        for file in folder.iterdir():
            (tmp_path / "images" / folder.name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "images" / "4" / "0.png").write_bytes(b"")
    notes = []
    once = changed(epochs_ramp=0, epochs_subnet=0)
    distill(copy.deepcopy(tiny), once, data=tmp_path / "images", out=tmp_path / "out", note=notes.append)
    assert notes == ["skipped 1 of 40 images that could not be read: 4/0.png"]


def test_what_the_data_must_be(tiny, images, tmp_path):
    model = copy.deepcopy(tiny)
    with pytest.raises(InputError, match="needs images: give a folder"):
        distill(model, SMALL, out=tmp_path / "out")
    with pytest.raises(InputError, match="batch_size 64 is more than the 40 images"):
        distill(model, changed(batch_size=64), data=images, out=tmp_path / "out")
    with pytest.raises(InputError, match="10 class folders, but the model has 12 classes"):
        distill(random_model(classes=12), SMALL, data=images, out=tmp_path / "other")


def test_weights_that_are_not_finite_are_refused(images, tmp_path):
    model = random_model()
    with torch.no_grad():
        model.var.head.bias[0] = torch.nan
    with pytest.raises(InputError, match=r"var: var.head.bias holds NaN or infinite weights: get the model again"):
        distill(model, SMALL, data=images, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_begun(undisturbed, tiny, images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="batch_size 64 is more than the 40 images"):
        distill(copy.deepcopy(tiny), changed(batch_size=64), data=images, out=out)
    assert not out.exists()
    distill(copy.deepcopy(tiny), SMALL, data=images, out=out)
    assert weights(out) == weights(undisturbed)


@pytest.mark.parametrize("part", ["forward", "gradient"])
def test_steps_without_a_finite_gradient_are_skipped_and_end_the_run(tiny, images, tmp_path, part):
    out, model = tmp_path / "out", copy.deepcopy(tiny)
    recipe = changed(checkpoint_every=1, max_bad_steps=3)

    def break_model(done, total, what):
        if what.startswith("distill") and done == 3:
            if part == "forward":
                model.var.head.register_forward_hook(lambda module, given, logits: logits * torch.nan)
            else:
                model.var.head.weight.register_hook(lambda gradient: gradient * torch.inf)

    what = {"forward": "loss", "gradient": "norm of the gradient"}[part]
    message = (
        f"step 6: the {what} is (nan|inf), and so it was for 3 steps, which were skipped: start anew with a lower "
        "learning_rate, or resume with more max_bad_steps; the state of step 3, from before them, stays for "
        "`varcompress export --step 3`"
    )
    with pytest.raises(InputError, match=message):
        distill(model, recipe, data=images, out=out, progress=break_model)
    assert all(parameter.isfinite().all() for parameter in model.var.parameters())
    assert RunDirectory(out).states.steps == [2, 3, 6]
    before, after = (RunDirectory(out).unfinished(step) for step in (3, 6))
    assert weights_digest(before) == weights_digest(after)
    assert all(parameter.isfinite().all() for parameter in after.parameters())
    assert ["skipped" in step for step in losses(out)] == [False] * 3 + [True] * 3
    assert [schedule["steps"] for schedule in summary(out)["schedules"]]


def test_a_single_bad_step_changes_no_weight_and_training_goes_on(tiny, images, tmp_path):
    out, model, seen = tmp_path / "out", copy.deepcopy(tiny), []

    def spoil(module, given, logits):
        seen.append(weights_digest(model.var))
        return logits * torch.nan if len(seen) == 4 else logits

    model.var.head.register_forward_hook(spoil)
    distill(model, changed(max_bad_steps=1000), data=images, out=out)
    assert [step["step"] for step in losses(out) if "skipped" in step] == [4]
    assert seen[3] == seen[4] != seen[5]
    assert is_elastic(out)


def test_a_state_that_is_due_at_a_bad_step_is_saved_after_the_next_good_one(tiny, images, tmp_path):
    out, model, seen = tmp_path / "out", copy.deepcopy(tiny), []

    def spoil(module, given, logits):
        seen.append(0)
        return logits * torch.nan if len(seen) in (3, 4, 9) else logits

    model.var.head.register_forward_hook(spoil)
    with pytest.raises(Interrupt):
        distill(model, changed(keep=10), data=images, out=out, progress=interrupt_at(11))
    assert RunDirectory(out).states.steps == [5, 6, 10]


# -- interruption ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 5, 10, 14, 20])
def test_resuming_reaches_the_same_weights(undisturbed, tiny, images, tmp_path, step):
    out, notes = tmp_path / "out", []
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, progress=interrupt_at(step))
    assert not (out / "model.safetensors").exists()
    distill(copy.deepcopy(tiny), SMALL, data=images, out=out, resume=True, note=notes.append)
    assert weights(out) == weights(undisturbed)
    assert losses(out) == losses(undisturbed)
    last_state = max(n for n in (0, *range(3, step + 1, 3), 5, 15, 20) if n <= step)
    assert notes[0].startswith(f"continuing after step {last_state}" if last_state else "nothing to resume")
    assert not (out / ".training").exists()


def test_resume_refuses_another_recipe_model_or_data(tiny, images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, progress=interrupt_at(4))
    with pytest.raises(InputError, match="unfinished run: continue it with --resume"):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out)
    recipe = changed(learning_rate=2e-3, seed=7)
    with pytest.raises(InputError, match=r"learning_rate was 0.001, now 0.002; seed was 0, now 7"):
        distill(copy.deepcopy(tiny), recipe, data=images, out=out, resume=True)
    with pytest.raises(InputError, match="another model"):
        distill(random_model(seed=1), SMALL, data=images, out=out, resume=True)
    for label in range(10):
        (tmp_path / "less" / str(label)).mkdir(parents=True)
        (tmp_path / "less" / str(label) / "0.png").write_bytes((images / str(label) / "0.png").read_bytes())
    with pytest.raises(InputError, match="another data"):
        distill(copy.deepcopy(tiny), SMALL, data=tmp_path / "less", out=out, resume=True)
    distill(copy.deepcopy(tiny), SMALL, data=images, out=out, resume=True, note=str)


def test_a_resumed_run_may_use_the_machine_in_another_way(undisturbed, tiny, images, tmp_path):
    """As the advice of a run that ran out of memory is; it learns the same but for rounding."""
    out, other = tmp_path / "out", changed(accumulation=2, activation_checkpointing=True, checkpoint_every=4)
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, progress=interrupt_at(10))
    inexact = changed(dtype="bfloat16", accumulation=2)
    with pytest.raises(InputError, match=r"another recipe: dtype was float32, now bfloat16: use that one"):
        distill(copy.deepcopy(tiny), inexact, data=images, out=out, resume=True, note=str)
    distill(copy.deepcopy(tiny), other, data=images, out=out, resume=True, note=str)
    assert load_elastic(out).provenance.recipe == other.to_dict()
    for one, two in zip(losses(undisturbed), losses(out), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    before, notes = weights(out), []
    distill(copy.deepcopy(tiny), SMALL, data=images, out=out, resume=True, note=notes.append)
    assert "finished already" in notes[0]
    assert weights(out) == before


def test_a_killed_save_leaves_nothing_after_the_run_is_continued(undisturbed, tiny, images, tmp_path):
    """The files are those of this version and of earlier ones; tests/test_files.py kills real writers."""
    out = tmp_path / "out"
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, progress=interrupt_at(4))
    work = out / ".training"
    (work / "run.json.tmp").write_bytes(b"half")
    shutil.copytree(work / "step-3", work / "step-4.tmp")
    (work / "step-4.tmp" / ".metadata").unlink()
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, resume=True, note=str, progress=interrupt_at(4))
    assert sorted(path.name for path in work.iterdir()) == IN_WORK
    distill(copy.deepcopy(tiny), SMALL, data=images, out=out, resume=True, note=str)
    assert weights(out) == weights(undisturbed)


def test_resume_with_nothing_there_starts_afresh(undisturbed, tiny, images, tmp_path):
    notes = []
    distill(copy.deepcopy(tiny), SMALL, data=images, out=tmp_path / "new", resume=True, note=notes.append)
    assert notes == ["nothing to resume there: starting from the first step"]
    assert weights(tmp_path / "new") == weights(undisturbed)


def test_a_run_without_a_saved_step_may_start_anew(undisturbed, tiny, images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), changed(seed=5), data=images, out=out, progress=interrupt_at(2))
    tokens = out / ".training" / "tokens" / "tokens.npy"
    encoded = tokens.stat().st_mtime_ns
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), changed(seed=6), data=images, out=out, progress=interrupt_at(2))
    assert tokens.stat().st_mtime_ns == encoded  # the tokens fit, so they are kept
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), changed(views=1), data=images, out=out, progress=interrupt_at(2))
    assert tokens.stat().st_mtime_ns != encoded
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"holds something else already \(thesis.tex\)"):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out)
    (out / "thesis.tex").unlink()
    distill(copy.deepcopy(tiny), SMALL, data=images, out=out)
    assert weights(out) == weights(undisturbed)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"recipe": 3}', "\x00"])
def test_a_state_without_what_it_was_started_with_is_refused_in_one_line(tiny, images, tmp_path, content):
    out = tmp_path / "out"
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, progress=interrupt_at(3))
    run = out / ".training" / "run.json"
    run.unlink() if content is None else run.write_text(content)
    with pytest.raises(InputError, match=r"run.json: missing or damaged, so the run cannot go on") as caught:
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, resume=True, note=str)
    assert "\n" not in str(caught.value)


def test_a_finished_run_stays_as_it_is(undisturbed, tiny, images):
    before, notes = weights(undisturbed), []
    with pytest.raises(InputError, match="holds a finished checkpoint"):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=undisturbed)
    model = distill(copy.deepcopy(tiny), SMALL, data=images, out=undisturbed, resume=True, note=notes.append)
    assert "finished already" in notes[0]
    assert weights_digest(model) == weights_digest(load_elastic(undisturbed))
    with pytest.raises(InputError, match="another recipe: seed was 0, now 3"):
        distill(copy.deepcopy(tiny), changed(seed=3), data=images, out=undisturbed, resume=True, note=str)
    assert weights(undisturbed) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_with_something_else_is_refused(tiny, images, tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds something else"):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=tmp_path, resume=resume)
    with pytest.raises(InputError, match="is a file"):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=tmp_path / "thesis.tex", resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@contextlib.contextmanager
def files_no_larger_than(size_bytes):
    """The kernel refuses to write beyond this size: the nearest to a full disk that needs no disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_state_that_cannot_be_written_leaves_the_earlier_one(undisturbed, tiny, images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, progress=interrupt_at(4))
    state = out / ".training" / "step-3"
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    largest = max(map(len, before.values()))
    with files_no_larger_than(largest // 2), pytest.raises(InputError, match="could not be written"):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, resume=True, note=str)
    assert {path.name: path.read_bytes() for path in state.iterdir()} == before
    assert sorted(path.name for path in state.parent.iterdir()) == IN_WORK
    distill(copy.deepcopy(tiny), SMALL, data=images, out=out, resume=True, note=str)
    assert weights(out) == weights(undisturbed)
