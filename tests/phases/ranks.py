"""What test_distributed.py has torchrun start: torchrun --nproc-per-node 2 tests/phases/ranks.py train, or die."""

import copy
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import pytest  # noqa: E402
import torch  # noqa: E402
from common import PHASES  # noqa: E402

from envs.benchmark import calibration as judging  # noqa: E402
from envs.run import run  # noqa: E402
from envs.run.errors import DivergenceError  # noqa: E402
from envs.run.ranks import average_gradients, check_equal_parameters, gather, join_ranks, leave_ranks, rank, standardise  # noqa: E402
from envs.run.run import Run, run_main  # noqa: E402


def arithmetic() -> None:
    """The averages over the ranks are those of all samples together."""
    everything = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) * 3 + 1
    own = everything[rank()]
    expected = (everything - everything.mean()) / everything.std()
    torch.testing.assert_close(standardise(own), expected[rank()])
    assert gather(rank()) == [0, 1]
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
    (layer(torch.full((4, 3), 1.0 + rank())).sum()).backward()
    average_gradients(layer)
    torch.testing.assert_close(layer.weight.grad, torch.full((2, 3), 4 * 1.5))
    check_equal_parameters(layer)
    with torch.no_grad():
        layer.bias[0] += 1e-7 + rank()
    with pytest.raises(DivergenceError, match="no longer hold the same parameters"):
        check_equal_parameters(layer)


def new_folder(name: str) -> Path:
    """A folder that rank 0 has made."""
    if rank() == 0:
        Path(name).mkdir()
    torch.distributed.barrier()
    return Path(name)


def train() -> None:
    """Every PPO phase for a few updates; each rank writes down what it ended with."""
    arithmetic()
    resume()
    judging.VALIDATION_PATHS = 4096
    PHASES["phase4"].module.EPISODES = 64
    for name in ("phase0", "phase1", "phase4"):  # phase 3 has the code of 1 and 4
        phase = PHASES[name]
        folder = new_folder(name)
        agent = phase.train(phase.args(3 if name == "phase0" else 6, num_evaluations=2), folder)
        torch.save(agent.state_dict(), folder / f"rank{rank()}.pt")
    torch.distributed.barrier()
    leave_ranks()


def resume() -> None:
    """A run that goes on from the middle ends with the numbers of the whole one, on every rank."""
    phase = PHASES["phase1"]
    saves = []
    write = run.save_checkpoint
    folder = new_folder("resumed")
    run.save_checkpoint = lambda path, content: saves.append(copy.deepcopy(content))
    args = phase.args()
    market = phase.market(args)
    whole = phase.module.train(phase.run(args, folder), *market)
    args.resume = str(folder)
    again = phase.module.train(Run(args, "phase1", "cpu", folder, checkpoint=saves[2], trained=args), *market)
    run.save_checkpoint = write
    assert 0 < saves[2]["iteration"] < saves[4]["iteration"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def die() -> None:
    """Rank 1 dies in its third update."""
    module = PHASES["phase1"].module
    calls = []
    update = module.update

    def mortal(*arguments):
        calls.append(None)
        if rank() == 1 and len(calls) == 3:
            os._exit(7)
        return update(*arguments)

    module.update = mortal
    run_main(module.main, PHASES["phase1"].flags(num_evaluations=12))


if __name__ == "__main__":
    if sys.argv[1] == "train":
        join_ranks(cuda=False)
    {"train": train, "die": die}[sys.argv[1]]()
