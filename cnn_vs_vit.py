"""Compare a CNN, a ViT and a hybrid of the two; every experiment has a control.

    python cnn_vs_vit.py                                    compare the shipped models, in a few minutes
    python cnn_vs_vit.py --only position                    run one experiment
    python cnn_vs_vit.py --train                            add the experiments that train (hours; can be resumed)
    python cnn_vs_vit.py --data-dir photos --minutes 30     find the model that suits your images

A run writes report.html (one file that you can open or send), results.json and the figures into a folder.
"""

import hashlib
import json
import re
import shlex
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torchvision
from tqdm import tqdm

from train_vit import NotFinite, report_skipped
from vit_bridge.cli import Bounded, HelpFormatter, OneLineParser, positive, script, seed
from vit_bridge.compare.experiments import EXPERIMENTS, ComparisonSetup
from vit_bridge.compare.report import Section, write_report
from vit_bridge.compare.statistics import MIN_IMAGES, assumed_noise, describe_power, describe_verdict
from vit_bridge.compare.trials import (
    CNN_TO_VIT_MODELS,
    RATES,
    RECIPE,
    SEEDS,
    TRAIN_FRACTIONS,
    TRAINING_EXPERIMENTS,
    Trial,
    TrialRecipe,
    build_kind,
    by_dataset,
    numbers_of_images,
    read_trial,
    read_trials,
)
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
    next_step,
)
from vit_bridge.data.audit import audit_folder
from vit_bridge.data.loaders import MemoryLoader, get_data_loaders, get_test_loader
from vit_bridge.data.shapes import TEST_START, make_shapes
from vit_bridge.errors import InputError
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.plots.charts import save_figure
from vit_bridge.preprocessing import SMALL_SIDE, describe_size
from vit_bridge.runtime import choose_device, choose_precision
from vit_bridge.system import ROOT, Interrupts, commit, machine, new_output_dir, unless_empty, write_json
from vit_bridge.weights.checkpoints import load

__all__ = ["HybridCNNViT", "shipped_setup"]
SHIPPED_MODELS = {"ConvNet": "convnet_shapes", "Hybrid": "hybrid_shapes", "ViT": "vit_nano_shapes"}
DESCRIPTION = """\
Compare a CNN, a ViT and a hybrid of the two; every experiment has a control.

examples:
  python cnn_vs_vit.py                                  compare the shipped models, in a few minutes
  python cnn_vs_vit.py --only position                  run one experiment
  python cnn_vs_vit.py --data-dir photos --minutes 30   find the model that suits your images"""
COMMITTED = ROOT / "benchmarks" / "results"  # trials that come with the project
INTRODUCTION = ("This report compares a ConvNet, a hybrid and a ViT of nearly the same size. Each experiment has a "
                "control: the same model with random weights, uniform attention, a formula, or guessing.")
SHIPPED_NOTE = ("The shipped models learned the drawn shapes with different numbers of training steps. The ConvNet was "
                "trained for 250 steps of 64 images and has a test accuracy of 95.9%. The hybrid has 93.0% after 600 "
                "steps, and the ViT 97.9% after 3,200 steps. Some differences between them may come from this.")


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


@dataclass
class TrialPlan:
    """The trials that --train measures.

    Attributes
    ----------
    trials : list of Trial
        The trials, in the order in which they are measured.
    folder : Path
        The folder for their files.
    recipe : TrialRecipe
        How every model is trained.
    settings, arguments : dict
        By experiment: the settings that its trials share, and further arguments of its measure().
    """

    trials: list
    folder: Path
    recipe: TrialRecipe
    settings: dict
    arguments: dict


def plan_trials(names, folder, options, recipe=RECIPE):
    """Plan the trials of these experiments, and check all inputs before the first measurement.

    Returns
    -------
    TrialPlan

    Raises
    ------
    InputError
        Without test images, for an image size that a model does not accept, and for a file in the folder that was
        measured on other images or with another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # OSError if the folder is not writable
    precision = choose_precision(options.amp, choose_device(options.device))
    few, seeds = (dict(n_images=40, n_test=8), SEEDS[:1]) if options.dry_run else ({}, SEEDS)
    plan = TrialPlan([], folder, recipe, {}, {})
    for name in names:
        images, plan.arguments[name], numbers, dataset = few, few, (None,), ""
        if name == "data":
            loaders = _loaders_of(options)
            images, numbers, dataset = _describe_loaders(loaders, options)
            plan.arguments[name] = dict(loaders=loaders)
        settings = dict(recipe=asdict(recipe), precision=str(precision or torch.float32), images=images)
        plan.settings[name] = json.loads(json.dumps(settings))  # as it comes back from a file
        _check_settings(plan.settings[name], name, dataset, folder)
        plan.trials.extend(Trial(name, kind, number, n_images, dataset)
                           for n_images in numbers for number in seeds for kind in CNN_TO_VIT_MODELS)
    return plan


def _describe_loaders(loaders, options):
    """Return what identifies the images, the numbers of training images, and the data set's name."""
    train_loader, _, test_loader = loaders
    if test_loader is None:
        raise InputError(f"{options.data_dir} has no test images, and the validation images are already used to "
                         f"choose the learning rates; put test images into test/<class>/")
    class_names = list(train_loader.class_names)
    for kind in CNN_TO_VIT_MODELS:
        build_kind(kind, len(class_names), train_loader.img_size)
    images = dict(n_images=train_loader.n_images, img_size=train_loader.img_size, n_test=test_loader.n_images,
                  class_names=class_names, cut=options.seed, content=_checksum(loaders))
    dataset = train_loader.dataset_name if options.data_dir else ""  # "" for the built-in shapes
    dataset = Path(options.data_dir).resolve().name if dataset == "folder" else dataset
    return images, numbers_of_images(options.train_fractions, train_loader.n_images, len(class_names)), dataset


def _checksum(loaders):
    """Return a checksum of the images and labels in MemoryLoaders."""
    total = hashlib.sha256()
    for loader in loaders:
        total.update(loader.images.cpu().numpy().tobytes())
        total.update(loader.labels.cpu().numpy().tobytes())
    return total.hexdigest()


def _check_settings(settings, name, dataset, folder):
    """Raise InputError if the folder holds a trial of the same experiment and data set with other settings."""
    for path in folder.glob(f"{name}-*.json"):
        trial = read_trial(path)
        if trial["result"].get("dataset", "") == dataset and trial.get("setting") != settings:
            raise InputError(f"{path} was measured on other images, in another precision or with another recipe; "
                             f"remove it, or choose another folder with --results-dir")


def run_trials(plan, options):
    """Measure every trial of a plan that has no file yet; return {experiment: [file contents]}.

    For each kind, the trial with the first seed and the most images chooses the learning rate for all others.
    """
    there, n = 0, len(plan.trials)
    print(f"{n} trials of one to three training runs each. Each is saved in {plan.folder} when it ends, and a later "
          f"command continues from there; an interrupted trial starts again.", flush=True)
    again = "the same command with another --output-dir" if options.output_dir else "the same command"
    bar = tqdm(plan.trials, unit="trial", disable=None)
    with Interrupts() as interrupts:
        for trial in bar:
            interrupts.advice = f"{there} of {n} trials are in {plan.folder}; {again} continues with the next one"
            path = trial.path(plan.folder)
            bar.set_description(path.stem)
            if not path.exists():
                try:
                    write_json(_measure_trial(trial, plan, options), path)
                except NotFinite as error:
                    tqdm.write(f"{path.stem} is skipped: {error}")
                    continue
                tqdm.write(f"{path.stem}: saved, {there + 1} of {n}")
            there += 1
    return read_trials(plan.settings, [plan.folder])


def _measure_trial(trial, plan, options):
    """Measure a trial and return the contents of its file, with the keys that all results of the project have."""
    most = max((other.n_images for other in plan.trials if other.n_images), default=None)
    first = replace(trial, seed=SEEDS[0], n_images=trial.n_images and most).path(plan.folder)
    arguments = dict(plan.arguments[trial.experiment], recipe=plan.recipe, device=options.device, amp=options.amp,
                     rates=(read_trial(first)["result"]["rate"],) if first.exists() else RATES)
    if trial.experiment == "data":
        arguments["n_images"] = trial.n_images
    result = TRAINING_EXPERIMENTS[trial.experiment].measure(trial.kind, trial.seed, **arguments)
    result |= dict(dataset=trial.dataset) if trial.experiment == "data" else {}
    device = choose_device(options.device).type
    return dict(table=trial.experiment, commit=commit(), date=time.strftime("%Y-%m-%d"), machine=machine(device),
                versions=dict(torch=torch.__version__, torchvision=torchvision.__version__), seed=trial.seed,
                command=_command_of(trial.experiment, options), setting=plan.settings[trial.experiment],
                result=result | dict(device=device))


def _command_of(name, options):
    """Return the command that measures the trials of this experiment again."""
    words, defaults = ["python", "cnn_vs_vit.py", "--train", "--only", name], vars(make_parser().parse_args([]))
    of_images = ("data_dir", "img_size", "train_fractions", "seed", "skip_corrupt") if name == "data" else ()
    for key in (*of_images, "device", "amp", "dry_run"):
        value, option = getattr(options, key), f"--{key.replace('_', '-')}"
        if value != defaults[key]:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [option, *(f"{one:g}" if isinstance(one, float) else str(one) for one in values)]
    return shlex.join(words)


def show_trials(names, folder, trials):
    """Print and draw TRAINING_EXPERIMENTS from measured trials, with one section per data set.

    Parameters
    ----------
    names : list of str
        Keys of TRAINING_EXPERIMENTS.
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
        experiment = TRAINING_EXPERIMENTS[name]
        if not trials.get(name):
            finding = f"Not measured yet; run python cnn_vs_vit.py --train --only {name}."
            sections.append(Section(experiment.title, experiment.question, finding))
            _publish(sections[-1], folder)
        for dataset, own in by_dataset(trials.get(name, [])).items():
            data = [trial["result"] for trial in own]
            ending = re.sub(r"[^\w-]+", "-", f"_{dataset}" if dataset else "").rstrip("-")  # of file names
            figures = {f"{key}{ending}": figure for key, figure in experiment.draw(data).items()}
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
    expected, weights = _announce(options, candidates, images)
    with Interrupts() as interrupts:
        interrupts.advice = "a comparison needs all training runs, and none of them is saved; use fewer --minutes"
        results = compare_candidates(candidates, images, options.minutes, device=options.device, amp=options.amp,
                                     n_steps=1 if options.dry_run else None)
    controls, guessing = baselines(images.loaders())
    rows, costs = ({name: result[key] for name, result in results.items()} for key in ("rows", "ms"))
    commands = {one.name: one.command(options.data_dir, images.img_size, options.minutes) for one in candidates}
    report_skipped(images.skipped)
    finding = "\n".join([*describe_verdict(rows, guessing), *next_step(rows, costs, commands, guessing),
                         *caveats(results, controls, guessing), *weights])
    shown = results, controls, guessing
    section = Section(TITLE, QUESTION, finding, {"verdict": draw_candidates(*shown)}, [candidate_table(*shown)],
                      expected)
    _publish(section, folder, with_note=False)  # printed before the training
    data = dict(results=results, controls=controls, guessing=guessing, finding=finding, skipped=images.skipped)
    return {"verdict": data}, [section]


def _announce(options, candidates, images):
    """Print what is compared, and which lead can be found; return that line and the lines about unfair weights."""
    train_loader, val_loader, test_loader = images.loaders()
    part, tested = ("validation", val_loader) if test_loader is None else ("test", test_loader)
    if train_loader.dataset_name == "folder":
        print(audit_folder(options.data_dir, seed=options.seed))
    print(f"{train_loader.n_images:,} training images of {len(train_loader.class_names)} classes. "
          f"{len(candidates)} candidates, each with {len(SEEDS)} seeds, share {options.minutes:g} min and are compared "
          f"on {tested.n_images:,} {part} images. New models get images of {describe_size(train_loader.img_size)} "
          f"pixels, trained ones their own size.")
    described = dict.fromkeys(describe_weights(one, train_loader.class_names) for one in candidates if one.weights)
    for origin, _ in described:
        print(origin)
    expected = (f"Expected before any training (assuming an accuracy of 75%, and seeds that differ by 1 point): "
                f"{describe_power(assumed_noise(tested.n_images, len(SEEDS), len(candidates)))}")
    if tested.n_images < MIN_IMAGES:
        expected = (f"{tested.n_images} {part} images are too few to name a winner; at least {MIN_IMAGES} are needed. "
                    f"{_more_images(options.data_dir)}")
    print(expected, flush=True)
    return expected, [unfair for _, unfair in described if unfair]


def _more_images(data_dir):
    """Return advice on where to put more test images."""
    if (Path(data_dir) / "train").is_dir():
        return f"Put more images into {Path(data_dir) / 'test'}/<class>/."
    return f"Move the training images into {Path(data_dir) / 'train'}/<class>/ and put test images into " \
           f"{Path(data_dir) / 'test'}/<class>/."


def _loaders_of(options):
    """Return loaders for the images in --data-dir, or for the built-in shapes; photographs are shrunk."""
    data = dict(data_dir=options.data_dir or "./no-such-folder", img_size=options.img_size, seed=options.seed,
                dataset="auto" if options.data_dir else "shapes", batch_size=RECIPE.batch_size,
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
    wanted = options.only or (["data"] if options.data_dir else [*EXPERIMENTS, *TRAINING_EXPERIMENTS])
    looking = [name for name in EXPERIMENTS if name in wanted]
    training = [name for name in TRAINING_EXPERIMENTS if name in wanted]
    results_dir = folder / "trials" if options.dry_run else Path(options.results_dir)
    if results_dir.exists() and not results_dir.is_dir():
        raise InputError(f"--results-dir {results_dir} is a file; choose the folder in which --train keeps its trials")
    if options.train:
        recipe = replace(RECIPE, n_steps=1, batch_size=8) if options.dry_run else RECIPE
        plan = plan_trials(training, results_dir, options, recipe)
    else:
        trials = read_trials(training, [results_dir, COMMITTED])
    introduction, results, sections = INTRODUCTION, {}, []
    if looking:
        little = dict(n_images=16, seconds=0.01, sizes=(32,), patches=(32,), reach=1) if options.dry_run else {}
        results, sections = run_experiments(shipped_setup(**little), looking, folder)
        introduction += f" {SHIPPED_NOTE}"
    if options.train:
        trials = run_trials(plan, options)
    more_results, more_sections = show_trials(training, folder, trials)
    if not options.train:
        print("\nThese are the shipped models and saved results; they show nothing about other images. To compare on "
              "your own images, use --data-dir DIR --minutes M.")
    return introduction, results | more_results, sections + more_sections


def make_parser():
    parser = OneLineParser(prog="cnn_vs_vit.py", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME",
                        help=f"run only these experiments: {', '.join([*EXPERIMENTS, *TRAINING_EXPERIMENTS])}")
    parser.add_argument("--train", "--full", action="store_true", dest="train",
                        help="also run the experiments that train; this takes hours, and the same command resumes")
    parser.add_argument("--results-dir", "--cells", default="runs/cnn_vs_vit-cells", dest="results_dir",
                        metavar="FOLDER", help="folder in which --train keeps its trials (default: %(default)s)")
    parser.add_argument("--data-dir", metavar="FOLDER", help="your images: a folder with one folder per class, or a "
                                                             "known data set (see train_vit.py)")
    parser.add_argument("--img-size", type=Bounded(int, 8, SMALL_SIDE, f"a whole number from 8 to {SMALL_SIDE}"),
                        metavar="PIXELS", help=f"image side in pixels, at most {SMALL_SIDE} (default: small images "
                                               f"keep their size, photographs get {SMALL_SIDE})")
    parser.add_argument("--minutes", type=positive(), metavar="M", help="with --data-dir: train all candidates on "
                        "these images within this time, and report which is best")
    parser.add_argument("--pretrained", nargs="+", metavar="NAME|PATH", help="with --minutes: trained weights to "
                        "start from, as in train_vit.py; from each ViT a linear probe and a fine-tuning, from each CNN "
                        f"a fine-tuning (default: {' '.join(DEFAULT_WEIGHTS)})")
    parser.add_argument("--train-fractions", "--shares", nargs="+", type=Bounded(float, 1e-6, 1, "above 0 to 1"),
                        default=list(TRAIN_FRACTIONS), dest="train_fractions", metavar="F",
                        help="for the experiment data: fractions of the training images")
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


def main(argv=None):
    options = make_parser().parse_args(argv)
    for name in options.only or ():
        known = (*EXPERIMENTS, *TRAINING_EXPERIMENTS)
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
                         f"model suits these images) or --train (data efficiency)")
    if options.data_dir and options.only and options.only != ["data"]:
        raise InputError(f"--data-dir works with --only data, not with --only {' '.join(options.only)}; remove one of "
                         f"the two")
    if options.data_dir and not Path(options.data_dir).exists():
        raise InputError(f"--data-dir {options.data_dir} does not exist; choose a folder with one folder per class")
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
