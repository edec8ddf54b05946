"""Bugs inserted into the code by hand, one at a time (mutants): the tests must detect each.

    python tests/robustness/mutants.py [--only SUBSTRING] [--jobs 1] [--list]

Each mutant is a plausible mistake: a sign, a shift by one, a mean in place of a sum, a tie decided the other way. A
mutant that no test detects shows what is not tested. Package and tests are copied, one mutant is put into the copy, and
the test file named beside it runs until one test fails. Ends with exit code 1 if a mutant survives, if the tests of one
cannot be run, or if the text that a mutant replaces does not occur exactly once.
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
TIMEOUT = 300  # seconds for the tests of one mutant

# By module, and by the test file that must detect the fault: its name, the text that occurs once, its replacement.
FAULTS = {
    ("model", "model"): [
        ("RoPE rotates the other way", "torch.cat([-second, first], dim=-1)", "torch.cat([second, -first], dim=-1)"),
        ("RoPE pairs neighbors, not halves", "first, second = x.chunk(2, dim=-1)",
         "first, second = x[..., ::2], x[..., 1::2]"),
        ("RoPE frequencies an index too high", "torch.arange(0, config.head_dim, 2,",
         "torch.arange(2, config.head_dim + 2, 2,"),
        ("keys are not rotated", "q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)",
         "q = apply_rope(q, cos, sin)"),
        ("no causal mask", "((keys < queries) &", "((keys != queries) &"),
        ("padding is attended to", "((keys < queries) & attention_mask[:, None])", "(keys < queries)[None]"),
        ("positions begin again at each call", ".clamp(min=0)[:, -T:]", ".clamp(min=0)[:, :T]"),
        ("the cache grows by one token a call", "cache.length += T", "cache.length += 1"),
        ("query head h uses key head h mod G",
         "F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)",
         "F.scaled_dot_product_attention(q, *(x.repeat(1, H // G, 1, 1) for x in (k, v)), attn_mask=mask)"),
        ("feed-forward uses the norm of attention",
         "self.feed_forward(self.feed_forward_norm(x))", "self.feed_forward(self.attention_norm(x))"),
        ("RMSNorm without eps", "keepdim=True) + self.eps)", "keepdim=True))"),
        ("RMSNorm of the sum", "wide.square().mean(-1", "wide.square().sum(-1"),
        ("SwiGLU gates with up", "F.silu(gate) * up", "F.silu(up) * gate")],
    ("model", "interop"): [
        ("Llama 3 scaling keeps the slow, slows the fast",
         "(smooth + (1 - smooth) / factor)", "(1 - smooth + smooth / factor)"),
        ("linear scaling speeds up", "frequencies / config.rope_scaling[0]", "frequencies * config.rope_scaling[0]")],
    ("interop/hf", "interop"): [
        ("shards before a single file", '("model.safetensors", "model.safetensors.index.json",',
         '("model.safetensors.index.json", "model.safetensors",'),
        ("a tied head may differ", "    stored[HEAD] = head\n    return replace(config, tie_embeddings=False)",
         "    return config"),
        ("a head that equals the embedding is untied", "if same_values(head, stored.setdefault(EMBEDDING, head)):",
         "if stored.setdefault(EMBEDDING, head) is head:")],
    ("interop/hf", "chat_ids"): [
        ("a special token that only the settings name is split", "if added == before:", "if True:"),
        ("a token without an id is spelled", "if missing := sorted(", "if missing := set() and sorted("),
        ("LlamaTokenizer adds no spaces of its own", "if not is_llama_tokenizer(settings):", "if True:")],
    ("interop/names", "interop"): [
        ("rope_parameters before rope_scaling", 'dict(get("rope_scaling") or get("rope_parameters") or {})',
         'dict(get("rope_parameters") or get("rope_scaling") or {})'),
        ("theta outside before theta inside", 'if rope.get("rope_theta") is None:',
         'if rope.get("rope_theta") is None or get("rope_theta"):'),
        ("a Mistral has Llama's defaults", "hf_config = MISTRAL_DEFAULTS | hf_config", "pass")],
    ("interop/gguf", "gguf"): [
        ("no scaling by the older key", 'keys.get("rope.scale_linear", 0)', "0"),
        ("scaling of type none scales", 'keys.get("rope.scaling.type") == "none" or ', ""),
        ("unknown keys are ignored", "if keys[name])", "if False)"),
        ("a text has a BOS token although the file says no",
         'if metadata.get("tokenizer.ggml.add_bos_token", True) else trainer.unk_id', "if True else trainer.unk_id"),
        ("a template's bos_token is empty", "_token_id\", defaults.get(name))", "_token_id\")"),
        ("smaug takes whole words", "ignore_merges=family in LLAMA3)", "ignore_merges=True)")],
    ("model", "dpo"): [
        ("tied head is a copy, without the embedding's gradient", "self.head.weight = self.embed.weight",
         "self.head.weight = nn.Parameter(self.embed.weight.detach().clone())")],
    ("sampler", "sampler"): [
        ("padding on the right", "[[0] * (T - len(row)) + row for row in rows]",
         "[row + [0] * (T - len(row)) for row in rows]"),
        ("the first token counts as padding", ">= (T - lengths)[:, None]", "> (T - lengths)[:, None]"),
        ("prefill without a mask",
         "model.hidden_states(ids, cache, attention_mask)", "model.hidden_states(ids, cache)"),
        ("decoding without a mask", "model(drawn[:, None], cache, attention_mask)", "model(drawn[:, None], cache)"),
        ("temperature multiplies",
         "upcast(logits) / max(temperature, 1e-30)", "upcast(logits) * max(temperature, 1e-30)"),
        ("top-p includes the token at the boundary", "mass_before >= top_p", "mass_before > top_p"),
        ("top-p excludes the token that crosses p", "mass_before >= top_p", "mass_before + descending >= top_p"),
        ("top-p excludes its least probable token", "(probs >= min_prob)", "(probs > min_prob)"),
        ("every attempt uses the same number", "MAX_ATTEMPTS * step + attempt)", "MAX_ATTEMPTS * step)"),
        ("an attempt uses the next token's number", "MAX_ATTEMPTS * step + attempt)", "step + attempt)"),
        ("seeds of samples and prompts change places", "seeds = seeds.flatten()", "seeds = seeds.T.flatten()"),
        ("only the first stop token ends a response", "if token in stop_ids:", "if token == stop_ids[0]:"),
        ("the stop token is cut off", "Completion(ids[:position + 1], finished=True)",
         "Completion(ids[:position], finished=True)"),
        ("a response that was cut off is finished",
         "Completion(ids, finished=False)", "Completion(ids, finished=True)"),
        ("a row runs into the room of others", "cut_at_stop(row[:limit], stop_ids)", "cut_at_stop(row, stop_ids)"),
        ("sampling ends with the first finished row", "if finished.all():", "if finished.any():")],
    ("lm", "sampler"): [
        ("a sample's seed is its place in the batch", "seeds[batch], config, stop_ids)",
         "seeds[:len(batch)], config, stop_ids)"),
        ("results are in the order of lengths", "[results[i] for i in range(len(prompts))]", "[*results.values()]")],
    ("lm", "lm"): [
        ("a copy shares its weights", "clone.model = copy.deepcopy(self.model)", "clone.model = self.model"),
        ("a frozen copy can be trained", "clone.model.eval().requires_grad_(False)", "clone.model.eval()"),
        ("a response that training cannot hold is finished", "append(completion.finished and fits)",
         "append(completion.finished)"),
        ("a response without its end is finished", "append(completion.finished and fits)", "append(fits)")],
    ("lm", "loop"): [
        ("log p of other tokens than DPO trains",
         "completion.logp if response_ids == completion.ids else None", "completion.logp")],
    ("lm", "sft"): [
        ("the loss is a mean over sequences", "-sequence_logprobs(self.model(ids), ids, mask).sum()",
         "-sequence_logprobs(self.model(ids), ids, mask).mean()")],
    ("lm", "dpo"): [
        ("chosen and rejected change places", "right_pad(chosen + rejected,", "right_pad(rejected + chosen,")],
    ("rng", "rng"): [
        ("samples of neighboring prompts share numbers",
         "(i * np.uint64(0x8CB92BA72F3D8DD7) + j * np.uint64(0xD1B54A32D192ED03))",
         "((i + j) * np.uint64(0x8CB92BA72F3D8DD7))"),
        ("the counter begins at 0", "(counter + 1) * GOLDEN_GAMMA", "counter * GOLDEN_GAMMA"),
        ("half of the range", "(x >> np.uint64(40))", "(x >> np.uint64(41))")],
    ("tokenizer", "tokenizer"): [
        ("prompt tokens are targets", "[False] * len(prompt_ids)", "[True] * len(prompt_ids)"),
        ("responses have no end token", "[*ids[len(before):], self.eos_id]", "ids[len(before):]"),
        ("a response is encoded as a text of its own",
         "for text_before in (self._text_before_response, ", "for text_before in ("),
        ("a token spans prompt and response", "if ids[:len(before)] == before:", "if True:"),
        ("the space before a response is part of the prompt", 'before.rstrip(" ")', "before"),
        ("a prompt makes special tokens", "beginning, *parts = self._special.split(self._before_response)",
         'beginning, *parts = self._special.split(self._before_response.replace("{prompt}", prompt))'),
        ("only the template's end token ends a response", "(self.eos_id, *sorted({*stop_ids} - {self.eos_id}))",
         "(self.eos_id,)"),
        ("a response keeps the template's text", ".removesuffix(self._after_response)", "")],
    ("sft", "sft"): [
        ("padding is trained", "example.mask + [False] *", "example.mask + [True] *"),
        ("micro-batches count alike, whatever their tokens", "lm.target_loss(part) / targets",
         "lm.target_loss(part) / sum(sum(e.mask[1:]) for e in part) * len(part) / len(batch)"),
        ("M0 itself is trained", "trained = lm.copy()", "trained = lm")],
    ("train", "train"): [
        ("warm-up begins at 0", "(step + 1) / warmup", "step / warmup"),
        ("cosine begins with the warm-up", "(step - warmup) / (steps - warmup)", "step / steps"),
        ("norms decay", '{"params": others, "weight_decay": 0.0}',
         '{"params": others, "weight_decay": config.weight_decay}'),
        ("AdamW's betas change places", "betas=(0.9, 0.95)", "betas=(0.95, 0.9)"),
        ("gradients of all steps add up", "    optimizer.step()\n    optimizer.zero_grad()", "    optimizer.step()"),
        ("gradients are never clipped", "max_grad_norm or math.inf", "math.inf"),
        ("a loss that is not finite changes the weights", "if not torch.isfinite(norm):", "if False:"),
        ("the learning rate stays", 'group["lr"] = rate', "pass"),
        ("dropout stays on", "    model.eval()\n    return log", "    return log"),
        ("the last micro-batch is left out", "batch[i:i + size] for i in range(0, len(batch), size)",
         "batch[i:i + size] for i in range(0, len(batch) - size + 1, size)"),
        ("the last batch of an epoch is left out", "order[i:i + size] for i in range(0, len(order), size)",
         "order[i:i + size] for i in range(0, len(order) - size + 1, size)")],
    ("dpo", "dpo"): [
        ("the rejected response is preferred", "-F.logsigmoid(chosen - rejected)", "-F.logsigmoid(rejected - chosen)"),
        ("beta scales the policy alone", "beta * (policy_rejected_logps - reference_rejected_logps)",
         "beta * policy_rejected_logps - reference_rejected_logps"),
        ("log p of a response is the mean",
         "(token_logps * mask[:, 1:]).sum(-1)", "(token_logps * mask[:, 1:]).sum(-1) / mask[:, 1:].sum(-1)"),
        ("logits predict their own token", "upcast(logits[:, :-1])", "upcast(logits[:, 1:])"),
        ("response mask a token too late", "(token_logps * mask[:, 1:])", "(token_logps * mask[:, :-1])"),
        ("rewards carry a gradient", "chosen.detach(), rejected.detach()", "chosen, rejected")],
    ("dpo", "train_dpo"): [
        ("the reference is trained too", "reference = lm.frozen_copy()", "reference = policy"),
        ("M_t itself is trained", "policy = lm.copy()", "policy = lm"),
        ("chosen and rejected of the reference change places", "reference_chosen, reference_rejected = reference",
         "reference_rejected, reference_chosen = reference"),
        ("NLL of the whole response, not per token",
         "nll = -chosen / torch.tensor([len(pair.chosen) for pair in part], device=chosen.device)", "nll = -chosen"),
        ("replay in full, whatever its weight", "train_config, config.replay_weight)", "train_config)"),
        ("micro-batches of pairs count in full", "nll).sum() / batch_size,", "nll).sum() / len(part),")],
    ("dpo", "variants"): [
        ("another loss is ignored", "reward_w, reward_l = preference_loss(", "reward_w, reward_l = dpo_loss(")],
    ("judge", "vectors"): [
        ("one of several keys is the score", "<= 1 else KEY", "<= 99 else KEY")],
    ("judge", "judge"): [
        ("the first score counts", 'float(scores[-1]["number"]) if', 'float(scores[0]["number"]) if'),
        ("a score of 0 is unparsed", 'if 0 <= float(match["number"])', 'if 0 < float(match["number"])'),
        ("a later total is ignored", " if scores and not AFTER.search(text, scores[-1].end())",
         " if scores"),
        ("a comment may hold numbers", r"[^\d\n%十百])*+", r"[^\n%十百])*+"),
        ("a mark stands anywhere", r"(?:^|[.!?;:,…)\]>|。！？；：，–—•→]|(?<!\S)-){OPENING}", "{OPENING}"),
        ("a judgement holds the template's text", "lm.tokenizer.decode_response(completion.ids) for",
         "lm.tokenizer.decode(completion.ids) for"),
        ("a judgement that was cut off is parsed",
         "parse_score(t) if c.finished else None", "parse_score(t)"),
        ("a reward is rounded", "sum(scores) / len(scores) if", "round(sum(scores) / len(scores)) if"),
        ("an unparsed judgement counts as 0", "sum(scores) / len(scores) if", "sum(scores) / len(judgements) if"),
        ("a response that was cut off has a reward", "[reward(js) if done else None for", "[reward(js) for"),
        ("a judge prompt that fills the context is sampled", "if len(ids) < lm.max_seq_len]",
         "if len(ids) <= lm.max_seq_len]"),
        ("a closing tag in capitals closes the frame", r'r"(?i)</\s', r'r"</\s'),
        ("a field spelled in a prompt is filled",
         r're.sub(r"\{prompt\}|\{response\}", lambda field: values[field[0]], template)',
         'template.replace("{prompt}", prompt).replace("{response}", response)')],
    ("pairs", "pairs"): [
        ("an unparsed response is the worst", "[(r, y) for r, y in zip(rs, ys, strict=True) if r is not None]",
         "[(r or 0.0, y) for r, y in zip(rs, ys, strict=True)]"),
        ("a reward of 0 is none", "strict=True) if r is not None]", "strict=True) if r]"),
        ("one scored response suffices", "if len(scored) < 2:", "if len(scored) < 1:"),
        ("equal rewards make a pair", "if r_w == r_l:", "if False:"),
        ("a text is preferred to itself", "elif y_w == y_l:", "elif False:"),
        ("the last of the best is chosen", "max(scored, key=itemgetter(0))", "max(scored[::-1], key=itemgetter(0))"),
        ("the last of the worst is rejected", "min(scored, key=itemgetter(0))",
         "min(scored[::-1], key=itemgetter(0))")],
    ("prompts", "prompts"): [
        ("ROUGE-L is the recall", "and 2 * lcs_length(words, other) / total >=",
         "and lcs_length(words, other) / len(other) >="),
        ("similar only above the threshold", "lcs_length(words, other) / total >= threshold",
         "lcs_length(words, other) / total > threshold"),
        ("a shortcut skips similar prompts", "and 2 * sum(", "and sum("),
        ("the bound by length skips similar prompts", "return (2 * min", "return (min"),
        ("the bound counts a repeated word once", "sum(map(unique.__contains__, other))", "len(unique & set(other))"),
        ("marks split words", ' or unicodedata.category(c)[0] == "M"', ""),
        ("a Chinese sentence is one word", r'r" \g<0> "', r'r"\g<0>"'),
        ("texts composed otherwise differ", 'unicodedata.normalize("NFKC", text)', "text"),
        ("joiners split words", 're.sub(IGNORED, "", text)', "text"),
        ("common subsequences lose a word", "max(previous[j + 1], row[j])", "max(previous[j], row[j])"),
        ("an evaluation prompt passes in other case", "if text in self.held_out_texts",
         "if prompt in self.held_out_texts"),
        ("keywords inside of words", 'f" {normalize(keyword)} " in f" {text} "', "normalize(keyword) in text"),
        ("a prompt that was cut off is accepted", "if not finished:", "if False:"),
        ("a prompt goes on after its line", "stop_ids = (*lm.tokenizer.newline_ids, *lm.tokenizer.stop_ids)",
         "stop_ids = lm.tokenizer.stop_ids")],
    ("evaluate", "evaluate"): [
        ("a tie is won", "mean(list(signs == sign))", "mean(list(signs >= sign))"),
        ("the interval holds 90 %", "(0.025, 0.975)", "(0.05, 0.95)"),
        ("the pairwise interval weighs instructions alike",
         "sums[picks].sum(1) / sizes[picks].sum(1)", "(sums[picks] / sizes[picks]).mean(1)"),
        ("equal values share the lowest rank", "((v[:, None] == v).sum(1) + 1) / 2", "1"),
        ("Kendall's tau without signs", "np.sign(v[:, None] - v)", "(v[:, None] - v)"),
        ("a judge's tie is right", " and model[i] != model[j]\n", "\n"),
        ("an annotator's tie counts", "if human[i] == human[j]:", "if False:"),
        ("five-best: best is a 5", "[h == max(human) for", "[h == MAX_SCORE for")],
    ("loop", "self_reward"): [
        ("M1 learns no judging", "M0.data.ift + M0.data.eft", "M0.data.ift"),
        ("every iteration begins with M1", "        M_t = self_reward(M_t, keep)\n        yield M_t",
         "        yield self_reward(M_t, keep)")],
    ("loop", "loop"): [
        ("M2 uses M1's random numbers", "derive_seed(self.config.seed, self.name, purpose)",
         "derive_seed(self.config.seed, purpose)")],
    ("fast/forward", "prefix_cache"): [
        ("grouped heads use each other's mask", "mask.repeat(1, 1, H // G, 1)", "mask.repeat_interleave(H // G, 2)")],
    ("fast/forward", "decode_step"): [
        ("attention divided by D, not its root", "alpha=q.shape[-1]**-0.5", "alpha=1 / q.shape[-1]"),
        ("RoPE rotates the other way", "torch.cat([-first, second]", "torch.cat([first, -second]")],
    ("fast/cache", "prefix_cache"): [
        ("positions count the padding", "self.seq_lens[:, None] - pad_to_come +", "self.seq_lens[:, None] +"),
        ("positions continue one too early", "self.seq_lens = self.seq_lens + T\n",
         "self.seq_lens = self.seq_lens + T - 1\n"),
        ("the first token after the padding is hidden", "(columns >= self.left_pad[:, None])",
         "(columns > self.left_pad[:, None])"),
        ("padding of a shared prefix is attended to", "self.bias[rows, :1] == 0", "self.bias[rows, :1] <= 0"),
        ("a row's samples count another's tokens", "self.seq_lens = self.seq_lens[rows // n]",
         "self.seq_lens = self.seq_lens[rows % len(self.seq_lens)]"),
        ("a row that stays takes a leaver's position",
         "= self.seq_lens[rows], self.left_pad[rows], self.bias[rows]",
         "= self.seq_lens[:len(rows)], self.left_pad[rows], self.bias[rows]"),
        ("a row that stays takes a leaver's keys", "= old[:, rows, :, :self.n_columns]",
         "= old[:, :len(rows), :, :self.n_columns]"),
        ("padding holds memory that was never written", "self.v[:, :, :, :self.max_left_pad] = 0", "pass"),
        ("rows of one prefix share a slot", "prefix.slot[rows // n] * n + rows % n", "prefix.slot[rows // n] * n"),
        ("a dropped prefix moves rows to other slots", "self.slot = prefix * self.slots_per_prefix + place",
         "self.slot = prefix * self.slots_per_prefix")],
    ("fast/decode_step", "decode_step"): [
        ("a step rotates by the position before", "self.cos[cache.seq_lens]", "self.cos[cache.seq_lens - 1]"),
        ("a step's eps is not scaled by C",
         "self.scale * model.config.norm_eps**0.5", "model.config.norm_eps**0.5"),
        ("a large product loses the residual", "else residual + y", "else y")],
    ("fast/sampler", "fast_sampler"): [
        ("top-p includes the token at the boundary",
         "more_probable).sum(-1) >= top_p", "more_probable).sum(-1) > top_p"),
        ("top-p excludes the token that crosses p", "more_probable = probs > probs", "more_probable = probs >= probs"),
        ("a second attempt uses the next token's number",
         "MAX_ATTEMPTS * step + attempt", "MAX_ATTEMPTS * (step + attempt)"),
        ("a row that stays uses a leaver's numbers",
         "uniforms = uniforms[:, keep]", "uniforms = uniforms[:, :len(keep)]"),
        ("log p without the end token",
         "torch.where(alive, token_logps", "torch.where(alive & ~is_stop[drawn], token_logps"),
        ("log p continues after the end", "torch.where(alive, token_logps, 0.0)", "token_logps"),
        ("log p at the temperature", "upcast(logits).logsumexp(1)",
         "(upcast(logits) / config.temperature).logsumexp(1)"),
        ("a row takes another's room", "len(prompts[row // n])", "len(prompts[row % len(prompts)])")],
    ("fast/cuda_graphs", "cuda_graphs"): [
        ("log p goes on after the end", "logps.masked_fill(batch.alive.logical_not(), 0.0)", "logps"),
        ("dummies take the attempts of others", "probs, drawn, top_p) & alive", "probs, drawn, top_p)"),
        ("no second attempt", "for number in numbers[1:]:", "for number in numbers[:0]:"),
        ("rows move without their keys", "layer[:fewer, :, :columns] = layer[order, :, :columns]", "pass"),
        ("rows move without their prefixes", "            prefix.compact(order)", "            pass"),
        ("a batch begins with the last one's columns", "for x in (self.n_columns, self.logps,",
         "for x in (self.logps,"),
        ("a batch begins with the last one's log p", "for x in (self.n_columns, self.logps,",
         "for x in (self.n_columns,"),
        ("the last batch's prefixes are seen", "self.bias.fill_(-torch.inf)[:A, :, :, :S] = prefix.bias",
         "self.bias[:A, :, :, :S] = prefix.bias")],
    ("fast/rng", "fast_rng"): [
        ("the shift of a negative number keeps its sign", "(x >> bits) & (2 ** (64 - bits) - 1)", "x >> bits"),
        ("first numbers of steps overlap", "(MAX_ATTEMPTS * step + 1) * GOLDEN_GAMMA", "(step + 1) * GOLDEN_GAMMA")],
    ("fast/losses", "fast_losses"): [
        ("a state predicts its own token", "F.pad(is_target, (0, 1))", "F.pad(is_target, (1, 0))"),
        ("log p of a packed response is the mean", 'segment_reduce(logps, "sum"', 'segment_reduce(logps, "mean"'),
        ("chosen and rejected change places", "return sums[0::2], sums[1::2]", "return sums[1::2], sums[0::2]"),
        ("the rejected's positions follow the chosen's",
         "(column - is_rejected * chosen_lengths)[is_token]", "column.expand(is_token.shape)[is_token]"),
        ("the rejected sees the chosen", "& ~hidden)", "& (hidden | ~hidden))"),
        ("the chosen's end predicts the rejected",
         "index - 1 - (is_first_rejected * chosen_lengths)[is_token]", "index - 1")],
    ("fast/lm", "fast_lm"): [
        ("records survive a training", "self.recorded = {}  #", "#"),
        ("copies share their records", "clone.recorded = dict(self.recorded)", "clone.recorded = self.recorded"),
        ("a frozen copy computes what is recorded", "clone.frozen = True", "clone.frozen = False"),
        ("the rejected has the chosen's record", "self.record(pair.prompt, pair.rejected, rejected)",
         "self.record(pair.prompt, pair.rejected, chosen)"),
        ("judgements are recorded", "isinstance(config, ResponseConfig) and is_exact", "is_exact"),
        ("bfloat16 is recorded", "isinstance(config, ResponseConfig) and is_exact",
         "isinstance(config, ResponseConfig)")],
    ("fast/master_weights", "master_weights"): [
        ("masters keep the last micro-batch's gradient alone",
         "master.grad += p.grad", "master.grad = p.grad.float()"),
        ("the model's gradient adds up too", "            p.grad = None", "            pass"),
        ("updates do not reach the model", "p.copy_(masters[name])", "pass"),
        ("masters are bfloat16", "p.detach().float()", "p.detach().clone()")],
    ("runner/engine", "resume"): [
        ("every batch is stored as the first", "journal.add(results[number], *key, number)",
         "journal.add(results[number], *key, 0)"),
        ("every batch is restored from the first", "journal.get(*key, number)", "journal.get(*key, 0)"),
        ("what failed in a lack of memory is added",
         "            optimizer.zero_grad()\n            self.model.zero_grad()\n",
         ""),
        ("a halved batch loses a prompt", "first, second = batch[:middle], batch[middle:]",
         "first, second = batch[:middle], batch[middle + 1:]")],
    ("runner/training", "resume"): [
        ("a step is skipped on resuming", "range(len(self.log), len(self.batches))",
         "range(len(self.log) + bool(self.log), len(self.batches))"),
        ("every step drops the same units", "derive_seed(self.dropout_seed, step)", "self.dropout_seed"),
        ("another micro-batch loses the state", "batches, deciding_values(self.config))", "batches, self.config)")],
    ("runner/engine", "shared_work"): [
        ("every process computes every batch", "range(processes.rank(), len(batches), processes.size())",
         "range(len(batches))"),
        ("a batch is dealt twice", "range(processes.rank(), len(batches), processes.size())",
         "range(processes.rank(), len(batches), max(1, processes.size() - 1))"),
        ("the last batch is never dealt", "range(processes.rank(), len(batches), processes.size())",
         "range(processes.rank(), len(batches) - 1, processes.size())"),
        ("a finished batch is computed again", "if results[number] is None:", "if True:"),
        ("metrics of the other processes are dropped", "total_metrics([metrics for metrics, _ in gathered])",
         "total_metrics([gradient.metrics])"),
        ("one process alone halves the micro-batch", "if not any(failed for _, failed in gathered):",
         "if gradient.error is None:")],
    ("runner/gradients", "resume"): [
        ("dropout differs after a lack of memory", "torch.manual_seed(derive_seed(self.seed, index))", "pass"),
        ("every micro-batch drops the same units", "derive_seed(self.seed, index)", "derive_seed(self.seed)")],
    ("runner/gradients", "shared_work"): [
        ("a process sends all of its gradients added up", "            for gradient in gradients:\n"
         "                total += gradient\n", "            total += sum(gradients)\n"),
        ("the sum so far is not added", "processes.receive(total, owners[position - 1])", "pass"),
        ("the last process keeps the total", "processes.broadcast(total, owners[-1])", "pass"),
        ("process 0 sends the total", "processes.broadcast(total, owners[-1])", "processes.broadcast(total, 0)"),
        ("a micro-batch begins with the last one's gradient", "        self.optimizer.zero_grad()\n", ""),
        ("every step allocates its buffers", "BUFFERS.setdefault(optimizer, [])", "[]"),
        ("all gradients share a buffer", "return self.buffers[number]", "return self.buffers[0]")],
    ("runner/journal", "shared_work"): [
        ("a process reads its own journal alone", "for written in journal_files(path):\n            self.read(written)",
         "for written in [self.path] * self.path.exists():\n            self.read(written)"),
        ("all processes write one journal", 'path if processes.is_main() else path.with_name(f"{path.name}.{'
         'processes.rank()}")', "path"),
        ("the journals of other processes stay",
         "in journal_files(path):\n            written.unlink", "in [path]:\n            written.unlink")],
    ("runner/processes", "shared_work"): [
        ("a signal stops one process alone", "any(gather(flag))", "flag"),
        ("every process is the main one", "return rank() == 0", "return True")],
    ("runner/processes", "processes"): [
        ("a long value is cut off", "if max(lengths) > SMALL_BYTES:", "if False:"),
        ("a long value has process 0's length", "gather_bytes(data, max(lengths))", "gather_bytes(data, lengths[0])")],
    ("runner/files", "shared_work"): [
        ("process 1 writes too", "if not (each_process or processes.is_main()):", "if False:")],
    ("runner/launcher", "launcher"): [
        ("the exit code is lost", "        return report(failed, workers, interrupted=bool(stop_signals))",
         "        report(failed, workers, interrupted=bool(stop_signals))\n        return 0"),
        ("the others are not ended", "self.process.kill()", "pass"),
        ("who lost another process is to blame", "(worker.process.returncode == EXIT_CODE_LOST, worker.rank)",
         "worker.rank"),
        ("a signal reaches process 0 alone", "received.append(number)\n        for worker in workers:",
         "received.append(number)\n        for worker in workers[:1]:")],
    ("runner/journal", "resume"): [
        ("the optimizer begins anew", 'optimizer.load_state_dict(stored["optimizer"])', "pass"),
        ("master weights are not restored", "parameter.copy_(value)", "pass"),
        ("another training's state is used", 'found["made_from"] != self.fingerprint or ', ""),
        ("a damaged state is used", ' or file_digest(path) != found["hash"]', ""),
        ("another journal's batches are used", "short_hash(self.fingerprint + content)", "short_hash(content)")],
    ("runner/resumable", "resumable"): [
        ("any key may change", "return name in FREE or name", "return True or name"),
        ("no rows may change", '"rows", "timeout")', '"timeout")'),
        ("dropout is overlooked", 'getattr(part, "dropout", 0)', "False"),
        ("another precision is overlooked", 'values["dtype"] = dtype_name(config)', "pass"),
        ("earlier changes are forgotten", "[*records, {", "[{")],
    ("runner/run", "resumable"): [
        ("changes are not recorded", "if old and (changes", "if not old and (changes"),
        ("fewer iterations are accepted", "if new.iterations < old.iterations:", "if False:"),
        ("other threads lose the journal", "deciding_values(replace(self.config, iterations=0))",
         "to_toml(replace(self.config, iterations=0))")],
    ("runner/steps", "resumable"): [
        ("a journal is used for other batches", "self.run.batch_rows, *inputs)", "*inputs)")],
    ("runner/storage", "resume"): [
        ("a checksum is not compared", "recorded is not None and recorded != file_digest(path)", "False")],
    ("runner/steps", "keep"): [
        ("a finished step is taken again", "if processes.value_of_main(model.has_stored(name)):", "if False:"),
        ("results of other inputs are used", "        check_inputs(path, inputs)\n", "        pass\n"),
        ("a model of other pairs is used", '.get("trained_on", trained_on) != trained_on', ' is None'),
        ("the time before an interruption is lost", "timing.get(name, 0) + time", "time"),
        ("a finished training is repeated", 'if processes.value_of_main((trained.folder / "meta.json").exists()):',
         "if False:"),
        ("a journal is used for other inputs", "self.run.batch_rows, *inputs)", "self.run.batch_rows)"),
        ("a journal is used for other weights",
         'f"{name}.journal", model_hash(self.folder), *', 'f"{name}.journal", *'),
        ("a finished step's journal stays", 'remove_journals(model.folder / f"{name}.journal")', "pass"),
        ("each process decides whether a step is finished",
         "processes.value_of_main(model.has_stored(name))", "model.has_stored(name)"),
        ("each process decides whether a training is finished",
         'processes.value_of_main((trained.folder / "meta.json").exists())', '(trained.folder / "meta.json").exists()'),
        ("records are read before process 0 has written them",
         "    processes.wait_for_all()\n    remove_journals(", "    remove_journals(")],
    ("runner/steps", "loop"): [
        ("every model is M0", "self._lm = self.run.load_lm(self.name)", 'self._lm = self.run.load_lm("M0")')],
    ("runner/steps", "variants"): [
        ("positives are said to be trained from M_t",
         'model if step.__name__ == "train_sft" or not by_sft else StoredModel(model.run, "M0")', "model")],
    ("runner/variants", "variants"): [
        ("smoothing adds without taking away", "(1 - smoothing) * right", "right"),
        ("smoothing by agreement", "smoothed_dpo_loss(1 - sum(", "smoothed_dpo_loss(sum("),
        ("judgements that tie agree", "(a > b) + (a == b) / 2", "(a >= b)"),
        ("an anchor is chosen", "rule(scored, scored + anchor)", "rule(scored + anchor, scored + anchor)"),
        ("an anchor is never rejected", "rule(scored, scored + anchor)", "rule(scored, scored)"),
        ("length control chooses the long", "min(nearly_best, key=length)", "max(nearly_best, key=length)"),
        ("length control rejects the short", "max(nearly_worst, key=length)", "min(nearly_worst, key=length)"),
        ("length control: a share of the reward, not of the range", "rho * (top - bottom)", "rho * top"),
        ("the next best is as good as the best", "if s[0] < best[0]]", "if s[0] <= best[0]]"),
        ("the next best is the worst", "max(below, key=itemgetter(0), default=worst)",
         "min(below, key=itemgetter(0), default=worst)"),
        ("the reference is always M_t", "reference_lm.frozen_copy()", "model.lm.frozen_copy()"),
        ("agreement without the responses themselves", "anchor_y + y, anchor_r + r", "anchor_y, anchor_r"),
        ("a good response counts as positive", "if given == MAX_SCORE}", "if given}")],
    ("runner/variants", "loop"): [
        ("the random judge never gives 0", "rng.randint(0, MAX_SCORE)", "rng.randint(1, MAX_SCORE)"),
        ("the judge is always M_t",
         'lm = model.lm if model.name == "M1" else type(model)(model.run, "M1").lm', "lm = model.lm"),
        ("a recorded log p belongs to another response", 'zip(record["responses"], record["logps"])',
         'zip(record["responses"], record["logps"][::-1])')],
    ("runner/evaluation", "loop"): [
        ("a model that was moved away is finished", 'if (path.parent / name / "meta.json").exists()', "if True"),
        ("win rates are the other model's", "win_rates(_scores(own), _scores(answers[others[0]]))",
         "win_rates(_scores(answers[others[0]]), _scores(own))")],
    ("runner/evaluation", "command"): [
        ("an outside judge is not measured", "    if by_command:\n", "    if False:\n"),
        ("an outside judge is asked again for each model", 'if model.name == "SFT" or', "if True or"),
        ("its judgements of other responses count", "return records if asked == ranked else []", "return records")],
    ("runner/command", "command"): [
        ("finished batches are forgotten", "workspace.share(ask_batch,", "type(workspace)().share(ask_batch,"),
        ("every batch's records are numbered from 1", "numbered[0][0], read_answer)", "1, read_answer)"),
        ("a score of 10 is taken", "is_number and 0 <= score <= MAX_SCORE", "is_number"),
        ("lines are missing", "if code or unanswered:", "if code:"),
        ("an exit code is ignored", "if code or unanswered:", "if unanswered:"),
        ("one judgement in place of J", "for x, y in zip(prompts, responses) for j in range(J)]",
         "for x, y in zip(prompts, responses) for j in [0]]"),
        ("an answer to another record is taken", "if texts(answer) in map(texts, records):", "if False:"),
        ("of two scores the last counts", ", object_pairs_hook=unique_keys", ""),
        ("the program outlives the run", "os.killpg(self.process.pid, signal.SIGKILL)", "os.getpid()")],
    ("runner/head_to_head", "command"): [
        ("wins and losses change places", '("a", "b"): 1, ("b", "a"): -1', '("a", "b"): -1, ("b", "a"): 1'),
        ("one order decides", ".get((first, second), 0)", ".get((first, second), 1)"),
        ("no verdict is a tie", "if None in (first, second):", "if False:"),
        ("one order is asked twice", '"response_a": b, "response_b": a}]', '"response_a": a, "response_b": b}]')],
    ("runner/judge_prompt", "judge_template"): [
        ("a scale of 10 is accepted", "> MAX_SCORE:", "== 99:"),
        ("a template without a score line is accepted", "if not SCORE_LINE.search(template):", "if False:"),
        ("JSON is accepted", "if JSON_SCORE.search(template):", "if False:")],
    ("runner/seed_data", "own_data"): [
        ("one pair in order is enough for EFT", "if correct and all(correct):", "if correct and any(correct):"),
        ("a round that ranks nothing agrees", "if correct and all(correct):", "if all(correct):"),
        ("EFT takes the last round in order", "for one_round in zip(*judgements):",
         "for one_round in reversed([*zip(*judgements)]):"),
        ("a judged prompt that is also held out is trained on", "reject_held_out(held_out + judge_evaluation,",
         "reject_held_out(held_out,"),
        ("an instruction whose judged prompt is held out is trained on", "reject_held_out(prompts + judge_evaluation,",
         "reject_held_out(prompts,"),
        ("the judgements of training are held out", "judge_evaluation = fitting[n_train:]",
         "judge_evaluation = fitting[:n_train]")],
    ("runner/experiment", "experiment"): [
        ("runs of another config are reported", "check_resumable(stored, keep_stored_paths(stored, config, run), run)",
         "pass")],
    ("runner/reuse", "experiment"): [
        ("the base's seconds are counted for a step made again", "                forget_time(path)\n", ""),
        ("another judge keeps the rewards", '"judge.by": "rewards"', '"judge.by": "pairs"'),
        ("other judgements leave out the same records of a file",
         'return base.seed_data.source not in WORLDS and', "return False and")],
    ("runner/muon", "muon"): [
        ("Muon takes the embedding", 'name.startswith("blocks.") and p.dim() == 2', "p.dim() == 2"),
        ("Muon takes q, k, v for one matrix", "fused_weight_sizes(name, shape) or len(p)", "len(p)"),
        ("Muon's steps are not AdamW's size", '"match_rms_adamw"', '"original"')],
    ("runner/sharding", "sharding"): [
        ("gradients are means over the processes", "set_gradient_divide_factor(1.0)",
         "set_gradient_divide_factor(2.0)"),
        ("a loss that was computed in vain counts", "(loss * (own == index)).backward()", "loss.backward()"),
        ("both processes drop the same units", "derive_seed(seed, index))", "derive_seed(seed, first))"),
        ("metrics of the other processes are dropped", "for part in processes.gather(metrics) for",
         "for part in [metrics] for"),
        ("a state in another number of parts is used", "        self.check_parts(found)\n", ""),
        ("the optimizer begins anew", '        optimizer.load_state_dict(stored["optimizer"])\n', "")],
    ("worlds/words/sentence", "words"): [
        ("26 words are short enough", "self.length == LONGEST:", "self.length == LONGEST + 1:"),
        ("five words are enough", "self.length < SHORTEST", "self.length < SHORTEST - 1"),
        ("two sentences are one", 'rest not in ("end", NONE)', "False"),
        ("a word may occur three times", "MAX_OCCURRENCES = 2", "MAX_OCCURRENCES = 3"),
        ("two repeated words may stand side by side", " or was_repeated and word not in FUNCTION_WORDS", ""),
        ("a third word is repeated with the second", "and self.counts[previous] > 1", "and self.counts[previous] > 0"),
        ("a text may say twice what something is", "MAX_DEFINITIONS = 1", "MAX_DEFINITIONS = 2"),
        ("four items are no list", "LIST_SEPARATORS = 3", "LIST_SEPARATORS = 4"),
        ("three clauses are a list", "if self.is_bare_item() else 1", "if self.item else 1"),
        ("an item has no adjective", "most = 3 if", "most = 2 if"),
        ("a comma and \"and\" are two separators", "if not self.item and self.separators:", "if False:"),
        ("a list may end the sentence", "if self.separators == LIST_SEPARATORS - 1 and", "if False and"),
        ("requested words side by side are no list", "and self.requested.issuperset(requested)", "and False"),
        ("five words in a row are no list", "and FUNCTION_WORDS.isdisjoint(row)", "and False"),
        ("an abbreviation ends a sentence", 'ABBREVIATION.sub(lambda match: match[0][:-1] + "_", text)', "text"),
        ("a plural is a verb", "    if word in NOUN_FORMS:\n        return False\n", ""),
        ("the copy counts from 0", "str(self.length // GROUP + 1)", "str(self.length // GROUP)")],
    ("worlds/words/oracle", "words"): [
        ("only the base form counts", "if other.lower() in forms", "if other.lower() == word"),
        ("a capital hides a word", "if other.lower() in forms", "if other in forms")],
    ("worlds/words/annotator", "words"): [
        ("the sentence's point is not added", "{total + verdict.points[-1]}", "{total}"),
        ("the verdict is the first that is quoted", "forms[-1].lower()", "forms[0].lower()"),
        ("word points count the sentence", "read_points(request, text)[:-1]", "read_points(request, text)")],
    ("worlds/words/requests", "words"): [
        ("evaluation requests are trained on", "not (held_out(words) or ", "not ("),
        ("CommonGen's sets are trained on", "held_out(words) or excluded(words) or", "held_out(words) or"),
        ("unseen words are trained on", " or UNSEEN_FORMS.intersection(words))", ")"),
        ("sets differ by the order of their words", '",".join(sorted(words))', '",".join(words)')],
    ("worlds/words/edits", "words"): [
        ("the most frequent form is made", "self.counts[kind] - shares[kind] * total",
         "shares[kind] * total - self.counts[kind]"),
        ("an edit that failed is used", "if form_and_number(request, text) == (form, number):", "if True:")],
    ("worlds/words/corpus", "words"): [
        ("answers that were cut off are taught", "if done and text.strip()", "if text.strip()")],
    ("worlds/words/measures", "words"): [
        ("one point is flawless", "points.all(1)\n", "points.any(1)\n"),
        ("edited answers are M0's own", "if not is_edited]", "]"),
        ("sentences count among the others", "                if not true[-1]:\n", "                if True:\n")],
    ("runner/evaluation", "answer_metrics"): [
        ("responses that were cut off are compared", 'for i, done in enumerate(y["finished"]) if done]',
         'for i, done in enumerate(y["finished"])]'),
        ("random rewards have justifications", "if run.config.judge.by in BY_MODELS:", "if True:")],
    ("runner/evaluation", "variants"): [
        ("positives are trained on pairs", "trained_on_pairs = not model.run.config.dpo.positives_only",
         "trained_on_pairs = True")],
    ("runner/pretrain", "pretrain"): [
        ("dropout follows the process", 'torch.manual_seed(derive_seed(config.seed, "dropout"))', "pass")],
    ("runner/pretrain", "init_weights"): [
        ("initial weights of L, not 2 L writers",
         "math.sqrt(2 * model.config.n_layers)", "math.sqrt(model.config.n_layers)")],
}


class Mutant(NamedTuple):
    """One bug in minisr/MODULE.py, which tests/*/test_TEST.py must detect."""

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
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="in their names, e.g. dpo.py")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tested at the same time, with one thread each")
    parser.add_argument("--list", action="store_true", help="print the names of the mutants")
    return parser.parse_args()


def copied(folder: Path) -> Path:
    """Copy what the tests need."""
    for name in ("minisr", "tests", "tiny_configs", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def verdict_on(mutant: Mutant, copy: Path) -> str:
    """Test a mutant in a copy of the code, which is then restored."""
    path = copy / "minisr" / f"{mutant.module}.py"
    code = path.read_text(encoding="utf-8")
    if (times := code.count(mutant.old)) != 1:
        return f"STALE: {mutant.old!r} occurs {times} times"
    path.write_text(code.replace(mutant.old, mutant.new), encoding="utf-8")
    found = first_failure(copy, {mutant.test})
    path.write_text(code, encoding="utf-8")
    if "::" in found:
        return f"killed by {found}"
    return f"BROKEN: {found}" if found else "SURVIVED"


def first_failure(copy: Path, tests: set[str]) -> str:
    """The first test of these files that fails, "" if all pass; or why they could not be run."""
    # No bytecode: of two mutants of equal length, written within a second, Python would run the first one twice.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1",
                                "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider",
               *(str(next(copy.glob(f"tests/*/test_{name}.py"))) for name in sorted(tests))]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True,
                              timeout=TIMEOUT * len(tests))
    except subprocess.TimeoutExpired:
        return f"not finished after {TIMEOUT} s"
    failed = re.search(r"^(?:FAILED|ERROR) (tests/\S+?::\w+)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return failed[1]
    return done.returncode and f"pytest ended with code {done.returncode}: {done.stdout[-200:]!r}" or ""


if __name__ == "__main__":
    sys.exit(main())
