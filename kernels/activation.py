"""The gate, a function of both pre-activations, and its derivatives, in fp32."""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from bilinear_ops.kernels.tile import INTERPRET


@triton.jit
def gate(a, z, beta, limit, offset, ACTIVATION: tl.constexpr):
    """hid = (clamp(a, -limit, limit) + offset) * act(min(z, limit)); limit and offset may be None."""
    if limit is not None and ACTIVATION != "silu_clamped":
        z = _at_most(z, limit)
    f = act(z, beta, ACTIVATION)
    if limit is not None and ACTIVATION == "silu_clamped":
        f = _at_most(f, limit)
    return _linear_factor(a, limit, offset, ACTIVATION) * f


@triton.jit
def gate_with_grad(a, z, beta, limit, offset, ACTIVATION: tl.constexpr):
    """(hid, d hid / d a, d hid / d z)."""
    inside = z
    if limit is not None and ACTIVATION != "silu_clamped":
        inside = _at_most(z, limit)
    f, df = act_with_grad(inside, beta, ACTIVATION)
    if limit is not None:
        if ACTIVATION == "silu_clamped":
            df = tl.where(f > limit, 0.0, df)
            f = _at_most(f, limit)
        else:
            df = tl.where(z > limit, 0.0, df)
    factor = _linear_factor(a, limit, offset, ACTIVATION)
    by_a = f
    if limit is not None:
        by_a = tl.where(tl.abs(a) > limit, 0.0, f)
    if ACTIVATION == "silu_bounded":
        t = _tanh(0.04 * a)
        by_a = (1 - t * t) * f
    return factor * f, by_a, factor * df


@triton.jit
def gate_grad_beta(dhid, a, z, beta, limit, offset, ACTIVATION: tl.constexpr):
    """dhid d hid / d beta; swish has the derivative z^2 s (1 - s) by beta, s = sigmoid(beta z)."""
    tl.static_assert(ACTIVATION == "swish")
    if limit is not None:
        z = _at_most(z, limit)
    _, ds = _sigmoid_with_grad(beta * z)
    return dhid * _linear_factor(a, limit, offset, ACTIVATION) * (z * z * ds)


@triton.jit
def _linear_factor(a, limit, offset, ACTIVATION: tl.constexpr):
    if limit is not None:
        a = tl.where(a < -limit, -limit, _at_most(a, limit))
    if ACTIVATION == "silu_bounded":
        a = 25 * _tanh(0.04 * a)
    if offset is not None:
        a += offset
    return a


@triton.jit
def _at_most(t, bound):
    """min(t, bound), of which NaN passes."""
    return tl.where(t > bound, bound, t)


@triton.jit
def act(z, beta, ACTIVATION: tl.constexpr):
    """act(z)."""
    if ACTIVATION == "identity":
        return z
    elif ACTIVATION == "silu":
        return z * _sigmoid(z)
    elif ACTIVATION == "swish":
        return z * _sigmoid(beta * z)
    elif ACTIVATION == "sigmoid":
        return _sigmoid(z)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)  # NaN passes
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return z * _sigmoid(_twice_tanh_argument(z))
    elif ACTIVATION == "relu2":
        return tl.where(z <= 0, 0.0, z * z)
    elif ACTIVATION == "relu6":
        return tl.where(z <= 0, 0.0, _at_most(z, 6.0))
    elif ACTIVATION == "tanh":
        return _tanh(z)
    elif ACTIVATION == "mish":
        return z * _tanh_softplus(z)[0]
    elif ACTIVATION == "hardswish":
        return z * tl.where(z <= -3, 0.0, _at_most(z, 3.0) + 3) * 0.16666666666666666
    elif ACTIVATION == "silu_clamped":
        return z * _sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "silu_bounded")
        return 4 * _tanh(0.25 * z) * _sigmoid(z)


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
        return z * cdf, cdf + z * 0.3989422804014327 * _exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s, ds = _sigmoid_with_grad(_twice_tanh_argument(z))
        return z * s, s + z * ds * (1.5957691216057308 + 0.21406444881477878 * z * z)
    elif ACTIVATION == "relu2":
        return tl.where(z <= 0, 0.0, z * z), tl.where(z <= 0, 0.0, 2 * z)
    elif ACTIVATION == "relu6":
        return tl.where(z <= 0, 0.0, _at_most(z, 6.0)), tl.where((z <= 0) | (z >= 6), 0.0, 1.0)
    elif ACTIVATION == "tanh":
        t = _tanh(z)
        return t, 1 - t * t
    elif ACTIVATION == "mish":
        t, dt = _tanh_softplus(z)
        return z * t, t + z * dt
    elif ACTIVATION == "hardswish":
        slope = tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, z * 0.3333333333333333 + 0.5))
        return z * tl.where(z <= -3, 0.0, _at_most(z, 3.0) + 3) * 0.16666666666666666, slope
    elif ACTIVATION == "silu_clamped":
        s, ds = _sigmoid_with_grad(z)
        return z * s, s + z * ds
    else:
        tl.static_assert(ACTIVATION == "silu_bounded")
        s, ds = _sigmoid_with_grad(z)
        t = _tanh(0.25 * z)
        return 4 * t * s, (1 - t * t) * s + 4 * t * ds


@triton.jit
def _exp(u):
    """e^u from the special-function unit's 2^u, as tl.exp."""
    if not INTERPRET and is_cuda():
        text: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(text, "=f,f", [u * 1.4426950408889634], tl.float32, is_pure=True, pack=1)
    return tl.exp(u)


@triton.jit
def _reciprocal(u):
    """1 / u to one unit in the last place, by the special-function unit where there is one."""
    if not INTERPRET and is_cuda():
        text: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(text, "=f,f", [u], tl.float32, is_pure=True, pack=1)
    return 1 / u


@triton.jit
def _sigmoid(u):
    return _reciprocal(1 + _exp(-u))


@triton.jit
def _sigmoid_with_grad(u):
    """(s, s (1 - s)), s = sigmoid(u), from one exponential and without the cancellation in 1 - s."""
    e = _exp(-tl.abs(u))
    r = _reciprocal(1 + e)
    return tl.where(u >= 0, r, e * r), e * r * r


@triton.jit
def _twice_tanh_argument(z):
    """2 sqrt(2 / pi) (z + 0.044715 z^3): (1 + tanh(u)) / 2 is sigmoid(2 u), which needs no tanh."""
    return z * (1.5957691216057308 + 0.07135481627159262 * z * z)


@triton.jit
def _tanh(u):
    """From one exponential, and near 0, where that cancels, from the series to u^9."""
    e = _exp(-2 * tl.abs(u))
    t = (1 - e) * _reciprocal(1 + e)
    s = u * u
    series = -0.05396825396825397 + s * 0.021869488536155203
    series = 1 + s * (-0.3333333333333333 + s * (0.13333333333333333 + s * series))
    return tl.where(tl.abs(u) < 0.25, u * series, tl.where(u < 0, -t, t))


@triton.jit
def _tanh_softplus(z):
    """(t, dt / dz), t = tanh(log(1 + e^z)) = n / (n + 2) with n = e^z (e^z + 2); above 20 it is 1 in fp32."""
    e = _exp(_at_most(z, 20.0))
    n = e * (e + 2)
    r = _reciprocal(n + 2)
    t = n * r
    return t, 2 * r * (1 + t) * (e * _reciprocal(1 + e))
