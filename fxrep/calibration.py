"""The profile of the machine itself: a few operators of each kind are timed, in seconds, and the result is kept."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from statistics import geometric_mean
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrep.cost import KINDS, Profile
from fxrep.errors import FxrepError
from fxrep.stopwatch import Call, take_turns

ROUNDS, BUDGET = 15, 0.5  # for each kind, whichever is over first
FORMAT = 1  # of the file: raised where a file of before would be misread


class Layer(NamedTuple):
    """A square convolution of `channels` to `channels` on a map of `size` x `size`."""

    channels: int
    size: int
    kernel: int
    groups: int = 1


#: What networks are made of, from the wide maps of their first stages to the deep ones of their last.
LAYERS: Mapping[str, Sequence[Layer]] = {
    "dense": (Layer(64, 56, 3), Layer(128, 28, 3), Layer(256, 14, 3), Layer(512, 7, 3)),
    "pointwise": (Layer(64, 56, 1), Layer(256, 28, 1), Layer(512, 14, 1), Layer(1024, 7, 1)),
    "depthwise": (Layer(64, 56, 3, 64), Layer(128, 28, 5, 128), Layer(384, 14, 7, 384), Layer(512, 14, 3, 512)),
    "grouped": (Layer(128, 28, 3, 4), Layer(256, 28, 3, 32), Layer(512, 14, 3, 32)),
}
TOKENS = ((196, 384, 384), (196, 384, 1536), (49, 768, 768))  # rows, inputs and outputs of linear layers
MAPS = ((64, 28), (64, 56), (64, 112), (256, 112))  # channels and size of maps that are added
TINY = 8


def calibrate(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, again: bool = False
) -> Profile:
    """The cost profile of a device, measured in a few seconds with as many threads as torch uses now.

    It is kept in the user's cache folder, by device, dtype, threads and version of torch, and found there the next
    time; `again` measures anew. Pass it on: `reparameterize(model, x, profile=calibrate())`.

    Raises FxrepError where there is no such device.
    """
    where = find_device(device)
    path = cache_path(where, dtype)
    if not again and (found := _read(path)) is not None:
        return found
    profile = measure(where, dtype)
    _write(profile, path)
    return profile


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype) -> Profile:
    """Peaks, bandwidth and launch, as the roofline wants them: what an operator takes beyond its launch is its work."""
    launch = geometric_mean(t.median for t in take_turns(list(_tiny(device, dtype)), ROUNDS, device, BUDGET))

    def beyond(calls: Sequence[Call]) -> list[float]:
        taken = [t.median for t in take_turns(calls, ROUNDS, device, BUDGET)]
        return [max(t - launch, 0.1 * t) for t in taken]

    peak = {}
    for kind in KINDS:
        cases = list(_linear(device, dtype) if kind == "linear" else _convolutions(LAYERS[kind], device, dtype))
        peak[kind] = geometric_mean(m / t for (m, _), t in zip(cases, beyond([c for _, c in cases]), strict=True))
    moves = list(_additions(device, dtype))
    bandwidth = geometric_mean(b / t for (b, _), t in zip(moves, beyond([c for _, c in moves]), strict=True))
    (x,) = _drawn((1, TINY, 4, 4), device=device, dtype=dtype)
    view = take_turns([partial(torch.narrow, x, 1, 0, TINY // 2)], ROUNDS, device, BUDGET)[0].median
    return Profile(describe(device, dtype), peak, bandwidth, launch, measured=True, view=view)


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """What a measurement depends on."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{device_name(device)}{threads}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}"


def device_name(device: torch.device) -> str:
    """The name its maker gave it.

    >>> bool(device_name(torch.device("cpu")))
    True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type == "cpu" else device.type


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def find_device(device: str | torch.device) -> torch.device:
    """Raises FxrepError where there is none of that name, or where nothing can be timed on it."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise FxrepError(f"there is no device {device} here: {' '.join(str(error).split())[:160]}") from None
    if found.type == "meta":
        raise FxrepError("the device meta computes nothing that could be timed; calibrate the one that is deployed to")
    return found


def _tiny(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Operators with next to nothing to do, called as a network calls them: a layer, a batch norm and an addition."""
    (x,) = _drawn((1, TINY, 4, 4), device=device, dtype=dtype)
    yield partial(nn.Conv2d(TINY, TINY, 3, padding=1, device=device, dtype=dtype), x)
    yield partial(nn.BatchNorm2d(TINY, device=device, dtype=dtype).eval(), x)
    yield partial(torch.add, x, x)


def _convolutions(layers: Sequence[Layer], device: torch.device, dtype: torch.dtype) -> Iterator[tuple[float, Call]]:
    """Multiply-adds, and what does them."""
    for channels, size, kernel, groups in layers:
        shape = (channels, channels // groups, kernel, kernel)
        x, weight, bias = _drawn((1, channels, size, size), shape, (channels,), device=device, dtype=dtype)
        run = partial(F.conv2d, x, weight, bias, padding=kernel // 2, groups=groups)
        yield float(prod(shape) * size * size), run


def _linear(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[float, Call]]:
    for rows, inputs, outputs in TOKENS:
        x, weight, bias = _drawn((rows, inputs), (outputs, inputs), (outputs,), device=device, dtype=dtype)
        yield float(rows * inputs * outputs), partial(F.linear, x, weight, bias)


def _additions(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[float, Call]]:
    """Bytes of two maps that are read and of one that is written, counted as the cost model counts: in float32."""
    for channels, size in MAPS:
        x, y = _drawn(*[(1, channels, size, size)] * 2, device=device, dtype=dtype)
        yield float(3 * 4 * x.numel()), partial(torch.add, x, y)


def _drawn(*shapes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def cache_path(device: torch.device, dtype: torch.dtype) -> Path:
    """The file of a measurement."""
    import platformdirs

    name = re.sub(r"[^A-Za-z0-9.]+", "-", describe(device, dtype)).strip("-")
    return Path(platformdirs.user_cache_dir("fxrep")) / "profiles" / f"{name}.json"


def _read(path: Path) -> Profile | None:
    """What was measured before; None where nothing was, or where what is there is no such file."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        profile = Profile(**kept["profile"])
        return profile if kept["format"] == FORMAT and set(profile.peak) == set(KINDS) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(profile: Profile, path: Path) -> None:
    """Whole or not at all: another process may read or write the same file meanwhile."""
    kept = json.dumps({"format": FORMAT, "profile": asdict(profile)}, indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as scratch:
            scratch.write(kept)
        os.replace(scratch.name, path)
    except OSError as error:
        fact = f"the profile cannot be kept at {path}: {error.strerror}"
        raise FxrepError(f"{fact}; set XDG_CACHE_HOME to a folder that can be written") from None
