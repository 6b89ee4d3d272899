"""The first minutes on a GPU: twelve checks of the CUDA path in one go, a line each.

    python -m tests.gpu_first_minutes

takes under five minutes and exits with 1 where a check fails. Without a GPU it rehearses the checks that a CPU can run.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.generation import PATCH_NUMS, random_weights
from varcompress import cost
from varcompress.data.tokens import Samples
from varcompress.demo import run_demo
from varcompress.errors import InputError
from varcompress.evaluation import evaluate
from varcompress.hardware import choose_device, exact_float32, synchronize
from varcompress.loading import load
from varcompress.models import generation, masks
from varcompress.models.elastic import ElasticVAR
from varcompress.models.runtime import Runtime
from varcompress.profiling import profile
from varcompress.schedule import Together
from varcompress.training.objective import Objective
from varcompress.training.optimizer import optimizer_of
from varcompress.training.recipe import load_recipe
from varcompress.training.teacher import Teacher

DEVICE = choose_device(None)
GPU = DEVICE.type == "cuda"
SCHEDULES = ("full", "d8", "d2", "d4")
HALF = torch.bfloat16 if GPU else torch.float32
MIB = 2**20


class Skip(Exception):
    """A check that needs a GPU, where there is none."""


def needs_gpu() -> None:
    if not GPU:
        raise Skip


def digits(dtype: torch.dtype = torch.float32, **how: object) -> ElasticVAR:
    """The embedded model: trained weights, 30 layers."""
    return load("digits", device=DEVICE, dtype=dtype, **how)


def eager(model: ElasticVAR, *call: object, **more: object) -> Tensor:
    return model.generate(*call, runtime=model.runtime.eager(), **more)


def same(found: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(found, expected):
        apart = (found.float() - expected.float()).abs().max().item()
        raise AssertionError(f"{what}: apart by up to {apart:.3g}")


def in_turn(model: ElasticVAR, **settings: float) -> str:
    """Graphs of several batches and schedules by turns, while earlier results are held, against plain calls."""
    calls = [
        (list(range(batch)), schedule, seed)
        for seed in range(2)
        for batch, schedule in itertools.product((1, 3, 8), SCHEDULES)
    ]
    held = [model.generate(labels, schedule, seed=seed, **settings) for labels, schedule, seed in calls]
    for (labels, schedule, seed), images in zip(calls, held, strict=True):
        plain = eager(model, labels, schedule, seed=seed, **settings)
        same(images, plain, f"{schedule}, batch {len(labels)}, seed {seed}")
    return f"{len(calls)} calls"


# -- the checks -----------------------------------------------------------------------------------


def graphs_are_operators() -> str:
    """graph = eager bit for bit, bfloat16: digits, and d16 at 256 px."""
    told = in_turn(digits(HALF))
    if not GPU:
        return told
    model = random_weights(16).place(Runtime(DEVICE, HALF))
    for batch, schedule in ((1, "full"), (2, "d8@6"), (1, "full")):
        labels = list(range(batch))
        same(model.generate(labels, schedule), eager(model, labels, schedule), f"d16, {schedule}, batch {batch}")
    return f"{told}, and d16"


def graphs_in_other_numbers() -> str:
    """graph = eager in float32, float16, with a cache of int8 and float8, and unguided."""
    for how in ({}, {"dtype": torch.float16}, {"cache_dtype": "int8"}, {"dtype": HALF, "cache_dtype": "float8"}):
        in_turn(digits(**how))
    in_turn(digits(HALF), cfg=0)
    return "5 ways"


def weights_that_change() -> str:
    """load_state_dict in place and with assign, to the CPU and back, a replaced layer."""
    model, other = digits(HALF), digits(HALF)
    with torch.no_grad():
        for parameter in other.var.parameters():
            parameter.mul_(1.05)
    before = model.generate([1, 2], "d8")
    expected = eager(other, [1, 2], "d8")
    first = {name: value.clone() for name, value in model.state_dict().items()}
    for assign in (False, True):
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        same(model.generate([1, 2], "d8"), expected, f"assign={assign}")
        model.load_state_dict(first, assign=assign)
        same(model.generate([1, 2], "d8"), before, f"back, assign={assign}")
    model.to("cpu").to(DEVICE)
    same(model.generate([1, 2], "d8"), before, "to the CPU and back")
    block = model.var.blocks[0].ffn
    block.fc2 = copy.deepcopy(other.var.blocks[0].ffn.fc2)
    same(model.generate([1, 2], "d8"), eager(model, [1, 2], "d8"), "a replaced layer")
    return "5 ways"


def threads_and_streams() -> str:
    """Four threads on streams of their own, and one thread that changes its stream."""
    model, wrong = digits(HALF), []
    expected = {label: eager(model, [label] * 3, "d8", seed=label) for label in range(8)}

    def work(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)) if GPU else contextlib.nullcontext():
            for turn in range(20 if GPU else 3):
                label = (first + turn) % 8
                if not torch.equal(model.generate([label] * 3, "d8", seed=label), expected[label]):
                    wrong.append(label)

    workers = [threading.Thread(target=work, args=(2 * i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    work(0)
    if wrong:
        raise AssertionError(f"{len(wrong)} results are wrong")
    return "all right"


def captures_that_fail() -> str:
    """A body that reads from the device is run without a graph, warned of once; out of memory is told as such."""
    needs_gpu()
    model, plain = digits(HALF), generation.generate_tokens
    expected = eager(model, [1, 2], "d4")

    def reads(*given: object, **more: object) -> tuple[Tensor, Tensor]:
        tokens, f_hat = plain(*given, **more)
        f_hat.sum().item()
        return tokens, f_hat

    stream = torch.cuda.current_stream()
    generation.generate_tokens = reads
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(3):
                same(model.generate([1, 2], "d4"), expected, "after a failed capture")
    finally:
        generation.generate_tokens = plain
    if len([w for w in told if "graph" in str(w.message)]) != 1:
        raise AssertionError(f"{len(told)} warnings: {[str(w.message) for w in told]}")
    if torch.cuda.current_stream() != stream:
        raise AssertionError("the capture's stream is still the current one")
    return f"warned once; {_out_of_memory()}"


def _out_of_memory() -> str:
    model = random_weights(16).place(Runtime(DEVICE, HALF))
    model.generate([1], "d2@6")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + 32 * MIB) / total, DEVICE)
    try:
        model.generate([1, 2, 3], "full")
    except (torch.OutOfMemoryError, InputError):
        pass
    else:
        raise AssertionError("a call without memory went through")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    same(model.generate([1, 2, 3], "full"), eager(model, [1, 2, 3], "full"), "after a call without memory")
    return "out of memory surfaces, and the next call works"


def a_graph_of_the_users_own() -> str:
    """A user's graph with random numbers, recorded before and replayed after ours, and the other way round."""
    needs_gpu()
    model, graph = digits(HALF), torch.cuda.CUDAGraph()
    expected = eager(model, [1, 2], "d8")
    for first in (True, False):
        if not first:
            same(model.generate([1, 2], "d8"), expected, "ours first")
        with torch.cuda.graph(graph):
            drawn = torch.randn(1000, device=DEVICE)
        same(model.generate([1, 2], "d8"), expected, "beside a user's graph")
        graph.replay()
        one = drawn.clone()
        graph.replay()
        if torch.equal(one, drawn) or not drawn.isfinite().all():
            raise AssertionError("the user's random numbers no longer move on")
        torch.randn(10, device=DEVICE)  # the default generator, in a call that is not recorded
        graph = torch.cuda.CUDAGraph()
    return "random numbers move on"


def attention_backends() -> str:
    """Every backend of attention at d30's strides, forward and backward, at lengths 680, 91, 2240."""
    from varcompress.schedule import Schedule

    heads, dim, told = (30, 64, []) if GPU else (2, 64, [])
    for length, sides in ((680, PATCH_NUMS), (91, PATCH_NUMS[:6]), (2240, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))):
        if not GPU and length > 1000:
            continue
        ends = torch.tensor(Schedule.parse("full", depth=2, patch_nums=sides, bridge=1).ends)
        scale = torch.bucketize(torch.arange(length), ends, right=True)
        mask = (scale[:, None] >= scale[None, :]).to(DEVICE)
        qkv = torch.randn(2, length, 3 * heads * dim, device=DEVICE, dtype=HALF) / 8
        exact = _attention(qkv.float(), heads, dim, mask, torch.nn.attention.SDPBackend.MATH)
        for backend in _backends():
            try:
                out, gradient = _attention(qkv, heads, dim, mask, backend)
            except RuntimeError:
                continue  # it takes no mask, or not on this device
            for name, found, wanted in (("forward", out, exact[0]), ("backward", gradient, exact[1])):
                error = ((found.float() - wanted).norm() / wanted.norm()).item()
                told.append(f"{backend.name} {length} {name} {error:.1e}")
    bad = [line for line in told if not float(line.rsplit(" ", 1)[1]) < 0.03]
    chosen = [line for line in bad if "CUDNN" not in line]  # which training leaves out
    if chosen:
        raise AssertionError("; ".join(chosen))
    return f"{len(told)} fine" + (f", but for {'; '.join(bad)}, which training leaves out" if bad else "")


def _backends() -> list:
    backend = torch.nn.attention.SDPBackend
    return [backend.EFFICIENT_ATTENTION, backend.CUDNN_ATTENTION, backend.MATH] if GPU else [backend.MATH]


def _attention(qkv: Tensor, heads: int, dim: int, mask: Tensor, backend: object) -> tuple[Tensor, Tensor]:
    qkv = qkv.clone().requires_grad_()
    q, k, v = qkv.unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4)
    with torch.nn.attention.sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        out.square().sum().backward()
    return out.detach(), qkv.grad


def offload_is_resident() -> str:
    """Streamed layers give what resident ones give, schedules in turn."""
    model = digits(HALF, kernels="auto" if GPU else "torch")
    expected = {schedule: eager(model, [1, 2, 3], schedule) for schedule in SCHEDULES}
    model.place(replace(model.runtime, offload="bridge"))
    for schedule in (*SCHEDULES, *reversed(SCHEDULES)):
        same(model.generate([1, 2, 3], schedule), expected[schedule], schedule)
    return f"{2 * len(SCHEDULES)} calls, {model._streamed.host_bytes / MIB:,.1f} MiB of host memory"


def precision_settings() -> str:
    """Tokens do not change where the process allows TF32, by the old and the new settings of torch."""
    model = digits()
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    exact, before = model.encode(images), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        same(model.encode(images), exact, "set_float32_matmul_precision")
        if hasattr(torch.backends, "fp32_precision"):
            torch.backends.fp32_precision = "tf32"
            try:
                same(model.encode(images), exact, "torch.backends.fp32_precision")
            finally:
                torch.backends.fp32_precision = "none"
        with exact_float32(DEVICE):
            pass
        with torch.autocast(DEVICE.type, torch.bfloat16):
            same(model.encode(images), exact, "autocast")
    finally:
        torch.set_float32_matmul_precision(before)
    return "3 settings"


def depths_in_one_pass() -> str:
    """A step of several depths under a guided teacher, together and one after another; then Muon and AdamW move it."""
    recipe = load_recipe("digits", ["dtype=float32"])
    model = digits()
    model.bridge, model.depths = recipe.bridge, recipe.depths
    teacher = Teacher(model.var, model.schedule("full"), guided=True)
    labels, schedules = torch.arange(8) % 10, model.default_schedules()
    samples = Samples(labels, model.encode(torch.rand(8, 3, 16, 16)).clone(), None, None)
    found = []
    with exact_float32(DEVICE):
        for together in (True, False):
            model.var.zero_grad()
            objective = Objective(model, replace(recipe, together=together), teacher)
            losses = objective.backward(samples, slice(0, 8), 1, schedules)
            found.append([losses, *(parameter.grad.clone() for parameter in model.var.parameters())])
    apart = max((one - other).abs().max().item() / other.abs().max().item() for one, other in zip(*found, strict=True))
    if apart > 1e-3:
        raise AssertionError(f"gradients differ by up to {apart:.1e} of the largest")
    optimizer_of(model.var, recipe).step(1e-3)
    if not all(parameter.isfinite().all() for parameter in model.var.parameters()):
        raise AssertionError("a step of Muon leaves weights that are not finite")
    return f"apart by up to {apart:.1e}"


def training_in_blocks() -> str:
    """Gradients of d16 at 256 px under FlexAttention, and with compiled layers, against those under a mask."""
    needs_gpu()
    model = random_weights(16).float()
    schedules = Together((model.schedule("full"), model.schedule("d4@6"), model.schedule("d2@6")))
    labels, tokens = torch.arange(2), torch.randint(4096, (2, 680), device=DEVICE)
    teacher_input = model.tokenizer.teacher_input(tokens).detach()
    found, told = {}, []
    for way, blocks in (("mask", False), ("blocks", True), ("compiled", True)):
        masks.blockwise = lambda device, blocks=blocks: blocks
        model.var.compile_layers(way == "compiled")
        model.var.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = model.var(labels.to(DEVICE), teacher_input, schedules, checkpointing=True)
        logits.square().mean().backward()
        found[way] = [logits.detach(), *(parameter.grad.clone() for parameter in model.var.parameters())]
        apart = max((a - b).norm() / b.norm() for a, b in zip(found[way], found["mask"], strict=True)).item()
        if apart > 0.05:  # bfloat16
            raise AssertionError(f"{way}: apart from the mask by up to {apart:.1e} of a gradient's norm")
        told.append(f"{way} {apart:.1e}")
    return ", ".join(told[1:])


def measuring_to_the_end() -> str:
    """profile and eval at batch 64 with predicted, allocated and reserved bytes; the demo to its end."""
    needs_gpu()
    model = random_weights(16).place(Runtime(DEVICE, HALF))
    torch.cuda.reset_peak_memory_stats(DEVICE)
    rows = profile(model, ["full", "d2@6"], batch_size=64, runs=2, warmup=1)["schedules"]
    peaks = ((row["schedule"], row["peak_bytes_predicted"] / MIB, row["peak_bytes"] / MIB) for row in rows)
    told = [f"{name}: predicted {predicted:,.0f}, measured {measured:,.0f}" for name, predicted, measured in peaks]
    told.append(_allocated())
    graphs = cost.peak_bytes(model, model.schedule("full"), 64) - rows[0]["peak_bytes_predicted"]
    told.append(f"of graphs {graphs / MIB:,.0f}")
    del model
    torch.cuda.reset_peak_memory_stats(DEVICE)
    model = digits(HALF)
    predicted = cost.peak_bytes(model, model.schedule("full"), 64)
    row = evaluate(model, ["full"], batch_size=64)["schedules"][0]
    peaks = f"predicted {predicted / MIB:,.0f}, measured {row['peak_bytes'] / MIB:,.0f}, {_allocated()}"
    told.append(f"eval of digits {row['scores']['fd']['value']:.1f}: {peaks}")
    with tempfile.TemporaryDirectory() as folder:
        result = run_demo(Path(folder) / "demo", note=lambda text: None)
        if not (Path(folder) / "demo" / "samples.png").is_file():
            raise AssertionError("the demo drew no samples")
    return "; ".join([*told, f"demo in {result['seconds']:.0f} s"])


def _allocated() -> str:
    allocated, reserved = torch.cuda.max_memory_allocated(DEVICE), torch.cuda.max_memory_reserved(DEVICE)
    return f"allocated {allocated / MIB:,.0f}, reserved {reserved / MIB:,.0f} MiB"


CHECKS: tuple[Callable[[], str], ...] = (
    graphs_are_operators,
    graphs_in_other_numbers,
    weights_that_change,
    threads_and_streams,
    captures_that_fail,
    a_graph_of_the_users_own,
    attention_backends,
    offload_is_resident,
    precision_settings,
    depths_in_one_pass,
    training_in_blocks,
    measuring_to_the_end,
)


def run(checks: tuple[Callable[[], str], ...]) -> Iterator[tuple[str, str, float, str]]:
    """Name, outcome (pass, FAIL, skip), seconds and detail of each check."""
    for check in checks:
        began, outcome = time.perf_counter(), "pass"
        try:
            detail = check()
            synchronize(DEVICE)
        except Skip:
            outcome, detail = "skip", "needs a GPU"
        except Exception as error:
            outcome, detail = "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            traceback.print_exc(file=sys.stderr)
        yield check.__name__, outcome, time.perf_counter() - began, detail


def main() -> None:
    name = torch.cuda.get_device_name(DEVICE) if GPU else "no GPU: a rehearsal"
    print(f"{name}, torch {torch.__version__}", flush=True)
    failed = 0
    for check, outcome, seconds, detail in run(CHECKS):
        failed += outcome == "FAIL"
        print(f"{outcome}  {check:24} {seconds:5.0f} s  {detail}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
