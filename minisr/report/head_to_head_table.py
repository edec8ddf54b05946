"""The table of `minisr eval RUN --judge COMMAND`."""

HEADER = ("model", "against", "win %", "tie %", "lose %", "prompts", "unread")


def head_to_head_table(result: dict) -> str:
    """One row for each pair of models, each share with its 95 % interval."""
    rows = [HEADER]
    for contest in result["contests"]:
        shares = [share(contest, name) for name in ("win", "tie", "lose")]
        rows.append((contest["model"], contest["other"], *shares, str(contest["prompts"]), str(contest["unread"])))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def share(contest: dict, name: str) -> str:
    if name not in contest:
        return "-"
    low, high = (100 * bound for bound in contest[f"{name}_ci95"])
    return f"{100 * contest[name]:.0f} [{low:.0f}, {high:.0f}]"
