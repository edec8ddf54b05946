import shutil

import drawing
import pytest
from small_run import minisr, write_config


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def no_drawing():
    """The pages of runs in this process have no charts, only their titles."""
    with pytest.MonkeyPatch.context() as patch:
        drawing.replace_by_titles(patch)
        yield


@pytest.fixture(scope="session")
def session_run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        drawing.restore(patch)  # also if a file with no_drawing comes first
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
