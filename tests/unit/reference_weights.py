"""Copies the weights of the PyTorch originals into our modules, for parity tests."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


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


def _prefixed(prefix, weights):
    return {f"{prefix}.{key}": value for key, value in weights.items()}


def _norm(source, prefix):
    return {"scale": source[f"{prefix}.weight"], "bias": source[f"{prefix}.bias"]}


def _attention(source, prefix, heads):
    split = lambda weight: weight.T.reshape(weight.shape[1], heads, -1)  # noqa: E731
    return {
        "query": split(source[f"{prefix}.query.weight"]),
        "query_bias": source[f"{prefix}.query.bias"].reshape(heads, -1),
        "key": split(source[f"{prefix}.key.weight"]),
        "value": split(source[f"{prefix}.value.weight"]),
        "value_bias": source[f"{prefix}.value.bias"].reshape(heads, -1),
        "out": source[f"{prefix}.out.weight"].T.reshape(heads, -1, source[f"{prefix}.out.weight"].shape[0]),
        "out_bias": source[f"{prefix}.out.bias"],
    }


def _mlp(source, prefix):
    return {
        "up": source[f"{prefix}.0.weight"].T,
        "up_bias": source[f"{prefix}.0.bias"],
        "down": source[f"{prefix}.2.weight"].T,
        "down_bias": source[f"{prefix}.2.bias"],
    }


def _conv(source, prefix):
    return {"kernel": source[f"{prefix}.weight"].transpose(2, 1, 0), "bias": source[f"{prefix}.bias"]}


def _block(source, prefix, heads):
    block = {
        **_prefixed("attention_norm", _norm(source, f"{prefix}.attn_ln")),
        **_prefixed("attention", _attention(source, f"{prefix}.attn", heads)),
        **_prefixed("mlp_norm", _norm(source, f"{prefix}.mlp_ln")),
        **_prefixed("mlp", _mlp(source, f"{prefix}.mlp")),
    }
    if f"{prefix}.cross_attn_ln.weight" in source:
        block |= _prefixed("cross_attention_norm", _norm(source, f"{prefix}.cross_attn_ln"))
        block |= _prefixed("cross_attention", _attention(source, f"{prefix}.cross_attn", heads))
    return block


def _blocks(source, prefix, layers, heads):
    blocks = [_block(source, f"{prefix}.{layer}", heads) for layer in range(layers)]
    return {f"blocks.{key}": np.stack([block[key] for block in blocks]) for key in blocks[0]}


def whisper_weights(reference, config):
    """From ``whisper.model.Whisper``."""
    source = arrays(reference)
    return {
        **_prefixed("encoder.conv1", _conv(source, "encoder.conv1")),
        **_prefixed("encoder.conv2", _conv(source, "encoder.conv2")),
        "encoder.positions": source["encoder.positional_embedding"],
        **_prefixed("encoder", _blocks(source, "encoder.blocks", config.n_audio_layer, config.n_audio_head)),
        **_prefixed("encoder.norm", _norm(source, "encoder.ln_post")),
        "decoder.token_embedding": source["decoder.token_embedding.weight"],
        "decoder.positions": source["decoder.positional_embedding"],
        **_prefixed("decoder", _blocks(source, "decoder.blocks", config.n_text_layer, config.n_text_head)),
        **_prefixed("decoder.norm", _norm(source, "decoder.ln")),
    }


def residual_vq_weights(source, quantizers):
    """From the state of a ``vector_quantize_pytorch.ResidualVQ``."""
    stack = lambda name: np.stack([source[f"layers.{q}.{name}"] for q in range(quantizers)])  # noqa: E731
    codebook = "_codebook"
    return {
        "project_in": stack("project_in.weight").transpose(0, 2, 1),
        "project_in_bias": stack("project_in.bias"),
        "project_out": stack("project_out.weight").transpose(0, 2, 1),
        "project_out_bias": stack("project_out.bias"),
        "codebook.embed": stack(f"{codebook}.embed")[:, 0],
        "codebook.cluster_size": stack(f"{codebook}.cluster_size")[:, 0],
        "codebook.embed_avg": stack(f"{codebook}.embed_avg")[:, 0],
        "codebook.initted": stack(f"{codebook}.initted")[:, 0],
    }


def quantizer_weights(reference, config):
    """From ``ichigo.asr.arch.quantizer.Quantizer`` and ``ichigo_asr.models.vq_transformer.RQBottleneckTransformer``."""
    source = arrays(reference)
    vq = {key.removeprefix("rq."): value for key, value in source.items() if key.startswith("rq.")}
    weights = {
        **_prefixed("mlp_norm", _norm(source, "mlp_ln")),
        **_prefixed("mlp", _mlp(source, "mlp")),
        **_prefixed("vq", residual_vq_weights(vq, config.num_quantizers)),
        "positions": source["positional_embedding.weight"],
        **_blocks(source, "_out_blocks", config.depth, config.n_head),
        **_prefixed("norm", _norm(source, "ln_post")),
    }
    if config.downsampling == "conv":
        weights |= _prefixed("downsample_conv", _conv(source, "downsample_conv"))
    return weights
