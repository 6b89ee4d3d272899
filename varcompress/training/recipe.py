"""Recipes: what a distillation does, as one flat YAML file that a person copies and edits."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import yaml

from varcompress.errors import InputError
from varcompress.files import disk_errors, write_text
from varcompress.sampling import MAX_SEED, checked_cfg
from varcompress.training.losses import LOSSES

FULL = "full"  # the full network's place among the depths
EPOCHS = "epochs"  # as many views as epochs
MAX_VIEWS = 256
# a paper's figure, carried over from the embedded model, run by nobody, and what `with_origin` finds changed since
CHANGED = "changed"
ORIGINS = ("published", "embedded", "guess", CHANGED)
BELOW_ONE = 1 - 1e-9
LAYERS = ("equidistant", "sensitivity")  # ways to choose the layers of a depth
TAUGHT = [name for name, loss in LOSSES.items() if loss.needs_teacher]
PHASES = ("epochs_full", "epochs_ramp", "epochs_subnet")
EXAMPLES = {float: "[0.9, 0.95]", int: "[16, 8, 4, 2]", str: "[depths, bridge]"}  # of a list, by what it holds
# the recipes made for a model that has a name; the first is taken where none is asked for
MADE_FOR = {
    "var-d36": ("variant-d36-512",),
    "var-d30": ("variant-d30", "variant-d30-1gpu", "variant-d30-24gb", "distil-d30", "distil-d30-unguided"),
    "var-d16": ("variant-d16",),
    "digits": ("digits", "digits-long", "digits-guided", "variant-digits"),
}


@dataclass(frozen=True)
class Machine:
    """What a recipe is sized for: so many GPUs of that memory, or, with None, a CPU."""

    devices: int = 1
    memory_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Machine:
        """Read `8 x 80GB`, `80GB` or `cpu`. Raises InputError for what is none of these."""
        if text == "cpu":
            return cls()
        devices, x, size = text.rpartition("x")
        if (x and not devices.strip().isdecimal()) or devices.strip() == "0":
            raise InputError(f"recipe: machine {text!r} is not understood: write 8 x 80GB, 80GB or cpu")
        try:
            return cls(int(devices or 1), parse_bytes(size))
        except InputError as error:
            raise InputError(f"recipe: machine {text!r}: {error}") from None


def parse_bytes(text: str) -> int:
    """A size such as 24GB, in bytes: of 10^9, as cards are sold, which have a little more; GiB of 2^30."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(GB|GiB)", text.strip())
    if not match or not float(match[1]):
        raise InputError(f"a memory of {text.strip()!r} is not understood: write 24GB or 24GiB")
    return int(float(match[1]) * {"GB": 10**9, "GiB": 2**30}[match[2]])


def _within(low: float, high: float = math.inf, default: object = MISSING, **metadata: object) -> object:
    """A field whose number, or each of whose numbers, lies between two bounds, both included but for BELOW_ONE."""
    return _plain(default, low=low, high=high, **metadata)


def _plain(default: object, **metadata: object) -> object:
    """A field with what is known of it.

    machine: it says only how the machine is used, as `machine_fields` has it; accepts: what it can be, in words, where
    that is more than one type; goes_with: fields of which one at least must not be as by default, or it does nothing.
    """
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """What is trained, by which losses and for how long. A value out of range is refused by its name.

    Depths run either by the three phases of VARiant (epochs_full, epochs_ramp, epochs_subnet), one a step, or, where
    depth_probability is given, several a step for `epochs`.
    """

    name: str
    depths: tuple[int, ...] = _within(2)  # subnets to train, largest first
    bridge: int = _within(0)  # scales at the start that always run all layers
    # of each depth: equidistant, by sensitivity, or by number; the first and the last are always among them
    layers: str | tuple[tuple[int, ...], ...] = _plain(
        "equidistant",
        accepts="equidistant, sensitivity, or layers for each depth, such as [[0, 9, 29], [0, 29]]",
    )

    epochs_full: int = _within(0, default=0)  # phase 1: a subnet with probability p_start
    epochs_ramp: int = _within(0, default=0)  # phase 2: the probability rises linearly
    epochs_subnet: int = _within(0, default=0)  # phase 3: a subnet with probability p_end
    p_start: float = _within(0, 1, default=0.2, goes_with=PHASES[:2])
    p_end: float = _within(0, 1, default=1.0, goes_with=PHASES[1:])
    # of each depth, in every step
    depth_probability: dict[str, float] | None = _within(
        0, 1, default=None, accepts="a probability for each depth, such as {full: 0.25, 16: 0.5, 2: 1}"
    )
    epochs: int = _within(0, default=0, goes_with=("depth_probability",))  # passes over the data
    # the depths of a step in one pass, or one after another
    together: bool = _plain(True, machine=True, goes_with=("depth_probability",))

    # weights of the losses in losses.py
    loss: dict[str, float] = _within(
        0, default={"cross_entropy": 1.0}, accepts=f"{' or '.join(LOSSES)}, or a weight for each"
    )
    teacher: Literal["none", "frozen"] = "none"  # frozen: the network that the run starts from
    teacher_dtype: Literal["float32", "bfloat16"] = _plain("float32", goes_with=("teacher",))  # of its weights
    # stored: computed once, the largest kept with the tokens
    teacher_logits: Literal["live", "stored"] = _plain("live", goes_with=("teacher",))
    teacher_top: int | None = _within(1, default=None)  # how many are stored of each token
    guidance: Literal["classifier-free", "none"] = "classifier-free"  # none: distilled, so that no second pass is run
    # what guidance to distil; of a range, each call gives the model one
    cfg: float | tuple[float, float] | None = _plain(None, accepts="a number, or two as a range, such as [0.5, 3]")

    # adamw8bit: its moments in 8 bits; muon: of the matrices of the layers, AdamW of the rest
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    learning_rate: float = _within(0, default=1e-6)
    learning_rate_end: float = _within(0, 1, default=1.0)  # the share of it left at the last step
    # how it falls to that
    learning_rate_decay: Literal["linear", "cosine"] = "linear"
    warmup_steps: int = _within(0, default=0)  # the learning rate rises linearly over so many steps
    weight_decay: float = _within(0, default=0.0)  # on the matrices of linear layers
    betas: tuple[float, float] = _within(0, BELOW_ONE, default=(0.9, 0.95))
    gradient_clip: float = _within(0, default=2.0)  # largest norm of the gradient; 0 switches clipping off

    batch_size: int = _within(1, default=1024)  # images per step, on all devices together
    parallel: Literal["ddp", "fsdp"] = _plain("ddp", machine=True)  # of several processes, see parallel.py
    workers: int = _within(0, 64, default=0, machine=True)  # processes of each device that read batches ahead
    accumulation: int = _within(1, default=1, machine=True)  # passes of a device over its share of the batch
    label_drop: float = _within(0, 1, default=0.1)  # probability of the null class, for guidance
    # of each image: the centre, then random crops; epochs: one for each epoch, as when images are cropped anew
    views: int | str = _within(1, MAX_VIEWS, default=1, accepts=f"a whole number, or {EPOCHS}: one for each epoch")
    holdout: float = _within(0, 0.5, default=0.0)  # share of the images that are never trained on, to measure on
    # steps between two measurements
    holdout_every: int = _within(1, default=500, machine=True)

    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the arithmetic; weights and optimiser are float32
    # recompute activations in the backward pass: slower, far less memory
    activation_checkpointing: bool = _plain(False, machine=True)
    compile: bool = _plain(False, machine=True)  # layers by torch.compile: minutes at the start, faster steps
    checkpoint_every: int = _within(1, default=1000, machine=True)  # steps between two states to --resume from
    samples_every: int = _within(0, default=0, machine=True)  # steps between two grids of images; 0: none
    keep: int = _within(1, default=2, machine=True)  # states that are kept
    max_bad_steps: int = _within(1, default=10, machine=True)  # skipped in a row, for want of a finite gradient
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = _plain("none", machine=True)  # to watch the run in
    seed: int = _within(0, MAX_SEED, default=0)
    machine: str = _plain("cpu", machine=True)  # what the sizes above are made for, such as 8 x 80GB
    # where figures come from: their names under published, embedded (carried over from the embedded model), guess, or
    # changed (by a user: `with_origin`)
    origin: dict[str, tuple[str, ...]] = _plain({}, machine=True)

    def __post_init__(self) -> None:
        for item in fields(self):
            self._check_bounds(item)
        if not self.depths or list(self.depths) != sorted(set(self.depths), reverse=True):
            raise InputError(f"recipe: depths must run from large to small, each once, not {list(self.depths)}")
        self._check_idle()
        self._check_strategy()
        self._check_views()
        self._check_layers()
        self._check_losses()
        self._check_guidance()
        self._check_origin()
        Machine.parse(self.machine)
        if not self.learning_rate:
            raise InputError("recipe: learning_rate must be more than 0")
        if self.batch_size % self.accumulation:
            raise InputError(
                f"recipe: batch_size {self.batch_size} does not divide into {self.accumulation} passes (accumulation): "
                "choose a multiple"
            )

    def _check_bounds(self, item: Field) -> None:
        value, low = getattr(self, item.name), item.metadata.get("low")
        if low is None or value is None or isinstance(value, str):
            return
        high = item.metadata["high"]
        for number in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,):
            if not math.isfinite(number):
                raise InputError(f"recipe: {item.name} must be a finite number, not {number:g}")
            if not low <= number <= high:
                limits = f"from {low:g} to {'below ' * (high == BELOW_ONE)}{high:g}"
                limits = limits if math.isfinite(high) else f"at least {low:g}"
                raise InputError(f"recipe: {item.name} must be {limits}, not {number:g}")

    def _check_idle(self) -> None:
        for item in fields(self):
            if item.name in self._without_company() and getattr(self, item.name) != item.default:
                raise InputError(
                    f"recipe: {item.name} goes with {' or '.join(item.metadata['goes_with'])}, without which it does "
                    f"nothing: leave it out, or set {str(item.default).lower()}"
                )

    def _without_company(self) -> set[str]:
        """Names of the keys that do nothing, because all that they go with is as by default."""
        usual = defaults()
        return {
            item.name
            for item in fields(self)
            if (others := item.metadata.get("goes_with")) and all(getattr(self, key) == usual[key] for key in others)
        }

    def _check_strategy(self) -> None:
        phases = sum(getattr(self, phase) for phase in PHASES)
        if self.depth_probability is None:
            if not phases:
                raise InputError(f"recipe: {', '.join(PHASES[:2])} and {PHASES[2]} are all 0: nothing to train")
            return
        if phases or not self.epochs:
            raise InputError(
                "recipe: with depth_probability the run has epochs, at least 1, and no phases: "
                "leave out epochs_full, epochs_ramp and epochs_subnet"
            )
        known = [FULL, *map(str, self.depths)]
        if unknown := [depth for depth in self.depth_probability if depth not in known]:
            raise InputError(
                f"recipe: depth_probability names {unknown[0]}, which is none of the depths: {', '.join(known)}: "
                "give it anew for other depths"
            )
        if not any(self.depth_probability.values()):
            raise InputError("recipe: depth_probability is 0 for every depth: nothing to train")
        if untrained := [depth for depth in self.depths if not self.depth_probability.get(str(depth))]:
            raise InputError(
                f"recipe: depth_probability leaves out {untrained[0]}, which is one of the depths: give it more "
                "than 0, or take it out of depths"
            )

    def _check_views(self) -> None:
        if isinstance(self.views, str) and self.views != EPOCHS:
            raise InputError(f"recipe: views must be {_accepts('views')}, not {self.views!r}")
        if self.num_views > MAX_VIEWS:
            raise InputError(f"recipe: views: {EPOCHS} of {self.num_views} epochs are too many: at most {MAX_VIEWS}")

    def _check_layers(self) -> None:
        if isinstance(self.layers, str):
            if self.layers not in LAYERS:
                raise InputError(f"recipe: layers must be {_accepts('layers')}, not {self.layers!r}")
        elif tuple(map(len, self.layers)) != self.depths:
            raise InputError(
                f"recipe: layers has {len(self.layers)} lists, of {', '.join(map(str, map(len, self.layers))) or 'no'} "
                f"layers, but depths are {', '.join(map(str, self.depths))}: give one list for each, in that order"
            )
        elif any(list(chosen) != sorted(set(chosen)) for chosen in self.layers):
            raise InputError("recipe: each list of layers must ascend, each layer once")

    def _check_losses(self) -> None:
        if unknown := [name for name in self.loss if name not in LOSSES]:
            raise InputError(f"recipe: loss must be {_accepts('loss')}, not {unknown[0]!r}")
        if not any(self.loss.values()):
            raise InputError("recipe: loss gives every kind a weight of 0: nothing to learn")
        if any(map(self.loss.get, TAUGHT)) != (self.teacher != "none"):
            taught = " or ".join(TAUGHT)
            raise InputError(
                f"recipe: the loss {taught} and a teacher go together: set teacher: frozen and loss: {taught}, or "
                "neither"
            )
        if (self.teacher_logits == "stored") != (self.teacher_top is not None):
            raise InputError("recipe: teacher_logits: stored and teacher_top go together: set both, or neither")

    def _check_guidance(self) -> None:
        if (self.guidance == "none") != (self.cfg is not None):
            raise InputError("recipe: guidance: none and cfg, what is distilled, go together: set both, or neither")
        if self.cfg is None:
            return
        checked_cfg(self.cfg, "recipe: cfg")
        if any(weight for name, weight in self.loss.items() if name not in TAUGHT) or self.label_drop:
            raise InputError(
                f"recipe: guidance: none distils the teacher's guided logits: set teacher: frozen, loss: "
                f"{' or '.join(TAUGHT)} and label_drop: 0"
            )
        if self.teacher_logits == "stored" and isinstance(self.cfg, tuple):
            raise InputError(
                "recipe: what a teacher says under a range of cfg cannot be stored: set teacher_logits: live"
            )

    def _check_origin(self) -> None:
        names = {item.name for item in fields(self)}
        for origin, keys in self.origin.items():
            if origin not in ORIGINS:
                raise InputError(f"recipe: origin must be {', '.join(ORIGINS)}, not {origin!r}")
            if unknown := sorted(set(keys) - names):
                raise InputError(f"recipe: origin names {unknown[0]!r}, which is no key of a recipe")

    @property
    def num_views(self) -> int:
        """How many views of each image are encoded."""
        if self.views != EPOCHS:
            return self.views
        return self.epochs or sum(getattr(self, phase) for phase in PHASES)

    def pass_size(self, processes: int = 1) -> int:
        """Images of one pass of a process."""
        return self.batch_size // (processes * self.accumulation)

    def held_out(self, num_images: int) -> int:
        """How many of so many images are never trained on."""
        return round(self.holdout * num_images)

    @classmethod
    def from_dict(cls, values: dict, where: object = "recipe") -> Recipe:
        """A recipe from plain values. An unknown, ill-typed or missing key is named, after `where` it was read."""
        hints = get_type_hints(cls)
        converted = {}
        for key, value in values.items():
            if key not in hints:
                raise InputError(f"{where}: unknown key {key!r}{_nearest(str(key), hints)}")
            converted[key] = _converted(where, key, hints[key], value)
        missing = [item.name for item in fields(cls) if _required(item) and item.name not in values]
        if missing:
            raise InputError(f"{where}: lacks {', '.join(missing)}")
        return cls(**converted)

    def to_dict(self) -> dict:
        """Plain values, as they stand in a YAML file, without the keys that do nothing in this recipe."""
        idle = self._without_company() | (set() if self.depth_probability is None else set(PHASES))
        return {key: _as_plain(value) for key, value in asdict(self).items() if key not in idle}


def _required(item: Field) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def defaults() -> dict[str, object]:
    """What a recipe has where it says nothing, as plain values, of all keys that it may leave out."""
    return {
        item.name: _as_plain(item.default_factory() if item.default is MISSING else item.default)
        for item in fields(Recipe)
        if not _required(item)
    }


def machine_fields() -> frozenset[str]:
    """Names of the fields that say only how the machine is used, and may change when a run is continued.

    What is learned differs by no more than the order in which numbers are added.
    """
    return frozenset(item.name for item in fields(Recipe) if item.metadata.get("machine"))


def load_recipe(source: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """A recipe by name or from a YAML file, with `key=value` settings applied on top."""
    where, text = _source(source)
    values = _read(text, where)
    if not isinstance(values, dict):
        raise InputError(f"{where}: a recipe is a list of `key: value` lines")
    return with_origin(Recipe.from_dict({**values, **dict(map(_setting, settings))}, where))


def with_origin(recipe: Recipe) -> Recipe:
    """A recipe whose figures claim no more than a recipe of the package that they equal; the others are `changed`.

    What a user changes, in a copy of whatever name, by a setting or from Python, comes from nowhere but from them. A
    copy under another name is held against the recipe whose claims it can make most of. Who claims nothing is left
    alone.
    """
    claimed = {key for keys in recipe.origin.values() for key in keys}
    if not claimed:
        return recipe
    names = recipe_names()
    ours = map(_of_package, [recipe.name] if recipe.name in names else names)
    origin = max((_held(recipe, one) for one in ours), key=lambda held: sum(map(len, held.values())))
    usual, held = defaults(), {key for keys in origin.values() for key in keys}
    own = [
        item.name
        for item in fields(recipe)
        if item.name not in {*held, "name", "seed", *machine_fields()}
        and (item.name in claimed or _as_plain(getattr(recipe, item.name)) != usual.get(item.name))
    ]
    return replace(recipe, origin={name: keys for name, keys in {**origin, CHANGED: tuple(own)}.items() if keys})


@cache
def _of_package(name: str) -> Recipe:
    return Recipe.from_dict(yaml.safe_load(recipe_text(name)))


def _held(recipe: Recipe, ours: Recipe) -> dict[str, tuple[str, ...]]:
    """The claims of a recipe that one of the package makes too, of the same figures."""
    return {
        origin: tuple(
            key for key in keys if key in ours.origin.get(origin, ()) and getattr(recipe, key) == getattr(ours, key)
        )
        for origin, keys in recipe.origin.items()
        if origin != CHANGED
    }


def recipe_names() -> list[str]:
    """Names of the recipes that the package brings."""
    files = resources.files("varcompress.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recipes_for(model: str) -> tuple[str, ...]:
    """Names of the recipes made for a model of this name, the one to take first. InputError where there is none."""
    found = MADE_FOR.get(model.replace("_", "-"))  # var_d30.pth holds what is called var-d30
    if not found:
        raise InputError(
            f"no recipe is made for {model}: name one with --recipe ({', '.join(recipe_names())}, or a YAML file)"
        )
    return found


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
    one_of = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    is_list = get_origin(hint) is tuple or ("," in value and tuple in map(get_origin, one_of))
    if is_list and not value.startswith("["):
        value = f"[{value}]"
    return key, _read(value, f"--set {text!r}")


class _Loader(yaml.SafeLoader):
    """Safe YAML that holds each key once, as YAML says it must; PyYAML alone takes the last and is silent."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        found = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in found:
                problem = f"the key {name} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            found.add(name)
        return super().construct_mapping(node, deep)


def _read(text: str, where: object) -> object:
    """What a YAML text says. Raises InputError, after `where` it stands, for one that is none."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "not readable"
        line = f", line {mark.line + 1}" if mark and "\n" in text else ""
        raise InputError(f"{where}: not YAML{line}: {problem}") from error


def _as_plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _as_plain(item) for key, item in value.items()}
    return list(map(_as_plain, value)) if isinstance(value, tuple) else value


def _nearest(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f": did you mean {close[0]}?" if close else ""


def _converted(where: object, key: str, hint: object, value: object) -> object:
    """The value of a recipe's key as the type of its field, or InputError."""
    if key == "loss" and isinstance(value, str):
        value = {value: 1.0}  # one alone
    if isinstance(value, dict) and len(value) > len(set(map(str, value))):  # as a key a depth is text
        raise InputError(f"{where}: {key} has a key twice: {', '.join(sorted(map(str, value)))}")
    try:
        return _convert(f"{where}: {key}", hint, value)
    except InputError:
        if accepts := _accepts(key):
            raise InputError(f"{where}: {key} must be {accepts}, not {value!r}") from None
        raise


def _accepts(key: str) -> str | None:
    """What a key can be, in words, where that is more than its type says."""
    return next(item for item in fields(Recipe) if item.name == key).metadata.get("accepts")


def _convert(what: str, hint: object, value: object) -> object:
    """`value` as the type of its field, or InputError."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _convert_union(what, options, value)
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{what} must be a list of `name: value` lines, not {value!r}")
        # as a key a depth is text, which it becomes in JSON at the latest
        return {str(key): _convert(f"{what}: {key}", options[1], item) for key, item in value.items()}
    if origin is tuple:
        kind, *rest = options
        count = None if rest == [Ellipsis] else 1 + len(rest)
        if not isinstance(value, (list, tuple)) or (count and len(value) != count):
            example = EXAMPLES.get(kind, "[[0, 14, 29], [0, 29]]")
            raise InputError(f"{what} must be a list such as {example}, not {value!r}")
        return tuple(_convert(what, kind, item) for item in value)
    if origin is Literal:
        if value not in options:
            raise InputError(f"{what} must be {' or '.join(options)}, not {value!r}")
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


def _convert_union(what: str, options: tuple, value: object) -> object:
    """`value` as the one of several types that it is a list, a mapping, nothing or a plain value for."""
    if value is None and NoneType in options:
        return None
    kind = tuple if isinstance(value, (list, tuple)) else dict if isinstance(value, dict) else None
    fitting = [option for option in options if option is not NoneType and get_origin(option) is kind]
    if kind is None and len(fitting) > 1:  # of two plain types, text is taken as such
        fitting = [type(value)] if type(value) in fitting else fitting
    return _convert(what, (fitting or [option for option in options if option is not NoneType])[0], value)
