"""How often `cnn_vs_vit.py --data-dir` names a false winner, and how often it finds a true lead, by simulation.

    python benchmarks/verdict_errors.py            prints the rates, about seven minutes on one core
    python benchmarks/verdict_errors.py --keep     also keeps them in benchmarks/results/

Each simulated comparison draws which test images every training run classifies correctly, and calls the functions that
decide for cnn_vs_vit.py: rank_candidates() of vit_bridge/compare/statistics.py, and smallest_lead() for the power.

Shapes:  S seeds, n test images, k models.
"""

import argparse
import itertools
import multiprocessing
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from results import write_cell

from vit_bridge.analysis.metrics import wilson_interval
from vit_bridge.compare.statistics import assumed_noise, rank_candidates, smallest_lead

GUESSING, LEVEL, WORSE = 0.5, 0.75, 0.65  # accuracies: without learning, of most models, of one much worse model
N_SEEDS, N_IMAGES, N_MODELS, SPREADS = 3, (30, 100, 1000, 10_000), (2, 6), (0.0, 0.01, 0.05)
# What decides whether a model is right: luck, or mostly the difficulty of the image, which is the same for all models
# or another one for each model (but the same for its seeds).
ANSWERS = ("independent", "of all models", "of each model")
LARGEST_RATE = 0.05  # of comparisons with a false claim
BY_DIFFICULTY = 0.8  # fraction of the predictions that the difficulty decides, unless all are independent


@dataclass(frozen=True)
class Setting:
    """What is simulated: k models with these accuracies, S seeds and n test images.

    Attributes
    ----------
    what : str
        "equal", "learns with 50%", "one much worse", "a true lead", ...
    levels : tuple of float
        The expected accuracy of each model that has learned.
    n_images : int
        n.
    spread : float
        Standard deviation of the accuracy between seeds.
    answers : str
        One of ANSWERS.
    learns : float
        Probability that a seed of the first model learns; otherwise it guesses.
    """

    what: str
    levels: tuple
    n_images: int
    spread: float
    answers: str
    learns: float = 1.0

    @property
    def true_levels(self):
        """The expected accuracy of each model, over the seeds that learn and the others."""
        first, *rest = self.levels
        return [self.learns * first + (1 - self.learns) * GUESSING, *rest]


def simulate(setting, generator):
    """Return ({model: [one row per seed]}, [whether each seed of the first model learned])."""
    k, n = len(setting.levels), setting.n_images
    luck = torch.rand(k, N_SEEDS, n, generator=generator)
    if setting.answers != "independent":
        own = k if setting.answers == "of each model" else 1
        difficulty = torch.rand(own, 1, n, generator=generator)
        luck = torch.where(luck < BY_DIFFICULTY, difficulty, (luck - BY_DIFFICULTY) / (1 - BY_DIFFICULTY))
    levels = torch.tensor(setting.levels)[:, None] + setting.spread * torch.randn(k, N_SEEDS, generator=generator)
    learned = torch.rand(N_SEEDS, generator=generator) < setting.learns
    levels[0, ~learned] = GUESSING
    right = luck < levels[:, :, None]  # (k, S, n)
    accuracies = right.double().mean(dim=2).tolist()
    return {model: [dict(right=right[model, seed], accuracy=accuracies[model][seed]) for seed in range(N_SEEDS)]
            for model in range(k)}, learned.tolist()


def measure(setting, n_comparisons, seed):
    """Simulate comparisons; return the setting and how many of them made which claim.

    false_winners: comparisons that name a winner although another model is as good. false_claims: comparisons in which
    any model counts as behind one that is not better. false_splits: comparisons in which a model that learns with every
    seed counts as one that does not. found: comparisons that put the first model ahead of the second. splits,
    splits_found: comparisons in which only some seeds of the first model learned, and those that report it.
    """
    generator, true = torch.Generator().manual_seed(seed), setting.true_levels
    counts = dict.fromkeys(("false_winners", "false_claims", "false_splits", "found", "splits", "splits_found"), 0)
    for _ in range(n_comparisons):
        rows, learned = simulate(setting, generator)
        ranking, split = rank_candidates(rows, GUESSING)
        counts["false_splits"] += any(model or setting.learns == 1 for model in split)
        if 0 < sum(learned) < N_SEEDS:
            counts["splits"] += 1
            counts["splits_found"] += split.get(0) == learned
        if ranking is not None:
            counts["false_claims"] += any(true[model] >= true[ranking.best] for model in ranking.behind)
            counts["false_winners"] += ranking.winner is not None and true[ranking.winner] <= max(
                level for model, level in enumerate(true) if model != ranking.winner)
            counts["found"] += ranking.best == 0 and 1 in ranking.behind
    return asdict(setting) | dict(n=n_comparisons, **counts)


def measure_job(job):
    """Return measure() of a tuple of its arguments."""
    return measure(*job)


def settings():
    """Return all Settings: equal models, a model that learns with some seeds only, a worse one, and a true lead."""
    found = [Setting("equal", (LEVEL,) * k, n, spread, answers)
             for k, spread, answers, n in itertools.product(N_MODELS, SPREADS, ANSWERS, N_IMAGES)]
    found += [Setting(f"one learns with {learns:.0%} of the seeds", (LEVEL,) * k, n, 0.01, answers, learns)
              for k, learns, answers, n in itertools.product(N_MODELS, (0.5, 0.8), ANSWERS[:2], N_IMAGES)]
    found += [Setting("one much worse", (WORSE, *(LEVEL,) * (max(N_MODELS) - 1)), n, spread, answers)
              for spread, answers, n in itertools.product(SPREADS, ANSWERS[:2], N_IMAGES)]
    for k, answers, n in itertools.product(N_MODELS, ANSWERS, N_IMAGES):
        lead = smallest_lead(assumed_noise(n, N_SEEDS, k))
        found.append(Setting("a true lead", (LEVEL + lead / 2, *(LEVEL - lead / 2,) * (k - 1)), n, 0.01, answers))
    return found


def main():
    """Measure all settings; exit with an error if false claims are above 5% in one of them, beyond chance."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--n", type=int, default=2000, help="simulated comparisons for each setting")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, jobs = [], [(setting, options.n, seed) for seed, setting in enumerate(settings())]
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for row in pool.imap(measure_job, jobs):
            rows.append(row)
            print(f"{row['what']}, {len(row['levels'])} models, {row['n_images']:,} images, spread {row['spread']:g}, "
                  f"answers {row['answers']}: {row['false_claims']} false claims, {row['false_splits']} false splits, "
                  f"{row['found']} found", flush=True)
    if options.keep:
        write_cell("verdict-errors", "cpu", 0, f"python benchmarks/verdict_errors.py --n {options.n} --keep",
                   dict(rows=rows, device="cpu"))
    worst = max(row["false_claims"] for row in rows)
    low, high = wilson_interval(worst, options.n)
    print(f"Largest rate of false claims in a setting: {worst / options.n:.1%} ({low:.1%} to {high:.1%})")
    sys.exit(int(low > LARGEST_RATE))


if __name__ == "__main__":
    main()
