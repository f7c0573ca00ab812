"""The cost model: its doctests, and the roofline worked out by hand."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

from fxrep import cost, explain
from fxrep.cost import BYTES, KINDS, PROFILES, Aim, Profile, Work, kind_of, profile_for
from fxrep.errors import FxrepError

#: 10 multiply-adds and 8 bytes (2 elements) a second, 1 s to start: every sum below can be done in one's head.
SLOW = Profile("slow", {"dense": 10.0, "depthwise": 2.0}, bandwidth=8.0, launch=1.0)


def test_doctests():
    failed, attempted = doctest.testmod(cost)
    assert attempted >= 2
    assert failed == 0


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work(), 0.0),
        (Work(steps=3), 3.0),
        (Work(macs=50.0), 5.0),
        (Work(macs=50.0, kind="depthwise"), 25.0),
        (Work(elements=6.0), 3.0),
        (Work(elements=4.0, weights=2.0), 3.0),
        (Work(macs=50.0, elements=6.0), 5.0),
        (Work(macs=20.0, elements=6.0), 3.0),
        (Work(macs=20.0, elements=6.0, steps=2), 5.0),
        (Work(macs=20.0, elements=4.0, weights=8.0, steps=1), 7.0),
    ],
)
def test_the_roofline(work, seconds):
    """max(MACs / peak, bytes / bandwidth) + launches."""
    assert BYTES == 4
    assert work.seconds(SLOW) == seconds


def test_a_real_layer_by_hand():
    """A dense 3x3 of 64 to 64 channels on 56x56 is bound by arithmetic on a CPU: 115.6 million multiply-adds."""
    macs, weights, moved = 64 * 64 * 9 * 56 * 56, 64 * 64 * 9, 2 * 64 * 56 * 56
    assert macs == 115_605_504
    seconds = Work(macs, "dense", moved, 1, weights).seconds(PROFILES["cpu"])
    assert seconds == pytest.approx(115_605_504 / 5e10 + 1.2e-5, rel=1e-12)
    depthwise = Work(macs // 64, "depthwise", moved, 1, weights // 64).seconds(PROFILES["cpu"])
    assert depthwise == pytest.approx(115_605_504 / 64 / 8e9 + 1.2e-5, rel=1e-12)
    shift = Work(elements=moved, steps=1).seconds(PROFILES["cpu"])
    assert shift == pytest.approx(4 * 401_408 / 1.2e10 + 1.2e-5, rel=1e-12)


def test_unknown_kinds_of_work_have_no_price():
    with pytest.raises(KeyError):
        Work(macs=1.0, kind="winograd").seconds(SLOW)


@pytest.mark.parametrize(
    ("taps", "dims", "groups", "channels", "kind"),
    [
        (9, 2, 1, 64, "dense"),
        (2, 1, 1, 64, "dense"),
        (1, 2, 1, 64, "pointwise"),
        (9, 2, 64, 64, "depthwise"),
        (1, 3, 64, 64, "depthwise"),
        (9, 2, 4, 64, "grouped"),
        (1, 2, 4, 64, "grouped"),
        (9, 2, 1, 1, "dense"),
        (1, 0, 1, 64, "linear"),
        (1, 0, 4, 64, "linear"),
    ],
)
def test_kind_of(taps, dims, groups, channels, kind):
    assert kind_of(taps, dims, groups, channels) == kind


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_prices_every_kind(name):
    profile = PROFILES[name]
    assert profile.name == name
    kinds = {kind_of(t, d, g, 64) for t in (1, 9) for d in (0, 2) for g in (1, 4, 64)}
    assert kinds == set(profile.peak)
    assert min(*profile.peak.values(), profile.bandwidth, profile.launch) > 0


def test_profiles_are_for_reading():
    with pytest.raises(TypeError):
        PROFILES["tpu"] = SLOW  # type: ignore[index]


@pytest.mark.parametrize(
    ("device", "name"), [("cpu", "cpu"), ("meta", "cpu"), ("cuda", "cuda"), ("mps", "cuda"), ("xpu", "cuda")]
)
def test_profile_for(device, name):
    assert profile_for(device) is PROFILES[name]


def test_merging_parallel_branches_saves_launches_and_traffic():
    """The 3x3 + 1x1 + sum of a RepVGG block against its single 3x3, in the model's own terms."""
    pixels, channels = 14 * 14, 192
    moved = 2 * channels * pixels
    wide = Work(9 * channels**2 * pixels, "dense", moved, 1, 9 * channels**2)
    point = Work(channels**2 * pixels, "pointwise", moved, 1, channels**2)
    total = Work(elements=1.5 * moved, steps=1)
    for profile in PROFILES.values():
        apart = sum(work.seconds(profile) for work in (wide, point, total))
        assert apart - wide.seconds(profile) > 2 * profile.launch


def test_what_is_made_least():
    work = Work(macs=20.0, elements=6.0, weights=4.0, steps=2)
    assert Aim(SLOW).cost(work) == work.seconds(SLOW) == 7.0
    assert Aim(SLOW, "macs").cost(work) == 20.0
    assert Aim(SLOW, "params").cost(work) == 4.0
    with pytest.raises(FxrepError, match="latency, macs, params"):
        Aim(SLOW, "beauty")


@pytest.mark.parametrize(
    ("objective", "layers", "told"), [("latency", 2, ["costs-more"]), ("macs", 1, []), ("params", 1, [])]
)
def test_an_objective_decides(objective, layers, told):
    """A 1x1 from one channel to eight and a depthwise 3x3 have 8 + 72 weights a pixel, as one dense 3x3 72; on a device
    that is slow at dense kernels alone, time keeps two layers."""
    net = nn.Sequential(nn.Conv2d(1, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False))
    slow_dense = Profile("slow dense", {**dict.fromkeys(KINDS, 1e12), "dense": 1e3}, 1e12, 1e-9)
    report = explain(net, torch.randn(1, 1, 16, 16), profile=slow_dense, objective=objective)
    assert report.after["conv"] == layers
    assert [refusal.code for refusal in report.refusals] == told
