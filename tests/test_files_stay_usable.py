"""What a command reads stays as it was, and what it writes can be used: the commands, cards and folders that it tells of."""

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff import cli, lora
from fastdiff.checkpoints import checkpoint, write


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
