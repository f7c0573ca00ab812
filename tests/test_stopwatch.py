"""Turns: who is called when, and what is made of the times."""

from __future__ import annotations

import doctest

import pytest
import torch

from fxrep import stopwatch
from fxrep.stopwatch import LEAST, Times, repeats_of, take_turns, threads, turns

CPU = torch.device("cpu")


def test_doctests():
    failed, attempted = doctest.testmod(stopwatch)
    assert attempted >= 2
    assert failed == 0


def test_one_sample_has_no_spread():
    assert Times((3.0,)).spread == 0.0
    assert Times((3.0,)).median == 3.0


def test_ratios_are_taken_turn_by_turn():
    """A machine that is twice as slow in one turn is so for both."""
    slow, fast = Times((2.0, 4.0, 2.0)), Times((1.0, 2.0, 1.0))
    assert slow.to(fast) == Times((2.0, 2.0, 2.0))
    with pytest.raises(ValueError, match="argument"):
        slow.to(Times((1.0,)))


def test_every_second_round_goes_backwards():
    called: list[str] = []
    calls = [lambda: called.append("a"), lambda: called.append("b")]
    rounds = turns(calls, 3, CPU, shortest=0.0)
    for expected in ("ab", "ba", "ab"):
        before = len(called)
        next(rounds)
        assert "".join(called[before:])[-2:] == expected
    assert next(rounds, None) is None


def test_there_are_as_many_rounds_as_asked_for_and_a_few_whatever_they_take():
    assert [len(t.samples) for t in take_turns([lambda: None] * 2, 7, CPU)] == [7, 7]
    assert [len(t.samples) for t in take_turns([lambda: None], 50, CPU, budget=0.0)] == [LEAST]


def test_a_short_call_is_repeated():
    assert repeats_of(lambda: None, CPU, shortest=1e-3) > 10
    assert repeats_of(lambda: torch.randn(2000, 2000), CPU, shortest=1e-9) == 1


def test_threads_are_put_back_even_after_an_error():
    before = torch.get_num_threads()

    def fail() -> None:
        with threads(before + 1) as number:
            assert number == torch.get_num_threads() == before + 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before
    with threads(None) as number:
        assert number == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_cuda_is_timed_between_events():
    x = torch.randn(4096, 4096, device="cuda")
    small, large = take_turns([lambda: x[:64] @ x, lambda: x @ x], 5, x.device)
    assert 0 < small.median < large.median
