"""Picture files as people have them, decoded to upright sRGB pictures of 8 bits. Training, control and evaluation share this.

Transparent pictures are composed on a background, deep ones scaled to 8 bits, colour profiles converted to sRGB, and of several
frames or pages the first is used. Each of these is a `Kind` that the caller counts and tells.
"""

import importlib
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from typing import Any

from fastdiff.runtime.counts import Kind
from fastdiff.runtime.errors import UsageError, as_field

WHITE = "white"
RULES = 3  # part of every cache key: raise it if the same file gives other pixels than before
MOST_PIXELS = 2**28  # 16384 x 16384; a larger picture is refused, for it may be made to fill the memory
LARGE_PIXELS = 2**25  # pictures above this are decoded one at a time
TEXT_BYTES = 2**26  # most bytes of a PNG's text; workflows of drawing programs exceed Pillow's own limit of 1 MiB

FRAMES = Kind("picture", "animated or of several pages; the first one is used")
DEEP = Kind("picture", "16-bit grey or floating point, scaled to 8 bits", warns=False)
INK = Kind("picture", "CMYK without a colour profile, converted to RGB by the plain formula")
PROFILE = Kind("picture", "a colour profile other than sRGB, converted to sRGB", warns=False)
BAD_PROFILE = Kind("picture", "a colour profile that is broken or of another kind of picture, ignored")
ENLARGED = Kind("picture", "smaller than it is used at, enlarged")
BAD_EXIF = Kind("picture", "EXIF data that cannot be read, ignored; check that it is upright")


def transparent(background: str) -> Kind:
    """Return the kind of a picture with transparent parts."""
    return Kind("picture", f"transparent; composed on {background}")


class Refused(Exception):  # noqa: N818  (it is the picture that is refused; the run goes on)
    """A picture cannot be used; the message says why."""


# ---- which formats can be read

WANTED = (
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif", ".avifs")
    + (".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".qoi", ".mpo")
)
PLUGINS = {  # packages that add formats to Pillow: suffixes, module, function to call after the import, name for pip
    "heif": ((".heic", ".heif", ".hif"), "pillow_heif", "register_heif_opener", "pillow-heif"),
    "jxl": ((".jxl",), "pillow_jxl", "", "pillow-jxl-plugin"),
}
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".gifv", ".mts", ".3gp", ".ogv")
RAWS = (".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".raw")
OTHERS = (
    (".psd", ".psb", ".svg", ".svgz", ".exr", ".hdr", ".xcf", ".kra", ".ai", ".eps", ".pdf")
    + (".ico", ".icns", ".cur", ".dds", ".sgi", ".pcx", ".clip", ".afphoto")
)  # fmt: skip


@cache
def suffixes() -> tuple[str, ...]:
    """Return the suffixes of WANTED that this Pillow, or a plugin of it that is installed, can read."""
    from PIL import Image

    Image.init()
    for _, module, function, _ in PLUGINS.values():
        with suppress(Exception):  # not installed, or not made for this Pillow
            plugin = importlib.import_module(module)
            if function:
                vars(plugin)[function]()
    extensions = Image.registered_extensions()
    readable = {*Image.OPEN, "MPO"}  # Pillow opens it as the JPEG that it begins with
    return tuple(suffix for suffix in WANTED if extensions.get(suffix) in readable)


def formats() -> list[str]:
    """Return Pillow's names of the formats of `suffixes`, in the order in which Pillow tries them.

    Pillow would open any format under any name, and hand PostScript to an interpreter.
    """
    from PIL import Image

    extensions = Image.registered_extensions()
    wanted = {extensions[suffix] for suffix in suffixes()}
    return [name for name in dict.fromkeys([*Image.ID, *Image.OPEN]) if name in wanted and name in Image.OPEN]


def unreadable(suffix: str) -> str:
    """Return why files with a suffix of pictures or videos are not read, and what to do; "" for suffixes of other files."""
    suffix = suffix.lower()
    if suffix in VIDEOS:
        return "videos; save their frames as pictures to use them"
    plugin = next((row for row in PLUGINS.values() if suffix in row[0]), None)
    if plugin and suffix not in suffixes():
        return f"{suffix} pictures, which need a plugin: pip install {plugin[3]}"
    if suffix in WANTED and suffix not in suffixes():
        return f"{suffix} pictures, which this Pillow does not read: pip install -U pillow"
    if suffix in RAWS:
        return f"{suffix} pictures, raw data of a camera; save them as PNG or TIFF"
    return f"{suffix} pictures, which are not read; save them as PNG" if suffix in OTHERS else ""


SIGNS = (  # (offset, bytes, what begins so): files under a picture's name that are none, or of a format that is not read
    (0, b"version https://git-lfs", "a Git-LFS pointer, not the picture itself (run `git lfs pull`)"),
    (0, b"\x00\x05\x16\x07", "macOS's notes on a file, not a picture"),
    (0, b"PK\x03\x04", "a zip file, not a picture"),
    (0, b"%PDF", "a PDF, not a picture"),
    (0, b"\x1a\x45\xdf\xa3", "a video, not a picture"),
    (4, b"ftypqt", "a video, not a picture"),
    (4, b"ftypmp4", "a video, not a picture"),
    (4, b"ftypiso", "a video, not a picture"),
    (4, b"ftyphei", "a HEIC picture (pip install pillow-heif)"),
    (4, b"ftypmif1", "a HEIF picture (pip install pillow-heif)"),
    (4, b"ftypavif", "an AVIF picture (pip install -U pillow)"),
    (0, b"\xff\x0a", "a JPEG XL picture (pip install pillow-jxl-plugin)"),
    (4, b"JXL ", "a JPEG XL picture (pip install pillow-jxl-plugin)"),
    (0, b"8BPS", "a Photoshop file (save it as PNG)"),
    (0, b"%!PS", "a PostScript file, which is not read (save it as PNG)"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript file, which is not read (save it as PNG)"),
    (0, b"\x00\x00\x01\x00", "an icon, which is not read (save it as PNG)"),
    (0, b"DDS ", "a DDS texture, which is not read (save it as PNG)"),
    (0, b"\x01\xda", "an SGI picture, which is not read (save it as PNG)"),
    (0, b"\x0a\x05\x01", "a PCX picture, which is not read (save it as PNG)"),
    (0, b"PF\n", "a picture of floating-point colour, which is not read (save it as PNG)"),
    (0, b"PF\r\n", "a picture of floating-point colour, which is not read (save it as PNG)"),
)


def named(data: bytes) -> str:
    """Return what a file is that is no readable picture, such as a page of HTML that a server sent in its place, or ""."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")) or b"<html" in start:
        return "an HTML page, not a picture"
    if start.startswith((b"<svg", b"<?xml")):
        return "an SVG or XML file, not a picture of pixels" if b"<svg" in data[:4096] else "an XML file, not a picture"
    if start.startswith((b"{", b"[")):
        return "JSON text, not a picture"
    if data.startswith((b"II", b"MM")) and floating_colour(data):
        return "a picture of floating-point colour, which is not read (save it as PNG)"
    return next((what for offset, sign, what in SIGNS if data.startswith(sign, offset)), "")


def floating_colour(data: bytes) -> bool:
    """Return whether a TIFF holds several channels of floating point."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    with suppress(Exception):  # damaged: then it is not known
        tags = ImageFileDirectory_v2(data[:16] if data[2] == 43 or data[3] == 43 else data[:8])  # 43: BigTIFF
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        return tags.get(277, 1) > 1 and 3 in tags.get(339, ())  # samples per pixel, sample format
    return False


# ---- decoding

_large, _lock = threading.Lock(), threading.Lock()
_open: list[Any] = []  # what `pillow` restores, then an entry for each thread that is inside


@contextmanager
def pillow() -> Iterator[None]:
    """Inside the block, lift Pillow's limits, for ours hold, and keep its warnings off the screen. Threads may overlap."""
    from PIL import Image, PngImagePlugin

    with _lock:
        if not _open:
            before = (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK)
            caught = warnings.catch_warnings()
            caught.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\b")
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, TEXT_BYTES
            _open.append((before, caught))
        _open.append(None)
    try:
        yield
    finally:
        with _lock:
            _open.pop()
            if len(_open) == 1:
                (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK), caught = _open.pop()
                caught.__exit__(None, None, None)


def decode(data: bytes, background: str = WHITE) -> tuple[Any, list[Kind]]:
    """Decode a picture file. Returns an upright PIL picture in RGB, and the kinds of what was changed to make it one.

    `background` is the colour behind transparent parts. Raises Refused if the file is no readable, complete picture, or larger
    than MOST_PIXELS.
    """
    from PIL import Image

    if not data:
        raise Refused("0 bytes")
    suffixes()  # plugins
    try:
        with pillow(), Image.open(io.BytesIO(data), formats=formats()) as file:
            if (pixels := file.width * file.height) > MOST_PIXELS:
                size = f"{file.width} x {file.height}; at most {MOST_PIXELS / 1e6:.0f} megapixels are read"
                raise Refused(f"too large ({size})")
            if pixels < LARGE_PIXELS:
                return first_frame(file, background, data)
            with _large:
                return first_frame(file, background, data)
    except Refused:
        raise
    except Exception as error:  # a decoder may raise anything over a damaged file
        if what := named(data):
            raise Refused(what) from error
        reason = str(error).partition(" <_io")[0].removesuffix(" file") or type(error).__name__
        raise Refused(f"not a readable image ({reason})") from error


def first_frame(file: Any, background: str, data: bytes) -> tuple[Any, list[Kind]]:
    """Convert the first frame of an opened picture file, which has the bytes `data`, as `decode` does."""
    several = getattr(file, "is_animated", False)  # only formats of several frames have it
    file.load()
    image = file
    if file.format == "PNG":
        scale_clear_colour(file, bits=data[24])
    if file.format == "TGA" and not data[17] & 15 and "A" in file.getbands() and file.getchannel("A").getextrema() == (0, 0):
        image = file.convert(file.mode.removesuffix("A"))  # it says that it has no alpha channel: the fourth byte is padding
    image, kinds = to_rgb(image, background)
    # the further pictures of an MPO are its preview or depth; every camera writes them
    return image, kinds + ([FRAMES] if several and file.format != "MPO" else [])


def scale_clear_colour(file: Any, bits: int) -> None:
    """Scale the one transparent colour of a PNG as Pillow scales the pixels: to 8 bits. Deep grey ones keep their 16 bits."""
    clear = file.info.get("transparency")
    if isinstance(clear, tuple) and bits == 16:
        file.info["transparency"] = tuple(value >> 8 for value in clear)
    elif isinstance(clear, int) and file.mode == "L" and bits < 8:  # of one bit, Pillow scales it
        file.info["transparency"] = clear * 255 // (2**bits - 1)


def to_rgb(image: Any, background: str = WHITE) -> tuple[Any, list[Kind]]:
    """Convert a PIL picture to an upright one in RGB. Returns it and the kinds of what was changed. Raises Refused."""
    kinds: list[Kind] = []
    profile = image.info.get("icc_profile")
    image = upright(image, kinds)
    alpha = None
    if image.mode in {"I", "F"} or image.mode.startswith("I;"):
        image, alpha = shallow(image)
        kinds.append(DEEP)
    elif image.has_transparency_data:
        grey = image.mode in {"1", "L", "LA"}
        alpha = image.convert("RGBA").getchannel("A")
        image = image.convert("L" if grey else "RGBA")  # a colour profile of grey takes no colours
    if alpha is not None and alpha.getextrema()[1] == 0:
        raise Refused("wholly transparent")
    image = srgb(image, profile, kinds)
    if alpha is not None and alpha.getextrema()[0] < 255:
        from PIL import Image

        below = Image.new("RGB", image.size, colour(background))
        below.paste(image, mask=alpha)
        image = below
        kinds.append(transparent(background))
    return image, kinds


def upright(image: Any, kinds: list[Kind]) -> Any:
    """Turn or mirror a picture as its EXIF data say."""
    from PIL.Image import Transpose as To

    turns = {2: To.FLIP_LEFT_RIGHT, 3: To.ROTATE_180, 4: To.FLIP_TOP_BOTTOM, 5: To.TRANSPOSE, 6: To.ROTATE_270, 7: To.TRANSVERSE}
    try:
        turn = {**turns, 8: To.ROTATE_90}.get(image.getexif().get(0x0112))
    except Exception:  # damaged metadata raise many kinds of errors
        kinds.append(BAD_EXIF)
        return image
    return image if turn is None else image.transpose(turn)


def shallow(image: Any) -> tuple[Any, Any]:
    """Scale a picture of one deep channel to 8 bits. Returns it in mode L, and its alpha channel in mode L or None."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise Refused("floating point values outside of 0 to 1")
        scale = 255.0
    else:
        white = 65535
        with suppress(AttributeError, KeyError, IndexError):  # only TIFF says how many bits are used
            white = 2 ** min(16, image.tag_v2[258][0]) - 1
        if values.min() < 0 or values.max() > white:
            raise Refused(f"whole numbers outside of 0 to {white}")
        scale = 255.0 / white
    alpha, clear = None, image.info.get("transparency")
    with suppress(AttributeError):  # only TIFF has tags
        if image.tag_v2.get(262) == 0:  # white is zero; Pillow inverts pictures of 8 bits alone
            values = 255.0 / scale - values
    if isinstance(clear, int):
        alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.fromarray(np.round(values * scale).astype(np.uint8)), alpha


# ---- colour


def colour(text: str) -> tuple[int, int, int]:
    """Return the red, green and blue of a colour's name or of #rrggbb. Raises UsageError for another text."""
    from PIL import ImageColor

    try:
        if not (text.isalpha() or (text.startswith("#") and len(text) in {4, 7})):
            raise ValueError
        return ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise UsageError(f"{as_field('background', text)}: not a colour", "use a name such as white, or #rrggbb") from error


def srgb(image: Any, profile: bytes | None, kinds: list[Kind]) -> Any:
    """Convert a picture to RGB, by its colour profile if it has one, without its alpha channel."""
    if image.mode not in {"RGB", "L", "CMYK", "LAB"}:
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile or image.mode == "LAB":
        try:
            if (transform := to_srgb(profile or b"", image.mode)) is None:  # sRGB already
                return image.convert("RGB")
            from PIL import ImageCms

            converted = ImageCms.applyTransform(image.convert("RGB") if transform[1] == "RGB" else image, transform[0])
            kinds.append(PROFILE)
            return converted
        except Exception:  # a broken profile, or one for pictures of other channels
            kinds.append(BAD_PROFILE)
    elif image.mode == "CMYK":
        kinds.append(INK)
    return image.convert("RGB")


@lru_cache(maxsize=64)
def to_srgb(profile: bytes, mode: str) -> tuple[Any, str] | None:
    """Return the conversion from a profile to sRGB and the mode that it takes; None if it changes no colour by more than 2.

    It is relative colorimetric with black point compensation: the white of the profile becomes white.
    """
    from PIL import Image, ImageCms

    source: Any = ImageCms.createProfile("LAB")
    if mode != "LAB":
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        mode = "RGB" if (mode, space) == ("L", "RGB") else mode  # grey pictures often keep the profile of a coloured one
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    flags: Any = 0x2000  # black point compensation; Pillow before 10.3 has no name for it
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    if mode in {"RGB", "L"}:
        levels = range(0, 256, 17)
        colours = bytes(x for r in levels for g in levels for b in levels for x in (r, g, b)) if mode == "RGB" else bytes(levels)
        patch = Image.frombytes(mode, (len(colours) // len(mode), 1), colours)
        after: Any = ImageCms.applyTransform(patch, transform)
        if max(abs(a - b) for a, b in zip(patch.convert("RGB").tobytes(), after.tobytes(), strict=True)) <= 2:
            return None
    return transform, mode
