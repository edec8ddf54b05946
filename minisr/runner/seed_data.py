"""Seed data: IFT, EFT and the held-out sets (paper, sections 2.1 and 3.1.1).

IFT (instruction fine-tuning) teaches the model to respond: records {prompt, response}. EFT (evaluation
fine-tuning) teaches it to judge: the prompt is a judge prompt, the response a justification and a score. EFT
is made from prompts with several ranked responses, in one of two ways:

- "annotator": the annotator who scored the responses also gave the reason for each score. - "baseline": the
SFT baseline writes the judgements. A prompt's judgements are used if they rank its responses as the annotator
does (the paper's rule, because OASST has rankings without judgements).

In both cases, records of the most frequent score are then dropped until it is as frequent as the second.
"""

from collections import Counter
from pathlib import Path
from random import Random

from minisr import InputError
from minisr.evaluate import ordered_correctly
from minisr.judge import MAX_SCORE, JudgeConfig, Judgement, judge, judge_prompt, parse_score
from minisr.lm import LM
from minisr.rng import derive_seed
from minisr.runner.files import check_encodable, read_json, read_jsonl
from minisr.worlds.tiny import corpus

ENGLISH = Path(__file__).parents[1] / "worlds" / "english"  # written for minisr


def build_seed_data(config, seed: int) -> dict[str, list[dict]]:
    """The data sets that need no model: {"ift", "ranked", "judge_evaluation", "evaluation": records}."""
    if config.source == "world":
        return tiny_world_data(config, seed)
    return folder_data(ENGLISH if config.source == "english" else Path(config.source), config)


def tiny_world_data(config, seed: int) -> dict[str, list[dict]]:
    """As many records of each kind as the config says."""
    def rng(name):
        return Random(derive_seed(seed, "seed data", name))

    prompts = corpus.evaluation_prompts(rng("evaluation"), config.evaluation)
    return {
        "ift": corpus.ift_data(rng("ift"), config.ift),
        "ranked": corpus.ranked_data(rng("ranked"), config.ranked),
        "judge_evaluation": corpus.ranked_data(rng("judge"), config.judge_evaluation, evaluation=True),
        "evaluation": [{"prompt": prompt} for prompt in prompts],
    }


def folder_data(folder: Path, config) -> dict[str, list[dict]]:
    """From ift.json or ift.jsonl, judged.jsonl and evaluation.jsonl, at most as many records as the config
    says.

    The last records of judged.jsonl are held out to measure the judge."""
    as_json = folder / "ift.json"
    ift = read_instructions(as_json if as_json.exists() else folder / "ift.jsonl")
    judged = read_judged(folder / "judged.jsonl")
    prompts = read_prompts(folder / "evaluation.jsonl")
    if not ift or not prompts:
        raise InputError(f"{folder} has no instructions or no evaluation prompts; add some")
    n_train = max(0, len(judged) - config.judge_evaluation)
    if n_train == 0:
        raise InputError(f"{folder}/judged.jsonl has {len(judged)} prompts, and seed_data.judge_evaluation = "
                         f"{config.judge_evaluation} of them are held out; set it to "
                         f"{max(1, len(judged) - 1)} or less, so that some remain to train on")
    return {
        "ift": ift[:config.ift],
        "ranked": judged[:n_train][:config.ranked],
        "judge_evaluation": judged[n_train:],
        "evaluation": [{"prompt": prompt} for prompt in prompts[:config.evaluation]],
    }


def read_instructions(path: Path) -> list[dict]:
    """{prompt, response} records from a JSONL file or a JSON list, in any of these formats:

    {"prompt", "response"}; Alpaca's {"instruction", "input", "output"}; or {"messages"}, a chat of which the
    first user and assistant messages are used, with a system message before them as part of the prompt."""
    records = read_records(path, "instructions")
    return [parse_instruction(record, f"{path}, record {number}") for number, record in enumerate(records, 1)]


def read_prompts(path: Path) -> list[str]:
    """The prompts of records in any of those formats, with or without a response."""
    prompts = []
    for number, record in enumerate(read_records(path, "prompts"), 1):
        if isinstance(record, dict):
            record = {"response": "", "output": "", **record}
        prompts.append(parse_instruction(record, f"{path}, record {number}")["prompt"])
    return prompts


def read_records(path: Path, what: str) -> list:
    return read_json(path, what) if path.suffix == ".json" else read_jsonl(path, what)


def parse_instruction(record: dict, where: str) -> dict:
    """A {prompt, response} record from one in any of the three formats."""
    try:
        if "messages" in record:
            prompt, response = parse_messages(record["messages"])
        elif "instruction" in record:
            parts = [record["instruction"], record.get("input")]
            prompt = "\n\n".join(part for part in parts if part)
            response = record["output"]
        else:
            prompt, response = record["prompt"], record["response"]
        if not (isinstance(prompt, str) and isinstance(response, str) and prompt.strip()):
            raise ValueError("prompt and response must be texts, and the prompt not empty")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{where}: expected instruction/input/output, prompt/response or messages "
                         f"({reason})") from error
    check_encodable(prompt + response, where)
    return {"prompt": prompt, "response": response}


def parse_messages(messages: list[dict]) -> tuple[str, str]:
    """The first prompt of a chat, with the system message if there is one, and the response to it."""
    turns = [(message["role"], message["content"]) for message in messages]
    system = [turns.pop(0)[1]] if turns[0][0] == "system" else []
    (first_role, prompt), (second_role, response) = turns[:2]
    if (first_role, second_role) != ("user", "assistant"):
        raise ValueError("a chat must begin with a user message, then an assistant message")
    return "\n\n".join([*system, prompt]), response


def read_judged(path: Path) -> list[dict]:
    """Records {prompt, responses, scores} and, unless the baseline is to judge, reasons."""
    records = read_jsonl(path, "judged responses", ("prompt",))
    for number, record in enumerate(records, 1):
        if not is_judged(record):
            raise InputError(f"{path}, line {number}: expected lists of equal length (2 or more): responses, "
                             f"scores from 0 to {MAX_SCORE}, reasons")
        texts = [record["prompt"], *record["responses"], *record.get("reasons", [])]
        check_encodable("".join(texts), f"{path}, line {number}")
    return records


def is_judged(record: dict) -> bool:
    """Whether a record has a score, and a reason or no reasons at all, for each of two or more responses."""
    responses, scores = record.get("responses"), record.get("scores")
    reasons = record.get("reasons", responses)
    if not all(isinstance(values, list) for values in (responses, scores, reasons)):
        return False
    if len(responses) < 2 or not len(responses) == len(scores) == len(reasons):
        return False
    return (all(isinstance(text, str) for text in responses + reasons)
            and all(type(score) in (int, float) and 0 <= score <= MAX_SCORE for score in scores))


def eft_by_annotator(ranked: list[dict], template: str, reasons: bool = True) -> list[dict]:
    """EFT records from the annotator's scores, with the annotator's reasons or with the score alone."""
    records = []
    for record in ranked:
        if reasons and "reasons" not in record:
            raise InputError("judged responses have no reasons; add them, or set seed_data.eft_by to "
                             '"baseline", or seed_data.reasons to false')
        for i, (response, score) in enumerate(zip(record["responses"], record["scores"])):
            reason = record["reasons"][i] if reasons else ""
            judgement = f"{reason}\nScore: {score}".lstrip()
            records.append(eft_record(template, record["prompt"], response, judgement))
    return records


def eft_by_baseline(lm: LM, ranked: list[dict], template: str, config: JudgeConfig, seed: int) -> list[dict]:
    """EFT records written by the SFT baseline: J judgements of each response, of which some are selected."""
    prompts = [record["prompt"] for record in ranked for _ in record["responses"]]
    responses = [response for record in ranked for response in record["responses"]]
    remaining = iter(judge(lm, template, prompts, responses, config, seed))
    records = []
    for record in ranked:
        judgements = [next(remaining) for _ in record["responses"]]
        selected = first_agreeing_round(record["scores"], judgements)
        for response, judgement in zip(record["responses"], selected):
            records.append(eft_record(template, record["prompt"], response, judgement.text))
    return records


def first_agreeing_round(scores: list[float], judgements: list[list[Judgement]]) -> list[Judgement]:
    """The first of J rounds that ranks all responses of a prompt as the annotator's scores do; [] if none
    does.

    Round j is the j-th judgement of each response. Responses that the annotator scored all the same rank
    nothing, so no round agrees with them."""
    for one_round in zip(*judgements):
        correct = ordered_correctly(scores, [judgement.score for judgement in one_round])
        if correct and all(correct):
            return list(one_round)
    return []


def eft_record(template: str, prompt: str, response: str, judgement: str) -> dict:
    return {"prompt": judge_prompt(template, prompt, response), "response": judgement}


def balance_scores(records: list[dict], seed: int) -> list[dict]:
    """Drop random records of the most frequent score until it is as frequent as the second."""
    scores = [parse_score(record["response"]) for record in records]
    most_common = Counter(scores).most_common(2)
    if len(most_common) < 2:
        return records
    (top_score, count), (_, target) = most_common
    candidates = [i for i, score in enumerate(scores) if score == top_score]
    dropped = set(Random(seed).sample(candidates, count - target))
    return [record for i, record in enumerate(records) if i not in dropped]
