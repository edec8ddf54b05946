"""Files and configs on generated inputs: what is written comes back, and any bytes are read or refused clearly."""

import dataclasses
import json
import math
import tempfile
from functools import cache
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from generated import for_all, one_of, texts_with
from hypothesis import assume
from hypothesis import strategies as st

from minisr import InputError
from minisr.interop.chat_templates import chat_template
from minisr.runner.config import (
    CHOICES,
    LIMITS,
    PROMPT_SOURCES,
    Config,
    JudgeConfig,
    PretrainConfig,
    PromptConfig,
    SeedConfig,
    load_config,
    to_toml,
)
from minisr.runner.files import parse_json, read_json, read_jsonl, read_text, write_jsonl
from minisr.runner.json_records import read_records
from minisr.runner.lora import TARGETS, LoRAConfig
from minisr.runner.run import load_template
from minisr.runner.seed_data import read_instructions

# Records

RECORD_TEXTS = texts_with("\u2028", "\u2029", "\x85", "\r", "\n", "\x00", "\x1e", '"', "\\", "\\n", "\ufeff",
                          most=4)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)  # which are no JSON
PLAIN = one_of(None, True, False, 0, 1, 1.0, -0.0, 2**70, 1e-300) | FLOATS | RECORD_TEXTS
NAMED = one_of("a", "prompt", "", "\u2028", "\x85\r\n", '"\\', "\ud7ff\ue000\x00", "漢")
NESTED = PLAIN | st.lists(PLAIN, max_size=2) | st.dictionaries(NAMED, PLAIN, max_size=1)
RECORDS = st.dictionaries(NAMED, NESTED, max_size=2)
FRAGMENTS = one_of(b'{"a": 1}', b'{"a": "b"}', b"{}", b"{", b"}", b"[", b"]", b'"', b"\n", b"\r\n", b"\r",
                   b"\\ud800", b"\\u00", b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", b"NaN", b"1e999", b"\x00",
                   b"null", b"-", b"\xe2\x80\xa8", b'{"a": "\xe2\x80\xa8"}')


@cache
def scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def scratch_file() -> Path:
    return Path(scratch().name) / "records.jsonl"


@for_all(records=st.lists(RECORDS, max_size=2))
def test_records_come_back_as_they_were_written(records):
    write_jsonl(scratch_file(), records)
    again = read_jsonl(scratch_file(), "records")
    assert again == records and repr(again) == repr(records)  # 1 is not 1.0, nor True


@for_all(content=st.binary(max_size=40) | st.lists(FRAGMENTS, max_size=8).map(b"".join))
def test_a_file_of_any_bytes_holds_records_or_is_refused_by_its_name(content):
    scratch_file().write_bytes(content)
    for names in ((), ("a",)):
        try:
            records = read_jsonl(scratch_file(), "records", names)
        except InputError as error:
            assert str(scratch_file()) in str(error) and "\n" not in str(error)
        else:
            assert all(isinstance(record[name], str) for record in records for name in names)
            assert all(isinstance(record, dict) for record in records)


@pytest.mark.parametrize("read, content", [(read_jsonl, "[" * 100_000), (read_jsonl, "1" * 5000),
                                           (read_json, "1" * 5000)])
def test_json_that_python_cannot_hold_is_refused_too(read, content):
    scratch_file().write_text(content)
    with pytest.raises(InputError):
        read(scratch_file(), "records")


def test_half_a_character_comes_back_as_it_was_written():
    scratch_file().write_text('{"prompt": "\\ud800"}\n')
    records = read_jsonl(scratch_file(), "records", ("prompt",))
    assert records == [{"prompt": "\ud800"}]
    write_jsonl(scratch_file(), records)
    assert read_jsonl(scratch_file(), "records") == records


@for_all(records=st.lists(RECORDS, max_size=3), form=one_of("list", "lines", "indented", "wrapped", "spaced"))
def test_records_are_read_from_every_form_of_json(records, form):
    # A record of lists alone could be a file of columns, which is refused.
    assume(not any(record and all(isinstance(value, list) for value in record.values()) for record in records))
    one_a_line = [json.dumps(record) for record in records]
    text = {"list": json.dumps(records), "lines": "\n".join(one_a_line), "spaced": "\n \n".join([*one_a_line, "", ""]),
            "indented": json.dumps(records, indent=1), "wrapped": json.dumps({"version": 1, "data": records})}[form]
    scratch_file().write_text(text)
    again = [record for _, record in read_records(scratch_file(), "records")]
    assert again == records or form != "list" and len(records) == 1 and again == unwrapped(records[0])


def unwrapped(record):
    return record.get("data")


@for_all(content=st.binary(max_size=40) | st.lists(FRAGMENTS, max_size=8).map(b"".join))
def test_a_users_file_of_any_bytes_holds_records_or_is_refused_by_its_name(content):
    scratch_file().write_bytes(content)
    try:
        read_records(scratch_file(), "records")
    except InputError as error:
        assert str(scratch_file()) in str(error) and "\n" not in str(error) and "remove" not in str(error)


# What editors and programs leave in files

TWO = [{"prompt": "Name a colour.", "response": "Blue."},
       {"prompt": "Und ein Maß?", "response": "Ein Meter \U0001f642."}]
LINES = [json.dumps(record, ensure_ascii=False) for record in TWO]
TEXT = "\n".join(LINES)
LIST = json.dumps(TWO, ensure_ascii=False)
WANTED_LAST = TWO[1]


@pytest.mark.parametrize("name", ["ift.jsonl", "ift.json"])
@pytest.mark.parametrize("content", [
    TEXT.encode(), f"{TEXT}\n".encode(), LIST.encode(), json.dumps(TWO).encode(), json.dumps(TWO, indent=2).encode(),
    b"\xef\xbb\xbf" + TEXT.encode(), b"\xef\xbb\xbf" + LIST.encode(),
    TEXT.encode("utf-16"), LIST.encode("utf-16"), b"\xff\xfe" + TEXT.encode("utf-16-le"),
    b"\xfe\xff" + TEXT.encode("utf-16-be"), TEXT.encode("utf-32"),
    TEXT.replace("\n", "\r\n").encode(), TEXT.replace("\n", "\r").encode(),
    json.dumps(TWO, indent=2).replace("\n", "\r\n").encode(),
    f"\n{LINES[0]}\n\n  \n{LINES[1]}\n\n\n".encode(), f"{LINES[0]}\n\ufeff{LINES[1]}\n".encode(),  # joined files
    f"[\n{LINES[0]},\n{LINES[1]},\n]\n".encode(),  # a comma after the last record
    f"\u00a0{LINES[0]}\u200b\n\u200b\n{LINES[1]} \u2028\n\u2060".encode(),  # copied from a page
    f"\u200b[\u00a0{LINES[0]},\n\u00a0{LINES[1]}\u200b]\n".encode(),
    f"\x1e{LINES[0]}\n\x1e{LINES[1]}\n".encode(),  # JSON text sequences (RFC 7464)
    json.dumps({"data": TWO}).encode(), json.dumps({"version": 1, "instances": TWO}, indent=2).encode(),
    TEXT.replace('"}', '", "input": NaN, "score": -Infinity}').encode(),  # of pandas
], ids=str)
def test_instructions_are_read_whatever_the_file_is_called_and_whoever_saved_it(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_instructions(tmp_path / name) == TWO


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_line_breaks_separate_records(separator, tmp_path):
    # str.splitlines splits at all of these; JSON texts may hold them.
    texts = [{"prompt": f"a{separator}b", "response": f"{separator}c"}, WANTED_LAST]
    (tmp_path / "ift.jsonl").write_text("".join(json.dumps(t, ensure_ascii=False) + "\n" for t in texts))
    assert read_instructions(tmp_path / "ift.jsonl") == texts
    assert read_jsonl(tmp_path / "ift.jsonl", "records") == texts


def test_a_tab_and_a_line_break_inside_a_text_are_read(tmp_path):
    (tmp_path / "ift.json").write_text('[{"prompt": "a\tb\nc", "response": "d"}]')
    assert read_instructions(tmp_path / "ift.json") == [{"prompt": "a\tb\nc", "response": "d"}]


@pytest.mark.parametrize("content, message", [
    (f"{LINES[0]}\n{LINES[1][:-5]}\n{LINES[0]}".encode(), "line 2 is not valid JSON"),
    (f"{LINES[0]}\n{LINES[1]},\n{LINES[0]}".encode(), "line 2 is not valid JSON: ',' follows the end of a record"),
    (f"{LINES[0]} {LINES[1]}".encode(), "line 1 is not valid JSON: .* follows the end"),
    (f"[{LINES[0]}\n{LINES[1]}]".encode(), "line 2 is not valid JSON: expected a comma"),
    (f"[{LINES[0]},\n{LINES[1]}".encode(), "line 2 is not valid JSON: expected a comma or the end of the list"),
    (f"[{LINES[0]}]\n[{LINES[1]}]".encode(), "line 2 is not valid JSON: .* follows the end"),
    (f"{LINES[0]}\n{LINES[1]}\n".encode() + b"\x00" * 9, "line 3 holds a NUL byte"),
    (TEXT.encode("utf-16-le"), "line 2 is not UTF-8|line 1 holds a NUL byte|is not UTF-8"),  # without its mark
    (TEXT.encode("latin-1", "replace"), "line 2 is not UTF-8 text; save the file as UTF-8"),
    (f'{LINES[0]}\n{{"prompt": "a", "prompt": "b", "response": "c"}}'.encode(),
     "line 2 cannot be read: the key 'prompt' comes twice in one object"),
    (f'[{LINES[0]},\n\n{{"prompt": "a", "response": "c", "response": "d"}}]'.encode(),
     "line 3 cannot be read: the key 'response' comes twice"),
    (f"{LINES[0]}\n{'[' * 100_000}".encode(), "line [12] "),
    (b'{"prompt": {"0": "a", "1": "b"}, "response": {"0": "c", "1": "d"}}', "holds columns, not records"),  # of pandas
    (b'{"prompt": ["a", "b"],\n "response": ["c", null]}', "holds columns, not records; write one record a line"),
    (f"{LINES[0]}\n{{\"a\": {'1' * 5000}}}".encode(), "line 2 cannot"),
    (b"PAR1\x15\x04\xff\xfePAR1", "is a Parquet file, not JSON or JSON Lines"), (b"\x1f\x8b\x08\xff", "gzip"),
    (b"PK\x03\x04ab", "is an archive"), (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    (b"\ninstruction,output\nName,Blue\n", "line 2 is not JSON or JSON Lines: 'instruction,output'; convert"),
    (b"<html>Not found</html>", "line 1 is not JSON or JSON Lines: '<html>"),
    ("{“prompt”: “a”}".encode(), r"line 1 is not valid JSON: .*found U\+201C \(left double quotation mark\)"),
    (f'{LINES[0]}\n{{"prompt":\u00a0"a"}}'.encode(), r"line 2 is not valid JSON: .*found U\+00A0 \(no-break space\)"),
    (f"[\n{LINES[0]},\n// colours\n{LINES[1]}]".encode(), "line 3 is not valid JSON: .*; JSON has no comments"),
], ids=lambda value: str(value)[:50])
def test_what_is_not_json_is_named_by_file_and_line(content, message, tmp_path):
    (tmp_path / "ift.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=rf"ift\.jsonl.*{message}") as error:
        read_instructions(tmp_path / "ift.jsonl")
    assert "remove" not in str(error.value) and "\n" not in str(error.value)  # it is the user's only copy


@pytest.mark.parametrize("text, is_comment", [
    ("[1, // one\n2]", True), ("[1, /* one */ 2]", True), ("[1, # one\n2]", True), ("[1, /2]", False), ("[/", False)])
def test_only_comments_are_called_comments(text, is_comment):
    with pytest.raises(InputError, match="is not valid JSON") as error:
        parse_json(text, "it")
    assert ("JSON has no comments" in str(error.value)) == is_comment


SAVED = [lambda text: b"\xef\xbb\xbf" + text.encode(), lambda text: text.encode("utf-16"),
         lambda text: text.replace("\n", "\r\n").encode(),
         lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()]


@pytest.mark.parametrize("saved", SAVED)
def test_configs_and_templates_are_read_whoever_saved_them(saved, tmp_path):
    (tmp_path / "a.toml").write_bytes(saved('seed = 3\nchat = "Maß"\n[seed_data]\nift = 7\n'))
    assert load_config(tmp_path / "a.toml") == Config(seed=3, chat="Maß", seed_data=SeedConfig(ift=7))
    (tmp_path / "judge.txt").write_bytes(saved("Rate {prompt}\nand {response}\nMaß, Score:\n"))
    assert load_template(tmp_path / "judge.txt") == "Rate {prompt}\nand {response}\nMaß, Score:"
    (tmp_path / "chat.txt").write_bytes(saved("<s>\n{prompt}\n{response}</s>\n"))
    assert chat_template(str(tmp_path / "chat.txt")) == "<s>\n{prompt}\n{response}</s>"


@pytest.mark.parametrize("content, line", [(b"seed = 3\nchat = '\x00'", 2), (b"seed = 3\n\n# Ma\xdf", 3)])
def test_a_config_that_is_no_text_is_named_by_its_line(content, line, tmp_path):
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.toml: line {line} "):
        load_config(tmp_path / "a.toml")
    with pytest.raises(InputError, match=rf"a\.toml: line {line} "):
        read_text(tmp_path / "a.toml", "text")


@pytest.mark.parametrize("line, message", [
    ('seed_model = "C:\\Users\\me"', "not valid TOML: .*line 1.*; write a path with backslashes in single quotes"),
    ('chat = "C:\\models\\m"', "not valid TOML: .*line 1.*; write a path with backslashes in single quotes"),
    ('seed_model = "C:\\temp\\new"',
     r"seed_model must be a path, but 'C:\\temp\\new' holds a control character; write a path"),
    ('judge = {template = "C:\\bin"}', r"template must be a path, but 'C:\\x08in' holds a control character"),
    ("seed = 1" + "0" * 5000, "not valid TOML: Exceeds the limit"), ("seed = " + "[" * 100_000, "not valid TOML: "),
    ("seed = 1\nseed = 2", "not valid TOML: Cannot overwrite a value"), ("seed: 1", "not valid TOML: .*line 1")])
def test_what_is_no_toml_is_refused_with_the_way_to_mend_it(line, message, tmp_path):
    (tmp_path / "a.toml").write_text(line)
    with pytest.raises(InputError, match=rf"a\.toml.*{message}") as error:
        load_config(tmp_path / "a.toml")
    assert "\n" not in str(error.value)


def test_a_windows_path_in_single_quotes_is_read(tmp_path):
    (tmp_path / "a.toml").write_text("seed_model = 'C:\\temp\\new'\nchat = \"C:\\\\temp\"\n")
    config = load_config(tmp_path / "a.toml", overrides=("seed_data.source=C:\\temp\\Users",))
    assert (config.seed_model, config.chat, config.seed_data.source) == ("C:\\temp\\new", "C:\\temp", "C:\\temp\\Users")


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000])
def test_a_setting_that_python_cannot_hold_is_refused(value):
    scratch_file().write_text("")
    with pytest.raises(InputError, match="must be a whole number"):
        load_config(scratch_file(), overrides=(f"seed={value}",))


# Configs

SETTING_TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12)


def settings_of(kind, name: str = "") -> st.SearchStrategy:
    """Any value that a key of this type and name may have."""
    if dataclasses.is_dataclass(kind):
        values = {key: settings_of(hint, key) for key, hint in get_type_hints(kind).items()}
        if kind is PromptConfig:  # a key "source" of seed_data can be any folder
            values["source"] = st.sampled_from(PROMPT_SOURCES)
        if kind is LoRAConfig:
            values["targets"] = st.lists(st.sampled_from(TARGETS), min_size=1).map(tuple)
        return st.builds(kind, **values)
    if name in CHOICES:
        return st.sampled_from(CHOICES[name])
    if get_origin(kind) is tuple:
        return st.lists(settings_of(get_args(kind)[0]), max_size=3).map(tuple)
    low, high = LIMITS.get(name, (1, math.inf))
    return {bool: st.booleans(), str: SETTING_TEXTS, float: st.floats(low, high),
            int: st.integers(math.ceil(low), None if high == math.inf else math.floor(high))}[kind]


@for_all(slow=500, config=settings_of(Config))
def test_a_config_comes_back_from_its_file(config):
    scratch_file().write_bytes(to_toml(config).encode())
    assert load_config(scratch_file()) == config
    assert to_toml(load_config(scratch_file())) == to_toml(config)


@for_all(slow=500, train=settings_of(get_type_hints(PretrainConfig)["train"]), seed=st.integers(0, 2**31))
def test_a_pretraining_config_comes_back_from_its_file(train, seed):
    config = PretrainConfig(seed=seed, train=train)
    scratch_file().write_bytes(to_toml(config).encode())
    assert load_config(scratch_file(), PretrainConfig) == config


@pytest.mark.parametrize("character", ["\n", "\r", "\x00", "\x1b", "\x7f"])
def test_a_control_character_in_a_setting_comes_back_too(character):
    config = Config(judge=JudgeConfig(command=f"a{character}b"))
    scratch_file().write_bytes(to_toml(config).encode())
    assert load_config(scratch_file()) == config
