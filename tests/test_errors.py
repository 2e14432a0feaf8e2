"""Every documented error of the gated family: its type, the argument it names, and that it comes before any work."""

import pytest
import torch

import bilinear_ops as bo
from bilinear_ops import _impl
from bilinear_ops.testing import randn


def layer(**changes):
    tensors = {"x": randn(5, 3), "w": randn(4, 3), "v": randn(4, 3), "p": randn(2, 4)}
    tensors |= {"b_w": randn(4), "b_v": randn(4), "b_p": randn(2)}
    return bo.gated_mlp(**{**tensors, **changes})


CASES = {
    "inner size of x": (dict(x=randn(5, 7)), RuntimeError, r"w must .* \[h, d=7\], got \[4, 3\]; d is that of x"),
    "x without dimensions": (dict(x=torch.tensor(1.0)), RuntimeError, r"x must have shape \[..., d\], got \[\]"),
    "rows of v": (dict(v=randn(5, 3)), RuntimeError, r"v must have shape \[h=4, d=3\], got \[5, 3\]"),
    "w one-dimensional": (dict(w=randn(3)), RuntimeError, r"w must have shape \[h, d=3\], got \[3\]"),
    "columns of p": (dict(p=randn(2, 5)), RuntimeError, r"p must have shape \[o, h=4\], got \[2, 5\]"),
    "length of b_w": (dict(b_w=randn(5)), RuntimeError, r"b_w must have shape \[h=4\], got \[5\]"),
    "length of b_v": (dict(b_v=randn(5)), RuntimeError, r"b_v must have shape \[h=4\], got \[5\]"),
    "length of b_p": (dict(b_p=randn(4)), RuntimeError, r"b_p must have shape \[o=2\], got \[4\]"),
    "dtype": (dict(w=randn(4, 3).half()), RuntimeError, "w must have the dtype of x, torch.float32, got torch.float16"),
    "device": (dict(w=randn(4, 3).to("meta")), RuntimeError, "w must be on the device of x, cpu, got meta"),
    "integers": (dict(x=torch.ones(5, 3, dtype=torch.int64)), TypeError, "x must be float64, .*got torch.int64"),
    "complex": (dict(v=randn(4, 3).to(torch.complex64)), TypeError, "v must be float64, .*got torch.complex64"),
    "no tensor": (dict(w=[[1.0]]), TypeError, "w must be a torch.Tensor, got list"),
    "missing tensor": (dict(v=None), TypeError, "v must be a torch.Tensor, got NoneType"),
    "activation": (
        dict(activation="softplus"),
        ValueError,
        "activation must be one of identity, silu, .*got 'softplus'",
    ),
    "beta without swish": (dict(activation="silu", beta=0.5), ValueError, "beta belongs to activation='swish'"),
    "tensor beta without swish": (dict(beta=torch.tensor(1.0)), ValueError, "beta belongs to activation='swish'"),
    "shape of beta": (
        dict(activation="swish", beta=torch.ones(1)),
        RuntimeError,
        r"beta must .* shape \[\], got \[1\]",
    ),
    "dtype of beta": (dict(activation="swish", beta=torch.tensor(1)), TypeError, "beta must be .*got torch.int64"),
    "device of beta": (
        dict(activation="swish", beta=torch.tensor(1.0, device="meta")),
        RuntimeError,
        "beta must be on",
    ),
    "gradient of limit": (
        dict(limit=torch.tensor(1.0, requires_grad=True)),
        ValueError,
        "limit has no gradient, got a tensor that requires one",
    ),
    "shape of offset": (dict(offset=torch.ones(2)), RuntimeError, r"offset must .* shape \[\], got \[2\]"),
    "limit below 0": (dict(limit=-1.0), ValueError, "limit must be positive, got -1.0"),
    "limit of bounds": (dict(activation="silu_bounded", limit=1.0), ValueError, "limit does not belong to"),
    "type of beta": (dict(activation="swish", beta="1"), TypeError, "beta must be a float or a 0-dim tensor, got str"),
    "impl": (dict(impl="cuda"), ValueError, "impl must be .*got 'cuda'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), CASES.values(), ids=CASES)
def test_bad_argument(changes, error, message, monkeypatch):
    def work(*args):
        raise AssertionError("work began before the check")

    monkeypatch.setattr(bo.gated, "gated_op", work)
    with pytest.raises(error, match=message):
        layer(**changes)


def test_triton_refuses_where_it_cannot_run(monkeypatch):
    """An explicit request runs the kernels or raises: no silent fallback."""
    layer(impl="triton")
    with pytest.raises(RuntimeError, match="float64 has no kernels"):
        bo.gated_mlp(*(randn(*s, dtype=torch.float64) for s in ((5, 3), (4, 3), (4, 3), (2, 4))), impl="triton")
    with pytest.raises(RuntimeError, match="no kernels for device meta"):
        bo.gated_mlp(*(randn(*s).to("meta") for s in ((5, 3), (4, 3), (4, 3), (2, 4))), impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="CPU tensors need TRITON_INTERPRET=1"):
        layer(impl="triton")
    monkeypatch.setattr(bo._impl, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        layer(impl="triton")


def test_auto_is_the_composite_on_cpu(monkeypatch):
    """Also under TRITON_INTERPRET=1: interpreted kernels are for tests, not for users."""
    import bilinear_ops.kernels.gated as kernels

    monkeypatch.setattr(kernels, "gate_forward", lambda *args: pytest.fail("the kernels ran"))
    layer()


@pytest.mark.parametrize("value", ("1", "true", "On", "YES", "y", "0", "2", "off", "", "truthy"))
def test_interpreting_is_read_as_triton_reads_it(value, monkeypatch):
    from triton import knobs

    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert (_impl.why_not_triton(torch.ones(1)) is None) == knobs.runtime.interpret
