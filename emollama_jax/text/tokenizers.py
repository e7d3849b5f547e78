"""Text to token ids and back, for every way a LLaMA-family vocabulary is stored.

`load_tokenizer` reads a Hugging Face folder (`tokenizer.model` or `tokenizer.json`), `gguf_tokenizers` the metadata of
a GGUF file. Both return a `Tokenizer`, which encodes ONE text segment at a time and never adds BOS or EOS: where those
go is the prompt's business.

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

from emollama_jax.errors import UserError
from emollama_jax.io.json_files import read_json_object
from emollama_jax.io.paths import PathLike, as_path, is_file
from emollama_jax.text.added_tokens import AddedToken, read_added_tokens

Token = str | int | None  # a special token by name or id, or none
# Settings of a tokenizer_config.json that are not kept: records of files, and code.
NOT_KEPT = ("auto_map", "tokenizer_class", "tokenizer_file", "vocab_file", "name_or_path", "special_tokens_map_file")


class Tokenizer(ABC):
    """A vocabulary with its special ids. Instances can be shared between threads and pickled to workers.

    Attributes:
      vocab_size: one more than the highest id.
      bos_id: id that starts a sequence, or None when the vocabulary has none.
      eos_id: id that ends a sequence.
      end_ids: ids that end an answer: `eos_id`, and others that the model's files name.
      pad_id: id for padding; `eos_id` when the vocabulary has none.
      chat_template: the Jinja text that came with the vocabulary, or None.
      settings: what else its tokenizer_config.json said; it is kept when the tokenizer is saved.
    """

    def __init__(
        self,
        size: int,
        find: Callable[[str], int | None],
        ends: Iterable[Token],
        *,
        more_ends: Iterable[Token] = (),
        chat_template: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        """`ends` are BOS, EOS and padding, `more_ends` what ends an answer beside EOS; `find` looks a name up. What the
        vocabulary does not have counts as none.

        Raises ValueError for an EOS of none.
        """
        known = lambda token: token if token is not None and 0 <= token < size else None
        bos_id, eos_id, pad_id, *others = (
            known(find(token) if isinstance(token, str) else token) for token in (*ends, *more_ends)
        )
        if eos_id is None:
            raise ValueError("no end-of-sequence token that is in the vocabulary")
        self.vocab_size = size
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.end_ids = tuple(dict.fromkeys([eos_id, *(token for token in others if token is not None)]))
        self.chat_template = chat_template
        self.settings = {name: value for name, value in (settings or {}).items() if name not in NOT_KEPT}

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
        config = {**self.settings, **settings, "clean_up_tokenization_spaces": False}
        for name, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("pad_token", self.pad_id)):
            config[name] = None if token is None else piece(token)
        if self.chat_template is not None and not isinstance(config.get("chat_template"), list):
            config["chat_template"] = self.chat_template
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (file.parent / "tokenizer_config.json").write_text(text, encoding="utf-8")


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with the "legacy" segmentation that LLaMA-2 was fine-tuned with.

    The text is split at the special tokens, and every part between them gets sentencepiece's dummy space of its own:
    `"a</s>b"` is `▁a`, `</s>`, `▁b`. Tokens that were added behind the model's own pieces take part in this; they are
    parsed even from plain text unless they are special.
    """

    def __init__(
        self,
        model: bytes,
        *,
        bos: Token = None,
        eos: Token = None,
        pad: Token = None,
        more_ends: Iterable[Token] = (),
        added: Iterable[AddedToken] = (),
        chat_template: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        """`model` is the content of a `tokenizer.model`; `pad` takes the place of its own padding piece, and `bos` and
        `eos` of its own where they are added tokens: old LLaMA folders name these wrongly.

        Raises ValueError for a model or added tokens that cannot be used.
        """
        self._model = SentencePieceProcessor()
        try:
            if not model:  # which the library takes for a model of no pieces
                raise RuntimeError("the file is empty")
            self._model.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise ValueError(f"not a sentencepiece model, or cut short: {error}") from error
        pieces, added = self._model.vocab_size(), {token.id: token for token in added}
        if words := [token.content for token in added.values() if token.single_word]:
            raise ValueError(f"added tokens that are found as whole words only, {', '.join(words)}, are not supported")
        if wrong := [t for t in added.values() if t.id < pieces and self._model.id_to_piece(t.id) != t.content]:
            raise ValueError(f"added token {wrong[0].content!r} has the id {wrong[0].id} of another piece")
        self._added = {i: token for i, token in added.items() if i >= pieces}
        own = {"bos": self._model.bos_id(), "eos": self._model.eos_id()}
        is_added = lambda token: (
            token is not None and (self._piece_id(token) if isinstance(token, str) else token) in self._added
        )
        ends = (bos if is_added(bos) else own["bos"], eos if is_added(eos) else own["eos"])
        super().__init__(
            max([pieces, *(i + 1 for i in self._added)]),
            self._piece_id,
            (*ends, self._model.pad_id() if pad is None else pad),
            more_ends=more_ends,
            chat_template=chat_template,
            settings=settings,
        )
        special = [i for i in range(pieces) if self._model.is_control(i) or self._model.is_unknown(i)]
        special += [i for i, token in self._added.items() if token.special or i in (self.bos_id, self.eos_id)]
        self._special_ids = set(special)
        self._strip = {token.content: token for token in added.values() if token.lstrip or token.rstrip}
        plain = [i for i in self._added if i not in self._special_ids]
        self._always = _Splitter({self._content(i): i for i in plain})
        self._parsing = _Splitter({self._content(i): i for i in (*special, *plain)})

    def _content(self, token: int) -> str:
        return self._added[token].content if token in self._added else self._model.id_to_piece(token)

    def _piece_id(self, piece: str) -> int | None:
        for token in self._added.values():
            if token.content == piece:
                return token.id
        token = self._model.piece_to_id(piece)
        return token if self._model.id_to_piece(token) == piece else None  # an unknown piece gets the id of <unk>

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = super()._checked(ids)
        if gap := [token for token in ids if token >= self._model.vocab_size() and token not in self._added]:
            raise ValueError(f"token id {gap[0]} is in a gap of the vocabulary, before its added tokens")
        return ids

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        splitter = self._parsing if specials else self._always
        parts = splitter.split(text)  # text, token, text, ..., token, text
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(splitter.ids[part])
                continue
            before, after = (self._strip.get(parts[j]) if 0 <= j < len(parts) else None for j in (i - 1, i + 1))
            part = part.lstrip() if before and before.rstrip else part
            part = part.rstrip() if after and after.lstrip else part
            ids += self._model.encode(part)
        return ids

    def decode(self, ids: Iterable[int], *, skip_specials: bool = True) -> str:
        """As in the base class; one dummy space is removed, or one after every special or added token that is kept."""
        kept = [token for token in self._checked(ids) if not (skip_specials and token in self._special_ids)]
        text = ""
        for is_whole, group in groupby(kept, lambda token: token in self._special_ids or token in self._added):
            run = list(group)
            text += "".join(map(self._content, run)) if is_whole else self._model.decode(run)
        return text

    def save(self, folder: PathLike) -> None:
        file, content = Path(folder) / "tokenizer.model", self._model.serialized_model_proto()
        settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
        if self._added:
            given = dict(self.settings.get("added_tokens_decoder") or {})
            settings["added_tokens_decoder"] = given | {str(i): token.settings() for i, token in self._added.items()}
        self._write(file, content, self._content, **settings)
        if self._added:
            text = json.dumps({token.content: i for i, token in self._added.items()}, indent=2, ensure_ascii=False)
            (file.parent / "added_tokens.json").write_text(text + "\n", encoding="utf-8")


class _Splitter:
    """Splits a text at tokens that are written out in it: text, token, text, ..., token, text. The longest one counts
    where one is the beginning of another."""

    def __init__(self, ids: Mapping[str, int]):
        self.ids = dict(ids)
        longest_first = sorted(map(re.escape, self.ids), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(longest_first)})") if longest_first else None

    def split(self, text: str) -> list[str]:
        return self._pattern.split(text) if self._pattern else [text]


class HFTokenizer(Tokenizer):
    """A `tokenizer.json` run by the `tokenizers` library; its post-processor is never used."""

    def __init__(
        self,
        spec: str,
        *,
        bos: Token,
        eos: Token,
        pad: Token,
        more_ends: Iterable[Token] = (),
        added: Iterable[AddedToken] = (),
        chat_template: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        """`spec` is the content of a `tokenizer.json`, `added` what it must hold. Raises ValueError when it cannot be
        used."""
        try:
            # Whether special tokens are parsed is a state of the library's object: one for each keeps threads apart.
            self._parsing, self._plain = hf.Tokenizer.from_str(spec), hf.Tokenizer.from_str(spec)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"not a tokenizer.json ({error})") from error
        size = max(self._parsing.get_vocab().values(), default=-1) + 1
        if wrong := [token.content for token in added if self._parsing.token_to_id(token.content) != token.id]:
            raise ValueError(f"the added tokens {', '.join(wrong)} are not in it, or have other ids there")
        super().__init__(
            size,
            self._parsing.token_to_id,
            (bos, eos, pad),
            more_ends=more_ends,
            chat_template=chat_template,
            settings=settings,
        )
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
        ends = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "more_ends": self.end_ids}
        others = {"chat_template": self.chat_template, "settings": self.settings}
        return partial(HFTokenizer, **ends, **others), (self._parsing.to_str(),)

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

    The configuration files beside it name the special and the added tokens, what ends an answer, and the chat template;
    BOS and EOS of a `tokenizer.model` are its own unless they were added to it. Raises UserError when there is no such
    file or it cannot be used.
    """
    file = as_path(path)
    if file.is_dir():
        file = next((f for f in (file / "tokenizer.model", file / "tokenizer.json") if is_file(f)), file)
    if file.suffix not in (".model", ".json"):
        raise UserError(f"no tokenizer.model or tokenizer.json: {file}; give a folder or file that has one of them")
    try:
        content = file.read_bytes()
        given = _read_configs(file.parent)
        if file.suffix == ".model":
            if changed := [name for name in ("do_lower_case", "sp_model_kwargs") if given["settings"].get(name)]:
                raise ValueError(f"{changed[0]}={given['settings'][changed[0]]!r} in tokenizer_config.json")
            return SentencePieceTokenizer(content, **given)
        return HFTokenizer(content.decode("utf-8"), **given)
    except OSError as error:
        raise UserError(f"cannot read the tokenizer: {error.filename} ({error.strerror}); check the path") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"unusable tokenizer: {file} ({error}); get all files of the tokenizer again") from error


def _read_configs(folder: epath.Path) -> dict[str, Any]:
    """The arguments of a tokenizer that the folder's files give beside its vocabulary."""
    files = ("tokenizer_config.json", "special_tokens_map.json", "config.json")  # the first that says something wins
    config, names, model = (_read_json(folder / name) for name in files)
    ids = {key.removesuffix("_id"): value for key, value in model.items() if key.endswith("_token_id")}
    given: dict[str, Any] = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        # null means that there is no such token; but there always is an end.
        values = [source[key] for source in (config, names, ids) if key in source]
        value = next((v for v in values if v is not None or key != "eos_token"), None)
        value = value.get("content") if isinstance(value, dict) else value  # an AddedToken
        value = next(iter(value), None) if isinstance(value, list) else value  # several ids, the main one first
        given[key.removesuffix("_token")] = value if isinstance(value, str | int) else None
    ends = [source.get("eos_token_id") for source in (model, _read_json(folder / "generation_config.json"))]
    ends = [end for several in ends for end in (several if isinstance(several, list) else [several])]
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}.get("default")
    file = folder / "chat_template.jinja"
    if template is None and file.is_file():
        template = file.read_text()
    several = {name: value for name, value in names.items() if name == "additional_special_tokens"}
    return given | {
        "more_ends": [end for end in ends if type(end) is int],
        "added": read_added_tokens(config, names, _read_json(folder / "added_tokens.json")),
        "chat_template": template,
        "settings": several | config,
    }


def _read_json(file: epath.Path) -> dict[str, Any]:
    """Content of a configuration file; empty when there is none."""
    if not is_file(file):
        return {}
    try:
        return read_json_object(file)
    except ValueError as error:
        raise UserError(f"broken configuration: {file} ({error}); get the file again or remove it") from error
