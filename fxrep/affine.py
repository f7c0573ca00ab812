"""`AffineConv`: what an operator *is*, and the algebra of such operators. No fx, no models, no numbers.

Dimension-generic: a Linear layer is the 0-dimensional convolution; 1-D, 2-D, 3-D and transposed ones share every line.
Padding and output sizes are kept per side and may be negative (a crop).
"""

from __future__ import annotations

from math import gcd, prod

import torch

from fxrep import kernel as K
from fxrep.equal import same_vector
from fxrep.errors import Illegal
from fxrep.frozen import frozen, replace
from fxrep.kernel import Kernel

Ints = tuple[int, ...]


@frozen(eq=False)
class AffineConv:
    """y = W ⊛ pad(x) + b on maps with `dims` spatial axes after the channel axis.

        outer ∘ inner   `compose`     k = k₁ + s₁d₂(k₂-1) on the undilated grid, s = s₁s₂, p = p₁ + s₁p₂
        A + B           `add`         one window of taps, one dilation, one grouping; weights and biases add
        γ·A             `scaled`      γ·W, γ·b
        A[rows]         `take`        rows of W and b, and the input columns they still read
        A               `regrouped`   the same operator with fewer groups (it adds zeros)

    Shapes: weight (O, I/g, *taps) for transposed operators too; bias (O,) or None, which is exactly zero.
    `pad_lo`, `pad_hi`: what is inserted before and after each spatial axis of the input (cropped from the output if
    `transposed`). `mode` says what is inserted; for "zeros" the per-channel value `fill`, None being zero.
    """

    weight: Kernel
    groups: int
    stride: Ints
    pad_lo: Ints
    pad_hi: Ints
    dilation: Ints
    bias: Kernel | None = None
    transposed: bool = False
    mode: str = "zeros"
    fill: Kernel | None = None

    def __post_init__(self) -> None:
        dims = len(self.weight.shape) - 2
        assert dims == len(self.stride) == len(self.pad_lo) == len(self.pad_hi) == len(self.dilation), self
        assert self.weight.shape[0] % self.groups == 0
        if self.transposed and self.is_one_tap and not self.moves:
            object.__setattr__(self, "transposed", False)  # the transpose of a pointwise operator is pointwise
        if self.fill is not None and not self.pads:
            object.__setattr__(self, "fill", None)  # nothing is inserted

    @property
    def dims(self) -> int:
        return len(self.weight.shape) - 2

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def taps(self) -> Ints:
        return self.weight.shape[2:]

    @property
    def span(self) -> Ints:
        """Distance between the first and the last tap, in input pixels."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.taps, strict=True))

    @property
    def is_one_tap(self) -> bool:
        return prod(self.taps) == 1

    @property
    def pads(self) -> bool:
        """Whether anything is inserted at the border, so that `mode` and `fill` matter."""
        return not self.transposed and max(self.pad_lo + self.pad_hi, default=0) > 0

    @property
    def moves(self) -> bool:
        """Whether the output's spatial grid differs from the input's, even with one tap."""
        return any(self.pad_lo) or any(self.pad_hi) or self.stride != (1,) * self.dims

    @property
    def is_pointwise(self) -> bool:
        return self.is_one_tap and not self.moves and not self.transposed

    @property
    def is_diagonal(self) -> bool:
        return self.is_pointwise and self.groups == self.in_channels == self.out_channels

    @property
    def copies(self) -> bool:
        """Whether each output is one entry of its own channel, as it is: a pad, a crop, a stride, the identity."""
        if not isinstance(self.weight, K.Dirac) or self.transposed:
            return False
        return self.groups == self.in_channels == self.out_channels and self.is_one_tap

    @property
    def averages(self) -> bool:
        """Whether every tap is one and the same constant: an average pool, which has no weights of its own."""
        return isinstance(self.weight, K.Constant)

    @property
    def is_average_pool(self) -> bool:
        """Whether it is a plain average, each channel for itself, as a pool of torch is."""
        if not isinstance(self.weight, K.Constant) or self.transposed or self.bias is not None:
            return False
        depthwise = self.groups == self.in_channels == self.out_channels
        plain = all(d == 1 for d in self.dilation) and self.pad_lo == self.pad_hi and self.fill is None
        within = self.mode == "zeros" and all(0 <= 2 * p <= k for p, k in zip(self.pad_lo, self.taps, strict=True))
        return depthwise and plain and within and abs(self.weight.value * prod(self.taps) - 1) < 1e-12

    @property
    def is_identity(self) -> bool:
        return self.copies and not self.moves and self.bias is None

    @property
    def net_pad(self) -> Ints:
        """pad_lo + pad_hi - d(k-1): two operators of equal stride give equal sizes exactly if this is equal."""
        return tuple(lo + hi - s for lo, hi, s in zip(self.pad_lo, self.pad_hi, self.span, strict=True))

    def describe(self) -> str:
        """Like `Conv2d(64, 64, k3x3 s1 p1)`, with what is not at its default."""
        if not self.dims:
            return f"Linear({self.in_channels}, {self.out_channels})"

        def text(values: Ints) -> str:
            return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))

        kind = f"Conv{'Transpose' if self.transposed else ''}{self.dims}d"
        parts = [f"k{'x'.join(map(str, self.taps))}", f"s{text(self.stride)}", f"p{text(self.pad_lo)}"]
        if self.pad_lo != self.pad_hi:
            parts[-1] += f"/{text(self.pad_hi)}"
        parts += [f"d{text(self.dilation)}"] if any(d != 1 for d in self.dilation) else []
        parts += [f"g{self.groups}"] if self.groups != 1 else []
        return f"{kind}({self.in_channels}, {self.out_channels}, {' '.join(parts)})"

    def without_bias(self) -> AffineConv:
        return self if self.bias is None else replace(self, bias=None)

    def scaled(self, gain: Kernel) -> AffineConv:
        """γ·A, for γ of shape (O,) or ()."""
        bias = None if self.bias is None else K.scale(self.bias, gain)
        return replace(self, weight=K.scale(self.weight, gain), bias=bias)

    def regrouped(self, groups: int) -> AffineConv:
        """The same operator with `groups` groups, a divisor of the present number."""
        if groups == self.groups:
            return self
        assert self.groups % groups == 0, (self.groups, groups)
        if isinstance(self.weight, K.Dirac):
            weight: Kernel = K.Dirac((self.out_channels, self.in_channels // groups, *self.taps))
        else:
            shape = (self.out_channels, self.in_channels // groups, *self.taps)
            weight = K.Regroup(shape, self.weight, self.groups, groups)
        return replace(self, weight=weight, groups=groups)

    def take(self, rows: Ints) -> tuple[AffineConv, Ints | None]:
        """The operator that gives only `rows`, and the input channels it still reads (None: all of them)."""
        if rows == tuple(range(self.out_channels)):
            return self, None
        groups = _groups_of(rows, self.out_channels // self.groups)
        if self.groups == 1 or groups is None:
            dense = self.regrouped(1)
            return replace(dense, weight=K.take(dense.weight, rows), bias=_take(dense.bias, rows)), None
        width = self.in_channels // self.groups
        columns = tuple(c for g in groups for c in range(g * width, (g + 1) * width))
        weight = K.Dirac((len(rows), *self.weight.shape[1:])) if self.copies else K.take(self.weight, rows)
        taken = replace(
            self, weight=weight, bias=_take(self.bias, rows), groups=len(groups), fill=_take(self.fill, columns)
        )
        return taken, columns

    def columns(self, start: int, stop: int) -> AffineConv:
        """The part of an operator that reads the input channels [start, stop), ungrouped and without its bias."""
        dense = self.regrouped(1).without_bias()
        weight = K.TakeColumns((self.out_channels, stop - start, *self.taps), dense.weight, start, stop)
        return replace(dense, weight=weight, fill=_take(self.fill, tuple(range(start, stop))))

    def widened(self, index: Ints, channels: int) -> AffineConv:
        """The same operator on an input of `channels` channels of which it reads those at `index`."""
        if self.fill is not None:
            raise Illegal("pad-value", "the padding value of the channels that it does not read is not known")
        dense = self.regrouped(1)
        shape = (self.out_channels, channels, *self.taps)
        return replace(dense, weight=K.PlaceColumns(shape, dense.weight, index))

    def outside(self) -> Kernel | None:
        """What a one-tap operator gives beyond its input: its own padding value through the tap, plus its bias."""
        through = (
            None
            if self.fill is None or not self.pads
            else K.Contract((self.out_channels,), self.weight, self.fill, self.groups)
        )
        return K.total(through, self.bias)


def identity(channels: int, dims: int) -> AffineConv:
    """The operator that changes nothing, depthwise with one tap."""
    ones, zeros = (1,) * dims, (0,) * dims
    return AffineConv(K.Dirac((channels, 1, *ones)), channels, ones, zeros, zeros, ones)


def diagonal(gain: Kernel, channels: int, dims: int) -> AffineConv:
    """x ↦ diag(γ)·x, for γ of shape (C,) or ()."""
    return identity(channels, dims).scaled(gain)


def diagonal_of(operator: AffineConv) -> Kernel:
    """The vector γ (or the scalar) of an operator that is diagonal."""
    weight = operator.weight
    if isinstance(weight, K.ScaleRows) and isinstance(weight.weight, K.Dirac):
        return weight.gain
    return K.Map((operator.out_channels,), _flat, (weight,))


def _flat(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten()


def add(a: AffineConv, b: AffineConv) -> AffineConv:
    """A + B as one convolution of the same input (DBB transform II, and ACNet's enlarged kernels).

    Raises Illegal unless strides and net padding agree, and the paddings insert the same.
    """
    if (a.in_channels, a.out_channels) != (b.in_channels, b.out_channels):
        raise Illegal("broadcast", f"{a.describe()} is added to {b.describe()}")
    _check_alignable(a, b)
    groups = gcd(a.groups, b.groups)
    padding, window = _padding_of(a, b), _common_window(a, b)
    a, b = (_on_window(x.regrouped(groups), *window) for x in (a, b))
    weight = K.Sum(a.weight.shape, (a.weight, b.weight))
    return replace(a, weight=weight, bias=K.total(a.bias, b.bias), mode=padding.mode, fill=padding.fill)


def stack(a: AffineConv, b: AffineConv, same_input: bool) -> AffineConv:
    """Both outputs, one after the other, without biases: more rows on the same input, or more groups side by side."""
    _check_alignable(a, b)
    if same_input and a.in_channels != b.in_channels:
        raise Illegal("broadcast", f"{a.describe()} is stacked on {b.describe()}")
    if same_input:
        a, b = a.regrouped(1), b.regrouped(1)
    elif (a.weight.shape[1], a.out_channels * b.groups) != (b.weight.shape[1], b.out_channels * a.groups):
        raise Illegal("broadcast", f"{a.describe()} has other groups than {b.describe()}")
    groups = 1 if same_input else a.groups + b.groups
    padding, window = _padding_of(a, b), _common_window(a, b)
    a, b = (_on_window(x, *window) for x in (a, b))
    fill = padding.fill
    if fill is not None and not same_input:
        fill = K.stack([K.spread(fill, x.in_channels) for x in (a, b)])
    weight = K.stack([a.weight, b.weight])
    return replace(a, weight=weight, groups=groups, bias=None, mode=padding.mode, fill=fill)


def _padding_of(a: AffineConv, b: AffineConv) -> AffineConv:
    """Whose padding holds for both: one that pads nothing reads none of what the other inserts."""
    return b if b.pads and not a.pads else a


def _common_window(a: AffineConv, b: AffineConv) -> tuple[Ints, Ints, Ints, Ints]:
    """Pads, dilation and taps of the window that holds both a's and b's."""
    lo = tuple(max(p, q) for p, q in zip(a.pad_lo, b.pad_lo, strict=True))
    hi = tuple(max(p, q) for p, q in zip(a.pad_hi, b.pad_hi, strict=True))
    grid = _common_grid(a, b, lo)
    taps = tuple((low + high - net) // g + 1 for low, high, net, g in zip(lo, hi, a.net_pad, grid, strict=True))
    return lo, hi, grid, taps


def _on_window(x: AffineConv, lo: Ints, hi: Ints, grid: Ints, taps: Ints) -> AffineConv:
    """x on a window of taps that holds its own."""
    if (x.pad_lo, x.pad_hi, x.dilation, x.taps) == (lo, hi, grid, taps):
        return x
    return replace(x, weight=_placed(x, lo, grid, taps), pad_lo=lo, pad_hi=hi, dilation=grid)


def _common_grid(a: AffineConv, b: AffineConv, lo: Ints) -> Ints:
    """The coarsest dilation on which the taps of both operators lie."""
    steps = []
    for axis in range(a.dims):
        distances = [lo[axis] - x.pad_lo[axis] for x in (a, b)]
        distances += [x.dilation[axis] for x in (a, b) if x.taps[axis] > 1]
        steps.append(gcd(*distances) or 1)
    return tuple(steps)


def _placed(operator: AffineConv, lo: Ints, grid: Ints, taps: Ints) -> Kernel:
    if taps == operator.taps:
        return operator.weight
    offset = tuple((low - p) // g for low, p, g in zip(lo, operator.pad_lo, grid, strict=True))
    step = tuple(max(d // g, 1) for d, g in zip(operator.dilation, grid, strict=True))
    return K.Place((*operator.weight.shape[:2], *taps), operator.weight, offset, step)


def _check_alignable(a: AffineConv, b: AffineConv) -> None:
    if a.dims != b.dims:
        raise Illegal("layout", f"a {a.dims}-D operator is added to a {b.dims}-D one")
    if a.transposed != b.transposed:
        raise Illegal("transposed", "a transposed convolution is added to a plain one")
    if a.stride != b.stride:
        raise Illegal("stride", f"strides {a.stride} and {b.stride} are added")
    if a.net_pad != b.net_pad:
        raise Illegal("net-pad", f"{a.describe()} and {b.describe()} differ in pad_lo + pad_hi - d(k-1)")
    if a.pads and b.pads and a.mode != b.mode:
        raise Illegal("padding-mode", f"{a.mode} padding is added to {b.mode} padding")
    if a.pads and b.pads and not same_vector(a.fill, b.fill, a.in_channels):
        raise Illegal("pad-value", "the branches pad with different values")


def _groups_of(rows: Ints, per_group: int) -> Ints | None:
    """The groups that `rows` run through, if they come in equal runs of one group each."""
    runs: list[list[int]] = []
    for row in rows:
        group = row // per_group
        if not runs or runs[-1][0] != group or len(runs[-1]) == per_group:
            runs.append([])
        runs[-1].append(group)
    if not all(len(run) == per_group for run in runs):
        return None
    return tuple(run[0] for run in runs)


def _take(vector: Kernel | None, index: Ints) -> Kernel | None:
    return None if vector is None or not vector.shape else K.take(vector, index)
