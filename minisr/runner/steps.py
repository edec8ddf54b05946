"""The steps of the loop as files: RUN/M1/prompts.jsonl, responses.jsonl, rewards.jsonl, pairs.jsonl, RUN/M2/model.pt.

`keep` is what a run passes to loop.self_reward: a step whose file exists is read from it, any other is computed and
written. Clock times go to timing.json; they (and "seconds" in metrics.json) are all that differs between two runs of
the same seed.
"""

import time
from collections import Counter
from contextlib import contextmanager

import torch

from minisr import InputError, __version__
from minisr.interop.source import source_digest
from minisr.loop import SelfRewardingModel, self_rewarding_training
from minisr.runner import processes, variants
from minisr.runner.checkpoint import SEED_MODEL, check_model_files, model_hash, read_meta, save_model
from minisr.runner.evaluation import answer_held_out, evaluate, histogram, judge_held_out
from minisr.runner.files import check_object, json_bytes, jsonl_bytes, read_json, write_json
from minisr.runner.journal import Journal, TrainingState, fingerprint, remove_journals
from minisr.runner.run import Run
from minisr.runner.stop import Stop
from minisr.runner.storage import check_inputs, read_step, verify_checksum, write_with_checksum

# Step -> the name of its file in the folder of the model that takes it.
FILES = {"new_prompts": "prompts", "respond": "responses", "judge": "rewards", "select_pairs": "pairs",
         "answer": "answers", "judge_ranked": "judge_evaluation"}


class StoredModel(SelfRewardingModel):
    """M_t as a folder of a run. Its weights are loaded when they are first needed."""

    def __init__(self, run: Run, name: str):
        self.run, self.folder, self._lm = run, run.folder / name, None
        super().__init__(name, None, run, run.config)

    @property
    def lm(self):
        if self._lm is None:
            self._lm = self.run.load_lm(self.name)
        return self._lm

    @lm.setter
    def lm(self, lm) -> None:
        self._lm = lm

    def unload(self) -> None:
        """Free the memory of the weights. The files stay."""
        self._lm = None

    def successor(self, name: str, lm) -> "StoredModel":
        trained = StoredModel(self.run, name)
        trained.lm = lm
        return trained

    def copy_seed_model(self) -> "StoredModel":
        """Make this M0: a copy in the run's folder, so that the run does not depend on other files."""
        if processes.value_of_main((self.folder / "meta.json").exists()):
            check_model_files(self.folder)
        else:
            source = source_digest(self.config.seed_model or str(SEED_MODEL))
            save_model(self.folder, *self.run.load_seed_model(), {"made_by": "copy", "from": source})
            self.run._seed_model = None
        processes.wait_for_all()
        return self

    def has_stored(self, name: str) -> bool:
        """Whether a step's records and counts are on disk."""
        return all((self.folder / f"{name}.{kind}").exists() for kind in ("jsonl", "counts.json"))

    def journal(self, name: str, *inputs) -> Journal:
        """The finished batches of a step that depends on this model, the run's config and these inputs."""
        made_from = (self.run.fingerprint, self.run.batch_rows, *inputs)
        return Journal(self.folder / f"{name}.journal", model_hash(self.folder), *made_from)

    @contextmanager
    def clock(self, name: str):
        """Add the seconds of a step to timing.json, also if it is interrupted."""
        start = time.perf_counter()
        try:
            yield
        finally:
            path = self.folder / "timing.json"
            timing = check_object(read_json(path, "timing"), path) if path.exists() else {}
            seconds = timing.get(name, 0) + time.perf_counter() - start
            write_json(path, timing | {name: round(seconds, 2)})

    # Steps of which the config may choose a variant.

    def new_prompts(self) -> list[str]:
        if self.config.prompts.source == "people":
            return variants.prompts_by_people(self)
        return self.keep_trainable(super().new_prompts())

    def keep_trainable(self, prompts: list[str]) -> list[str]:
        """The prompts that leave room for an answer, do not belong to the evaluation of the run's world, and are its
        requests if the config asks for that."""
        world, kept = self.run.world, []
        for prompt in prompts:
            if world and not world.may_train(prompt):
                reason = "evaluation words"
            elif self.config.prompts.requests_only and world.oracle.parse_request(prompt) is None:
                reason = "no request"
            elif len(self.lm.tokenizer.encode_prompt(prompt)) >= self.lm.max_seq_len:
                reason = "no room for an answer"
            else:
                kept.append(prompt)
                continue
            self.counts["prompts"] += Counter({reason: 1})
            self.counts["prompts"]["accepted"] -= 1
        return kept

    def judge(self, x: list[str], y: list[dict]) -> list[dict]:
        if self.config.judge.by == "self":
            return super().judge(x, y)
        return variants.JUDGES[self.config.judge.by](self, y)

    def select_pairs(self, x: list[str], y: list[dict], r: list[dict]) -> list[dict]:
        rule = variants.pair_rule(self)
        pairs = rule(self, x, y, r) if rule else super().select_pairs(x, y, r)
        return variants.add_agreement(pairs, y, r)

    def train_dpo(self, pairs: list[dict]) -> "StoredModel":
        variants.restore_recorded_logps(self, pairs)
        variant = variants.dpo_variant(self)
        return variant(self, pairs) if variant else super().train_dpo(pairs)

    # Evaluation.

    def answer(self, prompts: list[str]) -> list[dict]:
        return answer_held_out(self, prompts)

    def judge_ranked(self, ranked: list[dict]) -> list[dict]:
        return judge_held_out(self, ranked)


def keep(step, *inputs):
    """Restore what a step of a StoredModel made, or run the step and store the result."""
    if step.__name__ in FILES:
        return keep_records(step, *inputs)
    return keep_model(step, *inputs)


def keep_records(step, *inputs) -> list:
    """A step whose result is a list of records. Process 0 writes it, and all processes read it."""
    model, name = step.__self__, FILES[step.__name__]
    path, counts_path = model.folder / f"{name}.jsonl", model.folder / f"{name}.counts.json"
    if processes.value_of_main(model.has_stored(name)):
        check_inputs(path, inputs)
    else:
        Stop.check()
        with model.clock(name), model.run.workspace.step(title=f"{model.name} {name}",
                                                         journal=model.journal(name, *inputs)):
            records = step(*inputs)
        counts = model.counts.get(name) or count_records(name, records)
        if name == "prompts":
            records = [{"prompt": prompt} for prompt in records]
        write_with_checksum(counts_path, json_bytes(counts))
        write_with_checksum(path, jsonl_bytes(records), inputs)  # last: a step whose records exist is finished
    processes.wait_for_all()
    remove_journals(model.folder / f"{name}.journal")
    verify_checksum(counts_path)
    records = read_step(path)
    return [record["prompt"] for record in records] if name == "prompts" else records


def count_records(name: str, records: list[dict]) -> dict:
    """What counts.json reports of a step."""
    if name == "responses":
        finished = [done for record in records for done in record["finished"]]
        distinct = sum(len(set(record["responses"])) for record in records)
        return Counter(finished=sum(finished), cut=len(finished) - sum(finished), distinct=distinct)
    if name == "rewards":
        return histogram(score for record in records for scores in record["scores"] for score in scores)
    if name == "judge_evaluation":
        return histogram(score for record in records for scores in record["given"] for score in scores)
    return Counter(prompts=len(records))


def keep_model(step, *inputs) -> StoredModel:
    """A step whose result is a trained model: train_sft(name, examples) or train_dpo(pairs)."""
    model = step.__self__
    by_sft = step.__name__ == "train_sft" or model.config.dpo.positives_only
    name = inputs[0] if step.__name__ == "train_sft" else model.next_name
    parent = model if step.__name__ == "train_sft" or not by_sft else StoredModel(model.run, "M0")
    trained_on = fingerprint(inputs)
    trained = StoredModel(model.run, name)
    if processes.value_of_main((trained.folder / "meta.json").exists()):
        check_model_files(trained.folder)
    else:
        made_from = (model.run.fingerprint, model_hash(parent.folder), inputs)
        with trained.clock("training"), model.run.workspace.step(
                title=f"{name} training", training_folder=trained.folder, training_made_from=made_from):
            lm = step(*inputs).lm
            save_model(trained.folder, lm.model, lm.tokenizer, {
                "made_by": "SFT" if by_sft else "DPO", "parent": parent.name, "parent_hash": model_hash(parent.folder),
                "trained_on": trained_on, "config_hash": model.run.fingerprint, "seed": model.config.seed,
                "minisr": __version__, "torch": torch.__version__})
            trained.lm = lm if processes.is_main() else None  # the others load what process 0 saved
    processes.wait_for_all()
    if model_hash(trained.folder, "parent_hash") != model_hash(parent.folder):
        raise InputError(f"{trained.folder} was trained from another {parent.name} than the present one; move it "
                         "away, and it is trained again")
    if read_meta(trained.folder).get("trained_on", trained_on) != trained_on:
        raise InputError(f"{trained.folder} was trained on other examples than the present ones; move it away, and it "
                         "is trained again")
    TrainingState.remove(trained.folder)
    model.unload()
    return trained


def run_loop(run: Run, on_evaluated=None) -> dict:
    """M0 to M_{T+1} and every model's evaluation. Returns the content of metrics.json.

    `on_evaluated(metrics)` is called after each model."""
    M0 = StoredModel(run, "M0").copy_seed_model()
    models = []
    for model in self_rewarding_training(M0, keep):
        models.append(model)
        metrics = evaluate(run, models, keep)
        if on_evaluated:
            on_evaluated(metrics)
    return metrics


def finished_models(run: Run) -> list[StoredModel]:
    """SFT, M1, M2, ... as far as the run has come."""
    names = ["SFT", *(f"M{t}" for t in range(1, run.config.iterations + 2))]
    return [StoredModel(run, name) for name in names if (run.folder / name / "meta.json").exists()]
