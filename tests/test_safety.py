"""Files that are damaged or hostile: one line, exit 3, nothing run, nothing written."""

import io
import json
import os
import pickle
import random
import struct
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastdiff import cli, lora
from fastdiff.checkpoints import tensors
from fastdiff.runtime.errors import InputRefused, UsageError

KEY = "lora_unet_mid_block_resnets_0_conv1"


def good(folder):
    made = torch.Generator().manual_seed(0)
    found = {}
    for key in (KEY, KEY.replace("conv1", "conv2")):
        found[f"{key}.lora_down.weight"] = torch.randn(4, 8, 3, 3, generator=made)
        found[f"{key}.lora_up.weight"] = torch.randn(8, 4, 1, 1, generator=made)
        found[f"{key}.alpha"] = torch.tensor(4.0)
    save_file(found, folder / "good.safetensors", {"fastdiff.family": "sd15", "fastdiff.num_steps": "4"})
    return (folder / "good.safetensors").read_bytes()


def parts(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def packed(header, body, pad=b""):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + body + pad


def edited(data, change):
    header, body = parts(data)
    change(header)
    return packed(header, body)


def malformed(data):
    """The shapes of damage that the safetensors library knows, and those that it lets pass."""
    header, body = parts(data)
    name = next(k for k in header if k.endswith("lora_down.weight"))
    entry = json.dumps(header[name])
    text = json.dumps(header)
    put = lambda **changes: edited(data, lambda h: h[name].update(changes))
    yield "truncated data", data[:-5]
    yield "trailing bytes", data + b"more"
    yield "truncated header", data[:60]
    yield "header longer than the file", struct.pack("<Q", len(data) * 2) + data[8:]
    yield "less than 8 bytes", data[:5]
    yield "empty", b""
    yield "length 2^63", struct.pack("<Q", 2**63) + data[8:]
    yield "length 200 MB", struct.pack("<Q", 200_000_000) + data[8:]
    yield "bad JSON", packed(text[:-1], body)
    yield "bad UTF-8", struct.pack("<Q", 4) + b'{"\xff}' + body
    yield "overlap", put(data_offsets=[1, header[name]["data_offsets"][1]])
    yield "begin after end", put(data_offsets=header[name]["data_offsets"][::-1])
    yield "size is not the shape's", put(shape=[4, 8, 3, 2])
    yield "overflow", put(shape=[2**40, 2**40, 3, 3])
    yield "negative", put(shape=[-4, 8, 3, 3])
    yield "unknown dtype", put(dtype="Q4")
    yield "number in the metadata", edited(data, lambda h: h.update(__metadata__={"a": 1}))
    yield "nested metadata", edited(data, lambda h: h.update(__metadata__={"a": {"b": "c"}}))
    yield "a name twice", packed(text[:-1] + f', "{name}": {entry}}}', body)
    renamed = lambda new: edited(data, lambda h: h.update({new: h.pop(name)}))
    yield "a path as a name", renamed("../../etc/passwd.lora_down.weight")
    yield "an absolute path", renamed("/etc/passwd")
    yield "zip", b"PK\x03\x04" + data
    yield "html", b"<!DOCTYPE html><html>" + data
    yield "lfs", b"version https://git-lfs.github.com/spec/v1\n"
    yield "gguf", b"GGUF\x03\x00\x00\x00" + data
    yield "zero size", edited(data, lambda h: h[name].update(shape=[0, 8, 3, 3], data_offsets=[0, 0]))
    start, end = header[name]["data_offsets"]
    yield "NaN", packed(text, body[:start] + np.full((end - start) // 4, np.nan, np.float32).tobytes() + body[end:])
    yield "integers", put(dtype="I32")


def test_every_known_damage_is_one_line_and_exit_3(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = good(tmp_path)
    for what, content in malformed(data):
        (tmp_path / "x.safetensors").write_bytes(content)
        flags = ["--accel", "good.safetensors", "--style", "x.safetensors", "-o", "out.safetensors"]
        assert cli.main(["merge-lora", *flags]) == 3, what
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1, (what, lines)
        assert lines[0].startswith("error: x.safetensors"), (what, lines)
        assert cli.main(["inspect", "x.safetensors", "--json"]) in {0, 3}, what
        out = capfd.readouterr().out
        assert json.loads(out)["command"] == "inspect"
        assert not (tmp_path / "out.safetensors").exists()


def mutations(data, count, seed=0):
    """Bit flips, truncations, insertions, and edits of the header's text, from one seed."""
    made = random.Random(seed)
    header, body = parts(data)
    text = json.dumps(header)
    size = len(data) - len(body)
    for i in range(count):
        kind = i % 5
        changed = bytearray(data)
        if kind == 0:  # a flip in the header or its length
            place = made.randrange(size)
            changed[place] ^= 1 << made.randrange(8)
        elif kind == 1:  # several flips anywhere
            for _ in range(made.randint(1, 8)):
                changed[made.randrange(len(data))] ^= 1 << made.randrange(8)
        elif kind == 2:
            changed = changed[: made.randrange(len(data))]
        elif kind == 3:
            place = made.randrange(len(data))
            changed[place:place] = made.randbytes(made.randint(1, 16))
        else:  # one figure or letter of the header, its length kept right
            place = made.randrange(1, len(text) - 1)
            new = made.choice('0123456789[]{},":-abcdefF.')
            changed = bytearray(packed(text[:place] + new + text[place + made.randint(0, 1) :], body))
        yield bytes(changed)


def attempt(path):
    try:
        return lora.load(path), None
    except UsageError as error:
        return None, error


def test_two_thousand_mutations_never_crash_hang_or_lose_a_tensor(tmp_path):
    """Either refused with one of our own one-line errors, or read whole, as many tensors as before."""
    data = good(tmp_path)
    whole = tensors.open_file(tmp_path / "good.safetensors")
    path, outcomes, slowest = tmp_path / "x.safetensors", {"refused": 0, "read": 0}, 0.0
    for content in mutations(data, 2000):
        path.write_bytes(content)
        start = time.perf_counter()
        read, error = attempt(path)
        if error:
            assert "\n" not in str(error)
            assert str(path) in str(error)
            assert error.exit_code == 3
            outcomes["refused"] += 1
        else:
            assert len(tensors.open_file(path)) == len(whole)
            assert len(read.modules) == 2
            assert all(u.delta().isfinite().all() for u in read.modules.values())
            outcomes["read"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 1.0
    assert outcomes["refused"] > 1000
    print(outcomes, f"slowest {slowest * 1000:.0f} ms")


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("allowed", [True, False])
def test_a_malicious_pickle_does_not_run(tmp_path, capfd, new_format, allowed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "ran"
    torch.save({"a": torch.ones(2), "b": Evil(mark)}, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=new_format)
    more = ["--allow-pickle"] if allowed else []
    for command in (
        ["sample", "--base", "evil.ckpt", "--prompt", "x"],
        ["merge-lora", "--accel", "evil.ckpt", "--style", "evil.ckpt"],
    ):
        assert cli.main([*command, *more]) == 3
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert "pickle" in lines[0]
    assert cli.main(["inspect", "evil.ckpt", "--json"]) == 3
    told = json.loads(capfd.readouterr().out)
    assert told["metrics"]["safe"] is False
    if new_format:
        assert told["metrics"]["would_run"] == ["posix.system"]
        with pytest.raises(InputRefused, match=r"wants to run posix\.system"):
            tensors.open_file("evil.ckpt", allow_pickle=True)
    assert not mark.exists()
    with (tmp_path / "evil.ckpt").open("rb") as file:  # the file is a real one: an unguarded load would have run it
        if not new_format:
            pickle.load(file)  # magic
            pickle.load(file)  # version
            pickle.load(file)  # system
        else:
            import zipfile

            archive = zipfile.ZipFile(file)
            inside = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            file = io.BytesIO(archive.read(inside))

        class Open(pickle.Unpickler):
            def persistent_load(self, pid):
                return None

            def find_class(self, module, name):
                return (lambda *a, **k: None) if module.startswith("torch") else super().find_class(module, name)

        Open(file).load()
    assert mark.exists()


def test_pickles_of_more_than_tensors_are_refused_by_name(tmp_path):
    import datetime

    torch.save({"a": torch.ones(2), "when": datetime.date(2020, 1, 1)}, tmp_path / "x.pt")
    with pytest.raises(InputRefused, match=r"wants to run datetime\.date"):
        tensors.open_file(tmp_path / "x.pt", allow_pickle=True)
    torch.save({"epoch": 3}, tmp_path / "y.pt")
    with pytest.raises(InputRefused, match="a pickle without tensors"):
        tensors.open_file(tmp_path / "y.pt", allow_pickle=True)
    whole = tmp_path / "z.pt"
    torch.save({"a": torch.ones(2000)}, whole)
    whole.write_bytes(whole.read_bytes()[:-900])
    with pytest.raises(InputRefused, match="a corrupt pickle"):
        tensors.open_file(whole, allow_pickle=True)
    torch.save({"state_dict": {"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.half)}, "epoch": 1}, whole)
    read = tensors.open_file(whole, allow_pickle=True)
    assert read.shapes == {"a": (2,), "b": (3,)}
    assert torch.equal(read["a"], torch.ones(2))


def test_a_file_is_read_tensor_by_tensor_and_written_so(tmp_path):
    """Round trip of every dtype, empty and scalar tensors; the library reads what we write."""
    from safetensors.torch import load_file

    made = {f"t{i}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(tensors.CODES)}
    made |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.0)}
    digests = tensors.write(tmp_path / "x.safetensors", tensors.entries(made), {"b": "2", "a": "1"})
    tensors.verify(tmp_path / "x.safetensors", digests)
    for read in (tensors.open_file(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")):
        assert set(read) == set(made)
        for name, tensor in made.items():
            assert read[name].dtype == tensor.dtype
            assert read[name].shape == tensor.shape
            assert torch.equal(read[name].double(), tensor.double())
    assert tensors.open_file(tmp_path / "x.safetensors").metadata == {"a": "1", "b": "2"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
