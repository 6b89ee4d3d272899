"""Calls without an unconditional half: with cfg 0, and in models whose guidance is distilled into their weights."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import placed, random_model
from tests.test_generation import SCHEDULES, logits_of
from tests.test_models import MODELS, random_tokens, schedules
from varcompress.checkpoint import load_elastic, save_elastic
from varcompress.cost import peak_bytes
from varcompress.drawing import draw_images
from varcompress.errors import InputError
from varcompress.fingerprint import fingerprint
from varcompress.memory import PeakMemory
from varcompress.models import generation
from varcompress.models.elastic import ElasticVAR
from varcompress.models.generation import Observer
from varcompress.models.linear import PackedLinear
from varcompress.models.transformer import add_cfg_input
from varcompress.sampling import DEFAULT, PUBLISHED, Sampling, checked_cfg

UNGUIDED = Sampling(cfg=0, seed=3)
RANGE = (1.0, 4.0)


def distilled_for(cfg, **shape) -> ElasticVAR:
    """A model whose guidance is distilled for a cfg, or for a range, of which it then knows where it is."""
    model = random_model(**shape)
    if isinstance(cfg, tuple):
        add_cfg_input(model.var)
        torch.nn.init.normal_(model.var.cfg_embed[2].weight, std=0.3)
    return ElasticVAR(model.var, model.tokenizer, bridge=2, depths=(4, 2), distilled_cfg=cfg)


# -- half of the rows -----------------------------------------------------------------------------


def with_both_halves(model, labels, schedule, sampling) -> torch.Tensor:
    """f_hat of a call that runs the unconditional half whatever its weight."""
    call = generation.Call(model.schedule(schedule), len(labels), sampling, model.runtime, guided=True)
    given = torch.tensor(labels), torch.tensor(sampling.seed), torch.arange(len(labels))
    with torch.inference_mode():
        blocks = model.var.blocks
        return generation.generate_tokens(
            call, model.var, model.tokenizer.quantize, lambda scale, layer: blocks[layer], *given
        )[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_images_without_guidance_did_not_depend_on_the_unconditional_half(tiny, schedule):
    labels = [1, 2, 3, 4, 5]
    f_hat = tiny.generate_tokens(labels, schedule, UNGUIDED)[1]
    torch.testing.assert_close(f_hat, with_both_halves(tiny, labels, schedule, UNGUIDED), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=20)
@given(data=st.data())
def test_unguided_generation_equals_the_teacher_forced_pass(name, data):
    model = MODELS[name]
    schedule, batch = data.draw(schedules(model)), data.draw(st.integers(1, 3))
    tokens, labels, collected = random_tokens(model, batch), list(range(batch)), []
    model.generate_tokens(labels, schedule, UNGUIDED, forced=tokens, logits_out=collected)
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat(collected, dim=1), model(labels, tokens, schedule), atol=2e-4, rtol=1e-4)


class Rows(Observer):
    """The cache's bytes, and the rows that enter each layer of `model`."""

    def __init__(self, model) -> None:
        self.cache_bytes, self.rows = 0, set()
        for part in (model.var.class_emb, model.var.word_embed):
            part.register_forward_hook(lambda part, given, out: self.rows.add(len(out)))

    def cache(self, held_bytes):
        self.cache_bytes = held_bytes


@pytest.mark.parametrize(("cfg", "sampling", "rows"), [(None, DEFAULT, 6), (None, UNGUIDED, 3), (2.0, DEFAULT, 3)])
def test_the_unconditional_half_is_run_where_it_counts_alone(cfg, sampling, rows):
    model = distilled_for(cfg)
    seen = Rows(model)
    model.generate([1, 2, 3], "d2@1", sampling, observer=seen)
    size = 2 * rows * model.schedule("d2@1").peak_rows * model.var.config.width * 4
    assert seen.cache_bytes == size == model.schedule("d2@1").cache_bytes(batch=3, token_bytes=32 * 4, guided=rows > 3)
    assert seen.rows == {rows, 3}  # the input of later scales is embedded once, and doubled then


@pytest.mark.parametrize("way", [{}, {"cache_dtype": "int8"}, {"kernels": "torch"}])
@pytest.mark.parametrize("sampling", [DEFAULT, UNGUIDED])
def test_peaks_are_near_their_prediction(way, sampling):
    model = placed(random_model(width=64, patch_nums=(1, 2, 4, 6), vocab=64), **way)
    for schedule in map(model.schedule, ("full", "d2@2")):
        with PeakMemory(model, schedule) as peak:
            model.generate([1] * 17, schedule, sampling)
        predicted = peak_bytes(model, schedule, 17, guided=model.guided(sampling))
        # float32 logits from which nothing is subtracted are not copied, which arithmetic passes over
        assert peak.bytes - peak.held_bytes == pytest.approx(predicted - peak.held_bytes, rel=1 / 10)


# -- the cfg that a model was distilled for -------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "own"), [(None, 1.5), (2.0, 2.0), (0, 0.0), ((1.0, 4.0), 1.5), ((2.0, 4.0), 2.0), ((0.0, 1.0), 1.0)]
)
def test_a_cfg_that_nobody_names_is_the_models(cfg, own):
    model = distilled_for(cfg)
    assert model.sampling().cfg == model.sampling(model.sampling()).cfg == own
    assert model.sampling(Sampling(cfg=own, top_k=3)) == Sampling(cfg=own, top_k=3)
    assert model.guided() == (cfg is None)
    assert torch.equal(model.generate([1], seed=2), model.generate([1], cfg=own, seed=2))


@pytest.mark.parametrize(
    ("cfg", "asked", "message"),
    [
        (2.0, 1.5, r"cfg 1\.5: the guidance of this model is distilled for cfg 2\.0: leave cfg \(--cfg\) out"),
        (2.0, 0, r"cfg 0\.0: .* for cfg 2\.0"),
        (RANGE, 0.5, r"cfg 0\.5: .* for cfg 1\.0 to 4\.0: choose one of these"),
        (RANGE, 4.5, r"cfg 4\.5: .* for cfg 1\.0 to 4\.0"),
    ],
)
def test_another_cfg_is_refused(cfg, asked, message):
    model = distilled_for(cfg)
    for call in (model.generate, model.generate_tokens, lambda *a, **k: draw_images(model, *a, **k)):
        with pytest.raises(InputError, match=message):
            call([1], sampling=Sampling(cfg=asked))


def test_the_published_settings_are_those_of_an_ordinary_model(tiny):
    assert tiny.sampling() == PUBLISHED
    assert (DEFAULT.cfg, PUBLISHED.cfg) == (None, 1.5)


def test_a_range_is_ascending_and_finite():
    assert (checked_cfg(None), checked_cfg(2), checked_cfg([1, 4])) == (None, 2.0, (1.0, 4.0))
    for wrong in ("1.5", float("nan"), [1], [1, 2, 3], [2, 1], [1, 1], [1, float("inf")], 1001, {}):
        with pytest.raises(InputError, match="distilled_cfg must be a number from -1000 to 1000, or two of these"):
            checked_cfg(wrong)


# -- a model that is given its cfg ----------------------------------------------------------------


@pytest.mark.parametrize("shared_aln", [False, True])
def test_the_input_changes_nothing_until_it_is_trained(shared_aln):
    model, tokens = random_model(shared_aln=shared_aln), random_tokens(random_model(), 2)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        add_cfg_input(each.var)
    assert fingerprint(model) == fingerprint(twin)  # the new weights are the same in every process
    with torch.no_grad():
        expected = random_model(shared_aln=shared_aln)([1, 2], tokens, "d2@2")
        assert torch.equal(model([1, 2], tokens, "d2@2", cfg=torch.tensor([1.0, 9.0])), expected)


def test_the_new_weights_are_where_and_as_the_others():
    model = random_model().cast(torch.bfloat16)
    add_cfg_input(model.var)
    assert {parameter.dtype for parameter in model.var.cfg_embed.parameters()} == {torch.bfloat16}
    model([1], random_tokens(model, 1), cfg=2.0).sum().backward()
    assert model.var.cfg_embed[2].weight.grad.abs().sum() > 0


@settings(max_examples=20)
@given(data=st.data(), cfg=st.floats(*RANGE))
def test_generation_and_the_teacher_forced_pass_read_the_same_cfg(data, cfg):
    model = distilled_for(RANGE)
    schedule, tokens, collected = data.draw(schedules(model)), random_tokens(model, 2), []
    model.generate_tokens([1, 2], schedule, Sampling(cfg=cfg), forced=tokens, logits_out=collected)
    with torch.inference_mode():
        logits = model([1, 2], tokens, schedule, cfg=cfg)
        torch.testing.assert_close(torch.cat(collected, dim=1), logits, atol=2e-4, rtol=1e-4)
        both = model([1, 2], tokens, schedule, cfg=torch.tensor([1.0, cfg]))
        torch.testing.assert_close(both[1], logits[1], atol=2e-4, rtol=1e-4)
        own = model([1, 2], tokens, schedule)
        torch.testing.assert_close(own, model([1, 2], tokens, schedule, cfg=1.5))


def test_the_cfg_changes_the_images():
    model = distilled_for(RANGE)
    assert not torch.equal(model.generate([1], cfg=1), model.generate([1], cfg=4))


def test_a_cfg_that_is_none_is_refused(tiny):
    model, tokens = distilled_for(RANGE), random_tokens(tiny, 2)
    wrong = {0.5: r"from 1\.0 to 4\.0", "x": "a number, or one for", torch.ones(3): "each of 2 images"}
    for cfg, message in wrong.items():
        with pytest.raises(InputError, match=message):
            model([1, 2], tokens, cfg=cfg)
    with pytest.raises(InputError, match="cfg is no input of this model"):
        tiny([1, 2], tokens, cfg=1.5)


@pytest.mark.parametrize("way", [{"kernels": "torch"}, {"offload": "bridge"}])
def test_every_way_to_run_takes_the_cfg(way):
    model, tokens = distilled_for(RANGE), random_tokens(random_model(), 2)
    expected = logits_of(model, tokens, [1, 2], "d2@2")
    assert not isinstance(model.var.cfg_embed[2], PackedLinear)
    before = fingerprint(model)
    torch.testing.assert_close(logits_of(placed(model, **way), tokens, [1, 2], "d2@2"), expected, atol=1e-4, rtol=1e-4)
    assert fingerprint(model) == before


def test_half_precision_is_a_cast():
    model, tokens = distilled_for(RANGE), random_tokens(random_model(), 2)
    before, exact = fingerprint(model), logits_of(model, tokens, [1, 2], "d2@2")
    model.cast(torch.bfloat16)
    assert fingerprint(model) == before
    assert (logits_of(model, tokens, [1, 2], "d2@2") - exact).norm() / exact.norm() < 0.05


# -- on the disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [None, 2.0, RANGE])
def test_it_lies_in_the_checkpoint(cfg, tmp_path):
    model = distilled_for(cfg)
    again = load_elastic(save_elastic(model, tmp_path / "model"))
    assert (again.distilled_cfg, again.var.config) == (cfg, model.var.config)
    assert again.var.config.cfg_input == (cfg is RANGE)
    assert fingerprint(again) == fingerprint(model)
    assert torch.equal(again.generate([1, 2], "d2", seed=5), model.generate([1, 2], "d2", seed=5))


def rewrite(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_checkpoints_from_before_are_ordinary(tiny, tmp_path):
    folder = save_elastic(tiny, tmp_path / "model")
    rewrite(folder, lambda config: (config.pop("distilled_cfg"), config["var"].pop("cfg_input")))
    assert load_elastic(folder).distilled_cfg is None


@pytest.mark.parametrize(
    ("cfg", "written", "message"),
    [
        (None, "strong", "distilled_cfg must be a number from -1000 to 1000, or two of these, the smaller first"),
        (None, [4, 1], r"distilled_cfg must be .*, not \[4, 1\]: save or download it again"),
        (None, [1, 4], r"distilled_cfg \[1, 4\] of a model that takes no cfg as an input"),
        (RANGE, None, "distilled_cfg None of a model that takes the cfg as an input"),
        (RANGE, 2, "distilled_cfg 2 of a model that takes the cfg as an input"),
    ],
)
def test_what_does_not_fit_is_refused(cfg, written, message, tmp_path):
    folder = save_elastic(distilled_for(cfg), tmp_path / "model")
    rewrite(folder, lambda config: config.update(distilled_cfg=written))
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        load_elastic(folder)
