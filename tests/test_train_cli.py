"""`train-lcm-lora` from command line to files, on tiny checkpoints of every family."""

import json
import tomllib

import pytest
import torch
from safetensors.torch import load_file

from fastdiff import cli, lora
from fastdiff.checkpoints import checkpoint


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """Run the command in an empty folder with two quick steps; returns (exit code, JSON object)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")

    def command(*args):
        quick = dict(steps=2, batch_size=2, grad_accum=1, resolution=64, pairs=2, num_steps=2, lora_rank=4)
        quick |= dict(device="cpu", proof=0)
        if "--config" in args:
            quick = {}
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in {**quick, "prompts": "prompts.txt"}.items()]
        flags = [flag for flag in flags if flag.split("=")[0] not in args]
        code = cli.main(["train-lcm-lora", *args, *flags, "--json"])
        return code, json.loads(capfd.readouterr().out)

    return command


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(a, b):
    x, y = (load_file(folder / "lcm.safetensors") for folder in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def targets(base):
    """Every module that the official LCM LoRAs adapt: attention, feed-forward, and the convolutions of the blocks."""
    names = "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut"
    names += " downsamplers.0.conv upsamplers.0.conv time_emb_proj"
    ends = tuple(f".{name}" for name in names.split())
    return [k for k, m in checkpoint.load(base).unet.named_modules() if k.endswith(ends)]


@pytest.mark.parametrize(("kind", "family"), [("tiny_sd", "sd15"), ("tiny_v", "sd15"), ("tiny_sdxl", "sdxl")])
def test_every_family_from_its_own_samples(kind, family, train, tmp_path, request):
    base = str(request.getfixturevalue(kind))
    code, told = train("--base", base, "-o", "run", "--seed=2147483647")  # the highest that there is
    assert (code, told["ok"], told["command"]) == (0, True, "train-lcm-lora")
    assert {p["path"].split("/")[-1] for p in told["outputs"]} == {"lcm.safetensors", "final.png"}
    assert told["next_command"].startswith(f"fastdiff sample --base {base} --lora run/lcm.safetensors")
    written = lora.load(tmp_path / "run" / "lcm.safetensors")
    assert len(written.modules) == (277 if family == "sd15" else len(targets(base)))
    assert (written.recipe.family, written.recipe.scheduler, written.recipe.num_steps) == (family, "lcm", 2)
    assert written.recipe.prediction_type == ("v_prediction" if kind == "tiny_v" else "epsilon")
    assert written.recipe.parent == checkpoint.fingerprint(checkpoint.load(base).unet)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "LCMScheduler" in card
    assert "previews/final.png" in card
    assert all(torch.tensor(losses(tmp_path / "run")).isfinite())


@pytest.mark.parametrize(
    ("args", "file", "scheduler"),
    [
        (["--target", "edge", "--phases", "2"], "lcm.safetensors", "ddim"),
        (["--target", "random"], "lcm.safetensors", "tcd"),
        (["--finetune"], "lcm.safetensors", "lcm"),
        (["--loss", "l2", "--grad-accum", "2", "--gradient-checkpointing", "--ema", "0.5"], "lcm.safetensors", "lcm"),
        (["--guidance-min", "2", "--guidance-max", "5", "--skip", "5", "--lr-schedule", "cosine"], "lcm.safetensors", "lcm"),
    ],
)
def test_every_variant(args, file, scheduler, train, tiny_sd, tmp_path):
    code, told = train("--base", str(tiny_sd), "-o", "run", *args)
    assert code == 0, told
    written = lora.load(tmp_path / "run" / file)
    assert written.recipe.scheduler == scheduler
    assert max(m.delta().abs().max() for m in written.modules.values()) > 0


def test_full_training_writes_a_checkpoint_that_samples_by_its_recipe(train, tiny_sd, tmp_path, capfd):
    code, told = train("--base", str(tiny_sd), "-o", "run", "--full", "--guidance-min", "3", "--guidance-max", "3")
    assert code == 0, told
    assert told["next_command"].startswith("fastdiff sample --base run/model")
    config = json.loads((tmp_path / "run" / "model" / "unet" / "config.json").read_text())
    assert config["time_cond_proj_dim"] == 256
    code = cli.main(["sample", "--base", "run/model", "--prompt", "a cat", "--resolution", "64", "-o", "cat.png", "--json"])
    settings = json.loads(capfd.readouterr().out)["metrics"]["settings"]
    assert (code, settings["scheduler"], settings["num_steps"], settings["guidance"]) == (0, "lcm", 2, 3.0)


def test_a_folder_of_pictures(train, tiny_sdxl, tmp_path):
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, (name, size) in enumerate([("a", (80, 64)), ("b", (64, 100))]):
        Image.new("RGB", size, (40 * i, 90, 120)).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"picture {name}")
    code, told = train("--base", str(tiny_sdxl), "-o", "run", "--data", "pictures")
    assert code == 0, told


def test_config_toml_repeats_the_run_and_a_finished_run_goes_on(train, tiny_sd, tmp_path):
    assert train("--base", str(tiny_sd), "-o", "a", "--seed", "4")[0] == 0
    config = tomllib.loads((tmp_path / "a" / "config.toml").read_text())
    assert (config["seed"], config["steps"]) == (4, 2)
    assert train("--config", "a/config.toml", "-o", "b")[0] == 0
    assert same_weights(tmp_path / "a", tmp_path / "b")
    code, told = train("--config", "a/config.toml", "--steps", "4", "-o", "b")
    assert (code, told["metrics"]["steps"]) == (0, 4)
    assert train("--config", "a/config.toml", "--steps", "4", "-o", "c")[0] == 0
    assert same_weights(tmp_path / "b", tmp_path / "c")
    assert not same_weights(tmp_path / "a", tmp_path / "c")
    code, told = train("--config", "a/config.toml", "--steps", "1", "-o", "b")
    assert code == 2
    assert "already at step 4" in told["error"]["message"]


def test_the_config_of_a_fresh_start_goes_on_when_it_is_given_again(train, tiny_sd, tmp_path):
    assert train("--base", str(tiny_sd), "-o", "a", "--resume", "never")[0] == 0
    code, told = train("--config", "a/config.toml", "--steps", "3")
    assert (code, told["metrics"]["steps"]) == (0, 3)
    assert len(losses(tmp_path / "a")) == 2  # the log of the first run, and the last step


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--base", "no-such"], "not an alias"),
        (["--data", "nowhere"], "--data nowhere"),
        (["--prompts", "gone.txt"], "gone.txt"),
        (["--resume", "elsewhere"], "--resume elsewhere"),
        (["--target", "middle"], "--target"),
        (["--keep", "best"], "--keep best: nothing is measured"),
        (["--patience", "3"], "--patience 3: nothing is measured"),
        (["--steps", "0"], "--steps 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--lora-rank", "0"], "--lora-rank 0"),
        (["--resolution", "100"], "--resolution 100"),
        (["--guidance-min", "9", "--guidance-max", "2"], "--guidance-min 9"),
        (["--grid-steps", "2000"], "--grid-steps 2000"),
        (["--skip", "0"], "--skip 0"),
        (["--phases", "0", "--target", "edge"], "--phases 0"),
        (["--ema", "1.5"], "--ema 1.5"),
        (["--tracker", "wandb"], "--tracker wandb: wandb is not installed"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_run_behind(args, message, train, tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdiff.training.session.find_spec", lambda name: None)
    base = [] if "--base" in args else ["--base", str(tiny_sd)]
    code, told = train(*base, *args, "-o", "run")
    assert code == 2, told
    assert message in told["error"]["message"]
    assert "\n" not in told["error"]["message"]
    assert not (tmp_path / "run").exists()
