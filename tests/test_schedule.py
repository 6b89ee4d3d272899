"""Schedules: text and back, narrowing, refusals, and METHOD's arithmetic."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from varcompress.cost import decoder_flops
from varcompress.errors import InputError
from varcompress.models.autoencoder import TokenizerConfig
from varcompress.schedule import Schedule, equidistant, is_subnet

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
MIB = 2**20
D30 = {"width": 1920, "vocab": 4096}
TOKENIZER = TokenizerConfig(160, (1, 1, 2, 2, 4), 2, 32, 4096, 4, 3, PATCH_NUMS)


OWN = {4: (0, 4, 17, 28), 2: (0, 17)}


def parse(text: str, *, depth=30, patch_nums=PATCH_NUMS, bridge=6, **own) -> Schedule:
    return Schedule.parse(text, depth=depth, patch_nums=patch_nums, bridge=bridge, **own)


@st.composite
def run_lists(draw):
    """(depth of the model, patch_nums, [(depth, scales), ...] from large to small)."""
    depth = draw(st.integers(2, 40))
    widths = sorted(draw(st.lists(st.integers(2, depth), min_size=1, max_size=5)), reverse=True)
    runs = [(width, draw(st.integers(1, 3))) for width in widths]
    sides = draw(st.lists(st.integers(1, 5), min_size=sum(n for _, n in runs), max_size=sum(n for _, n in runs)))
    return depth, tuple(sides), runs


def parse_runs(case) -> Schedule:
    depth, patch_nums, runs = case
    return parse(",".join(f"{d}x{n}" for d, n in runs), depth=depth, patch_nums=patch_nums, bridge=1)


@given(run_lists(), st.integers(0, 3))
def test_text_and_back(case, bridge):
    depth, patch_nums, _ = case
    schedule = parse_runs(case)
    assert parse(str(schedule), depth=depth, patch_nums=patch_nums, bridge=bridge) == schedule


@given(run_lists())
def test_layers_only_shrink_and_keep_the_ends(case):
    depth, _, runs = case
    schedule = parse_runs(case)
    assert [len(layers) for layers in schedule.layers] == [d for d, n in runs for _ in range(n)]
    for before, after in zip(schedule.layers, schedule.layers[1:], strict=False):
        assert set(after) <= set(before)
    for layers in schedule.layers:
        assert layers[0] == 0
        assert layers[-1] == depth - 1


@given(run_lists())
def test_segments_and_costs_agree_with_counting(case):
    depth, patch_nums, _ = case
    schedule = parse_runs(case)
    assert [k for s in schedule.segments for k in s.scales] == list(range(len(patch_nums)))
    seen = [0] * depth
    for side, layers in zip(patch_nums, schedule.layers, strict=True):
        for layer in layers:
            seen[layer] += side * side
    assert list(schedule.layer_tokens) == seen  # layers leave for good, so what they saw is a prefix
    weights = schedule.weights(width=64)
    assert weights == tuple(12 * 64 * 64 * len(layers) for layers in schedule.layers)
    full = parse("full", depth=depth, patch_nums=patch_nums)
    assert schedule.peak_rows <= full.peak_rows == depth * sum(p * p for p in patch_nums)
    assert schedule.flops(width=64, vocab=40, guided=True) <= full.flops(width=64, vocab=40, guided=True)


@given(st.integers(2, 40), st.data())
def test_equidistant_is_the_formula(layers, data):
    depth = data.draw(st.integers(2, layers))
    assert equidistant(range(layers), depth) == tuple(i * (layers - 1) // (depth - 1) for i in range(depth))


# -- METHOD's figures -----------------------------------------------------------------------------


def test_subnets_of_thirty():
    assert equidistant(range(30), 16) == (0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29)
    assert equidistant(range(30), 8) == (0, 4, 8, 12, 16, 20, 24, 29)
    assert equidistant(range(30), 4) == (0, 9, 19, 29)
    assert equidistant(range(30), 2) == (0, 29)


def test_a_list_of_depths_narrows_though_the_subnets_are_not_nested():
    assert not set(equidistant(range(30), 8)) <= set(equidistant(range(30), 16))
    schedule = parse("30x6,16x2,8x2")
    assert schedule.layers[7] == equidistant(range(30), 16)
    assert schedule.layers[9] == equidistant(schedule.layers[7], 8)
    assert len(schedule.layers[9]) == 8


def test_forms_of_the_same_schedule():
    assert parse("d8") == parse("d8@6") == parse("30x6,8x4") == parse(" D8@6 ")
    assert parse("d8", bridge=3) == parse("d8@3")
    assert parse("full") == parse("d30") == parse("d16@10") == parse("30x4,30x6")
    assert str(parse("d8")) == "d8@6"
    assert str(parse("16x10")) == "d16@0"
    assert str(parse("30x6,16x2,8x2")) == "30x6,16x2,8x2"


def test_a_models_own_subnet_is_what_its_depth_alone_means():
    assert parse("d2", subnets=OWN) == parse("d2@6,0+17") == parse("30x6,0+17x4")
    assert parse("d4", subnets=OWN, bridge=3).layers[3:] == (OWN[4],) * 7
    assert parse("d8", subnets=OWN) == parse("d8")


@pytest.mark.parametrize("text", ["d2@6", "30x6,2x4", "30x6,4x2,2x2", "2x10", "d2@6,0+17", "full"])
def test_every_other_form_means_the_same_for_every_model(text):
    assert parse(text, subnets=OWN) == parse(text)


def test_a_table_shows_the_depth_of_a_models_own_subnet():
    assert [str(parse(f"d{depth}", subnets=OWN)) for depth in (8, 4, 2)] == ["d8@6", "d4@6,0+4+17+28", "d2@6,0+17"]


@pytest.mark.parametrize(
    ("layers", "fits"),
    [
        ((0, 4, 29), True),
        ([5], True),
        ((), False),
        ((4, 0), False),
        ((0, 0), False),
        ((0, 30), False),
        ((-1, 0), False),
        ((0, 4.0), False),
        ((False, 4), False),
        ("04", False),
        (([0], [4]), False),
    ],
)
def test_subnets_of_thirty_layers(layers, fits):
    assert is_subnet(layers, 30) is fits


def test_tokens():
    schedule = parse("d8")
    assert (schedule.ends[5], schedule.ends[-1]) == (91, 680)
    assert schedule.layer_tokens[1] == 91
    assert schedule.layer_tokens[4] == 680
    assert parse("full", depth=36, patch_nums=PATCH_NUMS_512).ends[-1] == 2240


@pytest.mark.parametrize(
    ("text", "mebibytes"), [("full", 19125), ("d16", 10200), ("d8", 5100), ("d4", 2559.375), ("d2", 2559.375)]
)
def test_cache_of_d30_at_batch_64(text, mebibytes):
    assert parse(text).cache_bytes(batch=64, token_bytes=1920 * 2, guided=True) / MIB == mebibytes


def test_work_of_one_guided_image():
    assert parse("full").flops(**D30, guided=True) / 1e9 == pytest.approx(3763, abs=0.5)
    assert decoder_flops(TOKENIZER) / 1e9 == pytest.approx(394, abs=0.5)


@pytest.mark.parametrize(
    ("text", "alone", "with_decoder"), [("d16", 1.68, 1.58), ("d8", 2.74, 2.35), ("d4", 4.0, 3.1), ("d2", 5.2, 3.7)]
)
def test_ceilings(text, alone, with_decoder):
    full, subnet = (parse(each).flops(**D30, guided=True) for each in ("full", text))
    decoder = decoder_flops(TOKENIZER)
    assert full / subnet == pytest.approx(alone, abs=0.05)
    assert (full + decoder) / (subnet + decoder) == pytest.approx(with_decoder, abs=0.05)


@pytest.mark.parametrize(("text", "alone"), [("full", 2), ("d16", 3.4), ("d8", 5.5), ("d2", 10.4)])
def test_ceilings_of_unguided_schedules_beside_a_guided_full(text, alone):
    full, subnet = parse("full").flops(**D30, guided=True), parse(text).flops(**D30, guided=False)
    assert full / subnet == pytest.approx(alone, abs=0.05)


@given(run_lists())
def test_an_unguided_image_costs_half_but_for_the_head_of_the_first_scale(case):
    schedule, first = parse_runs(case), 2 * case[1][0] ** 2 * 64 * 40
    shape = {"width": 64, "vocab": 40}
    assert schedule.flops(**shape, guided=True) == 2 * schedule.flops(**shape, guided=False) - first
    cache = {"batch": 3, "token_bytes": 10}
    assert schedule.cache_bytes(**cache, guided=True) == 2 * schedule.cache_bytes(**cache, guided=False)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "schedule '' is not understood: write full, d8, d8@6, 30x6,8x4, or layers by"),
        ("d", "'d' is not understood"),
        ("8", "'8' is not understood"),
        ("30x6;8x4", "is not understood"),
        ("d-8", "is not understood"),
        ("d40", "schedule 'd40': 40 layers, but this model has 30"),
        ("d8@11", "schedule 'd8@11': a bridge of 11 scales, but this model has 10"),
        ("d1", "a subnet has at least 2 layers"),
        ("30x6,0x4", "a subnet has at least 2 layers"),
        ("30x6,8x3", "schedule '30x6,8x3': 9 scales, but this model has 10"),
        ("30x10,8x0", "10 scales"),
        ("31x6,8x4", "31 layers, but this model has 30"),
        ("8x6,16x4", "widens to 16 layers at scale 7: layer 1 was skipped before and has no cache"),
        ("30x2,8x4,9x4", "widens to 9 layers at scale 7: layer 1 "),
        ("30x6,0+30x4", "schedule '30x6,0+30x4' names layers 30: this model has layers 0 to 29, in order"),
        ("30x6,9-4x4", "names layers 9-4: this model has layers 0 to 29, in order"),
        ("30x6,4+4x4", "scale 7: layers must be ascending"),
        ("30x6,0+29x2,3+29x2", "layer 3 comes back at scale 9"),
        ("30x6,0+x4", "is not understood"),
        (f"d{'9' * 5000}", "is not understood"),
        ("d3@6,0+17", "schedule 'd3@6,0+17' names 2 layers: write d2, or name 3"),
        ("d2@6,0+30", "schedule 'd2@6,0+30' names layers 30: this model has layers 0 to 29, in order"),
        ("d2@6,17+0", "scale 7: layers must be ascending"),
        ("d2@11,0+17", "a bridge of 11 scales"),
        ("d2,0+17", "is not understood"),
        ("d2@6,17", "is not understood"),
    ],
)
def test_refused_texts(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse(text)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (((0, 1, 2), (0, 2), (0, 1, 2)), "layer 1 comes back at scale 3"),
        (((0, 2), (0, 1)), "a schedule of 2 scales: this model has 3"),
        (((0, 1, 2), (0, 2), ()), "scale 3: layers must be ascending and at least one"),
        (((0, 2, 1), (0,), (0,)), "scale 1: layers must be ascending"),
        (((0, 1, 1), (0,), (0,)), "scale 1: layers must be ascending"),
        (((0, 1, 3), (0,), (0,)), "scale 1 names layer 3: this model has layers 0 to 2"),
        (((-1, 0), (0,), (0,)), "scale 1"),
    ],
)
def test_refused_layers(layers, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Schedule(3, (1, 2, 3), layers)


@given(run_lists(), st.data())
def test_widening_is_refused_by_name(case, data):
    """Whichever layer comes back at whichever scale, the message names both."""
    depth, patch_nums, _ = case
    schedule = parse_runs(case)
    gone = [(k, i) for k, layers in enumerate(schedule.layers) if k for i in set(range(depth)) - set(layers)]
    gone = [(k, i) for k, i in gone if i not in schedule.layers[k - 1]]
    if not gone:
        return
    scale, layer = data.draw(st.sampled_from(gone))
    layers = list(schedule.layers)
    layers[scale] = tuple(sorted({*layers[scale], layer}))
    with pytest.raises(InputError, match=f"layer {layer} comes back at scale {scale + 1}:"):
        Schedule(depth, patch_nums, tuple(layers))


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (((0, 1, 2, 3), (0, 3)), "d2@1"),
        (((0, 1, 2, 3), (1, 2)), "d2@1,1+2"),
        (((0, 1, 2, 3), (2,)), "d1@1,2-2"),
        (((0, 2, 3), (0, 2, 3)), "d3@0,0+2+3"),
        (((1, 2, 3), (1, 3)), "1-3x1,2x1"),
        (((1, 2, 3), (1, 2)), "1-3x1,1+2x1"),
    ],
)
def test_hand_picked_layers_are_not_printed_as_the_equidistant_subnet(layers, text):
    assert str(Schedule(4, (1, 2), layers)) == text


@st.composite
def any_schedules(draw):
    """Layers of any choice that only shrink from scale to scale."""
    depth = draw(st.integers(1, 12))
    patch_nums = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
    layers, in_use = [], list(range(depth))
    for _ in patch_nums:
        if draw(st.booleans()):
            in_use = sorted(draw(st.sets(st.sampled_from(in_use), min_size=1)))
        layers.append(tuple(in_use))
    return Schedule(depth, patch_nums, tuple(layers))


@st.composite
def schedules_and_models(draw):
    """Any schedule, and what a model that it fits has of its own: a bridge, and subnets of the schedule's depths."""
    schedule = draw(any_schedules())
    shape = {"depth": schedule.depth, "patch_nums": schedule.patch_nums}
    bridge = draw(st.integers(0, len(schedule.layers)))
    if draw(st.booleans()):  # the equidistant subnet after some bridge, which others would seldom be
        count = draw(st.integers(min(2, schedule.depth), schedule.depth))
        schedule = Schedule.after_bridge(equidistant(range(schedule.depth), count), **shape, bridge=bridge)
    counts = {len(layers) for layers in schedule.layers}
    layers = st.permutations(range(schedule.depth))
    subnets = {count: tuple(sorted(draw(layers)[:count])) for count in counts}
    return schedule, {**shape, "bridge": bridge, "subnets": subnets}


@given(schedules_and_models())
def test_every_schedule_has_one_text_that_reads_back_on_every_model_and_names_a_file(case):
    schedule, model = case
    text = str(schedule)
    assert parse(text, **model) == schedule
    assert re.fullmatch(r"[a-z0-9@,+-]+", text)


@given(schedules_and_models())
def test_own_subnets_run_after_the_own_bridge_and_show_their_depth(case):
    _, model = case
    for count, layers in model["subnets"].items():
        schedule = parse(f"d{count}", **model)
        whole = tuple(range(model["depth"]))
        bridge = model["bridge"]
        assert schedule.layers == (whole,) * bridge + (layers,) * (len(model["patch_nums"]) - bridge)
        assert str(schedule) == "full" or re.match(rf"d{count}@{bridge}(,|$)", str(schedule))
