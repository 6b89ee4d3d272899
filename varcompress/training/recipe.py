"""Recipes: what a distillation does, as one flat YAML file that a person copies and edits."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import yaml

from varcompress.errors import InputError
from varcompress.files import disk_errors, write_text
from varcompress.sampling import MAX_SEED
from varcompress.training.losses import LOSSES


def _within(low: float, high: float = math.inf, default: object = MISSING, *, machine: bool = False) -> object:
    """A field whose number, or each of whose numbers, lies between two bounds, both included.

    machine: it says only how the machine is used, as `machine_fields` has it.
    """
    return field(default=default, metadata={"low": low, "high": high, "machine": machine})


@dataclass(frozen=True)
class Recipe:
    """Depths, phases, optimiser and batch of one distillation. A value out of range is refused by its name."""

    name: str
    depths: tuple[int, ...] = _within(2)  # subnets to train, largest first
    bridge: int = _within(0)  # scales at the start that always run all layers
    epochs_full: int = _within(0, default=5)  # phase 1: a subnet with probability p_start
    epochs_ramp: int = _within(0, default=15)  # phase 2: the probability rises linearly
    epochs_subnet: int = _within(0, default=10)  # phase 3: a subnet with probability p_end
    p_start: float = _within(0, 1, default=0.2)
    p_end: float = _within(0, 1, default=1.0)
    loss: str = "cross_entropy"  # a name in losses.py
    learning_rate: float = _within(0, default=1e-6)
    learning_rate_end: float = _within(0, 1, default=1.0)  # the share of it left at the last step, falling linearly
    warmup_steps: int = _within(0, default=0)  # the learning rate rises linearly over so many steps
    weight_decay: float = _within(0, default=0.0)  # on the matrices of linear layers
    betas: tuple[float, float] = _within(0, 1 - 1e-9, default=(0.9, 0.95))
    gradient_clip: float = _within(0, default=2.0)  # largest norm of the gradient; 0 switches clipping off
    batch_size: int = _within(1, default=1024)  # images per step, on all devices together
    accumulation: int = _within(1, default=1, machine=True)  # passes of a device over its share of the batch
    label_drop: float = _within(0, 1, default=0.1)  # probability of the null class, for guidance
    views: int = _within(1, 256, default=1)  # of each image: the centre, then random crops
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the arithmetic; weights and optimiser are float32
    # recompute activations in the backward pass: slower, far less memory
    activation_checkpointing: bool = field(default=False, metadata={"machine": True})
    checkpoint_every: int = _within(1, default=1000, machine=True)  # steps between two states to --resume from
    seed: int = _within(0, MAX_SEED, default=0)

    def __post_init__(self) -> None:
        for item in fields(self):
            value, low = getattr(self, item.name), item.metadata.get("low")
            if low is None:
                continue
            high = item.metadata["high"]
            for number in value if isinstance(value, tuple) else (value,):
                if not low <= number <= high or not math.isfinite(number):
                    limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"at least {low:g}"
                    raise InputError(f"recipe: {item.name} must be {limits}, not {number:g}")
        if not self.depths or list(self.depths) != sorted(set(self.depths), reverse=True):
            raise InputError(f"recipe: depths must run from large to small, each once, not {list(self.depths)}")
        if not self.epochs_full + self.epochs_ramp + self.epochs_subnet:
            raise InputError("recipe: epochs_full, epochs_ramp and epochs_subnet are all 0: nothing to train")
        if self.loss not in LOSSES:
            raise InputError(f"recipe: loss must be {' or '.join(LOSSES)}, not {self.loss!r}")
        if not self.learning_rate:
            raise InputError("recipe: learning_rate must be more than 0")
        if self.batch_size % self.accumulation:
            raise InputError(
                f"recipe: batch_size {self.batch_size} does not divide into {self.accumulation} passes (accumulation): "
                "choose a multiple"
            )

    @classmethod
    def from_dict(cls, values: dict, where: object = "recipe") -> Recipe:
        """A recipe from plain values. An unknown, ill-typed or missing key is named, after `where` it was read."""
        hints = get_type_hints(cls)
        converted = {}
        for key, value in values.items():
            if key not in hints:
                raise InputError(f"{where}: unknown key {key!r}{_nearest(str(key), hints)}")
            converted[key] = _convert(f"{where}: {key}", hints[key], value)
        missing = [item.name for item in fields(cls) if item.default is MISSING and item.name not in values]
        if missing:
            raise InputError(f"{where}: lacks {', '.join(missing)}")
        return cls(**converted)

    def to_dict(self) -> dict:
        """Plain values, as they stand in a YAML file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def machine_fields() -> frozenset[str]:
    """Names of the fields that say only how the machine is used, and may change when a run is continued.

    What is learned differs by no more than the order in which numbers are added.
    """
    return frozenset(item.name for item in fields(Recipe) if item.metadata.get("machine"))


def load_recipe(source: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """A recipe by name or from a YAML file, with `key=value` settings applied on top."""
    where, text = _source(source)
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "not readable"
        raise InputError(f"{where}: not YAML{f', line {mark.line + 1}' if mark else ''}: {problem}") from error
    if not isinstance(values, dict):
        raise InputError(f"{where}: a recipe is a list of `key: value` lines")
    return Recipe.from_dict({**values, **dict(map(_setting, settings))}, where)


def recipe_names() -> list[str]:
    """Names of the recipes that the package brings."""
    files = resources.files("varcompress.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a recipe that the package brings, comments included."""
    names = recipe_names()
    if name not in names:
        raise InputError(
            f"no recipe is named {name!r} (there are {', '.join(names)}; or give a YAML file){_nearest(name, names)}"
        )
    return resources.files("varcompress.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def recipe_title(name: str) -> str:
    """The comment in the first line of a recipe that the package brings."""
    return recipe_text(name).splitlines()[0].lstrip("# ")


def copy_recipe(name: str, destination: str | Path) -> Path:
    """Copy a recipe that the package brings to a file, or into a directory under its own name.

    Returns the file. One that is there already is not overwritten but an InputError.
    """
    text, path = recipe_text(name), Path(destination)
    if path.is_dir():
        path = path / f"{name}.yaml"
    if path.exists():
        raise InputError(f"{path}: is there already and stays as it is: choose another name")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such directory")
    with disk_errors(path):
        write_text(path, text)
    return path


def _source(source: str | Path) -> tuple[str, str]:
    """What to call a recipe in messages, and its text: a bare word is a name first, anything else a file."""
    path = Path(source)
    is_name = isinstance(source, str) and path.name == source and not path.suffix
    if is_name and (source in recipe_names() or not path.is_file()):
        return f"recipe {source}", recipe_text(source)
    try:
        return str(path), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: the recipe could not be read ({reason})") from error


def _setting(text: str) -> tuple[str, object]:
    """`key=value`, the value read as YAML; a list may leave out its brackets, which some shells expand."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise InputError(f"--set {text!r}: write key=value, such as learning_rate=1e-5")
    hint = get_type_hints(Recipe).get(key)
    if get_origin(hint) is tuple and not value.startswith("["):
        value = f"[{value}]"
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--set {text!r}: the value is not readable") from error


def _nearest(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f": did you mean {close[0]}?" if close else ""


def _convert(what: str, hint: object, value: object) -> object:
    """`value` as the type of its field, or InputError."""
    if get_origin(hint) is tuple:
        kind, *rest = get_args(hint)
        count = None if rest == [Ellipsis] else 1 + len(rest)
        if not isinstance(value, (list, tuple)) or (count and len(value) != count):
            example = "[0.9, 0.95]" if kind is float else "[16, 8, 4, 2]"
            raise InputError(f"{what} must be a list such as {example}, not {value!r}")
        return tuple(_convert(what, kind, item) for item in value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise InputError(f"{what} must be {' or '.join(get_args(hint))}, not {value!r}")
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 takes 1e-6 for text, because it lacks a dot
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[hint]
    raise InputError(f"{what} must be {expected}, not {value!r}")
