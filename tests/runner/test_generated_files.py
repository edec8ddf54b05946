"""Files and configs on generated inputs: what is written comes back, and any bytes are read or refused clearly."""

import dataclasses
import math
import tempfile
from functools import cache
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from generated import for_all, one_of, texts_with
from hypothesis import strategies as st

from minisr import InputError
from minisr.runner.config import (
    CHOICES,
    LIMITS,
    PROMPT_SOURCES,
    Config,
    PretrainConfig,
    PromptConfig,
    load_config,
    to_toml,
)
from minisr.runner.files import read_json, read_jsonl, write_jsonl

# Records

RECORD_TEXTS = texts_with("\u2028", "\u2029", "\x85", "\r", "\n", "\x00", "\x1e", '"', "\\", "\\n", "\ufeff",
                          most=4)
PLAIN = one_of(None, True, False, 0, 1, 1.0, -0.0, 2**70, 1e-300) | st.floats(allow_nan=False) | RECORD_TEXTS
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


def test_half_a_character_is_written_or_refused_clearly():
    scratch_file().write_text('{"prompt": "\\ud800"}\n')
    records = read_jsonl(scratch_file(), "records", ("prompt",))
    try:
        write_jsonl(scratch_file(), records)
        assert read_jsonl(scratch_file(), "records") == records
    except InputError:
        pass


# Configs

SETTING_TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12)


def settings_of(kind, name: str = "") -> st.SearchStrategy:
    """Any value that a key of this type and name may have."""
    if dataclasses.is_dataclass(kind):
        values = {key: settings_of(hint, key) for key, hint in get_type_hints(kind).items()}
        if kind is PromptConfig:  # a key "source" of seed_data can be any folder
            values["source"] = st.sampled_from(PROMPT_SOURCES)
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
    config = Config(seed_model=f"a{character}b")
    scratch_file().write_bytes(to_toml(config).encode())
    assert load_config(scratch_file()) == config
