"""Compare a CNN, a ViT and a hybrid of the two; every experiment has a control.

    python cnn_vs_vit.py                                    compare the shipped models, in about two minutes
    python cnn_vs_vit.py --only position                    run one experiment
    python cnn_vs_vit.py --train                            add the experiments that train (hours; can be resumed)
    python cnn_vs_vit.py --data-dir photos --minutes 30     find the model that suits your images

A run writes report.html (one file that you can open or send), results.json and the figures into a folder.
"""

import hashlib
import itertools
import re
import shlex
import tempfile
import time
from pathlib import Path

import torch

from train_vit import describe_skipped, report_skipped
from vit_bridge.cli import Bounded, HelpFormatter, OneLineParser, int_at_least, positive, script, seed
from vit_bridge.compare.experiments import EXPERIMENTS, ComparisonSetup
from vit_bridge.compare.report import Section, write_report
from vit_bridge.compare.statistics import MIN_IMAGES, assumed_noise, describe_power, describe_verdict
from vit_bridge.compare.trained import TRAINED
from vit_bridge.compare.trials import SEEDS, by_dataset, draw_indices, plan_trials, read_trials, run_trials
from vit_bridge.compare.which import (
    DEFAULT_WEIGHTS,
    FolderImages,
    baselines,
    candidate_table,
    candidates_of,
    caveats,
    compare_candidates,
    describe_weights,
    draw_candidates,
    fitting_candidates,
    next_step,
    share_of,
)
from vit_bridge.data.audit import audit_folder
from vit_bridge.data.loaders import MemoryLoader, get_data_loaders, get_test_loader
from vit_bridge.data.shapes import TEST_START, make_shapes
from vit_bridge.errors import InputError, join_words
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.plots.charts import save_figure
from vit_bridge.preprocessing import SMALL_SIDE, describe_size
from vit_bridge.runtime import choose_device
from vit_bridge.system import ROOT, Interrupts, new_output_dir, unless_empty, write_json
from vit_bridge.weights.checkpoints import load

__all__ = ["HybridCNNViT", "shipped_setup"]
SHIPPED_MODELS = {"ConvNet": "convnet_shapes", "Hybrid": "hybrid_shapes", "ViT": "vit_nano_shapes"}
DESCRIPTION = """\
Compare a CNN, a ViT and a hybrid of the two; every experiment has a control.

examples:
  python cnn_vs_vit.py                                  compare the shipped models, in about two minutes
  python cnn_vs_vit.py --only position                  run one experiment
  python cnn_vs_vit.py --data-dir photos --minutes 30   find the model that suits your images"""
COMMITTED = ROOT / "benchmarks" / "results"  # trials that come with the project
INTRODUCTION = ("This report compares a ConvNet, a hybrid and a ViT of nearly the same size. Each experiment has a "
                "control: the same model with random weights, uniform attention, a formula, or guessing.")
SHIPPED_NOTE = ("The shipped models learned the drawn shapes with different numbers of training steps. The ConvNet was "
                "trained for 250 steps of 64 images and has a test accuracy of 95.9%. The hybrid has 93.0% after 600 "
                "steps, and the ViT 97.9% after 3,200 steps. Some differences between them may come from this. Three "
                "models trained on CIFAR-10 reverse some of the findings: see docs/comparison.md.")


TRAIN_FRACTIONS = (0.01, 0.1, 1.0)  # of the training images
LITTLE = {  # arguments of measure() in a dry run
    "ladder": dict(minutes=1e-3), "data": dict(first_steps=1, most_steps=2),
    "reach": dict(n_steps=1, n_images=40, n_val=8, n_test=8, distances=(8, 20)),
    "cues": dict(n_steps=1, n_images=40, n_val=8, n_test=8)}


# ---- Experiments on the shipped models --------------------------------------------------------------------


def shipped_setup(n_images=500, **settings):
    """Return the shipped models, and test images of our synthetic drawn shapes, for EXPERIMENTS[name].measure().

    Parameters
    ----------
    n_images : int, optional
        Number of test images.
    **settings
        Further arguments of ComparisonSetup.

    Returns
    -------
    ComparisonSetup
    """
    models = {name: load(key) for name, key in SHIPPED_MODELS.items()}
    one = next(iter(models.values()))
    drawn = make_shapes(n_images, one.config.img_size, start=TEST_START)
    images = one.preprocessing.normalise(drawn.images)
    return ComparisonSetup(models, images, drawn.labels, one.preprocessing, **settings)


def run_experiments(setup, names, folder):
    """Measure, print and draw these EXPERIMENTS; return ({name: data}, sections of the report)."""
    results, sections = {}, []
    for name in names:
        experiment, started = EXPERIMENTS[name], time.perf_counter()
        data = experiment.measure(setup)
        figures, finding = experiment.draw(data, setup), experiment.finding(data)
        seconds = round(time.perf_counter() - started, 1)
        note = f"Measured in this run, in {seconds:.1f} s."
        results[name] = dict(data=data, finding=finding, seconds=seconds)
        sections.append(Section(experiment.title, experiment.question, finding, figures, experiment.tables(data), note))
        _publish(sections[-1], folder)
    return results, sections


def _publish(section, folder, with_note=True):
    """Print a section's finding and save its figures into the folder."""
    note = f"\n({section.note})" if section.note and with_note else ""
    print(f"\n{section.title}\n{section.finding}{note}", flush=True)
    for name, figure in section.figures.items():
        save_figure(figure, folder / f"{name}.png")


# ---- Experiments that train -------------------------------------------------------------------------------


def make_plan(names, folder, options):
    """Return the plan of the trials of these experiments; all inputs are checked."""
    images = None
    if any(TRAINED[name].on_images for name in names):
        images = _describe_loaders(_loaders_of(options), options)
    commands = {name: _command_of(name, options) for name in names}
    return plan_trials({name: TRAINED[name] for name in names}, folder, dict(device=options.device, amp=options.amp),
                       commands, images, LITTLE if options.dry_run else None)


def _describe_loaders(loaders, options):
    """Return (loaders, numbers of training images, name of the data set, what identifies the images)."""
    train_loader, _, test_loader = loaders
    if test_loader is None:
        raise InputError(f"{options.data_dir} has no test images, and the validation images are already used to "
                         f"choose the learning rates; put test images into test/<class>/")
    n, n_classes = train_loader.n_images, len(train_loader.class_names)
    facts = dict(n_images=n, img_size=train_loader.img_size, n_test=test_loader.n_images,
                 class_names=list(train_loader.class_names), cut=options.seed, content=_checksum(loaders))
    dataset = train_loader.dataset_name if options.data_dir else ""  # "" for the built-in shapes
    dataset = Path(options.data_dir).resolve().name if dataset == "folder" else dataset
    numbers = sorted({max(n_classes, round(fraction * n)) for fraction in options.train_fractions})
    for number, one in itertools.product(numbers, SEEDS * (not options.dry_run)):
        drawn = train_loader.labels[draw_indices(train_loader, number, one)].unique()
        if len(drawn) < n_classes:
            raise InputError(f"{number} training images, drawn by seed {one}, show only {len(drawn)} of {n_classes} "
                             f"classes; use larger --train-fractions")
    return loaders, numbers, dataset, facts


def _checksum(loaders):
    """Return a checksum of the images and labels in MemoryLoaders."""
    total = hashlib.sha256()
    for loader in loaders:
        total.update(loader.images.cpu().numpy().tobytes())
        total.update(loader.labels.cpu().numpy().tobytes())
    return total.hexdigest()


def _command_of(name, options):
    """Return the command that measures the trials of this experiment again."""
    words, defaults = ["python", "cnn_vs_vit.py", "--train", "--only", name], vars(make_parser().parse_args([]))
    of_images = ("data_dir", "img_size", "train_fractions", "seed", "skip_corrupt") * TRAINED[name].on_images
    for key in (*of_images, "device", "amp", "dry_run"):
        value, option = getattr(options, key), f"--{key.replace('_', '-')}"
        if value != defaults[key]:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [option, *(f"{one:g}" if isinstance(one, float) else str(one) for one in values)]
    return shlex.join(words)


def show_trials(names, folder, trials):
    """Print and draw TRAINED from measured trials, with one section per data set.

    Parameters
    ----------
    names : list of str
        Keys of TRAINED.
    folder : Path
        Where the figures go.
    trials : dict
        {name: [file contents]}.

    Returns
    -------
    tuple
        {name: data}, and the sections of the report.
    """
    results, sections = {}, []
    for name in names:
        experiment = TRAINED[name]
        if not trials.get(name):
            images = " --data-dir DIR" * experiment.on_images
            finding = (f"Not measured yet. python cnn_vs_vit.py --train --only {name}{images} measures it, which takes "
                       f"hours.")
            sections.append(Section(experiment.title, experiment.question, finding))
            _publish(sections[-1], folder)
        for dataset, own in by_dataset(trials.get(name, [])).items():
            data = [trial["result"] for trial in own]
            experiment.check(data)
            ending = re.sub(r"[^\w-]+", "-", f"_{dataset}" if dataset else "").rstrip("-")  # of file names
            drawn = experiment.draw(data)
            while any((folder / f"{key}{ending}.png").exists() for key in drawn):
                ending += "-2"  # "my photos" and "my-photos" have the same ending
            figures = {f"{key}{ending}": figure for key, figure in drawn.items()}
            dates = sorted({trial["date"] for trial in own})
            note = (f"{len(own)} trials, measured {' to '.join(dict.fromkeys([dates[0], dates[-1]]))} with: "
                    f"{own[0]['command']}")
            title = f"{experiment.title} ({dataset})" if dataset else experiment.title
            sections.append(Section(title, experiment.question, experiment.finding(data), figures,
                                    experiment.tables(data), note))
            _publish(sections[-1], folder)
            results["_".join(filter(None, (name, dataset)))] = dict(data=data, finding=sections[-1].finding)
    return results, sections


# ---- Which for my images? ---------------------------------------------------------------------------------

DRY_RUN_IMAGES = 40  # images of each part in a dry run
TITLE, QUESTION = "Which model for these images?", "Which candidate is best here, and how certain is that?"
CANDIDATES = ("A linear probe, fine-tuned models and models trained from scratch were trained on the same images. All "
              "but the probe had the same time, and each had the recipe that train_vit.py chooses for it.")


def compare_on_folder(options, folder):
    """Train all candidates on the images in --data-dir and report which, if any, is better on them.

    Returns ({"verdict": data}, sections).
    """
    candidates = candidates_of(options.pretrained or DEFAULT_WEIGHTS)
    images = FolderImages(DRY_RUN_IMAGES if options.dry_run else None, data_dir=options.data_dir, seed=options.seed,
                          img_size=options.img_size, skip_corrupt=options.skip_corrupt)
    is_folder, run = images.loaders()[0].dataset_name == "folder", dict(device=options.device, amp=options.amp)
    audit = [str(audit_folder(options.data_dir, seed=options.seed))] if is_folder else []
    candidates, left_out = fitting_candidates(candidates, images, options.minutes, **run)
    for line in [*audit, *left_out]:
        print(line)
    expected, unfair = _announce(options, candidates, images)
    with Interrupts() as interrupts:
        interrupts.advice = "a comparison needs all training runs, and none of them is saved; use fewer --minutes"
        results, too_large = compare_candidates(candidates, images, options.minutes,
                                                n_steps=1 if options.dry_run else None, **run)
    controls, guessing = baselines(images.loaders())
    rows, costs = ({name: result[key] for name, result in results.items()} for key in ("rows", "ms"))
    commands = {one.name: one.command(options.data_dir, images.img_size, options.minutes, results[one.name]["recipe"],
                                      _same_run(options)) for one in candidates if one.name in results}
    report_skipped(images.skipped)
    little = ["A dry run: every model trained for one step, so what follows means nothing."] * options.dry_run
    finding = "\n".join([*little, *describe_verdict(rows, guessing), *next_step(rows, costs, commands, guessing),
                         *caveats(results, controls, guessing), *unfair, *left_out, *too_large])
    shown = results, controls, guessing
    section = Section(TITLE, QUESTION, finding, {"verdict": draw_candidates(*shown)}, [candidate_table(*shown)],
                      "\n".join([*expected, *audit, *describe_skipped(images.skipped)]))
    _publish(section, folder, with_note=False)  # printed before the training
    data = dict(results=results, controls=controls, guessing=guessing, finding=finding, skipped=images.skipped)
    return {"verdict": data}, [section]


def _same_run(options):
    """Return the options that train_vit.py needs to read the same images on the same device."""
    words = ["--skip-corrupt"] * options.skip_corrupt
    for key in ("device", "amp"):
        words += [f"--{key}", getattr(options, key)] * (getattr(options, key) != "auto")
    return words


def _announce(options, candidates, images):
    """Print what is compared, and which lead can be found; return these lines, and those about unfair weights."""
    train_loader, val_loader, test_loader = images.loaders()
    part, tested = ("validation", val_loader) if test_loader is None else ("test", test_loader)
    seconds = 60 * share_of(options.minutes, SEEDS, candidates)
    print(f"{train_loader.n_images:,} training images of {len(train_loader.class_names)} classes. "
          f"{len(candidates)} candidates, each with {len(SEEDS)} seeds, share {options.minutes:g} min ({seconds:.0f} s "
          f"for each training run, except that of a probe) and are compared on {tested.n_images:,} {part} images. New "
          f"models get images of {describe_size(train_loader.img_size)} pixels, trained ones their own size.")
    described = dict.fromkeys(describe_weights(one, train_loader.class_names) for one in candidates if one.weights)
    origins = [origin for origin, _ in described]
    expected = (f"Expected before any training (assuming an accuracy of 75%, and seeds that differ by 1 point): "
                f"{describe_power(assumed_noise(tested.n_images, len(SEEDS), len(candidates)))}")
    if tested.n_images < MIN_IMAGES:
        expected = (f"{tested.n_images} {part} images are too few to name a winner; at least {MIN_IMAGES} are needed. "
                    f"{_more_images(options.data_dir)}")
    print("\n".join([*origins, expected]), flush=True)
    return [expected, *origins], [unfair for _, unfair in described if unfair]


def _more_images(data_dir):
    """Return advice on where to put more test images."""
    if (Path(data_dir) / "train").is_dir():
        return f"Put more images into {Path(data_dir) / 'test'}/<class>/."
    return f"Move the training images into {Path(data_dir) / 'train'}/<class>/ and put test images into " \
           f"{Path(data_dir) / 'test'}/<class>/."


def _loaders_of(options):
    """Return loaders for the images in --data-dir, or for the built-in shapes; photographs are shrunk."""
    data = dict(data_dir=options.data_dir or "./no-such-folder", img_size=options.img_size, seed=options.seed,
                dataset="auto" if options.data_dir else "shapes", batch_size=64,
                skip_corrupt=options.skip_corrupt)
    if options.dry_run and not options.data_dir:
        data["n_images"] = 60
    loaders = get_data_loaders(**data)
    if loaders[0].img_size > SMALL_SIDE:
        data["img_size"] = SMALL_SIDE
        print(f"Photographs are compared at {SMALL_SIDE} x {SMALL_SIDE} pixels (set --img-size to shrink them further; "
              f"train_vit.py trains on larger ones).")
        loaders = get_data_loaders(**data)
    if not isinstance(loaders[0], MemoryLoader):
        raise InputError(f"{loaders[0].n_images:,} {loaders[0].img_size}-pixel images do not fit in memory; use "
                         f"fewer images or a smaller --img-size")
    if loaders[0].dataset_name == "folder":
        print(audit_folder(options.data_dir, seed=options.seed))
    loaders = (*loaders, get_test_loader(**data))
    report_skipped(_skipped_files(loaders))
    return loaders


def _skipped_files(loaders):
    """Return the image files that were skipped, each once."""
    return sorted({str(file) for loader in loaders if loader is not None for file in loader.skipped})


# ---- The command ------------------------------------------------------------------------------------------


def compare(options, folder):
    """Run the requested comparison, and write the results into the folder."""
    started = time.perf_counter()
    if options.minutes:
        introduction = CANDIDATES
        results, sections = compare_on_folder(options, folder)
    else:
        introduction, results, sections = compare_models(options, folder)
    seconds = round(time.perf_counter() - started, 1)
    write_json(dict(options=vars(options), torch=torch.__version__, seconds=seconds, results=results),
               folder / "results.json")
    write_report(folder / "report.html", "CNN and ViT, side by side", introduction, sections)
    gone = options.dry_run and not options.output_dir
    print(f"\n{seconds:.0f} s" + ("" if gone else f"; {folder}/report.html, results.json and the figures"))


def compare_models(options, folder):
    """Check the options, then run the experiments; return (introduction, {name: data}, sections)."""
    wanted = options.only or (
        [name for name, one in TRAINED.items() if one.on_images] if options.data_dir else [*EXPERIMENTS, *TRAINED])
    looking = [name for name in EXPERIMENTS if name in wanted]
    training = [name for name in TRAINED if name in wanted]
    results_dir = folder / "trials" if options.dry_run else Path(options.results_dir)
    if results_dir.exists() and not results_dir.is_dir():
        raise InputError(f"--results-dir {results_dir} is a file; choose the folder in which --train keeps its trials")
    if options.train:
        if not training:
            raise InputError(f"--train has no effect on {join_words(looking)}; remove it, or add one of "
                             f"{', '.join(TRAINED)} to --only")
        plan = make_plan(training, results_dir, options)
    else:
        trials = read_trials(training, [results_dir, COMMITTED])
    introduction, results, sections = INTRODUCTION, {}, []
    if looking:
        little = dict(n_images=16, seconds=0.01, sizes=(32,), patches=(32,), reach=1) if options.dry_run else {}
        results, sections = run_experiments(shipped_setup(**little), looking, folder)
        introduction += f" {SHIPPED_NOTE}"
    if options.train:
        again = "the same command with another --output-dir" if options.output_dir else "the same command"
        trials = run_trials(plan, options.jobs, again)
    more_results, more_sections = show_trials(training, folder, trials)
    if not options.train:
        shown = join_words(["the shipped models"] * bool(looking) + ["saved results"] * bool(training))
        print(f"\nThese are {shown}; they show nothing about other images. To compare on your own images, use "
              f"--data-dir DIR --minutes M.")
    return introduction, results | more_results, sections + more_sections


def make_parser():
    parser = OneLineParser(prog="cnn_vs_vit.py", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME",
                        help=f"run only these experiments: {', '.join([*EXPERIMENTS, *TRAINED])}")
    parser.add_argument("--train", "--full", action="store_true", dest="train",
                        help="also run the experiments that train; this takes hours, and the same command resumes")
    parser.add_argument("--jobs", type=int_at_least(1), default=1, metavar="N",
                        help="processes that train at the same time, with --train (default: %(default)s)")
    parser.add_argument("--results-dir", "--cells", default="runs/cnn_vs_vit-cells", dest="results_dir",
                        metavar="FOLDER", help="folder in which --train keeps its trials (default: %(default)s)")
    parser.add_argument("--data-dir", metavar="FOLDER", help="your images: a folder with one folder per class, or a "
                                                             "known data set (see train_vit.py)")
    parser.add_argument("--img-size", type=Bounded(int, 8, SMALL_SIDE, f"a whole number from 8 to {SMALL_SIDE}"),
                        metavar="PIXELS", help=f"image side in pixels, at most {SMALL_SIDE} (default: small images "
                                               f"keep their size, photographs get {SMALL_SIDE})")
    parser.add_argument("--minutes", type=positive(), metavar="M", help="with --data-dir: train all candidates on "
                        "these images, together for this time, and report which is best (tests take a little longer)")
    parser.add_argument("--pretrained", nargs="+", metavar="NAME|PATH", help="with --minutes: trained weights to "
                        "start from, as in train_vit.py; from each ViT a linear probe and a fine-tuning, from each CNN "
                        f"a fine-tuning (default: {' '.join(DEFAULT_WEIGHTS)})")
    parser.add_argument("--train-fractions", "--shares", nargs="+", type=Bounded(float, 1e-6, 1, "above 0 to 1"),
                        default=list(TRAIN_FRACTIONS), dest="train_fractions", metavar="F",
                        help="for the experiments data and ladder: fractions of the training images")
    parser.add_argument("--seed", type=seed(), default=0, metavar="N",
                        help="seed of the validation split (default: %(default)s)")
    parser.add_argument("--skip-corrupt", action="store_true", help="skip image files that cannot be read")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
                        help="mixed precision (default: %(default)s)")
    parser.add_argument("--output-dir", metavar="FOLDER",
                        help="a new folder for the results (default: runs/cnn_vs_vit-<data>-<n>)")
    parser.add_argument("--dry-run", action="store_true", help="run a little of everything; nothing is kept without "
                                                               "--output-dir")
    return parser


def _check_used(options):
    """Raise InputError for an option that the requested comparison would ignore."""
    ignored = []
    if not options.train:
        ignored += ["jobs", "train_fractions"]
    if not (options.train or options.data_dir):
        ignored += ["img_size", "seed", "skip_corrupt"]
    if options.minutes:
        ignored += ["results_dir"]
    defaults = vars(make_parser().parse_args([]))
    for key in ignored:
        if getattr(options, key) != defaults[key]:
            raise InputError(f"--{key.replace('_', '-')} has no effect here; remove it, or see --help for the options "
                             f"that it belongs to")


def main(argv=None):
    options = make_parser().parse_args(argv)
    for name in options.only or ():
        known = (*EXPERIMENTS, *TRAINED)
        if name not in known:
            raise InputError(f"--only {name!r} is unknown; choose one of: {', '.join(known)}")
    if options.minutes and (options.train or options.only):
        raise InputError("--minutes compares all candidates on your images; remove --train and --only")
    if options.pretrained and not options.minutes:
        raise InputError("--pretrained is for the comparison on your own images; add --data-dir DIR --minutes M")
    if options.minutes and not options.data_dir:
        raise InputError("--minutes needs your own images; set --data-dir DIR too")
    if options.data_dir and not (options.minutes or options.train):
        raise InputError(f"--data-dir {options.data_dir} does not specify what to compare; add --minutes M (which "
                         f"model suits these images) or --train (ladder and data efficiency)")
    others = [name for name in options.only or () if name in EXPERIMENTS or not TRAINED[name].on_images]
    if options.data_dir and others:
        raise InputError(f"--data-dir works with --only data or ladder, not with --only {' '.join(others)}; remove one "
                         f"of the two")
    if options.data_dir and not Path(options.data_dir).exists():
        raise InputError(f"--data-dir {options.data_dir} does not exist; choose a folder with one folder per class")
    _check_used(options)
    choose_device(options.device)
    if options.dry_run and not options.output_dir:
        with tempfile.TemporaryDirectory() as folder:
            compare(options, Path(folder))
        print("Dry run: all parts ran.")
    else:
        data_name = Path(options.data_dir).resolve().name if options.data_dir else "shapes"
        with unless_empty(new_output_dir(options.output_dir, "cnn_vs_vit", data_name)) as folder:
            compare(options, folder)


if __name__ == "__main__":
    script(main)
