"""FLAC: streams that were joined, and streams whose header does not tell their length (https://www.rfc-editor.org/rfc/rfc9639)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from ichigo_jax.audio.containers.source import WINDOW, Damage, Part, PartFile, Piece, Sound, SourceFile
from ichigo_jax.audio.containers.tags import end_of_sound, start_of_sound

MAGIC = b"fLaC"
_STREAMINFO = tuple(MAGIC + last + b"\0\0\x22" for last in (b"\0", b"\x80"))  # the block that is always first, and its length
_STREAMINFO_AT, _LENGTH_AT = 8, 21  # bytes from the magic to the block and to the number of samples in it
_UNKNOWN = (0, (1 << 36) - 1)  # lengths from writers that could not come back
_LEAST_SEARCHED = 1 << 16  # bytes at the end of a stream in which its last frame is looked for
_SYNC = (b"\xff\xf8", b"\xff\xf9")  # blocks of one size, whose frames are numbered; or of several, whose samples are
_BLOCK_SIZES = {1: 192, **{code: 576 << code - 2 for code in range(2, 6)}, **{code: 256 << code - 8 for code in range(8, 16)}}


@dataclasses.dataclass(frozen=True)
class StreamInfo:
    block: int  # samples of a frame, where all but the last have as many
    largest_frame: int  # bytes; 0 where it is not told
    total: int | None  # samples; None where it is not told


def flac_sound(source: SourceFile) -> Sound:
    """The streams of a file, see ``flac_streams``."""
    start, stop = start_of_sound(source), end_of_sound(source)
    parts = flac_streams(source, [(start, stop)])
    if len(parts) == 1 and parts[0].counted and start == 0:
        return Sound()
    return Sound(parts)


def flac_streams(source: SourceFile, pieces: Sequence[Piece]) -> list[Part]:
    """Streams, one behind the other, as parts.

    Where the last frame ends beyond the length in the header, or where there is no length, the part is decoded to its end.

    Raises:
      Damage: a stream without a length whose last frame is not whole. (With a length the decoder finds out.)
    """
    file = PartFile(source, pieces)
    starts = [0]
    while (start := _next_stream(file, starts[-1] + len(MAGIC))) >= 0:
        starts.append(start)
    return [_part(file, start, stop) for start, stop in zip(starts, [*starts[1:], file.size])]


def _next_stream(file: PartFile, start: int) -> int:
    while len(window := file.read_at(start, WINDOW)) > len(_STREAMINFO[0]):
        at = window.find(MAGIC)
        while at >= 0:
            if file.read_at(start + at, len(_STREAMINFO[0])) in _STREAMINFO:
                return start + at
            at = window.find(MAGIC, at + 1)
        start += len(window) - len(MAGIC) + 1
    return -1


def _part(file: PartFile, start: int, stop: int) -> Part:
    info = _stream_info(file.read_at(start, _STREAMINFO_AT + 34))
    whole = Part(file.pieces(start, stop))
    if info is None:
        return whole  # the decoder will say what is wrong with it
    ends, complete = _last_frame(file, max(start, stop - max(_LEAST_SEARCHED, 2 * info.largest_frame)), stop, info)
    if info.total is not None and (ends is None or ends <= info.total):
        return whole
    if info.total is None and not complete:
        raise Damage("found its last FLAC frame cut off, expected a whole one; the file is cut short")
    at = start + _LENGTH_AT
    unknown = bytes((file.read_at(at, 1)[0] & 0xF0, 0, 0, 0, 0))
    return Part([*file.pieces(start, at), unknown, *file.pieces(at + len(unknown), stop)], counted=False)


def _stream_info(head: bytes) -> StreamInfo | None:
    if not head.startswith(_STREAMINFO) or len(head) < _STREAMINFO_AT + 34:
        return None
    total = int.from_bytes(head[_LENGTH_AT : _LENGTH_AT + 5], "big") & _UNKNOWN[1]
    block, largest = int.from_bytes(head[8:10], "big"), int.from_bytes(head[15:18], "big")
    return StreamInfo(block, largest, None if total in _UNKNOWN else total)


def _last_frame(file: PartFile, start: int, stop: int, info: StreamInfo) -> tuple[int | None, bool]:
    """The sample that the last frame ends at, None where no frame is found; and whether the frame is whole."""
    window = file.read_at(start, stop - start)
    ends, at = None, len(window)
    while (at := max(window.rfind(sync, 0, at) for sync in _SYNC)) >= 0:
        found = _frame_end(window[at : at + 16], info)
        if found is not None:
            ends = found if ends is None else ends
            if info.total is not None:
                break
            if _crc(16, 0x8005, window[at:]) == 0:
                return found, True
    return ends, False


def _frame_end(head: bytes, info: StreamInfo) -> int | None:
    """The sample that a frame ends at; None where ``head`` is no header of a frame."""
    if len(head) < 6 or head[2] >> 4 == 0 or head[2] & 15 == 15 or head[3] & 1 or head[3] >> 4 > 10:
        return None
    extra = 7 - (head[4] ^ 0xFF).bit_length() if head[4] >= 0x80 else 0  # bytes that the number goes on for
    if extra == 0 and head[4] >= 0x80 or extra > 6:
        return None
    number = head[4] & ((1 << 6 - extra) - 1 if extra else 0x7F)
    at = 5
    for byte in head[at : at + extra]:
        if byte >> 6 != 2:
            return None
        number = number << 6 | byte & 0x3F
    at += extra
    code = head[2] >> 4
    if code in (6, 7):
        size = int.from_bytes(head[at : at + code - 5], "big") + 1
        at += code - 5
    else:
        size = _BLOCK_SIZES[code]
    at += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    if at >= len(head) or _crc(8, 0x07, head[: at + 1]) != 0:
        return None
    return (number if head[1] & 1 else number * info.block) + size


def _crc(bits: int, polynomial: int, data: bytes) -> int:
    """The checksum of a frame (16 bits) or of its header (8 bits); 0 over data that end with it."""
    table, rest, mask = _crc_table(bits, polynomial), 0, (1 << bits) - 1
    for byte in data:
        rest = (rest << 8 & mask) ^ table[rest >> bits - 8 ^ byte]
    return rest


@functools.cache
def _crc_table(bits: int, polynomial: int) -> list[int]:
    table = []
    for byte in range(256):
        rest = byte << bits - 8
        for _ in range(8):
            rest = rest << 1 ^ (polynomial if rest >> bits - 1 & 1 else 0)
        table.append(rest & (1 << bits) - 1)
    return table
