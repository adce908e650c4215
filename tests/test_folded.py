"""Networks as plain functions of their weights, against diffusers' and transformers' own; and the numbers of a sampler."""

import diffusers
import pytest
import torch
import torch.nn.functional as F
from conftest import SCHEDULER, UNET, build

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.diffusion.samplers import SOLVERS, Grid
from fastdiff.diffusion.schedule import NoiseSchedule
from fastdiff.models import autoencoder, text
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.fast.decoder import Decoder
from fastdiff.models.fast.layers import Unknown
from fastdiff.models.fast.text import TextEncoder
from fastdiff.models.fast.unet import FoldedUNet, unet_of
from fastdiff.models.unet import LAYOUTS, student_config
from fastdiff.sampling.linear_walk import table
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings

SMALL = dict(UNET, cross_attention_dim=32)
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def blocks(*kinds):
    return dict(
        down_block_types=tuple(k.format("Down") for k in kinds), up_block_types=tuple(k.format("Up") for k in reversed(kinds))
    )


NETWORKS = {
    "sd15": SMALL,
    "sd21": dict(SMALL, use_linear_projection=True, attention_head_dim=(2, 4, 4, 4), cross_attention_dim=48),
    "widening": dict(SMALL, block_out_channels=(16, 32, 48, 64)),
    "no middle": dict(SMALL, layers_per_block=1, mid_block_type=None),
    "sdxs-512": dict(
        SMALL, layers_per_block=1, mid_block_type=None, block_out_channels=(16, 32, 32), **blocks(PLAIN, CROSS, CROSS)
    ),
    "cross-attention alone": dict(
        SMALL, layers_per_block=1, block_out_channels=(16, 32), only_cross_attention=(True, False), **blocks(CROSS, CROSS)
    ),
    "plain middle": dict(SMALL, mid_block_type="UNetMidBlock2D", transformer_layers_per_block=(1, 2, 1, 1)),
    "guidance embedded": dict(SMALL, time_cond_proj_dim=24),
    "sdxl": dict(
        UNET, block_out_channels=(16, 32, 32), attention_head_dim=(2, 4, 4), transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=96, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80, **blocks(PLAIN, CROSS, CROSS),
    ),
}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def pair(request):
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(**NETWORKS[request.param]).eval().requires_grad_(False)
    return net, FoldedUNet(net.state_dict(), net.config)


def told(net, n):
    """tokens, and what else the network takes."""
    tokens, extra = torch.randn(n, 7, net.config.cross_attention_dim), {}
    if net.config.addition_embed_type:
        extra["added_cond_kwargs"] = {"text_embeds": torch.randn(n, 32), "time_ids": torch.randint(0, 1000, (n, 6)).float()}
    if net.config.time_cond_proj_dim:
        extra["timestep_cond"] = torch.randn(n, net.config.time_cond_proj_dim)
    return tokens, extra


@pytest.mark.parametrize("size", [(8, 8), (10, 6)])
def test_a_folded_network_answers_as_diffusers(pair, size):
    """Every step of a walk out of one fold; also sizes that do not halve evenly."""
    net, folded = pair
    if size != (8, 8) and len(net.config.block_out_channels) > 3:
        size = (20, 12)
    x, (tokens, extra) = torch.randn(3, 4, *size), told(net, 3)
    t = torch.tensor([999, 499, 1])
    added = extra.get("added_cond_kwargs", {})
    made = folded.fold(
        t, tokens, pooled=added.get("text_embeds"), time_ids=added.get("time_ids"), guidance=extra.get("timestep_cond")
    )
    for k in range(3):
        expected = net(x, t[k], tokens, **extra).sample
        torch.testing.assert_close(folded.step(x, made, k), expected, atol=1e-4, rtol=1e-4)
    mixed = torch.tensor([3, 700, 999])  # a timestep for each row, as diffusers' network is called
    found = folded(x, mixed, tokens, **extra)[0]
    torch.testing.assert_close(found, net(x, mixed, tokens, **extra).sample, atol=1e-4, rtol=1e-4)


def test_in_bf16_it_is_as_near_to_fp32_as_diffusers(pair):
    net, folded = pair
    x, (tokens, extra) = torch.randn(2, 4, 16, 16), told(net, 2)
    expected = net(x, 499, tokens, **extra).sample.flatten()
    cast = lambda v: {k: w.bfloat16() for k, w in v.items()} if isinstance(v, dict) else v.bfloat16()
    half = FoldedUNet(net.state_dict(), net.config, dtype=torch.bfloat16)
    found = half(x, torch.tensor(499), cast(tokens), **{k: cast(v) for k, v in extra.items()})[0].float().flatten()
    assert torch.cosine_similarity(found, expected, dim=0) > 0.999


def channels_first_norm(monkeypatch):
    """From now on group norm returns channels first, as CUDA's does. Returns the list of all inputs of convolutions."""
    norm, conv, inputs = F.group_norm, F.conv2d, []
    monkeypatch.setattr(F, "group_norm", lambda x, *args: norm(x, *args).contiguous())
    monkeypatch.setattr(F, "conv2d", lambda x, *args: inputs.append(x) or conv(x, *args))
    return inputs


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_convolutions_get_channels_last_also_where_norms_return_channels_first(kind, monkeypatch):
    """Otherwise each convolution after a norm copies its input first."""
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(**NETWORKS[kind]).eval().requires_grad_(False)
    folded, x, (tokens, extra) = FoldedUNet(net.state_dict(), net.config), torch.randn(2, 4, 16, 16), told(net, 2)
    expected = folded(x, torch.tensor(10), tokens, **extra)[0]
    inputs = channels_first_norm(monkeypatch)
    torch.testing.assert_close(folded(x, torch.tensor(10), tokens, **extra)[0], expected, atol=1e-5, rtol=1e-5)
    assert len(inputs) > 20
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in inputs)


def test_convolutions_of_the_decoder_get_channels_last_too(tiny_sd, monkeypatch):
    vae, z = checkpoint.load(str(tiny_sd)).vae, torch.randn(1, 4, 6, 10)
    decoder = Decoder(vae.state_dict(), dict(vae.config))
    expected = decoder(z)
    inputs = channels_first_norm(monkeypatch)
    torch.testing.assert_close(decoder(z), expected, atol=1e-5, rtol=1e-5)
    assert len(inputs) > 10
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in inputs)


def test_a_controlnet_adds_to_a_folded_network():
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(**SMALL).eval().requires_grad_(False)
    x, (tokens, _) = torch.randn(2, 4, 8, 8), told(net, 2)
    shapes = [(16, 8)] * 3 + [(16, 4)] + [(32, 4)] * 2 + [(32, 2)] * 3 + [(32, 1)] * 3
    down = [torch.randn(2, c, s, s) for c, s in shapes]
    residuals = dict(down_block_additional_residuals=down, mid_block_additional_residual=torch.randn(2, 32, 1, 1))
    expected = net(x, 10, tokens, **residuals).sample
    found = FoldedUNet(net.state_dict(), net.config)(x, torch.tensor(10), tokens, **residuals)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_is_not_known_is_not_guessed():
    net = diffusers.UNet2DConditionModel(**SMALL)
    state = net.state_dict()
    for change in (dict(act_fn="gelu"), dict(class_embed_type="timestep"), dict(resnet_time_scale_shift="scale_shift")):
        with pytest.raises(Unknown, match=next(iter(change))):
            FoldedUNet(state, dict(net.config) | change)
    with pytest.raises(Unknown, match="extra.weight is not used by any known layer"):
        FoldedUNet({**state, "extra.weight": torch.zeros(3)}, net.config)
    with pytest.raises(Unknown, match="conv_out.weight is missing"):
        FoldedUNet({k: v for k, v in state.items() if k != "conv_out.weight"}, net.config)
    broken = dict(state, **{"conv_in.bias": torch.full((16,), torch.nan)})
    with pytest.raises(Unknown, match="conv_in.bias is not a finite number"):
        FoldedUNet(broken, net.config)
    with pytest.raises(Unknown, match="conv_in.weight is"):
        FoldedUNet(dict(state, **{"conv_in.weight": torch.zeros(16, 5, 3, 3)}), net.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_networks_and_all_layouts_are_known(family):
    """At full size, without memory: names and shapes of every tensor."""
    base = Checkpoint(family, FAMILIES[family].home, FAMILIES[family])
    for layout in [None, *(name for name, row in LAYOUTS.items() if row.fits(base.family))]:
        config = student_config(base.unet_config, layout, base.family) if layout else base.unet_config
        with torch.device("meta"):
            net = diffusers.UNet2DConditionModel.from_config(config)
        assert len(FoldedUNet(net.state_dict(), config, device="meta").cross) > 0
    if not base.family.published:
        return
    empty = lambda part: {k: torch.empty(s, device="meta") for k, s in base.shapes(part).items()}
    assert Decoder(empty("vae"), base.config_of("vae"), device="meta").config.latent_channels == 4
    for part in base.text_parts:
        encoder = TextEncoder(empty(part), base.config_of(part), device="meta")
        assert (encoder.projection is not None) == (part == "text_encoder_2")


def test_an_unknown_network_still_draws(tiny_sd, monkeypatch):
    """Of a kind that is not known here diffusers' own runs, in the same walk."""
    base = checkpoint.load(str(tiny_sd))
    folded = unet_of(base)
    assert isinstance(folded, FoldedUNet)
    found = Sampler(base, device="cpu", compile="off")
    monkeypatch.setattr("fastdiff.models.fast.unet.BLOCKS", {"UpBlock2D"})
    base = checkpoint.load(str(tiny_sd))
    other = Sampler(base, device="cpu", compile="off")
    assert other.denoiser.net is base.unet
    cond, uncond = text.encode(base, ["a cat"]), text.unconditional(base)
    a, b = (s.pixels(cond, uncond, [3], Settings("ddim", 2, 3.0), resolution_px=64) for s in (found, other))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("blocks", [(3, 3, 3, 1), (1, 2, 0)])
def test_decoders_equal_diffusers(blocks, tiny_sd):
    torch.manual_seed(0)
    z = torch.randn(2, 4, 6, 10)
    tiny = autoencoder.tiny(8, blocks).eval()
    for vae in (tiny, checkpoint.load(str(tiny_sd)).vae):
        decoder = Decoder(vae.state_dict(), dict(vae.config))
        with torch.no_grad():
            torch.testing.assert_close(decoder(z), autoencoder.pixels(vae, z), atol=1e-4, rtol=1e-4)
        assert autoencoder.factor(decoder) == autoencoder.factor(vae)


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
def test_prompts_are_encoded_as_transformers_does_and_once(kind, request, monkeypatch):
    base, other = (checkpoint.load(str(request.getfixturevalue(kind))) for _ in range(2))
    prompts = text.Prompts(base)
    lines = ["a cat", "", "Ünïcode 42 -- it's WEIRD!!", "x " * 40, "a cat"]
    found, expected = prompts(lines), text.encode(other, lines)
    assert prompts.encoders
    assert "text_encoders" not in base.__dict__
    for name in ("tokens", "pooled"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    expected = text.unconditional(other)
    torch.testing.assert_close(prompts.unconditional().tokens, expected.tokens, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(prompts, "encode", None)  # from now on out of memory
    length = base.config_of("text_encoder")["max_position_embeddings"]  # found.tokens are as long as the longest prompt
    assert torch.equal(prompts(["a cat"]).tokens, found.tokens[:1, :length])


def test_encoders_that_were_changed_are_used(tiny_sd):
    base = checkpoint.load(str(tiny_sd))
    with torch.no_grad():
        base.text_encoders[0].get_parameter("final_layer_norm.bias" if hasattr(base.text_encoders[0], "final_layer_norm") else
                                            "text_model.final_layer_norm.bias").add_(1)  # fmt: skip
    assert torch.equal(text.Prompts(base)(["a cat"]).tokens, text.encode(base, ["a cat"]).tokens)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_table_walks_as_its_solver(name, zero_snr):
    """For every prediction type, 1 to 25 steps, both ends of the schedule."""
    for kind in ("epsilon", "v_prediction", "sample")[zero_snr:]:
        for n in (1, 2, 4, 25):
            schedule = NoiseSchedule.from_config({**SCHEDULER, "rescale_betas_zero_snr": zero_snr})
            spacing = SOLVERS[name].spacing
            grid = Grid(schedule, schedule.grid(n, spacing), None if n == 4 else 0, spacing in {"trailing", "linspace"}, 0.3)
            noises = torch.randn(n + 1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(n))
            network = lambda x, t: 0.3 * torch.tanh(x) + 0.1 * torch.sin(x * 2 + t / 500)
            denoise = lambda x, t: schedule.predict(network(x, t), x, t, kind)  # noqa: B023
            queue = iter(noises)
            expected = SOLVERS[name].run(denoise, next(queue), grid, lambda: next(queue))  # noqa: B023
            made, columns, queue, k = table(name, grid, kind), [], iter(noises), 0
            for fresh in made.fresh:
                if fresh:
                    columns.append(next(queue))
                else:
                    x = sum(c * h for c, h in zip(made.rows[k], columns, strict=False))
                    columns.append(network(x, made.t[k]))
                    k += 1
            found = sum(c * h for c, h in zip(made.rows[-1], columns, strict=True))
            assert made.draws == (n if SOLVERS[name].stochastic else 1)
            torch.testing.assert_close(found, expected, atol=3e-6 * max(1, expected.abs().max()), rtol=0)


def test_a_denoiser_that_says_something_else_is_asked_itself(tiny_sd):
    """A subclass may answer otherwise than its network; its own forward counts then."""
    base = checkpoint.load(str(tiny_sd))

    class Grey(Denoiser):
        def forward(self, x_t, t, cond):
            p = super().forward(x_t, t, cond)
            return p._replace(x0=torch.zeros_like(p.x0))

    cond = text.encode(base, ["a cat"])
    grey = Sampler.of_networks(base, Grey(base.unet, base.schedule(), base.prediction_type), base.vae)
    assert not grey.latents(cond, cond, [1], Settings("euler", 2, 3.0), (8, 8)).any()


@pytest.mark.parametrize("family", ["sd21", "bk-tiny"])
def test_whole_checkpoints_draw_as_their_pipelines(family, tmp_path):
    """From files to pictures without diffusers, against diffusers."""
    base = checkpoint.load(str(build(tmp_path / family, family, "epsilon")))
    sampler, prompts = Sampler(base, device="cpu", compile="off"), text.Prompts(base)
    assert not {"unet", "vae", "text_encoders"} & set(base.__dict__)
    settings = Settings("ddim", 3, 4.0, "leading")
    found = sampler.pixels(prompts(["a cat"]), prompts.unconditional(), [11], settings, resolution_px=64)
    pipeline = base.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    told = pipeline("a cat", height=64, width=64, num_inference_steps=3, guidance_scale=4.0, latents=noise, output_type="pt")
    torch.testing.assert_close(found, told.images * 2 - 1, atol=2e-4, rtol=0)
