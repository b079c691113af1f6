"""Where the time of a train step goes, and what exact distillation costs beside next-token cross
entropy.

    python benchmarks/trainer.py --json benchmarks/results/trainer_2core_cpu.json
    python benchmarks/trainer.py --quick

The demo's shapes with random weights: student, three teachers, sampled answers, a hidden cache, all
through the phases of a run; then the iteration's train steps over and over.  One section at one
rank, one at tp 2 x pp 2.

    shares     of the wall time of ``train.run`` on the first rank of the last stage, each second counted once:
               planning (plan, packing, reading the trajectories), cache_read and head_swap (what is
               waited for), model (Megatron's forward and backward without the rest), divergence,
               collectives (blocking calls, wherever made), metrics (statistics of both
               distributions, reductions, the line that is written), optimizer, waiting (for slower
               ranks, at a barrier before the reduction of the metrics), other
    overhead   1 - bare step / train step; the bare one has its micro-batches packed, all hidden states and heads at
               hand and measures nothing: model, divergence and optimizer alone.  What a rank does
               while it would wait for another one costs nothing here
    price      a train step / a step of the same model, samples and optimizer with cross entropy

Overhead and price are medians over rounds in which the kinds of step were measured in turn, without
the clocks.

Nothing is asserted of times.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "launch" / "configs"
TEACHERS = ("rot", "rev", "spir")
TARGETS = {"overhead": 0.10}


class Clock:
    """Seconds by name; what is timed inside something else is taken from that."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.runs = False
        self._names: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self.runs:
            yield
            return
        self._lap()
        self._names.append(name)
        try:
            yield
        finally:
            self._lap()
            self._names.pop()

    def wrap(
        self, owner: Any, attribute: str, name: str, *, before: Callable[[], None] | None = None
    ) -> None:
        """Time every call of a function or method of ``owner``."""
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def timed(*arguments: Any, **options: Any) -> Any:
            if before is not None and self.runs:
                before()
            with self(name):
                return original(*arguments, **options)

        setattr(owner, attribute, timed)

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._names:
            self.seconds[self._names[-1]] += now - self._since
        self._since = now


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }


# -- in the ranks ----------------------------------------------------------------------------------
def wrap_collectives(clock: Clock) -> None:
    """Before Megatron is imported: it keeps some of these functions under names of its own."""
    import torch.distributed as dist

    names = (
        "all_reduce",
        "all_gather",
        "broadcast",
        "reduce_scatter_tensor",
        "batch_isend_irecv",
        "all_gather_single",
    )
    for name in (*names, "all_gather_into_tensor", "all_to_all_single", "recv", "send"):
        if hasattr(dist, name):
            clock.wrap(dist, name, "collectives")


def wrap_parts(clock: Clock) -> None:
    import torch.distributed as dist

    from mtopd.hidden_cache import CachedStates
    from mtopd.megatron.trainer import Trainer
    from mtopd.metrics import MetricsWriter
    from mtopd.objectives import mismatch, statistics, teacher_kl
    from mtopd.pipelines import train
    from mtopd.teacher_offload.head_slot import HeadSlot

    def wait() -> None:
        with clock("waiting"):
            dist.barrier()

    for function in ("plan", "pack", "teacher_runs"):
        clock.wrap(train, function, "planning")
    for method in ("__call__", "prefetch"):
        clock.wrap(CachedStates, method, "cache_read")
    for method in ("_load", "expect"):
        clock.wrap(HeadSlot, method, "head_swap")
    clock.wrap(teacher_kl, "fused_linear_divergence", "divergence")
    clock.wrap(teacher_kl, "output_logits", "metrics")
    clock.wrap(statistics.TokenStatistics, "keep", "metrics")
    clock.wrap(mismatch.Mismatch, "add", "metrics")
    clock.wrap(Trainer, "reduce", "metrics", before=wait)
    for method in ("metrics", "head_metrics"):
        clock.wrap(teacher_kl.TeacherKL, method, "metrics")
    clock.wrap(MetricsWriter, "write", "metrics")
    clock.wrap(Trainer, "forward_backward", "model")
    clock.wrap(Trainer, "optimizer_step", "optimizer")


class ReadyHeads:
    """Heads that are all at hand."""

    def __init__(self, heads: dict[int, Any]) -> None:
        self._heads = heads

    def lease(self, teacher_index: int) -> Any:
        return nullcontext(self._heads[teacher_index])


class ReadyStates:
    """Hidden states that are all at hand."""

    stall_s = 0.0

    def __init__(self, states: dict[Any, Any]) -> None:
        self._states = states

    def __call__(self, run: Any) -> Any:
        return self._states[run]


class BareSteps:
    """The train steps of the rolled-out iteration, to be taken again in a barer form."""

    def __init__(self, session: Any, iteration: Any) -> None:
        from mtopd.pipelines import micro_batches

        self.session, self.iteration = session, iteration
        self.plans = micro_batches.plan(session, iteration, iteration.samples)

    def bare(self) -> Callable[[], None]:
        """With the same objective, everything at hand and nothing measured."""
        from mtopd.objectives import TeacherFacts, TeacherKL
        from mtopd.pipelines import micro_batches, train
        from mtopd.step_sums import StepSums

        session, weights, steps = self.session, {}, []
        stores, trainer = session.teachers.stores, session.student.trainer
        if heads := session.teachers.heads:
            for index in range(len(stores)):
                with heads.lease(index) as head:
                    weights[index] = replace(head, weight_vE=head.weight_vE.clone())
                del head
            heads.drop()
            heads.take_counters()
        with train.open_hidden_states(session, self.iteration) as states:
            for plan in self.plans:
                runs = micro_batches.teacher_runs(session, self.iteration, plan)
                packed = micro_batches.pack(session, self.iteration, plan, runs)
                hidden = {run: states(run).clone() for batch in runs for run in batch}
                steps.append((packed, hidden))

        ready_heads: Any = ReadyHeads(weights)  # no step is finished: nothing else is asked of it

        def run() -> None:
            for packed, hidden in steps:
                objective = TeacherKL(
                    teachers=[TeacherFacts(store.name, None) for store in stores],
                    heads=ready_heads,
                    hidden_states=ReadyStates(hidden),
                    vocab_size=session.student.vocab_size,
                    tp_group=session.ranks.tp_group,
                    device=session.ranks.device,
                    runs=(),
                    seed=0,
                )
                trainer.forward_backward(packed, objective)
                trainer.optimizer_step(StepSums({}, 0, trainer.num_backwards))

        return run

    def supervised(self) -> Callable[[], None]:
        """With cross entropy to the sampled tokens."""
        import torch

        from mtopd.megatron.micro_batch import vocab_parallel_cross_entropy
        from mtopd.megatron.packing import pack_rows
        from mtopd.objectives import CrossEntropy

        session = self.session
        steps: list[list[Any]] = []
        ranks, trainer = session.ranks, session.student.trainer
        for plan in self.plans:
            steps.append([])
            for batch in plan.micro_batches[ranks.dp_rank]:
                fields = [self.iteration.tokens.tokens(s.sample_id) for s in batch.samples]
                labels = [
                    int(t)
                    for f in fields
                    for t, m in zip(f.response_ids, f.loss_mask, strict=True)
                    if m
                ]
                packed = pack_rows(
                    fields,
                    [s.token_weight for s in batch.samples],
                    shape=(session.config.train.micro_batch_size, plan.seq_length),
                    packed=False,
                    ranks=ranks,
                    payload=torch.tensor(labels, device=ranks.device),
                )
                steps[-1].append(packed)

        def run() -> None:
            for micro_batches in steps:
                objective = CrossEntropy(
                    vocab_size=session.student.vocab_size,
                    tp_rank=ranks.tp_rank,
                    cross_entropy=vocab_parallel_cross_entropy,
                )
                trainer.forward_backward(micro_batches, objective)
                trainer.optimizer_step(trainer.reduce(objective.finish))

        return run


def worker(path: Path) -> None:
    spec = json.loads(path.read_text())
    clock = Clock()
    wrap_collectives(clock)

    import torch.distributed as dist

    from mtopd.pipelines import rollout, teacher_pass, train
    from mtopd.pipelines.session import Session
    from mtopd.progress import quiet_libraries

    quiet_libraries()
    wrap_parts(clock)
    session = Session(Path(spec["run"]), 1)
    iteration, num_steps = session.iteration(0), session.config.train.train_steps_per_iteration
    rollout.run(session, iteration)
    teacher_pass.run(session, iteration)
    steps = BareSteps(session, iteration)

    def measured(run: Callable[[], None]) -> float:
        dist.barrier()
        started = time.perf_counter()
        run()
        dist.barrier()
        return (time.perf_counter() - started) / num_steps

    def distil() -> None:
        with clock("other"):
            train.run(session, iteration)

    kinds = {
        "train_step": distil,
        "bare_step": steps.bare(),
        "cross_entropy_step": steps.supervised(),
    }
    for run in kinds.values():
        measured(run)  # memory and code are there afterwards
    rounds = [{kind: measured(run) for kind, run in kinds.items()} for _ in range(spec["repeats"])]
    shares: list[dict[str, float]] = []
    for _ in range(spec["repeats"]):
        clock.seconds.clear()
        clock.runs = True
        measured(distil)
        clock.runs = False
        total = sum(clock.seconds.values())
        shares.append({name: seconds / total for name, seconds in clock.seconds.items()})
    names = sorted({name for part in shares for name in part})
    result = {
        "shares": {
            name: statistics.median(part.get(name, 0.0) for part in shares) for name in names
        },
        "overhead": spread([1 - times["bare_step"] / times["train_step"] for times in rounds]),
        "price": spread([times["train_step"] / times["cross_entropy_step"] for times in rounds]),
        **{f"{kind}_s": spread([times[kind] for times in rounds]) for kind in kinds},
    }
    if session.ranks.is_last_stage and session.ranks.tp_rank == 0:
        Path(spec["answer"]).write_text(json.dumps(result))
    session.close()


# -- the whole run ---------------------------------------------------------------------------------
def make_models(folder: Path) -> None:
    """The demo's model with random weights, four times."""
    from mtopd.convert.teacher import add_teacher

    for seed, name in enumerate(("student", *TEACHERS)):
        command = [
            sys.executable,
            "-m",
            "launch.demo_init",
            str(folder / name),
            str(CONFIGS / "demo_base.yaml"),
            str(seed),
        ]
        subprocess.run(command, check=True, cwd=CONFIGS.parent.parent, stdout=subprocess.DEVNULL)
        if name != "student":
            add_teacher(name, folder / name, folder / "stores" / name, slices=2)


def run_section(name: str, layout: dict[str, int], folder: Path, *, quick: bool) -> dict[str, Any]:
    """A layout in ranks of its own."""
    from mtopd.config import ConsolidateConfig
    from mtopd.config_file import load_config
    from mtopd.pipelines import prepare
    from mtopd.run_dir import RunDir

    overrides = [
        f"run_dir={folder / name}",
        f"student.model={folder / 'student'}",
        f"student.parallel={json.dumps(layout)}",
        *(
            f"teachers.{i}.store={folder / 'stores' / teacher}"
            for i, teacher in enumerate(TEACHERS)
        ),
        *(
            f"data.sources.{i}.{key}"
            for i in range(3)
            for key in ("train_size=2000", "eval_size=8")
        ),
        *(["rollout.prompts_per_iteration=96", "train.micro_batch_size=12"] if quick else []),
        *("evaluation.every=0", "evaluation.baselines={}", "evaluation.weight_average=[]"),
    ]
    config = load_config(CONFIGS / "demo.yaml", overrides, ConsolidateConfig)
    run = RunDir(config.run_dir)
    with run.lock():
        prepare.consolidate(config, run, lambda text: None)
    request, answer = folder / "spec.json", folder / f"{name}.json"
    request.write_text(
        json.dumps({"run": str(run.path), "repeats": 2 if quick else 41, "answer": str(answer)})
    )
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes=1"]
    command += [f"--nproc-per-node={config.student.parallel.world_size}", "--rdzv-backend=c10d"]
    command += [
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
        __file__,
        "--worker",
        str(request),
    ]
    subprocess.run(command, env=environment, check=True, timeout=1800)
    found = json.loads(answer.read_text())
    print(f"{name} {json.dumps(found, indent=1)}", flush=True)
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="small batches, few repeats: a smoke test of the code"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--only", action="append", help="run this section alone (tp1pp1, tp2pp2); repeatable"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    from mtopd.progress import quiet_libraries

    quiet_libraries()
    layouts = {"tp1pp1": {"tp": 1, "pp": 1}, "tp2pp2": {"tp": 2, "pp": 2}}
    with tempfile.TemporaryDirectory(prefix="trainer-") as name:
        make_models(Path(name))
        results = {
            section: run_section(section, layout, Path(name), quick=arguments.quick)
            for section, layout in layouts.items()
            if not arguments.only or section in arguments.only
        }
    if arguments.json:
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        machine = {"cpus": os.cpu_count(), "processor": found[1] if found else platform.machine()}
        when = datetime.now(UTC).isoformat(timespec="seconds")
        document = {
            "schema": 1,
            "when": when,
            "machine": machine,
            "quick": arguments.quick,
            "targets": TARGETS,
        }
        arguments.json.write_text(json.dumps({**document, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
