"""A model's settings as its own files state them, checked.

A setting of the file is read, is known not to change what the model computes, or is refused: one that nobody knows may
change every number.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, get_args, get_origin

from emollama_jax.errors import UserError
from emollama_jax.weights.tensors import WeightSource

# Patterns of the settings that transformers gives every model and that change nothing in its forward pass: records,
# training, generation, and which outputs are returned.
RECORDS = r"architectures|_name_or_path|_commit_hash|transformers_version|transformers\.js_config|(torch_)?dtype"
TRAINING = (
    r"initializer_range|initializer_factor|gradient_checkpointing|\w*dropout\w*|layerdrop|problem_type|\w*loss\w*"
)
GENERATION = (
    r"(bos|eos|pad|sep|decoder_start|forced_bos|forced_eos)_token_id|use_cache|(max|min)_length|do_sample|temperature"
    r"|top_[kp]|typical_p|num_beams|num_beam_groups|num_return_sequences|early_stopping|\w+_penalty|bad_words_ids"
    r"|(encoder_)?no_repeat_ngram_size|(begin_)?suppress_tokens|remove_invalid_values|task_specific_params|prefix"
)
OUTPUTS = (
    r"output_\w+|return_dict\w*|id2label|label2id|num_labels|finetuning_task|tokenizer_class|is_decoder|torchscript"
    r"|use_bfloat16|tie_word_embeddings|chunk_size_feed_forward|_?attn_implementation\w*|_flash_attn_2_enabled"
)
COMMON = (RECORDS, TRAINING, GENERATION, OUTPUTS)
# Known flags that change nothing while they are off.
OFF_FLAGS = frozenset("add_cross_attention is_encoder_decoder tie_encoder_decoder".split())


class _ReadKeys(dict):
    """A configuration that notes which of its keys were asked for."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def read_architecture(
    source: WeightSource,
    parse: Callable[[dict[str, Any]], dict[str, Any]],
    config: type,
    kind: str,
    harmless: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The fields of the dataclass `config` that a file's own configuration fixes.

    Args:
        parse: from the file's configuration to the fields; NotImplementedError for what the model does not have.
        kind: what the file must be, for messages: "LLaMA".
        harmless: patterns of settings, beside those of every model, that do not change what the model computes.

    Raises:
        UserError: no configuration, another architecture, a variant that the model does not have, a setting that is
            not known, or values that make no sense.
    """
    if source.config is None:
        raise UserError(f"no config.json beside the weights: {source.path}; copy it from where the weights came from")
    try:
        settings = _ReadKeys(source.config)
        fields = parse(settings)
        kinds = {field.name: field.type for field in dataclasses.fields(config)}
        if wrong := [f"{name}={value!r}" for name, value in fields.items() if not _is_of(kinds[name], value)]:
            raise ValueError(", ".join(wrong))
        config(**fields)
    except KeyError as error:
        raise UserError(f"the configuration lacks {error}: {source.path}; it must be a {kind} model's") from error
    except NotImplementedError as error:
        raise UserError(f"{error}: {source.path}; only {kind} models without these are supported") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"unusable configuration ({error}): {source.path}; download or copy it again") from error
    _check_unread(source, settings, (*COMMON, *harmless))
    return fields


def _check_unread(source: WeightSource, settings: _ReadKeys, harmless: tuple[str, ...]) -> None:
    """Raises UserError for settings that were not read and may change what the model computes."""
    if quantised := settings.get("quantization_config"):
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"the weights are quantised ({method or 'quantization_config'}): {source.path}; use the float version of "
            "the model, or a GGUF file of it"
        )
    known = lambda name: name in settings.asked or any(re.fullmatch(pattern, name) for pattern in harmless)
    unset = lambda name, value: value is None or value in ([], {}) or (value is False and name in OFF_FLAGS)
    if unknown := {name: value for name, value in settings.items() if not (known(name) or unset(name, value))}:
        listed = ", ".join(f"{name}={str(value)[:60]!r}" for name, value in sorted(unknown.items()))
        raise UserError(
            f"unknown settings that may change what the model computes, {listed}: {source.path}; use a model without "
            "them, or remove those that are known not to matter"
        )


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value has the type of a field: a plain one, or a tuple of any length."""
    if get_origin(kind) is tuple:
        return type(value) is tuple and all(type(item) is get_args(kind)[0] for item in value)
    return type(value) is kind


def check_variant(config: dict[str, Any], model_types: tuple[str, ...], unsupported: dict[str, bool]) -> None:
    """Raises NotImplementedError for another kind of model, or for a variant: `unsupported` says what is set."""
    if config.get("model_type") not in model_types:
        found = config.get("model_type", "nameless one")
        raise NotImplementedError(f"the model is a {found}, not a {' or '.join(model_types)}")
    if any(unsupported.values()):
        raise NotImplementedError(f"the model has {', '.join(name for name, is_set in unsupported.items() if is_set)}")
