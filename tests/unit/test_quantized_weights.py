"""Matrices in few bits: each one against its theory, then a model made of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from reference_weights import filled
from test_generation import LLAMA

from ichigo_jax.errors import InputError
from ichigo_jax.inference.language_model import LanguageModel
from ichigo_jax.inference.quantization import quantization_error
from ichigo_jax.models.linear import project
from ichigo_jax.models.llama import LanguageModelConfig, Llama
from ichigo_jax.models.quantized_weights import QuantizedKernel, quantize
from ichigo_jax.storage.model_folder import load_model, save_model

D, V = 64, 96
CONFIG = LanguageModelConfig(
    dataclasses.replace(LLAMA, vocab_size=V, hidden_size=D, intermediate_size=128, head_dim=16, max_position_embeddings=64),
    sound=None,
    eos_token_ids=(),
    padded_vocab_size=V,
)
TIED = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, tie_word_embeddings=True))
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
PROMPTS = [[5], [7, 8, 9, 10, 11], [3, 1, 2]]
FORMATS = [("int8", None), ("int4", 16)]
TOKENS = np.random.default_rng(2).integers(0, V, (4, 32))


def dequantized(kernel: QuantizedKernel) -> np.ndarray:
    """float32 [contracted, ...outputs]."""
    weights = np.asarray(kernel.values.astype(jnp.float32)) * np.asarray(kernel.scales)[:, None]
    return weights.reshape(-1, *weights.shape[2:])


def stored_bytes(state) -> int:
    """What the arrays take on the device, by the program that would read them: four-bit integers lie two in a byte."""
    leaves = jax.tree.leaves(state)
    program = jax.jit(lambda leaves: [leaf.ravel()[0] for leaf in leaves]).lower(leaves).compile()
    return program.memory_analysis().argument_size_in_bytes


class TestKernel:
    @pytest.mark.parametrize("to, group_size, largest", [("int8", None, 127), ("int4", 8, 7), ("int4", 32, 7), ("int8", 4, 127)])
    def test_no_weight_is_off_by_more_than_half_a_scale(self, to, group_size, largest):
        weights = np.random.default_rng(0).normal(size=(32, 3, 5)).astype(np.float32)
        kernel = quantize(jnp.asarray(weights), 1, to, group_size)
        size = group_size or 32
        assert kernel.values.dtype == to and kernel.values.shape == (32 // size, size, 3, 5)
        scales = np.abs(weights.reshape(-1, size, 3, 5)).max(1) / largest
        np.testing.assert_allclose(kernel.scales, scales, rtol=1e-6)
        off = np.abs(dequantized(kernel) - weights)
        assert (off <= scales.repeat(size, axis=0) * (0.5 + 1e-5)).all()
        # Rounding errors are spread evenly over the scale, so their mean square is 1/12 of its; a group's largest has none.
        mean_square = np.mean(np.square(off / scales.repeat(size, axis=0)))
        assert mean_square == pytest.approx((1 - 1 / size) / 12, rel=0.2)

    @pytest.mark.parametrize("axes, shape", [(1, (48, 6, 4)), (2, (6, 8, 10))])
    @pytest.mark.parametrize("to, group_size", FORMATS)
    def test_project(self, axes, shape, to, group_size):
        random = np.random.default_rng(1)
        weights = random.normal(size=shape).astype(np.float32)
        x = random.normal(size=(2, 3, *shape[:axes])).astype(np.float32)
        kernel = quantize(jnp.asarray(weights), axes, to, group_size)
        found = project(jnp.asarray(x), kernel, axes)
        rows = x.reshape(2, 3, 48)
        np.testing.assert_allclose(found, np.tensordot(rows, dequantized(kernel), 1), atol=1e-5)
        exact = np.tensordot(rows, weights.reshape(48, *shape[axes:]), 1)
        bound = np.abs(rows).sum(-1).max() * np.asarray(kernel.scales).max() / 2
        assert 0 < np.abs(found - exact).max() <= bound
        half = project(jnp.asarray(x, jnp.bfloat16), kernel, axes, dtype=jnp.float32)
        assert half.dtype == jnp.float32 and project(jnp.asarray(x, jnp.bfloat16), kernel, axes).dtype == jnp.bfloat16
        np.testing.assert_allclose(half, found, atol=0.02 * np.abs(found).max())

    def test_zeros_stay_zeros(self):
        kernel = quantize(jnp.zeros((4, 2)).at[0, 0].set(-3.0), 1, "int8", None)
        np.testing.assert_array_equal(dequantized(kernel), [[-3, 0], [0, 0], [0, 0], [0, 0]])

    def test_four_bits_take_half_a_byte(self):
        kernel = quantize(jnp.ones((64, 64)), 1, "int4", 32)
        assert stored_bytes(kernel.values) == 64 * 64 // 2

    @pytest.mark.parametrize("group_size", [0, 5, 64])
    def test_group_sizes_that_do_not_divide_are_refused(self, group_size):
        with pytest.raises(InputError, match=f"group_size {group_size} found, expected a divisor of 32"):
            quantize(jnp.ones((32, 4)), 1, "int4", group_size)


@pytest.fixture(scope="module", params=[CONFIG, TIED], ids=["head", "tied"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "model"
    config = request.param
    model = filled(lambda rngs: Llama(config, rngs))
    save_model(folder, "language_model", config, nnx.to_pure_dict(nnx.state(model)), {}, None)
    return folder


@pytest.fixture(scope="module")
def exact(folder):
    return LanguageModel.from_pretrained(folder)


@pytest.fixture(scope="module", params=FORMATS, ids=[to for to, _ in FORMATS])
def quantized(request, folder):
    return LanguageModel.from_pretrained(folder, quantize=request.param[0], group_size=request.param[1])


def kernels(language_model):
    """Name to kernel: of one matrix for all layers, of the head for itself."""
    return {path[-1]: value for path, value in flatten_dict(language_model.arrays).items() if isinstance(value, QuantizedKernel)}


class TestModel:
    def test_logits_are_as_close_as_theory_says(self, exact, quantized, folder):
        """Rounding to a scale s is like noise that is spread evenly over -s/2 to s/2, so it must cost as much as that."""
        model = load_model(folder, lambda rngs: Llama(exact.config, rngs), jnp.float32)
        random, found = np.random.default_rng(0), kernels(quantized)
        if exact.config.llama.tie_word_embeddings:
            del found["lm_head"]  # whose noise the embedding would have as well
        state = nnx.to_flat_state(nnx.state(model))
        for path, variable in state:
            if (name := path[-1]) in found:
                values, scales = found[name].values, np.asarray(found[name].scales)
                noise = random.uniform(-0.5, 0.5, values.shape) * np.expand_dims(scales, 2 if path[0] == "layers" else 1)
                variable.set_value(variable.get_value() + jnp.asarray(noise.reshape(variable.shape), jnp.float32))
        nnx.update(model, nnx.from_flat_state(state))
        logits = exact.logits(TOKENS)
        noisy = quantization_error(logits, LanguageModel(model, exact.config, None).logits(TOKENS))
        error = quantization_error(logits, quantized.logits(TOKENS))
        assert error.relative == pytest.approx(noisy.relative, rel=0.3)
        assert error.relative < (0.05 if found["q"].values.dtype == jnp.int8 else 0.6)
        assert error.largest > 0 and error.same_choice > 1 - 4 * error.relative

    def test_takes_as_much_memory_as_it_should(self, exact, quantized, folder):
        """Float32 kernels become one byte or half a byte a weight and four bytes a scale; all else stays as it was."""
        arrays = flatten_dict(exact.arrays)
        matrices = {path: array for path, array in arrays.items() if path[-1] in (*MATRICES, "lm_head")}
        weights = sum(array.size for array in matrices.values())
        rest = stored_bytes(exact.arrays) - 4 * weights
        if "lm_head" not in {path[-1] for path in matrices}:
            weights += V * D
        found = kernels(quantized)
        bits = 8 if found["q"].values.dtype == jnp.int8 else 4
        scales = sum(kernel.scales.size for kernel in found.values())
        assert stored_bytes(quantized.arrays) == rest + weights * bits // 8 + 4 * scales
        assert scales == (weights // 16 if bits == 4 else scales)
        assert stored_bytes(quantized.arrays) < stored_bytes(exact.arrays) / (2 if bits == 4 else 1.5)

    def test_the_embedding_stays(self, exact, quantized):
        np.testing.assert_array_equal(quantized.arrays["embedding"], exact.arrays["embedding"])
        assert all(array.devices() == {jax.devices()[0]} for array in jax.tree.leaves(quantized.arrays))

    def test_generates(self, quantized):
        together = quantized.generate(PROMPTS, 6)
        assert [len(answer) for answer in together] == [6, 6, 6]
        for prompt, answer in zip(PROMPTS, together):
            ids = [*prompt, *answer]
            greedy = quantized.logits([ids])[0].argmax(-1)[len(prompt) - 1 : -1].tolist()
            assert greedy == answer == list(quantized.stream(prompt, 6))

    def test_bfloat16(self, folder, exact, quantized):
        """The errors of few bits and of computing in bfloat16 are independent."""
        to, group_size = FORMATS[0] if kernels(quantized)["q"].values.dtype == jnp.int8 else FORMATS[1]
        both = LanguageModel.from_pretrained(folder, dtype="bfloat16", quantize=to, group_size=group_size)
        assert both.arrays["embedding"].dtype == jnp.bfloat16
        half = LanguageModel.from_pretrained(folder, dtype="bfloat16")
        logits = exact.logits(TOKENS)
        few, short, found = (quantization_error(logits, each.logits(TOKENS)).relative for each in (quantized, half, both))
        assert found == pytest.approx(np.hypot(few, short), rel=0.3)


@pytest.mark.parametrize(
    "options, fault",
    [
        ({"quantize": "int3"}, "quantize 'int3' found, expected one of int8, int4"),
        ({"quantize": "int4"}, "'int4' with group_size None found, expected a group size"),
        ({"quantize": "int8", "group_size": 32}, "'int8' with group_size 32 found"),
        ({"group_size": 32}, "None with group_size 32 found"),
        ({"quantize": "int4", "group_size": 48}, "group_size 48 found, expected a divisor of 64"),
    ],
)
def test_refusals(folder, options, fault):
    with pytest.raises(InputError, match=fault):
        LanguageModel.from_pretrained(folder, **options)
