"""What a merge keeps of its parents: the words in their headers, and every digit of their weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff import lora
from fastdiff.checkpoints import checkpoint, tensors, words
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.commands import export as exporting
from fastdiff.commands import merge_lora
from fastdiff.lora import merging
from fastdiff.lora.file import Factors, Lora
from fastdiff.runtime import console

FAST = {
    "modelspec.author": "Ann",
    "modelspec.license": "openrail++",
    "modelspec.tags": "fast, anime",
    "fastdiff.scheduler": "lcm",
    "fastdiff.num_steps": "4",
    "fastdiff.guidance": "1.0",
    "modelspec.usage_hint": "4 steps, guidance 1, scheduler lcm",
}
STYLE = {
    "modelspec.author": "Bob",
    "modelspec.license": "cc-by-nc-4.0",
    "modelspec.trigger_phrase": "zxc style, flat colors",
    "modelspec.tags": "anime,ink",
    "modelspec.usage_hint": "weight 0.6 to 0.9",
    "ss_tag_frequency": json.dumps({"10_zxc": {"zxc style": 20, "tree": 3}, "img": {"cat": 1}}),
}
OTHER = {
    "modelspec.trigger_phrase": "flat colors, dusk",
    "modelspec.license": "openrail++",
    "ss_tag_frequency": json.dumps({"img": {"cat": 2, "dog": 5}}),
}
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(autouse=True)
def _fresh():
    console.reset()


def written(path, header, seed=0, rank=4, dtype=torch.float32, width=16):
    """A LoRA of two layers in kohya's layout."""
    made = torch.Generator().manual_seed(seed)
    state = {}
    for name in ("to_q", "to_k"):
        key = LAYER.replace("to_q", name)
        state[f"{key}.lora_down.weight"] = torch.randn(rank, width, generator=made).to(dtype)
        state[f"{key}.lora_up.weight"] = (torch.randn(width, rank, generator=made) * 0.01).to(dtype)
        state[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(state, path, header)
    return path


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, (name, header) in enumerate({"fast": FAST, "style": STYLE, "other": OTHER}.items()):
        written(f"{name}.safetensors", header, seed)
    return ["fast.safetensors", "style.safetensors", "other.safetensors"]


def merge(**options):
    return merge_lora.run(merge_lora.Config(**{"accel": "fast.safetensors", "style": ["style.safetensors"], **options}))


# ---- words


def test_words_of_all_parents_are_joined_once_and_in_order(files):
    merge(style=files[1:], output="out.safetensors")
    header = tensors.open_file("out.safetensors").metadata
    assert header["modelspec.trigger_phrase"] == "zxc style, flat colors, dusk"
    assert header["modelspec.tags"] == "fast, anime, ink"
    assert header["modelspec.author"] == "Ann, Bob"
    assert header["modelspec.license"] == "openrail++ AND cc-by-nc-4.0"
    assert header["modelspec.usage_hint"] == "4 steps, guidance 1, scheduler lcm; weight 0.6 to 0.9"
    assert header["modelspec.merged_from"] == "fast.safetensors, style.safetensors, other.safetensors"
    assert json.loads(header["ss_tag_frequency"]) == {"10_zxc": {"zxc style": 20, "tree": 3}, "img": {"cat": 3, "dog": 5}}
    (warning,) = console.state.warnings
    assert "style.safetensors: cc-by-nc-4.0" in warning
    assert "all of them apply" in warning
    again = lora.merge({"out.safetensors": 1.0, "other.safetensors": 1.0})  # nothing doubles in the next generation
    assert again.metadata["modelspec.license"] == "openrail++ AND cc-by-nc-4.0"
    assert again.metadata["modelspec.trigger_phrase"] == "zxc style, flat colors, dusk"
    assert again.metadata["modelspec.usage_hint"] == "weight 0.6 to 0.9"  # `save` adds the recipe's


def test_a_hint_of_an_older_recipe_goes(files):
    merge(output="out.safetensors", num_steps=8)
    assert tensors.open_file("out.safetensors").metadata["modelspec.usage_hint"] == (
        "8 steps, guidance 1, scheduler lcm; weight 0.6 to 0.9"
    )


def test_one_licence_is_no_news_and_a_malformed_entry_is_told(files):
    merge(style=["other.safetensors"], output="out.safetensors")
    assert console.state.warnings == []
    written("odd.safetensors", {"ss_tag_frequency": "{not json"})
    merge(style=["odd.safetensors"], output="out.safetensors")
    (warning,) = console.state.warnings
    assert "odd.safetensors: its ss_tag_frequency is malformed" in warning
    assert "ss_tag_frequency" not in tensors.open_file("out.safetensors").metadata


def test_export_keeps_the_words(files):
    exporting.run(exporting.Config(lora="style.safetensors", format="diffusers", output="out.safetensors"))
    assert words.of(tensors.open_file("out.safetensors").metadata) == words.of(STYLE)


def test_a_baked_checkpoint_keeps_the_words_of_base_and_loras(files, tiny_sd, tmp_path):
    from fastdiff.checkpoints import write

    base = checkpoint.load(str(tiny_sd))
    said = {"modelspec.author": "Cleo", "modelspec.license": "openrail++", "modelspec.trigger_phrase": "photo"}
    write.to_file(base, tmp_path / "base.safetensors", said=said, force=True)
    assert words.of(tensors.open_file("base.safetensors").metadata) == said
    one = checkpoint.load("base.safetensors", config=str(tiny_sd))
    few = Recipe(scheduler="lcm", num_steps=4)  # a student says nothing of how its base is sampled
    assert write.words_for(one, few, None) == said
    one.header["modelspec.usage_hint"] = "25 steps"
    assert "modelspec.usage_hint" not in write.words_for(one, few, None)
    assert one.header.pop("modelspec.usage_hint") in write.words_for(one, None, {"modelspec.usage_hint": "25 steps"}).values()
    write.to_folder(one, tmp_path / "folder")  # a folder has no header: fastdiff.json keeps them
    folder = checkpoint.load("folder")
    assert words.of(folder.header) == said
    merging.bake(folder, files[:2], "baked.safetensors")
    header = tensors.open_file("baked.safetensors").metadata
    assert header["modelspec.author"] == "Cleo, Ann, Bob"
    assert header["modelspec.trigger_phrase"] == "photo, zxc style, flat colors"
    assert header["modelspec.license"] == "openrail++ AND cc-by-nc-4.0"
    assert header["modelspec.merged_from"] == "folder, fast.safetensors, style.safetensors"
    assert header["modelspec.usage_hint"] == "4 steps, guidance 1, scheduler lcm; weight 0.6 to 0.9"
    assert any("folder: openrail++" in text for text in console.state.warnings)
    merging.bake(folder, files[:2], "baked")
    assert words.of(checkpoint.load("baked").header) == words.of(header)
    merge(style=[], base="folder", output="with-ties", method="ties", density=1.0)
    assert checkpoint.load("with-ties").header["modelspec.author"] == "Cleo, Ann"


# ---- digits


def weights(path):
    return {k: v for k, v in load_file(path).items() if not k.endswith("alpha")}


def test_fp32_in_is_fp32_out_to_the_last_digit(files):
    result = merge(style=["style.safetensors=1"], output="out.safetensors")
    assert {v.dtype for v in weights("out.safetensors").values()} == {torch.float32}
    fast, style, made = (lora.load(path).modules for path in ("fast.safetensors", "style.safetensors", "out.safetensors"))
    for key, update in made.items():
        apart = torch.cat([fast[key].up, style[key].up], 1).double() @ torch.cat([fast[key].down, style[key].down]).double()
        assert (update.up.double() @ update.down.double() - apart).abs().max() == 0
    assert result.metrics["max_error"] < 1e-6
    assert lora.load("fast.safetensors").dtype == lora.merge(files).dtype == torch.float32


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [("float16", "float16", "float16"), ("bfloat16", "bfloat16", "bfloat16"), ("bfloat16", "float16", "float32"),
     ("float16", "float32", "float32"), ("float8_e4m3fn", "float8_e5m2", "float16")],
)  # fmt: skip
def test_the_widest_of_the_inputs(tmp_path, one, other, wanted):
    dtypes = [getattr(torch, name) for name in (one, other)]  # by its name
    assert tensors.widest(dtypes) == getattr(torch, wanted)
    if "float8" in one:
        return
    paths = [written(tmp_path / f"{i}.safetensors", {}, i, dtype=dtype) for i, dtype in enumerate(dtypes)]
    path = lora.merge(paths).save(tmp_path / "out.safetensors")
    assert {v.dtype for v in weights(path).values()} == {getattr(torch, wanted)}


def test_export_stores_what_was_stored(files):
    for format in ("kohya", "diffusers"):
        result = exporting.run(exporting.Config(lora="fast.safetensors", format=format, output="out.safetensors"))
        assert {v.dtype for v in weights("out.safetensors").values()} == {torch.float32}
        assert result.metrics["max_error"] == 0
    exporting.run(exporting.Config(lora="fast.safetensors", output="half.safetensors", precision="fp16"))
    assert {v.dtype for v in weights("half.safetensors").values()} == {torch.float16}
    assert lora.load("fast.safetensors").save("api.safetensors").read_bytes()
    assert {v.dtype for v in weights("api.safetensors").values()} == {torch.float32}
    fresh = Lora({LAYER: Factors(torch.ones(1, 16), torch.ones(16, 1))})  # of no file: fp16, as training writes it
    assert {v.dtype for v in weights(fresh.save("fresh.safetensors")).values()} == {torch.float16}


@pytest.mark.parametrize(
    "how", [dict(format="kohya"), dict(format="diffusers"), dict(format="peft"), dict(rank="3"), dict(method="ties")]
)
def test_what_rounding_costs_is_measured_in_every_layout_and_told(files, capfd, how):
    name = "out" if how.get("format") == "peft" else "out.safetensors"
    exact = merge(output=name, **how).metrics["max_error"]
    assert exact < 1e-6
    assert "rounding" not in capfd.readouterr().err
    error = merge(output=name, precision="fp16", **how).metrics["max_error"]
    assert 5e-5 < error < 2e-3
    assert f"changes a layer by up to {error:.1e} (relative)" in capfd.readouterr().err


def test_baking_keeps_the_dtype_of_the_base(files, tiny_sd):
    from fastdiff.checkpoints import write

    merge(base=str(tiny_sd), output="full")
    assert set(checkpoint.load("full").weights("unet").dtypes.values()) == {torch.float32}
    write.to_folder(checkpoint.load(str(tiny_sd)), (folder := checkpoint.Path("half")), dtype=torch.float16)
    merge(base=str(folder), output="baked")
    assert set(checkpoint.load("baked").weights("unet").dtypes.values()) == {torch.float16}
    merge(base=str(folder), output="wide", precision="fp32")
    assert set(checkpoint.load("wide").weights("unet").dtypes.values()) == {torch.float32}
    before, after = (checkpoint.load(name).weights("unet") for name in (str(tiny_sd), "full"))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    change = sum(
        w * lora.load(path).modules[LAYER].delta() for path, w in (("fast.safetensors", 1.0), ("style.safetensors", 0.8))
    )
    torch.testing.assert_close(after[name] - before[name], change, rtol=1e-4, atol=1e-6)


def test_a_difference_of_two_types_of_prediction_is_told(files, tiny_sd, tiny_v):
    merge(base=str(tiny_v), output="tuned")
    merge_lora.run(merge_lora.Config(base=str(tiny_sd), tuned="tuned", extract=True, rank="8", output="out.safetensors"))
    assert any(w.endswith("tuned predicts v: their difference is not what a training changed") for w in console.state.warnings)


def test_an_extracted_lora_has_the_dtype_of_the_checkpoints(files, tiny_sd):
    merge(base=str(tiny_sd), output="tuned")
    merge_lora.run(merge_lora.Config(base=str(tiny_sd), tuned="tuned", extract=True, rank="8", output="out.safetensors"))
    assert {v.dtype for v in weights("out.safetensors").values()} == {torch.float32}
    assert lora.load("out.safetensors").metadata["modelspec.author"] == "Ann, Bob"
