"""Damaged and malicious inputs of every kind: one line that names the file, exit code 3, and no work before it."""

import json
import shutil
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff.checkpoints import pickles, vae_file
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.runtime.errors import InputRefused


@pytest.fixture
def refused(fastdiff):
    """Run a command that must end with exit code 3 and a message that names `where`; returns that message."""

    def run(where, *args):
        code, answer = fastdiff(*args)
        assert code == 3, answer
        message = answer["error"]["message"]
        assert answer["error"]["kind"] == "input"
        assert str(where) in message
        assert "\n" not in message
        return message

    return run


@pytest.fixture
def sampled(refused):
    """`refused` for `sample` from a base."""
    return lambda where, base, *more: refused(
        where, "sample", "--base", base, "--prompt", "x", "--num-steps", 1, "--resolution", 64, "-o", "out", *more
    )


@pytest.fixture
def copied(tiny_sd, tmp_path):
    """A copy of the tiny checkpoint whose JSON file `name` gets other entries, or another text."""

    def make(name, change):
        folder = shutil.copytree(tiny_sd, tmp_path / "damaged")
        path = folder / name
        if isinstance(change, str):
            path.write_text(change)
        else:
            content = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({k: v for k, v in {**content, **change}.items() if v is not ...}))
        return folder

    return make


@pytest.fixture(scope="module")
def kl(tiny_sd):
    return load_file(tiny_sd / "vae" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def taesd():
    """The decoder of a small TAESD, under its own names: a convolution, a block, and another convolution."""
    wide = lambda n: torch.zeros(n, 8, 3, 3)
    block = {f"3.conv.{i}.{k}": v for i in (0, 2, 4) for k, v in (("weight", wide(8)), ("bias", torch.zeros(8)))}
    return {"1.weight": torch.zeros(8, 4, 3, 3), "1.bias": torch.zeros(8), **block, "4.weight": wide(3), "4.bias": torch.zeros(3)}


@pytest.fixture(scope="module")
def style():
    """A small LoRA in kohya's layout."""
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    down, up = torch.ones(4, 16), torch.ones(16, 4)
    return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}


# ---- VAE files


LACKING = ("encoder.conv_in.weight", "decoder.conv_out.weight", "decoder.conv_in.weight")


@pytest.mark.parametrize("name", LACKING)
def test_a_vae_that_lacks_an_outer_layer(name, kl, tiny_sd, sampled):
    save_file({k: v for k, v in kl.items() if k != name}, "vae.safetensors")
    sampled("vae.safetensors", tiny_sd, "--vae", "vae.safetensors")


@pytest.mark.parametrize("name", LACKING)
def test_a_vae_whose_outer_layer_is_no_convolution(name, kl, tiny_sd, sampled):
    save_file({**kl, name: torch.zeros(8)}, "vae.safetensors")
    assert f"{name} is (8,)" in sampled("vae.safetensors", tiny_sd, "--vae", "vae.safetensors")


def test_a_vae_with_a_layer_of_another_size(kl, tiny_sd, sampled):
    save_file({**kl, "decoder.mid_block.resnets.0.conv1.weight": torch.zeros(3, 3)}, "vae.safetensors")
    assert "conv1.weight is (3, 3)" in sampled("vae.safetensors", tiny_sd, "--vae", "vae.safetensors")


def taesd_variants(decoder):
    """Damaged files of TAESD by what is wrong with them."""
    one = torch.zeros(1)
    first = torch.zeros(8, 4, 3, 3)
    return {
        "encoder alone": {f"taesd_encoder.{k}": v for k, v in decoder.items()},
        "no number": {"taesd_decoder.x.y": one},
        "no name": {"taesd_decoder.1": one},
        "diffusers, no number": {"decoder.layers.x.weight": first, "decoder.layers.0.weight": first.clone()},
        "diffusers, no name": {"decoder.layers.0": first},
        "first layer of one axis": {**decoder, "1.weight": torch.zeros(3)},
        "one layer": {"1.weight": first},
        "one layer, diffusers": {"decoder.layers.0.weight": first},
        "a layer far away": {**decoder, "999.weight": torch.zeros(3)},
        "lacks its end": {k: v for k, v in decoder.items() if not k.startswith("4.")},
    }


@pytest.mark.parametrize("wrong", taesd_variants({}))
def test_damaged_files_of_taesd(wrong, taesd, tiny_sd, sampled):
    save_file(taesd_variants(taesd)[wrong], "small.safetensors")
    sampled("small.safetensors", tiny_sd, "--vae", "small.safetensors")


def test_taesd_encoder_under_its_prefix_is_refused_as_the_plain_one(taesd, tmp_path):
    save_file({f"taesd_encoder.{k}": v for k, v in taesd.items()}, tmp_path / "a.safetensors")
    with pytest.raises(InputRefused, match=r"a\.safetensors.*TAESD's encoder, which draws no pictures"):
        vae_file.read(tmp_path / "a.safetensors", "a.safetensors", "vae", like={})


# ---- folders


WRONG = {  # file, its new entries, what the message names
    "width text": ("unet/config.json", {"block_out_channels": "abc"}, "block_out_channels"),
    "widths lacking": ("unet/config.json", {"block_out_channels": ...}, "block_out_channels"),
    "widths huge": ("unet/config.json", {"block_out_channels": [10**9] * 4}, "block_out_channels"),
    "layers huge": ("unet/config.json", {"layers_per_block": 10**6}, "layers_per_block"),
    "levels": ("unet/config.json", {"block_out_channels": [16, 32, 32]}, "down_block_types"),
    "sample size": ("unet/config.json", {"sample_size": "x"}, "sample_size"),
    "guidance input": ("unet/config.json", {"time_cond_proj_dim": "abc"}, "time_cond_proj_dim"),
    "text width": ("unet/config.json", {"cross_attention_dim": None}, "cross_attention_dim"),
    "block class": ("unet/config.json", {"down_block_types": ["EvilBlock2D"] * 4}, "EvilBlock2D"),
    "no json": ("unet/config.json", "nonsense", "JSON"),
    "vae widths": ("vae/config.json", {"block_out_channels": None}, "block_out_channels"),
    "vae scale": ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor"),
    "vae list": ("vae/config.json", "[]", "JSON object"),
    "text size": ("text_encoder/config.json", {"hidden_size": 0}, "hidden_size"),
    "text layers": ("text_encoder/config.json", {"num_hidden_layers": "two"}, "num_hidden_layers"),
    "timesteps": ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}, "num_train_timesteps"),
    "betas": ("scheduler/scheduler_config.json", {"beta_start": "a"}, "beta_start"),
    "betas above 1": ("scheduler/scheduler_config.json", {"beta_end": 30}, "betas"),
    "beta kind": ("scheduler/scheduler_config.json", {"beta_schedule": "weird"}, "weird"),
    "prediction": ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type"),
    "offset": ("scheduler/scheduler_config.json", {"steps_offset": "x"}, "steps_offset"),
    "scheduler text": ("scheduler/scheduler_config.json", "nonsense", "JSON"),
    "header number": ("fastdiff.json", {"fastdiff.num_steps": "abc"}, "num_steps"),
    "header scheduler": ("fastdiff.json", {"fastdiff.scheduler": "evil"}, "scheduler"),
    "header type": ("fastdiff.json", {"fastdiff.num_steps": 3}, "num_steps"),
    "header list": ("fastdiff.json", "[]", "JSON object"),
    "header no json": ("fastdiff.json", "nonsense", "JSON"),
    "tokenizer": ("tokenizer/tokenizer.json", "x", "tokenizer"),
    "tokenizer empty": ("tokenizer/tokenizer.json", "{}", "tokenizer"),
    "tokenizer settings": ("tokenizer/tokenizer_config.json", "x", "JSON"),
    "tokenizer length": ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "model_max_length"),
    "tokenizer too long": ("tokenizer/tokenizer_config.json", {"model_max_length": 77}, "takes 12 tokens"),
    "tokenizer lacking": ("model_index.json", {"tokenizer": "x"}, "0 tokenizers"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_damaged_folders(wrong, copied, sampled, fastdiff):
    """`sample` refuses the folder, and `inspect` says without an error that it is not supported."""
    name, change, told = WRONG[wrong]
    folder, start = copied(name, change), time.process_time()
    assert told in sampled(folder, folder)
    code, answer = fastdiff("inspect", folder)
    assert code == 0
    assert answer["metrics"]["supported"] is False
    assert told in answer["metrics"]["why_not"]
    assert time.process_time() - start < 15  # 1e9 channels took half a minute; the first network imports diffusers


INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize("shard", [".", "..", "", "a\0b", "a" * 5000, "\ud800", "../vae/model.safetensors"])
def test_a_shard_without_a_plain_file_name(shard, copied, sampled):
    folder = copied(INDEX, {"weight_map": {"conv_in.weight": shard}})
    sampled(folder / INDEX, folder)


def test_an_index_that_is_nested_too_deep(copied, sampled):
    folder = copied(INDEX, '{"weight_map":' + "[" * 100_000)
    sampled(folder / INDEX, folder)


def test_an_index_that_lists_part_of_the_shards(copied, sampled):
    folder = copied(INDEX, {"weight_map": {"conv_in.weight": "a.safetensors"}})
    whole = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({k: v for k, v in whole.items() if "up_blocks.1" not in k}, folder / "unet" / "a.safetensors")
    assert "layers are missing: up_blocks.1" in sampled(folder / "unet", folder)


def test_a_scheduler_class_that_is_none_makes_no_pipeline(copied):
    from fastdiff.checkpoints import checkpoint

    folder = copied("scheduler/scheduler_config.json", {"_class_name": "os"})
    with pytest.raises(InputRefused, match=r"scheduler_config\.json: _class_name is .os., which is no scheduler"):
        checkpoint.load(str(folder)).pipeline()


# ---- headers of LoRAs


HEADERS = {
    "scheduler": "evil", "spacing": "evil", "num_steps": "0", "step_counts": "0,-1", "eta": "7", "guidance": "nan",
    "timesteps": "5,7",
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_with_settings_that_nobody_can_sample_with(name, style, tiny_sd, sampled, fastdiff):
    save_file(style, "style.safetensors", metadata={f"fastdiff.{name}": HEADERS[name]})
    told = f"the header is malformed (fastdiff.{name} is '{HEADERS[name]}')"
    assert told in sampled("style.safetensors", tiny_sd, "--lora", "style.safetensors")
    code, answer = fastdiff("inspect", "style.safetensors")
    assert code == 0
    assert answer["metrics"]["why_not"] == told


def test_settings_that_can_be_sampled_with_pass():
    recipe = Recipe("dmd", "sd15", "lcm", "trailing", 4, (999, 749, 499, 249), 0.0, 1.0, "epsilon", None, (1, 4, 1000))
    assert Recipe.from_metadata(recipe.to_metadata()) == recipe


def test_header_entries_nested_too_deep(style, tiny_sd, sampled, fastdiff):
    save_file(style, "style.safetensors", metadata={"lora_adapter_metadata": "[" * 100_000})
    assert "nested too deep" in sampled("style.safetensors", tiny_sd, "--lora", "style.safetensors")
    save_file(style, "style.safetensors", metadata={"ss_network_args": "[" * 100_000})  # malformed, it is left aside as ever
    code, answer = fastdiff("inspect", "style.safetensors")
    assert code == 0
    assert answer["metrics"]["supported"]


# ---- pickles, and files that claim more than they hold


def test_inspect_reads_the_numbers_of_a_pickled_lora(style, fastdiff):
    torch.save(style, "style.pt")
    code, answer = fastdiff("inspect", "style.pt")
    facts = answer["metrics"]
    assert code == 3
    assert facts["content"] == "LoRA"
    assert facts["safe_with_allow_pickle"]
    assert facts["supported"]
    assert facts["scales"] == [0.5]


@pytest.mark.parametrize(
    ("what", "told"), [("sparse", "sparse"), ("meta", "has no numbers"), ("strides", "claims 400000000000000 bytes")]
)
def test_pickled_tensors_that_the_file_does_not_hold(what, told, style, tiny_sd, sampled, fastdiff):
    made = {
        "sparse": lambda: torch.ones(2).to_sparse(),
        "meta": lambda: torch.zeros(4, 16, device="meta"),
        "strides": lambda: torch.zeros(1).expand(10**7, 10**7),
    }
    torch.save({**style, next(iter(style)): made[what]()}, "style.pt")
    assert told in sampled("style.pt", tiny_sd, "--lora", "style.pt", "--allow-pickle")
    code, answer = fastdiff("inspect", "style.pt")
    assert code == 3
    assert answer["error"]["kind"] == "input"
    assert not answer["metrics"]["supported"]


def test_a_pickle_that_inflates_is_not_taken_apart(tiny_sd, sampled, fastdiff):
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00(" + b"N0" * 4_000_000 + b"u.")
    start = time.process_time()
    assert "a packed pickle" in sampled("bomb.pt", tiny_sd, "--lora", "bomb.pt", "--allow-pickle")
    code, answer = fastdiff("inspect", "bomb.pt")
    assert code == 3
    assert answer["metrics"]["safe"] is False
    assert time.process_time() - start < 5


def test_a_pickle_of_endless_instructions(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MOST_CODES", 1000)
    (tmp_path / "long.pt").write_bytes(b"\x80\x02}q\x00(" + b"N0" * 1000 + b"u.")
    with pytest.raises(InputRefused, match=r"long\.pt: a pickle of more than 1000 instructions"):
        pickles.imported(tmp_path / "long.pt")


def test_a_file_of_too_many_tensors(tiny_sd, sampled, fastdiff):
    row = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    head = json.dumps({f"lora_unet_x{i}.lora_down.weight": row for i in range(101_000)}).encode()
    with open("many.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
    start = time.process_time()
    assert "101000 tensors" in sampled("many.safetensors", tiny_sd, "--lora", "many.safetensors")
    assert time.process_time() - start < 5


# ---- what `inspect` says of parts of a model


OPENED = ["sample --vae", "export --vae"]


def test_inspect_of_vaes(kl, taesd, tiny_sd, fastdiff):
    save_file(kl, "kl.safetensors")
    save_file(taesd, "small_decoder.safetensors")
    save_file({f"taesd_decoder.{k}": v for k, v in taesd.items()}, "both.safetensors")
    save_file({f"first_stage_model.{k}": v for k, v in kl.items()}, "prefixed.safetensors")
    for name in ("kl", "small_decoder", "both", "prefixed"):
        facts = fastdiff("inspect", f"{name}.safetensors")[1]["metrics"]
        assert (facts["kind"], facts["supported"], facts["commands"]) == ("VAE", True, OPENED), name
    facts = fastdiff("inspect", tiny_sd / "vae")[1]["metrics"]
    assert (facts["kind"], facts["supported"], facts["commands"]) == ("VAE", True, OPENED)
    save_file({k: v for k, v in kl.items() if k != "decoder.conv_out.weight"}, "cut.safetensors")
    facts = fastdiff("inspect", "cut.safetensors")[1]["metrics"]
    assert facts["kind"] == "VAE"
    assert not facts["supported"]
    assert "decoder.conv_out.weight" in facts["why_not"]


def test_inspect_of_a_vaes_folder_without_a_layer(kl, tiny_sd, tmp_path, fastdiff):
    folder = shutil.copytree(tiny_sd / "vae", tmp_path / "vae")
    save_file({k: v for k, v in kl.items() if k != "quant_conv.bias"}, folder / "diffusion_pytorch_model.safetensors")
    facts = fastdiff("inspect", folder)[1]["metrics"]
    assert facts["kind"] == "VAE"
    assert not facts["supported"]
    assert "quant_conv.bias" in facts["why_not"]


def test_inspect_of_other_parts_names_no_option_that_was_not_given(tiny_sd, tiny_controlnet, fastdiff):
    for part, kind in (("unet", "UNet"), ("text_encoder", "other")):
        code, answer = fastdiff("inspect", tiny_sd / part)
        facts = answer["metrics"]
        assert code == 0
        assert facts["kind"] == kind
        assert not facts["supported"]
        assert "not a base model" in facts["why_not"]
        assert "--base" not in facts["why_not"]
    facts = fastdiff("inspect", tiny_controlnet)[1]["metrics"]
    assert (facts["kind"], facts["supported"], facts["commands"]) == ("ControlNet", True, ["sample --controlnet"])


def test_a_vae_or_a_lora_given_as_base(kl, style, fastdiff, refused):
    save_file(kl, "kl.safetensors")
    code, answer = fastdiff("sample", "--base", "kl.safetensors", "--prompt", "x")
    assert code == 3
    assert "a VAE alone, not a base model" in answer["error"]["message"]
    assert "--vae" in answer["error"]["hint"]
    save_file(style, "style.safetensors")
    message = refused("style.safetensors", "train-lcm-lora", "--base", "style.safetensors", "--steps", 1)
    assert "a LoRA, not a base model" in message
    assert "--lora" not in message
