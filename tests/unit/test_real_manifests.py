"""The recordings among the real parts become manifests: which are chosen, and what their rows say."""

import gzip
import hashlib
import importlib
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ichigo_jax.data.audio_files import read_manifest
from ichigo_jax.errors import InputError


@pytest.fixture(scope="module")
def real_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "launch")
        importlib.import_module("real_parts.manifests")
        yield importlib.import_module("real_parts")


def record(path, seconds, rate=8000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(int(seconds * rate), np.float32), rate, subtype="PCM_16")


def prompt_part(folder, texts, seconds=1.0, encoding="utf-8"):
    folder.mkdir(parents=True)
    (folder / "texts.txt.gz").write_bytes(gzip.compress(texts.encode(encoding)))
    for line in texts.splitlines():
        name = line.split(":")[0].strip()
        if ":" in line and not line.startswith(";") and not name.startswith("lost"):
            record(folder / "sounds" / f"{name}.wav", 30.5 if name.startswith("long") else seconds)
    return folder


def chosen(real_parts, part, clips=100, language="en"):
    wanted = real_parts.table.RecordingSet("set", part.name, "texts.txt.gz", language, clips)
    return real_parts.manifests.prompts(part, wanted)


def test_prompts_are_chosen_by_the_rules(real_parts, tmp_path):
    texts = """; Core sounds: a comment of many words

agent-pass: Please enter your  password: then press pound.
three: only three words
four: these are four words
lost-recording: there is no recording here
tone: [this is a tone]
remark: this is said (in a whisper)
digits/one: one one one one
long-text: this one lasts too long
empty:
four: the second text does not count
which: Which folder? Press one now.
"""
    rows = chosen(real_parts, prompt_part(tmp_path / "prompts-en", texts))
    assert rows == [
        {
            "path": "sounds/agent-pass.wav",
            "text": "Please enter your password: then press pound.",
            "language": "en",
            "seconds": 1.0,
        },
        {"path": "sounds/four.wav", "text": "these are four words", "language": "en", "seconds": 1.0},
        {"path": "sounds/which.wav", "text": "Which folder? Press one now.", "language": "en", "seconds": 1.0},
    ]


@pytest.mark.parametrize(
    "text, lost",
    [
        ("La conferenza ? piena.", True),
        ("Al segnale acustico, il tempo sar? esattamente..", True),
        ("Non esiste la citt?.", True),
        ("caract\ufffdre perdu ici", True),
        ("Login non corretta. Casella di posta?", False),
        ("En que carpeta desea guardar el mensaje ?", False),
        ("Голосовая почта. Номер абонента? Нажмите один.", False),
        ("¿Desea continuar? ¿O prefiere salir?", False),
        ("no question at all", False),
    ],
)
def test_texts_that_lost_letters_are_seen(real_parts, text, lost):
    assert real_parts.manifests.has_lost_letters(text) is lost


def test_a_byte_order_mark_and_other_alphabets_are_read(real_parts, tmp_path):
    texts = "; Elenco completo\nsaluto: Prego digitare la città.\nпривет: Введите номер оператора сейчас.\n"
    rows = chosen(real_parts, prompt_part(tmp_path / "prompts-it", texts, encoding="utf-8-sig"), language="it")
    assert [row["text"] for row in rows] == ["Prego digitare la città.", "Введите номер оператора сейчас."]


def test_the_choice_is_the_same_every_time(real_parts, tmp_path):
    texts = "".join(f"prompt-{number}: this is prompt {number}\n" for number in range(30))
    part = prompt_part(tmp_path / "prompts-es", texts, seconds=0.1)
    rows = chosen(real_parts, part, clips=5)
    # The five whose names have the least SHA-256, whatever the version of Python.
    names = sorted((f"sounds/prompt-{n}.wav" for n in range(30)), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert [row["path"] for row in rows] == sorted(names[:5])
    assert {row["path"] for row in rows} < {row["path"] for row in chosen(real_parts, part, clips=9)}


def test_sentences_of_a_novel_become_rows(real_parts, tmp_path):
    part = tmp_path / "librivox"
    for name in ("novel-0870", "novel-0880"):
        record(part / "sounds" / f"{name}.wav", 2.5, rate=16000)
    texts = part / "sounds" / "transcription"
    texts.write_text("<s> and mister john  had leisure </s> (novel-0870)\n<s> he was young </s> (novel-0880)\n")
    wanted = real_parts.table.RecordingSet("librivox", "librivox", "sounds/transcription", "en", 5)
    assert real_parts.manifests.sentences(part, wanted) == [
        {"path": "sounds/novel-0870.wav", "text": "and mister john had leisure", "language": "en", "seconds": 2.5},
        {"path": "sounds/novel-0880.wav", "text": "he was young", "language": "en", "seconds": 2.5},
    ]
    texts.write_text("he was young\n")
    with pytest.raises(InputError, match=r"transcription: expected lines of .* found 'he was young'"):
        real_parts.manifests.sentences(part, wanted)


def test_manifests_are_read_by_the_commands(real_parts, tmp_path, capfd):
    prompt_part(tmp_path / "prompts-fr", "annonce: Composez votre numéro d'agent.\nautre: Veuillez rester en ligne.\n")
    sets = [
        real_parts.table.RecordingSet("french_prompts", "prompts-fr", "texts.txt.gz", "fr", 2),
        real_parts.table.RecordingSet("other_prompts", "prompts-xx", "texts.txt.gz", "xx", 2),
    ]
    real_parts.manifests.write_manifests(sets, tmp_path)
    rows = read_manifest(tmp_path / "manifests" / "french_prompts.jsonl", fields=("text", "language"))
    assert [(Path(row["path"]).is_file(), row["text"]) for row in rows] == [
        (True, "Composez votre numéro d'agent."),
        (True, "Veuillez rester en ligne."),
    ]
    assert [path.name for path in (tmp_path / "manifests").iterdir()] == ["french_prompts.jsonl"]
    assert "french_prompts.jsonl: 2 clips, 2.0 seconds\n" in capfd.readouterr().out


def test_fewer_recordings_than_expected_are_told(real_parts, tmp_path, capfd):
    prompt_part(tmp_path / "prompts-fr", "annonce: Composez votre numéro d'agent.\n")
    wanted = real_parts.table.RecordingSet("french_prompts", "prompts-fr", "texts.txt.gz", "fr", 2)
    real_parts.manifests.write_manifests([wanted], tmp_path)
    assert "1 clips, 1.0 seconds; 2 were expected, the package has changed" in capfd.readouterr().out


@pytest.mark.parametrize("name, content", [("texts.txt.gz", b"plain text"), ("sounds/annonce.wav", b"RIFF")])
def test_unreadable_recordings_and_texts_are_named(real_parts, tmp_path, name, content):
    part = prompt_part(tmp_path / "prompts-fr", "annonce: Composez votre numéro d'agent.\n")
    (part / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: expected .* fetch again"):
        chosen(real_parts, part)
