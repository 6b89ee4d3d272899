"""Where depth hurts: schedules with gaps, the losses of single images, and the search under a budget."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import random_model
from tests.test_models import random_tokens
from tests.test_training import images as images
from varcompress import InputError, search, sensitivity
from varcompress.cost import predict
from varcompress.data.selection import Selection
from varcompress.data.sources import open_source
from varcompress.data.tokens import holdout_order
from varcompress.depth.losses import ImageLosses, interval, mean_and_error, read_tokens
from varcompress.depth.scoring import scores_of
from varcompress.depth.search import (
    MOST_CANDIDATES,
    candidates,
    check_candidates,
    costs,
    fits,
    halves,
    least_squares,
    nested,
    prediction,
)
from varcompress.depth.sensitivity import schedules_by_scale, without_layer
from varcompress.loading import load
from varcompress.models.runtime import Runtime
from varcompress.models.transformer import modulate
from varcompress.progress import silent
from varcompress.publish import record
from varcompress.results import LayerRow, SearchResult, SensitivityResult, SensitivityRow
from varcompress.schedule import Gapped, Schedule, Together, equidistant

MODEL = random_model()  # 6 layers, scales 1 2 3 4
FULL = MODEL.schedule("full")
LAYERS = st.sets(st.integers(0, 5), min_size=1).map(lambda layers: tuple(sorted(layers)))
GAPPED = st.tuples(*[LAYERS] * 4).map(lambda layers: Gapped(6, (1, 2, 3, 4), layers))
PLACES = {depth: equidistant(range(6), depth) for depth in (4, 3, 2)}


# -- schedules with gaps ------------------------------------------------------------------------


def scale_by_scale(model, labels, tokens, layers):
    """Logits (B, L, V) with a list of keys and values for each layer: no mask, one scale after another."""
    var, kept, found = model.var, {}, []
    condition = var.condition(labels)
    shared = var.shared_modulation(condition)
    inputs = torch.cat((var.first_input(condition), var.word_embed(model.tokenizer.teacher_input(tokens))), dim=1)
    for x, names in zip((inputs + var.positions()).split([p * p for p in FULL.patch_nums], dim=1), layers, strict=True):
        for layer in names:
            block = var.blocks[layer]
            gamma1, gamma2, scale1, scale2, shift1, shift2 = block.modulation(condition, shared)
            q, k, v = block.attn.project(modulate(x, scale1, shift1))
            kept.setdefault(layer, []).append((k, v))
            k, v = (torch.cat(parts, dim=2) for parts in zip(*kept[layer], strict=True))
            out = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + block.attn.proj(out) * gamma1
            x = x + block.ffn(modulate(x, scale2, shift2)) * gamma2
        found.append(var.head(modulate(x, *var.head_nm.modulation(condition))))
    return torch.cat(found, dim=1)


@settings(max_examples=25)
@given(schedule=GAPPED)
def test_a_layer_that_comes_back_sees_the_scales_that_it_ran_at(schedule):
    labels, tokens = torch.tensor([1, 2]), random_tokens(MODEL, 2)
    with torch.no_grad():
        expected = scale_by_scale(MODEL, labels, tokens, schedule.layers)
        torch.testing.assert_close(MODEL.forward(labels, tokens, schedule), expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=15)
@given(schedule=GAPPED, guided=st.booleans())
def test_generation_with_gaps_computes_what_the_pass_does(schedule, guided):
    labels, tokens, found = torch.tensor([1, 2]), random_tokens(MODEL, 2), []
    sampling = MODEL.sampling().__class__(cfg=1.5 if guided else 0.0)
    MODEL.generate_tokens(labels, schedule, sampling, forced=tokens, logits_out=found)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(found, 1), MODEL.forward(labels, tokens, schedule), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["full", "d4@2", "d3@0", "6x1,4x2,2x1"])
def test_a_schedule_without_gaps_is_the_same_either_way(text):
    schedule = MODEL.schedule(text)
    gapped = Gapped(schedule.depth, schedule.patch_nums, schedule.layers)
    labels, tokens, stored = torch.tensor([1, 2]), random_tokens(MODEL, 2), []
    with torch.no_grad():
        one, other = (MODEL.forward(labels, tokens, s) for s in (schedule, gapped))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert predict(MODEL, gapped)["flops"] == predict(MODEL, schedule)["flops"]
    for one in (schedule, gapped):  # with a cache in eight bits too
        stored.append([])
        runtime = Runtime(MODEL.device, MODEL.dtype, cache_dtype="int8")
        MODEL.generate_tokens(labels, one, runtime=runtime, forced=tokens, logits_out=stored[-1])
    torch.testing.assert_close(torch.cat(stored[0], 1), torch.cat(stored[1], 1), atol=1e-4, rtol=1e-4)


@given(schedule=GAPPED)
def test_a_layer_keeps_the_tokens_that_it_ran(schedule):
    held = [sum(p * p for p, some in zip((1, 2, 3, 4), schedule.layers, strict=True) if i in some) for i in range(6)]
    assert [schedule.held(layer, 30) for layer in range(6)] == held
    assert schedule.peak_rows == sum(held)
    assert predict(MODEL, schedule)["flops"] <= predict(MODEL, FULL)["flops"]


def test_only_a_scale():
    schedule = Gapped.only(1, (0, 5), FULL)
    assert schedule.layers == (FULL.layers[0], (0, 5), FULL.layers[0], FULL.layers[0])
    assert str(schedule) == "6x1,2x1,6x2"
    with pytest.raises(InputError, match="comes back at scale 3"):
        Schedule(6, FULL.patch_nums, schedule.layers)
    with pytest.raises(InputError, match="layer 6"):
        Gapped.only(1, (0, 6), FULL)
    with pytest.raises(InputError, match="runs alone"):
        Together((FULL, schedule))


# -- sensitivity --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(images):
    return sensitivity(MODEL, images, depths=[3, 2], num_images=24, batch_size=7, note=silent)


def cross_entropy(samples, schedule):
    """Of each image at each scale, (N, K)."""
    with torch.no_grad():
        logits = MODEL.forward(samples.labels, samples.tokens, schedule)
    losses = F.cross_entropy(logits.transpose(1, 2), samples.tokens, reduction="none")
    return torch.stack([part.mean(1) for part in losses.split([1, 4, 9, 16], dim=1)], dim=1).numpy()


def test_losses_from_a_scale_on_are_those_of_the_schedule(measured, images):
    samples = read_tokens(MODEL, images, 24, progress=silent, note=silent)[1]
    full = cross_entropy(samples, FULL)
    assert measured["full"]["loss"] == pytest.approx(full.mean(), rel=1e-5)
    assert measured["full"]["increase"] == measured["full"]["increase_error"] == 0
    assert len(measured["from"]) == 2 * 4
    for row in measured["from"]:
        losses = cross_entropy(samples, MODEL.schedule(f"d{row['depth']}@{row['scale'] - 1}"))
        more = (losses - full).mean(1)
        assert row["loss_per_scale"] == pytest.approx(losses.mean(0), rel=1e-5)
        assert row["loss_error"] == pytest.approx(losses.mean(1).std(ddof=1) / math.sqrt(24), rel=1e-4)
        assert row["increase"] == pytest.approx(more.mean(), abs=1e-5)
        assert row["increase_error"] == pytest.approx(more.std(ddof=1) / math.sqrt(24), rel=1e-3, abs=1e-6)


def test_only_one_scale_leaves_the_scales_before_it_alone(measured):
    for row in measured["only"]:
        before, after = np.split(row["increase_per_scale"], [row["scale"] - 1])
        assert np.abs(before).max(initial=0) < 1e-5 < np.abs(after).min()
    assert measured["only"][3] == measured["from"][3]  # at the last scale they are one


def test_a_sensitivity_has_its_fields(measured, tmp_path):
    assert set(measured) == set(SensitivityResult.__annotations__)
    row = {name for name in (*SensitivityRow.__annotations__,) if name != "score"}
    assert set(measured["only"][0]) == set(measured["from"][0]) == row
    assert set(measured["layers"][0]) == set(LayerRow.__annotations__)
    assert [row["layer"] for row in measured["layers"]] == list(range(6))
    written = record(measured, tmp_path)
    assert [path.name for path in written] == ["sensitivity.json", "sensitivity.png"]
    assert json.loads(written[0].read_text()) == measured


def test_a_layer_is_left_out():
    found = without_layer(FULL, 2, 1)
    assert found["everywhere"].layers == ((0, 1, 3, 4, 5),) * 4
    assert found["after_bridge"].layers == (FULL.layers[0], *((0, 1, 3, 4, 5),) * 3)


def test_a_selection_is_what_training_holds_out(images):
    source = open_source(images, MODEL)
    some = Selection.held_out(source, 7)
    assert list(some.indices) == sorted(holdout_order(40)[:7])
    assert [some.item(i) for i in range(7)] == [source.item(int(i)) for i in some.indices]
    assert np.array_equal(some.read(3, 8, 1), source.read(int(some.indices[3]), 8, 1))
    assert some.digest != Selection.held_out(source, 8).digest != source.digest


def test_the_source_and_its_store_give_the_same_tokens(images, tmp_path):
    from varcompress import tokenize

    tokenize(MODEL, images, tmp_path / "store", note=silent)
    one, other = (read_tokens(MODEL, data, 9, progress=silent, note=silent)[1] for data in (images, tmp_path / "store"))
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.labels, other.labels)


# -- search -------------------------------------------------------------------------------------


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limits=st.dictionaries(st.sampled_from(("flops", "cache")), st.floats(0.45, 1), min_size=1),
    depths=st.sets(st.integers(2, 5), min_size=1, max_size=3),
)
def test_what_is_found_is_within_the_budget_and_no_worse_than_equidistant(images, limits, depths):
    budget, cost_of = [f"{name}={limit}" for name, limit in limits.items()], costs(MODEL, None)
    every = candidates(FULL, {depth: equidistant(range(6), depth) for depth in depths})
    if not any(fits(cost_of(schedule), limits) for schedule in every):
        with pytest.raises(InputError, match="no schedule is that cheap; the least is"):
            search(MODEL, budget, images, depths=sorted(depths), num_images=8, note=silent)
        return
    found = search(MODEL, budget, images, depths=sorted(depths), num_images=8, note=silent)
    for row in (found["found"], found["equidistant"], *found["finalists"], *found["others"]):
        cost = predict(MODEL, MODEL.schedule(row["schedule"]))
        full = predict(MODEL, FULL)
        real = {"flops": cost["flops"] / full["flops"], "cache": cost["cache_bytes"] / full["cache_bytes"]}
        assert row["costs"] == pytest.approx(real)
        assert all(real[name] <= limit for name, limit in limits.items())
    per_scale = [len(layers) for layers in MODEL.schedule(found["found"]["schedule"]).layers]
    assert per_scale == sorted(per_scale, reverse=True)
    assert set(per_scale) <= depths | {6}
    assert found["found"]["loss"] <= found["equidistant"]["loss"] == min(row["loss"] for row in found["others"])
    best = min(row["predicted"] for row in found["finalists"])
    assert best <= min(row["predicted"] for row in found["others"])
    for row in found["others"]:  # of a bridge and one depth the prediction is exact
        assert row["predicted"] == pytest.approx(row["loss"], rel=1e-5)


@given(per_scale=st.lists(st.sampled_from((6, 4, 3, 2)), min_size=4, max_size=4).map(lambda d: sorted(d, reverse=True)))
def test_layers_of_a_candidate_stay_in_use(per_scale):
    schedule = nested(FULL, per_scale, PLACES)  # which raises where a layer comes back
    assert [len(layers) for layers in schedule.layers] == per_scale
    assert schedule in candidates(FULL, PLACES)
    assert MODEL.schedule(str(schedule)) == schedule


def test_a_prediction_takes_each_scale_from_the_start_of_its_segment():
    table = {(depth, k): np.array([1, 2, 3, 4]) + 10 * depth + 100 * k for depth in (6, 4, 2) for k in range(4)}
    schedule = nested(FULL, (6, 4, 4, 2), PLACES)
    assert prediction(schedule, table) == np.mean([61, 142, 143, 324])


def test_candidates_are_all_ways_to_fall():
    assert len(set(candidates(FULL, PLACES))) == math.comb(4 + 4 - 1, 4)
    check_candidates(8, 10)
    with pytest.raises(InputError, match=f"9 depths at 10 scales are {math.comb(18, 10):,} schedules"):
        check_candidates(9, 10)
    assert math.comb(18, 10) > MOST_CANDIDATES


def test_a_search_by_latency_and_layers(images, tmp_path):
    budget = ["latency=0.95", "cache=0.9"]
    found = search(MODEL, budget, images, depths=[4, 2], choose_layers=True, num_images=8, timed_batch=2, note=silent)
    assert set(found) == set(SearchResult.__annotations__)
    assert set(found["budget"]) == {"latency", "cache"}
    assert found["latency"]["worst_error"] >= 0
    assert found["latency"]["batch_size"] == 2
    assert found["found"]["latency_ms"] > 0
    assert found["candidates"] > math.comb(4 + 3 - 1, 4)  # of two families of subnets
    assert record(found, tmp_path)[1].name == "search.png"
    mean, (low, high) = found["difference"]["value"], found["difference"]["interval"]
    assert low <= mean <= high
    difference = found["found"]["loss_apart"] - found["equidistant"]["loss_apart"]
    assert mean == pytest.approx(difference, abs=1e-6)


def test_with_a_reference_the_score_decides_and_is_taken_again(monkeypatch):
    calls = []

    def scored(*arguments, **options):
        found = scores_of(*arguments, **options)
        calls.append((options.get("seed", 0), {text: score["value"] for text, score in found["scores"].items()}))
        return found

    monkeypatch.setattr(sys.modules["varcompress.depth.search"], "scores_of", scored)  # the name is a function too
    found = search(
        load("digits"), "flops=0.5", reference="digits", num_images=16, finalists=3, scored_images=40, note=silent
    )
    (first_seed, first), (second_seed, second) = calls
    assert first_seed != second_seed
    equidistant = {row["schedule"] for row in found["others"]} & first.keys()
    assert found["equidistant"]["schedule"] == min(equidistant, key=first.get)
    within = equidistant | {row["schedule"] for row in found["finalists"]}
    assert found["found"]["schedule"] == min(within, key=first.get)
    for name in ("equidistant", "found", "full"):
        assert found[name]["score"]["value"] == second[found[name]["schedule"]]
    assert "difference_interval" in found["full"]["score"]


def test_images_apart_are_others(images):
    samples = read_tokens(MODEL, images, 21, progress=silent, note=silent)[1]
    one, other = halves(samples)
    assert sorted((*one.rows, *other.rows)) == sorted(samples.rows)
    assert (len(one.rows), len(other.rows)) == (11, 10)


@given(weights=st.tuples(*[st.floats(0, 5)] * 3))
def test_least_squares_finds_weights_that_are_not_below_nothing(weights):
    terms = np.array([[1, 10, 1e9], [1, 20, 3e9], [1, 40, 2e9], [1, 30, 9e9]])
    weights = np.array(weights) * [1, 1, 1e-9]
    assert terms @ least_squares(terms, terms @ weights) == pytest.approx(terms @ weights, abs=1e-6)
    assert (least_squares(terms, -terms[:, 1]) >= 0).all()


def test_a_loss_that_is_no_number_is_said(images):
    model = random_model()
    samples = read_tokens(model, images, 4, progress=silent, note=silent)[1]
    with torch.no_grad():
        model.var.head.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="the loss under full is not a number"):
        ImageLosses(model, samples, 4, progress=silent)(model.schedule("full"))


def test_every_schedule_by_scale_has_the_depth_where_it_says():
    only, onwards = schedules_by_scale(FULL, PLACES)
    for (depth, k), schedule in only.items():
        assert [len(layers) for layers in schedule.layers] == [depth if j == k else 6 for j in range(4)]
        assert [len(layers) for layers in onwards[depth, k].layers] == [depth if j >= k else 6 for j in range(4)]


# -- on a model that was trained ------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load("digits", device="cpu")


def test_depth_at_an_early_scale_costs_more_for_what_it_saves(digits):
    full = digits.schedule("full")
    layers = digits.schedule("d8").layers[-1]
    samples = read_tokens(digits, None, 32, progress=silent, note=silent)[1]
    losses = ImageLosses(digits, samples, 32, progress=silent)
    only, _ = schedules_by_scale(full, {8: layers})

    def price(scale):  # of each image, in nats for each FLOP saved
        saved = predict(digits, full)["flops"] - predict(digits, only[8, scale - 1])["flops"]
        return (losses.of_image(only[8, scale - 1]) - losses.of_image(full)) / saved

    low, _ = interval(*mean_and_error(price(2) - price(4)))
    assert low > 0


def test_what_is_found_on_a_trained_model_is_as_good_as_equidistant_on_other_images(digits):
    found = search(digits, "flops=0.4", note=silent)
    assert found["found"]["costs"]["flops"] <= 0.4
    assert found["found"]["schedule"] != found["equidistant"]["schedule"]
    assert found["difference"]["interval"][1] <= 0


# -- the commands -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["search", "--budget", "speed=0.5"], "budget 'speed=0.5': there are latency, cache, flops"),
        (["search", "--budget", "flops"], "budget 'flops': give a share of what full costs"),
        (["search", "--budget", "cache=1.5"], "budget 'cache=1.5': give a share of what full costs"),
        (["search", "--budget", "flops=nan"], "budget 'flops=nan': give a share"),
        (["search", "--budget", "flops=0.01"], "no schedule is that cheap; the least is flops="),
        (["search"], "'--budget'"),
        (["search", "--budget", "flops=0.9", "--data", "nowhere"], "nowhere"),
        (["search", "--budget", "flops=0.9", "--depth", "7"], "depth 7: a subnet of 6 layers has 2 to 6"),
        (["sensitivity", "--data", "digits"], "10 classes in 16 pixels, but the model has 10 in 8"),
        (["sensitivity"], "needs images"),
        (["sensitivity", "--depth", "1"], "depth 1: a subnet of 6 layers has 2 to 6"),
        (["sensitivity", "--images", "1"], "'--images'"),
        (["sensitivity", "--scored-images", "20"], "--scored-images needs a --reference"),
        (["search", "--budget", "flops=0.9", "--scored-images", "20"], "--scored-images needs a --reference"),
        (["search", "--budget", "flops=0.9", "--timed-batch", "4"], "--timed-batch is for a latency budget"),
        (
            ["sensitivity", "--reference", "digits"],
            "reference digits: a name for the images of the embedded model alone",
        ),
        (["search", "--budget", "flops=0.9", "--reference", "digits"], "give a folder of images or an .npz"),
    ],
)
def test_a_call_that_cannot_work_is_one_line(run, elastic, arguments, told):
    command, *options = arguments
    outcome = run(command, elastic, *options)
    assert outcome.exit_code == 2
    assert told in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.count("error:") == 1
    assert not outcome.stdout


def test_the_commands_print_and_write(run, elastic, images, tmp_path):
    outcome = run("sensitivity", elastic, "--data", images, "--images", 8, "--out", tmp_path, "--json")
    assert outcome.exit_code == 0, outcome.stderr
    assert json.loads(outcome.stdout) == json.loads((tmp_path / "sensitivity.json").read_text())
    assert json.loads(outcome.stdout)["depths"] == [4, 2]  # those of the model
    told = json.loads(outcome.stdout)
    assert told["command"].startswith("varcompress")
    assert told["seconds"] > 0
    outcome = run("search", elastic, "--data", images, "--images", 8, "--budget", "flops=0.9", "--out", tmp_path)
    assert outcome.exit_code == 0, outcome.stderr
    assert "Found: " in outcome.stdout
    told = json.loads((tmp_path / "search.json").read_text())
    assert told["command"].startswith("varcompress")
    assert told["seconds"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{k}.{e}" for k in ("search", "sensitivity") for e in ("json", "png")
    }
    outcome = run("sensitivity", elastic, "--data", images, "--images", 8)
    assert "Depth at only one scale" in outcome.stdout
