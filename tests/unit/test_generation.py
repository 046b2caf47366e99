"""Sampling, batched generation, the language model as users call it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ichigo_jax.decoding import language_model as decoding_loop
from ichigo_jax.decoding.sampling import (
    Sampling,
    checked,
    choose,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    stacked,
)
from ichigo_jax.errors import InputError
from ichigo_jax.inference.language_model import LanguageModel
from ichigo_jax.models.llama import LanguageModelConfig, Llama, LlamaConfig, RopeScaling
from ichigo_jax.models.stack import unstack_layers
from ichigo_jax.storage.model_folder import save_model
from ichigo_jax.text import TextTokenizer, train_llama_tokenizer
from ichigo_jax.vocab import SoundVocabulary

V = 61
LLAMA = LlamaConfig(
    architecture="llama",
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16),
    tie_word_embeddings=False,
    attention_bias=False,
    initializer_range=0.5,  # large, so that greedy answers wander
)
CONFIG = LanguageModelConfig(llama=LLAMA, sound=None, eos_token_ids=(), padded_vocab_size=64)
PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(20, 40)), [3, 1, 2]]


@pytest.fixture(scope="module")
def model():
    return Llama(CONFIG, nnx.Rngs(0))


@pytest.fixture(scope="module")
def language_model(model):
    return LanguageModel(model, CONFIG, tokenizer=None)


def keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def greedy_by_logits(language_model, prompt, steps):
    """The slow and obvious way: the whole sequence anew for every token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(language_model.logits([ids])[0, -1].argmax()))
    return ids[len(prompt) :]


class TestSampling:
    ROW = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))

    def kept(self, logits):
        return np.isfinite(np.asarray(logits))[0].tolist()

    def test_top_k(self):
        assert self.kept(keep_top_k(self.ROW, 2)) == [True, True, False, False]
        assert self.kept(keep_top_k(self.ROW, 0)) == [True] * 4
        assert self.kept(keep_top_k(self.ROW, 9)) == [True] * 4

    def test_top_p(self):
        assert self.kept(keep_top_p(self.ROW, 0.4)) == [True, False, False, False]
        assert self.kept(keep_top_p(self.ROW, 0.6)) == [True, True, False, False]
        assert self.kept(keep_top_p(self.ROW, 0.89)) == [True, True, True, False]
        assert self.kept(keep_top_p(self.ROW, 1.0)) == [True] * 4
        assert self.kept(keep_top_p(self.ROW[:, ::-1], 0.6)) == [False, False, True, True]

    def test_min_p(self):
        assert self.kept(keep_min_p(self.ROW, 0.4)) == [True, True, False, False]
        assert self.kept(keep_min_p(self.ROW, 0.0)) == [True] * 4

    def test_repetition_penalty(self):
        logits = jnp.array([[2.0, -2.0, 1.0]])
        out = penalise_repetition(logits, jnp.array([[True, True, False]]), 2.0)
        np.testing.assert_array_equal(out, [[1.0, -4.0, 1.0]])

    def test_filters_equal_transformers(self):
        torch = pytest.importorskip("torch")
        process = pytest.importorskip("transformers.generation.logits_process")
        logits = np.random.default_rng(0).normal(0, 3, (5, 40)).astype(np.float32)
        pairs = [
            (process.TopKLogitsWarper(7), keep_top_k(logits, 7)),
            (process.TopPLogitsWarper(0.8), keep_top_p(logits, 0.8)),
            (process.MinPLogitsWarper(0.1), keep_min_p(logits, 0.1)),
        ]
        for theirs, ours in pairs:
            np.testing.assert_array_equal(theirs(None, torch.tensor(logits)).numpy(), ours)
        ids = np.random.default_rng(1).integers(0, 40, (5, 6))
        seen = np.zeros((5, 40), bool)
        np.put_along_axis(seen, ids, True, axis=1)
        theirs = process.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(ids), torch.tensor(logits)).numpy()
        np.testing.assert_allclose(theirs, penalise_repetition(logits, seen, 1.3), atol=1e-6)

    def test_temperature_zero_is_greedy(self):
        logits = jax.random.normal(jax.random.key(0), (3, 20))
        tokens = choose(logits, jnp.zeros((3, 20), bool), stacked([Sampling()] * 3), keys(3))
        np.testing.assert_array_equal(tokens, logits.argmax(-1))

    def test_draws_follow_the_distribution(self):
        """Probabilities 0.5, 0.25, 0.15, 0.1 at temperature 2 are as their square roots; the last is cut by top-k."""
        rows = 20_000
        logits = jnp.broadcast_to(self.ROW, (rows, 4))
        sampling = stacked([Sampling(temperature=2.0, top_k=3)] * rows)
        tokens = np.asarray(choose(logits, jnp.zeros((rows, 4), bool), sampling, keys(rows)))
        expected = np.sqrt([0.5, 0.25, 0.15, 0.0])
        np.testing.assert_allclose(np.bincount(tokens, minlength=4) / rows, expected / expected.sum(), atol=0.015)

    def test_seeded_and_the_same_in_a_larger_batch(self):
        logits = jax.random.normal(jax.random.key(0), (8, 50))
        draw = lambda n, seed: choose(logits[:n], None, stacked([Sampling(1.0)] * n), keys(n, seed))  # noqa: E731
        np.testing.assert_array_equal(draw(8, 4)[:3], draw(3, 4))
        assert (draw(8, 4) != draw(8, 5)).any()

    def test_every_row_has_options_of_its_own(self):
        logits = jnp.broadcast_to(self.ROW[:, ::-1], (4000, 4))  # the likeliest is the last
        each = [Sampling(), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.6), Sampling(5.0, min_p=0.9)] * 1000
        tokens = np.asarray(choose(logits, None, stacked(each), keys(4000)))
        found = [set(tokens[row::4].tolist()) for row in range(4)]
        assert found[0] == {3} and found[1] == found[2] == {2, 3}
        # (0.5, 0.25, 0.15, 0.1) ** (1 / 5): the second is 0.87 times as likely as the first
        assert found[3] == {3}

    @pytest.mark.parametrize(
        "wrong",
        [
            {"temperature": -1},
            {"temperature": float("nan")},
            {"top_k": -1},
            {"top_p": 0},
            {"min_p": 2},
            {"repetition_penalty": 0},
        ],
    )
    def test_values_out_of_range_are_refused(self, wrong):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} .* found, expected"):
            checked(Sampling(**wrong))


class TestGenerate:
    def test_greedy_equals_transformers(self, model):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        reference = transformers_llama(torch, transformers, model)
        language_model = LanguageModel(model, dataclasses.replace(CONFIG, eos_token_ids=(13,)), tokenizer=None)
        for prompt in PROMPTS:
            for penalty in (1.0, 1.5):
                theirs = reference.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=12,
                    do_sample=False,
                    eos_token_id=13,
                    pad_token_id=0,
                    repetition_penalty=penalty,
                )[0, len(prompt) :].tolist()
                assert language_model.generate([prompt], 12, sampling=Sampling(repetition_penalty=penalty)) == [theirs]

    def test_greedy_equals_the_argmax_of_logits(self, language_model):
        assert language_model.generate(PROMPTS[1:2], 6) == [greedy_by_logits(language_model, PROMPTS[1], 6)]

    def test_layers_apart_answer_as_stacked_ones(self, language_model):
        apart = Llama(CONFIG, nnx.Rngs(0))
        apart.layers = unstack_layers(apart.layers)
        apart = LanguageModel(apart, CONFIG, tokenizer=None)
        np.testing.assert_allclose(apart.logits(PROMPTS[2:3]), language_model.logits(PROMPTS[2:3]), atol=1e-5)
        assert apart.generate(PROMPTS, 10) == language_model.generate(PROMPTS, 10)
        assert list(apart.stream(PROMPTS[1], 10)) == language_model.generate(PROMPTS[1:2], 10)[0]

    def test_a_batch_equals_one_by_one(self, language_model):
        together = language_model.generate(PROMPTS, 10)
        assert together == [language_model.generate([prompt], 10)[0] for prompt in PROMPTS]
        assert len({tuple(answer) for answer in together}) == len(PROMPTS)

    def test_stops_at_a_stop_token_row_by_row(self, language_model):
        free = language_model.generate(PROMPTS, 10)
        stop = free[1][3]
        stopped = language_model.generate(PROMPTS, 10, stop_ids=[stop])
        for whole, cut in zip(free, stopped):
            assert cut == (whole[: whole.index(stop) + 1] if stop in whole else whole)
        assert len(stopped[1]) <= 4

    def test_stops_at_the_models_own_end(self, model, language_model):
        end = language_model.generate(PROMPTS[:1], 5)[0][2]
        other = LanguageModel(model, dataclasses.replace(CONFIG, eos_token_ids=(end,)), None)
        assert other.generate(PROMPTS[:1], 5)[0][-1] == end and len(other.generate(PROMPTS[:1], 5)[0]) <= 3
        assert len(other.generate(PROMPTS[:1], 5, stop_ids=[])[0]) == 5

    @pytest.mark.parametrize("options", [{}, {"sampling": Sampling(temperature=1.0, top_p=0.9), "seed": 3}])
    def test_callback_and_stream_see_the_same_tokens(self, language_model, options):
        stop_ids = [language_model.generate(PROMPTS, 8)[0][2]]
        expected = language_model.generate(PROMPTS, 8, stop_ids=stop_ids, **options)
        seen = [[] for _ in PROMPTS]
        returned = language_model.generate(
            PROMPTS, 8, stop_ids=stop_ids, on_token=lambda row, token: seen[row].append(token), **options
        )
        assert returned == seen == expected
        assert list(language_model.stream(PROMPTS[0], 8, stop_ids=stop_ids, **options)) == expected[0]

    def test_seed(self, language_model):
        draw = lambda seed: language_model.generate(PROMPTS, 8, sampling=Sampling(1.5), seed=seed)  # noqa: E731
        assert draw(1) == draw(1) != draw(2)

    def test_a_draw_depends_on_the_rows_own_seed_alone(self, language_model):
        together = language_model.generate(PROMPTS, 8, sampling=Sampling(1.5), seed=[5, 9, 5, 7])
        for prompt, seed, answer in zip(PROMPTS, [5, 9, 5, 7], together):
            assert language_model.generate([prompt], 8, sampling=Sampling(1.5), seed=seed) == [answer]
        assert language_model.generate(PROMPTS, 8, sampling=Sampling(1.5), seed=5)[1:2] == language_model.generate(
            PROMPTS[1:2], 8, sampling=Sampling(1.5), seed=6
        ), "row n of seed s is drawn with seed s + n"

    def test_every_row_has_options_of_its_own(self, language_model):
        each = [Sampling(), Sampling(2.0, top_k=5), Sampling(repetition_penalty=1.5), Sampling(1.0, min_p=0.1)]
        together = language_model.generate(PROMPTS, 8, sampling=each, seed=[1, 2, 3, 4])
        for prompt, sampling, seed, answer in zip(PROMPTS, each, [1, 2, 3, 4], together):
            assert language_model.generate([prompt], 8, sampling=sampling, seed=seed) == [answer]

    def test_every_step_draws_anew(self, language_model):
        answers = language_model.generate([[1]] * 4, 8, sampling=Sampling(1000.0))  # nearly uniform over the vocabulary
        assert all(len(set(answer)) > 4 for answer in answers) and answers[0] != answers[1]

    def test_ends_where_the_context_ends(self, language_model):
        short, long, *_ = language_model.generate([[1] * 3, [1] * 28, [1], [2]], 8)
        assert len(short) == 8 and len(long) == 4
        assert language_model.generate([[1] * 31], 1000)[0] == language_model.generate([[1] * 31], 1)[0]

    def test_compiles_once_for_a_bucket(self, language_model):
        language_model.generate([[1, 2, 3], [4], [5]], 6)
        programs = lambda: (decoding_loop.prefill.compiled_programs(), decoding_loop.run.compiled_programs())  # noqa: E731
        before = programs()
        language_model.generate([[1], [2, 3, 4, 5, 6, 7], [8], [9, 9]], 9, sampling=Sampling(0.7, top_k=5), seed=2)
        assert programs() == before

    @pytest.mark.parametrize(
        ("prompts", "options", "fault"),
        [
            ([[1, V]], {}, "prompt 0: token id 61 found, expected 0 to 60"),
            ([[1], [-1]], {}, "prompt 1: token id -1"),
            ([[1], []], {}, "at least one"),
            ([], {}, "at least one"),
            ([[1] * 32], {}, "context is 32"),
            ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0"),
            ([[1]], {"sampling": Sampling(top_p=7)}, "top_p 7"),
            ([[1]], {"seed": -1}, "seed -1 found, expected 0 to 4294967295"),
            ([[1]], {"seed": [1, 2]}, "2 seeds found for 1 prompts"),
            ([[1]], {"sampling": [Sampling()] * 2}, "2 samplings found for 1 prompts"),
        ],
    )
    def test_refusals(self, language_model, prompts, options, fault):
        with pytest.raises(InputError, match=fault):
            language_model.generate(prompts, **({"max_new_tokens": 4} | options))


class TestLanguageModel:
    def test_logits(self, model, language_model):
        ids = np.array([[1, 2, 3], [4, 5, 6]])
        logits = language_model.logits(ids)
        assert logits.shape == (2, 3, V) and logits.dtype == np.float32
        hidden, _ = model(jnp.asarray(ids), jnp.broadcast_to(jnp.arange(3), (2, 3)))
        np.testing.assert_allclose(logits, model.logits(hidden), atol=1e-5)

    @pytest.mark.parametrize(
        ("ids", "fault"),
        [([1, 2], "shape"), ([[1, 61]], "token id 61"), ([[1, 2], [3]], "lengths"), ([[1] * 33], "context"), ([[1.5]], "1.5")],
    )
    def test_logits_refuse(self, language_model, ids, fault):
        with pytest.raises(InputError, match=fault):
            language_model.logits(ids)

    def test_from_pretrained(self, tmp_path):
        model = save_tiny_model(tmp_path)
        config = model.config
        loaded = LanguageModel.from_pretrained(tmp_path / "model")
        assert loaded.config == config and loaded.provenance["speech_tokenizer_fingerprint"] == "f" * 16
        assert loaded.tokenizer.sound == config.sound
        expected = LanguageModel(model, config, None).logits([[1, 2, 3]])
        np.testing.assert_array_equal(loaded.logits([[1, 2, 3]]), expected)
        half = LanguageModel.from_pretrained(tmp_path / "model", dtype="bfloat16").logits([[1, 2, 3]])
        assert half.dtype == np.float32 and 0 < np.abs(half - expected).max() < 0.2 * np.abs(expected).max()

    @pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "half"])
    def test_other_dtypes_are_refused(self, tmp_path, dtype):
        with pytest.raises(InputError, match=f"dtype '{dtype}' found, expected float32 or bfloat16$"):
            LanguageModel.from_pretrained(tmp_path / "none", dtype)

    def test_a_tokenizer_that_does_not_fit_is_refused(self, tmp_path):
        config = save_tiny_model(tmp_path).config
        tokenizer = TextTokenizer.from_folder(tmp_path / "tokenizer")
        shapes = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
        small = dataclasses.replace(config, llama=dataclasses.replace(config.llama, vocab_size=tokenizer.size - 1), sound=None)
        with pytest.raises(InputError, match="ids found, the model has"):
            LanguageModel(shapes, small, tokenizer)
        with pytest.raises(InputError, match="sound tokens .* the model has None"):
            LanguageModel(shapes, dataclasses.replace(config, sound=None), tokenizer)


def save_tiny_model(folder) -> Llama:
    """A random model with four sound codes and a mask code at ``folder``/model."""
    train_llama_tokenizer(["turn on the light"], folder / "tokenizer", vocab_size=260, sound_codes=5, durations=False)
    tokenizer = TextTokenizer.from_folder(folder / "tokenizer")
    llama = dataclasses.replace(LLAMA, vocab_size=tokenizer.size, max_position_embeddings=128)
    config = LanguageModelConfig(llama, tokenizer.sound, tokenizer.eos_ids, padded_vocab_size=tokenizer.size + 3)
    assert config.sound == SoundVocabulary(tokenizer.size - 7, 5, False)
    model = Llama(config, nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(model))
    provenance = {"speech_tokenizer": "ears", "speech_tokenizer_fingerprint": "f" * 16}
    save_model(folder / "model", "language_model", config, state, provenance, folder / "tokenizer")
    return model


def transformers_llama(torch, transformers, model: Llama):
    """The same weights in ``transformers``."""
    scaling = dataclasses.asdict(LLAMA.rope_scaling)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=LLAMA.hidden_size,
            intermediate_size=LLAMA.intermediate_size,
            num_hidden_layers=LLAMA.num_hidden_layers,
            num_attention_heads=LLAMA.num_attention_heads,
            num_key_value_heads=LLAMA.num_key_value_heads,
            head_dim=LLAMA.head_dim,
            max_position_embeddings=LLAMA.max_position_embeddings,
            rms_norm_eps=LLAMA.rms_norm_eps,
            rope_parameters={"rope_type": "llama3", "rope_theta": LLAMA.rope_theta, **scaling},
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=None,
        )
    ).eval()
    tensor = lambda array: torch.tensor(np.asarray(array))  # noqa: E731
    flat = {
        "model.embed_tokens.weight": tensor(model.embedding[:V]),
        "model.norm.weight": tensor(model.norm.scale[...]),
        "lm_head.weight": tensor(model.lm_head[:, :V].T),
    }
    layers = model.layers
    for i in range(LLAMA.num_hidden_layers):
        name, attention, feed_forward = f"model.layers.{i}", layers.attention, layers.feed_forward
        D = LLAMA.hidden_size
        flat |= {
            f"{name}.input_layernorm.weight": tensor(layers.attention_norm.scale[i]),
            f"{name}.post_attention_layernorm.weight": tensor(layers.feed_forward_norm.scale[i]),
            f"{name}.self_attn.q_proj.weight": tensor(attention.q[i].reshape(D, -1).T),
            f"{name}.self_attn.k_proj.weight": tensor(attention.k[i].reshape(D, -1).T),
            f"{name}.self_attn.v_proj.weight": tensor(attention.v[i].reshape(D, -1).T),
            f"{name}.self_attn.o_proj.weight": tensor(attention.o[i].reshape(-1, D).T),
            f"{name}.mlp.gate_proj.weight": tensor(feed_forward.gate[i].T),
            f"{name}.mlp.up_proj.weight": tensor(feed_forward.up[i].T),
            f"{name}.mlp.down_proj.weight": tensor(feed_forward.down[i].T),
        }
    reference.load_state_dict(flat)
    return reference
