"""Text for the models: tokenizers that no text can trick, chat templates, transcription prompts."""

from ichigo_jax.text.chat import EncodedChat, SoundCodes, SpecialToken, TruncatedChat, encode_chat, truncate
from ichigo_jax.text.prompts import drawn_transcription_prompt, transcription_prompt, transcription_request
from ichigo_jax.text.tokenizer import StreamDecoder, TextTokenizer
from ichigo_jax.text.train_tokenizer import train_llama_tokenizer, train_whisper_tokenizer

__all__ = [
    "EncodedChat",
    "SoundCodes",
    "SpecialToken",
    "StreamDecoder",
    "TextTokenizer",
    "TruncatedChat",
    "drawn_transcription_prompt",
    "encode_chat",
    "train_llama_tokenizer",
    "train_whisper_tokenizer",
    "transcription_prompt",
    "transcription_request",
    "truncate",
]
