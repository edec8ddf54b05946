"""{x_i, y_i^w, y_i^l}: of each prompt the response judged best and the one judged worst (section 2.3).

What carries no preference is dropped and counted: an unread judgement is no number and never
makes a response the rejected one, and equal rewards prefer nothing.
"""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class PairConfig:
    """Other rules than this paper's, best against worst."""

    length_control: float = 0.0  # rho: prefer the short among the nearly best (Meta-Rewarding)
    # "M1": its answer is the rejected one where it is worse (Temporal SR); "next": the next below the best
    rejected_from: str = "self"


def select_pairs(prompts: list[str], responses: list[list[str]], rewards: list[list[float | None]],
                 length_control: float = 0.0, anchors: list[tuple[float | None, str]] | None = None,
                 next_best: bool = False) -> tuple[list[dict], Counter]:
    """Preference pairs {prompt, chosen, rejected, chosen_reward, rejected_reward}, and counts.

    Counts: "pairs", "unread" (fewer than two responses with a reward), "tie" (highest equals
    lowest), "identical" (the same text was judged twice, differently). Among several equally
    good or equally bad responses the first is taken. `anchors`, a (reward, response) for each
    prompt, can be rejected but not chosen. next_best: rejected is the best of those below the chosen."""
    pairs, counts = [], Counter(pairs=0, unread=0, tie=0, identical=0)
    for i, (x, ys, rs) in enumerate(zip(prompts, responses, rewards, strict=True)):
        read = [(r, y) for r, y in zip(rs, ys, strict=True) if r is not None]
        anchor = [anchors[i]] if anchors and anchors[i][0] is not None else []
        if not read or len(read + anchor) < 2:
            counts["unread"] += 1
            continue
        best, worst = best_and_worst(read, anchor, length_control)
        if next_best:
            worst = max((ry for ry in read if ry[0] < best[0]), key=lambda ry: ry[0], default=worst)
        if best[0] <= worst[0]:
            counts["tie"] += 1
        elif best[1] == worst[1]:
            counts["identical"] += 1
        else:
            counts["pairs"] += 1
            pairs.append({"prompt": x, "chosen": best[1], "rejected": worst[1],
                          "chosen_reward": best[0], "rejected_reward": worst[0]})
    return pairs, counts


def best_and_worst(read: list[tuple[float, str]], anchor: list[tuple[float, str]], rho: float):
    """The (reward, response) to choose and to reject.

    With rho: the shortest of those within a share rho of the whole range below the highest reward, and the
    longest of those within it above the lowest (Wu et al., 2024, Meta-Rewarding)."""
    top, bottom = max(read)[0], min(read + anchor)[0]
    span = rho * (top - bottom)

    def length(reward_and_response):
        return len(reward_and_response[1]) if rho else 0
    best = min((ry for ry in read if ry[0] >= top - span), key=length)  # the first of equal ones
    worst = max((ry for ry in read + anchor if ry[0] <= bottom + span), key=length)
    return best, worst


def agreement(chosen: list[float | None], rejected: list[float | None]) -> float:
    """How often one judgement of the chosen response lies above one of the rejected (ties half): 0 to 1.

    The consistency of CREAM (Wang et al., 2024), there between two successive models' rankings, here
    between the J judgements, which are there anyway."""
    marks = [(a > b) + (a == b) / 2 for a in chosen for b in rejected if None not in (a, b)]
    return sum(marks) / len(marks) if marks else 0.5
