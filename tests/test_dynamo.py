"""`torch.compile` with fxrep as its backend, and of what fxrep gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from helpers import randomise, relative_error
from reader_cases import Net, bn, conv
from test_exported import Counts, image
from torch import Tensor, nn
from torch.fx import GraphModule

import fxrep
from fxrep.census import census
from fxrep.dynamo import backend

EAGER = {"then": "eager"}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def block() -> nn.Module:
    body = {"wide": conv(bias=False), "norm": bn(), "side": conv(1)}
    return randomise(Net(lambda m, x: (m.norm(m.wide(x)) + m.side(x) + x).relu(), **body).double()).eval()


def test_is_registered_as_a_backend_of_dynamo() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["torch_dynamo_backends"]["fxrep"].partition(":")
    assert getattr(__import__(module, fromlist=[name]), name) is backend


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_captured_runs_collapsed_at_every_size(dynamic: bool | None, mode: Any) -> None:
    network, seen = block(), []

    def then(collapsed: GraphModule, _: Any) -> Any:
        seen.append(census(collapsed.graph, dict(collapsed.named_modules())))
        return collapsed.forward

    compiled = torch.compile(network, backend=backend, options={"then": then}, dynamic=dynamic, fullgraph=True)
    for x in (image(2, 4, 6, 6), image(3, 4, 9, 7), image(5, 4, 8, 11)):
        with mode():
            assert relative_error(compiled(x), network(x)) < 1e-12
    assert seen
    assert all((counts["conv"], counts["bn"], counts["add"]) == (1, 0, 0) for counts in seen)


def test_buffers_that_the_forward_writes_are_still_written() -> None:
    network = randomise(Counts().double()).eval()
    original, compiled = copy.deepcopy(network), torch.compile(network, backend=backend, options=EAGER)
    with torch.no_grad():
        for call in (1, 2):
            assert relative_error(compiled(image(2, 4, 6, 6))["value"], original(image(2, 4, 6, 6))["value"]) < 1e-12
            assert network.calls == call


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "replaced"])
def test_weights_that_changed_are_told_and_not_used(change: str) -> None:
    network = block()
    compiled = torch.compile(network, backend=backend, options=EAGER)
    with torch.no_grad():
        compiled(image(2, 4, 6, 6))
        if change == "in place":
            network.wide.weight.mul_(2)
        elif change == "load_state_dict":
            network.load_state_dict(randomise(copy.deepcopy(network), seed=3).state_dict())
        else:
            network.wide.weight = nn.Parameter(network.wide.weight * 2)
        with pytest.raises(fxrep.FxrepError, match=r"torch\.compiler\.reset"):
            compiled(image(2, 4, 6, 6))
        torch.compiler.reset()
        assert relative_error(compiled(image(2, 4, 6, 6)), network(image(2, 4, 6, 6))) < 1e-12


def test_where_gradients_are_wanted_nothing_is_frozen() -> None:
    network = block()
    compiled = torch.compile(network, backend=backend, options=EAGER)
    with pytest.warns(UserWarning, match="freezes weights"):
        compiled(image(2, 4, 6, 6)).sum().backward()
    got = network.wide.weight.grad.clone()
    network.zero_grad()
    network(image(2, 4, 6, 6)).sum().backward()
    assert relative_error(got, network.wide.weight.grad) < 1e-12


def test_options_that_the_next_backend_does_not_take_are_refused() -> None:
    with pytest.raises(Exception, match="leave out"), torch.no_grad():
        torch.compile(block(), backend=backend, options={**EAGER, "max_autotune": True})(image(2, 4, 6, 6))


class Broken(nn.Module):
    """Two graphs: a number is printed between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(), block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


def breaks_of(network: nn.Module) -> int:
    torch._dynamo.reset()
    with torch.no_grad():
        return int(torch._dynamo.explain(network)(image(2, 4, 6, 6)).graph_break_count)


def test_a_collapsed_network_compiles_with_no_more_graph_breaks() -> None:
    network, x = block(), image(2, 4, 6, 6)
    whole = torch.compile(fxrep.reparameterize(network), backend="eager", fullgraph=True)
    assert relative_error(whole(x), network(x)) < 1e-12
    broken = Broken().double().eval()
    assert breaks_of(broken) == 1
    assert breaks_of(fxrep.reparameterize(broken)) <= 1
