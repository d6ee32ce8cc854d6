"""The explorer's page read back, and a small ConvNet to show on it."""

import base64
import json
import re
import zlib

import numpy as np
import torch

from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.swin import SwinTransformer


def data_of(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page.html, re.S)[1])


def blob(data, index, kind):
    return np.frombuffer(zlib.decompress(base64.b64decode(data["blobs"][index])), kind)


def kept_maps(data, model=0, image=0):
    """The attention (L, H, N, N) that the page computes of an image; and the rest of each layer's numbers: the
    log-sum-exp of rows (H, N), and what follows it."""
    described = data["models"][model]
    own = described["images"][image]
    n = len(described["prefix"]) + own["rows"] * own["columns"]
    kind, maps, rests = f"<i{data['bits'] // 8}", [], []
    for layer in own["attention"]["layers"]:
        heads, width, biased = layer["heads"], layer["width"], layer["biased"]
        q, k = blob(data, layer["numbers"], kind).reshape(2, heads, n, width).astype(float)
        floats = blob(data, layer["floats"], "<f4").astype(float)
        weight, lift, step, rest = np.split(floats, np.cumsum([heads * width, heads * n, biased]))
        scores = (q * weight.reshape(heads, 1, width)) @ k.transpose(0, 2, 1) + lift.reshape(heads, 1, n)
        if biased:
            codes = blob(data, layer["bias"], kind).reshape(biased, n, n)
            scores = scores + np.where(codes == np.iinfo(kind).min, -np.inf, codes * step.reshape(biased, 1, 1))
        exps = np.exp(scores - scores.max(axis=2, keepdims=True))
        maps.append(exps / exps.sum(axis=2, keepdims=True))
        rests.append(rest)
    return np.stack(maps), rests


def window_maps(data, model=0, image=0):
    """The attention of each block of a Swin Transformer as the page holds it: L arrays (H, N, N), without padding."""
    whole = []
    for layer in data["models"][model]["images"][image]["attention"]["layers"]:
        heads, n, m = layer["heads"], layer["rows"] * layer["columns"], layer["window"][0] * layer["window"][1]
        places = blob(data, layer["places"], "<i4").reshape(-1, m)  # (W, M)
        maps = blob(data, layer["values"], "u1").reshape(heads, -1, m, m).astype(float)
        maps = maps * blob(data, layer["factors"], "<f4").reshape(heads, -1, m, 1)
        own = np.zeros((heads, n + 1, n + 1))
        for window, at in enumerate(places):
            own[:, at[:, None], at[None]] = maps[:, window]
        whole.append(own[:, :n, :n])
    return whole


def vector(data, name, model=0, image=0):
    """What the page holds of rollout or relevance, (n)."""
    return blob(data, data["models"][model]["images"][image][name], "<f4")


def fields_of(data, model, image=0):
    """What a ConvNet's units see, (depths, n, n)."""
    own = data["models"][model]["images"][image]
    n = own["rows"] * own["columns"]
    return blob(data, own["values"], "u1").reshape(-1, n, n) * blob(data, own["factors"], "<f4").reshape(-1, n, 1)


def small_convnet(**options):
    torch.manual_seed(0)
    return ConvNet(**dict(img_size=12, n_classes=5, widths=(3, 5), depths=(1, 1), stem_stride=1) | options)


def small_swin(**options):
    """A Swin Transformer of 3 stages, whose windows of 4 x 4 tokens do not divide most maps."""
    torch.manual_seed(0)
    return uneven(SwinTransformer(**dict(img_size=(36, 28), patch_size=2, n_classes=5, embed_dim=8, depths=(2, 3, 2),
                                         n_heads=(1, 2, 4), window_size=4) | options))


def uneven(model, by=0.4):
    """In eval mode, with parameters drawn so that attention is far from even; a deep model needs less."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model.eval()
