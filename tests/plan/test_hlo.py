import pytest

from emollama_jax.plan.hlo import read_work

LOOP = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%async_fusion (p: bf16[4,8]) -> bf16[16,8] {
  ROOT %gathered = bf16[16,8]{1,0} all-gather(%p), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
}

%body (state: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,8] get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %started = bf16[16,8] fusion(%x), kind=kCustom, calls=%async_fusion, backend_config={"estimated_cycles":"100"}
  %ended = bf16[16,8] fusion(%started), kind=kCustom, calls=%async_fusion, backend_config={"estimated_cycles":"20"}
  %y = f32[8,8] all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %both = (s32[], f32[8,8]) tuple(%next, %y)
}

%condition (state: (s32[], f32[8,8])) -> pred[] {
  %i = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(32)
  ROOT %more = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8] parameter(0), backend_config={"estimated_cycles":"7"}
  %loop = (s32[], f32[8,8]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,8] get-tuple-element(%loop), index=1
}
"""


def entry(line: str) -> str:
    return f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  ROOT %out = {line}\n}}\n"


def only(line: str, slice_of=(0, 0, 0, 0)):
    (collective,) = read_work(entry(line), slice_of).collectives
    return collective


def test_what_stands_in_a_loop_counts_as_often_as_it_runs():
    work = read_work(LOOP, [0] * 4)
    assert work.cycles == 7 + 32 * (100 + 20)
    reduced, gathered = sorted(work.collectives, key=lambda one: one.kind, reverse=False)[::-1]
    assert (gathered.kind, reduced.kind) == ("all-gather", "all-reduce")
    # One collective, though it is started and ended in two places.
    assert (gathered.times, gathered.hidden, gathered.bytes) == (32, True, 16 * 8 * 2 * 3 / 4)
    assert (reduced.times, reduced.hidden, reduced.bytes) == (32, False, 8 * 8 * 4 * 2 * 1 / 2)


@pytest.mark.parametrize(("name", "hidden"), [("async-collective-start.3", True), ("fusion.3", False)])
def test_a_fusion_that_only_starts_a_collective_leaves_it_to_run_beside_others(name, hidden):
    gather = "bf16[16,8]{1,0} all-gather(%p), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}"
    text = (
        f"%fused_computation.1 (p: bf16[4,8]) -> bf16[16,8] {{\n  ROOT %gathered = {gather}\n}}\n\n"
        f"ENTRY %main (x: bf16[4,8]) -> bf16[16,8] {{\n  %x = bf16[4,8] parameter(0)\n"
        f"  %{name} = bf16[16,8] fusion(%x), kind=kCustom, calls=%fused_computation.1\n"
        f"  ROOT %async-collective-done = bf16[16,8] fusion(%{name}), kind=kCustom, calls=%fused_computation.1\n}}\n"
    )
    (collective,) = read_work(text, [0] * 4).collectives
    assert collective.hidden == hidden


def test_an_unrolled_loop_runs_less_often():
    twice = LOOP.replace("%next = s32[] add(%i, %one)", "%half = s32[] add(%i, %one)\n  %next = s32[] add(%half, %one)")
    assert read_work(twice, [0] * 4).cycles == 7 + 16 * 120


def test_the_compilers_own_count_of_a_loop_goes_first():
    told = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert read_work(told, [0] * 4).cycles == 7 + 5 * 120


def test_a_loop_without_a_known_end_counts_once():
    assert read_work(LOOP.replace("compare(%i, %end)", "and(%i, %end)"), [0] * 4).cycles == 7 + 120


@pytest.mark.parametrize(
    ("line", "kind", "sent", "hidden"),
    [
        ("f32[8] all-gather(%x), replica_groups=[1,4]<=[4]", "all-gather", 32 * 3 / 4, False),
        ("f32[2] reduce-scatter(%x), replica_groups=[1,4]<=[4]", "reduce-scatter", 8 * 3, False),
        ("(f32[8], bf16[8]) all-reduce(%x, %y), replica_groups=[1,4]<=[4]", "all-reduce", 48 * 2 * 3 / 4, False),
        ("s4[8] all-to-all(%x), replica_groups=[2,2]<=[4]", "all-to-all", 4 / 2, False),
        (
            "(u8[8], u8[8], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            8,
            True,
        ),
        ("(f32[2], f32[8]) all-gather-start(%x), replica_groups=[1,4]<=[4]", "all-gather", 32 * 3 / 4, True),
    ],
)
def test_bytes_that_a_device_sends(line, kind, sent, hidden):
    collective = only(line)
    assert (collective.kind, collective.bytes, collective.hidden, collective.times) == (kind, sent, hidden, 1)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("groups", "crosses"),
    [
        ("{{0,1},{2,3}}", False),
        ("{{0,2},{1,3}}", True),
        ("[2,2]<=[4]", False),
        ("[2,2]<=[2,2]T(1,0)", True),
        ("[1,4]<=[4]", True),
        ("mesh['a'=2,'b'=2] {'b'}", False),
        ("mesh['a'=2,'b'=2] {'a'}", True),
        ("mesh['a'=2,'b'=2] {'a','b'}", True),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", False),
        ("mesh['a'=4] {'a':(2)2}", False),
        ("mesh['a'=4] {'a':(1)2}", True),
    ],
)
def test_which_devices_take_part(groups, crosses):
    assert only(f"f32[8] all-reduce(%x), replica_groups={groups}", (0, 0, 1, 1)).crosses == crosses


def test_a_permutation_between_slices():
    ring = "f32[8] collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    assert only(ring, (0, 0, 1, 1)).crosses
    assert not only(ring, (0, 0, 0, 0)).crosses


@pytest.mark.parametrize(("slices", "factor"), [(2, 1.0), (4, 1.5)])
def test_what_hosts_carry_between_slices(slices, factor):
    sent = (
        "(bf16[8,128], u32[], token[]) send(%x, %after), channel_id=3, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    collective = only(sent, range(slices))
    assert (collective.kind, collective.crosses, collective.what) == ("all-reduce", True, "bf16[8,128]")
    assert collective.bytes == 8 * 128 * 2 * factor
