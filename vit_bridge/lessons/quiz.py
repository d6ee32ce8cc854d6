"""A quiz about ViTs and CNNs: guess first, then see the result, which is measured live.

    QUESTIONS     Question: a text, the guesses to choose from, and measure()
    ask(...)      asks the questions one after the other

Shapes:  N images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vit_bridge.analysis.attention import attention_distance, uniform_attention_distance
from vit_bridge.analysis.capture import capture
from vit_bridge.analysis.cost import count_flops, count_parameters
from vit_bridge.analysis.perturbations import mean_consistency, shift_consistency, shuffle_patches
from vit_bridge.data.shapes import TEST_START, make_shapes
from vit_bridge.models.registry import build_model
from vit_bridge.runtime import predictions
from vit_bridge.weights.checkpoints import load
from vit_model import MultiHeadAttention, create_vit_base, create_vit_nano


@dataclass(frozen=True)
class Question:
    """A question; measure() returns the index of the right guess and a text with the measured numbers."""

    text: str
    guesses: tuple
    measure: Callable


def _shapes_for(model, n_images):
    drawn = make_shapes(n_images, 32, start=TEST_START)
    return model.preprocessing.normalise(drawn.images), drawn.labels


def _where_the_parameters_are():
    model = create_vit_base()
    block = model.blocks[0]
    share = count_parameters(block.mlp) / count_parameters(block)
    return (1 if share > 0.5 else 0), (
        f"In ViT-Base, the MLP holds {share:.0%} of the {count_parameters(block):,} parameters of a block.")


def _cost_of_twice_the_side():
    flops = [count_flops(create_vit_base(img_size=side)) for side in (224, 448)]
    ratio = flops[1] / flops[0]
    return (0 if ratio < 3 else 1 if ratio < 6 else 2), (
        f"{flops[0] / 1e9:.1f} GFLOPs become {flops[1] / 1e9:.1f}, which is {ratio:.1f} times as much. There are four "
        f"times as many tokens, so layers that treat each token by itself cost four times as much. Only the products "
        f"of attention cost sixteen times as much.")


def _cost_of_windows():
    with torch.device("meta"):  # tensors without storage: counting needs no memory
        swin, vit = ([count_flops(build_model(name, n_classes=1000, img_size=side)) for side in (448, 896)]
                     for name in ("swin_tiny", "vit_small"))
    ratio = swin[1] / swin[0]
    return (0 if ratio < 3 else 1 if ratio < 6 else 2), (
        f"{swin[0] / 1e9:.0f} GFLOPs become {swin[1] / 1e9:.0f}, which is {ratio:.1f} times as much. There are four "
        f"times as many tokens, and each attends to 49 tokens as before. ViT-Small costs about the same at 224 pixels, "
        f"but {vit[1] / vit[0]:.1f} times as much at 896 as at 448.")


def _shuffled_without_positions():
    model = create_vit_nano(n_classes=10, position="none").eval()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = model(images), model(shuffle_patches(images, 4))
    change = ((after - before).norm() / before.norm()).item()
    return (0 if change < 1e-4 else 1 if change < 0.1 else 2), f"Relative to their size, they change by {change:.0e}."


def _gradient_after_the_last_block():
    model = load("vit_nano_shapes")
    seen = capture(model, _shapes_for(model, 4)[0], gradients=True)
    before, after = torch.autograd.grad(seen.logits.square().sum(), seen.tokens[-2:])
    before, after = (gradient[:, 1:].abs().max().item() for gradient in (before, after))
    return (0 if after == 0 else 1), (
        f"After the last block, the largest gradient is {after:g}; one block earlier it is {before:.2g}. The head "
        f"reads only CLS, and no later block can pass information from the patches to CLS.")


def _who_needs_the_order():
    own = load("vit_nano_shapes").patch_embed.patch_size[0]
    vit, convnet = ([_accuracy_kept(load(key), own, offset) for offset in (0, own // 2)]
                    for key in ("vit_nano_shapes", "convnet_shapes"))
    return (0 if vit[0] < 0.5 else 1 if vit[0] < 0.9 else 2), (
        f"The ViT keeps {vit[0]:.0%} of its correct predictions: its tokens stay intact but change positions. It keeps "
        f"{vit[1]:.0%} if the grid is moved by {own // 2} pixels, so that it cuts through the patches. The ConvNet, "
        f"whose windows are cut by both grids, keeps {convnet[0]:.0%} and {convnet[1]:.0%}. "
        f"{_conclude_about_order(*vit)}")


def _accuracy_kept(model, patch_size, offset):
    """Return the fraction of correct predictions on 200 images that stay correct when 75% of the squares are shuffled.

    The squares have this side in pixels, and their grid is moved by `offset` pixels.
    """
    images, labels = _shapes_for(model, 200)
    before, after = (predictions(model, one) == labels
                     for one in (images, shuffle_patches(images, patch_size, 0.75, offset=offset)))  # (N)
    return (before & after).sum().item() / max(1, before.sum().item())


def _conclude_about_order(own, moved):
    """Describe what the fractions kept on the ViT's own grid and on a moved one show."""
    if own < 0.9:
        return "On these shapes, the predictions of this ViT depend on where its patches are."
    if moved < own - 0.1:
        return ("On these shapes, this ViT hardly depends on where its own patches are, but the patches must stay "
                "intact.")
    return "On these shapes, this ViT depends neither on the order of its patches nor on whether they stay intact."


def _who_minds_a_shift():
    model = load("vit_nano_shapes")
    stays = mean_consistency(shift_consistency(model, _shapes_for(model, 64)[0], 2))
    return (0 if stays < 0.6 else 1 if stays < 0.9 else 2), (
        f"Over all shifts of up to 2 pixels, the prediction stays in {stays:.0%} of cases for 64 images, although "
        f"every patch changes. In training, the images were shifted too.")


def _how_far_the_first_block_looks():
    model = load("vit_nano_shapes")
    seen = capture(model, _shapes_for(model, 32)[0])
    near = attention_distance(torch.stack(seen.maps), seen.grid, seen.adapter.patch_size, seen.adapter.n_prefix)[0]
    line = uniform_attention_distance(seen.grid, seen.adapter.patch_size)
    share = near.min().item() / line
    nearer = (" In Fig. 7 of the ViT paper, some heads of the first blocks attend much nearer. Raghu et al. 2021 find "
              "such heads in large ViTs after pretraining on JFT-300M, but not after training on ImageNet alone."
              if share >= 0.8 else "")
    return (0 if share < 0.5 else 1 if share < 0.8 else 2), (
        f"The head of the first block that looks nearest looks {near.min():.1f} pixels away on average; for uniform "
        f"attention it is {line:.1f} pixels.{nearer}")


def _price_of_heads():
    counts = [count_parameters(MultiHeadAttention(embed_dim=96, n_heads=n)) for n in (1, 12)]
    return (1 if counts[0] == counts[1] else 0), (
        f"Attention of width 96 has {counts[0]:,} parameters with one head and {counts[1]:,} with twelve: the heads "
        f"divide the width among them.")


QUESTIONS = (
    Question("Where are most of the parameters of a block of ViT-Base?", ("in the attention", "in the MLP"),
             _where_the_parameters_are),
    Question("What happens to the number of parameters of attention with twelve heads instead of one?",
             ("it grows twelvefold", "nothing"), _price_of_heads),
    Question("The side of an image grows from 224 to 448 pixels. How many times as much does ViT-Base "
             "compute?", ("about twice as much", "three to six times as much", "sixteen times as much"),
             _cost_of_twice_the_side),
    Question("Swin-T attends within windows of 7 x 7 tokens. The side of an image grows from 448 to 896 pixels. How "
             "many times as much does it compute?", ("about twice as much", "three to six times as much",
                                                     "sixteen times as much"), _cost_of_windows),
    Question("What happens to the logits of a ViT without positions when all patches are shuffled?",
             ("nothing", "they change a little", "they change completely"), _shuffled_without_positions),
    Question("The head reads CLS. How large is the gradient of the patch tokens after the last block?",
             ("exactly zero", "small but not zero"), _gradient_after_the_last_block),
    Question("We shuffle three quarters of the patches that our trained ViT reads, in images of drawn shapes. How many "
             "of its correct predictions does it keep?", ("fewer than half", "half to nine in ten", "nearly all"),
             _who_needs_the_order),
    Question("Images move by one or two pixels, which changes every patch. How often does our trained ViT keep its "
             "prediction?", ("less than 60%", "60 to 90%", "more than 90%"), _who_minds_a_shift),
    Question("Take the head that looks nearest in the first block of our trained ViT. How far does it look, compared "
             "with uniform attention?", ("less than half as far", "half to four fifths as far", "nearly as far"),
             _how_far_the_first_block_looks),
)
END = "q"


def ask(questions=QUESTIONS, read=input, write=print):
    """Ask the questions one after the other.

    At the end of the input, the remaining results are printed without guesses.

    Parameters
    ----------
    questions : sequence of Question, optional
        What to ask.
    read, write : callable, optional
        Replacements for input and print.

    Returns
    -------
    tuple of int
        The number of right guesses and of all guesses; skipped questions are not guesses.
    """
    right = guessed = skipped = 0
    has_input = True
    for number, question in enumerate(questions, start=1):
        write(f"\n{number}. {question.text}")
        for place, guess in enumerate(question.guesses, start=1):
            write(f"   {place}) {guess}")
        answer = None
        try:
            answer = _read_guess(read, write, len(question.guesses)) if has_input else None
        except EOFError:
            has_input = False
            write("")
        if answer == END:
            break
        place, sentence = question.measure()
        verdict = ""
        if answer is None:
            skipped += 1
        else:
            guessed, right = guessed + 1, right + (answer == place)
            verdict = "Right. " if answer == place else "No. "
        write(f"   {verdict}Measured: {question.guesses[place]}. {sentence}")
    if guessed:
        write(f"\n{right} of {guessed} right{f', {skipped} skipped' if skipped else ''}.")
    return right, guessed


def _read_guess(read, write, n_guesses):
    """Return the index of a guess, None for no guess, or END to stop."""
    while True:
        text = read(f"   Your guess (Enter to skip, {END} to quit): ").strip()
        if not text:
            return None
        if text == END:
            return END
        if text.isdecimal() and 1 <= int(text) <= n_guesses:
            return int(text) - 1
        write(f"   {text!r} is not a choice; expected 1 to {n_guesses}.")
