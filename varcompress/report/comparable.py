"""Which results may stand on one page: those that differ in the model and its schedules alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from varcompress.errors import InputError
from varcompress.results import EVAL, intact

MACHINE = ("device", "dtype")  # what results of any kind must share, since each tells of speed


def check_comparable(results: Mapping[str, dict]) -> None:
    """Raises InputError, which says why, where two results cannot be compared. results: where one is from -> it."""
    facts = {source: _facts(source, result) for source, result in results.items()}
    for source, other in combinations(results, 2):
        ours, theirs = facts[source], facts[other]
        same_kind = results[source]["kind"] == results[other]["kind"]
        for name in {**ours, **theirs} if same_kind else MACHINE:
            if ours.get(name) != theirs.get(name):
                raise InputError(
                    f"{source} and {other} are not comparable: {name} is {_said(ours.get(name))} in the one and "
                    f"{_said(theirs.get(name))} in the other: measure both alike, or write a page for each"
                )


def _facts(source: str, result: dict) -> dict[str, object]:
    """All that times, sizes and scores depend on beside the model and its schedules."""
    with intact(source, result):
        facts = {name: result[name] for name in (*MACHINE, "kernels")} | {"batch size": result["batch_size"]}
        if result["kind"] != EVAL:
            return facts
        reference, features = result["reference_details"], result["features"]
        return {
            "protocol": result["protocol"],
            "reference": f"{str(result['reference']).rpartition('/')[2]} ({reference['digest']})",
            "features": f"{features['printed']} ({str(features['sha256'])[:16]})",
            **{f"setting {name}": value for name, value in result["settings"].items()},
            **facts,
        }


def _said(value: object) -> str:
    return "not said" if value is None else " ".join(str(value).split())
