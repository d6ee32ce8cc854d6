"""How similarly two layers represent images: linear CKA.

layer_features      the features of every layer
layer_similarity    linear CKA of every layer of one model with every layer of another, or of the same model

Centred kernel alignment compares the similarities between images in two layers. It is 1 if one layer is a rotated and
scaled copy of the other, and near 0 if the layers have nothing in common.

Shapes:  B images of a batch, N images, C channels, F features of an image in a layer, L layers of a model; as Gram
         matrices K of a layers and L of b layers.
"""

import torch

from vit_bridge.errors import InputError, check_int
from vit_bridge.models.adapters import adapt
from vit_bridge.runtime import evaluating, to_model, tokens_of, unwrapped


@torch.no_grad()
def layer_features(model, images):
    """Return the features of each of `adapt(model).layers`: a list of L tensors (B, F), float32.

    Tokens or positions are concatenated into one feature vector per image, as in Raghu et al. 2021.
    """
    model, outputs, hooks = unwrapped(model), [], []
    try:
        for layer in adapt(model).layers:
            hooks.append(layer.register_forward_hook(lambda module, args, output: outputs.append(output)))
        with evaluating(model):
            getattr(model, "forward_features", model)(to_model(images, model))
    finally:
        for hook in hooks:
            hook.remove()
    return [tokens_of(output).float().flatten(1) for output in outputs]  # L x (B, F)


def gram_matrices(features):
    """Return x x^T of each layer's features (B, F), with a zero diagonal: (L, B, B), float64.

    The mean over the images is subtracted first, which does not change CKA and keeps the products small.
    """
    features = (x.cpu().double() for x in features)
    centred = (x - x.mean(dim=0) for x in features)
    grams = torch.stack([x @ x.T for x in centred])  # (L, B, B)
    return grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))


def unbiased_hsic(K, L):
    """Return the unbiased HSIC of every pair of Gram matrices: K (a, B, B), L (b, B, B) -> (a, b).

    The diagonals of K and L must be zero, and at least 4 images are needed.

    Song et al. 2012, "Feature Selection via Dependence Maximization", Eq. 5.
    """
    B = K.shape[-1]
    products = K.flatten(1) @ L.flatten(1).T  # (a, b), tr(K L)
    sums = K.sum(dim=(1, 2))[:, None] * L.sum(dim=(1, 2))  # (a, b)
    rows = K.sum(dim=2) @ L.sum(dim=2).T  # (a, b), 1^T K L 1
    return (products + sums / ((B - 1) * (B - 2)) - 2 * rows / (B - 2)) / (B * (B - 3))


def layer_similarity(first, second, images, batch_size=64, second_images=None):
    """Return the linear CKA of every layer of one model with every layer of another.

    Parameters
    ----------
    first, second : nn.Module
        Models; they may be the same.
    images : Tensor, shape (N, C, height, width)
        Images, normalised for `first`.
    batch_size : int, optional
        Number of images in a batch. The three HSIC terms are averaged over the batches and then divided. A smaller last
        batch is ignored, unless it is the only one.
    second_images : Tensor, optional
        The same images, normalised for `second`. By default `images`.

    Returns
    -------
    Tensor, shape (layers of first, layers of second)
        float64.

    Raises
    ------
    InputError
        If there are fewer than 4 images, or if a layer has the same features for every image.

    Notes
    -----
    Similar layers do not imply equal predictions, because each model has its own head.

    References
    ----------
    Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited"; in batches and unbiased: Nguyen et
    al. 2021, "Do Wide and Deep Networks Learn the Same Things?"; CNN against ViT: Raghu et al. 2021, "Do Vision
    Transformers See Like Convolutional Neural Networks?".
    """
    check_int("batch_size", batch_size, 4)
    if len(images) < 4:
        raise InputError(f"{len(images)} images are too few for CKA; use at least 4, preferably 256")
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
            raise InputError(f"layer {layer} has the same features for all images, so its CKA is undefined; use "
                             f"different images or a different model")
    return terms[0] / (terms[1][:, None] * terms[2]).sqrt()  # (a, b)
