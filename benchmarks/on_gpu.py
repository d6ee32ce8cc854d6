"""Check one GPU in one call of at most 9 minutes, offline.

    benchmarks/on_gpu.sh OUT                             tests, throughput, training; writes OUT/cells.json and logs
    python benchmarks/results.py gpu OUT/cells.json      adds the outcome to RESULTS.md
    benchmarks/on_gpu.sh OUT --only tests                one part; `results.py gpu` keeps the others as they are
    benchmarks/on_gpu.sh OUT --only trials               trains for cnn_vs_vit.py --train, data and cues; writes
                                                         OUT/trials.tar.gz, for `results.py cells` once unpacked
    benchmarks/on_gpu.sh OUT --dry-run                   runs a tiny version of everything on the CPU

Trials start from those in benchmarks/results/ and its folder unfinished/. The ladder and reach are complete. The
training runs and trials need CIFAR-10 (JPEG) in the checkout, in data/cifar10-jpeg/ or data/cifar10-jpeg.tar.xz; git
ignores both.
"""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parent.parent))

from results import make_cell

from vit_bridge.errors import InputError, first_line
from vit_bridge.runtime import choose_device
from vit_bridge.system import ROOT

TOTAL_SECONDS = 520  # for the whole call; commands still running then are killed
TEST_SECONDS, THROUGHPUT_SECONDS, PACK_SECONDS = 150, 210, 5
TRAINING_SECONDS = 70  # one run: 45 seconds, plus start and test
PARTS = ("tests", "throughput", "training")  # all but "trials", which takes minutes of its own
RESULTS = ROOT / "benchmarks" / "results"
JOBS = {"data": 9, "cues": 6}  # processes of each command; each needs a core
TRAINED = ("vit_nano", "hybrid", "convnet")
DRY_ENVIRONMENT = dict(OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")  # torch.compile then returns the model unchanged
IMAGES = ROOT / "data" / "cifar10-jpeg"
TAIL = 2000  # characters of a failed command's output that are kept


class Check:
    """The parts of the check, run one after the other; each adds its cells and rewrites the file."""

    def __init__(self, out, scratch, device, dry_run):
        self.out, self.scratch, self.device, self.dry_run = out, scratch, device, dry_run
        self.end, self.cells, self.failed_tests = time.monotonic() + TOTAL_SECONDS, [], False

    @property
    def seconds_left(self):
        return self.end - time.monotonic()

    def keep(self, part, name, command, result):
        result = result | dict(part=part, name=name, dry_run=self.dry_run, device=self.device.type)
        self.cells.append(make_cell("gpu", 0, in_words(command).replace(str(self.scratch), "OUT"), result))
        (self.out / "cells.json").write_text(json.dumps(self.cells, indent=2) + "\n")

    def run(self, name, command, seconds):
        """Run a command with its output in OUT/<name>.log; return None, or dict(error, tail) if it failed."""
        log, seconds = self.out / f"{name}.log", min(seconds, self.seconds_left)
        print(f"$ {in_words(command)}   (at most {seconds:.0f} s)", flush=True)
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                       env=os.environ | DRY_ENVIRONMENT if self.dry_run else None)
            try:
                code = process.wait(max(1, seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
        if code == 0:
            return None
        error = f"ended after {seconds:.0f} s" if code is None else f"exit status {code}"
        return dict(error=error, tail=log.read_text(errors="replace")[-TAIL:])

    def run_all(self, wanted=PARTS):
        for part, method in dict(tests=self.test, throughput=self.measure, training=self.train,
                                 trials=self.compare).items():
            if part not in wanted:
                continue
            try:
                method()
            except Exception as error:  # the other parts still run
                self.failed_tests = self.failed_tests or part == "tests"
                self.keep(part, part, [], dict(error=first_line(error)))

    # ---- The parts

    def test(self):
        report = self.scratch / "tests.xml"
        # -o addopts= replaces the project's options, which need xdist; this machine may lack it
        command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-o",
                   "addopts=--import-mode=importlib", "-m", "cuda", "-v", "-rs", f"--junitxml={report}", "tests/cuda"]
        if self.dry_run:
            command += ["-k", "planted or group"]
        failure = dict(error="pytest is not installed")
        if importlib.util.find_spec("pytest"):
            failure = self.run("tests", command, TEST_SECONDS)
        self.failed_tests = failure is not None
        self.keep("tests", "tests", command, read_report(report) if report.exists() else failure)

    def measure(self):
        reserved = len(TRAINED) * TRAINING_SECONDS if find_images() else 0
        seconds = min(THROUGHPUT_SECONDS, self.seconds_left - reserved)
        lines = self.scratch / "throughput.jsonl"
        command = [sys.executable, "benchmarks/throughput.py", "--device", self.device.type, "--output", str(lines),
                   "--budget", f"{seconds - 20:.0f}"]  # 20 seconds to start
        command += ["--set", "dry-run", "--rounds", "2"] if self.dry_run else ["--set", "gpu", "--rounds", "11"]
        failure = self.run("throughput", command, seconds)
        for line in lines.read_text().splitlines() if lines.exists() else ():
            result = json.loads(line)
            self.keep("throughput", result["column"], command, result)
        if failure:
            self.keep("throughput", "throughput", command, failure)

    def train(self):
        if not self.dry_run:
            unpack_images()
        for done, model in enumerate(TRAINED):
            command = [sys.executable, "train_vit.py", "--model", model, "--device", self.device.type, "--seed", "0",
                       "--output-dir", str(self.scratch / model)]
            command += ["--dry-run", "--dataset", "shapes"] if self.dry_run else ["--minutes", "0.75", "--data-dir",
                                                                                  str(IMAGES.relative_to(ROOT))]
            seconds = self.seconds_left - TRAINING_SECONDS * (len(TRAINED) - done - 1)
            if not self.dry_run and find_images() is None:
                failure = dict(error=f"no images in {IMAGES.relative_to(ROOT)}/, and no {IMAGES.name}.tar.xz beside it")
            elif seconds < TRAINING_SECONDS - 10:
                failure = dict(error=f"only {seconds:.0f} s were left")
            else:
                failure = self.run(f"training-{model}", command, seconds)
            result = failure or json.loads((self.scratch / model / "result.json").read_text())
            self.keep("training", model, command, result)

    def compare(self):
        """Train experiments of cnn_vs_vit.py side by side until the time is over, and pack all their trials."""
        if not self.dry_run:
            if find_images() is None:
                raise InputError(f"no images in {IMAGES.relative_to(ROOT)}/, and no {IMAGES.name}.tar.xz beside it")
            unpack_images()
        folder = self.scratch / "trials"
        folder.mkdir()
        for name in JOBS:
            for path in [*RESULTS.glob(f"{name}-*.json"), *(RESULTS / "unfinished").glob(f"{name}-*.json")]:
                shutil.copy(path, folder)
        with ThreadPoolExecutor(len(JOBS)) as pool:
            failures = list(pool.map(lambda names: self.compare_with(names, folder), JOBS))
        with tarfile.open(self.out / "trials.tar.gz", "w:gz") as archive:
            archive.add(folder, "trials")
        found = dict(trials=len(list(folder.glob("*.json"))), stopped=[one["error"] for one in failures if one])
        self.keep("trials", "trials", [], found)

    def compare_with(self, names, folder):
        """Train these experiments; trials that end before the time is over are in the folder."""
        command = [sys.executable, "cnn_vs_vit.py", "--train", "--only", *names.split(), "--device", self.device.type,
                   "--amp", "off", "--jobs", "2" if self.dry_run else str(JOBS[names]), "--results-dir", str(folder),
                   "--output-dir", str(self.scratch / names.replace(" ", "-"))]
        if names == "data" and not self.dry_run:
            command += ["--data-dir", str(IMAGES.relative_to(ROOT))]
        return self.run(f"trials-{names.replace(' ', '-')}", command + ["--dry-run"] * self.dry_run,
                        self.seconds_left - PACK_SECONDS)


def find_images():
    """Return the folder of images or its archive, or None if there is neither."""
    archive = IMAGES.with_name(f"{IMAGES.name}.tar.xz")
    return IMAGES if IMAGES.is_dir() else archive if archive.exists() else None


def unpack_images():
    """Unpack the archive of images if there is no folder yet."""
    found, part = find_images(), IMAGES.with_name(f"{IMAGES.name}.part")
    if found not in (None, IMAGES):
        with tarfile.open(found) as archive:
            archive.extractall(part, filter="data")
        part.rename(IMAGES)


def read_report(path):
    """Read a JUnit report: dict(passed, failed, skipped, seconds); failed and skipped are lists of dict."""
    suite, failed, skipped = ElementTree.parse(path).getroot().find("testsuite"), [], []
    for case in suite.iter("testcase"):
        for kind, entries in (("failure", failed), ("error", failed), ("skipped", skipped)):
            if (found := case.find(kind)) is not None:
                reason = (found.get("message") or "").split("\n")[0][:300]
                tail = (found.text or "").replace(f"{ROOT}/", "")[-TAIL:]  # paths that hold on every machine
                entries.append(dict(test=case.get("name"), reason=reason, tail=tail))
    tests = len(list(suite.iter("testcase")))
    return dict(passed=tests - len(failed) - len(skipped), failed=failed, skipped=skipped,
                seconds=float(suite.get("time")))


def in_words(command):
    return shlex.join(["python", *command[1:]])


def summary(cells):
    """Return one line per cell."""
    lines = []
    for cell in cells:
        r = cell["result"]
        if "error" in r:
            text = r["error"]
        elif r["part"] == "tests":
            text = f"{r['passed']} passed, {len(r['failed'])} failed, {len(r['skipped'])} skipped"
            text += "".join(f"\n    FAILED {entry['test']}: {entry['reason']}" for entry in r["failed"])
        elif r["part"] == "trials":
            text = ", ".join([f"{r['trials']} files", *r["stopped"]])
        elif r["part"] == "throughput":
            text = ", ".join(f"{name} {found['images_per_second']:.0f}" for name, found in r["libraries"].items())
            text += " images/s"
        else:
            text = f"test accuracy {r['test_acc']:.1%}, {r['images_per_second']:.0f} images/s"
        lines.append(f"{r['part']:10s} {r['name']}: {text}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for cells.json and the logs")
    parser.add_argument("--only", nargs="+", choices=(*PARTS, "trials"), default=PARTS, help="run only these parts")
    parser.add_argument("--dry-run", action="store_true", help="run a tiny version of everything on the CPU")
    options = parser.parse_args()
    try:
        device = choose_device("cpu" if options.dry_run else "cuda")
    except InputError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        check = Check(options.out.resolve(), Path(scratch), device, options.dry_run)
        check.run_all(options.only)
    print(f"\n{summary(check.cells)}\n{options.out / 'cells.json'}")
    sys.exit(int(check.failed_tests))


if __name__ == "__main__":
    main()
