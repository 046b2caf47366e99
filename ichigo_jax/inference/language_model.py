"""A language model to call: token ids in, logits or tokens out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ichigo_jax.decoding import language_model as decoding_loop
from ichigo_jax.decoding.loop import Decoding
from ichigo_jax.decoding.sampling import GREEDY, SEEDS, Sampler, Sampling, check_seed, checked, stacked
from ichigo_jax.errors import InputError, check_jaxlib
from ichigo_jax.inference.dtypes import Dtype, checked_dtype
from ichigo_jax.inference.quantization import check_quantization, quantize_model
from ichigo_jax.inference.sizes import power_of_two
from ichigo_jax.models.llama import LanguageModelConfig, Llama
from ichigo_jax.models.quantized_weights import Quantization
from ichigo_jax.models.split import SplitModel, jit_model
from ichigo_jax.models.stack import unstack_layers
from ichigo_jax.parallel import MESH_AXES, hosts
from ichigo_jax.storage import read_json
from ichigo_jax.storage.model_folder import PROVENANCE, TOKENIZER_FOLDER, load_config, load_model, recorded_chat_date
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
        mesh: Mesh | None = None,
    ):
        """See ``from_pretrained``; this is for a model that is in memory already.

        Args:
          model: the weights, laid out over ``mesh`` where there is one.
          config: of the same.
          tokenizer: its text tokenizer.
          provenance: where the weights come from.
          mesh: whose devices compute together; None: those that hold the weights, or the mesh that the caller has set.

        Raises:
          InputError: a tokenizer that does not fit the model.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.provenance = dict(provenance or {})
        self._model = SplitModel(model, mesh)
        if tokenizer is not None:
            check_tokenizer(config, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        dtype: Dtype = "float32",
        quantize: Quantization | None = None,
        group_size: int | None = None,
        mesh: Mesh | None = None,
    ) -> LanguageModel:
        """Loads a model folder. A chat template that asks for the date is told the one that the model was trained with.

        Args:
          folder: as ``converters import`` or training wrote it.
          dtype: what the model computes in.
          quantize: "int8" or "int4" to keep all matrices but the embedding in as many bits; None keeps them in ``dtype``.
          group_size: for int4, how many inputs of an output share a scale; less is closer to the exact model and larger.
          mesh: from ``parallel.make_mesh``: its devices share the weights and compute together, for models that one device
            cannot hold. None: the default device alone.

        Raises:
          InputError: not a whole language-model folder, another dtype, a quantisation that does not fit the model, or a mesh
            that does not divide it.
        """
        check_jaxlib()
        dtype = checked_dtype(dtype)
        check_quantization(quantize, group_size)
        config = load_config(folder, "language_model", LanguageModelConfig)
        first = _host_mesh() if quantize else mesh  # the weights as they are may not fit where the quantised ones do
        model = load_model(folder, lambda rngs: Llama(config, rngs), dtype, first)
        if quantize:
            model = quantize_model(model, quantize, group_size, mesh)
        else:
            model.layers = unstack_layers(model.layers)
        texts = Path(folder) / TOKENIZER_FOLDER
        tokenizer = TextTokenizer.from_folder(texts, recorded_chat_date(folder)) if texts.is_dir() else None
        return cls(model, config, tokenizer, read_json(Path(folder) / PROVENANCE), mesh)

    @property
    def arrays(self) -> dict[str, Any]:
        """The parameters as they were loaded, a nested dictionary; those in few bits are ``QuantizedKernel``."""
        return self._model.state()

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
        return hosts.whole_array(_all_logits(self._model, tokens))[:B, :T]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        seed: int | Sequence[int] = 0,
        stop_ids: Sequence[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Continues every prompt. A row's answer does not depend on the other rows.

        Args:
          prompts: token ids, one list a row, of any lengths from 1 on.
          max_new_tokens: the most tokens a row gets; a row also ends when the model's context is full.
          sampling: how tokens are chosen, for all rows or for each; greedy by default.
          seed: of each row's draws; a single one stands for itself, itself + 1, … of row 0, row 1, …
          stop_ids: tokens that end a row; None takes the model's own.
          on_token: called with the row's number and the token as soon as a token is chosen. Costs a return to the host
            at every step.

        Returns:
          The new tokens of every row; the stop token, where one came, is the last.

        Raises:
          InputError: an empty prompt, an id out of range, a prompt as long as the model's context, a value out of range.
        """
        if on_token is None:
            decoding, sampler = self._prefill(prompts, max_new_tokens, sampling, seed, stop_ids)
            decoding = decoding_loop.run(self._model, sampler, decoding=decoding)
            rows = zip(hosts.whole_array(decoding.state.tokens).tolist(), hosts.whole_array(decoding.state.written))
            return [tokens[:written] for tokens, written in rows][: len(prompts)]
        answers: list[list[int]] = [[] for _ in prompts]
        for tokens in self._steps(prompts, max_new_tokens, sampling, seed, stop_ids):
            for row, token in tokens:
                answers[row].append(token)
                on_token(row, token)
        return answers

    def answer(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        max_new_tokens: int,
        *,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        seed: int | Sequence[int] = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> list[str]:
        """The next answer in each of several conversations, as text.

        Args:
          conversations: messages as ``text.chat.encode_chat`` takes them.
          max_new_tokens, sampling, seed: as for ``generate``.
          stop_ids: tokens that end an answer; None takes those that end one in a chat.

        Raises:
          InputError: no text tokenizer, or what ``encode_chat`` and ``generate`` refuse.
        """
        tokenizer = self.chat_tokenizer
        prompts = [encode_chat(tokenizer, messages, add_generation_prompt=True).ids for messages in conversations]
        stop_ids = self.chat_stop_ids(stop_ids)
        answers = self.generate(prompts, max_new_tokens, sampling=sampling, seed=seed, stop_ids=stop_ids)
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
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[int]:
        """As ``generate`` for one prompt, a token at a time as they are chosen."""
        for tokens in self._steps([prompt], max_new_tokens, sampling, seed, stop_ids):
            yield tokens[0][1]

    def _steps(self, prompts, max_new_tokens, sampling, seed, stop_ids) -> Iterator[list[tuple[int, int]]]:
        """At every step, (row, token) of the rows that were not finished before it."""
        decoding, sampler = self._prefill(prompts, max_new_tokens, sampling, seed, stop_ids)
        written, active = decoding_loop.newest(decoding), list(range(len(prompts)))
        while active:
            decoding = decoding_loop.step(self._model, sampler, decoding=decoding)  # under way while the last one is read
            following = decoding_loop.newest(decoding)
            tokens, finished = map(hosts.whole_array, written)
            yield [(row, int(tokens[row])) for row in active]
            active, written = [row for row in active if not finished[row]], following

    def _prefill(self, prompts, max_new_tokens, sampling, seed, stop_ids) -> tuple[Decoding, Sampler]:
        prompts = [list(prompt) for prompt in prompts]
        self._check_prompts(prompts)
        context = self.config.llama.max_position_embeddings
        longest = max(map(len, prompts))
        if longest >= context:
            raise InputError(f"prompt of {longest} tokens found, the model's context is {context}; shorten the conversation")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens {max_new_tokens} found, expected at least 1")
        tokens, lengths = _padded(prompts)
        R = len(tokens)
        # Rows that only fill the batch up have no token to give.
        limits = np.where(np.arange(R) < len(prompts), np.minimum(max_new_tokens, context - lengths), 0)
        stops = _stops(self.config.eos_token_ids if stop_ids is None else stop_ids)
        sampler = Sampler(
            sampling=_sampling_of_rows(sampling, len(prompts), R),
            keys=_keys(_seeds(seed, len(prompts), R)),
            limits=limits.astype(np.int32),
            stop_ids=np.broadcast_to(stops, (R, len(stops))),
        )
        cache_length = _bucket(int((lengths + limits).max()))
        return decoding_loop.prefill(self._model, tokens, lengths, sampler, cache_length=cache_length), sampler

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


@jit_model()
def _all_logits(model: Llama, tokens: jax.Array) -> jax.Array:
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


def _sampling_of_rows(sampling: Sampling | Sequence[Sampling], prompts: int, rows: int) -> Sampling:
    """Checked, of each row; rows without a prompt are greedy."""
    each = [sampling] * prompts if isinstance(sampling, Sampling) else list(sampling)
    if len(each) != prompts:
        raise InputError(f"{len(each)} samplings found for {prompts} prompts, expected one for all or one for each")
    return stacked([*map(checked, each), *[GREEDY] * (rows - prompts)])


def _seeds(seed: int | Sequence[int], prompts: int, rows: int) -> np.ndarray:
    """uint32 [rows], checked."""
    single = isinstance(seed, int | np.integer)
    given = [int(seed)] if single else [int(each) for each in seed]
    for each in given:
        check_seed(each)
    if not single and len(given) != prompts:
        raise InputError(f"{len(given)} seeds found for {prompts} prompts, expected one for all or one for each")
    of_prompts = [(given[0] + number) % SEEDS for number in range(prompts)] if single else given
    return np.array([*of_prompts, *[0] * (rows - prompts)], np.uint32)


@jax.jit
def _keys(seeds: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.key)(seeds)
