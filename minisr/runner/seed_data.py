"""Seed data: IFT, EFT and the held-out sets (paper, sections 2.1 and 3.1.1).

IFT (instruction fine-tuning) teaches the model to respond: records {prompt, response}. EFT (evaluation
fine-tuning) teaches it to judge: the prompt is a judge prompt, the response a justification and a score. EFT
is made from prompts with several ranked responses, in one of two ways:

- "annotator": the annotator who scored the responses also gave the reason for each score.
- "baseline": the SFT baseline writes the judgements. A prompt's judgements are used if they rank its responses
  as the annotator does (the paper's rule, because OASST has rankings without judgements).

In both cases, records of the most frequent score are then dropped until it is as frequent as the second.
"""

import os
from collections import Counter
from pathlib import Path
from random import Random

from minisr import InputError
from minisr.evaluate import ordered_correctly
from minisr.judge import MAX_SCORE, JudgeConfig, Judgement, judge, judge_prompt, parse_score
from minisr.lm import LM
from minisr.rng import derive_seed
from minisr.runner.data_sets import (
    HELD_OUT,
    NO_REASONS,
    Context,
    DataSet,
    annotator_judgements,
    reject_held_out,
    reject_too_long,
    shorten,
)
from minisr.runner.files import LONE_SURROGATE, has_lone_surrogate
from minisr.runner.json_records import read_records
from minisr.runner.record_formats import (
    LeftOut,
    join_oasst_rows,
    parse_exchange,
    parse_instruction,
)
from minisr.worlds.catalog import WORLDS
from minisr.worlds.tiny import corpus
from minisr.worlds.words import corpus as words_corpus
from minisr.worlds.words.edits import PLAIN

ENGLISH = Path(__file__).parents[1] / "worlds" / "english"  # written for minisr


def build_seed_data(config, seed: int) -> dict[str, list[dict]]:
    """The data sets that need no model: {"ift", "ranked", "judge_evaluation", "evaluation": records}."""
    return load_seed_data(config, seed)[0]


def load_seed_data(config, seed: int, context: Context | None = None,
                   answer=None) -> tuple[dict[str, list[dict]], dict[str, DataSet]]:
    """The data sets, without records that do not fit the context, and what became of all records of each set.

    answer(prompts) samples M0's answers to prompts of the words world, {"prompt", "responses", "finished"} records.
    Without it, plain sentences stand in for them: enough to find out whether the data fit.
    Raises InputError if nothing is left of a set, if config.too_long is "refuse" and a record does not fit, or if most
    answers or judgements are longer than max_new_tokens."""
    if config.source == "world":
        data, sets = world_sets(tiny_world_data(config, seed), context, "the tiny world")
    elif config.source == "words":
        data, sets = world_sets(words_world_data(config, seed, answer or stand_in), context, "the words world")
    else:
        data, sets = user_sets(source_path(config), config, context)
    if context and config.too_long == "refuse":
        refuse_too_long(sets, context)
    if context and not answer:  # what M0 has sampled comes too late to be refused
        context.check_cut_off(data)
    return data, sets


def check_source(config) -> None:
    """Raise InputError if the source is neither a world nor a file or folder with instructions."""
    if config.source not in WORLDS:
        find_file(source_path(config), "ift")


def refuse_too_long(sets: dict[str, DataSet], context: Context) -> None:
    found = [f"{data.path or name}: {', '.join(data.left_out[context.too_long])}"
             for name, data in sets.items() if context.too_long in data.left_out]
    if found:
        raise InputError(f"records are {context.too_long}: {'; '.join(found)}; shorten them, or set "
                         'seed_data.too_long to "drop" to leave them out')


# The tiny world and the words world.

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


def words_world_data(config, seed: int, answer) -> dict[str, list[dict]]:
    """As many records of each kind as the config says, from M0's answers; see worlds/words/corpus.py."""
    def rng(name):
        return Random(derive_seed(seed, "words", name))

    training = max(config.ift, config.ranked)
    prompts = words_corpus.seed_requests(rng("requests"), training, config.judge_evaluation)
    evaluation = words_corpus.evaluation_prompts(rng("evaluation"), config.evaluation, prompts["judge_evaluation"])
    answered = answer(prompts["training"] + prompts["judge_evaluation"])
    return {
        "ift": words_corpus.ift_data(answered[:training], config.ift),
        "ranked": words_corpus.judged_data(answered[:training][:config.ranked], config.edited, rng("ranked")),
        "judge_evaluation": words_corpus.judged_data(answered[training:], config.edited, rng("judge")),
        "evaluation": [{"prompt": prompt} for prompt in evaluation],
    }


def stand_in(prompts: list[str]) -> list[dict]:
    """Records as if a model had answered each prompt with the same few sentences."""
    answers = list(PLAIN[:words_corpus.ANSWERS])
    return [{"prompt": prompt, "responses": answers, "finished": [True] * len(answers)} for prompt in prompts]


def world_sets(world_data: dict[str, list[dict]], context: Context | None,
               world: str) -> tuple[dict[str, list[dict]], dict[str, DataSet]]:
    """A world's records, as far as they fit the context of a seed model that the user chose."""
    lengths = {"ift": Context.instruction_length, "ranked": Context.judged_length,
               "judge_evaluation": Context.judged_length, "evaluation": Context.prompt_length}
    data, sets = {}, {}
    for name, records in world_data.items():
        sets[name] = DataSet(None, [(f"record {number}", record) for number, record in enumerate(records, 1)])
        data[name] = sets[name].take(len(records), reject_too_long(context, lengths[name]), "")
        if not data[name]:
            problems = sets[name].problems() or "it is empty"
            raise InputError(f"{world}'s {name} has no record that can be used: {problems}")
    return data, sets


# Files.

def source_path(config) -> Path:
    """The file or folder of the seed data."""
    return ENGLISH if config.source == "english" else Path(os.path.expanduser(config.source))


def user_sets(source: Path, config, context: Context | None) -> tuple[dict[str, list[dict]], dict[str, DataSet]]:
    """From a folder with ift, judged and evaluation files, or from one file of instructions.

    The last judged prompts are held out to measure the judge. Without an evaluation file, the prompts of the last
    instructions are held out. Without EFT, no judged file is needed."""
    ift = read_set(find_file(source, "ift"), parse_instruction)
    if path := find_file(source, "evaluation", needed=False):
        evaluation = read_set(path, parse_exchange)
    else:
        evaluation = copy_set(ift, ift.records[::-1])  # from the last one on
    judged = read_judged(source, config)
    surplus = f"beyond seed_data.evaluation = {config.evaluation}" if path else "left for training"
    prompts = evaluation.take(config.evaluation, reject_too_long(context, Context.prompt_length), surplus)
    prompts = [{"prompt": record["prompt"]} for record in (prompts if path else prompts[::-1])]
    ranked, judge_evaluation = split_judged(judged, prompts, config, context)
    reject = reject_held_out(prompts + judge_evaluation, reject_too_long(context, Context.instruction_length))
    data = {
        "ift": ift.take(config.ift, reject, f"beyond seed_data.ift = {config.ift}"),
        "ranked": ranked,
        "judge_evaluation": judge_evaluation,
        "evaluation": prompts,
    }
    fix = "" if path else (f"; seed_data.evaluation = {config.evaluation} of them are held out, since there is no "
                           "evaluation.jsonl; set it to a smaller number than there are instructions")
    check_not_empty(ift, data["ift"], "instructions", fix)
    check_not_empty(evaluation, prompts, "evaluation prompts")
    return data, {"ift": ift, "judged": judged, "evaluation": evaluation}


def check_not_empty(data: DataSet, used: list[dict], what: str, fix: str = "") -> None:
    if not used:
        reasons = data.problems() or "it is empty"
        raise InputError(f"{data.path} has no {what} that can be used: {reasons}{fix if data.records else ''}")


def split_judged(judged: DataSet, held_out: list[dict], config,
                 context: Context | None) -> tuple[list[dict], list[dict]]:
    """The judged prompts for EFT, and the last ones, which are held out."""
    fitting = judged.take(len(judged.records), reject_too_long(context, Context.judged_length), "")
    n_train = max(0, len(fitting) - config.judge_evaluation)
    judge_evaluation = fitting[n_train:]
    reject = reject_held_out(held_out + judge_evaluation, lambda record: None)
    train = [i for i in range(n_train) if reject(fitting[i]) is None]
    judged.drop(sorted(set(range(n_train)).difference(train)), HELD_OUT)
    judged.drop(train[config.ranked:], f"beyond seed_data.ranked = {config.ranked}")
    if not train and config.eft_by != "none":
        check_not_empty(judged, fitting, "judged prompts")
        raise InputError(f"{judged.path} has {len(fitting)} prompts, and seed_data.judge_evaluation = "
                         f"{config.judge_evaluation} of them are held out; set it to {max(1, len(fitting) - 1)} or "
                         "less, so that some remain to train on")
    return [fitting[i] for i in train[:config.ranked]], judge_evaluation


def find_file(source: Path, name: str, needed: bool = True) -> Path | None:
    """NAME.json or NAME.jsonl in a folder; a source that is a file is the file of instructions."""
    if os.path.isfile(source):  # unlike Path.is_file, False for a name that no file can have
        return source if name == "ift" else None
    if not os.path.isdir(source):
        raise InputError(f"seed_data.source: there is no file or folder {source}")
    found = [path for path in (source / f"{name}.json", source / f"{name}.jsonl") if os.path.exists(path)]
    if len(found) == 2:
        raise InputError(f"{source} has both {name}.json and {name}.jsonl; keep the one to use there")
    if needed and not found:
        raise InputError(f"{source} has neither {name}.json nor {name}.jsonl")
    return found[0] if found else None


def read_set(path: Path, parse) -> DataSet:
    """The {prompt, response} records of a file in any of the formats of record_formats.py."""
    records = join_oasst_rows(read_records(path, "seed data"))
    data = DataSet(path, [])
    data.total = len(records)
    for place, record in records:
        try:
            exchange = parse(record)
        except LeftOut as reason:
            data.leave_out(str(reason), place)
            continue
        data.formats[exchange.format] += 1
        data.later_turns += exchange.later_turns
        data.records.append((place, {"prompt": exchange.prompt, "response": exchange.response}))
    return data


def copy_set(data: DataSet, records: list[tuple[str, dict]]) -> DataSet:
    """Another set from the same file."""
    other = DataSet(data.path, records)
    other.total, other.formats = data.total, data.formats
    other.left_out = {reason: list(places) for reason, places in data.left_out.items()}
    return other


def read_instructions(path: Path) -> list[dict]:
    """The {prompt, response} records of a file, without those that cannot be used."""
    return [record for _, record in read_set(path, parse_instruction).records]


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """(place, prompt) of every record of a file, with or without an answer. Raises InputError if one has no prompt."""
    data = read_set(path, parse_exchange)
    if data.left_out:
        raise InputError(f"{path}: records that hold no prompt: {data.problems()}")
    if not data.records:
        raise InputError(f"{path} has no prompts")
    return [(place, record["prompt"]) for place, record in data.records]


def read_judged(source: Path, config) -> DataSet:
    """Records {prompt, responses, scores} and, unless the baseline is to judge, reasons.

    Raises InputError that names the first malformed records."""
    path = find_file(source, "judged", needed=False)
    if path is None:
        if config.eft_by == "none":
            return DataSet(None, [])
        raise InputError(f"{source} has no judged.jsonl or judged.json, the responses with scores that EFT needs; to "
                         "run without EFT: --set seed_data.eft_by=none --set dpo.replay_weight=0")
    data, malformed, unexplained = DataSet(path, []), [], []
    for place, record in read_records(path, "judged responses"):
        data.total += 1
        if not is_judged(record):
            malformed.append(place)
            continue
        if "reasons" not in record:
            unexplained.append(place)
        if has_lone_surrogate("".join([record["prompt"], *record["responses"], *record.get("reasons", [])])):
            data.leave_out(LONE_SURROGATE, place)
            continue
        data.formats["judged"] += 1
        kept = ("prompt", "responses", "scores", "reasons")
        data.records.append((place, {key: record[key] for key in kept if key in record}))
    if malformed:
        raise InputError(f'{path}, {shorten(malformed)}: expected "prompt", and the lists "responses", "scores" (0 to '
                         f'{MAX_SCORE}) and, optionally, "reasons", all of the same length (2 or more)')
    if unexplained and config.eft_by == "annotator" and config.reasons:
        raise InputError(f"{path}, {shorten(unexplained)}: {NO_REASONS}")
    return data


def is_judged(record) -> bool:
    """Whether a record has a prompt and a score, and a reason or no reasons at all, for each of two or more
    responses."""
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        return False
    responses, scores = record.get("responses"), record.get("scores")
    reasons = record.get("reasons", responses)
    if not all(isinstance(values, list) for values in (responses, scores, reasons)):
        return False
    if len(responses) < 2 or not len(responses) == len(scores) == len(reasons):
        return False
    return (all(isinstance(text, str) for text in responses + reasons)
            and all(type(score) in (int, float) and 0 <= score <= MAX_SCORE for score in scores))


# EFT.

def eft_by_annotator(ranked: list[dict], template: str, reasons: bool = True) -> list[dict]:
    """EFT records from the annotator's scores, with the annotator's reasons or with the score alone."""
    return [eft_record(template, record["prompt"], response, judgement)
            for record in ranked
            for response, judgement in zip(record["responses"], annotator_judgements(record, reasons))]


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
    return [record for record in records if fits(lm, record)]


def fits(lm: LM, record: dict) -> bool:
    """Whether a record can be trained on. Sampled ids, decoded and encoded again, may become more."""
    ids, _ = lm.tokenizer.encode_chat(record["prompt"], record["response"])
    return len(ids) <= lm.max_seq_len


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
