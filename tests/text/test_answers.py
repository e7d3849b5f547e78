import re

import pytest

from emollama_jax.text.answers import normalize_answer, parse_label

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("happy", "happy"),
        ("", ""),
        ("Sad.", "sad"),
        ("  worried \n\n", "worried"),
        ('She said: "No!" (twice); it\'s ~3*4#', "she said no twice it's 3 4"),
        ("one, two? three-four", "one, two? three-four"),  # other punctuation stays
        ("a\n\n\nb\t\tc\td", "a b c\td"),  # a single white space stays as it is
        ("Ein Übermaß: 高兴！😀", "ein übermaß 高兴！😀"),
        ("...", ""),
    ],
)
def test_normalize_answer(text, expected):
    assert normalize_answer(text) == expected


def test_long_answers_are_cut_at_words():
    assert normalize_answer("word " * 201) == " ".join(["word"] * 200)
    assert normalize_answer("a b c d", max_words=2) == "a b"


@pytest.mark.parametrize("function", [normalize_answer, parse_label])
def test_the_example_in_the_docstring(function):
    example = re.search(r">>> (.+)\n\s+(.+)\n", function.__doc__)
    assert repr(eval(example[1], {function.__name__: function})) == example[2]


LABELS = ("happy", "sad", "Mixed", "mixed feelings", "Very Sad", "高兴")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("happy", "happy"),
        ("  HAPPY!\n", "happy"),
        ('The emotion is: "sad".', "sad"),
        ("not happy but sad", "sad"),  # the last counts, as in the reference
        ("word " * 300 + "sad", "sad"),  # even where training answers would have been cut
        ("mixed", "Mixed"),
        ("she has mixed  feelings", "mixed feelings"),
        ("very, sad", "Very Sad"),  # the longer of two that fit
        ("高兴。", "高兴"),
        ("unhappy", None),
        ("non-happy", None),
        ("happiness", None),
        ("joyful", None),
        ("happy person", None),
        ("happysad", None),
        ("", None),
        ("...", None),
    ],
)
def test_parse_label(answer, label):
    assert parse_label(answer, LABELS) == label
    assert parse_label(answer, LABELS[::-1]) == label
