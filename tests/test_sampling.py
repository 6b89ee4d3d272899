"""The random stream, the filters and the draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from varcompress.sampling import draw, filtered_probabilities, guide, philox, uniform

WORD = 0xFFFFFFFF
# Known answers of philox4x32-10 in Random123 (D. E. Shaw Research), kat_vectors: counter, key, output
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD << 32) | WORD, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0x299F31D0 << 32) | 0xA4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, output):
    assert tuple(int(word) for word in philox(tuple(map(torch.tensor, counter)), key)) == output


def reference_philox(counter: list[int], seed: int) -> list[int]:
    """The same in Python's own integers, which have no width to overflow."""
    keys = [seed & WORD, (seed >> 32) & WORD]
    for _ in range(10):
        high0, low0 = divmod(counter[0] * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 1 << 32)
        counter = [high1 ^ counter[1] ^ keys[0], low1, high0 ^ counter[3] ^ keys[1], low0]
        keys = [(keys[0] + 0x9E3779B9) & WORD, (keys[1] + 0xBB67AE85) & WORD]
    return counter


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, WORD), min_size=4, max_size=4), st.integers(0, (1 << 64) - 1))
def test_philox_equals_plain_integers(counter, seed):
    assert [int(word) for word in philox(tuple(map(torch.tensor, counter)), seed)] == reference_philox(counter, seed)


@settings(deadline=None)
@given(
    seed=st.integers(-(1 << 63), (1 << 64) - 1),
    images=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=5),
    scale=st.integers(0, 13),
    positions=st.integers(1, 40),
)
def test_uniform_belongs_to_the_image_not_to_the_batch(seed, images, scale, positions):
    together = uniform(seed, torch.tensor(images), scale, positions)
    assert together.shape == (len(images), positions)
    assert together.dtype == torch.float32
    assert bool(((together >= 0) & (together < 1)).all())
    alone = torch.cat([uniform(seed, torch.tensor([image]), scale, positions) for image in images])
    assert torch.equal(together, alone)


def test_uniform_differs_by_seed_image_scale_and_position():
    streams = [
        uniform(s, torch.tensor([i]), k, 64)[0] for s in (0, 1, 1 << 32) for i in (0, 1, 1 << 32) for k in (0, 1)
    ]
    values = torch.cat(streams)
    assert len(values.unique()) >= len(values) - 2  # 24 bits: two of a thousand may coincide


def test_uniform_is_uniform():
    values = uniform(3, torch.arange(1000), 2, 100).flatten()
    counts = torch.histc(values, bins=100, min=0, max=1)
    # 99 degrees of freedom: 99.99 % of uniform samples stay below 161
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 161
    assert abs(float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1])) < 0.02


def test_guidance_extrapolates_in_float32():
    conditional, unconditional = torch.tensor([1.0, 2.0]).half(), torch.tensor([0.5, 3.0]).half()
    guided = guide(conditional, unconditional, 1.5)
    assert guided.dtype == torch.float32
    assert torch.equal(guided, torch.tensor([1.75, 0.5]))


# -- filters ------------------------------------------------------------------------------------


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    weights = [2.718281828459045 ** (value - top) if value > -float("inf") else 0.0 for value in values]
    return [weight / sum(weights) for weight in weights]


def brute_force(logits: list[float], top_k: int, top_p: float) -> tuple[list[float], float]:
    """Probability of every token after top-k and top-p, and how near top-p came to deciding otherwise."""
    kept = list(logits)
    if 0 < top_k < len(logits):
        kth = sorted(logits, reverse=True)[top_k - 1]
        kept = [value if value >= kth else -float("inf") for value in logits]
    probabilities, margin = softmax(kept), 1.0
    if 0 < top_p < 1:
        order = sorted(range(len(kept)), key=lambda token: (-kept[token], token))
        above, out = 0.0, [0.0] * len(kept)
        for token in order:
            margin = min(margin, abs(above - top_p))
            if above < top_p:
                out[token] = probabilities[token]
            above += probabilities[token]
        probabilities = out
    return probabilities, margin


# quarters make ties common and keep float32 exact
logit_lists = st.lists(st.integers(-16, 16).map(lambda value: value / 4), min_size=1, max_size=24)


@settings(deadline=None, max_examples=300)
@given(logits=logit_lists, top_k=st.integers(0, 26), top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.96, 1.0]))
def test_filters_equal_brute_force(logits, top_k, top_p):
    expected, margin = brute_force(logits, top_k, top_p)
    assume(margin > 1e-5)  # nearer than rounding, either answer is right
    probabilities, tokens = filtered_probabilities(torch.tensor(logits), top_k, top_p)
    assert bool((probabilities[:-1] >= probabilities[1:]).all())
    assert sorted(tokens.tolist()) == list(range(len(logits)))
    by_token = torch.zeros(len(logits)).scatter(0, tokens, probabilities)
    torch.testing.assert_close(by_token, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_ties_with_the_kth_stay():
    probabilities, tokens = filtered_probabilities(torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0]), top_k=2, top_p=0.0)
    assert tokens[probabilities > 0].tolist() == [1, 0, 2, 4]


def test_top_p_keeps_the_first_token_however_small():
    probabilities, tokens = filtered_probabilities(torch.tensor([0.0, 5.0, 0.0]), top_k=0, top_p=1e-6)
    assert tokens[probabilities > 0].tolist() == [1]


# -- draws --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    logits=logit_lists,
    top_k=st.integers(0, 26),
    top_p=st.sampled_from([0.0, 0.3, 0.96, 1.0]),
    uniforms=st.lists(st.integers(0, (1 << 24) - 1).map(lambda word: word / (1 << 24)), min_size=1, max_size=8),
)
def test_a_token_of_probability_zero_is_never_drawn(logits, top_k, top_p, uniforms):
    uniforms = torch.tensor([0.0, *uniforms, 1 - 2.0**-24])  # the ends of the range among them
    rows = torch.tensor(logits).expand(1, len(uniforms), -1)
    tokens = draw(rows, uniforms[None], top_k=top_k, top_p=top_p)[0]
    probabilities, order = filtered_probabilities(torch.tensor(logits), top_k, top_p)
    by_token = torch.zeros(len(logits)).scatter(0, order, probabilities)
    assert bool((by_token[tokens] > 0).all())


def test_top_k_one_is_greedy():
    logits = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0))
    tokens = draw(logits, torch.rand(2, 5), top_k=1, top_p=0.96)
    assert torch.equal(tokens, logits.argmax(dim=-1))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (6, 0.0), (0, 0.8), (9, 0.9)])
@pytest.mark.parametrize("seed", [0, 1])
def test_frequencies_match_probabilities(top_k, top_p, seed):
    logits = torch.tensor([2.0, -1.0, 0.5, 0.5, 1.5, -2.0, 0.0, 1.0, 1.0, -0.5, 0.25, -3.0])
    count = 40_000
    uniforms = uniform(seed, torch.arange(count // 100), 1, 100)
    tokens = draw(logits.expand(*uniforms.shape, -1), uniforms, top_k=top_k, top_p=top_p)
    observed = tokens.flatten().bincount(minlength=len(logits)).double()
    expected = torch.tensor(brute_force(logits.tolist(), top_k, top_p)[0]).double()
    expected *= count / expected.sum()
    possible = expected > 0
    assert float(observed[~possible].sum()) == 0
    # at most 11 degrees of freedom: 99.99 % of faithful samples stay below 37.4
    assert float(((observed - expected)[possible] ** 2 / expected[possible]).sum()) < 37.4


# -- generate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["full", "d2@2", "6x1,4x1,2x2"])
def test_an_image_does_not_depend_on_its_batch(tiny, schedule):
    labels = [3, 1, 4, 1, 5, 9, 2]
    together = tiny.generate_tokens(labels, schedule, seed=11)[0]
    for size in (1, 2, 3):
        parts = [
            tiny.generate_tokens(labels[i : i + size], schedule, seed=11, first_index=i)[0]
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
