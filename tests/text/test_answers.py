import inspect
import re

import pytest

from emollama_jax.text.answers import normalize_answer, parse_label, plain_answer


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


@pytest.mark.parametrize("function", [normalize_answer, plain_answer, parse_label])
def test_the_example_in_the_docstring(function):
    example = re.search(r">>> (.+)\n\s*(.+)", inspect.getdoc(function))
    assert repr(eval(example[1], {function.__name__: function})) == example[2]


LABELS = ("happy", "sad", "Mixed", "mixed feelings", "Very Sad", "高兴")


@pytest.mark.smoke
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
        ("happiness", "happy"),
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


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("<think>\nHe is sad.\n</think>\n<answer>happy</answer>", "happy"),
        ("He is happy.</think> sad", "sad"),  # the template opened it
        ("<seed:think>He is happy.</seed:think>\nShe is sad", "sad"),
        ("<answer>sad", "sad"),
        ("<think>So he is sad", None),  # and never came to an answer
        ("happy</s>", "happy"),
        ("The emotion is sad<|im_end|>\n<|endoftext|>", "sad"),
        ("<｜begin▁of▁sentence｜>sad<｜end▁of▁sentence｜>", "sad"),
        ("[INST] What? [/INST] happy", "happy"),
        ("\\boxed{sad}", "sad"),
        ("**Sad**", "sad"),
        ("_happy_", "happy"),
        ("ＨＡＰＰＹ", "happy"),
        ("happy (confidence: 0.9)", "happy"),
        ("sad (not happy).", "sad"),
        ("The emotion (happy)", "happy"),
        ('["sad"]', "sad"),
        ("['happy', 'sad']", None),  # several
        ("Emotion: sadness", "sad"),
        ("她很高兴。", "高兴"),
        ("情绪：高兴的", "高兴"),
        ("她不高兴", None),
        ("她并不是很高兴", None),
    ],
)
def test_labels_within_markup_and_chinese(answer, label):
    assert parse_label(answer, LABELS) == label
