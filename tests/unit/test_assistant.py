"""The assistant and the commands around it, on random models."""

import dataclasses
import json
import types

import numpy as np
import pytest
from test_generation import save_tiny_model

import ichigo_jax
from ichigo_jax import generate
from ichigo_jax.data.audio_files import list_audio
from ichigo_jax.decoding.sampling import Sampling
from ichigo_jax.errors import InputError
from ichigo_jax.inference.assistant import Assistant, Spoken
from ichigo_jax.inference.language_model import LanguageModel
from ichigo_jax.text import SoundCodes, encode_chat, transcription_request
from ichigo_jax.text.prompts import TRANSCRIPTION_PROMPTS

CLIP = np.zeros(1600, np.float32)
SHORT = {"max_new_tokens": 12}


class Ears:
    """A speech tokenizer that hears the same codes in everything."""

    def __init__(self, fingerprint="f" * 16, codes=5, quantizers=1):
        self.fingerprint = fingerprint
        self.config = types.SimpleNamespace(quantizer=types.SimpleNamespace(codes=codes, num_quantizers=quantizers))

    def encode(self, audio):
        return [np.array([3, 3, 0], np.int32) for _ in audio]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assistant")
    save_tiny_model(folder)
    return folder / "model"


@pytest.fixture(scope="module")
def language_model(folder):
    return LanguageModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def assistant(language_model):
    return Assistant(language_model, Ears())


def answer_to(language_model, messages, **options):
    tokenizer = language_model.tokenizer
    prompt = encode_chat(tokenizer, messages, add_generation_prompt=True).ids
    return tokenizer.decode(language_model.generate([prompt], **(SHORT | options))[0])


class TestAssistant:
    def test_hears_the_codes(self, assistant, language_model):
        heard = {"role": "user", "content": [SoundCodes([3, 3, 0])]}
        assert assistant.reply(CLIP, **SHORT) == answer_to(language_model, [heard])
        before = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        assert assistant.reply(CLIP, before, **SHORT) == answer_to(language_model, [*before, heard])
        assert assistant.reply(messages=before[:1], **SHORT) == answer_to(language_model, before[:1])

    def test_transcribes(self, assistant, language_model):
        request = [{"role": "user", "content": transcription_request(SoundCodes([3, 3, 0]), "vi", 2)}]
        assert assistant.transcribe(CLIP, language="vi", wording=2, **SHORT) == answer_to(language_model, request)
        assert request[0]["content"][0] == TRANSCRIPTION_PROMPTS["vi"][2]
        with pytest.raises(InputError, match="wording 6 found, expected 0 to 5"):
            assistant.transcribe(CLIP, language="vi", wording=6, **SHORT)

    def test_hears_in_the_form_it_was_trained_on(self, language_model):
        texts = language_model.tokenizer
        trained = types.SimpleNamespace(config=language_model.config, tokenizer=texts, chat_tokenizer=texts)
        for form, compressed in (("plain", False), ("compressed", True)):
            trained.provenance = language_model.provenance | {"sound_form": form}
            assert Assistant(trained, Ears()).hear([CLIP, CLIP]) == [SoundCodes([3, 3, 0], compressed)] * 2

    @pytest.mark.parametrize("options", [{}, {"sampling": Sampling(temperature=1.0), "seed": 5}])
    def test_stream_is_the_reply_in_pieces(self, assistant, options):
        pieces = list(assistant.stream(CLIP, **SHORT, **options))
        assert "".join(pieces) == assistant.reply(CLIP, **SHORT, **options)
        assert len(pieces) > 1 and all(pieces)

    def test_another_speech_tokenizer_is_refused(self, language_model):
        with pytest.raises(InputError, match=r"tokenizer a{16} found, .* trained with f{16} \(ears\); .*allow_other"):
            Assistant(language_model, Ears("a" * 16))
        Assistant(language_model, Ears("a" * 16), allow_other_speech_tokenizer=True)

    def test_an_unrecorded_speech_tokenizer_is_a_warning(self, folder):
        language_model = LanguageModel.from_pretrained(folder)
        del language_model.provenance["speech_tokenizer_fingerprint"]
        with pytest.warns(UserWarning, match="does not record"):
            Assistant(language_model, Ears())

    def test_refusals(self, assistant, language_model):
        with pytest.raises(InputError, match="neither audio nor messages"):
            assistant.reply()
        with pytest.raises(InputError, match="no speech tokenizer"):
            Assistant(language_model, None).reply(CLIP)
        with pytest.raises(InputError, match="2 quantisers of 5 codes"):
            Assistant(language_model, Ears(quantizers=2))
        with pytest.raises(InputError, match="quantisers of 9 codes"):
            Assistant(language_model, Ears(codes=9), allow_other_speech_tokenizer=True)

    def test_a_clip_without_a_sound_token(self, language_model):
        """Nothing was said in it, so nothing is answered; a model that is asked all the same makes something up."""
        ears = Ears()
        ears.encode = lambda audio: [np.zeros(0, np.int32)] * len(audio)
        assistant = Assistant(language_model, ears)
        assert assistant.transcribe(CLIP, **SHORT) == ""
        with pytest.raises(InputError, match="clip 0: found too little sound for one sound token"):
            assistant.reply(CLIP, **SHORT)
        with pytest.raises(InputError, match="clip 0: found too little sound"):
            list(assistant.stream(CLIP, [{"role": "user", "content": "hi"}], **SHORT))
        ears.encode = lambda audio: [np.array([3], np.int32), np.zeros(0, np.int32)]
        with pytest.raises(InputError, match="short.wav: found too little sound"):
            assistant.hear([CLIP, "short.wav"])


class KeenEars(Ears):
    """Hears other codes in every clip: as many as it has hundreds of samples, and in a file those of its name."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def encode(self, audio):
        self.heard.append(list(audio))
        return [np.arange(int(clip.split(".")[0]) if isinstance(clip, str) else len(clip) // 100) % 4 for clip in audio]


def clip(codes):
    return np.zeros(100 * codes, np.float32)


def codes(count):
    return SoundCodes([code % 4 for code in range(count)])


class TestReplies:
    SYSTEM = {"role": "system", "content": "Sing."}

    # Pairs of a conversation and how the language model sees it.
    CONVERSATIONS = [
        (
            [SYSTEM, {"role": "user", "content": Spoken(clip(3))}],
            [SYSTEM, {"role": "user", "content": [codes(3)]}],
        ),
        (
            [{"role": "user", "content": "hi"}],
            [{"role": "user", "content": "hi"}],
        ),
        (
            [
                {"role": "user", "content": Spoken("5.wav")},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "and then?"},
                {"role": "assistant", "content": "no"},
                {"role": "user", "content": ["listen: ", Spoken(clip(2)), " and ", Spoken(clip(4)), "?"]},
            ],
            [
                {"role": "user", "content": [codes(5)]},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "and then?"},
                {"role": "assistant", "content": "no"},
                {"role": "user", "content": ["listen: ", codes(2), " and ", codes(4), "?"]},
            ],
        ),
    ]

    @pytest.fixture
    def assistant(self, language_model):
        return Assistant(language_model, KeenEars())

    def test_several_conversations_with_speech_anywhere(self, assistant, language_model):
        found = assistant.replies([given for given, _ in self.CONVERSATIONS], **SHORT)
        assert found == [answer_to(language_model, seen) for _, seen in self.CONVERSATIONS]
        (batch,) = assistant.speech_tokenizer.heard
        assert len(batch) == 4, "all clips of all conversations are heard at once"
        assert assistant.replies([]) == []

    def test_reply_and_stream_take_speech_in_their_messages(self, assistant, language_model):
        for given, seen in self.CONVERSATIONS:
            expected = answer_to(language_model, seen)
            assert assistant.reply(messages=given, **SHORT) == expected
            assert "".join(assistant.stream(messages=given, **SHORT)) == expected
        given, seen = self.CONVERSATIONS[0]
        newest = {"role": "user", "content": [codes(6)]}
        between = {"role": "assistant", "content": "ok"}
        expected = answer_to(language_model, [*seen, between, newest])
        assert assistant.reply(clip(6), [*given, between], **SHORT) == expected

    def test_every_conversation_has_options_of_its_own(self, assistant, language_model):
        options = {"sampling": [Sampling(), Sampling(1.5), Sampling(0.7)], "seed": [3, 4, 5]}
        found = assistant.replies([given for given, _ in self.CONVERSATIONS], **SHORT, **options)
        for answer, (given, _), sampling, seed in zip(found, self.CONVERSATIONS, *options.values(), strict=True):
            assert answer == assistant.reply(messages=given, sampling=sampling, seed=seed, **SHORT)

    def test_what_is_given_stays_as_it_was(self, assistant):
        part = Spoken(clip(1))
        conversation = [{"role": "user", "content": ["a ", part]}]
        assistant.replies([conversation], **SHORT)
        assert conversation == [{"role": "user", "content": ["a ", part]}]

    @pytest.mark.parametrize(
        "conversation, fault",
        [
            ([], "conversation 1: found neither audio nor messages"),
            ([{"role": "user", "content": Spoken(clip(0))}], "clip 1: found too little sound for one sound token"),
            ([{"role": "user", "content": [Spoken("0.wav")]}], "0.wav: found too little sound for one sound token"),
            ([{"role": "guest", "content": Spoken(clip(1))}], "message 0: role 'guest' found"),
            ([{"role": "user", "content": [clip(1)]}], "message 0: content .* found, expected text"),
            (["hi"], "message 0: found 'hi', expected"),
        ],
    )
    def test_refusals(self, assistant, conversation, fault):
        with pytest.raises(InputError, match=fault) as error:
            assistant.replies([self.CONVERSATIONS[0][0], conversation], **SHORT)
        assert "\n" not in str(error.value)

    def test_speech_needs_ears(self, language_model):
        deaf = Assistant(language_model, None)
        with pytest.raises(InputError, match="no speech tokenizer"):
            deaf.replies([self.CONVERSATIONS[1][0], self.CONVERSATIONS[0][0]], **SHORT)
        assert deaf.replies([self.CONVERSATIONS[1][0]], **SHORT) == [answer_to(language_model, self.CONVERSATIONS[1][1])]

    def test_the_package_has_the_names(self):
        assert ichigo_jax.Spoken is Spoken and ichigo_jax.Sampling is Sampling
        assert ichigo_jax.WHISPER_DEFAULTS.replace(language="vi") == ichigo_jax.DecodingOptions(
            **(dataclasses.asdict(ichigo_jax.WHISPER_DEFAULTS) | {"language": "vi"})
        )


class TestGenerateCommand:
    def run(self, capsys, *arguments):
        with pytest.raises(SystemExit) as exit:
            generate.main([*map(str, arguments), "--max-new-tokens", "12"])
        return exit.value.code, capsys.readouterr()

    def test_text(self, folder, language_model, capsys):
        messages = [{"role": "system", "content": "Sing."}, {"role": "user", "content": "hi"}]
        code, printed = self.run(capsys, "--model", folder, "--prompt", "hi", "--system", "Sing.")
        assert code == 0 and printed.out == answer_to(language_model, messages) + "\n"

    def test_audio_as_json(self, folder, language_model, monkeypatch, capsys):
        monkeypatch.setattr(ichigo_jax, "SpeechTokenizer", types.SimpleNamespace(from_pretrained=lambda _: Ears()), raising=False)
        code, printed = self.run(
            capsys, "--model", folder, "--audio", "a.wav", "--speech-tokenizer", "ears", "--json", "--temperature", "1"
        )
        expected = answer_to(language_model, [{"role": "user", "content": [SoundCodes([3, 3, 0])]}], sampling=Sampling(1.0))
        assert code == 0 and json.loads(printed.out) == {"audio": "a.wav", "text": expected}

    def test_every_way_to_choose_is_passed_on(self, folder, language_model, capsys):
        sampling = Sampling(temperature=1.5, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
        options = {"sampling": sampling, "seed": 7}
        flags = [
            part for name, value in {**sampling._asdict(), "seed": 7}.items() for part in (f"--{name.replace('_', '-')}", value)
        ]
        code, printed = self.run(capsys, "--model", folder, "--prompt", "hi", *flags)
        assert code == 0 and printed.out == answer_to(language_model, [{"role": "user", "content": "hi"}], **options) + "\n"

    def test_quantized(self, folder, capsys):
        quantized = LanguageModel.from_pretrained(folder, quantize="int4", group_size=8)
        code, printed = self.run(capsys, "--model", folder, "--prompt", "hi", "--quantize", "int4", "--group-size", 8)
        assert code == 0 and printed.out == answer_to(quantized, [{"role": "user", "content": "hi"}]) + "\n"
        code, printed = self.run(capsys, "--model", folder, "--prompt", "hi", "--quantize", "int4")
        assert code == 2 and "expected a group size" in printed.err and printed.err.count("\n") == 1

    def test_another_speech_tokenizer_is_refused(self, folder, monkeypatch, capsys):
        other = types.SimpleNamespace(from_pretrained=lambda _: Ears("a" * 16))
        monkeypatch.setattr(ichigo_jax, "SpeechTokenizer", other, raising=False)
        arguments = ["--model", folder, "--audio", "a.wav", "--speech-tokenizer", "ears"]
        code, printed = self.run(capsys, *arguments)
        assert code == 2 and printed.out == "" and "trained with ffffffffffffffff (ears)" in printed.err
        assert self.run(capsys, *arguments, "--allow-other-speech-tokenizer")[0] == 0

    def test_bad_input_is_one_line(self, folder, tmp_path, capsys):
        code, printed = self.run(capsys, "--model", folder, "--audio", "a.wav")
        assert code == 2 and "--speech-tokenizer" in printed.err and printed.err.count("\n") == 1
        code, printed = self.run(capsys, "--model", tmp_path / "none", "--prompt", "x")
        assert code == 2 and "expected a model folder" in printed.err and printed.err.count("\n") == 1


class TestListAudio:
    def test_files_folders_and_manifests(self, tmp_path):
        for name in ("b.wav", "a.FLAC", "notes.txt", "deep/c.mp3"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).touch()
        manifest = tmp_path / "list.jsonl"
        manifest.write_text('{"path": "in/b.wav", "text": "x"}\n{"path": "gone.wav"}\n')
        inside = tmp_path / "in"
        names = [str(inside / name) for name in ("a.FLAC", "b.wav", "deep/c.mp3")]
        assert list_audio([inside]) == [{"path": name} for name in names]
        assert list_audio([manifest, inside / "notes.txt", inside / "b.wav"]) == [
            {"path": str(inside / "b.wav"), "text": "x"},
            {"path": str(tmp_path / "gone.wav")},
            {"path": str(inside / "notes.txt")},
        ]

    def test_refusals(self, tmp_path):
        with pytest.raises(InputError, match="no such file or folder"):
            list_audio([tmp_path / "x"])
        with pytest.raises(InputError, match="no audio files found"):
            list_audio([tmp_path])
        (tmp_path / "m.jsonl").write_text('{"text": "x"}\n')
        with pytest.raises(InputError, match="row 1 has no 'path'"):
            list_audio([tmp_path / "m.jsonl"])
