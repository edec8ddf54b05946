"""LoRA: adapters against explicit weights W + alpha / r B A, autograd against torch.func, and the peft library."""

from math import log

import pytest
import torch
from small_run import CONFIG, minisr, refused, settings
from test_resume import EXAMPLES, trained
from tiny import ENGINES, PAIRS, as_llama, llama_weights, tiny_model, tiny_tokenizer, with_log

from minisr.dpo import encode_pairs, train_dpo
from minisr.model import Decoder, ModelConfig
from minisr.runner import lora
from minisr.runner.checkpoint import load_model
from minisr.runner.config import DPOConfig, TrainConfig
from minisr.runner.engine import Workspace, run_lm_class
from minisr.runner.journal import TrainingState
from minisr.runner.lora import PARTS, TARGETS, LoRAConfig, LoRALinear, add_adapters, merge_adapters
from minisr.sft import train_sft

pytestmark = pytest.mark.skipif("fast" not in ENGINES, reason="LoRA needs the fast engine")
R4 = LoRAConfig(rank=4, alpha=8.0)
SFT = TrainConfig(batch_size=3, epochs=2, learning_rate=1e-2)
DPO = DPOConfig(batch_size=3, epochs=2, learning_rate=1e-2)


def lora_lm(model=None, config=R4):
    lm = run_lm_class("fast", config)(model or tiny_model(), tiny_tokenizer())
    lm.workspace = Workspace()
    return lm


def randomize(adapted, seed=0):
    """Adapters of the size that a training might give them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return adapted


def explicit_weights(base, adapters, config):
    """W + alpha / r B A of every matrix, under the names of transformers, from a dict of adapters."""
    weights = llama_weights(base.config, base.state_dict())
    layers = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
              "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    for name, A in adapters.items():
        prefix, _, part = name.rpartition(".A.")
        if prefix:
            target = f"model.layers.{prefix.split('.')[1]}.{layers[part]}.weight"
            weights[target] = weights[target] + config.alpha / config.rank * adapters[f"{prefix}.B.{part}"] @ A
    return weights


IDS = torch.randint(400, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("targets", [TARGETS, ("q", "v"), ("k", "down")])
@torch.no_grad()
def test_logits_are_those_of_explicit_weights_in_transformers_with_adapters_and_merged(targets):
    config = LoRAConfig(3, 5.0, targets)
    base = tiny_model()
    adapted = randomize(add_adapters(base, config))
    assert len(list(adapted.parameters())) == 2 * len(targets) * base.config.n_layers
    llama = as_llama(base)
    llama.load_state_dict(explicit_weights(base, dict(adapted.named_parameters()), config))
    expected = llama(IDS).logits
    assert (expected - base(IDS)).abs().max() > 0.1
    torch.testing.assert_close(adapted(IDS), expected, atol=1e-5, rtol=0)
    merged = merge_adapters(base, adapted)
    torch.testing.assert_close(merged(IDS), adapted(IDS), atol=1e-5, rtol=0)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]


def test_gradients_are_those_of_torch_func_through_explicit_weights():
    base = tiny_model().double()
    adapted = randomize(add_adapters(base, R4))
    adapters = {name: p.detach().clone() for name, p in adapted.named_parameters()}

    def loss(adapters):
        theirs = explicit_weights(base, adapters, R4)
        ours = {}
        for i in range(base.config.n_layers):
            layer = {name.split(".")[-2]: w for name, w in theirs.items() if name.startswith(f"model.layers.{i}.")}
            ours[f"blocks.{i}.attention.qkv_proj.weight"] = torch.cat([layer[f"{part}_proj"] for part in "qkv"])
            ours[f"blocks.{i}.attention.out_proj.weight"] = layer["o_proj"]
            ours[f"blocks.{i}.feed_forward.gate_up_proj.weight"] = torch.cat([layer["gate_proj"], layer["up_proj"]])
            ours[f"blocks.{i}.feed_forward.down_proj.weight"] = layer["down_proj"]
        return torch.func.functional_call(base, ours, (IDS,)).sin().sum()
    expected = torch.func.grad(loss)(adapters)
    adapted(IDS).sin().sum().backward()
    assert len(expected) == 28 and all(gradient.any() for gradient in expected.values())
    for name, p in adapted.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("targets", [TARGETS, ("q", "v")])
def test_logits_and_gradients_are_those_of_peft(targets):
    peft = pytest.importorskip("peft")
    config, base = LoRAConfig(3, 5.0, targets), tiny_model()
    adapted = randomize(add_adapters(base, config))
    theirs = peft.get_peft_model(as_llama(base), peft.LoraConfig(
        r=3, lora_alpha=5.0, target_modules=[f"{part}_proj" for part in targets]))
    names = {}  # ours of theirs
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            fields = name.split(".")
            layer, matrix, side = fields[fields.index("layers") + 1], fields[-4], fields[-3][-1]
            part = matrix.removesuffix("_proj")
            weight = next(weight for weight, parts in PARTS.items() if part in parts)
            block = "attention" if "self_attn" in fields else "feed_forward"
            names[name] = f"blocks.{layer}.{block}.{weight}.{side}.{part}"
    ours = dict(adapted.named_parameters())
    assert sorted(names.values()) == sorted(ours)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name in names:
                p.copy_(ours[names[name]])
    expected = theirs(IDS).logits
    torch.testing.assert_close(adapted(IDS), expected, atol=1e-5, rtol=0)
    expected.sin().sum().backward()
    adapted(IDS).sin().sum().backward()
    for name, p in theirs.named_parameters():
        if name in names:
            assert p.grad.any()
            torch.testing.assert_close(ours[names[name]].grad, p.grad, atol=1e-3, rtol=1e-4)
    merged = as_llama(merge_adapters(base, adapted)).state_dict()
    for name, weight in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_dpo_loss_is_log_2_and_the_loss_falls(dtype):
    log_ = train_dpo(with_log(lora_lm(tiny_model().to(dtype))), PAIRS, [], DPO, seed=0).log
    assert log_[0]["dpo_loss"] == pytest.approx(log(2), abs=1e-6) and log_[0]["margin"] == 0
    assert log_[-1]["dpo_loss"] < 0.69


@pytest.fixture
def unmerged(monkeypatch):
    """The models with adapters at the end of each training."""
    found = []

    def spy(model, adapted):
        found.append(adapted.eval())
        return merge_adapters(model, adapted)
    monkeypatch.setattr(lora, "merge_adapters", spy)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_trained_model_without_its_adapters_is_the_reference_bit_for_bit_and_in_the_same_memory(dtype, unmerged):
    lm = lora_lm(tiny_model().to(dtype))
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    pairs = encode_pairs(lm, PAIRS)

    def pair_logps(model):
        return torch.stack(ENGINES["fast"](model, tiny_tokenizer()).pair_logps(pairs))
    reference = pair_logps(lm.frozen_copy().model)
    with torch.enable_grad():
        merged = train_dpo(lm, PAIRS, [], DPO, seed=0).model
    adapted, = unmerged
    trained = pair_logps(adapted)
    assert (trained - reference).abs().min() > 0.1
    torch.testing.assert_close(pair_logps(merged), trained, atol=1e-5 if dtype == torch.float32 else 0.5, rtol=0)
    for name, module in list(adapted.named_modules()):
        if isinstance(module, LoRALinear):
            adapted.set_submodule(name, module.linear)
    assert torch.equal(pair_logps(adapted), reference)
    weights, shared = dict(lm.model.named_parameters()), dict(adapted.named_buffers())
    for name, weight in weights.items():
        assert weight.data_ptr() == shared[name].data_ptr() and torch.equal(weight, before[name]), name


def state_bytes(optimizer):
    """The memory of what an optimizer keeps for its parameters."""
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())


def optimizer_share(shape: ModelConfig, how: LoRAConfig) -> float:
    """The optimizer's memory with adapters, over that with all weights, after a step of each."""
    sizes = []
    for config in (how, LoRAConfig()):
        torch.manual_seed(0)
        lm = lora_lm(Decoder(shape), config)
        optimizer = lm.prepare_training(TrainConfig())
        lm.model(IDS[:1, :4]).square().mean().backward()
        optimizer.step()
        sizes.append(state_bytes(optimizer))
    return sizes[0] / sizes[1]


def test_the_optimizer_needs_less_than_a_tenth_of_the_memory():
    # By hand: the seven matrices of a block have 2,312 rows and columns; the model has 4 blocks and 873,600 weights.
    share = optimizer_share(ModelConfig(), LoRAConfig(rank=8))
    assert share == pytest.approx(8 * 4 * 2312 / 873_600, rel=1e-3) and share < 0.1


@pytest.mark.slow
def test_the_optimizer_needs_less_than_a_tenth_of_the_memory_at_smollm2s_shape():
    shape = ModelConfig(vocab_size=49152, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_dim=1536)
    share = optimizer_share(shape, LoRAConfig(rank=16))
    assert share == pytest.approx(16 * 30 * 10176 / 134_515_008, rel=1e-3) and share < 0.04


def test_only_adapters_are_trained_and_stored_and_in_bfloat16_they_are_float32(tmp_path):
    for dtype, expected in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                            (torch.float64, torch.float64)):
        lm = lora_lm(tiny_model().to(dtype)).copy()
        optimizer = lm.prepare_training(SFT)
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        adapters = list(lm.model.parameters())
        assert {p.dtype for p in masters + adapters} == {expected}
        assert sorted(map(torch.numel, masters)) == sorted(map(torch.numel, adapters))
        TrainingState(tmp_path, "x").save([], lm.model, optimizer)
        stored = torch.load(tmp_path / "training-0.pt", weights_only=True)["model"]
        assert all(".A." in name or ".B." in name for name in stored) and len(stored) == 28
        again = lora_lm(tiny_model().to(dtype), R4).copy()
        again_optimizer = again.prepare_training(SFT)
        assert TrainingState(tmp_path, "x").restore(again.model, again_optimizer) == []
        assert all(torch.equal(a, b) for a, b in zip(adapters, again.model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how, kind", [("SFT", TrainConfig), ("DPO", lambda **k: DPOConfig(replay_weight=0.5, **k))])
def test_an_interrupted_training_resumes_to_the_same_bits(how, kind, dtype, tmp_path):
    config = kind(batch_size=3, epochs=1, dropout=0.2, save_every=2, learning_rate=1e-2)

    def begin(folder, stop_at=None):
        return trained(folder, how, config, stop_at, lora_lm(tiny_model().to(dtype)))
    whole, steps = begin(tmp_path / "whole")
    assert not torch.equal(whole.model.blocks[0].attention.qkv_proj.weight,
                           tiny_model().to(dtype).blocks[0].attention.qkv_proj.weight)
    for stop_at in (1, steps - 1):
        folder = tmp_path / f"stopped-{stop_at}"
        lm, done = begin(folder, stop_at)
        assert lm is None and done == stop_at
        lm, rest = begin(folder)
        assert rest == steps - stop_at and not lm.model.training
        for (name, a), b in zip(lm.model.state_dict().items(), whole.model.state_dict().values()):
            assert torch.equal(a, b), name
        assert (folder / "train_log.jsonl").read_bytes() == (tmp_path / "whole/train_log.jsonl").read_bytes()


def test_a_trained_model_is_plain_and_can_be_trained_again_and_its_parent_is_as_it_was():
    lm = lora_lm()
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    once = train_sft(with_log(lm), EXAMPLES, SFT, seed=0)
    assert once.log[-1]["loss"] < once.log[0]["loss"]
    twice = train_sft(once, EXAMPLES, SFT, seed=1)
    assert twice.log[0]["loss"] < once.log[0]["loss"]  # it goes on where the first training ended
    for name, weight in lm.model.state_dict().items():
        assert torch.equal(weight, before[name])
        assert twice.model.state_dict()[name].data_ptr() != once.model.state_dict()[name].data_ptr()
    # What has no adapter is as it was; the seven matrices of each block are not.
    changed = {name for name, weight in once.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert all(p.requires_grad for p in twice.model.parameters())


def test_log_probabilities_recorded_while_sampling_are_read_by_the_reference_and_forgotten_by_the_trained_model():
    lm = with_log(lora_lm())
    pair = encode_pairs(lm, PAIRS)[0]
    for response in (pair.chosen, pair.rejected):  # not what the model gives, to recognize it
        lm.record(pair.prompt, response, -1.0)
    trained_lm = train_dpo(lm, PAIRS, [], DPO, seed=0)
    assert abs(trained_lm.log[0]["margin"]) > 0.1
    assert -1.0 in lm.recorded.values() and trained_lm.recorded == {}


def test_the_same_seed_gives_the_same_adapters_and_another_seed_others():
    weights = [train_sft(lora_lm(), EXAMPLES, SFT, seed=seed).model.blocks[0].attention.qkv_proj.weight
               for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_gradient_checkpointing_gives_the_same_adapters():
    def begin(checkpointing):
        config = DPOConfig(batch_size=3, learning_rate=1e-2, gradient_checkpointing=checkpointing)
        return train_dpo(lora_lm(), PAIRS, [], config, seed=0).model.state_dict()
    for a, b in zip(begin(False).values(), begin(True).values()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_run_with_lora_from_the_command_line_and_its_export(tmp_path, no_drawing):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.toml").write_text(CONFIG)
    changes = ("iterations=1", "lora.rank=4", "judge.by=random", "prompts.count=3", "seed_data.ift=8",
               "seed_data.evaluation=2", "seed_data.judge_evaluation=1")
    code, out, err = minisr("run", tmp_path / "config.toml", "--out", tmp_path / "run", *settings(*changes))
    assert (code, err) == (0, "") and "M2" in out
    assert "rank = 4" in (tmp_path / "run/config.toml").read_text()
    assert minisr("export", tmp_path / "run/M2", "--out", tmp_path / "hf")[0] == 0
    model, _ = load_model(tmp_path / "run/M2")
    M1, _ = load_model(tmp_path / "run/M1")
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, M1.state_dict()[name])}
    assert len(changed) == 16 and all("_proj" in name for name in changed)
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(llama(IDS).logits, model(IDS), atol=1e-5, rtol=1e-6)


REFUSED = [(("engine=plain",), 'lora.rank needs engine = "fast"'),
           (("sft.optimizer=muon",), 'optimizer = "muon" trains whole matrices'),
           (("dpo.optimizer=muon",), 'optimizer = "muon" trains whole matrices'),
           (('lora.targets=["q_proj"]',), "[lora]: targets must be some of q, k, v, o, gate, up, down, not ['q_proj']"),
           (("lora.targets=[]",), "[lora]: targets must be some of q, k"),
           (("lora.rank=-1",), "[lora]: rank must lie between 0 and 4096")]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_what_does_not_go_together_is_one_line(changes, message, tmp_path):
    assert message in refused(tmp_path, "lora.rank=4", *changes)
