"""What `import fastdiff as fd` gives for sampling and LoRAs, on the embedded checkpoint; the command writes the same bytes."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff as fd
from fastdiff import cli
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.locate import EMOJI
from fastdiff.diffusion.samplers import SOLVERS
from fastdiff.quality import samples
from fastdiff.runtime.errors import UsageError
from fastdiff.sampling import assemble
from fastdiff.sampling.sampler import SeededNoise

STYLE, CPU = EMOJI / "style.safetensors", dict(device="cpu")
RECIPE = fd.Recipe(method="lcm", family="emoji", scheduler="lcm", num_steps=2, guidance=1.0)


def student_of(base):
    """A role of the base whose adapter does something."""
    torch.manual_seed(0)
    fd.lora.attach(base.unet, 4, 8, "student", ["to_q", "to_k"])
    for name, p in base.unet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.2)
    return fd.Denoiser.of(base, "student")


@pytest.fixture(scope="module")
def few_step(tmp_path_factory):
    """Saved from an adapter, as a training loop of one's own would."""
    path = tmp_path_factory.mktemp("lora") / "lcm.safetensors"
    assert fd.lora.save_adapter(student_of(fd.load("emoji")), path, recipe=RECIPE) == path
    return path


@pytest.fixture(scope="module")
def fast(few_step):
    return fd.Sampler("emoji", loras={few_step: 1.0}, **CPU)


def same(a, b):
    return np.array_equal(np.array(a), np.array(b))


def test_every_public_name_is_there_and_a_plain_import_waits_for_nothing():
    assert set(fd.__all__) <= set(dir(fd))
    assert all(getattr(fd, name) is not None for name in fd.__all__)
    assert callable(fd.losses.pseudo_huber)
    assert all(callable(getattr(fd.lora, name)) for name in fd.lora.PUBLIC)
    import fastdiff.lora.merging  # noqa: F401

    assert callable(fd.lora.merge)  # no module hides it
    code = "import sys, fastdiff; fastdiff.__all__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_call_draws_the_bytes_of_the_command(fast, few_step, tmp_path, capfd):
    shared = ["sample", "--lora", str(few_step), "--device", "cpu", "--prompt", "a red apple", "--prompt", "panda"]
    assert cli.main([*shared, "--num-images", "3", "--seed", "5", "-o", str(tmp_path / "cli")]) == 0
    assert cli.main([*shared[:-2], "--num-steps", "3", "--guidance", "4", "--scheduler", "ddim", "--negative", "white",
                     "--spacing", "leading", "-o", str(tmp_path / "other.png")]) == 0  # fmt: skip
    pictures = fast(["a red apple", "panda"], seeds=range(5, 8))
    written = pictures.save(tmp_path / "api")
    assert [path.name for path in written] == [f"{k:04d}-seed{seed}.png" for k in range(2) for seed in (5, 6, 7)]
    for path, picture in zip(written, pictures, strict=True):
        theirs = Image.open(tmp_path / "cli" / path.name)
        assert same(theirs, picture)
        assert same(theirs, Image.open(path))
    (sheet,) = pictures.save(tmp_path / "sheet.png")
    assert same(Image.open(sheet), Image.open(tmp_path / "cli" / "grid.png"))
    how = dict(num_steps=3, guidance=4, scheduler="ddim", negative="white", spacing="leading")
    assert same(fast("a red apple", **how)[0], Image.open(tmp_path / "other.png"))
    facts = json.loads(Image.open(written[0]).text["fastdiff"])
    assert (facts["prompt"], facts["seed"], facts["base"], facts["lora"]) == ("a red apple", 5, "emoji", ["lcm.safetensors=1"])
    assert (facts["scheduler"], facts["num_steps"]) == ("lcm", 2)


def test_a_control_picture_acts_as_in_the_command(tmp_path):
    pytest.importorskip("cv2")
    drawn = fd.Sampler("emoji", **CPU)("robot", num_steps=2)[0].resize((90, 70))
    drawn.save(tmp_path / "robot.png")
    shared = ["sample", "--device", "cpu", "--prompt", "fruit", "--num-steps", "2", "--controlnet", "emoji"]
    how = ["--control-image", str(tmp_path / "robot.png"), "--control-scale", "0.5"]
    assert cli.main([*shared, *how, "-o", str(tmp_path / "cli.png")]) == 0
    guided = fd.Sampler("emoji", controlnet="emoji", control_scale=0.5, **CPU)
    for image in (tmp_path / "robot.png", drawn):
        assert same(guided("fruit", num_steps=2, control_image=image)[0], Image.open(tmp_path / "cli.png"))
    with pytest.raises(UsageError, match="`controlnet` and `control_image` go together"):
        guided("fruit")


def test_the_recipe_is_obeyed_and_a_contradiction_warned_of(fast, capfd):
    assert fast.recipe == RECIPE
    assert (fast.settings.scheduler, fast.settings.num_steps, fast.settings.guidance) == ("lcm", 2, 1.0)
    assert fast.coverage[0]["applied"] == fast.coverage[0]["total"] > 0
    fast("fox", scheduler="ddim", negative="white")
    told = capfd.readouterr().err
    assert "the weights were distilled for scheduler lcm" in told
    assert "no effect at guidance 1 or less" in told
    with pytest.raises(ValueError, match="heun"):
        fast("fox", scheduler="heun")


def test_pictures_are_a_list(fast, tmp_path):
    pictures = fast("a red apple", seeds=(3, 4))
    assert len(pictures) == len(list(pictures)) == 2
    assert isinstance(pictures[0], Image.Image)
    assert not same(pictures[0], pictures[1])
    (one,) = pictures[1:].save(tmp_path / "new" / "one.png")
    assert same(Image.open(one), pictures[1])
    sheet = pictures.sheet()
    on_sheet = sheet.crop((sheet.width - 136, sheet.height - 136, sheet.width - 8, sheet.height - 8))
    assert same(on_sheet, pictures[1].resize((128, 128), Image.Resampling.LANCZOS))  # the last picture, within the margin


def test_a_stream_gives_pictures_one_by_one_and_may_be_endless(fast):
    stream = fast.stream("a red apple", seeds=itertools.count(3), batch_size=2)
    first = list(itertools.islice(stream, 3))
    whole = fast("a red apple", seeds=range(3, 7), batch_size=2)
    assert all(same(a, b) for a, b in zip(first, whole, strict=False))


def test_what_is_given_stays_as_it_is(few_step):
    """Also where the caller has the network in memory."""
    base = fd.load("emoji")
    before = checkpoint.fingerprint(base.unet)
    worn = fd.Sampler(base, loras=[few_step, f"{STYLE}=0.5"], **CPU)
    assert [c["weight"] for c in worn.coverage] == [1.0, 0.5]
    plain = fd.Sampler(base, **CPU)("fox", num_steps=1)[0]
    assert checkpoint.fingerprint(base.unet) == before
    assert same(plain, fd.Sampler("emoji", **CPU)("fox", num_steps=1)[0])
    assert not same(plain, worn("fox", num_steps=1, scheduler="ddim", guidance=3)[0])
    item = fd.lora.load(few_step)
    for loras in ({item: 1.0}, item, few_step, [(item, 1)]):
        again = fd.Sampler(base, loras=loras, **CPU)
        assert again.settings.scheduler == "lcm"
        assert again.coverage[0]["weight"] == 1.0


def test_parts_that_do_not_belong_are_refused(few_step, tiny_sd):
    with pytest.raises(UsageError, match="distilled from emoji"):
        fd.Sampler(str(tiny_sd), loras=few_step, **CPU)
    with pytest.raises(UsageError, match="must be a finite number"):
        fd.Sampler("emoji", loras={few_step: float("nan")}, **CPU)
    base = fd.load("emoji")
    assert fd.Sampler(base, precision="bf16", **CPU).base.dtype == torch.bfloat16
    _ = base.unet
    with pytest.raises(UsageError, match="`precision=bf16`: the base's network is already in memory"):
        fd.Sampler(base, precision="bf16", **CPU)
    with pytest.raises(UsageError, match="made of networks in memory"):
        fd.Sampler.of_networks(base, fd.Denoiser.of(base), base.vae).pipeline()


def test_the_stock_pipeline_draws_the_same_picture(fast, few_step, monkeypatch):
    import diffusers.schedulers.scheduling_lcm as module

    pipe = fast.pipeline()
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    pipe.set_progress_bar_config(disable=True)
    config = pipe.unet.config
    noise = SeededNoise([3], (config.in_channels, config.sample_size, config.sample_size), "cpu")
    start = noise()
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise())
    how = dict(num_inference_steps=2, guidance_scale=1.0, latents=start, height=64, width=64, output_type="np")
    theirs = pipe("a red apple", **how).images[0] * 255
    ours = np.array(fast("a red apple", seeds=3)[0]).astype(float)
    assert np.abs(theirs - ours).max() < 0.6  # ours is rounded to bytes
    plain = fd.Sampler("emoji", **CPU)("a red apple", seeds=3, scheduler="lcm", num_steps=2, guidance=1)[0]
    assert np.abs(np.array(plain).astype(float) - ours).max() > 3  # the LoRA is in both
    pipe.unet.conv_in.weight.data.zero_()  # its networks are its own
    assert same(fast("a red apple", seeds=3)[0], ours.astype(np.uint8))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_stock_scheduler_of_every_name(name):
    config = {k: v for k, v in fd.load("emoji").scheduler_config.items() if k != "clip_sample"}  # diffusers' default is True
    made = assemble.stock_scheduler(name, config, spacing=None, kind="sample")
    assert type(made).__name__ == SOLVERS[name].stock
    assert made.config.prediction_type == "sample"
    assert not made.config.get("clip_sample", False)  # our samplers never clip


def test_merging_writes_the_bytes_of_the_command(few_step, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    args = ["merge-lora", "--accel", str(few_step), "--style", f"{STYLE}=0.8"]
    for more, rank in (([], None), (["--rank", "3"], 3)):
        assert cli.main([*args, *more, "-o", "out/fast.safetensors"]) == 0
        merged = fd.lora.merge({few_step: 1.0, STYLE: 0.8}, rank=rank)
        assert merged.recipe.scheduler == "lcm"
        path = merged.save(tmp_path / "api" / "fast.safetensors")
        assert path.read_bytes() == (tmp_path / "out" / "fast.safetensors").read_bytes()
    loras = [fd.lora.load(few_step), fd.lora.load(STYLE)]
    by_object = fd.lora.merge({loras[0]: 1.0, loras[1]: 0.8}, rank=3)
    assert by_object.save("api/again/fast.safetensors").read_bytes() == path.read_bytes()


def test_baking_writes_the_checkpoint_of_the_command(few_step, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["merge-lora", "--accel", str(few_step), "--base", "emoji", "-o", "cli"]) == 0
    count, outputs = fd.lora.bake("emoji", few_step, "api")
    assert count > 0
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (outputs[0] / name).read_bytes() == (tmp_path / "cli" / name).read_bytes()
    assert fd.Sampler("api", **CPU).settings.num_steps == 2


def test_a_saved_adapter_is_what_the_role_did(few_step):
    base = fd.load("emoji")
    with pytest.raises(UsageError, match="`adapter=student`: the network has no adapter"):
        fd.lora.save_adapter(base.unet, "none.safetensors")
    student, teacher = student_of(base), fd.Denoiser.of(base)
    fast = fd.Sampler("emoji", loras={few_step: 1.0}, precision="fp32", **CPU)
    cond, uncond = fast.conds(["a red apple"])
    draw = lambda role: fd.Sampler.of_networks(base, role, base.vae).pixels(cond, uncond, [1], fast.settings, resolution_px=64)
    ours = fast.pixels(cond, uncond, [1], fast.settings, resolution_px=64)
    torch.testing.assert_close(draw(student), ours, atol=1e-2, rtol=0)  # the file is fp16
    assert (draw(teacher) - ours).abs().max() > 0.02


# ---- the whole


def test_the_fifteen_lines(tmp_path, monkeypatch):
    """What the README promises, on the embedded checkpoint and in few steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(samples, "TIMED_S", 0)
    monkeypatch.setattr(samples, "TIMED", (1, 1))
    base = fd.load("emoji")
    run = fd.train("lcm", base, steps=2, lora_rank=4, lora_alpha=4, batch_size=2, proof=0, device="cpu")
    fast = fd.Sampler(base, loras={run.weights: 1.0}, **CPU)
    fast("a red apple", seeds=range(4)).save("apples.png")
    fd.lora.merge({run.weights: 1.0, STYLE: 0.8}).save("fast-anime.safetensors")
    table = fd.evaluate(fast, teacher=base, num_steps=[1, 2], num_images=8, teacher_steps=2, baseline=False).table
    assert run.weights.as_posix() == "runs/train-lcm-lora-emoji/lcm.safetensors"
    assert Image.open("apples.png").width > 4 * 128  # four pictures side by side, with labels
    assert fd.lora.load("fast-anime.safetensors").recipe.scheduler == "tcd"
    assert "student" in table
    assert not any(".lora_" in name for name, _ in base.unet.named_parameters())  # the base that was given stays as it is
    assert (tmp_path / "runs/train-lcm-lora-emoji/README.md").exists()


def test_training_takes_a_class_a_file_or_a_command_and_names_what_it_does_not_know():
    from fastdiff.commands import train as training
    from fastdiff.methods.lcm import LCM

    assert training.named("lcm") is training.named("train-lcm-lora") is LCM
    with pytest.raises(UsageError, match="`method=lmc`: there is no such method") as error:
        fd.train("lmc", "emoji")
    assert error.value.hint == "did you mean lcm?"
    with pytest.raises(UsageError, match="`lora_rnk`: not an option of train-lcm-lora") as error:
        fd.train(LCM, "emoji", lora_rnk=4)
    assert error.value.hint == "did you mean lora_rank?"
    with pytest.raises(UsageError, match="`steps=0`: must be at least 1"):
        fd.train("lcm", EMOJI, steps=0, output=EMOJI)  # paths are taken as text
    with pytest.raises(UsageError, match="`base=nothing-here`: not an alias"):
        fd.load("nothing-here")


def test_a_loop_of_ones_own_makes_a_file_that_the_sampler_obeys(tmp_path):
    """examples/loop.py: 30 lines, no Trainer."""
    import importlib.util
    import inspect
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("loop", Path(__file__).parent.parent / "examples" / "loop.py")
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    torch.manual_seed(0)
    path = loop.distil(fd.load("emoji"), 2, str(tmp_path / "own.safetensors"), rank=4, batch_size=2)
    fast = fd.Sampler("emoji", loras={path: 1.0}, **CPU)
    assert (fast.settings.scheduler, fast.settings.num_steps, fast.settings.guidance) == ("lcm", 4, 1.0)
    plain = fd.Sampler("emoji", **CPU)("fox", scheduler="lcm", num_steps=4, guidance=1.0)[0]
    assert not same(fast("fox")[0], plain)
    assert len([line for line in inspect.getsource(loop.distil).splitlines() if line.strip()]) <= 30


def test_a_base_answers_in_roles():
    base = fd.load("emoji")
    student = student_of(base)
    teacher, worn = base.denoiser(), base.denoiser("student")
    assert teacher.net is worn.net is student.net
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(500)
    cond = fd.open_data(base).texts[:1]
    with torch.no_grad():
        assert torch.equal(worn(x, t, cond).x0, student(x, t, cond).x0)
        assert not torch.equal(worn(x, t, cond).x0, teacher(x, t, cond).x0)
