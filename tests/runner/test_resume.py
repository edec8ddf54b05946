"""Nothing lost: journals, seals, training states, the lock, signals, a full disk, no memory."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import kills
import pytest
import torch
from minisr.runner.resume import Journal, TrainingState, check_seal, locked, write_sealed
from tiny import PAIRS, tiny_model, tiny_tokenizer

from minisr import InputError, train
from minisr.dpo import DPOConfig, train_dpo
from minisr.runner.files import write_json
from minisr.runner.stop import Stop
from minisr.sampler import SampleConfig, sample
from minisr.sft import train_sft
from minisr.train import OptimConfig, fit

EXAMPLES = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in PAIRS] * 4
SENTENCE = "Once there was a fox."


@pytest.fixture(autouse=True)
def not_stopped():
    yield
    Stop.asked = False


def test_a_journal_gives_back_what_was_kept(tmp_path):
    journal = Journal(tmp_path / "a.journal", "model", 3)
    assert journal.get(1, 0) is None
    journal.add([[[1, 2], True, -0.1]], 1, 0)
    journal.add([], 1, 16)
    again = Journal(tmp_path / "a.journal", "model", 3)
    assert (again.get(1, 0), again.get(1, 16), again.get(2, 0)) == ([[[1, 2], True, -0.1]], [], None)
    assert Journal(tmp_path / "a.journal", "model", 4).get(1, 0) is None  # made from something else


def test_a_journal_cut_anywhere_or_with_a_flipped_bit_gives_nothing_wrong_and_goes_on(tmp_path):
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


def test_sampling_goes_on_after_the_last_whole_wave_with_the_same_result(tmp_path, monkeypatch):
    model, prompts = tiny_model(), [[i, i + 1] for i in range(3, 13)]

    def draw(journal):
        config = SampleConfig(1.0, 1.0, 12, rows=4)
        return sample(model, prompts, 2, config, key=5, stop=(0,), with_logps=True, journal=journal)
    expected = draw(Journal(tmp_path / "whole", "m"))
    waves = []

    def stop_after_two(self, *rest, add=Journal.add):
        add(self, *rest)
        waves.append(rest)
        Stop.asked = len(waves) == 2
    monkeypatch.setattr(Journal, "add", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        draw(Journal(tmp_path / "cut", "m"))
    Stop.asked = False
    assert draw(Journal(tmp_path / "cut", "m")) == expected
    assert len(waves) == 5  # five waves of two prompts, none of them twice
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def trained(folder, how, config, stop_at=None, dtype=torch.float32):
    """Train, stopped after so many steps in all if asked: the model, or None."""
    model, tokenizer = tiny_model().to(dtype), tiny_tokenizer()
    folder.mkdir(exist_ok=True)
    taken = []

    def update(*rest, update=train.update):
        update(*rest)
        taken.append(1)
        Stop.asked = len(taken) == stop_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", update)
        try:
            if how == "SFT":
                train_sft(model, tokenizer, EXAMPLES, config, 1, "t", folder / "log.jsonl", "data")
            else:
                train_dpo(model, tokenizer, PAIRS * 4, EXAMPLES, config, 1, "t", folder / "log.jsonl",
                          made_from="data")
        except KeyboardInterrupt:
            Stop.asked = False
            return None, len(taken)
    return model, len(taken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("how, kind", [("SFT", OptimConfig), ("DPO", lambda **k: DPOConfig(replay=0.5, **k))])
def test_a_training_stopped_anywhere_goes_on_to_the_same_bits(how, kind, optimizer, dtype, tmp_path):
    config = kind(batch_size=3, epochs=2, dropout=0.2, optimizer=optimizer, save_every=3)
    whole, steps = trained(tmp_path / "whole", how, config, dtype=dtype)
    for stop_at in (1, 3, steps - 1):
        folder = tmp_path / f"stopped-{stop_at}"
        model, done = trained(folder, how, config, stop_at, dtype)
        assert model is None and done == stop_at
        model, rest = trained(folder, how, config, dtype=dtype)
        assert rest == steps - stop_at
        for (name, a), b in zip(model.named_parameters(), whole.parameters()):
            assert torch.equal(a, b), name
        assert (folder / "log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()
        (folder / "training-9.pt.part").write_text("a kill left it")
        (folder / "training notes.txt").write_text("somebody's own")
        TrainingState.remove(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "training notes.txt"]


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
    config = OptimConfig(batch_size=3, save_every=1)
    whole, steps = trained(tmp_path / "whole", "SFT", config)
    trained(tmp_path / "a", "SFT", config, stop_at=2)
    [path] = (tmp_path / "a").glob(name)
    damage(path)
    model, done = trained(tmp_path / "a", "SFT", config)
    assert done in (steps, steps - 2)  # a flipped bit may be in the log, which json then still reads
    assert done == steps or name == "training.json"
    for a, b in zip(model.parameters(), whole.parameters()):
        assert torch.equal(a, b)
    assert (tmp_path / "a/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()


def test_the_state_of_another_training_is_not_gone_on_with(tmp_path):
    trained(tmp_path / "a", "SFT", OptimConfig(batch_size=3), stop_at=2)
    _, done = trained(tmp_path / "a", "SFT", OptimConfig(batch_size=3, learning_rate=2e-3))
    assert done == 4


def test_without_memory_the_micro_batch_is_halved_and_the_result_is_the_same():
    config = OptimConfig(batch_size=8, learning_rate=1e-2)

    def run(limit):
        model, sizes = tiny_model(), []
        rows = torch.arange(24).reshape(8, 3)

        def loss_parts(batch, config):
            for part in train.micro_batches(batch, config):
                sizes.append(len(part))
                if len(part) > limit:
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
                yield model(rows[part]).square().mean((1, 2)).sum() / 8, {"rows": len(part)}
        log = fit(model, [list(range(8))] * 3, loss_parts, config, "t")
        return model, sizes, log
    whole, _, log = run(8)
    halved, sizes, parts = run(3)
    assert sizes == [8, 4, *[2] * 12]  # and it stays so
    assert [r["rows"] for r in parts] == [8, 8, 8]  # nothing of what failed is counted
    assert [r["loss"] for r in parts] == pytest.approx([r["loss"] for r in log], rel=1e-5)
    for a, b in zip(whole.parameters(), halved.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="one example at a time"):
        run(0)


def test_a_clip_of_0_leaves_the_gradient_as_it_is():
    def trained_with(clip):
        model = tiny_model()

        def loss_parts(batch, config):
            yield 100 * model(torch.tensor([[1, 2]])).square().mean(), {}
        log = fit(model, [[0]] * 2, loss_parts, OptimConfig(clip=clip), "t")
        return torch.cat([p.detach().flatten() for p in model.parameters()]), log[0]["grad_norm"]
    (free, norm), (loose, _), (tight, _) = map(trained_with, (0.0, 1e9, 1e-9))
    assert norm > 1 and torch.equal(free, loose) and not torch.equal(free, tight)


def test_another_runtime_error_is_no_want_of_memory():
    def loss_parts(batch, config):
        raise RuntimeError("shapes do not match")
        yield
    with pytest.raises(RuntimeError, match="shapes"):
        fit(tiny_model(), [[0]], loss_parts, OptimConfig(), "t")


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(tmp_path):
    model = tiny_model()

    def loss_parts(batch, config):
        yield model(torch.tensor([[1, 2]])).square().mean() * batch, {}
    config = OptimConfig(save_every=1)
    with pytest.raises(InputError, match=r"step 2 of 4, batch inf; a new run with a lower"):
        fit(model, [1.0, 1.0, float("inf"), 1.0], loss_parts, config, "t", tmp_path / "log.jsonl", "data")
    assert json.loads((tmp_path / "training.json").read_text())["step"] == 2


def test_a_seal_tells_a_file_that_was_changed_and_passes_one_that_never_had_any(tmp_path):
    path = tmp_path / "a.jsonl"
    check_seal(path)
    write_sealed(path, b"{}\n")
    check_seal(path)
    (tmp_path / "b.jsonl").write_text("{}")
    check_seal(tmp_path / "b.jsonl")
    for damage in (truncate, flip, empty):
        write_sealed(path, b'{"prompt": "News?"}\n')
        damage(path)
        with pytest.raises(InputError, match="a.jsonl is not the file"):
            check_seal(path)
    write_json(tmp_path / "hashes.json", [])
    with pytest.raises(InputError):
        check_seal(path)


def test_seals_that_are_damaged_trust_nothing_and_do_not_stop_what_is_made_again(tmp_path):
    path = tmp_path / "a.jsonl"
    write_sealed(path, b"{}\n")
    (tmp_path / "hashes.json").write_text("[]")
    with pytest.raises(InputError, match="remove it to have it made again"):
        check_seal(path)
    path.unlink()
    write_sealed(path, b"{}\n")
    check_seal(path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write into .*run: .*; make room for it or choose another"):
        with locked(tmp_path / "file" / "run"):
            pass


def test_where_there_is_no_lock_the_work_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with locked(tmp_path), locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.fixture
def handlers():
    """As they were before, afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first, second", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_first_signal_waits_for_the_next_check_and_a_second_does_not(first, second, handlers, capsys):
    Stop.on_signals()
    assert signal.getsignal(first) == signal.getsignal(second) == Stop._ask
    Stop.check()
    signal.raise_signal(first)
    assert "once more: at once" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        Stop.check()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(second)


def test_a_second_process_in_a_folder_is_told(tmp_path):
    with locked(tmp_path):
        with pytest.raises(InputError, match="another minisr is at work in"):
            with locked(tmp_path):
                pass
    with locked(tmp_path):
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
def test_a_signal_ends_the_step_keeps_it_and_says_how_to_go_on(number, started, tmp_path):
    process = started()
    busy = kills.start_run(tmp_path, "run")
    code, told = kills.finish(busy)
    assert code == 2 and "another minisr is at work in" in told and told.count("\n") == 1
    process.send_signal(number)
    code, told = kills.finish(process)
    assert code == 130 and "to resume, run the same command again" in told and "Traceback" not in told
    assert list((tmp_path / "run").glob("*/training*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [9, 15])
def test_a_run_killed_at_random_instants_ends_with_the_same_files(number, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, kills.__file__, "--kills", "6", "--signal", str(number), "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "same files, bit for bit" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["os.fsync", "os.replace"])
def test_a_full_disk_is_one_line_wherever_it_is_met_and_the_run_goes_on(target, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(f"minisr.runner.files.{target}", full)
        for write in (lambda: write_sealed(tmp_path / "a.jsonl", b"{}\n"),
                      lambda: TrainingState(tmp_path, "x").save(1, [], {"w": torch.ones(2)}, [])):
            with pytest.raises(InputError, match="No space left on device"):
                write()
        if target == "os.fsync":
            with pytest.raises(InputError, match="No space left"):
                Journal(tmp_path / "a.journal", "x").add(1, 0)
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "a.jsonl").exists()
    Journal(tmp_path / "a.journal", "x").add(1, 0)
    assert Journal(tmp_path / "a.journal", "x").get(0) == 1
