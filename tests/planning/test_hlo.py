"""Collectives are read from XLA's text: kinds, axes, bytes, and loops around them."""

import pytest

from t5g2.planning.collectives import Collective, collectives

MESH = {"data": 2, "fsdp": 4, "tensor": 1}

MODULE = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %x)
}}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {{
  %p = (s32[], f32[8,4]{{1,0}}) parameter(0)
  {operation}
}}

%condition (q: (s32[], f32[8,4])) -> pred[] {{
  %limit.1 = s32[]{{:T(128)}} constant(6)
  %q = (s32[], f32[8,4]{{1,0}}) parameter(0)
  %turn = s32[]{{:T(128)}} get-tuple-element(%q), index=0
  ROOT %lt.3 = pred[]{{:T(512)}} compare(%turn, %limit.1), direction=LT
}}

ENTRY %main.9 (a: f32[8,4]) -> f32[8,4] {{
  %a = f32[8,4]{{1,0}} parameter(0)
  %while.1 = (s32[], f32[8,4]{{1,0}}) while(%tuple.1), condition=%condition, body=%body{known}
  ROOT %r = f32[8,4]{{1,0}} get-tuple-element(%while.1), index=1
}}
"""


def read(operation, known=""):
    return collectives(MODULE.format(operation=operation, known=known), MESH)


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0,1,2,3},{4,5,6,7}}",
        "replica_groups=[2,4]<=[8]",
        "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}",
    ],
)
def test_every_notation_of_the_same_groups_is_the_same_axis(groups):
    line = f"%g = bf16[8,1024]{{1,0}} all-gather(%x), channel_id=3, {groups}, dimensions={{0}}"
    # Six turns; three quarters of 8 x 1024 numbers of two bytes come from each device in turn.
    assert read(line) == [Collective("all-gather", "fsdp", 6, 6 * 8 * 1024 * 2 * 3 // 4)]


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0,4},{1,5},{2,6},{3,7}}",
        "replica_groups=[4,2]<=[2,4]T(1,0)",
        "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}",
        "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}",
    ],
)
def test_groups_across_rows_of_the_mesh_are_the_other_axis(groups):
    line = f"%g = f32[10]{{0}} all-reduce(%x), channel_id=3, {groups}, to_apply=%add"
    assert read(line) == [Collective("all-reduce", "data", 6, 6 * 10 * 4)]


def test_groups_of_all_devices_and_of_no_axis():
    line = "%g = f32[8]{0} all-reduce(%x), channel_id=3, replica_groups={}, to_apply=%add"
    assert read(line)[0].axes == "data x fsdp"
    line = "%g = f32[8]{0} all-gather(%x), channel_id=3, replica_groups={{0,1,4,5},{2,3,6,7}}"
    assert read(line)[0].axes == "part of data x fsdp"


@pytest.mark.parametrize("sum_of", ["%turn, %two", "%two, %turn"])
@pytest.mark.parametrize("result", ["%next", "%again"])
def test_a_loop_that_counts_by_two_turns_half_as_often(sum_of, result):
    line = f"""%g = f32[8]{{0}} all-gather(%x), channel_id=3, replica_groups=[2,4]<=[8]
  %two = s32[]{{:T(128)}} constant(2)
  %turn = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %next = s32[]{{:T(128)}} add({sum_of})
  %again = s32[]{{:T(128)}} copy(%next)
  ROOT %state = (s32[], f32[8,4]{{1,0}}) tuple({result}, /*index=1*/%h)"""
    assert read(line) == [Collective("all-gather", "fsdp", 3, 3 * 8 * 4 * 3 // 4)]


def test_a_scatter_sends_as_much_as_a_gather_of_what_it_scatters():
    line = "%s = f32[2,4]{1,0} reduce-scatter(%x), channel_id=1, replica_groups=[2,4]<=[8]"
    assert read(line) == [Collective("reduce-scatter", "fsdp", 6, 6 * 8 * 4 * 4 * 3 // 4)]


def test_arguments_of_an_asynchronous_gather_are_not_counted_as_sent():
    line = (
        "%s = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), channel_id=1, "
        "replica_groups=[2,4]<=[8]"
    )
    assert read(line) == [Collective("all-gather", "fsdp", 6, 6 * 8 * 4 * 4 * 3 // 4)]


def test_an_asynchronous_permute_sends_its_array_and_not_its_flags():
    line = (
        "%s = (bf16[2,4]{1,0}, bf16[2,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
        "collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}"
    )
    assert read(line) == [Collective("collective-permute", "fsdp", 6, 6 * 8 * 2)]


def test_loops_that_xla_made_itself_count_without_a_sign():
    line = "%g = f32[8]{0} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8]"
    module = MODULE.format(operation=line, known="").replace("%limit.1 = s32", "%limit.1 = u32")
    assert collectives(module, MESH)[0].number == 6


def test_the_parts_of_one_overlapped_collective_count_once():
    gather = "%g = f32[8]{0} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8]"
    calls = "%f = f32[8]{0} fusion(%x), kind=kCustom, calls=%overlapped"
    module = MODULE.format(operation=f"{gather}\n  {calls}", known="")
    part = f"%overlapped (x: f32[8]) -> f32[8] {{\n  {gather}\n}}\n\n%body ("
    assert collectives(module.replace("%body (", part), MESH)[0].number == 6


def test_collectives_that_share_a_channel_count_each():
    gather = "%g = f32[8]{0} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8]"
    of = ', metadata={op_name="%s"}'
    assert read(f"{gather}{of % 'first'}\n  {gather}{of % 'second'}")[0].number == 12


def test_what_xla_knows_of_a_loop_is_taken_from_it():
    line = "%g = f32[8]{0} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8]"
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert read(line, known)[0].number == 5


def test_a_loop_of_unknown_length_is_refused():
    broken = MODULE.format(operation="%n = f32[8]{0} negate(%x)", known="")
    with pytest.raises(NotImplementedError, match="unknown length"):
        collectives(broken.replace("direction=LT", "direction=NE"), MESH)


@pytest.mark.parametrize(("slices", "sent"), [("1,2", 4096), ("1,2,3,4", 6144), ("1:4", 6144)])
def test_what_goes_to_other_slices_is_told_apart(slices, sent):
    """As libtpu writes an all-reduce over a data axis that crosses slices."""
    line = (
        "%send = (f32[8,1,128]{2,1,0:T(8,128)}, u32[], token[]) send(%part, %token), "
        "channel_id=2, is_host_transfer=true, frontend_attributes={"
        '_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_megascale_target="{{{slices}}}x{{0:15}}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    assert read(line) == [Collective("all-reduce", "slices", 6, 6 * sent)]
