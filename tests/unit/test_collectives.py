"""What a compiled training step sends between devices: weights to where they are used and their gradients back, no more."""

import jax
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from test_step import CONFIG, batch, run_config, task

from ichigo_jax.models.llama import Llama
from ichigo_jax.parallel import batch_sharding, make_mesh
from ichigo_jax.planning.hlo import COLLECTIVES, Program
from ichigo_jax.train import make_step
from ichigo_jax.training.state import logical_axes, make_state, split, state_shardings

LAYERS = CONFIG.llama.num_hidden_layers


def compiled_step(sizes, remat):
    config = run_config(1)
    config.train.remat = remat
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        model = Llama(CONFIG, nnx.Rngs(0))
        graphdef, *parts = split(model, ())
        optimizer = optax.sgd(0.5)
        state = make_state(*parts, optimizer, spike_window=1)
        shardings = state_shardings(state, logical_axes(model, ()), mesh)
        trained = task()
        trained.config = config
        step = jax.jit(make_step(trained, config, graphdef, optimizer), out_shardings=(shardings, None))
        rows = jax.device_put(batch(), batch_sharding(mesh))
        text = step.lower(jax.device_put(state, shardings), rows).compile().as_text()
    return Program(text), flatten_dict(state.params)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 4}])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_in_the_layers_weights_are_gathered_twice_and_gradients_summed_once(sizes, remat):
    program, params = compiled_step(sizes, remat)
    gathered, summed = [], 0.0
    for instruction, _, times in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES or times < LAYERS:
            continue
        assert times == LAYERS and kind in ("all-gather", "all-reduce", "reduce-scatter"), f"{kind} in the loop over layers"
        if kind == "all-gather":
            gathered += [array.bytes for array in instruction.arrays]
        else:
            summed += instruction.bytes * (sizes["fsdp"] if kind == "reduce-scatter" else 1)
    of_layers = [array.nbytes / LAYERS for path, array in params.items() if path[0] == "layers"]
    norms = [CONFIG.llama.hidden_size * 4.0] * 2
    assert sorted(gathered + 2 * norms) == sorted(2 * of_layers)  # once forwards, once backwards; norms are everywhere
    stored = sum(of_layers) - sum(norms)
    over_data = stored / sizes["fsdp"] if "data" in sizes else 0  # of its own part alone
    assert stored <= summed <= stored + over_data + sum(norms)  # no activation among them


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 4}])
def test_gradients_of_the_embedding_and_the_output_are_summed_in_the_parts_that_devices_store(sizes):
    program, params = compiled_step(sizes, "full")
    whole = params[("embedding",)].nbytes
    summed = [
        array.bytes * (sizes["fsdp"] if "reduce-scatter" in instruction.opcode else 1)
        for instruction, _, times in program.instructions()
        if times == 1 and instruction.opcode.removesuffix("-start") in ("all-reduce", "reduce-scatter")
        for array in instruction.arrays
    ]
    # The output's, over fsdp; over data a part of each.
    parts = [whole / sizes["fsdp"]] * 2 if "data" in sizes else []
    assert sorted(size for size in summed if size >= whole / 8) == sorted([whole, *parts])
