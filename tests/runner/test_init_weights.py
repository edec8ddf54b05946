"""The random weights that pretraining begins with."""

import pytest
import torch

from minisr.model import Decoder, ModelConfig
from minisr.runner.pretrain import init_weights


@pytest.mark.parametrize("n_layers, smaller", [(2, 0.01), (8, 0.005)])  # 0.02 / sqrt(2 * n_layers)
def test_the_std_is_002_and_smaller_for_what_writes_to_the_residual_stream(n_layers, smaller):
    model = Decoder(ModelConfig(n_layers=n_layers, tie_embeddings=False))
    init_weights(model, torch.Generator().manual_seed(0))
    writers = 0
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
            continue
        writes = "out_proj" in name or "down_proj" in name
        writers += writes
        assert weight.std().item() == pytest.approx(smaller if writes else 0.02, rel=0.03), name
        assert abs(weight.mean().item()) < 0.001, name
    assert writers == 2 * n_layers
