"""The numbers that the examples print, computed again in float64 without their help."""

import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxrep

EXAMPLES = Path(__file__).parents[1] / "examples"
TOLERANCE = 1e-10

TABLE = [
    [5.4, 9.3, 9.9, 11.2, 6.7],
    [13.6, 13.9, 12.8, 11.2, 6.8],
    [17.6, 14.6, 12.6, 13.6, 6.1],
    [9.0, 15.4, 19.1, 15.5, 8.1],
    [10.6, 13.8, 16.9, 18.9, 12.6],
]


@pytest.fixture(autouse=True)
def seeded_and_without_gradients(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        yield


def example(name: str) -> ModuleType:
    """examples/`name`.py, imported as running it would."""
    module = importlib.import_module(name)
    assert Path(module.__file__).parent == EXAMPLES
    return module


class CountCalls(TorchDispatchMode):
    """What really runs, whatever the modules are called: how often each aten op does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def executed(net: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """Convolutions, batch norms and adds of one forward."""
    with CountCalls() as counter:
        net(x)
    calls = counter.calls
    norms = sum(count for op, count in calls.items() if "batch_norm" in op)
    return calls["convolution"], norms, calls["add"] + calls["add_"]


def convolve(image: Tensor, weight: Tensor, bias: Tensor | None, pad: int) -> Tensor:
    """A convolution of stride 1, term by term."""
    height, width = image.shape[1:]
    size = weight.shape[-1]
    out = torch.zeros(weight.shape[0], height + 2 * pad - size + 1, width + 2 * pad - size + 1, dtype=torch.float64)
    for o, row, column in torch.cartesian_prod(*(torch.arange(extent) for extent in out.shape)).tolist():
        total = 0.0 if bias is None else bias[o].item()
        for c, u, v in torch.cartesian_prod(*(torch.arange(extent) for extent in weight.shape[1:])).tolist():
            y, x = row + u - pad, column + v - pad
            if 0 <= y < height and 0 <= x < width:
                total += weight[o, c, u, v].item() * image[c, y, x].item()
        out[o, row, column] = total
    return out


def fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of bn ∘ conv."""
    gain = bn.weight / (bn.running_var + bn.eps).sqrt()
    bias = torch.zeros_like(gain) if conv.bias is None else conv.bias
    return conv.weight * gain.reshape(-1, 1, 1, 1), (bias - bn.running_mean) * gain + bn.bias


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert got.dtype == want.dtype == torch.float64
    return ((got - want).abs().max() / want.abs().max()).item()


def the_conv(net: nn.Module) -> nn.Conv2d:
    (conv,) = (module for module in net.modules() if isinstance(module, nn.Conv2d))
    return conv


def test_both_forms_of_the_5x5_sum_print_the_same_table():
    arithmetic = example("arithmetic")
    image = torch.tensor([[arithmetic.IMAGE]], dtype=torch.float64)
    kernel = torch.tensor(arithmetic.KERNEL, dtype=torch.float64)
    table = torch.tensor(TABLE, dtype=torch.float64)
    by_loops = convolve(image[0], kernel[None, None], None, pad=1)[0] + 0.7 * image[0, 0]
    assert relative_error(by_loops, table) <= TOLERANCE

    branches = arithmetic.TwoBranches()
    collapsed = fxrep.reparameterize(branches)
    for net in (branches, collapsed):
        assert relative_error(net(image)[0, 0], table) <= TOLERANCE
    assert executed(branches, image) == (2, 0, 1)
    assert executed(collapsed, image) == (1, 0, 0)

    kernel[1, 1] += 0.7
    assert relative_error(the_conv(collapsed).weight[0, 0], kernel) <= TOLERANCE


def test_conv_bn_becomes_one_convolution():
    net = example("arithmetic").conv_bn()
    collapsed = fxrep.reparameterize(net)
    x = torch.randn(1, 32, 224, 224, dtype=torch.float64)
    assert relative_error(collapsed(x), net(x)) <= TOLERANCE
    assert executed(net, x) == (1, 1, 0)
    assert executed(collapsed, x) == (1, 0, 0)
    weight, bias = fold(*net)
    assert relative_error(the_conv(collapsed).weight, weight) <= TOLERANCE
    assert relative_error(the_conv(collapsed).bias, bias) <= TOLERANCE


def test_same_padding_pointwise_and_identity_become_one_convolution():
    same_padding = example("same_padding")
    net = same_padding.SamePadding().double()
    collapsed = fxrep.reparameterize(net)
    image = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    dense, pointwise = (convolve(image[0], c.weight, c.bias, p) for c, p in ((net.dense, 1), (net.pointwise, 0)))
    assert relative_error(collapsed(image)[0], dense + pointwise + image[0]) <= TOLERANCE
    assert executed(net, image) == (2, 0, 2)
    assert executed(collapsed, image) == (1, 0, 0)
    for got, want in zip(
        (the_conv(collapsed).weight, the_conv(collapsed).bias), same_padding.by_hand(net), strict=True
    ):
        assert relative_error(got, want) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("RepVGG", (12, 16, 10), (6, 0, 0)),
        ("two unpadded 3x3", (2, 2, 1), (1, 0, 0)),
        ("residual", (1, 1, 1), (1, 0, 0)),
    ],
)
def test_designs_out_of_torchvision_collapse(name, before, after):
    pytest.importorskip("torchvision")
    net, shape = example("repvgg_torchvision").designs(c=8)[name]
    collapsed = fxrep.reparameterize(net)
    x = torch.randn(shape, dtype=torch.float64)
    assert not any(hasattr(module, "to_fast") for module in net.modules())
    assert relative_error(collapsed(x), net(x)) <= TOLERANCE
    assert executed(net, x) == before
    assert executed(collapsed, x) == after
    peak_bytes = example("measure").peak_bytes
    assert peak_bytes(collapsed, x) <= peak_bytes(net, x)


def test_residual_adds_one_to_the_centre_taps_of_the_diagonal():
    pytest.importorskip("torchvision")
    net, _ = example("repvgg_torchvision").designs(c=8)["residual"]
    weight, bias = fold(*net.branches[0])
    for channel in range(8):
        weight[channel, channel, 1, 1] += 1
    conv = the_conv(fxrep.reparameterize(net))
    assert relative_error(conv.weight, weight) <= TOLERANCE
    assert relative_error(conv.bias, bias) <= TOLERANCE


def test_peak_bytes_counts_the_tensors_alive_at_once():
    peak_bytes = example("measure").peak_bytes
    x = torch.randn(256)  # 1 KiB
    assert peak_bytes(nn.ReLU(), x) == 1024
    assert peak_bytes(nn.ReLU(inplace=True), x) == 0
    assert peak_bytes(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()), x) == 2048
    assert peak_bytes(nn.Sequential(nn.ReLU(), nn.Flatten(0), nn.ReLU(inplace=True)), x) == 1024


def test_the_biases_of_three_convolutions_add_up():
    net = example("bias_through_batchnorm").ThreeBiases().double()
    collapsed = fxrep.reparameterize(net)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert relative_error(collapsed(x), net(x)) <= TOLERANCE
    assert executed(net, x) == (3, 0, 2)
    assert executed(collapsed, x) == (1, 0, 0)
    assert relative_error(the_conv(collapsed).bias, sum(conv.bias for conv in net.branches)) <= TOLERANCE


def test_the_tutorials_fold_is_off_by_the_bias_times_gain_and_ours_is_not():
    bias_example = example("bias_through_batchnorm")
    net = bias_example.conv_bn()
    conv, bn = net
    assert (bn.running_mean == 5).all()
    assert (bn.running_var == 100).all()
    assert (bn.weight == 5).all()
    assert (bn.bias == 20).all()

    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = (convolve(x[0], conv.weight, conv.bias, pad=1) - 5) / (100 + bn.eps) ** 0.5 * 5 + 20
    assert relative_error(net(x)[0], want) <= TOLERANCE
    assert relative_error(fxrep.reparameterize(net)(x)[0], want) <= TOLERANCE

    lost = (conv.bias * 5 / (100 + bn.eps) ** 0.5).reshape(-1, 1, 1).expand_as(want)
    assert lost.abs().min() > 1e-3
    assert relative_error(want - bias_example.tutorial_fold(conv, bn)(x)[0], lost) <= TOLERANCE
