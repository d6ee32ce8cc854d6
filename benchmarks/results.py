"""Keep the project's results, one JSON file each, and generate the page RESULTS.md from them.

    python benchmarks/results.py add TABLE runs/NAME     keeps the result of a run of train_vit.py in a table
    python benchmarks/results.py ship NAME runs/NAME     stores its best model in vit_bridge/weights/shipped, in 8 bits
    python benchmarks/results.py cells FOLDER            keeps what cnn_vs_vit.py --train measured
    python benchmarks/results.py gpu OUT/cells.json      keeps what benchmarks/on_gpu.sh measured
    python benchmarks/results.py page                    writes benchmarks/RESULTS.md again from all of them
"""

import argparse
import datetime
import json
import platform
import re
import shutil
import sys
from collections import Counter, defaultdict
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from statistics import geometric_mean, mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))

from vit_bridge.analysis.metrics import wilson_interval
from vit_bridge.system import commit, machine

HERE = Path(__file__).parent
ADDED = ("targets",)  # further tables that accept the result of a run
TRAINING_TABLES = {
    "shapes": "Two minutes on the drawn shapes, the synthetic data set of this project: `python train_vit.py --seed "
              "SEED`, which chooses the recipe vit_nano_fast, and the same command with `--recipe classic`. The two "
              "recipes ran on different machines",
    "cifar10-jpeg": "Five minutes on CIFAR-10 (JPEG): `python train_vit.py --data-dir DIR --minutes 5 --model MODEL "
                    "--recipe classic`. JPEG loses detail, so do not compare these accuracies with published results "
                    "for the original files",
    "weights": "The models in vit_bridge/weights/shipped: trained in float32 on the drawn shapes, and in bfloat16 for "
               "ten minutes on CIFAR-10 (JPEG), called photographs here. The machine was also doing other work while "
               "the hybrid and the ConvNet were trained on the photographs. The speed of the ConvNet was therefore "
               "underestimated, and its run had few steps. Each result contains its command; `python "
               "benchmarks/results.py ship NAME runs/RUN` then stores the model",
}
TABLES = {
    **TRAINING_TABLES,
    "targets": "Test accuracy on CIFAR-10 (JPEG) after training for some minutes on 2 cores: `python train_vit.py "
               "--data-dir CIFAR --minutes MINUTES --model MODEL --seed SEED`, kept by `python benchmarks/results.py "
               "add targets runs/RUN`. `peer` is the plain ViT of a public script, rebuilt (`python "
               "benchmarks/peer.py`). It is far larger than vit_nano and makes few steps in ten minutes (see below the "
               "table), so its accuracy is little evidence about the method. `mirrored` is the accuracy if the "
               "probabilities for each test image and its mirror image are averaged. `aim` is the project's own "
               "target. `seconds` is the time of training and validation; it varies because the number of steps is "
               "fixed by the speed measured at the start, and the speed of the machine drifts",
    "factors": "Ablation of the recipes: one component changed at a time, scored on the validation images of CIFAR-10 "
               "(JPEG). Each variant trains for as many steps as it makes in the given minutes on 2 cores (`python "
               "benchmarks/factors.py`). With 5,000 images, one standard error is 0.7 points at 60% and 0.5 at 85%; "
               "the spread over seeds is below each table. A change that costs no time has the same images/s as the "
               "recipe. The 10-minute results of vit_nano and hybrid are based on an older measurement of speed, "
               "which led to about a tenth too many steps for variants with smaller images",
    "family": "DeiT, Swin and ConvNeXt on CIFAR-10 (JPEG), in equal minutes. Each arm trains for as many steps as fit "
              "into its minutes on 2 idle cores in float32, with its teacher's forward passes counted (`python "
              "benchmarks/family.py`). The teacher is the shipped convnet_cifar10. Learning rates are chosen on the "
              "validation images, with seed 0; arms without a grid of their own use the rate of a similar arm, as "
              "listed in benchmarks/family.py. Some cells took these steps on a GPU. The band is the 95% interval of "
              "the mean over the seeds (Student's t)",
    "pretraining": "Learning without labels on CIFAR-10 (JPEG): ten minutes on the 45,000 training images without "
                   "their labels, then 1, 2 and 5 minutes with 450, 4,500 and 45,000 labels, beside controls that use "
                   "only these labels (`python benchmarks/pretraining.py`). A minute is the steps that fit into one "
                   "on 2 idle cores in float32; the steps were then taken in bfloat16. A seed draws the labelled "
                   "images, the weights and the order. Learning rates are chosen with seed 0 for each number of "
                   "labels. All choices use the same 5,000 validation images, which have labels. The hybrid is "
                   "another model, trained with the same labels; as a teacher, it labels the other images. The band "
                   "is the 95% interval of the mean over the seeds (Student's t)",
    "steps": "How the time of a training step is spent. The floor is the time that its multiplications would take at "
             "the speed of a large matrix product on the same machine (`python benchmarks/steps.py --keep`)",
    "augmentation": "Augmentation of 32-pixel images, in images per second on one core: ours processes batches of 128, "
                    "torchvision's transforms one image at a time (`python benchmarks/batch_augmentation.py --keep`)",
    "ladder": "From a ViT to a CNN, step by step: equal minutes, nearly equal FLOPs, and for each network its own "
              "learning rate, chosen on validation images from a grid whose edge does not win (`python cnn_vs_vit.py "
              "--train --only ladder --data-dir CIFAR --train-fractions 0.01 0.1 1`). The speeds that fix the numbers "
              "of steps were measured in rounds in which the networks took turns; those of the hybrid, the ViT with a "
              "stem and the Swin later the same day, as ratios to networks that were measured before",
    "repeats": "Networks of the ladder, trained again with the same images and seed: on another machine, or with the "
               "steps of a faster network, in other minutes or with another learning rate (`python "
               "benchmarks/repeat.py --keep`). Rounding differs between machines, and training amplifies it. "
               "`validation` is the accuracy by which the ladder chose its learning rates",
    "data": "Data efficiency: each model trains for as many steps as raise its validation accuracy, by the same rule, "
            "with its own learning rate for each number of images (`python cnn_vs_vit.py --train --only data "
            "--data-dir CIFAR --train-fractions 0.01 0.1 1`)",
    "reach": "Reach: four marks at the corners of a square, two of each kind. The class says whether equal marks share "
             "a row or a column. The table shows the accuracy on 1,000 test images at each distance (`python "
             "cnn_vs_vit.py --train --only reach`)",
    "repeats-reach": "Networks of reach, trained again with the same images and seed for more steps, and tested on "
                     "1,000 images at every distance (`python benchmarks/repeat.py --experiment reach --keep`)",
    "cues": "Outline or texture: predictions for images whose outline and texture belong to different classes "
            "(`python cnn_vs_vit.py --train --only cues`)",
    "fell": "What fell: results of older versions of these experiments, whose conclusions did not survive. Reach "
            "compared two marks, which a threshold on a sum solves in 75% of the images, and its only ConvNet had a "
            "window of 25 pixels in images of 48: a ConvNet with pooled stages and a window of 51 pixels is right at "
            "every distance. Data efficiency used 800 steps, which is one pass over the largest set, one recipe for "
            "all models, and learning rates at the edge of their grid. Both used a residual ConvNet and a strided "
            "stem, which are several points worse than the networks that train_vit.py trains. Cues blamed the patch, "
            "which holds much of a texture, without changing it: with patches of 8 pixels instead of 4, a ViT follows "
            "the outline",
    "verdicts": "The findings of `python cnn_vs_vit.py --data-dir DIR --minutes M` on folders with a known answer and "
                "on photographs of CIFAR-10 (JPEG) (`python benchmarks/verdicts.py --keep`), quoted as they were "
                "printed at the time of the measurement. Rows without an entry for what is better by construction are "
                "older: they compare three models from scratch, all with one recipe and one learning rate",
    "verdict-errors": "How often the rule behind these findings makes a false claim, in simulated comparisons with "
                      "three seeds for each model (`python benchmarks/verdict_errors.py --keep`; the script describes "
                      "the settings). A claim that one model is ahead of another is false if the other is as good. "
                      "The values are the comparisons with at least one false claim, in brackets their 95% Wilson "
                      "interval. Among them are those that name a false winner. A false split is the claim that a "
                      "model learned with only some seeds, although it learned with all",
    "trust": "How far to trust each explanation (`python benchmarks/trust.py --keep`). Deletion is the area under the "
             "probability of the class while patches are hidden in the order of a map: lower is better. Insertion is "
             "the area while patches are restored in a blurred image: higher is better. Each seed trains a new model "
             "on the drawn shapes and uses 500 test images. Ties are broken at random, the random order is averaged "
             "over eight draws, and images without a map are excluded",
    "views": "Time and memory of each view of one photograph, each in its own process: processor seconds of one "
             "call, and peak memory beyond the model's (`python benchmarks/views.py --keep`; the script describes the "
             "method)",
    "throughput": "VisionTransformer compared with four other libraries, in images per second (`python "
                  "benchmarks/throughput.py --keep`; the script describes the method). Each number is a median over "
                  "rounds in which every library takes a turn. A ratio is the peer's time divided by ours in the same "
                  "round, with the 95% interval of the median, which assumes independent rounds. The named peer is the "
                  "one with the smallest ratio, so the ratio may differ from the quotient of the medians in the row. "
                  "`share` is our speed in FLOPs per second as a fraction of the machine's, measured with a 2048 x "
                  "2048 matrix product. `memory` is what our pass needs beyond weights and images, followed by "
                  "the smallest value of the other libraries. The bf16 results come from a different machine, which "
                  "has AVX512-BF16",
    "growth": "Time and memory against the number of tokens; the exponents are fitted to the upper half of the sizes "
              "(`python benchmarks/growth.py --keep`)",
    "commands": "Time taken by the commands that a reader runs first: wall time of a new process, in seconds (`python "
                "benchmarks/commands.py --keep`)",
    "shipped": "What `python cnn_vs_vit.py` measures on the shipped models and new drawn shapes (kept by `python "
               "benchmarks/commands.py --keep`). The models were trained for different lengths of time",
    "shipped-cifar10": "The same for the models trained on CIFAR-10 (JPEG), on its test images. Nothing is timed "
                       "(`python benchmarks/cifar_models.py --data-dir CIFAR --keep`). An older version of this table "
                       "fell: its images were sorted by class, so the first ones, which some experiments use alone, "
                       "showed few classes. It had 84% instead of 75% for the ViT with its own patches shuffled, and "
                       "0.86 instead of 0.75 for the similarity of the hybrid's layers",
    "resolution": "What larger images cost in inference, in float32: models with about as many parameters, and images "
                  "per second as medians of rounds in which all models and sizes take turns. The exponents are fitted "
                  "to the upper half of the sides, against the number of pixels (`python benchmarks/growth.py models "
                  "--keep`)",
    "explorer": "The explorer's page of one photograph against the number of tokens, in Chromium (`python "
                "benchmarks/explorer.py --keep`). The hover time is the time from choosing a different patch until "
                "the page is drawn, as a median of 15. It is listed for attention from a patch in one head (from), "
                "for attention to it (to), and for the mean over the heads. The first error compares the attention "
                "weights of twenty random rows, as the page computes them, with the model's own softmax. The second "
                "is over all rows, as stated on the page",
    "formats": "Checkpoint formats: a model with random weights is saved in its own format and loaded by "
               "`load_checkpoint`. The table shows the largest difference over all tokens and logits, or over the loss "
               "and the predictions of models that hide patches, relative to their largest value, in float64 unless "
               "the format is float32 (`python benchmarks/formats.py --keep`)",
    "kills": "Runs killed (SIGKILL) at random instants, resumed with `--resume`, and compared with an uninterrupted "
             "run: all tensors of last.pt (weights, averaged weights, optimiser) and best.pt, and the history except "
             "its times (`python benchmarks/kills.py --keep`). A run killed before its first checkpoint starts "
             "again, so it tests little",
    "mutants": "Mutation testing: random changes in the code for data, weights, training, analysis and the Trainer, "
               "one at a time, and whether the tests notice them (`python benchmarks/mutants.py --keep`). A mutant is "
               "equivalent if it changes nothing that a user could see, for the stated reason. When the changes of "
               "seed 0 were first drawn, the tests caught 25 of 30, one was equivalent, and four survived. Tests were "
               "then written for those four, so the table below shows that these gaps are closed, not how many others "
               "remain",
    "processes": "Several processes, and gradient accumulation, compared with one process: the largest difference from "
                 "its losses over six epochs, and whether each of the 43 test images is counted once (`python "
                 "benchmarks/processes.py --keep`). The images/s are for 32-pixel images and one thread per process; "
                 "3 processes share 2 cores",
    "few-images": "500 CIFAR-10 (JPEG) images of five classes: 90 per class for training and 10 for validation, with "
                  "5,000 test images. Pretraining used 25,000 images of the five other classes. The learning rate is "
                  "the best of three or four by validation accuracy, averaged over three seeds; a seed draws the "
                  "images, the weights and the order (`python benchmarks/few_images.py --data-dir CIFAR --keep`). "
                  "The pretrained model has the recipe classic; training from scratch has the recipe that train_vit.py "
                  "chooses now, and classic beside it",
    "gpu": "One GPU: the tests marked `cuda`; images per second at 224 pixels in bf16, measured as for throughput "
           "but with a matrix product of 8192 x 8192; and 45-second training runs on CIFAR-10 (JPEG) "
           "(`benchmarks/on_gpu.sh OUT`, then `python benchmarks/results.py gpu OUT/cells.json`)",
}

INTRODUCTION = """# Results

`python benchmarks/results.py page` generates this page from the files in results/. Accuracies are measured on the test
images, which are used once at the end of a run, and are followed by their 95% Wilson interval. `linear` is the accuracy
of a linear classifier on the pixels, trained and tested on the same images. `data` is the share of the training time
spent fetching and augmenting images (at commit 602f427, the share of the whole run's time)."""


def add(table, run):
    """Write results/<table>-<model>-<seed>.json from the result.json of a run."""
    result = json.loads((run / "result.json").read_text())
    if table in ADDED and result["minutes"] is None:
        sys.exit(f"{run} has a length in steps or epochs; the table {table} accepts only runs with --minutes")
    minutes = f"-{result['minutes']:g}" if table in ADDED else ""
    words = "-bf16" * (result["precision"] == "torch.bfloat16")
    words += f"-{result['recipe']}" * (table in ADDED)
    write_cell(table, f"{result['model']}{minutes}{words}-{result['seed']}", result["seed"], result["command"],
               result, versions=dict(torch=result["torch"], torchvision=result["torchvision"]))


def write_cell(table, name, seed, command, result, versions=None):
    """Write results/<table>-<name>.json: the result and its origin."""
    path = HERE / "results" / f"{table}-{name}.json"
    path.write_text(json.dumps(make_cell(table, seed, command, result, versions), indent=2) + "\n")
    print(path)


def make_cell(table, seed, command, result, versions=None):
    """Return a result with its origin; package versions default to the installed ones."""
    return dict(table=table, commit=commit(), date=datetime.date.today().isoformat(),
                machine=machine(result.get("device")),
                versions=dict(python=platform.python_version(), **(versions or installed())), seed=seed,
                command=command, result=result)


def installed():
    """Return the versions of the packages that a result may depend on."""
    versions = {}
    for package in ("torch", "torchvision", "timm", "transformers", "vit-pytorch"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def ship(name, run):
    """Write vit_bridge/weights/shipped/<name>.pt, which load(name) opens, from the best.pt of a run."""
    import torch

    from vit_bridge.weights.checkpoints import load, save_model

    result = json.loads((run / "result.json").read_text())
    path = HERE.parent / "vit_bridge" / "weights" / "shipped" / f"{name}.pt"
    save_model(load(run / "best.pt"), path, dtype=torch.int8, command=result["command"], seed=result["seed"],
               test_acc=result["test_acc"])
    print(f"{path}: {path.stat().st_size:,} bytes")


def keep_gpu(path):
    """Write results/gpu-<device>.json from the list of cells that on_gpu.sh wrote; keep parts that it left out.

    If that machine had no git, the commit of this checkout is used.
    """
    cells = json.loads(path.read_text())
    for cell in cells:
        cell["commit"] = commit() if cell["commit"] == "unknown" else cell["commit"]
    device = re.sub(r"[^a-z0-9]+", "-", name_of_device(cells[0]).lower()).strip("-")
    kept = HERE / "results" / f"gpu-{device}.json"
    parts = {cell["result"]["part"] for cell in cells}
    old = json.loads(kept.read_text()) if kept.exists() else []
    cells += [cell for cell in old if cell["result"]["part"] not in parts]
    kept.write_text(json.dumps(cells, indent=2) + "\n")
    print(kept)


def name_of_device(cell):
    return cell["machine"].partition(",")[0]


def page():
    """Write RESULTS.md: a section for each table that has results, and the machines they come from."""
    tables = defaultdict(list)
    for path in sorted((HERE / "results").glob("*.json")):
        kept = json.loads(path.read_text())
        for cell in kept if isinstance(kept, list) else [kept]:
            tables[cell["table"]].append(cell)
    lines = [*INTRODUCTION.splitlines(), ""]
    for table, title in TABLES.items():
        if not tables[table]:
            continue
        draw = {"throughput": throughput_lines, "growth": growth_lines,
                "resolution": resolution_lines, "formats": format_lines, "kills": kill_lines,
                "mutants": mutant_lines, "processes": process_lines, "few-images": few_image_lines,
                "targets": target_lines, "factors": factor_lines, "family": family_lines, "steps": step_lines,
                "pretraining": pretraining_lines,
                "ladder": trained_lines, "data": trained_lines, "reach": trained_lines, "cues": trained_lines,
                "repeats": repeat_lines, "repeats-reach": reach_repeat_lines,
                "fell": fell_lines, "verdicts": verdict_lines, "verdict-errors": verdict_error_lines,
                "trust": trust_lines, "views": view_lines, "commands": command_lines, "shipped": shipped_lines,
                "shipped-cifar10": shipped_lines,
                "augmentation": augmentation_lines, "gpu": gpu_lines,
                "explorer": explorer_lines}.get(table, run_lines)
        lines += [f"## {table}", "", f"{title}.", "", *draw(tables[table])]
        for where in sorted({describe_origin(cell) for cell in tables[table]}):
            lines += [f"Measured on {where}.", ""]
    (HERE / "RESULTS.md").write_text("\n".join(lines).rstrip() + "\n")


def describe_origin(cell):
    versions = ", ".join(f"{name} {version}" for name, version in cell["versions"].items() if name != "python")
    return f"{cell['machine']}; {versions}; {cell['date']}; commit {cell['commit']}"


def run_lines(cells):
    """Return one row per run of train_vit.py, and the mean over seeds."""
    lines = ["| model | seed | test accuracy | interval | linear | images/s | data | steps | seconds |",
             "|---|---:|---:|---|---:|---:|---:|---:|---:|"]
    by_model = defaultdict(list)
    several = len({cell["result"]["dataset"] for cell in cells}) > 1
    named = {(cell["result"]["model"], cell["result"].get("recipe", "classic")) for cell in cells}
    recipes = len(named) > len({model for model, _ in named}) and not several  # a model has several recipes
    for cell in cells:
        r = cell["result"]
        name = r["model"] + f", {'photographs' if r['dataset'] == 'folder' else r['dataset']}" * several
        name += f", {r.get('recipe', 'classic')}" * recipes
        by_model[name].append(r["test_acc"])
        low, high = r["test_interval"]
        lines.append(f"| {name} | {r['seed']} | {r['test_acc']:.1%} | {low:.1%} to {high:.1%} | "
                     f"{r['linear_test_acc']:.1%} | {r['images_per_second']:.0f} | {r['data_share']:.1%} | "
                     f"{r['n_steps']} | {r['seconds']:.0f} |")
    lines.append("")
    for model, accuracies in by_model.items():
        if len(accuracies) > 1:
            lines += [f"{model}, {len(accuracies)} seeds: mean {mean(accuracies):.1%}, standard deviation "
                      f"{100 * stdev(accuracies):.1f} points.", ""]
    return lines


def command_lines(cells):
    lines = ["| command | seconds of each run | median |", "|---|---|---:|"]
    for cell in cells:
        lines += [f"| `{row['command']}` | {', '.join(f'{one:.0f}' for one in row['seconds'])} | {row['median']:.0f} |"
                  for row in cell["result"].values()]
    return [*lines, ""]


def shipped_lines(cells):
    """Return the tables of the report that cnn_vs_vit.py writes."""
    from vit_bridge.compare.experiments import EXPERIMENTS

    return [line for name, data in cells[0]["result"].items()
            for line in table_lines(EXPERIMENTS[name].tables(data), EXPERIMENTS[name].title)]


def trained_lines(cells):
    """Return the tables of an experiment that trains, as in the report, for each data set."""
    from vit_bridge.compare.trained import TRAINED
    from vit_bridge.compare.trials import by_dataset

    experiment = TRAINED[cells[0]["table"]]
    return [line for dataset, own in by_dataset(cells).items()
            for line in table_lines(experiment.tables([cell["result"] for cell in own]), dataset or "drawn images")]


def repeat_lines(cells):
    lines = ["| network | seed | trained on | steps | learning rate | test accuracy | again on | steps | "
             "learning rate | test accuracy | validation |", f"|---|---:|{'---|---:|---:|---:|' * 2}---:|"]
    for cell in cells:
        both = [(cell["result"]["first"]["machine"], cell["result"]["first"]), (cell["machine"], cell["result"])]
        lines.append(f"| {cell['result']['arm']} | {cell['seed']} | " + " | ".join(
            f"{where} | {one['n_steps']:,} | {one['learning_rate']:g} | {one['correct'] / one['n']:.1%}"
            for where, one in both) + f" | {max(cell['result']['rates'].values()):.1%} |")
    return [*lines, ""]


def reach_repeat_lines(cells):
    lines = ["| network | seed | steps | learning rate | accuracy at each distance in pixels |",
             "|---|---:|---:|---:|---|"]
    for cell in cells:
        r = cell["result"]
        shares = ", ".join(f"{distance}: {count / r['n']:.1%}"
                           for distance, count in zip(r["distances"], r["correct"], strict=True))
        lines.append(f"| {r['arm']} | {cell['seed']} | {r['n_steps']:,} | {r['learning_rate']:g} | {shares} |")
    return [*lines, ""]


def table_lines(tables, title):
    """Return tables, (caption, rows), as lines of Markdown."""
    lines = []
    for caption, (head, *rows) in tables:
        lines += [f"**{title}: {caption}**", "", f"| {' | '.join(map(str, head))} |", f"|{'---|' * len(head)}",
                  *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]
    return lines


def throughput_lines(cells):
    """Return one row per column of the benchmark, by device, and the geometric mean of the ratios."""
    lines = []
    for device in sorted({cell["result"]["device"] for cell in cells}):
        results = [cell["result"] for cell in cells if cell["result"]["device"] == device
                   and len(cell["result"]["libraries"]) > 1]
        results.sort(key=lambda r: (r["precision"], r["compiled"], r["variant"], r["batch"], r["train"]))
        peers = list(dict.fromkeys(name for r in results for name in r["libraries"] if name != "ours"))
        lines += [f"| {device} | ours | {' | '.join(peers)} | ours / best peer | share | memory, MiB |",
                  f"|---|---:|{'---:|' * len(peers)}---|---:|---|"]
        ratios, of_medians = [], []
        for r in results:
            ours = r["libraries"]["ours"]
            speeds = " | ".join(f"{r['libraries'][peer]['images_per_second']:.1f}" if peer in r["libraries"] else ""
                                for peer in peers)
            best = min((peer for peer in peers if peer in r["libraries"]),
                       key=lambda peer: r["libraries"][peer]["ratio"][0])
            ratio, low, high = r["libraries"][best]["ratio"]
            ratios.append((ratio, low, high, r["column"]))
            fastest = max(r["libraries"][peer]["images_per_second"] for peer in peers if peer in r["libraries"])
            of_medians.append(ours["images_per_second"] / fastest)
            held = [r["libraries"][peer]["peak_bytes"] for peer in peers if peer in r["libraries"]]
            memory = f"{ours['peak_bytes'] / 2**20:.0f}, {min(held) / 2**20:.0f}" if all(held) else ""
            lines.append(f"| {r['column']} | {ours['images_per_second']:.1f} | {speeds} | {ratio:.2f} ({low:.2f} to "
                         f"{high:.2f}), {best} | {ours['share']:.0%} | {memory} |")
        middle = geometric_mean([ratio for ratio, _, _, _ in ratios])
        below = [column for _, _, high, column in ratios if high < 1]
        touching = [f"{column} ({low:.3f})" for _, low, high, column in ratios if low < 1 <= high]
        lines += ["", f"Geometric mean of these ratios over the {len(results)} columns: {middle:.3f}; of our speed "
                  f"over the fastest peer's, from the medians in this table: {geometric_mean(of_medians):.3f}. "
                  f"The project aims at 1.10. Columns whose whole interval lies below 1: {', '.join(below) or 'none'}. "
                  f"Columns whose interval begins below 1: {', '.join(touching) or 'none'}.", ""]
    return lines


def resolution_lines(cells):
    """Return a table of FLOPs and images per second against the side of the images."""
    r = cells[0]["result"]
    lines = [f"| model | {' | '.join(f'{side} pixels' for side in r['sides'])} | exponent of FLOPs | of time |",
             f"|---|{'---:|' * len(r['sides'])}---:|---:|"]
    for name, row in r["models"].items():
        values = " | ".join(f"{1e-9 * flops:.3f} GFLOPs, {speed:.0f} images/s" for flops, speed in zip(
            row["flops"], row["images_per_second"], strict=True))
        lines.append(f"| {name} | {values} | {row['flops_exponent']:.2f} | {row['seconds_exponent']:.2f} |")
    return [*lines, "", "![FLOPs and speed against the side of the images](figures/resolution.png)", ""]


def growth_lines(cells):
    lines = []
    for cell in cells:
        r = cell["result"]
        heads = [f"{c['path']}, {'training' if c['train'] else 'inference'}" for c in r["curves"]]
        lines += [f"| {r['device']}: tokens | {' | '.join(heads)} |", f"|---:|{'---:|' * len(heads)}"]
        for i, n in enumerate(r["tokens"]):
            values = " | ".join(f"{1e3 * c['seconds'][i]:.1f} ms, {c['bytes'][i] / 2**20:.1f} MiB" for c in r["curves"])
            lines.append(f"| {n:,} | {values} |")
        exponents = " | ".join(f"time N^{c['seconds_exponent']:.2f}, memory N^{c['bytes_exponent']:.2f}"
                               for c in r["curves"])
        lines += [f"| slope | {exponents} |", "",
                  f"The number of multiplications, 12 N D² + 2 N² D, grows as N^{r['multiplications_exponent']:.2f}.",
                  ""]
    return lines


def format_lines(cells):
    lines = ["| format | model and writer | largest difference | verified |", "|---|---|---:|---|"]
    for row in cells[0]["result"]["rows"]:
        lines.append(f"| {row['format']} | {row['source']} | {row['difference']:.1e} | {row['verified']} |")
    return [*lines, ""]


def kill_lines(cells):
    rows = [row for cell in cells for row in cell["result"]["rows"]]
    lines = ["| kind of run | kills | during a write | before the first checkpoint | after the end | equal, bit for "
             "bit |", "|---|---:|---:|---:|---:|---:|"]
    for kind in [*dict.fromkeys(row["kind"] for row in rows), "all"]:
        of_kind = [row for row in rows if kind in ("all", row["kind"])]
        lines.append(f"| {kind} | {len(of_kind)} | {sum(bool(row['in_a_write_of']) for row in of_kind)} | "
                     f"{sum(row['kept_step'] is None for row in of_kind)} | {sum(row['ended'] for row in of_kind)} | "
                     f"{sum(row['equal'] for row in of_kind)} |")
    files = Counter(part.removesuffix(".part") for row in rows for part in row["in_a_write_of"])
    written = ", ".join(f"{name} in {n}" for name, n in files.most_common())
    return [*lines, "", f"Files that were being written: {written}.", ""]


def mutant_lines(cells):
    """Return one row per package, then the mutants that no test catches."""
    lines = ["| where | seed | mutants | caught | equivalent | survived |", "|---|---:|---:|---:|---:|---:|"]
    unseen = []
    for cell in cells:
        rows = cell["result"]["rows"]
        rooms = [room_of(row["file"]) for row in rows]
        for room in [*sorted(set(rooms)), "all"]:
            own = [row["outcome"] for row, where in zip(rows, rooms, strict=True) if room in ("all", where)]
            lines.append(f"| {room} | {cell['seed']} | {len(own)} | {own.count('killed')} | "
                         f"{own.count('equivalent')} | {own.count('survived')} |")
        unseen += [f"- {row['outcome']}, {row['file']} line {row['line']} ({row['kind']}): "
                   f"`{' '.join(part[1:].strip() for part in row['diff'] if part[0] == '+')}`"
                   + (f", {row['by']}" if row["by"] else "") for row in rows if row["outcome"] != "killed"]
    return [*lines, "", *unseen, *[""] * bool(unseen)]


def room_of(file):
    return file.split("/")[1] if "/" in file else file


def process_lines(cells):
    lines = ["| | training loss differs by | validation loss by | validation accuracy by | test images counted | "
             "correct | images/s |", "|---|---:|---:|---:|---:|---:|---:|"]
    for row in cells[0]["result"]["rows"]:
        lines.append(f"| {row['way']} | {row['train_loss difference']:.1e} | {row['val_loss difference']:.1e} | "
                     f"{row['val_acc difference']:.1e} | {row['test_n']} | {row['test_correct']} | "
                     f"{row['images_per_second']:.0f} |")
    return [*lines, "", "![Losses of one process and of several](figures/processes.png)", ""]


def few_image_lines(cells):
    by_method = defaultdict(list)
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        by_method[cell["result"]["method"]].append(cell)
    lines = ["| method | learning rate | test accuracy of each seed, 95% interval | mean | standard deviation | "
             "validation accuracy of each learning rate |", "|---|---:|---|---:|---:|---|"]
    for method, of_method in by_method.items():
        tests = [cell["result"]["test"] for cell in of_method]
        accuracies = [test["accuracy"] for test in tests]
        each = ", ".join(f"{test['accuracy']:.1%} ({100 * test['interval'][0]:.1f} to {100 * test['interval'][1]:.1f})"
                         for test in tests)
        spread = f"{100 * stdev(accuracies):.1f} points" if len(accuracies) > 1 else ""
        rates = ", ".join(f"{float(rate):g}: {share:.1%}" for rate, share in of_method[0]["result"]["rates"].items())
        lines.append(f"| {method} | {of_method[0]['result']['rate']:g} | {each} | {mean(accuracies):.1%} | {spread} | "
                     f"{rates} |")
    return [*lines, ""]


TARGETS = {("vit_nano", 10): 0.74, ("hybrid", 10): 0.86, ("convnet", 10): 0.89, ("hybrid", 30): 0.90}


def target_lines(cells):
    groups = defaultdict(list)
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        r = cell["result"]
        groups[r["model"], r["minutes"], r.get("precision", "torch.float32").removeprefix("torch."),
               r.get("recipe") or ""].append(r)
    lines = ["| model | minutes | precision | recipe | test accuracy of each seed, 95% interval | mean | standard "
             "deviation | mirrored | aim | images/s | seconds |",
             "|---|---:|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for (model, minutes, precision, recipe), results in sorted(groups.items()):
        accuracies = [r["test_acc"] for r in results]
        each = ", ".join(f"{r['test_acc']:.1%} ({100 * r['test_interval'][0]:.1f} to {100 * r['test_interval'][1]:.1f})"
                         for r in results)
        spread = f"{100 * stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
        mirrored = [r["test_mirrored_acc"] for r in results if "test_mirrored_acc" in r]
        aim = TARGETS.get((model, minutes))
        lines.append(f"| {model} | {minutes:g} | {precision} | {recipe} | {each} | {mean(accuracies):.1%} | {spread} | "
                     f"{f'{mean(mirrored):.1%}' if mirrored else ''} | {f'{aim:.0%}' if aim else ''} | "
                     f"{mean([r['images_per_second'] for r in results]):.0f} | "
                     f"{mean([r['seconds'] for r in results]):.0f} |")
    sizes = [f"{model}: {results[0]['parameters']:,} parameters, {describe_steps(results)} steps"
             for (model, *_), results in sorted(groups.items()) if model in ("vit_nano", "peer", "peer, generous")]
    return [*lines, "", f"{'; '.join(sizes)}.", ""]


def describe_steps(results):
    return " or ".join(f"{r['n_steps']:,}" for r in results)


def factor_lines(cells):
    """Return a table for each model and number of minutes, with the best change first."""
    groups, lines = defaultdict(list), []
    for cell in cells:
        r = cell["result"]
        groups[r["model"], r["minutes"], r.get("precision", "torch.float32").removeprefix("torch.")].append(r)
    for (model, minutes, precision), results in sorted(groups.items()):
        recipe = [r for r in results if r["factor"] == "the recipe"]
        settings = f" ({recipe[0]['recipe']})" if recipe else ""
        lines += [f"**{model}, {minutes:g} minutes, {precision}**{settings}", "",
                  "| change | validation accuracy | points | images/s | epochs | mirrored adds |",
                  "|---|---:|---:|---:|---:|---:|"]
        by_factor = defaultdict(list)
        for r in results:
            by_factor[r["factor"]].append(r)
        level = mean([r["val_acc"] for r in recipe]) if recipe else None
        for factor, rows in sorted(by_factor.items(), key=lambda item: -mean([r["val_acc"] for r in item[1]])):
            accuracy = mean([r["val_acc"] for r in rows])
            points = "" if level is None or factor == "the recipe" else f"{100 * (accuracy - level):+.1f}"
            gain = 100 * mean([r["val_mirrored_acc"] - r["val_acc"] for r in rows])
            name = f"**{factor}**" if factor == "the recipe" else factor
            lines.append(f"| {name} | {accuracy:.1%} | {points} | {rows[0]['images_per_second']:.0f} | "
                         f"{rows[0]['epochs']:.1f} | {gain:+.1f} |")
        if len(recipe) > 1:
            each = ", ".join(f"{r['val_acc']:.1%}" for r in recipe)
            lines += ["", f"The recipe with {len(recipe)} seeds: {each}; standard deviation "
                      f"{100 * stdev([r['val_acc'] for r in recipe]):.1f} points. Each change has one seed."]
        lines.append("")
    return lines


T95 = {2: 12.706, 3: 4.303}  # Student's t for a 95% interval, by the number of seeds


def band(values):
    """Return half the width of the 95% interval of the mean over seeds; 0 for a single seed."""
    return T95[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def family_lines(cells):
    """Return a table of the arms with their chosen learning rates, and a line with the rates that were tried."""
    runs, tried = defaultdict(list), defaultdict(dict)
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        r = cell["result"]
        if "test_acc" in r:
            runs[r["arm"]].append(r)
        if cell["seed"] == 0:
            tried[r["arm"]][r["learning_rate"]] = r["val_acc"]
    if runs:
        lines = ["| arm | minutes | steps | epochs | learning rate | validation accuracy of each seed | test accuracy "
                 "of each seed | mean, band | parameters |", "|---|---:|---:|---:|---:|---|---|---:|---:|"]
    else:
        lines = ["So far only the learning rates have been compared, with one seed. No test image has been read."]
    for arm, results in sorted(runs.items(), key=lambda item: -mean([r["test_acc"] for r in item[1]])):
        r, accuracies = results[0], [r["test_acc"] for r in results]
        checked, tests = (", ".join(f"{one[name]:.1%}" for one in results) for name in ("val_acc", "test_acc"))
        lines.append(f"| {arm} | {r['minutes']:g} | {r['n_steps']:,} | {r['epochs']:.1f} | {r['learning_rate']:g} | "
                     f"{checked} | {tests} | {mean(accuracies):.1%}{spread_of(accuracies)} | {r['parameters']:,} |")
    return [*lines, *rate_lines(tried)]


def pretraining_lines(cells):
    """Return a table of the arms for each number of labels, one of the linear probes, and the rates that were tried."""
    runs, tried, starts = defaultdict(list), defaultdict(dict), defaultdict(list)
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        r = cell["result"]
        if not r["n_labels"]:
            starts[r["name"]].append(r)
            if cell["seed"] == 0 and r["name"].split(", learning")[0] == "MAE":
                tried[0, "MAE, probe with all labels"][r["learning_rate"]] = max(
                    r["probe"]["45000"]["val_accs"].values())
        elif "test_acc" in r:
            runs[r["n_labels"], r["name"]].append(r)
        if r["n_labels"] and cell["seed"] == 0:
            tried[r["n_labels"], r["name"]][r["learning_rate"]] = r["val_acc"]
    lines = ["| labels | arm | minutes, those without labels included | steps | learning rate | validation accuracy of "
             "each seed | test accuracy of each seed | mean, band |", "|---:|---|---:|---:|---:|---|---|---:|"]
    for (n_labels, name), results in sorted(runs.items(), key=lambda item: (
            item[0][0], -mean([r["test_acc"] for r in item[1]]))):
        r, accuracies = results[0], [r["test_acc"] for r in results]
        checked, tests = (", ".join(f"{one[key]:.1%}" for one in results) for key in ("val_acc", "test_acc"))
        lines.append(f"| {n_labels:,} | {name} | {r['total_minutes']:g} | {r['n_steps']:,} | {r['learning_rate']:g} | "
                     f"{checked} | {tests} | {mean(accuracies):.1%}{spread_of(accuracies)} |")
    counts = list(next(iter(starts.values()))[0]["probe"]) if starts else []
    lines += ["", "A linear probe on the frozen features of each start; the validation images choose its penalty:", "",
              f"| start | steps | learning rate | loss on hidden validation patches | "
              f"{' | '.join(f'{int(n):,} labels' for n in counts)} |", f"|---|---:|---:|---:|{'---:|' * len(counts)}"]
    for name, results in starts.items():
        r = results[0]
        if "test_acc" not in r["probe"][counts[0]]:
            continue  # another learning rate
        probes = [[one["probe"][n]["test_acc"] for one in results] for n in counts]
        lines.append(f"| {name} | {r['n_steps']:,} | {r['learning_rate']:g} | "
                     f"{', '.join(format(one['val_loss'], '.3f') for one in results)} | "
                     f"{' | '.join(f'{mean(accuracies):.1%}{spread_of(accuracies)}' for accuracies in probes)} |")
    return [*lines, *rate_lines({f"{name}, {n_labels:,} labels" if n_labels else name: tried[n_labels, name]
                                 for n_labels, name in sorted(tried)})]


def rate_lines(tried):
    """Return one line with the validation accuracy of each learning rate tried: {arm: {rate: accuracy}}."""
    grids = [f"{arm} ({', '.join(f'{rate:g}: {share:.1%}' for rate, share in sorted(rates.items()))})"
             for arm, rates in tried.items() if len(rates) > 1]
    return ["", f"Validation accuracy of each learning rate tried with seed 0: {'; '.join(grids)}.", ""]


def spread_of(accuracies):
    """Return ' ± the band in points', or nothing for one seed."""
    return f" ± {100 * band(accuracies):.1f}" if len(accuracies) > 1 else ""


def step_lines(cells):
    lines = []
    for cell in cells:
        r = cell["result"]
        groups = list(dict.fromkeys(group for row in r["rows"] for group in row["shares"]))
        lines += [f"**{r.get('precision', 'float32')}, {cell['machine']}**", ""]
        lines += [f"| recipe | step, ms | images/s | MFLOPs per image | floor, ms | floor / step | "
                  f"{' | '.join(groups)} |", f"|---|---:|---:|---:|---:|---:|{'---:|' * len(groups)}"]
        for row in r["rows"]:
            shares = " | ".join(f"{row['shares'].get(group, 0):.0%}" for group in groups)
            lines.append(f"| {row['recipe']} | {1e3 * row['seconds']:.0f} | {row['images_per_second']:.0f} | "
                         f"{row['mflops_an_image']:.0f} | {1e3 * row['floor_seconds']:.0f} | "
                         f"{row['share_of_floor']:.0%} | {shares} |")
        for what, title in (("optimizers", "One optimiser step on the hidden matrices of vit_nano"),
                            ("layouts", "Forward and backward pass of the ConvNet on 128 images")):
            times = "; ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in r[what].items())
            lines += ["", f"{title}: {times}."]
        lines.append("")
    return lines


def fell_lines(cells):
    """Return the tables of the experiments that fell: reach, cues, data."""
    kept = defaultdict(list)
    for cell in cells:
        r = cell["result"]
        name = "reach" if "distances" in r else "cues" if "choices" in r else "data"
        kept[name, r.get("dataset") or "drawn images", r.get("n_images") or 0, r["kind"]].append(r)
    lines = ["| experiment | images | training images | model | result of each seed |", "|---|---|---:|---|---|"]
    for (name, dataset, n_images, kind), results in sorted(kept.items()):
        values = {"reach": lambda r: " ".join(f"{count / r['n']:.0%}" for count in r["correct"]),
                  "cues": lambda r: f"{r['shape_bias']:.0%} outline",
                  "data": lambda r: f"{r['correct'] / r['n']:.1%}"}[name]
        lines.append(f"| {name} | {dataset} | {f'{n_images:,}' if n_images else ''} | {kind} | "
                     f"{'; '.join(map(values, results))} |")
    return [*lines, "", "Reach: at distances of 8, 14, 20, 26, 32 and 42 pixels.", ""]


def verdict_lines(cells):
    """Return one row per folder; older cells state no expected winner."""
    lines = ["| folder | minutes | better by construction | named as the winner | finding |", "|---|---:|---|---|---|"]
    for cell in cells:
        r = cell["result"]
        winners = [r[key] or "none" if key in r else "" for key in ("expected", "winner")]
        lines.append(f"| {r['name']} | {r['minutes']:g} | {' | '.join(winners)} | {' '.join(r['finding'].split())} |")
    return [*lines, ""]


def verdict_error_lines(cells):
    """Return a table of false claims, one of the leads that are found, and the largest rates."""
    rows = cells[0]["result"]["rows"]
    numbers = sorted({row["n_images"] for row in rows})
    head = f"{' | '.join(f'{n:,} images' for n in numbers)} |", f"{'---:|' * len(numbers)}"
    errors, powers = ([row for row in rows if (row["what"] == "a true lead") == true] for true in (False, True))
    lines = [f"| models | | spread of the seeds | answers | {head[0]}", f"|---:|---|---:|---|{head[1]}"]
    for (what, k, spread, answers), own in by_setting(errors).items():
        shares = " | ".join(f"{share_of(row, 'false_claims')}" for row in own)
        lines.append(f"| {k} | {what} | {100 * spread:g} points | {answers} | {shares} |")
    for key, name in (("false_claims", "false claims"), ("false_winners", "false winners"),
                      ("false_splits", "false splits")):
        worst = max(rows, key=lambda row, key=key: row[key])
        lines += ["", f"Largest rate of {name} in a setting: {share_of(worst, key)}."]
    lines += ["", "How often the smallest lead is found that the command announces before the training, for an assumed "
              "accuracy of 75%, a spread of 1 point and independent answers. It should be near 80% for independent "
              "answers:", "",
              f"| models | answers | {head[0]}", f"|---:|---|{head[1]}"]
    for (_, k, _, answers), own in by_setting(powers).items():
        shares = " | ".join(f"{100 * (row['levels'][0] - row['levels'][1]):.1f} points: {share_of(row, 'found')}"
                            for row in own)
        lines.append(f"| {k} | {answers} | {shares} |")
    return [*lines, ""]


def by_setting(rows):
    """Group rows of verdict_errors.py by everything but the number of images."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["what"], len(row["levels"]), row["spread"], row["answers"]].append(row)
    return groups


def share_of(row, key):
    """Return a count as a share of the comparisons, with its Wilson interval."""
    low, high = wilson_interval(row[key], row["n"])
    return f"{row[key] / row['n']:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def trust_lines(cells):
    names = list(cells[0]["result"]["deletion"])
    lines = ["| | seed | correct of 500 | " + " | ".join(names) + " | range of draws | images without Grad-CAM |",
             "|---|---:|---:|" + "---:|" * len(names) + "---|---:|"]
    for what in ("deletion", "insertion"):
        for cell in cells:
            r = cell["result"]
            values = " | ".join(f"{r[what][name]:.3f}" for name in names)
            draws = f"{min(r['draws'][what]):.3f} to {max(r['draws'][what]):.3f}"
            lines.append(f"| {what} | {cell['seed']} | {r['right']} | {values} | {draws} | {r['blank']['grad_cam']} |")
    methods = [name for name in names if name in cells[0]["result"]["leads"]["deletion"]]
    lines += ["", "Difference from the random order for each image: mean ± standard error over the images.", "",
              "| | seed | " + " | ".join(methods) + " |", "|---|---:|" + "---:|" * len(methods)]
    for what in ("deletion", "insertion"):
        for cell in cells:
            values = " | ".join("{:+.3f} ± {:.3f}".format(*cell["result"]["leads"][what][name]) for name in methods)
            lines.append(f"| {what} | {cell['seed']} | {values} |")
    return [*lines, ""]


def view_lines(cells):
    """Return a table for each model, with a row per view that compares it with an older checkout."""
    lines = []
    for model in dict.fromkeys(cell["result"]["model"] for cell in cells):
        own = {cell["result"]["name"]: cell["result"] for cell in cells if cell["result"]["model"] == model}
        names = sorted(own)  # "before", "now"
        commits = ", ".join(f"{name}: commit {own[name]['code']}" for name in names)
        lines += [f"### {own[names[-1]]['what']}", "", f"{commits}.", "",
                  f"| | {' | '.join(f'{name}: s | MiB' for name in names)} | |",
                  f"|---|{'---:|---:|' * len(names)}---|"]
        for view, last in own[names[-1]]["views"].items():
            figures = " | ".join(_figures_of_view(own[name]["views"].get(view)) for name in names)
            lines.append(f"| {view} | {figures} | {last['status']} |")
        lines.append("")
    return lines


def _figures_of_view(found):
    """Return "seconds | MiB", or the reason why there are none."""
    if found is None:
        return "absent | "
    if found["status"] != "ok":
        return f"{found['status'].partition(':')[0]} | "
    return f"{found['seconds']:.1f} | {found['mebibytes']:,.0f}"


def augmentation_lines(cells):
    lines = ["| | ours | torchvision | ratio, lowest and highest round |", "|---|---:|---:|---|"]
    for row in cells[0]["result"]["rows"]:
        lines.append(f"| {row['what']} | {row['ours']:,} | {row['torchvision']:,} | {row['ratio']:.1f} "
                     f"({row['lowest']:.1f} to {row['highest']:.1f}) |")
    return [*lines, ""]


def explorer_lines(cells):
    lines = ["| model | tokens | bits | MB | loading, s | hover, ms: from, to, mean | error of twenty rows; relative "
             "to their largest weight | error of all rows; relative | writing, s |",
             "|---|---:|---:|---:|---:|---|---|---|---:|"]
    for cell in cells:
        for r in cell["result"]["rows"]:
            hover = ", ".join(f"{ms:.0f}" for ms in r["hover_ms"].values())
            lines.append(f"| {cell['result']['model']} | {r['tokens']:,} | {r['bits']} | {r['bytes'] / 1e6:.2f} | "
                         f"{r['load_seconds']:.2f} | {hover} | {r['row_error']:.2g}, {r['row_error_relative']:.2%} | "
                         f"{r['weight_error']:.2g}, {r['relative_error']:.2%} | {r['seconds']:.1f} |")
    return [*lines, ""]


def gpu_lines(cells):
    """Return the tests, throughput and training runs of each GPU, then what was not measured, and why."""
    lines = []
    for device in sorted({name_of_device(cell) for cell in cells}):
        own = [cell for cell in cells if name_of_device(cell) == device]
        failed = [cell for cell in own if "error" in cell["result"]]
        parts = defaultdict(list)
        for cell in own:
            if cell not in failed:
                parts[cell["result"]["part"]].append(cell)
        lines += [f"### {device}{', dry run' * any(cell['result']['dry_run'] for cell in own)}", ""]
        for cell in parts["tests"]:
            r = cell["result"]
            lines += [f"Tests: {r['passed']} passed, {len(r['failed'])} failed, {len(r['skipped'])} skipped, in "
                      f"{r['seconds']:.0f} s.", ""]
            lines += [f"- {what}: {entry['test']}: {entry['reason']}" for what in ("failed", "skipped")
                      for entry in r[what]]
            lines += [""] * bool(r["failed"] or r["skipped"])
        compared = [cell for cell in parts["throughput"] if len(cell["result"]["libraries"]) > 1]
        lines += throughput_lines(compared) if compared else []
        lines += run_lines(parts["training"]) if parts["training"] else []
        lines += [f"- {cell['result']['name']}: not measured, {cell['result']['error']}" for cell in failed]
        lines += [""] * bool(failed)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("table", choices=(*TRAINING_TABLES, *ADDED))
    adding.add_argument("run", type=Path)
    shipping = commands.add_parser("ship")
    shipping.add_argument("name")
    shipping.add_argument("run", type=Path)
    kept = commands.add_parser("cells")
    kept.add_argument("folder", type=Path)
    gpu = commands.add_parser("gpu")
    gpu.add_argument("file", type=Path)
    commands.add_parser("page")
    options = parser.parse_args()
    if options.command == "add":
        add(options.table, options.run)
    if options.command == "cells":
        for path in sorted(options.folder.glob("*.json")):
            shutil.copy(path, HERE / "results" / path.name)
    if options.command == "gpu":
        keep_gpu(options.file)
    if options.command == "ship":
        ship(options.name, options.run)
    page()


if __name__ == "__main__":
    main()
