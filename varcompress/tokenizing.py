"""The tokens of a data set, made once for many runs: `tokenize`."""

from __future__ import annotations

import time
import warnings
from functools import partial
from pathlib import Path

import torch

from varcompress.data.interface import Source
from varcompress.data.sources import open_source
from varcompress.data.tokens import StoredTokens, TokenStore, tokenizer_digest
from varcompress.distributed import joined, local_device
from varcompress.errors import InputError
from varcompress.images import skipped_note
from varcompress.models.elastic import ElasticVAR
from varcompress.progress import Note, Progress, silent


def tokenize(
    model: ElasticVAR,
    data: str | Path | None,
    out: str | Path,
    *,
    views: int = 1,
    progress: Progress = silent,
    note: Note = warnings.warn,
) -> dict:
    """Encode the images of a data set with a model's tokenizer into a store, which `distill` takes in their place.

    data: as `open_source` takes it; views: of each image, the centre, then random crops. Interrupted at any moment and
    called again, it goes on and writes the same bytes. Under torchrun every process calls this and encodes its share.

    Returns {"kind": "tokenize", "out", "data", "tokenizer", "digest", "images", "skipped", "views", "tokens", "bytes",
    "encoded", "seconds", "images_per_s"}: digest of the images; skipped: names of those that could not be read; tokens:
    of all views; encoded: images of this call. Raises InputError for images that do not fit the model, a directory that
    holds anything else, and a full disk.
    """
    with joined(local_device(model.device)) as ranks:
        if not ranks.is_rank_zero:
            progress = note = silent
        model.to(local_device(model.device))
        source = ranks.on_rank_zero(lambda: _images(data, model))
        digest = ranks.check_same(partial(tokenizer_digest, model), "the tokenizer", "open the same file everywhere")
        store = TokenStore(out, source, model, views)
        ranks.on_rank_zero(store.create)
        started = time.perf_counter()
        encoded = ranks.sum_(torch.tensor(store.encode(ranks.rank, ranks.count, progress), device=model.device))
        seconds = time.perf_counter() - started  # of the slowest process, for which the sum has waited
        ranks.on_rank_zero(store.read)
    stored = store.read()
    if stored.skipped:
        note(skipped_note(stored.skipped, len(source)))
    return {
        "kind": "tokenize",
        "out": str(out),
        "data": source.name,
        "tokenizer": digest,
        "digest": source.digest,
        "images": len(stored),
        "skipped": list(stored.skipped),
        "views": views,
        "tokens": len(stored) * views * stored.tokens.shape[-1],
        "bytes": store.size,
        "encoded": int(encoded),
        "seconds": round(seconds, 3),
        "images_per_s": round(int(encoded) / seconds, 1),
    }


def _images(data: str | Path | None, model: ElasticVAR) -> Source:
    source = open_source(data, model)
    if isinstance(source, StoredTokens):
        raise InputError(f"{source.name}: holds tokens already: give images")
    return source
