"""verify passes what is right in any dtype, on inputs that it finds by itself, and leaves the models alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from blocks import image, net
from helpers import randomise
from torch import Tensor, nn
from verification_cases import CONV, DEVICES, HALF, Branches, Untraceable, build

import fxrep
from fxrep import FxrepError, Verdict, verify

EVERY_DTYPE = (torch.float64, torch.float32, *HALF)
INPUTS = {1: (2, 3, 13), 2: (2, 3, 12, 9), 3: (2, 3, 6, 7, 5)}


class Several(nn.Module):
    """Outputs of another kind each: a dict of a map, a tuple and a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Branches()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = self.body(x)
        logits = self.head(features.mean((2, 3)))
        return {"map": features, "pair": (logits, features.amax((2, 3))), "all": Everything(logits, 3)}


@dataclass
class Everything:
    logits: Tensor
    count: int


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# What is right passes


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_right_collapse_passes_in_every_dtype(dtype: torch.dtype, device: str):
    model = randomise(Branches()).to(device, dtype)
    collapsed = fxrep.reparameterize(model)
    assert len(collapsed.report.collapses) == 2
    verdict = verify(model, collapsed)
    assert verdict, verdict
    assert len(verdict.trials) == 4
    assert verdict.ratio is None if dtype is torch.float64 else 0.3 < verdict.ratio < 3
    assert verdict.parted is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", CONV)
def test_any_number_of_dimensions_passes(dims: int, dtype: torch.dtype):
    model = randomise(Branches(dims)).to(dtype)
    x = torch.randn(INPUTS[dims]).to(dtype)
    verdict = verify(model, fxrep.reparameterize(model, x), x)
    assert verdict, verdict


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_a_linear_network_passes(dtype: torch.dtype):
    model, collapsed = build(nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4)), dtype)
    verdict = verify(model, collapsed)
    assert verdict, verdict
    assert {trial.inputs for trial in verdict.trials} == {"2x6", "3x6", "1x6"}


def test_every_output_is_compared_by_its_own_name():
    model, collapsed = build(Several())
    verdict = verify(model, collapsed)
    assert verdict, verdict
    expected = [
        "output['map']",
        "output['pair'][0]",
        "output['pair'][1]",
        "output['all'].logits",
        "output['all'].count",
    ]
    assert [c.output for c in verdict.trials[0].comparisons] == expected


def test_the_original_is_equal_to_itself():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    assert verify(model, model)
    assert verify(model, model).ratio == 1


class Off(nn.Module):
    """A network whose outputs are off by `share` of their largest value: always, or in float32 alone."""

    def __init__(self, net: nn.Module, share: float, always: bool) -> None:
        super().__init__()
        self.net, self.share, self.always = net, share, always

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return y + self.share * y.abs().max() if self.always or y.dtype is torch.float32 else y


def test_more_is_allowed_of_what_is_rounding_as_float64_shows():
    model = net(torch.float32)
    x = image(dtype=torch.float32)
    usual = min(c.allowed for t in verify(model, model, x).trials for c in t.comparisons)
    assert verify(model, Off(model, 1.3 * usual, always=False), x)
    assert not verify(model, Off(model, 1.3 * usual, always=True), x)
    assert not verify(model, Off(model, 4 * usual, always=False), x)


def test_sizes_batches_and_memory_formats_vary():
    model, collapsed = build(Branches())
    trials = verify(model, collapsed, torch.randn(1, 3, 20, 24), trials=8).trials
    shapes = [tuple(map(int, t.inputs.split("x"))) for t in trials]
    assert {s[0] for s in shapes} == {1, 2, 3}
    assert shapes[0] == (2, 3, 20, 24)
    assert any(h % 2 == w % 2 == 1 and h != w for *_, h, w in shapes)
    assert any(h % 2 == w % 2 == 0 and (h, w) != (20, 24) for *_, h, w in shapes)
    assert any(h == w == 1 for *_, h, w in shapes)
    assert {t.memory_format for t in trials} == {"contiguous", "channels_last"}


def test_the_smallest_input_is_the_smallest_that_runs():
    model, collapsed = build(nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4)))
    assert verify(model, collapsed).trials[3].inputs.endswith("x5x5")


# Inputs


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.bn = nn.Embedding(5, 4), nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)

    def forward(self, tokens: Tensor, scale: Tensor, *, shift: float = 0.5) -> Tensor:
        return self.bn(self.conv(self.embed(tokens).transpose(1, 2))) * scale + shift


def test_integer_inputs_keep_their_numbers():
    example = {"tokens": torch.tensor([[0, 4, 2], [1, 1, 3]]), "scale": torch.rand(2, 4, 3)}
    model = randomise(Keywords())
    verdict = verify(model, fxrep.reparameterize(model, example), example)
    assert verdict, verdict
    assert {t.inputs for t in verdict.trials} >= {"2x3, 2x4x3"}


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.bn, self.head = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bn(self.a(x) + self.b(y))))


class Logarithm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x.log()))


def test_inputs_are_positive_where_the_example_is():
    model, collapsed = build(Logarithm())
    assert verify(model, collapsed, torch.rand(2, 3, 6, 6))
    with pytest.raises(FxrepError, match="gives no finite value"):
        verify(model, collapsed, torch.randn(2, 3, 6, 6))


def test_several_inputs_are_inferred():
    verdict = verify(*build(Joined()))
    assert verdict, verdict
    assert verdict.trials[0].inputs == "2x3x32x32, 2x5x32x32"


def test_a_network_that_takes_one_memory_format_is_tried_in_that():
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.head(y.view(y.size(0), -1))

    model, x = Views(), torch.ones(2, 3, 8, 8)
    verdict = verify(model, fxrep.reparameterize(model, x), x)
    assert verdict
    assert not verify(Views(), model, x)
    assert {trial.memory_format for trial in verdict.trials} == {"contiguous"}


def test_a_network_of_one_size_is_tried_at_that_size():
    model, collapsed = build(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 62 * 62, 5))
    )
    verdict = verify(model, collapsed)
    assert verdict, verdict
    assert {t.inputs for t in verdict.trials} == {"2x3x64x64", "3x3x64x64", "1x3x64x64"}


def test_hooks_of_the_root_run():
    model = randomise(Branches())
    model.register_forward_hook(lambda _model, _args, output: output * 2)
    verdict = verify(model, fxrep.reparameterize(model))
    assert verdict, verdict


# The models are left alone


def test_models_and_random_state_are_left_alone():
    model, collapsed = build(Branches())
    model.train()
    model.stem.eval()
    modes = [m.training for m in model.modules()]
    before = [t.clone() for m in (model, collapsed) for t in m.state_dict().values()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert verify(model, collapsed)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    after = [t for m in (model, collapsed) for t in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.dtype is torch.float32 for p in model.parameters())


def test_the_seed_decides():
    model, collapsed = build(Branches())
    one, again, other = (verify(model, collapsed, seed=s) for s in (0, 0, 1))
    assert one == again
    assert one != other


# Wrong arguments

ONE_SIZE = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, nn.Conv2d(3, 4, 3)), "original is a int"),
        ((nn.Conv2d(3, 4, 3), {}), "collapsed is a dict"),
        ((nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3).double()), "bring both to one dtype"),
        ((nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), "x"), "example_inputs is a str"),
        ((nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), {"y": torch.ones(1)}), "do not fit Conv2d.forward"),
        ((nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), torch.ones(1, 2, 8, 8)), "does not run on example_inputs"),
        ((nn.ReLU(), nn.ReLU()), "nothing tells the shape of the input"),
        ((Untraceable(), Untraceable()), "cannot be traced"),
        ((ONE_SIZE, ONE_SIZE), "no input was found on which Sequential runs"),
        ((Logarithm(), Logarithm(), -torch.ones(2, 3, 6, 6)), "does not run on example_inputs.*no finite value"),
        ((nn.Flatten(), nn.Flatten(), torch.full((2, 3), 1)), None),
        ((nn.LazyConv2d(4, 3), nn.Conv2d(3, 4, 3)), "lazy parameter"),
        ((nn.Conv2d(3, 4, 3, device="meta"), nn.Conv2d(3, 4, 3)), "is on meta"),
    ],
)
def test_wrong_arguments_are_told(arguments: tuple[Any, ...], message: str | None):
    if message is None:
        assert verify(*arguments)
        return
    with pytest.raises(FxrepError, match=message):
        verify(*arguments)


@pytest.mark.parametrize("trials", [0, -1, 2.5, "four", True])
def test_trials_is_a_count(trials: Any):
    with pytest.raises(FxrepError, match="trials is"):
        verify(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), trials=trials)


@pytest.mark.parametrize("trials", [1, 2, 5])
def test_any_number_of_trials(trials: int):
    verdict = verify(*build(Branches()), trials=trials)
    assert isinstance(verdict, Verdict)
    assert len(verdict.trials) == trials
    assert verdict
