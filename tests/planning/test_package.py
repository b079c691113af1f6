"""Planning stays pure: no tensor library is loaded by it, no file opened, nothing but metadata read."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import importlib, pkgutil, sys
import mtopd.planning as planning

for module in pkgutil.walk_packages(planning.__path__, "mtopd.planning."):
    importlib.import_module(module.name)
heavy = {"torch", "numpy", "pyarrow", "megatron", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def in_a_fresh_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_module_of_planning_loads_a_tensor_library() -> None:
    in_a_fresh_process(CODE)


def test_planners_read_metadata_only() -> None:
    """Each is called where opening a file or a socket is an error, on objects that hold nothing
    but the fields of their metadata.  (`plan_parts` has stores without bytes in test_shares.py.)
    """
    in_a_fresh_process(
        CODE
        + """
import heapq  # which Counter.most_common imports when it is called
from mtopd.types import SampleMetadata

def refuse(event, arguments):
    assert event != "open" and not event.startswith(("socket.", "subprocess.")), (event, arguments)

samples = [SampleMetadata(k, k % 2, 3, 5 + k, 5) for k in range(9)]
assert not hasattr(samples[0], "__dict__")
model = planning.Architecture(8, 64, 128, 64, 32, 1000)
sys.addaudithook(refuse)
planning.select_prompts(10, 4, 2, seed=0)
planning.propose_split(model, 2, teacher_hidden_size=64, loss_share=0.5)
options = {"num_train_steps": 2, "teacher_weights": [0.5, 0.5], "dp_size": 2, "seed": 0}
options |= {"normalization": "token_mean", "cost": model.sample_cost}
planning.plan_train_steps(samples, micro_batch_size=2, **options)
planning.plan_train_steps(samples, token_budget=32, **options)
planning.plan_pass([[5, 3], [9]], 2, batch_tokens=10, token_bytes=4, activation_budget=400)
"""
    )
