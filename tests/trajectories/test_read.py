"""Trajectories survive the disk exactly; what is unsealed is invisible and what is damaged is
refused by name.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtopd.trajectories import (
    TokenStore,
    read_metadata,
    read_shard_metadata,
    sample_metadata,
    sealed_shards,
    shard_is_sealed,
    token_hash,
    verify_shards,
    write_shard,
)
from mtopd.trajectories import format as format_module
from mtopd.types import MtopdError, SampleMetadata
from tests.conftest import run_ranks
from tests.trajectories.shards import flip, reseal, trajectory, truncate


def test_round_trip_is_exact(folder: Path) -> None:
    assert sealed_shards(folder) == ["a", "b"]
    store = TokenStore(folder)
    for k in range(4):
        assert store.get(k) == trajectory(k)
    for k in (10, 11, 12):
        assert store.get(k) == trajectory(k, response_len=1 + k)
        assert store.get(k) == store.get(k)
    assert [os.path.basename(p) for p in folder.iterdir() if ".tmp" in p.name] == []


def test_planning_metadata_needs_no_tokens(folder: Path) -> None:
    for path in folder.glob("*.tokens.arrow"):
        path.unlink()
    metadata = read_metadata(folder)
    assert metadata.schema.equals(format_module.METADATA_SCHEMA)
    samples = sample_metadata(metadata)
    t = trajectory(12, response_len=13)
    hashed = token_hash(t.prompt_ids, t.response_ids, t.loss_mask)
    assert samples[4] == SampleMetadata(12, 0, 1, 13, sum(t.loss_mask), hashed)
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


def test_unsealed_shard_is_invisible(folder: Path) -> None:
    (folder / "b.sealed.json").unlink()
    assert sealed_shards(folder) == ["a"]
    assert not shard_is_sealed(folder, "b")
    assert len(read_metadata(folder)) == 4
    with pytest.raises(MtopdError, match="sample 12 is in no sealed shard"):
        TokenStore(folder).get(12)
    (folder / "a.sealed.json").unlink()
    with pytest.raises(MtopdError, match="no sealed shard"):
        read_metadata(folder)


@pytest.mark.parametrize("name", ["b.meta.parquet", "b.tokens.arrow"])
def test_truncated_or_missing_file_is_named(folder: Path, name: str) -> None:
    truncate(folder / name)
    for _ in range(2):
        assert not shard_is_sealed(folder, "b")
        for read in (TokenStore, verify_shards):
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


def test_flipped_byte_of_tokens_is_refused_anywhere(folder: Path) -> None:
    path = folder / "b.tokens.arrow"
    whole = path.read_bytes()
    for position in range(0, len(whole), 19):
        flip(path, position)
        with pytest.raises(MtopdError, match=r"b\.tokens\.arrow is damaged: its sha256"):
            verify_shards(folder)
        try:  # what is not verified opens, or is refused by name
            TokenStore(folder).get(11)
        except MtopdError as error:
            assert "b.tokens.arrow" in str(error)
        path.write_bytes(whole)
    verify_shards(folder)


def test_what_one_rank_sees_otherwise_is_refused_on_every_rank(folder: Path) -> None:
    """A flipped token, though one rank of each node reads; listings that are not the same."""
    path = folder / "b.tokens.arrow"
    ids = np.asarray(trajectory(11, response_len=12).response_ids, np.int32).tobytes()
    flip(path, path.read_bytes().index(ids) + 4)
    output = run_ranks(4, Path(__file__).with_name("verify_ranks.py"), str(folder))
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert sorted(result["rank"] for result in results) == [0, 1, 2, 3]
    host = re.escape(socket.gethostname())
    for result in results:
        found, num_reads, _ = result["damaged"]
        assert re.search(
            rf"^rank 2 on host {host}: .*b\.tokens\.arrow is damaged: its sha256", found
        )
        assert num_reads == (1 if result["rank"] in (0, 2) else 0)
        # Where all see the same that costs one reduction of two numbers, whatever is compared.
        assert result["alike"] == [["a", "b"], 1, ["all_reduce"]]
        for case, said in (
            ("stale", r"rank 1 on host X lists 1 shards \(.{8}\), rank 0 on host X lists 2 shards"),
            (
                "stale first",
                r"rank 1 on host X \(and 2 more ranks: 2 on host X\) lists 2 .*, rank 0 .* 1 ",
            ),
            ("too late", r"rank 2 on host X lists 1 "),
            ("vanished", r"rank 3 on host X: .*nothing: No such file"),
            ("not gathered", r"rank 3 on host X: .*nothing: No such file"),
            ("refused", r"rank 0 looked$"),
        ):
            assert re.match(said.replace("X", host), result[case][0]), result[case]
        assert "listing is stale" in result["stale"][0]
        assert result["late"][:2] == [["a", "b"], 3], "they look again while some see less"
        assert result["too late"][1] == 3
        assert result["no GPU"][0] == "cpu"
        assert result["two on each host"][0] == f"cuda:{result['rank'] % 2}"
        assert result["its own"][0] == "cuda:0"
        assert "host node1 has 1 GPUs for 2 ranks" in result["one too few"][0], "and nobody waits"
        assert result["gathered"][0] == [0, 1, 2, 3] and result["decided"][0] == 0


def test_a_hash_of_other_tokens_is_refused_though_it_is_sealed(folder: Path) -> None:
    """Rows of the hidden cache are found by it: another harness may not make it up."""
    path = folder / "a.meta.parquet"
    table = pq.read_table(path)
    hashes = table["token_hash"].to_pylist()
    made_up = replace_column(table, "token_hash", [*hashes[:2], "0" * 64, hashes[3]], pa.string())
    pq.write_table(made_up, path)
    reseal(folder, "a")
    with pytest.raises(MtopdError, match=r"a\.tokens\.arrow is damaged: the tokens of sample 2 "):
        verify_shards(folder)


def test_an_opening_reads_each_seal_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, original = Counter(), io.open

    def counted(path, *args, **kwargs):
        opened[Path(path).name] += 1
        return original(path, *args, **kwargs)

    monkeypatch.setattr(io, "open", counted)  # pathlib's
    monkeypatch.setattr("builtins.open", counted)
    readings = {
        TokenStore: {"a.sealed.json": 1, "b.sealed.json": 1},
        read_metadata: {"a.sealed.json": 1, "b.sealed.json": 1},
        verify_shards: {"a.sealed.json": 1, "b.sealed.json": 1},
        lambda folder: read_shard_metadata(folder, "b"): {"b.sealed.json": 1},
        lambda folder: shard_is_sealed(folder, "b"): {"b.sealed.json": 1},
    }
    for read, expected in readings.items():
        opened.clear()
        read(folder)
        assert {n: count for n, count in opened.items() if n.endswith(".json")} == expected


def test_damaged_or_foreign_seal_is_refused(folder: Path) -> None:
    path = folder / "b.sealed.json"
    seal = json.loads(path.read_text())
    for text, message in [
        ("{", "not valid JSON"),
        (
            json.dumps({**seal, "schema_version": 3}),
            "schema_version 3; this version of mtopd reads 1 and 2",
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


def rewrite_tokens(folder: Path, change, max_chunksize: int = 1) -> None:
    path = folder / "a.tokens.arrow"
    with pa.OSFile(str(path)) as source:
        table = change(pa.ipc.open_file(source).read_all())
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max_chunksize)
    reseal(folder, "a")


def replace_spans(table: pa.Table, spans: list[tuple[int, int]]) -> pa.Table:
    """The last sample's, of five tokens."""
    values = [*table["version_spans"].to_pylist()[:-1]]
    values.append([{"start": start, "version": version} for start, version in spans])
    return replace_column(table, "version_spans", values, table["version_spans"].type)


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
        (lambda t: replace_spans(t, []), "version_spans of a sample is empty"),
        (lambda t: replace_spans(t, [(1, 7)]), "version_spans begin at 0 and ascend"),
        (lambda t: replace_spans(t, [(0, 7), (0, 7)]), "version_spans begin at 0 and ascend"),
        (lambda t: replace_spans(t, [(0, 7), (5, 7)]), "version_spans begin at 0 and ascend"),
        (lambda t: replace_spans(t, [(0, 7), (2, 8)]), "are not those of student_version"),
        (lambda t: replace_spans(t, [(0, 6), (2, 7)]), "are not those of student_version"),
    ],
)
def test_a_shard_of_another_harness_that_breaks_the_format_is_refused(
    folder: Path, change, message: str
) -> None:
    rewrite_tokens(folder, change)
    with pytest.raises(MtopdError, match=rf"a\.tokens\.arrow does not fit version 2.*{message}"):
        TokenStore(folder)


def test_a_shard_of_another_harness_may_have_other_batches_and_columns_in_another_order(
    folder: Path,
) -> None:
    rewrite_tokens(folder, lambda t: pa.table({name: t[name] for name in reversed(t.schema.names)}))
    store = TokenStore(folder)
    assert store.tokens(2).teacher_prompt_ids.tolist() == [0, 1, 2, 3, 4]
    assert [store.get(k) for k in range(4)] == [trajectory(k) for k in range(4)]


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        ([None, None, [0, 1, 2, 3], None], "lengths of teacher_prompt_ids"),
        ([None, None, None, None], "lengths of teacher_prompt_ids"),
        ([None, [], [0, 1, 2, 3, 4], None], "teacher_prompt_ids is empty"),
    ],
)
def test_teacher_prompts_that_planning_does_not_know_are_refused(
    folder: Path, contexts: list, message: str
) -> None:
    """A pass that read the student's prompt instead would give the wrong rows under the right key."""
    rewrite_tokens(
        folder, lambda t: replace_column(t, "teacher_prompt_ids", contexts, pa.list_(pa.int32()))
    )
    with pytest.raises(MtopdError, match=rf"a\.tokens\.arrow does not fit version 2.*{message}"):
        TokenStore(folder)


def test_a_hash_of_another_teacher_prompt_is_found(folder: Path) -> None:
    contexts = [None, None, [0, 1, 2, 3, 9], None]
    rewrite_tokens(
        folder, lambda t: replace_column(t, "teacher_prompt_ids", contexts, pa.list_(pa.int32()))
    )
    TokenStore(folder)
    with pytest.raises(MtopdError, match="the tokens of sample 2 do not match their hash"):
        verify_shards(folder)
    path = folder / "a.meta.parquet"
    table = pq.read_table(path)
    pq.write_table(replace_column(table, "teacher_prompt_hash", [""] * 4, pa.string()), path)
    reseal(folder, "a")
    with pytest.raises(MtopdError, match="teacher_prompt_hash must be empty where"):
        TokenStore(folder)


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
        with pytest.raises(MtopdError, match=r"a\.meta\.parquet is no version 2 metadata"):
            read_metadata(folder)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("sample_id", range(4))
def test_loss_masks_are_refused_by_sample(folder: Path, sample_id: int, batched: bool) -> None:
    """Another number of ones than the metadata's, or as large a sum of other values."""
    masks = [list(trajectory(k).loss_mask) for k in range(4)]
    sums = [sum(mask) for mask in masks]
    for changed in ([1, 1, 1, 1, 1], [2, 0, 0, 0, 0], [255, 1, 0, 0, 0], [0, 0, 0, 0, 0]):
        wrong = [*masks[:sample_id], changed, *masks[sample_id + 1 :]]
        if changed == masks[sample_id]:
            continue
        rewrite_tokens(
            folder,
            lambda t, wrong=wrong: replace_column(t, "loss_mask", wrong, pa.list_(pa.uint8())),
            max_chunksize=1 if batched else 4,
        )
        message = f"loss_mask of sample {sample_id} must hold {sums[sample_id]} ones, else zeros"
        with pytest.raises(MtopdError, match=rf"a\.tokens\.arrow .*{message}"):
            TokenStore(folder)


def test_wrong_count_of_loss_tokens_is_refused(folder: Path) -> None:
    path = folder / "a.meta.parquet"
    table = pq.read_table(path)
    pq.write_table(replace_column(table, "num_loss_tokens", [0, 0, 0, 0], pa.int32()), path)
    reseal(folder, "a")
    with pytest.raises(MtopdError, match="loss_mask of sample 0 must hold 0 ones"):
        TokenStore(folder).get(0)


def test_spans_of_versions_come_back(folder: Path) -> None:
    spans = ((0, 5), (2, 6), (4, 7))
    written = trajectory(30, version_spans=spans)
    write_shard(folder, "c", [trajectory(29), written], generation=2)
    store = TokenStore(folder)
    assert store.get(30) == written and store.tokens(30).version_spans == spans
    oldest = dict(
        zip(*(store.metadata[n].to_pylist() for n in ("sample_id", "oldest_version")), strict=True)
    )
    assert (oldest[29], oldest[30]) == (7, 5)


def test_tokens_of_older_students_have_no_loss(folder: Path) -> None:
    """Versions need not ascend: a start may go on with an older student than a killed one had."""
    written = trajectory(
        30, response_len=8, version_spans=((0, 7), (2, 5), (5, 6), (6, 7)), loss_mask=(1, 0) * 4
    )
    write_shard(folder, "c", [written], generation=2)
    fields = TokenStore(folder).tokens(30)
    assert fields.versions().tolist() == [7, 7, 5, 5, 5, 6, 7, 7]
    assert fields.loss_mask_since(5) is fields.loss_mask
    assert fields.loss_mask_since(6).tolist() == [1, 0, 0, 0, 0, 0, 1, 0]
    assert fields.loss_mask_since(7).tolist() == [1, 0, 0, 0, 0, 0, 1, 0]
    assert fields.loss_mask_since(8).tolist() == [0] * 8


NEW = ["oldest_version", "teacher_prompt_len", "teacher_prompt_hash"]  # since version 1


def test_version_1_is_read(tmp_path: Path) -> None:
    """It has no oldest_version: one student sampled a response."""
    folder = tmp_path
    write_shard(folder, "a", [trajectory(k) for k in (0, 1, 3)], generation=1)
    path = folder / "a.meta.parquet"
    pq.write_table(pq.read_table(path).drop_columns(NEW), path)
    reseal(folder, "a")
    seal = folder / "a.sealed.json"
    seal.write_text(json.dumps({**json.loads(seal.read_text()), "schema_version": 1}))
    store = TokenStore(folder)
    assert store.get(3) == trajectory(3)
    assert set(store.metadata["oldest_version"].to_pylist()) == {7}
