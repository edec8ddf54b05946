"""A run: its folder, its config, and the seed data that all its models share."""

import platform
import sys
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch

from minisr import InputError, __version__
from minisr.interop.source import load_source
from minisr.lm import LM, ResponseConfig, respond
from minisr.rng import derive_seed
from minisr.runner import processes, seed_data
from minisr.runner.checkpoint import SEED_MODEL, digest, load_model, model_hash
from minisr.runner.command import command_judgements, judge_command
from minisr.runner.config import Config, check_learning_rate, differences, load_stored_config, to_toml
from minisr.runner.data_sets import Context, DataSet, describe
from minisr.runner.engine import Workspace, run_lm_class
from minisr.runner.files import json_bytes, jsonl_bytes, read_jsonl, read_text, write_bytes
from minisr.runner.journal import Journal, remove_journals
from minisr.runner.judge_prompt import check_judge_prompt
from minisr.runner.resumable import deciding_values, dtype_name, on_gpu, record_changes
from minisr.runner.sources import changed_files, keep_stored_paths
from minisr.runner.storage import folder_lock, verify_checksum, write_with_checksum
from minisr.worlds.catalog import WORLDS
from minisr.worlds.words import corpus as words_corpus

WORLD_TEMPLATE = WORLDS["world"].judge_template
ENGLISH_TEMPLATE = seed_data.ENGLISH / "judge.txt"
SEED_FILES = ("ift", "ranked", "judge_evaluation", "evaluation")


class Run:
    """Has the attributes of loop.SeedData, read from files: ift, eft, held_out, judge_template."""

    def __init__(self, folder: Path, config: Config):
        self.folder, self.config = Path(folder), config
        self.workspace, self._seed_model, self._seed_data = Workspace(), None, None
        torch.set_num_threads(config.threads)
        check_consistency(config)
        self.device = "cuda" if uses_gpu(config) else "cpu"
        self.dtype = choose_dtype(config)
        avoid_cudnn_attention()
        self.lm_class = run_lm_class(config.engine, config.lora, config.sharded)
        self.world = WORLDS.get(config.seed_data.source)  # None: data without an oracle
        stored = self.folder / "judge.txt"  # the template that the run began with
        if stored.exists():
            verify_checksum(stored)
            self.judge_template = read_template(stored)  # checked when the run began
        else:
            default = self.world.judge_template if self.world else ENGLISH_TEMPLATE
            self.judge_template = load_template(Path(config.judge.template or default))

    @classmethod
    def open(cls, folder: Path, config: Config) -> "Run":
        """A new run, or one to resume, for which all that decides its results must be the same; see resumable.py."""
        stored = Path(folder) / "config.toml"
        old = load_stored_config(stored) if stored.exists() else None
        if old:
            config = keep_stored_paths(old, config, Path(folder))
        else:  # check now, before process 0 writes config.toml
            check_new(Path(folder))
            check_effects(config)
        run = cls(folder, config)
        if old:
            check_resumable(old, config, folder)
            run.note_changed_files()
        if not (run.folder / "M0").exists():  # report errors in these before anything is written
            run.load_seed_model()
            data, _ = run.load_seed_data()
            check_judge(config, data["ift"][0])
        with folder_lock(run.folder):
            if old and (changes := differences(asdict(replace(old, iterations=config.iterations)), asdict(config))):
                record_changes(run.folder, changes)
            write_bytes(stored, to_toml(config).encode())
            write_with_checksum(run.folder / "judge.txt", f"{run.judge_template}\n".encode())
        processes.wait_for_all()  # until process 0 has written them
        processes.check_same((stored.exists(), run.fingerprint), run.folder)
        return run

    def note_changed_files(self) -> None:
        """Print a line for each file that has changed since the run copied it."""
        if processes.is_main():
            for path in changed_files(self.config, self.folder):
                print(f"minisr: {path} has changed since {self.folder} was made from it; this run goes on with a copy. "
                      "For a new run choose another folder with --out", file=sys.stderr)

    def load_seed_model(self):
        """(decoder, tokenizer) of M0's source, in float32 on the CPU, so that M0 is an exact copy; read once."""
        if self._seed_model is None:
            source = self.config.seed_model or str(SEED_MODEL)
            self._seed_model = load_source(source, self.config.chat)
        return self._seed_model

    @property
    def has_oracle(self) -> bool:
        return self.world is not None

    def load_seed_data(self, answer=None) -> tuple[dict[str, list[dict]], dict[str, DataSet]]:
        """The data sets, measured against the context of M0, and what became of each set's records; read once.

        answer: what answers the prompts of the words world, see seed_data.load_seed_data."""
        if self._seed_data is None or answer:
            seed_data.check_source(self.config.seed_data)
            copied = (self.folder / "M0" / "meta.json").exists()
            model, tokenizer = load_model(self.folder / "M0") if copied else self.load_seed_model()
            context = Context(tokenizer, model.config.max_seq_len, self.judge_template, self.config)
            self._seed_data = seed_data.load_seed_data(self.config.seed_data, self.config.seed, context, answer)
        return self._seed_data

    @property
    def data_table(self) -> str:
        """What this process has read and left out of the seed data, as a table; "" if there is nothing to tell."""
        sets = self._seed_data[1] if self._seed_data else {}
        if self.has_oracle and not any(data.left_out for data in sets.values()):
            return ""
        return describe(sets) if sets else ""

    def load_lm(self, name: str) -> LM:
        """The model of this name, in the run's engine and dtype."""
        model, tokenizer = load_model(self.folder / name, self.device, self.dtype)
        lm = self.lm_class(model, tokenizer)
        lm.workspace = self.workspace
        return lm

    @cached_property
    def fingerprint(self) -> str:
        """The hash of all that decides the results of every model: values of the config, judge prompt, versions."""
        config = deciding_values(replace(self.config, iterations=0))
        return digest(f"{config}{self.judge_template}{__version__}{torch.__version__}".encode())

    @property
    def batch_rows(self) -> tuple[int, ...]:
        """What decides the batches in journals beside the fingerprint."""
        config = self.config
        return tuple(section.rows for section in (config.prompts, config.responses, config.judge, config.evaluate))

    def seed(self, *path) -> int:
        """The random seed of one purpose in this run."""
        return derive_seed(self.config.seed, *path)

    # The seed data.

    def read_seed_file(self, name: str, texts: tuple[str, ...] = ("prompt",)) -> list[dict]:
        """One of the data sets; all are made together when the first is needed."""
        path = self.folder / "seed" / f"{name}.jsonl"
        if not processes.value_of_main(path.exists()):
            data, sets = self.load_seed_data(self.answer_as_M0 if self.config.seed_data.source == "words" else None)
            if self.data_table:
                counts = {other: data_set.counts() for other, data_set in sets.items()}
                write_with_checksum(self.folder / "seed" / "counts.json", json_bytes(counts))
            for other, records in data.items():
                write_with_checksum(self.folder / "seed" / f"{other}.jsonl", jsonl_bytes(records))
        processes.wait_for_all()
        if all((path.with_name(f"{other}.jsonl")).exists() for other in SEED_FILES):
            remove_journals(self.folder / "M0" / "answers.journal")
        verify_checksum(path)
        return read_jsonl(path, "seed data", texts)

    def answer_as_M0(self, prompts: list[str]) -> list[dict]:
        """M0's answers to prompts of the seed data: {"prompt", "responses", "finished", "logps"} records."""
        M0 = self.folder / "M0"
        journal = Journal(M0 / "answers.journal", model_hash(M0), self.fingerprint, self.batch_rows, prompts)
        config = ResponseConfig(**asdict(words_corpus.SAMPLING) | {"rows": self.config.responses.rows},
                                candidates=words_corpus.ANSWERS)
        with self.workspace.step(title="answers by M0", journal=journal):
            return respond(self.load_lm("M0"), prompts, config, self.seed("M0", "seed data"))

    @property
    def ift(self) -> list[dict]:
        return self.read_seed_file("ift", ("prompt", "response"))

    @property
    def evaluation_prompts(self) -> list[str]:
        return [record["prompt"] for record in self.read_seed_file("evaluation")]

    @property
    def judge_evaluation(self) -> list[dict]:
        """Held-out prompts with several responses and the annotator's scores."""
        return self.read_seed_file("judge_evaluation")

    @property
    def held_out(self) -> set[str]:
        """Prompts that no model may be trained on."""
        return {*self.evaluation_prompts, *(record["prompt"] for record in self.judge_evaluation)}

    @property
    def eft(self) -> list[dict]:
        """EFT records: by the annotator, or written by the SFT baseline and selected by the paper's rule, or none."""
        path = self.folder / "seed" / "eft.jsonl"
        if not processes.value_of_main(path.exists()):
            records = seed_data.balance_scores(self.make_eft(), self.seed("thin"))
            write_with_checksum(path, jsonl_bytes(records))
        processes.wait_for_all()
        remove_journals(self.folder / "SFT" / "eft.journal")
        verify_checksum(path)
        return read_jsonl(path, "EFT data", ("prompt", "response"))

    def make_eft(self) -> list[dict]:
        ranked, by = self.read_seed_file("ranked"), self.config.seed_data.eft_by
        if by == "none":
            return []
        if by == "annotator":
            return seed_data.eft_by_annotator(ranked, self.judge_template, self.config.seed_data.reasons)
        baseline = self.folder / "SFT"
        journal = Journal(baseline / "eft.journal", model_hash(baseline), self.fingerprint, self.batch_rows, ranked)
        with self.workspace.step(title="EFT by the SFT baseline", journal=journal):
            records = seed_data.eft_by_baseline(self.load_lm("SFT"), ranked, self.judge_template, self.config.judge,
                                                self.seed("EFT"))
        if not records:
            raise InputError("no judgement of the SFT baseline ranks the responses correctly; provide more ranked "
                             'prompts, or set seed_data.eft_by to "annotator"')
        return records


def check_config(config: Config) -> None:
    """Raise InputError for errors in a config that can be found without data and model."""
    check_consistency(config)
    check_effects(config)
    uses_gpu(config)
    choose_dtype(config)
    if config.judge.template:
        load_template(Path(config.judge.template))
    if config.judge.by == "command":
        judge_command(config).arguments()


def check_consistency(config: Config) -> None:
    """Raise InputError for keys that do not go together."""
    check_data(config)
    check_engine(config)


def check_data(config: Config) -> None:
    """Raise InputError for a judge, prompts, pairs or replay that the seed data or responses do not allow."""
    in_world = config.seed_data.source in WORLDS
    sources = " or ".join(f'"{source}"' for source in WORLDS)
    if (config.judge.by == "command") != bool(config.judge.command):
        raise InputError('judge.by = "command" and judge.command go together: set both or neither')
    if config.judge.by == "word_points" and config.seed_data.source != "words":
        raise InputError('judge.by = "word_points" needs seed_data.source = "words": other data have no word points')
    if config.judge.by == "oracle" and not in_world:
        raise InputError(f'judge.by = "oracle" needs seed_data.source = {sources}: other data have no oracle')
    if config.prompts.source == "people" and not in_world:
        raise InputError(f'prompts.source = "people" needs seed_data.source = {sources}: other data have no people')
    if config.prompts.requests_only and not in_world:
        raise InputError(f"prompts.requests_only = true needs seed_data.source = {sources}: other data have no "
                         "requests")
    if config.responses.candidates < 2 and not config.dpo.positives_only:
        raise InputError("responses.candidates must be at least 2: a pair needs two responses")
    if config.seed_data.eft_by == "none" and config.dpo.replay_weight:
        raise InputError('seed_data.eft_by = "none" leaves nothing to replay: set dpo.replay_weight to 0')


def check_engine(config: Config) -> None:
    """Raise InputError for what the engine, the adapters or the shards cannot train."""
    checkpointing = config.sft.gradient_checkpointing or config.dpo.gradient_checkpointing
    if config.engine == "plain" and checkpointing:
        raise InputError('gradient_checkpointing needs engine = "fast"')
    if config.lora.rank and config.engine == "plain":
        raise InputError('lora.rank needs engine = "fast"')
    if config.lora.rank and "muon" in (config.sft.optimizer, config.dpo.optimizer):
        raise InputError('optimizer = "muon" trains whole matrices, not adapters: set it to "adamw", or lora.rank to 0')
    if config.sharded and config.engine == "plain":
        raise InputError('sharded = true needs engine = "fast"')
    if config.sharded and config.lora.rank:
        raise InputError("sharded = true does not go together with lora.rank: adapters need little optimizer state")
    if config.sharded and "muon" in (config.sft.optimizer, config.dpo.optimizer):
        raise InputError('optimizer = "muon" needs whole matrices: set it to "adamw", or sharded to false')


def check_effects(config: Config) -> None:
    """Raise InputError for keys that would have no effect, and for values that contradict each other."""
    check_learning_rate("sft", config.sft)
    check_learning_rate("dpo", config.dpo)
    if config.prompts.min_words > config.prompts.max_words:
        raise InputError("prompts.min_words is larger than prompts.max_words: no prompt would have an allowed length")
    if config.pairs.length_control and config.pairs.rejected_from == "next":
        raise InputError('pairs.length_control has no effect with pairs.rejected_from = "next": set it to 0')
    if config.dpo.positives_only and (config.dpo.consistency or config.dpo.reference == "M1"):
        raise InputError("dpo.positives_only = true trains without DPO: leave out dpo.reference and dpo.consistency")


def check_judge(config: Config, example: dict) -> None:
    """Ask an outside judge about one response, so that an error in it is found before anything is trained."""
    if config.judge.by == "command":
        command_judgements(config, Workspace(), [example["prompt"]], [example["response"]])


def uses_gpu(config: Config) -> bool:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError('device is "cuda", but PyTorch sees no GPU; set device to "auto" or "cpu"')
    return on_gpu(config)


def avoid_cudnn_attention() -> None:
    """cuDNN's attention makes a new plan, for 20 ms and more, at each new length of a batch."""
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)


def choose_dtype(config: Config) -> torch.dtype:
    """bfloat16 needs float32 master weights, which the fast engine has for AdamW."""
    name = dtype_name(config)
    if name == "bfloat16" and config.engine == "plain":
        raise InputError('dtype = "bfloat16" needs engine = "fast"')
    if name == "bfloat16" and "muon" in (config.sft.optimizer, config.dpo.optimizer):
        raise InputError('optimizer = "muon" needs dtype = "float32"')
    return getattr(torch, name)


def warn_of_slow_bfloat16(dtype: torch.dtype, device: str) -> None:
    """Print one line if this CPU has no instructions for bfloat16 products."""
    if dtype == torch.bfloat16 and device == "cpu" and not has_native_bfloat16():
        print("minisr: this CPU has no bfloat16 instructions (AVX512_BF16, AMX or ARM's BF16), so bfloat16 is slow "
              "on it; use float32", file=sys.stderr)


def has_native_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_new(folder: Path) -> None:
    """Raise InputError if a folder holds anything but hidden files and what an interrupted start has left."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose a folder with --out")
    others = [path.name for path in folder.glob("[!.]*") if path.name != "config.toml.part"]
    if others:
        raise InputError(f"{folder} is no run (it holds {min(others)} and no config.toml); choose another folder with "
                         "--out")


def check_resumable(old: Config, new: Config, folder: Path) -> None:
    """Raise InputError if a value that decides results differs, except for more iterations."""
    changed = differences(deciding_values(replace(old, iterations=new.iterations)), deciding_values(new))
    if new.iterations < old.iterations:
        changed.append(f"iterations: {old.iterations} -> {new.iterations}")
    if changed:
        raise InputError(f"{folder} was made with another config ({'; '.join(changed)}); set it as before, or choose "
                         "another folder with --out")


def load_template(path: Path) -> str:
    """A judge prompt from a text file: see check_judge_prompt."""
    template = read_template(path)
    check_judge_prompt(template, path)
    return template


def read_template(path: Path) -> str:
    return read_text(path, "judge prompt").rstrip("\n")
