"""Measured quantities against arithmetic, and against what can be known otherwise."""

from __future__ import annotations

import json
import time

import pytest
import torch

from tests.conftest import placed, random_model
from varcompress.cost import decoder_flops, describe, predict
from varcompress.errors import InputError
from varcompress.fingerprint import fingerprint
from varcompress.hardware import device_name
from varcompress.models import strips
from varcompress.models.elastic import ElasticVAR
from varcompress.models.generation import PHASES
from varcompress.models.runtime import Runtime
from varcompress.profiling import PhaseClock, profile
from varcompress.sampling import Sampling

SCHEDULES = ["d4@2", "d2", "6x1,4x1,3x1,2x1"]


@pytest.fixture(scope="module")
def model():
    """Wide enough that matrices outweigh what prediction leaves out."""
    return random_model(depth=6, width=64, heads=2, patch_nums=(1, 2, 4, 6), vocab=64)


@pytest.fixture(scope="module")
def result(model):
    return profile(model, SCHEDULES, batch_size=3, runs=3, warmup=1)


def test_full_comes_first_and_each_schedule_once(model, result):
    assert [row["schedule"] for row in result["schedules"]] == ["full", "d4@2", "d2@2", "6x1,4x1,3x1,2x1"]
    again = profile(model, ["d2", "d2@2", "full"], batch_size=1, runs=1, warmup=0)
    assert [row["schedule"] for row in again["schedules"]] == ["full", "d2@2"]


def test_the_default_schedules_are_the_models():
    small = random_model(depth=3, patch_nums=(1, 2))
    rows = profile(small, batch_size=1, runs=1, warmup=0)["schedules"]
    assert [row["schedule"] for row in rows] == ["full", "d2@1"]
    small.subnets = {2: (0, 1)}
    rows = profile(small, batch_size=1, runs=1, warmup=0)["schedules"]
    assert [row["schedule"] for row in rows] == ["full", "d2@1,0+1"]


def test_the_result_is_json_and_says_where(model, result):
    assert json.loads(json.dumps(result)) == result
    assert result["weights"] == fingerprint(model)
    assert (result["kind"], result["dtype"], result["batch_size"], result["runs"]) == ("profile", "float32", 3, 3)
    assert result["device"] == device_name("cpu")
    assert result["torch"] == torch.__version__


def test_cache_and_weights_are_exactly_as_predicted(result):
    for row in result["schedules"]:
        assert row["cache_bytes"] == row["cache_bytes_predicted"] > 0
        assert row["weight_bytes"] == row["weight_bytes_predicted"] > 0


def test_flops_are_the_prediction_and_the_small_extras(model, result):
    """The difference is AdaLN, word embedding and phi, which can be written down. The decoder is that of a CPU."""
    config, batch, side = model.var.config, 3, model.var.config.patch_nums[-1]
    rows = 2 * batch
    adaln = 2 * rows * config.width**2 * (6 * config.depth + 2)
    embedding = 2 * batch * (config.tokens - 1) * config.z_channels * config.width
    phi = 2 * batch * len(config.patch_nums) * config.z_channels**2 * 9 * side**2
    for row in result["schedules"]:
        assert row["flops"] - row["flops_predicted"] == adaln + embedding + phi


def test_times_are_consistent(result):
    for row in result["schedules"]:
        assert min(row[f"{phase}_ms"] for phase in PHASES) > 0
        low, high = row["latency_spread_ms"]
        assert low <= row["latency_ms"] <= high
        assert row["images_per_second"] == pytest.approx(3000 / row["latency_ms"])


def test_phases_add_up_and_hold_what_happens_in_them(model, monkeypatch):
    """Sleeping in the sampler or the decoder lengthens that phase, and no time is lost or counted twice."""
    kernels, decode, clock = model.runtime.operations, strips.decode, PhaseClock(model.device)
    slow = kernels._replace(draw=lambda *a, **k: (time.sleep(0.05), kernels.draw(*a, **k))[1])
    monkeypatch.setattr(Runtime, "operations", slow)
    monkeypatch.setattr(strips, "decode", lambda *a: (time.sleep(0.3), decode(*a))[1])
    start = time.perf_counter()
    clock.phase("transformer")
    begun = time.perf_counter()
    model.generate([1], "full", observer=clock)
    inside = (time.perf_counter() - begun) * 1e3
    phases = clock.spent_ms()
    outside = (time.perf_counter() - start) * 1e3
    assert inside <= sum(phases.values()) <= outside
    assert phases["sampling"] >= 200  # four scales
    assert phases["decoder"] >= 300
    assert phases["transformer"] <= outside - 500


def test_ratios_are_to_full(result):
    full, *others = result["schedules"]
    ratios = ("speedup", "speedup_predicted", "speedup_without_decoder", "memory_ratio", "cache_ratio")
    assert all(full[ratio] == 1 for ratio in ratios)
    for row in others:
        assert row["speedup"] == full["latency_ms"] / row["latency_ms"]
        assert row["cache_ratio"] == row["cache_bytes"] / full["cache_bytes"] < 1
        assert 1 < row["speedup_predicted"] < row["speedup_without_decoder_predicted"]


def test_unguided_calls_are_measured_and_set_beside_guided_ones(model, result):
    assert result["guided"]
    assert "beside_guided" not in result["schedules"][0]
    unguided = profile(model, ["d2"], batch_size=3, runs=1, warmup=0, sampling=Sampling(cfg=0))
    assert (unguided["guided"], unguided["settings"]["cfg"]) == (False, 0)
    for row in unguided["schedules"]:
        guided = next(other for other in result["schedules"] if other["schedule"] == row["schedule"])
        assert row["cache_bytes"] == row["cache_bytes_predicted"] == guided["cache_bytes"] / 2
        assert row["flops"] < guided["flops"]
        full, work = result["schedules"][0], "flops_without_decoder_predicted"
        assert row["beside_guided"] == {
            "speedup_predicted": full["flops_predicted"] / row["flops_predicted"],
            "speedup_without_decoder_predicted": full[work] / row[work],
            "cache_ratio": row["cache_bytes"] / full["cache_bytes"],
        }
    assert unguided["schedules"][0]["speedup"] == 1


def test_a_model_whose_guidance_is_distilled_is_measured_unguided(model):
    distilled = ElasticVAR(model.var, model.tokenizer, distilled_cfg=2.0)
    result = profile(distilled, ["d2"], batch_size=1, runs=1, warmup=0)
    assert (result["guided"], result["settings"]["cfg"]) == (False, 2.0)
    assert result["schedules"][1]["cache_bytes"] == result["schedules"][1]["cache_bytes_predicted"]
    with pytest.raises(InputError, match=r"distilled for cfg 2\.0"):
        profile(distilled, ["d2"], sampling=Sampling(cfg=0))


def test_nothing_stays_attached(model):
    profile(model, ["d2"], batch_size=1, runs=1, warmup=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_progress_reaches_its_total(model):
    seen = []
    profile(model, ["d2"], batch_size=1, runs=2, warmup=1, progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(1, seen[0][1] + 1))
    assert {total for _, total, _ in seen} == {len(seen)}


def test_prediction_of_d30_needs_no_weights():
    """Predictions are METHOD's figures on a model of which only the shapes exist."""
    with torch.device("meta"):
        model = random_shapes_of_d30()
    costs = predict(model.cast(torch.bfloat16), model.schedule("d8@6"), 64)
    assert costs["cache_bytes"] == 5100 * 2**20
    assert costs["flops"] / 64e9 == pytest.approx(3763 / 2.74 + 394, rel=0.01)
    assert costs["weight_bytes"] == (6 * 30 + 4 * 8) * 12 * 1920**2 * 2
    assert costs["peak_bytes"] < predict(model, model.schedule("full"), 64)["peak_bytes"]


def random_shapes_of_d30():
    from varcompress.models.autoencoder import TokenizerConfig
    from varcompress.models.tokenizer import VQVAE
    from varcompress.models.transformer import VAR, VARConfig

    patch_nums = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    var = VAR(VARConfig(30, 1920, 30, patch_nums, 4096, 32, 1000, False, 7680))
    return ElasticVAR(var, VQVAE(TokenizerConfig(160, (1, 1, 2, 2, 4), 2, 32, 4096, 4, 3, patch_nums)))


def test_the_effect_of_an_eight_bit_cache_is_measured(model):
    assert "logit_error" not in profile(model, ["d2"], batch_size=1, runs=1, warmup=0)["schedules"][0]
    small = random_model(depth=6, width=64, heads=2, patch_nums=(1, 2, 4, 6), vocab=64)
    placed(small, cache_dtype="int8")
    result = profile(small, ["d2@1"], batch_size=2, runs=1, warmup=0)
    assert result["cache_dtype"] == "int8"
    for row in result["schedules"]:
        assert row["cache_bytes"] == row["cache_bytes_predicted"]
        assert 0 < row["logit_error"] < 0.05
        assert row["same_top_token"] > 0.9


# -- describe, and refusals -----------------------------------------------------------------------


def test_describe(model):
    described = describe(model, ["full", "d2@1"])
    assert json.loads(json.dumps(described)) == described
    assert (described["kind"], described["checkpoint"], described["depth"]) == ("inspect", "official", 6)
    assert described["parameters"]["transformer"] == sum(p.numel() for p in model.var.parameters())
    full, subnet = described["schedules"]
    assert full["segments"] == [{"scales": [1, 4], "layers": [0, 1, 2, 3, 4, 5]}]
    assert subnet["segments"] == [
        {"scales": [1, 1], "layers": [0, 1, 2, 3, 4, 5]},
        {"scales": [2, 4], "layers": [0, 5]},
    ]
    transformer = model.schedule("d2@1").flops(width=64, vocab=64, guided=True)
    assert subnet["flops"] == transformer + decoder_flops(model.tokenizer.config, in_strips=True)
    assert subnet["cache_bytes"] == model.schedule("d2@1").cache_bytes(batch=1, token_bytes=64 * 4, guided=True)


def test_describe_sets_unguided_beside_guided(model):
    described = describe(model, ["full", "d2@1"])
    assert (described["guided"], described["distilled_cfg"]) == (True, None)
    full = described["schedules"][0]
    for guided, row in zip(described["schedules"], described["unguided"], strict=True):
        assert (row["schedule"], row["weight_bytes"]) == (guided["schedule"], guided["weight_bytes"])
        assert row["cache_bytes"] == guided["cache_bytes"] / 2
        assert row["speedup_predicted"] == full["flops"] / row["flops"] > guided["speedup_predicted"]
    distilled = describe(ElasticVAR(model.var, model.tokenizer, distilled_cfg=1.5), ["full", "d2@1"])
    assert json.loads(json.dumps(distilled)) == distilled
    assert (distilled["guided"], distilled["unguided"], distilled["distilled_cfg"]) == (False, [], 1.5)
    for row, unguided in zip(distilled["schedules"], described["unguided"], strict=True):
        assert unguided.items() <= row.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedules": ["d9"]}, "9 layers, but this model has 6"),
        ({"batch_size": 0}, "batch size 0"),
        ({"runs": 0}, "runs 0"),
        ({"warmup": -1}, "warm-up -1"),
    ],
)
def test_refusals(model, arguments, message):
    with pytest.raises(InputError, match=message):
        profile(model, **arguments)
