"""An interactive page of attention: one self-contained HTML file of images and one or two models.

explore(model, images, save_path, compare_with=None)    the same as AttentionVisualizer.explore

For a ViT, the file holds the queries and keys of every block and head. The page computes rows of attention from them
when needed, softmax(q k^T + bias), so its size grows with the number of tokens, not with its square. For a Swin
Transformer, the file holds the attention within each window. For a ConvNet, it holds the receptive field of each unit
at each depth. The page states the largest rounding error. explorer.html is the template.

Shapes:  L blocks, H heads, N tokens (prefix tokens, then patches), n patches, K classes, W width of a head,
         m matrices, H, W height and width of an image, D channels. In a Swin Transformer: W windows, M tokens of a
         window.
"""

import base64
import html
import io
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vit_bridge.analysis.capture import NoNumbers, capture, check_finite_numbers, differentiable, watch_layer
from vit_bridge.analysis.explanations import explain, logit_lens
from vit_bridge.analysis.receptive_field import channel_weights
from vit_bridge.analysis.windows import capture_windows
from vit_bridge.data.images import is_input, prepare_image
from vit_bridge.errors import InputError, check_int
from vit_bridge.models.adapters import adapt, adapt_attention, adapt_vit, reading_weights
from vit_bridge.models.protocol import class_name
from vit_bridge.runtime import at_least_float32, class_probabilities, unwrapped
from vit_bridge.system import write_whole
from vit_model import grid_of

PAGE = Path(__file__).with_name("explorer.html")  # the template; $NAME is a placeholder
MARK = b'<script id="data" type="application/json">'  # in each of our pages, including pages of older versions
N_CLASSES = 6  # in the logit lens
MB = 10**6
FINE_UP_TO = 10 * MB  # a page up to this size stores queries and keys in 16 bits, a larger one in 8
EMBED_UP_TO = 4 * MB  # a notebook embeds pages up to this size and links to the files of larger ones
LOSSLESS_UP_TO = 100_000  # bytes; a larger picture is stored as JPEG
LEAST_PATCHES = 16  # max_mb does not reduce an image below this many patches


@dataclass
class ExplorerPage:
    """A page that a notebook displays.

    Attributes
    ----------
    html : str
        The page.
    path : Path or None
        Where it was written.
    bits : int
        Bits of its queries and keys: 16, or 8 if the page would otherwise be too large. 8 if it has none.
    quantisation_error : float
        Largest difference from the model's own values, relative to the largest value in the same row.
    weight_error : float
        Largest absolute error of an attention weight.
    remarks : list of str
        What was chosen or omitted, as stated at the top of the page.
    grids : list of tuple
        (rows, columns) of the patches of each image, for the first model.
    """

    html: str
    path: Path | None
    bits: int
    quantisation_error: float
    weight_error: float
    remarks: list
    grids: list

    def describe_grids(self):
        """Describe the grids, each once."""
        return " and ".join(f"{rows} x {columns}" for rows, columns in dict.fromkeys(self.grids)) + " patches"

    @property
    def megabytes(self):
        return len(self.html.encode()) / MB

    def _repr_html_(self):
        size = 'width="100%" height="900" style="border:0" title="attention explorer"'
        if len(self.html) <= EMBED_UP_TO:
            return f'<iframe srcdoc="{html.escape(self.html, quote=True)}" {size}></iframe>'
        words = f"This page is {self.megabytes:.1f} MB, too large to store in a notebook"
        if self.path is None:
            return f"<p>{words}. Set <code>save_path</code> to show it from its file.</p>"
        address = html.escape(self.path.as_posix(), quote=True)
        return (f'<p>{words}. It is shown from its file, <a href="{address}" target="_blank">{address}</a>. If the '
                f'frame stays empty, open that file in a browser.</p><iframe src="{address}" {size}></iframe>')


@differentiable()
def explore(model, images, save_path="attention.html", compare_with=None, names=None, title="Where a ViT looks",
            whole=None, max_mb=None):
    """Make an interactive page of one or more images.

    Parameters
    ----------
    model : nn.Module
        A ViT or a Swin Transformer.
    images : image or list of images
        Any kind that data/images.py accepts. A float tensor must be normalised for `model`; it is renormalised for the
        second model.
    save_path : str or Path, optional
        Where to write the page. An earlier page of this kind is replaced. None writes nothing.
    compare_with : nn.Module, optional
        A second model: a ViT, a Swin Transformer, or a ConvNet, whose receptive field is shown at the same position.
    names : sequence of str, optional
        Names of the models; by default their class names.
    title : str, optional
        Heading of the page.
    whole : Whole, optional
        The models see whole photographs in their own proportions; they must then accept any size. By default, they see
        the centre, as in validation. A limit on patches is that of the first model. A second model of another kind
        gets a limit in proportion to the patches that it was built for.
    max_mb : float, optional
        Maximum size of the page in MB (10^6 bytes). With `whole`, each image gets as many patches as fit, and the page
        states how many.

    Returns
    -------
    ExplorerPage

    Raises
    ------
    InputError
        If the first model has no attention, if an image cannot be used, if `save_path` is a file that is not a page of
        this kind, or if the page cannot be made small enough.
    """
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if not images:
        raise InputError("there is no image to explore; pass at least one")
    if max_mb is not None and not (isinstance(max_mb, (int, float)) and 0 < max_mb < math.inf):
        raise InputError(f"max_mb {max_mb!r} is out of range; expected a number of MB above 0, such as 10")
    model = unwrapped(model)
    models = [model] if compare_with is None else [model, unwrapped(compare_with)]
    adapt_attention(model)
    names = list(names) if names else [class_name(one) for one in models]
    if len(names) != len(models):
        raise InputError(f"{len(names)} names were passed for {len(models)} models; pass one for each model")
    if save_path is not None:
        is_page(save_path)
    page = _fitting_page(models, names, images, title, whole, math.inf if max_mb is None else max_mb * MB)
    if save_path is not None:
        write_whole(save_path, lambda file: file.write(page.html.encode()))
    return replace(page, path=None if save_path is None else Path(save_path))


def is_page(path):
    """Return whether the file at path is one of our pages; False if the path does not exist.

    Raises InputError for any other file: explore does not overwrite it.
    """
    path = Path(path)
    if not path.exists():
        return False
    if path.is_dir():
        raise InputError(f"cannot write the page as {str(path)!r}, which is a folder; pass the name of a file in it, "
                         f"such as {str(path / 'attention.html')!r}")
    with open(path, "rb") as file:
        if MARK not in file.read(2**17):
            raise InputError(f"{str(path)!r} exists and is not a page that explore wrote, so it is not overwritten; "
                             f"choose another name for the page, or remove the file")
    return True


# ---- A page that fits -----------------------------------------------------------------------------------------


def _fitting_page(models, names, images, title, whole, most):
    """Make the ExplorerPage of at most `most` bytes.

    The page uses 16 bits if it stays small, otherwise 8 bits, and fewer patches if it is still too large.
    """
    wanted = None  # patches of an image before any reduction
    while True:
        prepared = [[_prepare_for(image, one, models[0], whole) for image in images] for one in models]
        fed = [[image for image, _ in own] for own in prepared]
        used = max(math.prod(adapt(models[0]).grid(image)) for image in fed[0])
        wanted = wanted or used
        coarse = _keep_attention(models, fed, 8)
        size = coarse.blobs.n_bytes
        if size <= most:
            described = [_describe(*one) for one in zip(models, names, fed, strict=True)]
            pictures = [dict(name=_image_name(image, i), pngs=_pngs_of([picture for _, picture in own]))
                        for i, (image, *own) in enumerate(zip(images, *prepared, strict=True), start=1)]
            said = [] if used == wanted else [
                f"To keep this page within {most / MB:g} MB, its images have at most {used:,} patches instead of "
                f"{wanted:,}."]
            page = _page_of(described, coarse, pictures, title, said)
            size = len(page.html.encode())
            if coarse.holds_keys and size + 1.2 * coarse.blobs.n_bytes <= min(most, FINE_UP_TO):
                return _page_of(described, _keep_attention(models, fed, 16), pictures, title, said)
            if size <= most:
                return page
        whole = _with_fewer(whole, models, images, used, size, most)


def _with_fewer(whole, models, images, used, size, most):
    """Return a Whole with fewer patches than `used`, which made a page of more than `most` bytes.

    Raises InputError if the number of patches cannot be reduced.
    """
    over = f"takes at least {size / MB:.2g} MB, more than max_mb {most / MB:g}"
    if used <= LEAST_PATCHES:
        raise InputError(f"the page {over}, even with only {used} patches per image; set a larger max_mb or use "
                         f"fewer images")
    sizes_given = whole is None or whole.img_size is not None or any(is_input(image) for image in images)
    if sizes_given or not all(adapt(model).any_size for model in models):
        raise InputError(f"the page {over}, and the size of its images is fixed; set a larger max_mb, use fewer "
                         f"images, or use photographs with whole=Whole() and no img_size for a model that accepts any "
                         f"size")
    return replace(whole, max_tokens=max(LEAST_PATCHES, min(used - 1, int(0.99 * used * most / size))))


def _page_of(described, kept, pictures, title, said):
    """Make the ExplorerPage from models and images (_describe) and their attention (_keep_attention)."""
    models, remarks = [], list(said)
    for one, attention in zip(described, kept.parts, strict=True):
        own = [image["facts"] | dict(attention=part) | {name: kept.blobs.add(*array) for name, array in
                                                        image["arrays"].items()}
               for image, part in zip(one["images"], attention, strict=True)]
        heads = attention[0]["heads"] if attention[0] else 1
        remarks += [remark for remark in one["remarks"] if remark not in remarks]
        models.append(one["facts"] | dict(heads=heads, images=own))
    bytes_error = max((one["error"] for one in described), default=0)
    note = _note_of(models, pictures, kept, bytes_error)
    data = dict(models=models, pictures=pictures, bits=kept.bits, blobs=list(kept.blobs.texts))
    return ExplorerPage(fill(data, title, note, " ".join(remarks)), None, kept.bits,
                        max(kept.largest_error, bytes_error), kept.weight_error, remarks,
                        [(image["rows"], image["columns"]) for image in models[0]["images"]])


def _note_of(models, pictures, kept, bytes_error):
    """Return the note at the bottom of the page."""
    note = ""
    if kept.holds_keys:
        most, usual = (f"{100 * error:.2g}%" for error in (kept.errors.max(), kept.errors.median()))
        note = (f"The page computes attention as softmax(q kᵀ + bias), from queries and keys of {kept.bits} bits. Over "
                f"all blocks, heads and rows, a weight differs from the model's own by at most "
                f"{100 * kept.weight_error:.2g} percentage points. Relative to the largest weight in its row, it "
                f"differs by at most {most}, and by at most {usual} in half of the rows. ")
    if kept.window_error:
        note += (f"Attention within windows is stored as bytes; its error is at most {kept.window_error:.2%} of the "
                 f"largest weight in a row. Windows that reach beyond the image hold padding; attention to it is not "
                 f"shown. ")
    if any("relevance" in image for model in models for image in model["images"]):
        note += "Relevance omits the initial relevance of each token for itself. "
    if bytes_error:
        note += (f"Receptive fields of the ConvNet are stored as bytes; their error is at most {bytes_error:.2%} of "
                 f"the largest value in a row. ")
    note += "The page needs no other file and no network access."
    if len(models) > 1:
        note += (" The controls offer as many blocks and heads as the larger model has; a model with fewer shows its "
                 "last one.")
    if any(model["kind"] == "swin" for model in models):
        note += " In a Swin Transformer, stages have different numbers of heads; the control offers those of the block."
    if any(len(one["pngs"]) > 1 for one in pictures):
        note += (" Each model is shown with its own input, cropped and resized as required; the same position in both "
                 "inputs may not be exactly the same position in the photograph.")
    return note


def fill(data, title, note, remark=""):
    """Fill the template with data, escaped so that the data cannot end the script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    colours = np.round(255 * matplotlib.colormaps["viridis"](np.linspace(0, 1, 64))[:, :3]).astype(int).tolist()
    page = Template(PAGE.read_text(encoding="utf-8"))
    return page.safe_substitute(TITLE=html.escape(title), NOTE=html.escape(note), REMARK=html.escape(remark), DATA=text,
                                SIZE=f"{len(text) / MB:.1f} MB", COLOURS=json.dumps(colours))


class Blobs:
    """Arrays as text: deflated, then encoded in base64, as the page unpacks them.

    Equal arrays are stored once.
    """

    def __init__(self):
        self.texts = {}

    def add(self, values, kind):
        """Store values as numbers of a kind, such as "<f4", and return the index of their blob."""
        raw = np.ascontiguousarray(values).astype(kind).tobytes()
        return self.texts.setdefault(base64.b64encode(zlib.compress(raw, 6)).decode(), len(self.texts))

    @property
    def n_bytes(self):
        return sum(map(len, self.texts))


# ---- Attention, as the page computes it -------------------------------------------------------------------


@dataclass
class Kept:
    """The attention of models and images, as the page stores it.

    Attributes
    ----------
    parts : list
        For each model and image, the most heads of a block and the data of the blocks; {} for a model without
        attention.
    errors : Tensor, shape (m,)
        Error of each row of every map that is computed from queries and keys, relative to its largest weight.
    window_error : float
        Largest such error of a row within a window.
    weight_error : float
        Largest error of a weight.
    """

    bits: int
    blobs: Blobs = field(default_factory=Blobs)
    parts: list = field(default_factory=list)
    errors: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    window_error: float = 0.0
    weight_error: float = 0.0

    @property
    def holds_keys(self):
        """Whether any attention is computed from queries and keys."""
        return len(self.errors) > 0

    @property
    def largest_error(self):
        """Largest error of a row of either sort."""
        return max(self.window_error, self.errors.max().item() if self.holds_keys else 0.0)


def _keep_attention(models, fed, bits):
    """Return the Kept of models, each with its own images (1, C, H, W)."""
    kept = Kept(bits)
    for model, images in zip(models, fed, strict=True):
        images = tqdm(images, desc=f"attention in {bits} bits", unit="image", delay=5, leave=False, disable=None)
        kept.parts.append([KINDS[_kind(model)].keep(model, image, kept) for image in images])
    return kept


def _keep_nothing(model, image, kept):
    """Return no data: a ConvNet has no attention."""
    return {}


def _keep_vit(model, image, kept):
    """Return the attention of a ViT for one image. Only one block's maps are in memory at a time."""
    adapter, errors = adapt_vit(model), []
    readers = _readers(adapter, adapter.grid(image)) if adapter.reads_patches else None

    def keep(block, attended):
        check_finite_numbers(model, attended.maps)
        part, error = _keep_block(attended, readers, kept)
        errors.append(error)
        return part

    layers = capture(model, image, keep=keep).maps
    kept.errors = torch.cat([kept.errors, *errors])
    return dict(heads=layers[0]["heads"], layers=layers)


def _readers(adapter, grid):
    """Return the weight with which the classifier head reads each token, (N,); the weights sum to 1.

    Raises InputError if the head does not read a weighted sum of tokens.
    """
    return reading_weights(adapter.pool, adapter.n_prefix, adapter.n_prefix + math.prod(grid)).float()


def _keep_block(attended, readers, kept):
    """Return the data of one block of one image for the page, and the error of each row of its maps, (H N).

    score_ij = sum_d weight_d q_id k_jd + lift_j + step bias_ij, with integers q, k and bias. Softmax does not change if
    all keys are shifted by one vector, so their mean is subtracted first. The mean of the queries is subtracted too;
    its contribution, the same in each row, is `lift`. Each channel of each head has its own scale. For "who looks at
    it", the page stores the log-sum-exp of each row of scores. If the scores are not a product of queries and keys, the
    logarithms of the maps serve as the bias.
    """
    maps = at_least_float32(attended.maps[0].detach().cpu())  # (H, N, N)
    heads, n = maps.shape[:2]
    levels, kind = 2 ** (kept.bits - 1) - 1, f"<i{kept.bits // 8}"
    query, key, bias = (None if part is None else part.detach().cpu().to(maps.dtype)
                        for part in (attended.query, attended.key, attended.bias))
    if query is None:
        query = key = maps.new_zeros(1, heads, n, 0)
        bias = maps.clamp(min=torch.finfo(torch.float32).eps).log().masked_fill(maps == 0, -math.inf)
    query, key = query[0], key[0] - key[0].mean(dim=1, keepdim=True)  # (H, N, W)
    centre = query.mean(dim=1, keepdim=True)  # (H, 1, W)
    lift = (key @ centre.mT)[:, :, 0]  # (H, N)
    (q, q_step), (k, k_step) = (_round(part, (1,), levels) for part in (query - centre, key))
    weight = (q_step * k_step).float()  # (H, 1, W)
    scores = (q * weight) @ k.mT + lift[:, None]  # (H, N, N)
    part, floats = dict(heads=heads, width=key.shape[2], biased=0), [weight, lift]
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)][0].expand(-1, n, n)  # (H or 1, N, N)
        hidden = bias.isinf()
        middle = (bias.masked_fill(hidden, -math.inf).amax(dim=(1, 2), keepdim=True)
                  + bias.masked_fill(hidden, math.inf).amin(dim=(1, 2), keepdim=True)) / 2  # softmax ignores this shift
        codes, step = _round((bias - middle).masked_fill(hidden, 0), (1, 2), levels)
        scores += (codes * step).masked_fill(hidden, -math.inf)
        part |= dict(biased=len(bias), bias=kept.blobs.add(codes.masked_fill(hidden, -levels - 1), kind))
        floats.append(step)
    shown = scores.softmax(dim=2)
    floats.append(scores.logsumexp(dim=2))  # (H, N)
    if readers is not None:  # averages over many rows are stored: the classifier head's row and column
        floats += [readers.to(shown) @ shown, shown @ readers.to(shown)]  # 2 x (H, N)
    part |= dict(numbers=kept.blobs.add(torch.stack([q, k]), kind),
                 floats=kept.blobs.add(torch.cat([values.flatten() for values in floats]), "<f4"))
    differences = (shown - maps).abs().amax(dim=2)  # (H, N)
    kept.weight_error = max(kept.weight_error, differences.max().item())
    return part, (differences / maps.amax(dim=2)).flatten()


def _keep_swin(model, image, kept):
    """Return the attention of a Swin Transformer for one image. Only one block's maps are in memory at a time."""

    def keep(attended):
        check_finite_numbers(model, attended.maps)
        return _keep_windows(attended, kept)

    layers = capture_windows(model, image, keep)[0]
    return dict(heads=max(layer["heads"] for layer in layers), layers=layers)


def _keep_windows(attended, kept):
    """Return the data of one block of one image for the page: its attention within windows, as bytes.

    Rows and columns of padding are 0, so that the error is relative to the largest weight on the image.
    """
    places = attended.places  # (W, M)
    inside = places < math.prod(attended.size)  # (W, M)
    maps = attended.maps[0].transpose(0, 1) * (inside[:, :, None] & inside[:, None])  # (H, W, M, M)
    heads, maps = len(maps), maps.flatten(0, 1)  # (H W, M, M)
    values, factors, error = _bytes_of(maps)
    kept.window_error = max(kept.window_error, error)
    kept.weight_error = max(kept.weight_error, (values * factors - maps).abs().max().item())
    rows, columns = attended.size
    return dict(heads=heads, rows=rows, columns=columns, stage=attended.stage, window=attended.window,
                shift=attended.shift, places=kept.blobs.add(places, "<i4"),
                values=kept.blobs.add(values, "u1"), factors=kept.blobs.add(factors, "<f4"))


def _round(values, over, levels):
    """Round values to integers from -levels to levels; return (integers, step size).

    The largest value of each group maps to the end of the range; `over` lists the dimensions of a group.
    """
    steps = (values.abs().amax(dim=over, keepdim=True) / levels).clamp(min=1e-30)
    return (values / steps).round(), steps


# ---- Descriptions of models for the page -------------------------------------------------------------------


def _describe(model, name, images):
    """Describe a model and its results for the images, each (1, C, H, W), except attention.

    Returns a dict with the keys facts (as the page reads them); images (facts of each image, and its arrays as
    name -> (values, kind of number)); error (of the values stored as bytes); and remarks (what was omitted).
    """
    return KINDS[_kind(model)].describe(model, name, images)


def _describe_vit(model, name, images):
    """Describe a ViT for the page."""
    adapter, remarks = adapt_vit(model), []
    own = [_describe_image(model, adapter, image, remarks)
           for image in tqdm(images, desc="explanations", unit="image", delay=5, leave=False, disable=None)]
    readers = _readers(adapter, adapter.grid(images[0]))
    reads = None if adapter.reads_patches else [[int(i), readers[i].item()] for i in readers.nonzero()[:, 0]]
    facts = dict(kind="vit", name=name, layers=len(adapter.blocks), prefix=list(adapter.prefix), pool=adapter.pool,
                 head=adapter.has_head, reads=reads, patch=adapter.patch_size)
    return dict(facts=facts, images=own, error=0.0, remarks=remarks)


def _describe_image(model, adapter, image, remarks):
    text, arrays = _no_words(), {}
    for method in ("rollout", "relevance") if adapter.has_head else ("rollout",):
        try:
            saliency = explain(model, image, method).saliency[0]  # (rows, columns)
        except NoNumbers:
            raise
        except InputError as error:
            remarks.append(f"{method.capitalize()} is omitted: {error}.")
            continue
        check_finite_numbers(model, saliency)
        arrays[method] = saliency.flatten(), "<f4"
    if adapter.has_head:
        text = words(logit_lens(model, image)[:, 0], adapter.class_names)
    rows, columns = adapter.grid(image)
    return dict(facts=dict(text, rows=rows, columns=columns), arrays=arrays)


def _describe_swin(model, name, images):
    """Describe a Swin Transformer for the page. Rows and columns are those of the first stage."""
    adapter, own = adapt(model), []
    for image in images:
        rows, columns = adapter.grid(image)
        own.append(dict(facts=dict(_answer(model, image), rows=rows, columns=columns), arrays={}))
    facts = dict(kind="swin", name=name, layers=len(adapter.blocks), stages=[len(stage) for stage in adapter.stages],
                 prefix=[], pool=adapter.pool, head=adapter.has_head, reads=None, patch=adapter.patch_size)
    return dict(facts=facts, images=own, error=0.0, remarks=[])


def _answer(model, image):
    """Return the `words` of a model's prediction for one image, without a logit lens."""
    answer = class_probabilities(model, image).cpu()  # (1, K)
    check_finite_numbers(model, answer)
    return words(answer, adapt(model).class_names) if adapt(model).has_head else _no_words()


def _no_words():
    """Return the `words` of a model without a head."""
    return dict(prediction="", target="", lens=dict(classes=[], rows=[], says=[]))


def words(lens, class_names):
    """Format the prediction and the logit lens, probabilities (L + 1, K), for the page.

    The lens consists of the most likely class after each block, and the probabilities of the classes that are most
    likely at the end.
    """
    named = class_names or [f"class {label}" for label in range(lens.shape[1])]
    shown = lens[-1].topk(min(N_CLASSES, lens.shape[1])).indices.tolist()
    best = lens.argmax(dim=1).tolist()
    says = [f"{named[label]} ({row[label]:.0%})" for label, row in zip(best, lens.tolist(), strict=True)]
    rows = [[round(value, 4) for value in row] for row in lens[:, shown].tolist()]
    return dict(prediction=says[-1], target=named[best[-1]],
                lens=dict(classes=[named[label] for label in shown], rows=rows, says=says))


def _bytes_of(matrices):
    """Round matrices (m, n, n) to bytes, each row from 0 to its largest value: (values, factors, error).

    The error is the largest difference relative to that value, at most 1 / 510.
    """
    matrices = matrices.detach().cpu().double()
    factors = (matrices.amax(dim=2, keepdim=True) / 255).clamp(min=1e-30).float()  # (m, n, 1)
    values = (matrices / factors).round().clamp(0, 255)
    errors = (values * factors - matrices).abs() / matrices.amax(dim=2, keepdim=True).clamp(min=1e-30)
    return values, factors, errors.max().item()


# ---- ConvNets ----------------------------------------------------------------------------------------------


def _describe_convnet(model, name, images, side=8):
    """Describe a ConvNet for the page.

    For every depth, the description holds the share of each image patch in the gradient of each unit. The image is cut
    into side x side patches, or fewer if it has fewer pixels.
    """
    check_int("side", side, 1)
    n_depths, own, worst = len(adapt(model).layers), [], 0.0
    for image in images:
        rows, columns = (min(side, n) for n in image.shape[2:])
        fields = torch.stack([_unit_fields(model, image, depth, (rows, columns)) for depth in range(n_depths)])
        values, factors, error = _bytes_of(fields)  # (depths, n, n)
        check_finite_numbers(model, fields)
        own.append(dict(facts=dict(_answer(model, image), rows=rows, columns=columns),
                        arrays=dict(values=(values, "u1"), factors=(factors, "<f4"))))
        worst = max(worst, error)
    depths = ["the stem", *(f"stage {i}" for i in range(1, n_depths))]
    facts = dict(kind="cnn", name=name, layers=n_depths, prefix=[], pool="mean", depths=depths)
    return dict(facts=facts, images=own, error=worst, remarks=[])


def _unit_fields(model, image, depth, grid):
    """Return (n, n); row i is the share of every patch in the gradient of the unit in the middle of patch i.

    It is the gradient of a weighted sum over channels, as in `receptive_field`, which measures the unit in the centre
    of the image.
    """
    rows = []
    pixels, output, _ = watch_layer(model, adapt(model).layers[depth], image)  # (1, 3, H, W), the layer's own shape
    features = adapt(model).as_map(output, image, depth)  # (1, D, rows, columns)
    for row in range(grid[0]):
        for column in range(grid[1]):
            y, x = (int((place + 0.5) / n * count) for place, n, count in zip((row, column), grid, features.shape[2:],
                                                                              strict=True))
            unit = features[0, :, y, x]  # (D)
            gradient, = torch.autograd.grad((unit * channel_weights(unit)).sum(), pixels, retain_graph=True)
            field = torch.nn.functional.adaptive_avg_pool2d(gradient.abs().mean(dim=1), grid).flatten()  # (n)
            rows.append(field / field.sum().clamp(min=1e-30))
    return torch.stack(rows)  # (n, n)


# ---- Pictures ---------------------------------------------------------------------------------------------


def _prepare_for(image, model, first, whole):
    """Prepare an image as `prepare_image` does, for one of the models.

    A float tensor is normalised for the first model and renormalised for the second.
    """
    if whole is not None:
        whole = replace(whole, max_tokens=_limit_for(model, first, whole.max_tokens))
    images, picture = prepare_image(image, model, whole)  # (1, C, H, W), (H, W, 3)
    if not is_input(image) or model is first:
        return images, picture
    mean, std, own_mean, own_std = (torch.tensor(values).view(-1, 1, 1) for one in (first, model)
                                    for values in (adapt(one).preprocessing.mean, adapt(one).preprocessing.std))
    return images * (std / own_std) + (mean - own_mean) / own_std, prepare_image(image, first)[1]


def _limit_for(model, first, most):
    """Return the limit on patches of a model if that of the first model is `most`; None for no limit.

    For a model of another kind, it is in proportion to the patches that it was built for. A ConvNet has no patches.
    """
    if _kind(model) == _kind(first) or most is None:
        return most
    if _kind(model) == "cnn":
        return None
    built, built_first = (math.prod(grid_of(one.img_size, one.patch_size)) for one in map(adapt, (model, first)))
    return max(1, most * built // built_first)


def _image_name(image, number):
    return Path(image).name if isinstance(image, (str, Path)) else f"image {number}"


def _as_uri(picture):
    """Encode a picture (H, W, 3) in 0..1 as a data URI: a PNG, or a high-quality JPEG if the PNG is large."""
    image = Image.fromarray(np.round(255 * picture).astype(np.uint8))
    for kind, options in (("png", dict(optimize=True)), ("jpeg", dict(quality=92, subsampling=0))):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        if buffer.tell() <= LOSSLESS_UP_TO:
            break
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def _pngs_of(pictures):
    """Encode one picture for each model as data URIs; equal pictures are encoded only once."""
    return list(dict.fromkeys(_as_uri(picture) for picture in pictures))


# ---- Kinds of models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How the page holds models of one kind.

    Attributes
    ----------
    describe : callable
        (model, name, images) -> its description, as from `_describe`.
    keep : callable
        (model, image, Kept) -> the data of its attention for an image, an entry of Kept.parts.
    """

    describe: Callable
    keep: Callable


KINDS = dict(vit=Kind(_describe_vit, _keep_vit), swin=Kind(_describe_swin, _keep_swin),
             cnn=Kind(_describe_convnet, _keep_nothing))


def _kind(model):
    """Return the kind of a model, a key of KINDS. The page uses the same words."""
    adapter = adapt(model)
    return "swin" if adapter.windowed else "vit" if adapter.attends else "cnn"
