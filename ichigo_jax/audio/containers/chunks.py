"""WAV, RF64, Wave64, AIFF, CAF and AU: a header that tells how long the sound is, rightly or not.

Recorders and programs that write into a pipe cannot come back to fill the length in, so they leave a placeholder; others fill
it in wrongly. Formats: Microsoft's RIFF; EBU Tech 3306 (RF64, BW64); Sony's Wave64; Apple's AIFF and Core Audio Format; Sun's
AU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ichigo_jax.audio.containers.source import Damage, Part, Piece, Sound, SourceFile
from ichigo_jax.audio.containers.tags import end_of_sound, start_of_sound

_W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
_W64_FAMILY = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # how the names of all other chunks end
_W64_HEADER = 24
_NEAR = 1 << 16  # placeholders are 2^31 or 2^32 less at most the size of a header or of a page of memory

# Chunks that are known to hold no sound; others are believed where they end within the file.
_KNOWN = frozenset(
    name.encode().ljust(4)
    for name in (
        "LIST id3 ID3 bext fact cue smpl inst PEAK iXML axml chna cart _PMX JUNK junk PAD FLLR acid afsp DISP plst levl umid "
        "NAME AUTH ANNO (c) COMT MARK INST MIDI AESD APPL CHAN info strg mark regn midi free uuid peak ovvw edct pakt chan kuki"
    ).split()
)


@dataclasses.dataclass(frozen=True)
class Form:
    """How a format lays out its chunks.

    Attributes:
      first: bytes from the file's start to the first chunk.
      name: bytes of a chunk's name.
      size: bytes of its size.
      order: of the bytes of numbers.
      within: bytes of the header that the size counts.
      pad: chunks begin at multiples of it.
      data: name of the chunk with the sound.
      before: bytes in it before the sound.
    """

    first: int
    name: int
    size: int
    order: str
    within: int
    pad: int
    data: bytes
    before: int = 0


_RIFF = Form(12, 4, 4, "little", 0, 2, b"data")
_RIFX = dataclasses.replace(_RIFF, order="big")
_AIFF = Form(12, 4, 4, "big", 0, 2, b"SSND", before=8)
_CAF = Form(8, 4, 8, "big", 0, 1, b"data", before=4)
_W64 = Form(40, 16, 8, "little", _W64_HEADER, 8, b"data" + _W64_FAMILY)


@dataclasses.dataclass
class Header:
    """What the header of a file says.

    Attributes:
      start: where the file begins: others may be joined to it.
      sound: where the sound begins.
      told: bytes of sound.
      length_at: where that is written.
      length_bytes: in so many bytes.
      length_extra: what the number counts beside the sound.
      block: bytes of a frame over all channels.
      frames_at: where AIFF counts the frames once more.
    """

    start: int
    sound: int
    told: int
    length_at: int
    length_bytes: int
    length_extra: int
    block: int = 1
    frames_at: int | None = None


def form_of(head: bytes) -> Form | None:
    """The layout of a file that begins so; None for other formats."""
    kind = head[8:12]
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and kind == b"WAVE":
        return _RIFF
    if head[:4] == b"RIFX" and kind == b"WAVE":
        return _RIFX
    if head[:4] == b"FORM" and kind in (b"AIFF", b"AIFC"):
        return _AIFF
    if head[:4] == b"caff":
        return _CAF
    if head[:16] == _W64_RIFF:
        return _W64
    return None


def chunk_sound(source: SourceFile) -> Sound:
    """The files in a file, one behind the other, each with the length that its sound really has.

    Bytes behind the sound are chunks, or another file, or else more sound.

    Raises:
      Damage: less sound than the header tells of; a length that is a placeholder tells nothing.
    """
    start, stop = start_of_sound(source), end_of_sound(source)
    parts: list[Part] = []
    plain = True
    while start < stop:
        head = source.read(start, 40)
        form = form_of(head)
        header = _au_header(source, start) if is_au(head) else _read_header(source, start, stop, form) if form else None
        if header is None:
            break  # no sound chunk, or no file: the decoder will say so
        length, after = _true_length(source, header, form, stop)
        if length is None:
            parts.append(Part([(start, after)]))
        else:
            plain = False
            parts.append(Part(_patched(source, header, length, form)))
        start = after
    if len(parts) <= 1 and plain and head[:4] != b"BW64":
        return Sound()
    return Sound(parts)


def is_au(head: bytes) -> bool:
    return head[:4] in (b".snd", b"dns.")


def _au_header(source: SourceFile, start: int) -> Header | None:
    head = source.read(start, 24)
    if len(head) < 24:
        return None
    order = "big" if head[:4] == b".snd" else "little"
    first, told, encoding, _, channels = (int.from_bytes(head[at : at + 4], order) for at in range(4, 24, 4))
    width = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}.get(encoding)
    return Header(start, start + first, told, start + 8, 4, 0, width * channels if width and channels else 1)


def _read_header(source: SourceFile, start: int, stop: int, form: Form) -> Header | None:
    """Walks the chunks up to the one with the sound; None where there is none."""
    at, block, frames_at, long_size = start + form.first, 1, None, None
    size_at = form.name
    while at + form.name + form.size <= stop:
        head = source.read(at, form.name + form.size)
        name, size = head[: form.name], int.from_bytes(head[size_at:], form.order)
        body = at + len(head)
        if name == form.data:
            told, length_at, length_bytes = size - form.within - form.before, at + size_at, form.size
            if long_size is not None and size == 0xFFFFFFFF:
                told, length_at, length_bytes = int.from_bytes(source.read(long_size, 8), "little"), long_size, 8
            return Header(start, body + form.before, told, length_at, length_bytes, form.within + form.before, block, frames_at)
        if name[:4] == b"fmt ":
            block = int.from_bytes(source.read(body + 12, 2), form.order) or 1
        elif name == b"COMM":
            common = source.read(body, 8)
            frames_at = body + 2
            if source.read(start + 8, 4) == b"AIFF":
                block = int.from_bytes(common[:2], "big") * -(-int.from_bytes(common[6:8], "big") // 8) or 1
        elif name == b"ds64":
            long_size = body + 8
        elif name == b"desc":
            block = int.from_bytes(source.read(body + 16, 4), "big") or 1
        at = _padded(body + size - form.within, start, form.pad)
    return None


def _padded(at: int, start: int, pad: int) -> int:
    return start + -(-(at - start) // pad) * pad


def _true_length(source: SourceFile, header: Header, form: Form | None, stop: int) -> tuple[int | None, int]:
    """Bytes of sound where the header is wrong, else None; and where the file that it belongs to ends."""
    there = max(0, stop - header.sound)
    if _is_placeholder(header, there):
        if header.told == 0 and (end := _end_of_chunks(source, header.sound, header.start, form, stop)) is not None:
            return None, end  # a file without sound
        return there, stop
    if header.told // header.block > there // header.block:
        raise Damage(f"found {there} bytes of sound, expected the {header.told} of its header; the file is cut short")
    told_end = header.sound + header.told
    if told_end >= stop:
        return None, stop
    pads = (form.pad, 1) if form else (1,)
    for pad in pads:  # some writers forget the byte that makes lengths even
        end = _end_of_chunks(source, _padded(told_end, header.start, pad), header.start, form, stop)
        if end is not None:
            return None, end
    if (there - header.told) // header.block == 0:
        return None, stop
    return there, stop


def _is_placeholder(header: Header, there: int) -> bool:
    """Whether a length is one that is written before it is known."""
    told = header.told
    if told <= 0:
        return True
    if told <= there:
        return False
    return any(limit - _NEAR <= told + header.length_extra <= limit + _NEAR for limit in (1 << 31, 1 << 32, 1 << 63, 1 << 64))


def _end_of_chunks(source: SourceFile, at: int, start: int, form: Form | None, stop: int) -> int | None:
    """Where the chunks that begin at ``at`` end: at the end of the file or where another file begins.

    None where it is not chunks that stand there.
    """
    while at < stop:
        head = source.read(at, 40)
        if form_of(head) or is_au(head):
            return at
        if form is None or len(head) < form.name + form.size:
            return None
        name, size = head[: form.name], int.from_bytes(head[form.name : form.name + form.size], form.order) - form.within
        end = at + form.name + form.size + size
        known = name in _KNOWN
        if form.name == 16:
            possible = name.endswith(_W64_FAMILY)
        else:
            possible = all(0x20 <= byte < 0x7F for byte in name)
        if size < 0 or not (known or possible and end <= stop):
            return None
        at = _padded(end, start, form.pad)
    return stop


def _patched(source: SourceFile, header: Header, length: int, form: Form | None) -> Sequence[Piece]:
    """The file with its true length in the header, up to the end of the sound."""
    start = header.start
    order = form.order if form else ("big" if source.read(start, 4) == b".snd" else "little")
    most = (1 << 8 * header.length_bytes) - 1
    patches = {header.length_at: min(length + header.length_extra, most).to_bytes(header.length_bytes, order)}
    if header.frames_at is not None:
        patches[header.frames_at] = min(length // header.block, 0xFFFFFFFF).to_bytes(4, "big")
    whole = header.sound + length - start
    if form in (_RIFF, _RIFX, _AIFF):
        patches[start + 4] = min(whole - 8, 0xFFFFFFFF).to_bytes(4, order)
    elif form is _W64:
        patches[start + 16] = whole.to_bytes(8, order)
    if source.read(start, 4) == b"BW64":
        patches[start] = b"RF64"
    pieces: list[Piece] = []
    for at, written in sorted(patches.items()):
        pieces += [(start, at), written]
        start = at + len(written)
    return [*pieces, (start, header.sound + length)]
