"""Small networks that are fast on a CPU: actor and critic, or twin critics, computed side by side.

    network = ActorCritic(inputs=9, actions=2, hidden=64)
    mean, value = network(observation)      (n, 2), (n,)
    mean = network.actor(observation)       the actor alone, as a rollout needs it

Values and gradients are those of an `nn.Sequential` of `nn.Linear` and `nn.Tanh` for each network. Any loss works on
them, and any module with the same methods can take their place. They are faster because

- all parameters lie in one vector, so that clipping, Adam and moving averages are a few operations;
- networks of the same inputs share each product, and the backward pass is written out (`_SideBySide`);
- the last layer is computed as Vhᵀ, several times faster than hVᵀ where there are few outputs;
- tanh(x) is 2σ(2x) − 1 (right to 2e-7) where that is faster: PyTorch calls Intel's library for tanh, which takes up to
  five times as long as σ on processors without AVX-512 or not by Intel;
- large batches are worked on in blocks that stay in the processor's cache.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn as nn

Tensor = torch.Tensor

BLOCK = 1024  # rows that are worked on at a time, on a CPU
CPU = Path("/proc/cpuinfo")
FAST_TANH = CPU.is_file() and all(word in CPU.read_text() for word in ("GenuineIntel", "avx512f"))
MINUS_ONE = torch.tensor(-1.0)


def tanh_layer(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """tanh(x weight + bias) of a batch of matrices."""
    if FAST_TANH or not x.is_cpu:
        return torch.baddbmm(bias, x, weight).tanh_()
    y = torch.baddbmm(bias, x, weight, beta=2, alpha=2).sigmoid_()
    return torch.add(MINUS_ONE, y, alpha=2, out=y)


def relu_layer(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """max(x weight + bias, 0) of a batch of matrices."""
    return torch.baddbmm(bias, x, weight).relu_()


def relu_backward(gradient: Tensor, y: Tensor) -> Tensor:
    """Gradient with respect to x where `gradient` is that with respect to y = max(x, 0)."""
    return torch.ops.aten.threshold_backward(gradient, y, 0)


ACTIVATIONS = {"tanh": (tanh_layer, torch.ops.aten.tanh_backward), "relu": (relu_layer, relu_backward)}


class Weights(NamedTuple):
    """The parameters of k networks, hidden layers transposed for x W + a."""

    w: Tensor  # (k, inputs, hidden)
    a: Tensor  # (k, 1, hidden)
    u: Tensor  # (k, hidden, hidden)
    b: Tensor  # (k, 1, hidden)
    v: list[Tensor]  # k of (outputs, hidden)
    c: list[Tensor]  # k of (outputs, 1)

    @classmethod
    def of(cls, parts: list[Tensor], which: slice) -> Self:
        """From `Networks.cut`."""
        w, a, u, b, *last = parts
        w, u = w[which].transpose(1, 2), u[which].transpose(1, 2)
        return cls(w, a[which], u, b[which], last[::2][which], last[1::2][which])

    def compute(self, x: Tensor, layer) -> tuple[Tensor, Tensor, list[Tensor]]:
        """x (n, inputs) → values of the hidden layers, both (k, n, hidden), and outputs, k of (outputs, n)."""
        first = layer(self.a, x.expand(len(self.a), -1, -1), self.w)
        second = layer(self.b, first, self.u)
        outputs = [torch.addmm(c, v, y.t()) for c, v, y in zip(self.c, self.v, second.unbind(), strict=True)]
        return first, second, outputs


class _SideBySide(torch.autograd.Function):
    """x (n, inputs), the vector of all parameters → outputs of these networks of `Networks`, (n, its outputs)."""

    @staticmethod
    def forward(ctx, x: Tensor, vector: Tensor, networks: "Networks", which: slice) -> tuple[Tensor, ...]:
        weights = networks.weights(which)
        blocks = [weights.compute(rows, networks.layer) for rows in networks.blocks(x)]
        ctx.save_for_backward(x, vector, *(hidden for first, second, _ in blocks for hidden in (first, second)))
        ctx.networks = networks
        ctx.which = which
        return networks.join([outputs for _, _, outputs in blocks])

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        networks = ctx.networks
        weights = networks.weights(ctx.which)
        x, _, *hidden = ctx.saved_tensors
        of_x, of_vector, *_ = ctx.needs_input_grad
        rows = networks.blocks(x)
        outputs = zip(*(networks.blocks(gradient) for gradient in gradients), strict=True)
        x_blocks = []
        total = None
        for x, first, second, output in zip(rows, hidden[::2], hidden[1::2], outputs, strict=True):
            gradient = torch.empty_like(second)
            for part, of_output, v in zip(gradient.unbind(), output, weights.v, strict=True):
                torch.mm(of_output, v, out=part)
            gradient_2 = networks.slope(gradient, second)
            gradient_1 = networks.slope(torch.bmm(gradient_2, weights.u.transpose(1, 2)), first)
            if of_x:
                x_blocks.append(torch.bmm(gradient_1, weights.w.transpose(1, 2)).sum(0))
            if of_vector:
                parts = [
                    # as (xᵀ g)ᵀ, up to four times as fast as gᵀ x where inputs are few
                    torch.bmm(x.t().expand(len(weights.a), -1, -1), gradient_1).transpose(1, 2),
                    gradient_1.sum(1),
                    torch.bmm(gradient_2.transpose(1, 2), first),
                    gradient_2.sum(1),
                ]
                for of_output, y in zip(output, second.unbind(), strict=True):
                    parts += [of_output.t() @ y, of_output.sum(0)]
                of_block = torch.cat([part.flatten() for part in parts])
                total = of_block if total is None else total.add_(of_block)
        if of_vector and len(weights.a) < len(networks.names):
            total = networks.spread(total, ctx.which)
        return torch.cat(x_blocks) if of_x else None, total, None, None


class Networks(nn.Module):
    """Networks of two hidden layers and the same inputs, side by side: y_k = V_k f(U_k f(W_k x + a_k) + b_k) + c_k.

    Parameters begin as those of `nn.Linear` do. `layers` gives them as views, to set or look at. In a `state_dict` they
    have the names and shapes of an `nn.Sequential` for each network: "actor.0.weight", "actor.0.bias" and so on.

    Args:
        inputs: numbers that the networks see.
        hidden: width of both hidden layers of each network.
        outputs: name of a network → how many numbers it puts out.
        activation: f, "tanh" or "relu".

    Attributes:
        vector: all parameters, in one `nn.Parameter`.
    """

    def __init__(self, inputs: int, hidden: int, outputs: Mapping[str, int], activation: str = "tanh"):
        super().__init__()
        self.names = list(outputs)
        self.layer, self.slope = ACTIVATIONS[activation]
        k = len(outputs)
        self.shapes = [(k, hidden, inputs), (k, 1, hidden), (k, hidden, hidden), (k, 1, hidden)]
        for size in outputs.values():
            self.shapes += [(size, hidden), (size, 1)]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.vector = nn.Parameter(torch.empty(sum(self.sizes)))
        self.place = None  # where the parameters were when `weights` were cut from them
        for name in outputs:
            for weight, bias in self.layers(name):
                bound = weight.shape[1] ** -0.5
                nn.init.uniform_(weight, -bound, bound)
                nn.init.uniform_(bias, -bound, bound)

    def cut(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector of all parameters: W, a, U, b of all networks, then V and c of each."""
        parts = vector.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def spread(self, part: Tensor, which: slice) -> Tensor:
        """The vector of all parameters, with those of some networks from `part` and 0 elsewhere."""
        total = part.new_zeros(sum(self.sizes))
        w, a, u, b, *last = self.cut(total)
        last = list(zip(last[::2], last[1::2], strict=True))[which]
        places = [w[which], a[which], u[which], b[which], *(x for pair in last for x in pair)]
        for place, own in zip(places, part.split([x.numel() for x in places]), strict=True):
            place.copy_(own.view_as(place))
        return total

    def layers(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Weight (outputs, inputs) and bias (outputs,) of the three layers of a network, as views of the parameters."""
        i = self.names.index(name)
        w, a, u, b, *last = self.cut(self.vector.detach())
        v, c = last[2 * i : 2 * i + 2]
        return [(w[i], a[i, 0]), (u[i], b[i, 0]), (v, c[:, 0])]

    def weights(self, which: slice) -> Weights:
        """The weights of some networks. They are cut out of the parameters again if these have moved to another device,
        or in a copy."""
        if self.place != self.vector.data_ptr():
            self.cuts = {}
            self.place = self.vector.data_ptr()
        key = (which.start, which.stop)
        if key not in self.cuts:
            self.cuts[key] = Weights.of(self.cut(self.vector.detach()), which)
        return self.cuts[key]

    @staticmethod
    def blocks(x: Tensor) -> tuple[Tensor, ...]:
        """x (n, …) in the blocks of rows that are worked on at a time."""
        return (x,) if len(x) <= BLOCK or not x.is_cpu else x.split(BLOCK)

    @staticmethod
    def join(blocks: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """Blocks of the outputs of every network, (outputs, rows) → the outputs of every network, (n, outputs)."""
        if len(blocks) == 1:
            return tuple(output.t() for output in blocks[0])
        return tuple(torch.cat(outputs, 1).t() for outputs in zip(*blocks, strict=True))

    def forward(self, x: Tensor, frozen: bool = False) -> tuple[Tensor, ...]:
        """x (n, inputs) → outputs of every network, (n, its outputs).

        With `frozen` no gradient reaches the parameters, only x.
        """
        return _SideBySide.apply(x, self.vector.detach() if frozen else self.vector, self, slice(None))

    def only(self, name: str, x: Tensor) -> Tensor:
        """x (n, inputs) → outputs of one network, (n, its outputs)."""
        i = self.names.index(name)
        which = slice(i, i + 1)
        if torch.is_grad_enabled():
            return _SideBySide.apply(x, self.vector, self, which)[0]
        weights = self.weights(which)
        return self.join([weights.compute(rows, self.layer)[2] for rows in self.blocks(x)])[0]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name in self.names:
            for i, (weight, bias) in enumerate(self.layers(name)):
                destination[f"{prefix}{name}.{2 * i}.weight"] = weight
                destination[f"{prefix}{name}.{2 * i}.bias"] = bias

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        own = {}
        self._save_to_state_dict(own, prefix, keep_vars=False)
        for name, value in own.items():
            if name not in state_dict:
                missing.append(name)
            elif state_dict[name].shape != value.shape:
                errors.append(f"{name} has the shape {tuple(state_dict[name].shape)}, not {tuple(value.shape)}")
            else:
                value.copy_(state_dict[name])
        unexpected += [name for name in state_dict if name.startswith(prefix) and name not in own]


class ActorCritic(Networks):
    """Means of a policy and a value function: tanh networks of two hidden layers, with the initial weights of CleanRL.

    Weights are orthogonal, with a gain of √2 in the hidden layers, 0.01 at the actor's outputs and 1 at the critic's.
    Biases are 0.

    Args:
        inputs: numbers of an observation.
        actions: numbers of an action.
        hidden: width of the hidden layers.
    """

    def __init__(self, inputs: int, actions: int, hidden: int):
        super().__init__(inputs, hidden, {"actor": actions, "critic": 1})
        for name, gain in (("actor", 0.01), ("critic", 1.0)):
            for (weight, bias), std in zip(self.layers(name), (2**0.5, 2**0.5, gain), strict=True):
                nn.init.orthogonal_(weight, std)
                nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, inputs) → means (n, actions) and values (n,)."""
        mean, value = super().forward(x)
        return mean, value[:, 0]

    def actor(self, x: Tensor) -> Tensor:
        """x (n, inputs) → means (n, actions)."""
        return self.only("actor", x)

    def critic(self, x: Tensor) -> Tensor:
        """x (n, inputs) → values (n,)."""
        return self.only("critic", x)[:, 0]


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scales all gradients by one number so that their norm is at most `largest`; returns what it was.

    As `nn.utils.clip_grad_norm_`, in fewer operations.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
    excess = (norm / largest).clamp_(min=1.0)
    for gradient in gradients:
        gradient.div_(excess)
    return norm


class Adam(torch.optim.Adam):
    """`torch.optim.Adam` (Kingma & Ba 2015), fused, without what takes longer than the update of a small network.

    The learning rate is a tensor, so that a captured update sees it change.

    Args:
        parameters: all on one device.
        lr: learning rate.
        eps: term of the denominator.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, eps: float = 1e-8):
        parameters = list(parameters)
        device = parameters[0].device
        super().__init__(
            parameters, lr=torch.tensor(lr, device=device), eps=eps, fused=True, capturable=device.type == "cuda"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            parameters, gradients, means, squares, steps = [], [], [], [], []
            self._init_group(group, parameters, gradients, means, squares, [], steps)
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(
                parameters, gradients, means, squares, [], steps, lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=0.0, eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip

    step.hooked = True  # or torch wraps it in a record for profilers, which takes three times as long as the step


def minibatches(batch: NamedTuple, number: int, generator: torch.Generator) -> Iterator[NamedTuple]:
    """A named tuple of columns (n,) or (n, width) in random order, in `number` parts of it.

    All rows are gathered at once: that is far faster than for every minibatch.
    """
    columns = [column.unsqueeze(-1) if column.ndim == 1 else column for column in batch]
    rows = torch.cat(columns, -1)
    if rows.is_cpu:
        order = torch.randperm(len(rows), generator=generator)
    else:  # as a CUDA graph can capture it
        order = torch.rand(len(rows), generator=generator, device=rows.device).argsort()
    widths = [column.shape[-1] for column in columns]
    for part in rows[order].chunk(number):
        parts = part.split(widths, -1)
        yield type(batch)(*(x[:, 0] if y.ndim == 1 else x for x, y in zip(parts, batch, strict=True)))
