"""Metrics of a model's labels while it trains, for `train.best_metric`."""

from collections.abc import Callable
from typing import Any

from emollama_jax.config import Config
from emollama_jax.data.datasets import open_datasets
from emollama_jax.eval.benchmarks import Benchmark
from emollama_jax.eval.metrics import confusion_matrix, scores
from emollama_jax.eval.sweep import check_labels, evaluate_records
from emollama_jax.infer.engine import Engine
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.weights.pretrained import load_base_tokenizer

LabelMetrics = Callable[[EmotionLlama], dict[str, float]]


def make_label_metrics(config: Config) -> LabelMetrics | None:
    """Return the function from a model to the metrics of its labels on `train.validation`, for `train.loop.train`;
    None where `train.best_metric` is the loss.

    Example:
        train(config, more_metrics=make_label_metrics(config))

    Raises:
        UserError: the data has no labels, or labels that are not among `prompt.labels`.
    """
    if config.train.best_metric == "loss" or not config.train.validation:
        return None
    benchmark = Benchmark(name="prompt.labels", labels=config.prompt.labels)
    splits = [dataset.records for dataset in open_datasets(config.train.validation, config, "train.validation")]
    for records in splits:
        check_labels(records, benchmark)
    tokenizer = load_base_tokenizer(config.weights.base, config.llama.vocab_size)

    def measure(model: EmotionLlama) -> dict[str, Any]:
        engine = Engine(model, tokenizer, config)
        found = [one for records in splits for one in evaluate_records(engine, records, benchmark).predictions]
        labelled = [one for one in found if one.emotion is not None]
        truth, labels = [one.emotion for one in labelled], [one.label for one in labelled]
        return {name: float(x) for name, x in scores(confusion_matrix(truth, labels, benchmark.labels)).items()}

    return measure
