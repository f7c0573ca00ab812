"""verify fails a wrong fold of each kind and says where it is; and what else a verdict tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from torch import Tensor, nn
from torch.fx import GraphModule
from verification_cases import DEVICES, HALF, Branches, Untraceable, build

import fxrep
from fxrep import verify


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# What is wrong fails, and is found


def planted(collapsed: GraphModule, name: str, layer: nn.Module) -> None:
    """Puts a wrong layer where the right one was."""
    layer.fxrep_provenance = getattr(collapsed.get_submodule(name), "fxrep_provenance", ())
    collapsed.set_submodule(name, layer)


def drop_bias(collapsed: GraphModule) -> None:
    collapsed.reparam.bias.data.zero_()


def move_padding(collapsed: GraphModule) -> None:
    right = collapsed.reparam
    right.padding = (0, 0)
    planted(collapsed, "reparam", nn.Sequential(nn.ZeroPad2d((0, 2, 0, 2)), right))


def swap_kernel_axes(collapsed: GraphModule) -> None:
    collapsed.reparam.weight.data = collapsed.reparam.weight.data.transpose(2, 3).contiguous()


def scale_columns(collapsed: GraphModule) -> None:
    gain = torch.linspace(0.5, 1.5, collapsed.reparam.in_channels)
    collapsed.reparam.weight.data *= gain[:, None, None]


def reverse_groups(collapsed: GraphModule) -> None:
    conv = collapsed.reparam
    conv.weight.data = conv.weight.data.unflatten(0, (conv.groups, -1)).flip(0).flatten(0, 1)


def ignore_the_border(collapsed: GraphModule) -> None:
    """A value of the bias's size, added where the padding is: what a fold over a padded bias does."""
    conv = collapsed.reparam
    inside = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1).requires_grad_(False)
    inside.weight.data.copy_(conv.weight.data)
    inside.bias.data.copy_(conv.bias.data)
    planted(collapsed, "reparam", BorderBias(inside))


class BorderBias(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        wrong = F.conv2d(F.pad(torch.zeros_like(x), (1, 1, 1, 1), value=0.5), self.conv.weight)
        return self.conv(x) + wrong


class Fifth(nn.Module):
    """The layer in question in the midst of others: a network in which an error has to be found."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh())
        self.conv, self.bn = nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, **options}), nn.BatchNorm2d(8)
        self.after = nn.Sequential(nn.Tanh(), nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Tanh())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.after(self.bn(self.conv(self.before(x))))
        return y, y.mean((2, 3))


FAULTS: dict[str, tuple[Callable[[GraphModule], None], dict[str, Any], str]] = {
    "border bias": (ignore_the_border, {}, "border"),
    "dropped bias": (drop_bias, {}, ""),
    "swapped axes": (swap_kernel_axes, {}, ""),
    "wrong group order": (reverse_groups, {"groups": 2}, ""),
    "off-by-one pad": (move_padding, {}, ""),
    "scale on the wrong axis": (scale_columns, {}, ""),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_failed_and_localised(fault: str, dtype: torch.dtype):
    plant, options, place = FAULTS[fault]
    model, collapsed = build(Fifth(**options))
    assert verify(model, collapsed)
    plant(collapsed)
    verdict = verify(model.to(dtype), collapsed.to(dtype))
    assert not verdict
    assert verdict.parted is not None, verdict
    assert (verdict.parted.layer, verdict.parted.computes) == ("reparam", "bn")
    assert verdict.parted.error > 0.03
    assert place in verdict.parted.difference.place
    assert verdict.parted.difference.border > 10 * verdict.parted.difference.interior or not place


@pytest.mark.parametrize("device", DEVICES)
def test_swapped_pads_of_height_and_width_are_failed_and_localised(device: str):
    """The shape of the layer's value is another one, which a mean over all pixels hides."""
    model, collapsed = build(nn.Sequential(Fifth(padding=(2, 0)), Second()))
    model, collapsed = model.to(device), collapsed.to(device)
    assert verify(model, collapsed)
    collapsed.get_submodule("0.reparam").padding = (0, 2)
    verdict = verify(model, collapsed)
    assert not verdict
    assert verdict.parted.layer == "0.reparam"


class Second(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[1]


def test_a_wrong_map_of_another_shape_is_a_problem_told_in_words():
    model, collapsed = build(nn.Sequential(nn.Conv2d(3, 4, 3, padding=(2, 0)), nn.BatchNorm2d(4)))
    collapsed.get_submodule("reparam").padding = (0, 2)
    verdict = verify(model, collapsed, torch.randn(2, 3, 8, 8))
    assert not verdict
    assert "has the shape (2, 4, 6, 10), not (2, 4, 10, 6)" in str(verdict)


def test_a_fold_of_a_bias_through_padding_fails_at_the_border():
    """1x1 with a bias, then a padded 3x3, folded by hand as if the bias went on outside the map."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 5, 1))
    collapsed = fxrep.reparameterize(model)
    assert "pads-over-bias" in {r.code for r in collapsed.report.refusals}
    inner, outer = model[0], model[1]
    folded = nn.Conv2d(3, 5, 3, padding=1)
    folded.weight.data = torch.einsum("ochw,ci->oihw", outer.weight, inner.weight[:, :, 0, 0])
    folded.bias.data = outer.bias + torch.einsum("ochw,c->o", outer.weight, inner.bias)
    collapsed.set_submodule("0", nn.Identity())
    collapsed.set_submodule("1", folded)
    verdict = verify(model, collapsed)
    assert not verdict
    assert verdict.parted.layer == "1"
    assert verdict.parted.difference.place == "border"
    assert verdict.parted.difference.interior < 1e-5 < 0.05 < verdict.parted.difference.border


@pytest.mark.parametrize("kernel", [1, 3])
def test_two_layers_that_compute_one_value_are_compared_by_their_sum(kernel: int):
    """Neither alone gives a value of the original, and yet the verdict knows when their sum does."""
    model, collapsed = build(Twofold())
    names = [n for n, m in collapsed.named_modules() if hasattr(m, "fxrep_provenance")]
    assert {collapsed.get_submodule(n).fxrep_provenance[-1] for n in names[:2]} == {"bn"}
    collapsed.head.bias.data += 0.1
    assert verify(model, collapsed).parted.layer == "head"
    wrong = next(m for n in names if (m := collapsed.get_submodule(n)).kernel_size == (kernel, kernel))
    wrong.weight.data *= 1.1
    parted = verify(model, collapsed).parted
    assert parted.layer in names[:2]
    assert parted.computes == "bn"
    assert 1e-3 < parted.error < 0.2


class Twofold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.bn, self.head = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bn(self.a(x) + self.b(torch.tanh(x)))))


def test_the_first_of_two_faults_is_named():
    model, collapsed = build(Fifth())
    collapsed.get_submodule("after.reparam").bias.data += 1
    collapsed.reparam.weight.data *= 1.05
    assert verify(model, collapsed).parted.layer == "reparam"


def test_a_kept_layer_can_be_wrong_too():
    model, collapsed = build(Branches())
    relu = next(n for n in collapsed.graph.nodes if n.target is torch.relu)
    relu.target = torch.tanh
    collapsed.recompile()
    assert verify(model, collapsed).parted.layer == relu.name


def test_weights_that_were_written_in_place_are_followed():
    """In-place ops overwrite values; what is compared is what they were when they were computed."""
    model, collapsed = build(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    )
    assert verify(model, collapsed)
    collapsed.reparam.bias.data += 1
    assert verify(model, collapsed).parted.layer == "reparam"


# Non-finite values


def test_a_kernel_that_an_identity_became_spreads_inf_and_the_verdict_says_so():
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2))
    collapsed = nn.Conv2d(2, 2, 3, padding=1)
    collapsed.weight.data = F.pad(fxrep.reparameterize(model).reparam.weight.data, (1, 1, 1, 1))
    collapsed.bias.data.zero_()
    verdict = verify(model, collapsed, torch.randn(1, 2, 7, 7))
    assert verdict
    assert [(p.pixel, p.original, p.collapsed, p.outputs) for p in verdict.probes] == [
        ("inf", 2, 18, 98),
        ("nan", 2, 18, 98),
    ]
    assert "0 * inf = nan" in str(verdict)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_that_are_not_finite_elsewhere_fail(value: float):
    model, collapsed = build(Branches())
    collapsed.get_submodule("reparam").bias.data[0] = value
    verdict = verify(model, collapsed)
    assert not verdict
    assert "not finite" in str(verdict)


def test_values_that_are_not_finite_in_both_pass():
    model, collapsed = build(nn.Sequential(Branches(), Reciprocal()))
    verdict = verify(model, collapsed)
    assert verdict, verdict


class Reciprocal(nn.Module):
    """Infinite where the ReLU before it gives zero."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 / x.round()


# What is told


def test_the_verdict_prints_and_converts():
    model, collapsed = build(Fifth())
    drop_bias(collapsed)
    verdict = verify(model, collapsed)
    text, told = str(verdict), verdict.to_dict()
    assert text.startswith("fxrep.verify: Fifth in float32: NOT EQUAL")
    for wanted in ("2x3x32x32", "channels_last", "parted at: reparam (computes bn)", "outputs that are not finite"):
        assert wanted in text
    assert told["equal"] is False
    assert told["parted"]["layer"] == "reparam"
    assert len(told["trials"]) == 4


def forgetful() -> tuple[nn.Module, GraphModule]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model[3].weight.data *= 1e-7
    return build(model)


def test_a_network_that_forgets_its_input_is_compared_layer_by_layer():
    model, collapsed = forgetful()
    verdict = verify(model, collapsed)
    assert verdict, verdict
    assert "but all layers agree" in str(verdict)
    drop_bias(collapsed)
    verdict = verify(model, collapsed)
    assert not verdict
    assert all(verdict.trials)
    assert verdict.parted.layer == "reparam"
    assert "would hide a wrong layer: one differs" in str(verdict)


def test_layers_that_cannot_be_compared_are_told():
    model, _ = forgetful()
    verdict = verify(model, model)
    assert verdict
    assert "layers could not be compared" in str(verdict)
    assert "would hide" not in str(verify(*build(Branches())))


def test_what_is_no_graph_is_verified_but_not_localised():
    model = randomise(Branches())
    assert verify(model, model)
    wrong = randomise(Branches(), seed=1)
    verdict = verify(model, wrong)
    assert not verdict
    assert verdict.parted is None
    assert "no torch.fx.GraphModule" in verdict.not_localised


def test_an_original_that_cannot_be_traced_is_verified_but_not_localised():
    model = Untraceable()
    collapsed = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert not verify(model, collapsed, torch.randn(2, 3, 8, 8))
    assert "cannot be traced" in verify(model, collapsed, torch.randn(2, 3, 8, 8)).not_localised
    collapsed.load_state_dict({f"0.{name}": value for name, value in model.conv.state_dict().items()})
    assert verify(model, collapsed, torch.randn(2, 3, 8, 8))


def test_a_collapsed_model_that_does_not_run_fails():
    verdict = verify(nn.Conv2d(3, 4, 3), nn.Conv2d(2, 4, 3))
    assert not verdict
    assert "does not run on 2x3x32x32: RuntimeError" in str(verdict)
