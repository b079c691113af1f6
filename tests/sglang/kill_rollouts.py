"""SIGKILL in the middle of rollouts and updates of weights on two real SGLang servers:
`python -m tests.sglang.kill_rollouts --kills 40`.

A consolidation of two ranks is killed at chosen requests to its servers, which pass a proxy each, and
now and then at any instant: its client, a server in the middle of responses or of an update, both at
once, either rank in an update of weights.  A server that was killed is started again, so is the run,
by the same command.  However often:

- nothing that a log or a sealed shard holds is asked for again, and what is asked for goes on behind
  tokens of the undisturbed run;
- logs hold each token once, and it is that of the undisturbed run;
- every sample is in the trajectories once, with the undisturbed run's tokens;
- the exported weights are those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from mtopd.rollout.sglang_serving import write_serving_folder
from mtopd.run_dir import RunDir, is_sealed
from mtopd.tokenizer import load_tokenizer, vocab_size
from tests.integration.test_kill_and_resume import make_workplace
from tests.sglang.kill_samples import (
    MAX_RESPONSE,
    NUM_ITERATIONS,
    SAMPLES,
    Kept,
    Samples,
    check_same_samples,
    seeds_of,
    tokens_kept,
)
from tests.sglang.kill_watch import SERVER, TARGETS, Watch, WatchedProxy
from tests.support import kills as common
from tests.support.forked_ranks import Ranks, forget_imports
from tests.support.sglang_servers import RunningServer, Zygote

RANKS = 2
OVERRIDES = (
    f"train.num_iterations={NUM_ITERATIONS}",
    f"rollout.prompts_per_iteration={SAMPLES}",
    "rollout.engine=sglang",
    "rollout.open_per_server=8",
    "rollout.patience_s=600",
    "data.context_length=96",
    f"data.max_response={MAX_RESPONSE}",
    "data.sources.0.eval_path=null",
    "student.parallel={tp: 2}",
    "student.bucket_bytes=65536",
    "train.train_steps_per_iteration=2",
    "train.micro_batch_size=8",
    "checkpoint.every=1",
)


# -- the driver ------------------------------------------------------------------------------------
class Driver:
    def __init__(self, folder: Path, zygote: Zygote, servers: Sequence[RunningServer]) -> None:
        self.folder, self.zygote, self.servers = folder, zygote, servers
        make_workplace(folder)
        self.watch = Watch(servers)
        self.proxies = [
            WatchedProxy(server.url, partial(self.watch.passes, number))
            for number, server in enumerate(servers)
        ]
        self.num_starts = 0
        self.num_kept = 0  # tokens that were there when a start was killed

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.close()

    def start(self, run: RunDir) -> Ranks:
        self.num_starts += 1
        self.watch.begin_start()
        urls = json.dumps([proxy.url for proxy in self.proxies])
        arguments = [f"run_dir={run.path}", f"rollout.servers={urls}", *OVERRIDES]
        log = self.folder / f"start-{self.num_starts:03d}.log"
        config = str(self.folder / "config.yaml")
        ranks = self.watch.ranks = Ranks(RANKS, log, "consolidate", config, *arguments)
        return ranks

    def undisturbed(self) -> tuple[RunDir, Samples]:
        run = RunDir(self.folder / "undisturbed")
        run.path.parent.mkdir(exist_ok=True)
        kept = Kept(run)
        self.watch.on_update = kept.keep
        ranks = self.start(run)
        assert ranks.wait(1200) == 0, ranks.said()
        samples = kept.samples()
        self.seeds = seeds_of(run, samples)
        self.watch.known = {seed: samples[name] for seed, name in self.seeds.items()}
        lengths = {len(sample.response_ids) for sample in samples.values()}
        assert len(lengths) > 20, "responses of all lengths are needed"
        return run, samples

    def victim(self, number: int) -> Kept:
        kept = Kept(RunDir(self.folder / f"victim-{number}"))
        self.watch.on_update, self.watch.held = kept.keep, {}
        return kept

    def after_death(self, run: RunDir, wanted: Samples) -> None:
        """The start is dead: look at what is left of it."""
        held = tokens_kept(run, wanted)
        before = self.watch.held
        found = {seed: held.get(name, 0) for seed, name in self.seeds.items()}
        for seed, (number, sample_id) in self.seeds.items():
            if run.iteration(number).exists() and not is_sealed(run.trajectories(number)):
                assert found[seed] >= before.get(seed, 0), (
                    f"iteration {number} had {before[seed]} tokens of sample {sample_id}, and has "
                    f"{found[seed]}"
                )
        self.watch.held = {seed: max(n, before.get(seed, 0)) for seed, n in found.items()}
        self.num_kept += sum(held.values())


def run(
    kills: int, folder: Path, seed: int, zygote: Zygote, servers: Sequence[RunningServer]
) -> str:
    """Kill ``kills`` times; one line of results.  Raises AssertionError on any violation."""
    draw, began = random.Random(seed), time.monotonic()
    driver = Driver(folder, zygote, servers)
    try:
        whole, wanted = driver.undisturbed()
        wall_s = time.monotonic() - began
        hits, compared = kill_often(kills, driver, whole, wanted, wall_s, draw)
    finally:
        driver.close()
        forget_imports()
        for server in servers:
            server.wait_ready()
    assert driver.watch.num_continued > kills, "most kills have to be amid responses"
    told = "; ".join(f"{count} {name}" for name, count in hits.most_common())
    return (
        f"rollouts on two servers: {hits.total()} kills in {driver.num_starts} starts ({told}); "
        f"{driver.num_kept} tokens were kept, none was asked for again, {driver.watch.num_continued} "
        f"requests went on behind some; {compared} runs finished, all with the samples and weights of "
        f"an undisturbed one; {time.monotonic() - began:.0f} s"
    )


def kill_often(
    kills: int,
    driver: Driver,
    whole: RunDir,
    wanted: Samples,
    wall_s: float,
    draw: random.Random,
) -> tuple[Counter[str], int]:
    """How often who was killed when, and the number of runs that finished."""
    hits: Counter[str] = Counter()
    watch, compared = driver.watch, 0
    kept = driver.victim(0)
    ranks = driver.start(kept.run)
    while True:
        at_s = None
        if hits.total() == kills:
            watch.aim(None, 0)
        else:
            target = TARGETS[hits.total() % len(TARGETS)]
            watch.aim(target, draw.randint(1, target.within))
            if target.path is None:
                at_s = time.monotonic() + draw.random() * wall_s
        code = wait_for_hit(watch, ranks, at_s)
        assert not watch.wrong, watch.wrong[:5]
        if code is None:
            assert watch.hit is not None
            target, server = watch.hit
            hits[target.name] += 1
            print(f"kill {hits.total()}: {target.name}", flush=True)
            if server is not None:
                driver.zygote.restart(server)
            if target.doomed != (SERVER,):
                driver.after_death(kept.run, wanted)
                ranks = driver.start(kept.run)
            continue
        assert code == 0, ranks.said()
        check_same_samples(kept.samples(), wanted)
        common.check_same_weights(kept.run, whole, NUM_ITERATIONS)
        compared += 1
        if hits.total() == kills:
            return hits, compared
        kept = driver.victim(compared)
        ranks = driver.start(kept.run)


def wait_for_hit(watch: Watch, ranks: Ranks, at_s: float | None) -> int | None:
    """Until somebody was killed, and is dead (None), or the run has ended by itself (its exit code)."""
    deadline = time.monotonic() + 1200
    while watch.hit is None:
        if (code := ranks.poll()) is not None and watch.hit is None:
            return code
        if at_s is not None and time.monotonic() > at_s:
            watch.strike()
        assert time.monotonic() < deadline, ranks.said()
        time.sleep(0.01)
    if watch.hit[0].doomed != (SERVER,) and ranks.wait(120) == 0:
        return 0  # it was through already
    return None


@contextlib.contextmanager
def two_servers(folder: Path) -> Iterator[tuple[Zygote, list[RunningServer]]]:
    """Of the workplace's student."""
    make_workplace(folder)
    serving, student = folder / "serving", folder / "student"
    write_serving_folder(serving, student, vocab_size(load_tokenizer(student)), torch.float32)
    zygote = Zygote(folder)
    try:
        servers = [zygote.start(serving) for _ in range(2)]
        for server in servers:
            server.wait_ready()
        yield zygote, servers
    finally:
        zygote.close()


def alone(kills: int, folder: Path, seed: int) -> str:
    for name in ("servers", "runs"):
        (folder / name).mkdir()
    with two_servers(folder / "servers") as (zygote, servers):
        return run(kills, folder / "runs", seed, zygote, servers)


if __name__ == "__main__":
    common.main(__doc__, alone, kills=40)
