"""Pictures in little memory: few at a time, in a precision that does not overflow; the same figures, losses and gradients."""

from copy import deepcopy
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch
from playing import play
from torch import nn

from fastdiff.checkpoints import checkpoint, fingerprint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.data import control
from fastdiff.diffusion import losses
from fastdiff.methods.vae import Config, TinyVAE
from fastdiff.models import autoencoder, feature_matching, perceptual
from fastdiff.models.discriminator import Head
from fastdiff.models.fast.decoder import Decoder
from fastdiff.quality import decoders
from fastdiff.sampling.sampler import Sampler, at_once, drawing
from fastdiff.sampling.settings import Settings
from fastdiff.training.previews import Preview


class Recorded(nn.Module):
    """Stands for a VAE of 8 px a latent position, and records how many latents or pictures it gets at once."""

    def __init__(self, act_fn="silu"):
        super().__init__()
        self.config = SimpleNamespace(block_out_channels=(1, 1, 1, 1), scaling_factor=1.0, act_fn=act_fn)
        self.device, self.dtype, self.sizes = torch.device("cpu"), torch.float32, []

    def decode(self, z):
        self.sizes.append(len(z))
        return SimpleNamespace(sample=z[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2))

    def encode(self, pixels):
        self.sizes.append(len(pixels))
        mean = pixels[..., ::8, ::8]
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=mean))


def latents(n, side, seed=0):
    return torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(seed))


# ---- how many, and in which precision


def test_large_pictures_are_decoded_and_encoded_one_at_a_time():
    for side, sizes in ((128, [1, 1, 1]), (64, [3]), (8, [3])):
        vae, z = Recorded(), latents(3, side)
        assert torch.equal(autoencoder.decode(vae, z), autoencoder.pixels(Recorded(), z).clamp(-1, 1))
        assert vae.sizes == sizes
    vae = Recorded()
    autoencoder.encode_moments(vae, torch.rand(2, 3, 1024, 1024))
    assert vae.sizes == [1, 1]
    small = Recorded()
    autoencoder.decode(small, latents(40, 8))
    assert small.sizes == [16, 16, 8]  # small pictures keep their batches
    tiny = Recorded("relu")
    autoencoder.decode(tiny, latents(3, 128))
    autoencoder.decode(tiny, latents(8, 64))
    assert tiny.sizes == [2, 1, 8]  # a tiny decoder takes a quarter of the memory


def test_controls_are_extracted_from_a_few_pictures_at_a_time():
    vae, data = Recorded(), SimpleNamespace(latents=latents(2, 128))
    control.of_samples(vae, data, lambda picture: picture)
    assert vae.sizes == [1, 1]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float32), ("fp32", torch.float32)])
def test_off_the_cpu_pictures_are_drawn_by_the_fast_decoder_in_a_safe_precision(precision, dtype, tiny_sd):
    base = checkpoint.load(str(tiny_sd), dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32))
    decoder = drawing(base, base.vae, "meta")
    assert isinstance(decoder, Decoder)
    assert (decoder.dtype, decoder.device.type) == (dtype, "meta")
    assert {p.device.type for p in base.vae.parameters()} == {"cpu"}  # the VAE itself takes no memory on the device
    assert drawing(base, base.vae, "cpu") is base.vae
    sampler = Sampler.of_networks(base, SimpleNamespace(to=lambda device: SimpleNamespace(net=None)), base.vae, device="meta")
    assert isinstance(sampler.vae, Decoder)


def test_a_sheet_draws_few_large_pictures_at_a_time(monkeypatch):
    assert [at_once(side, training=True) for side in (128, 64, 8)] == [1, 4, 64]
    drawn = []
    stub = SimpleNamespace(pixels=lambda *args, batch, **how: drawn.append(batch))
    monkeypatch.setattr(Sampler, "of_networks", lambda *args, **how: stub)
    for px in (1024, 512, 64):
        preview = Preview.__new__(Preview)
        preview.base, preview.vae, preview.device = SimpleNamespace(pixels_per_latent=8), None, "cpu"
        preview.cond = preview.uncond = preview.seeds = None
        preview.resolution_px = px
        preview.draw(None, Settings.usual(FAMILIES["sd15"]))
    assert drawn == [1, 4, 4]


# ---- the teacher of a tiny decoder


def test_fp16_training_of_a_decoder_does_not_overflow_its_teacher():
    """The KL decoder of SDXL has activations beyond 65504, where fp16 ends."""
    config = Config(width=8, device="cpu", lpips_weights="embedded", lambda_gan=0, encoder=True)
    made = TinyVAE(checkpoint.load("emoji"), config)
    with torch.no_grad():
        for part in (made.teacher.decoder, made.teacher.encoder):
            part.conv_in.weight.mul_(1e6)  # the norms after it take the factor back
            part.conv_in.bias.mul_(1e6)
    z = latents(2, 8)
    wanted = autoencoder.decode(made.teacher, z)
    assert wanted.isfinite().all()
    with torch.autocast("cpu", torch.float16):
        _, target = made._window(SimpleNamespace(latents=z, pixels=None))
        assert torch.equal(target, wanted)
        torch.manual_seed(0)
        (turn,) = play(made, SimpleNamespace(latents=z, pixels=None), 0)
    assert turn["encoder"]["latents"].isfinite()
    torch.testing.assert_close(
        autoencoder.target_latents(made.teacher, target), autoencoder.mean_latents(made.teacher, target), atol=0, rtol=0
    )


# ---- the figures of a decoder


def whole_batch(teacher, student, z, distance):
    """The figures as they are defined, from all pictures at once."""
    a, b = (autoencoder.pixels(vae, z).clamp(-1, 1) for vae in (teacher, student))
    unit = [(p + 1) / 2 for p in (a, b)]
    errors = (unit[0] - unit[1]).square().flatten(1).mean(1)
    y, x = (torch.fft.fftfreq(n).abs() for n in a.shape[-2:])
    high = lambda p: torch.fft.fft2(p).abs().square()[..., torch.maximum(y[:, None], x[None]) > 0.25].mean()
    detail, lpips = (high(b) / high(a)).item(), distance(b, a).mean().item()
    psnr_db = (-10 * errors.clamp(min=1e-10).log10()).mean().item()
    return {"psnr_db": psnr_db, "ssim": losses.ssim(*unit).mean().item(), "detail": detail, "lpips": lpips}


@torch.no_grad()
def test_figures_of_a_few_pictures_at_a_time_are_those_of_all_at_once(monkeypatch):
    base = checkpoint.load("emoji")
    torch.manual_seed(0)
    student = autoencoder.tiny(8, (1, 1, 1, 1))
    distance, sizes = perceptual.open_distance(base.family, "embedded"), []
    counted = lambda a, b: (sizes.append(len(a)), distance(a, b))[1]
    z = latents(11, 8)
    wanted = whole_batch(base.vae, student, z, distance)
    for budget, largest in ((2**20, 8), (2 * 64**2, 2)):
        monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", budget)
        sizes.clear()
        assert decoders.compare(base.vae, student, z, counted) == pytest.approx(wanted, rel=1e-6)
        assert max(sizes) == largest
    pictures = autoencoder.decode(base.vae, z)
    a, b = (autoencoder.mean_latents(vae, pictures) for vae in (base.vae, student))
    error = (losses.squared(a, b) / a.var()).item()
    assert decoders.encoder_error(base.vae, student, z) == pytest.approx(error, rel=1e-6)


def test_multiply_adds_are_counted_without_a_copy_of_the_weights(monkeypatch):
    net = autoencoder.tiny(8, (1, 1, 1, 1))
    wanted = decoders.macs(net, 8)
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda self, memo: pytest.fail("weights were copied"))
    assert decoders.macs(net, 8) == wanted > 0
    assert {p.device.type for p in net.parameters()} == {"cpu"}


# ---- LPIPS with gradients


@pytest.fixture(scope="module")
def lpips():
    from torchvision.models import vgg16

    torch.manual_seed(0)
    return perceptual.PixelDistance(perceptual.lpips_vgg({f"features.{k}": v for k, v in vgg16().features.state_dict().items()}))


def off(a, b):
    """The relative difference of two gradients. (Their smallest elements vary with the order of the sums.)"""
    return ((a - b).norm() / b.norm()).item()


def kept_bytes(run):
    """The result of `run`, and the bytes that its graph still keeps for the backward pass."""

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    alive = WeakSet()

    def keep(tensor):
        alive.add(kept := Kept(tensor))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        result = run()
    return result, sum(kept.tensor.nbytes for kept in alive)


@pytest.mark.parametrize("network", ["embedded", "vgg"])
def test_pairs_one_by_one_have_the_loss_and_gradient_of_all_at_once(network, tiny_sd, lpips, monkeypatch):
    net = perceptual.open_distance(FAMILIES["sd15"], "embedded") if network == "embedded" else lpips
    distance = perceptual.DecodedDistance(checkpoint.load(str(tiny_sd)).vae, net, 64)
    a, b, weights = latents(3, 8).requires_grad_(True), latents(3, 8, seed=1), torch.tensor([1.0, 2.0, 0.5])
    wanted, before = kept_bytes(lambda: distance(a, b))
    # A ReLU of VGG near 0 answers otherwise in another batch: this gradient of three pairs is 4e-4 from its fp64 value, and that
    # of each pair alone 2e-6. So VGG's is compared with each pair's.
    alone = torch.cat([distance(x, y) for x, y in zip(a.split(1), b.split(1), strict=True)]) if network == "vgg" else wanted
    (gradient,) = torch.autograd.grad((weights * alone).sum(), a)
    sizes = []
    monkeypatch.setattr(perceptual, "LARGE", 64**2)
    monkeypatch.setattr(distance, "apart", lambda x, y: (sizes.append(len(x)), type(distance).apart(distance, x, y))[1])
    found, after = kept_bytes(lambda: distance(a, b))
    assert sizes == [1, 1, 1]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert off(torch.autograd.grad((weights * found).sum(), a)[0], gradient) < 1e-5
    assert after < before / 100  # the gradient itself, and no activation
    with torch.no_grad():
        torch.testing.assert_close(distance(a, b), wanted, atol=1e-6, rtol=1e-5)


def test_gradients_that_are_computed_before_the_loss_is_scaled_are_not_in_fp16(lpips, monkeypatch):
    a, b = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(perceptual, "LARGE", 64**2)
    gradients = []
    for enabled in (False, True):
        x = (a.half() if enabled else a.half().float()).requires_grad_(True)
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            distance = lpips(x, b)
        assert distance.dtype == torch.float32
        gradients.append(torch.autograd.grad(1e6 * distance.sum(), x)[0].float())
    assert off(*gradients) < 1e-3


def test_blocks_keep_only_their_inputs_and_are_themselves_again(tiny_sd, lpips):
    vae, z, goal = checkpoint.load(str(tiny_sd)).vae, latents(1, 16).requires_grad_(True), torch.zeros(1, 3, 128, 128)

    def run():
        return lpips.net(autoencoder.pixels(vae, z), goal).sum()

    wanted, before = kept_bytes(run)
    with perceptual.recomputed(vae), perceptual.recomputed(lpips):
        found, after = kept_bytes(run)
    assert after < 0.5 * before
    assert off(torch.autograd.grad(found, z)[0], torch.autograd.grad(wanted, z)[0]) < 1e-5
    assert not any("forward" in vars(module) for net in (vae, lpips) for module in net.modules())
    with pytest.raises(RuntimeError), perceptual.recomputed(vae):
        raise RuntimeError
    assert not any("forward" in vars(module) for module in vae.modules())


def test_feature_matching_of_large_pictures_has_the_same_gradient(tiny_sd, lpips, monkeypatch):
    net = feature_matching.PixelFeatures(checkpoint.load(str(tiny_sd)).vae, feature_matching.VGG(deepcopy(lpips.net)), 64)
    a, b, results = latents(1, 8).requires_grad_(True), latents(1, 8, seed=1), []
    for large in (2**18, 1):
        monkeypatch.setattr(perceptual, "LARGE", large)

        def run():
            return torch.stack([(x - y).square().mean() for x, y in zip(*net(a, b, None), strict=True)]).sum()

        loss, kept = kept_bytes(run)
        results.append((loss.item(), torch.autograd.grad(loss, a)[0], kept))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert off(results[1][1], results[0][1]) < 1e-5
    assert results[1][2] < 0.6 * results[0][2]


def test_a_bf16_run_decodes_the_regression_in_bf16_by_a_copy_without_encoder():
    base = checkpoint.load("emoji")
    distance = perceptual.open_distance(base.family, "embedded")
    exact, half = (perceptual.DecodedDistance(base.vae, distance, 64, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert exact.vae is base.vae
    assert {p.dtype for p in half.vae.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in base.vae.parameters()} == {torch.float32}
    assert isinstance(half.vae.encoder, nn.Identity)
    assert not isinstance(base.vae.encoder, nn.Identity)
    assert not any(p.requires_grad for p in half.parameters())
    shipped = latents(2, 8)
    gradients = []
    for net in (exact, half):
        a = (shipped + 0.3 * latents(2, 8, seed=1)).requires_grad_(True)
        gradients.append(torch.autograd.grad(net(a, shipped).sum(), a)[0].flatten())
    assert torch.cosine_similarity(*gradients, 0) > 0.98


# ---- the discriminator's head


def test_the_head_is_the_published_one_unless_a_width_is_asked_for():
    sizes = lambda head: [tuple(m.weight.shape[:2]) for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert sizes(Head(16, 32)) == [(16, 16)] * 4 + [(1, 16)]
    narrow = Head(16, 32, 8)
    assert sizes(narrow) == [(8, 16), (8, 8), (8, 8), (8, 8), (1, 8)]
    assert narrow(torch.randn(2, 16, 32, 32)).shape == (2, 1)


# ---- fingerprints


def test_a_network_is_hashed_again_only_if_its_weights_changed(monkeypatch):
    torch.manual_seed(0)
    hashed, calls = fingerprint.hashed, []
    monkeypatch.setattr(fingerprint, "hashed", lambda net: (calls.append(net), hashed(net))[1])
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)).half()
    first = fingerprint.fingerprint(net)
    assert fingerprint.fingerprint(net) == first
    for p in net.parameters():
        p.data = p.data.clone()  # what moving a network to another device does
    assert fingerprint.fingerprint(net) == first
    assert len(calls) == 1

    def through_data():
        net[0].weight.data[1, 2] += 1

    def in_place():
        with torch.no_grad():
            net[0].bias[0] = 7

    def permuted():
        with torch.no_grad():
            net[0].weight.copy_(net[0].weight.flip(0))

    def loaded():
        net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}, assign=True)

    def buffer():
        net[1].running_mean.data.add_(1)

    seen = {first}
    for change in (through_data, in_place, permuted, loaded, buffer, lambda: net.float()):
        change()
        again = fingerprint.fingerprint(net)
        assert again == hashed(net)
        seen.add(again)
    assert len(calls) == 7
    assert len(seen) == 6  # fp32 has the values of fp16


def test_bits_are_summed_whatever_the_size_and_place_of_a_tensor():
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8):
        whole = torch.randn(41).mul(9).to(dtype)
        for part in (whole, whole[1:], whole[3:4], whole[:0], whole[0], whole[::2]):
            assert fingerprint.bit_sums(part) == fingerprint.bit_sums(part.clone())
            if part.numel():
                other = part.clone().flatten()
                other[-1] += 1
                assert fingerprint.bit_sums(other) != fingerprint.bit_sums(part)


def test_a_run_hashes_every_network_once(fastdiff, tiny_sd, monkeypatch):
    hashed, calls = fingerprint.hashed, []
    monkeypatch.setattr(fingerprint, "hashed", lambda net: (calls.append(type(net).__name__), hashed(net))[1])
    words = ["--steps=1", "--batch-size=1", "--grad-accum=1", "--pairs=2", "--teacher-steps=1", "--lpips-weights=embedded"]
    words += ["--device=cpu", "--prompts=prompts.txt", "--resolution=64", "--lora-rank=2", "--data=teacher", "-o=run"]
    code, _ = fastdiff("dmd", f"--base={tiny_sd}", *words)
    assert code == 0
    assert calls == ["CLIPTextModel", "UNet2DConditionModel"]
