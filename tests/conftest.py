"""Shared by all tests: rank jobs with a timeout, small real models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.prompt_examples import DOMAINS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mtopd.data import PromptSource

REPOSITORY = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


def run_ranks(world_size: int, worker: Path, *arguments: str, timeout: float = 240.0) -> str:
    """Run a worker script on ``world_size`` gloo ranks; returns its output.  A hung rank becomes a
    failed test.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={world_size}",
    ]
    command += [
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
        str(worker),
        *arguments,
    ]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        pytest.fail(f"ranks did not end within {timeout} s:\n{output[-6000:]}")
    assert process.returncode == 0, output[-8000:]
    return output


def results_of(output: str) -> list[Any]:
    """What the ranks of a worker printed behind RESULT, in order."""
    return [
        json.loads(line.removeprefix("RESULT "))
        for line in output.splitlines()
        if line.startswith("RESULT ")
    ]


def on_small_disk(folder: Path, megabytes: int) -> list[str]:
    """What to put before a command so that, for it alone, ``folder`` is a tmpfs of that size.

    Needs user namespaces, or root; where a machine allows neither, the test is skipped and says so.
    """
    said = ""
    for namespace in (["unshare", "--user", "--map-root-user", "--mount"], ["unshare", "--mount"]):
        mount = [
            *namespace,
            "sh",
            "-c",
            f'mount -t tmpfs -o size={megabytes}m none "$0" && exec "$@"',
            str(folder),
        ]
        probe = subprocess.run([*mount, "true"], capture_output=True, text=True, timeout=60)
        if not probe.returncode:
            return mount
        said = probe.stderr.strip()
    pytest.skip(f"neither user namespaces nor root: no small disk can be mounted ({said})")


@pytest.fixture(scope="session")
def sources() -> dict[str, tuple[PromptSource, PromptSource]]:
    """Train and held-out prompts of the demo's domains."""
    from mtopd.data import load_reasoning_gym

    return {k: load_reasoning_gym(k, d, o, size=20_000, seed=1) for k, (d, o) in DOMAINS.items()}


@pytest.fixture(scope="session")
def tokenizer_folder(
    sources: dict[str, tuple[PromptSource, PromptSource]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    from mtopd.char_tokenizer import build_char_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    build_char_tokenizer(
        {k: [row.question for row in train.rows] for k, (train, _) in sources.items()}, folder
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tokenizer_folder))
