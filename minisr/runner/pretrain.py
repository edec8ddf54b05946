"""Text -> M0: a seed model pretrained on what the tiny world's people wrote.

Each row of a batch is one document. With several packed into a row, a trial of width 96 had learned to copy
one of the four sorts of words from request to answer after 12 M tokens; so, the same took 3 M.
"""

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
    tokenizer = _tokenizer(config)
    documents = _documents(tokenizer, config)
    model = Decoder(config.model)
    init_weights(model, torch.Generator().manual_seed(key(config.seed, "weights")))
    batches = schedule([len(ids) for ids, _ in documents], config.train.batch_size,
                       config.train.epochs, key(config.seed, "order"))

    def loss_parts(batch, part_config):
        for loss in target_loss_parts(model, [documents[i] for i in batch], part_config):
            yield loss, {}

    with locked(folder):
        if (folder / "meta.json").exists():
            raise InputError(f"{folder} holds a model already; choose another folder with --out")
        fit(model, batches, loss_parts, config.train, "pretrain", folder / "train_log.jsonl", to_toml(config))
        save_model(folder, model, tokenizer, {
            "made_by": "pretrain", "seed": config.seed, "torch": torch.__version__,
            "config_hash": digest(to_toml(config).encode())})
        TrainingState.remove(folder)


def _tokenizer(config: PretrainConfig) -> Tokenizer:
    rng = Random(key(config.seed, "tokenizer"))
    texts = (corpus.document(rng) for _ in range(config.tokenizer_documents))
    try:
        return train_tokenizer((line for text in texts for line in text.split("\n")),
                               config.model.vocab_size, chat_template("tiny"))
    except RuntimeError as error:  # SentencePiece names the sizes that are possible
        raise InputError(f"[model] vocab_size {config.model.vocab_size} does not suit the text: "
                         f"{error}") from error


def _documents(tokenizer: Tokenizer, config: PretrainConfig) -> list[tuple]:
    """(ids, mask) of documents of config.tokens tokens in all; every token but the first is a target."""
    rng, documents, tokens = Random(key(config.seed, "text")), [], 0
    with tqdm(total=config.tokens, desc="text", leave=False) as bar:
        while tokens < config.tokens:
            ids = [*tokenizer.bos_ids, *tokenizer.encode(corpus.document(rng)), tokenizer.eos_id]
            ids = ids[:config.model.max_seq_len]
            documents.append((ids, [True] * len(ids)))
            tokens += len(ids)
            bar.update(len(ids))
    return documents
