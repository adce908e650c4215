"""Model cards: the code on each draws in stock diffusers what `sample` draws, and its words for other programs are true."""

import json
import math
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from conftest import controlnet_of
from PIL import Image

from fastdiff import cli, lora
from fastdiff.checkpoints import checkpoint, write
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.sampling import other_programs, pictures
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings, asked
from fastdiff.training.card import usage_of_recipe

LCM = "train-lcm-lora"
RUNS = {  # name -> command, base, and options beyond those of tests/tiny.py
    "lcm": (LCM, "sd", ""),
    "pcm": (LCM, "sd", "--target edge --num-steps 4"),
    "tcd": (LCM, "sd", "--target random"),
    "full lcm": (LCM, "sd", "--full"),
    "dmd": ("dmd", "sd", ""),
    "tdm": ("tdm", "sd", "--any-steps --num-steps 4"),
    "lightning": ("lightning", "sd", "--stages 4:2,2:1 --phases cond,full --steps 9"),
    "prune": ("prune", "sd", ""),
    "vae": ("distill-vae", "sd", ""),
    "controlnet": ("distill-controlnet", "sd", ""),
    "sdxl": ("tdm", "sdxl", ""),
    "v": (LCM, "v", ""),
    "zero snr": (LCM, "zero", "--target edge --num-steps 4"),
    "file": (LCM, "file", "--target edge --num-steps 4"),
    "pndm": (LCM, "pndm", "--target edge --num-steps 4"),
    "sid": ("sid", "sd", ""),
    "sdxs": ("sdxs", "sd", "--steps 9"),
    "sdxl lightning": ("lightning", "sdxl", "--stages 4:2,2:1 --phases cond,full --steps 9"),
    "sdxl controlnet": ("distill-controlnet", "sdxl", ""),
    "v tcd": (LCM, "v", "--target random"),
    "v dmd": ("dmd", "v", ""),
    "full lcm sdxl": (LCM, "sdxl", "--full"),
    "zero snr dmd": ("dmd", "zero", ""),
    "zero snr lightning": ("lightning", "zero", "--stages 4:2,2:1 --phases cond,full --steps 9"),
    "zero snr file": (LCM, "zero file", ""),
    "emoji": (LCM, "emoji", "--proof 0"),
    "emoji vae": ("distill-vae", "emoji", "--proof 1"),
}


def edited(source, target, **scheduler):
    """A copy of a checkpoint folder with other entries in its scheduler's config; None removes one."""
    shutil.copytree(source, target)
    path = target / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | scheduler
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    index = json.loads((target / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (target / "model_index.json").write_text(json.dumps(index))
    return target


class Runs:
    """Runs of every command, each made when it is first asked for."""

    def __init__(self, home, bases, controlnet, pruned):
        self.home, self.bases, self.controlnet, self.pruned = home, bases, controlnet, pruned
        (home / "prompts.txt").write_text("a cat\na dog\n")

    def base(self, kind):
        """The base by its key, as a command takes it."""
        made = self.home / kind.replace(" ", "-")
        if kind == "zero" and not made.exists():
            edited(self.bases["v"], made, rescale_betas_zero_snr=True, timestep_spacing="trailing")
        if kind == "pndm" and not made.exists():  # as SD1.5 is published
            edited(self.bases["sd"], made, _class_name="PNDMScheduler", skip_prk_steps=True, clip_sample=None)
        if kind in {"file", "zero file"}:
            made = self.home / f"{kind.replace(' ', '-')}.safetensors"
            if not made.exists():
                write.to_file(checkpoint.load(str(self.base("zero" if "zero" in kind else "sd"))), made, force=True)
        return kind if kind == "emoji" else self.bases.get(kind, made)

    def words(self, name):
        """The command line of a run."""
        command, kind, more = RUNS[name]
        base, controlnet, pruned = self.base(kind), self.controlnet, self.pruned
        if kind != "sd" and command == "distill-controlnet":
            controlnet, pruned = self.home / f"edges-{kind}", base
            if not controlnet.exists():
                write.network_to_folder(controlnet_of(checkpoint.load(str(base))), controlnet)
        line = tiny.arguments(command, base, controlnet, pruned)
        line += ["--base-config", str(self.base("zero" if "zero" in kind else "sd"))] if "file" in kind else []
        pairs = [] if command in {"sid", "tdm"} else ["--pairs", "2"]
        return [*line, "--steps", "2", "--lr", "2e-2", *pairs, "-o", name.replace(" ", "-"), *more.split()]

    def __getitem__(self, name):
        """The folder of a run, and the options of `fastdiff sample` that it tells."""
        folder = self.home / name.replace(" ", "-")
        if not (folder / "README.md").exists():
            assert cli.main([*self.words(name), "--quiet"]) == 0
        return folder


@pytest.fixture(scope="module")
def runs(tiny_sd, tiny_v, tiny_sdxl, tiny_controlnet, tiny_pruned, tmp_path_factory):
    home = tmp_path_factory.mktemp("cards")
    bases = {"sd": tiny_sd, "v": tiny_v, "sdxl": tiny_sdxl}
    return Runs(home, bases, tiny_controlnet, tiny_pruned)


@pytest.fixture(autouse=True)
def _in_the_workspace(runs, monkeypatch):
    monkeypatch.chdir(runs.home)
    monkeypatch.setenv("FASTDIFF_CACHE", str(runs.home / "cache"))


def blocks(folder):
    """The Python blocks of a card: {the weights' name, or "" where there is one: code}."""
    text = (folder / "README.md").read_text().split("## Use\n")[1]
    parts = re.split(r"^### (.+)$", text, flags=re.MULTILINE)
    named = {"": text} if len(parts) == 1 else dict(zip(parts[1::2], parts[2::2], strict=True))
    return {name: re.search(r"```python\n(.*?)```", part, re.DOTALL)[1] for name, part in named.items()}


def theirs(code, folder, monkeypatch):
    """Run a card's code in the card's folder; returns the names that it leaves, and the picture (3, H, W) unrounded."""
    from diffusers.image_processor import VaeImageProcessor

    seen, rounded = [], VaeImageProcessor.postprocess
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        note = lambda self, image, *args, **how: (seen.append(image.clone()), rounded(self, image, *args, **how))[1]
        patch.setattr(VaeImageProcessor, "postprocess", note)
        names = {"__name__": "__main__"}
        exec(code, names)
    assert Image.open(folder / "picture.png").size == names["image"].size
    return names, seen[-1][0].clamp(-1, 1)


def ours(sampler, prompt, seed, control=None):
    """What `fastdiff sample` draws before it rounds, (3, H, W) in [-1, 1]."""
    px = sampler.base.resolution_px
    cond, uncond = sampler.conds([prompt], control=None if control is None else pictures.control_of(str(control), px))
    return sampler.pixels(cond, uncond, [seed], sampler.settings, resolution_px=px)[0]


QUICK = ("lcm", "pcm", "tcd", "full lcm", "tdm", "lightning", "vae", "controlnet")


def apart(sampler, code, folder, monkeypatch, control=None):
    """The largest difference between our picture and that of a card's code, after the same timesteps."""
    names, drawn = theirs(code, folder, monkeypatch)
    grid = sampler.settings.grid(sampler.base.schedule(), sampler.base.scheduler_config)
    assert [int(t) for t in names["pipe"].scheduler.timesteps] == grid.t.tolist()
    mine = ours(sampler, names["prompt"], names["seed"], control)
    assert mine.std() > 0.05, "a picture"
    return (mine - drawn).abs().max()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in RUNS])
def test_the_code_of_every_card_draws_what_sample_draws(name, runs, monkeypatch, request):
    folder, control = runs[name], None
    if "controlnet" in name:
        control = folder / "control.png"
        edges = np.kron(np.eye(8, dtype=np.uint8), np.full((8, 8), 255, np.uint8))
        Image.fromarray(edges).convert("RGB").save(control)
    found = blocks(folder)
    assert len(found) == {"lightning": 4, "sdxl lightning": 4, "zero snr lightning": 4}.get(name, 1)
    for weights, code in found.items():
        sampler = Sampler(**sample_options(folder, weights, runs, name), device="cpu", compile="off")
        if name == "zero snr lightning":
            request.getfixturevalue("euler_in_fp64")
        assert apart(sampler, code, folder, monkeypatch, control) < 5e-5, weights


def sample_options(folder, weights, runs, name):
    """The options of a Sampler: those of the command that the run tells."""
    command, kind, _ = RUNS[name]
    base = runs.base(kind)
    if "file" in kind:
        base = checkpoint.load(str(base), config=str(runs.base("zero" if "zero" in kind else "sd")))
    if command == "distill-vae":
        return dict(base=base, vae=str(folder / "tiny-vae"))
    if command == "distill-controlnet":
        return dict(base=str(runs.pruned if kind == "sd" else base), controlnet=str(folder / "controlnet"))
    path = folder / weights if weights else next(p for p in (folder / "model", *folder.glob("*.safetensors")) if p.exists())
    return dict(base=base, loras=[str(path)]) if path.suffix else dict(base=str(path))


@pytest.mark.parametrize("kind", ["pndm", "zero", "v", "file", "zero file", "relative"])
def test_the_code_fits_every_kind_of_base(kind, runs, monkeypatch):
    """One LoRA of phases, for bases of which diffusers knows less than we do: its scheduler must be told the rest."""
    weights = runs["pcm"] / "lcm.safetensors"
    path = runs.base("sd" if kind == "relative" else kind)
    config = str(runs.base("zero" if "zero" in kind else "sd")) if "file" in kind else None
    base = checkpoint.load(os.path.relpath(path) if kind == "relative" else str(path), config=config)
    code = usage_of_recipe(weights, base, lora.load(weights).recipe).code
    assert apart(Sampler(base, loras=[str(weights)], device="cpu", compile="off"), code, weights.parent, monkeypatch) < 5e-5


def test_the_code_of_a_checkpoint_of_two_text_encoders(tiny_sdxl, runs, monkeypatch):
    recipe, folder = Recipe(method="tdm", family="sdxl", scheduler="euler", num_steps=2, guidance=1.0), runs.home / "xl"
    base = checkpoint.load(str(tiny_sdxl))
    write.to_folder(base, folder, recipe=recipe)
    code = usage_of_recipe(folder, base, recipe).code
    assert apart(Sampler(str(folder), device="cpu", compile="off"), code, runs.home, monkeypatch) < 5e-5


def test_the_picture_is_that_of_the_command(runs, monkeypatch, capfd):
    """Rounded to bytes, all but the odd value on the edge of two."""
    folder = runs["tcd"]
    names, _ = theirs(blocks(folder)[""], folder, monkeypatch)
    capfd.readouterr()
    how = ["--seed", str(names["seed"]), "--prompt", names["prompt"], "-o", "ours.png"]
    assert cli.main(["sample", "--base", str(runs.base("sd")), "--lora", str(folder / "lcm.safetensors"), *how, "--json"]) == 0
    assert not json.loads(capfd.readouterr().out)["warnings"]
    mine, stock = (np.asarray(Image.open(path)).astype(int) for path in ("ours.png", folder / "picture.png"))
    assert np.abs(mine - stock).max() <= 1
    assert np.abs(mine - stock).mean() < 1e-2


# ---- other programs


class Program:
    """The schedules of ComfyUI, from their published formulas: a table of noise levels, and a timestep for each level."""

    def __init__(self, base, *, lcm=False):
        schedule = base.schedule()
        self.skip = 20 if lcm else 1
        self.sigmas = (schedule.sigma.double() / schedule.alpha.double())[self.skip - 1 :: self.skip]

    def timestep(self, sigma):
        return int((sigma.log() - self.sigmas.log()).abs().argmin()) * self.skip + self.skip - 1

    def sigma(self, timestep):
        t = min(max((timestep - (self.skip - 1)) / self.skip, 0), len(self.sigmas) - 1)
        low, high = self.sigmas[math.floor(t)].log(), self.sigmas[math.ceil(t)].log()
        return (low + (high - low) * (t - math.floor(t))).exp()

    def simple(self, n):
        return [self.sigmas[-(1 + int(k * len(self.sigmas) / n))] for k in range(n)]

    def normal(self, n, *, sgm=False):
        ends = [self.timestep(self.sigmas[i]) for i in (-1, 0)]
        levels = torch.linspace(*map(float, ends), n + sgm)[: n if sgm else None]
        return [self.sigma(float(t)) for t in levels]

    def sgm_uniform(self, n):
        return self.normal(n, sgm=True)

    def ddim_uniform(self, n):
        return list(self.sigmas[1 :: max(len(self.sigmas) // n, 1)].flip(0))

    def timesteps(self, schedule, n):
        return [self.timestep(sigma) for sigma in getattr(self, schedule)(n)]  # the line names the schedule


def test_the_schedules_are_those_of_comfyui(tiny_sd):
    """The facts that the lines rest on, and the timesteps that our module computes."""
    base = checkpoint.load(str(tiny_sd))
    assert Program(base).timesteps("simple", 4) == [999, 749, 499, 249]
    assert Program(base).timesteps("ddim_uniform", 4) == [751, 501, 251, 1]
    assert Program(base, lcm=True).timesteps("simple", 4) == [999, 759, 499, 259]
    for table, program in ((range(1000), Program(base)), (range(19, 1000, 20), Program(base, lcm=True))):
        for name, schedule in other_programs.SCHEDULES.items():
            for n in (1, 2, 3, 4, 6, 8, 25):
                own = schedule(table, n)
                assert len(own) == len(program.timesteps(name, n)), (name, n)
                spread = 0.51 if len(table) == 1000 else 10.1
                assert all(abs(a - b) <= spread for a, b in zip(own, program.timesteps(name, n), strict=True)), (name, n)


PCM = Recipe(method="pcm", scheduler="ddim", num_steps=4, guidance=1.0)
LISTED = Recipe(method="dmd2", scheduler="lcm", spacing="trailing", num_steps=4, timesteps=(999, 749, 499, 249), guidance=1.0)
LATE = replace(LISTED, num_steps=1, timesteps=(399,))
RECIPES = {
    "lcm": Recipe(method="lcm", scheduler="lcm", num_steps=4, guidance=1.0),
    "lcm 8": Recipe(method="lcm", scheduler="lcm", num_steps=8, guidance=1.0),
    "pcm": PCM,
    "pcm 8": replace(PCM, num_steps=8),
    "tcd": Recipe(method="tcd", scheduler="tcd", num_steps=4, guidance=1.0, eta=0.3),
    "dmd": LISTED,
    "one": replace(LISTED, num_steps=1, timesteps=(999,)),
    "lightning": Recipe(method="lightning", scheduler="euler", spacing="trailing", num_steps=2, guidance=0.0),
    "x0": Recipe(scheduler="euler", spacing="trailing", num_steps=1, guidance=0.0, prediction_type="sample"),
    "any": Recipe(method="tdm", scheduler="euler", spacing="trailing", num_steps=4, guidance=1.0, step_counts=(1, 2, 4)),
    "leading": replace(PCM, spacing="leading"),
    "linspace": replace(PCM, spacing="linspace"),
    "guided": replace(PCM, scheduler="dpm++", num_steps=10, guidance=3.0),
}


def lines_of(base, recipe, *, is_lora=True):
    settings = Settings.of(recipe, Settings.usual(base.family))
    comfyui, a1111 = other_programs.lines(base, recipe, settings, is_lora=is_lora)
    return settings, comfyui, a1111


@pytest.mark.parametrize("name", RECIPES)
def test_the_line_for_comfyui_names_the_timesteps_of_the_recipe(name, tiny_sd):
    base, recipe = checkpoint.load(str(tiny_sd)), RECIPES[name]
    settings, line, _ = lines_of(base, recipe)
    sampler, schedule = re.search(r"sampler `(\S+)`, scheduler `(\S+)`", line).groups()
    assert sampler in {"lcm", "euler", "dpmpp_2m", "dpmpp_2m_sde"}
    program = Program(base, lcm="set to `lcm`" in line)
    for n in recipe.step_counts or (settings.num_steps,):
        same = replace(settings, num_steps=n, timesteps=None) if n != settings.num_steps else settings
        assert program.timesteps(schedule, n) == same.grid(base.schedule(), base.scheduler_config).t.tolist(), line
    assert f"{recipe.steps_text}, cfg {max(1.0, settings.guidance):.1f}" in line
    assert ("set to `x0`" in line) == (name == "x0")
    assert ("ComfyUI-TCD" in line) == (name == "tcd")
    assert "timesteps are" not in line


def test_timesteps_that_no_schedule_has_are_told(tiny_sd, tiny_v):
    base, v = checkpoint.load(str(tiny_sd)), checkpoint.load(str(tiny_v))
    _, comfyui, a1111 = lines_of(base, LATE)
    assert "but no schedule there calls the network at 399: draw with" in comfyui
    assert "but no schedule there" in a1111
    _, comfyui, a1111 = lines_of(base, LISTED)
    assert "timesteps are" not in comfyui
    assert "its timesteps are 999, 759, 499, 259, where the weights know 999, 749, 499, 249" in a1111  # its LCM knows 50
    _, comfyui, a1111 = lines_of(v, RECIPES["lcm"])  # behind the node "lcm", the output counts as epsilon
    assert "set to" not in comfyui
    assert "its timesteps are 999, 749, 499, 249, where the weights know 999, 759, 499, 259" in comfyui
    assert "takes the output for epsilon" in a1111
    assert "no network whose output is x0" in lines_of(base, RECIPES["x0"])[2]
    assert "timesteps are 999, 666, 333, where the weights know 999, 666, 332" in lines_of(base, replace(PCM, num_steps=3))[1]


def test_networks_that_other_programs_cannot_load_are_told(tiny_sd, tiny_pruned):
    base = checkpoint.load(str(tiny_sd))
    _, comfyui, a1111 = lines_of(checkpoint.load(str(tiny_pruned)), PCM)
    assert "simple" in comfyui
    assert "no pruned network" in a1111
    embedded = base.shaped("unet", {**base.unet_config, "time_cond_proj_dim": 256})
    settings = Settings.of(PCM, Settings.usual(base.family))
    (line,) = other_programs.lines(embedded, PCM, settings, is_lora=False)
    assert "takes the guidance as an input; draw with diffusers" in line


# ---- numbers of steps


@pytest.mark.parametrize(
    ("recipe", "steps", "doubt"),
    [
        (RECIPES["any"], 1, ""),
        (RECIPES["any"], 4, ""),
        (RECIPES["any"], 3, "exactly 1, 2 or 4 steps"),
        (RECIPES["any"], 8, "exactly 1, 2 or 4 steps"),
        (replace(LISTED, step_counts=(2, 4)), 2, ""),
        (replace(LISTED, step_counts=(2, 4)), 3, "only timesteps 999, 749, 499, 249"),
        (LISTED, 4, ""),
        (LISTED, 2, "only timesteps"),
        (RECIPES["lightning"], 2, ""),
        (RECIPES["lightning"], 4, "exactly 2 steps"),
        (PCM, 4, ""),
        (PCM, 2, "exactly 4 steps"),
        (PCM, 8, "exactly 4 steps"),
        (RECIPES["lcm"], 2, ""),
        (RECIPES["lcm"], 8, ""),
        (RECIPES["lcm"], 9, "more steps do not help"),
        (Recipe(), 9, ""),
    ],
)
def test_only_numbers_of_steps_that_were_not_trained_are_warned_of(recipe, steps, doubt, capsys):
    asked(recipe, Settings(), num_steps=steps)
    told = capsys.readouterr().err
    assert doubt in told if doubt else not told
