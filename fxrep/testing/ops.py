"""Ops of random programs that are no layers: arithmetic, channels, views, activations."""

from __future__ import annotations

from fxrep.testing.writer import MOST_CHANNELS, At, Value, op

SUMS = (
    "{0} + {1}", "{0} += {1}", "torch.add({0}, {1})", "{0}.add_({1})", "{0}.add({1}, alpha=0.5)", "sum([{0}, {1}])",
    "torch.add({0}, {1}, alpha=2)", "torch.stack([{0}, {1}]).sum(0)", "torch.stack([{0}, {1}], 1).mean(1)",
)  # fmt: skip
DIFFERENCES = (
    "{0} - {1}", "{0} -= {1}", "torch.sub({0}, {1})", "{0}.sub_({1})", "{0}.sub({1}, alpha=3)", "torch.rsub({0}, {1})",
)  # fmt: skip
BROADCASTS = (
    "{0} * torch.sigmoid({1})", "{0} + {1}", "{1} + {0}", "{0} - {1}", "{0} += {1}.clone()", "{0} * {1}",
)  # fmt: skip
PRODUCTS = ("{0} * {1}", "{1} * {0}", "torch.mul({0}, {1})", "{0} *= {1}", "{0}.mul_({1})")
QUOTIENTS = ("{0} / {1}", "torch.div({0}, {1})", "{0} /= {1}")
SHIFTS = ("{0} + {1}", "{1} - {0}", "{0} += {1}", "torch.sub({0}, {1})", "{0}.add({1}, alpha=2)", "{1} + {0}")
ACTIVATIONS = (
    "F.relu({})", "nn.ReLU()", "torch.relu({})", "nn.ReLU(inplace=True)", "F.relu({}, inplace=True)", "{}.relu_()",
    "torch.tanh({})", "nn.LeakyReLU(0.4)", "nn.LeakyReLU(1.0)", "{0} * torch.sigmoid({0})",
)  # fmt: skip
IDENTITIES = (
    "nn.Identity()", "{}.contiguous()", "nn.Dropout(0.5)", "{}.clone()", "{}.detach()", "{0}.view({0}.shape)",
    "F.dropout({}, 0.5, training=False)", "{0}.view_as({0})", "{}.unsqueeze(1).squeeze(1)",
)  # fmt: skip


@op
def add(at: At) -> Value:
    """x + y, y brought to the channels of x."""
    return _combined(at, at.pick(*SUMS))


@op
def sub(at: At) -> Value:
    """x - y."""
    return _combined(at, at.pick(*DIFFERENCES))


def _combined(at: At, spelling: str) -> Value:
    x = at.x
    y = _to_channels(at, at.other(x.fits), x.channels)
    overlaps = _writes(spelling) and y.memory == x.memory
    text = f"{y.name}.clone()" if overlaps else y.name
    return _written(at, spelling.format(x.name, text), text)


def _to_channels(at: At, y: Value, channels: int) -> Value:
    if y.channels == channels:
        return y
    kind, taps = (f"Conv{y.dims}d", ", 1") if y.layout == "map" else ("Linear", "")
    name = at.writer.layer("adapt", f"nn.{kind}({y.channels}, {channels}{taps}, bias=False)")
    return at.writer.let(f"{name}({y.name})", y, channels=channels)


def _writes(text: str) -> bool:
    return "_(" in text or _is_statement(text)


def _is_statement(text: str) -> bool:
    return any(f" {sign}= " in text for sign in "+-*/")


def _written(at: At, text: str, source: str = "") -> Value:
    """`text` as a statement that writes into x if it is one, else as a new value."""
    if _is_statement(text):
        return at.writer.write(text, at.x, source)
    return at.writer.let(text, at.x, view="_(" in text)


@op
def broadcast(at: At) -> Value:
    """A sum or product with one channel, or with one pixel, of another value."""
    x = at.x
    y = at.other(x.fits)
    smaller = f"{y.name}{_slice(y, slice(0, 1))}"
    if at.pick(True, False) and x.layout == "map" and y.channels in (1, x.channels):
        smaller = f"{y.name}.mean({_spatial_axes(x)}, keepdim=True)"
    return _written(at, at.pick(*BROADCASTS).format(x.name, smaller), smaller)


def _spatial_axes(x: Value) -> tuple[int, ...]:
    first = {"map": 2, "last": 1, "tokens": 1, "rows": 1}[x.layout]
    return tuple(range(first, first + (1 if x.layout == "tokens" else x.dims)))


@op
def scale(at: At) -> Value:
    """A constant factor: a number, or one per channel."""
    factor, x = at.pick("number", "vector", "vector", "minus", "divide"), at.x
    if factor == "minus":
        return _written(at, at.pick("-{0}", "torch.neg({0})", "{0}.neg_()").format(x.name))
    if factor == "divide":
        divisor = "2.5" if at.pick(True, False) else _constant(at, "gain", "torch.rand({}) + 0.5")
        return _written(at, at.pick(*QUOTIENTS).format(x.name, divisor))
    gain = at.pick("0.5", "-2", "1.5") if factor == "number" else _constant(at, "gain", "torch.randn({})")
    return _written(at, at.pick(*PRODUCTS).format(x.name, gain))


@op
def shift(at: At) -> Value:
    """A constant added: a number, or one per channel."""
    shift = at.pick("0.5", "-1.25", "vector", "vector")
    constant = _constant(at, "shift", "torch.randn({})") if shift == "vector" else shift
    return _written(at, at.pick(*SHIFTS).format(at.x.name, constant))


def _constant(at: At, stem: str, law: str) -> str:
    """A parameter or buffer that broadcasts along the channels of x."""
    x = at.x
    ones = (1,) * x.dims if x.layout == "map" else ()
    lead = (1,) * (_rank(x) - 1 - len(ones))
    shape = at.pick((x.channels, *ones), (*lead, x.channels, *ones), (), (1, *ones))
    name, number = at.writer.fresh(stem), law.format(shape)
    if at.pick(True, False):
        at.writer.build.append(f"self.{name} = nn.Parameter({number})")
    else:
        at.writer.build.append(f"self.register_buffer({name!r}, {number})")
    return f"self.{name}"


def _rank(x: Value) -> int:
    return {"tokens": 3, "rows": 2}.get(x.layout, 2 + x.dims)


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
    """Some of the channels: the first or the second part of them, every other one, or a selection."""
    x, second = at.x, at.pick(False, True)
    way = at.pick("slice", "chunk", "split", "narrow", "select", "step", "select")
    if x.channels < 2:
        return x
    half = (x.channels + 1) // 2
    cut = half if way == "chunk" else at.pick(half, 1, x.channels - 1)
    if way == "step":
        wanted = slice(int(second), None, 2)
        return at.writer.let(f"{x.name}{_slice(x, wanted)}", x, channels=(x.channels + 1 - second) // 2, view=True)
    if way == "select":
        return _selection(at, list(range(x.channels))[:: -1 if second else 1][:cut])
    start, stop = (cut, x.channels) if second else (0, cut)
    text = {
        "slice": f"{x.name}{_slice(x, slice(start, None if second else stop))}",
        "narrow": f"{x.name}.narrow({x.axis}, {start}, {stop - start})",
        "chunk": f"{x.name}.chunk(2, {x.axis})",
        "split": f"torch.split({x.name}, [{cut}, {x.channels - cut}], dim={x.axis})",
    }[way]
    text = text if way in ("slice", "narrow") else f"{at.writer.once(x, text)}[{int(second)}]"
    return at.writer.let(text, x, channels=stop - start, view=True)


def _selection(at: At, order: list[int]) -> Value:
    name = at.writer.fresh("index")
    at.writer.build.append(f"self.register_buffer({name!r}, torch.tensor({order}))")
    return at.writer.let(f"torch.index_select({at.x.name}, {at.x.axis}, self.{name})", at.x, channels=len(order))


def _slice(x: Value, wanted: slice) -> str:
    bounds = ["" if b is None else str(b) for b in (wanted.start, wanted.stop)]
    text = ":".join(bounds) + (f":{wanted.step}" if wanted.step else "")
    return f"[:, {text}]" if x.layout in ("map", "rows") else f"[..., {text}]"


@op
def shuffle(at: At) -> Value:
    """ShuffleNet's permutation of channels, as a layer and as views."""
    x, as_layer = at.x, at.pick(True, False)
    if x.channels % 2 or x.layout != "map" or x.dims != 2:
        return x
    if as_layer:
        return at.writer.let(f"{at.writer.layer('shuffle', 'nn.ChannelShuffle(2)')}({x.name})", x)
    n, c, h, w = f"{x.name}.size(0)", x.channels, f"{x.name}.size(2)", f"{x.name}.shape[3]"
    text = f"{x.name}.reshape({n}, 2, {c // 2}, {h}, {w}).transpose(1, 2).reshape({n}, {c}, {h}, {w})"
    return at.writer.let(text, x)


@op
def act(at: At) -> Value:
    """Something that is not affine (or, with slope 1, is after all)."""
    x, spelling = at.x, at.pick(*ACTIVATIONS)
    inplace = "inplace" in spelling or "_(" in spelling
    if spelling.startswith("nn.ReLU") and at.functional:
        spelling = "F.relu({}, inplace=True)" if inplace else "F.relu({})"
    if spelling.startswith("nn."):
        spelling = f"{at.writer.layer('act', spelling)}({{}})"
    return at.writer.let(spelling.format(x.name), x, view=inplace)


@op
def same(at: At) -> Value:
    """The same numbers, perhaps in the same memory."""
    spelling = at.pick(*IDENTITIES)
    shares = spelling != "{}.clone()"
    if spelling.startswith("nn."):
        spelling = f"{at.writer.layer('same', spelling)}({{}})"
    return at.writer.let(spelling.format(at.x.name), at.x, view=shares)


@op
def view(at: At) -> Value:
    """A detour through another arrangement, back by sizes that are read."""
    x = at.x
    if x.layout != "map":
        return at.writer.let(f"{x.name}.reshape(-1, {x.channels}).reshape_as({x.name})", x, view=True)
    read = [f"{x.name}.{at.pick('size({})', 'shape[{}]').format(i)}" for i in (0, *_spatial_axes(x))]
    there = at.pick("flatten(2)", f"reshape({read[0]}, {x.channels}, -1)", "flatten(2).contiguous()")
    return at.writer.let(f"{x.name}.{there}.reshape({read[0]}, {x.channels}, {', '.join(read[1:])})", x, view=True)


@op
def turn(at: At) -> Value:
    """From maps to tokens or channels last, and back."""
    x = at.x
    if x.layout == "rows":
        return x
    if x.layout == "map":
        layout = at.pick("tokens", "last")
        text = "flatten(2).transpose(1, 2)" if layout == "tokens" else f"permute({(0, *_spatial_axes(x), 1)})"
        return at.writer.let(f"{x.name}.{text}", x, layout=layout, view=True)
    back = f"permute({(0, 1 + x.dims, *_spatial_axes(x))})" if x.layout == "last" else "transpose(1, 2)"
    if x.layout == "tokens" and x.dims > 1:
        like = next(v for v in at.writer.values if v.layout == "map" and v.sizes == x.sizes)
        sizes = ", ".join(f"{like.name}.shape[{i}]" for i in _spatial_axes(like))
        back += f".reshape({like.name}.size(0), {x.channels}, {sizes})"
    return at.writer.let(f"{x.name}.{back}", x, layout="map", view=True)


@op
def head(at: At) -> Value:
    """Pooled over space, as a classifier does."""
    x = at.x
    return x if x.layout == "rows" else at.writer.let(f"{x.name}.mean({_spatial_axes(x)})", x, sizes=(), layout="rows")


@op
def check(at: At) -> Value:
    """An assertion on a size: a use of metadata that is no use of the value."""
    at.writer.lines.append(f"torch._assert({at.x.name}.{at.pick('ndim', 'dim()')} == {_rank(at.x)}, 'rank')")
    return at.x


@op
def keep(at: At) -> Value:
    """The value is returned, whatever else becomes of it."""
    at.writer.kept.append(at.x.name)
    return at.x
