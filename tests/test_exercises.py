"""Right answers pass, the usual mistakes are told by name, and whatever else is off is said in one line."""

import pytest
import torch

import exercises as e
from vit_model import InputError, MultiHeadAttention, PatchEmbedding, TransformerBlock, VisionTransformer

MISTAKES = [pytest.param(name, words, mistaken, id=f"{name}, {words[:30]}") for name, exercise in e.EXERCISES.items()
            for words, mistaken in exercise.mistakes]


@pytest.mark.parametrize("name", e.EXERCISES)
def test_the_solution_passes(name):
    assert e.check_function(name, e.EXERCISES[name].solution) == e.Verdict(
        True, "right: values on three sets of inputs, and the gradients")


@pytest.mark.parametrize(("name", "words", "mistaken"), MISTAKES)
def test_each_usual_mistake_has_its_own_words(name, words, mistaken):
    assert e.check_function(name, mistaken) == e.Verdict(False, words)


def test_five_mistakes_or_more_each():
    assert all(len(exercise.mistakes) >= 5 for exercise in e.EXERCISES.values())
    words = [words for exercise in e.EXERCISES.values() for words, _ in exercise.mistakes]
    assert len(set(words)) == len(words)


# ---- The solutions are what the library does


def test_attention_and_block_are_those_of_the_model():
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(embed_dim=12, n_heads=3), torch.randn(2, 7, 12)
    q, k, v = layer.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(layer.proj(e.attention(q, k, v).transpose(1, 2).flatten(2)), layer(x))
    block = TransformerBlock(12, 3)
    torch.testing.assert_close(e.block(x, block.norm1, block.attn, block.norm2, block.mlp), block(x))


def test_patches_and_positions_are_those_of_the_model():
    torch.manual_seed(0)
    embed, images = PatchEmbedding(img_size=(8, 12), patch_size=4, embed_dim=6), torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(e.patch_embedding(images, embed.proj.weight.flatten(1), embed.proj.bias), embed(images))
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=6, depth=1, n_heads=2, n_classes=3)
    patches = torch.randn(2, 4, 6)
    torch.testing.assert_close(e.add_positions(patches, model.cls_token, model.pos_embed),
                               model.add_prefix(patches, (8, 8)))


# ---- What else is off


@pytest.mark.parametrize(("body", "words"), [
    ("return q.transpose(0, 1) @ k", "it stops: line 5: RuntimeError: "),
    ("q += k; return q @ k.mT @ v", "do not change an argument in place"),
    ("return attend(q)", "it stops: line 5: NameError: name 'attend' is not defined"),
    ("return 7", "it returns a int; expected a tensor of shape (2, 3, 7, 5)"),
    ("return q[:1] + 0 * k", "the shape is right, the values are not: the largest difference is "),
    ("return q.mean(dim=1)", "it returns the shape (2, 7, 5); expected (2, 3, 7, 5)"),
    ("raise NotImplementedError", "not filled in yet"),
    ("return ((q @ k.mT / 5**0.5).softmax(-1) @ v).detach()", "no gradient comes back"),
    ("return (q @ k.detach().mT / 5**0.5).softmax(-1) @ v", "the gradient of argument 2 is not"),
    ("return (q @ k.mT / 5**0.5).softmax(-1) @ v", "right: ")])
def test_a_file_is_told_what_is_off(body, words, tmp_path):
    path = tmp_path / "attention_exercise.py"
    path.write_text(f"import torch\n\n\ndef attention(q, k, v):\n    {body}\n", encoding="utf-8")
    verdict = e.check_file("attention", path)
    assert words in verdict.words
    assert "\n" not in verdict.words
    assert verdict.right == words.startswith("right")


@pytest.mark.parametrize(("text", "words"), [
    ("def attention(q, k, v)\n    return q", "line 1: "), ("import nowhere", "ModuleNotFoundError"),
    ("def other(q): return q", r"has no function attention\(q, k, v\)"), ("1 / 0", "line 1: ZeroDivisionError")])
def test_a_file_that_cannot_be_run(text, words, tmp_path):
    path = tmp_path / "attention_exercise.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        e.check_file("attention", path)


@pytest.mark.parametrize("name", e.EXERCISES)
def test_a_stub_waits_to_be_filled_in_and_is_never_written_over(name, tmp_path):
    path = tmp_path / "stub.py"
    e.write_stub(name, path)
    assert e.check_file(name, path) == e.Verdict(False, "not filled in yet")
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100
    with pytest.raises(InputError, match="is there already, and is left as it is"):
        e.write_stub(name, path)
    with pytest.raises(InputError, match="exercise 'atention' is unknown"):
        e.check_file("atention", path)


def test_a_relative_path_has_line_numbers_too_and_other_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def attention(q, k, v):\n    return q @ k\n", encoding="utf-8")
    assert e.check_file("attention", "mine.py").words.startswith("it stops: line 2: RuntimeError")
    (tmp_path / "mine").touch()
    for path in ("mine", "."):
        with pytest.raises(InputError, match=r"is no Python file; expected one whose name ends in \.py"):
            e.check_file("attention", path)
