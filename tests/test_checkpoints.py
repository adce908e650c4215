"""What checkpoint files are: told by keys, shapes and headers alone; configs and vocabulary are with us; no network."""

import gzip
import json
import os
import socket

import pytest
import torch
from conftest import build
from safetensors.torch import load_file, save_file

from fastdiff import cli
from fastdiff.checkpoints import checkpoint, detect, folders, locate, single_file, tokens, write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.checkpoints.locate import ASSETS
from fastdiff.checkpoints.tensors import Layout, TensorFile
from fastdiff.runtime.errors import InputRefused, UsageError

UNET = "model.diffusion_model."
CROSS = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
SIZES = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}
WIDTHS = {"sd15": 768, "sd21": 1024, "sdxl": 2048}


def header(tmp_path, shapes, metadata=None, values=None):
    """A file as its header alone tells it."""
    layouts = {name: Layout(torch.float16, tuple(shape), 0, 0) for name, shape in shapes.items()}
    return TensorFile(tmp_path / "model.safetensors", layouts, metadata or {}, values or {})


def like(name, **changes):
    """The few keys that tell a family."""
    shapes = {
        f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{UNET}out.2.weight": (4, 320, 3, 3),
        CROSS: (320, WIDTHS[name]),
    }
    if name == "sdxl":
        shapes[f"{UNET}label_emb.0.0.weight"] = (1280, 2816)
    return shapes | changes


@pytest.mark.parametrize("name", SIZES)
def test_shipped_configs_make_the_published_networks(name):
    """Parameter counts of the published UNets, and of the encoders and VAE, on the meta device."""
    base = Checkpoint(name, FAMILIES[name].home, FAMILIES[name])
    unet = base.skeleton("unet")
    assert sum(p.numel() for p in unet.parameters()) == SIZES[name]
    assert all(p.is_meta for p in unet.parameters())
    assert sum(p.numel() for p in base.skeleton("vae").parameters()) == 83_653_863
    counts = {"sd15": [123_060_480], "sd21": [340_387_840], "sdxl": [123_060_480, 694_659_840]}[name]
    assert [sum(p.numel() for p in base.skeleton(part).parameters()) for part in base.text_parts] == counts
    assert base.resolution_px == {"sd15": 512, "sd21": 768, "sdxl": 1024}[name]
    slots = base.slots("unet", base.shapes("unet"))
    assert len({slot.name for slot in slots}) == len(slots) == {"sd15": 686, "sd21": 686, "sdxl": 1680}[name]


def test_the_table_of_shapes_is_that_of_the_networks():
    """`FASTDIFF_SHAPES=write pytest -k table_of_shapes` writes it anew."""
    found = {}
    for name in SIZES:
        base = Checkpoint(name, FAMILIES[name].home, FAMILIES[name])
        found[name] = {part: built(base, part) for part in base.parts}
    path = ASSETS / "families" / "shapes.json.gz"
    if os.environ.get("FASTDIFF_SHAPES") == "write":
        path.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))
    locate.shape_tables.cache_clear()
    assert locate.shape_tables() == found


def built(base, part):
    """Shapes of the network itself."""
    return {folders.plain_name(part, k): tuple(v.shape) for k, v in base.skeleton(part).state_dict().items()}


def test_the_shipped_vocabulary_is_clips():
    vocab, merges = tokens.clip_vocabulary()
    assert (len(vocab), len(merges)) == (49_408, 48_894)
    assert (vocab["<|startoftext|>"], vocab["<|endoftext|>"], vocab["a</w>"]) == (49_406, 49_407, 320)
    one, two = Checkpoint("sdxl", FAMILIES["sdxl"].home, FAMILIES["sdxl"]).tokenizers
    # As OpenAI's tokenizer numbers it.
    assert one("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert one("a", padding="max_length", max_length=5).input_ids == [49406, 320, 49407, 49407, 49407]
    assert two("a", padding="max_length", max_length=5).input_ids == [49406, 320, 49407, 0, 0]  # padded with "!"
    assert one.model_max_length == 77
    assert len(gzip.decompress((ASSETS / "clip" / "merges.txt.gz").read_bytes())) > 500_000
    assert "OpenAI" in (ASSETS / "clip" / "NOTICE").read_text()


@pytest.mark.parametrize("name", SIZES)
def test_families_by_shape(tmp_path, name):
    found = detect.detect(header(tmp_path, like(name)))
    assert found.family is FAMILIES[name]
    assert found.prediction_type == ("v_prediction" if name == "sd21" else "epsilon")
    assert not found.certain


def test_prediction_type_is_what_the_file_says(tmp_path):
    says = lambda name, metadata=None, **keys: detect.detect(header(tmp_path, like(name, **keys), metadata))
    xl = says("sdxl", v_pred=(0,), ztsnr=(0,))
    assert (xl.prediction_type, xl.zero_snr, xl.certain, xl.why) == ("v_prediction", True, True, "its key v_pred")
    assert says("sdxl", {"modelspec.prediction_type": "v"}).prediction_type == "v_prediction"
    assert says("sd15", {"modelspec.prediction_type": "epsilon"}).certain
    assert says("sd21", {"modelspec.architecture": "stable-diffusion-v2-512"}).prediction_type == "epsilon"
    assert says("sd21", {"modelspec.architecture": "stable-diffusion-v2-768-v"}).certain
    (tmp_path / "model.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    told = says("sd15", {"modelspec.prediction_type": "epsilon"})
    assert (told.prediction_type, told.why) == ("v_prediction", "the yaml beside it")


@pytest.mark.parametrize(("spread", "kind"), [(0.2, "v_prediction"), (0.05, "epsilon")])
def test_sd2_that_says_nothing_is_told_by_a_bias(tmp_path, spread, kind):
    key = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    bias = torch.randn(320, generator=torch.Generator().manual_seed(0)) * spread
    found = detect.detect(header(tmp_path, like("sd21", **{key: (320,)}), values={key: bias}))
    assert (found.prediction_type, found.certain) == (kind, False)


NOT_OURS = {
    "an inpainting checkpoint": like("sd15", **{f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3)}),
    "an InstructPix2Pix checkpoint": like("sd15", **{f"{UNET}input_blocks.0.0.weight": (320, 8, 3, 3)}),
    "a depth-to-image checkpoint": like("sd21", **{f"{UNET}input_blocks.0.0.weight": (320, 5, 3, 3)}),
    "an SDXL refiner": like("sdxl", **{CROSS: (768, 1280)}),
    "an unCLIP checkpoint": like("sd21", **{f"{UNET}label_emb.0.0.weight": (1280, 2048)}),
    "an EDM checkpoint": like("sdxl", edm_mean=(4,)),
    r"an EDM checkpoint \(Playground v2.5, CosXL\) \(edm_vpred": like("sdxl", **{"edm_vpred.sigma_max": ()}),
    "a Stable Diffusion 3 checkpoint": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (1, 1)},
    "a Flux checkpoint": {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (1, 1)},
    "a diffusion transformer": {"x_embedder.proj.weight": (1, 1)},
    "a video or motion model": {"down_blocks.0.motion_modules.0.weight": (1, 1)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "a LoRA, not a base model": {"lora_unet_x.lora_down.weight": (4, 4)},
    "a textual inversion embedding": {"emb_params": (4, 768)},
    "a UNet alone with diffusers' names": {"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)},
    "averaged weights alone": {"model_ema.diffusion_modelinput_blocks00weight": (320, 4, 3, 3)},
    "a VAE alone": {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)},
    "a text encoder alone": {"text_model.final_layer_norm.weight": (768,)},
    "not a Stable Diffusion checkpoint": {"weight": (1,)},
    "cross-attention of width 999": like("sd15", **{CROSS: (320, 999)}),
    "4 output channels|8 output channels": like("sd15", **{f"{UNET}out.2.weight": (8, 320, 3, 3)}),
}


@pytest.mark.parametrize("told", NOT_OURS)
def test_what_we_do_not_read_is_refused_by_name(tmp_path, told):
    with pytest.raises(InputRefused, match=told) as caught:
        detect.detect(header(tmp_path, NOT_OURS[told]))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_flow_checkpoint_is_refused_by_its_header(tmp_path):
    with pytest.raises(InputRefused, match="a flow checkpoint"):
        detect.detect(header(tmp_path, like("sdxl"), {"modelspec.prediction_type": "flow"}))


def shapes_of(config):
    """LDM shapes of a UNet config."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        net = UNet2DConditionModel(**config)
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    return {slot.name: shapes[slot.parts[0]] for slot in single_file.slots(FAMILIES["sd15"], "unet", {**net.config}, shapes)}, net


SMALLER = {
    "full": {},
    "bk-base": dict(layers_per_block=1),
    "bk-small": dict(layers_per_block=1, mid_block_type=None),
    "bk-tiny": dict(
        layers_per_block=1,
        mid_block_type=None,
        block_out_channels=[320, 640, 1280],
        down_block_types=["CrossAttnDownBlock2D"] * 3,
        up_block_types=["CrossAttnUpBlock2D"] * 3,
    ),
}


@pytest.mark.parametrize("kind", SMALLER)
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_the_blocks_of_a_pruned_file_are_read_off_its_keys(tmp_path, name, kind):
    config = json.loads((ASSETS / "families" / name / "unet" / "config.json").read_text())
    smaller = {**config, **SMALLER[kind]}
    if isinstance(config["attention_head_dim"], list):
        smaller["attention_head_dim"] = [width // 64 for width in smaller["block_out_channels"]]
    smaller.pop("_class_name")
    shapes, net = shapes_of(smaller)
    found = detect.infer_unet(header(tmp_path, shapes), config)
    found.pop("_class_name")
    assert found == smaller
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        again = UNet2DConditionModel(**found)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_the_depths_of_sdxl_are_read_off_its_keys(tmp_path):
    config = json.loads((ASSETS / "families" / "sdxl" / "unet" / "config.json").read_text())
    config.pop("_class_name")
    for depths in ([1, 2, 10], [1, 1, 2]):  # SDXL; Vega's depths
        shapes, _ = shapes_of({**config, "transformer_layers_per_block": depths})
        assert detect.infer_unet(header(tmp_path, shapes), config)["transformer_layers_per_block"] == depths
    gone = {k: v for k, v in shapes.items() if "output_blocks.2.1.transformer_blocks.1." not in k}
    with pytest.raises(InputRefused, match="differ within a level") as caught:
        detect.infer_unet(header(tmp_path, gone), config)
    assert "`base_config=FOLDER`" in caught.value.hint


@pytest.mark.parametrize("layout", ["bk-base", "bk-small", "ssd-1b", "vega", "koala-1b", "koala-700m"])
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_the_blocks_of_every_layout_are_read_off_its_keys(tmp_path, name, layout):
    from fastdiff.models import unet

    if not unet.LAYOUTS[layout].fits(FAMILIES[name]):
        layout = {"ssd-1b": "bk-tiny", "vega": "sdxs-512", "koala-1b": "sdxs-512-xattn"}.get(layout, "bk-base")
    config = locate.stock_config(FAMILIES[name])
    smaller = unet.student_config(config, layout, FAMILIES[name])
    shapes, _ = shapes_of({k: v for k, v in smaller.items() if k != "_class_name"})
    found = unet.unet_of(detect.infer_unet(header(tmp_path, shapes), config))
    assert unet.shapes_of(found) == unet.shapes_of(unet.unet_of(smaller))
    assert write.known_elsewhere(FAMILIES[name], smaller) == (
        (name, layout) not in {("sdxl", "bk-base"), ("sdxl", "bk-small")}
    ) & (layout != "sdxs-512-xattn")


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    home = tmp_path_factory.mktemp("one")
    folder = build(home / "sd", "sd15", "epsilon")
    write.to_file(checkpoint.load(str(folder)), home / "one.safetensors")
    return home / "one.safetensors", folder


def changed(one_file, tmp_path, change):
    tensors = load_file(one_file[0])
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    return checkpoint.load(str(tmp_path / "x.safetensors"), config=str(one_file[1]))


def test_missing_and_left_over_layers_are_named(one_file, tmp_path):
    key = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    base = changed(one_file, tmp_path, lambda t: t.pop(key))
    with pytest.raises(InputRefused, match=rf"text_encoder: 1 layers are missing: {key}"):  # diffusers keeps it on meta
        _ = base.text_encoders
    extra = f"{UNET}input_blocks.99.0.weight"
    base = changed(one_file, tmp_path, lambda t: t.update({extra: torch.ones(1)}))
    with pytest.raises(InputRefused, match=rf"unet: 1 layers have no place in the model: {extra}"):
        _ = base.unet
    base = changed(one_file, tmp_path, lambda t: t[f"{UNET}out.2.bias"].fill_(float("nan")))
    with pytest.raises(InputRefused, match=r"unet has NaN or infinite values \(conv_out\.bias\)"):
        _ = base.unet
    base = changed(one_file, tmp_path, lambda t: t.update({f"{UNET}out.2.bias": torch.ones(4, dtype=torch.int32)}))
    with pytest.raises(InputRefused, match="not floating point"):
        _ = base.unet
    base = changed(one_file, tmp_path, lambda t: t.update({f"{UNET}out.2.bias": torch.ones(5)}))
    with pytest.raises(InputRefused, match=r"out\.2\.bias is \(5,\), the model has \(4,\)"):
        _ = base.unet


def test_a_file_without_a_vae_takes_the_folders(one_file, tmp_path, capsys):
    def drop(tensors):
        for key in [k for k in tensors if k.startswith("first_stage_model.")]:
            del tensors[key]

    base = changed(one_file, tmp_path, drop)
    whole = checkpoint.load(str(one_file[1]))
    assert all(torch.equal(v, whole.vae.state_dict()[k]) for k, v in base.vae.state_dict().items())
    assert "has no vae; taken from" in capsys.readouterr().err
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(one_file[1], bare)
    for path in bare.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(InputRefused, match=r"has no vae \(first_stage_model\.\*\)"):
        _ = checkpoint.load(str(tmp_path / "x.safetensors"), config=str(bare)).vae


def test_extra_tensors_of_training_do_no_harm(one_file, tmp_path):
    extras = {
        "model_ema.decay": torch.ones(1),
        "alphas_cumprod": torch.ones(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(12)[None],
        "cond_stage_model.logit_scale": torch.ones(()),
    }
    base = changed(one_file, tmp_path, lambda t: t.update(extras))
    assert len(list(base.unet.parameters())) > 100
    assert len(base.text_encoders) == 1


def test_folders_of_other_times_are_read(one_file, tmp_path):
    """Old VAE attention names, the fp16 variant alone, shards with an index."""
    import shutil

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    folder = tmp_path / "old"
    shutil.copytree(one_file[1], folder)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    vae = load_file(path)
    renamed = {}
    for key, value in vae.items():
        for new, name in old.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        renamed[key] = value
    assert renamed.keys() != vae.keys()
    save_file(renamed, path)
    path = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(path), folder / "text_encoder" / "model.fp16.safetensors")
    path.unlink()
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet = load_file(path)
    half = sorted(unet)[: len(unet) // 2]
    places = {}
    for i, keys in enumerate((half, [k for k in unet if k not in half])):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({k: unet[k] for k in keys}, path.with_name(name))
        places |= dict.fromkeys(keys, name)
    path.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    path.unlink()
    base, whole = checkpoint.load(str(folder)), checkpoint.load(str(one_file[1]))
    for part in base.parts:
        a, b = base.weights(part), whole.weights(part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_no_socket_is_opened_for_a_single_file(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write.to_file(checkpoint.load("emoji"), tmp_path / "emoji.safetensors")

    def no(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", no)
    monkeypatch.setattr(socket, "getaddrinfo", no)
    flags = ["--prompt", "red apple", "--num-steps", "1", "--offline", "--json", "-o", "a.png"]
    assert cli.main(["sample", "--base", "emoji.safetensors", *flags]) == 0, capfd.readouterr().out


def test_the_hub_is_asked_with_the_users_token_and_home(tmp_path, monkeypatch):
    """A stand-in for the hub on the loopback: which files, with which token, into which cache."""
    import subprocess
    import sys
    import textwrap
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    seen = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args): ...

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
        import sys
        from fastdiff import cli
        sys.exit(cli.main(["sample", "--base", "owner/name", "--prompt", "x", *sys.argv[1:]]))
    """
    env = {k: v for k, v in os.environ.items() if "OFFLINE" not in k and "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
    run = lambda *flags: subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *flags], env=env, capture_output=True, text=True, timeout=120
    )
    offline = run("--offline")
    assert (offline.returncode, seen) == (2, [])
    online = run()
    server.shutdown()
    assert online.returncode == 2
    assert any("owner/name" in path and token == "Bearer hf_secret" for path, token in seen)
    for done in (offline, online):
        assert len(done.stderr.strip().splitlines()) == 1
    assert "(1) a hub id with network access" in offline.stderr
    assert "the hub does not accept the token in HF_TOKEN" in online.stderr


def test_a_pickle_needs_leave(one_file, tmp_path):
    torch.save({"state_dict": load_file(one_file[0]), "epoch": 3}, tmp_path / "model.ckpt")
    with pytest.raises(InputRefused, match="a pickle") as caught:
        checkpoint.load(str(tmp_path / "model.ckpt"), config=str(one_file[1]))
    assert "`allow_pickle`" in caught.value.hint
    base = checkpoint.load(str(tmp_path / "model.ckpt"), config=str(one_file[1]), allow_pickle=True)
    a, b = base.weights("unet"), checkpoint.load(str(one_file[1])).weights("unet")
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(UsageError, match="no such file"):
        checkpoint.load(str(tmp_path / "gone.ckpt"))
