"""The most memory that a call held at once, beyond what there was before it."""

from __future__ import annotations

from typing import Any

import torch

from fxrep.stopwatch import Call, synchronize


def peak_bytes(call: Call, device: torch.device) -> int:
    """Bytes that torch allocated on the device and held at once; the result is counted."""
    return _peak_on_cuda(call, device) if device.type == "cuda" else _peak_on_cpu(call)


def _peak_on_cuda(call: Call, device: torch.device) -> int:
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del kept
    return peak


def _peak_on_cpu(call: Call) -> int:
    """The allocator of the CPU keeps no record; the profiler sees every allocation and release."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    return _highest(profile, kept)


def _highest(profile: Any, _kept: Any) -> int:
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak
