"""Ids of prompts and responses equal those of transformers' apply_chat_template and of TRL's trainers.

For every template, kind of tokenizer and default system message; with a system message also for TRL."""

import json
from functools import cache
from itertools import product
from random import Random
from types import SimpleNamespace

import pytest
from tiny import as_folder, byte_level_json, random_llama, tiny_tokenizer

from minisr import InputError
from minisr.interop import hf
from minisr.interop.chat_templates import chat_template, to_jinja
from minisr.interop.sentencepiece_json import to_tokenizer_json
from minisr.interop.source import load_source
from minisr.tokenizer import SentencePiece
from minisr.worlds.tiny.corpus import document

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")
protos = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that trl uses in transformers

SPECIALS = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
            "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|system|>")
EXCHANGES = [("Write a story.", "Once there was a fox."), ("  two  spaces ", " It felt sad. "), ("News?", ""),
             ("one\n\ntwo\n", "[a] 'b' 12"), ("it's <x> 🙂", "é\nthe end"), ("", "漢字 the"), ("the", "s")]


# ---- kinds of tokenizers, as the files of a folder

def sentencepiece_model(dummy_prefix, specials=SPECIALS[4:]):
    """The throw-away model with more special tokens. The rows of unused pieces make room for them."""
    proto = protos.ModelProto.FromString(tiny_tokenizer().vocabulary.content)
    proto.normalizer_spec.add_dummy_prefix = dummy_prefix
    for piece in proto.pieces:
        if piece.piece == "\n":
            piece.type = 1  # normal; LlamaTokenizer splits texts at a user-defined piece
    for name in specials:
        proto.pieces.add(piece=name, score=0, type=3)
    return proto.SerializeToString()


def metaspace_json(scheme):
    made = library.Tokenizer(library.models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = library.pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)  # no token spans two words
    made.decoder = library.decoders.Sequence(
        [library.decoders.Replace("▁", " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
        + ([] if scheme == "never" else [library.decoders.Strip(" ", 1, 0)]))
    rng = Random(1)
    made.train_from_iterator([document(rng) for _ in range(60)], library.trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *SPECIALS, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False, max_token_length=8))
    made.pre_tokenizer = library.pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    settings = json.loads(made.to_str())  # bytes are pieces, not special tokens
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] in SPECIALS]
    return json.dumps(settings)


ADDED = {"<|im_start|>": 500, "<|im_end|>": 501, "story": 502}
SETTINGS = [{"id": i, "content": text, "special": text != "story", "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False} for text, i in ADDED.items()]
IN_CONFIG = {"added_tokens_decoder": {str(token["id"]): token for token in SETTINGS}}
SPECIAL = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("files", [{"tokenizer_config.json": IN_CONFIG, "added_tokens.json": {}},
                                   {"tokenizer_config.json": SPECIAL, "added_tokens.json": ADDED},
                                   {"tokenizer_config.json": IN_CONFIG, "added_tokens.json": ADDED}])
def test_tokens_added_to_a_sentencepiece_model_have_their_ids(files, legacy, tmp_path):
    settings = {**SP_CLASS, "legacy": legacy, "chat_template": to_jinja(chat_template("chatml"))}
    folder = as_folder(random_llama(vocab_size=512), tmp_path)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(True, specials=()))
    for name, content in files.items():
        content = {**settings, **content} if name == "tokenizer_config.json" else content
        (folder / name).write_text(json.dumps(content))
    ours = load_source(str(folder))[1]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt, response in EXCHANGES:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        expected = theirs.apply_chat_template(messages, return_dict=False)
        ids, _ = ours.encode_chat(prompt, response)
        assert ids == expected[:len(ids)] and expected[len(ids):].count(501) == 0


def test_ids_of_added_tokens_must_follow_the_pieces(tmp_path):
    folder = as_folder(random_llama(vocab_size=512), tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 505}))
    with pytest.raises(InputError, match="added tokens do not follow the 500 pieces of its tokenizer"):
        load_source(str(folder))


SP_CLASS = {"tokenizer_class": "LlamaTokenizer"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


def json_folder(content, folder, settings):
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **settings}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": None}))
    return folder


def exchanges_that_differ(tokenizer, folder):
    """Those whose ids are not the ones of transformers."""
    auto, differing = transformers.AutoTokenizer.from_pretrained(folder), []
    for prompt, response in EXCHANGES:
        ours, _ = tokenizer.encode_chat(prompt, response)
        theirs = auto.apply_chat_template(asked(prompt) + answer(response), return_dict=False)
        if ours != theirs[:len(ours)]:
            differing.append(prompt)
    return differing


def declared(*names, first_id):
    return {str(i): {"content": name, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
                     "single_word": False} for i, name in enumerate(names, first_id)}


def without_added(content, *names):
    return {**content, "added_tokens": [token for token in content["added_tokens"] if token["content"] not in names]}


def test_special_tokens_that_only_the_settings_declare_have_their_ids(tmp_path):
    content = json.loads(byte_level_json("<s>", "</s>"))
    new = declared("<|user|>", "<|assistant|>", first_id=len(content["model"]["vocab"]))
    settings = {**FAST, "chat_template": to_jinja(chat_template("tiny")), "added_tokens_decoder": new}
    folder = json_folder(content, tmp_path, settings)
    tokenizer = hf.load_tokenizer(folder)
    assert exchanges_that_differ(tokenizer, folder) == []
    assert set(map(int, new)) <= set(tokenizer.encode_prompt("News?")) and "<|user|>" in tokenizer.vocabulary.specials
    assert not set(map(int, new)) & set(tokenizer.encode("<|user|>"))  # a text cannot spell it


def test_a_special_token_may_be_an_ordinary_piece_of_tokenizer_json(tmp_path):
    content = without_added(json.loads(byte_level_json(*SPECIALS)), "<s>")
    folder = json_folder(content, tmp_path, {**FAST, "chat_template": to_jinja(chat_template("tiny"))})
    tokenizer = hf.load_tokenizer(folder)
    assert exchanges_that_differ(tokenizer, folder) == []
    assert tokenizer.encode_prompt("News?")[0] == content["model"]["vocab"]["<s>"]


def test_a_special_token_of_the_template_without_an_id_is_rejected(tmp_path):
    settings = {**FAST, "additional_special_tokens": ["<|user|>", "[PAD]"]}
    content = json.loads(byte_level_json("<s>", "</s>"))
    folder = json_folder(content, tmp_path, {**settings, "chat_template": to_jinja(chat_template("tiny"))})
    with pytest.raises(InputError, match=r"template has '<\|user\|>'.* no file gives its id; save the tokenizer with"):
        hf.load_tokenizer(folder)
    hf.load_tokenizer(json_folder(content, tmp_path, {**settings, "chat_template": to_jinja(chat_template("plain"))}))


@pytest.mark.parametrize("scheme, settings, differs", [
    ("always", {}, True), ("first", {}, False), ("always", {"legacy": True}, False), ("first", {"legacy": True}, True),
    ("never", {"add_prefix_space": False}, False), ("never", {"legacy": True}, True)])
def test_where_transformers_does_not_follow_tokenizer_json_a_line_says_so(scheme, settings, differs, tmp_path, capsys):
    content = json.loads(metaspace_json(scheme))
    settings = {**SP_CLASS, "chat_template": to_jinja(chat_template("tiny")), **settings}
    folder = json_folder(content, tmp_path, settings)
    tokenizer = hf.load_tokenizer(folder)
    err = capsys.readouterr().err
    assert ("LlamaTokenizer of transformers 5 does not follow tokenizer.json" in err) == differs == bool(err)
    assert bool(exchanges_that_differ(tokenizer, folder)) == differs
    json_folder(content, tmp_path, {**settings, **FAST})
    assert exchanges_that_differ(tokenizer, folder) == []  # the ids are those of the file


@cache
def tokenizer_kind(kind):
    """Name and content of the tokenizer's file, and settings in tokenizer_config.json."""
    if kind == "byte level":
        return "tokenizer.json", byte_level_json(*SPECIALS), FAST
    if kind.startswith("Metaspace"):
        return "tokenizer.json", metaspace_json(kind.split()[1]), FAST
    dummy = "without" not in kind
    content = sentencepiece_model(dummy)
    if "tokenizer.json" in kind:  # as in older Llama folders
        return "tokenizer.json", to_tokenizer_json(SentencePiece(content)).decode(), FAST
    if not dummy:
        return "tokenizer.model", content, {}
    return "tokenizer.model", content, {**SP_CLASS, "legacy": True} if "legacy" in kind else SP_CLASS


KINDS = ["byte level", "Metaspace always", "Metaspace first", "Metaspace never", "SentencePiece without prefix",
         "SentencePiece, legacy", "SentencePiece", "SentencePiece as tokenizer.json"]

# ---- templates of models, with a default system message or none

START = ("{% if messages[0]['role'] == 'system' %}"
         "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}{% else %}"
         "{% set system = DEFAULT %}{% set turns = messages %}{% endif %}")
SYSTEM = "{% if system is not none %}{{ HEAD + system + TAIL }}{% endif %}"


def system(head, tail):
    return SYSTEM.replace("HEAD", repr(head)).replace("TAIL", repr(tail))


TEMPLATES = {
    "chatml": START + system("<|im_start|>system\n", "<|im_end|>\n") +
        "{% for m in turns %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": START + "{{ bos_token }}" + system("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>") +
        "{% for m in turns %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + "
        "'<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama2": START + "{% for m in turns %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}{% if loop.first %}"
        + system("<<SYS>>\n", "\n<</SYS>>\n\n") + "{% endif %}{{ m['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral": START + "{{ bos_token }}{% for m in turns %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
        "{% if loop.first %}" + system("", "\n\n") + "{% endif %}{{ m['content'] + ' [/INST]' }}{% else %}"
        "{{ m['content'] + eos_token }}"
        "{% endif %}{% endfor %}",
    "zephyr": START + system("<|system|>\n", "</s>\n") +
        "{% for m in turns %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "plain": START + "{{ bos_token }}" + system("", "\n\n") +
        "{% for m in turns %}{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n### Response:\n"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
    "tiny": START + "{{ bos_token }}" + system("<|system|>", "") +
        "{% for m in turns %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] + '<|assistant|>' }}{% else %}"
        "{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
    "space": START + "{{ bos_token }}" + system("", " ") +
        "{% for m in turns %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ASSISTANT:' }}{% else %}"
        "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
}
DEFAULTS = {"none": "none", "empty": "''", "given": '"You\'re kind."'}


def folder_with(kind, jinja, folder, **more):
    name, content, settings = tokenizer_kind(kind)
    folder.mkdir(exist_ok=True)
    if isinstance(content, str):
        (folder / name).write_text(content)
    else:
        (folder / name).write_bytes(content)
        specials = SentencePiece(content).specials
        settings = {**settings, "added_tokens_decoder": {
            str(i): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
                     "single_word": False} for token, i in specials.items()}}
    more = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": jinja} | more
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **more}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": None}))
    return folder


def asked(prompt):
    return [{"role": "user", "content": prompt}]


def answer(response):
    return [{"role": "assistant", "content": response}]


def of_dpo(auto, exchanges):
    """Ids of prompt and response as TRL's DPOTrainer prepares them."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"prompt": asked(x), "chosen": answer(y), "rejected": answer(y)} for x, y in exchanges]
    args = SimpleNamespace(dataset_num_proc=None, max_length=None)
    made = trl.DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=auto), datasets.Dataset.from_list(rows), auto,
                                           args, "x")
    return [(row["prompt_ids"], row["chosen_ids"]) for row in made]


def of_sft(auto, exchanges):
    """The same of its SFTTrainer, from its ids and its mask."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"prompt": asked(x), "completion": answer(y)} for x, y in exchanges]
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, assistant_only_loss=False,
                           shuffle_dataset=False, dataset_text_field="text")
    trainer = SimpleNamespace(_tokenizer=auto, chat_template=None, completion_only_loss=True)
    made = trl.SFTTrainer._prepare_dataset(trainer, datasets.Dataset.from_list(rows), auto, args, False, None, "x")
    return [([i for i, label in zip(row["input_ids"], row["labels"]) if label == -100],
             [i for i in row["labels"] if i != -100]) for row in made]


@pytest.mark.parametrize("kind, name, default", [*product(KINDS, TEMPLATES, DEFAULTS)])
def test_ids_are_those_of_transformers_and_trl(kind, name, default, tmp_path, capsys):
    folder = folder_with(kind, TEMPLATES[name].replace("DEFAULT", DEFAULTS[default]), tmp_path)
    tokenizer = hf.load_tokenizer(folder)
    assert capsys.readouterr().err == ""  # nothing differs
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    compared, of_trl = 0, [None] * len(EXCHANGES)
    if default == "given":  # takes most of the time
        of_trl = list(zip(of_dpo(auto, EXCHANGES), of_sft(auto, EXCHANGES)))
    for (prompt, response), trained in zip(EXCHANGES, of_trl):
        ids = auto.apply_chat_template(asked(prompt), add_generation_prompt=True, return_dict=False)
        whole = auto.apply_chat_template(asked(prompt) + answer(response), return_dict=False)
        assert tokenizer.encode_prompt(prompt) == ids, (prompt, auto.convert_ids_to_tokens(ids))
        if whole[:len(ids)] != ids:  # a token spans the end of the prompt; TRL warns, and shortens the prompt
            continue
        compared += 1
        ours, mask = tokenizer.encode_chat(prompt, response)
        assert whole[:len(ours)] == ours, (response, auto.convert_ids_to_tokens(whole))
        assert set(auto.decode(whole[len(ours):])) <= {"\n"}  # ChatML's line break, which is never generated
        start = mask.index(True)
        assert (ours[:start], ours[start:]) == (ids, tokenizer.encode_response(response))
        # An answer that is read from its ids gives the same ids in training.
        text = tokenizer.decode_response(ours[start:])
        assert text.strip(" ") == response.strip(" ") and tokenizer.encode_response(text) == ours[start:]
        assert trained in (None, ((ids, whole[len(ids):]),) * 2)
    assert compared >= 5 or (kind, name) == ("byte level", "llama3")  # GPT-2 splits "\n\n" if a word follows
