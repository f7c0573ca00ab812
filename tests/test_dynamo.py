"""`torch.compile` with fxrep as its backend, and of what fxrep gives."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from helpers import randomise, relative_error
from reader_cases import Net, bn, conv
from test_exported import Counts, image
from torch import Tensor, nn
from torch._inductor import cpp_builder
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


# How many graphs a network falls into, before and after


def printing(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    print(end="")
    return m.second(y)


def broken(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    torch._dynamo.graph_break()
    return m.second(y)


def deciding(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return m.second(y) if y.sum() > 0 else m.second(-y)


def measuring(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return m.second(y / y.abs().max().item())


def listing(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return m.second(y) * (y.argmax().tolist() % 7)


def counting(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return m.second(y) * (y > 0).nonzero().shape[0]


def through_numpy(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return m.second(y) + float(y.detach().numpy().sum())


def sized(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return m.second(y[..., :5] if y.shape[-1] > 5 else y)


def looped(m: Any, x: Tensor) -> Tensor:
    found = []
    for layer in (m.first, m.second):
        found.append(layer(x))
    return torch.stack(found).sum(0)


BREAKING = (printing, broken, deciding, measuring, listing, counting, through_numpy)
WHOLE = (sized, looped)


def graphs_of(network: nn.Module, x: Tensor) -> int:
    """How many graphs are handed to a backend when it is called, as Dynamo's own explanation has it too."""
    torch._dynamo.reset()
    captured: list[GraphModule] = []

    def counting_backend(graph: GraphModule, _: Any) -> Any:
        captured.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(network, backend=counting_backend)(x)
        torch._dynamo.reset()
        assert torch._dynamo.explain(network)(x).graph_count == len(captured)
    return len(captured)


@pytest.mark.parametrize("forward", [*BREAKING, *WHOLE])
def test_a_collapsed_network_falls_into_no_more_graphs(forward: Any) -> None:
    network, x = Net(forward, first=block(), second=block()).eval(), image(2, 4, 6, 6)
    collapsed = fxrep.reparameterize(network)
    before, after = graphs_of(network, x), graphs_of(collapsed, x)
    assert before == (2 if forward in BREAKING else 1)
    assert 1 <= after <= before
    with torch.no_grad():
        assert relative_error(torch.compile(collapsed, backend="eager")(x), network(x)) < 1e-12


def test_most_of_them_collapse() -> None:
    networks = (Net(f, first=block(), second=block()).eval() for f in (*BREAKING, *WHOLE))
    left = [fxrep.reparameterize(n).report.after["bn"] for n in networks]
    assert sum(not n for n in left) >= 6


def test_a_collapsed_network_compiles_as_one_graph() -> None:
    network, x = block(), image(2, 4, 6, 6)
    whole = torch.compile(fxrep.reparameterize(network), backend="eager", fullgraph=True)
    assert relative_error(whole(x), network(x)) < 1e-12


BY_NAME = """
import torch
from torch import nn
from torch._inductor import metrics

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
net[1].running_mean.normal_(), net[1].running_var.uniform_(0.5, 2)
x = torch.randn(2, 3, 12, 10)
with torch.no_grad():
    compiled = torch.compile(net, backend="fxrep", fullgraph=True)
    assert torch.allclose(compiled(x), net(x), atol=1e-5)
    net[1].weight.mul_(2)
    try:
        compiled(x)
    except Exception as error:
        assert "changed after it was folded" in str(error), error
    else:
        raise AssertionError("a weight that was folded in changed unseen")
print("kernels", metrics.generated_kernel_count)
"""


def compiles_cpp() -> bool:
    try:
        return bool(cpp_builder.get_cpp_compiler())
    except Exception:  # torch has one of its own for it
        return False


def is_installed() -> bool:
    return any(e.name == "fxrep" for e in entry_points(group="torch_dynamo_backends"))


@pytest.mark.skipif(not is_installed(), reason="fxrep is not installed, and its entry points are not known")
@pytest.mark.skipif(not compiles_cpp(), reason="there is no C++ compiler for Inductor")
def test_by_name_through_inductor(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", BY_NAME], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kernels = int(done.stdout.split()[-1])
    assert kernels > 0
