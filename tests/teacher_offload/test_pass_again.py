"""A pass that was killed half-way is finished with the bits of one that was not: invariant 8 for
very unequal lengths.

The last bits of a hidden state depend on the shape of its batch (attention on CPU works in blocks
of the padded length), so samples that are computed again must stand among the same neighbours.  So must
those of a quarter that is read while the others are still being answered.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from mtopd.config import ConsolidateConfig
from mtopd.config_file import validate
from mtopd.convert.teacher import add_teacher
from mtopd.pipelines import prepare
from mtopd.run_dir import RunDir
from mtopd.tokenizer import load_tokenizer, vocab_size
from mtopd.trajectories import write_shard
from mtopd.types import Trajectory
from tests.conftest import results_of, run_ranks
from tests.small_models import save_model, write_prompts

WORKER = Path(__file__).with_name("pass_again_ranks.py")
SAMPLES = 60


def make_run(root: Path) -> RunDir:
    """Two replicas of a dense teacher and of one whose experts both share; given trajectories of 5
    to 127 tokens.
    """
    save_model(root / "student", seed=1, layers=2)
    kinds = ["qwen3", "qwen3_moe"]
    for i, kind in enumerate(kinds):
        save_model(root / kind, seed=2 + i, model_type=kind, layers=2)
        add_teacher(kind, root / kind, root / "stores" / kind, slices=1)
    write_prompts(root / "prompts.jsonl", count=SAMPLES)
    values = {
        "run_dir": str(root / "run"),
        "student": {"model": str(root / "student"), "parallel": {"dp": 2}},
        "teachers": [
            {
                "name": kind,
                "store": str(root / "stores" / kind),
                "route": {"domain": domain},
                "parallel": {"ep": ep},
            }
            for kind, domain, ep in zip(kinds, "ab", (1, 2), strict=True)
        ],
        "data": {
            "sources": [{"name": "words", "path": str(root / "prompts.jsonl")}],
            "context_length": 128,
            "max_response": 100,
        },
        "rollout": {"prompts_per_iteration": SAMPLES},
        "teacher_offload": {"batch_tokens": 256},
        "train": {"num_iterations": 1, "micro_batch_size": 4, "optimizer": {"lr": 1e-3}},
    }
    config = validate(values, ConsolidateConfig, "test_pass_again")
    run = RunDir(config.run_dir)
    with run.lock():
        prepare.consolidate(config, run, lambda text: None)
    draw, vocab = random.Random(0), vocab_size(load_tokenizer(root / "student"))
    trajectories = []
    for i in range(SAMPLES):
        prompt, response = (
            tuple(draw.randrange(3, vocab) for _ in range(n))
            for n in (draw.randint(4, 27), draw.randint(1, 100))
        )
        mask, log_probs = (1,) * len(response), (-1.0,) * len(response)
        trajectories.append(
            Trajectory(
                i,
                f"words/{i}",
                {"domain": "ab"[i % 2]},
                i % 2,
                prompt,
                response,
                mask,
                log_probs,
                0,
                "stop",
            )
        )
    run.trajectories(0).mkdir(parents=True)
    for start, end in itertools.pairwise(range(0, SAMPLES + 1, 12)):  # one quarter has two of them
        write_shard(run.trajectories(0), f"given-{end}", trajectories[start:end], run.generation)
    run.seal(run.trajectories(0))
    return run


def test_what_a_killed_pass_lacks_is_computed_with_the_same_bits(tmp_path: Path) -> None:
    output = run_ranks(2, WORKER, str(make_run(tmp_path).path))
    found = results_of(output)
    for result in found:
        print(result)
    (once, *rests_of_once, beside_once), (thrice, *rests_of_thrice, beside_thrice) = (
        found[:5],
        found[5:],
    )
    assert once["waves"] == [1, 1] and min(thrice["waves"]) >= 3 and len(found) == 10
    for result in (beside_once, beside_thrice):
        assert result["differ"] == [], result
        visits = [name for name in ("[2]", "[0]", "[3]", "the rest") for _ in range(2)]
        assert result["quarters"] == visits
    for result in (*rests_of_once, *rests_of_thrice):
        assert result["differ"] == [], result
        assert sum(result["samples"]) == result["num"], (
            "only what was lacking is kept, of teachers that lack something"
        )
        assert result["lost"] == "every third" or set(result["waves"]) == {1}, (
            "what is left fits in one wave"
        )
