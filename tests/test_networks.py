"""Networks side by side are those of torch.nn: the same values, the same gradients, the same files."""

import copy

import pytest
import torch
import torch.nn as nn

from envs import networks
from envs.networks import ActorCritic, Networks

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}
SIZES = {"actor": 3, "critic": 1}


def sequential(own: Networks, name: str, activation: str) -> nn.Sequential:
    """The same network of torch.nn, with the same parameters, read from the state dict."""
    state = {key.removeprefix(f"{name}."): value for key, value in own.state_dict().items() if key.startswith(name)}
    layers = [nn.Linear(*state[f"{i}.weight"].shape[::-1], dtype=own.vector.dtype) for i in (0, 2, 4)]
    hidden = ACTIVATIONS[activation]
    network = nn.Sequential(layers[0], hidden(), layers[1], hidden(), layers[2])
    network.load_state_dict(state)
    return network


def make(activation: str, dtype=torch.float64, outputs=SIZES) -> tuple[Networks, dict[str, nn.Sequential]]:
    torch.manual_seed(0)
    own = Networks(9, 16, outputs, activation).to(dtype)
    return own, {name: sequential(own, name, activation) for name in outputs}


def loss(outputs) -> torch.Tensor:
    """Not linear in any output."""
    return sum(((i + 1) * output.sin() + output.square()).mean() for i, output in enumerate(outputs))


def gradients(own: Networks, theirs: dict[str, nn.Sequential]) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the parameters of both, in the order of the state dict."""
    like = copy.deepcopy(own)
    with torch.no_grad():
        like.vector.copy_(own.vector.grad)
    of_theirs = [p.grad.flatten() for network in theirs.values() for p in network.parameters()]
    return torch.cat([value.flatten() for value in like.state_dict().values()]), torch.cat(of_theirs)


@pytest.mark.parametrize("rows", [1, 7, 64, 240, 1000])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize(("block", "fast_tanh"), [(1024, False), (128, True)])
def test_values_and_gradients_are_those_of_torch_nn(rows, activation, dtype, accuracy, block, fast_tanh, monkeypatch):
    monkeypatch.setattr(networks, "BLOCK", block)
    monkeypatch.setattr(networks, "FAST_TANH", fast_tanh)
    own, theirs = make(activation, dtype)
    x = torch.randn(rows, 9, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    outputs = own(x)
    expected = [network(y) for network in theirs.values()]
    close = {"rtol": accuracy, "atol": accuracy}
    for one, two in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, two, **close)
    loss(outputs).backward()
    loss(expected).backward()
    torch.testing.assert_close(x.grad, y.grad, **close)
    torch.testing.assert_close(*gradients(own, theirs), **close)


def test_backward_is_the_derivative_of_forward():
    own, _ = make("tanh")
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    vector = own.vector.detach().clone().requires_grad_()

    def function(x, vector):
        own.vector.data.copy_(vector)
        return networks._SideBySide.apply(x, vector, own, slice(None))

    torch.autograd.gradcheck(function, (x, vector))


def test_one_of_them_alone():
    own, theirs = make("tanh")
    x = torch.randn(20, 9, dtype=torch.float64)
    for name, network in theirs.items():
        with torch.no_grad():
            torch.testing.assert_close(own.only(name, x), network(x))
        own.zero_grad()
        for p in (p for other in theirs.values() for p in other.parameters()):
            p.grad = torch.zeros_like(p)
        own.only(name, x).square().sum().backward()
        network(x).square().sum().backward()
        torch.testing.assert_close(*gradients(own, theirs))


def test_gradients_add_up_over_calls_and_frozen_networks_have_none():
    own, theirs = make("relu")
    x = torch.randn(20, 9, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    (loss(own(x)) + loss(own(0.5 * x)) + loss(own(x, frozen=True))).backward()
    both = [network(y) for network in theirs.values()], [network(0.5 * y) for network in theirs.values()]
    (loss(both[0]) + loss(both[1])).backward()
    torch.testing.assert_close(*gradients(own, theirs))
    loss([network(y) for network in theirs.values()]).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_parameters_move_and_are_copied():
    """Whatever replaces the vector, the networks compute with what is in it."""
    own, _ = make("tanh", torch.float32)
    x = torch.randn(4, 9)
    before = own(x)
    copied = copy.deepcopy(own)
    with torch.no_grad():
        own.vector.mul_(0.5)
    assert not torch.equal(own(x)[0], before[0])
    assert torch.equal(copied(x)[0], before[0])
    own.load_state_dict(copied.state_dict())
    assert torch.equal(own(x)[0], before[0])
    torch.testing.assert_close(own.double()(x.double())[0].float(), before[0])
    own.vector.data = torch.zeros_like(own.vector)
    assert (own(x.double())[0] == 0).all()


def test_a_state_dict_that_does_not_fit_is_refused():
    own, _ = make("tanh")
    state = own.state_dict()
    assert list(state)[:3] == ["actor.0.weight", "actor.0.bias", "actor.2.weight"]
    with pytest.raises(RuntimeError, match=r"Missing.*critic.4.bias"):
        own.load_state_dict({name: value for name, value in state.items() if name != "critic.4.bias"})
    with pytest.raises(RuntimeError, match=r"actor.0.weight has the shape \(2, 2\), not \(16, 9\)"):
        own.load_state_dict({**state, "actor.0.weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match=r"Unexpected.*actor.6.bias"):
        own.load_state_dict({**state, "actor.6.bias": torch.zeros(2)})


def test_an_actor_critic_begins_as_cleanrls():
    torch.manual_seed(0)
    network = ActorCritic(9, 2, 64)
    for name, gain in (("actor", 0.01), ("critic", 1.0)):
        for (weight, bias), std in zip(network.layers(name), (2**0.5, 2**0.5, gain), strict=True):
            rows = weight if weight.shape[0] <= weight.shape[1] else weight.T
            torch.testing.assert_close(rows @ rows.T, std**2 * torch.eye(len(rows)), rtol=1e-5, atol=1e-5)
            assert (bias == 0).all()
    mean, value = network(torch.randn(5, 9))
    assert mean.shape == (5, 2)
    assert value.shape == (5,)


def test_clipping_is_that_of_torch_nn():
    own, _ = make("tanh")
    other = nn.Linear(3, 2, dtype=torch.float64)
    for largest in (0.1, 100.0):
        parameters = [own.vector, *other.parameters()]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        copies = [parameter.detach().clone().requires_grad_() for parameter in parameters]
        for one, two in zip(copies, parameters, strict=True):
            one.grad = two.grad.clone()
        norm = nn.utils.clip_grad_norm_(copies, largest)
        torch.testing.assert_close(networks.clip_gradients(parameters, largest), norm)
        for one, two in zip(copies, parameters, strict=True):
            torch.testing.assert_close(one.grad, two.grad)
