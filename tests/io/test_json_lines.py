"""Files of JSON lines: appended to, cut short, put in another order."""

import pytest

from emollama_jax.io.json_lines import JsonLinesFile, read_json_lines, write_json_lines


@pytest.mark.smoke
def test_what_is_appended_is_read(tmp_path):
    file = JsonLinesFile(tmp_path / "lines")
    assert not file.path.exists()
    file.append([{"name": "é"}, {"name": "\udc80\u2028"}])
    file.append([{"x": 0.1}], durable=False)
    assert read_json_lines(tmp_path / "lines") == [{"name": "é"}, {"name": "\udc80\u2028"}, {"x": 0.1}]
    file.replace([{"x": 1}])
    file.append([{"x": 2}])
    assert (tmp_path / "lines").read_text() == '{"x": 1}\n{"x": 2}\n'
    with pytest.raises(ValueError):
        file.append([{"x": float("nan")}])
    write_json_lines(tmp_path / "lines", [])
    assert read_json_lines(tmp_path / "lines") == []


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_last_line_that_was_cut_short_is_left_out(tmp_path, cut):
    path = tmp_path / "lines"
    write_json_lines(path, [{"x": 1}, {"x": 22}])
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_json_lines(path) == [{"x": 1}]
    JsonLinesFile(path).append([{"x": 3}])
    assert read_json_lines(path) == [{"x": 1}, {"x": 3}]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"", b"\xff"])
def test_a_damaged_line_is_named_or_dropped(tmp_path, line):
    path = tmp_path / "lines"
    path.write_bytes(b'{"x": 1}\n' + line + b'\n{"x": 3}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_json_lines(path)
    JsonLinesFile(path, keep=lambda record: record["x"] > 1)
    assert path.read_bytes() == b'{"x": 3}\n'
