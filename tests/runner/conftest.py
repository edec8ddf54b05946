import shutil

import pytest
from small_run import minisr, write_config

from minisr import cli


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


WRITE_PAGE = cli._write_page


@pytest.fixture(scope="module")
def no_page():
    """Runs that the command line starts in this process write no report.html: its charts take a second each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_write_page", lambda folder: None)
        yield


@pytest.fixture(scope="session")
def session_run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_write_page", WRITE_PAGE)  # also if a file with no_page comes first
        code, out, _ = minisr("run", config, "--out", folder)
    assert code == 0
    return folder, out


@pytest.fixture(scope="session")
def finished(session_run):
    """A run that was never interrupted. Tests only read it; a test that writes takes a copy."""
    return session_run[0]


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")
