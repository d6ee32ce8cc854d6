"""The explorer's page read back, and a small ConvNet to show on it."""

import base64
import json
import re

import numpy as np
import torch

from vit_bridge.models.convnet import ConvNet


def data_of(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page.html, re.S)[1])


def unpacked(part, n):
    values = np.frombuffer(base64.b64decode(part["values"]), np.uint8).reshape(-1, n, n)
    return values * np.frombuffer(base64.b64decode(part["factors"]), "<f4").reshape(-1, n, 1).astype(float)


def small_convnet(**options):
    torch.manual_seed(0)
    return ConvNet(**dict(img_size=12, n_classes=5, widths=(3, 5), depths=(1, 1), stem_stride=1) | options)
