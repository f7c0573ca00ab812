"""The benchmark: what is run is what it says, everything that cannot be says why, and losses are told."""

from __future__ import annotations

import json

import pytest
import torch
from blocks import Block
from helpers import randomise
from torch import Tensor, nn

from fxrep.bench import ENGINES, FORMS, Bench, Row, Setting, bench
from fxrep.bench.door import steps_of
from fxrep.bench.memory import peak_bytes
from fxrep.cli import OK, UNUSABLE, main
from fxrep.errors import FxrepError, Unusable
from fxrep.stopwatch import Times

SHAPE = (2, 4, 9, 8)
CPU = torch.device("cpu")
QUICK = Setting(rounds=3)


def net() -> nn.Module:
    torch.manual_seed(0)
    return randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), Block(4))).eval()


def by_name(found: Bench) -> dict[tuple[str, str], Row]:
    return {(r.form, r.engine): r for r in found.rows}


def row(form: str, *samples: float, engine: str = "eager") -> Row:
    return Row("net", SHAPE, form, engine, Times(samples))


def test_every_form_and_engine_gives_what_the_original_gives():
    model = net()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = by_name(bench({"net": model}, [SHAPE], QUICK, engines=("eager", "channels_last")))
    assert set(found) == {(f, e) for f in FORMS for e in ("eager", "channels_last")}
    for key, each in found.items():
        if key[0] == "timm":
            assert each.why == "its classes have no deploy form of their own"
            continue
        assert each.error is not None, each.why
        assert each.error < 1e-5
        assert each.times is not None
        assert len(each.times.samples) == 3
        assert each.peak is not None
        assert each.peak > 0
    assert found["original", "eager"].ratio == Times((1.0, 1.0, 1.0))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_a_form_that_computes_something_else_shows_its_error(monkeypatch):
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(2, 4, 9, 8)

    monkeypatch.setattr("fxrep.bench.door.FORMS", {"original": FORMS["original"], "wrong": lambda *_: Wrong()})
    found = by_name(bench({"net": net()}, [SHAPE], QUICK, forms=("original", "wrong"), engines=("eager",)))
    assert found["wrong", "eager"].error == 1.0


@pytest.mark.parametrize("engine", ["compile", "frozen", "onnxruntime", "openvino"])
def test_other_engines_run_the_collapsed_network(engine):
    setting = Setting(rounds=1)
    if why := ENGINES[engine].why_not(setting):
        pytest.skip(why)
    found = by_name(bench({"net": net()}, [SHAPE], setting, forms=("fxrep",), engines=(engine,)))["fxrep", engine]
    assert found.error is not None, found.why
    assert found.error < 1e-5
    assert (found.peak is None) == (engine in ("onnxruntime", "openvino"))


@pytest.mark.parametrize("dtype", ["bf16", "autocast-bf16"])
def test_other_dtypes(dtype):
    found = by_name(
        bench({"net": net()}, [SHAPE], Setting(dtype=dtype, rounds=1), forms=("fxrep",), engines=("eager",))
    )
    assert found["fxrep", "eager"].error is not None
    assert 0 < found["fxrep", "eager"].error < 0.1


def test_what_cannot_be_had_says_why():
    found = by_name(bench({"net": net()}, [SHAPE], QUICK, forms=("original",), engines=("eager", "cuda_graph")))
    assert found["original", "cuda_graph"].why == "for cuda alone"
    assert found["original", "cuda_graph"].times is None


def test_names_that_there_are_not_are_told():
    for names in ({"forms": ("origin",)}, {"engines": ("steam",)}):
        with pytest.raises(Unusable, match="there is no"):
            bench({"net": net()}, [SHAPE], QUICK, **names)
    with pytest.raises(Unusable, match="there is no dtype"):
        Setting(dtype="fp8")
    with pytest.raises(FxrepError, match="does not run on an input"):
        bench({"net": net()}, [(1, 3, 8, 8)], QUICK)


def test_steps_are_counted():
    seen: list[str] = []
    bench({"net": net()}, [SHAPE], QUICK, forms=("original", "fxrep"), engines=("eager",), step=seen.append)
    assert len(seen) == steps_of(1, 1, 2, 1, QUICK.rounds)


def test_a_loss_is_told_beyond_the_noise_alone():
    """Slower in every turn by a tenth; within the spread; within what the control differs by."""
    slower = Bench({}, (row("original", 1.0, 1.0, 1.0), row("fxrep", 1.1, 1.1, 1.1)))
    assert [str(loss) for loss in slower.losses] == ["net 2x4x9x8 eager: 1.10 ± 0.00 times the time of original"]
    noisy = Bench({}, (row("original", 1.0, 1.0, 1.0), row("fxrep", 0.8, 1.1, 1.4)))
    assert noisy.losses == []
    control = Bench({}, (*slower.rows, row("control", 1.2, 1.2, 1.2)))
    assert control.losses == []
    other = Bench({}, (row("original", 1.0, 1.0, 1.0, engine="frozen"), row("fxrep", 2.0, 2.0, 2.0)))
    assert other.losses == []


def test_the_peak_of_memory_is_what_was_held_at_once():
    def call() -> Tensor:
        for _ in range(3):
            torch.empty(1000, dtype=torch.float64)
        return torch.empty(10)

    assert 8000 <= peak_bytes(call, CPU) < 8200


def test_text_json_and_plot(tmp_path):
    found = bench({"net": net()}, [SHAPE], QUICK, forms=("original", "fxrep", "timm"), engines=("eager",))
    text = str(found)
    assert "net, 2x4x9x8" in text
    assert "no deploy form" in text
    kept = json.loads(found.to_json())
    assert {r["form"] for r in kept["rows"]} == {"original", "fxrep", "timm"}
    assert kept["setting"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    found.plot(tmp_path / "bars.svg")
    assert "fxrep, eager" in (tmp_path / "bars.svg").read_text() or (tmp_path / "bars.svg").stat().st_size > 5000


def test_the_command(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nnet = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))\n"
    )
    name = f"{tmp_path / 'mine.py'}:net"
    few = ["--engines", "eager", "--forms", "original", "fxrep", "--rounds", "2"]
    assert main(["bench", name, "--input", "1,3,8,8", "--batch", "1,2", "--json", *few]) == OK
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["form"], r["shape"][0]) for r in rows] == [("original", 1), ("fxrep", 1), ("original", 2), ("fxrep", 2)]
    assert main(["bench", name, "--input", "1,3,8,8", "--plot", str(tmp_path / "no" / "p.svg"), *few]) == UNUSABLE
    assert main(["bench", name, "--forms", "origin"]) == UNUSABLE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_cuda_and_its_graphs(dtype):
    setting = Setting(torch.device("cuda"), dtype, rounds=3)
    found = by_name(
        bench({"net": net()}, [SHAPE], setting, forms=("original", "fxrep"), engines=("eager", "cuda_graph"))
    )
    for each in found.values():
        assert each.error is not None, each.why
        assert each.error < 1e-2
        assert each.peak is not None
