"""What training costs with branches, folded online and as the deploy form; and how far AdamW is from the branches.

    python benchmarks/training.py [--only online|optimizer|adamw] [--rounds 15]

`online`: one step (forward and backward) of a plain network of 3x3 convolutions with branches whose batch norms are
frozen, of the same folded at each forward (`fxrep.online`), and of its deploy form, taking turns in one run: times,
what autograd keeps for the backward pass (parameters not counted), and the most that was held at once.
`optimizer`: the same of whole steps: the plain network under SGD, the target of its constant-scale branches under
RepOptimizer, those branches, and RepVGG's, each with batch norms in training mode.
`adamw`: relative differences between branches under AdamW and their target under RepOptimizer(AdamW), in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxrep
from fxrep.bench.memory import peak_bytes
from fxrep.cost import duration
from fxrep.stopwatch import take_turns

CPU = torch.device("cpu")
BLOCKS = ("repvgg", "acnet", "mobileone", "dbb")
BATCH, SIZE, WIDTHS, DEPTH = 16, 56, (32, 64), 2
EPS, STEPS = (1e-12, 1e-8, 1e-3), 20
HEADERS = ("form", "step", "to the first", "kept", "peak")


def plain(widths: tuple[int, ...], depth: int) -> nn.Sequential:
    layers, channels = list[nn.Module](), 3
    for width in widths:
        for block in range(depth):
            layers += [
                nn.Conv2d(channels, width, 3, 1 if block else 2, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def frozen(net: nn.Module) -> nn.Module:
    """In training mode, its batch norms by statistics of their own that stay; what scales and shifts in them trains."""
    for norm in (m for m in net.train().modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.3, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        norm.eval()
    return net


class Step:
    """Forward and backward of a batch of random numbers, and the optimizer's step if there is one."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.net, self.optimizer = net, optimizer
        self.x, self.y = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(10, (BATCH,))

    def __call__(self) -> None:
        self.net.zero_grad()
        nn.functional.cross_entropy(self.net(self.x), self.y).backward()
        if self.optimizer is not None:
            self.optimizer.step()


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """What autograd stores of a forward; parameters are there anyway, and memory that is stored twice counts once."""
    own, kept = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(x)
    assert out.requires_grad  # alive until here, so that no memory is counted for another
    return sum(kept.values())


def online(rounds: int) -> str:
    rows = [row for block in BLOCKS for row in _rows(block, _forms(block), rounds)]
    return tabulate(rows, ("block", *HEADERS), tablefmt="github", disable_numparse=True)


def _forms(block: str) -> dict[str, Step]:
    torch.manual_seed(0)
    branches = frozen(fxrep.expand(plain(WIDTHS, DEPTH), block))
    deploy = fxrep.reparameterize(branches).train()
    return {"branches": Step(branches), "online": Step(fxrep.online(branches)), "deploy": Step(deploy)}


def optimizer(rounds: int) -> str:
    torch.manual_seed(0)
    net = plain(WIDTHS, DEPTH)
    branches = fxrep.constant_scales(net, fxrep.scales_of(fxrep.hyper_search(net))).train()
    target, repvgg = fxrep.target(branches), fxrep.expand(net, "repvgg").train()
    sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)
    steps = {
        "plain, SGD": Step(net, sgd(net.parameters())),
        "target, RepOptimizer": Step(target, fxrep.RepOptimizer(sgd(target.parameters()), target)),
        "its branches, SGD": Step(branches, sgd(branches.parameters())),
        "RepVGG, SGD": Step(repvgg, sgd(repvgg.parameters())),
    }
    return tabulate(_rows("repvgg", steps, rounds), ("block", *HEADERS), tablefmt="github", disable_numparse=True)


def _rows(block: str, steps: Mapping[str, Step], rounds: int) -> Iterator[tuple[str, ...]]:
    """A row for each form; the first is what the others are compared with."""
    calls = list(steps.values())
    times = take_turns(calls, rounds, CPU)
    for form, call, taken in zip(steps, calls, times, strict=True):
        ratio, peak = taken.to(times[0]), peak_bytes(call, CPU)
        yield (
            block, form, duration(taken.median), f"{ratio.median:.2f} ± {ratio.spread:.2f}",
            f"{kept_bytes(call.net, call.x) / 2**20:.1f} MiB", f"{peak / 2**20:.1f} MiB",
        )  # fmt: skip


def adamw() -> str:
    rows = [(f"{eps:g}", *(f"{d:.1e}" for d in _differences(eps))) for eps in EPS]
    return tabulate(
        rows, ("eps", "weights", "outputs", "outputs, plain AdamW"), tablefmt="github", disable_numparse=True
    )


def _differences(eps: float) -> tuple[float, float, float]:
    """Of weights and outputs after the steps; and of outputs where the multipliers are left out."""
    torch.manual_seed(0)
    net = plain((8, 8), 2).double()
    scales = fxrep.scales_of(fxrep.hyper_search(net))
    branches = fxrep.constant_scales(net, scales).train()
    target, bare = fxrep.target(branches), fxrep.target(branches)
    adam = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1, eps=eps)
    data = [(torch.randn(8, 3, 12, 12, dtype=torch.float64), torch.randint(10, (8,))) for _ in range(STEPS)]
    optimizers: Mapping[nn.Module, Callable[[], torch.optim.Optimizer]] = {
        branches: lambda: adam(branches.parameters()),
        target: lambda: fxrep.RepOptimizer(adam(target.parameters()), target),
        bare: lambda: adam(bare.parameters()),
    }
    for model, make in optimizers.items():
        step = Step(model, make())
        for step.x, step.y in data:
            step()
    expected = dict(fxrep.target(branches).named_parameters())
    with torch.no_grad():
        weights = max(_relative(p, expected[name]) for name, p in target.named_parameters())
        outputs = [model.eval()(data[0][0]) for model in optimizers]
    return weights, _relative(outputs[1], outputs[0]), _relative(outputs[2], outputs[0])


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("online", "optimizer", "adamw"))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    parts = {"online": partial(online, args.rounds), "optimizer": partial(optimizer, args.rounds), "adamw": adamw}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {BATCH}x3x{SIZE}x{SIZE}\n")
    for name, part in parts.items():
        if args.only in (None, name):
            print(f"{part()}\n", flush=True)


if __name__ == "__main__":
    main()
