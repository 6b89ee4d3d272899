"""Equal to the public implementation (FoundationVision/VAR, commit 78b9539), tensor by tensor.

The seed of a file draws the transformer's weights, seed + 1 the tokenizer's, and seed + 2 the
images behind `tokens`: the tanh of normal noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.golden import weights
from varcompress.checkpoint import build_tokenizer, build_var
from varcompress.models.elastic import ElasticVAR
from varcompress.sampling import Sampling

FOLDER = Path(__file__).parent
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["plain", "shared_aln"])
def golden(request):
    spec = json.loads((FOLDER / f"{request.param}.json").read_text())
    state = {
        part: {key: torch.from_numpy(value) for key, value in weights.draw(shapes, spec["seed"] + offset).items()}
        for offset, (part, shapes) in enumerate(spec["keys"].items())
    }
    patch_nums = tuple(spec["patch_nums"])
    model = ElasticVAR(build_var(state["var"], patch_nums), build_tokenizer(state["vae"], patch_nums))
    tensors = load_file(FOLDER / f"{request.param}.safetensors")
    return SimpleNamespace(
        spec=spec, model=model, expected=tensors, tokens=tensors["tokens"].long(), labels=tensors["labels"].long()
    )


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_every_tensor_has_a_test(golden):
    tested = {"tokens", "greedy_tokens", "teacher_input", "f_hat", "reconstruction", "logits", "greedy_image"}
    assert set(golden.expected) == tested | {"labels"}


def test_shapes_are_read_from_the_checkpoint(golden):
    spec, var, tokenizer = golden.spec, golden.model.var.config, golden.model.tokenizer.config
    assert (var.depth, var.width, var.heads, var.classes) == tuple(
        spec[key] for key in ("depth", "width", "heads", "classes")
    )
    assert (var.vocab, var.z_channels, var.shared_aln) == (spec["vocab"], spec["z_channels"], spec["shared_aln"])
    assert tokenizer.channels == spec["vae_ch"]
    assert list(tokenizer.channel_multipliers) == spec["vae"]["ch_mult"]
    assert tokenizer.res_blocks == spec["vae"]["num_res_blocks"]
    assert tokenizer.phis == spec["vae"]["share_quant_resi"]


def test_tokens(golden):
    size = golden.model.tokenizer.config.image_size
    noise = np.random.RandomState(golden.spec["seed"] + 2).randn(len(golden.labels), 3, size, size)
    images = torch.from_numpy(np.tanh(noise)).float()
    assert torch.equal(golden.model.encode(images / 2 + 0.5), golden.tokens)


def test_teacher_input(golden):
    close(golden.model.tokenizer.teacher_input(golden.tokens), golden.expected["teacher_input"])


def test_f_hat(golden):
    close(golden.model.tokenizer.f_hat(golden.tokens), golden.expected["f_hat"])


def test_reconstruction(golden):
    # the reference leaves reconstructions in [-1, 1]; here every image is in [0, 1]
    close(golden.model.decode(golden.tokens) * 2 - 1, golden.expected["reconstruction"])


def test_logits(golden):
    close(golden.model(golden.labels, golden.tokens), golden.expected["logits"])


def test_greedy_tokens(golden):
    tokens, _ = golden.model.generate_tokens(
        golden.labels, "full", sampling=Sampling(cfg=golden.spec["cfg"], top_k=golden.spec["top_k"])
    )
    assert torch.equal(tokens, golden.expected["greedy_tokens"].long())


def test_greedy_image(golden):
    images = golden.model.generate(golden.labels, "full", cfg=golden.spec["cfg"], top_k=golden.spec["top_k"])
    close(images, golden.expected["greedy_image"])
