"""Tables fit and hold every figure; plots are readable PNGs."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from tests.conftest import random_model, score_of
from varcompress.cost import describe
from varcompress.errors import InputError
from varcompress.models.elastic import ElasticVAR, Provenance
from varcompress.models.transformer import add_cfg_input
from varcompress.profiling import profile
from varcompress.report.format import NOT_GIVEN, count, mebibytes, number, public
from varcompress.report.plots import plot_eval, plot_profile, plot_samples
from varcompress.report.tables import demo_table, eval_table, inspect_table, profile_table
from varcompress.sampling import Sampling
from varcompress.training.recipe import load_recipe

NAMES = ["full", "d16@6", "d8@6", "d4@6", "30x1,20x1,16x2,12x2,8x1,4x2,2x1", "30x6,16x2,8x2"]
OWN = "d16@6,0+1+3+5+7+9+11-13+15+17+19+21+23+25+28"  # layers that are not equidistant
KEYS = ("fd", "is", "kd", "precision", "recall")


def big_profile(names: list[str]) -> dict:
    """A result with the figures of a large model, to see that they have room."""
    row = {
        "latency_ms": 123456.0,
        "latency_spread_ms": [121212.0, 125252.0],
        "images_per_second": 0.518,
        "transformer_ms": 100000.0,
        "sampling_ms": 11111.0,
        "decoder_ms": 12345.0,
        "speedup": 1.0,
        "speedup_predicted": 1.0,
        "speedup_without_decoder": 1.0,
        "speedup_without_decoder_predicted": 1.0,
        "memory_ratio": 1.0,
        "cache_ratio": 1.0,
    }
    counts = {"peak_bytes": 41_171_000_000, "cache_bytes": 20_054_016_000, "weight_bytes": 26_542_000_000}
    for name, value in {**counts, "flops": 266_048_000_000_000}.items():
        row |= {name: value, f"{name}_predicted": int(0.99 * value)}
    where = {"model": "var_d30", "device": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "torch": "2.11.0"}
    return {
        "kind": "profile",
        **where,
        "batch_size": 64,
        "runs": 5,
        "schedules": [{"schedule": n, **row} for n in names],
    }


def scored(names: list[str], features: str) -> dict:
    rows = [
        {"schedule": name, "scores": dict.fromkeys(KEYS, score_of(1.234 + i, 0.5)), "latency_ms": 1000.0 / (i + 1)}
        | {"images_per_second": 64.0 * (i + 1), "peak_bytes": 10**9, "cache_bytes": 10**8}
        for i, name in enumerate(names)
    ]
    settings = {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "seeds": [0], "images": 50000, "rounding": "round"}
    where = {"model": "m", "device": "a processor, 2 threads", "dtype": "float32", "batch_size": 64}
    how = {"protocol": "quick", "deviations": [], "features": {"name": features, "printed": f"{features}-1"}}
    return {"kind": "eval", **where, **how, "reference": "r.npz", "settings": settings, "schedules": rows}


def text_of(renderable, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize(("names", "width"), [(NAMES[:4], 80), ([*NAMES, OWN], 100)])
def test_a_profile_of_a_large_model_fits(names, width):
    """No figure is cut or broken over two lines."""
    text = text_of(profile_table(big_profile(names)), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for figure in ("121,212-125,252", "266,048 (263,388)", "19,125 (18,934)", "39,264 (38,871)", "123,456", "0.518"):
        assert text.count(figure) >= len(names)
    for name in names:
        assert re.sub(r",.*", "", name) in text


def test_tables_of_a_real_profile(tiny):
    result = profile(tiny, ["d2@1"], batch_size=2, runs=2, warmup=0)
    text = text_of(profile_table(result), 100)
    assert result["device"] in text
    assert "batch of 2, median of 2 runs" in text
    assert text.count("d2@1") == 3
    assert f"{result['schedules'][1]['cache_ratio']:.0%}" in text


@pytest.mark.parametrize(("features", "name"), [("digits", "digits"), ("inception", "FID")])
def test_scores_carry_their_own_name(features, name):
    result = scored(NAMES, features)
    first = result["schedules"][0]
    first["scores"] = {key: found for key, found in first["scores"].items() if key != "kd"}
    text = text_of(eval_table(result), 80)
    assert name in text
    assert ("FID" in text) == (features == "inception")
    assert text.count("±") == len(KEYS) * len(NAMES) - 1
    assert text.count(NOT_GIVEN) == 1  # the score that was not given
    assert "…" not in text


def test_a_table_says_what_is_noise_and_what_departs_from_the_protocol():
    result = scored(NAMES[:3], "inception") | {"deviations": ["cfg 4.0 instead of 1.5"]}
    noise, gain = {"difference": 0.1, "difference_interval": [-0.1, 0.3]}, {"difference_interval": [0.1, 0.3]}
    for row, more in zip(result["schedules"], ({}, noise, gain), strict=True):
        row["scores"] = {"fd": score_of(2.0, 0.5, **more)}
    beside = result["schedules"][0] | {"model": "var-d24"}
    result["schedules"].append(beside)
    text = text_of(eval_table(result), 100)
    lines = {line.split()[0]: line for line in text.splitlines() if "±" in line}
    assert ["≈" in line for line in lines.values()] == [False, True, False, False]
    assert "var-d24" in lines
    assert "protocol quick*, departing from it: cfg 4.0 instead of 1.5" in text


def test_inspect_says_what_the_model_is(tiny):
    text = text_of(inspect_table(describe(tiny, ["full", "d3@2"])), 80)
    assert "official checkpoint, untouched" in text
    assert "codebook 40 x 8" in text
    assert "1, 2, 3, 4: 30 tokens" in text
    assert "0-5" in text
    assert "0 2 5" in text


def test_inspect_shows_the_layers_of_a_models_own_subnet(tiny):
    model = ElasticVAR(tiny.var, tiny.tokenizer, bridge=2, depths=(3, 2), subnets={2: (0, 4)})
    text = text_of(inspect_table(describe(model)), 80)
    assert re.search(r"d3@2 +1-2 +6 +0-5 *\n +3-4 +3 +0 2 5 *\n", text)
    assert re.search(r"d2@2,0\+4 +1-2 +6 +0-5 *\n +3-4 +2 +0 4 *\n", text)


def test_inspect_sets_unguided_beside_guided(tiny):
    text = text_of(inspect_table(describe(tiny, ["full", "d3@2"])), 80)
    assert "Cost of one guided image in float32" in text
    assert "Unguided (cfg 0), beside the guided full" in text
    assert "guidance" not in text
    distilled = random_model()
    add_cfg_input(distilled.var)
    distilled.distilled_cfg = (1.0, 4.0)
    text = text_of(inspect_table(describe(distilled, ["full", "d3@2"])), 80)
    assert "distilled into the weights for cfg 1.0 to 4.0" in text
    assert "One unguided image in float32, by arithmetic, beside a guided full" in text
    assert "guided image in" not in text.replace("unguided image", "")


def test_inspect_says_what_a_recipe_reads(tiny):
    for name, said, unsaid in (("digits", "epochs 8", "p_start"), ("variant-d30", "p_start 0.2", "together")):
        model = ElasticVAR(tiny.var, tiny.tokenizer, provenance=Provenance("x", recipe=load_recipe(name).to_dict()))
        text = " ".join(text_of(inspect_table(describe(model)), 80).split())
        assert said in text
        assert unsaid not in text


def test_a_profile_of_unguided_calls_says_so(tiny):
    text = text_of(profile_table(profile(tiny, ["d2@1"], batch_size=2, runs=1, warmup=0, sampling=Sampling(cfg=0))), 80)
    assert "unguided" in text.split("Time of a batch")[0]
    assert "Beside guided calls of full, by arithmetic" in text
    assert text.count("d2@1") == 4
    assert "guided" not in text_of(profile_table(big_profile(NAMES)), 80)


def test_demo_table():
    costs = {"latency_ms": 55.0, "speedup": 2.5, "cache_bytes": 2**20, "peak_bytes": 2**23}
    scores = {"full": (30.0, 31.0), "d4@2": (91.5, 32.5), "d2@2": (99.0, 50.0)}
    rows = [
        {"schedule": schedule, "untrained": score_of(before), "score": score_of(after, 1.9), **costs}
        for schedule, (before, after) in scores.items()
    ]
    teacher = {"schedule": "full", "score": score_of(30.0), **costs, "speedup": 1.0}
    result = {"device": "cpu", "score": "fd", "features": "digits", "images": 1000, "batch_size": 64}
    text = text_of(demo_table(result | {"teacher": teacher, "schedules": rows}), 100)
    for part in ("digits FD of 1,000 images", "91.5 ± 1", "2.50", "8.00"):
        assert part in text
    first, full, d4, d2 = (
        next(line for line in text.splitlines() if line.strip().startswith(name)) for name in ("teacher", *scores)
    )
    assert re.search(r"30.0 ± 1 +– +1.00 +1.00", first)
    assert "1.03, noise" in full  # 31.0 ± 1.9 beside 30.0 ± 1.0
    assert "1.08, noise" in d4
    assert "1.67 " in d2
    assert "noise" not in d2


# -- plots ----------------------------------------------------------------------------------------


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("names", [["full"], [*NAMES, OWN]])
def test_plots_are_drawn(tmp_path, names):
    plots = [
        plot_profile(big_profile(names), tmp_path / "profile.png"),
        plot_eval(scored(names, "inception"), tmp_path / "eval.png"),
    ]
    for plot in plots:
        image = pixels(plot)
        assert min(image.shape[:2]) > 200
        assert len(np.unique(image[::5, ::5].reshape(-1, 3), axis=0)) > 10
        assert (image[:, [0, -1]] == 255).all()  # nothing runs over the left or right edge


def test_scores_that_are_missing_have_no_point(tmp_path):
    result = scored(NAMES, "inception")
    del result["schedules"][1]["scores"]["fd"]
    plot_eval(result, tmp_path / "eval.png")
    assert pixels(tmp_path / "eval.png").size


def test_a_profile_says_how_it_ran_and_what_an_eight_bit_cache_does():
    plain = big_profile(NAMES[:2])
    assert "logits" not in text_of(profile_table(plain), 100)
    assert "NVIDIA H100 80GB HBM3, bfloat16, batch" in text_of(profile_table(plain), 100)
    rounded = plain | {"kernels": "triton", "packed_weights": True, "cache_dtype": "int8", "offload": "bridge"}
    for row in rounded["schedules"]:
        row |= {"logit_error": 0.0123, "same_top_token": 0.987}
    text = text_of(profile_table(rounded), 100)
    assert "bfloat16, kernels triton, cache dtype int8, offload bridge, packed weights, batch" in " ".join(text.split())
    assert text.count("1.23%") == text.count("98.7%") == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, NOT_GIVEN),
        (0, "0"),
        (0.0123, "0.0123"),
        (0.5, "0.500"),
        (8, "8.00"),
        (12.34, "12.3"),
        (-99.6, "-99.6"),
        (123456, "123,456"),
    ],
)
def test_numbers_have_three_figures(value, text):
    assert number(value) == text


def test_bytes_and_counts():
    assert (mebibytes(3 * 2**20), mebibytes(None)) == ("3.00", NOT_GIVEN)
    assert (count(1, "image"), count(2000, "image")) == ("1 image", "2,000 images")


def demo(*schedules):
    """A result of the demo, as far as its picture goes."""
    row = {
        "cache_bytes": 1,
        "speedup": 2.5,
        "untrained": score_of(258.4, 6.62),
        "score": score_of(34.7, 1.4),
    }
    return {
        "score": "fd",
        "features": "digits",
        "teacher": row,
        "schedules": [row | {"schedule": name} for name in schedules],
    }


def test_samples_stand_beside_their_scores_and_the_noise_of_these(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    images = dict.fromkeys(("full", "d8@2"), np.zeros((2, 8, 8, 3), np.uint8))
    plot_samples({"before": images, "after": images}, demo("full", "d8@2"), tmp_path / "samples.png")
    before, after = (axis.get_ylabel() for axis in drawn[0].axes[2:])
    assert before == "d8@2\ndigits FD\n258 ± 6.6"
    assert after == "digits FD 34.7 ± 1.4\n2.50× speed\n100% cache"


def test_a_full_disk_while_a_plot_is_drawn(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    images = {"full": np.zeros((2, 8, 8, 3), np.uint8)}
    samples, result = {"untrained subnets": images, "distilled": images}, demo("full", "full")
    plot_samples(samples, result, tmp_path / "samples.png")
    before = (tmp_path / "samples.png").read_bytes()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(InputError, match=r"samples.png: could not be written \(No space left on device\); .* MiB"):
        plot_samples(samples, result, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").read_bytes() == before


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("secret/sub/model -s full", "model -s full"),
        ("ann/tiny --revision main", "ann/tiny --revision main"),  # as on the Hub
        ("secret/tiny.pth --vae ../secret/vae.pth", "tiny.pth --vae vae.pth"),
        ("digits --reference secret-client/refs --out=secret/out/", "digits --reference refs --out=out"),
        ("digits --reference=/a=b/secret/refs --data 'secret client/x'", "digits --reference=refs --data x"),
        ("digits --feature-weights secret/a.pth", "digits --feature-weights a.pth"),
        ("digits --save-images secret/b.npz", "digits --save-images b.npz"),
        ("digits --features ~/secret/a.safetensors", "digits --features a.safetensors"),
        (r"'C:\secret\model' --data hf:ann/cats:train", "model --data hf:ann/cats:train"),
        ("digits --beside ann/other --beside=secret/sub/other", "digits --beside ann/other --beside=other"),
        ("--json secret/model", "--json model"),
        ("'secret/unclosed", "unclosed"),
    ],
)
def test_no_folder_of_a_command_is_shown(given, shown, tmp_path, monkeypatch):
    for folder in (tmp_path, Path("/")):  # wherever the report is written
        monkeypatch.chdir(folder)
        assert public({"command": f"varcompress eval {given}"})["command"] == f"varcompress eval {shown}"
