import re
import shlex

import pytest

from minisr import __version__, cli

COMMANDS = ("run", "pretrain", "experiment", "report", "eval", "show", "chat", "import", "export", "bench")


def help_of(capsys, *command):
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def examples(text):
    """The minisr commands in a help text, without the explanation beside them."""
    return [re.split(" {2,}", found)[0] for found in re.findall("^  minisr (.*)$", text, re.MULTILINE)]


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"minisr {__version__}\n"


def test_the_help_lists_every_command_and_says_where_to_start(capsys):
    text = help_of(capsys)
    assert re.findall(r"^    (\w+)", text, re.MULTILINE) == list(COMMANDS)
    assert "start here:" in text and "run the same command again" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_has_an_example_that_is_valid_and_says_what_to_do_next(command, capsys):
    text = help_of(capsys, command)
    lines = examples(text)
    assert lines[0].split()[0] == command and "\nnext" in text
    for line in lines:
        options = cli._parser().parse_args(shlex.split(line))
        assert callable(options.command)


def test_an_unknown_option_names_the_help_of_its_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["show", "out/tiny", "--colour"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "minisr: unrecognized arguments: --colour; see minisr show --help\n"
