"""Models by path, by name or by Hub id: `load` opens whatever a person calls a model."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from varcompress.checkpoint import CONFIG, RECIPE, WEIGHTS, is_elastic, load_elastic, load_official
from varcompress.data.digits import FOLDER as DIGITS_FOLDER
from varcompress.errors import InputError
from varcompress.hardware import bfloat16_wins, choose_device
from varcompress.hub import HUB_ID, hub_client, reachable
from varcompress.models.autoencoder import TokenizerConfig
from varcompress.models.elastic import ElasticVAR, Provenance
from varcompress.models.runtime import Runtime
from varcompress.models.tokenizer import VQVAE
from varcompress.models.transformer import VAR, VARConfig
from varcompress.report.card import CARD

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO_DTYPE = "auto"
CHECKPOINT_SUFFIXES = {".pth", ".pt", ".safetensors"}


@dataclass(frozen=True)
class Named:
    """A model that has a name: its two official files, in a folder here or in a repository of the Hub.

    shape: of its transformer, where it is known without them.
    """

    weights: str
    tokenizer: str
    folder: Path | None = None
    repo: str | None = None
    license: str | None = None
    shape: VARConfig | None = None


OFFICIAL_REPO, OFFICIAL_VAE = "FoundationVision/var", "vae_ch160v4096z32.pth"
AT_256, AT_512 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def official_config(depth: int) -> VARConfig:
    """The shape of an official transformer: all for 256 px, but for d36, which is for 512 and shares its AdaLN."""
    width, large = 64 * depth, depth == 36
    return VARConfig(depth, width, depth, AT_512 if large else AT_256, 4096, 32, 1000, large, 4 * width)


def official_tokenizer(patch_nums: tuple[int, ...]) -> TokenizerConfig:
    """The shape of the official tokenizer, which is the same for both sizes of images."""
    return TokenizerConfig(160, (1, 1, 2, 2, 4), 2, 32, 4096, 4, 3, patch_nums)


NAMED = {
    **{
        f"var-d{depth}": Named(
            f"var_d{depth}.pth", OFFICIAL_VAE, repo=OFFICIAL_REPO, license="mit", shape=official_config(depth)
        )
        for depth in (16, 20, 24, 30, 36)
    },
    "digits": Named("var_digits.pth", "vae_digits.pth", folder=DIGITS_FOLDER, license="mit"),
}


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
    model = open_model(str(source), vae, revision)
    model.tokenizer.float()  # stored in float16 or bfloat16 it would otherwise quantise in it
    return model.place(runtime)


def open_model(source: str, vae: str | Path | None, revision: str | None) -> ElasticVAR:
    """A model as it is stored, on the CPU. Raises InputError as `load` does."""
    path, named = Path(source).expanduser(), NAMED.get(source)
    if path.is_file():
        refuse(revision, "revision", "models on the Hub")
        if vae is None:
            raise InputError(f"{path}: a transformer goes with its tokenizer: give {OFFICIAL_VAE} as vae (--vae)")
        return load_official(path, Path(vae).expanduser())
    if path.suffix in CHECKPOINT_SUFFIXES and not path.exists():
        raise InputError(f"{source}: no such checkpoint file")
    refuse(vae, "vae", "a transformer .pth")
    if path.is_dir() and (is_elastic(path) or not named):
        refuse(revision, "revision", "models on the Hub")
        return load_elastic(path)
    if named:
        files = _files(named, source, revision)
        return load_official(*files, name=source, base_model=named.repo, license=named.license)
    if is_hub_id(source):
        return load_elastic(download_elastic(source, revision))
    raise InputError(_unknown(source))


def outline(source: str, dtype: str = "float32") -> ElasticVAR | None:
    """A model without weights (on torch's device "meta"), where its name alone says what shape it has; else None."""
    kind = _dtype(dtype, torch.device("cpu"))
    named = NAMED.get(source)
    if named is None or named.shape is None or Path(source).expanduser().exists():
        return None
    with torch.device("meta"):
        var, tokenizer = VAR(named.shape), VQVAE(official_tokenizer(named.shape.patch_nums))
    return ElasticVAR(var, tokenizer, provenance=Provenance(source, named.repo, named.license)).cast(kind)


def is_hub_id(source: str) -> bool:
    """Whether a model is to be had from the Hub under this name: what is here goes first."""
    path = Path(source).expanduser()
    return bool(HUB_ID.fullmatch(source)) and path.suffix not in CHECKPOINT_SUFFIXES and not path.exists()


def refuse(value: object, name: str, owner: str) -> None:
    """Raises InputError for an option that was given and that goes with another kind of model."""
    if value is not None:
        raise InputError(f"{name} {value}: only {owner} can be loaded with one: leave out {name} (--{name})")


def _unknown(source: str) -> str:
    near = difflib.get_close_matches(source, NAMED, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    *most, last = NAMED
    accepted = f"a .pth file, an elastic directory, a Hub id such as someone/model, {', '.join(most)} or {last}"
    return f"{source}: no such model: {hint}A model is {accepted}"


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == AUTO_DTYPE:
        return torch.bfloat16 if bfloat16_wins(device.type) else torch.float32
    kind = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    if kind not in DTYPES.values():
        raise InputError(f"dtype {dtype!r} is unknown: use {', '.join([AUTO_DTYPE, *DTYPES])}")
    return kind


# -- download -----------------------------------------------------------------------------------


def _files(named: Named, name: str, revision: str | None) -> list[str | Path]:
    """Transformer and tokenizer of a model that has a name."""
    names = (named.weights, named.tokenizer)
    if named.repo is None:
        refuse(revision, "revision", "models on the Hub")
        return [named.folder / file for file in names]
    from huggingface_hub import hf_hub_download

    with hub_client(f"cannot load {name} from {named.repo}", revision):
        options = {"revision": revision, "local_files_only": not reachable()}
        return [hf_hub_download(named.repo, file, **options) for file in names]


def download_elastic(repo: str, revision: str | None, *, also: Sequence[str] = ()) -> Path:
    """The snapshot of an elastic model, with the files that match `also`.

    Its config is looked at before gigabytes of something else come down.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    none = f"{repo}: holds no elastic model ({CONFIG} and {WEIGHTS} of varcompress)"
    with hub_client(f"cannot load {repo}: it is no path here, and from the Hub", revision):
        cached_only = not reachable()
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


def _is_config(path: Path) -> bool:
    try:
        return {"format", "var", "tokenizer"} <= json.loads(path.read_text(encoding="utf-8")).keys()
    except (ValueError, AttributeError):
        return False
