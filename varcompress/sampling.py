"""How tokens are drawn: the settings, their published defaults and their bounds. Plain Python, no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import index

from varcompress.errors import InputError

MAX_SEED = 2**63 - 1
MAX_INDEX = 2**62  # leaves room for the images of a call
MAX_CFG = 1000  # beyond any use, and far from float32's end
PUBLISHED_CFG = 1.5

# What a model's guidance is distilled for: one cfg, a range of which each call names one, or None where it is not.
DistilledCfg = float | tuple[float, float] | None


def _setting(default: float | None, help: str, **option: object) -> float:
    """A field with what the command line says of it."""
    return field(default=default, metadata={"help": help, **option})


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are the published settings of VAR's FID (arXiv 2404.02905).

    cfg: weight of classifier-free guidance at the last scale (scale k of K, from 0, has k / (K - 1) of it), below 0 to
    weaken the class (at -1 nothing is left of it, beyond that images turn away from it), None for what `resolved` puts
    in its place: the published 1.5, or what a model was distilled for;
    top_k: tokens of the largest logits to draw from, 0 for all; top_p: mass of the most probable tokens to draw
    from, 0 and 1 for all; seed: of all images, image i of which has the random stream (seed, i).
    Whole numbers of numpy's and bools become int, cfg and top_p float.
    """

    cfg: float | None = _setting(
        None, "Guidance weight; 0 for none.", show_default=f"{PUBLISHED_CFG}, or what the checkpoint was distilled for"
    )
    top_k: int = _setting(900, "Most probable tokens to draw from; 0 for all.", min=0)
    top_p: float = _setting(0.96, "Probability mass to draw from; 0 for all.", min=0, max=1)
    seed: int = _setting(0, "Seed of all images; image i draws from its stream i, in any batch.")

    def __post_init__(self) -> None:
        if self.cfg is not None:
            self._set("cfg", float, is_cfg, f"a number from -{MAX_CFG} to {MAX_CFG}")
        self._set("top_k", index, lambda top_k: top_k >= 0, "a whole number, 0 or more")
        self._set("top_p", float, lambda top_p: 0 <= top_p <= 1, "from 0 to 1")
        self._set("seed", index, lambda seed: 0 <= seed <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}")

    def _set(self, name: str, kind: Callable, holds: Callable, expected: str) -> None:
        object.__setattr__(self, name, checked(name, getattr(self, name), kind, holds, expected))

    @property
    def filters(self) -> dict[str, float]:
        """What the draw leaves out, as its kernel takes it."""
        return {"top_k": self.top_k, "top_p": self.top_p}

    def guidance(self, scale: int, scales: int) -> float:
        """The weight of guidance at `scale` (from 0) of `scales`, once `resolved`."""
        return self.cfg * scale / max(scales - 1, 1)

    def resolved(self, distilled: DistilledCfg) -> Sampling:
        """The same with a cfg: where there is none, the published one, or the nearest that a model was distilled for.

        Raises InputError for a cfg that a model was not distilled for.
        """
        low, high = cfg_bounds(distilled)
        if self.cfg is None:
            return replace(self, cfg=min(max(PUBLISHED_CFG, low), high))
        if not low <= self.cfg <= high:
            remedy = "choose one of these" if low < high else "leave cfg (--cfg) out"
            text = cfg_text(distilled)
            raise InputError(f"cfg {self.cfg}: the guidance of this model is distilled for {text}: {remedy}")
        return self


def checked_cfg(value: object, name: str = "distilled_cfg") -> DistilledCfg:
    """What a model's guidance is distilled for, checked. Raises InputError for what is no cfg, and no range of them.

    name: what the message calls it.
    """
    expected = f"a number from -{MAX_CFG} to {MAX_CFG}, or two of these, the smaller first"
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        return checked(name, value, float, is_cfg, expected)
    found = tuple(checked(name, cfg, float, is_cfg, expected) for cfg in value)
    if len(found) != 2 or not found[0] < found[1]:
        raise InputError(f"{name} must be {expected}, not {value!r}")
    return found


def cfg_bounds(distilled: DistilledCfg) -> tuple[float, float]:
    """The least and the largest cfg that a model can be asked for."""
    if distilled is None:
        return -MAX_CFG, MAX_CFG
    return distilled if isinstance(distilled, tuple) else (distilled, distilled)


def cfg_text(distilled: DistilledCfg) -> str:
    """What a model's guidance is distilled for, in words: cfg 1.5, or cfg 1.0 to 4.0."""
    return f"cfg {' to '.join(map(str, dict.fromkeys(cfg_bounds(distilled))))}"


def is_cfg(number: float) -> bool:
    """Whether a number is a weight of guidance."""
    return abs(number) <= MAX_CFG


def image_index(value: int) -> int:
    """The index of a call's first image, checked; with the seed it is the image's random stream."""
    return checked("first_index", value, index, lambda i: 0 <= i <= MAX_INDEX, f"a whole number from 0 to {MAX_INDEX}")


def checked(name: str, value: object, kind: Callable, holds: Callable, expected: str) -> float:
    """`value` as a number of `kind` that `holds`. Raises InputError that says what was expected."""
    try:
        number = value if isinstance(value, str) else kind(value)
        if holds(number):
            return int(number) if kind is index else number
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{name} must be {expected}, not {value!r}")


DEFAULT = Sampling()  # the cfg is the model's own
PUBLISHED = Sampling(cfg=PUBLISHED_CFG)
