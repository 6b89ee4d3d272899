"""Which layers run at which scale, and what that costs. Plain Python, no torch.

A model of `depth` layers decodes an image in K scales; scale k is a patch_nums[k] x patch_nums[k]
map of tokens. A `Schedule` names the layers that run at each scale (VARiant, arXiv 2511.16546).
The layers in use may only shrink from scale to scale: a layer that was skipped has no cache for
the tokens it missed. Everything else here is arithmetic on that: tokens, cache bytes, FLOPs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from varcompress.errors import InputError

FORMS = "write full, d8, d8@6, 30x6,8x4, or layers by their numbers: d2@6,0+17 or 30x6,0+4+17-20x4"
NUMBER = r"[0-9]{1,6}"  # more digits no model has, and Python refuses thousands in words of its own
RUN = rf"{NUMBER}(?:-{NUMBER})?"
LAYERS = rf"(?={NUMBER}[-+]){RUN}(?:\+{RUN})*"
# part of a list: a count of layers, or layers by number, times a number of scales
PART = re.compile(rf"(?:(?P<count>{NUMBER})|(?P<layers>{LAYERS}))x(?P<scales>{NUMBER})")
SUBNET = re.compile(rf"d(?P<count>{NUMBER})(?:@(?P<bridge>{NUMBER})(?:,(?P<layers>{LAYERS}))?)?")


def equidistant(layers: Iterable[int], depth: int) -> tuple[int, ...]:
    """The `depth` members of `layers` at equal distances, first and last always among them.

    On all D layers this is I_d = { floor(i (D-1) / (d-1)) } of VARiant, section 3.
    """
    layers = tuple(layers)
    if depth == len(layers):
        return layers
    if not 2 <= depth < len(layers):
        raise InputError(f"depth {depth}: a subnet of {len(layers)} layers has 2 to {len(layers)} of them")
    return tuple(layers[i * (len(layers) - 1) // (depth - 1)] for i in range(depth))


def is_subnet(layers: Sequence[object], depth: int) -> bool:
    """Whether these are layers of a model of `depth`: at least one, whole numbers, ascending, each once."""
    if not layers or any(type(layer) is not int for layer in layers):
        return False
    return list(layers) == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < depth


@dataclass(frozen=True)
class Segment:
    """Consecutive scales that run the same layers."""

    scales: range
    layers: tuple[int, ...]
    tokens: int  # tokens of the image when the segment ends: the cache length of each of its layers


@dataclass(frozen=True)
class Schedule:
    """The layers that run at each scale.

    depth: layers of the model; patch_nums: side of each scale's token map;
    layers: for each scale the indices that run, ascending.
    Raises InputError when a layer comes back after it was skipped, naming layer and scale (counted from 1).
    """

    depth: int
    patch_nums: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.patch_nums):
            raise InputError(f"a schedule of {len(self.layers)} scales: this model has {len(self.patch_nums)}")
        allowed = set(range(self.depth))
        for scale, layers in enumerate(self.layers, start=1):
            allowed = self._check(scale, layers, allowed)

    def _check(self, scale: int, layers: tuple[int, ...], allowed: set[int]) -> set[int]:
        """The layers that the next scale may run. Raises InputError for layers that `scale` (from 1) cannot run."""
        if not layers or list(layers) != sorted(set(layers)):
            raise InputError(f"scale {scale}: layers must be ascending and at least one, not {layers}")
        back = sorted(set(layers) - allowed)
        if back and back[0] >= self.depth:
            raise InputError(f"scale {scale} names layer {back[-1]}: this model has layers 0 to {self.depth - 1}")
        if back:
            raise InputError(
                f"layer {back[0]} comes back at scale {scale}: it was skipped before and has no cache; "
                "from scale to scale a schedule may only shrink"
            )
        return set(layers)

    @classmethod
    def after_bridge(cls, layers: Iterable[int], *, depth: int, patch_nums: Iterable[int], bridge: int) -> Schedule:
        """All layers for `bridge` scales, and from then on `layers`."""
        patch_nums, layers = tuple(patch_nums), tuple(layers)
        return cls(depth, patch_nums, (tuple(range(depth)),) * bridge + (layers,) * (len(patch_nums) - bridge))

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        depth: int,
        patch_nums: Iterable[int],
        bridge: int,
        subnets: Mapping[int, tuple[int, ...]] = {},
    ) -> Schedule:
        """Read a schedule's text form; `str` gives it back, in a form that needs no model's bridge or subnets.

        `full`; `d8`: the model's own subnet of 8 layers after its own bridge; `d8@6`: the equidistant subnet of 8
        layers after a bridge of 6 scales; `d2@6,0+17`: the subnet of these layers;
        `30x6,16x2,8x2`: layers x scales, each number of layers at equal distances among those still in use, so that
        it shrinks although the 8 of 30 are not all among the 16 of 30; `30x6,0+4+17-20x4`: layers by their numbers.
        bridge, subnets: the model's own, subnets by their depth; those that are not there are equidistant.
        Raises InputError for a text that is none, or that does not fit the model.
        """
        patch_nums, text = tuple(patch_nums), text.strip().lower()
        scales = len(patch_nums)
        if match := SUBNET.fullmatch(text):
            own = match["bridge"] is None
            bridge = bridge if own else int(match["bridge"])
            if bridge > scales:
                raise InputError(f"schedule {text!r}: a bridge of {bridge} scales, but this model has {scales}")
            subnet = _subnet(match, subnets if own else {}, depth, scale=bridge + 1)
            return cls.after_bridge(subnet, depth=depth, patch_nums=patch_nums, bridge=bridge)
        parts = [(str(depth), scales)] if text == "full" else _parts(text, scales)
        layers: list[tuple[int, ...]] = []
        for part, count in parts:
            in_use = layers[-1] if layers else tuple(range(depth))
            layers += [_layers(part, text, in_use, depth, scale=len(layers) + 1)] * count
        return cls(depth, patch_nums, tuple(layers))

    def __str__(self) -> str:
        """The text that `parse` reads back, letters, digits and @ , + - alone: it names files too."""
        *before, last = self.segments
        every = tuple(range(self.depth))
        if last.layers == every:
            return "full"
        if [segment.layers for segment in before] in ([], [every]):
            count, text = len(last.layers), _text(last.layers, every)
            return f"d{count}@{last.scales[0]}" + (f",{text}" if text != str(count) else "")
        in_use = (every, *(segment.layers for segment in before))
        parts = zip(self.segments, in_use, strict=True)
        return ",".join(f"{_text(segment.layers, among)}x{len(segment.scales)}" for segment, among in parts)

    # -- tokens ---------------------------------------------------------------------------------

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens of the image after each scale; the last is L."""
        return tuple(accumulate(p * p for p in self.patch_nums))

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Runs of scales with equal layers, in order."""
        runs = [list(run) for _, run in groupby(range(len(self.layers)), key=lambda k: self.layers[k])]
        return tuple(Segment(range(r[0], r[-1] + 1), self.layers[r[0]], self.ends[r[-1]]) for r in runs)

    @cached_property
    def layer_tokens(self) -> tuple[int, ...]:
        """Tokens each layer of the model ever sees (0 for a layer that never runs)."""
        return tuple(max((s.tokens for s in self.segments if i in s.layers), default=0) for i in range(self.depth))

    def held(self, layer: int, tokens: int) -> int:
        """How many of the first `tokens` of an image a layer has in its cache at a scale that it runs: all of them."""
        return tokens

    # -- cost -----------------------------------------------------------------------------------

    @cached_property
    def scale_rows(self) -> tuple[int, ...]:
        """Layers x tokens the cache holds during each scale, at the length its segment needs."""
        return tuple(len(s.layers) * s.tokens for s in self.segments for _ in s.scales)

    @property
    def peak_rows(self) -> int:
        """Layers x tokens of cache at its largest."""
        return max(self.scale_rows)

    def cache_bytes(self, *, batch: int, token_bytes: int, guided: bool) -> int:
        """Peak bytes of keys and values for `batch` images (guidance doubles the batch).

        token_bytes: what one layer's keys of one token take, width x element bytes and the like.
        """
        return 2 * batch * (1 + guided) * self.peak_rows * token_bytes

    def flops(self, *, width: int, vocab: int, guided: bool, mlp_ratio: float = 4.0) -> int:
        """FLOPs of the transformer for one image: linear layers, attention and head.

        Two FLOPs per multiply-add. Guidance doubles the rows, but at the first scale its weight is 0, so the head
        reads half of them. The AdaLN vectors are left out: they are computed once per image.
        """
        start, total = 0, 0
        for layers, end in zip(self.layers, self.ends, strict=True):
            tokens = end - start
            linear = 2 * tokens * round((4 + 2 * mlp_ratio) * width * width)
            attention = sum(4 * tokens * self.held(layer, end) * width for layer in layers)
            total += len(layers) * linear + attention + 2 * tokens * width * vocab
            start = end
        return 2 * total - 2 * self.ends[0] * width * vocab if guided else total

    def weights(self, *, width: int, mlp_ratio: float = 4.0) -> tuple[int, ...]:
        """Block weights (matrix elements) read at each scale, AdaLN left out."""
        return tuple(len(layers) * round((4 + 2 * mlp_ratio) * width * width) for layers in self.layers)


@dataclass(frozen=True)
class Gapped(Schedule):
    """A schedule in which a layer may come back after scales that it skipped: to measure, not to ship.

    A layer that comes back sees, of the earlier scales, those that it ran at. Such a schedule shows what a scale alone
    is worth (`only`); nobody gains by it, because the cache of a layer that comes back has to be kept meanwhile.
    """

    @classmethod
    def only(cls, scale: int, layers: Iterable[int], full: Schedule) -> Gapped:
        """`layers` at one scale (from 0), and those of the schedule `full` at all others."""
        others = list(full.layers)
        others[scale] = tuple(layers)
        return cls(full.depth, full.patch_nums, tuple(others))

    def _check(self, scale: int, layers: tuple[int, ...], allowed: set[int]) -> set[int]:
        return super()._check(scale, layers, set(range(self.depth)))

    def __str__(self) -> str:
        """Like that of other schedules, but each depth is drawn from all layers. It does not read back."""
        every = tuple(range(self.depth))
        return ",".join(f"{_text(segment.layers, every)}x{len(segment.scales)}" for segment in self.segments)

    def held(self, layer: int, tokens: int) -> int:
        """Those of the scales that the layer ran at. tokens: of the image at the end of a scale."""
        scales = zip((0, *self.ends), self.ends, self.layers, strict=False)
        return sum(end - start for start, end, layers in scales if end <= tokens and layer in layers)

    @property
    def peak_rows(self) -> int:
        return sum(self.held(layer, self.ends[-1]) for layer in range(self.depth))


@dataclass(frozen=True)
class Together:
    """Schedules that one teacher-forced pass runs side by side: a trunk, and a tail of tokens for each of them.

    The trunk is the tokens of the scales at the start, as many as all schedules run with the same layers: the bridge.
    What follows differs from schedule to schedule, so each has its own copy of the later tokens, which see the trunk
    and themselves. One schedule alone is all trunk. The pieces of the pass are the trunk and the tails, in order.
    """

    schedules: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        if any(isinstance(schedule, Gapped) for schedule in self.schedules):
            raise InputError("a schedule with gaps runs alone: what its layers see is no beginning of an image")

    @cached_property
    def trunk(self) -> int:
        """Tokens that the schedules share."""
        first, ends = self.schedules[0], (0, *self.schedules[0].ends)
        scales = range(len(first.layers))
        differ = (k for k in scales if any(s.layers[k] != first.layers[k] for s in self.schedules))
        return ends[next(differ, len(first.layers))]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each piece."""
        tail = self.schedules[0].ends[-1] - self.trunk
        return (self.trunk, *(tail for _ in self.schedules if tail))

    def seen(self, layer: int) -> tuple[int, ...]:
        """How many tokens of each piece a layer sees: the first ones."""
        return self._seen[layer]

    @cached_property
    def _seen(self) -> tuple[tuple[int, ...], ...]:
        tails, found = len(self.lengths) - 1, []
        for tokens in zip(*(schedule.layer_tokens for schedule in self.schedules), strict=True):
            found.append((min(max(tokens), self.trunk), *(max(seen - self.trunk, 0) for seen in tokens[:tails])))
        return tuple(found)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that any of them runs."""
        return tuple(sorted({layer for schedule in self.schedules for layer in schedule.layers[0]}))


# -- text -----------------------------------------------------------------------------------------


def _parts(text: str, scales: int) -> list[tuple[str, int]]:
    """The parts of a list such as 30x6,0+29x4: what runs (a count, or layers by number), and for how many scales."""
    matches = [PART.fullmatch(part) for part in text.split(",")]
    if not all(matches):
        raise InputError(f"schedule {text!r} is not understood: {FORMS}")
    parts = [(match["count"] or match["layers"], int(match["scales"])) for match in matches]
    total = sum(count for _, count in parts)
    if total != scales or any(count == 0 for _, count in parts):
        raise InputError(f"schedule {text!r}: {total} scales, but this model has {scales}")
    return parts


def _subnet(match: re.Match, subnets: Mapping[int, tuple[int, ...]], depth: int, *, scale: int) -> tuple[int, ...]:
    """The layers of d8, d8@6 or d2@6,0+17, which run from `scale` (from 1) on."""
    text, count = match.string, int(match["count"])
    if count in subnets:
        return subnets[count]
    layers = _layers(match["layers"] or match["count"], text, tuple(range(depth)), depth, scale=scale)
    if len(layers) != count:
        raise InputError(f"schedule {text!r} names {len(layers)} layers: write d{len(layers)}, or name {count}")
    return layers


def _layers(part: str, text: str, in_use: tuple[int, ...], depth: int, *, scale: int) -> tuple[int, ...]:
    """The layers that a part of the schedule `text` names, from `scale` (from 1) on."""
    if not part.isdecimal():
        return tuple(layer for first, last in _runs(part, text, depth) for layer in range(first, last + 1))
    count = int(part)
    if count > depth:
        raise InputError(f"schedule {text!r}: {count} layers, but this model has {depth}")
    if count > len(in_use):
        missing = next(i for i in range(depth) if i not in in_use)
        raise InputError(
            f"schedule {text!r} widens to {count} layers at scale {scale}: "
            f"layer {missing} was skipped before and has no cache; list depths from large to small"
        )
    if count < 2 <= depth:
        raise InputError(f"schedule {text!r}: a subnet has at least 2 layers, the first and the last")
    return equidistant(in_use, count)


def _runs(part: str, text: str, depth: int) -> Iterator[tuple[int, int]]:
    """First and last layer of each run of 0+4+17-20."""
    for run in part.split("+"):
        first, _, last = run.partition("-")
        first, last = int(first), int(last or first)
        if not first <= last < depth:
            raise InputError(f"schedule {text!r} names layers {run}: this model has layers 0 to {depth - 1}, in order")
        yield first, last


def _text(layers: tuple[int, ...], in_use: tuple[int, ...]) -> str:
    """The text of layers: their count where they are equidistant among those in use, else their numbers."""
    count = len(layers)
    return str(count) if count > 1 and layers == equidistant(in_use, count) else _numbered(layers)


def _numbered(layers: tuple[int, ...]) -> str:
    """Layers by number, runs of three and more as a span; one alone is a span too, for 5x4 are five layers."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    if len(layers) == 1:
        return f"{layers[0]}-{layers[0]}"
    return "+".join(
        f"{first}-{last}" if last - first > 1 else "+".join(map(str, range(first, last + 1))) for first, last in runs
    )
