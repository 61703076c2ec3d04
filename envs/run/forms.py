"""What a saved value must look like before it takes the place of another."""

from collections.abc import Iterator

import torch

from envs.run.ranks import rank

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # what Adam remembers of a parameter


def tensors_in(content) -> Iterator[torch.Tensor]:
    """All tensors in dicts, lists and tuples of them."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for value in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(value)


def same_form(saved, own) -> bool:
    """Whether a saved value has the keys, lengths, types, shapes and dtypes of `own`, all the way down."""
    if isinstance(own, torch.Tensor):
        return isinstance(saved, torch.Tensor) and saved.shape == own.shape and saved.dtype == own.dtype
    if isinstance(own, dict):
        same = isinstance(saved, dict) and saved.keys() == own.keys()
        return same and all(same_form(saved[name], value) for name, value in own.items())
    if isinstance(own, list | tuple):
        same = type(saved) is type(own) and len(saved) == len(own)
        return same and all(map(same_form, saved, own))
    return type(saved) is type(own)


def fits(thing, saved) -> bool:
    """Whether what a checkpoint has can be restored into a module, optimizer, generator or dict (see `Run.keep`).

    A dict may have other names, but no value that is unlike all of its own.
    """
    if isinstance(thing, torch.Generator):
        states = saved if isinstance(saved, list) else []  # of every process
        return len(states) > rank() and same_form(states[rank()], thing.get_state())
    if isinstance(thing, torch.optim.Optimizer):
        return _fits_optimizer(thing, saved)
    if isinstance(thing, torch.nn.Module):
        return same_form(saved, thing.state_dict())
    if isinstance(thing, dict):
        known = list(thing.values())
        return isinstance(saved, dict) and all(
            isinstance(name, str) and any(same_form(value, own) for own in known) for name, value in saved.items()
        )
    return True


def _fits_optimizer(optimizer: torch.optim.Optimizer, saved) -> bool:
    """Whether settings and moments have the form of this optimizer's own; torch looks at neither."""
    own = optimizer.state_dict()
    if not (isinstance(saved, dict) and isinstance(saved.get("state"), dict)):
        return False
    if not same_form({**saved, "state": {}}, {**own, "state": {}}):
        return False
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own["param_groups"]]:
        return False
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    for number, moments in saved["state"].items():
        if number not in parameters or not isinstance(moments, dict):
            return False
        if isinstance(optimizer, torch.optim.Adam) and moments.keys() != MOMENTS:
            return False
        like = parameters[number]
        of_step = like.new_empty(())
        if not all(same_form(moment, of_step if name == "step" else like) for name, moment in moments.items()):
            return False
    return True
