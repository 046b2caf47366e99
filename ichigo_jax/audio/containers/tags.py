"""Tags: titles, pictures and lyrics that stand before, behind and, in joined files, between the sound.

Formats: ID3v1 and ID3v2.4 (https://id3.org), APEv2 (https://wiki.hydrogenaud.io/index.php?title=APEv2_specification),
Lyrics3 v1 and v2 (https://id3.org/Lyrics3v2).
"""

from __future__ import annotations

from ichigo_jax.audio.containers.source import SourceFile

_ID3V1, _ID3V2, _APE, _LYRICS = b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN"
ID3V2_HEADER = 10  # bytes
_ID3V1_BYTES, _APE_HEADER = 128, 32
_LYRICS_ENDS = b"LYRICS200", b"LYRICSEND"
_LONGEST_LYRICS = 1 << 20


def tag_length(source: SourceFile, start: int) -> int:
    """Bytes of the tag that begins at ``start``; 0 where none does."""
    head = source.read(start, _APE_HEADER)
    if head.startswith(_ID3V2) and len(head) >= ID3V2_HEADER and max(head[6:10]) < 128 and head[3] != 255:
        footer = ID3V2_HEADER if head[5] & 0x10 else 0
        return ID3V2_HEADER + _seven_bits(head[6:10]) + footer
    if head.startswith(_APE):
        is_header = len(head) == _APE_HEADER and head[23] & 0x20
        return _APE_HEADER + (int.from_bytes(head[12:16], "little") if is_header else 0)
    if head.startswith(_LYRICS):
        lyrics = source.read(start, _LONGEST_LYRICS)
        ends = [at + len(end) for end in _LYRICS_ENDS if (at := lyrics.find(end)) >= 0]
        return min(ends, default=0)
    if head.startswith(_ID3V1):
        return _ID3V1_BYTES
    return 0


def start_of_sound(source: SourceFile) -> int:
    """Where the tags at the start of a file end."""
    start = 0
    while source.read(start, len(_ID3V2)) == _ID3V2 and (length := tag_length(source, start)):
        start += length
    return start


def end_of_sound(source: SourceFile) -> int:
    """Where the tags at the end of a file begin."""
    end = source.size
    while length := _length_of_last_tag(source, end):
        end -= length
    return end


def _length_of_last_tag(source: SourceFile, end: int) -> int:
    last = source.read(max(0, end - _ID3V1_BYTES), _ID3V1_BYTES)
    if len(last) == _ID3V1_BYTES and last.startswith(_ID3V1):
        return _ID3V1_BYTES
    foot = last[-_APE_HEADER:]
    if foot.startswith(_APE):
        header = _APE_HEADER if foot[23] & 0x80 else 0
        length = int.from_bytes(foot[12:16], "little") + header
    elif last[-10:].startswith(b"3DI"):
        length = 2 * ID3V2_HEADER + _seven_bits(last[-4:])
    elif last.endswith(_LYRICS_ENDS[0]) and last[-15:-9].isdigit():
        length = int(last[-15:-9]) + 15
    elif last.endswith(_LYRICS_ENDS[1]):
        begin = source.read(max(0, end - _LONGEST_LYRICS), _LONGEST_LYRICS).rfind(_LYRICS)
        length = min(end, _LONGEST_LYRICS) - begin if begin >= 0 else 0
    else:
        return 0
    return length if length <= end else 0


def _seven_bits(digits: bytes) -> int:
    """A number whose bytes carry seven bits each."""
    number = 0
    for digit in digits:
        number = number << 7 | digit
    return number
