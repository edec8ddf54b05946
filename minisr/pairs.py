"""{x_i, y_i^w, y_i^l}: of each prompt the response judged best and the one judged worst (section 2.3).

What carries no preference is dropped and counted: an unread judgement is no number and never
makes a response the rejected one, and equal rewards prefer nothing.
"""

from collections import Counter


def select_pairs(prompts: list[str], responses: list[list[str]],
                 rewards: list[list[float | None]]) -> tuple[list[dict], Counter]:
    """Preference pairs {prompt, chosen, rejected, chosen_reward, rejected_reward}, and counts.

    Counts: "pairs", "unread" (fewer than two responses with a reward), "tie" (highest equals
    lowest), "identical" (the same text was judged twice, differently). Among several equally
    good or equally bad responses the first is taken."""
    pairs, counts = [], Counter(pairs=0, unread=0, tie=0, identical=0)
    for x, ys, rs in zip(prompts, responses, rewards, strict=True):
        read = [(r, y) for r, y in zip(rs, ys, strict=True) if r is not None]
        if len(read) < 2:
            counts["unread"] += 1
            continue
        best = max(read, key=lambda ry: ry[0])  # the first of equal ones
        worst = min(read, key=lambda ry: ry[0])
        if best[0] == worst[0]:
            counts["tie"] += 1
        elif best[1] == worst[1]:
            counts["identical"] += 1
        else:
            counts["pairs"] += 1
            pairs.append({"prompt": x, "chosen": best[1], "rejected": worst[1],
                          "chosen_reward": best[0], "rejected_reward": worst[0]})
    return pairs, counts
