"""From gradients to a step: the learning rate, the groups of parameters, Muon beside AdamW, the average of weights.

Shapes:  R rows and Q columns of a matrix, M matrices of one shape.
"""

import math
from collections import defaultdict

import torch

from vit_bridge.errors import InputError, check_choice
from vit_bridge.models.protocol import ask, class_name, is_ours, layer_groups

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear")
MUON_LR_SCALE = 5.0  # Muon's learning rate over AdamW's


def learning_rate_at(step, n_steps, warmup_steps, peak, schedule="cosine"):
    """The learning rate of step 0 .. n_steps - 1: a linear rise to the peak, then half a cosine, or a line, to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, n_steps - warmup_steps)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)


def parameter_groups(model, weight_decay, lr_scales=None):
    """The trainable parameters in groups for an optimiser: with weight decay and without, by lr_scale.

    Without decay are vectors (biases, norms), what is added to every image alike (positions and tokens: a first
    dimension of one), and what the model's no_weight_decay names. lr_scales: {name of a parameter: what the learning
    rate is multiplied by}, 1 for the others; each group carries its own as "lr_scale".
    """
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            plain = p.ndim < 2 or p.shape[0] == 1 or name in ask(model, "no_weight_decay")
            scale = (lr_scales or {}).get(name, 1.0)
            group = dict(params=[], weight_decay=0.0 if plain else weight_decay, lr_scale=scale)
            groups.setdefault((plain, scale), group)["params"].append(p)
    if not groups:
        raise InputError("the model has no trainable parameter; unfreeze at least its head")
    return [groups[key] for key in sorted(groups)]


@torch.no_grad()
def update_average(average, model, step, decay):
    """Moves the weights of `average` towards those of the model: w <- d w + (1 - d) w_model.

    d is the decay, but at most (1 + step) / (10 + step), so that the first steps are forgotten soon. Whole numbers
    (BatchNorm's count of batches) are copied. Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by
    Averaging".
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
    """Muon, for the hidden matrices of a model: each step moves a matrix in all directions alike.

    Of the momentum U S V^T of a matrix the step is about U V^T, all of whose singular values are 1 (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon), so scaled that a learning rate means what it means for AdamW: 0.2 of it is the
    root mean square of the step over the entries (Liu et al. 2025, "Muon is Scalable for LLM Training", Eq. 4).

    Each group may have "n_splits": each of its matrices is split along the rows into this many, 3 for q, k and v in
    one, each a matrix of its own. A convolution's kernel is the matrix with a row for each channel that it gives.

    torch.optim.Muon takes neither kernels nor splits, and multiplies in bfloat16, for which many CPUs have no
    instructions: on one of them its step took 361 ms, ours 16 (benchmarks/RESULTS.md#steps). Here it is bfloat16 on
    CUDA alone, and matrices of one shape are multiplied together.
    """

    def __init__(self, groups, lr=1e-2, momentum=0.95, weight_decay=0.0):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, n_splits=1))

    @torch.no_grad()
    def step(self):
        by_shape = defaultdict(list)  # (R, Q): parts of parameters, their updates, their learning rates
        for group in self.param_groups:
            self.collect(group, by_shape)
        for (R, Q), rows in by_shape.items():
            parts, updates, lrs = zip(*rows, strict=True)
            for part, update, lr in zip(parts, orthogonal(torch.stack(updates)), lrs, strict=True):
                part.add_(update.view(part.shape), alpha=-lr * 0.2 * math.sqrt(max(R, Q)))

    def collect(self, group, by_shape):
        """Decays the group's weights, moves their momentum, and adds what is to be made orthogonal to by_shape."""
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
    """About U V^T of each matrix U S V^T of (M, R, Q): its singular values all become 0.7 to 1.2.

    Newton-Schulz: X <- a X + b (X X^T) X + c (X X^T)^2 X, with Jordan's coefficients, which lift small values fastest.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = matrices.bfloat16() if matrices.is_cuda else matrices
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    tall = X.shape[1] > X.shape[2]
    X = X.transpose(1, 2) if tall else X  # (M, R, Q), R <= Q
    for _ in range(n_rounds):
        A = X @ X.transpose(1, 2)  # (M, R, R)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # (M, R, Q)
    return (X.transpose(1, 2) if tall else X).to(matrices.dtype)  # (M, R, Q) as given


class CombinedOptimizer:
    """Two optimisers as one, each for its own parameters."""

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
    """{parameter: n_splits} of the trainable matrices and convolution kernels between hidden layers, for Muon.

    Not among them: the first, which meets the pixels; the heads and what no_muon names (models/protocol.py); and what
    is added to every image alike (tokens, positions: a first dimension of one). n_splits is 3 for q, k and v in one, by
    the name qkv.
    """
    weights = [(name, p) for name, p in model.named_parameters() if name.endswith("weight") and p.ndim in (2, 4)]
    return {p: 3 if name.endswith("qkv.weight") else 1 for name, p in weights[1:]
            if p.requires_grad and p.shape[0] > 1 and name not in ask(model, "no_muon")
            and name.split(".")[0] not in ask(model, "head_names")}


def make_optimizer(name, model, weight_decay, lr_scales=None):
    """The optimiser `name`, of OPTIMIZERS, over a model's trainable parameters; groups as parameter_groups has them.

    With "muon" the hidden matrices go to Muon, at MUON_LR_SCALE times the learning rate, and the rest to AdamW.
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
    """{name of a parameter: decay to the power of the layers between it and the head}, for TrainConfig.lr_scales.

    Layers are what comes before the blocks (patch embedding or stem, tokens, positions), each block or stage, and
    last, with scale 1, the head with the norm before it. Clark et al. 2020 (ELECTRA), for ViTs Bao et al. 2022
    (BEiT). Raises InputError for a model without layers().
    """
    if not is_ours(model):
        raise InputError(f"a {class_name(model)} has no layers whose learning rates could decay; leave out layer decay")
    groups, n_layers = layer_groups(model), len(model.layers())
    return {name: decay ** (n_layers - layer) for name, layer in groups.items()}
