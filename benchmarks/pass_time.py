"""What the pass itself costs, beside timm's and torch's: time, its growth with depth, and memory.

    python benchmarks/pass_time.py [--rounds 7] [--only time|phases|growth|memory]

Everything is taken in one run, with the contenders taking turns, in CPU time of the process (a shared machine's wall
clock says little), as medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from tabulate import tabulate
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import fxrep
from fxrep import api, pipeline
from fxrep.bench.memory import peak_bytes
from fxrep.islands import collapse

CPU = torch.device("cpu")
#: by network: at most so many times timm's time (None: timm has no such form)
NETWORKS: Mapping[str, float | None] = {"repvgg_a0": 2, "fastvit_t8": 2, "mobileone_s0": 3, "resnet152": None}
DEPTHS = (10, 100, 1000)
#: what is watched: the phase, and the function by where it is looked up
PHASES: tuple[tuple[str, Any, str], ...] = (
    ("copying the modules", api, "structural_copy"), ("tracing", collapse, "trace"),
    ("reading", pipeline, "functionalize"), ("reading", pipeline, "read_graph"),
    ("planning", pipeline.Pipeline, "_plan"), ("folding", pipeline, "fold"), ("proof", pipeline, "certify"),
    ("writing the graph", pipeline.Rewriter, "write"), ("report", pipeline.Pipeline, "_report"),
    ("report", pipeline, "pictures"), ("plan of refolding", api, "make_fold_plan"),
    ("plan of refolding", api.Architecture, "of"),
)  # fmt: skip


class Block(nn.Module):
    """RepVGG's three branches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.narrow = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.skip = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (self.wide(x) + self.narrow(x) + self.skip(x)).relu()


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("resnet"):
        return torchvision.models.get_model(name, weights=None).eval()
    return timm.create_model(name, pretrained=False).eval()


def medians(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median CPU and wall seconds of each call; they take turns, and the first turn only warms up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time(), time.perf_counter()
            call()
            taken[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return {
        n: (statistics.median(c for c, _ in t[1:]), statistics.median(w for _, w in t[1:])) for n, t in taken.items()
    }


def time_of_the_pass(rounds: int) -> str:
    rows = []
    for name, limit in NETWORKS.items():
        model = build(name)
        calls: dict[str, Callable[[], Any]] = {
            "timm": partial(reparameterize_model, model),
            "fuse": partial(fuse, model),
            "fxrep": partial(fxrep.reparameterize, model),
        }
        found = medians(calls, rounds)
        (timm_, _), (fuse_, _), (ours, wall) = (found[c] for c in calls)
        allowed = "-" if limit is None else f"{limit:g}"
        rows.append((name, f"{timm_:.3f}", f"{fuse_:.3f}", f"{ours:.3f}", f"{wall:.3f}",
                     f"{ours / timm_:.2f} (≤ {allowed})", f"{ours / fuse_:.2f} (≤ 1)"))  # fmt: skip
    headers = ("network", "timm s", "fuse s", "fxrep s", "fxrep wall s", "to timm", "to fuse")
    return tabulate(rows, headers, disable_numparse=True)


class Phases:
    """CPU seconds of the pass by what it does; what a phase calls of another counts for that one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner: list[float] = []

    def timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            self.inner.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                taken = time.process_time() - start
                self.seconds[phase] = self.seconds.get(phase, 0.0) + taken - self.inner.pop()
                if self.inner:
                    self.inner[-1] += taken

        return run

    @contextmanager
    def watched(self) -> Iterator[None]:
        places = [(phase, owner, name, getattr(owner, name)) for phase, owner, name in PHASES]
        for phase, owner, name, call in places:
            setattr(owner, name, self.timed(phase, call))
        try:
            yield
        finally:
            for _, owner, name, call in places:
                setattr(owner, name, call)


def phases(rounds: int) -> str:
    """Where the time goes: the share of each phase, of the round that took least."""
    names, columns = list(NETWORKS), []
    for name in names:
        model, best = build(name), dict[str, float]()
        for _ in range(rounds + 1):
            found = Phases()
            with found.watched():
                found.timed("rest", fxrep.reparameterize)(model)
            best = min(best or found.seconds, found.seconds, key=lambda s: sum(s.values()))
        columns.append(best)
    rows = [
        (p, *(f"{c.get(p, 0.0) / sum(c.values()):.0%}" for c in columns))
        for p in (*dict.fromkeys(p for p, *_ in PHASES), "rest")
    ]
    rows.append(("seconds", *(f"{sum(c.values()):.3f}" for c in columns)))
    return tabulate(rows, ("phase", *names), disable_numparse=True)


def growth(rounds: int) -> str:
    """RepVGG blocks in a row: seconds, and per block relative to the shallowest."""
    nets = {depth: nn.Sequential(*(Block(16) for _ in range(depth))).eval() for depth in DEPTHS}
    found = medians({str(d): partial(fxrep.reparameterize, net) for d, net in nets.items()}, rounds)
    least = found[str(DEPTHS[0])][0] / DEPTHS[0]
    rows = [(d, f"{found[str(d)][0]:.3f}", f"{found[str(d)][0] / d / least:.2f} (≤ 1.3)") for d in DEPTHS]
    return tabulate(rows, ("blocks", "fxrep s", "per block, to the shallowest"), disable_numparse=True)


def memory() -> str:
    rows = []
    for name in NETWORKS:
        weights = sum(t.nbytes for t in build(name).state_dict().values())
        copied = peak_bytes(partial(fxrep.reparameterize, build(name)), CPU) / weights
        inplace = peak_bytes(partial(fxrep.reparameterize, build(name), inplace=True), CPU) / weights
        rows.append((name, f"{weights / 1e6:.1f} MB", f"{copied:.2f} (≤ 1.2)", f"{inplace:.2f} (≤ 0.2)"))
    return tabulate(rows, ("network", "weights", "extra, copied", "extra, in place"), disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("time", "phases", "growth", "memory"))
    args = parser.parse_args()
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads\n")
    parts: dict[str, Callable[[], str]] = {
        "time": partial(time_of_the_pass, args.rounds), "phases": partial(phases, args.rounds),
        "growth": partial(growth, args.rounds), "memory": memory,
    }  # fmt: skip
    for name, part in parts.items():
        if args.only in (None, name):
            print(f"{part()}\n", flush=True)


if __name__ == "__main__":
    main()
