"""Block-causal attention in training, forward and backward, by several ways side by side: milliseconds and peak memory.

    python -m tests.benchmarks.attention

Ways: a mask (L, L); a call for each scale, which needs none; FlexAttention's block mask. Writes
docs/benchmarks/attention/NAME.json, and the table of all such files into docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.tables import DOCS, write_section
from varcompress.hardware import choose_device, device_name, timed
from varcompress.models.masks import Layout, masked_attention

FOLDER, PAGE = DOCS / "benchmarks" / "attention", DOCS / "training.md"
SIDES = {
    "256 px": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "512 px": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}


def masked(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    return masked_attention(q, k, v, layout.scale[:, None] >= layout.scale)


def per_scale(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    lengths = layout.scale.bincount().tolist()
    out, end = [], 0
    for part in q.split(lengths, dim=2):
        end += part.shape[2]
        out.append(F.scaled_dot_product_attention(part, k[:, :, :end], v[:, :, :end], scale=1.0))
    return torch.cat(out, dim=2)


def flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    length = len(layout.scale)
    return masked_attention(q, k, v, layout.mask(length, (length,)))


def spent(call: Callable[..., Tensor], qkv: list[Tensor], layout: Layout) -> tuple[float, int]:
    device = qkv[0].device

    def run() -> None:
        call(*qkv, layout).sum().backward()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    elapsed_ms = timed(device, run)[1]
    for tensor in qkv:
        tensor.grad = None
    return elapsed_ms, (torch.cuda.max_memory_allocated(device) - before) if device.type == "cuda" else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--heads", type=int, default=30)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--device")
    parser.add_argument("--name", help="of the JSON file; by default the device's")
    options = parser.parse_args()
    device = choose_device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    content = {"device": device_name(device), "torch": torch.__version__, "images": options.images,
               "heads": options.heads, "dtype": str(dtype).removeprefix("torch."), "results": []}  # fmt: skip
    for name, sides in SIDES.items():
        layout = Layout(sides, device)
        shape = (options.images, options.heads, len(layout.scale), 64)
        q, k = (F.normalize(torch.randn(shape, device=device), dim=-1).to(dtype) for _ in range(2))
        qkv = [(4 * q).requires_grad_(), k.requires_grad_(), torch.randn_like(k).requires_grad_()]
        ways = {"mask": masked, "a call per scale": per_scale}
        if device.type == "cuda":
            ways["FlexAttention"] = flex
        expected = masked(*qkv, layout).detach().float()
        for way, call in ways.items():
            try:
                apart = ((call(*qkv, layout).detach().float() - expected).norm() / expected.norm()).item()
                found = [spent(call, qkv, layout) for _ in range(options.runs + 2)][2:]
            except Exception as error:  # of one way, which the others need not share
                content["results"].append({"layout": name, "way": way, "error": str(error)[:300]})
                continue
            row = {"layout": name, "way": way, "ms": statistics.median(ms for ms, _ in found),
                   "peak_mib": max(peak for _, peak in found) / 2**20, "apart": apart}  # fmt: skip
            content["results"].append(row)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{options.name or device.type}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(tables())
    write_section(PAGE, "attention", tables())


def tables() -> str:
    return "\n\n".join(map(table, sorted(FOLDER.glob("*.json"))))


def table(path: Path) -> str:
    """One file's results."""
    content = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"{content['device']}, {content['images']} images, {content['heads']} heads of 64, {content['dtype']}, torch "
        f"{content['torch']} ([{path.name}](benchmarks/attention/{path.name})).\n",
        "| image | way | ms | memory beside queries, keys, values, MiB | error beside the mask's |",
        "|---|---|---|---|---|",
    ]
    for row in content["results"]:
        figures = (
            [f"{row['ms']:.3g}", f"{row['peak_mib']:,.0f}", f"{row['apart']:.1e}"] if "ms" in row else ["fails"] * 3
        )
        lines.append(f"| {' | '.join([row['layout'], row['way'], *figures])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
