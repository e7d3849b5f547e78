"""DFEW's settings in one sweep: frame rule, transcript and order of the labels, above the published rows."""

from types import SimpleNamespace

import pytest

from emollama_jax.data.modalities import check_modalities
from emollama_jax.data.records import Records
from emollama_jax.errors import UserError
from emollama_jax.eval.benchmarks import BENCHMARKS
from emollama_jax.eval.sweep import LABEL_ORDERS, sweep, sweep_markdown
from emollama_jax.infer.answer import ClipAnswer
from emollama_jax.infer.engine import Engine
from emollama_jax.text.labels import DFEW
from emollama_jax.text.prompts import PromptConfig
from tests.data.prepared import write_data

FRAMES = ("first", "middle", "peak")


class FirstLabel(Engine):
    """Answers with the first label of the question; without the transcript with the last one."""

    def __init__(self, labels=DFEW):
        self.config = SimpleNamespace(prompt=PromptConfig(labels=labels))

    def replace(self, *, prompt=None, modalities=None, orders=None):
        return FirstLabel(prompt.labels)

    def label_views(self, clips, views, *, batch_size=16):
        labels = self.config.prompt.labels
        for clip in clips:
            chosen = {check_modalities(view): labels[0 if "T" in view else -1] for view in views}
            yield {
                view: ClipAnswer(clip["name"], label, label=label, probabilities=dict.fromkeys(labels, 0.1))
                for view, label in chosen.items()
            }


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dfew")
    paths = [write_data(folder / f, {"test": 6}, image="image_tokens", labels=DFEW, frame_rule=f) for f in FRAMES]
    return [Records(path, "test") for path in paths]


def test_dfews_settings_are_rows_of_one_table(splits):
    benchmark = BENCHMARKS["dfew"]
    settings = {"modalities": ["AV", "AVT"], "label_orders": LABEL_ORDERS}
    cells = sweep(FirstLabel(), splits, benchmark, **settings)
    assert [(c.frame, c.label_order, c.modalities) for c in cells] == [
        (frame, order, view) for frame in FRAMES for order in LABEL_ORDERS for view in ("AV", "AVT")
    ]
    said = {(c.label_order, c.modalities): {p.label for p in c.evaluated.predictions} for c in cells}
    assert said["given", "AVT"] == {DFEW[0]} and said["reversed", "AVT"] == {DFEW[-1]}
    assert said["sorted", "AVT"] == {min(DFEW)} and said["sorted", "AV"] == {max(DFEW)}
    page = sweep_markdown(cells)
    assert page.count("| **emollama_jax**, ") == len({cell.name for cell in cells}) == 18
    assert "| **emollama_jax**, AV, middle frame, labels reversed | " in page
    assert "| Emotion-LLaMA, zero-shot, middle frame | 45.76 | 58.82 |" in page


def test_an_unknown_order(splits):
    with pytest.raises(UserError, match="label order 'random'"):
        sweep(FirstLabel(), splits, BENCHMARKS["dfew"], label_orders=["random"])
