"""The tables of docs/performance.md, from the JSON files of docs/benchmarks.

python -m tests.benchmarks.tables
"""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- tables: written by tests/benchmarks/tables.py -->", "<!-- end of tables -->"
MIB = 2**20


def tables() -> str:
    """The tables of all results, in the order of their files' names."""
    return "\n\n".join(filter(None, [*map(_section, sorted((DOCS / "benchmarks").glob("*.json"))), _gpu()]))


def write_tables() -> str:
    """Write the tables between their marks; return them."""
    text = tables()
    page = DOCS / "performance.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return text


def _section(path: Path) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    head = (
        f"### {content['device']}, {content['dtype']}\n\nTorch {content['torch']}, medians of {content['runs']} "
        f"interleaved runs, smallest and largest in brackets ([{path.name}](benchmarks/{path.name})). "
        f"Kernels: {content['kernels']}. The reference runs in {content['reference_dtype']}."
    )
    return "\n\n".join([head, *(_result(result) for result in content["results"])])


def _result(result: dict) -> str:
    rows = {row["way"]: row for row in result["rows"]}
    reference, full = rows.get("reference"), rows["full"]
    lines = [
        f"**{result['size']}, batch of {result['batch_size']}.** A matrix product reaches "
        f"{result['flops_per_second'] / 1e9:,.0f} GFLOP/s, a copy {result['bytes_per_second'] / 1e9:,.1f} GB/s.\n",
        "| | tokens, ms | of `full` | of the reference | tokens + decoder, ms | of `full` | of the reference "
        "| floor of the tokens, ms | its part of the time | peak, MiB (predicted) | of the reference |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ours = name != "reference"
        low, high = row["tokens_spread_ms"]
        cells = [
            f"`{name}`" if ours else name,
            f"{row['tokens_ms']:,.0f} ({low:,.0f}-{high:,.0f})",
            f"{full['tokens_ms'] / row['tokens_ms']:.2f} x" if ours else "",
            f"{reference['tokens_ms'] / row['tokens_ms']:.2f} x" if ours and reference else "",
            f"{row['whole_ms']:,.0f}",
            f"{full['whole_ms'] / row['whole_ms']:.2f} x" if ours else "",
            f"{reference['whole_ms'] / row['whole_ms']:.2f} x" if ours and reference else "",
            f"{row['floor_ms']:,.0f}" if ours else "",
            f"{row['floor_ms'] / row['tokens_ms']:.0%}" if ours else "",
            f"{row['peak_bytes'] / MIB:,.0f}" + (f" ({row['peak_bytes_predicted'] / MIB:,.0f})" if ours else ""),
            f"{row['peak_bytes'] / reference['peak_bytes']:.2f}" if ours and reference else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + " ".join(_remarks(result, reference, full))


def _remarks(result: dict, reference: dict | None, full: dict) -> list[str]:
    switch = result["switch"]
    remarks = [
        f"The decoder alone takes {full['decoder_ms']:,.0f} ms, {full['decoder_floor_ms'] / full['decoder_ms']:.0%} of "
        "its floor's speed" + (f", and the reference's {reference['decoder_ms']:,.0f} ms "
        f"({reference['decoder_ms'] / full['decoder_ms']:.2f} x)." if reference else "."),
        f"`{switch['schedule']}` takes {switch['after_itself_ms']:,.0f} ms after itself and "
        f"{switch['after_another_ms']:,.0f} ms after `{switch['other']}`.",
    ]  # fmt: skip
    if result["images"]:
        apart = result["images"]
        remarks.append(
            f"Under top_k = 1 in float32 the images of `full` and of the reference ({apart['images']} compared) differ "
            f"by at most {apart['largest_difference']:.1e} of 1, on average {apart['mean_difference']:.1e}."
        )
    return remarks


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
