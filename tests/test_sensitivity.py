"""Choosing the layers of subnets: backward elimination, and the loss that it goes by."""

from __future__ import annotations

import pytest
import torch

import varcompress
from tests.conftest import random_model
from varcompress.data.digits import load_digits
from varcompress.errors import InputError
from varcompress.schedule import Schedule
from varcompress.training.sensitivity import IMAGES_AT_A_TIME, eliminate, late_kl

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


@pytest.fixture(scope="module")
def images():
    """Labels, the null class among them, and tokens of more images than are run at a time."""
    generator = torch.Generator().manual_seed(0)
    count = IMAGES_AT_A_TIME + 3
    return torch.arange(count) % 11, torch.randint(40, (count, 30), generator=generator)


def test_kl_is_that_of_the_distributions(tiny, images):
    labels, tokens = images
    schedule = tiny.schedule("d3@2")
    with torch.no_grad():
        teacher_input = tiny.tokenizer.teacher_input(tokens)
        p, q = (tiny.var(labels, teacher_input, s).double().softmax(-1) for s in (tiny.schedule("full"), schedule))
    expected = (p * (p / q).log()).sum(-1).mean().item()
    loss_of = late_kl(tiny, labels, tokens)
    assert loss_of(schedule) == pytest.approx(expected, rel=1e-4)
    assert loss_of(schedule) > 0.1
    assert loss_of(tiny.schedule("full")) == pytest.approx(0, abs=1e-6)


def test_choosing_twice_gives_the_same_and_leaves_no_trace(images):
    def chosen(model) -> dict:
        return eliminate(late_kl(model, *images), model.schedule("full"), 2, (4, 2))

    model, other = random_model(), random_model()
    other.generate([0], "d2")  # whose weights are packed by then
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subnets = chosen(model)
    assert subnets == chosen(model) == chosen(other)
    assert set(subnets[2]) < set(subnets[4])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_last_layer_of_the_embedded_model_goes_before_the_first():
    """From 30 layers to 28, by a few images: the ends, which an equidistant subnet always has, are not equal."""
    model = varcompress.load("digits")
    pixels, labels = load_digits()
    loss_of = late_kl(model, labels[:4], model.encode(pixels[:4]))
    removed = {layer: loss_of(model.schedule(text)) for layer, text in ((0, "d29@2,1-29"), (29, "d29@2,0-28"))}
    assert removed[29] < removed[0]
