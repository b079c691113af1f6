"""YAML as settings need it: what reads in two ways is refused with its line."""

from __future__ import annotations

import random
from datetime import date
from pathlib import Path

import pytest
import yaml

from mtopd.types import MtopdError
from mtopd.yaml_file import dump_yaml, parse_yaml, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
MERGED_BOMB = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}], k{i}: 1}}\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: .* key 'a' stands twice, first in line 1"),
        ("t:\n  x: 1\n  'x': 2\n", "line 3: .* key 'x' stands twice, first in line 2"),
        ("1: a\n0x1: b", "line 2: .* key '0x1' stands twice"),
        ("- {a: 1, a: 1}", "line 1: .* key 'a' stands twice"),
        ("a: &t {x: 1}\nb: {<<: *t, <<: *t}", "line 2: .* key '<<' stands twice"),
        ("a: &t {x: 1, x: 2}\nb: {<<: *t}", "line 1: .* key 'x' stands twice"),
        ("? [a]\n: 1", "line 1: .* a key must be a word"),
        ("? {a: 1}\n: 1", "line 1: .* a key must be a word"),
        ("a: 1\nb: !!python/name:os.system ''", "line 2: .* tag .*os.system"),
        ("a: !!binary aGk=", "tag 'tag:yaml.org,2002:binary' is not read"),
        ("a: !mine x", "tag '!mine' is not read"),
        ("a: &x [*x]", r"line 1: .* \*x stands inside what it names"),
        (BOMB, "line 5: .* expand to more than 100,000 values"),
        (MERGED_BOMB, "expand to more than 100,000 values"),
        ("[" * 3000, "nested too deeply"),
        ("a:\n - 012", "line 2: .* 012 reads in two ways"),
        ("a: 1:30", "1:30 reads in two ways"),
        (
            "a: 1\nroute: {lang: no}",
            "line 2: .* no reads in two ways; write true or false, or quote",
        ),
        ("{On: 1}", "On reads in two ways"),
        ("a: 1:30.5", "no finite number"),
        ("a: .nan", "line 1: .* .nan is no finite number"),
        ("a: -.inf", "no finite number"),
        ("a: 1e999", "no finite number"),
        ("a: " + "9" * 5000, "a number is too large"),
        ('a: "\\ud800"', "half of a character"),
        ('a: "\\UFFFFFFFF"', "line 1: not valid YAML"),
        ("a: 1\nb: \x07", "line 2: .* is not allowed"),
        ("a: 1\n b: 2", "line 2: "),
        ("a: [1", "line 1: "),
        ("a: 1\n---\nb: 2", "line 2: .* another document"),
        ("*a", "undefined alias"),
        ("a: 1\n\tb: 2", "line 2: "),
    ],
)
def test_what_is_refused_names_its_line(text: str, said: str) -> None:
    with pytest.raises(MtopdError, match=f"^here, .*{said}") as error:
        parse_yaml(text, "here")
    assert "\n" not in str(error.value)


def test_plain_values_are_read() -> None:
    text = """
    numbers: [1, 1_000, 0x10, -3, 1.5, 1e3, 2E-3, .5]
    truths: [true, False, TRUE]
    texts: [y, 'no', a, '012', 2026-01-02, =, "1:30", v1.2.3]
    nothing: [~, null, ]
    base: &base {lr: 1, decay: linear}
    mine: {<<: *base, lr: 2}
    """
    assert parse_yaml(text, "here") == {
        "numbers": [1, 1000, 16, -3, 1.5, 1000.0, 2e-3, 0.5],
        "truths": [True, False, True],
        "texts": ["y", "no", "a", "012", "2026-01-02", "=", "1:30", "v1.2.3"],
        "nothing": [None, None],
        "base": {"lr": 1, "decay": "linear"},
        "mine": {"lr": 2, "decay": "linear"},
    }


def test_what_is_written_reads_back() -> None:
    texts = ["1e3", "012", "1:30", "2026-01-02", "=", "<<", "yes", "~", "", " a", "é\U0001f600"]
    values = {text: {"text": text, "list": [text, 1, 2.5e-7, None]} for text in texts}
    assert parse_yaml(dump_yaml(values), "here") == values


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"a: 1\nb: \xff\n", "line 2: not UTF-8 text"),
        (b"x" * (1 << 21), "larger than"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "c.yaml").write_bytes(data)
    with pytest.raises(MtopdError, match=rf"c\.yaml.* {said}"):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(MtopdError, match=r"cannot read config .*: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_yaml(tmp_path / "c.yaml") == {"a": 1}


def test_any_text_is_read_as_yaml_reads_it_or_refused() -> None:
    """Random texts of YAML's own characters: never another exception, never another value."""
    rng = random.Random(20261128)
    pieces = [*"abxy01.:-[]{},&*#|>?'\"!~ \n", "\n  ", ": ", "- ", "&a ", "*a", "<<: ", "e3", "\\u"]
    num_read = 0
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 30)))
        try:
            found = parse_yaml(text, "here")
        except MtopdError as error:
            assert "here, line" in str(error) and "\n" not in str(error)
            continue
        num_read += 1
        expected = yaml.safe_load(text)
        if not isinstance(expected, date):
            assert repr(found) == repr(expected) or "e3" in text or "=" in text, text
    assert num_read > 300
