"""Three folders where the truth is known, and what cnn_vs_vit.py says of each.

    python benchmarks/verdicts.py --minutes 9 --keep [locality reach nothing]

locality   one small mark anywhere in noise, its kind is the class, and few images to learn from: what looks at every
           place alike needs to see fewer
reach      two marks, the same or different, farther apart than the ConvNet's window of 25 pixels
nothing    noise, the classes drawn by lot: nothing can be learned, and no model may be said to win
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

from results import write_cell  # noqa: E402

from drawn_tasks import make_mark, make_marks  # noqa: E402

TEST_START = 10**9


def locality(n, start):
    drawn = make_mark(n, 32, start=start)
    return drawn.images, [drawn.class_names[label] for label in drawn.labels]


def reach(n, start):
    generator = torch.Generator().manual_seed(start % 2**31)
    distances = 30 + 12 * torch.rand(n, generator=generator)
    drawn = [make_marks(1, 48, start=start + i, distance=distance.item()) for i, distance in enumerate(distances)]
    return torch.cat([one.images for one in drawn]), [one.class_names[one.labels.item()] for one in drawn]


def nothing(n, start):
    generator = torch.Generator().manual_seed(start % 2**31)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, [("heads", "tails")[side] for side in torch.randint(0, 2, (n,), generator=generator).tolist()]


FOLDERS = {"locality": (locality, 400, 1000), "reach": (reach, 20_000, 1000), "nothing": (nothing, 2000, 1000)}


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
