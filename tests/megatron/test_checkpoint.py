"""Checkpoints: the same numbers after a resume at any layout; nothing damaged is trusted, nothing
foreign executes.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from mtopd.files import sweep
from mtopd.megatron.checkpoint import _IndexUnpickler, prune, sealed
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError
from tests.conftest import results_of, run_ranks
from tests.small_models import save_model

WORKER = Path(__file__).with_name("checkpoint_ranks.py")
DISTRIBUTED = {"use_distributed_optimizer": True}
# A job trains on, from the checkpoint of another job's layout; "save" makes one after three steps
# and trains on.
SAVED = {
    "dense": {"kind": "qwen3", "parallel": {"tp": 2, "pp": 2}},
    "bf16": {"kind": "qwen3", "dtype": "bfloat16", "parallel": {"tp": 2, "pp": 2}},
    "sharded": {"kind": "qwen3", "parallel": {"tp": 2, "dp": 2}, "megatron": DISTRIBUTED},
    "experts": {"kind": "qwen3_moe", "parallel": {"pp": 2, "dp": 2, "ep": 2}},
    # The first stage has no experts: on it, their optimizer has no parameter and counts no step.
    "late experts": {"kind": "dense_first", "parallel": {"pp": 2, "dp": 2, "ep": 2}},
    "late sharded": {
        "kind": "dense_first",
        "parallel": {"pp": 2, "dp": 2, "ep": 2},
        "megatron": DISTRIBUTED,
    },
}
RESUMED = {
    4: [
        ("dense", {"parallel": {"tp": 2, "pp": 2}}),
        ("dense", {"parallel": {"pp": 2, "vpp": 2, "dp": 2}}),
        ("bf16", {"parallel": {"tp": 2, "pp": 2}}),
        ("sharded", {"parallel": {"tp": 2, "dp": 2}, "megatron": DISTRIBUTED}),
        ("sharded", {"parallel": {"tp": 2, "pp": 2}, "megatron": DISTRIBUTED}),
        ("experts", {"parallel": {"pp": 2, "dp": 2, "ep": 2}}),
        (
            "experts",
            {"parallel": {"tp": 2, "dp": 2, "ep": 4}, "megatron": {"sequence_parallel": True}},
        ),
        ("late experts", {"parallel": {"pp": 2, "dp": 2, "ep": 2}}),
        ("late sharded", {"parallel": {"pp": 2, "dp": 2, "ep": 2}, "megatron": DISTRIBUTED}),
    ],
    2: [
        ("dense", {"parallel": {"dp": 2}}),
        ("dense", {"parallel": {"cp": 2}}),
        ("dense", {"parallel": {"dp": 2}, "megatron": DISTRIBUTED, "refuses": "optimizer=False"}),
        ("sharded", {"parallel": {"dp": 2}, "megatron": DISTRIBUTED}),
        ("experts", {"parallel": {"dp": 2, "ep": 2}}),
        ("experts", {"parallel": {"dp": 2}, "refuses": "ep > 1=True"}),
    ],
}

# A run that was planned to end goes on; new runs begin with its checkpoint.
CONSTANT = {"kind": "qwen3", "parallel": {"tp": 2}, "optimizer": {"decay": "constant"}}
LINEAR = {"kind": "qwen3", "parallel": {"tp": 2}, "optimizer": {"decay": "linear"}}
OTHER_RATES = {"lr": 5e-4, "min_lr": 1e-5, "warmup_steps": 4, "decay": "linear"}
BEGUN = {"begin": "constant", "kind": "qwen3", "optimizer": OTHER_RATES}
GOES_ON = [
    {"ended": "constant", "num_steps": 3, **CONSTANT},
    {"resume": "constant", "num_steps": 10, **CONSTANT},
    {"straight": "constant", "num_steps": 10, **CONSTANT},
    {"ended": "linear", "num_steps": 3, **LINEAR},
    {"resume": "linear", "num_steps": 12, **LINEAR},
    {"run": "new", **BEGUN, "parallel": {"tp": 2}},
    {"run": "new dp", **BEGUN, "parallel": {"dp": 2}},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    save_model(root / "qwen3", seed=1, vocab=111)
    save_model(root / "qwen3_moe", seed=2, model_type="qwen3_moe", tied=False, vocab=111)
    save_model(
        root / "dense_first",
        seed=3,
        model_type="deepseek_v3",
        tied=False,
        vocab=111,
        first_k_dense_replace=2,
    )
    return root


def run_jobs(root: Path, world_size: int, jobs: list[dict]) -> list[dict]:
    output = run_ranks(world_size, WORKER, str(root), json.dumps(jobs), timeout=400.0)
    found = results_of(output)
    assert len(found) == len(jobs), output
    return found


@pytest.mark.integration  # two minutes
def test_a_checkpoint_goes_on_at_every_layout_with_the_same_numbers(root: Path) -> None:
    jobs = [{"save": name, **job} for name, job in SAVED.items()]
    jobs += [{"resume": name, **SAVED[name], **job} for name, job in RESUMED[4]]
    *done, of_four = run_jobs(root, 4, [*jobs, counted(4)])
    resumed = [{"resume": name, **SAVED[name], **job} for name, job in RESUMED[2]]
    of_two = run_jobs(root, 2, [*resumed, *GOES_ON, counted(2)])
    done += of_two[: len(resumed)]
    check_ended_runs_that_go_on(of_two[len(resumed) : -1])
    check_that_ranks_share_the_hashing([*run_jobs(root, 1, [counted(1)]), of_two[-1], of_four])
    wanted = {job["save"]: job for job in done if "save" in job}
    assert len(done) == len(SAVED) + len(RESUMED[4]) + len(RESUMED[2])
    for job in done:
        if "save" in job:
            for said, wanted_word in zip(
                job["forgeries"], ("mkdir", "pickled objects", "../elsewhere"), strict=True
            ):
                assert wanted_word in said
            assert job["refused"] == job["damages"] > 4, "every damaged file was refused by name"
            # Result of rank 0, for which all others wait: what no writer sent a digest for.
            assert sorted(job["awaited"]) == [".metadata", "common.pt", "metadata.json"], job
            continue
        if "refuses" in job:
            assert job["refuses"] in job["error"]
            continue
        saved = wanted[job["resume"]]
        assert job["loaded"] == saved["saved"], (
            "the weights are the saved ones at any layout, bit for bit"
        )
        same = job["parallel"] == saved["parallel"]
        errors = [abs(a - b) / b for a, b in zip(job["losses"], saved["losses"], strict=True)]
        print(
            job["resume"],
            job["parallel"],
            f"worst loss {max(errors):.1e}",
            "state",
            job["state"][:12],
        )
        assert job["steps_done"] == 6
        if same:
            assert job["losses"] == saved["losses"] and job["state"] == saved["state"], (
                "bit for bit"
            )
        assert max(errors) <= 2e-6, job
        assert job["plain"] == {"shares": {"a": 1.5}}


def counted(world_size: int) -> dict:
    """One model on that many ranks."""
    return {"count": f"on {world_size}", "kind": "qwen3", "parallel": {"pp": world_size}}


def check_that_ranks_share_the_hashing(jobs: list[dict]) -> None:
    """At 1, 2 and 4 ranks: every byte of a checkpoint once, and no rank more than on fewer ranks.
    Rank 0 alone hashed all of it again once, while the others waited: 31 minutes of 2.8 TB.
    """
    assert [len(job["saved"]) for job in jobs] == [1, 2, 4]
    for job in jobs:
        print({name: job[name] for name in ("whole", "saved", "awaited", "loaded")})
        assert sum(job["saved"]) == sum(job["loaded"]) == job["whole"]
        assert job["awaited"][0] < 0.05 * job["whole"] and not any(job["awaited"][1:])
    for name in ("saved", "loaded"):
        most = [max(job[name]) for job in jobs]
        assert most == sorted(most, reverse=True) and most[-1] < 0.6 * most[0], most


def check_ended_runs_that_go_on(jobs: list[dict]) -> None:
    """A larger number of steps: with a constant rate the bits of a run that had it from the start,
    with another the rates of the new schedule.  A run that begins with the checkpoint: its weights
    and moments at another layout, and a schedule of its own from the first step.
    """
    _, grown, straight, _, replanned, *new = jobs
    assert grown["losses"] == straight["losses"] and grown["state"] == straight["state"]
    assert len(set(straight["losses"])) == 3
    # Steps 4 to 6 of 12, of which 2 warm up: 2, 3, 4 tenths of the way from 1e-3 to 1e-4.
    assert replanned["rates"] == pytest.approx([8.2e-4, 7.3e-4, 6.4e-4], rel=1e-12)
    assert len(new) == 2
    for job in new:
        print(job["run"], f"worst update {job['moved']:.1e}")
        assert job["loaded"] == grown["loaded"] and job["steps_done"] == 0
        # The weights are near 1, and rounded: the update is 1.2e-4.  A zeroed moment moves them by
        # half of it or more.
        assert job["moved"] <= 1e-3
        assert job["losses"] == job["again"], "its own checkpoint 0 holds all of it"
        assert job["rates"] == pytest.approx([1.25e-4, 2.5e-4, 3.75e-4], rel=1e-12)
        gone, exchanged = job["refused"]
        assert "000001" in gone and "is gone" in gone and "written again" in exchanged


def test_a_rank_that_dies_while_it_writes_leaves_the_former_checkpoint(root: Path) -> None:
    dense = {"kind": "qwen3", "parallel": {"tp": 2}}
    with pytest.raises(AssertionError, match="Signal 9"):
        run_jobs(root, 2, [{"save": "dying", "dies": True, **dense}])
    folder = root / "runs" / "dying" / "checkpoints"
    assert list(folder.glob(".000006.tmp/*.distcp")), "it died in the save"
    saved = json.loads((folder.parent / "before.json").read_text())
    sweep(root / "runs" / "dying")
    assert [path.name for path in folder.iterdir()] == ["000003"]
    (job,) = run_jobs(root, 2, [{"resume": "dying", **dense}])
    assert (job["newest"], job["loaded"], job["losses"]) == (3, saved["saved"], saved["losses"])


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    run = RunDir(tmp_path, 1)
    for iteration in (100, 200, 300, 1000):
        run.checkpoint(iteration).mkdir(parents=True)
        (run.checkpoint(iteration) / "SEALED").write_text("")
    run.checkpoint(400).mkdir()  # not sealed
    prune(run, keep=2)
    assert sealed(run) == [300, 1000] and run.checkpoint(400).exists()


def _by_dotted_name(module: str, name: str) -> bytes:
    """Protocol 4 follows the dots of a name, beyond what the module defines."""
    text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return b"\x80\x04" + text + b"\x93."


class Executes:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("pickled", "named"),
    [
        (pickle.dumps(Executes()), "builtins.print"),
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        # A module that the module imports.
        (b"ctorch.distributed.checkpoint.filesystem\nio\n.", "filesystem.io"),
        (_by_dotted_name("torch.distributed.checkpoint.filesystem", "os.system"), "os.system"),
        (b"ctorch\nload\n.", "torch.load"),
    ],
)
def test_the_index_admits_no_foreign_names(
    pickled: bytes, named: str, capsys: pytest.CaptureFixture
) -> None:
    import io

    with pytest.raises(MtopdError, match=named):
        _IndexUnpickler(io.BytesIO(pickled)).load()
    assert "executed" not in capsys.readouterr().out
