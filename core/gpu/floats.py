"""What the kernels compute with beside Triton's own functions, in float32 and with one hardware exponential each."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x):
    """e^x."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1 / (1 + exponential(-x))


@triton.jit
def silu(x):
    """The sigmoid of x, times x."""
    return x / (1 + exponential(-x))


@triton.jit
def softplus(x):
    """log(1 + e^x), as max(x, 0) + log1p(e^-|x|).

    A small step size keeps all its digits: log1p(e) is 2 atanh(s) with s = e / (2 + e), a series in s^2 <= 1/9, where
    the logarithm of 1 + e would have lost those of e.
    """
    e = exponential(-tl.abs(x))
    s = e / (2 + e)
    square = s * s
    series = square * (1 / 15) + 1 / 13
    series = square * series + 1 / 11
    series = square * series + 1 / 9
    series = square * series + 1 / 7
    series = square * series + 1 / 5
    series = square * series + 1 / 3
    series = square * series + 1
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit
def decay_and_gain(exponent):
    """Both a = 2^exponent and sqrt(1 - a^2), for exponents of at most 0.

    From q = a - 1: near 1 a series gives q all its digits, and 1 - a^2 = -q (2 + q) cancels nothing.
    """
    z = exponent * _LN_2
    series = z * (1 / 362880) + 1 / 40320
    series = z * series + 1 / 5040
    series = z * series + 1 / 720
    series = z * series + 1 / 120
    series = z * series + 1 / 24
    series = z * series + 1 / 6
    series = z * series + 1 / 2
    series = z * series + 1
    q = tl.where(z > -0.5, z * series, tl.exp2(exponent) - 1)
    return 1 + q, tl.sqrt(-q * (2 + q))


@triton.jit
def compose(decay, drive, later_decay, later_drive):
    """Two steps h -> decay h + drive after another, as one."""
    return decay * later_decay, later_decay * drive + later_drive
