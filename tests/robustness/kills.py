"""Kill a small run at random instants, resume it, and compare its files with those of an uninterrupted run.

    python tests/robustness/kills.py [--kills 60] [--signal 9] [--seed 0] [--folder FOLDER] [--processes 1 2 4]

Each process resumes where the one before it was killed, until the run is complete; then the next run begins. With
--processes, each time with one of these numbers of processes, and either one of them is killed or their launcher.
Ends with exit code 1 if a file differs, if a process prints "Traceback", or if it ends with an unexpected exit code.
Linux only: /proc says whether a process has a signal handler.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = """iterations = 1
device = "cpu"
threads = 1
seed_data = {ift = 48, ranked = 32, judge_evaluation = 8, evaluation = 24}
sft = {batch_size = 8, epochs = 1, save_every = 2}
prompts = {count = 24, max_rouge_l = 1.0, rows = 8, round_size = 16}
responses = {rows = 16, temperature = 1.0}
judge = {rows = 48, judgements = 2}
evaluate = {rows = 8}
dpo = {batch_size = 4, replay_weight = 0.5, save_every = 1, dropout = 0.1}
"""


def main() -> int:
    options = _options()
    folder = Path(options.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(CONFIG)
    start = time.perf_counter()
    whole = finish(start_run(folder, "whole"))
    seconds = time.perf_counter() - start
    expected = files(folder / "whole")
    print(f"uninterrupted: {seconds:.1f} s, exit code {whole[0]}, {len(expected)} files")
    rng, kills, runs, faults, stages = random.Random(options.seed), 0, 0, [], {}
    while kills < options.kills:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        while True:  # until this run is complete
            process, handled = start_run(folder, "killed", rng.choice(options.processes)), True
            try:
                process.wait(rng.uniform(0.02, 0.6) * seconds)
            except subprocess.TimeoutExpired:
                target = rng.choice([process.pid, *children(process.pid)])
                handled = target != process.pid or handles(process.pid, options.signal)
                os.kill(target, options.signal)
                kills += 1
            code, message = finish(process)
            if code < 0:
                time.sleep(0.3)  # the processes end when they notice that their launcher has
            where = newest(folder / "killed")
            stages[where] = stages.get(where, 0) + 1
            # Without minisr's handler, at start-up and at shut-down, a signal ends the process at once.
            expected_codes = [0, 130 if handled else -options.signal]
            if "Traceback" in message or code not in expected_codes:
                faults.append(f"exit code {code}: {message[-500:]}")
            if code == 0:
                break
        runs += 1
        faults += [f"run {runs}: {name}" for name in differences(files(folder / "killed"), expected)]
    print(f"{kills} kills by signal {options.signal} in {runs} runs, newest file at each end: "
          + ", ".join(f"{name} {count}" for name, count in sorted(stages.items())))
    print("\n".join(faults) or "every run ended with the same files, bit for bit")
    return 1 if faults or whole[0] else 0


def _options():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--signal", type=int, default=9, help="9 (default) or 15")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="folder of the runs; default a new temporary one")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], metavar="N",
                        help="numbers of processes to choose from; default 1")
    return parser.parse_args()


def start_run(folder: Path, name: str, processes: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-m", "minisr", "run", folder / "config.toml", "--out", folder / name]
    if processes > 1:
        command += ["--processes", str(processes)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"TQDM_DISABLE": "1"})


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and stderr."""
    message = process.communicate()[1]
    return process.returncode, message


def is_alive(pid: int) -> bool:
    """Whether a process runs. On Linux, a zombie does not count."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(") ")[2][0] != "Z"


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def handles(pid: int, number: int) -> bool:
    """Whether the process has a handler for this signal, by its mask of caught signals."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(caught and int(caught[1], 16) >> number - 1 & 1)


def files(run: Path) -> dict[str, str]:
    """The hash of every file, without recorded seconds."""
    return {path.relative_to(run).as_posix(): hashlib.sha256(_without_seconds(path)).hexdigest()
            for path in run.rglob("*") if path.is_file() and path.name not in ("timing.json", "report.html")}


def _without_seconds(path: Path) -> bytes:
    return re.sub(rb'"seconds": [0-9.]+', b"", path.read_bytes())


def differences(found: dict, expected: dict) -> list[str]:
    return [f"{name} differs" if name in found and name in expected else f"{name} exists in one run only"
            for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]


def newest(run: Path) -> str:
    """The kind of the file written last: how far the run has come."""
    made = [path for path in run.rglob("*") if path.is_file()] if run.exists() else []
    last = max(made, key=lambda path: path.stat().st_mtime, default=None)
    return f"{last.parent.name}/{re.split('[-.]', last.name)[0]}" if last else "nothing"


if __name__ == "__main__":
    sys.exit(main())
