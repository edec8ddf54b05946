"""Seed data: IFT, EFT and the held-out sets (paper, section 2.1 and 3.1.1).

IFT teaches to answer: {prompt, response}. EFT teaches to judge: {judge prompt, justification and
score}. EFT is made from prompts with several ranked responses, in one of two ways:

- "annotator": the annotator who ranked the responses also writes each judgement;
- "baseline": the SFT baseline writes judgements; kept are those of a prompt on which their
  ranking agrees with the annotator's (the paper's rule: OASST has ranks but no judgements).

Either way the commonest score is thinned to the second commonest's number.
"""

from collections import Counter
from random import Random

from minisr.evaluate import pair_agreement
from minisr.judge import JudgeConfig, judge, judge_prompt, parse_score
from minisr.sampler import key as coordinates
from minisr.world import corpus, oracle, writers


def held_out_and_seeds(config, seed: int) -> dict[str, list[dict]]:
    """Every data set that needs no model, by file name."""
    def rng(name):
        return Random(coordinates(seed, "seed data", name))

    evaluation = corpus.evaluation_prompts(rng("evaluation"), config.evaluation)
    return {
        "ift": corpus.ift_data(rng("ift"), config.ift),
        "ranked": corpus.ranked_data(rng("ranked"), config.ranked),
        "judge_evaluation": corpus.ranked_data(rng("judge"), config.judge_evaluation, evaluation=True),
        "evaluation": [{"prompt": prompt} for prompt in evaluation],
    }


def eft_by_annotator(ranked: list[dict], template: str) -> list[dict]:
    """EFT records written by the world's annotator, who looks closely."""
    records = []
    for record in ranked:
        request = oracle.parse_request(record["prompt"])
        for response in record["responses"]:
            verdict = oracle.examine(request, response)
            records.append(eft_record(template, record["prompt"], response,
                                      writers.judgement(request, verdict)))
    return records


def eft_by_baseline(model, tokenizer, ranked: list[dict], template: str, config: JudgeConfig,
                    key: int) -> list[dict]:
    """EFT records written by the SFT baseline, kept where it ranks a prompt's responses rightly.

    It judges J times; of each prompt the first round of judgements that agrees is kept."""
    prompts = [r["prompt"] for r in ranked for _ in r["responses"]]
    responses = [y for r in ranked for y in r["responses"]]
    judged = iter(judge(model, tokenizer, template, prompts, responses, config, key))
    records = []
    for record in ranked:
        rounds = list(zip(*(next(judged) for _ in record["responses"])))
        right = [judgements for judgements in rounds
                 if all(pair_agreement(record["scores"], [j.score for j in judgements]))]
        if right:
            records += [eft_record(template, record["prompt"], response, judgement.text)
                        for response, judgement in zip(record["responses"], right[0])]
    return records


def eft_record(template: str, prompt: str, response: str, judgement: str) -> dict:
    return {"prompt": judge_prompt(template, prompt, response), "response": judgement}


def thin(records: list[dict], key: int) -> list[dict]:
    """Drop records of the commonest score at random, down to the number of the second commonest."""
    scores = [parse_score(record["response"]) for record in records]
    ranking = Counter(scores).most_common(2)
    if len(ranking) < 2:
        return records
    (commonest, count), (_, wanted) = ranking
    those = [i for i, score in enumerate(scores) if score == commonest]
    dropped = set(Random(key).sample(those, count - wanted))
    return [record for i, record in enumerate(records) if i not in dropped]
