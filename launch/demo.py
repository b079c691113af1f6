"""The demo: from nothing to one student with three abilities.  ``make demo`` and ``make smoke``
call it.

    python launch/demo.py demo|smoke [--seed N]

Each stage is one command of ``mtopd`` and skips itself when its sealed output is there.  The smoke
run has the same stages with fewer steps; its accuracies mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent / "configs"
DOMAINS = ("rot", "rev", "spir")
SMOKE = {
    "base": [
        "train.num_steps=60",
        "train.stop=null",
        *(f"data.sources.{i}.train_size=2000" for i in range(3)),
    ],
    "specialist": ["train.num_steps=30", "data.sources.0.train_size=2000"],
    "consolidate": [
        "train.num_iterations=8",
        "evaluation.every=0",
        "checkpoint.every=4",
        *(
            f"data.sources.{i}.{key}"
            for i in range(3)
            for key in ("train_size=2000", "eval_size=64")
        ),
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("which", choices=("demo", "smoke"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    smoke = arguments.which == "smoke"
    root = Path("runs") / (
        arguments.which if arguments.seed == 0 else f"{arguments.which}-seed{arguments.seed}"
    )
    extra: dict[str, list[str]] = SMOKE if smoke else {name: [] for name in SMOKE}
    seconds: dict[str, float] = {}

    def stage(name: str, *commands: list[str]) -> None:
        """Run commands side by side; stop everything at the first that fails."""
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        processes = [subprocess.Popen([sys.executable, "-m", *command]) for command in commands]
        codes = [process.wait() for process in processes]
        seconds[name] = time.perf_counter() - started
        if any(codes):
            raise SystemExit(next(code for code in codes if code))

    def mtopd(verb: str, config: str, *overrides: str) -> list[str]:
        return ["mtopd.pipelines.cli", verb, str(CONFIGS / config), *overrides]

    # Four small ranks for two CPU cores: a machine with fewer GPUs than ranks would be refused.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    seed = arguments.seed
    base = [
        "specialist",
        "demo_base.yaml",
        f"run_dir={root}/base",
        f"student.model={root}/init",
        f"seed={seed}",
    ]
    if not (root / "init" / "model.safetensors").exists():
        stage(
            "tokenizer and random model",
            ["launch.demo_init", str(root / "init"), str(CONFIGS / "demo_base.yaml"), str(seed)],
        )
    stage("base", mtopd(*base, *extra["base"]))
    specialist = [
        mtopd(
            "specialist",
            f"demo_{name}.yaml",
            f"run_dir={root}/{name}",
            f"student.model={root}/base/export/final",
            f"store.path={root}/teachers/{name}",
            f"seed={seed + 10}",
            *extra["specialist"],
        )
        for name in DOMAINS
    ]
    stage("specialists rot and rev", *specialist[:2])
    stage("specialist spir", specialist[2])
    stage(
        "consolidation",
        mtopd(
            "consolidate",
            "demo.yaml",
            f"run_dir={root}/consolidate",
            f"student.model={root}/base/export/final",
            f"seed={seed}",
            f"evaluation.baselines.base={root}/base/export/final",
            *(f"teachers.{i}.store={root}/teachers/{name}" for i, name in enumerate(DOMAINS)),
            *(f"evaluation.baselines.{name}={root}/{name}/export/final" for name in DOMAINS),
            *extra["consolidate"],
        ),
    )
    for name in ("report.json", "report.html"):
        shutil.copyfile(root / "consolidate" / name, root / name)
    print("\nseconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    print(f"{arguments.which} done: {root}/report.json, {root}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
