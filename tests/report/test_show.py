import re

from minisr.report.show import colorize_loss_mask
from minisr.sft import Example


def test_the_tokens_with_loss_and_only_those_are_green(tokenizer):
    example = Example(*tokenizer.encode_chat("Write a story.", "Once there was a fox."))
    colored = re.findall("\033\\[(\\d+)m(.*?)\033\\[0m", colorize_loss_mask(tokenizer, example))
    green = "".join(text for color, text in colored if color == "32")
    gray = "".join(text for color, text in colored if color == "90")
    assert green == " Once there was a fox.</s>"
    assert gray == "<s><|user|> Write a story.<|assistant|>"


def test_a_response_cannot_control_the_terminal(tokenizer):
    example = Example(*tokenizer.encode_chat("News?", "a\033[2Jb\n"))
    colored = colorize_loss_mask(tokenizer, example)
    assert "\\x1b" in colored and "\n" in colored
    assert len(re.findall("\033", colored)) == 2 * len(example.ids)  # the colors alone
