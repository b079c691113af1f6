"""Worker of test_pass_again: one whole pass, then caches that lack some of its samples, filled
again and again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from mtopd import hidden_cache
from mtopd.pipelines import teacher_pass
from mtopd.pipelines.session import Session
from mtopd.progress import quiet_libraries
from mtopd.rollout.background import Background
from mtopd.run_dir import SEAL
from mtopd.trajectories import sealed_shards
from mtopd.trajectories.format import seal_path
from mtopd.types import MtopdError

# Teacher index and rows by what names them.
Rows = dict[hidden_cache.RowKey, tuple[int, np.ndarray]]


def cached_rows(session: Session) -> Rows:
    teachers = {store.fingerprint: index for index, store in enumerate(session.teachers.stores)}
    found = {}
    with hidden_cache.HiddenCacheReader(session.run.hidden_cache(0)) as reader:
        for entry in reader.entries():
            assert len(reader.copies(entry.row_key)) == 1, (
                "a sample that was there was written again"
            )
            rows_NE = np.empty((entry.n_tokens, entry.layout.hidden_size), entry.layout.dtype)
            reader.read(entry, rows_NE)
            found[entry.row_key] = teachers[entry.layout.teacher_fingerprint], rows_NE
    return found


def leave(session: Session, kept: Rows) -> None:
    """The iteration's cache as a killed start leaves it: these rows, no seal.  Collective."""
    if session.ranks.rank == 0:
        root = session.run.hidden_cache(0)
        hidden_cache.remove(root)
        with hidden_cache.HiddenCacheWriter(
            root, writer="killed", generation=1, hidden_dtype="float32"
        ) as writer:
            for row_key, (teacher, rows_NE) in kept.items():
                store = session.teachers.stores[teacher]
                writer.put(store.fingerprint, store.hidden_size, *row_key, rows_NE)
    dist.barrier()


def told(session: Session, visited: int) -> dict[str, list[int]]:
    """What the metrics lines of the last passes say, of teacher after teacher."""
    if session.ranks.rank:
        return {}
    lines = [json.loads(line) for line in session.run.metrics.read_text().splitlines()]
    passes = [values for line in lines for values in line.get("teachers", {}).values()][-visited:]
    for values in passes:
        assert (
            values["bytes_read"] + values["bytes_kept"] == values["waves"] * values["stored_bytes"]
        ), values
    return {key: [values[key] for values in passes] for key in ("samples", "tokens", "waves")}


def refuse_a_flipped_token(session: Session) -> None:
    """Neither rank takes trajectories that differ from their seal.  Collective."""
    path = session.run.trajectories(0) / "given-12.tokens.arrow"
    whole = path.read_bytes()
    for damaged in (True, False):
        dist.barrier()
        if session.ranks.rank == 0:
            position = len(whole) // 2
            flipped = whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
            path.write_bytes(flipped if damaged else whole)
        dist.barrier()
        if damaged:
            try:
                teacher_pass.run(session, session.iteration(0))
            except MtopdError as error:
                assert f"{path} is damaged: its sha256 is not the sealed one" in str(error), error
            else:
                raise AssertionError("a flipped token went through")


class Answering:
    """A rollout that seals its shards again in an order of its own: the third quarter, and once all
    teachers have read it the first, then the fourth, then the last.
    """

    def __init__(self, session: Session) -> None:
        self.folder, self._session = session.run.trajectories(0), session
        self.shard_names = sealed_shards(self.folder)
        self._seals = {name: seal_path(self.folder, name) for name in self.shard_names}
        self._hidden = self.folder.with_name("hidden")
        dist.barrier()  # all have listed them
        if session.ranks.rank == 0:
            (self.folder / SEAL).unlink()
            self._hidden.mkdir(exist_ok=True)
            for path in self._seals.values():
                path.rename(self._hidden / path.name)
        dist.barrier()
        self.background = Background(lambda thread: self._answer(), "answering")

    def _answer(self) -> None:
        if self._session.ranks.rank:
            return
        first, second, third, *fourth = self._seals.values()
        before = len(passes(self._session))
        for seals, read in (([third], 2), ([first], 4), (fourth, 6), ([second], 6)):
            for path in seals:
                (self._hidden / path.name).rename(path)
            deadline = time.monotonic() + 60
            while len(passes(self._session)) < before + read:
                assert time.monotonic() < deadline, "nothing was read beside the rollout"
                time.sleep(0.02)


def passes(session: Session) -> list[dict[str, Any]]:
    """The lines of visits of teachers so far."""
    lines = [json.loads(line) for line in session.run.metrics.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "teacher_pass"]


def read_beside_a_rollout(session: Session, whole: Rows) -> dict[str, Any]:
    """What came of a pass that began while shards were still being sealed.  Collective."""
    leave(session, {})
    before = len(passes(session))
    iteration = session.iteration(0)
    session.rollout = answering = Answering(session)
    teacher_pass.run_beside(session, iteration)
    answering.background.join()
    session.rollout = None
    if session.ranks.rank == 0:
        early = cached_rows(session)
        assert len(early) == 48, "of quarters that were whole"
        session.run.seal(session.run.trajectories(0))
    dist.barrier()
    teacher_pass.run(session, session.iteration(0))
    found, lines = cached_rows(session), passes(session)[before:]
    assert sum(v["samples"] for line in lines for v in line["teachers"].values()) == len(whole)
    for line in lines[:-2]:
        (values,) = line["teachers"].values()
        assert values["hidden_s"] > 0 and values["bytes_read"] + values["bytes_kept"] > 0
    return {
        "differ": [r.sample_id for r in whole if found[r][1].tobytes() != whole[r][1].tobytes()],
        "quarters": [line["part"].partition("quarters ")[2] or "the rest" for line in lines],
    }


def report(session: Session, result: dict[str, Any]) -> None:
    if session.ranks.rank == 0:
        print("RESULT " + json.dumps(result), flush=True)
    dist.barrier()


def main() -> None:
    quiet_libraries()
    session = Session(Path(sys.argv[1]), 1)
    iteration = session.iteration(0)
    refuse_a_flipped_token(session)
    offload = session.config.teacher_offload
    asked = session.config.rollout.model_copy(update={"overlap_teacher_pass": True})
    session.config = session.config.model_copy(update={"rollout": asked})
    # All batches in one wave; then in several, of which what is lacking needs fewer.
    for budget in (offload.activation_budget, 384 * 4 * session.teachers.stores[0].hidden_size):
        small = offload.model_copy(update={"activation_budget": budget})
        session.config = session.config.model_copy(update={"teacher_offload": small})
        leave(session, {})
        teacher_pass.run(session, iteration)
        whole = cached_rows(session)
        longest_first = sorted(whole, key=lambda row_key: -len(whole[row_key][1]))
        of_first = [row_key for row_key in longest_first if whole[row_key][0] == 0]
        losses = {
            "the shortest": longest_first[-3:],
            "every third": longest_first[::3],
            "one": of_first[9:10],
        }
        report(session, {"budget": budget, "lost": "all", **told(session, 2)})
        for name, lost in losses.items():
            leave(
                session, {row_key: rows for row_key, rows in whole.items() if row_key not in lost}
            )
            teacher_pass.run(session, iteration)
            found = cached_rows(session)
            differ = [r.sample_id for r in whole if found[r][1].tobytes() != whole[r][1].tobytes()]
            visited = len({whole[row_key][0] for row_key in lost})
            report(
                session,
                {
                    "budget": budget,
                    "lost": name,
                    "num": len(lost),
                    "differ": differ,
                    **told(session, visited),
                },
            )
        report(session, read_beside_a_rollout(session, whole))
    # A cache whose keys are of another version is filled again, sealed or not.
    leave(
        session, {row_key._replace(key=row_key.key[::-1]): rows for row_key, rows in whole.items()}
    )
    if session.ranks.rank == 0:
        session.run.seal(session.run.hidden_cache(0))
    dist.barrier()
    teacher_pass.run(session, iteration)
    found = cached_rows(session)
    assert len(found) == 2 * len(whole)
    assert all(np.array_equal(found[row_key][1], rows[1]) for row_key, rows in whole.items())
    session.close()


if __name__ == "__main__":
    main()
