"""Checkpoints of Lightning's time: pickles with callbacks, numpy's numbers and paths beside the weights. Nothing in them runs."""

import collections
import json
import os
import pathlib
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastdiff import cli
from fastdiff.checkpoints import checkpoint, tensors, write
from fastdiff.runtime.errors import InputRefused

LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"


@contextmanager
def pretended(module, **classes):
    """Classes of a library that is not installed, as long as a file is written; they note where they are ever made again."""
    names = [module.rsplit(".", i)[0] for i in range(module.count(".") + 1)]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    for name, cls in classes.items():
        cls.__module__, cls.__qualname__ = module, name
        setattr(sys.modules[module], name, cls)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class AttributeDict(dict): ...


class ModelCheckpoint:
    def __init__(self):
        self.best_model_score, self.dirpath = torch.tensor(0.5), pathlib.PurePosixPath("/logs")


def lightning(state, path, *, new_format=True, **more):
    """A checkpoint as pytorch-lightning 1.x wrote it; the callback's class is a key, as there."""
    with pretended(LIGHTNING, ModelCheckpoint=ModelCheckpoint, AttributeDict=AttributeDict):
        counts = collections.defaultdict(list, {"a": [1]})
        content = {
            "epoch": 3,
            "global_step": np.int64(470000),
            "loss": np.float64(0.25),
            "history": np.arange(3.0),
            "recent": collections.deque([1, 2]),
            "pytorch-lightning_version": "1.4.2",
            "callbacks": {ModelCheckpoint: {"best": ModelCheckpoint(), "score": torch.tensor(1.0)}},
            "hyper_parameters": AttributeDict(lr=1e-4, counts=counts),
            "state_dict": state,
            **more,
        }
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
    assert LIGHTNING not in sys.modules
    return path


@pytest.fixture(scope="module")
def state(tiny_sd, tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "one.safetensors"
    write.to_file(checkpoint.load(str(tiny_sd)), path)
    return load_file(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_checkpoint_of_lightning_is_read(state, tiny_sd, tmp_path, new_format):
    path = lightning(state, tmp_path / "model.ckpt", new_format=new_format)
    base = checkpoint.load(str(path), config=str(tiny_sd), allow_pickle=True)
    whole = checkpoint.load(str(tiny_sd))
    for part in base.parts:
        a, b = base.weights(part), whole.weights(part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert LIGHTNING not in sys.modules  # nothing of the name was imported
    with pytest.raises(InputRefused, match="a pickle"):
        checkpoint.load(str(path), config=str(tiny_sd))


class Runs:
    """Calls a function of an allowed or a forbidden name when it is unpickled."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, __import__], ids=lambda f: f.__name__)
def test_what_runs_code_stays_refused_by_name(state, tmp_path, function, new_format):
    mark = tmp_path / "ran"
    calls = {
        os.system: (f"touch {mark}",), __import__: ("antigravity",), getattr: (os, "system"),
        eval: (f"open({str(mark)!r}, 'w')",), exec: (f"open({str(mark)!r}, 'w')",),
    }  # fmt: skip
    arguments = calls[function] if function is not getattr else ("x", "upper")
    path = lightning(state, tmp_path / "evil.ckpt", new_format=new_format, evil=Runs(function, *arguments))
    with pytest.raises(InputRefused, match=f"wants to run (posix|builtins).{function.__name__}"):
        tensors.open_file(path, allow_pickle=True)
    assert not mark.exists()
    assert "antigravity" not in sys.modules


def test_an_allowed_name_with_evil_arguments_runs_nothing(state, tiny_sd, tmp_path):
    """The class that a file names as a callback is one that would run something, were it the real one."""
    mark = tmp_path / "ran"

    class EarlyStopping:
        def __new__(cls, *args):
            mark.write_text("made")
            return super().__new__(cls)

        def __setstate__(self, state):
            mark.write_text("filled")

        def __reduce__(self):
            return EarlyStopping, (f"touch {mark}", "__import__('os')"), {"function": "os.system", "__class__": "x"}

    with pretended("lightning.pytorch.callbacks", EarlyStopping=EarlyStopping):
        made = object.__new__(EarlyStopping)
        torch.save({"state_dict": state, "callbacks": made, "path": pathlib.PurePosixPath("/etc/passwd")}, tmp_path / "x.ckpt")
        assert not mark.exists()
        base = checkpoint.load(str(tmp_path / "x.ckpt"), config=str(tiny_sd), allow_pickle=True)  # while the real one is there
        assert len(base.weights("unet")) > 100
        assert not mark.exists()
        with (tmp_path / "x.ckpt").open("rb") as file:  # an unguarded load would have run it
            torch.load(file, weights_only=False)
        assert mark.exists()


def test_what_a_pickle_is_is_inspected_without_running_it(tmp_path, capfd):
    def told(path):
        capfd.readouterr()
        assert cli.main(["inspect", str(path), "--json"]) == 3  # a pickle is not safe by itself
        return json.loads(capfd.readouterr().out)

    emoji = tmp_path / "emoji.safetensors"
    write.to_file(checkpoint.load("emoji"), emoji)
    for new_format in (True, False):
        found = told(lightning(load_file(emoji), tmp_path / "model.ckpt", new_format=new_format))
        metrics = found["metrics"]
        assert (metrics["kind"], metrics["content"], metrics["family"]) == ("pickle", "checkpoint", "emoji")
        assert (metrics["safe"], metrics["safe_with_allow_pickle"], metrics["supported"]) == (False, True, True)
        assert f"{LIGHTNING}.ModelCheckpoint" in metrics["leftovers"]
        assert metrics["would_run"] == []
        assert "--allow-pickle" in found["error"]["hint"]
        path = lightning(load_file(emoji), tmp_path / "evil.ckpt", new_format=new_format, evil=Runs(os.system, "true"))
        metrics = told(path)["metrics"]
        assert (metrics["safe_with_allow_pickle"], metrics["supported"], metrics["would_run"]) == (False, False, ["posix.system"])
    torch.save({"state_dict": {"weight": torch.ones(2)}}, tmp_path / "else.pt")
    metrics = told(tmp_path / "else.pt")["metrics"]
    assert (metrics["safe_with_allow_pickle"], metrics["supported"]) == (True, False)
    assert "not a Stable Diffusion checkpoint" in metrics["why_not"]


def test_a_pickle_under_another_name_and_protocol(state, tiny_sd, tmp_path):
    torch.save(state, tmp_path / "renamed.safetensors")  # torch.load itself goes by the name
    base = checkpoint.load(str(tmp_path / "renamed.safetensors"), config=str(tiny_sd), allow_pickle=True)
    assert len(base.weights("vae")) > 100
    torch.save({"a": torch.ones(2), "evil": Runs(os.system, "true")}, tmp_path / "four.pt", pickle_protocol=4)
    with pytest.raises(InputRefused, match=r"wants to run posix\.system"):
        tensors.open_file(tmp_path / "four.pt", allow_pickle=True)
