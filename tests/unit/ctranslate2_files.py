"""Writes tiny ``model.bin`` files as CTranslate2's converter writes them, for tests."""

import struct

import ml_dtypes
import numpy as np

from ichigo_jax.storage import write_json

CODES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}
ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


def places(dims):
    """Each array of a ``WhisperSpec`` and the keys of OpenAI's ``model_state_dict`` that lie in it, one after another."""
    found = {}

    def linear(target, *sources):
        for what in ("weight", "bias"):
            found[f"{target}/{what}"] = [f"{source}.{what}" for source in sources]

    def norm(target, source):
        found[f"{target}/gamma"], found[f"{target}/beta"] = [f"{source}.weight"], [f"{source}.bias"]

    for name in ("conv1", "conv2"):
        linear(f"encoder/{name}", f"encoder.{name}")
    found["decoder/embeddings/weight"] = ["decoder.token_embedding.weight"]
    for part, layers, last in (("encoder", "n_audio_layer", "ln_post"), ("decoder", "n_text_layer", "ln")):
        found[f"{part}/position_encodings/encodings"] = [f"{part}.positional_embedding"]
        norm(f"{part}/layer_norm", f"{part}.{last}")
        for layer in range(dims[layers]):
            target, source = f"{part}/layer_{layer}", f"{part}.blocks.{layer}"
            linear(f"{target}/self_attention/linear_0", *(f"{source}.attn.{name}" for name in ("query", "key", "value")))
            linear(f"{target}/self_attention/linear_1", f"{source}.attn.out")
            norm(f"{target}/self_attention/layer_norm", f"{source}.attn_ln")
            linear(f"{target}/ffn/linear_0", f"{source}.mlp.0")
            linear(f"{target}/ffn/linear_1", f"{source}.mlp.2")
            norm(f"{target}/ffn/layer_norm", f"{source}.mlp_ln")
            if part == "decoder":
                linear(f"{target}/attention/linear_0", f"{source}.cross_attn.query")
                linear(f"{target}/attention/linear_1", f"{source}.cross_attn.key", f"{source}.cross_attn.value")
                linear(f"{target}/attention/linear_2", f"{source}.cross_attn.out")
                norm(f"{target}/attention/layer_norm", f"{source}.cross_attn_ln")
    return found


def whisper_variables(state, dims):
    """The variables of a ``WhisperSpec`` from ``model_state_dict`` of an OpenAI checkpoint (NumPy arrays)."""
    no_bias = np.zeros(dims["n_audio_state"], np.float32)  # of keys
    found = {name: np.concatenate([state.get(key, no_bias) for key in keys]) for name, keys in places(dims).items()}
    settings = {"activation": (3, np.int8), "alibi": (0, np.int8), "alibi_use_positive_positions": (0, np.int8)}
    settings |= {"alignment_heads": (1, np.int16), "alignment_layer": (-1, np.int16), "pre_norm": (1, np.int8)}
    settings |= {name: (0, np.int8) for name in ("scale_alibi", "scale_embeddings", "start_from_zero_embedding")}
    found |= {f"decoder/{name}": np.array(value, dtype) for name, (value, dtype) in settings.items()}
    found["encoder/num_heads"] = np.array(dims["n_audio_head"], np.int16)
    found["decoder/num_heads"] = np.array(dims["n_text_head"], np.int16)
    return found


def openai_state(variables, dims):
    """``model_state_dict`` of the checkpoint with these variables."""
    split = ((keys, np.split(variables[name], len(keys))) for name, keys in places(dims).items())
    found = {key: array for keys, arrays in split for key, array in zip(keys, arrays)}
    return {key: array for key, array in found.items() if not key.endswith("key.bias")}


def stored_as(variables, kind):
    """What CTranslate2's ``--quantization KIND`` stores: int8 divides rows by their largest number, int16 a whole weight."""
    floats = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}.get(kind.removeprefix("int8_"), np.float32)
    found = {}
    for name, array in variables.items():
        if not array.ndim:
            found[name] = array
        elif not name.endswith("/weight") or not kind.startswith("int"):
            found[name] = array.astype(floats)
        elif kind == "int16":
            scale = np.float32(2**10 / np.abs(array).max())
            found[name], found[f"{name}_scale"] = np.rint(array * scale).astype(np.int16), scale
        else:
            rows = array.reshape(len(array), -1)
            scale = (127 / np.abs(rows).max(axis=1)).astype(np.float32)
            found[name] = np.rint(rows * scale[:, None]).astype(np.int8).reshape(array.shape)
            found[f"{name}_scale"] = scale
    return found


def string(text):
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def variable(name, array, code=None):
    array = np.asarray(array)
    code = CODES[array.dtype.name] if code is None else code
    shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
    return string(name) + shape + struct.pack("<BI", code, array.nbytes) + array.tobytes()


def model_bytes(variables, aliases=ALIASES, version=6, spec="WhisperSpec", revision=3, others=()):
    """A whole ``model.bin``; ``others`` are further variables as bytes."""
    stored = [variable(name, array) for name, array in sorted(variables.items())] + list(others)
    start = struct.pack("<I", version) + string(spec) + struct.pack("<II", revision, len(stored))
    told = [string(alias) + string(name) for alias, name in dict(aliases).items()]
    return b"".join([start, *stored, struct.pack("<I", len(told)), *told])


def write_whisper(folder, variables, **options):
    """A folder as faster-whisper loads it, without a tokenizer."""
    folder.mkdir()
    (folder / "model.bin").write_bytes(model_bytes(variables, **options))
    write_json(folder / "config.json", {"suppress_ids": [1, 2], "suppress_ids_begin": [3], "alignment_heads": [[1, 0]]})
    return folder
