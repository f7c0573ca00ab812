"""Ops of random programs that are layers: convolutions, linear layers, batch norms, pools, pads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from fxrep.testing.writer import MOST_CHANNELS, At, Layer, Sizes, Value, op, possible

#: Indexed by the same choice in every op that strides, so that branches can agree on one.
STRIDES = (1, 1, 1, 2)
MIRRORS = ("reflect", "replicate", "circular")
PAD_LAYERS = {
    "zeros": "Zero", "value": "Constant", "reflect": "Reflection", "replicate": "Replication", "circular": "Circular",
}  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """How a convolution meets its input; pads per side."""

    taps: tuple[int, ...]
    stride: int
    dilation: int
    lo: tuple[int, ...]
    hi: tuple[int, ...]

    def resize(self, sizes: Sizes) -> Sizes:
        spans = [self.dilation * (k - 1) + 1 for k in self.taps]
        return tuple(
            tuple((n + lo + hi - span) // self.stride + 1 for n in axis)
            for axis, lo, hi, span in zip(sizes, self.lo, self.hi, spans, strict=True)
        )

    @property
    def padding(self) -> str | None:
        """As torch's layers write it, or None where they cannot."""
        if self.lo == self.hi:
            return repr(self.lo) if len(set(self.lo)) > 1 else repr(self.lo[0])
        halves = tuple(self.dilation * (k - 1) // 2 for k in self.taps)
        rests = tuple(self.dilation * (k - 1) - half for k, half in zip(self.taps, halves, strict=True))
        return "'same'" if (self.stride, self.lo, self.hi) == (1, halves, rests) else None

    def padded(self, x: str, mode: str) -> str:
        """`x` with its pads made explicit."""
        return f"F.pad({x}, {pads(self.lo, self.hi)}" + (")" if mode == "zeros" else f", mode={mode!r})")


def pads(lo: Sequence[int], hi: Sequence[int]) -> list[int]:
    """In the order of F.pad, the last axis first."""
    return [p for pair in zip(reversed(lo), reversed(hi), strict=True) for p in pair]


@dataclass(frozen=True)
class Convolution:
    """A convolution layer to be written."""

    name: str
    channels: int
    outputs: int
    geometry: Geometry
    groups: int
    bias: bool
    mode: str

    def constructor(self) -> str:
        g = self.geometry
        taps = g.taps[0] if len(set(g.taps)) == 1 else g.taps
        inside = any(g.lo + g.hi) and g.padding is not None
        named = {
            "stride": (g.stride, g.stride != 1),
            "padding": (g.padding, inside),
            "padding_mode": (repr(self.mode), inside and self.mode != "zeros"),
            "dilation": (g.dilation, g.dilation != 1),
            "groups": (self.groups, self.groups != 1),
            "bias": (self.bias, not self.bias),
        }
        options = "".join(f", {key}={value}" for key, (value, told) in named.items() if told)
        return f"nn.Conv{len(g.taps)}d({self.channels}, {self.outputs}, {taps}{options})"

    def call(self) -> str:
        x = "{}" if self.geometry.padding is not None else self.geometry.padded("{}", self.mode)
        return f"{self.name}({x})"

    def functional_call(self, computed: bool) -> str:
        """With the weights as they are, or `computed` from them in the forward, as weight standardisation does."""
        g, weight = self.geometry, f"{self.name}.weight"
        explicit = any(g.lo + g.hi) and (self.mode != "zeros" or g.padding is None)
        x, padding = (g.padded("{}", self.mode), "0") if explicit else ("{}", g.padding)
        if computed:
            weight = f"({weight} - {weight}.mean({tuple(range(1, len(g.taps) + 2))}, keepdim=True)) * 0.5"
        arguments = x, weight, f"{self.name}.bias", g.stride, padding, g.dilation, self.groups
        return f"F.conv{len(g.taps)}d({', '.join(map(str, arguments))})"


@op
def conv(at: At) -> Value:
    """A convolution; a linear layer where the channels come last."""
    x = at.x
    size, bias, stride = at.pick(1, 3, 3, 5, 2, 4), at.pick(False, True), at.pick(*STRIDES)
    outputs = at.pick(x.channels, x.channels, x.channels, 2 * x.channels, max(x.channels // 2, 1), 1, 6)
    outputs = min(outputs, MOST_CHANNELS)
    padding = at.pick("same", "same", "same", "none", "one", "before", "after")
    if x.layout != "map":
        return linear(at, outputs, bias)
    groups = _groups(x, outputs, at.pick(1, 1, 1, x.channels, 2, 4))
    spelling, tied = at.pick("module", "module", "functional", "computed"), at.pick(False, False, False, True)
    dilation = at.pick(1, 1, 1, 2)
    taps = _taps(size, at.pick("all", "all", "first", "last"), x.dims)
    geometry = _geometry(x, taps, stride, dilation, padding)
    mode = at.pick("zeros", "zeros", "zeros", "zeros", *MIRRORS)
    if mode != "zeros" and not _can_mirror(x, geometry.lo + geometry.hi):
        mode = "zeros"
    layer = Convolution(at.writer.fresh("self.conv"), x.channels, outputs, geometry, groups, bias, mode)
    at.writer.build.append(f"{layer.name} = {layer.constructor()}")
    if tied:
        _tie(at, layer)
    plain = spelling == "module" and not at.functional
    call = layer.call() if plain else layer.functional_call(spelling == "computed")
    mirrors = 0 if mode == "zeros" else max(geometry.lo + geometry.hi)
    return _apply(at, x, Layer(call, "map", x.channels, outputs, geometry.resize, mirrors))


def _groups(x: Value, outputs: int, wanted: int) -> int:
    return wanted if x.channels % wanted == outputs % wanted == 0 else 1


def _taps(size: int, shape: str, dims: int) -> tuple[int, ...]:
    """Square, or a strip along one axis."""
    ones = (1,) * (dims - 1)
    return {"all": (size,) * dims, "first": (size, *ones), "last": (*ones, size)}[shape]


def _geometry(x: Value, taps: tuple[int, ...], stride: int, dilation: int, padding: str) -> Geometry:
    """The wanted geometry, or that of a pointwise convolution where the smallest input would leave nothing."""
    totals = tuple(dilation * (k - 1) for k in taps)
    zeros, ones = (0,) * len(taps), (1,) * len(taps)
    halves = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    lo, hi = {
        "same": halves,
        "none": (zeros, zeros),
        "one": (ones, ones),
        "before": (totals, zeros),
        "after": (zeros, totals),
    }[padding]
    wanted = Geometry(taps, stride, dilation, lo, hi)
    return wanted if possible(wanted.resize(x.sizes)) else Geometry(ones, 1, 1, zeros, zeros)


def _can_mirror(x: Value, pads: Sequence[int]) -> bool:
    """Whether the map is always larger than its pads."""
    return min(pads) >= 0 and max(pads) < min(n for axis in x.sizes for n in axis)


def _tie(at: At, layer: Convolution) -> None:
    """Lets the layer share the weight of an earlier one of the same shape."""
    key = (layer.outputs, layer.channels // layer.groups, layer.geometry.taps)
    earlier = at.writer.weights.setdefault(key, layer.name)
    if earlier != layer.name:
        at.writer.build.append(f"{layer.name}.weight = {earlier}.weight")


def _apply(at: At, x: Value, layer: Layer) -> Value:
    """Calls a layer that may be called again."""
    at.writer.layers.append(layer)
    return _call(at, x, layer)


def _call(at: At, x: Value, layer: Layer) -> Value:
    return at.writer.let(layer.call.format(x.name), x, channels=layer.outputs, sizes=layer.resize(x.sizes))


def linear(at: At, outputs: int, bias: bool) -> Value:
    x, functional = at.x, at.functional | at.pick(False, False, True)
    name = at.writer.layer("linear", f"nn.Linear({x.channels}, {outputs}{'' if bias else ', bias=False'})")
    call = f"F.linear({{}}, {name}.weight, {name}.bias)" if functional else f"{name}({{}})"
    return _apply(at, x, Layer(call, x.layout, x.channels, outputs, _unchanged))


def _unchanged(sizes: Sizes) -> Sizes:
    return sizes


@op
def deconv(at: At) -> Value:
    """A transposed convolution."""
    x = at.x
    if x.layout != "map":
        return conv(at)
    size, bias, stride = at.pick(2, 3, 4, 1), at.pick(False, True), at.pick(2, 1, 3)
    outputs = min(at.pick(x.channels, x.channels, 2 * x.channels, 3), MOST_CHANNELS)
    groups = _groups(x, outputs, at.pick(1, 1, 2, x.channels))
    pad, extra = at.pick(0, 1), min(at.pick(0, 1), stride - 1)
    functional = at.functional | at.pick(False, False, True)

    def resize(sizes: Sizes) -> Sizes:
        return tuple(tuple((n - 1) * stride - 2 * pad + size + extra for n in axis) for axis in sizes)

    if not possible(resize(x.sizes)):
        return x
    options = f"stride={stride}, padding={pad}, output_padding={extra}, groups={groups}"
    constructor = f"nn.ConvTranspose{x.dims}d({x.channels}, {outputs}, {size}, {options}, bias={bias})"
    name = at.writer.layer("deconv", constructor)
    call = f"F.conv_transpose{x.dims}d({{}}, {name}.weight, {name}.bias, {options})" if functional else f"{name}({{}})"
    return _apply(at, x, Layer(call, "map", x.channels, outputs, resize))


@op
def bn(at: At) -> Value:
    """Batch normalisation, on maps, rows, or tokens turned into either."""
    x, functional = at.x, at.functional | at.pick(False, False, True)
    options = at.pick("", "", "", ", affine=False", ", eps=1e-3", ", track_running_stats=False")
    tracks = "track" not in options or prod(min(axis) for axis in x.sizes) == 1  # a single number has no variance
    options = options if tracks == ("track" not in options) else ""
    name = at.writer.layer("bn", f"nn.BatchNorm{x.dims if x.layout == 'map' else 1}d({x.channels}{options})")
    call = f"{name}({{}})"
    if functional:
        tensors = ", ".join(f"{name}.{t}" for t in ("running_mean", "running_var", "weight", "bias"))
        call = f"F.batch_norm({{}}, {tensors}, {not tracks}, 0.1, {name}.eps)"
    if x.layout == "tokens" and at.pick(False, True):
        call = call.format("{}.transpose(1, 2)") + ".transpose(1, 2)"
    elif x.layout in ("tokens", "last"):
        call = call.format("{0}.flatten(0, -2)") + ".reshape_as({0})"
    layer = Layer(call, x.layout, x.channels, x.channels, _unchanged)
    return _apply(at, x, layer) if tracks else _call(at, x, layer)


@op
def reuse(at: At) -> Value:
    """A layer called once more, if one fits."""
    x, index = at.x, at.pick(*range(8))
    fitting = [m for m in at.writer.layers if m.takes(x)]
    return _call(at, x, fitting[index % len(fitting)]) if fitting else x


@op
def pool(at: At) -> Value:
    """An average or maximum over windows."""
    x = at.x
    if x.layout != "map":
        return x
    size, kind, stride = at.pick(3, 2), at.pick("avg", "avg", "avg", "max"), at.pick(*STRIDES)
    pad = at.pick(size // 2, size // 2, 0)
    extra = at.pick("", "", "", "count_include_pad=False", "ceil_mode=True", "divisor_override=5")
    functional = at.functional | at.pick(False, True)
    if (kind == "max" and extra != "ceil_mode=True") or (extra.startswith("divisor") and x.dims == 1):
        extra = ""

    def resize(sizes: Sizes) -> Sizes:
        return tuple(tuple(_pooled(n, size, stride, pad, "ceil" in extra) for n in axis) for axis in sizes)

    if not possible(resize(x.sizes)):
        return x
    options = f"{size}, stride={stride}, padding={pad}" + (f", {extra}" if extra else "")
    if functional:
        call = f"F.{kind}_pool{x.dims}d({{}}, {options})"
    else:
        call = at.writer.layer("pool", f"nn.{kind.title()}Pool{x.dims}d({options})") + "({})"
    return _apply(at, x, Layer(call, "map", x.channels, x.channels, resize))


def _pooled(n: int, size: int, stride: int, pad: int, ceil: bool) -> int:
    if n < size:  # torch refuses such maps, whatever the padding
        return 0
    steps, rest = divmod(n + 2 * pad - size, stride)
    if ceil and rest and (steps + 1) * stride < n + pad:  # a window may not begin in the padding after the map
        steps += 1
    return steps + 1


@op
def pad(at: At) -> Value:
    """Explicit padding, or a crop."""
    x = at.x
    if x.layout != "map":
        return x
    lo, hi = at.pick(1, 1, 0, 2, -1), at.pick(1, 1, 2, 0, -1)
    mode = at.pick("zeros", "zeros", "value", *MIRRORS, "crop")
    functional = at.functional | at.pick(False, True)
    if mode in MIRRORS and not _can_mirror(x, (lo, hi)):
        mode = "zeros"
    lo, hi = (-1, -1) if mode == "crop" else (lo, hi)
    sizes = tuple(tuple(n + lo + hi for n in axis) for axis in x.sizes)
    if not possible(sizes):
        return x
    if mode == "crop":
        return at.writer.let(f"{x.name}[:, :{', 1:-1' * x.dims}]", x, sizes=sizes, view=True)
    amounts = (lo, hi) * x.dims
    if functional:
        text = {"zeros": "", "value": ", value=0.75"}.get(mode, f", mode={mode!r}")
        return at.writer.let(f"F.pad({x.name}, {amounts}{text})", x, sizes=sizes)
    name = at.writer.layer("pad", f"nn.{PAD_LAYERS[mode]}Pad{x.dims}d({amounts}{', 0.75' if mode == 'value' else ''})")
    return at.writer.let(f"{name}({x.name})", x, sizes=sizes)
