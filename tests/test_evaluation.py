"""Scores of schedules: what they are, what they depend on, how they go on after a kill and share the work."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset

from tests import fidelity
from tests.conftest import official_state, random_model
from tests.forked import evaluation, free_port
from tests.test_reference import CPU, SIZE, write_folder, write_npz
from varcompress.data.digits import load_digits
from varcompress.errors import InputError
from varcompress.evaluation import evaluate, parts, saving, scores
from varcompress.evaluation.digits import DIGITS
from varcompress.evaluation.features import Extractor
from varcompress.evaluation.measures import Compared, measure
from varcompress.evaluation.reference import read_reference
from varcompress.fingerprint import fingerprint
from varcompress.images import pixels as as_pixels
from varcompress.images import to_uint8
from varcompress.metrics import METRICS
from varcompress.models.autoencoder import TokenizerConfig
from varcompress.models.elastic import ElasticVAR, Provenance
from varcompress.models.tokenizer import VQVAE
from varcompress.publish import save
from varcompress.results import EvalResult, EvalRow
from varcompress.sampling import Sampling

COUNT = 23
ON_DIGITS = [key for key in METRICS if key != "sfd"]


@pytest.fixture(scope="module")
def model(tiny) -> ElasticVAR:
    """The tiny transformer with a tokenizer of 16 x 16 pixels, under the embedded model's name."""
    torch.manual_seed(1)
    tokenizer = VQVAE(TokenizerConfig(32, (1, 1, 1), 1, 8, 40, 4, 3, (1, 2, 3, 4)))
    return ElasticVAR(tiny.var, tokenizer, provenance=Provenance(name="digits"))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Digits (23, 16, 16, 3) uint8."""
    return as_pixels(to_uint8(load_digits()[0][:COUNT]))


# -- scores -------------------------------------------------------------------------------------


class Images(Dataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def test_scores_equal_torch_fidelity(model, tmp_path, pixels):
    reference = write_npz(tmp_path / "images.npz", arr_0=pixels)
    result = evaluate(model, ["d2@2"], reference=reference, num_images=30, batch_size=8, sampling=Sampling(seed=4))
    labels = scores.balanced_labels(30, 10)
    drawn = torch.cat([model.generate(labels[i : i + 8], "d2@2", seed=4, first_index=i) for i in range(0, 30, 8)])
    expected = torch_fidelity.calculate_metrics(
        input1=Images(to_uint8(drawn)),
        input2=Images(torch.from_numpy(pixels).permute(0, 3, 1, 2)),
        feature_extractor=fidelity.NAME,
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        kid_subset_size=COUNT,
        cuda=False,
        batch_size=8,
        save_cpu_ram=True,
        verbose=False,
        cache=False,
    )
    (row,) = result["schedules"]
    found = row["scores"]
    names = {
        ("fd", "value"): "frechet_inception_distance",
        ("is", "value"): "inception_score_mean",
        ("is", "std"): "inception_score_std",
        ("kd", "value"): "kernel_inception_distance_mean",
        ("kd", "std"): "kernel_inception_distance_std",
        ("precision", "value"): "precision",
        ("recall", "value"): "recall",
    }
    ours = {theirs: found[key][field] for (key, field), theirs in names.items()}
    assert ours == pytest.approx({theirs: expected[theirs] for theirs in names.values()}, rel=1e-6)


def test_evaluate_says_all_that_a_score_depends_on(model):
    seen = []
    result = evaluate(model, ["full", "d2@2"], num_images=40, batch_size=16, progress=lambda *step: seen.append(step))
    assert json.loads(json.dumps(result)) == result
    assert (result["kind"], result["weights"]) == ("eval", fingerprint(model))
    assert set(result) == set(EvalResult.__annotations__)
    assert result["features"] | {"sha256": ""} == {"name": "digits", "printed": "digits", "version": "", "sha256": ""}
    assert result["reference"] == "embedded digits"
    assert (result["protocol"], result["deviations"]) == ("digits", ["40 images instead of 2,000"])
    details = result["reference_details"]
    assert (details["images"], details["statistics"], len(details["digest"])) == (1797, "of its images", 16)
    assert result["settings"] == {
        "cfg": 1.5, "top_k": 900, "top_p": 0.96, "seeds": [0], "images": 40, "rounding": "round",
        "inception_groups": "shuffled", "distances": "exact",
    }  # fmt: skip
    assert any("not FID" in note for note in result["notes"])
    assert "digits KD in subsets of 40 images instead of 1,000" in result["notes"]
    full, subnet = result["schedules"]
    assert [full["schedule"], subnet["schedule"]] == ["full", "d2@2"]
    for row in (full, subnet):
        assert set(row) == set(EvalRow.__annotations__) - {"model", "weights"}
        assert list(row["scores"]) == ON_DIGITS
        assert row["images_per_second"] == pytest.approx(16 / row["latency_ms"] * 1e3)
        assert row["peak_bytes"] > row["cache_bytes"] > 0
        for found in row["scores"].values():
            assert found["interval"][0] <= found["value"] <= found["interval"][1]
            assert ("difference" in found) == (row is subnet)
    assert subnet["cache_bytes"] < full["cache_bytes"]
    assert full["cache_bytes"] == model.schedule("full").cache_bytes(batch=16, token_bytes=32 * 4, guided=True)
    assert (40, 40, "d2@2: images") in seen
    assert seen[-1] == (2, 2, "scores: done")
    assert any(what == "reference: images" for _, _, what in seen)


def test_scores_do_not_depend_on_the_batch_size(model, tmp_path, pixels):
    reference = write_npz(tmp_path / "images.npz", arr_0=pixels)
    rows = [
        evaluate(model, ["full"], reference=reference, num_images=20, batch_size=size)["schedules"][0]
        for size in (3, 50)
    ]
    for key in ON_DIGITS:  # but for a pixel that rounding tips the other way
        values = [row["scores"][key]["value"] for row in rows]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-6)


def test_rounding_is_in_the_result_and_in_the_scores(model, tmp_path, pixels):
    reference = write_npz(tmp_path / "images.npz", arr_0=pixels)
    options = {"reference": reference, "num_images": 20, "batch_size": 20}
    results = [evaluate(model, ["full"], rounding=rounding, **options) for rounding in ("round", "truncate")]
    assert [result["settings"]["rounding"] for result in results] == ["round", "truncate"]
    labels = scores.balanced_labels(20, 10)
    extractor = Extractor(DIGITS, None, CPU)
    drawn = extractor(to_uint8(model.generate(labels), "truncate"))
    known = read_reference(reference, extractor, size=SIZE)
    expected = measure(Compared(drawn, known, CPU, "exact", "shuffled"))["fd"].value
    rounded, truncated = (result["schedules"][0]["scores"]["fd"]["value"] for result in results)
    assert truncated == pytest.approx(expected, rel=1e-6)
    assert truncated != pytest.approx(rounded, rel=1e-6)


def test_several_seeds_give_intervals_over_them(model):
    options = {"num_images": 20, "batch_size": 20}
    result = evaluate(model, ["full", "d2@2"], seeds=[3, 5], **options)
    each = [evaluate(model, ["full"], sampling=Sampling(seed=seed), **options) for seed in (3, 5)]
    found = result["schedules"][0]["scores"]["fd"]
    assert found["seeds"] == [one["schedules"][0]["scores"]["fd"]["value"] for one in each]
    assert found["value"] == pytest.approx(np.mean(found["seeds"]))
    assert result["settings"]["seeds"] == [3, 5]
    assert any("interval over seeds" in note for note in result["notes"])
    with pytest.raises(InputError, match="seeds 3, 3: the same twice"):
        evaluate(model, ["full"], seeds=[3, 3], **options)


def test_the_interval_of_a_distance_is_that_of_other_seeds(model, tmp_path, pixels):
    reference = write_npz(tmp_path / "images.npz", arr_0=pixels)
    options = {"reference": reference, "num_images": 60, "batch_size": 60}
    result = evaluate(model, ["full"], seeds=range(8), **options)
    values = result["schedules"][0]["scores"]["fd"]["seeds"]
    low, high = evaluate(model, ["full"], **options)["schedules"][0]["scores"]["fd"]["interval"]
    assert 0.4 < (high - low) / 2 / 1.96 / np.std(values, ddof=1) < 2.5


def test_another_model_stands_beside(model):
    other = ElasticVAR(random_model(depth=3, seed=4).var, model.tokenizer, provenance=Provenance(name="small"))
    options = {"num_images": 20, "batch_size": 10}
    result = evaluate(model, ["full", "d2@2"], beside=[lambda: other], **options)
    assert [(row.get("model"), row["schedule"]) for row in result["schedules"]] == [
        (None, "full"), (None, "d2@2"), ("small", "full"),
    ]  # fmt: skip
    row = result["schedules"][-1]
    assert row["weights"] == fingerprint(other)
    assert row["scores"]["fd"]["difference"] == pytest.approx(
        row["scores"]["fd"]["value"] - result["schedules"][0]["scores"]["fd"]["value"]
    )
    with pytest.raises(InputError, match="two of the models beside are called small"):
        evaluate(model, ["full"], beside=[lambda: other] * 2, **options)
    with pytest.raises(InputError, match="tiny: has 10 classes in 8 pixels, and digits 10 in 16"):
        evaluate(model, ["full"], beside=[lambda: random_model_named("tiny")], **options)


def random_model_named(name: str) -> ElasticVAR:
    found = random_model()
    found.provenance.name = name
    return found


def test_statistics_give_frechet_distances_alone(model, tmp_path, pixels):
    images = write_npz(tmp_path / "images.npz", arr_0=pixels)
    whole = read_reference(images, Extractor(DIGITS, None, CPU), size=SIZE)
    path = write_npz(tmp_path / "statistics.npz", **whole.statistics)
    result = evaluate(model, ["full"], reference=path, num_images=20)
    (row,) = result["schedules"]
    assert list(row["scores"]) == ["fd", "is"]
    assert "the reference holds statistics only: Frechet distances and IS are all that it gives" in result["notes"]
    (with_images,) = evaluate(model, ["full"], reference=images, num_images=20)["schedules"]
    assert row["scores"]["fd"]["value"] == pytest.approx(with_images["scores"]["fd"]["value"], rel=1e-6)


def test_equal_images_score_as_equal(tmp_path, pixels):
    extractor = Extractor(DIGITS, None, CPU)
    reference = read_reference(write_npz(tmp_path / "images.npz", arr_0=pixels), extractor, size=SIZE)
    noise = torch.randint(256, (COUNT, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).byte()
    same, worse = (
        measure(Compared(extractor(images), reference, CPU, "exact", "shuffled"))
        for images in (torch.from_numpy(pixels).permute(0, 3, 1, 2), noise)
    )
    assert same["fd"].value == pytest.approx(0, abs=1e-3)
    assert same["precision"].value == same["recall"].value == same["coverage"].value == 1
    assert worse["fd"].value > 100 * abs(same["fd"].value)
    assert worse["kd"].value > same["kd"].value


@given(num_images=st.integers(1, 3000), classes=st.integers(1, 1200))
def test_labels_are_balanced_and_mixed(num_images, classes):
    labels = scores.balanced_labels(num_images, classes)
    counts = labels.bincount(minlength=classes)
    assert len(counts) == classes
    assert int(counts.sum()) == num_images
    assert int(counts.max() - counts.min()) <= 1
    for part in labels.split(classes):  # every group of the Inception Score holds all classes
        assert len(part.unique()) == len(part)


def test_what_is_distilled_into_the_weights_is_said(model):
    distilled = ElasticVAR(model.var, model.tokenizer, provenance=Provenance(name="digits"), distilled_cfg=2.0)
    result = evaluate(distilled, ["full"], num_images=20)
    assert "guidance with cfg 2.0 is distilled into the weights: nothing ran unconditionally" in result["notes"]
    assert "cfg 2.0 instead of 1.5" in result["deviations"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a reference is needed"),
        ({"reference": "x", "features": "digits"}, "images of 16 pixels"),
        ({"reference": "x", "features": "clip"}, "'clip' are unknown"),
        ({"reference": "x", "num_images": 9}, "at least 10"),
        ({"reference": "x", "batch_size": 0}, "batches of 0"),
        ({"reference": "x", "rounding": "up"}, "rounding 'up' is unknown: use round or truncate"),
        ({"reference": "x", "distances": "far"}, "distances 'far' are unknown: use exact or adm"),
        ({"reference": "x", "protocol": "adm-imagenet512"}, "is for 1000 classes in 512 pixels"),
        ({"reference": "x", "seeds": [-1]}, "seed must be"),
    ],
)
def test_bad_arguments(tiny, arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate(tiny, ["full"], **arguments)


def test_inception_weights_do_not_fit_the_digits_features(model, tmp_path):
    with pytest.raises(InputError, match="--features inception"):
        evaluate(model, ["full"], num_images=10, feature_weights=tmp_path)


def test_images_that_are_not_finite_are_refused(model, tmp_path):
    broken = ElasticVAR(model.var, VQVAE(model.tokenizer.config), provenance=Provenance(name="digits"))
    torch.nn.init.constant_(broken.tokenizer.decoder.conv_out.bias, float("nan"))
    with pytest.raises(InputError, match=r"d2@2 draws images that are not finite in torch\.float32, 10 of 0 to 9"):
        evaluate(broken, ["d2@2"], num_images=10)


# -- on a disk, killed, and shared -------------------------------------------------------------


def numbers(result: dict) -> list:
    """All scores of a result."""
    return [row["scores"] for row in result["schedules"]]


def test_an_evaluation_goes_on_from_what_was_drawn(model, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "BATCHES", 2)
    options = {"num_images": 30, "batch_size": 5}
    whole = evaluate(model, ["full", "d2@2"], **options)

    def stop(done: int, total: int, what: str) -> None:
        if what == "d2@2: images" and done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, ["full", "d2@2"], folder=tmp_path, progress=stop, **options)
    drawn = []
    again = evaluate(model, ["full", "d2@2"], folder=tmp_path, progress=lambda *step: drawn.append(step), **options)
    assert numbers(again) == numbers(whole)
    images = [step for step in drawn if step[2].endswith(": images") and step[2] != "reference: images"]
    assert images == [(done, 30, "d2@2: images") for done in (15, 20, 25, 30)]
    (folder,) = tmp_path.iterdir()
    assert folder.name == parts.FOLDER
    evaluate(model, ["full"], folder=tmp_path, sampling=Sampling(top_k=5), **options)  # another call, other parts
    assert len(list(folder.iterdir())) == 3
    parts.forget(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def elastic(model, tmp_path_factory) -> Path:
    return save(model, tmp_path_factory.mktemp("elastic") / "model")


def test_ten_kills_lead_to_the_undisturbed_scores(elastic, tmp_path):
    """kill -9 at random moments; what was written to the disk is never drawn again."""
    options = {"num_images": 240}
    undisturbed = evaluation(elastic, tmp_path / "undisturbed", tmp_path / "whole.json", **options)
    undisturbed.join()
    chance, folder, kills = random.Random(0), tmp_path / "killed", 0
    while kills < 10:
        before = len(list(folder.rglob("*.safetensors")))
        process = evaluation(elastic, folder, tmp_path / "result.json", **options)
        while process.is_alive() and len(list(folder.rglob("*.safetensors"))) <= before:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.05)
        assert process.is_alive()  # or there were too few images for so many kills
        process.kill()
        process.join()
        kills += 1
    last = evaluation(elastic, folder, tmp_path / "result.json", **options)
    last.join()
    whole, killed = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "result.json"))
    assert numbers(killed) == numbers(whole)


def test_processes_share_the_images(elastic, tmp_path):
    found = []
    for count in (1, 2, 3):
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        out = tmp_path / f"{count}.json"
        started = [evaluation(elastic, tmp_path / str(count), out, **shared, RANK=str(rank)) for rank in range(count)]
        for process in started:
            process.join()
        result = json.loads(out.read_text())
        assert result["processes"] == count
        found.append(numbers(result))
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            for key in ours:
                assert theirs[key]["value"] == pytest.approx(ours[key]["value"], rel=1e-6)


def test_the_command_shares_its_work_under_torchrun(elastic, tmp_path):
    command = ["-m", "varcompress", "eval", elastic, "--images", 40, "-s", "d2@2", "--features", "digits", "--json"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, *map(str, command), "--device", "cpu", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # of rank 0 alone
    assert (result["processes"], result["command"].split()[1]) == (2, "eval")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"eval.json", "eval.png"}


def test_a_damaged_part_is_drawn_again(model, tmp_path):
    options = {"num_images": 20, "batch_size": 5, "folder": tmp_path}
    whole = evaluate(model, ["full"], **options)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert numbers(evaluate(model, ["full"], **options)) == numbers(whole)


def test_what_features_depend_on_is_in_the_names_of_what_is_kept(model, tmp_path, monkeypatch):
    options = {"num_images": 20, "batch_size": 20, "folder": tmp_path}
    evaluate(model, ["full"], **options)
    monkeypatch.setattr("varcompress.evaluation.features.__version__", "another")
    evaluate(model, ["full"], **options)
    assert len(list((tmp_path / parts.FOLDER).iterdir())) == 2


def test_images_of_other_calls_are_not_mixed(model, tmp_path):
    options = {"num_images": 20, "batch_size": 5, "save_images": tmp_path / "images", "folder": tmp_path / "out"}
    evaluate(model, ["full"], **options)
    (tmp_path / "images" / "full" / "000003.png").unlink()
    evaluate(model, ["full"], **options)  # the same call, which draws what is missing
    assert len(list((tmp_path / "images" / "full").iterdir())) == 20
    with pytest.raises(InputError, match="full: holds images already: name an empty folder"):
        evaluate(model, ["full"], sampling=Sampling(seed=1), **options)


def test_parts_that_another_machine_wrote_elsewhere_are_missed(tmp_path):
    kept = parts.Parts.under(tmp_path, {"a": 1}, 10, 5)
    with pytest.raises(InputError, match=r"the images from 0 on are not there.*--out that they share"):
        kept.read()


def test_scored_images_are_saved_for_other_evaluators(model, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "BATCHES", 2)
    options = {"num_images": 23, "batch_size": 4}
    one = evaluate(model, ["d2@2"], save_images=tmp_path / "images.npz", **options)
    two = evaluate(model, ["d2@2", "full"], save_images=tmp_path / "folder", **options)
    labels = scores.balanced_labels(23, 10)
    drawn = torch.cat([model.generate(labels[i : i + 4], "d2@2", first_index=i) for i in range(0, 23, 4)])
    expected = as_pixels(to_uint8(drawn))
    with np.load(tmp_path / "images.npz") as file:
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], expected)
        np.testing.assert_array_equal(file["arr_1"], labels)
    for index in range(23):
        image = Image.open(tmp_path / "folder" / "d2@2" / f"{index:06}.png")
        np.testing.assert_array_equal(np.asarray(image), expected[index])
    assert len(list((tmp_path / "folder" / "full").iterdir())) == 23
    assert numbers(one)[0]["fd"]["value"] == numbers(two)[0]["fd"]["value"]
    again = evaluate(model, ["full"], reference=tmp_path / "images.npz", **options)  # an .npz that we read as well
    assert again["reference_details"]["images"] == 23


def test_places_that_do_not_take_the_images(model, tmp_path, monkeypatch):
    options = {"num_images": 20, "batch_size": 20}
    with pytest.raises(InputError, match="holds the images of one schedule and seed: name a folder"):
        evaluate(model, ["full", "d2@2"], save_images=tmp_path / "a.npz", **options)
    with pytest.raises(InputError, match="holds the images of one schedule and seed: name a folder"):
        evaluate(model, ["full"], seeds=[1, 2], save_images=tmp_path / "a.npz", **options)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is there as something else"):
        evaluate(model, ["full"], save_images=tmp_path / "file", **options)
    usage = saving.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"the images take .* are free: save to another disk"):
        evaluate(model, ["full"], save_images=tmp_path / "folder", **options)


# -- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """The arguments that open the model from official files, on digits features."""
    folder = tmp_path_factory.mktemp("digits")
    var, vae = official_state(model)
    torch.save(var, folder / "var.pth")
    torch.save(vae, folder / "vae.pth")
    return [folder / "var.pth", "--vae", folder / "vae.pth", "--features", "digits", "--images", 12, "--device", "cpu"]


def test_eval_prints_json(run, files, tmp_path, pixels):
    reference = write_folder(tmp_path / "images", pixels)
    outcome = run(
        "eval", *files, "-s", "full", "-s", "d2@2", "--reference", reference, "--json", "--out", tmp_path / "results"
    )
    assert outcome.exit_code == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert [row["schedule"] for row in result["schedules"]] == ["full", "d2@2"]
    assert result["reference"] == str(reference)
    assert json.loads((tmp_path / "results" / "eval.json").read_text()) == result
    assert Image.open(tmp_path / "results" / "eval.png").width > 100


def test_eval_prints_a_table_and_leaves_no_litter(run, files, tmp_path, pixels, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference = write_npz(tmp_path / "images.npz", arr_0=pixels)
    outcome = run("eval", *files, "-s", "full", "--reference", reference)
    assert outcome.exit_code == 0, outcome.stderr
    assert "FD ↓" in outcome.stdout
    assert "Nothing was written" in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]


def test_eval_writes_into_an_elastic_directory(run, model, tmp_path):
    save(model, tmp_path / "elastic")
    outcome = run("eval", tmp_path / "elastic", "--images", 12, "-s", "d2@2", "--device", "cpu", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    assert "### Image quality" in (tmp_path / "elastic" / "README.md").read_text()
    assert {"eval.json", "eval.png"} <= {path.name for path in (tmp_path / "elastic").iterdir()}
    assert json.loads(outcome.stdout)["reference"] == "embedded digits"
