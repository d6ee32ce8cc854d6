"""How far to trust each explanation: deletion and insertion areas beside random order.

    python benchmarks/trust.py --keep [--seeds 0 1 2]

For each seed a vit_nano is trained on the drawn shapes (learning.py's recipe, more steps) and 500 test images, which no
training has seen, are explained for the class that it predicts. A map that finds what the answer hangs on has a smaller
deletion area and a larger insertion area than random order has.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from results import write_cell  # noqa: E402

from drawn_shapes import TEST_START  # noqa: E402
from explanations import compare_explanations  # noqa: E402
from learning import RATES, RECIPE, train_once  # noqa: E402
from perturbations import predictions  # noqa: E402
from pictures import normalise  # noqa: E402
from vit_data import get_data_loaders, make_shapes  # noqa: E402


def areas(model, images, seed, chunk=100):
    """(deletion, insertion): method -> the mean area over the images; and the mean rank correlations of the methods."""
    found = [compare_explanations(model, part, seed=seed + i) for i, part in enumerate(images.split(chunk))]
    deletion, insertion = ({name: torch.cat([getattr(one, what)[name] for one in found], dim=1).mean().item()
                            for name in getattr(found[0], what)} for what in ("deletion", "insertion"))
    correlations = torch.stack([one.correlations for one in found]).mean(dim=0)
    return deletion, insertion, dict(names=list(found[0].heats), values=correlations.tolist())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--n-images", type=int, default=500)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    for seed in options.seeds:
        loaders = get_data_loaders(dataset="shapes", img_size=32, batch_size=RECIPE.batch_size, seed=seed)
        recipe = replace(RECIPE, n_steps=options.steps)
        model, val_acc = train_once("ViT", *loaders, recipe, RATES[1], seed)
        drawn = make_shapes(options.n_images, 32, start=TEST_START)
        images = normalise(drawn.images, loaders[0].mean, loaders[0].std)
        right = int((predictions(model, images) == drawn.labels).sum())
        deletion, insertion, correlations = areas(model, images, seed)
        print(f"seed {seed}: {right} of {len(images)} right")
        for name in deletion:
            print(f"  {name:<14} deletion {deletion[name]:.3f}, insertion {insertion[name]:.3f}", flush=True)
        if options.keep:
            write_cell("trust", f"vit_nano-{seed}", seed, f"python benchmarks/trust.py --keep --seeds {seed}",
                       dict(steps=options.steps, n=len(images), right=right, val_acc=val_acc, deletion=deletion,
                            insertion=insertion, correlations=correlations, device="cpu"))


if __name__ == "__main__":
    main()
