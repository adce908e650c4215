"""VAEs in single files of every layout: read exactly, baked into checkpoints, and written as TAESD's files."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastdiff.checkpoints import checkpoint, vae_file, write
from fastdiff.models import autoencoder
from fastdiff.runtime.errors import InputRefused, UsageError
from fastdiff.sampling import assemble
from fastdiff.sampling.sampler import Sampler
from fastdiff.training.scene import open_vae

PREFIX = "first_stage_model."


@pytest.fixture(scope="module")
def base(tiny_sd):
    return checkpoint.load(str(tiny_sd))


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def other_kl(seed=3, **more):
    """A VAE of the tiny checkpoint's shape with other weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    shape = dict(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, sample_size=64, **more)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    return AutoencoderKL(**kinds, **shape).eval().requires_grad_(False)


def taesd(seed=4, width=64, blocks=(3, 3, 3, 1), channels=4):
    torch.manual_seed(seed)
    return autoencoder.tiny(width, blocks, channels).eval().requires_grad_(False)


def ldm(net, prefix=PREFIX):
    """The tensors of a KL VAE by their names in a single file."""
    state = net.state_dict()
    weights = write.single_file.Weights.of(state)
    slots = write.single_file.vae_slots(prefix, dict(net.config), weights.shapes)
    return {entry.name: entry.read().contiguous() for entry in write.single_file.entries(weights, slots, None)}


def published(net):
    """A TAESD network's two files, from what is published of its layout: {part: tensors}."""
    state, files = net.state_dict(), {}
    for part, shift in (("decoder", 1), ("encoder", 0)):
        own = {key.removeprefix(f"{part}.layers."): value for key, value in state.items() if key.startswith(f"{part}.")}
        files[part] = {f"{int(key.split('.')[0]) + shift}.{key.split('.', 1)[1]}": value for key, value in own.items()}
    return files


class Block(nn.Module):
    """A residual block as TAESD publishes it."""

    def __init__(self):
        super().__init__()
        conv = lambda: nn.Conv2d(64, 64, 3, padding=1)
        self.conv = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())

    def forward(self, x):
        return (self.conv(x) + x).relu()


class Clamp(nn.Module):
    def forward(self, x):
        return (x / 3).tanh() * 3


def their_decoder():
    """TAESD's decoder by its published plan: a clamp, and blocks with twice the size between."""
    wide = lambda n: nn.Conv2d(n, 64, 3, padding=1)
    grow = lambda: (nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False))
    blocks = lambda n: [Block() for _ in range(n)]
    layers = [Clamp(), wide(4), nn.ReLU(), *blocks(3), *grow(), *blocks(3), *grow(), *blocks(3), *grow(), *blocks(1)]
    return nn.Sequential(*layers, nn.Conv2d(64, 3, 3, padding=1))


def their_encoder():
    half = lambda: nn.Conv2d(64, 64, 3, padding=1, stride=2, bias=False)
    blocks = [layer for _ in range(3) for layer in (half(), Block(), Block(), Block())]
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), Block(), *blocks, nn.Conv2d(64, 4, 3, padding=1))


def same(a, b):
    """Equal tensors by name, and equal config where a picture depends on it."""
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    names = ("scaling_factor", "latent_channels", "norm_num_groups", "block_out_channels", "layers_per_block", "force_upcast")
    assert [list(a.config.get(k) or []) if isinstance(a.config.get(k), list | tuple) else a.config.get(k) for k in names] == [
        list(b.config.get(k) or []) if isinstance(b.config.get(k), list | tuple) else b.config.get(k) for k in names
    ]


# ---- reading


LAYOUTS = ("ldm", "ldm, bare", "diffusers", "diffusers, old names", "ckpt", "whole checkpoint", "beside")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kl_vae_in_a_file_is_the_one_in_the_folder(layout, base, latents, tmp_path):
    net = other_kl()
    write.network_to_folder(net, tmp_path / "folder")
    path = tmp_path / "vae-ft-mse-840000-ema-pruned.safetensors"
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    if layout == "ckpt":  # as training leaves it: under state_dict, with losses and averages
        path = path.with_suffix(".ckpt")
        torch.save({"state_dict": {**ldm(net, ""), "loss.logvar": torch.zeros(1), "model_ema.decay": torch.ones(1)}}, path)
    elif layout == "whole checkpoint":
        changed = base.shaped("vae", json.loads(net.to_json_string()))
        changed.__dict__["vae"] = net
        write.to_file(changed, path, force=True)
    elif layout == "beside":
        path = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    elif layout == "diffusers, old names":
        new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        pattern = re.compile(r"(attentions\.0\.)(to_q|to_k|to_v|to_out\.0)\.")
        save_file({pattern.sub(lambda m: f"{m[1]}{new[m[2]]}.", k): v for k, v in state.items()}, path)
    else:
        save_file(state if layout == "diffusers" else ldm(net, PREFIX if layout == "ldm" else ""), path)
    opened = assemble.open_vae(base, path, allow_pickle=layout == "ckpt")
    same(opened, net)
    folder = assemble.open_vae(base, tmp_path / "folder")
    assert torch.equal(autoencoder.decode(opened, latents), autoencoder.decode(folder, latents))
    trained = open_vae(base, str(path), allow_pickle=layout == "ckpt")  # as training commands open it
    assert torch.equal(trained.decoder.conv_in.weight, net.decoder.conv_in.weight)


def test_latents_are_scaled_as_the_bases(tiny_sd, tmp_path):
    """A file does not say it: 0.18215 for SD, 0.13025 for SDXL."""
    save_file(ldm(other_kl()), tmp_path / "vae.safetensors")
    base = checkpoint.load(str(tiny_sd))
    for scaling in (0.18215, 0.13025):
        config = {**base.config_of("vae"), "scaling_factor": scaling}
        opened = assemble.open_vae(base.shaped("vae", config), tmp_path / "vae.safetensors")
        assert opened.config.scaling_factor == scaling
    shapes = {k: tuple(v.shape) for k, v in ldm(other_kl(), "").items()}
    assert vae_file.kl_config(shapes, "encoder.down.{}.block.{}.conv2.weight", {})["scaling_factor"] == 0.18215


@pytest.mark.parametrize("blocks", [(3, 3, 3, 1), (4, 4, 2, 0)])
def test_a_tiny_vae_in_one_file_is_the_one_in_the_folder(blocks, base, latents, tmp_path):
    net = taesd(width=12, blocks=blocks)
    write.network_to_folder(net, tmp_path / "folder")
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "tiny.safetensors")
    opened = assemble.open_vae(base, tmp_path / "tiny.safetensors")
    same(opened, net)
    folder = assemble.open_vae(base, tmp_path / "folder")
    assert torch.equal(autoencoder.decode(opened, latents), autoencoder.decode(folder, latents))


@pytest.mark.parametrize("kind", ["two files", "one file", "pth"])
def test_taesds_own_layout(kind, base, latents, tmp_path):
    net, path = taesd(), tmp_path / ("taesd_decoder.pth" if kind == "pth" else "taesd_decoder.safetensors")
    files = published(net)
    if kind == "one file":
        both = {f"taesd_{part}.{k}": v.contiguous() for part, state in files.items() for k, v in state.items()}
        save_file(both, path := tmp_path / "taesd.safetensors")
    for part, state in files.items() if kind != "one file" else ():
        name = path.name.replace("decoder", part)
        torch.save(state, tmp_path / name) if kind == "pth" else save_file(state, tmp_path / name)
    opened = assemble.open_vae(base, path, allow_pickle=kind == "pth")
    same(opened, net)
    theirs = their_decoder()
    theirs.load_state_dict(files["decoder"])  # all of its names, and no other
    with torch.no_grad():
        expected = theirs(latents).mul(2).sub(1).clamp(-1, 1)
    torch.testing.assert_close(autoencoder.decode(opened, latents), expected, atol=1e-5, rtol=1e-5)


def test_a_decoder_alone_draws_and_encodes_to_zeros(base, latents, tmp_path, capsys):
    net = taesd()
    save_file(published(net)["decoder"], tmp_path / "taesd_decoder.safetensors")
    opened = assemble.open_vae(base, tmp_path / "taesd_decoder.safetensors")
    assert "it draws pictures and encodes none" in capsys.readouterr().err
    assert torch.equal(autoencoder.decode(opened, latents), autoencoder.decode(net, latents))
    assert not autoencoder.mean_latents(opened, torch.rand(1, 3, 64, 64)).any()


def test_a_picture_of_a_file_is_that_of_the_folder(fastdiff, tiny_sd, tmp_path):
    write.network_to_folder(other_kl(), tmp_path / "folder")
    save_file(ldm(other_kl()), tmp_path / "vae.safetensors")
    how = ["--base", tiny_sd, "--prompt", "a cat", "--num-steps", "2", "--resolution", "64"]
    for name in ("folder", "vae.safetensors"):
        code, told = fastdiff("sample", *how, "--vae", name, "-o", f"{name}.png")
        assert code == 0, told
    from PIL import Image

    assert Image.open("folder.png").tobytes() == Image.open("vae.safetensors.png").tobytes()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("channels", "this VAE has 16 latent channels, the base has 4"),
        ("taesd3", "this VAE has 16 latent channels, the base has 4"),
        ("smaller", "this VAE has 4 px per latent, the base has 8"),
        ("lacks", "1 layers of the VAE are missing: decoder.conv_out.bias"),
        ("more", "1 layers of the VAE have no place in it: decoder.up_blocks.0.resnets.0.extra"),
        ("lora", "not a VAE"),
        ("encoder", "TAESD's encoder, which draws no pictures"),
        ("mixed", "not TAESD's encoder, which the name says"),
        ("pickle", "a pickle"),
        ("nan", "NaN or infinite values"),
        ("headless", "its decoder has no first layer"),
        ("torn", "its layers are not those of AutoencoderTiny"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(kind, words, base, tmp_path):
    path, net = tmp_path / "vae.safetensors", taesd()
    state = {k: v.contiguous() for k, v in other_kl().state_dict().items()}
    tiny = {k: v.contiguous() for k, v in net.state_dict().items()}
    if kind == "channels":
        save_file(ldm(other_kl(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)), path)
    elif kind == "taesd3":
        path = tmp_path / "taesd3_decoder.safetensors"
        save_file(published(taesd(channels=16))["decoder"], path)
    elif kind == "smaller":
        from diffusers import AutoencoderKL

        shape = dict(block_out_channels=(8, 8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 3)
        save_file(ldm(AutoencoderKL(**shape, up_block_types=("UpDecoderBlock2D",) * 3)), path)
    elif kind == "lacks":
        save_file({k: v for k, v in state.items() if k != "decoder.conv_out.bias"}, path)
    elif kind == "more":
        save_file(state | {"decoder.up_blocks.0.resnets.0.extra": torch.ones(1)}, path)
    elif kind == "lora":
        save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2, 2)}, path)
    elif kind == "encoder":
        path = tmp_path / "taesd_encoder.safetensors"
        save_file(published(net)["encoder"], path)
    elif kind == "mixed":
        path = tmp_path / "taesd_decoder.safetensors"
        save_file(published(net)["decoder"], path)
        save_file(published(net)["decoder"], tmp_path / "taesd_encoder.safetensors")
    elif kind == "pickle":
        path = tmp_path / "vae.pt"
        torch.save(ldm(other_kl(), ""), path)
    elif kind == "nan":
        save_file(state | {"decoder.conv_in.bias": torch.full_like(state["decoder.conv_in.bias"], torch.nan)}, path)
    elif kind == "headless":
        save_file({k: v for k, v in tiny.items() if not k.startswith("decoder.layers.0.")}, path)
    elif kind == "torn":
        save_file({k: v for k, v in tiny.items() if k != "decoder.layers.4.conv.2.bias"}, path)
    with pytest.raises(InputRefused, match=re.escape(words)) as refused:
        assemble.open_vae(base, path)
    assert (tmp_path / "taesd_encoder.safetensors" if kind == "mixed" else path).name in str(refused.value)


def test_a_folder_of_pickled_weights_needs_leave(tiny_sd, tmp_path, fastdiff):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_sd / "vae", folder)
    torch.save(load_file(folder / "diffusion_pytorch_model.safetensors"), folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    draw = [
        "sample",
        "--base",
        tiny_sd,
        "--prompt",
        "a cat",
        "--resolution",
        64,
        "--num-steps",
        1,
        "--device",
        "cpu",
        "-o",
        "a.png",
    ]
    code, told = fastdiff(*draw, "--vae", folder)
    assert (code, "has pickled weights alone (.bin)" in told["error"]["message"]) == (3, True), told["error"]
    assert "--allow-pickle" in told["error"]["hint"]
    code, told = fastdiff(*draw, "--vae", folder, "--allow-pickle")
    assert code == 0, told["error"]


def test_a_file_that_is_not_there_is_not_asked_of_the_hub(base):
    with pytest.raises(UsageError, match="no such"):
        assemble.open_vae(base, "models/sdxl_vae.safetensors")


# ---- baking


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_export_bakes_a_vae_in(single, dtype, fastdiff, tiny_sd, tmp_path):
    """All else stays as it was, and the VAE keeps the precision of its file."""
    net = other_kl().to(dtype)
    save_file(ldm(net), tmp_path / "vae.safetensors")
    out = "new.safetensors" if single else "new"
    flags = ["--single-file"] if single else []
    code, told = fastdiff("export", "--base", tiny_sd, "--vae", "vae.safetensors", "-o", out, *flags)
    assert code == 0, told
    old, new = checkpoint.load(str(tiny_sd)), checkpoint.load(out, config=str(tiny_sd) if single else None)
    assert all(torch.equal(v.float(), new.vae.state_dict()[k]) for k, v in net.state_dict().items())
    assert set(new.weights("vae").dtypes.values()) == {dtype}
    for part in ("unet", "text_encoder"):
        a, b = old.weights(part), new.weights(part)
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert new.vae.config.scaling_factor == old.vae.config.scaling_factor


def test_a_folder_takes_a_tiny_vae_and_draws_with_it_here_and_in_diffusers(fastdiff, tiny_sd, tmp_path):
    import diffusers

    write.network_to_folder(taesd(width=12), tmp_path / "tiny-vae")
    code, told = fastdiff("export", "--base", tiny_sd, "--vae", "tiny-vae", "-o", "new")
    assert code == 0, told
    pipe = diffusers.DiffusionPipeline.from_pretrained("new")
    assert type(pipe.vae).__name__ == "AutoencoderTiny"
    beside = Sampler(str(tiny_sd), vae="tiny-vae", device="cpu", compile="off")
    inside = Sampler("new", device="cpu", compile="off")
    how = dict(seeds=[1], num_steps=2, resolution_px=64)
    assert beside("a cat", **how)[0].tobytes() == inside("a cat", **how)[0].tobytes()
    moments = autoencoder.encode_moments(inside.base.vae, torch.rand(2, 3, 64, 64))
    assert moments.shape == (2, 8, 8, 8)
    assert not moments[:, 4:].any()
    code, told = fastdiff("export", "--base", "new", "--single-file", "-o", "new.safetensors")
    assert (code, "a tiny VAE has no place in a single file" in told["error"]["message"]) == (3, True)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (
            ["--vae", "tiny-vae", "--single-file", "-o", "x.safetensors"],
            3,
            "--vae tiny-vae: a tiny VAE has no place in a single file",
        ),
        (["--vae", "wide.safetensors", "-o", "x"], 3, "this VAE has 16 latent channels, the base has 4"),
        (["--vae", "tiny-vae", "--format", "taesd", "-o", "x"], 3, "cannot be written as TAESD: it has 12 channels"),
        (["--format", "taesd", "-o", "x"], 3, "cannot be written as TAESD: AutoencoderKL has no such layout"),
        (["--vae", "short", "--format", "taesd", "-o", "x"], 3, "its decoder has 4, 4, 2, 0 residual blocks, TAESD's 3, 3, 3, 1"),
        (["--vae", "tiny-vae", "--format", "taesd", "-o", "x.safetensors"], 2, "give the name of a folder"),
        (["--vae", "tiny-vae", "--lora", "some.safetensors", "-o", "x.safetensors"], 2, "a LoRA has no VAE"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(args, code, words, fastdiff, tiny_sd, tmp_path):
    write.network_to_folder(taesd(width=12), tmp_path / "tiny-vae")
    write.network_to_folder(taesd(blocks=(4, 4, 2, 0)), tmp_path / "short")
    save_file(ldm(other_kl(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)), tmp_path / "wide.safetensors")
    given, told = fastdiff("export", "--base", tiny_sd, *args)
    assert given == code, told
    assert words in f"{told['error']['message']}: {told['error'].get('hint')}"
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.safetensors").exists()


# ---- TAESD's files


@pytest.mark.parametrize(("kind", "name"), [("sd15", "taesd"), ("sdxl", "taesdxl")])
def test_a_tiny_vae_becomes_taesds_files(kind, name, fastdiff, tiny_sd, tiny_sdxl, latents, tmp_path):
    """Their names are the published ones: the published network loads them without one missing or too many."""
    net = taesd()
    write.network_to_folder(net, tmp_path / "tiny-vae")
    home = tiny_sd if kind == "sd15" else tiny_sdxl
    code, told = fastdiff("export", "--base", home, "--vae", "tiny-vae", "--format", "taesd", "-o", "vae_approx")
    assert code == 0, told
    files = {part: tmp_path / "vae_approx" / f"{name}_{part}.safetensors" for part in ("decoder", "encoder")}
    assert sorted(p["path"].split("/")[-1] for p in told["outputs"]) == sorted(path.name for path in files.values())
    theirs = {"decoder": their_decoder(), "encoder": their_encoder()}
    for part, path in files.items():
        theirs[part].load_state_dict(load_file(path))
    pictures = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        drawn, encoded = theirs["decoder"](latents).mul(2).sub(1), theirs["encoder"](pictures.add(1).div(2))
    torch.testing.assert_close(autoencoder.pixels(net, latents), drawn, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(autoencoder.mean_latents(net, pictures), encoded, atol=1e-5, rtol=1e-5)
    again = assemble.open_vae(checkpoint.load(str(home)), files["decoder"])
    same(again, net)
    assert torch.equal(autoencoder.decode(again, latents), autoencoder.decode(net, latents))
    with safe_open(files["decoder"], "pt") as file:
        assert {"1.weight", "3.conv.0.weight", "18.conv.4.bias", "19.weight"} <= set(file.keys())


def test_an_untrained_encoder_is_told(fastdiff, tiny_sd, tmp_path, capfd):
    net = taesd()
    for p in net.encoder.layers[-1].parameters():
        p.zero_()
    write.network_to_folder(net, tmp_path / "tiny-vae")
    from fastdiff import cli

    args = ["export", "--base", str(tiny_sd), "--vae", "tiny-vae", "--format", "taesd", "-o", "x"]
    assert cli.main(args) == 0
    assert "its encoder is untrained" in capfd.readouterr().err
