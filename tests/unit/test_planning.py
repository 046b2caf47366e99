"""What a step costs, counted on programs whose costs are known, and the search for the cheapest."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ichigo_jax import plan as command
from ichigo_jax.errors import InputError
from ichigo_jax.parallel import make_mesh
from ichigo_jax.parallel.hosts import launcher
from ichigo_jax.planning import search as search_plans
from ichigo_jax.planning import topology as topologies
from ichigo_jax.planning.hlo import Program
from ichigo_jax.planning.plan import Plan
from ichigo_jax.training.flops import count_flops

L, B, D, F = 5, 16, 32, 64


def layers(weights, x):
    def layer(x, pair):
        return x + jnp.tanh(x @ pair[0]) @ pair[1], None

    return jax.lax.scan(jax.checkpoint(layer), x, weights)[0]


def arrays():
    return (jnp.zeros((L, D, F)), jnp.zeros((L, F, D))), jnp.zeros((B, D))


def test_scanned_layers_count_as_often_as_they_run():
    forward = L * 2 * (2 * B * D * F)
    assert count_flops(layers, *arrays()) == forward
    gradient = jax.grad(lambda weights, x: layers(weights, x).sum(), argnums=(0, 1))
    # Two products a weight backwards, and of what is computed anew the first product alone is needed.
    assert count_flops(gradient, *arrays()) == forward + 2 * forward + forward / 2


def test_convolutions_and_branches():
    x, kernel = jnp.zeros((2, 10, 4)), jnp.zeros((3, 4, 6))
    convolve = lambda x, kernel: jax.lax.conv_general_dilated(  # noqa: E731
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    assert count_flops(convolve, x, kernel) == 2 * (2 * 10 * 6) * 3 * 4
    chosen = lambda flag, x: jax.lax.cond(flag, lambda x: x @ x, lambda x: x, x)  # noqa: E731
    assert count_flops(chosen, True, jnp.zeros((8, 8))) == 2 * 8**3


def compiled(axis):
    """The gradient of the layers, weights split over ``axis`` and the batch over the eight devices."""
    mesh = make_mesh({axis: 8})
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    weights, x = arrays()
    given = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=split), weights)
    step = jax.jit(jax.grad(lambda weights, x: layers(weights, x).sum()), out_shardings=(split, split))
    return Program(step.lower(given, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)).compile().as_text())


def test_data_parallel_gradients_are_reduced_once():
    moved = compiled("data").collective_bytes()
    gradients = 2 * L * D * F * 4
    assert moved.keys() == {"all-reduce"}
    assert moved["all-reduce"] == pytest.approx(2 * gradients * 7 / 8, rel=0.01)


def test_split_weights_are_gathered_in_every_layer():
    program = compiled("fsdp")
    assert program.unknown_trips == 0
    moved = program.collective_bytes()
    weights = 2 * L * D * F * 4
    # Once forwards and once backwards in each of the layers; so small, a few activations are cheaper to move instead.
    assert 1.5 * weights <= moved["all-gather"] <= 2 * weights
    assert sum(moved.values()) <= 5 * weights
    assert program.memory_bytes() > weights


COUNTED = """HloModule counted
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %moved = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], f32[4]{0}) tuple(%next, %moved)
}
%test (q: (s32[], f32[4])) -> pred[] {
  %q = (s32[], f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(11)
  ROOT %more = pred[] compare(%j, %end), direction=LT
}
ENTRY %main (x0: f32[4]) -> f32[4] {
  %x0 = f32[4]{0} parameter(0)
  %start = s32[] constant(1)
  %state = (s32[], f32[4]{0}) tuple(%start, %x0)
  %loop = (s32[], f32[4]{0}) while(%state), condition=%test, body=%body
  %kernel = f32[4]{0} custom-call(%x0), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="kernel = of several lines"}
  %all = f32[8]{0:T(8)S(1)} all-gather(%x0), replica_groups=mesh['a'=2] {'a'}, dimensions={0}
  ROOT %result = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


def test_turns_of_a_loop_that_only_its_condition_tells():
    program = Program(COUNTED)
    # 1, 3, 5, 7, 9: five turns of sixteen bytes; and half of the gathered 32 bytes from the other device.
    assert program.collective_bytes() == {"collective-permute": 5 * 16, "all-gather": 16}
    assert program.unknown_trips == 0


PHASES = """HloModule phases
%begin (a: f32[4]) -> (f32[4], f32[8]) {
  %a = f32[4]{0} parameter(0)
  %first = f32[8]{0} all-gather(%a), channel_id=7, replica_groups=mesh['a'=2] {'a'}, frontend_attributes={chain_id="3"}
  ROOT %begun = (f32[4]{0}, f32[8]{0}) custom-call(%first), custom_call_target="AsyncCollectiveStart"
}
%end (b: f32[4]) -> f32[8] {
  %b = f32[4]{0} parameter(0)
  %last = f32[8]{0} all-gather(%b), channel_id=7, replica_groups=mesh['a'=2] {'a'}, frontend_attributes={chain_id="3"}
  ROOT %ended = f32[8]{0} custom-call(%last), custom_call_target="AsyncCollectiveDone"
}
ENTRY %main (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %start = (f32[4]{0}, f32[8]{0}) fusion(%x), kind=kCustom, calls=%begin
  %other = f32[8]{0} all-gather(%x), channel_id=8, replica_groups=mesh['a'=2] {'a'}
  ROOT %done = f32[8]{0} fusion(%x), kind=kCustom, calls=%end
}
"""


def test_a_collective_in_phases_counts_once():
    assert Program(PHASES).collective_bytes() == {"all-gather": 2 * 16}


SLICES = """\
HloModule slices, is_scheduled=true

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %token = token[] after-all()
  %out = (bf16[8,4]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:15}"}
  %sent = token[] send-done(%out), channel_id=2, is_host_transfer=true
  %in = (bf16[8,4]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true
  %received = (bf16[8,4]{1,0}, token[]) recv-done(%in), channel_id=1, is_host_transfer=true
  %theirs = bf16[8,4]{1,0} get-tuple-element(%received), index=0
  ROOT %gathered = bf16[8,4]{1,0} all-reduce(%theirs), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%sum
}
"""  # noqa: E501


def test_what_leaves_a_slice_is_counted_apart():
    assert Program(SLICES).collective_bytes() == {"between-slices": 8 * 4 * 2, "all-reduce": 2 * 8 * 4 * 2 * 3 / 4}


@pytest.mark.parametrize(("name", "slices"), [("cpu:8", 2), ("v5e:4x4", 0)])
def test_slices_that_are_none(name, slices):
    with pytest.raises(InputError, match=f"--slices {slices} found with --topology {name}"):
        topologies.topology(name, slices)


@pytest.mark.parametrize("name", ["v5e", "h100:8", "cpu:x", "cpu:9999", ""])
def test_topologies_that_are_none(name):
    with pytest.raises(InputError, match=f"--topology {name}"):
        topologies.topology(name)


def test_devices_of_this_machine():
    found = topologies.topology("cpu:8")
    assert len(found.devices) == 8 and found.chip is None
    assert np.isfinite([chip.flops for chip in topologies.CHIPS.values()]).all()


def imagined(data, fsdp, tensor, remat, parts):
    """Gigabytes of a chip, and seconds, of a machine with chips of 16."""
    kept = {"none": 120, "dots": 60, "full": 8}[remat]
    gigabytes = 40 / (fsdp * tensor) + kept / parts / tensor**0.5
    return gigabytes, {"arithmetic": {"none": 6.0, "dots": 7.0, "full": 8.0}[remat], "interconnect": parts + tensor}


@pytest.fixture
def asked(monkeypatch):
    """Puts an imagined compiler in place of the real one, which takes minutes; what it was asked for."""
    asked = []

    def make_plan(config, slice):
        mesh, train = config.mesh, config.train
        asked.append((mesh.data, mesh.fsdp, mesh.tensor, train.remat, train.accumulation))
        gigabytes, seconds = imagined(*asked[-1])
        if gigabytes > 32:
            raise InputError("the compiler refuses it")
        unimportant = {field.name: 0 for field in dataclasses.fields(Plan)}
        chosen = {"mesh": vars(mesh), "remat": train.remat, "accumulation": train.accumulation, "fits": gigabytes <= 16}
        step = max(seconds.values())
        times = {"seconds_of": seconds, "step_seconds_roofline": step, "compute_bound": seconds["arithmetic"] / step}
        return Plan(**{**unimportant, **chosen, **times})

    monkeypatch.setattr(search_plans, "make_plan", make_plan)
    return asked


def search(capsys, batch_size):
    batch = f"--config.train.batch_size={batch_size}"
    with pytest.raises(SystemExit) as ended:
        command.main(["--config", "configs/llama_pretrain.py:8b", "--topology", "cpu:8", "--search", "--json", batch])
    printed = capsys.readouterr()
    return ended.value.code, printed.err if ended.value.code else json.loads(printed.out)


def test_a_search_finds_the_fewest_parts_of_each_mesh_the_fastest_first(asked, capsys):
    code, found = search(capsys, 480)
    assert code == 0
    fewest = {}
    for data, fsdp, tensor in [(1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8), (8, 1, 1)]:
        for remat in ("none", "dots"):  # with "dots" arithmetic is what limits the fastest, so "full" cannot be faster
            divisors = [parts for parts in range(1, 481) if 480 % (parts * data * fsdp) == 0]
            fitting = [parts for parts in divisors if imagined(data, fsdp, tensor, remat, parts)[0] <= 16]
            if fitting:
                fewest[data, fsdp, tensor, remat] = fitting[0]
    got = [((plan["mesh"]["data"], plan["mesh"]["fsdp"], plan["mesh"]["tensor"], plan["remat"]), plan) for plan in found]
    assert {variant: plan["accumulation"] for variant, plan in got} == fewest
    seconds = [plan["step_seconds_roofline"] for plan in found]
    assert seconds == sorted(seconds) and seconds[0] == 7.0 and got[0][1]["compute_bound"] == 1
    assert len(asked) == len(set(asked)) < 60, "what is asked for takes minutes each"


def test_a_search_that_finds_nothing_says_so_after_one_try_of_each(monkeypatch, capsys):
    def refuse(config, slice):
        raise InputError("cpu:8: not enough memory")

    monkeypatch.setattr(search_plans, "make_plan", refuse)
    code, told = search(capsys, 16)
    assert code == 2 and "error: cpu:8: nothing that was tried fits" in told
    assert told.count("not enough memory") == 5 * 3 and "fsdp=8, remat none, 2 parts: cpu:8: not enough memory\n" in told


def test_launchers_are_told_by_their_environment():
    off = {"JAX_PLATFORMS": "cpu"}
    assert launcher(off) is None
    assert launcher({**off, "SLURM_STEP_NUM_TASKS": "4"}) == "SLURM"
    assert launcher({**off, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert launcher({**off, "OMPI_COMM_WORLD_SIZE": "2"}) == "Open MPI"
    assert launcher({**off, "TPU_WORKER_HOSTNAMES": "a,b"}) == "TPU pod"
    assert launcher({**off, "TPU_WORKER_HOSTNAMES": "a"}) is None
    assert launcher({**off, "MEGASCALE_COORDINATOR_ADDRESS": "a:1"}) == "TPU pod"
