"""Nothing is lost: journals, checksums, training states, the lock, signals, a full disk, too little memory."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from random import Random

import kills
import pytest
import torch
from tiny import PAIRS, tiny_model, tiny_tokenizer

from minisr import InputError, train
from minisr.dpo import train_dpo
from minisr.lm import ResponseConfig
from minisr.runner.config import DPOConfig, TrainConfig
from minisr.runner.engine import Workspace, run_lm_class
from minisr.runner.files import write_json
from minisr.runner.journal import Journal, TrainingState
from minisr.runner.stop import Stop
from minisr.runner.storage import folder_lock, verify_checksum, write_with_checksum
from minisr.sft import train_sft

EXAMPLES = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in PAIRS] * 4
SENTENCE = "Once there was a fox."


@pytest.fixture(autouse=True)
def not_stopped():
    yield
    Stop.requested = Stop.at_once = False


def run_lm(engine, model=None, **workspace):
    """A random model with this run's workspace."""
    lm = run_lm_class(engine)(model or tiny_model(), tiny_tokenizer())
    lm.workspace = Workspace("test", **workspace)
    return lm


def test_a_journal_gives_back_what_was_added(tmp_path):
    journal = Journal(tmp_path / "a.journal", "model", 3)
    assert journal.get(1, 0) is None
    journal.add([[[1, 2], True, -0.1]], 1, 0)
    journal.add([], 1, 16)
    again = Journal(tmp_path / "a.journal", "model", 3)
    assert (again.get(1, 0), again.get(1, 16), again.get(2, 0)) == ([[[1, 2], True, -0.1]], [], None)
    assert Journal(tmp_path / "a.journal", "model", 4).get(1, 0) is None  # made from something else


def test_a_journal_that_was_cut_or_has_a_flipped_bit_returns_nothing_wrong_and_can_be_continued(tmp_path):
    path = tmp_path / "a.journal"
    for wave in range(3):
        Journal(path, "x").add({"wave": wave}, wave)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        journal = Journal(path, "x")
        found = [journal.get(wave) for wave in range(3)]
        assert all(value in (None, {"wave": wave}) for wave, value in enumerate(found))
        assert (found[2] is None) and (cut > 60 or found[0] is None)
        journal.add("more", 9)
        assert Journal(path, "x").get(9) == "more"
    rng = Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert all(Journal(path, "x").get(wave) in (None, {"wave": wave}) for wave in range(3))


def test_sampling_resumes_after_the_last_whole_batch_with_the_same_result(engine, tmp_path, monkeypatch):
    prompts = [[i, i + 1] for i in range(3, 13)]

    def draw(journal):
        config = ResponseConfig(1.0, 1.0, 12, rows=4)
        return run_lm(engine, journal=journal).sample(prompts, 2, config, 5, (0,))
    expected = draw(Journal(tmp_path / "whole", "m"))
    assert any((c.logp is not None) == (engine == "fast") for row in expected for c in row if c.finished)
    batches = []

    def stop_after_two(self, *rest, add=Journal.add):
        add(self, *rest)
        batches.append(rest)
        Stop.requested = len(batches) == 2
    monkeypatch.setattr(Journal, "add", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        draw(Journal(tmp_path / "cut", "m"))
    Stop.requested = False
    assert draw(Journal(tmp_path / "cut", "m")) == expected
    assert len(batches) == 5  # of two prompts each, none of them computed twice
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_two_samplings_of_one_step_have_their_own_batches_in_its_journal(tmp_path):
    config, prompts = ResponseConfig(1.0, 1.0, 12, rows=4), [[i, i + 1] for i in range(3, 13)]
    lm = run_lm("plain", journal=Journal(tmp_path / "journal", "m"))
    first, second = (lm.sample(prompts, 2, config, seed, (0,)) for seed in (5, 6))
    again = run_lm("plain", journal=Journal(tmp_path / "journal", "m"))
    again.sample_batch = lambda *_: pytest.fail("sampled again")
    assert first != second == again.sample(prompts, 2, config, 6, (0,))


def test_without_a_journal_nothing_is_stored_and_the_result_is_the_same(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, prompts = ResponseConfig(1.0, 1.0, 12, rows=4), [[i, i + 1] for i in range(3, 13)]
    expected = run_lm(engine, journal=Journal(tmp_path / "journal", "m")).sample(prompts, 2, config, 5, (0,))
    (tmp_path / "journal").unlink()
    assert run_lm(engine).sample(prompts, 2, config, 5, (0,)) == expected
    assert not list(tmp_path.iterdir())


def trained(folder, how, config, stop_at=None, lm=None):
    """Train, stopped after so many steps of this call if stop_at says so: the trained LM or None, and the steps."""
    lm = lm or run_lm("fast")
    lm.workspace = Workspace("test", training_folder=folder, training_made_from=("data",))
    folder.mkdir(exist_ok=True)
    taken = []

    def step(*rest, step=train.optimizer_step):
        norm = step(*rest)
        taken.append(1)
        Stop.requested = len(taken) == stop_at
        return norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "optimizer_step", step)
        try:
            if how == "SFT":
                return train_sft(lm, EXAMPLES, config, 1), len(taken)
            return train_dpo(lm, PAIRS * 4, EXAMPLES, config, 1), len(taken)
        except KeyboardInterrupt:
            Stop.requested = False
            return None, len(taken)


RUNS = [("plain", torch.float32, "adamw"), ("fast", torch.float32, "adamw"), ("fast", torch.float32, "muon"),
        ("fast", torch.bfloat16, "adamw")]


@pytest.mark.parametrize("engine, dtype, optimizer", RUNS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("how, kind", [("SFT", TrainConfig), ("DPO", lambda **k: DPOConfig(replay_weight=0.5, **k))])
def test_an_interrupted_training_resumes_to_the_same_bits(how, kind, engine, dtype, optimizer, tmp_path):
    config = kind(batch_size=3, epochs=2, dropout=0.2, optimizer=optimizer, save_every=3)

    def begin(folder, stop_at=None):
        return trained(folder, how, config, stop_at, run_lm(engine, tiny_model().to(dtype)))
    whole, steps = begin(tmp_path / "whole")
    assert not torch.equal(whole.model.blocks[0].attention.qkv_proj.weight,
                           tiny_model().to(dtype).blocks[0].attention.qkv_proj.weight)
    for stop_at in (1, 3, steps - 1):
        folder = tmp_path / f"stopped-{stop_at}"
        lm, done = begin(folder, stop_at)
        assert lm is None and done == stop_at
        lm, rest = begin(folder)
        assert rest == steps - stop_at and not lm.model.training
        for (name, a), b in zip(lm.model.named_parameters(), whole.model.parameters()):
            assert torch.equal(a, b), name
        assert (folder / "train_log.jsonl").read_bytes() == (tmp_path / "whole/train_log.jsonl").read_bytes()
        (folder / "training-9.pt.part").write_text("a kill left it")
        (folder / "training notes.txt").write_text("somebody's own")
        TrainingState.remove(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["train_log.jsonl", "training notes.txt"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["training.json", "training-*.pt"])
@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
def test_a_damaged_training_state_is_not_trusted(name, damage, tmp_path):
    config = TrainConfig(batch_size=3, save_every=1)
    whole, steps = trained(tmp_path / "whole", "SFT", config)
    trained(tmp_path / "a", "SFT", config, stop_at=2)
    [path] = (tmp_path / "a").glob(name)
    damage(path)
    lm, done = trained(tmp_path / "a", "SFT", config)
    assert done in (steps, steps - 2)  # a flipped bit may be in the log, which is then still valid JSON
    assert done == steps or name == "training.json"
    for a, b in zip(lm.model.parameters(), whole.model.parameters()):
        assert torch.equal(a, b)
    assert (tmp_path / "a/train_log.jsonl").read_bytes() == (tmp_path / "whole/train_log.jsonl").read_bytes()


def test_the_state_of_another_training_is_not_used(tmp_path):
    trained(tmp_path / "a", "SFT", TrainConfig(batch_size=3), stop_at=2)
    _, done = trained(tmp_path / "a", "SFT", TrainConfig(batch_size=3, learning_rate=2e-3))
    assert done == 4


def test_a_training_goes_on_with_another_engine_and_micro_batch(tmp_path):
    whole, steps = trained(tmp_path / "whole", "SFT", TrainConfig(batch_size=3), lm=run_lm("plain"))
    trained(tmp_path / "a", "SFT", TrainConfig(batch_size=3), stop_at=2, lm=run_lm("plain"))
    config = TrainConfig(batch_size=3, micro_batch=2, save_every=1)
    lm, rest = trained(tmp_path / "a", "SFT", config, lm=run_lm("fast"))
    assert rest == steps - 2
    for a, b in zip(lm.model.parameters(), whole.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_outside_of_a_run_nothing_is_stored(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(batch_size=3, micro_batch=3)  # one micro-batch: nothing is added up in another order
    expected, _ = trained(tmp_path / "run", "SFT", config, lm=run_lm(engine))
    lm = train_sft(run_lm(engine), EXAMPLES, config, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    for a, b in zip(lm.model.parameters(), expected.model.parameters()):
        assert torch.equal(a, b)


OUT_OF_MEMORY = [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
                 RuntimeError("[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you "
                              "tried to allocate 8 bytes."),
                 MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_without_memory_a_batch_of_samples_is_halved_and_the_result_is_the_same(error, engine, tmp_path):
    config, prompts = ResponseConfig(1.0, 1.0, 12, rows=16), [[i, i + 1] for i in range(3, 23)]
    expected = run_lm(engine).sample(prompts, 2, config, 5, (0,))

    def sample(limit):
        lm, sizes = run_lm(engine, journal=Journal(tmp_path / f"{limit}", "m")), []

        def sample_batch(prompts, *rest, sample_batch=lm.sample_batch):
            sizes.append(len(prompts))
            if len(prompts) > limit:
                raise error
            return sample_batch(prompts, *rest)
        lm.sample_batch = sample_batch
        return lm.sample(prompts, 2, config, 5, (0,)), sizes
    completions, sizes = sample(3)
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 8, 4, 2, 2, 4, 2, 2, 4, 2, 2]
    assert [[c.ids for c in row] for row in completions] == [[c.ids for c in row] for row in expected]
    with pytest.raises(InputError, match="not enough memory for the samples of one prompt; try a new run with fewer"):
        sample(0)


def test_without_memory_for_one_pair_the_error_says_what_to_change(monkeypatch):
    def compute_logps(batch):
        raise MemoryError

    lm = run_lm("fast")
    monkeypatch.setattr(lm, "compute_logps", compute_logps)
    with pytest.raises(InputError, match="not enough memory to score one preference pair; .* responses.max_new_tokens"):
        lm.record_reference([{"prompt": "a", "chosen": "b", "rejected": "c"}])


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_without_memory_the_micro_batch_is_halved_and_the_gradient_is_the_same_sum(error, dtype, tmp_path):
    config = TrainConfig(batch_size=8, micro_batch=4, learning_rate=1e-2)

    def run(limit):
        lm, sizes = run_lm("fast", tiny_model().to(dtype), training_folder=tmp_path), []
        rows = torch.arange(24).reshape(8, 3)

        def make_loss_fns(batch, config):
            def loss(number, part):
                sizes.append(len(part))
                if len(part) > limit and number == 1:  # the first part's gradient is there already
                    raise error
                return lm.model(rows[part]).float().square().mean((1, 2)).sum() / 8, {"rows": len(part)}
            return [partial(loss, *part) for part in enumerate(train.micro_batches(batch, config))]
        return lm.model, sizes, lm.fit([list(range(8))] * 3, make_loss_fns, config)
    whole, _, log = run(8)
    halved, sizes, parts = run(3)
    assert sizes == [4, 4, *[2] * 12]  # the smaller size is used from then on
    assert [r["rows"] for r in parts] == [8, 8, 8]  # what failed is not counted
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert [r["loss"] for r in parts] == pytest.approx([r["loss"] for r in log], rel=tolerance)
    assert [r["grad_norm"] for r in parts] == pytest.approx([r["grad_norm"] for r in log], rel=10 * tolerance)
    for a, b in zip(whole.parameters(), halved.parameters()):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance)
    with pytest.raises(InputError, match="one example at a time"):
        run(0)


def test_dropout_is_drawn_again_as_it_was_where_memory_ran_out(tmp_path):
    drawn = []

    def make_loss_fns(batch, config):
        def loss():
            drawn.append(torch.rand(3).tolist())
            if len(drawn) == 1:
                raise MemoryError
            return lm.model(torch.tensor([[1, 2]])).square().mean(), {}
        return [loss]
    lm = run_lm("plain", training_folder=tmp_path)
    lm.fit([[0]], make_loss_fns, TrainConfig(micro_batch=2))
    assert len(drawn) == 2 and drawn[0] == drawn[1]


def test_every_micro_batch_of_every_step_draws_dropout_of_its_own(tmp_path):
    drawn = []

    def loss():
        drawn.append(torch.rand(1).item())
        return lm.model(torch.tensor([[1, 2]])).square().mean(), {}
    lm = run_lm("plain", training_folder=tmp_path)
    lm.fit([[0]] * 3, lambda *_: [loss, loss], TrainConfig())
    assert len(set(drawn)) == len(drawn) == 6


def test_a_max_grad_norm_of_0_leaves_the_gradient_as_it_is(tmp_path):
    def trained_with(max_grad_norm):
        lm = run_lm("plain", training_folder=tmp_path)

        def make_loss_fns(batch, config):
            return [lambda: (100 * lm.model(torch.tensor([[1, 2]])).square().mean(), {})]
        log = lm.fit([[0]] * 2, make_loss_fns, TrainConfig(max_grad_norm=max_grad_norm))
        return torch.cat([p.detach().flatten() for p in lm.model.parameters()]), log[0]["grad_norm"]
    (free, norm), (loose, _), (tight, _) = map(trained_with, (0.0, 1e9, 1e-9))
    assert norm > 1 and torch.equal(free, loose) and not torch.equal(free, tight)


@pytest.mark.parametrize("message", ["shapes do not match", "an allocation of seats"])
def test_another_runtime_error_does_not_mean_too_little_memory(message, tmp_path):
    def fail(*_):
        raise RuntimeError(message)
    lm = run_lm("plain", training_folder=tmp_path)
    with pytest.raises(RuntimeError, match=message):
        lm.fit([[0]], lambda *_: [fail], TrainConfig())
    lm.sample_batch = fail
    with pytest.raises(RuntimeError, match=message):
        lm.sample([[1, 2]] * 4, 1, ResponseConfig(), 5, (0,))


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(tmp_path):
    lm = run_lm("plain", training_folder=tmp_path)

    def make_loss_fns(batch, config):
        return [lambda: (lm.model(torch.tensor([[1, 2]])).square().mean() * batch, {})]
    with pytest.raises(InputError, match="test: .* not finite at step 2 of 4; try a new run with a lower"):
        lm.fit([1.0, 1.0, float("inf"), 1.0], make_loss_fns, TrainConfig(save_every=1))
    assert json.loads((tmp_path / "training.json").read_text())["step"] == 2


def test_a_checksum_detects_a_change_and_a_file_without_one_passes(tmp_path):
    path = tmp_path / "a.jsonl"
    verify_checksum(path)
    write_with_checksum(path, b"{}\n")
    verify_checksum(path)
    (tmp_path / "b.jsonl").write_text("{}")
    verify_checksum(tmp_path / "b.jsonl")
    for damage in (truncate, flip, empty):
        write_with_checksum(path, b'{"prompt": "News?"}\n')
        damage(path)
        with pytest.raises(InputError, match="a.jsonl is not the file"):
            verify_checksum(path)
    write_json(tmp_path / "hashes.json", [])
    with pytest.raises(InputError):
        verify_checksum(path)


def test_damaged_checksums_trust_nothing_and_do_not_stop_a_file_from_being_made_again(tmp_path):
    path = tmp_path / "a.jsonl"
    write_with_checksum(path, b"{}\n")
    (tmp_path / "hashes.json").write_text("[]")
    with pytest.raises(InputError, match="hashes.json is not what minisr wrote there"):
        verify_checksum(path)
    path.unlink()
    write_with_checksum(path, b"{}\n")
    verify_checksum(path)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write into .*run: Not a directory; choose another folder"):
        with folder_lock(tmp_path / "file" / "run"):
            pass


def test_a_system_without_locks_works_without(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with folder_lock(tmp_path), folder_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.fixture
def handlers():
    """Restores the signal handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first, second", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_first_signal_waits_for_the_next_check_and_a_second_does_not(first, second, handlers, capsys):
    Stop.on_signals()
    assert signal.getsignal(first) == signal.getsignal(second) == Stop._request
    Stop.check()
    signal.raise_signal(first)
    assert "send the signal again to stop at once" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        Stop.check()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(second)


def fail_to_write(*_, **__):
    raise OSError("Input/output error")


def test_a_closed_terminal_stops_a_run_unless_nohup_said_otherwise(handlers, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Stop.on_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    Stop.on_signals()
    monkeypatch.setattr("builtins.print", fail_to_write)  # the terminal is gone
    signal.raise_signal(signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt):
        Stop.check()


def test_a_command_without_out_does_not_advise_it(tmp_path):
    with folder_lock(tmp_path), pytest.raises(InputError, match="works in .*; wait until it ends$"):
        with folder_lock(tmp_path, has_out=False):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Not a directory; make it writable, or copy the run$"):
        with folder_lock(tmp_path / "file" / "run", has_out=False):
            pass


def test_a_second_process_in_a_folder_is_an_error(tmp_path):
    with folder_lock(tmp_path):
        with pytest.raises(InputError, match="another minisr process works in"):
            with folder_lock(tmp_path):
                pass
    with folder_lock(tmp_path):
        pass


@pytest.fixture
def started(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(train.__file__).parents[1]))
    (tmp_path / "config.toml").write_text(kills.CONFIG)

    def start(name="run"):
        process = kills.start_run(tmp_path, name)
        while not list(tmp_path.glob(f"{name}/SFT/training*")) and process.poll() is None:
            time.sleep(0.02)
        return process
    return start


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_step_saves_it_and_says_how_to_resume(number, started, tmp_path):
    process = started()
    busy = kills.start_run(tmp_path, "run")
    code, message = kills.finish(busy)
    assert code == 2 and "another minisr process works in" in message and message.count("\n") == 1
    process.send_signal(number)
    code, message = kills.finish(process)
    assert code == 130 and "to resume, run the same command again" in message and "Traceback" not in message
    assert list((tmp_path / "run").glob("*/training*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [9, 15])
def test_a_run_killed_at_random_instants_ends_with_the_same_files(number, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, kills.__file__, "--kills", "6", "--signal", str(number), "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "same files, bit for bit" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["os.fsync", "os.replace"])
def test_a_full_disk_is_one_line_and_leaves_no_partial_file(target, tmp_path, monkeypatch):
    model, state = tiny_model(), TrainingState(tmp_path, "x")
    optimizer = train.make_optimizer(model.named_parameters(), TrainConfig())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        for write in (lambda: write_with_checksum(tmp_path / "a.jsonl", b"{}\n"),
                      lambda: state.save([], model, optimizer)):
            with pytest.raises(InputError, match="No space left on device"):
                write()
        if target == "os.fsync":
            with pytest.raises(InputError, match="No space left"):
                Journal(tmp_path / "a.journal", "x").add(1, 0)
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "a.jsonl").exists()
    Journal(tmp_path / "a.journal", "x").add(1, 0)
    assert Journal(tmp_path / "a.journal", "x").get(0) == 1
