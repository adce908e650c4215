"""Picture files as people have them: alpha, deep grey, CMYK, profiles, EXIF, frames, wrong and damaged files, huge ones."""

import io
import json
import struct
import sys
import tarfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from fastdiff.data import folder
from fastdiff.runtime import console
from fastdiff.runtime.counts import Counts
from fastdiff.runtime.errors import InputRefused, UsageError
from fastdiff.sampling import pictures

SIDE = 16


def saved(path, image, **options):
    image.save(path, **options)
    return path


def pixels(path):
    """The picture (S, S, 3) uint8 as training sees it."""
    return ((folder.square(path, SIDE)[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def near(path, colour, at=(8, 8), tolerance=3):
    """Whether the picture has a colour at a place."""
    return np.abs(pixels(path)[at].astype(int) - colour).max() <= tolerance


def halves(left, right, mode="RGB"):
    image = Image.new(mode, (SIDE, SIDE), left)
    image.paste(right, (SIDE // 2, 0, SIDE, SIDE))
    return image


# ---- transparency


def transparent_pictures(folder):
    """Pictures that are red on the left, and on the right clear over green or black: by every way that a file can say so."""
    rgba = halves((255, 0, 0, 255), (0, 255, 0, 0), "RGBA")
    yield saved(folder / "rgba.png", rgba)
    yield saved(folder / "rgba.webp", rgba, lossless=True, exact=True)
    yield saved(folder / "rgba.tif", rgba)
    palette = halves((255, 0, 0), (0, 255, 0)).quantize(2)
    green = palette.getpixel((12, 8))
    yield saved(folder / "palette.png", palette, transparency=green)
    yield saved(folder / "palette-of-alphas.png", palette, transparency=bytes(0 if i == green else 255 for i in range(2)))
    yield saved(folder / "rgb-trns.png", halves((255, 0, 0), (0, 255, 0)), transparency=(0, 255, 0))
    yield saved(folder / "grey-alpha.png", halves((76, 255), (0, 0), "LA"))
    yield saved(folder / "grey-trns.png", halves(76, 5, "L"), transparency=5)
    yield saved(folder / "clear.gif", rgba)


def test_transparent_parts_are_composed_on_white_and_told(tmp_path, capsys):
    for path in transparent_pictures(tmp_path):
        found = pixels(path)
        assert (found[:, 8:] == 255).all(), path.name
        assert (found[:, :8].min(-1) < 80).all(), path.name
        assert f"{path}: transparent; composed on white" in capsys.readouterr().err


def test_half_clear_parts_are_mixed_with_the_background(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 128)))
    assert near(path, (255, 127, 127), tolerance=1)


def test_an_opaque_alpha_channel_changes_nothing_and_is_not_told(tmp_path, capsys):
    path = saved(tmp_path / "a.png", Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 255)))
    assert near(path, (1, 2, 3), tolerance=0)
    assert not capsys.readouterr().err


def test_control_pictures_have_the_same_decoder(tmp_path, capsys):
    """Transparent parts are black, the ground of control pictures."""
    rgba = halves((255, 0, 0, 255), (0, 255, 0, 0), "RGBA")
    path = saved(tmp_path / "a.png", rgba)
    for given in (path, rgba):
        found = pictures.control_of(given, SIDE)
        assert (found[:, :, 8:] == 0).all()
        assert (found[0, :, :8] == 1).all()
        assert "transparent; composed on black" in capsys.readouterr().err
    deep = saved(tmp_path / "deep.png", Image.fromarray(np.full((SIDE, SIDE), 128 * 257, np.uint16)))
    assert pictures.control_of(deep, SIDE).mean() == pytest.approx(128 / 255, abs=1e-6)
    (tmp_path / "page.jpg").write_text("<html><body>404</body></html>")
    with pytest.raises(InputRefused, match=r"page\.jpg: an HTML page, not a picture"):
        pictures.control_of(tmp_path / "page.jpg", SIDE)


# ---- depth


def deep_png(path, bits, colour_type, row):
    """A PNG of 16 equal rows, written by hand: Pillow writes none with 16-bit colours."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", SIDE, SIDE, bits, colour_type, 0, 0, 0)
    lines = zlib.compress((b"\0" + row) * SIDE)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, capsys, suffix):
    ramp = np.tile(np.arange(SIDE, dtype=np.uint16) * 17 * 257, (SIDE, 1))
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(ramp))
    assert (pixels(path)[..., 0] == ramp // 257).all()
    assert "scaled to 8 bits" in capsys.readouterr().err


def test_other_deep_pictures(tmp_path):
    assert near(deep_png(tmp_path / "rgb.png", 16, 2, struct.pack(">HHH", 0xFFFF, 0x8000, 0) * SIDE), (255, 128, 0), tolerance=1)
    alphas = struct.pack(">HH", 0x8000, 0xFFFF) * 8 + struct.pack(">HH", 0, 0) * 8
    la = deep_png(tmp_path / "la.png", 16, 4, alphas)
    assert near(la, (128,) * 3, (8, 2), 1)
    assert near(la, (255,) * 3, (8, 12), 0)
    grey = np.full((SIDE, SIDE), 300, np.uint16)
    grey[:, :8] = 0
    clear = saved(tmp_path / "trns.png", Image.fromarray(grey), transparency=300)
    assert near(clear, (255,) * 3, (8, 12), 0)
    assert near(clear, (0,) * 3, (8, 2), 0)


def test_floating_point_is_scaled_from_0_to_1_or_refused(tmp_path):
    ramp = np.tile(np.linspace(0, 1, SIDE, dtype=np.float32), (SIDE, 1))
    path = saved(tmp_path / "a.tif", Image.fromarray(ramp))
    assert (pixels(path)[..., 0] == (ramp * 255).round()).all()
    for name, values in (("large.tif", ramp * 300), ("nan.tif", ramp * np.nan)):
        with pytest.raises(InputRefused, match=rf"{name}: floating point values outside of 0 to 1"):
            pixels(saved(tmp_path / name, Image.fromarray(values)))
    with pytest.raises(InputRefused, match="whole numbers outside of 0 to 65535"):
        pixels(saved(tmp_path / "i.tif", Image.fromarray((ramp * 1e6).astype(np.int32))))


def test_one_bit_grey_and_palettes(tmp_path):
    assert near(saved(tmp_path / "1.png", halves(0, 1, "1")), (255,) * 3, (8, 12), 0)
    assert near(saved(tmp_path / "L.png", Image.new("L", (SIDE, SIDE), 77)), (77,) * 3, tolerance=0)
    assert near(saved(tmp_path / "P.gif", halves((9, 8, 7), (1, 2, 3)).quantize(2)), (1, 2, 3), (8, 12), 0)


# ---- colour


def srgb_with(**tags):
    """Pillow's sRGB profile with some tags' contents replaced, bytes by name of the tag."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    places = range(132, 132 + 12 * count, 12)
    entries = {bytes(data[i : i + 4]).decode(): struct.unpack(">II", data[i + 4 : i + 12]) for i in places}
    for name, source in tags.items():
        (to, size), (start, _) = entries[name], entries[source]
        tags[name] = to, bytes(data[start : start + size])
    for to, content in tags.values():
        data[to : to + len(content)] = content
    return bytes(data)


def test_colour_profiles_are_converted_to_srgb(tmp_path, capsys):
    """In the profile of this test, red and green are exchanged, so that its effect cannot be overlooked."""
    odd = srgb_with(rXYZ="gXYZ", gXYZ="rXYZ")
    for name in ("a.png", "a.jpg", "a.webp", "a.tif"):
        path = saved(tmp_path / name, Image.new("RGB", (SIDE, SIDE), (250, 10, 10)), icc_profile=odd)
        assert near(path, (10, 250, 10), tolerance=6), name
        assert "a colour profile other than sRGB, converted to sRGB" in capsys.readouterr().err
    rgba = saved(tmp_path / "b.png", halves((250, 10, 10, 255), (0, 0, 0, 0), "RGBA"), icc_profile=odd)
    assert near(rgba, (10, 250, 10), (8, 2))
    assert near(rgba, (255, 255, 255), (8, 12))


def test_srgb_profiles_change_nothing_and_broken_ones_are_told(tmp_path, capsys):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    good = saved(tmp_path / "good.png", noise, icc_profile=srgb_with())
    assert (pixels(good) == np.asarray(noise)).all()
    assert not capsys.readouterr().err
    bad = saved(tmp_path / "bad.png", noise, icc_profile=b"no profile" * 30)
    assert (pixels(bad) == np.asarray(noise)).all()
    assert "a colour profile that is broken or of another kind of picture, ignored" in capsys.readouterr().err
    inks = saved(tmp_path / "inks.jpg", Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), icc_profile=srgb_with())
    assert near(inks, (255, 0, 0))
    assert "ignored" in capsys.readouterr().err


def test_cmyk_and_lab(tmp_path, capsys):
    for name in ("a.jpg", "a.tif"):
        assert near(saved(tmp_path / name, Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))), (255, 0, 0)), name
        assert "CMYK without a colour profile" in capsys.readouterr().err
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    image = ImageCms.applyTransform(Image.new("RGB", (SIDE, SIDE), (200, 100, 50)), lab)
    assert near(saved(tmp_path / "lab.tif", image), (200, 100, 50), tolerance=6)


# ---- orientation and frames


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "mpo", "avif"])
def test_exif_orientation_holds_in_all_formats(tmp_path, suffix):
    from PIL import features

    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: what is left comes to the top
    path = saved(tmp_path / f"a.{suffix}", halves((255, 0, 0), (0, 0, 255)), exif=exif.tobytes())
    assert near(path, (255, 0, 0), (1, 8), 12)
    assert near(path, (0, 0, 255), (14, 8), 12)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_several_frames_the_first_is_used_and_told(tmp_path, capsys, suffix):
    first, second = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "lime"))
    path = saved(tmp_path / f"a.{suffix}", first, save_all=True, append_images=[second])
    assert near(path, (255, 0, 0))
    assert "animated or of several pages; the first one is used" in capsys.readouterr().err


# ---- files that are something else, damaged or huge


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html>404", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "a Git-LFS pointer"),
        (b'{"error": "gone"}', "JSON text"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG or XML file"),
        (b"\0\0\0\x20ftypheic\0\0\0\0mif1heic", "a HEIC picture"),
        (b"PK\x03\x04" + b"\0" * 40, "a zip file"),
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "macOS's notes"),
        (b"", "0 bytes"),
    ],
)
def test_files_under_a_pictures_name_say_what_they_are(tmp_path, data, what):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(InputRefused, match=rf"a\.jpg: {what}"):
        pixels(tmp_path / "a.jpg")


def test_truncated_pictures_are_refused_and_wrong_suffixes_are_not(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for suffix in ("jpg", "png", "webp", "tif", "gif", "bmp"):
        path = saved(tmp_path / f"a.{suffix}", noise)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputRefused, match="not a readable image"):
            pixels(path)
    saved(tmp_path / "b.jpg", noise).rename(tmp_path / "b.png")
    assert pixels(tmp_path / "b.png").std() > 10


def test_large_pictures_are_read_up_to_a_limit_without_a_warning_of_python(tmp_path, capsys):
    large = saved(tmp_path / "large.png", Image.new("1", (9500, 9500), 1))  # Pillow warns of it
    huge = saved(tmp_path / "huge.png", Image.new("1", (17000, 17000)))
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pixels(large) == 255).all()
        with pytest.raises(InputRefused, match=r"huge\.png: too large \(17000 x 17000; at most 268 megapixels are read\)"):
            pixels(huge)
    assert before == Image.MAX_IMAGE_PIXELS
    assert not capsys.readouterr().err


def test_pillows_limits_are_back_after_threads_decoded_together(tmp_path):
    from fastdiff.runtime.picture_file import decode

    path = saved(tmp_path / "a.png", Image.new("RGB", (SIDE, SIDE)))
    before, shown, filters = Image.MAX_IMAGE_PIXELS, warnings.showwarning, list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(decode, [path.read_bytes()] * 200))) == 200
    assert (Image.MAX_IMAGE_PIXELS, warnings.showwarning, list(warnings.filters)) == (before, shown, filters)


def test_a_large_text_in_a_png_does_not_spoil_the_picture(tmp_path):
    info = PngInfo()
    info.add_text("workflow", json.dumps(["node"] * 300_000), zip=True)  # as node editors write it
    assert near(saved(tmp_path / "a.png", Image.new("RGB", (SIDE, SIDE), (1, 2, 3)), pnginfo=info), (1, 2, 3), tolerance=0)


def test_plugins_of_pillow_add_their_formats(monkeypatch):
    from fastdiff.runtime import picture_file

    monkeypatch.delitem(Image.EXTENSION, ".heic", raising=False)
    picture_file.suffixes.cache_clear()
    assert ".heic" not in picture_file.suffixes()
    assert picture_file.unreadable(".HEIC") == ".heic pictures, which need a plugin: pip install pillow-heif"
    register = lambda: (Image.OPEN.setdefault("HEIF", (None, None)), Image.register_extension("HEIF", ".heic"))
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    picture_file.suffixes.cache_clear()
    assert ".heic" in picture_file.suffixes()
    assert picture_file.unreadable(".heic") == ""
    monkeypatch.undo()
    Image.OPEN.pop("HEIF")
    Image.EXTENSION.pop(".heic", None)
    picture_file.suffixes.cache_clear()


def test_a_reference_of_an_evaluation_is_read_by_the_same_rules(tmp_path, capsys):
    """Hidden files are no reference, and what was changed is counted, not told file by file."""
    from fastdiff.quality.samples import Samples

    for i in range(3):
        saved(tmp_path / f"{i}.png", halves((255, 255, 255, 255), (0, 0, 0, 0), "RGBA"))
    (tmp_path / "._0.png").write_bytes(b"\0\5\x16\7")
    seen = []
    extractor = SimpleNamespace(side_px=SIDE, extract=lambda p, rows: (seen.append(p), {"mean": p.float().mean((1, 2, 3))})[1])
    samples = Samples(["x"], 0, SIDE, [extractor], None, "cpu")
    assert samples.of_folder(tmp_path)["mean"].tolist() == [255, 255, 255]
    assert torch.cat(seen).shape == (3, 3, SIDE, SIDE)
    err = capsys.readouterr().err
    assert "3 pictures: transparent; composed on white" in err
    assert "1 file: left out, macOS's notes on a file" in err


def test_decoded_bytes_need_no_file():
    from fastdiff.runtime.picture_file import decode

    file = io.BytesIO()
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((3, 3), (1, 2, 3, 255))
    image.save(file, "png")
    image, kinds = decode(file.getvalue(), "#0000ff")
    assert image.getpixel((0, 0)) == (0, 0, 255)
    assert [kind.what for kind in kinds] == ["transparent; composed on #0000ff"]


# ---- formats that are not read, and details of those that are


def refused(data):
    from fastdiff.runtime.picture_file import Refused, decode

    with pytest.raises(Refused) as error:
        decode(data)
    return str(error.value)


def test_formats_that_are_not_read_are_not_read_under_another_name(monkeypatch):
    from PIL import EpsImagePlugin

    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: (called.append(1), Image.new("RGB", (8, 8)).im)[1])
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    assert refused(eps) == "a PostScript file, which is not read (save it as PNG)"
    assert not called
    for name, what in (("PCX", "a PCX picture"), ("ICO", "an icon"), ("SGI", "an SGI picture"), ("DDS", "a DDS texture")):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (9, 9, 9)).save(file, name)
        assert refused(file.getvalue()) == f"{what}, which is not read (save it as PNG)"


def test_deep_tiffs_whose_white_is_zero_are_inverted(tmp_path):
    ramp = np.tile(np.arange(SIDE, dtype=np.uint16) * 17 * 257, (SIDE, 1))
    path = saved(tmp_path / "a.tif", Image.fromarray(ramp), tiffinfo={262: 1})
    data, tag = path.read_bytes(), struct.pack("<HHI", 262, 3, 1)
    at = data.index(tag) + len(tag)
    path.write_bytes(data[:at] + b"\0" + data[at + 1 :])
    assert (pixels(path)[..., 0] == 255 - ramp // 257).all()


def test_tgas_without_an_alpha_channel_have_padding(tmp_path, capsys):
    path = saved(tmp_path / "a.tga", Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 0)))
    with pytest.raises(InputRefused, match=r"a\.tga: wholly transparent"):
        pixels(path)
    data = bytearray(path.read_bytes())
    data[17] &= 0xF0  # bits of alpha
    path.write_bytes(data)
    assert near(path, (1, 2, 3), tolerance=0)
    assert "transparent" not in capsys.readouterr().err


def with_chunk(path, name, data):
    """Insert a chunk into a PNG before its pixels."""
    whole, chunk = path.read_bytes(), name + data
    at = whole.index(b"IDAT") - 4
    path.write_bytes(whole[:at] + struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[at:])
    return path


def test_the_clear_colour_of_a_png_is_in_the_bits_of_the_file(tmp_path, capsys):
    deep = struct.pack(">HHH", 0xFFFF, 0, 0) * 8 + struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC) * 8
    rgb = with_chunk(deep_png(tmp_path / "rgb.png", 16, 2, deep), b"tRNS", struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC))
    assert near(rgb, (255, 0, 0), (8, 2), 0)
    assert near(rgb, (255, 255, 255), (8, 12), 0)
    for bits, row, clear, left in (
        (4, b"\x33" * 4 + b"\x55" * 4, 5, 51),
        (2, b"\0" * 2 + b"\x55" * 2, 1, 0),
        (1, b"\0\xff", 0, 255),
    ):
        path = with_chunk(deep_png(tmp_path / f"{bits}.png", bits, 0, row), b"tRNS", struct.pack(">H", clear))
        sides = (2, 12) if bits > 1 else (12, 2)
        assert near(path, (left,) * 3, (8, sides[0]), 0), bits
        assert near(path, (255,) * 3, (8, sides[1]), 0), bits
        assert f"{path}: transparent" in capsys.readouterr().err
    path = with_chunk(deep_png(tmp_path / "white.png", 1, 0, b"\0\xff"), b"tRNS", struct.pack(">H", 1))
    assert near(path, (0, 0, 0), (8, 2), 0)
    assert "transparent" in capsys.readouterr().err


def grey_profile():
    """A profile of grey with gamma 1, written by hand, for Pillow makes none."""
    curve = b"curv" + bytes(4) + struct.pack(">I", 0)
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    tags = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, b"kTRC", 176, 12)
    head = struct.pack(">I4sI4s4s4s", 188, b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + tags + white + curve


def test_grey_pictures_with_alpha_or_of_one_bit_keep_their_grey_profile(tmp_path, capsys):
    plain = saved(tmp_path / "l.png", Image.new("L", (SIDE, SIDE), 100), icc_profile=grey_profile())
    value = pixels(plain)[8, 8, 0]
    assert value > 130
    assert "converted to sRGB" in capsys.readouterr().err
    clear = saved(tmp_path / "la.png", halves((100, 255), (0, 0), "LA"), icc_profile=grey_profile())
    assert near(clear, (value,) * 3, (8, 2), 0)
    assert near(clear, (255,) * 3, (8, 12), 0)
    assert "converted to sRGB" in capsys.readouterr().err
    assert near(saved(tmp_path / "1.png", halves(0, 1, "1"), icc_profile=grey_profile()), (255,) * 3, (8, 12), 0)
    assert "ignored" not in capsys.readouterr().err


def test_wholly_transparent_pictures_are_refused(tmp_path):
    for name, mode in (("a.png", "RGBA"), ("b.webp", "RGBA"), ("c.png", "LA")):
        path = saved(tmp_path / name, Image.new(mode, (SIDE, SIDE), (0,) * len(mode)))
        with pytest.raises(InputRefused, match=rf"{name}: wholly transparent"):
            pixels(path)


def test_floating_point_colour_is_named(tmp_path):
    assert refused(b"PF\n2 2\n-1.0\n" + bytes(48)) == "a picture of floating-point colour, which is not read (save it as PNG)"
    entries = [(256, 4, 1, 2), (257, 4, 1, 2), (258, 3, 1, 32), (262, 3, 1, 2), (273, 4, 1, 134), (277, 3, 1, 3), (278, 4, 1, 2)]
    entries += [(279, 4, 1, 48), (339, 3, 1, 3)]
    tiff = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *row) for row in entries) + bytes(64)
    assert refused(tiff) == "a picture of floating-point colour, which is not read (save it as PNG)"


# ---- control pictures


def test_white_lines_on_a_transparent_ground_are_kept_and_black_ones_refused(tmp_path, capsys):
    from fastdiff.data import control

    lines = saved(tmp_path / "lines.png", halves((255, 255, 255, 255), (255, 255, 255, 0), "RGBA"))
    for read in (lambda: control.read(lines, SIDE, None), lambda: pictures.control_of(lines, SIDE)):
        console.reset()
        found = read()
        assert (found[:, :, :8] == 1).all()
        assert (found[:, :, 8:] == 0).all()
        assert "transparent; composed on black" in capsys.readouterr().err
    black = saved(tmp_path / "black.png", halves((0, 0, 0, 255), (0, 0, 0, 0), "RGBA"))
    for read in (lambda: control.read(black, SIDE, None), lambda: pictures.control_of(black, SIDE)):
        with pytest.raises(InputRefused, match=r"black\.png: transparent, and one colour alone when it is composed on black"):
            read()
    seen = []
    control.read(black, SIDE, lambda picture: (seen.append(picture), picture)[1])  # a picture that a control is extracted from
    assert (seen[0][:, 8:] == 255).all()


def test_control_pictures_that_are_small_folders_or_in_the_home_folder(tmp_path, capsys, monkeypatch):
    from fastdiff.data import control

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    saved(tmp_path / "a.png", Image.new("RGB", (SIDE, SIDE), "white"))
    extract = lambda picture: picture
    ways = (lambda p, px: control.read(p, px, None), lambda p, px: control.read(p, px, extract), pictures.control_of)
    for read in ways:
        console.reset()
        assert (read(Path("~/a.png"), SIDE) == 1).all()
        assert not capsys.readouterr().err
        assert (read(Path("~/a.png"), 2 * SIDE) == 1).all()
        assert "smaller than it is used at, enlarged" in capsys.readouterr().err
        with pytest.raises(UsageError, match="is a folder, not a picture"):
            read(tmp_path, SIDE)
        with pytest.raises(UsageError, match="no such file"):
            read(tmp_path / "b.png", SIDE)


def test_small_pictures_of_a_reference_are_counted(tmp_path):
    counts = Counts()
    for i, side in enumerate((8, 15, 16)):
        folder.square(saved(tmp_path / f"{i}.png", Image.new("RGB", (side, 20))), SIDE, counts)
    assert counts.count("smaller than it is used at, enlarged") == 2


# ---- where data lie


def test_data_are_found_in_the_home_folder_and_by_a_path(tmp_path, monkeypatch):
    from fastdiff.checkpoints import checkpoint
    from fastdiff.data import encode
    from fastdiff.data.open import open_data

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "teacher"):
        (tmp_path / name).mkdir()
        saved(tmp_path / name / f"{name}.png", Image.new("RGB", (64, 64), "red"))
        (tmp_path / name / f"{name}.txt").write_text("red apple")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("pictures.png", "pictures.txt"):
            tar.add(tmp_path / "pictures" / name, name)
    base = checkpoint.load("emoji")
    monkeypatch.setattr(encode, "encode", lambda base, source, *_, **__: [sample.name for sample in source.samples()])
    for spec in ("~/pictures", Path("~/pictures"), tmp_path / "pictures", Path("pictures"), Path("teacher")):
        assert open_data(base, spec) == [f"{Path(spec).name}.png"]
    assert open_data(base, "wds:~/a.tar") == ["a.tar/pictures.png"]
    with pytest.raises(UsageError, match="no such data"):
        open_data(base, "~/nothing")


def test_prompts_and_references_are_found_in_the_home_folder(tmp_path, monkeypatch):
    from fastdiff.data.prompts import read_prompts, training_prompts
    from fastdiff.quality import evaluation

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "p.txt").write_text("red apple\n")
    (tmp_path / "pictures").mkdir()
    from fastdiff.checkpoints import checkpoint

    base = checkpoint.load("emoji")
    assert read_prompts(Path("~/p.txt")) == training_prompts(base.family, "~/p.txt") == ["red apple"]
    asked = {}
    judge = SimpleNamespace(compare=lambda *models, **how: asked.update(how))
    monkeypatch.setattr(evaluation, "Evaluation", lambda *a, **k: judge)
    student = SimpleNamespace(base=base, device="cpu", recipe=base.recipe)
    evaluation.evaluate(student, teacher=base, num_steps=1, prompts="~/p.txt", num_images=2, reference="~/pictures")
    assert asked["reference"] == tmp_path / "pictures"
