"""Every refusal code has a witness: a network in which it is given, and the fold that it prevents, which is wrong.

The witnesses of the algebra's own refusals, by dimension and border, are in `test_legality.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from reader_cases import Net
from torch import Tensor, fx, nn

import fxrep
from fxrep import kernel as K
from fxrep.errors import CODES, HINTS, UNTOLD
from fxrep.readers import Call, read_graph, registry

DOCS = Path(__file__).parents[1] / "docs" / "refusals.md"
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Witness:
    """A network, and the naive fold of it: it differs from the network, or cannot run, or costs more weights."""

    build: Callable[[], nn.Module]
    naive: Callable[[Any], Function]
    x: Callable[[], Tensor] = lambda: image()
    why: str = "wrong"
    options: dict[str, Any] = field(default_factory=dict)
    moved: Callable[[nn.Module], nn.Module] = lambda m: m


def image(channels: int = 4, size: tuple[int, int] = (7, 8), batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)


def conv(kernel: int = 3, inputs: int = 4, outputs: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=options.pop("padding", kernel // 2), **options)


def gain(bn: Any) -> Tensor:
    return bn.weight / (bn.running_var + bn.eps).sqrt()


def shift(bn: Any) -> Tensor:
    return bn.bias - bn.running_mean * gain(bn)


def one_infinity() -> Tensor:
    x = image()
    x[0, 0, 3, 3] = torch.inf
    return x


def into(layer: Any, bn: Any) -> tuple[Tensor, Tensor]:
    """The weight and bias of a layer with the batch norm after it folded in."""
    g = gain(bn)
    return layer.weight * g.reshape(-1, *(1,) * (layer.weight.ndim - 1)), (layer.bias - bn.running_mean) * g + bn.bias


def conv_bn(m: Any) -> Function:
    weight, bias = into(m.conv, m.bn)
    return lambda x: F.conv2d(x, weight, bias, m.conv.stride, m.conv.padding)


def centred(weight: Tensor, size: int) -> Tensor:
    """A smaller kernel in the middle of a larger, as deploy code enlarges 1x1 kernels."""
    spare = size - weight.shape[-1]
    return F.pad(weight, [spare // 2, spare - spare // 2] * 2)


def added(m: Any) -> Function:
    """The kernels of two branches added, the smaller one centred, with the options of the first."""
    size = max(m.a.weight.shape[-1], m.b.weight.shape[-1])
    weight = centred(m.a.weight, size) + centred(m.b.weight, size)
    return lambda x: F.conv2d(x, weight, m.a.bias + m.b.bias, m.a.stride, size // 2)


def composed(outer: Any, inner: Tensor, bias: Tensor) -> Function:
    """A 1x1 kernel (O, I) and a bias before a convolution, taken into it."""
    weight = torch.einsum("ochw,ci->oihw", outer.weight, inner)
    return lambda x: F.conv2d(x, weight, outer.bias + outer.weight.sum((2, 3)) @ bias, padding=outer.padding)


# --- the networks that need more than an expression ------------------------------------------------------------------


def hooked() -> nn.Module:
    m = nn.Sequential(conv(), nn.BatchNorm2d(4))
    m[0].register_forward_hook(lambda module, arguments, output: output.abs())
    return m


class ReachingInto(nn.Module):
    """Cannot be traced, and reads a weight of the layer that it calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)) * (1 + self.conv.weight.sum())
        return y if x.shape[-1] > 2 else -y


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.bn(h) if h.sum() < 0 else h


def twice_read(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.a(y).relu() + m.b(y).sigmoid()


def copies(m: Any) -> nn.ModuleList:
    """A convolution for each reader."""
    return nn.ModuleList([m.conv, conv()])


def written_between(m: Any, x: Tensor) -> Tensor:
    """The batch norm reads a version of the value that its own view then overwrites."""
    h = m.conv(x)
    first = h[:, :1]
    first.mul_(2)
    return m.bn(h)


def odd_padding(m: Any, x: Tensor) -> Tensor:
    """Pads by the parity of the width, as "same" padding does."""
    return m.bn(F.conv2d(x, m.conv.weight, m.conv.bias, padding=(1, 1 + x.shape[-1] % 2)))


def untracked() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4, track_running_stats=False)


def half_right(x: Tensor) -> Tensor:
    return 2 * x


def broken(x: Tensor) -> Tensor:
    return 3 * x


torch.fx.wrap("half_right")
torch.fx.wrap("broken")


@pytest.fixture(autouse=True)
def wrong_readers() -> Iterator[None]:
    """Two readers with bugs: one says something that is not so, one raises."""
    known = set(registry.registered())

    @fxrep.reader(half_right)
    def _half(at: Call) -> object:
        return at.operand().scale(K.Constant((), 0.5))

    @fxrep.reader(broken)
    def _broken(at: Call) -> object:
        raise KeyError("gain")

    yield
    for target in set(registry.registered()) - known:
        del registry._READERS[target]


def unread(m: Any) -> Function:
    raise KeyError("gain")


def on_two_devices(m: Any) -> nn.Module:
    m[1].weight, m[1].bias = (nn.Parameter(p.to("meta")) for p in (m[1].weight, m[1].bias))
    return m


def of_another_scale(m: Any, x: Tensor) -> Tensor:
    """Two scales of plain numbers: their product, 1e-48, is zero in float32."""
    h = torch.exp(m.conv(x).tanh() + 110)
    return m.head((m.other(x) + 1e-24 * (1e-24 * h)).tanh().mean((2, 3)).float())


def with_half_a_head(m: Any) -> nn.Module:
    m.head.float()
    return m


def float32_scale(m: Any) -> Function:
    """The product of the scales as a tensor of the dtype that torch gives it."""
    scale = torch.tensor(1e-48, dtype=torch.float32)
    return lambda x: m.head((m.other(x) + scale * torch.exp(m.conv(x).tanh() + 110)).tanh().mean((2, 3)).float())


def tokens() -> Tensor:
    return image(4, (4, 4)).flatten(2)[..., :4].contiguous()


def linear_rows(m: Any) -> Function:
    weight, bias = into(m[0], m[1])
    return lambda x: F.linear(x, weight, bias)


def pooled_rows(m: Any) -> Function:
    """Average pooling, and the 1x1 convolution after it, as one box kernel."""
    weight = m[1].weight.expand(-1, -1, 3, 3) / 9
    return lambda x: F.conv2d(x, weight, m[1].bias, padding=1)


def dense(m: Any) -> nn.Module:
    """A 1x1 and the depthwise 7x7 after it as the one dense kernel they are."""
    return nn.Conv2d(8, 16, 7)


def metadata(m: Any, x: Tensor) -> Any:
    h = m.conv(x)
    return m.bn(h).sum((2, 3)) * h.stride(0)


WITNESSES: dict[str, Witness] = {
    "batch-statistics": Witness(
        lambda: Net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=untracked()),
        lambda m: lambda x: m.conv(x) * m.bn.weight[:, None, None] + m.bn.bias[:, None, None],
    ),
    "broadcast": Witness(
        lambda: Net(lambda m, x: m.conv(x) + x, conv=conv(1, inputs=1)),
        lambda m: lambda x: F.conv2d(x, m.conv.weight + torch.eye(4, 1)[..., None, None], m.conv.bias),
        lambda: image(1),
    ),
    "certificate-failed": Witness(
        lambda: Net(lambda m, x: half_right(m.conv(x)), conv=conv()),
        lambda m: lambda x: F.conv2d(x, m.conv.weight / 2, m.conv.bias / 2, padding=1),
    ),
    "costs-more": Witness(
        lambda: nn.Sequential(conv(1, 8, 16, bias=False), conv(7, 16, 16, groups=16)), dense,
        lambda: image(8), "dearer",
    ),
    "device-mismatch": Witness(
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(4)), lambda m: lambda x: F.conv2d(x, *into(*m)),
        why="cannot run", moved=on_two_devices,
    ),
    "dtype-unknown": Witness(
        lambda: Net(of_another_scale, conv=conv(), other=conv(), head=nn.Linear(4, 4)), float32_scale,
        moved=with_half_a_head,
    ),
    "dynamic-padding": Witness(
        lambda: Net(odd_padding, conv=conv(), bn=nn.BatchNorm2d(4)),
        lambda m: lambda x: F.conv2d(x, *into(m.conv, m.bn), padding=(1, 2)),  # as at a width of 7
    ),
    "hooked": Witness(hooked, lambda m: lambda x: F.conv2d(x, *into(*m), padding=1)),
    "layout": Witness(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), linear_rows, tokens, options={"examples": True}
    ),
    "metadata": Witness(
        lambda: Net(metadata, conv=conv(), bn=nn.BatchNorm2d(4)),
        lambda m: lambda x: conv_bn(m)(x).sum((2, 3)) * x.stride(0), lambda: image(4, (7, 8))[..., ::2],
    ),
    "mutation": Witness(
        lambda: Net(written_between, conv=conv(), bn=nn.BatchNorm2d(4)),
        lambda m: conv_bn(m),
    ),
    "net-pad": Witness(
        lambda: Net(lambda m, x: m.a(y := F.adaptive_avg_pool2d(x, (4, 4))) + m.b(y),
                    a=conv(3, stride=2), b=conv(2, stride=2, padding=0)),
        lambda m: lambda x: added(m)(F.adaptive_avg_pool2d(x, (4, 4))),
    ),
    "non-finite": Witness(
        lambda: Net(lambda m, x: m.a(x) + m.b(x), a=nn.Conv2d(4, 4, (5, 3), padding=(2, 1)),
                    b=nn.Conv2d(4, 4, (3, 5), padding=(1, 2))),
        lambda m: lambda x: F.conv2d(
            x, F.pad(m.a.weight, (1, 1)) + F.pad(m.b.weight, (0, 0, 1, 1)), m.a.bias + m.b.bias, padding=2
        ),
        lambda: one_infinity(), options={"strict": True},
    ),
    "not-affine": Witness(
        lambda: Net(lambda m, x: m.bn(m.conv(x) * x.mean()), conv=conv(), bn=nn.BatchNorm2d(4)), conv_bn
    ),
    "reached-into": Witness(
        lambda: Net(lambda m, x: m.block(x), block=ReachingInto()),
        lambda m: lambda x: conv_bn(m.block)(x) * (1 + into(m.block.conv, m.block.bn)[0].sum()),
    ),
    "not-traceable": Witness(
        lambda: Net(lambda m, x: m.block(x), block=Branching()),
        lambda m: conv_bn(m.block) if m.block.conv(image()).sum() >= 0 else m.block.conv,
    ),
    "pad-value": Witness(
        lambda: Net(lambda m, x: m.a(x) + m.b(F.pad(x, (1, 1, 1, 1), value=1.0)), a=conv(), b=conv(padding=0)), added
    ),
    "padding-mode": Witness(
        lambda: Net(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv(padding_mode="reflect")), added
    ),
    "pads-over-bias": Witness(
        lambda: nn.Sequential(nn.BatchNorm2d(4), conv()),
        lambda m: composed(m[1], torch.diag(gain(m[0])), shift(m[0])),
    ),
    "pads-over-taps": Witness(
        lambda: nn.Sequential(conv(bias=False), conv()),
        lambda m: lambda x: F.conv2d(
            x, F.conv2d(m[1].weight, m[0].weight.flip(2, 3).transpose(0, 1), padding=2), m[1].bias, padding=2
        ),
    ),
    "pool-border": Witness(
        lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), conv(1)), pooled_rows
    ),
    "random": Witness(
        lambda: Net(lambda m, x: m.bn(F.dropout(m.conv(x), 0.5, training=True)), conv=conv(), bn=nn.BatchNorm2d(4)),
        conv_bn,
    ),
    "rank-unknown": Witness(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), linear_rows, tokens),
    "reader-failed": Witness(lambda: Net(lambda m, x: broken(m.conv(x)), conv=conv()), unread, why="cannot run"),
    "shape-unknown": Witness(
        lambda: Net(lambda m, x: m.bn(m.conv(x))[:, : 2 * (x.shape[-1] // 4)], conv=conv(), bn=nn.BatchNorm2d(4)),
        lambda m: lambda x: conv_bn(m)(x)[:, :2],  # as at a width of 4
    ),
    "shared": Witness(
        lambda: Net(twice_read, conv=conv(), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4)), copies, why="dearer"
    ),
    "stride": Witness(
        lambda: Net(lambda m, x: m.a(y := F.adaptive_avg_pool2d(x, (3, 3))) + m.b(y),
                    a=conv(1, stride=2), b=conv(2, padding=0)),
        lambda m: lambda x: F.conv2d(
            F.adaptive_avg_pool2d(x, (3, 3)), F.pad(m.a.weight, (0, 1, 0, 1)) + m.b.weight, m.a.bias + m.b.bias
        ),
    ),
    "transposed": Witness(
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2, bias=False), conv(padding=0)),
        lambda m: lambda x: F.conv_transpose2d(
            x, F.conv2d(m[0].weight, m[1].weight, padding=2), m[1].bias, stride=2, padding=1
        ),
    ),
    "unsupported-options": Witness(
        lambda: Net(lambda m, x: m.bn(m.up(x, output_size=(2 * x.shape[2] + 1, 2 * x.shape[3]))),
                    up=nn.ConvTranspose2d(4, 4, 2, 2), bn=nn.BatchNorm2d(4)),
        lambda m: nn.Sequential(m.up, m.bn),  # as without the option
    ),
}  # fmt: skip


#: What only `target`, `online` and `expand` decline; tests/test_training_networks.py has their witnesses.
OF_TRAINING = {"holds-by-value", "not-expandable", "parameters-not-linear", "tied-parameters"}


def test_every_code_has_a_witness_and_its_docs():
    assert set(WITNESSES) == set(CODES) - OF_TRAINING
    assert set(HINTS) == set(CODES) - UNTOLD
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| ([^|]+) \|", DOCS.read_text(), re.MULTILINE))
    assert set(rows) == set(CODES)
    assert list(rows) == sorted(rows), "in the order of the alphabet"
    assert all(len(reason.split()) >= 5 for reason in rows.values())


@pytest.fixture(params=WITNESSES)
def witness(request: pytest.FixtureRequest) -> tuple[str, Witness, nn.Module, Tensor]:
    torch.manual_seed(0)
    case = WITNESSES[request.param]
    return request.param, case, case.moved(randomise(case.build()).double().eval()), case.x()


def seeded(model: Function, x: Tensor) -> Tensor:
    torch.manual_seed(2)
    return model(x)


def collapse(case: Witness, model: nn.Module, x: Tensor) -> Any:
    options = dict(case.options)
    return fxrep.reparameterize(model, x if options.pop("examples", False) else None, **options)


def test_the_report_gives_the_code(witness: tuple[str, Witness, nn.Module, Tensor]):
    code, case, model, x = witness
    if code in UNTOLD:
        readings = read_graph(fx.symbolic_trace(model).graph, dict(model.named_modules()), {})
        assert code in {r.code for r in readings.refusals.values()}
        assert code not in {r.code for r in collapse(case, model, x).report.refusals}
        return
    refusals = [r for r in collapse(case, model, x).report.refusals if r.code == code]
    assert refusals
    for refusal in refusals:
        assert refusal.node
        assert len(refusal.reason.split()) >= 3
        assert refusal.hint
        assert f"refused [{code}]" in str(refusal)


def test_the_network_is_right_all_the_same(witness: tuple[str, Witness, nn.Module, Tensor]):
    code, case, model, x = witness
    if code == "device-mismatch":
        with pytest.raises((RuntimeError, NotImplementedError)):
            model(x)  # on one machine without a second device, nothing on two of them runs
        return
    with torch.no_grad():
        got, expected = (seeded(m, x) for m in (collapse(case, model, x), model))
    assert torch.equal(got.isfinite(), expected.isfinite())
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-11, equal_nan=True)


@torch.no_grad()
def test_the_naive_fold_is_wrong(witness: tuple[str, Witness, nn.Module, Tensor]):
    code, case, model, x = witness
    if case.why == "dearer":
        assert weights(case.naive(model)) > weights(model)
        return
    if case.why == "cannot run":
        with pytest.raises((RuntimeError, KeyError)):
            case.naive(model)(x)
        return
    got, expected = case.naive(model)(x), model(x)
    if got.shape == expected.shape:
        assert torch.equal(got.isfinite(), expected.isfinite()) is (code != "non-finite")
        assert code == "non-finite" or (got - expected).abs().max() > 1e-3 * expected.abs().max()


def weights(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1)
