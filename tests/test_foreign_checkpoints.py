"""Single files as people have them: fp8, other names, one part alone, a whole LCM; and what a written file tells of itself."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import build
from PIL import Image
from safetensors.torch import load_file, save_file
from test_lora_layouts import ROWS, Made

from fastdiff import cli, lora
from fastdiff.checkpoints import checkpoint, tensors, write
from fastdiff.commands import inspect
from fastdiff.lora.kinds import Factors
from fastdiff.lora.layouts import canonical
from fastdiff.runtime.errors import InputRefused
from fastdiff.sampling.settings import Settings

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def one(tiny_sd, tmp_path_factory):
    """The tensors of the tiny checkpoint's single file."""
    path = tmp_path_factory.mktemp("one") / "one.safetensors"
    write.to_file(checkpoint.load(str(tiny_sd)), path)
    return load_file(path)


def same(base, whole, part="unet"):
    a, b = base.weights(part), whole.weights(part)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k].float(), b[k].float()) for k in a)


def drawn(tmp_path, name, *flags):
    path = tmp_path / f"{name}.png"
    words = ["--prompt", "a cat", "--resolution", "64", "--num-steps", "2", "--device", "cpu", "-o", str(path)]
    assert cli.main(["sample", *words, *map(str, flags)]) == 0
    return np.array(Image.open(path)).astype(int)


# ---- fp8


def eight_bits(content, kind, style):
    """UNet and encoder in fp8, and the numbers that they stand for. Styles: plain, scale_weight, weight_scale, channels."""
    stored, meant = {}, {}
    for name, value in content.items():
        if value.ndim < 2 or not value.is_floating_point() or name.startswith("first_stage_model."):
            stored[name] = meant[name] = value
            continue
        value = value.float()
        if style == "plain":
            stored[name] = value.to(kind)
            meant[name] = stored[name].float()
            continue
        axes = tuple(range(1, value.ndim)) if style == "channels" else tuple(range(value.ndim))
        scale = value.abs().amax(axes).clamp(min=1e-12) / torch.finfo(kind).max
        shaped = scale.reshape(-1, *[1] * (value.ndim - 1)) if style == "channels" else scale
        stored[name] = (value / shaped).to(kind)
        meant[name] = stored[name].float() * shaped
        layer, old = name.removesuffix(".weight"), style == "scale_weight"
        if name == layer:  # not a weight, as the position embedding
            stored[name] = meant[name] = value
            continue
        stored[f"{layer}.{'scale_weight' if old else 'weight_scale'}"] = scale
        stored[f"{layer}.{'scale_input' if old else 'input_scale'}"] = torch.tensor(3.0)
    if style == "scale_weight":
        stored[f"{UNET}scaled_fp8"] = torch.empty(0, dtype=kind)
    if style == "channels":
        note = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        stored[f"{UNET}time_embed.0.comfy_quant"] = note
    return stored, meant


STYLES = [("plain", "e4m3fn"), ("plain", "e5m2"), ("scale_weight", "e4m3fn"), ("weight_scale", "e5m2"), ("channels", "e4m3fn")]


@pytest.mark.parametrize(("style", "kind"), STYLES)
def test_fp8_is_restored_in_fp32(one, tiny_sd, tmp_path, style, kind):
    stored, meant = eight_bits(one, getattr(torch, f"float8_{kind}"), style)
    save_file(stored, tmp_path / "eight.safetensors")
    save_file(meant, tmp_path / "meant.safetensors")
    open_ = lambda name: checkpoint.load(str(tmp_path / name), config=str(tiny_sd))
    for part in ("unet", "text_encoder", "vae"):
        same(open_("eight.safetensors"), open_("meant.safetensors"), part)


def test_every_command_reads_fp8(one, tiny_sd, tmp_path, fastdiff, capfd):
    for style in ("plain", "scale_weight"):
        stored, meant = eight_bits(one, torch.float8_e4m3fn, style)
        save_file(stored, tmp_path / "eight.safetensors")
        save_file(meant, tmp_path / "meant.safetensors")
        own = ["--base-config", tiny_sd]
        a, b = (drawn(tmp_path, n, "--base", tmp_path / f"{n}.safetensors", *own) for n in ("eight", "meant"))
        assert (a == b).all(), style
        capfd.readouterr()
        code, told = fastdiff("export", "--base", "eight.safetensors", *own, "--single-file", "-o", "out.safetensors")
        assert code == 0, told["error"]
        written = load_file("out.safetensors")
        key = f"{UNET}middle_block.1.proj_in.weight"
        assert written[key].dtype == torch.float16  # what the stored precision of an fp8 file is written as
        torch.testing.assert_close(written[key].float(), meant[key], rtol=1e-3, atol=0)
        if style == "plain":
            assert torch.equal(written[key].float(), meant[key])  # fp16 holds every number of fp8
        assert not any("scale" in name for name in written)
    made = Made(checkpoint.load(str(tiny_sd)))
    ROWS["K1 kohya, diffusers names"](made, False)
    save_file({k: v.contiguous() for k, v in made.tensors.items()}, tmp_path / "lora.safetensors")
    for name in ("eight", "meant"):
        words = ["--base", f"{name}.safetensors", *own, "--accel", "lora.safetensors", "--precision", "fp32"]
        code, told = fastdiff("merge-lora", *words, "-o", f"merged-{name}.safetensors")
        assert code == 0, told["error"]
    a, b = load_file("merged-eight.safetensors"), load_file("merged-meant.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k].float(), b[k].float()) for k in a)


def test_what_becomes_of_fp8_is_told(one, tiny_sd, tmp_path, capsys):
    save_file(eight_bits(one, torch.float8_e4m3fn, "plain")[0], tmp_path / "eight.safetensors")
    base = checkpoint.load(str(tmp_path / "eight.safetensors"), config=str(tiny_sd))
    write.to_folder(base, tmp_path / "folder")
    assert "tensors are stored in fp8; they are written as fp16" in capsys.readouterr().err
    same(checkpoint.load(str(tmp_path / "folder")), base)
    assert tensors.open_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors").stored_dtypes == ["F16", "F32"]


def test_a_folder_in_fp8_is_read(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "folder")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = load_file(path)
    save_file({k: v.to(torch.float8_e4m3fn) if v.ndim > 1 else v for k, v in content.items()}, path)
    base = checkpoint.load(str(folder))
    read = base.weights("unet")
    assert all(torch.equal(read[k], v.to(torch.float8_e4m3fn).float() if v.ndim > 1 else v) for k, v in content.items())
    assert torch.equal(base.unet.state_dict()["conv_in.weight"], read["conv_in.weight"])
    assert drawn(tmp_path, "folder", "--base", folder).std() > 0
    facts = inspect.run(inspect.Config(str(folder))).metrics
    assert facts["supported"]


LAYER = f"{UNET}middle_block.1.proj_in"
UNKNOWN = {
    "nvfp4": ({f"{LAYER}.weight_scale_2": torch.ones(1)}, {}),
    "block scaling": ({f"{LAYER}.weight_scale_inv": torch.ones(1)}, {}),
    "bitsandbytes": ({f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.ones(3, dtype=torch.uint8)}, {}),
    "integers with zero points": ({f"{LAYER}.qweight": torch.ones(3, dtype=torch.int32)}, {}),
    "weights in I8": (
        {f"{LAYER}.weight_scale": torch.ones(()), f"{LAYER}.weight": torch.ones(32, 32, 1, 1, dtype=torch.int8)}, {},
    ),
    "scales of shape": ({f"{LAYER}.weight_scale": torch.ones(4, 4)}, {}),
    "int8_blockwise": ({}, {"_quantization_metadata": json.dumps({"layers": {LAYER: {"format": "int8_blockwise"}}})}),
    "mxfp8": ({f"{LAYER}.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("what", UNKNOWN)
def test_other_quantisations_are_refused_by_name(one, tiny_sd, tmp_path, what):
    more, header = UNKNOWN[what]
    save_file({**one, **more}, tmp_path / "x.safetensors", metadata=header or None)
    with pytest.raises(InputRefused, match=f"quantised in a way that is not known here: .*{what}") as caught:
        checkpoint.load(str(tmp_path / "x.safetensors"), config=str(tiny_sd))
    assert "\n" not in str(caught.value)
    facts = inspect.run(inspect.Config(str(tmp_path / "x.safetensors"))).metrics
    assert (facts["supported"], what in facts["why_not"]) == (False, True)


# ---- names

NAMES = {
    "diffusion_model. alone": lambda k: k.replace("model.diffusion_model.", "diffusion_model."),
    "a doubled model.": lambda k: k.replace("model.diffusion_model.", "model.model.diffusion_model."),
    "state_dict.": lambda k: f"state_dict.{k}",
    "module.": lambda k: f"module.{k}",
    "a UNet without a prefix": lambda k: k.removeprefix("model.diffusion_model."),
}


@pytest.mark.parametrize("how", NAMES)
def test_other_prefixes_are_read(one, tiny_sd, tmp_path, how):
    ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(12)[None]}
    content = {k: v + 0.5 if k.endswith("bias") else v for k, v in one.items()}  # else the folder's own would do
    save_file(content, tmp_path / "plain.safetensors")
    save_file({NAMES[how](k): v for k, v in {**content, **ids}.items()}, tmp_path / "x.safetensors")
    base, whole = (checkpoint.load(str(tmp_path / f"{name}.safetensors"), config=str(tiny_sd)) for name in ("x", "plain"))
    for part in base.parts:
        same(base, whole, part)


def test_a_file_of_nothing_that_is_known_is_no_copy_of_its_base_config(tiny_sd, tmp_path):
    save_file({"something.else": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputRefused, match="not a Stable Diffusion checkpoint"):
        checkpoint.load(str(tmp_path / "x.safetensors"), config=str(tiny_sd))


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_a_unet_alone_under_diffusers_names_takes_the_rest_from_its_folder(tiny_sd, tmp_path, prefix, capsys):
    content = load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    changed = {k: v * 1.25 if k == "conv_out.weight" else v for k, v in content.items()}
    path = tmp_path / "tiny_unet.safetensors"
    save_file({prefix + k: v for k, v in changed.items()}, path)
    base = checkpoint.load(str(path), config=str(tiny_sd))
    assert torch.equal(base.weights("unet")["conv_out.weight"], changed["conv_out.weight"])
    folder = shutil.copytree(tiny_sd, tmp_path / "folder")
    save_file(changed, folder / "unet" / "diffusion_pytorch_model.safetensors")
    a, b = drawn(tmp_path, "a", "--base", path, "--base-config", tiny_sd), drawn(tmp_path, "b", "--base", folder)
    assert abs(a - b).max() <= 1
    assert f"has no vae; taken from {tiny_sd}" in capsys.readouterr().err
    with pytest.raises(InputRefused, match="a UNet alone with diffusers' names") as caught:
        checkpoint.load(str(path))
    assert "`base_config=FOLDER`" in caught.value.hint


def test_a_unet_alone_under_ldm_names_too(one, tiny_sd, tmp_path):
    path = tmp_path / "unet.safetensors"
    save_file({k.removeprefix(UNET): v for k, v in one.items() if k.startswith(UNET)}, path)
    base, whole = checkpoint.load(str(path), config=str(tiny_sd)), checkpoint.load(str(tiny_sd))
    for part in base.parts:
        same(base, whole, part)
    bare = shutil.copytree(tiny_sd, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InputRefused, match="has no text_encoder") as caught:
        checkpoint.load(str(path), config=str(bare)).weights("text_encoder")
    assert "`base_config=FOLDER`" in caught.value.hint
    lora = {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.ones(4, 4)}
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(InputRefused, match="a LoRA, not a base model"):
        checkpoint.load(str(tmp_path / "lora.safetensors"), config=str(tiny_sd))


def test_one_tensor_under_two_names_is_refused(one, tiny_sd, tmp_path):
    name = f"{UNET}out.2.bias"
    save_file({**one, "module." + name: one[name] + 1}, tmp_path / "x.safetensors")
    with pytest.raises(InputRefused, match="the same tensor under two names"):
        checkpoint.load(str(tmp_path / "x.safetensors"), config=str(tiny_sd))


# ---- a whole LCM, whose UNet takes the guidance as an input


@pytest.fixture(scope="module")
def lcm(tiny_sd, tmp_path_factory):
    """A folder as the authors of LCM publish theirs."""
    from fastdiff.methods.lcm import guidance_embedded

    base, folder = checkpoint.load(str(tiny_sd)), tmp_path_factory.mktemp("lcm") / "model"
    net = guidance_embedded(base.unet, 8)
    torch.manual_seed(1)
    torch.nn.init.normal_(net.time_embedding.cond_proj.weight)
    write.to_folder(base.with_unet(net, "epsilon"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["latent_consistency_txt2img", "LatentConsistencyModelPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_whole_lcm_is_sampled_as_its_authors_do(lcm, tmp_path, fastdiff):
    code, told = fastdiff("sample", "--base", lcm, "--prompt", "a cat", "--resolution", "64", "--device", "cpu", "-o", "a.png")
    assert code == 0, told["error"]
    settings = told["metrics"]["settings"]
    assert (settings["scheduler"], settings["num_steps"], settings["guidance"]) == ("lcm", 4, 8.0)
    a, b = (drawn(tmp_path, f"w{w}", "--base", lcm, "--guidance", w) for w in (2, 8))
    assert abs(a - b).max() > 2  # the guidance reaches the network
    facts = inspect.run(inspect.Config(str(lcm))).metrics
    assert (facts["embeds_guidance"], facts["supported"], facts["recipe"]["guidance"]) == (True, True, 8.0)
    base = checkpoint.load(str(lcm))
    assert (Settings.of_base(base).scheduler, Settings.of_base(base).num_steps) == ("lcm", 4)


def test_its_pictures_are_those_of_diffusers(lcm):
    """The embedding of w, against diffusers' own pipeline of a whole LCM."""
    import diffusers

    base = checkpoint.load(str(lcm))
    own = base.pipeline()
    parts = {k: v for k, v in own.components.items() if k != "scheduler"}
    parts.pop("image_encoder", None)
    scheduler = diffusers.LCMScheduler.from_config({**base.scheduler_config, "clip_sample": False})
    pipe = diffusers.LatentConsistencyModelPipeline(**parts, scheduler=scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipe("a cat", latents=noise, num_inference_steps=1, guidance_scale=5.0, output_type="latent").images
    from fastdiff.models import text
    from fastdiff.models.denoiser import Denoiser

    schedule, cond = base.schedule(), text.encode(base, ["a cat"])
    with torch.no_grad():
        p = Denoiser.of(base).guided(noise, torch.tensor(999), cond, cond, 5.0)
    c_skip, c_out = schedule.boundary(torch.tensor([999]), noise)
    torch.testing.assert_close(theirs, c_skip * noise + c_out * p.x0, atol=2e-3, rtol=1e-3)


def test_a_single_file_of_it(lcm, tiny_sd, tmp_path):
    base = checkpoint.load(str(lcm))
    with pytest.raises(InputRefused, match="takes the guidance as an input, which no other program reads") as caught:
        write.to_file(base, tmp_path / "one.safetensors")
    assert "`force=True`" in caught.value.hint
    write.to_file(base, tmp_path / "one.safetensors", force=True)
    content = load_file(tmp_path / "one.safetensors")
    ours, other = f"{UNET}time_embed.cond_proj.weight", f"{UNET}time_embedding.cond_proj.weight"
    content[other] = content.pop(ours)
    save_file(content, tmp_path / "other.safetensors")
    for name in ("one", "other"):
        same(checkpoint.load(str(tmp_path / f"{name}.safetensors"), config=str(lcm)), base)
        assert checkpoint.load(str(tmp_path / f"{name}.safetensors"), config=str(lcm)).recipe.guidance == 8.0
    from fastdiff.checkpoints import views
    from fastdiff.checkpoints.detect import infer_unet

    config = json.loads((tiny_sd / "unet" / "config.json").read_text())
    assert infer_unet(views.opened(tmp_path / "other.safetensors"), config)["time_cond_proj_dim"] == 8


def test_it_is_fine_tuned_and_refused_by_methods_that_cannot(lcm, tmp_path, fastdiff):
    few = ["--resolution", 64, "--steps", 2, "--batch-size", 2, "--pairs", 2, "--prompts", "prompts.txt", "--device", "cpu"]
    code, told = fastdiff("train-lcm-lora", "--base", lcm, "--finetune", "--lora-rank", 2, *few, "--output", "run")
    assert code == 0, told["error"]
    code, told = fastdiff("sample", "--base", lcm, "--lora", "run/lcm.safetensors", "--prompt", "x", "--resolution", 64)
    assert code == 0, told["error"]
    assert (told["metrics"]["settings"]["scheduler"], told["metrics"]["settings"]["guidance"] > 1) == ("lcm", True)
    code, told = fastdiff("dmd", "--base", lcm, "--lambda-reg", 0, *few)
    assert (code, "takes the guidance as an input" in told["error"]["message"]) == (3, True), told["error"]
    code, told = fastdiff("sdxs", "--base", lcm, "--match-steps", 1, "--gan-steps", 1, *few)
    assert (code, "takes the guidance as an input" in told["error"]["message"]) == (3, True), told["error"]


def test_a_student_that_starts_from_it_is_refused(lcm, tiny_sd, tmp_path, fastdiff):
    code, told = fastdiff("sdxs", "--base", tiny_sd, "--init", lcm, "--prompts", "prompts.txt", "--device", "cpu")
    assert (code, "time_cond_proj_dim 8, the base None" in told["error"]["message"]) == (3, True), told["error"]


def test_lcm_training_starts_from_it_or_from_a_lora(lcm, tiny_sd, tiny_v, tmp_path, fastdiff, capfd):
    from fastdiff.methods.lcm import LCM, Config

    def begun(**options):
        config = Config(base=str(tiny_sd), lora_rank=2, lora_alpha=2, **options)
        base = config.open_base()
        LCM.check(config)
        LCM.check_base(config, base)
        return LCM(base, config).student

    whole = begun(full=True, init=str(lcm))
    state, wanted = whole.net.state_dict(), checkpoint.load(str(lcm)).weights("unet")
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name].float()) for name in wanted)
    assert whole.guidance_embedded

    torch.manual_seed(0)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    key = canonical("lora_unet_", name)
    own = checkpoint.load(str(tiny_sd)).weights("unet")[f"{name}.weight"]
    module = Factors(torch.randn(2, own.shape[1]), torch.randn(own.shape[0], 2))
    lora.Lora({key: module}).save(tmp_path / "start.safetensors", dtype=torch.float32)
    adapted = begun(init=str(tmp_path / "start.safetensors"))
    layer = adapted.net.get_submodule(name)
    assert torch.allclose(layer.get_delta_weight("student"), module.delta(), atol=1e-5)
    folded = begun(init=str(tmp_path / "start.safetensors"), full=True)
    assert torch.allclose(folded.net.get_submodule(name).weight - own, module.delta(), atol=1e-5)

    capfd.readouterr()
    assert begun(full=True, init=str(tiny_v)).kind == "v_prediction"  # what its network outputs
    assert "predicts v_prediction, the base epsilon; the student goes on predicting v_prediction" in capfd.readouterr().err

    begin = ["train-lcm-lora", "--base", tiny_sd, "--steps", 1, "--prompts", "prompts.txt", "--device", "cpu"]
    code, told = fastdiff(*begin, "--init", lcm)
    assert (code, "give --full to start from it" in told["error"]["hint"]) == (2, True), told["error"]
    for ref in ("owner/gone.safetensors", "no such alias"):
        code, told = fastdiff(*begin, "--full", "--init", ref)
        assert (code, told["error"]["message"].startswith(f"--init {ref}")) == (2, True), told["error"]


# ---- what ComfyUI takes a written file for


def test_what_to_set_in_comfyui_is_told(tiny_v, tiny_sd, tmp_path, capsys):
    write.to_file(checkpoint.load(str(tiny_v)), tmp_path / "v.safetensors")  # SD1.5: ComfyUI always takes epsilon
    told = capsys.readouterr().err
    assert 'v.safetensors: ComfyUI takes it for epsilon; put a node "ModelSamplingDiscrete" set to "v_prediction"' in told
    write.to_file(checkpoint.load(str(tiny_sd)), tmp_path / "eps.safetensors")
    assert "ComfyUI" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spread", "kind", "told"), [(0.2, "v_prediction", ""), (0.2, "epsilon", "eps"), (0.0, "v_prediction", "v_prediction")]
)
def test_sd2_is_told_by_a_bias_in_comfyui(tmp_path, capsys, spread, kind, told):
    folder = build(tmp_path / "sd2", "sd21", kind)
    base = checkpoint.load(str(folder))
    torch.manual_seed(0)
    with torch.no_grad():
        bias = base.unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias
        bias.copy_(spread * torch.randn_like(bias))
    write.to_file(base, tmp_path / "sd2.safetensors")
    message = f'set to "{told}"' if told else ""
    assert (message in capsys.readouterr().err) if told else ("ComfyUI" not in capsys.readouterr().err)
