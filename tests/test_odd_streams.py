"""Tars and data sets as people have them: no picture is dropped or takes another one's caption without a word."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastdiff.checkpoints import checkpoint
from fastdiff.data import open as opening
from fastdiff.data import streams
from fastdiff.data.listing import Listing
from fastdiff.runtime import console
from fastdiff.runtime.errors import UsageError


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


# ---- Hugging Face data sets


def parquet(path, columns, **features):
    import datasets

    kinds = {"image": datasets.Image(decode=False), "bytes": datasets.Value("binary"), "text": datasets.Value("string")}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features({k: kinds[v] for k, v in features.items()}))
    rows.to_parquet(str(path))
    return path


def test_the_column_image_wins_over_other_columns_of_pictures_and_the_others_are_told(tmp_path, capsys):
    cell = lambda data: [{"bytes": data, "path": None}]
    columns = {"conditioning_image": cell(b"edges"), "image": cell(b"photo"), "text": ["a cat"]}
    path = parquet(tmp_path / "a.parquet", columns, conditioning_image="image", image="image", text="text")
    console.reset()
    assert [sample.data for sample in streams.HuggingFace(str(path)).samples()] == [b"photo"]
    told = "the pictures are those of the column image; not used: conditioning_image"
    assert told in capsys.readouterr().err.replace("\n", " ")
    columns = {"jpg": [b"other"], "image": [b"photo"], "text": ["a cat"]}
    path = parquet(tmp_path / "b.parquet", columns, jpg="bytes", image="bytes", text="text")
    assert [sample.data for sample in streams.HuggingFace(str(path)).samples()] == [b"photo"]
    columns = {"image": ["a/path.png"], "photo": cell(b"photo"), "text": ["a cat"]}
    path = parquet(tmp_path / "c.parquet", columns, image="text", photo="image", text="text")
    assert [sample.data for sample in streams.HuggingFace(str(path)).samples()] == [b"photo"]


def test_cells_that_hold_no_picture_say_what_they_hold(tmp_path):
    path = tmp_path / "A.JSONL"  # the suffix in large letters, and json by another name
    path.write_text('{"image": "a/path.png", "text": "a cat"}\n')
    assert [s.problem for s in streams.HuggingFace(str(path)).samples()] == ["a path or other text, not a picture (column image)"]
    path.write_text('{"image": [1, 2], "text": "a cat"}\n')
    assert [s.problem for s in streams.HuggingFace(str(path)).samples()] == ["a list, not a picture (column image)"]


def test_a_file_that_no_builder_reads_is_refused_by_its_suffix(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(UsageError, match="a .xlsx file is not read as a data set") as error:
        streams.HuggingFace(str(tmp_path / "a.xlsx"))
    assert ".parquet" in error.value.hint


# ---- what the cache keeps


@pytest.fixture
def opened(tiny_sd, tmp_path, monkeypatch, capsys):
    """Open a data set of pictures of 64 px: the data, and what is told."""
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))

    def open_spec(spec, most=None):
        console.reset()
        capsys.readouterr()
        base = checkpoint.load(str(tiny_sd))
        data = opening.open_data(base, str(spec), resolution_px=64, max_images=most, prompts=None, pairs=0, seed=0, device="cpu")
        return data, capsys.readouterr().err.replace("\n", " ")

    return open_spec


def png(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "png")
    return file.getvalue()


def test_a_cut_is_told_in_every_run_and_is_a_warning_where_nobody_chose_it(opened, tmp_path, monkeypatch):
    files = {}
    for i in range(3):
        files |= {f"{i}.png": png(i), f"{i}.txt": f"caption {i}"}
    spec = f"wds:{tar(tmp_path / 'a.tar', files)}"
    for _ in range(2):
        data, told = opened(spec, most=2)
        assert len(data) == 2
        assert "only the first 2 images are used (`max_images`)" in told
        assert "warning" not in told
    monkeypatch.setattr(opening, "STREAMED", 2)
    warned = []
    monkeypatch.setattr(console, "warn", warned.append)
    opened(spec)
    assert [line for line in warned if "only the first 2 images are used, which is the default" in line]
    data, told = opened(f"wds:{tmp_path}/a.tar", most=3)
    assert len(data) == 3
    assert "only the first" not in told
    assert "up to 3 images" in told  # an upper limit: what is in the cache is not subtracted, it may be of other data


def test_a_read_error_is_not_kept(opened, tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    for i in range(2):
        (tmp_path / "d" / f"{i}.png").write_bytes(png(i))
        (tmp_path / "d" / f"{i}.txt").write_text(f"caption {i}")
    read = type(tmp_path).read_bytes

    def failing(path):
        if path.name == "1.png":
            raise OSError(5, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "read_bytes", failing)
        data, told = opened(tmp_path / "d")
        assert data.names == ["0.png"]
        assert "1.png: not readable (Input/output error)" in told
    assert opened(tmp_path / "d")[0].names == ["0.png", "1.png"]


def test_rows_without_a_picture_that_change_are_told(opened, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "0.png").write_bytes(png(0))
    row = '{"file_name": "0.png", "text": "a cat"}\n'
    (tmp_path / "d" / "metadata.jsonl").write_text(row)
    assert "skipped" not in opened(tmp_path / "d")[1]
    (tmp_path / "d" / "metadata.jsonl").write_text(row + '{"file_name": "gone.png", "text": "a dog"}\n')
    assert "1 of 2 images skipped: 1 in metadata.jsonl but not in the folder" in opened(tmp_path / "d")[1]


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": [["a", "b"]]},
        {"refused": [["a"]]},
        {"rows": [[1, 2, 3]]},
        {"rows": 3},
        {"counts": [["a"]]},
        [],
        {"passing": True},
    ],
)
def test_a_damaged_listing_is_read_as_none(tmp_path, damage):
    good = {"rows": [["a", "b", "c"]], "refused": [["d", "e"]], "counts": []}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(good))
    assert Listing.read(path).rows == [("a", "b", "c")]
    path.write_text(json.dumps(good | damage if isinstance(damage, dict) else damage))
    assert Listing.read(path) is None


@pytest.mark.parametrize("data", ["nowhere", "hf:nowhere.parquet", "wds:nowhere.tar", "empty"])
def test_data_that_are_not_there_are_refused_before_anything_is_drawn(data, tiny_sd, tmp_path, monkeypatch, capfd):
    from fastdiff import cli
    from fastdiff.methods.lcm import LCM

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(LCM, "exhibit", lambda *parts: pytest.fail("the previews were drawn first"))
    assert cli.main(["train-lcm-lora", "--base", str(tiny_sd), "--data", data, "--steps", "1", "-o", "run", "--offline"]) == 2
    assert f"--data {data}" in capfd.readouterr().err
