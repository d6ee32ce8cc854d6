"""CNN, ViT and the hybrid between them, side by side: what they cost, what they see, how they learn.

    python cnn_vs_vit.py                          on the built-in shapes, a few minutes on 2 cores
    python cnn_vs_vit.py --data-dir photos        on your own images
    python cnn_vs_vit.py --steps 1000 --seed 1    longer, and another seed

At 32 pixels the three have parameter counts within 10% of each other. They train under one recipe: the same
images in the same order, steps, learning rate and weight decay. One short run of each is a first look, not a
verdict.
"""

import itertools
import sys
import tempfile
import time

import torch

from cnn_model import HybridCNNViT
from command_line import OneLineParser, new_output_dir, percent, positive, script, seed, whole, write_json
from measurements import (
    choose_device,
    count_flops,
    count_parameters,
    peak_memory,
    radius_holding,
    receptive_field,
    throughput,
    unit_centre,
)
from model_zoo import build_model
from trainer import Trainer
from visualizations import compare_receptive_fields, plot_bars, plot_histories, save_figure
from vit_data import choose_set, get_data_loaders, get_test_loader

__all__ = ["HybridCNNViT", "compare_costs", "compare_training", "matched_models"]

NAMES = {"ConvNet": "convnet", "Hybrid": "hybrid", "ViT": "vit_nano"}


def matched_models(n_classes=10, img_size=32):
    """ConvNet, hybrid and ViT of nearly the same parameter count, untrained: a dict by name.

    Within 10% with 10 classes at 32 pixels; at other sizes positions and patch projections differ more.
    """
    return {name: build_model(key, n_classes=n_classes, img_size=img_size) for name, key in NAMES.items()}


def compare_costs(models, images, device="cpu", seconds=1.0):
    """What each model costs, and how far a feature in the middle of its last layer sees.

    images: (B, 3, S, S), normalised. Returns a dict by model of parameters, MFLOPs for an image, images a second
    (inference and training, batches of B), peak memory of a training step in MiB, and the radius in pixels around
    the centre that holds half of the gradient.
    """
    img_size, batch_size = images.shape[-1], len(images)
    rows = {}
    for name, model in models.items():
        model = model.to(device)
        run = dict(img_size=img_size, batch_size=batch_size, seconds=seconds, device=device)
        rows[name] = {
            "parameters": count_parameters(model),
            "MFLOPs": count_flops(model) / 1e6,
            "images/s, inference": throughput(model, **run),
            "images/s, training": throughput(model, train=True, **run),
            "peak MiB, training": peak_memory(model, images.to(device), train=True) / 2**20,
            "radius of half the gradient, pixels": radius_holding(receptive_field(model, images.to(device)).cpu(), 0.5,
                                                                  unit_centre(model, images.shape[2:])),
        }
    return rows


def compare_training(models, train_loader, val_loader, n_steps=300, learning_rate=2e-3, device="cpu", amp="auto",
                     progress=True):
    """Trains each model by one recipe. Returns two dicts by model: its Trainer and its history."""
    trainers = {name: Trainer(model, device, amp=amp) for name, model in models.items()}
    run = dict(n_steps=n_steps, learning_rate=learning_rate, progress=progress)
    histories = {name: trainer.train(train_loader, val_loader, **run) for name, trainer in trainers.items()}
    return trainers, histories


def print_table(rows):
    """A dict by model of dicts by quantity, as text: a line a quantity."""
    print(f"{'':<38}" + "".join(f"{name:>12}" for name in rows))
    for quantity in next(iter(rows.values())):
        cells = (row[quantity] for row in rows.values())
        print(f"{quantity:<38}" + "".join(f"{value:>12,.0f}" if value >= 100 else f"{value:>12.1f}"
                                          for value in cells))


def compare(options, wanted_dir):
    """The whole comparison: table, pictures and results.json in the folder wanted, or else a new one under runs/."""
    started, device = time.perf_counter(), choose_device(options.device)
    drawn = choose_set(options.data_dir, options.dataset, None) == "shapes"
    few = dict(n_images=600) if options.dry_run and drawn else {}
    data = dict(data_dir=options.data_dir, dataset=options.dataset, img_size=options.img_size,
                batch_size=options.batch_size, seed=options.seed, **few)
    train_loader, val_loader = get_data_loaders(**data)
    img_size, n_classes = train_loader.img_size, len(train_loader.class_names)
    torch.manual_seed(options.seed)
    models = matched_models(n_classes, img_size)
    folder = new_output_dir(wanted_dir, "cnn_vs_vit", train_loader.dataset_name)
    images = next(iter(val_loader))[0][:8 if options.dry_run else 64]  # (64, 3, S, S)

    costs = compare_costs(models, images, device, seconds=0.1 if options.dry_run else 1.0)
    print(f"Cost at {img_size} x {img_size} pixels, batches of {len(images)}, {device}, random weights:\n")
    print_table(costs)
    save_figure(plot_bars({quantity: {name: row[quantity] for name, row in costs.items()}
                           for quantity in next(iter(costs.values()))}), folder / "cost.png")

    n_steps = 2 if options.dry_run else options.steps
    if options.dry_run:
        val_loader = list(itertools.islice(val_loader, 2))
    print(f"\nTraining each for {n_steps} steps of {options.batch_size} images, seed {options.seed} ...")
    trainers, histories = compare_training(models, train_loader, val_loader, n_steps, options.lr, device, options.amp,
                                           progress=sys.stderr.isatty())
    test_loader = None if options.dry_run else get_test_loader(**data)
    scores = {name: trainer.evaluate(val_loader if test_loader is None else test_loader)
              for name, trainer in trainers.items()}
    split = "validation" if test_loader is None else "test"
    print(f"Accuracy on {next(iter(scores.values()))['n']:,} {split} images, 95% Wilson interval; guessing gives "
          f"{1 / n_classes:.0%}:")
    for name, score in scores.items():
        print(f"  {name:<8} {percent(score['correct'], score['n'])}   in {sum(histories[name]['seconds']):.0f} s")
    print("One run each: the intervals are those of the images, not of the seeds. No verdict follows from it.")
    save_figure(plot_histories(histories), folder / "training.png")

    for model in models.values():
        model.cpu().mean, model.std = train_loader.mean, train_loader.std
    compare_receptive_fields(folder / "receptive_fields.png", models, images)
    results = dict(options=vars(options), costs=costs, histories=histories, scores=scores,
                   torch=torch.__version__, seconds=round(time.perf_counter() - started, 1))
    write_json(results, folder / "results.json")
    print(f"\n{results['seconds']:.0f} s; cost.png, training.png, receptive_fields.png and results.json in {folder}/")


def main(argv=None):
    parser = OneLineParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", default="./data", help="as in train_vit.py")
    parser.add_argument("--dataset", default="auto", help="as in train_vit.py")
    parser.add_argument("--img-size", type=whole(1), help="side in pixels (default: small images keep theirs; 224)")
    parser.add_argument("--batch-size", type=whole(1), default=64, help="(default: %(default)s)")
    parser.add_argument("--steps", type=whole(1), default=300, help="for each model (default: %(default)s)")
    parser.add_argument("--lr", type=positive(), default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--seed", type=seed(), default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"))
    parser.add_argument("--output-dir", help="a new folder (default: runs/cnn_vs_vit-<data>-<n>)")
    parser.add_argument("--dry-run", action="store_true",
                        help="two steps of everything; without --output-dir nothing is kept")
    options = parser.parse_args(argv)
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            compare(options, options.output_dir or folder)
        print("Dry run: all parts ran.")
    else:
        compare(options, options.output_dir)


if __name__ == "__main__":
    script(main)
