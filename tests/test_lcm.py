"""Latent consistency distillation: oracles, parameter counts of the papers, and the official scripts' bugs."""

import pytest
import torch
from playing import play

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.data.batch import Batch
from fastdiff.diffusion.schedule import NoiseSchedule, Prediction, per_sample
from fastdiff.lora import adapters
from fastdiff.methods.lcm import LCM, Config, distillation_grid, guidance_embedded
from fastdiff.models.denoiser import Cond, Denoiser

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


class Gaussian:
    """Exact denoiser and exact consistency function of data N(mean, std^2), in the Denoiser's interface."""

    guidance_embedded, mean, std = False, 0.7, 0.5

    def __init__(self, schedule, *, solved=False):
        self.schedule, self.solved = schedule, solved

    def __call__(self, x, t, cond):
        alpha, sigma = self.schedule.coefficients(t, x)
        spread = (alpha**2 * self.std**2 + sigma**2).sqrt()
        x0 = self.mean + alpha * self.std**2 / spread**2 * (x - alpha * self.mean)
        if self.solved:  # where the probability-flow ODE through (x, t) ends: x0 of a perfect consistency model
            x0 = self.mean + self.std / spread * (x - alpha * self.mean)
        return Prediction(x0, (x - alpha * x0) / sigma)

    def guided(self, x, t, cond, uncond, w):
        return self(x, t, cond)


class Oracle(LCM):
    """LCM's own losses with exact networks in place of trained ones."""

    def __init__(self, student, teacher, **config):
        self.config = Config(guidance_min=1.0, guidance_max=1.0, huber_c=1e-3, **config)
        self.student, self.teacher, self.schedule, self.target = student, teacher, student.schedule, None
        self.grid = distillation_grid(self.schedule, self.config)

    def _loss(self, n=512):
        torch.manual_seed(0)
        x0 = Gaussian.mean + Gaussian.std * torch.randn(n, 1, 4, 4)
        cond = Cond(torch.zeros(n, 1, 1))
        (turn,) = self.losses(Batch(x0, cond, cond), None)
        return turn["student"]["consistency"].item()


def test_a_perfect_consistency_function_has_zero_loss():
    """Up to the one-step error of DDIM, which goes with the square of the step; a denoiser is no consistency function."""
    schedule = NoiseSchedule.from_config(SD)
    perfect = {n: Oracle(Gaussian(schedule, solved=True), Gaussian(schedule), grid_steps=n, loss="l2")._loss() for n in (50, 200)}
    denoiser = Oracle(Gaussian(schedule), Gaussian(schedule), grid_steps=50, loss="l2")._loss()
    assert perfect[50] < 1e-4
    assert perfect[200] < perfect[50] / 8
    assert denoiser > 10 * perfect[50]


@pytest.mark.parametrize("target", ["edge", "random"])
def test_an_exact_ode_jump_has_zero_loss_for_pcm_and_tcd(target):
    """Where std = 1 = the noise's, the DDIM jump with the right eps stays on the ODE for any s."""
    schedule = NoiseSchedule.from_config(SD)

    class Unit(Gaussian):
        mean, std = 0.0, 1.0

    exact = Unit(schedule)
    assert Oracle(exact, exact, target=target, grid_steps=200, loss="l2")._loss() < 1e-3


@pytest.mark.parametrize("skip", [1, 5])
def test_pairs_and_jump_targets(skip):
    schedule = NoiseSchedule.from_config(SD)
    grid, index = schedule.ddim_grid(50), torch.arange(50)
    below = torch.where(index >= skip, grid[index - skip], 0)
    random = Oracle(Gaussian(schedule), None, target="random", skip=skip)
    u = random.pair(index, grid)[0]
    draws = torch.stack([random.pair(index, grid)[1] for _ in range(200)])
    assert torch.equal(u, below)
    assert (draws <= u).all()
    assert set(draws[:, skip + 2].tolist()) == {0, 19, 39, 59}
    u, s = Oracle(Gaussian(schedule), None, skip=skip).pair(index, grid)
    assert torch.equal(u, below)
    assert s is None


@pytest.mark.parametrize(("phases", "skip"), [(4, 1), (4, 5), (2, 3), (8, 1)])
def test_phases_end_on_the_steps_of_the_sampler(phases, skip):
    """Asked at any of its sampler's timesteps, a student must have learnt to jump to the next one."""
    schedule = NoiseSchedule.from_config(SD)
    oracle = Oracle(Gaussian(schedule), None, target="edge", num_steps=phases, skip=skip)
    assert len(oracle.grid) >= 50
    assert len(oracle.grid) % phases == 0
    u, s = oracle.pair(torch.arange(len(oracle.grid)), oracle.grid)
    assert (s <= u).all()
    assert (u < oracle.grid).all()
    jumps = dict(zip(oracle.grid.tolist(), s.tolist(), strict=True))
    sampled = [*schedule.grid(phases, "trailing").tolist(), 0]
    assert [jumps[t] for t in sampled[:-1]] == sampled[1:]


def test_the_first_pair_targets_its_own_ode_step():
    """u = 0: c_skip = 1 there, so the target is x_u whatever the student says."""
    schedule = NoiseSchedule.from_config(SD)
    oracle = Oracle(Gaussian(schedule), Gaussian(schedule))
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0, 19])
    found = oracle.consistency(x, t, None, None)
    torch.testing.assert_close(found[0], x[0])
    torch.testing.assert_close(found[1], Gaussian(schedule)(x, t, None).x0[1], atol=1e-4, rtol=1e-4)


COUNTS = {  # the published LCM-LoRAs: rank 64 on 14 targets
    "sd15": (67_252_224, 278),
    "sd21": (67_776_512, 278),
    "sdxl": (196_751_360, 788),
}
FULL_SIZE = {
    "sd15": dict(cross_attention_dim=768, attention_head_dim=8),
    "sd21": dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    "sdxl": dict(
        block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", COUNTS)
def test_lora_parameter_counts_of_the_paper(family):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_SIZE[family])
        adapters.attach(unet, 64, 64)
    trained = [p for p in unet.parameters() if p.requires_grad]
    parameters, modules = COUNTS[family]
    assert sum(p.numel() for p in trained) == parameters
    assert len(trained) == 2 * modules


def method(folder, **config):
    base = checkpoint.load(str(folder))
    return LCM(base, Config(lora_rank=4, lora_alpha=8, guidance_min=3.0, guidance_max=9.0, **config)), base


def batch_for(base, n=3):
    g = torch.Generator().manual_seed(0)
    width = base.unet.config.cross_attention_dim
    cond, uncond = (Cond(torch.randn(n, 12, width, generator=g)) for _ in range(2))
    return Batch(torch.randn(n, 4, 8, 8, generator=g), cond, uncond)


def test_zero_terminal_snr_is_refused_for_epsilon_and_fine_for_v():
    config = {**SD, "rescale_betas_zero_snr": True}
    with pytest.raises(ValueError, match="zero-terminal-SNR"):
        Denoiser(torch.nn.Identity(), NoiseSchedule.from_config(config), "epsilon")
    schedule = NoiseSchedule.from_config(config)
    Denoiser(torch.nn.Identity(), schedule, "v_prediction")
    x = torch.randn(1, 4, 8, 8)
    assert schedule.predict(torch.randn_like(x), x, torch.tensor(999), "v_prediction").x0.isfinite().all()


def test_v_prediction_goes_through_the_conversion(tiny_v):
    """The early script's bug: raw v output taken as eps. The student's ODE step must equal one from DDIMScheduler."""
    import diffusers

    m, base = method(tiny_v)
    batch = batch_for(base)
    t, u = torch.tensor([999, 519, 39]), torch.tensor([979, 499, 19])
    x, w = torch.randn(3, 4, 8, 8), torch.tensor([3.0, 5.0, 9.0])
    with torch.no_grad():
        found = m.ode_step(x, t, u, batch, w)
        cond, uncond = (base.unet(x, t, c.tokens).sample for c in (batch.cond, batch.uncond))
    v = uncond + per_sample(w, x) * (cond - uncond)
    scheduler = diffusers.DDIMScheduler.from_config(base.scheduler_config)
    scheduler.set_timesteps(50)
    expected = [scheduler.step(v[i : i + 1], int(t[i]), x[i : i + 1]).prev_sample for i in range(3)]
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-5)


def test_guidance_is_one_draw_a_sample_within_its_range(tiny_sd, monkeypatch):
    m, base = method(tiny_sd)
    seen = []
    monkeypatch.setattr(m, "ode_step", lambda x, t, u, batch, w: (seen.append(w), x)[1])
    torch.manual_seed(0)
    for _ in range(20):
        next(play(m, batch_for(base), 0))
    w = torch.cat(seen)
    assert w.min() >= 3
    assert w.max() <= 9
    assert len(w.unique()) == 60


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_teacher_is_the_base_and_gradients_flow_with_checkpointing(tiny_sd, checkpointing):
    """Adapters are on again before backward: recomputation under a disabled adapter raises CheckpointError."""
    m, base = method(tiny_sd, gradient_checkpointing=checkpointing)
    m.student.net.train()
    for name, p in m.student.net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    stock = checkpoint.load(str(tiny_sd)).unet
    batch, t = batch_for(base), torch.tensor(519)
    with torch.no_grad():
        found = m.teacher(batch.latents, t, batch.cond).eps
        torch.testing.assert_close(found, stock(batch.latents, t, batch.cond.tokens).sample)
    next(play(m, batch, 0))["student"]["consistency"].backward()
    trained = [p for p in m.student.net.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert all(p.grad is None for p in m.student.net.parameters() if not p.requires_grad)


def test_adapter_stays_fp32_on_a_half_precision_base(tiny_sd):
    base = checkpoint.load(str(tiny_sd), dtype=torch.bfloat16)
    adapters.attach(base.unet, 4, 8)
    kinds = {p.dtype for p in base.unet.parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    assert base.unet.conv_in.weight.dtype == torch.bfloat16


def test_export_loads_in_diffusers_with_every_layer_and_the_right_scale(tiny_sd, tmp_path):
    """The official LoRAs fail to load, lose attention layers, or lose alpha; ours equals the trained network."""
    from fastdiff.training.run import Run

    m, base = method(tiny_sd)
    for name, p in m.student.net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    run = Run(tmp_path)
    m.export(run)
    batch, t = batch_for(base), torch.tensor(519)
    with torch.no_grad():
        trained = m.student.net(batch.latents, t, batch.cond.tokens).sample
    pipeline = checkpoint.load(str(tiny_sd)).pipeline()
    pipeline.load_lora_weights(str(tmp_path), weight_name="lcm.safetensors")
    layers = [m for m in pipeline.unet.modules() if hasattr(m, "lora_A")]
    assert len(layers) == 277 == len(lora.load(tmp_path / "lcm.safetensors").modules)
    with torch.no_grad():
        loaded = pipeline.unet(batch.latents, t, batch.cond.tokens).sample
        untouched = checkpoint.load(str(tiny_sd)).unet(batch.latents, t, batch.cond.tokens).sample
    moved = (trained - untouched).abs().mean()
    assert (loaded - trained).abs().mean() < 0.01 * moved  # fp16 storage
    recipe = lora.load(tmp_path / "lcm.safetensors").recipe
    assert (recipe.scheduler, recipe.num_steps, recipe.guidance, recipe.method) == ("lcm", 4, 1.0, "lcm")


def test_full_training_starts_at_the_teacher_and_embeds_guidance(tiny_sd):
    base = checkpoint.load(str(tiny_sd))
    student = guidance_embedded(base.unet)
    assert student.config.time_cond_proj_dim == 256
    x, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([9, 800]), torch.randn(2, 12, 32)
    wrapped = Denoiser(student, base.schedule(), "epsilon")
    with torch.no_grad():
        embedded = wrapped(x, t, Cond(tokens, guidance=torch.tensor([3.0, 8.0]))).eps
        torch.testing.assert_close(embedded, base.unet(x, t, tokens).sample)
    with pytest.raises(ValueError, match="guidance"):
        wrapped(x, t, Cond(tokens))


def test_guidance_embedding_equals_the_pipelines():
    from diffusers import LatentConsistencyModelPipeline

    from fastdiff.models.denoiser import guidance_embedding

    w = torch.tensor([2.0, 6.5, 14.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    torch.testing.assert_close(guidance_embedding(w, 256), theirs, atol=2e-3, rtol=0)  # sin(1000 w f) in fp32


def test_the_averaged_target_of_full_training_moves_by_its_decay(tiny_sd):
    m, base = method(tiny_sd, full=True)
    before = [s.clone() for s in m.target.shadow]
    with torch.no_grad():
        for p in m.target.parameters:
            p.add_(1.0)
    m.after_update(None)
    for old, new in zip(before, m.target.shadow, strict=True):
        torch.testing.assert_close(new, old + 0.05, atol=1e-5, rtol=1e-5)
