import dataclasses
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import cli
from emollama_jax.bench import peer as bench_peer
from emollama_jax.bench import report as bench_report
from emollama_jax.bench.data import DATALOADER
from emollama_jax.bench.decode import bench_decode, bytes_per_token
from emollama_jax.bench.encode import bench_encode
from emollama_jax.bench.report import OURS, Report, Result
from emollama_jax.bench.step import bench_step
from emollama_jax.config import Config, load_config
from emollama_jax.models.llama import Llama
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.sharding import abstract
from emollama_jax.train.speed import PEAKS, Peak, cost_of, device_peak_flops, encoder_flops
from emollama_jax.weights.encoders import ENCODERS, random_encoder

PEER = bench_peer.PEER
TINY = load_config("tiny")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(bench_report, "SETTLE_S", 0)


def config(**lora) -> Config:
    """Every adapter, grouped queries and a tied head, so that all that is copied to the peer counts."""
    llama = dataclasses.replace(TINY.llama, num_kv_heads=2, tie_embeddings=True, remat="none")
    return dataclasses.replace(TINY, llama=llama, lora=dataclasses.replace(TINY.lora, **lora))


def run(*argv: str, capsys) -> str:
    assert cli.main(["bench", *argv, "--config=tiny"]) == 0
    return capsys.readouterr().out


def test_decode_gives_a_table_and_every_repeat_as_json(tmp_path, capsys):
    pytest.importorskip("torch")
    file = tmp_path / "decode.json"
    argv = ["decode", "--batch", "1", "2", "--prompt", "20", "--new-tokens", "9", "--repeats", "2", "--json", str(file)]
    table = run(*argv, capsys=capsys).splitlines()
    data = json.loads(file.read_text())

    assert [(r["who"], r["batch"]) for r in data["results"]] == [(OURS, 1), (PEER, 1), (OURS, 2), (PEER, 2)]
    for result in data["results"]:
        assert len(result["runs"]) == 2
        assert result["first_call_s"] > 0
        for figures in result["runs"]:
            assert figures["tokens"] == 9 * result["batch"]
            assert figures["seconds"] > 0 and figures["prefill_ms"] > 0
            assert figures["tokens_per_s"] == pytest.approx(figures["tokens"] / figures["seconds"])
            after_first = figures["seconds"] - figures["prefill_ms"] / 1e3
            assert figures["ms_per_token"] == pytest.approx(1e3 * after_first / 8)
        assert result["best"]["tokens_per_s"] == max(figures["tokens_per_s"] for figures in result["runs"])
    assert data["settings"] == {"prompt": 20, "new_tokens": 9, "repeats": 2, "attention": "chunked"}
    assert data["config"]["llama"]["hidden_size"] == TINY.llama.hidden_size
    assert data["machine"]["cores"] and data["machine"]["versions"]["jax"] == jax.__version__
    assert data["memory"]["host_gib"] > 0

    head = next(i for i, line in enumerate(table) if "tokens/s" in line)
    assert table[head].split()[:2] == ["batch", "tokens/s"]
    rows = [line.split() for line in table[head + 1 : head + 5]]
    assert [row[:2] for row in rows] == [[OURS, "1"], [PEER, "1"], [OURS, "2"], [PEER, "2"]]
    assert [row[-1].endswith("x") for row in rows] == [True, False, True, False]
    assert data["machine"]["cpu"] in table[1]


def test_both_decode_the_same_tokens():
    pytest.importorskip("torch")
    report = bench_decode(config(), batch_sizes=[3], prompt=20, new_tokens=24, repeats=1)
    ours, theirs = (result.output for result in report.results)
    assert np.array(ours).shape == (3, 24)
    assert ours == theirs
    assert "batch 3: 100.0% of the tokens are the same from both" in report.notes


@pytest.mark.parametrize("remat", ["none", "full"])
def test_both_train_the_same_model(remat):
    """The loss falls alike over the steps: the same parameters, batch, adapters, gradients and optimiser."""
    pytest.importorskip("peft")
    experiment = config(dropout=0.0, rank=4, targets=("q_proj", "o_proj", "down_proj"))
    llama = dataclasses.replace(experiment.llama, remat=remat)
    train = dataclasses.replace(experiment.train, learning_rate=1e-4, warmup_steps=0, weight_decay=0.0)
    report = bench_step(dataclasses.replace(experiment, llama=llama, train=train), batch=2, length=24, repeats=4)
    ours, theirs = (np.array(result.output) for result in report.results)
    assert ours.shape == theirs.shape == (5, 2)  # loss and gradient's norm
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert ours[-1, 0] < ours[0, 0] - 1e-5
    assert any(note.startswith("loss and gradient's norm of the first step") for note in report.notes)


def test_step_gives_a_table_and_every_repeat_as_json(tmp_path, capsys):
    pytest.importorskip("peft")
    file = tmp_path / "step.json"
    table = run("step", "--batch=2", "--length=24", "--repeats=2", "--json", str(file), capsys=capsys)
    data = json.loads(file.read_text())
    assert [(r["who"], r["batch"], len(r["runs"])) for r in data["results"]] == [(OURS, 2, 2), (PEER, 2, 2)]
    for figures in (figures for result in data["results"] for figures in result["runs"]):
        assert figures["tokens"] == 48
        assert figures["tokens_per_s"] == pytest.approx(48 / figures["ms_per_step"] * 1e3)
    assert "ms/step" in table and PEER in table


def test_the_peer_has_our_parameters_and_adapters():
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    experiment = config(rank=4, targets=("q_proj", "down_proj"))
    model = Llama(experiment.llama, experiment.lora, rngs=nnx.Rngs(0))
    model.layers.mlp.down_proj.lora_b[...] += 0.1
    peer = bench_peer.add_adapters(bench_peer.torch_llama(model), model, experiment.lora).eval()
    tokens = np.random.default_rng(0).integers(0, experiment.llama.vocab_size, (2, 12), np.int32)
    positions = jnp.tile(jnp.arange(12), (2, 1))
    ours = model.logits(model(model.embed_tokens(jnp.asarray(tokens)), positions, jnp.ones_like(positions)))
    with torch.no_grad():
        theirs = peer(input_ids=torch.tensor(tokens, dtype=torch.int64)).logits
    np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-5)
    trained = {name for name, value in peer.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * 2 * experiment.llama.num_layers
    assert all("lora_" in name for name in trained)
    assert torch.get_num_threads() == bench_report.machine()["cores"]


@pytest.mark.parametrize("verb", [["decode", "--batch", "1", "--new-tokens", "4"], ["step", "--length", "8"]])
def test_without_torch_one_line_says_so(verb, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find_spec(name, *a))
    table = run(*verb, "--repeats=1", capsys=capsys)
    notes = [line for line in table.splitlines() if "no peer" in line]
    missing = "torch not installed" if find_spec("peft") or verb[0] == "decode" else "torch and peft not installed"
    assert notes == [f"- no peer: {missing}; pip install 'emollama_jax[bench]'"]
    assert [line.split()[0] for line in table.splitlines() if line.startswith((OURS, PEER))] == [OURS]


@pytest.mark.smoke
def test_the_peer_can_be_left_out(tmp_path, capsys):
    argv = ["decode", "--no-peer", "--batch=1", "--new-tokens=3", "--repeats=1", f"--trace={tmp_path}"]
    table = run(*argv, capsys=capsys)
    assert "- no peer: not asked for" in table and "operations of one more call" in table
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert PEER not in [line.split()[0] for line in table.splitlines() if line]


def test_on_an_accelerator_the_share_of_its_peaks_is_told(monkeypatch):
    for module in ("decode", "report"):
        monkeypatch.setattr(
            f"emollama_jax.bench.{module}.device_peak_flops", lambda kind: Peak(flops=1e9, bytes_per_s=1e9)
        )
    decode = bench_decode(TINY, batch_sizes=[2], new_tokens=4, repeats=1, with_peer=False)
    (figures,) = decode.results[0].runs
    model = Llama(TINY.llama, rngs=nnx.Rngs(0))
    read = bytes_per_token(model, batch=2, slots=64)  # a bucket for 32 tokens and 3 more
    assert figures["gb_per_token"] == read / 1e9
    assert figures["bandwidth_percent"] == pytest.approx(100 * read / 1e9 / (figures["ms_per_token"] / 1e3))
    assert "% bandwidth" in str(decode)

    step = bench_step(TINY, length=8, repeats=1, with_peer=False)
    (figures,) = step.results[0].runs
    flops = cost_of(Llama(TINY.llama, TINY.lora, rngs=nnx.Rngs(0))).flops(8, 8)
    assert figures["peak_percent"] == pytest.approx(100 * flops / (figures["ms_per_step"] / 1e3) / 1e9)
    cost = cost_of(Llama(TINY.llama, TINY.lora, rngs=nnx.Rngs(0)))
    by_rule = 4 * 8 * (cost.frozen + cost.adapters)
    assert figures["percent_4n"] == pytest.approx(100 * by_rule / (figures["ms_per_step"] / 1e3) / 1e9)
    assert "% peak" in str(step) and "% at 4N" in str(step)


def test_bytes_and_operations_are_counted_by_hand():
    llama = TINY.llama  # 3 layers, width 32, MLP 88, 4 heads of 8, vocabulary 640
    kernels = 3 * (4 * 32 * 32 + 3 * 32 * 88)
    norms = (3 * 2 + 1) * 32
    head = 32 * 640
    cache = 2 * 3 * 5 * 48 * 4 * 8
    scales = 3 * (4 * 32 + 2 * 88 + 32)
    adapters = 3 * 2 * (32 * 8 + 8 * 32)
    attention = 3 * 6 * 32 * 16  # QK' and AV: 2 x 2 x 32 x 16 / 2 forward, twice that backward

    variants = {
        llama: 4 * kernels,
        dataclasses.replace(llama, tie_embeddings=True): 4 * kernels,
        dataclasses.replace(llama, kernel_dtype="int8"): kernels + 4 * scales,
    }
    for config, kernel_bytes in variants.items():
        shapes = lambda lora: nnx.merge(*abstract(lambda: Llama(config, lora, rngs=nnx.Rngs(0))))  # noqa: B023
        read = bytes_per_token(shapes(LoRAConfig(rank=0)), batch=5, slots=48)
        assert read == kernel_bytes + 4 * (norms + head + cache)
        flops = cost_of(shapes(LoRAConfig(rank=8))).flops(2 * 16, 16)
        assert flops == 2 * 16 * (4 * (kernels + head) + 6 * adapters + attention)


def test_extract_gives_the_peers_features_and_shares_that_add_up(tmp_path, capsys):
    for package in ("torch", "av", "cv2"):
        pytest.importorskip(package)
    file = tmp_path / "extract.json"
    table = run("extract", "--clips=2", "--repeats=1", "--config.clip.max_faces=3", "--json", str(file), capsys=capsys)
    assert "face %" in table
    report = json.loads(file.read_text())
    assert [result["who"] for result in report["results"]] == [OURS, PEER]
    for result in report["results"]:
        best = result["best"]
        shares = [best[f"{kind}_percent"] for kind in ("decode", "face", "sound", "encoders")]
        assert sum(shares) == pytest.approx(100) and min(shares) > 0
    (note,) = (note for note in report["notes"] if "differ by" in note)
    assert float(re.search(r"differ by (\S+) of", note)[1]) < 1e-4


def test_data_gives_both_kinds_of_image_beside_the_dataloader(tmp_path, capsys):
    for package in ("torch", "av", "cv2"):
        pytest.importorskip(package)
    file = tmp_path / "data.json"
    table = run("data", "--clips=5", "--repeats=2", "--json", str(file), capsys=capsys)
    data = json.loads(file.read_text())
    assert [(r["what"], r["who"]) for r in data["results"]] == [
        (what, who) for what in ("frame", "image_tokens") for who in (OURS, DATALOADER)
    ]
    for result in data["results"]:
        assert all(min(figures.values()) > 0 for figures in result["runs"])
    assert table.count("x\n") == 2  # the speed-ups
    assert "clips/s a core" in table


def test_encode_gives_every_encoder_beside_its_peer(tmp_path, capsys):
    """The outputs of both agree: the same parameters and inputs."""
    pytest.importorskip("torch")
    file = tmp_path / "encode.json"
    argv = ["encode", "--batch=2", "--seconds=1", "--repeats=2", "--dtype=float32", "--json", str(file)]
    table = run(*argv, capsys=capsys)
    data = json.loads(file.read_text())
    assert [(r["what"], r["who"]) for r in data["results"]] == [(n, who) for n in ENCODERS for who in (OURS, PEER)]
    for result in data["results"]:
        assert len(result["runs"]) == 2
        for figures in result["runs"]:
            assert figures["clips_per_s"] == pytest.approx(2 / figures["seconds"])
    assert data["settings"] == {"seconds": 1, "repeats": 2, "dtype": "float32", "attention": "chunked"}
    errors = [note.split(" by ")[1].split()[0] for note in data["notes"] if "the outputs differ" in note]
    assert len(errors) == 4 and 0 < max(map(float, errors)) < 1e-5
    assert all(f"{name} {OURS}" in table for name in ENCODERS)


def test_encode_on_a_device_whose_peak_is_known(monkeypatch):
    monkeypatch.setattr(bench_report, "device_peak_flops", lambda kind: Peak(flops=1e9, bytes_per_s=1e9))
    report = bench_encode(TINY, encoders=["mae"], batch_sizes=[2], repeats=1, with_peer=False)
    (figures,) = report.results[0].runs
    flops = 2 * encoder_flops(random_encoder("mae", TINY.mae, 0), seconds=3)
    assert figures["peak_percent"] == pytest.approx(100 * flops / figures["seconds"] / 1e9)
    assert "% peak" in str(report)


def test_operations_of_the_encoders_are_counted_by_hand():
    count = lambda name: encoder_flops(random_encoder(name, getattr(TINY, name), 0), seconds=1)
    block = lambda tokens, width, mlp: tokens * (4 * width**2 + 2 * width * mlp + 2 * tokens * width)
    assert count("eva_vit") == 2 * (17 * 3 * 14**2 * 48 + 3 * block(17, 48, 209))
    assert count("mae") == 2 * (17 * 3 * 8**2 * 32 + 2 * block(17, 32, 64))
    assert count("videomae") == 2 * (32 * 2 * 3 * 8**2 * 32 + 2 * block(32, 32, 64))
    frames = (3199, 1599, 799, 399, 199, 99, 49)
    convs = 32 * 10 * frames[0] + 32 * 32 * (3 * sum(frames[1:5]) + 2 * sum(frames[5:]))
    assert count("hubert") == 2 * (convs + 49 * (32 * 32 + 16 * 8 * 32) + 2 * block(49, 32, 64))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA L4", "NVIDIA L4"),
        ("Tesla T4", "Tesla T4"),
        ("TPU v5 lite", "TPU v5 lite"),
        ("TPU v5", "TPU v5"),
        ("TPU v6 lite", "TPU v6 lite"),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_a_devices_peaks_are_found_by_its_kind(kind, name):
    assert device_peak_flops(kind) == (PEAKS[name] if name else None)


def test_the_best_repeat_is_the_fastest():
    runs = [{"tokens_per_s": rate, "ms_per_token": 1e3 / rate} for rate in (10.0, 30.0, 20.0)]
    result = lambda who, what, first, runs: Result(who, what, 1, "tokens_per_s", first, runs, None)
    ours, theirs = result(OURS, "", 2.0, runs), result("other", "", 0.5, runs[:1])
    assert ours.best == runs[1]
    columns = {"tokens_per_s": "tokens/s", "ms_per_token": "ms/token"}
    table = str(Report("Title", {}, {}, columns, [ours, theirs], ["a note"]))
    assert f"{OURS}      1        30     33.33           2.0     3.00x" in table
    assert table.startswith("Title\n") and "\n- a note\n" in table

    mixed = [
        result(OURS, "this", 1.0, runs),
        result("other", "this", 1.0, runs[2:]),
        result("other", "that", 1.0, runs),
    ]
    assert f"this {OURS}      1        30     33.33           1.0     1.50x" in str(
        Report("", {}, {}, columns, mixed, [])
    )


def test_wrong_arguments_are_told_in_one_line(capsys, tmp_path):
    def error(*argv: str) -> str:
        assert cli.main(["bench", *argv]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "no experiment given" in error("decode")
    assert "required: {all,decode,step,train,predict,encode,data,extract,serve}" in error("--config=tiny")
    assert "'1' is not a whole number from 2 on" in error("decode", "--config=tiny", "--new-tokens=1")
    assert "leave config.mesh at 1" in error("step", "--config=tiny", "--config.mesh.data=2")
    assert "nothing to train" in error("step", "--config=tiny", "--config.lora.rank=0")
    assert "invalid choice: 'voice'" in error("encode", "--config=tiny", "--encoders", "voice")
    assert "absent" in error("step", "--config=tiny", f"--json={tmp_path}/absent/x.json")


def test_help_needs_no_experiment(capsys):
    assert cli.main(["bench", "--help"]) == cli.main(["bench", "step", "--help"]) == 0
    assert "--length" in capsys.readouterr().out
