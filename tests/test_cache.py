"""Pictures and captions are encoded once: found again by content, in any run; what cannot be used is named and counted."""

import gc
import json
import os
import signal
import socket
import traceback
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastdiff.checkpoints import checkpoint
from fastdiff.data import encode
from fastdiff.data import store as stores
from fastdiff.data.batch import Buckets
from fastdiff.data.images import Framing, sizes_near
from fastdiff.data.open import open_data
from fastdiff.models import autoencoder, text
from fastdiff.runtime import console, disk, rng
from fastdiff.runtime.errors import DoesNotFit, InputRefused, UsageError
from fastdiff.runtime.picture_file import Refused, decode

OPEN = dict(prompts=None, pairs=0, seed=0, device="cpu")


@pytest.fixture(autouse=True)
def encoded(tmp_path, monkeypatch):
    """A cache of the test's own; how many pictures and captions have been encoded."""
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    count = SimpleNamespace(pictures=0, captions=0)
    pictures, captions = autoencoder.encode_moments, text.encoded

    def counted_pictures(vae, pixels, **more):
        count.pictures += len(pixels)
        return pictures(vae, pixels, **more)

    def counted_captions(prompts, *how):
        count.captions += len(prompts)
        return captions(prompts, *how)

    monkeypatch.setattr(autoencoder, "encode_moments", counted_pictures)
    monkeypatch.setattr(text, "encoded", counted_captions)
    return count


def picture(path, size=(64, 64), seed=0):
    g = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (size[1] // 4, size[0] // 4, 3), generator=g, dtype=torch.uint8).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def folder(tmp_path):
    """Six pictures of two captions."""
    for i in range(6):
        picture(tmp_path / "data" / f"{i}.png", seed=i)
        (tmp_path / "data" / f"{i}.txt").write_text(f"caption {i % 2}\n")
    return tmp_path / "data"


def opened(base, spec, most=None, resolution_px=64, **framing):
    base = checkpoint.load(str(base))
    return open_data(
        base, str(spec), resolution_px=resolution_px, framing=Framing(resolution_px, **framing), max_images=most, **OPEN
    )


def test_the_second_start_encodes_nothing_and_reads_no_picture(tiny_sd, folder, encoded, monkeypatch):
    first = opened(tiny_sd, folder)
    assert (encoded.pictures, encoded.captions) == (6, 3)  # with the empty caption
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    second = opened(tiny_sd, folder)
    assert (encoded.pictures, encoded.captions) == (6, 3)
    draw = lambda data: data.batch(16, torch.Generator().manual_seed(1))
    a, b = draw(first), draw(second)
    assert torch.equal(a.latents, b.latents)
    assert torch.equal(a.cond.tokens, b.cond.tokens)
    assert torch.equal(a.uncond.tokens, b.uncond.tokens)


def test_what_is_stored_is_what_vae_and_text_encoders_answer(tiny_sdxl, folder):
    base, data = checkpoint.load(str(tiny_sdxl)), opened(tiny_sdxl, folder)
    pixels = torch.stack([torch.tensor(list(Image.open(folder / f"{i}.png").tobytes())) for i in range(6)])
    pixels = pixels.reshape(6, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1
    wanted = autoencoder.encode_moments(base.vae, pixels)
    torch.testing.assert_close(data.moments[:], wanted, atol=2e-3, rtol=2e-3)  # stored as fp16
    told = text.encode(base, ["caption 0", "caption 1"])
    torch.testing.assert_close(data.texts[:2].tokens, told.tokens, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(data.texts[:2].pooled, told.pooled, atol=2e-3, rtol=2e-3)
    assert data.captions.flatten().tolist() == [0, 1, 0, 1, 0, 1]
    assert data.names == [f"{i}.png" for i in range(6)]


def test_the_encoders_are_freed_afterwards(tiny_sd, folder):
    base = checkpoint.load(str(tiny_sd))
    encoder = weakref.ref(base.text_encoders[0])
    open_data(base, str(folder), resolution_px=64, **OPEN)
    base.release("vae")  # as a run does that does not decode
    gc.collect()
    assert encoder() is None
    assert not {"text_encoders", "tokenizers", "vae", "unet"} & set(vars(base))


def test_many_refused_are_listed_in_a_file(tiny_sd, folder, capsys):
    for i in range(encode.NAMED + 1):
        (folder / f"bad{i}.png").write_bytes(b"x%d" % i)
        (folder / f"bad{i}.txt").write_text("x")
    opened(tiny_sd, folder)
    err = capsys.readouterr().err
    assert "bad4.png: not a readable image" in err
    assert "bad5.png" not in err
    told = json.loads(Path(err.strip().rsplit("all of them: ", 1)[1]).read_text())
    assert [name for name, _ in told["refused"]] == [f"bad{i}.png" for i in range(encode.NAMED + 1)]


def test_only_what_is_new_is_encoded(tiny_sd, tiny_sdxl, folder, encoded):
    opened(tiny_sd, folder)
    picture(folder / "0a.png", seed=9)  # between two that are there
    (folder / "0a.txt").write_text("new")
    (folder / "1.txt").write_text("another caption")
    picture(folder / "2.png", seed=10)
    data = opened(tiny_sd, folder)
    assert (encoded.pictures, encoded.captions) == (8, 5)
    assert len(data) == 7
    elsewhere = folder.rename(folder.with_name("moved"))
    opened(tiny_sd, elsewhere)
    assert encoded.pictures == 8
    opened(tiny_sd, elsewhere, resolution_px=128)
    assert encoded.pictures == 8 + 7
    opened(tiny_sd, elsewhere, flip=True)
    assert encoded.pictures == 8 + 7 + 7  # the mirror images
    assert len(opened(tiny_sd, elsewhere)) == 7
    assert encoded.pictures == 8 + 7 + 7
    before = encoded.pictures, encoded.captions
    opened(tiny_sdxl, elsewhere)  # with another text encoder; its VAE has weights of its own, too
    assert encoded.captions > before[1]


def test_a_killed_run_goes_on_after_its_last_file(tiny_sd, folder, encoded, monkeypatch):
    monkeypatch.setattr(encode, "SIZE", 2)
    real = stores.Store.put
    calls = []

    def dies(self, rows, notes=None):
        calls.append(rows)
        if len(calls) == 4:  # the empty caption, then two files of pictures
            raise KeyboardInterrupt
        real(self, rows, notes)

    with monkeypatch.context() as patch:
        patch.setattr(stores.Store, "put", dies)
        with pytest.raises(KeyboardInterrupt):
            opened(tiny_sd, folder)
    assert encoded.pictures == 6
    assert len(opened(tiny_sd, folder)) == 6
    assert encoded.pictures == 8  # two of them again


def test_kill_9_while_encoding_leaves_a_cache_that_is_taken_up(tiny_sd, folder, tmp_path, encoded, monkeypatch):
    """In a process of its own, killed when it has written its first file of pictures."""
    monkeypatch.setattr(encode, "SIZE", 2)
    real, wrote = stores.Store.put, []

    def put(self, rows, notes=None):
        real(self, rows, notes)
        wrote.append(rows)
        if len(wrote) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(stores.Store, "put", put)
        opened(tiny_sd, folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(opened(tiny_sd, folder)) == 6
    assert (encoded.pictures, encoded.captions) == (4, 2)


def test_a_damaged_file_of_the_cache_is_made_again(tiny_sd, folder, encoded, tmp_path, capsys):
    first = opened(tiny_sd, folder)
    (path,) = (tmp_path / "cache").glob("latents-*/*.safetensors")
    wanted = first.moments[:].clone()
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-9])
    again = opened(tiny_sd, folder)
    assert encoded.pictures == 12
    assert torch.equal(again.moments[:], wanted)
    assert "damaged; its contents are made again" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_bad_image_is_named_counted_and_skipped(tiny_sd, folder, capsys):
    (folder / "0.png").write_bytes(b"")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    (folder / "2.png").write_bytes(b"no picture at all")
    (folder / "3.txt").write_text(" \n")
    data = opened(tiny_sd, folder)
    assert sorted(data.names) == ["4.png", "5.png"]
    err = capsys.readouterr().err
    assert "0.png: 0 bytes; skipped" in err
    assert "1.png: not a readable image" in err
    assert "2.png: not a readable image" in err
    assert "3.png: without a caption; skipped" in err
    assert "4 of 6 images skipped: 2 not a readable image, 1 0 bytes, 1 without a caption" in err
    console.reset()
    opened(tiny_sd, folder)  # the second start has nothing to read, and still tells
    assert "4 of 6 images skipped" in capsys.readouterr().err


def test_values_that_are_not_finite_are_found_when_they_are_cached(tiny_sd, folder, monkeypatch, capsys):
    real, states = autoencoder.encode_moments, text.rows

    def broken(vae, pixels, **more):
        found = real(vae, pixels, **more)
        found[2, 0, 0, 0] = float("nan")
        return found

    def overflowing(base, prompts, **more):
        found = states(base, prompts, **more)
        for cond, prompt in zip(found, prompts, strict=True):
            cond.tokens[prompt == "caption 1"] = 1e6  # more than fp16 holds
        return found

    monkeypatch.setattr(autoencoder, "encode_moments", broken)
    monkeypatch.setattr(text, "rows", overflowing)
    data = opened(tiny_sd, folder)
    assert data.names == ["0.png", "4.png"]
    assert data.moments[:].isfinite().all()
    err = capsys.readouterr().err
    assert "2.png: latents not finite; skipped" in err
    assert "3.png: text embedding not finite; skipped" in err
    assert "4 of 6 images skipped: 3 text embedding not finite, 1 latents not finite" in err


def test_captions_from_text_json_and_a_table(tiny_sd, folder, capsys):
    for i, row in enumerate(({"text": "a"}, {"caption": "b"}, {"prompt": ["c", "d"]})):
        (folder / f"{i}.txt").unlink()
        (folder / f"{i}.json").write_text(json.dumps(row))
    rows = [{"file_name": "3.png", "caption": "from the table"}, {"file_name": "gone.png", "text": "x"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = opened(tiny_sd, folder)
    keys = [data.texts.tokens.keys[i] for i in data.captions.flatten()]
    wanted = ["a", "b", "c", "from the table", "caption 0", "caption 1"]
    assert keys == [encode.Captions.key(caption) for caption in wanted]
    assert "gone.png: in metadata.jsonl but not in the folder; skipped" in capsys.readouterr().err
    (folder / "metadata.jsonl").write_text('{"file_name": "3.png", "text": "x"}\n{"file": 1}\n')
    with pytest.raises(InputRefused, match=r"metadata\.jsonl: line 2"):
        opened(tiny_sd, folder)


def test_a_folder_without_captions_tells_how_to_give_them(tiny_sd, folder):
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.raises(UsageError, match=r"6 of 6 images have no caption, the first is 0\.png") as error:
        opened(tiny_sd, folder)
    assert "0.txt" in error.value.hint
    assert "metadata.jsonl" in error.value.hint


def test_all_refused_is_an_error_at_once(tiny_sd, folder, monkeypatch):
    for path in folder.glob("*.png"):
        path.write_bytes(b"x" + path.stem.encode())
    with pytest.raises(InputRefused, match=r"none of 6 images can be used: 6 not a readable image; the first: 0\.png"):
        opened(tiny_sd, folder)
    monkeypatch.setattr(encode, "SIZE", 2)
    monkeypatch.setattr(encode, "HOPELESS", 3)
    with pytest.raises(InputRefused, match="none of 3 images"):  # not all of a long list is tried
        opened(tiny_sd, folder)


def test_copies_of_a_picture_are_encoded_once_and_refused_together(tiny_sd, folder, encoded, capsys):
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "2.png").write_bytes(b"broken")
    (folder / "3.png").write_bytes(b"broken")
    data = opened(tiny_sd, folder)
    assert data.names == ["0.png", "1.png", "4.png", "5.png"]
    assert encoded.pictures == 3
    assert "1 a copy of an image that was skipped" in capsys.readouterr().err


def test_the_size_is_announced_and_a_full_disk_is_told_before_anything_is_encoded(tiny_sd, folder, encoded, monkeypatch, capsys):
    opened(tiny_sd, folder)
    err = capsys.readouterr().err
    assert "6 images of" in err
    assert "MiB in" in err
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000)
    with pytest.raises(DoesNotFit, match="6 encoded images need"):
        opened(tiny_sd, folder, random_crops=1)
    assert encoded.pictures == 6
    assert DoesNotFit.exit_code == 4
    opened(tiny_sd, folder)  # what is there needs no room


def test_a_disk_that_fills_up_is_named(tiny_sd, folder, monkeypatch, tmp_path):
    import safetensors.torch as library

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library, "save_file", full)
    with pytest.raises(DoesNotFit, match="the disk is full") as error:
        opened(tiny_sd, folder)
    assert "cache" in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_max_images(tiny_sd, folder, encoded):
    assert len(opened(tiny_sd, folder, most=4)) == 4
    assert encoded.pictures == 4
    assert len(opened(tiny_sd, folder)) == 6
    with pytest.raises(UsageError, match="`max_images`: has no effect with `data=emoji`"):
        open_data(checkpoint.load("emoji"), "emoji", resolution_px=64, max_images=3, **OPEN)
    with pytest.raises(UsageError, match="`flip`: has no effect with `data=teacher`"):
        opened("emoji", "teacher", flip=True)


# ---- what is cut out of a picture


def test_the_buckets_are_sdxls():
    """Podell 2023, appendix I: height x width."""
    told = """512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344
    768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960 1088x960 1088x896 1152x896
    1152x832 1216x832 1280x768 1344x768 1408x704 1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 1856x512 1920x512
    1984x512 2048x512"""
    large = sizes_near(1024, 8)
    assert set(large) == {tuple(map(int, row.split("x"))) for row in told.split()}
    assert len(large) == 40
    assert all(h % 64 == w % 64 == 0 and 0.9 < h * w / 1024**2 <= 1 for h, w in large)
    small = sizes_near(64, 8)
    assert (64, 64) in small
    assert all(h % 8 == w % 8 == 0 and 0.9 < h * w / 64**2 <= 1 for h, w in small)
    assert (32, 128) in small


def test_pictures_keep_their_shape_in_buckets(tiny_sdxl, tmp_path):
    """Time ids: original size, crop, size of the bucket, height first; a batch is of one size."""
    for i, size in enumerate([(128, 64), (130, 64), (64, 64), (200, 50)]):
        picture(tmp_path / "d" / f"{i}.png", size, seed=i)
        (tmp_path / "d" / f"{i}.txt").write_text("x")
    data = opened(tiny_sdxl, tmp_path / "d", buckets=True)
    assert isinstance(data, Buckets)
    assert len(data) == 4
    shapes = {tuple(group.moments.shape): group.names for group in data.groups}
    assert shapes == {(2, 8, 5, 12): ["0.png", "1.png"], (1, 8, 8, 8): ["2.png"], (1, 8, 4, 16): ["3.png"]}
    ids = {name: row.tolist() for group in data.groups for name, row in zip(group.names, group.time_ids, strict=True)}
    assert ids["0.png"] == [64, 128, 4, 0, 40, 96]  # resized to 48 x 96
    assert ids["1.png"] == [64, 130, 3, 0, 40, 96]
    assert ids["2.png"] == [64, 64, 0, 0, 64, 64]
    assert ids["3.png"] == [50, 200, 0, 0, 32, 128]
    seen = []
    for step in range(400):
        batch = data.batch(3, torch.Generator().manual_seed(step), torch.Generator().manual_seed(10_000 + step))
        h, w = batch.latents.shape[-2:]
        assert (batch.cond.time_ids[:, 4:] == torch.tensor([8.0 * h, 8.0 * w])).all()
        seen.append((h, w))
    assert seen.count((5, 12)) / 400 == pytest.approx(0.5, abs=0.07)  # in proportion to its pictures
    assert seen.count((8, 8)) / 400 == pytest.approx(0.25, abs=0.07)
    other = [tuple(data.batch(3, torch.Generator().manual_seed(900 + s), torch.Generator().manual_seed(10_000 + s)).latents.shape)
             for s in range(40)]  # fmt: skip
    assert [shape[-2:] for shape in other] == seen[:40]  # another process, with noise of its own, draws the same sizes
    rest, kept = data.split(1)
    assert (len(rest), len(kept)) == (3, 1)


def test_mirror_images_and_random_crops(tiny_sdxl, tmp_path):
    image = torch.zeros(64, 128, 3, dtype=torch.uint8)
    image[:, :, 0] = torch.arange(128) * 2  # dark left, bright right
    framing = Framing(64, random_crops=2, flip=True)
    cuts = framing.cut(Image.fromarray(image.numpy()), "digest")
    assert [size[:2] + size[4:] for _, size in cuts] == [[64, 128, 64, 64]] * 4
    for (plain, a), (mirrored, b) in zip(cuts[::2], cuts[1::2], strict=True):
        assert torch.equal(plain.flip(-1), mirrored)
        assert a[3] + b[3] == 64  # measured from the left of what is seen
        assert plain[0, 0, 0] == 2 * a[3]
    assert cuts[0][1][3] != cuts[2][1][3]
    assert cuts[0][1] == framing.cut(Image.fromarray(image.numpy()), "digest")[0][1]
    assert cuts[0][1] != framing.cut(Image.fromarray(image.numpy()), "other")[0][1]
    picture(tmp_path / "d" / "a.png", (128, 64))
    picture(tmp_path / "d" / "b.png", (96, 64), seed=2)
    for name in "ab":
        (tmp_path / "d" / f"{name}.txt").write_text("x")
    data = opened(tiny_sdxl, tmp_path / "d", random_crops=2, flip=True)
    assert data.names == ["a.png"] * 4 + ["b.png"] * 4
    rest, kept = data.split(1)
    assert (rest.names, kept.names) == (["a.png"] * 4, ["b.png"] * 4)  # no picture on both sides


def test_what_is_no_picture_is_told():
    for data in (b"", b"x", b"\x89PNG\r\n\x1a\n" + b"\0" * 40):
        with pytest.raises(Refused):
            decode(data)


# ---- many processes


def together(processes, work):
    """Run work(rank) in as many processes (gloo); all must end well."""
    from accelerate.state import PartialState

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            code = 1
            try:
                PartialState._reset_state()
                places = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {k: str(v) for k, v in places.items()}
                os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)} | work.places(rank)
                PartialState(cpu=True)
                work(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * processes


class Work:
    """Open a folder and note what this process encoded and what it got."""

    def __init__(self, base, folder, out, encoded, apart):
        self.base, self.folder, self.out, self.encoded, self.apart = base, folder, out, encoded, apart

    def places(self, rank):
        """Of machines of one process each that do not see each other's files."""
        own = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "FASTDIFF_CACHE": str(self.out / f"cache{rank}")}
        return own if self.apart else {}

    def __call__(self, rank):
        data = opened(self.base, self.folder)
        torch.save((self.encoded.pictures, data.names, data.moments[:]), self.out / f"{rank}.pt")


@pytest.mark.parametrize("apart", [False, True])
def test_every_process_encodes_its_share_and_sees_all(tiny_sd, folder, tmp_path, encoded, apart):
    (folder / "3.png").write_bytes(b"broken")
    together(2, Work(tiny_sd, folder, tmp_path, encoded, apart))
    (n0, names, moments), (n1, others, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert names == others == ["0.png", "1.png", "2.png", "4.png", "5.png"]
    assert torch.equal(moments, same)
    assert (n0, n1) == (5, 5) if apart else (n0 + n1 == 5 and 0 < n0 < 5)


# ---- a whole run


def test_a_run_on_buckets_starts_again_without_encoding(tiny_sdxl, tmp_path, encoded, fastdiff, monkeypatch):
    for i, size in enumerate([(128, 64), (64, 64), (64, 128)]):
        picture(tmp_path / "d" / f"{i}.png", size, seed=i)
        (tmp_path / "d" / f"{i}.txt").write_text("x")
    picture(tmp_path / "d" / "z.png", seed=9)
    given = ["--base", tiny_sdxl, "--data", "d", "--buckets", "--flip", "--resolution", 64, "--steps", 3, "--batch-size", 2]
    given += ["--lora-rank", 2, "--no-gradient-checkpointing", "--grad-accum", 1]
    code, told = fastdiff("train-lcm-lora", *given, "-o", "a")
    assert code == 0, told
    assert any("1 of 4 images skipped: 1 without a caption" in line for line in told["warnings"])
    assert encoded.pictures == 6
    spies = []
    monkeypatch.setattr(autoencoder, "encode_moments", lambda *a, **k: spies.append(a))
    code, _ = fastdiff("train-lcm-lora", *given, "-o", "b")
    assert code == 0
    assert not spies
    losses = [[json.loads(line)["loss"] for line in Path(o, "metrics.jsonl").read_text().splitlines()] for o in "ab"]
    assert losses[0] == losses[1]


def test_the_teachers_samples_serve_another_method(tiny_sd, tmp_path, monkeypatch):
    from fastdiff.data import teacher
    from fastdiff.methods import dmd, lcm, lightning
    from fastdiff.training.scene import Scene
    from fastdiff.training.session import data_of

    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    sampled, real = [], teacher.Sampler.latents
    monkeypatch.setattr(teacher.Sampler, "latents", lambda self, *a: (sampled.append(a[2]), real(self, *a))[1])
    given = dict(base=str(tiny_sd), data="teacher", prompts=str(tmp_path / "prompts.txt"), pairs=3, teacher_steps=2)
    found = []
    for method in (lcm.LCM, dmd.DMD, lightning.Lightning):
        config = method.Config(**given, teacher_guidance=3.0)
        scene = Scene.of(config, checkpoint.load(str(tiny_sd)), torch.device("cpu"))
        found.append(data_of(scene, config, method.needs(config), []))
    assert sampled == [[rng.PAIRS(i) for i in range(3)]]
    assert all(torch.equal(found[0].moments, other.moments) for other in found[1:])
