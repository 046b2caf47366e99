"""Chat templates that ask for the date: the same ids on every day, in training, in answering and after conversions."""

import dataclasses
import datetime
import json
import locale
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import transformers.utils.chat_template_utils as transformers_templates
from flax import nnx
from transformers import AutoTokenizer

from converters import language_model as converter
from ichigo_jax.configuration import checked_date
from ichigo_jax.data.encoded import encode_rows
from ichigo_jax.data.row_formats import RowEncoder, RowFormat
from ichigo_jax.errors import InputError
from ichigo_jax.inference.language_model import LanguageModel
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.storage.model_folder import recorded_chat_date
from ichigo_jax.tasks import open_files
from ichigo_jax.text import TextTokenizer, chat_template, encode_chat, train_llama_tokenizer
from ichigo_jax.training.run_config import load

TURNS = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SYSTEM = "{{ '<|start_header_id|>system<|end_header_id|>\n\n' + day + '<|eot_id|>' }}"
ALWAYS = "{% set day = strftime_now('%d %b %Y') %}" + SYSTEM + TURNS
# As in Llama 3.2's and Llama 3.1's own.
LLAMA_32 = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{% set day = 'Today Date: ' + date_string %}"
) + (SYSTEM + TURNS)
LLAMA_31 = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{% set day = date_string %}" + (
    SYSTEM + TURNS
)
IN_A_MACRO = "{% macro today() %}{{ strftime_now('%A, %-d %B %Y, %H:%M') }}{% endmacro %}{% set day = today() %}" + SYSTEM + TURNS
IN_GENERATION = "{% generation %}{% set day = strftime_now('%d %b %Y') %}" + SYSTEM + "{% endgeneration %}" + TURNS
DATED = {"always": ALWAYS, "3.2": LLAMA_32, "3.1": LLAMA_31, "macro": IN_A_MACRO, "generation": IN_GENERATION}
CONFIGS = Path(__file__).parents[2] / "configs"
ASK = [{"role": "user", "content": "what day is it"}]


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dates") / "llama"
    train_llama_tokenizer(["what day is it", "it is a fine day"] * 3, folder, vocab_size=270, sound_codes=9, durations=True)
    return folder


@pytest.fixture
def loaded(plain_folder):
    """A template and a date to a tokenizer."""

    def load(template, chat_date=None):
        hf = AutoTokenizer.from_pretrained(plain_folder)
        hf.chat_template = template
        return TextTokenizer(hf, "here", chat_date)

    return load


@pytest.fixture
def today(monkeypatch):
    """Sets the date that transformers takes from the clock."""

    def set_date(year, month, day):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(year, month, day, 12, 34, 56)

        monkeypatch.setattr(transformers_templates, "datetime", Clock)

    return set_date


def asked(tokenizer):
    return tokenizer.decode(encode_chat(tokenizer, ASK, add_generation_prompt=True).ids, skip_special=False)


class TestRendering:
    @pytest.mark.parametrize("template", DATED.values(), ids=DATED)
    def test_ids_are_the_same_on_every_day(self, loaded, today, template):
        ids = []
        for day in [(2026, 11, 27), (2026, 12, 1), (2031, 1, 9)]:
            today(*day)
            ids.append(encode_chat(loaded(template), ASK, add_generation_prompt=True).ids)
        assert ids[0] == ids[1] == ids[2]

    def test_the_clock_would_show(self, plain_folder, today):
        hf = AutoTokenizer.from_pretrained(plain_folder)
        today(2031, 1, 9)
        assert "09 Jan 2031" in hf.apply_chat_template(ASK, chat_template=ALWAYS, tokenize=False)

    @pytest.mark.parametrize("template", DATED.values(), ids=DATED)
    def test_the_date_is_the_chosen_one(self, loaded, template):
        shown = {None: "26 Jul 2024", "2026-11-27": "27 Nov 2026", "1999-01-02": "02 Jan 1999"}
        in_macro = {None: "Friday, 26 July", "2026-11-27": "Friday, 27 November", "1999-01-02": "Saturday, 2 January"}
        for date, text in (in_macro if template == IN_A_MACRO else shown).items():
            tokenizer = loaded(template, date)
            assert text in asked(tokenizer)
            assert tokenizer.chat_date == (date or "2024-07-26")

    @pytest.mark.parametrize("template", [ALWAYS, LLAMA_32, IN_A_MACRO])
    def test_the_rest_is_as_transformers_renders_it(self, plain_folder, loaded, today, template):
        hf = AutoTokenizer.from_pretrained(plain_folder)
        today(2026, 11, 27)
        expected = hf.apply_chat_template(ASK, chat_template=template, tokenize=False, add_generation_prompt=True)
        assert asked(loaded(template, "2026-11-27")) == expected.replace("12:34", "00:00")

    def test_a_template_without_a_date_has_none(self, loaded, plain_folder):
        for template in (TURNS, "{% set date_string = 'x' %}{{ date_string }}" + TURNS, None, "{% broken"):
            assert loaded(template, "2026-11-27").chat_date is None
            assert loaded(template, "2026-11-27").fingerprint == loaded(template).fingerprint
        assert TextTokenizer.from_folder(plain_folder).chat_date is None

    def test_named_templates(self, loaded):
        tokenizer = loaded({"default": ALWAYS, "tool_use": TURNS}, "2026-11-27")
        assert "27 Nov 2026" in asked(tokenizer) and tokenizer.chat_date == "2026-11-27"
        with pytest.raises(InputError, match="no default"):
            encode_chat(loaded({"tool_use": TURNS, "rag": TURNS}), ASK, True)

    @pytest.mark.parametrize("draw", ["{{ ['a', 'b'] | random }}", "{{ lipsum() }}", "{% set x = 'ab' | list | random %}"])
    def test_templates_that_draw_at_random_are_refused(self, loaded, draw):
        with pytest.raises(InputError, match="the chat template refuses the conversation: it draws at random"):
            encode_chat(loaded(draw + TURNS), ASK, True)

    @pytest.mark.parametrize("template", ["{% broken", "{{ raise_exception('a\nb') }}", "{{ messages.nothing.at_all }}"])
    def test_what_templates_object_to_is_told_in_one_line(self, loaded, template):
        with pytest.raises(InputError, match="here: the chat template refuses the conversation: .") as error:
            encode_chat(loaded(template), ASK, True)
        assert "\n" not in str(error.value)

    def test_an_open_template_of_transformers_keeps_its_clock(self, plain_folder, loaded, today):
        asked(loaded(ALWAYS))
        today(2031, 1, 9)
        hf = AutoTokenizer.from_pretrained(plain_folder)
        assert "09 Jan 2031" in hf.apply_chat_template(ASK, chat_template=ALWAYS, tokenize=False)


class TestStrftime:
    FORMAT = "%a %A %b %B %c %d %-d %e %H:%M:%S %I %j %m %p %s %U %u %V %x %X %y %Y %Z %z %F %% %^b %Ey %h %G %r"
    WRITTEN = (
        "Sat Saturday Jul July Sat Jul  6 00:00:00 2024 06 6  6 00:00:00 12 188 07 AM 1720224000 26 6 27 07/06/24 00:00:00 24 "
        "2024 UTC +0000 2024-07-06 % JUL 24 Jul 2024 12:00:00 AM"
    )

    def test_literal(self):
        assert chat_template.strftime("2024-07-06", self.FORMAT) == self.WRITTEN

    def test_time_zone_and_locale_do_not_matter(self, monkeypatch):
        before = locale.setlocale(locale.LC_TIME)
        try:
            for zone, name in [("Asia/Ho_Chi_Minh", "vi_VN.UTF-8"), ("America/New_York", "de_DE.UTF-8"), ("Pacific/Apia", "C")]:
                monkeypatch.setenv("TZ", zone)
                time.tzset()
                try:
                    locale.setlocale(locale.LC_TIME, name)
                except locale.Error:
                    pass  # this machine does not have it; the names below are English in any case
                assert chat_template.strftime("2024-07-06", self.FORMAT) == self.WRITTEN
        finally:
            locale.setlocale(locale.LC_TIME, before)
            monkeypatch.undo()
            time.tzset()

    def test_names_come_from_no_locale(self, monkeypatch):
        """Stands in for a foreign locale on machines that have none: nothing here may ask datetime for a name."""
        asked_for = []

        class Watched(datetime.datetime):
            def strftime(self, format):
                asked_for.append(format)
                return super().strftime(format)

        monkeypatch.setattr(chat_template.datetime, "datetime", Watched)
        assert chat_template.strftime("2024-07-06", "%a %A %b %B %h %c %x %X %p %r %d") == (
            "Sat Saturday Jul July Jul Sat Jul  6 00:00:00 2024 07/06/24 00:00:00 AM 12:00:00 AM 06"
        )
        assert asked_for == ["%d"]

    @pytest.mark.parametrize("date", ["today", "2026-13-01", "27 Nov 2026", "20261127", "", 20261127, None])
    def test_what_is_no_date_is_refused(self, date, loaded):
        with pytest.raises(InputError, match=r"there: .* found, expected a date like '2026-11-27'"):
            checked_date(date, "there")
        if date:
            with pytest.raises(InputError, match="here: chat_date: "):
                loaded(ALWAYS, date)


class TestEncodedRows:
    def encode(self, tokenizer, folder):
        rows = folder / "rows.jsonl"
        if not rows.exists():
            rows.write_text(json.dumps({"tokens": [1, 2], "answer": "yes"}) + "\n")
        encoder = RowEncoder(RowFormat("instruction", None, None, False), tokenizer, 256, "all")
        examples = encode_rows(str(rows), encoder, folder / "encoded", lambda where, fault: None, processes=1)
        return examples[0].ids, {file.name for file in (folder / "encoded").iterdir()}

    @pytest.mark.parametrize("template", [ALWAYS, LLAMA_32, IN_A_MACRO])
    def test_another_day_is_the_same_key_and_the_same_ids(self, loaded, today, template, tmp_path):
        today(2026, 11, 27)
        ids, files = self.encode(loaded(template), tmp_path)
        (tmp_path / "again").mkdir()
        today(2026, 12, 1)
        assert self.encode(loaded(template), tmp_path)[1] == files
        assert np.array_equal(self.encode(loaded(template), tmp_path / "again")[0], ids)

    @pytest.mark.parametrize("template", [ALWAYS, LLAMA_31, IN_A_MACRO])
    def test_another_date_is_another_key_and_other_ids(self, loaded, template, tmp_path):
        ids, files = self.encode(loaded(template, "2026-11-27"), tmp_path)
        other_ids, more_files = self.encode(loaded(template, "2026-12-01"), tmp_path)
        assert files < more_files and not np.array_equal(ids, other_ids)

    def test_a_template_without_a_date_keeps_its_key(self, loaded, tmp_path):
        _, files = self.encode(loaded(TURNS, "2026-11-27"), tmp_path)
        assert self.encode(loaded(TURNS, "2026-12-01"), tmp_path)[1] == files


class TestRecorded:
    def record(self, folder, **values):
        folder.mkdir(exist_ok=True)
        (folder / "provenance.json").write_text(json.dumps(values))
        return folder

    def test_date_of_a_model_folder(self, tmp_path):
        assert recorded_chat_date(tmp_path / "none") is None
        assert recorded_chat_date(self.record(tmp_path / "undated")) is None
        assert recorded_chat_date(self.record(tmp_path / "dated", chat_date="2026-11-27")) == "2026-11-27"
        with pytest.raises(InputError, match="provenance.json: chat_date: 'soon' found"):
            recorded_chat_date(self.record(tmp_path / "broken", chat_date="soon"))

    def test_conversions_keep_it(self, tmp_path):
        folder = self.record(tmp_path / "dated", chat_date="2026-11-27", sound_form="plain", other=1)
        assert converter.heard_in_training(folder) == {"chat_date": "2026-11-27", "sound_form": "plain"}


class TestTraining:
    """A run tells its template one date, records it in the model, and what starts from the model is told it too."""

    @pytest.fixture
    def root(self, plain_folder, tmp_path):
        """Where ``nano_llama.py`` looks for its data."""
        tokenizer = tmp_path / "text_tokenizers" / "llama"
        shutil.copytree(plain_folder, tokenizer)
        write_json(tmp_path / "speech_tokenizer" / "model" / "provenance.json", {"fingerprint": "0123456789abcdef"})
        (tmp_path / "tokens.jsonl").write_text((json.dumps({"tokens": [1, 2], "answer": "yes"}) + "\n") * 8)
        return tmp_path

    def files(self, root, template=None, date=None, init_from=None, name="run"):
        if template is not None:
            (root / "text_tokenizers" / "llama" / "chat_template.jinja").write_text(template)
        flags = [] if date is None else [f"--config.data.chat_date={date}"]
        config = load(f"{CONFIGS / 'nano_llama.py'}:pretrain,smoke,root={root}", flags)
        source = {"path": str(root / "tokens.jsonl"), "format": "instruction", "column": None, "request": None, "weight": 1.0}
        config = dataclasses.replace(config, data={**config.data, "sources": [source]}, init_from=init_from)
        files = open_files(config if init_from is None else dataclasses.replace(config, model=None))
        files.open_data(root / name)
        return files

    def saved(self, files, folder):
        files.save(files.task.make_model(nnx.Rngs(0)), folder, {})
        return folder

    @pytest.mark.parametrize("template", [ALWAYS, LLAMA_32, LLAMA_31])
    def test_the_model_remembers_its_date(self, root, today, template):
        first = self.saved(self.files(root, template, "2026-11-27"), root / "first")
        assert read_json(first / "provenance.json")["chat_date"] == "2026-11-27"
        today(2031, 1, 9)
        assert "27 Nov 2026" in asked(LanguageModel.from_pretrained(first).tokenizer)
        following = self.files(root, init_from=str(first), name="next")
        assert following.tokenizer.chat_date == "2026-11-27"
        assert read_json(self.saved(following, root / "second") / "provenance.json")["chat_date"] == "2026-11-27"
        assert self.files(root, date="2027-01-01", init_from=str(first), name="other").tokenizer.chat_date == "2027-01-01"

    def test_without_a_choice_the_date_is_recorded_all_the_same(self, root):
        model = self.saved(self.files(root, ALWAYS), root / "model")
        assert read_json(model / "provenance.json")["chat_date"] == "2024-07-26"

    def test_a_template_without_a_date_records_none(self, root):
        assert "chat_date" not in read_json(self.saved(self.files(root, TURNS), root / "model") / "provenance.json")

    def test_a_resumed_run_finds_its_rows(self, root, today):
        today(2026, 11, 27)
        self.files(root, ALWAYS)
        files = {file.name: file.stat().st_mtime_ns for file in (root / "run" / "encoded").iterdir()}
        today(2026, 12, 1)
        self.files(root, ALWAYS)
        assert {file.name: file.stat().st_mtime_ns for file in (root / "run" / "encoded").iterdir()} == files

    @pytest.mark.parametrize("date", ["tomorrow", "27 Nov 2026", "2026-02-30"])
    def test_what_is_no_date_is_refused(self, root, date):
        with pytest.raises(InputError, match=f"config.data: chat_date: '{date}' found, expected a date"):
            self.files(root, ALWAYS, date)
