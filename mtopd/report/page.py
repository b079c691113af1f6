"""report.html: one file, with its plots inlined and every string of the run escaped; nothing is
loaded and no script can run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mtopd.report import plots
from mtopd.report.numbers import Report
from mtopd.report.record import RunRecord, SpecialistRecord
from mtopd.report.tables import (
    accuracy_columns,
    accuracy_rows,
    check_rows,
    first_and_last,
    in_bytes,
    nats,
    number,
    origin_rows,
    per_second,
    percent,
    progress,
    recovery_lines,
    result_columns,
    result_rows,
    reverse_kl,
    steps_done,
    teacher_rows,
)

_DARK = "#333333"
_ARROW = "\N{RIGHTWARDS ARROW}"


def render_page(record: RunRecord, report: Report, title: str) -> str:
    colours = plots.teacher_colours(report)
    return _render(
        "page.html",
        title=title,
        lead=f"{'Finished' if report['finished'] else 'NOT finished'}: {progress(report)}."
        + "".join(f" It {line}." for line in origin_rows(report))
        + "".join(f" {line[0].upper()}{line[1:]}." for line in recovery_lines(report)),
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
        mismatch_legend=[
            ("99th percentile", plots.COLOURS[0], "solid"),
            ("mean", plots.COLOURS[1], "solid"),
        ],
        mismatch_plot=plots.mismatch_plot(record),
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


def render_specialist_page(record: SpecialistRecord, report: Report, title: str) -> str:
    return _render(
        "specialist.html",
        title=title,
        lead=f"{'Finished' if report['finished'] else 'NOT finished'}: {steps_done(report)}.",
        tiles=[
            *(
                (f"accuracy on {name}", percent(value))
                for name, value in report["accuracy"].items()
            ),
            ("loss, nats per token", first_and_last(report["loss"], report["train_steps"], _ARROW)),
            ("train steps", f"{report['train_steps']:,}"),
            *_rates(report),
            ("peak host memory of a rank", in_bytes(report["peak_host_bytes"])),
        ],
        result_columns=accuracy_columns(report),
        result_rows=accuracy_rows(report),
        loss_plot=plots.loss_plot(record),
        accuracy_plots=plots.specialist_accuracy_plots(record),
        config=record.config_yaml,
    )


def _render(name: str, **values: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(name).render(**values)


def _rates(report: Report) -> list[tuple[str, str]]:
    """What train steps got through, as tiles."""
    rates = per_second(report["tokens_per_s"]), per_second(report["positions_per_s"])
    return [("answer tokens, positions a second of train steps", " / ".join(rates))]


def _replies(found: Mapping[str, float]) -> tuple[str, str]:
    """What environments were asked between the student's turns."""
    counts = f"{found['calls']:,.0f} / {found['failed_samples']:,.0f}"
    return ("environment calls / responses that they failed", counts)


def _carried(found: Mapping[str, Any]) -> tuple[str, str]:
    """Of iterations that went on with what the one before had left open."""
    counts = f"{found['samples']:,.0f} / {found['tokens']:,.0f}"
    return ("responses open when an iteration ended / their tokens by then", counts)


def _ages(stale: Mapping[str, Any]) -> tuple[str, str]:
    """Of iterations that trained on tokens of older students."""
    ages = f"{stale['mean']:.2f} / {stale['oldest']}"
    label = "age of the weights that sampled, mean / oldest; tokens too old to train"
    return (label, f"{ages}; {stale['tokens_masked']:,.0f}")


def _updates(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The student's weights on their way to servers."""
    steps = ", ".join(f"{step} {seconds:,.1f}" for step, seconds in found["seconds"].items())
    count, lacking = found["updates"], found["updates_without_a_server"]
    return [
        ("updates of servers' weights, of them without a server", f"{count:,} / {lacking:,}"),
        ("their steps, s", steps),
        ("their bytes, to each server", in_bytes(found["bytes"])),
        ("log-probs of servers off the trainer's by at most", nats(found["probe_difference"])),
    ]


def _tiles(report: Report) -> list[tuple[str, str]]:
    """The numbers at the top: label, value."""
    tokens, continued = report["rollout_tokens"], report["continued_tokens"]
    replied, filtered = report["environment"], report["samples_filtered"]
    return [
        ("worst recovery", number(report["worst_recovery"])),
        ("mean recovery", number(report["mean_recovery"])),
        ("reverse KL, nats per token", reverse_kl(report, _ARROW)),
        ("train steps", f"{report['train_steps']:,}"),
        *_rates(report),
        ("rollout tokens, of them continued after a kill", f"{tokens:,} / {continued:,}"),
        ("token logs of rollouts", in_bytes(report["token_log_bytes"])),
        *(_updates(updates) if (updates := report["weight_updates"]) else []),
        *([_replies(replied)] if replied else []),
        *([_carried(carried)] if (carried := report["carried_over"]) else []),
        *([_ages(stale)] if (stale := report["staleness"]) else []),
        *([_left_out(filtered)] if filtered is not None else []),
        ("wall time of all phases", f"{sum(report['wall_s'].values()):,.0f} s"),
    ]


def _left_out(num_samples: int) -> tuple[str, str]:
    return ("samples left out by train.sequence_filter", f"{num_samples:,}")
