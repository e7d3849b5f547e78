import io
import json

import pytest
from etils import epath

from emollama_jax.train.metrics import JsonLines, MultiWriter, Progress, TensorBoard


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_step_that_a_run_goes_on_from_are_dropped(tmp_path):
    writer = JsonLines(epath.Path(tmp_path), after=0)
    for step in (1, 2, 3):
        writer.write_scalars(step, {"loss": step / 10, "batch": "00ff"})
    writer.write_scalars(3, {"validation_loss": float("nan")})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # cut short
    again = JsonLines(epath.Path(tmp_path), after=3)
    again.write_scalars(4, {"loss": 0.4})
    again.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 3, 4]
    assert read(tmp_path)[3] == {"step": 3, "validation_loss": None}
    JsonLines(epath.Path(tmp_path), after=1).close()
    assert read(tmp_path) == [{"step": 1, "loss": 0.1, "batch": "00ff"}]
    JsonLines(epath.Path(tmp_path), after=0).close()
    assert read(tmp_path) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_lines_elsewhere_and_one_line_on_a_terminal():
    for out in (io.StringIO(), Terminal()):
        progress = Progress(1000, out)
        for step in (10, 20):
            progress.write_scalars(step, {"loss": 1.5, "clips_per_s": 12.34, "batch": "00ff"})
        progress.log("resumed")
        progress.close()
        text = out.getvalue()
        assert "step 10/1,000  loss 1.5000  12.3 clips/s" in text and "left" in text
        assert text.endswith("resumed\n")
        assert text.count("\n") == (2 if out.isatty() else 3)
        assert ("\rstep 20" in text) == out.isatty()


@pytest.mark.smoke
def test_event_files_hold_what_was_written(tmp_path):
    from tensorboardX.proto import event_pb2

    writer = MultiWriter([TensorBoard(epath.Path(tmp_path), after=4)])
    writer.write_scalars(5, {"loss": 0.25, "batch": "text is not drawn"})
    writer.flush()
    writer.close()
    (file,) = tmp_path.glob("events.out*")
    data, found = file.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    assert found == [(5, "loss", 0.25)]
