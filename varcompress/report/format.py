"""How tables, plots and cards write numbers, scores and names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from varcompress.data.hub_dataset import PREFIX
from varcompress.hub import HUB_ID
from varcompress.results import EvalResult, Score

MIB = 2**20
NOT_GIVEN = "\N{EN DASH}"
LONG_NAME = 16
MODEL_AT = 2  # of the words of a command: varcompress eval MODEL
BESIDE = "--beside"  # names a model too


def number(value: float | None) -> str:
    """Three figures, or all before the point; a dash for None."""
    if value is None:
        return NOT_GIVEN
    places = next((places for limit, places in ((100, 0), (10, 1), (1, 2), (0.1, 3)) if abs(value) >= limit), None)
    return f"{value:.3g}" if places is None else f"{value:,.{places}f}"


def short(value: float) -> str:
    """Two figures and no leading zero, for a cell of a picture: .014, 1.3, 228."""
    text = f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def percent(share: float, digits: int = 0) -> str:
    """A share of 1 in percent."""
    return f"{share:.{digits}%}"


def mebibytes(size_bytes: float | None) -> str:
    """Bytes as a number of MiB."""
    return number(None if size_bytes is None else size_bytes / MIB)


def count(things: int, thing: str) -> str:
    """1 image, 2,000 images."""
    return f"{things:,} {thing}{'' if things == 1 else 's'}"


def score(found: Score | None) -> str:
    """A score, half of its interval, and ≈ where its difference to the first schedule is within the noise."""
    return plain(found) + (" ≈" if found and within_noise(found) else "")


def plain(found: Score | None) -> str:
    """A score and half of its interval."""
    return NOT_GIVEN if found is None else f"{number(found['value'])} ± {half(found)}"


def half(found: Score) -> str:
    """Half of a score's interval, in two figures or all before the point."""
    size = (found["interval"][1] - found["interval"][0]) / 2
    return f"{size:.2g}" if size < 10 else f"{size:,.0f}"


def within_noise(found: Score) -> bool:
    """Whether the interval of a score's difference to the first schedule holds 0."""
    low, high = found.get("difference_interval", (1, 1))
    return low <= 0 <= high


def label(row: dict) -> str:
    """What a line of a result is called: its schedule, or the model that was scored beside."""
    return row.get("model") or row["schedule"]


def joined(values: Iterable) -> str:
    """1, 2, 3."""
    return ", ".join(map(str, values))


def folded(schedule: str) -> str:
    """A long schedule name on several lines, broken after a comma or, between layers, after a plus."""
    lines = [""]
    for part in re.findall(r"[^,+]+[,+]?", schedule):
        if len(lines[-1]) + len(part) > LONG_NAME:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def where(result: dict) -> str:
    """The model of a result, its device, its dtype, and how it ran where that is not as usual."""
    usual = {"kernels": "torch", "cache_dtype": result["dtype"], "offload": None}
    said = [f"{key.replace('_', ' ')} {result[key]}" for key, value in usual.items() if result.get(key, value) != value]
    if result.get("packed_weights"):
        said.append("packed weights")
    if not result.get("guided", True):
        said.append("unguided")
    return joined([f"{result['model']} on {result['device']}", result["dtype"], *said])


def drawn_with(settings: dict) -> str:
    """How the images of an eval were drawn and scored."""
    said = {**settings, "seeds": " ".join(map(str, settings["seeds"]))}
    return joined(f"{name.replace('_', ' ')} {value}" for name, value in said.items() if name != "images")


def kept_to(result: EvalResult) -> str:
    """The protocol of an eval, and in what the eval departs from it."""
    if not result["deviations"]:
        return f"protocol {result['protocol']}"
    return f"protocol {result['protocol']}*, departing from it: {joined(result['deviations'])}"


def settings(change: dict) -> str:
    """Values of a recipe as options of `distill` that set them."""
    written = {key: str(value).lower() if isinstance(value, bool) else value for key, value in change.items()}
    return " ".join(f"--set {key}={value}" for key, value in written.items())


def public(result: dict) -> dict:
    """A result without the folders in which its reference and files lay: the publisher's paths stay private."""
    shown = {"reference": Path(str(result["reference"])).name} if "reference" in result else {}
    if result.get("command"):
        shown["command"] = _without_folders(str(result["command"]))
    return result | shown


def _without_folders(command: str) -> str:
    """A command in which every path is a name alone. What is on the Hub stays whole.

    It does not ask the disk: a report may be written elsewhere than the command was called.
    """
    try:
        given = shlex.split(command)
    except ValueError:  # what no shell would read
        given = command.split()
    words, before = [], ""
    for place, word in enumerate(given):
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        is_model = place == MODEL_AT or BESIDE in (option, before)
        words.append(option + equals + (value if _on_hub(value, is_model) else _name(value)))
        before = word
    return shlex.join(words)


def _on_hub(value: str, is_model: bool) -> bool:
    """Whether a value names what is on the Hub: a data set, or OWNER/NAME where a model is named."""
    return value.startswith(PREFIX) or (is_model and bool(HUB_ID.fullmatch(value)) and not value.endswith(".pth"))


def _name(value: str) -> str:
    """The last part of a path; other values hold no slash."""
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
