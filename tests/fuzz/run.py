"""Mutated input files through the command line: each ends in success, or in one line and exit code 2.

    python -m tests.fuzz.run [--count 200] [--whole 50] [--seed N] [--only config.json]

Workers import the product once and are started again when they die; a death, a traceback, a hang or
an "unforeseen" is a failure, and its input is kept.  ``--whole`` of the refused or accepted inputs
run to the end, and the same command is then given the sound input: it must end with the bytes of a
clean run, or, where something was made of the other input, refuse because it belongs to that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import random
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.conftest import REPOSITORY
from tests.fuzz.mutate import MUTATIONS, mutate

HANGS_AFTER = 60.0  # seconds of one command
# The parts of a case that a mutated file may be; a model is teacher, student or baseline.
ROLES = ("teacher", "student", "baseline")


@dataclass(frozen=True)
class Case:
    kind: str
    number: int
    role: str
    whole: bool

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number:04d}-{self.role}"


class Worker:
    """A process that runs commands one at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, argv: list[str], cwd: Path, *, ranks: bool = False) -> tuple[int | None, str]:
        """(exit code, output); the code is None when the process died or hung."""
        if self._process is None:
            home = cwd.parent / "home"
            home.mkdir(exist_ok=True)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker"],
                cwd=REPOSITORY,
                env={
                    **os.environ,
                    "HOME": str(home),
                    "XDG_CACHE_HOME": str(home),
                    "OMP_NUM_THREADS": "1",
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        job = {"argv": argv, "cwd": str(cwd), "ranks": ranks}
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        answer = b""
        limit = time.monotonic() + HANGS_AFTER + (60 if ranks else 0)
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select(
                [process.stdout], [], [], max(0.0, limit - time.monotonic())
            )
            piece = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            if not piece:
                process.kill()
                code = process.wait()
                self._process = None
                return None, "hung" if not ready else f"the process died with {code}"
            answer += piece
        found = json.loads(answer)
        return found["code"], found["out"]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def make_parts(root: Path) -> None:
    """Sound inputs: a model (also in shards), a teacher store, prompts, a config."""
    from safetensors.torch import load_file, save_file

    from mtopd.convert.teacher import add_teacher
    from tests.small_models import save_model, write_prompts

    save_model(root / "model", seed=1, layers=2, hidden=32, tied=False)
    save_model(root / "other", seed=9, layers=2, hidden=32)
    add_teacher("other", root / "other", root / "stores" / "other", slices=1)
    shutil.copytree(root / "model", root / "sharded")
    tensors = load_file(root / "sharded" / "model.safetensors")
    (root / "sharded" / "model.safetensors").unlink()
    files = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    parts = {file: {n: tensors[n] for n in sorted(tensors)[i::2]} for i, file in enumerate(files)}
    for file, part in parts.items():
        save_file(part, root / "sharded" / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    write_prompts(root / "prompts.jsonl", count=12, domains=("a",))
    rows = [json.loads(line) for line in (root / "prompts.jsonl").read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), root / "prompts.parquet")


def config_of(case: Case) -> dict[str, object]:
    """A consolidation whose inputs lie in the current folder; one rank."""
    weights = "sharded" if case.kind == "model.safetensors.index.json" else "model"
    prompts = case.kind if case.kind.startswith("prompts.") else "prompts.jsonl"
    student = weights if case.role == "student" else "model"
    teacher = "stores/mine" if case.role == "teacher" else "stores/other"
    baselines = {"base": weights} if case.role == "baseline" else {}
    return {
        "run_dir": "run",
        "student": {"model": student, "parallel": {"tp": 1}},
        "teachers": [{"name": "t", "store": teacher, "route": {}}],
        "data": {
            "sources": [{"name": "words", "path": prompts}],
            "context_length": 64,
            "max_response": 4,
        },
        "rollout": {"prompts_per_iteration": 4},
        "train": {
            "num_iterations": 1,
            "micro_batch_size": 4,
            "optimizer": {"lr": 1e-3, "warmup_steps": 0},
        },
        "evaluation": {"baselines": baselines},
    }


def files_of(case: Case, parts: Path, folder: Path) -> None:
    """The sound inputs of ``case`` in ``folder``."""
    config = config_of(case)
    names = {"model", "sharded"} if case.kind == "model.safetensors.index.json" else {"model"}
    for name in names:
        shutil.copytree(parts / name, folder / name)
    if not (folder / "stores" / "other").exists():
        shutil.copytree(parts / "stores" / "other", folder / "stores" / "other")
    for name in ("prompts.jsonl", "prompts.parquet"):
        shutil.copyfile(parts / name, folder / name)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def target_of(case: Case, folder: Path) -> Path:
    """The file of ``case`` that is mutated."""
    if case.kind in ("prompts.jsonl", "prompts.parquet", "config.yaml"):
        return folder / case.kind
    return (
        folder / ("sharded" if case.kind == "model.safetensors.index.json" else "model") / case.kind
    )


def commands(case: Case, *, whole: bool) -> Iterator[tuple[list[str], bool]]:
    """(arguments, whether ranks run) of what a user would type."""
    if case.role == "teacher":
        folder = "sharded" if case.kind == "model.safetensors.index.json" else "model"
        yield ["teachers", "add", "mine", "--from", folder, "--to", "stores"], False
    if case.role != "teacher" or whole:
        yield ["consolidate", "config.yaml", *([] if whole else ["--check"])], whole


def verdict(code: int | None, out: str) -> str | None:
    """What is wrong with the end of a command; None if nothing."""
    errors = [line for line in out.splitlines() if line.startswith("error:")]
    if code is None:
        return out
    if "Traceback" in out or "unforeseen" in out:
        return "a traceback, or unforeseen"
    if code == 0:
        return None if not errors else "an error and exit code 0"
    if code != 2:
        return f"exit code {code}"
    if len(errors) != 1 or len(errors[0]) < 30:
        return f"{len(errors)} error lines, needed one that says something"
    return None


def has_begun(folder: Path) -> bool:
    """Whether ranks have started in the case's run directory: from then on the run keeps its inputs."""
    note = folder / "run" / "generation.json"
    return note.is_file() and bool(json.loads(note.read_text())["ranks_started"])


def wrong_again(is_taken: bool, refused: str) -> str | None:
    """What is wrong with a refusal of the sound input where the damaged one was before; None if
    nothing, or if it is not refused.

    ``is_taken``: the damaged input was used, so that run or store may belong to it.
    """
    if not refused:
        return None
    if not is_taken:
        return "though nothing was made of the damaged one"
    belongs = ("choose another run_dir", "holds another teacher")
    return None if any(words in refused for words in belongs) else "for another reason"


def result(folder: Path) -> dict[str, str]:
    """sha256 of what a finished case leaves: the export, and a teacher's files."""
    kept = [
        *(folder / "run" / "export").rglob("*.safetensors"),
        *(folder / "stores" / "mine").rglob("*.safetensors"),
    ]
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(kept)
    }


class Fuzz:
    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        self.parts = root / "parts"
        self.failures: list[str] = []
        self.ends: Counter[str] = Counter()
        self._clean: dict[tuple[str, str], dict[str, str]] = {}
        self._lock = threading.Lock()

    def run(self, cases: list[Case], num_workers: int) -> None:
        waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in cases:
            waiting.put(case)

        def work() -> None:
            worker = Worker()
            while True:
                try:
                    case = waiting.get_nowait()
                except queue.Empty:
                    break
                try:
                    self._one(worker, case)
                except Exception as error:
                    self._fail(case, f"the harness itself: {type(error).__name__}: {error}", None)
            worker.close()

        threads = [threading.Thread(target=work) for _ in range(num_workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _one(self, worker: Worker, case: Case) -> None:
        folder = self.root / case.name
        folder.mkdir()
        files_of(case, self.parts, folder)
        target = target_of(case, folder)
        sound = target.read_bytes()
        rng = random.Random(f"{self.seed}/{case.kind}/{case.number}")
        target.write_bytes(mutate(case.kind, sound, rng))
        refused = self._commands(worker, case, folder)
        if refused is None:
            return
        self.ends[f"{case.kind} {'refused' if refused else 'accepted'}"] += 1
        if case.whole:
            is_taken = not refused or has_begun(folder)
            is_taken = is_taken or (folder / "stores" / "mine").exists()
            target.write_bytes(sound)
            refused = self._commands(worker, case, folder)
            if refused is None:
                return
            self.ends["whole, started again: " + ("refused" if refused else "finished")] += 1
            if wrong := wrong_again(is_taken, refused):
                self._fail(case, f"the sound input is refused {wrong}: {refused}", folder)
                return
            found = result(folder)
            if not refused and found != self._clean_run(worker, case):
                self._fail(case, f"not the bytes of a clean run: {found}", folder)
                return
        shutil.rmtree(folder)

    def _commands(self, worker: Worker, case: Case, folder: Path) -> str | None:
        """The line that refuses one of the case's commands, empty if all ended well; None after a
        failure.
        """
        for argv, ranks in commands(case, whole=case.whole):
            code, out = worker.run(argv, folder, ranks=ranks)
            wrong = verdict(code, out)
            if wrong:
                self._fail(case, f"mtopd {' '.join(argv)}: {wrong}\n{out[-1500:]}", folder)
                return None
            if code:
                return next(line for line in out.splitlines() if line.startswith("error:"))
        return ""

    def _clean_run(self, worker: Worker, case: Case) -> dict[str, str]:
        key = (case.kind, case.role)
        with self._lock:
            if key not in self._clean:
                folder = self.root / f"clean-{case.kind}-{case.role}"
                folder.mkdir()
                files_of(case, self.parts, folder)
                for argv, ranks in commands(case, whole=True):
                    code, out = worker.run(argv, folder, ranks=ranks)
                    assert code == 0, out
                self._clean[key] = result(folder)
                assert self._clean[key], "a clean run left nothing to compare"
            return self._clean[key]

    def _fail(self, case: Case, why: str, folder: Path | None) -> None:
        with self._lock:
            self.failures.append(case.name)
            print(f"\nFAILED seed {self.seed}, {case.name}, {folder}: {why}", flush=True)


def make_cases(kinds: list[str], count: int, whole: int) -> list[Case]:
    """``count`` of each kind, the roles in turn; ``whole`` of all, evenly, run to the end."""
    cases = []
    for kind in kinds:
        of_model = not kind.startswith("prompts.") and kind != "config.yaml"
        for number in range(count):
            role = ROLES[number % 3] if of_model else "student"
            cases.append((kind, number, role))
    every = max(1, len(cases) // max(1, whole))
    return [
        Case(*case, whole=whole > 0 and i % every == every // 2) for i, case in enumerate(cases)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="inputs of each format")
    parser.add_argument("--whole", type=int, default=50, help="of all, run to the end")
    parser.add_argument("--seed", type=int, default=14)
    parser.add_argument("--only", choices=MUTATIONS, help="one format")
    parser.add_argument("--number", type=int, help="one input of --only")
    parser.add_argument(
        "--keep", type=Path, help="folder for the inputs; default a temporary one, kept on failure"
    )
    arguments = parser.parse_args()
    root = Path(arguments.keep or tempfile.mkdtemp(prefix="mtopd-fuzz-"))
    root.mkdir(exist_ok=True)
    fuzz = Fuzz(root.resolve(), arguments.seed)
    fuzz.parts.mkdir()
    make_parts(fuzz.parts)
    kinds = [arguments.only] if arguments.only else list(MUTATIONS)
    cases = make_cases(kinds, arguments.count, arguments.whole)
    if arguments.number is not None:
        cases = [case for case in cases if case.number == arguments.number]
    started = time.perf_counter()
    fuzz.run(cases, num_workers=min(2, len(cases)))
    seconds = time.perf_counter() - started
    print("\n".join(f"{end}: {count}" for end, count in sorted(fuzz.ends.items())))
    print(
        f"{len(cases)} inputs, seed {arguments.seed}, {len(fuzz.failures)} failures, {seconds:.0f} s"
    )
    if not fuzz.failures and arguments.keep is None:
        shutil.rmtree(root)
    return 1 if fuzz.failures else 0


if __name__ == "__main__":
    sys.exit(main())
