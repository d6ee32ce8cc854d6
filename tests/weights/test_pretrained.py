import hashlib
import re
import shutil
import sys
import threading
import time
from dataclasses import dataclass, replace
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest
import timm
import torch
import torchvision
from timm.models.beit import Beit

import train_vit
from vit_bridge.cli import script
from vit_bridge.data.loaders import get_data_loaders
from vit_bridge.models import BEiT, DistilledViT, MaskedAutoencoder, MaskedTokenModel, registry
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.registry import MODELS, build_model
from vit_bridge.models.swin import SwinTransformer
from vit_bridge.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from vit_bridge.weights import checkpoints, pretrained
from vit_bridge.weights.checkpoints import describe_checkpoint, load, read_checkpoint
from vit_bridge.weights.pretrained import (
    OURS,
    OURS_FOLDER,
    PRETRAINED,
    PUBLIC,
    Pretrained,
    _check_sum,
    fetch,
)
from vit_model import InputError, VisionTransformer, resample_positions

ALIKE = {"vit_nano": 459_562, "hybrid": 497_818, "convnet": 481_170}
CLASSIFIERS = [name for name, (_, n_classes) in OURS.items() if n_classes]


def one_line_with(text):
    return rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z"


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in other)


# ---- Models by name


@pytest.mark.parametrize("name", [name for name in MODELS if "n_classes" not in MODELS[name].arguments
                                  or MODELS[name].arguments["n_classes"]])  # an autoencoder has no head
def test_build_model_builds_a_running_model_for_every_name(name):
    with torch.device("meta"):
        model = build_model(name, n_classes=7)
        images = torch.empty(2, 3, model.config.img_size, model.config.img_size)
        assert type(model) is MODELS[name].model_class
        assert model.eval()(images).shape == (2, 7)
        assert build_model(name).head.out_features == 1000


def test_build_model_resnet18_is_convnet_with_its_defaults():
    with torch.device("meta"):
        assert build_model("resnet18").config == ConvNet().config


@pytest.mark.parametrize("name", ALIKE)
def test_small_models_have_the_parameter_counts_the_comment_says(name):
    assert sum(p.numel() for p in build_model(name, n_classes=10).parameters()) == ALIKE[name]
    assert build_model(name).config.img_size == 32
    assert f"{ALIKE[name]:,}" in Path(registry.__file__).read_text(encoding="utf-8")


def test_small_models_have_parameter_counts_within_a_tenth():
    assert max(ALIKE.values()) <= 1.1 * min(ALIKE.values())


@pytest.mark.parametrize(("img_size", "patch", "stride"), [
    (32, 4, 1), (64, 4, 1), (72, 8, 2), (128, 8, 2), (144, 16, 4), (224, 16, 4),
    ((32, 96), 8, 2), ((64, 28), 4, 1)])
def test_build_model_fits_patch_and_stem_to_the_image(img_size, patch, stride):
    with torch.device("meta"):
        for name in ("vit_nano", "vit_base", "hybrid", "hybrid_small"):
            assert build_model(name, img_size=img_size).config.patch_size == patch
        for name in ("convnet", "resnet18"):
            assert build_model(name, img_size=img_size).config.stem_stride == stride


def test_build_model_keeps_given_patch_and_defaults_without_size():
    assert build_model("vit_nano", img_size=112, patch_size=7).config.patch_size == 7
    assert build_model("convnet", img_size=224, stem_stride=1).config.stem_stride == 1
    assert build_model("vit_nano").config.patch_size == 4


@pytest.mark.parametrize(("build", "value"), [
    (lambda: build_model("resnet19"), "'resnet19'"), (lambda: build_model("vit_nano", widths=(3,)), "'widths'"),
    (lambda: build_model("convnet", depth=8), "'depth'"), (lambda: build_model("hybrid", dept=1), "'dept'"),
    (lambda: build_model("vit_nano", img_size=30), "30x30"), (lambda: build_model("hybrid", patch_size=12), "12"),
    (lambda: load("vit_nano"), "'vit_nano'"), (lambda: load("../no such"), "'../no such'")])
def test_build_model_and_load_refuse_bad_names_and_arguments(build, value):
    with pytest.raises(InputError, match=one_line_with(value)):
        build()


def test_build_model_names_the_closest_models_for_an_unknown_one():
    with pytest.raises(InputError, match=f"choices are vit_nano, vit_tiny, vit_small; list all {len(MODELS)} with"):
        build_model("vit")


@pytest.mark.parametrize(("name", "words"), [
    ("deit_tiny", "did you mean 'deit_tiny_patch16_224' or 'deit_tiny_distilled_patch16_224'?"),
    ("vitb16", "did you mean 'dino_vitb16'?"),
    ("deit", "did you mean 'deit_nano_cifar10' or 'deit_tiny_patch16_224' or 'deit_small_patch16_224'?"),
    ("resnet_50", "did you mean 'resnet50'?"), ("ResNet50", "did you mean 'resnet50'?"),
    ("zzz", "use the path of a checkpoint")])
def test_load_suggests_names_that_begin_like_the_one_asked_for(name, words):
    with pytest.raises(InputError, match=one_line_with(words)):
        load(name)


# ---- Those that we trained


@pytest.mark.parametrize("name", OURS)
def test_load_gives_our_pretrained_models_ready_to_use(name):
    model, saved = load(name), read_checkpoint(OURS_FOLDER / f"{name}.pt")
    assert not any(module.training for module in model.modules())
    state = {key: value.float() if value.is_floating_point() else value for key, value in saved["state_dict"].items()}
    assert same(model.state_dict(), state)
    assert (OURS_FOLDER / f"{name}.pt").stat().st_size < 2**20
    assert model.config == type(model).config_class(**saved["config"])
    shown = model.preprocessing
    assert (shown.class_names, list(shown.mean), list(shown.std), shown.img_size, shown.interpolation) == (
        saved["class_names"], saved["mean"], saved["std"], saved["img_size"], saved.get("interpolation", "bilinear"))
    n_classes = OURS[name][1]
    assert (len(shown.class_names or ()), model.config.n_classes) == (n_classes, n_classes)
    assert len(shown.mean) == len(shown.std) == model.config.in_channels
    assert shown.img_size == model.config.img_size == 32
    assert (model if n_classes else model.encoder())(torch.zeros(2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_load_gives_our_models_a_new_head(name):
    saved = load(OURS_FOLDER / f"{name}.pt").state_dict()
    for n_classes in (5, 0):
        model = load(name, n_classes=n_classes)
        assert model.preprocessing.class_names is None
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, n_classes or model.n_features)
        state = model.state_dict()
        assert same({k: v for k, v in state.items() if not k.startswith("head")},
                    {k: v for k, v in saved.items() if not k.startswith("head")})
    own = load(name, n_classes=10)
    assert len(own.preprocessing.class_names) == 10
    assert same(own.state_dict(), saved)


def test_load_takes_overrides_of_size_and_dropout():
    saved = load(OURS_FOLDER / "vit_nano_shapes.pt")
    model = load("vit_nano_shapes", img_size=(44, 28), dropout=0.3, drop_path=0.1)
    assert model.preprocessing.img_size == model.config.img_size == (44, 28)
    assert (model.config.dropout, model.config.drop_path) == (0.3, 0.1)
    assert torch.equal(model.pos_embed, resample_positions(saved.pos_embed, (8, 8), (11, 7)))
    assert model(torch.zeros(1, 3, 44, 28)).shape == (1, 10)


@pytest.mark.parametrize(("overrides", "value"), [
    (dict(n_heads=6), "n_heads=6 does not match vit_nano_shapes, which has 3"), (dict(depth=5), "depth=5"),
    (dict(embed_dim=48), "embed_dim=48"), (dict(pool="mean"), "pool='mean'"), (dict(norm_eps=1e-5), "norm_eps"),
    (dict(position="none"), "position='none'"), (dict(n_registers=2), "n_registers=2"),
    (dict(patch_size=8), "patch_size=8"), (dict(head=5), "'head'"), (dict(img_size=30), "30x30"),
    (dict(n_classes=-1), "n_classes"), (dict(n_classes=5, pool="mean"), "pool")])
def test_load_refuses_overrides_that_misfit_the_weights(overrides, value):
    with pytest.raises(InputError, match=one_line_with(value)):
        load("vit_nano_shapes", **overrides)


def test_load_names_missing_pretrained_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "OURS_FOLDER", tmp_path)
    with pytest.raises(InputError, match=one_line_with("hybrid_shapes.pt")):
        load("hybrid_shapes")


# ---- Files of one's own


@pytest.mark.parametrize("name", OURS)
def test_load_takes_a_path_as_well_as_a_name(name, tmp_path):
    path = shutil.copy(OURS_FOLDER / f"{name}.pt", tmp_path / "my best.pt")
    for given in (path, str(path)):
        model, named = load(given), load(name)
        assert type(model) is type(named)
        assert same(model.state_dict(), named.state_dict())
        for fact in ("config", "preprocessing", "training"):
            assert getattr(model, fact) == getattr(named, fact), fact
    if name in CLASSIFIERS:
        other = load(path, n_classes=4)
        assert other.preprocessing.class_names is None
        assert other(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_load_takes_the_same_overrides_for_a_file(tmp_path):
    path = shutil.copy(OURS_FOLDER / "vit_nano_shapes.pt", tmp_path)
    model = load(path, img_size=24, drop_path=0.1)
    assert torch.equal(model.pos_embed, load("vit_nano_shapes", img_size=24).pos_embed)
    assert (model.preprocessing.img_size, model.config.drop_path) == (24, 0.1)
    for overrides, value in ((dict(depth=5), "depth=5 does not match"), (dict(widths=(3,)), "'widths'")):
        with pytest.raises(InputError, match=one_line_with(value)):
            load(path, **overrides)


@pytest.mark.parametrize("n_classes", [0, 6])
def test_load_takes_a_timm_state_dict(n_classes, tmp_path):
    """It has the file's size and head, ImageNet's normalisation and no class names."""
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=64, depth=2, num_heads=1,
                                           num_classes=n_classes).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model, images = load(tmp_path / "theirs.pth"), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images), theirs(images))
    assert model.preprocessing == Preprocessing(16, IMAGENET_MEAN, IMAGENET_STD, "bilinear", None)
    assert not model.training
    assert load(tmp_path / "theirs.pth", n_classes=3)(images).shape == (2, 3)


@pytest.mark.parametrize(("name", "content"), [
    ("nowhere.pt", None), ("a/b.pth", None), ("damaged.pt", b"no checkpoint"), ("empty.pt", b"")])
def test_load_refuses_missing_or_damaged_files(name, content, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=one_line_with(tmp_path / name)):
        load(str(tmp_path / name))


# ---- Public ones, without a network


SMALL = dict(img_size=20, patch_size=5, embed_dim=12, depth=2, n_heads=3)


@dataclass
class Public:
    """Stand-ins for the table, the folder of files, and the requested addresses."""
    models: dict
    folder: Path
    asked: list


@pytest.fixture
def public(tmp_path, monkeypatch):
    """Provide two small entries with random weights in torch.hub's folder, and no network."""
    torch.manual_seed(5)
    folder, asked, entries, models = tmp_path / "hub" / "checkpoints", [], {}, {}
    folder.mkdir(parents=True)
    for name, n_classes in (("small", 1000), ("headless", 0)):
        models[name] = VisionTransformer(**SMALL, n_classes=n_classes)
        torch.save({"model": models[name].state_dict()}, folder / f"{name}.pth")
        digits = hashlib.sha256((folder / f"{name}.pth").read_bytes()).hexdigest()[:8]
        checksum = f"sha256:{digits}" if n_classes else None  # as some authors publish one and some do not
        entries[name] = Pretrained("vit_tiny", f"https://example.org/of/{name}.pth", checksum, 12.5, "MIT",
                                   "nobody", mean=(0.25, 0.5, 0.75), std=(0.125, 0.25, 0.5),
                                   config=dict(**SMALL, n_classes=n_classes))
    for module in (pretrained, checkpoints):
        monkeypatch.setattr(module, "PUBLIC", entries)
        monkeypatch.setattr(module, "PRETRAINED", (*OURS, *entries))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(pretrained, "download", lambda url, path: asked.append(url))
    return Public(models, folder, asked)


def test_load_gives_a_public_model_ready_to_use(public):
    model = load("small")
    assert same(model.state_dict(), public.models["small"].state_dict())
    assert not any(module.training for module in model.modules())
    names = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    assert (names[0], len(names)) == ("tench", 1000)
    assert model.preprocessing == Preprocessing(20, (0.25, 0.5, 0.75), (0.125, 0.25, 0.5), "bicubic", names)
    assert public.asked == []


@pytest.mark.parametrize(("name", "n_classes", "wanted", "has_names"), [
    ("small", 1000, 1000, True), ("small", 5, 5, False), ("small", 0, 0, False), ("headless", None, 0, False),
    ("headless", 5, 5, False)])
def test_load_sets_head_and_class_names_of_public_models(name, n_classes, wanted, has_names, public):
    model = load(name, n_classes=n_classes, img_size=35)
    assert (model.config.n_classes, model.preprocessing.class_names is not None) == (wanted, has_names)
    assert model(torch.zeros(2, 3, 35, 35)).shape == (2, wanted or 12)
    source = public.models[name].state_dict()
    assert torch.equal(model.pos_embed, resample_positions(source["pos_embed"], (4, 4), (7, 7)))
    assert same({k: v for k, v in model.state_dict().items() if k.startswith("blocks.")},
                {k: v for k, v in source.items() if k.startswith("blocks.")})


def test_load_takes_a_public_files_grid_from_its_entry(public):
    model = load("small", img_size=(85, 5))  # 17 x 1 patches, as many as the positions of the file
    positions = public.models["small"].pos_embed
    assert torch.equal(model.pos_embed, resample_positions(positions, (4, 4), (17, 1)))


@pytest.mark.parametrize(("overrides", "value"), [
    (dict(n_heads=2), "n_heads=2 does not match small, which has 3"), (dict(norm_eps=1e-5), "norm_eps"),
    (dict(depth=3), "depth"), (dict(position="sincos"), "position"), (dict(layer_scale=0.1), "layer_scale"),
    (dict(heads=2), "'heads'"), (dict(pool="mean"), "pool"), (dict(pool="mean", n_classes=1000), "pool")])
def test_load_refuses_overrides_that_misfit_a_public_model(overrides, value, public):
    with pytest.raises(InputError, match=one_line_with(value)):
        load("small", **overrides)


@pytest.mark.parametrize(("name", "n_classes"), [("small", 5), ("small", 0), ("headless", None), ("headless", 5)])
def test_load_allows_another_pool_without_the_files_head(name, n_classes, public):
    model = load(name, n_classes=n_classes, pool="mean")
    assert model.config.pool == "mean"


def test_get_data_loaders_uses_a_public_models_preprocessing(public):
    model = load("small")
    own = model.preprocessing
    loaders = get_data_loaders(dataset="shapes", img_size=own.img_size, n_images=20, batch_size=5, preprocessing=own)
    for loader in loaders:
        assert loader.preprocessing == replace(own, class_names=loader.class_names)
        assert (loader.preprocessing.interpolation, loader.img_size) == ("bicubic", 20)
        images, _ = next(iter(loader))
        assert model(images).shape == (len(images), 1000)


def test_load_fetches_a_missing_public_file_once(public, monkeypatch):
    away = public.folder.parent / "away.pth"
    shutil.move(public.folder / "small.pth", away)
    asked = []

    def download(url, path):
        asked.append(url)
        shutil.copy(away, path)

    monkeypatch.setattr(pretrained, "download", download)
    for _ in range(2):
        assert same(load("small").state_dict(), public.models["small"].state_dict())
    assert asked == ["https://example.org/of/small.pth"]
    assert sorted(path.name for path in public.folder.iterdir()) == ["headless.pth", "small.pth"]


def test_fetch_makes_a_missing_folder(public, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "new" / "hub"))
    monkeypatch.setattr(pretrained, "download",
                        lambda url, path: shutil.copy(public.folder / "small.pth", path))
    assert fetch("small") == tmp_path / "new" / "hub" / "checkpoints" / "small.pth"
    assert fetch("small").is_file()


ERRORS = [URLError("no route to host"), HTTPError("https://example.org", 404, "Not Found", None, None),
          TimeoutError("timed out"), OSError(28, "No space left on device")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_load_names_address_and_path_when_download_fails(error, public, monkeypatch):
    def download(url, path):
        Path(path).write_bytes(b"half")
        raise error

    (public.folder / "small.pth").unlink()
    monkeypatch.setattr(pretrained, "download", download)
    with pytest.raises(InputError, match=one_line_with("https://example.org/of/small.pth")) as caught:
        load("small")
    assert str(public.folder / "small.pth") in str(caught.value)
    assert ("(no network? " in str(caught.value)) == (type(error) in (URLError, TimeoutError))
    assert "or use vit_nano_cifar10 (32 pixels), which is shipped" in str(caught.value)
    assert [path.name for path in public.folder.iterdir()] == ["headless.pth"]


def test_load_discards_a_download_with_the_wrong_checksum(public, monkeypatch):
    (public.folder / "small.pth").unlink()
    monkeypatch.setattr(pretrained, "download", lambda url, path: Path(path).write_bytes(b"another"))
    digits = hashlib.sha256(b"another").hexdigest()[:8]
    with pytest.raises(InputError, match=one_line_with(f"its sha256 begins {digits}, expected")):
        load("small")
    assert [path.name for path in public.folder.iterdir()] == ["headless.pth"]


@pytest.mark.parametrize(("name", "reason"), [
    ("small", "its sha256 begins"), ("headless", "to download it again")])
def test_load_refuses_a_damaged_cached_file_naming_its_path(name, reason, public):
    path = public.folder / f"{name}.pth"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match=one_line_with(path)) as caught:
        load(name)
    assert reason in str(caught.value)


def test_check_sum_compares_the_published_digits(tmp_path):
    path = tmp_path / "empty"
    path.touch()
    for checksum in ("sha256:e3b0c442", "md5:d41d8c", None):
        _check_sum(path, checksum)
    for checksum in ("sha256:e3b0c443", "md5:e3b0c4"):
        with pytest.raises(InputError, match=one_line_with(path)):
            _check_sum(path, checksum)


class Server(BaseHTTPRequestHandler):
    """/whole sends all that it announces, /short less, and /stalled nothing for a while."""

    def do_GET(self):
        if self.path == "/stalled":
            time.sleep(0.5)
            return
        self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"weight"[:6 if self.path == "/whole" else 3])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(pretrained, "TIMEOUT", 0.1)
    serving = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


def test_download_writes_whole_files_and_refuses_short_and_stalled_ones(server, tmp_path):
    pretrained.download(f"{server}/whole", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"weight"
    with pytest.raises((OSError, HTTPException)):
        pretrained.download(f"{server}/short", tmp_path / "b")
    with pytest.raises(TimeoutError):
        pretrained.download(f"{server}/stalled", tmp_path / "c")


def test_fetch_says_size_and_licence_before_it_downloads(public, monkeypatch, capsys):
    (public.folder / "small.pth").unlink()
    said = []
    monkeypatch.setattr(pretrained, "download", lambda url, path: said.append(capsys.readouterr().err) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch("small")
    entry = pretrained.PUBLIC["small"]
    assert f"Downloading small once: about {entry.megabytes:.0f} MB, {entry.licence}, from {entry.url}" in said[0]


def test_first_look_has_the_megabytes_of_its_parameters():
    assert round(PUBLIC[pretrained.FIRST_LOOK].megabytes) == 88
    assert pretrained.FIRST_LOOK in PUBLIC
    assert PUBLIC[pretrained.WITH_CLASSES].arguments["n_classes"] == 1000


# ---- The table of public ones


def parameters_of(c, n_cls=1):
    """Return the parameter count of a VisionTransformer with this number of CLS tokens and heads, by arithmetic."""
    D, hidden, n_patches = c["embed_dim"], 4 * c["embed_dim"], (c["img_size"] // c["patch_size"]) ** 2
    tokens = n_cls + c["n_registers"] + n_patches + n_cls * (c["n_registers"] == 0)  # CLS, registers, the positions
    block = 2 * 2 * D + (D + 1) * 3 * D + (D + 1) * D + (D + 1) * hidden + (hidden + 1) * D
    block += 2 * D if c["layer_scale"] else 0
    embedding = (3 * c["patch_size"] ** 2 + 1) * D
    return embedding + tokens * D + c["depth"] * block + 2 * D + n_cls * (D + 1) * c["n_classes"] * (c["n_classes"] > 0)


KNOWN = {"deit_tiny_patch16_224": 5_717_416, "deit_tiny_distilled_patch16_224": 5_910_800,
         "deit_small_distilled_patch16_224": 22_436_432, "deit_base_distilled_patch16_224": 87_338_192,
         "deit_base_patch16_224": 86_567_656, "vit_b_16": 86_567_656,
         "vit_l_16": 304_326_632, "dinov2_vits14": 22_056_192, "dino_vits16": 21_665_664}
VITS = [name for name, entry in PUBLIC.items() if entry.model_class in (VisionTransformer, DistilledViT)]
MASKED = [name for name, entry in PUBLIC.items() if entry.model_class in (BEiT, MaskedAutoencoder, MaskedTokenModel)]
SWINS = [name for name, entry in PUBLIC.items() if entry.model_class is SwinTransformer]


@pytest.mark.parametrize("name", VITS)
def test_public_entries_have_the_parameters_of_their_architecture(name):
    arguments = PUBLIC[name].arguments
    with torch.device("meta"):
        model = PUBLIC[name].model_class(**arguments)
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters_of(arguments, model.n_cls_tokens)
    assert ("distilled" in name) == (model.n_cls_tokens == 2)
    assert count == KNOWN.get(name, count)
    assert type(model.head) is (torch.nn.Linear if PUBLIC[name].measured == "as it is" else torch.nn.Identity)
    assert isinstance(model.norm, torch.nn.LayerNorm) != isinstance(model.fc_norm, torch.nn.LayerNorm)


OF_TORCHVISION = [name for name, entry in PUBLIC.items() if entry.source.startswith("torchvision")]


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_public_entries_agree_with_torchvision(name):
    entry, weights = PUBLIC[name], torchvision.models.get_model_weights(name).IMAGENET1K_V1
    transforms = weights.transforms()
    assert entry.url == weights.url
    assert entry.checksum == f"sha256:{re.search(r'-([0-9a-f]{8})', weights.url)[1]}"
    assert entry.top1 == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    assert (list(entry.mean), list(entry.std)) == (list(transforms.mean), list(transforms.std))
    assert entry.interpolation == transforms.interpolation.value
    assert [entry.arguments["img_size"]] == transforms.crop_size
    assert entry.preprocessing.class_names == weights.meta["categories"]
    with torch.device("meta"):
        model = entry.model_class(**entry.arguments)
    assert sum(p.numel() for p in model.parameters()) == weights.meta["num_params"]


def test_public_cnns_are_named_models_and_resnets_are_all_here():
    cnns = PUBLIC.keys() - {*VITS, *SWINS, *MASKED}
    assert cnns == {f"resnet{depth}" for depth in (18, 34, 50, 101, 152)} | {
        f"convnext_{size}" for size in ("tiny", "small", "base", "large")}
    for name in cnns:
        with torch.device("meta"):
            assert build_model(name).config == PUBLIC[name].model_class(**PUBLIC[name].arguments).config


TIMM_NAMES = {
    **{name: f"{name}.fb_in1k" for name in PUBLIC if name.startswith("deit")},
    **{name: f"{name}.ms_in1k" for name in PUBLIC if re.fullmatch(r"swin_.*_(224|384)", name)},
    **{name: f"{name.removesuffix('_22kto1k')}.ms_in22k_ft_in1k" for name in PUBLIC if name.endswith("_22kto1k")},
    "dino_vits16": "vit_small_patch16_224.dino", "dino_vitb16": "vit_base_patch16_224.dino",
    **{f"dinov2_vit{letter}14{end}": f"vit_{size}_patch14{infix}_dinov2.lvd142m"
       for letter, size in (("s", "small"), ("b", "base"), ("l", "large"))
       for end, infix in (("", ""), ("_reg", "_reg4"))},
    "mae_vit_base_patch16": "vit_base_patch16_224.mae", "mae_vit_large_patch16": "vit_large_patch16_224.mae"}
# timm has these files of the papers' code under names of its own, at an address of its own.
TIMM_ENDS = {"_pt22k_ft22kto1k": ".in22k_ft_in22k_in1k", "_pt1k_ft1k": ".in1k_ft_in1k",
             "_pt1k_ft21kto1k": ".in1k_ft_in22k_in1k"}
TIMM_BEITS = {name: re.sub("_pt.*", "", name) + TIMM_ENDS[re.search("_pt.*", name)[0]] for name in MASKED
              if name.startswith("beit") and not name.endswith("_pt22k")}
# These are in no library: MAE's models that paint, and its fine-tuned ones.
ALONE = [name for name in PUBLIC if re.match("mae_(visualize|finetuned)", name)]
PRETRAINED_BEITS = [name for name in PUBLIC if name.endswith("_pt22k")]


def test_public_entries_are_all_checked_against_a_library():
    assert {*TIMM_NAMES, *OF_TORCHVISION, *TIMM_BEITS, *ALONE, *PRETRAINED_BEITS} == set(PUBLIC)


@pytest.mark.parametrize("name", TIMM_BEITS)
def test_public_entries_agree_with_timms_beit(name):
    entry, c = PUBLIC[name], PUBLIC[name].arguments
    assert entry.url.rsplit("/", 1)[1] == f"{name}.pth"
    with torch.device("meta"):
        theirs = timm.create_model(TIMM_BEITS[name].split(".")[0])
        ours = entry.model_class(**c)
    shapes = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): tensor.shape for key, tensor in ours.state_dict().items()
              if not key.endswith("qkv.bias")}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()
                      if not key.endswith(("q_bias", "v_bias"))}
    assert ours.patch_embed.img_size == theirs.patch_embed.img_size
    assert ours.config.layer_scale == theirs.blocks[0].init_values
    assert (ours.fc_norm.eps, ours.blocks[0].attn.n_heads) == (theirs.fc_norm.eps, theirs.blocks[0].attn.num_heads)
    known = timm.get_pretrained_cfg(TIMM_BEITS[name])
    assert (entry.mean, entry.std, entry.interpolation) == (known.mean, known.std, known.interpolation)


@pytest.mark.parametrize("name", PRETRAINED_BEITS)
def test_public_entries_of_pretraining_have_the_blocks_of_the_fine_tuned_ones(name):
    fine_tuned = f"{name}_ft22kto1k"
    with torch.device("meta"):
        model, theirs = (PUBLIC[one].model_class(**PUBLIC[one].arguments) for one in (name, fine_tuned))
        inner = MaskedTokenModel(**PUBLIC[name].arguments | dict(depth=1)).encoder()
    assert (model.config.n_tokens, model.config.shared_bias, len(model.blocks)) == (8192, True, len(theirs.blocks))
    assert vars(inner.config) | dict(depth=theirs.config.depth, n_classes=1000) == vars(theirs.config)
    assert PUBLIC[name].url.rsplit("/", 1) == [PUBLIC[fine_tuned].url.rsplit("/", 1)[0], f"{name}.pth"]
    assert (PUBLIC[name].mean, PUBLIC[name].measured) == ((0.5,) * 3, pretrained.FINE_TUNED)


@pytest.mark.parametrize("name", ALONE)
def test_public_entries_of_mae_say_what_its_files_hold(name):
    entry = PUBLIC[name]
    with torch.device("meta"):
        model = entry.model_class(**entry.arguments)
    folder, paints = name.split("_")[1].replace("finetuned", "finetune"), "visualize" in name
    assert entry.url == f"https://dl.fbaipublicfiles.com/mae/{folder}/{name}.pth"
    assert (entry.top1 is None, entry.checksum is None) == (paints, paints)
    if paints:
        assert (model.config.norm_pix_loss, model.decoder_pred.out_features) == (False, 768)
    else:
        assert (model.config.pool, model.config.fc_norm, model.head.out_features) == ("mean", True, 1000)
        assert {**vars(model.config), "pool": "cls", "fc_norm": False} == vars(model.config_class(
            **MODELS[entry.model].arguments))


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_public_entries_agree_with_timm(name):
    entry, theirs = PUBLIC[name], timm.get_pretrained_cfg(TIMM_NAMES[name])
    assert entry.url == theirs.url
    assert (entry.mean, entry.std, entry.interpolation) == (theirs.mean, theirs.std, theirs.interpolation)
    side, n_classes = entry.arguments["img_size"], entry.arguments["n_classes"]
    assert ((3, side, side), n_classes) == (theirs.input_size, theirs.num_classes)
    assert entry.licence.lower() == theirs.license
    digits = re.search(r"-([0-9a-f]{8})\.pth", theirs.url)
    assert entry.checksum == (f"sha256:{digits[1]}" if digits else entry.checksum)
    assert digits or entry.checksum is None or entry.checksum.startswith("md5:")


@pytest.mark.parametrize("name", [name for name in TIMM_NAMES if name in VITS])
def test_public_entries_have_the_blocks_of_timm(name):
    with torch.device("meta"):
        theirs = timm.create_model(TIMM_NAMES[name].split(".")[0], depth=1)
        ours = PUBLIC[name].model_class(**{**PUBLIC[name].arguments, "depth": 1})
    entry = PUBLIC[name]
    assert ours.blocks[0].attn.n_heads == theirs.blocks[0].attn.num_heads
    assert ours.norm.eps == theirs.norm.eps
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()
              if not key.startswith("head.") and key != "pos_embed"}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()
            if not key.startswith("head.") and key != "pos_embed"} == shapes
    assert ours.patch_embed.img_size == theirs.patch_embed.img_size
    assert entry.arguments["n_classes"] in (0, 1000)


@pytest.mark.parametrize("name", [name for name in TIMM_NAMES if name in SWINS])
def test_public_entries_have_the_stages_of_timms_swin(name):
    with torch.device("meta"):
        theirs = timm.create_model(TIMM_NAMES[name].split(".")[0])
        ours = SwinTransformer(**PUBLIC[name].arguments)
    shapes = {re.sub(r"^stages", "layers", re.sub(r"^patch_norm", "patch_embed.norm", key)): tensor.shape
              for key, tensor in ours.state_dict().items() if not key.startswith("head.")}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items() if not key.startswith("head.")}
    assert (ours.head.weight.shape, ours.norm.eps) == (theirs.head.fc.weight.shape, theirs.norm.eps)
    for stage, layer in zip(ours.stages, theirs.layers, strict=True):
        for block, their_block in zip(stage.blocks, layer.blocks, strict=True):
            assert block.attn.grid_size == their_block.window_size
            assert tuple(block.attn.shift_in(their_block.input_resolution)) == tuple(their_block.shift_size)


OF_THE_FAMILY = {
    "deit_tiny_distilled_patch16_224": dict(SMALL),
    "beit_base_patch16_224_pt22k_ft22kto1k": dict(SMALL, layer_scale=0.1),
    "beitv2_large_patch16_224_pt1k_ft1k": dict(SMALL, layer_scale=0.1),
    "swin_t": dict(img_size=16, patch_size=2, embed_dim=8, depths=(1, 2), n_heads=(1, 2), window_size=4),
    "swin_tiny_patch4_window7_224": dict(img_size=12, patch_size=2, embed_dim=8, depths=(1, 2), n_heads=(1, 2),
                                         window_size=3)}


def file_of(name, c, folder):
    """Write a small random model as the authors of the public file `name` would; return the authors' model."""
    if "deit" in name:
        theirs = timm.models.deit.VisionTransformerDistilled(img_size=c["img_size"], patch_size=c["patch_size"],
                                                             embed_dim=c["embed_dim"], depth=c["depth"],
                                                             num_heads=c["n_heads"])
        state = theirs.state_dict()
    elif "beit" in name:
        theirs = Beit(img_size=c["img_size"], patch_size=c["patch_size"], embed_dim=c["embed_dim"], depth=c["depth"],
                      num_heads=c["n_heads"], init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True)
        state = theirs.state_dict()
    elif name == "swin_t":
        theirs = torchvision.models.SwinTransformer([c["patch_size"]] * 2, c["embed_dim"], list(c["depths"]),
                                                    list(c["n_heads"]), [c["window_size"]] * 2)
        state = theirs.state_dict()
    else:
        theirs = timm.models.SwinTransformer(img_size=c["img_size"], patch_size=c["patch_size"], depths=c["depths"],
                                             embed_dim=c["embed_dim"], num_heads=c["n_heads"],
                                             window_size=c["window_size"])
        state = {key.replace("head.fc", "head").replace("layers.1.downsample", "layers.0.downsample"): tensor
                 for key, tensor in theirs.state_dict().items()}
    torch.save({"model": state}, folder / PUBLIC[name].url.rsplit("/", 1)[1])
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", OF_THE_FAMILY)
def test_load_gives_a_public_model_of_the_family_ready_to_use(name, public, monkeypatch):
    entry = replace(PUBLIC[name], config=OF_THE_FAMILY[name], checksum=None)
    for module in (pretrained, checkpoints):
        monkeypatch.setattr(module, "PUBLIC", {name: entry})
    theirs = file_of(name, OF_THE_FAMILY[name], public.folder)
    model, images = load(name), torch.randn(2, 3, *(OF_THE_FAMILY[name]["img_size"],) * 2)
    torch.testing.assert_close(model(images), theirs(images))
    assert (type(model), len(model.preprocessing.class_names)) == (entry.model_class, 1000)
    assert model.preprocessing.interpolation == "bicubic"
    assert model.preprocessing.mean == ((0.5,) * 3 if name.startswith("beit_") else IMAGENET_MEAN)
    larger = load(name, n_classes=4, img_size=40)
    assert larger(torch.zeros(2, 3, 40, 40)).shape == (2, 4)
    with pytest.raises(InputError, match=one_line_with("does not match")):
        load(name, patch_size=4)


# ---- From the command line


def run_main(monkeypatch, capsys, *arguments):
    """Return (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["train_vit.py"])
    code = 0
    try:
        script(lambda: train_vit.main(["inspect", *map(str, arguments)]))
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def test_inspect_says_what_a_file_is(monkeypatch, capsys, public):
    code, out, err = run_main(monkeypatch, capsys, public.folder / "small.pth")
    assert (code, err) == (0, "")
    assert out == f"{describe_checkpoint(public.folder / 'small.pth')}\n"
    assert f"{public.folder / 'small.pth'}: timm's names" in out
    assert "    model = VisionTransformer(img_size=20, patch_size=5, embed_dim=12, depth=2, n_heads=1" in out


@pytest.mark.parametrize("contents", [None, b"", b"accuracy 0.93\n"])
def test_inspect_refuses_a_bad_file_in_one_line(contents, monkeypatch, capsys, tmp_path):
    if contents is not None:
        (tmp_path / "m.pt").write_bytes(contents)
    code, out, err = run_main(monkeypatch, capsys, tmp_path / "m.pt")
    assert (code, out) == (2, "")
    assert err.startswith("train_vit.py: ")
    assert str(tmp_path / "m.pt") in err
    assert (err.count("\n"), err[-1]) == (1, "\n")


def test_inspect_without_a_file_lists_every_name(monkeypatch, capsys):
    code, out, err = run_main(monkeypatch, capsys)
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert tuple(rows) == PRETRAINED
    for name, entry in PUBLIC.items():
        c = entry.arguments
        patch = [str(c["patch_size"])] if "patch_size" in c else []  # a CNN has none
        numbers = [str(c["img_size"]), *patch, str(c["n_classes"]), *([f"{entry.top1:.1f}"] if entry.top1 else [])]
        assert rows[name].split()[1:2 + len(numbers)] == [*numbers, f"{entry.licence},"]
        assert entry.source in rows[name]
        assert (entry.measured in rows[name]) == (entry.measured != "as it is")


def test_inspect_points_a_model_name_to_load(monkeypatch, capsys):
    code, _, err = run_main(monkeypatch, capsys, "dinov2_vits14")
    assert code == 2
    assert "load('dinov2_vits14') builds that model" in err
