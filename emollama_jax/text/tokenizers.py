"""Text to token ids and back, for every way a LLaMA-family vocabulary is stored.

`load_tokenizer` reads a Hugging Face folder (`tokenizer.model` or `tokenizer.json`), `tokenizer_from_gguf` the metadata
of a GGUF file. Both return a `Tokenizer`, which encodes ONE text segment at a time and never adds BOS or EOS: where
those go is the prompt's business.

The `sentencepiece` and `tokenizers` libraries are used directly, because the tokenizer classes of `transformers` give
other ids for the same text in other versions.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import tokenizers as hf
from etils import epath
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from emollama_jax.errors import UserError
from emollama_jax.io.paths import PathLike, as_path

Token = str | int | None  # a special token by name or id, or none


class Tokenizer(ABC):
    """A vocabulary with its special ids. Instances can be shared between threads and pickled to workers.

    Attributes:
      vocab_size: one more than the highest id.
      bos_id: id that starts a sequence, or None when the vocabulary has none.
      eos_id: id that ends a sequence.
      pad_id: id for padding; `eos_id` when the vocabulary has none.
      chat_template: the Jinja text that came with the vocabulary, or None.
    """

    def __init__(self, size: int, find: Callable[[str], int | None], ends: Iterable[Token], chat_template: str | None):
        """`ends` are BOS, EOS and padding; `find` looks a name up. What the vocabulary does not have counts as none.

        Raises ValueError for an EOS of none.
        """
        ids = (find(token) if isinstance(token, str) else token for token in ends)
        bos_id, eos_id, pad_id = (token if token is not None and 0 <= token < size else None for token in ids)
        if eos_id is None:
            raise ValueError("no end-of-sequence token that is in the vocabulary")
        self.vocab_size = size
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.chat_template = chat_template

    @abstractmethod
    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """Ids of one text segment, without BOS or EOS.

        With `specials`, special tokens written out in the text (`</s>`, `<|im_start|>`) become their ids. Without, they
        are ordinary text, so that nobody who only types text can forge a special id.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int], *, skip_specials: bool = True) -> str:
        """Text of the ids, special tokens dropped or written out; invalid UTF-8 becomes U+FFFD.

        Raises ValueError for an id outside the vocabulary (a model padded to more rows can produce one).
        """

    @abstractmethod
    def save(self, folder: PathLike) -> None:
        """Write what `load_tokenizer(folder)` reads back as an identical tokenizer; the folder is made if needed."""

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return ids

    def _write(self, file: Path, content: bytes, piece: Callable[[int], str], **settings: Any) -> None:
        """Write the vocabulary's file and, beside it, `tokenizer_config.json` with the special tokens by name."""
        config = {**settings, "clean_up_tokenization_spaces": False}
        for name, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("pad_token", self.pad_id)):
            config[name] = None if token is None else piece(token)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (file.parent / "tokenizer_config.json").write_text(text, encoding="utf-8")


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with the "legacy" segmentation that LLaMA-2 was fine-tuned with.

    The text is split at the special tokens, and every part between them gets sentencepiece's dummy space of its own:
    `"a</s>b"` is `▁a`, `</s>`, `▁b`.
    """

    def __init__(self, model: bytes, *, pad: Token = None, chat_template: str | None = None):
        """`model` is the content of a `tokenizer.model`; `pad` takes the place of its own padding piece.

        Raises ValueError for a model that cannot be used.
        """
        self._model = SentencePieceProcessor()
        try:
            if not model:  # which the library takes for a model of no pieces
                raise RuntimeError("the file is empty")
            self._model.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise ValueError(f"not a sentencepiece model, or cut short: {error}") from error
        size = self._model.vocab_size()
        ends = (self._model.bos_id(), self._model.eos_id(), self._model.pad_id() if pad is None else pad)
        super().__init__(size, self._piece_id, ends, chat_template)
        special = [i for i in range(size) if self._model.is_control(i) or self._model.is_unknown(i)]
        self._specials = {self._model.id_to_piece(i): i for i in special}
        self._special_ids = set(special)
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def _piece_id(self, piece: str) -> int | None:
        token = self._model.piece_to_id(piece)
        return token if self._model.id_to_piece(token) == piece else None  # an unknown piece gets the id of <unk>

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        if not specials:
            return self._model.encode(text)
        ids: list[int] = []
        for part in self._split.split(text):
            ids += [self._specials[part]] if part in self._specials else self._model.encode(part)
        return ids

    def decode(self, ids: Iterable[int], *, skip_specials: bool = True) -> str:
        """As in the base class; one dummy space is removed, or one after every special token when those are kept."""
        ids = self._checked(ids)
        if skip_specials:
            return self._model.decode([token for token in ids if token not in self._special_ids])
        text = ""
        for is_special, group in groupby(ids, self._special_ids.__contains__):
            run = list(group)
            text += "".join(map(self._model.id_to_piece, run)) if is_special else self._model.decode(run)
        return text

    def save(self, folder: PathLike) -> None:
        file, content = Path(folder) / "tokenizer.model", self._model.serialized_model_proto()
        self._write(file, content, self._model.id_to_piece, tokenizer_class="LlamaTokenizer", legacy=True)


class HFTokenizer(Tokenizer):
    """A `tokenizer.json` run by the `tokenizers` library; its post-processor is never used."""

    def __init__(self, spec: str, *, bos: Token, eos: Token, pad: Token, chat_template: str | None = None):
        """`spec` is the content of a `tokenizer.json`. Raises ValueError when it cannot be used."""
        try:
            # Whether special tokens are parsed is a state of the library's object: one for each keeps threads apart.
            self._parsing, self._plain = hf.Tokenizer.from_str(spec), hf.Tokenizer.from_str(spec)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"not a tokenizer.json ({error})") from error
        size = max(self._parsing.get_vocab().values(), default=-1) + 1
        super().__init__(size, self._parsing.token_to_id, (bos, eos, pad), chat_template)
        self._plain.encode_special_tokens = True
        for tokenizer in (self._parsing, self._plain):
            # What the file was last used with must neither cut our text nor pad it.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            # BOS and EOS are special even where only tokenizer_config.json says so.
            ends = {self.bos_id, self.eos_id} - {None} - _special_ids(tokenizer)
            tokenizer.add_special_tokens([tokenizer.id_to_token(token) for token in sorted(ends)])
        self._special_ids = _special_ids(self._parsing)

    def __reduce__(self):
        # The library's own pickling forgets `encode_special_tokens`.
        ends = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        return partial(HFTokenizer, **ends, chat_template=self.chat_template), (self._parsing.to_str(),)

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        if specials:
            return self._parsing.encode(text, add_special_tokens=False).ids
        encoding = self._plain.encode(text, add_special_tokens=False)
        # A model that looks up whole words can find a special token among its own pieces: cut the text inside it.
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [start + 1 for token, (start, end) in spans if token in self._special_ids and end - start > 1]
        if not cuts:
            return encoding.ids
        parts = (text[start:end] for start, end in pairwise([0, *cuts, len(text)]))
        return [token for part in parts for token in self.encode(part, specials=False)]

    def decode(self, ids: Iterable[int], *, skip_specials: bool = True) -> str:
        return self._parsing.decode(self._checked(ids), skip_special_tokens=skip_specials)

    def save(self, folder: PathLike) -> None:
        """As in the base class. Raises UserError where a `tokenizer.model` would hide what is saved."""
        if (other := Path(folder) / "tokenizer.model").exists():
            raise UserError(f"another tokenizer is stored here: {other}; save to a new folder")
        file, content = Path(folder) / "tokenizer.json", self._parsing.to_str(pretty=True).encode()
        self._write(file, content, self._parsing.id_to_token, tokenizer_class="PreTrainedTokenizerFast")


def _special_ids(tokenizer: hf.Tokenizer) -> set[int]:
    return {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: PathLike) -> None:
    """Raise UserError when the tokenizer has ids for which the model (`vocab_size` rows) has no embedding.

    A model padded to more rows than there are ids is fine. `where` is what the error names, e.g. the model's folder.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {vocab_size} embedding rows: {where}; "
            "use the tokenizer that came with these weights"
        )


def load_tokenizer(path: PathLike) -> Tokenizer:
    """Read a folder with `tokenizer.model` (preferred) or `tokenizer.json`, or one of these files itself.

    The configuration files beside it name the special tokens and the chat template; only BOS and EOS of a
    `tokenizer.model` are its own, because old LLaMA folders name them wrongly. Raises UserError when there is no such
    file or it cannot be used.
    """
    file = as_path(path)
    if file.is_dir():
        file = next((f for f in (file / "tokenizer.model", file / "tokenizer.json") if f.is_file()), file)
    if file.suffix not in (".model", ".json"):
        raise UserError(f"no tokenizer.model or tokenizer.json: {file}; give a folder or file that has one of them")
    try:
        content = file.read_bytes()
        tokens, chat_template = _read_configs(file.parent)
        if file.suffix == ".model":
            return SentencePieceTokenizer(content, pad=tokens["pad"], chat_template=chat_template)
        return HFTokenizer(content.decode("utf-8"), **tokens, chat_template=chat_template)
    except OSError as error:
        raise UserError(f"cannot read the tokenizer: {error.filename} ({error.strerror}); check the path") from error
    except ValueError as error:
        raise UserError(f"unusable tokenizer: {file} ({error}); get all files of the tokenizer again") from error


def _read_configs(folder: epath.Path) -> tuple[dict[str, Token], str | None]:
    """Special tokens `{"bos", "eos", "pad"}` by name or id, and the chat template, as the folder's files give them."""
    files = ("tokenizer_config.json", "special_tokens_map.json", "config.json")  # the first that says something wins
    config, names, model = (_read_json(folder / name) for name in files)
    ids = {key.removesuffix("_id"): value for key, value in model.items() if key.endswith("_token_id")}
    tokens: dict[str, Token] = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        # null means that there is no such token; but there always is an end.
        given = [source[key] for source in (config, names, ids) if key in source]
        value = next((v for v in given if v is not None or key != "eos_token"), None)
        value = value.get("content") if isinstance(value, dict) else value  # an AddedToken
        value = next(iter(value), None) if isinstance(value, list) else value  # several ids, the main one first
        tokens[key.removesuffix("_token")] = value if isinstance(value, str | int) else None
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}.get("default")
    file = folder / "chat_template.jinja"
    if template is None and file.is_file():
        template = file.read_text()
    return tokens, template


def _read_json(file: epath.Path) -> dict[str, Any]:
    """Content of a configuration file; empty when there is none."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise UserError(f"broken configuration: {file} ({error}); get the file again or remove it") from error
    return value


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
        return build(metadata)
    except KeyError as error:
        raise UserError(f"incomplete tokenizer: no GGUF key {error.args[0]}; convert the model again") from error
    except (IndexError, TypeError, ValueError) as error:
        raise UserError(f"unusable tokenizer: GGUF keys tokenizer.* ({error}); convert the model again") from error


def _byte_level_bpe(metadata: Mapping[str, Any]) -> Tokenizer:
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
    return HFTokenizer(tokenizer.to_str(), bos=bos, eos=eos, pad=pad, chat_template=chat_template)


def _sentencepiece_bpe(metadata: Mapping[str, Any]) -> Tokenizer:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # needs protobuf, which reading a model does not

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
    return SentencePieceTokenizer(proto.SerializeToString(), pad=pad, chat_template=chat_template)
