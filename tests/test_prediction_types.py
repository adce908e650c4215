"""Epsilon, v and zero terminal SNR: LoRAs of another type are told, guidance is rescaled as in diffusers, all commands learn."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build, controlnet_of
from safetensors.torch import load_file, save_file
from test_step_guidance import unrounded
from tiny import COMMANDS, arguments

from fastdiff import cli, lora
from fastdiff.checkpoints import checkpoint, write
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data.teacher import Shards
from fastdiff.diffusion.guidance import rescale
from fastdiff.lora import apply
from fastdiff.methods.lcm import LCM, guidance_embedded
from fastdiff.methods.shared import cutting
from fastdiff.models import text
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.quality.ways import teacher_ways
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused
from fastdiff.sampling import engine
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings
from fastdiff.sampling.stock_code import stock_code
from fastdiff.training.scene import teacher_sampling

ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="session")
def tiny_zero(tmp_path_factory):
    """SDXL and SD2 that predict v on a schedule that ends in pure noise, and SD1 that predicts v: folders by name."""
    made = {}
    for family in ("sdxl", "sd21", "sd15"):
        folder = build(tmp_path_factory.mktemp("zero") / family, family, "v_prediction")
        if family != "sd15":
            schedule(folder, **ZERO)
        made[family] = folder
    return made


def schedule(folder, **changes):
    """Change a folder's scheduler config; None removes an entry."""
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture
def warnings(monkeypatch):
    monkeypatch.setattr(console, "state", console.State(quiet=True))
    return console.state.warnings


def style(path, base, metadata, scale=0.01):
    """A LoRA of one layer with this header, in kohya's layout."""
    weight = dict(base.unet.named_parameters())["conv_in.weight"]
    out, inside, *kernel = weight.shape
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * scale
    tensors = {"lora_down.weight": draw(2, inside, *kernel), "lora_up.weight": draw(out, 2, 1, 1), "alpha": torch.tensor(2.0)}
    save_file({f"lora_unet_conv_in.{k}": v for k, v in tensors.items()}, path, metadata)
    return path


# ---- LoRAs of another type of prediction

SAYS_V = [
    {"fastdiff.prediction_type": "v_prediction"},
    {"modelspec.prediction_type": "v"},
    {"ss_v_parameterization": "True"},
    {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"},
    {"ss_base_model_version": "sd_v2_v"},
]
SAYS_EPSILON = [
    {"fastdiff.prediction_type": "epsilon"},
    {"modelspec.prediction_type": "epsilon"},
    {"ss_v_parameterization": "False"},
    {"modelspec.architecture": "stable-diffusion-v2-512/lora"},
    {"ss_base_model_version": "sd_v2"},
]
SAYS_NOTHING = [
    {},
    {"fastdiff.prediction_type": "sample", "modelspec.prediction_type": "epsilon"},  # Lightning's one step, of any base
    {"ss_base_model_version": "sdxl_base_v1-0"},
    {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
    {"modelspec.architecture": "stable-diffusion-v1/lora"},
    {"modelspec.prediction_type": "flow"},
]


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_v"])
def test_a_lora_of_another_type_of_prediction_is_told_where_its_header_says_so(name, request, warnings):
    base = checkpoint.load(str(request.getfixturevalue(name)))
    wrong = SAYS_V if base.prediction_type == "epsilon" else SAYS_EPSILON
    for header in (*SAYS_V, *SAYS_EPSILON, *SAYS_NOTHING):
        warnings.clear()
        apply.warn_of_prediction(base, [lora.Lora({}, header, "style")])
        kinds = ("v", "the noise (epsilon)")
        theirs, ours = kinds if header in SAYS_V else kinds[::-1]
        words = f"style: trained on a base that predicts {theirs}, but {base.ref} predicts {ours}"
        assert warnings == ([words] if header in wrong else []), header


def test_sampling_and_baking_tell(tiny_sd, tmp_path, capfd):
    path = style(tmp_path / "style.safetensors", checkpoint.load(str(tiny_sd)), {"ss_v_parameterization": "True"})
    how = ["--device", "cpu", "--json", "--offline"]
    sample = [
        "sample",
        "--base",
        tiny_sd,
        "--lora",
        path,
        "--prompt",
        "a cat",
        "--num-steps",
        "1",
        "-o",
        tmp_path / "a.png",
        *how,
    ]
    bake = ["merge-lora", "--accel", path, "--base", tiny_sd, "-o", tmp_path / "baked", "--json"]
    look = ["inspect", path, "--base", tiny_sd, "--json"]
    for command in (sample, bake, look):
        assert cli.main([*map(str, command)]) == 0
        told = json.loads(capfd.readouterr().out)
        (words,) = [w for w in told["warnings"] if "trained on" in w]
        assert words == f"{path}: trained on a base that predicts v, but {tiny_sd} predicts the noise (epsilon)"
    assert told["metrics"]["prediction_type"] == "v_prediction"


def test_a_base_of_a_guessed_type_is_told_as_one(tiny_sd, tmp_path, warnings):
    write.to_file(checkpoint.load(str(tiny_sd)), tmp_path / "plain.safetensors")
    save_file(load_file(tmp_path / "plain.safetensors"), tmp_path / "plain.safetensors")  # without a header
    base = checkpoint.load(str(tmp_path / "plain.safetensors"), config=str(tiny_sd))
    apply.warn_of_prediction(base, [lora.Lora({}, SAYS_V[2])])
    assert warnings[-1].endswith("as far as is known; if it predicts v, give `prediction_type=v_prediction`")


def test_a_start_of_another_type_is_told(tiny_v, tmp_path, warnings):
    from fastdiff.lora import adapters

    base = checkpoint.load(str(tiny_v))
    start = lora.load(style(tmp_path / "start.safetensors", base, {"modelspec.prediction_type": "epsilon"}))
    adapters.check_start(start, base, None)
    assert "start.safetensors: trained on a base that predicts the noise (epsilon)" in warnings[-1]


def test_merging_a_v_with_an_epsilon_lora_is_told_and_what_all_say_is_kept(tiny_sd, tmp_path, warnings):
    base = checkpoint.load(str(tiny_sd))
    one, two = (style(tmp_path / f"{i}.safetensors", base, h) for i, h in enumerate((SAYS_V[2], SAYS_EPSILON[1])))
    lora.merge([one, two])
    assert warnings[-1] == f"{two} was trained on a base that predicts the noise (epsilon), {one} on one that predicts v"
    warnings.clear()
    assert lora.merge([one, one]).trained_for == "v_prediction"
    assert not warnings


def test_the_header_of_a_written_lora_states_what_is_known_and_does_not_guess(tmp_path):
    factors = lora.Lora({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": attn(1024)})
    for kind, architecture, spec in (
        (None, None, None),
        ("epsilon", "stable-diffusion-v2-512/lora", "epsilon"),
        ("v_prediction", "stable-diffusion-v2-768-v/lora", "v"),
    ):
        factors.metadata = Recipe(prediction_type=kind).to_metadata()
        told = lora.load(factors.save(tmp_path / "one.safetensors")).metadata
        assert (told.get("modelspec.architecture"), told.get("modelspec.prediction_type")) == (architecture, spec)
        assert told["ss_v2"] == "True"


def attn(width):
    from fastdiff.lora.kinds import Factors

    return Factors(torch.ones(2, width), torch.ones(8, 2))


# ---- zero terminal SNR


def test_zero_snr_is_declared_for_a_file_that_does_not_say_it(tiny_zero, tmp_path):
    home = tiny_zero["sdxl"]
    base = checkpoint.load(str(home))
    write.to_file(base, tmp_path / "marked.safetensors")
    tensors = load_file(tmp_path / "marked.safetensors")
    assert {"v_pred", "ztsnr"} <= tensors.keys()
    save_file({k: v for k, v in tensors.items() if k not in {"v_pred", "ztsnr"}}, tmp_path / "plain.safetensors")
    plain, config = str(tmp_path / "plain.safetensors"), str(other_config(home, tmp_path))
    assert not checkpoint.load(plain, config=config, prediction="v_prediction").schedule().zero_terminal_snr
    said = checkpoint.load(plain, config=config, prediction="v_prediction", zero_snr=True)
    assert said.schedule().zero_terminal_snr
    assert said.scheduler_config["timestep_spacing"] == "trailing"
    write.to_file(said, tmp_path / "again.safetensors")  # export keeps it: the marker, and the folder's config
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "again.safetensors").keys()
    write.to_folder(said, tmp_path / "folder")
    assert checkpoint.load(str(tmp_path / "folder")).schedule().zero_terminal_snr


def other_config(home, tmp_path):
    """The folder's configs, whose scheduler says nothing of zero SNR and predicts epsilon."""
    import shutil

    copy = tmp_path / "configs"
    shutil.copytree(home, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    schedule(copy, rescale_betas_zero_snr=None, timestep_spacing="leading", prediction_type="epsilon")
    return copy


def test_zero_snr_as_an_option_draws_as_the_folder_that_says_it(tiny_zero, tmp_path, capfd):
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(tiny_zero["sdxl"], plain)
    schedule(plain, rescale_betas_zero_snr=None)
    pictures = {}
    for name, base in (("said", [plain, "--zero-snr"]), ("own", [tiny_zero["sdxl"]]), ("not", [plain])):
        flags = ["--prompt", "a cat", "--num-steps", "3", "--device", "cpu", "--json", "-o", tmp_path / f"{name}.png"]
        assert cli.main([*map(str, ["sample", "--base", *base, *flags])]) == 0
        told = json.loads(capfd.readouterr().out)
        assert told["warnings"] == []
        pictures[name] = told["outputs"][0]["sha256"], picture(tmp_path / f"{name}.png")
    assert torch.equal(pictures["said"][1], pictures["own"][1])
    assert not torch.equal(pictures["said"][1], pictures["not"][1])


def picture(path):
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(path)))


def test_contradictions_are_told_and_epsilon_is_refused(tiny_zero, tiny_sd, tmp_path, warnings, capfd):
    import shutil

    says_no = tmp_path / "no"
    shutil.copytree(tiny_zero["sd15"], says_no)  # diffusers writes the entry as false
    assert checkpoint.load(str(says_no), zero_snr=True).schedule().zero_terminal_snr
    assert "`zero_snr`: the scheduler config of" in warnings[-1]
    assert checkpoint.load(str(says_no), prediction="epsilon").prediction_type == "epsilon"
    assert warnings[-1].startswith("`prediction_type=epsilon`: the files of")
    with pytest.raises(InputRefused, match="a network that predicts epsilon is undefined"):
        checkpoint.load(str(tiny_sd), zero_snr=True)
    wrong = tmp_path / "wrong"
    shutil.copytree(tiny_sd, wrong)
    schedule(wrong, **ZERO)
    for command in (["sample", "--prompt", "a cat"], ["train-lcm-lora", "--prompts", "p.txt"]):
        (tmp_path / "p.txt").write_text("a cat\n")
        command = [x.replace("p.txt", str(tmp_path / "p.txt")) for x in command]
        assert cli.main([*command, "--base", str(wrong), "-o", str(tmp_path / "out"), "--device", "cpu", "--json"]) == 3
        error = json.loads(capfd.readouterr().out)["error"]
        assert "ends in pure noise (zero terminal SNR), where a network that predicts epsilon is undefined" in error["message"]
        assert error["hint"] == "if it predicts v, give --prediction-type v_prediction"
    assert not (tmp_path / "out").exists()


def test_leading_spacing_misses_the_pure_noise_of_a_zero_snr_base_and_is_told(tiny_zero, tiny_v, warnings):
    for folder, told in ((tiny_v, 0), (tiny_zero["sdxl"], 1)):
        sampler = Sampler(str(folder), device="cpu", compile="off")
        sampler("a cat", num_steps=2, spacing="trailing")
        assert not warnings
        sampler("a cat", num_steps=2, spacing="leading")
        assert len(warnings) == told
    assert warnings[0].startswith("`spacing=leading`: begins at timestep 501, which is not pure noise")


# ---- guidance rescale


def test_the_formula():
    g, c = torch.randn(3, 4, 5, 6) * 7 + 2, torch.randn(3, 4, 5, 6)
    for i, row in enumerate(rescale(g, c, 0.7)):
        expected = 0.7 * g[i] * c[i].std() / g[i].std() + 0.3 * g[i]
        torch.testing.assert_close(row, expected)
    assert torch.equal(rescale(g, c, 0.0), g)


RESCALED = [
    # Random networks hardly hear the prompt, so that it takes much guidance to change the spread of their outputs.
    Settings("ddim", 4, 75.0, guidance_rescale=0.7),
    Settings("euler", 2, 50.0, guidance_rescale=1.0),
    Settings("dpm++", 4, step_guidance=(1, 60, 60, 1), guidance_rescale=0.5),
]


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_v", "tiny_sdxl", "sdxl", "sd21"])
def test_stock_pipelines_draw_the_same_with_rescaled_guidance(name, request, tiny_zero):
    base = checkpoint.load(str(tiny_zero[name] if name in tiny_zero else request.getfixturevalue(name)))
    sampler, pipe = Sampler(base, device="cpu", compile="off"), unrounded(base)
    cond, uncond = sampler.conds(["a cat"])
    if base.schedule().zero_terminal_snr:
        request.getfixturevalue("euler_in_fp64")
    for settings in RESCALED:
        names = dict(pipe=pipe, prompt="a cat", seed=5)
        code = stock_code(base, settings)
        assert f"guidance_rescale={settings.guidance_rescale:g}" in code
        exec(code, names)
        mine = sampler.pixels(cond, uncond, [5], settings, resolution_px=64)[0]
        assert (mine - names["image"]).abs().max() < 1e-4, settings
        plain = replace(settings, guidance_rescale=0.0)
        assert (mine - sampler.pixels(cond, uncond, [5], plain, resolution_px=64)[0]).abs().max() > 1e-3


class Subclass(Denoiser):
    """Sampled by its own forward, not by the engine."""

    def forward(self, x_t, t, cond):
        return super().forward(x_t, t, cond)


@pytest.mark.parametrize("name", ["tiny_sd", "sdxl"])
def test_engine_graph_solver_and_teacher_rescale_alike(name, request, tiny_zero):
    base = checkpoint.load(str(tiny_zero[name] if name in tiny_zero else request.getfixturevalue(name)))
    sampler = Sampler(base, device="cpu", compile="off")
    cond, uncond = sampler.conds(["a cat", "a dog"])
    settings = Settings("ddim", 3, 7.5, guidance_rescale=0.7)
    one = Subclass(base.unet, base.schedule(), base.prediction_type)
    solved = Sampler.of_networks(base, one, base.vae)
    drawn = [s.latents(with_ids(cond), with_ids(uncond), [1, 2], settings, (8, 8)) for s in (sampler, solved)]
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=1e-4)
    captured = Sampler(base, device="cpu", compile="off")
    captured.engine = engine.Engine(captured.denoiser, captured.engine.decode, "cpu", backend=engine.Plain())
    streams = [list(s.stream_batches([(cond, uncond, [1, 2])], settings, 64))[0] for s in (sampler, captured)]
    assert torch.equal(*streams)
    plain = replace(settings, guidance_rescale=0.0)  # another graph
    assert not torch.equal(next(captured.stream_batches([(cond, uncond, [1, 2])], plain, 64)), streams[0])

    one.guidance_rescale = 0.7  # one guided step of a teacher in a loss, against the formula on the raw outputs
    x, t, w = torch.randn(2, 4, 8, 8), torch.tensor([999 if name == "sdxl" else 900, 300]), torch.tensor([3.0, 9.0])
    conds = with_ids(cond), with_ids(uncond.expand(2))
    out, none = (one.answer(x, t, c).float() for c in conds)
    guided = none + w[:, None, None, None] * (out - none)
    expected = one.schedule.predict(rescale(guided, out, 0.7), x, t, one.kind)
    told = one.guided(x, t, *conds, w)
    torch.testing.assert_close(told.x0, expected.x0, atol=1e-3, rtol=1e-3)
    assert one.guided(x, t, *conds, 1).x0.isfinite().all()


def with_ids(cond: Cond) -> Cond:
    from fastdiff.sampling.sampler import with_size

    return cond if cond.pooled is None else with_size(cond, 64)


def test_an_unset_rescale_keeps_the_names_of_cached_samples():
    assert repr(Settings("ddim", 4, 3.0)) == (
        "Settings(scheduler='ddim', num_steps=4, guidance=3.0, spacing=None, eta=0.0, timesteps=None)"
    )
    assert "guidance_rescale=0.7" in repr(Settings("ddim", 4, 3.0, guidance_rescale=0.7))
    with pytest.raises(ValueError, match="`guidance_rescale` must be between 0 and 1"):
        Settings(guidance_rescale=1.5)


def test_rescaling_that_cannot_act_is_told(tiny_sd, warnings):
    sampler = Sampler(str(tiny_sd), device="cpu", compile="off")
    sampler("a cat", num_steps=1, guidance=1.0, guidance_rescale=0.7)
    assert warnings[-1] == "`guidance_rescale` has no effect at guidance 1 or less"


def test_the_teachers_samples_of_another_type_of_prediction_are_not_taken_for_its_own(tiny_zero, tmp_path, monkeypatch):
    """The user may name the type, or zero SNR, after a first run that drew without."""
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    plain = checkpoint.load(str(tiny_zero["sd15"]), prediction="epsilon")
    cond, uncond = text.encode(plain, ["a cat"]), text.unconditional(plain)
    folders = set()
    for how in (dict(prediction="epsilon"), {}, dict(zero_snr=True)):
        base = checkpoint.load(str(tiny_zero["sd15"]), **how)
        folders.add(Shards(base, Settings("ddim", 2, 3.0), ["a cat"], cond, uncond, 0, 64).folder)
    assert len(folders) == 3


# ---- few-step bases as teachers


@pytest.fixture(scope="session")
def turbo(tiny_sd, tmp_path_factory):
    """A checkpoint that was distilled to two unguided steps of LCM."""
    path = tmp_path_factory.mktemp("turbo") / "turbo"
    recipe = Recipe(method="lcm", family="sd15", scheduler="lcm", num_steps=2, guidance=1.0, prediction_type="epsilon")
    write.to_folder(checkpoint.load(str(tiny_sd)), path, recipe=recipe)
    return path


def test_a_few_step_base_teaches_by_its_own_recipe(turbo, fastdiff, monkeypatch):
    from fastdiff.data import teacher

    seen = []
    encode = teacher.encode
    monkeypatch.setattr(
        teacher, "encode", lambda base, lines, px, how, **k: (seen.append(how), encode(base, lines, px, how, **k))[1]
    )
    command = [x for x in arguments("train-lcm-lora", turbo, None, None) if x not in {"--teacher-steps"}]
    command.remove("2")  # the value of --teacher-steps
    code, told = fastdiff(*command, "--steps", "1", "-o", "run")
    assert code == 0, told
    assert (seen[0].scheduler, seen[0].num_steps, seen[0].guidance) == ("lcm", 2, 1.0)
    (words,) = [w for w in told["warnings"] if "few-step" in w]
    assert words.endswith(
        "a few-step checkpoint; train-lcm-lora learns from a teacher of many guided steps, which it no longer is; "
        "give the base that it was distilled from"
    )


def test_what_the_user_says_of_a_few_step_teacher_counts(turbo, warnings):
    base = checkpoint.load(str(turbo))
    asked = teacher_sampling(LCM.Config(base=str(turbo), teacher_scheduler="ddim", teacher_guidance=2.0), base)
    assert (asked.scheduler, asked.num_steps, asked.guidance, asked.spacing) == ("ddim", 2, 2.0, None)
    LCM.check_base(LCM.Config(base=str(turbo), finetune=True), base)
    assert not warnings  # it has no teacher
    LCM.check_base(LCM.Config(base=str(turbo)), base)
    assert "a few-step checkpoint; train-lcm-lora learns from a teacher of many guided steps" in warnings[-1]


def test_the_judge_draws_a_few_step_teacher_by_its_own_recipe(turbo, fastdiff, capfd):
    flags = ["--student", turbo, "--num-images", "2", "--num-steps", "1", "--resolution", "64", "--prompts", "prompts.txt"]
    code, told = fastdiff("evaluate", "--base", turbo, *flags, "--device", "cpu", "-o", "judged")
    assert code == 0, told
    teachers = [row for row in told["metrics"]["rows"] if row["model"] == "teacher"]
    assert [(r["solver"], r["num_steps"], r["guidance"]) for r in teachers] == [("lcm", 2, 1.0), ("lcm", 1, 1.0)]
    assert told["metrics"]["reference"] == "teacher:2"


def test_the_ways_of_a_few_step_teacher_keep_its_solver(turbo):
    base = checkpoint.load(str(turbo))
    assert [(w.scheduler, w.num_steps, w.guidance) for w in teacher_ways(base, 4)] == [("lcm", 4, 1.0)]


def test_a_one_step_checkpoint_says_that_it_predicts_x0_in_every_format(tiny_sd, tmp_path):
    """merge-lora writes one of a base that predicts epsilon and Lightning's one-step LoRA."""
    recipe = Recipe(method="lightning", scheduler="euler", num_steps=1, guidance=0.0, prediction_type="sample")
    base = checkpoint.load(str(tiny_sd))
    write.to_folder(base, tmp_path / "one", recipe=recipe)
    write.to_file(base, tmp_path / "one.safetensors", recipe=recipe)
    for again in (
        checkpoint.load(str(tmp_path / "one")),
        checkpoint.load(str(tmp_path / "one.safetensors"), config=str(tiny_sd)),
    ):
        assert again.prediction_type == "sample"
        assert Denoiser.of(again).kind == "sample"


# ---- every command

OVER_TIME = {"sdxs", "distill-vae", "lightning", "dmd", "sid", "tdm"}
CASES = [
    pytest.param(command, family, marks=[pytest.mark.slow] if command in OVER_TIME or family == "sd21" else [])
    for command in COMMANDS
    for family in ("sdxl", "sd21")
]


@pytest.mark.parametrize(("command", "family"), CASES)
def test_every_command_trains_from_a_zero_snr_base_that_predicts_v_or_refuses_it_at_once(command, family, tiny_zero, fastdiff):
    edges, pruned = "emoji", "none"  # of another base: refused at once
    if command == "distill-controlnet" and family == "sd21":
        base = checkpoint.load(str(tiny_zero[family]))
        write.network_to_folder(controlnet_of(base), edges := Path("edges"))
        cutting.cut(base, cutting.layout_of(base, "bk-tiny"), pruned := Path("pruned"))
    own = arguments(command, tiny_zero[family], edges, pruned)
    code, told = fastdiff(*own, "--steps", STEPS.get(command, "2"), "-o", "run")
    if code:
        assert (command, family) in REFUSED, told
        assert code in {2, 3}
        assert told["error"]["message"]
        return
    it_trained("run")


def it_trained(run):
    """Losses and tensors of a run are finite, and a LoRA is no longer the zeros that it began as."""
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    losses = [v for row in rows for k, v in row.items() if isinstance(v, float) and ("loss" in k or "/" in k)]
    assert losses
    assert all(math.isfinite(v) for v in losses)
    for path in Path(run).glob("*.safetensors"):
        tensors = load_file(path)
        assert all(t.isfinite().all() for t in tensors.values())
        assert any(t.any() for k, t in tensors.items() if "lora_up" in k)  # which are zeros before the first step


@pytest.fixture(scope="session")
def whole_lcm(tiny_sd, tmp_path_factory):
    """A checkpoint whose UNet takes the guidance as an input."""
    base, path = checkpoint.load(str(tiny_sd)), tmp_path_factory.mktemp("lcm") / "lcm"
    write.to_folder(base.with_unet(guidance_embedded(base.unet, 8), "epsilon"), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["turbo", "whole_lcm"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_trains_from_a_few_step_base_or_refuses_it_at_once(
    command, kind, tiny_controlnet, tiny_pruned, request, fastdiff
):
    own = arguments(command, request.getfixturevalue(kind), tiny_controlnet, tiny_pruned)
    code, told = fastdiff(*own, "--steps", STEPS.get(command, "2"), "-o", "run")
    if kind == "turbo" or command in {"train-lcm-lora", "distill-vae"}:
        assert code == 0, told["error"]
        it_trained("run")
    else:
        assert code == 3, told
        assert any(word in told["error"]["message"] for word in ("takes the guidance as an input", "time_cond_proj_dim"))
        assert not list(Path().rglob("metrics.jsonl"))


STEPS = {"sdxs": "7", "lightning": "9", "dmd": "4", "sid": "4", "tdm": "4"}
REFUSED = {("prune", "sdxl"), ("distill-controlnet", "sdxl")}  # SDXL has no layout bk-tiny
