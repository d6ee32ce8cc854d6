"""Learning without labels on CIFAR-10 (JPEG): MAE and BEiT, then 1, 10 and 100% of the labels, beside their controls.

    python benchmarks/pretraining.py --data-dir CIFAR speeds     measures the speed of each kind, on an idle machine
    python benchmarks/pretraining.py --data-dir CIFAR run        trains every cell that has no result yet
    python benchmarks/pretraining.py --data-dir CIFAR plan       prints the cells and their minutes
    python benchmarks/pretraining.py --data-dir CIFAR ship       keeps the weights of SHIPPED for load(name)
"""

import argparse
import copy
import json
import multiprocessing
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import family
import torch
import torch.nn.functional as F
from results import HERE, band, write_cell

from train_vit import TOKENIZED, first_images, new_model, trainer_for
from vit_bridge.analysis.metrics import wilson_interval
from vit_bridge.data.loaders import MemoryLoader, get_data_loaders, get_test_loader
from vit_bridge.models.beit import block_mask
from vit_bridge.models.protocol import ask
from vit_bridge.plots.charts import finish, looks_of, new_figure, set_heading
from vit_bridge.runtime import unwrapped
from vit_bridge.training.config import RECIPES
from vit_bridge.training.linear_probe import feature_loaders
from vit_bridge.training.objectives import Distillation, MaskedPixels, MaskedTokens
from vit_bridge.training.tokenizer import PatchTokenizer, TeacherFeatures
from vit_bridge.weights.checkpoints import load, save_model
from vit_bridge.weights.heads import fit_head
from vit_bridge.weights.pretrained import OURS_FOLDER

SEEDS = (0, 1, 2)
FIRST = ("MAE", "MAE, plain pixels")  # trained before all others
AMP = "bf16"  # 2.5 to 2.9 times as fast as float32 on a CPU with AVX512-BF16
PRETRAINING = 10  # minutes without labels
MINUTES = {450: 1, 4_500: 2, 45_000: 5}  # number of labels: minutes of training with them
RATES = (5e-4, 1e-3, 2e-3)
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)  # penalties of the linear probe
ROUNDS, ROUND_SECONDS = 6, 1.5
SHIPPED = {"mae_nano_cifar10": "MAE, plain pixels"}


@dataclass(frozen=True)
class Start:
    """One way to learn without labels: a recipe, changes to the model, masks, and the start whose features BEiT names.

    rate: the learning rate, or None for the recipe's. speed_of: the start whose speed it has.
    """

    recipe: str = "mae_nano_fast"
    options: tuple = ()
    rate: float | None = None
    blocks: bool = False
    teacher: str | None = None
    seeds: tuple = SEEDS[:1]
    speed_of: str | None = None


@dataclass(frozen=True)
class Arm:
    """One way to use labels.

    start: the pre-trained model that it starts from, or None for new weights. added: minutes beyond MINUTES. teacher:
    the arm whose model, trained with the same labels, labels the other images. rate_of, speed_of: the arm whose
    learning rate and speed it has.
    """

    recipe: str = "vit_nano_fast"
    start: str | None = None
    added: float = 0
    teacher: str | None = None
    rate_of: str | None = None
    speed_of: str | None = None
    labels: tuple = tuple(MINUTES)
    seeds: tuple = SEEDS


STARTS = {
    "MAE": Start(seeds=SEEDS),
    "MAE, learning rate 1e-3": Start(rate=1e-3, speed_of="MAE"),
    "MAE, learning rate 4e-3": Start(rate=4e-3, speed_of="MAE"),
    "MAE, plain pixels": Start(options=(("norm_pix_loss", False),), speed_of="MAE"),
    "MAE, 50% hidden": Start(options=(("mask_ratio", 0.5),)),
    "MAE, 90% hidden": Start(options=(("mask_ratio", 0.9),)),
    "MAE, 40% hidden in blocks": Start(options=(("mask_ratio", 0.4),), blocks=True),
    "BEiT, tokens of pixels": Start("beit_nano_fast"),
    "BEiT, tokens of MAE's features": Start("beit_nano_fast", teacher="MAE"),
}
ARMS = {
    "MAE, fine-tuned": Arm(start="MAE"),
    "ViT": Arm(),
    "ViT, 10 minutes more": Arm(added=PRETRAINING, rate_of="ViT", speed_of="ViT"),
    "hybrid": Arm("hybrid_fast", labels=(450, 4_500)),
    "ViT taught by the hybrid": Arm(teacher="hybrid", rate_of="ViT", labels=(450, 4_500)),
} | {f"{name}, fine-tuned": Arm("beit_nano_fast" if name.startswith("BEiT") else "vit_nano_fast", name,
                                rate_of="MAE, fine-tuned", labels=(4_500,), seeds=SEEDS[:1],
                                speed_of=None if name == "BEiT, tokens of pixels" else
                                "BEiT, tokens of pixels, fine-tuned" if name.startswith("BEiT") else "MAE, fine-tuned")
     for name, start in STARTS.items() if name != "MAE" and not start.rate}


# ---- Models, images and objectives ------------------------------------------------------------------------


class BlockMaskedPixels(MaskedPixels):
    """MaskedPixels with BEiT's block masks."""

    def forward(self, model, batch, metrics=None):
        """Return the mean loss of a batch whose first entry is the images."""
        images, first = batch[0], 0 if metrics is None else metrics.n
        grid = tuple(side // patch for side, patch in zip(images.shape[2:], self.patch_size, strict=True))
        n_patches = grid[0] * grid[1]
        n_hidden = n_patches - int(n_patches * (1 - self.ratio))  # as in random_masking
        masks = [block_mask(grid, n_hidden, None if self.training else torch.Generator().manual_seed(first + i))
                 for i in range(len(images))]
        loss, _, _ = model(images, torch.stack(masks).flatten(1).float().to(images.device))
        if metrics is not None:
            metrics.update(len(images), loss=loss)
        return loss

    def check_model(self, model):
        """Raise InputError if the model does not hide patches."""
        super().check_model(model)
        self.ratio = unwrapped(model).config.mask_ratio


def labelled(labels, n_labels, seed):
    """Return the places of n_labels images drawn by the seed, equally many of each class."""
    order, n_classes = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)), len(labels.unique())
    return torch.cat([order[labels[order] == label][:n_labels // n_classes] for label in range(n_classes)])


def tuned(name, rate, options=()):
    """Return a recipe with changes to its model, and with this learning rate if it is not None."""
    recipe = RECIPES[name]
    return replace(recipe, train=replace(recipe.train, learning_rate=rate or recipe.train.learning_rate),
                   model_options=recipe.model_options | dict(options))


def prepare_start(name, loader, seed, device="cpu", teacher=None):
    """Return (recipe, trainer, loader) of a training without labels; BEiT may name tokens of a teacher's features."""
    start = STARTS[name]
    recipe = tuned(start.recipe, start.rate, start.options)
    loader = MemoryLoader(loader.images, loader.labels, replace(loader.info, preprocessing=replace(
        loader.preprocessing, class_names=None)), recipe.batch_size, seed, True, augmentation=recipe.augmentation)
    model = new_model(recipe.model, recipe, loader, seed=seed)
    objective = BlockMaskedPixels() if start.blocks else MaskedPixels()
    if ask(model, "n_tokens"):
        features = TeacherFeatures(teacher.encoder(), loader.preprocessing) if start.teacher else None
        tokenizer = PatchTokenizer(model.n_tokens, model.config.patch_size, features=features)
        objective = MaskedTokens(tokenizer.fit(first_images(loader.without_augmentation(TOKENIZED), TOKENIZED)))
    return recipe, trainer_for(recipe, model, device, objective, amp=AMP), loader


def prepare_arm(name, loader, n_labels, seed, rate, device="cpu", source=None):
    """Return (recipe, trainer, loader) of a training with labels.

    source: the pre-trained model of the arm's start, or the teacher that labels the other images.
    """
    arm, recipe, places = ARMS[name], tuned(ARMS[name].recipe, rate), labelled(loader.labels, n_labels, seed)
    images, labels, objective = loader.images[places], loader.labels[places], None
    if arm.teacher:
        images, labels = loader.images, predicted(source, loader, device).index_copy(0, places, labels)
        objective = Distillation(source, loader.preprocessing, "hard", label_smoothing=recipe.label_smoothing)
    train = MemoryLoader(images, labels, loader.info, recipe.batch_size, seed, True, augmentation=recipe.augmentation)
    if arm.start:
        model = source.encoder()
        fit_head(model, loader.class_names)
    else:
        model = new_model(recipe.model, recipe, train, seed=seed)
    return recipe, trainer_for(recipe, model, device, objective, amp=AMP), train


@torch.no_grad()
def predicted(model, loader, device):
    """Return the classes that a model predicts for all images of a loader."""
    model = model.to(device).eval()
    return torch.cat([model(images.to(device)).argmax(dim=1).cpu() for images, _ in loader.without_augmentation()])


# ---- The linear probe -------------------------------------------------------------------------------------


def probe(encoder, loaders, seed, device):
    """Return {number of labels: result} of a linear classifier on frozen features; `loaders` may lack the test images.

    It is logistic regression on standardised features; its penalty is the best of DECAYS on the validation images.
    """
    fit_head(encoder, loaders[0].class_names)
    sets = [(made.features[:, 0], made.labels) for made in feature_loaders(encoder, loaders, device)]
    mean, std = sets[0][0].mean(dim=0), sets[0][0].std(dim=0) + 1e-6
    (x, y), val, *tests = (((one - mean) / std, labels) for one, labels in sets)
    found = {}
    for n_labels in MINUTES:
        part = labelled(y, n_labels, seed)
        heads = {decay: logistic_regression(x[part], y[part], decay) for decay in DECAYS}
        correct = {decay: n_correct(head, *val) for decay, head in heads.items()}
        decay = max(correct, key=correct.get)
        result = found[str(n_labels)] = dict(decay=decay, val_accs={
            str(each): value / len(val[1]) for each, value in correct.items()})
        for test in tests:
            tested, n = n_correct(heads[decay], *test), len(test[1])
            result |= dict(test_acc=tested / n, test_correct=tested, test_n=n,
                           test_interval=wilson_interval(tested, n))
    return found


def logistic_regression(x, y, decay):
    """Return the linear layer with the smallest mean cross-entropy plus decay / 2 times its squared weights."""
    head = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(head(x), y) + decay / 2 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head


@torch.no_grad()
def n_correct(head, x, y):
    """Return how many predictions are right."""
    return int((head(x).argmax(dim=1) == y).sum())


# ---- Speeds -----------------------------------------------------------------------------------------------


def measure_speeds(loader):
    """Return {start or arm: images per second}: medians over rounds in which all take turns.

    They are scaled so that the ViT's is the one that family.py measured on an equal machine. Teachers and pre-trained
    models are not trained, which does not change the speed.
    """
    ready = {}
    for name, start in STARTS.items():
        if not start.speed_of:
            teacher = ready[start.teacher][1].model if start.teacher else None
            ready[name] = prepare_start(name, loader, 0, teacher=teacher)
    for name, arm in ARMS.items():
        if not arm.speed_of:
            source = ready[arm.start or arm.teacher][1].model if arm.start or arm.teacher else None
            source = copy.deepcopy(source)
            if arm.teacher:
                source.preprocessing = loader.preprocessing
            ready[name] = prepare_arm(name, loader, 45_000, 0, 1e-6, source=source)
    speeds = {name: [] for name in ready}
    for i in range(ROUNDS + 1):
        for name, (recipe, trainer, own) in ready.items():
            wanted = 0 if i == 0 else ROUND_SECONDS * speeds[name][0] / recipe.batch_size
            n_steps = 5 * max(1, round(wanted / 5))  # three steps out of five may use smaller images
            speeds[name].append(trainer.train(own, n_steps=n_steps, progress=False)["images_per_second"][0])
    medians = {name: statistics.median(values[1:]) for name, values in speeds.items()}
    return {name: round(value * family.speed_of("ViT") / medians["ViT"], 1) for name, value in medians.items()}


def speed_of(name):
    """Return the measured images per second of a start or an arm."""
    speeds = json.loads((HERE / "results" / "pretraining-speeds-cpu.json").read_text())["result"]["speeds"]
    return speeds[(STARTS | ARMS)[name].speed_of or name]


# ---- Cells ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One training: of a start, without labels, or of an arm."""

    name: str
    seed: int
    n_labels: int = 0
    rate: float = 0

    @property
    def path(self):
        """The file of its result."""
        words = [self.name.replace(", ", "-").replace(" ", "-").replace("%", "").replace("'", "")]
        words += [str(self.n_labels), f"{self.rate:g}"] * bool(self.n_labels)
        return HERE / "results" / f"pretraining-{'-'.join(words)}-{self.seed}.json"

    @property
    def minutes(self):
        """Minutes of training on two cores; for a student, those in which it would have learned without labels."""
        if not self.n_labels or ARMS[self.name].teacher:
            return PRETRAINING
        return MINUTES[self.n_labels] + ARMS[self.name].added

    @property
    def total_minutes(self):
        """Minutes, with those of the model that it needs."""
        return self.minutes + (self.source.total_minutes if self.source else 0)

    @property
    def result(self):
        """Its result, or None."""
        return json.loads(self.path.read_text())["result"] if self.path.exists() else None

    @property
    def source(self):
        """The cell whose model it needs, or None."""
        if not self.n_labels:
            return Cell(STARTS[self.name].teacher, self.seed) if STARTS[self.name].teacher else None
        arm = ARMS[self.name]
        if arm.teacher:
            return Cell(arm.teacher, self.seed, self.n_labels, search(arm.teacher, self.n_labels)[0] or 0)
        return Cell(arm.start, self.seed) if arm.start else None


def search(name, n_labels):
    """Return (the learning rate of an arm for a number of labels, or None; the rates that seed 0 still has to try).

    The grid grows beyond its edge for as long as the edge has the best validation accuracy. The ViT with all labels has
    the rate that family.py found, and so has a student, which sees all images.
    """
    rates, owner = list(RATES), ARMS[name].rate_of or name
    n_labels = 45_000 if ARMS[name].teacher else n_labels
    if (owner, n_labels) == ("ViT", 45_000):
        return family.chosen_rate("ViT"), []
    while True:
        found = {rate: Cell(owner, 0, n_labels, rate).result for rate in rates}
        if missing := [rate for rate, result in found.items() if result is None]:
            return None, missing
        best = max(found, key=lambda rate: found[rate]["val_acc"])
        if min(rates) < best < max(rates):
            return best, []
        rates.append(best / 2 if best == min(rates) else best * 2)


def wanted_cells():
    """List the cells without a result whose learning rate is known: MAE, then the shortest first."""
    starts = [Cell(name, seed) for name, start in STARTS.items() for seed in start.seeds]
    cells = []
    for name, arm in ARMS.items():
        for n_labels in arm.labels:
            rate, missing = search(name, n_labels)
            cells += [Cell(name, 0, n_labels, each) for each in missing if not arm.rate_of]
            cells += [cell for seed in arm.seeds if rate and "test_acc" not in (
                (cell := Cell(name, seed, n_labels, rate)).result or {})]
    cells += [cell for cell in starts if cell.result is None]
    return sorted(cells, key=lambda cell: 0 if cell.name in FIRST else cell.minutes)


def run_cell(cell, loaders, work, device):
    """Train a cell and return its result. The test images are read only at the chosen rate."""
    loader, val_loader, test_loader = loaders
    result, weights = cell.result, work / f"{cell.path.stem}.pt"
    if result is None:
        source = cell.source and load(work / f"{cell.source.path.stem}.pt")
        started = time.perf_counter()
        recipe, trainer, train = (prepare_arm(cell.name, loader, cell.n_labels, cell.seed, cell.rate, device, source)
                                  if cell.n_labels else prepare_start(cell.name, loader, cell.seed, device, source))
        n_steps = int(60 * cell.minutes * speed_of(cell.name) / recipe.batch_size)
        trainer.train(train, n_steps=n_steps, seed=cell.seed, progress=False)
        model = trainer.model.eval()
        save_model(model, weights, train.preprocessing)
        found = trainer.evaluate(val_loader)
        result = dict(name=cell.name, n_labels=cell.n_labels, recipe=recipe.describe(), minutes=cell.minutes,
                      total_minutes=cell.total_minutes,
                      learning_rate=recipe.train.learning_rate, images_per_second=speed_of(cell.name), n_steps=n_steps,
                      epochs=round(n_steps * recipe.batch_size / train.n_images, 2),
                      parameters=sum(p.numel() for p in model.parameters()), device=trainer.device.type,
                      precision=str(trainer.dtype), training_seconds=round(time.perf_counter() - started),
                      threads=torch.get_num_threads(), **{f"val_{name}": value for name, value in found.items()})
        if not cell.n_labels:
            compared = loaders[:2] if STARTS[cell.name].rate else loaders  # another rate, which reads no test images
            return result | dict(probe=probe(model.encoder(), compared, cell.seed, trainer.device))
    if cell.seed > 0 or search(cell.name, cell.n_labels)[0] == cell.rate:
        result |= family.read_test(weights, device, AMP, test_loader)
    return result


def is_ready(cell, options):
    """Return whether the model that a cell needs exists, and whether this job is to train such a cell."""
    source = cell.source
    return is_chosen(cell, options) and (
        source is None or (source.result is not None and (options.work / f"{source.path.stem}.pt").exists()))


def is_chosen(cell, options):
    """Return whether this job is to train a cell."""
    return options.only in cell.name and cell.seed in options.seeds


def run_job(options, loaders, command):
    """Train cells until none is left that would end in time, by the pace of the earlier ones."""
    torch.backends.cudnn.allow_tf32 = False  # convolutions on a GPU in float32, too
    started, pace = time.perf_counter(), 0  # pace: seconds for a minute of a cell
    while time.perf_counter() - started < 60 * options.until:
        left = 60 * options.until - time.perf_counter() + started
        wanted = [cell for cell in wanted_cells() if pace * cell.minutes < left]
        cell = next((cell for cell in wanted if is_ready(cell, options)
                     and family.claim(options.work / f"{cell.path.stem}.claim")), None)
        if cell is None:
            if options.device == "cpu" or not wanted:
                for left_out in (cell for cell in wanted if is_chosen(cell, options) and not is_ready(cell, options)):
                    print(f"{left_out.path.stem} is left out: it starts from {left_out.source.path.stem}.pt, which is "
                          f"not in {options.work}", flush=True)
                return
            time.sleep(1)  # another job may be training what the next cell needs
            continue
        begun = time.perf_counter()
        result = run_cell(cell, loaders, options.work, options.device)
        family.keep("pretraining", cell.path, cell.seed, f"{command} run", result)
        (options.work / f"{cell.path.stem}.claim").unlink()
        pace = max(pace, (time.perf_counter() - begun) / cell.minutes)
        score = result.get("val_acc", max(result.get("probe", {}).get("45000", {}).get("val_accs", {"": 0}).values()))
        print(f"{time.strftime('%H:%M:%S')} {cell.path.stem}: {score:.1%}, test {result.get('test_acc', 0):.1%}, "
              f"{result['n_steps']} steps, {time.perf_counter() - begun:.0f} s", flush=True)


def ship(work, command):
    """Write the weights of the first seed into the package, in int8 steps."""
    for name, start in SHIPPED.items():
        model = load(work / f"{Cell(start, 0).path.stem}.pt")
        save_model(model, OURS_FOLDER / f"{name}.pt", dtype=torch.int8, command=command, seed=0)
        print(f"{name}: {(OURS_FOLDER / f'{name}.pt').stat().st_size:,} bytes")


# ---- What results.py reads --------------------------------------------------------------------------------


def accuracies(name, n_labels):
    """Return the test accuracies of an arm, or of the linear probe on a start, one for each seed."""
    if name in STARTS:
        results = [Cell(name, seed).result for seed in STARTS[name].seeds]
        return [result["probe"][str(n_labels)]["test_acc"] for result in results if result]
    rate = search(name, n_labels)[0]
    results = [Cell(name, seed, n_labels, rate).result for seed in ARMS[name].seeds] if rate else []
    return [result["test_acc"] for result in results if result and "test_acc" in result]


def draw():
    """Draw the test accuracies of the arms with results for several numbers of labels, and of MAE's linear probe."""
    figure = new_figure(9, 5)
    axes = figure.subplots()
    shown = {name: {n: [100 * value for value in accuracies(name, n)] for n in ARMS[name].labels} for name in ARMS}
    shown["MAE, linear probe"] = {n: [100 * value for value in accuracies("MAE", n)] for n in MINUTES}
    shown = {name: {n: values for n, values in found.items() if values} for name, found in shown.items()}
    shown = {name: found for name, found in shown.items() if len(found) > 1}
    looks = looks_of(shown)
    for i, (name, found) in enumerate(shown.items()):
        places = [n * 1.05 ** (i - len(shown) / 2) for n in found]  # side by side
        axes.errorbar(places, list(map(statistics.mean, found.values())), yerr=list(map(band, found.values())),
                      **looks[name].line, capsize=4, label=name)
    axes.set_xscale("log")
    axes.set_xticks(list(MINUTES), [f"{n:,}\n({n / 45_000:.0%})" for n in MINUTES])
    axes.minorticks_off()
    axes.set_xlabel("labels")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    set_heading(figure, "CIFAR-10 (JPEG): means over the seeds and their 95% intervals")
    return finish(figure, None)


def main():
    """Measure the speeds, or train the cells.

    A cell trains for as many steps as fit into its minutes on two idle cores in float32; the speeds are measured first,
    in rounds in which all kinds take turns. The result of those steps does not depend on the load of the machine, so
    several cells train at a time, on a CPU one thread each. All are trained in bfloat16, to save time. Learning rates
    are chosen with seed 0, for each number of labels, on the 5,000 validation images that train_vit.py splits off. Test
    images are read at the chosen rate only. A seed draws the labelled images, the weights and the order.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/pretraining"), help="folder for the trained weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the cells are trained")
    parser.add_argument("--jobs", type=int, default=2, help="processes that train at the same time")
    parser.add_argument("--until", type=float, default=float("inf"), help="minutes in which the cells have to end")
    parser.add_argument("--only", default="", help="train only cells with this in their name")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="train only cells of these seeds")
    parser.add_argument("command", choices=("speeds", "run", "plan", "ship"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/pretraining.py --data-dir CIFAR"
    if options.command == "plan":
        plan()
        return
    if options.command == "ship":
        ship(options.work, f"{command} run")
        return
    loaders = (*get_data_loaders(options.data_dir, img_size=None), get_test_loader(options.data_dir, img_size=None))
    if options.command == "speeds":
        write_cell("pretraining-speeds", "cpu", 0, f"{command} speeds",
                   dict(speeds=measure_speeds(loaders[0]), threads=torch.get_num_threads(), device="cpu"))
        return
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")  # the jobs share the decoded images
    jobs = [fork.Process(target=run_job, args=(options, loaders, command)) for _ in range(options.jobs)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()


def plan():
    """Print the trainings and their minutes."""
    total = 0
    for name, start in STARTS.items():
        total += PRETRAINING * len(start.seeds)
        print(f"{name:40s} {PRETRAINING} min x {len(start.seeds)} seeds")
    for name, arm in ARMS.items():
        for n_labels in arm.labels:
            n = len(arm.seeds) + (len(RATES) - 1) * (not arm.rate_of)
            total += n * Cell(name, 0, n_labels, 1).minutes
            print(f"{name:40s} {n_labels:6,} labels: {Cell(name, 0, n_labels, 1).minutes} min x {n}")
    print(f"{total:g} minutes in all")


if __name__ == "__main__":
    main()
