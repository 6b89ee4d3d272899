"""Draws of a whole scale; the draw itself is tested with its kernel in kernels/test_draw.py."""

from __future__ import annotations

import pytest
import torch

from varcompress.errors import InputError
from varcompress.models import generation
from varcompress.sampling import Sampling

CPU = torch.device("cpu")


@pytest.mark.parametrize("schedule", ["full", "d2@2", "6x1,4x1,2x2"])
def test_an_image_does_not_depend_on_its_batch(tiny, schedule):
    labels = [3, 1, 4, 1, 5, 9, 2]
    together = tiny.generate_tokens(labels, schedule, sampling=Sampling(seed=11))[0]
    for size in (1, 2, 3):
        parts = [
            tiny.generate_tokens(labels[i : i + size], schedule, first_index=i, sampling=Sampling(seed=11))[0]
            for i in range(0, len(labels), size)
        ]
        assert torch.equal(together, torch.cat(parts))
    assert not torch.equal(together[1], together[3])  # the same class, another index


def test_images_of_two_batch_sizes_are_equal_to_rounding(tiny):
    together = tiny.generate([7, 7, 2], seed=5)
    alone = torch.cat([tiny.generate([label], seed=5, first_index=i) for i, label in enumerate([7, 7, 2])])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[1])
    assert not torch.allclose(together, tiny.generate([7, 7, 2], seed=6))


def test_a_few_logits_at_a_time_give_the_same_tokens(tiny, monkeypatch):
    labels = [3, 1, 4, 1, 5]
    together = tiny.generate_tokens(labels, "d2@2", sampling=Sampling(seed=3))[0]
    monkeypatch.setitem(generation.LOGITS_BYTES, "cpu", 1)
    assert generation.images_at_a_time(CPU, 16, 40, 4) == 1
    assert torch.equal(tiny.generate_tokens(labels, "d2@2", sampling=Sampling(seed=3))[0], together)


def test_logits_that_exist_at_a_time_stay_below_their_limit():
    for tokens, vocab, element_bytes in ((256, 4096, 4), (1024, 4096, 2), (1, 40, 4)):
        count = generation.images_at_a_time(CPU, tokens, vocab, element_bytes)
        assert 2 * count * tokens * vocab * element_bytes <= generation.LOGITS_BYTES["cpu"]


@pytest.mark.parametrize("settings", [{"cfg": 1e39}, {"cfg": float("nan")}, {"first_index": 2**63 - 1}])
def test_settings_beyond_what_a_device_can_hold_are_refused(tiny, settings):
    with pytest.raises(InputError, match=f"{next(iter(settings))} must be a"):
        tiny.generate([1], **settings)
