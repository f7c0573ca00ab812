"""What the pass itself costs, beside timm's and torch's: time, its growth with depth, and memory.

    python benchmarks/pass_time.py [--rounds 7] [--only time|cold|phases|growth|memory]

Everything is taken in one run, with the contenders taking turns, in CPU time of the process (a shared machine's wall
clock says little), as medians.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
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
CONTENDERS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "timm": reparameterize_model, "fuse": fuse, "fxrep": fxrep.reparameterize,
}  # fmt: skip
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
    """Median CPU and wall seconds of each call; they take turns, and the first turn only warms up.

    What Python's collector has to look at for the others is not counted: it is called before each."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            gc.collect()
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
        found = medians({name: partial(call, model) for name, call in CONTENDERS.items()}, rounds)
        (timm_, _), (fuse_, _), (ours, wall) = (found[c] for c in CONTENDERS)
        to_timm = "-" if limit is None else f"{ours / timm_:.2f} (≤ {limit:g})"
        rows.append((name, f"{timm_:.3f}", f"{fuse_:.3f}", f"{ours:.3f}", f"{wall:.3f}",
                     to_timm, f"{ours / fuse_:.2f} (≤ 1)"))  # fmt: skip
    headers = ("network", "timm s", "fuse s", "fxrep s", "fxrep wall s", "to timm", "to fuse")
    return tabulate(rows, headers, disable_numparse=True)


def in_a_fresh_process(rounds: int) -> str:
    """One call in a process of its own, as a user has it: what earlier calls left to the allocator is of no help."""
    rows = []
    for name in NETWORKS:
        taken: dict[str, list[float]] = {c: [] for c in CONTENDERS}
        for _ in range(rounds):
            for contender, found in taken.items():
                command = [sys.executable, __file__, "--once", name, contender]
                found.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        timm_, fuse_, ours = (statistics.median(taken[c]) for c in CONTENDERS)
        has_form = NETWORKS[name] is not None
        rows.append((name, f"{timm_:.3f}", f"{fuse_:.3f}", f"{ours:.3f}",
                     f"{ours / timm_:.2f}" if has_form else "-", f"{ours / fuse_:.2f}"))  # fmt: skip
    return tabulate(
        rows, ("network, first call", "timm s", "fuse s", "fxrep s", "to timm", "to fuse"), disable_numparse=True
    )


def once(name: str, contender: str) -> float:
    """CPU seconds of the first call on a network, after some on a tiny one, which load what is loaded once."""
    call, tiny, model = CONTENDERS[contender], nn.Sequential(Block(4), Block(4)).eval(), build(name)
    for _ in range(3):
        call(tiny)
    start = time.process_time()
    call(model)
    return time.process_time() - start


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
    parser.add_argument("--only", choices=("time", "cold", "phases", "growth", "memory"))
    parser.add_argument("--once", nargs=2, metavar=("NETWORK", "CONTENDER"), help="one call in this process, no table")
    args = parser.parse_args()
    if args.once:
        print(once(*args.once))
        return
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads\n")
    parts: dict[str, Callable[[], str]] = {
        "time": partial(time_of_the_pass, args.rounds), "cold": partial(in_a_fresh_process, args.rounds),
        "phases": partial(phases, args.rounds), "growth": partial(growth, args.rounds), "memory": memory,
    }  # fmt: skip
    for name, part in parts.items():
        if args.only in (None, name):
            print(f"{part()}\n", flush=True)


if __name__ == "__main__":
    main()
