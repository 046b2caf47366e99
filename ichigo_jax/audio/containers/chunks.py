"""WAV, RF64, Wave64, AIFF, CAF, AU and Sphere: a header that tells how long the sound is, rightly or not.

Recorders and programs that write into a pipe cannot come back to fill the length in, so they leave a placeholder; others fill
it in wrongly. Formats: Microsoft's RIFF; EBU Tech 3306 (RF64, BW64); Sony's Wave64; Apple's AIFF and Core Audio Format; Sun's
AU; NIST's Sphere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ichigo_jax.audio.containers.source import Damage, Part, Piece, Sound, SourceFile
from ichigo_jax.audio.containers.tags import end_of_sound, start_of_sound

_W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
_W64_FAMILY = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # how the names of all other chunks end
_W64_HEADER = 24
_NIST = b"NIST_1A\n"
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
_BARE = Form(0, 0, 0, "big", 0, 1, b"")  # no chunks
_W64 = Form(40, 16, 8, "little", _W64_HEADER, 8, b"data" + _W64_FAMILY)


@dataclasses.dataclass
class Header:
    """What the header of a file says.

    Attributes:
      form: of the file.
      start: where it begins: others may be joined to it.
      sound: where the sound begins.
      told: bytes of sound.
      length_at: where that is written.
      length_bytes: in so many bytes.
      length_extra: what the number counts beside the sound.
      block: bytes of a frame over all channels.
      frames_at: where AIFF counts the frames once more.
    """

    form: Form
    start: int
    sound: int
    told: int
    length_at: int | None
    length_bytes: int
    length_extra: int
    block: int = 1
    frames_at: int | None = None


def _form_of(head: bytes) -> Form | None:
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
    plain = start == 0 and stop == source.size
    parts: list[Part] = []
    while start < stop:
        header = _read_header(source, start, stop)
        if header is None:
            parts.append(Part([(start, stop)]))  # no chunk with sound: the decoder will say so
            break
        length, after = _true_length(source, header, stop)
        if length is None and source.read(start, 4) == b"BW64":
            length = header.told  # the decoder knows it as RF64 only
        if length is None:
            parts.append(Part([(start, after)]))
        else:
            plain = False
            parts.append(Part(_patched(source, header, length)))
        start = after
    return Sound() if plain and len(parts) == 1 else Sound(parts)


def is_chunked(head: bytes) -> bool:
    """Whether a file that begins so is one of these."""
    return bool(_form_of(head) or _is_au(head) or head.startswith(_NIST))


def _read_header(source: SourceFile, start: int, stop: int) -> Header | None:
    """The header of the file at ``start``; None where no sound is in it."""
    head = source.read(start, 40)
    if _is_au(head):
        return _au_header(head, start)
    if head.startswith(_NIST):
        return _nist_header(source, start)
    form = _form_of(head)
    return _chunk_header(source, start, stop, form) if form else None


def _is_au(head: bytes) -> bool:
    if head[:4] not in (b".snd", b"dns.") or len(head) < 24:
        return False
    order = "big" if head[:4] == b".snd" else "little"
    return int.from_bytes(head[4:8], order) >= 24 and 0 < int.from_bytes(head[20:24], order) < 1 << 16


def _au_header(head: bytes, start: int) -> Header:
    form = dataclasses.replace(_BARE, order="big" if head[:4] == b".snd" else "little")
    first, told, encoding, _, channels = (int.from_bytes(head[at : at + 4], form.order) for at in range(4, 24, 4))
    block = channels * {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}.get(encoding, 1)
    return Header(form, start, start + first, told, start + 8, 4, 0, block)


def _nist_header(source: SourceFile, start: int) -> Header | None:
    """Of NIST's Sphere, lines of text: ``sample_count -i 64000``. The decoder goes by the file's end, not by that number."""
    lines = source.read(start, 1024).split(b"\n")
    fields = {words[0]: words[2] for line in lines if len(words := line.split()) == 3}
    try:
        first = int(lines[1])
        block = int(fields[b"channel_count"]) * int(fields[b"sample_n_bytes"])
        return Header(_BARE, start, start + first, block * int(fields.get(b"sample_count", 0)), None, 0, 0, max(block, 1))
    except (ValueError, KeyError, IndexError):
        return None


def _chunk_header(source: SourceFile, start: int, stop: int, form: Form) -> Header | None:
    """Walks the chunks up to the one with the sound."""
    at, block, frames_at, long_size = start + form.first, 1, None, None
    while at + form.name + form.size <= stop:
        head = source.read(at, form.name + form.size)
        name, size = head[: form.name], int.from_bytes(head[form.name :], form.order)
        body = at + len(head)
        if name == form.data:
            told, length_at, length_bytes = size - form.within - form.before, at + form.name, form.size
            if long_size is not None and size == 0xFFFFFFFF:
                told, length_at, length_bytes = int.from_bytes(source.read(long_size, 8), "little"), long_size, 8
            extra = form.within + form.before
            return Header(form, start, body + form.before, told, length_at, length_bytes, extra, block, frames_at)
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


def _true_length(source: SourceFile, header: Header, stop: int) -> tuple[int | None, int]:
    """Bytes of sound where the header is wrong, else None; and where the file that it belongs to ends."""
    there = max(0, stop - header.sound)
    if _is_placeholder(header, there):
        if header.told == 0 and (end := _end_of_chunks(source, header.sound, header, stop)) is not None:
            return None, end  # a file without sound
        end = _next_file(source, header, stop)
        return end - header.sound, end
    told_end = header.sound + header.told
    if told_end == stop:
        return None, stop
    if told_end < stop:
        for pad in {header.form.pad, 1}:  # some writers forget the byte that makes lengths even
            end = _end_of_chunks(source, _padded(told_end, header.start, pad), header, stop)
            if end is not None:
                return None, end
    end = _next_file(source, header, stop)
    there = end - header.sound
    if header.told // header.block > there // header.block:
        raise Damage(f"found {there} bytes of sound, expected the {header.told} of its header; the file is cut short")
    return (None if (there - header.told) // header.block == 0 else there), end


def _is_placeholder(header: Header, there: int) -> bool:
    """Whether a length is one that is written before it is known."""
    told = header.told
    if told <= 0:
        return True
    if told <= there:
        return False
    return any(limit - _NEAR <= told + header.length_extra <= limit + _NEAR for limit in (1 << 31, 1 << 32, 1 << 63, 1 << 64))


def _next_file(source: SourceFile, header: Header, stop: int) -> int:
    """Where the next file of the same format begins, or else the end."""
    magic = source.read(header.start, 4)
    at = source.find(magic, header.sound)
    while 0 <= at < stop and not is_chunked(source.read(at, 40)):
        at = source.find(magic, at + 1)
    return at if 0 <= at < stop else stop


def _end_of_chunks(source: SourceFile, at: int, header: Header, stop: int) -> int | None:
    """Where the chunks that begin at ``at`` end: at the end of the file or where another file begins.

    None where it is not chunks that stand there.
    """
    form = header.form
    while at < stop:
        head = source.read(at, 40)
        if is_chunked(head):
            return at
        if len(head) < form.name + form.size or not form.name:
            return None
        name, size = head[: form.name], int.from_bytes(head[form.name : form.name + form.size], form.order) - form.within
        end = at + form.name + form.size + size
        plausible = name.endswith(_W64_FAMILY) if form is _W64 else all(0x20 <= byte < 0x7F for byte in name)
        if size < 0 or not (name in _KNOWN or plausible and end <= stop):
            return None
        at = _padded(end, header.start, form.pad)
    return stop


def _patched(source: SourceFile, header: Header, length: int) -> Sequence[Piece]:
    """The file with its true length in the header, up to the end of the sound."""
    start, form = header.start, header.form
    patches = {}
    if header.length_at is not None:
        most = (1 << 8 * header.length_bytes) - 1
        patches[header.length_at] = min(length + header.length_extra, most).to_bytes(header.length_bytes, form.order)
    if header.frames_at is not None:
        patches[header.frames_at] = min(length // header.block, 0xFFFFFFFF).to_bytes(4, "big")
    whole = header.sound + length - start
    if form in (_RIFF, _RIFX, _AIFF):
        patches[start + 4] = min(whole - 8, 0xFFFFFFFF).to_bytes(4, form.order)
    elif form is _W64:
        patches[start + 16] = whole.to_bytes(8, form.order)
    if source.read(start, 4) == b"BW64":
        patches[start] = b"RF64"
    pieces: list[Piece] = []
    for at, written in sorted(patches.items()):
        pieces += [(start, at), written]
        start = at + len(written)
    return [*pieces, (start, header.sound + length)]
