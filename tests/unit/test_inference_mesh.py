"""Models that several devices hold together answer as on one device."""

import dataclasses

import jax
import numpy as np
import pytest
import test_generation
import test_speech_tokenizer
from flax import nnx
from flax.traverse_util import flatten_dict
from reference_weights import filled
from test_speech_tokenizer import noise

from ichigo_jax.errors import InputError
from ichigo_jax.inference.language_model import LanguageModel
from ichigo_jax.inference.speech_tokenizer import SpeechTokenizer
from ichigo_jax.models.llama import Llama
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerModel
from ichigo_jax.parallel import make_mesh
from ichigo_jax.storage.model_folder import save_model
from ichigo_jax.text.train_tokenizer import train_whisper_tokenizer

MESHES = [{"fsdp": 8}, {"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
PROMPTS = [*test_generation.PROMPTS, [9, 4]]
CONFIG = dataclasses.replace(test_generation.CONFIG, eos_token_ids=(13,))


@pytest.fixture(scope="module", params=MESHES, ids=lambda sizes: "-".join(f"{name}{size}" for name, size in sizes.items()))
def mesh(request):
    return make_mesh(request.param)


@pytest.fixture(scope="module")
def language_model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language_model") / "model"
    save_model(folder, "language_model", CONFIG, nnx.to_pure_dict(nnx.state(Llama(CONFIG, nnx.Rngs(0)))), {}, None)
    return folder


@pytest.fixture(scope="module")
def speech_tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech_tokenizer")
    train_whisper_tokenizer(["turn on the light", "what is two plus two"], folder / "text", 270)
    config = test_speech_tokenizer.NANO
    state = nnx.to_pure_dict(nnx.state(filled(lambda rngs: SpeechTokenizerModel(config, rngs))))
    save_model(folder / "model", "speech_tokenizer", config, state, {}, folder / "text")
    return folder / "model"


def bytes_on(arrays, device):
    """What of a model's arrays lies on one device."""
    shards = [shard for array in jax.tree.leaves(arrays) for shard in array.addressable_shards if shard.device == device]
    return sum(shard.data.nbytes for shard in shards)


def check_layout(arrays, mesh):
    assert all(array.sharding.device_set == set(mesh.devices.flat) for array in jax.tree.leaves(arrays))
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    whole = sum(array.nbytes for array in jax.tree.leaves(arrays))
    matrices = sum(array.nbytes for path, array in flatten_dict(arrays).items() if "norm" not in str(path) and array.ndim > 1)
    for device in mesh.devices.flat:
        assert bytes_on(arrays, device) <= whole - matrices + matrices / parts * 1.01


def test_answers_of_a_language_model(language_model_folder, mesh):
    alone = LanguageModel.from_pretrained(language_model_folder)
    together = LanguageModel.from_pretrained(language_model_folder, mesh=mesh)
    check_layout(together.arrays, mesh)
    for prompts in (PROMPTS, PROMPTS[:1]):
        expected = alone.generate(prompts, 10)
        assert together.generate(prompts, 10) == expected
        assert together.generate(prompts, 10, on_token=lambda row, token: None) == expected
    np.testing.assert_allclose(together.logits([PROMPTS[1]]), alone.logits([PROMPTS[1]]), atol=2e-4)
    assert jax.sharding.get_abstract_mesh().empty, "the caller's own mesh is left as it was"


@pytest.mark.parametrize("sizes, quantize, group_size", [(MESHES[0], "int4", 8), (MESHES[2], "int8", None)])
def test_answers_of_a_language_model_in_few_bits(language_model_folder, sizes, quantize, group_size):
    mesh = make_mesh(sizes)
    alone = LanguageModel.from_pretrained(language_model_folder, quantize=quantize, group_size=group_size)
    together = LanguageModel.from_pretrained(language_model_folder, quantize=quantize, group_size=group_size, mesh=mesh)
    assert together.generate(PROMPTS, 8) == alone.generate(PROMPTS, 8)
    for name in ("q", "o"):
        values = together.arrays["layers"]["attention"][name].values
        shard = values.sharding.shard_shape(values.shape)
        assert values.size == np.prod(shard) * mesh.shape["fsdp"] * mesh.shape["tensor"], f"{name}: {shard} on each device"


def test_codes_and_words_of_a_speech_tokenizer(speech_tokenizer_folder, mesh):
    alone = SpeechTokenizer.from_pretrained(speech_tokenizer_folder, batch_size=8)
    together = SpeechTokenizer.from_pretrained(speech_tokenizer_folder, batch_size=8, mesh=mesh)
    assert all(array.sharding.device_set == set(mesh.devices.flat) for array in jax.tree.leaves(together.arrays))
    clips = [noise(seed, length) for seed, length in enumerate([12_800, 700, 5000, 30_000, 9999])]
    for expected, found in zip(alone.encode(clips), together.encode(clips), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert together.transcribe(clips) == alone.transcribe(clips)
    states = [each.dequantize([codes[:20] for codes in alone.encode(clips[:3])]) for each in (alone, together)]
    np.testing.assert_allclose(*states, atol=1e-4)
    assert together.fingerprint == alone.fingerprint


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}])
def test_a_mesh_that_does_not_divide_the_model_is_refused(language_model_folder, options):
    with pytest.raises(InputError, match="axis 'kv_heads' of size 2 cannot be split over 8 devices"):
        LanguageModel.from_pretrained(language_model_folder, mesh=make_mesh({"tensor": 8}), **options)
