"""Sharded training (`sharded = true`, with several processes): FSDP2, torch.distributed.fsdp.fully_shard.

Every process holds a part of the float32 weights, their gradients and the optimizer's state, and gathers the weights of
one block while it computes with that block. This is for models whose weights fit on one GPU, as sampling needs, but not
the many times larger state of their training. The trained weights are gathered in every process in the end, so a
sharded model is never sampled from or stored.
"""

import copy
from collections import Counter
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from minisr import InputError
from minisr.model import Decoder, upcast
from minisr.rng import derive_seed
from minisr.runner import processes
from minisr.runner.files import file_digest, write_json, writing
from minisr.runner.gradients import is_out_of_memory
from minisr.runner.journal import TrainingState, trained_tensors


def shard(model: Decoder) -> Decoder:
    """A copy of the model in float32, of which each process holds a part; it computes in the model's dtype.

    The units whose weights are gathered together are the blocks, and embedding, last norm and head. Each unit gets a
    method `call`: unit.call(function, *inputs) is function(*inputs) while the unit's weights are gathered. Everything
    that computes with a unit, in fast/forward.py the function run_block, must go through it."""
    weight = model.embed.weight
    dtype = upcast(weight[:0]).dtype
    mesh = init_device_mesh(weight.device.type, (processes.size(),))
    policy = MixedPrecisionPolicy(param_dtype=weight.dtype, reduce_dtype=dtype, cast_forward_inputs=False)
    sharded = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # new modules, the same weights
    for i, block in enumerate(model.blocks):  # one by one: only one whole block in float32 at a time
        sharded.blocks[i] = fully_shard(copy.deepcopy(block).to(dtype), mesh=mesh, mp_policy=policy)
    for name in ("embed", "norm", "head"):
        setattr(sharded, name, copy.deepcopy(getattr(model, name)).to(dtype))
    sharded.tie_weights()
    fully_shard(sharded, mesh=mesh, mp_policy=policy)
    for unit in (*sharded.blocks, sharded):
        unit.set_gradient_divide_factor(1.0)  # sum the processes' gradients: losses are shares of the batch's
        unit.set_force_sum_reduction_for_comms(True)
        unit.call = MethodType(call, unit)
        register_fsdp_forward_method(unit, "call")
    return sharded


def call(unit, function, *inputs):
    """function(*inputs), outputs cloned: FSDP hooks the outputs, and views such as chunks would lose the hooks."""
    outputs = function(*inputs)
    return tuple(x.clone() for x in outputs) if isinstance(outputs, tuple) else outputs


@torch.no_grad()
def gather_weights(sharded: Decoder, model: Decoder) -> Decoder:
    """A copy of `model` with the weights of a sharded one. All processes must call it."""
    gathered = copy.deepcopy(model)
    for weight, part in zip(gathered.parameters(), sharded.parameters(), strict=True):
        weight.copy_(part.full_tensor())
    return gathered


class ShardedState(TrainingState):
    """An unfinished sharded training: each of N processes stores its part in FOLDER/training-STEP.RANK-of-N.pt."""

    @property
    def parts(self) -> int:
        return processes.size()

    def path(self, step: int) -> Path:
        """The file of this process."""
        return self.folder / f"training-{step}.{processes.rank()}-of-{processes.size()}.pt"

    def save(self, log: list[dict], model, optimizer) -> None:
        path, weights, state = self.path(len(log)), trained_tensors(optimizer), optimizer.state_dict()
        state["state"] = {i: {name: local(value) for name, value in values.items()}
                          for i, values in state["state"].items()}
        with writing(path, each_process=True) as file:
            torch.save({"parameters": [local(weight) for weight in weights], "optimizer": state}, file)
        hashes = dict(processes.gather((path.name, file_digest(path))))
        write_json(self.index, {"made_from": self.fingerprint, "step": len(log), "log": log, "hash": hashes})
        processes.wait_for_all()
        if processes.is_main():
            for old in self.folder.glob("training-*.pt"):
                if old.name not in hashes:
                    old.unlink(missing_ok=True)

    def restore(self, model, optimizer) -> list[dict]:
        found = processes.value_of_main(self.read_index())
        if found is None:
            return []
        self.check_parts(found)
        path = self.path(found["step"])
        if processes.any_true(not path.exists() or file_digest(path) != found["hash"].get(path.name)):
            return []
        stored = torch.load(path, weights_only=True, map_location=model.device)
        weights = trained_tensors(optimizer)
        for weight, value in zip(weights, stored["parameters"], strict=True):
            weight.to_local().copy_(value)
        for i, values in stored["optimizer"]["state"].items():
            for name, value in values.items():
                values[name] = as_part(value, weights[i]) if value.dim() else value  # the number of steps is a scalar
        optimizer.load_state_dict(stored["optimizer"])
        return found["log"]


def local(value):
    """This process's part of a sharded tensor; any other value as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def as_part(value: Tensor, weight: DTensor) -> DTensor:
    """A tensor sharded like the weight, of which `value` is this process's part."""
    return DTensor.from_local(value, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride())


class ShardedTraining:
    """Mixed into FastLM: a copy shares the weights until it is trained, and is trained in shards."""

    training_state = ShardedState

    def copy(self):
        return copy.copy(self)

    def prepare_training(self, config):
        self.base, self.model = self.model, shard(self.model)
        return super().prepare_training(config)

    def fit(self, batches: list, make_loss_fns, config) -> list[dict]:
        try:
            log = super().fit(batches, make_loss_fns, config)
            self.model = gather_weights(self.model, self.base)
        except RuntimeError as error:
            if is_lost_connection(error):
                raise processes.ProcessLost from error
            raise
        del self.base
        return log

    def target_loss(self, examples):
        return self.gathered(super().target_loss, examples)

    def pair_logps(self, pairs):
        return self.gathered(super().pair_logps, pairs)

    def gathered(self, function, batch: list):
        """function(batch), which computes with the present model, sharded or not."""
        return self.model.call(function, batch) if hasattr(self.model, "call") else function(batch)

    def gradients_within_memory(self, optimizer, make_loss_fns, batch, config, seed) -> tuple[Counter, object]:
        """Replaces RunLM's. The processes take the micro-batches in turn. As they gather the weights together, all of
        them compute equally often: one without a micro-batch of its own adds the last one's gradient times 0."""
        loss_fns, metrics = make_loss_fns(batch, config), {}
        for first in range(0, len(loss_fns), processes.size()):
            own = first + processes.rank()
            index = min(own, len(loss_fns) - 1)
            torch.manual_seed(derive_seed(seed, index))  # of dropout: the same numbers in any process
            try:
                loss, values = loss_fns[index]()
                (loss * (own == index)).backward()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                # No second try with smaller micro-batches: the other processes cannot go back.
                raise InputError("not enough memory for the micro-batches of a sharded training; to resume with less "
                                 "memory, add --set SECTION.gradient_checkpointing=true or, without dropout, "
                                 "SECTION.micro_batch=1 to the same command (SECTION: sft or dpo)") from error
            if own == index:
                metrics[index] = Counter({"loss": loss.item(), **values})
        by_index = {index: values for part in processes.gather(metrics) for index, values in part.items()}
        total = Counter()
        for index in sorted(by_index):
            total.update(by_index[index])
        return total, config


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective operation of FSDP failed. Gloo's errors have no type of their own."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)
