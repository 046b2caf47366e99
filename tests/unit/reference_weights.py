"""Copies the weights of the PyTorch originals into our modules, for parity tests."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters import quantizer
from converters.engine import LAYER
from converters.whisper_weights import openai_table


def filled(make):
    """The module that ``make(rngs)`` describes with random arrays from NumPy: the real initialisers take long to compile."""
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    random = np.random.default_rng(0)
    state = []
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        value = random.normal(size=variable.shape).astype(np.float32)
        if path[-1] == "scale":
            value = 1.0 + 0.2 * value
        elif "codebook" in path:
            unit = np.random.default_rng(1).normal(size=variable.shape)
            unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
            value = {"embed": unit, "embed_avg": unit, "cluster_size": 0.0 * value, "initted": 1.0 + 0.0 * value}[path[-1]]
        else:
            value *= 0.2
        state.append((path, variable.replace(jnp.asarray(value, jnp.float32))))
    nnx.update(module, nnx.from_flat_state(state))
    return module


def jitted(module, method):
    """A method that changes nothing, under ``jax.jit``."""
    graphdef, state = nnx.split(module)
    call = jax.jit(lambda state, *arguments: getattr(nnx.merge(graphdef, state), method)(*arguments))
    return lambda *arguments: call(state, *arguments)


def set_weights(module, weights):
    """Sets every array of ``module``; ``weights`` maps dotted paths to arrays and must have exactly the module's."""
    flat = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(module))}
    assert flat.keys() == weights.keys(), sorted(flat.keys() ^ weights.keys())
    for path, variable in flat.items():
        assert variable.shape == weights[path].shape, (path, variable.shape, weights[path].shape)
    state = [
        (path, variable.replace(jnp.asarray(weights[".".join(map(str, path))], jnp.float32)))
        for path, variable in nnx.to_flat_state(nnx.state(module))
    ]
    nnx.update(module, nnx.from_flat_state(state))


def arrays(torch_module):
    return {key: value.detach().numpy().copy() for key, value in torch_module.state_dict().items()}


def from_table(rows, source):
    """What a conversion table makes of foreign arrays, by dotted paths; layers stacked, other keys of ``source`` ignored."""
    weights = {}
    for row in rows:
        keys = [row.source]
        if LAYER in row.source:
            layers = (row.source.replace(LAYER, str(layer)) for layer in itertools.count())
            keys = list(itertools.takewhile(source.__contains__, layers))
        found = [row.transform.forward(source[key]) for key in keys]
        weights[".".join(row.target)] = np.stack(found) if LAYER in row.source else found[0]
    return weights


def whisper_weights(reference, config):
    """From ``whisper.model.Whisper``."""
    return from_table(openai_table(config), arrays(reference))


def quantizer_weights(reference, config):
    """From ``ichigo.asr.arch.quantizer.Quantizer`` and ``ichigo_asr.models.vq_transformer.RQBottleneckTransformer``."""
    return from_table(quantizer.table(config), arrays(reference))


def residual_vq_weights(source, config):
    """From the state of a ``vector_quantize_pytorch.ResidualVQ``."""
    rows = [row for row in quantizer.table(config) if row.target[0] == "vq"]
    weights = from_table(rows, {f"rq.{key}": value for key, value in source.items()})
    return {path.removeprefix("vq."): value for path, value in weights.items()}
