"""What holds of every network, on random programs; HYPOTHESIS_PROFILE=deep draws 20 000 of them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import drawn
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxrep
from fxrep.testing import Inputs, Network, decode, inputs_for, networks

RELATIVE = 1e-9
ROUNDING = 1e-12  # absolute, for values that cancel to nothing
Case = tuple[Network, list[Inputs], bool]


@st.composite
def cases(draw: st.DrawFn, inputs: int = 1) -> Case:
    """A network, `inputs` inputs of different sizes, and whether it is collapsed with the first as an example."""
    network = draw(networks())
    return network, [draw(inputs_for(network)) for _ in range(inputs)], draw(st.booleans())


def share(part: float) -> Callable[[Any], Any]:
    """A part of the profile's examples, for properties that follow nearly from others."""
    return settings(max_examples=max(int(settings.default.max_examples * part), 1))


def collapse(case: Case) -> Any:
    network, inputs, with_example = case
    return fxrep.reparameterize(network, tuple(inputs[0]) if with_example else None)


def run(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every output, and every input as the network left it: it may write into them."""
    tensors = tuple(inputs)
    with torch.no_grad():
        outputs = network(*tensors)
    return [*(outputs if isinstance(outputs, tuple) else (outputs,)), *tensors]


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert [g.shape for g in got] == [e.shape for e in expected]
    for g, e in zip(got, expected, strict=True):
        assert (g - e).abs().max() <= RELATIVE * e.abs().max() + ROUNDING


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    """The same numbers, but for the last bit: how memory is aligned decides the order of a sum."""
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12, equal_nan=True)


@given(cases(inputs=3))
def test_one_collapse_is_equal_at_every_size(case: Case):
    network, several, _ = case
    collapsed = collapse(case)
    event("collapses", len(collapsed.report.collapses))
    for inputs in several:
        assert_close(run(collapsed, inputs), run(network, inputs))


@share(0.5)
@given(cases())
def test_no_certificate_fails(case: Case):
    """A fold that the certificate stops is a bug of ours, even though nobody sees a wrong number."""
    failed = [r for r in collapse(case).report.refusals if r.code == "certificate-failed"]
    assert not failed, "\n".join(map(str, failed))


@share(0.5)
@given(cases())
def test_nothing_becomes_more(case: Case):
    report = collapse(case).report
    assert report.cost_after <= report.cost_before * (1 + RELATIVE)
    assert layers(report.after) <= layers(report.before)
    assert report.after["bn"] <= report.before["bn"]
    # stack([a, b]).sum(0) may become a + b, and conv(cat(a, b)) conv(a) + conv(b).
    joins = sum(case[0].source.count(f"torch.{name}(") for name in ("stack", "cat", "concat"))
    assert report.after["add"] <= report.before["add"] + joins


def layers(counts: dict[str, int]) -> int:
    """An average pool may become a convolution."""
    return counts["conv"] + counts["linear"] + counts["pool"]


@share(0.5)
@given(cases())
def test_the_second_pass_finds_nothing(case: Case):
    network, inputs, with_example = case
    once = collapse(case)
    twice = collapse((once, inputs, with_example))
    event("collapses", len(once.report.collapses))
    assert twice.report.collapses == ()
    assert twice.report.after == once.report.after
    assert_close(run(twice, inputs[0]), run(network, inputs[0]))


@share(0.3)
@given(cases())
def test_the_original_and_the_random_state_are_untouched(case: Case):
    network = case[0].train(case[0].program.seed % 2 == 0)
    modes = [m.training for m in network.modules()]
    before = [(name, tensor, tensor.clone(), tensor.requires_grad) for name, tensor in tensors(network)]
    random = torch.get_rng_state()
    collapsed = collapse(case)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in network.modules()] == modes
    assert not any(m.training for m in collapsed.modules())
    for (name, tensor, numbers, grad), (now_name, now) in zip(before, tensors(network), strict=True):
        assert name == now_name
        assert now is tensor
        assert torch.equal(now, numbers)
        assert now.requires_grad == grad


def tensors(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]


@share(0.2)
@given(cases())
def test_writing_into_the_result_does_not_reach_the_original(case: Case):
    network, (inputs,), _ = case
    before = run(network, inputs)
    for _, tensor in tensors(collapse(case)):
        tensor.data.fill_(3 if tensor.dtype == torch.int64 else 0.125)
    assert_same(run(network, inputs), before)


def saved_and_loaded(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def with_loaded_state(network: nn.Module) -> nn.Module:
    """A copy whose numbers were all overwritten before it got its state back."""
    state, twin = copy.deepcopy(network.state_dict()), copy.deepcopy(network)
    for _, tensor in tensors(twin):
        tensor.data.fill_(0)
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize(
    "round_trip", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded, with_loaded_state],
    ids=["deepcopy", "pickle", "save", "state_dict"],
)  # fmt: skip
@share(0.1)
@given(case=cases())
def test_the_result_survives(round_trip: Callable[[nn.Module], nn.Module], case: Case):
    collapsed = collapse(case)
    assert_same(run(round_trip(collapsed), case[1][0]), run(collapsed, case[1][0]))


@share(0.4)
@given(cases())
def test_modules_and_functions_collapse_alike(case: Case):
    """With an example, since only the module BatchNorm2d, and not F.batch_norm, says how many axes it takes."""
    network, (inputs,), _ = case
    functional = decode(replace(network.program, functional=True))
    results = [collapse((spelled, [inputs], True)) for spelled in (network, functional)]
    assert results[0].report.after == results[1].report.after
    assert results[0].report.cost_after == pytest.approx(results[1].report.cost_after)
    assert_close(run(results[1], inputs), run(network, inputs))


@pytest.fixture(scope="module")
def batch() -> list[Case]:
    """A fixed batch of cases."""
    return drawn(cases(), number=150, by_seed=1)


def test_the_properties_are_about_something(batch: list[Case]):
    """How many programs of the batch collapse at all, to how many kinds of layers, and how much goes away."""
    reports = [collapse(case).report for case in batch]
    collapses = [c for report in reports for c in report.collapses]
    gone = {kind: sum(r.before[kind] - r.after[kind] for r in reports) for kind in ("conv", "bn", "add")}
    assert sum(bool(report.collapses) for report in reports) >= 60
    assert len(collapses) >= 120
    assert len({c.became.partition("(")[0] for c in collapses}) >= 8
    assert gone["conv"] >= 40
    assert gone["bn"] >= 80
    assert gone["add"] >= 40
