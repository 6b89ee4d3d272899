"""What papers print of other ways to make VAR-d30 cheaper, and when a result may stand beside it."""

from __future__ import annotations

import re
from typing import NamedTuple

PROTOCOL = "adm-imagenet256"  # that all of these figures are said to follow
BASE = "FoundationVision/var"
VAR_NAME = re.compile(r"var[-_]d\d+")


class Published(NamedTuple):
    """A point of a paper: VAR at 256 pixels, speed-up over VAR-d30. None: not said."""

    method: str
    source: str  # where it is printed
    fid: float
    inception_score: float | None = None
    speedup: float | None = None
    memory: str | None = None  # its peak, as printed
    cache: str | None = None


_VARIANT, _CODE, _HMAR = "arXiv 2511.16546", "arXiv 2411.17787", "arXiv 2506.04421"
PUBLISHED = (
    Published("VAR-d30", _VARIANT, 1.95, 301, 1.0, "39,265 MB", "28,677 MB"),
    Published("VARiant-d16", _VARIANT, 2.05, 314, 1.7, "28,644 MB", "16,092 MB"),
    Published("VARiant-d8", _VARIANT, 2.12, None, 2.6, "−65 %"),
    Published("VARiant-d4", _VARIANT, 2.30, None, None, None, "7.2 GB"),
    Published("VARiant-d2", _VARIANT, 2.97, None, 3.5, "−80 %"),
    Published("CoDe, 9 of 10 steps by d30", _CODE, 1.94, None, 1.2),
    Published("CoDe, 8 of 10 steps by d30", _CODE, 1.98, None, 1.7, "21.0 GB"),
    Published("CoDe, 6 of 10 steps by d30", _VARIANT, 2.27, 297, 2.9, "19,943 MB", "8,156 MB"),
    Published("HMAR-d30", _HMAR, 1.95, None, 1.75, "a third"),
)


def why_apart(result: dict, base_model: str | None) -> str | None:
    """Why an eval result may not stand beside PUBLISHED; None where it may.

    base_model: the Hub's id of what the model was made from, where that is known.
    """
    if result["protocol"] != PROTOCOL:
        return f"the scores follow the protocol {result['protocol']}, those of the papers {PROTOCOL}"
    if result["deviations"]:
        return f"the evaluation departs from {PROTOCOL}"
    if base_model != BASE and not VAR_NAME.match(str(result["model"])):
        return f"the model is not known to be made from {BASE}"
    return None
