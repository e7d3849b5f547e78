from types import SimpleNamespace

import pytest

from emollama_jax.io import stopwatch
from emollama_jax.io.stopwatch import Stopwatch


def test_times_add_up_and_what_is_left_has_the_rest(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watch = Stopwatch()
    for what, seconds in (("start", 3.0), ("data", 1.0), ("data", 1.0)):
        with watch(what):
            now[0] += seconds
    now[0] += 5.0
    assert watch.seconds == {"start": 3.0, "data": 2.0}
    assert watch.elapsed() == 10.0
    assert watch.rest_share() == pytest.approx(0.5)
