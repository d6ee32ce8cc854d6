"""Compare augmentation in batches with torchvision's pipeline, which processes one image at a time.

    python benchmarks/batch_augmentation.py --keep

Both shift 32-pixel images by up to 4 pixels, flip half of them, normalise them and stack batches of 128; the second
row also hides a square of 8 pixels. Both have the images in memory, so that decoding is not counted. The two take turns
on one core, and the table shows medians over rounds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from vit_bridge.preprocessing import Preprocessing

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import write_cell

from vit_bridge.data.augmentation import Augmentation
from vit_bridge.data.datasets import DatasetInfo
from vit_bridge.data.loaders import MemoryLoader

N_IMAGES, BATCH, ROUNDS = 5120, 128, 7
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def one_at_a_time(pil_images, cutout):
    """Yield batches made by torchvision's transforms; RandomErasing hides a square of 8 of 32 pixels."""
    steps = [v2.RandomCrop(32, padding=4, padding_mode="reflect"), v2.RandomHorizontalFlip(), v2.ToImage(),
             v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    steps += [v2.RandomErasing(1.0, scale=(0.0625, 0.0625), ratio=(1.0, 1.0))] * cutout
    transform = v2.Compose(steps)
    for start in range(0, len(pil_images), BATCH):
        yield torch.stack([transform(image) for image in pil_images[start : start + BATCH]])


def speed(batches):
    started = time.perf_counter()
    n = sum(len(images) for images in batches)
    return n / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (N_IMAGES, 3, 32, 32), dtype=torch.uint8)
    pil_images = [to_pil_image(image) for image in images]
    facts, rows = DatasetInfo("cifar10", Preprocessing(32, MEAN, STD, class_names=["any"])), []
    for cutout in (False, True):
        augmentation = Augmentation(cutout=0.25 * cutout)
        loader = MemoryLoader(images, torch.zeros(N_IMAGES, dtype=torch.int64), facts, BATCH, 0, True,
                              augmentation=augmentation)
        rounds = [(speed(x for x, _ in loader), speed(one_at_a_time(pil_images, cutout)))
                  for _ in range(ROUNDS + 1)][1:]
        ours, theirs = (statistics.median(values) for values in zip(*rounds, strict=True))
        ratios = sorted(a / b for a, b in rounds)
        rows.append(dict(what="shift, flip, cutout" if cutout else "shift, flip", ours=round(ours),
                         torchvision=round(theirs), ratio=round(statistics.median(ratios), 1),
                         lowest=round(ratios[0], 1), highest=round(ratios[-1], 1)))
        print(rows[-1])
    if options.keep:
        write_cell("augmentation", "cpu", 0, "python benchmarks/batch_augmentation.py --keep",
                   dict(device="cpu", threads=1, rows=rows))


if __name__ == "__main__":
    main()
