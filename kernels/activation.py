"""The activations of the gate and their derivatives, in fp32."""

import triton
import triton.language as tl


@triton.jit
def act(z, beta, ACTIVATION: tl.constexpr):
    """act(z)."""
    if ACTIVATION == "identity":
        return z
    elif ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    elif ACTIVATION == "swish":
        return z * tl.sigmoid(beta * z)
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(z)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)  # NaN passes
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        return z * tl.sigmoid(_twice_tanh_argument(z))


@triton.jit
def act_with_grad(z, beta, ACTIVATION: tl.constexpr):
    """(act(z), act'(z))."""
    if ACTIVATION == "identity":
        return z, tl.full(z.shape, 1.0, tl.float32)
    elif ACTIVATION == "silu":
        s, ds = _sigmoid_with_grad(z)
        return z * s, s + z * ds
    elif ACTIVATION == "swish":
        s, ds = _sigmoid_with_grad(beta * z)
        return z * s, s + beta * z * ds
    elif ACTIVATION == "sigmoid":
        return _sigmoid_with_grad(z)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        return z * cdf, cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        s, ds = _sigmoid_with_grad(_twice_tanh_argument(z))
        return z * s, s + z * ds * (1.5957691216057308 + 0.21406444881477878 * z * z)


@triton.jit
def act_grad_beta(z, beta, ACTIVATION: tl.constexpr):
    """d act(z) / d beta = z^2 s (1 - s) of swish."""
    tl.static_assert(ACTIVATION == "swish")
    _, ds = _sigmoid_with_grad(beta * z)
    return z * z * ds


@triton.jit
def _sigmoid_with_grad(u):
    """(s, s (1 - s)), s = sigmoid(u), from one exponential and without the cancellation in 1 - s."""
    e = tl.exp(-tl.abs(u))
    r = 1 / (1 + e)
    return tl.where(u >= 0, r, e * r), e * r * r


@triton.jit
def _twice_tanh_argument(z):
    """2 sqrt(2 / pi) (z + 0.044715 z^3): (1 + tanh(u)) / 2 is sigmoid(2 u), which needs no tanh."""
    return z * (1.5957691216057308 + 0.07135481627159262 * z * z)
