"""What a forward asks Python of a value is answered for the value, not for what stands for it while it is traced."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import randomise, relative_error
from torch import Tensor, nn

import fxrep

ASKS: dict[str, Callable[[Any, Tensor], bool]] = {
    "isinstance": lambda m, x: isinstance(x, Tensor),
    "not a list": lambda m, x: not isinstance(x, (list, tuple)),
    "is_tensor": lambda m, x: torch.is_tensor(x),
    "torch.jit.isinstance": lambda m, x: torch.jit.isinstance(x, Tensor),
    "of a result": lambda m, x: isinstance(torch.relu(x), Tensor),
    "of a layer's result": lambda m, x: isinstance(m.conv(x), Tensor),
    "of a method's result": lambda m, x: isinstance(x.flatten(1)[:, 0] * 2, Tensor),
    "a size": lambda m, x: isinstance(x.shape[1], int) and isinstance(x.size(2) // 2, int),
    "no tensor": lambda m, x: not isinstance(x.shape[1], Tensor) and not torch.is_tensor(len(x.shape[1:])),
    "sizes": lambda m, x: isinstance(x.shape, tuple) and not isinstance(x.shape[-2:], list),
    "a rank": lambda m, x: isinstance(x.dim(), int) and isinstance(x.ndim, int),
    "a parameter": lambda m, x: isinstance(m.conv.weight, nn.Parameter),
    "hasattr": lambda m, x: hasattr(x, "dequantize"),
    "no such attribute": lambda m, x: not hasattr(x, "logits"),
}  # fmt: skip


class Asking(nn.Module):
    """One way has a batch norm, the other none."""

    def __init__(self, asks: Callable[[Any, Any], bool] = ASKS["isinstance"]) -> None:
        super().__init__()
        self.conv, self.norm, self.asks = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), asks

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if self.asks(self, x) else 2 * self.conv(x)


def collapsed(model: nn.Module, *args: Any, example: Any = None) -> nn.Module:
    """Its collapse, equal to it in float64."""
    randomise(model).double().eval()
    result = fxrep.reparameterize(model, example)
    assert relative_error(result(*args), model(*args)) < 1e-12
    return result


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 8, dtype=torch.float64)


@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
def test_the_way_of_a_tensor_is_taken(asks: Callable[[Any, Tensor], bool], x: Tensor):
    result = collapsed(Asking(asks), x)
    kept = isinstance(result, Asking)
    assert kept == (asks is ASKS["no tensor"])  # which asks for the length of sizes, and is left whole for that
    if not kept:
        assert result.report.before["bn"] == 1
        assert result.report.after["bn"] == 0


class Several(Asking):
    """A list of tensors, whatever is annotated."""

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        return 2 * self.conv(x) if isinstance(x, Tensor) else self.norm(self.conv(x[0]))


class Unannotated(Several):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("kind", [Several, Unannotated])
def test_a_list_is_none(kind: type[nn.Module], x: Tensor):
    result = collapsed(kind(), [x], example=([x],))
    assert result.report.before["bn"] == 1


def test_what_is_not_known_is_not_guessed(x: Tensor):
    result = collapsed(Several(), [x])
    assert "not-traceable" in {r.code for r in result.report.refusals}


class Hidden(nn.Module):
    """A result that nobody sees before it runs."""

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else (x, x)


class OfHidden(Asking):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = Hidden()

    def forward(self, x: Tensor) -> Tensor:
        y = self.hidden(self.norm(self.conv(x)))
        return y if isinstance(y, Tensor) else y[0] + 1


def test_a_result_of_an_unknown_type_is_not_guessed(x: Tensor):
    result = collapsed(OfHidden(), x)
    assert isinstance(result, OfHidden)
    assert any("type of hidden" in r.reason for r in result.report.refusals)


def test_builtins_are_what_they_were(x: Tensor):
    before = builtins.isinstance, builtins.hasattr, builtins.max, builtins.min
    collapsed(Asking(), x)
    collapsed(OfHidden(), x)
    assert (builtins.isinstance, builtins.hasattr, builtins.max, builtins.min) == before
