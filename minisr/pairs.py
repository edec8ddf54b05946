"""{x_i, y_i^w, y_i^l}: for each prompt, the highest-scoring and the lowest-scoring response (section 2.3).

A prompt with fewer than two scored responses, or whose responses all score the same, is dropped and counted. An
unparsed judgement is missing data: it is never a number and never makes a response the rejected one.
"""

from collections import Counter
from operator import itemgetter


def select_pairs(prompts: list[str], responses: list[list[str]], rewards: list[list[float | None]]
                 ) -> tuple[list[dict], Counter]:
    """Preference pairs {prompt, chosen, rejected, chosen_reward, rejected_reward}, and counts by outcome.

    Counts: "pairs"; "unread" (fewer than two responses have a reward); "tie" (the highest reward equals the lowest);
    "identical" (chosen and rejected are the same text). Of several best or worst responses, the first is taken."""
    pairs, counts = [], Counter(pairs=0, unread=0, tie=0, identical=0)
    for x, ys, rs in zip(prompts, responses, rewards, strict=True):
        scored = [(r, y) for r, y in zip(rs, ys, strict=True) if r is not None]
        if len(scored) < 2:
            counts["unread"] += 1
            continue
        (r_w, y_w), (r_l, y_l) = max(scored, key=itemgetter(0)), min(scored, key=itemgetter(0))
        if r_w == r_l:
            counts["tie"] += 1
        elif y_w == y_l:
            counts["identical"] += 1
        else:
            counts["pairs"] += 1
            pairs.append({"prompt": x, "chosen": y_w, "rejected": y_l, "chosen_reward": r_w, "rejected_reward": r_l})
    return pairs, counts
