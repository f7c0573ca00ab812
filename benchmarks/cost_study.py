"""Predicted against measured: what each collapse of some networks saves, by the cost model and by the clock.

    python benchmarks/cost_study.py [--rounds 15] [--only repvgg_a0] [--markdown cost-study.md]

The network and its collapse are run op by op, in turn, on one input. What an op takes there, with what came before it
still in the caches, is its time; that of a decision the sum over the ops it replaces, before, and its layer's, after.
Decisions of the same layers at the same sizes are one line, with the median over them.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import fx, nn

from fxrep.calibration import describe, measure
from fxrep.cli import load
from fxrep.copying import structural_copy
from fxrep.cost import PROFILES, Aim, Profile, duration
from fxrep.pipeline import Pipeline
from fxrep.rewrite import held_at, layer_names
from fxrep.trace import Traced, trace
from fxrep.zoo.preparation import randomise

NETWORKS = ("repvgg_a0", "mobileone_s1", "fastvit_t8", "repvit_m1", "ghostnetv3_050", "resnet50")
CPU = torch.device("cpu")
WARMING = 3  # rounds that are not counted


class Timed(fx.Interpreter):
    """Runs a graph and keeps the seconds of each node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.taken: dict[str, list[float]] = defaultdict(list)

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        call = getattr(self, n.op)
        start = time.perf_counter()
        result = call(n.target, args, kwargs)
        self.taken[n.name].append(time.perf_counter() - start)
        return result


class Decided(NamedTuple):
    """Seconds of one decision: before and after, predicted and measured."""

    network: str
    what: str
    predicted: tuple[float, float]
    measured: tuple[float, float]

    @property
    def gains(self) -> tuple[float, float]:
        return self.predicted[0] / self.predicted[1], self.measured[0] / self.measured[1]


@torch.no_grad()
def study(name: str, profile: Profile, rounds: int) -> list[Decided]:
    """The decisions that became one layer, which has a time of its own."""
    model = load(f"timm:{name}").eval()
    randomise(model)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    traced = trace(structural_copy(model), {"x": x})
    assert isinstance(traced, Traced), traced
    pipeline = Pipeline(name, traced, {next(n.name for n in traced.graph.nodes): x}, Aim(profile), strict=False)
    original, collapsed = Timed(_module(pipeline)), Timed(pipeline.rewrite()[0].eval())
    for turn in range(rounds):
        for each in (original, collapsed) if turn % 2 == 0 else (collapsed, original):
            each.run(x)
    return list(_decided(name, pipeline, original, collapsed))


def _module(pipeline: Pipeline) -> fx.GraphModule:
    """What was read, as a module of its own."""
    wanted = {str(n.target) for n in pipeline.graph.nodes if n.op in ("call_module", "get_attr")}
    return fx.GraphModule({t: held_at(t, pipeline.modules) for t in wanted}, copy.deepcopy(pipeline.graph)).eval()


def _decided(name: str, pipeline: Pipeline, original: Timed, collapsed: Timed) -> Iterator[Decided]:
    plan = pipeline.plan
    layers = layer_names(plan, pipeline.nodes, pipeline.traced.modules)
    by_layer = {str(n.target): n.name for n in collapsed.module.graph.nodes if n.op == "call_module"}
    for decision in plan.decisions.values():
        node = by_layer.get(layers[id(next(decision.recipe.emits))])
        if node is None or decision.recipe.steps != 1 or decision.node != decision.at:
            continue
        gone = [n for n in decision.replaced if n in plan.removed or n == decision.at]
        before = sum(median(original.taken[n][WARMING:]) for n in gone)
        convolutions = sum(_is_layer(pipeline, n) for n in gone)
        what = f"{convolutions} layers, {len(gone) - convolutions} other ops -> {decision.recipe.describe()}"
        after = median(collapsed.taken[node][WARMING:])
        yield Decided(name, what, (decision.seconds_before, decision.seconds_after), (before, after))


def _is_layer(pipeline: Pipeline, name: str) -> bool:
    module = pipeline.modules.get(str(pipeline.nodes[name].target))
    return isinstance(module, (nn.Conv2d, nn.Linear))


def gathered(found: Sequence[Decided]) -> list[Decided]:
    """One line for what is decided alike, with medians."""
    alike: dict[tuple[Any, ...], list[Decided]] = defaultdict(list)
    for each in found:
        alike[each.network, each.what, each.predicted].append(each)
    return [
        group[0]._replace(measured=(median(d.measured[0] for d in group), median(d.measured[1] for d in group)))
        for group in alike.values()
    ]


def table(found: Sequence[Decided]) -> str:
    rows = [
        (d.network, d.what, *map(duration, (*d.predicted, *d.measured)), *(f"{g:.2f}" for g in d.gains)) for d in found
    ]
    headers = (
        "network",
        "decision",
        "predicted before",
        "after",
        "measured before",
        "after",
        "gain predicted",
        "measured",
    )
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def summary(name: str, found: Sequence[Decided]) -> str:
    """How often the prediction names the faster side, and how far off its gains and its times are."""
    right = sum((d.gains[0] >= 1) == (d.gains[1] >= 1) for d in found)
    off = sorted(abs(math.log(d.gains[0] / d.gains[1])) for d in found)
    times = [d.predicted[1] / d.measured[1] for d in found]
    wide = math.exp(off[int(0.9 * (len(off) - 1))])
    return (
        f"{name}: {len(found)} decisions, {right} predicted on the right side; the gain is off by a factor of "
        f"{math.exp(median(off)):.2f} in the median and {wide:.2f} in nine of ten; a layer is predicted to take "
        f"{median(times):.2f} times what it takes."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=NETWORKS)
    parser.add_argument("--markdown", type=Path, default=Path("cost-study.md"))
    args = parser.parse_args()
    text = [f"{describe(CPU, torch.float32)}"]
    for profile in (PROFILES["cpu"], measure(CPU, torch.float32)):
        found = gathered([d for name in args.only for d in study(name, profile, args.rounds)])
        kind = "measured profile" if profile.measured else "shipped profile"
        text += [summary(kind, found)]
    text += [table(found)]
    args.markdown.write_text("\n\n".join(text) + "\n", "utf-8")
    print("\n".join(text[:3]))


if __name__ == "__main__":
    main()
