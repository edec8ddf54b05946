"""A run: its folder, its config, and the seed data that all its models share."""

from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch

from minisr import InputError, __version__
from minisr.interop.source import load_source
from minisr.judge import load_template
from minisr.rng import key
from minisr.runner import seed_data
from minisr.runner.checkpoint import SEED_MODEL, digest
from minisr.runner.config import Config, differences, load_config, to_toml
from minisr.runner.files import jsonl_bytes, read_jsonl, write_bytes
from minisr.runner.resume import check_seal, locked, write_sealed

WORLD_TEMPLATE = Path(__file__).parents[1] / "worlds" / "tiny" / "judge.txt"
ENGLISH_TEMPLATE = seed_data.ENGLISH / "judge.txt"


class Run:
    """A run's folder, its config, and the seed data that all its models share."""

    def __init__(self, folder: Path, config: Config):
        self.folder, self.config = Path(folder), config
        torch.set_num_threads(config.threads)
        cuda = config.device == "cuda" or config.device == "auto" and torch.cuda.is_available()
        if cuda and not torch.cuda.is_available():
            raise InputError('device is "cuda" but PyTorch sees no GPU; set device to "auto" or "cpu"')
        self.device = "cuda" if cuda else "cpu"
        self.has_oracle = config.seed_data.source == "world"
        if config.judge.by == "oracle" and not self.has_oracle:
            raise InputError('judge.by = "oracle" needs the tiny world\'s data; nobody else has an oracle')
        if config.prompts.written_by == "people" and not self.has_oracle:
            raise InputError('prompts.written_by = "people" needs the tiny world: others have no more')
        if config.seed_data.eft_by == "none" and config.dpo.replay:
            raise InputError('seed_data.eft_by = "none" leaves nothing to replay: set dpo.replay to 0')
        own = WORLD_TEMPLATE if self.has_oracle else ENGLISH_TEMPLATE
        kept = self.folder / "judge.txt"  # what the run began with, whatever becomes of that file
        if kept.exists():
            check_seal(kept)
        self.template = load_template(kept if kept.exists() else Path(config.judge.template or own))

    @classmethod
    def open(cls, folder: Path, config: Config) -> "Run":
        """A new run, or one to go on with: then the config must be the same, but for more iterations."""
        run, stored = cls(folder, config), Path(folder) / "config.toml"
        if stored.exists():
            old = load_config(stored)
            changed = differences(asdict(replace(old, iterations=config.iterations)), asdict(config))
            if config.iterations < old.iterations:
                changed.append(f"iterations: {old.iterations} -> {config.iterations}")
            if changed:
                raise InputError(f"{folder} was made with another config ({'; '.join(changed)}); "
                                 "choose another folder with --out, or delete this one")
        if not (run.folder / "M0").exists():
            run.seed_model  # noqa: B018  what is wrong with these is told before anything is written
            seed_data.build_seed_data(config.seed_data, config.seed)
        with locked(run.folder):
            write_bytes(stored, to_toml(config).encode())
            write_sealed(run.folder / "judge.txt", f"{run.template}\n".encode())
        return run

    @cached_property
    def seed_model(self):
        """(decoder, tokenizer) of M0's source."""
        return load_source(self.config.seed_model or str(SEED_MODEL), self.device, self.config.chat)

    @cached_property
    def origin(self) -> str:
        """The hash of the config, whatever the number of iterations, and of the program's version."""
        config = to_toml(replace(self.config, iterations=0))
        return digest(f"{config}{self.template}{__version__}{torch.__version__}".encode())

    def key(self, *coordinates) -> int:
        """The random numbers of one purpose in this run."""
        return key(self.config.seed, *coordinates)

    def _seed_file(self, name: str, texts: tuple[str, ...] = ("prompt",)) -> list[dict]:
        """One of the data sets; all are made together when the first is asked for."""
        path = self.folder / "seed" / f"{name}.jsonl"
        if not path.exists():
            made = seed_data.build_seed_data(self.config.seed_data, self.config.seed)
            for other, records in made.items():
                write_sealed(self.folder / "seed" / f"{other}.jsonl", jsonl_bytes(records))
        check_seal(path)
        return read_jsonl(path, "seed data", texts)

    def ift(self) -> list[dict]:
        return self._seed_file("ift", ("prompt", "response"))

    def evaluation(self) -> list[str]:
        """Held-out prompts."""
        return [record["prompt"] for record in self._seed_file("evaluation")]

    def judge_evaluation(self) -> list[dict]:
        """Held-out prompts with several answers and the annotator's scores."""
        return self._seed_file("judge_evaluation")

    def eft(self, baseline) -> list[dict]:
        """EFT records, by the annotator or, written by the SFT baseline, by the paper's rule; or none."""
        path = self.folder / "seed" / "eft.jsonl"
        if not path.exists():
            ranked = self._seed_file("ranked")
            by, records = self.config.seed_data.eft_by, []
            if by == "annotator":
                records = seed_data.eft_by_annotator(ranked, self.template, self.config.seed_data.reasons)
            elif by == "baseline":
                records = seed_data.eft_by_baseline(*baseline.load(), ranked, self.template,
                                                    self.config.judge, self.key("EFT"),
                                                    baseline.journal("eft", ranked))
            if by == "baseline" and not records:
                raise InputError("the SFT baseline wrote no judgements that rank rightly; "
                                 'give it more ranked prompts, or set eft_by to "annotator"')
            write_sealed(path, jsonl_bytes(seed_data.balance_scores(records, self.key("thin"))))
        (baseline.folder / "eft.journal").unlink(missing_ok=True)
        check_seal(path)
        return read_jsonl(path, "EFT data", ("prompt", "response"))
