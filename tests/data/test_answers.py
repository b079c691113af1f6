"""What counts of a response, and when it is the answer."""

from __future__ import annotations

import json
import time

import pytest

from mtopd.data import load_reasoning_gym, verify
from mtopd.data.answers import NORMALIZATIONS, check_pattern, find_answer, normalized, same_answer
from mtopd.data.sources import Asking
from mtopd.types import MtopdError, Prompt, plain_text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = 42.", "42"),
        ("It costs $1,234.50 in all", "1234.50"),
        ("first 3, then 4", "4"),
        ("3,4", "4"),
        ("1,2345", "2345"),
        ("10-3", "3"),
        ("x = -3", "-3"),
        ("x = \u22123", "-3"),
        ("(5)-2", "2"),
        ("-$3", "-3"),
        ("about .5", ".5"),
        ("1e-3 m", "1e-3"),
        ("version 1.2.3", "3"),
        ("5, and no more", "5"),
        ("+7", "7"),
    ],
)
def test_last_number(text: str, number: str) -> None:
    assert find_answer(text, "last_number") == number


@pytest.mark.parametrize(
    ("rule", "text", "answer"),
    [
        (None, " 42\n", "42"),
        ("boxed", r"so \boxed{\frac{1}{2}}, not \boxed{3", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} and then \boxed {2}", "2"),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"} \fbox{a}", "a"),
        ({"tag": "answer"}, "<think>5</think><answer> 6 </answer> done", "6"),
        ({"tag": "answer"}, "<answer>1</answer> no: <answer>2</answer>", "2"),
        ({"tag": "answer"}, "<answer>7", "7"),
        ({"tag": "answer"}, "</answer>7", "</answer>7"),
        ({"regex": r"answer is (\w+)"}, "The answer is red. The answer is blue", "red"),
        ({"regex": r"(?s).*answer is (\w+)"}, "The answer is red.\nThe answer is blue", "blue"),
        ({"regex": r"(?i)[a-d]\b"}, "Option C.", "C"),
        ({"regex": r"a|b"}, "xb", "b"),
        ({"regex": r"(x)?y"}, "y", "y"),
        ({"regex": r"\d"}, "half a \ud83d and 4", "4"),
    ],
)
def test_where_an_answer_stands(rule, text: str, answer: str) -> None:
    assert find_answer(text, rule) == answer


@pytest.mark.parametrize("rule", ["last_number", "boxed", {"tag": "answer"}, {"regex": "is (.*)"}])
def test_where_nothing_is_found_all_of_the_text_counts(rule) -> None:
    assert find_answer(" no idea ", rule) == "no idea"


HOSTILE = [
    "1," * 50_000,
    "1,111" + ",111" * 30_000 + "1",
    "1" * 100_000,
    "-" * 100_000,
    "1e" * 50_000,
    "." * 100_000,
    r"\boxed{" * 15_000,
    "{" * 50_000 + "}" * 50_000,
    "<answer>" * 12_000,
    "</answer>" * 11_000,
    r"\text{" * 16_000,
    "a" * 100_000 + "!",
    " \n" * 50_000,
]


@pytest.mark.parametrize(
    "rule", ["last_number", "boxed", {"tag": "answer"}, {"regex": "(a+)+$"}, {"regex": "(.*)*x"}]
)
def test_no_response_takes_long(rule) -> None:
    """Of 100,000 characters each: what goes back and forth would take minutes."""
    started = time.process_time()
    for text in HOSTILE:
        same_answer(text, "4", answer_from=rule, normalize=NORMALIZATIONS)
    assert time.process_time() - started < 5, "0.5 s when this was written"


@pytest.mark.parametrize("pattern", ["(a", r"(?=a)", r"(a)\1", r"\Qa", "a{1001}", "\ud800", "a)(b"])
def test_patterns_that_are_not_re2_are_refused(pattern: str) -> None:
    with pytest.raises(MtopdError, match=r"answer_from\.regex .* cannot be used"):
        check_pattern(pattern)
    with pytest.raises(MtopdError, match=r"answer_from\.regex"):
        Asking(answer_from={"regex": pattern})


@pytest.mark.parametrize(
    ("step", "said", "right", "others"),
    [
        ("number", "72.0", "72", ("720", "-72", "7.2", "72a")),
        ("number", "1,234", "1234.00", ("1.234",)),
        ("number", "$5", "5", ("50",)),
        ("number", "2e3", "2000", ("2e4", "e3")),
        ("number", "-0.0", "0", ("1", "e0")),
        ("number", "0.30", ".3", ("0.03",)),
        ("number", "1e999999999999999999", "10e999999999999999998", ("1e99",)),
        ("case", "Blue", "bLUE", ("blau",)),
        ("space", "a  b\n c", "a b c", ("abc",)),
        ("punctuation", "**red.**", "red", ("r.ed",)),
        ("punctuation", '"red"!', "red", ('"red',)),
        ("latex", r"$\boxed{\text{red}}$", "red", ("bred",)),
        ("latex", r"\left(1,\;2\right)", "(1,2)", ("1,2",)),
        ("latex", r"\dfrac{1}{2}", r"\frac{1}{2}", ("1/2",)),
    ],
)
def test_normalizations(step: str, said: str, right: str, others: tuple) -> None:
    assert same_answer(said, right, normalize=[step])
    assert not same_answer(said, right), "without it they differ"
    for other in others:
        assert not same_answer(said, other, normalize=[step]), other
        assert not same_answer(other, right, normalize=[step]), other


def test_normalizations_work_together_in_any_order() -> None:
    said = "**$1,000.0$.**"
    for steps in (NORMALIZATIONS, NORMALIZATIONS[::-1]):
        assert normalized(said, steps) == normalized("1000", steps)


def test_an_answer_may_be_a_worked_solution() -> None:
    assert same_answer("it is 72", "24 * 3 = 72\n#### 72.0", answer_from="last_number")
    assert same_answer(r"\boxed{x}", r"hence \boxed{x}.", answer_from="boxed")
    assert not same_answer("it is 24", "24 * 3 = 72", answer_from="last_number")


def test_a_recipe_is_plain_data_for_any_verifier() -> None:
    asking = Asking(answer_from={"regex": r"is:? (\w+)"})
    train, _ = load_reasoning_gym(
        "x", "spell_backward", {}, size=40, seed=1, eval_size=2, asking=asking
    )
    row = train.rows[0]
    prompt = Prompt("x/0", {}, (1,), 0, json.loads(json.dumps(row.verify)))
    assert verify(prompt, f"The word is: {row.answer}.") == 1.0
    assert verify(prompt, str(row.answer)) == 1.0
    assert verify(prompt, "The word is: zzz") < 1.0
    assert prompt.verify["answer_from"] == {"regex": r"is:? (\w+)"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.0, "3"), (-0.0, "0"), (0.1, "0.1"), (True, "true"), (1e20, "1" + "0" * 20), (1e22, "1e+22"),
     (10**30, "1" + "0" * 30), ("3.0", "3.0")],
)  # fmt: skip
def test_plain_text(value, text: str) -> None:
    assert plain_text(value) == text
