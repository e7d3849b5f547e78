"""Words of texts in any script, by which labels and answers are compared."""

import re
import unicodedata

_EAST_ASIAN = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # kana and Chinese characters, which stand without spaces
_LETTERS = rf"[^\W_{_EAST_ASIAN}]+"
_WORD = re.compile(rf"[{_EAST_ASIAN}]|{_LETTERS}(?:['’-]{_LETTERS})*")


def words(text: str) -> list[str]:
    """Split a text into words in lower case, without punctuation except within a word: it's, half-hearted.

    A Chinese or Japanese character is a word by itself. Letters that only look different (full width, composed or not)
    are the same.

    >>> words("_Half-hearted_, she isn't: 很开心。")
    ['half-hearted', 'she', "isn't", '很', '开', '心']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
