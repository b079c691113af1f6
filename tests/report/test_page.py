"""The page holds data, never code, and loads nothing."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

from mtopd.files import write_json
from mtopd.metrics import MetricsWriter
from mtopd.metrics_lines import PhaseLine
from mtopd.run_dir import RunDir
from tests.report.runs import TEACHERS, config_of, start_run, write_iteration, written

HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a browser would see: tags, attributes, text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_run(tmp_path: Path) -> RunDir:
    """Every string that comes from outside holds markup: of HTML, of rich, of matplotlib's
    mathtext.
    """
    name = f'{HOSTILE}"&[bold]$\\frac{{$'
    config = config_of(
        tmp_path / f"a{HOSTILE.replace('/', '')}",
        1,
        student={"model": HOSTILE, "megatron": {HOSTILE: HOSTILE}},
    )
    run = start_run(config.run_dir, config, (name, *TEACHERS))
    metrics = MetricsWriter(run.metrics, enabled=True)
    write_iteration(metrics, 0, (name, *TEACHERS))
    metrics.write(PhaseLine(name, 1.0), 0)
    metrics.write(PhaseLine("$\\frac{$", 1.0), 0)  # short enough to reach a plot whole
    metrics.close()
    write_json(
        run.path / "evaluations" / "baselines.json",
        {"models": {name: {"rot": 0.5}}, "weight_average": None},
    )
    return run


def test_hostile_strings_are_text_and_the_page_loads_nothing(tmp_path: Path) -> None:
    run = hostile_run(tmp_path)
    report, lines, source = written(run)
    page = Page(source)
    assert report["teachers"][0]["name"].startswith(HOSTILE) and "[bold]" in "".join(lines)
    assert page.text.count(HOSTILE) >= 5  # keys, tables, config: shown as they are
    assert set(page.tags).isdisjoint(
        {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
    )
    assert not any(name.startswith("on") for name, _ in page.attributes)

    assert (
        "content",
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    ) in page.attributes
    sources = [
        value
        for name, value in page.attributes
        if name in ("src", "href", "srcset", "action", "data")
    ]
    assert len(sources) == 7 and all(
        value.startswith("data:image/svg+xml;base64,") for value in sources
    )
    assert not re.search(r"https?:|url\(|@import", re.sub(r"base64,[^\"]*", "", source))
    for value in sources:
        svg = base64.b64decode(value.partition(",")[2]).decode()
        assert "<script" not in svg and not re.search(r'(href|src)="(?!#)', svg)
