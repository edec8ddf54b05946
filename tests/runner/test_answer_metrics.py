"""Metrics of answers that the oracle scored."""

from types import SimpleNamespace

import pytest

from minisr.runner.evaluation import answer_metrics, reward_metrics
from minisr.runner.files import jsonl_bytes
from minisr.runner.storage import write_with_checksum
from minisr.worlds.catalog import WORLDS
from minisr.worlds.words.annotator import judgement
from minisr.worlds.words.oracle import examine
from minisr.worlds.words.requests import PHRASINGS, parse_request


def test_answer_metrics_by_hand():
    flawless, poor = [True] * 5, [True, False, False, True, False]
    metrics = answer_metrics([
        {"sampled": "abcd", "greedy": "x", "sampled_points": flawless, "greedy_points": poor},
        {"sampled": "ab", "greedy": "y", "sampled_points": poor, "greedy_points": poor},
    ])
    assert metrics["flawless"] == 0.5 and metrics["flawless_greedy"] == 0
    assert metrics["mean_score"] == 3.5 and metrics["mean_score_greedy"] == 2
    assert metrics["criteria"] == [1, 0.5, 0.5, 1, 0.5] and metrics["criteria_greedy"] == [1, 0, 0, 1, 0]
    assert metrics["length"] == 3
    assert metrics["mean_score_ci95"] == [2, 5] and metrics["flawless_greedy_ci95"] == [0, 0]


@pytest.mark.parametrize("by", ["self", "random"])
def test_rewards_of_a_models_own_responses_by_hand(tmp_path, by):
    prompt = PHRASINGS[0].format(words="knife, cut, board, soup")
    responses = ["She cuts soup on a board with a knife.",  # 5 points
                 "A knife, a cut, a board, and a soup.",  # 4
                 "The soup is on the table in here.",  # 2
                 "The soup is on the table in here, and"]  # cut off
    judgements = [[judgement(parse_request(prompt), examine(parse_request(prompt), text))] for text in responses]
    judgements[1] = [judgements[1][0].replace("a list", "fine")]
    rewards = [4.0, 5.0, 2.0, None]  # of the three pairs, the first has the wrong order
    other = {"prompt": "Who wrote Hamlet?", "responses": ["He."], "finished": [True], "logps": [None]}
    no_reward = {"prompt": "Who wrote Hamlet?", "rewards": [5.0], "scores": [[5.0]], "judgements": [["Score: 5"]]}
    write_with_checksum(tmp_path / "responses.jsonl", jsonl_bytes([other, {
        "prompt": prompt, "responses": responses, "finished": [True, True, True, False], "logps": [None] * 4}]))
    write_with_checksum(tmp_path / "rewards.jsonl", jsonl_bytes([no_reward, {
        "prompt": prompt, "rewards": rewards, "scores": [], "judgements": judgements}]))
    run = SimpleNamespace(world=WORLDS["words"], config=SimpleNamespace(judge=SimpleNamespace(by=by)))
    metrics = reward_metrics(run, tmp_path)
    points = {"words_right": 1.0, "form_right": 2 / 3, "false_sentences": 1.0} if by == "self" else {}
    assert metrics == {"mean": 11 / 3, "pairwise": 2 / 3, "pairwise_ci95": [2 / 3, 2 / 3], **points}
