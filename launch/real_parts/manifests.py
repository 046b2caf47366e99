"""Makes manifests of the recordings: JSON lines with ``path`` (relative to the manifest), ``text``, ``language``, ``seconds``.

Telephone prompts are taken where all of these hold:

- the recording lies in the voice's own folder, not in one of those below it (digits, letters, single words, silence);
- its text has at least four words, separated by spaces;
- its text has no brackets of any kind, which mark sounds and remarks;
- it lasts at most 30 seconds;
- every question mark of its text ends a sentence: some Italian texts have question marks in the place of lost letters.

Of those, as many as the set wants, in the order of the SHA-256 of their name: a choice that no version of Python changes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import soundfile

from ichigo_jax import storage
from ichigo_jax.errors import InputError
from real_parts.table import PROMPT_TEXTS, RecordingSet

LEAST_WORDS = 4
MOST_SECONDS = 30.0
BRACKETS = re.compile(r"[\[\](){}<>]")

Row = dict[str, object]


def read_texts(path: Path) -> dict[str, str]:
    """The texts of telephone prompts by the name of the recording, in the order of the file.

    The file has lines ``name: text``; those that begin with ``;`` are comments. Of two texts for a name the first counts.

    Raises:
      InputError: not such a file.
    """
    try:
        content = gzip.decompress(path.read_bytes()).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: expected a gzip file of UTF-8 texts, found {error}; remove its folder and fetch again"
        ) from None
    texts: dict[str, str] = {}
    for line in content.split("\n"):
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            texts.setdefault(name.strip(), " ".join(text.split()))
    return texts


def prompts(part: Path, wanted: RecordingSet) -> list[Row]:
    """Rows of the telephone prompts that this module's rules choose, sorted by path, which is relative to ``part``.

    Raises:
      InputError: the texts or a recording cannot be read.
    """
    fitting = []
    for name, text in read_texts(part / wanted.texts).items():
        if "/" in name or len(text.split()) < LEAST_WORDS or BRACKETS.search(text) or has_lost_letters(text):
            continue
        path = part / "sounds" / f"{name}.wav"
        if path.is_file() and (seconds := _seconds(path)) <= MOST_SECONDS:
            fitting.append({"path": f"sounds/{name}.wav", "text": text, "language": wanted.language, "seconds": seconds})
    fitting.sort(key=lambda row: hashlib.sha256(row["path"].encode()).hexdigest())
    return sorted(fitting[: wanted.clips], key=lambda row: row["path"])


def has_lost_letters(text: str) -> bool:
    """Whether a question mark stands where no sentence ends, as in ``La conferenza ? piena.``, or a replacement character."""
    if "\ufffd" in text:
        return True
    rests = (text[match.end() :] for match in re.finditer(r"\?", text))
    return any(rest.strip() and not re.match(r"\s+\W*[A-ZÀ-ÞЀ-Я]", rest) for rest in rests)


def sentences(part: Path, wanted: RecordingSet) -> list[Row]:
    """Rows of read sentences, in the order of the texts, whose lines are ``<s> text </s> (name)``; paths as in ``prompts``.

    Raises:
      InputError: a line of another form, or a recording that cannot be read.
    """
    rows = []
    for line in (part / wanted.texts).read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"<s>(.*)</s>\s*\((\S+)\)", line.strip())
        if match is None:
            raise InputError(f"{part / wanted.texts}: expected lines of '<s> text </s> (name)', found {line[:60]!r}")
        path = f"sounds/{match[2]}.wav"
        text = " ".join(match[1].split())
        rows.append({"path": path, "text": text, "language": wanted.language, "seconds": _seconds(part / path)})
    return rows[: wanted.clips]


def write_manifests(sets: Iterable[RecordingSet], folder: Path) -> None:
    """Writes ``folder/manifests/NAME.jsonl`` of every set whose part is in ``folder``, and says how much it holds.

    Raises:
      InputError: a recording or text cannot be read.
    """
    for wanted in sets:
        part = folder / wanted.part
        if not part.is_dir():
            continue
        rows = (prompts if wanted.texts == PROMPT_TEXTS else sentences)(part, wanted)
        path = folder / "manifests" / f"{wanted.name}.jsonl"
        lines = [json.dumps({**row, "path": f"../{wanted.part}/{row['path']}"}, ensure_ascii=False) + "\n" for row in rows]
        with storage.atomic_write(path, replace=True) as partial:
            partial.write_text("".join(lines), encoding="utf-8")
        changed = "" if len(rows) == wanted.clips else f"; {wanted.clips} were expected, the package has changed"
        print(f"{path}: {len(rows)} clips, {sum(row['seconds'] for row in rows):.1f} seconds{changed}", flush=True)


def _seconds(path: Path) -> float:
    try:
        return round(soundfile.info(path).duration, 4)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path}: expected a recording, found {error}; remove its folder and fetch again") from None
