"""The machine's own profile: complete, kept whole, found again, and never taken from a file that is none."""

from __future__ import annotations

import doctest
import json

import pytest
import torch

import fxrep
from fxrep import calibration
from fxrep.calibration import cache_path, calibrate
from fxrep.cost import KINDS, Profile

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    return cache_path(CPU, torch.float32)


@pytest.fixture
def measured(monkeypatch):
    """Counts measurements, and gives a made-up one: no test of the cache needs the real."""
    calls: list[Profile] = []

    def measure(device, dtype):
        calls.append(Profile(f"made up {len(calls)}", dict.fromkeys(KINDS, 1e9), 1e9, 1e-6, measured=True))
        return calls[-1]

    monkeypatch.setattr(calibration, "measure", measure)
    return calls


def test_doctests():
    failed, attempted = doctest.testmod(calibration)
    assert attempted >= 1
    assert failed == 0


def test_every_kind_is_measured(cache):
    profile = calibrate()
    assert profile.measured
    assert set(profile.peak) == set(KINDS)
    assert min(*profile.peak.values(), profile.bandwidth, profile.launch) > 0
    assert "float32" in profile.name
    assert torch.__version__ in profile.name


def test_it_is_found_again_and_measured_anew_on_request(cache, measured):
    first = calibrate()
    assert calibrate() == first
    assert len(measured) == 1
    assert calibrate(again=True) != first
    assert calibrate() == measured[1]
    assert [p.name for p in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 0}', '{"format": 1, "profile": {"name": "x"}}', '{"format": 1}']
)
def test_what_is_no_profile_is_measured_anew(cache, measured, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    assert calibrate() == measured[0]
    assert json.loads(cache.read_text())["profile"]["name"] == "made up 0"


def test_other_threads_are_another_measurement(cache):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert cache_path(CPU, torch.float32) != cache
    finally:
        torch.set_num_threads(before)
    assert cache_path(CPU, torch.float64) != cache


@pytest.mark.parametrize(("device", "fact"), [("meta", "computes nothing"), ("abacus", "no device abacus")])
def test_what_cannot_be_timed_is_told(device, fact):
    with pytest.raises(fxrep.FxrepError, match=fact):
        calibrate(device)


def test_a_folder_that_cannot_be_written_is_told(cache, measured):
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file where a folder should be")
    with pytest.raises(fxrep.FxrepError, match="XDG_CACHE_HOME"):
        calibrate()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_a_gpu_is_measured(cache):
    profile = calibrate("cuda")
    assert torch.cuda.get_device_name() in profile.name
    assert profile.peak["dense"] > profile.peak["depthwise"]
