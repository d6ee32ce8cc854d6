"""Trainings for the comparison: arms, learning rates chosen on validation images, and trials in files.

    Arm, train_arm      one way to train: a recipe of train_vit.py with changes to its model
    choose_rate         trains with several learning rates; the grid grows while its edge is best
    Trial, read_trials  an arm trained with one seed in an experiment, stored in its own file
    plan_trials         checks all inputs and lists the trials
    run_trials          measures those that have no file yet, in one or several processes

Shapes:  N images, S side of an image in pixels.
"""

import inspect
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torchvision

from train_vit import NotFinite, Trainer, new_model, set_up_loader, trainer_for
from vit_bridge.compare.experiments import Experiment
from vit_bridge.data.augmentation import Augmentation
from vit_bridge.data.datasets import DatasetInfo
from vit_bridge.data.loaders import MemoryLoader
from vit_bridge.errors import InputError
from vit_bridge.models.registry import build_model
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.runtime import choose_device, choose_precision
from vit_bridge.system import Interrupts, commit, machine, write_json
from vit_bridge.training.config import RECIPES

SEEDS = (0, 1, 2)
FREE, RUNNING, DONE, SKIPPED = range(4)  # states of a trial
POLL = 1.0  # seconds between two looks at the other processes
MOST_RATES = 8  # a grid of learning rates that still grows then has no optimum worth looking for


# ---- One training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to train: a recipe of train_vit.py, and what differs from it.

    Attributes
    ----------
    recipe : str
        A key of RECIPES.
    options : dict
        Changes to the recipe's model_options.
    build : callable
        Builds the model from the recipe's name and the options: build_model, or a function like it.
    augmentation : Augmentation, optional
        Used instead of the recipe's.
    first_smaller : bool or tuple
        Whether the first steps use smaller images: True as in the recipe, False never (small images would lose details
        of one pixel), a tuple as in TrainConfig.progressive_resize.
    whiten : bool
        Whether the first layer may start from whitening filters, as in the recipe. Their number depends on the patch.
    """

    recipe: str
    options: dict = field(default_factory=dict)
    build: Callable = build_model
    augmentation: Augmentation | None = None
    first_smaller: bool | tuple = True
    whiten: bool = True

    def own_recipe(self):
        """Return the recipe with the changes."""
        recipe = RECIPES[self.recipe]
        train = recipe.train
        if self.first_smaller is not True:
            train = replace(train, progressive_resize=self.first_smaller or None)
        return replace(recipe, train=train, whiten=recipe.whiten and self.whiten,
                       augmentation=self.augmentation or recipe.augmentation,
                       model_options=recipe.model_options | self.options)


def prepare_arm(arm, loader, seed, device="auto", amp="auto", start=None, objective=None):
    """Return the Trainer of an arm, and set up the loader for it.

    Parameters
    ----------
    arm : Arm
    loader : MemoryLoader
        The training images. It gets the recipe's batch size and augmentation, and the seed.
    seed : int
        Determines new weights, the order and the augmentation.
    device, amp : optional
        As for Trainer.
    start : Module, optional
        A model to train further. None: a new one.
    objective : Objective, optional
        None: the recipe's classification.
    """
    recipe = arm.own_recipe()
    set_up_loader(loader, recipe, seed)
    model = start or new_model(recipe.model, recipe, loader, arm.build, seed)
    return trainer_for(recipe, model, device, objective, amp=amp)


def train_arm(arm, loader, n_steps, learning_rate, seed, **options):
    """Train an arm and return the model; the options are those of prepare_arm."""
    trainer = prepare_arm(arm, loader, seed, **options)
    trainer.train(loader, n_steps=n_steps, learning_rate=learning_rate, seed=seed, progress=False)
    return trainer.model.eval()


def rates_around(arm):
    """Return the recipe's learning rate, half and twice of it: where a grid starts. The recipe's own wins a tie."""
    rate = RECIPES[arm.recipe].train.learning_rate
    return rate, rate / 2, 2 * rate


def choose_rate(train, score, rates):
    """Train once with each learning rate and keep the model with the best score.

    While the best rate is the smallest or the largest one, half or twice this rate is tried, too, up to MOST_RATES.

    Parameters
    ----------
    train : callable
        train(learning_rate) returns a model.
    score : callable
        score(model) returns its validation accuracy.
    rates : tuple of float
        The first rates. A single one is not searched for.

    Returns
    -------
    tuple
        The model, the best rate (the first of several equally good ones), and {rate: score}. A training run that
        diverges has the score 0.

    Raises
    ------
    NotFinite
        If every training run diverges.
    """
    found, best, left = {}, None, list(rates)
    while left:
        rate = left.pop(0)
        try:
            model = train(rate)
            found[rate] = score(model)
            if best is None or found[rate] > found[best[1]]:
                best = model, rate
        except NotFinite:
            found[rate] = 0.0
            if not left and best is None:
                raise
        if not left and len(rates) > 1 and len(found) < MOST_RATES:
            left = [rate for edge, rate in ((min(found), best[1] / 2), (max(found), best[1] * 2)) if best[1] == edge]
    return *best, found


def loader_of(images, labels, class_names):
    """Return a loader of uint8 images (N, 3, S, S) and labels (N,), without augmentation."""
    info = DatasetInfo("drawn", Preprocessing(images.shape[-1], (0.5,) * 3, (0.25,) * 3, class_names=class_names))
    return MemoryLoader(images, labels, info, 64)


def part_of(loader, indices=slice(None), labels=None):
    """Return a new loader of the images at these indices, with these labels instead of their own if given."""
    labels = loader.labels[indices] if labels is None else labels
    return MemoryLoader(loader.images[indices], labels, loader.info, loader.batch_size)


def draw_indices(loader, n_images, seed):
    """Return n_images indices of a loader's images, in ascending order, drawn by the seed."""
    loader.seed = seed
    return loader.subset(n_images)


def count_correct(model, loader, device="auto"):
    """Return how many images of a loader a model classifies correctly, in float32, and how many there are."""
    found = Trainer(model, device, amp="off").evaluate(loader)
    return found["correct"], found["n"]


def scorer(loader, device="auto", **_):
    """Return a function that returns the accuracy of a model on a loader."""
    def score(model):
        correct, n = count_correct(model, loader, device)
        return correct / n

    return score


class TrainedExperiment(Experiment):
    """An experiment that trains: measure() returns the result of one trial, and the other methods take a list of them.

    Attributes
    ----------
    arms : dict
        {name: Arm}, in the order of tables and figures.
    on_images : bool
        Whether it uses a data set, with several numbers of training images.
    keys : tuple of str
        What its figures and tables need of a result, besides arm and seed.
    needs_speeds : bool
        Whether its trainings have equal minutes. It then has measure_speeds(images, device=, amp=), whose result
        measure() gets as `speeds`.
    fixed_numbers : bool
        Whether all trials in a folder must have the numbers of images of one plan, because it compares them.
    """

    arms: dict
    keys: tuple
    on_images = False
    needs_speeds = False
    fixed_numbers = False

    def plan(self, numbers):
        """Return (arm, number of images or None) of all trials, each after those whose choices it uses."""
        return [(arm, number) for number in (numbers if self.on_images else (None,)) for arm in self.arms]

    def check(self, trials):
        """Raise InputError for a result of an unknown arm, or one that lacks one of the keys."""
        for trial in trials:
            missing = [key for key in self.keys if key not in trial]
            if missing or trial["arm"] not in self.arms:
                reason = f"has no {missing[0]}" if missing else "is of an unknown network"
                raise InputError(f"the trial of {trial['arm']!r} with seed {trial['seed']} in {self.title!r} {reason}, "
                                 f"so it is from another version; remove it, or choose another folder with "
                                 f"--results-dir")

    def owners(self, trial, numbers):
        """Return the trials whose choices a trial uses, by name; {} if it chooses itself, as that of the first seed."""
        first = replace(trial, seed=SEEDS[0])
        return {} if trial == first else dict(rate=first)

    def train(self, trial, chosen, loader, val_loader, n_steps, look=None, **run):
        """Train an arm on a loader; return choose_rate()'s result, or that of the rate which is chosen already.

        look(rate, model), if given, sees every trained model.
        """
        arm = self.arms[trial.arm]

        def train(rate):
            model = train_arm(arm, part_of(loader), n_steps, rate, trial.seed, **run)
            if look is not None:
                look(rate, model)
            return model

        return choose_rate(train, scorer(val_loader, **run),
                           (chosen["rate"]["learning_rate"],) if chosen else rates_around(arm))


# ---- Trials and their files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """An arm trained with one seed in an experiment.

    `n_images` and `dataset` belong to experiments on a data set; `dataset` is "" for the built-in shapes.
    """

    experiment: str
    arm: str
    seed: int
    n_images: int | None = None
    dataset: str = ""

    def path(self, folder):
        """Return the path of the trial's file."""
        arm = self.arm.replace(", ", "-").replace(" ", "-")
        words = [self.experiment, self.dataset, arm, self.n_images and str(self.n_images), str(self.seed)]
        return folder / ("-".join(filter(None, words)) + ".json")


def read_trials(names, folders):
    """Read the trials of these experiments: {experiment: [file contents]}.

    All trials of an experiment and data set come from one folder: the folder with the most trials, or the first of
    several with equally many. Raises InputError for a file that holds no trial, and for two files with the same one.
    """
    trials = {}
    for name in names:
        groups = {}
        for folder in folders:
            paths, found = {}, []
            for path in sorted(folder.glob(f"{name}-*.json")):
                found.append(read_trial(path))
                which = tuple(found[-1]["result"].get(key) for key in ("dataset", "arm", "n_images", "seed"))
                if paths.setdefault(which, path) != path:
                    raise InputError(f"{paths[which]} and {path.name} hold the same trial; remove one of them")
            for dataset, own in by_dataset(found).items():
                groups[dataset] = max(groups.get(dataset, []), own, key=len)
        trials[name] = [trial for own in groups.values() for trial in own]
    return trials


def read_trial(path):
    """Read and check a trial's file; raise InputError if it holds no trial."""
    try:
        trial = json.loads(path.read_text(encoding="utf-8"))
        result = trial["result"]
        if not all(isinstance(value, str) for value in (trial["date"], trial["command"], result["arm"],
                                                        result.get("dataset", ""))):
            raise TypeError("date, command, arm and dataset must be strings")
        if not isinstance(result["learning_rate"], float):
            raise TypeError("the learning rate is not a float")
        counts = [result["seed"], *(result[key] for key in ("n", "n_images", "n_steps") if key in result),
                  *_counts(result.get("correct", 0)), *_counts(result.get("choices", 0))]
        if not all(type(count) is int and count >= 0 for count in counts) or result.get("n") == 0:
            raise ValueError(f"{counts} are not all numbers of images")
        if "n" in result and max(_counts(result.get("correct", 0))) > result["n"]:
            raise ValueError(f"more correct predictions than the {result['n']} images")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a result of cnn_vs_vit.py --train ({type(error).__name__}); remove it, or "
                         f"choose another folder with --results-dir") from error
    return trial


def _counts(value):
    """Return the numbers in a result: itself, or those of a list or a dict."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]


def by_dataset(trials):
    """Group file contents by data set; "" stands for the built-in shapes."""
    groups = {}
    for trial in trials:
        groups.setdefault(trial["result"].get("dataset", ""), []).append(trial)
    return groups


def by_arm(trials, order):
    """Group results by arm, in this order of names; raise InputError if there are none."""
    if not trials:
        raise InputError("there are no trials yet; run python cnn_vs_vit.py --train")
    return {arm: own for arm in order if (own := [trial for trial in trials if trial["arm"] == arm])}


# ---- Measuring trials ---------------------------------------------------------------------------------------


@dataclass
class TrialPlan:
    """Trials to measure, and all that their measurement needs.

    Attributes
    ----------
    experiments : dict
        {name: TrainedExperiment}.
    trials : list of Trial
        In the order in which they are measured.
    folder : Path
        The folder for their files.
    numbers : list of int
        Numbers of training images of the experiments on a data set, in ascending order.
    loaders : tuple or None
        Their training, validation and test images.
    arguments : dict
        By experiment: further arguments of measure().
    settings : dict
        By experiment: what its trials have in common, and the recipe of each arm. See setting_of().
    commands : dict
        By experiment: the command that measures its trials.
    run : dict
        `device` and `amp`, as for Trainer.
    speeds : dict
        {experiment: the result of its measure_speeds()}, for experiments with equal minutes.
    """

    experiments: dict
    trials: list
    folder: Path
    numbers: list
    loaders: tuple | None
    arguments: dict
    settings: dict
    commands: dict
    run: dict
    speeds: dict = field(default_factory=dict)

    def owners(self, trial):
        """Return the trials whose choices a trial uses, by name."""
        return self.experiments[trial.experiment].owners(trial, self.numbers)

    def setting_of(self, experiment, arm):
        """Return what must be the same for the trials of an arm; those with another setting cannot be mixed."""
        settings = dict(self.settings[experiment])
        return dict(recipe=settings.pop("recipes").get(arm), **settings)

    def measure(self, trial):
        """Measure a trial and write its file."""
        experiment, arguments = self.experiments[trial.experiment], dict(self.arguments[trial.experiment])
        chosen = {name: read_trial(owner.path(self.folder))["result"] for name, owner in self.owners(trial).items()}
        if experiment.on_images:
            arguments["loaders"] = self.loaders
        if experiment.needs_speeds:
            arguments["speeds"] = self.speeds[trial.experiment]
        started = time.perf_counter()
        result = experiment.measure(trial, chosen=chosen, **arguments, **self.run)
        device = choose_device(self.run["device"]).type
        result |= dict(device=device, threads=torch.get_num_threads(),
                       seconds=round(time.perf_counter() - started, 1))
        result |= dict(dataset=trial.dataset) if experiment.on_images else {}
        write_json(cell(trial.experiment, trial.seed, self.commands[trial.experiment], result)
                   | dict(setting=self.setting_of(trial.experiment, trial.arm)), trial.path(self.folder))


def cell(table, seed, command, result):
    """Return the contents of a file of results: the result and its origin."""
    return dict(table=table, commit=commit(), date=time.strftime("%Y-%m-%d"), machine=machine(result["device"]),
                versions=dict(torch=torch.__version__, torchvision=torchvision.__version__), seed=seed,
                command=command, result=result)


def plan_trials(experiments, folder, run, commands, images=None, little=None):
    """Plan the trials of these experiments, and check all inputs before the first measurement.

    Parameters
    ----------
    experiments : dict
        {name: TrainedExperiment}.
    folder : Path
        The folder for their files.
    run : dict
        `device` and `amp`, as for Trainer.
    commands : dict
        {experiment: the command that measures its trials}.
    images : tuple, optional
        (loaders, numbers of training images, name of the data set, what identifies the images), for experiments on a
        data set.
    little : dict, optional
        {experiment: arguments of measure()} for a dry run with the first seed only.

    Returns
    -------
    TrialPlan

    Raises
    ------
    InputError
        For an image size that a model does not accept, and for a file in the folder that was measured on other images
        or with other recipes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # OSError if the folder is not writable
    loaders, numbers, dataset, facts = images or (None, [], "", {})
    plan = TrialPlan(experiments, [], folder, sorted(numbers), loaders, little or {name: {} for name in experiments},
                     {}, commands, run)
    precision = str(choose_precision(run["amp"], choose_device(run["device"])) or torch.float32)
    for name, experiment in experiments.items():
        recipes = {arm: made.own_recipe() for arm, made in experiment.arms.items()}
        if experiment.on_images:
            for arm, recipe in recipes.items():
                experiment.arms[arm].build(recipe.model, n_classes=len(loaders[0].class_names),
                                           img_size=loaders[0].img_size, **recipe.model_options)
        plan.settings[name] = json.loads(json.dumps(dict(
            recipes={arm: f"{recipe.model}, {recipe.describe()}" for arm, recipe in recipes.items()},
            precision=precision, arguments=_defaults(experiment.measure) | plan.arguments[name],
            images=facts if experiment.on_images else None)))
        own = dataset if experiment.on_images else ""
        _check_settings(plan, name, own)
        plan.trials.extend(Trial(name, arm, seed, number, own) for seed in (SEEDS[:1] if little else SEEDS)
                           for arm, number in experiment.plan(plan.numbers))
    return plan


def _defaults(function):
    """Return the default values of a function's arguments: {name: value}."""
    return {name: one.default for name, one in inspect.signature(function).parameters.items()
            if one.default is not one.empty}


def _check_settings(plan, name, dataset):
    """Raise InputError if the folder holds a trial of the same experiment and data set with another setting."""
    numbers = {number for _, number in plan.experiments[name].plan(plan.numbers)}
    for path in plan.folder.glob(f"{name}-*.json"):
        trial = read_trial(path)
        result = trial["result"]
        if result.get("dataset", "") != dataset:
            continue
        if plan.experiments[name].fixed_numbers and result.get("n_images") not in numbers:
            raise InputError(f"{path} has {result.get('n_images')} training images, but --train-fractions gives "
                             f"{' and '.join(f'{number:,}' for number in sorted(numbers))}; use the fractions of the "
                             f"first command, or choose another folder with --results-dir")
        if trial.get("setting") != plan.setting_of(name, result["arm"]):
            raise InputError(f"{path} was measured on other images, in another precision, or with other recipes or "
                             f"numbers of steps; remove it, or choose another folder with --results-dir")


def run_trials(plan, jobs=1, again="the same command"):
    """Measure every trial of a plan that has no file yet; return {experiment: [file contents]}.

    With several jobs, each is a process with its share of the CPU's cores. `again` says how to continue after an
    interruption.
    """
    plan.speeds = {name: _speeds_of(name, plan) for name, one in plan.experiments.items() if one.needs_speeds}
    states = torch.multiprocessing.get_context("spawn").Array("b", [
        DONE if trial.path(plan.folder).exists() else FREE for trial in plan.trials])
    n = len(plan.trials)
    print(f"{n} trials, {sum(state == DONE for state in states)} of them measured. Each is saved in {plan.folder} when "
          f"it ends, and a later command continues from there; an interrupted trial starts again.", flush=True)
    with Interrupts() as interrupts:
        if jobs == 1:
            _work(plan, states, 0, interrupts, again)
        else:
            context = torch.multiprocessing.get_context("spawn")
            threads = max(1, torch.get_num_threads() // jobs)
            processes = [context.Process(target=_work, args=(plan, states, threads), daemon=True) for _ in range(jobs)]
            with ThreadPoolExecutor(jobs) as pool:  # start() waits until the new process has imported torch
                list(pool.map(torch.multiprocessing.Process.start, processes))
            failed = 0
            while not failed and any(process.is_alive() for process in processes):
                interrupts.advice = _advice(plan, states, again)
                processes[0].join(POLL)
                time.sleep(0 if processes[0].is_alive() else POLL)
                failed = next((process.exitcode for process in processes if process.exitcode), 0)
            if failed:
                for process in processes:  # the others might wait for its trial
                    process.terminate()
                raise InputError(f"{_why(failed)}. {_advice(plan, states, again)}")
    if FREE in states[:]:
        print(f"{states[:].count(FREE)} more trials are not measured, because they need the choices of a skipped one",
              flush=True)
    return read_trials(plan.experiments, [plan.folder])


def _why(exit_code):
    """Return why a process that trains ended."""
    if exit_code > 0:
        return "a process could not go on, for the reason above"
    return f"a process was ended by signal {-exit_code}, perhaps for lack of memory; use fewer --jobs"


def _advice(plan, states, again):
    done = sum(state == DONE for state in states)
    return f"{done} of {len(states)} trials are in {plan.folder}; {again} continues with the next one"


def _work(plan, states, threads=0, interrupts=None, again=""):
    """Measure trials until none is left that can be measured; 0 threads leave torch's setting."""
    if threads:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    places = {trial: i for i, trial in enumerate(plan.trials)}
    while True:
        if interrupts:
            interrupts.advice = _advice(plan, states, again)
        with states.get_lock():
            i = next((i for i, trial in enumerate(plan.trials) if states[i] == FREE and all(
                states[places[owner]] == DONE for owner in plan.owners(trial).values())), None)
            if i is not None:
                states[i] = RUNNING
            elif all(state != RUNNING for state in states):
                return
        if i is None:
            time.sleep(POLL)  # another process measures what the next trial needs
            continue
        trial, started = plan.trials[i], time.perf_counter()
        name = trial.path(plan.folder).stem
        try:
            plan.measure(trial)
            states[i] = DONE
            print(f"{name}: saved after {time.perf_counter() - started:.0f} s, {sum(s == DONE for s in states)} of "
                  f"{len(states)}", flush=True)
        except NotFinite as error:
            states[i] = SKIPPED
            print(f"{name} is skipped: {error}", flush=True)
        except (InputError, OSError) as error:
            if not threads:
                raise
            print(f"{name}: {error}", flush=True)
            sys.exit(2)  # the parent ends the others


def _speeds_of(name, plan):
    """Return the speeds of an experiment's networks: those measured before on these images, or new ones."""
    dataset = next(trial.dataset for trial in plan.trials if trial.experiment == name)
    path = plan.folder / f"speeds-{'-'.join(filter(None, (name, dataset)))}.json"
    setting = {key: value for key, value in plan.settings[name].items() if key != "arguments"}
    if not path.exists():
        own = (trial.path(plan.folder) for trial in plan.trials if trial.experiment == name)
        if trained := next((one for one in own if one.exists()), None):
            raise InputError(f"{path} is missing, but {trained.name} was trained with its speeds; put it back, or "
                             f"choose another folder with --results-dir")
        print("Measuring the speed of each network, which should be alone on the machine ...", flush=True)
        short = dict(rounds=1, seconds=0) if plan.arguments[name] else {}  # in a dry run
        speeds = plan.experiments[name].measure_speeds(plan.loaders[0], **short, **plan.run)
        device = choose_device(plan.run["device"]).type
        write_json(cell("speeds", 0, plan.commands[name], dict(speeds=speeds, device=device,
                                                               threads=torch.get_num_threads()))
                   | dict(setting=setting), path)
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        speeds = measured["result"]["speeds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no speeds ({type(error).__name__}); remove it to measure them again") from error
    if measured.get("setting") != setting:
        raise InputError(f"{path} was measured on other images, in another precision, or with other recipes; remove it "
                         f"to measure again, with the trials that depend on it")
    return speeds
