"""Training the language model: twenty steps beside transformers under torch, packed or not, rematerialised, sharded."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from reference_weights import arrays, filled, from_table, set_weights
from test_speech_tokenizer_training import recording

from converters import llama
from ichigo_jax.data.language import Example, collate
from ichigo_jax.data.loading import IGNORE
from ichigo_jax.models.llama import LanguageModelConfig, Llama, LlamaConfig, RopeScaling
from ichigo_jax.parallel import batch_sharding, make_mesh
from ichigo_jax.tasks.language_model import LanguageModelTask
from ichigo_jax.train import make_step
from ichigo_jax.training.language_config import LanguageObjective
from ichigo_jax.training.optimizer import make_optimizer
from ichigo_jax.training.run_config import load
from ichigo_jax.training.state import logical_axes, make_state, split, state_shardings

pytestmark = pytest.mark.slow

RECIPE = str(Path(__file__).parents[2] / "configs" / "nano_llama.py")
STEPS, WARMUP, PEAK, FLOOR, DECAY = 20, 4, 3e-3, 0.1, 0.005
ROWS, LENGTH, VOCABULARY = 4, 24, 50
SCALING = RopeScaling(8.0, 1.0, 4.0, 16)
LLAMA = LlamaConfig("llama", VOCABULARY, 32, 48, 2, 4, 2, 8, 64, 1e-5, 500.0, SCALING, False, False, 0.1)
FAMILIES = {
    "llama": LLAMA,
    "llama-tied": dataclasses.replace(LLAMA, tie_word_embeddings=True, head_dim=16),
    "qwen2": dataclasses.replace(LLAMA, architecture="qwen2", attention_bias=True, rope_scaling=None, rms_norm_eps=1e-6),
}


def model_config(network):
    return LanguageModelConfig(network, None, (1,), 56)


def recipe(train=None, optimizer=None):
    """The released runs' numbers on a few short steps, in parts of half a batch."""
    config = load(RECIPE, [])
    numbers = {
        "learning_rate": PEAK,
        "warmup_steps": WARMUP,
        "decay_to": FLOOR,
        "weight_decay": DECAY,
        "weight_decay_on": "all",
        "clip_norm": 1.0,
        "b2": 0.95,
    }
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, **{**numbers, **(optimizer or {})}),
        train=dataclasses.replace(config.train, **{"steps": STEPS, "accumulation": 2, **(train or {})}),
    )


def task_of(config, network, packing=True, objective=None):
    """What is trained; it needs none of the data that its config names."""
    objective = objective or LanguageObjective("all", loss_chunk=7, z_loss=0.0)
    data = {**config.data, "packing": packing}
    config = dataclasses.replace(config, data=data, objective=dataclasses.asdict(objective))
    return LanguageModelTask(config, model_config(network))


def prepare(config, network, model, objective=None):
    """The state at step 0 and the step, whose optimizer state begins with the last gradients."""
    graphdef, *parts = split(model, ())
    optimizer = recording(make_optimizer(config.optimizer, config.train.steps, model))
    state = make_state(*parts, optimizer, config.train.spike_window)
    return state, make_step(task_of(config, network, objective=objective), config, graphdef, optimizer)


def examples(seed):
    """Rows of two or three sequences, of which not all ids are to be predicted."""
    random = np.random.default_rng(seed)
    lengths = [(10, 14), (5, 9, 7), (24,), (3, 12)]
    return [
        [Example(random.integers(2, VOCABULARY, length).astype(np.int32), random.random(length) < 0.7) for length in row]
        for row in lengths
    ]


def batch_of(rows):
    collated = [collate(row, LENGTH, pad_id=0) for row in rows]
    return {name: jnp.asarray(np.stack([row[name] for row in collated])) for name in collated[0]}


def unpacked(rows):
    """The same sequences, one a row."""
    return [[example] for row in rows for example in row]


@functools.cache
def random_model(family):
    """A model of random parameters; nothing here changes it."""
    return filled(lambda rngs: Llama(model_config(FAMILIES[family]), rngs))


# ---- against transformers under torch --------------------------------------------------------------------------------


def reference(network):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    fields = {
        name: getattr(network, name)
        for name in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "max_position_embeddings rms_norm_eps tie_word_embeddings initializer_range"
        ).split()
    }
    rope = {"rope_type": "default", "rope_theta": network.rope_theta}
    if network.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(network.rope_scaling)}
    kind = {"llama": "Llama", "qwen2": "Qwen2"}[network.architecture]
    fields |= {"rope_parameters": rope, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**fields))
    with torch.no_grad():  # transformers starts norms at one and biases at zero, where a mistake would not show
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def ours_of(network, foreign):
    """Foreign weights or gradients by our dotted paths, the vocabulary padded with zeros to the rows that we keep."""
    config = model_config(network)
    missing = config.padded_vocab_size - VOCABULARY
    padded = {
        name: np.pad(value, ((0, missing), (0, 0))) if name in (llama.EMBEDDING, llama.HEAD) else value
        for name, value in foreign.items()
    }
    return from_table(llama.table(config), padded)


def reference_rate(step):
    """Linear warm-up, then cosine, as a factor of the peak (``transformers.get_cosine_with_min_lr_schedule_with_warmup``)."""
    if step < WARMUP:
        return step / WARMUP
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def train_reference(model, batches):
    """Losses of every step and the gradients of the first one, of sequences one by one: torch knows no packing."""
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, reference_rate)
    losses, first = [], None
    for rows in batches:
        batch = {name: torch.tensor(np.asarray(value)).long() for name, value in batch_of(unpacked(rows)).items()}
        logits = model(batch["tokens"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        first = first or {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, first


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_equal_transformers(family):
    """Every gradient of the first step and the loss of all of them, 1e-3 relative; ours packed, in parts and in chunks."""
    network, config = FAMILIES[family], recipe()
    theirs = reference(network)
    ours = nnx.eval_shape(lambda: Llama(model_config(network), nnx.Rngs(0)))
    set_weights(ours, ours_of(network, arrays(theirs)))
    batches = [examples(seed % 4) for seed in range(STEPS)]
    expected_losses, expected_gradients = train_reference(theirs, batches)

    state, step = prepare(config, network, ours)
    step, losses, norms = jax.jit(step), [], []
    for number, rows in enumerate(batches):
        state, metrics = step(state, batch_of(rows))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        if number == 0:
            gradients = {".".join(path): value for path, value in flatten_dict(state.opt_state[0]).items()}
    expected = ours_of(network, expected_gradients)
    assert gradients.keys() == expected.keys()
    for name in expected:
        scale = np.abs(expected[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-3, atol=1e-3 * scale, err_msg=name)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-3)
    assert max(norms) > 1.0 and losses[-4] < losses[0] - 0.1, "the clip and the optimizer should have acted"


# ---- packing and rematerialisation -----------------------------------------------------------------------------------


def token_losses(model, batch, packed):
    """Cross-entropy of every target, in the order of rows and places."""

    @nnx.jit
    def run(model):
        segments = batch["segment_ids"] if packed else None
        logits = model.logits(model(batch["tokens"], batch["positions"], segment_ids=segments)[0])
        picked = jnp.take_along_axis(logits, jnp.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    return np.asarray(run(model))[np.asarray(batch["targets"]) != IGNORE]


def test_a_packed_batch_gives_every_token_the_loss_it_has_alone():
    model, rows = random_model("llama"), examples(0)
    packed, alone = batch_of(rows), batch_of(unpacked(rows))
    np.testing.assert_allclose(token_losses(model, packed, True), token_losses(model, alone, False), atol=1e-5)
    assert np.abs(token_losses(model, packed, False) - token_losses(model, alone, False)).max() > 0.1
    values = []
    for batch, packing in ((packed, True), (alone, False), (alone, True)):
        task = task_of(recipe(), LLAMA, packing)
        values.append(jax.jit(lambda: task.loss(model, batch, task.totals(batch), jax.random.key(0)))())  # noqa: B023
    for found in values[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, values[0])


def test_z_loss_and_cross_entropy_are_told_apart():
    model, batch = random_model("llama"), batch_of(examples(0))
    plain, with_z = (task_of(recipe(), LLAMA, objective=LanguageObjective("all", None, z)) for z in (0.0, 0.01))
    (loss, metrics), (total, both) = (
        jax.jit(lambda task=task: task.loss(model, batch, task.totals(batch), jax.random.key(0)))() for task in (plain, with_z)
    )
    assert float(loss) == pytest.approx(float(metrics["cross_entropy"])) == pytest.approx(float(both["cross_entropy"]))
    assert float(total) > float(loss) + 0.05


def test_remat_policies_give_the_same_gradients():
    found = []
    for remat in ("none", "dots", "full"):
        state, step = prepare(recipe({"remat": remat, "accumulation": 1}), LLAMA, random_model("llama"))
        found.append(jax.jit(step)(state, batch_of(examples(0)))[0].opt_state[0])
    for gradients in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradients, found[0])


# ---- sharding --------------------------------------------------------------------------------------------------------

# Sizes that appear nowhere else in the program, so that a whole parameter can be told by its shape.
WIDE = dataclasses.replace(LLAMA, hidden_size=40, intermediate_size=88, num_hidden_layers=3)
# An eps above the rounding noise of tiny gradients, which Adam would blow up to whole steps.
STEADY = {"eps": 1e-4, "learning_rate": 1e-3}


@functools.cache
def one_device(optimizer):
    config = recipe(optimizer={"name": optimizer, **STEADY})
    state, step = prepare(config, WIDE, filled(lambda rngs: Llama(model_config(WIDE), rngs)))
    step = jax.jit(step)
    batches = [batch_of(examples(seed) * 4) for seed in range(2)]
    for batch in batches:
        state, metrics = step(state, batch)
    return batches, jax.device_get(state), jax.device_get(metrics)


@pytest.mark.parametrize(
    ("sizes", "optimizer"),
    [
        ({"fsdp": 8}, "adamw"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "adamw"),
        ({"fsdp": 4, "tensor": 2}, "adam_mini"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "adafactor"),
    ],
)
def test_a_sharded_step_equals_one_device(sizes, optimizer):
    """Two steps, packed and in two parts; and each device holds its share of the state and no more."""
    batches, expected, expected_metrics = one_device(optimizer)
    config = recipe(optimizer={"name": optimizer, **STEADY})
    model = filled(lambda rngs: Llama(model_config(WIDE), rngs))
    state, step = prepare(config, WIDE, model)
    mesh = make_mesh(sizes)
    shardings = state_shardings(state, logical_axes(model, ()), mesh)
    with jax.set_mesh(mesh):
        state = jax.device_put(state, shardings)
        placed = [jax.device_put(batch, batch_sharding(mesh)) for batch in batches]
        step = jax.jit(step, out_shardings=(shardings, None)).lower(state, placed[0]).compile()
        for batch in placed:
            state, metrics = step(state, batch)
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(vars(tree)) for tree in (expected, state))):
        np.testing.assert_allclose(b, a, atol=1e-5, rtol=1e-5, err_msg=jax.tree_util.keystr(path))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5), expected_metrics, jax.device_get(metrics))

    split_over = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    kept = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim]
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in kept)
    assert held < 1.1 * sum(leaf.nbytes for leaf in kept) / split_over
    # A layer may be gathered when it is needed; neither a parameter nor a gradient of all layers is ever whole.
    assert re.search(r"f32\[3,(40,88|88,40|40,4,8|4,8,40)\]", step.as_text()) is None
