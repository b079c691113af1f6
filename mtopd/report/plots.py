"""The plots of report.html, each an SVG in a data URI."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtopd.metrics_lines import EvaluationLine, TrainStepLine
from mtopd.report.numbers import Report, first_steps
from mtopd.report.record import RunRecord, SpecialistRecord
from mtopd.report.tables import in_bytes

COLOURS = (  # distinguishable for colour-blind readers
    *("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B58900"),
    *("#56B4E9", "#666666", "#332288", "#999933", "#882255"),
)
GREY, LIGHT = "#777777", "#BBBBBB"
_MAX_POINTS = 150  # of a line in a plot; of more train steps the means of neighbours are drawn
_MAX_LABEL = 20  # characters of a name in a plot
_PLOT_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "svg.hashsalt": "mtopd",  # the same run gives the same bytes
}


class Plot(NamedTuple):
    """For an <img>: a script in an image does not run."""

    alt: str
    uri: str


def _plot(alt: str, width: float, height: float, draw: Callable[[Axes], None]) -> Plot:
    """Sizes in inches."""
    with matplotlib.rc_context(_PLOT_STYLE):
        figure = Figure((width, height), layout="constrained")
        draw(figure.add_subplot())
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return Plot(alt, f"data:image/svg+xml;base64,{data}")


def _label(name: str) -> str:
    """A name short enough to stand beside a plot; text around the plots has it whole."""
    short = name if len(name) <= _MAX_LABEL else f"{name[: _MAX_LABEL - 3]}..."
    return short.replace("$", r"\$")  # a dollar, not the start of a formula


def teacher_colours(report: Report) -> dict[str, str]:
    return {t["name"]: COLOURS[i % len(COLOURS)] for i, t in enumerate(report["teachers"])}


def accuracy_plots(record: RunRecord, report: Report, colours: Mapping[str, str]) -> list[Plot]:
    """One for each domain, in the colour of its teacher."""
    plots = []
    for i, domain in enumerate(record.domains()):
        colour = colours.get(domain.teacher or "", COLOURS[i % len(COLOURS)])
        plots.append(_accuracy_plot(record, report, domain.name, colour))
    return plots


def _accuracy_plot(record: RunRecord, report: Report, source: str, colour: str) -> Plot:
    domain, average = report["domains"][source], report["baselines"]["weight_average"].get(source)
    levels = (
        (domain["teacher"], colour, "--"),
        (domain["base"], GREY, ":"),
        (average, LIGHT, "-"),
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


def kl_plot(record: RunRecord, colours: Mapping[str, str]) -> Plot:
    steps = record.entries(TrainStepLine)
    width = -(-len(steps) // _MAX_POINTS)

    def draw(axes: Axes) -> None:
        for name, colour in colours.items():
            found = [(step, line.reverse_kl_by_teacher.get(name)) for _, step, line in steps]
            points = [(x, y) for x, y in found if x is not None and y is not None]
            mark = "o" if len(points) == 1 else None  # a line of one point would not be seen
            axes.plot(*_means(points, width), color=colour, linewidth=1.3, marker=mark)
        label = "train step" if width <= 1 else f"train step (means of {width} steps)"
        axes.set(xlabel=label, ylabel="reverse KL, nats per token", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")

    return _plot("reverse KL by teacher over train steps", 5.4, 3.6, draw)


def mismatch_plot(record: RunRecord) -> Plot | None:
    """None where nothing was measured, as by an older version."""
    entries = record.entries(TrainStepLine)
    known = [e for e in entries if e.line.mismatch.log_prob_difference_p99 is not None]
    if not known:
        return None
    width = -(-len(known) // _MAX_POINTS)
    means = [(e.step or 0, math.log(e.line.mismatch.token_mult_prob_error or 1)) for e in known]
    p99, firsts = (
        [(e.step or 0, e.line.mismatch.log_prob_difference_p99 or 0) for e in shown]
        for shown in (known, first_steps(record))
    )

    def draw(axes: Axes) -> None:
        for points, colour in ((p99, COLOURS[0]), (means, COLOURS[1])):
            mark = "o" if len(points) == 1 else None
            axes.plot(*_means(points, width), color=colour, linewidth=1.3, marker=mark)
        firsts_width = -(-len(firsts) // _MAX_POINTS)
        axes.plot(*_means(firsts, firsts_width), "o", color=COLOURS[0], markersize=4)
        label = "train step" if width <= 1 else f"train step (means of {width} steps)"
        axes.set(xlabel=label, ylabel="|difference|, nats", yscale="log")

    return _plot("log-probs of trainer and rollout over train steps", 5.4, 3.6, draw)


def loss_plot(record: SpecialistRecord) -> Plot:
    steps = record.entries(TrainStepLine)
    points = [(step or 0, line.loss) for _, step, line in steps if line.loss is not None]
    width = -(-len(points) // _MAX_POINTS)

    def draw(axes: Axes) -> None:
        mark = "o" if len(points) == 1 else None
        axes.plot(*_means(points, width), color=COLOURS[0], linewidth=1.3, marker=mark)
        label = "train step" if width <= 1 else f"train step (means of {width} steps)"
        axes.set(xlabel=label, ylabel="cross entropy, nats per token", ylim=(0, None))

    return _plot("loss over train steps", 5.4, 3.0, draw)


def specialist_accuracy_plots(record: SpecialistRecord) -> list[Plot]:
    """One for each source that was evaluated, over train steps."""
    found = record.entries(EvaluationLine)
    names = dict.fromkeys(name for _, _, line in found for name in line.accuracy)
    return [
        _points_plot(
            name,
            [(step, 100 * line.accuracy[name]) for step, _, line in found if name in line.accuracy],
            COLOURS[i % len(COLOURS)],
        )
        for i, name in enumerate(names)
    ]


def _points_plot(source: str, points: Sequence[tuple[float, float]], colour: str) -> Plot:
    def draw(axes: Axes) -> None:
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, markersize=4)
        axes.set(title=_label(source), xlabel="train step", ylabel="accuracy, %", ylim=(-4, 104))

    return _plot(f"accuracy on {source} over train steps", 3.6, 2.7, draw)


def _means(points: Sequence[tuple[float, float]], width: int) -> tuple[list[float], list[float]]:
    """Means of ``width`` neighbours."""
    bins = [points[i : i + width] for i in range(0, len(points), width or 1)]
    return [sum(x for x, _ in b) / len(b) for b in bins], [
        sum(y for _, y in b) / len(b) for b in bins
    ]


def time_plot(report: Report) -> Plot:
    wall = dict(sorted(report["wall_s"].items(), key=lambda item: item[1]))
    names = [_label(phase.replace("_", " ")) for phase in wall]

    def draw(axes: Axes) -> None:
        bars = axes.barh(names, list(wall.values()), color=COLOURS[0], height=0.6)
        axes.barh(
            names,
            [report["stall_s"].get(phase, 0) for phase in wall],
            color=COLOURS[1],
            height=0.6,
        )
        axes.bar_label(bars, [f"{seconds:,.1f} s" for seconds in wall.values()], padding=4)
        axes.margins(x=0.2)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="seconds")

    return _plot("wall and stalled seconds by phase", 5.4, 3.6, draw)


def memory_plot(report: Report, colours: Mapping[str, str]) -> Plot:
    stored: list[tuple[str, int]] = []
    rows = [("process, host", report["peak_host_bytes"], GREY)]
    rows.append(("head, device", report["peak_head_bytes"], GREY))
    for t in reversed(report["teachers"]):
        name = _label(t["name"])
        rows.append((f"{name}: read ahead, host", t["peak_host_bytes"], colours[t["name"]]))
        rows.append((f"{name}: layers, device", t["peak_device_bytes"], colours[t["name"]]))
        stored.append((rows[-1][0], t["stored_bytes"]))

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
        for name, count in stored:
            if count:
                axes.plot(
                    count, name, "o", markerfacecolor="none", markeredgecolor=GREY, markersize=7
                )
        axes.set_xscale("log", base=4)
        axes.xaxis.set_major_formatter(lambda count, _: in_bytes(count))
        axes.minorticks_off()
        axes.margins(0.12)

    return _plot("peak memory", 5.4, 1.2 + 0.36 * len(rows), draw)
