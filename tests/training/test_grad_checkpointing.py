"""Gradient checkpointing: the same steps, with fewer activations kept."""

import pytest
import timm
import torch
from toy_training import TINY, copy_of, same, toy_batches, without_times

from train_vit import Trainer, parse
from vit_bridge.models.beit import MaskedTokenModel
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.convnext import ConvNeXt
from vit_bridge.models.deit import DistilledViT
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.models.mae import MaskedAutoencoder
from vit_bridge.models.swin import SwinTransformer
from vit_bridge.training.objectives import MaskedPixels, MaskedTokens
from vit_bridge.training.tokenizer import PatchTokenizer
from vit_model import InputError, VisionTransformer

MODELS = {
    "vit": lambda: VisionTransformer(**TINY | dict(depth=3), dropout=0.1, drop_path=0.2),
    "hybrid": lambda: HybridCNNViT(3, 12, 3, 3, 8, 4, dropout=0.1),  # batch norm in its stem
    "convnet": lambda: ConvNet(8, 3, 3, (5, 7), (1, 1), 1),
    "distilled": lambda: DistilledViT(**TINY | dict(depth=3), drop_path=0.2),
    "swin": lambda: SwinTransformer(8, 1, 3, 3, 6, (2, 2), (1, 2), 3, dropout=0.1, drop_path=0.2),
    "convnext": lambda: ConvNeXt(8, 3, 3, (5, 7), (1, 1), 1, drop_path=0.2),
    "timm": lambda: timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=3, num_heads=3,
                                                  num_classes=3, proj_drop_rate=0.1),
}


def run(build, **settings):
    """Return (state dict, average's state dict, history, numbers kept for backward) of two epochs."""
    torch.manual_seed(0)
    trainer, kept = Trainer(build(), "cpu", **dict(amp="off", ema_decay=0.9) | settings), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        history = trainer.train(toy_batches(2), toy_batches(1), n_epochs=2, seed=1, progress=False)
    return copy_of(trainer.model), copy_of(trainer.average), without_times(history), sum(kept)


@pytest.mark.parametrize("kind", ["mae", "beit"])
def test_grad_checkpointing_of_models_without_labels_makes_the_same_steps_and_keeps_less(kind):
    vit = dict(TINY, patch_size=2, depth=3, n_classes=0, drop_path=0.2)
    objectives = dict(mae=MaskedPixels, beit=lambda: MaskedTokens(PatchTokenizer(5, 2).fit(toy_batches(1)[0][0])))
    models = dict(mae=lambda: MaskedAutoencoder(**vit, decoder_dim=8, decoder_depth=1, decoder_heads=2),
                  beit=lambda: MaskedTokenModel(**vit, n_tokens=5))
    (plain, _, history, kept), (again, _, same_history, kept_again) = (
        run(models[kind], objective=objectives[kind](), grad_checkpointing=on) for on in (False, True))
    assert same(plain, again)
    assert history == same_history
    assert kept_again < 0.8 * kept


@pytest.mark.parametrize("settings", [{}, dict(grad_accum_steps=2), dict(amp="bf16")], ids=["", "in parts", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_grad_checkpointing_makes_the_same_steps_and_keeps_less(name, settings):
    *plain, kept = run(MODELS[name], **settings)
    *again, kept_again = run(MODELS[name], grad_checkpointing=True, **settings)
    assert same(plain[0], again[0])  # batch statistics too, which are updated only once
    assert same(plain[1], again[1])
    assert plain[2] == again[2]
    assert kept_again < kept / 2


def test_grad_checkpointing_leaves_the_model_as_it_was():
    model = MODELS["convnet"]()
    Trainer(model, "cpu", grad_checkpointing=True).train(toy_batches(1), n_epochs=1, progress=False)
    assert not any("forward" in vars(module) for module in model.modules())


def test_grad_checkpointing_refuses_a_model_without_known_layers():
    with pytest.raises(InputError, match="grad_checkpointing needs a model whose layers are known: the class Linear"):
        Trainer(torch.nn.Linear(2, 3), "cpu", grad_checkpointing=True).train(toy_batches(1), n_epochs=1)
    with pytest.raises(InputError, match="--grad-checkpointing cannot be combined with --freeze-backbone"):
        parse(["--grad-checkpointing", "--freeze-backbone", "--pretrained", "vit_nano_shapes"])
