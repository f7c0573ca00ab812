"""outer ∘ inner as one operator, and where that is not one: the traps of padding."""

from __future__ import annotations

from math import gcd

from fxrep import kernel as K
from fxrep.affine import AffineConv, diagonal_of
from fxrep.equal import same_vector
from fxrep.errors import Illegal
from fxrep.evaluation import evaluate
from fxrep.frozen import replace
from fxrep.kernel import Kernel


def compose(outer: AffineConv, inner: AffineConv) -> AffineConv:
    """outer ∘ inner as one convolution.

    W[o,i,u] = Σ_{c, d₁t₁ + s₁d₂t₂ = u} W₂[o,c,t₂]·W₁[c,i,t₁];   b = b₂ + Σ_{c,t} W₂[o,c,t]·b₁[c]
    Shapes: W₁ (C, I/g₁, K₁), W₂ (O, C/g₂, K₂) -> (O, I/gcd(g₁,g₂), K₁ + s₁(K₂-1)) on the undilated grid.
    (Ding et al., "Diverse Branch Block", arXiv 2103.13425, transforms I and III, for any geometry.)
    Raises Illegal where `outer` pads over a map that is not, outside `inner`'s output, what it pads with.
    """
    if inner.is_identity and inner.bias is None:
        return outer
    check_geometry(outer, inner)
    check_outside(outer, inner.outside())
    bias = K.total(outer.bias, bias_through(outer, inner.bias))
    return replace(compose_weights(outer, inner), bias=bias)


def bias_through(outer: AffineConv, bias: Kernel | None) -> Kernel | None:
    """What `outer`, without its own bias, makes of a constant map: Σ_{c,t} W₂[o,c,t]·b[c]."""
    if bias is None:
        return None
    vector = K.spread(bias, outer.in_channels)
    if outer.is_identity:
        return vector
    return K.Contract((outer.out_channels,), outer.weight, vector, outer.groups)


def compose_weights(outer: AffineConv, inner: AffineConv) -> AffineConv:
    """outer ∘ inner without biases; the caller has checked that it is legal."""
    if outer.is_identity:
        return inner.without_bias()
    if inner.is_identity:
        return replace(outer, bias=None, fill=None)  # a legal fill was the bias before it, which is accounted for
    geometry = outer if outer.transposed else inner
    return AffineConv(
        weight=_composed_kernel(outer, inner),
        groups=gcd(outer.groups, inner.groups),
        stride=tuple(a * b for a, b in zip(inner.stride, outer.stride, strict=True)),
        pad_lo=tuple(p + s * q for p, s, q in zip(inner.pad_lo, inner.stride, outer.pad_lo, strict=True)),
        pad_hi=tuple(p + s * q for p, s, q in zip(inner.pad_hi, inner.stride, outer.pad_hi, strict=True)),
        dilation=tuple(g for g, *_ in _grids(outer, inner)),
        transposed=geometry.transposed,
        mode=outer.mode if outer.pads else inner.mode,
        fill=inner.fill,
    )


def _composed_kernel(outer: AffineConv, inner: AffineConv) -> Kernel:
    if outer.copies or inner.copies:
        return inner.weight if outer.copies else outer.weight
    if outer.is_diagonal:
        return K.ScaleRows(inner.weight.shape, inner.weight, diagonal_of(outer))
    if inner.is_diagonal:
        gain = K.spread(diagonal_of(inner), inner.out_channels)
        return K.ScaleColumns(outer.weight.shape, outer.weight, gain, outer.groups)
    groups = gcd(outer.groups, inner.groups)
    grids = _grids(outer, inner)
    taps = tuple(
        s1 * (k1 - 1) + s2 * (k2 - 1) + 1 for (_, s2, s1), k2, k1 in zip(grids, outer.taps, inner.taps, strict=True)
    )
    shape = (outer.out_channels, inner.in_channels // groups, *taps)
    w2, w1 = outer.regrouped(groups).weight, inner.regrouped(groups).weight
    return K.Compose(shape, w2, w1, groups, tuple(g[1] for g in grids), tuple(g[2] for g in grids))


def _grids(outer: AffineConv, inner: AffineConv) -> list[tuple[int, int, int]]:
    """Per axis: the dilation of the result, and the steps of the outer's and the inner's taps on that grid."""
    grids = []
    for k2, d2, k1, d1, s1 in zip(outer.taps, outer.dilation, inner.taps, inner.dilation, inner.stride, strict=True):
        step2 = d2 if outer.transposed or inner.transposed else s1 * d2
        grid = gcd(step2 if k2 > 1 else 0, d1 if k1 > 1 else 0) or 1
        grids.append((grid, step2 // grid if k2 > 1 else 1, d1 // grid if k1 > 1 else 1))
    return grids


def check_geometry(outer: AffineConv, inner: AffineConv) -> None:
    """Raises Illegal where outer ∘ inner is no convolution whatever the biases are."""
    if outer.dims != inner.dims:
        raise Illegal("layout", f"a {outer.dims}-D operator meets a {inner.dims}-D one")
    if outer.in_channels != inner.out_channels:
        raise Illegal("broadcast", f"{inner.out_channels} channels meet an operator that reads {outer.in_channels}")
    if (outer.transposed and not inner.is_pointwise) or (inner.transposed and not outer.is_pointwise):
        raise Illegal("transposed", "a transposed convolution composes only with pointwise operators")
    if outer.pads and outer.mode != "zeros":
        _check_reflection(outer, inner)
        return
    if outer.pads and inner.pads and inner.mode != "zeros":
        raise Illegal("padding-mode", f"zero padding over {inner.mode} padding")
    if inner.pads and inner.mode == "circular" and any(p < 0 for p in outer.pad_lo + outer.pad_hi):
        raise Illegal("padding-mode", "circular padding wraps around before the crop that follows it")
    for axis in range(outer.dims):
        _check_padded_axis(outer, inner, axis)


def _check_reflection(outer: AffineConv, inner: AffineConv) -> None:
    """Reflection, replication and wrapping commute with an operator that moves nothing along the padded axes."""
    if inner.pads and inner.mode != outer.mode:
        raise Illegal("padding-mode", f"{outer.mode} padding over {inner.mode} padding")
    for axis in range(outer.dims):
        still = inner.taps[axis] == inner.stride[axis] == 1 and not inner.pad_lo[axis] and not inner.pad_hi[axis]
        if max(outer.pad_lo[axis], outer.pad_hi[axis]) > 0 and not still:
            raise Illegal(
                "padding-mode", f"{outer.mode} padding does not commute with the {inner.describe()} before it"
            )


def _check_padded_axis(outer: AffineConv, inner: AffineConv, axis: int) -> None:
    lo, hi = outer.pad_lo[axis], outer.pad_hi[axis]
    if outer.transposed or max(lo, hi) <= 0:
        return
    cropped = (lo > 0 and inner.pad_lo[axis] < 0) or (hi > 0 and inner.pad_hi[axis] < 0)
    if inner.taps[axis] > 1 or cropped:
        raise Illegal(
            "pads-over-taps",
            f"padding={max(lo, hi)} inserts a constant where {inner.describe()} has taps inside its input",
        )


def check_outside(outer: AffineConv, outside: Kernel | None) -> None:
    """Raises Illegal unless `outer` pads with just what lies beyond its input (None: zero), or does not pad."""
    if outer.transposed and outside is not None:
        raise Illegal(
            "pads-over-bias", "a transposed convolution sums a varying number of copies of the bias before it"
        )
    if not outer.pads or outer.mode != "zeros" or same_vector(outer.fill, outside, outer.in_channels):
        return
    bound = 0.0 if outside is None else float(evaluate(outside).abs().max())
    raise Illegal(
        "pads-over-bias",
        f"padding={max(outer.pad_lo + outer.pad_hi)} inserts {'0' if outer.fill is None else 'its own value'} "
        f"where the map before it is up to {bound:.2g}, so the border would differ",
    )
