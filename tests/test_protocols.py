"""Protocols, and what departs from them."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from varcompress.errors import InputError
from varcompress.evaluation.protocols import PROTOCOLS, Done, choose_protocol, deviations
from varcompress.models.elastic import Provenance
from varcompress.sampling import PUBLISHED, Sampling

ADM = PROTOCOLS["adm-imagenet256"]
KEPT = Done(
    images=50_000,
    classes=1000,
    sampling=replace(PUBLISHED, seed=5),
    rounding="truncate",
    reference="/data/VIRTUAL_imagenet256_labeled.npz",
    reference_sha256=ADM.reference.sha256,
    features="inception",
    distances="adm",
)


def like(size: int, classes: int, name: str = "a") -> SimpleNamespace:
    """As much of a model as a protocol looks at."""
    tokenizer = SimpleNamespace(config=SimpleNamespace(image_size=size))
    var = SimpleNamespace(config=SimpleNamespace(classes=classes))
    return SimpleNamespace(tokenizer=tokenizer, var=var, provenance=Provenance(name=name))


def test_what_is_kept_to_is_no_deviation():
    assert deviations(ADM, KEPT) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": 10_000}, "10,000 images instead of 50,000"),
        ({"sampling": Sampling(cfg=4.0)}, "cfg 4.0 instead of 1.5"),
        ({"sampling": replace(PUBLISHED, top_k=0)}, "top_k 0 instead of 900"),
        ({"rounding": "round"}, "rounding round instead of truncate"),
        (
            {"reference_sha256": "0" * 64},
            "labeled.npz with the SHA-256 00000000… instead of VIRTUAL_imagenet256_labeled.npz with b3273271…",
        ),
        ({"reference": "/my/photos", "reference_sha256": None}, "reference photos instead of VIRTUAL_"),
        ({"features": "digits"}, "features digits instead of inception"),
        ({"distances": "exact"}, "distances exact instead of adm"),
        ({"resized": True}, "images of the reference resized"),
    ],
)
def test_each_deviation_is_named(change, said):
    (found,) = deviations(ADM, replace(KEPT, **change))
    assert said in found


def test_another_reference_than_the_models_own_is_named():
    own, digits = replace(KEPT, images=2_000, classes=10, rounding="round", distances="exact"), PROTOCOLS["digits"]
    own = replace(own, features="digits", reference="embedded digits", reference_sha256=None)
    assert deviations(digits, own) == []
    assert deviations(digits, replace(own, reference="/my/cats")) == ["reference cats instead of the embedded digits"]


def test_a_reference_without_a_known_digest_says_so():
    large = PROTOCOLS["adm-imagenet512"]
    (found,) = deviations(large, replace(KEPT, reference_sha256="1" * 64))
    assert "is not pinned" in found


def test_a_model_has_its_protocol():
    assert choose_protocol(None, like(256, 1000)) is ADM
    assert choose_protocol(None, like(512, 1000)).name == "adm-imagenet512"
    assert choose_protocol(None, like(16, 10, "digits")).name == "digits"
    assert choose_protocol(None, like(16, 10)).name == "quick"
    assert choose_protocol("quick", like(256, 1000)).name == "quick"
    with pytest.raises(InputError, match=r"adm-imagenet256 is for 1000 classes in 256 pixels.* 10 in 16: leave --pro"):
        choose_protocol("adm-imagenet256", like(16, 10))
    with pytest.raises(InputError, match="protocol 'fid' is unknown: choose adm-imagenet256, "):
        choose_protocol("fid", like(16, 10))


def test_the_commands(run):
    listed = run("protocols", "list")
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in PROTOCOLS)
    assert len(json.loads(run("protocols", "list", "--json").stdout)["protocols"]) == len(PROTOCOLS)
    shown = json.loads(run("protocols", "show", "adm-imagenet256", "--json").stdout)
    assert (shown["images_per_class"], shown["sampling"]["top_k"]) == (50, 900)
    assert ADM.reference.sha256[:40] in run("protocols", "show", "adm-imagenet256").stdout
    unknown = run("protocols", "show", "fid")
    assert (unknown.exit_code, unknown.stderr.count("\n")) == (2, 1)
