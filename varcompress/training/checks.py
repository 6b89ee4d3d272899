"""What is refused before a run begins: a recipe, a model or data that do not fit each other."""

from __future__ import annotations

from varcompress.distributed import Ranks
from varcompress.errors import InputError
from varcompress.models.elastic import ElasticVAR
from varcompress.schedule import is_subnet
from varcompress.training.recipe import Recipe


def check_finite(model: ElasticVAR) -> None:
    """Refuse weights that are not finite, of which nothing can be learnt."""
    spoilt = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if spoilt:
        raise InputError(f"{model.provenance.name}: {spoilt[0]} holds NaN or infinite weights: get the model again")


def check_fit(recipe: Recipe, model: ElasticVAR, ranks: Ranks) -> None:
    """Refuse a recipe that asks for what the model, or the number of processes, has no room for."""
    depth, scales = model.var.config.depth, len(model.var.config.patch_nums)
    if model.distilled_cfg is not None:
        raise InputError(
            f"{model.provenance.name}: guidance is distilled into it already: start from the model that it "
            "was made from"
        )
    if recipe.depths[0] >= depth:
        raise InputError(
            f"recipe: depths names {recipe.depths[0]}, but the model has {depth} layers: list fewer than that"
        )
    numbered = [] if isinstance(recipe.layers, str) else recipe.layers
    if any(not is_subnet(layers, depth) or {layers[0], layers[-1]} != {0, depth - 1} for layers in numbered):
        raise InputError(
            f"recipe: each list of layers must hold the first and the last layer of the model, 0 and {depth - 1}, "
            "and ascend between them"
        )
    if recipe.bridge >= scales:
        raise InputError(
            f"recipe: a bridge of {recipe.bridge} leaves nothing to thin out: "
            f"the model has {scales} scales, choose fewer"
        )
    if recipe.optimizer == "adamw8bit" and ranks.count > 1:
        raise InputError(
            "recipe: optimizer: adamw8bit is for one device: on several set optimizer=adamw and parallel=fsdp, "
            "which divides its moments"
        )
    if recipe.batch_size % (ranks.count * recipe.accumulation):
        raise InputError(
            f"recipe: batch_size {recipe.batch_size} does not divide into "
            f"{ranks.count} processes x {recipe.accumulation} passes (accumulation): choose a multiple"
        )


def check_size(recipe: Recipe, num_images: int) -> None:
    """Refuse data of which, without the images that are held out, there is no batch."""
    kept_aside = recipe.held_out(num_images)
    if recipe.holdout and not kept_aside:
        raise InputError(
            f"recipe: holdout {recipe.holdout:g} of {num_images} images is none of them: raise it, or set 0 and leave "
            "out holdout_every"
        )
    if num_images - kept_aside < recipe.batch_size:
        aside = f" ({kept_aside} of {num_images} are held out)" if kept_aside else ""
        raise InputError(
            f"recipe: batch_size {recipe.batch_size} is more than the {num_images - kept_aside} images there are"
            f"{aside}: lower it"
        )
