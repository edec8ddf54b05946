"""The ids that end a response come from a model's files, wherever they declare them; so do those that begin a text."""

import json

import pytest
from test_gguf import byte_level_keys, sentencepiece_keys, whole
from test_wrong_input import in_process
from tiny import ENGINES, as_folder, byte_level_json, chain, change, random_llama, tiny_model, tiny_tokenizer

from minisr import InputError
from minisr.interop import hf
from minisr.interop.chat_templates import chat_template
from minisr.interop.sentencepiece_json import to_tokenizer_json
from minisr.interop.source import load_source
from minisr.interop.tokenizer_json import TokenizerJSON
from minisr.runner.checkpoint import load_model, save_model
from minisr.sampler import SamplingConfig
from minisr.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|turn_end|>", "<|end_of_msg|>")


def folder_of(folder, specials=SPECIALS, model=None):
    """A Hugging Face folder with a byte-level tokenizer; its config.json declares no end of a response."""
    content = byte_level_json(*specials)
    llama = random_llama(vocab_size=TokenizerJSON(content.encode()).pieces.get_vocab_size(), eos_token_id=None)
    llama.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(content)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def stops(folder):
    return load_source(str(folder), chat="chatml")[1].stop_ids


def test_ends_in_config_json_count_and_survive_export_and_a_model_folder(tmp_path):
    folder = folder_of(tmp_path / "theirs")
    change(folder / "config.json", eos_token_id=[1, 3, 5])
    assert stops(folder) == (1, 3, 5)
    code, _, err = in_process(["import", folder, "--out", tmp_path / "M0", "--chat", "chatml"])
    assert (code, err) == (0, "") and load_model(tmp_path / "M0")[1].stop_ids == (1, 3, 5)
    assert stops(tmp_path / "M0") == (1, 3, 5)  # with a template of one's own
    code, _, err = in_process(["export", tmp_path / "M0", "--out", tmp_path / "back"])
    assert (code, err) == (0, "")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == [1, 3, 5]
    assert json.loads((tmp_path / "back/config.json").read_text())["eos_token_id"] == [1, 3, 5]
    assert load_source(str(tmp_path / "back"))[1].stop_ids == (1, 3, 5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_response_ends_with_any_declared_token(engine, tmp_path):
    folder = folder_of(tmp_path)
    change(folder / "config.json", eos_token_id=[1, 3, 5])
    tokenizer = load_source(str(folder), chat="chatml")[1]
    prompt = tokenizer.encode_prompt("Why?")
    model = chain({prompt[-1]: 10, 10: 3, 3: 11, 11: 11}, len(tokenizer))
    config = SamplingConfig(temperature=0.0, max_new_tokens=8)
    [[completion]] = ENGINES[engine](model, tokenizer).sample([prompt], 1, config, 0, tokenizer.stop_ids)
    assert completion.ids == [10, 3] and completion.finished


PLACES = {  # what is written where -> ids beside the template's <|im_end|>
    "config.json": ({"config.json": {"eos_token_id": 3}}, [3]),
    "generation_config.json": ({"generation_config.json": {"eos_token_id": [2, 3]}}, [2, 3]),
    "both": ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [1, 4]}}, [2, 4]),
    "tokenizer_config.json": ({"tokenizer_config.json": {"eos_token": "<|turn_end|>"}}, [3]),
    "an added token in tokenizer_config.json": (
        {"tokenizer_config.json": {"eos_token": {"content": "<|turn_end|>", "lstrip": False}}}, [3]),
    "special_tokens_map.json": ({"special_tokens_map.json": {"eos_token": {"content": "<|end_of_msg|>"}}}, [4]),
    "an ordinary token": ({"config.json": {"eos_token_id": 17}}, [17]),
    "null": ({"config.json": {"eos_token_id": None}, "generation_config.json": {"eos_token_id": None}}, [2]),  # by name
    "nothing": ({}, [2]),
    "no token": ({"config.json": {"eos_token_id": -1}, "generation_config.json": {"eos_token_id": 3}}, [3]),
    "a declaration hides the names": ({"config.json": {"eos_token_id": 4}}, [4]),
    "a stop string": ({"generation_config.json": {"eos_token_id": 2, "stop_strings": "<|end_of_msg|>"}}, [2, 4]),
    "stop strings alone": ({"generation_config.json": {"stop_strings": ["<|turn_end|>", "\nUser:"]}}, [3]),
    "no stop strings": ({"generation_config.json": {"eos_token_id": 2, "stop_strings": None}}, [2]),
}


@pytest.mark.parametrize("files, others", PLACES.values(), ids=PLACES)
def test_ends_count_wherever_a_folder_declares_them(files, others, tmp_path):
    folder_of(tmp_path)
    for name, values in files.items():
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text("{}")
        change(tmp_path / name, **values)
    assert stops(tmp_path) == (1, *others)


@pytest.mark.parametrize("value", ["2", [1, "</s>"], 1.5, True, [[1]], {"id": 1}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_token_id_is_refused(name, value, tmp_path):
    folder_of(tmp_path)
    (tmp_path / name).exists() or (tmp_path / name).write_text("{}")
    change(tmp_path / name, eos_token_id=value)
    with pytest.raises(InputError, match=f"{name}: eos_token_id must be a token id or a list of token ids, not"):
        stops(tmp_path)


def test_stop_strings_that_are_no_special_tokens_are_named_in_one_line(tmp_path, capsys):
    folder_of(tmp_path)
    capsys.readouterr()  # the progress of save_pretrained
    (tmp_path / "generation_config.json").write_text(json.dumps({"stop_strings": ["<|im_end|>", "\nUser:", "fox"]}))
    assert stops(tmp_path) == (1,)
    assert capsys.readouterr().err == (f"minisr: {tmp_path}: minisr ignores the stop_strings ['\\nUser:', 'fox'] of "
                                       "generation_config.json; only tokens end a response\n")


@pytest.mark.parametrize("value", [3, ["a", 3], {"a": "b"}, True])
def test_stop_strings_that_are_no_texts_are_refused(value, tmp_path):
    folder_of(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"stop_strings": value}))
    with pytest.raises(InputError, match="generation_config.json: stop_strings must be a text or a list of texts, not"):
        stops(tmp_path)


@pytest.mark.parametrize("keys, expected", [
    ({}, (1, 2)),  # eos_token_id is 1; <|endoftext|> by its name, as in llama.cpp
    ({"tokenizer.ggml.eos_token_id": 3}, (1, 2, 3)),
    ({"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 4}, (1, 2, 3, 4)),
    ({"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.eot_token_id": 4}, (1, 2, 4))])
def test_ends_count_under_all_keys_of_a_gguf_file(keys, expected, tmp_path):
    keys = {**byte_level_keys(specials=SPECIALS), **keys}
    llama = random_llama(vocab_size=len(keys["tokenizer.ggml.tokens"]))
    path = whole(tmp_path / "x.gguf", llama, keys)
    tokenizer = load_source(str(path), chat="chatml")[1]
    assert tokenizer.stop_ids == expected
    save_model(tmp_path / "M0", tiny_model(len(tokenizer)), tokenizer, {})
    assert load_model(tmp_path / "M0")[1].stop_ids == expected


def test_a_model_folder_has_no_further_file_if_its_ends_are_those_of_common_names(tmp_path):
    save_model(tmp_path / "a", tiny_model(), tiny_tokenizer(), {})
    assert not (tmp_path / "a/generation_config.json").exists() and load_model(tmp_path / "a")[1].stop_ids == (2,)
    vocabulary = TokenizerJSON(byte_level_json(*SPECIALS).encode())
    save_model(tmp_path / "b", tiny_model(len(vocabulary)), Tokenizer(vocabulary, chat_template("chatml"), [2]), {})
    assert not (tmp_path / "b/generation_config.json").exists() and load_model(tmp_path / "b")[1].stop_ids == (1, 2)
    save_model(tmp_path / "c", tiny_model(len(vocabulary)), Tokenizer(vocabulary, chat_template("chatml")), {})
    assert load_model(tmp_path / "c")[1].stop_ids == (1,)


# ---- begin

def with_added(specials, **template):
    made = library.Tokenizer.from_str(byte_level_json(*specials))
    made.post_processor = library.processors.TemplateProcessing(
        **template, special_tokens=[(name, i) for i, name in enumerate(specials)])
    return TokenizerJSON(made.to_str().encode())


@pytest.mark.parametrize("single, expected", [
    ("<s> $A", [0]), ("$A </s>", []), ("<s> $A </s>", [0]), ("<s> </s> $A </s>", [0, 1]), ("$A", [])])
def test_a_plain_text_begins_with_what_the_tokenizer_adds_before_it(single, expected):
    assert with_added(("<s>", "</s>"), single=single).bos_ids == expected


AROUND = library.processors
BEGIN = AROUND.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
POST_PROCESSORS = {"GPT-2": (AROUND.ByteLevel(trim_offsets=False), []),
                   "Llama 3": (AROUND.Sequence([AROUND.ByteLevel(trim_offsets=False), BEGIN]), [0]),
                   "RoBERTa": (AROUND.RobertaProcessing(("</s>", 1), ("<s>", 0)), [0]),
                   "BERT": (AROUND.BertProcessing(("</s>", 1), ("<s>", 0)), [0])}


@pytest.mark.parametrize("post_processor, expected", POST_PROCESSORS.values(), ids=POST_PROCESSORS)
def test_every_kind_of_post_processor_says_what_begins_a_text(post_processor, expected):
    made = library.Tokenizer.from_str(byte_level_json("<s>", "</s>"))
    made.post_processor = post_processor
    vocabulary = TokenizerJSON(made.to_str().encode())
    assert vocabulary.bos_ids == expected
    whole = vocabulary.pieces.encode("A fox.").ids
    assert [*vocabulary.bos_ids, *vocabulary.encode("A fox.")] == [i for i in whole if i != 1]


@pytest.mark.parametrize("single, expected", [("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", []), ("$A", [])])
def test_a_vocabulary_without_latin_letters_has_a_beginning_too(single, expected):
    # Without byte fallback and unknown token, the tokens of a text that it lacks are none.
    made = library.Tokenizer(library.models.BPE({"<s>": 0, "</s>": 1, "狐": 2, "熊": 3}, []))
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = AROUND.TemplateProcessing(single=single, pair=f"{single} $B",
                                                    special_tokens=[("<s>", 0), ("</s>", 1)])
    vocabulary = TokenizerJSON(made.to_str().encode())
    assert vocabulary.encode("a") == [] and vocabulary.bos_ids == expected


@pytest.mark.parametrize("pre, changes, expected", [
    ("gpt-2", {"add_bos_token": True}, [0]), ("gpt-2", {"add_bos_token": None}, []),
    ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, [0]), ("llama-bpe", {"add_bos_token": None}, [0]),
    ("llama-bpe", {"add_bos_token": False, "bos_token_id": None}, []),
    ("gpt-2", {"add_bos_token": True, "bos_token_id": None}, "'tokenizer.ggml.bos_token_id' is missing"),
    ("llama-bpe", {"add_bos_token": None, "bos_token_id": None}, "'tokenizer.ggml.bos_token_id' is missing")])
def test_a_byte_level_gguf_file_says_whether_a_text_begins_with_bos(pre, changes, expected, tmp_path):
    # llama.cpp takes token 11, a comma in GPT-2's vocabulary, for a BOS token that the file does not name.
    keys = byte_level_keys(pre, specials=SPECIALS) | {f"tokenizer.ggml.{key}": to for key, to in changes.items()}
    path = whole(tmp_path / "x.gguf", random_llama(vocab_size=len(keys["tokenizer.ggml.tokens"])), keys)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            load_source(str(path), chat="chatml")
    else:
        assert load_source(str(path), chat="chatml")[1].bos_ids == expected


def test_a_prompt_for_new_prompts_begins_without_the_end_token(tmp_path):
    # Of a tokenizer with add_eos_token=true; the few-shot prompt began "<s></s>", as if the text had ended.
    vocabulary = with_added(("<s>", "</s>"), single="<s> $A </s>")
    tokenizer = Tokenizer(vocabulary, chat_template("plain"))
    assert [*tokenizer.bos_ids, *tokenizer.encode("A fox.")] == vocabulary.pieces.encode("A fox.").ids[:-1]
    hf.export(tiny_model(len(vocabulary)), tokenizer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["bos_token_id"] == 0


@pytest.mark.parametrize("settings, expected", [
    ({}, [1]), ({"add_bos_token": True}, [1]), ({"add_bos_token": False}, []), ({"add_bos_token": None}, [1]),
    ({"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}, []),
    ({"add_bos_token": False, "tokenizer_class": "LlamaTokenizer", "legacy": True}, [])])
def test_a_tokenizer_model_begins_a_text_as_the_settings_say(settings, expected, tmp_path):
    folder = as_folder(random_llama(), tmp_path / "theirs")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **settings}))
    model, tokenizer = load_source(str(folder), chat="tiny")
    assert tokenizer.bos_ids == expected and tokenizer.encode_prompt("fox")[0] == 1  # the template's
    if settings.get("add_bos_token") is not None:  # transformers 5 adds none unless the settings say so
        auto = transformers.AutoTokenizer.from_pretrained(folder)
        assert [*tokenizer.bos_ids, *tokenizer.encode("A fox.")] == auto.encode("A fox.")
    save_model(tmp_path / "M0", model, tokenizer, {})
    assert load_model(tmp_path / "M0")[1].bos_ids == expected


CHAT = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{% if not add_generation_prompt %}</s>{% endif %}")
FILES = {"tokenizer.model": tiny_tokenizer().vocabulary.content,
         "tokenizer.json": to_tokenizer_json(tiny_tokenizer().vocabulary)}


@pytest.mark.parametrize("tokens", [{"bos_token": None}, {"bos_token": "<s>"}, {}])
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("name", FILES)
def test_null_is_no_special_token_for_a_chat_template(name, tokenizer_class, tokens, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    settings = {"tokenizer_class": tokenizer_class, "eos_token": "</s>", "chat_template": CHAT, **tokens}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{response}"}]
    assert hf.load_tokenizer(tmp_path).template == auto.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("adds", [None, True, False])
def test_a_gguf_file_says_whether_a_text_begins_with_bos(adds, tmp_path):
    keys = {**sentencepiece_keys(), "tokenizer.ggml.add_bos_token": adds}
    tokenizer = load_source(str(whole(tmp_path / "x.gguf", random_llama(), keys)))[1]
    assert tokenizer.bos_ids == ([] if adds is False else [1])
    assert tokenizer.encode_prompt("fox")[0] == 1  # the template's


def test_config_json_of_llama_declares_its_default(tmp_path):
    assert json.loads((as_folder(random_llama(), tmp_path) / "config.json").read_text())["eos_token_id"] == 2
    assert load_source(str(tmp_path))[1].stop_ids == (2,)


# ---- special tokens that only the settings name

NAMED = {
    "eos_token": {"eos_token": "<|im_end|>"},
    "eos_token as an added token": {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}},
    "additional_special_tokens": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    "added_tokens_decoder": {"added_tokens_decoder": {
        "1": {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False,
              "single_word": False}}},
}


@pytest.mark.parametrize("settings", NAMED.values(), ids=NAMED)
def test_a_token_that_the_settings_name_as_special_ends_a_response_and_no_text_spells_it(settings, tmp_path):
    # Fine-tuned models often have ChatML's tokens with "special": false in tokenizer.json.
    folder_of(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="special token"):
        load_source(str(tmp_path), chat="chatml")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", **settings}))
    tokenizer = load_source(str(tmp_path), chat="chatml")[1]
    assert tokenizer.eos_id == 1 and 1 not in tokenizer.encode("a<|im_end|>b")
    if "additional_special_tokens" not in settings:  # transformers 5 lets texts spell these
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert auto.encode("a<|im_end|>b", split_special_tokens=True) == tokenizer.encode("a<|im_end|>b")
