"""Weights leaving the trainer: memory of an update and of an export, speed into one receiver.

    python benchmarks/weights.py --json benchmarks/results/weights_2core_cpu.json
    python benchmarks/weights.py --quick

Sections, each in ranks of its own; the models are Qwen3 shapes with constant weights, made in place, without
optimizer: what is measured is beside the trainer's own weights.

    memory      growth of a rank's peak resident memory, the largest over ranks, while every rank takes the stream
                bucket by bucket (an update of embedded engines), and while all ranks write an export; models of
                0.5, 1 and 2 GiB in bfloat16 and float32 at tp1, tp2, tp2 x pp2.  Allowed: twice the larger of
                bucket and largest tensor + 64 MiB, and the three sizes within 10 % of one another.
    throughput  bytes/s of the stream, gathered to rank 0 and broadcast from there to a bare receiver in buckets of
                64 MiB, over a bare broadcast of as many bytes in as large buckets, in turn; tp1, tp2 x pp2.

Ratios are medians over interleaved repeats.  Nothing is asserted of times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MIB = 1 << 20
BUCKET = 64 * MIB
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


def memory(spec: dict[str, Any]) -> dict[str, Any]:
    from mtopd.files import write_json
    from mtopd.pipelines.export import export
    from mtopd.run_dir import RunDir

    student = build(spec)
    tensors = student.stream.tensors.values()
    largest = max(tensor.nbytes for tensor in tensors)
    allowed = 2 * max(BUCKET, largest) + 64 * MIB
    before, taken = reset_peak(), 0
    for bucket in student.stream.buckets(BUCKET):
        taken += sum(tensor.nbytes for tensor in bucket.values())
    update = worst(status_bytes("VmHWM") - before)
    assert taken == sum(tensor.nbytes for tensor in tensors), "every rank takes everything"
    run = RunDir(Path(spec["folder"]) / "run", 1)
    if student.ranks.rank == 0:
        run.path.mkdir()
        write_json(run.path / "generation.json", {"generation": 1})
    worst(0)
    before = reset_peak()
    export(student, run, run.path / "export", shard_bytes=256 * MIB)
    exported = worst(status_bytes("VmHWM") - before)
    return {
        "model_mib": taken / MIB,
        "rank_weights_mib": worst(student.held) / MIB,
        "update_mib": update / MIB,
        "export_mib": exported / MIB,
        "allowed_mib": allowed / MIB,
        "within": max(update, exported) <= allowed,
    }


def sent_to(spec: dict[str, Any], rank: int, host: bool) -> Any:
    """The group of rank 0 and the receiver, which no other rank knows."""
    import torch.distributed as dist

    place = Path(spec["folder"]) / "port"
    if host:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place.with_suffix(".new").write_text(str(store.port))
        place.with_suffix(".new").rename(place)
    else:
        while not place.exists():
            time.sleep(0.1)
        store = dist.TCPStore("127.0.0.1", int(place.read_text()), is_master=False)
    return store, dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=600))


def broadcast(group: Any, tensor: Any) -> None:
    import torch.distributed as dist

    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([tensor], options).wait()


def throughput(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from mtopd.hf_weights import cut

    student = build(spec)
    is_first = student.ranks.rank == 0
    tensors = student.stream.tensors.values()
    sizes = [
        sum(tensor.nbytes for tensor in part)
        for part in cut(tensors, BUCKET, lambda tensor: tensor.nbytes)
    ]
    group: Any = None
    if is_first:
        store, group = sent_to(spec, 0, host=True)
        store.set("sizes", json.dumps([sizes, 2 * (1 + spec["repeats"])]))

    def bare() -> None:
        if is_first:
            for size in sizes:
                broadcast(group, blank[:size])
        dist.barrier()

    def ours() -> None:
        for bucket in student.stream.buckets(BUCKET, to=0):
            if is_first:
                flat = [tensor.view(-1).view(torch.uint8) for tensor in bucket.values()]
                whole = blank[: sum(part.numel() for part in flat)]
                broadcast(group, torch.cat(flat, out=whole))
        dist.barrier()

    blank: Any = torch.ones(max(sizes), dtype=torch.uint8) if is_first else None
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    kinds = {"bare": bare, "ours": ours}
    for repeat in range(-1, spec["repeats"]):
        for name in [*kinds] if repeat % 2 else [*kinds][::-1]:
            dist.barrier()
            started = time.perf_counter()
            kinds[name]()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - started)
    ratios = sorted(b / o for b, o in zip(seconds["bare"], seconds["ours"], strict=True))
    return {
        "speed_over_bare_broadcast": {
            "median": statistics.median(ratios),
            "min": ratios[0],
            "max": ratios[-1],
            "repeats": len(ratios),
        },
        "gb_per_s": {n: sum(sizes) / 1e9 / statistics.median(s) for n, s in seconds.items()},
        "buckets": len(sizes),
        "model_mib": sum(sizes) / MIB,
    }


def receiver(path: Path) -> None:
    """A process that takes what rank 0 broadcasts, and knows nothing of models."""
    import torch

    spec = json.loads(path.read_text())
    store, group = sent_to(spec, 1, host=False)
    sizes, rounds = json.loads(store.get("sizes"))
    buffer = torch.empty(max(sizes), dtype=torch.uint8)
    for _ in range(rounds):
        for size in sizes:
            broadcast(group, buffer[:size])


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
        beside = None
        if section == "throughput":
            beside = subprocess.Popen(
                [*command, __file__, "--receiver", str(request)], env=environment
            )
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
            if beside is not None and beside.wait(timeout=60):
                raise RuntimeError("the receiver failed")
        finally:
            if beside is not None:
                beside.kill()
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
            for kind in ("update_mib", "export_mib"):
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
