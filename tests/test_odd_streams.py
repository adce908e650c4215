"""Tars and data sets as people have them: no picture is dropped or takes another one's caption without a word."""

import io
import json
import tarfile

import pytest

from fastdiff.data import streams


def tar(path, files):
    """A tar of {name: bytes or text} in this order."""
    with tarfile.open(path, "w") as out:
        for name, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return path


def samples(path, column=None):
    return list(streams.WebDataset(str(path), column).samples())


def captions(path, column=None):
    """The pictures that can be used: the bytes of each with its caption."""
    return {sample.data.decode(): sample.caption for sample in samples(path, column) if not sample.problem}


def kinds(path):
    return [kind.what for sample in samples(path) for kind in sample.kinds]


# ---- tars


def test_pictures_whose_names_have_dots_keep_their_own_captions(tmp_path):
    files = {}
    for i in range(3):
        files |= {f"d/Screenshot 2024.01.{i:02d}.png": f"picture {i}", f"d/Screenshot 2024.01.{i:02d}.txt": f"caption {i}"}
    path = tar(tmp_path / "a.tar", files)
    assert captions(path) == {f"picture {i}": f"caption {i}" for i in range(3)}
    assert samples(path)[1].name == "a.tar/d/Screenshot 2024.01.01.png"
    backwards = tar(
        tmp_path / "b.tar", dict(sorted(files.items(), key=lambda row: row[0][-3:]))
    )  # all pictures, then all captions
    assert captions(backwards) == captions(path)
    assert captions(tar(tmp_path / "c.tar", {"v1.0 cat.png": "one", "v1.0 cat.txt": "a cat"})) == {"one": "a cat"}
    bare = tar(tmp_path / "d.tar", {**files, "d/Screenshot 2024.01.07.png": "bare"})
    assert [sample.problem for sample in samples(bare)] == ["", "", "", "without a caption"]


def test_parts_of_a_sample_stay_together_and_further_pictures_are_counted(tmp_path):
    path = tar(tmp_path / "a.tar", {"a.jpg": "photo", "a.seg.png": "map", "a.txt": "a cat", "b.seg.png": "b", "b.txt": "a dog"})
    assert captions(path) == {"photo": "a cat", "b": "a dog"}
    assert kinds(path) == ["further pictures of the same name in the tar, left out"]
    path = tar(tmp_path / "b.tar", {"a.png": "one", "a.webp": "two", "a.txt": "a cat", "b.png": "b", "b.txt": "a dog"})
    assert captions(path) == {"one": "a cat", "b": "a dog"}
    assert kinds(path) == ["further pictures of the same name in the tar, left out"]


def test_a_file_that_is_twice_in_a_tar_is_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for name, data in (("a.png", b"one"), ("a.txt", b"a cat"), ("a.png", b"two")):
            member = tarfile.TarInfo(name)
            member.size = 3
            out.addfile(member, io.BytesIO(data[:3].ljust(3)))
    assert [sample.problem for sample in samples(tmp_path / "a.tar")] == ["broken tar (a.png: duplicate file name)", ""]


def test_captions_in_tars_follow_the_rules_of_folders(tmp_path):
    files = {"a.png": "a", "a.png.txt": "whole name", "b.png": "b", "b.txt": "of txt", "b.caption": "of caption", "b.json": "{}"}
    files |= {"c.png": "c", "c.txt": "赤いリンゴ".encode("shift-jis"), "c.json": json.dumps({"text": "of json"})}
    path = tar(tmp_path / "a.tar", files)
    assert captions(path) == {"a": "whole name", "b": "of txt", "c": "of json"}
    told = kinds(path)
    assert len(told) == 2
    assert told[0].startswith("captions that disagree")
    assert told[1] == "no text, left out; another caption of the picture is used"
