"""What the tests of parity share: random weights, names of another library, and relative differences."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


def randomised(model, seed, std=0.3):
    """In float64 and eval mode, every parameter random, so that no zero hides anything."""
    torch.manual_seed(seed)
    for parameter in model.double().parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval()


def renamed(state, pairs):
    """A state dict, or gradients, with every (pattern, name) applied in order; q, k and v parted where {qkv} stands."""
    names = {}
    for name, tensor in state.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        if "{qkv}" in name:
            names |= {name.replace("{qkv}", part): one for part, one in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            names[name] = tensor
    return names


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def logits_of(model, images):
    """The logits, or a stack of them if there are several."""
    output = model(images)
    output = getattr(output, "logits", output)
    return torch.stack(list(output)) if isinstance(output, (tuple, list)) else output


def relative_difference(mine, theirs):
    return ((mine - theirs).norm() / theirs.norm()).item()


def differences(ours, theirs, images, pairs):
    """The relative differences of the logits, and of the gradients of a function of them: the worst of all parameters.

    A gradient's difference is relative to the norm of all gradients, as that of a key's bias is zero. Both models have
    the same parameters, by name.
    """
    mine, others = logits_of(ours, images), logits_of(theirs, images)
    for model, logits in ((ours, mine), (theirs, others)):
        model.zero_grad()
        torch.cos(logits).sum().backward()
    found, wanted = renamed(gradients(ours), pairs), gradients(theirs)
    assert found.keys() == wanted.keys()
    whole = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    assert whole > 0
    return relative_difference(mine, others), max(((found[name] - gradient).norm() / whole).item()
                                                  for name, gradient in wanted.items())


@dataclass(frozen=True)
class Source:
    """What a file format is checked against, and a function that writes its file, as a Sample."""

    against: str
    write: Callable


def case(against, write, *positional, **options):
    """A Source whose function gets these arguments after the folder."""
    return Source(against, lambda folder: write(folder, *positional, **options))
