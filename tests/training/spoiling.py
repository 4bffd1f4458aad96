"""Runs whose numbers go wrong: for the tests of watching them."""

import math
from unittest import mock

import torch
import torch.distributed as dist

from megatron_sat.testing.training import train
from megatron_sat.training.display import Display
from megatron_sat.training.loop import Trainer
from megatron_sat.training.replicas import bit_hash
from megatron_sat.training.watch import local_part


def everything(engine) -> list[torch.Tensor]:
    """What this rank has of parameters, master weights and optimizer states, copied."""
    tensors = [local_part(parameter) for parameter in engine.module.parameters()]
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for master, states in inner.state.items():
        tensors += [master.detach(), *(v for v in states.values() if torch.is_tensor(v))]
    return [tensor.clone() for tensor in tensors]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(bit_hash(one), bit_hash(other)) for one, other in pairs)


class Spoiler:
    """Makes the loss (in steps `losses`) or one gradient (in steps `gradients`) of the last rank
    infinite, and keeps of each step whether anything changed, and all messages of rank 0."""

    def __init__(self, losses=(), gradients=()):
        self.losses, self.gradients = losses, gradients
        self.changed, self.messages = [], []
        self.step = 0

    def run(self, argv: list[str]) -> "Spoiler":
        train_step, loss, on = Trainer.train_step, Trainer._loss, self
        last = dist.get_rank() == dist.get_world_size() - 1

        def spoil(gradient):
            if on.step in on.gradients:
                gradient = gradient.clone()
                gradient[3, 5] = math.inf
            return gradient

        def watch(trainer, batches):
            if not on.step and last:
                trainer.engine.module.decoder.layers[1].mlp.linear_fc1.weight.register_hook(spoil)
            on.step += 1
            before = everything(trainer.engine)
            train_step(trainer, batches)
            on.changed.append(on.step == 1 or not same(before, everything(trainer.engine)))

        def spoiled_loss(trainer, batch):
            total, count = loss(trainer, batch)
            if last and on.step in on.losses and trainer.engine.training:
                # Not through the graph: its gradients alone would be finite.
                total = total + torch.tensor(math.inf)
            return total, count

        with (
            mock.patch.object(Trainer, "train_step", watch),
            mock.patch.object(Trainer, "_loss", spoiled_loss),
            mock.patch("megatron_sat.training.run.open_display", lambda **_: Recorder(on)),
        ):
            train(argv)
        return self


class Recorder(Display):
    def __init__(self, spoiler: Spoiler):
        self.spoiler = spoiler

    def message(self, text: str) -> None:
        self.spoiler.messages.append(text)
