"""Results: their kinds and fields, the files they lie in, and whose weights they are of. Metrics are in metrics.py."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from varcompress.errors import InputError
from varcompress.files import disk_errors, write_json

if TYPE_CHECKING:
    from typing import NotRequired  # of Python 3.11

PROFILE, EVAL, DEMO = "profile", "eval", "demo"
SCHEMA = 2  # of the fields below; a result of another is measured again
MEASURED = (PROFILE, EVAL)  # kinds that belong to one set of weights, and are published with it
EARLIER = ".old"  # added to the name of a result whose place a newer one took


# -- fields -------------------------------------------------------------------------------------


class Conditions(TypedDict):
    """Under what a result was had."""

    schema: int
    command: str | None  # as it was called; None from Python
    model: str
    weights: str  # their fingerprint
    device: str
    torch: str
    varcompress: str
    dtype: str
    kernels: str  # torch or triton
    packed_weights: bool
    cache_dtype: str
    offload: str | None
    guided: bool  # whether every image had an unconditional twin: not with cfg 0, nor where guidance is distilled


class CacheEffect(TypedDict, total=False):
    """What a cache in eight bits does to the logits of the same tokens; empty where the cache has more."""

    logit_error: float  # root mean square of the difference over that of the logits
    same_top_token: float  # share of tokens whose largest logit stays the largest


class Ratios(TypedDict):
    """What a schedule saves beside another, by arithmetic."""

    cache_ratio: float
    speedup_predicted: float
    speedup_without_decoder_predicted: float


class Unguided(TypedDict, total=False):
    """What an unguided call has beside: empty where calls are guided."""

    beside_guided: Ratios  # calls of `full`


class Cost(TypedDict):
    """What a schedule costs per batch, as every result tells it."""

    schedule: str
    latency_ms: float
    images_per_second: float
    peak_bytes: int
    cache_bytes: int


class ProfileRow(Cost, CacheEffect, Unguided):
    """A schedule of a profile. What ends in _predicted is arithmetic, beside what was measured."""

    latency_spread_ms: list[float]  # first and third quartile
    without_decoder_ms: float
    transformer_ms: float
    sampling_ms: float
    decoder_ms: float
    peak_bytes_predicted: int
    cache_bytes_predicted: int
    weight_bytes: int
    weight_bytes_predicted: int
    flops: int
    flops_predicted: int
    flops_without_decoder_predicted: int
    speedup: float  # over `full`, as are the ratios
    speedup_predicted: float
    speedup_without_decoder: float
    speedup_without_decoder_predicted: float
    memory_ratio: float
    cache_ratio: float


class ProfileResult(Conditions):
    """What `profile` returns and profile.json holds."""

    kind: str
    batch_size: int
    settings: dict  # the fields of Sampling
    runs: int
    schedules: list[ProfileRow]


class Score(TypedDict, total=False):
    """One score of a schedule. Intervals are at 95 %; differences are to the first schedule of the result."""

    value: float  # of several seeds, the mean
    interval: list[float]
    std: float  # what is printed with the score where it is published: over groups (IS), over subsets (KID)
    seeds: list[float]  # the value of each seed, where there are several
    difference: float
    difference_interval: list[float]


class EvalRow(Cost):
    """A schedule of an eval, or another model's that was scored beside it (`model`): its cost and its scores."""

    model: NotRequired[str]
    weights: NotRequired[str]
    scores: dict[str, Score]  # by the keys of metrics.METRICS; without those that the reference cannot give


class EvalResult(Conditions):
    """What `evaluate` returns and eval.json holds."""

    kind: str
    batch_size: int
    protocol: str
    deviations: list[str]  # from the protocol
    reference: str
    reference_details: dict  # digests, number and size of its images, and where its statistics are from
    features: dict  # name, what results print, and the SHA-256 of the weights' file
    torch_fidelity: str
    settings: dict  # the fields of Sampling, seeds, the number of images, rounding, groups of IS, distances
    seconds: float
    processes: int
    notes: list[str]  # what a reader must know before setting these scores beside others
    schedules: list[EvalRow]


class DemoCost(TypedDict):
    """A schedule's score, what it costs, and its speed-up over the teacher."""

    schedule: str
    score: Score
    latency_ms: float
    speedup: float
    cache_bytes: int
    peak_bytes: int


class DemoRow(DemoCost):
    """A schedule of the distilled model, with its score before."""

    untrained: Score


class DemoResult(TypedDict):
    """What the demo returns; demo.json lacks `files`."""

    kind: str
    device: str
    score: str  # a key of METRICS
    features: str  # on which it is computed
    images: int
    batch_size: int
    teacher: DemoCost
    schedules: list[DemoRow]
    untrained: EvalResult
    seconds: float
    files: list[str]


SENSITIVITY, SEARCH = "sensitivity", "search"


class Images(TypedDict):
    """The images whose tokens a loss is of."""

    name: str
    digest: str
    images: int


class Scored(TypedDict):
    """Scores of schedules, by their text."""

    metric: str
    images: int
    reference: str
    scores: dict[str, Score]


class Increase(TypedDict, total=False):
    """A teacher-forced loss and how much more it is than under `full`, in nats per token, with standard errors."""

    schedule: str
    loss: float
    loss_error: float
    loss_per_scale: list[float]
    loss_per_scale_error: list[float]
    increase: float
    increase_error: float
    increase_per_scale: list[float]
    increase_per_scale_error: list[float]
    saved: float  # share of the FLOPs of `full`, without decoder
    score: Score  # where there is a reference


class SensitivityRow(Increase):
    """A depth at only one scale, or from it on; scales count from 1."""

    depth: int
    scale: int


class LayerRow(TypedDict):
    """What is lost without one layer, counted from 0."""

    layer: int
    after_bridge: Increase
    everywhere: Increase


SensitivityResult = TypedDict(
    "SensitivityResult",
    {
        **Conditions.__annotations__,
        "kind": str,
        "data": Images,
        "patch_nums": list[int],
        "bridge": int,
        "depths": list[int],
        "subnets": dict[str, list[int]],
        "full": Increase,
        "only": list[SensitivityRow],
        "from": list[SensitivityRow],
        "layers": list[LayerRow],
        "scored": dict | None,  # metric, images and reference of the scores
        "seconds": float,
    },
)
"""What `sensitivity` returns and sensitivity.json holds."""


class Candidate(TypedDict, total=False):
    """A schedule that a search considered: its costs as shares of `full`'s, and its loss, predicted and measured.

    Measured on the images of the search, and again on others, which chose nothing.
    """

    schedule: str
    costs: dict[str, float]
    predicted: float
    loss: float
    loss_apart: float
    loss_apart_error: float
    latency_ms: float
    score: Score


class Difference(TypedDict):
    """The mean of differences image by image, and its 95 % interval."""

    value: float
    interval: list[float]


class SearchResult(Conditions):
    """What `search` returns and search.json holds."""

    kind: str
    data: Images
    images_apart: int
    budget: dict[str, float]  # cost -> share of `full`'s
    depths: list[int]
    candidates: int
    within_budget: int
    latency: dict | None  # how it is predicted, where it is a budget
    full: Candidate
    found: Candidate
    equidistant: Candidate  # the best of them within the budget
    difference: Difference  # of the loss of `found` to that of `equidistant`, on the images apart
    finalists: list[Candidate]
    others: list[Candidate]  # the equidistant ones within the budget
    scored: dict | None
    seconds: float


# -- reading ------------------------------------------------------------------------------------


def read_result(path: str | Path) -> dict:
    """The profile or eval result in a JSON file. Raises InputError where there is none."""
    path = Path(path)
    try:
        return check_result(str(path), json.loads(path.read_text(encoding="utf-8")))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: not a readable JSON file ({why})") from error


def check_result(source: str, content: object) -> dict:
    """`content`, which came from `source`, if it is a profile or eval result. Raises InputError if it is none."""
    if not isinstance(content, dict) or content.get("kind") not in MEASURED:
        raise InputError(f"{source}: not a result: give what {' or '.join(MEASURED)} wrote (KIND.json)")
    if content.get("schema") != SCHEMA:
        raise InputError(
            f"{source}: of another version of varcompress: measure it again with `varcompress {content['kind']}`"
        )
    return content


def results_in(folder: Path) -> dict[Path, dict]:
    """The profile and eval results in a folder: eval-2.json comes before eval-10.json."""
    found = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: (len(path.stem), path.stem)):
        with contextlib.suppress(InputError):  # config.json, logs and the like are no results
            found[path] = read_result(path)
    return found


@contextlib.contextmanager
def intact(source: str, result: dict) -> Iterator[None]:
    """For a block that reads a result's fields: where one is missing or wrong, an InputError says so."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
        if isinstance(error, InputError):
            raise
        detail = f"lacks {error}" if isinstance(error, KeyError) else "is damaged"
        raise InputError(f"{source}: the {result['kind']} result {detail}: measure it again") from error


# -- whose weights ------------------------------------------------------------------------------


def check_weights(source: str, result: dict, weights: Collection[str]) -> None:
    """Raises InputError unless a result was measured on the weights that have one of these fingerprints."""
    if result.get("weights") not in weights:
        raise InputError(
            f"{source}: was not measured on these weights: measure them with `varcompress {result['kind']}`, "
            "or take it away"
        )


def check_owner(folder: Path, weights: str) -> None:
    """Raises InputError when results in `folder` are not of the weights with this fingerprint, which come to lie there.

    A result that says not of which weights it is could be of others. Those of earlier versions count as well.
    """
    contents = {path.name: _content(path) for path in folder.glob("*.json")}
    measured = {name: content for name, content in contents.items() if content.get("kind") in MEASURED}
    if any(content.get("weights") != weights for content in measured.values()):
        names = ", ".join(sorted(measured))
        raise InputError(
            f"{folder}: {names} there would belong to other weights: choose another directory or move them"
        )


# -- writing ------------------------------------------------------------------------------------


def check_folder(folder: str | Path, kind: str) -> Path:
    """The folder for results of `kind`. Raises InputError where writing would take the place of something else."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, not a directory: choose another --out")
    present = folder / f"{kind}.json"
    if present.exists() and _content(present).get("kind") != kind:
        raise InputError(f"{present}: is there and holds something else: choose another --out")
    return folder


def write_result(result: dict, folder: str | Path) -> Path:
    """Write a result of any kind as KIND.json; returns its path. An earlier one is kept beside it, as KIND.json.old.

    Raises InputError where something else would be replaced, or a disk is full.
    """
    folder = check_folder(folder, result["kind"])
    path = folder / f"{result['kind']}.json"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.replace(path.with_name(path.name + EARLIER))
        write_json(path, result)
    return path


def _content(path: Path) -> dict:
    """What a JSON file holds; nothing where it holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
