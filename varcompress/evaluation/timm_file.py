"""Any network in the form in which timm's are published: a .safetensors file with its config.json beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from varcompress.errors import InputError
from varcompress.evaluation.network import FeatureNetwork, not_fid
from varcompress.evaluation.timm_features import Preparation, TimmFeatures, need

CONFIG, WEIGHTS, SUFFIX = "config.json", "model.safetensors", ".safetensors"
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # of Pillow
MAX_SIDE = 1024  # pixels
MAX_CLASSES = 100_000
# What a config.json may tell timm about the architecture; anything else could make it fetch or open other files.
MODEL_ARGS = ("img_size", "global_pool", "dynamic_img_size", "drop_rate", "drop_path_rate")


@dataclass(frozen=True)
class Published:
    """What config.json says of a network: timm's name of its architecture, its tag, how it is built and fed."""

    architecture: str
    tag: str
    num_classes: int
    fixed_size: bool
    preparation: Preparation
    model_args: dict[str, Any] = field(default_factory=dict)

    @property
    def printed(self) -> str:
        height, width = self.preparation.size
        name = f"{self.architecture}.{self.tag}" if self.tag else self.architecture
        return f"{name} at {height} x {width}, {self.preparation.interpolation}"


def is_file(name: str) -> bool:
    """Whether features of this name are meant as a file: it ends as one, or is there."""
    path = Path(name).expanduser()
    return path.suffix == SUFFIX or path.exists()


def network_of_file(name: str) -> FeatureNetwork:
    """The feature network in a .safetensors file, or in a folder with model.safetensors, as its config.json says.

    Raises InputError when one of the two files is missing, or config.json says what cannot be.
    """
    path = Path(name).expanduser()
    path = path / WEIGHTS if path.is_dir() else path
    if path.suffix != SUFFIX or not path.is_file():
        raise InputError(f"{path}: no such file of features: give a {SUFFIX} file with timm's {CONFIG} beside it")
    need("timm", path.name)
    published = read_config(path.with_name(CONFIG))
    return FeatureNetwork(
        name=published.architecture,
        printed=published.printed,
        weights=partial(_weights, path),
        load=partial(load_published, published),
        note=not_fid(published.architecture),
        version=repr(published),
    )


def _weights(path: Path, file: Path | None) -> Path:
    if file is not None:
        raise InputError(f"the features {path} are weights themselves: leave out --feature-weights")
    return path


def load_published(published: Published, weights: Path) -> TimmFeatures:
    """The network, built and filled by timm, and tried on one image. Raises InputError when the two do not fit."""
    import timm

    source = {
        "file": str(weights),
        "architecture": published.architecture,
        "input_size": (3, *published.preparation.size),
        "fixed_input_size": published.fixed_size,
        "num_classes": published.num_classes,
    }
    try:
        network = timm.create_model(
            published.architecture, pretrained=True, pretrained_cfg=source, **published.model_args
        )
        features = TimmFeatures(network.eval(), published.preparation)
        with torch.inference_mode():
            vectors, logits, _ = features(torch.zeros(1, 3, *published.preparation.size, dtype=torch.uint8))
    except Exception as error:  # timm's networks raise whatever Python has for what they were not made for
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{weights}: does not hold the {published.architecture} of its {CONFIG} ({detail}): download both again"
        ) from error
    if vectors.ndim != 2 or (logits is not None and logits.ndim != 2):
        raise InputError(f"{weights}: a {published.architecture} gives no vector of an image: choose a classifier")
    return features


# -- config.json ----------------------------------------------------------------------------------


def read_config(path: Path) -> Published:
    """What a config.json of timm says, checked. Raises InputError that names what is wrong with it."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}): put timm's {CONFIG} beside the weights"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: no JSON: download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("pretrained_cfg", {}), dict):
        raise InputError(f"{path}: not a {CONFIG} of timm: download it again")
    entries = {**config.get("pretrained_cfg", {}), **config}  # as timm: what stands at the top goes first

    def checked(key: str, rule: str, fits: Callable[[Any], bool], default: object = None) -> Any:
        value = entries.get(key, default)
        if not fits(value):
            raise InputError(f"{path}: {key} is {str(value)[:80]!r} and must be {rule}: download it again")
        return value

    architecture = checked("architecture", "the name of a network of timm", _is_architecture)
    size = checked("input_size", f"3 channels and two sides up to {MAX_SIDE}", _is_input_size)
    tag = entries.get("tag")
    return Published(
        architecture=architecture,
        tag=tag if isinstance(tag, str) and re.fullmatch(r"[\w.-]{1,64}", tag) else "",
        num_classes=checked(
            "num_classes", f"a number up to {MAX_CLASSES:,}", lambda n: _is_number(n, 0, MAX_CLASSES, int)
        ),
        fixed_size=checked("fixed_input_size", "true or false", lambda value: isinstance(value, bool), False),
        preparation=Preparation(
            size=(size[1], size[2]),
            interpolation=checked("interpolation", f"one of {', '.join(FILTERS)}", lambda name: name in FILTERS),
            mean=tuple(checked("mean", "three numbers in [-10, 10]", lambda v: _are_three(v, -10, 10))),
            std=tuple(checked("std", "three numbers in [0.001, 10]", lambda v: _are_three(v, 1e-3, 10))),
        ),
        model_args=checked("model_args", f"of {', '.join(MODEL_ARGS)} alone", _are_model_args, {}),
    )


def _is_architecture(value: object) -> bool:
    import timm

    return isinstance(value, str) and timm.is_model(value)


def _is_number(value: object, low: float, high: float, kind: type = int | float) -> bool:
    """Whether a value of JSON is a number within bounds, which infinity and NaN, that Python reads too, are not."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def _is_input_size(value: object) -> bool:
    sides = value[1:] if isinstance(value, list) and len(value) == 3 and value[0] == 3 else [0]
    return all(_is_number(side, 1, MAX_SIDE, int) for side in sides)


def _are_three(value: object, low: float, high: float) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_number(one, low, high) for one in value)


def _are_model_args(value: object) -> bool:
    if not isinstance(value, dict) or not value.keys() <= set(MODEL_ARGS):
        return False
    flat = [one for entry in value.values() for one in (entry if isinstance(entry, list) else [entry])]
    return all(isinstance(one, str | bool) or _is_number(one, 0, MAX_SIDE) for one in flat)
