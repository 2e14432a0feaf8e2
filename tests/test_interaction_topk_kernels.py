"""The kernels of rankings: values and places, what they may touch, what they wait for, and when they run."""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

import bilinear_ops as bo
from bilinear_ops import testing
from bilinear_ops.interaction import ranking as ops
from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels.interaction import ranking as kernels
from bilinear_ops.kernels.records import PairTile
from bilinear_ops.testing import assert_no_worse, randn

K, D, H = 5, 37, 17  # three tiles of pairs each way, two of directions, two steps of neurons; a tail in each
TILE = PairTile(16, 16, 4, 16, 4, 1)
FEW, TILES = 18, 4  # features of two tiles each way


@pytest.fixture(autouse=True)
def _streamed(monkeypatch):
    """Small sizes, which the tables leave to the matrices, and a tile of few directions."""
    monkeypatch.setattr(config, "streams", lambda *_: True)
    monkeypatch.setattr(config, "few_tiles", lambda *_: True)
    with tuning.using(interaction_topk_kernel=TILE):
        yield


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched."""
    names, run = [], InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **o: (names.append(self.__name__), run(self, *a, **o))[1]
    )
    return names


def layer(k=K, d=D, h=H):
    return randn(h, d), randn(h, d), randn(k, h)


def weights(kind, k=K, f=D):
    """None, one for all outputs, one of each, or one of each that is not contiguous."""
    w = torch.rand(k, f, f)
    return {"none": None, "shared": w[0], "own": w, "strided": w.transpose(0, 2).contiguous().transpose(0, 2)}[kind]


def assert_places(found, expected):
    for name, got, place in zip(found._fields[1:], found[1:], expected[1:], strict=True):
        assert torch.equal(got, place), name


@pytest.mark.parametrize(
    ("score", "scope", "weight", "F"),
    (
        ("cross", "output", "none", None),
        ("cross", "global", "own", None),
        ("pair", "output", "shared", None),
        ("pair", "global", "none", FEW),
        ("entry", "output", "strided", None),
        ("entry", "global", "shared", None),
    ),
)
def test_values_and_places(score, scope, weight, F, launched):
    tensors, basis, weight = layer(), None if F is None else randn(D, F), weights(weight, f=F or D)
    options = {"score": score, "scope": scope}
    found = bo.interaction_topk(*tensors, 2, **options, weight=weight, basis=basis, impl="triton")
    assert launched == ["interaction_topk_kernel", "interaction_candidates_kernel"]
    eager = bo.reference.interaction_topk(*tensors, 2, **options, weight=weight, basis=basis)
    wide, weight, basis = ([t if t is None else t.double() for t in ts] for ts in (tensors, [weight], [basis]))
    gold = bo.reference.interaction_topk(*wide, 2, **options, weight=weight[0], basis=basis[0])
    assert_no_worse(found.values, eager.values, gold.values)
    assert_places(found, gold)


@pytest.mark.parametrize("scope", ("output", "global"))
@pytest.mark.parametrize("n", (3, TILES + 2))
def test_ties_over_tiles_and_outputs_go_to_the_first(n, scope):
    """Small integers make many, and two outputs that differ in sign; n is more than the tiles, and less."""
    w, v, c = (t.round().clamp(-1, 1) for t in layer(1, FEW, 5))
    c = torch.cat((c, -c))
    found = bo.interaction_topk(w, v, c, n, score="pair", scope=scope, impl="triton")
    expected = bo.reference.interaction_topk(w, v, c, n, score="pair", scope=scope)
    strength = expected.values.abs().reshape(-1, n)
    assert (strength[:, 1:] == strength[:, :-1]).any() and (n < TILES or found.k.unique().numel() == 2)
    assert torch.equal(found.values, expected.values)
    assert_places(found, expected)


@pytest.mark.parametrize("score", ("cross", "pair"))
@pytest.mark.parametrize("scope", ("output", "global"))
def test_every_pair(scope, score):
    """Zeros among them, which are ranked too."""
    tensors = [t.round().clamp(-1, 1) for t in layer(2, FEW, 1)]
    n = (FEW * (FEW - 1) // 2 + FEW * (score == "pair")) * (2 if scope == "global" else 1)
    found = bo.interaction_topk(*tensors, n, score=score, scope=scope, impl="triton")
    expected = bo.reference.interaction_topk(*tensors, n, score=score, scope=scope)
    assert torch.equal(found.values, expected.values)
    assert_places(found, expected)


@pytest.mark.parametrize("scope", ("output", "global"))
def test_nan_is_the_strongest_and_infinity_next(scope):
    """NaN by NaN, whatever their bits are."""
    w, v, c = layer(2, FEW)
    weight = torch.ones(2, FEW, FEW)
    weight[1, 3, 17], weight[1, 16, 17] = -torch.nan, torch.inf
    bits = weight.view(torch.int32)
    bits[0, 10, 16], bits[0, 10, 17] = 0x7FC00001, 0x7FFFFFFF
    found = bo.interaction_topk(w, v, c, 3, scope=scope, weight=weight, impl="triton")
    assert_places(found, bo.reference.interaction_topk(w, v, c, 3, scope=scope, weight=weight))
    w[0, 10], c[:, 0] = torch.nan, 0  # and so is all of row 10
    found = bo.interaction_topk(w, v, c, 3, scope=scope, impl="triton")
    assert found.values.isnan().all()
    assert_places(found, bo.reference.interaction_topk(w, v, c, 3, scope=scope))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_ranked_before_it_is_rounded(dtype):
    """The weights in the basis too."""
    w, v, c, basis, weight = (t.to(dtype) for t in (*layer(2), randn(D, FEW), weights("shared", f=FEW)))
    found = bo.interaction_topk(w, v, c, 4, weight=weight, basis=basis, impl="triton")
    w, v, c, basis, weight = (t.double() for t in (w, v, c, basis, weight))
    gold = bo.reference.interaction_topk(w, v, c, 4, weight=weight, basis=basis)
    assert_places(found, gold)
    assert found.values.dtype == dtype
    torch.testing.assert_close(found.values, gold.values.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("scope", ("output", "global"))
def test_touches_only_its_memory_and_forms_no_matrix(scope):
    tensors = [testing.guarded(t) for t in (*layer(K, FEW), weights("own", K, FEW))]
    with testing.GuardedAllocations() as memory:
        found = kernels.interaction_topk(*tensors[:3], None, None, tensors[3], 1, "pair", scope)
    assert memory.allocated
    memory.check()
    assert max(t.numel() for t in memory.allocated) < K * FEW * FEW
    w, v, c, weight = (t.clone() for t in tensors)
    expected = bo.reference.interaction_topk(w, v, c, 1, score="pair", scope=scope, weight=weight)
    assert_places(bo.reference.interaction_topk(w, v, c, 1)._make(found), expected)


def test_no_tile_leaves_a_tail_of_the_contraction():
    """Rows are filled up for the first kernel's tile alone."""
    first, second = (config.KERNELS[f"interaction_{name}_kernel"] for name in ("topk", "candidates"))
    every = [[t for row in (*r.tiles.values(), r.candidates) for t in row] for r in (first, second)]
    every[0].append(first.interpreted)
    every[1].append(second.interpreted)
    assert all(one.block_h % other.block_h == 0 for one in every[0] for other in every[1])


@pytest.mark.parametrize("scope", ("output", "global"))
def test_several_blocks_of_tiles_and_directions(scope, monkeypatch, launched):
    tensors = (*layer(3, FEW), None, None, weights("own", 3, FEW), 2, "cross", scope)
    whole = kernels.interaction_topk(*tensors)
    launched.clear()
    monkeypatch.setattr(kernels, "KEYS", 3)  # one tile of four, one direction
    found = kernels.interaction_topk(*tensors)
    assert launched.count("interaction_topk_kernel") == 4
    assert launched.count("interaction_candidates_kernel") == (3 if scope == "output" else 2)
    for got, expected in zip(found, whole, strict=True):
        assert torch.equal(got, expected)


def test_the_refusal_is_the_bound_of_the_keys():
    assert ops.MOST_FEATURES**2 == kernels.PLACES


@pytest.mark.parametrize("scope", ("output", "global"))
def test_never_waits_for_the_device(scope, monkeypatch):
    """No number is read from a tensor that has none; the way by matrices does so."""
    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)
    w, v, c, weight = (t.to("meta") for t in (*layer(), weights("shared")))
    ranking = (w, v, c, None, None, weight, 20, "cross", scope)
    shapes = {t.shape for t in kernels.interaction_topk(*ranking)}
    assert shapes == {torch.Size((20,) if scope == "global" else (K, 20))}
    with (
        tuning.using(interaction_topk_kernel=config.LIBRARY),
        pytest.raises((NotImplementedError, RuntimeError), match="meta"),
    ):
        kernels.interaction_topk(*ranking)


@pytest.mark.parametrize(
    ("sizes", "streams"),
    (
        ({"k": 3, "F": 60}, False),  # one direction at a time
        ({"n": 3}, False),  # too many tiles twice
        ({"n": 3, "scope": "global"}, True),  # of all directions'
        ({"F": 300}, False),  # more products than D^T Q_k D
        ({"o": 2, "n": 1}, False),  # low rank
        ({"n": 1}, True),
    ),
    ids=str,
)
def test_where_matrices_are_cheaper_they_are_formed(sizes, streams, monkeypatch):
    """Or PyTorch ranks tiles of pairs."""
    monkeypatch.undo()
    called = []
    monkeypatch.setattr(kernels, "_topk", lambda *_: called.append("tiles") or [randn(1)] * 4)
    monkeypatch.setattr(kernels.composite, "interaction_topk", lambda *_: called.append("matrices") or [randn(1)] * 4)
    sizes = {"k": 64, "o": None, "F": None, "n": 1, "scope": "output", **sizes}
    w, v, c = layer(sizes["k"], 91, 200)
    u, c = (None, c) if sizes["o"] is None else (randn(sizes["k"], sizes["o"]), randn(sizes["o"], 200))
    basis = None if sizes["F"] is None else randn(91, sizes["F"])
    kernels.interaction_topk(w, v, c, u, basis, None, sizes["n"], "cross", sizes["scope"])
    assert called == ["tiles" if streams else "matrices"]


def test_asked_for_by_name_the_kernel_ranks_what_it_would_leave_to_pytorch(monkeypatch, launched):
    """Many of all entries of many outputs; where PyTorch would rank matrices, kernels form these."""
    monkeypatch.setattr(config, "few_tiles", lambda *_: False)
    w, v, c = layer(49, 3, 2)
    for tensors, kernel in (((w, v, c), "interaction_topk_kernel"), ((w, v, c[:3]), "interaction_direction_kernel")):
        launched.clear()
        found = bo.interaction_topk(*tensors, 2, scope="global", impl="triton")
        assert launched[0] == kernel
        assert_places(found, bo.reference.interaction_topk(*tensors, 2, scope="global"))


def test_a_choice_may_leave_it_to_the_matrices(launched):
    ranking = (*layer(3, 4, 5), None, None, None, 2, "cross", "output")
    with tuning.using(interaction_topk_kernel=config.LIBRARY):
        kernels.interaction_topk(*ranking)
        assert launched == ["interaction_direction_kernel"]
        with pytest.raises(RuntimeError, match="leaves these sizes to PyTorch"):
            kernels.interaction_topk(*ranking, library=False)


def test_gradients_and_opcheck():
    w, v, c = layer(2, 4, 3)
    tensors = [t.requires_grad_() for t in (w, v, c)]
    found, expected = (
        torch.autograd.grad(module.interaction_topk(*tensors, 3, **options).values.square().sum(), tensors)
        for module, options in ((bo, {"impl": "triton"}), (bo.reference, {}))
    )
    for got, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(got, gradient)
    ranking = (w.detach(), v.detach(), c.detach(), None, None, torch.rand(4, 4), 2, "pair", "output", "triton")
    torch.library.opcheck(torch.ops.bilinear_ops.interaction_topk.default, ranking)
