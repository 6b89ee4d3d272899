"""Choosing the layers of subnets: backward elimination, and the loss that it goes by."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.conftest import random_model
from varcompress.data.tokens import Samples
from varcompress.errors import InputError
from varcompress.schedule import Schedule
from varcompress.training.objective import Objective
from varcompress.training.recipe import Recipe
from varcompress.training.sensitivity import eliminate, losses_of
from varcompress.training.teacher import Teacher

FULL = Schedule.parse("full", depth=6, patch_nums=(1, 2, 3, 4), bridge=2)
WORTH = (5.0, 1.0, 4.0, 1.0, 7.0, 3.0)  # what a layer contributes, if it runs at the last scale


def lost(schedule: Schedule) -> float:
    return sum(WORTH) - sum(WORTH[layer] for layer in schedule.layers[-1])


def test_the_layer_that_is_missed_least_goes_first():
    subnets = eliminate(lost, FULL, 2, (5, 3, 1))
    assert subnets == {5: (0, 2, 3, 4, 5), 3: (0, 2, 4), 1: (4,)}  # of layers 1 and 3, worth the same, 1 went first
    assert list(subnets) == [5, 3, 1]


def test_each_layer_is_judged_by_what_is_left():
    """Layers 1 and 2 replace each other: either may go, not both."""

    def loss(schedule: Schedule) -> float:
        layers = schedule.layers[-1]
        return lost(schedule) + 100 * (1 not in layers and 2 not in layers)

    assert eliminate(loss, FULL, 2, (2,)) == {2: (2, 4)}


def test_layers_to_keep_stay():
    assert eliminate(lost, FULL, 2, (4, 2), keep=(0, 5)) == {4: (0, 2, 4, 5), 2: (0, 5)}
    assert eliminate(lost, FULL, 2, (2,), keep=(1,)) == {2: (1, 4)}


def test_every_schedule_that_is_tried_runs_all_layers_up_to_the_bridge():
    tried, told = [], []

    def loss(schedule: Schedule) -> float:
        tried.append(schedule)
        return lost(schedule)

    eliminate(loss, FULL, 1, (3,), progress=lambda *how_far: told.append(how_far[:2]))
    assert len(tried) == len(set(tried)) == 6 + 5 + 4
    assert Counter(len(schedule.layers[-1]) for schedule in tried) == losses_of(6, 3, 0)
    for schedule in tried:
        assert schedule.layers[0] == tuple(range(6))
        assert len(set(schedule.layers[1:])) == 1
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("depths", "keep"), [((6, 2), ()), ((0,), ()), ((2,), (0, 3, 5)), ((3,), (0, 6)), ((3,), (-1,))]
)
def test_depths_out_of_reach_are_refused(depths, keep):
    with pytest.raises(
        InputError, match="cannot be chosen from a model of 6: a subnet has fewer layers than the model"
    ):
        eliminate(lost, FULL, 2, depths, keep=keep)


def test_a_loss_that_is_no_number_chooses_nothing():
    with pytest.raises(InputError, match="the loss without layer 0 is not a number"):
        eliminate(lambda schedule: float("nan"), FULL, 2, (2,))


# -- the loss -------------------------------------------------------------------------------------

RECIPE = Recipe("small", (4, 2), 2, epochs_full=1, loss={"kl": 1.0}, teacher="frozen", dtype="float32")


def parts(model, count=19, size=8):
    """Images, the null class among them, in parts."""
    generator = torch.Generator().manual_seed(0)
    labels, tokens = torch.arange(count) % 11, torch.randint(40, (count, 30), generator=generator)
    return [Samples(*part, None, None) for part in zip(labels.split(size), tokens.split(size), strict=True)]


def loss_of(model, images):
    return Objective(model, RECIPE, Teacher(model.var, model.schedule("full"))).loss_of(images)


def test_the_loss_is_kl_of_the_distributions(tiny):
    images, schedule = parts(tiny), tiny.schedule("d3@2")
    labels, tokens = (torch.cat([part[i] for part in images]) for i in (0, 1))
    with torch.no_grad():
        teacher_input = tiny.tokenizer.teacher_input(tokens)
        p, q = (tiny.var(labels, teacher_input, s).double().softmax(-1) for s in (tiny.schedule("full"), schedule))
    expected = (p * (p / q).log()).sum(-1).mean().item()
    found = loss_of(tiny, images)
    assert found(schedule) == pytest.approx(expected, rel=1e-4)
    assert found(schedule) > 0.1
    assert found(tiny.schedule("full")) == pytest.approx(0, abs=1e-6)


def test_choosing_twice_gives_the_same_and_leaves_no_trace():
    model = random_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (eliminate(loss_of(model, parts(model)), model.schedule("full"), 2, (4, 2)) for _ in range(2))
    assert first == second
    assert set(first[2]) < set(first[4])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
