"""CNN, ViT and the hybrid between them, measured side by side: each claim an experiment with its control.

    python cnn_vs_vit.py                                    the models that come with the project, under 3 minutes
    python cnn_vs_vit.py --only position                    one experiment
    python cnn_vs_vit.py --full                             those that train too, hours; what is in --cells stays
    python cnn_vs_vit.py --full --only data --data-dir CIFAR --shares 0.01 0.1 1      data efficiency on other images
    python cnn_vs_vit.py --data-dir photos --minutes 30     which for my images? trains all three on them

A run leaves a folder with report.html (one file, to open and to send), results.json and the figures.

Shapes:  N images, S side of an image in pixels.
"""

import argparse
import hashlib
import json
import re
import shlex
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch
import torchvision
from tqdm import tqdm

from train_vit import LINEAR_IMAGES, NotFinite, report_skipped
from vit_bridge.analysis.cost import throughput
from vit_bridge.cli import Bounded, OneLineParser, positive, script, seed
from vit_bridge.compare.experiments import EXPERIMENTS, ComparisonSetup
from vit_bridge.compare.report import Section, write_report
from vit_bridge.compare.statistics import join_words, margin, mean_min_max
from vit_bridge.compare.trials import (
    CNN_TO_VIT_MODELS,
    LEARNING,
    RATES,
    RECIPE,
    SEEDS,
    TRAIN_FRACTIONS,
    Recipe,
    build_kind,
    check_result,
    compare_on_dataset,
    measure_data,
    numbers_of_images,
    summarise,
)
from vit_bridge.data.images import normalise
from vit_bridge.data.loaders import MemoryLoader, get_data_loaders, get_test_loader
from vit_bridge.data.shapes import TEST_START, make_shapes
from vit_bridge.errors import InputError, check_choice
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.plots.charts import plot_bars, save_figure
from vit_bridge.preprocessing import SMALL_SIDE
from vit_bridge.runtime import choose_device, choose_precision
from vit_bridge.system import ROOT, Interrupts, commit, machine, new_output_dir, unless_empty, write_json
from vit_bridge.training.linear_probe import linear_classifier
from vit_bridge.weights.pretrained import create_pretrained

__all__ = ["HybridCNNViT", "shipped_models", "shipped_setup"]
NAMES = {"ConvNet": "convnet", "Hybrid": "hybrid", "ViT": "vit_nano"}
FEW_STEPS = 100  # with fewer a verdict says that it is one of too little training
FEW_IMAGES = 1000  # with fewer it names fine-tuning
RECIPE_WORDS = (f"All have the same time and one recipe, not those of train_vit.py: {RECIPE.optimizer} at "
                f"{RATES[1]:g}, batches of {RECIPE.batch_size}.")
COMMITTED = ROOT / "benchmarks" / "results"
INTRODUCTION = ("ConvNet, hybrid and ViT of nearly equal size, measured side by side. Each experiment has a control: "
                "the same model with random weights, uniform attention, a formula, or guessing. The sentences are made "
                "from the numbers.")
SHIPPED = ("What was measured now was asked of the models that come along, trained on the drawn shapes, not for "
           "equally long: ConvNet 250 steps of 64 images (95.9% of test images right), hybrid 600 (93.0%), ViT 3,200 "
           "(97.9%); what differs between them there may be due to that too.")


def shipped_models():
    """The three that come with the project, trained on the drawn shapes: a dict by name."""
    return {name: create_pretrained(f"{key}_shapes") for name, key in NAMES.items()}


def shipped_setup(n_images=500, **settings):
    """The shipped models and test images of the drawn shapes, as the experiments take them."""
    models = shipped_models()
    one = next(iter(models.values()))
    drawn = make_shapes(n_images, one.img_size, start=TEST_START)
    return ComparisonSetup(models, normalise(drawn.images, one.mean, one.std), drawn.labels, one.mean, one.std, **settings)


# ---- What is measured -------------------------------------------------------------------------------------


def look(setup, names, folder, progress=True):
    """The experiments of these names: ({name: data}, sections of the report), printed and drawn as they come."""
    results, sections = {}, []
    for name in names:
        experiment, started = EXPERIMENTS[name], time.perf_counter()
        data = experiment.measure(setup)
        figures = experiment.show(setup) | experiment.draw(data)
        results[name] = dict(data=data, finding=experiment.say(data), seconds=round(time.perf_counter() - started, 1))
        tell(experiment.title, results[name]["finding"], results[name]["seconds"])
        keep(figures, folder)
        sections.append(Section(experiment.title, experiment.question, results[name]["finding"], figures,
                                experiment.table(data), note=f"Measured now, in {results[name]['seconds']:.1f} s."))
    return results, sections


def show_cells(names, folder, cells):
    """The experiments that train, from cells {name: [cell, ...]} that are there: as look()."""
    results, sections = {}, []
    for name in names:
        experiment, own = LEARNING[name], cells.get(name, [])
        if not own:
            finding = f"Not measured yet; python cnn_vs_vit.py --full --only {name} does."
            tell(experiment.title, finding)
            sections.append(Section(experiment.title, experiment.question, finding))
            continue
        for group, of_group in grouped(own).items():
            data = [cell["result"] for cell in of_group]
            figures, finding = experiment.draw(data), experiment.say(data)
            ending = re.sub(r"[^\w-]+", "-", f"_{group}" if group else "").rstrip("-")  # of a file's name
            figures = {f"{key}{ending}": figure for key, figure in figures.items()}
            dates = sorted({cell["date"] for cell in of_group})
            days = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
            note = f"{len(of_group)} cells, measured {days}, by: {of_group[0]['command']}"
            title = f"{experiment.title}{group and f' ({group})'}"
            tell(title, finding)
            print(f"({note})")
            keep(figures, folder)
            results[f"{name}{group and '_' + group}"] = dict(data=data, finding=finding)
            sections.append(Section(title, experiment.question, finding, figures, experiment.table(data), note=note))
    return results, sections


def grouped(cells):
    """{data set: cells}, "" for those of the built-in sets."""
    groups = {}
    for cell in cells:
        groups.setdefault(cell["result"].get("dataset", ""), []).append(cell)
    return groups


def tell(title, finding, seconds=None):
    print(f"\n{title}{f' ({seconds:.1f} s)' if seconds is not None else ''}\n{finding}", flush=True)


def keep(figures, folder):
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")


# ---- Cells: one training each, one file each --------------------------------------------------------------


def planned(names, numbers, seeds=SEEDS):
    """(experiment, kind, seed, number of images) of every cell; the last is None but for "data", whose most images come
    first."""
    return [(name, kind, number, n_images) for name in names for n_images in (numbers if name == "data" else (None,))
            for number in seeds for kind in CNN_TO_VIT_MODELS]


def cell_file(name, kind, number, n_images, dataset):
    words = [name, dataset, kind.replace(", ", "-").replace(" ", "-"), n_images and str(n_images), str(number)]
    return "-".join(filter(None, words)) + ".json"


@dataclass(frozen=True)
class Plan:
    """What --full trains: cells as planned() gives them, kept in folder; settings: experiment -> what its cells have in
    common; loaders and dataset, of the images of "data"; options: the command's.
    """
    cells: list
    folder: Path
    recipe: Recipe
    settings: dict
    loaders: tuple
    dataset: str
    options: argparse.Namespace

    def path(self, name, kind, number, n_images):
        return self.folder / cell_file(name, kind, number, n_images, self.dataset_of(name))

    def dataset_of(self, name):
        return self.dataset if name == "data" else ""


def fewer(options):
    """How many images reach and cues draw in a dry run; nothing else, for their own numbers."""
    return dict(n_images=40, n_test=8) if options.dry_run else {}


def plan_cells(names, folder, options, recipe=RECIPE):
    """The Plan for experiments that train, with all that can be wrong looked at before anything is measured.

    Raises InputError where there are no test images, where a file in the folder is of other images or another recipe,
    and for images of a size that a model cannot take.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # OSError where nothing can be kept there
    loaders, numbers, dataset, images = (), (), "", {}
    if "data" in names:
        loaders = loaders_of(options)
        train_loader, _, test_loader = loaders
        if test_loader is None:
            raise InputError(f"{options.data_dir} has no test images, and the validation images choose the learning "
                             f"rates; put some into test/<class>/")
        for kind in CNN_TO_VIT_MODELS:
            build_kind(kind, len(train_loader.class_names), train_loader.img_size)
        numbers = numbers_of_images(options.shares, train_loader.n_images, len(train_loader.class_names))
        dataset = name_of(options.data_dir, train_loader)
        images = dict(n_images=train_loader.n_images, img_size=train_loader.img_size, n_test=test_loader.n_images,
                      class_names=list(train_loader.class_names), cut=options.seed, content=content_of(loaders))
    precision = choose_precision(options.amp, choose_device(options.device))
    common = dict(recipe=asdict(recipe), precision=str(precision or torch.float32))
    settings = {name: json.loads(json.dumps(common | dict(images=images if name == "data" else fewer(options))))
                for name in names}
    plan = Plan(planned(names, numbers, SEEDS[:1] if options.dry_run else SEEDS), folder, recipe, settings, loaders,
                dataset, options)
    for name in names:
        check_setting(settings[name], name, plan.dataset_of(name), folder)
    return plan


def train_cells(plan):
    """Measures every cell of a Plan that has no file yet. Returns {name: cells}.

    Each kind's learning rate is chosen with the first seed and the most images; its other cells take it over.
    """
    options, there = plan.options, 0
    print(f"{len(plan.cells)} cells, each a training or three, kept in {plan.folder} as they end: a later run goes on "
          f"there; one that is cut off is begun anew.", flush=True)
    again = "the same command with another --output-dir" if options.output_dir else "the same command"
    most = max((n_images for _, _, _, n_images in plan.cells if n_images), default=None)
    bar = tqdm(plan.cells, unit="cell", disable=None)
    with Interrupts() as interrupts:
        for name, kind, number, n_images in bar:
            interrupts.advice = (f"{there} of {len(plan.cells)} cells are in {plan.folder}; {again} goes on with the "
                                 f"next")
            path, first = plan.path(name, kind, number, n_images), plan.path(name, kind, SEEDS[0], n_images and most)
            bar.set_description(path.stem)
            if path.exists():
                there += 1
                continue
            rates = (read_cell(first)["result"]["rate"],) if first.exists() else RATES
            run = dict(recipe=plan.recipe, device=options.device, amp=options.amp, rates=rates)
            try:
                measured = measure_data(kind, number, n_images, plan.loaders, **run) | dict(dataset=plan.dataset) \
                    if name == "data" else LEARNING[name].measure(kind, number, **run, **fewer(options))
            except NotFinite as error:
                tqdm.write(f"{path.stem} is left out: {error}")
                continue
            device = choose_device(options.device).type
            write_json(dict(table=name, commit=commit(), date=time.strftime("%Y-%m-%d"), machine=machine(device),
                            versions=dict(torch=torch.__version__, torchvision=torchvision.__version__), seed=number,
                            command=command_of(name, options), setting=plan.settings[name],
                            result=measured | dict(device=device)), path)
            there += 1
            tqdm.write(f"{path.stem}: kept, {there} of {len(plan.cells)}")
    return read_cells(plan.settings, [plan.folder])


def check_setting(setting, name, dataset, folder):
    """Raises InputError where a cell of the same experiment and data set in the folder has another setting. Cells of
    before the images' content was kept are compared without it."""
    for path in folder.glob(f"{name}-*.json"):
        cell = read_cell(path)
        if cell["result"].get("dataset", "") != dataset:
            continue
        own = cell.get("setting") or {}
        images = {key: value for key, value in setting["images"].items()
                  if key != "content" or "content" in own.get("images", {})}
        if own != setting | dict(images=images):
            raise InputError(f"{path} was measured on other images, in another precision or by another recipe; remove "
                             f"it, or give another folder with --cells")


def content_of(loaders):
    """A sum that is the same for the same images and labels in MemoryLoaders."""
    total = hashlib.sha256()
    for loader in loaders:
        total.update(loader.images.cpu().numpy().tobytes())
        total.update(loader.labels.cpu().numpy().tobytes())
    return total.hexdigest()


def name_of(data_dir, loader):
    """What the images are called: "" for the built-in ones, the folder's name, or that of a known set."""
    if data_dir is None:
        return ""
    return Path(data_dir).resolve().name if loader.dataset_name == "folder" else loader.dataset_name


def command_of(name, options):
    """The command that measures the cells of this experiment again."""
    words = ["python", "cnn_vs_vit.py", "--full", *["--dry-run"] * options.dry_run, "--only", name]
    if name == "data":
        words += ["--data-dir", options.data_dir] if options.data_dir else []
        words += ["--img-size", str(options.img_size)] if options.img_size else []
        words += ["--shares", *(f"{share:g}" for share in options.shares)]
        words += ["--seed", str(options.seed)] if options.seed else []
        words += ["--skip-corrupt"] * options.skip_corrupt
    words += [word for key in ("device", "amp") if getattr(options, key) != "auto"
              for word in (f"--{key}", getattr(options, key))]
    return shlex.join(words)


def read_cells(names, folders):
    """{name: cells}; those of an experiment and a data set come from the folder that has most of them, the first of
    equals."""
    cells = {}
    for name in names:
        groups = {}
        for folder in folders:
            for group, own in grouped([read_cell(path) for path in sorted(folder.glob(f"{name}-*.json"))]).items():
                groups[group] = max(groups.get(group, []), own, key=len)
        cells[name] = [cell for group in groups.values() for cell in group]
    return cells


def read_cell(path):
    """A cell as a dict. Raises InputError for a file that holds none."""
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(cell[key], str) for key in ("date", "command")):
            raise TypeError("date and command are words")
        check_result(path.name.split("-")[0], cell["result"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no result of cnn_vs_vit.py --full ({type(error).__name__}); remove it, or give "
                         f"another folder with --cells") from error
    return cell


def loaders_of(options):
    """(training, validation, test) images of --data-dir, or the built-in shapes. Photographs are made small."""
    data = dict(data_dir=options.data_dir or "./no-such-folder", img_size=options.img_size, seed=options.seed,
                dataset="auto" if options.data_dir else "shapes", batch_size=RECIPE.batch_size,
                skip_corrupt=options.skip_corrupt)
    if options.dry_run and not options.data_dir:
        data["n_images"] = 60
    loaders = get_data_loaders(**data)
    if loaders[0].img_size > SMALL_SIDE:
        data["img_size"] = SMALL_SIDE
        print(f"Photographs are compared at {SMALL_SIDE} x {SMALL_SIDE} pixels (--img-size; train_vit.py trains on "
              f"larger ones).")
        loaders = get_data_loaders(**data)
    if not isinstance(loaders[0], MemoryLoader):
        raise InputError(f"{loaders[0].n_images:,} images of {loaders[0].img_size} pixels are too many to be kept in "
                         f"memory; give fewer, or a smaller --img-size")
    loaders = (*loaders, get_test_loader(**data))
    report_skipped(skipped_of(loaders))
    return loaders


def skipped_of(loaders):
    """The image files that were left out, each once."""
    return sorted({str(file) for loader in loaders if loader is not None for file in loader.skipped})


def fit_and_choose(train_loader):
    """(four of five, every fifth) of the training images, not augmented: to fit a linear classifier, and to choose its
    strength where the validation images are those that are asked."""
    plain = train_loader.without_augmentation(LINEAR_IMAGES)
    fifth = torch.arange(plain.n_images, device=plain.labels.device) % 5 == 0  # (n)
    return [MemoryLoader(plain.images[part], plain.labels[part], plain.facts, plain.batch_size)
            for part in (~fifth, fifth)]


# ---- Which for my data? -----------------------------------------------------------------------------------


def judge_folder(options, folder):
    """Trains all three on somebody's images, and says which, if any, is better there: as look()."""
    loaders = loaders_of(options)
    train_loader, val_loader, test_loader = loaders
    split = "validation" if test_loader is None else "test"
    asked = val_loader if test_loader is None else test_loader
    print(f"{train_loader.n_images:,} training images of {train_loader.img_size} pixels, "
          f"{len(train_loader.class_names)} classes; {options.minutes:g} min in all for three models, {len(SEEDS)} "
          f"seeds each; asked are {asked.n_images:,} {split} images. {RECIPE_WORDS}")
    with Interrupts() as interrupts:
        interrupts.advice = "a verdict needs all trainings, and nothing of it is kept; give fewer --minutes"
        rows = compare_on_dataset(loaders, 0.01 if options.dry_run else options.minutes, device=options.device, amp=options.amp)
    device = choose_device(options.device)
    costs = {kind: 1e3 / throughput(build_kind(kind, len(train_loader.class_names), train_loader.img_size),
                                    batch_size=32, seconds=0.5, device=device) for kind in rows}
    parts = fit_and_choose(train_loader) if test_loader is None else (train_loader.without_augmentation(LINEAR_IMAGES), val_loader)
    controls = {"a linear classifier on the pixels": linear_classifier(*parts, asked)["test_acc"],
                "naming the largest class every time": largest_class(train_loader, asked)}
    finding = summarise(rows, costs) + " For comparison: " + join_words(f"{share:.1%} by {name}" for name, share in
                                                                  controls.items()) + "."
    finding += caveats(rows, controls, train_loader.n_images)
    skipped = skipped_of(loaders)
    finding += f" Left out: {len(skipped)} image files that cannot be read." if skipped else ""
    tell("Which for these images?", finding)
    levels = {name: mean_min_max([row["accuracy"] for row in own]) for name, own in rows.items()}
    panels = {f"accuracy on the {split} images\n(lines: lowest and highest seed)": levels | controls,
              f"milliseconds an image\n({device.type}, batches of 32)": costs}
    figures = {"verdict": plot_bars(panels)}
    keep(figures, folder)
    table = [["model", *(f"seed {row['seed']}" for row in next(iter(rows.values()))), "steps", "ms an image"],
             *[[name, *(f"{row['accuracy']:.1%}" for row in own), own[0]["n_steps"], f"{costs[name]:.2f}"]
               for name, own in rows.items()]]
    section = Section("Which for these images?", "Which of the three is better here, and how sure is that?", finding,
                      figures, [(f"Accuracy on the {split} images", table)],
                      f"{RECIPE_WORDS} A lead counts where it is larger than what seeds "
                      "and images vary by: Student's t over both, 5% for the three comparisons together.")
    return {"verdict": dict(rows=rows, costs=costs, controls=controls, finding=finding, skipped=skipped)}, [section]


def largest_class(train_loader, asked):
    """The share of the images asked that are of the class with most training images."""
    counts = train_loader.class_counts
    return asked.class_counts[counts.index(max(counts))] / asked.n_images


def caveats(rows, controls, n_images):
    """In words, why the models of judge() may not be what they could be; "" where nothing speaks for it."""
    least, n = min(own[0]["n_steps"] for own in rows.values()), len(next(iter(rows.values()))[0]["right"])
    text = f" Only {least} steps fitted into the time of one of them: too few to judge by, give more minutes." \
        if least < FEW_STEPS else ""
    control = max(controls, key=controls.get)
    own = [[row["accuracy"] for row in of_kind] for of_kind in rows.values()]
    if all(mean(right) - controls[control] <= margin(right, right, n) for right in own):
        text += (f" No model does better than {control} by more than chance gives: they have not learned what is "
                 f"there, or there is nothing.")
    if n_images < FEW_IMAGES:
        text += (f" {n_images:,} training images are few: a model that has learned from others first may do better "
                 f"than all three (train_vit.py --pretrained NAME; benchmarks/RESULTS.md, few-images).")
    return text


# ---- The command ------------------------------------------------------------------------------------------


def compare(options, folder):
    """Everything that the options ask for, into the folder."""
    started, introduction = time.perf_counter(), INTRODUCTION
    if options.minutes:
        results, sections = judge_folder(options, folder)
        introduction = "ConvNet, hybrid and ViT of nearly equal size, trained on the same images for the same time."
    else:
        looked = [name for name in EXPERIMENTS if not options.data_dir and name in (options.only or EXPERIMENTS)]
        trained = [name for name in LEARNING if name in (options.only or (["data"] if options.data_dir else LEARNING))]
        recipe = replace(RECIPE, n_steps=1, batch_size=8) if options.dry_run else RECIPE
        own = folder / "cells" if options.dry_run else Path(options.cells)
        if own.exists() and not own.is_dir():
            raise InputError(f"--cells {own} is a file; expected a folder, where --full keeps what it has measured")
        if options.full:
            plan = plan_cells(trained, own, options, recipe)
        else:
            cells = read_cells(trained, [own, COMMITTED])
        results, sections = {}, []
        if looked:
            little = dict(n_images=16, seconds=0.01, sizes=(32,), patches=(32,), reach=1)
            setup = shipped_setup(**little if options.dry_run else {})
            results, sections = look(setup, looked, folder)
            introduction += f" {SHIPPED}"
        if options.full:
            cells = train_cells(plan)
        more_results, more_sections = show_cells(trained, folder, cells)
        results, sections = results | more_results, sections + more_sections
        if not options.full:
            print("\nThese are the shipped models and committed results: no verdict for other images follows. "
                  "--data-dir DIR --minutes M asks yours.")
    seconds = round(time.perf_counter() - started, 1)
    write_json(dict(options=vars(options), torch=torch.__version__, seconds=seconds, results=results),
               folder / "results.json")
    write_report(folder / "report.html", "CNN and ViT, side by side", introduction, sections)
    gone = options.dry_run and not options.output_dir
    print(f"\n{seconds:.0f} s" + ("" if gone else f"; {folder}/report.html, results.json and the figures"))


def make_parser():
    parser = OneLineParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join([*EXPERIMENTS, *LEARNING])}")
    parser.add_argument("--full", action="store_true", help="measure those too that train: hours, and resumable")
    parser.add_argument("--cells", default="runs/cnn_vs_vit-cells", help="where --full keeps what it has measured")
    parser.add_argument("--data-dir", help="a folder with a folder for each class, or a known set, as in train_vit.py")
    parser.add_argument("--img-size", type=Bounded(int, 8, SMALL_SIDE, f"a whole number from 8 to {SMALL_SIDE}"),
                        help=f"side in pixels, at most {SMALL_SIDE} (default: small images keep theirs, photographs "
                             f"get {SMALL_SIDE})")
    parser.add_argument("--minutes", type=positive(), help="with --data-dir: train all three on these images within so "
                                                           "many, and say which is better there")
    parser.add_argument("--shares", nargs="+", type=Bounded(float, 1e-6, 1, "above 0 to 1"), default=list(TRAIN_FRACTIONS),
                        help="of the training images, for data efficiency")
    parser.add_argument("--seed", type=seed(), default=0, help="of the validation cut")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave out image files that cannot be read")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"))
    parser.add_argument("--output-dir", help="a new folder (default: runs/cnn_vs_vit-<data>-<n>)")
    parser.add_argument("--dry-run", action="store_true", help="little of everything; without --output-dir nothing is "
                                                               "kept")
    return parser


def main(argv=None):
    options = make_parser().parse_args(argv)
    for name in options.only or ():
        check_choice("--only", name, (*EXPERIMENTS, *LEARNING))
    if options.minutes and (options.full or options.only):
        raise InputError("--minutes asks which of the three suits the images of --data-dir; leave out --full "
                         "and --only")
    if options.minutes and not options.data_dir:
        raise InputError("--minutes is for images of one's own; give --data-dir DIR too")
    if options.data_dir and not (options.minutes or options.full):
        raise InputError(f"--data-dir {options.data_dir} alone asks nothing; give --minutes M too (which of the three "
                         f"suits these images), or --full (data efficiency on them)")
    if options.data_dir and options.only and options.only != ["data"]:
        raise InputError(f"--data-dir is for data efficiency, and --only {' '.join(options.only)} asks other things; "
                         f"leave out --data-dir, or give --only data")
    if options.data_dir and not Path(options.data_dir).exists():
        raise InputError(f"--data-dir {options.data_dir} does not exist; give a folder with a folder for each class")
    choose_device(options.device)
    if options.dry_run and not options.output_dir:
        with tempfile.TemporaryDirectory() as folder:
            compare(options, Path(folder))
        print("Dry run: all parts ran.")
    else:
        with unless_empty(new_output_dir(options.output_dir, "cnn_vs_vit", Path(options.data_dir).resolve().name
                                         if options.data_dir else "shapes")) as folder:
            compare(options, folder)


if __name__ == "__main__":
    script(main)
