"""Tokens that were added to a vocabulary, as transformers writes them beside its file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before it is cut into pieces.

    Attributes:
        special: whether it steers the model rather than being text.
        lstrip: whether it takes the white space before it away, rstrip that behind it.
        single_word: whether it is found only as a whole word.
    """

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def settings(self) -> dict[str, Any]:
        """The token as `added_tokens_decoder` has it."""
        flags = {"lstrip": self.lstrip, "normalized": False, "rstrip": self.rstrip, "single_word": self.single_word}
        return {"content": self.content, **flags, "special": self.special}


def read_added_tokens(
    config: Mapping[str, Any], names: Mapping[str, Any], ids: Mapping[str, Any]
) -> tuple[AddedToken, ...]:
    """The tokens in `added_tokens_decoder` of a tokenizer_config.json, and those in the older added_tokens.json.

    Args:
        config: the content of tokenizer_config.json.
        names: of special_tokens_map.json, which says how tokens of an added_tokens.json behave.
        ids: of added_tokens.json: an id for each token.

    Raises:
        ValueError: the files contradict each other or make no sense.
    """
    given = {int(i): dict(flags) for i, flags in (config.get("added_tokens_decoder") or {}).items()}
    special = _special_tokens({**names, **config})
    for content, i in ids.items():
        if type(i) is not int or i < 0:
            raise ValueError(f"added_tokens.json gives {content!r} the id {i!r}")
        flags = given.setdefault(i, {"special": content in special, **special.get(content, {}), "content": content})
        if flags["content"] != content:
            raise ValueError(f"two added tokens, {flags['content']!r} and {content!r}, have the id {i}")
    flags_of = lambda flags: (bool(flags.get(name)) for name in ("special", "lstrip", "rstrip", "single_word"))
    tokens = [AddedToken(i, str(flags["content"]), *flags_of(flags)) for i, flags in sorted(given.items())]
    if len({token.content for token in tokens}) != len(tokens):
        raise ValueError("an added token has two ids")
    return tuple(tokens)


def _special_tokens(named: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The special tokens that configuration files name, with their flags where they say more than the name."""
    values = [value for key, value in named.items() if key.endswith("_token")]
    values += named.get("additional_special_tokens") or []
    tokens = [value if isinstance(value, dict) else {"content": value} for value in values]
    return {token["content"]: token for token in tokens if isinstance(token.get("content"), str)}
