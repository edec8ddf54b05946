"""Rules of later papers, controls, and what the paper tried and did not adopt."""

from dataclasses import replace
from itertools import count, cycle
from random import Random
from types import SimpleNamespace

import pytest
import torch
from tiny import ENGINES, PAIRS, tiny_model, tiny_tokenizer

from minisr import InputError
from minisr.dpo import dpo_loss, encode_pairs
from minisr.pairs import select_pairs
from minisr.prompts import PromptConfig
from minisr.runner import config as runner_config
from minisr.runner import variants
from minisr.runner.config import Config, load_config
from minisr.runner.engine import Workspace, run_lm_class
from minisr.runner.files import read_json, read_jsonl
from minisr.runner.run import Run
from minisr.runner.steps import run_loop
from minisr.runner.variants import (
    add_agreement,
    agreement,
    best_and_next,
    dpo_variant,
    pair_rule,
    prompts_by_people,
    select_pairs_by_rule,
    shortest_and_longest,
    smoothed_dpo_loss,
    train_dpo_variant,
)


def chosen_and_rejected(responses, rewards, rho=0.0, anchor=None):
    [pair], _ = select_pairs_by_rule(["x"], [responses], [rewards], shortest_and_longest(rho), anchor and [anchor])
    return pair["chosen"], pair["rejected"]


def test_without_length_control_and_anchors_the_rule_is_the_papers():
    rng, texts = Random(0), ["a", "a", "bb", "ccc"]
    rewards = [[rng.choice([None, 0.0, 1.0, 2.0]) for _ in texts] for _ in range(300)]
    problem = [f"{i}" for i in range(300)], [rng.sample(texts, 4) for _ in range(300)], rewards
    pairs, counts = select_pairs_by_rule(*problem, shortest_and_longest(0.0))
    assert (pairs, counts) == select_pairs(*problem) and min(counts.values()) > 5


def test_length_control_chooses_the_shortest_of_the_nearly_best_and_rejects_the_longest_of_the_nearly_worst():
    # The range is 1 to 5; rho = 0.25 makes one point "nearly".
    texts, rewards = ["the best", "good", "bad!", "dreadful and long", "no"], [5.0, 4.0, 2.0, 1.0, 1.0]
    assert chosen_and_rejected(texts, rewards) == ("the best", "dreadful and long")
    assert chosen_and_rejected(texts, rewards, 0.25) == ("good", "dreadful and long")
    texts = ["the best", "good", "bad and longer than any", "dreadful and long", "no"]
    assert chosen_and_rejected(texts, rewards, 0.25) == ("good", "bad and longer than any")
    assert chosen_and_rejected(texts, rewards, 0.24) == ("the best", "dreadful and long")


def test_with_length_control_the_chosen_response_still_has_the_higher_reward():
    # With rho above one half, both sides reach across the middle.
    pairs, counts = select_pairs_by_rule(["x"], [["long one", "s"]], [[1.0, 5.0]], shortest_and_longest(1.0))
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("s", "long one")]
    pairs, counts = select_pairs_by_rule(["x"], [["long one", "s"]], [[5.0, 1.0]], shortest_and_longest(1.0))
    assert pairs == [] and counts["tie"] == 1


def test_an_anchor_is_rejected_where_it_is_worse_and_never_chosen():
    assert chosen_and_rejected(["a", "b"], [4.0, 3.0], anchor=(1.0, "old")) == ("a", "old")
    assert chosen_and_rejected(["a", "b"], [4.0, 3.0], anchor=(3.5, "old")) == ("a", "b")
    assert chosen_and_rejected(["a", "b"], [4.0, 3.0], anchor=(5.0, "old")) == ("a", "b")
    assert chosen_and_rejected(["a", "b"], [4.0, 3.0], anchor=(None, "old")) == ("a", "b")
    assert chosen_and_rejected(["a", "b"], [4.0, 4.0], anchor=(2.0, "old")) == ("a", "old")
    assert chosen_and_rejected(["a", "b"], [4.0, None], anchor=(2.0, "old")) == ("a", "old")
    rule = shortest_and_longest(0.0)
    pairs, counts = select_pairs_by_rule(["x"], [["a", "b"]], [[None, None]], rule, [(2.0, "old")])
    assert pairs == [] and counts["unread"] == 1
    pairs, counts = select_pairs_by_rule(["x"], [["a"]], [[1.0]], rule, [(5.0, "old")])
    assert pairs == [] and counts["tie"] == 1


def test_the_next_best_response_can_be_the_rejected_one():
    rewards = [[3, 5, 4, 1], [2, 2, 5, 5], [4, None, 4, 4], [None, 1, 2, None]]
    answers = [[f"{letter}{n}" for n in range(4)] for letter in "abcd"]
    pairs, counts = select_pairs_by_rule(list("wxyz"), answers, rewards, best_and_next)
    assert [(p["chosen"], p["rejected"], p["rejected_reward"]) for p in pairs] == [
        ("a1", "a2", 4), ("b2", "b0", 2), ("d2", "d1", 1)]
    assert counts == {"pairs": 3, "tie": 1, "unread": 0, "identical": 0}


@pytest.mark.parametrize("chosen, rejected, expected", [
    ([5, 5, 5], [1, 1, 1], 1.0), ([1], [5], 0.0), ([3], [3], 0.5), ([5, 3], [4, 2], 0.75),
    ([5, None], [4, None], 1.0), ([], [], 0.5), ([None], [3], 0.5)])
def test_agreement_is_how_often_single_judgements_prefer_the_chosen_response(chosen, rejected, expected):
    assert agreement(chosen, rejected) == expected


def test_smoothing_mixes_the_two_orders_of_a_pair():
    logps = [torch.tensor([value]) for value in (-3.0, -5.0, -4.0, -4.5)]
    right, flipped = (dpo_loss(a, b, c, d, 0.3)[0] for a, b, c, d in
                      (logps, [logps[1], logps[0], logps[3], logps[2]]))
    for eps in (0.0, 0.1, 0.5):
        smoothed = smoothed_dpo_loss(eps)(*logps, 0.3)[0]
        torch.testing.assert_close(smoothed, (1 - eps) * right + eps * flipped)


class StandIn(SimpleNamespace):
    """What train_dpo_variant reads of a model; StandIn(run, name) is another model of the same run."""

    def __init__(self, run, name):
        super().__init__(run=run, name=name, next_name="M3", lm=run.lms[name], config=run.config,
                         data=SimpleNamespace(eft=[]), successor=lambda name, lm: SimpleNamespace(name=name, lm=lm))


def random_m2(engine="plain", **dpo):
    """M2 with random weights, beside M1 with others, in a run whose config has these keys in [dpo]."""
    lms = {name: run_lm_class(engine)(tiny_model(seed=seed), tiny_tokenizer()) for seed, name in ((1, "M1"), (2, "M2"))}
    for lm in lms.values():
        lm.workspace = Workspace()
    config = Config(threads=1, dpo=runner_config.DPOConfig(batch_size=3, **dpo))
    return StandIn(SimpleNamespace(lms=lms, config=config), "M2")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_reference_can_be_another_model(engine, monkeypatch):
    model, seen = random_m2(engine, learning_rate=0.0, min_learning_rate=0.0, reference="M1"), []

    def loss(*logps):
        seen.append(logps)
        return dpo_loss(*logps)
    monkeypatch.setattr(variants, "dpo_loss", loss)
    trained = train_dpo_variant(model, PAIRS)
    encoded = encode_pairs(model.lm, PAIRS)
    with torch.no_grad():
        expected = [*model.lm.pair_logps(encoded), *model.run.lms["M1"].pair_logps(encoded)]
    [(*logps, _)] = seen
    for got, wanted in zip(logps, expected, strict=True):
        torch.testing.assert_close(got.detach().sort()[0], wanted.sort()[0])
    assert trained.name == "M3" and trained.lm is not model.lm


def test_without_a_variant_every_rule_is_the_papers():
    assert dpo_variant(random_m2()) is None and pair_rule(random_m2()) is None
    assert dpo_variant(random_m2(positives_only=True, reference="M1")) is variants.train_on_positives
    assert dpo_variant(random_m2(reference="M1")) is dpo_variant(random_m2(consistency=True)) is train_dpo_variant


@pytest.mark.parametrize("pairs, rule", [
    ({"length_control": 0.2}, variants.control_length), ({"rejected_from": "next"}, variants.reject_next_best),
    ({"rejected_from": "M1", "length_control": 0.2}, variants.reject_M1)])
def test_the_config_names_the_rule_of_pairs(pairs, rule):
    model = random_m2()
    model.config = replace(model.config, pairs=runner_config.PairConfig(**pairs))
    assert pair_rule(model) is rule
    model.name = "M1"  # its responses are not compared with its own
    assert pair_rule(model) is (variants.control_length if rule is variants.reject_M1 else rule)


@pytest.mark.parametrize("consistency, expected", [(True, 0.2), (False, None)])
def test_consistency_smooths_by_the_mean_disagreement(consistency, expected, monkeypatch):
    smoothed = []

    def record(smoothing):
        smoothed.append(smoothing)
        return smoothed_dpo_loss(smoothing)
    monkeypatch.setattr(variants, "smoothed_dpo_loss", record)
    pairs = [{**pair, "agreement": share} for pair, share in zip(PAIRS, (1.0, 0.8, 0.6))]
    train_dpo_variant(random_m2(consistency=consistency), pairs)
    assert smoothed == ([pytest.approx(expected)] if consistency else [])


def test_prompts_of_people_pass_the_same_filters_and_end():
    def made(texts, seeds):
        world = SimpleNamespace(requests=lambda rng: ((None, text) for text in texts))
        config = SimpleNamespace(prompts=PromptConfig(count=3, max_rouge_l=1.1))
        model = SimpleNamespace(run=SimpleNamespace(world=world), config=config, counts={},
                                data=SimpleNamespace(ift=[{"prompt": text} for text in seeds], held_out=set()),
                                seed=lambda purpose: 0)
        return prompts_by_people(model), model.counts["prompts"]
    texts = ["Tell me of a fox.", "Draw a fox and a bear.", "News", "Tell me of a bear.", "tell me of a bear"]
    accepted, counts = made(cycle(texts), ["Tell me of a fox."])
    assert accepted == ["Tell me of a bear."]
    assert counts == {"accepted": 1, "exact match": 4, "keyword": 2, "length": 2}  # 9 attempts, then no more
    accepted, counts = made((f"Tell me of fox {i}." for i in count()), [])
    assert len(accepted) == counts["accepted"] == 3


SMALL = """iterations = 2
device = "cpu"
threads = 1
seed_data = {ift = 8, ranked = 8, judge_evaluation = 2, evaluation = 4}
sft = {batch_size = 8, epochs = 1}
prompts = {count = 4, max_rouge_l = 1.0}
judge = {judgements = 2}
evaluate = {max_new_tokens = 16}
dpo = {batch_size = 4}
"""


def test_word_points_reward_the_words_that_a_judgement_finds(monkeypatch):
    prompt = "In one sentence, use the words knife, cut, board, soup."
    texts = ["knife: knife, 1. cut: cuts, 2. board: none, 2. soup: none, 2. Sentence: fine, 3.\nScore: 3",
             "knife: none, 0. cut: cuts, 1. board: none, 1. soup: soup, 2.",
             "soup: soup, 1. Sentence: fine, 2.\nScore: 2"]
    judged = {"prompt": prompt, "scores": [[3.0], [None], [2.0]], "judgements": [[text] for text in texts]}
    monkeypatch.setattr(variants, "judge_responses", lambda *arguments: [judged])
    model = SimpleNamespace(lm=None, seed=lambda purpose: 0, data=SimpleNamespace(judge_template=""), config=Config())
    y = [{"prompt": prompt, "responses": ["a", "b", "c"], "finished": [True, True, False]}]
    [record] = variants.judge_by_word_points(model, y)
    assert record["scores"] == [[2], [None], [1]] and record["rewards"] == [2.0, None, None]
    assert record["judgements"] == [[text] for text in texts]


def run(tmp_path, *changes):
    (tmp_path / "small.toml").write_text(SMALL)
    config = load_config(tmp_path / "small.toml", overrides=("judge.by=random", *changes))
    made = Run.open(tmp_path / "run", config)
    return run_loop(made)["models"], tmp_path / "run"


def test_a_run_on_positives_trains_m0_on_the_responses_of_full_score(tmp_path):
    models, folder = run(tmp_path, "dpo.positives_only=true", "judge.by=oracle", "iterations=1")
    meta = read_json(folder / "M2/meta.json", "meta")
    assert (meta["parent"], meta["made_by"]) == ("M0", "SFT")
    steps = [len(read_jsonl(folder / name / "train_log.jsonl", "log")) for name in ("M1", "M2")]
    y, r = (read_jsonl(folder / "M1" / f"{name}.jsonl", name) for name in ("responses", "rewards"))
    full = {(a["prompt"], text) for a, b in zip(y, r) for text, given in zip(a["responses"], b["rewards"])
            if given == 5}
    examples = 8 + len(read_jsonl(folder / "seed/eft.jsonl", "EFT"))
    assert steps == [-(-examples // 8), -(-(examples + len(full)) // 8)]
    assert models["M2"]["pairs"] == 0 and "pairs_right" not in models["M2"]


def test_without_eft_a_run_is_trained_on_instructions_alone(tmp_path):
    models, folder = run(tmp_path, 'seed_data.eft_by="none"', "dpo.replay_weight=0.0", "iterations=0")
    assert read_jsonl(folder / "seed/eft.jsonl", "EFT") == []
    logs = [read_jsonl(folder / name / "train_log.jsonl", "log") for name in ("SFT", "M1")]
    assert len(logs[0]) == len(logs[1]) == 1


def test_nothing_to_replay_is_an_error(tmp_path):
    with pytest.raises(InputError, match="nothing to replay"):
        run(tmp_path, 'seed_data.eft_by="none"', "dpo.replay_weight=0.5")


def test_only_the_tiny_world_has_people_who_write_prompts():
    config = Config(prompts=runner_config.PromptConfig(source="people"))
    object.__setattr__(config.seed_data, "source", "english")
    with pytest.raises(InputError, match='prompts.source = "people" needs seed_data.source = "world"'):
        Run("nowhere", config)


def test_the_agreement_of_a_text_that_was_sampled_twice_is_that_of_the_chosen_one():
    y = [{"prompt": "x", "responses": ["good", "good", "bad"]}]
    r = [{"rewards": [4.5, 2.0, 3.0], "scores": [[5, 4], [2, 2], [3, 3]]}]
    pair = {"prompt": "x", "chosen": "good", "rejected": "bad", "chosen_reward": 4.5, "rejected_reward": 3.0}
    assert add_agreement([pair], y, r)[0]["agreement"] == 1.0


def test_without_reasons_a_judgement_is_the_score_alone(tmp_path):
    _, folder = run(tmp_path, "seed_data.reasons=false", "iterations=0")
    assert {r["response"][:7] for r in read_jsonl(folder / "seed/eft.jsonl", "EFT")} == {"Score: "}


def test_m1s_responses_can_be_rejected_in_later_iterations(tmp_path):
    models, folder = run(tmp_path, "pairs.rejected_from=M1", "dpo.reference=M1", "dpo.consistency=true",
                         "prompts.source=people", "prompts.count=12", "judge.judgements=1")
    own = [text for record in read_jsonl(folder / "M2/responses.jsonl", "y") for text in record["responses"]]
    pairs = read_jsonl(folder / "M2/pairs.jsonl", "pairs")
    assert all(pair["chosen"] in own for pair in pairs)
    assert any(pair["rejected"] not in own for pair in pairs)  # a random judge sometimes gives it the lowest score
    for pair in pairs:  # one random judgement of each: the chosen one's is the higher
        assert pair["agreement"] == 1
    assert models["M3"]["pairs"] == len(pairs)
    assert 0 < models["M3"]["distinct"] <= 1
