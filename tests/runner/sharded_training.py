"""Trainings in several processes, for test_sharding.py: sharded_training.py SIZE FOLDER JOBS prints their exit codes.

JOBS is JSON, a list of trainings. Each has a name, and FOLDER/NAME is its folder. The other keys are how ("SFT" or
"DPO"), source ("tiny" or a seed model), dtype, config, data (records), eft (records to replay), and at most one of
stop_after (steps, then as by Ctrl-C) and kill_after (steps, then signal 9 to process 1).
"""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path


def train(folder: Path, job: dict):
    """The trained LM; its log is in FOLDER/train_log.jsonl. Raises KeyboardInterrupt where the job stops it."""
    import torch
    from tiny import tiny_model, tiny_tokenizer

    from minisr import dpo, sft
    from minisr import train as training
    from minisr.interop.source import load_source
    from minisr.runner import processes
    from minisr.runner.config import DPOConfig, TrainConfig
    from minisr.runner.engine import Workspace, run_lm_class
    from minisr.runner.stop import Stop
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    taken, optimizer_step = [], training.optimizer_step

    def local(x):
        return x.to_local() if hasattr(x, "to_local") else x

    def step(*inputs):
        gradients = [local(p.grad) for group in inputs[0].param_groups for p in group["params"]]
        taken.append(sum(gradient.double().square().sum().item() for gradient in gradients))
        norm = optimizer_step(*inputs)
        held = [local(x) for state in inputs[0].state.values() for x in state.values()]
        summary = {"numbers": sum(x.numel() for x in held), "dtypes": sorted({str(x.dtype) for x in held}),
                   "square_norms": taken}
        (folder / f"held-{processes.rank()}").write_text(json.dumps(summary))
        Stop.requested = len(taken) == job.get("stop_after")
        if len(taken) == job.get("kill_after") and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return norm
    training.optimizer_step = step
    try:
        model = (tiny_model(), tiny_tokenizer()) if job["source"] == "tiny" else load_source(job["source"])
        lm = run_lm_class("fast", sharded=True)(model[0].to(getattr(torch, job.get("dtype", "float32"))), model[1])
        lm.workspace = Workspace("test", training_folder=folder, training_made_from=("data",))
        if job["how"] == "SFT":
            return sft.train_sft(lm, job["data"], TrainConfig(**job["config"]), 1)
        return dpo.train_dpo(lm, job["data"], job.get("eft", []), DPOConfig(**job["config"]), 1)
    finally:
        training.optimizer_step, Stop.requested = optimizer_step, False
        (folder / f"steps-{processes.rank()}").write_text(str(len(taken)))


def work(rank: int, size: int, folder: Path, jobs: list[dict]) -> None:
    """One of the processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size),
                   "MINISR_RENDEZVOUS": str(folder / "rendezvous")}
    from minisr.runner import processes
    from minisr.runner.checkpoint import save_model
    processes.start()
    for job in jobs:
        at = folder / job["name"]
        try:
            lm = train(at, job)
        except KeyboardInterrupt:
            (at / f"stopped-{rank}").touch()
            continue
        except processes.ProcessLost:
            sys.exit(processes.EXIT_CODE_LOST)
        save_model(at / "model", lm.model, lm.tokenizer, {})
        total = sum(p.double().abs().sum().item() for p in lm.model.parameters())
        (at / f"sum-{rank}").write_text(str(total))
    processes.finish()


def main(size: int, folder: Path, jobs: list[dict]) -> None:
    import torch._dynamo  # noqa: F401  # which optimizers import; half of the time of a short training

    import minisr.runner.sharding  # noqa: F401
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")  # a fork imports nothing
    running = [context.Process(target=work, args=(rank, size, folder, jobs)) for rank in range(size)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    print(json.dumps([process.exitcode for process in running]))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
