from random import Random

import pytest
import torch

from minisr.interop.chat_templates import chat_template
from minisr.model import Decoder, ModelConfig
from minisr.runner.pretrain import train_tokenizer
from minisr.worlds.tiny import corpus


@pytest.fixture(autouse=True)
def one_thread():
    # How many threads share a sum decides its last bit; a run sets its own number, so set it each time.
    torch.set_num_threads(1)


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
            centre = 1.0 if weight.dim() == 1 else 0.0  # norm weights too, or nothing would test them
            weight.data = centre + std * torch.randn(weight.shape, generator=generator)
        return model.eval()
    return make


@pytest.fixture(scope="session")
def decoder(random_decoder, tokenizer):
    # Weights far larger than at initialisation: greedy outputs wander instead of repeating one token.
    return random_decoder(vocab_size=len(tokenizer))


@pytest.fixture(scope="session")
def SuccessorLM():
    # After token k comes k + 1, whatever came before: what a sampler must return is known by hand.
    def make(vocab_size=32, context=64):
        model = Decoder(ModelConfig(vocab_size, dim=vocab_size, n_layers=1, n_heads=2, n_kv_heads=1,
                                    ffn_dim=8, max_seq_len=context, tie_embeddings=False))
        model.embed.weight.data = torch.eye(vocab_size)
        model.head.weight.data = 20 * torch.eye(vocab_size).roll(1, 0)  # row k + 1 answers to k
        for block in model.blocks:
            block.attention.out_proj.weight.data.zero_()
            block.feed_forward.down_proj.weight.data.zero_()
        return model.eval()
    return make
