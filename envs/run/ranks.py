"""Data-parallel training, as torchrun starts it: its processes, the ranks, train one agent together. Only rank 0 prints
and writes."""

import os
import signal
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from envs.run.errors import DivergenceError, RankLost, check


def rank() -> int:
    """Which process of this torchrun this is: 0, the one that prints and writes, without torchrun."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def world_size() -> int:
    """How many processes torchrun has started; 1 without."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank_seed(seed: int) -> int:
    """Seed of this rank's own stream of random numbers; `seed` itself on rank 0."""
    return seed + 100_000_000 * rank()  # beyond every other seed


def join_ranks(cuda: bool) -> torch.device:
    """The device of this process: a GPU if `cuda` and there is one, each rank its own, else the CPU.

    Under torchrun the processes meet here (nccl on GPUs, gloo on CPUs), and the output of all but rank 0 is dropped.

    Raises:
        UsageError: more processes than GPUs.
    """
    cuda = cuda and torch.cuda.is_available()
    if world_size() == 1:
        return torch.device("cuda" if cuda else "cpu")

    def stopped(signum, frame):
        raise RankLost("torchrun has stopped this run: one of its processes died, or it was told to")

    signal.signal(signal.SIGTERM, stopped)
    device = torch.device("cpu")
    if cuda:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        gpus = torch.cuda.device_count()
        check(local <= gpus, f"--nproc-per-node is {local} (at most the {gpus} GPUs there are)")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)
    return device


def leave_ranks() -> None:
    """Ends this process's part in torchrun. Without it gloo's threads may abort a process that exits before others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def collective(function: Callable):
    """Calls `function`, which talks to the other ranks.

    Raises:
        RankLost: one of them does not answer.
    """
    try:
        return function()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RankLost(f"a process of this torchrun has died ({reason})") from None


def from_rank_0(value):
    """`value` of rank 0, on every rank."""
    values = [value]
    collective(lambda: dist.broadcast_object_list(values))
    return values[0]


def gather(value) -> list:
    """`value` of every rank, in their order; `[value]` without torchrun. For checkpoints."""
    values = [value] * world_size()
    if world_size() > 1:
        collective(lambda: dist.all_gather_object(values, value))
    return values


def average(tensor: torch.Tensor) -> torch.Tensor:
    """Mean of `tensor` over the ranks, on each of them."""
    if world_size() > 1:
        collective(lambda: dist.all_reduce(tensor))
        tensor = tensor / world_size()
    return tensor


def average_gradients(module: torch.nn.Module) -> None:
    """Puts the mean over the ranks in the place of each gradient: one message for all of them."""
    if world_size() > 1:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        mean = average(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def standardise(sample: torch.Tensor) -> torch.Tensor:
    """`sample` (n, …) less its mean over n, over its standard deviation; both those of all ranks' samples together."""
    if world_size() == 1:
        return (sample - sample.mean(0)) / (sample.std(0) + 1e-8)
    n = world_size() * len(sample)
    mean, square = average(torch.stack((sample.mean(0), sample.square().mean(0))))
    return (sample - mean) / (((square - mean**2) * n / (n - 1)).clamp(min=0).sqrt() + 1e-8)


def check_equal_parameters(module: torch.nn.Module) -> None:
    """Raises `DivergenceError` unless parameters and buffers are the same, bitwise, on every rank."""
    if world_size() > 1:
        own = torch.cat([value.flatten() for value in module.state_dict().values()]).nan_to_num()
        extremes = torch.cat((own, -own))
        collective(lambda: dist.all_reduce(extremes, dist.ReduceOp.MAX))
        if not torch.equal(extremes, torch.cat((own, -own))):
            raise DivergenceError("the processes of this torchrun no longer hold the same parameters")
