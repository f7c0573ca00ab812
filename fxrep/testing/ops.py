"""The vocabulary of random programs: one function per op, which writes a spelling of it that fits its operand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from fxrep.testing.writer import MOST_CHANNELS, At, Layer, Sizes, Value, op, possible

STRIDES = (1, 1, 1, 2)


@dataclass(frozen=True)
class Geometry:
    """How a convolution meets its input; pads per side."""

    taps: tuple[int, ...]
    stride: int = 1
    dilation: int = 1
    lo: tuple[int, ...] = ()
    hi: tuple[int, ...] = ()

    def resize(self, sizes: Sizes) -> Sizes:
        spans = [self.dilation * (k - 1) + 1 for k in self.taps]
        return tuple(
            tuple((n + lo + hi - span) // self.stride + 1 for n in axis)
            for axis, lo, hi, span in zip(sizes, self.lo, self.hi, spans, strict=True)
        )

    @property
    def is_symmetric(self) -> bool:
        return self.lo == self.hi

    @property
    def is_same(self) -> bool:
        """Whether it is what `padding="same"` means."""
        totals = [self.dilation * (k - 1) for k in self.taps]
        return (
            self.stride == 1
            and self.lo == tuple(t // 2 for t in totals)
            and self.hi == tuple(t - t // 2 for t in totals)
        )


def pads(lo: Sequence[int], hi: Sequence[int]) -> list[int]:
    """In the order of F.pad, the last axis first."""
    return [p for pair in zip(reversed(lo), reversed(hi), strict=True) for p in pair]


@op
def conv(at: At) -> Value:
    """A convolution; a linear layer where the channels come last."""
    x = at.x
    size, bias, stride = at.pick(1, 3, 3, 5, 2, 4), at.pick(False, True), at.pick(*STRIDES)
    outputs = at.pick(x.channels, x.channels, x.channels, 2 * x.channels, max(x.channels // 2, 1), 1, 6)
    outputs = min(outputs, MOST_CHANNELS)
    if x.layout != "map":
        return linear(at, outputs, bias)
    padding = at.pick("same", "same", "same", "none", "one", "before", "after")
    groups = at.pick(1, 1, 1, x.channels, 2, 4)
    groups = groups if x.channels % groups == outputs % groups == 0 else 1
    spelling = at.pick("module", "module", "functional", "computed")
    dilation = at.pick(1, 1, 1, 2)
    geometry = geometry_of(x, _taps(size, at.pick("all", "all", "first", "last"), x.dims), stride, dilation, padding)
    mode = at.pick("zeros", "zeros", "zeros", "zeros", "reflect", "replicate", "circular")
    if mode != "zeros" and not can_mirror(x, geometry):
        mode = "zeros"
    tie = at.pick(False, False, True)
    name = at.writer.layer("conv", _constructor(x, outputs, geometry, groups, bias, mode))
    key = (outputs, x.channels // groups, geometry.taps)
    if tie and key in at.writer.weights:
        at.writer.build.append(f"{name}.weight = {at.writer.weights[key]}.weight")
    at.writer.weights.setdefault(key, name)
    call = _module_call(name, geometry, mode)
    if at.functional or spelling != "module":
        call = _functional_call(name, geometry, groups, mode, spelling == "computed")
    return _apply(at, x, Layer(call, "map", x.channels, outputs, geometry.resize))


def _taps(size: int, shape: str, dims: int) -> tuple[int, ...]:
    """Square, or a strip along one axis."""
    if shape == "all" or dims == 1:
        return (size,) * dims
    return (size, *(1,) * (dims - 1)) if shape == "first" else (*(1,) * (dims - 1), size)


def geometry_of(x: Value, taps: tuple[int, ...], stride: int, dilation: int, padding: str) -> Geometry:
    """The wanted geometry, or that of a pointwise convolution where the smallest input would leave nothing."""
    totals = [dilation * (k - 1) for k in taps]
    lo, hi = [t // 2 for t in totals], [t - t // 2 for t in totals]
    if padding in ("none", "one"):
        lo = hi = [int(padding == "one")] * len(taps)
    elif padding == "before":
        lo, hi = totals, [0] * len(taps)
    elif padding == "after":
        lo, hi = [0] * len(taps), totals
    wanted = Geometry(taps, stride, dilation, tuple(lo), tuple(hi))
    none = (0,) * len(taps)
    return wanted if possible(wanted.resize(x.sizes)) else Geometry((1,) * len(taps), 1, 1, none, none)


def can_mirror(x: Value, geometry: Geometry) -> bool:
    """Whether the map is always larger than its pads."""
    return all(max(lo, hi) < min(axis) for axis, lo, hi in zip(x.sizes, geometry.lo, geometry.hi, strict=True))


def _constructor(x: Value, outputs: int, g: Geometry, groups: int, bias: bool, mode: str) -> str:
    options = [str(x.channels), str(outputs), str(g.taps if len(set(g.taps)) > 1 else g.taps[0])]
    options += [f"stride={g.stride}"] if g.stride != 1 else []
    if any(g.lo + g.hi) and (g.is_symmetric or g.is_same):
        options.append(f"padding={_padding(g)}")
        options += [f"padding_mode={mode!r}"] if mode != "zeros" else []
    options += [f"dilation={g.dilation}"] if g.dilation != 1 else []
    options += [f"groups={groups}"] if groups != 1 else []
    options += [] if bias else ["bias=False"]
    return f"nn.Conv{x.dims}d({', '.join(options)})"


def _padding(g: Geometry) -> str:
    return repr(g.lo) if g.is_symmetric else "'same'"


def _module_call(name: str, g: Geometry, mode: str) -> str:
    return f"{name}({{}})" if g.is_symmetric or g.is_same else f"{name}({_padded('{}', g, mode)})"


def _padded(x: str, g: Geometry, mode: str) -> str:
    return f"F.pad({x}, {pads(g.lo, g.hi)}" + (")" if mode == "zeros" else f", mode={mode!r})")


def _functional_call(name: str, g: Geometry, groups: int, mode: str, computed: bool) -> str:
    explicit = any(g.lo + g.hi) and (mode != "zeros" or not (g.is_symmetric or g.is_same))
    x = _padded("{}", g, mode) if explicit else "{}"
    weight = f"{name}.weight"
    if computed:
        axes = tuple(range(1, len(g.taps) + 2))
        weight = f"({weight} - {weight}.mean({axes}, keepdim=True)) * 0.5"
    padding = "0" if explicit else _padding(g)
    return f"F.conv{len(g.taps)}d({x}, {weight}, {name}.bias, {g.stride}, {padding}, {g.dilation}, {groups})"


def _apply(at: At, x: Value, layer: Layer) -> Value:
    at.writer.layers.append(layer)
    return _call(at, x, layer)


def _call(at: At, x: Value, layer: Layer) -> Value:
    return at.writer.let(layer.call.format(x.name), x, channels=layer.outputs, sizes=layer.resize(x.sizes))


def linear(at: At, outputs: int, bias: bool) -> Value:
    x = at.x
    name = at.writer.layer("linear", f"nn.Linear({x.channels}, {outputs}{'' if bias else ', bias=False'})")
    spelling = at.pick("module", "module", "functional")
    call = f"{name}({{}})"
    if at.functional or spelling == "functional":
        call = f"F.linear({{}}, {name}.weight, {name}.bias)"
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
    groups = at.pick(1, 1, 2, x.channels)
    groups = groups if x.channels % groups == outputs % groups == 0 else 1
    pad, extra, functional = at.pick(0, 1), at.pick(0, 1), at.functional | at.pick(False, False, True)

    def resize(sizes: Sizes) -> Sizes:
        return tuple(tuple((n - 1) * stride - 2 * pad + size + extra for n in axis) for axis in sizes)

    extra = min(extra, stride - 1)
    if not possible(resize(x.sizes)):
        return conv(at)
    options = f"stride={stride}, padding={pad}, output_padding={extra}, groups={groups}"
    name = at.writer.layer(
        "deconv", f"nn.ConvTranspose{x.dims}d({x.channels}, {outputs}, {size}, {options}, bias={bias})"
    )
    call = f"F.conv_transpose{x.dims}d({{}}, {name}.weight, {name}.bias, {options})" if functional else f"{name}({{}})"
    return _apply(at, x, Layer(call, "map", x.channels, outputs, resize))


@op
def bn(at: At) -> Value:
    """Batch normalisation, on maps, rows, or tokens turned into rows."""
    x = at.x
    functional = at.functional | at.pick(False, False, True)
    options = at.pick("", "", "", ", affine=False", ", eps=1e-3", ", track_running_stats=False")
    many = x.sizes and prod(min(axis) for axis in x.sizes) > 1
    if "track" in options and not many:  # a single number has no variance
        options = ""
    dims = x.dims if x.layout == "map" else 1
    name = at.writer.layer("bn", f"nn.BatchNorm{dims}d({x.channels}{options})")
    call = f"{name}({{}})"
    if functional:
        trains = "track" in options
        call = (f"F.batch_norm({{}}, {name}.running_mean, {name}.running_var, {name}.weight, {name}.bias, "
                f"{trains}, 0.1, {name}.eps)")  # fmt: skip
    if x.layout in ("tokens", "last"):
        turned = at.pick("rows", "transposed")
        if x.layout == "tokens" and turned == "transposed":
            call = call.format("{}.transpose(1, 2)") + ".transpose(1, 2)"
        else:
            call = call.format("{0}.flatten(0, -2)") + ".reshape_as({0})"
    layer = Layer(call, x.layout, x.channels, x.channels, _unchanged)
    return _call(at, x, layer) if "track" in options else _apply(at, x, layer)


@op
def reuse(at: At) -> Value:
    """A layer called once more, if one fits."""
    x, index = at.x, at.pick(*range(8))
    fitting = [m for m in at.writer.layers if (m.layout, m.channels) == (x.layout, x.channels)]
    fitting = [m for m in fitting if possible(m.resize(x.sizes))]
    return _call(at, x, fitting[index % len(fitting)]) if fitting else x


@op
def add(at: At) -> Value:
    """x + y, y brought to the channels of x."""
    x, spelling = at.x, at.pick("{0} + {1}", "{0} += {1}", "torch.add({0}, {1})", "{0}.add_({1})", "{0}.add({1}, alpha=0.5)",
                                "torch.add({0}, {1}, alpha=2)", "torch.stack([{0}, {1}]).sum(0)", "sum([{0}, {1}])",
                                "torch.stack([{0}, {1}], 1).mean(1)")  # fmt: skip
    return _combined(at, x, _operand(at, x), spelling)


@op
def sub(at: At) -> Value:
    """x - y."""
    x, spelling = at.x, at.pick("{0} - {1}", "{0} -= {1}", "torch.sub({0}, {1})", "{0}.sub_({1})", "{0}.sub({1}, alpha=3)",
                                "torch.rsub({0}, {1})")  # fmt: skip
    return _combined(at, x, _operand(at, x), spelling)


def _operand(at: At, x: Value) -> Value:
    y = at.other(x.fits)
    if y.channels == x.channels:
        return y
    layer = (
        f"nn.Conv{x.dims}d({y.channels}, {x.channels}, 1"
        if x.layout == "map"
        else f"nn.Linear({y.channels}, {x.channels}"
    )
    name = at.writer.layer("adapt", f"{layer}, bias=False)")
    return at.writer.let(f"{name}({y.name})", y, channels=x.channels)


def _combined(at: At, x: Value, y: Value, spelling: str) -> Value:
    text, writes = y.name, "=" in spelling.replace("alpha=", "") or "_(" in spelling
    if writes and y.memory == x.memory:
        text = f"{y.name}.clone()"
    return _written(at, x, spelling.format(x.name, text), text)


def _written(at: At, x: Value, text: str, source: str = "") -> Value:
    """`text` as a statement if it is one, else as a new value; in-place methods give x itself."""
    if any(f" {sign}= " in text for sign in "+-*/"):
        return at.writer.write(text, x, source)
    return at.writer.let(text, x, view="_(" in text)


@op
def broadcast(at: At) -> Value:
    """A sum or product with one channel, or with one pixel, of another value."""
    x = at.x
    y = at.other(x.fits)
    axes = tuple(range(2, 2 + x.dims))
    pixel = f"{y.name}.mean({axes}, keepdim=True)" if x.layout == "map" and y.channels in (1, x.channels) else None
    channel = f"{y.name}{_slice(y, slice(0, 1))}"
    smaller = at.pick(pixel or channel, channel)
    spelling = at.pick(
        "{0} * torch.sigmoid({1})", "{0} + {1}", "{1} + {0}", "{0} - {1}", "{0} += {1}.clone()", "{0} * {1}"
    )
    return _written(at, x, spelling.format(x.name, smaller), smaller)


@op
def scale(at: At) -> Value:
    """A constant factor: a number, or one per channel."""
    factor = at.pick("number", "vector", "vector", "minus", "divide")
    x = at.x
    if factor == "minus":
        return _written(at, x, at.pick("-{0}", "torch.neg({0})", "{0}.neg_()").format(x.name))
    if factor == "divide":
        by = "2.5" if at.pick(True, False) else _constant(at, "gain", "rand", " + 0.5")
        return _written(at, x, at.pick("{0} / {1}", "torch.div({0}, {1})", "{0} /= {1}").format(x.name, by))
    gain = at.pick("0.5", "-2", "1.5") if factor == "number" else _constant(at, "gain")
    spelling = at.pick("{0} * {1}", "{1} * {0}", "torch.mul({0}, {1})", "{0} *= {1}", "{0}.mul_({1})")
    return _written(at, x, spelling.format(x.name, gain))


@op
def shift(at: At) -> Value:
    """A constant added: a number, or one per channel."""
    shift = at.pick("0.5", "-1.25", "vector", "vector")
    constant = _constant(at, "shift") if shift == "vector" else shift
    spelling = at.pick(
        "{0} + {1}", "{1} - {0}", "{0} += {1}", "torch.sub({0}, {1})", "{0}.add({1}, alpha=2)", "{1} + {0}"
    )
    return _written(at, at.x, spelling.format(at.x.name, constant))


def _constant(at: At, stem: str, law: str = "randn", more: str = "") -> str:
    """A parameter or buffer that broadcasts along the channels of x."""
    x = at.x
    ones = (1,) * x.dims if x.layout == "map" else ()
    shape = at.pick((x.channels, *ones), (1, x.channels, *ones), (), (1, *ones))
    if x.layout in ("tokens", "last") and len(shape) == 2:
        shape = (1, *shape)
    number = f"torch.{law}({shape}){more}"
    name = at.writer.fresh(stem)
    if at.pick(True, False):
        at.writer.build.append(f"self.{name} = nn.Parameter({number})")
    else:
        at.writer.build.append(f"self.register_buffer({name!r}, {number})")
    return f"self.{name}"


@op
def cat(at: At) -> Value:
    """Two or three values side by side."""
    x = at.x
    y = at.other(x.fits)
    parts = at.pick([x, y], [y, x], [x, y, x])
    channels = sum(p.channels for p in parts)
    if channels > MOST_CHANNELS:
        return x
    spelling = at.pick("torch.cat([{}], {})", "torch.cat(({}), dim={})", "torch.concat([{}], {})")
    return at.writer.let(spelling.format(", ".join(p.name for p in parts), x.axis), x, channels=channels)


@op
def piece(at: At) -> Value:
    """Some of the channels."""
    x, second, way = at.x, at.pick(False, True), at.pick("slice", "chunk", "split", "narrow", "select", "step")
    if x.channels < 2:
        return x
    cut = at.pick((x.channels + 1) // 2, 1, x.channels - 1)
    if way == "step":
        return at.writer.let(
            f"{x.name}{_slice(x, slice(int(second), None, 2))}", x, channels=(x.channels + 1 - second) // 2, view=True
        )
    if way == "select":
        order = list(range(x.channels))[:: -1 if second else 1][: cut or 1]
        name = at.writer.fresh("index")
        at.writer.build.append(f"self.register_buffer({name!r}, torch.tensor({order}))")
        return at.writer.let(f"torch.index_select({x.name}, {x.axis}, self.{name})", x, channels=len(order))
    if way == "chunk":
        cut = (x.channels + 1) // 2
    start, stop = (cut, x.channels) if second else (0, cut)
    if way in ("chunk", "split"):
        call = (
            f"{x.name}.chunk(2, {x.axis})"
            if way == "chunk"
            else f"torch.split({x.name}, [{cut}, {x.channels - cut}], dim={x.axis})"
        )
        text = f"{_once(at, x, call)}[{int(second)}]"
    elif way == "narrow":
        text = f"{x.name}.narrow({x.axis}, {start}, {stop - start})"
    else:
        text = f"{x.name}{_slice(x, slice(start, None if stop == x.channels else stop))}"
    return at.writer.let(text, x, channels=stop - start, view=True)


def _once(at: At, x: Value, call: str) -> str:
    """The variable that holds the pieces of x, cut once."""
    key = (x.name, call)
    if key not in at.writer.pieces:
        name = at.writer.fresh("p")
        at.writer.lines.append(f"{name} = {call}")
        at.writer.unread.pop(x.name, None)
        at.writer.pieces[key] = name
    return at.writer.pieces[key]


def _slice(x: Value, wanted: slice) -> str:
    bounds = ["" if b is None else str(b) for b in (wanted.start, wanted.stop)]
    text = ":".join(bounds) + (f":{wanted.step}" if wanted.step else "")
    return f"[:, {text}]" if x.layout in ("map", "rows") else f"[..., {text}]"


@op
def shuffle(at: At) -> Value:
    """ShuffleNet's permutation of channels, as layers and views."""
    x, way = at.x, at.pick("module", "view")
    if x.channels % 2 or x.layout != "map" or x.dims != 2:
        return x
    if way == "module":
        return at.writer.let(f"{at.writer.layer('shuffle', 'nn.ChannelShuffle(2)')}({x.name})", x)
    n, c, h, w = f"{x.name}.size(0)", x.channels, f"{x.name}.size(2)", f"{x.name}.shape[3]"
    text = f"{x.name}.reshape({n}, 2, {c // 2}, {h}, {w}).transpose(1, 2).reshape({n}, {c}, {h}, {w})"
    return at.writer.let(text, x)


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
    if ceil and rest and (steps + 1) * stride < n + pad:  # a window may not begin in the padding
        steps += 1
    return steps + 1


@op
def pad(at: At) -> Value:
    """Explicit padding, or a crop."""
    x = at.x
    if x.layout != "map":
        return x
    lo, hi = at.pick(1, 1, 0, 2, -1), at.pick(1, 1, 2, 0, -1)
    mode = at.pick("zeros", "zeros", "value", "reflect", "replicate", "circular", "crop")
    functional = at.functional | at.pick(False, True)
    geometry = Geometry((1,) * x.dims, 1, 1, (lo,) * x.dims, (hi,) * x.dims)
    if mode in ("reflect", "replicate", "circular") and (min(lo, hi) < 0 or not can_mirror(x, geometry)):
        mode = "zeros"
    if mode == "crop":
        geometry = Geometry(geometry.taps, 1, 1, (-1,) * x.dims, (-1,) * x.dims)
    sizes = geometry.resize(x.sizes)
    if not possible(sizes):
        return x
    if mode == "crop":
        return at.writer.let(f"{x.name}[:, :{', 1:-1' * x.dims}]", x, sizes=sizes, view=True)
    amounts = pads(geometry.lo, geometry.hi)
    if functional:
        text = {"zeros": "", "value": ", value=0.75"}.get(mode, f", mode={mode!r}")
        return at.writer.let(f"F.pad({x.name}, {amounts}{text})", x, sizes=sizes)
    kind = {
        "zeros": "Zero",
        "value": "Constant",
        "reflect": "Reflection",
        "replicate": "Replication",
        "circular": "Circular",
    }[mode]
    name = at.writer.layer("pad", f"nn.{kind}Pad{x.dims}d({tuple(amounts)}{', 0.75' if mode == 'value' else ''})")
    return at.writer.let(f"{name}({x.name})", x, sizes=sizes)


@op
def act(at: At) -> Value:
    """Something that is not affine (or, with slope 1, is after all)."""
    x = at.x
    spelling = at.pick("F.relu({})", "nn.ReLU()", "torch.relu({})", "nn.ReLU(inplace=True)", "F.relu({}, inplace=True)",
                       "{}.relu_()", "torch.tanh({})", "nn.LeakyReLU(0.4)", "nn.LeakyReLU(1.0)", "{0} * torch.sigmoid({0})")  # fmt: skip
    if not spelling.startswith("nn."):
        return at.writer.let(spelling.format(x.name), x, view="inplace" in spelling or "_(" in spelling)
    inplace = "inplace" in spelling
    if at.functional and "ReLU(" in spelling and "Leaky" not in spelling:
        return at.writer.let(f"F.relu({x.name}{', inplace=True' if inplace else ''})", x, view=inplace)
    return at.writer.let(f"{at.writer.layer('act', spelling)}({x.name})", x, view=inplace)


@op
def same(at: At) -> Value:
    """The same numbers, perhaps in the same memory."""
    spelling = at.pick("nn.Identity()", "{}.contiguous()", "nn.Dropout(0.5)", "{}.clone()", "{}.detach()", "F.dropout({}, 0.5, training=False)",
                       "{0}.view({0}.shape)", "{0}.view_as({0})", "{}.unsqueeze(1).squeeze(1)")  # fmt: skip
    shares = spelling != "{}.clone()"
    if not spelling.startswith("nn."):
        return at.writer.let(spelling.format(at.x.name), at.x, view=shares)
    return at.writer.let(f"{at.writer.layer('same', spelling)}({at.x.name})", at.x, view=True)


@op
def view(at: At) -> Value:
    """A detour through another arrangement, back by sizes that are read."""
    x = at.x
    if x.layout != "map":
        return at.writer.let(f"{x.name}.reshape(-1, {x.channels}).reshape_as({x.name})", x, view=True)
    sizes = ", ".join(f"{x.name}.{at.pick('size({})', 'shape[{}]').format(i)}" for i in (0, *range(2, 2 + x.dims)))
    first, *rest = sizes.split(", ")
    back = f"reshape({first}, {x.channels}, {', '.join(rest)})"
    there = at.pick("flatten(2)", f"reshape({first}, {x.channels}, -1)", "flatten(2).contiguous()")
    return at.writer.let(f"{x.name}.{there}.{back}", x, view=True)


@op
def turn(at: At) -> Value:
    """From maps to tokens or channels last, and back."""
    x, axes = at.x, tuple(range(2, 2 + at.x.dims))
    if x.layout == "map":
        layout = at.pick("tokens", "last")
        text = f"{x.name}.flatten(2).transpose(1, 2)" if layout == "tokens" else f"{x.name}.permute({(0, *axes, 1)})"
        return at.writer.let(text, x, layout=layout, view=True)
    if x.layout == "last":
        return at.writer.let(f"{x.name}.permute({(0, 1 + x.dims, *range(1, 1 + x.dims))})", x, layout="map", view=True)
    if x.layout != "tokens":
        return x
    if x.dims == 1:
        return at.writer.let(f"{x.name}.transpose(1, 2)", x, layout="map", view=True)
    like = next(v for v in at.writer.values if v.layout == "map" and v.sizes == x.sizes)
    sizes = ", ".join(f"{like.name}.shape[{i}]" for i in axes)
    return at.writer.let(
        f"{x.name}.transpose(1, 2).reshape({like.name}.size(0), {x.channels}, {sizes})", x, layout="map", view=True
    )


@op
def head(at: At) -> Value:
    """Pooled over space, as a classifier does."""
    x = at.x
    if x.layout == "rows":
        return x
    axes = {"map": tuple(range(2, 2 + x.dims)), "last": tuple(range(1, 1 + x.dims)), "tokens": (1,)}[x.layout]
    return at.writer.let(f"{x.name}.mean({axes})", x, sizes=(), layout="rows")


@op
def check(at: At) -> Value:
    """An assertion on a size, and a use of metadata that is no use of the value."""
    x = at.x
    rank = {"map": 2 + x.dims, "last": 2 + x.dims, "tokens": 3, "rows": 2}[x.layout]
    at.writer.lines.append(f"torch._assert({x.name}.{at.pick('ndim', 'dim()')} == {rank}, 'rank')")
    return x


@op
def keep(at: At) -> Value:
    """The value is returned, whatever else becomes of it."""
    at.writer.kept.append(at.x.name)
    return at.x
