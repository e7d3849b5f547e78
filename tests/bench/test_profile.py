"""Breakdowns of traces: of a GPU's, written by hand, and of this processor's."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from emollama_jax.bench.profile import OTHER, Breakdown, break_down, kind_of, profile, read_trace


def trace(plane: str, lines: dict[str, list[tuple[str, int, int]]]) -> ProfileData:
    """Events (name, start, duration in µs) by line, as the profiler would write them."""
    names = sorted({name for events in lines.values() for name, _, _ in events})
    number = {name: i + 1 for i, name in enumerate(names)}
    metadata = "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}\n' for n, i in number.items())
    text = ""
    for line, events in lines.items():
        told = "".join(
            f"events {{ metadata_id: {number[n]} offset_ps: {start * 10**6} duration_ps: {time * 10**6} }}\n"
            for n, start, time in events
        )
        text += f'lines {{ name: "{line}" timestamp_ns: 0\n{told} }}\n'
    return ProfileData.from_text_proto(f'planes {{ name: "{plane}"\n{metadata}{text} }}')


def test_kernels_of_a_gpu_are_summed_by_operation_and_the_waits_between_them_found():
    kernels = [("nvjet_hsh_256x128_64x4_1", 0, 40), ("loop_convert_fusion_3", 50, 10), ("loop_convert_fusion_4", 60, 5)]
    data = trace(
        "/device:GPU:0",
        {
            "Stream #13(Compute)": kernels,
            "Stream #14(MemcpyD2D)": [("MemcpyD2D", 55, 30)],
            "XLA Modules": [("jit_step", 0, 100)],
        },
    )
    found = break_down(data, "there")
    assert found.operations == [
        ("nvjet_hsh_256x128_64x4", "matrix products", 1, pytest.approx(40e-6)),
        ("MemcpyD2D", "copies and layouts", 1, pytest.approx(30e-6)),
        ("loop_convert_fusion", "changes of dtype", 2, pytest.approx(15e-6)),
    ]
    assert found.seconds == pytest.approx(85e-6) and found.busy == pytest.approx(75e-6)
    assert list(found.kinds()) == ["matrix products", "copies and layouts", "changes of dtype"]
    table = "\n".join(found.lines())
    assert "0.1 ms, of which the device waited 11.8 %" in table and "47.1" in table
    assert Breakdown.from_dict(found.to_dict()) == found


def test_a_loop_has_the_time_that_its_body_leaves():
    line = [("while.1", 0, 100), ("fusion.2", 10, 30), ("dot.4", 15, 5), ("fusion.3", 50, 20), ("copy.9", 200, 1)]
    found = break_down(trace("/device:TPU:0", {"XLA Ops": line}))
    own = {operation.name: (operation.times, round(1e6 * operation.seconds, 3)) for operation in found.operations}
    assert own == {"while": (1, 50.0), "fusion": (2, 45.0), "dot": (1, 5.0), "copy": (1, 1.0)}
    assert found.busy == pytest.approx(101e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "matrix products"),
        ("gemm_fusion_dot_general_2", "matrix products"),
        ("ncclDevKernel_AllGather_RING_LL", "collectives"),
        ("input_transpose_fusion", "copies and layouts"),
        ("loop_dynamic_slice_fusion", "copies and layouts"),
        ("input_reduce_fusion_7", "sums and norms"),
        ("loop_convert_fusion", "changes of dtype"),
        ("loop_multiply_fusion", OTHER),
    ],
)
def test_kinds_of_operations(name, kind):
    assert kind_of(name) == kind


@pytest.mark.smoke
def test_a_call_on_this_processor_is_broken_down(tmp_path):
    x, weights = jnp.ones((64, 64)), jnp.ones((5, 64, 64))
    run = jax.jit(lambda x, weights: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0])
    jax.block_until_ready(run(x, weights))
    found = profile(lambda: jax.block_until_ready(run(x, weights)), tmp_path / "trace")
    assert found.obstacle is None and 0 < found.busy <= found.seconds
    assert sum(operation.times for operation in found.operations) > 5
    assert sum(operation.seconds for operation in found.operations) > 0
    assert read_trace(tmp_path / "trace") == found
    assert found.lines()[-1] == f"the trace: {tmp_path / 'trace'}"


def test_where_there_is_nothing_to_break_down_it_says_why(tmp_path):
    def fail():
        raise ValueError("no\nmore")

    assert profile(fail, tmp_path).lines() == ["no breakdown: ValueError: no"]
    assert read_trace(tmp_path / "empty").obstacle == "the profiler wrote no trace"
    assert "no operations" in break_down(trace("/host:CPU", {"python": [("f", 0, 1)]})).obstacle
