r"""The answer inside a response, and when two answers count as the same.

Where an answer stands (``answer_from`` of a source) and what is overlooked in comparing
(``normalize``) are plain data, so that they travel in ``Prompt.verify`` to any process.

A response is arbitrary text, maybe meant to hurt: all of this takes time proportional to its
length.  A user's regular expression is therefore one of RE2's (through Arrow), which never goes back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc

from mtopd.types import MtopdError

AnswerFrom = str | Mapping[str, str]  # "last_number", "boxed", {"tag": name}, {"regex": pattern}

# A minus directly behind a word is a hyphen or a subtraction.  Quantifiers are possessive (`++`):
# what they took they keep, so that a long row of digits costs its length once.
_NUMBER = re.compile(
    r"((?<![\w)])[-+\u2212])?\$?(?:([0-9][0-9,]*+)(\.[0-9]++)?|((?<![0-9])\.[0-9]++))"
    r"([eE][-+]?[0-9]++)?"
)
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})++")
_WHOLE_NUMBER = re.compile(
    r"([-+\u2212]?)\$?([0-9]{1,3}(?:,[0-9]{3})++|[0-9]*+)(?:\.([0-9]*+))?(?:[eE]([-+]?[0-9]{1,18}))?"
)
_MINUS = ("-", "\u2212")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*$")
# LaTeX that sets an answer without being a part of it
_WRAPPED = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_LATEX_NOISE = re.compile(r"\\[()\[\],;:!]|\\(?:left|right)(?![a-zA-Z])|\$")


def find_answer(text: str, answer_from: AnswerFrom | None) -> str:
    """The part of ``text`` that is compared, stripped: all of it where ``answer_from`` is None, or
    where what it looks for is not there.
    """
    found: str | None = None
    if answer_from == "last_number":
        found = _last_number(text)
    elif answer_from == "boxed":
        found = _boxed(text)
    elif isinstance(answer_from, Mapping):
        (kind, value) = next(iter(answer_from.items()))
        found = _tagged(text, value) if kind == "tag" else _matched(text, value)
    return (found or text).strip()


def same_answer(
    response: str,
    answer: str,
    *,
    answer_from: AnswerFrom | None = None,
    normalize: Sequence[str] = (),
) -> bool:
    """Whether a response gives the answer.  What counts of the answer itself is found the same way,
    so that an answer may be a worked solution, too.
    """
    steps = {*normalize, *(["number"] if answer_from == "last_number" else [])}
    said, right = (normalized(find_answer(text, answer_from), steps) for text in (response, answer))
    return said == right


def normalized(text: str, steps: Sequence[str] | set[str]) -> str:
    """``text`` less what ``steps`` overlook; their order is fixed."""
    for name, step in _STEPS.items():
        if name in steps:
            text = step(text).strip()
    return text


def has_number(text: str) -> bool:
    return _last_number(text) is not None


def _last_number(text: str) -> str | None:
    """Without + and without commas between thousands."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    sign, whole, part, fraction, exponent = numbers[-1]
    whole = whole.rstrip(",")
    if "," in whole and not _THOUSANDS.fullmatch(whole):
        sign, whole = "", whole.rpartition(",")[2]  # 3,4 are two numbers
    minus = "-" if sign in _MINUS else ""
    return f"{minus}{whole.replace(',', '')}{part}{fraction}{exponent}"


def _boxed(text: str) -> str | None:
    r"""Inside the last \boxed{...} whose braces close."""
    found, opened = None, []
    position = 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # what follows is escaped, or the name of a command
        elif character == "{":
            opened.append((position, _BOXED.search(text, max(0, position - 12), position)))
        elif character == "}" and opened:
            start, is_box = opened.pop()
            found = text[start + 1 : position] if is_box else found
        position += 1
    return found


def _tagged(text: str, tag: str) -> str | None:
    """Inside the last <tag>...</tag>; behind the last <tag> where none is closed, as when a stop
    text has taken the end away.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    stop = text.rfind(closing)
    if stop >= 0 and (start := text.rfind(opening, 0, stop)) >= 0:
        return text[start + len(opening) : stop]
    start = text.rfind(opening)
    return text[start + len(opening) :] if start >= 0 else None


def _matched(text: str, pattern: str) -> str | None:
    """The first group, or else all, of the first match."""
    # Half a surrogate pair is no text for Arrow.
    scalar = pa.scalar(text.encode("utf-8", "replace").decode())
    if not pc.match_substring_regex(scalar, pattern=pattern).as_py():
        return None
    group = rf"\{1 + _has_group(pattern)}"
    found = pc.replace_substring_regex(scalar, pattern=_around(pattern), replacement=group)
    return str(found.as_py())


def _around(pattern: str) -> str:
    """The whole text, with the first match of ``pattern`` as group 1."""
    return rf"\A(?s:.*?)({pattern})(?s:.*)\z"


@cache
def _has_group(pattern: str) -> bool:
    try:
        pc.replace_substring_regex(pa.scalar(""), pattern=pattern, replacement=r"\1")
    except pa.ArrowInvalid:
        return False
    return True


def check_pattern(pattern: str) -> None:
    """Raise MtopdError unless ``pattern`` is a regular expression of RE2."""
    try:
        for part in (pattern, _around(pattern)):
            pc.match_substring_regex(pa.scalar(""), pattern=part)
    except (pa.ArrowInvalid, UnicodeError) as error:
        raise MtopdError(
            f"answer_from.regex {pattern!r} cannot be used ({error}); it must be a regular "
            "expression as RE2 reads them: no look-ahead, look-behind or back-references"
        ) from None


def _without_period(text: str) -> str:
    text = text.rstrip(".!")
    for mark in ("**", "*", "`", '"', "'"):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            text = text.removeprefix(mark).removesuffix(mark)
    return text.strip().rstrip(".!")


def _without_latex(text: str) -> str:
    for _ in range(4):  # \boxed{\text{4}}
        shorter = _WRAPPED.sub(r"\1", text)
        if shorter == text:
            break
        text = shorter
    text = _LATEX_NOISE.sub("", text).replace(r"\%", "%")
    return text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")


def _as_number(text: str) -> str:
    """A number by its value, digits and exponent, whatever its size; other text as it is."""
    match = _WHOLE_NUMBER.fullmatch(text)
    if match is None:
        return text
    sign, whole, part, exponent = (group or "" for group in match.groups())
    if not whole and not part:
        return text
    digits = (whole.replace(",", "") + part).lstrip("0")
    shown = digits.rstrip("0")
    if not shown:
        return "0"
    power = int(exponent or "0") - len(part) + len(digits) - len(shown)
    return f"{'-' if sign in _MINUS else ''}{shown}e{power}"


_STEPS = {
    "latex": _without_latex,
    "punctuation": _without_period,
    "space": lambda text: " ".join(text.split()),
    "case": str.casefold,
    "number": _as_number,
}
NORMALIZATIONS = tuple(_STEPS)
