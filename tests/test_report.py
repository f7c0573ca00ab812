"""What a report shows, folds and carries."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from fxrep.errors import HINTS, Refusal
from fxrep.report import SCHEMA, Collapse, Report, duration

BLOCK = Collapse(
    name="stages.0.1.reparam",
    replaced=("stages.0.1.conv", "stages.0.1.bn", "stages.0.1.identity", "add_3", "stages.0.10.conv"),
    became="Conv2d(64, 64, k3 s1 p1)",
    saved=1.2e-5,
)
PADS = Refusal("layer1.0.conv2", "pads-over-bias", "padding=1 inserts 0 where bn1 is 0.31", "pad with the bias value")


def make_report(collapses=(BLOCK,), refusals=(PADS,), **changes) -> Report:
    report = Report(
        model="RepVGG",
        collapses=tuple(collapses),
        refusals=tuple(refusals),
        before={"conv": 44, "linear": 1, "bn": 61, "add": 39, "mul": 0, "pool": 0},
        after={"conv": 22, "linear": 1, "bn": 0, "add": 0, "mul": 0, "pool": 0},
        cost_before=9.5e-3,
        cost_after=5e-3,
    )
    return replace(report, **changes)


def cells(text: str, first: str) -> list[str]:
    """The words of the one line that starts with `first`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{first} ")]
    return line.split()


def test_header_counts_and_cost():
    text = str(make_report())
    assert text.startswith("fxrep: RepVGG\n")
    assert cells(text, "conv") == ["conv", "44", "22"]
    assert cells(text, "bn") == ["bn", "61", "0"]
    assert cells(text, "affine") == ["affine", "ops,", "predicted", "9.50", "ms", "5.00", "ms", "1.90x", "as", "fast"]


def test_a_count_that_stays_zero_is_left_out():
    lines = str(make_report()).splitlines()
    assert not [line for line in lines if line.startswith(("mul", "pool"))]


def test_a_kind_known_to_one_side_only_is_zero_on_the_other():
    text = str(make_report(before={"bn": 2}, after={"conv": 1}))
    assert cells(text, "bn") == ["bn", "2", "0"]
    assert cells(text, "conv") == ["conv", "0", "1"]


def test_nominal_sizes_are_told():
    assert all("nominal sizes" in told(make_report(nominal=True)) for told in (str, Report._repr_html_))
    assert not any("nominal" in told(make_report()) for told in (str, Report._repr_html_))


def test_a_free_result_has_no_ratio():
    assert "as fast" not in str(make_report(cost_after=0.0))


def test_collapse_row_names_the_layer_and_folds_what_it_replaces():
    text = str(make_report())
    assert "1 collapse:\n" in text
    assert cells(text, "stages.0.1.reparam")[1:5] == ["Conv2d(64,", "64,", "k3", "s1"]
    assert ".conv, .bn, .identity +2 more" in text
    assert "12.0 µs" in text


def test_only_names_inside_the_layers_module_are_shortened():
    text = make_report().text(full=True)
    assert ".conv, .bn, .identity, add_3, stages.0.10.conv" in text
    assert "more" not in text


def test_a_layer_at_the_root_keeps_full_names():
    text = make_report([Collapse("reparam", ("conv1", "bn1"), "Conv2d(3, 8, k3 s1 p1)", 0.0)]).text()
    assert "conv1, bn1" in text


def test_a_name_that_looks_like_a_number_stays_a_name():
    assert "1e5 " in make_report([replace(BLOCK, name="1e5")]).text()


@pytest.mark.parametrize(("number", "rows"), [(1, 1), (20, 20), (21, 12), (100, 12)])
def test_long_tables_fold_and_say_how_to_see_all(number: int, rows: int):
    report = make_report([replace(BLOCK, name=f"s.{i}.reparam") for i in range(number)])
    shown = [line for line in report.text().splitlines() if line.startswith("s.")]
    assert len(shown) == rows
    assert (f"{number - rows} more: print(report.text(full=True))" in report.text()) == (rows < number)
    assert report.text(full=True).count(".reparam") == number


def test_refusal_reads_as_one_sentence():
    assert (
        "layer1.0.conv2: refused [pads-over-bias] padding=1 inserts 0 where bn1 is 0.31. Hint: pad with the bias value."
        in " ".join(str(make_report()).split())
    )


def test_refusals_are_grouped_by_code():
    pads = [replace(PADS, node=f"layer{i}.conv2") for i in range(5)]
    other = Refusal("bn", "batch-statistics", "normalises by the batch's own statistics", "track_running_stats=True")
    text = " ".join(str(make_report(refusals=[*pads[:2], other, *pads[2:]])).split())
    assert "6 refusals: layer0.conv2, layer1.conv2, layer2.conv2 +2 more: refused 5 times [pads-over-bias]" in text
    assert text.count("inserts 0") == 1
    assert "bn: refused [batch-statistics]" in text


def test_full_text_lists_every_refusal():
    pads = [replace(PADS, node=f"layer{i}.conv2") for i in range(5)]
    assert make_report(refusals=pads).text(full=True).count("conv2: refused [pads-over-bias]") == 5


def test_refusal_lines_are_wrapped_and_indented():
    text = str(make_report(refusals=[replace(PADS, reason="word " * 60)]))
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("layer1.0.conv2: refused"))
    assert len(lines) - start > 2
    assert all(line.startswith("  word") or "Hint" in line for line in lines[start + 1 :])
    assert max(map(len, lines[start:])) <= 120


def test_a_refusal_without_a_hint_has_that_of_its_code():
    assert HINTS[PADS.code] in " ".join(str(make_report(refusals=[replace(PADS, hint="")])).split())


def test_nothing_to_tell():
    text = str(make_report([], []))
    assert text.endswith("Nothing collapsed.")
    assert "refus" not in text


def test_dict_is_complete_and_json_round_trips():
    report = make_report()
    assert json.loads(report.to_json()) == json.loads(report.to_json(indent=2)) == report.to_dict()
    assert report.to_dict() == {
        "schema": SCHEMA,
        "model": "RepVGG",
        "before": report.before,
        "after": report.after,
        "cost_before": 9.5e-3,
        "cost_after": 5e-3,
        "nominal": False,
        "collapses": [
            {"name": BLOCK.name, "replaced": list(BLOCK.replaced), "became": BLOCK.became, "saved": BLOCK.saved}
        ],
        "refusals": [{"node": PADS.node, "code": PADS.code, "reason": PADS.reason, "hint": PADS.hint}],
    }


def test_dict_shares_nothing_with_the_report():
    report = make_report()
    report.to_dict()["before"]["conv"] = 0
    assert report.before["conv"] == 44


def test_html_escapes_what_the_model_brings():
    evil = "<script>alert(1)</script>"
    report = make_report([replace(BLOCK, name=evil)], [replace(PADS, reason=evil)], model=evil)
    html = report._repr_html_()
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 3
    assert html.count("<table>") == 3


def test_html_of_an_empty_report_has_the_summary_alone():
    assert make_report([], [])._repr_html_().count("<table>") == 1


def test_reports_do_not_change():
    with pytest.raises(FrozenInstanceError):
        make_report().model = "other"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        BLOCK.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.5, "1.50 s"),
        (0.25, "250 ms"),
        (9.5e-3, "9.50 ms"),
        (1.2e-5, "12.0 µs"),
        (3e-8, "0.03 µs"),
        (0.0, "0.00 µs"),
        (-2e-6, "-2.00 µs"),
    ],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text
