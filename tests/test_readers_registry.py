"""Every registered target is used by a network of the readers' tests; registering twice fails."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import test_readers_arithmetic
import test_readers_borders
import test_readers_channels
import test_readers_convolution
import test_readers_normalization
import test_readers_pooling
import test_readers_views
import torch
from reader_cases import Case, targets_of
from torch import nn
from torch._ops import OpOverload

from fxrep.mutation import FUNCTIONS
from fxrep.readers import reader, registered
from fxrep.readers.registry import First

FILES = (
    test_readers_arithmetic, test_readers_borders, test_readers_channels, test_readers_convolution,
    test_readers_normalization, test_readers_pooling, test_readers_views,
)  # fmt: skip


def cases() -> list[Case]:
    return [case for file in FILES for case in file.CASES]


@cache
def used() -> frozenset[Any]:
    return frozenset().union(*(_used_by(case) for case in cases()))


def _used_by(case: Case) -> set[Any]:
    try:
        return {FUNCTIONS.get(target, target) for target in targets_of(case.network())}
    except (torch.fx.proxy.TraceError, TypeError):  # networks that cannot be traced are cases as well
        return set()


def name_of(target: Any) -> str:
    return target if isinstance(target, str) else f"{target.__module__}.{target.__name__}"


TRACED = [target for target in registered() if not isinstance(target, (OpOverload, First))]


@pytest.mark.parametrize("target", TRACED, ids=name_of)
def test_has_a_network(target: Any) -> None:
    assert target in used(), (
        f"add a network that uses {name_of(target)} to the tests of {registered()[target].__module__}"
    )


def test_a_new_target_without_a_network_would_be_noticed() -> None:
    assert nn.Bilinear not in registered()
    assert nn.Bilinear not in used()


def test_names_of_cases_are_unique_within_a_file() -> None:
    for file in FILES:
        names = [case.name for case in file.CASES]
        assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


def test_one_target_has_one_reader() -> None:
    with pytest.raises(ValueError, match="already has read_conv"):
        reader(nn.Conv2d)(lambda at, module: None)
    assert registered()[nn.Conv2d].__name__ == "read_conv"
