"""What a picture of runs shows."""

import json

import numpy as np
import pytest

from emollama_jax.train.plot import plot_loss


def test_runs_stand_one_behind_the_other(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")

    def picture(**runs: list[float | None]) -> np.ndarray:
        for name, losses in runs.items():
            (tmp_path / name).mkdir(exist_ok=True)
            lines = [{"step": step} | ({} if loss is None else {"loss": loss}) for step, loss in enumerate(losses, 1)]
            (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        plot_loss([tmp_path / name for name in runs], tmp_path / "loss.png")
        return np.asarray(image.open(tmp_path / "loss.png").convert("RGB"))

    def columns(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
        """Where a run's curve is, the legend aside."""
        found = (np.abs(pixels.astype(int) - colour).max(axis=-1) < 8)[120:]
        return np.flatnonzero(found.any(axis=0))

    both = picture(first=[3.0, 2.0, 1.0, 1.0], second=[0.5, None, 0.4, 0.3])
    one, two = columns(both, (31, 119, 180)), columns(both, (255, 127, 14))
    assert len(one) and len(two) and one.max() < two.min()
    assert not np.array_equal(both, picture(first=[3.0, 2.0, 1.0, 1.0], second=[0.5, None, 0.4, 2.0]))
    assert not len(columns(picture(first=[3.0, 2.0], second=[None]), (255, 127, 14)))
