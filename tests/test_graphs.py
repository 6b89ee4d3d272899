"""Recorded calls: graphs give what operators give, whatever threads, streams and failures come between."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch

from tests.conftest import in_threads, placed, random_model
from tests.emulated_cuda import Device, Graph
from tests.kernels import needs_triton
from varcompress.models import graphs
from varcompress.models.graphs import Graphs
from varcompress.models.runtime import Runtime
from varcompress.sampling import Sampling

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCHEDULES = ["full", "d2@2", "d3@1", "6x1,4x1,2x2"]


@pytest.fixture
def device(monkeypatch):
    """A CPU that queues and records as a GPU does, for this thread and those that say so."""
    device = Device().install(monkeypatch)
    with device.queueing():
        yield device


def doubled(x):
    return ((x + 1) * 2 - 2,)


# -- threads and streams --------------------------------------------------------------------------


def calls_of_threads(device, graphs, *, streams, calls):
    """`calls` of each of two threads, inputs and results."""
    done = []

    def work(first, stream):
        with device.queueing(), device.stream(stream):
            for value in range(first, first + calls):
                x = torch.full((3,), float(value))
                done.append((value, graphs.run("key", doubled, x)[0]))

    in_threads(work, [(1000 * i, stream) for i, stream in enumerate(streams)])
    return done


@pytest.mark.parametrize("own_streams", [False, True])
def test_threads_never_read_each_others_buffers(device, own_streams):
    streams = [torch.cuda.Stream() for _ in range(2)] if own_streams else [device.default] * 2
    done = calls_of_threads(device, Graphs(), streams=streams, calls=100)
    device.run()
    assert len(done) == 200
    assert [value for value, result in done if result.tolist() != [2.0 * value] * 3] == []


def test_a_call_on_another_stream_waits_for_the_last_one(device):
    recorded, results = Graphs(), []
    streams = [torch.cuda.Stream() for _ in range(3)]
    for value in range(60):
        with device.stream(streams[value % 3]):
            results.append(recorded.run("key", doubled, torch.full((3,), float(value)))[0])
    device.run()
    assert [result[0].item() for result in results] == [2.0 * value for value in range(60)]


def test_a_call_that_fails_half_way_is_waited_for_too(device, monkeypatch):
    """Its replay is on its way, although nobody gets the result."""
    recorded, one, two = Graphs(), torch.cuda.Stream(), torch.cuda.Stream()
    with device.stream(one):
        recorded.run("key", doubled, torch.ones(3))
    with device.stream(one), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            recorded.run("key", doubled, torch.ones(3))
    for value in range(20):
        with device.stream(two):
            result = recorded.run("key", doubled, torch.full((3,), float(value)))[0]
        with device.stream(one):
            other = recorded.run("key", doubled, torch.full((3,), value + 0.5))[0]
        device.run()
        assert (result[0].item(), other[0].item()) == (2 * value, 2 * value + 1)


# -- what cannot be recorded ----------------------------------------------------------------------


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def reads_back(x):
    return (x * x.sum().item(),)


def test_a_call_that_cannot_be_recorded_runs_eagerly_after_one_warning(device):
    recorded, mine = Graphs(), torch.cuda.Stream()
    recorded.run("other", doubled, torch.ones(2))
    with device.stream(mine):
        with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph and runs slower: .*CUDA error"):
            assert recorded.run("key", reads_back, torch.ones(2))[0].tolist() == [2, 2]
        assert torch.cuda.current_stream() is mine
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert recorded.run("key", reads_back, torch.full((2,), 3.0))[0].tolist() == [18, 18]
            recorded.clear()
            assert recorded.run("key", reads_back, torch.full((2,), 3.0))[0].tolist() == [18, 18]
        assert recorded.run("other", doubled, torch.ones(2))[0].tolist() == [2, 2]  # recorded anew
    with pytest.warns(UserWarning, match="cannot be recorded"):
        recorded.run("another key", reads_back, torch.ones(2))


@pytest.mark.parametrize("in_capture", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: out of memory")])
def test_no_memory_to_record_is_no_memory(device, in_capture, error):
    recorded, mine, full = Graphs(), torch.cuda.Stream(), True

    def body(x):
        if full and torch.cuda.is_current_stream_capturing() == in_capture:
            device.current_stream().invalid = in_capture  # so that ending the capture fails too, and hides it
            raise error
        return doubled(x)

    recorded.run("other", doubled, torch.ones(2))
    with device.stream(mine):
        with pytest.raises((torch.OutOfMemoryError, RuntimeError), match=r"full|out of memory") as caught:
            recorded.run("key", body, torch.ones(2))
        assert isinstance(caught.value, torch.OutOfMemoryError) or not in_capture  # outside, as the body raised it
        assert torch.cuda.current_stream() is mine
        assert (recorded._recorded, recorded._pool) == ({}, None)
        full = False
        assert recorded.run("key", body, torch.ones(2))[0].tolist() == [2, 2]
    assert list(recorded._recorded) == ["key"]


def test_an_older_torch_is_left_able_to_draw_and_to_give_back_memory(device, monkeypatch):
    """What 2.14 closes itself where a capture fails: the allocator's pool, and the generator by another capture."""
    closed, ended, end = [], [], Graph.capture_end
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0"))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: closed.append(pool))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Graph, "capture_end", lambda graph: (end(graph), ended.append(len(graph.operations))))
    with pytest.warns(UserWarning, match="cannot be recorded"):
        Graphs().run("key", reads_back, torch.ones(2))
    assert (closed, ended) == ([(0, 1)], [1])  # one after the one that failed, and not empty, which torch warns of


def test_a_capture_leaves_the_callers_own_graphs_alone(device):
    """The default generator's tensors, made at the first capture, must be none of inference mode."""
    with torch.inference_mode():
        result = Graphs().run("key", doubled, torch.ones(2))[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        torch.ones(2) + 1
    device.run()
    assert result.tolist() == [2, 2]


def test_a_capture_of_the_callers_own_takes_the_body_in(device):
    recorded, x, graph = Graphs(), torch.ones(2), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        result = recorded.run("key", doubled, x)[0]
    x.fill_(5)
    graph.replay()
    device.run()
    assert result.tolist() == [10, 10]
    assert not recorded._recorded


# -- what is kept ---------------------------------------------------------------------------------


def test_recordings_are_kept_for_the_weights_they_read(device):
    recorded, bodies = Graphs(), []

    def body(x):
        bodies.append(x)
        return doubled(x)

    for weights in (1, 1, 2, 2):
        recorded.run("key", body, torch.ones(2), weights=weights)
    assert len(bodies) == 2 * (graphs.WARMUPS + 1)


def test_all_begin_anew_beyond_the_limit(device, monkeypatch):
    monkeypatch.setattr(graphs, "LIMIT", 2)
    recorded = Graphs()
    for key in ("a", "b", "a", "c"):
        recorded.run(key, doubled, torch.ones(2))
    assert list(recorded._recorded) == ["c"]


def test_a_copy_records_its_own(device):
    recorded = Graphs()
    recorded.run("key", doubled, torch.ones(2))
    assert not copy.deepcopy(recorded)._recorded
    assert not pickle.loads(pickle.dumps(recorded))._recorded


def test_the_pool_is_counted_by_its_segments(device, monkeypatch):
    recorded = Graphs()
    assert recorded.pool_bytes == 0
    recorded.run("key", doubled, torch.ones(2))
    segments = [((0, 0), 100), ((0, 1), 30), ((0, 2), 1000), ((0, 1), 4)]
    snapshot = [{"segment_pool_id": pool, "total_size": size} for pool, size in segments]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: snapshot)
    assert recorded.pool_bytes == 34


# -- models ---------------------------------------------------------------------------------------


@pytest.fixture
def recording(device, monkeypatch):
    """Models that record all their calls, on the emulated device."""
    monkeypatch.setattr(Runtime, "graphed", lambda self, elements: self.graphs)
    return device


def small_model(**shape):
    """The one place that says how this file's models are made."""
    return placed(random_model(**{"depth": 3, "patch_nums": (1, 2)} | shape), kernels="torch")


def eager(model, *call, **more):
    return model.generate(*call, runtime=model.runtime.eager(), **more)


def test_batches_and_schedules_by_turns_while_results_are_held(recording):
    model, held = small_model(), []
    calls = [(labels, schedule) for schedule in ("full", "d2@1") for labels in ([1], [2, 3, 4], list(range(8)))]
    for seed in range(2):
        held += [(call, seed, model.generate(*call, seed=seed)) for call in calls]
    recording.run()
    assert len(model._graphs._recorded) == len(calls) + 3  # and the decoder of each batch
    for call, seed, images in held:
        assert torch.equal(images, eager(model, *call, seed=seed))


def test_weights_of_inference_mode_are_recorded(recording):
    with torch.inference_mode():
        model = small_model()
    assert model.var.head.weight.is_inference()
    for labels in ([1, 2], [3, 4]):
        images = model.generate(labels, "d2@1")
        recording.run()
        assert torch.equal(images, eager(model, labels, "d2@1"))
    assert len(model._graphs._recorded) == 2  # tokens and decoder


@needs_triton
def test_whatever_a_graph_depends_on_is_in_its_key(monkeypatch):
    model, keys = small_model(), set()

    def run(self, key, body, *inputs, weights):
        keys.add(key)
        return body(*inputs)

    monkeypatch.setattr(Runtime, "graphed", lambda self, elements: self.graphs)
    monkeypatch.setattr(Graphs, "run", run)
    samplings = [Sampling(cfg=2), Sampling(top_k=5), Sampling(top_p=0.5)]
    ways = [{}, {"schedule": "d2@1"}, {"labels": [1]}, *({"sampling": sampling} for sampling in samplings)]
    for way in ways:
        f_hat = model.generate_tokens(**{"labels": [1, 2]} | way)[1]
    assert len(keys) == len(ways)
    keys.clear()
    monkeypatch.setattr(model.tokenizer, "decode_features", lambda f_hat, kernels: f_hat)  # Triton's may want a GPU
    for kernels in ("torch", "triton"):
        for images in (1, 2):
            runtime = replace(model.runtime, kernels=kernels)
            model.decode_features(f_hat[:1].expand(images, -1, -1, -1), runtime=runtime)
    assert len(keys) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.var.load_state_dict(small_model(seed=1).var.state_dict(), assign=True),
        lambda model: model.var.double().float(),
        lambda model: setattr(model.var.head.weight, "data", model.var.head.weight.data.clone()),
        lambda model: model.tokenizer.to(torch.float64).float(),
        lambda model: setattr(model.var.blocks[0].attn, "proj", copy.deepcopy(model.var.blocks[0].attn.proj)),
    ],
)
def test_graphs_are_forgotten_when_weights_have_moved(recording, change):
    model = small_model()
    model.generate([1, 2])
    before = dict(model._graphs._recorded)
    model.generate([1, 2])
    assert model._graphs._recorded == before
    change(model)
    model.generate([1, 2])
    assert not set(map(id, before.values())) & set(map(id, model._graphs._recorded.values()))


def test_a_model_that_moves_leaves_no_graph_behind(recording):
    model = small_model()
    model.generate([1, 2])
    model.float()
    assert not model._graphs._recorded


# -- on a GPU -------------------------------------------------------------------------------------


def gpu_model(dtype=torch.float32, **how):
    """The one place that says how this file's models are placed on a GPU."""
    return placed(random_model().cast(dtype), device=torch.device("cuda"), **how)


@needs_cuda
@pytest.mark.parametrize("cache_dtype", [None, "int8", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_graphs_give_what_operators_give(dtype, cache_dtype):
    """Two batch sizes and several schedules in one pool, by turns, while earlier results are held."""
    model = gpu_model(dtype, cache_dtype=cache_dtype)
    calls = [(labels, schedule) for schedule in SCHEDULES for labels in ([1, 2], [3, 4, 5, 6, 7], [8, 9])]
    recorded = [(call, seed, model.generate(*call, seed=seed)) for seed in (0, 5) for call in calls]
    for call, seed, images in recorded:
        torch.testing.assert_close(images, eager(model, *call, seed=seed), rtol=0, atol=0)
    assert model._graphs.pool_bytes > 0
    model._graphs.clear()
    assert model._graphs.pool_bytes == 0


@needs_cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_that_fails_on_a_gpu(monkeypatch):
    model, mine = gpu_model(), torch.cuda.Stream()
    expected = eager(model, [1, 2], "d2@2")
    decode = model.tokenizer.decode_features

    def reads(f_hat, kernels):
        assert f_hat.sum().item() != torch.pi
        return decode(f_hat, kernels)

    with torch.cuda.stream(mine), monkeypatch.context() as patch:
        patch.setattr(model.tokenizer, "decode_features", reads)
        with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph"):
            images = model.generate([1, 2], "d2@2")
        assert torch.cuda.current_stream() == mine
        torch.testing.assert_close(model.generate([1, 2], "d2@2"), expected)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.rand(3, device="cuda").isfinite().all()  # the default generator still draws
    torch.testing.assert_close(images, expected)
    torch.testing.assert_close(model.generate([1, 2], "d2@1"), eager(model, [1, 2], "d2@1"))  # the next is recorded
    assert model._graphs._recorded


@needs_cuda
def test_threads_and_streams_on_a_gpu():
    model = gpu_model()
    calls = [([label, label + 1], schedule) for label in range(8) for schedule in ("full", "d2@2")]
    expected = [eager(model, *call) for call in calls]
    torch.cuda.synchronize()

    def work(first):
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(10):
                for i in range(first, len(calls), 2):
                    assert torch.equal(model.generate(*calls[i]), expected[i]), (turn, calls[i])

    in_threads(work, [(0,), (1,)])


@needs_cuda
def test_a_users_graph_beside_ours():
    model, x, graph = gpu_model(), torch.zeros(3, device="cuda"), torch.cuda.CUDAGraph()
    images = model.generate([1, 2])
    with torch.cuda.graph(graph):
        noise = x + torch.rand_like(x)
    for _ in range(2):
        graph.replay()
        torch.testing.assert_close(model.generate([1, 2]), images, rtol=0, atol=0)
    assert (noise >= 0).all()
