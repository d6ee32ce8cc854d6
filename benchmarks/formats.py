"""Measure how exactly each checkpoint format loads; the tests of its three modules require 1e-12.

    python benchmarks/formats.py --keep        prints the table and writes results/formats-all.json

Needs timm, torchvision and transformers (requirements-dev.txt).
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path[:0] = [str(Path(__file__).parent.parent / "tests"), str(Path(__file__).parent.parent / "tests" / "weights")]
import test_formats
import test_masked_files
import test_swin_files
from results import write_cell

PACKAGES = ("timm", "torchvision", "transformers")


def how_verified(name):
    """Return whether the files of a source are real, and what they were checked against."""
    if name.startswith("our names"):
        return "yes: this library's own model"
    if name.startswith(PACKAGES):
        return "yes: the package's own model and names"
    if name.startswith(("MAE, ", "microsoft's BEiT for", "microsoft's BEiT v2")):
        return "no real file: layout of the published code, on transformers' model"
    if name.startswith("Google"):
        return "no real file: layout of the published code, against timm's reader"
    return "no real file: layout of the published code, on timm's model"


def every_source():
    """Return (name, source, the function that measures it) of every format."""
    return [(name, source, module.difference) for module in (test_formats, test_masked_files, test_swin_files)
            for name, source in module.SOURCES.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/formats-all.json")
    options = parser.parse_args()
    rows = []
    for name, source, difference in every_source():
        with tempfile.TemporaryDirectory() as folder:
            largest, report, _ = difference(name, Path(folder))
        rows.append(dict(format=name, recognised_as=report.format, source=source.against, difference=largest,
                         used=len(report.used), dropped=len(report.dropped), verified=how_verified(name)))
        print(f"{name:45s} {source.against:35s} {largest:.1e}  {how_verified(name)}", flush=True)
    if options.keep:
        write_cell("formats", "all", 0, "python benchmarks/formats.py --keep", dict(rows=rows))


if __name__ == "__main__":
    main()
