"""Compress pretrained VAR checkpoints: one elastic set of weights whose depth is chosen at run time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "Sampling",
    "Schedule",
    "__version__",
    "distill",
    "evaluate",
    "load",
    "profile",
    "push",
    "save",
    "search",
    "sensitivity",
    "tokenize",
    "write_report",
]

# Names are looked up on first use, so that `varcompress --help` does not wait for torch.
_HOMES = {
    "InputError": "varcompress.errors",
    "Sampling": "varcompress.sampling",
    "Schedule": "varcompress.schedule",
    "distill": "varcompress.training",
    "evaluate": "varcompress.evaluation",
    "load": "varcompress.loading",
    "profile": "varcompress.profiling",
    "push": "varcompress.publish",
    "save": "varcompress.publish",
    "search": "varcompress.depth",
    "sensitivity": "varcompress.depth",
    "tokenize": "varcompress.tokenizing",
    "write_report": "varcompress.reporting",
}

if TYPE_CHECKING:
    from varcompress.depth import search, sensitivity
    from varcompress.errors import InputError
    from varcompress.evaluation import evaluate
    from varcompress.loading import load
    from varcompress.profiling import profile
    from varcompress.publish import push, save
    from varcompress.reporting import write_report
    from varcompress.sampling import Sampling
    from varcompress.schedule import Schedule
    from varcompress.tokenizing import tokenize
    from varcompress.training import distill


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'varcompress' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
