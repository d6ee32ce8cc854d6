"""Train the plain ViT of a well-known public CIFAR-10 script, rebuilt from its description, for some minutes.

    python benchmarks/peer.py --data-dir CIFAR --minutes 10 --keep

The script was written for a GPU and 200 epochs; ten minutes on 2 cores are enough for only a few of its steps. The more
generous variant, --batch-size 128 --fit-schedule, has smaller batches and a learning rate that falls to zero within the
available time. --bf16 is for CPUs with bfloat16 instructions.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from vit_pytorch import ViT

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import write_cell

from vit_bridge.analysis.metrics import wilson_interval

EPOCHS = 200


def image_loader(folder, batch_size, training):
    varied = [v2.RandAugment(2, 14), v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] * training
    transform = v2.Compose([*varied, v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))])
    images = torchvision.datasets.ImageFolder(folder, transform)
    return DataLoader(images, batch_size, shuffle=training, num_workers=2, persistent_workers=True)


def train(model, loader, seconds, fit_schedule, bf16):
    """Train until the time is up and return (steps, images)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    started, steps, images_seen = time.perf_counter(), 0, 0
    while True:
        for images, labels in loader:
            spent = (time.perf_counter() - started) / seconds
            if spent >= 1:
                return steps, images_seen
            done = spent if fit_schedule else steps // len(loader) / EPOCHS
            for group in optimizer.param_groups:
                group["lr"] = 1e-4 * 0.5 * (1 + math.cos(math.pi * done))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            steps, images_seen = steps + 1, images_seen + len(images)


@torch.no_grad()
def count_right(model, loader):
    model.eval()
    return sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)


def main():
    """Train within the time limit, then read the test images once.

    The script trains vit-pytorch's ViT: patches of 4, width 512, 6 blocks with 8 heads, an MLP of width 512, dropout
    0.1. It uses batches of 512 in float32, and Adam at 1e-4 with a cosine over 200 epochs. torchvision augments one
    image at a time: RandAugment (2 operations, magnitude 14), a crop with 4 pixels of black border, a flip.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--fit-schedule", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = ViT(image_size=32, patch_size=4, num_classes=10, dim=512, depth=6, heads=8, mlp_dim=512, dropout=0.1,
                emb_dropout=0.1)
    loader = image_loader(options.data_dir / "train", options.batch_size, True)
    steps, images = train(model, loader, 60 * options.minutes, options.fit_schedule, options.bf16)
    test = image_loader(options.data_dir / "test", 250, False)
    right, n = count_right(model, test), len(test.dataset)
    name = "peer, generous" if options.fit_schedule else "peer"
    words = f" --batch-size {options.batch_size} --fit-schedule" if options.fit_schedule else ""
    words += " --bf16" * options.bf16
    result = dict(model=name, seed=options.seed, minutes=options.minutes, n_steps=steps, device="cpu",
                  precision="torch.bfloat16" if options.bf16 else "torch.float32",
                  parameters=sum(p.numel() for p in model.parameters()), seconds=60 * options.minutes,
                  images_per_second=round(images / (60 * options.minutes), 1), test_acc=right / n, test_correct=right,
                  test_n=n, test_interval=wilson_interval(right, n))
    print(f"{name}: {right / n:.1%} of {n:,} test images, {result['images_per_second']} images/s, {steps} steps")
    if options.keep:
        precision = "-bf16" * options.bf16
        write_cell("targets", f"{name.replace(', ', '-')}-{options.minutes:g}{precision}-{options.seed}", options.seed,
                   f"python benchmarks/peer.py --data-dir CIFAR --minutes {options.minutes:g} --seed {options.seed}"
                   f"{words}", result)


if __name__ == "__main__":
    main()
