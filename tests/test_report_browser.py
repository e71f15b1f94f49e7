"""The page of a report as a browser shows it."""

import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from example_results import every_kind_of_run
from rankprune.report.page import page
from rankprune.report.results import read_results

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe"),
)
# Chromium reads its orders from file 3 and answers into file 4.
LAUNCH = "import os, sys\nos.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"


class Tab:
    """A tab of a headless Chromium, over the DevTools protocol; `said` holds what it had to say unasked."""

    def __init__(self, orders: int, answers: int) -> None:
        self._orders, self._answers, self._rest, self._number = orders, answers, b"", 0
        self._session: dict[str, str] = {}
        self.said: list[dict[str, Any]] = []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._orders, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.said.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str) -> None:
        self.said.clear()
        self.do("Page.navigate", url=url)
        while not any(m.get("method") == "Page.loadEventFired" for m in self.said):
            self.said.append(self._next())

    def show(self, width: int, height: int, scheme: str) -> None:
        phone = width < 600
        self.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone
        )
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def value(self, expression: str) -> Any:
        outcome = self.do("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in outcome, outcome
        return outcome["result"]["value"]

    def events(self, *methods: str) -> list[dict[str, Any]]:
        return [m["params"] for m in self.said if m.get("method") in methods]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._answers], [], [], 60)[0], "chromium says nothing"
            data = os.read(self._answers, 1 << 16)
            assert data, "chromium is gone"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    (their_orders, orders), (answers, their_answers) = os.pipe(), os.pipe()
    command = [CHROMIUM or "", *FLAGS, f"--user-data-dir={profile}"]
    pipes = [sys.executable, "-c", LAUNCH, str(their_orders), str(their_answers)]
    process = subprocess.Popen([*pipes, *command], pass_fds=(their_orders, their_answers), stderr=subprocess.DEVNULL)
    os.close(their_orders)
    os.close(their_answers)
    try:
        tab = Tab(orders, answers)
        yield tab
        tab.do("Browser.close")
    finally:
        os.close(orders)
        os.close(answers)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module", params=["several", "one", "ours"])
def opened(request: pytest.FixtureRequest, tab: Tab, tmp_path_factory: pytest.TempPathFactory) -> Tab:
    made = every_kind_of_run()
    runs = {
        "several": made,
        "one": [r for r in made if "plan" in r][:1],
        "ours": read_results([Path(__file__).parents[1] / "benchmarks" / "results"]),
    }
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page(runs[request.param]), encoding="utf-8")
    tab.show(1200, 900, "light")
    tab.open(file.as_uri())
    return tab


def test_nothing_is_complained_of_and_nothing_fetched(opened: Tab) -> None:
    assert opened.events("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    asked = [event["request"]["url"] for event in opened.events("Network.requestWillBeSent")]
    assert [url.split(":")[0] for url in asked if not url.startswith("data:")] == ["file"]


def test_the_browser_would_tell_of_what_the_policy_forbids(tab: Tab, tmp_path: Path) -> None:
    bad = page(every_kind_of_run()).replace("</body>", "<script>1</script><img src='x.png' alt=''></body>")
    (tmp_path / "bad.html").write_text(bad, encoding="utf-8")
    tab.open((tmp_path / "bad.html").as_uri())
    complaints = [event["entry"]["text"] for event in tab.events("Log.entryAdded")]
    assert len(complaints) == 2
    assert all("Content Security Policy" in text for text in complaints)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1200])
def test_every_picture_is_drawn_and_nothing_is_wider_than_the_page(opened: Tab, width: int, scheme: str) -> None:
    opened.show(width, 800, scheme)
    empty = "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height < 10 || s.getBBox().width < 8)"
    assert opened.value("document.querySelectorAll('svg[role=img]').length") > 6
    assert opened.value(f"{empty}.map(s => s.outerHTML)") == []
    outside = """[...document.querySelectorAll('svg[role=img]')].filter(s => {
        const b = s.getBBox(), v = s.viewBox.baseVal;
        return b.x < 0 || b.y < 0 || b.x + b.width > v.width || b.y + b.height > v.height})"""
    assert opened.value(f"{outside}.map(s => s.getAttribute('aria-label'))") == []
    assert opened.value("document.documentElement.scrollWidth") == width
    assert opened.value("document.body.scrollWidth") <= width


def test_on_a_phone_texts_in_pictures_are_large_enough_and_do_not_cover_each_other(opened: Tab) -> None:
    opened.show(360, 800, "light")
    sizes = """[...document.querySelectorAll('svg text')].map(t =>
        parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().d).filter(Boolean)"""
    assert min(opened.value(sizes)) > 10
    covered = """[...document.querySelectorAll('svg[role=img]')].flatMap(s => {
        const boxes = [...s.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
        const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
        return boxes.flatMap(([text, a], i) => boxes.slice(i + 1).filter(([, b]) => meet(a, b)).map(([other]) =>
            [s.getAttribute('aria-label'), text, other]))})"""
    assert opened.value(covered) == []


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_paper_and_ink_follow_the_readers_scheme(opened: Tab, scheme: str, dark: bool) -> None:
    opened.show(1200, 800, scheme)

    def brightness(selector: str, of: str) -> float:
        colour = opened.value(f"getComputedStyle(document.querySelector('{selector}')).{of}")
        return sum(int(part) for part in colour.strip("rgba()").split(",")[:3]) / 765

    paper = brightness("body", "backgroundColor")
    assert (paper < 0.2) == dark
    for ink, of in (("body", "color"), ("svg text", "fill"), ("svg .mark", "color"), (".note", "color")):
        assert abs(brightness(ink, of) - paper) > 0.3
