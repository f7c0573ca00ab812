"""The page in a real browser: it draws, moves, finds, fits a phone, and complains about nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import Block, net
from torch import Tensor, nn

import fxrep

selenium = pytest.importorskip("selenium.webdriver", reason="the page is not tested in a browser: selenium is missing")
BROWSER, DRIVER = (shutil.which("chromium") or shutil.which("chromium-browser")), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="the page is not tested in a browser: apt-get install chromium chromium-driver"
)
DESK, PHONE = (1280, 900), (390, 800)
WIDER = """[...document.querySelectorAll("section, section .scroll, section p, figure")]
    .filter((part) => part.scrollWidth > part.clientWidth).map((part) => part.id || part.className)"""
"""What holds more than can be seen of it without moving it sideways."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--hide-scrollbars", *root):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Picky(nn.Module):
    """Of several inputs, and with much to say of a batch of three if it is asked to mind."""

    def __init__(self, minds: bool) -> None:
        super().__init__()
        self.net, self.minds = net(torch.float32), minds

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.minds and len(x) == 3:
            raise ValueError("a_name_without_any_place_to_break_" * 6)
        return self.net(x) + tokens.mean() * mask.mean()


def a_long_verdict() -> dict[str, Any]:
    x = tuple(torch.randn(sizes) for sizes in ((1, 3, 24, 24), (1, 77, 1024), (1, 3, 128, 128)))
    verdict = fxrep.verify(Picky(False), Picky(True), x)
    assert not verdict
    return verdict.to_dict()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    small = net(torch.float32)
    collapsed = fxrep.reparameterize(small)
    large = fxrep.explain(nn.Sequential(*(Block(3) for _ in range(125))))
    html = {
        "small": collapsed.report.to_html(fxrep.verify(small, collapsed).to_dict()),
        "wrong": collapsed.report.to_html(a_long_verdict()),
        "large": large.to_html(),
    }
    for name, text in html.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in html}


def opened(browser: Any, page: Path, size: tuple[int, int] = DESK, scheme: str = "light") -> Any:
    """The page as it is drawn, without animation."""
    media = [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": "reduce"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size is PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    return browser


def run(browser: Any, script: str) -> Any:
    return browser.execute_script(f"return {script}")


def shown(browser: Any, kind: str) -> int:
    """How many boxes of a kind can be seen."""
    script = f"[...document.querySelectorAll('.box.{kind}')].filter(b => b.getBoundingClientRect().width > 0).length"
    return int(run(browser, script))


def colours(browser: Any) -> tuple[set[Any], Any]:
    """The colours of a screenshot of the graph, and that of the page's corner."""
    image = pytest.importorskip("PIL.Image").open(BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    return {colour for _, colour in image.getcolors(1 << 24)}, image.getpixel((2, 2))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("name", ["small", "large", "wrong"])
def test_it_is_drawn_without_a_complaint_and_fits(browser: Any, pages: Any, name: str, size: Any, scheme: str):
    opened(browser, pages[name], size, scheme)
    assert browser.get_log("browser") == []
    assert run(browser, "performance.getEntriesByType('resource').length") == 0
    assert run(browser, "document.documentElement.scrollWidth") <= size[0]
    assert run(browser, WIDER) == []
    assert int(run(browser, "document.documentElement.dataset.ready")) > (1000 if name == "large" else 30)
    found, corner = colours(browser)
    assert (sum(corner) > 600) == (scheme == "light")
    assert len(found) > 50  # boxes, edges, text: not an empty page


def test_before_and_after_show_the_branches_and_what_they_became(browser: Any, pages: Any):
    opened(browser, pages["small"])
    assert (shown(browser, "falls"), shown(browser, "new")) == (23, 0)
    browser.find_element("id", "show-after").click()
    assert (shown(browser, "falls"), shown(browser, "new")) == (0, 4)
    assert run(browser, "document.getElementById('show-after').getAttribute('aria-pressed')") == "true"
    browser.find_element("id", "show-before").click()
    assert (shown(browser, "falls"), shown(browser, "new")) == (23, 0)


def test_half_way_branches_are_nearer_to_the_layer_that_they_fall_into(browser: Any, pages: Any):
    opened(browser, pages["small"])
    place = "new DOMMatrix(getComputedStyle(document.querySelectorAll('.box.falls')[2]).transform)"
    before = run(browser, f"[{place}.e, {place}.f]")
    move = "(() => { const t = document.getElementById('time'); t.value = %d; t.dispatchEvent(new Event('input')); })()"
    run(browser, move % 500)
    half = run(browser, f"[{place}.e, {place}.f]")
    run(browser, move % 1000)
    after = run(browser, f"[{place}.e, {place}.f]")
    assert half == pytest.approx([(a + b) / 2 for a, b in zip(before, after, strict=True)], abs=1)
    assert before != after


def test_a_search_goes_to_the_layer_and_tells_about_it(browser: Any, pages: Any):
    opened(browser, pages["large"])
    browser.find_element("id", "find").send_keys("99.conv3")
    assert browser.find_element("id", "found").text == "1 of 1"
    assert "99.conv3" in browser.find_element("id", "about").text
    assert "falls into 99.reparam" in browser.find_element("id", "about").text
    box = run(browser, "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
                       "(document.querySelector('.box.hit').getBoundingClientRect())")  # fmt: skip
    stage = run(browser, "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
                         "(document.getElementById('canvas').getBoundingClientRect())")  # fmt: skip
    assert box == pytest.approx(stage, abs=3)


def world(browser: Any) -> list[float]:
    matrix = "new DOMMatrix(getComputedStyle(document.getElementById('world')).transform)"
    return [float(v) for v in run(browser, f"[{matrix}.a, {matrix}.e, {matrix}.f]")]


def test_it_is_dragged_and_zoomed(browser: Any, pages: Any):
    opened(browser, pages["small"])
    scale, x, y = world(browser)
    canvas = browser.find_element("id", "canvas")
    chain = selenium.ActionChains(browser)
    chain.move_to_element_with_offset(canvas, -300, 0).click_and_hold().move_by_offset(40, -25).release().perform()
    assert world(browser) == pytest.approx([scale, x + 40, y - 25], abs=1)
    browser.find_element("id", "in").click()
    assert world(browser)[0] == pytest.approx(1.3 * scale, rel=1e-2)
    browser.find_element("id", "fit").click()
    top, bottom = run(browser, "[...document.querySelectorAll('.box')].filter(b => b.getBoundingClientRect().width)"
                      ".map(b => b.getBoundingClientRect()).reduce(([a, z], r) => "
                      "[Math.min(a, r.top), Math.max(z, r.bottom)], [1e9, -1e9])")  # fmt: skip
    stage = run(
        browser, "(({top, bottom}) => [top, bottom])(document.getElementById('canvas').getBoundingClientRect())"
    )
    assert stage[0] <= top < bottom <= stage[1]


def test_a_row_of_the_table_leads_to_its_layer(browser: Any, pages: Any):
    opened(browser, pages["small"])
    run(browser, "document.querySelectorAll('#collapses tbody tr')[2].click()")
    assert "stages.0.1.reparam" in browser.find_element("id", "about").text
    assert shown(browser, "new") == 4
    assert browser.get_log("browser") == []
