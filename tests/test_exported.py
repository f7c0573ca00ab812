"""Programs of torch.export: collapsed like modules, in both dialects, with signature, sizes and state as they were."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from helpers import randomise, relative_error
from reader_cases import Net, bn, branches, conv, linear
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram, export

import fxrep
from fxrep.readers import registered
from fxrep.readers.registry import First

AUTO: Any = Dim.AUTO
DIALECTS = pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def padded(m: Any, x: Tensor) -> Tensor:
    y = m.valid(F.pad(x, (1, 1, 1, 1))) + m.point(x)
    return m.point(F.pad(y.relu(), (1, 1, 1, 1), mode="reflect")) + m.point(
        F.pad(y.tanh(), (1, 1, 1, 1), mode="replicate")
    )


def channels(m: Any, x: Tensor) -> Tensor:
    left, right = m.wide(x).split([5, 3], 1)
    return m.mixed(torch.cat([left, m.three(right)[:, :2]], 1))


def tokens(m: Any, x: Tensor) -> Tensor:
    y = m.first(x.flatten(2).transpose(1, 2))
    return m.norm(m.second(y).flatten(0, 1)).reshape_as(y).relu() + y * torch.ones(4, dtype=x.dtype)


#: Networks on (2, 4, 10, 8), and the calls of conv, linear and batch norm that are left of them.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "repvgg": (branches(nn.Sequential(conv(), bn()), nn.Sequential(conv(1), bn()), bn()), (1, 0, 0)),
    "chain": (lambda: nn.Sequential(conv(bias=False), bn(), nn.ReLU(), conv(3, groups=2), bn()), (2, 0, 0)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), bn(6), nn.ReLU()), (1, 0, 0)),
    "pads": (lambda: Net(padded, valid=conv(padding=0), point=conv(1)), (3, 0, 0)),
    "channels": (lambda: Net(channels, wide=conv(out=8), three=conv(1, 3, 3), mixed=conv(1, 7)), (1, 0, 0)),
    "norm and identity": (lambda: Net(lambda m, x: m.bn(y := x.relu()) + y, bn=bn()), (0, 0, 0)),
    # as one layer they would have 16 taps in place of 9
    "averages": (lambda: nn.Sequential(conv(), nn.AvgPool2d(2), bn(), nn.ReLU(inplace=True)), (1, 0, 1)),
    "averages beside": (lambda: Net(
        lambda m, x: m.bn(m.pool(m.point(x)) + m.conv(x)), point=conv(1), pool=nn.AvgPool2d(2),
        conv=conv(2, padding=0, stride=2), bn=bn(),
    ), (1, 0, 0)),
    "linear": (lambda: Net(tokens, first=linear(), second=linear(), norm=bn(dims=1)), (0, 2, 0)),
}  # fmt: skip


def program_of(network: nn.Module, x: Tensor, decomposed: bool, *free: int) -> ExportedProgram:
    program = export(network, (x,), dynamic_shapes=(dict.fromkeys(free, AUTO),))
    return program.run_decompositions() if decomposed else program


def loaded(program: ExportedProgram) -> ExportedProgram:
    """As somebody else gets it: through a file."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def left(program: Any) -> tuple[int, ...]:
    return tuple(program.report.after[kind] for kind in ("conv", "linear", "bn"))


@DIALECTS
@pytest.mark.parametrize("name", NETWORKS)
def test_is_collapsed_and_equal_at_sizes_that_were_not_traced(name: str, decomposed: bool) -> None:
    build, most = NETWORKS[name]
    network = randomise(build().double()).eval()
    program = program_of(network, image(2, 4, 10, 8), decomposed, 0, 2, 3)
    collapsed = fxrep.reparameterize(program)
    assert left(collapsed) <= most, collapsed.report
    again = loaded(collapsed).module()
    for size in ((2, 4, 10, 8), (5, 4, 6, 14)):
        assert relative_error(again(image(*size)), network(image(*size))) < 1e-12


def shuffled(m: Any, x: Tensor) -> Tensor:
    return m.after(torch.channel_shuffle(m.before(x), 2))


def bordered(mode: str) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(conv(1), conv(padding_mode=mode), bn())


#: What decomposition takes apart into several ops.
TAKEN_APART: dict[str, Callable[[], nn.Module]] = {
    "reflection": bordered("reflect"), "replication": bordered("replicate"),
    "uneven reflection": lambda: nn.Sequential(conv(1), nn.ReflectionPad2d((0, 2, 1, 0)), conv(padding=0), bn()),
    "sum of a stack": lambda: Net(lambda m, x: torch.stack([m.a(x), m.b(x), x]).sum(0), a=conv(), b=conv(1)),
    "mean of a stack": lambda: Net(lambda m, x: torch.stack([m.a(x), m.b(x)], 1).mean(1), a=conv(), b=conv(1)),
    "shuffle": lambda: Net(shuffled, before=conv(1, out=8), after=conv(3, 8, padding=0)),
    "channels by an index": lambda: Net(lambda m, x: m.bn(m.a(x)[:, m.order]), a=conv(), bn=bn(),
                                        order=torch.tensor([3, 1, 0, 2])),
    "linear layers": lambda: Net(lambda m, x: m.b(m.a(x)) @ m.c, a=linear(8, 6), b=linear(6, 5),
                                 c=nn.Parameter(torch.randn(5, 3))),
    "a norm of the channels moved to axis one": lambda: Net(
        lambda m, x: m.bn(m.a(x.mean(1)).transpose(1, 2)).transpose(1, 2), a=linear(8, 6), bn=bn(6, dims=1)),
    "a scaled linear layer": lambda: Net(lambda m, x: m.gain * m.a(x) + x, a=linear(8, 8),
                                         gain=nn.Parameter(torch.randn(8))),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN_APART)
def test_as_much_collapses_of_what_decomposition_takes_apart(name: str) -> None:
    network, x = randomise(TAKEN_APART[name]().double()).eval(), image(2, 4, 10, 8)
    collapsed = fxrep.reparameterize(program_of(network, x, decomposed=True))
    assert left(collapsed) == left(fxrep.reparameterize(network, x))
    assert sum(left(collapsed)) == 1
    assert relative_error(collapsed.module()(x), network(x)) < 1e-12


def test_an_index_that_is_no_border_stays() -> None:
    order = torch.tensor([0, 2, 1, 3, 4, 5, 6, 7])
    network, x = (
        randomise(Net(lambda m, x: m.b(m.a(x)[..., order]), a=conv(1), b=conv()).double()).eval(),
        image(2, 4, 10, 8),
    )
    collapsed = fxrep.reparameterize(program_of(network, x, decomposed=True))
    assert left(collapsed) == (2, 0, 0)
    assert relative_error(collapsed.module()(x), network(x)) < 1e-12


def real(name: str) -> nn.Module:
    build = timm.create_model if name in ("repvgg_a0", "fastvit_t8", "mobileone_s0") else torchvision.models.get_model
    return randomise(build(name)).double().eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg_a0", "fastvit_t8", "mobileone_s0", "resnet18", "mobilenet_v3_small"])
def test_published_networks_are_left_with_what_their_modules_are_left_with(name: str) -> None:
    network = real(name)
    collapsed = fxrep.reparameterize(program_of(network, image(2, 3, 64, 64), False, 0))
    assert left(collapsed) == left(fxrep.reparameterize(network))
    assert relative_error(collapsed.module()(image(3, 3, 64, 64)), network(image(3, 3, 64, 64))) < 1e-12


class Counts(nn.Module):
    """A buffer that every call writes, one that is not saved, and several outputs under names."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.side = conv(bias=False), bn(), conv(1)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("place", torch.rand(4, 1, 1), persistent=False)

    def forward(self, x: Tensor, double: bool = False) -> dict[str, Tensor]:
        self.calls.add_(1)
        y = self.norm(self.body(x)) + self.side(x)
        return {"value": y.relu() * self.place * (2 if double else 1), "calls": self.calls * 1}


@DIALECTS
def test_written_buffers_are_still_written_and_the_program_given_is_not_touched(decomposed: bool) -> None:
    network = randomise(Counts().double()).eval()
    shapes = {"x": {0: AUTO}, "double": None}
    program = export(network, (image(2, 4, 6, 6),), {"double": True}, dynamic_shapes=shapes)
    program = program.run_decompositions() if decomposed else program
    before = str(program), {name: t.clone() for name, t in program.state_dict.items()}
    collapsed = fxrep.reparameterize(program)
    assert left(collapsed) == (1, 0, 0)
    assert collapsed.range_constraints == program.range_constraints
    runs, original = loaded(collapsed).module(), copy.deepcopy(network)  # the program's state is the network's own
    for call in (1, 2):
        got, expected = runs(image(3, 4, 6, 6), double=True), original(image(3, 4, 6, 6), double=True)
        assert relative_error(got["value"], expected["value"]) < 1e-12
        assert got["calls"] == call
    assert str(program) == before[0]
    assert all(torch.equal(program.state_dict[name], t) for name, t in before[1].items())
    mine = {t.data_ptr() for t in collapsed.state_dict.values()}
    assert mine.isdisjoint(t.data_ptr() for t in program.state_dict.values())


@DIALECTS
def test_a_batch_norm_in_training_stays_and_goes_on_learning(decomposed: bool) -> None:
    network = randomise(nn.Sequential(conv(bias=False), bn(), conv(1)).double()).train()
    program = program_of(network, image(4, 4, 6, 6), decomposed)
    collapsed = fxrep.reparameterize(program)
    assert collapsed.report.after["bn"] == 1
    assert [r.code for r in collapsed.report.refusals] == ["batch-statistics"]
    runs, original = collapsed.module(), copy.deepcopy(network)
    got, expected = runs(image(4, 4, 6, 6)), original(image(4, 4, 6, 6))
    assert relative_error(got, expected) < 1e-12
    means = dict(runs.named_buffers())["1.running_mean"], original[1].running_mean
    assert relative_error(*means) < 1e-12
    assert not torch.equal(means[1], network[1].running_mean)


def test_explain_tells_the_same_and_a_second_pass_finds_nothing() -> None:
    network = randomise(NETWORKS["repvgg"][0]().double()).eval()
    program = program_of(network, image(2, 4, 10, 8), False)
    collapsed = fxrep.reparameterize(program)
    assert fxrep.explain(program).after == collapsed.report.after
    assert not fxrep.reparameterize(collapsed).report.collapses


@pytest.mark.parametrize(
    "option", [{"example_inputs": image(1, 4, 6, 6)}, {"inplace": True}], ids=lambda o: next(iter(o))
)
def test_options_that_are_for_modules_are_refused(option: dict[str, Any]) -> None:
    program = program_of(conv().double(), image(2, 4, 10, 8), False)
    with pytest.raises(fxrep.FxrepError, match=next(iter(option))):
        fxrep.reparameterize(program, **option)


def others(m: Any, x: Tensor) -> Tensor:
    return F.linear(m.linear(x).detach(), m.linear.weight) * torch.tensor([1.0, 2, 3, 4], dtype=x.dtype)


def test_every_aten_op_that_is_registered_is_in_a_program() -> None:
    given: list[tuple[nn.Module, Tensor]] = [(build().eval(), image(2, 4, 10, 8)) for build, _ in NETWORKS.values()]
    given += [(bn().train(), image(2, 4, 10, 8)), (Net(others, linear=linear()), image(2, 7, 4))]
    programs = [program_of(network.double(), x, decomposed) for network, x in given for decomposed in (False, True)]
    found = {node.target for program in programs for node in program.graph.nodes}
    aten = [t.target if isinstance(t, First) else t for t in registered() if isinstance(t, (OpOverload, First))]
    assert aten
    assert not {str(op) for op in aten if op not in found}
