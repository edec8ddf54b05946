"""Text -> M0: a seed model pretrained on what the tiny world's people wrote.

Each row of a batch is one document. Packing several documents into a row made training slower: in a trial with
dim = 96, the model learned to copy one of the four kinds of words from request to answer after 12 M tokens
instead of 3 M.
"""

import io
import math
from pathlib import Path
from random import Random

import sentencepiece
import torch
from torch import nn
from tqdm import tqdm

from minisr import InputError
from minisr.interop.chat_templates import chat_template
from minisr.lm import LM
from minisr.model import Decoder
from minisr.rng import derive_seed
from minisr.runner.checkpoint import digest, save_model
from minisr.runner.config import PretrainConfig, check_learning_rate, to_toml
from minisr.runner.engine import Workspace, run_lm_class
from minisr.runner.journal import TrainingState
from minisr.runner.resumable import deciding_values
from minisr.runner.storage import folder_lock
from minisr.sft import Example, make_target_loss_fns
from minisr.tokenizer import SentencePiece, Tokenizer
from minisr.train import make_batches
from minisr.worlds.tiny import corpus

USER, ASSISTANT = "<|user|>", "<|assistant|>"  # the special tokens of the chat template "tiny"


def pretrain(config: PretrainConfig, folder: Path) -> None:
    """Train the tokenizer and the decoder on the world's text and save them as a model folder."""
    check_learning_rate("train", config.train)
    if config.engine == "plain" and config.train.gradient_checkpointing:
        raise InputError('train.gradient_checkpointing needs engine = "fast"')
    torch.set_num_threads(config.threads)
    tokenizer = make_tokenizer(config)
    documents = make_documents(tokenizer, config)
    model = Decoder(config.model)
    init_weights(model, torch.Generator().manual_seed(derive_seed(config.seed, "weights")))
    lm = run_lm_class(config.engine)(model, tokenizer)
    with folder_lock(folder):
        if (folder / "meta.json").exists():
            raise InputError(f"{folder} already holds a model; choose another folder with --out")
        lm.workspace = Workspace("pretrain", training_folder=folder, training_made_from=(deciding_values(config),))
        train_on_documents(lm, documents, config)
        save_model(folder, model, tokenizer, {
            "made_by": "pretrain", "seed": config.seed, "torch": torch.__version__,
            "config_hash": digest(to_toml(config).encode())})
        TrainingState.remove(folder)


def make_tokenizer(config: PretrainConfig) -> Tokenizer:
    """A tokenizer trained on the lines of some documents."""
    rng = Random(derive_seed(config.seed, "tokenizer"))
    documents = (corpus.document(rng) for _ in range(config.tokenizer_documents))
    lines = (line for document in documents for line in document.split("\n"))
    try:
        return train_tokenizer(lines, config.model.vocab_size, chat_template("tiny"))
    except RuntimeError as error:  # SentencePiece names the possible sizes
        raise InputError(f"[model] vocab_size {config.model.vocab_size} does not suit the text: "
                         f"{error}") from error


def train_tokenizer(texts, vocab_size: int, template: str) -> Tokenizer:
    """Train a SentencePiece BPE model. The same texts give the same bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size,
        model_type="bpe", character_coverage=1.0, byte_fallback=True, split_digits=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["\n"], control_symbols=[USER, ASSISTANT], num_threads=1,
        minloglevel=2)
    return Tokenizer(SentencePiece(model.getvalue()), template)


def make_documents(tokenizer: Tokenizer, config: PretrainConfig) -> list[Example]:
    """Documents until there are config.tokens tokens. Every token but the first is a target."""
    rng, documents, tokens = Random(derive_seed(config.seed, "text")), [], 0
    with tqdm(total=config.tokens, desc="text", leave=False, disable=None) as progress:
        while tokens < config.tokens:
            ids = [*tokenizer.bos_ids, *tokenizer.encode(corpus.document(rng)), tokenizer.eos_id]
            ids = ids[:config.model.max_seq_len]
            documents.append(Example(ids, [True] * len(ids)))
            tokens += len(ids)
            progress.update(len(ids))
    return documents


def init_weights(model: Decoder, generator: torch.Generator) -> None:
    """Normal with std 0.02. Matrices that write to the residual stream are scaled by 1 / sqrt(2 L), as in GPT-2."""
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        writes_to_residual = name.endswith(("out_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * model.config.n_layers) if writes_to_residual else 0.02
        nn.init.normal_(weight, std=std, generator=generator)


def train_on_documents(lm: LM, documents: list[Example], config: PretrainConfig) -> None:
    """Train on every token of the documents."""
    lengths = [len(document.ids) for document in documents]
    batches = make_batches(lengths, config.train, derive_seed(config.seed, "order"))

    def make_loss_fns(batch, train_config):
        return make_target_loss_fns(lm, [documents[i] for i in batch], train_config)

    torch.manual_seed(derive_seed(config.seed, "dropout"))
    lm.fit(batches, make_loss_fns, config.train)
