"""Write it yourself: five parts of a ViT as functions to fill in, checked against ours in values and gradients.

    EXERCISES[name]            the task, the file to fill in, our solution and the usual mistakes
    write_stub(name, path)     the file to fill in
    check_file(name, path)     what is wrong in somebody's file, without giving the solution away

Usual mistakes are recognised by making them too: if the numbers are the same, the hint of that mistake is shown. The
three sets of inputs have different sizes, so a size written as a number fails.

Shapes:  B images, C channels, P patch side, N tokens, n patches, D width, H heads, K width of a head, L blocks.
"""

import importlib.util
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

FILL_IN = "fill this in"  # the text of the error that a stub raises
FLOAT32 = 1e-5  # a tolerance: smaller differences may be rounding in float32


@dataclass(frozen=True)
class Exercise:
    """A function to write.

    function     its name in the file
    signature    its arguments, as text
    task         what it should do
    sizes        a tuple for each of the three sets of inputs
    shapes       sizes -> the shape of the leaf behind each argument; gradients are taken with respect to leaves
    solution     ours
    mistakes     (hint, a function that makes the mistake)
    arguments    leaves -> arguments, each a tensor or a function
    """
    function: str
    signature: str
    task: str
    sizes: tuple
    shapes: Callable
    solution: Callable
    mistakes: tuple
    arguments: Callable = list


@dataclass
class Verdict:
    """Whether the file is right, and a line about it."""
    right: bool
    words: str


def _draw_inputs(exercise, seed):
    """(leaves, arguments) of the set of inputs number `seed`, made anew. Leaves are normally distributed, float64."""
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
    ("the softmax is too sharp: the longer the vectors, the larger their products; what does the paper divide by?",
     lambda q, k, v: _attention_scaled(q, k, v, 1)),
    ("the softmax is too flat: the paper's divisor grows more slowly with the width of a head",
     lambda q, k, v: _attention_scaled(q, k, v, q.shape[-1])),
    ("the divisor should come from the width of a head, not from the number of tokens",
     lambda q, k, v: _attention_scaled(q, k, v, math.sqrt(q.shape[-2]))),
    ("over what do the weights sum to one? Each query distributes its attention over the keys",
     lambda q, k, v: (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-2) @ v),
    ("queries and keys have changed places: a row should belong to a query",
     lambda q, k, v: (k @ q.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v),
    ("these weights do not sum to one, and some are negative: something is missing between the products and the mean",
     lambda q, k, v: q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) @ v),
    ("these weights do not sum to one, and some are negative; the products are not divided by anything either",
     lambda q, k, v: q @ k.transpose(-2, -1) @ v),
    ("the division acts on the weights; it belongs to the products, before they become weights",
     lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(dim=-1) / math.sqrt(q.shape[-1]) @ v),
)


# ---- Patch embedding --------------------------------------------------------------------------------------


def patch_embedding(images, weight, bias):
    side = math.isqrt(weight.shape[1] // images.shape[1])
    return F.unfold(images, side, stride=side).transpose(1, 2) @ weight.T + bias  # (B, n, D)


def _cut_patches(images, weight, order, by_columns=False):
    """Patches (B, n, C P P) with the axes of the inside in some order, row by row or column by column."""
    side = math.isqrt(weight.shape[1] // images.shape[1])
    cut = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, rows, P, columns, P)
    cut = cut.permute(0, *((4, 2) if by_columns else (2, 4)), *order)
    return cut.flatten(3).flatten(1, 2)


PATCH_MISTAKES = (
    ("the patches come column by column; a page is read row by row",
     lambda x, w, b: _cut_patches(x, w, (1, 3, 5), True) @ w.T + b),
    ("inside a patch the colours come last; the weight expects all of one colour first",
     lambda x, w, b: _cut_patches(x, w, (3, 5, 1)) @ w.T + b),
    ("inside a patch rows and columns have changed places", lambda x, w, b: _cut_patches(x, w, (1, 5, 3)) @ w.T + b),
    ("something that is added to every token is missing", lambda x, w, b: _cut_patches(x, w, (1, 3, 5)) @ w.T),
    ("these are not squares of the image: a reshape alone takes numbers in memory order, across patches",
     lambda x, w, b: x.reshape(x.shape[0], -1, w.shape[1]) @ w.T + b),
)


# ---- Positions --------------------------------------------------------------------------------------------


def add_positions(patches, cls_token, positions):
    cls = cls_token.expand(len(patches), -1, -1)  # (B, 1, D)
    return torch.cat([cls, patches], dim=1) + positions  # (B, 1 + n, D)


POSITION_MISTAKES = (
    ("CLS stands at the wrong end of the sequence",
     lambda x, c, p: torch.cat([x, c.expand(len(x), -1, -1)], dim=1) + p),
    ("CLS has a position too, the first one",
     lambda x, c, p: torch.cat([c.expand(len(x), -1, -1), x + p[:, 1:]], dim=1)),
    ("the positions are shifted by one against the tokens",
     lambda x, c, p: torch.cat([c.expand(len(x), -1, -1), x], dim=1) + p.roll(1, dims=1)),
    ("positions are added; they do not scale the tokens",
     lambda x, c, p: torch.cat([c.expand(len(x), -1, -1), x], dim=1) * p),
    ("the positions are missing", lambda x, c, p: torch.cat([c.expand(len(x), -1, -1), x], dim=1) + 0 * p),
    ("CLS is missing: the first place holds its position alone",
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
    ("the order of the product is turned round: the last block reads what the earlier ones have made",
     lambda maps: _multiply(_with_residual(maps.mean(dim=1)) / 2, True)),
    ("the rows no longer sum to one after the residual is added",
     lambda maps: _multiply(_with_residual(maps.mean(dim=1)))),
    ("this is the last block alone; the earlier ones have mixed the tokens too",
     lambda maps: _with_residual(maps.mean(dim=1))[-1] / 2),
    ("the heads are not combined by their mean",
     lambda maps: _multiply(_with_residual(maps.amax(dim=1)) / _with_residual(maps.amax(dim=1)).sum(-1, keepdim=True))),
    ("the heads are added up; each block should count as half attention, half residual",
     lambda maps: _multiply(_with_residual(maps.sum(dim=1)) / _with_residual(maps.sum(dim=1)).sum(-1, keepdim=True))),
    ("the first block is left out", lambda maps: _multiply(_with_residual(maps.mean(dim=1))[1:] / 2)),
    ("the blocks are averaged; what the last one reads has already been mixed by the earlier ones",
     lambda maps: (_with_residual(maps.mean(dim=1)) / 2).mean(dim=0)),
    ("the blocks are multiplied element by element; this needs the matrix product",
     lambda maps: (_with_residual(maps.mean(dim=1)) / 2).prod(dim=0)),
)


# ---- The block --------------------------------------------------------------------------------------------


def block(x, norm1, attend, norm2, mlp):
    x = x + attend(norm1(x))
    return x + mlp(norm2(x))


BLOCK_MISTAKES = (
    ("this normalises after each part, as in the first Transformers; a ViT normalises before",
     lambda x, n1, a, n2, m: n2(n1(x + a(x)) + m(n1(x + a(x))))),
    ("a residual connection is missing around the MLP", lambda x, n1, a, n2, m: m(n2(x + a(n1(x))))),
    ("a residual connection is missing around the attention", lambda x, n1, a, n2, m: a(n1(x)) + m(n2(a(n1(x))))),
    ("the MLP should read what the attention has made, not what came in",
     lambda x, n1, a, n2, m: x + a(n1(x)) + m(n2(x))),
    ("each part has a norm of its own", lambda x, n1, a, n2, m: x + a(n1(x)) + m(n1(x + a(n1(x))))),
    ("both residual connections are missing: each part adds to what comes in", lambda x, n1, a, n2, m: m(n2(a(n1(x))))),
    ("the two norms have changed places", lambda x, n1, a, n2, m: x + a(n2(x)) + m(n1(x + a(n2(x))))),
    ("both norms are missing", lambda x, n1, a, n2, m: x + a(x) + m(x + a(x))),
    ("the MLP comes before the attention", lambda x, n1, a, n2, m: x + m(n2(x)) + a(n1(x + m(n2(x))))),
    ("the residual connection goes around the norm: it should bring what comes in as it is",
     lambda x, n1, a, n2, m: n2(n1(x) + a(n1(x))) + m(n2(n1(x) + a(n1(x))))),
)


def _block_arguments(leaves):
    """Tokens, and four functions that differ in what they compute."""
    x, scale1, mixing, scale2, inner = leaves
    D = x.shape[-1]
    return (x, lambda t: F.layer_norm(t, (D,)) * scale1, lambda t: mixing.softmax(dim=1) @ t,
            lambda t: F.layer_norm(t, (D,)) * scale2, lambda t: F.gelu(t @ inner))


EXERCISES = {
    "attention": Exercise(
        "attention", "q, k, v",
        "Scaled dot-product attention: how much every query looks at every key, then the mean of the values by these "
        "weights. q, k, v: (B, H, N, K) each; returns (B, H, N, K). ViT paper, Eq. 6 and 7.",
        ((2, 3, 7, 5), (3, 2, 6, 8), (4, 5, 3, 6)), lambda B, H, N, K: [(B, H, N, K)] * 3, attention,
        ATTENTION_MISTAKES),
    "patch_embedding": Exercise(
        "patch_embedding", "images, weight, bias",
        "Patches to tokens: cut images (B, C, height, width) into squares, row by row, and multiply each by one "
        "matrix. weight: (D, C P P), a row for each channel of a token, which reads colour by colour, and in each row "
        "by row; bias: (D). Returns (B, n, D). ViT paper, Eq. 1.",
        ((2, 3, 4, 6, 5, 2), (4, 2, 12, 9, 7, 3), (3, 4, 8, 20, 6, 4)),
        lambda B, C, height, width, D, P: [(B, C, height, width), (D, C * P * P), (D,)], patch_embedding,
        PATCH_MISTAKES),
    "positions": Exercise(
        "add_positions", "patches, cls_token, positions",
        "The sequence that the blocks read: the CLS token before the patches, and positions added. patches: (B, n, D); "
        "cls_token: (1, 1, D), the same for every image; positions: (1, 1 + n, D). Returns (B, 1 + n, D). ViT paper, "
        "Eq. 1.",
        ((3, 4, 6), (2, 6, 5), (5, 3, 7)), lambda B, n, D: [(B, n, D), (1, 1, D), (1, 1 + n, D)], add_positions,
        POSITION_MISTAKES),
    "rollout": Exercise(
        "rollout", "maps",
        "Attention rollout: how much of each token of the input is in each token at the end. maps: (L, H, N, N), the "
        "first block first, rows are queries. Each block counts as half attention, mean over the heads, half residual. "
        "Returns (N, N), whose rows sum to one. Abnar and Zuidema 2020.",
        ((3, 2, 7), (4, 3, 5), (2, 4, 6)), lambda L, H, N: [(L, H, N, N)], attention_rollout, ROLLOUT_MISTAKES,
        lambda scores: [scores[0].softmax(dim=-1)]),
    "block": Exercise(
        "block", "x, norm1, attend, norm2, mlp",
        "An encoder block out of its four parts, all functions (B, N, D) -> (B, N, D). x: (B, N, D). Returns "
        "(B, N, D). ViT paper, Eq. 2 and 3.",
        ((2, 5, 6), (3, 4, 7), (4, 6, 5)), lambda B, N, D: [(B, N, D), (D,), (N, N), (D,), (D, D)], block,
        BLOCK_MISTAKES, _block_arguments),
}


# ---- Stub and check ---------------------------------------------------------------------------------------


def _find_exercise(name):
    check_choice("exercise", name, EXERCISES)
    return EXERCISES[name]


def default_path(name):
    """The default path of the file to fill in."""
    return Path(f"{name}_exercise.py")


def _first_argument(exercise):
    return exercise.signature.split(",")[0]


def stub(name, path=None):
    """The text of the file to fill in. path: where it will be, if not at the default path."""
    exercise = _find_exercise(name)
    task = f"{exercise.task} All numbers are float64: a new tensor takes dtype={_first_argument(exercise)}.dtype."
    task = textwrap.fill(task, 100, initial_indent='    """', subsequent_indent="    ")
    elsewhere = path is not None and Path(path) != default_path(name)
    place = f" --file {shlex.quote(Path(path).as_posix())}" if elsewhere else ""
    return (f'# Exercise: {name}. Fill it in, then: python examples.py exercise {name}{place}\n\nimport torch\n\n\n'
            f'def {exercise.function}({exercise.signature}):\n{task}\n    """\n'
            f'    raise NotImplementedError("{FILL_IN}")\n')


def write_stub(name, path):
    """Writes the file to fill in. Raises InputError if the file exists, or if its name does not end in .py."""
    _check_suffix(path)
    if Path(path).exists():
        raise InputError(f"{path} already exists and is left as it is; give the name of a new file")
    write_whole(path, lambda file: file.write(stub(name, path).encode()))


def _check_suffix(path):
    if Path(path).suffix != ".py":
        raise InputError(f"{path} is not a Python file; expected a name that ends in .py")


def check_file(name, path):
    """A Verdict on somebody's file. Raises InputError where the file cannot be read or has no such function."""
    exercise, path = _find_exercise(name), Path(path).resolve()
    _check_suffix(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; expected one that write_stub has written")
    spec = importlib.util.spec_from_file_location(f"exercise in {path.name}", path)  # no name that any module has
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    try:
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # whatever somebody's file does
            raise InputError(f"{path} cannot be run: {_describe_error(error, path)}") from error
        function = getattr(module, exercise.function, None)
        if not callable(function):
            raise InputError(f"{path} has no function {exercise.function}({exercise.signature}); keep its name")
        return check_function(name, function, path)
    finally:
        del sys.modules[spec.name]


@differentiable()
def check_function(name, function, path=""):
    """A Verdict on a function: its shape, its values and its gradients on three sets of inputs, whose sizes differ."""
    exercise = _find_exercise(name)
    for seed in range(len(exercise.sizes)):
        words = _find_fault(exercise, function, seed, path)
        if words and seed:
            words = (f"right at one set of sizes, but not where {_describe_shapes(exercise, seed)}: {words}; take "
                     f"sizes from the shapes of the arguments")
        if words:
            return Verdict(False, words)
    return Verdict(True, "right: values and gradients on three sets of inputs")


def _describe_shapes(exercise, seed):
    """The shapes of the arguments that are tensors, by name."""
    arguments = zip(exercise.signature.split(", "), _draw_inputs(exercise, seed)[1], strict=True)
    return ", ".join(f"{name} is {tuple(value.shape)}" for name, value in arguments if isinstance(value, torch.Tensor))


def _find_fault(exercise, function, seed, path):
    """What is wrong with a function on one set of inputs, in words; None if it is right."""
    (our_leaves, arguments), (leaves, given) = _draw_inputs(exercise, seed), _draw_inputs(exercise, seed)
    expected = exercise.solution(*arguments)
    try:
        found = function(*given)
    except (Exception, SystemExit) as error:  # whatever somebody's code does
        if isinstance(error, NotImplementedError) and str(error) in ("", FILL_IN):
            return "not filled in yet"
        return f"it stops: {_describe_error(error, path)}{_advice(exercise, error)}"
    if not isinstance(found, torch.Tensor):
        return f"it returns a {type(found).__name__}; expected a tensor of shape {tuple(expected.shape)}"
    if found.shape != expected.shape:
        return f"it returns the shape {tuple(found.shape)}; expected {tuple(expected.shape)}"
    if found.dtype != expected.dtype:
        return (f"it returns {str(found.dtype).removeprefix('torch.')}, and all arguments are float64: give new "
                f"tensors dtype={_first_argument(exercise)}.dtype")
    if not _allclose(found, expected) and _allclose(found, expected, FLOAT32):
        return (f"the values are right but for rounding, as if float32 came in: give new tensors "
                f"dtype={_first_argument(exercise)}.dtype")
    if not _allclose(found, expected):
        return _find_hint(exercise.mistakes if seed == 0 else (), arguments, found, expected)
    if not found.requires_grad:
        return "the values are right, but no gradient comes back to the inputs: it could not be trained"
    try:
        theirs = _gradients(found, leaves)
    except Exception as error:
        return f"the values are right, but the gradient stops: {_describe_error(error, path)}{_advice(exercise, error)}"
    for place, (a, b) in enumerate(zip(_gradients(expected, our_leaves), theirs, strict=True), start=1):
        if b is None or not _allclose(a, b):
            return (f"the values are right, but the gradient of argument {place} is not: something was taken out of "
                    f"the computation")
    return None


def _gradients(result, leaves):
    """Gradients of a sum of the result with fixed random weights, one a leaf; None if it does not depend on a leaf."""
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(9), dtype=result.dtype)
    return torch.autograd.grad((result * weights).sum(), leaves, allow_unused=True)


def _advice(exercise, error):
    """What to do about an error of torch that does not say it itself."""
    text = str(error)
    if "in-place" in text or "inplace" in text:
        return " (do not change a tensor in place, as x += y does; write x = x + y)"
    if isinstance(error, RuntimeError) and ("dtype" in text or ("type" in text and "double" in text.lower())):
        return f" (all arguments are float64; give new tensors dtype={_first_argument(exercise)}.dtype)"
    return ""


def _find_hint(mistakes, arguments, found, expected):
    """The hint of the usual mistake that gives the same numbers; if there is none, how far off they are."""
    for words, mistaken in mistakes:
        wrong = mistaken(*arguments)
        if wrong.shape == found.shape and _allclose(wrong, found, FLOAT32):
            return words
    return (f"the shape is right, the values are not: the largest difference is "
            f"{(found - expected).abs().max().item():.2g}, where values go up to {expected.abs().max().item():.2g}")


def _allclose(a, b, tolerance=1e-9):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def _describe_error(error, path):
    """An error in one line, with the line of the file where it was raised."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}" if error.lineno else error.msg
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    text = str(error).partition(" Hint: enable anomaly detection")[0].splitlines()
    place = f"line {lines[-1]}: " if lines else ""
    if isinstance(error, SystemExit):
        return f"{place}sys.exit, exit or quit would end whatever runs it; leave it out"
    return f"{place}{type(error).__name__}{f': {text[0]}' if text else ''}"
