"""Guidance, top-k, top-p and the draw, with a random stream of its own for every image.

A draw depends on (seed, image, scale, position) alone: the word of `philox.py` for them is the uniform number that
inverts the filtered distribution. So an image does not change with the batch it is drawn in.

No order of the tokens is needed. What a filter keeps is all within some distance of the largest
logit, and the smallest such distance is found by selection on a CPU and by bisection on a GPU,
exactly in both: a float32 that is not negative has the order of its bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varcompress.kernels import constexpr, jit, tl, triton

CPU_CHUNK, GPU_CHUNK = 1 << 18, 1 << 22  # logits filtered at a time: a CPU's cache holds few; not measured on a GPU
BYTES_PER_LOGIT = 28  # of temporaries, at most, for each of them


def draw(
    conditional: Tensor, unconditional: Tensor | None, guidance: float, uniforms: Tensor, *, top_k: int, top_p: float
) -> Tensor:
    """Tokens drawn by inverting the guided and filtered distribution: (B, n) int64.

    conditional, unconditional: (B, n, V) logits; unconditional may be None where guidance is 0.
    uniforms: (B, n) float32 in [0, 1). Guided logits are (1 + guidance) * conditional - guidance *
    unconditional in float32, and tokens are compared by their distance to the largest.

    top-k keeps the k nearest and what ties with the k-th; 0 keeps all. Of these, top-p keeps a
    token when the nearer ones hold less than top_p of the probability; 0 and 1 keep all
    (FoundationVision/VAR, models/helpers.py, but for ties). The token is the first, by index, at
    which the cumulative probability of what is kept exceeds the uniform number; top_k 1 takes the
    first of the largest instead. A largest logit that is NaN or infinite has no distribution: its
    token is -1. Temporaries stay within BYTES_PER_LOGIT for `chunk` logits, or for V where that is more.
    """
    tokens = torch.empty(uniforms.numel(), dtype=torch.int64, device=conditional.device)
    rows = max(1, chunk(conditional.device) // conditional.shape[-1])
    arguments = (conditional.flatten(0, 1), None if unconditional is None else unconditional.flatten(0, 1))
    for start in range(0, len(tokens), rows):
        part = slice(start, start + rows)
        logits = _guide(*(None if logits is None else logits[part] for logits in arguments), guidance)
        top = logits.amax(dim=-1, keepdim=True)
        if top_k == 1:
            drawn = logits.argmax(dim=-1)
        else:
            drawn = _invert(_filter(top - logits, top_k, top_p), uniforms.flatten()[part, None])
        tokens[part] = drawn.masked_fill_(~top.squeeze(-1).isfinite(), -1)
    return tokens.view(uniforms.shape)


def chunk(device: torch.device) -> int:
    """Logits that `draw` filters at a time on a device."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


def _guide(conditional: Tensor, unconditional: Tensor | None, guidance: float) -> Tensor:
    if unconditional is None:
        return conditional.float()
    return torch.sub(conditional.float() * (1 + guidance), unconditional, alpha=guidance)


def _filter(distance: Tensor, top_k: int, top_p: float) -> Tensor:
    """Unnormalised probabilities of the tokens that both filters keep, 0 for the others: (rows, V)."""
    vocab = distance.shape[-1]
    count, nucleus = (top_k if 0 < top_k < vocab else vocab), 0 < top_p < 1
    probs = distance.neg().exp_()
    if count == vocab and not nucleus:
        return probs
    # as integers, which compare faster
    near = distance.view(torch.int32).topk(count, largest=False, sorted=nucleus).values.view(torch.float32)
    if nucleus:
        mass = near.neg().exp_()
        # more than `count` tokens are within the k-th distance when some tie with it
        ties = torch.le(distance, near[:, -1:], out=torch.empty_like(distance)).sum(dim=-1, keepdim=True) - count
        cumulative = mass.cumsum(dim=-1)
        total = cumulative[:, -1:] + ties * mass[:, -1:]
        rank = torch.searchsorted(cumulative, top_p * total).clamp_max_(count - 1)
        limit = near.gather(-1, rank)
    else:
        limit = near.amax(dim=-1, keepdim=True)
    # the comparison as float32: a product with bool is several times slower
    return probs.mul_(torch.le(distance, limit, out=torch.empty_like(distance)))


def _invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds uniform * total: (rows, V), (rows, 1) -> (rows,)."""
    cumulative = probs.cumsum(dim=-1)
    if probs.device.type == "cpu":  # it sums in order: nothing falls, and nothing rises where the probability is 0
        return torch.searchsorted(cumulative, _target(cumulative[:, -1:], uniforms), right=True).squeeze(-1)
    return _first(cumulative, probs, uniforms)


def _first(cumulative: Tensor, probs: Tensor, uniforms: Tensor) -> Tensor:
    """`_invert` where a parallel sum may fall or rise by a rounding: a token of probability 0 is never the first."""
    cumulative = cumulative.masked_fill(probs == 0, 0)
    return (cumulative > _target(cumulative.amax(dim=-1, keepdim=True), uniforms)).int().argmax(dim=-1)


def _target(total: Tensor, uniforms: Tensor) -> Tensor:
    """uniform * total, and less than it, so that some token exceeds it."""
    return torch.minimum(uniforms * total, total.nextafter(torch.zeros_like(total)))


def draw_triton(
    conditional: Tensor,
    unconditional: Tensor | None,
    guidance: float,
    seed: Tensor,
    image_ids: Tensor,
    scale: int,
    *,
    top_k: int,
    top_p: float,
) -> Tensor:
    """`draw` with the numbers of `uniform`, in one kernel: (B, n) int64.

    seed: int64, 0-dim, and image_ids: (B,) int64, both on the logits' device. Logits and image_ids
    are contiguous. Raises ValueError for other shapes and layouts.
    """
    batch, positions, vocab = conditional.shape
    out = torch.empty(batch, positions, dtype=torch.int64, device=conditional.device)
    if unconditional is not None and unconditional.shape != conditional.shape:
        raise ValueError(f"logits of shapes {tuple(conditional.shape)} and {tuple(unconditional.shape)}")
    if image_ids.shape != (batch,) or seed.numel() != 1:
        raise ValueError(f"image_ids must be {(batch,)}, and seed one number")
    if not all(tensor is None or tensor.is_contiguous() for tensor in (conditional, unconditional, image_ids)):
        raise ValueError("logits and image_ids must be contiguous")
    if not seed.dtype == image_ids.dtype == torch.int64:
        raise ValueError("seed and image_ids must be int64")
    block = triton.next_power_of_2(vocab)
    _draw[(positions, batch)](
        conditional,
        unconditional,
        seed,
        image_ids,
        out,
        float(1 + guidance),
        float(guidance),
        scale,
        top_k if 0 < top_k < vocab else vocab,
        float(top_p) if 0 < top_p < 1 else 1.0,
        vocab,
        block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return out


@jit("scale", "top_k")
def _draw(
    conditional_pointer,
    unconditional_pointer,  # None for no guidance
    seed_pointer,
    image_ids_pointer,
    out_pointer,
    gain,
    guidance,
    scale,
    top_k,
    top_p,
    VOCAB: constexpr,
    BLOCK: constexpr,
):
    """One token, its row of logits in registers."""
    position, image = tl.program_id(0), tl.program_id(1)
    row = image.to(tl.int64) * tl.num_programs(0) + position
    token = tl.arange(0, BLOCK)
    inside = token < VOCAB
    logit = tl.load(conditional_pointer + row * VOCAB + token, mask=inside, other=0.0).to(tl.float32)
    if unconditional_pointer is not None:
        other = tl.load(unconditional_pointer + row * VOCAB + token, mask=inside, other=0.0).to(tl.float32)
        logit = tl.fma(other, -guidance, logit * gain)
    # NaN as infinity, because a maximum may pass over it
    top = tl.max(tl.where(inside, tl.where(logit == logit, logit, float("inf")), -float("inf")))
    distance = tl.where(inside, top - logit, float("inf"))
    bits = distance.to(tl.int32, bitcast=True)
    probs = tl.exp(-distance)

    limit = 0x7F800000  # infinity
    if top_k < VOCAB:
        limit = _reach(bits, inside.to(tl.float32), top_k, limit)
        probs = tl.where(bits <= limit, probs, 0.0)
    if top_p < 1:
        limit = _reach(bits, probs, top_p * tl.sum(probs), limit)
        probs = tl.where(bits <= limit, probs, 0.0)

    number = tl.load(image_ids_pointer + image)
    low, high = (number & 0xFFFFFFFF).to(tl.uint32), (number >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(tl.load(seed_pointer), position, scale, low, high)
    uniform = tl.where(top_k == 1, 0.0, (word >> 8).to(tl.float32) * 5.9604644775390625e-08)  # 2^-24
    # A parallel sum may fall by a rounding from one token to the next: never trust it where the probability is 0.
    possible = probs > 0
    exceeds = possible & (tl.cumsum(probs, 0) > uniform * tl.sum(probs))
    drawn = tl.minimum(tl.min(tl.where(exceeds, token, VOCAB)), tl.max(tl.where(possible, token, -1)))
    drawn = tl.where(tl.abs(top) < float("inf"), drawn, -1)
    tl.store(out_pointer + row, drawn)


@jit()
def _reach(bits, measure, goal, high):
    """The smallest limit, at most `high`, within which `measure` sums to `goal`."""
    low = 0
    while low < high:
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(bits <= middle, measure, 0.0)) >= goal
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return low
