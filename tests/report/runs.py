"""Run directories as a consolidation leaves them, without the consolidation."""

import io
from pathlib import Path

from rich.console import Console

from mtopd import manifest
from mtopd.config import ConsolidateConfig
from mtopd.config_file import resolved, to_yaml, validate
from mtopd.metrics import MetricsWriter
from mtopd.metrics_lines import (
    PassMetrics,
    PhaseLine,
    RolloutLine,
    TeacherPassLine,
    TrainStepLine,
    from_values,
)
from mtopd.report import build_report, read_run, write_report
from mtopd.run_dir import RunDir

TEACHERS = ("rot", "rev", "spir")
ROLLOUT = RolloutLine(tokens=100, samples=192, stopped=180, continued_tokens=0, log_bytes=2000)
STORED = {"rot": 1000, "rev": 1100, "spir": 1200}
BASELINES = {
    "models": {
        "base": {"rot": 0.4, "rev": 0.5, "spir": 0.6},
        "rot": {"rot": 1.0, "rev": 0.0, "spir": 0.0},
        "rev": {"rot": 0.0, "rev": 0.9, "spir": 0.0},
        "spir": {"rot": 0.0, "rev": 0.1, "spir": 0.64},
    },
    "weight_average": {"rot": 0.1, "rev": 0.7, "spir": 0.2},
}


def config_of(run_dir: Path, num_iterations: int, **changes) -> ConsolidateConfig:
    values = {
        "run_dir": str(run_dir),
        "student": {"model": "base"},
        "teachers": [
            {"name": name, "store": f"teachers/{name}", "route": {"domain": name}}
            for name in TEACHERS
        ],
        "data": {
            "context_length": 48,
            "max_response": 20,
            "sources": [{"name": name, "path": f"{name}.jsonl"} for name in TEACHERS],
        },
        "rollout": {"prompts_per_iteration": 192},
        "train": {
            "num_iterations": num_iterations,
            "train_steps_per_iteration": 2,
            "micro_batch_size": 48,
            "optimizer": {"lr": 2e-3},
        },
    }
    return validate({**values, **changes}, ConsolidateConfig, "test")


def step_line(step: int, names: tuple[str, ...] = TEACHERS, **changes) -> TrainStepLine:
    """A train step whose reverse KL is 1 / (step + 1) over step + 1 tokens."""
    values = {
        "loss": 1.0,
        "reverse_kl": 1 / (step + 1),
        "reverse_kl_by_teacher": {name: (i + 1) / (step + 1) for i, name in enumerate(names)},
        # Twice as far in an iteration's second step.
        "log_prob_difference": -1e-7,
        "log_prob_difference_p99": 1e-6 * (step // 2 + 1) * (1 + step % 2),
        "token_mult_prob_error": 1 + 1e-3 * (step + 1),
        "tokens": step + 1,
        "teachers_in_step": len(names),
        "head_loads": dict.fromkeys(names, 1),
        "head_bytes_read": dict.fromkeys(names, 64),
        "peak_resident_heads": 1,
        "peak_head_bytes": 64,
        "positions": 3 * (step + 1),
        "stall_s": 0.25,
        "wall_s": 2.0,
    }
    return from_values(TrainStepLine, {**values, **changes})


def pass_metrics(name: str, **changes) -> PassMetrics:
    stored = STORED.get(name, 1000)
    values = {
        "bytes_read": stored,
        "bytes_kept": 0,
        "stored_bytes": stored,
        "probe": "transformers",
        "tokens": 10,
        "samples": 5,
        "waves": 1,
        "stall_s": 0.5,
        "peak_device_bytes": stored // 2,
        "peak_host_bytes": stored // 4,
        "relayouts": 0,
    }
    return PassMetrics(**{**values, **changes})


def write_iteration(
    metrics: MetricsWriter, iteration: int, names: tuple[str, ...] = TEACHERS, **changes
) -> None:
    metrics.write(ROLLOUT, iteration)
    metrics.write(PhaseLine("rollout", 2.0), iteration)
    metrics.write(TeacherPassLine({name: pass_metrics(name) for name in names}), iteration)
    metrics.write(PhaseLine("teacher_pass", 3.0), iteration)
    for step in (2 * iteration, 2 * iteration + 1):
        metrics.write(step_line(step, names, **changes), iteration, step=step)
    metrics.write(PhaseLine("train", 4.0), iteration)
    metrics.write(PhaseLine("update_weights", 0.5), iteration)


def start_run(
    run_dir: Path, config: ConsolidateConfig, names: tuple[str, ...] = TEACHERS
) -> RunDir:
    run_dir.mkdir(parents=True, exist_ok=True)
    run = RunDir(run_dir)
    table = [
        {"index": i, "name": n, "fingerprint": f"{i}" * 64, "weight": 1 / len(names)}
        for i, n in enumerate(names)
    ]
    manifest.start_run(run, resolved(config), {"teachers": table}, to_yaml(config))
    (run_dir / "evaluations").mkdir(exist_ok=True)
    return run


def finish(run: RunDir, num_iterations: int) -> None:
    run.export(num_iterations).mkdir(parents=True)
    run.seal(run.export(num_iterations))


def report_of(run: RunDir, num_iterations: int = 15) -> dict:
    return build_report(read_run(run.path, config_of(run.path, num_iterations)))


def written(run: RunDir, width: int = 200) -> tuple[dict, list[str], str]:
    """What ``write`` returns, the lines it prints, the page."""
    console = Console(file=io.StringIO(), width=width)
    report = write_report(run.path, console)
    return report, console.file.getvalue().splitlines(), (run.path / "report.html").read_text()
