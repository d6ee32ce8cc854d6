"""Running a model: probabilities, the device, and that measuring a model changes nothing in it."""

import pytest
import torch
from measured_models import convnet, hybrid, images_for, vit

from vit_bridge.analysis.capture import attention_maps
from vit_bridge.analysis.cost import count_flops, peak_memory, throughput
from vit_bridge.analysis.receptive_field import receptive_field
from vit_bridge.runtime import choose_device, class_probabilities
from vit_model import InputError, VisionTransformer


def test_class_probabilities():
    model = vit().train()
    images = images_for(model)
    torch.testing.assert_close(class_probabilities(model, images), model.eval()(images).softmax(dim=-1))


def test_choose_device():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="'gpu' is unknown"):
        choose_device("gpu")
    with pytest.raises(InputError, match="'cuda:99' is not available"):
        choose_device("cuda:99")
    if not torch.backends.mps.is_available():
        with pytest.raises(InputError, match="'mps' is not available"):
            choose_device("mps")


# ---- Nothing is changed -----------------------------------------------------------------------------------


def state_of(model):
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return modes, hooks, grads, weights


def assert_same_state(before, after):
    assert before[:2] == after[:2]
    for old, new in zip(before[2], after[2], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    for name, old in before[3].items():
        assert torch.equal(old, after[3][name]), name


def measure_everything(model, images):
    receptive_field(model, images, 1)
    class_probabilities(model, images)
    count_flops(model)
    throughput(model, batch_size=2, seconds=0, train=True)
    peak_memory(model, images, train=True)
    if isinstance(model, VisionTransformer):
        attention_maps(model, images)


@pytest.mark.parametrize("make", [vit, convnet, hybrid])
def test_measuring_changes_nothing(make):
    model = make().train()
    model.head.eval()  # a mode of its own
    images = images_for(model)
    model(images).sum().backward()
    before, copied, random_state = state_of(model), images.clone(), torch.get_rng_state()
    measure_everything(model, images)
    assert_same_state(before, state_of(model))
    assert torch.equal(images, copied)
    assert not images.requires_grad
    if make is convnet:  # without dropout in a training pass nothing is drawn
        assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("measure", [attention_maps, receptive_field, class_probabilities, peak_memory,
                                     lambda model, images: count_flops(model, (14, 20))])
def test_an_error_changes_nothing(measure):
    model = vit().train()
    before = state_of(model)
    with pytest.raises(InputError):
        measure(model, torch.zeros(2, 3, 14, 20))
    assert_same_state(before, state_of(model))


def test_measurements_repeat():
    model = vit().train()
    images = images_for(model)
    assert torch.equal(attention_maps(model, images), attention_maps(model, images))
    assert torch.equal(receptive_field(model, images), receptive_field(model, images))
