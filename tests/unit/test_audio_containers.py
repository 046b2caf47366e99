"""Files whose headers are wrong, that were joined, cut, or wrapped in tags: what is decoded, and what is refused or warned of."""

import io
import itertools
import struct
import warnings

import numpy as np
import pytest
import soundfile

from ichigo_jax.audio.decode import SAMPLE_RATE, AudioError, AudioWarning, load_audio

SECONDS = 1.5


def noise(seconds=SECONDS, rate=SAMPLE_RATE, channels=1, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, (round(seconds * rate), channels))


def written(kind, samples, rate=SAMPLE_RATE, subtype=None, endian=None):
    file = io.BytesIO()
    kind, subtype = ("OGG", "OPUS") if kind == "OPUS" else (kind, subtype)
    soundfile.write(file, samples, rate, format=kind, subtype=subtype, endian=endian)
    return file.getvalue()


def load(path, content, max_seconds=3600.0, max_bytes=1 << 30):
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_audio(path, max_seconds, max_bytes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "clip"


# Ogg


def pages(content):
    """An Ogg file as a list of its pages."""
    found, at = [], 0
    while at < len(content):
        body = at + 27 + content[at + 26]
        end = body + sum(content[at + 27 : body])
        found.append(content[at:end])
        at = end
    return found


def ogg_page(serial, number, body, flags=0, granule=0):
    """A page of one packet, with its checksum."""
    lacing = bytes([255] * (len(body) // 255) + [len(body) % 255])
    head = b"OggS\0" + struct.pack("<BqIII", flags, granule, serial, number, 0) + bytes([len(lacing)]) + lacing
    crc = 0
    for byte in head + body:
        crc ^= byte << 24
        for _ in range(8):
            crc = crc << 1 & 0xFFFFFFFF ^ (0x04C11DB7 if crc >> 31 else 0)
    return head[:22] + struct.pack("<I", crc) + head[26:] + body


@pytest.mark.parametrize("kind", ["OPUS", "OGG"])
@pytest.mark.parametrize("tail", [0.02, 0.5])
def test_every_link_of_a_chain_is_decoded(path, kind, tail):
    links = [noise(3.0), noise(tail, seed=1), noise(0.3, seed=2)]
    alone = np.concatenate([load(path, written(kind, link)) for link in links])
    np.testing.assert_array_equal(load(path, b"".join(written(kind, link) for link in links)), alone)
    assert len(alone) == round((3.3 + tail) * SAMPLE_RATE)


def test_links_of_other_rates_channels_and_codecs(path):
    links = [("OGG", 8000, 1), ("OPUS", 48000, 2), ("OGG", 44100, 2), ("OGG", 44100, 1)]
    content = [written(kind, noise(1.0, rate, channels), rate) for kind, rate, channels in links]
    samples = load(path, b"".join(content))
    assert len(samples) == 4 * SAMPLE_RATE
    np.testing.assert_array_equal(samples[: 2 * SAMPLE_RATE], np.concatenate([load(path, link) for link in content[:2]]))


def test_a_stream_beside_the_sound_is_passed_over(path):
    """As in a video, or with a skeleton: other streams begin before and after the sound's, and their pages lie between."""
    content = written("OGG", noise())
    first, *others = pages(content)
    skeleton = [ogg_page(7, 0, b"fishead\0" + bytes(56), flags=2), ogg_page(7, 1, b"", flags=4)]
    cover = [ogg_page(9, 0, b"\x80theora" + bytes(35), flags=2), ogg_page(9, 1, bytes(300)), ogg_page(9, 2, bytes(9), flags=4)]
    mixed = [skeleton[0], first, cover[0], skeleton[1], others[0], cover[1], *others[1:], cover[2]]
    np.testing.assert_array_equal(load(path, b"".join(mixed)), load(path, content))


def ogg_flac(samples, total=None):
    """FLAC in Ogg pages; ``total``: what the header says of the number of samples."""
    flac = bytearray(written("FLAC", samples))
    if total is not None:
        set_flac_total(flac, total)
    heads = [ogg_page(3, 0, b"\x7fFLAC\1\0\0\0" + bytes(flac[:42]), flags=2)]
    chunks = [bytes(flac[at : at + 60000]) for at in range(42, len(flac), 60000)]
    return b"".join(heads + [ogg_page(3, n, chunk, 4 * (n == len(chunks)), n) for n, chunk in enumerate(chunks, 1)])


@pytest.mark.parametrize("total", [None, 0, (1 << 36) - 1, 100])
def test_flac_in_ogg(path, total):
    samples = load(path, written("FLAC", noise()))
    np.testing.assert_array_equal(load(path, ogg_flac(noise(), total)), samples)
    np.testing.assert_array_equal(load(path, 3 * ogg_flac(noise(), total)), np.tile(samples, 3))


@pytest.mark.parametrize("kind", ["OPUS", "OGG"])
def test_a_recording_without_an_end_is_decoded_with_a_warning(path, kind):
    whole = written(kind, noise(4.0))
    parts = pages(whole)
    path.write_bytes(b"".join(parts[:-1]))
    with pytest.warns(AudioWarning, match="clip: found no page that ends its Ogg stream"):
        samples = load_audio(path, 3600.0, 1 << 30)
    assert 2.0 * SAMPLE_RATE <= len(samples) < 4.0 * SAMPLE_RATE
    np.testing.assert_allclose(samples[:20000], load(path, whole)[:20000], atol=1e-6)
    path.write_bytes(b"".join(parts[:-1]) + whole)  # also where the next link follows
    with pytest.warns(AudioWarning, match="clip: found no page that ends its Ogg stream"):
        assert len(load_audio(path, 3600.0, 1 << 30)) == len(samples) + 4.0 * SAMPLE_RATE


@pytest.mark.parametrize("kind", ["OPUS", "OGG"])
@pytest.mark.parametrize("cut", [1, 26, 2000])
def test_an_ogg_file_that_ends_within_a_page_is_refused(path, kind, cut):
    whole = written(kind, noise())
    for content in (whole[:-cut], whole + whole[:-cut]):
        with pytest.raises(AudioError, match=r"clip: found its last Ogg page cut off at byte \d+, .* the file is cut short"):
            load(path, content)
    with pytest.raises(AudioError, match=r"clip: found an Ogg page at byte \d+ that is cut off"):
        load(path, whole[:-cut] + whole)


def test_a_file_that_ends_within_the_head_of_a_page_is_refused(path):
    *others, last = pages(written("OPUS", noise(4.0)))
    for cut in (1, 3, 20, 27):
        with pytest.raises(AudioError, match="clip: found its last Ogg page cut off"):
            load(path, b"".join(others) + last[:cut])


@pytest.mark.parametrize("kind", ["OPUS", "OGG"])
def test_a_missing_page_is_not_passed_over_silently(path, kind):
    parts = pages(written(kind, noise(6.0)))
    with pytest.raises((AudioError, AudioWarning), match="clip: found (.*damaged|.* in the numbers of its Ogg pages)"):
        load(path, b"".join(parts[:-2] + parts[-1:]))


def test_speex_is_named(path):
    with pytest.raises(AudioError, match="clip: found Speex in Ogg, which is not read here, expected wav, flac, mp3 or ogg"):
        load(path, ogg_page(1, 0, b"Speex   " + bytes(72), flags=2))


# MPEG


def mpeg_frames(content):
    """The frames of an mp3 file of libsndfile's, without the first, which holds the number of frames."""
    rates = {0: 44100, 1: 48000, 2: 32000}
    bitrates = {
        3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
        2: (0, *range(8, 64, 8), *range(64, 161, 16)),
    }
    found, at = [], 0
    while at < len(content):
        version = content[at + 1] >> 3 & 3
        rate = rates[content[at + 2] >> 2 & 3] // (1 if version == 3 else 2)
        samples = 144 if version == 3 else 72
        size = samples * 1000 * bitrates[version][content[at + 2] >> 4] // rate + (content[at + 2] >> 1 & 1)
        found.append(content[at : at + size])
        at += size
    return found[1:]


def mp3(samples, rate=SAMPLE_RATE, mode="VARIABLE"):
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, samples.shape[1], format="MP3", bitrate_mode=mode) as stream:
        stream.write(samples)
    return file.getvalue()


def quiet_then_loud(quiet, loud, rate=44100):
    return np.concatenate([np.zeros((round(quiet * rate), 1)), noise(loud, rate)])


@pytest.mark.parametrize("tail", [0.03, 0.5])
def test_every_file_of_joined_mp3s_is_decoded(path, tail):
    files = [mp3(noise(3.0)), mp3(noise(tail, seed=1)), mp3(noise(0.2, 44100, 2), 44100), mp3(noise(0.2, 8000), 8000)]
    alone = [load(path, file) for file in files]
    assert [len(samples) for samples in alone] == [round(s * SAMPLE_RATE) for s in (3.0, tail, 0.2, 0.2)]
    for behind in (b"", id3v1(), ape_tag()):
        np.testing.assert_array_equal(load(path, behind.join(files)), np.concatenate(alone))
    for between in (id3v2(), id3v1() + id3v2(3), bytes(500)):
        np.testing.assert_array_equal(load(path, between.join(files)), np.concatenate(alone))


@pytest.mark.parametrize("samples", [quiet_then_loud(1.0, 1.0), quiet_then_loud(0, 2.0), quiet_then_loud(0.02, 1.98)])
def test_a_variable_bitrate_without_a_number_of_frames(path, samples):
    frames = mpeg_frames(mp3(samples, 44100))
    assert len({len(frame) for frame in frames}) > 1
    found = load(path, b"".join(frames))
    expected = (1152 * len(frames) - 529) / 44100  # the decoder's own delay does not count
    assert len(found) == pytest.approx(expected * SAMPLE_RATE, abs=1)
    # the same with a tag on either side, and with the last frames of silence counted as well
    np.testing.assert_array_equal(load(path, id3v2() + b"".join(frames) + ape_tag()), found)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("count", [0, 10, 0x7FFFFFFF, 0xFFFFFFFF, None])
def test_a_number_of_frames_that_is_wrong_or_missing(path, mode, count):
    content = bytearray(mp3(noise(), mode=mode))
    whole = load(path, bytes(content))
    at = next(at for at in (content.find(b"Xing"), content.find(b"Info")) if at >= 0)
    if count is None:
        content[at + 7] &= ~1  # the flag that a number follows
    else:
        content[at + 8 : at + 12] = struct.pack(">I", count)
    found = load(path, bytes(content))
    assert 0 <= len(found) - len(whole) <= 2 * 1152  # at most the encoder's delay and padding come with it


def test_a_frame_is_found_behind_much_junk(path):
    frames = mpeg_frames(mp3(noise()))
    junk = np.random.default_rng(0).bytes(3 << 20)
    path.write_bytes(id3v2(20) + junk + b"".join(frames))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AudioWarning)  # random bytes hold what looks like frames
        assert len(load_audio(path, 3600.0, 1 << 30)) >= len(load(path, b"".join(frames)))


@pytest.mark.parametrize("bitrates", [[8], [8, 14], [1, 8], [14, 1]])
@pytest.mark.parametrize("stereo", [True, False])
def test_layer_2_has_no_header_with_a_number_of_frames(path, bitrates, stereo):
    """Frames of silence, of one bitrate or of several."""
    kilobits = (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
    frames = [
        bytes((0xFF, 0xFD, index << 4, 0 if stereo else 0xC0)) + bytes(144 * 1000 * kilobits[index] // 44100 - 4)
        for index in np.repeat(bitrates, 40)
    ]
    assert len(load(path, b"".join(frames))) == round(1152 * len(frames) * SAMPLE_RATE / 44100)


@pytest.mark.parametrize("lost", [400, 3000, 10**4])
def test_an_mp3_with_fewer_frames_than_its_header_tells_of_is_refused(path, lost):
    with pytest.raises(AudioError, match=r"clip: found \d+ MPEG frames, expected the \d+ of its header; the file is cut short"):
        load(path, mp3(noise(3.0))[:-lost])


def test_an_mp3_that_ends_within_a_frame(path):
    content = mp3(noise())
    with pytest.raises(AudioError, match="the file is cut short"):
        load(path, content[:-1])
    frames = mpeg_frames(content)
    for lost in (1, 20, len(frames[-1]) - 2):
        with pytest.raises(AudioWarning, match="clip: found its last MPEG frame cut off; sound may be missing"):
            load(path, b"".join(frames)[:-lost])


def test_bytes_between_mpeg_frames_are_told_of(path):
    frames = mpeg_frames(mp3(noise()))
    path.write_bytes(b"".join(frames[:9]) + b"<html>404</html>" * 30 + b"".join(frames[9:]))
    with pytest.warns(AudioWarning, match=r"clip: found 480 bytes at byte \d+ that belong to no MPEG frame"):
        samples = load_audio(path, 3600.0, 1 << 30)
    assert len(samples) == len(load(path, b"".join(frames)))


# Tags


def id3v2(size=2000):
    return b"ID3\4\0\0" + bytes([0, 0, size >> 7, size & 127]) + b"\xff\xfb\x90\0"[:size] + bytes(size - min(4, size))


def id3v1():
    return b"TAG" + bytes(125)


def ape_tag(size=20000, header=True):
    body = np.random.default_rng(0).bytes(size)
    ends = [b"APETAGEX" + struct.pack("<IIII", 2000, size + 32, 1, flags) + bytes(8) for flags in (0xA0000000, 0x80000000)]
    return ends[0] + body + ends[1] if header else body + ends[1][:20] + bytes(12)


def lyrics():
    words = b"LYRICSBEGIN" + b"LYR00009la la la " * 3
    return words + b"%06dLYRICS200" % len(words)


@pytest.mark.parametrize("kind", ["MP3", "FLAC", "WAV", "OGG", "OPUS", "AIFF", "AU", "CAF", "W64"])
@pytest.mark.parametrize(
    "tag", [id3v1(), ape_tag(), ape_tag(header=False), ape_tag(300) + id3v1(), lyrics() + id3v1()], ids=range(5)
)
def test_a_tag_behind_the_sound_is_no_sound(path, kind, tag, capfd):
    content = written(kind, noise())
    np.testing.assert_array_equal(load(path, content + tag), load(path, content))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["MP3", "FLAC", "WAV", "OGG", "OPUS", "AIFF", "AU", "CAF", "W64"])
@pytest.mark.parametrize("size", [0, 20, 16000])
def test_a_tag_before_the_sound_is_no_sound(path, kind, size):
    content = written(kind, noise())
    np.testing.assert_array_equal(load(path, id3v2(size) + content), load(path, content))


# FLAC


def set_flac_total(content, total):
    content[21] = content[21] & 0xF0 | total >> 32
    content[22:26] = struct.pack(">I", total & 0xFFFFFFFF)
    return bytes(content)


@pytest.mark.parametrize("seconds", [0.01, 1.5, 10.0])
@pytest.mark.parametrize("total", [0, (1 << 36) - 1, 100])
def test_a_flac_length_that_is_a_placeholder_or_too_small(path, seconds, total):
    content = written("FLAC", noise(seconds))
    samples = load(path, content)
    assert len(samples) == round(seconds * SAMPLE_RATE)
    np.testing.assert_array_equal(load(path, set_flac_total(bytearray(content), total)), samples)


@pytest.mark.parametrize("tail", [0.001, 0.25, 3.0])
def test_joined_flac_files(path, tail):
    files = [written("FLAC", noise(3.0)), written("FLAC", noise(tail, 44100, 2), 44100)]
    alone = np.concatenate([load(path, file) for file in files])
    np.testing.assert_array_equal(load(path, b"".join(files)), alone)


@pytest.mark.parametrize("lost", [1, 300, 20000])
@pytest.mark.parametrize("total", [None, 0])
def test_a_flac_file_that_is_cut_short_is_refused(path, lost, total):
    content = bytearray(written("FLAC", noise()))
    if total is not None:
        set_flac_total(content, total)
    with pytest.raises(AudioError, match="clip: found .*cut short"):
        load(path, bytes(content[:-lost]))


# Headers with a length: WAV and its kin

CHUNKED = ["WAV", "WAVEX", "RIFX", "RF64", "W64", "AIFF", "CAF", "AU", "AU little"]


def chunked(kind, samples, rate=SAMPLE_RATE):
    name, _, little = kind.partition(" ")
    if kind == "RIFX":
        return written("WAV", samples, rate, endian="BIG")
    return written(name, samples, rate, "PCM_16", "LITTLE" if little else None)


def set_length(kind, content, length):
    """Writes another number of bytes of sound into a header."""
    content = bytearray(content)
    mask = (1 << 64) - 1
    if kind in ("WAV", "WAVEX", "RIFX"):
        at = content.index(b"data") + 4
        content[at : at + 4] = struct.pack(">I" if kind == "RIFX" else "<I", length & 0xFFFFFFFF)
    elif kind == "RF64":
        at = content.index(b"ds64") + 16
        content[at : at + 8] = struct.pack("<Q", length & mask)
        at = content.index(b"data") + 4
        content[at : at + 4] = b"\xff" * 4
    elif kind == "W64":
        at = content.index(b"data") + 16
        content[at : at + 8] = struct.pack("<Q", length + 24 & mask if length > 0 else length & mask)
    elif kind == "CAF":
        at = content.index(b"data") + 4
        content[at : at + 8] = struct.pack(">Q", length + 4 & mask if length > 0 else length & mask)
    elif kind == "AIFF":
        at = content.index(b"SSND") + 4
        content[at : at + 4] = struct.pack(">I", length + 8 & 0xFFFFFFFF if length > 0 else length & 0xFFFFFFFF)
        at = content.index(b"COMM") + 10
        content[at : at + 4] = struct.pack(">I", max(length, 0) // 2 & 0xFFFFFFFF)
    else:
        content[8:12] = struct.pack(">I" if kind == "AU" else "<I", length & 0xFFFFFFFF)
    return bytes(content)


@pytest.mark.parametrize("kind", CHUNKED)
@pytest.mark.parametrize("length", [0, -1, 0x7FFFFFFF - 44, 0x7FFFF000, 2, 1000])
def test_a_length_that_is_a_placeholder_or_too_small(path, kind, length):
    content = chunked(kind, noise())
    samples = load(path, content)
    assert len(samples) == SECONDS * SAMPLE_RATE
    np.testing.assert_array_equal(load(path, set_length(kind, content, length)), samples)


@pytest.mark.parametrize("kind", CHUNKED)
@pytest.mark.parametrize("length", [1 << 20, 1 << 30, 48002])
def test_a_length_that_the_file_does_not_have_is_refused(path, kind, length):
    with pytest.raises(AudioError, match=rf"clip: found 48000 bytes of sound, expected the {length} of its header; .* cut short"):
        load(path, set_length(kind, chunked(kind, noise()), length))


@pytest.mark.parametrize("kind", [*CHUNKED, "NIST"])
@pytest.mark.parametrize("lost", [2, 300, 24000])
def test_a_file_with_a_length_that_is_cut_short_is_refused(path, kind, lost):
    content = chunked(kind, noise())
    for broken in (content[:-lost], content[:-lost] + content, content + content[:-lost]):
        with pytest.raises(AudioError, match=r"clip: found \d+ bytes of sound, expected the 48000 of its header; .* cut short"):
            load(path, broken)


@pytest.mark.parametrize("kind", [*CHUNKED, "NIST"])
def test_joined_files_of_every_kind(path, kind):
    files = [chunked(kind, noise()), chunked(kind, noise(0.001, seed=1)), chunked(kind, noise(0.5, 48000, 2), 48000)]
    alone = np.concatenate([load(path, file) for file in files])
    assert len(alone) == (SECONDS + 0.001 + 0.5) * SAMPLE_RATE
    np.testing.assert_array_equal(load(path, b"".join(files)), alone)


@pytest.mark.parametrize("kind", ["WAV", "RF64", "AIFF", "AU"])
def test_joined_files_of_which_none_knows_its_length(path, kind):
    files = [set_length(kind, chunked(kind, noise(seed=seed)), -1) for seed in range(3)]
    np.testing.assert_array_equal(load(path, b"".join(files)), np.concatenate([load(path, file) for file in files]))


def test_a_bw64_file_is_an_rf64_file(path):
    content = chunked("RF64", noise())
    samples = load(path, content)
    for length in (48000, 0, -1, 2000):
        np.testing.assert_array_equal(load(path, b"BW64" + set_length("RF64", content, length)[4:]), samples)


@pytest.mark.parametrize("chunk", [b"LIST\4\0\0\0INFO", b"abcd\3\0\0\0\1\2\3\0", b"id3 \xff\xff\0\0cut", b"bext\2\0\0\0ab" * 3])
def test_chunks_behind_the_sound_are_no_sound(path, chunk):
    content = chunked("WAV", noise())
    np.testing.assert_array_equal(load(path, content + chunk), load(path, content))


def test_a_chunk_behind_an_odd_number_of_bytes(path):
    content = written("WAV", noise()[:101], subtype="PCM_U8")
    content = content[: content.index(b"data") + 8 + 101]
    samples = load(path, content)
    assert len(samples) == 101
    for pad in (b"", b"\0"):  # with and without the byte that the format asks for
        np.testing.assert_array_equal(load(path, content + pad + b"LIST\4\0\0\0INFO"), samples)


def test_a_part_of_a_frame_at_the_end_is_no_fault(path):
    content = chunked("WAV", noise(channels=2))
    samples = load(path, content)
    for more in (b"\0", b"\0\0\0"):
        np.testing.assert_array_equal(load(path, content + more), samples)


# Bounds, over all parts


@pytest.mark.parametrize("kind", ["OPUS", "OGG", "MP3", "FLAC", "WAV", "AU"])
def test_bounds_hold_for_all_parts_together(path, kind):
    content = 3 * written(kind, noise(1.0, 48000, 2), 48000)
    assert len(load(path, content, 3.0, 4 * 2 * 48000 * 3)) == 3 * SAMPLE_RATE
    with pytest.raises(AudioError, match=r"clip: found 3\.0 s of audio, expected at most 2\.9 s"):
        load(path, content, max_seconds=2.9)
    with pytest.raises(AudioError, match=r"clip: found 1152000 bytes once decoded, expected at most 1151999"):
        load(path, content, max_bytes=4 * 2 * 48000 * 3 - 1)


def test_bounds_hold_where_no_length_is_told(path, monkeypatch):
    content = set_flac_total(bytearray(written("FLAC", noise())), 0)
    endless = itertools.repeat(np.zeros((1 << 16, 1), np.float32), 100)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **kwargs: next(endless))
    with pytest.raises(AudioError, match="clip: found .* expected at most 9 s"):
        load(path, content, max_seconds=9.0)


# Damage of all sorts


@pytest.mark.parametrize("kind", ["OPUS", "OGG", "MP3", "FLAC", "WAV", "W64", "AIFF", "AU", "CAF", "NIST"])
def test_whatever_is_done_to_a_file_it_is_decoded_or_refused(path, kind):
    content = written(kind, noise(0.2))
    draws = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        at, size = draws.integers(len(content)), draws.integers(1, 40)
        damaged[at : at + size] = draws.bytes(draws.integers(0, 60))
        path.write_bytes(bytes(damaged))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AudioWarning)
            try:
                assert np.isfinite(load_audio(path, 3600.0, 1 << 30)).all()
            except AudioError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


# Formats that are not read


@pytest.mark.parametrize(
    "head, name",
    [
        (b"\0\0\0\x20ftypM4A \0\0\2\0", "an MP4 file"),
        (b"\0\0\0\x18ftyp3gp4\0\0\2\0", "an MP4 file"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81", "a Matroska file .webm"),
        (b"#!AMR\n\x3c\x91", "an AMR file"),
        (b"#!AMR-WB\n", "an AMR file"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9", "a Windows Media file"),
        (b"\xff\xf1\x50\x80\x1f\xfc", "an AAC stream"),
        (b"RIFF\0\0\0\0AVI LIST", "an AVI file"),
    ],
)
def test_a_format_that_is_not_read_is_named(path, head, name):
    for content in (head + bytes(1000), id3v2(20) + head + bytes(1000)):
        with pytest.raises(AudioError, match=rf"clip: found {name}.*, expected wav, flac, mp3 or ogg; convert it first$"):
            load(path, content)


# Channels that cancel each other


def stereo(*channels):
    return written("WAV", np.stack(channels, axis=1), subtype="FLOAT")


@pytest.mark.parametrize("gain", [1.0, 0.9, 1.05])
def test_channels_of_opposite_phase_are_told_of(path, gain):
    left = noise(20.0)[:, 0]
    message = "clip: found channels that cancel each other where they are averaged, in 100 % of the sound's energy"
    with pytest.raises(AudioWarning, match=message):
        load(path, stereo(left, -gain * left))
    with pytest.raises(AudioWarning, match=message):
        load(path, stereo(left, -gain * left, left, -gain * left))
    silence = np.zeros_like(left)
    with pytest.raises(AudioWarning, match="clip: found channels that cancel"):  # only in a part of the clip
        load(path, stereo(np.concatenate([left, left]), np.concatenate([left, -left])))
    load(path, stereo(left, silence))


def test_ordinary_channels_are_not_told_of(path):
    left, right, other = (noise(5.0, seed=seed)[:, 0] for seed in range(3))
    for channels in ((left, left), (left, right), (left, np.zeros_like(left)), (left, -0.4 * left), (left, right, other)):
        load(path, stereo(*channels))
    load(path, stereo(*noise(5.0, channels=16).T))
    load(path, stereo(1e-6 * left, -1e-6 * left))  # too quiet to be heard
