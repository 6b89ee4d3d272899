"""The generation benchmark: what it writes, and what it refuses. No time is asserted."""

from __future__ import annotations

import json
import shlex

import pytest

from tests.benchmarks import generation, training
from tests.benchmarks.tables import section
from varcompress.training.recipe import load_recipe


@pytest.fixture
def run_benchmark(monkeypatch):
    """Run it with the given arguments."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["generation", *map(str, arguments)])
        generation.main()

    return run


def test_it_writes_what_ran_and_prints_its_table(run_benchmark, tmp_path, capsys):
    page = generation.FOLDER.parent / "performance.md"
    before = page.read_bytes()
    run_benchmark("--sizes", "d1", "--batches", 1, "--runs", 1, "--device", "cpu", "--out", tmp_path, "--name", "small")
    assert page.read_bytes() == before
    content = json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))
    assert content["command"].endswith("--sizes d1 --batches 1 --kernels auto --runs 1 --name small")
    (result,) = content["results"]
    assert (result["size"], result["batch_size"], result["images"]) == ("d1", 1, None)
    (row,) = result["rows"]
    assert (row["way"], row["kernels"]) == ("full", "torch")
    assert row["whole_ms"] == row["tokens_ms"] + row["decoder_ms"]
    assert row["images_per_second"] == pytest.approx(1e3 / row["whole_ms"])
    assert row["peak_bytes"] == pytest.approx(row["peak_bytes_predicted"], rel=0.01)
    assert 0 < row["floor_ms"] < row["whole_floor_ms"]
    printed = capsys.readouterr().out
    assert section(tmp_path / "small.json") in printed
    assert "| `full` |" in printed


def test_unguided_calls_are_named(run_benchmark, tmp_path, capsys):
    small = ("--sizes", "d1", "--batches", 1, "--runs", 1, "--device", "cpu")
    run_benchmark(*small, "--out", tmp_path, "--name", "x", "--cfg", 0)
    content = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert content["settings"] == {"cfg": 0, "top_k": 900, "top_p": 0.96}
    assert "--cfg 0 --runs 1" in content["command"]
    (row,) = content["results"][0]["rows"]
    assert row["peak_bytes"] == pytest.approx(row["peak_bytes_predicted"], rel=0.01)
    assert row["cache_bytes"] == 2 * 680 * 64 * 4
    assert "### d1, batch of 1, float32, unguided: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "nowhere"], "nowhere: is no checkout of FoundationVision/VAR"),
        (["--sizes", "big"], "size 'big': write d16 or d30"),
        (["--batches", "8", "0"], "at least 1 is needed"),
        (["--runs", "0"], "at least 1 is needed"),
        (["--cfg", "1e9"], "cfg must be a number from -1000 to 1000"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
    ],
)
def test_wrong_options_are_one_line(run_benchmark, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_benchmark(*arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_batch_that_does_not_fit_loses_nothing(run_benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation, "benchmark", too_large)
    with pytest.raises(SystemExit, match="2"):
        run_benchmark("--sizes", "d1", "--device", "cpu", "--out", tmp_path, "--name", "cut")
    assert "choose a smaller one" in capsys.readouterr().err
    assert json.loads((tmp_path / "cut.json").read_text(encoding="utf-8"))["results"] == [{"size": "d1"}]


def too_large(*_):
    yield {"size": "d1"}
    raise generation.InputError("a batch of 64 images does not fit: choose a smaller one")


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, row in training.ROWS.items() if not row.commit])
def test_every_row_of_the_training_tables_is_a_recipe(name):
    row = training.ROWS[name]
    recipe = load_recipe(row.recipe, row.settings)
    assert shlex.split(row.command)[:5] == ["varcompress", "distill", "digits", "--recipe", recipe.name]
    settings = [value for value in shlex.split(row.command) if "=" in value and "seed" not in value]
    assert load_recipe(row.recipe, settings) == recipe


@pytest.mark.parametrize("name", [name for name, row in training.ROWS.items() if row.commit])
def test_a_row_of_an_earlier_version_ran_what_its_command_says(name, monkeypatch, capsys):
    row = training.ROWS[name]
    found = json.loads((training.FOLDER / f"{name}-0.json").read_text(encoding="utf-8"))
    key, value = row.settings[0].split("=")
    assert (found["commit"], found["recipe"]["name"], str(found["recipe"][key])) == (row.commit, row.recipe, value)
    assert row.command.startswith(f"git checkout {row.commit} && varcompress distill digits ")
    monkeypatch.setattr("sys.argv", ["training", name])
    with pytest.raises(SystemExit, match="2"):
        training.main()
    assert f"{name} has keys of an earlier version: git checkout {row.commit}" in capsys.readouterr().err


def test_work_is_counted_in_passes_of_the_full_network():
    one = load_recipe("variant-digits", ["epochs_full=1", "epochs_ramp=0", "epochs_subnet=0", "p_start=0"])
    assert training.units(one) == pytest.approx(26)  # steps of 64 images
    assert training.units(load_recipe("variant-digits", ["p_start=0", "p_end=0", "loss=kl", "teacher=frozen"])) == (
        pytest.approx(18 * 26 * 4 / 3)  # the teacher's forward pass is a third
    )
    four = {"epochs": 1, "depth_probability": "{16: 1, 8: 1, 4: 1, 2: 1}", "label_drop": 0.1}
    settings = [f"{key}={value}" for key, value in four.items()] + ["guidance=classifier-free", "cfg=null"]
    # 5 tokens of all 30 layers, and 25 of 16 + 8 + 4 + 2: together as many as 30 layers have of 30
    assert training.units(load_recipe("digits", settings)) == pytest.approx(106 / 4 * (1 + 1 / 3))


def test_a_table_has_means_and_spreads(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "FOLDER", tmp_path)
    monkeypatch.setattr(training, "PAGE", tmp_path / "page.md")
    for seed, score in ((0, 30.0), (1, 32.0), (2, 34.0)):
        labels = dict.fromkeys(training.LABELS, score)
        line = {"recipe": load_recipe("digits").to_dict(), "units": 322.0, "fd": labels, "heldout": {"kl": labels}}
        (tmp_path / f"ours-{seed}.json").write_text(json.dumps(line))
    table = training.table("guidance")
    assert "| `digits` | 3 | 848 x 16 | 322 | 32.0 ± 2.0 |" in table
    assert "| 32.000 ± 2.000 |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
    line["subnets"] = {"4": [0, 5, 6, 29], "2": [0, 29]}
    (tmp_path / "sensitivity-0.json").write_text(json.dumps(line))
    assert "98 units more; d4 {0, 5, 6, 29}, d2 {0, 29} | 1 |" in training.table("options")
    names = ("strategy", "guidance", "options", "commands")
    marks = [f"<!-- {name}: written by tests/benchmarks -->\nold\n<!-- end of {name} -->\n" for name in names]
    (tmp_path / "page.md").write_text("".join(marks))
    monkeypatch.setattr("sys.argv", ["training", "--tables"])
    training.main()
    page = (tmp_path / "page.md").read_text()
    assert table in page
    assert "old" not in page
    assert "- `digits`: `varcompress distill digits --recipe digits --set seed=SEED --out DIR`" in page
    assert "AdamW" not in page  # of which nothing was measured
