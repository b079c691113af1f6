"""The Triton row kernels without a GPU: their results in the interpreter, their code for Hopper
compiled ahead of time.

Each in a process of its own, because Triton decides at import whether it interprets.  On a GPU the
same checks run on the compiled kernels.  Not exercised without one: speed, and the hardware's exp
and log.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from row_cases import CHECKS

HERE = Path(__file__).parent


def run_script(name: str, **environment: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / name)],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.integration  # a minute and a half
def test_in_the_interpreter() -> None:
    assert run_script("triton_interpreted.py", TRITON_INTERPRET="1").split() == [
        c.__name__ for c in CHECKS
    ] + ["whole"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_the_gpu(check) -> None:
    from mtopd.kernels.rows_triton import KERNELS

    check(KERNELS, "cuda")


def test_compiled_for_hopper() -> None:
    """Every variant compiles for sm_90; none spills or exceeds the shared memory of a block."""
    variants = json.loads(run_script("triton_compiled.py"))
    assert len(variants) == 22
    for name, found in variants.items():
        assert found["target"] == "sm_90a", name
        assert found["spilled_bytes"] == 0, f"{name} spills {found['spilled_bytes']} bytes"
        assert found["shared_bytes"] <= 227 * 1024, name
        assert found["registers"] <= 128, (
            f"{name}: {found['registers']} registers leave less than two blocks on an SM"
        )
    plain = [found for name, found in variants.items() if name.endswith("plain")]
    assert all(found["vector_loads"] > 0 for found in plain), (
        "aligned rows are read 16 bytes at a time"
    )
    transformed = [found for name, found in variants.items() if name.endswith("transformed")]
    assert transformed and all(found["fused_products"] == 0 for found in transformed), (
        "see `_options`"
    )
