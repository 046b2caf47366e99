"""Writes Hugging Face models as GGUF files, as llama.cpp's converter writes them, for tests."""

import gguf
import numpy as np

from converters import llama, safetensors_files
from converters.gguf_language_model import NAMES
from ichigo_jax.storage import read_json

Types = gguf.GGMLQuantizationType
KINDS = {"llama": "llama-bpe", "qwen2": "qwen2"}


def permuted(weight, heads):
    """llama.cpp's order of the rows of a head (``LlamaModel.permute`` of convert_hf_to_gguf.py)."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def rope_factors(head_dim, theta, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings, **_):
    """``rope_freqs.weight`` (``LlamaModel.generate_extra_tensors`` there)."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    found = []
    for wavelength in 2 * np.pi / frequencies:
        if wavelength < original_max_position_embeddings / high_freq_factor:
            found.append(1.0)
        elif wavelength > original_max_position_embeddings / low_freq_factor:
            found.append(factor)
        else:
            smooth = original_max_position_embeddings / wavelength - low_freq_factor
            smooth /= high_freq_factor - low_freq_factor
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def stored_type(array, wanted):
    """Norms and rows that no block fits stay in float32."""
    block = gguf.GGML_QUANT_SIZES[Types[wanted]][0]
    return Types.F32 if array.ndim == 1 or array.shape[-1] % block else Types[wanted]


def gguf_tensors(folder, wanted):
    """llama.cpp's tensors of a Hugging Face folder: name to bytes and type, and what they are as floats under their own keys."""
    config = read_json(folder / "config.json")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    stored, floats = {}, {}
    for name, key in ((n, k) for n, k in NAMES.items()):
        for layer in range(config["num_hidden_layers"]) if "{i}" in name else [0]:
            ours, theirs = name.replace("{i}", str(layer)), key.replace("{i}", str(layer))
            tensors = safetensors_files.read_folder(folder)
            if theirs not in tensors:
                continue
            array = tensors[theirs].read().astype(np.float32)
            part = next((part for part in heads if f".{part}.weight" in ours), None)
            if part and config["model_type"] == "llama":
                array = permuted(array, heads[part])
            kind = stored_type(array, wanted)
            stored[ours] = (gguf.quantize(array, kind), kind)
            floats[ours] = gguf.dequantize(stored[ours][0], kind).reshape(array.shape)
    return stored, floats


def add_tokenizer(writer, folder, pre):
    """The metadata of a tokenizer folder."""
    description = read_json(folder / "tokenizer.json")
    added = {token["id"]: token for token in description["added_tokens"]}
    names = {index: token for token, index in description["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    rows = read_json(folder / "config.json")["vocab_size"] if (folder / "config.json").exists() else len(names)
    kind = lambda i: 5 if i not in names else 1 if i not in added else 3 if added[i]["special"] else 4  # noqa: E731
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types([kind(index) for index in range(rows)])
    merges = description["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    settings = read_json(folder / "tokenizer_config.json")
    ids = {content: index for index, content in names.items()}
    for role, name in (("bos_token", "bos"), ("pad_token", "padding")):
        if settings.get(role) in ids:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", ids[settings[role]])
    if (folder / "chat_template.jinja").exists():
        writer.add_chat_template((folder / "chat_template.jinja").read_text())


def write_gguf(file, folder, wanted="F32", change=None):
    """A GGUF file of a Hugging Face folder.

    Args:
      file: to write.
      folder: a Llama or Qwen2 with its tokenizer.
      wanted: how matrices are stored.
      change: is given the metadata and the tensors before they are written.

    Returns:
      The tensors as floats, by their names in the file.
    """
    config = llama.config_from_hf(read_json(folder / "config.json"), str(folder))
    architecture = config.architecture
    stored, floats = gguf_tensors(folder, wanted)
    metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    metadata = {f"{architecture}.{name}": value for name, value in metadata.items()}
    if config.rope_scaling is not None:
        scaling = {name: getattr(config.rope_scaling, name) for name in config.rope_scaling.__dataclass_fields__}
        stored["rope_freqs.weight"] = (rope_factors(config.head_dim, config.rope_theta, **scaling), Types.F32)
    metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.eot_token_id"] = 257, 262
    metadata["general.architecture"] = architecture
    if change is not None:
        change(metadata, stored)
    writer = gguf.GGUFWriter(file, metadata.pop("general.architecture"))
    add_tokenizer(writer, folder, metadata.pop("tokenizer.ggml.pre", KINDS[architecture]))
    for name, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    for name, (data, kind) in stored.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return floats
