"""Read the config.json and preprocessor_config.json in the same folder as a file of weights.

    read_recorded(path, "timm")     what they record, for a file with that library's tensor names, as Recorded
    file_in(folder)                 the file of weights in a folder that transformers or timm wrote
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from vit_bridge.errors import InputError, first_line, pair
from vit_bridge.models.adapters import listed_names
from vit_bridge.preprocessing import INTERPOLATIONS

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
                "pytorch_model.bin.index.json")
# transformers: the model types that each of our classes supports, and our names for their settings.
MODEL_TYPES = dict(VisionTransformer=("vit", "deit", "dinov2", "dinov2_with_registers", "vit_mae", "vit_msn"),
                   DistilledViT=("deit",), MaskedAutoencoder=("vit_mae",), BEiT=("beit",), MaskedTokenModel=("beit",),
                   SwinTransformer=("swin",), ConvNet=("resnet",), ConvNeXt=("convnext",))
# Our classes whose tensors do not show everything.
VITS = "VisionTransformer", "DistilledViT", "MaskedAutoencoder", "BEiT", "MaskedTokenModel"
TRANSFORMERS_FIELDS = dict(hidden_size="embed_dim", num_hidden_layers="depth", num_attention_heads="n_heads",
                           image_size="img_size", patch_size="patch_size", num_channels="in_channels",
                           layer_norm_eps="norm_eps", window_size="window_size",
                           decoder_hidden_size="decoder_dim", decoder_num_hidden_layers="decoder_depth",
                           decoder_num_attention_heads="decoder_heads", vocab_size="n_tokens")
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's constants
# timm: width and number of heads for each size in an architecture's name, and our names for its settings.
TIMM_SIZES = dict(tiny=(192, 3), small=(384, 6), medium=(512, 8), base=(768, 12), large=(1024, 16), huge=(1280, 16),
                  giant=(1408, 16), gigantic=(1664, 16))
TIMM_FIELDS = dict(embed_dim="embed_dim", depth="depth", num_heads="n_heads", img_size="img_size",
                   patch_size="patch_size", in_chans="in_channels", mlp_ratio="mlp_ratio")
TIMM_STAGES = dict(img_size="img_size", in_chans="in_channels", window_size="window_size")  # for models with stages
TIMM_POOLS = {"token": "cls", "avg": "mean"}
# timm arguments that the tensors do not show, and the values that our models support.
TIMM_HELD = dict(output_stride=(32,), aa_layer=(None, ""), pool_include_prefix=(False,), norm_eps=(None, 1e-6),
                 class_token=(True,), always_partition=(False,))
TIMM_NORMS = dict(VisionTransformer=("layernorm",), DistilledViT=("layernorm",), BEiT=("layernorm",),
                  SwinTransformer=("layernorm",), ConvNet=("batchnorm", "batchnorm2d"),
                  ConvNeXt=("layernorm", "layernorm2d"))
# timm arguments that are used, that the tensors show, or that matter only in training. Others are reported as ignored.
TIMM_READ = (
    *TIMM_FIELDS, *TIMM_HELD, "num_classes", "global_pool", "act_layer", "norm_layer", "layers", "depths", "dims",
    "window_size", "head_dim", "strict_img_size",
    "channels", "cardinality", "base_width", "stem_width", "stem_type", "stem_chs", "avg_down", "down_kernel_size",
    "kernel_sizes", "conv_mlp", "conv_bias", "use_grn", "ls_init_value", "head_norm_first", "head_hidden_size",
    "qkv_bias", "qk_norm", "proj_bias", "init_values", "no_embed_class", "reg_tokens", "pre_norm", "final_norm",
    "fc_norm", "use_fc_norm", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias", "swiglu_mlp",
    "scale_mlp", "pos_embed", "dynamic_img_size", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
    "attn_drop_rate", "drop_path_rate", "drop_block_rate", "weight_init", "fix_init", "zero_init_last",
    "head_init_scale", "device", "dtype", "pretrained")


@dataclass(frozen=True)
class Recorded:
    """What the JSON files in the same folder as a file of weights record.

    Attributes
    ----------
    source : str
        Path of the config.json, or "" if there is none from the library of the weights.
    config : dict
        Fields of ViTConfig.
    images : dict
        Fields of Preprocessing: mean, std, interpolation, class_names.
    notes : tuple of str
        What was found but not used, and why.
    """

    source: str = ""
    config: dict = field(default_factory=dict)
    images: dict = field(default_factory=dict)
    notes: tuple = ()


def file_in(folder):
    """Return the file of weights in a folder that transformers or timm wrote.

    Raises
    ------
    InputError
        If there is none.
    """
    for name in WEIGHT_FILES:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    for name in ("best.pt", "last.pt"):
        if (Path(folder) / name).is_file():
            raise InputError(f"{folder} is the folder of a run; use {Path(folder) / name}")
    raise InputError(f"folder {folder} contains no {' or '.join(WEIGHT_FILES[:2])}; use a folder that transformers or "
                     f"timm wrote, or a checkpoint file")


def read_recorded(path, library, holds="VisionTransformer"):
    """Read the JSON files in the same folder as a file of weights.

    Parameters
    ----------
    path : path
        The file of weights.
    library : str
        The library whose tensor names the file has: "timm", "transformers" or "".
    holds : str
        Name of our class for it.

    Returns
    -------
    Recorded
        A config.json from a different library or of an unknown kind is ignored, which a note reports.

    Raises
    ------
    InputError
        If a config.json from this library is for a different kind of model, or has invalid values.
    """
    folder, notes, config, images = Path(path).parent, [], {}, {}
    entries, source = _read_json(folder / CONFIG, notes), folder / CONFIG
    kind = _kind_of(entries)
    if kind and kind == library:
        config, images = (_of_timm if kind == "timm" else _of_transformers)(entries, source, notes, holds)
        if holds not in VITS:  # the tensors of a model with stages show the rest
            config = {name: config[name] for name in ("img_size", "in_channels", "n_classes", "window_size")
                      if name in config}
    elif kind:
        notes.append(f"{CONFIG} in the same folder is ignored: it is from {kind}, but the tensors do not have that "
                     f"library's names")
    elif entries and not entries.keys() >= {"options", "n_steps"}:  # not the config.json of one of our runs
        notes.append(f"{CONFIG} in the same folder is ignored: it has neither a model_type, as in transformers, nor "
                     f"an architecture, as in timm")
    shown = _read_json(folder / PREPROCESSOR, notes)
    shown = shown.get("image_processor", shown)
    if "image_mean" in shown or shown.get("do_normalize") is False:
        images |= _of_processor(shown, folder / PREPROCESSOR, config, notes)
    return Recorded(str(source) if config else "", config, images, tuple(notes))


def _read_json(path, notes):
    """Return the entries of a JSON file; {} if there is none, or if it holds something else."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, OSError) as error:
        notes.append(f"{path.name} in the same folder is ignored: it cannot be read ({first_line(error)})")
        return {}
    return entries if isinstance(entries, dict) else {}


def _kind_of(entries):
    """Return which library wrote a config.json: "timm", "transformers", or None for any other."""
    of_timm = entries.keys() & {"num_classes", "pretrained_cfg", "model_args"}
    if of_timm and isinstance(entries.get("architecture"), str):
        return "timm"
    return "transformers" if isinstance(entries.get("model_type"), str) else None


def _of_transformers(entries, source, notes, holds):
    """Return (fields of ViTConfig, fields of Preprocessing) in a config.json of transformers."""
    if entries["model_type"] not in MODEL_TYPES[holds]:
        raise InputError(f"{source} specifies model_type={entries['model_type']!r}, but the tensors belong to a "
                         f"{'ViT' if holds in VITS else holds}; set it to one of "
                         f"{', '.join(MODEL_TYPES[holds])}, or move the weights to a separate folder")
    _check_activation(entries.get("hidden_act"), holds, source)
    if holds == "SwinTransformer" and entries.get("layer_norm_eps", 1e-5) != 1e-5:
        raise InputError(f"{source} specifies layer_norm_eps={entries['layer_norm_eps']!r}, which transformers uses in "
                         f"only some norms of a Swin; SwinTransformer needs 1e-05 in all")
    for name in ("downsample_in_bottleneck", "downsample_in_first_stage"):
        if entries.get(name):
            raise InputError(f"{source} specifies {name}=true, but ConvNet has its strides in the 3 x 3 convolutions, "
                             f"from the second stage onwards; use weights trained with these strides")
    config = {ours: _size(entries[theirs], theirs, source) for theirs, ours in TRANSFORMERS_FIELDS.items()
              if entries.get(theirs) is not None}
    if entries.get("intermediate_size") and "embed_dim" in config:
        config["mlp_ratio"] = _size(entries["intermediate_size"], "intermediate_size", source) / config["embed_dim"]
    elif entries.get("mlp_ratio"):
        config["mlp_ratio"] = _size(entries["mlp_ratio"], "mlp_ratio", source)
    config |= {name: entries[name] for name in ("mask_ratio", "norm_pix_loss") if entries.get(name) is not None}
    if "use_mean_pooling" in entries:
        config["pool"] = "mean" if entries["use_mean_pooling"] else "cls"
    labels, images = entries.get("id2label"), {}
    if isinstance(labels, dict) and labels:
        config["n_classes"] = len(labels)
        names = listed_names(labels)
        if names and names != [f"LABEL_{i}" for i in range(len(names))]:  # placeholders of transformers
            images["class_names"] = names
    return config, images


def _of_timm(entries, source, notes, holds):
    """Return (fields of ViTConfig, fields of Preprocessing) in a config.json of timm.

    transformers writes the same entries when it wraps a timm model.
    """
    name, given, shown = entries["architecture"], *(entries[part] if isinstance(entries.get(part), dict) else {}
                                                    for part in ("model_args", "pretrained_cfg"))
    _check_activation(name if "quickgelu" in name else given.get("act_layer"), holds, source)
    if smoothed := re.search("resnet(aa|blur)", name):
        raise InputError(f"{source} specifies {name!r}, which blurs its maps before downsampling ({smoothed[1]}), "
                         f"unlike ConvNet; use an ordinary resnet")
    _check_arguments(given, holds, source, notes)
    config, size = {}, re.match(r"(?:vit|deit3?|beit(?:v2)?)_([a-z]+)_", f"{name}_")
    if size and size[1] in TIMM_SIZES:
        config |= dict(zip(("embed_dim", "n_heads"), TIMM_SIZES[size[1]], strict=True))
    if given.get("norm_layer") or (config and "clip" not in name):
        config["norm_eps"] = 1e-6  # the default of timm's plain ViTs, and of its "layernorm"
    if isinstance(shown.get("input_size"), list) and len(shown["input_size"]) == 3:
        config |= dict(in_channels=_size(shown["input_size"][0], "input_size", source),
                       img_size=_size(shown["input_size"][1:], "input_size", source))
    named = TIMM_FIELDS if holds in VITS else TIMM_STAGES
    config |= {ours: _size(given[theirs], theirs, source) for theirs, ours in named.items()
               if given.get(theirs) is not None}
    pool = entries.get("global_pool", given.get("global_pool"))
    if given.get("global_pool", pool) != pool:
        raise InputError(f"{source} specifies global_pool={pool!r}, but {given['global_pool']!r} in its model_args; "
                         f"correct one of them")
    if pool is not None:
        supported = {"DistilledViT": ("token",)}.get(holds, ("token", "avg") if holds in VITS else ("avg",))
        if pool not in supported:
            raise InputError(f"{source} specifies global_pool={pool!r}; {holds} supports only "
                             f"{' or '.join(supported)}")
        config["pool"] = TIMM_POOLS[pool]
    if isinstance(entries.get("num_classes"), int):
        config["n_classes"] = entries["num_classes"]
    images = {name: tuple(shown[name]) for name in ("mean", "std") if isinstance(shown.get(name), list)}
    if shown.get("interpolation"):
        images["interpolation"] = _interpolation(shown["interpolation"], "interpolation", notes)
    names = entries.get("label_names")
    if isinstance(names, list) and names:
        images["class_names"] = names
    return config, images


def _check_arguments(given, holds, source, notes):
    """Raise InputError for timm model_args that our class does not support, and note unknown ones."""
    held = TIMM_HELD | dict(norm_layer=(None, "", *TIMM_NORMS[holds]))
    for name, value in given.items():
        if name not in TIMM_READ:
            notes.append(f"{CONFIG} in the same folder specifies {name}={value!r} in its model_args, which is unknown "
                         f"here and ignored")
        plain = value.replace("_", "").lower() if name == "norm_layer" and isinstance(value, str) else value
        if plain not in held.get(name, (plain,)):
            ours = " or ".join(repr(known) for known in held[name] if known not in (None, "")) or "none"
            raise InputError(f"{source} specifies {name}={value!r}, but {holds} has {ours}; use weights trained with "
                             f"that setting")


def _check_activation(name, holds, source):
    """Raise InputError for an activation that our class does not have; None is the library's default."""
    own = "relu" if holds == "ConvNet" else "gelu"
    if name not in (None, own):
        raise InputError(f"{source} specifies {name!r}, but {holds} uses "
                         f"{own!r}{', the exact GELU' * (own == 'gelu')}; use weights trained with it")


def _of_processor(entries, source, config, notes):
    """Return the fields of Preprocessing in a preprocessor_config.json of transformers."""
    n_channels, images = config.get("in_channels", 3), {}
    # transformers multiplies values from 0 to 255 by rescale_factor; ours are from 0 to 1.
    scale = 255 * (entries.get("rescale_factor", 1 / 255) if entries.get("do_rescale", True) else 1)
    try:
        for name, theirs, none in (("mean", "image_mean", 0.0), ("std", "image_std", 1.0)):
            numbers = entries[theirs] if entries.get("do_normalize", True) else none
            numbers = numbers if isinstance(numbers, list) else [numbers] * n_channels
            images[name] = tuple(number if abs(scale - 1) < 1e-6 else number / scale for number in numbers)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{source} specifies image_mean={entries.get('image_mean')!r} and image_std="
                         f"{entries.get('image_std')!r}; expected one number per channel in each") from error
    if entries.get("resample") is not None:
        images["interpolation"] = _interpolation(RESAMPLE.get(entries["resample"], entries["resample"]), "resample",
                                                 notes)
    whole = entries.get("size")
    if entries.get("do_resize", True) and not entries.get("do_center_crop") and (
            isinstance(whole, int) or (isinstance(whole, dict) and whole.keys() >= {"height", "width"})):
        notes.append(f"{PREPROCESSOR} in the same folder stretches images to {_words(whole)} pixels; here, images keep "
                     f"their proportions and are centre-cropped")
    size = entries.get("crop_size" if entries.get("do_center_crop") else "size")
    if isinstance(size, dict):
        size = [size["height"], size["width"]] if size.keys() >= {"height", "width"} else size.get("shortest_edge")
    if size is not None and "img_size" in config and pair(_size(size, "size", source)) != pair(config["img_size"]):
        notes.append(f"{PREPROCESSOR} in the same folder specifies {size} pixels, but the model is built for "
                     f"{config['img_size']}, which is used (to change it, pass img_size= to load)")
    return images


def _words(size):
    """Format transformers' size, a side or a dict of height and width."""
    return f"{size['height']}x{size['width']}" if isinstance(size, dict) else f"{size}x{size}"


def _interpolation(value, name, notes):
    """Return the value if it is one of INTERPOLATIONS; otherwise, note it and return bicubic."""
    if value in INTERPOLATIONS:
        return value
    notes.append(f"{name}={value!r} is not {' or '.join(INTERPOLATIONS)}: bicubic is used instead")
    return "bicubic"


def _size(value, name, source):
    """Return a positive number or (height, width); equal sides become one number.

    Raises
    ------
    InputError
        For any other value.
    """
    sides = tuple(value) if isinstance(value, list) else (value,)
    if len(sides) > 2 or not all(isinstance(side, (int, float)) and not isinstance(side, bool) and side > 0
                                 for side in sides):
        raise InputError(f"{source} specifies {name}={value!r}; expected a positive number")
    return sides[0] if len(set(sides)) == 1 else sides
