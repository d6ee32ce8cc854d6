"""What the library needs from a model, with defaults: ImageModel.

A model of this library is a subclass of ImageModel, or defines the same members, as VisionTransformer does. Training,
checkpoints, figures and comparisons use these members and never check for a class. adapters.py supplies what models of
other libraries lack. tests/models/test_toy_model.py contains a complete new model, from its class to its comparison.

Shapes:  B images, C channels, D features that the head reads.
"""

from dataclasses import replace

from torch import nn

from vit_bridge.errors import InputError, check_choice


class ImageModel(nn.Module):
    """Base class of models: images (B, C, height, width) -> features -> head -> logits (B, n_classes).

    A subclass defines `n_features`, `layers`, `forward_features` and `forward_head`, and sets two attributes:

    - `config`: a frozen dataclass with img_size, in_channels, n_classes and everything else needed to rebuild the
      model, type(model)(**vars(model.config)). Its class is `config_class`.
    - `head`: an nn.Linear, or nn.Identity if n_classes is 0.

    Attributes
    ----------
    preprocessing : vit_bridge.preprocessing.Preprocessing or None
        How its input images must be preprocessed. None before training.
    attends : bool
        Whether its layers are attention blocks over n_prefix_tokens and patches, as in a ViT. If so, it also has
        blocks, norm, patch_embed and pos_embed, as VisionTransformer does.
    windowed : bool
        Whether its layers are stages of blocks with attention within windows, as in SwinTransformer.
    masks : bool
        Whether model(images, noise=None) hides patches and returns (loss, prediction, mask), as MaskedAutoencoder does.
    any_size : bool
        Whether it accepts images of sizes other than config.img_size.
    head_names : tuple of str
        Its heads. Layer-wise learning rates treat them as the last group, and Muon never trains them.
    encoder : method or None
        Of a model that learns without labels: returns a copy of the part to fine-tune, a model without a head.
    n_tokens : int
        Number of tokens that it predicts for each hidden patch, as MaskedTokenModel does; 0 for other models.
    no_weight_decay : tuple of str
        Parameters without weight decay. Vectors, and tensors that are added to every image, never decay anyway.
    no_muon : tuple of str
        Parameters that Muon leaves to AdamW, besides the first layer and the heads.
    """

    config_class = None
    preprocessing = None
    attends = windowed = masks = False
    any_size = True
    head_names = ("head",)
    n_tokens = 0
    encoder = None
    no_weight_decay = ()
    no_muon = ()

    @property
    def n_features(self):
        """D, the width of the head's input."""
        raise NotImplementedError

    def layers(self):
        """Return the modules in order: the stem or patch embedding, then the stages or blocks.

        In receptive fields, similarities and layer-wise learning rates, a depth is an index into this list.
        """
        raise NotImplementedError

    def forward(self, images):
        """Return the logits (B, n_classes) of normalised images."""
        return self.forward_head(self.forward_features(images))  # (B, n_classes)

    def forward_features(self, images):
        """Return the output of the last layer for images (B, C, height, width)."""
        raise NotImplementedError

    def forward_head(self, x, pre_logits=False):
        """Return the logits (B, n_classes) of features, or with pre_logits=True the head's input (B, D)."""
        raise NotImplementedError

    def whitening_layer(self):
        """Return None, or the layer to whiten and whether it holds each filter with its negative."""
        return None


def is_ours(model):
    """Return whether a model follows the protocol.

    Models of other libraries may have members of the same names that mean something else.
    """
    return callable(getattr(type(model), "layers", None))


def ask(model, name):
    """Return a member of the protocol, or ImageModel's default if the module is not ours or does not define it."""
    default = getattr(ImageModel, name)
    return getattr(model, name, default) if is_ours(model) else default


def class_name(model):
    """Return the name of a model's class, for messages and checkpoints."""
    return type(model).__name__


def layer_groups(model):
    """Return {parameter name: index of its layer}, for layer-wise learning rates.

    Parameters of layer i of layers() have the index i. Parameters before the first layer have 0. Parameters after the
    last layer, such as the last norm or a decoder, and parameters of the heads have len(layers()). The order of the
    parameters in the model determines what comes before and after, except that the mask token of a model that `masks`
    belongs to its decoder.

    Raises AttributeError for a module without layers().
    """
    layers = model.layers()
    place = {id(p): i for i, layer in enumerate(layers) for p in layer.parameters()}
    named = list(model.named_parameters())
    last = max((i for i, (_, p) in enumerate(named) if id(p) in place), default=0)
    late = (*ask(model, "head_names"), *["mask_token"] * ask(model, "masks"))
    return {name: len(layers) if name.split(".")[0] in late else place.get(id(p), len(layers) if i > last else 0)
            for i, (name, p) in enumerate(named)}


def check_arguments(model_class, arguments):
    """Raise InputError for an argument that the model's configuration does not have."""
    for argument in arguments:
        config_class = model_class.config_class
        check_choice("argument", argument, tuple(config_class.__dataclass_fields__), f"help({config_class.__name__})")


def refuse_fields(config, names, reason):
    """Raise InputError if one of these fields of a configuration is set. The message ends with the reason."""
    for name in names:
        if getattr(config, name):
            raise InputError(f"{name} {getattr(config, name)!r} does not fit {reason}")


def copy_part(model, part_class, tensors, **fields):
    """Return a copy of a part of a model, such as its encoder, as a model of its own.

    part_class: its class. It gets those values of the model's configuration that it has fields for, unless `fields`
    has others. tensors: {name: tensor}, which may contain more than the part needs.
    """
    config = {name: getattr(model.config, name) for name in part_class.config_class.__dataclass_fields__}
    part = part_class(**config | fields).to(next(model.parameters()))  # its device and dtype
    part.load_state_dict({name: tensors[name] for name in part.state_dict()})
    part.preprocessing, part.any_size = model.preprocessing, model.any_size
    return part.train(model.training)


def create_variant(model_class, config, n_classes, overrides):
    """Build a model with new weights from a configuration, with other values for some fields."""
    check_arguments(model_class, overrides)
    return model_class(**vars(replace(config, n_classes=n_classes, **overrides)))
