import re

import pytest

from emollama_jax.text import answers
from emollama_jax.text.answers import normalize_answer

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


def test_the_example_in_the_docstring():
    example = re.search(r">>> (.+)\n\s+(.+)\n", answers.normalize_answer.__doc__)
    assert repr(eval(example[1], {"normalize_answer": normalize_answer})) == example[2]
