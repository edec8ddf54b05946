"""Seed data: IFT, EFT and the held-out sets (paper, section 2.1 and 3.1.1).

IFT teaches to answer: {prompt, response}. EFT teaches to judge: {judge prompt, justification and
score}. EFT is made from prompts with several ranked responses, in one of two ways:

- "annotator": the annotator who ranked the responses also gave the reason for each score;
- "baseline": the SFT baseline writes judgements; kept are those of a prompt on which their
  ranking agrees with the annotator's (the paper's rule: OASST has ranks but no judgements).

Either way the commonest score is thinned to the second commonest's number.
"""

from collections import Counter
from itertools import repeat
from pathlib import Path
from random import Random

from minisr import InputError
from minisr.evaluate import ordered_correctly
from minisr.judge import MAX_SCORE, JudgeConfig, judge, judge_prompt, parse_score
from minisr.rng import derive_seed
from minisr.runner.files import read_json, read_jsonl
from minisr.worlds.tiny import corpus

ENGLISH = Path(__file__).parents[1] / "worlds" / "english"  # written for minisr


def build_seed_data(config, seed: int) -> dict[str, list[dict]]:
    """Every data set that needs no model, by file name."""
    if config.source == "world":
        return _of_the_world(config, seed)
    return _of_a_folder(ENGLISH if config.source == "english" else Path(config.source), config)


def _of_the_world(config, seed: int) -> dict[str, list[dict]]:
    def rng(name):
        return Random(derive_seed(seed, "seed data", name))

    evaluation = corpus.evaluation_prompts(rng("evaluation"), config.evaluation)
    return {
        "ift": corpus.ift_data(rng("ift"), config.ift),
        "ranked": corpus.ranked_data(rng("ranked"), config.ranked),
        "judge_evaluation": corpus.ranked_data(rng("judge"), config.judge_evaluation, evaluation=True),
        "evaluation": [{"prompt": prompt} for prompt in evaluation],
    }


def _of_a_folder(folder: Path, config) -> dict[str, list[dict]]:
    """ift.jsonl or ift.json, judged.jsonl, evaluation.jsonl: as many of each as the config asks for, if
    there are so many. The end of judged.jsonl is held out to measure the judge."""
    ift = read_instructions(folder / "ift.json" if (folder / "ift.json").exists() else folder / "ift.jsonl")
    judged = [_judged(record, folder / "judged.jsonl", number) for number, record in
              enumerate(read_jsonl(folder / "judged.jsonl", "judged responses", ("prompt",)), 1)]
    held_out = judged[-config.judge_evaluation:]
    ranked = judged[:len(judged) - len(held_out)][:config.ranked]
    evaluation = read_prompts(folder / "evaluation.jsonl")
    if not ift or not evaluation:
        raise InputError(f"{folder}: no instructions, or no evaluation prompts")
    if not ranked:
        raise InputError(f"{folder}/judged.jsonl has {len(judged)} prompts, of which judge_evaluation = "
                         f"{config.judge_evaluation} are held out: set seed_data.judge_evaluation to "
                         f"{max(1, len(judged) - 1)} or less, so that some are left to learn from")
    return {"ift": ift[:config.ift], "ranked": ranked, "judge_evaluation": held_out,
            "evaluation": [{"prompt": prompt} for prompt in evaluation[:config.evaluation]]}


def read_instructions(path: Path) -> list[dict]:
    """{prompt, response} records from Alpaca's, prompt/response or chat-messages records, JSONL or a JSON
    list. Of a chat the first turn is taken, a system message before it."""
    records = read_json(path, "instructions") if path.suffix == ".json" else read_jsonl(path, "instructions")
    return [_instruction(record, f"{path}, record {number}") for number, record in enumerate(records, 1)]


def read_prompts(path: Path) -> list[str]:
    """The prompts alone, of records of any of those formats, with or without a response."""
    records = read_json(path, "prompts") if path.suffix == ".json" else read_jsonl(path, "prompts")
    empty = {"response": "", "output": ""}
    return [_instruction(empty | record if isinstance(record, dict) else record,
                         f"{path}, record {number}")["prompt"] for number, record in enumerate(records, 1)]


def _instruction(record: dict, where: str) -> dict:
    try:
        if "messages" in record:
            turns = [(m["role"], m["content"]) for m in record["messages"]]
            system = [turns.pop(0)[1]] if turns[0][0] == "system" else []
            (asks, prompt), (answers, response) = turns[:2]
            if (asks, answers) != ("user", "assistant"):
                raise ValueError("a chat begins with a user's turn, then an assistant's")
            prompt = "\n\n".join([*system, prompt])
        elif "instruction" in record:
            prompt = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
            response = record["output"]
        else:
            prompt, response = record["prompt"], record["response"]
        if not (isinstance(prompt, str) and isinstance(response, str) and prompt.strip()):
            raise ValueError("prompt and response must be texts, the prompt not empty")
        return {"prompt": prompt, "response": response}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{where}: expected instruction/input/output, prompt/response or messages "
                         f"({reason})") from error


def _judged(record: dict, path: Path, number: int) -> dict:
    """{prompt, responses, scores, reasons}, checked; reasons may be left out if the baseline judges."""
    responses, scores = record.get("responses"), record.get("scores")
    reasons = record.get("reasons", responses)
    lists = all(isinstance(values, list) for values in (responses, scores, reasons))
    if not lists or not len(responses) == len(scores) == len(reasons) >= 2 \
            or not all(isinstance(text, str) for text in responses + reasons) \
            or not all(type(s) in (int, float) and 0 <= s <= MAX_SCORE for s in scores):
        raise InputError(f"{path}, line {number}: expected lists of equal length (2 or more): responses, "
                         f"scores from 0 to {MAX_SCORE}, reasons")
    return record


def eft_by_annotator(ranked: list[dict], template: str, reasons: bool = True) -> list[dict]:
    """EFT records from the annotator's scores, with the reasons or without."""
    if reasons and any("reasons" not in record for record in ranked):
        raise InputError('judged responses without reasons: add them, or set seed_data.eft_by to "baseline", '
                         "or seed_data.reasons to false")
    return [eft_record(template, record["prompt"], response, f"{reason}\nScore: {score}".lstrip())
            for record in ranked for response, reason, score in
            zip(record["responses"], record["reasons"] if reasons else repeat(""), record["scores"])]


def eft_by_baseline(lm, ranked: list[dict], template: str, config: JudgeConfig, seed: int) -> list[dict]:
    """EFT records written by the SFT baseline, kept where it ranks a prompt's responses rightly.

    It judges J times; of each prompt the first round of judgements that agrees is kept."""
    prompts = [r["prompt"] for r in ranked for _ in r["responses"]]
    responses = [y for r in ranked for y in r["responses"]]
    judged = iter(judge(lm, template, prompts, responses, config, seed))
    records = []
    for record in ranked:
        rounds = list(zip(*(next(judged) for _ in record["responses"])))
        right = [judgements for judgements in rounds
                 if (agree := ordered_correctly(record["scores"], [j.score for j in judgements]))
                 and all(agree)]  # without any pair the annotator ranked nothing
        if right:
            records += [eft_record(template, record["prompt"], response, judgement.text)
                        for response, judgement in zip(record["responses"], right[0])]
    return records


def eft_record(template: str, prompt: str, response: str, judgement: str) -> dict:
    return {"prompt": judge_prompt(template, prompt, response), "response": judgement}


def balance_scores(records: list[dict], key: int) -> list[dict]:
    """Drop records of the commonest score at random, down to the number of the second commonest."""
    scores = [parse_score(record["response"]) for record in records]
    ranking = Counter(scores).most_common(2)
    if len(ranking) < 2:
        return records
    (commonest, count), (_, wanted) = ranking
    those = [i for i, score in enumerate(scores) if score == commonest]
    dropped = set(Random(key).sample(those, count - wanted))
    return [record for i, record in enumerate(records) if i not in dropped]
