"""What only a GPU can show: `pytest -m gpu` on a machine that has one."""

import pytest
import torch
from test_gated import DTYPES, assert_right, inputs

import bilinear_ops as bo
from bilinear_ops.gated import ACTIVATIONS
from bilinear_ops.testing import randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def on_device(m: int, d: int, h: int, o: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [t.cuda() for t in inputs(m, d, h, o, dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((1, 64, 128, 64), (130, 65, 129, 33), (512, 256, 640, 256)), ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_right(activation, shape, dtype):
    assert_right(on_device(*shape, dtype), activation, "triton")


def test_bitwise_repeatable():
    tensors = [t.requires_grad_() for t in on_device(512, 256, 640, 256)]

    def step():
        y = bo.gated_mlp(*tensors, activation="silu", impl="triton")
        return [y, *torch.autograd.grad(y.float().square().sum(), tensors)]

    first = step()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


def test_graph_capture():
    tensors = on_device(512, 256, 640, 256)
    expected = bo.gated_mlp(*tensors, activation="silu", impl="triton")  # compiles, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bo.gated_mlp(*tensors, activation="silu", impl="triton")
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def test_side_stream():
    tensors = on_device(512, 256, 640, 256)
    expected = bo.gated_mlp(*tensors, impl="triton")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        y = bo.gated_mlp(*tensors, impl="triton")
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_more_than_2_to_the_31_elements():
    m, d, h = 1 << 19, 64, 4224  # hid has 2.2e9 elements
    x, w, v = (randn(*s, dtype=torch.bfloat16).cuda() for s in ((m, d), (h, d), (h, d)))
    with torch.no_grad():
        y = bo.gated_bilinear(x, w, v, impl="triton")
        torch.testing.assert_close(y[-4:], bo.gated_bilinear(x[-4:], w, v, impl="torch"))
