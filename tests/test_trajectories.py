"""Trajectories survive the disk exactly; what is unsealed is invisible and what is damaged is
refused by name.
"""

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtopd import trajectories as module
from mtopd.trajectories import (
    TokenStore,
    is_sealed,
    read_metadata,
    sample_metadata,
    sealed_shards,
    token_hash,
    verify_shard,
    write_shard,
)
from mtopd.types import MtopdError, SampleMetadata, Trajectory


def trajectory(sample_id: int, response_len: int = 5, **changes) -> Trajectory:
    rng = random.Random(sample_id)
    values = {
        "sample_id": sample_id,
        "prompt_id": f"rot/{sample_id}",
        "route": {"domain": "rot", "effort": "high"},
        "teacher_index": sample_id % 3,
        "prompt_ids": tuple(rng.randrange(100) for _ in range(1 + sample_id % 4)),
        "response_ids": tuple(rng.randrange(100) for _ in range(response_len)),
        "loss_mask": tuple(rng.randrange(2) for _ in range(response_len)),
        "rollout_log_probs": tuple(-rng.randrange(64) / 8 for _ in range(response_len)),
        "student_version": 7,
        "finish_reason": "stop" if sample_id % 2 else "length",
        "reward": None if sample_id % 2 else 0.1,
    }
    return Trajectory(**{**values, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sealed shards: samples 0..3 and 10..12."""
    write_shard(tmp_path, "a", [trajectory(k) for k in range(4)], generation=1)
    write_shard(
        tmp_path, "b", [trajectory(k, response_len=1 + k) for k in (12, 10, 11)], generation=2
    )
    return tmp_path


def test_round_trip_is_exact(folder: Path) -> None:
    assert sealed_shards(folder) == ["a", "b"]
    store = TokenStore(folder)
    for k in range(4):
        assert store.get(k) == trajectory(k)
    for k in (10, 11, 12):
        assert store.get(k) == trajectory(k, response_len=1 + k)
        assert store.get(k) == store.get(k), "the second read skips the hash and gives the same"
    assert [os.path.basename(p) for p in folder.iterdir() if ".tmp" in p.name] == []


def test_planning_metadata_needs_no_tokens(folder: Path) -> None:
    for path in folder.glob("*.tokens.arrow"):
        path.unlink()
    metadata = read_metadata(folder)
    assert metadata.schema.equals(module.METADATA_SCHEMA)
    samples = sample_metadata(metadata)
    assert samples[4] == SampleMetadata(
        12, 0, 1, 13, sum(trajectory(12, response_len=13).loss_mask)
    )
    assert [s.sample_id for s in samples] == [0, 1, 2, 3, 12, 10, 11]
    assert metadata.to_pylist()[1]["route"] == [("domain", "rot"), ("effort", "high")]
    assert metadata["reward"].to_pylist()[:2] == [0.1, None]


def test_tokens_are_views_of_the_mapped_file(folder: Path) -> None:
    fields = TokenStore(folder).tokens(12)
    expected = trajectory(12, response_len=13)
    assert fields.response_ids.dtype == np.int32
    assert fields.loss_mask.dtype == np.uint8
    assert fields.rollout_log_probs.dtype == np.float32
    assert fields.prompt_ids.tolist() == list(expected.prompt_ids)
    assert not fields.response_ids.flags.writeable
    assert not fields.response_ids.flags.owndata
    assert fields.version_spans == ((0, 7),)
    assert fields.teacher_prompt_ids is None


def test_the_files_are_what_the_docstring_says(folder: Path) -> None:
    """Read without mtopd, as another harness would."""
    seal = json.loads((folder / "a.sealed.json").read_text())
    assert (seal["schema_version"], seal["generation"], seal["num_samples"]) == (1, 1, 4)
    assert sorted(seal["files"]) == ["a.meta.parquet", "a.tokens.arrow"]
    for name, entry in seal["files"].items():
        assert entry["size"] == (folder / name).stat().st_size
    with pa.memory_map(str(folder / "a.tokens.arrow")) as source:
        rows = pa.ipc.open_file(source).read_all().to_pylist()
    assert rows[2]["response_ids"] == list(trajectory(2).response_ids)
    assert rows[2]["version_spans"] == [{"start": 0, "version": 7}]
    assert f"{module.__doc__}".count("list<int32>") == 3


def test_token_hash_is_fixed_by_the_format_and_separates_the_fields() -> None:
    # sha256 of 24 bytes of lengths, then 4-byte ids and 1-byte mask values, computed apart from
    # this code.
    assert (
        token_hash([1, 2], [3], [1])
        == "0150db95d939b90de67923f88b01f92d6eee39ee92b0348ec8a6d9980bad709f"
    )
    hashes = {
        token_hash([1, 2], [3], [1]),
        token_hash([1], [2, 3], [1]),
        token_hash([1, 2], [3], [0]),
    }
    assert len(hashes | {token_hash([1, 2, 3], [], [1]), token_hash([2, 1], [3], [1])}) == 5


def test_unsealed_shard_is_invisible(folder: Path) -> None:
    (folder / "b.sealed.json").unlink()
    assert sealed_shards(folder) == ["a"]
    assert not is_sealed(folder, "b")
    assert len(read_metadata(folder)) == 4
    with pytest.raises(MtopdError, match="sample 12 is in no sealed shard"):
        TokenStore(folder).get(12)
    (folder / "a.sealed.json").unlink()
    with pytest.raises(MtopdError, match="no sealed shard"):
        read_metadata(folder)


@pytest.mark.parametrize("stop_before", ["c.meta.parquet", "c.tokens.arrow", "c.sealed.json"])
def test_a_writer_killed_at_any_file_leaves_no_shard(
    folder: Path, monkeypatch, stop_before: str
) -> None:
    replace = os.replace

    def killed(source, target) -> None:
        if Path(target).name == stop_before:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(folder, "c", [trajectory(20)], generation=3)
    monkeypatch.undo()
    assert not is_sealed(folder, "c")
    assert sealed_shards(folder) == ["a", "b"]
    write_shard(folder, "c", [trajectory(20)], generation=3)
    assert TokenStore(folder).get(20) == trajectory(20)


def test_sealed_shard_is_never_overwritten(folder: Path) -> None:
    with pytest.raises(MtopdError, match="sealed by start 1 of the run, this is start 5"):
        write_shard(folder, "a", [trajectory(30)], generation=5)
    truncate(folder / "b.tokens.arrow")
    assert not is_sealed(folder, "b")
    with pytest.raises(MtopdError, match="sealed by start 2 of the run, this is start 1"):
        write_shard(folder, "b", [trajectory(30)], generation=1)
    write_shard(folder, "b", [trajectory(30)], generation=2)
    assert is_sealed(folder, "b")
    assert TokenStore(folder).get(30) == trajectory(30)


def test_a_damaged_shard_loses_its_seal_before_it_is_written_anew(
    folder: Path, monkeypatch
) -> None:
    truncate(folder / "b.tokens.arrow")
    monkeypatch.setattr(module, "write_atomic", lambda path, data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shard(folder, "b", [trajectory(30)], generation=2)
    assert sealed_shards(folder) == ["a"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["b.meta.parquet", "b.tokens.arrow"])
def test_truncated_or_missing_file_is_named(folder: Path, name: str) -> None:
    truncate(folder / name)
    for _ in range(2):
        assert not is_sealed(folder, "b")
        for read in (TokenStore, lambda f: verify_shard(f, "b")):
            with pytest.raises(MtopdError, match=f"{name} is damaged: it has"):
                read(folder)
        (folder / name).unlink(missing_ok=True)


def test_flipped_byte_of_metadata_is_refused_anywhere(folder: Path) -> None:
    path = folder / "b.meta.parquet"
    whole = path.read_bytes()
    for position in range(0, len(whole), 37):
        flip(path, position)
        with pytest.raises(MtopdError, match=r"b\.meta\.parquet is damaged: its sha256"):
            read_metadata(folder)
        path.write_bytes(whole)


def test_flipped_byte_of_tokens_never_gives_other_tokens(folder: Path) -> None:
    path = folder / "b.tokens.arrow"
    whole = path.read_bytes()
    expected = {k: trajectory(k, response_len=1 + k) for k in (10, 11, 12)}
    refused = 0
    for position in range(0, len(whole), 19):
        flip(path, position)
        with pytest.raises(MtopdError, match=r"b\.tokens\.arrow is damaged"):
            verify_shard(folder, "b")
        try:
            store = TokenStore(folder)
            found = {k: store.get(k) for k in expected}
        except MtopdError as error:
            refused += "b.tokens.arrow" in str(error)
        else:
            # Padding and log-probs are outside the token hash; tokens, mask and order are not.
            unhashed = {k: dataclasses.replace(t, rollout_log_probs=()) for k, t in found.items()}
            assert unhashed == {
                k: dataclasses.replace(t, rollout_log_probs=()) for k, t in expected.items()
            }
        path.write_bytes(whole)
    assert refused > 25


def test_flipped_token_is_refused_on_first_read_by_file_and_sample(folder: Path) -> None:
    path = folder / "b.tokens.arrow"
    ids = np.asarray(trajectory(11, response_len=12).response_ids, np.int32).tobytes()
    flip(path, path.read_bytes().index(ids) + 4)
    store = TokenStore(folder)
    assert store.get(10) == trajectory(10, response_len=11)
    with pytest.raises(
        MtopdError, match=r"b\.tokens\.arrow is damaged: the tokens of sample 11 do not match"
    ):
        store.get(11)


def test_damaged_or_foreign_seal_is_refused(folder: Path) -> None:
    path = folder / "b.sealed.json"
    seal = json.loads(path.read_text())
    for text, message in [
        ("{", "not valid JSON"),
        (
            json.dumps({**seal, "schema_version": 2}),
            "schema_version 2; this version of mtopd reads 1",
        ),
        ("[]", "schema_version None"),
        (json.dumps({**seal, "files": {}}), "is damaged: it must hold"),
        (json.dumps({**seal, "num_samples": 5}), "it has 3 samples, sealed were 5"),
    ]:
        path.write_text(text)
        with pytest.raises(MtopdError, match=message) as caught:
            read_metadata(folder)
        assert str(folder) in str(caught.value)


def test_one_sample_id_in_two_shards_is_refused(folder: Path) -> None:
    write_shard(folder, "c", [trajectory(20), trajectory(2)], generation=2)
    with pytest.raises(
        MtopdError, match=r"sample_id 2 is in .*a\.meta\.parquet and again in .*c\.meta\.parquet"
    ):
        TokenStore(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": ()}, "prompt has 0 and response 5 tokens"),
        ({"response_ids": ()}, "response 0 tokens"),
        ({"loss_mask": (1,) * 4}, "loss_mask has 4 and rollout_log_probs 5 entries for 5"),
        ({"rollout_log_probs": (0.0,) * 6}, "rollout_log_probs 6 entries"),
        ({"loss_mask": (0, 1, 2, 1, 1)}, "only 0 and 1"),
        ({"rollout_log_probs": (0.0, float("-inf"), 0.0, 0.0, 0.0)}, "not finite"),
        ({"finish_reason": "abort"}, "finish_reason is 'abort'"),
    ],
)
def test_broken_trajectory_is_not_written(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"trajectory 3 \(rot/3\).*{message}"):
        write_shard(tmp_path, "a", [trajectory(1), trajectory(3, **changes)], generation=1)
    assert list(tmp_path.iterdir()) == []


def test_impossible_shards_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trajectories"):
        write_shard(tmp_path, "a", [], generation=1)
    with pytest.raises(ValueError, match="one sample_id"):
        write_shard(tmp_path, "a", [trajectory(1), trajectory(1)], generation=1)
    for name in ("", "../a", ".a"):
        with pytest.raises(ValueError, match="cannot name a shard"):
            write_shard(tmp_path, name, [trajectory(1)], generation=1)


def reseal(folder: Path, name: str) -> None:
    """Seal whatever files are there, as a careless harness would."""
    seal = json.loads((folder / f"{name}.sealed.json").read_text())
    for file in seal["files"]:
        data = (folder / file).read_bytes()
        seal["files"][file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / f"{name}.sealed.json").write_text(json.dumps(seal))


def rewrite_tokens(folder: Path, change) -> None:
    path = folder / "a.tokens.arrow"
    with pa.OSFile(str(path)) as source:
        table = change(pa.ipc.open_file(source).read_all())
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    reseal(folder, "a")


def replace_column(table: pa.Table, name: str, values: list, type_: pa.DataType) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, type_))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["loss_mask"]), "needs one column loss_mask of type list"),
        (
            lambda t: replace_column(t, "prompt_ids", [[1]] * 4, pa.list_(pa.int64())),
            "column prompt_ids of type",
        ),
        (
            lambda t: replace_column(t, "prompt_ids", [[1], None] * 2, pa.list_(pa.int32())),
            "prompt_ids has nulls",
        ),
        (
            lambda t: replace_column(t, "prompt_ids", [[None]] * 4, pa.list_(pa.int32())),
            "nulls inside its lists",
        ),
        (lambda t: t.slice(0, 3), "sample ids are not those"),
        (lambda t: t.take([1, 0, 2, 3]), "sample ids are not those"),
        (
            lambda t: replace_column(t, "loss_mask", [[1] * 4] * 4, pa.list_(pa.uint8())),
            "lengths of loss_mask",
        ),
    ],
)
def test_a_shard_of_another_harness_that_breaks_the_format_is_refused(
    folder: Path, change, message: str
) -> None:
    rewrite_tokens(folder, change)
    with pytest.raises(MtopdError, match=rf"a\.tokens\.arrow does not fit version 1.*{message}"):
        TokenStore(folder)


def test_a_shard_of_another_harness_may_have_longer_teacher_prompts(folder: Path) -> None:
    contexts = [[9, 9, 9], None, None, None]
    rewrite_tokens(
        folder, lambda t: replace_column(t, "teacher_prompt_ids", contexts, pa.list_(pa.int32()))
    )
    rewrite_tokens(folder, lambda t: pa.table({name: t[name] for name in reversed(t.schema.names)}))
    store = TokenStore(folder)
    assert store.tokens(0).teacher_prompt_ids.tolist() == [9, 9, 9]
    assert store.get(1) == trajectory(1), "several record batches, nullable columns, another order"
    with pytest.raises(MtopdError, match=r"sample 0 .* teacher_prompt_ids"):
        store.get(0)


def test_metadata_of_another_harness_is_cast_but_not_guessed(folder: Path) -> None:
    path = folder / "a.meta.parquet"
    table = pq.read_table(path)
    wider = replace_column(table, "prompt_len", table["prompt_len"].to_pylist(), pa.int64())
    pq.write_table(wider, path)
    reseal(folder, "a")
    assert TokenStore(folder).get(3) == trajectory(3)
    for broken in (
        table.drop_columns(["teacher_index"]),
        replace_column(table, "teacher_index", [0, None, 0, 0], pa.int32()),
    ):
        pq.write_table(broken, path)
        reseal(folder, "a")
        with pytest.raises(MtopdError, match=r"a\.meta\.parquet is no version 1 metadata"):
            read_metadata(folder)


def test_wrong_count_of_loss_tokens_is_refused(folder: Path) -> None:
    path = folder / "a.meta.parquet"
    table = pq.read_table(path)
    pq.write_table(replace_column(table, "num_loss_tokens", [0, 0, 0, 0], pa.int32()), path)
    reseal(folder, "a")
    with pytest.raises(MtopdError, match="loss_mask of sample 0 must hold 0 ones"):
        TokenStore(folder).get(0)


def test_trajectories_import_no_torch() -> None:
    code = "import sys, mtopd.trajectories; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
