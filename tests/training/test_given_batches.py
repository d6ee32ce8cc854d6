"""Inputs of a Trainer: labels, images and loaders of all kinds, and models of other libraries.

Each trains as the plain batch does, or is refused in one line.
"""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.models import vision_transformer
from toy_training import TINY, same, toy_batches

from train_vit import Stopped, Trainer, steps_within
from vit_bridge.errors import Assumption
from vit_bridge.inference import score
from vit_bridge.training.config import Callback
from vit_bridge.training.objectives import Classification
from vit_model import InputError, VisionTransformer

(IMAGES, LABELS), = toy_batches(1)
ONE_HOT = torch.eye(3, dtype=torch.int64)[LABELS]


def toy_model():
    torch.manual_seed(0)
    return VisionTransformer(**TINY)


def trained(batches, model=None, **settings):
    """Return the weights after two steps."""
    model = model or toy_model()
    Trainer(model, "cpu", amp="off", seed=1).train(batches, **dict(n_steps=2, progress=False) | settings)
    return model.state_dict()


@pytest.fixture(scope="module")
def plain():
    return trained([(IMAGES, LABELS)])


@pytest.mark.parametrize("batch", [
    *((IMAGES, LABELS.to(kind)) for kind in (torch.int32, torch.int16, torch.uint8)),
    (IMAGES, LABELS[:, None]),
    (IMAGES.double(), LABELS),
    [IMAGES, LABELS],
    (IMAGES.numpy(), LABELS.numpy().astype(np.int32)),
    (IMAGES, LABELS.tolist()),
    {"pixel_values": IMAGES, "labels": LABELS},
    {"label": LABELS, "image": IMAGES},
], ids=["int32", "int16", "uint8", "(B, 1)", "float64", "list", "numpy", "numbers", "dict", "dict, other names"])
def test_trainer_takes_batches_of_many_kinds(batch, plain):
    assert same(trained([batch]), plain)
    assert Trainer(toy_model(), "cpu").evaluate([batch]) == Trainer(toy_model(), "cpu").evaluate([(IMAGES, LABELS)])
    assert score(toy_model(), [batch], "cpu").correct == score(toy_model(), [(IMAGES, LABELS)], "cpu").correct


def test_trainer_takes_one_hot_labels_as_soft_targets():
    soft = trained([(IMAGES, ONE_HOT.float())])
    assert same(trained([(IMAGES, ONE_HOT)]), soft)
    assert same(trained([(IMAGES, ONE_HOT.bool())]), soft)
    for one in (ONE_HOT, ONE_HOT.float()):
        assert score(toy_model(), [(IMAGES, one)], "cpu").correct == score(toy_model(), [(IMAGES, LABELS)]).correct


def test_trainer_says_which_entries_of_a_dict_it_leaves_out(plain):
    with pytest.warns(Assumption, match=r"'image' holds the images and 'label' the labels; not used: 'idx'"):
        assert same(trained([{"image": IMAGES, "label": LABELS, "idx": LABELS}]), plain)
    with (pytest.warns(Assumption, match=r"'image' holds the images and nothing the labels; not used: 'target'"),
          pytest.raises(InputError, match="a batch has 1 entry")):
        trained([{"image": IMAGES, "target": LABELS}])


def with_nan():
    images = IMAGES.clone()
    images[3, 1, 0, 0] = float("nan")
    return images


class Singles(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return IMAGES[index], int(LABELS[index])


@pytest.mark.parametrize(("batches", "words"), [
    ([(IMAGES, LABELS - 1)], "label -1 is out of range; labels begin at 0"),
    ([(IMAGES, LABELS + 1)], "label 3 is out of range for a model with 3 classes; labels begin at 0 and end at 2"),
    ([(IMAGES, LABELS.float())], r"labels are float32 of \(7,\); expected class numbers from 0, int64 \(B\)"),
    ([(IMAGES, LABELS.float()[:, None])], r"labels are float32 of \(7, 1\); expected class numbers"),
    ([(IMAGES, ONE_HOT | ONE_HOT.roll(1, 0))], r"labels of int64 \(7, 3\) have rows that sum to 1 to 2"),
    ([(IMAGES, 2 * ONE_HOT.float())], r"labels of float32 \(7, 3\) have rows that sum to 2 to 2"),
    ([(IMAGES, torch.eye(5)[LABELS])], r"soft targets of shape \(7, 5\) are for 5 classes, but the model has 3"),
    ([(IMAGES, LABELS[:, None, None].expand(7, 2, 2))], r"labels are int64 of \(7, 2, 2\)"),
    ([(IMAGES, LABELS[:6])], r"tensors of shape \(7, 3, 8, 8\) and \(6,\); expected as many labels as images"),
    ([(IMAGES, torch.tensor(1))], r"tensors of shape \(7, 3, 8, 8\) and \(\)"),
    ([(IMAGES, ["fox"] * 7)], "a batch holds a list of str; expected"),
    ([{"foo": IMAGES, "bar": LABELS}], "a batch is a dict with 'foo', 'bar'; expected one of 'pixel_values'"),
    ([{"image": IMAGES, "images": IMAGES, "label": LABELS}], "a batch is a dict with 'image', 'images', 'label'"),
    ([{"image": IMAGES, "label": LABELS, "labels": LABELS}], "a batch is a dict with 'image', 'label', 'labels'"),
    ([IMAGES], r"a batch has 1 entry, \(7, 3, 8, 8\); expected 2, images"),
    ([{"image": IMAGES}], r"a batch has 1 entry, .*labels \(B\), in a dict under 'labels' or 'label'; for other"),
    ([(IMAGES, LABELS, LABELS)], r"a batch has 3 entries, \(7, 3, 8, 8\), \(7,\), \(7,\); expected 2"),
    ([(IMAGES.byte(), LABELS)], r"images of a batch are uint8 of \(7, 3, 8, 8\); expected normalised"),
    ([(with_nan(), LABELS)], "1 of the 7 images of a batch hold NaN or infinity, the first at index 3"),
    ([(IMAGES.permute(0, 2, 3, 1), LABELS)], r"the shape \(7, 8, 8, 3\), with channels last; expected \(B, C, H, W\)"),
    ([], "the loader has 0 batches"),
    (None, "got a NoneType as a loader; pass a torch DataLoader"),
    (Singles(), "got a Singles, a data set that returns one image at a time; pass batches"),
], ids=range(23))
def test_trainer_refuses_what_it_cannot_use_in_one_line(batches, words):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))  # a model without checks of its own
    with pytest.raises(InputError, match=words) as error:
        trained(batches, model, n_epochs=1, n_steps=None)
    assert "\n" not in str(error.value)


def test_labels_beyond_the_classes_are_seen_before_the_step_without_a_look_at_the_device():
    """On a GPU the step does not check labels, because that would wait; the loader checks them."""
    objective, model = Classification(), nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    objective(model, objective.check((IMAGES, LABELS)))
    assert (objective.n_classes, objective.suspect) == (3, False)
    objective.check((IMAGES, LABELS + 1))
    assert objective.suspect
    objective.check((IMAGES, LABELS))
    assert not objective.suspect


def test_own_loss_gets_one_hot_labels_as_they_are():
    targets = []

    def loss(logits, labels):
        targets.append(labels)
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)

    several = ONE_HOT | ONE_HOT.roll(1, 0)
    Trainer(toy_model(), "cpu", loss_fn=loss).train([(IMAGES, several)], n_epochs=1, progress=False)
    assert torch.equal(targets[0], several.float())


def test_own_loss_gets_numbers_of_any_shape_and_accuracies_are_nan():
    for shape, n_outputs in (((7,), 1), ((7, 1), 1), ((7, 4), 2)):
        torch.manual_seed(0)
        model, values = nn.Sequential(nn.Flatten(), nn.Linear(192, n_outputs)), torch.rand(shape)
        targets = []

        def loss(outputs, labels, targets=targets):
            targets.append(labels)
            return outputs.square().mean()

        with pytest.warns(Assumption, match="are not classes, so accuracies are NaN") as said:
            history = Trainer(model, "cpu", loss_fn=loss).train([(IMAGES, values)], [(IMAGES, values)], n_epochs=2,
                                                                progress=False)
        assert len(said) == 1
        assert all(torch.equal(one, values) for one in targets)
        assert np.isnan([history["train_acc"], history["val_balanced_acc"]]).all()
        assert np.isfinite([history["train_loss"], history["val_loss"]]).all()


def test_labels_beyond_the_classes_get_the_advice_that_fits():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    ignored = LABELS.clone().clamp(min=1)
    ignored[2] = 255
    with pytest.raises(InputError, match=r"label 255 is out of range .* end at 2: leave out images without a class"):
        trained([(IMAGES, ignored)], model)
    with pytest.raises(InputError, match=r"label 3 is out of range .* end at 2: subtract 1"):
        trained([(IMAGES, LABELS + 1)], model)
    with pytest.raises(InputError, match=r"int64 of \(7, 3, 1\).*: pass one number or one row per image"):
        trained([(IMAGES, ONE_HOT[:, :, None])], model)


def test_images_that_are_not_normalised_are_said_once_a_training():
    raw = IMAGES.sub(IMAGES.min()).div(IMAGES.max() - IMAGES.min()).mul(255)
    model, trainer = toy_model(), None
    trainer = Trainer(model, "cpu")
    for _ in range(2):
        with pytest.warns(Assumption, match="images hold values from 0 to 255; expected normalised images") as said:
            trainer.train([(raw, LABELS)] * 3, n_epochs=2, progress=False)
        assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train([(IMAGES * 60, LABELS), (raw / 255, LABELS)], n_epochs=1, progress=False)


# ---- Loaders without a length -----------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(IMAGES, LABELS, strict=True))


def stream():
    return DataLoader(Stream(), batch_size=3)  # 3, 3 and 1 images


def batches(n):
    return ((IMAGES, LABELS) for _ in range(n))


def test_trainer_takes_a_loader_without_a_length_where_steps_are_given(plain):
    listed = list(stream())
    assert same(trained(stream(), n_steps=5), trained(listed, n_steps=5, warmup_epochs=None))
    assert same(trained(batches(9)), plain)
    assert Trainer(toy_model(), "cpu").evaluate(stream()) == Trainer(toy_model(), "cpu").evaluate(listed)


def test_trainer_resumes_on_a_loader_without_a_length():
    class Stop(Callback):
        def on_batch(self, state):
            return state.step == 4

    whole, model = trained(stream(), n_steps=8), toy_model()
    trainer = Trainer(model, "cpu", amp="off", seed=1)
    with pytest.raises(Stopped) as stopped:
        trainer.train(stream(), n_steps=8, callbacks=[Stop()], progress=False)
    assert same(trained(stream(), n_steps=8, resume=stopped.value.state.state_dict()), whole)


@pytest.mark.parametrize(("run", "words"), [
    (lambda: trained(stream(), n_epochs=1, n_steps=None), "the loader has no length, like a stream or a generator"
                                                          "; pass n_steps="),
    (lambda: trained(stream(), warmup_epochs=1.0), "the loader has no length"),
    (lambda: trained(batches(1)), "the loader is a generator, which yields its batches only once"),
    (lambda: steps_within(1.0, toy_model(), stream(), [(IMAGES, LABELS)], "cpu"), r"no length.*pass a number of steps"),
    (lambda: steps_within(1.0, toy_model(), [(IMAGES, LABELS)], batches(1), "cpu"), "no length"),
], ids=["epochs", "warm-up", "exhausted", "steps_within", "steps_within, validation"])
def test_loader_without_a_length_is_refused_where_it_needs_one(run, words):
    with pytest.raises(InputError, match=words):
        run()


def test_generator_as_validation_loader_is_refused_in_the_second_epoch():
    with pytest.raises(InputError, match="which yields its batches only once"):
        Trainer(toy_model(), "cpu").train([(IMAGES, LABELS)], batches(1), n_epochs=2, progress=False)


def test_model_without_a_head_is_refused_and_a_module_with_another_head_is_trained(plain):
    headless = VisionTransformer(**TINY | dict(n_classes=0))
    with pytest.raises(InputError, match=r"\Athis VisionTransformer has no head, so it returns features"):
        trained([(IMAGES, LABELS)], headless)
    torchvision_model = vision_transformer.VisionTransformer(8, 4, 1, 2, 12, 12, num_classes=3)
    trained([(IMAGES, LABELS)], torchvision_model)
    torchvision_model.heads = nn.Identity()
    with pytest.raises(InputError, match="has no head"):
        trained([(IMAGES, LABELS)], torchvision_model)
    trained([(IMAGES, LABELS)], nn.Sequential(headless, nn.Linear(headless.n_features, 3)))
    headless.head = Scaled(headless.n_features)
    trained([(IMAGES, LABELS)], headless)


class Scaled(nn.Module):
    """A head that is not a linear layer."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale


# ---- What a model gives -----------------------------------------------------------------------------------


class Giving(nn.Module):
    """A model whose output is a function of a toy model's logits."""

    def __init__(self, change):
        super().__init__()
        self.model, self.change = toy_model(), change

    def forward(self, images):
        return self.change(self.model(images))


class Output(dict):
    """A dict whose entries are attributes too, like ModelOutput of transformers."""

    logits = property(lambda self: self["logits"])


@pytest.mark.parametrize("change", [lambda z: dict(logits=z), lambda z: Output(logits=z, hidden_states=None)])
def test_trainer_takes_the_logits_of_an_output(change, plain):
    given = trained([(IMAGES, LABELS)], Giving(change))
    assert same({name.removeprefix("model."): value for name, value in given.items()}, plain)


@pytest.mark.parametrize(("change", "found"), [
    (lambda z: (z, z), "a tuple of 2"), (lambda z: dict(out=z), "a dict with 'out'"), (lambda z: None, "a NoneType"),
    (lambda z: z[:, 0], "a tensor of (7,)"), (lambda z: z[:1], "a tensor of (1, 3)"),
    (lambda z: z[:, :, None, None].expand(-1, -1, 2, 2), "a tensor of (7, 3, 2, 2)")])
def test_trainer_refuses_an_output_that_is_no_logits(change, found):
    with pytest.raises(InputError, match=rf"\Athe model returns {re.escape(found)} for 7 images; expected one tensor"):
        trained([(IMAGES, LABELS)], Giving(change))


def test_trainer_blames_no_learning_rate_for_nan_before_the_first_step():
    with pytest.raises(InputError, match=r"in step 1 of 2,.*this was the first step, so check the model"):
        trained([(IMAGES, LABELS)], Giving(lambda z: z * float("nan")))
