"""The random stream, the filters and the draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import DEVICE, DTYPES, needs_gpu, needs_triton
from varcompress.kernels import available
from varcompress.kernels.draw import CPU_CHUNK, _first, _invert, draw, draw_triton
from varcompress.kernels.philox import philox, uniform

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


def integers(*values):
    return torch.tensor(values, device=DEVICE)


def number(value):
    """A 0-dim int64 tensor, from 64 bits of either sign."""
    return torch.tensor((value + (1 << 63)) % (1 << 64) - (1 << 63), device=DEVICE)


# -- random stream ------------------------------------------------------------------------------


@pytest.mark.parametrize("key_of", [int, number])
@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, output, key_of):
    assert tuple(int(word) for word in philox(tuple(map(number, counter)), key_of(key))) == output


def reference_philox(counter: list[int], seed: int) -> list[int]:
    """The same in Python's own integers, which have no width to overflow."""
    keys = [seed & WORD, (seed >> 32) & WORD]
    for _ in range(10):
        high0, low0 = divmod(counter[0] * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 1 << 32)
        counter = [high1 ^ counter[1] ^ keys[0], low1, high0 ^ counter[3] ^ keys[1], low0]
        keys = [(keys[0] + 0x9E3779B9) & WORD, (keys[1] + 0xBB67AE85) & WORD]
    return counter


@given(st.lists(st.integers(0, WORD), min_size=4, max_size=4), st.integers(0, (1 << 64) - 1), st.booleans())
def test_philox_equals_plain_integers(counter, seed, as_tensor):
    words = philox(tuple(map(number, counter)), number(seed) if as_tensor else seed)
    assert [int(word) for word in words] == reference_philox(counter, seed)


seeds = st.integers(-(1 << 63), (1 << 63) - 1)
image_lists = st.lists(st.integers(0, 1 << 40), min_size=1, max_size=5)


@given(seed=seeds, images=image_lists, scale=st.integers(0, 13), positions=st.integers(1, 40))
def test_uniform_belongs_to_the_image_not_to_the_batch(seed, images, scale, positions):
    together = uniform(seed, integers(*images), scale, positions)
    assert together.shape == (len(images), positions)
    assert together.dtype == torch.float32
    assert bool(((together >= 0) & (together < 1)).all())
    alone = torch.cat([uniform(number(seed), integers(image), scale, positions) for image in images])
    assert torch.equal(together, alone)


def test_uniform_differs_by_seed_image_scale_and_position():
    streams = [uniform(s, integers(i), k, 64)[0] for s in (0, 1, 1 << 32) for i in (0, 1, 1 << 32) for k in (0, 1)]
    values = torch.cat(streams)
    assert len(values.unique()) >= len(values) - 2  # 24 bits: two of a thousand may coincide


def test_uniform_is_uniform():
    values = uniform(3, torch.arange(1000, device=DEVICE), 2, 100).flatten()
    counts = torch.histc(values, bins=100, min=0, max=1)
    # 99 degrees of freedom: 99.99 % of uniform samples stay below 161
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 161
    assert abs(float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1])) < 0.02


@needs_triton
@settings(max_examples=25)
@given(seed=seeds, images=image_lists, scale=st.integers(0, 17), positions=st.integers(1, 3))
def test_the_kernel_has_the_same_stream(seed, images, scale, positions):
    # of 4096 equal tokens, the one drawn is the number's first 12 bits
    logits = torch.zeros(len(images), positions, 4096, device=DEVICE)
    tokens = draw_triton(logits, None, 0.0, number(seed), integers(*images), scale, top_k=0, top_p=0.0)
    assert torch.equal(tokens, (uniform(seed, integers(*images), scale, positions) * 4096).long())


# -- what may be drawn --------------------------------------------------------------------------


def filtered(logits, top_k: int, top_p: float):
    """Probabilities after both filters, by their definition, in float64: (V,) -> (V,)."""
    logits = logits.double()
    keep = torch.ones_like(logits, dtype=torch.bool)
    if 0 < top_k < len(logits):
        keep = logits >= logits.sort(descending=True).values[top_k - 1]
    probabilities = torch.where(keep, logits, -torch.inf).softmax(-1)
    if 0 < top_p < 1:
        above = torch.where(logits[None, :] > logits[:, None], probabilities, 0.0).sum(-1)
        probabilities = torch.where(above < top_p, probabilities, 0.0)
    return probabilities / probabilities.sum()


def reference(logits, number: float, top_k: int, top_p: float) -> int:
    """The token by its definition."""
    if not bool(logits.max().isfinite()):
        return -1
    if top_k == 1:
        return int(logits.argmax())
    probabilities = filtered(logits, top_k, top_p)
    last = int(probabilities.nonzero().max())
    return min(int((probabilities.cumsum(0) <= number).sum()), last)


def answers(logits, number: float, top_k: int, top_p: float, margin: float = 2e-6) -> set[int]:
    """What is right to rounding: the tokens of all numbers, and of all top_p, that are `margin` away."""
    shifts = (-margin, 0.0, margin)
    limits = {top_p + shift for shift in shifts} if 0 < top_p < 1 else {top_p}
    return {reference(logits, number + shift, top_k, limit) for shift in shifts for limit in limits}


# quarters make ties common, and are exact in every dtype, guided by a quarter's multiple too
quarters = st.integers(-16, 16).map(lambda value: value / 4)
logit_lists = st.lists(st.one_of(quarters, quarters, quarters, st.just(-torch.inf)), min_size=1, max_size=24)
top_ks, top_ps = st.integers(0, 26), st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.96, 1.0])
dtypes = st.sampled_from(DTYPES)
words = st.lists(st.integers(0, (1 << 24) - 1).map(lambda word: word / (1 << 24)), min_size=1, max_size=8)


@settings(max_examples=300)
@given(logits=logit_lists, numbers=words, top_k=top_ks, top_p=top_ps, dtype=dtypes)
def test_plain_draw_equals_its_definition(logits, numbers, top_k, top_p, dtype):
    logits = torch.tensor(logits, device=DEVICE)
    numbers = torch.tensor([[0.0, *numbers, 1 - 2.0**-24]], device=DEVICE)  # the ends of the range among them
    rows = logits.to(dtype).expand(1, numbers.numel(), -1)
    tokens = draw(rows, None, 0.0, numbers, top_k=top_k, top_p=top_p)
    assert tokens.shape == numbers.shape
    assert tokens.dtype == torch.int64
    for token, value in zip(tokens.flatten().tolist(), numbers.flatten().tolist(), strict=True):
        assert token in answers(logits, value, top_k, top_p)
        assert token == -1 or float(filtered(logits, top_k, top_p)[token]) > 0


@needs_triton
@settings(max_examples=40)
@given(
    pairs=st.lists(st.tuples(quarters, quarters), min_size=1, max_size=70),
    weight=st.sampled_from([0.0, 0.25, 1.5, -1.0, -2.0]),
    seed=seeds,
    top_k=top_ks,
    top_p=top_ps,
    dtype=dtypes,
)
def test_both_draws_equal_their_definition_under_guidance(pairs, weight, seed, top_k, top_p, dtype):
    conditional, unconditional = torch.tensor(pairs, device=DEVICE).T.to(dtype).contiguous()[:, None, None]
    guided = ((1 + weight) * conditional.float() - weight * unconditional.float()).flatten()
    numbers, images = uniform(seed, integers(5), 3, 1), integers(5)
    plain = draw(conditional, unconditional, weight, numbers, top_k=top_k, top_p=top_p)
    ours = draw_triton(conditional, unconditional, weight, number(seed), images, 3, top_k=top_k, top_p=top_p)
    expected = answers(guided, float(numbers), top_k, top_p)
    assert int(plain) in expected
    assert int(ours) in expected


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [16, 300, 4096])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (1, 0.9), (9, 0.0), (0, 0.9), (200, 0.96)])
def test_kernel_equals_plain(vocab, top_k, top_p, dtype):
    generator = torch.Generator().manual_seed(vocab + top_k)
    conditional, unconditional = (torch.randn(2, 2, 3, vocab, generator=generator) * 3).to(DEVICE, dtype)
    images, numbers = integers(0, 1 << 33), uniform(7, integers(0, 1 << 33), 4, 3)
    plain = draw(conditional, unconditional, 1.25, numbers, top_k=top_k, top_p=top_p)
    ours = draw_triton(conditional, unconditional, 1.25, number(7), images, 4, top_k=top_k, top_p=top_p)
    guided = 2.25 * conditional.double() - 1.25 * unconditional.double()
    different = (ours != plain).nonzero().tolist()
    assert len(different) <= 1
    for image, position in different:
        expected = answers(guided[image, position], float(numbers[image, position]), top_k, top_p)
        assert int(ours[image, position]) in expected


def draws(conditional, number_of, top_k, top_p):
    """Both draws of unguided logits (B, n, V), for the stream (7, number_of, 4)."""
    numbers = uniform(7, number_of, 4, conditional.shape[1])
    yield draw(conditional, None, 0.0, numbers, top_k=top_k, top_p=top_p)
    if available(DEVICE):
        yield draw_triton(conditional, None, 0.0, number(7), number_of, 4, top_k=top_k, top_p=top_p)


def test_tokens_that_tie_are_kept_together():
    # the k-th has a tie behind it, and top-p has its limit inside a tie
    rows = torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0], device=DEVICE).expand(4, 8, -1).contiguous()
    for tokens in draws(rows, integers(0, 1, 2, 3), top_k=2, top_p=0.0):
        assert set(tokens.flatten().tolist()) == {0, 1, 2, 4}
    rows = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0], device=DEVICE).expand(4, 8, -1).contiguous()
    for tokens in draws(rows, integers(0, 1, 2, 3), top_k=0, top_p=0.3):
        assert set(tokens.flatten().tolist()) == {0, 1, 2, 3}


def test_the_mass_of_top_p_counts_every_tie_of_top_k():
    # top-k 2 keeps all four: 0.60, then 3 x 0.13. With two of them alone, the first would hold 0.82
    rows = torch.tensor([1.5, 0.0, 0.0, 0.0, -9.0], device=DEVICE).expand(4, 8, -1).contiguous()
    for tokens in draws(rows, integers(0, 1, 2, 3), top_k=2, top_p=0.7):
        assert set(tokens.flatten().tolist()) == {0, 1, 2, 3}


def test_top_p_keeps_the_largest_however_small_it_is():
    rows = torch.tensor([0.0, 5.0, 0.0], device=DEVICE).expand(1, 4, -1).contiguous()
    for tokens in draws(rows, integers(0), top_k=0, top_p=1e-6):
        assert tokens.tolist() == [[1] * 4]


def test_top_k_one_takes_the_first_of_the_largest():
    rows = torch.tensor([[-1.0, 2.0, 0.0, 2.0, 2.0], [0.0, -0.0, -1.0, 0.0, -5.0]], device=DEVICE)[None]
    for tokens in draws(rows, integers(3), top_k=1, top_p=0.96):
        assert tokens.tolist() == [[1, 0]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (1, 0.0), (3, 0.0), (0, 0.8), (3, 0.8)])
def test_a_row_without_a_distribution_has_token_minus_one(top_k, top_p):
    inf, nan = torch.inf, torch.nan
    good = [[0.0, 9.0, 0.0, 0.0, 0.0], [-inf, -inf, 2.0, -inf, -inf]]
    bad = [[0.0, nan, 1.0, 2.0, 0.0], [0.0, 1.0, inf, 2.0, 0.0], [-inf] * 5, [nan] * 5, [-nan, 1.0, 0.0, inf, -inf]]
    rows = torch.tensor([*good, *bad], device=DEVICE)[None]
    for tokens in draws(rows, integers(3), top_k, top_p):
        assert tokens[0, 2:].tolist() == [-1] * 5
        assert tokens[0, 1] == 2
        assert 0 <= int(tokens[0, 0]) < 5


def test_every_number_finds_a_token_of_some_weight():
    logits = torch.tensor([-torch.inf, -200.0, 1.0, 0.0, -torch.inf, -200.0, -torch.inf], device=DEVICE)
    numbers = torch.tensor([[0.0, 2.0**-24, 0.5, 1 - 2.0**-24, 1.0]], device=DEVICE)
    tokens = draw(logits.expand(1, 5, -1), None, 0.0, numbers, top_k=0, top_p=0.0)
    assert tokens.tolist() == [[2, 2, 2, 3, 3]]


@needs_triton
@pytest.mark.parametrize(("image", "end", "expected"), [(33008474, 0.0, 2), (1205178, 1 - 2.0**-24, 3)])
def test_the_ends_of_the_stream_find_a_token_of_some_weight(image, end, expected):
    assert float(uniform(0, integers(image), 0, 1)) == end
    logits = torch.tensor([-torch.inf, -200.0, 1.0, 0.0, -torch.inf, -200.0, -torch.inf], device=DEVICE)
    for top_k, top_p in ((0, 0.0), (3, 0.0), (0, 0.9), (3, 0.9)):
        tokens = draw_triton(logits[None, None], None, 0.0, number(0), integers(image), 0, top_k=top_k, top_p=top_p)
        assert tokens.tolist() == [[expected]]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (6, 0.0), (0, 0.8), (9, 0.9)])
@pytest.mark.parametrize("launcher", [False, pytest.param(True, marks=needs_gpu)])  # too many to interpret
def test_frequencies_match_probabilities(top_k, top_p, launcher):
    logits = torch.tensor([2.0, -1.0, 0.5, 0.5, 1.5, -2.0, 0.0, 1.0, 1.0, -0.5, 0.25, -3.0], device=DEVICE)
    images, rows = torch.arange(400, device=DEVICE), logits.expand(400, 100, -1).contiguous()
    if launcher:
        tokens = draw_triton(rows, None, 0.0, number(7), images, 4, top_k=top_k, top_p=top_p)
    else:
        tokens = draw(rows, None, 0.0, uniform(7, images, 4, 100), top_k=top_k, top_p=top_p)
    observed = tokens.flatten().bincount(minlength=len(logits)).double()
    expected = filtered(logits, top_k, top_p) * tokens.numel()
    possible = expected > 0
    assert float(observed[~possible].sum()) == 0
    # at most 11 degrees of freedom: 99.99 % of faithful samples stay below 37.4
    assert float(((observed - expected)[possible] ** 2 / expected[possible]).sum()) < 37.4


# -- independence, memory, capture --------------------------------------------------------------


def test_a_sum_in_another_order_never_draws_a_token_of_weight_0():
    """A GPU sums in parallel, and may round a cumulative weight up where nothing is added, or down."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(64, 500, generator=generator) * (torch.rand(64, 500, generator=generator) < 0.1)
    exact = weights.cumsum(dim=-1)
    for uniforms in (torch.rand(64, 1, generator=generator), torch.zeros(64, 1), torch.ones(64, 1)):
        assert torch.equal(_first(exact, weights, uniforms), _invert(weights, uniforms))
        for rounding in (1e-3, 1e-1):  # far more than any sum's, to be met at all
            rounded = exact * (1 + rounding * torch.randn(exact.shape, generator=generator))
            drawn = _first(rounded, weights, uniforms)
            assert (weights.gather(-1, drawn[:, None]) > 0).all()


def test_a_token_does_not_depend_on_the_rows_beside_it():
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 2, 300, generator=generator) * 3).to(DEVICE)
    images = integers(4, 1 << 35, 9)
    for number_of_rows in (3, 1):
        for start in range(0, 3, number_of_rows):
            part = slice(start, start + number_of_rows)
            for alone, together in zip(
                draws(logits[part], images[part], 50, 0.9), draws(logits, images, 50, 0.9), strict=True
            ):
                assert torch.equal(alone, together[part])


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest tensor that is made, but for the tensors given."""

    def __init__(self, *given):
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (900, 0.96), (0, 0.9)])
def test_temporaries_do_not_grow_with_the_batch(top_k, top_p, monkeypatch):
    monkeypatch.setattr("varcompress.kernels.draw.GPU_CHUNK", CPU_CHUNK)
    logits = torch.randn(4, 150, 4096, device=DEVICE).bfloat16()
    numbers = torch.rand(4, 150, device=DEVICE)
    with LargestStorage(logits) as largest:
        together = draw(logits, logits, 1.5, numbers, top_k=top_k, top_p=top_p)
    assert largest.nbytes <= 2 << 20
    alone = [
        draw(part, part, 1.5, row, top_k=top_k, top_p=top_p)
        for part, row in zip(logits.split(1), numbers.split(1), strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


@needs_triton
def test_other_layouts_are_refused():
    logits, seed, images = torch.zeros(2, 3, 16, device=DEVICE), number(0), integers(0, 1)
    settings = {"top_k": 0, "top_p": 0.0}
    with pytest.raises(ValueError, match="shapes"):
        draw_triton(logits, logits[:1], 1.0, seed, images, 0, **settings)
    with pytest.raises(ValueError, match="image_ids must be"):
        draw_triton(logits, None, 0.0, seed, images[:1], 0, **settings)
    with pytest.raises(ValueError, match="contiguous"):
        draw_triton(logits.mT.contiguous().mT, None, 0.0, seed, images, 0, **settings)
    with pytest.raises(ValueError, match="int64"):
        draw_triton(logits, None, 0.0, seed, images.int(), 0, **settings)


@needs_gpu
@torch.inference_mode()
def test_a_captured_draw_replays_with_another_seed():
    logits, images, seed = torch.randn(2, 3, 4096, device=DEVICE), integers(0, 1), number(1)

    def run():
        return draw_triton(logits, None, 0.0, seed, images, 2, top_k=900, top_p=0.96)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = run()
    replayed = []
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(tokens, run())
        replayed.append(tokens.clone())
    assert not torch.equal(*replayed)
