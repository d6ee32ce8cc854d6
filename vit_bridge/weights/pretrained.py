"""Trained models: ours, public ones by name, and those in a checkpoint."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.error import URLError

import torch
from torchvision.models import ViT_B_16_Weights

from vit_bridge.errors import InputError, check_choice, first_line
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.registry import CLASSES, CONFIGS, check_arguments
from vit_bridge.weights.checkpoints import (
    CHECKPOINT_FORMAT,
    describe_checkpoint,
    load_checkpoint,
    read_checkpoint,
    read_file,
)
from vit_model import VARIANTS, VisionTransformer, pair

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Pretrained:
    """A public checkpoint.

    variant        row of vit_model.VARIANTS; `config` overrides its fields
    url            where the file is; None: ours, in benchmarks/weights
    checksum       as published, "sha256:" or "md5:" and the first hex digits of the file's sum; None: none published
    top1           accuracy on ImageNet-1k's validation images in per cent, as its authors report it: of the model as
                   it is, or where it has no head as `measured` says
    licence        of the weights
    source         who made it: paper and repository
    """
    variant: str
    url: str
    checksum: str | None
    top1: float
    licence: str
    source: str
    measured: str = "as it is"
    mean: tuple = IMAGENET["mean"]
    std: tuple = IMAGENET["std"]
    interpolation: str = "bicubic"
    config: dict = field(default_factory=dict)

    @property
    def arguments(self):
        """Those of VisionTransformer; without a head of its own the model has n_classes=0."""
        return vars(replace(VARIANTS[self.variant], **self.config))


def deit(variant, file, checksum, top1, **config):
    return Pretrained(variant, f"https://dl.fbaipublicfiles.com/deit/{file}", checksum, top1, "Apache-2.0",
                      "DeiT, Touvron et al. 2021, github.com/facebookresearch/deit", config=config)


def deit3(variant, file, top1):
    return Pretrained(variant, f"https://dl.fbaipublicfiles.com/deit/{file}", None, top1, "Apache-2.0",
                      "DeiT-III, Touvron et al. 2022, github.com/facebookresearch/deit",
                      config=dict(layer_scale=1e-4))


def of_torchvision(variant, file, checksum, top1):
    return Pretrained(variant, f"https://download.pytorch.org/models/{file}", checksum, top1, "BSD-3-Clause",
                      "torchvision, IMAGENET1K_V1, github.com/pytorch/vision", interpolation="bilinear")


def dino(variant, folder, top1):
    return Pretrained(variant, f"https://dl.fbaipublicfiles.com/dino/{folder}/{folder}.pth", None, top1, "Apache-2.0",
                      "DINO, Caron et al. 2021, github.com/facebookresearch/dino",
                      "a linear classifier on features of its last blocks", config=dict(n_classes=0))


def dinov2(variant, name, top1, n_registers=0):
    file = f"{name}_reg4_pretrain.pth" if n_registers else f"{name}_pretrain.pth"
    paper = "Darcet et al. 2024" if n_registers else "Oquab et al. 2023"
    return Pretrained(variant, f"https://dl.fbaipublicfiles.com/dinov2/{name}/{file}", None, top1, "Apache-2.0",
                      f"DINOv2, {paper}, github.com/facebookresearch/dinov2",
                      "a linear classifier on its features, at 224 pixels",
                      config=dict(n_classes=0, img_size=518, patch_size=14, layer_scale=1e-5, n_registers=n_registers))


def mae(variant, file, checksum, top1):
    return Pretrained(variant, f"https://dl.fbaipublicfiles.com/mae/pretrain/{file}", checksum, top1, "CC-BY-NC-4.0",
                      "MAE, He et al. 2022, github.com/facebookresearch/mae", "after fine-tuning the whole model",
                      config=dict(n_classes=0))


# Names are those of their authors. Published sums: DeiT's and torchvision's stand in the names of their files.
PUBLIC = {
    "deit_tiny_patch16_224": deit("vit_tiny", "deit_tiny_patch16_224-a1311bcf.pth", "sha256:a1311bcf", 72.2),
    "deit_small_patch16_224": deit("vit_small", "deit_small_patch16_224-cd65a155.pth", "sha256:cd65a155", 79.9),
    "deit_base_patch16_224": deit("vit_base", "deit_base_patch16_224-b5f2ef4d.pth", "sha256:b5f2ef4d", 81.8),
    "deit_base_patch16_384": deit("vit_base", "deit_base_patch16_384-8de9b5d1.pth", "sha256:8de9b5d1", 82.9,
                                  img_size=384),
    "deit3_small_patch16_224": deit3("vit_small", "deit_3_small_224_1k.pth", 81.4),
    "deit3_base_patch16_224": deit3("vit_base", "deit_3_base_224_1k.pth", 83.8),
    "deit3_large_patch16_224": deit3("vit_large", "deit_3_large_224_1k.pth", 84.9),
    "vit_b_16": of_torchvision("vit_base", "vit_b_16-c867db91.pth", "sha256:c867db91", 81.072),
    "vit_l_16": of_torchvision("vit_large", "vit_l_16-852ce7e3.pth", "sha256:852ce7e3", 79.662),
    "dino_vits16": dino("vit_small", "dino_deitsmall16_pretrain", 77.0),
    "dino_vitb16": dino("vit_base", "dino_vitbase16_pretrain", 78.2),
    "dinov2_vits14": dinov2("vit_small", "dinov2_vits14", 81.1),
    "dinov2_vitb14": dinov2("vit_base", "dinov2_vitb14", 84.5),
    "dinov2_vitl14": dinov2("vit_large", "dinov2_vitl14", 86.3),
    "dinov2_vits14_reg": dinov2("vit_small", "dinov2_vits14", 80.9, n_registers=4),
    "dinov2_vitb14_reg": dinov2("vit_base", "dinov2_vitb14", 84.6, n_registers=4),
    "dinov2_vitl14_reg": dinov2("vit_large", "dinov2_vitl14", 86.7, n_registers=4),
    "mae_vit_base_patch16": mae("vit_base", "mae_pretrain_vit_base.pth", "md5:8cad7c", 83.664),
    "mae_vit_large_patch16": mae("vit_large", "mae_pretrain_vit_large.pth", "md5:b8b06e", 85.952),
}
# Trained by us on the built-in shapes; the commands and accuracies are in benchmarks/RESULTS.md.
OURS = ("vit_nano_shapes", "hybrid_shapes", "convnet_shapes")
OURS_FOLDER = Path(__file__).parent / "shipped"
PRETRAINED = (*OURS, *PUBLIC)
# What may differ from the configuration that weights were trained in.
FREE = ("img_size", "dropout", "drop_path")


def create_pretrained(name, n_classes=None, **overrides):
    """A trained model of the table PRETRAINED, in eval mode, with class_names, img_size, mean, std, interpolation.

    name        in the table, or the path of a checkpoint: ours, or one of a ViT in any format that load_checkpoint
                knows (whose mean and std are taken to be ImageNet's)
    n_classes   None: the head of the checkpoint, or none where it has none (the model then gives features, (B, D));
                a number: a new head, untrained, unless it is the checkpoint's own number
    overrides   img_size (resamples the positions), dropout, drop_path; pool of a public one without its own head.
                Any other field belongs to the weights, and is refused if it is not theirs

    A public file is fetched once, with torch.hub, into its usual folder of checkpoints. Raises InputError for an
    unknown name or field; where the file cannot be fetched (with its address, and where to put it by hand) or is
    damaged; and where one of ours is not beside this module (weights are part of the checkout, so install with
    `pip install -e .`).
    """
    if name not in PRETRAINED and Path(name).is_file():
        return model_of_file(name, n_classes, overrides)
    if name not in PRETRAINED and Path(name).is_dir():
        raise InputError(f"{name} is a folder; expected the path of a checkpoint in it, such as "
                         f"{Path(name) / 'best.pt'}, or one of {', '.join(PRETRAINED)}")
    if Path(name).suffix:
        raise InputError(f"there is no file {name}; expected the path of a checkpoint, or one of "
                         f"{', '.join(PRETRAINED)}")
    check_choice("model", name, PRETRAINED)
    if name in OURS:
        path = OURS_FOLDER / f"{name}.pt"
        entries = read_checkpoint(path)
        model_class, facts = CLASSES[entries["model_class"]], entries
        arguments = vars(CONFIGS[model_class](**entries["config"]))  # older files lack younger options
        class_names = entries["class_names"]
    else:
        entry = PUBLIC[name]
        model_class, arguments, facts = VisionTransformer, entry.arguments, vars(entry)
        class_names = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"] if arguments["n_classes"] else None
    check_arguments(model_class, overrides)
    own_classes, wanted = arguments["n_classes"], arguments["n_classes"] if n_classes is None else n_classes
    free = FREE if name in OURS or (wanted and wanted == own_classes) else (*FREE, "pool")
    for argument, value in overrides.items():
        if argument not in free and value != arguments[argument]:
            raise InputError(f"{argument} {value!r} is not that of {name}, {arguments[argument]!r}; the weights allow "
                             f"another {', '.join(free)} or n_classes")
    model = model_class(**{**arguments, "n_classes": wanted, **overrides})
    if name in OURS:
        load_checkpoint(model, path)
    else:
        side = arguments["img_size"] // arguments["patch_size"]
        load_public(model, fetch(name), (side, side))
    model.class_names = class_names if wanted == own_classes else None
    model.img_size = model.config.img_size
    model.mean, model.std = facts["mean"], facts["std"]
    model.interpolation = facts.get("interpolation") or "bilinear"
    return model.eval()


def model_of_file(path, n_classes=None, overrides=None):
    """create_pretrained, for the path of a checkpoint."""
    description, overrides = describe_checkpoint(path), overrides or {}
    model_class, config = CLASSES[description.model_class], description.config
    check_arguments(model_class, overrides)
    for argument, value in overrides.items():
        if argument not in FREE and value != getattr(config, argument):
            raise InputError(f"{argument} {value!r} is not that of {path}, {getattr(config, argument)!r}; the weights "
                             f"allow another {', '.join(FREE)} or n_classes")
    wanted = config.n_classes if n_classes is None else n_classes
    model = model_class(**{**vars(config), "n_classes": wanted, **overrides})
    grid = None
    if model_class is not ConvNet:
        grid = tuple(size // side for size, side in zip(pair(config.img_size), pair(config.patch_size), strict=True))
    load_checkpoint(model, path, grid)
    entries = read_file(path)
    facts = entries if entries.get("format") == CHECKPOINT_FORMAT else IMAGENET
    model.class_names = facts.get("class_names") if wanted == config.n_classes else None
    model.img_size = model.config.img_size
    model.mean, model.std = facts["mean"] or IMAGENET["mean"], facts["std"] or IMAGENET["std"]
    model.interpolation = facts.get("interpolation") or "bilinear"
    return model.eval()


def load_public(model, path, grid_size):
    """load_checkpoint, for a file in a folder that people do not look into."""
    try:
        load_checkpoint(model, path, grid_size)
    except InputError as error:
        raise InputError(f"{error}; where the file came incomplete, delete it and it is fetched again") from error


def fetch(name):
    """The file of a public checkpoint, downloaded where it is not in torch.hub's folder yet."""
    entry = PUBLIC[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[1]
    if path.is_file():
        check_sum(path, entry.checksum)
        return path
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(entry.url, str(part))
        check_sum(part, entry.checksum)
        part.replace(path)
    except (OSError, URLError) as error:
        raise InputError(f"cannot download {name} from {entry.url} ({first_line(error)}); fetch it by other means and "
                         f"put it at {path}") from None
    finally:
        with suppress(OSError):  # there is none where all went well
            part.unlink()
    return path


def check_sum(path, checksum):
    """Raises InputError where the file's sum does not begin with the published digits."""
    if checksum is None:
        return
    kind, digits = checksum.split(":")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if not found.startswith(digits):
        raise InputError(f"{path} is not the published file: its {kind} begins {found[:len(digits)]}, expected "
                         f"{digits}; delete it and fetch it again")


def describe_pretrained():
    """The table PRETRAINED in lines of text."""
    lines = [f"{'name':25s} {'pixels':>6s} {'patch':>5s} {'classes':>7s} {'top-1':>6s}  licence, source"]
    for name in OURS:
        lines.append(f"{name:25s} {32:6d} {'':5s} {10:7d} {'':6s}  MIT, this project, on the drawn shapes "
                     f"(benchmarks/RESULTS.md)")
    for name, entry in PUBLIC.items():
        c = entry.arguments
        how = "" if entry.measured == "as it is" else f" (top-1: {entry.measured})"
        lines.append(f"{name:25s} {c['img_size']:6d} {c['patch_size']:5d} {c['n_classes']:7d} {entry.top1:6.1f}  "
                     f"{entry.licence}, {entry.source}{how}")
    return "\n".join(lines)
