"""Measure how far to trust each explanation: deletion and insertion areas compared with a random order.

    python benchmarks/trust.py --keep [--seeds 0 1 2] [--steps 2000] [--n-images 500]

A map that shows what the prediction depends on has a smaller deletion area and a larger insertion area than a random
order. For each seed, a vit_nano is trained on the drawn shapes (Muon, learning rate 1e-3), and
500 test images are explained for the predicted class.
"""

import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from results import write_cell

from train_vit import Trainer
from vit_bridge.analysis.explanations import agreement, area_under, compare_explanations, mean_and_error
from vit_bridge.data.loaders import get_data_loaders
from vit_bridge.data.shapes import TEST_START, make_shapes
from vit_bridge.models.registry import build_model
from vit_bridge.runtime import predictions
from vit_model import InputError

STEPS, N_IMAGES = 2000, 500


def areas(model, images, seed, chunk=100, **options):
    """Return the areas of every method over the images; `options` go to compare_explanations.

    Returns
    -------
    dict
        deletion, insertion : {method: mean area over the images that have a map}
        draws : {"deletion" or "insertion": the mean area of each random order}
        leads : {"deletion" or "insertion": {method: (mean, standard error) of its area minus a random order's}}
        blank : {method: number of images without a map}
        correlations : the mean rank correlations of the methods

    Raises
    ------
    InputError
        If a method has no map for any image of a chunk.
    """
    found = [compare_explanations(model, part, seed=seed, **options) for part in images.split(chunk)]
    for one in found:
        if one.refused:
            raise InputError(f"a method has no map for any of {chunk} images: {next(iter(one.refused.values()))}")
    result = {}
    for what in ("deletion", "insertion"):
        curves = {name: torch.cat([getattr(one, what)[name] for one in found], dim=1)
                  for name in getattr(found[0], what)}  # (S + 1, B) each
        result[what] = {name: area_under(values).nanmean().item() for name, values in curves.items()}
    result["draws"], result["leads"] = {}, {}
    for what in ("deletion", "insertion"):
        draws = torch.cat([one.draws[what] for one in found], dim=2)  # (R, S + 1, B)
        result["draws"][what] = area_under(draws.transpose(0, 1)).mean(dim=1).tolist()
        result["leads"][what] = {name: mean_and_error(torch.cat([one.differences[what][name] for one in found]))
                                 for name in found[0].saliencies}
    saliencies = {name: torch.cat([one.saliencies[name] for one in found]) for name in found[0].saliencies}
    result["blank"] = {name: sum(one.blank.get(name, 0) for one in found) for name in saliencies}
    result["correlations"] = dict(names=list(saliencies), values=agreement(list(saliencies.values())).tolist())
    return result


def command_of(seed, steps, n_images):
    """Return the command that repeats one cell."""
    return (f"python benchmarks/trust.py --keep --seeds {seed}" + f" --steps {steps}" * (steps != STEPS)
            + f" --n-images {n_images}" * (n_images != N_IMAGES))


def main():
    """Train and score one model per seed.

    The random order is drawn eight times for each image; the mean area and the areas of the draws are kept. Images
    without a map of a method are excluded from its means, and counted.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--n-images", type=int, default=N_IMAGES)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    for seed in options.seeds:
        loaders = get_data_loaders(dataset="shapes", img_size=32, batch_size=64, seed=seed)
        torch.manual_seed(seed)
        trainer = Trainer(build_model("vit_nano", n_classes=len(loaders[0].class_names), img_size=32))
        trainer.train(loaders[0], n_steps=options.steps, learning_rate=1e-3, weight_decay=0.05, seed=seed,
                      schedule="linear", optimizer="muon", progress=False)
        model, val_acc = trainer.model, trainer.evaluate(loaders[1])["acc"]
        drawn = make_shapes(options.n_images, 32, start=TEST_START)
        images = loaders[0].preprocessing.normalise(drawn.images)
        right = int((predictions(model, images) == drawn.labels).sum())
        result = areas(model, images, 100 * seed)  # the draws take the numbers that follow
        print(f"seed {seed}: {right} of {len(images)} correct")
        for name, deletion in result["deletion"].items():
            blank = f", without {n} images" if (n := result["blank"].get(name)) else ""
            print(f"  {name:<14} deletion {deletion:.3f}, insertion {result['insertion'][name]:.3f}{blank}", flush=True)
        for what, values in result["draws"].items():
            print(f"  {what} of random orders: {min(values):.3f} to {max(values):.3f}", flush=True)
            for name, (mean, error) in result["leads"][what].items():
                print(f"  {what}, {name} minus random order: {mean:+.3f} ± {error:.3f}", flush=True)
        if options.keep:
            write_cell("trust", f"vit_nano-{seed}", seed, command_of(seed, options.steps, options.n_images),
                       dict(steps=options.steps, n=len(images), right=right, val_acc=val_acc, **result, device="cpu"))


if __name__ == "__main__":
    main()
