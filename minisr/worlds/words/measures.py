"""Metrics of the words world, in metrics.json beside those of every world."""

from collections import Counter

import numpy as np

from minisr.evaluate import bootstrap_ci, judge_metrics, mean
from minisr.worlds.words.annotator import read_points
from minisr.worlds.words.oracle import examine
from minisr.worlds.words.requests import is_unseen, parse_request
from minisr.worlds.words.sentence import WORD


def measure_answers(answers: list[dict]) -> dict:
    """{"words": {"all", "seen", "unseen"}, "words_greedy": ...}: see measure_texts.

    Records: {"prompt", "sampled", "greedy"}."""
    result = {}
    for way, key in (("sampled", "words"), ("greedy", "words_greedy")):
        groups = {"all": [], "seen": [], "unseen": []}
        for record in answers:
            request = parse_request(record["prompt"])
            for name in ("all", "unseen" if is_unseen(request) else "seen"):
                groups[name].append((request, record[way]))
        result[key] = {name: measure_texts(texts) for name, texts in groups.items() if texts}
    return result


def measure_texts(texts: list[tuple]) -> dict:
    """Shares of the answers that have all four words ("cover"), are a sentence ("form"), both ("flawless"), or are
    lists; their mean length in words, and how often each form occurred. texts: (request, answer)."""
    verdicts = [examine(request, text) for request, text in texts]
    points = np.array([verdict.points for verdict in verdicts])  # (answers, 5)
    cover, form, flawless = points[:, :-1].all(1), points[:, -1], points.all(1)
    forms = Counter(verdict.form.reason for verdict in verdicts)
    return {"cover": float(cover.mean()), "cover_ci95": bootstrap_ci(cover),
            "form": float(form.mean()), "form_ci95": bootstrap_ci(form),
            "flawless": float(flawless.mean()), "flawless_ci95": bootstrap_ci(flawless),
            "single_words": float(points[:, :-1].mean()),
            "lists": forms["a list"] / len(texts),
            "length": float(np.mean([len(WORD.findall(text)) for _, text in texts])),
            "forms": {name: count / len(texts) for name, count in forms.most_common()}}


def measure_judge(judged: list[dict]) -> dict:
    """Accuracy of the judge on single points, and on answers that were not edited.

    "words_right", "form_right": shares of the points that the justification gives as the annotator does;
    "false_sentences": share of the non-sentences to which it gives the sentence's point;
    "natural_pairwise": pairwise accuracy on the answers that were not edited, if the records say which were.
    Records are those of judge_evaluation.jsonl, or a model's own responses (evaluation.own_responses)."""
    words, forms, false_sentences = [], [], []
    for record in judged:
        request = parse_request(record["prompt"])
        for text, judgements in zip(record["responses"], record["judgements"]):
            true = examine(request, text).points
            for judgement in judgements:
                given = read_points(request, judgement)
                right = [point == true_point for point, true_point in zip(given, true)]
                words += right[:-1]
                forms.append(right[-1])
                if not true[-1]:
                    false_sentences.append(given[-1] is True)
    result = {"words_right": mean(words), "form_right": mean(forms), "false_sentences": mean(false_sentences)}
    if any("edited" in record for record in judged):
        natural = [keep_natural(record) for record in judged]
        metrics = judge_metrics([scores for scores, _ in natural], [rewards for _, rewards in natural])
        result["natural_pairwise"] = metrics["pairwise"]
    return result


def keep_natural(record: dict) -> tuple[list, list]:
    """(scores, rewards) of the answers that were not edited."""
    kept = [i for i, is_edited in enumerate(record["edited"]) if not is_edited]
    return [record["scores"][i] for i in kept], [record["rewards"][i] for i in kept]
