"""What test_distributed.py has torchrun start: torchrun --nproc-per-node 2 tests/ranks.py train, or die."""

import copy
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
from conftest import PHASES  # noqa: E402

import phase0_marlvol_calibration as calibrate  # noqa: E402
from envs import calibration, dynamics, marlvol, runs, smiles  # noqa: E402

PPO = ("phase1", "phase3", "phase4")


def arithmetic() -> None:
    """The averages over the ranks are those of all samples together."""
    everything = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) * 3 + 1
    own = everything[runs.rank()]
    expected = (everything - everything.mean()) / everything.std()
    torch.testing.assert_close(runs.standardise(own), expected[runs.rank()])
    assert runs.gather(runs.rank()) == [0, 1]
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
    (layer(torch.full((4, 3), 1.0 + runs.rank())).sum()).backward()
    runs.average_gradients(layer)
    torch.testing.assert_close(layer.weight.grad, torch.full((2, 3), 4 * 1.5))
    runs.check_equal_parameters(layer)
    with torch.no_grad():
        layer.bias[0] += 1e-7 + runs.rank()
    with pytest.raises(runs.DivergenceError, match="no longer hold the same parameters"):
        runs.check_equal_parameters(layer)


def train() -> None:
    """Every PPO phase for a few updates; each rank writes down what it ended with."""
    arithmetic()
    resume()
    phase0()
    for name in PPO:
        phase = PHASES[name]
        folder = Path(name)
        if runs.rank() == 0:
            folder.mkdir()
        torch.distributed.barrier()
        agent, steps = phase.train(phase.args(num_evaluations=2), folder)
        torch.save({"agent": agent.state_dict(), "steps": steps}, folder / f"rank{runs.rank()}.pt")


def phase0() -> None:
    """The calibration of phase 0, whose ranks explore on paths of their own."""
    calibration.REFERENCE_PATHS = calibration.VALIDATION_PATHS = marlvol.PARTICLES = 4096
    folder = Path("phase0")
    if runs.rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    args = calibrate.Args(num_players=200, num_runs=2, num_basis=10, num_iterations=3, num_evaluations=1)
    calibrate.resolve(args)
    game = calibrate.make_game(args, smiles.NAMED["sp500-2018"], torch.device("cpu"))
    agent, steps = calibrate.train(args, game, folder, torch.device("cpu"), None, None)
    torch.save({"agent": agent.state_dict(), "steps": steps}, folder / f"rank{runs.rank()}.pt")


def resume() -> None:
    """A run that goes on from the middle ends with the numbers of the whole one, on every rank."""
    phase, saves, write = PHASES["phase1"], [], runs.save_checkpoint
    folder = Path("resumed")
    if runs.rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    runs.save_checkpoint = lambda path, content: saves.append(copy.deepcopy(content))
    args, device = phase.args(), torch.device("cpu")
    whole, _ = phase.module.train(args, dynamics.GBM(), folder, device, None, None)
    again, _ = phase.module.train(args, dynamics.GBM(), folder, device, saves[2], None)
    runs.save_checkpoint = write
    assert 0 < saves[2]["iteration"] < saves[4]["iteration"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def die() -> None:
    """Rank 1 dies in its third update."""
    module, calls = PHASES["phase1"].module, []
    update = module.update

    def mortal(*arguments):
        calls.append(None)
        if runs.rank() == 1 and len(calls) == 3:
            os._exit(7)
        return update(*arguments)

    module.update = mortal
    runs.run(module.main, PHASES["phase1"].flags(num_evaluations=12))


if __name__ == "__main__":
    if sys.argv[1] == "train":
        runs.join_ranks(cuda=False)
    {"train": train, "die": die}[sys.argv[1]]()
