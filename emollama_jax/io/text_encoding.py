"""Text of files whose encoding nobody wrote down: tables, subtitles, names of files."""

import codecs
import re

import charset_normalizer

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with UTF-16's mark
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
EAST_ASIAN, EUROPEAN = ("gb18030", "big5", "cp932", "cp949"), ("cp1251", "cp1252")


def decode_text(data: bytes, errors: str = "replace") -> str:
    """Decode text of an unknown encoding, without its byte order mark.

    A byte order mark decides; then UTF-16 where there are zero bytes, UTF-8 where it is that but for a few bytes, and
    otherwise what a detector takes it for: GB18030, Big5, Shift-JIS, EUC-KR, Windows-1251 or Windows-1252.

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
    if encoding in EUROPEAN and 2 * wrong <= high:  # hardly any of their texts has sequences of UTF-8
        encoding = "utf-8"
    return data.decode(encoding, errors if encoding == "utf-8" else "replace")


def _detect(data: bytes) -> str:
    """Name the encoding, by the detector as to the script, and by the most common characters within it."""
    found = charset_normalizer.from_bytes(data, cp_isolation=[*EAST_ASIAN, *EUROPEAN]).best()
    encoding = found.encoding if found else "cp1252"
    if encoding in EUROPEAN:  # Russian words are of high bytes alone, others have some among ASCII letters
        mixed, alone = (
            re.findall(rb"[A-Za-z][\xc0-\xff]|[\xc0-\xff][A-Za-z]", data),
            re.findall(rb"[\xc0-\xff]{2}", data),
        )
        return "cp1251" if len(alone) > len(mixed) else "cp1252"
    pairs = re.findall(rb"[\x80-\xff][\x40-\xff]", data)
    count = lambda pattern: sum(re.fullmatch(pattern, pair) is not None for pair in pairs)
    if encoding == "cp932" or encoding == "cp949" and count(rb"[\xb0-\xc8][\xa1-\xfe]") > 0.9 * len(pairs):  # Hangul
        return encoding
    simplified, traditional = count(rb"[\xb0-\xd7][\xa1-\xfe]"), count(rb"[\xa4-\xc6][\x40-\x7e\xa1-\xfe]")  # level 1
    return "big5" if traditional > simplified else "gb18030"
