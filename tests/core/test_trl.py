"""pairs.jsonl goes into TRL's DPOTrainer as it is, and TRL's loss is ours."""

from math import log
from random import Random

import pytest
import torch
from tiny import ENGINES, with_log

from minisr.dpo import DPOConfig, dpo_loss, encode_pairs, train_dpo
from minisr.interop import hf
from minisr.runner.checkpoint import SEED_MODEL, load_model
from minisr.runner.files import write_jsonl
from minisr.worlds.tiny import corpus, writers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that trl uses in transformers
BETA = 0.3


@pytest.fixture(scope="module")
def pairs():
    rng, source = Random(0), corpus.requests(Random(1))
    return [{"prompt": prompt, "chosen": writers.flawless_answer(request, rng), "rejected": "The end.",
             "chosen_reward": 5.0, "rejected_reward": 1.0}
            for request, prompt in (next(source) for _ in range(4))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The shipped M0, M0 with other weights, and a folder with both for transformers."""
    folder = tmp_path_factory.mktemp("hf")
    (M0, tokenizer), (other, _) = load_model(SEED_MODEL), load_model(SEED_MODEL)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in other.blocks.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    hf.export(M0, tokenizer, folder / "M0")
    hf.export(other, tokenizer, folder / "other")
    return M0, other, tokenizer, folder


@pytest.fixture
def trainer(exported, pairs, tmp_path):
    """TRL's trainer on pairs.jsonl; `chat` makes it apply the chat template."""
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    folder = exported[-1]

    def make(policy, reference, chat, **options):
        write_jsonl(tmp_path / "pairs.jsonl", pairs)
        data = datasets.load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train",
                                     cache_dir=str(tmp_path / "cache"))
        if chat:
            role = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            data = data.map(lambda r: {k: [{"role": role[k], "content": r[k]}] for k in role})
        load = transformers.AutoModelForCausalLM.from_pretrained
        models = [load(folder / name) for name in (policy, reference)]
        config = trl.DPOConfig(str(tmp_path), beta=BETA, use_cpu=True, bf16=False, report_to=[],
                               max_length=None, gradient_checkpointing=False,
                               per_device_train_batch_size=len(pairs), **options)
        return trl.DPOTrainer(*models, config, train_dataset=data,
                              processing_class=transformers.AutoTokenizer.from_pretrained(folder / "M0"))
    return make


def test_the_trainer_reads_the_file_as_it_is_and_its_first_loss_is_ours(trainer, exported, pairs):
    theirs = trainer("M0", "M0", chat=False, max_steps=1, logging_steps=1)
    theirs.train()
    M0, _, tokenizer, _ = exported
    config = DPOConfig(batch_size=len(pairs), beta=BETA)
    for LM in ENGINES.values():
        [record] = train_dpo(with_log(LM(M0, tokenizer)), pairs, [], config, seed=0).log
        assert record["dpo_loss"] == pytest.approx(log(2), abs=1e-5)
        assert theirs.state.log_history[0]["loss"] == pytest.approx(record["dpo_loss"], abs=1e-4)  # rounded by TRL


def test_with_the_chat_template_ids_and_loss_are_ours(trainer, exported, pairs):
    M0, other, tokenizer, _ = exported
    theirs = trainer("other", "M0", chat=True)
    for row, pair in zip(theirs.train_dataset, pairs):
        assert row["prompt_ids"] == tokenizer.encode_prompt(pair["prompt"])
        for side in ("chosen", "rejected"):
            ids, _ = tokenizer.encode_chat(pair["prompt"], pair[side])
            assert row["prompt_ids"] + row[f"{side}_ids"] == ids
    batch = theirs.data_collator(list(theirs.train_dataset))
    with torch.no_grad():
        loss = theirs.compute_loss(theirs.model, batch).item()
    for LM in ENGINES.values():
        policy, reference = LM(other, tokenizer), LM(M0, tokenizer).frozen_copy()
        encoded = encode_pairs(policy, pairs)
        with torch.no_grad():
            ours = dpo_loss(*policy.pair_logps(encoded), *reference.pair_logps(encoded), BETA)[0].mean().item()
        assert loss == pytest.approx(ours, abs=1e-5) and abs(ours - log(2)) > 0.01
