"""Tokenizers out of the metadata of GGUF files."""

from collections.abc import Mapping
from typing import Any

import tokenizers as hf
from tokenizers import decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from emollama_jax.errors import UserError
from emollama_jax.text.tokenizers import HFTokenizer, SentencePieceTokenizer, Token, Tokenizer

CHANGING_TEXT = ("remove_extra_whitespaces", "precompiled_charsmap")  # of T5's, which we do not do
# Token types of GGUF, which are also those of sentencepiece.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_LLAMA3_WORDS = hf.Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_GPT2_WORDS = ByteLevel(add_prefix_space=False, use_regex=True)
_BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
# How text is cut into words before the merges, by the name GGUF gives it. "default" is not among them: converters write
# it for a tokenizer they do not recognise.
_WORDS = {
    "gpt-2": _GPT2_WORDS,
    "smollm": Sequence([Digits(individual_digits=True), _GPT2_WORDS]),
    "llama-bpe": Sequence([Split(_LLAMA3_WORDS, behavior="isolated"), _BYTES]),
}


ENDS_OF_TURNS = ("eot", "eom")  # ids that end an answer beside EOS


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    `metadata` maps the file's `tokenizer.*` keys to plain Python values. Raises UserError for a kind of tokenizer that
    is not supported, or for metadata that is incomplete or contradicts itself.
    """
    build = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}.get(kind := metadata.get("tokenizer.ggml.model"))
    if build is None:
        raise UserError(
            f"unsupported tokenizer kind {kind!r}: GGUF key tokenizer.ggml.model; use a model with a 'llama' or 'gpt2' "
            "tokenizer, or a Hugging Face folder of the same model"
        )
    try:
        return build(metadata, tuple(metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS_OF_TURNS))
    except KeyError as error:
        raise UserError(f"incomplete tokenizer: no GGUF key {error.args[0]}; convert the model again") from error
    except (IndexError, TypeError, ValueError) as error:
        raise UserError(f"unusable tokenizer: GGUF keys tokenizer.* ({error}); convert the model again") from error


def _byte_level_bpe(metadata: Mapping[str, Any], more_ends: tuple[Token, ...]) -> Tokenizer:
    words = _WORDS.get(pre := metadata.get("tokenizer.ggml.pre"))
    if words is None:
        raise UserError(
            f"unknown pre-tokenizer {pre!r}: GGUF key tokenizer.ggml.pre; known are {', '.join(_WORDS)}: "
            "use a Hugging Face folder of the same model"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [(left, right) for left, right in (merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"])]
    try:
        # LLaMA 3 has words in its vocabulary that no merges lead to.
        tokenizer = hf.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(str(error)) from error
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    types = list(zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True))
    tokenizer.add_special_tokens([token for token, kind in types if kind in (_UNKNOWN, _CONTROL)])
    tokenizer.add_tokens([hf.AddedToken(token, normalized=False) for token, kind in types if kind == _USER_DEFINED])
    bos, eos, pad = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding"))
    chat_template = metadata.get("tokenizer.chat_template")
    return HFTokenizer(tokenizer.to_str(), bos=bos, eos=eos, pad=pad, more_ends=more_ends, chat_template=chat_template)


def _sentencepiece_bpe(metadata: Mapping[str, Any], more_ends: tuple[Token, ...]) -> Tokenizer:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # needs protobuf, which reading a model does not

    if changed := [key for key in CHANGING_TEXT if metadata.get(f"tokenizer.ggml.{key}")]:
        raise UserError(
            f"the tokenizer changes text before it is cut: GGUF keys {', '.join(changed)}; use a Hugging Face "
            "folder of the same model"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    types = [int(kind) for kind in metadata["tokenizer.ggml.token_type"]]
    # Where GGUF names no ids, it means LLaMA's.
    unk, bos, eos = (
        metadata.get(f"tokenizer.ggml.{name}_token_id", i) for i, name in enumerate(("unknown", "bos", "eos"))
    )
    types[bos] = types[eos] = _CONTROL
    types[unk] = _UNKNOWN
    # GGUF writes the spaces of user-defined pieces plainly.
    pieces = [t.replace(" ", "▁") if kind == _USER_DEFINED else t for t, kind in zip(tokens, types, strict=True)]
    rows = zip(pieces, metadata["tokenizer.ggml.scores"], types, strict=True)
    trainer = {"model_type": "BPE", "vocab_size": len(pieces), "byte_fallback": _BYTE in types}
    for name, token in (("unk", unk), ("bos", bos), ("eos", eos)):
        trainer |= {f"{name}_id": token, f"{name}_piece": pieces[token]}
    normalizer = {"name": "identity", "remove_extra_whitespaces": False, "escape_whitespaces": True}
    normalizer["add_dummy_prefix"] = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    proto = ModelProto(
        pieces=[{"piece": piece, "score": score, "type": kind} for piece, score, kind in rows],
        trainer_spec=trainer,
        normalizer_spec=normalizer,
    )
    pad, chat_template = metadata.get("tokenizer.ggml.padding_token_id"), metadata.get("tokenizer.chat_template")
    return SentencePieceTokenizer(proto.SerializeToString(), pad=pad, more_ends=more_ends, chat_template=chat_template)
