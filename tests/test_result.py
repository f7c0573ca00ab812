"""What the result is good for: copies, files, compilers, training, another collapse; and how its layers are made."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, Net, conv_bn, image, net, real_network
from helpers import randomise, relative_error
from reader_cases import Net as Written
from torch import Tensor, nn
from torch.fx import GraphModule

import fxrep


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": saved_and_loaded,
    "copy of a copy": lambda m: copy.deepcopy(copy.deepcopy(m)),
    "copy of a pickle": lambda m: copy.deepcopy(pickle.loads(pickle.dumps(m))),
}


def collapsed_net(model: nn.Module | None = None) -> GraphModule:
    model = model or net()
    model.names = ["cat", "dog"]
    return fxrep.reparameterize(model)


@pytest.fixture(params=[net, real_network], ids=["net", "resnet18"])
def result(request: pytest.FixtureRequest) -> GraphModule:
    return collapsed_net(request.param())


X = image(2, 3, 32, 40)


# Copies


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_is_the_same(result: GraphModule, copied: Callable[[nn.Module], nn.Module]):
    again = copied(result)
    assert torch.equal(again(X), result(X))
    assert again.report == result.report
    assert again.names == ["cat", "dog"]
    assert not any(m.training for m in again.modules())
    assert provenance_of(again) == provenance_of(result) != {}


def test_a_copy_has_tensors_of_its_own():
    result = collapsed_net()
    expected = result(X)
    for parameter in copy.deepcopy(result).parameters():
        parameter.data.zero_()
    assert torch.equal(result(X), expected)


def test_a_state_dict_loads_into_the_same_network_of_other_weights(result: GraphModule):
    fresh = net(seed=5) if len(result.state_dict()) < 20 else randomise(real_network(), seed=5)
    other = fxrep.reparameterize(fresh)
    assert not torch.equal(other(X), result(X))
    other.load_state_dict(result.state_dict(), strict=True)
    assert torch.equal(other(X), result(X))


def test_a_state_dict_goes_through_a_file_of_weights_only():
    result, file = collapsed_net(), io.BytesIO()
    torch.save(result.state_dict(), file)
    file.seek(0)
    result.load_state_dict(torch.load(file, weights_only=True))


# A second pass


@pytest.mark.parametrize("copied", [lambda m: m, *COPIES.values()], ids=["itself", *COPIES])
def test_a_second_pass_finds_nothing(result: GraphModule, copied: Callable[[nn.Module], nn.Module]):
    again = fxrep.reparameterize(copied(result))
    assert again.report.collapses == ()
    assert again.report.after == result.report.after
    assert again.state_dict().keys() == result.state_dict().keys()
    assert torch.equal(again(X), result(X))
    assert again.names == ["cat", "dog"]


def asked_for_its_shape(m: Any, x: Tensor) -> Tensor:
    """A value whose shape alone is of use, and only before the batch norm is folded."""
    v = m.first(x).view_as(x)
    rows = F.batch_norm(v.flatten(0, -2), m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias)
    return m.second(rows.reshape_as(v))


def asked_twice_for_its_shape(m: Any, x: Tensor) -> Tensor:
    """The first view back is looked through, and yet asked for its shape by the second."""
    v = m.bn(x.flatten(0, -2)).reshape_as(x)
    return m.second(m.other(v.flatten(0, -2)).reshape_as(v))


def moved_past_a_copy(m: Any, x: Tensor) -> Tensor:
    """The norm is looked through down to the first layer; as it is, it needs the copy, which the second does not."""
    copy = m.first(x).contiguous()
    normed = m.bn(copy.transpose(1, 2)).transpose(1, 2)
    batch = F.batch_norm(normed.flatten(0, -2), None, None, training=True).reshape_as(normed)
    return m.second(copy) + normed + batch


def padded_unevenly_and_written(m: Any, x: Tensor) -> Tensor:
    """What the pad reads is written before the last layer; what the pad wrote is not."""
    v = m.last(m.second(m.first(F.pad(x, [0, 0, 1, 2])) + m.shift))
    written = x.contiguous()
    written += x.clone()
    return F.avg_pool2d(written, 3, stride=2, padding=1, count_include_pad=False) - v


def of_one_weight(m: Any, x: Tensor) -> Tensor:
    """Two layers with a weight in common: each call of it counts as one, in one decision as in two."""
    return F.conv2d(m.first(x), m.first.weight)


@pytest.mark.parametrize(
    ("body", "parts", "shape", "left"),
    [
        (asked_for_its_shape, lambda: {"first": nn.Linear(4, 4, bias=False), "bn": nn.BatchNorm1d(4),
                                       "second": nn.Linear(4, 4, bias=False)}, (3, 5, 4), "linear"),
        (asked_twice_for_its_shape, lambda: {"bn": nn.BatchNorm1d(4), "other": nn.BatchNorm1d(4),
                                             "second": nn.Linear(4, 4)}, (3, 5, 4), "linear"),
        (padded_unevenly_and_written, lambda: {"first": nn.Conv2d(4, 8, (4, 1), stride=2, groups=2, bias=False),
                                               "shift": torch.randn(1, 8, 1, 1),
                                               "second": nn.Conv2d(8, 8, 1, bias=False),
                                               "last": nn.Conv2d(8, 4, 1, bias=False)}, (2, 4, 7, 5), "conv"),
        (of_one_weight, lambda: {"first": nn.Conv2d(4, 4, (3, 1), padding=(1, 0), padding_mode="circular")},
         (2, 4, 7, 5), "conv"),
    ],
    ids=["asked for its shape", "asked twice for its shape", "padded unevenly and written",
         "of one weight"],
)  # fmt: skip
def test_one_pass_finds_what_a_second_would(
    body: Callable[..., Any], parts: Callable[[], dict[str, Any]], shape: tuple[int, ...], left: str
):
    """What the rewritten graph makes plain, the plan has seen: a size nobody asks for, a pad of its own."""
    model, x = randomise(Written(body, **parts())).double().eval(), torch.randn(shape, dtype=torch.float64)
    once = fxrep.reparameterize(model, (x,))
    assert once.report.after[left] == 1
    assert fxrep.reparameterize(once, (x,)).report.collapses == ()
    assert relative_error(once(x.clone()), model(x.clone())) < 1e-12


def test_what_is_looked_through_has_all_that_it_needs():
    parts = {"first": nn.Linear(4, 4), "bn": nn.BatchNorm1d(4), "second": nn.Linear(4, 4)}
    model = randomise(Written(moved_past_a_copy, **parts)).double().eval()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    assert relative_error(fxrep.reparameterize(model, (x,))(x), model(x)) < 1e-12


# Compilers


def test_exports(result: GraphModule):
    exported = torch.export.export(result, (X,))
    assert torch.equal(exported.module()(X), result(X))


def test_exports_with_a_free_batch():
    result = collapsed_net()
    exported = torch.export.export(result, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    larger = image(5, 3, 32, 40)
    assert relative_error(exported.module()(larger), result(larger)) < 1e-14


def test_compiles_as_one_graph(result: GraphModule):
    torch._dynamo.reset()
    compiled = torch.compile(result, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), result(X))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_scripts(result: GraphModule):
    scripted = torch.jit.script(result)
    assert relative_error(scripted(X), result(X)) < 1e-14


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_traces(result: GraphModule):
    traced = torch.jit.trace(result, X)
    assert relative_error(traced(X), result(X)) < 1e-14


def test_gradients_flow_to_the_input():
    """The gradient of the collapsed network by its input is that of the original."""
    model = net().eval()
    gradients = []
    for network in (model, collapsed_net(model)):
        x = image().requires_grad_()
        network(x).square().sum().backward()
        gradients.append(x.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-12


# Numbers: dtype, device, memory


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_that_of_the_dtype(dtype: torch.dtype):
    """Judged by the original's own error against itself in float64."""
    model, x = net(dtype).eval(), image(dtype=dtype)
    result = fxrep.reparameterize(model)
    assert {t.dtype for t in (*result.parameters(), *result.buffers())} == {dtype}
    assert result(x).dtype == dtype
    exact = copy.deepcopy(model).double()(x.double())
    own, ours = (relative_error(m(x).double(), exact) for m in (model, result))
    assert ours <= 2 * own + torch.finfo(dtype).eps


def test_a_network_without_storage_collapses():
    """On the meta device there are shapes and no numbers: enough to see what the network becomes."""
    with torch.device("meta"):
        model = Net()
    result = fxrep.reparameterize(model)
    out = result(torch.empty(2, 3, 18, 14, device="meta"))
    assert out.shape == (2, 5)
    assert {p.device.type for p in result.parameters()} == {"meta"}


@pytest.mark.parametrize("trainable", [True, False])
def test_requires_grad_is_kept(trainable: bool):
    result = fxrep.reparameterize(net().requires_grad_(trainable))
    assert {p.requires_grad for p in result.parameters()} == {trainable}


def test_requires_grad_is_kept_region_by_region():
    model = net()
    model.stem.requires_grad_(False)
    model.head.requires_grad_(False)
    result = fxrep.reparameterize(model)
    assert {n.partition(".")[0] for n, p in result.named_parameters() if p.requires_grad} == {"stages"}


def test_the_new_weights_are_leaves_and_can_be_trained():
    result = collapsed_net()
    assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in result.parameters())
    result(X).sum().backward()
    assert all(p.grad is not None for p in result.parameters())


def test_channels_last_is_kept():
    model = net().to(memory_format=torch.channels_last)
    result = fxrep.reparameterize(model)
    convs = [m for m in result.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 4
    assert all(c.weight.is_contiguous(memory_format=torch.channels_last) for c in convs)
    x = X.to(memory_format=torch.channels_last)
    assert relative_error(result(x), model.eval()(x)) < 1e-12


def test_contiguous_is_kept():
    assert all(p.is_contiguous() for p in collapsed_net().parameters())


# Names and provenance


def provenance_of(result: nn.Module) -> dict[str, tuple[str, ...]]:
    return {n: m.fxrep_provenance for n, m in result.named_modules() if hasattr(m, "fxrep_provenance")}


def test_new_layers_stand_where_what_they_replace_stood():
    result = collapsed_net()
    layers = {n: type(m) for n, m in result.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    blocks = ("stages.0.0", "stages.0.1", "stages.1.0")
    assert layers == {
        "stem.reparam": nn.Conv2d,
        **{f"{b}.reparam": nn.Conv2d for b in blocks},
        "head": nn.Linear,
    }


def test_new_layers_know_what_was_folded_into_them():
    provenance = provenance_of(collapsed_net())
    assert provenance["stem.reparam"] == ("stem.0", "stem.1")
    branches = {f"stages.0.1.{n}" for n in ("conv3", "bn3", "conv1", "bn1", "identity")}
    assert branches <= set(provenance["stages.0.1.reparam"])


def test_the_report_names_the_new_layers():
    result = collapsed_net()
    for collapse in result.report.collapses:
        layer = result.get_submodule(collapse.name)
        assert collapse.became.startswith(type(layer).__name__)
        assert collapse.replaced == layer.fxrep_provenance
    assert {c.name for c in result.report.collapses} == set(provenance_of(result))


def test_a_region_over_two_blocks_is_named_by_the_module_around_both():
    blocks = nn.Sequential(conv_bn(3), nn.Sequential(nn.Conv2d(4, 4, 1, bias=False)), nn.ReLU()).double()
    outer = nn.Sequential(nn.ReLU(), blocks, nn.Conv2d(4, 2, 1).double())
    result = fxrep.reparameterize(outer)
    assert set(provenance_of(result)) == {"1.reparam"}
    assert relative_error(result(X), outer.eval()(X)) < 1e-12


class Taken(nn.Module):
    """The name `reparam` is in use already."""

    def __init__(self) -> None:
        super().__init__()
        self.reparam = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.reparam_1 = nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.reparam_1(self.bn(self.reparam(x)))


def test_a_name_that_is_taken_stays_with_its_owner():
    model = randomise(Taken()).double().eval()
    result = fxrep.reparameterize(model)
    assert isinstance(result.reparam_1, nn.PReLU)
    assert relative_error(result(X), model(X)) < 1e-12


def test_no_state_is_left_of_what_was_replaced():
    names = collapsed_net().state_dict()
    assert not [n for n in names if "bn" in n or "conv1" in n or "running" in n]


# Networks of every form


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Forms(nn.Module):
    """Inputs by keyword and with defaults, outputs nested in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, padding=1), conv_bn(3, padding=1)

    def forward(self, x: Tensor, *, y: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> dict[str, Any]:
        a, b = self.a(x), self.b(y) * scale
        a = a if mask is None else a * mask
        return {"sum": a + b, "parts": [a, (b, None)], "pair": Pair(a, b), "scale": scale}


class ListInput(nn.Module):
    """Feature maps in a list, as of a detection head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(conv_bn(3) for _ in range(2))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.heads[0](maps[0]), F.relu(self.heads[1](maps[1]))]


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(3)

    def forward(self, **kwargs: Tensor) -> Tensor:
        return self.body(kwargs["x"])


def flattened(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "a convolution": (lambda: nn.Conv2d(3, 4, 3), (X,), {}),
    "a linear layer": (lambda: nn.Linear(40, 3), (X,), {}),
    "a batch norm": (lambda: nn.BatchNorm2d(3), (X,), {}),
    "an activation": (nn.ReLU, (X,), {}),
    "nothing": (nn.Identity, (X,), {}),
    "an empty sequence": (nn.Sequential, (X,), {}),
    "no convolution": (lambda: nn.Sequential(nn.LayerNorm(40), nn.GELU(), nn.Softmax(-1)), (X,), {}),
    "one block": (lambda: Block(3), (X,), {}),
    "keywords and dictionaries": (Forms, (X,), {"y": X + 1}),
    "a default given": (Forms, (X,), {"y": X + 1, "scale": 2.0}),
    "a list of inputs": (ListInput, ([X, X + 1],), {}),
    "any keywords": (Keywords, (), {"x": X}),
}


@pytest.mark.parametrize("example", [False, True], ids=["bare", "with an example"])
@pytest.mark.parametrize("form", FORMS)
def test_networks_of_every_form(form: str, example: bool):
    make, args, kwargs = FORMS[form]
    torch.manual_seed(0)
    model = randomise(make()).double()
    examples = None if not example else args if not kwargs else {**dict(zip(["x"], args, strict=False)), **kwargs}
    result = fxrep.reparameterize(model, examples)
    expected, got = model.eval()(*args, **kwargs), result(*args, **kwargs)
    assert type(got) is type(expected)
    assert torch.utils._pytree.tree_structure(got) == torch.utils._pytree.tree_structure(expected)
    for ours, theirs in zip(flattened(got), flattened(expected), strict=True):
        assert relative_error(ours, theirs) < 1e-12
    assert isinstance(got, (Tensor, Mapping, list))


@pytest.mark.parametrize("form", ["one block", "keywords and dictionaries", "a list of inputs"])
def test_what_can_collapse_does_in_every_form(form: str):
    make, _, _ = FORMS[form]
    report = fxrep.reparameterize(randomise(make()).double()).report
    assert report.before["bn"] > 0
    assert report.after["bn"] == 0


def test_a_default_that_was_not_collapsed_for_is_not_taken_in_silence():
    """The graph is that of `scale=2.0`: another value gives the original's answer, or an error that says so."""
    model = Forms().eval()
    result = fxrep.reparameterize(model)
    with pytest.raises(AssertionError, match="scale"):
        result(X, y=X, scale=3.0)


def test_two_orders_of_channels_have_an_index_each():
    class Reordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            two, one = torch.split(self.a(x).relu(), [2, 1], dim=-1)
            both = torch.cat((one, two, one), -1)
            return self.b(both), torch.cat((both, both[:, 2:]), -1)

    network, x = Reordered(), torch.randn(2, 3)
    for got, expected in zip(fxrep.reparameterize(network, x)(x), network(x), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)
