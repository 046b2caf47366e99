"""Low-rank adapters against PEFT on tiny random weights: logits, gradients, twenty steps; and what is frozen and merged."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from reference_weights import filled
from test_speech_tokenizer_training import assert_close, recording
from test_step import CONFIG, Z_LOSS, batch, run_config, task, three_steps

from converters import engine, llama
from converters import lora as peft_format
from ichigo_jax.models import lora
from ichigo_jax.models.llama import Llama
from ichigo_jax.models.lora import LoraConfig
from ichigo_jax.parallel import make_mesh, named_sharding
from ichigo_jax.train import make_step
from ichigo_jax.training.optimizer import learning_rate_schedule, make_optimizer
from ichigo_jax.training.run_config import load
from ichigo_jax.training.state import declarations, make_state, split

TIED = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, tie_word_embeddings=True))
QWEN = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, architecture="qwen2", attention_bias=True))
ALL = LoraConfig(rank=4, alpha=8.0, rslora=False, targets=("all",), train_also=("embedding", "lm_head"))
CASES = {
    "llama": (CONFIG, ALL),
    "llama-tied": (TIED, LoraConfig(4, 6.0, True, ("q", "o", "down"), ("embedding",))),
    "qwen2": (QWEN, LoraConfig(3, 6.0, False, ("all",), ("embedding", "lm_head", "norms"))),
    "llama-adapters-alone": (CONFIG, LoraConfig(4, 8.0, True, ("k", "v", "gate", "up"), ())),
}


def base(config):
    return filled(lambda rngs: Llama(config, rngs))


def adapted(config, adapter, base_dtype="float32", b_std=0.3):
    model = base(config)
    lora.attach(model, adapter, base_dtype, nnx.Rngs(1))
    random = np.random.default_rng(2)
    for name in adapter.linears:  # zeros, as B begins, would hide A
        b = getattr(model.layers, lora.LINEARS[name].module).adapters[name].b
        b.set_value(jnp.asarray(random.normal(0, b_std, b.shape), jnp.float32))
    return model


def arrays(model):
    return {path: np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(nnx.state(model))}


@nnx.jit
def logits(model, tokens):
    hidden, _ = model(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    return model.logits(hidden)


TOKENS = np.random.default_rng(1).integers(0, 60, (3, 12))

# What attaching does -------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_starts_as_pefts():
    model, plain = adapted(CONFIG, ALL, b_std=0.0), base(CONFIG)
    np.testing.assert_array_equal(logits(model, TOKENS), logits(plain, TOKENS))
    for name, inputs in (("q", 32), ("o", 32), ("down", 64)):
        adapter = getattr(model.layers, lora.LINEARS[name].module).adapters[name]
        assert float(jnp.abs(adapter.b[...]).max()) == 0.0
        a = np.asarray(adapter.a[...])
        bound = 1 / math.sqrt(inputs)
        assert 0.97 * bound < np.abs(a).max() <= bound and abs(a.std() - bound / math.sqrt(3)) < 0.08 * bound
        assert not np.array_equal(a[0], a[1])


def test_parameters_name_their_axes_beside_their_layers_own():
    found = dict(nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: adapted(CONFIG, ALL)))))
    at = ("layers", "attention", "adapters")
    assert found[*at, "q", "a"].axes == ("layers", "embed", "rank") and found[*at, "q", "a"].shape == (2, 32, 4)
    assert found[*at, "q", "b"].axes == ("layers", "rank", "heads", "head") and found[*at, "q", "b"].shape == (2, 4, 4, 8)
    assert found[*at, "k", "b"].axes == ("layers", "rank", "kv_heads", "head")
    assert found[*at, "o", "a"].axes == ("layers", "heads", "head", "rank") and found[*at, "o", "a"].shape == (2, 4, 8, 4)
    assert found[*at, "o", "b"].axes == ("layers", "rank", "embed") and found[*at, "o", "b"].shape == (2, 4, 32)
    assert found["layers", "feed_forward", "adapters", "down", "a"].axes == ("layers", "ffn", "rank")


def test_only_the_adapter_and_what_is_trained_in_full_has_gradients_and_optimizer_state():
    model = adapted(CONFIG, ALL, base_dtype="bfloat16")
    graphdef, params, frozen, buffers = split(model, ())
    assert {path[-1] for path in flatten_dict(params)} == {"a", "b", "embedding", "lm_head"}
    assert set(flatten_dict(frozen)) == arrays(base(CONFIG)).keys() - {("embedding",), ("lm_head",)}
    assert {array.dtype.name for array in jax.tree.leaves(params)} == {"float32"}
    assert {array.dtype.name for array in jax.tree.leaves(frozen)} == {"bfloat16"}

    optimizer = make_optimizer(load("configs/nano_llama.py", []).optimizer, 10, model)
    state = make_state(params, frozen, buffers, optimizer, spike_window=1)
    size = lambda tree: sum(array.nbytes for array in jax.tree.leaves(tree))  # noqa: E731
    assert 2 * size(params) <= size(state.opt_state) <= 2 * size(params) + 64  # two moments and a few counters

    step = jax.jit(make_step(task(), run_config(1), graphdef, optimizer))
    after, _ = step(step(state, batch())[0], batch())  # the warm-up's first step has rate 0
    jax.tree.map(np.testing.assert_array_equal, after.frozen, frozen)
    jax.tree.map(lambda new, old: np.testing.assert_array_less(0, np.abs(new - old).max()), after.params, params)


def test_config_frozen_goes_beside_what_is_declared():
    _, params, _, _ = split(adapted(CONFIG, ALL), ("layers.attention", "embedding"))
    assert {path[1] for path in flatten_dict(params) if len(path) > 1} == {"feed_forward"} and "embedding" not in params
    trained, frozen, _ = declarations(adapted(CONFIG, ALL), ())
    assert "lm_head" in trained and "norm" in frozen


def test_adapters_are_laid_out_over_the_mesh():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    model = base(CONFIG)
    lora.attach(model, ALL, "float32", nnx.Rngs(1), mesh)
    plain = adapted(CONFIG, ALL, b_std=0.0)
    for name, adapter in model.layers.feed_forward.adapters.items():
        for part in ("a", "b"):
            variable = getattr(adapter, part)
            assert variable[...].sharding == named_sharding(mesh, variable.axes, variable.shape, name)
            np.testing.assert_array_equal(variable[...], getattr(plain.layers.feed_forward.adapters[name], part)[...])


# Merging -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_gives_the_same_logits(case):
    model = adapted(*CASES[case])
    plain = lora.merged(model, "float32")
    assert arrays(plain).keys() == arrays(base(CASES[case][0])).keys()
    expected = logits(model, TOKENS)
    np.testing.assert_allclose(logits(plain, TOKENS), expected, atol=1e-4)
    assert np.abs(logits(base(CASES[case][0]), TOKENS) - expected).max() > 0.1
    assert model.layers.attention.adapters is not None  # the model that is trained on is left as it was


def test_merging_adds_in_float32_and_goes_back_to_the_bases_dtype():
    model = adapted(CONFIG, ALL, base_dtype="bfloat16")
    adapter = model.layers.attention.adapters["o"]
    a, b, w = (np.asarray(x[...], np.float64) for x in (adapter.a, adapter.b, model.layers.attention.o))
    expected = w + 2.0 * np.einsum("lnhr,lrd->lnhd", a, b)
    plain = lora.merged(model, "bfloat16")
    assert {array.dtype.name for array in arrays(plain).values()} == {"bfloat16"}
    found = plain.layers.attention.o[...]
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)
    once = jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16)
    assert (found != once).mean() < 1e-3  # rounded once, not at every step

    stored = {path: arrays(model)[path].astype(jnp.bfloat16) for path in arrays(plain)}
    by_array = lora.merge_arrays(stored, flatten_dict(lora.trained_state(model)), ALL)
    for path, array in arrays(plain).items():
        np.testing.assert_array_equal(by_array[path], np.asarray(array), err_msg=str(path))


# Sharding and accumulation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [({"data": 2, "fsdp": 2, "tensor": 2}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 4), ({"fsdp": 4, "context": 2}, 1)],
)
def test_parts_and_meshes_give_the_same_step(expected, mesh, accumulation):
    params, losses = three_steps(mesh, accumulation, gently_adapted)
    assert losses == pytest.approx(expected[1], abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, expected[0])


def gently_adapted():
    """With weights on which gradient descent does not blow up rounding within three steps."""
    model = adapted(CONFIG, ALL, b_std=0.1)
    for name in ("embedding", "lm_head"):
        parameter = getattr(model, name)
        parameter.set_value(parameter[...] * 0.5)
    return model


@pytest.fixture(scope="module")
def expected():
    params, losses = three_steps(None, 1, gently_adapted)
    assert "adapters" in params["layers"]["attention"] and losses[0] - losses[-1] > 1e-2
    return params, losses


# Against PEFT --------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def peft_model(torch, config, adapter, model):
    """PEFT's model with our weights, A and B."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    values = llama.config_to_hf(config, "float32", {}) | {"attn_implementation": "eager"}
    family = "Llama" if config.llama.architecture == "llama" else "Qwen2"
    network = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**values))
    fields = peft_format.config_to_peft(adapter, config, None) | {"inference_mode": False}
    theirs = peft.get_peft_model(network, peft.LoraConfig(**fields))
    table = llama.table(config), engine.target_shapes(lambda rngs: Llama(config, rngs))
    of_adapter = peft_format.table(config, adapter), peft_format.target_shapes(config, adapter)
    named, state = dict(theirs.named_parameters(remove_duplicate=False)), arrays(model)
    with torch.no_grad():
        for rows, targets in (table, of_adapter):
            for piece in engine.expand(rows, targets):
                value = torch.from_numpy(engine.foreign_tensor(piece, state).copy())
                for key in names_in_peft(piece.source, named):
                    named[key].copy_(value)
    return theirs


def names_in_peft(source, named):
    """PEFT's parameters for a key of the base or of an adapter folder."""
    stem = source.removeprefix(peft_format.PREFIX).removesuffix(".weight").removesuffix(".bias")
    kind = source.rpartition(".")[2]
    ends = [f".{kind}", f".base_layer.{kind}", f".original_module.{kind}"]
    if source.startswith(peft_format.PREFIX):
        ends = [".default.weight", ".modules_to_save.default.weight"]
    found = [peft_format.PREFIX + stem + end for end in ends if peft_format.PREFIX + stem + end in named]
    assert found, source
    return found


def their_loss(torch, theirs, data):
    """Cross-entropy of the targets and z-loss, packed rows taken apart: theirs knows no segments."""
    rows = {name: torch.from_numpy(np.array(data[name], np.int64)).reshape(-1, 6) for name in ("tokens", "targets")}
    found, targets = theirs(input_ids=rows["tokens"]).logits.flatten(0, 1).float(), rows["targets"].flatten()
    drift = found[targets != -100].logsumexp(-1).square().mean()
    return torch.nn.functional.cross_entropy(found, targets) + Z_LOSS * drift


def their_gradients(config, adapter, theirs):
    """By our paths, in our layout."""
    named = dict(theirs.named_parameters(remove_duplicate=False))
    targets = peft_format.target_shapes(config, adapter)
    pieces = engine.expand(peft_format.table(config, adapter), targets)
    gradient = lambda key: named[names_in_peft(key, named)[0]].grad.numpy()  # noqa: E731
    return engine.assemble(engine.read_pieces(pieces, gradient, None, "gradients"), targets)


def assert_gradients_equal(found, expected):
    found = flatten_dict(found)
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        assert_close(found[path], gradient, str(path))


@pytest.mark.parametrize("case", ["llama", "llama-tied", "qwen2"])
def test_logits_gradients_and_twenty_steps_equal_pefts(torch, case):
    config, adapter = CASES[case]
    model, data = adapted(config, adapter), batch()
    theirs = peft_model(torch, config, adapter, model)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(model, TOKENS), expected, atol=1e-4)

    settings = load("configs/nano_llama.py", []).optimizer
    settings = dataclasses.replace(settings, weight_decay_on="all", learning_rate=1e-2, warmup_steps=3, clip_norm=0.5)
    ours = recording(make_optimizer(settings, 20, model))
    graphdef, *parts = split(model, ())
    state = make_state(*parts, ours, spike_window=1)
    step = jax.jit(make_step(task(), run_config(1), graphdef, ours))
    schedule = learning_rate_schedule(settings, 20)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    momenta = {"betas": (settings.b1, settings.b2), "eps": settings.eps}
    optimizer = torch.optim.AdamW(trained, weight_decay=settings.weight_decay, **momenta)
    losses, their_losses = [], []
    for number in range(20):
        optimizer.zero_grad()
        loss = their_loss(torch, theirs, data)
        loss.backward()
        state, metrics = step(state, data)
        if number == 0:
            assert_gradients_equal(state.opt_state[0], their_gradients(config, adapter, theirs))
        torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        optimizer.param_groups[0]["lr"] = float(schedule(number))
        optimizer.step()
        their_losses.append(loss.item())
        losses.append(float(metrics["loss"]))
    assert their_losses[0] - their_losses[-1] > 0.3
    np.testing.assert_allclose(losses, their_losses, rtol=1e-3)
