"""The strategies themselves: what they draw is always valid, survives the loss of any step, and is of every kind."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import drawn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxrep.testing import OPS, Inputs, Network, Program, Step, decode, inputs_for, networks, programs
from fxrep.testing.layers import conv
from fxrep.testing.writer import INPUTS, op

ANYTHING = st.builds(
    Step, st.sampled_from(sorted(OPS)), st.integers(0, 99), st.integers(0, 99),
    st.lists(st.integers(0, 99), max_size=14).map(tuple),
)  # fmt: skip
ANY_PROGRAM = st.builds(
    Program, st.sampled_from(sorted(INPUTS)), st.integers(1, 8), st.lists(ANYTHING, max_size=8).map(tuple),
    st.integers(1, 2), st.integers(0, 99), st.booleans(),
)  # fmt: skip


def run(network: Network, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        outputs = network(*inputs)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def smallest_and_largest(program: Program) -> list[Inputs]:
    bounds = [[end(axis) for axis in INPUTS[program.input]] for end in (min, max)]
    tokens = program.input == "tokens"
    shapes = [(2, *b, program.channels) if tokens else (2, program.channels, *b) for b in bounds]
    return [Inputs(shape, program.inputs) for shape in shapes]


@given(ANY_PROGRAM)
def test_any_integers_are_a_network_that_runs_at_every_size(program: Program):
    network = decode(program)
    for inputs in smallest_and_largest(program):
        assert all(torch.isfinite(output).all() for output in run(network, inputs))


@given(st.data())
def test_a_program_stays_valid_without_any_of_its_steps(data: st.DataObject):
    program = data.draw(programs(max_phrases=2))
    for index in range(len(program.steps)):
        shorter = program.without(index)
        assert len(shorter.steps) == len(program.steps) - 1
        run(decode(shorter), smallest_and_largest(shorter)[0])


@given(st.data())
def test_inputs_are_accepted_and_drawn_anew_each_time(data: st.DataObject):
    network = data.draw(networks(max_phrases=2))
    inputs = data.draw(inputs_for(network))
    first, second = tuple(inputs), tuple(inputs)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(first, second, strict=True))
    run(network, inputs)


@given(programs(max_phrases=3))
def test_both_spellings_compute_the_same(program: Program):
    inputs = smallest_and_largest(program)[0]
    modules, functions = (run(decode(replace(program, functional=f)), inputs) for f in (False, True))
    assert len(modules) == len(functions)
    for a, b in zip(modules, functions, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@given(networks(max_phrases=3))
def test_a_network_traces_pickles_and_leaves_the_random_state(network: Network):
    state = torch.get_rng_state()
    inputs = smallest_and_largest(network.program)[0]
    again = [decode(network.program), pickle.loads(pickle.dumps(network)), fx.symbolic_trace(network)]
    assert torch.equal(torch.get_rng_state(), state)
    if any(f" {sign}= " in network.source for sign in "+-*/"):
        again.pop()  # fx alone takes an augmented assignment for a new value
    for twin in again:
        for a, b in zip(run(twin, inputs), run(network, inputs), strict=True):
            assert torch.equal(a, b)


@given(networks(max_phrases=2))
def test_what_is_printed_is_a_module(network: Network):
    names: dict[str, object] = {"torch": torch, "nn": nn, "F": nn.functional}
    exec(repr(network), names)
    printed = names["Net"]().double().eval()
    printed.load_state_dict(network.state_dict())
    inputs = smallest_and_largest(network.program)[0]
    for a, b in zip(run(printed, inputs), run(network, inputs), strict=True):
        assert torch.equal(a, b)


def test_zeros_mean_the_plainest_form():
    program = Program("2d", 4, (Step("conv"), Step("bn"), Step("add", other=1)))
    assert decode(program).source == (
        "def build(self):\n"
        "    self.conv1 = nn.Conv2d(4, 4, 1, bias=False)\n"
        "    self.bn3 = nn.BatchNorm2d(4)\n"
        "    return self\n"
        "def forward(self, x):\n"
        "    v2 = self.conv1(x)\n"
        "    v4 = self.bn3(v2)\n"
        "    v5 = v4 + v2\n"
        "    return v5\n"
    )


def test_batch_norms_are_not_at_their_defaults():
    bn = decode(Program("1d", 6, (Step("bn"),))).get_submodule("bn1")
    assert isinstance(bn, nn.BatchNorm1d)
    for tensor, default in ((bn.running_mean, 0), (bn.running_var, 1), (bn.weight, 1), (bn.bias, 0)):
        assert (tensor != default).all()


def test_two_ops_of_one_name_are_refused():
    with pytest.raises(ValueError, match="there already is an op 'conv'"):
        op(conv)


def test_hypothesis_is_asked_for_by_its_command():
    """In a process where it cannot be imported."""
    code = "import sys; sys.modules['hypothesis'] = None; import fxrep.testing"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'ImportError: fxrep.testing needs Hypothesis: pip install "fxrep[test]"' in done.stderr


@pytest.fixture(scope="module")
def batch() -> list[Network]:
    """A fixed batch of what `networks()` draws."""
    return drawn(networks(), number=500, by_seed=0)


def test_every_op_and_every_kind_of_input_is_drawn(batch: list[Network]):
    ops = Counter(name for network in batch for name in {s.op for s in network.program.steps})
    assert min(ops[name] for name in OPS) >= 10, ops
    kinds = Counter(network.program.input for network in batch)
    assert min(kinds[kind] for kind in INPUTS) >= 25, kinds
    assert sum(network.program.inputs == 2 for network in batch) >= 25
    assert sum(len(network.program.steps) for network in batch) >= 3000


OFTEN = (
    "nn.Conv2d", "nn.Linear", "nn.BatchNorm", "F.batch_norm", "bias=False", "groups=", "dilation=2", "torch.cat(",
    " += ", "alpha=", "nn.Parameter", "register_buffer", "affine=False", "F.pad", ".mean(",
)  # fmt: skip
AT_TIMES = (
    "nn.Conv1d", "nn.Conv3d", "nn.ConvTranspose", "F.conv1d", "F.conv2d", "F.conv3d", "F.linear", "stride=2",
    "AvgPool", "padding='same'", "padding_mode=", "mode='reflect'", "mode='replicate'", "mode='circular'",
    "F.avg_pool", "MaxPool", "track_running_stats=False", "count_include_pad=False", "ceil_mode=True", ".chunk(",
    "torch.split", ".narrow(", "index_select", "ChannelShuffle", "torch.stack", "torch.rsub", "sum([", " -= ",
    " *= ", ".add_(", ".sub_(", ".mul_(", "inplace=True", "nn.Dropout", "nn.Identity", ".detach()", ".clone()",
    "LeakyReLU", "torch.tanh", "torch.sigmoid", "reshape_as", "permute", ".transpose(", "flatten",
    ".shape[",
    ".size(", "torch._assert", ".weight = self.",
)  # fmt: skip


@pytest.mark.parametrize(("text", "least"), [*((text, 30) for text in OFTEN), *((text, 4) for text in AT_TIMES)])
def test_every_spelling_is_drawn(batch: list[Network], text: str, least: int):
    assert sum(text in network.source for network in batch) >= least


def test_layers_and_values_are_shared(batch: list[Network]):
    called_twice = [n for n in batch if any(n.source.count(f"self.{m}(") > 1 for m, _ in n.named_children())]
    assert len(called_twice) >= 20
    assert sum("return (" in network.source for network in batch) >= 100
