"""The public calls: what they take, what they give, and what they leave alone."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import Net, conv_bn, image, net, real_network
from helpers import error_against_original, randomise, relative_error
from torch import Tensor, nn
from torch.fx import GraphModule

import fxrep
from fxrep.report import Report

# What comes back


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [net, real_network])
def test_gives_an_equal_graph_module_in_eval_mode(make: Callable[[], nn.Module], training: bool):
    model = make().train(training)
    collapsed = fxrep.reparameterize(model)
    assert isinstance(collapsed, GraphModule)
    assert not any(m.training for m in collapsed.modules())
    assert not [m for m in collapsed.modules() if isinstance(m, nn.BatchNorm2d)]
    x = image(2, 3, 64, 48)
    assert error_against_original(collapsed, model, x) < 1e-12


def test_every_input_that_the_original_takes_gives_the_same():
    """Nothing is specialised to the example: not the batch, not the size, not the number of axes where it is free."""
    model = net().eval()
    collapsed = fxrep.reparameterize(model, image(2, 3, 18, 14))
    for shape in ((1, 3, 18, 14), (5, 3, 7, 31), (3, 3, 1, 1)):
        assert relative_error(collapsed(image(*shape)), model(image(*shape))) < 1e-12


# The caller's model


def state_of(model: nn.Module) -> list[Any]:
    """Everything that could be changed, the tensors by identity."""
    plain = [(n, {k: v for k, v in vars(m).items() if not k.startswith("_")}) for n, m in model.named_modules()]
    private = [{k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()} for m in model.modules()]
    tensors = (*model.parameters(), *model.buffers())
    return [plain, private, [(id(t), t._version, t.requires_grad, t.grad, t.stride()) for t in tensors]]


def random_state() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate()]


@pytest.mark.parametrize("call", [fxrep.reparameterize, fxrep.explain])
@pytest.mark.parametrize("example", [None, image(2, 3, 32, 32)], ids=["bare", "with an example"])
@pytest.mark.parametrize("make", [net, real_network])
def test_the_model_is_untouched(make: Callable[[], nn.Module], example: Tensor | None, call: Callable[..., Any]):
    model = make()
    next(model.children()).eval()  # a mode for each module, as in fine-tuning with frozen statistics
    model.register_forward_hook(lambda *_: None)
    values = [t.clone() for t in (*model.parameters(), *model.buffers())]
    before, randomness = state_of(model), random_state()
    call(model, example)
    assert state_of(model) == before
    assert random_state() == randomness
    assert all(torch.equal(t, v) for t, v in zip((*model.parameters(), *model.buffers()), values, strict=True))


def test_the_example_is_untouched():
    model, x = nn.Sequential(nn.ReLU(inplace=True), *conv_bn()), image()
    untouched = x.clone()
    fxrep.reparameterize(model, x)
    assert torch.equal(x, untouched)


def test_a_call_that_fails_leaves_the_model_untouched():
    model = net()
    before = state_of(model)
    with pytest.raises(fxrep.FxrepError):
        fxrep.reparameterize(model, {"nothing": image()})
    assert state_of(model) == before


def test_torchs_own_settings_are_untouched():
    with torch.no_grad():
        fxrep.reparameterize(net())
        assert not torch.is_grad_enabled()
    fxrep.reparameterize(net())
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32


# Example inputs


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv_bn(3, padding=1), conv_bn(2, padding=1)

    def forward(self, image: Tensor, depth: Tensor, weight: float = 1.0) -> Tensor:
        return torch.relu(self.left(image) + weight * self.right(depth))


TWO = {"image": image(2, 3, 9, 8), "depth": image(2, 2, 9, 8)}


@pytest.mark.parametrize(
    "example", [None, tuple(TWO.values()), list(TWO.values()), TWO], ids=["none", "tuple", "list", "dict"]
)
def test_examples_in_every_form_collapse_alike(example: Any):
    model = TwoInputs().eval()
    collapsed = fxrep.reparameterize(model, example)
    assert relative_error(collapsed(**TWO), model(**TWO)) < 1e-12
    assert relative_error(collapsed(TWO["image"], depth=TWO["depth"]), model(**TWO)) < 1e-12
    assert collapsed.report.after["bn"] == 0


def test_an_example_sharpens_the_cost():
    small, large = (fxrep.explain(net(), image(1, 3, side, side)) for side in (16, 256))
    assert large.cost_before > small.cost_before
    assert large.cost_before > large.cost_after > 0


@pytest.mark.parametrize(
    ("model", "example", "fact"),
    [
        (TwoInputs(), (image(), image(), 1.0, 2.0), "too many positional arguments"),
        (TwoInputs(), image(), "depth"),
        (TwoInputs(), {"image": image(), "deep": image()}, "dep"),
        (TwoInputs(), {**TWO, "colour": image()}, "colour"),
        (net(), 3, "int"),
        (net(), "image.png", "str"),
        (net(), image(2, 4, 18, 14), "4"),
        (net(), image(2, 3, 18), "3"),
    ],
    ids=["too many", "missing", "misnamed", "unknown", "number", "path", "channels", "axes"],
)
@pytest.mark.parametrize("call", [fxrep.reparameterize, fxrep.explain])
def test_an_example_that_does_not_fit_is_told(model: nn.Module, example: Any, fact: str, call: Callable[..., Any]):
    with pytest.raises(fxrep.FxrepError, match=fact) as told:
        call(model, example)
    assert "example_inputs" in str(told.value)
    assert "\n" not in str(told.value)


# No model


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        (net().state_dict(), "state dict"),
        (OrderedDict(weight=image()), "state dict"),
        ({"state_dict": net().state_dict(), "epoch": 3}, "state dict|dict"),
        (None, "None"),
        (Net, "Net"),
        (lambda x: x, "function"),
        ("resnet18", "str"),
    ],
    ids=["state dict", "ordered dict", "checkpoint", "none", "class", "function", "name"],
)
@pytest.mark.parametrize("call", [fxrep.reparameterize, fxrep.explain])
def test_what_is_no_model_is_told_in_one_sentence(given: Any, fact: str, call: Callable[..., Any]):
    with pytest.raises(fxrep.FxrepError, match=fact) as told:
        call(given)
    assert "\n" not in str(told.value)


# Every module that runs


class DependsOnData(nn.Module):
    """Its path depends on the numbers: nothing can be told before it runs."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.body = conv_bn(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else x


def hooked() -> nn.Module:
    """A hook that changes what the layer gives, on a layer that would be folded away."""
    model = net()
    model.stages[0][1].conv1.register_forward_hook(lambda _m, _args, out: out * 2)
    return model


def parametrised() -> nn.Module:
    model = net()
    nn.utils.parametrizations.weight_norm(model.stem[0])
    return model


MODULES = {
    "scripted": lambda: torch.jit.script(net()),
    "traced by fx": lambda: torch.fx.symbolic_trace(net()),
    "exported": lambda: torch.export.export(net().eval(), (image(),)).module(),
    "compiled": lambda: torch.compile(net(), backend="eager"),
    "wrapped": lambda: nn.DataParallel(net()),
    "depends on data": DependsOnData,
    "depends on data inside": lambda: nn.Sequential(conv_bn(3, padding=1), DependsOnData(4)),
    "hooked": hooked,
    "parametrised": parametrised,
    "collapsed": lambda: fxrep.reparameterize(net()),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("inplace", [False, True], ids=["copied", "in place"])
@pytest.mark.parametrize("kind", MODULES)
def test_every_module_that_runs_is_accepted(kind: str, inplace: bool):
    """Copied, or collapsed, or an island in between: equal it is, and it has a report."""
    torch._dynamo.reset()
    model = randomise(MODULES[kind]())
    if kind != "exported":
        model.eval()
    expected = [model(x).detach().clone() for x in (image(), -image())]
    result = fxrep.reparameterize(model, inplace=inplace)
    for x, same in zip((image(), -image()), expected, strict=True):
        assert relative_error(result(x), same) < 1e-12
    assert not result.training
    assert str(result.report).startswith("fxrep: ")


@pytest.mark.parametrize("kind", ["traced by fx", "hooked", "parametrised", "depends on data inside"])
def test_what_can_collapse_beside_what_cannot_does(kind: str):
    model = MODULES[kind]()
    report = fxrep.reparameterize(model).report
    assert report.collapses
    left = {"depends on data inside": 1, "hooked": 2}.get(kind, 0)  # no read moves past a hook: it might write
    assert report.after["bn"] <= left


def test_what_cannot_be_traced_is_told():
    model = DependsOnData()
    result = fxrep.reparameterize(model)
    assert [r.code for r in result.report.refusals] == ["not-traceable"]
    assert [c.name for c in result.report.collapses] == ["body.reparam"]
    assert {id(p) for p in result.parameters()}.isdisjoint(map(id, model.parameters()))


# The report


@pytest.mark.parametrize("make", [net, real_network, conv_bn, nn.ReLU])
def test_explain_says_what_reparameterize_does(make: Callable[[], nn.Module]):
    model = make()
    explained, done = fxrep.explain(model), fxrep.reparameterize(model).report
    assert isinstance(explained, Report)
    assert explained.to_dict() == done.to_dict()


def test_the_report_prints_and_goes_through_json():
    report = fxrep.reparameterize(net()).report
    assert str(report).startswith("fxrep: Net\n")
    assert json.loads(report.to_json()) == report.to_dict()
    assert report.before == {"conv": 7, "linear": 1, "bn": 10, "add": 6, "mul": 0, "pool": 0}
    assert report.after == {"conv": 4, "linear": 1, "bn": 0, "add": 0, "mul": 0, "pool": 0}
    assert len(report.collapses) == 4
    assert report.cost_after < report.cost_before
