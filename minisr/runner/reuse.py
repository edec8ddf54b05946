"""Copy from a base run the results that a variant's run would only compute again.

A run computes its results in the order of STAGES. If a variant changes one config key, everything before
the first stage that this key affects is the same in both runs, because random numbers depend only on the
seed and the purpose they are drawn for. FIRST_AFFECTED_STAGE names that stage for each key. A key that it
does not list may affect every result, and then nothing is copied.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

from minisr.runner.config import Config, differences, load_stored_config, to_toml
from minisr.runner.files import check_object, read_json, write_bytes, write_json
from minisr.worlds.catalog import WORLDS

STAGES = (
    "SFT",  # the folder SFT, and with it all that follows; only the seed data and M0 come before
    "eft",  # seed/eft.jsonl
    "M1",  # the folder M1, and with it all later models
    "judge_evaluation",  # the judgements of SFT and M1 on the held-out ranked responses
    "prompts",  # from here on: the first DPO iteration, in the folder M1
    "responses",
    "rewards",
    "pairs",
    "M2",  # the folder M2, and with it all later models
    "M2 rewards",  # the rewards and pairs in the folder M2, and with them M3 and all later models
)

# Files about one run as a whole, which a variant's run does not take over.
OF_ONE_RUN = ("metrics.json", "judge.txt", "head_to_head.*", "config_changes.jsonl", "report.html")

FIRST_AFFECTED_STAGE = {
    "sft": "SFT",
    "engine": "SFT",  # this key and the next two change the rounding of every result
    "dtype": "SFT",
    "threads": "SFT",
    "seed_data.eft_by": "eft",  # who writes the EFT judgements
    "seed_data.reasons": "eft",  # whether they give reasons
    "judge.judgements": "judge_evaluation",  # see also affected_stages()
    "judge.by": "rewards",  # see first_stage_judged_by()
    "judge.command": "judge_evaluation",  # an outside judge is evaluated in its place
    "judge.timeout": None,
    "prompts": "prompts",  # any key of this section; the same holds for the sections below
    "responses": "responses",
    "pairs": "pairs",
    "dpo": "M2",
    "iterations": None,  # more iterations add models and change none
}


def copy_unaffected(base: Path, folder: Path, config: Config) -> None:
    """Create a run folder for this config with all results of the base run that the config leaves the same.

    If the config may change every result, no folder is created."""
    stages = affected_stages(load_stored_config(base / "config.toml"), config)
    if stages is None:
        return
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(base, unfinished)
    for pattern in OF_ONE_RUN:
        for path in unfinished.glob(pattern):
            path.unlink()
    for stage in stages:
        for path in stage_files(unfinished, stage):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
                forget_time(path)
    write_bytes(unfinished / "config.toml", to_toml(config).encode())
    unfinished.rename(folder)


def forget_time(path: Path) -> None:
    """Remove the seconds of a removed file's step from timing.json: the run's own are added up there."""
    timing = path.with_name("timing.json")
    if timing.exists():
        seconds = check_object(read_json(timing, "timing"), timing)
        seconds.pop(path.name.partition(".")[0], None)
        write_json(timing, seconds)


def affected_stages(base: Config, config: Config) -> tuple[str, ...] | None:
    """The stages whose results differ between two configs, or None if every result may differ."""
    first = len(STAGES)
    for difference in differences(asdict(base), asdict(config)):
        key = difference.partition(": ")[0]
        section = key.partition(".")[0]
        name = key if key in FIRST_AFFECTED_STAGE else section
        if name not in FIRST_AFFECTED_STAGE or affects_seed_data(base, name):
            return None
        stage = FIRST_AFFECTED_STAGE[name]
        if key == "judge.judgements" and base.seed_data.eft_by == "baseline":
            stage = "eft"  # the SFT baseline writes the EFT data with as many judgements
        if key == "judge.by":
            stage = first_stage_judged_by(base.judge.by, config.judge.by)
        if stage is not None:
            first = min(first, STAGES.index(stage))
    return STAGES[first:]


def affects_seed_data(base: Config, key: str) -> bool:
    """Whether a change of this key also changes the seed data that the base run has made."""
    if base.seed_data.source == "words":
        return key in ("engine", "dtype", "threads")  # M0's answers
    # Records of a file whose judgements are longer than the model's context are left out.
    return base.seed_data.source not in WORLDS and FIRST_AFFECTED_STAGE[key] == "eft"


def first_stage_judged_by(base: str, variant: str) -> str:
    """The first stage that a change of judge.by affects."""
    judges = {base, variant}
    if "command" in judges:
        return "judge_evaluation"  # an outside judge is evaluated in the model's place
    if judges == {"self", "M1"}:
        return "M2 rewards"  # M1's responses have the same judge in both runs
    return "rewards"  # the model's own judging is evaluated, whoever gives the rewards


def stage_files(run: Path, stage: str) -> list[Path]:
    """The files and folders of a run that hold the results of one stage."""
    if stage == "SFT":
        return [path for path in [run / "SFT"] if path.exists()]
    if stage == "eft":
        return [run / "seed" / "eft.jsonl"]
    models = list(run.glob("M[1-9]*"))
    if stage == "M1":
        return models
    if stage == "M2":
        return [folder for folder in models if folder.name != "M1"]
    if stage == "M2 rewards":
        later = [folder for folder in models if folder.name not in ("M1", "M2")]
        return [*(run / "M2").glob("rewards.*"), *(run / "M2").glob("pairs.*"), *later]
    return [path for folder in ("SFT", "M1") for path in (run / folder).glob(f"{stage}.*")]
