"""Autotuning: what the clock says decides where the prediction is unsure, and the network stays equal either way."""

from __future__ import annotations

import pytest
import torch
from blocks import Block, Net
from helpers import error_against_original, randomise
from torch import nn

import fxrep
from fxrep import trials
from fxrep.cost import PROFILES, UNSURE, Aim
from fxrep.stopwatch import Times
from fxrep.trials import Trials

X = torch.randn(2, 3, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def told(monkeypatch):
    """A clock that says what it is told: seconds of a turn, of what is replaced and of what replaces it."""
    seconds: dict[str, tuple[float, ...]] = {"before": (1.0, 1.0, 1.0), "after": (0.5, 0.5, 0.5)}
    timed: list[int] = []

    def take_turns(calls, *_):
        for call in calls:
            call()
        timed.append(len(calls))
        return [Times(seconds["before"]), Times(seconds["after"])]

    monkeypatch.setattr(trials, "take_turns", take_turns)
    monkeypatch.setattr("fxrep.cost.UNSURE", 1.1)  # everything is unsure
    return seconds, timed


def net() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net()).double().eval()


def test_what_is_faster_is_kept(told):
    fast = fxrep.reparameterize(net(), X, autotune=True)
    assert fast.report.after["bn"] == 0
    assert told[1]
    assert error_against_original(fast, net(), X) < 1e-10


def test_what_is_slower_is_not_taken(told):
    told[0]["after"] = (2.0, 2.0, 2.0)
    kept = fxrep.reparameterize(net(), X, autotune=True)
    assert kept.report.after == kept.report.before
    assert {r.code for r in kept.report.refusals} >= {"costs-more"}
    assert error_against_original(kept, net(), X) == 0.0


def test_what_the_clock_cannot_tell_is_left_to_the_prediction(told):
    told[0]["after"] = (0.5, 1.1, 1.8)
    assert fxrep.reparameterize(net(), X, autotune=True).report.after["bn"] == 0


def test_what_is_alike_is_timed_once(told):
    model = randomise(nn.Sequential(*(Block(4) for _ in range(4)))).double().eval()
    fxrep.reparameterize(model, torch.randn(1, 4, 9, 9, dtype=torch.float64), autotune=True)
    alone = len(told[1])
    told[1].clear()
    fxrep.reparameterize(nn.Sequential(*model, *model), torch.randn(1, 4, 9, 9, dtype=torch.float64), autotune=True)
    assert 0 < len(told[1]) <= alone + 2


def test_only_the_unsure_are_timed():
    aim = Aim(PROFILES["cpu"], trial=lambda *_: None)
    assert aim.is_unsure(saved=0.9 * UNSURE, cost=1.0)
    assert aim.is_unsure(saved=-0.9 * UNSURE, cost=1.0)
    assert not aim.is_unsure(saved=1.1 * UNSURE, cost=1.0)
    assert not Aim(PROFILES["cpu"]).is_unsure(saved=0.0, cost=1.0)


def test_it_runs_by_the_real_clock():
    fast = fxrep.reparameterize(net(), X, autotune=True)
    assert error_against_original(fast, net(), X) < 1e-10


@pytest.mark.parametrize(
    ("options", "fact"), [({}, "pass example_inputs"), ({"objective": "macs"}, "objective='macs' does not ask for")]
)
def test_what_cannot_be_timed_is_told(options, fact):
    with pytest.raises(fxrep.FxrepError, match=fact):
        fxrep.reparameterize(net(), autotune=True, **options)


def test_trials_draw_no_random_numbers_of_others():
    state = torch.get_rng_state()
    Trials(torch.device("cpu"), torch.float32)._drawn((3, 4))
    assert torch.equal(torch.get_rng_state(), state)
