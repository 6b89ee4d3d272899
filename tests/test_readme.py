"""What the README promises stays true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import attention, plans, saves, scores, step, tables, training
from varcompress.cli.app import COMMANDS, app
from varcompress.loading import outline
from varcompress.training.budget import GPUS, IMAGENET, UTILISATION, budget
from varcompress.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_second_command():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_every_command_is_in_the_table():
    table = set(re.findall(r"^\| `(\w+)", README, flags=re.MULTILINE))
    assert {name for name, *_ in COMMANDS} | {"recipes"} <= table


def test_the_layout_names_every_file():
    layout = README.split("## Layout")[1].split("```")[1]
    for path in (ROOT / "varcompress").iterdir():
        if path.name[0] not in "_." and (path.suffix == ".py" or path.is_dir()):
            assert path.name in layout, path.name


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def commands():
    """Every call of `varcompress` in a block of commands: its arguments."""
    for text in (README, *(page.PAGE.read_text(encoding="utf-8") for page in (training, scores))):
        for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            yield from re.findall(r"varcompress ([a-z].*)$", block.replace("\\\n", " "), flags=re.MULTILINE)


@pytest.mark.parametrize("arguments", list(dict.fromkeys(commands())))
def test_commands_are_spelt_as_they_are_read(arguments):
    name, *rest = shlex.split(arguments)
    command = typer.main.get_command(app).commands[name]
    while rest and rest[0] in getattr(command, "commands", ()):
        command = command.commands[rest.pop(0)]
    given = command.make_context(name, rest).params  # raises for an option that there is not
    if name == "distill" and given["recipe"]:
        load_recipe(given["recipe"], given["settings"] or ())


def hours(what):
    """The hours that docs/training.md says a stage takes on eight GPUs and on one."""
    row = next(line for line in training.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {what}"))
    return [float(cell) for cell in row.split("|")[2:4]]


@pytest.mark.parametrize(
    ("what", "ways"),
    [
        ("`distill`, `variant-d30`", [("variant-d30", ()), ("variant-d30-1gpu", ())]),
        ("`distill`, `distil-d30`", [("distil-d30", ()), ("distil-d30", ["accumulation=64"])]),
    ],
)
def test_hours_of_training_are_those_of_the_plan(what, ways):
    for said, devices, (recipe, settings) in zip(hours(what), (8, 1), ways, strict=True):
        rate = {"devices": devices, "flops_per_second": GPUS["h100"].flops_per_second}
        found = budget(outline("var-d30"), load_recipe(recipe, settings), **rate)
        assert found["fits"]
        assert said == round(found["seconds"] / 3600)


def test_hours_of_encoding_are_those_of_the_encoder():
    tokenizer = outline("var-d30").tokenizer
    size = tokenizer.config.image_size
    with FlopCounterMode(display=False) as counter:
        tokenizer.quant_conv(tokenizer.encoder(torch.empty(1, 3, size, size, device="meta")))
    flops = counter.get_total_flops()
    assert f"{flops / 1e9:.0f} GFLOPs an image" in training.PAGE.read_text(encoding="utf-8")
    seconds = IMAGENET * flops / (UTILISATION * 67e12)  # an H100's FLOP/s in float32, by its data sheet
    assert hours("`tokenize`") == [round(seconds / devices / 3600, 1) for devices in (8, 1)]


def sections():
    """The page, name and text of every section of the docs that a benchmark writes."""
    yield tables.DOCS / "performance.md", "tables", tables.tables()
    for group in dict.fromkeys(row.group for row in training.ROWS.values()):
        yield training.PAGE, group, training.table(group)
    yield training.PAGE, "commands", training.commands()
    yield plans.PAGE, "plans", plans.table()
    for name, text in scores.sections().items():
        yield scores.PAGE, name, text
    for module, name in ((step, "step"), (attention, "attention"), (saves, "saves")):
        yield module.PAGE, name, module.tables()


@pytest.mark.parametrize(("page", "name", "text"), [pytest.param(*found, id=found[1]) for found in sections()])
def test_the_tables_of_the_docs_are_those_of_the_results(page, name, text):
    found = page.read_text(encoding="utf-8").split(tables.begin(name))[1].split(tables.end(name))[0]
    assert found.strip() == text
