"""minisr bench --processes N, and benchmarks/communication.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minisr.cli import main
from minisr.runner import launcher

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
# Little work. Each process also writes down how many batches of sampling and losses of training it computed.
WORKER = """
import json, os, sys
from collections import Counter
from pathlib import Path
from minisr import bench
from minisr.cli import main
from minisr.fast import FastLM
from minisr.runner import processes
from minisr.runner.gradients import GradientSum

calls = Counter()

def counted(cls, name):
    method = getattr(cls, name)
    def count(*arguments, **options):
        calls[f"{name} of {processes.size()}"] += 1
        return method(*arguments, **options)
    setattr(cls, name, count)

bench.SIZES["world"] = bench.Size(8, 8, 8, 6, 4)
counted(FastLM, "sample_batch")
counted(GradientSum, "backward")
code = main(sys.argv[2:])
if sys.platform == "linux":
    threads = [Path("/proc/self/task", thread, "comm").read_text() for thread in os.listdir("/proc/self/task")]
    assert not [name for name in threads if "gloo" in name], "not disconnected"
Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(calls))
sys.exit(code)
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes")


def bench_with(n, folder, *options):
    """The output of the first of n processes, and what each of them computed."""
    pytest.importorskip("minisr.fast")
    command = [sys.executable, "-c", WORKER, folder, "bench", "--model", "tiny", "--processes", str(n), *options]
    environment = {**ENVIRONMENT, "WORLD_SIZE": str(n), "MINISR_RENDEZVOUS": str(folder / "rendezvous")}
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, env={**environment, "RANK": str(rank)}) for rank in range(n)]
    outputs = []
    for worker in workers:  # stdin stays open: a worker ends with its launcher
        outputs.append((worker.stdout.read(), worker.stderr.read()))
        assert worker.wait() == 0, outputs
    assert all(output == ("", "") for output in outputs[1:]) and outputs[0][1] == ""
    return outputs[0][0].splitlines(), [json.loads((folder / f"{rank}.json").read_text()) for rank in range(n)]


@pytest.mark.slow
def test_processes_share_every_work_and_are_compared_with_one(tmp_path):
    lines, calls = bench_with(2, tmp_path, "--repeats", "2", "--threads", "1")
    document = json.loads(lines[-1])
    assert document["processes"] == 2 and document["machine"]["threads"] == 1
    works = ["prompts", "responses", "judging", "reference", "dpo", "sft"]
    assert [result["work"] for result in document["results"]] == [line.split()[0] for line in lines[1:-1]] == works
    for result in document["results"]:
        assert result["peer"] == "one process" and len(result["runs"]) == len(result["their_runs"]) == 2
        # The same tokens on both sides, so rates have the ratio of seconds.
        ratios = [ours / theirs for ours, theirs in zip(result["runs"], result["their_runs"])]
        assert result["ratio_min"] == pytest.approx(min(ratios)) and result["ratio_max"] == pytest.approx(max(ratios))
        assert result["seconds_min"] <= result["seconds_median"] <= result["seconds_max"]
        assert result["their_seconds_median"] > 0
    # Three works of sampling in 4 batches and two of training with 4 losses, in 1 + 2 turns. Two processes have half
    # each; the first does all once more by itself.
    half = {"sample_batch of 2": 3 * 2 * 3, "backward of 2": 2 * 2 * 3}
    assert calls[1] == half
    assert calls[0] == half | {"sample_batch of 1": 3 * 4 * 3, "backward of 1": 2 * 4 * 3}


def test_the_command_starts_the_processes(monkeypatch):
    launched = []
    monkeypatch.setattr(launcher, "launch", lambda arguments, n: launched.append((arguments, n)) or 0)
    arguments = ["bench", "--model", "tiny", "--processes", "3"]
    assert main(arguments) == 0 and launched == [(arguments, 3)]


@pytest.mark.parametrize("options, message", [
    ("--processes 0", "--processes must be a number"), ("--processes 2 --only dreaming", "--only dreaming"),
    ("--processes 2 --model nowhere/M1", "nowhere/M1"),
    ("--processes 2 --without row-dropping", "do not go together")])
def test_a_wrong_option_is_one_line_and_code_2_before_any_process_starts(options, message, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "launch", lambda *_: pytest.fail("started processes"))
    assert main(["bench", "--repeats", "1", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


# Communication.


@pytest.fixture
def communication(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import communication
    return communication


def test_seconds_on_paper_are_those_by_hand(communication):
    network = communication.Network(bandwidth=100.0, latency=0.5, sums=50.0)
    # 8 ranks: 7 times 2 s of bandwidth, 0.5 s of latency and 4 s to add; then a tree of 3 levels sends the total.
    assert communication.chain_seconds(200, 8, network) == 7 * (2.5 + 4) + 3 * 2.5
    assert communication.chain_bytes(200, 8) == 7 * 200 * 2
    # A ring of 4: 3 hops of a quarter, in 2 pieces of one latency each.
    assert communication.ring_seconds(400, 4, network, 2) == 3 * (1 + 2 * 0.5)
    # FSDP2 on 2 ranks, 32 layers: twice 2 bytes a parameter, once 4, half of each.
    assert communication.sharded_seconds(100, 2, network) == 2 * (1 + 16) + (2 + 16)


@pytest.mark.slow
def test_the_measured_bytes_are_those_on_paper():
    command = [sys.executable, BENCHMARKS / "communication.py", "--quick", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    (measured,) = document["measured"]
    assert measured["expected_bytes"] == 2 * 873_600 * 4  # one gradient up, the sum down
    if sys.platform == "linux":
        assert 1 <= measured["loopback_bytes"] / measured["expected_bytes"] < 1.5  # headers, and other programs
    assert 0 < measured["broadcast_seconds"] < measured["step_seconds"]
    assert len(document["extrapolated"]) == 9


def test_the_models_on_paper_have_their_sizes(communication):
    from minisr.runner.checkpoint import SEED_MODEL, load_model
    model, _ = load_model(SEED_MODEL)
    assert communication.PARAMETERS["tiny"] == sum(p.numel() for p in model.parameters())
