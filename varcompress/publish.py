"""Models with their cards: `save` to a directory, `push` to the Hub, and `record` what was measured beside a model."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from varcompress.checkpoint import CONFIG, RECIPE, WEIGHTS, config_text, is_elastic, load_elastic, save_elastic
from varcompress.data.tokens import FILES, is_store, store_facts
from varcompress.errors import InputError
from varcompress.files import disk_errors, scratch_folder, write_text
from varcompress.fingerprint import fingerprint, values_digest
from varcompress.hub import HUB_ID, hub_client
from varcompress.loading import NAMED, OFFICIAL_REPO, download_elastic, is_hub_id, open_model, refuse
from varcompress.models.elastic import ElasticVAR
from varcompress.progress import Progress, silent
from varcompress.report.card import CARD, is_generated, model_card
from varcompress.report.plots import PLOTS
from varcompress.report.store_card import store_card
from varcompress.results import (
    MEASURED,
    check_result,
    check_weights,
    intact,
    read_result,
    results_in,
    write_result,
)

SAMPLES = "samples.png"  # a picture that the card shows
# What an earlier push may have left that does not hold for other weights
OURS = re.compile(rf"({'|'.join(MEASURED)})(-\d+)?\.(json|png)|{re.escape(RECIPE)}|{re.escape(SAMPLES)}")


# -- beside a model on a disk -------------------------------------------------------------------


def save(model: ElasticVAR, path: str | Path) -> Path:
    """Write an elastic directory: config.json, model.safetensors, recipe.yaml and a card, README.md. Returns its path.

    Each file appears whole or not at all; other files there are left alone, and so is a card that was edited.
    Raises InputError when `path` is not a directory, holds something else or results of other weights, or the disk is
    full.
    """
    path = save_elastic(model, path)
    _write_card(model, path)
    return path


def record(result: dict, folder: str | Path) -> list[Path]:
    """Write a result of `profile` or `evaluate` with its plot as KIND.json and KIND.png; returns the files written.

    An earlier result of the same kind is kept as KIND.json.old, which `push` passes over. Where the folder is an
    elastic directory of the weights that were measured, its card is written anew with all results there, unless
    it was edited. Raises InputError where something else would be replaced, or a disk is full.
    """
    path = write_result(result, folder)
    written = [path, PLOTS[result["kind"]](result, path.with_suffix(".png"))]
    if is_elastic(folder):
        model = load_elastic(folder)
        if result.get("weights") == values_digest(model):
            written += _write_card(model, Path(folder))
    return written


def _write_card(model: ElasticVAR, folder: Path) -> list[Path]:
    """The card of an elastic directory, with the results there that were measured on its weights; none if edited."""
    if _has_own_card(folder):
        return []
    shown, weights = {}, [values_digest(model)]
    for path, result in results_in(folder).items():
        with contextlib.suppress(InputError):  # `push` says what is the matter with it
            check_weights(path.name, result, weights)
            with intact(path.name, result):
                model_card(model, [result])
            shown[path.stem] = result
    plots = [stem for stem in shown if (folder / f"{stem}.png").is_file()]
    samples = SAMPLES if (folder / SAMPLES).is_file() else None
    with disk_errors(folder / CARD):
        write_text(folder / CARD, _card(model, shown, plots=plots, samples=samples))
    return [folder / CARD]


def _has_own_card(folder: Path) -> bool:
    """Whether a directory holds a card that a person wrote or edited."""
    card = folder / CARD
    return card.is_file() and not is_generated(card.read_text(encoding="utf-8", errors="replace"))


def _card(
    model: ElasticVAR,
    measured: dict[str, dict],
    *,
    plots: Iterable[str],
    samples: str | None,
    repo: str | None = None,
) -> str:
    """The card of a model beside which lie results (stem -> result), the plots of some of them, and samples."""
    shows = {f"{stem}.png": f"Plot of the {measured[stem]['kind']} results" for stem in plots}
    return model_card(model, list(measured.values()), repo=repo, plots=shows, samples=samples)


# -- to the Hub ---------------------------------------------------------------------------------


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

    model: an elastic directory, a loaded model, or whatever `load` opens with `vae` and `revision`; or the directory of
    a finished token store, which becomes a data set; branch: the one to commit to. results: of `profile` and
    `evaluate`, as dicts or JSON files; those that lie in the model's directory, here or on the Hub, come along unasked,
    and so does a picture samples.png.
    base_model, license: the Hub's ids of what the model was made from, where the model does not know them.
    Results, samples and recipe of an earlier push that have no successor are removed.
    A README.md in the directory that is not the generated card is published as it is.
    Returns {"kind": "push", "repo", "url", "commit", "private", "card": "generated" or "own", "files", "bytes"}.
    Raises InputError when something is not readable, a result is of other weights, or the Hub refuses; nothing local
    is changed, and nothing is published before the one commit.
    """
    if not isinstance(model, ElasticVAR) and is_store(Path(model).expanduser()):
        options = {"vae": vae, "revision": revision, "base_model": base_model, "results": next(iter(results), None)}
        for name, value in options.items():
            if value is not None:
                raise InputError(f"{model}: is a token store, which has no {name.replace('_', ' ')}: leave it out")
        return _push_store(Path(model).expanduser(), repo, branch, private, license, progress)
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
        samples = SAMPLES if SAMPLES in files else None

        def card(repo: str) -> str:
            return _card(loaded, measured, plots=measured, samples=samples, repo=repo)

        return _publish(Target(repo, "model", branch, private), folder, files, card, scratch, progress)


def _push_store(
    folder: Path, repo: str, branch: str | None, private: bool, license: str | None, progress: Progress
) -> dict:
    """Publish a finished token store as a data set, with a card. Returns and raises as `push` does."""
    progress(0, 3, "read the token store")
    facts = store_facts(folder)
    files = {name: folder / name for name in FILES}
    with scratch_folder() as scratch:
        target = Target(repo, "dataset", branch, private)
        return _publish(target, folder, files, lambda name: store_card(facts, name, license), scratch, progress)


@dataclass(frozen=True)
class Target:
    """Where on the Hub a push goes. kind: as the Hub has it, model or dataset."""

    repo: str
    kind: str
    branch: str | None
    private: bool


def _publish(
    target: Target, folder: Path, files: dict[str, Path], card: Callable[[str], str], scratch: Path, progress: Progress
) -> dict:
    """Commit files under their names, and a card: that of `folder` where a person wrote it, else what `card` makes."""
    progress(1, 3, f"create {target.repo}")
    repo, is_private = _create(target)
    target = replace(target, repo=repo)
    own = _has_own_card(folder)
    files = {**files, CARD: folder / CARD if own else _write(scratch / CARD, card(repo))}
    size = sum(path.stat().st_size for path in files.values())
    progress(2, 3, f"upload {len(files)} files, {size / 2**20:,.1f} MiB")
    commit, url = _commit(target, files)
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
        refuse(vae, "vae", "a transformer .pth")
        refuse(revision, "revision", "models on the Hub")
        return save_elastic(model, scratch) if in_memory else Path(model).expanduser()
    if is_hub_id(str(model)):
        refuse(vae, "vae", "a transformer .pth")
        return download_elastic(str(model), revision, also=[f"{kind}*.json" for kind in MEASURED] + [SAMPLES])
    return save_elastic(open_model(str(model), vae, revision), scratch)


def _state_origin(model: ElasticVAR, base_model: str | None, license: str | None) -> None:
    """Put what the publisher says of the model's origin into it. Raises InputError for what is no Hub id."""
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise InputError(f"base model {base_model!r} is no Hub id: write one such as {OFFICIAL_REPO}")
    known = next((named.license for named in NAMED.values() if base_model and named.repo == base_model), None)
    origin = model.provenance
    origin.base_model, origin.license = base_model or origin.base_model, license or known or origin.license


def _results(folder: Path, given: Iterable[str | Path | dict]) -> dict[str, dict]:
    """Where it is from -> result: those given, then those that lie in the model's directory and were not given."""
    results = {}
    for number, item in enumerate(given):
        in_memory = isinstance(item, dict)
        source = f"results[{number}]" if in_memory else str(item)
        results[source] = _public(check_result(source, item) if in_memory else read_result(item))
    for path, result in results_in(folder).items():
        if (found := _public(result)) not in results.values():
            results[str(path)] = found
    return results


def _public(result: dict) -> dict:
    """A result without the folders in which its reference and files lay: the publisher's paths stay private."""
    shown = {"reference": Path(str(result["reference"])).name} if "reference" in result else {}
    if result.get("command"):
        shown["command"] = re.sub(r"(?<![\w:])[~.]*/[^\s'=]*/", "", str(result["command"]))
    return result | shown


def _measured(model: ElasticVAR, results: dict[str, dict], weights: set[str], folder: Path) -> dict[str, dict]:
    """Stem of its files on the Hub (profile, profile-2, eval) -> result. JSON and plot are written to `folder`.

    weights: the fingerprints under which the model was measured. Raises InputError for a result of other weights,
    and for one that is damaged.
    """
    measured: dict[str, dict] = {}
    for source, result in results.items():
        check_weights(source, result, weights)
        kind = result["kind"]
        count = 1 + sum(other["kind"] == kind for other in measured.values())
        stem = kind if count == 1 else f"{kind}-{count}"
        with intact(source, result):
            model_card(model, [result])
            PLOTS[kind](result, folder / f"{stem}.png")
        measured[stem] = result | {"weights": fingerprint(model)}  # of the file that is published: a cast rounds
        _write(folder / f"{stem}.json", json.dumps(measured[stem], indent=2) + "\n")
    return measured


def _create(target: Target) -> tuple[str, bool]:
    """Create the repository unless it is there. Returns its full name, and whether it is private.

    A private push never goes to a public repository.
    """
    from huggingface_hub import HfApi

    with hub_client(f"cannot create {target.repo} on the Hub"):
        api = HfApi()
        options = {"repo_type": target.kind, "private": target.private or None, "exist_ok": True}
        repo = api.create_repo(target.repo, **options).repo_id
        is_private = bool(api.repo_info(repo, repo_type=target.kind).private)
    if target.private and not is_private:
        raise InputError(f"{repo}: exists on the Hub and is public: make it private there, or leave out --private")
    return repo, is_private


def _commit(target: Target, files: dict[str, Path]) -> tuple[str, str]:
    """Upload all files in one commit, without what an earlier push left and this one has not. Returns commit, URL."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    repo, where = target.repo, {"repo_type": target.kind, "revision": target.branch}
    with hub_client(f"cannot upload to {repo}; nothing was published", target.branch):
        api = HfApi()
        present = api.list_repo_files(repo, **where)
        ours = OURS if target.kind == "model" else None  # a token store has the same files always
        stale = [name for name in present if ours and name not in files and ours.fullmatch(name)]
        done = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message="Publish with varcompress",
            **where,
        )
        return done.oid, f"{api.endpoint}/{'datasets/' * (target.kind == 'dataset')}{repo}"
