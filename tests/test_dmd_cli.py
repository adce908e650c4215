"""`dmd` from command line to files, on tiny checkpoints of every family."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff import cli, lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.models import perceptual


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """Run the command in an empty folder with two quick steps; returns (exit code, JSON object)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")

    def command(*args):
        quick = dict(steps=2, batch_size=2, grad_accum=1, resolution=64, pairs=2, teacher_steps=2, lora_rank=4, device="cpu")
        quick |= dict(proof=0, warmup=0, lpips_weights="embedded", prompts="prompts.txt")
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in quick.items()]
        flags = [flag for flag in flags if flag.split("=")[0] not in args]
        code = cli.main(["dmd", *args, *flags, "--json"])
        return code, json.loads(capfd.readouterr().out)

    return command


def as_diffusers_draws(base, weights, seed, timesteps, sdxl=False):
    """The card's recipe by stock classes: pixels (3, H, W) in [0, 1]."""
    import diffusers

    kind = diffusers.StableDiffusionXLPipeline if sdxl else diffusers.StableDiffusionPipeline
    source = base if weights.suffix else weights
    more = {} if sdxl else dict(safety_checker=None)
    pipe = kind.from_pretrained(str(source), **more)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    if weights.suffix:
        pipe.load_lora_weights(str(weights))
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(seed)
    out = pipe(
        "a cat", num_inference_steps=len(timesteps), timesteps=list(timesteps), guidance_scale=1.0, generator=g, output_type="pt",
        height=64, width=64,
    )  # fmt: skip
    return out.images[0]


@pytest.mark.parametrize(
    ("kind", "args", "timesteps"),
    [
        ("tiny_sd", [], (999,)),
        ("tiny_sd", ["--t-gen", "749", "--seed", "2147483647"], (749,)),  # the highest seed that there is
        ("tiny_v", ["--student", "full"], (999,)),
        ("tiny_sd", ["--recipe", "dmd2", "--fake", "full", "--fake-steps-per-gen", "1"], (999, 749, 499, 249)),
        ("tiny_sdxl", ["--recipe", "dmd2", "--num-steps", "2", "--fake-steps-per-gen", "1"], (999, 499)),
        ("tiny_sdxl", ["--recipe", "dmd2", "--num-steps", "1", "--t-gen", "399", "--reg-steps", "1"], (399,)),
    ],
)
def test_what_is_written_draws_in_stock_diffusers_as_here(kind, args, timesteps, train, tmp_path, request, capfd, monkeypatch):
    base = request.getfixturevalue(kind)
    code, told = train("--base", str(base), "-o", "run", "--lr", "1e-2", *args)
    assert code == 0, told
    weights = tmp_path / told["outputs"][0]["path"]
    full = "full" in args and "--student" in args
    where = ["--base", str(weights)] if full else ["--base", str(base), "--lora", str(weights)]
    assert told["next_command"].startswith(f"fastdiff sample {' '.join(where)}".replace(f"{tmp_path}/", ""))
    sample = [*where, "--prompt", "a cat", "--seed", "7", "--resolution", "64", "-o", "cat.png", "--json"]
    assert cli.main(["sample", *sample]) == 0
    settings = json.loads(capfd.readouterr().out)["metrics"]["settings"]
    assert (settings["scheduler"], settings["guidance"]) == ("lcm", 1.0)
    assert tuple(settings["timesteps"]) == timesteps
    from PIL import Image

    ours = torch.from_numpy(np.array(Image.open(tmp_path / "cat.png"))) / 255
    theirs = as_diffusers_draws(base, weights, 7, timesteps, kind == "tiny_sdxl").permute(1, 2, 0)
    # A PNG holds 1/255 steps: the pixels must round to the same, but for those on the edge.
    assert (ours - theirs).abs().max() <= 0.5 / 255 + 1e-3
    stock = as_diffusers_draws(base, base, 7, timesteps, kind == "tiny_sdxl").permute(1, 2, 0)
    assert (ours - stock).abs().max() > 0.02, "two steps at that rate must show"
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"guidance_scale=1, timesteps={list(timesteps)}" in card
    assert ("scheduler `simple`" in card) == (timesteps not in {(749,), (399,)})
    scope = {}
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "run")
    exec(code, scope)
    assert scope["image"].size == (64, 64)


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize(
    "args",
    [
        "--gan-weight 1e-3 --lambda-reg 0",
        "--gan-weight 1e-3 --gan-features teacher --recipe dmd2 --lora-layers attention",
        "--recipe dmd --weighting eq8 --reg-batch 1 --reg-crop 4 --grad-accum 2 --gradient-checkpointing",
        "--eval-every 1 --keep best --patience 1 --ema 0.5 --fake-lr 1e-3",
    ],
)
def test_every_variant(kind, args, train, tmp_path, request):
    args = args.split()
    code, told = train("--base", str(request.getfixturevalue(kind)), "-o", "run", *args)
    assert code == 0, told
    written = lora.load(tmp_path / told["outputs"][0]["path"])
    default = "dmd2" if kind == "tiny_sdxl" else "dmd"
    assert written.recipe.method == (args[args.index("--recipe") + 1] if "--recipe" in args else default)
    assert all(m.delta().isfinite().all() for m in written.modules.values())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.tensor(v).isfinite() for row in rows for v in row.values())
    assert {"x_mean", "x_std", "real_std", "fake_std", "difference"} <= set(rows[-1])
    if "--gan-weight" in args:
        assert {"d_fake", "d_real"} <= set(rows[-1])
    if "--keep" in args:
        assert {"drift", "contrast", "saturation", "sharpness"} <= set(rows[-1])
        assert told["metrics"]["best"]["step"] in {1, 2}
        assert (
            lora.load(tmp_path / "run" / "best" / Path(told["outputs"][0]["path"]).name).modules.keys() == written.modules.keys()
        )


def test_without_regression_and_gan_no_sample_and_no_picture_is_needed(train, tiny_sd, tmp_path):
    code, told = train("--base", str(tiny_sd), "-o", "run", "--recipe", "dmd2", "--gan-weight", "0")
    assert code == 0, told
    assert not list((tmp_path / "cache").glob("teacher-*"))


def test_pairs_are_shared_between_runs(train, tiny_sd, tmp_path, monkeypatch):
    assert train("--base", str(tiny_sd), "-o", "a")[0] == 0
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    before = path.stat().st_mtime_ns
    assert train("--base", str(tiny_sd), "-o", "b", "--lr", "1e-3")[0] == 0
    assert path.stat().st_mtime_ns == before


def test_a_folder_of_pictures_feeds_the_gan(train, tiny_sd, tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64), (40, 90, 120)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a cat")
    given = ["--base", str(tiny_sd), "--data", "pictures", "-o", "run"]
    code, told = train(*given)
    assert code == 2
    assert "needs pairs" in told["error"]["message"]
    code, told = train(*given, "--recipe", "dmd2", "--gan-weight", "1e-3")
    assert code == 0, told
    assert not list((tmp_path / "cache").glob("teacher-*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--t-min", "0.9", "--t-max", "0.1"], "--t-min 0.9"),
        (["--num-steps", "4", "--t-gen", "2"], "--t-gen 2"),
        (["--t-gen", "5000"], "--t-gen 5000"),
        (["--fake-steps-per-gen", "0"], "--fake-steps-per-gen 0"),
        (["--guidance", "0.5"], "--guidance 0.5"),
        (["--lpips-weights", "gone.pth"], "--lpips-weights gone.pth: no such file"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_run_behind(args, message, train, tiny_sd, tmp_path):
    code, told = train("--base", str(tiny_sd), "-o", "run", *args)
    assert code == 2, told
    assert message in told["error"]["message"]
    assert "\n" not in told["error"]["message"]
    assert not (tmp_path / "run").exists()


def test_a_student_goes_on_from_another_run(train, tiny_sd, tmp_path):
    assert train("--base", str(tiny_sd), "-o", "a", "--lr", "1e-2")[0] == 0
    code, told = train("--base", str(tiny_sd), "-o", "b", "--recipe", "dmd2", "--init", "a/dmd.safetensors", "--lr", "1e-9")
    assert code == 0, told
    one, two = (lora.load(tmp_path / name).modules for name in ("a/dmd.safetensors", "b/dmd2.safetensors"))
    key = next(iter(one))
    torch.testing.assert_close(one[key].delta(), two[key].delta(), atol=1e-4, rtol=1e-2)
    code, told = train("--base", str(tiny_sd), "-o", "c", "--init", "gone.safetensors")
    assert (code, "gone.safetensors" in told["error"]["message"]) == (2, True)
    assert not (tmp_path / "c").exists()


def test_steps_that_the_student_does_not_know_are_warned_of(train, tiny_sd, tmp_path, capfd):
    train("--base", str(tiny_sd), "-o", "run", "--recipe", "dmd2")
    given = ["--base", str(tiny_sd), "--lora", "run/dmd2.safetensors", "--prompt", "a cat", "--resolution", "64", "--json"]
    assert cli.main(["sample", *given, "--num-steps", "2", "-o", "a.png"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert any("know only timesteps 999, 749, 499, 249" in w for w in told["warnings"])
    assert told["metrics"]["settings"]["timesteps"] is None


def test_a_merge_with_a_style_keeps_the_timesteps(train, tiny_sd, tmp_path):
    train("--base", str(tiny_sd), "-o", "run", "--t-gen", "749")
    weights = tmp_path / "run" / "dmd.safetensors"
    assert cli.main(["merge-lora", "--accel", str(weights), "--style", str(weights), "-o", "merged.safetensors"]) == 0
    assert lora.load(tmp_path / "merged.safetensors").recipe.timesteps == (749,)


# ---- LPIPS


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """Torchvision's VGG-16 with random weights, its convolutions as the model zoo names them."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    state = {f"features.{k}": v.contiguous() for k, v in vgg16(weights=None).features.state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(state, path)
    return path


def test_lpips_is_the_librarys_on_the_given_backbone(vgg):
    import lpips

    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    state = load_file(vgg)
    for key, p in theirs.net.state_dict().items():
        p.copy_(state["features." + key.split(".", 1)[1]])
    a, b = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance = perceptual.open_distance(FAMILIES["sd15"], str(vgg))
    torch.testing.assert_close(distance(a, b), theirs(a, b).flatten())
    assert distance(a, a).abs().max() == 0
    a.requires_grad_(True)
    distance(a, b).sum().backward()
    assert a.grad.abs().sum() > 0


def test_lpips_needs_the_backbone_or_says_how_to_get_it(train, tiny_sd, tmp_path, monkeypatch, vgg):
    """Never a random one: offline, without a connection, and with a file that is something else."""
    given = ["--base", str(tiny_sd), "-o", "run", "--lpips-weights=none"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, told = train(*given, "--lpips-weights")  # the last spelling stops the fixture from adding its own
    assert code == 2
    for offline in ("1", "0"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
        with pytest.raises(perceptual.UsageError, match="LPIPS needs vgg16-397923af.pth") as error:
            perceptual.open_distance(FAMILIES["sd15"], None, off="`lambda_reg=0`")
        assert ("no route" in str(error.value)) == (offline == "0")
        assert all(way in error.value.hint for way in ("`lpips_weights=vgg16", "embedded", "`lambda_reg=0`"))
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(perceptual.UsageError, match=r"that file lacks .* of VGG-16's layers"):
        perceptual.open_distance(FAMILIES["sd15"], str(tmp_path / "other.safetensors"))
    assert train("--base", str(tiny_sd), "-o", "vgg", "--lpips-weights", str(vgg))[0] == 0


def test_every_network_of_the_distance_moves_to_a_device(vgg, tiny_sd):
    vae = checkpoint.load(str(tiny_sd)).vae
    for weights in ("embedded", str(vgg)):
        distance = perceptual.DecodedDistance(vae, perceptual.open_distance(FAMILIES["sd15"], weights), 4)
        there = {name.split(".")[0] for name, _ in distance.named_parameters()}
        assert there == {"vae", "distance"}
        assert not any(p.requires_grad for p in distance.parameters())


def test_the_backbone_in_torchs_cache_is_used(vgg, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    home = tmp_path / "hub" / "checkpoints"
    home.mkdir(parents=True)
    torch.save(load_file(vgg), home / "vgg16-397923af.pth")
    a, b = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    cached, given = perceptual.open_distance(FAMILIES["sd15"], None), perceptual.open_distance(FAMILIES["sd15"], str(vgg))
    assert torch.equal(cached(a, b), given(a, b))


def test_a_window_of_the_latents_is_decoded_the_same_of_both(tiny_sd):
    vae, seen = checkpoint.load(str(tiny_sd)).vae, []

    class Spy(torch.nn.Module):
        def forward(self, a, b):
            seen.append((a, b))
            return (a - b).square().mean((1, 2, 3))

    distance = perceptual.DecodedDistance(vae, Spy(), crop=4)
    z = torch.randn(2, 4, 8, 8)
    assert distance(z, z).max() < 0.2  # the target is clamped
    a, b = seen[0]
    assert a.shape == b.shape == (2, 3, 32, 32)
    torch.testing.assert_close(a.clamp(-1, 1), b)


# ---- several processes

PROGRAM = """
import os, sys, torch
torch.set_num_threads(1)
from fastdiff import cli, trainer
from fastdiff.methods import dmd
rank = int(os.environ["RANK"])
real, seen = dmd.DMD.start, []
dmd.DMD.start = lambda self, batch, k, pairs: seen.append((k, x := real(self, batch, k, pairs))) or x
code = cli.main(sys.argv[1:])
torch.save({"seen": seen, "code": code}, f"rank{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_one_student(tiny_sd, tmp_path):
    """Same weights, same step of the student, other noise; the pairs are made once between them; one writes."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    args = f"dmd --base {tiny_sd} -o run --steps 3 --batch-size 2 --grad-accum 1 --resolution 64 --pairs 3 --teacher-steps 2 "
    args += "--lora-rank 4 --device cpu --prompts prompts.txt --warmup 0 --recipe dmd2 --fake-steps-per-gen 1 --gan-weight 1e-3"
    package = str(Path(fastdiff.__file__).parents[1])
    env = {**os.environ, "FASTDIFF_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    done = subprocess.run(
        [*command, "program.py", *args.split(), "--json"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    assert [r["code"] for r in ranks] == [0, 0]
    for a, b in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True):
        assert a[0] == b[0]
        assert not torch.equal(a[1], b[1])
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    assert lora.load(tmp_path / "run" / "dmd2.safetensors").recipe.num_steps == 4
