"""The loop: M0 -> SFT baseline and M1 -> M2 -> M3 -> ... (Figure 1 and section 2.4 of the paper).

Every step goes through `keep(step, *inputs)`. By default that just calls the step, and the whole loop runs in memory. A
run on disk passes a function that stores each result and restores it after an interruption.
"""

from dataclasses import dataclass, field

from minisr.dpo import DPOConfig, train_dpo
from minisr.judge import JudgeConfig, judge_responses
from minisr.lm import LM, ResponseConfig, respond
from minisr.pairs import select_pairs
from minisr.prompts import PromptConfig, new_prompts
from minisr.rng import derive_seed
from minisr.sft import train_sft
from minisr.train import TrainConfig


def call(step, *inputs):
    """The default `keep`: just run the step."""
    return step(*inputs)


def self_reward(M_t, keep=call):
    """One iteration of Figure 1: the model makes its own training data and is trained on it."""
    x = keep(M_t.new_prompts)                    # {x_i}
    y = keep(M_t.respond, x)                     # {y_i^1 .. y_i^N}
    r = keep(M_t.judge, x, y)                    # {r_i^1 .. r_i^N}
    pairs = keep(M_t.select_pairs, x, y, r)      # {x_i, y_i^w, y_i^l}
    return keep(M_t.train_dpo, pairs)            # M_{t+1}


def self_rewarding_training(M0, keep=call):
    """Yield the SFT baseline, M1, M2, ..., M_{iterations + 1}, each as soon as it is trained."""
    yield keep(M0.train_sft, "SFT", M0.data.ift)
    M_t = keep(M0.train_sft, "M1", M0.data.ift + M0.data.eft)
    yield M_t
    for _ in range(M0.config.iterations):
        M_t = self_reward(M_t, keep)
        yield M_t


@dataclass
class SeedData:
    """The seed data that people provide (section 2.1). IFT and EFT records are {"prompt", "response"}."""

    ift: list[dict]  # instruction following: a prompt and its response
    eft: list[dict]  # judging: a filled judge template, and a justification with a score
    held_out: set[str]  # prompts kept for evaluation
    judge_template: str  # the judge prompt, with {prompt} and {response}


@dataclass(frozen=True)
class LoopConfig:
    """The method's settings. Each section is documented where its dataclass is defined.

    The defaults are not tuned; tiny_configs/ holds complete configs. A run on disk adds sections of its own."""

    seed: int = 0
    iterations: int = 2  # rounds of DPO after M1: M2, M3
    sft: TrainConfig = field(default_factory=TrainConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    responses: ResponseConfig = field(default_factory=ResponseConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)


class SelfRewardingModel:
    """M_t: a language model, and what it needs to make its own training data and M_{t+1}."""

    def __init__(self, name: str, lm: LM, data: SeedData, config: LoopConfig):
        self.name, self.lm, self.data, self.config = name, lm, data, config
        self.counts: dict[str, dict] = {}  # "prompts", "pairs": how many were kept and dropped, by reason

    def new_prompts(self) -> list[str]:
        """{x_i}: prompts that M_t writes, with the IFT prompts as examples."""
        seed_prompts = [record["prompt"] for record in self.data.ift]
        x, self.counts["prompts"] = new_prompts(
            self.lm, seed_prompts, self.data.held_out, self.config.prompts, self.seed("prompts"))
        return x

    def respond(self, x: list[str]) -> list[dict]:
        """{y_i^n}: one record per prompt, {"prompt", "responses", "finished", "logps"}."""
        return respond(self.lm, x, self.config.responses, self.seed("responses"))

    def judge(self, x: list[str], y: list[dict]) -> list[dict]:
        """{r_i^n}: one record per prompt, {"prompt", "rewards", "scores", "judgements"}. y contains x."""
        return judge_responses(self.lm, self.data.judge_template, y, self.config.judge, self.seed("judge"))

    def select_pairs(self, x: list[str], y: list[dict], r: list[dict]) -> list[dict]:
        """{x_i, y_i^w, y_i^l}: {"prompt", "chosen", "rejected", "chosen_reward", "rejected_reward"} records."""
        responses = [record["responses"] for record in y]
        rewards = [record["rewards"] for record in r]
        selected, self.counts["pairs"] = select_pairs(x, responses, rewards)
        return selected

    def train_dpo(self, pairs: list[dict]) -> "SelfRewardingModel":
        """M_{t+1}: a copy of M_t trained on its pairs, and on EFT examples if config.dpo.replay_weight is not 0."""
        seed = derive_seed(self.config.seed, self.next_name, "DPO")
        return self.successor(self.next_name, train_dpo(self.lm, pairs, self.data.eft, self.config.dpo, seed))

    def train_sft(self, name: str, examples: list[dict]) -> "SelfRewardingModel":
        """A copy of M0 fine-tuned on {"prompt", "response"} records."""
        seed = derive_seed(self.config.seed, name, "SFT")
        return self.successor(name, train_sft(self.lm, examples, self.config.sft, seed))

    def successor(self, name: str, lm: LM) -> "SelfRewardingModel":
        return SelfRewardingModel(name, lm, self.data, self.config)

    @property
    def next_name(self) -> str:
        """The name of the model that this one trains: "M2" if this is M1."""
        return f"M{int(self.name[1:]) + 1}"

    def seed(self, purpose: str) -> int:
        """The random seed of one of this model's steps."""
        return derive_seed(self.config.seed, self.name, purpose)
