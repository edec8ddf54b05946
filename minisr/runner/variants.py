"""Rules of other papers and controls, each a small function that replaces one step of a model.

The config chooses them by name. Without any, a run follows the paper.
"""

from collections import Counter
from operator import itemgetter
from random import Random

import torch

from minisr.dpo import dpo_batches, dpo_loss, fit_dpo
from minisr.judge import MAX_SCORE, Judgement, judge_responses, reward_records
from minisr.prompts import PromptPool
from minisr.rng import derive_seed
from minisr.runner.command import command_judgements
from minisr.runner.evaluation import sample_answers
from minisr.runner.storage import read_step
from minisr.worlds.catalog import true_score
from minisr.worlds.words.annotator import word_points

# Prompts: prompts.source


def prompts_by_people(model) -> list[str]:
    """As many requests of the world itself as the model would write prompts, through the same filters."""
    config = model.config.prompts
    pool = PromptPool([record["prompt"] for record in model.data.ift], model.data.held_out, config)
    source = model.run.world.requests(Random(model.seed("prompts")))
    for _ in range(int(config.count * config.max_attempts_factor)):
        if len(pool.accepted) == config.count:
            break
        _, prompt = next(source)
        pool.try_add(prompt, finished=True)
    model.counts["prompts"] = pool.counts
    return pool.accepted


# Judges: judge.by


def judge_by_M1(model, y: list[dict]) -> list[dict]:
    """Control: the judge is frozen at M1."""
    lm = model.lm if model.name == "M1" else type(model)(model.run, "M1").lm
    return judge_responses(lm, model.data.judge_template, y, model.config.judge, model.seed("judge"))


def judge_by_word_points(model, y: list[dict]) -> list[dict]:
    """Control of the words world: M_t judges, but only its points for the words count, not the sentence's."""
    records = judge_responses(model.lm, model.data.judge_template, y, model.config.judge, model.seed("judge"))
    judgements = []  # of all responses
    for record in records:
        for texts, scores in zip(record["judgements"], record["scores"]):
            points = [None if score is None else word_points(record["prompt"], text)
                      for text, score in zip(texts, scores)]
            judgements.append([Judgement(text, point) for text, point in zip(texts, points)])
    return reward_records(y, judgements)


def judge_by_oracle(model, y: list[dict]) -> list[dict]:
    """Control: the world's ground truth; no score for prompts that are no request of a world."""
    return reward_records(y, [[Judgement("", true_score(record["prompt"], response))]
                              for record in y for response in record["responses"]])


def judge_at_random(model, y: list[dict]) -> list[dict]:
    """Control: every score from 0 to 5 is equally likely."""
    rng, J = Random(model.seed("random judge")), model.config.judge.judgements
    return reward_records(y, [[Judgement("", rng.randint(0, MAX_SCORE)) for _ in range(J)]
                              for record in y for _ in record["responses"]])


def judge_by_command(model, y: list[dict]) -> list[dict]:
    """A program from outside, in place of the model: J judgements of each response."""
    prompts = [record["prompt"] for record in y for _ in record["responses"]]
    responses = [response for record in y for response in record["responses"]]
    return reward_records(y, command_judgements(model.config, model.run.workspace, prompts, responses))


JUDGES = {"M1": judge_by_M1, "word_points": judge_by_word_points, "oracle": judge_by_oracle, "random": judge_at_random,
          "command": judge_by_command}


# Pairs: pairs.length_control, pairs.rejected_from


def pair_rule(model):
    """The configured rule, or None for the paper's."""
    config = model.config.pairs
    if config.rejected_from == "M1" and model.name != "M1":
        return reject_M1
    if config.rejected_from == "next":
        return reject_next_best
    return control_length if config.length_control else None


def control_length(model, x: list[str], y: list[dict], r: list[dict]) -> list[dict]:
    """Length control of Meta-Rewarding (Wu et al., 2024)."""
    return pairs_by_rule(model, x, y, r, shortest_and_longest(model.config.pairs.length_control))


def reject_next_best(model, x: list[str], y: list[dict], r: list[dict]) -> list[dict]:
    """The rejected response is the best of those below the chosen one, in place of the worst."""
    return pairs_by_rule(model, x, y, r, best_and_next)


def reject_M1(model, x: list[str], y: list[dict], r: list[dict]) -> list[dict]:
    """M1's response is rejected where M_t judges it worse than all others (Temporal Self-Rewarding, 2025)."""
    M1 = type(model)(model.run, "M1")
    answers = sample_answers(M1.lm, x, model.config.responses, M1.seed(f"for {model.name}"))
    anchor_y = [{"prompt": prompt, "responses": [text], "finished": [finished]}
                for prompt, (text, finished) in zip(x, answers)]
    anchor_r = model.judge(x, anchor_y)
    anchors = [(ri["rewards"][0], yi["responses"][0]) for yi, ri in zip(anchor_y, anchor_r)]
    rule = shortest_and_longest(model.config.pairs.length_control)
    pairs = pairs_by_rule(model, x, y, r, rule, anchors)
    return add_agreement(pairs, anchor_y + y, anchor_r + r)


def pairs_by_rule(model, x: list[str], y: list[dict], r: list[dict], rule, anchors=None) -> list[dict]:
    pairs, model.counts["pairs"] = select_pairs_by_rule(
        x, [record["responses"] for record in y], [record["rewards"] for record in r], rule, anchors)
    return pairs


def select_pairs_by_rule(prompts, responses, rewards, rule, anchors=None) -> tuple[list[dict], Counter]:
    """pairs.select_pairs with another choice: rule(scored, rejectable) returns the (reward, response) to choose and the
    one to reject. An anchor, a (reward, response) for each prompt, can be rejected but not chosen."""
    pairs, counts = [], Counter(pairs=0, unread=0, tie=0, identical=0)
    for i, (x, ys, rs) in enumerate(zip(prompts, responses, rewards, strict=True)):
        scored = [(r, y) for r, y in zip(rs, ys, strict=True) if r is not None]
        anchor = [anchors[i]] if anchors and anchors[i][0] is not None else []
        if not scored or len(scored + anchor) < 2:
            counts["unread"] += 1
            continue
        best, worst = rule(scored, scored + anchor)
        if best[0] <= worst[0]:
            counts["tie"] += 1
        elif best[1] == worst[1]:
            counts["identical"] += 1
        else:
            counts["pairs"] += 1
            pairs.append({"prompt": x, "chosen": best[1], "rejected": worst[1],
                          "chosen_reward": best[0], "rejected_reward": worst[0]})
    return pairs, counts


def shortest_and_longest(rho: float):
    """The shortest of those within a share rho of the range below the highest reward, and the longest of those within
    it above the lowest. With rho = 0, the first best and the first worst."""
    def rule(scored, rejectable):
        top = max(scored, key=itemgetter(0))[0]
        bottom = min(rejectable, key=itemgetter(0))[0]
        span = rho * (top - bottom)
        nearly_best = [s for s in scored if s[0] >= top - span]
        nearly_worst = [s for s in rejectable if s[0] <= bottom + span]
        if not rho:
            return nearly_best[0], nearly_worst[0]
        return min(nearly_best, key=length), max(nearly_worst, key=length)
    return rule


def best_and_next(scored, rejectable):
    """The first best, and the first best of those below it."""
    best, worst = max(scored, key=itemgetter(0)), min(rejectable, key=itemgetter(0))
    below = [s for s in scored if s[0] < best[0]]
    return best, max(below, key=itemgetter(0), default=worst)


def length(scored_response: tuple[float, str]) -> int:
    return len(scored_response[1])


def add_agreement(pairs: list[dict], y: list[dict], r: list[dict]) -> list[dict]:
    """Record in each pair how consistently the single judgements prefer the chosen response, see agreement()."""
    scores = {}
    for record, judged in zip(y, r):
        for response, reward, of_response in zip(record["responses"], judged["rewards"], judged["scores"]):
            scores.setdefault((record["prompt"], response, reward), of_response)  # a text may come twice
    for pair in pairs:
        chosen, rejected = ((pair["prompt"], pair[side], pair[f"{side}_reward"]) for side in ("chosen", "rejected"))
        if chosen in scores and rejected in scores:
            pair["agreement"] = agreement(scores[chosen], scores[rejected])
    return pairs


def agreement(chosen: list[float | None], rejected: list[float | None]) -> float:
    """How often one judgement of the chosen response lies above one of the rejected (ties count half): 0 to 1.

    CREAM (Wang et al., 2024) compares the rankings of two successive models; this compares the J judgements of one."""
    marks = [(a > b) + (a == b) / 2 for a in chosen for b in rejected if None not in (a, b)]
    return sum(marks) / len(marks) if marks else 0.5


# Training: dpo.reference, dpo.consistency, dpo.positives_only


def dpo_variant(model):
    """The configured variant, or None for the paper's rule."""
    config = model.config.dpo
    if config.positives_only:
        return train_on_positives
    return train_dpo_variant if config.reference == "M1" or config.consistency else None


def train_on_positives(model, pairs: list[dict]):
    """No DPO: M0 is fine-tuned on the seed data and on every response with the full score (appendix A.4)."""
    y = read_step(model.folder / "responses.jsonl")
    r = read_step(model.folder / "rewards.jsonl")
    positives = set()
    for yi, ri in zip(y, r):
        positives |= {(yi["prompt"], text) for text, given in zip(yi["responses"], ri["rewards"]) if given == MAX_SCORE}
    examples = [{"prompt": prompt, "response": text} for prompt, text in sorted(positives)]
    M0 = type(model)(model.run, "M0")
    return M0.train_sft(model.next_name, model.data.ift + model.data.eft + examples)


def train_dpo_variant(model, pairs: list[dict]):
    """DPO with M1 as the reference of every iteration, or with labels smoothed by the judge's inconsistency."""
    config, name = model.config.dpo, model.next_name
    reference_lm = model.lm
    if config.reference == "M1":
        reference_lm = type(model)(model.run, "M1").lm
        if hasattr(reference_lm, "record_reference"):
            reference_lm.record_reference(pairs)
    loss = smoothed_dpo_loss(1 - sum(p["agreement"] for p in pairs) / len(pairs)) if config.consistency and pairs \
        else dpo_loss
    seed = derive_seed(model.config.seed, name, "DPO")
    policy, reference = model.lm.copy(), reference_lm.frozen_copy()
    batches = dpo_batches(model.lm, pairs, model.data.eft, config, seed)
    torch.manual_seed(derive_seed(seed, "dropout"))
    fit_dpo(policy, reference, batches, config, loss)
    return model.successor(name, policy)


def smoothed_dpo_loss(smoothing: float):
    """dpo_loss where `smoothing` is the probability that a label is wrong."""
    def loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
        right, chosen, rejected = dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
        wrong, _, _ = dpo_loss(policy_rejected, policy_chosen, reference_rejected, reference_chosen, beta)
        return (1 - smoothing) * right + smoothing * wrong, chosen, rejected
    return loss


def restore_recorded_logps(model, pairs: list[dict]) -> None:
    """Give the fast engine the log-probabilities of M_t that the frozen reference reads."""
    if not hasattr(model.lm, "record_reference"):
        return
    for record in read_step(model.folder / "responses.jsonl"):
        prompt = model.lm.tokenizer.encode_prompt(record["prompt"])
        for text, logp in zip(record["responses"], record["logps"]):
            if logp is not None:
                model.lm.record(prompt, model.lm.tokenizer.encode_response(text), logp)
    if not model.config.dpo.positives_only and model.config.dpo.reference == "previous":
        model.lm.record_reference(pairs)
