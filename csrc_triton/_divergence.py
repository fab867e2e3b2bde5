"""Divergences of two distributions, number by number, as kernels share them."""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))


@triton.jit
def is_kept(labels, row, ignore_index, has_labels):
    """Whether the row counts: all do where there are no labels."""
    return tl.load(labels + row, mask=has_labels != 0, other=ignore_index - 1) != ignore_index


@triton.jit
def jsd_terms(x, y, beta, rest):
    """(q, p, b · q · log(q / m), a · p · log(p / m)) of x = log q and y = log p, with m = beta · p + rest · q.

    rest is 1 - beta, of which fp32 would lose digits here. a is beta and b rest; but with beta 0, where the divergence is
    KL(p || q), a is 1 and m q, and with rest 0, where it is KL(q || p), b is 1 and m p.
    """
    # All of e^y and e^x is e^max and e^-|y - x|: no difference of large numbers, and two exponentials.
    top = tl.maximum(x, y)
    less = tl.where(top == -INF, 0.0, y - x)
    e, most = tl.exp(-tl.abs(less)), tl.exp(top)
    q, p = tl.where(x < y, most * e, most), tl.where(y < x, most * e, most)
    log_m = tl.log(tl.where(x < y, beta + rest * e, beta * e + rest))
    q_log = tl.where(rest == 0.0, -less, tl.minimum(-less, 0.0) - log_m)
    p_log = tl.where(beta == 0.0, less, tl.minimum(less, 0.0) - log_m)
    a = tl.where(beta == 0.0, 1.0, tl.where(rest == 0.0, 0.0, beta))
    b = tl.where(rest == 0.0, 1.0, tl.where(beta == 0.0, 0.0, rest))
    # What has probability 0 counts for nothing, whatever its logarithm.
    return q, p, tl.where(q == 0.0, 0.0, b * (q * q_log)), tl.where(p == 0.0, 0.0, a * (p * p_log))


@triton.jit
def jsd_slope(q, p, q_term, beta, rest):
    """The derivative by log q."""
    return q_term + tl.where(rest == 0.0, q, 0.0) - tl.where(beta == 0.0, p, 0.0)


@triton.jit
def divergence(x, y, beta, rest, eps, KIND: tl.constexpr):
    """kl: y · (log max(y, eps) - x);  jsd: that of x = log q and y = log p;  tvd: half the distance of x and y."""
    if KIND == "kl":
        d = tl.where(y == 0.0, 0.0, y * (tl.log(tl.maximum(y, eps)) - x))
    elif KIND == "jsd":
        _, _, q_term, p_term = jsd_terms(x, y, beta, rest)
        d = q_term + p_term
    else:
        d = 0.5 * tl.abs(x - y)
    return d


@triton.jit
def slope(x, y, beta, rest, eps, KIND: tl.constexpr):
    """The derivative by x; kl_target is that of kl by y. jsd and tvd are symmetric, if beta and rest change places too."""
    if KIND == "kl":
        d = -y
    elif KIND == "kl_target":
        d = tl.log(tl.maximum(y, eps)) - x + tl.where(y > eps, 1.0, 0.0)
    elif KIND == "jsd":
        q, p, q_term, _ = jsd_terms(x, y, beta, rest)
        d = jsd_slope(q, p, q_term, beta, rest)
    else:
        less = x - y
        d = tl.where(less > 0.0, 0.5, tl.where(less < 0.0, -0.5, less))
    return d
