"""ControlNets: worn by a Denoiser, shown edges, and distilled onto small and one-step networks."""

import json

import numpy as np
import pytest
import torch
from conftest import controlnet_of
from playing import entered, now, play, trained

from fastdiff.checkpoints import checkpoint, locate, write
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data import control
from fastdiff.data.batch import Batch, Encoded
from fastdiff.methods import controlnet as distil
from fastdiff.models import controlnet, unet
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.runtime.errors import InputRefused, UsageError
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings


def batch_for(n=3, width=32):
    g = torch.Generator().manual_seed(1)
    cond, uncond = (Cond(torch.randn(n, 12, width, generator=g)) for _ in range(2))
    pictures = torch.rand(n, 3, 64, 64, generator=g)
    z, noise = torch.randn(2, n, 4, 8, 8, generator=g)
    return Batch(z, cond.with_control(pictures), uncond, noise)


def method(path, edges, **changes):
    base = checkpoint.load(str(path))
    torch.manual_seed(0)
    config = distil.Config(base=str(path), controlnet=str(edges), guidance=3.0, lora_rank=4, lora_alpha=4, **changes)
    m = distil.DistilControlNet(base, config)
    return entered(m, list(m.phases())[-1].name), base


# ---- worn


def test_sampling_with_a_controlnet_equals_the_stock_pipeline(tiny_sd):
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

    base = checkpoint.load(str(tiny_sd))
    net, stock = controlnet_of(base), base.pipeline()
    scheduler = DDIMScheduler.from_config(stock.scheduler.config, timestep_spacing="trailing")
    pipe = StableDiffusionControlNetPipeline(
        stock.vae, stock.text_encoder, stock.tokenizer, stock.unet, net, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    from fastdiff.models import text

    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    expected = pipe(
        "a cat", image=picture, latents=noise, num_inference_steps=3, guidance_scale=3.0, output_type="latent",
        controlnet_conditioning_scale=0.7,
    ).images  # fmt: skip
    cond, uncond = text.encode(base, ["a cat"]), text.unconditional(base)
    denoiser = Denoiser(base.unet, base.schedule(), "epsilon", controlnet=net, strength=0.7)
    settings = Settings("ddim", 3, 3.0, spacing="trailing")
    found = Sampler.of_networks(base, denoiser, base.vae).latents(cond.with_control(picture), uncond, [9], settings, (8, 8))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    plain = Sampler.of_networks(base, denoiser, base.vae).latents(cond, uncond, [9], settings, (8, 8))
    assert (plain - found).abs().max() > 1e-2


def test_both_halves_of_guidance_see_the_control_and_strength_scales_it(tiny_sd):
    base = checkpoint.load(str(tiny_sd))
    batch, t = batch_for(), torch.tensor(400)
    net = controlnet_of(base)
    one = Denoiser(base.unet, base.schedule(), "epsilon", controlnet=net)
    c, u = (one(batch.latents, t, x.with_control(batch.cond.control)) for x in (batch.cond, batch.uncond))
    torch.testing.assert_close(
        one.guided(batch.latents, t, batch.cond, batch.uncond, 2.0).eps, 2 * c.eps - u.eps, atol=1e-4, rtol=1e-4
    )
    off = Denoiser(base.unet, base.schedule(), "epsilon", controlnet=net, strength=0.0)
    bare = Denoiser(base.unet, base.schedule(), "epsilon")
    torch.testing.assert_close(off(batch.latents, t, batch.cond).eps, bare(batch.latents, t, batch.cond).eps)


# ---- control pictures


def test_canny_finds_the_outline_of_a_square():
    picture = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    picture[..., 8:24, 8:24] = 255
    edges = control.extract(picture, control.canny)
    assert edges.shape == (1, 1, 32, 32)
    assert set(edges.unique().tolist()) == {0, 255}
    assert edges[..., 12:20, 12:20].sum() == 0
    assert edges[..., 6:10, 12:20].sum() > 0


def test_agreement_is_one_for_the_same_edges_and_within_a_pixel():
    edges = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    edges[..., 10, 4:28] = 255
    assert torch.equal(control.agreement(edges, edges), torch.ones(3))
    assert (control.agreement(edges, edges.roll(1, 2)) == 1).all()
    assert (control.agreement(edges, edges.roll(4, 2)) == 0).all()
    half = edges.clone()
    half[..., 16:] = 0  # 12 of 24 and one more within the tolerance: 2 * 1 * 13/24 / (1 + 13/24)
    assert torch.allclose(control.agreement(half, edges), torch.tensor(26 / 37))
    assert (control.agreement(torch.zeros_like(edges), edges) == 0).all()


def inverted(picture):
    return 255 - picture


def wrong(picture):
    return picture[:4].astype(np.float32)


def test_extractors_of_others_are_named_by_module_and_function():
    picture = torch.full((2, 3, 16, 16), 5, dtype=torch.uint8)
    made = control.extract(picture, control.extractor(f"{__name__}:inverted"))
    assert (made == 250).all()
    assert made.shape == (2, 3, 16, 16)
    with pytest.raises(UsageError, match="the extractor returned"):
        control.extract(picture, control.extractor(f"{__name__}:wrong"))
    for name in ("nothing", "no.such:module", f"{__name__}:missing"):
        with pytest.raises(UsageError, match="`control"):
            control.extractor(name)


def test_without_opencv_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match="OpenCV"):
        control.extractor("canny")
    with pytest.raises(UsageError, match="OpenCV"):
        control.canny(np.zeros((8, 8, 3), np.uint8))


def test_every_sample_is_controlled_by_its_own_picture():
    base = checkpoint.load("emoji")
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    texts = Cond(torch.zeros(1, 2, 3))
    data = Encoded(torch.cat([z, 0 * z], 1), texts, torch.zeros(3, 1, dtype=torch.long), torch.ones(1), texts)
    control.of_samples(base.vae, data, lambda picture: picture)  # the control is the picture: which one is seen
    from fastdiff.models import autoencoder

    batch = data.batch(5, torch.Generator().manual_seed(0))
    decoded = autoencoder.decode(base.vae, batch.latents) / 2 + 0.5
    assert (batch.cond.control - decoded).abs().max() < 0.01


# ---- distilled


def test_a_copy_of_the_teacher_loses_nothing(tiny_sd, tiny_controlnet):
    m, _ = method(tiny_sd, tiny_controlnet)
    terms = next(play(m, batch_for(), 0))["student"]
    assert set(terms) == {"out", "feat"}
    assert sum(terms.values()) < 1e-9


def test_only_the_small_controlnet_trains_and_it_has_no_part_that_the_unet_lacks(tiny_sd, tiny_pruned, tiny_controlnet, tmp_path):
    m, _ = method(tiny_sd, tiny_controlnet, init=str(tiny_pruned))
    terms = next(play(m, batch_for(), 0))["student"]
    params = trained(m, "student")
    grads = torch.autograd.grad(sum(terms.values()), params, allow_unused=True)
    assert sum(g.abs().sum() for g in grads if g is not None) > 0
    for net in (m.student.net, m.teacher.net, m.controlnet):
        assert not any(p.requires_grad for p in net.parameters())
    assert m.student.net.mid_block is None
    assert len(m.compared) == 3
    assert len(m.student.controlnet.controlnet_down_blocks) == len(controlnet.residuals(m.student.net.config))

    from diffusers import ControlNetModel

    from fastdiff.training.run import Run

    m.export(Run(tmp_path, "distill-controlnet"))
    stock = ControlNetModel.from_pretrained(tmp_path / "controlnet")
    batch, t = batch_for(), torch.tensor(300)
    again = Denoiser(m.student.net, m.schedule, "epsilon", controlnet=stock)
    torch.testing.assert_close(again(batch.latents, t, batch.cond).eps, m.student(batch.latents, t, batch.cond).eps)


def one_step(path, pruned):
    """The pruned checkpoint, said to draw in one step at 749."""
    base = checkpoint.load(str(pruned))
    recipe = Recipe(method="sdxs", family="sd15", scheduler="lcm", num_steps=1, timesteps=(749,), guidance=1.0)
    write.to_folder(base, path, recipe=recipe)
    return path


def test_in_one_step_both_scores_wear_the_original_and_the_student_the_small_one(
    tiny_sd, tiny_pruned, tiny_controlnet, tmp_path, monkeypatch
):
    m, _ = method(
        tiny_sd, tiny_controlnet, init=str(one_step(tmp_path / "one", tiny_pruned)), one_step=True, match_steps=0, steps=4
    )
    assert m.t_gen == 749
    assert m.teacher.controlnet is m.fake.controlnet is m.controlnet
    assert m.student.controlnet is not m.controlnet
    seen = []
    real = m.controlnet.forward
    monkeypatch.setattr(m.controlnet, "forward", lambda *a, **k: (seen.append(a[3]), real(*a, **k))[1])
    batch = batch_for()
    turn = next(play(m, batch, 0))
    assert set(turn) == {"student", "fake"}
    assert set(turn["student"]) == {"features", "matching"}
    assert [len(x) for x in seen] == [6, 3]  # both halves of the teacher's guidance, and the online model
    assert all(torch.equal(part, batch.cond.control) for x in seen for part in x.split(3))
    for who in ("student", "fake"):
        params = trained(m, who)
        grads = torch.autograd.grad(sum(turn[who].values()), params, allow_unused=True)
        assert sum(g.abs().sum() for g in grads if g is not None) > 0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_noise_is_drawn_anew(tiny_sd, tiny_pruned, tiny_controlnet, tmp_path, monkeypatch, share):
    m, _ = method(
        tiny_sd,
        tiny_controlnet,
        init=str(one_step(tmp_path / "one", tiny_pruned)),
        one_step=True,
        steps=4,
        match_steps=0,
        redraw=share,
    )
    seen = {}
    real = m.student.forward
    monkeypatch.setattr(m.student, "forward", lambda x_t, t, c: (seen.update(x_t=x_t), real(x_t, t, c))[1])
    batch = batch_for(n=8)
    next(play(m, batch, 0))
    kept = (seen["x_t"] == batch.noise).all(1)[: m.paired(len(batch.latents), now(m))].float().mean()
    assert kept == pytest.approx(1 - share, abs=0.12)


def test_one_step_wants_a_student_of_one_step(tiny_sd, tiny_pruned, tiny_controlnet):
    with pytest.raises(UsageError, match="does not draw in one step"):
        method(tiny_sd, tiny_controlnet, init=str(tiny_pruned), one_step=True)
    with pytest.raises(UsageError, match="`one_step`"):
        distil.Config(one_step=True)


def test_a_controlnet_of_another_layout_or_family_is_refused(tiny_sd, tiny_sdxl, tiny_pruned, tiny_controlnet, tmp_path):
    with pytest.raises(InputRefused, match="another layout"):
        controlnet.load(str(tiny_controlnet), checkpoint.load(str(tiny_pruned)).unet_config)
    with pytest.raises(InputRefused, match="cross_attention_dim"):
        controlnet.load(str(tiny_controlnet), checkpoint.load(str(tiny_sdxl)).unet_config)
    with pytest.raises(InputRefused, match="AutoencoderKL"):
        controlnet.load(str(tiny_sd / "vae"), checkpoint.load(str(tiny_sd)).unet_config)
    with pytest.raises(UsageError, match="no such folder"):
        controlnet.load("./nowhere", checkpoint.load(str(tiny_sd)).unet_config)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((tiny_controlnet / "config.json").read_text())
    with pytest.raises(InputRefused, match="cannot be read"):
        controlnet.load(str(broken), checkpoint.load(str(tiny_sd)).unet_config)


def test_uneven_layouts_have_no_controlnet():
    parent = unet.unet_of(locate.stock_config(FAMILIES["sd15"])).config
    with pytest.raises(InputRefused, match="no ControlNet for it"):
        controlnet.student_config(parent, {**parent, "layers_per_block": [1, 2, 2, 2]})


# ---- the commands


def test_from_a_pruned_checkpoint_to_a_controlled_picture(fastdiff, tmp_path):
    assert fastdiff("prune", "--layout", "sdxs-512", "--steps", "0", "-o", "small")[0] == 0
    common = ("--steps", 2, "--pairs", 20, "--batch-size", 2, "--teacher-steps", 1, "--proof", 4)
    code, told = fastdiff("distill-controlnet", "--init", "small/model", *common, "-o", "guide")
    assert code == 0, told
    assert told["metrics"]["items"] == 4
    assert told["metrics"]["change_off"] > 0
    steered = {who: told["metrics"][f"steered_{who}"] for who in ("teacher", "student")}  # better than without control by so much
    assert told["metrics"]["steered_kept"] == pytest.approx(steered["student"] / max(steered["teacher"], 1e-9))
    card = (tmp_path / "guide/README.md").read_text()
    assert 'ControlNetModel.from_pretrained("controlnet")' in card

    from PIL import Image

    Image.fromarray(np.kron(np.eye(8, dtype=np.uint8), np.full((8, 8), 255, np.uint8))).convert("RGB").save("picture.png")
    drawn = {}
    for name, extra in {"on": (), "off": ("--control-scale", 0), "edges": ("--control", "canny")}.items():
        code, told = fastdiff(
            "sample", "--base", "small/model", "--controlnet", "guide/controlnet", "--control-image", "picture.png", *extra,
            "--prompt", "panda", "--num-steps", 2, "-o", f"{name}.png",
        )  # fmt: skip
        assert code == 0, told
        drawn[name] = np.asarray(Image.open(f"{name}.png")).astype(int)
        assert json.loads(Image.open(f"{name}.png").info["fastdiff"])["controlnet"] == "guide/controlnet"
    assert np.abs(drawn["on"] - drawn["off"]).max() > 2
    assert np.abs(drawn["on"] - drawn["edges"]).max() > 2


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (("sample", "--prompt", "x", "--controlnet", "emoji"), 2, "--control-image"),
        (("sample", "--prompt", "x", "--control-image", "a.png"), 2, "--controlnet"),
        (("sample", "--prompt", "x", "--controlnet", "emoji", "--control-image", "a.png"), 2, "no such file"),
        (("sample", "--prompt", "x", "--control", "canny"), 2, "--control-image"),
        (("distill-controlnet", "--control", "depth"), 2, "no such extractor"),
        (("distill-controlnet", "--redraw", "0.5"), 2, "--one-step"),
        (("distill-controlnet", "--init", "x", "--one-step", "--match-steps", "400"), 2, "--match-steps 400"),
        (("distill-controlnet", "--controlnet", "none"), 2, "which one of the base"),
        (("distill-controlnet", "--t-gen", "1000"), 2, "--t-gen 1000"),
        (("distill-controlnet", "--controlnet", "./nowhere"), 2, "no such folder"),
        (("distill-controlnet", "--eval-every", "5"), 2, "--eval-every"),
    ],
)
def test_mistakes_are_one_line(fastdiff, args, code, told):
    found, answer = fastdiff(*args)
    assert found == code
    assert told in answer["error"]["message"]
