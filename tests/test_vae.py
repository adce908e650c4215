"""The tiny decoder: the library's traps, the losses, the figures, and the command."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from playing import play, trained, trainees
from torch import nn

from fastdiff.checkpoints import checkpoint
from fastdiff.diffusion import losses
from fastdiff.methods import vae as method
from fastdiff.methods.shared.decoded import decode_once
from fastdiff.methods.vae import Config, TinyVAE
from fastdiff.models import autoencoder
from fastdiff.models.discriminator import PatchDiscriminator
from fastdiff.quality import decoders
from fastdiff.runtime.errors import InputRefused, UsageError


@pytest.fixture(scope="module")
def emoji():
    return checkpoint.load("emoji")


def tiny(**changes):
    torch.manual_seed(0)
    return TinyVAE(checkpoint.load("emoji"), Config(**dict(width=8, device="cpu", lpips_weights="embedded") | changes))


def latents(n=3, side=8, seed=0):
    return torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(seed))


# ---- what the library does


def test_pixels_lie_between_minus_one_and_one_and_latents_are_scaled_ones():
    """Trap 1: TAESD's own pixels lie in [0, 1] and its latents are scaled already; AutoencoderTiny changes the first only."""
    net = autoencoder.tiny(8, (1, 1, 1, 1))
    with torch.no_grad():
        for part in (net.encoder, net.decoder):
            nn.init.zeros_(part.layers[-1].weight)
            nn.init.constant_(part.layers[-1].bias, 0.5)
        assert torch.equal(net.decode(latents()).sample, torch.zeros(3, 3, 64, 64))  # 0.5 of [0, 1]
        assert torch.equal(autoencoder.pixels(net, latents()), torch.zeros(3, 3, 64, 64))
        assert torch.equal(autoencoder.mean_latents(net, torch.zeros(3, 3, 64, 64)), torch.full((3, 4, 8, 8), 0.5))
    seen = []
    net.encoder.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    autoencoder.mean_latents(net, torch.tensor([-1.0, 1.0]).repeat(96).reshape(1, 3, 8, 8))
    assert (seen[0].min().item(), seen[0].max().item()) == (0, 1)
    assert (net.config.scaling_factor, net.config.force_upcast, net.config.latent_channels) == (1.0, False, 4)


def test_forward_stops_gradients_and_so_it_is_not_what_trains():
    """Trap 2: `forward` rounds latents to bytes."""
    net = autoencoder.tiny(8, (1, 1, 1, 1))
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    net(picture).sample.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in net.encoder.parameters())
    autoencoder.mean_latents(net, picture).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.encoder.parameters())


def test_the_encoder_is_never_checkpointed():
    """Trap 3: under gradient checkpointing it skips the change of range, so its latents are others."""
    net = autoencoder.tiny(8, (1, 1, 1, 1))
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    plain = net.encode(picture).latents
    net.enable_gradient_checkpointing()
    assert not torch.allclose(net.encode(picture).latents, plain), "the library has been repaired: say so in `tiny`"
    made = tiny(encoder=True)
    assert not made.student.encoder.gradient_checkpointing


@pytest.mark.parametrize(
    ("width", "blocks", "parameters"),
    [(64, (3, 3, 3, 1), 1_222_531), (64, (2, 2, 2, 1), 890_179), (64, (1, 1, 1, 1), 557_827), (32, (3, 3, 3, 1), 307_139)],
)
def test_sizes_are_the_published_ones(width, blocks, parameters):
    net = autoencoder.tiny(width, blocks)
    assert sum(p.numel() for p in net.decoder.parameters()) == parameters
    assert not any(isinstance(m, nn.GroupNorm) or "Attention" in type(m).__name__ for m in net.modules())


def test_decoders_cost_what_was_counted(emoji):
    from diffusers import AutoencoderKL

    kl = AutoencoderKL.from_config(emoji.vae.config | dict(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32, scaling_factor=0.18215))  # fmt: skip
    full, small = (decoders.macs(net, 64) for net in (kl, autoencoder.tiny(64, (3, 3, 3, 1))))
    assert full / 1e9 == pytest.approx(1257.3, rel=0.01)
    assert small / 1e9 == pytest.approx(70.7, rel=0.01)
    preset = method.PRESETS["emoji"]
    net = autoencoder.tiny(preset["width"], method.stages(Config(**preset)))
    assert decoders.macs(emoji.vae, 8) / decoders.macs(net, 8) == pytest.approx(3.49, abs=0.01)
    assert decoders.macs(emoji.vae, 8) / decoders.macs(autoencoder.tiny(12, (3, 2, 2, 0)), 8) >= 15


# ---- the losses


def turns_of(made, step=0, z=None):
    torch.manual_seed(1)
    return list(play(made, SimpleNamespace(latents=latents() if z is None else z, pixels=None), step))


def test_the_loss_is_l1_at_an_eighth_and_what_was_asked_for():
    made = tiny(lambda_gan=0)
    ((only,),) = (turn.values() for turn in turns_of(made))
    a, b = (autoencoder.pixels(net, latents()) for net in (made.student, made.teacher))
    mean = lambda p: p.unflatten(-1, (8, 8)).unflatten(-3, (8, 8)).mean((-1, -3))
    torch.testing.assert_close(only["l1"], (mean(a) - mean(b.clamp(-1, 1))).abs().mean())
    assert set(only) == {"l1"}
    made = tiny(lambda_gan=0.3, lambda_pixel=0.5, lambda_lpips=2.0, encoder=True)
    made.distance = lambda a, b: (a - b).square().flatten(1).mean(1)
    judged, both = turns_of(made)
    assert set(judged) == {"discriminator"}
    assert set(both["decoder"]) == {"l1", "gan", "pixel", "lpips"}
    assert set(both["encoder"]) == {"latents"}
    a, b = autoencoder.pixels(made.student, latents()), autoencoder.pixels(made.teacher, latents()).clamp(-1, 1)
    torch.testing.assert_close(both["decoder"]["pixel"], 0.5 * (a - b).abs().mean())
    torch.testing.assert_close(both["decoder"]["lpips"], 2 * (a - b).square().mean())
    torch.testing.assert_close(both["decoder"]["gan"], 0.3 * losses.gan_real(made.discriminator(a, latents())))


def test_each_player_is_moved_by_its_own_terms_alone():
    made = tiny(encoder=True)
    for turn in play(made, SimpleNamespace(latents=latents(), pixels=None), 0):
        for who, terms in turn.items():
            mine = trained(made, who)
            sum(terms.values()).backward(inputs=mine)
            assert sum(p.grad.abs().sum() for p in mine) > 0
            others = [p for k, params in trainees(made).items() if k != who for p in params]
            assert all(p.grad is None for p in (*others, *made.teacher.parameters()))
            for p in mine:
                p.grad = None


def test_the_discriminator_begins_before_the_decoder_hears_of_it():
    made = tiny(gan_from=10)
    assert [sorted(turn) for turn in turns_of(made, 4)] == [["decoder"]]
    assert [sorted(turn) for turn in turns_of(made, 5)] == [["discriminator"], ["decoder"]]
    assert "gan" not in turns_of(made, 9)[-1]["decoder"]
    assert "gan" in turns_of(made, 10)[-1]["decoder"]


def test_only_the_conditional_discriminator_sees_the_latents():
    picture = torch.rand(2, 3, 64, 64)
    for channels, differs in ((0, False), (4, True)):
        torch.manual_seed(0)
        judge = PatchDiscriminator(16, channels)
        a, b = judge(picture, latents(2)), judge(picture, latents(2, seed=1))
        assert a.shape == (2, 1, 8, 8)
        assert torch.equal(a, b) != differs


def test_windows_of_latents_and_pictures_are_the_same_place():
    made = tiny(crop=32)
    z = latents(2, 16)
    places = torch.arange(16 * 16).reshape(1, 1, 16, 16).repeat_interleave(8, -1).repeat_interleave(8, -2).expand(2, 3, -1, -1)
    part, pixels = made._window(SimpleNamespace(latents=z, pixels=places.float()))
    assert (part.shape, pixels.shape) == ((2, 4, 4, 4), (2, 3, 32, 32))
    flat = z.flatten(2)[..., pixels[0, 0, ::8, ::8].long().flatten()]
    assert torch.equal(part.flatten(2), flat)
    whole, decoded = tiny(crop=256)._window(SimpleNamespace(latents=z, pixels=None))
    assert torch.equal(whole, z)
    assert torch.equal(decoded, autoencoder.decode(made.teacher, z))


def test_what_is_judged_is_not_trained_on():
    from fastdiff.data.batch import Encoded
    from fastdiff.models.denoiser import Cond

    texts, z = Cond(torch.zeros(1, 2, 3)), latents(8)
    data = Encoded(torch.cat([z, z], 1), texts, torch.zeros(8, 1, dtype=torch.long), torch.ones(1), texts, noise=z)
    for asked, held in ((1, 1), (2, 2), (100, 2)):
        kept, judged = data.split(asked)
        assert torch.equal(judged.latents, z[8 - held :])
        assert torch.equal(kept.moments, data.moments[: 8 - held])
        assert len(kept.noise) == len(kept.captions) == len(kept) == 8 - held


def test_latents_that_do_not_change_are_decoded_once(emoji):
    from fastdiff.data.batch import Encoded
    from fastdiff.models.denoiser import Cond

    texts = Cond(torch.zeros(1, 2, 3))
    fixed = torch.cat([latents(5), torch.zeros(5, 4, 8, 8)], 1)
    data = Encoded(fixed, texts, torch.zeros(5, 1, dtype=torch.long), torch.ones(1), texts)
    decode_once(emoji, data, torch.device("cpu"))
    batch = data.batch(3, torch.Generator().manual_seed(0)).to("cpu")
    assert (batch.pixels - autoencoder.decode(emoji.vae, batch.latents)).abs().max() <= 0.5 / 127.5 + 1e-5
    drawn = Encoded(fixed + 0.1, texts, torch.zeros(5, 1, dtype=torch.long), torch.ones(1), texts)
    decode_once(emoji, drawn, torch.device("cpu"))
    assert drawn.pixels is None


def test_an_encoder_that_nobody_trained_says_nothing():
    made = tiny()
    assert "encoder" not in trainees(made)
    assert not autoencoder.mean_latents(made.student, torch.rand(1, 3, 64, 64)).any()


# ---- the figures


def test_ssim_is_scipys_and_one_for_the_same():
    from scipy.ndimage import gaussian_filter

    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 24, 20, generator=g), torch.rand(2, 3, 24, 20, generator=g)
    b = 0.7 * a + 0.3 * b
    blur = lambda x: gaussian_filter(x.double().numpy(), (0, 0, 1.5, 1.5), radius=(0, 0, 5, 5))[..., 5:-5, 5:-5]
    m_a, m_b = blur(a), blur(b)
    v_a, v_b, v_ab = blur(a * a) - m_a**2, blur(b * b) - m_b**2, blur(a * b) - m_a * m_b
    exact = (2 * m_a * m_b + 1e-4) * (2 * v_ab + 9e-4) / ((m_a**2 + m_b**2 + 1e-4) * (v_a + v_b + 9e-4))
    np.testing.assert_allclose(losses.ssim(a, b).numpy(), exact.mean((1, 2, 3)), atol=2e-5)
    torch.testing.assert_close(losses.ssim(a, a), torch.ones(2))
    small = torch.rand(2, 5, 4, 4, generator=g, requires_grad=True)
    losses.ssim(small, torch.zeros(2, 5, 4, 4)).sum().backward()  # a constant map
    assert small.grad.isfinite().all()


def test_figures_of_a_decoder_against_itself_and_of_a_blurred_one(emoji):
    z = latents(8)
    same = decoders.compare(emoji.vae, emoji.vae, z)
    assert same["psnr_db"] == pytest.approx(100)
    assert (same["ssim"], same["detail"]) == (pytest.approx(1), pytest.approx(1))

    class Blurred(nn.Module):
        def __init__(self, vae):
            super().__init__()
            self.vae, self.config, self.device, self.dtype = vae, vae.config, vae.device, vae.dtype

        def decode(self, z):
            p = self.vae.decode(z).sample
            return SimpleNamespace(sample=nn.functional.avg_pool2d(p, 3, 1, 1, count_include_pad=False))

    worse = decoders.compare(emoji.vae, Blurred(emoji.vae), z)
    assert worse["detail"] < 0.5
    assert worse["psnr_db"] < 40
    assert worse["ssim"] < 0.99


def test_high_frequencies_are_those_above_half_of_what_the_grid_holds():
    x = torch.arange(64)
    wave = lambda cycles: torch.cos(2 * torch.pi * cycles * x / 64).expand(1, 3, 64, 64)
    assert decoders.high_frequencies(wave(8)).item() == pytest.approx(0, abs=1e-6)
    assert decoders.high_frequencies(wave(24)).item() > 0.1


# ---- the command


QUICK = ("--steps=3", "--batch-size=2", "--pairs=4", "--teacher-steps=2", "--device=cpu", "--width=8", "--proof=4", "--d-width=8")
QUICK += ("--prompts=prompts.txt", "--resolution=64")


@pytest.mark.parametrize(
    ("kind", "more"), [("tiny_sd", ["--encoder", "--cond-disc"]), ("tiny_sdxl", ["--lpips-weights=embedded"])]
)
def test_a_tiny_decoder_of_any_checkpoint_loads_in_stock_diffusers(kind, more, fastdiff, request, tmp_path):
    from diffusers import AutoencoderTiny
    from PIL import Image

    base = request.getfixturevalue(kind)
    code, told = fastdiff("distill-vae", "--base", base, "-o", "run", *QUICK, *more)
    assert code == 0, told
    wanted = {"psnr_db", "ssim", "detail", "kl_gmac", "tiny_gmac", "times_cheaper", "kl_ms", "tiny_ms", "times_faster"}
    assert wanted <= set(told["metrics"])
    assert ("encoder_error" in told["metrics"]) == (kind == "tiny_sd")
    assert ("lpips" in told["metrics"]) == (kind == "tiny_sdxl")
    net = AutoencoderTiny.from_pretrained(tmp_path / "run" / "tiny-vae")
    assert net.config.force_upcast is False
    how = ["--prompt", "a cat", "--seed", "7", "--resolution", "64", "--num-steps", "2"]
    code, told = fastdiff("sample", "--base", base, "--vae", "run/tiny-vae", *how, "-o", "cat.png")
    assert code == 0, told
    ours = torch.from_numpy(np.array(Image.open(tmp_path / "cat.png"))) / 255
    code, told = fastdiff("sample", "--base", base, *how, "-o", "kl.png")
    assert not torch.equal(ours, torch.from_numpy(np.array(Image.open(tmp_path / "kl.png"))) / 255)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "AutoencoderTiny.from_pretrained" in card
    assert (tmp_path / "run" / "previews" / "final.png").exists()
    # Half precision, where SDXL's own decoder overflows: its tanh keeps every latent within 3.
    half = autoencoder.load(str(tmp_path / "run" / "tiny-vae")).half()
    z = 30 * latents(1)
    with torch.no_grad():
        low, high = half.decode(z.half()).sample.float(), net.decode(z).sample
    torch.testing.assert_close(low, high, atol=0.02, rtol=0.02)


def test_a_stopped_run_goes_on_and_ends_as_an_uninterrupted_one(fastdiff, tiny_sd, tmp_path):
    from safetensors.torch import load_file

    common = ("distill-vae", "--base", tiny_sd, *QUICK, "--ema", "0.5", "--encoder", "--lr-schedule", "constant")
    assert fastdiff(*common, "-o", "whole", "--steps=4")[0] == 0
    assert fastdiff(*common, "-o", "parts", "--steps=2")[0] == 0
    assert fastdiff(*common, "-o", "parts", "--steps=4")[0] == 0
    a, b = (load_file(tmp_path / name / "tiny-vae" / "diffusion_pytorch_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--blocks", "3,3,1"], "--blocks 3,3,1"),
        (["--lambda-lpips", "1", "--lpips-weights", "gone.pth"], "--lpips-weights gone.pth"),
        (["--crop", "20"], "--crop"),
        (["--eval-every", "5"], "--eval-every"),
        (["--gradient-checkpointing"], "--gradient-checkpointing"),
    ],
)
def test_mistakes_are_one_line(args, word, fastdiff):
    code, told = fastdiff("distill-vae", *args)
    assert code == 2
    assert word in told["error"]["message"]


def test_a_vae_of_other_latents_is_refused(tmp_path):
    from diffusers import AutoencoderTiny

    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputRefused, match="16 latent channels"):
        autoencoder.load(str(tmp_path / "wide"))
    (tmp_path / "wide" / "diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(InputRefused, match="cannot be read"):
        autoencoder.load(str(tmp_path / "wide"))
    with pytest.raises(UsageError, match="no such file or folder"):
        autoencoder.load("./gone")
