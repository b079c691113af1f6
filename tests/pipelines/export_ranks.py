"""Worker of test_export: a disk that is full for one rank, and the export after it."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from mtopd import hf_writer
from mtopd.config import OptimizerConfig, StudentConfig
from mtopd.files import write_json
from mtopd.hf_checkpoint import HFTensors, check_checkpoint
from mtopd.hf_weights import read_weights
from mtopd.pipelines.export import export
from mtopd.pipelines.student import Student
from mtopd.progress import quiet_libraries
from mtopd.run_dir import RunDir, is_sealed, read_seal
from mtopd.types import MtopdError
from tests.small_models import whole


def main(root: Path) -> None:
    config = StudentConfig(model=root / "model", parallel={"tp": 2}, bucket_bytes=20_000)
    student = Student(config, OptimizerConfig(lr=1e-3, warmup_steps=0), 10, seed=0)
    rank = student.ranks.rank
    run = RunDir(root / "run", 1)
    if rank == 0:
        run.path.mkdir()
        write_json(run.path / "generation.json", {"generation": 1})
    dist.barrier()
    folder, pwrite, written = run.export(7), os.pwrite, 0

    def full_disk(descriptor: int, data: memoryview, start: int) -> int:
        nonlocal written
        written += 1
        if rank == 1 and written > 4:  # header, then tensors
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, start)

    hf_writer.os.pwrite = full_disk
    try:
        export(student, run, folder, shard_bytes=100_000)
    except MtopdError as error:
        wanted = f"rank 1 on host {socket.gethostname()}: {folder.parent}/.{folder.name}.tmp/model-"
        said = str(error)
        assert said.startswith(wanted) and "No space left on device; free some space" in said, said
    else:
        raise AssertionError("half an export")
    assert written > 4 and not folder.exists()
    dist.barrier()
    hf_writer.os.pwrite = pwrite

    export(student, run, folder, {"iteration": 7}, shard_bytes=100_000)
    assert is_sealed(folder) and read_seal(folder)["iteration"] == 7
    check_checkpoint(folder)
    found, wanted = whole(read_weights(folder)), whole(student.weights())
    assert found.keys() == wanted.keys() == HFTensors(folder).keys(), "and no layer behind the last"
    assert any(".layers.2." in name for name in found) and not any(".3." in name for name in found)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())

    def never(names: Sequence[str], **_: object) -> None:
        raise AssertionError("an export that is sealed is not written again")

    student.stream.gather = never
    export(student, run, folder)
    print("PASSED", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    quiet_libraries()
    main(Path(sys.argv[1]))
