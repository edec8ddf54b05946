"""Fill a small disk during a run, free space, resume, and compare the files with those of an uninterrupted run.

    unshare -rm python tests/robustness/full_disk.py [--times 24]

The disk is a tmpfs (Linux; `unshare -rm` needs no root where the system permits it). Whenever the run has written
another share of its files, the disk shrinks: to the size of its files and a little free space, or to their number. The
process must end with exit code 2 and one line that says what could not be written, why, and what to do, and it must
leave no partial file. Then space is freed, and the same command resumes the run until the disk shrinks again. At the
end the disk is made read-only. Ends with exit code 1 if a file differs or a process ends in another way.
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
# Free bytes: none, a few pages for records, more for half a model or half a training state. None: enough, but not one
# more file.
ROOMS = (0, 4096, None, 12288, 2_000_000, 0, 4096, 65536, 5_000_000, None, 8192, 0)
MESSAGE = r"minisr: cannot write (?:into )?(\S+): "
FULL = re.compile(MESSAGE + r"(?:No space left on device|the disk may be full); free some space[^\n]+\n")
READ_ONLY = re.compile(MESSAGE + r"Read-only file system; [^\n]+\n")
# A training state every other step of SFT would fill the disk before the model does.
CONFIG = kills.CONFIG.replace("save_every = 2", "save_every = 50")


def main() -> int:
    options, faults, messages, runs = _options(), [], [], 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that neither the disk nor a process remains
    with mounted(Path(tempfile.mkdtemp())) as disk:
        (disk / "config.toml").write_text(CONFIG)
        order, expected = uninterrupted(disk), kills.files(disk / "run")
        print(f"uninterrupted: {len(expected)} files, {len(order)} with temporary ones", flush=True)
        plans = [(order[-2:], 65536)], list(zip(spread(order, options.times - 1), cycle(ROOMS)))
        for plan in plans:  # the first leaves space for all that follows except report.html
            while plan and not faults:
                shutil.rmtree(disk / "run")
                messages += run_with_full_disk(disk, plan, faults)
                runs += 1
                faults += kills.differences(kills.files(disk / "run"), expected)
        print(f"{len(messages)} times full in {runs} runs, not written: " + count_files(messages))
        if len(messages) < options.times / 2:
            faults.append("the disk filled too rarely: in more than half of all cases the space sufficed")
        faults += read_only(disk)
    print("\n".join(faults) or "one line each time, and every run ended with the same files, bit for bit")
    return 1 if faults else 0


def _options():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--times", type=int, default=24, help="how many times the disk shrinks; default 24")
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
    """Returns whether it succeeded: a disk cannot become smaller than its files."""
    command = ["mount", "-t", "tmpfs", "-o", f"remount,{how}", "tmpfs", disk]  # ignores /proc/mounts
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def shrink(disk: Path, room: int | None) -> bool:
    """Leave this many free bytes, or with None no free file."""
    now = os.statvfs(disk)
    if room is None:
        return resize(disk, f"nr_inodes={now.f_files - now.f_ffree}")
    return resize(disk, f"size={(now.f_blocks - now.f_bfree) * now.f_frsize + room}")


def uninterrupted(disk: Path) -> list[Path]:
    """Make a complete run. Returns every file that it wrote, in order; of a model's training states the first."""
    process, run, seen = kills.start_run(disk, "run"), disk / "run", {}
    while process.poll() is None:
        seen |= {path.relative_to(run): None for path in run.rglob("*") if path.suffix and path.is_file()}
        time.sleep(0.005)
    code, message = kills.finish(process)
    if code:
        raise SystemExit(f"the uninterrupted run: exit code {code}: {message}")
    firsts = {kind(name): name for name in reversed(seen) if name.suffix != ".part"}
    return [name for name in seen if name in firsts.values()]


def spread(order: list[Path], times: int) -> list[list[Path]]:
    """All files, those after the first share of them, and so on. The disk shrinks when one of them appears."""
    return [order[number * len(order) // times:] for number in range(times)]


def run_with_full_disk(disk: Path, plan: list[tuple], faults: list[str]) -> list[str]:
    """A run in which the disk shrinks as planned. Returns the error messages.

    If the run is complete before all of the plan has been used, the rest is for another run."""
    messages = []
    while plan:
        code, message = run_process(disk, *plan.pop(0))
        resize(disk, PLENTY)
        if code == 0:
            return messages
        messages.append(message)
        print(message.strip(), flush=True)
        partial = [str(path) for path in (disk / "run").rglob("*.part")]
        if code != 2 or not FULL.fullmatch(message) or partial:
            faults.append(f"exit code {code}, partial files {partial}: {message[-2000:]}")
    code, message = run_process(disk, [], 0)
    if code:
        faults.append(f"with free space: exit code {code}: {message[-2000:]}")
    return messages


def run_process(disk: Path, awaited: list[Path], room: int | None) -> tuple[int, str]:
    """Start or resume the run; shrink the disk when it writes one of these files. Returns exit code and stderr."""
    ahead = [path for name in awaited if not (path := disk / "run" / name).exists()]
    process = kills.start_run(disk, "run")
    try:
        while ahead and process.poll() is None and not any(path.exists() for path in ahead):
            time.sleep(0.002)
        if ahead and process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            while not shrink(disk, room):
                pass  # the file that it was writing has grown
            process.send_signal(signal.SIGCONT)
        return kills.finish(process)
    finally:
        process.kill()


def read_only(disk: Path) -> list[str]:
    """Wrong messages of the commands about a complete run on a read-only disk."""
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
    if (done := minisr("show", run)).returncode:  # it only reads
        faults.append(f"read-only, show: exit code {done.returncode}: {done.stderr[-2000:]}")
    resize(disk, "rw")
    return faults


def count_files(messages: list[str]) -> str:
    """How often each file could not be written."""
    names = Counter(kind(Path(found[1])) for message in messages if (found := FULL.match(message)))
    return ", ".join(f"{name} {count}" for name, count in sorted(names.items()))


def kind(path: Path) -> str:
    """Its folder and name, without the number of a training step."""
    return f"{path.parent.name}/{re.sub('-[0-9]+', '', path.name)}"


if __name__ == "__main__":
    sys.exit(main())
