"""Text -> M0: a seed model pretrained on what the tiny world's people wrote.

Each row of a batch is one document. Packing several documents into a row made training slower: in a trial
with dim = 96, the model learned to copy one of the four kinds of words from request to answer after 12 M
tokens instead of 3 M. """

from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from minisr import InputError
from minisr.interop.chat_templates import chat_template
from minisr.model import Decoder, init_weights
from minisr.rng import key
from minisr.runner.checkpoint import digest, save_model
from minisr.runner.config import PretrainConfig, to_toml
from minisr.runner.resume import TrainingState, locked
from minisr.sft import schedule, target_loss_parts
from minisr.tokenizer import Tokenizer, train_tokenizer
from minisr.train import fit
from minisr.worlds.tiny import corpus


def pretrain(config: PretrainConfig, folder: Path) -> None:
    """Train the tokenizer and the decoder on the world's text and save them as a model folder."""
    torch.set_num_threads(config.threads)
    tokenizer = make_tokenizer(config)
    documents = make_documents(tokenizer, config)
    model = Decoder(config.model)
    init_weights(model, torch.Generator().manual_seed(key(config.seed, "weights")))
    with locked(folder):
        if (folder / "meta.json").exists():
            raise InputError(f"{folder} holds a model already; choose another folder with --out")
        train(model, documents, config, folder)
        save_model(folder, model, tokenizer, {
            "made_by": "pretrain", "seed": config.seed, "torch": torch.__version__,
            "config_hash": digest(to_toml(config).encode())})
        TrainingState.remove(folder)


def train(model: Decoder, documents: list[tuple], config: PretrainConfig, folder: Path) -> None:
    """Train on every token of the documents. The log is written to the folder."""
    batches = schedule([len(ids) for ids, _ in documents], config.train.batch_size, config.train.epochs,
                       key(config.seed, "order"))

    def micro_batch_losses(batch, train_config):
        for loss in target_loss_parts(model, [documents[i] for i in batch], train_config):
            yield loss, {}

    log = folder / "train_log.jsonl"
    fit(model, batches, micro_batch_losses, config.train, "pretrain", log, to_toml(config))


def make_tokenizer(config: PretrainConfig) -> Tokenizer:
    """A tokenizer trained on the lines of some documents."""
    rng = Random(key(config.seed, "tokenizer"))
    documents = (corpus.document(rng) for _ in range(config.tokenizer_documents))
    lines = (line for document in documents for line in document.split("\n"))
    try:
        return train_tokenizer(lines, config.model.vocab_size, chat_template("tiny"))
    except RuntimeError as error:  # SentencePiece names the possible sizes
        raise InputError(f"[model] vocab_size {config.model.vocab_size} does not suit the text: "
                         f"{error}") from error


def make_documents(tokenizer: Tokenizer, config: PretrainConfig) -> list[tuple]:
    """(ids, loss mask) of each document, until there are config.tokens tokens. Every token is a target."""
    rng, documents, tokens = Random(key(config.seed, "text")), [], 0
    with tqdm(total=config.tokens, desc="text", leave=False) as progress:
        while tokens < config.tokens:
            ids = [*tokenizer.bos_ids, *tokenizer.encode(corpus.document(rng)), tokenizer.eos_id]
            ids = ids[:config.model.max_seq_len]
            documents.append((ids, [True] * len(ids)))
            tokens += len(ids)
            progress.update(len(ids))
    return documents
