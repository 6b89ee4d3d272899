"""Exact float32, whatever a process has allowed."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import random_model
from varcompress.hardware import _precision_settings, exact_float32

CPU = torch.device("cpu")
PARTS = {
    "all": torch.backends,
    "cudnn": torch.backends.cudnn,
    "convolutions": torch.backends.cudnn.conv if hasattr(torch.backends.cudnn, "conv") else None,
    "products": torch.backends.cuda.matmul,
}


@pytest.fixture(autouse=True)
def put_back():
    before = [(write, read()) for read, write, _ in _precision_settings()]
    yield
    for write, value in before:
        write(value)


def settings() -> list[object]:
    return [read() for read, _, _ in _precision_settings()]


def assert_exact_inside() -> None:
    before = settings()
    with exact_float32(CPU):
        assert settings() == [exact for _, _, exact in _precision_settings()]
        with exact_float32(CPU):
            pass
        assert settings() == [exact for _, _, exact in _precision_settings()]
    assert settings() == before


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", ["tf32", "ieee", "none"])
def test_the_newer_settings_are_made_exact_and_put_back(part, value):
    PARTS[part].fp32_precision = value
    assert_exact_inside()


def test_an_operator_that_inherits_its_precision_inherits_it_again():
    torch.backends.cudnn.conv.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    assert_exact_inside()
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"


@pytest.mark.parametrize("value", ["highest", "high", "medium"])
def test_the_older_setting_of_products(value):
    torch.set_float32_matmul_precision(value)
    assert_exact_inside()
    assert torch.get_float32_matmul_precision() == value


def test_the_last_thread_to_leave_puts_the_settings_back():
    torch.set_float32_matmul_precision("medium")
    before, inside, leave = settings(), threading.Event(), threading.Event()

    def stay():
        with exact_float32(CPU):
            inside.set()
            leave.wait()

    other = threading.Thread(target=stay)
    with exact_float32(CPU):
        other.start()
        inside.wait()
    assert settings() == [exact for _, _, exact in _precision_settings()]  # the other is still inside
    leave.set()
    other.join()
    assert settings() == before


class Seen(TorchDispatchMode):
    """The settings under which convolutions and products run."""

    def __init__(self):
        super().__init__()
        self.operators = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::convolution", "aten::addmm_"):
            self.operators.setdefault(func._schema.name, []).append(settings())
        return func(*args, **kwargs or {})


def test_tokens_are_found_in_exact_arithmetic_whatever_is_allowed():
    """Convolutions of the encoder and the quantiser, and the products that find the nearest codebook entry."""
    model, images = random_model(), torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = model.encode(images)
    torch.set_float32_matmul_precision("medium")
    with Seen() as seen, torch.no_grad():
        model.tokenizer.encode(images)
    assert set(seen.operators) == {"aten::convolution", "aten::addmm_"}
    exact = [value for _, _, value in _precision_settings()]
    assert all(found == exact for runs in seen.operators.values() for found in runs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(images), expected)
