"""Train on 500 images of five classes: from scratch, with fine-tuning, and with a linear probe.

    python benchmarks/few_images.py --data-dir CIFAR             trains in runs/few-images; resumes interrupted runs
    python benchmarks/few_images.py --data-dir CIFAR --keep      also keeps the results in benchmarks/results/
    python benchmarks/few_images.py --data-dir CIFAR --only "from scratch"      one method
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from results import write_cell

SEEN, NEW = ("airplane", "bird", "deer", "horse", "truck"), ("automobile", "cat", "dog", "frog", "ship")
SEEDS = (0, 1, 2)
METHODS = {  # {method: (options of train_vit.py, learning rates to choose from)}
    "from scratch": (["--epochs", "60"], (5e-4, 1e-3, 2e-3, 4e-3)),
    "ConvNet from scratch": (["--model", "convnet", "--epochs", "60"], (1e-3, 2e-3, 4e-3, 8e-3)),
    "small ConvNet from scratch": (["--model", "convnet", "--recipe", "convnet_fast", "--epochs", "60"],
                                   (5e-4, 1e-3, 2e-3, 4e-3)),
    "from scratch, recipe classic": (["--recipe", "classic", "--epochs", "60"], (5e-4, 1e-3, 2e-3)),
    "fine-tuned": (["--pretrained", "CHECKPOINT", "--epochs", "60"], (2e-4, 5e-4, 1e-3)),
    "fine-tuned, layer decay 0.75": (["--pretrained", "CHECKPOINT", "--epochs", "60", "--layer-decay", "0.75"],
                                     (2e-4, 5e-4, 1e-3)),
    "linear probe": (["--pretrained", "CHECKPOINT", "--freeze-backbone"], (2e-3, 1e-2, 5e-2)),
}


def draw_images(source, folder, seed):
    """Copy 100 images of each new class, drawn by the seed, into a folder."""
    part = folder.with_name(f"{folder.name}.part")
    for class_name in NEW:
        (part / class_name).mkdir(parents=True, exist_ok=True)
        files = sorted((source / "train" / class_name).iterdir())
        for file in random.Random(seed).sample(files, 100):
            shutil.copy(file, part / class_name)
    part.rename(folder)


def link(source, folder, parts, classes):
    """Link folder/<part>/<class> to the source's folders."""
    for part in parts:
        (folder / part).mkdir(parents=True, exist_ok=True)
        for class_name in classes:
            if not (folder / part / class_name).exists():
                (folder / part / class_name).symlink_to((source / part / class_name).resolve())


def train_vit(*words):
    subprocess.run([sys.executable, str(HERE.parent / "train_vit.py"), *map(str, words)], check=True)


def main():
    """Pretrain, train every method with every learning rate and seed, and score the best rate.

    CIFAR contains train/<class>/ and test/<class>/ of CIFAR-10. vit_nano is pretrained on airplane, bird, deer, horse
    and truck (25,000 images). Then each of three seeds draws 100 images each of automobile, cat, dog, frog and ship: 90
    to train on and 10 to validate. The learning rate of a method is the best of three or four by validation accuracy,
    averaged over the seeds. The 5,000 test images are read once per method and seed, after that choice.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/few-images"))
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
                        help=f"of: {', '.join(METHODS)}")
    options = parser.parse_args()
    source, runs = options.data_dir, options.runs
    link(source, runs / "seen", ("train", "test"), SEEN)
    link(source, runs / "new", ("test",), NEW)
    checkpoint = runs / "pretraining" / "best.pt"
    methods = {method: METHODS[method] for method in options.only}
    if any("CHECKPOINT" in words for words, _ in methods.values()):
        train_vit("--data-dir", runs / "seen", "--recipe", "classic", "--epochs", 12, "--drop-path", 0.05,
                  "--resume", "--output-dir", checkpoint.parent)
    for seed in SEEDS:
        if not (runs / f"images-{seed}").exists():
            draw_images(source, runs / f"images-{seed}", seed)
    for method, (words, rates) in methods.items():
        folders = {(rate, seed): runs / f"{method.replace(' ', '-')}-{rate}-{seed}" for rate in rates for seed in SEEDS}
        for (rate, seed), folder in folders.items():
            train_vit("--data-dir", runs / f"images-{seed}", "--seed", seed, "--lr", rate, "--resume", "--output-dir",
                      folder, *(checkpoint if word == "CHECKPOINT" else word for word in words))
        chosen = {rate: round(mean(json.loads((folders[rate, seed] / "result.json").read_text())["val_acc"]
                                   for seed in SEEDS), 6) for rate in rates}
        best = max(rates, key=lambda rate: (chosen[rate], min(rates) < rate < max(rates)))  # of equals, an inner one
        print(f"{method}: validation accuracies {chosen}, chosen {best}", flush=True)
        for seed in SEEDS:
            folder = folders[best, seed]
            if not (folder / "test" / "result.json").exists():
                train_vit("evaluate", "--checkpoint", folder / "best.pt", "--data-dir", runs / "new", "--output-dir",
                          folder / "test")
            if options.keep:
                run, test = (json.loads((path / "result.json").read_text()) for path in (folder, folder / "test"))
                command = f"python benchmarks/few_images.py --data-dir CIFAR --keep (in it: {run['command']})"
                write_cell("few-images", f"{method.replace(' ', '-').replace(',', '')}-{seed}", seed, command,
                           dict(method=method, rates=chosen, rate=best, device=run["device"], run=run, test=test))


if __name__ == "__main__":
    main()
