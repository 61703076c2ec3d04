"""One process, as without torchrun; several of them are in tests/phases/test_distributed.py."""

import torch

from envs.run import ranks


def test_without_torchrun_there_is_one_process():
    assert ranks.rank() == 0
    assert ranks.world_size() == 1
    assert ranks.rank_seed(7) == 7
    assert ranks.join_ranks(cuda=False) == torch.device("cpu")
    assert ranks.gather("state") == ["state"]


def test_nothing_is_averaged_in_one_process():
    network = torch.nn.Linear(2, 1)
    network(torch.ones(3, 2)).sum().backward()
    gradient = network.weight.grad.clone()
    ranks.average_gradients(network)
    assert torch.equal(network.weight.grad, gradient)
    ranks.check_equal_parameters(network)
    sample = torch.tensor([1.0, 5.0])
    assert ranks.average(sample) is sample


def test_standardise():
    sample = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3.0 + 5.0
    standardised = ranks.standardise(sample)
    torch.testing.assert_close(standardised.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(standardised.std(), torch.tensor(1.0))
    torch.testing.assert_close(standardised, (sample - sample.mean()) / sample.std())
    assert (ranks.standardise(torch.full((4,), 2.0)) == 0).all()  # not NaN
