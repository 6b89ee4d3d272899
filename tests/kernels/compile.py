"""Compiles every kernel for NVIDIA GPUs, none needed: run by test_compile, in a process without the interpreter.

Each launcher is called with tensors as generation has them; instead of a launch, its kernel is
compiled for the arguments it was given. Prints a line for each kernel and target: name,
capability, num_warps, registers of a thread, bytes spilled.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from varcompress.kernels import draw, group_norm, modulate, qkv

CAPABILITIES = (80, 90)
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


class Compiler:
    """Stands where a kernel stands."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, **options):
        named = {parameter.name: argument for parameter, argument in zip(self.kernel.params, arguments, strict=True)}
        constexprs = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        general = {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}
        constants = {name: value for name, value in named.items() if name in constexprs or value is None}
        signature = {name: "constexpr" if name in constants else mangle_type(value) for name, value in named.items()}
        # what a launch finds out too: allocations are aligned, and so are strides that are multiples of 16
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, (name, value) in enumerate(named.items())
            if name not in constants
            and name not in general
            and (torch.is_tensor(value) or (isinstance(value, int) and value % 16 == 0))
        }
        for capability in CAPABILITIES:
            source = ASTSource(self.kernel, signature, constants, aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert compiled.asm["cubin"]
            registers, spilled = usage(compiled.asm["ptx"])
            print(self.kernel.__name__, capability, options["num_warps"], registers, spilled)


def usage(ptx: str) -> tuple[int, int]:
    """Registers of a thread, and bytes spilled."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [PTXAS, "-v", f"--gpu-name={target}", source, "-o", source.with_suffix(".cubin")]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))
    return int(re.search(r"Used (\d+) registers", report)[1]), spilled


def main() -> None:
    for module in (modulate, qkv, draw, group_norm):
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, JITFunction) and f"{name}[" in inspect.getsource(module):  # launched, not only called
                setattr(module, name, Compiler(kernel))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        launch(dtype, optional=True)
    launch(torch.bfloat16, optional=False)


def launch(dtype: torch.dtype, *, optional: bool) -> None:
    """Every launcher as VAR-d30 calls it, with its optional arguments or without."""
    x = torch.empty(2, 1, 1920, dtype=dtype)
    gate, scale, shift = torch.empty(2, 1, 3, 1920, dtype=dtype).unbind(2)
    if optional:
        modulate.add_modulate_triton(x, x, gate, scale, shift)
    else:
        modulate.modulate_triton(x, scale, shift)
    bias = torch.empty(3 * 1920, dtype=dtype) if optional else None
    cache = torch.empty(2, 2, 30, 10, 64, dtype=dtype)[:, :, :, 4:5]
    qkv.split_heads_triton(torch.empty(2, 1, 3 * 1920, dtype=dtype), bias, torch.empty(30), *cache)
    logits, number = torch.empty(1, 1, 4096, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    draw.draw_triton(logits, logits if optional else None, 1.5, number[0], number, 3, top_k=900, top_p=0.96)
    for channels, side in ((160, 256), (640, 16)):
        norm = torch.nn.GroupNorm(32, channels, dtype=dtype)
        group_norm.group_norm_triton(norm, torch.empty(1, channels, side, side, dtype=dtype), silu=optional)


if __name__ == "__main__":
    main()
