"""The model card: its metadata as huggingface_hub reads it, and what it tells a person."""

from __future__ import annotations

import re

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.conftest import score_of
from varcompress.models.elastic import ElasticVAR, Provenance
from varcompress.publish import save
from varcompress.report.card import TASK, is_generated, model_card
from varcompress.results import SCHEMA
from varcompress.training.recipe import load_recipe

COST = {"latency_ms": 20.0, "images_per_second": 400.0, "peak_bytes": 3 * 2**20, "cache_bytes": 2**20}
PROFILE_ROW = {
    **COST,
    "latency_spread_ms": [19.0, 21.0],
    **{"transformer_ms": 12.0, "sampling_ms": 3.0, "decoder_ms": 5.0},
    **{"peak_bytes_predicted": 3 * 2**20, "cache_bytes_predicted": 2**20},
    **{"weight_bytes": 10**6, "weight_bytes_predicted": 10**6, "flops": 10**9, "flops_predicted": 10**9},
    **{"speedup": 1.0, "speedup_predicted": 1.0},
    **{"speedup_without_decoder": 1.0, "speedup_without_decoder_predicted": 1.0},
    **{"memory_ratio": 1.0, "cache_ratio": 1.0},
}
PROFILE = {
    "kind": "profile",
    "schema": SCHEMA,
    **{"model": "tiny", "device": "Some CPU", "dtype": "float32", "torch": "2.14.1", "batch_size": 8, "runs": 5},
    "schedules": [
        {"schedule": "full", **PROFILE_ROW},
        {"schedule": "d2@2", **PROFILE_ROW, "latency_ms": 8.0, "speedup": 2.5, "cache_bytes": 2**19},
    ],
}
SETTINGS = {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "seeds": [0], "images": 1000, "rounding": "round"}
EVAL = {
    "kind": "eval",
    "schema": SCHEMA,
    **{"model": "tiny", "device": "Some CPU", "dtype": "float32", "batch_size": 64},
    "reference": "/home/ann/VIRTUAL_imagenet256_labeled.npz",
    "protocol": "adm-imagenet256",
    "deviations": ["1,000 images instead of 50,000"],
    "reference_details": {"digest": "ab" * 32},
    "features": {"name": "inception", "printed": "inception-v3", "sha256": "cd" * 32},
    "torch_fidelity": "0.4.0",
    "settings": SETTINGS | {"inception_groups": "consecutive", "distances": "adm"},
    "notes": ["the reference holds statistics only: Frechet distances and IS are all that it gives"],
    "schedules": [
        {"schedule": "full", "scores": {"fd": score_of(12.3), "is": score_of(40.1)}, **COST},
        {"schedule": "d2@2", "scores": {"fd": score_of(15.6), "is": score_of(35.0, 1.25)}, **COST},
    ],
}
DIGITS = {
    **EVAL,
    "reference": "embedded digits",
    "features": {"name": "digits", "printed": "digits", "sha256": "cd" * 32},
    "notes": [],
    "schedules": [
        {"schedule": "full", "scores": {"fd": score_of(1.25), "is": score_of(8.0), "kd": score_of(0.0123)}, **COST}
    ],
}


@pytest.fixture(scope="module")
def distilled(tiny):
    recipe = {"depths": [4, 2], "learning_rate": 1e-4}
    provenance = Provenance("tiny", "FoundationVision/var", "mit", recipe)
    return ElasticVAR(tiny.var, tiny.tokenizer, bridge=2, depths=(4, 2), provenance=provenance)


def section(card: str, title: str) -> str:
    return re.search(rf"\n##+ {title}\n(.*?)(?=\n##+ |\Z)", card, re.DOTALL)[1]


def test_metadata(distilled):
    data = ModelCard(model_card(distilled, [PROFILE, EVAL], repo="ann/elastic")).data
    assert (data.license, data.base_model, data.library_name) == ("mit", "FoundationVision/var", "varcompress")
    assert (data.pipeline_tag, data.datasets, data.model_name) == (TASK, ["ILSVRC/imagenet-1k"], "elastic")
    assert "elastic-depth" in data.tags


def test_model_index_holds_the_measured_values_alone(distilled):
    data = ModelCard(model_card(distilled, [PROFILE, EVAL])).data
    values = {(score.metric_type, score.metric_args["schedule"]): score.metric_value for score in data.eval_results}
    assert values == {("fid", "full"): 12.3, ("is", "full"): 40.1, ("fid", "d2@2"): 15.6, ("is", "d2@2"): 35.0}
    score = data.eval_results[0]
    assert score.dataset_type == "ILSVRC/imagenet-1k"
    assert score.dataset_name == "ImageNet 256x256, ADM reference batch"
    assert score.metric_args["images"] == 1000


def test_folders_of_the_publisher_stay_private(distilled):
    card = model_card(distilled, [EVAL, {**EVAL, "reference": "/home/ann/my cats/"}])
    assert "/home/ann" not in card
    assert ModelCard(card).data.eval_results[-1].dataset_type == "my-cats"


def test_tables(distilled):
    card = model_card(distilled, [PROFILE, EVAL], plots={"profile.png": "Plot"})
    speed, quality = section(card, "Speed and memory"), section(card, "Image quality")
    assert "batch of 8 in float32 on Some CPU" in speed
    assert "| `d2@2` | 8.00 | 400 | 2.50 | 1.00 | 3.00 | 0.500 |" in speed
    assert "| schedule | FID | IS | latency, ms |" in quality
    assert "| `full` | 12.3 ± 1 | 40.1 ± 1 |" in quality
    assert "Protocol adm-imagenet256*, departing from it: 1,000 images instead of 50,000." in quality
    assert "statistics only" in quality
    assert f"reference `{'ab' * 8}`" in quality
    assert f"features' weights `{'cd' * 8}`, torch-fidelity 0.4.0." in quality
    assert "![Plot](profile.png)" in card


def test_scores_on_digits_are_never_called_fid(distilled):
    card = model_card(distilled, [DIGITS])
    assert not re.search(r"\bFID\b", card)
    assert not any(score.metric_type == "fid" for score in ModelCard(card).data.eval_results)
    assert "digits features" in section(card, "Image quality")


def test_nothing_measured(distilled):
    card = model_card(distilled)
    assert section(card, "Measured").strip() == "Not measured."
    data = ModelCard(card).data
    assert data.eval_results is None
    assert "model_name" not in data.to_dict()


def test_how_to_load_runs_as_it_stands(distilled, tmp_path):
    path = save(distilled, tmp_path / "model")
    code = re.search(r"```python\n(.*?)```", model_card(distilled, repo=str(path)), re.DOTALL)[1]
    names: dict = {}
    exec(code, names)
    assert names["images"].shape == (2, 3, 8, 8)


def test_schedules_and_their_layers(distilled):
    text = section(model_card(distilled), "Schedules")
    assert "| `full` | 6x4 | all | 100% | 100% |" in text
    assert "| `d2@2` | 6x2, 2x2 | 0, 5 |" in text


def test_a_models_own_subnets_are_in_its_card(tiny):
    model = ElasticVAR(tiny.var, tiny.tokenizer, bridge=2, depths=(3, 2), subnets={3: (0, 1, 4)})
    card = model_card(model)
    assert "| `d3@2,0+1+4` | 6x2, 3x2 | 0, 1, 4 |" in section(card, "Schedules")
    assert 'schedule="d3@2,0+1+4"' in section(card, "Use")


def test_a_card_of_distilled_guidance(tiny, distilled):
    model = ElasticVAR(tiny.var, tiny.tokenizer, bridge=2, depths=(4, 2), distilled_cfg=2.0)
    saved = {"speedup_predicted": 5.5, "speedup_without_decoder_predicted": 7.7, "cache_ratio": 0.2}
    rows = [row | {"beside_guided": saved} for row in PROFILE["schedules"]]
    unguided = PROFILE | {"guided": False, "schedules": rows}
    card = model_card(model, [unguided, EVAL | {"guided": False}])
    assert "layers. Guidance with cfg 2.0 is distilled into the weights: no image needs a second" in card
    assert "relative to a guided `full`" in section(card, "Schedules")
    assert "| `full` | 6x4 | all | 50% | 50% |" in section(card, "Schedules")
    assert "on Some CPU, unguided (torch" in section(card, "Speed and memory")
    assert "| 2.50 | 1.00 | 5.50 | 7.70 | 3.00 |" in section(card, "Speed and memory")
    assert "on Some CPU, unguided." in section(card, "Image quality")
    ordinary = model_card(distilled, [PROFILE, EVAL])
    assert "unguided" not in ordinary
    assert "relative to `full`; with `cfg=0`, which leaves" in section(ordinary, "Schedules")


def test_recipe_licence_and_citations(distilled, tiny):
    card = model_card(distilled)
    recipe = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1]
    assert yaml.safe_load(recipe) == distilled.provenance.recipe
    assert "2511.16546" in section(card, "Citation")
    assert "2404.02905" in section(card, "Citation")
    assert "Licence: mit. Base model: [FoundationVision/var]" in card
    untouched = model_card(tiny)
    assert "Licence: not stated" in untouched
    assert "Base model: the checkpoint `var`." in untouched
    assert "only `full` gives the quality" in untouched


def test_the_embedded_model_is_named_as_base(tiny):
    digits = ElasticVAR(tiny.var, tiny.tokenizer, depths=(4,), provenance=Provenance("digits", license="mit"))
    card = model_card(digits, repo="ann/mine")
    assert "made from `digits`, the model embedded in varcompress" in card
    assert "Base model: `digits`, the model embedded in varcompress" in section(card, "Licence and base model")
    assert ModelCard(card).data.base_model is None  # which would be a Hub id


def test_a_recipe_is_printed_without_what_it_does_not_read(tiny):
    drawn, phases = {"depth_probability", "epochs", "together"}, {"p_start", "p_end", "epochs_full"}
    for name, read, idle in (("digits", drawn, phases | {"teacher_top"}), ("variant-d30", phases, drawn)):
        model = ElasticVAR(tiny.var, tiny.tokenizer, bridge=2, depths=(4, 2))
        model.provenance = Provenance("tiny", recipe=load_recipe(name).to_dict())
        shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", model_card(model), re.DOTALL)[1])
        assert read <= shown.keys()
        assert not idle & shown.keys()
        assert ("teacher_dtype" in shown) == (name == "digits")


def test_how_to_install(distilled):
    assert "pip install ." in section(model_card(distilled), "Use")


def test_samples_are_shown(distilled):
    assert "![Samples](samples.png)" in model_card(distilled, samples="samples.png")
    assert "![" not in model_card(distilled)


def test_an_edit_shows(distilled):
    card = model_card(distilled, [PROFILE, EVAL], repo="ann/elastic")
    assert is_generated(card)
    assert is_generated(model_card(distilled))
    edits = (card + "mine", card.replace("# elastic", "# Elastic"), card.replace("license: mit", "license: cc"), "")
    assert not any(map(is_generated, edits))


def test_the_example_uses_a_schedule_the_weights_are_good_at(distilled, tiny):
    assert 'schedule="d4@2"' in section(model_card(distilled), "Use")
    assert 'schedule="full"' in section(model_card(tiny), "Use")


def test_a_card_says_where_the_figures_of_its_recipe_come_from(tiny):
    model = ElasticVAR(tiny.var, tiny.tokenizer, bridge=2, depths=(4, 2))
    model.provenance = Provenance("tiny", recipe=load_recipe("distil-d30").to_dict())
    text = section(model_card(model), "Recipe")
    assert "- published: `depths`, `bridge`, `layers`\n" in text
    assert "- found on the small model embedded in varcompress: `depth_probability`, `loss`" in text
    assert re.search("- a guess that nobody has run at this size: `epochs`, `learning_rate`, .*`dtype`\n", text)
    assert "origin" not in text
    assert "changed by hand" not in text
    model.provenance = Provenance("tiny", recipe=load_recipe("distil-d30", ["name=mine", "epochs=3"]).to_dict())
    text = section(model_card(model), "Recipe")
    assert "- a guess that nobody has run at this size: `learning_rate`, " in text
    assert "- changed by hand: `epochs`\n" in text
    assert "Where its figures come from" not in model_card(tiny)
