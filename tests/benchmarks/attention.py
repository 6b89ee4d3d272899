"""Block-causal attention in training, forward and backward, by several ways side by side: milliseconds and peak memory.

    python -m tests.benchmarks.attention

Ways: a mask (L, L); a call for each scale, which needs none; FlexAttention's block mask.
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
from torch.nn.attention import sdpa_kernel

from varcompress.hardware import choose_device, device_name, timed
from varcompress.models.transformer import MASKED_BACKENDS, Layout

SIDES = {
    "256 px": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "512 px": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}


def masked(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    with sdpa_kernel(MASKED_BACKENDS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask, scale=1.0)


def per_scale(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    lengths = layout.scale.bincount().tolist()
    out, end = [], 0
    for part in q.split(lengths, dim=2):
        end += part.shape[2]
        out.append(F.scaled_dot_product_attention(part, k[:, :, :end], v[:, :, :end], scale=1.0))
    return torch.cat(out, dim=2)


def flex(layout: Layout) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    scale, length = layout.scale, len(layout.scale)
    mask = create_block_mask(lambda b, h, i, j: scale[i] >= scale[j], None, None, length, length, device=scale.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v, _: compiled(q, k, v, block_mask=mask, scale=1.0)


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
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = choose_device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    content = {"device": device_name(device), "torch": torch.__version__, "images": options.images, "results": []}
    for name, sides in SIDES.items():
        layout = Layout.of(sides, device)
        shape = (options.images, options.heads, len(layout.scale), 64)
        q, k = (F.normalize(torch.randn(shape, device=device), dim=-1).to(dtype) for _ in range(2))
        qkv = [(4 * q).requires_grad_(), k.requires_grad_(), torch.randn_like(k).requires_grad_()]
        ways = {"mask": masked, "a call per scale": per_scale}
        if device.type == "cuda":
            ways["FlexAttention"] = flex(layout)
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
        for row in content["results"]:
            if row["layout"] == name:
                print(row, flush=True)
    if options.out:
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
