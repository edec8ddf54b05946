"""The arrows of the figure as files: RUN/M1/prompts.jsonl, responses.jsonl, rewards.jsonl, ...

A *stage* is a method whose records are kept in the folder of the model that makes them. If the
file is there it is read, else it is made and written whole. Clocks go to timing.json, which is
(with "seconds" in metrics.json) all that differs between two runs of one seed.
"""

import functools
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

from minisr import InputError, __version__, dpo, pairs, prompts, sft
from minisr.evaluate import histogram
from minisr.interop.source import source_digest
from minisr.judge import MAX_SCORE, Judgement, judge, reward
from minisr.runner.checkpoint import SEED_MODEL, load_model, model_hash, save_model
from minisr.runner.files import json_bytes, jsonl_bytes, read_json, read_jsonl, write_json, write_jsonl
from minisr.runner.resume import UNKEPT, Journal, TrainingState, check_seal, write_sealed
from minisr.runner.run import Run
from minisr.runner.stop import Stop
from minisr.sampler import SampleConfig, sample
from minisr.worlds.tiny import corpus, oracle


def stage(name):
    """Keep what a method returns, (records, counts), in NAME.jsonl and NAME.counts.json."""
    def wrap(make):
        @functools.wraps(make)
        def kept(self, *inputs):
            path, told = self.folder / f"{name}.jsonl", self.folder / f"{name}.counts.json"
            if not (path.exists() and told.exists()):
                Stop.check()
                with self.clock(name):
                    records, counts = make(self, *inputs)
                write_sealed(told, json_bytes(counts))
                write_sealed(path, jsonl_bytes(records))  # last: a stage whose records are there is done
            for journal in self.folder.glob(f"{name}*.journal"):
                journal.unlink()
            check_seal(told)
            check_seal(path)
            return read_jsonl(path, name)
        return kept
    return wrap


class Model:
    """M_t: a folder with the weights, and the files of all that this model made."""

    def __init__(self, run: Run, name: str):
        self.run, self.name, self.folder = run, name, run.folder / name
        self.config = run.config
        self._loaded = None

    def copy_seed_model(self) -> "Model":
        """Make this M0: copied into the run, so that the run is whole by itself."""
        if not (self.folder / "meta.json").exists():
            source = source_digest(self.config.seed_model or str(SEED_MODEL))
            save_model(self.folder, *self.run.seed_model, {"made_by": "copy", "from": source})
            del self.run.seed_model  # from here on it is read from the run's own folder
        return self

    def load(self):
        """(decoder, tokenizer) as stored; read once."""
        if self._loaded is None:
            self._loaded = load_model(self.folder, self.run.device)
        return self._loaded

    def release(self) -> None:
        """Give the memory back; the files stay."""
        self._loaded = None

    def journal(self, purpose: str, *made_from) -> Journal:
        """Where a stage keeps what it has sampled so far; `made_from` beside this model and the config."""
        path = self.folder / f"{purpose}.journal"
        return Journal(path, model_hash(self.folder), self.run.origin, *made_from)

    def key(self, purpose: str) -> int:
        return self.run.key(self.name, purpose)

    @contextmanager
    def clock(self, name: str):
        """Add the seconds of a stage to timing.json."""
        start = time.perf_counter()
        yield
        path = self.folder / "timing.json"
        timing = read_json(path, "timing") if path.exists() else {}
        write_json(path, timing | {name: round(time.perf_counter() - start, 2)})

    @stage("prompts")
    def new_prompts(self):
        """{x_i}: never a seed prompt, never one of the held-out prompts."""
        seeds = [record["prompt"] for record in self.run.ift()]
        held_out = {*self.run.evaluation(), *(r["prompt"] for r in self.run.judge_evaluation())}
        config, key = self.config.prompts, self.key("prompts")
        if config.written_by == "people":
            source = (prompt for _, prompt in corpus.requests(Random(key)))
            made, counts = prompts.prompts_of_people(source, seeds, held_out, config)
        else:
            made, counts = prompts.new_prompts(*self.load(), seeds, held_out, config, key,
                                               self.journal("prompts", seeds))
        return [{"prompt": x} for x in made], counts

    @stage("responses")
    def respond(self, x):
        """{y_i^1 .. y_i^N}"""
        made = self._answers([record["prompt"] for record in x], self.config.responses.candidates,
                             self.config.responses, "responses", "responses")
        records = [{"prompt": record["prompt"], **dict(zip(("responses", "finished", "logps"), zip(*row)))}
                   for record, row in zip(x, made)]
        return records, Counter(finished=sum(sum(r["finished"]) for r in records),
                                cut=sum(not f for r in records for f in r["finished"]),
                                distinct=sum(len(set(r["responses"])) for r in records))

    def _answers(self, asked: list[str], n: int, config: SampleConfig, purpose: str, journal: str | None):
        """n (text, finished, log p) for each prompt; the log p is that of the text, None if unknown."""
        model, tokenizer = self.load()
        ids = [tokenizer.encode_prompt(p) for p in asked]
        drawn = sample(model, ids, n, config, with_logps=True, key=self.key(purpose), stop=tokenizer.stop_ids,
                       title=f"{self.name} {purpose}",
                       journal=self.journal(journal, asked, n, config) if journal else UNKEPT)
        exact = model.embed.weight.dtype == torch.float32  # in bfloat16 training sees other numbers

        def told(x, s):
            text = tokenizer.decode(s.ids)
            again = tokenizer.encode_response(text)  # in training, a text may be spelled in other tokens
            fits = len(x) + len(again) <= model.config.max_seq_len
            return text, s.finished and fits, s.logp if exact and again == s.ids else None
        return [[told(x, s) for s in row] for x, row in zip(ids, drawn)]

    @stage("rewards")
    def judge(self, x, y):
        """{r_i^1 .. r_i^N}: by this model, or by the control that the config names."""
        flat = [(xi["prompt"], text) for xi, yi in zip(x, y) for text in yi["responses"]]
        judged = iter(self._judgements(flat, "rewards"))
        records = []
        for xi, yi in zip(x, y):
            row = [next(judged) for _ in yi["responses"]]
            # A response that was cut off has no end to learn or to judge: it has no reward.
            rewards = [reward(j) if done else None for j, done in zip(row, yi["finished"])]
            records.append({"prompt": xi["prompt"], "rewards": rewards,
                            "scores": [[j.score for j in js] for js in row],
                            "judgements": [[j.text for j in js] for js in row]})
        return records, histogram(s for r in records for row in r["scores"] for s in row)

    def _judgements(self, flat: list[tuple[str, str]], journal: str) -> list[list[Judgement]]:
        config = self.config.judge
        if config.by == "oracle":
            return [[Judgement("", oracle.score(x, y))] for x, y in flat]
        if config.by == "random":
            rng = Random(self.key("random judge"))
            return [[Judgement("", rng.randint(0, MAX_SCORE))
                     for _ in range(config.judgements)] for _ in flat]
        judging = self if config.by == "self" else Model(self.run, "M1")
        return judge(*judging.load(), self.run.template, [x for x, _ in flat],
                     [y for _, y in flat], config, self.key("judge"), self.journal(journal, flat))

    @stage("pairs")
    def select_pairs(self, x, y, r):
        """{x_i, y_i^w, y_i^l}"""
        config = self.config.pairs
        anchors, scores = self._anchors(x) if config.rejected_from == "M1" != self.name else (None, {})
        records, counts = pairs.select_pairs(
            [record["prompt"] for record in x], [record["responses"] for record in y],
            [record["rewards"] for record in r], config.length_control, anchors,
            config.rejected_from == "next")
        scores |= {(record["prompt"], text): given for record, judged in zip(y, r)
                   for text, given in zip(record["responses"], judged["scores"])}
        for pair in records:
            pair["agreement"] = pairs.agreement(*(scores.get((pair["prompt"], pair[side]), [])
                                                  for side in ("chosen", "rejected")))
        return records, counts

    def _anchors(self, x) -> tuple[list[tuple[float | None, str]], dict]:
        """M1's answer to each prompt with the reward that this model gives it, and the scores behind that."""
        asked = [record["prompt"] for record in x]
        M1 = Model(self.run, "M1")
        made = M1._answers(asked, 1, self.config.responses, f"for {self.name}",
                                                 f"anchors_{self.name}")
        judged = self._judgements([(prompt, text) for prompt, [(text, *_)] in zip(asked, made)], "pairs")
        (M1.folder / f"anchors_{self.name}.journal").unlink(missing_ok=True)
        return ([(reward(judgements) if finished else None, text)
                 for [(text, finished, _)], judgements in zip(made, judged)],
                {(prompt, text): [j.score for j in judgements]
                 for prompt, [(text, *_)], judgements in zip(asked, made, judged)})

    def train_sft(self, name: str, examples: list[dict]) -> "Model":
        """A new model `name`, fine-tuned from this one."""
        return self._train(name, "SFT", lambda model, tokenizer, log: sft.train_sft(
            model, tokenizer, examples, self.config.sft, self.run.key(name, "SFT"), name, log,
            made_from=(self.run.origin, model_hash(self.folder))))

    def train_dpo(self, preferences: list[dict]) -> "Model":
        """M_{t+1}. With no pair at all there is nothing to learn: it is M_t again."""
        name, config = f"M{int(self.name[1:]) + 1}", self.config.dpo
        replay = read_jsonl(self.run.folder / "seed" / "eft.jsonl", "EFT data")
        if config.positives_only:
            examples = self.run.ift() + replay + self._positives()
            return Model(self.run, "M0").train_sft(name, examples)
        if not preferences:
            return self._train(name, "DPO", lambda model, tokenizer, log: write_jsonl(log, []))
        known = self._logps_of_M1(preferences) if config.reference == "M1" else self._own_logps()
        return self._train(name, "DPO", lambda model, tokenizer, log: dpo.train_dpo(
            model, tokenizer, preferences, replay, config, self.run.key(name, "DPO"), name, log, known,
            made_from=(self.run.origin, model_hash(self.folder))))

    def _own_logps(self) -> dict:
        """{(prompt, response): log p}, recorded when this model wrote the response."""
        return {(y["prompt"], text): logp
                for y in read_jsonl(self.folder / "responses.jsonl", "responses")
                for text, logp in zip(y["responses"], y["logps"]) if logp is not None}

    def _logps_of_M1(self, preferences: list[dict]) -> dict:
        """The same of M1, for a reference that stays M1."""
        config = self.config.dpo
        return dpo.known_logps(*Model(self.run, "M1").load(), preferences,
                               config.micro_batch or config.batch_size)

    def _positives(self) -> list[dict]:
        """IFT records of the responses to which this model gave the full score."""
        y = read_jsonl(self.folder / "responses.jsonl", "responses")
        r = read_jsonl(self.folder / "rewards.jsonl", "rewards")
        kept = {(yi["prompt"], text) for yi, ri in zip(y, r)
                for text, given in zip(yi["responses"], ri["rewards"]) if given == MAX_SCORE}
        return [{"prompt": prompt, "response": text} for prompt, text in sorted(kept)]

    def _train(self, name: str, by: str, train) -> "Model":
        """Load this model afresh, train it, save it as `name`: this one stays what it is."""
        successor = Model(self.run, name)
        self.release()  # a large model is not kept beside the one in training
        if not (successor.folder / "meta.json").exists():
            with successor.clock("training"):
                model, tokenizer = load_model(self.folder, self.run.device)
                train(model, tokenizer, successor.folder / "train_log.jsonl")
                save_model(successor.folder, model, tokenizer, {
                    "made_by": by, "parent": self.name, "parent_hash": model_hash(self.folder),
                    "config_hash": self.run.origin,
                    "seed": self.config.seed,
                    "minisr": __version__, "torch": torch.__version__})
        if model_hash(successor.folder, "parent_hash") != model_hash(self.folder):
            raise InputError(f"{successor.folder} was trained from another {self.name} than the one that is "
                             "there; remove its meta.json to have it trained again")
        TrainingState.remove(successor.folder)
        return successor

    @stage("answers")
    def answer(self, held_out: list[str]):
        """Held-out prompts answered at the paper's temperature and greedily; in the tiny world with the
        oracle's points."""
        sampled = self._answers(held_out, 1, self.config.evaluate, "evaluation", "answers")
        greedy = self._answers(held_out, 1, replace(self.config.evaluate, temperature=0.0), "evaluation",
                               "answers_greedy")
        records = []
        for prompt, [(warm, *_)], [(cold, *_)] in zip(held_out, sampled, greedy):
            records.append({"prompt": prompt, "sampled": warm, "greedy": cold})
            if self.run.has_oracle:
                request = oracle.parse_request(prompt)
                if request is None:
                    raise InputError(f"evaluation prompt {prompt[:60]!r} is no request of this world")
                records[-1] |= {"sampled_points": oracle.examine(request, warm).points,
                                "greedy_points": oracle.examine(request, cold).points}
        return records, Counter(prompts=len(records))

    def export_answers(self, asked: list[str], path: Path) -> None:
        """Answers for an outside judge, in AlpacaEval's format."""
        answers = self._answers(asked, 1, self.config.evaluate, "export", None)
        generator = f"minisr {self.run.folder.name} {self.name}"
        write_json(path, [{"instruction": prompt, "output": text, "generator": generator}
                          for prompt, [(text, *_)] in zip(asked, answers)])
        self.release()

    @stage("judge_evaluation")
    def judge_ranked(self, ranked: list[dict]):
        """This model's judgements of responses that the annotator ranked."""
        flat = [(r["prompt"], y) for r in ranked for y in r["responses"]]
        judged = iter(judge(*self.load(), self.run.template, [x for x, _ in flat], [y for _, y in flat],
                            self.config.judge, self.key("judge evaluation"),
                            self.journal("judge_evaluation", flat)))
        records = []
        for record in ranked:
            row = [next(judged) for _ in record["responses"]]
            records.append({**record, "rewards": [reward(j) for j in row],
                            "given": [[j.score for j in js] for js in row],
                            "judgements": [[j.text for j in js] for js in row]})
        return records, histogram(s for r in records for row in r["given"] for s in row)
