"""Train the embedded `digits` model anew: data file, tokenizer, transformer, feature network.

    pip install "varcompress[digits]"
    python -m varcompress.recipes.train_digits --out DIR

writes digits.npz, vae_digits.pth, var_digits.pth and features.pth, as they lie in
varcompress/data/digits. The transformer has 30 layers, so that depths 16, 8, 4 and 2 are the
subnets that they are in VAR-d30; all weights are stored as float16 in the official format.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcompress.checkpoint import check_fit
from varcompress.data import digits
from varcompress.evaluation.digits import DigitsFeatures
from varcompress.models.autoencoder import TokenizerConfig
from varcompress.models.tokenizer import VQVAE
from varcompress.models.transformer import VAR, VARConfig
from varcompress.schedule import Schedule

PATCH_NUMS = (1, 2, 3, 4)
TOKENIZER = TokenizerConfig(
    channels=32,
    channel_multipliers=(1, 1, 2),
    res_blocks=1,
    z_channels=8,
    vocab=256,
    phis=4,
    kernel=3,
    patch_nums=PATCH_NUMS,
)
TRANSFORMER = VARConfig(
    depth=30,
    width=64,
    heads=2,
    patch_nums=PATCH_NUMS,
    vocab=256,
    z_channels=8,
    classes=10,
    shared_aln=False,
    hidden=256,
)
VIEWS = 24
LABEL_DROP = 0.1
BATCH = 64


def write_data(folder: Path) -> None:
    """digits.npz from scikit-learn's copy of the data."""
    from sklearn.datasets import load_digits

    data = load_digits()
    np.savez_compressed(folder / "digits.npz", images=data.images.astype(np.uint8), labels=data.target.astype(np.uint8))


def views() -> tuple[Tensor, Tensor]:
    """All views of all images: (VIEWS * N, 3, 16, 16) and labels."""
    pairs = [digits.load_digits(view) for view in range(VIEWS)]
    return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])


def cosine(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate with linear warm-up and cosine decay to a fiftieth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def minimise(
    parameters: list[nn.Parameter],
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    decay: float,
    name: str,
) -> None:
    """AdamW over `steps` of `loss_at(step) -> loss`, with a line of progress now and then."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=decay)
    started, mean = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, min(200, steps // 10), rate)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        mean += loss.item()
        if (step + 1) % 100 == 0:
            print(f"{name} {step + 1}/{steps} loss {mean / 100:.4f} {time.monotonic() - started:.0f} s", flush=True)
            mean = 0.0


def train_tokenizer(images: Tensor, steps: int) -> VQVAE:
    """Reconstruction plus commitment; an entry of the codebook that no longer wins is put where data is."""
    torch.manual_seed(0)
    vae = VQVAE(TOKENIZER)
    nn.init.normal_(vae.quantize.embedding.weight, std=0.5)
    used = torch.zeros(TOKENIZER.vocab)

    def loss_at(step: int) -> Tensor:
        batch = images[torch.randint(len(images), (BATCH,))]
        f = vae.features(batch)
        if step < steps // 20:  # a plain autoencoder first, so that the codebook starts where features are
            return F.mse_loss(vae.decoder(vae.post_quant_conv(f)), batch * 2 - 1)
        if step % 50 == 0 and step < 0.7 * steps:
            _revive(vae, f.detach(), used)
        tokens = vae.quantize.tokens(f)
        used.add_(tokens.flatten().bincount(minlength=TOKENIZER.vocab))
        sums = list(vae.quantize.partial_sums(tokens))
        quantisation = sum(F.mse_loss(s, f.detach()) + 0.25 * F.mse_loss(s.detach(), f) for s in sums) / len(sums)
        f_hat = f + (sums[-1] - f).detach()
        return F.mse_loss(vae.decoder(vae.post_quant_conv(f_hat)), batch * 2 - 1) + quantisation

    minimise(list(vae.parameters()), loss_at, steps=steps, rate=2e-3, decay=0.0, name="tokenizer")
    with torch.inference_mode():
        plain = images[: len(images) // VIEWS]
        error = F.mse_loss(vae.decode(vae.encode(plain)), plain).item()
        entries = len(vae.encode(plain).unique())
    print(f"tokenizer: reconstruction {10 * math.log10(1 / error):.2f} dB, {entries} of {TOKENIZER.vocab} entries used")
    # the transformer learns the tokens of the tokenizer that ships, which is stored as float16
    return vae.half().float().eval().requires_grad_(False)


@torch.no_grad()
def _revive(vae: VQVAE, f: Tensor, used: Tensor) -> None:
    """Move unused codebook entries onto residuals of this batch, at a random scale each."""
    dead = (used < 1).nonzero().flatten()
    side = PATCH_NUMS[-1]
    residuals, rest = [], f.clone()
    for scale, p in enumerate(PATCH_NUMS):
        z = F.interpolate(rest, size=(p, p), mode="area") if p < side else rest
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        residuals.append(flat[torch.randperm(len(flat))[: len(f)]])
        rest -= vae.quantize.contribution(scale, vae.quantize.nearest(flat).view(len(f), -1))
    pool = torch.cat(residuals)
    vae.quantize.embedding.weight[dead] = pool[torch.randint(len(pool), (len(dead),))]
    used.zero_()


def initialise(var: VAR) -> None:
    """The public training code's initialisation (FoundationVision/VAR, models/var.py init_weights)."""
    depth, width = var.config.depth, var.config.width
    std = math.sqrt(1 / width / 3)
    for name, parameter in var.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "scale_mul" not in name:
            nn.init.trunc_normal_(parameter, std=std)
    with torch.no_grad():
        var.head.weight.mul_(0.02)
        var.head_nm.ada_lin[1].weight.mul_(0.5)
        for block in var.blocks:
            block.attn.proj.weight.div_(math.sqrt(2 * depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * depth))
            block.ada_lin[1].weight[2 * width :].mul_(0.5)
            block.ada_lin[1].weight[: 2 * width].mul_(1e-5)
            block.ada_lin[1].bias[: 2 * width] = 0.1  # open gates: 30 narrow layers start to learn at once


def train_transformer(vae: VQVAE, images: Tensor, labels: Tensor, steps: int) -> VAR:
    torch.manual_seed(1)
    var = VAR(TRANSFORMER)
    initialise(var)
    check_fit(var.config, vae.config)
    with torch.inference_mode():
        tokens = torch.cat([vae.encode(batch) for batch in images.split(512)])
        inputs = torch.cat([vae.teacher_input(batch) for batch in tokens.split(512)])
    tokens, inputs = tokens.clone(), inputs.clone()
    full = Schedule.parse("full", depth=30, patch_nums=PATCH_NUMS, bridge=2)

    def loss_at(step: int) -> Tensor:
        pick = torch.randint(len(images), (BATCH,))
        condition = torch.where(torch.rand(len(pick)) < LABEL_DROP, TRANSFORMER.classes, labels[pick])
        logits = var(condition, inputs[pick], full)
        return F.cross_entropy(logits.flatten(0, 1), tokens[pick].flatten())

    minimise(list(var.parameters()), loss_at, steps=steps, rate=2e-3, decay=0.05, name="transformer")
    return var.eval()


def train_features(images: Tensor, labels: Tensor, steps: int) -> DigitsFeatures:
    """A classifier whose last hidden layer is the feature space of the embedded scores."""
    torch.manual_seed(2)
    network = DigitsFeatures()

    def loss_at(step: int) -> Tensor:
        pick = torch.randint(len(images), (BATCH,))
        return F.cross_entropy(network(images[pick])[1], labels[pick])

    minimise(list(network.parameters()), loss_at, steps=steps, rate=2e-3, decay=0.05, name="features")
    return network.eval()


def save(module: nn.Module, path: Path, buffers: dict[str, Tensor] | None = None) -> None:
    """A state dict in float16, buffers as the public code writes them."""
    state = {key: value.half() for key, value in module.state_dict().items()}
    torch.save({**state, **(buffers or {})}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=digits.FOLDER)
    parser.add_argument("--tokenizer-steps", type=int, default=3000)
    parser.add_argument("--transformer-steps", type=int, default=2400)
    parser.add_argument("--features-steps", type=int, default=2000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_data(options.out)
    images, labels = views()
    vae = train_tokenizer(images, options.tokenizer_steps)
    save(vae, options.out / "vae_digits.pth")
    var = train_transformer(vae, images, labels, options.transformer_steps)
    save(var, options.out / "var_digits.pth", {"lvl_1L": var.layout.scale[None]})
    save(train_features(images, labels, options.features_steps), options.out / "features.pth")


if __name__ == "__main__":
    main()
