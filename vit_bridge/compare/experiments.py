"""CNN against ViT, experiment by experiment: what is measured, the pictures, and a sentence made from the numbers.

    EXPERIMENTS[name].measure(subjects) -> data      plain numbers, as they go into results.json
    EXPERIMENTS[name].draw(data) -> {name: Figure}
    EXPERIMENTS[name].say(data) -> one or more sentences, which turn with the numbers

Here are those that look at trained models; those that train are in learning.py. Each has its control beside it: the
same model with random weights, uniform attention, guessing, or a count from the formula.

Shapes:  N images, S side of an image in pixels, L blocks, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from visualizations import compare_receptive_fields, plot_images
from vit_bridge.analysis.attention import attention_distance, uniform_attention_distance
from vit_bridge.analysis.capture import attention_maps
from vit_bridge.analysis.cost import count_flops, count_parameters, fitted_exponent, peak_memory, throughput
from vit_bridge.analysis.metrics import wilson_interval
from vit_bridge.analysis.perturbations import (
    accuracy_curve,
    mean_consistency,
    occlude,
    shift_consistency,
    shuffle_patches,
)
from vit_bridge.analysis.receptive_field import (
    radius_holding,
    receptive_field,
    theoretical_receptive_field,
    unit_centre,
    untrained_copy,
)
from vit_bridge.analysis.similarity import layer_similarity
from vit_bridge.compare.statistics import describe_ranking, join_words, level_with_the_best, variance_of_ratio
from vit_bridge.models.adapters import layers_of
from vit_bridge.models.convnet import ConvNet, ConvolutionAsAttention
from vit_bridge.plots.charts import plot_curves, plot_matrices
from vit_model import VisionTransformer, pair

MASS_FRACTIONS = (0.5, 0.9, 0.99)  # of the gradient, that radii hold
HIDDEN = (0.0, 0.125, 0.25, 0.5, 0.75)  # shares of the patches that are hidden or shuffled
SIZES, COUNTED_SIZES = (32, 64, 128, 256), (32, 64, 128, 256, 512)  # in pixels: timed, and counted
PATCHES, PATCH_SIZE_IMAGE = (4, 8, 16, 32), 128  # patch sizes, at one image size
RANDOM, MOVED = "random weights", "shuffled, grid moved"


@dataclass
class ComparisonSetup:
    """What the experiments look at.

    models        name -> trained model, all for one image size and normalisation
    images        normalised test images, (N, 3, S, S); labels (N,)
    mean, std     of the normalisation
    patch_size    of the patches that are shuffled and hidden
    seconds       how long a speed is measured
    sizes         sides of images, in pixels, for which speed and memory are measured; patches: of patches
    reach         the largest shift in pixels
    trained_shift the largest by which the models' training moved its images
    """
    models: dict[str, nn.Module]
    images: torch.Tensor
    labels: torch.Tensor
    mean: tuple
    std: tuple
    patch_size: int = 4
    seconds: float = 0.3
    sizes: tuple = SIZES
    patches: tuple = PATCHES
    reach: int = 6
    trained_shift: int = 4

    def attending(self):
        return {name: model for name, model in self.models.items() if isinstance(model, VisionTransformer)}


def no_pictures(setup):
    return {}


def no_tables(data):
    return []


@dataclass(frozen=True)
class Experiment:
    """title, question: as they stand in the report; measure, draw, say: as the head of this file has them; show:
    subjects -> {name: Figure}, pictures that need more than the numbers; table: data -> [(caption, rows)], the first
    row the heads."""
    title: str
    question: str
    measure: Callable
    draw: Callable
    say: Callable
    show: Callable = no_pictures
    table: Callable = no_tables


# ---- 1. Cost ----------------------------------------------------------------------------------------------


def measure_cost(setup):
    """Parameters, FLOPs, images a second and memory of a model of each kind, new, against the image's side and the
    patch's; exponents of the FLOPs in the number of pixels."""
    data = dict(resolution={}, patch=[], exponents={})
    for name, model in setup.models.items():
        rows = []
        for size in sorted({*COUNTED_SIZES, *setup.sizes}):
            twin = resized(model, img_size=size)
            row = dict(size=size, parameters=count_parameters(twin), flops=count_flops(twin))
            if size in setup.sizes:
                row |= costs_of(twin, size, setup.seconds)
            rows.append(row)
        data["resolution"][name] = rows
        data["exponents"][name] = dict(
            flops=fitted_exponent([row["size"] ** 2 for row in rows], [row["flops"] for row in rows]),
            formula=fitted_exponent([row["size"] ** 2 for row in rows], [formula(model, row["size"]) for row in rows]))
    vit = next((model for model in setup.models.values() if type(model) is VisionTransformer), None)
    for patch in setup.patches if vit is not None else ():
        twin = resized(vit, img_size=PATCH_SIZE_IMAGE, patch_size=patch)
        data["patch"].append(dict(patch_size=patch, tokens=twin.patch_embed.n_patches, flops=count_flops(twin),
                                  parameters=count_parameters(twin), **costs_of(twin, PATCH_SIZE_IMAGE,
                                                                                setup.seconds)))
    return data


def resized(model, **changes):
    """A new model like this one but for what changes in its configuration; its weights are random."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return type(model)(**vars(model.config) | changes).eval()


def costs_of(model, size, seconds):
    batch = max(1, min(64, 64 * 32**2 // size**2))
    images = torch.zeros(batch, 3, size, size)
    return dict(images_per_second=throughput(model, size, batch, seconds), batch=batch,
                training_images_per_second=throughput(model, size, batch, seconds, train=True),
                peak_mib=peak_memory(model, images) / 2**20 / batch,
                training_peak_mib=peak_memory(model, images, train=True) / 2**20 / batch)


def formula(model, size):
    """How textbooks have it grow: H W, times a constant k k C C', for convolutions; 12 N D^2 + 2 N^2 D for a block of
    attention and MLP, in multiplications."""
    if not isinstance(model, VisionTransformer):
        return size**2
    n, D = (size // pair(model.config.patch_size, "patch_size")[0]) ** 2, model.config.embed_dim
    return 12 * n * D**2 + 2 * n**2 * D


def draw_cost(data):
    sizes = {name: [(row["size"], row["flops"] / 1e6) for row in rows] for name, rows in data["resolution"].items()}
    def against_size(key):
        return {name: [(row["size"], row[key]) for row in rows if key in row]
                for name, rows in data["resolution"].items()}

    training = "Training: forward and backward"
    speeds = {"Inference": against_size("images_per_second"), training: against_size("training_images_per_second")}
    memory = {"Inference": against_size("peak_mib"), training: against_size("training_peak_mib")}
    figures = {
        "cost_flops": plot_curves({"Counted": sizes}, "side of the image (pixels)", "MFLOPs an image", log=("x", "y"),
                                  title="What an image costs"),
        "cost_speed": plot_curves(speeds, "side of the image (pixels)", "images a second",
                                  log=("x", "y"), title="How fast"),
        "cost_memory": plot_curves(memory, "side of the image (pixels)",
                                   "MiB an image, beside the weights", log=("x", "y"), title="How much memory")}
    if data["patch"]:
        panels = {heading: {"ViT": [(row["patch_size"], row[key]) for row in data["patch"]]} for heading, key in
                  (("Inference", "images_per_second"), ("Training: forward and backward",
                                                        "training_images_per_second"))}
        figures["cost_patches"] = plot_curves(panels, "side of a patch (pixels)", "images a second", log=("x", "y"),
                                              title=f"Patch size, images of {PATCH_SIZE_IMAGE} pixels")
    return figures


def say_cost(data):
    """Which is fastest at the smallest and at the largest timed size, and how the FLOPs grow."""
    timed = {name: [row for row in rows if "images_per_second" in row] for name, rows in data["resolution"].items()}
    first = {name: rows[0] for name, rows in timed.items()}
    last = {name: rows[-1] for name, rows in timed.items()}
    size = {which: next(iter(rows.values()))["size"] for which, rows in (("first", first), ("last", last))}
    fast = [f"{join_words(names)} {'is' if len(names) == 1 else 'are'} the fastest at {size[which]} pixels"
            for which, rows in (("first", first), ("last", last)) for names in [fastest(rows)]]
    sizes = [row["size"] for row in next(iter(data["resolution"].values()))]
    growth = join_words(f"{exponents['flops']:.2f} ({name}; by the formula {exponents['formula']:.2f})"
                    for name, exponents in data["exponents"].items())
    return (f"{join_words(dict.fromkeys(fast))}. From {sizes[0]} to {sizes[-1]} pixels a side the FLOPs grow with the "
            f"number of pixels to the power {growth}: 1 is in proportion, as for convolutions, k k C C' H W; 2 is what "
            f"attention alone does, N N D of N N D + N D D.")


def fastest(rows):
    """The names of the fastest, and of those that are less than a tenth slower, which one measurement does not tell."""
    speed = {name: row["images_per_second"] for name, row in rows.items()}
    return [name for name in sorted(speed, key=speed.get, reverse=True) if speed[name] > 0.9 * max(speed.values())]


def table_of_costs(data):
    heads = ["", "pixels a side", "parameters", "MFLOPs", "images/s", "training", "MiB an image", "training"]
    keys = ("images_per_second", "training_images_per_second", "peak_mib", "training_peak_mib")
    return [("New models, one machine; memory is what is held beside the weights", [heads] + [
        [name, row["size"], f"{row['parameters']:,}", f"{row['flops'] / 1e6:,.1f}",
         *(f"{row[key]:,.4g}" if key in row else "" for key in keys)]
        for name, rows in data["resolution"].items() for row in rows])]


# ---- 2. Receptive field -----------------------------------------------------------------------------------


def measure_receptive_fields(setup, n_images=32):
    """Radii in pixels that hold MASS_FRACTIONS of the centre unit's gradient, for every depth, trained and with random
    weights; for convolutional layers also the side of the window that theory allows."""
    images, data = setup.images[:n_images], {}
    for name, model in setup.models.items():
        twin, rows = untrained_copy(model), []
        for depth in range(len(layers_of(model))):
            row = dict(depth=depth)
            centre = unit_centre(model, images.shape[2:], depth)
            for weights, which in (("trained", model), (RANDOM, twin)):
                field = receptive_field(which, images, depth)
                row[weights] = [radius_holding(field, share, centre) for share in MASS_FRACTIONS]
            if isinstance(model, ConvNet) or depth == 0:
                row["window"] = max(theoretical_receptive_field(model, depth))
            rows.append(row)
        data[name] = rows
    return data


def show_receptive_fields(setup):
    return {"receptive_fields": compare_receptive_fields(None, setup.models, setup.images[:32])}


def draw_receptive_fields(data):
    panels = {}
    for weights in ("trained", RANDOM):
        panels[f"{weights}: radius holding half"] = {
            name: [(row["depth"], row[weights][0]) for row in rows] for name, rows in data.items()}
    return {"receptive_field_radii": plot_curves(panels, "depth (blocks or stages)", "radius (pixels)",
                                                 title="How far the gradient of the centre unit reaches")}


def say_receptive_fields(data):
    last = {name: rows[-1] for name, rows in data.items()}
    radii = join_words(f"{row['trained'][0]:.1f} pixels ({name})" for name, row in last.items())
    parts = [f"In the last layer half of the gradient of the centre unit lies within {radii}."]
    moved = {name: row["trained"][0] - row[RANDOM][0] for name, row in last.items()}
    for word, names in (("widened", [name for name, by in moved.items() if by >= 0.5]),
                        ("narrowed", [name for name, by in moved.items() if by <= -0.5]),
                        ("hardly moved", [name for name, by in moved.items() if abs(by) < 0.5])):
        if names:
            parts.append(f"Training has {word} that of {join_words(names)}.")
    return " ".join(parts)


def table_of_receptive_fields(data):
    shares = [f"{share:.0%}" for share in MASS_FRACTIONS]
    return [("Radius in pixels that holds so much of the gradient; side of the window that theory allows", [
        ["", "depth", *shares, *(f"{share}, {RANDOM}" for share in shares), "window"]] + [
        [name, row["depth"], *(f"{radius:.1f}" for weights in ("trained", RANDOM) for radius in row[weights]),
         row.get("window", "")] for name, rows in data.items() for row in rows])]


# ---- 3. Attention distance --------------------------------------------------------------------------------


def measure_attention_distance(setup, n_images=64):
    """Mean distance in pixels of what patches look at, (L, H) a model: trained, with random weights, both with the
    mass on CLS left out and counted as no distance; and the line of uniform attention."""
    images, data = setup.images[:n_images], {}
    for name, model in setup.attending().items():
        layout = model.patch_embed.grid_size, model.config.patch_size, model.n_prefix_tokens
        rows = {}
        for weights, which in (("trained", model), (RANDOM, untrained_copy(model))):
            maps = attention_maps(which, images)  # (L, N, H, tokens, tokens)
            rows[weights] = attention_distance(maps, *layout).tolist()
            rows[f"{weights}, CLS counted"] = attention_distance(maps, *layout, renormalise=False).tolist()
        data[name] = dict(rows, uniform=uniform_attention_distance(*layout[:2]))
    return data


def draw_attention_distance(data):
    panels = {}
    for name, rows in data.items():
        panels[name] = {
            weights: [(layer + 1, sum(heads) / len(heads), min(heads), max(heads))
                      for layer, heads in enumerate(rows[weights])] for weights in ("trained", RANDOM)}
    if not data:
        return {}
    uniform = next(iter(data.values()))["uniform"]
    return {"attention_distance": plot_curves(
        panels, "block", "mean distance (pixels)", lines=[(f"uniform: {uniform:.1f}", uniform)],
        title="How far patches look: mean over the heads, from the nearest to the farthest")}


def say_attention_distance(data):
    parts = []
    for name, rows in data.items():
        first, last, uniform = rows["trained"][0], rows["trained"][-1], rows["uniform"]
        spread, control = max(first) - min(first), max(rows[RANDOM][0]) - min(rows[RANDOM][0])
        text = (f"{name}: the heads of the first block look {min(first):.1f} to {max(first):.1f} pixels far on "
                f"average, those of the last {min(last):.1f} to {max(last):.1f}; uniform attention {uniform:.1f}")
        text += f"; those of the first block differ by {spread:.1f} pixels, with random weights by {control:.1f}"
        text += ": near and far heads side by side are learned" if spread > max(2 * control, 0.1 * uniform) else ""
        parts.append(text + ".")
    return " ".join(parts) or "None of the models has attention."


def table_of_distances(data):
    def span(heads):
        return f"{min(heads):.1f} to {max(heads):.1f}"

    table = [["", "block", "trained", RANDOM, "trained, CLS as no distance", "uniform"]]
    table += [[name, i + 1, *(span(rows[key][i]) for key in ("trained", RANDOM, "trained, CLS counted")),
               f"{rows['uniform']:.1f}"] for name, rows in data.items() for i in range(len(rows["trained"]))]
    return [("Pixels, nearest to farthest head of a block", table)] * bool(data)


# ---- 4. What they represent -------------------------------------------------------------------------------


def measure_similarity(setup, n_images=256):
    """Linear CKA, layers x layers: of each model with itself, trained and with random weights, and of each pair."""
    images, names = setup.images[:n_images], list(setup.models)
    within = {name: layer_similarity(model, model, images).tolist() for name, model in setup.models.items()}
    random = {name: layer_similarity(twin, twin, images).tolist()
              for name, twin in ((name, untrained_copy(model)) for name, model in setup.models.items())}
    across = {f"{a} and {b}": layer_similarity(setup.models[a], setup.models[b], images).tolist()
              for i, a in enumerate(names) for b in names[i + 1:]}
    return {"within": within, RANDOM: random, "across": across}


def draw_similarity(data):
    matrices = {**data["within"], **{f"{name},\n{RANDOM}": matrix for name, matrix in data[RANDOM].items()}}
    label, title = "linear CKA", "How alike layers are (1: the same up to rotation and scale)"
    figures = {"similarity_within": plot_matrices([torch.tensor(m) for m in matrices.values()], list(matrices), label,
                                                  "layer", "layer", most=1, title=title, columns=3)}
    if data["across"]:
        figures["similarity_across"] = plot_matrices(
            [torch.tensor(m) for m in data["across"].values()], list(data["across"]), label,
            "layer of the second", "layer of the first", most=1, title=title)
    return figures


def off_diagonal(matrix):
    """The mean similarity of two different layers."""
    matrix = torch.tensor(matrix)
    return ((matrix.sum() - matrix.diagonal().sum()) / (matrix.numel() - len(matrix))).item()


def say_similarity(data):
    own = {name: off_diagonal(matrix) for name, matrix in data["within"].items()}
    random = {name: off_diagonal(matrix) for name, matrix in data[RANDOM].items()}
    values = join_words(f"{name} {value:.2f} (random weights {random[name]:.2f})" for name, value in own.items())
    parts = [f"Two different layers of a model are alike by CKA, on average: {values}."]
    moved = {name: own[name] - random[name] for name in own}
    for words, names in (("less alike", [name for name, by in moved.items() if by <= -0.05]),
                         ("more alike", [name for name, by in moved.items() if by >= 0.05]),
                         ("neither more nor less alike", [name for name, by in moved.items() if abs(by) < 0.05])):
        if names:
            parts.append(f"Training has made those of {join_words(names)} {words}.")
    if data["across"]:
        ends = join_words(f"{matrix[-1][-1]:.2f} ({pair_name})" for pair_name, matrix in data["across"].items())
        parts.append(f"Of two models the last layers are alike by {ends}.")
    return " ".join(parts)


def table_of_similarities(data):
    rows = [["", "two layers of one, mean", f"{RANDOM}"]]
    rows += [[name, f"{off_diagonal(matrix):.2f}", f"{off_diagonal(data[RANDOM][name]):.2f}"]
             for name, matrix in data["within"].items()]
    pairs = [["", "last layers", "most alike layers"]]
    pairs += [[name, f"{matrix[-1][-1]:.2f}", f"{max(map(max, matrix)):.2f}"]
              for name, matrix in data["across"].items()]
    return [("Linear CKA within a model", rows)] + [("Linear CKA of two models", pairs)] * bool(data["across"])


# ---- 5. Position and shape --------------------------------------------------------------------------------


def show_position(setup, n_images=5):
    """What the models are asked about: images as they are, half of the patches shuffled, half of them hidden."""
    images, patch = setup.images[:n_images], setup.patch_size
    rows = {"as it is": images, "half shuffled": shuffle_patches(images, patch, 0.5),
            "half hidden": occlude(images, patch, 0.5)}
    return {"patches_examples": plot_images(
        torch.cat(list(rows.values())), [text for text, row in rows.items() for _ in row], columns=n_images,
        mean=setup.mean, std=setup.std, title="Patches shuffled and hidden")}


def measure_position(setup, n_images=400, n_shifted=64):
    """Shift consistency, and how many images are right while patches are shuffled or hidden (black, or by the mean).

    Shuffled patches are those that the ViT reads, which leaves its tokens whole; the control is the same grid moved by
    half a patch. The control of the shifts are the same models with random weights, which answer much alike whatever
    they see.
    """
    images, labels = setup.images[:n_images], setup.labels[:n_images]
    shuffle = partial(shuffle_patches, patch_size=setup.patch_size, seed=0)
    changes = {
        "shuffled": shuffle, MOVED: partial(shuffle, offset=max(1, setup.patch_size // 2)),
        "hidden, mean": partial(occlude, patch_size=setup.patch_size, fill="mean", seed=0),
        "hidden, black": partial(occlude, patch_size=setup.patch_size, fill="black", seed=0, mean=setup.mean,
                                 std=setup.std)}
    data = dict(n=len(images), n_shifted=min(n_shifted, len(images)), n_control=min(n_shifted // 4, len(images)),
                shares=list(HIDDEN),
                trained_shift=min(setup.trained_shift, setup.reach), classes=len(set(labels.tolist())), models={})
    for name, model in setup.models.items():
        stays = shift_consistency(model, images[:n_shifted], setup.reach)
        control = shift_consistency(untrained_copy(model), images[:data["n_control"]], data["trained_shift"])
        near, far = consistencies(stays, data["trained_shift"])
        curves = {what: accuracy_curve(model, images, labels, change, HIDDEN) for what, change in changes.items()}
        data["models"][name] = dict(shift_map=stays.tolist(), consistency=near, consistency_beyond=far, correct=curves,
                                    **{f"consistency, {RANDOM}": mean_consistency(control)})
    return data


def consistencies(stays, within):
    """Of shift_consistency's map: the mean over the offsets of at most so many pixels either way, and over those beyond
    (None where there are none)."""
    reach = len(stays) // 2
    inner = stays[reach - within:reach + within + 1, reach - within:reach + within + 1]
    n_beyond = stays.numel() - inner.numel()
    return mean_consistency(inner), ((stays.sum() - inner.sum()) / n_beyond).item() if n_beyond else None


def draw_position(data):
    panels = {what: {name: [(share, correct / data["n"], *wilson_interval(correct, data["n"]))
                            for share, correct in zip(data["shares"], model["correct"][what], strict=True)]
                     for name, model in data["models"].items()}
              for what in ("shuffled", MOVED, "hidden, mean", "hidden, black")}
    maps = [torch.tensor(model["shift_map"]) for model in data["models"].values()]
    return {"patches_changed": plot_curves(panels, "share of the patches", "images right (%)", percent=True,
                                           lines=[("guessing", 1 / data["classes"])],
                                           title="With patches shuffled or hidden (bands: 95% Wilson)"),
            "shift_consistency": plot_matrices(maps, list(data["models"]), "share of images whose class stays",
                                               "shift to the right (pixels)", "shift down (pixels)", most=1,
                                               centred=True, title="How often the answer stays when the image moves")}


def say_position(data):
    models, within, at = data["models"], data["trained_shift"], f"{data['shares'][-1]:.0%}"
    reach = (len(next(iter(models.values()))["shift_map"]) - 1) // 2

    def staying(key):
        shares = {name: model[key] for name, model in models.items()}
        values = join_words(f"{value:.0%} ({name})" for name, value in shares.items())
        level = level_with_the_best(shares, {name: p * (1 - p) / data["n_shifted"] for name, p in shares.items()})
        return f"{values}: {describe_ranking(level, len(models))}"

    control = join_words(f"{model[f'consistency, {RANDOM}']:.0%} ({name})" for name, model in models.items())
    beyond = f" Moved further, by up to {reach}, in {staying('consistency_beyond')}." if reach > within else ""
    return (f"When {data['n_shifted']} images move by up to {within} pixel{'s' * (within > 1)}, as in training, the "
            f"predicted class stays in {staying('consistency')}.{beyond} With random weights, which answer much alike "
            f"whatever they see, it stays in {control} ({data['n_control']} images). With {at} of the patches of the "
            f"ViT's own grid shuffled {what_remains(data, 'shuffled')}. On a grid moved by half a patch, which cuts "
            f"its tokens too, {what_remains(data, MOVED)}. With {at} hidden by the mean "
            f"{what_remains(data, 'hidden, mean')}.")


def what_remains(data, change):
    """In words, the right answers left at the largest share, for each model that has some beyond guessing to lose."""
    guessing, n = data["n"] / data["classes"], data["n"]
    counts = {name: (model["correct"][change][0], model["correct"][change][-1])
              for name, model in data["models"].items()}
    counts = {name: (before, after) for name, (before, after) in counts.items() if beats_guessing(before, data)}
    if not counts:
        return "nothing follows, as no model does better than guessing to begin with"
    values = join_words(f"{after / before:.0%} ({name}; guessing {guessing / before:.0%})"
                    for name, (before, after) in counts.items())
    left = {name: pair for name, pair in counts.items() if beats_guessing(pair[1], data)}
    if not left:
        end = "no model does better than guessing then" if len(counts) > 1 else "that is no more than guessing gives"
    elif len(left) == 1 and len(counts) > 1:
        end = f"only {join_words(left)} still does better than guessing"
    else:
        tough = level_with_the_best({name: after / before for name, (before, after) in left.items()},
                                    {name: variance_of_ratio(*pair, n) for name, pair in left.items()})
        end = describe_ranking(tough, len(counts))
    return f"there are {values} as many right answers as before: {end}"


def beats_guessing(correct, data):
    return wilson_interval(correct, data["n"])[0] > 1 / data["classes"]


def table_of_positions(data):
    heads = ["", "moved as in training", "further", f"as in training, {RANDOM}",
             *(f"{what}, {data['shares'][-1]:.0%}" for what in next(iter(data["models"].values()))["correct"])]
    return [(f"Class that stays, of {data['n_shifted']} images moved ({data['n_control']} with random weights), and "
             f"images of {data['n']} still right", [heads] + [
        [name, f"{model['consistency']:.0%}",
         "" if model["consistency_beyond"] is None else f"{model['consistency_beyond']:.0%}",
         f"{model[f'consistency, {RANDOM}']:.0%}", *(counts[-1] for counts in model["correct"].values())]
        for name, model in data["models"].items()])]


# ---- 8. A convolution as attention ------------------------------------------------------------------------


def measure_convolution_as_attention(setup, side=16):
    """The largest difference between a trained convolution and the attention that is set to equal it, over the
    convolutions of the first ConvNet among the models; and where the heads of one pixel look."""
    model = next((model for model in setup.models.values() if isinstance(model, ConvNet)), None)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3 and m.stride[0] == 1] \
        if model is not None else [nn.Conv2d(3, 8, 3, padding=1)]
    rows, maps = [], None
    generator = torch.Generator().manual_seed(0)
    for conv in convs:
        x = torch.randn(2, conv.in_channels, side, side, generator=generator)
        layer = ConvolutionAsAttention.from_conv(conv)
        with torch.no_grad():
            ours, attention = layer(x, return_attention=True)
            difference = (ours - conv(x)).abs().max().item()
            nn.init.kaiming_uniform_(layer.proj.weight, generator=generator)  # the control: the same heads, not set
            unset = (layer(x) - conv(x)).abs().max().item()
        rows.append(dict(channels=[conv.in_channels, conv.out_channels], difference=difference, unset=unset))
        middle = attention[:, side * side // 2 + side // 2]  # (9, M)
        maps = middle.unflatten(1, (side + 2, side + 2))[:, 5:-4, 5:-4].tolist()  # (9, 9, 9), around the pixel
    return dict(rows=rows, maps=maps, trained=model is not None)


def draw_convolution_as_attention(data):
    return {"convolution_as_attention": plot_matrices(
        [torch.tensor(head) for head in data["maps"]], [f"head {i + 1}" for i in range(len(data["maps"]))],
        "attention weight", "columns from the pixel", "rows from the pixel", most=1, centred=True, columns=3,
        title="Nine heads, each at one place of a 3 x 3 kernel")}


def say_convolution_as_attention(data):
    worst, n = max(row["difference"] for row in data["rows"]), len(data["rows"])
    unset = min(row["unset"] for row in data["rows"])
    which = f"{n} {'trained' if data['trained'] else 'random'} 3 x 3 convolution{'s' * (n > 1)}"
    if worst >= 1e-4:
        return f"Attention that was set to equal {which} differs by up to {worst:.1e}: it is not the same."
    return (f"Attention with nine heads that look at fixed neighbours, set to equal {which}, gives the same numbers "
            f"(largest difference {worst:.1e}; without its kernel {unset:.1g} or more): a convolution is attention "
            f"that has decided beforehand where to look.")


def table_of_convolutions(data):
    return [("Largest difference of attention and convolution", [["channels", "set to equal it", "not set"]] + [
        [" to ".join(map(str, row["channels"])), f"{row['difference']:.1e}", f"{row['unset']:.2g}"]
        for row in data["rows"]])]


EXPERIMENTS = {
    "cost": Experiment("Cost", "What do parameters, time and memory do as images grow and patches shrink?",
                       measure_cost, draw_cost, say_cost, table=table_of_costs),
    "receptive_field": Experiment("Receptive field", "Which pixels does a unit in the centre see, layer by layer?",
                                  measure_receptive_fields, draw_receptive_fields, say_receptive_fields,
                                  show_receptive_fields, table_of_receptive_fields),
    "attention_distance": Experiment("Attention distance", "How far do patches look?", measure_attention_distance,
                                     draw_attention_distance, say_attention_distance, table=table_of_distances),
    "similarity": Experiment("What they represent", "Which layers tell images apart in the same way?",
                             measure_similarity, draw_similarity, say_similarity, table=table_of_similarities),
    "position": Experiment("Position and shape", "What do shifted, shuffled and hidden patches do to the answers?",
                           measure_position, draw_position, say_position, show_position, table_of_positions),
    "convolution": Experiment("A convolution as attention", "Can attention do what a convolution does?",
                              measure_convolution_as_attention, draw_convolution_as_attention,
                              say_convolution_as_attention, table=table_of_convolutions),
}
