import pytest

from emollama_jax.errors import UserError
from emollama_jax.plan.topology import CHIPS, parse_topology


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "kind", "shape", "size"),
    [
        ("v5e-1", "v5e", (1, 1), 1),
        ("v5e-16", "v5e", (4, 4), 16),
        ("v5litepod-16", "v5e", (4, 4), 16),
        ("v5e-256", "v5e", (16, 16), 256),
        ("v6e-8", "v6e", (2, 4), 8),
        ("v5p-16", "v5p", (2, 2, 2), 8),
        ("v5p-8", "v5p", (2, 2, 1), 4),
        ("v4-32", "v4", (2, 2, 4), 16),
        ("h100-8", "h100", (8,), 8),
        ("h200-1", "h200", (1,), 1),
        ("t4-1", "t4", (1,), 1),
        ("2xv5e-16", "v5e", (4, 4), 32),
        ("4xh100-8", "h100", (8,), 32),
    ],
)
def test_names_of_clouds(name, kind, shape, size):
    topology = parse_topology(name)
    assert topology.chip is CHIPS[kind]
    assert (topology.shape, topology.size) == (shape, size)
    assert topology.platform == ("cuda" if kind in ("h100", "h200", "t4") else "tpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "--topology v5e: no such chips; write KIND-NUMBER"),
        ("v7x-16", "with a KIND of v4, v5e, v5p, v6e, h100, h200, t4"),
        ("v5e-12", "v5e comes in 1, 4, 8, 16, 32, 64, 128, 256"),
        ("v5p-2", r"v5p comes in 8, 16, .* \(cores, 2 a chip\)"),
        ("0xv5e-4", "v5e comes in"),
    ],
)
def test_what_there_is_not_is_told_in_one_line(name, message):
    with pytest.raises(UserError, match=message) as error:
        parse_topology(name)
    assert "\n" not in str(error.value)


def test_every_chip_has_its_peaks():
    for chip in CHIPS.values():
        assert chip.flops > 10 * chip.bandwidth > 100 * chip.network
        assert chip.link > chip.network
        assert bool(chip.clock) != bool(chip.target)
