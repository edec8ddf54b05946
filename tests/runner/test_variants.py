"""What the experiments change: rules of later papers, and what the paper tried and left."""

from itertools import cycle

import pytest
import torch
from tiny import PAIRS, tiny_model, tiny_tokenizer

from minisr import InputError, dpo
from minisr.dpo import DPOConfig, dpo_loss, known_logps, train_dpo
from minisr.loop import run_loop
from minisr.pairs import agreement, select_pairs
from minisr.prompts import PromptConfig, prompts_of_people
from minisr.runner.config import Config, load_config
from minisr.runner.files import read_json, read_jsonl
from minisr.runner.run import Run


def chosen_and_rejected(responses, rewards, rho=0.0, anchor=None):
    [pair], _ = select_pairs(["x"], [responses], [rewards], rho, anchor and [anchor])
    return pair["chosen"], pair["rejected"]


def test_length_control_takes_the_short_among_the_nearly_best_and_the_long_among_the_nearly_worst():
    # The range is 1 to 5; rho = 0.25 makes one point "nearly".
    texts, rewards = ["the best", "good", "bad!", "dreadful and long", "no"], [5.0, 4.0, 2.0, 1.0, 1.0]
    assert chosen_and_rejected(texts, rewards) == ("the best", "dreadful and long")
    assert chosen_and_rejected(texts, rewards, 0.25) == ("good", "dreadful and long")
    texts = ["the best", "good", "bad and longer than any", "dreadful and long", "no"]
    assert chosen_and_rejected(texts, rewards, 0.25) == ("good", "bad and longer than any")
    assert chosen_and_rejected(texts, rewards, 0.24) == ("the best", "dreadful and long")


def test_with_length_control_a_pair_still_prefers_something():
    # A rho above one half lets both sides reach across the middle.
    pairs, counts = select_pairs(["x"], [["long one", "s"]], [[1.0, 5.0]], 1.0)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("s", "long one")]
    pairs, counts = select_pairs(["x"], [["long one", "s"]], [[5.0, 1.0]], 1.0)
    assert pairs == [] and counts["tie"] == 1


def test_an_anchor_is_rejected_where_it_is_worse_and_never_chosen():
    assert chosen_and_rejected(["a", "b"], [4.0, 3.0], anchor=(1.0, "old")) == ("a", "old")
    assert chosen_and_rejected(["a", "b"], [4.0, 3.0], anchor=(3.5, "old")) == ("a", "b")
    assert chosen_and_rejected(["a", "b"], [4.0, 3.0], anchor=(5.0, "old")) == ("a", "b")
    assert chosen_and_rejected(["a", "b"], [4.0, 3.0], anchor=(None, "old")) == ("a", "b")
    assert chosen_and_rejected(["a", "b"], [4.0, 4.0], anchor=(2.0, "old")) == ("a", "old")
    assert chosen_and_rejected(["a", "b"], [4.0, None], anchor=(2.0, "old")) == ("a", "old")
    pairs, counts = select_pairs(["x"], [["a", "b"]], [[None, None]], anchors=[(2.0, "old")])
    assert pairs == [] and counts["unread"] == 1
    pairs, counts = select_pairs(["x"], [["a"]], [[1.0]], anchors=[(5.0, "old")])
    assert pairs == [] and counts["tie"] == 1


def test_the_next_below_the_best_can_be_the_rejected_one():
    rewards = [[3, 5, 4, 1], [2, 2, 5, 5], [4, None, 4, 4], [None, 1, 2, None]]
    answers = [[f"{letter}{n}" for n in range(4)] for letter in "abcd"]
    pairs, counts = select_pairs(list("wxyz"), answers, rewards, next_best=True)
    assert [(p["chosen"], p["rejected"], p["rejected_reward"]) for p in pairs] == [
        ("a1", "a2", 4), ("b2", "b0", 2), ("d2", "d1", 1)]
    assert counts == {"pairs": 3, "tie": 1, "unread": 0, "identical": 0}


@pytest.mark.parametrize("chosen, rejected, expected", [
    ([5, 5, 5], [1, 1, 1], 1.0), ([1], [5], 0.0), ([3], [3], 0.5), ([5, 3], [4, 2], 0.75),
    ([5, None], [4, None], 1.0), ([], [], 0.5), ([None], [3], 0.5)])
def test_agreement_is_the_share_of_judgements_that_order_a_pair_so(chosen, rejected, expected):
    assert agreement(chosen, rejected) == expected


def test_smoothing_mixes_the_two_orders_of_a_pair():
    logps = [torch.tensor([value]) for value in (-3.0, -5.0, -4.0, -4.5)]
    right, flipped = (dpo_loss(a, b, c, d, 0.3)[0] for a, b, c, d in
                      (logps, [logps[1], logps[0], logps[3], logps[2]]))
    for eps in (0.0, 0.1, 0.5):
        smoothed = dpo_loss(*logps, 0.3, eps)[0]
        torch.testing.assert_close(smoothed, (1 - eps) * right + eps * flipped)


def test_smoothing_is_trls():
    pytest.importorskip("trl")
    policy, reference = torch.randn(2, 5), torch.randn(2, 5)
    ours = dpo_loss(*policy, *reference, 0.2, 0.15)[0]
    # TRL's formula for label_smoothing (loss_type "sigmoid"), by its documentation.
    logits = (policy[0] - policy[1]) - (reference[0] - reference[1])
    log_sigmoid = torch.nn.functional.logsigmoid
    torch.testing.assert_close(ours, -log_sigmoid(0.2 * logits) * 0.85 - log_sigmoid(-0.2 * logits) * 0.15)


def test_the_reference_can_be_another_model(monkeypatch):
    # With every log-probability known, none is computed, and the loss at the start is not log 2.
    policy, other = tiny_model(seed=0), tiny_model(seed=1)
    known = known_logps(other, tiny_tokenizer(), PAIRS, 2)
    assert len(known) == 6
    monkeypatch.setattr(dpo, "reference_logps", lambda *_: pytest.fail("computed again"))
    seen = []
    monkeypatch.setattr(dpo, "dpo_loss", lambda *a, **k: seen.append(a) or dpo_loss(*a, **k))
    config = DPOConfig(batch_size=3, learning_rate=0.0, final_learning_rate=0.0)
    train_dpo(policy, tiny_tokenizer(), PAIRS, [], config, 0, "test", None, known)
    encoded = dpo.encode_pairs(tiny_tokenizer(), PAIRS, 96)
    monkeypatch.undo()
    expected = torch.stack(dpo.reference_logps(other, encoded, 3))
    got = torch.stack([seen[0][2], seen[0][3]])
    torch.testing.assert_close(got.sort(1)[0], expected.sort(1)[0])


def test_consistency_smooths_by_the_mean_disagreement(monkeypatch):
    told = []
    monkeypatch.setattr(dpo, "dpo_loss", lambda *a: told.append(a[5]) or dpo_loss(*a))
    pairs = [{**pair, "agreement": share} for pair, share in zip(PAIRS, (1.0, 0.8, 0.6))]
    for consistency in (True, False):
        config = DPOConfig(batch_size=3, consistency=consistency)
        train_dpo(tiny_model(), tiny_tokenizer(), pairs, [], config, 0, "test")
    assert told == [pytest.approx(0.2), 0.0]


def test_prompts_of_people_pass_the_same_filters_and_end():
    config = PromptConfig(count=3, rouge=1.1)
    texts = ["Tell me of a fox.", "Draw a fox and a bear.", "News", "Tell me of a bear.", "tell me of a bear"]
    made, counts = prompts_of_people(cycle(texts), ["Tell me of a fox."], set(), config)
    assert made == ["Tell me of a bear."]
    assert counts == {"accepted": 1, "exact match": 4, "keyword": 2, "length": 2}  # 9 attempts, then no more
    made, _ = prompts_of_people(iter(f"Tell me of fox {i}." for i in range(99)), [], set(), config)
    assert len(made) == 3


SMALL = """iterations = 2
device = "cpu"
threads = 1
seed_data = {ift = 8, ranked = 8, judge_evaluation = 2, evaluation = 4}
sft = {batch_size = 8, epochs = 1}
prompts = {count = 4, rouge = 1.1}
judge = {judgements = 2}
dpo = {batch_size = 4}
"""


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
    assert models["M2"]["pairs"] >= 0


def test_a_run_without_eft_learns_from_instructions_alone(tmp_path):
    models, folder = run(tmp_path, 'seed_data.eft_by="none"', "dpo.replay=0.0", "iterations=0")
    assert read_jsonl(folder / "seed/eft.jsonl", "EFT") == []
    logs = [read_jsonl(folder / name / "train_log.jsonl", "log") for name in ("SFT", "M1")]
    assert len(logs[0]) == len(logs[1]) == 1


def test_nothing_to_replay_is_told(tmp_path):
    with pytest.raises(InputError, match="nothing to replay"):
        run(tmp_path, 'seed_data.eft_by="none"', "dpo.replay=0.5")


def test_people_outside_the_world_write_no_prompts():
    config = Config(prompts=PromptConfig(written_by="people"))
    object.__setattr__(config.seed_data, "source", "english")
    with pytest.raises(InputError, match="needs the tiny world"):
        Run("nowhere", config)


def test_judgements_without_reasons_are_the_score_alone(tmp_path):
    _, folder = run(tmp_path, "seed_data.reasons=false", "iterations=0")
    assert {r["response"][:7] for r in read_jsonl(folder / "seed/eft.jsonl", "EFT")} == {"Score: "}


def test_m1s_answers_stand_against_those_of_later_models(tmp_path):
    models, folder = run(tmp_path, "pairs.rejected_from=M1", "dpo.reference=M1", "prompts.written_by=people",
                         "prompts.count=12", "judge.judgements=1")
    own = [text for record in read_jsonl(folder / "M2/responses.jsonl", "y") for text in record["responses"]]
    pairs = read_jsonl(folder / "M2/pairs.jsonl", "pairs")
    assert all(pair["chosen"] in own for pair in pairs)
    assert any(pair["rejected"] not in own for pair in pairs)  # a random judge likes it least now and then
    for pair in pairs:  # one random judgement of each: the chosen one's is the higher
        assert pair["agreement"] == 1
    assert models["M3"]["pairs"] == len(pairs)
    assert 0 < models["M3"]["distinct"] <= 1
