"""Few-step weights that others published: known by name, drawn with their documented settings, and never taken for another's."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastdiff import lora
from fastdiff.checkpoints import checkpoint, published, tensors
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.diffusion.samplers import SOLVERS
from fastdiff.lora import apply
from fastdiff.lora.adapters import TARGETS
from fastdiff.options.merge_lora import Config
from fastdiff.runtime import console
from fastdiff.runtime.errors import UsageError
from fastdiff.sampling.settings import Settings

LORAS = {
    "lcm-lora-sdv1-5": "lcm",
    "LCM_LoRA_Weights_SD15": "lcm",
    "LCM_LoRA_SDXL": "lcm",
    "lcm-lora-ssd-1b_fp16": "lcm",
    "sdxl_lcm_lora": "lcm",
    "sdxl_lightning_2step_lora": "lightning-2",
    "sdxl_lightning_4step_lora": "lightning-4",
    "sdxl_lightning_8step_lora (1)": "lightning-8",
    "Hyper-SD15-1step-lora": "hyper-1",
    "Hyper-SDXL-1step-lora": "hyper-1",
    "Hyper-SD15-2steps-lora": "hyper-2",
    "Hyper-SDXL-4steps-lora": "hyper-4",
    "sdxl_hyper_sd_4step_lora": "hyper-4",
    "Hyper-SDXL-8steps-lora": "hyper-8",
    "Hyper-SD15-8steps-CFG-lora": "hyper-8-cfg",
    "Hyper-SDXL-12steps-CFG-lora": "hyper-12-cfg",
    "dmd2_sdxl_4step_lora": "dmd2",
    "dmd2_sdxl_4step_lora_fp16": "dmd2",
    "TCD-SD15-LoRA": "tcd",
    "tcd-sdxl-lora": "tcd",
    "pcm_sd15_smallcfg_2step_converted": "pcm-2",
    "pcm_sdxl_smallcfg_16step": "pcm-16",
    "pcm_sdxl_normalcfg_4step_converted": "pcm-4-cfg",
    "pcm_sd15_normalcfg_8step_converted": "pcm-8-cfg",
    "pcm_sdxl_lcmlike_lora_converted": "pcm-lcm",
}
WHOLE = {
    "sd_xl_turbo_1.0_fp16": "turbo",
    "sd_xl_turbo_1.0": "turbo",
    "sd_turbo": "turbo",
    "sdxl_lightning_4step": "lightning-4",
    "sdxl_lightning_8step_unet": "lightning-8",
    "sdxl_lightning_1step_x0": "lightning-1",
    "sdxl_lightning_1step_unet_x0": "lightning-1",
    "Hyper-SDXL-1step-Unet-Comfyui.fp16": "hyper-1-unet",
    "dmd2_sdxl_4step_unet_fp16": "dmd2",
    "dmd2_sdxl_1step_unet_fp16": "dmd2-1",
    "LCM_Dreamshaper_v7_4k": "lcm-full",
}
NOT = (
    "lcm", "lcm-style", "lcm-lora-sdv1-5-anime", "anime-lcm-lora-sdxl", "my_sdxl_lightning_4step_lora", "lightning", "dmd2",
    "sdxl_lightning_lora", "hyper_style_8step", "turbo", "tcd", "flash-sdxl", "pcm_sdxl_4step", "DreamShaperXL_Turbo_v2",
    "sdxl_lightning_4step_lora_merged", "pytorch_lora_weights",
)  # fmt: skip
# What the authors' pages say. Their guidance 0 or 1 is none, which is 1 here.
DOCUMENTED = {
    "lcm": dict(scheduler="lcm", num_steps=4, guidance=1.0),
    "lightning-1": dict(scheduler="euler", spacing="trailing", num_steps=1, guidance=1.0, prediction_type="sample"),
    "lightning-4": dict(scheduler="euler", spacing="trailing", num_steps=4, guidance=1.0),
    "hyper-1": dict(scheduler="tcd", num_steps=1, guidance=1.0, eta=1.0, step_counts=(1, 2, 3, 4, 5, 6, 7, 8)),
    "hyper-1-unet": dict(scheduler="lcm", num_steps=1, guidance=1.0, timesteps=(800,)),
    "hyper-8": dict(scheduler="ddim", spacing="trailing", num_steps=8, guidance=1.0),
    "hyper-8-cfg": dict(scheduler="ddim", spacing="trailing", num_steps=8, guidance=5.0),
    "dmd2": dict(scheduler="lcm", num_steps=4, guidance=1.0, timesteps=(999, 749, 499, 249)),
    "dmd2-1": dict(scheduler="lcm", num_steps=1, guidance=1.0, timesteps=(399,)),
    "tcd": dict(scheduler="tcd", num_steps=4, guidance=1.0, eta=0.3),
    "pcm-4": dict(scheduler="ddim", spacing="trailing", num_steps=4, guidance=1.0),
    "pcm-4-cfg": dict(scheduler="ddim", spacing="trailing", num_steps=4, guidance=3.0),
    "pcm-lcm": dict(scheduler="lcm", num_steps=4, guidance=1.0),
    "flash": dict(scheduler="lcm", num_steps=4, guidance=1.0),
    "turbo": dict(scheduler="euler", spacing="trailing", num_steps=1, guidance=1.0, step_counts=(1, 2, 3, 4)),
}


def known(path, metadata=None, **how):
    found = published.recognised(Path(path), metadata or {}, **how)
    return found and found.row.name


def test_the_names_that_were_published_are_known_and_no_others():
    assert {name: known(f"{name}.safetensors") for name in LORAS} == LORAS
    assert {name: known(f"{name}.safetensors", whole=True) for name in WHOLE} == WHOLE
    taken = [name for name in (*NOT, *WHOLE) if known(f"loras/{name}.safetensors")]
    assert taken == []
    assert [name for name in (*NOT[:-3], *LORAS) if known(f"{name}.safetensors", whole=True)] == []


def test_a_file_without_a_name_of_its_own_is_known_by_its_folder():
    file = "pytorch_lora_weights.safetensors"
    hub = lambda owner, name: f"/cache/models--{owner}--{name}/snapshots/0123abcd/{file}"
    assert known(hub("latent-consistency", "lcm-lora-sdxl")) == "lcm"
    assert known(hub("jasperai", "flash-sd")) == "flash"
    assert known(hub("h1t", "TCD-SD15-LoRA")) == "tcd"
    assert known(hub("somebody", "lcm-lora-sdxl-of-cats")) is None
    assert known(f"loras/lcm-lora-ssd-1b/{file}") == "lcm"  # downloaded into a folder of the repository's name
    assert known(f"loras/flash-sdxl/{file}") == "flash"
    assert known(f"loras/style/{file}") is None
    turbo = "/cache/models--stabilityai--sdxl-turbo/snapshots/0123abcd"
    assert known(turbo, whole=True) == "turbo"
    assert known("/data/x", whole=True, ref="stabilityai/sd-turbo") == "turbo"
    assert known(turbo) is None  # a LoRA that somebody left there


def test_the_header_may_tell_and_may_forbid():
    titled = {"modelspec.title": "sdxl_lightning_4step_lora"}
    assert known("renamed.safetensors", titled) == "lightning-4"
    assert known("sdxl_lightning_4step_lora.safetensors", titled) == "lightning-4"
    assert known("sdxl_lightning_8step_lora.safetensors", titled) is None  # name and title disagree
    for entry in ("ss_dataset_dirs", "ss_tag_frequency"):
        assert known("lcm-lora-sdv1-5.safetensors", {entry: "{}"}) is None
    assert known("lcm-lora-sdv1-5.safetensors", {"fastdiff.scheduler": "ddim"}) is None
    assert known("Hyper-SDXL-8steps-lora.safetensors", family="sd21") is None  # its tensors are for another network
    assert known("Hyper-SDXL-8steps-lora.safetensors", family="sdxl") == "hyper-8"


def test_the_settings_are_those_that_the_authors_document():
    for name, wanted in DOCUMENTED.items():
        stated = {k: v for k, v in asdict(published.BY_NAME[name].recipe).items() if v is not None and k != "method"}
        assert stated == wanted, name
    for row in published.ROWS:
        settings = Settings.of(row.recipe, Settings())
        assert settings.scheduler in SOLVERS
        assert (settings.num_steps, settings.guidance) == (row.recipe.num_steps, row.recipe.guidance)
        assert settings.timesteps == row.recipe.timesteps
        assert Recipe.from_metadata(row.recipe.to_metadata()) == row.recipe
    assert len(published.BY_NAME) == len(published.ROWS)


def test_a_recipe_by_name_and_single_settings_over_it():
    assert published.named("none") == Recipe()
    with pytest.raises(UsageError, match="`recipe=lcm2`: no such recipe") as caught:
        published.named("lcm2")
    assert all(name in caught.value.hint for name in published.BY_NAME)
    made = lambda **options: Config(**options).recipe_from(None)
    assert made() is None
    dmd2 = published.BY_NAME["dmd2"].recipe
    assert made(recipe="dmd2") == dmd2
    assert made(recipe="dmd2", guidance=1.5).timesteps == dmd2.timesteps
    assert made(recipe="dmd2", num_steps=2).timesteps is None  # they were those of four steps
    assert made(recipe="dmd2", timesteps="999,499").num_steps == 2
    assert made(recipe="hyper-1", num_steps=4).step_counts is None
    assert made(recipe="tcd", scheduler="lcm").eta is None
    assert made(scheduler="lcm", num_steps=4).num_steps == 4
    with pytest.raises(UsageError, match="`guidance=2.0`: there is no recipe to change"):
        made(guidance=2.0)
    for wrong in ("249,999", "a", "", "1000", "5,5"):
        with pytest.raises(UsageError, match="needs numbers from 999 down to 0"):
            made(recipe="lcm", timesteps=wrong)


# ---- files


def tensors_of(net, rank=4, prefix="lora_unet_", scale=0.01, alpha=None):
    """kohya's tensors of a random LoRA on every layer of a network that LCM-LoRA has."""
    made = torch.Generator().manual_seed(rank)
    result = {}
    for key, name in apply.names(net, prefix).items():
        if prefix == "lora_unet_" and not name.endswith(TARGETS):
            continue
        out, inside, *kernel = net.get_submodule(name).weight.shape
        result[f"{key}.lora_down.weight"] = torch.randn(rank, inside, *kernel, generator=made) * scale
        result[f"{key}.lora_up.weight"] = torch.randn(out, rank, *[1] * len(kernel), generator=made) * scale
        result[f"{key}.alpha"] = torch.tensor(float(alpha or rank))
    return result


@pytest.fixture(scope="module")
def few(tiny_sd):
    made = tensors_of(checkpoint.load(str(tiny_sd)).unet)
    return dict(list(made.items())[: 3 * 40])  # of 40 layers, which take less time to merge


@pytest.fixture(scope="module")
def text(tiny_sd):
    return tensors_of(checkpoint.load(str(tiny_sd)).text_encoders[0], prefix="lora_te_")


def test_a_loaded_file_has_the_recipe_and_one_line_says_so(few, text, tmp_path, capfd):
    console.reset()
    path = tmp_path / "lcm-lora-sdv1-5.safetensors"
    save_file(few, path)
    for _ in range(2):
        item = lora.load(path)
    assert (item.recipe.scheduler, item.recipe.num_steps, item.recipe.guidance) == ("lcm", 4, 1.0)
    assert capfd.readouterr().err.count("LCM-LoRA, by its name: 4 steps, scheduler lcm, guidance 1") == 1
    assert lora.load(path, recognise=False).recipe == Recipe()
    assert lora.outline(tensors.open_file(path)).recipe == item.recipe  # the header is enough
    item.save(tmp_path / "copy.safetensors")
    assert lora.load(tmp_path / "copy.safetensors").recipe == item.recipe
    save_file(few, path, {"fastdiff.scheduler": "ddim", "fastdiff.num_steps": "7"})  # our header wins
    assert (lora.load(path).recipe.scheduler, lora.load(path).recipe.num_steps) == ("ddim", 7)
    save_file({**few, **text}, path)  # a few-step LoRA leaves text encoders alone
    assert lora.load(path).recipe == Recipe()
    assert console.state.warnings == []


def test_what_is_built_like_one_but_has_no_name_is_told(tiny_sd, tmp_path):
    net = checkpoint.load(str(tiny_sd)).unet
    looks = "looks like a few-step LoRA"
    warned = []
    for name, rank, alpha, header in (
        ("fast", 64, None, {}), ("small", 8, None, {}), ("scaled", 64, 32, {}), ("trained", 64, None, {"ss_tag_frequency": "{}"}),
    ):  # fmt: skip
        console.reset()
        made = tensors_of(net, rank, alpha=alpha)
        save_file(made, tmp_path / f"{name}.safetensors", header)
        assert lora.load(tmp_path / f"{name}.safetensors").recipe == Recipe()
        warned += [name for text in console.state.warnings if looks in text and "`recipe`" in text]
    assert warned == ["fast"]


def settings_of(result):
    return {k: result["metrics"]["settings"][k] for k in ("scheduler", "num_steps", "guidance")}


def test_sample_obeys_it_and_recipe_overrides_it(fastdiff, tiny_sd, few):
    save_file(few, "lcm-lora-sdv1-5.safetensors")
    draw = ["sample", "--base", tiny_sd, "--lora", "lcm-lora-sdv1-5.safetensors", "--prompt", "a cat", "--device", "cpu"]
    code, result = fastdiff(*draw, "-o", "a.png")
    assert code == 0
    assert result["metrics"]["calls"] == 4
    assert settings_of(result) == {"scheduler": "lcm", "num_steps": 4, "guidance": 1.0}
    code, result = fastdiff(*draw, "-o", "b.png", "--recipe", "lightning-2")
    assert settings_of(result) == {"scheduler": "euler", "num_steps": 2, "guidance": 1.0}
    code, result = fastdiff(*draw, "-o", "c.png", "--recipe", "none", "--num-steps", "1")
    assert settings_of(result) == {"scheduler": "dpm++", "num_steps": 1, "guidance": 7.5}
    code, result = fastdiff(*draw, "-o", "d.png", "--recipe", "lcm2")
    assert code == 2
    assert "--recipe lcm2: no such recipe" in result["error"]["message"]
    assert "hyper-8-cfg" in result["error"]["hint"]


def test_inspect_says_what_it_is(fastdiff, few, tiny_sdxl):
    save_file(few, "Hyper-SD15-8steps-CFG-lora.safetensors")
    facts = fastdiff("inspect", "Hyper-SD15-8steps-CFG-lora.safetensors")[1]["metrics"]
    assert (facts["published"], facts["published_by"]) == ("hyper-8-cfg", "its name")
    assert (facts["recipe"]["num_steps"], facts["recipe"]["guidance"]) == (8, 5.0)
    save_file(few, "style.safetensors")
    facts = fastdiff("inspect", "style.safetensors")[1]["metrics"]
    assert "published" not in facts
    assert facts["recipe"] == {}
    shutil.copytree(tiny_sdxl, "sdxl-turbo")
    facts = fastdiff("inspect", "sdxl-turbo")[1]["metrics"]
    assert (facts["published"], facts["recipe"]["num_steps"]) == ("turbo", 1)


def test_a_published_checkpoint_is_known_by_its_name(tiny_sd, tiny_sdxl, tmp_path, capfd):
    console.reset()
    shutil.copytree(tiny_sdxl, tmp_path / "sdxl-turbo")
    base = checkpoint.load(str(tmp_path / "sdxl-turbo"))
    assert (base.recipe.scheduler, base.recipe.num_steps, base.recipe.guidance) == ("euler", 1, 1.0)
    assert base.recipe.own_counts == (1, 2, 3, 4)
    assert capfd.readouterr().err.count("SD-Turbo or SDXL-Turbo, by its name: 1, 2, 3 or 4 steps") == 1
    (tmp_path / "sdxl-turbo" / "fastdiff.json").write_text('{"fastdiff.num_steps": "6"}')  # our own file wins
    assert checkpoint.load(str(tmp_path / "sdxl-turbo")).recipe == Recipe(num_steps=6)
    shutil.copytree(tiny_sd, tmp_path / "sd-turbo")  # a network that no Turbo has
    assert checkpoint.load(str(tmp_path / "sd-turbo")).recipe == Recipe()
    assert checkpoint.load(str(tiny_sdxl)).recipe == Recipe()


def test_merge_lora_keeps_and_attaches_recipes(fastdiff, few, text):
    save_file(few, "sdxl_lightning_4step_lora.safetensors")
    save_file(few, "renamed.safetensors")
    save_file({**few, **text}, "anime.safetensors")
    merge = lambda accel, *more: fastdiff("merge-lora", "--accel", f"{accel}.safetensors", "--style", "anime.safetensors",
                                          "-o", "out.safetensors", *more)  # fmt: skip
    code, result = merge("sdxl_lightning_4step_lora")
    assert code == 0
    assert result["warnings"] == []
    assert lora.load("out.safetensors").recipe == Recipe("lightning", None, "euler", "trailing", 4, None, 1.0)
    code, result = merge("renamed")
    (warning,) = result["warnings"]
    assert "--accel renamed.safetensors: no recipe is known for it" in warning
    assert "--recipe NAME" in warning
    assert lora.load("out.safetensors").recipe == Recipe()
    code, result = merge("renamed", "--recipe", "dmd2")
    assert result["warnings"] == []
    assert lora.load("out.safetensors").recipe.timesteps == (999, 749, 499, 249)
    code, result = merge("renamed", "--recipe", "lcm", "--num-steps", "6", "--guidance", "1.5")
    made = lora.load("out.safetensors")
    assert (made.recipe.scheduler, made.recipe.num_steps, made.recipe.guidance) == ("lcm", 6, 1.5)
    assert made.metadata["modelspec.usage_hint"] == "6 steps, guidance 1.5, scheduler lcm"
    code, result = merge("sdxl_lightning_4step_lora", "--recipe", "none")
    assert result["warnings"] == []
    assert lora.load("out.safetensors").recipe == Recipe()
    code, result = merge("renamed", "--recipe", "lcm2")
    assert code == 2
    assert "lightning-4" in result["error"]["hint"]


def test_a_second_recipe_is_told(fastdiff, few):
    for name in ("sdxl_lightning_4step_lora", "Hyper-SDXL-8steps-lora", "renamed"):
        save_file(few, f"{name}.safetensors")
    both = ["--accel", "sdxl_lightning_4step_lora.safetensors", "--style", "Hyper-SDXL-8steps-lora.safetensors=1"]
    code, result = fastdiff("merge-lora", *both, "-o", "out.safetensors")
    (warning,) = result["warnings"]
    assert warning.startswith("Hyper-SDXL-8steps-lora.safetensors: has a recipe of its own (8 steps, scheduler ddim")
    assert "that of sdxl_lightning_4step_lora.safetensors is used" in warning
    # Where the accel has none, the style's is what the separate LoRAs would be drawn with.
    both[1] = "renamed.safetensors"
    code, result = fastdiff("merge-lora", *both, "-o", "out.safetensors")
    assert lora.load("out.safetensors").recipe.num_steps == 8


def test_doubtful_recipes_are_told(fastdiff, tiny_sd, few):
    save_file(few, "renamed.safetensors")
    draw = ["sample", "--base", tiny_sd, "--prompt", "a cat", "--resolution", 64, "--device", "cpu", "-o", "a.png"]
    code, told = fastdiff(*draw, "--lora", "renamed.safetensors", "--recipe", "Lightning-4")
    assert code == 0, told["error"]
    assert any("SDXL-Lightning, 4 steps was made for sdxl, and these weights are for sd15" in w for w in told["warnings"])
    code, told = fastdiff(*draw, "--lora", "renamed.safetensors", "--recipe", "lcm", "--eta", "0.5")
    assert "--eta has no effect with lcm" in told["warnings"][0]
    both = ["merge-lora", "--accel", "renamed.safetensors", "--style", "renamed.safetensors", "-o", "out.safetensors"]
    code, told = fastdiff(*both, "--recipe", "lcm", "--eta", "0.5")
    assert (code, "tcd alone" in told["error"]["message"]) == (2, True)
    code, told = fastdiff("merge-lora", "--accel", "renamed.safetensors", "--base", tiny_sd, "-o", "fast", "--recipe", "turbo")
    assert "was made for sd21 and sdxl, and these weights are for sd15" in told["warnings"][0]
    save_file(few, "lcm-lora-sdv1-5.safetensors")
    assert fastdiff("merge-lora", "--accel", "lcm-lora-sdv1-5.safetensors", "--base", tiny_sd, "-o", "fast")[0] == 0
    draw[2] = "fast"
    code, told = fastdiff(*draw, "--lora", "renamed.safetensors", "--recipe", "auto")
    assert told["warnings"] == []  # the LoRA has none
    save_file(few, "TCD-SD15-LoRA.safetensors")
    code, told = fastdiff(*draw, "--lora", "TCD-SD15-LoRA.safetensors")
    (warning,) = told["warnings"]
    assert warning.startswith(
        "fast: a few-step checkpoint, whose recipe (4 steps, scheduler lcm, guidance 1) gives way to that of"
    )


def test_a_baked_checkpoint_has_the_recipe_of_the_lora_or_of_the_base(fastdiff, tiny_sd, few):
    save_file(few, "lcm-lora-sdv1-5.safetensors")
    save_file(few, "style.safetensors")
    bake = lambda base, name, *more: fastdiff("merge-lora", "--accel", f"{name}.safetensors", "--base", base, "-o", "out", *more)
    assert bake(tiny_sd, "lcm-lora-sdv1-5")[0] == 0
    assert checkpoint.load("out").recipe.scheduler == "lcm"
    shutil.copytree("out", "fast")
    code, result = bake("fast", "style")  # a style for a checkpoint that is fast already
    assert result["warnings"] == []
    assert checkpoint.load("out").recipe.num_steps == 4
    code, result = bake(tiny_sd, "style")
    assert "no recipe is known for it" in result["warnings"][0]
    bake(tiny_sd, "style", "--recipe", "tcd", "--eta", "0.5")
    assert (checkpoint.load("out").recipe.scheduler, checkpoint.load("out").recipe.eta) == ("tcd", 0.5)
