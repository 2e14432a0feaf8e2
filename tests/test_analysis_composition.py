"""Virtual interactions and re-expression against composed layers and tensors formed in full."""

import pytest
import torch
from analysis_inputs import close, doubles, layer, tensor

import bilinear_ops as bo
from bilinear_ops import analysis

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in functorch


def test_virtual_interactions():
    first, second = layer(6, 7, 5), layer(5, 9, 4)
    x = doubles((11, 6))[0]
    virtual = analysis.virtual_interactions(first, second)
    q = bo.interaction_matrices(virtual.w, virtual.v, virtual.p)
    close(q, first[2].t() @ tensor(*second) @ first[2])
    for activation in ("identity", "silu"):
        hidden = bo.gated_bilinear(x, *first[:2], activation=activation)
        composed = bo.gated_mlp(bo.gated_mlp(x, *first, activation=activation), *second)
        close(bo.gated_mlp(hidden, *virtual[:3]), composed)
    close(virtual.scale, bo.neuron_gram(*first[:2]).diagonal().sqrt())


def test_virtual_interactions_do_not_depend_on_the_scale_of_neurons():
    (w, v, p), second = layer(6, 7, 5), layer(5, 9, 4)
    scale = torch.rand(7, dtype=torch.float64) + 0.1

    def ranked(first):
        found = analysis.virtual_interactions(first, second)
        return bo.interaction_topk(found.w * found.scale, found.v * found.scale, found.p, 5).values

    close(ranked((w, v, p)), ranked((w * scale[:, None], v, p / scale)))
    half = [300 * torch.ones(1, 8, dtype=torch.float16), torch.ones(1, 8, dtype=torch.float16)]
    virtual = analysis.virtual_interactions((*half, half[1].t()), (*half, half[1][:, :1]))
    assert virtual.scale.item() == 300 * 8


def test_virtual_interactions_with_the_residual_stream():
    first, second = layer(6, 7, 6), layer(6, 9, 4)
    x = doubles((11, 6))[0]
    virtual = analysis.virtual_interactions(first, second, residual=True)
    inputs = torch.cat([x, bo.gated_bilinear(x, *first[:2])], 1)
    close(bo.gated_mlp(inputs, *virtual[:3]), bo.gated_mlp(x + bo.gated_mlp(x, *first), *second))
    assert virtual.scale.shape == (13,)
    assert (virtual.scale[:6] == 1).all()


@pytest.mark.parametrize("directions", [4, 9])
def test_reexpress(directions):
    w, v, p = layer(5, 8, 4)
    (u,) = doubles((directions, 4))
    found = analysis.reexpress(w, v, p, u)
    q = bo.interaction_matrices(w, v, found.c)
    close(q, torch.einsum("ko,oij->kij", u, tensor(w, v, p)))
    close(torch.einsum("ko,kij->oij", found.outputs, q), tensor(w, v, p))
    close(found.outputs, torch.linalg.pinv(u).t())


def test_reexpress_through_fewer_directions_that_hold_the_layer():
    w, v, p = layer(5, 8, 3)
    (embed,) = doubles((4, 3))
    p = embed @ p  # outputs in three of four dimensions
    u = torch.randn(3, 3).double() @ embed.t()
    found = analysis.reexpress(w, v, p, u)
    close(found.outputs.t() @ found.c, p)


def test_reexpress_refuses_what_it_would_lose():
    w, v, p = layer(5, 8, 4)
    (u,) = doubles((9, 4))
    with pytest.raises(ValueError, match=r"span the layer's outputs, but \d+\.\d% of \|B\| lies outside"):
        analysis.reexpress(w, v, p, u[:3])
    for dependent in (u[:, :3] @ torch.randn(3, 4).double(), torch.cat([u[:2], u[:1]])):
        with pytest.raises(ValueError, match="directions must have rank"):
            analysis.reexpress(w, v, p, dependent)
    near = (u[:, :3] @ torch.randn(3, 4).double()).float()  # of full rank by its rounding errors alone
    with pytest.raises(ValueError, match="directions must have rank 4 .* got 3"):
        analysis.reexpress(w.float(), v.float(), p.float(), near)


def test_gradients():
    first, second = layer(2, 3, 2, grad=True), layer(2, 3, 2, grad=True)
    assert torch.autograd.gradcheck(lambda *t: analysis.virtual_interactions(t[:3], t[3:]), first + second)
    for k in (2, 4):
        (u,) = doubles((k, 2), grad=True)
        assert torch.autograd.gradcheck(analysis.reexpress, (*first, u))


@pytest.mark.parametrize(("d", "h", "o"), [(0, 4, 3), (3, 0, 2), (3, 4, 0), (0, 0, 0)])
def test_empty_sizes(d, h, o):
    w, v, p = layer(d, h, o)
    virtual = analysis.virtual_interactions((w, v, p), layer(o, 5, 2))
    assert [t.shape for t in virtual] == [(5, h), (5, h), (2, 5), (h,)]
    again = analysis.reexpress(w, v, p, torch.eye(o).double())
    close(again.c, p)


def test_errors():
    w, v, p = layer(5, 8, 4)
    with pytest.raises(TypeError, match=r"first must be \(w, v, p\), got GatedMLP"):
        analysis.virtual_interactions(bo.nn.GatedMLP(5, 8, 4), (w, v, p))
    with pytest.raises(RuntimeError, match=r"second\.w must have shape \[h2, m=4\], got \[8, 5\]"):
        analysis.virtual_interactions((w, v, p), (w, v, p))
    with pytest.raises(RuntimeError, match=r"first\.p must have shape \[d=5, h1=8\], got \[4, 8\]"):
        analysis.virtual_interactions((w, v, p), (w, v, p), residual=True)
    with pytest.raises(RuntimeError, match=r"directions must have shape \[K, o=4\], got \[4, 5\]"):
        analysis.reexpress(w, v, p, torch.ones(4, 5).double())


def test_directions_must_be_finite():
    with pytest.raises(ValueError, match="directions must be finite"):
        analysis.reexpress(*layer(4, 6, 3), torch.full((3, 3), torch.nan).double())
