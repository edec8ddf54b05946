"""Sharded training (`sharded = true`, with several processes): FSDP2, torch.distributed.fsdp.fully_shard.

Every process holds a part of the float32 weights, their gradients and the optimizer's state, and gathers the weights of
one block while it computes with that block. This is for models whose weights fit on one GPU, as sampling needs, but not
the many times larger state of their training. The trained weights are gathered in every process in the end, so a
sharded model is never sampled from or stored.
"""

import copy
import shutil
from collections import Counter
from types import MethodType

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from minisr import InputError
from minisr.model import Decoder, upcast
from minisr.rng import derive_seed
from minisr.runner import processes
from minisr.runner.files import file_digest, read_json, write_json
from minisr.runner.journal import TrainingState


def shard(model: Decoder) -> Decoder:
    """A copy of the model in float32, of which each process holds a part; it computes in the model's dtype.

    The units whose weights are gathered together are the blocks, and embedding, last norm and head. Hooks of FSDP
    gather them, around unit.call(function, ...) for any function that computes with the unit."""
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
    """The hooks of FSDP on the result would be lost on views, so it holds none."""
    result = function(*inputs)
    return tuple(x.clone() for x in result) if isinstance(result, tuple) else result


@torch.no_grad()
def gather_weights(sharded: Decoder, model: Decoder) -> Decoder:
    """A copy of `model` with the weights of a sharded one. All processes must call it."""
    gathered = copy.deepcopy(model)
    for weight, part in zip(gathered.parameters(), sharded.parameters(), strict=True):
        weight.copy_(part.full_tensor())
    return gathered


class ShardedState(TrainingState):
    """An unfinished sharded training: every process writes its part into the folder training-STEP.sharded."""

    def path(self, step: int):
        return self.folder / f"training-{step}.sharded"

    def save(self, log: list[dict], model, optimizer) -> None:
        step = len(log)
        if processes.is_main():
            shutil.rmtree(self.path(step), ignore_errors=True)  # of a process that was killed
        processes.wait_for_all()
        weights, optimizer_state = get_state_dict(model, optimizer)
        try:
            dcp.save({"model": weights, "optimizer": optimizer_state}, checkpoint_id=self.path(step))
        except dcp.CheckpointException as error:
            raise InputError(f"cannot write {self.path(step)}; free some space, then run the same command again to "
                             "resume") from error
        names = processes.agree(sorted(path.name for path in self.path(step).iterdir()))
        digests = self.share_digests(names, step)
        write_json(self.index, {"made_from": self.fingerprint, "step": step, "log": log, "hash": digests})
        processes.wait_for_all()
        if processes.is_main():
            for old in self.folder.glob("training-*.sharded"):
                if old != self.path(step):
                    shutil.rmtree(old)

    def restore(self, model, optimizer) -> list[dict]:
        found = processes.agree(self.read_index())
        if found is None or self.share_digests(list(found["hash"]), found["step"]) != found["hash"]:
            return []
        weights, optimizer_state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": optimizer_state}, checkpoint_id=self.path(found["step"]))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=optimizer_state)
        return found["log"]

    def read_index(self) -> dict | None:
        """The content of training.json, if it describes a state of this training."""
        try:
            found = read_json(self.index, "training state")
            is_mine = found["made_from"] == self.fingerprint and isinstance(found["hash"], dict)
            return found if is_mine and self.path(found["step"]).is_dir() else None
        except (InputError, LookupError, TypeError):
            return None

    def share_digests(self, names: list[str], step: int) -> dict[str, str | None]:
        """The digest of each of these files of a state, None if it is missing. The processes share the work."""
        mine = {}
        for name in names[processes.rank()::processes.size()]:
            path = self.path(step) / name
            mine[name] = file_digest(path) if path.exists() else None
        return {name: digest for part in processes.gather(mine) for name, digest in part.items()}


class ShardedTraining:
    """Mixed into FastLM: a copy shares the weights until it is trained, and is trained in shards."""

    training_state = ShardedState

    def copy(self):
        return copy.copy(self)

    def prepare_training(self, config):
        self.base, self.model = self.model, shard(self.model)
        return super().prepare_training(config)

    def fit(self, batches: list, loss_fn, config) -> list[dict]:
        log = super().fit(batches, loss_fn, config)
        self.model = gather_weights(self.model, self.base)
        del self.base
        return log

    def target_loss(self, examples):
        return self.gathered(super().target_loss, examples)

    def pair_logps(self, pairs):
        return self.gathered(super().pair_logps, pairs)

    def gathered(self, function, batch: list):
        """function(batch), which computes with the present model, sharded or not."""
        return self.model.call(function, batch) if hasattr(self.model, "call") else function(batch)

    def gradients_within_memory(self, optimizer, loss_fn, batch, config, seed) -> tuple[Counter, object]:
        """Replaces RunLM's. The processes take the micro-batches in turn. As they gather the weights together, all of
        them compute equally often: one without a micro-batch of its own adds the last one's gradient times 0."""
        losses, metrics = loss_fn(batch, config), {}
        for first in range(0, len(losses), processes.size()):
            own = first + processes.rank()
            index = min(own, len(losses) - 1)
            torch.manual_seed(derive_seed(seed, index))  # of dropout: the same numbers in any process
            try:
                loss, values = losses[index]()
                (loss * (own == index)).backward()
            except torch.OutOfMemoryError as error:  # the other processes cannot go back
                raise InputError("not enough memory for the micro-batches of a sharded training; try a new run with a "
                                 "smaller micro_batch or gradient_checkpointing = true") from error
            if own == index:
                metrics[index] = Counter({"loss": loss.item(), **values})
        by_index = {index: values for part in processes.gather(metrics) for index, values in part.items()}
        total = Counter()
        for index in sorted(by_index):
            total.update(by_index[index])
        return total, config
