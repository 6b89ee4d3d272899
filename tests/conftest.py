"""Small models with random weights, drawn once per session."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import huggingface_hub
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # before the first import of Triton, whose kernels then run on a CPU
    os.environ["TRITON_INTERPRET"] = "1"

from tests.hub_server import TOKEN, HubServer, point_client_at
from varcompress.cli.app import main
from varcompress.models.autoencoder import TokenizerConfig
from varcompress.models.elastic import ElasticVAR, Provenance
from varcompress.models.runtime import Runtime
from varcompress.models.tokenizer import VQVAE
from varcompress.models.transformer import VAR, VARConfig
from varcompress.publish import save

RECIPE = {"depths": [4, 2], "bridge": 2, "learning_rate": 1e-4, "seed": 0}


# each process of pytest-xdist has its share of the cores
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(autouse=True, scope="session")
def packed_weights():
    """Weights are packed wherever they can be, not where a trial of this moment says that it is faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("varcompress.models.linear.is_faster", lambda call, other: call() is not None)
        yield


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """References are kept in a folder of the session, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VARCOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def one_thread():
    """Small models train faster so, and alike on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


settings.register_profile("any machine", deadline=None)  # a slow machine is no failure
settings.load_profile("any machine")


def random_model(
    *, depth=6, width=32, heads=2, patch_nums=(1, 2, 3, 4), vocab=40, classes=10, shared_aln=False, seed=0
) -> ElasticVAR:
    """An ElasticVAR with random weights, large enough that every layer and every token matters."""
    torch.manual_seed(seed)
    var = VAR(VARConfig(depth, width, heads, tuple(patch_nums), vocab, 8, classes, shared_aln, 4 * width))
    tokenizer = VQVAE(TokenizerConfig(32, (1, 1), 1, 8, vocab, 4, 3, tuple(patch_nums)))
    with torch.no_grad():
        for name, parameter in var.named_parameters():
            if "scale_mul" not in name:
                parameter.normal_(std=0.5 if parameter.ndim == 1 or "emb" in name or "pos" in name else width**-0.5)
    return ElasticVAR(var, tokenizer)


def placed(model: ElasticVAR, device: torch.device | None = None, **how) -> ElasticVAR:
    """The model placed to run as `how` says, else as by default, in the dtype and on the device that it has."""
    return model.place(Runtime(device or model.device, model.dtype, **how))


@pytest.fixture(scope="session")
def tiny() -> ElasticVAR:
    """6 layers, scales 1 2 3 4, 10 classes, 8 x 8 pixels."""
    return random_model()


def score_of(value: float, half: float = 1.0, **more: object) -> dict:
    """A score as a result holds it."""
    return {"value": value, "interval": [value - half, value + half], **more}


class OnDevice(torch.Tensor):
    """A tensor that numpy cannot read, as one on a GPU, until it was brought to the CPU."""

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def in_threads(work, arguments) -> None:
    """Run work(*given) for each of `arguments`, in a thread of its own; raises what the first of them failed with."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        for running in [pool.submit(work, *given) for given in arguments]:
            running.result()


def official_state(model: ElasticVAR) -> tuple[dict, dict]:
    """State dicts as the public training code writes them, buffers included."""
    config = model.var.config
    levels = model.var.layout.scale[None]
    var = {**model.var.state_dict(), "lvl_1L": levels}
    seen = levels[0][:, None] >= levels[0][None, :]
    var["attn_bias_for_masking"] = torch.where(seen, 0.0, -torch.inf)[None, None]
    for layer in range(config.depth):
        var[f"blocks.{layer}.attn.zero_k_bias"] = torch.zeros(config.width)
    hits = torch.zeros(len(config.patch_nums), config.vocab)
    return var, {**model.tokenizer.state_dict(), "quantize.ema_vocab_hit_SV": hits}


@pytest.fixture(scope="session")
def tiny_files(tiny, tmp_path_factory):
    """A directory with var.pth and vae.pth in the official format."""
    folder = tmp_path_factory.mktemp("official")
    var, vae = official_state(tiny)
    torch.save(var, folder / "var.pth")
    torch.save(vae, folder / "vae.pth")
    return folder


@pytest.fixture(scope="session")
def elastic(tiny, tmp_path_factory):
    """An elastic directory of the tiny model, made by a recipe."""
    folder = tmp_path_factory.mktemp("elastic") / "model"
    model = ElasticVAR(tiny.var, tiny.tokenizer, bridge=2, depths=(4, 2))
    model.provenance = Provenance("tiny", "FoundationVision/var", "mit", RECIPE)
    return save(model, folder)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on the loopback, where TOKEN belongs to `ann`. The client's address, cache and token point to it."""
    with HubServer() as server:
        server.tokens[TOKEN] = {"ann"}
        point_client_at(server.endpoint, monkeypatch)
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # older clients have none
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


class Outcome(NamedTuple):
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys):
    """Run `varcompress` with the given arguments, as its script does: -> Outcome."""

    def run(*arguments) -> Outcome:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        return Outcome(exit_.value.code or 0, *capsys.readouterr())

    return run
