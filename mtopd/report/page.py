"""report.html: one file, with its plots inlined and every string of the run escaped; nothing is
loaded and no script can run.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from mtopd.report import plots
from mtopd.report.numbers import Report
from mtopd.report.record import RunRecord
from mtopd.report.tables import (
    check_rows,
    number,
    per_second,
    progress,
    result_columns,
    result_rows,
    reverse_kl,
    teacher_rows,
)

_DARK = "#333333"


def render_page(record: RunRecord, report: Report, title: str) -> str:
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text())
    colours = plots.teacher_colours(report)
    return template.render(
        title=title,
        lead=f"{'Finished' if report['finished'] else 'NOT finished'}: {progress(report)}.",
        tiles=_tiles(report),
        result_columns=result_columns(report),
        result_rows=result_rows(report),
        check_rows=check_rows(report),
        accuracy_legend=[
            ("student", _DARK, "solid"),
            ("its teacher", _DARK, "dashed"),
            ("base", plots.GREY, "dotted"),
            ("weight average", plots.LIGHT, "solid"),
        ],
        accuracy_plots=plots.accuracy_plots(record, report, colours),
        teacher_legend=[(name, colour, "solid") for name, colour in colours.items()],
        kl_plot=plots.kl_plot(record, colours),
        time_legend=[
            ("wall", plots.COLOURS[0], "solid"),
            ("of it stalled on transfers", plots.COLOURS[1], "solid"),
        ],
        time_plot=plots.time_plot(report),
        memory_plot=plots.memory_plot(report, colours),
        teacher_columns=["", *colours],
        teacher_rows=teacher_rows(report),
        config=record.config_yaml,
    )


def _tiles(report: Report) -> list[tuple[str, str]]:
    """The numbers at the top: label, value."""
    rates = per_second(report["tokens_per_s"]), per_second(report["positions_per_s"])
    return [
        ("worst recovery", number(report["worst_recovery"])),
        ("mean recovery", number(report["mean_recovery"])),
        ("reverse KL, nats per token", reverse_kl(report, "\N{RIGHTWARDS ARROW}")),
        ("train steps", f"{report['train_steps']:,}"),
        ("answer tokens, positions a second of train steps", " / ".join(rates)),
        ("rollout tokens", f"{report['rollout_tokens']:,}"),
        ("wall time of all phases", f"{sum(report['wall_s'].values()):,.0f} s"),
    ]
