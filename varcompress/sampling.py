"""How tokens are drawn: the settings, their published defaults and their bounds. Plain Python, no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import index

from varcompress.errors import InputError

MAX_SEED = 2**63 - 1
MAX_INDEX = 2**62  # leaves room for the images of a call
MAX_CFG = 1000  # beyond any use, and far from float32's end


def _setting(default: float, help: str, **bounds: float) -> float:
    """A field with what the command line says of it."""
    return field(default=default, metadata={"help": help, **bounds})


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are the published settings of VAR's FID (arXiv 2404.02905).

    cfg: weight of classifier-free guidance at the last scale (scale k of K, from 0, has k / (K - 1) of it);
    top_k: tokens of the largest logits to draw from, 0 for all; top_p: mass of the most probable tokens to draw
    from, 0 and 1 for all; seed: of all images, image i of which has the random stream (seed, i).
    Whole numbers of numpy's and bools become int, cfg and top_p float.
    """

    cfg: float = _setting(1.5, "Guidance weight.")
    top_k: int = _setting(900, "Most probable tokens to draw from; 0 for all.", min=0)
    top_p: float = _setting(0.96, "Probability mass to draw from; 0 for all.", min=0, max=1)
    seed: int = _setting(0, "Seed of all images; image i draws from its stream i, in any batch.")

    def __post_init__(self) -> None:
        self._set("cfg", float, lambda cfg: abs(cfg) <= MAX_CFG, f"a number from -{MAX_CFG} to {MAX_CFG}")
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
        """The weight of guidance at `scale` (from 0) of `scales`."""
        return self.cfg * scale / max(scales - 1, 1)


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


PUBLISHED = Sampling()
