"""Seven parts of a ViT to write yourself, checked against our solutions in values and gradients.

    EXERCISES[name]           an Exercise: its level, task, hint, solution and usual mistakes
    write_stub(name, path)    writes the file to fill in
    check_file(name, path)    reports what is wrong in a file, without revealing the solution

The check also computes the usual mistakes: if a student's numbers match one of them, it explains that mistake.

Shapes:  B images, C channels, P patch side, N tokens, n patches, D width, H heads, K width of a head, L blocks,
         h, w height and width of a map in tokens, W windows, S side of a window, M = S S tokens of a window,
         V visible tokens.
"""

import importlib.util
import inspect
import math
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from vit_bridge.analysis.capture import differentiable
from vit_bridge.errors import InputError, check_choice
from vit_bridge.system import write_whole

FILL_IN = "fill this in"  # message of the error that a stub raises
FLOAT32 = 1e-5  # tolerance: smaller differences may come from rounding in float32
LEVELS = ("easy", "medium", "hard")
IMPORTS = dict(math="import math", torch="import torch", F="import torch.nn.functional as F")  # of the solutions


@dataclass(frozen=True)
class Exercise:
    """A function for the student to write.

    Attributes
    ----------
    function, signature : str
        The function's name in the file, and its arguments as text.
    level : str
        One of LEVELS.
    task : str
        What the function should do.
    hint : str
        How to start, without the solution.
    sizes : tuple
        One tuple for each of the three sets of inputs. No two are equal, so a hard-coded size fails.
    shapes : callable
        Maps a tuple of sizes to the shapes of the leaf tensors, for which gradients are computed.
    solution : callable
        Our function.
    mistakes : tuple
        Pairs of an explanation and a function that makes the mistake.
    arguments : callable
        Maps the leaf tensors to the arguments, each a tensor, a number or a function.
    """

    function: str
    signature: str
    level: str
    task: str
    hint: str
    sizes: tuple
    shapes: Callable
    solution: Callable
    mistakes: tuple
    arguments: Callable = list


@dataclass
class Verdict:
    """Whether a file is right, and one line that explains why."""

    right: bool
    words: str


def _draw_inputs(exercise, seed):
    """Return new (leaves, arguments) of input set `seed`; the leaves are normally distributed float64 tensors."""
    generator, shapes = torch.Generator().manual_seed(seed), exercise.shapes(*exercise.sizes[seed])
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return leaves, exercise.arguments(leaves)


# ---- Attention --------------------------------------------------------------------------------------------


def attention(q, k, v):
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)  # (B, H, N, N)
    return weights @ v  # (B, H, N, K)


def _attention_scaled(q, k, v, by):
    return (q @ k.transpose(-2, -1) / by).softmax(dim=-1) @ v


ATTENTION_MISTAKES = (
    ("the softmax is too sharp: longer vectors have larger products; what does the paper divide by?",
     lambda q, k, v: _attention_scaled(q, k, v, 1)),
    ("the softmax is too flat: the paper's divisor grows more slowly with the width of a head",
     lambda q, k, v: _attention_scaled(q, k, v, q.shape[-1])),
    ("the divisor should come from the width of a head, not from the number of tokens",
     lambda q, k, v: _attention_scaled(q, k, v, math.sqrt(q.shape[-2]))),
    ("the weights sum to one along the wrong axis; each query distributes its attention over the keys",
     lambda q, k, v: (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-2) @ v),
    ("queries and keys are swapped; a row should belong to a query",
     lambda q, k, v: (k @ q.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v),
    ("the weights do not sum to one, and some are negative; a step between the products and the mean is missing",
     lambda q, k, v: q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) @ v),
    ("the weights do not sum to one, and some are negative; the products are not scaled either",
     lambda q, k, v: q @ k.transpose(-2, -1) @ v),
    ("the division is applied to the weights; it belongs to the products, before the softmax",
     lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(dim=-1) / math.sqrt(q.shape[-1]) @ v),
)


# ---- Patch embedding --------------------------------------------------------------------------------------


def patch_embedding(images, weight, bias):
    side = math.isqrt(weight.shape[1] // images.shape[1])
    return F.unfold(images, side, stride=side).transpose(1, 2) @ weight.T + bias  # (B, n, D)


def _cut_patches(images, weight, order, by_columns=False):
    """Cut patches (B, n, C P P), with the axes inside a patch in this order, row by row or column by column."""
    side = math.isqrt(weight.shape[1] // images.shape[1])
    cut = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, rows, P, columns, P)
    cut = cut.permute(0, *((4, 2) if by_columns else (2, 4)), *order)
    return cut.flatten(3).flatten(1, 2)


PATCH_MISTAKES = (
    ("the patches come column by column; they should come row by row",
     lambda x, w, b: _cut_patches(x, w, (1, 3, 5), True) @ w.T + b),
    ("inside a patch, the channels come last; the weight expects all pixels of one channel first",
     lambda x, w, b: _cut_patches(x, w, (3, 5, 1)) @ w.T + b),
    ("inside a patch, rows and columns are swapped", lambda x, w, b: _cut_patches(x, w, (1, 5, 3)) @ w.T + b),
    ("something that is added to every token is missing", lambda x, w, b: _cut_patches(x, w, (1, 3, 5)) @ w.T),
    ("these are not squares of the image: a reshape alone reads numbers in memory order, across patches",
     lambda x, w, b: x.reshape(x.shape[0], -1, w.shape[1]) @ w.T + b),
)


# ---- Positions --------------------------------------------------------------------------------------------


def add_positions(patches, cls_token, positions):
    cls = cls_token.expand(len(patches), -1, -1)  # (B, 1, D)
    return torch.cat([cls, patches], dim=1) + positions  # (B, 1 + n, D)


POSITION_MISTAKES = (
    ("CLS is at the wrong end of the sequence",
     lambda x, c, p: torch.cat([x, c.expand(len(x), -1, -1)], dim=1) + p),
    ("CLS needs a position too: the first one",
     lambda x, c, p: torch.cat([c.expand(len(x), -1, -1), x + p[:, 1:]], dim=1)),
    ("the positions are shifted by one relative to the tokens",
     lambda x, c, p: torch.cat([c.expand(len(x), -1, -1), x], dim=1) + p.roll(1, dims=1)),
    ("the positions should be added, not multiplied",
     lambda x, c, p: torch.cat([c.expand(len(x), -1, -1), x], dim=1) * p),
    ("the positions are missing", lambda x, c, p: torch.cat([c.expand(len(x), -1, -1), x], dim=1) + 0 * p),
    ("CLS is missing: the first token is only its position",
     lambda x, c, p: torch.cat([0 * c.expand(len(x), -1, -1), x], dim=1) + p),
)


# ---- Rollout ----------------------------------------------------------------------------------------------


def attention_rollout(maps):
    mixing = (maps.mean(dim=1) + torch.eye(maps.shape[-1], dtype=maps.dtype)) / 2  # (L, N, N)
    rolled = mixing[0]
    for block in mixing[1:]:
        rolled = block @ rolled
    return rolled  # (N, N)


def _multiply(mixing, backwards=False):
    rolled = mixing[0]
    for block in mixing[1:]:
        rolled = rolled @ block if backwards else block @ rolled
    return rolled


def _with_residual(maps):
    return maps + torch.eye(maps.shape[-1], dtype=maps.dtype)


ROLLOUT_MISTAKES = (
    ("the residual connection is missing: half of each token comes from itself",
     lambda maps: _multiply(maps.mean(dim=1))),
    ("the matrices are multiplied in the wrong order; the last block reads the output of the earlier ones",
     lambda maps: _multiply(_with_residual(maps.mean(dim=1)) / 2, True)),
    ("the rows no longer sum to one once the residual is added",
     lambda maps: _multiply(_with_residual(maps.mean(dim=1)))),
    ("this is only the last block; the earlier ones have mixed the tokens too",
     lambda maps: _with_residual(maps.mean(dim=1))[-1] / 2),
    ("the heads should be combined by their mean",
     lambda maps: _multiply(_with_residual(maps.amax(dim=1)) / _with_residual(maps.amax(dim=1)).sum(-1, keepdim=True))),
    ("the heads are summed; each block should count as half attention, half residual",
     lambda maps: _multiply(_with_residual(maps.sum(dim=1)) / _with_residual(maps.sum(dim=1)).sum(-1, keepdim=True))),
    ("the first block is left out", lambda maps: _multiply(_with_residual(maps.mean(dim=1))[1:] / 2)),
    ("the blocks are averaged; but the tokens that the last block reads are already mixed",
     lambda maps: (_with_residual(maps.mean(dim=1)) / 2).mean(dim=0)),
    ("the blocks are multiplied element by element; use the matrix product",
     lambda maps: (_with_residual(maps.mean(dim=1)) / 2).prod(dim=0)),
)


# ---- The block --------------------------------------------------------------------------------------------


def block(x, norm1, attend, norm2, mlp):
    x = x + attend(norm1(x))
    return x + mlp(norm2(x))


BLOCK_MISTAKES = (
    ("this normalises after each part, as the original Transformer does; a ViT normalises before",
     lambda x, n1, a, n2, m: n2(n1(x + a(x)) + m(n1(x + a(x))))),
    ("the residual connection around the MLP is missing", lambda x, n1, a, n2, m: m(n2(x + a(n1(x))))),
    ("the residual connection around the attention is missing", lambda x, n1, a, n2, m: a(n1(x)) + m(n2(a(n1(x))))),
    ("the MLP should read the result of the attention step, not the input of the block",
     lambda x, n1, a, n2, m: x + a(n1(x)) + m(n2(x))),
    ("each part has its own norm", lambda x, n1, a, n2, m: x + a(n1(x)) + m(n1(x + a(n1(x))))),
    ("both residual connections are missing; each part adds to its input", lambda x, n1, a, n2, m: m(n2(a(n1(x))))),
    ("the two norms are swapped", lambda x, n1, a, n2, m: x + a(n2(x)) + m(n1(x + a(n2(x))))),
    ("both norms are missing", lambda x, n1, a, n2, m: x + a(x) + m(x + a(x))),
    ("the MLP comes before the attention", lambda x, n1, a, n2, m: x + m(n2(x)) + a(n1(x + m(n2(x))))),
    ("the residual connection starts after the norm; it should carry the input unchanged",
     lambda x, n1, a, n2, m: n2(n1(x) + a(n1(x))) + m(n2(n1(x) + a(n1(x))))),
)


def _block_arguments(leaves):
    """Return tokens, and four functions that compute different things."""
    x, scale1, mixing, scale2, inner = leaves
    D = x.shape[-1]
    return (x, lambda t: F.layer_norm(t, (D,)) * scale1, lambda t: mixing.softmax(dim=1) @ t,
            lambda t: F.layer_norm(t, (D,)) * scale2, lambda t: F.gelu(t @ inner))


# ---- Windows ----------------------------------------------------------------------------------------------


def within_windows(x, side, mix):
    B, h, w, D = x.shape
    cut = x.reshape(B, h // side, side, w // side, side, D).transpose(2, 3)  # (B, h / S, w / S, S, S, D)
    mixed = mix(cut.reshape(B, -1, side * side, D))  # (B, W, M, D)
    return mixed.reshape(cut.shape).transpose(2, 3).reshape(B, h, w, D)


def _mix_windows(x, side, mix, cut=(0, 1, 3, 2, 4, 5), join=(0, 1, 3, 2, 4, 5)):
    """Mix within windows, with the axes in these orders: `cut` of (B, h / S, S, w / S, S, D), `join` of its result."""
    cut = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).permute(cut)
    return mix(cut.flatten(3, 4).flatten(1, 2)).reshape(cut.shape).permute(join).reshape(x.shape)


def _mix_split_wrong(x, side, mix):
    """Mix within squares whose side is the number of windows."""
    B, h, w, D = x.shape
    cut = x.reshape(B, side, h // side, side, w // side, D).transpose(2, 3)
    return mix(cut.reshape(B, -1, side * side, D)).reshape(cut.shape).transpose(2, 3).reshape(x.shape)


def _mix_joined_across(x, side, mix):
    """Mix within windows, but swap their numbers of rows and columns when they are put back."""
    (B, h, w, D), cut = x.shape, x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    mixed = mix(cut.flatten(3, 4).flatten(1, 2))
    return mixed.reshape(B, w // side, h // side, side, side, D).transpose(2, 3).reshape(x.shape)


WINDOW_MISTAKES = (
    ("the windows come column by column; they should come row by row",
     lambda x, s, mix: _mix_windows(x, s, mix, (0, 3, 1, 2, 4, 5), (0, 2, 3, 1, 4, 5))),
    ("inside a window, rows and columns are swapped; its tokens should come row by row",
     lambda x, s, mix: _mix_windows(x, s, mix, (0, 1, 3, 4, 2, 5), (0, 1, 4, 2, 3, 5))),
    ("the windows are right, but their tokens are not put back where they came from; the axes that were exchanged must "
     "be exchanged again",
     lambda x, s, mix: _mix_windows(x, s, mix, join=(0, 1, 2, 3, 4, 5))),
    ("the windows are right, but when they are put back, the number of rows of windows is swapped with the number of "
     "columns",
     _mix_joined_across),
    ("these are not squares of the map: a reshape alone reads tokens in memory order, across windows",
     lambda x, s, mix: mix(x.reshape(len(x), -1, s * s, x.shape[-1])).reshape(x.shape)),
    ("h must be split into (h / side, side), the number of windows first; here the side comes first",
     _mix_split_wrong),
    ("x is returned unchanged; give the windows to mix, and put back what it returns", lambda x, s, mix: 1 * x),
)


def _window_arguments(leaves):
    """Return a map, the side of a window, and a function for which the order of windows and tokens matters."""
    x, mixing, scales = leaves
    return x, math.isqrt(len(mixing)), lambda t: mixing.softmax(dim=1) @ t * scales


# ---- Masking ----------------------------------------------------------------------------------------------


def hide_and_restore(x, noise, n_visible, mask_token, encode):
    ids_shuffle = noise.argsort(dim=1)  # (B, N), the places in the order of their noise
    ids_restore = ids_shuffle.argsort(dim=1)  # (B, N), the rank of each place
    visible = x.take_along_dim(ids_shuffle[:, :n_visible, None], dim=1)  # (B, V, D)
    hidden = mask_token.expand(len(x), x.shape[1] - n_visible, -1)  # (B, N - V, D)
    return torch.cat([encode(visible), hidden], dim=1).take_along_dim(ids_restore[:, :, None], dim=1)


def _encode_seen(x, seen, mask_token, encode):
    """Encode the tokens of each image where `seen` (B, N) is True; put them back, and mask_token elsewhere."""
    return torch.stack([mask_token[0].expand_as(one).masked_scatter(here[:, None], encode(one[None, here])[0])
                        for one, here in zip(x, seen, strict=True)])


def _encode_smallest(x, noise, n, mask_token, encode):
    """Return the encoded tokens in the order of their noise, then the mask tokens: (B, N, D)."""
    visible = encode(x.take_along_dim(noise.argsort(dim=1)[:, :n, None], dim=1))
    return torch.cat([visible, mask_token.expand(len(x), x.shape[1] - n, -1)], dim=1)


def _seen(noise, n):
    """Return where the noise is among the n smallest of its image: bool (B, N, 1)."""
    return (noise.argsort(dim=1).argsort(dim=1) < n)[:, :, None]


MASKING_MISTAKES = (
    ("the tokens with the largest noise are visible; those with the smallest should be",
     lambda x, noise, n, m, f: hide_and_restore(x, -noise, n, m, f)),
    ("the n_visible tokens with the smallest noise are hidden, and the others are visible; it should be the other way",
     lambda x, noise, n, m, f: hide_and_restore(x, -noise, x.shape[1] - n, m, f)),
    ("the images hide different numbers of tokens; each should keep the n_visible smallest of its own noise",
     lambda x, noise, n, m, f: _encode_seen(x, noise <= noise.flatten().kthvalue(len(x) * n).values, m, f)),
    ("all images hide the same places; each has its own noise",
     lambda x, noise, n, m, f: hide_and_restore(x, noise[:1].expand_as(noise), n, m, f)),
    ("the first n_visible tokens are visible; the noise should choose them",
     lambda x, noise, n, m, f: _encode_seen(x, torch.arange(x.shape[1]).expand_as(noise) < n, m, f)),
    ("argsort lists the places in the order of their noise; the rank of each place is the argsort of that list",
     lambda x, noise, n, m, f: _encode_seen(x, noise.argsort(dim=1) < n, m, f)),
    ("the visible tokens stand first, and the mask tokens last; put every token back in its place", _encode_smallest),
    ("the tokens are shuffled once more; the inverse of a permutation is its argsort",
     lambda x, noise, n, m, f: _encode_smallest(x, noise, n, m, f).take_along_dim(noise.argsort(dim=1)[:, :, None], 1)),
    ("the right places are visible, but their tokens stand in the order of their noise; each should return to its own "
     "place",
     lambda x, noise, n, m, f: m.expand_as(x).masked_scatter(_seen(noise, n),
                                                             _encode_smallest(x, noise, n, m, f)[:, :n])),
    ("every place holds mask_token; the visible places should hold the encoded tokens",
     lambda x, noise, n, m, f: 1 * m.expand_as(x)),
    ("the hidden places hold zeros; they should hold mask_token",
     lambda x, noise, n, m, f: hide_and_restore(x, noise, n, 0 * m, f)),
    ("encode is missing: the visible tokens should pass through it",
     lambda x, noise, n, m, f: hide_and_restore(x, noise, n, m, lambda t: t)),
    ("encode sees the hidden tokens too; give it only the visible ones",
     lambda x, noise, n, m, f: torch.where(_seen(noise, n), f(x), m)),
    ("encode sees the mask tokens too; add them after it",
     lambda x, noise, n, m, f: f(torch.where(_seen(noise, n), x, m))),
)


def _masking_arguments(leaves):
    """Return tokens, noise that follows from them, V, a mask token, and attention among any number of tokens."""
    x, mask_token, keys = leaves
    return (x, x.detach().sum(dim=2), len(keys), mask_token,
            lambda t: attention(t @ keys.T @ keys, t, t))  # (B, V, D) -> (B, V, D)


EXERCISES = {
    "attention": Exercise(
        "attention", "q, k, v", "medium",
        "Scaled dot-product attention: compute how much every query attends to every key, then average the values with "
        "these weights. q, k and v are (B, H, N, K), where K is the width of a head. Return (B, H, N, K). See the ViT "
        "paper, Eq. 6 and 7.",
        "Three steps: multiply q by k with its last two axes swapped, which returns (B, H, N, N); divide by the square "
        "root of K and apply a softmax over the keys; multiply the result by v.",
        ((2, 3, 7, 5), (3, 2, 6, 8), (4, 5, 3, 6)), lambda B, H, N, K: [(B, H, N, K)] * 3, attention,
        ATTENTION_MISTAKES),
    "patch_embedding": Exercise(
        "patch_embedding", "images, weight, bias", "medium",
        "Patches to tokens: cut images (B, C, height, width) into n patches, row by row, and multiply each by one "
        "matrix. weight is (D, C P P): each of its D rows reads a patch channel by channel, and each channel row by "
        "row. bias is (D). Return (B, n, D). See the ViT paper, Eq. 1.",
        "weight has C P P columns and images have C channels, so P is the square root of their ratio. "
        "torch.nn.functional.unfold(images, P, stride=P) cuts the images in the right order and returns (B, C P P, n).",
        ((2, 3, 4, 6, 5, 2), (4, 2, 12, 9, 7, 3), (3, 4, 8, 20, 6, 4)),
        lambda B, C, height, width, D, P: [(B, C, height, width), (D, C * P * P), (D,)], patch_embedding,
        PATCH_MISTAKES),
    "positions": Exercise(
        "add_positions", "patches, cls_token, positions", "easy",
        "The sequence that the blocks read: put the CLS token before the patches, and add the positions. patches is "
        "(B, n, D). cls_token is (1, 1, D), the same for every image. positions is (1, 1 + n, D). Return "
        "(B, 1 + n, D). See the ViT paper, Eq. 1.",
        "Use expand to repeat cls_token for each of the B images, and torch.cat along axis 1 to put it first. The "
        "addition then broadcasts over the images.",
        ((3, 4, 6), (2, 6, 5), (5, 3, 7)), lambda B, n, D: [(B, n, D), (1, 1, D), (1, 1 + n, D)], add_positions,
        POSITION_MISTAKES),
    "block": Exercise(
        "block", "x, norm1, attend, norm2, mlp", "easy",
        "An encoder block: combine its four parts, which are functions from (B, N, D) to (B, N, D). x is (B, N, D). "
        "Return (B, N, D). See the ViT paper, Eq. 2 and 3.",
        "There are two steps, attention and MLP. Each normalises its input, applies its part and adds the result to "
        "the input as it was before the norm.",
        ((2, 5, 6), (3, 4, 7), (4, 6, 5)), lambda B, N, D: [(B, N, D), (D,), (N, N), (D,), (D, D)], block,
        BLOCK_MISTAKES, _block_arguments),
    "rollout": Exercise(
        "rollout", "maps", "hard",
        "Attention rollout: compute how much of each input token is in each token after the last block. maps is "
        "(L, H, N, N), first block first, and its rows are queries. A block counts as half attention (the mean over "
        "its heads) and half residual. Return (N, N) with rows that sum to one. See Abnar and Zuidema 2020.",
        "Turn each block into one matrix: average its heads, add the identity, divide by 2. Then multiply these "
        "matrices. Each new block goes on the left, because its rows mix the outputs of the earlier blocks.",
        ((3, 2, 7), (4, 3, 5), (2, 4, 6)), lambda L, H, N: [(L, H, N, N)], attention_rollout, ROLLOUT_MISTAKES,
        lambda scores: [scores[0].softmax(dim=-1)]),
    "windows": Exercise(
        "within_windows", "x, side, mix", "medium",
        "Windows, as in Swin: cut a map of tokens into square windows, mix the tokens within each window, and put them "
        "back. x is (B, h, w, D), and h and w are multiples of side. mix is a function from (B, W, M, D) to "
        "(B, W, M, D): W windows, row by row, each with M = side * side tokens, row by row. Return (B, h, w, D), with "
        "every token where it came from. See Liu et al. 2021, Sec. 3.2.",
        "Reshape splits h into (h / side, side), and w likewise, which makes six axes. Exchange the third and the "
        "fourth, so that the axes of the windows stand before the axes inside a window; a second reshape then joins "
        "each pair. To put the tokens back, take the same steps in reverse order.",
        ((2, 6, 8, 5, 2), (3, 12, 15, 4, 3), (4, 8, 12, 3, 4)),
        lambda B, h, w, D, S: [(B, h, w, D), (S * S, S * S), (h * w // S**2, 1, 1)], within_windows, WINDOW_MISTAKES,
        _window_arguments),
    "masking": Exercise(
        "hide_and_restore", "x, noise, n_visible, mask_token, encode", "medium",
        "Masking, as in MAE: hide tokens at random, encode the visible ones, and put them back. x is (B, N, D), and "
        "noise is (B, N). In each image, the n_visible tokens with the smallest noise are visible. encode is a "
        "function from (B, n_visible, D) to (B, n_visible, D) for which the order of the tokens does not matter, as "
        "in attention. mask_token is (1, 1, D). Return (B, N, D): each encoded token in the place where it came from, "
        "and mask_token in every hidden place. See He et al. 2022, Sec. 3.",
        "noise.argsort(dim=1) lists the places, smallest noise first. Take the first n_visible tokens of this list "
        "with take_along_dim, encode them, and append mask tokens. The argsort of the list is the rank of each place; "
        "take the tokens by their ranks to put them back.",
        ((2, 12, 5, 4), (3, 8, 2, 5), (4, 15, 6, 3)), lambda B, N, V, D: [(B, N, D), (1, 1, D), (V, D)],
        hide_and_restore, MASKING_MISTAKES, _masking_arguments),
}


# ---- Stub and check ---------------------------------------------------------------------------------------


def _find_exercise(name):
    check_choice("exercise", name, EXERCISES)
    return EXERCISES[name]


def solution(name):
    """Return our solution as the text of a file."""
    exercise = _find_exercise(name)
    source = inspect.getsource(exercise.solution).replace(f"def {exercise.solution.__name__}(",
                                                          f"def {exercise.function}(")
    imports = [line for word, line in IMPORTS.items() if f"{word}." in source]
    return "\n".join(imports) + "\n\n\n" * bool(imports) + source


def default_path(name):
    """Return the default path of the file to fill in."""
    return Path(f"{name}_exercise.py")


def _first_argument(exercise):
    return exercise.signature.split(",")[0]


def stub(name, path=None):
    """Return the text of the file to fill in; `path` is its location, if not the default path."""
    exercise = _find_exercise(name)
    task = f"{exercise.task} All numbers are float64: create tensors with dtype={_first_argument(exercise)}.dtype."
    task = textwrap.fill(task, 100, initial_indent='    """', subsequent_indent="    ")
    elsewhere = path is not None and Path(path) != default_path(name)
    place = f" --file {shlex.quote(Path(path).as_posix())}" if elsewhere else ""
    return (f'# Exercise {name} ({exercise.level}). Fill it in, then: python examples.py exercise {name}{place}\n\n'
            f'import torch\n\n\n'
            f'def {exercise.function}({exercise.signature}):\n{task}\n    """\n'
            f'    raise NotImplementedError("{FILL_IN}")\n')


def write_stub(name, path):
    """Write the file to fill in; raise InputError if it exists or its name does not end in .py."""
    _check_suffix(path)
    if Path(path).exists():
        raise InputError(f"{path} already exists and is not overwritten; choose a new file name")
    write_whole(path, lambda file: file.write(stub(name, path).encode()))


def _check_suffix(path):
    if Path(path).suffix != ".py":
        raise InputError(f"{path} is not a Python file; choose a name that ends in .py")


def check_file(name, path):
    """Check the function in a student's file.

    Parameters
    ----------
    name : str
        A key of EXERCISES.
    path : path-like
        The file, as write_stub() wrote it and the student filled it in.

    Returns
    -------
    Verdict

    Raises
    ------
    InputError
        If the file cannot be run or has no such function.
    """
    exercise, path = _find_exercise(name), Path(path).resolve()
    _check_suffix(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; python examples.py exercise {name} writes a file to fill in")
    spec = importlib.util.spec_from_file_location(f"exercise in {path.name}", path)  # hides no real module
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    try:
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # a student's file may raise anything
            raise InputError(f"{path} cannot be run: {_describe_error(error, path)}") from error
        function = getattr(module, exercise.function, None)
        if not callable(function):
            raise InputError(f"{path} has no function {exercise.function}({exercise.signature}); do not rename it")
        return check_function(name, function, path)
    finally:
        del sys.modules[spec.name]


@differentiable()
def check_function(name, function, path=""):
    """Check a function's shapes, values and gradients on three sets of inputs of different sizes."""
    exercise = _find_exercise(name)
    for seed in range(len(exercise.sizes)):
        words = _find_fault(exercise, function, seed, path)
        if words and seed:
            words = (f"right for one set of sizes, but not if {_describe_shapes(exercise, seed)}: {words}; read the "
                     f"sizes from the arguments' shapes")
        if words:
            return Verdict(False, words)
    return Verdict(True, "right: the values and gradients agree with ours on three sets of inputs")


def _describe_shapes(exercise, seed):
    """Return the shapes of the tensor arguments as text."""
    arguments = zip(exercise.signature.split(", "), _draw_inputs(exercise, seed)[1], strict=True)
    return ", ".join(f"{name} is {tuple(value.shape)}" for name, value in arguments if isinstance(value, torch.Tensor))


def _find_fault(exercise, function, seed, path):
    """Describe what is wrong with a function on one set of inputs; return None if it is right."""
    (our_leaves, arguments), (leaves, given) = _draw_inputs(exercise, seed), _draw_inputs(exercise, seed)
    expected = exercise.solution(*arguments)
    try:
        found = function(*given)
    except (Exception, SystemExit) as error:  # a student's code may raise anything
        if isinstance(error, NotImplementedError) and str(error) in ("", FILL_IN):
            return "not filled in yet"
        return f"it fails: {_describe_error(error, path)}{_advice(exercise, error)}"
    if found is None:
        return f"it returns None; did you forget `return`? Expected a tensor of shape {tuple(expected.shape)}"
    if not isinstance(found, torch.Tensor):
        return f"it returns a value of type {type(found).__name__}; expected a tensor of shape {tuple(expected.shape)}"
    if found.shape != expected.shape:
        return f"it returns shape {tuple(found.shape)}; expected {tuple(expected.shape)}"
    if found.dtype != expected.dtype:
        return (f"it returns {str(found.dtype).removeprefix('torch.')}, but all arguments are float64; create tensors "
                f"with dtype={_first_argument(exercise)}.dtype")
    if not _allclose(found, expected) and _allclose(found, expected, FLOAT32):
        return (f"the values are right up to rounding, as if float32 was used; create tensors with "
                f"dtype={_first_argument(exercise)}.dtype")
    if not _allclose(found, expected):
        return _find_hint(exercise.mistakes if seed == 0 else (), arguments, found, expected)
    if not found.requires_grad:
        return "the values are right, but no gradient reaches the inputs, so it could not be trained"
    try:
        theirs = _gradients(found, leaves)
    except Exception as error:
        return f"the values are right, but backward fails: {_describe_error(error, path)}{_advice(exercise, error)}"
    for place, (a, b) in enumerate(zip(_gradients(expected, our_leaves), theirs, strict=True), start=1):
        if b is None or not _allclose(a, b):
            return (f"the values are right, but the gradient of argument {place} is not; something was detached from "
                    f"the graph")
    return None


def _gradients(result, leaves):
    """Return the gradient of a fixed random sum of the result for each leaf; None for leaves without influence."""
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(9), dtype=result.dtype)
    return torch.autograd.grad((result * weights).sum(), leaves, allow_unused=True)


def _advice(exercise, error):
    """Return advice for an error of torch whose text contains none."""
    text = str(error)
    if "in-place" in text or "inplace" in text:
        return " (do not modify a tensor in place, as x += y does; write x = x + y)"
    if isinstance(error, RuntimeError) and ("dtype" in text or ("type" in text and "double" in text.lower())):
        return f" (all arguments are float64; create tensors with dtype={_first_argument(exercise)}.dtype)"
    return ""


def _find_hint(mistakes, arguments, found, expected):
    """Explain the usual mistake that produces the same numbers; if none does, report how far off they are."""
    for words, mistaken in mistakes:
        wrong = mistaken(*arguments)
        if wrong.shape == found.shape and _allclose(wrong, found, FLOAT32):
            return words
    return (f"the shape is right, but the values are not; the largest difference is "
            f"{(found - expected).abs().max().item():.2g}, and values reach {expected.abs().max().item():.2g}")


def _allclose(a, b, tolerance=1e-9):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def _describe_error(error, path):
    """Describe an error in one line, with the line of the file that raised it."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}" if error.lineno else error.msg
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    text = str(error).partition(" Hint: enable anomaly detection")[0].splitlines()
    place = f"line {lines[-1]}: " if lines else ""
    if isinstance(error, SystemExit):
        return f"{place}this would end Python (sys.exit, exit or quit); remove it"
    return f"{place}{type(error).__name__}{f': {text[0]}' if text else ''}"
