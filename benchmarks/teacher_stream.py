"""Streaming a teacher through the ranks: memory, reading speed, overlap with compute, stragglers.

    python benchmarks/teacher_stream.py --json benchmarks/results/teacher_stream_2core_cpu.json
    python benchmarks/teacher_stream.py --quick

Sections, each in ranks of its own; the teacher is a random Qwen3 in fp32, made here:

    memory    growth of a rank's peak resident memory over a whole teacher pass, above its value after imports and group
              start-up, beside what is allowed: two layers + embedding + host_budget + 256 MiB, and
              the activations (waiting ones by size, those inside a layer measured before).  Bytes
              read are counted by the stream and by the kernel (/proc/self/io rchar), summed over
              ranks.
    read      plain preads of the same ranges by as many threads, over reading ahead with block checksums; both cold
              (posix_fadvise DONTNEED), in turn.
    overlap   a pass against a store throttled to the speed of the compute, over the larger of compute alone (the same
              layers, weights resident) and reading alone (no compute).
    latency   the same store with a latency on each read (p99 100 ms, p99.9 500 ms): share of the wall that the compute
              waited, when host_budget holds four layers, and one.

Ratios are medians over interleaved repeats.  Only counts are asserted, never times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

MIB = 1 << 20
THREADS = 4
REQUEST = 8 * MIB


# -- making a teacher ------------------------------------------------------------------------------


def make_teacher(
    folder: Path, *, layers: int, hidden: int, intermediate: int, vocab: int, slices: int
) -> Path:
    """A random fp32 Qwen3 as HF checkpoint (one file for each layer, so that memory stays small)
    and as store.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from mtopd.char_tokenizer import build_char_tokenizer
    from mtopd.convert.teacher import add_teacher
    from mtopd.tokenizer import load_tokenizer

    source, target = folder / "hf", folder / "store"
    build_char_tokenizer({"x": ["the quick brown fox"]}, source)
    tokenizer = load_tokenizer(source)
    head_dim = 128
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head_dim,
        num_key_value_heads=4,
        head_dim=head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="float32",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.save_pretrained(source)
    draw = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}  # by tensor

    def save_shard(tensors: dict[str, torch.Tensor], name: str) -> None:
        save_file(tensors, source / name)
        files.update(dict.fromkeys(tensors, name))

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw) * columns**-0.5

    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (4 * head_dim, hidden),
        "v_proj": (4 * head_dim, hidden),
    }
    shapes["o_proj"] = (hidden, hidden)
    for i in range(layers):
        tensors = {f"model.layers.{i}.self_attn.{n}.weight": matrix(*s) for n, s in shapes.items()}
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.{i}.mlp.{name}.weight"] = matrix(intermediate, hidden)
        tensors[f"model.layers.{i}.mlp.down_proj.weight"] = matrix(hidden, intermediate)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(hidden)
        for name in ("q_norm", "k_norm"):
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = torch.ones(head_dim)
        save_shard(tensors, f"model-{i:05d}.safetensors")
    ends = {
        "model.embed_tokens.weight": matrix(vocab, hidden),
        "lm_head.weight": matrix(vocab, hidden),
    }
    save_shard({**ends, "model.norm.weight": torch.ones(hidden)}, "model-ends.safetensors")
    index = {"metadata": {}, "weight_map": files}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    add_teacher("big", source, target, slices=slices)
    return target


# -- inside a rank ---------------------------------------------------------------------------------


def status_bytes(field: str) -> int:
    """A line of /proc/self/status: VmRSS, VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    return status_bytes("VmRSS")


def read_by_kernel() -> int:
    # rchar: read calls, page cache included.
    return int(Path("/proc/self/io").read_text().split()[1])


@dataclasses.dataclass
class Bench:
    """One rank with a teacher's store, its mesh and empty layers."""

    spec: dict[str, Any]

    def __post_init__(self) -> None:
        import torch

        from mtopd.config import ParallelConfig
        from mtopd.megatron import parallel
        from mtopd.pipelines.teachers import build_teacher_layers
        from mtopd.teacher_offload.store import open_store

        self.ranks = parallel.initialize(ParallelConfig(), seed=0)
        torch.set_num_threads(self.spec.get("compute_threads", 1))
        self.mesh = parallel.build_teacher_mesh(self.spec["tp"])
        self.store = open_store(self.spec["store"])
        self.layers = build_teacher_layers(self.store, self.mesh, self.ranks.device)

    def stream(self, host_budget: int, store: Any = None) -> Any:
        from mtopd.teacher_offload.layer_stream import TeacherStream

        return TeacherStream(
            [store or self.store],
            [self.mesh],
            self.ranks.device,
            host_budget=host_budget,
            reader_threads=THREADS,
        )

    def plan(self, tokens: int, length: int, batch_tokens: int) -> tuple[dict[int, Any], list[Any]]:
        """Samples of one length, random ids, dealt to this replica in one wave."""
        from mtopd.planning import plan_pass
        from mtopd.teacher_offload.teacher_pass import TeacherSample

        lengths = [length] * (tokens // length)
        plans = plan_pass(
            [lengths],
            self.mesh.num_replicas,
            batch_tokens=batch_tokens,
            token_bytes=4 * self.store.hidden_size,
            activation_budget=1 << 40,
        )
        draw = np.random.default_rng(0)
        waves = plans[self.mesh.replica]
        mine = [i for wave in waves for batch in wave.batches for i in batch]
        rows = np.arange(length)
        return {i: TeacherSample(draw.integers(0, 16, length), rows) for i in mine}, waves

    def run_pass(self, stream: Any, samples: dict[int, Any], waves: list[Any]) -> Any:
        from mtopd.teacher_offload.teacher_pass import run_teacher_pass

        return run_teacher_pass(
            stream,
            0,
            self.layers,
            self.mesh.tp_group,
            samples,
            waves,
            keep=lambda i, rows_TE: None,
        )


def memory(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    bench = Bench(spec)
    stream = bench.stream(spec["host_budget"])
    embedding, *parts, _ = (part.device_bytes for part in stream.parts[0])
    samples, waves = bench.plan(spec["tokens"], spec["length"], spec["batch_tokens"])
    batches = [len(batch) * spec["length"] for wave in waves for batch in wave.batches]
    inside = _activations_inside_a_layer(bench, stream, max(batches))
    stream.close()
    stream = bench.stream(spec["host_budget"])
    before, read_before = reset_peak(), read_by_kernel()
    stream.expect([0])
    started = time.perf_counter()
    result = bench.run_pass(stream, samples, waves)
    wall = time.perf_counter() - started
    growth = status_bytes("VmHWM") - before
    waiting = sum(batches) * 4 * bench.store.hidden_size
    allowed = 2 * max(parts) + embedding + spec["host_budget"] + 256 * MIB
    reads = stream.take_counters()
    counted = torch.tensor([reads.bytes_read, read_by_kernel() - read_before], dtype=torch.float64)
    dist.all_reduce(counted)
    worst = torch.tensor([growth - waiting - inside], dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    needed = bench.store.pass_bytes()
    assert int(counted[0]) == needed, ("every needed byte once", int(counted[0]), needed)
    extra = int(counted[1]) - needed
    assert 0 <= extra <= spec["world_size"] * 4 * MIB, ("the kernel saw other reads", extra)
    stream.close()
    return {
        "tokens": spec["tokens"],
        "wall_s": wall,
        "stall_s": sum(w.stall_s for w in result.waves),
        "growth_mib": growth / MIB,
        "activations_mib": (waiting + inside) / MIB,
        "growth_less_activations_mib": float(worst[0]) / MIB,
        "allowed_mib": allowed / MIB,
        "within": bool(worst[0] <= allowed),
        "stored_mib": needed / MIB,
        "bytes_read": int(counted[0]),
        "bytes_read_by_kernel": int(counted[1]),
        "waves": len(result.waves),
    }


def _activations_inside_a_layer(bench: Bench, stream: Any, tokens: int) -> int:
    """Peak memory that one forward through a layer takes beyond its input and weights, for the
    largest batch.
    """
    import torch

    weights = _resident_layer(bench, stream, 0)
    bench.layers.bind(0, weights)
    length = bench.spec["length"]
    hidden_SBE = torch.zeros(length, max(tokens // length, 1), bench.store.hidden_size)
    with torch.no_grad():
        for _ in range(2):  # the first also takes what libraries keep
            before = reset_peak()
            bench.layers.forward_layer(hidden_SBE)
        inside = status_bytes("VmHWM") - before
    bench.layers.release()
    return inside


def _resident_layer(bench: Bench, stream: Any, layer: int) -> dict[str, Any]:
    """Weights of a layer in memory of their own."""
    stream.expect([0])
    with stream.visit(0) as weights:
        weights.embedding()
        found = {}
        for index, views in enumerate(weights.layers()):
            if index == layer:
                found = {name: tensor.clone() for name, tensor in views.items()}
        weights.final_norm()
    stream.take_counters()
    return found


def drop_cache(paths: Sequence[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(spec: dict[str, Any]) -> dict[str, Any]:
    bench = Bench(spec)
    stream = bench.stream(spec["host_budget"])
    ranges = [
        (r.path, r.borders[0], r.borders[-1]) for part in stream.parts[0] for r in part.ranges
    ]
    requests = [
        (Path(spec["store"]) / path, at, min(at + REQUEST, stop))
        for path, start, stop in ranges
        for at in range(start, stop, REQUEST)
    ]
    paths = sorted({path for path, _, _ in requests})
    local = threading.local()

    def plain_read(path: Path, start: int, stop: int) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(REQUEST))
        descriptor = os.open(path, os.O_RDONLY)
        done = 0
        while done < stop - start:
            done += os.preadv(descriptor, [local.buffer[done : stop - start]], start + done)
        os.close(descriptor)
        return done

    def plain() -> int:
        return sum(pool.map(lambda request: plain_read(*request), requests))

    def ours() -> int:
        stream.expect([0])
        for _ in stream.parts[0]:
            stream.reads.take()
            stream.reads.release()
        return stream.take_counters().bytes_read

    with ThreadPoolExecutor(THREADS) as pool:
        times: dict[str, list[float]] = {"plain": [], "ours": []}
        providers: list[tuple[str, Callable[[], int]]] = [("plain", plain), ("ours", ours)]
        for repeat in range(-1, spec["repeats"]):
            for name, call in providers if repeat % 2 else providers[::-1]:
                drop_cache(paths)
                started = time.perf_counter()
                count = call()
                seconds = time.perf_counter() - started
                assert count == bench.store.pass_bytes(), (name, count)
                if repeat >= 0:
                    times[name].append(seconds)
    stream.close()
    ratios = [p / o for p, o in zip(times["plain"], times["ours"], strict=True)]
    return {
        "speed_over_plain_pread": spread(ratios),
        "gb_per_s": {
            n: bench.store.pass_bytes() / 1e9 / statistics.median(t) for n, t in times.items()
        },
        "stored_mib": bench.store.pass_bytes() / MIB,
    }


class Throttled:
    """A storage with a bandwidth and a latency on each read; sleeps, so it takes no core."""

    def __init__(self, storage: Any, bandwidth: float, latency: Callable[[], float]) -> None:
        self._storage, self._bandwidth, self._latency = storage, bandwidth, latency
        self._lock, self._until = threading.Lock(), 0.0
        self.request_bytes, self.location = storage.request_bytes, storage.location

    def read_into(self, path: str, start: int, out: np.ndarray) -> None:
        with self._lock:
            self._until = max(self._until, time.perf_counter()) + len(out) / self._bandwidth
            ready = self._until + self._latency()
        self._storage.read_into(path, start, out)
        time.sleep(max(0.0, ready - time.perf_counter()))


def throttled(store: Any, bandwidth: float, latency: Callable[[], float]) -> Any:
    storage = Throttled(next(iter(store.files.values())).storage, bandwidth, latency)
    files = {name: dataclasses.replace(file, storage=storage) for name, file in store.files.items()}
    return dataclasses.replace(store, files=files)


def stragglers(seed: int) -> Callable[[], float]:
    """Seconds of a read: 2 ms, 1 in 100 takes 100 ms, 1 in 1000 takes 500 ms."""
    draw = random.Random(seed)

    def latency() -> float:
        x = draw.random()
        return 0.5 if x < 0.001 else 0.1 if x < 0.01 else 0.002

    return latency


def overlap(spec: dict[str, Any]) -> dict[str, Any]:
    """The overlap and latency sections: one compute, several stores."""
    import torch

    bench = Bench(spec)
    free = bench.stream(1 << 40)
    share = max(part.host_bytes for part in free.parts[0])
    samples, waves = bench.plan(spec["tokens"], spec["length"], spec["batch_tokens"])
    weights = _resident_layer(bench, free, 0)
    free.close()
    num_layers, hidden = bench.store.num_layers, bench.store.hidden_size
    shapes = [(spec["length"], len(batch), hidden) for wave in waves for batch in wave.batches]

    def compute_alone() -> float:
        waiting = [torch.randn(shape) for shape in shapes]
        started = time.perf_counter()
        with torch.no_grad():
            for layer in range(num_layers):
                bench.layers.bind(layer, weights)
                waiting = [bench.layers.forward_layer(hidden_SBE) for hidden_SBE in waiting]
        return time.perf_counter() - started

    def timed(
        call: Callable[[Any], Any],
        layers: int,
        speed: float,
        latency: Callable[[], float],
        *,
        warm: bool = False,
    ) -> tuple[float, Any]:
        """Wall seconds and result of ``call`` on a new stream that may hold ``layers``, from
        ``speed`` bytes/s.

        ``warm``: what fits has been read before the clock starts, as in a job behind the teacher
        before.
        """
        stream = bench.stream(layers * share, throttled(bench.store, speed, latency))
        started = time.perf_counter()
        stream.expect([0])
        if warm:
            for ahead in stream.reads._shares:
                for request in ahead.reads:
                    request.result()
            started = time.perf_counter()
        result = call(stream)
        wall = time.perf_counter() - started
        assert stream.take_counters().bytes_read == bench.store.pass_bytes()
        stream.close()
        return wall, result

    def drain(stream: Any) -> None:
        for _ in stream.parts[0]:
            stream.reads.take()
            stream.reads.release()

    def whole_pass(stream: Any) -> Any:
        return bench.run_pass(stream, samples, waves)

    ratios, alone, reading, stalls = [], [], [], {4: [], 1: []}  # type: ignore[var-annotated]
    speed = bench.store.pass_bytes() / min(compute_alone(), compute_alone())
    for repeat in range(spec["repeats"]):
        compute = compute_alone()
        read_s, _ = timed(drain, 4, speed, lambda: 0.0)
        wall, _ = timed(whole_pass, 4, speed, lambda: 0.0)
        ratios.append(wall / max(compute, read_s))
        alone.append(compute)
        reading.append(read_s)
        for layers in (4, 1) if repeat % 2 else (1, 4):
            # Twice the speed: the stragglers are what is measured here, not the bandwidth.
            wall, result = timed(whole_pass, layers, 2 * speed, stragglers(repeat), warm=True)
            stalls[layers].append(result.waves[0].stall_s / wall)
    return {
        "wall_over_max_of_compute_and_reading": spread(ratios),
        "compute_alone_s": statistics.median(alone),
        "reading_alone_s": statistics.median(reading),
        "stall_share_with_stragglers": {
            f"{n}_layers_of_prefetch": spread(found) for n, found in stalls.items()
        },
        "reads": sum(-(-r.local_bytes // REQUEST) for part in free.parts[0] for r in part.ranges),
        "stored_mib": bench.store.pass_bytes() / MIB,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "repeats": len(ordered),
    }


# -- the whole run ---------------------------------------------------------------------------------


def run_section(section: str, spec: dict[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    """A section in ranks of its own; returns rank 0's result."""
    request, answer = folder / "spec.json", folder / "answer.json"
    request.write_text(json.dumps({**spec, "section": section, "answer": str(answer)}))
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes=1"]
    command += [
        f"--nproc-per-node={spec['world_size']}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
    ]
    command += ["--local-addr=127.0.0.1", __file__, "--worker", str(request)]
    subprocess.run(command, env=environment, check=True, timeout=timeout)
    found = json.loads(answer.read_text())
    print(f"{section} {json.dumps(found, indent=1)}", flush=True)
    return dict(found)


def worker(path: Path) -> None:
    import torch.distributed as dist

    from mtopd.progress import quiet_libraries

    quiet_libraries()
    spec = json.loads(path.read_text())
    result = {"memory": memory, "read": read, "overlap": overlap}[spec["section"]](spec)
    if dist.get_rank() == 0:
        Path(spec["answer"]).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="small teacher, few repeats: a smoke test of the code"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the teachers are made (4 to 8 GiB); default: a temporary one",
    )
    parser.add_argument(
        "--only", action="append", help="run this section alone (memory_1_process, ...); repeatable"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="teacher-stream-") as name:
        folder = Path(name)
        quick = arguments.quick
        full_size = {"layers": 17, "hidden": 2048, "intermediate": 6144, "vocab": 8192}
        medium = {"layers": 16, "hidden": 1024, "intermediate": 3072, "vocab": 1024}
        tiny = {"layers": 4, "hidden": 512, "intermediate": 1024, "vocab": 1024}
        big, small = (tiny, tiny) if quick else (full_size, medium)
        store = make_teacher(folder / "big", slices=2, **big)
        small_store = make_teacher(folder / "small", slices=1, **small)
        one = {"store": str(store), "world_size": 1, "tp": 1, "length": 256, "batch_tokens": 1024}
        budget = 24 * MIB if quick else 768 * MIB
        sections = {
            "memory_1_process": (
                "memory",
                {**one, "tokens": 1024 if quick else 20480, "compute_threads": 2},
            ),
            "memory_4_processes": (
                "memory",
                {**one, "world_size": 4, "tp": 2, "tokens": 2048 if quick else 4096},
            ),
            "read": ("read", {**one, "repeats": 2 if quick else 9}),
            "overlap": (
                "overlap",
                {
                    **one,
                    "store": str(small_store),
                    "tokens": 512 if quick else 1280,
                    "repeats": 2 if quick else 9,
                },
            ),
        }
        results = {
            name: run_section(section, {**spec, "host_budget": budget}, folder, timeout=3600)
            for name, (section, spec) in sections.items()
            if not arguments.only or name in arguments.only
        }
    if arguments.json:
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        machine = {"cpus": os.cpu_count(), "processor": found[1] if found else platform.machine()}
        when = datetime.now(UTC).isoformat(timespec="seconds")
        document = {"schema": 1, "when": when, "machine": machine, "quick": quick, **results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
