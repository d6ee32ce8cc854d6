"""Pretrained models by name: ours, in weights/shipped/, and public ones, downloaded once.

`vit_bridge.weights.checkpoints.load(name)` opens them; `describe_pretrained()` lists them.
"""

import hashlib
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torchvision.models import ViT_B_16_Weights
from tqdm import tqdm

from vit_bridge.errors import InputError, first_line
from vit_bridge.models.registry import MODELS
from vit_bridge.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing


@dataclass(frozen=True)
class Pretrained:
    """A public checkpoint.

    Parameters
    ----------
    model : str
        A name in models.registry.MODELS; `config` overrides its arguments.
    url : str
        URL of the file.
    checksum : str or None
        "sha256:" or "md5:" and the first hex digits of the file's checksum, as published; None if none is published.
    top1 : float or None
        Accuracy in per cent on ImageNet-1k's validation images, as reported by its authors; None if they report none.
    licence : str
        Licence stated by its authors. (torchvision notes that its weights may also be subject to the terms of their
        training data.)
    source : str
        Paper and repository.
    measured : str
        How top1 was measured, if not with the model itself.
    mean, std, interpolation : tuple, tuple, str
        As in `Preprocessing`.
    config : dict
        Overrides of the model's arguments.
    """

    model: str
    url: str
    checksum: str | None
    top1: float | None
    licence: str
    source: str
    measured: str = "as it is"
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    interpolation: str = "bicubic"
    config: dict = field(default_factory=dict)

    @property
    def model_class(self):
        return MODELS[self.model].model_class

    @property
    def arguments(self):
        """All arguments of the model; n_classes is 0 if it has no head."""
        return vars(self.model_class.config_class(**{**MODELS[self.model].arguments, **self.config}))

    @property
    def preprocessing(self):
        """The Preprocessing, with ImageNet's class names if the model has a head."""
        names = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"] if self.arguments["n_classes"] else None
        return Preprocessing(self.arguments["img_size"], self.mean, self.std, self.interpolation, names)

    @property
    def megabytes(self):
        """Approximate size of the file: four bytes per weight."""
        with torch.device("meta"):
            return sum(weight.numel() for weight in self.model_class(**self.arguments).parameters()) * 4 / 1e6


def _deit(model, file, checksum, top1, **config):
    return Pretrained(model, f"https://dl.fbaipublicfiles.com/deit/{file}", checksum, top1, "Apache-2.0",
                      "DeiT, Touvron et al. 2021, github.com/facebookresearch/deit", config=config)


def _deit3(model, file, top1):
    return Pretrained(model, f"https://dl.fbaipublicfiles.com/deit/{file}", None, top1, "Apache-2.0",
                      "DeiT-III, Touvron et al. 2022, github.com/facebookresearch/deit",
                      config=dict(layer_scale=1e-4))


def _of_torchvision(model, file, checksum, top1, interpolation="bilinear"):
    return Pretrained(model, f"https://download.pytorch.org/models/{file}", checksum, top1, "BSD-3-Clause",
                      "torchvision, IMAGENET1K_V1, github.com/pytorch/vision", interpolation=interpolation)


def _swin(model, file, top1, **config):
    return Pretrained(model, f"https://github.com/SwinTransformer/storage/releases/download/v1.0.0/{file}", None, top1,
                      "MIT", "Swin, Liu et al. 2021, github.com/microsoft/Swin-Transformer", config=config)


def _dino(model, folder, top1):
    return Pretrained(model, f"https://dl.fbaipublicfiles.com/dino/{folder}/{folder}.pth", None, top1, "Apache-2.0",
                      "DINO, Caron et al. 2021, github.com/facebookresearch/dino",
                      "a linear classifier on its frozen features", config=dict(n_classes=0))


def _dinov2(model, name, top1, n_registers=0):
    file = f"{name}_reg4_pretrain.pth" if n_registers else f"{name}_pretrain.pth"
    paper = "Darcet et al. 2024" if n_registers else "Oquab et al. 2023"
    return Pretrained(model, f"https://dl.fbaipublicfiles.com/dinov2/{name}/{file}", None, top1, "Apache-2.0",
                      f"DINOv2, {paper}, github.com/facebookresearch/dinov2",
                      "a linear classifier on its frozen features at 224 pixels",
                      config=dict(n_classes=0, img_size=518, patch_size=14, layer_scale=1e-5, n_registers=n_registers))


def _mae(model, file, checksum, top1, measured="as it is", **config):
    return Pretrained(model, f"https://dl.fbaipublicfiles.com/mae/{file}", checksum, top1, "CC-BY-NC-4.0",
                      "MAE, He et al. 2022, github.com/facebookresearch/mae", measured, config=config)


def _beit(model, file, top1, measured="as it is", **config):
    return Pretrained(model, f"https://github.com/addf400/files/releases/download/v1.0/{file}", None, top1, "MIT",
                      "BEiT, Bao et al. 2022, github.com/microsoft/unilm", measured, mean=(0.5,) * 3, std=(0.5,) * 3,
                      config=config)


def _beit2(model, file, top1):
    return Pretrained(model, f"https://github.com/addf400/files/releases/download/BEiT-v2/{file}", None, top1, "MIT",
                      "BEiT v2, Peng et al. 2022, github.com/microsoft/unilm", config=dict(layer_scale=1e-5))


FINE_TUNED = "after fine-tuning the whole model"
OF_MEAN = dict(pool="mean", fc_norm=True)
AT_384 = dict(img_size=384, window_size=12)
SWIN_LARGE = dict(embed_dim=192, n_heads=(6, 12, 24, 48))
# The names are the authors' own. DeiT and torchvision publish checksums in their file names, MAE in its README.
PUBLIC = {
    "deit_tiny_patch16_224": _deit("vit_tiny", "deit_tiny_patch16_224-a1311bcf.pth", "sha256:a1311bcf", 72.2),
    "deit_small_patch16_224": _deit("vit_small", "deit_small_patch16_224-cd65a155.pth", "sha256:cd65a155", 79.9),
    "deit_base_patch16_224": _deit("vit_base", "deit_base_patch16_224-b5f2ef4d.pth", "sha256:b5f2ef4d", 81.8),
    "deit_base_patch16_384": _deit("vit_base", "deit_base_patch16_384-8de9b5d1.pth", "sha256:8de9b5d1", 82.9,
                                  img_size=384),
    "deit_tiny_distilled_patch16_224": _deit("deit_tiny", "deit_tiny_distilled_patch16_224-b40b3cf7.pth",
                                             "sha256:b40b3cf7", 74.5),
    "deit_small_distilled_patch16_224": _deit("deit_small", "deit_small_distilled_patch16_224-649709d9.pth",
                                              "sha256:649709d9", 81.2),
    "deit_base_distilled_patch16_224": _deit("deit_base", "deit_base_distilled_patch16_224-df68dfff.pth",
                                             "sha256:df68dfff", 83.4),
    "deit_base_distilled_patch16_384": _deit("deit_base", "deit_base_distilled_patch16_384-d0272ac0.pth",
                                             "sha256:d0272ac0", 85.2, img_size=384),
    "deit3_small_patch16_224": _deit3("vit_small", "deit_3_small_224_1k.pth", 81.4),
    "deit3_base_patch16_224": _deit3("vit_base", "deit_3_base_224_1k.pth", 83.8),
    "deit3_large_patch16_224": _deit3("vit_large", "deit_3_large_224_1k.pth", 84.9),
    "vit_b_16": _of_torchvision("vit_base", "vit_b_16-c867db91.pth", "sha256:c867db91", 81.072),
    "vit_l_16": _of_torchvision("vit_large", "vit_l_16-852ce7e3.pth", "sha256:852ce7e3", 79.662),
    "swin_t": _of_torchvision("swin_tiny", "swin_t-704ceda3.pth", "sha256:704ceda3", 81.474, "bicubic"),
    "swin_s": _of_torchvision("swin_small", "swin_s-5e29d889.pth", "sha256:5e29d889", 83.196, "bicubic"),
    "swin_b": _of_torchvision("swin_base", "swin_b-68c6b09e.pth", "sha256:68c6b09e", 83.582, "bicubic"),
    "swin_tiny_patch4_window7_224": _swin("swin_tiny", "swin_tiny_patch4_window7_224.pth", 81.2),
    "swin_small_patch4_window7_224": _swin("swin_small", "swin_small_patch4_window7_224.pth", 83.2),
    "swin_base_patch4_window7_224": _swin("swin_base", "swin_base_patch4_window7_224.pth", 83.5),
    "swin_base_patch4_window12_384": _swin("swin_base", "swin_base_patch4_window12_384.pth", 84.5, **AT_384),
    "swin_base_patch4_window7_224_22kto1k": _swin("swin_base", "swin_base_patch4_window7_224_22kto1k.pth", 85.2),
    "swin_base_patch4_window12_384_22kto1k": _swin("swin_base", "swin_base_patch4_window12_384_22kto1k.pth", 86.4,
                                                   **AT_384),
    "swin_large_patch4_window7_224_22kto1k": _swin("swin_base", "swin_large_patch4_window7_224_22kto1k.pth", 86.3,
                                                   **SWIN_LARGE),
    "swin_large_patch4_window12_384_22kto1k": _swin("swin_base", "swin_large_patch4_window12_384_22kto1k.pth", 87.3,
                                                    **AT_384, **SWIN_LARGE),
    "resnet18": _of_torchvision("resnet18", "resnet18-f37072fd.pth", "sha256:f37072fd", 69.758),
    "resnet34": _of_torchvision("resnet34", "resnet34-b627a593.pth", "sha256:b627a593", 73.314),
    "resnet50": _of_torchvision("resnet50", "resnet50-0676ba61.pth", "sha256:0676ba61", 76.13),
    "resnet101": _of_torchvision("resnet101", "resnet101-63fe2227.pth", "sha256:63fe2227", 77.374),
    "resnet152": _of_torchvision("resnet152", "resnet152-394f9c45.pth", "sha256:394f9c45", 78.312),
    "convnext_tiny": _of_torchvision("convnext_tiny", "convnext_tiny-983f1562.pth", "sha256:983f1562", 82.52),
    "convnext_small": _of_torchvision("convnext_small", "convnext_small-0c510722.pth", "sha256:0c510722", 83.616),
    "convnext_base": _of_torchvision("convnext_base", "convnext_base-6075fbad.pth", "sha256:6075fbad", 84.062),
    "convnext_large": _of_torchvision("convnext_large", "convnext_large-ea097f82.pth", "sha256:ea097f82", 84.414),
    "dino_vits16": _dino("vit_small", "dino_deitsmall16_pretrain", 77.0),
    "dino_vitb16": _dino("vit_base", "dino_vitbase16_pretrain", 78.2),
    "dinov2_vits14": _dinov2("vit_small", "dinov2_vits14", 81.1),
    "dinov2_vitb14": _dinov2("vit_base", "dinov2_vitb14", 84.5),
    "dinov2_vitl14": _dinov2("vit_large", "dinov2_vitl14", 86.3),
    "dinov2_vits14_reg": _dinov2("vit_small", "dinov2_vits14", 80.9, n_registers=4),
    "dinov2_vitb14_reg": _dinov2("vit_base", "dinov2_vitb14", 84.6, n_registers=4),
    "dinov2_vitl14_reg": _dinov2("vit_large", "dinov2_vitl14", 86.7, n_registers=4),
    "mae_vit_base_patch16": _mae("vit_base", "pretrain/mae_pretrain_vit_base.pth", "md5:8cad7c", 83.664, FINE_TUNED,
                                 n_classes=0),
    "mae_vit_large_patch16": _mae("vit_large", "pretrain/mae_pretrain_vit_large.pth", "md5:b8b06e", 85.952, FINE_TUNED,
                                  n_classes=0),
    "mae_finetuned_vit_base": _mae("vit_base", "finetune/mae_finetuned_vit_base.pth", "md5:1b25e9", 83.664, **OF_MEAN),
    "mae_finetuned_vit_large": _mae("vit_large", "finetune/mae_finetuned_vit_large.pth", "md5:51f550", 85.952,
                                    **OF_MEAN),
    "mae_visualize_vit_base": _mae("mae_base", "visualize/mae_visualize_vit_base.pth", None, None,
                                   norm_pix_loss=False),
    "mae_visualize_vit_large": _mae("mae_large", "visualize/mae_visualize_vit_large.pth", None, None,
                                    norm_pix_loss=False),
    "mae_visualize_vit_large_ganloss": _mae("mae_large", "visualize/mae_visualize_vit_large_ganloss.pth", None, None,
                                            norm_pix_loss=False),
    "beit_base_patch16_224_pt22k": _beit("beit_base_pretraining", "beit_base_patch16_224_pt22k.pth", 83.7, FINE_TUNED),
    "beit_large_patch16_224_pt22k": _beit("beit_base_pretraining", "beit_large_patch16_224_pt22k.pth", 86.0, FINE_TUNED,
                                          embed_dim=1024, depth=24, n_heads=16, layer_scale=1e-5),
    "beit_base_patch16_224_pt22k_ft22kto1k": _beit("beit_base", "beit_base_patch16_224_pt22k_ft22kto1k.pth", 85.2),
    "beit_base_patch16_384_pt22k_ft22kto1k": _beit("beit_base", "beit_base_patch16_384_pt22k_ft22kto1k.pth", 86.8,
                                                   img_size=384),
    "beit_large_patch16_224_pt22k_ft22kto1k": _beit("beit_large", "beit_large_patch16_224_pt22k_ft22kto1k.pth", 87.4),
    "beit_large_patch16_384_pt22k_ft22kto1k": _beit("beit_large", "beit_large_patch16_384_pt22k_ft22kto1k.pth", 88.4,
                                                    img_size=384),
    "beitv2_base_patch16_224_pt1k_ft1k": _beit2("beit_base", "beitv2_base_patch16_224_pt1k_ft1k.pth", 85.5),
    "beitv2_base_patch16_224_pt1k_ft21kto1k": _beit2("beit_base", "beitv2_base_patch16_224_pt1k_ft21kto1k.pth", 86.5),
    "beitv2_large_patch16_224_pt1k_ft1k": _beit2("beit_large", "beitv2_large_patch16_224_pt1k_ft1k.pth", 87.3),
    "beitv2_large_patch16_224_pt1k_ft21kto1k": _beit2("beit_large", "beitv2_large_patch16_224_pt1k_ft21kto1k.pth",
                                                      88.4),
}
# Trained by this project; the commands and accuracies are in benchmarks/RESULTS.md. CIFAR-10's photographs were
# collected for research, and its authors state no licence for them.
OURS = {  # name: (images of its training, number of classes)
    **{f"{name}_shapes": ("the drawn shapes", 10) for name in ("vit_nano", "hybrid", "convnet")},
    **{f"{name}_cifar10": ("CIFAR-10 (JPEG)", 10) for name in ("vit_nano", "hybrid", "convnet", "deit_nano",
                                                               "swin_nano", "convnext_nano")},
    "mae_nano_cifar10": ("CIFAR-10 (JPEG), without labels", 0),
}
OURS_FOLDER = Path(__file__).parent / "shipped"
PRETRAINED = (*OURS, *PUBLIC)
# Defaults for looking inside a photograph. DINOv2's patch tokens separate the parts of objects, on a fine grid of 1,369
# patches; registers keep high-norm artefacts out of the maps (Darcet et al. 2024). It has no head, so DeiT-S is the
# default if a class has to be explained.
FIRST_LOOK, WITH_CLASSES = "dinov2_vits14_reg", "deit_small_patch16_224"
WITHOUT_NETWORK = "vit_nano_cifar10"  # comes with this package
TIMEOUT = 10  # seconds to wait for a connection and for the next bytes


class NotFetched(InputError):
    """A public file that is missing and cannot be downloaded; `reason` states why."""

    def __init__(self, text, reason):
        super().__init__(text)
        self.reason = reason


def fetch(name):
    """Return the path of a public checkpoint; download it to torch.hub's folder if it is missing.

    Before a download, a line on stderr states its size and its licence.

    Raises
    ------
    NotFetched
        If it cannot be downloaded.
    InputError
        If the file's checksum is wrong.
    """
    entry = PUBLIC[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[1]
    if path.is_file():
        _check_sum(path, entry.checksum)
        return path
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"Downloading {name} once: about {entry.megabytes:.0f} MB, {entry.licence}, from {entry.url} to {path}",
              file=sys.stderr, flush=True)
        download(entry.url, part)
        _check_sum(part, entry.checksum)
        part.replace(path)
    except (OSError, HTTPException) as error:  # URLError is an OSError
        reason = first_line(error.reason if type(error) is URLError and isinstance(error.reason, OSError) else error)
        offline = "no network? " if isinstance(error, (URLError, TimeoutError)) and not isinstance(error, HTTPError) \
            else ""
        raise NotFetched(f"cannot download {name} ({offline}{reason}); download {entry.url} on another computer and "
                         f"copy it to {path}, or use {WITHOUT_NETWORK} (32 pixels), which is shipped",
                         reason) from None
    finally:
        with suppress(OSError):  # after a successful download it no longer exists
            part.unlink()
    return path


def download(url, path):
    """Download a file, with a progress bar on a terminal.

    Raises
    ------
    OSError, HTTPException
        If no data arrives for TIMEOUT seconds, or if the file is incomplete.
    """
    with urlopen(Request(url, headers={"User-Agent": "vit-bridge"}), timeout=TIMEOUT) as answer, \
            open(path, "wb") as file:
        size = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, desc=path.stem, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            while part := answer.read(2**18):
                bar.update(file.write(part))
        if file.tell() < size:
            raise OSError(f"the download ended after {file.tell():,} of {size:,} bytes")


def _check_sum(path, checksum):
    """Raise InputError if the file's checksum does not begin with the published digits."""
    if checksum is None:
        return
    kind, digits = checksum.split(":")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if not found.startswith(digits):
        raise InputError(f"{path} is not the published file: its {kind} begins {found[:len(digits)]}, expected "
                         f"{digits}; delete it to download it again")


def describe_pretrained():
    """Return a table of all pretrained models, in lines of text."""
    lines = [f"{'name':25s} {'pixels':>6s} {'patch':>5s} {'classes':>7s} {'top-1':>6s}  licence, source"]
    for name, (images, n_classes) in OURS.items():
        lines.append(f"{name:25s} {32:6d} {'':5s} {n_classes:7d} {'':6s}  MIT, this project, trained on {images} "
                     f"(measured: benchmarks/RESULTS.md)")
    for name, entry in PUBLIC.items():
        c = entry.arguments
        how = "" if entry.measured == "as it is" else f" (top-1: {entry.measured})"
        top1 = "" if entry.top1 is None else f"{entry.top1:.1f}"
        patch = c.get("patch_size", "")
        lines.append(f"{name:25s} {c['img_size']:6d} {patch:5} {c['n_classes']:7d} {top1:>6s}  {entry.licence}, "
                     f"{entry.source}{how}")
    return "\n".join(lines)
