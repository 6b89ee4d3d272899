"""Where training images come from: the kinds of sources, and the choice between them."""

from __future__ import annotations

from pathlib import Path

from varcompress.data.digits import Digits
from varcompress.data.folder import scan
from varcompress.data.hub_dataset import PREFIX, open_hub
from varcompress.data.interface import NamedSource, Source, check_labels
from varcompress.data.shards import index_shards, is_shards
from varcompress.data.tokens import finished_store, is_store
from varcompress.errors import InputError
from varcompress.models.elastic import ElasticVAR

NAMED: dict[str, type[NamedSource]] = {"digits": Digits}
KINDS = "a folder with one subfolder per class, tar shards, a token store, or hf:OWNER/NAME"


def own_source(model: ElasticVAR) -> type[NamedSource] | None:
    """The source of the package that a model, or the one it was compressed from, was made with, if there is one."""
    names, size = (model.provenance.name, model.provenance.base_model), model.tokenizer.config.image_size
    return next((source for source in NAMED.values() if source.model in names and source.image_size == size), None)


def open_source(data: str | Path | None, model: ElasticVAR) -> Source:
    """The images to train a model on, or their tokens.

    data: a folder of images, one subfolder per class; tar shards in webdataset's layout (a folder of them, or a
    pattern such as train-{0000..0146}.tar); the directory of a finished token store; a data set on the Hub, of images
    or of tokens, as hf:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]; or a name of NAMED. None: the model's own source.
    Raises InputError where there is none, and for images that do not fit the model.
    """
    classes, size = model.var.config.classes, model.tokenizer.config.image_size
    kind = own_source(model) if data is None else None if Path(data).is_dir() else NAMED.get(str(data))
    if kind is not None:  # by its name, unless something lies here under it
        if (kind.image_size, kind.classes) != (size, classes):
            raise InputError(
                f"{kind.name}: {kind.classes} classes in {kind.image_size} pixels, "
                f"but the model has {classes} in {size}: give images that fit as --data"
            )
        return kind()
    if data is None:
        raise InputError(f"{model.provenance.name} needs images: give {KINDS} as --data")
    if str(data).startswith(PREFIX):
        return _checked(open_hub(str(data)), classes)
    if is_store(data):
        return _checked(finished_store(data), classes)
    if is_shards(data):
        return index_shards(data, classes)
    return scan(data, classes)


def _checked(source: Source, classes: int) -> Source:
    check_labels(source, classes)
    return source
