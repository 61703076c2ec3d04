"""A whole iteration as one CUDA graph."""

from collections.abc import Callable, Sequence

import torch


class CaptureError(RuntimeError):
    """A function that cannot be captured. What it changes is as it was."""


class _Before:
    """Parameters, optimiser state and generators as they are now, to be put back."""

    def __init__(self, module: torch.nn.Module, optimizer, generators: Sequence[torch.Generator]):
        self.tensors = [*module.parameters(), *module.buffers()]
        self.contents = [tensor.detach().clone() for tensor in self.tensors]
        self.optimizer = optimizer
        self.moments = {p: {name: v.clone() for name, v in state.items()} for p, state in optimizer.state.items()}
        self.generators = generators
        self.states = [generator.get_state() for generator in generators]

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, content in zip(self.tensors, self.contents, strict=True):
            tensor.copy_(content)  # in place: the graph knows these tensors by address
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                old = self.moments.get(parameter)
                value.copy_(old[name]) if old else value.zero_()  # Adam's moments and step count start at zero
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)

    def drawn_from(self) -> list[bool]:
        """For each generator whether it has been drawn from since."""
        pairs = zip(self.generators, self.states, strict=True)
        return [not torch.equal(generator.get_state(), state) for generator, state in pairs]

    def after_a_failure(self, reason: str) -> CaptureError:
        for generator in self.generators:
            if generator.device.type == "cuda":  # a state of its own, as the old one may wait for the capture's end
                generator.graphsafe_set_state(torch.Generator(generator.device).graphsafe_get_state())
        self.put_back()
        return CaptureError(reason)


def cuda_graph(
    function: Callable, module: torch.nn.Module, optimizer, generators: Sequence[torch.Generator]
) -> Callable:
    """Captures `function()` (no host synchronisation, fixed shapes) as one CUDA graph; returns a callable that replays
    it and returns the same output tensor, overwritten.

    Warming up runs the function for real, so parameters, optimiser state and generators are put back afterwards: the
    captured run does what the eager one would have done.

    Raises:
        CaptureError: CUDA refuses, or a replay would draw the same random numbers again.
    """
    before = _Before(module, optimizer, generators)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    expected = before.drawn_from()
    before.put_back()
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        if hasattr(graph, "register_generator_state"):  # which PyTorch may come to do by itself
            graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph):
            output = function()
        before.put_back()
        graph.replay()
        drawn = before.drawn_from()
    except Exception as error:  # of as many kinds as there are reasons
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise before.after_a_failure(reason) from None
    if drawn != expected:  # each replay would draw what the one before has drawn
        raise before.after_a_failure("its random numbers would be the same in every iteration")
    before.put_back()

    def replay():
        graph.replay()
        return output

    return replay
