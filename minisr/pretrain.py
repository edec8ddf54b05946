"""Text -> M0: a seed model pretrained on what the tiny world's people wrote."""

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minisr.checkpoint import digest, save_model
from minisr.config import PretrainConfig, to_toml
from minisr.model import Decoder, init_weights
from minisr.records import InputError
from minisr.sampler import key
from minisr.tokenizer import Tokenizer, train_tokenizer
from minisr.train import fit
from minisr.world import corpus


def pretrain(config: PretrainConfig, folder: Path) -> None:
    """Train the tokenizer and the decoder on the world's text and save them as a model folder."""
    torch.set_num_threads(config.threads)
    rng = Random(key(config.seed, "tokenizer"))
    lines = [line for _ in range(config.tokenizer_documents)
             for line in corpus.document(rng).split("\n")]
    tokenizer = train_tokenizer(lines, config.model.vocab_size)
    rows = pack(tokenizer, config)
    model = Decoder(config.model)
    init_weights(model, torch.Generator().manual_seed(key(config.seed, "weights")))

    def loss_of(batch):
        return document_loss(model, batch.long(), tokenizer.eos), {}

    fit(model, list(rows.split(config.train.batch_size)), loss_of, config.train, "pretrain",
        folder / "train_log.jsonl")
    save_model(folder, model, tokenizer, {
        "made_by": "pretrain", "seed": config.seed, "torch": torch.__version__,
        "config_hash": digest(to_toml(config).encode())})


def pack(tokenizer: Tokenizer, config: PretrainConfig) -> torch.Tensor:
    """Whole documents packed into rows (rows, row_tokens + 1), filled up with end tokens."""
    if config.row_tokens >= config.model.context:
        raise InputError(f"row_tokens {config.row_tokens} must be below the model's context "
                         f"{config.model.context}")
    rng, length = Random(key(config.seed, "text")), config.row_tokens + 1
    wanted, rows, row = max(1, config.tokens // config.row_tokens), [], []
    with tqdm(total=wanted, desc="text", leave=False) as bar:
        while len(rows) < wanted:
            ids = [tokenizer.bos, *tokenizer.encode(corpus.document(rng)), tokenizer.eos]
            if len(row) + len(ids) > length:
                rows.append(row + [tokenizer.eos] * (length - len(row)))
                row = []
                bar.update()
            row += ids[:length]  # a document longer than a row is cut
    return torch.tensor(rows, dtype=torch.int32)


def document_loss(model: Decoder, rows: torch.Tensor, eos: int) -> torch.Tensor:
    """Mean next-token loss of rows (B, T + 1); the filling, an end token after an end token, has none."""
    inputs, targets = rows[:, :-1], rows[:, 1:]  # (B, T)
    real = ~((inputs == eos) & (targets == eos))
    return F.cross_entropy(model(inputs)[real], targets[real])
