"""Sixteen short demos, from cutting a photograph into patches to the patches that MAE and BEiT hide.

    python examples.py                  run all demos; --list names them, --only heads runs one
    python examples.py quiz             guess first, then see the measured result
    python examples.py exercise NAME    write a part yourself: fill in a file, then check it

Each demo prints what it measured and what to look at, and saves a figure in --output-dir.

Shapes:  B images, C channels, S side of an image in pixels, P patch side, N tokens, D width, H heads,
         K = D / H width of a head, L blocks, h, w height and width of a map in tokens, W windows, M tokens of a window.
"""

import math
import sys
import textwrap
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from train_vit import Trainer
from visualizations import (
    plot_images,
    visualize_attention_grid,
    visualize_patch_embedding,
    visualize_reconstruction,
)
from vit_bridge.analysis.capture import attention_maps
from vit_bridge.analysis.cost import count_flops, count_parameters
from vit_bridge.analysis.metrics import percent, wilson_interval
from vit_bridge.analysis.receptive_field import receptive_field
from vit_bridge.analysis.reconstruction import reconstruction_errors
from vit_bridge.cli import OneLineParser, script
from vit_bridge.data.datasets import DatasetInfo
from vit_bridge.data.images import open_image, prepare_images, sample_photographs
from vit_bridge.data.loaders import MemoryLoader, get_data_loaders
from vit_bridge.data.shapes import SHAPES, make_shapes
from vit_bridge.errors import InputError, closest_names
from vit_bridge.inference import predict
from vit_bridge.lessons.exercises import EXERCISES, check_file, default_path, solution, write_stub
from vit_bridge.lessons.quiz import ask
from vit_bridge.models.beit import block_mask
from vit_bridge.models.deit import create_deit_nano
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.models.mae import patchify, unpatchify
from vit_bridge.models.swin import (
    SwinBlock,
    WindowAttention,
    create_swin_tiny,
    join_windows,
    split_windows,
    spread_windows,
)
from vit_bridge.plots.charts import plot_bars, plot_matrices, plot_training_curves, save_figure
from vit_bridge.preprocessing import Preprocessing, eval_transform
from vit_bridge.training.objectives import Distillation
from vit_bridge.training.tokenizer import PatchTokenizer
from vit_bridge.weights.checkpoints import load
from vit_model import (
    VARIANTS,
    MultiHeadAttention,
    PatchEmbedding,
    VisionTransformer,
    create_vit,
    create_vit_nano,
    freeze_backbone,
)


def photograph():
    """Open the portrait of the astronaut Eileen Collins as a PIL image."""
    return open_image(sample_photographs()[0])


def photograph_tensor(img_size=224):
    """Return the portrait as a normalised batch, (1, 3, img_size, img_size)."""
    return eval_transform(Preprocessing(img_size, (0.5,) * 3, (0.5,) * 3))(photograph()).unsqueeze(0)


def shape_images(n_images, start=50_000):
    """Return normalised images of drawn shapes that no model here was trained on, (B, 3, 32, 32), and their source."""
    drawn = make_shapes(n_images, 32, start=start)
    return (drawn.images.float() / 255 - 0.5) / 0.25, drawn


# ---- The parts --------------------------------------------------------------------------------------------


def patches():
    """Turn an image into a sequence: cutting and projecting the patches is one strided convolution."""
    image, embed = photograph_tensor(), PatchEmbedding(img_size=224, patch_size=16, embed_dim=192)
    tokens = embed(image)  # (1, 196, 192)
    cut = F.unfold(image, kernel_size=16, stride=16).transpose(1, 2)  # (1, 196, 768), one row per patch
    by_hand = cut @ embed.proj.weight.flatten(1).T + embed.proj.bias  # (1, 196, 192)
    print(f"The {image.numel():,} numbers in a 224 x 224 image become {tokens.shape[1]} tokens of width "
          f"{tokens.shape[2]}.")
    print(f"Cutting, flattening and multiplying by a matrix computes the same tokens, up to "
          f"{_largest(tokens - by_hand):.1e}.")
    print("Look at: the order of the patches, row by row. So far, nothing else shows where a patch was.")
    return visualize_patch_embedding(photograph(), 16)


def attention():
    """Compute attention by hand: compare queries with keys, apply a softmax, average the values."""
    x, layer = torch.randn(1, 7, 8), MultiHeadAttention(embed_dim=8, n_heads=1)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)  # 3 x (1, 7, 8)
    weights = (q @ k.transpose(1, 2) / math.sqrt(8)).softmax(dim=-1)  # (1, 7, 7)
    by_hand = layer.proj(weights @ v)  # (1, 7, 8)
    print("Seven random tokens x of width 8, (1, 7, 8), and an untrained layer: softmax(Q K^T / sqrt(8)) V.")
    print(f"By hand and in the module: the largest difference is {_largest(by_hand - layer(x)):.1e}.")
    print(f"Each row of the attention weights, (1, 7, 7), sums to one up to {_largest(weights.sum(-1) - 1):.1e}.")
    print("Look at: each row shows how one token (a query) distributes its attention over all seven (the keys).")
    print(f"Without training, the weights are around 1/7: here from {weights.min():.2f} to {weights.max():.2f}.")
    return plot_matrices([weights[0].detach()], ["attention of 7 random tokens"], "attention weight",
                         xlabel="key", ylabel="query")


def heads():
    """Split attention into heads: each head uses its own part of the width, then the results are concatenated."""
    x, layer = torch.randn(1, 7, 12), MultiHeadAttention(embed_dim=12, n_heads=3)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)  # 3 x (1, 7, 12)
    maps, outputs = [], []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)  # this head's K = 4 of D = 12 channels
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)  # (1, 7, 7)
        maps.append(scores.softmax(dim=-1))
        outputs.append(maps[-1] @ v[..., part])  # (1, 7, 4)
    by_hand = layer.proj(torch.cat(outputs, dim=-1))  # (1, 7, 12)
    one_head = MultiHeadAttention(embed_dim=12, n_heads=1)
    print(f"By hand and in the module: the largest difference is {_largest(by_hand - layer(x)):.1e}.")
    print(f"Attention has {count_parameters(layer)} parameters with three heads and {count_parameters(one_head)} with "
          f"one.")
    print("Look at: three heads have three different maps, but no more parameters than one head.")
    return plot_matrices([m[0].detach() for m in maps], [f"head {h} of 3" for h in (1, 2, 3)], "attention weight",
                         xlabel="key", ylabel="query")


def positions():
    """Shuffle the patches, with and without positions, to see what positions are for."""
    images, drawn = shape_images(256)
    order = torch.randperm(64)
    cut = F.unfold(images, kernel_size=4, stride=4)  # (256, 48, 64), one column per patch
    shuffled = F.fold(cut[:, :, order], (32, 32), kernel_size=4, stride=4)  # (256, 3, 32, 32)
    changes = {}
    for position in ("none", "sincos", "learned"):
        model = create_vit_nano(n_classes=10, position=position).eval()
        with torch.no_grad():
            before, after = model(images), model(shuffled)  # (256, 10)
        changes[position] = ((after - before).norm() / before.norm()).item()
    trained = load("vit_nano_shapes")
    with torch.no_grad():
        right, still_right = ((trained(batch).argmax(1) == drawn.labels).float().mean().item()
                              for batch in (images, shuffled))
    print("Relative change of the logits when the patches are shuffled, with random weights and these positions:",
          ", ".join(f"{name} {change:.1e}" for name, change in changes.items()))
    print(f"A trained ViT with positions has an accuracy of {right:.1%} on 256 shapes, and of {still_right:.1%} when "
          f"they are shuffled.")
    print("Look at: without positions, a ViT sees a bag of patches, and shuffling them changes nothing but rounding.")
    print("With positions, compare the two accuracies: they show how much these predictions depend on the order.")
    return plot_images([_to_picture(images[0]), _to_picture(shuffled[0])],
                       ["as drawn", f"shuffled: without positions,\nthe logits change by {changes['none']:.0e}"],
                       title=f"Accuracy of the trained ViT: {right:.0%} and {still_right:.0%}", columns=2)


def cls_token():
    """Show that the head reads only the CLS token: after the last block, no other token matters."""
    images, _ = shape_images(4)
    model = load("vit_nano_shapes")
    tokens = model.forward_features(images).detach().requires_grad_()  # (4, 65, 96)
    model.forward_head(tokens).sum().backward()
    on_cls, on_patches = tokens.grad[:, 0], tokens.grad[:, 1:]  # (4, 96), (4, 64, 96)
    maps = attention_maps(model, images)  # (L, 4, H, 65, 65)
    to_itself = maps[:, :, :, 0, 0].mean(dim=(1, 2)).tolist()
    print(f"After the last block, the largest gradient of the logits is {_largest(on_cls):.3f} on CLS and "
          f"{_largest(on_patches):.1f} on the patches.")
    print("Attention of CLS to itself, block by block:", ", ".join(f"{share:.0%}" for share in to_itself))
    print("Look at: CLS can gather from the patches in every block. What it has not gathered by the end is lost.")
    return visualize_attention_grid(model, images)


# ---- The whole model --------------------------------------------------------------------------------------


def vit_by_hand(images, w, patch_size, depth, n_heads):
    """Compute the logits of a ViT in plain tensor operations, from images (B, C, height, width) and a state dict."""

    def norm(x, name):
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    B, C, height, width = images.shape
    P = patch_size
    x = images.reshape(B, C, height // P, P, width // P, P)
    x = x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * P * P)  # (B, N - 1, C P P)
    x = x @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]  # (B, N - 1, D)
    x = torch.cat([w["cls_token"].expand(B, -1, -1), x], dim=1) + w["pos_embed"]  # (B, N, D)
    D = x.shape[2]
    K = D // n_heads
    for i in range(depth):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")  # (B, N, 3 D)
        heads = []
        for h in range(n_heads):
            q, k, v = (qkv[..., part * D + h * K :][..., :K] for part in range(3))  # 3 x (B, N, K)
            scores = torch.exp(q @ k.transpose(1, 2) / math.sqrt(K))  # (B, N, N)
            heads.append(scores / scores.sum(dim=-1, keepdim=True) @ v)  # (B, N, K)
        x = x + linear(torch.cat(heads, dim=-1), f"{block}.attn.proj")  # (B, N, D)
        hidden = gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))  # (B, N, 4 D)
        x = x + linear(hidden, f"{block}.mlp.fc2")  # (B, N, D)
    return linear(norm(x, "norm")[:, 0], "head")  # (B, n_classes)


@torch.no_grad()
def whole_vit():
    """Write out a whole ViT in tensor operations; it computes the same logits as the model."""
    images, drawn = shape_images(256)
    model = load("vit_nano_shapes")
    theirs = vit_by_hand(images, model.state_dict(), patch_size=4, depth=4, n_heads=3)  # (256, 10)
    ours = model(images)  # (256, 10)
    correct = int((theirs.argmax(1) == drawn.labels).sum())
    print(f"The logits reach {_largest(ours):.1f}, and the largest difference is {_largest(theirs - ours):.1e}.")
    print(f"The accuracy by hand on 256 unseen images is {percent(correct, 256)}.")
    print("Look at: vit_by_hand, above this function in examples.py, which is a whole ViT.")
    classes = [model.preprocessing.class_names[i] for i in theirs.argmax(1)]
    return plot_images([_to_picture(image) for image in images[:8]], classes[:8])


def variants():
    """Count the parameters of the variants, and of a deeper model that has fewer."""
    with torch.device("meta"):  # tensors without storage: counting needs no memory
        models = {name: create_vit(name) for name in VARIANTS}
        models["384 wide, 24 deep"] = VisionTransformer(embed_dim=384, depth=24, n_heads=6, n_classes=1000)
    counts = {name: count_parameters(model) for name, model in models.items()}
    for name, model in models.items():
        config = model.config
        print(f"  {name:<18} D {config.embed_dim:>4}  blocks {config.depth:>2}  heads {config.n_heads:>2}  "
              f"patch {config.patch_size:>2}  {counts[name]:>11,} parameters")
    ratio = counts["vit_base"] / counts["384 wide, 24 deep"]
    print(f"Look at: the last model is twice as deep as vit_base and half as wide. vit_base has {ratio:.1f} times as "
          f"many parameters, because a block has about 12 D^2.")
    return plot_bars({"million parameters, 1000 classes": {n: c / 1e6 for n, c in counts.items()}})


# ---- Learning ---------------------------------------------------------------------------------------------


def first_training():
    """Train a first small ViT on the drawn shapes."""
    torch.manual_seed(0)
    train_loader, val_loader = get_data_loaders(dataset="shapes", img_size=32, n_images=4_000)
    trainer = Trainer(create_vit_nano(n_classes=10), device="cpu")
    started = time.perf_counter()
    history = trainer.train(train_loader, val_loader, n_epochs=2, learning_rate=2e-3, progress=sys.stderr.isatty())
    correct = round(history["val_acc"][-1] * val_loader.n_images)
    print(f"After {time.perf_counter() - started:.0f} s, the accuracy is {percent(correct, val_loader.n_images)} on "
          f"{val_loader.n_images} validation images. Guessing reaches 10%.")
    print("Look at: is the loss still falling at the end? To train longer, run python train_vit.py.")
    return plot_training_curves(history)


def transfer():
    """Transfer a frozen backbone that learned ten shapes: a new head learns round or straight from 100 images."""
    info = DatasetInfo("edges", Preprocessing(32, (0.5,) * 3, (0.25,) * 3, class_names=["round", "straight"]))
    straight = torch.tensor([name in ("triangle", "square", "star", "cross", "tee") for name in SHAPES]).long()
    train, test = make_shapes(100, 32, start=60_000), make_shapes(1_000, 32, start=70_000)
    train_loader = MemoryLoader(train.images, straight[train.labels], info, batch_size=20, training=True)
    test_loader = MemoryLoader(test.images, straight[test.labels], info, batch_size=200)
    results = {}
    for name, model in (("trained on shapes", load("vit_nano_shapes")),
                        ("random (control)", create_vit_nano(n_classes=10))):
        torch.manual_seed(0)
        model.head = nn.Linear(model.head.in_features, len(info.class_names))
        trainer = Trainer(freeze_backbone(model), device="cpu")
        trainer.train(train_loader, n_epochs=20, learning_rate=1e-2, progress=sys.stderr.isatty())
        score = trainer.evaluate(test_loader)
        results[name] = (score["acc"], *wilson_interval(score["correct"], score["n"]))
        print(f"  backbone {name}: accuracy {percent(score['correct'], score['n'])} on 1,000 test images; "
              f"{count_parameters(model, trainable_only=True):,} of {count_parameters(model):,} parameters trained")
    print("Look at: do features that were learned for one task help with another? Guessing reaches 50%.")
    return plot_bars({"test accuracy, 95% interval": results})


# ---- Looking inside ---------------------------------------------------------------------------------------


def attention_map():
    """Show attention maps: what the patches of four photographs attend to in a trained ViT, block by block."""
    model = load("vit_nano_cifar10")  # its head reads the mean of the patches, so the rows are means over them
    images = prepare_images(sample_photographs(), model)  # (4, 3, 32, 32)
    trained = attention_maps(model, images)  # (L, 4, H, 65, 65)
    fresh = attention_maps(create_vit_nano(n_classes=10).eval(), images)
    for name, maps in (("trained", trained), ("random weights (control)", fresh)):
        entropy = -(maps * maps.clamp_min(1e-12).log()).sum(-1)  # (L, 4, H, 65), in nats
        counts = ", ".join(f"{n:.0f}" for n in entropy.mean(dim=(1, 2, 3)).exp())
        print(f"  {name}: a token attends to about {counts} of 65 tokens, block by block")
    print("  (1 means a single token, 65 all tokens equally. This is the exponential of the mean entropy of the rows.)")
    print("Look at: the bright patches get the most attention from the patches that the head reads.")
    print("This model has only ten classes, so it must assign even an astronaut and a cup of coffee to one of them.")
    return visualize_attention_grid(model, images)


def hybrid():
    """Compare the hybrid with the ViT: the same Transformer, but its tokens come from convolutions and overlap."""
    images, _ = shape_images(32)
    models = {"ViT": load("vit_nano_shapes"), "Hybrid": load("hybrid_shapes")}
    fields = {}
    for name, model in models.items():
        fields[name] = receptive_field(model, images, depth=0)  # (32, 32)
        side = math.isqrt(int((fields[name] > 0).sum()))
        print(f"  {name}: before the first attention, a token sees {side} x {side} pixels; "
              f"{count_parameters(model):,} parameters, {count_flops(model) / 1e6:.0f} MFLOPs")
    cat = sample_photographs()[1]
    for name in ("vit_nano_cifar10", "hybrid_cifar10", "convnet_cifar10"):
        guesses = ", ".join(f"{guess} {share:.0%}" for guess, share in predict(load(name), cat, top=2))
        print(f"  {name}, trained on small photographs, predicts for the cat in {cat.name}: {guesses}")
    large = HybridCNNViT(n_classes=10, embed_dim=384, depth=6)
    print(f"HybridCNNViT(n_classes=10, embed_dim=384, depth=6) has {count_parameters(large):,} parameters.")
    print("Look at: patches lie side by side like tiles. The hybrid's tokens overlap, as the features of a CNN do.")
    return plot_matrices(list(fields.values()), [f"{name}, one token" for name in fields],
                         "fraction of the mean absolute gradient", xlabel="pixel", ylabel="pixel")


# ---- The family -------------------------------------------------------------------------------------------


def windows():
    """Keep attention within windows, as Swin does: one softmax per window, and a bias for each offset."""
    x, layer = torch.randn(1, 8, 8, 12), WindowAttention(embed_dim=12, n_heads=1, window=(4, 4))  # x: (B, h, w, D)
    nn.init.normal_(layer.relative_position_bias_table)  # (49, 1): offsets of -3 to 3 rows and columns
    q, k, v = layer.qkv(split_windows(x, (4, 4))).chunk(3, dim=-1)  # 3 x (1, 4, 16, 12): four windows of 16 tokens
    row, column = torch.arange(16) // 4, torch.arange(16) % 4  # of each token in its window
    offset = (row[:, None] - row + 3) * 7 + column[:, None] - column + 3  # (16, 16), from query to key
    bias = layer.relative_position_bias_table[offset, 0]  # (16, 16)
    weights = (q @ k.transpose(2, 3) / math.sqrt(12) + bias).softmax(dim=-1)  # (1, 4, 16, 16)
    by_hand = layer.proj(join_windows(weights @ v, (4, 4), (8, 8)))  # (1, 8, 8, 12)
    full = WindowAttention(embed_dim=12, n_heads=1, window=(8, 8))
    full.load_state_dict(layer.state_dict() | {"relative_position_bias_table": torch.zeros(225, 1)})
    everywhere = full(x, return_attention=True)[1]  # (1, 1, 1, 64, 64): one window, one head
    print("A map of 8 x 8 tokens, cut into four windows of 4 x 4: softmax(Q K^T / sqrt(K) + B) V in each window.")
    print(f"By hand and in the module: the largest difference is {_largest(by_hand - layer(x)):.1e}.")
    for side in (224, 448):
        with torch.device("meta"):  # tensors without storage: counting needs no memory
            small, whole = (count_flops(create_swin_tiny(img_size=side, window_size=size)) for size in (7, side // 4))
        print(f"  Swin-T at {side} pixels: {small / 1e9:.0f} GFLOPs with windows of 7 x 7 tokens, {whole / 1e9:.0f} "
              f"with one window for the whole map")
    print("Four times as many tokens: with windows the model costs four times as much, with full attention far more.")
    print("Look at: a token attends to the 16 tokens of its window. The bias favours the same offsets in all windows.")
    maps = {"full attention,\nno bias": everywhere[0, 0, 0],
            "in windows,\nwith the bias": spread_windows(weights[:, :, None], (4, 4), (0, 0), (8, 8))[0, 0]}  # (64, 64)
    return plot_matrices([m.detach() for m in maps.values()], list(maps), "attention weight", xlabel="key",
                         ylabel="query")


def shift():
    """Follow which tokens can influence one token of a Swin: only the shift connects the windows."""
    reached = {}
    for name, by in (("without the shift", (0, 0)), ("with the shift", (2, 2))):
        torch.manual_seed(0)
        blocks = [SwinBlock(embed_dim=8, n_heads=2, window=(4, 4), shift=by if i % 2 else (0, 0)) for i in range(4)]
        for depth in (2, 4):
            x = torch.randn(1, 16, 16, 8, requires_grad=True)  # (B, h, w, D)
            nn.Sequential(*blocks[:depth])(x)[0, 9, 9].sum().backward()  # the token in row 9 and column 9
            reached[f"{name}, {depth} blocks"] = (x.grad[0].abs().sum(dim=-1) > 0).int()  # (16, 16)
    print("A map of 16 x 16 tokens, windows of 4 x 4. Which tokens can influence the output in row 9, column 9?")
    for name, tokens in reached.items():
        rows, columns = (int(tokens.amax(dim=axis).sum()) for axis in (1, 0))
        print(f"  {name}: {int(tokens.sum())} of 256 tokens, {rows} rows and {columns} columns")
    print("After two blocks with the shift (o is the output's own place):")
    for i, row in enumerate(reached["with the shift, 2 blocks"].tolist()):
        print("   ", " ".join("o" if (i, j) == (9, 9) else "#" if seen else "." for j, seen in enumerate(row)))
    print("Look at: without the shift, no number of blocks leaves the window. With it, the region grows, as in a CNN.")
    return plot_matrices(list(reached.values()), [name.replace(", ", ",\n") for name in reached],
                         "1: can influence the token", xlabel="column", ylabel="row")


def teacher():
    """Ask a teacher: its probabilities say more than a label, and both losses of DeiT by hand."""
    images, drawn = shape_images(256)
    labels, convnet, names = drawn.labels, load("convnet_shapes"), load("convnet_shapes").preprocessing.class_names
    student = create_deit_nano(n_classes=10, img_size=32)
    objectives = {kind: Distillation(convnet, convnet.preprocessing, kind, label_smoothing=0.0).train()
                  for kind in ("hard", "soft")}
    with torch.no_grad():
        theirs, heads = convnet(images), student(images)  # (256, 10), and in training mode 2 x (256, 10): CLS and DIST
        shares = (theirs / 3).softmax(dim=1)  # (256, 10), softened by the temperature 3
        on_labels, on_predictions = (-logits.log_softmax(dim=1).gather(1, classes[:, None]).mean()
                                     for logits, classes in zip(heads, (labels, theirs.argmax(1)), strict=True))
        divergence = (shares * (shares.log() - (heads[1] / 3).log_softmax(dim=1))).sum(dim=1).mean()
        by_hand = dict(hard=on_labels / 2 + on_predictions / 2, soft=0.9 * on_labels + 0.1 * 9 * divergence)
        for kind, value in by_hand.items():
            loss = objectives[kind].loss(heads, images, labels)
            print(f"  {kind} loss by hand {value:.4f}; the module differs by {_largest(value - loss):.1e}")
    predicted = theirs.softmax(dim=1)  # (256, 10)
    doubtful = int((predicted * predicted.log()).sum(dim=1).argmin())  # the image with the largest entropy
    right = int((theirs.argmax(1) == labels).sum())
    best = ", ".join(f"{names[i]} {predicted[doubtful, i]:.0%}" for i in predicted[doubtful].topk(3).indices)
    print(f"The teacher, a ConvNet, is right on {percent(right, 256)} of these shapes.")
    print(f"It is least sure of image {doubtful}, whose label is {names[labels[doubtful]]}. It predicts {best}.")
    print("Look at: the label names one class. The teacher also ranks the others, for this very image.")
    print("Does that help a student? In five minutes on CIFAR-10 (JPEG) it did not: docs/family.md, What we measured.")
    bars = {"the label": F.one_hot(labels[doubtful], 10), "the teacher": predicted[doubtful],
            "the teacher at T = 3": shares[doubtful]}
    return plot_bars({title: dict(zip(names, values.tolist(), strict=True)) for title, values in bars.items()},
                     title=f"Probabilities for image {doubtful}, a {names[labels[doubtful]]}", same_scale=True)


# ---- Without labels ---------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruction():
    """Hide most of a photograph, as MAE does, and fill it in: by a model, by interpolation and by the mean colour."""
    model = load("mae_nano_cifar10")  # it predicts plain pixels, so it borrows nothing from the hidden patches
    images, noise = prepare_images(sample_photographs(), model.encoder()), torch.rand(4, 64)  # (4, 3, 32, 32)
    loss, prediction, mask = model(images, noise)  # (), (4, 64, 48), and (4, 64): 1 where a patch is hidden
    patches, hidden = patchify(images, (4, 4)), mask[:, :, None] > 0  # (4, 64, 48), (4, 64, 1)
    by_hand = (prediction - patches).square()[hidden.expand_as(patches)].mean()
    changed = torch.where(hidden, torch.randn_like(patches), patches)
    effect = model(unpatchify(changed, (4, 4), (32, 32)), noise)[1] - prediction  # (4, 64, 48)
    print(f"Of {mask.shape[1]} patches, the encoder sees {int((~hidden[0]).sum())}, chosen at random. The loss is the "
          f"mean squared error of the others.")
    print(f"By hand and in the module: the difference of the losses is {_largest(by_hand - loss):.1e}.")
    print(f"With random pixels in all hidden patches, the prediction changes by {_largest(effect):.1e}: the model does "
          f"not see them.")
    print("Mean squared error of the hidden pixels, from 0 to 1, on four photographs with 16 masks each:")
    for ratio in (0.25, 0.5, 0.75, 0.9):
        errors = reconstruction_errors(model, images.repeat(16, 1, 1, 1), ratio)
        print(f"  {ratio:.0%} hidden: " + ", ".join(f"{name} {error:.4f}" for name, error in errors.items()))
    print(f"The model was trained with {model.config.mask_ratio:.0%} hidden. Interpolation and the mean colour know "
          f"nothing about photographs.")
    print("Look at: for which shares is the model better than interpolation?")
    print("If many pictures fit the visible patches, their mean has the smallest squared error, and a mean is blurred.")
    return visualize_reconstruction(model, images[2:3], mask_ratios=(0.5, 0.75, 0.9))


def tokenizer():
    """Give each patch a visual token, the nearest of a few centres: BEiT names the tokens of hidden patches."""
    shown = Preprocessing(224, (0.5,) * 3, (0.5,) * 3)
    images = torch.stack([eval_transform(shown)(open_image(path)) for path in sample_photographs()])  # (4, 3, 224, 224)
    cut = F.unfold(images, kernel_size=8, stride=8).transpose(1, 2)  # (4, 784, 192), one row per patch
    panels = {"the photograph": cut[0]}
    for n_tokens in (4, 16, 64, 256):
        tokens = PatchTokenizer(n_tokens, patch_size=8).fit(images)
        ids = tokens(images)  # (4, 784)
        redrawn = tokens.pictures.flatten(1)[ids]  # (4, 784, 192): each patch becomes the picture of its token
        panels[f"{n_tokens} tokens"] = redrawn[0]
        shares = ids.flatten().bincount() / ids.numel()
        print(f"  {n_tokens:>3} tokens: perplexity {tokens.perplexity(ids):.1f}; the commonest stands for "
              f"{shares.max():.0%} of the patches; error of the pictures {((redrawn - cut) / 2).square().mean():.4f}")
    print("  (The perplexity is the number of tokens if all are equally frequent, and smaller otherwise.")
    print("  The error is the mean squared error of pixels from 0 to 1.)")
    same = int((torch.cdist(cut, tokens.centres).argmin(dim=2) == ids).sum())
    print(f"By hand and in the module: {same:,} of {ids.numel():,} patches have the same nearest centre.")
    blocks = torch.stack([block_mask((28, 28), n_hidden=314).flatten() for _ in range(10)])  # (10, 784): 40% are hidden
    at_random = torch.rand(10, 784).argsort(dim=1) < 314  # (10, 784)
    in_blocks, elsewhere = (_copied_tokens(ids, masks) for masks in (blocks, at_random))
    print(f"With {n_tokens} tokens, a hidden patch has the token of the nearest visible one in {in_blocks:.0%} of the "
          f"cases if blocks are hidden,")
    print(f"and in {elsewhere:.0%} if as many patches are hidden at random.")
    print("Look at: what do few tokens keep of the photograph, and what do they lose? And what do blocks change?")
    common = ids[0] == ids[0].bincount().argmax()  # (784)
    panels |= {"commonest token": redrawn[0][common][:1], "its patches": cut[0] * common[:, None],  # 0 is grey
               "hidden at random": cut[0] * ~at_random[0][:, None], "hidden in blocks": cut[0] * ~blocks[0][:, None],
               "tokens to name": redrawn[0] * blocks[0][:, None]}
    pictures = [F.fold(rows.T[None], 8 * math.isqrt(len(rows)), 8, stride=8)[0] for rows in panels.values()]
    return plot_images(pictures, list(panels), columns=5, preprocessing=shown,
                       title="Tokens of a photograph, and what BEiT hides")


def _copied_tokens(ids, masks):
    """Return how often the nearest visible patch has the token of a hidden one: ids (B, 784), masks (n, 784)."""
    places, right = torch.cartesian_prod(torch.arange(28.0), torch.arange(28.0)), []  # (784, 2)
    for hidden in masks:
        nearest = torch.cdist(places[hidden], places[~hidden]).argmin(dim=1)
        right.append(ids[:, ~hidden][:, nearest] == ids[:, hidden])  # (B, hidden)
    return torch.cat(right).float().mean().item()


def _largest(x):
    """Return the largest absolute value."""
    return x.abs().max().item()


def _to_picture(image):
    """Undo the normalisation by 0.5 and 0.25: (3, S, S) -> (S, S, 3) from 0 to 1."""
    return (image * 0.25 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


DEMOS = {demo.__name__: demo for demo in (patches, attention, heads, positions, cls_token, whole_vit, variants,
                                          first_training, transfer, attention_map, hybrid, windows,
                                          shift, teacher, reconstruction, tokenizer)}
TRAINS = ("first_training", "transfer")  # a dry run skips these


# ---- The commands -----------------------------------------------------------------------------------------


def _run_quiz(argv):
    OneLineParser(prog="examples.py quiz", description="Guess first, then see the measured result.").parse_args(argv)
    torch.manual_seed(0)
    ask()


def _run_exercise(argv):
    parser = OneLineParser(prog="examples.py exercise", description="Write a part of a ViT and check it.")
    parser.add_argument("name", choices=list(EXERCISES), help="the exercise, one of %(choices)s", metavar="NAME")
    parser.add_argument("--file", help="the file to fill in, with a name that ends in .py (default: "
                                       "<name>_exercise.py)")
    help_wanted = parser.add_mutually_exclusive_group()
    help_wanted.add_argument("--hint", action="store_true", help="show a hint")
    help_wanted.add_argument("--solution", action="store_true", help="show our solution")
    options = parser.parse_args(argv)
    exercise = EXERCISES[options.name]
    path = Path(options.file) if options.file else default_path(options.name)
    if options.hint:
        print(textwrap.fill(f"Hint: {exercise.hint}", 100))
        return
    if options.solution:
        print(solution(options.name), end="")
        return
    if not path.exists():
        write_stub(options.name, path)
        print(textwrap.fill(f"Exercise {options.name} ({exercise.level}). {exercise.task}", 100))
        print(f"\n{path}: fill it in, then run the same command again. Add --hint for a hint. To start again, delete "
              f"the file.")
        return
    verdict = check_file(options.name, path)
    print(f"{path}: {verdict.words}")
    if not verdict.right:
        print(f"Add --hint for a hint, or --solution for our solution. To start again, delete {path}.")
        raise SystemExit(1)
    following = [*EXERCISES][[*EXERCISES].index(options.name) + 1:]
    print(f"Next: python examples.py exercise {following[0]}" if following else "This was the last exercise.")


COMMANDS = dict(quiz=_run_quiz, exercise=_run_exercise)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
        return
    exercises = ", ".join(f"{name} ({exercise.level})" for name, exercise in EXERCISES.items())
    parser = OneLineParser(description=__doc__.split("\n\n")[0], epilog=f"Two more commands: examples.py quiz, and "
                                                                        f"examples.py exercise NAME: {exercises}.")
    parser.add_argument("--list", action="store_true", help="list the demos")
    parser.add_argument("--only", metavar="NAME", help="run one demo")
    parser.add_argument("--output-dir", default="figures", help="where to save the figures (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="skip the two demos that train")
    options = parser.parse_args(argv)
    if options.list:
        for name, demo in DEMOS.items():
            print(f"{name:<15} {demo.__doc__}")
        return
    if options.only and options.only not in DEMOS:
        close = closest_names(options.only, DEMOS, 1)
        advice = f"did you mean {close[0]}? --list" if close else "--list"
        raise InputError(f"--only {options.only} is unknown; {advice} names all demos")
    names = [options.only] if options.only else [name for name in DEMOS if not (options.dry_run and name in TRAINS)]
    folder = Path(options.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create --output-dir {folder} ({error.strerror}); choose another folder") from error
    started = time.perf_counter()
    for name in names:
        print(f"\n{name}: {DEMOS[name].__doc__}")
        torch.manual_seed(0)
        path = folder / f"{name}.png"
        save_figure(DEMOS[name](), path)
        print(f"Figure: {path}")
    print(f"\n{'Dry run: ' if options.dry_run else ''}{len(names)} of {len(DEMOS)} demos in "
          f"{time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    script(main)
