"""The gate's activations and their derivatives, once, in fp32."""

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
        return z * tl.sigmoid(_gelu_tanh_slope(z) * z)


@triton.jit
def act_with_grad(z, beta, ACTIVATION: tl.constexpr):
    """(act(z), act'(z))."""
    if ACTIVATION == "identity":
        return z, tl.full(z.shape, 1.0, tl.float32)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        return z * s, s + z * s * (1 - s)
    elif ACTIVATION == "swish":
        s = tl.sigmoid(beta * z)
        return z * s, s + beta * z * s * (1 - s)
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(z)
        return s, s * (1 - s)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        return z * cdf, cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # (1 + tanh(u)) / 2 = sigmoid(2 u), so that no libdevice tanh is needed
        s = tl.sigmoid(_gelu_tanh_slope(z) * z)
        return z * s, s + z * s * (1 - s) * (1.5957691216057308 + 0.2140644488 * z * z)


@triton.jit
def act_grad_beta(z, beta, ACTIVATION: tl.constexpr):
    """d act(z) / d beta = z^2 s (1 - s) of swish."""
    tl.static_assert(ACTIVATION == "swish")
    s = tl.sigmoid(beta * z)
    return z * z * s * (1 - s)


@triton.jit
def _gelu_tanh_slope(z):
    # 2 sqrt(2 / pi) (1 + 0.044715 z^2)
    return 1.5957691216057308 + 0.07135481627159236 * z * z
