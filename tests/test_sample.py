"""`sample`, the sampling engine and checkpoints, through the command line's own entry."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import cli, lora
from fastdiff.checkpoints import checkpoint, locate, write
from fastdiff.checkpoints.family import FAMILIES, of_unet_config
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.lora import apply
from fastdiff.lora.file import Factors, Lora
from fastdiff.models import text
from fastdiff.models.denoiser import Denoiser
from fastdiff.sampling.pictures import uint8
from fastdiff.sampling.sampler import Sampler, SeededNoise
from fastdiff.sampling.settings import Settings


def command(capfd, *args):
    code = cli.main([*args, "--json"])
    out = capfd.readouterr().out
    return code, json.loads(out)


@pytest.fixture(scope="module")
def few_step(tmp_path_factory):
    """A LoRA for the emoji base with a recipe in its header."""
    torch.manual_seed(0)
    recipe = Recipe(method="lcm", family="emoji", scheduler="lcm", num_steps=2, guidance=1.0)
    factors = Factors(torch.randn(2, 96) * 0.02, torch.randn(96, 2) * 0.02)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    path = tmp_path_factory.mktemp("lora") / "lcm.safetensors"
    lora.save(Lora({key: factors}, recipe.to_metadata()), path)
    return path


def test_the_same_command_twice_writes_the_same_bytes(few_step, tmp_path, capfd):
    args = ["sample", "--base", "emoji", "--lora", str(few_step), "--prompt", "a red apple", "--seed", "1", "--device", "cpu"]
    files = []
    for name in ("a.png", "b.png"):
        code, told = command(capfd, *args, "-o", str(tmp_path / name))
        assert code == 0
        assert told["metrics"]["settings"]["scheduler"] == "lcm"  # from the LoRA's recipe
        assert told["metrics"]["calls"] == 2
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    facts = json.loads(Image.open(tmp_path / "a.png").text["fastdiff"])
    assert (facts["prompt"], facts["seed"], facts["num_steps"]) == ("a red apple", 1, 2)


def test_an_image_depends_on_its_seed_not_on_its_batch(tmp_path, capfd):
    shared = ["sample", "--num-steps", "2", "--device", "cpu", "--prompt", "panda"]
    command(capfd, *shared, "--num-images", "3", "--seed", "5", "--batch-size", "3", "-o", str(tmp_path / "many"))
    command(capfd, *shared, "--seed", "7", "-o", str(tmp_path / "one.png"))
    many = np.array(Image.open(tmp_path / "many" / "0000-seed7.png")).astype(int)
    one = np.array(Image.open(tmp_path / "one.png")).astype(int)
    assert abs(many - one).max() <= 1
    assert (tmp_path / "many" / "grid.png").exists()


def test_flags_against_the_recipe_are_obeyed_and_warned_of(few_step, tmp_path, capfd):
    args = ["--lora", str(few_step), "--prompt", "fox", "-o", str(tmp_path / "x.png"), "--device", "cpu"]
    code, told = command(capfd, "sample", *args, "--scheduler", "ddim", "--guidance", "3", "--num-steps", "8")
    assert code == 0
    warnings = " ".join(told["warnings"])
    assert all(w in warnings for w in ("--scheduler ddim", "--guidance 3", "--num-steps 8"))
    assert told["metrics"]["settings"]["scheduler"] == "ddim"


def test_prompts_from_standard_input_and_files(tmp_path, capfd, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("panda\n\nrobot on red\n"))
    (tmp_path / "p.txt").write_text("rocket\n")
    for source, n in (("-", 2), (str(tmp_path / "p.txt"), 1)):
        code, told = command(
            capfd, "sample", "--prompts", source, "--num-steps", "1", "-o", str(tmp_path / "out"), "--device", "cpu"
        )
        assert (code, told["metrics"]["images"]) == (0, n)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "no prompt given"),
        (["--prompt", "x", "--scheduler", "heun"], 2, "is not one of ddim, euler"),
        (["--prompt", "x", "--scheduler", "lcm", "--num-steps", "60"], 2, "at most 50"),
        (["--prompt", "x", "--eta", "2"], 2, "--eta 2: must be at least 0 and at most 1"),
        (["--prompt", "x", "--base", "nowhere"], 2, "not an alias"),
        (["--prompt", "x", "--base", "gone.safetensors"], 2, "no such file"),
        (["--prompt", "x", "--lora", "gone.safetensors"], 2, "gone.safetensors"),
        (["--prompt", "x", "--resolution", "60"], 2, "multiple of 8"),
        (["--prompt", "x", "--num-images", "2", "-o", "one.png"], 2, "one file for 2 images"),
    ],
)
def test_mistakes_get_one_line_and_the_code(args, code, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, told = command(capfd, "sample", "--device", "cpu", *args)
    assert found == code
    assert told["ok"] is False
    assert message in told["error"]["message"] + (told["error"]["hint"] or "")
    assert "\n" not in told["error"]["message"]


def test_weights_of_another_family_are_refused(few_step, tiny_sd, capfd):
    code, told = command(capfd, "sample", "--base", str(tiny_sd), "--lora", str(few_step), "--prompt", "x")
    assert code in {2, 3}
    assert "emoji" in told["error"]["message"]


def test_sdxl_offline_without_weights_names_the_three_ways(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    code, told = command(capfd, "train-lcm-lora", "--base", "sdxl", "--offline")
    assert code in {2, 3}
    assert "--base sdxl" in told["error"]["message"]
    assert all(way in told["error"]["hint"] for way in ("hub id", "diffusers folder", "single file"))


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_v", "tiny_sdxl"])
def test_images_equal_the_stock_pipeline(kind, request):
    """DDIM with guidance, epsilon and v-prediction, SD and SDXL: same start noise, same picture."""
    base = checkpoint.load(str(request.getfixturevalue(kind)))
    pipeline = base.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    settings = Settings("ddim", 4, 4.0, "leading")
    sampler = Sampler.of_networks(base, Denoiser(base.unet, base.schedule(), base.prediction_type), base.vae)
    found = sampler.pixels(text.encode(base, ["a cat"]), text.unconditional(base), [11], settings, resolution_px=64)
    noise = SeededNoise([11], (4, 8, 8), "cpu")()
    told = pipeline("a cat", height=64, width=64, num_inference_steps=4, guidance_scale=4.0, latents=noise, output_type="pt")
    torch.testing.assert_close(found, told.images * 2 - 1, atol=2e-4, rtol=0)


def test_lcm_sampling_equals_the_stock_pipeline(monkeypatch, tiny_sd):
    import diffusers
    import diffusers.schedulers.scheduling_lcm as module

    base = checkpoint.load(str(tiny_sd))
    pipeline = base.pipeline()
    pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = SeededNoise([3], (4, 8, 8), "cpu")
    start = noise()
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise())
    told = pipeline("a cat", height=64, width=64, num_inference_steps=4, guidance_scale=1.0, latents=start, output_type="pt")
    sampler = Sampler.of_networks(base, Denoiser(base.unet, base.schedule(), base.prediction_type), base.vae)
    cond = text.encode(base, ["a cat"])
    found = sampler.pixels(cond, cond, [3], Settings("lcm", 4, 1.0), resolution_px=64)
    torch.testing.assert_close(found, told.images * 2 - 1, atol=2e-4, rtol=0)


def test_calls_and_recipes():
    assert Settings("ddim", 4, 3.0).calls == 8
    assert Settings("ddim", 4, 1.0).calls == 4
    recipe = Recipe(scheduler="tcd", num_steps=4, guidance=1.0, eta=0.3)
    assert Recipe.from_metadata(recipe.to_metadata()) == recipe
    assert Settings.of(recipe, Settings.usual(FAMILIES["sd15"])) == Settings("tcd", 4, 1.0, None, 0.3)
    assert Settings.of(recipe, Settings.usual(FAMILIES["sd15"]), num_steps=2).num_steps == 2


def test_uint8_rounds_and_clamps():
    assert uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


def test_checkpoint_folder_round_trip_keeps_every_tensor_and_the_recipe(tiny_sd, tmp_path):
    base = checkpoint.load(str(tiny_sd))
    recipe = Recipe(scheduler="lcm", num_steps=4, guidance=1.0)
    write.to_folder(base, tmp_path / "out", recipe=recipe)
    again = checkpoint.load(str(tmp_path / "out"))
    for part in ("unet", "vae"):
        ours, theirs = getattr(base, part).state_dict(), getattr(again, part).state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert checkpoint.fingerprint(base.unet) == checkpoint.fingerprint(again.unet)
    assert Recipe.from_metadata(json.loads((tmp_path / "out" / "fastdiff.json").read_text())) == recipe
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not a checkpoint folder"):
        write.to_folder(base, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_broken_checkpoints_are_refused_by_name(tiny_sd, tmp_path):
    import shutil

    from fastdiff.runtime.errors import InputRefused, UsageError

    copy = tmp_path / "copy"
    shutil.copytree(tiny_sd, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputRefused, match=r"diffusion_pytorch_model\.safetensors: not a safetensors file, or corrupt"):
        _ = checkpoint.load(str(copy)).unet
    (copy / "model_index.json").unlink()
    with pytest.raises(InputRefused, match=r"model_index\.json is missing"):
        _ = checkpoint.load(str(copy)).text_encoders
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x04\x95\x00\x00\x00")
    with pytest.raises(InputRefused, match="a pickle .* which can run code"):
        checkpoint.load(str(tmp_path / "x.ckpt"))
    (tmp_path / "y.safetensors").write_bytes(b"junk")
    with pytest.raises(InputRefused, match="not a safetensors file, or corrupt"):
        checkpoint.load(str(tmp_path / "y.safetensors"))
    with pytest.raises(UsageError, match="not an alias"):
        checkpoint.load("nowhere")


def test_families(tiny_sd, tiny_sdxl):
    assert locate.family_of("emoji") is FAMILIES["emoji"]
    assert locate.family_of("ssd-1b") is FAMILIES["sdxl"]
    assert locate.family_of(str(tiny_sdxl)) is FAMILIES["sdxl"]
    for family in FAMILIES.values():
        assert of_unet_config({"cross_attention_dim": family.cross_attention_width}) is family


def test_hub_layout_is_read_offline(tiny_sd, tmp_path, monkeypatch):
    """A local hub cache of the alias' repository, as a first download leaves it."""
    import shutil

    repo = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    shutil.copytree(tiny_sd, repo / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = checkpoint.load("sd15")
    assert base.family is FAMILIES["sd15"]
    assert base.unet.config.cross_attention_dim == 32


def test_several_loras_fold_as_their_weighted_sum(few_step, capfd):
    base, plain = checkpoint.load("emoji"), checkpoint.load("emoji")
    item = lora.load(few_step)
    apply.apply(base, [(item, 0.5), (item, 0.25)])
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    delta = next(iter(item.modules.values())).delta()
    found = base.unet.get_submodule(key).weight - plain.unet.get_submodule(key).weight
    torch.testing.assert_close(found, 0.75 * delta, atol=1e-6, rtol=0)
    assert replace(item.recipe, method=None) != item.recipe


def test_coverage_is_told_and_must_be_whole(few_step, capfd, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    flags = ["--prompt", "red apple", "--num-steps", "1", "--json", "-o", "a.png"]

    def told(file, *more, code=0):
        capfd.readouterr()
        assert cli.main(["sample", "--lora", str(file), *flags, *more]) == code
        return json.loads(capfd.readouterr().out)

    found = told(few_step)["metrics"]["loras"]
    total = len(lora.load(few_step).modules)
    assert found == [{"file": str(few_step), "weight": 1.0, "applied": total, "total": total}]
    tensors = load_file(few_step)
    extra = {"lora_unet_nowhere.lora_down.weight": torch.ones(2, 3), "lora_unet_nowhere.lora_up.weight": torch.ones(3, 2)}
    save_file({**tensors, **extra}, "more.safetensors")
    error = told("more.safetensors", code=3)["error"]
    assert f"only {total} of {total + 1} modules fit" in error["message"]
    assert "lora_unet_nowhere" in error["message"]
    assert "--allow-partial" in error["hint"]
    partial = told("more.safetensors", "--allow-partial")
    assert partial["metrics"]["loras"][0]["applied"] == total
    assert any("lora_unet_nowhere" in line for line in partial["warnings"])
    wide = {
        "lora_unet_x_attn2_to_k.lora_down.weight": torch.ones(2, 2048),
        "lora_unet_x_attn2_to_k.lora_up.weight": torch.ones(3, 2),
    }
    save_file(wide, "xl.safetensors")
    for more in ([], ["--allow-partial"]):
        message = told("xl.safetensors", *more, code=3)["error"]["message"]
        assert "xl.safetensors is for sdxl, the base is emoji" in message
