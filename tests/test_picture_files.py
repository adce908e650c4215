"""Picture files as people have them: alpha, deep grey, CMYK, profiles, EXIF, frames, wrong and damaged files, huge ones."""

import io
import json
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from fastdiff.data import folder
from fastdiff.runtime.errors import InputRefused
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
    rgba = halves((255, 0, 0, 255), (0, 255, 0, 0), "RGBA")
    path = saved(tmp_path / "a.png", rgba)
    for given in (path, rgba):
        assert (pictures.control_of(given, SIDE)[:, :, 8:] == 1).all()
    assert "transparent" in capsys.readouterr().err
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
    clear = saved(tmp_path / "trns.png", Image.fromarray(np.full((SIDE, SIDE), 300, np.uint16)), transparency=300)
    assert near(clear, (255,) * 3, tolerance=0)


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
        saved(tmp_path / f"{i}.png", Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)))
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
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(file, "png")
    image, kinds = decode(file.getvalue(), "#0000ff")
    assert image.getpixel((0, 0)) == (0, 0, 255)
    assert [kind.what for kind in kinds] == ["transparent; composed on #0000ff"]
