"""What several test files need: networks with statistics that hide nothing, and errors measured against float64."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Example = TypeVar("Example")


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random BN statistics and affines, and random values for scales that start at zero: defaults hide every error."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            _randomise_batchnorm(module, generator)
    for parameter in model.parameters():
        if parameter.numel() and bool((parameter == 0).all()):
            parameter.data.normal_(0, 0.2, generator=generator)
    return model


def _randomise_batchnorm(bn: _BatchNorm, generator: torch.Generator) -> None:
    if bn.running_mean is not None and bn.running_var is not None:
        bn.running_mean.normal_(0, 0.3, generator=generator)
        bn.running_var.uniform_(0.5, 2.0, generator=generator)
    if bn.affine:
        bn.weight.data.uniform_(0.5, 1.5, generator=generator)
        bn.bias.data.normal_(0, 0.3, generator=generator)


def drawn(strategy: SearchStrategy[Example], number: int, by_seed: int) -> list[Example]:
    """A fixed batch of what a strategy draws."""
    batch: list[Example] = []

    @seed(by_seed)
    @settings(max_examples=number, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(strategy)
    def collect(example: Example) -> None:
        batch.append(example)

    collect()
    return batch


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def error_against_original(collapsed: nn.Module, original: nn.Module, *inputs: Any) -> float:
    """The relative error of a collapsed network against the original in eval mode."""
    was_training = original.training
    with torch.no_grad():
        error = relative_error(collapsed(*inputs), original.eval()(*inputs))
    original.train(was_training)
    return error
