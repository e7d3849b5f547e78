"""`emollama params`: the numbers of the paper, from shapes alone."""

import re

import jax
import pytest

from emollama_jax import cli

pytestmark = pytest.mark.smoke

# Sizes that make every part a round number of MiB.
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 4096,
    "param_dtype": "bfloat16",
}


def params(capsys, *arguments: str) -> dict[str, tuple[int, float, float, str]]:
    """The table by part: parameters, share in percent, MiB, dtypes."""
    assert cli.main(["params", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    heading, *lines = captured.out.splitlines()
    assert heading.split() == ["part", "parameters", "share", "memory", "stored", "as"]
    assert len({line.index(" MiB  ") for line in lines}) == 1
    rows = [re.fullmatch(r"(\w+) +([\d,]+) +([\d.]+) % +([\d.,]+) MiB  (.+)", line) for line in lines]
    number = lambda text: float(text.replace(",", ""))
    return {row[1]: (int(number(row[2])), number(row[3]), number(row[4]), row[5]) for row in rows}


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["params", *arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("emollama params: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_papers_model(capsys):
    """Emotion-LLaMA trains "34M, 0.495 %" of LLaMA-2-7B; 13 GB of parameters of which no byte is allocated."""
    before = {id(array) for array in jax.live_arrays()}
    table = params(capsys, "--config", "llama2_7b")
    assert {id(array) for array in jax.live_arrays()} <= before
    assert table["LoRA"][:2] == table["trainable"][:2] == (33_554_432, 0.4955)
    assert table["frozen"][:2] == (6_738_415_616, 99.5045)
    assert table["all"][:2] == (6_771_970_048, 100)
    assert table["trainable"][2:] == (128.0, "float32")
    assert table["frozen"][2:] == (12_852.5, "bfloat16")
    assert table["head"] == table["embedding"] == (131_072_000, 1.9355, 250.0, "bfloat16")
    assert list(table) == ["LoRA", "embedding", "attention", "MLP", "norms", "head", "all", "frozen", "trainable"]


def test_tiny(capsys):
    """Counted by hand: 640 x 32 twice, 3 x 4 x 32 x 32, 3 x 3 x 32 x 88, 7 x 32, and 3 x 2 x (32 x 8 + 8 x 32)."""
    table = params(capsys, "--config=tiny")
    assert {part: row[0] for part, row in table.items()} == {
        "LoRA": 3072,
        "embedding": 20480,
        "attention": 12288,
        "MLP": 25344,
        "norms": 224,
        "head": 20480,
        "all": 81888,
        "frozen": 78816,
        "trainable": 3072,
    }
    assert table["trainable"][1] == 3.7515
    assert sum(row[1] for part, row in table.items() if part not in ("all", "frozen", "trainable")) == pytest.approx(
        100, abs=1e-3
    )


def test_tied_and_grouped(capsys):
    table = params(capsys, "--config", "smollm2_135m")
    assert "head" not in table
    assert table["frozen"][0] == 134_515_008
    assert table["trainable"][:2] == (3_686_400, 2.6674)


def test_without_adapters(capsys):
    table = params(capsys, "--config=tiny", "--config.lora.rank=0")
    assert "LoRA" not in table
    assert table["trainable"] == (0, 0, 0, "-")
    assert table["frozen"] == table["all"]


@pytest.mark.parametrize(
    ("dtype", "attention", "mlp"),
    [
        # 8 layers of 4 x 1024 x 1024 and of 3 x 1024 x 2048
        ("bfloat16", 64.0, 96.0),
        # and a float32 scale an output: 8 x 4 x 4 x 1024 B = 1/8 MiB; 8 x 4 x (2 x 2048 + 1024) B = 5/32 MiB
        ("int8", 32.125, 48.156),
        # half a byte each, and a scale for every 64 inputs: 16 tiles, and 32 of the down projection
        ("nf4", 16 + 16 / 8, 24 + 8 * 4 * (16 * 2 * 2048 + 32 * 1024) / 2**20),
    ],
)
def test_memory_of_quantised_kernels(capsys, dtype, attention, mlp):
    sizes = [f"--config.llama.{name}={value}" for name, value in LARGE.items()]
    table = params(capsys, "--config=tiny", *sizes, f"--config.llama.kernel_dtype={dtype}", "--config.lora.rank=64")
    assert table["attention"] == (32 * 2**20, table["attention"][1], pytest.approx(attention, abs=0.05), dtype)
    assert table["MLP"] == (48 * 2**20, table["MLP"][1], pytest.approx(mlp, abs=0.05), dtype)
    assert table["embedding"][2:] == table["head"][2:] == (8.0, "bfloat16")
    assert table["LoRA"][0] == 2 * 2**20
    assert table["LoRA"][2:] == (8.0, "float32")
    assert table["all"][2] == pytest.approx(attention + mlp + 24, abs=0.1)


def test_unknown_arguments(capsys):
    assert "unknown argument 'more'" in refused(capsys, "--config", "tiny", "more")
    assert "unknown argument '--verbose'" in refused(capsys, "--config=tiny", "--verbose")
    assert "--config.lora.rnk: no such field" in refused(capsys, "--config=tiny", "--config.lora.rnk=2")
    assert "tiny" in refused(capsys, "--config=tinny")
    assert "no experiment given" in refused(capsys)


def test_help(capsys):
    assert cli.main(["params", "--help"]) == 0
    assert "--config NAME_OR_PATH" in capsys.readouterr().out
