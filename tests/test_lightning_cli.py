"""`lightning` from command line to files, on tiny checkpoints of every family."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastdiff
from fastdiff import cli, lora
from fastdiff.checkpoints import checkpoint


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """Run the command in an empty folder, a step or two a phase; returns (exit code, JSON object)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")

    def command(*args):
        quick = dict(stages="4:2", phases="cond", steps=2, batch_size=2, grad_accum=1, resolution=64, pairs=2, teacher_steps=2)
        quick |= dict(lora_rank=4, device="cpu", proof=0, warmup=0, prompts="prompts.txt", adversarial_lr=1e-2, lr=1e-2)
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in quick.items()]
        flags = [flag for flag in flags if flag.split("=")[0] not in args]
        code = cli.main(["lightning", *args, *flags, "--json"])
        return code, json.loads(capfd.readouterr().out)

    return command


def as_diffusers_draws(base, weights, seed, steps, sdxl=False, prediction=None):
    """The card's recipe by stock classes: pixels (3, H, W) in [0, 1]."""
    import diffusers

    kind = diffusers.StableDiffusionXLPipeline if sdxl else diffusers.StableDiffusionPipeline
    more = {} if sdxl else dict(safety_checker=None)
    pipe = kind.from_pretrained(str(weights if weights.is_dir() else base), **more)
    given = {} if prediction is None else dict(prediction_type=prediction)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", **given)
    if weights.suffix:
        pipe.load_lora_weights(str(weights))
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(seed)
    return pipe(
        "a cat", num_inference_steps=steps, guidance_scale=0.0, generator=g, output_type="pt", height=64, width=64
    ).images[0]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "args", "name"),
    [
        ("tiny_sd", [], "lightning-2step.safetensors"),
        pytest.param(
            *("tiny_sd", ["--lora-only", "--discriminator", "full", "--d-features", "every"], "lightning-2step.safetensors"),
            marks=pytest.mark.slow,
        ),
        ("tiny_v", ["--phases", "cond,full", "--no-lora-only"], "lightning-2step-full"),
        pytest.param(
            *("tiny_sdxl", ["--phases", "uncond", "--gradient-checkpointing"], "lightning-2step.safetensors"),
            marks=pytest.mark.slow,
        ),
        pytest.param("tiny_sd", ["--stages", "2:1", "--steps", "4"], "lightning-1step.safetensors", marks=pytest.mark.slow),
        ("tiny_sdxl", ["--stages", "2:1", "--phases", "uncond,full", "--no-lora-only", "--steps", "6"], "lightning-1step-full"),
    ],
)
def test_what_is_written_draws_in_stock_diffusers_as_here(kind, args, name, train, tmp_path, request, capfd, monkeypatch):
    from PIL import Image

    base = request.getfixturevalue(kind)
    code, told = train("--base", str(base), "-o", "run", *args)
    assert code == 0, told
    weights, steps = tmp_path / "run" / name, int(name[len("lightning-")])
    full = weights.is_dir()
    where = ["--base", str(weights)] if full else ["--base", str(base), "--lora", str(weights)]
    assert told["next_command"].startswith(f"fastdiff sample {' '.join(where)}".replace(f"{tmp_path}/", ""))
    sample = [*where, "--prompt", "a cat", "--seed", "7", "--resolution", "64", "-o", "cat.png", "--json"]
    assert cli.main(["sample", *sample]) == 0
    settings = json.loads(capfd.readouterr().out)["metrics"]["settings"]
    assert (settings["scheduler"], settings["spacing"], settings["num_steps"]) == ("euler", "trailing", steps)
    assert settings["guidance"] == 0
    ours = torch.from_numpy(np.array(Image.open(tmp_path / "cat.png"))) / 255
    draws = lambda path, how: as_diffusers_draws(base, path, 7, steps, kind == "tiny_sdxl", how).permute(1, 2, 0)
    # A folder says itself what its network outputs; a LoRA's card tells the scheduler.
    theirs = draws(weights, "sample" if steps == 1 and not full else None)
    assert (ours - theirs).abs().max() <= 0.5 / 255 + 1e-3
    assert (ours - draws(base, None)).abs().max() > 0.02, "steps at that rate must show"
    card = (tmp_path / "run" / "README.md").read_text()
    assert 'timestep_spacing="trailing"' in card
    assert ('prediction_type="sample"' in card) == (steps == 1)
    assert "scheduler `simple`" in card
    monkeypatch.chdir(tmp_path / "run")
    codes = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(codes) == 1 + full  # one for each file
    for code in codes:
        scope = {}
        exec(code, scope)
        assert scope["image"].size == (64, 64)


def test_a_chain_writes_every_stage(train, tiny_sd, tmp_path):
    chain = ["--stages", "8:4,4:2,2:1", "--phases", "cond,full", "--no-lora-only", "--steps", "9", "--adversarial-below", "4"]
    code, told = train(
        "--base", str(tiny_sd), "-o", "run", *chain, "--eval-every", "5", "--r1", "10", "--ema", "0.5", "--gan", "paired"
    )
    assert code == 0, told
    names = [Path(p["path"]).name for p in told["outputs"]]
    weights = ["lightning-4step.safetensors"]
    weights += [f"lightning-{n}step{kind}" for n in (2, 1) for kind in (".safetensors", "-full")]
    assert [name for name in names if not name.endswith(".png")] == weights
    assert [name for name in names if name.endswith(".png")] == [
        "4-mse.png",
        "2-cond.png",
        "2-full.png",
        "1-cond.png",
        "1-full.png",
    ]
    parent = checkpoint.fingerprint(checkpoint.load(str(tiny_sd)).unet)
    for name in weights:
        path = tmp_path / "run" / name
        recipe = lora.load(path).recipe if path.suffix else checkpoint.load(str(path)).recipe
        steps = int(name[len("lightning-")])
        assert (recipe.num_steps, recipe.parent, recipe.family) == (steps, parent, "sd15")
        assert recipe.prediction_type == ("sample" if steps == 1 else "epsilon")
    config = json.loads((tmp_path / "run" / "lightning-1step-full" / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "sample"
    card = (tmp_path / "run" / "README.md").read_text()
    assert all(f"`{name}`" in card for name in weights)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.tensor(v).isfinite() for row in rows for v in row.values())
    seen = {key for row in rows for key in row}
    assert {"student/mse", "student/switch", "student/gan", "discriminator/gan", "discriminator/r1", "d_real", "drift"} <= seen


def test_a_stage_goes_on_from_the_file_of_another_run(train, tiny_sd, tmp_path):
    assert train("--base", str(tiny_sd), "-o", "a", "--stages", "8:4")[0] == 0
    given = ["--base", str(tiny_sd), "-o", "b", "--init", "a/lightning-4step.safetensors", "--adversarial-lr", "1e-9"]
    assert train(*given)[0] == 0
    one, two = (lora.load(tmp_path / name).modules for name in ("a/lightning-4step.safetensors", "b/lightning-2step.safetensors"))
    key = next(iter(one))
    torch.testing.assert_close(one[key].delta(), two[key].delta(), atol=1e-4, rtol=1e-2)


def test_a_resumed_command_goes_on_in_its_phase(train, tiny_sd, tmp_path, capfd):
    """Stopped by too few steps of a budget, told again: the outputs of both halves are there."""
    chain = ["--stages", "4:2,2:1", "--phases", "cond", "--steps", "5", "--save-every", "1"]
    from fastdiff.training import trainer

    real = trainer.Trainer.train_step

    def stopping(self):
        import signal

        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self)

    trainer.Trainer.train_step = stopping
    try:
        code, told = train("--base", str(tiny_sd), "-o", "run", *chain)
    finally:
        trainer.Trainer.train_step = real
    assert code == 75, told
    code, told = train("--base", str(tiny_sd), "-o", "run", *chain)
    assert code == 0, told
    names = [Path(p["path"]).name for p in told["outputs"]]
    assert names == ["lightning-2step.safetensors", "2-cond.png", "lightning-1step.safetensors", "1-cond.png"]
    assert told["metrics"]["steps"] == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--stages", "8:3"], "--stages 8:3"),
        (["--phases", "full"], "--phases full"),
        (["--stages", "4:2:0"], "--stages 4:2:0"),
        (["--steps", "1", "--phases", "cond,uncond"], "--steps 1: too few for 2 phases"),
        (["--init", "gone.safetensors"], "gone.safetensors"),
        (["--max-time", "soon"], "--max-time soon"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_run_behind(args, message, train, tiny_sd, tmp_path):
    code, told = train("--base", str(tiny_sd), "-o", "run", *args)
    assert code == 2, told
    assert message in told["error"]["message"]
    assert "\n" not in told["error"]["message"]
    assert not (tmp_path / "run").exists()


def test_sampling_these_weights_any_other_way_is_warned_of(train, tiny_sd, tmp_path, capfd):
    assert train("--base", str(tiny_sd), "-o", "run")[0] == 0
    given = [
        "--base",
        str(tiny_sd),
        "--lora",
        "run/lightning-2step.safetensors",
        "--prompt",
        "a cat",
        "--resolution",
        "64",
        "--json",
    ]

    def warnings(*args):
        assert cli.main(["sample", *given, "-o", "a.png", *args]) == 0
        return json.loads(capfd.readouterr().out)["warnings"]

    assert warnings() == []
    assert warnings("--guidance", "1") == []  # as little guidance as none
    for flag, value, told in (
        ("--num-steps", "4", "distilled for exactly 2 steps"),
        ("--scheduler", "dpm++", "distilled for scheduler euler"),
        ("--guidance", "5", "distilled for guidance 0.0"),
    ):
        assert any(told in w for w in warnings(flag, value)), flag


def test_a_merge_with_a_style_keeps_the_recipe(train, tiny_sd, tmp_path):
    train("--base", str(tiny_sd), "-o", "run", "--stages", "2:1", "--steps", "2")
    weights = tmp_path / "run" / "lightning-1step.safetensors"
    assert cli.main(["merge-lora", "--accel", str(weights), "--style", str(weights), "-o", "merged.safetensors"]) == 0
    recipe = lora.load(tmp_path / "merged.safetensors").recipe
    assert (recipe.scheduler, recipe.num_steps, recipe.prediction_type) == ("euler", 1, "sample")


# ---- several processes

PROGRAM = """
import os, socket, sys, torch
torch.set_num_threads(1)
import diffusers, peft, transformers
from tiny import few_teacher_steps
from toy import child
from fastdiff import cli
from fastdiff.data.batch import Encoded
from fastdiff.methods.lightning import Lightning
from fastdiff.sampling.settings import Settings
Settings.usual = few_teacher_steps(Settings.usual)
weight = torch.nn.Parameter(torch.ones(1))
weight.grad = torch.ones(1)
torch.optim.AdamW([weight]).step()  # what torch imports only now would take every child seconds
rank, world = 0, 1
calls, seen = 0, []
real, start = Encoded.batch, Lightning.start

def batch(self, size, generator, shared=None):  # the halves of one batch: of two processes, or of two micro-batches
    global calls
    number, part = (calls, rank) if world == 2 else divmod(calls, 2)
    calls += 1
    found = real(self, size, torch.Generator().manual_seed(10 * number + part))
    object.__setattr__(found, "key", 10 * number + part)
    return found

def same_noise(self, batch, part):
    torch.manual_seed(batch.key)
    seen.append(start(self, batch, part)[0])
    return seen[-1], start(self, batch, part)[1]

from fastdiff.data.batch import Batch
move = Batch.to
def to(self, device):
    found = move(self, device)
    object.__setattr__(found, "key", self.key)
    return found
Batch.to, Encoded.batch, Lightning.start = to, batch, same_noise

def run(args, of=None):
    global rank, world
    if of is not None:
        rank, world = of, 2
        os.environ.update(RANK=str(of), LOCAL_RANK=str(of), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    code = cli.main(args)
    torch.save({"seen": seen, "code": code}, f"{world}-rank{rank}.pt")

args = sys.argv[1:]
codes = [child(lambda: run([*args, "--grad-accum", "2", "-o", "one"])).wait()]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
two = [child(lambda n=n: run([*args, "--grad-accum", "1", "-o", "two"], n)) for n in (0, 1)]
sys.exit(max([*codes, *(one.wait() for one in two)]))
"""


@pytest.mark.slow
def test_two_processes_equal_one(tiny_sd, tmp_path):
    """On the halves of its batch, through all phases and into every file. The processes are forks of one, which imports once."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    args = f"lightning --base {tiny_sd} --steps 4 --batch-size 2 --resolution 64 --pairs 3 --teacher-steps 2 --lora-rank 4 "
    args += "--device cpu --prompts prompts.txt --warmup 0 --stages 2:1 --no-lora-only --phases cond,uncond,full "
    args += "--discriminator full --adversarial-lr 1e-4 --full-lr 1e-4"
    path = f"{Path(fastdiff.__file__).parents[1]}{os.pathsep}{Path(__file__).parent}"
    env = {**os.environ, "FASTDIFF_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "program.py", *args.split(), "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [torch.load(tmp_path / name) for name in ("1-rank0.pt", "2-rank0.pt", "2-rank1.pt")]
    assert [found["code"] for found in told] == [0, 0, 0], done.stdout
    seen = [found["seen"] for found in told]
    assert len(seen[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0::2], seen[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1::2], seen[2], strict=True))
    one, two = (load_file(tmp_path / run / "lightning-1step.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for k in one:
        torch.testing.assert_close(one[k], two[k], atol=5e-5, rtol=0)
    unet = "unet/diffusion_pytorch_model.safetensors"
    one, two = (load_file(tmp_path / run / "lightning-1step-full" / unet) for run in ("one", "two"))
    assert max((one[k] - two[k]).abs().max() for k in one) < 3e-4  # Adam's first steps are lr * sign, also of rounding
