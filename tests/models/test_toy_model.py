"""A new model is one file and one line in the registry: it trains, resumes exactly, saves, loads, exports, is compared
and explained, and no other file is touched."""

from dataclasses import dataclass

import pytest
import torch
from command_runs import PowerCut, at_step, cut, tensors_in, train
from torch import nn

import train_vit
from vit_bridge.analysis.explanations import explain
from vit_bridge.analysis.perturbations import shift_consistency
from vit_bridge.analysis.receptive_field import receptive_field, theoretical_receptive_field
from vit_bridge.analysis.similarity import layer_similarity
from vit_bridge.compare.experiments import EXPERIMENTS, ComparisonSetup
from vit_bridge.inference import export_onnx, predict, score
from vit_bridge.models.protocol import ImageModel, layer_groups
from vit_bridge.models.registry import MODELS, ModelEntry, build_model
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.weights.checkpoints import describe_checkpoint, load, load_checkpoint, read_checkpoint, save_model
from vit_model import create_vit


@dataclass(frozen=True)
class ToyConfig:
    img_size: int = 16
    in_channels: int = 3
    n_classes: int = 10
    width: int = 6


class ToyNet(ImageModel):
    """A stem, one stage, the mean, a head: (B, 3, height, width) -> (B, n_classes)."""

    config_class = ToyConfig

    def __init__(self, *args, **options):
        super().__init__()
        self.config = c = ToyConfig(*args, **options)
        self.stem = nn.Conv2d(c.in_channels, c.width, 4, stride=4)
        self.stage = nn.Sequential(nn.Conv2d(c.width, c.width, 3, padding=1), nn.GELU())
        self.norm = nn.GroupNorm(1, c.width)
        self.head = nn.Linear(c.width, c.n_classes) if c.n_classes else nn.Identity()

    @property
    def n_features(self):
        return self.config.width

    def layers(self):
        return [self.stem, self.stage]

    def forward_features(self, images):
        return self.norm(self.stage(self.stem(images)))  # (B, D, height / 4, width / 4)

    def forward_head(self, x, pre_logits=False):
        x = x.mean(dim=(2, 3))  # (B, D)
        return x if pre_logits else self.head(x)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(MODELS, "toy", ModelEntry(ToyNet, dict(), None))  # the one line


def toy():
    torch.manual_seed(0)
    model = build_model("toy", n_classes=3, img_size=16)
    model.preprocessing = Preprocessing(16, class_names=["a", "b", "c"])
    return model.eval()


def images(n=6):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_toy_model_saves_loads_and_is_described(tmp_path):
    model, path = toy(), tmp_path / "toy.pt"
    save_model(model, path)
    again = load(path)
    assert torch.equal(again(images()), model(images()))
    assert again.preprocessing == model.preprocessing
    assert describe_checkpoint(path).model_class == "ToyNet"
    other = build_model("toy", n_classes=3, img_size=16)
    load_checkpoint(other, path)
    assert torch.equal(other.eval()(images()), model(images()))
    fewer = load(path, n_classes=2)
    assert fewer.head.out_features == 2
    assert torch.equal(fewer.stem.weight, model.stem.weight)


def test_toy_model_predicts_scores_and_exports(tmp_path):
    model = toy()
    assert predict(model, images()[0])[0][0] in ("a", "b", "c")
    assert score(model, [(images(), torch.tensor([0, 1, 2, 0, 1, 2]))]).n == 6
    pytest.importorskip("onnxscript")
    assert export_onnx(model, tmp_path / "toy.onnx") < 1e-4


def test_toy_model_is_explained_and_measured():
    model = toy()
    found = explain(model, images(), "grad_cam", layer_idx=-1)
    assert found.saliency.shape == (6, 4, 4)
    with pytest.raises(Exception, match="has no attention maps"):
        explain(model, images(), "rollout")
    assert theoretical_receptive_field(model, 0) == (4, 4)
    assert (receptive_field(model, images(), 0) > 0).sum() == 16
    assert layer_similarity(model, model, images()).shape == (2, 2)
    assert shift_consistency(model, images(), 1).shape == (3, 3)


def test_toy_model_has_layer_groups():
    groups = layer_groups(toy())
    assert {name.split(".")[0]: layer for name, layer in groups.items()} == dict(stem=0, stage=1, norm=2, head=2)


def test_toy_model_trains_and_resumes_exactly(tmp_path, photos, monkeypatch, untested):
    words = ["--data-dir", photos, "--img-size", "16", "--model", "toy", "--batch-size", "7", "--epochs", "2"]
    train(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        at_step(patch, 4, cut)
        with pytest.raises(PowerCut):
            train(tmp_path / "cut", *words, "--save-minutes", "1e-9")
    train_vit.main(["--resume", str(tmp_path / "cut")])
    whole, resumed = (tensors_in(read_checkpoint(tmp_path / run / "last.pt")) for run in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert load(tmp_path / "cut" / "best.pt").preprocessing.class_names == ["blue", "red"]


def test_toy_model_is_fine_tuned_with_layer_decay_and_muon(tmp_path, photos, untested):
    save_model(toy(), tmp_path / "toy.pt")
    train(tmp_path / "run", "--data-dir", photos, "--pretrained", tmp_path / "toy.pt", "--steps", "2",
          "--optimizer", "muon", "--layer-decay", "0.75")
    assert load(tmp_path / "run" / "best.pt").head.out_features == 2
    train(tmp_path / "probe", "--data-dir", photos, "--pretrained", tmp_path / "toy.pt", "--epochs", "1",
          "--freeze-backbone")
    assert torch.equal(load(tmp_path / "probe" / "best.pt").stem.weight, toy().stem.weight)


def test_toy_model_teaches_and_is_taught(tmp_path, photos, untested):
    teacher = build_model("toy", n_classes=2, img_size=16)
    save_model(teacher, tmp_path / "toy.pt", Preprocessing(16, class_names=["red", "blue"]))
    train(tmp_path / "run", "--data-dir", photos, "--model", "toy", "--teacher", tmp_path / "toy.pt", "--steps", "2")
    assert load(tmp_path / "run" / "best.pt").head.out_features == 2


@pytest.mark.slow
def test_toy_model_is_compared():
    torch.manual_seed(0)
    vit = create_vit("vit_nano", 3, img_size=16, depth=1, embed_dim=12).eval()
    setup = ComparisonSetup({"Toy": toy(), "ViT": vit}, images(8), torch.arange(8) % 3, toy().preprocessing,
                            seconds=0.01, sizes=(16,), patches=(8,), reach=1)
    for experiment in EXPERIMENTS.values():
        data = experiment.measure(setup)
        assert experiment.finding(data)
        assert experiment.draw(data, setup) or data == {}
        assert experiment.tables(data) is not None
