"""The range of pixel values, and files that cannot be read.

Values are scaled if the file states their range and refused otherwise; unused bits of 16 cause a warning. Files may
also disappear or be too large.
"""

import os
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from vit_bridge.data.datasets import decode_images, own_side
from vit_bridge.data.images import UnreadableImage, open_image, open_picture, remark_on
from vit_bridge.data.loaders import get_data_loaders
from vit_bridge.errors import Assumption, InputError
from vit_bridge.preprocessing import Preprocessing

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)  # what every file below shows
MAX, S_MIN, S_MAX, PHOTOMETRIC, BITS, SAMPLE_FORMAT = 281, 340, 341, 262, 258, 339


def save_tiff(path, values, **tags):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[globals()[name]] = value
    Image.fromarray(values).save(path, tiffinfo=info)
    return path


def save_pgm(path, values, white):
    path.write_bytes(b"P5 16 16 %d\n" % white + values.astype(">u2").tobytes())
    return path


def save_png16(path, values, color_type, transparent=b""):
    """Save values (H, W, C) as a PNG file with 16 bits per channel."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    H, W, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 16, color_type, 0, 0, 0))
                     + (chunk(b"tRNS", transparent) if transparent else b"") + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))
    return path


def save_12_bits(path):
    """Save GREY, scaled to 0..4095, as a TIFF file whose samples are packed in 12 bits."""
    first, second = (GREY * np.float64(4095 / 255)).round().astype(int).reshape(-1, 2).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    entries = [(256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 122),
               (277, 3, 1, 1), (278, 3, 1, 16), (279, 4, 1, len(packed))]
    ifd = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + ifd + struct.pack("<I", 0) + packed)
    path.write_bytes(path.read_bytes()[:-len(packed)].ljust(122, b"\0") + packed)
    return path


def grey16(share=1.0):
    return (GREY.astype(np.uint16) * 257 * share).astype(np.uint16)


def write(kind, path):
    """Save GREY in a format with a known range."""
    match kind:
        case "16-bit png":
            Image.fromarray(grey16()).save(path / "x.png")
        case "16-bit tif":
            return save_tiff(path / "x.tif", grey16())
        case "16-bit big-endian tif":
            Image.frombytes("I;16B", (16, 16), grey16().astype(">u2").tobytes()).save(path / "x.tif")
        case "16-bit pgm":
            return save_pgm(path / "x.pgm", grey16(), 65535)
        case "12-bit pgm":
            return save_pgm(path / "x.pgm", (GREY * 4095.0 / 255).round(), 4095)
        case "12-bit tif":
            return save_12_bits(path / "x.tif")
        case "12 bits by a tag":
            return save_tiff(path / "x.tif", (GREY * 4095.0 / 255).round().astype(np.uint16), MAX=4095)
        case "white is 0":
            return save_tiff(path / "x.tif", 65535 - grey16(), PHOTOMETRIC=0)
        case "float by tags":
            return save_tiff(path / "x.tif", (GREY / 255 * 5 - 3).astype(np.float32), S_MIN=-3.0, S_MAX=2.0)
        case "32 bits by tags":
            return save_tiff(path / "x.tif", GREY.astype(np.int32) * 1000 - 7, S_MIN=-7, S_MAX=254993)
        case "16-bit jp2":
            Image.fromarray(grey16()).save(path / "x.jp2")
    return next(path.iterdir())


KINDS = ["16-bit png", "16-bit tif", "16-bit big-endian tif", "16-bit pgm", "12-bit pgm", "12-bit tif",
         "12 bits by a tag", "white is 0", "float by tags", "32 bits by tags", "16-bit jp2"]


@pytest.mark.parametrize("kind", KINDS)
def test_known_ranges_are_scaled_alike_from_paths_and_pil_images(kind, tmp_path):
    path = write(kind, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = [open_image(path), open_picture(path), open_picture(Image.open(path))]
        decoded, _ = decode_images([str(path)], Preprocessing(16), False)
    for image in images:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.repeat(GREY[:, :, None], 3, 2))
    assert torch.equal(decoded[0, 1], torch.from_numpy(GREY))


@pytest.mark.parametrize("values", [
    GREY.astype(np.float32) / 255, GREY.astype(np.float32), GREY.astype(np.int32), GREY.astype(np.int32) * 257,
    np.full((4, 4), np.nan, np.float32), np.zeros((4, 4), np.float32), GREY.astype(np.int32) * 10**6])
@pytest.mark.parametrize("tags", [{}, {"MAX": 200}])
def test_unknown_ranges_are_refused_alike(values, tags, tmp_path):
    path = save_tiff(tmp_path / "x.tif", values, **tags)
    mode = "F" if values.dtype == np.float32 else "I"
    words = rf"mode '{mode}' with values from \S+ to \S+, for which black and white are unknown"
    with pytest.raises(UnreadableImage, match=rf"\Aimage file '{path}' cannot be read \({words}\); expected unsigned "
                                              rf"values of 8 or 16 bits [^\n]*\Z"):
        open_image(path)
    for image in (Image.open(path), Image.fromarray(values)):
        with pytest.raises(InputError, match=rf"\Agot a PIL image of {words}; pass a float array[^\n]*\Z"):
            open_picture(image)
    Image.fromarray(GREY).save(tmp_path / "sound.png")
    skipped = decode_images([str(path), str(tmp_path / "sound.png")], Preprocessing(16), True)[1]
    assert list(skipped) == [str(path)]


@pytest.mark.parametrize("value", [np.nan, 2.5, -3.5])
def test_values_outside_the_stated_range_are_refused(value, tmp_path):
    values = (GREY / 255).astype(np.float32)
    values[3, 3] = value
    path = save_tiff(tmp_path / "x.tif", values, S_MIN=-3.0, S_MAX=2.0)
    with pytest.raises(UnreadableImage, match="outside the -3 to 2 that the file states"):
        open_image(path)


def test_signed_values_are_refused_in_files_of_8_and_of_16_bits(tmp_path):
    """Pillow reads signed bytes as unsigned: -1 becomes 255."""
    path = save_tiff(tmp_path / "x.tif", GREY, SAMPLE_FORMAT=2)
    for read in (open_image, lambda path: open_picture(Image.open(path))):
        with pytest.raises(InputError, match="mode 'L' with signed values, for which black and white are unknown"):
            read(path)
    signed = save_tiff(tmp_path / "y.tif", GREY.astype(np.int32) - 100)  # as Pillow reads those of 16 bits
    with pytest.raises(UnreadableImage, match="expected unsigned values of 8 or 16 bits per channel, or a TIFF file"):
        open_image(signed)
    assert np.array_equal(np.asarray(open_image(save_tiff(tmp_path / "z.tif", GREY, SAMPLE_FORMAT=1)))[:, :, 0], GREY)


def test_arrays_are_scaled_by_their_kind():
    rgb = np.stack([GREY, GREY.T, GREY], 2)
    for values in (rgb, rgb.astype(np.uint16) * 257, rgb / 255, (rgb / 255).astype(np.float32)):
        np.testing.assert_array_equal(np.asarray(open_picture(values)), rgb)
        np.testing.assert_array_equal(np.asarray(open_picture(values[:, :, 0]))[:, :, 1], GREY)
    mask = GREY > 100
    np.testing.assert_array_equal(np.asarray(open_picture(mask))[:, :, 2], mask * 255)
    for kind in (np.int32, np.int64, np.uint32, np.int16, np.int8, complex):
        with pytest.raises(InputError, match=rf"got a ndarray of {np.dtype(kind)} [^\n]*uint8, uint16, bool or float"):
            open_picture(rgb.astype(kind))


def dark_files(tmp_path):
    values = (GREY * (4095 / 255)).astype(np.uint16)
    colours = np.repeat(values[:, :, None], 3, 2)
    return [save_tiff(tmp_path / "dark.tif", values), save_png16(tmp_path / "dark.png", values[:, :, None], 0),
            save_png16(tmp_path / "colours.png", colours, 2), save_pgm(tmp_path / "dark.pgm", values, 65535),
            save_tiff(tmp_path / "white.tif", values, PHOTOMETRIC=0), save_tiff(tmp_path / "m.tif", values, MAX=3000)]


def test_12_bits_in_a_16_bit_file_are_warned_of(tmp_path):
    for path in dark_files(tmp_path):
        for image in (path, Image.open(path)):
            with pytest.warns(Assumption, match="no value above a quarter of 65535"):
                open_picture(image)
    with pytest.warns(Assumption, match="no value above a quarter"):
        assert np.asarray(open_picture(np.full((4, 4, 3), 4095, np.uint16))).max() == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_picture(np.zeros((4, 4), np.uint16))
        open_picture(grey16(0.3))


@pytest.mark.parametrize(("side", "workers"), [(16, 0), (72, 0), (72, 1)])
def test_loaders_warn_of_unused_bits_in_one_sentence(side, workers, tmp_path, capfd):
    for i in range(4):
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            save_tiff(tmp_path / name / f"{i}.tif", np.full((side, side), 1000 + i, np.uint16))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *where: os.write(2, f"{os.getpid()} {message}\n".encode())
        for loader in get_data_loaders(tmp_path, img_size=side, workers=workers):
            list(loader)
    said = set(capfd.readouterr().err.splitlines())
    assert len(said) == 1  # one sentence, and workers say nothing of their own
    assert said.pop().startswith(f"{os.getpid()} A 16-bit image has no value above a quarter of 65535")


def test_several_frames_are_said_and_the_first_is_taken(tmp_path):
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    for ending in ("gif", "webp", "tif"):
        path = tmp_path / f"x.{ending}"
        red.save(path, save_all=True, append_images=[blue], **({"lossless": True} if ending == "webp" else {}))
        assert open_image(path).getpixel((3, 3)) == (255, 0, 0)
        with pytest.warns(Assumption, match="the first of each is used"):
            remark_on([str(path)])
    red.save(tmp_path / "one.gif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remark_on([str(tmp_path / "one.gif"), str(tmp_path / "gone.gif")])
        remark_on([])


def test_colour_spaces_become_rgb(tmp_path):
    red = Image.new("RGB", (16, 16), (200, 30, 60))
    for mode in ("YCbCr", "HSV", "CMYK", "RGBA", "RGBX", "RGBa"):
        image = red.convert("RGBA").convert(mode) if mode == "RGBa" else red.convert(mode)
        assert np.abs(np.asarray(open_picture(image)).astype(int) - [200, 30, 60]).max() <= 3, mode
    lab = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (136, 128, 128)])  # L of 53.3%, neutral
    lab.save(tmp_path / "lab.tif")
    np.testing.assert_allclose(np.asarray(open_image(tmp_path / "lab.tif")), 128, atol=2)
    colours = np.stack([GREY, GREY.T, 255 - GREY], 2).astype(np.uint16) * 257
    np.testing.assert_array_equal(np.asarray(open_image(save_png16(tmp_path / "c.png", colours, 2))), colours // 257)
    grey_alpha = np.array([[[1000, 0], [150 * 257, 65535]]])
    assert np.asarray(open_image(save_png16(tmp_path / "la.png", grey_alpha, 4)))[0, :, 0].tolist() == [255, 150]


def test_a_transparent_value_of_16_bits_is_white(tmp_path):
    path = save_png16(tmp_path / "x.png", np.array([[[1000], [40000]]]), 0, struct.pack(">H", 1000))
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [255, 156]


def test_a_turned_16_bit_photograph_is_upright(tmp_path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[274] = 3
    Image.fromarray(grey16()[::-1, ::-1].copy()).save(tmp_path / "x.tif", tiffinfo=tags)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "x.tif"))[:, :, 0], GREY)


# ---- Files that go away ------------------------------------------------------------------------------------


def make_set(root, side, n=6):
    for k, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (side, side), (k, i, 0)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize(("side", "workers"), [(16, 0), (72, 0), (72, 1)])
@pytest.mark.parametrize("kind", ["dead link", "loop", "deleted", "denied"])
def test_a_missing_file_is_left_out_or_named(side, workers, kind, tmp_path, monkeypatch):
    root = make_set(tmp_path / "set", side)
    bad = root / "b/x.png"
    if kind == "deleted":
        Image.new("RGB", (side, side)).save(bad)
        real = open_image
        monkeypatch.setattr("vit_bridge.data.images.open_image", lambda path, n: bad.unlink(True) or real(path, n))
        monkeypatch.setattr("vit_bridge.data.loaders.open_image", lambda path, n: bad.unlink(True) or real(path, n))
    elif kind == "denied":
        Image.new("RGB", (side, side)).save(bad)
        header = Image.open

        def denied(path, **options):
            if str(path) == str(bad):
                raise PermissionError(13, "Permission denied", str(path))
            return header(path, **options)

        monkeypatch.setattr(Image, "open", denied)
    else:
        bad.symlink_to("nowhere.png" if kind == "dead link" else "x.png")

    def one_pass(**options):
        loaders = get_data_loaders(root, img_size=side, workers=workers, val_fraction=0.4, **options)
        return sum(len(labels) for loader in loaders for _, labels in loader), {
            file: reason for loader in loaders for file, reason in loader.skipped.items()}

    with pytest.raises(InputError) as caught:
        one_pass()
    message = str(caught.value)
    assert message.startswith(f"image file {str(bad)!r} cannot be read (")
    assert "--skip-corrupt" in message
    assert "\n" not in message
    n, skipped = one_pass(skip_corrupt=True) if kind != "deleted" else (12, None)
    assert n == 12
    if skipped is not None:
        assert list(skipped) == [str(bad)]
        assert {"dead link": "there is no such file: a dead link", "denied": "Permission denied",
                "loop": "Too many levels"}[kind] in skipped[str(bad)]


def test_own_side_leaves_a_dead_link_out(tmp_path):
    root = make_set(tmp_path / "set", 24)
    (root / "a/x.png").symlink_to("nowhere")
    files = [str(root / "a" / name) for name in sorted(os.listdir(root / "a"))]
    assert own_side(files, True) == 24
    with pytest.raises(UnreadableImage, match="a dead link"):
        own_side(files, False)


def test_open_image_names_a_dead_link_and_a_folder(tmp_path):
    (tmp_path / "x.png").symlink_to("nowhere.png")
    for path, words in ((tmp_path / "x.png", r"there is no image file '[^']*x.png', which is a link to 'nowhere.png'"),
                        (tmp_path, "is a folder; use the path of an image file in it")):
        with pytest.raises(InputError, match=words):
            open_image(path)


def test_open_image_says_what_a_file_is(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    contents = {"cut.jpg": data[:len(data) // 2], "README.md": b"text", "a.png": b"text", "b.HEIC": b"x", "c.jpg": b""}
    words = {"cut.jpg": "damaged (truncated); ", "README.md": "not an image that Pillow can read; ",
             "a.png": "damaged, or not an image that Pillow can read; ", "c.jpg": "empty; ",
             "b.HEIC": "not an image that Pillow can read; convert .heic files to JPEG first"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImage) as caught:
            open_image(tmp_path / name)
        assert str(caught.value).startswith(f"{str(tmp_path / name)!r} is {words[name]}")
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        assert str(caught.value.in_a_set()).endswith("; remove it, or add --skip-corrupt (in Python skip_corrupt=True)")


# ---- Very large scans --------------------------------------------------------------------------------------


def blank_png(path, width, height):
    """Write a black PNG file with 1 bit per pixel."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(bytes(height * (width // 8 + 1)))) + chunk(b"IEND", b""))
    return path


def test_a_scan_above_pillows_limit_is_named_in_one_line(tmp_path):
    path = blank_png(tmp_path / "scan.png", 20_000, 10_000)
    with pytest.raises(UnreadableImage, match=r"scan.png' cannot be read \(200 million pixels, more than the 179 "
                                              r"million that Pillow opens\); expected fewer pixels, [^\n]*\Z"):
        open_image(path)
    assert decode_images([str(path), str(make_set(tmp_path / "set", 16) / "a/0.png")], Preprocessing(16), True)[1] == {
        str(path): "200 million pixels, more than the 179 million that Pillow opens"}


@pytest.mark.filterwarnings("error")
def test_a_scan_below_the_limit_is_opened_without_pillows_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    path = blank_png(tmp_path / "scan.png", 80, 50)
    assert open_image(path).size == (80, 50)
    assert own_side([str(path)], False) == 224
    blank_png(path, 80, 100)
    with pytest.raises(UnreadableImage, match="pixels, more than the"):
        open_image(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImage, match="it is a pipe or a device, not a file"):
        open_image(tmp_path / "a.jpg")


def test_a_class_whose_images_cannot_be_read_is_not_trained(tmp_path):
    root = make_set(tmp_path / "set", 16)
    for file in (root / "a").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the images of class 'a' can be read"):
        get_data_loaders(root, img_size=16, skip_corrupt=True)
