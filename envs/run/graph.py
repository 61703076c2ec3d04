"""A whole iteration as one CUDA graph."""

from collections.abc import Callable

import torch


def cuda_graph(function: Callable, module: torch.nn.Module, optimizer, generators) -> Callable:
    """Captures `function()` (no host synchronisation, fixed shapes) as one CUDA graph; returns a callable that replays
    it and returns the same output tensor, overwritten.

    Warming up runs the function for real, so parameters, optimiser state and generators are put back afterwards: the
    captured run does what the eager one would have done.
    """
    tensors = [*module.parameters(), *module.buffers()]
    contents = [tensor.detach().clone() for tensor in tensors]
    moments = {p: {name: v.clone() for name, v in state.items()} for p, state in optimizer.state.items()}
    states = [generator.get_state() for generator in generators]

    @torch.no_grad()
    def put_back() -> None:
        for tensor, content in zip(tensors, contents, strict=True):
            tensor.copy_(content)  # in place: the graph knows these tensors by address
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                old = moments.get(parameter)
                value.copy_(old[name]) if old else value.zero_()  # Adam's moments and step count start at zero
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    put_back()
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)  # or every replay would draw the same numbers
    with torch.cuda.graph(graph):
        output = function()
    put_back()

    def replay():
        graph.replay()
        return output

    return replay
