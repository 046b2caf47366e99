"""MPEG audio (mp3, mp2): a row of frames, of which a header in the first one may tell the number.

Only a walk from frame to frame tells how much sound there is. A decoder that has no such header guesses the number from the
first frame's size, stops there, and loses what a variable bitrate has put behind; behind the first of several joined files it
stops as well. Layout of frames: ISO/IEC 11172-3 and 13818-3. The header with the number: Xing's and LAME's
(http://gabriel.mp3-tech.org/mp3infotag.html), or Fraunhofer's VBRI.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from ichigo_jax.audio.containers.source import Damage, Part, Piece, Sound, SourceFile
from ichigo_jax.audio.containers.tags import ID3V2_HEADER, end_of_sound, start_of_sound, tag_length

# kbit/s by bitrate index
_BITRATES = {
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # Hz, by the version's two bits
_XING, _VBRI = (b"Xing", b"Info"), b"VBRI"
_VBRI_AT = 36  # bytes from the start of a frame
_COUNTED, _SIZED, _WITH_TABLE, _WITH_QUALITY = 1, 2, 4, 8  # Xing's flags: which fields follow
_LAME_PADDING_AT = 21  # bytes from the encoder's name to its delay and padding, of 12 bits each
_CUT = "its last MPEG frame cut off"
_PLACEHOLDERS = (0, 0x7FFFFFFF, 0xFFFFFFFF)  # for a number of frames, from writers that could not come back


class Header(NamedTuple):
    """What the four bytes before a frame say."""

    size: int  # bytes of the frame
    samples: int  # of each channel
    kind: tuple  # version, layer, rate, whether mono: frames of one kind can be decoded together
    xing_at: int  # bytes from the start of a frame to Xing's header, if it has one


@dataclasses.dataclass
class Run:
    """Frames of one kind, from one encoder.

    Attributes:
      first: the four bytes before the first frame.
      info: the frame that holds no sound but the header of the run, if there is one.
      frames: how many frames of sound.
      pieces: where they lie.
    """

    first: bytes
    info: tuple[int, int] | None = None
    frames: int = 0
    pieces: list[tuple[int, int]] = dataclasses.field(default_factory=list)


@functools.lru_cache(maxsize=4096)
def frame_header(head: bytes) -> Header | None:
    """Reads the four bytes before a frame; None where they are something else, or of free format, which tells no size."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    version, layer, index, rate = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or index in (0, 15) or rate == 3:
        return None
    first = version == 3
    hertz = _RATES[version][rate]
    bits = 1000 * _BITRATES[1 if first else 2, layer][index]
    padding = head[2] >> 1 & 1
    if layer == 1:
        size = (12 * bits // hertz + padding) * 4
    else:
        size = (72 if layer == 3 and not first else 144) * bits // hertz + padding
    mono = head[3] >> 6 == 3
    side = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[first, mono]
    samples = 384 if layer == 1 else 576 if layer == 3 and not first else 1152
    return Header(size, samples, (version, layer, hertz, mono), 4 + side)


def mpeg_sound(source: SourceFile) -> Sound:
    """The runs of frames of a file, each with a header that tells its number of frames.

    Raises:
      Damage: a header that tells more frames than the file has.
    """
    start, doubts = start_of_sound(source), []
    runs = _runs(source, start, doubts)
    if not runs:
        return Sound()  # of free format, say; the decoder may know better
    if len(runs) == 1 and not doubts and _is_plain(source, runs[0], start):
        return Sound()
    # Some encoders count the frame with the header as well; but a file that ends within a frame is not given one more.
    parts, left = [], sum(run.frames + bool(run.info) for run in runs) - (_CUT in doubts)
    for run in runs:
        if run.frames and frame_header(run.first).kind[1] != 3:
            parts.append(Part([_smallest_frame(run), *run.pieces], counted=False, skip=frame_header(run.first).samples))
        elif run.frames:
            info = _corrected_info(source, run, left)
            parts.append(Part([info, *run.pieces]))
        left -= run.frames + bool(run.info)
    return Sound(parts, doubts)


def _is_plain(source: SourceFile, run: Run, start: int) -> bool:
    """Whether a decoder finds all of it by itself: a header that tells the right number, the frames, an ordinary tag or none."""
    return (
        run.info is not None
        and run.info[0] == start
        and (start == 0 or start == tag_length(source, 0) > ID3V2_HEADER)  # libsndfile knows one tag that is not empty
        and len(run.pieces) == 1
        and source.size - run.pieces[0][1] in (0, 128)
        and _announced(source, run.info) == run.frames
    )


def _runs(source: SourceFile, start: int, doubts: list[str]) -> list[Run]:
    """Walks from frame to frame."""
    stop = end_of_sound(source)
    runs: list[Run] = []
    kind: tuple | None = None
    while start < stop:
        window = source.window(start, stop)
        last = len(window) if start + len(window) == stop else len(window) - (1 << 13)  # the longest frame has some 6 kB
        at = begin = frames = 0
        while at < last:
            header = frame_header(window[at : at + 4])
            if header is None or at + header.size > len(window):
                break
            if header.kind != kind and not _confirmed(source, start + at, header, stop):
                break
            is_info = window[at + header.xing_at : at + header.xing_at + 4] in _XING or (
                window[at + _VBRI_AT : at + _VBRI_AT + 4] == _VBRI
            )
            if is_info or header.kind != kind:
                _add(runs, start + begin, start + at, frames)
                frames, begin, kind = 0, at, header.kind
                runs.append(Run(window[at : at + 4]))
                if is_info:
                    runs[-1].info = start + at, start + at + header.size
                    at = begin = at + header.size
                    continue
            frames += 1
            at += header.size
        _add(runs, start + begin, start + at, frames)
        start += at
        if at < last:
            start, kind = _after_junk(source, start, stop, kind, doubts)
    return runs


def _add(runs: list[Run], start: int, stop: int, frames: int) -> None:
    if frames:
        runs[-1].frames += frames
        if runs[-1].pieces and runs[-1].pieces[-1][1] == start:
            start = runs[-1].pieces.pop()[0]
        runs[-1].pieces.append((start, stop))


def _confirmed(source: SourceFile, start: int, header: Header, stop: int) -> bool:
    """Whether what looks like a frame is followed by another one, a tag or the end of the file."""
    after = start + header.size
    following = frame_header(source.read(after, 4))
    return after == stop or (following is not None and following.kind == header.kind) or tag_length(source, after) > 0


def _after_junk(source: SourceFile, start: int, stop: int, kind: tuple | None, doubts: list[str]) -> tuple[int, tuple | None]:
    """Where the next frame begins after bytes that belong to none, and which kind it is thought to be."""
    if length := tag_length(source, start):
        return start + length, kind
    if stop - start < 4 and b"\xff" == source.read(start, 1):
        doubts.append(_CUT)
        return stop, kind
    header = frame_header(source.read(start, 4))
    if header and header.kind == kind and start + header.size > stop:
        doubts.append(_CUT)
        return stop, kind
    at = _next_frame(source, start + 1, stop)
    lost = source.read(start, at - start).strip(b"\0")
    if kind is not None and lost:
        doubts.append(f"{at - start} bytes at byte {start} that belong to no MPEG frame")
    return at, kind


def _next_frame(source: SourceFile, start: int, stop: int) -> int:
    """Where the next frame begins; ``stop`` where there is none."""
    while start < stop:
        window = source.window(start, stop)
        at = window.find(b"\xff")
        while at >= 0:
            header = frame_header(window[at : at + 4] if at + 4 <= len(window) else source.read(start + at, 4))
            if header and _confirmed(source, start + at, header, stop):
                return start + at
            at = window.find(b"\xff", at + 1)
        start += len(window)
    return stop


def _announced(source: SourceFile, info: tuple[int, int]) -> int | None:
    """The number of frames that a header tells; None where it tells none."""
    frame = source.read(info[0], info[1] - info[0])
    if frame[_VBRI_AT : _VBRI_AT + 4] == _VBRI:
        count = int.from_bytes(frame[_VBRI_AT + 14 : _VBRI_AT + 18], "big")
    else:
        at = frame_header(frame[:4]).xing_at
        if not int.from_bytes(frame[at + 4 : at + 8], "big") & _COUNTED:
            return None
        count = int.from_bytes(frame[at + 8 : at + 12], "big")
    return None if count in _PLACEHOLDERS else count


def _corrected_info(source: SourceFile, run: Run, left: int) -> Piece:
    """A frame for the start of a run, whose header tells the number of frames that were found.

    Encoders differ in whether they count that frame itself, and programs that join files in whether the first header counts
    all of them. The encoder's delay at the start stays as it was told; its padding at the end too, unless more frames follow
    than it counted.

    Args:
      left: frames from the run's start to the end of the file.

    Raises:
      Damage: the header tells more of them.
    """
    announced = _announced(source, run.info) if run.info else None
    if announced is not None and announced > left:
        raise Damage(f"found {run.frames} MPEG frames, expected the {announced} of its header; the file is cut short")
    if announced is not None and announced == run.frames:
        return run.info
    frame = bytearray(source.read(run.info[0], run.info[1] - run.info[0])) if announced is not None else None
    if frame is None or frame[_VBRI_AT : _VBRI_AT + 4] == _VBRI:
        return _new_info(run)
    at = frame_header(bytes(frame[:4])).xing_at
    flags = int.from_bytes(frame[at + 4 : at + 8], "big")
    frame[at + 8 : at + 12] = run.frames.to_bytes(4, "big")
    name = at + 12
    if flags & _SIZED:
        size = len(frame) + sum(stop - start for start, stop in run.pieces)
        frame[name : name + 4] = min(size, 0xFFFFFFFF).to_bytes(4, "big")
    name += sum(size for flag, size in ((_SIZED, 4), (_WITH_TABLE, 100), (_WITH_QUALITY, 4)) if flags & flag)
    padding = name + _LAME_PADDING_AT + 1
    if announced < run.frames and padding + 2 <= len(frame):
        frame[padding : padding + 2] = bytes((frame[padding] & 0xF0, 0))
    return bytes(frame)


def _smallest_frame(run: Run) -> bytes:
    """A silent frame for layers I and II, which have no header with a number of frames.

    The decoder guesses their number from the size of the first one, so it is not too small after the smallest there can be.
    """
    head = bytes((run.first[0], run.first[1] | 1, 0x10 | run.first[2] & 0x0C, run.first[3]))
    return head + bytes(frame_header(head).size - len(head))


def _new_info(run: Run) -> bytes:
    """A frame like those of the run, with nothing in it but the number of frames."""
    for index in range(1, 15):
        head = bytes((run.first[0], run.first[1] | 1, index << 4 | run.first[2] & 0x0C, run.first[3]))  # no checksum
        header = frame_header(head)
        if header.size >= header.xing_at + 12 + _LAME_PADDING_AT + 3 + 100:
            break
    frame = bytearray(header.size)
    frame[:4] = head
    frame[header.xing_at : header.xing_at + 12] = _XING[0] + _COUNTED.to_bytes(4, "big") + run.frames.to_bytes(4, "big")
    return bytes(frame)
