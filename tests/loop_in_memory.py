"""The whole loop in memory with the shipped M0: what the core and the fast engine are tested on."""

from functools import cache
from typing import NamedTuple

import torch
from tiny import ENGINES

from minisr.dpo import DPOConfig
from minisr.judge import JudgeConfig
from minisr.lm import ResponseConfig
from minisr.loop import LoopConfig, SeedData, SelfRewardingModel, self_rewarding_training
from minisr.prompts import PromptConfig
from minisr.runner.checkpoint import SEED_MODEL, load_model
from minisr.runner.config import SeedConfig
from minisr.runner.run import WORLD_TEMPLATE, load_template
from minisr.runner.seed_data import build_seed_data, eft_by_annotator
from minisr.train import TrainConfig

CONFIG = LoopConfig(
    seed=0, iterations=2, sft=TrainConfig(batch_size=16), prompts=PromptConfig(count=6, rows=8, max_rouge_l=0.95),
    responses=ResponseConfig(temperature=1.0, top_p=1.0, max_new_tokens=40), judge=JudgeConfig(judgements=2),
    dpo=DPOConfig(batch_size=2, learning_rate=3e-4, replay_weight=0.5))


class Step(NamedTuple):
    """One call of keep."""

    model: str
    name: str
    inputs: tuple
    result: object


@cache
def seed_data() -> SeedData:
    records = build_seed_data(SeedConfig("world", ift=64, ranked=24, judge_evaluation=1, evaluation=8), seed=0)
    template = load_template(WORLD_TEMPLATE)
    held_out = {record["prompt"] for record in records["evaluation"]}
    return SeedData(records["ift"], eft_by_annotator(records["ranked"], template), held_out, template)


@cache
def run_loop(engine: str, dtype: torch.dtype) -> tuple[list[SelfRewardingModel], list[Step]]:
    """The models of a run, and each of its steps."""
    decoder, tokenizer = load_model(SEED_MODEL)
    steps = []

    def keep(step, *inputs):
        result = step(*inputs)
        steps.append(Step(step.__self__.name, step.__name__, inputs, result))
        return result

    M0 = SelfRewardingModel("M0", ENGINES[engine](decoder.to(dtype), tokenizer), seed_data(), CONFIG)
    return list(self_rewarding_training(M0, keep)), steps
