"""A speech tokenizer to call: clips in; sound codes, decoder states or text out."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from ichigo_jax.audio.decode import SAMPLE_RATE, check_clip, load_audio
from ichigo_jax.audio.split import SEARCH_SECONDS, TARGET_SECONDS, WINDOW_SECONDS, split_at_silences
from ichigo_jax.errors import InputError
from ichigo_jax.inference.whisper_decoding import greedy
from ichigo_jax.models.folder import TOKENIZER_FOLDER, fingerprint, load_arrays, load_config, load_model
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerConfig, SpeechTokenizerModel
from ichigo_jax.text.whisper import WhisperText

Audio = np.ndarray | str | os.PathLike

KIND = "speech_tokenizer"
TARGET_OF_CONTEXT = 2 / 3  # long clips are cut near it: at 20 s of Whisper's 30
LONGEST_ANSWER = 224  # tokens a piece; Whisper's own bound

# Files are bounded before they are decoded whole.
MAX_SECONDS, MAX_BYTES = 4 * 3600.0, 2 << 30


class SpeechTokenizer:
    """Whisper with a vector-quantised bottleneck.

    Clips run in batches that are filled up to a power of two, every clip padded to the encoder's context as the originals
    do, so at most ``log2(batch_size) + 1`` programs are compiled for any number of clips of any length.

    Attributes:
      config: every number of the model.
      text: Whisper's text tokenizer, or None when there is none; then nothing can be transcribed.
    """

    def __init__(
        self,
        model: SpeechTokenizerModel,
        config: SpeechTokenizerConfig,
        text: WhisperText | None,
        *,
        batch_size: int = 16,
        max_seconds: float = MAX_SECONDS,
        max_bytes: int = MAX_BYTES,
    ):
        """See ``from_pretrained``; this is for a model that is in memory already.

        Args:
          model: the weights.
          config: of the same.
          text: Whisper's text tokenizer.
          batch_size: the most pieces of audio that run together.
          max_seconds: the longest file that is decoded.
          max_bytes: the most memory that decoding one file may take.

        Raises:
          InputError: a text tokenizer with more ids than the decoder has.
        """
        if text is not None and text.size > config.whisper.n_vocab:
            raise InputError(f"text tokenizer with {text.size} ids found, the model has n_vocab {config.whisper.n_vocab}")
        self.config = config
        self.text = text
        self._batch_size, self._max_seconds, self._max_bytes = batch_size, max_seconds, max_bytes
        self._graphdef, self._state = nnx.split(model)
        self._folder: Path | None = None

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, dtype: str = "float32", **options) -> SpeechTokenizer:
        """Loads a model folder.

        Args:
          folder: from an import or from training.
          dtype: the parameters' precision, "float32" or "bfloat16"; codebooks stay float32.
          **options: ``batch_size``, ``max_seconds``, ``max_bytes``, see ``__init__``.

        Raises:
          InputError: not a folder of a speech tokenizer, or one that is not whole.
        """
        if dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype {dtype!r} found, expected float32 or bfloat16")
        folder = Path(folder)
        config = load_config(folder, KIND, SpeechTokenizerConfig)
        model = load_model(folder, lambda rngs: SpeechTokenizerModel(config, rngs), jnp.dtype(dtype))
        has_text = (folder / TOKENIZER_FOLDER).is_dir()
        text = WhisperText.from_folder(folder / TOKENIZER_FOLDER) if has_text else None
        tokenizer = cls(model, config, text, **options)
        tokenizer._folder = folder
        return tokenizer

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the weights as they are stored, the same whatever ``dtype`` they were loaded in."""
        if self._folder is None:
            return fingerprint(nnx.to_pure_dict(self._state))
        return fingerprint(unflatten_dict(load_arrays(self._folder)))

    def encode(self, audio: Sequence[Audio]) -> list[np.ndarray]:
        """Sound codes of a batch of clips of any length; what is longer than a context is cut where it is quiet.

        Args:
          audio: 1-D float arrays at 16 kHz, or files.

        Returns:
          For each clip its codes, int32 [n], or [n, Q] where there are Q > 1 quantisers. A clip too short for one code
          has none.

        Raises:
          AudioError: a clip that cannot be used; nothing is returned for the others either.
        """
        codes: list[list[np.ndarray]] = [[] for _ in audio]
        for clips, lengths, samples in self._batches(audio, max_seconds=self._context_seconds):
            found = np.asarray(_tokenize(self._graphdef, self._state, samples, lengths))
            for clip, length, row in zip(clips, lengths, found):
                kept = row if self.config.quantizer.mask_code is None else row[: self.config.code_count(int(length))]
                codes[clip].append(kept)
        joined = [np.concatenate(pieces) for pieces in codes]
        return [row[:, 0] if self.config.quantizer.num_quantizers == 1 else row for row in joined]

    def dequantize(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """What the decoder would hear.

        Args:
          tokens: for each clip its codes as ``encode`` gives them, at most a context's.

        Returns:
          [B, n_audio_ctx, D] float32.

        Raises:
          InputError: codes that this tokenizer does not have, or more of them than a context holds.
        """
        rows = [self._full_context(codes) for codes in tokens]
        states = []
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            filled = np.stack([*batch, *batch[:1] * (_bucket(len(batch)) - len(batch))])
            states.append(np.asarray(_dequantize(self._graphdef, self._state, filled), np.float32)[: len(batch)])
        shape = (0, self.config.whisper.n_audio_ctx, self.config.whisper.n_audio_state)
        return np.concatenate(states) if states else np.zeros(shape, np.float32)

    def transcribe(self, audio: Sequence[Audio], language: str = "en") -> list[str]:
        """What is said, as the decoder hears it through the codes; greedy.

        Clips over 20 s (over a context, where that is shorter) are cut where it is quiet, as the original does: quality
        falls near the end of Whisper's context. An answer is at most 224 tokens a piece, as Whisper's own, and what the
        decoder's context holds beside the prompt.

        Args:
          audio: 1-D float arrays at 16 kHz, or files.
          language: Whisper's abbreviation.

        Raises:
          AudioError: a clip that cannot be used; nothing is returned for the others either.
          InputError: no text tokenizer in the model folder, or an unknown language.
        """
        if self.text is None:
            raise InputError("this speech tokenizer has no text tokenizer, so it cannot transcribe; add Whisper's to its folder")
        whisper = self.config.whisper
        prompt = np.array(self.text.prompt_in(language), np.int32)
        max_tokens = min(whisper.n_text_ctx - len(prompt), LONGEST_ANSWER)
        never = np.arange(whisper.n_vocab) >= self.text.size
        never[list(self.text.never)] = True
        texts: list[list[str]] = [[] for _ in audio]
        for clips, lengths, samples in self._batches(audio, max_seconds=min(self._context_seconds, TARGET_SECONDS)):
            answers = _transcribe(
                self._graphdef, self._state, samples, lengths, prompt, np.int32(self.text.end), never, max_tokens
            )
            for clip, answer in zip(clips, np.asarray(answers)):
                texts[clip].append(self.text.decode(answer))
        return [" ".join(filter(None, pieces)) for pieces in texts]

    @property
    def _context_seconds(self) -> float:
        return self.config.context_samples / SAMPLE_RATE

    def _batches(self, audio: Sequence[Audio], max_seconds: float) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Pieces of all clips, in order, a batch at a time: which clip each is of, lengths [B], samples [B, S].

        B is a power of two; rows after the last piece have length 0.
        """
        pieces = self._pieces(audio, max_seconds)
        while batch := list(itertools.islice(pieces, self._batch_size)):
            rows = _bucket(len(batch))
            samples = np.zeros((rows, self.config.context_samples), np.float32)
            lengths = np.zeros(rows, np.int32)
            for row, (_, piece) in enumerate(batch):
                samples[row, : len(piece)] = piece
                lengths[row] = len(piece)
            yield [clip for clip, _ in batch], lengths, samples

    def _pieces(self, audio: Iterable[Audio], max_seconds: float) -> Iterator[tuple[int, np.ndarray]]:
        """Reads clip after clip and cuts the long ones: (index of the clip, samples)."""
        target = min(TARGET_OF_CONTEXT * self._context_seconds, TARGET_SECONDS)
        for index, clip in enumerate(audio):
            if isinstance(clip, str | os.PathLike):
                clip = load_audio(clip, self._max_seconds, self._max_bytes)
            else:
                clip = check_clip(clip, f"clip {index}")
            pieces = split_at_silences(
                clip,
                target_seconds=target,
                search_seconds=SEARCH_SECONDS / TARGET_SECONDS * target,
                window_seconds=WINDOW_SECONDS / TARGET_SECONDS * target,
                max_seconds=max_seconds,
                multiple=self.config.samples_per_code,
            )
            for piece in pieces:
                yield index, piece

    def _full_context(self, codes: np.ndarray) -> np.ndarray:
        """Codes [n] or [n, Q], checked and filled up: [T / downsample, Q]."""
        quantizer = self.config.quantizer
        codes = np.asarray(codes)
        if codes.ndim == 1:
            codes = codes[:, None]
        if codes.ndim != 2 or codes.shape[1] != quantizer.num_quantizers or not np.issubdtype(codes.dtype, np.integer):
            raise InputError(
                f"codes of shape {codes.shape} and type {codes.dtype} found, expected integers "
                f"for {quantizer.num_quantizers} quantisers"
            )
        if len(codes) > quantizer.code_positions:
            raise InputError(f"{len(codes)} codes found, expected at most {quantizer.code_positions}: give a context at a time")
        wrong = codes[(codes < 0) | (codes >= quantizer.codes)]
        if wrong.size:
            raise InputError(f"sound code {wrong[0]} found, expected 0 to {quantizer.codes - 1}: are they another tokenizer's?")
        missing = quantizer.code_positions - len(codes)
        return np.pad(codes.astype(np.int32), ((0, missing), (0, 0)), constant_values=quantizer.mask_code or 0)


def _bucket(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


@functools.partial(jax.jit, static_argnames="graphdef")
def _tokenize(graphdef: nnx.GraphDef, state: nnx.State, samples: jax.Array, lengths: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state).tokenize(samples, lengths)


@functools.partial(jax.jit, static_argnames="graphdef")
def _dequantize(graphdef: nnx.GraphDef, state: nnx.State, codes: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state).states_from_codes(codes)


@functools.partial(jax.jit, static_argnames=("graphdef", "max_tokens"))
def _transcribe(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    samples: jax.Array,
    lengths: jax.Array,
    prompt: jax.Array,
    end: jax.Array,
    never: jax.Array,
    max_tokens: int,
) -> jax.Array:
    model = nnx.merge(graphdef, state)
    states = model.states_from_codes(model.tokenize(samples, lengths))
    return greedy(model.whisper.decoder, states, prompt, end, never, lengths > 0, max_tokens)
