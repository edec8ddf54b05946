"""Faults put into the numeric core by hand, one at a time: the tests must tell of each.

    python tests/robustness/mutants.py [--only SUBSTRING] [--jobs 1] [--list]

Each mutant is a plausible mistake: a sign, a shift by one, a mean for a sum, a tie the other way. A test that
none of them makes fail guards little, and a mutant that no test kills shows what is unguarded. Package and
tests are copied, a mutant is put into the copy, and the test file named beside it runs until one test fails.
Ends with exit code 1 if a mutant survives or does not even run, or if the code no longer has, or has twice,
what it replaces.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 300  # seconds for the tests of one mutant

# By module and by the test file that must tell: what is wrong, what stands there once, what takes its place.
FAULTS = {
    ("model", "model"): [
        ("RoPE turns the other way", "torch.cat([-sin, sin], -1)", "torch.cat([sin, -sin], -1)"),
        ("RoPE frequencies an index too high", "torch.arange(0, D, 2,", "torch.arange(2, D + 2, 2,"),
        ("causal mask gone", "is_causal=True", "is_causal=False"),
        ("query head h looks at key head h mod G", "attention(q, k, v, is_causal=True, enable_gqa=True)",
         "attention(q, *(x.repeat(1, q.shape[1] // len(x[0]), 1, 1) for x in (k, v)), is_causal=True)"),
        ("feed-forward takes the norm of attention",
         "self.feed_forward(self.feed_forward_norm(x))", "self.feed_forward(self.attention_norm(x))"),
        ("initial weights of L, not 2 L writers",
         "math.sqrt(2 * model.config.n_layers)", "math.sqrt(model.config.n_layers)")],
    ("model", "interop"): [
        ("Llama 3 scaling keeps the slow, slows the fast",
         "(keep + (1 - keep) / factor)", "(1 - keep + keep / factor)")],
    ("model", "dpo"): [
        ("tied head is a copy, without the embedding's gradient", "self.head.weight = self.embed.weight",
         "self.head.weight = nn.Parameter(self.embed.weight.detach().clone())")],
    ("fast/lean", "model"): [
        ("RoPE swaps neighbours, not halves", "x.roll(x.shape[-1] // 2, -1)",
         "x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)")],
    ("fast/lean", "lean"): [
        ("RoPE's gradient turns as RoPE does", "turn(grad, cos, sin, -1)", "turn(grad, cos, sin)"),
        ("RMSNorm without eps", "keepdim=True) + eps)", "keepdim=True))"),
        ("RMSNorm of the sum", "x.float().square().mean(", "x.float().square().sum("),
        ("RMSNorm's gradient: sign of the second term", "value=-1)", "value=1)"),
        ("RMSNorm's gradient: not divided by C", "r**3 / x.shape[-1]", "r**3"),
        ("RMSNorm's weight gradient without r", "r.reshape(1, -1) @", "r.reshape(1, -1).sign() @"),
        ("SwiGLU gates with up", "F.linear(F.silu(gate) * up,", "F.linear(F.silu(up) * gate,"),
        ("SwiGLU's gradient for up: gate without silu",
         "torch.mul(inner, silu, out=for_up)", "torch.mul(inner, gate, out=for_up)"),
        ("SwiGLU's gradient for down without up", "silu.mul_(up)", "silu")],
    ("fast/cache", "step"): [
        ("attention divided by D, not its root", "alpha=q.shape[-1]**-0.5", "alpha=1 / q.shape[-1]")],
    ("fast/cache", "model"): [
        ("positions count the padding", "self.seen[:, None] - before +", "self.seen[:, None] +"),
        ("positions go on one too early", "self.seen = self.seen + new", "self.seen = self.seen + new - 1"),
        ("first token after the padding is hidden",
         "(columns < self.pad[:, None])[:, None]  # (B, T, S)", "(columns <= self.pad[:, None])[:, None]"),
        ("padding of what rows share is seen", "self.bias[rows, :1] == 0", "self.bias[rows, :1] <= 0"),
        ("a row's children count another's tokens",
         "self.seen = self.seen[rows // width]", "self.seen = self.seen[rows % len(self.seen)]"),
        ("a row that stays takes a leaver's position", "= self.seen[rows], self.pad[rows], self.bias[rows]",
         "= self.seen[:len(rows)], self.pad[rows], self.bias[rows]")],
    ("fast/step", "step"): [
        ("a step turns by the position before", "self.cos[cache.seen]", "self.cos[cache.seen - 1]"),
        ("a step's eps is not scaled by C",
         "self.scale * model.config.norm_eps**0.5", "model.config.norm_eps**0.5"),
        ("a large product forgets the stream", "else onto + y", "else y")],
    ("sampler", "sampler"): [
        ("temperature multiplies",
         "logits.float() / max(temperature, 1e-30)", "logits.float() * max(temperature, 1e-30)"),
        ("top-p lets in the token at the boundary", ".sum(-1) >= top_p", ".sum(-1) > top_p"),
        ("top-p leaves out the token that crosses p", "above = probs > probs", "above = probs >= probs"),
        ("a second try takes the next token's number", "step * 64 + attempt", "step * 64 + 64 * attempt"),
        ("a sample's key is its place in the wave",
         "for i in numbers for", "for i in range(len(numbers)) for"),
        ("only the first stop token ends a response", "if token in stop)", "if token == stop[0])"),
        ("the end token is cut off", "Sample(row[:end + 1], True", "Sample(row[:end], True"),
        ("log p goes on after the second stop token", "ends[list(stop)] = True", "ends[stop[0]] = True"),
        ("log p without the end token",
         "torch.where(alive, said,", "torch.where(alive & ~ends[drawn], said,"),
        ("log p at the temperature",
         "- logits.logsumexp(1)", "- (logits / config.temperature).logsumexp(1)")],
    ("rng", "sampler"): [
        ("responses n and n + 1 of neighbours share numbers",
         "prompt * 0x8CB92BA72F3D8DD7 + n * 0xD1B54A32D192ED03", "(prompt + n) * 0x8CB92BA72F3D8DD7"),
        ("shift of a negative number keeps its sign", "(x >> bits) & (2 ** (64 - bits) - 1)", "x >> bits")],
    ("tokenizer", "sft"): [
        ("prompt tokens are trained", "[False] * len(prompt_ids)", "[True] * len(prompt_ids)"),
        ("responses have no end",
         "[*self.encode(response + self._after_response), self.eos_id]",
         "self.encode(response + self._after_response)")],
    ("sft", "sft"): [
        ("padding is trained", "mask + [False] *", "mask + [True] *"),
        ("a state predicts its own token", "F.pad(counts, (0, 1))", "F.pad(counts, (1, 0))"),
        ("micro-batches count alike, whatever their tokens", "model.device)) / targets",
         "model.device)) / sum(sum(m[1:]) for _, m in part) * len(part) / len(batch)")],
    ("train", "sft"): [
        ("warm-up begins at 0", "(step + 1) / warmup", "step / warmup"),
        ("cosine begins with the warm-up", "(step - warmup) / (steps - warmup)", "step / steps"),
        ("norms decay", '{"params": others, "weight_decay": 0.0}',
         '{"params": others, "weight_decay": config.weight_decay}'),
        ("AdamW's betas change places", "AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95)",
         "AdamW(groups, lr=config.learning_rate, betas=(0.95, 0.9)"),
        ("Muon takes the embedding", 'name.startswith("blocks.") and p.dim() == 2', "p.dim() == 2"),
        ("Muon takes q, k, v for one matrix", "part_rows(name, shape) or len(p)", "len(p)"),
        ("Muon's steps are not AdamW's size", '"match_rms_adamw"', '"original"'),
        ("gradients of all steps add up",
         "for p in masters.values():\n        p.grad = None", "for p in ():\n        p.grad = None"),
        ("no float32 masters for bfloat16",
         "{name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()", "{name: p"),
        ("masters keep the last micro-batch's gradient alone",
         "grad if masters[name].grad is None else masters[name].grad + grad", "grad")],
    ("dpo", "dpo"): [
        ("the rejected is preferred",
         "losses = -F.logsigmoid(chosen - rejected)", "losses = -F.logsigmoid(rejected - chosen)"),
        ("beta weighs the policy alone", "beta * (policy_rejected_logps - reference_rejected_logps)",
         "beta * policy_rejected_logps - reference_rejected_logps"),
        ("log p of a response is the mean",
         "(logps * mask[:, 1:]).sum(-1)", "(logps * mask[:, 1:]).sum(-1) / mask[:, 1:].sum(-1)"),
        ("logits stand for their own token", "logits[:, :-1].float()", "logits[:, 1:].float()"),
        ("response mask a token too late", "(logps * mask[:, 1:])", "(logps * mask[:, :-1])"),
        ("log p of a packed response is the mean",
         'segment_reduce(logps, "sum"', 'segment_reduce(logps, "mean"'),
        ("the rejected's positions follow the chosen's",
         "(column - rejected * lengths[:, 1:2])[there]", "column.expand(there.shape)[there]"),
        ("the rejected sees the chosen", "& ~apart)", "& (apart | ~apart))"),
        ("the chosen's end predicts the rejected",
         "place - 1 - (first * lengths[:, 1:2])[there]", "place - 1")],
    ("dpo", "variants"): [
        ("smoothing adds without taking away", "(1 - smoothing) * losses", "losses"),
        ("smoothing by agreement", "smoothing = 1 - sum(", "smoothing = sum(")],
    ("dpo", "train_dpo"): [
        ("the reference learns too", "dpo_loss(chosen, rejected, ref_chosen[part], ref_rejected[part],",
         "dpo_loss(chosen, rejected, *reference_logps(model, [encoded[i] for i in part], 1),"),
        ("the reference has dropout", "    model.eval()\n    order", "    order"),
        ("a pair meets another's reference", "logps[:, batch] =", "logps[:, i:i + len(batch)] ="),
        ("NLL of the whole response, not a token", "-chosen / packed.sizes[0::2]", "-chosen"),
        ("replay in full, whatever its share", "yield config.replay * loss", "yield loss"),
        ("micro-batches of pairs weigh in full", "nll).sum() / len(batch)", "nll).sum() / len(part)")],
    ("judge", "judge"): [
        ("the first score is read", "for s in reversed(scores)", "for s in scores"),
        ("a score of 0 is unread", "if 0 <= s <= MAX_SCORE", "if 0 < s <= MAX_SCORE"),
        ("a judgement that was cut off is read",
         "parse_score(text) if s.finished else None", "parse_score(text)"),
        ("a reward is rounded", "sum(scores) / len(scores) if", "round(sum(scores) / len(scores)) if"),
        ("an unread judgement counts as 0",
         "sum(scores) / len(scores) if", "sum(scores) / len(judgements) if")],
    ("pairs", "pairs"): [
        ("an unread response is the worst", "[(r, y) for r, y in zip(rs, ys, strict=True) if r is not None]",
         "[(r or 0.0, y) for r, y in zip(rs, ys, strict=True)]"),
        ("a reward of 0 is none", "strict=True) if r is not None]", "strict=True) if r]"),
        ("equal rewards make a pair", "if best[0] <= worst[0]:", "if best[0] < worst[0]:"),
        ("the last of the best is chosen",
         "best = min((ry for ry in read if", "best = min((ry for ry in read[::-1] if"),
        ("the last of the worst is rejected",
         "for ry in read + anchor if", "for ry in (read + anchor)[::-1] if")],
    ("pairs", "variants"): [
        ("judgements that tie agree", "(a > b) + (a == b) / 2", "(a >= b)")],
    ("runner/stages", "loop"): [
        ("a response that was cut off has a reward", "[reward(j) if done else None for", "[reward(j) for"),
        ("every model is trained from M0", "model, tokenizer = load_model(self.folder,",
         'model, tokenizer = load_model(self.run.folder / "M0",'),
        ("M2 draws M1's random numbers",
         "return self.run.key(self.name, purpose)", "return self.run.key(purpose)"),
        ("log p of other tokens than DPO will train",
         "s.logp if exact and again == s.ids else None", "s.logp if exact else None"),
        ("a response that DPO cannot hold is chosen", "s.finished and fits,", "s.finished,")],
    ("evaluate", "evaluate"): [
        ("a tie is won", "difference == sign for", "difference >= sign for"),
        ("the interval holds 90 %",
         "values[picks].mean(axis=1), (0.025, 0.975)", "values[picks].mean(axis=1), (0.05, 0.95)"),
        ("the pairwise interval weighs instructions alike",
         "hits[picks].sum(1) / sizes[picks].sum(1)", "(hits[picks] / sizes[picks]).mean(1)"),
        ("equal values share the lowest rank", "((v[:, None] == v).sum(1) + 1) / 2", "1"),
        ("Kendall's tau without signs", "np.sign(v[:, None] - v)", "(v[:, None] - v)"),
        ("a judge's tie is right", " and model[i] != model[j]\n", "\n"),
        ("five-best: best is a 5", "[h == max(human) for", "[h == 5 for")],
    ("runner/seed_data", "own_data"): [
        ("one pair in order is enough for EFT", "and all(agree)]", "and any(agree)]"),
        ("EFT keeps the last round in order", "right[0])]", "right[-1])]")],
    ("runner/metrics", "loop"): [
        ("win rates are the other model's", "win_rates(_scores(own), _scores(answers[other]))",
         "win_rates(_scores(answers[other]), _scores(own))")],
    ("prompts", "prompts"): [
        ("ROUGE-L is the recall",
         "2 * lcs[:, -1] / (np.array(self.lengths) + len(text))", "lcs[:, -1] / np.array(self.lengths)")],
    ("runner/resume", "resume"): [
        ("random state is not restored", 'torch.set_rng_state(stored["random"][0])', "pass"),
        ("optimizers begin anew", "optimizer.load_state_dict(state)", "pass"),
        ("another training's state is taken", 'found["made_from"] != self.made_from or ', ""),
        ("another journal's waves are taken", "_hash(self.made_from + content)", "_hash(content)")],
    ("train", "resume"): [
        ("a step is skipped on going on",
         "range(len(log), len(batches))", "range(len(log) + bool(log), len(batches))")],
    ("sampler", "resume"): [
        ("every wave is kept as the first", "journal.add(drawn, key, start)", "journal.add(drawn, key, 0)")],
}


class Mutant(NamedTuple):
    """One fault of minisr/MODULE.py, which tests/test_TEST.py must tell."""

    module: str
    test: str
    fault: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.module}.py: {self.fault}"


MUTANTS = [Mutant(*where, *row) for where, rows in FAULTS.items() for row in rows]


def main() -> int | str:
    options = _options()
    chosen = [mutant for mutant in MUTANTS if options.only in str(mutant)]
    if not chosen:
        return f"no mutant has {options.only!r} in its name"
    if options.list:
        print(*chosen, sep="\n")
        return 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        copies = [copied(Path(folder) / str(number)) for number in range(options.jobs)]
        if found := first_failure(copies[0], {mutant.test for mutant in chosen}):
            return f"the tests fail without any mutant: {found}"

        def killed(mutant):
            copy = copies.pop()
            verdict = verdict_on(mutant, copy)
            copies.append(copy)
            print(f"{str(mutant):70}{verdict}", flush=True)
            return verdict.startswith("killed")
        count = sum(pool.map(killed, chosen))
    seconds = time.perf_counter() - start
    print(f"{len(chosen)} mutants: {count} killed, {len(chosen) - count} not; {seconds:.0f} s")
    return int(count < len(chosen))


def _options():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help='part of their names, e.g. dpo.py')
    parser.add_argument("--jobs", type=int, default=1, help="mutants tested side by side, one thread each")
    parser.add_argument("--list", action="store_true", help="name the mutants and run nothing")
    return parser.parse_args()


def copied(folder: Path) -> Path:
    """A copy of what the tests need."""
    for name in ("minisr", "tests", "tiny_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def verdict_on(mutant: Mutant, copy: Path) -> str:
    """What the tests say of a mutant in a copy, which is whole again afterwards."""
    path = copy / "minisr" / f"{mutant.module}.py"
    code = path.read_text(encoding="utf-8")
    if (times := code.count(mutant.old)) != 1:
        return f"STALE: {mutant.old!r} stands there {times} times"
    path.write_text(code.replace(mutant.old, mutant.new), encoding="utf-8")
    found = first_failure(copy, {mutant.test})
    path.write_text(code, encoding="utf-8")
    if "::" in found:
        return f"killed by {found}"
    return f"BROKEN: {found}" if found else "SURVIVED"


def first_failure(copy: Path, tests: set[str]) -> str:
    """The first test of these files that fails, "" if none does; or why they could not be run to an end."""
    # No bytecode: of two mutants of one length, written within a second, Python would run the first twice.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1",
                                "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
               *(str(next(copy.glob(f"tests/*/test_{name}.py"))) for name in sorted(tests))]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True,
                              timeout=LONGEST * len(tests))
    except subprocess.TimeoutExpired:
        return f"not at an end after {LONGEST} s"
    failed = re.search(r"^(?:FAILED|ERROR) (tests/\S+?::\w+)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return failed[1]
    return done.returncode and f"pytest ended with code {done.returncode}: {done.stdout[-200:]!r}" or ""


if __name__ == "__main__":
    sys.exit(main())
