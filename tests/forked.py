"""Evaluations in processes of their own that start in a moment: forked from one that has imported everything."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["varcompress.evaluation.scores", "varcompress.loading", "tests.forked"])


def evaluation(elastic: Path, folder: Path, out: Path, num_images: int = 200, **ranks: str) -> BaseProcess:
    """A started process that evaluates a model and writes its result as `out`; ranks: torchrun's variables."""
    process = CONTEXT.Process(target=_evaluate, args=(elastic, folder, out, num_images, ranks), daemon=True)
    process.start()
    return process


def free_port() -> str:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def _evaluate(elastic: Path, folder: Path, out: Path, num_images: int, ranks: dict[str, str]) -> None:
    import torch

    from varcompress.evaluation import evaluate, parts
    from varcompress.loading import load

    os.environ.update(ranks)
    torch.set_num_threads(1)
    parts.BATCHES = 1  # many parts of few images
    model = load(elastic, device="cpu")
    options = {"features": "digits", "num_images": num_images, "batch_size": 4, "folder": folder}
    result = evaluate(model, ["full", "d2@2"], **options)
    if result:
        out.write_text(json.dumps(result))
