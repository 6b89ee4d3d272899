"""Results replace no file that is not theirs, and go with no weights but their own."""

from __future__ import annotations

import json

import pytest

from tests.test_card import EVAL, PROFILE
from varcompress.errors import InputError
from varcompress.metrics import METRICS
from varcompress.profiling import profile
from varcompress.results import (
    CacheEffect,
    ProfileResult,
    ProfileRow,
    Unguided,
    check_folder,
    check_owner,
    check_weights,
    read_result,
    results_in,
    write_result,
)


@pytest.mark.parametrize("result", [PROFILE, EVAL, {"kind": "demo", "schedules": []}])
def test_a_result_is_written_and_kept_when_a_newer_one_comes(tmp_path, result):
    folder = tmp_path / "new" / "place"
    path = write_result(result, folder)
    assert path == folder / f"{result['kind']}.json"
    assert json.loads(path.read_text()) == result
    earlier = path.read_text()
    write_result({**result, "runs": 7}, folder)
    assert json.loads(path.read_text())["runs"] == 7
    assert path.with_name(f"{path.name}.old").read_text() == earlier
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("content", ["not json", "[]", '{"kind": "eval"}', "{}"])
def test_files_of_others_stay(tmp_path, content):
    (tmp_path / "profile.json").write_text(content)
    with pytest.raises(InputError, match="holds something else"):
        write_result(PROFILE, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("profile.json", content)]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, not a directory"):
        check_folder(tmp_path / "file", "profile")


def test_what_lies_in_a_folder(tmp_path):
    for name in ("eval-10", "profile", "eval-2", "eval"):
        write_result(EVAL, tmp_path / name)
        (tmp_path / name / "eval.json").rename(tmp_path / f"{name}.json")
    (tmp_path / "config.json").write_text('{"format": 1}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "demo.json").write_text('{"kind": "demo"}')
    assert [path.stem for path in results_in(tmp_path)] == ["eval", "eval-2", "eval-10", "profile"]
    assert read_result(tmp_path / "eval.json") == EVAL
    with pytest.raises(InputError, match=r"demo.json: not a result: give what profile or eval wrote \(KIND.json\)"):
        read_result(tmp_path / "demo.json")


def test_whose_weights(tmp_path):
    mine = {**PROFILE, "weights": "a" * 16}
    check_weights("here", mine, {"a" * 16, "b" * 16})
    write_result(mine, tmp_path)
    check_owner(tmp_path, "a" * 16)
    with pytest.raises(InputError, match="here: was not measured on these weights: measure them with `varcompress pro"):
        check_weights("here", mine, {"b" * 16})
    write_result(EVAL, tmp_path)  # which says not of which weights it is
    with pytest.raises(InputError, match=r"eval.json, profile.json there would belong to other weights"):
        check_owner(tmp_path, "a" * 16)


def test_a_score_is_called_by_its_features():
    on_inception = [metric.name("inception") for metric in METRICS.values()]
    assert on_inception == ["FID", "sFID", "IS", "KID", "precision", "recall", "density", "coverage"]
    for metric in METRICS.values():
        assert metric.name("dinov2").startswith("dinov2 ")
        assert "FID" not in metric.name("dinov2")
        assert "KID" not in metric.name("dinov2")


def test_a_result_of_another_version_is_measured_again(tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps({"kind": "eval", "schedules": []}))
    with pytest.raises(InputError, match="of another version of varcompress: measure it again with `varcompress eval`"):
        read_result(tmp_path / "eval.json")


def test_fields_are_those_of_a_measured_result(tiny):
    result = profile(tiny, ["full"], batch_size=1, runs=1, warmup=0)
    assert set(result) == set(ProfileResult.__annotations__)
    optional = {*CacheEffect.__annotations__, *Unguided.__annotations__}
    assert set(result["schedules"][0]) == set(ProfileRow.__annotations__) - optional
