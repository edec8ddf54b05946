"""CommonGen-lite: does a model write one sentence that uses all of the given words?

    python benchmarks/commongen.py runs/words/M1 runs/words/M2 --sets commongen_lite.jsonl --out answers
    python benchmarks/commongen.py --sets commongen_lite.jsonl --score-only zephyr-7b-beta

benchmarks/README.md describes what is measured. The last line printed is one JSON document.
"""

import argparse
import json
import math
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from sentences import Concept, Lemmatizer, ends, is_list, repeats
from sides import OneLineParser, in_one_line

from minisr import InputError
from minisr.bench import default_dtype, machine
from minisr.dpo import sequence_logprobs
from minisr.evaluate import bootstrap_ci, mean
from minisr.interop import gguf
from minisr.interop.source import load_source, resolve, source_digest
from minisr.lm import LM, ResponseConfig, respond
from minisr.runner.engine import best_lm
from minisr.runner.files import read_jsonl, write_jsonl
from minisr.runner.json_records import read_records
from minisr.sft import Example, right_pad
from minisr.worlds.words.requests import PHRASINGS
from minisr.worlds.words.sentence import FINE, WORD, check_sentence

FORMAT = """
The file of sets is JSON Lines, one set a line:

    {"concepts": ["dog_N", "catch_V", "frisbee_N"], "outputs": {"some model": "The dog catches the frisbee."}}

A concept is a word in its base form with _N for a noun or _V for a verb. "outputs", which may be missing, holds answers
of other models for --score-only. CommonGen-lite (Lin et al.) is the dataset allenai/commongen_lite; its field
"concept_set" is read as "concepts".

Columns, in percent of the sets unless they say otherwise:

    cover     every concept occurs, in any inflection; with a 95 % bootstrap interval over the sets
    single    percent of single concepts that occur
    pos       every concept occurs with its part of speech
    form      the answer is one proper sentence, by the rules of minisr/worlds/words/sentence.py, and was not cut off
    both      cover and form: a proper sentence with all of the words; with its interval
    words     mean length in words
    list      an enumeration in place of a sentence (form's own rule for lists is stricter)
    repeats   three words in a row come twice, or two come three times
    ends      the answer ends with . ! or ? (and, if the model was run, with its end token)
    ppl       perplexity under --perplexity-under MODEL: exp of the mean loss per token, given the prompt
    median    the median of the answers' own perplexities, which a few endless loops do not lower
"""
CATEGORIES = {"N": "NOUN", "V": "VERB"}
PROMPT = PHRASINGS[0]  # of the requests of the words world
# Two examples, as in the published evaluation, in our words; neither is a set of CommonGen-lite.
PROMPT_WITH_EXAMPLES = """\
Write one short and simple sentence that uses all of the given words, any form of them. It should describe something \
that happens in daily life.

Words: kettle (noun), pour (verb), cup (noun), tea (noun)
Sentence: My aunt pours the tea from the kettle into a cup.

Words: letter (noun), mail (verb), stamp (noun), lick (verb)
Sentence: He licked a stamp, put it on the letter and mailed it.

Words: {words}
Sentence:"""
INTERVALS = ("cover", "both")
COLUMNS = ("form", "single", "pos", "words", "list", "repeats", "ends", "ppl", "median")
PERPLEXITY_BATCH = 8  # answers; the logits of more would be large


class WordSet(NamedTuple):
    """One task: concepts to use, and the answers of other models by name."""

    concepts: list[Concept]
    outputs: dict[str, str | None]


class Answer(NamedTuple):
    """A model's answer to one set."""

    text: str
    finished: bool = True  # False: cut off before its end token


def read_sets(path: Path) -> list[WordSet]:
    """The sets in a file. Raises InputError naming file and line."""
    sets = []
    for place, record in read_records(path, "sets"):
        where = f"sets {path}, {place}"
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object {{...}} with \"concepts\"")
        concepts = record.get("concepts", record.get("concept_set"))
        if not isinstance(concepts, list) or not concepts:
            raise InputError(f"{where}: \"concepts\" must be a list of words such as \"dog_N\" or \"catch_V\"")
        outputs = record.get("outputs", {})
        if not isinstance(outputs, dict) or not all(isinstance(y, str | None) for y in outputs.values()):
            raise InputError(f"{where}: \"outputs\" must be an object with one text for each model")
        sets.append(WordSet([parse_concept(concept, where) for concept in concepts], outputs))
    if not sets:
        raise InputError(f"sets {path}: the file holds no sets")
    return sets


def parse_concept(concept, where: str) -> Concept:
    """dog_N as a Concept."""
    word, _, letter = concept.rpartition("_") if isinstance(concept, str) else ("", "", "")
    if not WORD.fullmatch(word.strip()) or letter not in CATEGORIES:
        raise InputError(f"{where}: the concept {concept!r} is not one word that ends in _N (noun) or _V (verb)")
    return Concept(word.strip().lower(), CATEGORIES[letter])


def make_prompt(concepts: list[Concept], examples: bool) -> str:
    """The request for a sentence with these words."""
    if not examples:
        return PROMPT.format(words=", ".join(concept.word for concept in concepts))
    return PROMPT_WITH_EXAMPLES.format(words=", ".join(f"{c.word} ({c.category.lower()})" for c in concepts))


def published_answers(sets: list[WordSet], name: str, path: Path) -> list[Answer]:
    """The outputs of one model in the file of sets. Raises InputError if a set has none."""
    for number, word_set in enumerate(sets, 1):
        if name not in word_set.outputs:
            known = ", ".join(word_set.outputs) or "none"
            raise InputError(f"--score-only {name}: set {number} of {path} has no such output; it has: {known}")
    return [Answer(word_set.outputs[name] or "") for word_set in sets]


def check_sources(sources: list[str]) -> None:
    """Raise InputError if a model is missing, before any is loaded."""
    for source in sources:
        path = resolve(source)
        if path.is_file() and not gguf.is_gguf(path):
            raise InputError(f"{path} is a file, but not a GGUF file; name the folder of a model, or a .gguf file")
        source_digest(source)


def load_lm(source: str, device: str, dtype: torch.dtype) -> LM:
    model, tokenizer = load_source(source)
    return best_lm(model.to(device, dtype), tokenizer)


def answers_of(source: str, prompts: list[str], options) -> list[Answer]:
    """Greedy answers of a model. Those stored in --out are not written again."""
    path = options.out and options.out / answers_name(source, options.weights_dtype)
    known = {}
    if path and path.exists():
        for record in read_jsonl(path, "answers", ("prompt", "response")):
            known[record["prompt"], record.get("max_new_tokens")] = record
    missing = [prompt for prompt in dict.fromkeys(prompts) if (prompt, options.max_new_tokens) not in known]
    if missing:
        lm = load_lm(source, options.device, options.weights_dtype)
        config = ResponseConfig(temperature=0.0, max_new_tokens=options.max_new_tokens, candidates=1, rows=64)
        for record in respond(lm, missing, config, seed=0):
            known[record["prompt"], options.max_new_tokens] = {
                "prompt": record["prompt"], "response": record["responses"][0], "finished": record["finished"][0],
                "max_new_tokens": options.max_new_tokens}
        if path:
            write_jsonl(path, known.values())
    records = [known[prompt, options.max_new_tokens] for prompt in prompts]
    return [Answer(record["response"], record.get("finished") is True) for record in records]


def answers_name(source: str, dtype: torch.dtype) -> str:
    """The name of a file with answers. It contains a digest of the weights: other weights have another file."""
    readable = re.sub(r"[^\w.-]+", "_", source).strip("_")
    return f"{readable}-{source_digest(source)[:12]}-{str(dtype).removeprefix('torch.')}.jsonl"


def measure(sets: list[WordSet], answers: list[Answer], lemmatizer: Lemmatizer) -> dict:
    """Every measure of one model's answers but the perplexity. Shares are between 0 and 1."""
    hits, hits_with_pos = [], []
    for word_set, answer in zip(sets, answers, strict=True):
        readings = lemmatizer.readings(answer.text)
        lemmas = {lemma for lemma, _ in readings}
        hits.append([concept.word in lemmas for concept in word_set.concepts])
        hits_with_pos.append([tuple(concept) in readings for concept in word_set.concepts])
    cover = [all(hit) for hit in hits]
    form = [is_sentence(answer, word_set.concepts) for word_set, answer in zip(sets, answers)]
    both = [a and b for a, b in zip(cover, form)]
    return {"sets": len(sets), "cover": mean(cover), "cover_ci95": bootstrap_ci(cover),
            "both": mean(both), "both_ci95": bootstrap_ci(both), "form": mean(form), "form_ci95": bootstrap_ci(form),
            "single": mean([hit for found in hits for hit in found]), "pos": mean([all(hit) for hit in hits_with_pos]),
            "words": mean([len(answer.text.split()) for answer in answers]),
            "list": mean([is_list(answer.text) for answer in answers]),
            "repeats": mean([repeats(answer.text) for answer in answers]),
            "ends": mean([answer.finished and ends(answer.text) for answer in answers])}


def is_sentence(answer: Answer, concepts: list[Concept]) -> bool:
    """The sentence point of the words world's oracle, for an answer that ended by itself."""
    return answer.finished and check_sentence(answer.text, tuple(c.word for c in concepts)).reason == FINE


@torch.no_grad()
def perplexity(lm: LM, prompts: list[str], answers: list[Answer]) -> dict:
    """Perplexity of answers, given their prompts and without the end token: "ppl" over all tokens, and the "median" of
    the answers' own. None without any token.

    An endless loop has many tokens, all of them likely, and lowers "ppl". What exceeds max_seq_len is left out."""
    examples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, mask = lm.tokenizer.encode_chat(prompt, answer.text)
        examples.append(Example(ids[:-1][:lm.max_seq_len], mask[:-1][:lm.max_seq_len]))
    examples = sorted((e for e in examples if any(e.mask)), key=lambda example: len(example.ids))
    logps = []
    for start in range(0, len(examples), PERPLEXITY_BATCH):
        ids, mask = right_pad(examples[start:start + PERPLEXITY_BATCH], lm.model.device)  # (B, T)
        logps += sequence_logprobs(lm.model(ids), ids, mask).tolist()
    if not examples:
        return {"ppl": None, "median": None}
    tokens = [sum(example.mask) for example in examples]
    return {"ppl": math.exp(-sum(logps) / sum(tokens)),
            "median": statistics.median(math.exp(-logp / n) for logp, n in zip(logps, tokens))}


def print_table(results: list[dict]) -> None:
    width = max(len("model"), *(len(result["model"]) for result in results))
    print(f"{'model':{width}}" + "".join(f"{f'{name} [95 %]':>22}" for name in INTERVALS)
          + "".join(f"{name:>8}" for name in COLUMNS))
    for result in results:
        line = f"{result['model']:{width}}"
        for name in INTERVALS:
            low, high = result[f"{name}_ci95"]
            line += f"{100 * result[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]".rjust(22)
        print(line + "".join(f"{cell(name, result[name]):>8}" for name in COLUMNS))


def cell(name: str, value: float | None) -> str:
    """A value in the table: a share in percent, anything else as it is."""
    if value is None:
        return "-"
    return f"{value:.1f}" if name in ("words", "ppl", "median") else f"{100 * value:.1f}"


def parse_options():
    parser = OneLineParser(description=__doc__.partition("\n")[0], epilog=FORMAT,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a model folder of a run (runs/words/M2), a Hugging "
                        "Face folder, a .gguf file, or package:NAME")
    parser.add_argument("--sets", type=Path, required=True, metavar="FILE", help="the sets, see below")
    parser.add_argument("--score-only", nargs="+", default=[], metavar="NAME", help='score these "outputs" in FILE')
    parser.add_argument("--examples", action="store_true", help="put two examples into the prompt")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N sets")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="store the answers here; a rerun only scores them")
    parser.add_argument("--perplexity-under", metavar="MODEL",
                        help="measure perplexity under this model, e.g. the run's M0")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer; default 128")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of all weights; default: bfloat16 on a GPU, else float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, metavar="K", help="of the CPU, default 2")
    options = parser.parse_args()
    if not options.models and not options.score_only:
        parser.error("name a model, or outputs in the file of sets with --score-only")
    for name in ("limit", "max_new_tokens", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU")
    options.weights_dtype = (default_dtype(options.device) if options.dtype == "auto"
                             else getattr(torch, options.dtype))
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    sets = read_sets(options.sets)[:options.limit]
    answers = {name: published_answers(sets, name, options.sets) for name in options.score_only}
    check_sources([*options.models, *filter(None, [options.perplexity_under])])
    lemmatizer = Lemmatizer()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    prompts = [make_prompt(word_set.concepts, options.examples) for word_set in sets]
    for source in options.models:
        answers[source] = answers_of(source, prompts, options)
    lm = load_lm(options.perplexity_under, options.device, options.weights_dtype) if options.perplexity_under else None
    results = []
    for name, made in answers.items():
        unmeasured = {"ppl": None, "median": None}
        results.append({"model": name, **measure(sets, made, lemmatizer),
                        **(perplexity(lm, prompts, made) if lm else unmeasured)})
    print_table(results)
    hardware = machine(options.device, options.threads, options.weights_dtype)
    print(json.dumps({"machine": hardware, "sets": str(options.sets), "examples": options.examples,
                      "score_only": options.score_only, "results": results}))


if __name__ == "__main__":
    in_one_line(main)
