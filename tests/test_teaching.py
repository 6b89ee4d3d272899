"""Runs with a teacher: several depths a step, what a state must hold to go on from, images held out, stored answers."""

from __future__ import annotations

import copy
import json
import math
import re

import numpy as np
import pytest
import torch

from tests.conftest import random_model
from tests.test_training import (  # noqa: F401  (fixtures are found by their names)
    Interrupt,
    images,
    interrupt_at,
    losses,
    weights,
)
from varcompress.checkpoint import load_elastic
from varcompress.errors import InputError
from varcompress.fingerprint import weights_digest
from varcompress.sampling import Sampling
from varcompress.training import distill
from varcompress.training.log import summary
from varcompress.training.optimizer import learning_rate_at, optimizer_of
from varcompress.training.recipe import FULL, Recipe
from varcompress.training.strategy import plan

pytestmark = pytest.mark.usefixtures("one_thread")
TAUGHT = Recipe(
    name="taught",
    depths=(4, 2),
    bridge=2,
    depth_probability={"full": 0.3, "4": 0.6, "2": 1},
    epochs=4,
    loss={"kl": 1.0},
    teacher="frozen",
    learning_rate=2e-3,
    learning_rate_end=0.02,
    learning_rate_decay="cosine",
    warmup_steps=2,
    batch_size=8,
    dtype="float32",
    checkpoint_every=3,
    views=2,
    holdout=0.2,
    holdout_every=4,
)
STEPS = 16


def changed(**values) -> Recipe:
    return Recipe.from_dict({**TAUGHT.to_dict(), **values})


@pytest.fixture(scope="module")
def undisturbed(tiny, images, tmp_path_factory):  # noqa: F811
    """A run of TAUGHT from the first step to the last."""
    out = tmp_path_factory.mktemp("runs") / "taught"
    distill(copy.deepcopy(tiny), TAUGHT, data=images, out=out)
    return out


# -- which depths run -----------------------------------------------------------------------------


def test_each_depth_is_drawn_with_its_own_probability_whatever_the_others_do():
    recipe = changed(epochs=400, depth_probability={"full": 0.25, "4": 0.6, "2": 1})
    steps = plan(recipe, 10)
    ran = {depth: np.array([depth in step.depths for step in steps]) for depth in (FULL, 4, 2)}
    for depth, probability in ((FULL, 0.25), (4, 0.6), (2, 1)):
        assert np.mean(ran[depth]) == pytest.approx(probability, abs=0.03)
    assert np.mean(ran[FULL] & ran[4]) == pytest.approx(0.25 * 0.6, abs=0.03)
    more = plan(changed(epochs=400, depths=[5, 4, 2], depth_probability={"full": 0.25, "5": 0.9, "4": 0.6, "2": 1}), 10)
    assert [4 in step.depths for step in more] == list(ran[4])


def test_a_step_never_trains_nothing():
    steps = plan(changed(epochs=100, depths=[2], depth_probability={"full": 0.05, "2": 0.1}), 10)
    assert all(len(step.depths) >= 1 for step in steps)
    alone = [step.depths for step in steps if len(step.depths) == 1]
    assert set(alone) == {(FULL,), (2,)}
    assert alone.count((2,)) > alone.count((FULL,))


def test_the_learning_rate_falls_as_a_cosine():
    rates = [learning_rate_at(step, 100, changed(warmup_steps=0)) / 2e-3 for step in (1, 50, 100)]
    assert rates == pytest.approx([1, 0.51, 0.02], abs=1e-3)
    assert learning_rate_at(3, 100, changed(warmup_steps=10)) == pytest.approx(0.3 * 2e-3, rel=0.01)


# -- the log --------------------------------------------------------------------------------------


def test_a_line_says_which_depths_ran_and_what_each_scale_lost(undisturbed, tiny):
    steps, expected = losses(undisturbed), plan(TAUGHT, 4)
    assert len(steps) == STEPS
    shares = [p * p / 30 for p in (1, 2, 3, 4)]
    for line, step in zip(steps, expected, strict=True):
        names = ["full" if depth == FULL else f"d{depth}@2" for depth in step.depths]
        assert list(line["losses"]) == list(line["kl"]) == list(line["cross_entropy"]) == names
        assert "phase" not in line
        assert line["loss"] == pytest.approx(np.mean(list(line["losses"].values())), rel=1e-5)
        for name in names:
            assert line["losses"][name] == pytest.approx(np.dot(line["kl"][name], shares), rel=1e-4)
        early = {tuple(per_scale[:2]) for per_scale in line["kl"].values()}
        assert len(early) == 1  # the depths of a step share the bridge


def test_held_out_images_are_measured_under_every_depth(undisturbed, tiny, images, tmp_path):  # noqa: F811
    steps = losses(undisturbed)
    assert [line["step"] for line in steps if "heldout" in line] == [4, 8, 12, 16]
    first, last = steps[3]["heldout"], steps[-1]["heldout"]
    assert set(last["losses"]) == {"full", "d4@2", "d2@2"}
    assert last["losses"]["d2@2"] < first["losses"]["d2@2"]
    assert summary(undisturbed)["heldout"] == last
    # the figure is of the images alone: what the steps learn from in another order changes nothing of the first one
    distill(copy.deepcopy(tiny), changed(epochs=1, learning_rate=1e-12), data=images, out=tmp_path / "a")
    distill(
        copy.deepcopy(tiny), changed(epochs=1, learning_rate=1e-12, accumulation=2), data=images, out=tmp_path / "b"
    )
    a, b = (losses(tmp_path / name)[-1]["heldout"]["losses"] for name in "ab")
    assert a == pytest.approx(b, rel=1e-5)
    assert a["full"] == pytest.approx(0, abs=1e-6)  # the untouched network is its teacher


def test_the_progress_line_tells_how_the_run_goes(tiny, images, tmp_path):  # noqa: F811
    said = []
    distill(
        copy.deepcopy(tiny),
        TAUGHT,
        data=images,
        out=tmp_path / "out",
        progress=lambda done, total, what: said.append(what),
    )
    last = [what for what in said if what.startswith("distill")][-1]
    number, losses = r"\d\.\d{3}", lambda depths: ", ".join(rf"{depth} \d\.\d{{3}}" for depth in depths)
    trained = rf"loss (?:(?:full|d4|d2) {number}(?:, )?)+"
    assert re.fullmatch(
        rf"distill: {trained}, held out {losses(('full', 'd4', 'd2'))}, [\d.e+]+ images/s, \d+% waiting, [\d.]+ GB",
        last,
    ), last


# -- what is learned ------------------------------------------------------------------------------


def test_a_taught_subnet_comes_nearer_to_its_teacher(undisturbed):
    heldout = [line["heldout"]["losses"] for line in losses(undisturbed) if "heldout" in line]
    assert heldout[-1]["d2@2"] < 0.9 * heldout[0]["d2@2"]
    assert all(math.isfinite(value) for line in heldout for value in line.values())


def test_muon_moves_the_matrices_of_the_layers_and_adamw_the_rest(tiny):
    model = copy.deepcopy(tiny)
    optimizer = optimizer_of(model.var, changed(optimizer="muon"))
    before = {name: parameter.detach().clone() for name, parameter in model.var.named_parameters()}
    model(torch.tensor([1, 2]), torch.zeros(2, 30, dtype=torch.int64)).square().mean().backward()
    optimizer.step(1e-3)
    for name, parameter in model.var.named_parameters():
        muon = name.startswith("blocks.") and "ada_lin" not in name and parameter.ndim == 2
        assert set(optimizer.state(parameter)) == ({"momentum_buffer"} if muon else {"step", "exp_avg", "exp_avg_sq"})
        assert parameter.grad is None
        assert not torch.equal(parameter, before[name])


def test_one_after_another_learns_the_same(undisturbed, tiny, images, tmp_path):  # noqa: F811
    distill(copy.deepcopy(tiny), changed(together=False), data=images, out=tmp_path / "out")
    for one, other in zip(losses(undisturbed), losses(tmp_path / "out"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_stored_answers_teach_nearly_as_live_ones(undisturbed, tiny, images, tmp_path):  # noqa: F811
    whole = changed(teacher_logits="stored", teacher_top=40)
    distill(copy.deepcopy(tiny), whole, data=images, out=tmp_path / "whole")
    for live, stored in zip(losses(undisturbed), losses(tmp_path / "whole"), strict=True):
        assert stored["loss"] == pytest.approx(live["loss"], rel=0.01)
    few, tokens = changed(teacher_logits="stored", teacher_top=4), tmp_path / "tokens"
    for name in ("few", "again"):  # the second one finds what the first has computed
        said = []
        distill(
            copy.deepcopy(tiny), few, data=images, out=tmp_path / name, tokens=tokens,
            progress=lambda done, total, what, said=said: said.append(what.split(":")[0]),
        )  # fmt: skip
        assert ("teacher" in said) == (name == "few")
    assert weights(tmp_path / "few") == weights(tmp_path / "again")
    assert losses(tmp_path / "few")[0]["loss"] < losses(undisturbed)[0]["loss"]  # a lower bound
    other = random_model(seed=1)
    other.tokenizer.load_state_dict(tiny.tokenizer.state_dict())
    with pytest.raises(InputError, match="teacher: holds what a teacher said under another teacher: delete it"):
        distill(other, few, data=images, out=tmp_path / "other", tokens=tokens)


def test_answers_of_a_run_that_came_to_no_step_may_be_others(tiny, images, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    for top in (4, 8):
        recipe = changed(teacher_logits="stored", teacher_top=top)
        with pytest.raises(Interrupt):
            distill(copy.deepcopy(tiny), recipe, data=images, out=out, progress=interrupt_at(2))
        assert json.loads((out / ".training/tokens/teacher/teacher.json").read_text())["top"] == top


# -- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"teacher_logits": "stored", "teacher_top": 8}, {"optimizer": "muon"}])
@pytest.mark.parametrize("step", [2, 7, 16])
def test_resuming_with_a_teacher_reaches_the_same_weights(tiny, images, tmp_path, step, change):  # noqa: F811
    recipe = changed(**change)
    distill(copy.deepcopy(tiny), recipe, data=images, out=tmp_path / "undisturbed")
    out = tmp_path / "out"
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), recipe, data=images, out=out, progress=interrupt_at(step))
    distill(copy.deepcopy(tiny), recipe, data=images, out=out, resume=True, note=str)
    assert weights(out) == weights(tmp_path / "undisturbed")
    assert losses(out) == losses(tmp_path / "undisturbed")


def test_a_run_knows_its_teacher_and_refuses_another(tiny, images, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), TAUGHT, data=images, out=out, progress=interrupt_at(4))
    run = out / ".training" / "run.json"
    started = json.loads(run.read_text())
    assert started["teacher"] == weights_digest(tiny.var)
    run.write_text(json.dumps({**started, "teacher": "0" * 64}))
    with pytest.raises(InputError, match="was started with another teacher"):
        distill(copy.deepcopy(tiny), TAUGHT, data=images, out=out, resume=True)
    run.write_text(json.dumps(started))
    with pytest.raises(InputError, match="was started with another model"):
        distill(random_model(seed=1), TAUGHT, data=images, out=out, resume=True)


# -- other layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [((0, 1, 3, 5), (0, 5)), "sensitivity"])
def test_a_run_trains_the_layers_that_its_recipe_chooses(tiny, images, tmp_path, layers):  # noqa: F811
    recipe, out = changed(layers=layers, epochs=2), tmp_path / "out"
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), recipe, data=images, out=out, progress=interrupt_at(4))
    chosen = {int(depth): tuple(of) for depth, of in json.loads((out / ".training/subnets.json").read_text()).items()}
    model = distill(copy.deepcopy(tiny), recipe, data=images, out=out, resume=True, note=str)
    assert model.subnets == chosen == load_elastic(out).subnets
    assert set(chosen) == {4, 2}
    if layers != "sensitivity":
        assert chosen == {4: (0, 1, 3, 5), 2: (0, 5)}
    assert model.schedule("d4").layers[-1] == chosen[4]
    assert str(model.schedule("d4")) in losses(out)[-1]["heldout"]["losses"]
    plain = distill(model, changed(epochs=1), data=images, out=tmp_path / "plain")
    assert plain.subnets == {}  # a model that is distilled again keeps nothing of the earlier recipe


@pytest.mark.parametrize("layers", [((0, 1, 3, 4), (0, 5)), ((1, 2, 3, 5), (0, 5)), ((0, 1, 2, 6), (0, 6))])
def test_layers_without_the_first_or_last_are_refused(tiny, images, tmp_path, layers):  # noqa: F811
    with pytest.raises(
        InputError, match="each list of layers must hold the first and the last layer of the model, 0 and 5"
    ):
        distill(copy.deepcopy(tiny), changed(layers=layers), data=images, out=tmp_path / "out")


# -- guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [2.0, (0.5, 3.0)])
def test_guidance_is_distilled_so_that_no_second_pass_is_needed(tiny, images, tmp_path, cfg):  # noqa: F811
    recipe, out = changed(guidance="none", cfg=cfg, label_drop=0.0, epochs=3, layers="sensitivity"), tmp_path / "out"
    distill(copy.deepcopy(tiny), recipe, data=images, out=tmp_path / "undisturbed")
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), recipe, data=images, out=out, progress=interrupt_at(7))
    distill(copy.deepcopy(tiny), recipe, data=images, out=out, resume=True, note=str)
    assert weights(out) == weights(tmp_path / "undisturbed")
    model = load_elastic(out)
    assert model.distilled_cfg == cfg
    assert not model.guided(model.sampling(Sampling()))
    assert model.generate([1, 2], "d2").shape == (2, 3, 8, 8)
    heldout = [line["heldout"]["losses"]["full"] for line in losses(out) if "heldout" in line]
    assert heldout[-1] < heldout[0]
    with pytest.raises(InputError, match="guidance is distilled into it already"):
        distill(model, TAUGHT, data=images, out=tmp_path / "again")


def test_a_range_of_guidance_reaches_the_model(tiny, images, tmp_path):  # noqa: F811
    recipe = changed(guidance="none", cfg=(0.0, 6.0), label_drop=0.0, epochs=6, learning_rate=5e-3)
    model = distill(copy.deepcopy(tiny), recipe, data=images, out=tmp_path / "out")
    with torch.no_grad():
        tokens = torch.zeros(1, 30, dtype=torch.int64)
        weak, strong = (model([1], tokens, cfg=torch.tensor([cfg])).log_softmax(-1) for cfg in (0.0, 6.0))
    assert (weak - strong).abs().mean() > 0.01


def test_answers_under_guidance_can_be_stored(tiny, images, tmp_path):  # noqa: F811
    live = changed(guidance="none", cfg=2.0, label_drop=0.0, epochs=1)
    stored = changed(**{**live.to_dict(), "teacher_logits": "stored", "teacher_top": 40})
    for name, recipe in (("live", live), ("stored", stored)):
        distill(copy.deepcopy(tiny), recipe, data=images, out=tmp_path / name)
    for one, other in zip(losses(tmp_path / "live"), losses(tmp_path / "stored"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.01)
    ranged = {**stored.to_dict(), "cfg": [1.0, 3.0]}
    with pytest.raises(InputError, match="under a range of cfg cannot be stored"):
        Recipe.from_dict(ranged)
