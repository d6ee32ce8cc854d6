"""Measure the models trained on CIFAR-10 (JPEG) as cnn_vs_vit.py measures those trained on the drawn shapes.

    python benchmarks/cifar_models.py --data-dir CIFAR           prints the findings
    python benchmarks/cifar_models.py --data-dir CIFAR --keep    also keeps the table `shipped-cifar10`

A conclusion about a CNN, a hybrid and a ViT is worth little if three other models reverse it. These three have other
designs (pooled stages, a pooled stem, the mean of the patches instead of CLS), other initial weights, and ten minutes
of training each. Speed and memory are not measured.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from results import write_cell

from vit_bridge.compare.experiments import EXPERIMENTS, ComparisonSetup
from vit_bridge.compare.trials import draw_indices
from vit_bridge.data.loaders import get_test_loader
from vit_bridge.weights.checkpoints import load

MODELS = {"ConvNet": "convnet_cifar10", "Hybrid": "hybrid_cifar10", "ViT": "vit_nano_cifar10"}
LOOKING = ("receptive_field", "attention_distance", "similarity", "position")
N_IMAGES = 500  # as in shipped_setup()


def cifar_setup(data_dir):
    """Return the models, and N_IMAGES of their test images, drawn by seed 0."""
    models = {name: load(key) for name, key in MODELS.items()}
    preprocessing = models["ViT"].preprocessing
    loader = get_test_loader(data_dir, img_size=preprocessing.img_size, preprocessing=preprocessing)
    drawn = draw_indices(loader, N_IMAGES, seed=0)
    drawn = drawn[torch.randperm(N_IMAGES, generator=torch.Generator().manual_seed(0))]  # a folder is sorted by class
    return ComparisonSetup(models, preprocessing.normalise(loader.images[drawn]), loader.labels[drawn], preprocessing,
                           sizes=(), patches=())  # nothing is timed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    setup = cifar_setup(options.data_dir)
    results = dict(cost=EXPERIMENTS["cost"].measure(setup))  # its finding would need the times
    for name in LOOKING:
        results[name] = EXPERIMENTS[name].measure(setup)
        print(f"{EXPERIMENTS[name].title}: {EXPERIMENTS[name].finding(results[name])}\n", flush=True)
    if options.keep:
        write_cell("shipped-cifar10", "cpu", 0, "python benchmarks/cifar_models.py --data-dir CIFAR --keep", results)


if __name__ == "__main__":
    main()
