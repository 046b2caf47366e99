"""The chunked cross-entropy: what the whole one gives, without ever holding the whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from ichigo_jax.data.loading import IGNORE
from ichigo_jax.parallel import make_mesh, partition_spec
from ichigo_jax.training.losses import cross_entropy_sums, vocabulary_loss

B, T, D, V, ROWS = 8, 12, 16, 29, 32


def arrays(dtype=jnp.float32):
    random = np.random.default_rng(0)
    targets = random.integers(0, V, (B, T))
    targets[:3, 7:] = IGNORE
    hidden, kernel = random.normal(size=(B, T, D)), random.normal(size=(D, ROWS))
    return jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype), jnp.asarray(targets, jnp.int32)


def whole(hidden, kernel, targets, z_loss):
    """By automatic differentiation through all logits at once."""
    logits = jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32)[..., :V]
    cross_entropy, correct, _ = cross_entropy_sums(logits, targets)
    drift = jnp.where(targets != IGNORE, jax.nn.logsumexp(logits, axis=-1) ** 2, 0.0).sum()
    return cross_entropy + z_loss * drift, (cross_entropy, correct)


def chunked(hidden, kernel, targets, z_loss, chunk):
    sums = vocabulary_loss(hidden, kernel, targets, V, chunk, z_loss)
    return sums.loss, (sums.cross_entropy, sums.correct)


def value_and_gradients(function, *arguments):
    return jax.jit(jax.value_and_grad(lambda h, k: function(h, k, *arguments), argnums=(0, 1), has_aux=True))


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("chunk", [None, 1, 10, 32, 1000])  # 96 tokens: 10 does not divide them
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_chunks_change_neither_loss_nor_gradient(chunk, z_loss):
    hidden, kernel, targets = arrays()
    expected = value_and_gradients(whole, targets, z_loss)(hidden, kernel)
    found = value_and_gradients(chunked, targets, z_loss, chunk)(hidden, kernel)
    assert_close(found, expected)
    assert float(found[0][1][1]) > 0, "some targets should be right, else their number tests nothing"
    without_gradient = jax.jit(lambda: chunked(hidden, kernel, targets, z_loss, chunk))()
    assert_close(without_gradient, expected[0])
    assert np.abs(found[1][1][:, V:]).max() == 0, "padding rows are not trained"


@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "context": 2}],
)
def test_a_mesh_changes_nothing(sizes):
    hidden, kernel, targets = arrays()
    expected = value_and_gradients(whole, targets, 0.01)(hidden, kernel)
    mesh = make_mesh(sizes)
    place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, partition_spec(axes)))  # noqa: E731
    with jax.set_mesh(mesh):
        placed = place(hidden, "batch", "time", None), place(kernel, "embed", "vocab")
        found = value_and_gradients(chunked, place(targets, "batch", "time"), 0.01, 5)(*placed)
    assert_close(found, expected)


def test_rows_that_the_mesh_does_not_divide_stay_whole():
    hidden, kernel, targets = (x[:3] if x.shape[0] == B else x for x in arrays())
    expected = value_and_gradients(whole, targets, 0.0)(hidden, kernel)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 4})):
        found = value_and_gradients(chunked, targets, 0.0, 4)(hidden, kernel)
    assert_close(found, expected)


def test_the_kernels_gradient_is_summed_over_devices_once_and_not_in_the_loop():
    hidden, kernel, targets = arrays()
    mesh = make_mesh({"data": 2, "fsdp": 4})
    place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, partition_spec(axes)))  # noqa: E731
    with jax.set_mesh(mesh):
        placed = place(hidden, "batch", "time", None), place(kernel, "embed", "vocab")
        program = value_and_gradients(chunked, place(targets, "batch", "time"), 0.0, 4).lower(*placed).compile().as_text()
    sums = [line for line in program.splitlines() if " all-reduce(" in line or " reduce-scatter(" in line]
    bodies = [line for line in sums if "while/body" in line]
    assert sums and not bodies


def largest_array(program):
    """Elements of the largest intermediate of a jaxpr, of all programs within it as well."""
    program = getattr(program, "jaxpr", program)
    is_program = lambda node: hasattr(node, "eqns") or hasattr(node, "jaxpr")  # noqa: E731
    sizes = [variable.aval.size for equation in program.eqns for variable in equation.outvars]
    inner = [node for equation in program.eqns for node in jax.tree.leaves(equation.params, is_leaf=is_program)]
    return max(sizes + [largest_array(node) for node in inner if is_program(node)], default=0)


def test_the_whole_logits_never_exist():
    rows, length, width, vocabulary, chunk = 4, 64, 8, 512, 32
    hidden, kernel = jnp.ones((rows, length, width)), jnp.ones((width, vocabulary))
    targets = jnp.zeros((rows, length), jnp.int32)

    def size(chunk):
        loss = lambda h, k: vocabulary_loss(h, k, targets, vocabulary, chunk, 1e-4).loss  # noqa: E731
        function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        program = jax.make_jaxpr(function)(hidden, kernel)
        return largest_array(program), function.lower(hidden, kernel).compile().memory_analysis().temp_size_in_bytes

    logits = rows * length * vocabulary
    assert size(None)[0] == logits and size(None)[1] > 4 * logits, "the measure sees them where they exist"
    elements, temporary_bytes = size(chunk)
    assert elements == chunk * vocabulary
    assert temporary_bytes < 4 * logits


def test_half_precision_gradients_are_summed_in_full():
    """256 chunks of one token each: a bfloat16 running sum would lose most of them."""
    random = np.random.default_rng(1)
    hidden = jnp.asarray(1 + 0.1 * random.normal(size=(1, 256, D)), jnp.bfloat16)
    kernel, targets = jnp.zeros((D, ROWS), jnp.bfloat16), jnp.zeros((1, 256), jnp.int32)
    expected = value_and_gradients(whole, targets, 0.0)(hidden.astype(jnp.float32), kernel.astype(jnp.float32))[1][1]
    found = value_and_gradients(chunked, targets, 0.0, 1)(hidden, kernel)[1][1]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32)[:, :V], expected[:, :V], rtol=2**-7)
