"""The kernel of moments: values, what it may touch, and when it runs."""

import pytest
import torch

pytest.importorskip("triton")

import bilinear_ops as bo
from bilinear_ops import testing
from bilinear_ops.kernels import config, tuning
from bilinear_ops.kernels.interaction import ranking as kernels
from bilinear_ops.testing import assert_no_worse, randn


def layer(K=40, d=37, h=41, F=None, dtype=torch.float32):
    """Three tiles of pairs each way, two of directions, two steps of neurons; a tail in each."""
    basis = None if F is None else randn(d, F, dtype=dtype)
    return randn(h, d, dtype=dtype), randn(h, d, dtype=dtype), randn(K, h, dtype=dtype), basis


def assert_right(w, v, c, basis=None):
    found = bo.interaction_moments(w, v, c, basis=basis, impl="triton")
    eager = bo.reference.interaction_moments(w, v, c, basis=basis)
    wide = [t if t is None else t.double() for t in (w, v, c, basis)]
    gold = bo.reference.interaction_moments(*wide[:3], basis=wide[3])
    for name, *results in zip(found._fields, found, eager, gold, strict=True):
        assert_no_worse(*results, what=name)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched."""
    from triton.runtime.interpreter import InterpretedFunction

    names, run = [], InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **o: (names.append(self.__name__), run(self, *a, **o))[1]
    )
    return names


@pytest.mark.parametrize("F", [None, 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(dtype, F, launched):
    assert_right(*layer(F=F, dtype=dtype))
    assert launched == ["interaction_moments_kernel"]


@pytest.mark.parametrize("size", list(testing.shapes("K d h", base=17, mixed=0, sizes=(1, 17, 65))), ids=str)
def test_sizes_down_the_table(size):
    """Of positive entries: a sum that cancels says more of the entries' rounding than of the kernel."""
    assert_right(*(t if t is None else t.abs() for t in layer(**size)))


@pytest.mark.parametrize("kind", testing.LAYOUTS)
def test_any_layout(kind):
    """All entries are alike in one of them: fp32 sums that round alike are held to eager code's order elsewhere."""
    w, v, c = (testing.layout(t, kind) for t in layer(18, 18, 18)[:3])
    found = bo.interaction_moments(w, v, c, impl="triton")
    expected = bo.reference.interaction_moments(w.double(), v.double(), c.double())
    for got, gold in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), gold, rtol=1e-4, atol=1e-3)


def test_touches_only_its_memory_and_forms_no_matrix():
    tensors = [testing.guarded(t) for t in layer()[:3]]
    with testing.GuardedAllocations() as memory:
        found = kernels.interaction_moments(*tensors, None, None)
    assert memory.allocated
    memory.check()
    assert max(t.numel() for t in memory.allocated) < 40 * 37 * 37
    for got, gold in zip(found, bo.reference.interaction_moments(*(t.clone() for t in tensors)), strict=True):
        torch.testing.assert_close(got, gold, rtol=1e-4, atol=1e-3)


def test_several_blocks_of_directions(monkeypatch):
    w, v, c, _ = layer()
    whole = kernels.interaction_moments(w, v, c, None, None)
    monkeypatch.setattr(kernels, "PARTS", 17 * 5 * 9)  # directions in blocks of 17
    found, again = (kernels.interaction_moments(w, v, c, None, None) for _ in range(2))
    for got, same, expected in zip(found, again, whole, strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "streams"),
    (
        ({"K": 3}, False),  # one direction at a time
        ({"F": 300}, False),  # more products than D^T Q_k D
        ({"o": 2}, False),  # low rank
        ({"o": 39}, True),
    ),
    ids=str,
)
def test_where_matrices_are_cheaper_they_are_formed(sizes, streams, launched):
    o = sizes.pop("o", None)
    w, v, c, basis = layer(**{"K": 40, "d": 5, "h": 41, **sizes})
    if o is not None:
        w, v, c = w[:7], v[:7], bo.Directions(randn(64, o), randn(o, 7))
    found = bo.interaction_moments(w, v, c, basis=basis, impl="triton")
    assert launched and ("interaction_moments_kernel" in launched) == streams
    for got, expected in zip(found, bo.interaction_moments(w, v, c, basis=basis, impl="torch"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)


def test_a_choice_may_leave_it_to_the_matrices(launched):
    w, v, c, _ = layer()
    with tuning.using(interaction_moments_kernel=config.LIBRARY):
        kernels.interaction_moments(w, v, c, None, None)
        assert "interaction_moments_kernel" not in launched and launched
        with pytest.raises(RuntimeError, match="leaves these sizes to PyTorch"):
            kernels.interaction_moments(w, v, c, None, None, library=False)


def test_nan_shows():
    w, v, c, _ = layer(17, 18, 5)
    w[0, 2], c[3:, 0] = torch.nan, 0
    for got in bo.interaction_moments(w, v, c, impl="triton"):
        assert got.isnan().all()


def test_opcheck():
    w, v, c, basis = layer(17, 3, 5, F=2)
    torch.library.opcheck(torch.ops.bilinear_ops.interaction_moments.default, (w, v, c, None, basis, "triton"))
