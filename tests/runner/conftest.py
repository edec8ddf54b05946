import shutil

import pytest
from small_run import CONFIG, minisr


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def session_run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
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
