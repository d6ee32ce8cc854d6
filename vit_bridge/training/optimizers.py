"""Everything between gradients and a step: schedules, parameter groups, optimisers and averaged weights.

make_optimizer builds AdamW, or Muon with AdamW; learning_rate_at is the schedule; update_average keeps a moving
average of the weights; layer_lr_scales gives early layers smaller learning rates.

Shapes:  R rows and Q columns of a matrix, M matrices of one shape.
"""

import math
from collections import defaultdict

import torch

from vit_bridge.errors import InputError, check_choice
from vit_bridge.models.protocol import ask, class_name, is_ours, layer_groups

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear")
MUON_LR_SCALE = 5.0  # Muon's learning rate divided by AdamW's


def learning_rate_at(step, n_steps, warmup_steps, peak, schedule="cosine"):
    """Return the learning rate of a step, from 0 to n_steps - 1.

    It rises linearly and reaches the peak in the last warm-up step. Then it falls along half a cosine or a straight
    line, which would reach 0 in step n_steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, n_steps - warmup_steps)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)


def parameter_groups(model, weight_decay, lr_scales=None):
    """Return the trainable parameters in groups, by weight decay and learning-rate factor.

    Weight decay is 0 for vectors (biases, norms), for position embeddings and tokens (whose first dimension is 1),
    and for the parameters listed in the model's no_weight_decay. `lr_scales` is {parameter name: factor}, with 1 for
    the others; a group stores its factor as "lr_scale".

    Raises
    ------
    InputError
        If the model has no trainable parameter.
    """
    groups, exceptions = {}, ask(model, "no_weight_decay")
    for name, p in model.named_parameters():
        if p.requires_grad:
            plain = p.ndim < 2 or p.shape[0] == 1 or name in exceptions
            scale = (lr_scales or {}).get(name, 1.0)
            group = dict(params=[], weight_decay=0.0 if plain else weight_decay, lr_scale=scale)
            groups.setdefault((plain, scale), group)["params"].append(p)
    if not groups:
        raise InputError("the model has no trainable parameter; unfreeze at least its head")
    return [groups[key] for key in sorted(groups)]


@torch.no_grad()
def update_average(average, model, step, decay):
    """Move the weights of `average` towards the model's weights: w <- d w + (1 - d) w_model.

    d is min(decay, (1 + step) / (10 + step)), so that the weights of the first steps are soon forgotten. Floating-point
    buffers, such as the statistics of batch normalisation, are averaged too; integers, such as BatchNorm's count of
    batches, are copied.

    References
    ----------
    Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging", whose average is uniform.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([mean for mean, _ in floats], [value for _, value in floats], weight)
    for mean, value in pairs:
        if not mean.is_floating_point():
            mean.copy_(value)


# ---- Muon -------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Muon, an optimiser for the hidden matrices of a model.

    Let U S V^T be the singular value decomposition of a matrix's momentum. Gradient descent would step along it, mostly
    in the few directions with large singular values. Muon steps approximately along U V^T instead, in which all these
    directions have about the same length (see orthogonal).

    Parameters
    ----------
    groups : list of dict
        Groups of parameters, each a matrix (R, Q) or a convolution kernel, which counts as a matrix with one row for
        each output channel. "n_splits" in a group splits each of its matrices along the rows: 3 for a matrix that
        holds the queries, keys and values, so that each of the three is orthogonalised separately.
    lr : float
        Learning rate. The step of a full-rank matrix has a root mean square of about 0.2 lr, similar to AdamW's.
    momentum : float
        Nesterov momentum.
    weight_decay : float
        Decoupled weight decay.

    Notes
    -----
    torch.optim.Muon accepts neither kernels nor splits, and it multiplies in bfloat16, which is slow on a CPU without
    bfloat16 instructions: its step took 361 ms there, and this class's 16 ms (benchmarks/RESULTS.md#steps). This class
    uses bfloat16 only on CUDA, and multiplies all matrices of one shape together.

    References
    ----------
    Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    Liu et al. 2025, "Muon is Scalable for LLM Training", Eq. 4: the factor 0.2 sqrt(max(R, Q)).
    """

    def __init__(self, groups, lr=1e-2, momentum=0.95, weight_decay=0.0):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, n_splits=1))

    @torch.no_grad()
    def step(self):
        """Update all parameters that have a gradient."""
        by_shape = defaultdict(list)  # (R, Q): parts of parameters, their updates, their learning rates
        for group in self.param_groups:
            self.collect(group, by_shape)
        for (R, Q), rows in by_shape.items():
            parts, updates, lrs = zip(*rows, strict=True)
            for part, update, lr in zip(parts, orthogonal(torch.stack(updates)), lrs, strict=True):
                part.add_(update.view(part.shape), alpha=-lr * 0.2 * math.sqrt(max(R, Q)))

    def collect(self, group, by_shape):
        """Decay a group's weights, update their momentum, and collect the matrices in by_shape."""
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        gradients = [p.grad for p in weights]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for p, update in zip(weights, updates, strict=True):
            for part, matrix in zip(p.chunk(group["n_splits"]), update.chunk(group["n_splits"]), strict=True):
                matrix = matrix.flatten(1)  # (R, Q)
                by_shape[tuple(matrix.shape)].append((part, matrix, group["lr"]))


def orthogonal(matrices, n_rounds=5):
    """Push the singular values of matrices (M, R, Q) towards 1, by Newton-Schulz iterations.

    Each round computes X <- a X + b (X X^T) X + c (X X^T)^2 X. This keeps the singular vectors of X and maps each
    singular value s to a s + b s^3 + c s^5. X starts with a Frobenius norm of 1, so that every s is at most 1. After
    five rounds, a value that started above 0.0015 lies between 0.68 and 1.21. A smaller value has grown by a factor of
    at most a^5 = 485, so values near zero stay small, and a matrix of low rank keeps its low rank. More than 80% of the
    singular values of a random 96 x 96 matrix end between 0.7 and 1.2, but only 8% in a matrix of rank 8.

    The coefficients are Jordan's: a large slope at 0 lifts small values in few rounds, and the values never settle at
    exactly 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = matrices.bfloat16() if matrices.is_cuda else matrices
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    tall = X.shape[1] > X.shape[2]
    X = X.transpose(1, 2) if tall else X  # (M, R, Q), R <= Q
    for _ in range(n_rounds):
        A = X @ X.transpose(1, 2)  # (M, R, R)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # (M, R, Q)
    return (X.transpose(1, 2) if tall else X).to(matrices.dtype)  # (M, R, Q)


class CombinedOptimizer:
    """Several optimisers behind the interface of one, each with its own parameters."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self):
        return dict(optimizers=[optimizer.state_dict() for optimizer in self.optimizers])

    def load_state_dict(self, entries):
        for optimizer, entry in zip(self.optimizers, entries["optimizers"], strict=True):
            optimizer.load_state_dict(entry)


# ---- The optimiser of a model -----------------------------------------------------------------------------


def hidden_matrices(model):
    """Return {parameter: n_splits} of the trainable matrices and kernels that Muon updates.

    These are the weights between hidden layers. AdamW updates the first weight, which reads the pixels, the heads, the
    parameters listed in no_muon (models/protocol.py), position embeddings and tokens. n_splits is 3 for a weight named
    qkv, which holds the queries, keys and values.
    """
    weights = [(name, p) for name, p in model.named_parameters() if name.endswith("weight") and p.ndim in (2, 4)]
    exceptions, heads = ask(model, "no_muon"), ask(model, "head_names")
    return {p: 3 if name.endswith("qkv.weight") else 1 for name, p in weights[1:]
            if p.requires_grad and p.shape[0] > 1 and name not in exceptions and name.split(".")[0] not in heads}


def make_optimizer(name, model, weight_decay, lr_scales=None):
    """Return an optimiser over a model's trainable parameters.

    Parameters
    ----------
    name : {"adamw", "muon"}
        "muon" updates the hidden matrices with Muon, at MUON_LR_SCALE times the learning rate, and the rest with AdamW.
    model : Module
    weight_decay : float
        Each step shrinks a weight by learning rate times weight decay. See parameter_groups for the exceptions.
    lr_scales : dict, optional
        {parameter name: factor on its learning rate}.

    Raises
    ------
    InputError
        If the name is unknown, or the model has no trainable parameter.
    """
    check_choice("optimizer", name, OPTIMIZERS)
    groups = parameter_groups(model, weight_decay, lr_scales)
    if name == "adamw":
        return torch.optim.AdamW(groups)
    hidden, for_muon, for_adamw = hidden_matrices(model), [], []
    for group in groups:
        for n_splits in (1, 3):
            mine = dict(params=[p for p in group["params"] if hidden.get(p) == n_splits], n_splits=n_splits)
            for_muon.append(group | mine | dict(lr_scale=MUON_LR_SCALE * group["lr_scale"]))
        for_adamw.append(group | dict(params=[p for p in group["params"] if p not in hidden]))
    for_muon, for_adamw = ([group for group in groups if group["params"]] for groups in (for_muon, for_adamw))
    optimizers = [Muon(for_muon)] if for_muon else []
    return CombinedOptimizer(*optimizers, *([torch.optim.AdamW(for_adamw, foreach=True)] if for_adamw else []))


def layer_lr_scales(model, decay):
    """Return {parameter name: decay ** (layers between it and the head)}, for TrainConfig.lr_scales.

    The first layer is everything before the blocks: patch embedding or stem, tokens and positions. Each block or stage
    is a layer. The head and the norm before it form the last layer, with a factor of 1.

    Raises
    ------
    InputError
        If the model does not name its layers.

    References
    ----------
    Clark et al. 2020, ELECTRA; for ViTs Bao et al. 2022, BEiT.
    """
    if not is_ours(model):
        raise InputError(f"a {class_name(model)} does not name its layers, so layer decay does not apply to it; leave "
                         f"out layer decay")
    groups, n_layers = layer_groups(model), len(model.layers())
    return {name: decay ** (n_layers - layer) for name, layer in groups.items()}
