"""Sums over anchors, stacks of channels and inlining, against torch run on the anchors' values, in float64."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from layers import Layer, border, execute, image, interior, layer, random, same, scale
from torch import Tensor

from fxrep import composition, form
from fxrep import kernel as K
from fxrep.errors import CODES, Illegal
from fxrep.evaluation import evaluate
from fxrep.form import AffineForm, cat, constant, merged, value
from fxrep.parts import Anchor, Gain, Part

ANY = (0, 1, 2, 3)
SPATIAL = (1, 2, 3)
Values = dict[str, Tensor]


def run(f: AffineForm, values: Values) -> Tensor:
    """The form on numbers, term by term."""
    parts = []
    for part in f.parts:
        terms = [
            _term(t, values[a.source] if a.rows is None else values[a.source][:, a.rows]) for a, t in part.terms.items()
        ]
        parts.append(sum(terms) + _bias(part.bias, f.dims))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _term(term: form.Term, x: Tensor) -> Tensor:
    return x * evaluate(term.factor) if isinstance(term, Gain) else execute(term, x)


def _bias(bias: K.Kernel | None, dims: int | None) -> Tensor:
    number = torch.zeros(()) if bias is None else evaluate(bias)
    return number.reshape(-1, *(1,) * (dims or 0)) if number.ndim else number


def anchors(dims: int) -> Values:
    return {"x": image(dims, 4, seed=1), "h": image(dims, 4, seed=2), "wide": image(dims, 6, seed=3)}


def assert_equal(f: AffineForm, expected: Tensor, values: Values) -> None:
    got = run(f, values)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-12 * expected.abs().max()


def of(one: Layer, source: str = "x") -> AffineForm:
    """The layer on an anchor."""
    return value(source, one.operator.in_channels).then(one.operator)


X, H, WIDE = value("x", 4), value("h", 4), value("wide", 6)


@pytest.mark.parametrize("dims", ANY)
def test_sums(dims):
    v, conv, other = anchors(dims), layer(dims, k=3, lo=1, bias=True), layer(dims, seed=5, bias=True)
    x, h = v["x"], v["h"]
    assert_equal(X + X, 2 * x, v)
    assert_equal(X + H + X, 2 * x + h, v)
    assert_equal(X + of(conv, "h"), x + conv.run(h), v)
    assert_equal(of(conv) + X, conv.run(x) + x, v)
    assert_equal(of(conv) + of(other, "h") + of(other), conv.run(x) + other.run(h) + other.run(x), v)
    assert (of(conv) + X + H).sources == ("x", "h")
    assert len(list((of(conv) + X + of(other)).terms)) == 1


@pytest.mark.parametrize("dims", ANY)
@pytest.mark.parametrize("scalar", [True, False])
def test_scale_and_shift(dims, scalar):
    v, conv = anchors(dims), layer(dims, k=3, lo=1, bias=True)
    gain, shift = (random(8), random(9)) if scalar else (random(8, 4), random(9, 4))
    across = (...,) if scalar else (slice(None), *(None,) * dims)
    residual = of(conv, "h") + X
    expected = (conv.run(v["h"]) + v["x"]) * gain[across] + shift[across]
    assert_equal(residual.scale(K.Leaf.of(gain), K.Leaf.of(shift), dims), expected, v)
    assert_equal(residual.scale(K.Leaf.of(gain), dims=dims), expected - shift[across], v)
    assert_equal(X.scale(K.Leaf.of(gain), K.Leaf.of(shift), dims), v["x"] * gain[across] + shift[across], v)


@pytest.mark.parametrize("dims", ANY)
def test_a_scalar_acts_in_any_layout(dims):
    v = anchors(dims)
    half = K.Constant((), 0.5)
    assert X.scale(half).dims is None
    assert_equal(X.scale(half, K.Constant((), 3.0)).scale(half), v["x"] / 4 + 1.5, v)
    mixed = X.scale(half) + H.scale(K.Leaf.of(random(8, 4)), dims=dims)
    assert_equal(mixed, v["x"] / 2 + v["h"] * random(8, 4).reshape(-1, *(1,) * dims), v)


@pytest.mark.parametrize("dims", ANY)
@pytest.mark.parametrize("groups", [1, 2])
def test_then_is_applied_to_every_term(dims, groups):
    v, conv = anchors(dims), layer(dims, k=3, g=groups, bias=True)
    inner = layer(dims, k=3, lo=1, bias=True, seed=5)
    f = (of(inner, "h") + X.scale(K.Constant((), 2.0))).then(conv.operator)
    assert_equal(f, conv.run(inner.run(v["h"]) + 2 * v["x"]), v)
    shifted = (X + constant(K.Leaf.of(random(9, 4)), dims)).then(conv.operator)
    assert_equal(shifted, conv.run(v["x"] + random(9, 4).reshape(-1, *(1,) * dims)), v)


@pytest.mark.parametrize("dims", SPATIAL)
def test_padding_with_the_bias_of_a_sum(dims):
    """The border that a BN would give over zeros, as DBB writes it."""
    v, bias = anchors(dims), random(9, 4)
    conv = layer(dims, k=3, lo=1, fill=bias)
    residual = X + of(layer(dims, seed=5), "h") + constant(K.Leaf.of(bias), dims)
    assert_equal(residual.then(conv.operator), conv.run(run(residual, v)), v)


@pytest.mark.parametrize("dims", ANY)
@pytest.mark.parametrize("rows", [(0, 1), (3, 1, 0, 2), (2,), (0, 1, 2, 3)], ids=str)
def test_take(dims, rows):
    v, conv = anchors(dims), layer(dims, k=3, lo=1, g=2, bias=True)
    residual = of(conv, "h") + X + of(layer(dims, g=4, seed=5), "h")
    expected = conv.run(v["h"]) + v["x"] + layer(dims, g=4, seed=5).run(v["h"])
    assert_equal(residual.take(rows, dims), expected[:, list(rows)], v)
    assert_equal(X.take(rows, dims).take((0,), dims), v["x"][:, [rows[0]]], v)
    assert X.take(rows, dims).channels == len(rows)


@pytest.mark.parametrize("dims", ANY)
@pytest.mark.parametrize("rows", [(0, 1), (5, 6, 7), (3, 4), (9, 8, 7, 0), tuple(range(10)), (4,)], ids=str)
def test_take_from_a_concatenation(dims, rows):
    v, conv = anchors(dims), layer(dims, 4, 6, k=3, lo=1, bias=True)
    expected = torch.cat([v["h"], conv.run(v["x"])], 1)[:, list(rows)]
    assert_equal(cat([H, of(conv)], dims).take(rows, dims), expected, v)


@pytest.mark.parametrize("dims", ANY)
def test_rows_that_meet_are_added(dims):
    """Channel 0 of x[0,1,2] + x[0,2,3] is twice x[0]; so is what two permutations bring together."""
    v, conv = anchors(dims), layer(dims, g=4, bias=True)
    x = v["x"]
    overlapping = X.take((0, 1, 2), dims) + X.take((0, 2, 3), dims)
    assert_equal(overlapping.take((0,), dims), 2 * x[:, :1], v)
    swap = [1, 0, 3, 2]
    swapped = (X + X.take(tuple(swap), dims)).take(tuple(swap), dims) + X
    assert_equal(swapped.take(tuple(swap), dims), (2 * x + x[:, swap])[:, swap], v)
    mixed = of(conv).take((0, 2), dims) + X.take((0, 1), dims) + of(conv).take((0, 1), dims)
    assert_equal(mixed.take((0,), dims), (2 * conv.run(x) + x)[:, :1], v)


@pytest.mark.parametrize("dims", ANY)
@pytest.mark.parametrize("rows", [(0, 2), (3, 3, 1, 0), (0, 0), (0, 1, 2, 3)], ids=str)
def test_a_layer_on_some_channels_and_one_on_all(dims, rows):
    v, some, whole = anchors(dims), layer(dims, len(rows), 4, k=3, lo=1, seed=5), layer(dims, bias=True)
    for f in (X.take(rows, dims).then(some.operator) + of(whole), of(whole) + X.take(rows, dims).then(some.operator)):
        assert_equal(f, some.run(v["x"][:, list(rows)]) + whole.run(v["x"]), v)


OVER = {
    "ungrouped": lambda n: layer(n, 10, 4, k=3, lo=1, bias=False),
    "biased": lambda n: layer(n, 10, 4, k=3, bias=True),
    "groups across the parts": lambda n: layer(n, 10, 4, k=2, g=2, bias=True),
    "groups within the parts": lambda n: layer(n, 10, 5, k=3, lo=1, g=5, bias=True),
    "depthwise": lambda n: layer(n, 10, 10, k=3, lo=1, g=10, bias=True),
    "per channel": lambda n: scale(n, 10, bias=True),
    "a fill of zeros": lambda n: layer(n, 10, 4, k=3, lo=1, fill=torch.zeros(10, dtype=torch.float64)),
    "reflected": lambda n: layer(n, 10, 4, k=3, lo=1, mode="reflect", bias=True),
}  # fmt: skip


@pytest.mark.parametrize("dims", ANY)
@pytest.mark.parametrize("name", OVER)
def test_a_layer_over_a_concatenation(name, dims):
    v, over = anchors(dims), OVER[name](dims)
    inner = layer(dims, 4, 6, seed=5)
    f = cat([X, of(inner, "h")], dims).then(over.operator)
    assert_equal(f, over.run(torch.cat([v["x"], inner.run(v["h"])], 1)), v)
    assert len(f.parts) == (1 if over.operator.groups <= 2 else 2)


@pytest.mark.parametrize("dims", ANY)
def test_sums_of_concatenations_cut_elsewhere(dims):
    v, conv = anchors(dims), layer(dims, 4, 10, k=3, lo=1, bias=True)
    left, right = cat([X, WIDE], dims), cat([WIDE, H], dims)
    expected = torch.cat([v["x"], v["wide"]], 1), torch.cat([v["wide"], v["h"]], 1)
    assert_equal(left + right, expected[0] + expected[1], v)
    assert [p.channels for p in (left + right).parts] == [4, 2, 4]
    assert_equal(left + of(conv), expected[0] + conv.run(v["x"]), v)
    assert_equal((right + left).scale(K.Constant((), 0.5)), (expected[0] + expected[1]) / 2, v)


@pytest.mark.parametrize("dims", ANY)
def test_substitute_is_inlining(dims):
    v = anchors(dims)
    inner, outer = layer(dims, k=3, lo=1, bias=True, seed=5), layer(dims, k=3, bias=True)
    middle = of(inner, "h") + X
    numbers = {**v, "m": inner.run(v["h"]) + v["x"]}
    for user in (of(outer, "m"), value("m", 4) + X, of(layer(dims), "m") + value("m", 4) + H):
        inlined = user.substitute("m", middle)
        assert "m" not in inlined.sources
        assert_equal(inlined, run(user, numbers), v)


@pytest.mark.parametrize("dims", ANY)
def test_substitute_by_rows_and_by_parts(dims):
    v, conv = anchors(dims), layer(dims, 4, 6, k=3, lo=1, bias=True, seed=5)
    stacked = cat([X, of(conv, "h")], dims)
    numbers = {**v, "m": torch.cat([v["x"], conv.run(v["h"])], 1)}
    m = value("m", 10)
    halves = m.take(tuple(range(5)), dims) + m.take(tuple(range(5, 10)), dims)
    users = [m, m.take((0, 1), dims), halves, m + m.scale(K.Constant((), 2.0)), of(layer(dims, 10, 4, bias=True), "m")]
    for user in users:
        assert_equal(user.substitute("m", stacked), run(user, numbers), v)


@pytest.mark.parametrize("dims", ANY)
def test_the_order_of_inlining_does_not_matter(dims):
    v = anchors(dims)
    definitions = {
        "a": of(layer(dims, k=3, lo=1, bias=True), "x") + X,
        "b": of(layer(dims, seed=5), "a") + H,
        "c": value("b", 4) + value("a", 4).scale(K.Leaf.of(random(8, 4)), dims=dims),
    }
    numbers = dict(v)
    for name, definition in definitions.items():
        numbers[name] = run(definition, numbers)
    late = definitions["c"].substitute("b", definitions["b"]).substitute("a", definitions["a"])
    early = definitions["c"].substitute("b", definitions["b"].substitute("a", definitions["a"]))
    early = early.substitute("a", definitions["a"])
    for f in (late, early):
        assert set(f.sources) == {"x", "h"}
        assert_equal(f, numbers["c"], v)


@pytest.mark.parametrize("dims", ANY)
def test_merged_rows_and_groups(dims):
    v = anchors(dims)
    a, b = layer(dims, 4, 3, k=3, lo=1, bias=True), layer(dims, 4, 6, g=2, seed=5)
    on_one = cat([of(a), of(b)], dims)
    halves = [X.take((0, 1), dims), X.take((2, 3), dims)]
    side = cat(
        [halves[0].then(layer(dims, 2, 4, k=3, lo=1).operator), halves[1].then(layer(dims, 2, 4, bias=True).operator)],
        dims,
    )
    for stacked in (
        on_one,
        side,
        cat(halves[::-1], dims),
        cat([X, X], dims),
        cat([halves[0].scale(K.Constant((), 2.0)), halves[1]], dims),
    ):
        single = merged(stacked)
        assert len(single.parts) == len(single.parts[0].terms) == 1
        assert_equal(single, run(stacked, v), v)


@pytest.mark.parametrize("dims", ANY)
def test_several_anchors_are_no_single_operator(dims):
    """Read on the first anchor alone, the second half would be wrong."""
    v, conv = anchors(dims), layer(dims, bias=True)
    apart = [
        cat([of(conv), of(conv, "h")], dims),
        cat([X + H, X], dims),
        cat([X, H], dims),
        cat([X, constant(K.Constant((4,), 1.0), dims)], dims),
    ]
    assert [merged(f) for f in apart] == [None] * 4
    mistaken = merged(cat([of(conv), of(conv)], dims))
    assert (run(mistaken, v) - run(apart[0], v))[:, 4:].abs().mean() > 1e-2


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns off the checks of borders and layouts, so that a form folds whatever it is given."""

    def turn_off() -> None:
        monkeypatch.setattr(composition, "check_outside", lambda *_: None)
        monkeypatch.setattr(form, "_one_layout", lambda a, b: a if b is None else b)

    return turn_off


@pytest.mark.parametrize("dims", SPATIAL)
def test_padding_over_a_shifted_sum_is_refused_and_the_refusal_is_needed(dims, unchecked):
    """No term has a bias of its own: the sum has."""
    v, conv = anchors(dims), layer(dims, k=3, lo=1, seed=9)
    shifted = X + of(layer(dims, seed=5), "h") + constant(K.Leaf.of(random(9, 4)), dims)
    with pytest.raises(Illegal, match="pads-over-bias"):
        shifted.then(conv.operator)
    with pytest.raises(Illegal, match="pads-over-bias"):
        of(conv, "m").substitute("m", shifted)
    unchecked()
    error = (run(shifted.then(conv.operator), v) - conv.run(run(shifted, v))).abs()
    assert interior(error).max() < 1e-12
    assert border(error.amax((0, 1), keepdim=True)).min() > 1e-3


@pytest.mark.parametrize("dims", SPATIAL)
def test_padding_over_a_concatenation_is_judged_by_parts(dims):
    over = layer(dims, 8, 8, k=3, lo=1, g=8)
    shifted = X + constant(K.Leaf.of(random(9, 4)), dims)
    with pytest.raises(Illegal, match="pads-over-bias"):
        cat([H, shifted], dims).then(over.operator)
    fill = torch.cat([torch.zeros(4, dtype=torch.float64), random(9, 4)])
    legal, v = layer(dims, 8, 8, k=3, lo=1, g=8, fill=fill), anchors(dims)
    f = cat([H, shifted], dims)
    assert_equal(f.then(legal.operator), legal.run(run(f, v)), v)


@pytest.mark.parametrize("dims", SPATIAL)
def test_a_convolution_does_not_act_by_terms_where_one_broadcasts(dims):
    """A pooled map of one pixel is added everywhere: convolved alone it has no neighbours."""
    v, conv = anchors(dims), layer(dims, k=3, lo=1)
    v["h"] = v["h"].mean(tuple(range(2, 2 + dims)), keepdim=True)
    total = replace(X + H, aligned=False)
    with pytest.raises(Illegal, match="broadcast"):
        total.then(conv.operator)
    error = run((X + H).then(conv.operator), v) - conv.run(v["x"] + v["h"])
    assert error.abs().mean() > 1e-2
    pointwise = layer(dims, bias=True)
    assert_equal(total.then(pointwise.operator), pointwise.run(v["x"] + v["h"]), v)
    with pytest.raises(Illegal, match="broadcast"):
        of(conv, "m").substitute("m", total)
    for later in (of(pointwise, "m").substitute("m", total), total + X, cat([total, X], dims), total.take((1,), dims)):
        assert not later.aligned, "it stays in question"


@pytest.mark.parametrize("dims", SPATIAL)
def test_one_form_has_one_channel_axis(dims, unchecked):
    """A linear layer on the last of equal axes is no pointwise convolution."""
    conv, linear = layer(dims, bias=True), layer(0, seed=5)
    x = random(1, 2, *(4,) * (dims + 1))
    attempts = (
        lambda: of(conv).then(linear.operator),
        lambda: of(conv) + of(linear),
        lambda: of(conv).take((1, 0), 0),
        lambda: cat([of(conv), X], 0),
    )
    for attempt in attempts:
        with pytest.raises(Illegal, match="layout"):
            attempt()
    last_axis = linear.run(x.flatten(0, dims)).unflatten(0, x.shape[:-1])
    unchecked()
    mistaken = replace(linear.operator, **{g: (n,) * dims for g, n in GEOMETRY.items()}, weight=pointwise(linear, dims))
    assert (run(of(conv) + value("x", 4).then(mistaken), {"x": x}) - conv.run(x) - last_axis).abs().mean() > 1e-2


GEOMETRY = {"stride": 1, "pad_lo": 0, "pad_hi": 0, "dilation": 1}


def pointwise(linear: Layer, dims: int) -> K.Kernel:
    return K.Leaf.of(evaluate(linear.operator.weight).reshape(4, 4, *(1,) * dims))


def test_channels_must_be_known_where_they_decide():
    """The same rows of the same values are other channels, by where the one ends and the other begins."""
    v, unknown = anchors(2), value("y")
    with pytest.raises(Illegal, match="shape-unknown"):
        cat([unknown, X], 2)
    with pytest.raises(Illegal, match="shape-unknown"):
        AffineForm((*unknown.parts, *X.parts), 2).take((3, 4), 2)
    assert unknown.channels is None
    readings = [run(cat([value("wide", n), H], 2).take((3, 4), 2), v) for n in (4, 6)]
    assert (readings[0] - readings[1]).abs().mean() > 1e-2


def test_interleaved_channels_would_be_a_part_each():
    """A channel shuffle of two halves is exact, but of no use: eight parts of one channel, where torch has one copy."""
    both = cat([X, H], 2)
    shuffle = tuple(c for pair in zip(range(4), range(4, 8), strict=True) for c in pair)
    with pytest.raises(Illegal, match="layout"):
        both.take(shuffle, 2)
    assert len(both.take((0, 4, 1, 2, 3), 2).parts) == 3


def test_channels_that_do_not_meet():
    v, conv = anchors(2), layer(2)
    attempts = {
        "sum": (lambda: X + WIDE, lambda: v["x"] + v["wide"]),
        "sum of stacks": (lambda: cat([X, X], 2) + cat([X, WIDE], 2), lambda: v["x"] + v["wide"]),
        "sum with a stack": (lambda: cat([X, X], 2) + WIDE, lambda: torch.cat([v["x"], v["x"]], 1) + v["wide"]),
        "sequence": (lambda: WIDE.then(conv.operator), lambda: conv.run(v["wide"])),
        "over a stack": (lambda: cat([X, X], 2).then(conv.operator), lambda: conv.run(torch.cat([v["x"], v["x"]], 1))),
    }
    for name, (ours, theirs) in attempts.items():
        with pytest.raises(RuntimeError):
            theirs()
        with pytest.raises(Illegal, match="broadcast"):
            pytest.fail(f"{name}: {ours().channels} channels")


def test_every_code_that_forms_raise_has_its_witness():
    raised = set(re.findall(r'Illegal\(\s*"([a-z-]+)"', inspect.getsource(form)))
    assert raised <= set(CODES)
    shown = set(re.findall(r'match="([a-z-]+)"', inspect.getsource(inspect.getmodule(test_sums))))
    assert raised <= shown, raised - shown


def test_narrowed_anchors_compose():
    assert Anchor("x").narrowed(None, 4) == Anchor("x")
    assert Anchor("x").narrowed((3, 1), 4).narrowed((1, 0), 2) == Anchor("x", (1, 3))


def test_all_channels_of_a_value_are_the_value():
    part = Anchor("x").narrowed((1, 2), 3)
    assert part.on((0, 1, 2)) == Anchor("x")
    assert part.on((0, 2)) == Anchor("x", (0, 2))
    assert Anchor("x").narrowed((1, 2), None).on((0, 1, 2)) == Anchor("x", (0, 1, 2))


def test_what_a_part_knows_of_its_channels():
    assert Part({}, K.Constant((3,), 1.0)).channels == 3
    assert Part({}, K.Constant((), 1.0)).channels is None
    assert of(layer(2, 4, 6)).channels == 6
    assert (value("x") + of(layer(2, 4, 6), "h")).channels == 6
    assert of(same(2)).channels == 4
