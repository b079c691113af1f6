"""Weights leaving the trainer: memory of an update and of an export, speed into one receiver.

    python benchmarks/weights.py --json benchmarks/results/weights_2core_cpu.json
    python benchmarks/weights.py --quick

Sections, each in ranks of its own; the models are Qwen3 shapes with constant weights, made in place, without
optimizer: what is measured is beside the trainer's own weights.  Updates are the product's, to a receiver that answers
what an SGLang server does, joins the broadcast, and knows nothing of models.

    memory      growth of a rank's peak resident memory, the largest over ranks: while the receiver is updated (rank 0
                sends a bucket and gathers the next), while every rank takes every bucket (an update of embedded
                engines), and while all ranks write an export; models of 0.5, 1 and 2 GiB in bfloat16 and float32 at
                tp1, tp2, tp2 x pp2; medians of three.  Allowed, to each of the three: twice the larger of bucket and
                largest tensor + 64 MiB; and the medians of the three sizes within 10 % of one another.
    throughput  bytes/s of an update, from the first bucket to the answer to the last one, over a bare broadcast of as
                many bytes in as large buckets to the same receiver, in turn; tp1, tp2 x pp2.

Ratios are medians over interleaved repeats.  Nothing is asserted of times.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MIB = 1 << 20
BUCKET = 64 * MIB
_REPEATS = 3  # of a measurement of memory: which message is late by a moment is chance
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "tp2pp2": (2, 2)}
TARGETS = {"tp1": 0.7, "tp2pp2": 0.4}
# 12 M parameters a layer, 16.8 M in the tied embedding
SHAPE = {"hidden": 1024, "intermediate": 3072, "heads": 16, "vocab": 16384}
SMALL = {"hidden": 256, "intermediate": 768, "heads": 4, "vocab": 4096}
LAYERS = {"float32": (10, 20, 40), "bfloat16": (20, 40, 80)}  # 0.5, 1, 2 GiB


# -- in the ranks ----------------------------------------------------------------------------------
def status_bytes(field: str) -> int:
    """A line of /proc/self/status: VmRSS, VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    return status_bytes("VmRSS")


def build(spec: dict[str, Any]) -> SimpleNamespace:
    """What a Student has of weights, and nothing of what trains them."""
    import torch

    from mtopd.config import ParallelConfig
    from mtopd.convert.bridge import Bridge
    from mtopd.convert.weight_stream import WeightStream
    from mtopd.dtypes import torch_dtype
    from mtopd.hf_checkpoint import load_hf_config
    from mtopd.megatron import parallel
    from mtopd.megatron.model import build_chunks
    from mtopd.megatron.options import config_overrides
    from mtopd.planning.capacity import padded_vocab_size

    layout = ParallelConfig(tp=spec["tp"], pp=spec["pp"])
    ranks = parallel.initialize(layout, seed=0)
    folder = Path(spec["folder"])
    hf_config = load_hf_config(folder)
    dtype = torch_dtype(spec["dtype"])
    padded = padded_vocab_size(hf_config.vocab_size, ranks.tp_size)
    bridge = Bridge(
        hf_config,
        dtype=dtype,
        padded_vocab_size=padded,
        overrides={**config_overrides(ranks.device), "perform_initialization": False},
    )
    chunks = build_chunks(bridge.transformer_config, bridge.facts, ranks, padded_vocab=padded)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(0.5)  # memory that nobody wrote to is not resident
    return SimpleNamespace(
        ranks=ranks,
        config=SimpleNamespace(model=folder, mtp="drop", bucket_bytes=BUCKET),
        hf_config=hf_config,
        facts=bridge.facts,
        dtype=dtype,
        stream=WeightStream(bridge, chunks, ranks),
        trainer=SimpleNamespace(finish_param_sync=lambda: None),
        held=sum(p.nbytes for chunk in chunks for p in chunk.parameters()),
    )


def worst(value: int) -> int:
    """The largest of all ranks'."""
    import torch
    import torch.distributed as dist

    found = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found[0])


def engine_for(spec: dict[str, Any], student: SimpleNamespace) -> Any:
    """The product's engine, with the receiver for its server and nobody who scores tokens."""
    from mtopd.megatron.agreement import apart
    from mtopd.rollout.ending import Ending
    from mtopd.rollout.sglang import SGLangEngine, SGLangOptions
    from mtopd.tokenizer import load_tokenizer

    folder = Path(spec["folder"])
    return SGLangEngine(
        SGLangOptions([url_of_receiver(folder)], context_length=64),
        run_name=spec["folder"],
        vocab_size=student.hf_config.vocab_size,
        dtype=student.dtype,
        ending=Ending(load_tokenizer(folder), [0]),
        is_client=student.ranks.rank == 0,
        apart=functools.partial(apart, student.ranks),
        score=lambda sequences: None,
    )


def url_of_receiver(folder: Path) -> str:
    while not (folder / "port").exists():
        time.sleep(0.1)
    return f"http://127.0.0.1:{(folder / 'port').read_text()}"


def memory(spec: dict[str, Any]) -> dict[str, Any]:
    from mtopd.files import write_json
    from mtopd.pipelines.export import export
    from mtopd.run_dir import RunDir

    student = build(spec)
    engine = engine_for(spec, student)
    tensors = student.stream.tensors.values()
    size, largest = sum(t.nbytes for t in tensors), max(t.nbytes for t in tensors)
    allowed = 2 * max(BUCKET, largest) + 64 * MIB
    found: dict[str, list[int]] = {}

    def to_server(_: int) -> None:
        engine.update_weights(student.stream.buckets(BUCKET, engine.taker), "run/1/0")
        assert student.ranks.rank or engine.update.bytes_sent == size

    def to_all(_: int) -> None:
        taken = 0
        for bucket in student.stream.buckets(BUCKET):
            taken += sum(tensor.nbytes for tensor in bucket.values())
            del bucket
        assert taken == size, "every rank takes everything"

    run = RunDir(Path(spec["folder"]) / "run", 1)
    if student.ranks.rank == 0:
        run.path.mkdir()
        write_json(run.path / "generation.json", {"generation": 1})

    def to_files(number: int) -> None:
        export(student, run, run.path / f"export-{number}", shard_bytes=256 * MIB)

    # What a first connection leaves for good is no update's: threads, a client's library.
    small = min(tensors, key=lambda tensor: tensor.nbytes).name
    engine.update_weights(iter([student.stream.gather([small], to=0)]), "run/1/0")
    for name, work in {"update": to_server, "stream": to_all, "export": to_files}.items():
        found[name] = []
        for number in range(_REPEATS):
            worst(0)
            before = reset_peak()
            work(number)
            found[name].append(worst(status_bytes("VmHWM") - before))
    engine.close()
    return {
        "model_mib": size / MIB,
        "rank_weights_mib": worst(student.held) / MIB,
        **{f"{name}_mib": statistics.median(values) / MIB for name, values in found.items()},
        "largest_mib": max(map(max, found.values())) / MIB,
        "allowed_mib": allowed / MIB,
        "within": max(map(max, found.values())) <= allowed,
    }


def throughput(spec: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    from mtopd.hf_weights import cut

    student = build(spec)
    engine = engine_for(spec, student)
    is_first = student.ranks.rank == 0
    tensors = student.stream.tensors.values()
    sizes = [
        sum(tensor.nbytes for tensor in part)
        for part in cut(tensors, BUCKET, lambda tensor: tensor.nbytes)
    ]
    sender = BareSender(Path(spec["folder"]), sizes) if is_first else None
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    steps: list[dict[str, float]] = []

    def bare() -> float:
        return sender.send() if sender else 0.0

    def ours() -> float:
        engine.update_weights(student.stream.buckets(BUCKET, engine.taker), "run/1/0")
        if not is_first:
            return 0.0
        steps.append(engine.update.seconds)
        return float(engine.update.seconds["buckets"])

    kinds = {"bare": bare, "ours": ours}
    for repeat in range(-1, spec["repeats"]):
        for name in [*kinds] if repeat % 2 else [*kinds][::-1]:
            dist.barrier()
            took = kinds[name]()
            if repeat >= 0:
                seconds[name].append(took)
    engine.close()
    if sender is None:
        return {}
    ratios = sorted(b / o for b, o in zip(seconds["bare"], seconds["ours"], strict=True))
    return {
        "speed_over_bare_broadcast": {
            "median": statistics.median(ratios),
            "min": ratios[0],
            "max": ratios[-1],
            "repeats": len(ratios),
        },
        "gb_per_s": {n: sum(sizes) / 1e9 / statistics.median(s) for n, s in seconds.items()},
        "median_s": {name: statistics.median(s[name] for s in steps) for name in steps[0]},
        "buckets": len(sizes),
        "model_mib": sum(sizes) / MIB,
    }


class BareSender:
    """Broadcasts of blank bytes to the receiver over the product's group, with nothing around."""

    def __init__(self, folder: Path, sizes: list[int]) -> None:
        import torch

        from mtopd.rollout.sglang_broadcast import BroadcastGroup

        self._url, self._sizes = url_of_receiver(folder), sizes
        self._blank = torch.ones(max(sizes), dtype=torch.uint8)
        self._group = BroadcastGroup("bare", 1, "127.0.0.1", self._blank.device)
        joining = self._post(
            "/init_weights_update_group",
            {
                "master_address": "127.0.0.1",
                "master_port": self._group.port,
                "rank_offset": 1,
                "world_size": 2,
                "group_name": "bare",
            },
        )
        self._group.join()
        joining.join()

    def _post(self, path: str, body: dict[str, Any]) -> threading.Thread:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}
        )
        thread = threading.Thread(target=lambda: urllib.request.urlopen(request).read())
        thread.start()
        return thread

    def send(self) -> float:
        started = time.perf_counter()
        answered = self._post("/bare", {"group_name": "bare", "sizes": self._sizes})
        for size in self._sizes:
            self._group.broadcast(self._blank[:size])
        answered.join()
        return time.perf_counter() - started


# -- beside the ranks ------------------------------------------------------------------------------
def receiver(path: Path) -> None:
    """A process that answers what the client of an SGLang server asks in an update, and takes what
    is broadcast.
    """
    import torch
    import torch.distributed as dist
    from aiohttp import web

    folder = Path(json.loads(path.read_text())["folder"])
    groups: dict[str, Any] = {}
    buffer = torch.ones(4 * BUCKET, dtype=torch.uint8)
    held = {"weight_version": "", "preferred_sampling_params": None}

    def join(body: dict[str, Any]) -> None:
        name = body["group_name"]
        store: Any = dist.TCPStore(body["master_address"], body["master_port"], is_master=False)
        for prefix in (name, f"{name}/", "cpu/"):
            store = dist.PrefixStore(prefix, store)
        groups[name] = dist.ProcessGroupGloo(
            store, body["rank_offset"], body["world_size"], timedelta(seconds=600)
        )

    def take(name: str, sizes: list[int]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        for size in sizes:
            groups[name].broadcast([buffer[:size]], options).wait()

    async def answer(request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        reply: dict[str, Any] = {}
        if request.path == "/init_weights_update_group":
            await asyncio.to_thread(join, body)
        elif request.path == "/destroy_weights_update_group":
            groups.pop(body["group_name"], None)
        elif request.path == "/bare":
            await asyncio.to_thread(take, body["group_name"], body["sizes"])
        elif request.path == "/update_weights_from_distributed":
            parts = zip(body["shapes"], body["dtypes"], strict=True)
            size = sum(math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in parts)
            await asyncio.to_thread(take, body["group_name"], [size])
            held["weight_version"] = body.get("weight_version", "")
        elif request.path == "/weights_checker":
            reply = {"ranks": [{"checksums": {}}]}
        elif request.path == "/model_info":
            reply = held
        elif request.path == "/server_info":
            reply = {
                "version": "0.5.23",
                "enable_deterministic_inference": True,
                "incremental_streaming_output": True,
                "skip_tokenizer_init": True,
                "max_req_input_len": 4096,
                "tp_size": 1,
                "device": "none",  # whose checksums nobody here can know
            }
        return web.json_response(reply)

    async def serve() -> None:
        app = web.Application(client_max_size=64 * MIB)
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        (folder / "port.new").write_text(str(runner.addresses[0][1]))
        (folder / "port.new").rename(folder / "port")
        await asyncio.Event().wait()

    asyncio.run(serve())


# -- the whole run ---------------------------------------------------------------------------------
def make_folder(folder: Path, shape: dict[str, int], layers: int, dtype: str) -> None:
    """A student's folder whose weights nobody reads: config, tokenizer, one small tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from mtopd.char_tokenizer import build_char_tokenizer
    from mtopd.tokenizer import load_tokenizer

    build_char_tokenizer({"x": ["the quick brown fox"]}, folder)
    tokenizer = load_tokenizer(folder)
    AutoConfig.for_model(
        "qwen3",
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=layers,
        num_attention_heads=shape["heads"],
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype=dtype,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    save_file({"model.norm.weight": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})


def run_section(section: str, spec: dict[str, Any], shape: dict[str, int]) -> dict[str, Any]:
    """A section in ranks of its own; returns rank 0's result."""
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with tempfile.TemporaryDirectory(dir=spec.pop("root"), prefix="weights-") as name:
        folder = Path(name)
        make_folder(folder, shape, spec["layers"], spec["dtype"])
        request, answer = folder / "spec.json", folder / "answer.json"
        request.write_text(
            json.dumps({**spec, "section": section, "folder": name, "answer": str(answer)})
        )
        command = [sys.executable, "-W", "ignore"]
        beside = subprocess.Popen([*command, __file__, "--receiver", str(request)], env=environment)
        command += ["-m", "torch.distributed.run", "--nnodes=1"]
        command += [
            f"--nproc-per-node={spec['tp'] * spec['pp']}",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0",
            "--local-addr=127.0.0.1",
        ]
        try:
            subprocess.run(
                [*command, __file__, "--worker", str(request)],
                env=environment,
                check=True,
                timeout=3600,
            )
        finally:
            beside.kill()
            beside.wait()
        found = json.loads(answer.read_text())
    print(f"{section} {json.dumps({**spec, **found})}", flush=True)
    return dict(found)


def worker(path: Path) -> None:
    import torch.distributed as dist

    from mtopd.progress import quiet_libraries

    quiet_libraries()
    spec = json.loads(path.read_text())
    result = {"memory": memory, "throughput": throughput}[spec["section"]](spec)
    if dist.get_rank() == 0:
        Path(spec["answer"]).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def sections(quick: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, section, spec): one after the other, the largest takes 2 GiB of memory in all."""
    for layout, (tp, pp) in LAYOUTS.items():
        for dtype, counts in LAYERS.items():
            if quick and dtype == "float32":
                continue
            for layers in counts[:1] if quick else counts:
                spec = {"tp": tp, "pp": pp, "dtype": dtype, "layers": 4 if quick else layers}
                yield f"memory_{layout}_{dtype}_{spec['layers']}_layers", "memory", spec
    for layout in TARGETS:
        tp, pp = LAYOUTS[layout]
        spec = {"tp": tp, "pp": pp, "dtype": "bfloat16", "layers": 4 if quick else 40}
        yield f"throughput_{layout}", "throughput", {**spec, "repeats": 2 if quick else 9}


def judge(results: dict[str, Any]) -> dict[str, bool]:
    """Each target, and whether it was met."""
    met = {}
    for layout, least in TARGETS.items():
        if found := results.get(f"throughput_{layout}"):
            ratio = found["speed_over_bare_broadcast"]["median"]
            met[f"throughput {layout} >= {least}"] = ratio >= least
    for layout in LAYOUTS:
        for dtype in LAYERS:
            start = f"memory_{layout}_{dtype}_"
            found = [result for name, result in results.items() if name.startswith(start)]
            if found:
                met[f"{start}within"] = all(result["within"] for result in found)
            for kind in ("update_mib", "stream_mib", "export_mib"):
                values = [result[kind] for result in found]
                if len(values) > 1:
                    middle = statistics.median(values)
                    even = all(abs(value - middle) <= 0.1 * middle for value in values)
                    met[f"{start}{kind} within 10 % over sizes"] = even
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="small models, few repeats: a smoke test of the code"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--folder", type=Path, help="where exports of up to 2 GiB are written")
    parser.add_argument(
        "--only", action="append", help="sections whose name begins so (memory_tp2); repeatable"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--receiver", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    if arguments.receiver:
        receiver(arguments.receiver)
        return
    shape = SMALL if arguments.quick else SHAPE
    results: dict[str, Any] = {}
    for name, section, spec in sections(arguments.quick):
        if not arguments.only or name.startswith(tuple(arguments.only)):
            results[name] = run_section(section, {**spec, "root": arguments.folder}, shape)
    met = judge(results)
    for what, is_met in met.items():
        print(f"{'met' if is_met else 'NOT MET'}  {what}")
    if arguments.json:
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        machine = {"cpus": os.cpu_count(), "processor": found[1] if found else platform.machine()}
        when = datetime.now(UTC).isoformat(timespec="seconds")
        document = {"schema": 1, "when": when, "machine": machine, "quick": arguments.quick}
        document |= {"targets": met, **results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
