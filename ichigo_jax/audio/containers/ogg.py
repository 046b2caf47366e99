"""Ogg: links of a chain, each decoded by itself (https://www.rfc-editor.org/rfc/rfc3533).

A stream is cut into pages, and each says whether it begins or ends the stream. Files that were joined, and recorders that
pause, put one stream behind the other; players go on, but decoders stop at the end of the first one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from ichigo_jax.audio.containers.flac import flac_streams
from ichigo_jax.audio.containers.source import Damage, Part, Piece, Sound, SourceFile, Unsupported
from ichigo_jax.audio.containers.tags import end_of_sound, start_of_sound, tag_length

MAGIC = b"OggS"

_HEADER = 27
_LARGEST_PAGE = _HEADER + 255 + 255 * 255
_BEGINS, _ENDS = 2, 4  # flags of a page
_CODECS = {b"OpusHead": "Opus", b"\x01vorbis": "Vorbis", b"\x7fFLAC": "FLAC", b"Speex   ": "Speex"}
_FLAC_MAPPING_HEADER = 9  # bytes before "fLaC" in the first packet


class Page(NamedTuple):
    start: int
    body: int  # where it begins
    stop: int
    flags: int
    granule: int
    serial: bytes
    number: int


@dataclasses.dataclass
class Link:
    """One stream of a chain, and those that run beside it (a picture, another language)."""

    serials: set[bytes]
    codec: str | None = None
    serial: bytes | None = None  # of the first stream of sound
    pages: list[Page] = dataclasses.field(default_factory=list)
    others: bool = False  # whether pages of other streams lie between


def ogg_sound(source: SourceFile) -> Sound:
    """The links of a chain.

    A page that is not whole, at the end or where files were joined, is refused: sound was cut off. A last page that is whole
    but does not end the stream may be a recorder that was switched off, and then nothing was lost; or a file that was cut
    exactly between two pages. Nobody can know, so it is a doubt. So are numbers of pages that are missing, except straight
    after the stream's head, where radio stations send the pages of the moment.

    Raises:
      Damage: a page that is not whole.
      Unsupported: a stream of sound that libsndfile cannot decode.
    """
    doubts: list[str] = []
    links: list[Link] = []
    strays = 0
    in_head = False
    for page in _pages(source, doubts):
        if page.flags & _BEGINS:
            if not in_head:
                links.append(Link(set()))
            in_head = True
            _begin(links[-1], page, source)
        else:
            in_head = False
        if not links or page.serial not in links[-1].serials:
            strays += 1
        elif page.serial == links[-1].serial:
            links[-1].pages.append(page)
        else:
            links[-1].others = True
    if strays:
        doubts.append(f"{strays} Ogg pages of a stream whose start is missing")
    spoken = [link for link in links if link.codec]
    doubts += [doubt for link in spoken for doubt in _doubts(link)]
    if len(links) == 1 and spoken and links[0].codec != "FLAC" and not links[0].others and not strays:
        if links[0].pages[0].start == 0:  # no tag before it, which the decoder takes for something else
            return Sound((Part(),), doubts)
    parts = []
    for link in spoken:
        if link.codec == "FLAC":
            parts += _unpacked_flac(link, source)
        else:
            parts.append(Part(_joined((page.start, page.stop) for page in link.pages)))
    return Sound(parts or (Part(),), doubts)


def _begin(link: Link, page: Page, source: SourceFile) -> None:
    link.serials.add(page.serial)
    head = source.read(page.body, 8)
    codec = next((name for magic, name in _CODECS.items() if head.startswith(magic)), None)
    if codec == "Speex":
        raise Unsupported("Speex in Ogg")
    if codec and not link.codec:
        link.codec, link.serial = codec, page.serial


def _doubts(link: Link) -> Iterator[str]:
    pages = link.pages
    gaps = [after for before, after in zip(pages, pages[1:]) if after.number != before.number + 1 and before.granule > 0]
    if gaps:
        yield f"{len(gaps)} gap{'s' if len(gaps) > 1 else ''} in the numbers of its Ogg pages, the first at byte {gaps[0].start}"
    ended = next((index for index, page in enumerate(pages) if page.flags & _ENDS), None)
    if ended is None:
        yield "no page that ends its Ogg stream"
    elif ended != len(pages) - 1:
        yield f"{len(pages) - 1 - ended} Ogg pages after the one that ends the stream"


def _pages(source: SourceFile, doubts: list[str]) -> Iterator[Page]:
    """All pages, in order."""
    start, stop = start_of_sound(source), end_of_sound(source)
    window, base = b"", start
    while start < stop:
        at = start - base
        if at + _LARGEST_PAGE > len(window) and base + len(window) < stop:
            window, base, at = source.window(start, stop), start, 0
        if window[at : at + 4] != MAGIC:
            start = _after_junk(source, start, stop, doubts)
            continue
        segments = window[at + _HEADER - 1] if at + _HEADER <= len(window) else 0
        body = at + _HEADER + segments
        end = body + sum(window[at + _HEADER : body])
        if end > len(window) or segments == 0 and at + _HEADER > len(window):
            raise Damage(f"found its last Ogg page cut off at byte {stop}, expected a whole one; the file is cut short")
        if window[end : end + 4] != MAGIC and end < len(window) and window.find(MAGIC, at + 4, end + 3) >= 0:
            raise Damage(
                f"found an Ogg page at byte {start} that is cut off, expected a whole one; a part of the sound is missing"
            )
        yield Page(
            start=start,
            body=base + body,
            stop=base + end,
            flags=window[at + 5],
            granule=int.from_bytes(window[at + 6 : at + 14], "little", signed=True),
            serial=window[at + 14 : at + 18],
            number=int.from_bytes(window[at + 18 : at + 22], "little"),
        )
        start = base + end


def _after_junk(source: SourceFile, start: int, stop: int, doubts: list[str]) -> int:
    """Where the next page begins after bytes that belong to none."""
    if length := tag_length(source, start):
        return start + length
    if stop - start < len(MAGIC) and MAGIC.startswith(source.read(start, stop - start)):
        raise Damage(f"found its last Ogg page cut off at byte {stop}, expected a whole one; the file is cut short")
    found = source.find(MAGIC, start)
    end = found if 0 <= found < stop else stop
    if source.read(start, end - start).strip(b"\0"):
        doubts.append(f"{end - start} bytes at byte {start} that belong to no Ogg page")
    return end


def _joined(ranges: Iterator[tuple[int, int]]) -> list[Piece]:
    """Ranges that touch become one."""
    joined: list[Piece] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def _unpacked_flac(link: Link, source: SourceFile) -> list[Part]:
    """FLAC without the pages around it: the packets of its mapping are a FLAC file (https://xiph.org/flac/ogg_mapping.html)."""
    first, *others = link.pages
    pieces = _joined((page.body, page.stop) for page in others)
    return flac_streams(source, [(first.body + _FLAC_MAPPING_HEADER, first.stop), *pieces])
