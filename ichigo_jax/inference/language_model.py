"""A language model to call: token ids in, logits or tokens out."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ichigo_jax.errors import InputError, check_jaxlib
from ichigo_jax.inference import generation
from ichigo_jax.inference.quantization import check_quantization, quantize_model
from ichigo_jax.inference.sampling import Sampling, check_seed, checked
from ichigo_jax.inference.sizes import power_of_two
from ichigo_jax.models.folder import PROVENANCE, TOKENIZER_FOLDER, load_config, load_model, recorded_chat_date
from ichigo_jax.models.llama import LanguageModelConfig, Llama
from ichigo_jax.models.modules import unstack_layers
from ichigo_jax.models.quantized_weights import Quantization
from ichigo_jax.parallel import MESH_AXES, hosts
from ichigo_jax.storage import read_json
from ichigo_jax.text import TextTokenizer, encode_chat

SHORTEST_BUCKET, LONG_BUCKET = 32, 512
FEWEST_STOPS = 4


class LanguageModel:
    """A Llama or Qwen2.5 with its text tokenizer.

    Shapes are rounded up to a few sizes, so a program is compiled once for each of them and not for every prompt.

    Attributes:
      config: every number of the model.
      tokenizer: its text tokenizer, or None when the folder has none.
      provenance: where the weights come from.
    """

    def __init__(
        self,
        model: Llama,
        config: LanguageModelConfig,
        tokenizer: TextTokenizer | None,
        provenance: Mapping[str, Any] | None = None,
    ):
        """See ``from_pretrained``; this is for a model that is in memory already.

        Raises:
          InputError: a tokenizer that does not fit the model.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.provenance = dict(provenance or {})
        self._graphdef, self._state = nnx.split(model)
        if tokenizer is not None:
            check_tokenizer(config, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        dtype: Literal["float32", "bfloat16"] = "float32",
        quantize: Quantization | None = None,
        group_size: int | None = None,
    ) -> LanguageModel:
        """Loads a model folder. A chat template that asks for the date is told the one that the model was trained with.

        Args:
          folder: as ``converters import`` or training wrote it.
          dtype: what the model computes in.
          quantize: "int8" or "int4" to keep all matrices but the embedding in as many bits; None keeps them in ``dtype``.
          group_size: for int4, how many inputs of an output share a scale; less is closer to the exact model and larger.

        Raises:
          InputError: not a whole language-model folder, or a quantisation that does not fit it.
        """
        check_jaxlib()
        check_quantization(quantize, group_size)
        config = load_config(folder, "language_model", LanguageModelConfig)
        mesh = _host_mesh() if quantize else None  # the weights as they are may not fit where the quantised ones do
        model = load_model(folder, lambda rngs: Llama(config, rngs), jnp.dtype(dtype), mesh)
        if quantize:
            model = quantize_model(model, quantize, group_size, jax.devices()[0])
        else:
            model.layers = unstack_layers(model.layers)
        texts = Path(folder) / TOKENIZER_FOLDER
        tokenizer = TextTokenizer.from_folder(texts, recorded_chat_date(folder)) if texts.is_dir() else None
        return cls(model, config, tokenizer, read_json(Path(folder) / PROVENANCE))

    def logits(self, token_ids: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
        """Next-token logits at every position of sequences that start at position 0.

        Args:
          token_ids: integers [B, T].

        Returns:
          float32 [B, T, V].

        Raises:
          InputError: not a [B, T] array of ids from 0 to V-1, or longer than the model's context.
        """
        try:
            rows = np.asarray(token_ids)
        except ValueError:
            raise InputError("rows of different lengths found, expected one length") from None
        if rows.ndim != 2:
            raise InputError(f"token ids of shape {rows.shape} found, expected [batch, time]")
        self._check_prompts(rows.tolist())
        B, T = rows.shape
        context = self.config.llama.max_position_embeddings
        if T > context:
            raise InputError(f"{T} tokens found, the model's context is {context}")
        tokens, _ = _padded(rows.tolist())
        return hosts.whole_array(_all_logits(self._graphdef, self._state, tokens))[:B, :T]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
        **sampling: float,
    ) -> list[list[int]]:
        """Continues every prompt. Greedy by default; a row's greedy answer does not depend on the other rows.

        Args:
          prompts: token ids, one list a row, of any lengths from 1 on.
          max_new_tokens: the most tokens a row gets; a row also ends when the model's context is full.
          seed: of the random draws.
          stop_ids: tokens that end a row; None takes the model's own.
          on_token: called with the row's number and the token as soon as a token is chosen. Costs a return to the host
            at every step.
          **sampling: temperature, top_k, top_p, min_p, repetition_penalty; see ``sampling.Sampling``.

        Returns:
          The new tokens of every row; the stop token, where one came, is the last.

        Raises:
          InputError: an empty prompt, an id out of range, a prompt as long as the model's context, a value out of range.
        """
        if on_token is None:
            decoding, options = self._prefill(prompts, max_new_tokens, seed, stop_ids, sampling)
            decoding = generation.decode_all(self._graphdef, self._state, decoding, options)
            return _answers(decoding.answer, options, len(prompts))
        answers: list[list[int]] = [[] for _ in prompts]
        for tokens in self._steps(prompts, max_new_tokens, seed, stop_ids, sampling):
            for row, token in tokens:
                answers[row].append(token)
                on_token(row, token)
        return answers

    def answer(self, conversations: Sequence[Sequence[Mapping[str, Any]]], max_new_tokens: int, **options: Any) -> list[str]:
        """The next answer in each of several conversations, as text.

        Args:
          conversations: messages as ``text.chat.encode_chat`` takes them.
          max_new_tokens, **options: as for ``generate``.

        Raises:
          InputError: no text tokenizer, or what ``encode_chat`` and ``generate`` refuse.
        """
        tokenizer = self.chat_tokenizer
        prompts = [encode_chat(tokenizer, messages, add_generation_prompt=True).ids for messages in conversations]
        options["stop_ids"] = stop_ids = self.chat_stop_ids(options.get("stop_ids"))
        answers = self.generate(prompts, max_new_tokens, **options)
        return [tokenizer.decode([token for token in ids if token not in stop_ids]) for ids in answers]

    @property
    def chat_tokenizer(self) -> TextTokenizer:
        """The text tokenizer, without which there is no chat.

        Raises:
          InputError: the model has none.
        """
        if self.tokenizer is None:
            raise InputError(
                "the language model has no text tokenizer; add its tokenizer files (tokenizer.json, tokenizer_config.json, "
                "chat_template.jinja) to the model folder, as its folder tokenizer"
            )
        return self.tokenizer

    def chat_stop_ids(self, stop_ids: Sequence[int] | None = None) -> tuple[int, ...]:
        """The tokens that end an answer in a chat.

        A base model's own ids end texts, not turns, so what ends a turn in the tokenizer's chat template is added.

        Args:
          stop_ids: what the caller asks for instead.
        """
        if stop_ids is not None:
            return tuple(stop_ids)
        turn_end = self.chat_tokenizer.turn_end_id
        return tuple(dict.fromkeys((*self.config.eos_token_ids, *([] if turn_end is None else [turn_end]))))

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        **sampling: float,
    ) -> Iterator[int]:
        """As ``generate`` for one prompt, a token at a time as they are chosen."""
        for tokens in self._steps([prompt], max_new_tokens, seed, stop_ids, sampling):
            yield tokens[0][1]

    def _steps(self, prompts, max_new_tokens, seed, stop_ids, sampling) -> Iterator[list[tuple[int, int]]]:
        """At every step, (row, token) of the rows that were not finished before it."""
        decoding, options = self._prefill(prompts, max_new_tokens, seed, stop_ids, sampling)
        active = list(range(len(prompts)))
        while active:
            tokens, finished = hosts.whole_array(decoding.token), hosts.whole_array(decoding.finished)
            yield [(row, int(tokens[row])) for row in active]
            active = [row for row in active if not finished[row]]
            if active:
                decoding = generation.decode_step(self._graphdef, self._state, decoding, options)

    def _prefill(self, prompts, max_new_tokens, seed, stop_ids, sampling) -> tuple[generation.Decoding, generation.Options]:
        prompts = [list(prompt) for prompt in prompts]
        self._check_prompts(prompts)
        context = self.config.llama.max_position_embeddings
        longest = max(map(len, prompts))
        if longest >= context:
            raise InputError(f"prompt of {longest} tokens found, the model's context is {context}; shorten the conversation")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens {max_new_tokens} found, expected at least 1")
        check_seed(seed)
        tokens, lengths = _padded(prompts)
        # Rows that only fill the batch up have no token to give.
        limits = np.where(np.arange(len(tokens)) < len(prompts), np.minimum(max_new_tokens, context - lengths), 0)
        stop_ids = self.config.eos_token_ids if stop_ids is None else stop_ids
        options = generation.Options(
            sampling=checked(Sampling(**sampling)),
            stop_ids=_stops(stop_ids),
            limits=limits.astype(np.int32),
            key=jax.random.key(seed),
        )
        slots = _bucket(int((lengths + limits).max()))
        return generation.prefill(self._graphdef, self._state, tokens, lengths, options, cache_length=slots), options

    def _check_prompts(self, rows: Sequence[Sequence[int]]) -> None:
        vocab_size = self.config.llama.vocab_size
        if not rows or not all(rows):
            raise InputError("no tokens found, expected at least one in every prompt")
        for number, row in enumerate(rows):
            for token in row:
                if not isinstance(token, (int, np.integer)) or not 0 <= token < vocab_size:
                    raise InputError(f"prompt {number}: token id {token!r} found, expected 0 to {vocab_size - 1}")


def check_tokenizer(config: LanguageModelConfig, tokenizer: TextTokenizer) -> None:
    """Refuses a text tokenizer of another model.

    Raises:
      InputError: more ids than the model has, or other sound tokens.
    """
    vocab_size, sound = config.llama.vocab_size, config.sound
    if tokenizer.size > vocab_size:
        raise InputError(f"text tokenizer with {tokenizer.size} ids found, the model has {vocab_size}")
    if tokenizer.sound != sound:
        raise InputError(f"text tokenizer with sound tokens {tokenizer.sound} found, the model has {sound}")


def _host_mesh() -> Mesh | None:
    """The host's first CPU, or None where JAX was told to use accelerators alone."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    return Mesh(np.array(device).reshape([1] * len(MESH_AXES)), MESH_AXES)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _all_logits(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    hidden, _ = model(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    return model.logits(hidden)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids as int32 [B, P], zeros to the right and below, and lengths int32 [B] (1 for the rows that only fill up)."""
    tokens = np.zeros((power_of_two(len(rows)), _bucket(max(map(len, rows)))), np.int32)
    lengths = np.ones(len(tokens), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        lengths[number] = len(row)
    return tokens, lengths


def _stops(stop_ids: Sequence[int]) -> np.ndarray:
    """Stop tokens as int32 [n], filled up with -1, which no token is, so that n is nearly always the same."""
    stops = np.full(power_of_two(max(FEWEST_STOPS, len(stop_ids))), -1, np.int32)
    stops[: len(stop_ids)] = list(stop_ids)
    return stops


def _bucket(length: int) -> int:
    """Sizes that sequences are rounded up to: powers of two to 512, then multiples of 512."""
    if length > LONG_BUCKET:
        return -(-length // LONG_BUCKET) * LONG_BUCKET
    return max(SHORTEST_BUCKET, power_of_two(length))


def _answers(answer: jax.Array, options: generation.Options, rows: int) -> list[list[int]]:
    """Cuts the rows of int32 [B, S] after their stop token or at their limit."""
    stop_ids = set(np.asarray(options.stop_ids).tolist())
    answers = []
    for row, limit in zip(hosts.whole_array(answer)[:rows].tolist(), np.asarray(options.limits).tolist()):
        stop = next((index + 1 for index, token in enumerate(row[:limit]) if token in stop_ids), limit)
        answers.append(row[:stop])
    return answers
