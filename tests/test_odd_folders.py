"""Folders as people have them: every odd file is named by its kind and counted, and all that is good is encoded."""

import io
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.checkpoints import checkpoint
from fastdiff.data import folder
from fastdiff.data.images import Framing
from fastdiff.data.open import open_data
from fastdiff.options.lcm import Config
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused, UsageError

OPEN = dict(prompts=None, pairs=0, seed=0, device="cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))


def noise(seed, size=(64, 64), channels=3):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8))


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def put(folder, name, data=None, caption: str | bytes | None = "a picture"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(noise(random.Random(name).randrange(2**31))) if data is None else data)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    return path


def opened(base, spec, capsys, resolution_px=64, most=None, column=None, **framing):
    """The data of a folder, and what is told on stderr, in one line."""
    console.reset()
    capsys.readouterr()
    framing = Framing(resolution_px, **framing)
    data = open_data(
        checkpoint.load(str(base)), str(spec), resolution_px=resolution_px, framing=framing, max_images=most,
        **({"caption_column": column} if column else {}), **OPEN,
    )  # fmt: skip
    return data, capsys.readouterr().err.replace("\n", " ")


# ---- one folder of all that is odd


def odd_folder(d):
    """Fifty files of all kinds."""
    image = lambda name, **more: put(d, name, **more)
    image("01good.png")
    put(d, "02rgba.png", encoded(noise(2, channels=4)))
    put(d, "03palette.png", encoded(noise(3).quantize(16), transparency=3))
    put(d, "04deep.png", encoded(Image.fromarray((np.arange(4096).reshape(64, 64) * 16).astype(np.uint16))))
    put(d, "05float.tiff", encoded(Image.fromarray(np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)), "tiff"))
    put(d, "06float255.tif", encoded(Image.fromarray(np.full((64, 64), 99, np.float32)), "tiff"))
    put(d, "07cmyk.jpg", encoded(noise(7).convert("CMYK"), "jpeg"))
    put(d, "08badprofile.png", encoded(noise(8), icc_profile=b"no profile" * 20))
    put(d, "09animated.gif", encoded(noise(9), "gif", save_all=True, append_images=[noise(10)]))
    put(d, "10pages.tif", encoded(noise(11), "tiff", save_all=True, append_images=[noise(12)]))
    put(d, "11wrong.png", encoded(noise(13), "jpeg"))
    put(d, "12page.jpg", b"<!DOCTYPE html><html><body>404</body></html>")
    put(d, "13pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    put(d, "14cut.jpg", encoded(noise(14), "jpeg")[:700])
    put(d, "15empty.png", b"")
    put(d, "16bomb.png", encoded(Image.new("1", (17000, 17000))))
    put(d, "17small.png", encoded(noise(17, (20, 20))))
    put(d, "18photo.heic", b"\0\0\0\x18ftypheic" + b"\0" * 40)
    put(d, "19raw.CR2", b"II*\0" + b"\0" * 40, None)
    put(d, "20film.mp4", b"\0\0\0\x18ftypmp42", None)
    image("21latin.png", caption="un café".encode("cp1252"))
    image("22sjis.png", caption="赤いリンゴ".encode("shift-jis"))
    image("23wide.png", caption="a cat".encode("utf-16"))
    image("24lines.png", caption="first line\r\nsecond line\r\n")
    image("25lost.png", caption="caf\ufffd au lait")
    image("26bare.png", caption=None)
    image("27blank.png", caption=" \n")
    image("28same.png")
    put(d, "28same.jpg", encoded(noise(28), "jpeg"), None)
    image("29both.png", caption="one text")
    (d / "29both.caption").write_text("another text")
    image("30UP.png", caption=None).rename(d / "30UP.PNG")
    (d / "30UP.TXT").write_text("upper case")
    (d / "31alone.txt").write_text("of no picture")
    put(d, "32copy.png", (d / "01good.png").read_bytes())
    put(d, "._01good.png", b"\0\5\x16\7" + b"\0" * 40, None)
    image(".hidden.png", caption=None)
    image(".git/x.png", caption=None)
    image("@eaDir/x.png", caption=None)
    image("__MACOSX/x.png", caption=None)
    put(d, "Thumbs.db", b"x", None)
    put(d, "desktop.ini", b"x", None)
    put(d, "notes.docx", b"x", None)
    put(d, "drawing.psd", b"8BPS", None)
    image("10_dog/a.png", caption=None)
    (d / "loop").symlink_to(d)
    (d / "gone.png").symlink_to(d / "nowhere.png")
    os.mkfifo(d / "pipe.png")
    name = Path(os.fsdecode(os.fsencode(d) + b"/caf\xe9.png"))
    name.write_bytes(encoded(noise(33)))
    name.with_suffix(".txt").write_text("a name that is not UTF-8")
    rows = "file_name;text\r\n10_dog\\a.png;a dog\r\n../out.png;outside\r\nmissing.png;gone\r\n"
    (d / "metadata.csv").write_bytes(rows.encode())


LEFT_OUT = """1 file: left out, macOS's notes on a file (the name begins with ._); the first: ._01good.png
1 folder: left out, hidden (the name begins with a dot); the first: .git
1 file: left out, hidden (the name begins with a dot); the first: .hidden.png
1 folder: named NUMBER_NAME, as sd-scripts names repeats; they are not applied, each picture counts once; the first: 10_dog
1 file: left out, .heic pictures, which need a plugin: pip install pillow-heif; the first: 18photo.heic
1 file: left out, .cr2 pictures, raw data of a camera; save them as PNG or TIFF; the first: 19raw.CR2
1 file: left out, videos; save their frames as pictures to use them; the first: 20film.mp4
2 folders: left out, thumbnails or a system's own files (give the folder itself to use it); the first: @eaDir
2 files: left out, written by a system for itself; the first: Thumbs.db
1 file: with a name that is not UTF-8; it is shown with \\x signs; the first: caf\\xe9.png
1 file: left out, a link to nothing; the first: gone.png
1 file: left out, .psd pictures, which are not read; save them as PNG; the first: drawing.psd
1 file: left out, no picture and no caption; the first: notes.docx
1 file: left out, not a regular file; the first: pipe.png
1 folder: left out, a link to a folder that is read already; the first: loop
1 table row: backslashes in its file name, taken for folders; the first: metadata.csv line 2
1 table row: names a file outside of the folder, not used; the first: metadata.csv line 3
1 picture: captions that disagree; the first of metadata.jsonl, metadata.csv, .txt, .caption, .json is used; the first: 29both
1 caption: not UTF-8, read as Windows-1252 (save it as UTF-8 to be sure); the first: 21latin.txt
1 caption: UTF-16 or UTF-32, read so; the first: 23wide.txt
1 caption: of several lines, used whole (sd-scripts takes the first line alone); the first: 24lines.txt
1 caption: holds U+FFFD, the sign that an earlier program lost a character; the sign was left out; the first: 25lost.txt
1 caption: empty; the first: 27blank.txt
1 caption: shared by pictures of the same name; the first: 28same.txt
2 captions: without a picture that is read; the first: 18photo.txt""".splitlines()
CHANGED = """2 pictures: transparent; composed on white (`background`); the first: 02rgba.png
2 pictures: 16-bit grey or floating point, scaled to 8 bits; the first: 04deep.png
1 picture: CMYK without a colour profile, converted to RGB by the plain formula; the first: 07cmyk.jpg
1 picture: a colour profile that is broken or of another kind of picture, ignored; the first: 08badprofile.png
2 pictures: animated or of several pages; the first one is used; the first: 09animated.gif
1 picture: smaller than it is trained at, enlarged (`min_size` leaves small ones out); the first: 17small.png
1 picture: the same bytes as another one; each is used; the first: 32copy.png""".splitlines()
SKIPPED = (
    "10 of 32 images skipped: 2 without a caption, 1 0 bytes, 1 a caption that is no text, 1 in metadata.csv but not in the "
    "folder, 1 floating point values outside of 0 to 1, 1 an HTML page, not a picture, 1 a Git-LFS pointer, not the picture "
    "itself, 1 not a readable image, 1 too large"
)


def test_all_that_is_odd_is_named_by_its_kind_and_counted_also_when_the_cache_has_it(tiny_sd, tmp_path, capsys, monkeypatch):
    odd_folder(tmp_path / "d")
    names, listings = [], []
    for run in range(2):
        data, told = opened(tiny_sd, tmp_path / "d", capsys)
        for line in [*LEFT_OUT, *CHANGED, SKIPPED]:
            assert line in told, (run, line)
        names.append(data.names)
        listings += [json.loads(path.read_text()) for path in (tmp_path / "cache").rglob("sets/*.json")]
        monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    assert names[0] == names[1]
    assert len(names[0]) == 22
    assert "caf\\xe9.png" in names[0]
    assert len(listings) == 2
    assert len(listings[0]["counts"]) == len(CHANGED)


def test_a_thousand_good_pictures_among_thirty_bad_ones(tiny_sd, tmp_path, capsys):
    places = list(range(1030))
    random.Random(0).shuffle(places)
    bad = set(places[:30])
    kinds = [b"", b"<html></html>", b"no picture", encoded(noise(0, (8, 8)))[:60]]
    for i in range(1030):
        data = kinds[i % 4] + (b" %d" % i if i % 4 == 2 else b"") if i in bad else encoded(noise(i, (8, 8)))
        put(tmp_path / "d", f"{i:04d}.png", data, "a caption")
    data, told = opened(tiny_sd, tmp_path / "d", capsys, resolution_px=8)
    assert len(data) == 1000
    assert data.names == [f"{i:04d}.png" for i in range(1030) if i not in bad]
    assert "30 of 1030 images skipped" in told
    assert told.count("; skipped") == 5  # the first ones are named, the others counted


# ---- folders


def test_the_order_is_that_of_names_however_the_disk_lists_them(tmp_path, monkeypatch):
    for name in ("b.png", "a/z.png", "a.png", "c/a/x.png", "Z.png"):
        put(tmp_path, name)
    wanted = [p.relative_to(tmp_path).as_posix() for p in folder.Folder(tmp_path).images]
    assert wanted == ["Z.png", "a/z.png", "a.png", "b.png", "c/a/x.png"]
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            self.entries = sorted(scandir(path), key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    assert [p.relative_to(tmp_path).as_posix() for p in folder.Folder(tmp_path).images] == wanted


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    put(tmp_path / "elsewhere", "far.png")
    put(tmp_path / "d", "real/near.png")
    (tmp_path / "d" / "a-link").symlink_to(tmp_path / "d" / "real")  # named before the folder that it leads to
    (tmp_path / "d" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "d")
    made = folder.Folder(tmp_path / "d")
    assert [p.relative_to(tmp_path / "d").as_posix() for p in made.images] == ["out/far.png", "real/near.png"]
    assert made.counts.count("a link to a folder that is read already") == 2


def test_links_that_lead_out_of_the_folder_are_told(tmp_path):
    put(tmp_path / "par", "in/a.png")
    put(tmp_path / "par", "other/b.png")
    put(tmp_path / "far", "c.png")
    (tmp_path / "par" / "in" / "up").symlink_to(tmp_path / "par")
    made = folder.Folder(tmp_path / "par" / "in")
    assert [p.name for p in made.images] == ["a.png", "b.png"]
    assert made.counts.count("folder: a link that leads out of the folder; the pictures behind it are read too") == 1
    (tmp_path / "par" / "out").symlink_to(tmp_path / "far")
    assert folder.Folder(tmp_path / "par").counts.count("a link that leads out of the folder") == 1
    (tmp_path / "par" / "out").unlink()
    assert folder.Folder(tmp_path / "par").counts.count("a link that leads out of the folder") == 0


def test_rows_of_files_that_are_left_out_say_so(tmp_path):
    put(tmp_path, "a.png")
    for name in ("b.psd", ".h.png"):
        put(tmp_path, name, b"x", None)
    names = ["a.png", "b.psd", ".h.png", "gone.png"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name, "text": "x"}) for name in names))
    problems = {sample.name: sample.problem for sample in folder.Folder(tmp_path).samples() if sample.problem}
    left_out = "in metadata.jsonl but left out of the pictures of the folder"
    assert problems == {
        "b.psd": f"{left_out} (.psd pictures, which are not read; save them as PNG)",
        ".h.png": f"{left_out} (its name is that of a hidden file, a system, or no picture)",
        "gone.png": "in metadata.jsonl but not in the folder",
    }


def test_a_folder_that_cannot_be_opened_is_told(tmp_path, monkeypatch):
    put(tmp_path, "a.png")
    put(tmp_path, "closed/b.png")
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    made = folder.Folder(tmp_path)
    assert [p.name for p in made.images] == ["a.png"]
    assert made.counts.count("folder: left out, cannot be opened (Permission denied)") == 1
    with pytest.raises(UsageError, match=r"closed`: cannot be opened \(Permission denied\)"):
        folder.Folder(tmp_path / "closed")


def test_a_folder_without_pictures_says_what_was_left_out(tmp_path):
    for name in ("a.CR2", "b.CR2", "c.mp4"):
        put(tmp_path, name, b"x")
    with pytest.raises(UsageError, match="no images in it") as error:
        folder.Folder(tmp_path)
    assert "2 files: left out, .cr2 pictures, raw data of a camera" in error.value.hint
    assert "1 file: left out, videos" in error.value.hint


def test_formats_of_this_pillow_are_read(tmp_path):
    from PIL import features

    kinds = {"a.tif": "tiff", "b.gif": "gif", "c.bmp": "bmp", "d.ppm": "ppm", "e.tga": "tga", "f.jfif": "jpeg", "g.mpo": "mpo"}
    kinds |= {"h.jp2": "jpeg2000"} if features.check("jpg_2000") else {}
    kinds |= {"i.avif": "avif"} if features.check("avif") else {}
    for name, kind in kinds.items():
        put(tmp_path, name, encoded(noise(1), kind))
    made = folder.Folder(tmp_path)
    assert [p.name for p in made.images] == sorted(kinds)
    for path in made.images:
        assert folder.square(path, 64)[0].shape == (3, 64, 64)
    put(tmp_path, "j.xyz", b"x")
    assert folder.Folder(tmp_path).counts.count("left out, no picture and no caption") == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a.tar", r"read as `data=wds:.*a\.tar`"),
        ("a.tar.gz", r"read as `data=wds:.*a\.tar\.gz`"),
        ("a.parquet", r"read as `data=hf:.*a\.parquet`"),
        ("a.zip", "unpack it"),
        ("a.png", "put the pictures into a folder"),
        ("a.heic", "put the pictures into a folder"),
        ("metadata.jsonl", "give the folder that holds the pictures"),
        ("a.xyz", "give a folder of pictures and captions"),
    ],
)
def test_a_single_file_says_what_to_give_instead(tmp_path, name, hint):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match="is a file, not a folder") as error:
        open_data(checkpoint.load("emoji"), str(tmp_path / name), resolution_px=64, **OPEN)
    assert re.search(hint, error.value.hint)


# ---- options


def test_the_background_is_part_of_the_cache(tiny_sd, tmp_path, capsys):
    """Latents of another background, and those of earlier rules, are not used again."""
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 0, 255))
    put(tmp_path / "d", "a.png", encoded(clear))
    white, told = opened(tiny_sd, tmp_path / "d", capsys)
    assert "composed on white" in told
    blue, told = opened(tiny_sd, tmp_path / "d", capsys, background="#0000ff")
    assert "composed on #0000ff (`background`)" in told
    assert not torch.equal(white.moments[:], blue.moments[:])
    again, told = opened(tiny_sd, tmp_path / "d", capsys, background="blue")
    assert torch.equal(again.moments[:], blue.moments[:])
    from fastdiff.data.images import hash_of

    assert hash_of("digest", 64, False, 8, "centre", False) not in Framing(64).keys("digest")  # as keys once were


def test_small_pictures_are_left_out_by_size_also_from_the_cache(tiny_sd, tmp_path, capsys):
    put(tmp_path / "d", "a.png", encoded(noise(1, (64, 64))))
    put(tmp_path / "d", "b.png", encoded(noise(2, (40, 90))))
    data, told = opened(tiny_sd, tmp_path / "d", capsys)
    assert len(data) == 2
    assert "1 picture: smaller than it is trained at, enlarged" in told
    for least, names in ((40, ["a.png", "b.png"]), (41, ["a.png"])):
        for _ in range(2):
            data, told = opened(tiny_sd, tmp_path / "d", capsys, min_size_px=least)
            assert data.names == names
        assert ("1 of 2 images skipped: 1 smaller than `min_size=41`" in told) == (least == 41)
    with pytest.raises(InputRefused, match="2 smaller than `min_size=100`"):
        opened(tiny_sd, tmp_path / "d", capsys, min_size_px=100)


def test_notes_are_told_when_only_the_captions_are_new(tiny_sd, tmp_path, capsys):
    path = put(tmp_path / "d", "a.png", encoded(noise(2, channels=4)))
    opened(tiny_sd, tmp_path / "d", capsys)
    path.with_suffix(".txt").write_text("another caption")
    _, told = opened(tiny_sd, tmp_path / "d", capsys)
    assert "1 picture: transparent; composed on white" in told


def test_options_are_checked_early_and_where_they_have_no_effect(tmp_path, capsys):
    assert Config(background="#00ff7F").background == "#00ff7F"
    for wrong in ("whitish", "#12345", "", "rgb(1,2,3)", "#gggggg"):
        with pytest.raises(UsageError, match=f"`background={wrong.replace('(', '.').replace(')', '.')}`: not a colour"):
            Config(background=wrong)
    base = checkpoint.load("emoji")
    for framing, more, option in (
        (Framing(64, background="black"), {}, "background"),
        (Framing(64, min_size_px=9), {}, "min_size"),
        (Framing(64), {"caption_column": "x"}, "caption_column"),
    ):
        with pytest.raises(UsageError, match=f"`{option}`: has no effect with `data=emoji`"):
            open_data(base, "emoji", resolution_px=64, framing=framing, **more, **OPEN)


def test_a_run_with_all_options_and_a_name_that_is_not_utf_8(fastdiff, tiny_sd, tmp_path):
    d = tmp_path / "d"
    put(d, "a.png", encoded(noise(1, channels=4)), None)
    put(d, "tiny.png", encoded(noise(2, (10, 10))), None)
    name = os.fsdecode(b"caf\xe9.png")
    put(d, name, encoded(noise(3)), None)
    rows = [{"file_name": n, "tags": "a tag", "text": "x"} for n in ("a.png", "tiny.png", name)]
    (d / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [
        f"--base={tiny_sd}",
        "--resolution=64",
        "--data=d",
        "--steps=1",
        "--batch-size=1",
        "--grad-accum=1",
        "--lora-rank=2",
        "--device=cpu",
    ]
    words += ["--background=black", "--min-size=20", "--caption-column=tags", "--proof=0", "-o=run"]
    code, result = fastdiff("train-lcm-lora", *words)
    assert code == 0, result
    told = " ".join(result["warnings"])
    assert "1 picture: transparent; composed on black (--background); the first: a.png" in told
    assert "1 smaller than --min-size 20" in told
    listing = next((tmp_path / "cache").rglob("sets/*.json"))
    assert [row[::2] for row in json.loads(listing.read_text())["rows"]] == [["a.png", "a tag"], ["caf\\xe9.png", "a tag"]]


def test_streams_count_the_same_kinds(tiny_sd, tmp_path, capsys):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        files = {
            "0.png": encoded(noise(1, channels=4)),
            "0.txt": "un café".encode("cp1252"),
            "1.png": encoded(noise(2)),
            "1.txt": "赤い".encode("shift-jis"),
            "2.png": b"<html></html>",
            "2.txt": b"x",
        }
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for _ in range(2):
        data, told = opened(tiny_sd, f"wds:{tmp_path}/a.tar", capsys)
        assert [name.rsplit("/", 1)[1] for name in data.names] == ["0.png"]
        for line in (
            "1 picture: transparent; composed on white (`background`); the first: a.tar/0.png",
            "1 caption: not UTF-8, read as Windows-1252 (save it as UTF-8 to be sure); the first: a.tar/0.png",
            "2 of 3 images skipped: 1 a caption that is no text, 1 an HTML page, not a picture",
        ):
            assert line in told
