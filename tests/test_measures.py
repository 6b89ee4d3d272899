"""The scores beside plain float64 computations and torch-fidelity's, and how sure they are."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.metric_prc import prc_features_to_metric

from varcompress.evaluation import neighbours
from varcompress.evaluation.intervals import NORMAL, scored, standard_error
from varcompress.evaluation.measures import MEASURES, Compared, Measure, measure
from varcompress.evaluation.neighbours import find_neighbours
from varcompress.evaluation.network import Features
from varcompress.evaluation.reference import Reference
from varcompress.metrics import METRICS

CPU = torch.device("cpu")
WIDTH, CLASSES = 12, 7


def draw(count: int, seed: int, shift: float = 0.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, WIDTH, generator=generator) * torch.linspace(0.5, 2, WIDTH) + shift
    logits = 3 * torch.randn(count, CLASSES, generator=generator)
    return Features(vectors, logits, torch.randn(count, 5, generator=generator) + shift)


def reference_of(features: Features) -> Reference:
    found = (fid_features_to_statistics(part) for part in (features.vectors, features.spatial))
    return Reference("r", *found, features.vectors)


def compared(count: int = 80, seed: int = 0, shift: float = 0.3, **how) -> Compared:
    how = {"distances": "exact", "groups": "shuffled"} | how
    return Compared(draw(count, seed, shift), reference_of(draw(90, 99)), CPU, **how)


def test_every_metric_is_computed():
    assert list(MEASURES) == list(METRICS)
    assert list(measure(compared())) == list(METRICS)


def float64_frechet(x: np.ndarray, y: np.ndarray) -> float:
    """By eigenvalues of a symmetric product, another way than torch-fidelity's."""
    sigma_x, sigma_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, directions = np.linalg.eigh(sigma_y)
    root = directions * np.sqrt(values) @ directions.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ sigma_x @ root)).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sigma_x) + np.trace(sigma_y) - 2 * overlap


def test_frechet_distances_are_those_of_float64():
    here = compared()
    theirs = draw(90, 99)
    for key, part in (("fd", "vectors"), ("sfd", "spatial")):
        expected = float64_frechet(
            getattr(here.features, part).double().numpy(), getattr(theirs, part).double().numpy()
        )
        assert measure(here)[key].value == pytest.approx(expected, rel=1e-4)


def test_consecutive_groups_of_the_inception_score_are_adms(monkeypatch):
    monkeypatch.setattr("varcompress.evaluation.measures.IS_GROUP_SIZE", 30)
    here = compared(groups="consecutive")
    probs = here.features.logits.double().softmax(dim=1).numpy()
    scores = []
    for start in (0, 30, 60):
        part = probs[start : start + 30]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    found = measure(here)["is"]
    assert (found.value, found.std) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    sorted_by_class = replace(here, features=here.features._replace(logits=here.features.logits.sort(dim=0).values))
    assert measure(sorted_by_class)["is"].value < found.value  # why the classes are mixed: each group must hold all


def brute_force(generated: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    """Precision and its kin, image by image, by their definitions in float64."""
    between = np.linalg.norm(generated[:, None] - real[None], axis=2)

    def radius(images: np.ndarray, nearest: int) -> np.ndarray:
        return np.sort(np.linalg.norm(images[:, None] - images[None], axis=2), axis=1)[:, nearest]

    return {
        "precision": (between <= radius(real, 3)).any(axis=1),
        "recall": (between <= radius(generated, 3)[:, None]).any(axis=0),
        "density": (between < radius(real, 5)).sum(axis=1) / 5,
        "coverage": (between < radius(real, 5)).any(axis=0),
    }


@pytest.mark.parametrize("elements", [1 << 26, 200])
def test_neighbourhoods_are_those_of_the_definitions(elements, monkeypatch):
    monkeypatch.setattr(neighbours, "ELEMENTS", elements)
    here = compared()
    found = measure(here)
    expected = brute_force(here.features.vectors.double().numpy(), here.reference.vectors.double().numpy())
    for key, each in expected.items():
        assert found[key].value == pytest.approx(each.mean(), abs=1e-12), key
        np.testing.assert_allclose(found[key].influence.numpy(), each - each.mean(), atol=1e-12)
    theirs = prc_features_to_metric(
        here.features.vectors,
        here.reference.vectors,
        prc_neighborhood=3,
        prc_batch_size=50,
        save_cpu_ram=True,
        verbose=False,
    )
    assert [found["precision"].value, found["recall"].value] == pytest.approx([theirs["precision"], theirs["recall"]])


def float16_distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = u.astype(np.float16), v.astype(np.float16)
    of_u, of_v = ((part * part).sum(axis=1, dtype=np.float32).astype(np.float16) for part in (u, v))
    products = np.float16(2) * (u.astype(np.float32) @ v.T.astype(np.float32)).astype(np.float16)
    return np.maximum((of_u[:, None] - products) + of_v, np.float16(0)).astype(np.float32)


def test_adm_distances_are_rounded_to_float16():
    here = compared(seed=3, distances="adm")
    ours, real = here.features.vectors.numpy() * 8, here.reference.vectors.numpy() * 8
    found = find_neighbours(torch.from_numpy(ours), torch.from_numpy(real), CPU, "adm")
    radii = np.sort(float16_distances(real, real), axis=1)[:, 3]
    expected = (float16_distances(ours, real) <= radii).any(axis=1)
    np.testing.assert_array_equal(found.within_reference.numpy(), expected)
    exact = find_neighbours(torch.from_numpy(ours), torch.from_numpy(real), CPU, "exact")
    assert float((found.balls - exact.balls).abs().sum()) > 0  # float16 tells some of them apart no more


def test_what_float16_does_not_hold_is_computed_in_float32():
    ours, real = (torch.from_numpy(part) for part in (np.float32(300) * draw(50, s).vectors.numpy() for s in (0, 1)))
    adm, exact = (find_neighbours(ours, real, CPU, distances) for distances in ("adm", "exact"))
    assert torch.equal(adm.within_reference, exact.within_reference)


# -- how sure -----------------------------------------------------------------------------------


def resampled(here: Compared, count: int, seed: int) -> Compared:
    """The same of as many images, drawn from its own with replacement."""
    drawn = torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed))
    return replace(here, features=Features(*(part[drawn] for part in here.features)))


@pytest.mark.parametrize("key", ["fd", "sfd", "is", "precision", "density"])
def test_standard_errors_are_those_of_the_bootstrap(key):
    here = compared(count=200)
    values = [MEASURES[key](resampled(here, 200, seed)).value for seed in range(60)]
    assert standard_error(MEASURES[key](here).influence) == pytest.approx(np.std(values, ddof=1), rel=0.3)


def test_the_standard_error_of_a_kernel_distance_is_that_of_other_images():
    """Not of the bootstrap, whose repeated images are nearer to each other than any two images are."""
    found = [MEASURES["kd"](compared(count=90, seed=seed)) for seed in range(30)]
    estimated = [standard_error(measured.influence) for measured in found]
    assert np.mean(estimated) == pytest.approx(np.std([measured.value for measured in found], ddof=1), rel=0.4)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Of a Frechet distance with many images, whose bias is small: to the distance of the distributions."""
    true = float64_frechet(draw(200_000, 1000, 0.3).vectors.double().numpy(), draw(90, 99).vectors.double().numpy())
    held = 0
    for seed in range(100):
        found = scored([{"fd": MEASURES["fd"](compared(2000, seed))}], torch.zeros(2000))["fd"]
        held += found["interval"][0] <= true <= found["interval"][1]
    assert 86 <= held <= 100


def test_classes_are_no_chance():
    """What differs from class to class only is no part of the spread where their numbers are fixed."""
    labels = torch.arange(100) % 10
    between = labels.double()
    assert standard_error(between, labels) == 0
    assert standard_error(between) > 0.2
    assert standard_error(torch.arange(10.0), torch.arange(10)) > 0  # one image a class: all are drawn as one


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.integers(0, 3))
@settings(max_examples=50)
def test_intervals_over_seeds_are_those_of_a_t_test(values, shift):
    labels = torch.arange(6) % 2
    ours = [{"fd": Measure(value, torch.arange(6.0) - 2.5)} for value in values]
    base = [{"fd": Measure(value + shift, torch.arange(6.0) - 2.5)} for value in values]
    found = scored(ours, labels, base)["fd"]
    low, high = found["interval"]
    assert found["seeds"] == values
    assert found["value"] == pytest.approx(np.mean(values))
    assert (low + high) / 2 == pytest.approx(np.mean(values), abs=1e-9)
    quantiles = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
    half = quantiles[len(values)] * np.std(values, ddof=1) / math.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3, abs=1e-9)
    assert found["difference"] == pytest.approx(-shift)
    assert found["difference_interval"] == pytest.approx([-shift, -shift], abs=1e-6)  # the same for each seed


def test_differences_pair_images():
    """What moves both schedules alike is no part of the noise of their difference."""
    labels = torch.zeros(50, dtype=torch.int64)
    shared = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, base = {"fd": Measure(3.0, shared)}, {"fd": Measure(2.0, shared)}
    found = scored([ours], labels, [base])["fd"]
    assert found["difference_interval"] == [1.0, 1.0]
    half = NORMAL * float(shared.std()) / math.sqrt(50)
    assert found["interval"] == pytest.approx([3 - half, 3 + half])
