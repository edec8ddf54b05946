import gc
import os
from random import Random

import pytest
import torch
from tiny import ENGINES

from minisr.interop.chat_templates import chat_template
from minisr.model import Decoder, ModelConfig
from minisr.runner.pretrain import train_tokenizer
from minisr.worlds.tiny import corpus

# Several processes test at the same time, so each uses one thread, and so does each process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_finish():
    gc.freeze()  # the collector passes over what all the imports have made, hundreds of thousands of objects


@pytest.fixture(autouse=True)
def one_thread():
    # The number of threads that share a sum decides its last bit, and a run sets its own number.
    torch.set_num_threads(1)


@pytest.fixture(params=ENGINES)
def engine(request):
    """The name of an engine: a test that uses it runs once on each engine that is installed."""
    return request.param


@pytest.fixture(scope="session")
def world_lines():
    rng = Random(0)
    return [line for _ in range(300) for line in corpus.document(rng).split("\n")]


@pytest.fixture(scope="session")
def tokenizer(world_lines):
    return train_tokenizer(world_lines, 500, chat_template("tiny"))


@pytest.fixture(scope="session")
def random_decoder():
    def make(seed=0, std=0.3, **shape):
        model = Decoder(ModelConfig(**{**dict(vocab_size=60, dim=32, n_layers=2, n_heads=4, n_kv_heads=2,
                                              ffn_dim=64, max_seq_len=128, tie_embeddings=False), **shape}))
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            mean = 1.0 if weight.dim() == 1 else 0.0  # norm weights vary too, so that they are tested
            weight.data = mean + std * torch.randn(weight.shape, generator=generator)
        return model.eval()
    return make


@pytest.fixture(scope="session")
def decoder(random_decoder, tokenizer):
    # Weights far larger than at initialization: greedy outputs vary instead of repeating one token.
    return random_decoder(vocab_size=len(tokenizer))


@pytest.fixture(scope="session")
def successor_decoder():
    """A decoder with attention and cache that always continues with the next number: 3 -> 4, 5, 6, ..."""
    def make(vocab_size=32, max_seq_len=64):
        model = Decoder(ModelConfig(vocab_size, dim=vocab_size, n_layers=1, n_heads=2, n_kv_heads=1,
                                    ffn_dim=8, max_seq_len=max_seq_len, tie_embeddings=False))
        model.embed.weight.data = torch.eye(vocab_size)
        model.head.weight.data = 20 * torch.eye(vocab_size).roll(1, 0)  # row k + 1 responds to k
        for block in model.blocks:
            block.attention.out_proj.weight.data.zero_()
            block.feed_forward.down_proj.weight.data.zero_()
        return model.eval()
    return make
