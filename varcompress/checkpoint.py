"""Official checkpoints in; elastic directories in and out.

An official checkpoint is a `.pth` of FoundationVision/VAR, one file for the transformer and one for
the tokenizer; everything about the model is read from the shapes it holds. An elastic directory is

    config.json         shapes, bridge, depths, subnets, the cfg that is distilled into it, base model
    model.safetensors   `var.*` and `tokenizer.*`, the official keys behind those prefixes
    recipe.yaml         the recipe that made it, when there was one
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from varcompress.errors import InputError
from varcompress.files import disk_errors, replacing, write_text
from varcompress.fingerprint import values_digest
from varcompress.models.autoencoder import TokenizerConfig
from varcompress.models.elastic import ElasticVAR, Provenance
from varcompress.models.tokenizer import VQVAE
from varcompress.models.transformer import VAR, VARConfig
from varcompress.results import check_owner
from varcompress.sampling import DistilledCfg, checked_cfg
from varcompress.schedule import is_subnet

FORMAT = 1
CONFIG, WEIGHTS, RECIPE = "config.json", "model.safetensors", "recipe.yaml"
# Rebuilt from the shapes, never learned: accepted in a checkpoint and dropped.
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")
Shapes = Mapping[str, tuple[int, ...]]
Built = TypeVar("Built", bound=nn.Module)


# -- shapes to configurations -------------------------------------------------------------------


def var_config(shapes: Shapes, patch_nums: tuple[int, ...]) -> VARConfig:
    """The transformer that a state dict with these shapes belongs to. KeyError if it is none."""
    vocab, width = shapes["head.weight"]
    return VARConfig(
        depth=1 + max(int(m[1]) for key in shapes if (m := re.match(r"blocks\.(\d+)\.", key))),
        width=width,
        heads=shapes["blocks.0.attn.scale_mul_1H11"][1],
        patch_nums=patch_nums,
        vocab=vocab,
        z_channels=shapes["word_embed.weight"][1],
        classes=shapes["class_emb.weight"][0] - 1,
        shared_aln="shared_ada_lin.1.weight" in shapes,
        hidden=shapes["blocks.0.ffn.fc1.weight"][0],
        cfg_input="cfg_embed.0.weight" in shapes,
    )


def tokenizer_config(shapes: Shapes, patch_nums: tuple[int, ...]) -> TokenizerConfig:
    """The tokenizer that a state dict with these shapes belongs to. KeyError if it is none."""
    channels = shapes["encoder.conv_in.weight"][0]
    levels = 1 + max(int(m[1]) for key in shapes if (m := re.match(r"encoder\.down\.(\d+)\.", key)))
    blocks = 1 + max(int(m[1]) for key in shapes if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", key)))
    vocab, z_channels = shapes["quantize.embedding.weight"]
    return TokenizerConfig(
        channels=channels,
        channel_multipliers=tuple(
            shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] // channels for level in range(levels)
        ),
        res_blocks=blocks,
        z_channels=z_channels,
        vocab=vocab,
        phis=1 + max(int(m[1]) for key in shapes if (m := re.match(r"quantize\.quant_resi\.qresi_ls\.(\d+)\.", key))),
        kernel=shapes["quant_conv.weight"][2],
        patch_nums=patch_nums,
    )


def patch_nums_of(levels: Tensor) -> tuple[int, ...]:
    """Sides of the token maps from the level buffer lvl_1L, (1, L) scale indices."""
    counts = torch.bincount(levels.flatten().long()).tolist()
    sides = tuple(round(count**0.5) for count in counts)
    if [side * side for side in sides] != counts:
        raise InputError(
            f"the level buffer holds maps of {counts} tokens, which are not squares: download the checkpoint again"
        )
    return sides


def check_fit(var: VARConfig, tokenizer: TokenizerConfig) -> None:
    """Raises InputError when the tokenizer's codebook is not the one that the transformer speaks."""
    mine, theirs = (var.vocab, var.z_channels), (tokenizer.vocab, tokenizer.z_channels)
    if mine != theirs:
        raise InputError(
            f"wrong tokenizer for this model: it has a codebook of {theirs[0]} x {theirs[1]}, "
            f"the model needs {mine[0]} x {mine[1]}; give the one it was trained with as vae (--vae)"
        )


# -- official .pth ------------------------------------------------------------------------------


def read_pth(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.pth`, memory-mapped and read with weights_only=True, never otherwise.

    The training script's wrapper {"trainer": {"var_wo_ddp": ...}} is opened too.
    Raises InputError when the file is missing, truncated or no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign files, which the error below is for
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises half a dozen types for a file that is not its own
        raise InputError(
            f"{path}: not a readable PyTorch checkpoint (truncated, or it holds more than weights): download it again"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("trainer"), dict):
        trainer = state["trainer"]
        state = trainer.get("var_wo_ddp", trainer.get("vae_local", trainer))
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(
            f"{path}: holds no state dict of tensors, so it is not a VAR checkpoint: give one such as var_d16.pth"
        )
    return state


def _learned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith(BUFFERS)}


def _build(kind: str, where: object, build: Callable[[], Built], state: Mapping[str, Tensor]) -> Built:
    """Build a module without allocating it, then give it the tensors of `state`."""
    try:
        with torch.device("meta"):
            module = build()
        module.load_state_dict(_learned(state), strict=True, assign=True)
    except (KeyError, RuntimeError, ValueError, IndexError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        detail = f"lacks {error}" if isinstance(error, KeyError) else str(error).strip().splitlines()[-1].strip()
        raise InputError(
            f"{where}: not a {kind} in the official format ({detail}): give a file of FoundationVision/var"
        ) from error
    return module.requires_grad_(True)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def build_var(state: Mapping[str, Tensor], patch_nums: tuple[int, ...] | None = None, where: object = "state") -> VAR:
    """A transformer that holds the tensors of an official state dict, without copying them."""

    def build() -> VAR:
        return VAR(var_config(_shapes(state), patch_nums or patch_nums_of(state["lvl_1L"])))

    return _build("VAR transformer", where, build, state)


def build_tokenizer(state: Mapping[str, Tensor], patch_nums: tuple[int, ...], where: object = "state") -> VQVAE:
    """A tokenizer that holds the tensors of an official state dict, without copying them."""
    return _build("VQVAE tokenizer", where, lambda: VQVAE(tokenizer_config(_shapes(state), patch_nums)), state)


def load_official(path: str | Path, vae: str | Path, **provenance) -> ElasticVAR:
    """An untouched model from an official transformer and tokenizer file."""
    var = build_var(read_pth(path), where=path)
    tokenizer = build_tokenizer(read_pth(vae), var.config.patch_nums, where=vae)
    check_fit(var.config, tokenizer.config)
    return ElasticVAR(var, tokenizer, provenance=Provenance(**{"name": Path(path).stem, **provenance}))


# -- elastic directory --------------------------------------------------------------------------


def save_elastic(model: ElasticVAR, path: str | Path) -> Path:
    """Write an elastic directory. Each file appears whole or not at all; other files there are left alone.

    Raises InputError when `path` is not a directory, holds something else or results of other weights, or the disk is
    full.
    """
    path = Path(path)
    check_output(path)
    check_owner(path, values_digest(model))  # of the weights as they will lie there
    tensors = {
        f"{part}.{key}": value.detach().cpu().contiguous()
        for part in ("var", "tokenizer")
        for key, value in getattr(model, part).state_dict().items()
    }
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with replacing(path / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_text(path / CONFIG, config_text(model))
        if model.provenance.recipe is None:
            (path / RECIPE).unlink(missing_ok=True)  # that of the model which lay here before
        else:
            write_text(path / RECIPE, yaml.safe_dump(model.provenance.recipe, sort_keys=False))
    return path


def config_text(model: ElasticVAR) -> str:
    """config.json of an elastic directory."""
    config = {
        "format": FORMAT,
        "var": dataclasses.asdict(model.var.config),
        "tokenizer": dataclasses.asdict(model.tokenizer.config),
        "bridge": model.bridge,
        "depths": list(model.depths),
        "subnets": model.subnets,
        "distilled_cfg": model.distilled_cfg,
        **{key: value for key, value in dataclasses.asdict(model.provenance).items() if key != "recipe"},
    }
    return json.dumps(config, indent=2) + "\n"


def load_elastic(path: str | Path) -> ElasticVAR:
    """A model from an elastic directory. Raises InputError when it is none, or damaged."""
    path = Path(path)
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise InputError(
            f"{path}: not an elastic directory: it lacks {CONFIG} or {WEIGHTS}: give one that distill or save wrote"
        )
    try:
        config, state = json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)
        recipe = yaml.safe_load((path / RECIPE).read_text()) if (path / RECIPE).is_file() else None
    except (SafetensorError, yaml.YAMLError, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    parts = {
        part: {k[len(part) + 1 :]: v for k, v in state.items() if k.startswith(part + ".")}
        for part in ("var", "tokenizer")
    }
    return assembled(config, parts, recipe, path)


def _damaged(path: Path, error: Exception) -> InputError:
    detail = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
    return InputError(f"{path}: damaged elastic directory ({detail}): save or download it again")


def assembled(config: dict, parts: Mapping[str, Mapping[str, Tensor]], recipe: dict | None, path: Path) -> ElasticVAR:
    """A model from what config.json says and the tensors of its parts, var and tokenizer.

    path: the directory that they are from. Raises InputError where they do not fit each other.
    """
    try:
        if config["format"] != FORMAT:
            raise InputError(f"{path / CONFIG}: format {config['format']} is not known: update varcompress")
        patch_nums = tuple(config["var"]["patch_nums"])
        bridge, depths = int(config["bridge"]), tuple(map(int, config["depths"]))
        subnets = {int(count): tuple(layers) for count, layers in dict(config.get("subnets", {})).items()}
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error
    var = build_var(parts["var"], patch_nums, where=path / WEIGHTS)
    tokenizer = build_tokenizer(parts["tokenizer"], patch_nums, where=path / WEIGHTS)
    check_fit(var.config, tokenizer.config)
    depth, scales = var.config.depth, len(patch_nums)
    if not 0 <= bridge <= scales or any(not 0 < d <= depth for d in depths):
        raise InputError(
            f"{path / CONFIG}: bridge {bridge} and depths {list(depths)} do not fit a model of "
            f"{depth} layers and {scales} scales: save or download it again"
        )
    for count, layers in subnets.items():
        if len(layers) != count or not is_subnet(layers, depth):
            raise InputError(
                f"{path / CONFIG}: subnet {count} of layers {list(layers)} does not fit a model of {depth} layers: "
                "save or download it again"
            )
    distilled = _distilled_cfg(config.get("distilled_cfg"), var.config, path / CONFIG)
    provenance = Provenance(
        name=config.get("name", path.name),
        base_model=config.get("base_model"),
        license=config.get("license"),
        recipe=recipe,
    )
    trained = {"bridge": bridge, "depths": depths, "subnets": subnets, "distilled_cfg": distilled}
    return ElasticVAR(var, tokenizer, **trained, provenance=provenance)


def _distilled_cfg(value: object, config: VARConfig, where: Path) -> DistilledCfg:
    """What config.json says the guidance is distilled for. Raises InputError for what is no cfg or does not fit."""
    try:
        distilled = checked_cfg(value)
    except InputError as error:
        raise InputError(f"{where}: {error}: save or download it again") from error
    if isinstance(distilled, tuple) != config.cfg_input:
        takes = "takes the cfg as an input" if config.cfg_input else "takes no cfg as an input"
        raise InputError(f"{where}: distilled_cfg {value!r} of a model that {takes}: save or download it again")
    return distilled


def is_elastic(path: str | Path) -> bool:
    """Whether a directory claims to be an elastic checkpoint."""
    return (Path(path) / CONFIG).is_file() and (Path(path) / WEIGHTS).is_file()


def check_output(path: str | Path) -> None:
    """Raises InputError unless `path` is new, empty, or an output of ours."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, not a directory: choose another output")
    if path.is_dir() and any(path.iterdir()) and not is_elastic(path):
        raise InputError(f"{path}: holds something else already: choose a new or empty directory")
