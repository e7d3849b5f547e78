"""Text of files whose encoding nobody wrote down: tables, subtitles, names of files."""

import codecs
import re

import chardet

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with UTF-16's mark
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What people's files are in beside Unicode, by chardet's names.
EAST_ASIAN = ("gb18030", "big5", "cp932", "euc-jp", "cp949")
LEGACY = (*EAST_ASIAN, *(f"cp{number}" for number in (874, *range(1250, 1259))), "koi8-r")
WESTERN_MARGIN = 2  # so much surer than of Windows-1252 the detector must be: a few accents tell it little

_HIGH = re.compile(rb"[\x80-\xff]")


def decode_text(data: bytes, errors: str = "replace") -> str:
    """Decode text of an unknown encoding, without its byte order mark.

    A byte order mark decides; then UTF-16 where there are zero bytes, UTF-8 where it is that but for a few bytes, and
    otherwise what a detector takes it for among LEGACY.

    Args:
        errors: what becomes of wrong bytes in UTF-8, as in `bytes.decode`; in other encodings they are replaced.
    """
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return data.decode(encoding, errors if encoding == "utf-8-sig" else "replace")
    if b"\0" in data:  # text has none: the upper halves of ASCII
        even, odd = (data[side::2].count(0) for side in (0, 1))
        return data.decode("utf-16-be" if even > odd else "utf-16-le", "replace")
    high = sum(byte > 0x7F for byte in data)
    wrong = sum("\udc80" <= character <= "\udcff" for character in data.decode("utf-8", "surrogateescape"))
    encoding = "utf-8" if 10 * wrong <= high else _detect(data)
    if encoding not in EAST_ASIAN and 2 * wrong <= high:  # hardly any of their texts has sequences of UTF-8
        encoding = "utf-8"
    return data.decode(encoding, errors if encoding == "utf-8" else "replace")


def _detect(data: bytes) -> str:
    """Name the encoding among LEGACY."""
    # Only the lines that tell something: plain ASCII counts against every encoding but the Western one.
    telling = b"\n".join(line for line in data.splitlines() if _HIGH.search(line))
    found = chardet.detect_all(telling, ignore_threshold=True, include_encodings=LEGACY)
    sureness = {one["encoding"].lower(): one["confidence"] for one in found}
    best = max(sureness, key=sureness.get, default="cp1252")
    if sureness.get(best, 0) < WESTERN_MARGIN * sureness.get("windows-1252", 0):
        return "cp1252"
    return best.replace("windows-", "cp")
