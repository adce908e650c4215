"""WebDataset shards and Hugging Face data sets: what is damaged is counted and named, and the rest is used."""

import http.server
import io
import json
import socket
import tarfile
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastdiff.checkpoints import checkpoint
from fastdiff.data import encode, streams
from fastdiff.data.open import open_data
from fastdiff.runtime.errors import InputRefused, UsageError

OPEN = dict(prompts=None, pairs=0, seed=0, device="cpu", resolution_px=64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))


def png(seed):
    g = torch.Generator().manual_seed(seed)
    file = io.BytesIO()
    Image.fromarray(torch.randint(256, (64, 64, 3), generator=g, dtype=torch.uint8).numpy()).save(file, "png")
    return file.getvalue()


def tar(path, files):
    """A tar of {name: bytes}; returns where each member's header begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = {}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as out:
        for name, data in files.items():
            starts[name] = out.offset
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return starts


def shard(path, numbers, **changes):
    files = {}
    for i in numbers:
        files |= {f"{i:04d}.png": png(i), f"{i:04d}.txt": f"caption {i}".encode()}
    return tar(path, {k: v for k, v in {**files, **changes}.items() if v is not None})


def names(data):
    return sorted(name.rsplit("/", 1)[-1].removesuffix(".png") for name in data.names)


@pytest.fixture
def opened(tiny_sd):
    base = str(tiny_sd)
    return lambda spec, most=None: open_data(checkpoint.load(base), spec, max_images=most, **OPEN)


def test_shards_with_braces_are_read_in_order_and_once(opened, tmp_path, monkeypatch, capsys):
    shard(tmp_path / "a-0.tar", range(3))
    shard(tmp_path / "a-1.tar", range(3, 6))
    spec = f"wds:{tmp_path}/a-{{0..1}}.tar"
    data = opened(spec)
    assert names(data) == [f"{i:04d}" for i in range(6)]
    keys = [data.texts.tokens.keys[i] for i in data.captions.flatten()]
    assert keys == [encode.Captions.key(f"caption {i}") for i in range(6)]
    monkeypatch.setattr(streams.WebDataset, "samples", lambda self: pytest.fail("read again"))
    assert len(opened(spec)) == 6
    monkeypatch.undo()
    assert "up to 10000 images of wds:" in capsys.readouterr().err


def test_at_most_so_many_are_taken(opened, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    shard(tmp_path / "a.tar", range(6))
    assert names(opened(f"wds:{tmp_path}/a.tar", most=4)) == ["0000", "0001", "0002", "0003"]
    assert "only the first 4 images are used (`max_images`)" in capsys.readouterr().err


def test_a_broken_member_a_missing_caption_and_an_empty_image_are_counted_and_named(opened, tmp_path, capsys):
    """tarfile takes a damaged header in the middle for the end; here what follows it is found."""
    path = tmp_path / "a.tar"
    starts = shard(path, range(8), **{"0001.txt": None, "0002.png": b"", "0005.png": png(5)[:60]})
    data = bytearray(path.read_bytes())
    data[starts["0003.png"] : starts["0003.png"] + 512] = b"\xff" * 512
    path.write_bytes(data)
    found = opened(f"wds:{path}")
    assert names(found) == ["0000", "0004", "0006", "0007"]
    err = capsys.readouterr().err
    assert "a.tar/0001.png: without a caption; skipped" in err
    assert "a.tar/0002.png: 0 bytes; skipped" in err
    assert "broken tar (damaged member after 0002.txt); skipped" in err
    assert "a.tar/0003: without an image; skipped" in err
    assert "a.tar/0005.png: not a readable image" in err
    assert "5 of 9 images skipped" in err


def test_a_shard_that_ends_early_does_not_stop_the_next(opened, tmp_path, capsys):
    starts = shard(tmp_path / "a-0.tar", range(4))
    whole = (tmp_path / "a-0.tar").read_bytes()
    (tmp_path / "a-0.tar").write_bytes(whole[: starts["0002.png"] + 700])  # within a picture
    (tmp_path / "a-1.tar").write_bytes(b"")
    (tmp_path / "a-2.tar").write_bytes(b"no tar" * 1000)
    shard(tmp_path / "a-3.tar", range(4, 6))
    assert names(opened(f"wds:{tmp_path}/a-{{0..3}}.tar")) == ["0000", "0001", "0004", "0005"]
    err = capsys.readouterr().err
    for broken in ("a-0.tar: broken tar (0002.png: unexpected end of data)", "a-1.tar: broken tar", "a-2.tar: broken tar"):
        assert broken in err


def test_json_captions_and_suffixes(opened, tmp_path):
    files = {"a.jpg": png(0), "a.json": json.dumps({"caption": "x"}).encode(), "b.seg.png": png(1), "b.txt": b"y"}
    tar(tmp_path / "a.tar", files)
    data = opened(f"wds:{tmp_path}/a.tar")
    assert [name.rsplit("/", 1)[-1] for name in data.names] == ["a.jpg", "b.seg.png"]
    keys = [data.texts.tokens.keys[i] for i in data.captions.flatten()]
    assert keys == [encode.Captions.key(caption) for caption in "xy"]


def test_pipes_and_http(opened, tmp_path, capsys):
    shard(tmp_path / "a.tar", range(3))
    assert names(opened(f"wds:pipe:cat {tmp_path}/a.tar")) == ["0000", "0001", "0002"]
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        found = opened(f"wds:{place}/{{a,gone}}.tar")
        server.shutdown()
    assert names(found) == ["0000", "0001", "0002"]
    assert "gone.tar: broken tar" in capsys.readouterr().err


def test_nothing_usable_is_an_error_also_of_an_endless_stream(opened, tmp_path, monkeypatch):
    tar(tmp_path / "a.tar", {f"{i}.png": png(0) for i in range(5)})
    with pytest.raises(InputRefused, match="none of 5 images can be used: 5 without a caption"):
        opened(f"wds:{tmp_path}/a.tar")
    with pytest.raises(UsageError, match="no such shard: gone"):
        opened("wds:gone-{0..3}.tar")
    with pytest.raises(InputRefused, match="broken tar"):
        opened("wds:pipe:false")

    samples_read = []

    def endless(self):
        while True:
            samples_read.append("one")
            yield streams.Sample("one", problem="without a caption")

    monkeypatch.setattr(streams.WebDataset, "samples", endless)
    with pytest.raises(InputRefused, match="none of 256 images"):
        opened(f"wds:{tmp_path}/a.tar")
    assert len(samples_read) == encode.HOPELESS == 256


def test_a_slow_stream_without_a_good_image_is_given_up_in_time(opened, tmp_path, monkeypatch):
    """A sample a second: the limit in seconds ends it long before the limit of samples."""
    shard(tmp_path / "a.tar", range(1))
    clock = SimpleNamespace(now_s=0.0, monotonic=lambda: clock.now_s)

    def slow(self):
        yield streams.Sample("broken.png", "x", lambda: b"no picture")  # waits to be looked at
        while True:
            clock.now_s += 1
            yield streams.Sample("one", problem="without a caption")

    monkeypatch.setattr(streams.WebDataset, "samples", slow)
    monkeypatch.setattr(encode, "time", clock)
    with pytest.raises(InputRefused, match="1 not a readable image"):
        opened(f"wds:{tmp_path}/a.tar")
    assert encode.HOPELESS_S < clock.now_s <= encode.HOPELESS_S + 2


@pytest.mark.slow
def test_a_server_that_never_answers_is_given_up_within_half_a_minute(opened):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(InputRefused, match="broken tar"):
            opened(f"wds:http://127.0.0.1:{silent.getsockname()[1]}/{{0..9}}.tar")
        assert time.monotonic() - began < 30


# ---- Hugging Face data sets, offline


@pytest.fixture
def imagefolder(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(i))
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"caption {i}" if i != 2 else ""}) for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_an_imagefolder_builder(opened, imagefolder, monkeypatch, capsys):
    (imagefolder / "1.png").write_bytes(b"")
    spec = f"hf:imagefolder:{imagefolder}"
    assert names(opened(spec)) == ["0", "3"]
    err = capsys.readouterr().err
    assert "1.png: 0 bytes; skipped" in err
    assert "2.png: without a caption; skipped" in err
    with monkeypatch.context() as patch:
        patch.setattr(streams.HuggingFace, "samples", lambda self: pytest.fail("read again"))
        assert names(opened(spec)) == ["0", "3"]
    (imagefolder / "1.png").write_bytes(png(1))
    assert names(opened(f"{spec}:train")) == ["0", "1", "3"]


def test_a_parquet_file(opened, tmp_path, capsys):
    import datasets

    rows = [{"image": {"bytes": png(i) if i else b"broken", "path": None}, "prompt": f"p {i}"} for i in range(3)]
    features = datasets.Features({"image": datasets.Image(decode=False), "prompt": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    data = opened(f"hf:{tmp_path}/a.parquet")
    assert [name.rsplit(" ", 1)[1] for name in data.names] == ["1", "2"]
    assert "row 0: not a readable image" in capsys.readouterr().err
    datasets.Dataset.from_list([{"a": 1}]).to_parquet(str(tmp_path / "b.parquet"))
    with pytest.raises(UsageError, match="there is no image column among a"):
        opened(f"hf:{tmp_path}/b.parquet")


def test_mistakes_are_told_with_the_fix(opened, imagefolder):
    with pytest.raises(UsageError, match="`data=hf:nobody/nothing`") as error:
        opened("hf:nobody/nothing")
    assert "without a network only local files work" in error.value.hint
    with pytest.raises(UsageError, match="`data=hf:imagefolder`: the path of the files"):
        opened("hf:imagefolder")
    (imagefolder / "metadata.jsonl").unlink()
    with pytest.raises(UsageError, match="no caption column among"):
        opened(f"hf:imagefolder:{imagefolder}")


@pytest.mark.parametrize(("kind", "module"), [("wds", "webdataset"), ("hf", "datasets")])
def test_the_extra_is_named_where_it_is_missing(opened, monkeypatch, kind, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    monkeypatch.setitem(__import__("sys").modules, f"{module}.shardlists", None)
    with pytest.raises(UsageError, match=f"{module} is not installed") as error:
        opened(f"{kind}:x")
    assert "fastdiff[data]" in error.value.hint
