"""A disk that fills in the middle of a run (full_disk.py), where the system permits mounting one."""

import os
import subprocess
import sys
from pathlib import Path

import full_disk
import pytest

import minisr

APART = ("unshare", "--map-root-user", "--mount")  # the mount exists only in there


def run_apart(*command):
    places = {"PYTHONPATH": str(Path(minisr.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*APART, *command], capture_output=True, text=True, env=os.environ | places)


@pytest.fixture
def may_mount(tmp_path):
    try:
        tried = run_apart("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path)
    except FileNotFoundError as error:
        pytest.skip(f"no disk can be mounted here: no program {error.filename}")
    if tried.returncode:
        pytest.skip(f"no disk can be mounted here: {tried.stderr.strip()}")


@pytest.mark.slow
def test_a_full_disk_is_one_line_each_time_and_with_free_space_the_run_resumes(may_mount):
    done = run_apart(sys.executable, full_disk.__file__, "--times", "5")
    assert done.returncode == 0 and "same files, bit for bit" in done.stdout, done.stdout + done.stderr
