from types import SimpleNamespace

from tiny import tiny_tokenizer

from minisr.report.chat import Chat
from minisr.sampler import Completion, SamplingConfig
from minisr.tokenizer import Tokenizer


def test_an_answer_has_none_of_the_templates_text():
    tokenizer = Tokenizer(tiny_tokenizer().vocabulary, "<|user|>{prompt}<|assistant|>{response} That is all.</s>")
    answers = ["Once there was a fox.", "Today we saw a bear."]
    completions = [Completion(tokenizer.encode_response(text), True) for text in answers]
    lm = SimpleNamespace(tokenizer=tokenizer, sample=lambda *_: [completions])
    assert Chat(lm, "{prompt} {response}", 2, SamplingConfig())._answer("News?", 0) == answers
