"""Collectives in a compiled program's text: which, how often, how many bytes; on fake CPU devices and for a TPU."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from rflow_jax.aot.hlo import Collective, read_program, replica_groups

ROWS, COLUMNS = 16, 8  # of one device's block, float32
BLOCK = ROWS * COLUMNS * 4


def _mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))


def _text(step):
    spec = PartitionSpec(("x", "y"))
    mapped = jax.shard_map(step, mesh=_mesh(), in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct((8 * ROWS, COLUMNS), jnp.float32)).compile().as_text()


def _all_kinds(x):
    gathered = jax.lax.all_gather(x, "y", tiled=True)
    exchanged = jax.lax.all_to_all(x, "x", 0, 1, tiled=True).reshape(x.shape)
    moved = jax.lax.ppermute(x, ("x", "y"), [(i, (i + 1) % 8) for i in range(8)])
    scattered = jax.lax.psum_scatter(jnp.sin(gathered), "y", tiled=True)
    return jax.lax.psum(x, "x") + scattered + exchanged + moved


def _loop(step, length):
    return lambda x: jax.lax.scan(lambda y, _: (step(y), None), x, None, length=length)[0]


def _sizes(program):
    return {kind: (each.count, each.ici_bytes, each.dcn_bytes) for kind, each in program.by_kind().items()}


def _expected(times):
    gathered = 4 * BLOCK
    return {
        "all-gather": (times, times * gathered * 3 / 4, 0),
        "all-reduce": (times, times * 2 * BLOCK / 2, 0),
        "reduce-scatter": (times, times * gathered * 3 / 4, 0),
        "all-to-all": (times, times * BLOCK / 2, 0),
        "collective-permute": (times, times * BLOCK, 0),
    }


@pytest.mark.parametrize(
    ("step", "times"), [(_all_kinds, 1), (_loop(_all_kinds, 5), 5), (_loop(_loop(_all_kinds, 5), 3), 15)]
)
def test_every_kind_is_counted_as_often_as_it_runs(step, times):
    program = read_program(_text(step))
    assert _sizes(program) == _expected(times)
    assert (program.unknown_loops, program.partitions) == (0, 8)
    assert {each.kind: each.group for each in program.collectives} == {
        "all-gather": 4,
        "all-reduce": 2,
        "reduce-scatter": 4,
        "all-to-all": 2,
        "collective-permute": 8,
    }


def test_trips_are_read_from_the_condition_where_the_compiler_notes_none():
    text = _text(_loop(_loop(_all_kinds, 5), 3))
    bare = text.replace("known_trip_count", "something_else")
    assert _sizes(read_program(bare)) == _expected(15)
    assert read_program(bare).unknown_loops == 0


def test_a_loop_of_unknown_length_counts_once_and_is_said():
    def until(x):
        return jax.lax.while_loop(lambda y: jnp.sum(y) < 9, lambda y: jax.lax.psum(y, "x"), x)

    program = read_program(_text(until))
    assert program.unknown_loops == 1
    assert program.by_kind()["all-reduce"].count == 1


def test_of_a_conditional_the_branch_that_sends_most_counts():
    def either(x):
        def much(y):
            return jax.lax.psum(jax.lax.psum(y, "x"), "y")

        return jax.lax.cond(x[0, 0] > 0, much, lambda y: jax.lax.psum(y, "x"), x)

    text = _text(either)
    assert "conditional(" in text
    assert read_program(text).by_kind()["all-reduce"].count == 2


def test_what_crosses_slices_is_apart():
    program = read_program(_text(_all_kinds), num_slices=2)
    gathered = 4 * BLOCK
    assert _sizes(program) == {
        "all-gather": (1, gathered * 3 / 4, 0),  # along y, within a slice
        "all-reduce": (1, 0, BLOCK),  # along x, between the slices
        "reduce-scatter": (1, gathered * 3 / 4, 0),
        "all-to-all": (1, 0, BLOCK / 2),
        "collective-permute": (1, 0, BLOCK),  # around all
    }
    assert program.ici_bytes + program.dcn_bytes == read_program(_text(_all_kinds)).ici_bytes
    other_way = read_program(_text(_all_kinds), slice_of=[0, 0, 1, 1, 0, 0, 1, 1])
    assert other_way.by_kind()["all-reduce"].dcn_bytes == 0
    # Four over two slices: half of the result is gathered within one, a quarter comes from the other.
    assert other_way.by_kind()["all-gather"] == Collective("all-gather", 4, 1, gathered / 2, gathered / 4)


def test_as_json():
    told = json.loads(json.dumps(read_program(_text(_all_kinds)).as_json()))
    assert told["ici_bytes"] == sum(each["ici_bytes"] for each in told["collectives"]) > 0


@pytest.mark.parametrize(
    ("said", "groups"),
    [
        ("{}", []),
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
    ],
)
def test_forms_of_replica_groups(said, groups):
    assert replica_groups(said) == groups


def test_an_unknown_form_of_replica_groups_is_refused():
    with pytest.raises(ValueError, match="not a known form"):
        replica_groups("something")


# As libtpu 0.0.42.1 prints, without what does not matter here.
STARTED = """\
HloModule jit_step, is_scheduled=true, num_partitions=32

%wrapped (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %a = bf16[8,128]{1,0:T(8,128)(2,1)} all-to-all(%p), channel_id=3, replica_groups=[8,4]<=[32], dimensions={0}
}

%all-reduce-scatter.1 (p.1: f32[64]) -> f32[8] {
  %p.1 = f32[64]{0} parameter(0)
  %r = f32[64]{0} all-reduce(%p.1), channel_id=4, replica_groups=[4,8]<=[8,4]T(1,0), to_apply=%add
  %partition = u32[] partition-id()
  ROOT %d = f32[8]{0} dynamic-slice(%r, %partition), dynamic_slice_sizes={8}
}

ENTRY %main (x: bf16[8,128], y: f32[64]) -> f32[8] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[64]{0} parameter(1)
  %g = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[256,128]{1,0:T(8,128)(2,1)}) all-gather-start(%x), channel_id=1, \
replica_groups={}, dimensions={0}
  %g.1 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather-done(%g)
  %c = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=2, \
source_target_pairs={{0,1},{1,0}}
  %c.1 = bf16[8,128]{1,0} collective-permute-done(%c)
  %still = bf16[8,128]{1,0} collective-permute(%x), channel_id=2, source_target_pairs={{0,0},{1,1}}
  %s = ((bf16[8,128]{1,0}), bf16[8,128]{1,0}, u32[]) async-start(%x), calls=%wrapped
  %s.1 = ((bf16[8,128]{1,0}), bf16[8,128]{1,0}, u32[]) async-update(%s), calls=%wrapped
  %s.2 = bf16[8,128]{1,0} async-done(%s.1), calls=%wrapped
  %k = bf16[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{}}
  ROOT %f = f32[8]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_started_and_wrapped_collectives_count_once():
    program = read_program(STARTED)
    piece = 8 * 128 * 2
    assert _sizes(program) == {
        "all-gather": (1, 32 * piece * 31 / 32, 0),
        "reduce-scatter": (1, 64 * 4 * 7 / 8, 0),
        "all-to-all": (1, piece * 3 / 4, 0),
        "collective-permute": (2, piece, 0),
    }
    assert program.pallas_calls == 1


# A collective that runs beside a loop: written into the fusion that begins it, those in the loop, and the last one.
SPREAD = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%begin (p: bf16[64,128]) -> (bf16[64,128], bf16[1024,128]) {
  %p = bf16[64,128]{1,0} parameter(0)
  %g = bf16[1024,128]{1,0} all-gather(%p), channel_id=63, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = (bf16[64,128]{1,0}, bf16[1024,128]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[64,128]) -> bf16[1024,128] {
  %p.1 = bf16[64,128]{1,0} parameter(0)
  ROOT %g.1 = bf16[1024,128]{1,0} all-gather(%p.1), channel_id=63, \
replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%body (t: (u32[], bf16[64,128], u32[])) -> (u32[], bf16[64,128], u32[]) {
  %t = (u32[]{:T(128)}, bf16[64,128]{1,0}, u32[]{:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%t), index=0
  %two = u32[]{:T(128)} get-tuple-element(%t), index=2
  %next = u32[]{:T(128)} add(%i, %two)
  %x = bf16[64,128]{1,0} get-tuple-element(%t), index=1
  %moved = bf16[64,128]{1,0} collective-permute(%x), channel_id=5, source_target_pairs={{0,1},{1,0}}
  %f = bf16[1024,128]{1,0} fusion(%x), kind=kCustom, calls=%beside
  ROOT %out = (u32[]{:T(128)}, bf16[64,128]{1,0}, u32[]{:T(128)}) tuple(%next, %moved, %two)
}

%condition (t.1: (u32[], bf16[64,128], u32[])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8)
  %t.1 = (u32[]{:T(128)}, bf16[64,128]{1,0}, u32[]{:T(128)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%t.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (x.1: bf16[64,128]) -> bf16[64,128] {
  %x.1 = bf16[64,128]{1,0} parameter(0)
  %one = u32[]{:T(128)} constant(1)
  %step = u32[]{:T(128)} constant(2)
  %start = u32[]{:T(128)} copy(%one)
  %async-collective-start = (bf16[64,128]{1,0}, bf16[1024,128]{1,0}) fusion(%x.1), kind=kCustom, calls=%begin
  %tuple = (u32[]{:T(128)}, bf16[64,128]{1,0}, u32[]{:T(128)}) tuple(%start, %x.1, %step)
  %while = (u32[]{:T(128)}, bf16[64,128]{1,0}, u32[]{:T(128)}) while(%tuple), condition=%condition, body=%body
  ROOT %got = bf16[64,128]{1,0} get-tuple-element(%while), index=1
}
"""


def test_a_collective_beside_a_loop_counts_where_it_begins():
    program = read_program(SPREAD)
    # The loop's counter runs 1, 3, 5, 7; its step is carried along unchanged.
    assert _sizes(program) == {
        "all-gather": (1, 1024 * 128 * 2 * 15 / 16, 0),
        "collective-permute": (4, 4 * 64 * 128 * 2, 0),
    }
    assert program.unknown_loops == 0


def test_loops_that_count_down_or_change_their_step():
    assert read_program(SPREAD.replace("direction=LT", "direction=LE")).by_kind()["collective-permute"].count == 4
    down = SPREAD.replace("direction=LT", "direction=GT").replace("constant(8)", "constant(-8)")
    assert read_program(down).unknown_loops == 1  # it counts up, and would not end
    down = down.replace("= u32[]{:T(128)} add(", "= u32[]{:T(128)} subtract(")
    assert read_program(down).by_kind()["collective-permute"].count == 5  # 1, -1, -3, -5, -7
    changing = SPREAD.replace("tuple(%next, %moved, %two)", "tuple(%next, %moved, %next)")
    assert read_program(changing).unknown_loops == 1


# What is left of an all-reduce over 2 slices of 8 once XLA has taken it apart.
BETWEEN = """\
HloModule jit_f, is_scheduled=true, num_partitions=8

ENTRY %main (x: bf16[512,128]) -> token[] {
  %x = bf16[512,128]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (bf16[512,128]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
}
"""


def test_transfers_between_slices():
    program = read_program(BETWEEN)
    assert program.collectives == (Collective("all-reduce", 2, 1, 0.0, 512 * 128 * 2.0),)
    three = BETWEEN.replace("{1,2}x", "{1:3}x").replace("ALL_REDUCE", "ALL_GATHER")
    assert read_program(three).collectives == (Collective("all-gather", 3, 1, 0.0, 2 * 512 * 128 * 2.0),)


GPU = """\
HloModule jit_f, is_scheduled=true, num_partitions=2

%cudnn (p: bf16[8]) -> bf16[8] {
  ROOT %p = bf16[8]{0} parameter(0)
}

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8]{0} parameter(0)
  %a = (bf16[8]{0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax", backend_config={}
  %f = bf16[8]{0} fusion(%x), kind=kCustom, calls=%cudnn, \
backend_config={"fusion_backend_config":{"kind":"__cudnn$fusion"}}
  %r = (bf16[8]{0}, f32[4]{0}) all-reduce-start(%x, %y), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  ROOT %r.1 = (bf16[8]{0}, f32[4]{0}) all-reduce-done(%r)
}
"""


def test_programs_for_a_gpu():
    program = read_program(GPU)
    assert (program.cudnn_calls, program.pallas_calls) == (2, 0)
    assert program.collectives == (Collective("all-reduce", 2, 1, 32.0, 0.0),)


ON_A_TPU = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from rflow_jax.aot.hlo import read_program

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(devices).reshape(2, 4), ("x", "y"))
    spec = P(("x", "y"))

    def step(x):
        def body(y, _):
            gathered = jax.lax.all_gather(y, "y", tiled=True)
            return jax.lax.psum(y, "x") + jax.lax.psum_scatter(jnp.sin(gathered), "y", tiled=True), None
        return jax.lax.scan(body, x, None, length=5)[0]

    mapped = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * 256, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    print("READ", json.dumps(read_program(jax.jit(mapped).lower(x).compile().as_text()).as_json()))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which jax[tpu] brings")
def test_a_program_for_a_tpu():
    # libtpu holds a lock on the machine's chips; nothing here touches any, so others may hold it.
    apart = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", textwrap.dedent(ON_A_TPU)]
    done = subprocess.run(command, env=os.environ | apart, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("READ "))[5:])
    block = 256 * 1024 * 2
    sent = {each["kind"]: (each["count"], each["ici_bytes"]) for each in told["collectives"]}
    assert sent == {
        "all-gather": (5, 5 * 4 * block * 3 / 4),
        "all-reduce": (5, 5 * 2 * block / 2),
        "reduce-scatter": (5, 5 * 4 * block * 3 / 4),
    }
    assert told["unknown_loops"] == 0


def test_metadata_that_goes_over_lines():
    """A line of it may begin with the brace that ends a computation."""
    line = next(line for line in SPREAD.splitlines() if "collective-permute" in line)
    kernel = (
        '  %kernel = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", attributes={a={\n}}, metadata={}'
    )
    before, after = (read_program(text).by_kind() for text in (SPREAD, SPREAD.replace(line, f"{kernel}\n{line}")))
    assert before == after
