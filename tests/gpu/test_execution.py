"""How a GPU is used: captured graphs, side streams, a second device, compiled code, autocast.

A back end without graphs calls again where a GPU replays, so that every test's body runs anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import pytest
import torch
from calls import Call
from torch import Tensor

import flashkern as fk


def equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other), (one.float() - other.float()).abs().max()


def captured(
    backend: str, function: Callable[[], Sequence[Tensor]]
) -> tuple[Sequence[Tensor], Callable[[], None]]:
    """The outputs of a call, and what computes them again in the same memory."""
    if backend == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function()
        return outputs, graph.replay
    outputs = function()

    def again() -> None:
        for old, new in zip(outputs, function(), strict=True):
            old.copy_(new)

    return outputs, again


def test_a_captured_call_follows_its_inputs(backend: str, call: Call) -> None:
    inputs = call.make()
    outputs, replay = captured(backend, lambda: call.function(*inputs))
    for _ in range(2):
        changed = call.make()
        for old, new in zip(inputs, changed, strict=True):
            old.copy_(new)
        replay()
        equal(outputs, call.function(*changed))


def test_a_side_stream(backend: str, call: Call) -> None:
    """The kernels wait for what torch's current stream computes before them, and for no other."""
    if backend != "cuda":
        pytest.skip("needs CUDA streams")
    inputs = call.make()
    want = [x.clone() for x in call.function(*[x.clone() for x in inputs])]
    late = [torch.zeros_like(x) for x in inputs]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        for empty, full in zip(late, inputs, strict=True):
            empty.copy_(full)
        got = call.function(*late)
    side.synchronize()
    equal(got, want)


def test_a_second_device(backend: str, call: Call) -> None:
    """The tensors' device runs, whichever is current."""
    if backend != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = call.make()
    want = call.function(*[x.clone() for x in inputs])
    got = call.function(*[x.to("cuda:1") for x in inputs])
    assert torch.cuda.current_device() == 0
    equal([x.cpu() for x in got], [x.cpu() for x in want])


def test_compiled(backend: str, call: Call) -> None:
    if backend == "cuda" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    compiler = "inductor" if backend == "cuda" else "aot_eager"
    if call.name == "decode":
        pytest.skip("its caches are outputs and inputs at once")
    torch._dynamo.reset()
    inputs = call.make()
    compiled = torch.compile(call.function, backend=compiler, fullgraph="training" not in call.name)
    equal(list(compiled(*inputs)), list(call.function(*inputs)))


@pytest.mark.kernels("attention_forward")
def test_autocast(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    q, k, v = (torch.randn(1, 2, 40, 64) for _ in range(3))
    with torch.autocast(device, torch.bfloat16):
        got = fk.attention(q, k, v)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, fk.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_the_same_bits_in_every_run(backend: str, call: Call) -> None:
    inputs = call.make()
    runs = [[x.clone() for x in call.function(*inputs)] for _ in range(3)]
    equal(runs[1], runs[0])
    equal(runs[2], runs[0])


@pytest.mark.kernels("attention_forward", "attention_backward")
def test_memory_beyond_inputs_and_outputs(backend: str) -> None:
    """Attention keeps no matrix of scores: 8192 x 8192 of them would be 128 MiB a head."""
    if backend != "cuda":
        pytest.skip("needs torch's accounts of GPU memory")
    q, k, v, grad = (torch.randn(1, 8, 8192, 64).bfloat16() for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(fk.attention(*leaves, causal=True), leaves, grad)
    used = torch.cuda.max_memory_allocated() - before
    # Output and three gradients, once more as float32 for what is added up.
    assert used < 16 * q.numel() * q.element_size(), f"{used / 2**20:.0f} MiB"
