"""What `train_digits.py` trains: scikit-learn's bundled digits, a small plain VGG, and the loop."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

Data = tuple[Tensor, Tensor]
BATCH = 64


def load() -> tuple[Data, Data]:
    """1347 training and 450 test images of 8x8 pixels; the split is the same for every seed."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(digits.images, dtype=torch.float32)[order, None] - 4.9) / 6.0
    y = torch.tensor(digits.target)[order]
    return (x[:1347], y[:1347]), (x[1347:], y[1347:])


def vgg(widths: tuple[int, ...] = (16, 32), depths: tuple[int, ...] = (3, 5)) -> nn.Sequential:
    """3x3 convolutions, each with batch norm and ReLU; every stage but the first halves the map."""
    layers, channels = list[nn.Module](), 1
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for block in range(depth):
            stride = 2 if stage and not block else 1
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def fit(net: nn.Module, data: Data, epochs: int, title: str, wrap: Callable[..., Any] = lambda sgd, _: sgd) -> float:
    """SGD with momentum, Nesterov, weight decay and a cosine; gives the median CPU seconds of a step."""
    x, y = data
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]  # biases, batch norms and scales, as is usual
    groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = wrap(torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True), net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // BATCH))
    seconds = []
    for _ in tqdm(range(epochs), desc=title, leave=False):
        for index in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
            start = time.process_time()
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(shifted(x[index])), y[index]).backward()
            optimizer.step()
            schedule.step()
            seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def shifted(x: Tensor) -> Tensor:
    """The batch moved by up to one pixel along each axis."""
    return x.roll(tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))


@torch.no_grad()
def accuracy(run: Callable[[Tensor], Tensor], data: Data) -> float:
    x, y = data
    return (run(x).argmax(1) == y).double().mean().item()


def stored_bytes(net: nn.Module, x: Tensor) -> int:
    """What autograd keeps of a batch for the backward pass, parameters not counted."""
    own, kept = {p.data_ptr() for p in net.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(x)  # noqa: F841 - alive until counted, so that no memory is used twice
        return sum(kept.values())
