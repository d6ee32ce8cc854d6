"""How alike two layers represent images: linear CKA.

    layer_features      what each layer makes of images
    layer_similarity    linear CKA of every layer of a model with every layer of another, or its own

Centred kernel alignment compares how two layers tell images apart, whatever directions they use for it: 1 where one
is the other turned and scaled, near 0 where they have nothing in common.

Shapes:  B images of a batch, N images, C channels, F features of an image in a layer, L layers of a model; as Gram
         matrices K of a layers and L of b layers.
"""

import torch

from vit_bridge.errors import InputError, check_int
from vit_bridge.models.adapters import adapt
from vit_bridge.runtime import evaluating, to_model, unwrapped


@torch.no_grad()
def layer_features(model, images):
    """What each of adapt(model).layers gives of images (B, C, height, width): a list of L tensors (B, F), float32.

    Tokens and places are features side by side, as in Raghu et al. 2021.
    """
    model, outputs, hooks = unwrapped(model), [], []
    try:
        for layer in adapt(model).layers:
            hooks.append(layer.register_forward_hook(lambda module, args, output: outputs.append(output)))
        with evaluating(model):
            model.forward_features(to_model(images, model))
    finally:
        for hook in hooks:
            hook.remove()
    return [output.float().flatten(1) for output in outputs]  # L x (B, F)


def gram_matrices(features):
    """x x^T of each layer's features (B, F), without its diagonal: (L, B, B) float64. The mean over the images is taken
    off first: CKA does not see it, and the products stay small."""
    features = (x.cpu().double() for x in features)
    centred = (x - x.mean(dim=0) for x in features)
    grams = torch.stack([x @ x.T for x in centred])  # (L, B, B)
    return grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))


def unbiased_hsic(K, L):
    """HSIC of every pair of Gram matrices, K (a, B, B) with L (b, B, B), their diagonals zero: (a, b) float64.

    Song et al. 2012, "Feature Selection via Dependence Maximization", Eq. 5. It needs 4 images or more.
    """
    B = K.shape[-1]
    products = K.flatten(1) @ L.flatten(1).T  # (a, b), tr(K L)
    sums = K.sum(dim=(1, 2))[:, None] * L.sum(dim=(1, 2))  # (a, b)
    rows = K.sum(dim=2) @ L.sum(dim=2).T  # (a, b), 1^T K L 1
    return (products + sums / ((B - 1) * (B - 2)) - 2 * rows / (B - 2)) / (B * (B - 3))


def layer_similarity(first, second, images, batch_size=64, second_images=None):
    """Linear CKA of every layer of a model with every layer of another: (layers of first, of second), float64.

    images         (N, C, height, width), normalised for `first`
    batch_size     images in a batch: the three HSIC terms are averaged over the batches, then divided. A smaller last
                   batch is left out, unless it is the only one
    second_images  the same images normalised for `second`; None: as for `first`

    Equal layers do not mean equal predictions, as each model has a head of its own. Kornblith et al. 2019, "Similarity
    of Neural Network Representations Revisited"; in batches and unbiased as Nguyen et al. 2021, "Do Wide and Deep
    Networks Learn the Same Things?"; CNN against ViT first by Raghu et al. 2021, "Do Vision Transformers See Like
    Convolutional Neural Networks?". Raises InputError for fewer than 4 images, and for a layer that gives every image
    the same.
    """
    check_int("batch_size", batch_size, 4)
    if len(images) < 4:
        raise InputError(f"{len(images)} images are too few for CKA; expected 4 or more, better 256")
    others = images if second_images is None else second_images
    terms = [0.0, 0.0, 0.0]  # HSIC of first with second (a, b), of each with itself (a), (b)
    whole = max(1, len(images) // batch_size)
    for part, other in list(zip(images.split(batch_size), others.split(batch_size), strict=True))[:whole]:
        K = gram_matrices(layer_features(first, part))  # (a, B, B)
        same = second is first and second_images is None
        L = K if same else gram_matrices(layer_features(second, other))  # (b, B, B)
        terms[0] = terms[0] + unbiased_hsic(K, L)
        for place, grams in ((1, K), (2, L)):
            own = torch.stack([unbiased_hsic(gram[None], gram[None])[0, 0] for gram in grams])
            terms[place] = terms[place] + own
    for own in terms[1:]:
        if not (own > 0).all():
            layer = int((own <= 0).nonzero()[0, 0])
            raise InputError(f"layer {layer} gives all images alike, so it has no CKA; give other images or a model "
                             f"that answers to them")
    return terms[0] / (terms[1][:, None] * terms[2]).sqrt()  # (a, b)
