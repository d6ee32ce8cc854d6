"""Right solutions pass, usual mistakes are explained, and any other fault is described in one line."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vit_bridge.analysis.explanations import rollout
from vit_bridge.lessons import exercises as e
from vit_bridge.models.mae import random_masking, unmask
from vit_bridge.models.relative import RelativeAttention
from vit_bridge.models.swin import WindowAttention, join_windows, split_windows
from vit_model import InputError, MultiHeadAttention, PatchEmbedding, TransformerBlock, VisionTransformer

RIGHT = e.Verdict(True, "right: the values and gradients agree with ours on three sets of inputs")
MISTAKES = [pytest.param(name, words, mistaken, id=f"{name}, {words[:30]}") for name, exercise in e.EXERCISES.items()
            for words, mistaken in exercise.mistakes]


@pytest.mark.parametrize("name", e.EXERCISES)
def test_check_function_passes_every_solution(name):
    assert e.check_function(name, e.EXERCISES[name].solution) == RIGHT


def positions_written_into(dtype):
    def add_positions(patches, cls_token, positions):
        B, n, D = patches.shape
        tokens = torch.zeros(B, 1 + n, D, dtype=dtype)
        tokens[:, :1], tokens[:, 1:] = cls_token, patches
        return tokens + positions

    return add_positions


def convolution(images, weight, bias):
    side = round((weight.shape[1] / images.shape[1]) ** 0.5)
    kernel = weight.unflatten(1, (images.shape[1], side, side))
    return F.conv2d(images, kernel, bias, stride=side).flatten(2).mT


def rolled_from(start):
    """Return a rollout as in Abnar's code: add the identity, then divide each row by its sum."""
    def rollout(maps):
        rolled = start(maps)
        for block in e._with_residual(maps.mean(dim=1)):
            rolled = block / block.sum(dim=-1, keepdim=True) @ rolled
        return rolled

    return rollout


def folded(x, side, mix):
    """Windows by F.unfold and F.fold, which take the channels first."""
    windows = F.unfold(x.permute(0, 3, 1, 2), side, stride=side).unflatten(1, (x.shape[3], -1))  # (B, D, M, W)
    mixed = mix(windows.permute(0, 3, 2, 1)).permute(0, 3, 2, 1).flatten(1, 2)  # (B, D M, W)
    return F.fold(mixed, x.shape[1:3], side, stride=side).permute(0, 2, 3, 1)


def one_by_one(x, side, mix):
    _, h, w, _ = x.shape
    places = [(slice(i, i + side), slice(j, j + side)) for i in range(0, h, side) for j in range(0, w, side)]
    mixed = mix(torch.stack([x[:, rows, columns].flatten(1, 2) for rows, columns in places], dim=1))
    result = torch.zeros_like(x)
    for i, (rows, columns) in enumerate(places):
        result[:, rows, columns] = mixed[:, i].unflatten(1, (side, side))
    return result


def into_their_places(x, noise, n_visible, mask_token, encode):
    """Masking by a mask: the visible tokens stay in the order of the image, which encode does not notice."""
    seen = noise <= noise.kthvalue(n_visible, dim=1, keepdim=True).values
    result = mask_token.repeat(*x.shape[:2], 1)
    result[seen] = encode(x[seen].unflatten(0, (len(x), n_visible))).flatten(0, 1)
    return result


def as_in_mae(x, noise, n_visible, mask_token, encode):
    visible, mask, ids_restore = random_masking(x, 1 - (n_visible + 0.5) / x.shape[1], noise)
    assert mask.sum() == len(x) * (x.shape[1] - n_visible)
    return unmask(encode(visible), mask_token, ids_restore)


OTHER_ANSWERS = [
    pytest.param("masking", into_their_places, id="written into mask tokens"),
    pytest.param("masking", as_in_mae, id="as in mae.py"),
    pytest.param("windows", folded, id="unfold and fold"),
    pytest.param("windows", one_by_one, id="window by window"),
    pytest.param("windows", lambda x, side, mix: join_windows(mix(split_windows(x, (side, side))), (side, side),
                                                              x.shape[1:3]), id="as in swin.py"),
    pytest.param("rollout", rolled_from(lambda maps: torch.eye(maps.shape[-1], dtype=maps.dtype)), id="rows scaled"),
    pytest.param("rollout", lambda maps: rollout(maps[:, None])[0], id="as in explanations.py"),
    pytest.param("rollout", lambda maps: F.normalize(e.attention_rollout(maps), p=1.0, dim=-1), id="scaled at the end"),
    pytest.param("rollout", lambda maps: torch.linalg.multi_dot(list((e._with_residual(maps.mean(1)) / 2).flip(0))),
                 id="multi_dot"),
    pytest.param("attention", F.scaled_dot_product_attention, id="fused"),
    pytest.param("patch_embedding", convolution, id="convolution"),
    pytest.param("positions", positions_written_into(torch.float64), id="written into zeros"),
]


@pytest.mark.parametrize(("name", "function"), OTHER_ANSWERS)
def test_check_function_passes_answers_in_another_form(name, function):
    assert e.check_function(name, function) == RIGHT


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_check_function_works_with_gradients_switched_off(off):
    with off():
        assert e.check_function("rollout", e.attention_rollout).right


@pytest.mark.parametrize(("name", "words", "mistaken"), MISTAKES)
def test_check_function_names_each_usual_mistake(name, words, mistaken):
    assert e.check_function(name, mistaken) == e.Verdict(False, words)


def test_exercises_have_at_least_five_distinct_mistakes():
    assert all(len(exercise.mistakes) >= 5 for exercise in e.EXERCISES.values())
    words = [words for exercise in e.EXERCISES.values() for words, _ in exercise.mistakes]
    assert len(set(words)) == len(words)


# ---- Levels, hints and solutions


@pytest.mark.parametrize("name", e.EXERCISES)
def test_exercises_have_a_level_and_a_hint_that_is_not_the_solution(name):
    exercise = e.EXERCISES[name]
    assert exercise.level in e.LEVELS
    assert exercise.hint.endswith(".")
    assert not {line.strip() for line in e.solution(name).splitlines() if line} & set(exercise.hint.split(". "))
    assert f"({exercise.level})" in e.stub(name).splitlines()[0]


@pytest.mark.parametrize("name", e.EXERCISES)
def test_solution_is_a_file_that_passes(name, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(e.solution(name), encoding="utf-8")
    assert e.check_file(name, path).right


# ---- The solutions are what the library does


def test_exercises_attention_and_block_match_the_model():
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(embed_dim=12, n_heads=3), torch.randn(2, 7, 12)
    q, k, v = layer.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(layer.proj(e.attention(q, k, v).transpose(1, 2).flatten(2)), layer(x))
    block = TransformerBlock(12, 3)
    torch.testing.assert_close(e.block(x, block.norm1, block.attn, block.norm2, block.mlp), block(x))


def test_exercises_patches_and_positions_match_the_model():
    torch.manual_seed(0)
    embed, images = PatchEmbedding(img_size=(8, 12), patch_size=4, embed_dim=6), torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(e.patch_embedding(images, embed.proj.weight.flatten(1), embed.proj.bias), embed(images))
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=6, depth=1, n_heads=2, n_classes=3)
    patches = torch.randn(2, 4, 6)
    torch.testing.assert_close(e.add_positions(patches, model.cls_token, model.pos_embed),
                               model.add_prefix(patches, (8, 8)))


def test_exercise_windows_matches_the_model():
    torch.manual_seed(0)
    inside, x = WindowAttention(embed_dim=12, n_heads=3, window=(4, 4)), torch.randn(2, 8, 12, 12)
    plain = RelativeAttention(embed_dim=12, n_heads=3, grid_size=(4, 4))
    plain.load_state_dict(inside.state_dict())
    mixed = e.within_windows(x, 4, lambda t: plain(t.flatten(0, 1)).unflatten(0, t.shape[:2]))
    torch.testing.assert_close(mixed, inside(x))


# ---- Sizes


@pytest.mark.parametrize("name", e.EXERCISES)
def test_exercises_sizes_differ_between_the_three_sets(name):
    for values in zip(*e.EXERCISES[name].sizes, strict=True):
        assert len(set(values)) == len(values) == 3


@pytest.mark.parametrize(("name", "function", "where", "words"), [
    ("rollout", lambda maps: (lambda a: a[2] @ a[1] @ a[0])(e._with_residual(maps.mean(1)) / 2),
     "maps is (4, 3, 5, 5)", "the shape is right, but the values are not; "),
    ("rollout", lambda maps: e._multiply((maps.mean(1) + torch.eye(7, dtype=maps.dtype)) / 2),
     "maps is (4, 3, 5, 5)", "it fails: RuntimeError: "),
    ("attention", lambda q, k, v: e._attention_scaled(q, k, v, 5**0.5),
     "q is (3, 2, 6, 8), k is (3, 2, 6, 8), v is (3, 2, 6, 8)", "the shape is right, but the values are not; "),
    ("patch_embedding", lambda i, w, b: F.unfold(i, 2, stride=2).mT @ w.T + b,
     "images is (4, 2, 12, 9), weight is (7, 18), bias is (7,)", "it fails: RuntimeError: "),
    ("positions", lambda x, c, p: torch.cat([c.expand(3, -1, -1), x], dim=1) + p,
     "patches is (2, 6, 5), cls_token is (1, 1, 5), positions is (1, 7, 5)", "it fails: RuntimeError: "),
    ("block", lambda x, n1, a, n2, m: e.block(x, n1, a, n2, m)[:2], "x is (3, 4, 7)",
     "it returns shape (2, 4, 7); expected (3, 4, 7)"),
    ("windows", lambda x, side, mix: e.within_windows(x, 2, mix), "x is (3, 12, 15, 4)", "it fails: RuntimeError: "),
    ("masking", lambda x, noise, n, m, f: e.hide_and_restore(x, noise, 5, m, f),
     "x is (3, 8, 5), noise is (3, 8), mask_token is (1, 1, 5)", "the shape is right, but the values are not; ")])
def test_check_function_refuses_hard_coded_sizes(name, function, where, words):
    verdict = e.check_function(name, function)
    assert verdict.words.startswith(f"right for one set of sizes, but not if {where}: {words}")
    assert verdict.words.endswith("; read the sizes from the arguments' shapes")
    assert not verdict.right


# ---- float64


@pytest.mark.parametrize(("name", "function", "words"), [
    ("rollout", rolled_from(lambda maps: torch.eye(maps.shape[-1])),
     "(all arguments are float64; create tensors with dtype=maps.dtype)"),
    ("positions", positions_written_into(torch.float32),
     "the values are right up to rounding, as if float32 was used; create tensors with dtype=patches.dtype"),
    ("positions", lambda x, c, p: e.add_positions(x, c, p).float(),
     "it returns float32, but all arguments are float64; create tensors with dtype=patches.dtype"),
    ("positions", lambda x, c, p: torch.zeros(3, 5, 6).scatter(1, torch.zeros(3, 4, 6, dtype=torch.long), x),
     "(all arguments are float64; create tensors with dtype=patches.dtype)"),
    ("patch_embedding", lambda i, w, b: F.conv2d(i, torch.ones(5, 3, 2, 2), stride=2).flatten(2).mT,
     "(all arguments are float64; create tensors with dtype=images.dtype)"),
    ("block", lambda x, n1, a, n2, m: F.layer_norm(x, (6,), torch.ones(6)),
     "(all arguments are float64; create tensors with dtype=x.dtype)")])
def test_check_function_names_float32(name, function, words):
    verdict = e.check_function(name, function)
    assert verdict.words.endswith(words)
    assert not verdict.right


def test_check_function_names_mistakes_in_float32_too():
    def at_the_wrong_end(patches, cls_token, positions):
        return positions_written_into(torch.float32)(patches, cls_token, 0 * positions).roll(-1, dims=1) + positions

    assert e.check_function("positions", at_the_wrong_end).words == "CLS is at the wrong end of the sequence"


@pytest.mark.parametrize(("name", "first"), [("attention", "q"), ("rollout", "maps"), ("block", "x")])
def test_stub_says_all_numbers_are_float64(name, first):
    assert f"All numbers are float64: create tensors with dtype={first}.dtype." in " ".join(e.stub(name).split())


# ---- What else is off


@pytest.mark.parametrize(("body", "words"), [
    ("return q.transpose(0, 1) @ k", "it fails: line 5: RuntimeError: "),
    ("q += k; return q @ k.mT @ v", "it fails: line 5: RuntimeError: a leaf Variable"),
    ("q += k; return q @ k.mT @ v", " (do not modify a tensor in place, as x += y does; write x = x + y)"),
    ("w = (q @ k.mT / q.shape[-1] ** 0.5).exp(); w /= w.sum(-1, keepdim=True); return w @ v",
     "the values are right, but backward fails: RuntimeError: one of the variables needed for gradient "),
    ("w = (q @ k.mT / q.shape[-1] ** 0.5).exp(); w /= w.sum(-1, keepdim=True); return w @ v",
     "expected version 0 instead. (do not modify a tensor in place, as x += y does; write x = x + y)"),
    ("exit()", "it fails: line 5: this would end Python (sys.exit, exit or quit); remove it"),
    ("raise SystemExit(0)", "it fails: line 5: this would end Python (sys.exit, exit or quit); remove it"),
    ("return q @ (k > 0).mT @ (k > 0)", "it fails: line 5: RuntimeError: "),
    ("return (q > 0) @ (k > 0).mT", "it fails: line 5: "),
    ("return attend(q)", "it fails: line 5: NameError: name 'attend' is not defined"),
    ("return 7", "it returns a value of type int; expected a tensor of shape (2, 3, 7, 5)"),
    ("w = q @ k.mT", "it returns None; did you forget `return`? Expected a tensor of shape (2, 3, 7, 5)"),
    ("return q[:1] + 0 * k", "the shape is right, but the values are not; the largest difference is "),
    ("return q.mean(dim=1)", "it returns shape (2, 7, 5); expected (2, 3, 7, 5)"),
    ("raise NotImplementedError", "not filled in yet"),
    ('raise NotImplementedError("fill this in")', "not filled in yet"),
    ("return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).detach()", "no gradient reaches the inputs"),
    ("return (q @ k.detach().mT / q.shape[-1] ** 0.5).softmax(-1) @ v", "the gradient of argument 2 is not"),
    ("return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v", "right: ")])
def test_check_file_says_what_is_wrong(body, words, tmp_path):
    path = tmp_path / "attention_exercise.py"
    path.write_text(f"import torch\n\n\ndef attention(q, k, v):\n    {body}\n", encoding="utf-8")
    verdict = e.check_file("attention", path)
    assert words in verdict.words
    assert "\n" not in verdict.words
    assert verdict.right == words.startswith("right")


def test_check_function_refuses_a_wrong_gradient():
    def without_one_way(x, norm1, attend, norm2, mlp):
        y = x + attend(norm1(x))
        return y + mlp(norm2(y.detach()))

    assert "the gradient of argument 1 is not" in e.check_function("block", without_one_way).words


@pytest.mark.parametrize(("text", "words"), [
    ("def attention(q, k, v)\n    return q", "line 1: "), ("import nowhere", "ModuleNotFoundError"),
    ("def other(q): return q", r"has no function attention\(q, k, v\)"), ("1 / 0", "line 1: ZeroDivisionError"),
    ("import sys\nsys.exit(0)", r"cannot be run: line 2: this would end Python \(sys.exit, exit or quit\)")])
def test_check_file_refuses_a_file_that_cannot_run(text, words, tmp_path):
    path = tmp_path / "attention_exercise.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        e.check_file("attention", path)


WITH_DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

import torch


@dataclass
class Sizes:
    width: int


def attention(q, k, v):
    return torch.softmax(q @ k.mT / Sizes(q.shape[-1]).width ** 0.5, -1) @ v
"""


@pytest.mark.parametrize("name", ["mine.py", "torch.py"])  # which is not the torch that it imports
def test_check_file_runs_dataclasses_and_leaves_nothing_behind(name, tmp_path):
    path = tmp_path / name
    path.write_text(WITH_DATACLASS, encoding="utf-8")
    assert e.check_file("attention", path).right
    assert sys.modules["torch"] is torch
    assert not [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == str(path)]


def test_check_file_refuses_a_nul_byte(tmp_path):
    path = tmp_path / "attention_exercise.py"
    path.write_bytes(b"x = 1\0\n")
    with pytest.raises(InputError, match=r"cannot be run: (ValueError: )?source code [^\n]*null bytes\Z"):
        e.check_file("attention", path)


def test_check_function_lets_keyboard_interrupts_through():
    def interrupted(x, norm1, attend, norm2, mlp):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        e.check_function("block", interrupted)


@pytest.mark.parametrize("name", e.EXERCISES)
def test_write_stub_starts_unfilled_and_never_overwrites(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = e.default_path(name)
    e.write_stub(name, path)
    assert e.check_file(name, path) == e.Verdict(False, "not filled in yet")
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100
    with pytest.raises(InputError, match="already exists and is not overwritten"):
        e.write_stub(name, path)
    with pytest.raises(InputError, match="exercise 'atention' is unknown"):
        e.check_file("atention", path)


def test_check_file_takes_relative_paths_and_refuses_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def attention(q, k, v):\n    return q @ k\n", encoding="utf-8")
    assert e.check_file("attention", "mine.py").words.startswith("it fails: line 2: RuntimeError")
    (tmp_path / "mine").touch()
    for path in ("mine", "."):
        with pytest.raises(InputError, match=r"is not a Python file; choose a name that ends in \.py"):
            e.check_file("attention", path)
    with pytest.raises(InputError, match=r"other\.py does not exist; python examples\.py exercise attention writes"):
        e.check_file("attention", "other.py")
    with pytest.raises(InputError, match=r"stub\.txt is not a Python file; choose a name that ends in \.py"):
        e.write_stub("attention", "stub.txt")
    assert not Path("stub.txt").exists()
