"""Lists and tables as people have them: one set of rules, whatever the format."""

import json
import logging
import re
import unicodedata

import pytest

from emollama_jax.data.problems import Problem
from emollama_jax.data.tables import key_of, read_captions, read_rows, read_subtitles
from emollama_jax.errors import UserError


def rows_of(path, content: str | bytes, **options) -> tuple[list[dict], list[Problem]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    problems: list[Problem] = []
    return [row.fields for row in read_rows(path, problems, **options)], problems


TABLE = "name,emotion,subtitle\na,happy,谢谢你。\nb,sad,Why did nobody call me?\nc,neutral,ok\n"
ROWS = [
    {"name": "a", "emotion": "happy", "subtitle": "谢谢你。"},
    {"name": "b", "emotion": "sad", "subtitle": "Why did nobody call me?"},
    {"name": "c", "emotion": "neutral", "subtitle": "ok"},
]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("t.csv", TABLE.encode("utf-16")),  # Excel's "Unicode text"
        ("t.csv", TABLE.encode("gb18030")),
        ("t.csv", TABLE.replace(",", ";")),
        ("t.csv", "sep=;\r\n" + TABLE.replace(",", ";")),
        ("t.tsv", TABLE.replace(",", "\t")),
        ("t.txt", TABLE.replace(",", "\t")),
        ("t.txt", TABLE),
        ("t.json", json.dumps(ROWS, indent=1)),
        ("t.jsonl", "\n".join(json.dumps(row) for row in ROWS)),
    ],
    ids=["utf16", "gbk", "semicolon", "sep", "tsv", "txt-tab", "txt-comma", "json", "jsonl"],
)
def test_every_format_says_the_same(tmp_path, file, content):
    assert rows_of(tmp_path / file, content) == (ROWS, [])


@pytest.mark.smoke
@pytest.mark.parametrize("file", ["t.xlsx", "t.csv"])  # people rename them
def test_excel(tmp_path, file):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (
        ["name", "emotion", "valence", "peak_index"],
        [7, "happy", -1.5, 3.0],
        [None] * 4,
        ["b", "sad", None, ""],
    ):
        book.active.append(row)
    book.create_sheet("empty")
    book.save(tmp_path / "made.xlsx")
    data = (tmp_path / "made.xlsx").read_bytes()
    expected = [
        {"name": "7", "emotion": "happy", "valence": -1.5, "peak_index": 3},
        {"name": "b", "emotion": "sad"},
    ]
    assert rows_of(tmp_path / file, data) == (expected, [])
    with pytest.raises(UserError, match="not an Excel file, or damaged"):
        rows_of(tmp_path / file, data[:200])
    book["empty"].append(["name"])
    book.save(tmp_path / "made.xlsx")
    with pytest.raises(UserError, match="several sheets: Sheet, empty; keep one"):
        rows_of(tmp_path / file, (tmp_path / "made.xlsx").read_bytes())


@pytest.mark.parametrize("header", ["name,emotion,emotion", "name,emotion,Emotion ", "name,name,emotion"])
def test_a_header_that_is_there_twice(tmp_path, header):
    repeated = re.search("(name|emotion),", header[5:] if "name,name" not in header else header)[1]
    with pytest.raises(UserError, match=f"the column {repeated} is there twice; keep one of them"):
        rows_of(tmp_path / "t.csv", f"{header}\na,happy,sad\n")


def test_columns_that_nothing_reads(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        rows_of(tmp_path / "t.csv", ",name,emotion,Mood,mood,speaker\n0,a,happy,x,y,z\n")
        assert "nothing reads the columns mood, speaker" in caplog.text
        caplog.clear()
        rows_of(tmp_path / "t.jsonl", '{"name": "a", "status": "error", "stage": "read", "error": "damaged"}')
        assert not caplog.text


MARKERS = ["nan", "NaN", "N/A", "null", "NULL", "None", "<NA>", "#N/A", "#REF!", " "]


@pytest.mark.parametrize("marker", MARKERS)
def test_markers_of_missing_values(tmp_path, marker):
    table = f"name,emotion,subtitle,valence,peak_index,question\na,{','.join([marker] * 5)}\n"
    assert rows_of(tmp_path / "t.csv", table) == ([{"name": "a"}], [])
    assert rows_of(tmp_path / "t.txt", f"a 3 sad {marker}\n" if marker.strip() else "a 3 sad\n")[0] == [
        {"name": "a", "frame_count": 3, "emotion": "sad"}
    ]


def test_json_not_a_number(tmp_path):
    lines = ['{"name": "a", "subtitle": NaN, "question": NaN, "valence": NaN}', '{"name": "b", "valence": Infinity}']
    rows, problems = rows_of(tmp_path / "t.jsonl", "\n".join(lines))
    assert rows == [{"name": "a"}] and "valence 'inf' is not a number" in problems[0].message


def test_keys_that_differ_in_case_alone(tmp_path):
    rows, problems = rows_of(tmp_path / "t.jsonl", '{"name": "a", "emotion": "sad", "Emotion": "happy"}')
    assert rows == [{"name": "a", "emotion": "sad"}]
    assert [(problem.kind, problem.name) for problem in problems] == [("duplicate_key", "a")]


def test_two_columns_of_one_field_that_disagree(tmp_path):
    rows, problems = rows_of(tmp_path / "t.csv", "name,emotion,label\na,angry,4\nb,sad,Sad\nc,sad,happy\n")
    assert [row["emotion"] for row in rows] == ["angry", "sad"]
    assert problems[0].name == "c" and "emotion says 'sad' and label says 'happy'" in problems[0].message
    rows, problems = rows_of(
        tmp_path / "t.csv", "name,video_name,answer,response\n7,007.mp4,sad,Sad\nBob,8,,\n9,,a,b\n"
    )
    assert rows == [{"name": "7", "answer": "sad"}]
    assert "name says 'Bob' and video_name says '8'; keep one column" in problems[0].message
    assert "answer says 'a' and response says 'b'; keep one column" in problems[1].message


MELD = {"emotion": "joy", "subtitle": "Oh!"}


@pytest.mark.parametrize(
    ("table", "row"),
    [
        ("video_name,label\n00003.mp4,3\n", {"name": "00003.mp4", "emotion": "3"}),  # no guess what 3 means
        ('names,emotions,subtitles,reasons\ns1,angry,Go away.,"He roared, so"\n', "EMER"),
        ("name,Utterance\na,Oh my God!\n", {"name": "a", "subtitle": "Oh my God!"}),
        ("Utterance,Emotion,Dialogue_ID,Utterance_ID\nOh!,joy,3,11\n", {"name": "dia3_utt11", **MELD}),
        ("name,chinese\na,你好\n", {"name": "a", "subtitle": "你好"}),
        ("name,chinese,english\na,你好,hello\n", {"name": "a", "subtitle": "hello"}),
        ("name,openset\na,\"['happy', 'excited']\"\n", {"name": "a", "emotion": "['happy', 'excited']"}),
        ('name,valence\na,"-1,5"\n', {"name": "a", "valence": -1.5}),
    ],
)
def test_headers_of_the_field(tmp_path, table, row):
    if row == "EMER":
        row = {"name": "s1", "emotion": "angry", "subtitle": "Go away.", "caption_fine": "He roared, so"}
    assert rows_of(tmp_path / "t.csv", table) == ([row], [])


def test_what_the_reference_writes_is_never_a_subtitle(tmp_path):
    (tmp_path / "t.csv").write_text("names,chi_reasons\na,He is angry\n")
    with pytest.raises(UserError, match="no column subtitle"):
        read_subtitles(tmp_path / "t.csv", [])


def test_lists_of_labels_in_json(tmp_path):
    rows, problems = rows_of(tmp_path / "t.jsonl", '{"name": "a", "emotion": ["happy", "sad"], "answer": ["sad"]}')
    assert rows == [{"name": "a", "emotion": "[happy, sad]", "answer": "[sad]"}] and not problems


@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        ("ok.mp4\nsub/ok 2.MP4\n", [{"name": "ok.mp4"}, {"video": "sub/ok 2.MP4"}]),
        ("a\nb\n", [{"name": "a"}, {"name": "b"}]),
        ("a sad\nmy clip.mp4\n", [{"name": "a", "emotion": "sad"}, {"name": "my clip.mp4"}]),
    ],
)
def test_plain_lists_of_videos(tmp_path, lines, rows):
    assert rows_of(tmp_path / "t.txt", lines) == (rows, [])


def test_what_is_no_table_is_one_line(tmp_path):
    with pytest.raises(UserError, match="an Excel file of before 2007: .*; save it as .xlsx or CSV"):
        rows_of(tmp_path / "t.csv", b"\xd0\xcf\x11\xe0\xa1\xb1")
    with pytest.raises(UserError, match="the header cannot be read"):
        rows_of(tmp_path / "t.csv", 'name,"emotion\na,b\n')


def test_a_bad_row_of_subtitles_or_captions_puts_no_clip_aside(tmp_path):
    (tmp_path / "s.csv").write_text("name,sentence\na,hi\nb,x,y\n,nobody\n")
    (tmp_path / "c.json").write_text('{"7": {"caption": "first"}, "007": {"caption": "second"}, "b": 3}')
    problems: list[Problem] = []
    assert read_subtitles(tmp_path / "s.csv", problems) == {"a": "hi"}
    assert read_captions(tmp_path / "c.json", problems) == {"7": {"caption_coarse": "first"}}
    assert [(problem.kind, problem.name) for problem in problems] == [
        ("unparsable_subtitle", "b"),
        ("unparsable_subtitle", None),
        ("duplicate_key", "007"),
        ("unparsable_caption", "b"),
    ]


def test_names_of_one_clip():
    assert {key_of(name) for name in ("7", "00007", "00007.mp4", "7.AVI")} == {"7"}
    composed = unicodedata.normalize("NFC", "é.mp4")
    assert key_of(composed) == key_of(unicodedata.normalize("NFD", composed)) == "é"
    assert key_of("a.b") == "a.b" and key_of("000") == "0"


def test_peaks_that_are_texts_count_from_1_as_mer_factory_writes_them(tmp_path):
    def peaks(*values):
        clips = {f"c{i}": {"peak_index": value, "text": ""} for i, value in enumerate(values)}
        (tmp_path / "c.json").write_text(json.dumps(clips))
        problems: list[Problem] = []
        found = read_captions(tmp_path / "c.json", problems)
        return [fields.get("peak_index") for fields in found.values()], [problem.kind for problem in problems]

    assert peaks("12", "1", "nan") == ([11, 0, None], ["counted_from_1"])
    assert peaks(12, 1) == ([12, 1], []) and peaks("12", 1) == ([12, 1], [])
    assert peaks("12", "0") == ([12, 0], [])  # these count from 0
