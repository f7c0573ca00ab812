"""What a report draws: the graph before and after, the kernels, and a page that needs nothing else."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
import torch
from blocks import Net, conv_bn, net
from helpers import randomise
from torch import Tensor, nn

import fxrep
from fxrep.errors import Refusal
from fxrep.page.layout import COLUMN, ROW, draw
from fxrep.page.scene import Scene
from fxrep.report import Collapse, Report

# The layout


def tangle(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Every node reads one or two of the ten before it."""
    generator = torch.Generator().manual_seed(seed)
    reach = torch.randint(1, 11, (count, 2), generator=generator).tolist()
    return sorted({(max(i - r, 0), i) for i in range(1, count) for r in reach[i]})


@pytest.mark.parametrize(
    ("count", "edges"),
    [(1, []), (3, []), (4, [(0, 1), (0, 2), (1, 3), (2, 3)]), (60, tangle(60)), (1000, tangle(1000))],
    ids=["one", "apart", "diamond", "tangle", "large"],
)
def test_edges_run_downwards_and_boxes_do_not_meet(count: int, edges: list[tuple[int, int]]):
    drawing = draw(range(count), edges)
    centres = drawing.centres
    for (source, target), bends in zip(edges, drawing.bends, strict=True):
        steps = [centres[source], *bends, centres[target]]
        assert all(round(below - above) == ROW for (_, above), (_, below) in pairwise(steps))
    rows: dict[float, list[float]] = {}
    for x, y in centres.values():
        rows.setdefault(y, []).append(x)
    assert all(right - left > COLUMN - 1e-6 for row in rows.values() for left, right in pairwise(sorted(row)))


def test_a_chain_is_a_straight_line_and_a_diamond_is_symmetric():
    assert {x for x, _ in draw(range(9), [(i, i + 1) for i in range(8)]).centres.values()} == {0.0}
    top, left, right, end = (x for x, _ in draw(range(4), [(0, 1), (0, 2), (1, 3), (2, 3)]).centres.values())
    assert top == end == (left + right) / 2


# The scene


def edges_after(scene: Scene, report: Report) -> set[tuple[str, str]]:
    names = [*(b.label for b in scene.boxes), *(c.name for c in report.collapses)]
    return {(names[s], names[t]) for s, t in scene.after}


def test_before_is_the_networks_own_graph_and_every_branch_falls_into_its_sum():
    model = net()
    report = fxrep.reparameterize(model).report
    own = torch.fx.symbolic_trace(model.eval())
    assert len(report.scene.boxes) == len(own.graph.nodes) - 1  # eval mode drops the dropout
    falls = {c.name: {b.label for b in report.scene.boxes if b.into == k} for k, c in enumerate(report.collapses)}
    assert falls == {c.name: set(c.replaced) for c in report.collapses}
    assert {b.kind for b in report.scene.boxes if b.into is not None} == {"conv", "bn", "add"}


@pytest.mark.parametrize("make", [net, conv_bn, lambda: nn.Sequential(nn.ReLU())])
def test_after_is_the_graph_that_was_written(make):
    collapsed = fxrep.reparameterize(make())
    layers = {n: str(n.target) if n.op == "call_module" else n.name for n in collapsed.graph.nodes}
    written = {(layers[o], layers[n]) for n in collapsed.graph.nodes for o in n.all_input_nodes}
    assert edges_after(collapsed.report.scene, collapsed.report) == written


def test_explaining_draws_the_same_graph():
    assert fxrep.explain(net()).scene == fxrep.reparameterize(net()).report.scene


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_traced_has_a_page_without_a_graph():
    report = fxrep.reparameterize(Untraceable()).report
    assert report.scene is None
    assert 'id="data">null</script>' in report.to_html()


# The kernels


def test_the_filters_shown_add_up_to_the_layers_own_weight():
    collapsed = fxrep.reparameterize(net())
    assert [p.layer for p in collapsed.report.pictures] == [f"stages.{i}.reparam" for i in ("0.0", "0.1", "1.0")]
    for picture in collapsed.report.pictures:
        weight = collapsed.get_submodule(picture.layer).weight[picture.row, picture.column]
        grids = torch.tensor([s.grid for s in picture.summands], dtype=torch.float64)
        assert (grids.sum(0) - weight).abs().max() < 1e-14
        assert (torch.tensor(picture.total, dtype=torch.float64) - weight).abs().max() < 1e-14


def test_each_filter_is_that_of_its_branch():
    model = net()
    picture = fxrep.reparameterize(model).report.pictures[0]
    block = model.stages[0][0]
    gain = {
        bn: b.weight / (b.running_var + b.eps).sqrt()
        for bn, b in block.named_children()
        if "bn" in bn or bn == "identity"
    }
    row, column = picture.row, picture.column
    by_label = {s.label: (s.taps, torch.tensor(s.grid, dtype=torch.float64)) for s in picture.summands}
    taps, grid = by_label["stages.0.0.conv3.weight"]
    assert taps == "3×3"
    assert (grid - block.conv3.weight[row, column] * gain["bn3"][row]).abs().max() < 1e-14
    taps, grid = by_label["stages.0.0.conv1.weight"]
    assert taps == "1×1"
    assert abs(grid[1, 1] - block.conv1.weight[row, column, 0, 0] * gain["bn1"][row]) < 1e-14
    assert (grid != 0).sum() == 1
    _, grid = by_label["identity of stages.0.0.identity"]
    assert row == column
    assert abs(grid[1, 1] - gain["identity"][row]) < 1e-14


def test_a_filter_of_a_grouped_layer_names_the_input_channel_that_it_reads():
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + x

    collapsed = fxrep.reparameterize(randomise(Depthwise()).double())
    (picture,) = collapsed.report.pictures
    one = torch.zeros(1, 6, 3, 3, dtype=torch.float64)
    one[0, picture.column, 1, 1] = 1
    flipped = torch.tensor(picture.total, dtype=torch.float64).flip(0, 1)
    assert (collapsed(one)[0, picture.row] - flipped).abs().max() < 1e-14


# The page

EVIL = "</script><script>alert(1)</script>"
OUTSIDE = re.compile(
    r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import|https?://(?!www\.w3\.org/2000/svg)|fetch\(|XMLHttp"""
)


def make_report(**changes: str) -> Report:
    collapse = Collapse(changes.get("name", "a.reparam"), ("a.conv", "a.bn"), "Conv2d(3, 4, k3x3 s1 p1)", 1e-5)
    refusal = Refusal("b", "stride", changes.get("reason", "no"), "hint")
    counts = {"conv": 1, "bn": 1}
    return Report(changes.get("model", "Net"), (collapse,), (refusal,), counts, {**counts, "bn": 0}, 2e-3, 1e-3)


def test_the_page_asks_for_nothing_from_outside():
    html = fxrep.reparameterize(net()).report.to_html()
    assert not OUTSIDE.search(html)
    assert "default-src 'none'" in html


@pytest.mark.parametrize("where", ["name", "reason", "model"])
def test_what_the_model_brings_is_text(where: str):
    html = make_report(**{where: EVIL}).to_html()
    assert EVIL not in html
    assert html.count("<script") == 2


def test_names_of_the_model_are_data_in_the_graph():
    model = nn.Sequential()
    model.add_module("</script><b>", nn.Conv2d(3, 3, 1))
    model.add_module("bn", nn.BatchNorm2d(3))
    html = fxrep.reparameterize(model).report.to_html()
    data = re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1]
    assert "</script><b>" in {b["label"] for b in json.loads(data)["boxes"]}


def test_the_page_tells_the_verdict_that_it_is_given():
    model = net()
    collapsed = fxrep.reparameterize(model)
    assert "verified equal" in collapsed.report.to_html(fxrep.verify(model, collapsed).to_dict())
    with torch.no_grad():
        collapsed.get_submodule("stages.1.0.reparam").weight.mul_(1.01)
    wrong = collapsed.report.to_html(fxrep.verify(model, collapsed).to_dict())
    assert "NOT EQUAL" in wrong
    assert "They part at <code>stages.1.0.reparam</code>." in wrong
    assert "not verified here" in collapsed.report.to_html()


def test_a_report_with_a_scene_is_copied_and_compared_as_before():
    import copy

    collapsed = fxrep.reparameterize(Net())
    assert copy.deepcopy(collapsed).report == collapsed.report
    assert "Scene" not in repr(collapsed.report)
