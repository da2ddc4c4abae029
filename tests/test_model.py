"""model.py where no GPU is needed to see it."""

import contextlib

import pytest
import torch
from diffusers import SD3Transformer2DModel

import lora
import model
import rtdmd_rl


class Memory:
    """Stands in for a CUDA graph.

    What it recorded is a call, and replaying it computes that again.
    """

    def replay(self):
        results = self.function(*self.inputs)
        for kept, result in zip(self.outputs, results, strict=True):
            kept.copy_(result)


@pytest.fixture
def recorded(monkeypatch):
    """-> two functions of tensors, behind model.Recorded

    Their recordings' .beside has the number of graphs at each call.
    """

    def function(x, y):
        graphs_beside.append(len(recordings.graphs))
        return x + y, x * y

    @contextlib.contextmanager
    def graph(memory, pool, capture_error_mode):
        assert pool is recordings.pool
        yield

    class Remembering(model.Recorded):
        def record(self, inputs):
            memory, static, output = super().record(inputs)
            memory.function = self.function
            memory.inputs = static
            memory.outputs = output
            return memory, static, output

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Memory)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def other(x, y):
        graphs_beside.append(len(recordings.graphs))
        return x - y, x / y

    recordings = model.Recordings()
    graphs_beside = recordings.beside = []
    return Remembering(function, recordings), Remembering(other, recordings)


def test_a_recorded_function_gives_what_the_plain_one_does(recorded):
    function, _ = recorded
    for i in range(5):
        x = torch.full((2,), float(i))
        y = torch.tensor([1.0, 2.0])
        total, product = function(x, y)
        assert torch.equal(total, x + y)
        assert torch.equal(product, x * y)


def test_results_of_a_recorded_function_are_not_overwritten_by_its_next_call(recorded):
    function, _ = recorded
    totals = []
    for i in range(4):
        x = torch.full((2,), float(i))
        total, _ = function(x, torch.ones(2))
        totals.append(total)
    assert [total[0].item() for total in totals] == [1, 2, 3, 4]


def test_each_set_of_shapes_is_recorded_at_its_second_call(recorded):
    function, _ = recorded
    function(torch.ones(2), torch.ones(2))
    assert len(function.recordings.graphs) == 0
    function(torch.ones(3), torch.ones(3))
    assert len(function.recordings.graphs) == 0
    function(torch.ones(2), torch.ones(2))
    assert len(function.recordings.graphs) == 1


@pytest.mark.parametrize("why", [SystemExit(1), torch.cuda.OutOfMemoryError("full")])
def test_a_recording_whose_function_fails_says_why(why, recorded, monkeypatch):
    """On a GPU it fails once more as it ends."""

    @contextlib.contextmanager
    def graph(memory, pool, capture_error_mode):
        try:
            yield
        finally:
            raise RuntimeError("the recording fails")

    def function(x):
        raise why

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(type(why)) as error:
        model.Recorded(function, recorded[0].recordings).record([torch.ones(2)])
    assert error.value is why


def test_a_recording_that_fails_by_itself_says_so(recorded, monkeypatch):
    @contextlib.contextmanager
    def graph(memory, pool, capture_error_mode):
        yield
        raise RuntimeError("the recording fails")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(RuntimeError, match="the recording fails"):
        model.Recorded(torch.neg, recorded[0].recordings).record([torch.ones(2)])


def test_before_a_first_call_the_recorded_graphs_are_let_go(recorded):
    """They keep memory, which the plain pass needs. Each is recorded again at its next call.

    A pool of memory ends with its last graph: another one takes its place.
    """
    function, other = recorded
    recordings = function.recordings
    x, y = torch.ones(2), torch.full((2,), 3.0)
    for _ in range(3):
        function(x, y)
    assert len(recordings.graphs) == 1
    first_pool = recordings.pool
    other(x, y)
    assert recordings.beside[-1] == 0
    assert len(recordings.graphs) == 0
    assert recordings.pool is not first_pool
    for _ in range(2):
        total, product = function(x, y)
        difference, quotient = other(x, y)
    assert len(recordings.graphs) == 2
    results = [total[0], product[0], difference[0], quotient[0]]
    assert results == pytest.approx([4, 3, -2, 1 / 3])


@pytest.mark.parametrize("preset", ["sd35m", "sd3m"])
def test_a_fresh_adapter_of_stage_2_has_A_of_standard_deviation_1_at_true_width(preset):
    """One block of SD3.5's (with the second attention) and of SD3's width, bf16 as on a GPU."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=64,
        caption_projection_dim=1536,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        dual_attention_layers=(0,) if preset == "sd35m" else (),
    )
    transformer = transformer.to(torch.bfloat16)
    lora.add_adapter(transformer, "generator", 32, 64, 0, rtdmd_rl.LORA_INIT_STD)
    adapter = lora.adapter(transformer, "generator")
    A = [p for key, p in adapter.items() if ".lora_A." in key]
    entries = torch.cat([p.flatten() for p in A])
    assert 0.98 < entries.std() < 1.02
    assert {p.dtype for p in A} == {torch.float32}
