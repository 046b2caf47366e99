"""Whisper's weight tables: OpenAI's keys and Hugging Face's, and the rows that the quantiser's blocks share with OpenAI's."""

from __future__ import annotations

from converters.engine import CONV, SAME, TRANSPOSED, Path, Row, head_bias, heads_in, heads_out
from ichigo_jax.models.whisper import WhisperConfig


def linear_rows(source: str, target: Path, weight: str, bias: str) -> list[Row]:
    return [Row(f"{source}.weight", (*target, weight), TRANSPOSED), Row(f"{source}.bias", (*target, bias), SAME)]


def norm_rows(source: str, target: Path) -> list[Row]:
    return [Row(f"{source}.weight", (*target, "scale"), SAME), Row(f"{source}.bias", (*target, "bias"), SAME)]


def conv_rows(source: str, target: Path) -> list[Row]:
    return [Row(f"{source}.weight", (*target, "kernel"), CONV), Row(f"{source}.bias", (*target, "bias"), SAME)]


def attention_rows(source: str, target: Path, head_dim: int, names: tuple[str, str, str, str]) -> list[Row]:
    """``names``: what the format calls query, key, value and out."""
    query, key, value, out = (f"{source}.{name}" for name in names)
    return [
        Row(f"{query}.weight", (*target, "query"), heads_out(head_dim)),
        Row(f"{query}.bias", (*target, "query_bias"), head_bias(head_dim)),
        Row(f"{key}.weight", (*target, "key"), heads_out(head_dim)),
        Row(f"{value}.weight", (*target, "value"), heads_out(head_dim)),
        Row(f"{value}.bias", (*target, "value_bias"), head_bias(head_dim)),
        Row(f"{out}.weight", (*target, "out"), heads_in(head_dim)),
        Row(f"{out}.bias", (*target, "out_bias"), SAME),
    ]


# ---- OpenAI ----------------------------------------------------------------------------------------------------------

_OPENAI_ATTENTION = ("query", "key", "value", "out")


def openai_mlp(source: str, target: Path) -> list[Row]:
    return linear_rows(f"{source}.0", target, "up", "up_bias") + linear_rows(f"{source}.2", target, "down", "down_bias")


def openai_blocks(source: str, target: Path, head_dim: int) -> list[Row]:
    """Self-attention and MLP of every block of a stack."""
    return [
        *norm_rows(f"{source}.{{i}}.attn_ln", (*target, "attention_norm")),
        *attention_rows(f"{source}.{{i}}.attn", (*target, "attention"), head_dim, _OPENAI_ATTENTION),
        *norm_rows(f"{source}.{{i}}.mlp_ln", (*target, "mlp_norm")),
        *openai_mlp(f"{source}.{{i}}.mlp", (*target, "mlp")),
    ]


def openai_table(config: WhisperConfig) -> list[Row]:
    """``model_state_dict`` of an OpenAI checkpoint."""
    encoder_head, decoder_head = head_dims(config)
    blocks = ("decoder", "blocks")
    return [
        *conv_rows("encoder.conv1", ("encoder", "conv1")),
        *conv_rows("encoder.conv2", ("encoder", "conv2")),
        Row("encoder.positional_embedding", ("encoder", "positions"), SAME),
        *openai_blocks("encoder.blocks", ("encoder", "blocks"), encoder_head),
        *norm_rows("encoder.ln_post", ("encoder", "norm")),
        Row("decoder.token_embedding.weight", ("decoder", "token_embedding"), SAME),
        Row("decoder.positional_embedding", ("decoder", "positions"), SAME),
        *openai_blocks("decoder.blocks", blocks, decoder_head),
        *norm_rows("decoder.blocks.{i}.cross_attn_ln", (*blocks, "cross_attention_norm")),
        *attention_rows("decoder.blocks.{i}.cross_attn", (*blocks, "cross_attention"), decoder_head, _OPENAI_ATTENTION),
        *norm_rows("decoder.ln", ("decoder", "norm")),
    ]


# ---- Hugging Face ----------------------------------------------------------------------------------------------------

_HF_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def _hf_blocks(source: str, target: Path, head_dim: int) -> list[Row]:
    return [
        *norm_rows(f"{source}.self_attn_layer_norm", (*target, "attention_norm")),
        *attention_rows(f"{source}.self_attn", (*target, "attention"), head_dim, _HF_ATTENTION),
        *norm_rows(f"{source}.final_layer_norm", (*target, "mlp_norm")),
        *linear_rows(f"{source}.fc1", (*target, "mlp"), "up", "up_bias"),
        *linear_rows(f"{source}.fc2", (*target, "mlp"), "down", "down_bias"),
    ]


def hf_table(config: WhisperConfig) -> list[Row]:
    """The weights of a ``WhisperForConditionalGeneration``, whose output projection is the token embedding."""
    encoder_head, decoder_head = head_dims(config)
    layer, blocks = "model.decoder.layers.{i}", ("decoder", "blocks")
    return [
        *conv_rows("model.encoder.conv1", ("encoder", "conv1")),
        *conv_rows("model.encoder.conv2", ("encoder", "conv2")),
        Row("model.encoder.embed_positions.weight", ("encoder", "positions"), SAME),
        *_hf_blocks("model.encoder.layers.{i}", ("encoder", "blocks"), encoder_head),
        *norm_rows("model.encoder.layer_norm", ("encoder", "norm")),
        Row("model.decoder.embed_tokens.weight", ("decoder", "token_embedding"), SAME),
        Row("model.decoder.embed_positions.weight", ("decoder", "positions"), SAME),
        *_hf_blocks(layer, blocks, decoder_head),
        *norm_rows(f"{layer}.encoder_attn_layer_norm", (*blocks, "cross_attention_norm")),
        *attention_rows(f"{layer}.encoder_attn", (*blocks, "cross_attention"), decoder_head, _HF_ATTENTION),
        *norm_rows("model.decoder.layer_norm", ("decoder", "norm")),
    ]


def head_dims(config: WhisperConfig) -> tuple[int, int]:
    """The head size of the encoder and of the decoder."""
    return config.n_audio_state // config.n_audio_head, config.n_text_state // config.n_text_head
