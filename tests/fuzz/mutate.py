"""Damaged inputs, drawn by a random generator: of text, of bytes, and of what a format holds.

What users hand in is rarely random noise: a download was cut, a tool wrote another type, a key was
renamed, a file was edited by hand.  Half of the mutations therefore keep the container sound and
change a value in it; the others damage the bytes.
"""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 11422654\n"
)
# Values of another type or size than anybody expects.
_ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "0", "-1", "null", "\u0000", "\ud800", "a\nb", "../x", "/dev/null", "~", "é" * 300, [], {}, [[]],
    [None], [1, "a"], {"a": {"b": []}}, {"": 0}, ["x"] * 50,
)  # fmt: skip


def mutate(kind: str, data: bytes, rng: random.Random) -> bytes:
    """``data`` of a file of ``kind`` (a key of MUTATIONS), changed at one to three places."""
    if rng.random() < 0.5:
        return _damage(data, rng)
    return MUTATIONS[kind](data, rng)


# -- bytes -----------------------------------------------------------------------------------------
def _damage(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out) + 1)
        how = rng.randrange(9)
        if how == 0:
            del out[at:]
        elif how == 1:
            del out[at : at + rng.randint(1, 64)]
        elif how == 2:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 16)))
        elif how == 3:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 4:
            piece = out[at : at + rng.randint(1, 200)]
            out[at:at] = piece  # a part twice
        elif how == 5 and len(out) > at:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 6:
            out[:0] = rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\n\n", b"<html>"])
        elif how == 7:
            out += rng.choice([b"\x00" * 100, b"}", b"]", b"\n", data[:50]])
        else:
            out = bytearray(
                rng.choice([b"", b" ", LFS_POINTER, b"null", b"[]", b"{}", b"[" * 100_000])
            )
    return bytes(out)


# -- values ----------------------------------------------------------------------------------------
def _change(value: Any, rng: random.Random) -> Any:
    """The value with one place in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        how = rng.randrange(6)
        if how == 0:
            return {k: v for k, v in value.items() if k != key}
        if how == 1:
            return {(k + "_" if k == key else k): v for k, v in value.items()}
        if how == 2:
            return {**value, key: rng.choice(_ODD)}
        if how == 3:
            return {**value, f"{key}2": value[key]}
        return {**value, key: _change(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        how = rng.randrange(4)
        if how == 0:
            return value[:at] + value[at + 1 :]
        if how == 1:
            return [*value, value[at]]
        return [*value[:at], _change(value[at], rng), *value[at + 1 :]]
    if isinstance(value, bool) or not isinstance(value, int | float | str) or rng.random() < 0.5:
        return rng.choice(_ODD)
    if isinstance(value, str):
        return rng.choice([value + "x", value[1:], value.upper(), value * 20, f" {value} "])
    return rng.choice(
        [value + 1, value - 1, -value, value * 2, value * 1000, str(value), float(value)]
    )


def _changed(value: Any, rng: random.Random) -> Any:
    for _ in range(rng.randint(1, 3)):
        value = _change(value, rng)
    return value


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _json(data: bytes, rng: random.Random) -> bytes:
    text = _dump(_changed(json.loads(data), rng))
    if rng.random() < 0.1 and text.startswith(b'{"'):  # a key twice
        text = b'{"' + text[2:].split(b'"')[0] + b'": ' + _dump(rng.choice(_ODD)) + b", " + text[1:]
    return text


def _jsonl(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = _json(lines[at], rng)
    if rng.random() < 0.3:
        message = {"role": "user", "content": "abc"}
        conversation = _changed([message, {"role": "assistant", "content": "de"}, message], rng)
        lines[at] = _dump({"prompt": conversation, "tools": _changed([{"type": "function"}], rng)})
    return b"\n".join(lines)


def _header(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.3:
        return (
            struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**40, 2**64 - 1]))
            + data[8:]
        )
    header = _dump(_changed(json.loads(header), rng))
    return struct.pack("<Q", len(header)) + header + body


def _yaml(data: bytes, rng: random.Random) -> bytes:
    text = yaml.safe_dump(_changed(yaml.safe_load(data), rng), sort_keys=False)
    lines = text.splitlines()
    at = rng.randrange(len(lines) + 1)
    if rng.random() < 0.4:
        lines[at:at] = rng.choice(
            [lines[at : at + 1], ["\tx: 1"], ["? [a]"], ["<<: *nothing"], ["seed: &a [*a]"], ["seed: 1e999"],
             ["!!python/object/apply:os.system ['true']"], ["{"], ["- 1"],
             ["a: &a [x,x]", "b: &b [*a,*a]", "c: [*b,*b]"],
             ["seed: 0x10", "seed: 010"], ["---"], ["seed: 2001-01-01"], ["? {a: 1}", ": 2"]]
        )  # fmt: skip
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _parquet(data: bytes, rng: random.Random) -> bytes:
    table = pq.read_table(io.BytesIO(data))
    n = table.num_rows
    message = {"role": "user", "content": "abc"}
    columns: list[Callable[[], Any]] = [
        lambda: pa.array([rng.choice([None, 1.0, float("nan"), float("inf")]) for _ in range(n)]),
        lambda: pa.array([[message]] * n),
        lambda: pa.array([[message, None]] * n),
        lambda: pa.array([[{**message, "name": None}]] * n),
        lambda: pa.array([{"ground_truth": "1", "style": "rule"}] * n),
        lambda: pa.array([b"\xff\x00"] * n),
        lambda: pa.nulls(n),
        lambda: pa.array([["a", None]] * n),
        lambda: pa.array(range(n), pa.timestamp("us")),
        lambda: pa.array(["abc"] * n).dictionary_encode(),
        lambda: pa.array([None, *["abc"] * (n - 1)]),
        lambda: pa.array([[]] * n, pa.list_(pa.string())),
        lambda: pa.array([True] * n),
        lambda: pa.array([2**63] * n, pa.uint64()),
        lambda: pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64())),
        lambda: pa.array(["\x00"] * n, pa.large_string()),
    ]
    for _ in range(rng.randint(1, 2)):
        name = rng.choice([*table.column_names, "messages", "tools", "reward_model", "extra"])
        if name in table.column_names:
            table = table.drop_columns([name])
        if rng.random() < 0.9:
            table = table.append_column(name, rng.choice(columns)())
    if rng.random() < 0.1:
        table = table.slice(0, 0)
    out = io.BytesIO()
    pq.write_table(table, out, compression=rng.choice(["none", "zstd", "snappy", "gzip"]))
    return out.getvalue()


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "config.json": _json,
    "tokenizer.json": _json,
    "tokenizer_config.json": _json,
    "model.safetensors.index.json": _json,
    "model.safetensors": _header,
    "prompts.jsonl": _jsonl,
    "prompts.parquet": _parquet,
    "config.yaml": _yaml,
}
