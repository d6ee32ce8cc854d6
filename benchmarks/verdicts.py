"""Run `cnn_vs_vit.py --data-dir` on four folders with a known answer.

    python benchmarks/verdicts.py --minutes 9 --keep [locality near far nothing]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from results import write_cell

from vit_bridge.data.shapes import ANSWERS, KINDS, MARKS, M

TEST_START = 10**9


def locality(n, start, side=32, strength=0.3):
    """Draw images with one faint mark in noise; the kind of the mark is the class.

    `strength` is the contrast of the mark, as a fraction of the contrast between black and white. A model that slides a
    window over all positions needs fewer images than a model that cuts the image at fixed positions.
    """
    generator = generator_from(start)
    images = torch.rand(n, 1, side, side, generator=generator) / 2 + 0.25  # (n, 1, S, S)
    labels = torch.arange(n) % 2
    for image, label, (row, column) in zip(images, labels, torch.randint(4, side - 4 - M + 1, (n, 2),
                                                                         generator=generator).tolist(), strict=True):
        image[0, row:row + M, column:column + M] += strength * (MARKS[label] - 0.5)
    return as_bytes(images), [KINDS[label] for label in labels]


def pairs(n, start, least, most, side=48, border=7):
    """Draw two marks from `least` to `most` pixels apart, the same or different in turn.

    The border keeps the marks inside the image when training images are shifted.
    """
    generator = generator_from(start)
    corners, todo = torch.zeros(n, 2, 2, dtype=torch.long), torch.arange(n)
    while len(todo):
        drawn = torch.randint(border, side - border - M + 1, (len(todo), 2, 2), generator=generator)
        distances = (drawn[:, 0] - drawn[:, 1]).double().norm(dim=1)
        good = (distances >= least) & (distances <= most)
        corners[todo[good]] = drawn[good]
        todo = todo[~good]
    images = torch.rand(n, 1, side, side, generator=generator) / 2 + 0.25  # (n, 1, S, S)
    labels, kinds = torch.arange(n) % 2, torch.randint(2, (n,), generator=generator)
    for image, two, kind, same in zip(images, corners.tolist(), kinds, labels, strict=True):
        for (row, column), which in zip(two, (kind, kind ^ (1 - same)), strict=True):
            image[0, row:row + M, column:column + M] = MARKS[which]
    return as_bytes(images), [ANSWERS[same] for same in labels]


def near(n, start):
    """Draw marks that fit into one window of the ConvNet, 25 pixels: the control of far()."""
    return pairs(n, start, 8, 14)


def far(n, start):
    """Draw marks farther apart than that window."""
    return pairs(n, start, 30, 41)


def nothing(n, start):
    """Draw noise with random classes: nothing can be learned, so no model should win."""
    generator = generator_from(start)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, [("heads", "tails")[side] for side in torch.randint(0, 2, (n,), generator=generator).tolist()]


def generator_from(start):
    return torch.Generator().manual_seed(start)


def as_bytes(grey):
    """Convert (n, 1, S, S) from 0 to 1 to uint8 (n, 3, S, S)."""
    return (grey.clamp(0, 1) * 255 + 0.5).to(torch.uint8).expand(-1, 3, -1, -1)


FOLDERS = {"locality": (locality, 400, 1000), "near": (near, 20_000, 1000), "far": (far, 20_000, 1000),
           "nothing": (nothing, 2000, 1000)}


def write_folder(name, folder):
    draw, n_train, n_test = FOLDERS[name]
    for part, n, start in (("train", n_train, 0), ("test", n_test, TEST_START)):
        images, classes = draw(n, start)
        for i, (image, class_name) in enumerate(zip(images, classes, strict=True)):
            (folder / part / class_name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / part / class_name / f"{i:05}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", default=list(FOLDERS))
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    for name in options.names:
        with tempfile.TemporaryDirectory() as scratch:
            folder, out = Path(scratch) / name, Path(scratch) / "out"
            write_folder(name, folder)
            subprocess.run([sys.executable, str(HERE.parent / "cnn_vs_vit.py"), "--data-dir", str(folder), "--minutes",
                            str(options.minutes), "--output-dir", str(out)], check=True)
            found = json.loads((out / "results.json").read_text())["results"]["verdict"]
        rows = {kind: [dict(row, right=sum(row["right"]), n=len(row["right"])) for row in own]
                for kind, own in found["rows"].items()}
        print(f"{name}: {found['finding']}", flush=True)
        if options.keep:
            command = f"python benchmarks/verdicts.py --minutes {options.minutes:g} --keep {name}"
            write_cell("verdicts", name, 0, command,
                       dict(name=name, minutes=options.minutes, finding=found["finding"], rows=rows,
                            costs=found["costs"], device="cpu"))


if __name__ == "__main__":
    main()
