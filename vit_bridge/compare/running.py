"""Measure the trials of the experiments that train, in one or several processes, and keep each in its own file.

    plan_trials   checks all inputs and lists the trials
    run_trials    measures those that have no file yet
"""

import json
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision

from train_vit import NotFinite
from vit_bridge.compare.ladder import measure_speeds
from vit_bridge.compare.trained import TRAINED
from vit_bridge.compare.trials import SEEDS, Trial, read_trial, read_trials
from vit_bridge.errors import InputError
from vit_bridge.runtime import choose_device, choose_precision
from vit_bridge.system import Interrupts, commit, machine, write_json

FREE, RUNNING, DONE, SKIPPED = range(4)  # states of a trial
POLL = 1.0  # seconds between two looks at the other processes


@dataclass
class TrialPlan:
    """Trials to measure, and all that their measurement needs.

    Attributes
    ----------
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
        By experiment: what its trials have in common. Trials with other settings cannot be mixed with them.
    commands : dict
        By experiment: the command that measures its trials.
    run : dict
        `device` and `amp`, as for Trainer.
    speeds : dict
        The result of measure_speeds(), if the ladder is among the experiments.
    """

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
        return TRAINED[trial.experiment].owners(trial, self.numbers)

    def measure(self, trial):
        """Measure a trial and write its file."""
        experiment, arguments = TRAINED[trial.experiment], dict(self.arguments[trial.experiment])
        chosen = {name: read_trial(owner.path(self.folder))["result"] for name, owner in self.owners(trial).items()}
        if experiment.on_images:
            arguments["loaders"] = self.loaders
        if experiment.needs_speeds:
            arguments["speeds"] = self.speeds
        started = time.perf_counter()
        result = experiment.measure(trial, chosen=chosen, **arguments, **self.run)
        device = choose_device(self.run["device"]).type
        result |= dict(device=device, threads=torch.get_num_threads(),
                       seconds=round(time.perf_counter() - started, 1))
        result |= dict(dataset=trial.dataset) if experiment.on_images else {}
        write_json(cell(trial.experiment, trial.seed, self.commands[trial.experiment], result)
                   | dict(setting=self.settings[trial.experiment]), trial.path(self.folder))


def cell(table, seed, command, result):
    """Return the contents of a file of results: the result and its origin."""
    return dict(table=table, commit=commit(), date=time.strftime("%Y-%m-%d"), machine=machine(result["device"]),
                versions=dict(torch=torch.__version__, torchvision=torchvision.__version__), seed=seed,
                command=command, result=result)


def plan_trials(names, folder, run, commands, images=None, little=None):
    """Plan the trials of these experiments, and check all inputs before the first measurement.

    Parameters
    ----------
    names : list of str
        Keys of TRAINED.
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
    plan = TrialPlan([], folder, sorted(numbers), loaders, little or {name: {} for name in names}, {}, commands, run)
    precision = str(choose_precision(run["amp"], choose_device(run["device"])) or torch.float32)
    for name in names:
        experiment = TRAINED[name]
        recipes = {arm: made.own_recipe() for arm, made in experiment.arms.items()}
        if experiment.on_images:
            for arm, recipe in recipes.items():
                experiment.arms[arm].build(recipe.model, n_classes=len(loaders[0].class_names),
                                           img_size=loaders[0].img_size, **recipe.model_options)
        plan.settings[name] = json.loads(json.dumps(dict(
            recipes={arm: f"{recipe.model}, {recipe.describe()}" for arm, recipe in recipes.items()},
            precision=precision, arguments=plan.arguments[name], images=facts if experiment.on_images else None)))
        own = dataset if experiment.on_images else ""
        _check_settings(plan.settings[name], name, own, folder)
        plan.trials.extend(Trial(name, arm, seed, number, own) for seed in (SEEDS[:1] if little else SEEDS)
                           for arm, number in experiment.plan(plan.numbers))
    return plan


def _check_settings(settings, name, dataset, folder):
    """Raise InputError if the folder holds a trial of the same experiment and data set with other settings."""
    for path in folder.glob(f"{name}-*.json"):
        trial = read_trial(path)
        if trial["result"].get("dataset", "") == dataset and trial.get("setting") != settings:
            raise InputError(f"{path} was measured on other images, in another precision or with other recipes; "
                             f"remove it, or choose another folder with --results-dir")


def run_trials(plan, jobs=1, again="the same command"):
    """Measure every trial of a plan that has no file yet; return {experiment: [file contents]}.

    With several jobs, each is a process with its share of the CPU's cores. `again` says how to continue after an
    interruption.
    """
    names = list(plan.settings)
    if any(TRAINED[name].needs_speeds for name in names):
        plan.speeds = _speeds_of(plan)
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
            for process in processes:
                process.start()
            while any(process.is_alive() for process in processes):
                interrupts.advice = _advice(plan, states, again)
                processes[0].join(POLL)
                time.sleep(0 if processes[0].is_alive() else POLL)
    return read_trials(names, [plan.folder])


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


def _speeds_of(plan):
    """Return the speeds of the ladder's networks: those measured before on these images, or new ones."""
    dataset = next(trial.dataset for trial in plan.trials if TRAINED[trial.experiment].needs_speeds)
    path = plan.folder / f"speeds-{'-'.join(filter(None, ('ladder', dataset)))}.json"
    if not path.exists():
        print("Measuring the speed of each network, which should be alone on the machine ...", flush=True)
        speeds = measure_speeds(plan.loaders[0], **plan.run)
        device = choose_device(plan.run["device"]).type
        write_json(cell("speeds", 0, plan.commands["ladder"], dict(speeds=speeds, device=device,
                                                                   threads=torch.get_num_threads())), path)
    return json.loads(path.read_text(encoding="utf-8"))["result"]["speeds"]
