"""Every kernel against its plain torch function: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from varcompress.kernels import available

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}  # two roundings, and a little

needs_triton = pytest.mark.skipif(not available(DEVICE), reason="Triton is for Linux alone")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def assert_close(actual, expected):
    """Equal to the rounding of their dtype."""
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, equal_nan=True)
