"""From module to graph: what is traced means the same, what cannot be traced stays whole, the model is untouched."""

from __future__ import annotations

import copy
import operator
import types
from collections import namedtuple
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from reader_cases import TOLERANCE, Case, Net, bn, conv, draw, equal_results, executed
from torch import Tensor, nn

import fxrep

Pair = namedtuple("Pair", "first second")


SIZES = ((1, 4, 9, 13), (3, 4, 15, 11))


def collapse(network: nn.Module, name: str = "trace", **options: Any) -> tuple[nn.Module, nn.Module]:
    """A network with fresh numbers in float64, and what becomes of it."""
    network = Case(name, lambda: network).network()
    return network, fxrep.reparameterize(network, **options)


# What cannot be traced


class Branching(nn.Module):
    """Branches on a size: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y if x.shape[-1] > 12 else -y


class Looping(Branching):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.size(0)):
            x = self.bn(self.conv(x))
        return x


class Remembering(nn.Module):
    """Writes an attribute of its own, which a trace would lose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        return self.bn(self.last)


class Listing(Remembering):
    """The same, into a list that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.bn(self.conv(x))


class Counting(nn.Module):
    """Counts its calls in a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.bn(self.conv(x)) * self.calls


class Averaging(Counting):
    """The same, by augmented assignment to a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 2
        return self.bn(self.conv(x)) * self.calls


def around(middle: nn.Module) -> nn.Module:
    return nn.Sequential(conv(), bn(), middle, conv(), bn())


@pytest.mark.parametrize("middle", [Branching, Looping, Remembering])
def test_an_untraceable_module_stays_whole_between_collapsed_ones(middle: type[nn.Module]) -> None:
    network, collapsed = collapse(around(middle()))
    assert ("2", "not-traceable") in {(r.node, r.code) for r in collapsed.report.refusals}
    for size in SIZES:
        equal_results(collapsed, network, draw(*size))
    assert executed(collapsed, draw(*SIZES[0]))["b"] == (middle is Remembering)  # which looks at what lies between
    assert [type(m) for m in collapsed.modules()].count(middle) == 1


@pytest.mark.parametrize("root", [Branching, Looping, Remembering])
def test_an_untraceable_root_is_given_back_as_a_copy(root: type[nn.Module]) -> None:
    network, collapsed = collapse(root())
    assert "not-traceable" in {r.code for r in collapsed.report.refusals}
    original = copy.deepcopy(network).eval()
    for x in (draw(*size) for size in SIZES):
        with torch.no_grad():
            assert relative_error(collapsed(x), original(x)) <= TOLERANCE
    assert not {id(t) for t in network.parameters()} & {id(t) for t in collapsed.parameters()}


@pytest.mark.parametrize("middle", [Remembering, Listing, Counting, Averaging])
@torch.no_grad()
def test_what_a_forward_writes_is_written_by_its_copy_alone(middle: type[nn.Module]) -> None:
    network, collapsed = collapse(around(middle()))
    network.eval()
    before = copy.deepcopy(network)
    for size in SIZES:
        x = draw(*size)
        assert relative_error(collapsed(x), before(x)) <= TOLERANCE
    if issubclass(middle, Counting):
        (calls,) = (t for name, t in collapsed.named_buffers() if name.endswith("calls"))
        assert torch.equal(calls, before[2].calls)
        assert not network[2].calls.any()
        return
    (inner,) = (m for m in collapsed.modules() if isinstance(m, middle))
    assert network[2].last is None
    assert not getattr(network[2], "seen", None)
    remembered, expected = (m.seen if isinstance(m, Listing) else [m.last] for m in (inner, before[2]))
    assert [t.shape for t in remembered] == [t.shape for t in expected]


def test_a_scripted_module_stays_whole() -> None:
    network = around(torch.jit.script(nn.Sequential(conv(), nn.ReLU()))).double().eval()
    collapsed = fxrep.reparameterize(network)
    equal_results(collapsed, network, draw(*SIZES[0]))
    assert collapsed.report.after["bn"] == 0


class Leaving(Branching):
    """Leaves a value where another forward finds it, before it branches."""

    left: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        self.left.append(2 * x)
        return super().forward(x)


class Finding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.leaving, self.left = conv(), bn(), Leaving(), []
        self.leaving.left = self.left

    def forward(self, x: Tensor) -> Tensor:
        y = self.leaving(self.bn(self.conv(x)))
        return y + self.left.pop()


def test_a_value_of_a_trace_that_failed_is_in_no_graph() -> None:
    network, collapsed = collapse(Finding())
    for size in SIZES:
        equal_results(collapsed, network, draw(*size))
    assert any("kept from a trace that failed" in refusal.reason for refusal in collapsed.report.refusals)
    assert collapsed.report.after["bn"] == 0, "what is inside is collapsed all the same"


def test_a_forward_replaced_on_the_instance_is_what_runs() -> None:
    network = Case("patched", around(nn.Identity()).eval).network()
    network[0].forward = types.MethodType(lambda self, x: 2 * F.conv2d(x, self.weight, padding=1), network[0])
    equal_results(fxrep.reparameterize(network), network, draw(*SIZES[0]))


# What must be left alone


def test_the_model_and_the_generator_are_untouched() -> None:
    """Modes of every module, buffers, parameters by identity, attributes, gradients, random numbers."""
    network = Case(
        "untouched", lambda: nn.Sequential(around(Remembering()), nn.Dropout(), around(Branching()))
    ).network()
    network.train()
    network[0][1].eval()
    network[0][0].weight.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    modes = [m.training for m in network.modules()]
    identities = [id(t) for t in (*network.parameters(), *network.buffers())]
    attributes = [dict(vars(m)) for m in network.modules()]
    generator = torch.get_rng_state()
    fxrep.reparameterize(network)
    fxrep.explain(network)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [m.training for m in network.modules()] == modes
    assert [id(t) for t in (*network.parameters(), *network.buffers())] == identities
    assert [{k: id(v) for k, v in vars(m).items()} for m in network.modules()] == [
        {k: id(v) for k, v in old.items()} for old in attributes
    ]
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert not network[0][0].weight.requires_grad


def test_random_numbers_are_drawn_at_run_time() -> None:
    network = Net(lambda m, x: m.bn(m.conv(x)) + torch.rand(1, 4, 1, 1, dtype=x.dtype), conv=conv(), bn=bn())
    generator = torch.get_rng_state()
    network, collapsed = collapse(network)
    assert torch.equal(torch.get_rng_state(), generator)
    x = draw(*SIZES[0])
    results = []
    for module in (collapsed, network.eval(), collapsed):
        torch.manual_seed(len(results) // 2)
        results.append(module(x))
    assert relative_error(results[0], results[1]) <= TOLERANCE
    assert relative_error(results[2], results[0]) > 1e-3


class Stubborn(nn.Module):
    """Monte-Carlo style: its norm stays in training mode, whatever eval() says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn(momentum=0.0)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.bn.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def test_a_norm_that_eval_leaves_in_training_mode_normalises_by_the_batch() -> None:
    network, collapsed = collapse(around(Stubborn()))
    equal_results(collapsed, network, draw(*SIZES[1]))


# Arguments and results


def test_arguments_with_defaults_are_specialised_aloud() -> None:
    class Optional(Branching):
        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, flip: bool = False) -> Tensor:
            y = self.bn(self.conv(x)) * scale
            y = y if mask is None else y * mask
            return -y if flip else y

    network, collapsed = collapse(Optional())
    x, mask = draw(*SIZES[0]), draw(1, 1, 9, 13)
    equal_results(collapsed, network, x)
    equal_results(collapsed, network, x, None, 2.0, flip=False)
    assert executed(collapsed, x)["b"] == 0
    for name, value in {"mask": mask, "scale": 3.0, "flip": True}.items():
        with pytest.raises(AssertionError, match=name):
            collapsed(x, **{name: value})
    masked = fxrep.reparameterize(network, {"x": x, "mask": mask})
    equal_results(masked, network, x, mask)
    assert executed(masked, x, mask)["b"] == 0


class Extras(Branching):
    def forward(self, x: Tensor, extras: Any = ()) -> Tensor:
        y = self.bn(self.conv(x))
        for extra in extras.values() if isinstance(extras, dict) else extras:
            y = y * extra
        return y


@pytest.mark.parametrize("hold", [tuple, list, lambda parts: dict(enumerate(parts))])
def test_tensors_inside_an_argument_with_a_default_are_whatever_comes(hold: Callable[[Iterable[Any]], Any]) -> None:
    network, x = Extras().double().eval(), draw(*SIZES[0])
    collapsed = fxrep.reparameterize(network, (x, hold([torch.tensor(2.0), 3.0])))
    assert executed(collapsed, x, hold([torch.tensor(2.0), 3.0]))["b"] == 0
    equal_results(collapsed, network, x, hold([draw(1, 4, 1, 1), 3.0]))
    assert fxrep.verify(network, collapsed, (x, hold([draw(1, 4, 1, 1), 3.0])))
    for others, message in (((2.0,), "2 entries of extras"), ((x, 4.0), r"extras\[1\]=3.0")):
        with pytest.raises(AssertionError, match=message):
            collapsed(x, hold(others))
    with pytest.raises(AssertionError, match="2 entries of extras"):
        collapsed(x, None)


def test_a_first_argument_that_defaults_to_none_is_given() -> None:
    class Needed(Branching):
        def forward(self, x: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
            if x is None:
                raise ValueError("x is needed")
            y = self.bn(self.conv(x))
            return y if mask is None else y * mask

    network, collapsed = collapse(Needed())
    x = draw(*SIZES[0])
    equal_results(collapsed, network, x)
    assert torch.equal(collapsed(x=x), collapsed(x))
    assert executed(collapsed, x)["b"] == 0
    with pytest.raises(AssertionError, match="x that is given"):
        collapsed()
    with pytest.raises(AssertionError, match="mask"):
        collapsed(x, x)


def test_positional_keyword_and_variadic_arguments() -> None:
    class Many(Branching):
        def forward(self, x: Tensor, /, y: Tensor, *rest: Tensor, z: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + self.bn(self.conv(y)) - z + rest[0]

    network, collapsed = collapse(Many())
    a, b, c, d = (draw(2, 4, 9, n) for n in (7, 7, 7, 7))
    equal_results(collapsed, network, a, b * 2, c * 3, z=d * 4)


def test_further_arguments_that_a_forward_only_hands_on_are_taken_not_to_be_given() -> None:
    class Passes(Branching):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.predict(x, *args, **kwargs) * (1 if "gain" in kwargs or len(args) else kwargs.pop("scale", 3))

        def predict(self, x: Tensor, flip: bool = False, **kwargs: Any) -> Tensor:
            y, mask = self.bn(self.conv(x)), kwargs.get("mask")
            y = y if mask is None else y * mask
            return -y if flip else y

    network, collapsed = collapse(Passes())
    x = draw(*SIZES[0])
    equal_results(collapsed, network, x)
    assert executed(collapsed, x)["b"] == 0
    for arguments in ({"mask": x}, {"scale": 2}):
        with pytest.raises(AssertionError, match=r"\*\*kwargs"):
            collapsed(x, **arguments)
    with pytest.raises(AssertionError, match=r"without \*args"):
        collapsed(x, True)


@pytest.mark.parametrize(
    "forward",
    [lambda m, *xs: sum(m.bn(m.conv(x)) for x in xs), lambda m, **named: [m.bn(m.conv(named[k])) for k in named]],
)
def test_variadic_arguments_that_are_all_there_is_may_be_given(forward: Callable[..., Any]) -> None:
    """Of a network of nothing else, they are what it is a function of: its forward is kept."""
    network, collapsed = collapse(type("Variadic", (Branching,), {"forward": forward})())
    a, b = draw(*SIZES[0]), draw(*SIZES[0])
    for inputs in ((a,), (a, b)):
        arguments = {"x": inputs[0], "y": inputs[-1]} if "named" in forward.__code__.co_varnames else {}
        equal_results(collapsed, network, *(() if arguments else inputs), **arguments)


def test_further_arguments_that_are_never_looked_at_may_be_given() -> None:
    class Ignores(Branching):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.bn(self.conv(x))

    network, collapsed = collapse(Ignores())
    equal_results(collapsed, network, draw(*SIZES[0]), 3, mask=None)


def test_one_activation_in_many_places_is_found_under_every_name() -> None:
    """One module object under several names, of which a sub-module that is kept whole bears the first."""

    class Keeps(Branching):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.act = act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(x))) if bool(x.isfinite().all()) else x

    act = nn.SiLU()
    network, collapsed = collapse(nn.Sequential(Keeps(act), conv(), bn(), act))
    equal_results(collapsed, network, draw(*SIZES[0]))
    assert (collapsed.report.before["bn"], collapsed.report.after["bn"]) == (2, 0)


def test_structured_inputs() -> None:
    class Structured(Branching):
        def forward(self, inputs: dict[str, Any]) -> Tensor:
            pair = inputs["pair"]
            return self.bn(self.conv(inputs["image"])) + pair[0] * pair[1]

    network, collapsed = collapse(Structured())
    x = draw(*SIZES[0])
    equal_results(collapsed, network, {"image": x, "pair": (x, [2][0])})
    assert collapsed.report.after["bn"] == 0


def of_conv(body: Callable[[Any, Tensor, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    return lambda m, x: body(m, x, m.conv(x))


OUTPUTS = {
    "tuple": lambda m, x, h: (h, m.bn(h)),
    "list": lambda m, x, h: [m.bn(h), x],
    "dict": lambda m, x, h: {"out": m.bn(h), "aux": h.relu(), "none": None, "number": 3},
    "nested": lambda m, x, h: {"a": [h, (x, None)], "b": ({"c": m.bn(h)},)},
    "named tuple": lambda m, x, h: Pair(m.bn(h), h.mean()),
    "the same twice": lambda m, x, h: (m.bn(h),) * 2,
    "pieces": lambda m, x, h: m.bn(h).chunk(2, 1),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_results_of_any_structure(name: str) -> None:
    network, collapsed = collapse(Net(of_conv(OUTPUTS[name]), conv=conv(), bn=bn()))
    for size in SIZES:
        equal_results(collapsed, network, draw(*size))
    assert executed(collapsed, draw(*SIZES[0]))["c"] == 1


# What parameters alone compute


class ComputedWeight(nn.Module):
    """Shapes of a computed weight are read, unpacked and iterated; its pieces are weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(4, 9, 9)), nn.Parameter(torch.randn(8, 4, 9))
        self.register_buffer("mask", (torch.rand(8, 4, 3, 3) > 0.3).float())
        self.bn = bn(8)

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.einsum("cms,ocm->ocs", self.left, self.right)
        kernel = kernel.reshape(*kernel.shape[:2], 3, 3) * self.mask
        first, second = (k / k.size(0) for k in kernel.chunk(2))
        return self.bn(
            torch.cat([F.conv2d(x, first, padding=1), F.conv2d(x, second, padding=len(second.shape) // 4)], 1)
        )


def test_a_weight_that_is_computed_in_pieces_is_a_weight() -> None:
    network, collapsed = collapse(ComputedWeight())
    for size in SIZES:
        equal_results(collapsed, network, draw(*size))
    assert executed(collapsed, draw(*SIZES[0])) == {"c": 1}


class Written(nn.Module):
    """Writes into a weight, or into a view of it, before it is used."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.bn, self.write = nn.Parameter(torch.randn(4, 4, 3, 3)), bn(), write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.weight)
        return self.bn(F.conv2d(x, self.weight, padding=1))


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "clamp": lambda w: w.data.clamp_(-0.1, 0.1),
    "view": lambda w: w.detach().view(4, 36)[1:].mul_(0.5),
    "item": lambda w: operator.setitem(w.data, (slice(None), slice(None), 1, 1), 0.0),
    "plus": lambda w: operator.iadd(w.data, 1),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_weight_that_the_forward_writes_into_is_not_folded(name: str) -> None:
    network, collapsed = collapse(Written(WRITES[name]))
    before = network.weight.clone()
    expected = copy.deepcopy(network).eval()
    with torch.no_grad():
        for size in SIZES:
            assert relative_error(collapsed(draw(*size)), expected(draw(*size))) <= TOLERANCE
    assert torch.equal(network.weight, before)


class FromBuffers(nn.Module):
    """A gain that is computed from buffers: in float32 it must be known to more than their seven digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: Tensor) -> Tensor:
        gain = 1 / torch.sqrt(self.bn.running_var + self.bn.eps)
        shift = -(self.bn.running_mean.double() * gain.T if gain.ndim > 1 else self.bn.running_mean * gain)
        return self.conv(x) * gain[None, :, None, None] + shift.view(1, -1, 1, 1)


def test_what_buffers_compute_is_folded_in_float64() -> None:
    network = Case("buffers", FromBuffers).network().float().eval()
    collapsed = fxrep.reparameterize(network)
    assert executed(collapsed, draw(*SIZES[0]).float()) == {"c": 1}
    (layer,) = (m for m in collapsed.modules() if isinstance(m, nn.Conv2d))
    gain = 1 / (network.bn.running_var.double() + network.bn.eps).sqrt()
    exact = network.conv.weight.double() * gain.view(-1, 1, 1, 1)
    assert torch.equal(layer.weight, exact.float())


class RotatedByTable(nn.Module):
    """Rotary position embedding: each block takes sine and cosine out of one table, anew."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.register_buffer("table", torch.rand(1, 2, 9, 13), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        for _ in range(3):
            sine, cosine = self.table.split(1, 1)
            x = x * cosine + x.flip(1) * sine
        return x


def test_pieces_of_a_buffer_are_no_constants_of_their_own() -> None:
    network, collapsed = collapse(RotatedByTable())
    assert {name: t.shape for name, t in collapsed.named_buffers()} == {"table": (1, 2, 9, 13)}
    equal_results(collapsed, network, draw(2, 4, 9, 13))
    network.table.mul_(0.5)
    collapsed.table.mul_(0.5)
    equal_results(collapsed, network, draw(2, 4, 9, 13))
