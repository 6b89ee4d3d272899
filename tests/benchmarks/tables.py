"""The tables of docs/performance.md, from the JSON files of docs/benchmarks.

python -m tests.benchmarks.tables
"""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
MIB = 2**20


def tables() -> str:
    """The tables of all results, in the order of their files' names."""
    return "\n\n".join(filter(None, [*map(section, sorted((DOCS / "benchmarks").glob("*.json"))), _gpu()]))


def write_tables() -> str:
    """Write the tables between their marks; return them."""
    text = tables()
    write_section(DOCS / "performance.md", "tables", text)
    return text


def write_section(page: Path, name: str, text: str) -> None:
    """Put a text between its marks in a page."""
    before, rest = page.read_text(encoding="utf-8").split(begin(name))
    after = rest.split(end(name))[1]
    page.write_text(f"{before}{begin(name)}\n\n{text}\n\n{end(name)}{after}", encoding="utf-8")


def begin(name: str) -> str:
    return f"<!-- {name}: written by tests/benchmarks -->"


def end(name: str) -> str:
    return f"<!-- end of {name} -->"


def section(path: Path) -> str:
    """The tables of one file of results."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return "\n\n".join(_result(content, result, path.name) for result in content["results"])


def _result(content: dict, result: dict, file: str) -> str:
    rows = {row["way"]: row for row in result["rows"]}
    reference, full = rows.get("reference"), rows["full"]
    unguided = "" if content["settings"]["cfg"] else ", unguided"
    lines = [
        f"### {result['size']}, batch of {result['batch_size']}, {content['dtype']}{unguided}: {content['device']}\n",
        f"`{content['command']}` ([{file}](benchmarks/{file}), {content['date']}, commit {content['commit']}, torch "
        f"{content['torch']}). Medians of {content['runs']} interleaved runs, smallest and largest in brackets; load "
        f"average before {content['load_average_before']:.2f}. A matrix product reaches "
        f"{result['flops_per_second'] / 1e9:,.0f} GFLOP/s, a copy {result['bytes_per_second'] / 1e9:,.1f} GB/s.\n",
        "| | tokens, ms | of `full` | of the reference | floor, ms | tokens + decoder, ms | images/s | of `full` "
        "| of the reference | floor, ms | peak, MiB (predicted) | of the reference |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ours = name != "reference"
        cells = [f"`{name}`" if ours else name]
        for part, floor in (("tokens", "floor_ms"), ("whole", "whole_floor_ms")):
            time = f"{part}_ms"
            cells.append(_time(row, part))
            cells += [f"{row['images_per_second']:.3g}"] if part == "whole" else []
            cells.append(f"{full[time] / row[time]:.2f} x" if ours else "")
            cells.append(f"{reference[time] / row[time]:.2f} x" if ours and reference else "")
            cells.append(f"{_ms(row[floor])}: {row[floor] / row[time]:.0%}" if ours else "")
        cells.append(
            f"{row['peak_bytes'] / MIB:,.0f}" + (f" ({row['peak_bytes_predicted'] / MIB:,.0f})" if ours else "")
        )
        cells.append(f"{row['peak_bytes'] / reference['peak_bytes']:.2f}" if ours and reference else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + " ".join(_remarks(content, result, reference, full))


def _time(row: dict, part: str) -> str:
    low, high = row[f"{part}_spread_ms"]
    return f"{_ms(row[f'{part}_ms'])} ({_ms(low)}-{_ms(high)})"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _remarks(content: dict, result: dict, reference: dict | None, full: dict) -> list[str]:
    switch = result["switch"]
    remarks = [
        f"{_ways(result)} The decoder alone takes {_time(full, 'decoder')} ms, "
        f"{result['decoder_floor_ms'] / full['decoder_ms']:.0%} of its floor's speed"
        + (f", and the reference's {_time(reference, 'decoder')} ms "
        f"({reference['decoder_ms'] / full['decoder_ms']:.2f} x)." if reference else "."),
        f"`{switch['schedule']}` takes {_ms(switch['after_itself_ms'])} ms after itself and "
        f"{_ms(switch['after_another_ms'])} ms after `{switch['other']}`.",
    ]  # fmt: skip
    if reference:
        remarks.append(
            f"The reference runs in {content['reference_dtype']}, attention: {result['reference_attention']}."
        )
    if result["images"]:
        apart = result["images"]
        remarks.append(
            f"Under top_k = 1 in float32 the images of `full` and of the reference ({apart['images']} compared) differ "
            f"by at most {apart['largest_difference']:.1e} of 1, on average {apart['mean_difference']:.1e}."
        )
    return remarks


def _ways(result: dict) -> str:
    """What our rows ran with."""
    names = {"torch": "plain torch", "triton": "Triton kernels"}
    ran = {row["way"].partition(", ")[2]: row for row in result["rows"] if row["kernels"]}
    said = [
        f"{f'those with `{choice}`' if choice else 'Ours run'} {names[row['kernels']]}, "
        f"{'packed weights' if row['packed_weights'] else 'weights as they are'}"
        for choice, row in ran.items()
    ]
    return "; ".join(said) + "."


def _gpu() -> str:
    """An empty table where no file of a GPU is there: nothing is guessed."""
    found = [json.loads(path.read_text(encoding="utf-8"))["kind"] for path in (DOCS / "benchmarks").glob("*.json")]
    if "cuda" in found:
        return ""
    rows = [f"| {size}, batch of {batch} | | | |" for size in ("d16", "d30") for batch in (1, 8, 64)]
    return "\n".join(
        [
            "### GPU, bfloat16\n\nNot measured: no GPU was at hand.\n",
            "| | reference, ms | `full`, ms | d16 / d8 / d4 / d2, ms |",
            "|---|---|---|---|",
            *rows,
        ]
    )


if __name__ == "__main__":
    print(write_tables())
