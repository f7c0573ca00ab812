"""RepOptimizer in the company that optimizers keep: checkpoints, accumulation, scalers, clipping, several processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import relative_error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW
from training_cases import batches, built, train

import fxrep
from fxrep.errors import FxrepError

EXACT = 1e-12
OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}


def wrapped(target: nn.Module, **options: Any) -> fxrep.RepOptimizer:
    return fxrep.RepOptimizer(SGD(target.parameters(), **{**OPTIONS, **options}), target)


def outputs(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(net).eval()(batches(1)[0][0])


def pair(name: str = "repvgg") -> tuple[nn.Module, nn.Module]:
    branches = built(name)
    return branches, fxrep.target(branches)


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


@pytest.mark.parametrize("name", ["repvgg", "edges"])
def test_resumed_from_a_checkpoint_as_if_never_stopped(name: str, tmp_path: Path):
    branches, target = pair(name)
    train(branches, SGD(branches.parameters(), **OPTIONS), batches(8))
    optimizer = wrapped(target)
    train(target, optimizer, batches(8)[:4])
    torch.save({"net": target.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other = fxrep.target(built(name, seed=5))  # other scales: the multipliers come from the checkpoint
    resumed = wrapped(other)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, batches(8)[4:])
    assert relative_error(outputs(other), outputs(branches)) < EXACT


def test_a_state_without_multipliers_or_of_another_target_is_an_error():
    _, target = pair()
    optimizer = wrapped(target)
    with pytest.raises(FxrepError, match="no multipliers"):
        optimizer.load_state_dict(SGD(target.parameters(), lr=0.1).state_dict())
    with pytest.raises(FxrepError, match="another target"):
        optimizer.load_state_dict(wrapped(fxrep.target(built("acnet"))).state_dict())


def test_accumulated_gradients_and_a_missing_zero_grad():
    """Never zeroed: every step sees the sum of all gradients so far, in both."""
    branches, target = pair()
    for net, optimizer in ((branches, SGD(branches.parameters(), **OPTIONS)), (target, wrapped(target))):
        for batch in batches(4):
            loss(net, batch).backward()
            optimizer.step()
    assert relative_error(outputs(target), outputs(branches)) < EXACT


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_every_implementation_of_sgd(options: dict[str, Any]):
    branches, target = pair()
    train(branches, SGD(branches.parameters(), **OPTIONS), batches(4))
    train(target, wrapped(target, **options), batches(4))
    assert relative_error(outputs(target), outputs(branches)) < EXACT


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_every_implementation_of_adamw(options: dict[str, Any]):
    branches, target = pair("residual")  # one branch that trains: exact, whatever eps
    train(branches, AdamW(branches.parameters(), lr=1e-2), batches(4))
    optimizer = fxrep.RepOptimizer(AdamW(target.parameters(), lr=1e-2, **options), target)
    train(target, optimizer, batches(4))
    assert relative_error(outputs(target), outputs(branches)) < EXACT


def test_a_schedule_reaches_the_wrapped_optimizer_and_goes_on_after_a_checkpoint():
    branches, target = pair()
    inner = SGD(branches.parameters(), **OPTIONS)
    optimizers = [inner, wrapped(target)]
    for _ in range(2):
        schedules = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in optimizers]
        for batch in batches(2):
            train(branches, inner, [batch])
            train(target, optimizers[1], [batch])
            for schedule in schedules:
                schedule.step()
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    assert inner.param_groups[0]["lr"] == OPTIONS["lr"] / 16
    assert relative_error(outputs(target), outputs(branches)) < EXACT


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_a_gradient_scaler_unscales_and_skips(options: dict[str, Any]):
    branches, target = pair()
    for net, optimizer in ((branches, SGD(branches.parameters(), **OPTIONS)), (target, wrapped(target, **options))):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for number, batch in enumerate(batches(4)):
            optimizer.zero_grad()
            scaler.scale(loss(net, batch)).backward()
            if number == 1:
                next(net.parameters()).grad.fill_(torch.inf)  # this step must not happen
            scaler.step(optimizer)
            scaler.update()
    assert relative_error(outputs(target), outputs(branches)) < EXACT


def _clipped(net: nn.Module, optimizer: Any, clip: Any) -> list[float]:
    norms = []
    for batch in batches(6):
        optimizer.zero_grad()
        loss(net, batch).backward()
        norms.append(float(clip()))
        optimizer.step()
    return norms


@pytest.mark.parametrize("name", ["repvgg", "edges"])
def test_clipping_by_the_norm_of_the_branches(name: str):
    branches, target = pair(name)
    parameters, optimizer = list(branches.parameters()), wrapped(target)
    norms = _clipped(branches, SGD(parameters, **OPTIONS), lambda: nn.utils.clip_grad_norm_(parameters, 0.1))
    assert min(norms) > 0.1  # each was clipped
    assert _clipped(target, optimizer, lambda: optimizer.clip_grad_norm_(0.1)) == pytest.approx(norms, rel=1e-10)
    assert relative_error(outputs(target), outputs(branches)) < 1e-10


def test_clipping_by_the_targets_own_norm_is_another_training():
    branches, target = pair()
    ours, theirs = list(target.parameters()), list(branches.parameters())
    _clipped(branches, SGD(theirs, **OPTIONS), lambda: nn.utils.clip_grad_norm_(theirs, 0.1))
    _clipped(target, wrapped(target), lambda: nn.utils.clip_grad_norm_(ours, 0.1))
    assert relative_error(outputs(target), outputs(branches)) > 1e-4


def test_multipliers_follow_the_dtype():
    _, target = pair()
    optimizer = wrapped(target)
    target.float()
    x, y = batches(1)[0]
    nn.functional.cross_entropy(target(x.float()), y).backward()
    optimizer.step()
    assert {m.dtype for m in optimizer.multipliers.values()} == {torch.float32}


def test_another_optimizer_or_network_is_an_error():
    branches, target = pair()
    with pytest.raises(FxrepError, match="neither SGD nor AdamW"):
        fxrep.RepOptimizer(Adam(target.parameters()), target)
    with pytest.raises(FxrepError, match="has no rules"):
        fxrep.RepOptimizer(SGD(branches.parameters(), lr=0.1), branches)
    with pytest.raises(FxrepError, match="no parameter of the target"):
        fxrep.RepOptimizer(SGD(branches.parameters(), lr=0.1), target)
    edges = fxrep.target(built("edges"))
    with pytest.raises(FxrepError, match="use SGD"):
        fxrep.RepOptimizer(AdamW(edges.parameters()), edges)


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    branches, target = pair()
    parallel = [DistributedDataParallel(net) for net in (branches, target)]
    mine = [(x[rank::2], y[rank::2]) for x, y in batches(4)]
    train(parallel[0], SGD(branches.parameters(), **OPTIONS), mine)
    train(parallel[1], wrapped(target), mine)
    torch.save((outputs(branches), outputs(target), target.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path):
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    (branches, target, first), (_, _, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert relative_error(target, branches) < EXACT
    assert all(torch.equal(first[n], second[n]) for n, _ in fxrep.target(built("repvgg")).named_parameters())
