"""CNN against ViT on trained models: experiments, each with a control.

    EXPERIMENTS[name]    an Experiment: measure, draw, finding, tables
    ComparisonSetup      the models and images to measure

The control is the same model with random weights, uniform attention, guessing or a formula. trained.py contains the
experiments that train their models.

Shapes:  N images, S side of an image in pixels, L blocks, H heads, M tokens including the padding.
"""

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
from vit_bridge.compare.statistics import (
    describe_leaders,
    is_or_are,
    mean_min_max,
    rank_kept,
    rank_shares,
    rank_speeds,
    sort_by_change,
    spread_is_learned,
)
from vit_bridge.errors import join_words
from vit_bridge.models.adapters import adapt
from vit_bridge.models.convnet import ConvolutionAsAttention
from vit_bridge.plots.charts import plot_curves, plot_matrices
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.runtime import predictions
from vit_model import pair

MASS_FRACTIONS = (0.5, 0.9, 0.99)  # of the gradient; we measure the radius that holds each
HIDDEN = (0.0, 0.25, 0.5, 0.75)  # fractions of the patches that are hidden or shuffled
SIZES, COUNTED_SIZES = (32, 80, 160), (32, 64, 128, 256, 512)  # image sides in pixels: timed, and only counted
PATCHES, PATCH_SIZE_IMAGE = (4, 8, 16, 32), 128  # patch sizes, and the image size at which they are compared
RANDOM, MOVED = "random weights", "shuffled, grid moved"  # keys in results.json


@dataclass
class ComparisonSetup:
    """The models and images that the experiments measure.

    Parameters
    ----------
    models : dict
        {name: trained model}, all for the same image size and normalisation.
    images : Tensor, shape (N, 3, S, S)
        Normalised test images, in random order: some experiments use the first few only.
    labels : Tensor, shape (N,)
        Their classes.
    preprocessing : Preprocessing
        How the images were preprocessed.
    patch_size : int, optional
        Side in pixels of the patches that are shuffled and hidden.
    seconds : float, optional
        Time to spend on each measurement of speed.
    sizes, patches : tuple of int, optional
        Image sides and patch sides in pixels for which to measure speed and memory.
    reach : int, optional
        Largest shift in pixels.
    trained_shift : int, optional
        Largest shift in pixels of the augmentation that the models were trained with.
    """

    models: dict[str, nn.Module]
    images: torch.Tensor
    labels: torch.Tensor
    preprocessing: Preprocessing
    patch_size: int = 4
    seconds: float = 0.2
    sizes: tuple = SIZES
    patches: tuple = PATCHES
    reach: int = 5
    trained_shift: int = 4

    def models_with_attention(self):
        """Return the models that have attention, by name."""
        return {name: model for name, model in self.models.items() if model.attends}


class Experiment:
    """A question and the way to measure it.

    Subclasses define four methods.

    - `measure(setup)` returns the data as plain numbers, in the form stored in results.json.
    - `draw(data, setup)` returns {name: figure}; without a setup, only the figures that need nothing but the data.
    - `finding(data)` states in a sentence or two what was observed.
    - `tables(data)` returns [(caption, rows)]; the first row holds the column headings.
    """

    title: str
    question: str


def _clauses(*clauses):
    """Join (words, names) pairs into one list, leaving out pairs without names."""
    return join_words(f"{words} {join_words(names)}" for words, names in clauses if names)


def _from_to(values):
    """Return the smallest and the largest of {name: value} in words."""
    ends = dict.fromkeys((min(values, key=values.get), max(values, key=values.get)))
    return " to ".join(f"{values[name]:.2f} ({name})" for name in ends)


# ---- 1. Cost ----------------------------------------------------------------------------------------------


class Cost(Experiment):
    title = "Cost"
    question = "How do parameters, time and memory change as images grow and patches shrink?"

    def measure(self, setup):
        """Measure parameters, FLOPs, speed and memory of new models for several image sizes and patch sizes.

        Also fit the growth of the FLOPs: the exponent of the number of pixels.
        """
        data = dict(resolution={}, patch=[], exponents={})
        for name, model in setup.models.items():
            rows = []
            for size in sorted({*COUNTED_SIZES, *setup.sizes}):
                twin = _resized(model, img_size=size)
                row = dict(size=size, parameters=count_parameters(twin), flops=count_flops(twin))
                if size in setup.sizes:
                    row |= _costs_of(twin, size, setup.seconds)
                rows.append(row)
            data["resolution"][name] = rows
            flops = {row["size"]: row["flops"] for row in rows if row["size"] in COUNTED_SIZES}
            pixels, textbook = [size**2 for size in flops], [_textbook_cost(model, size) for size in flops]
            data["exponents"][name] = dict(flops=fitted_exponent(pixels, list(flops.values())),
                                           formula=fitted_exponent(pixels, textbook))
        vit = next((model for model in setup.models.values() if model.attends and adapt(model).projects_patches), None)
        for patch in setup.patches if vit is not None else ():
            twin = _resized(vit, img_size=PATCH_SIZE_IMAGE, patch_size=patch)
            data["patch"].append(dict(patch_size=patch, tokens=twin.patch_embed.n_patches, flops=count_flops(twin),
                                      parameters=count_parameters(twin), **_costs_of(twin, PATCH_SIZE_IMAGE,
                                                                                    setup.seconds)))
        return data

    def draw(self, data, setup=None):
        training = "Training: forward and backward"
        speeds = {"Inference": "images_per_second", training: "training_images_per_second"}
        memory = {"Inference": "peak_mib", training: "training_peak_mib"}
        flops = {name: [(row["size"], row["flops"] / 1e6) for row in rows]
                 for name, rows in data["resolution"].items()}
        side = "image side (pixels)"
        figures = {
            "cost_flops": plot_curves({"Counted": flops}, side, "MFLOPs per image", log=("x", "y"),
                                      title="Computation per image"),
            "cost_speed": plot_curves({heading: _against_size(data, key) for heading, key in speeds.items()}, side,
                                      "images per second", log=("x", "y"), title="Speed"),
            "cost_memory": plot_curves({heading: _against_size(data, key) for heading, key in memory.items()}, side,
                                       "MiB per image", log=("x", "y"), title="Memory in addition to the weights")}
        if data["patch"]:
            panels = {heading: {"ViT": [(row["patch_size"], row[key]) for row in data["patch"]]}
                      for heading, key in speeds.items()}
            title = f"Speed against patch size, for {PATCH_SIZE_IMAGE}-pixel images"
            figures["cost_patches"] = plot_curves(panels, "patch side (pixels)", "images per second",
                                                  log=("x", "y"), title=title)
        return figures

    def finding(self, data):
        timed = {name: [row for row in rows if "images_per_second" in row]
                 for name, rows in data["resolution"].items()}
        fastest = {}
        for end in (0, -1):
            leaders = rank_speeds({name: rows[end]["images_per_second"] for name, rows in timed.items()}).leaders
            fastest.setdefault(is_or_are(leaders), {})[str(next(iter(timed.values()))[end]["size"])] = None
        fastest = "; ".join(f"{who} fastest at {join_words(sizes)} pixels a side" for who, sizes in fastest.items())
        exponents = {name: row["flops"] for name, row in data["exponents"].items()}
        return (f"FLOPs grow with the number of pixels to the power {_from_to(exponents)}. In inference, {fastest}.")

    def tables(self, data):
        heads = ["", "side (px)", "parameters", "MFLOPs", "images/s", "training", "MiB per image", "training"]
        keys = ("images_per_second", "training_images_per_second", "peak_mib", "training_peak_mib")
        return [("New models with random weights on one machine; memory does not include the weights", [heads] + [
            [name, row["size"], f"{row['parameters']:,}", f"{row['flops'] / 1e6:,.1f}",
             *(f"{row[key]:,.4g}" if key in row else "" for key in keys)]
            for name, rows in data["resolution"].items() for row in rows]),
            ("Exponent of the number of pixels in the FLOPs (convolutions only: 1; attention products only: 2)",
             [["", "counted", "from the formula"]] + [
                 [name, f"{row['flops']:.2f}", f"{row['formula']:.2f}"] for name, row in data["exponents"].items()])]


def _resized(model, **changes):
    """Return a new model of the same class with random weights and this configuration, except for the changes."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return type(model)(**vars(model.config) | changes).eval()


def _costs_of(model, size, seconds):
    batch = max(1, min(32, 32 * 32**2 // size**2))
    images = torch.zeros(batch, 3, size, size)
    return dict(images_per_second=throughput(model, size, batch, seconds), batch=batch,
                training_images_per_second=throughput(model, size, batch, seconds, train=True),
                peak_mib=peak_memory(model, images) / 2**20 / batch,
                training_peak_mib=peak_memory(model, images, train=True) / 2**20 / batch)


def _textbook_cost(model, size):
    """Return the textbook count of multiplications, up to a constant factor.

    It is height x width for convolutions, and 12 n D^2 + 2 n^2 D for a block of attention and MLP on n tokens.
    """
    if not model.attends:
        return size**2
    n, D = (size // pair(model.config.patch_size, "patch_size")[0]) ** 2, model.config.embed_dim
    return 12 * n * D**2 + 2 * n**2 * D


def _against_size(data, key):
    """Return {model: [(image side, value), ...]} of one measured quantity."""
    return {name: [(row["size"], row[key]) for row in rows if key in row] for name, rows in data["resolution"].items()}


# ---- 2. Receptive field -----------------------------------------------------------------------------------


class ReceptiveField(Experiment):
    title = "Receptive field"
    question = "Which pixels influence a unit in the centre, layer by layer?"

    def measure(self, setup, n_images=32):
        """Measure the radii in pixels that hold MASS_FRACTIONS of the gradient of the centre unit, at every depth.

        Trained models are compared with random weights. For convolutional layers, the side of the theoretical window is
        included.
        """
        images, data = setup.images[:n_images], {}
        for name, model in setup.models.items():
            twin, rows = untrained_copy(model), []
            for depth in range(len(model.layers())):
                row = dict(depth=depth)
                centre = unit_centre(model, images.shape[2:], depth)
                for weights, which in (("trained", model), (RANDOM, twin)):
                    field = receptive_field(which, images, depth)
                    row[weights] = [radius_holding(field, share, centre) for share in MASS_FRACTIONS]
                if not model.attends or depth == 0:
                    row["window"] = max(theoretical_receptive_field(model, depth))
                rows.append(row)
            data[name] = rows
        return data

    def draw(self, data, setup=None):
        panels = {f"{weights}: radius that holds half": {
            name: [(row["depth"], row[weights][0]) for row in rows] for name, rows in data.items()}
            for weights in ("trained", RANDOM)}
        figures = {"receptive_field_radii": plot_curves(panels, "depth (blocks or stages)", "radius (pixels)",
                                                        title="Reach of the gradient of the centre unit")}
        if setup is not None:
            figures["receptive_fields"] = compare_receptive_fields(None, setup.models, setup.images[:32])
        return figures

    def finding(self, data):
        trained, random = ({name: rows[-1][weights][0] for name, rows in data.items()}
                           for weights in ("trained", RANDOM))
        wider, narrower, same = sort_by_change(random, trained, 0.5)
        radii = join_words(f"{radius:.1f} pixels ({name})" for name, radius in trained.items())
        changes = _clauses(("larger for", wider), ("smaller for", narrower), ("about the same for", same))
        return (f"In the last layer, half of the gradient of the centre unit lies within {radii}. Compared with random "
                f"weights, this radius is {changes}.")

    def tables(self, data):
        shares = [f"{share:.0%}" for share in MASS_FRACTIONS]
        return [("Radius in pixels that holds this fraction of the gradient, and side of the theoretical window", [
            ["", "depth", *shares, *(f"{share}, {RANDOM}" for share in shares), "window"]] + [
            [name, row["depth"], *(f"{radius:.1f}" for weights in ("trained", RANDOM) for radius in row[weights]),
             row.get("window", "")] for name, rows in data.items() for row in rows])]


# ---- 3. Attention distance --------------------------------------------------------------------------------


class AttentionDistance(Experiment):
    title = "Attention distance"
    question = "How far does a patch attend in each head?"

    def measure(self, setup, n_images=64):
        """Measure the mean attention distance in pixels, (L, H) for each model, trained and with random weights.

        Attention to CLS is either left out or counted as distance 0. Uniform attention is the second control.
        """
        images, data = setup.images[:n_images], {}
        for name, model in setup.models_with_attention().items():
            layout = model.patch_embed.grid_size, model.config.patch_size, model.n_prefix_tokens
            rows = {}
            for weights, which in (("trained", model), (RANDOM, untrained_copy(model))):
                maps = attention_maps(which, images)  # (L, N, H, tokens, tokens)
                rows[weights] = attention_distance(maps, *layout).tolist()
                rows[f"{weights}, CLS counted"] = attention_distance(maps, *layout, renormalise=False).tolist()
            data[name] = dict(rows, uniform=uniform_attention_distance(*layout[:2]))
        return data

    def draw(self, data, setup=None):
        if not data:
            return {}
        panels = {name: {words: [(block, *mean_min_max(heads)) for block, heads in enumerate(rows[weights], start=1)]
                         for words, weights in ((name, "trained"), (f"{name}, {RANDOM}", RANDOM))}
                  for name, rows in data.items()}
        uniform = {f"uniform: {rows['uniform']:.1f}": rows["uniform"] for rows in data.values()}
        return {"attention_distance": plot_curves(
            panels, "block", "mean distance (pixels)", lines=[*uniform.items()],
            title="Attention distance: mean of the heads (band: nearest to farthest)")}

    def finding(self, data):
        if not data:
            return "None of the models has attention."
        nearest = join_words(f"{min(rows['trained'][0]):.1f} pixels in {name}" for name, rows in data.items())
        uniform = join_words(dict.fromkeys(f"{rows['uniform']:.1f}" for rows in data.values()))
        learned = [name for name, rows in data.items()
                   if spread_is_learned(rows["trained"][0], rows[RANDOM][0], rows["uniform"])]
        return (f"The mean attention distance of the nearest head in the first block is {nearest} (uniform attention: "
                f"{uniform}). Compared with random weights, heads with clearly different distances appear in "
                f"{join_words(learned) or 'no model'}.")

    def tables(self, data):
        table = [["", "block", "trained", RANDOM, "trained, CLS as distance 0", "uniform"]]
        table += [[name, i + 1, *(_span(rows[key][i]) for key in ("trained", RANDOM, "trained, CLS counted")),
                   f"{rows['uniform']:.1f}"] for name, rows in data.items() for i in range(len(rows["trained"]))]
        return [("Mean distance in pixels, from the nearest to the farthest head of a block", table)] * bool(data)


def _span(heads):
    return f"{min(heads):.1f} to {max(heads):.1f}"


# ---- 4. Similarity of layers ------------------------------------------------------------------------------


class Similarity(Experiment):
    title = "Similarity of layers"
    question = "Which layers represent the images in a similar way?"

    def measure(self, setup, n_images=256):
        """Measure linear CKA between the layers of each model, trained and random, and between each pair of models."""
        images, names = setup.images[:n_images], list(setup.models)
        within = {name: layer_similarity(model, model, images).tolist() for name, model in setup.models.items()}
        random = {name: layer_similarity(twin, twin, images).tolist()
                  for name, twin in ((name, untrained_copy(model)) for name, model in setup.models.items())}
        across = {f"{a} and {b}": layer_similarity(setup.models[a], setup.models[b], images).tolist()
                  for i, a in enumerate(names) for b in names[i + 1:]}
        return {"within": within, RANDOM: random, "across": across}

    def draw(self, data, setup=None):
        within = {**data["within"], **{f"{name},\n{RANDOM}": matrix for name, matrix in data[RANDOM].items()}}
        label, title = "linear CKA", "Similarity of layers (1: equal up to rotation and scale)"
        figures = {"similarity_within": plot_matrices([torch.tensor(m) for m in within.values()], list(within), label,
                                                      "layer", "layer", most=1, title=title, columns=3)}
        if data["across"]:
            figures["similarity_across"] = plot_matrices(
                [torch.tensor(m) for m in data["across"].values()], list(data["across"]), label,
                "layer of the second model", "layer of the first model", most=1, title=title)
        return figures

    def finding(self, data):
        own, random = ({name: _off_diagonal_mean(matrix) for name, matrix in data[key].items()}
                       for key in ("within", RANDOM))
        more, less, same = sort_by_change(random, own, 0.05)
        changes = _clauses(("lower in", less), ("higher in", more), ("about the same in", same))
        return (f"The mean CKA of two different layers of a model is {_from_to(own)}. Compared with random weights, "
                f"it is {changes}.")

    def tables(self, data):
        rows = [["", "trained", RANDOM]]
        rows += [[name, f"{_off_diagonal_mean(matrix):.2f}", f"{_off_diagonal_mean(data[RANDOM][name]):.2f}"]
                 for name, matrix in data["within"].items()]
        pairs = [["", "last layers", "most similar layers"]]
        pairs += [[name, f"{matrix[-1][-1]:.2f}", f"{max(map(max, matrix)):.2f}"]
                  for name, matrix in data["across"].items()]
        return [("Linear CKA of two different layers of a model: mean", rows),
                *[("Linear CKA of two models", pairs)] * bool(data["across"])]


def _off_diagonal_mean(matrix):
    """Return the mean similarity of two different layers."""
    matrix = torch.tensor(matrix)
    return ((matrix.sum() - matrix.diagonal().sum()) / (matrix.numel() - len(matrix))).item()


# ---- 5. Position and shape --------------------------------------------------------------------------------


class Position(Experiment):
    title = "Position and shape"
    question = "What happens to the predictions if the image is shifted, or its patches are shuffled or hidden?"

    def measure(self, setup, n_images=300, n_shifted=64):
        """Measure shift consistency, and how many predictions stay correct when patches are shuffled or hidden.

        The ViT's own patches are shuffled, which leaves its tokens intact. One control is the same grid moved by half a
        patch. The other, for shuffles and shifts, is the same model with random weights, whose predictions hardly
        depend on the image. Hidden patches are black or filled with the mean.
        """
        images, labels = setup.images[:n_images], setup.labels[:n_images]
        shuffle = partial(shuffle_patches, patch_size=setup.patch_size, seed=0)
        changes = {
            "shuffled": shuffle, MOVED: partial(shuffle, offset=max(1, setup.patch_size // 2)),
            "hidden, mean": partial(occlude, patch_size=setup.patch_size, fill="mean", seed=0),
            "hidden, black": partial(occlude, patch_size=setup.patch_size, fill="black", seed=0,
                                     preprocessing=setup.preprocessing)}
        data = dict(n=len(images), n_shifted=min(n_shifted, len(images)), n_control=min(n_shifted // 4, len(images)),
                    shares=list(HIDDEN),
                    trained_shift=min(setup.trained_shift, setup.reach), classes=len(set(labels.tolist())), models={})
        few = images[:data["n_shifted"]]
        for name, model in setup.models.items():
            twin, stays = untrained_copy(model), shift_consistency(model, few, setup.reach)
            control = shift_consistency(twin, few[:data["n_control"]], data["trained_shift"])
            near, far = _consistencies(stays, data["trained_shift"])
            unchanged = {weights: {what: accuracy_curve(which, few, predictions(which, few), changes[what],
                                                        HIDDEN[-1:])[0] for what in ("shuffled", MOVED)}
                         for weights, which in (("trained", model), (RANDOM, twin))}
            start = accuracy_curve(model, images, labels, shuffle, HIDDEN[:1])
            curves = {what: start + accuracy_curve(model, images, labels, change, HIDDEN[1:])
                      for what, change in changes.items()}
            data["models"][name] = dict(shift_map=stays.tolist(), consistency=near, consistency_beyond=far,
                                        correct=curves, unchanged=unchanged,
                                        **{f"consistency, {RANDOM}": mean_consistency(control)})
        return data

    def draw(self, data, setup=None):
        panels = {what: {name: [(share, correct / data["n"], *wilson_interval(correct, data["n"]))
                                for share, correct in zip(data["shares"], model["correct"][what], strict=True)]
                         for name, model in data["models"].items()}
                  for what in ("shuffled", MOVED, "hidden, mean", "hidden, black")}
        maps = [torch.tensor(model["shift_map"]) for model in data["models"].values()]
        figures = {"patches_changed": plot_curves(panels, "fraction of the patches", "accuracy (%)", percent=True,
                                                  lines=[("guessing", 1 / data["classes"])],
                                                  title="Accuracy with patches shuffled or hidden (bands: 95%)"),
                   "shift_consistency": plot_matrices(maps, list(data["models"]), "fraction of unchanged predictions",
                                                      "shift to the right (pixels)", "shift down (pixels)", most=1,
                                                      centred=True,
                                                      title="Unchanged predictions when the image is shifted")}
        if setup is not None:
            figures["patches_examples"] = _draw_changed_patches(setup)
        return figures

    def finding(self, data):
        models = data["models"]
        shifted = rank_shares({name: model["consistency"] for name, model in models.items()}, data["n_shifted"])
        changed = {"shuffled": f"With {data['shares'][-1]:.0%} of the ViT's own patches shuffled",
                   MOVED: "With the shuffled grid moved by half a patch", "hidden, mean": "With the patches hidden"}
        kept = [f"{words}, {_describe_kept(models, change, data['n'], data['classes'])}."
                for change, words in changed.items()]
        return " ".join([f"By the fraction of predictions that stay the same when the image is shifted, "
                         f"{describe_leaders(shifted)}.", *kept])

    def tables(self, data):
        moved = [["", "as in training", "further", f"as in training, {RANDOM}"]]
        moved += [[name, f"{model['consistency']:.0%}",
                   "" if model["consistency_beyond"] is None else f"{model['consistency_beyond']:.0%}",
                   f"{model[f'consistency, {RANDOM}']:.0%}"] for name, model in data["models"].items()]
        share, whats = f"{data['shares'][-1]:.0%}", list(next(iter(data["models"].values()))["correct"])
        correct = [["", "unchanged image", *(f"{what}, {share}" for what in whats)]]
        correct += [[name, model["correct"]["shuffled"][0], *(counts[-1] for counts in model["correct"].values())]
                    for name, model in data["models"].items()]
        kept = [["", *(f"{what}, {share}{', ' + RANDOM if weights == RANDOM else ''}"
                       for what in ("shuffled", MOVED) for weights in ("trained", RANDOM))]]
        kept += [[name, *(f"{model['unchanged'][weights][what] / data['n_shifted']:.0%}"
                          for what in ("shuffled", MOVED) for weights in ("trained", RANDOM))]
                 for name, model in data["models"].items() if "unchanged" in model]
        return [(f"Unchanged predictions when the image is moved, for {data['n_shifted']} images "
                 f"({data['n_control']} with {RANDOM})", moved),
                (f"Correct predictions of {data['n']}", correct),
                *[(f"Unchanged predictions when patches are shuffled, for {data['n_shifted']} images", kept)]
                * (len(kept) > 1)]


def _draw_changed_patches(setup, n_images=5):
    """Draw images as they are, with half of the patches shuffled, and with half of them hidden."""
    images, patch = setup.images[:n_images], setup.patch_size
    rows = {"unchanged": images, "half shuffled": shuffle_patches(images, patch, 0.5),
            "half hidden": occlude(images, patch, 0.5)}
    return plot_images(torch.cat(list(rows.values())), [text for text, row in rows.items() for _ in row],
                       columns=n_images, preprocessing=setup.preprocessing, title="Patches shuffled and hidden")


def _consistencies(stays, within):
    """Return the mean of shift_consistency()'s map over offsets of up to `within` pixels, and over larger offsets.

    The second is None if there are no larger offsets.
    """
    reach = len(stays) // 2
    inner = stays[reach - within:reach + within + 1, reach - within:reach + within + 1]
    n_beyond = stays.numel() - inner.numel()
    return mean_consistency(inner), ((stays.sum() - inner.sum()) / n_beyond).item() if n_beyond else None


def _describe_kept(models, change, n, n_classes):
    """Describe how much accuracy each model keeps after a change, and which models are then no better than guessing."""
    counts = {name: (model["correct"][change][0], model["correct"][change][-1]) for name, model in models.items()}
    ranking, lost = rank_kept(counts, n, n_classes)
    learned = [name for name in counts if name in lost or (ranking and name in ranking.values)]
    if not learned:
        return "nothing can be compared: all models guess to begin with"
    first, *rest = (f"{name} keeps {counts[name][1] / counts[name][0]:.0%}" for name in learned)
    kept = join_words([f"{first} of its accuracy", *(words.replace(" keeps", "") for words in rest)])
    if not lost:
        return f"{kept}; all are better than guessing"
    return f"{kept}; {is_or_are(lost)} no better than guessing"


# ---- 6. A convolution as attention ------------------------------------------------------------------------


class ConvolutionIsAttention(Experiment):
    title = "A convolution as attention"
    question = "Can attention do what a convolution does?"

    def measure(self, setup, side=16):
        """Compare trained convolutions with attention layers that are set to equal them.

        Returns the largest differences for the 3 x 3 convolutions of the first ConvNet among the models, and the
        attention maps of one pixel, one for each head. The control is the same attention with a random projection.
        """
        model = next((model for model in setup.models.values() if not model.attends), None)
        convs = [nn.Conv2d(3, 8, 3, padding=1)] if model is None else [
            m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3 and m.stride[0] == 1]
        rows, maps = [], None
        generator = torch.Generator().manual_seed(0)
        for conv in convs:
            x = torch.randn(2, conv.in_channels, side, side, generator=generator)
            layer = ConvolutionAsAttention.from_conv(conv)
            with torch.no_grad():
                ours, attention = layer(x, return_attention=True)
                difference = (ours - conv(x)).abs().max().item()
                nn.init.kaiming_uniform_(layer.proj.weight, generator=generator)  # the control
                unset = (layer(x) - conv(x)).abs().max().item()
            rows.append(dict(channels=[conv.in_channels, conv.out_channels], difference=difference, unset=unset))
            middle = attention[:, side * side // 2 + side // 2]  # (9, M)
            maps = middle.unflatten(1, (side + 2, side + 2))[:, 5:-4, 5:-4].tolist()  # (9, 9, 9), around the pixel
        return dict(rows=rows, maps=maps, trained=model is not None)

    def draw(self, data, setup=None):
        return {"convolution_as_attention": plot_matrices(
            [torch.tensor(head) for head in data["maps"]], [f"head {i + 1}" for i in range(len(data["maps"]))],
            "attention weight", "columns from the pixel", "rows from the pixel", most=1, centred=True, columns=3,
            title="Nine heads, each fixed on one position in a 3 x 3 kernel")}

    def finding(self, data):
        worst = max(row["difference"] for row in data["rows"])
        if worst >= 1e-4:
            return f"Attention that is set to equal a convolution differs from it by up to {worst:.1e}."
        return (f"Attention with nine heads, each fixed on one position in the kernel, produces the same "
                f"numbers as a 3 x 3 convolution, to within {worst:.1e}.")

    def tables(self, data):
        return [("Largest difference between attention and convolution", [
            ["channels", "set to equal it", "random projection"]] + [
            [" to ".join(map(str, row["channels"])), f"{row['difference']:.1e}", f"{row['unset']:.2g}"]
            for row in data["rows"]])]


EXPERIMENTS = {
    "cost": Cost(),
    "receptive_field": ReceptiveField(),
    "attention_distance": AttentionDistance(),
    "similarity": Similarity(),
    "position": Position(),
    "convolution": ConvolutionIsAttention(),
}
