import json
import sys
from random import Random

import pytest
from nasty import NASTY, SPELLED
from test_wrong_input import in_process
from tiny import as_folder, byte_level_json, change, random_llama, tiny_model, tiny_tokenizer

from minisr import InputError
from minisr.interop import hf
from minisr.interop.chat_templates import chat_template, choose_chat_template, to_jinja
from minisr.interop.jinja_templates import JinjaTemplate
from minisr.interop.sentencepiece_json import to_tokenizer_json
from minisr.interop.source import load_source
from minisr.interop.tokenizer_json import TokenizerJSON
from minisr.runner.checkpoint import tokenizer_files
from minisr.tokenizer import SentencePiece, Tokenizer

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def as_json():
    made = library.Tokenizer.from_str(to_tokenizer_json(tiny_tokenizer().vocabulary).decode())
    made.encode_special_tokens = True
    return made


def random_texts():
    """Random characters of Unicode, joined with repeated words of the world and parts of them."""
    rng = Random(0)
    alphabet = [chr(i) for i in range(0x3000) if not 0xD800 <= i < 0xE000] + list(" \nthe an") * 700
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 30)))
        yield text + "".join(rng.choices(["there ", "fox", "was", "ing", "th", " "], k=rng.randint(0, 8)))


def test_the_tokenizer_json_of_a_sentencepiece_model_gives_its_ids(as_json):
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer().vocabulary.content)
    for text in [*NASTY, *random_texts()]:
        ids = pieces.encode(text)
        assert as_json.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert as_json.decode(ids) == pieces.decode(ids), repr(text)
        assert as_json.encode(text).ids == [pieces.bos_id(), *ids]


def test_merges_never_produce_a_byte_or_a_special_token(as_json):
    # Pieces such as "<0x0A" would allow a merge into "<0x0A>"; SentencePiece makes none.
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.ParseFromString(tiny_tokenizer().vocabulary.content)
    for whole in ("<0x0A>", "<s>", "</s>", "<unk>"):
        for new in (*whole, *(whole[:end] for end in range(2, len(whole)))):
            if new not in {piece.piece for piece in proto.pieces}:
                proto.pieces.add(piece=new, score=-1000.0 - len(proto.pieces), type=1)
    vocabulary = SentencePiece(proto.SerializeToString())
    made = library.Tokenizer.from_str(to_tokenizer_json(vocabulary).decode())
    made.encode_special_tokens = True
    for text in SPELLED:
        assert made.encode(text, add_special_tokens=False).ids == vocabulary.encode(text), text
    assert vocabulary.pieces.encode("<0x0A>", out_type=str)[-2:] == ["<0x0A", ">"]


def test_every_piece_keeps_its_id_and_only_control_symbols_are_special(as_json):
    pieces = tiny_tokenizer().vocabulary.pieces
    assert as_json.get_vocab() == {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    assert {token.content for token in as_json.get_added_tokens_decoder().values()} == {
        "<s>", "</s>", "<|user|>", "<|assistant|>"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    hf.export(tiny_model(), tiny_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def auto(exported):
    return transformers.AutoTokenizer.from_pretrained(exported)


def chat_ids(auto, *turns, **how):
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"], turns)]
    return list(auto.apply_chat_template(messages, return_dict=False, **how))


PLAIN = [text for text in NASTY if text not in SPELLED]


def test_the_exported_tokenizer_knows_where_texts_begin_and_end(auto):
    assert (auto.bos_token, auto.eos_token, auto.pad_token) == ("<s>", "</s>", "</s>")
    assert auto.encode("fox") == [1, *tiny_tokenizer().encode("fox")] and auto.model_max_length == 96


def test_the_exported_chat_template_gives_our_prompt(auto):
    for text in PLAIN:
        ids = chat_ids(auto, text, add_generation_prompt=True)
        assert ids == tiny_tokenizer().encode_prompt(text), repr(text)


def test_the_exported_chat_template_gives_our_conversation(auto):
    rng = Random(0)
    for text in PLAIN:
        answer = rng.choice(PLAIN)
        ids, _ = tiny_tokenizer().encode_chat(text, answer)
        assert chat_ids(auto, text, answer) == ids, repr((text, answer))
        assert auto.decode(ids, skip_special_tokens=True) == tiny_tokenizer().decode(ids)


OWN = ("<s>it's \"quoted\" \\n {{ not jinja }} {% 'é' %}\n\t🙂{prompt}\u2028\x07<|assistant|>'\""
       "{response} }} </s>rest")


@pytest.mark.parametrize("template", [*map(chat_template, ("llama2", "plain", "zephyr")), OWN],
                         ids=["llama2", "plain", "zephyr", "own"])
def test_any_template_is_exported_with_the_prompt_it_gives(template, tmp_path):
    tokenizer = Tokenizer(tiny_tokenizer().vocabulary, template)
    hf.export(tiny_model(), tokenizer, tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in PLAIN:
        ids = chat_ids(auto, text, add_generation_prompt=True)
        assert ids == tokenizer.encode_prompt(text), repr(text)
    text = auto.apply_chat_template([{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}],
                                    tokenize=False)
    assert text == template.replace("{prompt}", "A").replace("{response}", "B")


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_a_byte_level_tokenizer_is_exported_with_the_conversations_it_gives(name, tmp_path):
    tokenizer = chatting(name)
    hf.export(tiny_model(len(tokenizer)), tokenizer, tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = Random(0)
    for text in PLAIN:
        assert chat_ids(auto, text, add_generation_prompt=True) == tokenizer.encode_prompt(text), repr(text)
        # Ours encodes an answer by itself, as it is written; theirs together with line breaks before it.
        answer = rng.choice(PLAIN).lstrip() or "Yes."
        ids, _ = tokenizer.encode_chat(text, answer)
        conversation = chat_ids(auto, text, answer)
        assert auto.decode(conversation).strip() == auto.decode(ids).strip()
        assert conversation[:len(ids)] == ids or name == "llama3", repr((text, answer))
    again = load_source(str(tmp_path))[1]
    assert tokenizer_files(again) == tokenizer_files(tokenizer) and again.stop_ids == tokenizer.stop_ids


SPECIALS = {"chatml": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
            "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}


def chatting(name):
    """A byte-level tokenizer with the special tokens of a template, and the template."""
    return Tokenizer(TokenizerJSON(byte_level_json(*SPECIALS[name]).encode()), chat_template(name))


def assembled(name, prompt, response):
    """(ids of the prompt, ids of the response), assembled by hand."""
    if name in SPECIALS:
        made = library.Tokenizer.from_str(byte_level_json(*SPECIALS[name]))
        made.encode_special_tokens = True
        i = made.token_to_id

        def e(text):
            return made.encode(text).ids
    else:
        pieces = tiny_tokenizer().vocabulary.pieces
        i, e = pieces.piece_to_id, pieces.encode
    if name == "chatml":
        start, end = i("<|im_start|>"), i("<|im_end|>")
        asked = [start, *e(f"user\n{prompt}"), end, *e("\n"), start, *e("assistant\n")]
        return asked, [*e(response), end]
    if name == "llama3":
        begin, end = i("<|begin_of_text|>"), i("<|eot_id|>")
        head, tail = i("<|start_header_id|>"), i("<|end_header_id|>")
        user = [begin, head, *e("user"), tail, *e(f"\n\n{prompt}"), end]
        return [*user, head, *e("assistant"), tail, *e("\n\n")], [*e(response), end]
    if name == "zephyr":
        user, assistant, end = map(i, ("<|user|>", "<|assistant|>", "</s>"))
        asked, whole = e("\n"), e(f"\n{response}")
        assert whole[:len(asked)] == asked
        return [user, *e(f"\n{prompt}"), end, *e("\n"), assistant, *asked], [*whole[len(asked):], end]
    text = {"llama2": f"[INST] {prompt} [/INST]",
            "plain": f"### Instruction:\n{prompt}\n\n### Response:\n"}[name]
    # The answer continues the text. In Llama 2's template it has a space before it and one after it.
    asked, whole = e(text), e(text + (f" {response} " if name == "llama2" else response))
    assert whole[:len(asked)] == asked
    return [i("<s>"), *asked], [*whole[len(asked):], i("</s>")]


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3", "plain", "zephyr"])
def test_a_chat_template_gives_the_ids_put_together_by_hand(name):
    ours = Tokenizer(tiny_tokenizer().vocabulary, chat_template("llama2" if name in SPECIALS else name))
    tokenizer = chatting(name) if name in SPECIALS else ours
    rng = Random(0)
    for prompt in NASTY:  # also those that spell special tokens and fields: all of it is text
        response = rng.choice(NASTY)
        asked, answered = assembled(name, prompt, response)
        assert tokenizer.encode_prompt(prompt) == asked
        ids, mask = tokenizer.encode_chat(prompt, response)
        assert ids == asked + answered, repr((prompt, response))
        assert mask == [False] * len(asked) + [True] * len(answered)
    assert tokenizer.eos_id == answered[-1] == tokenizer.stop_ids[0]


@pytest.mark.parametrize("name", SPECIALS)
def test_a_byte_level_tokenizer_gives_back_every_text(name):
    tokenizer = chatting(name)
    for text in NASTY:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert {*tokenizer.vocabulary.specials.values()}.isdisjoint(ids)
        assert tokenizer.decode(tokenizer.encode_chat("", text)[0]).endswith(text)


def test_newline_ids_are_all_ids_that_contain_a_line_break():
    tokenizer = chatting("chatml")
    by_hand = [i for i in range(len(tokenizer)) if "Ċ" in tokenizer.vocabulary.pieces.id_to_token(i)]
    assert list(tokenizer.newline_ids) == by_hand and len(by_hand) > 1


def test_a_template_can_be_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text("<s>Q: {prompt}\nA:{response}\n</s>\n")
    source = as_folder(random_llama(), tmp_path / "theirs")
    tokenizer = load_source(str(source), chat=f"{tmp_path}/mine.txt")[1]
    e = tiny_tokenizer().vocabulary.pieces.encode
    assert tokenizer.encode_prompt("Why?") == [1, *e("Q: Why?\nA:")]
    # The line break before the end is part of the response.
    assert tokenizer.encode_chat("Why?", "So.")[0] == [1, *e("Q: Why?\nA:So.\n"), 2]


@pytest.mark.parametrize("template", [
    "", "<s>{prompt}</s>", "<s>{response}</s>", "{prompt}{prompt}{response}</s>", "{response}{prompt}</s>",
    "{prompt}{response}{response}</s>", "<s>{prompt}<|assistant|>{response}", "{prompt}{response}<|im_end|>"])
def test_an_incomplete_template_is_rejected(template, exported, tmp_path):
    (tmp_path / "mine.txt").write_text(template)
    for source in (exported, tmp_path / "M"):  # a folder of theirs, then one of ours
        with pytest.raises(InputError) as caught:
            load_source(str(source), chat=f"{tmp_path}/mine.txt")
        assert "\n" not in str(caught.value) and "chat template" in str(caught.value)
        if source == exported:
            in_process(["import", exported, "--out", tmp_path / "M"])


def test_an_unknown_template_is_rejected_with_a_list_of_the_known_ones(exported):
    with pytest.raises(InputError, match="'chatlm' is neither a file nor one of chatml, llama2, llama3"):
        load_source(str(exported), chat="chatlm")


# ---- the model's own template

CHATML = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}SYSTEM{% endif %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def chatml(system=""):
    return CHATML.replace("SYSTEM", system)


def vocabulary(*specials):
    return TokenizerJSON(byte_level_json(*specials).encode())


def own(jinja, specials, chosen="", **tokens):
    made = vocabulary(*specials)
    return choose_chat_template("model/", made, JinjaTemplate(jinja, tokens), {0}, chosen)


IM, S = SPECIALS["chatml"], ("<s>", "</s>")
S_TOKENS = dict(bos_token="<s>", eos_token="</s>")
LLAMA2 = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + "
          "' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
READ = {  # name: (Jinja, special tokens, template, a part of the line on stderr)
    "ChatML": (chatml(), IM, chat_template("chatml"), ""),
    "a system text": (chatml("<|im_start|>system\nBe kind.<|im_end|>\n"), IM,
                      "<|im_start|>system\nBe kind.<|im_end|>\n" + chat_template("chatml"), ""),
    "a system text with an apostrophe": (
        chatml("{{ '<|im_start|>system\nYou\\'re {kind}.<|im_end|>\n' }}"), IM,
        "<|im_start|>system\nYou're {kind}.<|im_end|>\n" + chat_template("chatml"), ""),
    "a system text in a variable": (
        "{% set default = 'Be ' ~ 'kind.' %}" + chatml("{{ '<|im_start|>system\n' + default + '<|im_end|>\n' }}"), IM,
        "<|im_start|>system\nBe kind.<|im_end|>\n" + chat_template("chatml"), ""),
    "trim": (chatml().replace("m['content']", "m['content'] | trim"), IM, chat_template("chatml"),
             "it strips spaces and line breaks around messages; minisr keeps them"),
    "thoughts in no response": (chatml().replace("m['content']", "m['content'].split('</think>')[-1]"), IM,
                                chat_template("chatml"), "it removes thoughts (<think>) from responses; minisr keeps"),
    "strip, as Llama 2": (LLAMA2, S, chat_template("llama2"), "it strips spaces"),
    "no generation prompt": (chatml().partition("{% if add")[0], IM, chat_template("chatml"),
                             "asks for no response at the end of a prompt; minisr adds '<|im_start|>assistant\\n'"),
    "a space at the end of a prompt": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + ' A: ' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}", S,
        "<s>Q: {prompt} A: {response}</s>", "it ends a prompt with a space; minisr leaves it to the response"),
    "no end token": ("{{ bos_token }}{% for m in messages %}{{ '\n' + m['role'] + ':' + m['content'] }}{% endfor %}"
                     "{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}", S,
                     "<s>\nuser:{prompt}\nassistant:{response}</s>",
                     "it ends a response with no special token; minisr adds </s>"),
    "generation tags": (
        chatml().replace("m['content'] +", "m['content'] }}{% generation %}{% endgeneration %}{{"), IM,
        chat_template("chatml"), ""),
    "tools, tojson and a macro": (
        "{% macro head(role) %}{{ '<|im_start|>' + role + '\n' }}{% endmacro %}"
        "{% if tools %}{{ tools | tojson }}{% endif %}"
        "{%- for m in messages -%}{{ head(m.role) }}{{ m.content }}<|im_end|>{{ '\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt %}{{ head('assistant') }}{% endif %}", IM, chat_template("chatml"), ""),
    "today's date if it is known": (
        chatml("{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}26 Jul 2024{% endif %}"), IM,
        "26 Jul 2024" + chat_template("chatml"), "it writes today's date; minisr always writes the template's default"),
    "a language model's three": (None, ("<|endoftext|>",), chat_template("plain").replace("<s>", "").replace(
        "</s>", "<|endoftext|>"), "model/ has no chat template; minisr uses its template 'plain'"),
}


@pytest.mark.parametrize("jinja, specials, expected, line", READ.values(), ids=READ)
def test_a_models_own_template_is_what_jinja_makes_of_a_chat(jinja, specials, expected, line, capsys):
    assert own(jinja, specials, **(S_TOKENS if specials == S else {})) == expected
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == bool(line)


REFUSED = {
    "lower case": chatml().replace("m['content']", "m['content'] | lower"),
    "long lines": chatml().replace("m['content']", "m['content'] | wordwrap(100)"),
    "long messages": chatml().replace("m['content']", "m['content'][:2000]"),
    "a thought before each response": chatml().replace("assistant\n", "assistant\n<think>\n"),
    "two prompts": chatml().replace("m['content']", "m['content'] * 2"),
    "only the system": "{{ 'x' }}",
    "an error of its own": "{{ raise_exception('Only tools!') }}",
    "no Jinja": "{% for m in",
    "endless": "{% for i in range(10**9) %}x{% endfor %}",
    "out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}" + chatml(),
    "today's date": chatml("{{ strftime_now('%d') }}"),
    "depends on the message": chatml().replace("m['content']", "m['content'].split('\n')[-1]"),
    "no end token that it knows": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}


@pytest.mark.parametrize("jinja", REFUSED.values(), ids=REFUSED)
def test_a_template_that_minisr_cannot_write_is_refused_and_a_chosen_one_is_compared(jinja, capsys):
    with pytest.raises(InputError, match="cannot use the chat template of model/: .*--chat NAME"):
        own(jinja, IM)
    assert capsys.readouterr().err == ""
    assert own(jinja, IM, chosen=chat_template("chatml")) == chat_template("chatml")
    err = capsys.readouterr().err
    assert err.startswith("minisr: the chosen chat template is not the one of model/: ") and err.count("\n") == 1


def test_a_template_is_run_in_the_sandbox_and_nowhere_else(tmp_path):
    jinja = ("{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "run") + "') }}"
             "{{ self.__init__.__globals__ }}" + chatml())
    with pytest.raises(InputError, match="cannot use the chat template"):
        own(jinja, IM)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("system", [None, "", "Be kind.", "You're {kind}, '\"\\n' "])
def test_a_chosen_template_may_hold_a_system_message(system, capsys):
    turn = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    own(chatml("<|im_start|>system\nThe default.<|im_end|>\n"), IM, chosen=turn + chat_template("chatml"))
    err = capsys.readouterr().err
    assert ("is not the one" in err) == (system is None)  # without one, the model's own has its default


def test_a_chosen_template_that_the_model_does_not_use_is_named_in_one_line(capsys):
    assert own(LLAMA2, S, chosen=chat_template("zephyr"), **S_TOKENS) == chat_template("zephyr")
    err = capsys.readouterr().err
    assert err.startswith("minisr: the chosen chat template is not the one of model/: it writes '<s>[INST] What")
    assert "minisr '<|user|>" in err and err.count("\n") == 1


@pytest.mark.parametrize("package", ["jinja2.sandbox", "jinja2.ext"])
def test_without_jinja_the_extra_is_named(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r'minisr\[hf\]'):
        own(chatml(), IM)
    assert own(chatml(), IM, chosen=chat_template("chatml")) == chat_template("chatml")
    assert "this needs the package jinja2" in capsys.readouterr().err
    assert own(None, S, **S_TOKENS).endswith("{response}</s>")  # nothing to run


def test_an_unsafe_version_of_jinja_is_not_used(monkeypatch):
    monkeypatch.setattr("minisr.interop.jinja_templates.version", lambda package: "3.1.5")
    with pytest.raises(InputError, match="jinja2 3.1.5 is not safe"):
        own(chatml(), IM)


def test_special_tokens_that_take_spaces_along_are_named(capsys):
    # As <|assistant|> of Phi-3 in its tokenizer.json.
    settings = json.loads(byte_level_json(*IM))
    settings["added_tokens"][1]["rstrip"] = True
    made = TokenizerJSON(json.dumps(settings).encode())
    choose_chat_template("model/", made, JinjaTemplate(chatml()), set())
    assert "encodes the text beside special tokens in another way" in capsys.readouterr().err


BASE = {"GPT-2's": ("<|endoftext|>",), "Llama 3's": ("<|begin_of_text|>", "<|end_of_text|>"), "Llama 2's": S}


@pytest.mark.parametrize("chat", ["", "plain"])
@pytest.mark.parametrize("specials", BASE.values(), ids=BASE)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_base_model_gets_a_plain_template_in_its_own_tokens(specials, adds_bos, chat, tmp_path):
    content = library.Tokenizer.from_str(byte_level_json(*specials))
    begin = specials[0] if adds_bos else ""
    if adds_bos:
        content.post_processor = library.processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, 0)])
    random_llama(vocab_size=content.get_vocab_size(), eos_token_id=len(specials) - 1).save_pretrained(tmp_path)
    content.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_source(str(tmp_path), chat=chat)[1]
    assert tokenizer.template == chat_template("plain").replace("<s>", begin).replace("</s>", specials[-1])
    assert tokenizer.stop_ids == (len(specials) - 1,)


def test_a_base_model_that_declares_no_end_is_refused(tmp_path):
    content = library.Tokenizer.from_str(byte_level_json("<|pad|>"))
    random_llama(vocab_size=content.get_vocab_size(), eos_token_id=None).save_pretrained(tmp_path)
    content.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="'plain' needs a special token that ends a response.*--chat NAME"):
        load_source(str(tmp_path), chat="plain")


@pytest.mark.parametrize("place", ["config", "list in config", "object in config", "file"])
def test_a_folders_own_template_is_found(place, tmp_path):
    tokenizer = chatting("chatml")
    hf.export(tiny_model(len(tokenizer)), tokenizer, tmp_path)
    (tmp_path / "chat.txt").unlink()
    jinja = READ["a system text"][0]
    if place == "file":
        change(tmp_path / "tokenizer_config.json", chat_template="[INST]")
        (tmp_path / "chat_template.jinja").write_text(jinja)
    else:
        named = {"tool_use": "[INST]", "default": jinja}
        listed = [{"name": name, "template": template} for name, template in named.items()]
        change(tmp_path / "tokenizer_config.json",
               chat_template=jinja if place == "config" else listed if place == "list in config" else named)
    assert load_source(str(tmp_path))[1].template == READ["a system text"][2]


@pytest.mark.parametrize("templates", [[{"name": "tool_use", "template": "x"}], {"tool_use": "x"}, ["x"], 3,
                                       [{"name": "default", "template": None}]])
def test_named_templates_without_a_default_are_refused_as_by_transformers(templates, tmp_path):
    tokenizer = chatting("chatml")
    hf.export(tiny_model(len(tokenizer)), tokenizer, tmp_path)
    (tmp_path / "chat.txt").unlink()
    change(tmp_path / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template .* called default"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("name", [*SPECIALS, "zephyr", "llama2", "plain", "tiny"])
def test_the_template_of_an_export_is_read_without_ours(name, tmp_path, capsys):
    # Other programs copy their own files, not chat.txt.
    tokenizer = chatting(name) if name in SPECIALS else Tokenizer(tiny_tokenizer().vocabulary, chat_template(name))
    hf.export(tiny_model(len(tokenizer)), tokenizer, tmp_path)
    (tmp_path / "chat.txt").unlink()
    assert load_source(str(tmp_path))[1].template == chat_template(name)
    assert capsys.readouterr().err == ""


def test_an_exported_template_that_has_a_space_before_the_response_gives_our_prompt():
    jinja = JinjaTemplate(to_jinja("<s>[INST] {prompt} [/INST]  {response} </s>"))
    assert jinja.render("A") == "<s>[INST] A [/INST]"
    assert jinja.render("A", "B") == "<s>[INST] A [/INST]  B </s>"
