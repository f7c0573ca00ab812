"""`fxrep zoo`: a row for every network, whatever becomes of it, and the judgement of what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from signal import Signals

import pytest
import torch
import torch.nn.functional as F
from blocks import image
from helpers import randomise
from torch import Tensor, nn
from zoo_models import HERE, Unrolled

from fxrep import zoo
from fxrep.cli import main
from fxrep.zoo.calls import Calls, Widened
from fxrep.zoo.kinds import KINDS
from fxrep.zoo.row import Row

MODELS = HERE.with_name("zoo_models.py")


def name_of(function: str) -> str:
    return f"{MODELS}:{function}"


def sweep(out: Path, *functions: str, **options: str) -> int:
    pairs = [(f"--{key}", value) for key, value in options.items()]
    flags = [part for pair in pairs for part in pair]
    return main(["zoo", *map(name_of, functions), "--out", str(out), *flags])


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Two networks that run and four that do not, swept once, through the command."""
    out = tmp_path_factory.mktemp("zoo") / "rows.jsonl"
    sweep(out, "hangs", timeout="1")
    functions = ("branches", "linear", "crashes", "broken", "greedy")
    return out, sweep(out, *functions, jobs="2", markdown=str(out.with_suffix(".md")))


@pytest.mark.parametrize("signal", [Signals.SIGTERM, Signals.SIGKILL])
def test_what_is_examined_ends_with_a_sweep_that_is_killed(tmp_path: Path, signal: Signals):
    heart = tmp_path / "heart"
    command = [sys.executable, "-m", "fxrep", "zoo", name_of("beats"), "--out", str(tmp_path / "rows.jsonl")]
    sweeping = subprocess.Popen(command, env={**os.environ, "HEARTBEAT": str(heart)}, stderr=subprocess.DEVNULL)
    try:
        assert any(heart.exists() or time.sleep(0.1) for _ in range(1200)), "it never began"
        sweeping.send_signal(signal)
        sweeping.wait(60)
        assert any(_has_stopped(heart) for _ in range(60)), "it goes on without the sweep"
    finally:
        sweeping.kill()


def _has_stopped(heart: Path) -> bool:
    before = heart.read_text()
    time.sleep(0.5)
    return heart.read_text() == before


def row(swept: tuple[Path, int], function: str) -> Row:
    return next(r for r in zoo.read_rows(swept[0]) if r.name == name_of(function))


def test_calls_errors_and_other_tools_are_measured(swept: tuple[Path, int]):
    found = row(swept, "branches")
    assert {k: found.before[k] for k in ("conv", "bn", "add")} == {"conv": 3, "bn": 4, "add": 2}
    assert {k: found.after[k] for k in ("conv", "bn", "add")} == {"conv": 2, "bn": 0, "add": 0}
    assert found.before["params"] - found.after["params"] == 6 * 6 + 4 * 4 * 6 - 6
    sides = [int(n) for n in found.input.split("×")]
    pixels = sides[0] * sides[2] * sides[3]
    assert found.before["macs"] == pixels * (6 * 3 * 9 + 6 * 6 * 9 + 6 * 6)
    assert found.after["macs"] == pixels * (6 * 3 * 9 + 6 * 6 * 9)
    assert found.fuse == {"conv": 3, "bn": 1, "add": 2}
    assert found.timm == {"conv": 3, "bn": 4, "add": 2}
    assert found.error is not None
    assert found.error < 1e-12
    assert found.status == "equal"


def test_a_linear_layer_is_swept_too(swept: tuple[Path, int]):
    found = row(swept, "linear")
    assert (found.before["linear"], found.before["bn"], found.after["linear"], found.after["bn"]) == (1, 2, 1, 0)
    assert found.status == "equal"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("crashes", "crashed with exit code 3"),
        ("hangs", "took more than 1 s"),
        ("greedy", "needs more than 8 GiB"),
        ("broken", "no such network"),
    ],
)
def test_whatever_goes_wrong_is_a_row(swept: tuple[Path, int], function: str, why: str):
    found = row(swept, function)
    assert found.status == "failed"
    assert why in found.why


def test_a_failure_is_told_by_the_exit_code(swept: tuple[Path, int]):
    assert swept[1] == 1


def test_table_has_a_row_for_every_network(swept: tuple[Path, int]):
    lines = swept[0].with_suffix(".md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    goals, (headings, _, *rows) = table[:8], table[8:]
    assert ["accepted", "2 of 6"] in goals
    assert ["equal", "2 of 2"] in goals
    assert ["bn calls", "6 → 0"] in goals
    assert len(rows) == 6
    cells = next(dict(zip(headings, r, strict=True)) for r in rows if r[0].endswith("branches"))
    wanted = {
        "conv": "3 → 2",
        "bn": "4 → 0",
        "add": "2 → 0",
        "linear": "0",
        "torch leaves": "3 / 1 / 2",
        "status": "equal",
    }
    assert {heading: cells[heading] for heading in wanted} == wanted
    assert any("4 failed" in line for line in lines)


def test_rows_that_are_there_are_not_made_again(swept: tuple[Path, int], tmp_path: Path):
    """A sweep that was cut off in the middle of a line goes on with what is missing, and keeps what is there."""
    out = tmp_path / "rows.jsonl"
    other = Row("kept", failed="by an earlier sweep")
    marked = Row(name_of("linear"), failed="marked")
    out.write_text(f"{other.to_json()}\n{marked.to_json()}\n{marked.to_json()[:20]}\n", encoding="utf-8")
    assert sweep(out, "linear") == 1
    assert zoo.read_rows(out) == sorted([other, marked], key=lambda r: r.name)
    assert main(["zoo", name_of("linear"), "--out", str(out), "--redo"]) == 1
    again = {r.name: r for r in zoo.read_rows(out)}
    assert again["kept"] == other
    assert again[marked.name].status == "equal"
    assert len(again) == 2


def test_what_was_not_run_and_what_falls_short_is_told():
    counts = dict.fromkeys((*KINDS, "macs", "params"), 2)
    bad = Row("a", before=counts, after=counts | {"conv": 3}, timm={"conv": 2}, unfolded=("after conv",), error=0.0)
    good = Row("b", before=counts, after=counts | {"conv": 1}, timm="ValueError", error=0.0)
    wrong = Row("c", before=counts, after=counts, error=1.0, own32=1e-7, new32=1.0)
    text = zoo.markdown([bad, good, wrong], "fxrep zoo", ["a", "b", "c", "d", "e"])
    assert "Not run: d, e." in text
    wanted = {"no more calls": "2 of 3", "no more conv": "0 of 1", "no bn left": "2 of 3", "equal": "2 of 3"}
    for goal, count in wanted.items():
        assert [count in line for line in text.splitlines() if line.startswith(f"| {goal}")] == [True]
    assert "conv 2 → 3; timm leaves 2 conv, not 3; 1 bn after conv" in text


def test_rows_survive_being_written(swept: tuple[Path, int]):
    rows = zoo.read_rows(swept[0])
    assert [Row.from_json(r.to_json()) for r in rows] == rows
    assert all(json.loads(r.to_json())["name"] for r in rows)


def test_a_pattern_that_fits_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["zoo", "timm:repvgg_a0", "--only", "torchvision:*", "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert "no network is called torchvision:*" in capsys.readouterr().err


def calls_of(model: nn.Module, x: Tensor) -> Calls:
    with torch.no_grad(), Calls() as calls:
        randomise(model.eval())(x)
    return calls


class ComputedWeight(nn.Module):
    """A weight that a batch norm makes: no convolution follows that batch norm in the data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.view(1, 3, -1), None, None, training=True).view(3, 3, 1, 1)
        return F.conv2d(x, weight)


def test_the_truth_is_of_float64_throughout():
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float() / 3 + torch.ones(1, dtype=torch.float32) + x.to(torch.float32) / 7

    x = torch.rand(4, dtype=torch.float64)
    with Widened():
        out = Casts()(x)
    assert torch.equal(out, x / 3 + torch.ones(1, dtype=torch.float64) + x / 7)


def two_readers() -> nn.Module:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + y.relu()

    return Two()


@pytest.mark.parametrize(
    ("model", "shape", "sides"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (2, 3, 8, 8), ["after conv"]),
        (Unrolled(), (2, 3, 8, 8), ["after conv"]),
        (nn.Sequential(nn.Linear(3, 4), nn.Flatten(0, 1), nn.BatchNorm1d(4)), (2, 5, 3), ["after linear"]),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), (2, 3, 8, 8), ["before conv"]),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 4)), (2, 3), ["before linear"]),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), (2, 3, 8, 8), []),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)), (2, 3, 8, 8), []),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4)), (2, 3, 8, 8), []),
        (two_readers(), (2, 3, 8, 8), []),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 1)), (2, 3, 8, 8), []),
        (ComputedWeight(), (2, 3, 8, 8), []),
    ],
)  # fmt: skip
def test_batch_norms_that_a_neighbour_could_take(model: nn.Module, shape: tuple[int, ...], sides: list[str]):
    calls = calls_of(model, image(*shape).float())
    assert calls.unfolded() == sides
    assert calls.counts["bn"] == 1


def test_bias_of_a_linear_layer_is_no_addition():
    """On a view that is not contiguous torch multiplies, and then adds the bias."""
    calls = calls_of(nn.Linear(3, 4), image(2, 3, 5).float().transpose(1, 2))
    assert calls.counts == {"conv": 0, "linear": 1, "bn": 0, "add": 0, "mul": 0, "pool": 0}
    assert calls.macs == 2 * 5 * 3 * 4


BEFORE = {"conv": 3, "linear": 1, "bn": 2, "add": 1, "mul": 0, "pool": 0, "macs": 100, "params": 10}
GOOD = {"name": "n", "before": BEFORE, "after": BEFORE, "error": 1e-12, "own32": 1e-6, "new32": 2e-6}


@pytest.mark.parametrize(
    ("change", "status", "why"),
    [
        ({}, "equal", ""),
        ({"after": {**BEFORE, "macs": 101}}, "short", "macs 100 → 101"),
        ({"timm": {"conv": 2, "bn": 2, "add": 1}}, "short", "timm leaves 2 conv, not 3"),
        ({"unfolded": ("after conv", "after conv")}, "short", "2 bn after conv"),
        ({"unfolded": ("after conv",), "kept": ("Net: not-traceable, it branches",)}, "short", "it branches"),
        ({"error": 1e-3}, "different", "error 1.0e-03"),
        ({"new32": 1e-5}, "different", "in float32 1.0e-05"),
        ({"error": float("nan")}, "different", "error nan"),
        ({"fuse": "TraceError"}, "equal", ""),
    ],
)
def test_judgement(change: dict[str, object], status: str, why: str):
    found = Row(**{**GOOD, **change})  # type: ignore[arg-type]
    assert found.status == status
    assert why in found.why
    assert bool(why) == bool(found.why)


def test_default_names_are_of_known_libraries():
    names = zoo.default_names()
    assert len(names) == len(set(names))
    assert {name.partition(":")[0] for name in names} == {"torchvision", "timm", "transformers"}
