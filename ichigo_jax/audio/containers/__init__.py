"""Where the sound lies in a file, and how much of it: decoders trust headers, which lie, and stop where files were joined.

``find_sound`` tells the parts of a file that a decoder takes one by one. In most files that is the whole file as it stands, and
to find that out costs little beside decoding it.
"""

from __future__ import annotations

from ichigo_jax.audio.containers import chunks, flac, mpeg, ogg
from ichigo_jax.audio.containers.source import Damage, Part, PartFile, Sound, SourceFile, Unsupported
from ichigo_jax.audio.containers.tags import start_of_sound

__all__ = ["Damage", "Part", "PartFile", "Sound", "SourceFile", "Unsupported", "find_sound"]


def find_sound(source: SourceFile) -> Sound:
    """The parts of a file, by its first bytes.

    Raises:
      Damage: sound is missing.
      Unsupported: a format that is known but cannot be decoded.
    """
    start = start_of_sound(source)
    head = source.read(start, 40)
    if head.startswith(ogg.MAGIC):
        return ogg.ogg_sound(source)
    if head.startswith(flac.MAGIC):
        return flac.flac_sound(source)
    if chunks.is_chunked(head):
        return chunks.chunk_sound(source)
    if name := _foreign(head):
        raise Unsupported(name)
    if start or mpeg.frame_header(head[:4]):
        return mpeg.mpeg_sound(source)
    return Sound()


def _foreign(head: bytes) -> str | None:
    """The name of a format that only programs for video and telephones read."""
    if head[4:8] == b"ftyp":
        return "an MP4 file (m4a, mp4, mov, 3gp)"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "a Matroska file (webm, mka, mkv)"
    if head.startswith(b"#!AMR"):
        return "an AMR file"
    if head.startswith(bytes.fromhex("3026b2758e66cf11")):
        return "a Windows Media file (wma, asf)"
    if head[:2] in (b"\xff\xf1", b"\xff\xf9", b"\xff\xf0", b"\xff\xf8") or head.startswith(b"ADIF"):
        return "an AAC stream"
    if head.startswith((b"FLV\x01", b".RMF", b"MAC ", b"wvpk", b"OptimFROG", b"TTA1", b"MThd")):
        return f"a {head[:4].decode('ascii').strip(' .' + chr(1))} file"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "an AVI file"
    return None
