"""Models inside torch's wrappers, and models that cannot do everything: quantised, on the device meta, frozen."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from train_vit import Trainer
from visualizations import AttentionVisualizer, visualize_attention_grid
from vit_bridge.analysis.capture import attention_maps
from vit_bridge.analysis.cost import count_flops, count_parameters, peak_memory, throughput
from vit_bridge.analysis.explanations import explain
from vit_bridge.analysis.receptive_field import receptive_field, untrained_copy
from vit_bridge.analysis.selfcheck import selfcheck
from vit_bridge.analysis.similarity import layer_similarity
from vit_bridge.inference import export_onnx, predict, score
from vit_bridge.models.adapters import adapt
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.registry import build_model
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.runtime import predictions, unwrapped
from vit_bridge.weights.checkpoints import load, load_checkpoint, read_checkpoint, save_model
from vit_model import InputError, VisionTransformer

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(5) % 3


def plain():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=2, n_heads=3, n_classes=3).eval()
    nn.init.normal_(model.head.weight)
    model.preprocessing = Preprocessing(8, class_names=["a", "b", "c"])
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


WRAPPERS = {"DataParallel": nn.DataParallel, "AveragedModel": AveragedModel, "compiled": compiled,
            "compiled in place": compiled_in_place, "compiled inside": lambda model: nn.DataParallel(compiled(model)),
            "compiled outside": lambda model: compiled(nn.DataParallel(model))}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["vit_nano", "deit_nano", "mae_nano", "swin_nano", "hybrid", "convnet",
                                  "convnext_nano"])
def test_model_compiles_as_one_graph(name, training):
    """Where torch.compile cannot trace a line it runs it eagerly, without a word, and gains nothing."""
    torch.compiler.reset()
    model = build_model(name, n_classes=0 if "mae" in name else 3).train(training)
    torch.compile(model, backend="eager", fullgraph=True)(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_model_does_what_the_model_does(wrap, tmp_path):
    model, wrapped = plain(), wrap(plain())
    assert type(unwrapped(wrapped)) is VisionTransformer
    assert predict(wrapped, IMAGES) == predict(model, IMAGES)
    found = score(wrapped, [(IMAGES, LABELS)], "cpu")
    assert found.class_names == ["a", "b", "c"]
    assert torch.equal(found.confusion, score(model, [(IMAGES, LABELS)], "cpu").confusion)
    assert torch.equal(predictions(wrapped, IMAGES), predictions(model, IMAGES))
    assert torch.equal(attention_maps(wrapped, IMAGES), attention_maps(model, IMAGES))
    for method in ("attention", "rollout", "relevance", "grad_cam"):
        saliencies = [explain(one, IMAGES, method).saliency.nan_to_num(-1) for one in (wrapped, model)]
        assert torch.equal(*saliencies)
    assert torch.equal(receptive_field(wrapped, IMAGES, 1), receptive_field(model, IMAGES, 1))
    assert torch.equal(layer_similarity(wrapped, model, IMAGES), layer_similarity(model, model, IMAGES))
    assert count_flops(wrapped) == count_flops(model)
    assert all(check.holds is not False for check in selfcheck(wrapped))
    assert visualize_attention_grid(wrapped, IMAGES[:1])
    assert torch.equal(AttentionVisualizer(wrapped, "cpu").relevance(IMAGES[0]),
                       AttentionVisualizer(model, "cpu").relevance(IMAGES[0]))
    assert type(untrained_copy(wrapped)) is VisionTransformer


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_model_is_saved_and_filled_without_a_prefix(wrap, tmp_path):
    save_model(wrap(plain()), tmp_path / "model.pt")
    assert read_checkpoint(tmp_path / "model.pt")["state_dict"].keys() == plain().state_dict().keys()
    assert torch.equal(load(tmp_path / "model.pt")(IMAGES), plain()(IMAGES))
    other = wrap(VisionTransformer(**vars(plain().config)))
    load_checkpoint(other, tmp_path / "model.pt")
    assert torch.equal(unwrapped(other).eval()(IMAGES), plain()(IMAGES))


def test_model_with_compiled_blocks_is_saved_without_a_prefix(tmp_path):
    model = plain()
    model.blocks[1] = compiled(model.blocks[1])
    assert torch.equal(attention_maps(model, IMAGES), attention_maps(plain(), IMAGES))
    save_model(model, tmp_path / "model.pt")
    assert torch.equal(load(tmp_path / "model.pt")(IMAGES), plain()(IMAGES))


@pytest.mark.parametrize("state_alone", [False, True])
def test_model_with_compiled_parts_is_filled_from_a_checkpoint(state_alone, tmp_path):
    path = tmp_path / "model.pt"
    torch.manual_seed(0)
    convnet = ConvNet(8, 3, 3, (5, 7), (1, 1), 1).eval()
    for source in (plain(), convnet):
        torch.save(source.state_dict(), path) if state_alone else save_model(source, path)
        model = type(source)(**vars(source.config)).eval()
        parts = model.blocks if source is not convnet else model.stages
        parts[-1] = compiled(parts[-1])
        load_checkpoint(model, path)
        assert any("_orig_mod" in key for key in model.state_dict())
        assert torch.equal(model(IMAGES), source(IMAGES))


def test_wrapped_model_is_exported(tmp_path):
    pytest.importorskip("onnxscript")
    assert export_onnx(nn.DataParallel(compiled(plain())), tmp_path / "model.onnx") < 1e-4


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_model_is_trained_as_the_model(wrap):
    weights = []
    for model in (plain(), wrap(plain())):
        trainer = Trainer(model, "cpu", amp="off", ema_decay=0.9)
        trainer.train([(IMAGES, LABELS)], [(IMAGES, LABELS)], n_epochs=2, seed=1, progress=False)
        assert type(trainer.model) is VisionTransformer
        weights.append(trainer.average.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_trainer_trains_through_the_compiler_that_was_given():
    calls = []
    model = torch.compile(plain(), backend=lambda graph, inputs: calls.append(len(inputs)) or graph.forward)
    Trainer(model, "cpu", amp="off").train([(IMAGES, LABELS)], n_epochs=1, progress=False)
    assert calls


def test_trainer_refuses_a_data_parallel_over_several_gpus():
    model = nn.DataParallel(plain())
    model.device_ids = [0, 1]
    with pytest.raises(InputError, match=r"DataParallel over 2 GPUs.*torchrun --nproc-per-node=2"):
        Trainer(model, "cpu")


# ---- Quantised --------------------------------------------------------------------------------------------


def quantised(layers):
    """A copy of the plain model whose linear layers, or those of its blocks alone, are int8."""
    model = plain()
    torch.ao.quantization.quantize_dynamic(getattr(model, layers, model), {nn.Linear}, dtype=torch.qint8, inplace=True)
    return model


@pytest.mark.parametrize("layers", ["all", "blocks"])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantised_model_predicts_and_shows_attention(layers):
    model = quantised(layers)
    assert adapt(model).n_classes == 3
    torch.testing.assert_close(attention_maps(model, IMAGES), attention_maps(plain(), IMAGES), rtol=0, atol=0.05)
    assert [line[0][0] for line in predict(model, IMAGES)] == [line[0][0] for line in predict(plain(), IMAGES)]
    assert score(model, [(IMAGES, LABELS)], "cpu", amp="bf16").n == 5
    for method in ("attention", "rollout"):
        torch.testing.assert_close(explain(model, IMAGES, method).saliency, explain(plain(), IMAGES, method).saliency,
                                   rtol=0, atol=0.05)
    assert all(check.holds is not False for check in selfcheck(model))
    assert count_parameters(model) == count_parameters(plain())


@pytest.mark.parametrize("layers", ["all", "blocks"])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantised_model_says_what_it_cannot_do(layers, tmp_path):
    model = quantised(layers)
    for call in (lambda: explain(model, IMAGES, "relevance"), lambda: explain(model, IMAGES, "grad_cam"),
                 lambda: receptive_field(model, IMAGES, 1), lambda: throughput(model, train=True),
                 lambda: peak_memory(model, IMAGES, train=True)):
        with pytest.raises(InputError, match="this VisionTransformer is quantised, so it has no gradients; "):
            call()
    with pytest.raises(InputError, match="is quantised, and integer products are not counted; count"):
        count_flops(model)
    with pytest.raises(InputError, match="is quantised, but a checkpoint holds floating-point weights"):
        save_model(model, tmp_path / "model.pt")
    save_model(plain(), tmp_path / "plain.pt")
    with pytest.raises(InputError, match="is quantised, but a checkpoint holds floating-point weights"):
        load_checkpoint(model, tmp_path / "plain.pt")
    with pytest.raises(InputError, match="is quantised, and integer weights cannot be trained"):
        Trainer(model, "cpu")
    pytest.importorskip("onnxscript")
    with pytest.raises(InputError, match="is quantised and cannot be exported"):
        export_onnx(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["plain.pt"]


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_cost_of_a_model_is_measured_in_its_precision(precision):
    model = plain().to(precision)
    assert (count_flops(model), count_parameters(model)) == (count_flops(plain()), count_parameters(plain()))
    for train in (False, True):
        assert throughput(model, batch_size=2, seconds=0, train=train) > 0
    assert peak_memory(model, IMAGES) == peak_memory(model, IMAGES.to(precision)) > 0


# ---- Without weights, in half precision, frozen -----------------------------------------------------------


def test_model_on_meta_is_refused_in_one_line(tmp_path):
    pytest.importorskip("onnxscript")
    model = plain().to("meta")
    save_model(plain(), tmp_path / "plain.pt")
    for call in (lambda: predict(model, IMAGES), lambda: score(model, [(IMAGES, LABELS)]),
                 lambda: Trainer(model, "cpu"), lambda: attention_maps(model, IMAGES),
                 lambda: explain(model, IMAGES, "grad_cam"),
                 lambda: receptive_field(model, IMAGES), lambda: save_model(model, tmp_path / "model.pt"),
                 lambda: load_checkpoint(model, tmp_path / "plain.pt"), lambda: AttentionVisualizer(model),
                 lambda: export_onnx(model, tmp_path / "model.onnx"), lambda: predictions(model, IMAGES)):
        with pytest.raises(InputError, match=r"\Athe model is on the device 'meta'[^\n]*\Z"):
            call()


def test_model_in_half_precision_is_scored_and_not_trained():
    for kind in (torch.float16, torch.bfloat16):
        assert score(plain().to(kind), [(IMAGES, LABELS)], "cpu").correct == \
            score(plain(), [(IMAGES, LABELS)], "cpu").correct
    with pytest.raises(InputError, match="the weights of this VisionTransformer are float16"):
        Trainer(plain().half(), "cpu")


def test_frozen_model_has_gradient_views_and_is_not_trained():
    model = copy.deepcopy(plain()).requires_grad_(False)
    for method in ("relevance", "grad_cam"):
        assert torch.equal(explain(model, IMAGES, method).saliency.nan_to_num(-1),
                           explain(plain(), IMAGES, method).saliency.nan_to_num(-1))
    for frozen in (model, nn.Flatten()):
        with pytest.raises(InputError, match="no trainable parameter"):
            Trainer(frozen, "cpu").train([(IMAGES, LABELS)], n_epochs=1, progress=False)
