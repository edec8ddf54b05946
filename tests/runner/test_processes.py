"""Several processes do what one does: the same files, bit for bit, whatever ends and is resumed in between."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import kills
import pytest
import torch
from small_run import minisr, settings, write_config

from minisr import InputError, cli
from minisr.runner import launcher, processes
from minisr.runner.gradients import GradientSum
from minisr.runner.resumable import DEFAULT_MICRO_BATCHES

# Uneven numbers of batches, micro-batches that do not divide, dropout, and a judge that writes the EFT data.
CONFIG = """
iterations = 1
device = "cpu"
threads = 1
seed_data = {ift = 18, ranked = 12, judge_evaluation = 4, evaluation = 7}
sft = {batch_size = 7, epochs = 1, learning_rate = 3e-3, dropout = 0.1, save_every = 2}
prompts = {count = 9, max_rouge_l = 0.95, rows = 4, round_size = 10, max_new_tokens = 24}
responses = {candidates = 3, temperature = 1.0, top_p = 1.0, rows = 6, max_new_tokens = 40}
judge = {judgements = 2, rows = 10, max_new_tokens = 60}
evaluate = {rows = 2, max_new_tokens = 40}
dpo = {batch_size = 4, learning_rate = 3e-4, replay_weight = 0.5, dropout = 0.1, epochs = 2, save_every = 1}
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
RUN = [sys.executable, "-m", "minisr", "run"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="/proc names the processes of a process")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"), CONFIG)


@pytest.fixture(scope="module")
def expected(config, no_drawing):
    """The files of a run in one process."""
    out = config.parent / "one"
    code, _, errors = minisr("run", config, "--out", out)
    assert code == 0, errors
    return kills.files(out)


def run(config, out, *options, command=RUN):
    return subprocess.run([*command, config, "--out", out, *options], capture_output=True, text=True, env=ENVIRONMENT)


def start(config, out, n):
    return subprocess.Popen([*RUN, config, "--out", out, "--processes", str(n)], env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def workers_of(process) -> list[int]:
    return kills.children(process.pid)


# Whole runs.


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_writes_the_same_files(config, expected, n, tmp_path):
    done = run(config, tmp_path / "run", "--processes", str(n))
    assert done.returncode == 0 and done.stderr == ""
    assert kills.differences(kills.files(tmp_path / "run"), expected) == []
    assert done.stdout.count("Judge metrics") == 1 and done.stdout.count("\nM2 ") == 2  # as it grows, and in the table


@pytest.mark.slow
def test_torchrun_does_the_same(config, expected, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minisr",
                "run"]
    done = run(config, tmp_path / "run", command=torchrun)
    assert done.returncode == 0, done.stderr
    assert kills.differences(kills.files(tmp_path / "run"), expected) == []
    assert done.stdout.count("Judge metrics") == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@needs_proc
def test_a_killed_process_ends_the_run_with_one_line_that_names_it(config, expected, victim, tmp_path):
    process = start(config, tmp_path / "run", 3)
    wait_for(tmp_path / "run" / "SFT" / "meta.json")
    workers = workers_of(process)
    os.kill(workers[victim], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert errors == f"minisr: process {victim} of 3 was killed by signal 9; run the same command again to resume\n"
    assert process.returncode == 130 and not any(map(kills.is_alive, workers))
    assert run(config, tmp_path / "run", "--processes", "2").returncode == 0  # another number goes on
    assert kills.differences(kills.files(tmp_path / "run"), expected) == []


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_and_saves_their_work(config, expected, tmp_path):
    process = start(config, tmp_path / "run", 2)
    wait_for(tmp_path / "run" / "SFT" / "meta.json")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; to resume, run the same command again" in errors and "Traceback" not in errors
    assert run(config, tmp_path / "run").returncode == 0
    assert kills.differences(kills.files(tmp_path / "run"), expected) == []


@needs_proc
def test_the_processes_end_with_their_launcher(config, tmp_path):
    process = start(config, tmp_path / "run", 2)
    wait_for(tmp_path / "run" / "config.toml")
    workers = workers_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(kills.is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.communicate()


@pytest.mark.slow
def test_killed_at_random_instants_and_resumed_with_other_numbers_of_processes(tmp_path):
    options = ["--kills", "20", "--processes", "1", "2", "4", "--folder", tmp_path]
    command = [sys.executable, kills.__file__, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and "same files, bit for bit" in done.stdout, done.stdout + done.stderr


# Errors.


def run_workers(code: str, folder) -> list[tuple[str, int]]:
    """Run this Python code in two connected processes; return the output and exit code of each."""
    environment = {**ENVIRONMENT, **launcher.LOOPBACK, "WORLD_SIZE": "2", "MINISR_RENDEZVOUS": str(folder / "meet")}
    workers = [subprocess.Popen([sys.executable, "-c", code], env=environment | {"RANK": str(rank)}, text=True,
                                stdout=subprocess.PIPE) for rank in range(2)]
    return [(worker.communicate(timeout=60)[0], worker.returncode) for worker in workers]


@pytest.mark.parametrize("changes", ["nonsense=1", pytest.param("seed_model=/nowhere", marks=pytest.mark.slow)])
def test_wrong_input_is_one_line_in_several_processes_too(config, changes, tmp_path):
    code, _, errors = minisr("run", config, "--out", tmp_path / "run", *settings(changes))
    together = run(config, tmp_path / "run", "--set", changes, "--processes", "2")
    assert code == together.returncode == 2
    assert together.stderr == errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_error_disconnects_the_processes_before_they_end(tmp_path):
    # PyTorch's threads abort about every second process that ends connected.
    worker = """
import atexit
from torch import distributed
from minisr.runner import processes
atexit.register(lambda: print(distributed.is_initialized()))  # after all that is registered later
processes.start()
print(distributed.is_initialized())
raise SystemExit(2)
"""
    (output, code), (_, other) = run_workers(worker, tmp_path)
    assert output.split() == ["True", "False"] and (code, other) == (2, 2)


@pytest.mark.parametrize("n", ["0", "-1", "two", "1.5", "5000"])
def test_a_wrong_number_of_processes_is_refused(config, n, tmp_path):
    code, out, errors = minisr("run", config, "--out", tmp_path / "run", f"--processes={n}")
    assert (code, out) == (2, "") and not (tmp_path / "run").exists()
    assert re.fullmatch(r"minisr: --processes must be a number from 1 to 1024 .*\n", errors)


def test_auto_means_one_process_a_core_without_a_gpu(monkeypatch):
    monkeypatch.setattr(launcher, "available_gpus", lambda: 2)
    assert launcher.automatic_number("cpu", threads=1) == launcher.available_cores() >= 1
    assert launcher.automatic_number("cpu", threads=4096) == 1
    assert launcher.automatic_number("auto", threads=1) == 2
    assert launcher.number_of_processes("3") == 3
    with pytest.raises(InputError, match="not 'many'"):
        launcher.number_of_processes("many")


def test_more_threads_than_cores_are_one_line(monkeypatch, capsys):
    monkeypatch.setenv("MINISR_RENDEZVOUS", "a file")  # in a process of the launcher
    monkeypatch.setattr(launcher, "available_cores", lambda: 2)
    for n, threads in ((2, 1), (3, 1), (1, 2)):
        cli._warn_of_too_many_threads(n, threads)
    assert capsys.readouterr().err == ""
    cli._warn_of_too_many_threads(2, 2)
    assert capsys.readouterr().err == "minisr: 2 processes of 2 threads each share 2 cores; --set threads=1 is faster\n"


def test_there_are_at_most_as_many_processes_as_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    processes.check_gpus(3)
    with pytest.raises(InputError, match="3 processes, but this machine has 2 GPUs"):
        processes.check_gpus(2)


def test_a_lost_connection_is_one_line_and_code_75(config, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise processes.ProcessLost("connection closed")

    monkeypatch.setattr(cli, "_open_run", fail)
    assert cli.main(["run", str(config), "--out", str(tmp_path / "run")]) == 75
    assert capsys.readouterr().err == ("minisr: process 0 of 1 lost the connection to another (connection closed); run "
                                       "the same command again to resume\n")


def test_processes_that_see_other_files_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda value: [value, value])
    processes.check_same(3, "a folder")
    monkeypatch.setattr(processes, "gather", lambda value: [value, value + 1])
    with pytest.raises(InputError, match="do not see the same files in a folder"):
        processes.check_same(3, "a folder")


def test_torchrun_and_processes_do_not_go_together(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["run", str(config), "--out", str(tmp_path / "run"), "--processes", "2"]) == 2
    assert capsys.readouterr().err == ("minisr: torchrun has started several processes already; leave out "
                                       "--processes\n")


@pytest.mark.parametrize("variables, named", [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but no RANK"), ({"WORLD_SIZE": "x"}, "WORLD_SIZE='x'"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2, but no MASTER_ADDR")])
def test_a_world_size_that_torchrun_did_not_set_is_one_line(variables, named, config, tmp_path, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["run", str(config), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert named in error and "unset" in error and error.count("\n") == 1


def test_a_launcher_of_a_given_number_does_not_import_pytorch(config, tmp_path):
    code = ("import sys; from minisr.cli import main; from minisr.runner import launcher\n"
            "launcher.launch = lambda arguments, n: print(n, 'torch' in sys.modules) or 0\n"
            "sys.exit(main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, "run", str(config), "--processes", "2"], text=True,
                          capture_output=True)
    assert done.stdout == "2 False\n" and done.returncode == 0


def test_gather_returns_values_of_any_length(tmp_path):
    worker = """
from minisr.runner import processes
processes.start()
for value in ({}, [1.5, None], "x" * 4_000, "x" * 4_081, "x" * 100_000, b"\\0" * 5_000):
    own = (processes.rank(), value if processes.rank() else None)
    assert processes.gather(own) == [(0, None), (1, value)], value
processes.finish()
"""
    assert [code for _, code in run_workers(worker, tmp_path)] == [0, 0]


# The sum of gradients.


def quadratic_losses(parameters, coefficients):
    def loss(c):
        return sum((c * p.square()).sum() for p in parameters), {"count": 1}
    return [partial(loss, c) for c in coefficients]


@pytest.mark.parametrize("count", range(1, 10))
def test_the_gradient_is_the_sum_over_all_losses(count):
    parameters = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in [(3, 2), (5,)]]
    coefficients = torch.rand(count, dtype=torch.float64)
    gradient = GradientSum(torch.optim.SGD(parameters), quadratic_losses(parameters, coefficients), seed=0)
    gradient.compute()
    for p in parameters:  # the derivative of c x^2 is 2 c x
        torch.testing.assert_close(p.grad, 2 * coefficients.sum() * p.detach(), rtol=1e-12, atol=1e-12)
    metrics = gradient.total_metrics([gradient.metrics])
    assert metrics["count"] == count and sorted(gradient.order) == list(range(count))
    squares = sum(p.detach().square().sum() for p in parameters)
    assert metrics["loss"] == pytest.approx((coefficients.sum() * squares).item())


def test_the_order_of_the_sum_is_fixed():
    # In float32, (big + 1) - big is 0 and (big - big) + 1 is 1. Four losses are summed in the order 0, 2, 1, 3, since
    # the second half, the replayed examples, is interleaved with the first.
    p, big = torch.ones(1, requires_grad=True), 2.0**26

    def total(*coefficients):
        gradient = GradientSum(torch.optim.SGD([p]), quadratic_losses([p], [c / 2 for c in coefficients]), seed=0)
        gradient.compute()
        return p.grad.item()
    assert total(big, 1.0, -big, 1.0) == 2.0
    assert total(big, -big, 1.0, 1.0) == 1.0


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 11])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_every_loss_has_one_owner_and_the_work_is_even(size, count, monkeypatch):
    monkeypatch.setattr(processes, "size", lambda: size)
    gradient = GradientSum(torch.optim.SGD([torch.ones(1)]), [None] * count, seed=0)
    owners = [gradient.owner(position) for position in range(count)]
    shares = [owners.count(rank) for rank in range(size)]
    assert sum(shares) == count and owners == sorted(owners) and owners[0] == 0
    assert max(shares) - min(shares) <= 1


def test_pairs_and_replayed_examples_are_both_dealt_to_all():
    gradient = GradientSum(torch.optim.SGD([torch.ones(1)]), [None] * (2 * DEFAULT_MICRO_BATCHES), seed=0)
    first_half = gradient.order[:DEFAULT_MICRO_BATCHES]  # of the first of two processes
    assert sum(index < DEFAULT_MICRO_BATCHES for index in first_half) == DEFAULT_MICRO_BATCHES / 2
