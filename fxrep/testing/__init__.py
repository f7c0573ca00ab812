"""Random networks for property tests: `networks()`, `inputs_for(network)`, and the programs they are decoded from.

    @given(st.data())
    def test_mine(data):
        network = data.draw(networks())
        inputs = data.draw(inputs_for(network))  # new tensors each time they are unpacked: network(*inputs)

A program is a list of steps in which every operand and option is an integer modulo what there is, so that any program
is a valid network, and stays one when a step is left out: failing examples shrink to a few readable lines.
"""

from __future__ import annotations

try:
    import hypothesis  # noqa: F401
except ImportError:
    raise ImportError('fxrep.testing needs Hypothesis: pip install "fxrep[test]"') from None

from fxrep.testing.program import Network, Program, decode
from fxrep.testing.strategies import Inputs, constant_scales, inputs_for, networks, programs
from fxrep.testing.writer import OPS, Step

__all__ = [
    "OPS", "Inputs", "Network", "Program", "Step", "constant_scales", "decode", "inputs_for", "networks", "programs",
]  # fmt: skip
