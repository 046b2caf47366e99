import itertools
import struct
import warnings

import numpy as np
import pytest
import soundfile

from ichigo_jax.audio.ahead import map_ahead
from ichigo_jax.audio.decode import SAMPLE_RATE, AudioError, check_clip, load_audio
from ichigo_jax.errors import InputError, command

HOUR = 3600.0
GIB = 1 << 30


def tone(seconds=0.5, rate=SAMPLE_RATE, hertz=440.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def load(path):
    return load_audio(path, HOUR, GIB)


def loudest_frequency(samples):
    return np.argmax(np.abs(np.fft.rfft(samples * np.hanning(len(samples))))) * SAMPLE_RATE / len(samples)


@pytest.mark.parametrize("subtype, step", [("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("FLOAT", 1e-7)])
def test_every_sample_width_gives_the_same_wave(tmp_path, subtype, step):
    soundfile.write(tmp_path / "clip.wav", tone(), SAMPLE_RATE, subtype=subtype)
    samples = load(tmp_path / "clip.wav")
    assert samples.dtype == np.float32 and samples.shape == (8000,)
    np.testing.assert_allclose(samples, tone(), atol=step)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_every_format(tmp_path, suffix):
    soundfile.write(tmp_path / f"clip.{suffix}", tone(1.0), SAMPLE_RATE)
    samples = load(tmp_path / f"clip.{suffix}")
    assert abs(len(samples) - SAMPLE_RATE) <= 2400  # mp3 pads
    assert loudest_frequency(samples) == pytest.approx(440, abs=2)
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 96000])
def test_other_rates_are_resampled(tmp_path, rate):
    soundfile.write(tmp_path / "clip.wav", tone(1.0, rate), rate, subtype="FLOAT")
    samples = load(tmp_path / "clip.wav")
    assert len(samples) == SAMPLE_RATE
    np.testing.assert_allclose(samples[1000:-1000], tone(1.0)[1000:-1000], atol=1e-3)


def test_resampling_does_not_fold_what_is_above_8_khz(tmp_path):
    soundfile.write(tmp_path / "clip.wav", tone(1.0, 96000, hertz=15000), 96000, subtype="FLOAT")
    assert np.abs(load(tmp_path / "clip.wav")[1000:-1000]).max() < 1e-3


def test_seven_channels_are_averaged(tmp_path):
    channels = np.arange(7)[None] / 10 * np.ones((100, 1))
    soundfile.write(tmp_path / "clip.wav", channels, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(load(tmp_path / "clip.wav"), np.full(100, 0.3), atol=1e-6)


def test_a_constant_offset_stays(tmp_path):
    soundfile.write(tmp_path / "clip.wav", np.full(100, 0.25), SAMPLE_RATE)
    np.testing.assert_array_equal(load(tmp_path / "clip.wav"), np.full(100, 0.25, np.float32))


def test_float_files_above_full_scale_are_not_clipped(tmp_path):
    soundfile.write(tmp_path / "clip.wav", 3 * tone(), SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(load(tmp_path / "clip.wav"), 3 * tone(), atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44100])
def test_samples_that_are_not_finite_are_refused(tmp_path, value, rate):
    samples = tone(rate=rate)
    samples[100] = value
    soundfile.write(tmp_path / "clip.wav", samples, rate, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"clip\.wav: found 1 samples that are NaN or infinite"):
        load(tmp_path / "clip.wav")


def test_a_file_of_no_length_is_refused(tmp_path):
    soundfile.write(tmp_path / "clip.wav", np.zeros(0), SAMPLE_RATE)
    with pytest.raises(AudioError, match=r"clip\.wav: found no samples"):
        load(tmp_path / "clip.wav")


@pytest.mark.parametrize(
    "name, content", [("clip.wav", b""), ("clip.mp3", b"hello"), ("clip.flac", bytes(1000)), ("clip.raw", b"1")]
)
def test_what_is_not_audio_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError, match=rf"{name}: found no audio that can be decoded .*, expected wav, flac, mp3 or ogg"):
        load(tmp_path / name)


def test_what_is_not_a_file_is_refused(tmp_path):
    with pytest.raises(AudioError, match="gone.wav: no such file"):
        load(tmp_path / "gone.wav")
    with pytest.raises(AudioError, match="found a folder"):
        load(tmp_path)
    with pytest.raises(AudioError, match="/dev/null: found something else"):
        load("/dev/null")
    with pytest.raises(AudioError, match="xx: cannot be read .File name too long., expected an audio file"):
        load(tmp_path / ("x" * 300))
    with pytest.raises(AudioError, match=r"clip.wav/one: cannot be read \(Not a directory\)"):
        (tmp_path / "clip.wav").touch()
        load(tmp_path / "clip.wav" / "one")
    with pytest.raises(AudioError, match="cannot be read .embedded null byte"):
        load("a\0b.wav")
    assert issubclass(AudioError, InputError)


def test_long_audio_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "clip.wav", tone(1.5), SAMPLE_RATE)
    assert len(load_audio(tmp_path / "clip.wav", 1.5, GIB)) == 24000
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **kwargs: pytest.fail("decoded"))
    with pytest.raises(AudioError, match=r"clip\.wav: found 1\.5 s of audio, expected at most 1\.4 s"):
        load_audio(tmp_path / "clip.wav", 1.4, GIB)


@pytest.mark.parametrize("rate, channels, size", [(SAMPLE_RATE, 7, 7 * 4 * 16000), (8000, 1, 4 * 16000)])
def test_decoded_bytes_are_bounded_over_all_channels_and_after_resampling(tmp_path, rate, channels, size):
    soundfile.write(tmp_path / "clip.flac", np.zeros((rate, channels)), rate)
    assert len(load_audio(tmp_path / "clip.flac", HOUR, size)) == SAMPLE_RATE
    with pytest.raises(AudioError, match=rf"clip\.flac: found {size} bytes once decoded, expected at most {size - 1}"):
        load_audio(tmp_path / "clip.flac", HOUR, size - 1)


@pytest.mark.parametrize("max_seconds, max_bytes, fault", [(5.0, GIB, "at most 5 s"), (HOUR, 10**6, "at most 1000000;")])
def test_more_audio_than_the_header_announces_is_bounded_as_well(tmp_path, monkeypatch, max_seconds, max_bytes, fault):
    soundfile.write(tmp_path / "clip.wav", tone(), SAMPLE_RATE)
    endless = itertools.repeat(np.zeros((1 << 16, 1), np.float32), 100)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **kwargs: next(endless))
    with pytest.raises(AudioError, match=f"clip.wav: .* expected {fault}"):
        load_audio(tmp_path / "clip.wav", max_seconds, max_bytes)


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_a_file_that_is_cut_short_is_refused(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 64000), SAMPLE_RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=rf"clip\.{suffix}: found .*(cut short|no audio)"):
        load(path)


@pytest.mark.parametrize("suffix", ["flac", "mp3", "ogg"])
def test_sound_after_the_end_that_the_header_announces_is_not_lost(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 64000), SAMPLE_RATE)
    once = load(path)
    path.write_bytes(2 * path.read_bytes())
    np.testing.assert_array_equal(load(path), np.concatenate([once, once]))


def test_an_mp3_with_a_tag_at_its_end(tmp_path):
    soundfile.write(tmp_path / "clip.mp3", tone(1.0), SAMPLE_RATE)
    samples = load(tmp_path / "clip.mp3")
    with (tmp_path / "clip.mp3").open("ab") as file:
        file.write(b"TAG" + bytes(125))
    np.testing.assert_array_equal(load(tmp_path / "clip.mp3"), samples)


def test_a_flac_stream_without_a_length_is_decoded_to_its_end(tmp_path):
    soundfile.write(tmp_path / "clip.flac", tone(), SAMPLE_RATE)
    content = bytearray((tmp_path / "clip.flac").read_bytes())
    content[21] &= 0xF0  # the 36 bits of STREAMINFO that hold the number of samples
    content[22:26] = bytes(4)
    (tmp_path / "clip.flac").write_bytes(content)
    np.testing.assert_allclose(load(tmp_path / "clip.flac"), tone(), atol=2**-15)


def test_a_wav_whose_header_announces_more_than_the_file_has(tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(), SAMPLE_RATE)
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)  # what recorders write that stream and never come back
    path.write_bytes(content)
    np.testing.assert_allclose(load(path), tone(), atol=2**-15)


def test_commands_show_a_doubtful_file_once_in_one_line(tmp_path, capsys):
    clips = [tmp_path / f"{number}.wav" for number in range(3)]
    for clip in clips:
        soundfile.write(clip, np.stack([tone(), -tone()], axis=1), SAMPLE_RATE)

    @command
    def main():
        list(map_ahead(load, [*clips, *clips]))
        warnings.warn("of another kind", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("default")
        with pytest.raises(SystemExit):
            main()
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if "channels that cancel" in line]
    assert sorted(told) == [line for line in sorted(lines) if line.startswith("warning: ")]
    assert [line.split(": found")[0] for line in sorted(told)] == [f"warning: {clip}" for clip in clips]
    assert [str(other.message) for other in others] == ["of another kind"]


def test_check_clip_returns_float32():
    assert check_clip(np.zeros(3, np.float64), "clip").dtype == np.float32
    samples = np.zeros(3, np.float32)
    assert check_clip(samples, "clip") is samples


@pytest.mark.parametrize(
    "samples, fault",
    [
        (np.zeros((2, 3), np.float32), r"clip 7: found an array of shape \(2, 3\), expected \[T\]; average the channels"),
        (np.zeros(0, np.float32), "clip 7: found no samples"),
        (np.zeros(3, np.int16), "clip 7: found samples of type int16, expected floats .*divide int16 samples by 32768"),
        (np.zeros(3, np.complex64), "clip 7: found samples of type complex64"),
        (np.array([0.0, np.nan]), "clip 7: found 1 samples that are NaN"),
        (np.array([0.0, 1e300]), "clip 7: found 1 samples that are NaN or infinite"),
        (np.array([0.0, -20000.0]), "clip 7: found a sample of size 20000, .*divide"),
    ],
)
def test_check_clip_refuses(samples, fault):
    with pytest.raises(AudioError, match=fault):
        check_clip(samples, "clip 7")
