"""Prepared data sets made of numbers, without videos."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from emollama_jax.config import Config, DataConfig, load_config
from emollama_jax.data.parts import write_part
from emollama_jax.data.prepare import write_dataset
from emollama_jax.data.recipe import Recipe
from emollama_jax.data.records import answers_of, encode_frame
from emollama_jax.text.labels import MERR
from emollama_jax.text.tokenizers import Tokenizer, load_tokenizer

TOKENIZER: Tokenizer = load_tokenizer(Path(__file__).parent / "reference_tiny/llama")
SIZE = 56  # pixels of the tiny encoder
WORDS = "the woman smiles and laughs out loud which shows that she is happy why did nobody call me".split()


def random_record(number: int, rng: np.random.Generator, recipe: Recipe, **changes: Any) -> dict[str, Any]:
    """Numbers and words; all features carry the clip's number."""
    words = lambda least, most: " ".join(rng.choice(WORDS, rng.integers(least, most)))
    image = {"frame": encode_frame(np.full((recipe.size, recipe.size, 3), number % 251, np.uint8))}
    if recipe.image_storage == "image_tokens":
        image = {"image_tokens": np.full(recipe.image_tokens_shape, number, np.float16)}
    return {
        "name": f"clip {number}",
        "emotion": int(rng.integers(len(recipe.labels))),
        "valence": float(rng.normal()),
        "subtitle": words(0, 6),
        "caption_coarse": words(2, 12),
        "caption_fine": words(5, 20),
        "features": np.full((3, recipe.feature_size), number, np.float32),
        "has_feature": rng.random(3) < 0.8,
        **image,
        **changes,
    }


def write_data(
    out: Path,
    counts: dict[str, int],
    *,
    image: str = "frame",
    seed: int = 0,
    records=None,
    **recipe: Any,
) -> Path:
    """A prepared data set with so many random records in each split, or with the records given."""
    recipe = Recipe(**{"labels": MERR, "image_storage": image, "size": SIZE, "image_tokens_shape": (17, 48), **recipe})
    rng, features, parts, answers = np.random.default_rng(seed), recipe.features(), {}, {}
    for split, count in counts.items():
        made = records or [random_record(i, rng, recipe) for i in range(count)]
        path = out.parent / f"{out.name}-{split}.part"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_part(path, [*map(features.serialize_example, made)])
        parts[split], answers[split] = [path], answers_of(made)
    metadata = {"labels": list(recipe.labels), "recipe": dataclasses.asdict(recipe), "answers": answers}
    path = out / "clips" / image / "1.0.0"
    write_dataset(path, "clips", recipe, parts, metadata)
    return path


def tiny_config(data: dict[str, Any], **prompt: Any) -> Config:
    """The tiny model on this data."""
    config = load_config("tiny")
    sizes = {"sequence_length": 256, "clips_per_row": 4, "batch_rows": 4, "packing_rows": 8, "read_ahead": 8}
    return dataclasses.replace(
        config,
        data=DataConfig(**{**sizes, **data}),
        prompt=dataclasses.replace(config.prompt, tasks=("emotion", "reason", "reason_v2"), **prompt),
    )
