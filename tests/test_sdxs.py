"""SDXS: feature matching, segmented score distillation, styles, the low-rank finish."""

import json
from dataclasses import replace

import pytest
import torch
from playing import entered, now, play, trained, trainees

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.locate import EMOJI
from fastdiff.data.batch import Batch
from fastdiff.diffusion import losses
from fastdiff.lora import adapters
from fastdiff.methods import dmd, sdxs
from fastdiff.models import feature_matching
from fastdiff.models.denoiser import Denoiser
from fastdiff.runtime.errors import InputRefused, UsageError, with_flags
from fastdiff.training import session
from fastdiff.training.scene import Scene

SMALL = dict(lora_rank=4, lora_alpha=4, guidance=3.0, match_steps=0, steps=10, t_gen=749, seed=0)


def method(path, **changes):
    base = checkpoint.load(str(path))
    torch.manual_seed(0)
    m = sdxs.SDXS(base, sdxs.Config(base=str(path), **{**SMALL, **changes}))
    return entered(m), base


def batch_for(base, n=4):
    g = torch.Generator().manual_seed(1)
    from fastdiff.models.denoiser import Cond

    width = base.unet_config["cross_attention_dim"]
    cond, uncond = (Cond(torch.randn(n, 12, width, generator=g)) for _ in range(2))
    if base.family.size_conditioned:
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(n, -1)
        cond, uncond = (Cond(c.tokens, torch.randn(n, 32, generator=g), ids) for c in (cond, uncond))
    return Batch(torch.randn(n, 4, 8, 8, generator=g), cond, uncond, torch.randn(n, 4, 8, 8, generator=g))


@torch.no_grad()
def shaken(params, spread=0.02):
    """Away from zero: a fresh LoRA has no gradient into its first factor."""
    torch.manual_seed(7)
    for p in params:
        p.add_(spread * torch.randn_like(p))


# ---- SSIM of feature maps


def test_structure_is_one_at_identity_and_less_elsewhere():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 5, 8, 8, generator=g)
    assert torch.equal(losses.structure(a, a), torch.ones(3))
    assert (losses.structure(a, b) < 0.9).all()


def test_structure_is_the_formula_of_dists():
    """Per channel over the whole map, in fp64: luminance and structure, half each."""
    a, b = torch.randn(2, 2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double() + 0.7
    expected = []
    for i in range(2):
        rows = []
        for k in range(3):
            x, y = a[i, k].flatten(), b[i, k].flatten()
            cov = ((x - x.mean()) * (y - y.mean())).mean()
            s1 = (2 * x.mean() * y.mean() + 1e-6) / (x.mean() ** 2 + y.mean() ** 2 + 1e-6)
            s2 = (2 * cov + 1e-6) / (x.var(correction=0) + y.var(correction=0) + 1e-6)
            rows.append((s1 + s2) / 2)
        expected.append(torch.stack(rows).mean())
    torch.testing.assert_close(losses.structure(a, b), torch.stack(expected).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 3.0])
@pytest.mark.parametrize("side", [1, 4])
def test_constant_maps_have_finite_gradients(constant, side):
    a = torch.full((2, 3, side, side), constant, requires_grad=True)
    for b in (torch.full((2, 3, side, side), constant), torch.zeros(2, 3, side, side), torch.randn(2, 3, side, side)):
        (1 - losses.structure(a, b)).sum().backward()
        assert a.grad.isfinite().all()


def test_structure_sees_small_variance_on_a_large_mean():
    """E[xy] - E[x]E[y] would be nothing but rounding here."""
    pattern = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.01
    same, other = 1000 + pattern, 1000 - pattern
    assert losses.structure(same, same) == 1
    assert losses.structure(same, other) < 0.6


@pytest.mark.parametrize("kind", ["unet", "embedded", "vgg", "dinov2"])
def test_feature_matching_is_zero_at_identity_and_pulls_towards_the_target(kind, tmp_path):
    base = checkpoint.load("emoji")
    teacher = Denoiser(base.unet, base.schedule(), base.prediction_type)
    matching = feature_matching.open_matching(kind, teacher, base.vae, weights=backbone(kind, tmp_path), crop=8)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 4, 8, 8, generator=g)
    cond = batch_cond(base, 2)
    assert matching(a, a, cond).abs().max() < 1e-5
    torch.manual_seed(0)
    x = a.clone().requires_grad_(True)
    loss = matching(x, b, cond)
    assert loss.shape == (2,)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert (grad.flatten(1).abs().sum(1) > 0).all()
    torch.manual_seed(0)  # the same noise and level
    with torch.no_grad():
        closer = matching(a - 0.05 * grad / grad.abs().amax(), b, cond)
    assert closer.sum() < loss.sum()


def batch_cond(base, n):
    from fastdiff.models import text

    return text.encode(base, ["pizza", "panda"][:n])


def backbone(kind, folder):
    """Random weights in the real files: how they are read is what is tested."""
    if kind == "vgg":
        from torchvision.models import vgg16

        torch.manual_seed(0)
        torch.save(vgg16().state_dict(), folder / "vgg.pth")
        return str(folder / "vgg.pth")
    if kind == "dinov2":
        from transformers import Dinov2Config, Dinov2Model

        torch.manual_seed(0)
        Dinov2Model(
            Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=56)
        ).save_pretrained(folder / "dino")
        return str(folder / "dino")
    return None


def test_dinov2_without_weights_says_so(tmp_path):
    with pytest.raises(UsageError, match="dinov2"):
        feature_matching.open_dinov2(str(tmp_path / "owner" / "nothing"))


# ---- segments


def test_with_alpha_one_and_lambda_zero_the_students_gradient_is_that_of_dmd(tiny_sd):
    """The same adapter, noise and levels in both methods; loss and gradient agree to 1e-6."""
    changes = dict(student="lora", alpha_start=0.98, alpha_end=0.98, lambda_fm_start=0.0, lambda_fm_end=0.0)
    m, base = method(tiny_sd, **changes)
    other = checkpoint.load(str(tiny_sd))
    torch.manual_seed(0)
    d = dmd.DMD(other, dmd.Config(base=str(tiny_sd), lora_rank=4, lora_alpha=4, guidance=3.0, t_gen=749, lambda_reg=0.0))
    found = []
    for one, net in ((m, base.unet), (d, other.unet)):
        for name in ("student", "fake"):
            shaken(adapters.parameters(net, name))
        torch.manual_seed(3)
        turn = next(play(one, batch_for(base), 0))
        params = trained(one, "student")
        loss = sum(turn["student"].values())
        found.append((loss, torch.autograd.grad(loss, params), turn["fake"]["denoising"]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[0][2], found[1][2], atol=1e-6, rtol=1e-6)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert max(g.abs().max() for g in found[0][1]) > 1e-4


@pytest.mark.parametrize(("step", "alpha", "weight"), [(2, 0.9, 1.0), (5, 0.7, 0.55), (8, 0.5, 0.1)])
def test_alpha_and_lambda_fall_over_the_phase_and_t_stays_in_its_segment(tiny_sd, monkeypatch, step, alpha, weight):
    changes = dict(alpha_start=0.9, alpha_end=0.5, lambda_fm_start=1.0, lambda_fm_end=0.1, match_steps=2, gan_steps=1)
    m, base = method(tiny_sd, student="lora", **changes)
    entered(m, "distill")
    assert m.scheduled(now(m, step)) == pytest.approx((alpha, weight))
    seen = []
    real = m.teacher.guided
    monkeypatch.setattr(m.teacher, "guided", lambda x_t, t, *a: (seen.append(t), real(x_t, t, *a))[1])
    for i in range(4):
        torch.manual_seed(i)
        next(play(m, batch_for(base, n=16), step))
    levels = torch.cat(seen)
    assert levels.min() >= 20
    assert levels.max() <= round(alpha * 1000)
    assert levels.max() > 0.9 * alpha * 1000


def test_the_warm_up_is_feature_matching_alone_and_compares_each_sample_with_its_own_noise(tiny_sd, monkeypatch):
    m, base = method(tiny_sd, match_steps=4)
    batch, seen = batch_for(base), {}
    real = m.student.forward
    monkeypatch.setattr(m.student, "forward", lambda x_t, t, c: (seen.update(x_t=x_t, t=t), real(x_t, t, c))[1])
    turn = next(play(m, batch, 0))
    assert {who: list(terms) for who, terms in turn.items()} == {"student": ["features"]}
    assert torch.equal(seen["x_t"], batch.noise)
    assert (seen["t"] == 749).all()


def test_the_perfect_student_loses_nothing_in_the_warm_up(tiny_sd):
    m, base = method(tiny_sd, match_steps=4)
    batch = batch_for(base)
    with torch.no_grad():
        x = m.student(batch.noise, torch.full((4,), 749), batch.cond).x0
    perfect = Batch(x, batch.cond, batch.uncond, batch.noise)
    assert next(play(m, perfect, 0))["student"]["features"] < 1e-5


def test_three_networks_of_three_shapes(tiny_sd, tmp_path):
    """A pruned student in full, the teacher's network, and a full copy as online model: only the players move."""
    pruned = prune(tiny_sd, tmp_path)
    m, base = method(tiny_sd, init=str(pruned), fake="full")
    sizes = {sum(p.numel() for p in net.parameters()) for net in (m.student.net, m.teacher.net)}
    assert len(sizes) == 2
    assert m.fake.net is not m.teacher.net
    turn = next(play(m, batch_for(base), 0))
    for who in ("student", "fake"):
        grads = torch.autograd.grad(sum(turn[who].values()), trained(m, who), allow_unused=True)
        assert sum(g.abs().sum() for g in grads if g is not None) > 0
    assert not any(p.requires_grad for p in m.teacher.net.parameters())


def prune(path, folder):
    from fastdiff.methods.shared import cutting

    base = checkpoint.load(str(path))
    cutting.cut(base, cutting.layout_of(base, "bk-tiny"), folder / "pruned")
    return folder / "pruned"


def test_a_checkpoint_of_another_family_is_refused(tiny_sd, tiny_sdxl):
    with pytest.raises(InputRefused, match="cross_attention_dim"):
        method(tiny_sd, init=str(tiny_sdxl))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(match_steps=8, gan_steps=8), "--steps 10"),
        (dict(t_min=0.6, alpha_end=0.5), "--t-min"),
        (dict(style_lora="x.safetensors"), "--style-lora"),
    ],
)
def test_what_does_not_go_together_is_told(changes, told):
    with pytest.raises(UsageError) as error:
        sdxs.Config(**{**SMALL, **changes})
    assert told in with_flags(str(error.value))


# ---- style


def style_file(folder, base, spread=0.3):
    """A LoRA that does something to every attention layer."""
    adapters.attach(base.unet, 3, 3, "made", adapters.ATTENTION)
    shaken(adapters.parameters(base.unet, "made"), spread)
    path = folder / "style.safetensors"
    lora.save(lora.Lora(adapters.factors(base.unet, 3, "made"), {}), path)
    return path


def test_the_teacher_wears_the_style_and_the_online_model_never_does(tiny_sd, tmp_path):
    from fastdiff.lora import apply

    path = style_file(tmp_path, checkpoint.load(str(tiny_sd)))
    pruned = prune(tiny_sd, tmp_path)
    m, base = method(tiny_sd, init=str(pruned), style_lora=f"{path}=0.5")
    batch, t = batch_for(base), torch.tensor(300)
    plain, styled = checkpoint.load(str(tiny_sd)), checkpoint.load(str(tiny_sd))
    apply.apply(styled, [(lora.load(path), 0.5)])
    answers = [Denoiser(c.unet, c.schedule(), c.prediction_type)(batch.latents, t, batch.cond).eps for c in (plain, styled)]
    with torch.no_grad():
        torch.testing.assert_close(m.teacher(batch.latents, t, batch.cond).eps, answers[1], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(m.fake(batch.latents, t, batch.cond).eps, answers[0], atol=1e-6, rtol=0)
    assert (answers[0] - answers[1]).abs().max() > 0.01
    worn = {id(p) for p in adapters.parameters(base.unet, "style")}
    assert not worn & {id(p) for params in trainees(m).values() for p in params}
    assert sdxs.SDXS.teacher_loras(m.config) == [f"{path}=0.5"]
    assert sdxs.SDXS.teacher_loras(sdxs.Config(**SMALL, init="x", style_lora="y", style_pairs=False)) == []


def test_a_full_online_model_has_no_style_and_what_a_style_does_to_texts_is_left_out(tiny_sd, tmp_path, monkeypatch, capfd):
    from safetensors.torch import load_file, save_file

    path = style_file(tmp_path, checkpoint.load(str(tiny_sd)))
    tensors = load_file(path)
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    save_file({**tensors, f"{layer}.lora_down.weight": torch.ones(2, 32), f"{layer}.lora_up.weight": torch.ones(64, 2)}, path)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    changes = dict(init=str(prune(tiny_sd, tmp_path)), style_lora=str(path), fake="full", prompts=str(tmp_path / "prompts.txt"))
    m, base = method(tiny_sd, **changes, pairs=1, teacher_steps=1, resolution=64)
    assert "its 1 modules for text encoders are not used" in capfd.readouterr().err
    names = {name for name, _ in m.fake.net.named_parameters()}
    assert names == {name for name, _ in checkpoint.load(str(tiny_sd)).unet.named_parameters()}

    def data_of(config):
        scene = Scene.of(config, base, torch.device("cpu"))
        return session.data_of(scene, config, "pairs", sdxs.SDXS.teacher_loras(config))

    found, plain = data_of(m.config), data_of(replace(m.config, style_pairs=False))
    assert torch.equal(found.texts.tokens, plain.texts.tokens)
    assert not torch.equal(found.latents, plain.latents)
    assert torch.equal(found.noise, plain.noise)


# ---- the finish


def test_the_finish_trains_a_low_rank_adapter_and_heads_alone_and_is_folded_in(tiny_sd, tmp_path):
    m, base = method(tiny_sd, steps=4, match_steps=2, gan_steps=1)
    entered(m, "gan")
    shaken(trained(m, "student"), 0.05)
    batch = batch_for(base)
    turns = play(m, batch, 3)
    heads = next(turns)["discriminator"]
    student = next(turns)["student"]
    for who, terms in (("discriminator", heads), ("student", student)):
        params = trained(m, who)
        grads = torch.autograd.grad(sum(terms.values()), params, allow_unused=True, retain_graph=True)
        assert sum(g.abs().sum() for g in grads if g is not None) > 0
    mine = {id(p) for p in trained(m, "student")}
    assert mine == {id(p) for p in adapters.parameters(m.student.net, "finish")}
    assert not any(p.requires_grad for p in m.student.net.parameters() if id(p) not in mine)

    from fastdiff.training.run import Run

    run = Run(tmp_path, "sdxs")
    with torch.no_grad():
        expected = m.student(batch.noise, torch.full((4,), 749), batch.cond).x0
    m.export(run)
    made = checkpoint.load(str(tmp_path / "model"))
    assert made.recipe.timesteps == (749,)
    with torch.no_grad():
        found = Denoiser(made.unet, made.schedule(), "epsilon")(batch.noise, torch.tensor(749), batch.cond).x0
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert m.student.adapter == "finish"


# ---- the command


def test_from_a_pruned_checkpoint_to_one_step_and_to_a_style_of_it(fastdiff, tmp_path):
    assert fastdiff("prune", "--layout", "sdxs-512", "--steps", "0", "-o", "small")[0] == 0
    common = ("--pairs", 8, "--batch-size", 2, "--teacher-steps", 1)
    code, told = fastdiff(
        "sdxs", "--init", "small/model", "--steps", 3, "--match-steps", 1, "--gan-steps", 1, "--proof", 8, *common, "-o", "one"
    )
    assert code == 0, told
    assert [r["calls"] for r in told["metrics"]["rows"] if r["model"] == "student"] == [1]
    shapes = [json.loads((tmp_path / name / "model/unet/config.json").read_text()) for name in ("small", "one")]
    assert shapes[0]["block_out_channels"] == shapes[1]["block_out_channels"]
    from diffusers import StableDiffusionPipeline

    assert StableDiffusionPipeline.from_pretrained(tmp_path / "one/model").unet.config.mid_block_type is None

    code, told = fastdiff(
        "sdxs", "--init", "one/model", "--style-lora", EMOJI / "style.safetensors", "--match-steps", 0, "--steps", 2,
        "--proof", 0, *common, "-o", "styled",
    )  # fmt: skip
    assert code == 0, told
    assert told["outputs"][0]["path"].endswith("sdxs.safetensors")
    assert "one/model" in told["next_command"]
    assert "base_model: one/model" in (tmp_path / "styled/README.md").read_text()
    code, told = fastdiff(
        "sample", "--base", "one/model", "--lora", "styled/sdxs.safetensors", "--prompt", "panda", "-o", "p.png"
    )
    assert code == 0, told
    assert told["metrics"]["settings"]["timesteps"] == [749]
    assert len(told["metrics"]["loras"]) == 1


def test_pairs_come_from_the_teacher_alone(fastdiff):
    code, told = fastdiff("sdxs", "--data", "emoji", "--steps", 2000)
    assert code == 2
    assert "pairs" in told["error"]["message"]
