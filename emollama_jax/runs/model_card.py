"""The model card of exported adapters: what they are, what they were trained on, and how to use them."""

import json
import shlex
from collections.abc import Iterator
from pathlib import PurePath

from emollama_jax import __version__
from emollama_jax.config import Config, values_affecting
from emollama_jax.data.records import IMAGE_STORAGE
from emollama_jax.runs.run import Run
from emollama_jax.weights.locate import is_hub_name
from emollama_jax.weights.trained import TrainedWeights


def hub_base(trained: TrainedWeights) -> str:
    """Returns the name of the language model on the hub, as far as it is one that others can find; else ""."""
    return trained.base if is_hub_name(trained.base) else ""


def model_card(name: str, trained: TrainedWeights, run: Run | None, licence: str) -> str:
    """Returns the card in Markdown, with the hub's settings before it. No paths of this machine are in it.

    Args:
        name: of the model on the hub, ORG/NAME.
        run: where the weights are a run's.
        licence: by the hub's names, such as "llama2" or "other".
    """
    base, lora = hub_base(trained), trained.lora
    settings = {"library_name": "peft", "license": licence, "tags": ["emotion-recognition", "emotion-llama", "lora"]}
    head = [f"{key}: {json.dumps(value)}" for key, value in (settings | ({"base_model": base} if base else {})).items()]
    known = "; ".join(f"{key} {value}" for key, value in trained.base_identity.as_metadata().items())
    what = [
        f"Adapters (LoRA, rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}) and projectors of "
        "Emotion-LLaMA: a clip of a person speaking goes in, an emotion label or an explanation comes out.",
        "",
        f"- language model: {base or 'see its fingerprint'}{f' ({known})' if known else ''}",
        *(_of_run(run) if run else ()),
        f"- licence: {licence}; that of the language model and those of the encoders apply, too",
    ]
    use = [
        f"    emollama predict clip.mp4 --trained {name} --base BASE --config CONFIG",
        "",
        "`adapter_model.safetensors` is PEFT's; `projectors.safetensors` maps the encoders' features to soft tokens.",
    ]
    lines = ["---", *head, "---", "", f"# {name.rpartition('/')[2]}", "", *what, "", "## Use", "", *use, ""]
    lines += [*(_command(run.config) if run else ()), f"Written by emollama_jax {__version__}."]
    return "\n".join(lines) + "\n"


def _of_run(run: Run) -> Iterator[str]:
    meta, config = run.meta, run.config
    yield f"- trained for {run.step:,} steps, seed {config.seed}"
    folders = [PurePath(path.rpartition(":")[0]) for path in config.data.train]
    for folder, (split, count, fingerprint) in zip(folders, meta.get("data", ()), strict=False):
        prepared = folder.parent.name in IMAGE_STORAGE  # NAME/IMAGE/VERSION, as emollama prepare makes it
        name = folder.parts[-3] if prepared else folder.name
        yield f"- data: {name}, split {split}, {count:,} clips (fingerprint {fingerprint})"
    yield f"- labels: {', '.join(config.prompt.labels)}"
    if rules := run.provenance.frame_rules:
        yield f"- frames: {', '.join(rules)}"
    for encoder, fingerprint in sorted(run.provenance.encoders.items()):
        yield f"- encoder {encoder}: {fingerprint}"
    best = meta.get("best") or {}
    if best.get("step") is not None:
        yield f"- best validation ({config.train.best_metric}): {best['value']:.4f} at step {best['step']:,}"


def _command(config: Config) -> Iterator[str]:
    """The command of a run, with the settings that decide what it learns where they are not the defaults."""
    values, default = values_affecting(config, "resume"), values_affecting(Config(), "resume")
    changed = {path: value for path, value in sorted(values.items()) if value != default[path]}
    words = [shlex.quote(f"--config.{path}={value}") for path, value in changed.items()]
    yield from ("## Trained by", "", " \\\n        ".join(["    emollama train --config CONFIG", *words]), "")
