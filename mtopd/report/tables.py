"""The report's tables and lines as text, for the console and for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mtopd.report.numbers import Report, worst_recovery


def result_columns(report: Report) -> list[str]:
    return ["", *report["domains"], "worst recovery"]


def result_rows(report: Report) -> list[list[str]]:
    """Cells of the result table: label, accuracy of each domain, worst recovery."""
    domains, baselines = report["domains"], report["baselines"]
    models = {
        "base": {name: d["base"] for name, d in domains.items()},
        **baselines["specialists"],
        **({"weight average": average} if (average := baselines["weight_average"]) else {}),
        "student": {name: d["student"] for name, d in domains.items()},
    }
    rows = [
        [
            label,
            *(percent(accuracy.get(name)) for name in domains),
            number(worst_recovery(domains, accuracy)),
        ]
        for label, accuracy in models.items()
    ]
    recovery = [number(d["recovery"]) for d in domains.values()]
    rows.append(["recovery", *recovery, number(report["worst_recovery"])])
    if ended := report["student_stopped"]:  # older runs did not note it
        rows.append(["student's answers ended", *(percent(ended.get(n)) for n in domains), ""])
    return rows


def accuracy_columns(report: Report) -> list[str]:
    return ["", *report["accuracy"]]


def accuracy_rows(report: Report) -> list[list[str]]:
    """Cells of a specialist's result: label, a column for each source with held-out prompts."""
    return [
        [label, *(percent(report[key].get(name)) for name in report["accuracy"])]
        for label, key in (("accuracy", "accuracy"), ("answers ended", "stopped"))
    ]


def specialist_verdict(report: Report) -> str:
    """A supervised run in one line."""
    found = ", ".join(f"{name} {percent(v)}" for name, v in report["accuracy"].items())
    done = "trained" if report["finished"] else "unfinished"
    loss = first_and_last(report["loss"], report["train_steps"], "->")
    return f"{done}, {steps_done(report)}: accuracy {found or 'not measured'}, loss {loss}"


def steps_done(report: Report) -> str:
    return f"{report['train_steps']} of {report['planned_steps']} train steps"


def check_rows(report: Report) -> list[list[str]]:
    """Cells of the table of checks: what, found, expected, verdict."""
    rows = []
    for name, check in report["checks"].items():
        expected = (
            f"{check['expected']:,}" if "expected" in check else f"at most {check['at_most']}"
        )
        rows.append(
            [
                name.replace("_", " "),
                f"{check['found']:,}",
                expected,
                "ok" if check["ok"] else "WRONG",
            ]
        )
    return rows


def teacher_rows(report: Report) -> list[list[str]]:
    """Cells of the table of teachers: label, one column for each teacher."""
    teachers = report["teachers"]
    counts = {"passes": "passes", "tokens in passes": "tokens", "head loads": "head_loads"}
    sizes = {
        "size of a pass": "stored_bytes",
        "read in passes": "bytes_read",
        "kept in memory instead": "bytes_kept",
        "read for heads": "head_bytes_read",
    }
    return [
        *([label, *(f"{t[key]:,}" for t in teachers)] for label, key in counts.items()),
        *([label, *(in_bytes(t[key]) for t in teachers)] for label, key in sizes.items()),
        ["fingerprint", *(t["fingerprint"][:8] for t in teachers)],
        ["log-probs checked against", *(t["probe"] or "-" for t in teachers)],
    ]


def verdict(report: Report) -> str:
    """The run in one line."""
    return (
        f"{'consolidated' if report['finished'] else 'unfinished, ' + progress(report)}: "
        f"worst recovery {number(report['worst_recovery'])}, mean "
        f"{number(report['mean_recovery'])}, "
        f"reverse KL {reverse_kl(report, '->')}"
    )


def reverse_kl(report: Report, arrow: str) -> str:
    """First and last KL; of one train step its KL alone."""
    return first_and_last(report["reverse_kl"], report["train_steps"], arrow)


def first_and_last(ends: Mapping[str, float | None], num_steps: int, arrow: str) -> str:
    """A train step's number at either end of the run, and how many times lower it has become."""
    first, last = ends["first"], ends["last"]
    if num_steps < 2:
        return nats(first)
    ratio = first / last if first is not None and last else 0
    lower = f" ({ratio:.1f}x)" if 1 <= ratio < 10 else f" ({ratio:.0f}x)" if ratio >= 10 else ""
    return f"{nats(first)} {arrow} {nats(last)}{lower}"


def recovery_lines(report: Report) -> list[str]:
    """What the worst recovery leaves out, and why; the same reason is said once."""
    found, missing = report["domains"], report["no_recovery"]
    lines: dict[str, list[str]] = {}
    for name, why in missing.items():
        lines.setdefault(why, []).append(name)
    said = [f"none for {', '.join(names)}: {why}" for why, names in lines.items()]
    if said:
        said[0] = f"recovery of {len(found) - len(missing)} of {len(found)} domains; {said[0]}"
    return said


def progress(report: Report) -> str:
    return f"{report['iterations']['done']} of {report['iterations']['planned']} iterations"


def origin_rows(report: Report) -> list[str]:
    """A line for a run that began with another's checkpoint: its student was trained before."""
    return [f"began with {report['began_with']}"] if report["began_with"] else []


def number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def nats(value: float | None) -> str:
    """A divergence, which may be near 1 or far below."""
    return "n/a" if value is None else f"{value:.2g}"


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def per_second(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.0f}"


def in_bytes(count: float | None) -> str:
    """A number of bytes as text with a unit."""
    if count is None:
        return "n/a"
    power = min(int(math.log2(max(count, 1)) // 10), 4)
    return f"{round(count / 1024**power, 1):g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
