"""Other weights of the same architecture go into a collapsed model: as if it had been collapsed from them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from blocks import conv_bn, image, net, real_network
from helpers import randomise, relative_error
from test_ownership import Keeps, Tied, keeps
from torch import Tensor, nn

import fxrep
from fxrep import FxrepError


class Computed(nn.Module):
    """A weight standardised in the forward, a buffer that scales, and channels in an order that a buffer holds."""

    def __init__(self, order: tuple[int, ...] = (2, 0, 3, 1)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("gain", torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("order", torch.tensor(order))
        self.scale = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) * 2
        y = self.norm(F.conv2d(x, weight)) * self.gain
        return y[:, self.order].relu() * self.scale


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(F.pad(x, (0, 0, 0, 0, 0, 1)))).relu()


class Half(nn.Module):
    """What cannot be traced around what collapses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = conv_bn(3, padding=1), conv_bn(4, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.rest(y) if y.sum() > -1e9 else y


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "branches": (net, image()),
    "real": (real_network, image(1, 3, 32, 32)),
    "tied": (Tied, image(3, 4)),
    "kept": (keeps, image(2, 4)),
    "computed": (Computed, image()),
    "transposed": (Up, image()),
    "scales alone": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), image()),
    "an island": (Half, image()),
    "nothing to fold": (lambda: nn.Linear(4, 4), image(2, 4)),
}  # fmt: skip


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, another of its architecture with other weights everywhere, and an input."""
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(make()).double().eval()
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*other.parameters(), *other.buffers()):
        if tensor.is_floating_point():
            tensor.data.mul_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
    return model, other, x


@pytest.mark.parametrize("name", NETWORKS)
def test_a_refolded_model_is_the_model_collapsed_anew(name: str):
    model, other, x = pair(name)
    collapsed = fxrep.reparameterize(model)
    before = collapsed(x)
    anew = fxrep.reparameterize(other)
    fxrep.refold(collapsed, other)
    assert relative_error(collapsed(x), before) > 1e-3
    assert relative_error(collapsed(x), other(x)) < 1e-12
    for key, expected in anew.state_dict().items():
        assert torch.allclose(collapsed.state_dict()[key], expected, rtol=1e-12, atol=1e-14), key


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "kept"])
def test_a_state_dict_is_folded(name: str):
    model, other, x = pair(name)
    collapsed = fxrep.reparameterize(model)
    folded = collapsed.plan.fold_state_dict(other.state_dict())
    assert folded.keys() == collapsed.state_dict().keys()
    assert relative_error(collapsed(x), model(x)) < 1e-12
    collapsed.load_state_dict(folded)
    assert relative_error(collapsed(x), other(x)) < 1e-12


def test_it_is_a_method_too_and_takes_a_model_in_training_mode():
    model, other, x = pair("branches")
    collapsed = fxrep.reparameterize(model)
    expected = other(x)
    collapsed.refold(other.train())
    assert other.training
    assert relative_error(collapsed(x), expected) < 1e-12


def test_nothing_is_shared_with_the_model():
    model, other, x = pair("kept")
    collapsed = fxrep.reparameterize(model)
    collapsed.refold(other)
    expected = collapsed(x)
    for tensor in (*other.parameters(), *other.buffers(), other.plain):
        tensor.data.zero_()
    assert torch.equal(collapsed(x), expected)


def test_after_a_collapse_in_place():
    model, other, x = pair("branches")
    collapsed = fxrep.reparameterize(copy.deepcopy(model), inplace=True)
    collapsed.refold(other)
    assert relative_error(collapsed(x), other(x)) < 1e-12


def test_it_folds_into_the_dtype_that_the_collapsed_model_has_by_now():
    model, other, x = pair("branches")
    collapsed = fxrep.reparameterize(model).float()
    collapsed.refold(other)
    assert {p.dtype for p in collapsed.parameters()} == {torch.float32}
    assert relative_error(collapsed(x.float()).double(), other(x)) < 1e-5


def test_the_plan_travels_with_a_deep_copy():
    model, other, x = pair("branches")
    collapsed = fxrep.reparameterize(model)
    copied = copy.deepcopy(collapsed)
    copied.refold(other)
    assert relative_error(copied(x), other(x)) < 1e-12
    assert relative_error(collapsed(x), model(x)) < 1e-12


def test_a_pickle_says_that_it_has_no_plan():
    model, other, x = pair("branches")
    collapsed = fxrep.reparameterize(model)
    loaded = pickle.loads(pickle.dumps(collapsed))
    saved = io.BytesIO()
    torch.save(collapsed, saved)
    for result in (loaded, torch.load(io.BytesIO(saved.getvalue()), weights_only=False)):
        with pytest.raises(FxrepError, match=r"pickled model has lost .* collapse the model again"):
            result.refold(other)
        assert relative_error(result(x), model(x)) < 1e-12


def test_the_key_map():
    model, _, _ = pair("branches")
    plan = fxrep.reparameterize(model).plan
    stem = plan.key_map["stem.reparam.weight"]
    assert set(stem) == {"stem.0.weight", "stem.1.running_var", "stem.1.weight"}
    assert plan.key_map["head.bias"] == ("head.bias",)
    assert "stem.reparam.weight\n    stem.0.weight, stem.1.running_var" in str(plan)


OTHERS = {
    "wider": (lambda: _changed(lambda m: setattr(m, "head", nn.Linear(6, 7).double())), "head.weight is .7, 6."),
    "deeper": (lambda: _changed(lambda m: m.stem.append(nn.Conv2d(6, 6, 1).double())), "stem.3.weight"),
    "fewer": (lambda: _changed(lambda m: setattr(m, "stages", m.stages[:1])), "stages.1.0.conv3.weight"),
    "of another dtype": (lambda: _changed(lambda m: m.float()), "torch.float32"),
    "with another stride": (lambda: _changed(lambda m: setattr(m.stem[0], "stride", (1, 1))), "at stem.0"),
    "with another activation": (lambda: _changed(lambda m: m.stem.__setitem__(2, nn.SiLU())), "at stem.2"),
}  # fmt: skip


def _changed(change: Callable[[nn.Module], object]) -> nn.Module:
    model = net(seed=1).eval()
    change(model)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_is_refused_and_nothing_is_changed(name: str):
    make, fact = OTHERS[name]
    model, _, _ = pair("branches")
    collapsed = fxrep.reparameterize(model)
    state = {key: tensor.clone() for key, tensor in collapsed.state_dict().items()}
    with pytest.raises(FxrepError, match=f"another architecture.*{fact}.*collapse"):
        collapsed.refold(make())
    assert all(torch.equal(tensor, state[key]) for key, tensor in collapsed.state_dict().items())


def test_a_fold_that_the_old_numbers_allowed_is_refused_to_others():
    """A fresh batch norm gives zero outside its input, so a padded convolution after it folds; not so once trained."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)).double()
    collapsed = fxrep.reparameterize(model.eval())
    assert len(collapsed.report.collapses) == 1
    scaled, trained = copy.deepcopy(model), randomise(copy.deepcopy(model))
    scaled[0].weight.data.mul_(3)
    collapsed.refold(scaled)
    assert relative_error(collapsed(image()), scaled(image())) < 1e-12
    with pytest.raises(FxrepError, match=r"border was padded .*1\.bias.*collapse this model anew"):
        collapsed.refold(trained)
    assert relative_error(collapsed(image()), scaled(image())) < 1e-12
    for fold in collapsed.plan.folds:  # the refusal is needed: forced, the fold is wrong
        assert fold.startswith("reparam")
    forced = type(collapsed.plan)(**{**vars(collapsed.plan), "equal": ()})
    forced.refold(collapsed, trained)
    assert relative_error(collapsed(image()), trained(image())) > 1e-3


def test_other_indices_are_refused():
    collapsed = fxrep.reparameterize(randomise(Computed()).double())
    with pytest.raises(FxrepError, match="order holds other indices"):
        collapsed.refold(randomise(Computed((0, 1, 2, 3))).double())


def test_a_parametrised_weight_is_refused():
    model = net()
    nn.utils.parametrizations.weight_norm(model.stem[0])
    collapsed = fxrep.reparameterize(model)
    with pytest.raises(FxrepError, match="parametrisation, a hook or a kept module; collapse the model again"):
        collapsed.refold(model)


def test_what_is_no_collapsed_model_or_no_model():
    model, _, _ = pair("branches")
    collapsed = fxrep.reparameterize(model)
    with pytest.raises(FxrepError, match=r"no result of fxrep\.reparameterize"):
        fxrep.refold(model, model)
    with pytest.raises(FxrepError, match="fold_state_dict takes a state dict"):
        collapsed.refold(model.state_dict())


def test_a_state_dict_of_something_else():
    model, _, _ = pair("branches")
    plan, state = fxrep.reparameterize(model).plan, model.state_dict()
    with pytest.raises(FxrepError, match=r"module\.stem\.0\.weight is not in it"):
        plan.fold_state_dict({f"module.{key}": tensor for key, tensor in state.items()})
    with pytest.raises(FxrepError, match=r"stem\.0\.weight is folded in but is in no state dict"):
        plan.fold_state_dict({key: tensor for key, tensor in state.items() if key != "stem.0.weight"})
    assert isinstance(keeps(), Keeps)
