"""Checkpoints as they are found: wrapped, prefixed, averaged, and not quite of this model."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from blocks import Net, net
from torch import Tensor, nn

import fxrep
from fxrep.errors import Unusable

STATE = net(seed=1).state_dict()
AVERAGE = net(seed=2).state_dict()


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def equal(model: nn.Module, state: dict[str, Tensor]) -> bool:
    mine = model.state_dict()
    return all(torch.equal(mine[name], tensor) for name, tensor in state.items())


def saved(tmp_path: Path, value: Any) -> Path:
    torch.save(value, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


WRAPPED = {
    "bare": STATE,
    "ddp": prefixed("module.", STATE),
    "compiled": prefixed("_orig_mod.", STATE),
    "compiled ddp": prefixed("module._orig_mod.", STATE),
    "lightning": {"epoch": 3, "state_dict": prefixed("model.", STATE), "hyper_parameters": {"lr": 0.1}},
    "timm": {"state_dict": STATE, "optimizer": {"state": {}, "param_groups": []}},
    "swa": {**prefixed("module.", STATE), "n_averaged": torch.tensor(7)},
    "deep": {"a": {"b": {"weights": STATE}}},
    "with a loss": {**prefixed("net.", STATE), "loss.weight": torch.ones(3)},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_whatever_the_weights_are_wrapped_in_they_are_found_and_it_is_told(tmp_path: Path, kind: str):
    model = net()
    notes = fxrep.load_weights(model, saved(tmp_path, WRAPPED[kind]))
    assert equal(model, STATE)
    assert bool(notes) == (kind != "bare")


def test_a_part_of_a_model_finds_its_names_below_a_prefix_that_it_lacks(tmp_path: Path):
    model = nn.ModuleDict({"backbone": net()})
    notes = fxrep.load_weights(model, saved(tmp_path, STATE))
    assert equal(model["backbone"], STATE)
    assert "with the prefix 'backbone.'" in notes[0]


AVERAGED = {
    "entries": {"model": STATE, "model_ema": AVERAGE},
    "entries, average first": {"state_dict_ema": prefixed("module.", AVERAGE), "state_dict": STATE},
    "one mapping": {"state_dict": {**prefixed("model.", STATE), **prefixed("ema_model.", AVERAGE)}},
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_of_two_that_fit_the_moving_average_is_taken_and_it_is_told(tmp_path: Path, kind: str):
    model = net()
    notes = fxrep.load_weights(model, saved(tmp_path, AVERAGED[kind]))
    assert equal(model, AVERAGE)
    assert any("took the moving average" in note for note in notes)


def test_an_entry_can_be_named(tmp_path: Path):
    model = net()
    fxrep.load_weights(model, saved(tmp_path, AVERAGED["entries"]), entry="model")
    assert equal(model, STATE)
    with pytest.raises(Unusable, match=r"no entry 'modle' with weights; it has model, model_ema"):
        fxrep.load_weights(model, saved(tmp_path, AVERAGED["entries"]), entry="modle")


def test_an_average_that_does_not_fit_is_not_preferred(tmp_path: Path):
    model = net()
    fxrep.load_weights(model, saved(tmp_path, {"model": STATE, "ema": {"head.weight": torch.zeros(5, 6)}}))
    assert equal(model, STATE)


def test_safetensors(tmp_path: Path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = net()
    save_file(prefixed("module.", STATE), tmp_path / "w.safetensors")
    fxrep.load_weights(model, tmp_path / "w.safetensors")
    assert equal(model, STATE)


def test_counters_of_batch_norms_may_be_missing(tmp_path: Path):
    model = net()
    fxrep.load_weights(model, saved(tmp_path, {n: t for n, t in STATE.items() if "num_batches" not in n}))
    assert equal(model, {n: t for n, t in STATE.items() if "num_batches" not in n})


def without(name: str, **more: Tensor) -> dict[str, Tensor]:
    return {**{n: t for n, t in STATE.items() if n != name}, **more}


UNFIT = {
    "renamed": (
        without("head.weight", **{"heads.weight": STATE["head.weight"]}),
        "head.weight (nearest: heads.weight)",
    ),
    "missing": (without("stem.0.bias"), "the file lacks stem.0.bias"),
    "foreign": ({**STATE, "total_ops": torch.zeros(1)}, "the model lacks total_ops"),
    "shape": ({**STATE, "head.weight": torch.zeros(7, 6)}, "head.weight ((7, 6), the model's (5, 6))"),
    "another": (
        {"a.b": torch.zeros(1)},
        "holds no weights of Net: its names are such as a.b, the model's such as stem.0",
    ),
    "nothing": ({"epoch": 3}, "there is no mapping of names to tensors in it"),
    "a list": ([1, 2], "there is no mapping of names to tensors in it"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_does_not_fit_is_told_with_the_nearest_name_and_nothing_is_loaded(tmp_path: Path, kind: str):
    model, (value, fact) = net(), UNFIT[kind]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(Unusable) as told:
        fxrep.load_weights(model, saved(tmp_path, value))
    assert fact in str(told.value)
    assert "\n" not in str(told.value)
    assert equal(model, before)


def test_names_that_the_model_need_not_have_are_ignored_on_request(tmp_path: Path):
    model = net()
    fxrep.load_weights(model, saved(tmp_path, {**STATE, "total_ops": torch.zeros(1)}), ignore=["total_*"])
    assert equal(model, STATE)


class Loud(collections.OrderedDict):
    """Stands for a class of somebody's training code."""

    ran: ClassVar[list[str]] = []

    def __reduce__(self) -> Any:
        return _loud, (dict(self),)


def _loud(state: dict[str, Any]) -> dict[str, Any]:
    Loud.ran.append("code")
    return state


def test_code_in_a_checkpoint_runs_only_on_trust(tmp_path: Path):
    model, file = net(), saved(tmp_path, Loud(STATE))
    with pytest.raises(Unusable, match=r"runs code of the file.*--trust"):
        fxrep.load_weights(model, file)
    assert not Loud.ran
    fxrep.load_weights(model, file, trust=True)
    assert Loud.ran
    assert equal(model, STATE)


def test_a_pickled_model_gives_its_weights_on_trust(tmp_path: Path):
    model = net()
    file = saved(tmp_path, {"epoch": 1, "model": net(seed=1).half(), "ema": None})
    fxrep.load_weights(model, file, trust=True)
    assert equal(model, {n: t.half().to(t.dtype) for n, t in STATE.items()})


NO_CHECKPOINTS = {
    "text.pth": (b"hello", "is no checkpoint, or not all of it is there|cannot be read as a checkpoint"),
    "text.safetensors": (b"hello", "is no safetensors file"),
    "empty.pth": (b"", "is empty"),
    "page.pth": (b"\n<!DOCTYPE html><title>404</title>", "is a web page"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_not_to_be_trusted(tmp_path: Path, name: str):
    content, fact = NO_CHECKPOINTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unusable, match=fact) as told:
        fxrep.load_weights(Net(), tmp_path / name)
    assert "trust" not in str(told.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(Unusable, match="there is no file"):
        fxrep.load_weights(Net(), tmp_path / "absent.pth")


def test_half_a_file(tmp_path: Path):
    path = saved(tmp_path, STATE)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(Unusable, match="is all of it there"):
        fxrep.load_weights(Net(), path)


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program_is_no_checkpoint(tmp_path: Path):
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "net.pt")
    with pytest.raises(Unusable, match="is a TorchScript program"):
        fxrep.load_weights(nn.Linear(2, 2), tmp_path / "net.pt")


def test_of_two_prefixes_in_one_entry_the_one_that_is_not_ignored_is_taken(tmp_path: Path):
    path = saved(tmp_path, {**prefixed("model.", STATE), **prefixed("model_ema.", AVERAGE)})
    model = net()
    notes = fxrep.load_weights(model, path)
    assert equal(model, AVERAGE)
    assert any("--ignore 'model_ema.*' takes that" in note for note in notes)
    fxrep.load_weights(model, path, ignore=["model_ema.*"])
    assert equal(model, STATE)
