"""The page in a real browser: Debian's Chromium, headless, without network."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from megatron_fc.profiling.records import Report, report_of
from megatron_fc.profiling.report.page import page
from megatron_fc.profiling.report.side_by_side import side_by_side
from support.example_report import RUN, part, parts
from support.patience import PATIENCE

CHROMIUM = shutil.which("chromium")
FIGURES = ["kinds", "streams", "network", "nodes", "ranks", "timeline"]
# Put behind the page to look at it from within: what is drawn, and whether anything is wider than the screen.
_LOOK = """<script>
const figures = Object.fromEntries([...document.querySelectorAll("figure")].map(figure => [figure.id, {
  drawn: [...figure.querySelectorAll("rect")].filter(r => r.getBoundingClientRect().width > 0).length,
  colours: new Set([...figure.querySelectorAll("rect")].map(r => getComputedStyle(r).fill)).size,
  text: figure.innerText,
}]));
document.body.dataset.seen = JSON.stringify({figures, width: innerWidth, needed: document.documentElement.scrollWidth});
</script>"""


def example_page(weight: int = 1) -> str:
    report, twin = report_of(parts()), report_of(parts("residual", weight))
    return page(report, side_by_side(report, [twin]))


def browse(html: str, folder: Path, width: int = 1280) -> subprocess.CompletedProcess[str]:
    """Open a page; standard output is its document, standard error what the browser logs, its console included."""
    if CHROMIUM is None:
        pytest.skip("chromium not found: apt-get install chromium")
    file = folder / "page.html"
    file.write_text(html)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    profile = [
        f"--user-data-dir={folder}/chromium",
        f"--window-size={width},900",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    command = [CHROMIUM, *options, *profile, f"file://{file}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)


def look(html: str, folder: Path, width: int = 1280) -> dict:
    """What is drawn."""
    opened = browse(html.replace("</body>", f"{_LOOK}</body>"), folder, width)
    assert "CONSOLE" not in opened.stderr, opened.stderr
    found = re.search(r'data-seen="([^"]*)"', opened.stdout)
    assert found is not None, opened.stdout[-500:]
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("width", [1280, 500])  # Chromium makes no window narrower than 500
def test_every_chart_is_drawn_and_fits_the_screen(width: int, tmp_path: Path) -> None:
    seen = look(example_page(), tmp_path, width)
    assert seen["width"] == width
    assert list(seen["figures"]) == FIGURES
    for name, figure in seen["figures"].items():
        assert figure["drawn"] >= 4, name
        assert figure["colours"] >= 2, f"{name} has no colours"
        assert not re.search(r"\bnan\b|None|undefined", figure["text"], re.IGNORECASE), name
    assert seen["needed"] <= seen["width"]
    assert "MoE" in seen["figures"]["kinds"]["text"]
    assert "node1" in seen["figures"]["nodes"]["text"]
    assert "rank 7" in seen["figures"]["timeline"]["text"]


def test_an_error_in_the_console_would_be_seen(tmp_path: Path) -> None:
    broken = example_page().replace("</body>", "<script>missing()</script></body>")
    assert "CONSOLE" in browse(broken, tmp_path).stderr


def test_the_page_needs_nothing_else() -> None:
    html = example_page()
    assert not re.search(r"""(?:src|href)=["'](?!data:,)|@import|url\(|<script""", html)


def test_bars_are_as_long_as_their_values() -> None:
    """The residual twin moves a third of the bytes."""
    report, twin = report_of(parts(weight=3)), report_of(parts("residual"))
    html = page(report, side_by_side(report, [twin]))
    streams = html[html.index('<figure id="streams">') : html.index('<figure id="network">')]
    bars = re.findall(r'class="bar" role="img" aria-label="([^":]+): [^"]*">(.*?)</svg>', streams)
    lengths = {name: sum(map(float, re.findall(r'width="([\d.]+)%"', bar))) for name, bar in bars}
    assert lengths["dfc_x4, torch"] / lengths["residual"] == pytest.approx(3, rel=1e-3)
    assert "counted, 3.00×" in streams


def test_missing_ranks_are_named_at_the_top() -> None:
    html = _page_of([part(rank) for rank in range(4)])  # all of one node
    top = html[: html.index("<figure")]
    assert "Nothing is known of ranks 4, 5, 6, 7: every sum is without them." in top
    assert "8 ranks on 2 nodes" in top
    assert 'role="alert"' not in example_page()


def test_names_are_escaped() -> None:
    run = replace(RUN, command="megatron-fc traffic run <script>alert(1)</script>")
    html = _page_of([replace(each, run=run) for each in parts()])
    assert "<script" not in html


def test_an_empty_window_is_a_page_too(tmp_path: Path) -> None:
    """As after a run that broke off in its first counted step."""
    empty = [replace(each, rank=replace(each.rank, step_seconds=[], timeline=[])) for each in parts()]
    assert "No step is complete on all ranks." in _page_of(empty)


def _page_of(its_parts: list) -> str:
    report: Report = report_of(its_parts)
    return page(report, side_by_side(report))
