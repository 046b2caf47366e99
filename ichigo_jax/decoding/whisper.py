"""The decoding loop for Whisper's decoder, compiled: states of a batch of clips in, answers out.

They follow ``whisper.decoding`` (Radford et al. 2022, https://arxiv.org/abs/2212.04356) token by token, for a batch of clips.
Axis letters beside the usual ones: G answers to a clip, P tokens of the prompt, S tokens of an answer.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ichigo_jax.decoding import loop
from ichigo_jax.decoding.beam_search import BeamSearch
from ichigo_jax.decoding.sampling import Sampler, Sampling, empty_rows
from ichigo_jax.models.kv_cache import Caches, KVCache
from ichigo_jax.models.split import jit_model
from ichigo_jax.models.whisper import TextDecoder


class ClipDecoder(NamedTuple):
    """A ``loop.Decoder``: Whisper's decoder while it looks at the states of a batch of clips.

    Attributes:
      decoder: the weights.
      cross: keys and values of the states, from ``TextDecoder.prefill_cross``.
    """

    decoder: TextDecoder
    cross: KVCache

    def init_cache(self, batch: int, length: int) -> Caches:
        return self.decoder.init_cache(batch, length)

    def decode(
        self, tokens: jax.Array, positions: jax.Array, cache: Caches, wanted: jax.Array | None = None
    ) -> tuple[jax.Array, Caches]:
        return self.decoder.decode(tokens, positions, self.cross, cache, wanted)


class Start(NamedTuple):
    """What every answer starts from.

    Attributes:
      states: [B, T, D], the encoder's or the quantiser's.
      prompt: int32 [B, P].
      end: int32 scalar, the token that ends an answer.
      no_speech: int32 scalar, the token for "no speech".
      never: bool [V], tokens that no answer has.
      never_first: bool [V], tokens that no answer begins with.
      active: bool [B]; the other clips only fill the batch up and are finished from the start.
    """

    states: jax.Array
    prompt: jax.Array
    end: jax.Array
    no_speech: jax.Array
    never: jax.Array
    never_first: jax.Array
    active: jax.Array


class Answers(NamedTuple):
    """What was found.

    Attributes:
      tokens: int32 [B, G, S], filled with the end token after an answer.
      logprobs: float32 [B, G], of each answer's tokens and its end, where it has one; -inf: no answer.
      no_speech: float32 [B], probability of the "no speech" token.
    """

    tokens: jax.Array
    logprobs: jax.Array
    no_speech: jax.Array


@jit_model()
def language_logits(decoder: TextDecoder, states: jax.Array, start: jax.Array, languages: jax.Array) -> jax.Array:
    """How likely each language is, judged by the decoder's first step.

    Args:
      decoder: of Whisper.
      states: [B, T, D].
      start: int32 scalar, the token that starts a transcript.
      languages: int32 [n], the languages' tokens.

    Returns:
      float32 [B, n].
    """
    tokens = jnp.full((len(states), 1), start)
    logits, _ = loop.read_prompts(ClipDecoder(decoder, decoder.prefill_cross(states)), tokens, 1, jnp.zeros_like(tokens))
    return logits[:, 0, languages]


@jit_model(static=("group", "longest", "no_speech_at"))
def sample(
    decoder: TextDecoder,
    start: Start,
    temperature: jax.Array,
    seeds: jax.Array,
    attempt: jax.Array,
    *,
    group: int,
    longest: int,
    no_speech_at: int,
) -> Answers:
    """The likeliest token at every step, or a random one, until every answer has ended.

    Args:
      decoder: of Whisper.
      start: see there.
      temperature: float32 scalar; 0 takes the likeliest.
      seeds: uint32 [B]; a clip's draws depend on its own seed and on ``attempt`` alone.
      attempt: uint32 scalar, how often these clips were decoded before.
      group: G.
      longest: S; P + S - 1 is at most ``n_text_ctx``, as the last token is not read.
      no_speech_at: index in the prompt after which "no speech" is asked for.
    """
    B, R = len(start.prompt), len(start.prompt) * group
    attempt_key = jax.random.fold_in(jax.random.key(0), attempt)
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.fold_in(attempt_key, seed), group))(seeds).reshape(R)
    every = lambda value, dtype: jnp.full(R, value, dtype)  # noqa: E731
    sampler = Sampler(
        sampling=Sampling(
            temperature=every(temperature, jnp.float32),
            top_k=every(0, jnp.int32),
            top_p=every(1, jnp.float32),
            min_p=every(0, jnp.float32),
            repetition_penalty=every(1, jnp.float32),
        ),
        keys=keys,
        limits=every(longest, jnp.int32),
        stop_ids=every(start.end, jnp.int32)[:, None],
        never=start.never,
        never_first=start.never_first,
    )
    rows = empty_rows(jnp.repeat(~start.active, group), longest, start.end, seen=None)
    rows, no_speech = _decode(decoder, start, sampler, rows, group, longest, no_speech_at)
    return Answers(rows.tokens.reshape(B, group, longest), rows.logprobs.reshape(B, group), no_speech)


@jit_model(static=("group", "candidates", "longest", "no_speech_at"))
def beam_search(
    decoder: TextDecoder, start: Start, *, group: int, candidates: int, longest: int, no_speech_at: int
) -> Answers:  # fmt: skip
    """The ``group`` likeliest beginnings at every step, until ``candidates`` answers have ended for every clip.

    Arguments as ``sample``. Answers are ordered as ``BeamSearch.answers`` says.
    """
    search = BeamSearch(start.end, start.never, start.never_first)
    beams = search.initial_state(start.active, group, candidates, longest)
    beams, no_speech = _decode(decoder, start, search, beams, group, longest, no_speech_at)
    return Answers(*search.answers(beams), no_speech)


def _decode(
    decoder: TextDecoder,
    start: Start,
    selector: loop.Selector,
    state,
    group: int,
    longest: int,
    no_speech_at: int,
):
    """The selector's last state, and the probability of "no speech" [B]."""
    clips = ClipDecoder(decoder, decoder.prefill_cross(start.states))
    B, P = start.prompt.shape
    wanted = jnp.broadcast_to(jnp.array([no_speech_at, P - 1]), (B, 2))
    logits, cache = loop.read_prompts(clips, start.prompt, P + longest - 1, wanted)
    no_speech = jax.nn.softmax(logits[:, 0])[:, start.no_speech]
    first = loop.begin(selector, state, logits[:, 1], jnp.full(B, P), cache, group)
    return loop.run(clips, selector, first).state, no_speech
