"""Fill a real, small disk in the middle of a run, make room, go on, and hold the files against those of a run
that was left alone.

    unshare -rm python tests/robustness/full_disk.py [--times 24]

The disk is a tmpfs (Linux; with `unshare -rm` no root is needed, where the system permits that). Whenever
the run has written another share of its files, the disk shrinks under it: to what lies on it and a little
room, or to the number of files on it. The process must end with code 2 and one line that says what could
not be written, why and what to do, and leave no half a file; with room again the same command goes on,
until the disk shrinks next. At the end the disk is made read-only. Ends with exit code 1 if a file differs
or a process ends in another way.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import kills

PLENTY = "size=256m,nr_inodes=10000"
# Bytes of room: none, a few pages for records, more for half a model or half a training state; None: any, but
# not for another file.
ROOMS = (0, 4096, None, 12288, 2_000_000, 0, 4096, 65536, 5_000_000, None, 8192, 0)
SAID = r"minisr: cannot write (?:into )?(\S+): "
FULL = re.compile(SAID + r"(?:No space left on device|the disk may be full); free some space[^\n]+\n")
READ_ONLY = re.compile(SAID + r"Read-only file system; [^\n]+\n")
# With a state every other step in SFT, too, one fills the disk before its model can.
CONFIG = kills.CONFIG.replace("save_every = 2", "save_every = 50")


def main() -> int:
    options, faults, told, runs = _options(), [], [], 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves neither the disk nor a process behind
    with mounted(Path(tempfile.mkdtemp())) as disk:
        (disk / "config.toml").write_text(CONFIG)
        order, expected = left_alone(disk), kills.files(disk / "run")
        print(f"left alone: {len(expected)} files, {len(order)} with those that do not stay", flush=True)
        plans = [(order[-2:], 65536)], list(zip(spread(order, options.times - 1), cycle(ROOMS)))
        for plan in plans:  # the first leaves room for all that is still to come but report.html
            while plan and not faults:
                shutil.rmtree(disk / "run")
                told += filled(disk, plan, faults)
                runs += 1
                faults += kills.differences(kills.files(disk / "run"), expected)
        print(f"{len(told)} times full in {runs} runs, and could not be written: " + counted(told))
        if len(told) < options.times / 2:
            faults.append("too seldom full: in more than half of all times the room sufficed")
        faults += read_only(disk)
    print("\n".join(faults) or "one line each time, and every run ended with the same files, bit for bit")
    return 1 if faults else 0


def _options():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--times", type=int, default=24, help="how often the disk shrinks; default 24")
    return parser.parse_args()


@contextmanager
def mounted(folder: Path):
    """A folder with a disk of its own."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", PLENTY, "tmpfs", folder], check=True)
    try:
        if not resize(folder, PLENTY):
            raise SystemExit("this system mounts a disk, but does not let it be resized")
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


def resize(disk: Path, how: str) -> bool:
    """Whether it could be done: no disk becomes smaller than what is on it."""
    command = ["mount", "-t", "tmpfs", "-o", f"remount,{how}", "tmpfs", disk]  # nothing from /proc/mounts
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def shrink(disk: Path, room: int | None) -> bool:
    """Leave so many bytes, or room for no other file."""
    now = os.statvfs(disk)
    if room is None:
        return resize(disk, f"nr_inodes={now.f_files - now.f_ffree}")
    return resize(disk, f"size={(now.f_blocks - now.f_bfree) * now.f_frsize + room}")


def left_alone(disk: Path) -> list[str]:
    """A whole run: every file that was seen in it, in the order of their appearing; of the training states of
    a model the first."""
    process, run, seen = kills.start_run(disk, "run"), disk / "run", {}
    while process.poll() is None:
        seen |= {path.relative_to(run): None for path in run.rglob("*") if path.suffix and path.is_file()}
        time.sleep(0.005)
    code, told = kills.finish(process)
    if code:
        raise SystemExit(f"the run that was left alone: exit code {code}: {told}")
    firsts = {kind(name): name for name in reversed(seen) if name.suffix != ".part"}
    return [name for name in seen if name in firsts.values()]


def spread(order: list[Path], times: int) -> list[list[Path]]:
    """All files, those after the first share of them, ...: one of them is awaited before the disk shrinks."""
    return [order[number * len(order) // times:] for number in range(times)]


def filled(disk: Path, plan: list[tuple], faults: list[str]) -> list[str]:
    """A run, with the disk shrunk whenever one of the next files is there: what was said each time. What is
    left of the plan when the run is whole is for another run."""
    told = []
    while plan:
        code, said = started(disk, *plan.pop(0))
        resize(disk, PLENTY)
        if code == 0:
            return told
        told.append(said)
        print(said.strip(), flush=True)
        left = [str(path) for path in (disk / "run").rglob("*.part")]
        if code != 2 or not FULL.fullmatch(said) or left:
            faults.append(f"exit code {code}, left {left}: {said[-2000:]}")
    code, said = started(disk, [], 0)
    if code:
        faults.append(f"with room: exit code {code}: {said[-2000:]}")
    return told


def started(disk: Path, awaited: list[Path], room: int | None) -> tuple[int, str]:
    """Start the run; when it makes one of these files, shrink the disk. Its exit code and what it said."""
    ahead = [path for name in awaited if not (path := disk / "run" / name).exists()]
    process = kills.start_run(disk, "run")
    try:
        while ahead and process.poll() is None and not any(path.exists() for path in ahead):
            time.sleep(0.002)
        if ahead and process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            while not shrink(disk, room):
                pass  # what it was writing came in between
            process.send_signal(signal.SIGCONT)
        return kills.finish(process)
    finally:
        process.kill()


def read_only(disk: Path) -> list[str]:
    """What is wrong with what the commands say of a whole run that nobody may change."""
    def minisr(*arguments):
        return subprocess.run([sys.executable, "-m", "minisr", *arguments], text=True, capture_output=True,
                              env=os.environ | {"TQDM_DISABLE": "1"})
    faults, run = [], disk / "run"
    resize(disk, "ro")
    for arguments in (["run", disk / "config.toml", "--out", run], ["eval", run], ["report", run],
                      ["run", disk / "config.toml", "--out", disk / "new"], ["eval", run, "--export", disk],
                      ["export", run / "M1", "--out", disk / "new"]):
        done = minisr(*arguments)
        if done.returncode != 2 or not READ_ONLY.fullmatch(done.stderr):
            faults.append(f"read-only, {arguments[0]}: exit code {done.returncode}: {done.stderr[-2000:]}")
    if (done := minisr("show", run)).returncode:  # reads only
        faults.append(f"read-only, show: exit code {done.returncode}: {done.stderr[-2000:]}")
    resize(disk, "rw")
    return faults


def counted(told: list[str]) -> str:
    """How often each file was named."""
    named = Counter(kind(Path(found[1])) for said in told if (found := FULL.match(said)))
    return ", ".join(f"{name} {count}" for name, count in sorted(named.items()))


def kind(path: Path) -> str:
    """Its folder and name, without the number of a training's step."""
    return f"{path.parent.name}/{re.sub('-[0-9]+', '', path.name)}"


if __name__ == "__main__":
    sys.exit(main())
