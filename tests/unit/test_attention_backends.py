"""Attention back ends of the language model: the same numbers as XLA's, or a refusal in one line."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ichigo_jax.errors import InputError
from ichigo_jax.models.attention import attend, causal_segments, check_backend, splash
from ichigo_jax.parallel import make_mesh
from ichigo_jax.train import train
from ichigo_jax.training.run_config import load

ROOT = Path(__file__).parents[2]
B, T, N, K, H = 4, 256, 4, 2, 16


def inputs(dtype=jnp.float32):
    """Grouped queries, and rows of several segments, one of which crosses the kernel's tiles; padding at the end."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    q, k, v, cotangent = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes))
    row = np.repeat([1, 2, 3, 0], [50, 150, 40, 16])
    return (q, k, v), cotangent, jnp.asarray(np.stack([row, row, np.ones(T), row]), jnp.int32)


def output_and_gradients(attend, qkv, cotangent):
    def run(qkv):
        out, pull = jax.vjp(attend, *qkv)
        return out, *pull(cotangent)

    return jax.jit(run)(qkv)


def interpreted_splash(segments):
    return functools.partial(splash.attend, mask=causal_segments(segments), interpret=True)


def by(backend, segments):
    return functools.partial(attend, mask=causal_segments(segments), backend=backend)


@pytest.mark.parametrize("packed", [True, False])
def test_splash_equals_xla(packed):
    qkv, cotangent, segments = inputs()
    segments = segments if packed else None
    expected = output_and_gradients(by("xla", segments), qkv, cotangent)
    found = output_and_gradients(interpreted_splash(segments), qkv, cotangent)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_splash_on_a_mesh_equals_xla():
    """Rows over data and fsdp, key/value heads and the queries of their groups over tensor."""
    qkv, cotangent, segments = inputs()
    expected = output_and_gradients(by("xla", segments), qkv, cotangent)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        found = output_and_gradients(interpreted_splash(segments), qkv, cotangent)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=2e-5)
    rows_and_heads = found[0].sharding.spec
    assert rows_and_heads[0] == ("data", "fsdp") and rows_and_heads[2] == "tensor"


def test_segments_are_what_separates_packed_rows():
    qkv, _, segments = inputs()
    packed = by("xla", segments)(*qkv)
    alone = by("xla", None)(*(x[:1, 50:200] for x in qkv))
    np.testing.assert_allclose(packed[:1, 50:200], alone, atol=1e-5)
    joined = by("xla", None)(*qkv)
    assert np.abs(packed - joined)[0, 50:200].max() > 0.1


def test_splash_refuses_rows_that_its_tiles_do_not_divide():
    (q, k, v), _, _ = inputs()
    with pytest.raises(InputError, match="rows of 200 tokens found, attention 'splash' expects a multiple of 128"):
        attend(q[:, :200], k[:, :200], v[:, :200], causal_segments(None), "splash")


@pytest.mark.parametrize(
    ("backend", "platform", "dtype", "context", "message"),
    [
        ("cudnn", "cpu", "bfloat16", 1, "attention 'cudnn' found on cpu devices, expected gpu; set train.attention to 'xla'"),
        ("splash", "gpu", "bfloat16", 1, "attention 'splash' found on gpu devices, expected tpu"),
        ("cudnn", "gpu", "float32", 1, "attention 'cudnn' found with compute_dtype 'float32', expected 'bfloat16'"),
        ("splash", "tpu", "float32", 2, "attention 'splash' found with mesh.context 2, expected 1"),
    ],
)
def test_what_a_back_end_needs(backend, platform, dtype, context, message):
    with pytest.raises(InputError, match=message):
        check_backend(backend, platform, dtype, context)


@pytest.mark.parametrize(
    ("backend", "platform", "dtype", "context"),
    [
        ("xla", "cpu", "float32", 2),
        ("xla", "tpu", "bfloat16", 1),
        ("cudnn", "gpu", "bfloat16", 1),
        ("splash", "tpu", "float32", 1),
    ],
)
def test_what_a_back_end_has(backend, platform, dtype, context):
    check_backend(backend, platform, dtype, context)


@pytest.mark.parametrize("backend", ["cudnn", "splash"])
def test_a_run_on_the_wrong_devices_ends_before_it_begins(backend, tmp_path):
    config = load(str(ROOT / "configs" / "nano_llama.py"), [f"--config.train.attention={backend}"])
    with pytest.raises(InputError, match=f"attention '{backend}' found on cpu devices"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_whisper_has_no_other_attention_than_xlas(tmp_path):
    from ichigo_jax.tasks import open_files

    config = load(str(ROOT / "configs" / "nano_speech_tokenizer.py"), [])
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, attention="splash"))
    with pytest.raises(InputError, match="train.attention 'splash' found, expected 'xla'"):
        open_files(config)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
def test_cudnn_equals_xla(packed):
    qkv, cotangent, segments = inputs(jnp.bfloat16)
    segments = segments if packed else None
    expected = output_and_gradients(by("xla", segments), qkv, cotangent)
    found = output_and_gradients(by("cudnn", segments), qkv, cotangent)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.05)
