"""Label sets are checked in one place, and labels are found by one function."""

import inspect
import re

import pytest

from emollama_jax.data.annotation_files import AnnotationFiles
from emollama_jax.data.recipe import Recipe
from emollama_jax.eval.benchmarks import Benchmark
from emollama_jax.text.labels import DFEW, MERR, check_labels, find_label, split_labels
from emollama_jax.text.prompts import PromptConfig
from emollama_jax.text.words import words

WRONG = [
    (("happy", ""), "'' has no word"),
    (("happy", " ... "), "' ... ' has no word"),
    (("happy", "happy"), "each once"),
    (("happy", "Happy!"), "each once"),
    (("happy, glad", "sad"), "'happy, glad' reads as several labels"),
    ((), "give one or more"),
]


@pytest.mark.parametrize(("labels", "message"), WRONG)
def test_label_sets_that_cannot_be(labels, message):
    make_recipe = lambda labels: Recipe(labels=labels)
    holders = [
        check_labels,
        lambda labels: PromptConfig(labels=labels),
        lambda labels: Benchmark(name="b", labels=labels),
        *([lambda labels: AnnotationFiles(lists=(), labels=labels), make_recipe] if labels else []),  # none takes all
    ]
    for holder in holders:
        with pytest.raises(ValueError, match=f"^labels=.*{re.escape(message)}"):
            holder(labels)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("text", "labels", "label"),
    [
        ("calm", ("Calm", "Tense"), "Calm"),
        ("TENSE ", ("Calm", "Tense"), "Tense"),
        ("happiness", MERR, "happy"),
        ("happy", ("Happiness", "sad"), "Happiness"),
        ("Anger", ("anger", "joy"), "anger"),
        ("joy", ("happy", "joy"), "joy"),
        ("joy", ("happy", "happiness"), None),  # either could be meant
        ("开心", ("开心", "悲伤"), "开心"),
        ("['happy']", MERR, "happy"),
        ("['happy', 'sad']", MERR, None),
        ("rage", MERR, None),
        ("", MERR, None),
        ("3", MERR, None),
        ("1", ("0", "1"), "1"),
    ],
)
def test_labels_in_tables(text, labels, label):
    assert find_label(text, labels) == label


def test_numbers_are_labels_only_where_it_is_said():
    assert [find_label(f"{number}", DFEW, 1) for number in range(9)] == [None, *DFEW, None]
    assert find_label("2.0", DFEW, first_number=0) == "neutral"
    assert find_label("0", ("1", "0"), first_number=1) == "0"  # a label by its own name


@pytest.mark.parametrize("function", [find_label, split_labels, words])
def test_the_example_in_the_docstring(function):
    example = re.search(r">>> (.+)\n\s*(.+)", inspect.getdoc(function))
    assert repr(eval(example[1], {function.__name__: function})) == example[2]
