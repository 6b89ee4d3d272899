"""Every kernel compiles for NVIDIA GPUs, whether or not there is one. The interpreter would let wrong types pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from varcompress.kernels import triton

LAUNCHED = ("_modulate", "_split_heads", "_draw", "_sum_slab", "_combine", "_apply")

pytestmark = pytest.mark.skipif(
    triton is None or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3),
    reason="Triton is for Linux alone, and its compiler had another interface before 3.3",
)


def test_kernels_compile_and_nothing_spills(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert {(name, capability) for name, capability, *_ in lines} == {
        (name, capability) for name in LAUNCHED for capability in ("80", "90")
    }
    for line in lines:
        assert line[-1] == "0", f"spills: {line}"
