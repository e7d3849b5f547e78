"""Text of unknown encodings is read as it was written."""

import pytest

from emollama_jax.io.text_encoding import decode_text

CHINESE = "name,sentence\na,为什么没有人给我打电话？\nb,谢谢你。\nc,OK\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030"])
@pytest.mark.parametrize("text", [CHINESE, "name\temotion\na\thappy\n"])
def test_unicode_with_and_without_marks(text, encoding):
    assert decode_text(text.encode(encoding)) == text


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("中文", "gb18030"),  # a file's name
        ("a,你好\nb,ok\n", "gb18030"),
        ("我真的很生氣，你為什麼不來\n", "big5"),
        ("どうして誰も電話してくれないの\n", "cp932"),
        ("为什么没有人", "gb18030"),
        ("café", "cp1252"),
        ("안녕하세요 반갑습니다\n", "cp949"),
        ("Привет, как дела\n", "cp1251"),
        ("name,subtitle\na,x\nb,café\n", "cp1252"),
        ("I don’t know…", "cp1252"),
        ("Schöne Grüße für alle", "cp1252"),
        ("どうして誰も電話してくれないの\n", "euc_jp"),
        ("Почему мне никто не позвонил", "koi8_r"),
        ("Dlaczego nikt nie zadzwonił? Żółć", "cp1250"),
        ("Γιατί δεν με πήρε κανείς", "cp1253"),
        ("لماذا لم يتصل بي أحد", "cp1256"),
        ("ทำไมไม่มีใครโทรหาฉัน", "cp874"),
        ("1\n00:00:00,500 --> 00:00:01,500\nÉlève à l’été, naïf — où ça?\n", "cp1252"),
        ("créée, été, Ärger, señor", "latin-1"),
        ("龍馬繁體字與𠮷", "gb18030"),
    ],
)
def test_older_encodings(text, encoding):
    assert decode_text(text.encode(encoding)) == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (CHINESE.encode() + b"\xff d", CHINESE + "� d"),  # a stray byte
        (CHINESE.encode()[:-10], CHINESE[:-8] + "�"),
        ("I don’t know ".encode() + b"\xff", "I don’t know �"),
        (b"", ""),
    ],
)
def test_a_few_bytes_that_are_wrong_cost_themselves(data, text):
    assert decode_text(data) == text


def test_wrong_bytes_can_be_kept():
    assert decode_text(CHINESE.encode() + b"\xff", "surrogateescape") == CHINESE + "\udcff"
