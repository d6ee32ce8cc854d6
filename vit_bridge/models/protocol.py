"""What the library asks of a model, with the defaults.

A model of this library is an ImageModel, or defines the same members, as VisionTransformer does: training, checkpoints,
figures and comparisons ask for these and never for a class. adapters.py adds what other libraries' models lack.
tests/models/test_toy_model.py holds a whole new model, from its class to its comparison.

Shapes:  B images, C channels, D features that the head reads.
"""

from torch import nn


class ImageModel(nn.Module):
    """(B, C, height, width) -> (B, n_classes) logits, by features and a head.

    A subclass sets `config`, a frozen dataclass of class `config_class` with img_size, in_channels, n_classes and all
    else that it takes to build the model again: type(model)(**vars(model.config)). It sets `head`, an nn.Linear, or
    nn.Identity where n_classes is 0. And it defines n_features, layers, forward_features and forward_head.

    preprocessing    what its images must be (vit_bridge.preprocessing.Preprocessing); None before training
    attends          whether its layers are attention blocks over n_prefix_tokens and patches, as those of a ViT: then
                     it has blocks, norm, patch_embed and pos_embed as VisionTransformer has
    any_size         whether it takes images of other sizes than config.img_size
    head_names       its heads, by name: the last group of layer-wise learning rates, and never trained by Muon
    no_weight_decay  parameters, by name, that do not decay; vectors and what is added to every image never do
    no_muon          parameters, by name, that Muon leaves to AdamW, beside the first layer and the heads
    """

    config_class = None
    preprocessing = None
    attends = False
    any_size = True
    head_names = ("head",)
    no_weight_decay = ()
    no_muon = ()

    @property
    def n_features(self):
        """D, the width of what the head reads."""
        raise NotImplementedError

    def layers(self):
        """The modules in their order: what makes the first map or the tokens, then the stages or blocks. A depth in
        receptive fields, similarities and layer-wise learning rates is an index into them."""
        raise NotImplementedError

    def forward(self, images):
        return self.forward_head(self.forward_features(images))  # (B, n_classes)

    def forward_features(self, images):
        """(B, C, height, width) -> what the last layer gives."""
        raise NotImplementedError

    def forward_head(self, x, pre_logits=False):
        """Features -> logits (B, n_classes), or with pre_logits=True what the head reads, (B, D)."""
        raise NotImplementedError

    def whitening_layer(self):
        """None, or (the first convolution, whether it holds each whitening filter and its negative)."""
        return None


def is_ours(model):
    """Whether a model follows the protocol. Others may have members of the same names that mean something else."""
    return callable(getattr(type(model), "layers", None))


def ask(model, name):
    """A member of the protocol of any module, ImageModel's where the module does not follow it or has none."""
    default = getattr(ImageModel, name)
    return getattr(model, name, default) if is_ours(model) else default


def class_name(model):
    """The name of a model's class, for messages and checkpoints."""
    return type(model).__name__


def layer_groups(model):
    """{parameter name: index of its layer}: i in layer i of layers(), len(layers()) in the heads and in what comes
    after the last layer, such as the last norm, and 0 in what comes before it.

    What comes after is seen from the order of the parameters in the model. Raises AttributeError for a module without
    layers().
    """
    layers = model.layers()
    place = {id(p): i for i, layer in enumerate(layers) for p in layer.parameters()}
    named = list(model.named_parameters())
    last = max((i for i, (_, p) in enumerate(named) if id(p) in place), default=0)
    heads = ask(model, "head_names")
    return {name: len(layers) if name.split(".")[0] in heads else place.get(id(p), len(layers) if i > last else 0)
            for i, (name, p) in enumerate(named)}
