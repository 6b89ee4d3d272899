"""Which results may stand on one page: those that differ in the model and its schedules alone.

A directory shows one model.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from varcompress.errors import InputError
from varcompress.results import EVAL, SENSITIVITY, intact

MACHINE = ("device", "dtype")  # what all results that tell of speed must share


def check_comparable(results: Mapping[str, dict]) -> None:
    """Raises InputError, which says why, where two results cannot be compared. results: where one is from -> it."""
    facts = {source: _facts(source, result) for source, result in results.items()}
    for source, other in combinations(results, 2):
        ours, theirs = facts[source], facts[other]
        same_kind = results[source]["kind"] == results[other]["kind"]
        shared = [name for name in MACHINE if name in ours and name in theirs]
        for name in {**ours, **theirs} if same_kind else shared:
            if ours.get(name) != theirs.get(name):
                raise InputError(
                    f"{source} and {other} are not comparable: {name} is {_said(ours.get(name))} in the one and "
                    f"{_said(theirs.get(name))} in the other: measure both alike, or write a page for each"
                )


def check_one_model(results: Mapping[str, dict]) -> None:
    """Raises InputError where the results of one directory are of several weights. results: where one is from -> it."""
    first, *others = results.items() or [("", {})]
    for source, result in others:
        if result.get("weights") != first[1].get("weights"):
            raise InputError(
                f"{first[0]} and {source} are of different weights: measure both on the same, or take one away"
            )


def _facts(source: str, result: dict) -> dict[str, object]:
    """All that times, sizes and scores depend on beside the model and its schedules."""
    with intact(source, result):
        if result["kind"] == SENSITIVITY:  # which tells no speed
            data = result["data"]
            return {"data": f"{data['name']} ({str(data['digest'])[:16]})", "images": data["images"]}
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
