"""What the README promises stays true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.benchmarks import attention, plans, step, tables, training
from varcompress.cli.app import COMMANDS

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


def sections():
    """The page, name and text of every section of the docs that a benchmark writes."""
    yield tables.DOCS / "performance.md", "tables", tables.tables()
    for group in dict.fromkeys(row.group for row in training.ROWS.values()):
        yield training.PAGE, group, training.table(group)
    yield training.PAGE, "commands", training.commands()
    yield plans.PAGE, "plans", plans.table()
    for module, name in ((step, "step"), (attention, "attention")):
        yield module.PAGE, name, module.tables()


@pytest.mark.parametrize(("page", "name", "text"), [pytest.param(*found, id=found[1]) for found in sections()])
def test_the_tables_of_the_docs_are_those_of_the_results(page, name, text):
    found = page.read_text(encoding="utf-8").split(tables.begin(name))[1].split(tables.end(name))[0]
    assert found.strip() == text
