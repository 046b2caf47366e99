"""The log-mel of a batch against ``whisper.log_mel_spectrogram`` of each clip alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ichigo_jax.audio.log_mel import HOP, PAD_VALUE, _mel_filters, frame_count, log_mel
from ichigo_jax.parallel import batch_sharding, make_mesh

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def whisper():
    pytest.importorskip("torch")
    return pytest.importorskip("whisper")


def speech_like(length, seed=0):
    """Buzzing vowels with pauses and noise: a wide range of loudness, as speech has."""
    rng = np.random.default_rng(seed)
    time = np.arange(length) / 16000
    buzz = sum(np.sin(2 * np.pi * 120 * k * time + k) / k for k in range(1, 30))
    return (0.1 * buzz * np.clip(np.sin(7 * time), 0, 1) + rng.normal(0, 1e-3, length)).astype(np.float32)


def batch(*clips):
    """Clips side by side, filled up with what must not matter."""
    longest = max(len(clip) for clip in clips)
    samples = np.stack([np.pad(clip, (0, longest - len(clip)), constant_values=9.0) for clip in clips])
    return jnp.asarray(samples), jnp.asarray([len(clip) for clip in clips], jnp.int32)


def reference(whisper, clip, mels):
    return whisper.log_mel_spectrogram(clip, n_mels=mels).numpy().T


def assert_matches(whisper, clips, mels, frames):
    found = np.asarray(log_mel(*batch(*clips), mels=mels, frames=frames))
    assert found.shape == (len(clips), frames, mels) and found.dtype == np.float32
    for row, clip in zip(found, clips):
        expected = reference(whisper, clip, mels)
        count = min(frame_count(len(clip)), frames)
        assert frame_count(len(clip)) == len(expected)
        np.testing.assert_allclose(row[:count], expected[:count], atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(row[count:], PAD_VALUE)


@pytest.mark.parametrize("mels", [80, 128])
def test_filters_are_those_that_whisper_ships(whisper, mels):
    expected = whisper.audio.mel_filters("cpu", mels).numpy()
    np.testing.assert_allclose(_mel_filters(mels).T, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mels", [80, 128])
def test_each_clip_of_a_batch_as_if_alone(whisper, mels):
    lengths = [16000, 15999, 12345, 1600, 401, 400, 399, 201]  # around every edge of a frame and a window
    clips = [speech_like(length, seed) * 10.0 ** -(seed % 4) for seed, length in enumerate(lengths)]
    assert_matches(whisper, clips, mels, frames=120)


def test_sounds_of_every_sort(whisper):
    time = np.arange(16000) / 16000
    noise = np.random.default_rng(1).normal(0, 0.1, 16000)
    burst = np.where(time < 0.3, noise, 0.0)  # then digital silence
    click = np.where(time == time[-1], 0.9, 0.0)  # loudest in the frame that is dropped
    clips = [
        noise,
        burst,
        click,
        0.5 * np.sin(2 * np.pi * 440 * time),
        0.1 + speech_like(16000),
        np.full(16000, 0.3),
        np.sign(noise),
    ]
    assert_matches(whisper, [clip.astype(np.float32) for clip in clips], mels=80, frames=110)


def test_silence_is_the_pad_value(whisper):
    assert_matches(whisper, [np.zeros(1600, np.float32)], mels=80, frames=12)
    np.testing.assert_array_equal(log_mel(*batch(np.zeros(1600, np.float32)), mels=80, frames=12), PAD_VALUE)


def test_clips_with_more_frames_are_cut(whisper):
    clip = speech_like(16000)
    clip[12000:] *= 100  # what is cut off still sets the level of the rest
    assert_matches(whisper, [clip, clip[:8000]], mels=80, frames=60)


def test_clips_too_short_to_reflect_are_zero_padded(whisper):
    clips = [speech_like(200, 1), speech_like(160, 2), speech_like(159, 3), speech_like(1, 4)]
    found = np.asarray(log_mel(*batch(*clips), mels=80, frames=3))
    for row, clip in zip(found[:2], clips):
        expected = reference(whisper, np.pad(clip, (0, 201 - len(clip))), 80)
        np.testing.assert_allclose(row[:1], expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(found[:2, 1:], PAD_VALUE)
    np.testing.assert_array_equal(found[2:], PAD_VALUE)  # less than a hop: no frame


def test_frames_do_not_depend_on_the_room_after_the_clip():
    clip = speech_like(8000)
    alone = log_mel(jnp.asarray(clip)[None], jnp.asarray([8000]), mels=80, frames=50)
    roomy = log_mel(jnp.pad(jnp.asarray(clip)[None], ((0, 0), (0, 9000))), jnp.asarray([8000]), mels=80, frames=90)
    np.testing.assert_allclose(roomy[:, :50], alone, atol=TOLERANCE, rtol=0)  # other shapes, other order of sums
    np.testing.assert_array_equal(roomy[:, 50:], PAD_VALUE)


def test_a_sharded_batch_stays_where_it_is():
    mesh = make_mesh({"data": 8})
    samples, lengths = batch(*[speech_like(1600 + 160 * seed, seed) for seed in range(8)])
    whole = log_mel(samples, lengths, mels=80, frames=2600 // HOP)
    sharded = jax.device_put((samples, lengths), batch_sharding(mesh))
    program = log_mel.lower(*sharded, mels=80, frames=2600 // HOP).compile().as_text()
    assert not any(collective in program for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    np.testing.assert_allclose(log_mel(*sharded, mels=80, frames=2600 // HOP), whole, atol=1e-5, rtol=0)
