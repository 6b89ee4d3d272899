"""Generation beside the public implementation: time, peak memory and images, same weights, interleaved runs.

    python -m tests.benchmarks.generation --reference PATH --sizes d16 --batches 1 8

PATH is a checkout of FoundationVision/VAR, whose code is imported from there; without it only ours is timed. Weights
are random: they change no time. Writes docs/benchmarks/NAME.json, and the tables of all such files into
docs/performance.md; with --out another folder, where the page stays as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.benchmarks.tables import section, write_tables
from varcompress.cost import decoder_flops, predict
from varcompress.errors import InputError
from varcompress.hardware import choose_device, device_name, exact_float32, timed
from varcompress.kernels.backend import CHOICES
from varcompress.memory import LiveTensors, PeakMemory, fitting_batch
from varcompress.models.autoencoder import TokenizerConfig
from varcompress.models.cache import token_bytes
from varcompress.models.elastic import ElasticVAR
from varcompress.models.linear import Linear, pack, packing_pays
from varcompress.models.runtime import Runtime
from varcompress.models.tokenizer import VQVAE
from varcompress.models.transformer import VAR, VARConfig
from varcompress.profiling import conditions
from varcompress.sampling import PUBLISHED, Sampling
from varcompress.schedule import Schedule

ROOT = Path(__file__).parents[2]
FOLDER, CODE = ROOT / "docs" / "benchmarks", ("varcompress", "kernels", "recipes", "tests/benchmarks")
PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
REFERENCE = "reference"
COMPARED = 8  # images, at most, that are compared with the reference's


# -- models ---------------------------------------------------------------------------------------


def random_weights(depth: int, device: torch.device | str = "cpu") -> ElasticVAR:
    """A model of the official shape at 256 px whose random numbers stay in range and whose logits have no near ties."""
    torch.manual_seed(0)
    width = 64 * depth
    with torch.device("meta"):
        var = VAR(VARConfig(depth, width, depth, PATCH_NUMS, 4096, 32, 1000, False, 4 * width))
        tokenizer = VQVAE(TokenizerConfig(160, (1, 1, 2, 2, 4), 2, 32, 4096, 4, 3, PATCH_NUMS))
    var.to_empty(device=device)
    tokenizer.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in var.named_parameters():
            parameter.normal_(std=width**-0.5 if parameter.ndim == 2 and "embed" not in name else 0.1)
            if "scale_mul" in name:
                parameter.fill_(1.4)
        for module in tokenizer.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.normal_(module.bias, std=0.1)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        tokenizer.quantize.embedding.weight.normal_(std=0.5)
        var.head.weight.mul_(4)
    return ElasticVAR(var, tokenizer)


class Reference:
    """The public implementation, its weights those of `model` (the very same tensors, until ours are cast)."""

    def __init__(self, path: Path, model: ElasticVAR, device: torch.device) -> None:
        sys.path.insert(0, str(path))
        with contextlib.redirect_stdout(io.StringIO()):
            from models import build_vae_var

            depth = model.var.config.depth
            with torch.device("meta"), _no_initialisation():
                self.vae, self.var = build_vae_var(
                    V=4096, Cvae=32, ch=160, share_quant_resi=4, device="meta", patch_nums=PATCH_NUMS,
                    num_classes=1000, depth=depth, shared_aln=False,
                )  # fmt: skip
        levels = torch.arange(len(PATCH_NUMS)).repeat_interleave(torch.tensor(PATCH_NUMS) ** 2)[None]
        extra = {"lvl_1L": levels, "attn_bias_for_masking": torch.zeros(1, 1, 680, 680)}
        extra |= {f"blocks.{i}.attn.zero_k_bias": torch.zeros(64 * depth) for i in range(depth)}
        self.var.load_state_dict({**model.var.state_dict(), **extra}, assign=True)
        hits = {"quantize.ema_vocab_hit_SV": torch.zeros(len(PATCH_NUMS), 4096)}
        self.vae.load_state_dict({**model.tokenizer.state_dict(), **hits}, assign=True)
        self.device = device
        self.half = device.type == "cuda"  # float16 autocast, its own best setting there
        self.var.to(device).eval()
        self.vae.to(device).eval()
        attention = self.var.blocks[0].attn
        self.attention = "flash_attn" if attention.using_flash else "xformers" if attention.using_xform else "torch"
        self.var.rng = torch.Generator(device=device)
        self.decode_features, self.vae.fhat_to_img = self.vae.fhat_to_img, lambda f_hat: f_hat

    def _autocast(self) -> torch.autocast:
        """Keeps what it has cast for the whole call, as it does not in inference mode or of weights that are frozen."""
        return torch.autocast("cuda", torch.float16, enabled=self.half, cache_enabled=True)

    @torch.no_grad()
    def features(self, labels: Tensor, **settings: float) -> Tensor:
        """f_hat, halved and shifted as it shifts images."""
        with self._autocast():
            return self.var.autoregressive_infer_cfg(len(labels), labels.to(self.device), g_seed=0, **settings)

    @torch.no_grad()
    def decode(self, shifted: Tensor) -> Tensor:
        with self._autocast():
            return self.decode_features(shifted * 2 - 1).add_(1).mul_(0.5)


@contextlib.contextmanager
def _no_initialisation():
    """The reference initialises what it builds, and reads values while it does; on the meta device there are none."""
    from models.var import VAR as ReferenceVAR

    before, ReferenceVAR.init_weights = ReferenceVAR.init_weights, lambda self, **_: None
    linspace, torch.linspace = torch.linspace, lambda *a, **k: linspace(*a, **{**k, "device": "cpu"})
    tensor, torch.tensor = torch.tensor, lambda *a, **k: tensor(*a, **{**k, "device": "cpu"})
    try:
        yield
    finally:
        ReferenceVAR.init_weights, torch.linspace, torch.tensor = before, linspace, tensor


# -- measuring ------------------------------------------------------------------------------------


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOPs per second of a large matrix product, and bytes per second of a large copy, read and written."""
    side = 8192 if device.type == "cuda" else 1024
    x = torch.randn(side, side, device=device).to(dtype)
    layers = nn.Sequential(Linear(side, side, bias=False, device=device, dtype=dtype))
    nn.init.normal_(layers[0].weight, std=side**-0.5)  # the reference stops torch from initialising
    if packing_pays(layers):
        pack(layers)
    source = torch.empty(1 << 30 if device.type == "cuda" else 1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def fastest_s(call: Callable[[], object]) -> float:
        return min(timed(device, call)[1] for _ in range(6)) / 1e3

    with torch.inference_mode():
        product_s, copy_s = fastest_s(lambda: layers(x)), fastest_s(lambda: target.copy_(source))
    return {"flops_per_second": 2 * side**3 / product_s, "bytes_per_second": 2 * source.nbytes / copy_s}


def floor_ms(model: ElasticVAR, schedule: Schedule, batch: int, rate: dict[str, float], *, guided: bool) -> float:
    """The least time for the tokens: at each scale the larger of its FLOPs and its bytes at the measured rates.

    Bytes: weights of blocks and head, and the keys and values that are read.
    """
    config, element, total, start = model.var.config, model.dtype.itemsize, 0.0, 0
    weights = schedule.weights(width=config.width, mlp_ratio=config.mlp_ratio)
    cached = token_bytes(width=config.width, heads=config.heads, dtype=model.runtime.stored_dtype)
    for scale, (layers, end) in enumerate(zip(schedule.layers, schedule.ends, strict=True)):
        tokens, head = batch * (end - start), config.width * config.vocab
        rows = (1 + guided) * tokens
        flops = rows * (2 * weights[scale] + 4 * len(layers) * end * config.width)
        flops += (rows if scale else tokens) * 2 * head
        read = (weights[scale] + head) * element + 2 * (1 + guided) * batch * len(layers) * end * cached
        total += max(flops / rate["flops_per_second"], read / rate["bytes_per_second"])
        start = end
    return total * 1e3


@dataclass(frozen=True)
class Way:
    """One way to generate: ours under a schedule with some kernels, or the reference's (without either)."""

    name: str
    tokens: Callable[[], object]
    decode: Callable[[object], Tensor]
    begin: Callable[[], None] = lambda: None  # untimed: packs weights or frees them
    schedule: Schedule | None = None
    runtime: Runtime | None = None

    @property
    def kernels(self) -> str | None:
        return self.runtime and self.runtime.kernels


def settings(sampling: Sampling) -> dict[str, float]:
    """The sampling as the reference takes it."""
    return {"cfg": sampling.cfg, **sampling.filters}


def ways_of(
    model: ElasticVAR,
    reference: Reference | None,
    schedules: list[Schedule],
    kernels: list[str],
    batch: int,
    sampling: Sampling,
) -> list[Way]:
    """All ways to generate a batch: every schedule with the first kernels, then with the others, then the reference."""
    labels = torch.arange(batch) % 1000

    def way(schedule: Schedule, choice: str) -> Way:
        runtime = dataclasses.replace(model.runtime, kernels=choice)
        return Way(
            str(schedule) if choice == kernels[0] else f"{schedule}, kernels {choice}",
            lambda **how: model.generate_tokens(labels, schedule, sampling, runtime=how.get("runtime", runtime)),
            lambda output, **how: model.decode_features(output[1], runtime=how.get("runtime", runtime)),
            partial(model.prepare, schedule, runtime),
            schedule,
            runtime,
        )

    ways = [way(schedule, choice) for choice in kernels for schedule in schedules]
    if reference:
        ways.append(Way(REFERENCE, partial(reference.features, labels, **settings(sampling)), reference.decode))
    return ways


def measure(model: ElasticVAR, ways: list[Way], batch: int, runs: int) -> dict[str, dict]:
    """Times of one batch size: every way once per run, in an order shuffled anew.

    The decoder does not depend on the schedule: it is timed after `full`, once for each kernels, and added to the
    tokens of the same run.
    """
    device, full = model.device, str(model.schedule("full"))
    tokens_ms: dict[str, list[float]] = {way.name: [] for way in ways}
    decoder_ms: dict[str | None, list[float]] = {way.kernels: [] for way in ways}
    order = random.Random(0)
    warmups = 2 if device.type == "cuda" else 1  # kernels compile and graphs are recorded; then memory is taken anew
    for run in range(1 - warmups, runs + 1):
        # recorded from the largest to the smallest, graphs share the memory of the first
        for way in order.sample(ways, len(ways)) if run > 0 else ways:
            way.begin()
            output, elapsed_ms = timed(device, way.tokens)
            print(f"batch {batch} run {run}/{runs} {way.name}: {elapsed_ms:.0f} ms", flush=True)
            if run > 0:
                tokens_ms[way.name].append(elapsed_ms)
            if way.schedule is None or str(way.schedule) == full:
                elapsed_ms = timed(device, partial(way.decode, output))[1]
                print(f"batch {batch} run {run}/{runs} {way.name}, decoder: {elapsed_ms:.0f} ms", flush=True)
                if run > 0:
                    decoder_ms[way.kernels].append(elapsed_ms)
    return {way.name: _row(way, batch, tokens_ms[way.name], decoder_ms[way.kernels]) for way in ways}


def _row(way: Way, batch: int, tokens: list[float], decoder: list[float]) -> dict:
    row: dict = {"way": way.name, "kernels": way.kernels}
    whole = [sum(both) for both in zip(tokens, decoder, strict=True)]
    for name, times in (("tokens", tokens), ("decoder", decoder), ("whole", whole)):
        row |= {f"{name}_ms": statistics.median(times), f"{name}_spread_ms": [min(times), max(times)]}
    return row | {
        "images_per_second": batch / row["whole_ms"] * 1e3,
        "images_per_second_without_decoder": batch / row["tokens_ms"] * 1e3,
    }


def compare(model: ElasticVAR, reference: Reference, images: int, cfg: float) -> dict[str, float]:
    """The difference of the images of both under top_k = 1, where nothing is left to chance.

    Both in float32: in less, a near tie soon goes another way, and from then on the images are others.
    """
    labels, half = torch.arange(images), reference.half
    reference.half = False
    with exact_float32(model.device):
        theirs = reference.decode(reference.features(labels, cfg=cfg, top_k=1, top_p=0.0))
        apart = (model.generate(labels, cfg=cfg, top_k=1) - theirs).abs()
    reference.half = half
    return {"images": images, "largest_difference": apart.max().item(), "mean_difference": apart.mean().item()}


def switch(model: ElasticVAR, first: Way, last: Way) -> dict[str, float]:
    """Time of the last schedule after itself, and after another that ran in between (medians of three)."""
    first.begin()
    times: dict[str, list[float]] = {"after_itself_ms": [], "after_another_ms": []}
    for _ in range(3):
        last.tokens()
        times["after_itself_ms"].append(timed(model.device, last.tokens)[1])
        first.tokens()
        times["after_another_ms"].append(timed(model.device, last.tokens)[1])
    return {"schedule": last.name, "other": first.name} | {name: statistics.median(v) for name, v in times.items()}


def peak(
    model: ElasticVAR, reference: Reference | None, way: Way, batch: int, sampling: Sampling
) -> dict[str, int | bool | str]:
    """Peak bytes of a call, weights included; ours, beside the prediction, and with what it ran."""
    if way.schedule is None:
        weights = sum(t.nbytes for m in (reference.var, reference.vae) for t in (*m.parameters(), *m.buffers()))
        return {"peak_bytes": weights + _growth(lambda: way.decode(way.tokens()), reference.device)}
    way.begin()
    eager = way.runtime.eager()
    with PeakMemory(model, way.schedule, eager) as memory:
        way.decode(way.tokens(runtime=eager), runtime=eager)
    cost = predict(model, way.schedule, batch, eager, guided=model.guided(sampling))
    ran = conditions(model, sampling, eager)
    return {
        "peak_bytes": memory.bytes,
        "peak_bytes_predicted": cost["peak_bytes"],
        "cache_bytes": cost["cache_bytes"],
        "kernels": ran["kernels"],
        "packed_weights": ran["packed_weights"],
    }


def _growth(call: Callable[[], Tensor], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveTensors() as tensors:
        call()
    return tensors.peak_bytes


# -- putting together -----------------------------------------------------------------------------


def benchmark(
    depth: int,
    batches: list[int],
    runs: int,
    reference_path: Path | None,
    device: torch.device,
    kernels: list[str],
    sampling: Sampling,
) -> Iterator[dict]:
    """All batch sizes of one model size."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_weights(depth, device)
    model.place(Runtime(device, model.dtype, kernels[0]))
    reference = Reference(reference_path, model, device) if reference_path else None
    sizes = sorted({min(batch, COMPARED) for batch in batches}) if reference else []
    images = {size: compare(model, reference, size, sampling.cfg) for size in sizes}
    model.cast(dtype)  # the reference keeps float32
    schedules = [model.schedule("full"), *(model.schedule(f"d{d}@6") for d in (16, 8, 4, 2) if d < depth)]
    rate, guided = rates(device, dtype), model.guided(sampling)
    for batch in batches:
        ways = ways_of(model, reference, schedules, kernels, batch, sampling)
        with fitting_batch(model, schedules, batch, guided=guided):
            rows = measure(model, ways, batch, runs)
            switching = switch(model, ways[0], ways[len(schedules) - 1])
            for way in ways:
                rows[way.name] |= peak(model, reference, way, batch, sampling)
        decoder_floor_ms = (
            batch * decoder_flops(model.tokenizer.config, in_strips=device.type == "cpu") / rate["flops_per_second"]
        ) * 1e3
        for way in ways:
            if way.schedule:
                floor = floor_ms(model, way.schedule, batch, rate, guided=guided)
                rows[way.name] |= {"floor_ms": floor, "whole_floor_ms": floor + decoder_floor_ms}
        yield {
            "size": f"d{depth}",
            "batch_size": batch,
            "reference_attention": reference.attention if reference else None,
            **rate,
            "decoder_floor_ms": decoder_floor_ms,
            "rows": list(rows.values()),
            "switch": switching,
            "images": images.get(min(batch, COMPARED)),
        }


def _options() -> argparse.Namespace:
    """What was asked for; stops with one line for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", metavar="PATH", type=Path, help="checkout of FoundationVision/VAR")
    parser.add_argument("--sizes", nargs="+", default=["d16", "d30"], help="such as d16")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--cfg", type=float, default=PUBLISHED.cfg, help="weight of guidance; 0 for unguided calls")
    parser.add_argument("--kernels", nargs="+", default=["auto"], choices=CHOICES, help="of ours, side by side")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu; by default cuda when there is one")
    parser.add_argument("--name", help="of the JSON file; by default the device's and the sizes'")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the JSON file; by default that of the docs")
    options = parser.parse_args()
    wrong = [size for size in options.sizes if not re.fullmatch(r"d[1-9]\d?", size)]
    if wrong:
        parser.error(f"size {wrong[0]!r}: write d16 or d30")
    if options.runs < 1 or min(options.batches) < 1:
        parser.error("batches and runs: at least 1 is needed")
    if options.reference and not (options.reference / "models" / "var.py").is_file():
        parser.error(f"{options.reference}: is no checkout of FoundationVision/VAR, which has models/var.py")
    try:
        options.sampling = dataclasses.replace(PUBLISHED, cfg=options.cfg)
        options.device = choose_device(options.device)
        for kernels in options.kernels:
            Runtime(options.device, kernels=kernels)
    except InputError as error:
        parser.error(str(error))
    options.name = options.name or f"{options.device.type}-{'-'.join(options.sizes)}"
    return options


def _command(options: argparse.Namespace) -> str:
    """The command line of a run, without what depends on the machine."""
    command = ["python -m tests.benchmarks.generation"]
    if options.reference:
        command.append("--reference PATH")
    lists = {"sizes": options.sizes, "batches": options.batches, "kernels": options.kernels}
    command += [f"--{name} {' '.join(map(str, values))}" for name, values in lists.items()]
    if options.cfg != PUBLISHED.cfg:
        command.append(f"--cfg {options.cfg:g}")
    return " ".join([*command, f"--runs {options.runs}", f"--name {options.name}"])


def commit() -> str | None:
    """The commit that ran, with a plus where code had changed since; None outside a repository."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    try:
        short = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        return short + ("+" if git(["git", "status", "--porcelain", "--", *CODE]).stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    options = _options()
    on_gpu = options.device.type == "cuda"
    content = {
        "device": device_name(options.device),
        "kind": options.device.type,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": _command(options),
        "load_average_before": os.getloadavg()[0],
        "dtype": "bfloat16" if on_gpu else "float32",
        "reference_dtype": "float16 autocast" if on_gpu else "float32",
        "runs": options.runs,
        "settings": settings(options.sampling),
        "results": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.json"
    try:
        for size in options.sizes:
            for result in benchmark(
                int(size[1:]),
                options.batches,
                options.runs,
                options.reference,
                options.device,
                options.kernels,
                options.sampling,
            ):
                content["results"].append(result)  # written at once: a larger batch may not fit
                path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except InputError as error:
        kept = f" ({path} holds what was measured before)" if content["results"] else ""
        print(f"error: {error}{kept}", file=sys.stderr)
        sys.exit(2)
    print(write_tables() if options.out.resolve() == FOLDER else section(path))


if __name__ == "__main__":
    main()
