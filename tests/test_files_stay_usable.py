"""What a command reads stays as it was, and what it writes can be used: the commands, cards and folders that it tells of."""

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cards import apart

from fastdiff import cli, lora
from fastdiff.checkpoints import checkpoint, reopening, write
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.checkpoints.single_file import Weights
from fastdiff.models.remap import remapped
from fastdiff.sampling.assemble import is_lora
from fastdiff.sampling.sampler import Sampler
from fastdiff.training.card import usage_of_recipe


def flat_lora(path, base, *, seed=1, metadata=None, parts=("unet",)):
    """A LoRA of kohya's layout for the attention layers of a tiny checkpoint."""
    torch.manual_seed(seed)
    tensors = {}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    for part in parts:
        for name, shape in checkpoint.load(str(base)).shapes(part).items():
            if re.search(r"(attn1\.to_q|q_proj)\.weight$", name):
                key = prefixes[part] + name.removesuffix(".weight").replace(".", "_")
                tensors[f"{key}.lora_down.weight"] = torch.randn(4, shape[1])
                tensors[f"{key}.lora_up.weight"] = torch.randn(shape[0], 4) * 0.1
                tensors[f"{key}.alpha"] = torch.tensor(4.0)
    save_file(tensors, path, metadata)
    return path


def digest(path):
    """The content of a file, or of all files of a folder."""
    path = Path(path)
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    return {f.as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def made(tiny_sd, tiny_v, tmp_path_factory):
    """Inputs in one folder: copies of checkpoints, parts of them as files, and LoRAs."""
    home = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_sd, home / "S")
    shutil.copytree(tiny_v, home / "V")
    base = checkpoint.load(str(home / "S"))
    write.to_file(base, home / "one.safetensors", force=True)
    whole = load_file(home / "one.safetensors")
    unet = {k: v for k, v in whole.items() if k.startswith("model.diffusion_model.")}
    save_file(unet, home / "unet-ldm.safetensors")
    shutil.copy(home / "S" / "unet" / "diffusion_pytorch_model.safetensors", home / "unet.safetensors")
    shutil.copy(home / "S" / "vae" / "diffusion_pytorch_model.safetensors", home / "vae.safetensors")
    torch.save({"state_dict": whole}, home / "one.ckpt")
    changed = Weights.of({k: v * 1.01 if "attn1.to_q" in k else v for k, v in load_file(home / "unet.safetensors").items()})
    write.to_folder(base, home / "tuned", changed={"unet": changed})
    flat_lora(home / "a.safetensors", home / "S")
    flat_lora(home / "b.safetensors", home / "S", seed=2, parts=("unet", "text_encoder"))
    (home / "prompts.txt").write_text("a cat\na dog\n")
    return home


@pytest.fixture
def there(made, monkeypatch, capfd):
    """Run a command among the inputs: (exit code, JSON object)."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("FASTDIFF_CACHE", str(made / "cache"))

    def command(*args):
        words = [word for arg in args for word in (shlex.split(arg) if isinstance(arg, str) else [str(arg)])]
        capfd.readouterr()
        code = cli.main([*words, "--json"])
        return code, json.loads(capfd.readouterr().out)

    return command


# ---- inputs stay as they are

BAKE = "merge-lora --accel a.safetensors"
TUNED = "merge-lora --base S --tuned V --reference twin"
OVERWRITING = {  # command line -> the input that it would overwrite
    "export --base S --vae vae.safetensors --single-file --force -o vae.safetensors": "vae.safetensors",
    "export --base S --vae V -o V": "V",
    "export --base unet.safetensors --base-config S -o S": "S",
    "export --base one.safetensors --base-config S -o ./S/../one.safetensors": "one.safetensors",
    "export --base S -o S": "S",
    "export --base S -o S/unet/diffusion_pytorch_model.safetensors": "S",
    "export --base V --vae S/vae -o S/vae/diffusion_pytorch_model.safetensors": "S/vae",
    "export --lora a.safetensors -o a.safetensors": "a.safetensors",
    "export --lora a.safetensors -o link.safetensors": "a.safetensors",
    f"{BAKE} --base unet.safetensors --base-config S -o S": "S",
    f"{BAKE} --base S -o a.safetensors": "a.safetensors",
    f"{BAKE} --style b.safetensors=0.5 -o b.safetensors": "b.safetensors",
    f"{BAKE} --style b.safetensors --check S -o S --format peft": "S",
    f"{BAKE} --remap one.safetensors --base-config S -o one.safetensors": "one.safetensors",
    f"{TUNED} -o V": "V",
    f"{TUNED} -o twin": "twin",
    "merge-lora --extract --base S --tuned one.safetensors --base-config S -o one.safetensors": "one.safetensors",
}


@pytest.mark.parametrize("line", OVERWRITING)
def test_no_input_is_overwritten(line, there, made):
    if not (made / "twin").exists():
        shutil.copytree(made / "S", made / "twin")
        (made / "link.safetensors").symlink_to("a.safetensors")
    kept = {name: digest(made / name) for name in ("S", "V", "twin", *(p.name for p in made.glob("*.safetensors")))}
    code, answer = there(line)
    output = shlex.split(line)[shlex.split(line).index("-o") + 1].removeprefix("./")
    assert code == 2
    message = answer["error"]["message"].replace("--output ./", "--output ")
    assert message == f"--output {output}: would overwrite the input {OVERWRITING[line]}; choose another name"
    assert {name: digest(made / name) for name in kept} == kept


def test_neither_half_of_taesd_is_overwritten(there, made):
    from diffusers import AutoencoderTiny

    from fastdiff.checkpoints import vae_file

    torch.manual_seed(0)
    vae_file.write_taesd(AutoencoderTiny().state_dict(), made / "taesd", "taesd")
    kept = digest(made / "taesd")
    for half in ("decoder", "encoder"):
        code, answer = there(f"export --base S --vae taesd/taesd_{half}.safetensors --format taesd -o taesd")
        assert code == 2
        assert "--output taesd: would overwrite the input taesd/taesd_" in answer["error"]["message"]
    assert digest(made / "taesd") == kept
    for path in list((made / "taesd").iterdir()):
        path.rename(path.with_name(f"my_{path.name}"))
    assert there("export --base S --vae taesd/my_taesd_decoder.safetensors --format taesd -o taesd")[0] == 0


def test_an_earlier_output_in_the_folder_of_an_input_is_written_again(there, made):
    shutil.copytree(made / "S", made / "home")
    for _ in range(2):
        assert there("export --base home --single-file --force -o home/one.safetensors")[0] == 0
        assert there("export --base home/one.safetensors --base-config home -o home/folder")[0] == 0


IMPOSSIBLE = {
    "sample --base S --prompt x -o a.safetensors": "--output a.safetensors: is a file; give the name of a folder",
    "sample --base S --prompt x -o prompts.txt/a/b.png": "--output prompts.txt/a/b.png: prompts.txt is a file",
    "sample --base S --prompt x -o dir.png": "--output dir.png: is a folder",
    "evaluate --base S --student S -o a.safetensors": "--output a.safetensors: is a file",
    "train-lcm-lora --base S -o a.safetensors": "--output a.safetensors: is a file",
    "prune --base S --layout bk-tiny --steps 0 -o a.safetensors/x": "a.safetensors is a file, and nothing can be written",
    "export --base S -o prompts.txt": "--output prompts.txt: is a file",
    "export --base S --format taesd -o prompts.txt": "--output prompts.txt: is a file",
    "export --base S --single-file --force -o dir.safetensors": "--output dir.safetensors: is a folder",
    "export --lora a.safetensors --format peft -o prompts.txt": "--output prompts.txt: is a file",
    f"{BAKE} --style b.safetensors -o prompts.txt/y.safetensors": "prompts.txt is a file, and nothing can be written under it",
}


@pytest.mark.parametrize("line", IMPOSSIBLE)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(line, there, made, monkeypatch):
    (made / "dir.png").mkdir(exist_ok=True)
    (made / "dir.safetensors").mkdir(exist_ok=True)
    monkeypatch.setattr(checkpoint, "load", lambda *args, **how: pytest.fail("the base was opened"))
    code, answer = there(line)
    assert code == 2
    assert IMPOSSIBLE[line] in answer["error"]["message"]


# ---- commands that are told run, and draw with the base as it was opened

OPENED = "--base one.ckpt --base-config S --allow-pickle --prediction-type v_prediction --zero-snr"
HOW = dict(config="S", prediction="v_prediction", allow_pickle=True, zero_snr=True)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def drawn(base, how, **more):
    """A picture of the prompt of `follow`, with a base opened by these keywords."""
    sampler = Sampler(checkpoint.load(base, **how), device="cpu", compile="off", **more)
    return np.asarray(sampler(["a red apple"], seeds=[0]).images[0]).astype(int)


def follow(there, command):
    """Run a command that was told, with a plain prompt; returns its picture."""
    assert command.startswith("fastdiff sample "), command
    words = shlex.split(command)[1:]
    words[words.index("--prompt") + 1] = "a red apple"
    code, answer = there(*map(shlex.quote, words), "-o", "told.png")
    assert code == 0, answer
    return pixels(answer["outputs"][0]["path"])


def same(one, other):
    assert one.std() > 5, "a picture"
    return np.abs(one - other).max() <= 1


def test_the_command_after_training_opens_the_base_as_the_run_did(there, made):
    line = tiny.arguments("train-lcm-lora", "one.ckpt", None, None)
    code, answer = there(*line, *OPENED.split()[2:], "--steps 1 --proof 0 -o lcm")
    assert code == 0, answer
    command = answer["next_command"]
    assert "--base-config S" in command
    assert "--allow-pickle" in command
    assert "--zero-snr" in command
    assert "--prediction-type v_prediction" in command
    assert same(follow(there, command), drawn("one.ckpt", HOW, loras=["lcm/lcm.safetensors"]))


@pytest.mark.parametrize("command", ["distill-vae", "distill-controlnet"])
def test_every_method_tells_how_its_base_was_opened(command, there, made, tiny_controlnet):
    from fastdiff.commands import train

    method = train.named(command)
    base = checkpoint.load("one.ckpt", **HOW)
    more = {"controlnet": str(tiny_controlnet)} if "controlnet" in command else {}
    config = method.Config(base="one.ckpt", **base.opening, **more)
    options = method.sample_options(SimpleNamespace(config=config), Path("there"), base)
    assert options["base"] == "one.ckpt"
    assert (
        options.items() >= {"base_config": "S", "prediction_type": "v_prediction", "zero_snr": True, "allow_pickle": True}.items()
    )


WRITTEN = {  # command line -> what the picture is drawn with
    "merge-lora --accel a.safetensors --base S -o baked.safetensors": ("S", {}, ["a.safetensors"]),
    f"merge-lora --accel a.safetensors {OPENED} -o baked2.safetensors": ("one.ckpt", HOW, ["a.safetensors"]),
    f"merge-lora --accel a.safetensors {OPENED} -o baked3": ("one.ckpt", HOW, ["a.safetensors"]),
    "export --base S --single-file --force -o single.safetensors": ("S", {}, []),
    "export --base V --single-file --force --zero-snr -o single2.safetensors": ("V", {"zero_snr": True}, []),
    f"export {OPENED} --single-file --force -o single3.safetensors": ("one.ckpt", HOW, []),
    f"export {OPENED} -o folder": ("one.ckpt", HOW, []),
    f"merge-lora --extract {OPENED} --tuned tuned -o diff.safetensors --precision fp32": ("one.ckpt", HOW, ["diff.safetensors"]),
    "merge-lora --base S --tuned tuned --reference S -o moved.safetensors": ("moved.safetensors", {"config": "S"}, []),
    "merge-lora --accel a.safetensors --style b.safetensors --check S -o two.safetensors": ("S", {}, ["two.safetensors"]),
}


QUICK = ("baked2", "single2", "diff")


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=() if any(name in line for name in QUICK) else pytest.mark.slow) for line in WRITTEN]
)
def test_the_command_after_writing_draws_with_what_was_written(line, there, made):
    code, answer = there(line)
    assert code == 0, answer
    ref, how, loras = WRITTEN[line]
    picture = follow(there, answer["next_command"])
    assert same(picture, drawn(ref, how, loras=loras)), answer["next_command"]


def test_a_remapped_lora_is_drawn_on_the_pruned_network(there, made, tiny_pruned):
    write.to_file(checkpoint.load(str(tiny_pruned)), made / "pruned.safetensors", force=True)
    code, answer = there(
        f"merge-lora --accel a.safetensors --remap pruned.safetensors --base-config {tiny_pruned} -o moved-a.safetensors"
    )
    assert code == 0, answer
    picture = follow(there, answer["next_command"])
    assert same(picture, drawn("pruned.safetensors", {"config": str(tiny_pruned)}, loras=["moved-a.safetensors"]))


def test_no_configs_are_named_where_a_file_needs_none(made, tiny_sd, monkeypatch):
    """The networks that ship with fastdiff are known by their layers."""
    monkeypatch.chdir(made)
    base = checkpoint.load("emoji")
    write.to_file(base, made / "emoji.safetensors", force=True)
    assert reopening.opening(base, made / "emoji.safetensors") == {}


# ---- folders of peft


def test_a_folder_that_peft_format_wrote_is_one_lora_everywhere(there, made):
    line = "merge-lora --accel a.safetensors --style b.safetensors=1 --format peft --precision fp32 -o peft"
    code, answer = there(line)
    assert code == 0, answer
    assert answer["metrics"]["max_error"] < 1e-6
    assert {path.parent.name for path in (made / "peft").rglob("adapter_model.safetensors")} == {"unet", "text_encoder"}
    both = lora.merge(["a.safetensors", "b.safetensors"])
    found = lora.load("peft")
    assert found.source == "peft"
    assert found.modules.keys() == both.modules.keys()
    for key, update in both.modules.items():
        torch.testing.assert_close(found.modules[key].delta(), update.delta())
    assert lora.outline(Path("peft")).shapes == both.shapes
    code, answer = there("inspect peft --base S")
    assert (code, answer["metrics"]["supported"], answer["metrics"]["layouts"]) == (0, True, ["peft"])
    assert answer["metrics"]["modules"] == answer["metrics"]["coverage"]["applied"] == len(both.modules)
    assert set(answer["metrics"]["components"]) == {"unet", "text_encoder"}
    picture = follow(there, "fastdiff sample --base S --lora peft --prompt x")
    assert same(picture, drawn("S", {}, loras=["a.safetensors", "b.safetensors"]))
    for line in ("merge-lora --accel peft --style a.safetensors=0", "export --lora peft"):
        code, answer = there(f"{line} -o back.safetensors")
        assert code == 0, answer
        again = lora.load("back.safetensors")
        assert again.modules.keys() == both.modules.keys()
        for key, update in both.modules.items():
            torch.testing.assert_close(again.modules[key].delta(), update.delta(), rtol=2e-3, atol=2e-3)
    assert there("merge-lora --accel peft --base S -o peft/unet")[0] == 2
    assert there("export --lora peft -o peft/unet/adapter_model.safetensors")[0] == 2
    shutil.copytree("peft", "replaced")
    assert there("export --lora a.safetensors --format peft -o replaced")[0] == 0
    assert lora.load("replaced").modules.keys() == lora.load("a.safetensors").modules.keys()  # nothing of the earlier one
    assert is_lora("peft")
    assert not is_lora("S")


def test_a_folder_of_peft_for_sdxl_keeps_both_text_encoders_apart(tiny_sdxl, tmp_path):
    shapes = {}
    for part, prefix in {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}.items():
        for name, shape in checkpoint.load(str(tiny_sdxl)).shapes(part).items():
            if re.search(r"(attn1\.to_q|q_proj)\.weight$", name):
                shapes[prefix + name.removesuffix(".weight").replace(".", "_")] = shape
    torch.manual_seed(0)
    tensors = {}
    for key, shape in shapes.items():
        tensors |= {f"{key}.lora_down.weight": torch.randn(4, shape[1]), f"{key}.lora_up.weight": torch.randn(shape[0], 4)}
    save_file(tensors, tmp_path / "xl.safetensors", {"fastdiff.family": "sdxl"})
    made = lora.load(tmp_path / "xl.safetensors")
    made.save(tmp_path / "xl", dtype=torch.float32, format="peft")
    found = lora.load(tmp_path / "xl")
    assert found.modules.keys() == made.modules.keys() == shapes.keys()
    for key, update in made.modules.items():
        torch.testing.assert_close(found.modules[key].delta(), update.delta())


# ---- messages

NO_VAE = "give a file or a diffusers folder of a VAE, or a hub id (owner/name)"
REFUSED = {  # command line -> message, hint
    "sample --base S --prompt x --vae gone.safetensors": ("--vae gone.safetensors: no such file", NO_VAE),
    "export --base S --vae ./gone -o x": ("--vae ./gone: no such file or folder", NO_VAE),
    "sample --base S --prompt x --controlnet gone.safetensors --control-image x.png": (
        "--controlnet gone.safetensors: no such folder",
        "give a diffusers folder of a ControlNet, or a hub id (owner/name)",
    ),
    "export --base S --format taesd --single-file": (
        "--single-file: with --format taesd two files are written into a folder",
        "leave out one of both",
    ),
    "export --base S --format peft": ("--format peft: is the layout of a LoRA, and there is no --lora", "leave it out"),
    "export --lora a.safetensors --single-file": (
        "--single-file: is for checkpoints; the file of a LoRA is one already",
        "leave it out",
    ),
    "sample --base unet.safetensors --base-config ./gone --prompt x": (
        "--base-config ./gone: no such folder",
        "give a diffusers folder with the configs of the base, or a hub id with network access",
    ),
    "sample --base unet.safetensors --base-config sd15 --prompt x": (
        "--base-config sd15: no weights for it on this machine",
        "give a diffusers folder with the configs of the base, or a hub id with network access",
    ),
    "sample --base unet.safetensors --base-config gone --prompt x": (
        "a hub id (owner/name) or a folder",
        "give a diffusers folder with the configs of the base, or a hub id with network access",
    ),
}


@pytest.mark.parametrize("line", REFUSED)
def test_messages_name_the_option_that_is_wrong_and_what_it_takes(line, there):
    code, answer = there(line)
    message, hint = REFUSED[line]
    assert code == 2
    assert message in answer["error"]["message"]
    assert answer["error"]["hint"] == hint


def test_configs_that_are_not_used_are_told(there, made):
    warning = "--base-config S: is for single files; V has configs of its own, which count"
    code, answer = there("export --base V --base-config S -o copy")
    assert code == 0
    assert answer["warnings"] == [warning]
    assert "warning" not in str(there("export --base unet.safetensors --base-config V -o copy2")[1]["warnings"])
    code, answer = there("merge-lora --extract --base unet.safetensors --base-config S --tuned tuned -o some.safetensors")
    assert code == 0, answer
    assert not any("base-config" in text for text in answer["warnings"])


# ---- recipes


def test_a_recipe_alone_is_written_into_a_lora(there, made):
    there("export --lora a.safetensors -o plain.safetensors")
    for options, (name, n, dtype) in {
        "--recipe lcm": ("lcm", 4, None),
        "--num-steps 6 --scheduler euler --guidance 1": ("euler", 6, None),
        "--recipe lcm --precision fp16": ("lcm", 4, torch.float16),
        "--recipe lcm --format diffusers --precision fp32": ("lcm", 4, torch.float32),
    }.items():
        code, answer = there(f"merge-lora --accel a.safetensors {options} -o with-recipe.safetensors")
        assert code == 0, answer
        found, before = lora.load("with-recipe.safetensors"), lora.load("a.safetensors")
        assert (found.recipe.scheduler, found.recipe.num_steps, found.dtype) == (name, n, dtype or torch.float32)
        assert found.modules.keys() == before.modules.keys()
        for key, update in before.modules.items():
            slack = 0 if dtype is None or dtype == torch.float32 else 5e-3
            torch.testing.assert_close(found.modules[key].delta(), update.delta(), rtol=slack, atol=slack or 1e-6)
    assert there("merge-lora --accel a.safetensors --recipe lcm")[0] == 0
    assert lora.load("a-lcm.safetensors").recipe.scheduler == "lcm"
    assert there("merge-lora --accel a.safetensors")[0] == 2


def test_no_hint_about_another_recipe_stays(there, made):
    """The checkpoints were made for four steps; what is made of them is told to take two."""
    recipe = Recipe(method="tdm", family="sd15", scheduler="euler", num_steps=4, guidance=1.0)
    hint = {"modelspec.usage_hint": "4 steps, guidance 1, scheduler euler; not for hands"}
    write.to_folder(checkpoint.load("tuned"), Path("fast"), recipe=recipe, said=hint)
    for line in ("merge-lora --extract --base S", "merge-lora --base S --reference S"):
        code, answer = there(f"{line} --tuned fast --num-steps 2 -o hinted.safetensors")
        assert code == 0, answer
        with safe_open("hinted.safetensors", "pt") as file:
            assert file.metadata()["modelspec.usage_hint"] == "2 steps, guidance 1, scheduler euler; not for hands"


# ---- cards


@pytest.fixture(scope="module")
def weights(made):
    """A LoRA with a recipe, in a folder of its own."""
    (made / "run").mkdir(exist_ok=True)
    recipe = Recipe(method="tdm", family="sd15", scheduler="euler", num_steps=2, guidance=1.0)
    item = lora.load(made / "a.safetensors")
    item.metadata |= recipe.to_metadata()
    return item.save(made / "run" / "tdm.safetensors", dtype=torch.float32)


CARDS = {  # file of the base -> keywords beside `config`
    "one.safetensors": {},
    "one.ckpt": {"allow_pickle": True},
    "unet.safetensors": {"prediction": "v_prediction"},
    "unet-ldm.safetensors": {},
    "no-vae.safetensors": {},
    "unet-and-vae.safetensors": {},
    "pruned.safetensors": {},
}


RARE = ("one.ckpt", "no-vae.safetensors", "unet-and-vae.safetensors")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in RARE else ()) for name in CARDS])
def test_the_card_opens_a_single_file_with_the_configs_of_its_folder(name, made, weights, tiny_pruned, monkeypatch):
    monkeypatch.chdir(made)
    whole = load_file("one.safetensors")
    if name == "no-vae.safetensors":
        save_file({k: v for k, v in whole.items() if not k.startswith("first_stage_model.")}, name)
    if name == "unet-and-vae.safetensors":
        save_file({k: v for k, v in whole.items() if not k.startswith("cond_stage_model.")}, name)
    if name == "pruned.safetensors":
        write.to_file(checkpoint.load(str(tiny_pruned)), Path(name), force=True)
    base = checkpoint.load(name, config=str(tiny_pruned) if name == "pruned.safetensors" else "S", **CARDS[name])
    path = weights if name != "pruned.safetensors" else made / "run" / "pruned-tdm.safetensors"
    if name == "pruned.safetensors":
        moved = remapped(base, lora.load(weights), wanted=True)
        moved.save(path, dtype=torch.float32)
    code = usage_of_recipe(path, base, lora.load(path).recipe).code
    assert "from_single_file" in code
    assert apart(Sampler(base, loras=[str(path)], device="cpu", compile="off"), code, path.parent, monkeypatch) < 5e-5


def test_the_card_tells_how_a_folder_is_made_where_diffusers_cannot_open_the_file(made, weights, monkeypatch):
    monkeypatch.chdir(made)
    whole = load_file("one.safetensors")
    unet = {k.removeprefix("model."): v for k, v in whole.items() if k.startswith("model.diffusion_model.")}
    save_file(unet, "comfy.safetensors")
    base = checkpoint.load("comfy.safetensors", config="S")
    code = usage_of_recipe(weights, base, lora.load(weights).recipe).code
    command = re.search(r"cannot open comfy.safetensors: .*\n#   fastdiff (.*)", code)[1]
    monkeypatch.chdir(weights.parent)
    assert cli.main(shlex.split(command)) == 0
    monkeypatch.chdir(made)
    assert apart(Sampler(base, loras=[str(weights)], device="cpu", compile="off"), code, weights.parent, monkeypatch) < 5e-5
