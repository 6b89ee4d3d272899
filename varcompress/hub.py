"""Models by path, by name or from the Hub, and models to the Hub.

`load` opens whatever a person calls a model; `push` publishes one with its card, its measured results
and the recipe that made it, all in one commit. What the Hub refuses becomes one line with a remedy.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from varcompress import report
from varcompress.card import model_card
from varcompress.checkpoint import (
    CARD,
    CONFIG,
    DTYPES,
    RECIPE,
    WEIGHTS,
    config_text,
    has_own_card,
    is_elastic,
    load_elastic,
    load_official,
    save_elastic,
)
from varcompress.data.digits import FOLDER as DIGITS_FOLDER
from varcompress.errors import InputError
from varcompress.files import NO_ROOM, disk_errors, scratch_folder
from varcompress.fingerprint import fingerprint
from varcompress.hardware import bfloat16_wins, choose_device
from varcompress.models.elastic import ElasticVAR
from varcompress.models.runtime import Runtime
from varcompress.progress import Progress, silent

OFFICIAL_REPO, OFFICIAL_LICENSE = "FoundationVision/var", "mit"
OFFICIAL_VAE = "vae_ch160v4096z32.pth"
OFFICIAL = {f"var-d{depth}": f"var_d{depth}.pth" for depth in (16, 20, 24, 30, 36)}
DIGITS = "digits"
AUTO_DTYPE = "auto"
ACCEPTED = f"a .pth file, an elastic directory, a Hub id such as someone/model, {', '.join(OFFICIAL)} or {DIGITS}"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CHECKPOINT_SUFFIXES = {".pth", ".pt", ".safetensors"}
RESULT_KINDS = tuple(report.PLOTS)
SAMPLES = "samples.png"  # a picture that the card shows
# What an earlier push may have left that does not hold for other weights
OURS = re.compile(rf"({'|'.join(RESULT_KINDS)})(-\d+)?\.(json|png)|{re.escape(RECIPE)}|{re.escape(SAMPLES)}")


# -- load ---------------------------------------------------------------------------------------


def load(
    source: str | Path,
    *,
    vae: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    kernels: str = "auto",
    cache_dtype: str | None = None,
    offload: str | None = None,
) -> ElasticVAR:
    """Open a model: an official `.pth` (with its tokenizer as `vae`), an elastic directory, a Hub id, a name.

    device: cuda when there is one, else cpu; dtype: of the transformer and the decoder (encoder and
    quantiser stay float32), "auto" for bfloat16 where the device is faster with it, else float32;
    revision: branch, tag or commit on the Hub; kernels, cache_dtype, offload: see `Runtime`.
    Raises InputError for whatever cannot be opened, saying what is accepted.
    """
    place = choose_device(device)
    runtime = Runtime(place, _dtype(dtype, place), kernels, cache_dtype, offload)  # before a download, not after
    if offload and place.type != "cuda":
        raise InputError(f"offload {offload!r} spares the memory of a GPU, and the device is {place}: leave it out")
    model = _open(str(source), vae, revision)
    model.tokenizer.float()  # stored in float16 or bfloat16 it would otherwise quantise in it
    return model.place(runtime)


def _open(source: str, vae: str | Path | None, revision: str | None) -> ElasticVAR:
    path = Path(source).expanduser()
    named = source == DIGITS or source in OFFICIAL
    if path.is_file():
        _refuse(revision, "revision", "models on the Hub")
        if vae is None:
            raise InputError(f"{path}: a transformer goes with its tokenizer: give {OFFICIAL_VAE} as vae (--vae)")
        return load_official(path, Path(vae).expanduser())
    if path.suffix in CHECKPOINT_SUFFIXES and not path.exists():
        raise InputError(f"{source}: no such checkpoint file")
    _refuse(vae, "vae", "a transformer .pth")
    if path.is_dir() and (is_elastic(path) or not named):
        _refuse(revision, "revision", "models on the Hub")
        return load_elastic(path)
    if source == DIGITS:
        _refuse(revision, "revision", "models on the Hub")
        weights, tokenizer = DIGITS_FOLDER / "var_digits.pth", DIGITS_FOLDER / "vae_digits.pth"
        return load_official(weights, tokenizer, name=DIGITS, license="mit")
    if source in OFFICIAL:
        return _download_official(source, revision)
    if _is_hub_id(source):
        return load_elastic(_download_elastic(source, revision))
    raise InputError(_unknown(source))


def _is_hub_id(source: str) -> bool:
    """Whether a model is to be had from the Hub under this name: what is here goes first."""
    path = Path(source).expanduser()
    return bool(HUB_ID.fullmatch(source)) and path.suffix not in CHECKPOINT_SUFFIXES and not path.exists()


def _refuse(value: object, name: str, owner: str) -> None:
    if value is not None:
        raise InputError(f"{name} {value}: only {owner} can be loaded with one: leave out {name} (--{name})")


def _unknown(source: str) -> str:
    near = difflib.get_close_matches(source, [*OFFICIAL, DIGITS], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{source}: no such model: {hint}A model is {ACCEPTED}"


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == AUTO_DTYPE:
        return torch.bfloat16 if bfloat16_wins(device.type) else torch.float32
    kind = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    if kind not in DTYPES.values():
        raise InputError(f"dtype {dtype!r} is unknown: use {', '.join([AUTO_DTYPE, *DTYPES])}")
    return kind


# -- download -----------------------------------------------------------------------------------


def _download_official(name: str, revision: str | None) -> ElasticVAR:
    from huggingface_hub import hf_hub_download

    with hub_client(f"cannot load {name} from {OFFICIAL_REPO}", revision):
        options = {"revision": revision, "local_files_only": not _reachable()}
        files = [hf_hub_download(OFFICIAL_REPO, file, **options) for file in (OFFICIAL[name], OFFICIAL_VAE)]
    return load_official(*files, name=name, base_model=OFFICIAL_REPO, license=OFFICIAL_LICENSE)


def _download_elastic(repo: str, revision: str | None, *, also: Sequence[str] = ()) -> Path:
    """The snapshot of an elastic model, with the files that match `also`.

    Its config is looked at before gigabytes of something else come down.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    none = f"{repo}: holds no elastic model ({CONFIG} and {WEIGHTS} of varcompress)"
    with hub_client(f"cannot load {repo}: it is no path here, and from the Hub", revision):
        cached_only = not _reachable()
        try:
            config = Path(hf_hub_download(repo, CONFIG, revision=revision, local_files_only=cached_only))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise  # the Hub could not be asked
            raise InputError(none) from error
        if not _is_config(config):
            raise InputError(none)
        wanted = [CONFIG, WEIGHTS, RECIPE, CARD, *also]
        commit = config.parent.name  # the cache names a snapshot by its commit: all files come from that one
        options = {"allow_patterns": wanted, "local_files_only": cached_only}
        folder = Path(snapshot_download(repo, revision=commit, **options))
    if not is_elastic(folder):
        raise InputError(none)
    return folder


def _reachable() -> bool:
    """Whether the Hub answers at all. Where it does not, the client itself would try for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.DEFAULT_REQUEST_TIMEOUT)
    except Exception:  # by its version of requests or httpx, or that HF_HUB_OFFLINE is set
        return False
    return True


def _is_config(path: Path) -> bool:
    try:
        return {"format", "var", "tokenizer"} <= json.loads(path.read_text(encoding="utf-8")).keys()
    except (ValueError, AttributeError):
        return False


# -- push ---------------------------------------------------------------------------------------


def push(
    model: str | Path | ElasticVAR,
    repo: str,
    *,
    vae: str | Path | None = None,
    revision: str | None = None,
    branch: str | None = None,
    private: bool = False,
    results: Iterable[str | Path | dict] = (),
    base_model: str | None = None,
    license: str | None = None,
    progress: Progress = silent,
) -> dict:
    """Publish a model on the Hub: weights, config, recipe, card, results and their plots in one commit.

    model: an elastic directory, a loaded model, or whatever `load` opens with `vae` and `revision`; branch: the one
    to commit to. results: of `profile` and `evaluate`, as dicts or JSON files; those that lie in the model's
    directory, here or on the Hub, come along unasked, and so does a picture samples.png.
    base_model, license: the Hub's ids of what the model was made from, where the model does not know them.
    Results, samples and recipe of an earlier push that have no successor are removed.
    A README.md in the directory that is not the generated card is published as it is.
    Returns {"kind": "push", "repo", "url", "commit", "private", "card": "generated" or "own", "files", "bytes"}.
    Raises InputError when something is not readable, a result is of other weights, or the Hub refuses; nothing local
    is changed, and nothing is published before the one commit.
    """
    with scratch_folder() as scratch:
        progress(0, 3, "read the model and its results")
        folder = _elastic_folder(model, vae, revision, scratch / "model")
        loaded = load_elastic(folder)
        files = {name: folder / name for name in (CONFIG, WEIGHTS, RECIPE, SAMPLES) if (folder / name).is_file()}
        if (base_model, license) != (None, None):
            _state_origin(loaded, base_model, license)
            files[CONFIG] = _write(scratch / CONFIG, config_text(loaded))
        weights = {fingerprint(each) for each in (loaded, model) if isinstance(each, ElasticVAR)}
        measured = _measured(loaded, _results(folder, results), weights, scratch)
        files |= {name: scratch / name for stem in measured for name in (f"{stem}.json", f"{stem}.png")}
        progress(1, 3, f"create {repo}")
        repo, is_private = _create(repo, private)
        own = has_own_card(folder)
        samples = SAMPLES if SAMPLES in files else None
        files[CARD] = folder / CARD if own else _write(scratch / CARD, _card(loaded, measured, repo, samples))
        size = sum(path.stat().st_size for path in files.values())
        progress(2, 3, f"upload {len(files)} files, {size / 2**20:,.1f} MiB")
        commit, url = _commit(repo, files, branch)
        progress(3, 3, f"published {repo}")
    return {
        "kind": "push",
        "repo": repo,
        "url": url,
        "commit": commit,
        "private": is_private,
        "card": "own" if own else "generated",
        "files": sorted(files),
        "bytes": size,
    }


def _card(model: ElasticVAR, measured: dict[str, dict], repo: str, samples: str | None) -> str:
    plots = {f"{stem}.png": f"Plot of the {result['kind']} results" for stem, result in measured.items()}
    return model_card(model, list(measured.values()), repo=repo, plots=plots, samples=samples)


def _write(path: Path, text: str) -> Path:
    with disk_errors(path):
        path.write_text(text, encoding="utf-8")
    return path


def _elastic_folder(
    model: str | Path | ElasticVAR, vae: str | Path | None, revision: str | None, scratch: Path
) -> Path:
    """The model's elastic directory, here or downloaded; written to `scratch` when it has none of its own."""
    in_memory = isinstance(model, ElasticVAR)
    if in_memory or is_elastic(Path(model).expanduser()):
        _refuse(vae, "vae", "a transformer .pth")
        _refuse(revision, "revision", "models on the Hub")
        return save_elastic(model, scratch) if in_memory else Path(model).expanduser()
    if _is_hub_id(str(model)):
        _refuse(vae, "vae", "a transformer .pth")
        return _download_elastic(str(model), revision, also=[f"{kind}*.json" for kind in RESULT_KINDS] + [SAMPLES])
    return save_elastic(_open(str(model), vae, revision), scratch)


def _state_origin(model: ElasticVAR, base_model: str | None, license: str | None) -> None:
    """Put what the publisher says of the model's origin into it. Raises InputError for what is no Hub id."""
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise InputError(f"base model {base_model!r} is no Hub id: write one such as {OFFICIAL_REPO}")
    known = OFFICIAL_LICENSE if base_model == OFFICIAL_REPO else None
    origin = model.provenance
    origin.base_model, origin.license = base_model or origin.base_model, license or known or origin.license


def _results(folder: Path, given: Iterable[str | Path | dict]) -> dict[str, dict]:
    """Where it is from -> result: those given, then those that lie in the model's directory and were not given."""
    results = {}
    for number, item in enumerate(given):
        source = f"results[{number}]" if isinstance(item, dict) else str(item)
        results[source] = _result(source, item) if isinstance(item, dict) else _read_result(Path(item))
    for path in sorted(folder.glob("*.json"), key=lambda path: (len(path.stem), path.stem)):  # eval-2 before eval-10
        with contextlib.suppress(InputError):  # config.json, logs and the like are no results
            if (found := _read_result(path)) not in results.values():
                results[str(path)] = found
    return results


def _read_result(path: Path) -> dict:
    try:
        return _result(str(path), json.loads(path.read_text(encoding="utf-8")))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: not a readable JSON file ({why})") from error


def _result(source: str, content: object) -> dict:
    """A result without the folders in which its reference lay: they are nobody else's business."""
    if not isinstance(content, dict) or content.get("kind") not in RESULT_KINDS:
        raise InputError(f"{source}: not a result: give what {' or '.join(RESULT_KINDS)} wrote (KIND.json)")
    return content | ({"reference": Path(str(content["reference"])).name} if "reference" in content else {})


def _measured(model: ElasticVAR, results: dict[str, dict], weights: set[str], folder: Path) -> dict[str, dict]:
    """Stem of its files on the Hub (profile, profile-2, eval) -> result. JSON and plot are written to `folder`.

    weights: the fingerprints under which the model was measured. Raises InputError for a result of other weights,
    and for one that is damaged.
    """
    measured: dict[str, dict] = {}
    for source, result in results.items():
        kind = result["kind"]
        if result.get("weights") not in weights:
            raise InputError(
                f"{source}: was not measured on these weights: measure them with `varcompress {kind}`, or take it away"
            )
        count = 1 + sum(other["kind"] == kind for other in measured.values())
        stem = kind if count == 1 else f"{kind}-{count}"
        try:
            model_card(model, [result])
            report.PLOTS[kind](result, folder / f"{stem}.png")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
            if isinstance(error, InputError):
                raise
            detail = f"lacks {error}" if isinstance(error, KeyError) else "is damaged"
            raise InputError(f"{source}: the {kind} result {detail}: measure it again") from error
        measured[stem] = result | {"weights": fingerprint(model)}  # of the file that is published: a cast rounds
        _write(folder / f"{stem}.json", json.dumps(measured[stem], indent=2) + "\n")
    return measured


def _create(repo: str, private: bool) -> tuple[str, bool]:
    """Create the repository unless it is there. Returns its full name, and whether it is private.

    A private push never goes to a public repository.
    """
    from huggingface_hub import HfApi

    with hub_client(f"cannot create {repo} on the Hub"):
        api = HfApi()
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        is_private = bool(api.model_info(repo).private)
    if private and not is_private:
        raise InputError(f"{repo}: exists on the Hub and is public: make it private there, or leave out --private")
    return repo, is_private


def _commit(repo: str, files: dict[str, Path], branch: str | None) -> tuple[str, str]:
    """Upload all files in one commit, without what an earlier push left and this one has not. Returns commit, URL."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    with hub_client(f"cannot upload to {repo}; nothing was published", branch):
        api = HfApi()
        present = api.list_repo_files(repo, revision=branch)
        stale = [name for name in present if name not in files and OURS.fullmatch(name)]
        done = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message="Publish with varcompress",
            revision=branch,
        )
        return done.oid, f"{api.endpoint}/{repo}"


# -- what the Hub refuses -----------------------------------------------------------------------


@contextlib.contextmanager
def hub_client(doing: str, revision: str | None = None) -> Iterator[None]:
    """For a block that does nothing but call the Hub's client: its bars on a terminal only, its errors as one line.

    Its warnings are about retries and other details of that error: they are not shown, unless it is set to tell more.

    Raises InputError for whatever the client raises: what failed, why, and the remedy.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    if level == logging.WARNING:  # its default
        logger.setLevel(logging.ERROR)
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # by its version the client raises errors of requests, httpx or hf_xet, and its own
        raise InputError(f"{doing}: {_reason(error, revision)}") from error
    finally:
        logger.setLevel(level)
        if hide:
            enable_progress_bars()


def _reason(error: Exception, revision: str | None) -> str:
    """One line: why the Hub refused, and the remedy."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__:
        chain.append(cause)

    def find(*types: type[BaseException]) -> BaseException | None:
        return next((link for link in chain if isinstance(link, types)), None)

    if any(getattr(link, "errno", None) in NO_ROOM for link in chain):
        return "no room left on the disk: free some, or set HF_HOME to a folder on another disk"
    if find(errors.GatedRepoError):
        return "access is restricted: ask for it on the model's page, then run `hf auth login`"
    if find(errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}: check the branch, tag or commit"
    if find(errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private: check the name, or run `hf auth login`"
    answers = [link for link in chain if getattr(link, "response", None) is not None]
    if answers:
        return _refused(answers[0])
    if find(errors.HFValidationError):
        return "this is no repository name: write organisation/name with letters, digits, - _ and ."
    if find(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, *_transport_errors()):
        return f"{constants.ENDPOINT} cannot be reached: check the connection, HF_ENDPOINT and HF_HUB_OFFLINE"
    return _one_line(chain[-1])


def _transport_errors() -> list[type[BaseException]]:
    """What the client's HTTP library (requests, httpx, ...) raises without an answer: relatives of its HTTP error."""
    from huggingface_hub.errors import HfHubHTTPError

    return [kind for kind in HfHubHTTPError.__mro__[1:] if kind.__module__ != "builtins"]


def _refused(refusal: BaseException) -> str:
    status = refusal.response.status_code
    if status == 401:
        return "the Hub does not know you: run `hf auth login`"
    if status == 403:
        said = getattr(refusal, "server_message", None)
        return f"your token does not allow it{f' ({said})' if said else ''}: run `hf auth login` with one that does"
    if status == 429 or status >= 500:
        return f"the Hub answered {status}: try again later"
    return _one_line(refusal)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
