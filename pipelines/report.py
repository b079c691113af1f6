"""Write a run's report.json and report.html, and show the result on the console.

The page is one file: plots are inlined, every string of the run is escaped, nothing is loaded and
no script can run.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtopd.config import ConsolidateConfig, load_config
from mtopd.files import read_json, write_atomic, write_json
from mtopd.report import (
    RunRecord,
    build_report,
    check_rows,
    in_bytes,
    nats,
    number,
    progress,
    read_run,
    result_rows,
    verdict,
)
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (  # told apart by colour-blind eyes
    *("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B58900"),
    *("#56B4E9", "#666666", "#332288", "#999933", "#882255"),
)
_GREY, _LIGHT = "#777777", "#BBBBBB"
_MAX_POINTS = 150  # of a line in a plot; of more train steps the means of neighbours are drawn
_MAX_LABEL = 20  # characters of a name in a plot
_PLOT_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "svg.hashsalt": "mtopd",  # the same run gives the same bytes
}
_CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c1e21;background:#f5f6f7;margin:0;color-scheme:light}
main{max-width:1120px;margin:auto;padding:24px 16px 48px}
h1{font-size:24px;margin:0;overflow-wrap:anywhere}h2{font-size:17px;margin:0 0 8px}p{margin:4px 0 12px;color:#555}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:16px 0}
.tiles div,section{background:#fff;border:1px solid #dfe1e5;border-radius:8px;padding:12px 16px;min-width:0}
.tiles b{display:block;font-size:18px;line-height:1.4;white-space:nowrap}.tiles span{color:#555;font-size:13px}
section{margin:16px 0}.scroll{overflow-x:auto}img{width:100%;display:block}
.wide{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px}.wide section{margin:0}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:8px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}.key{margin-right:16px;color:#333;white-space:nowrap}
th,td{padding:5px 12px;text-align:right;border-bottom:1px solid #e6e8eb;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}th{font-weight:600;color:#444}
.key i{display:inline-block;width:22px;margin-right:6px;vertical-align:middle}
pre{overflow-x:auto;font-size:13px;line-height:1.4}summary{cursor:pointer;font-weight:600}
@media(max-width:600px){th,td{padding:5px 7px;font-size:13px}th,td:first-child{white-space:normal}}
"""


def write(run_dir: Path, console: Console) -> dict[str, Any]:
    """Write both files into the run directory, print the result table; the last line printed is the
    verdict.
    """
    record = read_run(run_dir, _config(run_dir))
    report = build_report(record)
    write_json(run_dir / "report.json", report)
    write_atomic(run_dir / "report.html", render_page(record, report, str(run_dir)).encode())
    console.print(_console_table(report))
    checks = [
        f"{name}: {found}, wanted {wanted}: {result}"
        for name, found, wanted, result in check_rows(report)
    ]
    for line in (*checks, f"{verdict(report)}, report {run_dir / 'report.html'}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return report


def _config(run_dir: Path) -> ConsolidateConfig:
    run = RunDir(run_dir)
    for path in (run.config, run.manifest):
        if not path.is_file():
            raise MtopdError(
                f"{run_dir} is not a run directory (no {path.name}); give the run_dir of a "
                "consolidation"
            )
    if "teachers" not in read_json(run.manifest):
        raise MtopdError(
            f"{run_dir} is a run without teachers; a report needs the run_dir of a consolidation"
        )
    return load_config(run.config, [], ConsolidateConfig)


# -- console ---------------------------------------------------------------------------------------
def _console_table(report: Mapping[str, Any]) -> Table:
    table = Table()
    table.add_column("")
    for name in (*report["domains"], "worst recovery"):
        table.add_column(Text(name), justify="right")
    for row in result_rows(report):
        table.add_row(*map(Text, row), style="bold" if row[0] in ("student", "recovery") else None)
    return table


# -- page ------------------------------------------------------------------------------------------
def render_page(record: RunRecord, report: Mapping[str, Any], title: str) -> str:
    """report.html."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{policy}">'
        f'<meta name=viewport content="width=device-width"><title>{html.escape(title)}</title><style>{_CSS}</style>'
        f"<main>{_header(report, title)}{''.join(_sections(record, report))}</main></html>\n"
    )


def _sections(record: RunRecord, report: Mapping[str, Any]) -> Iterator[str]:
    colours = {t["name"]: _COLOURS[i % len(_COLOURS)] for i, t in enumerate(report["teachers"])}
    note = (
        "<p>Greedy accuracy on held-out prompts. Recovery: (student - base) / (teacher - base).</p>"
    )
    table = _table(["", *report["domains"], "worst recovery"], result_rows(report))
    yield "<div class=wide>" + _section("Result", note, table)
    note = (
        "<p>A head is loaded once for each teacher in a train step, and one at most is resident. "
        "A pass reads every stored byte once a wave.</p>"
    )
    yield (
        _section("Checks", note, _table(["", "found", "wanted", ""], check_rows(report))) + "</div>"
    )
    lines = {
        "student": ("#333333", "solid"),
        "its teacher": ("#333333", "dashed"),
        "base": (_GREY, "dotted"),
    }
    keys = _keys({**lines, "weight average": (_LIGHT, "solid")})
    yield _section(
        "Accuracy by domain",
        keys,
        f"<div class=panels>{_accuracy_plots(record, report, colours)}</div>",
    )
    keys = _keys({name: (colour, "solid") for name, colour in colours.items()})
    yield "<div class=wide>" + _section("Reverse KL by teacher", keys, _kl_plot(record, colours))
    keys = _keys(
        {"wall": (_COLOURS[0], "solid"), "of it stalled on transfers": (_COLOURS[1], "solid")}
    )
    yield _section("Time by phase", keys, _time_plot(report))
    note = "<p>Peak of any rank. Hollow: the whole teacher as stored.</p>"
    yield _section("Memory", note, _memory_plot(report, colours))
    yield _section("Teachers", _teacher_table(report)) + "</div>"
    config = html.escape(record.config_yaml)
    yield f"<section><details><summary>Resolved config</summary><pre>{config}</pre></details></section>"


def _header(report: Mapping[str, Any], title: str) -> str:
    lead = f"{'Finished' if report['finished'] else 'NOT finished'}: {progress(report)}."
    return f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>{_tiles(report)}"


def _tiles(report: Mapping[str, Any]) -> str:
    kl = report["reverse_kl"]
    tiles = {
        "worst recovery": number(report["worst_recovery"]),
        "mean recovery": number(report["mean_recovery"]),
        "reverse KL, nats per token": f"{nats(kl['first'])} \N{RIGHTWARDS ARROW} {nats(kl['last'])}",
        "train steps": f"{report['train_steps']:,}",
        "rollout tokens": f"{report['rollout_tokens']:,}",
        "wall time of all phases": f"{sum(report['wall_s'].values()):,.0f} s",
    }
    cells = (
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in tiles.items()
    )
    return f"<div class=tiles>{''.join(cells)}</div>"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return f"<div class=scroll><table><tr>{head}{body}</table></div>"


def _keys(lines: Mapping[str, tuple[str, str]]) -> str:
    """A plot's legend as text that wraps; name -> (colour, CSS line style)."""
    keys = (
        f'<span class=key><i style="border-top:3px {style} {colour}"></i>{html.escape(name)}</span> '
        for name, (colour, style) in lines.items()
    )
    return f"<p>{''.join(keys)}</p>"


def _teacher_table(report: Mapping[str, Any]) -> str:
    """One column for each teacher."""
    teachers = report["teachers"]
    counts = {"passes": "passes", "tokens in passes": "tokens", "head loads": "head_loads"}
    sizes = {
        "size of a pass": "stored_bytes",
        "read in passes": "bytes_read",
        "kept in memory instead": "bytes_kept",
    }
    sizes["read for heads"] = "head_bytes_read"
    rows = [[label, *(f"{t[key]:,}" for t in teachers)] for label, key in counts.items()]
    rows += [[label, *(in_bytes(t[key]) for t in teachers)] for label, key in sizes.items()]
    rows.append(["fingerprint", *(t["fingerprint"][:8] for t in teachers)])
    rows.append(["log-probs checked against", *(t["probe"] or "-" for t in teachers)])
    return _table(["", *(t["name"] for t in teachers)], rows)


# -- plots -----------------------------------------------------------------------------------------
def _plot(alt: str, width: float, height: float, draw: Callable[[Axes], None]) -> str:
    """One plot as an <img> that holds its SVG: a script in an image does not run.  Sizes in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_PLOT_STYLE):
        figure = Figure((width, height), layout="constrained")
        draw(figure.add_subplot())
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'


def _label(name: str) -> str:
    """A name short enough to stand beside a plot; text around the plots has it whole."""
    short = name if len(name) <= _MAX_LABEL else f"{name[: _MAX_LABEL - 3]}..."
    return short.replace("$", r"\$")  # a dollar, not the start of a formula


def _accuracy_plots(
    record: RunRecord, report: Mapping[str, Any], colours: Mapping[str, str]
) -> str:
    plots = []
    for i, source in enumerate(record.config.data.sources):
        colour = colours.get(record.teacher_of(source) or "", _COLOURS[i % len(_COLOURS)])
        plots.append(_accuracy_plot(record, report, source.name, colour))
    return "".join(plots)


def _accuracy_plot(record: RunRecord, report: Mapping[str, Any], source: str, colour: str) -> str:
    domain, average = report["domains"][source], report["baselines"]["weight_average"].get(source)
    levels = (
        (domain["teacher"], colour, "--"),
        (domain["base"], _GREY, ":"),
        (average, _LIGHT, "-"),
    )
    found = {
        iteration: accuracy.get(source)
        for iteration, accuracy in sorted(record.evaluations.items())
    }
    points = [
        (iteration, 100 * accuracy) for iteration, accuracy in found.items() if accuracy is not None
    ]

    def draw(axes: Axes) -> None:
        for level, level_colour, style in levels:
            if level is not None:
                axes.axhline(100 * level, color=level_colour, linestyle=style)
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, markersize=4)
        axes.set(title=_label(source), xlabel="iteration", ylabel="accuracy, %", ylim=(-4, 104))

    return _plot(f"accuracy on {source} over iterations", 3.6, 2.7, draw)


def _kl_plot(record: RunRecord, colours: Mapping[str, str]) -> str:
    steps = record.lines.get("train_step", ())
    width = -(-len(steps) // _MAX_POINTS)

    def draw(axes: Axes) -> None:
        for name, colour in colours.items():
            found = [(s["step"], s["reverse_kl_by_teacher"].get(name)) for s in steps]
            axes.plot(
                *_means([(x, y) for x, y in found if y is not None], width),
                color=colour,
                linewidth=1.3,
            )
        label = "train step" if width <= 1 else f"train step (means of {width} steps)"
        axes.set(xlabel=label, ylabel="reverse KL, nats per token", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")

    return _plot("reverse KL by teacher over train steps", 5.4, 3.6, draw)


def _means(points: Sequence[tuple[float, float]], width: int) -> tuple[list[float], list[float]]:
    """Means of ``width`` neighbours."""
    bins = [points[i : i + width] for i in range(0, len(points), width or 1)]
    return [sum(x for x, _ in b) / len(b) for b in bins], [
        sum(y for _, y in b) / len(b) for b in bins
    ]


def _time_plot(report: Mapping[str, Any]) -> str:
    wall = dict(sorted(report["wall_s"].items(), key=lambda item: item[1]))
    names = [_label(phase.replace("_", " ")) for phase in wall]

    def draw(axes: Axes) -> None:
        bars = axes.barh(names, list(wall.values()), color=_COLOURS[0], height=0.6)
        axes.barh(
            names,
            [report["stall_s"].get(phase, 0) for phase in wall],
            color=_COLOURS[1],
            height=0.6,
        )
        axes.bar_label(bars, [f"{seconds:,.1f} s" for seconds in wall.values()], padding=4)
        axes.margins(x=0.2)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="seconds")

    return _plot("wall and stalled seconds by phase", 5.4, 3.6, draw)


def _memory_plot(report: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    rows, whole = [("process, host", report["peak_host_bytes"], _GREY)], []
    rows.append(("head, device", report["peak_head_bytes"], _GREY))
    for t in reversed(report["teachers"]):
        name = _label(t["name"])
        rows.append((f"{name}: read ahead, host", t["peak_host_bytes"], colours[t["name"]]))
        rows.append((f"{name}: layers, device", t["peak_device_bytes"], colours[t["name"]]))
        whole.append((rows[-1][0], t["stored_bytes"]))

    def draw(axes: Axes) -> None:
        for name, count, colour in rows:
            if count:
                axes.plot(count, name, "o", color=colour, markersize=7)
                axes.annotate(
                    in_bytes(count),
                    (count, name),
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                )
        for name, count in whole:
            if count:
                axes.plot(
                    count, name, "o", markerfacecolor="none", markeredgecolor=_GREY, markersize=7
                )
        axes.set_xscale("log", base=4)
        axes.xaxis.set_major_formatter(lambda count, _: in_bytes(count))
        axes.minorticks_off()
        axes.margins(0.12)

    return _plot("peak memory", 5.4, 1.2 + 0.36 * len(rows), draw)
