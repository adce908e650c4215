"""Train the embedded `emoji` checkpoint from scratch, stage by stage.

    python examples/emoji/train.py features --minutes 6      # feature network of the losses
    python examples/emoji/train.py judge --minutes 15        # feature network of the closing tables, which no loss uses
    python examples/emoji/train.py text --minutes 4          # tokenizer + CLIP text encoder, against the pictures
    python examples/emoji/train.py vae --minutes 20          # AutoencoderKL, f8
    python examples/emoji/train.py decoder --minutes 20      # its decoder alone, sharper (may run beside `unet`)
    python examples/emoji/train.py unet --minutes 90         # the denoiser, epsilon prediction
    python examples/emoji/train.py export                    # -> fastdiff/assets/emoji, fp16 (export-judge: the judge alone)

Every stage saves `WORK/<stage>.pt` and continues from it when the same command is given again with more minutes. The learning
rate depends on the share of the minutes that is spent. On two cores, two processes with one thread each are faster than one with
two threads (`torchrun --nproc-per-node 2 examples/emoji/train.py unet ...` averages gradients). A GPU is used if present.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.data import emoji
from fastdiff.models.feature_net import FeatureNet
from fastdiff.models.judge_net import JudgeNet

WIDTH, LENGTH, VOCAB = 128, 16, 1024  # text encoder
NOISE = 0.1  # standard deviation of the VAE's posterior, fixed
GROUPS = sorted({p.group for p in emoji.pictures()})
GROUP_OF = torch.tensor([GROUPS.index(p.group) for p in emoji.pictures()])
PICTURES, COLOURS = len(emoji.pictures()), len(emoji.BACKGROUNDS)
SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    prediction_type="epsilon",
)


def vae_net() -> nn.Module:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )
    with torch.no_grad():  # the last four channels are log variances: they stay fixed, so only the means are learned
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = 2 * math.log(NOISE)
    keep = torch.zeros(8, 1, 1, 1)
    keep[:4] = 1
    vae.quant_conv.weight.register_hook(lambda g: g * keep.to(g))
    vae.quant_conv.bias.register_hook(lambda g: g * keep.flatten().to(g))
    return vae


def unet_net() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(48, 96, 96, 96),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def text_net() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = load_tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def load_tokenizer():
    """A byte-level BPE tokenizer trained on the captions, in CLIP's format."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = [c for i in range(PICTURES) for b in (None, 0, *range(COLOURS)) for c in {caption(i, b), caption(i, b, True)}]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(words, trainer)
    state = json.loads(bpe.to_str())["model"]
    vocab = {token: i for i, token in enumerate(state["vocab"])}
    for token in (*(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH, pad_token="<|endoftext|>")


caption = emoji.caption


class Stage:
    """A training stage that runs for some minutes and can be resumed: state in WORK/<name>.pt, EMA, cosine learning rate."""

    def __init__(self, name: str, nets: dict[str, nn.Module], lr: float, args, ema: float = 0.998) -> None:
        self.name, self.path, self.minutes = name, args.work / f"{name}.pt", args.minutes
        self.nets, self.lr, self.decay = nets, lr, ema
        self.params = [p for net in nets.values() for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
        self.seconds, self.step = 0.0, 0
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu")
            for key, net in nets.items():
                net.load_state_dict(state["nets"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.seconds, self.step = state["seconds"], state["step"]
            self.ema = state["ema"]
        else:
            self.ema = {key: {k: v.clone() for k, v in net.state_dict().items()} for key, net in nets.items()}
        self.saved = time.time()

    def run(self, loss_of) -> None:
        """Train until the minutes are spent. `loss_of(step, share of the time spent)` returns {name: loss}."""
        started, mean = time.time(), {}
        done = self.seconds
        while self.seconds < self.minutes * 60:
            share = self.seconds / (self.minutes * 60)
            rate = self.lr * min(1, self.step / 200) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * share)))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses = loss_of(self.step, share)
            sum(losses.values()).backward()
            average_gradients(self.params)
            nn.utils.clip_grad_norm_(self.params, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for key, net in self.nets.items():
                    for k, v in net.state_dict().items():
                        if v.is_floating_point():
                            self.ema[key][k].lerp_(v.cpu(), 1 - decay)
            for k, v in losses.items():
                mean[k] = 0.98 * mean.get(k, v.item()) + 0.02 * v.item()
            self.seconds = agreed(done + time.time() - started)
            if self.step % 100 == 0 and rank() == 0:
                print(self.name, self.step, f"{self.seconds:.0f}s", {k: round(v, 4) for k, v in mean.items()}, flush=True)
            if time.time() - self.saved > 120:
                self.save()
        self.save()

    def save(self) -> None:
        self.saved = time.time()
        if rank() == 0:
            nets = {k: net.state_dict() for k, net in self.nets.items()}
            state = dict(nets=nets, optimizer=self.optimizer.state_dict(), ema=self.ema)
            torch.save(dict(state, seconds=self.seconds, step=self.step), self.path.with_suffix(".tmp"))
            os.replace(self.path.with_suffix(".tmp"), self.path)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(seconds: float) -> float:
    """The first process's value, on all processes."""
    if not dist.is_initialized():
        return seconds
    value = torch.tensor(seconds)
    dist.broadcast(value, 0)
    return value.item()


def average_gradients(params: list[nn.Parameter]) -> None:
    """Average the gradients over all processes."""
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = g.view_as(p)


def trained(args, stage: str, key: str, net: nn.Module) -> nn.Module:
    """Load the averaged weights of a finished stage into `net` and freeze it."""
    net.load_state_dict(torch.load(args.work / f"{stage}.pt", map_location="cpu")["ema"][key])
    return net.eval().requires_grad_(False).to(args.device)


def draw_batch(size: int, args, style: str = "noto") -> tuple[Tensor, Tensor, Tensor]:
    """Random pictures: picture numbers (B,), colours (B,) and pixels (B, 3, 64, 64) in [-1, 1]."""
    picture, colour = torch.randint(PICTURES, (size,)), torch.randint(COLOURS, (size,))
    return picture, colour, emoji.compose(picture, colour, style).to(args.device)


def degrade(pixels: Tensor) -> Tensor:
    """Shift, blur and add noise, and change contrast and saturation, at random strengths, as imperfect samplers do."""
    n, device = len(pixels), pixels.device
    shift = torch.randint(-3, 4, (2,)).tolist()
    pixels = pixels.roll(shift, (2, 3))
    if torch.rand(()) < 0.6:
        sigma = torch.rand(()).item() * 1.8 + 0.2
        ax = torch.arange(-4, 5, device=device).float()
        k = torch.exp(-ax.square() / (2 * sigma**2))
        k = (k / k.sum()).expand(3, 1, -1)
        pixels = F.conv2d(pixels, k[:, :, None, :], padding=(0, 4), groups=3)
        pixels = F.conv2d(pixels, k[:, :, :, None], padding=(4, 0), groups=3)
    low = torch.randn(n, 3, 8, 8, device=device) * torch.rand(n, 1, 1, 1, device=device) * 0.35
    fine = torch.randn_like(pixels) * torch.rand(n, 1, 1, 1, device=device) * 0.2
    pixels = pixels + F.interpolate(low, scale_factor=8, mode="bicubic") + fine
    gain = 1 + (torch.rand(n, 1, 1, 1, device=device) - 0.5) * 0.6
    grey = pixels.mean(1, keepdim=True)
    return (grey + (pixels - grey) * gain).mul(1 + (torch.rand(n, 1, 1, 1, device=device) - 0.5) * 0.4).clamp(-1, 1)


def train_features(args) -> None:
    net = FeatureNet().to(args.device)
    heads = nn.ModuleDict(
        {"name": nn.Linear(128, PICTURES), "group": nn.Linear(128, len(GROUPS)), "colour": nn.Linear(128, COLOURS)}
    )
    stage = Stage("features", {"net": net, "heads": heads.to(args.device)}, 2e-3, args)

    def loss_of(step, share):
        picture, colour, pixels = draw_batch(64, args)
        feature = F.normalize(net(degrade(pixels)), dim=1) * 12  # a bounded embedding keeps Frechet distances comparable
        truth = {"name": picture, "group": GROUP_OF[picture], "colour": colour}
        weight = {"name": 1.0, "group": 0.3, "colour": 0.3}
        return {k: weight[k] * F.cross_entropy(heads[k](feature), v.to(args.device)) for k, v in truth.items()}

    stage.run(loss_of)


def blurred(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Blur each picture (B, 3, H, W) by a Gaussian of its own width `sigma` (B,) in pixels."""
    n, c, *_ = pixels.shape
    ax = torch.arange(-6, 7, device=pixels.device).float()
    k = torch.exp(-ax.square() / (2 * sigma.clamp(min=0.05)[:, None].square()))
    k = (k / k.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]  # (B C, 1, 13)
    x = pixels.flatten(0, 1)[None]
    x = F.conv2d(F.pad(x, (6, 6, 0, 0), mode="replicate"), k[:, :, None, :], groups=n * c)
    x = F.conv2d(F.pad(x, (0, 0, 6, 6), mode="replicate"), k[:, :, :, None], groups=n * c)
    return x[0].view_as(pixels)


def spoiled(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Shift, blur, stain and re-colour each picture at random. Returns the pictures and how much was done to each (B, 4).

    The four are blur, stains, contrast and saturation, each about -1 to 1. The judge learns to tell them, so that its embedding
    sees the quality of a picture and not only what it shows.
    """
    n, device = len(pixels), pixels.device
    sigma = torch.rand(n, device=device) * 2 * (torch.rand(n, device=device) < 0.6)
    stain = torch.rand(n, device=device) * 0.5 * (torch.rand(n, device=device) < 0.6)
    contrast, saturation = ((torch.rand(n, device=device) - 0.5) * (torch.rand(n, device=device) < 0.6) for _ in range(2))
    pixels = torch.stack([p.roll(torch.randint(-3, 4, (2,)).tolist(), (1, 2)) for p in pixels])
    pixels = blurred(pixels, sigma)
    column = lambda v: v[:, None, None, None]
    low = F.interpolate(torch.randn(n, 3, 6, 6, device=device), size=pixels.shape[-2:], mode="bicubic")
    pixels = pixels + column(stain) * (0.7 * low + 0.3 * torch.randn_like(pixels))
    grey = pixels.mean(1, keepdim=True)
    pixels = (grey + (pixels - grey) * column(1 + saturation)) * column(1 + contrast)
    return pixels.clamp(-1, 1), torch.stack([sigma - 0.6, 4 * stain - 0.6, 2 * contrast, 2 * saturation], 1)


def train_judge(args) -> None:
    """Train the network of the closing tables: what a picture shows, in which style, on which colour, and how spoiled it is."""
    net = JudgeNet().to(args.device)
    sizes = {"name": PICTURES, "group": len(GROUPS), "colour": COLOURS, "style": len(emoji.STYLES), "quality": 4}
    heads = nn.ModuleDict({name: nn.Linear(JudgeNet.dim, size) for name, size in sizes.items()}).to(args.device)
    stage = Stage("judge", {"net": net, "heads": heads}, 2e-3, args)
    weight = {"name": 1.0, "group": 0.3, "colour": 0.3, "style": 0.3, "quality": 0.5}

    def loss_of(step, share):
        which = int(torch.multinomial(torch.tensor([0.7, 0.15, 0.15]), 1))
        picture, colour, pixels = draw_batch(64, args, emoji.STYLES[which])
        pixels, strengths = spoiled(pixels)
        feature = F.normalize(net(pixels), dim=1) * JudgeNet.dim**0.5
        truth = {"name": picture, "group": GROUP_OF[picture], "colour": colour, "style": torch.full_like(picture, which)}
        loss = {k: weight[k] * F.cross_entropy(heads[k](feature), v.to(args.device)) for k, v in truth.items()}
        return loss | {"quality": weight["quality"] * F.mse_loss(heads["quality"](feature), strengths)}

    stage.run(loss_of)


def train_text(args) -> None:
    """CLIP's contrastive loss with the frozen recogniser as picture tower, read at every position after the caption's end.

    So each padding token carries the whole caption, which is what the denoiser's cross-attention sees most of.
    """
    tokenizer, net = load_tokenizer(), text_net().to(args.device)
    features = trained(args, "features", "net", FeatureNet())
    every = torch.arange(PICTURES)
    tower = torch.stack([features(emoji.compose(every, torch.full_like(every, c)).to(args.device)) for c in range(COLOURS)])
    tower = F.normalize(tower, dim=-1)  # (colours, pictures, 128)
    thumbs = F.interpolate(emoji.sprites()[:, :], (12, 12), mode="area")
    thumbs = (thumbs[:, :3] * thumbs[:, 3:]).flatten(1).sub(0.3).to(args.device)  # what the picture looks like, roughly
    heads = nn.ModuleDict(
        {
            "picture": nn.Linear(WIDTH, 128),
            "thumb": nn.Linear(WIDTH, thumbs.shape[1]),
            "group": nn.Linear(WIDTH, len(GROUPS)),
            "colour": nn.Linear(WIDTH, COLOURS + 1),
        }
    ).to(args.device)
    stage = Stage("text", {"net": net, "heads": heads}, 1e-3, args)
    table = tokens_of(
        tokenizer, [caption(i, b, g) for i in range(PICTURES) for b in (*range(COLOURS), None) for g in (False, True)]
    )
    table = table.view(PICTURES, COLOURS + 1, 2, LENGTH)

    def loss_of(step, share):
        picture, colour = torch.randint(PICTURES, (96,)), torch.randint(COLOURS + 1, (96,))
        coarse = (torch.rand(96) < 0.2).long()
        tokens = table[picture, colour, coarse].to(args.device)
        hidden = net(tokens).last_hidden_state
        end = (tokens == tokenizer.eos_token_id).int().argmax(1).cpu()
        at = end + (torch.rand(96) * (LENGTH - end)).long()
        h = hidden[torch.arange(96), at]
        named, plain = (coarse == 0).to(args.device), colour.clamp(max=COLOURS - 1)
        towers = tower[plain.to(args.device)]  # (B, pictures, 128)
        logits = 20 * torch.einsum("bd,bpd->bp", F.normalize(heads["picture"](h), dim=1), towers)
        p = picture.to(args.device)
        return {
            "picture": F.cross_entropy(logits[named], p[named]),
            "thumb": 4 * F.mse_loss(heads["thumb"](h)[named], thumbs[p][named]),
            "group": 0.5 * F.cross_entropy(heads["group"](h), GROUP_OF[picture].to(args.device)),
            "colour": 0.5 * F.cross_entropy(heads["colour"](h), colour.to(args.device)),
        }

    stage.run(loss_of)


def tokens_of(tokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids


def pixel_loss(out: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    d = out - pixels
    dx, dy = d.diff(dim=3).abs().mean(), d.diff(dim=2).abs().mean()
    return {"l1": d.abs().mean(), "mse": d.square().mean(), "edges": 0.5 * (dx + dy)}


def train_vae(args) -> None:
    vae = vae_net().to(args.device)
    stage = Stage("vae", {"vae": vae}, 2e-3, args)

    def loss_of(step, share):
        *_, pixels = draw_batch(8, args)
        posterior = vae.encode(pixels).latent_dist
        out = vae.decode(posterior.sample()).sample
        return pixel_loss(out, pixels) | {"prior": 1e-3 * posterior.mean.square().mean()}

    stage.run(loss_of)


@torch.no_grad()
def all_latents(vae, args, style: str = "noto") -> Tensor:
    """Latents (pictures, colours, 4, 8, 8) of every picture on every background: the posterior means."""
    every = torch.arange(PICTURES)
    columns = [vae.encode(emoji.compose(every, torch.full_like(every, c), style).to(args.device)) for c in range(COLOURS)]
    return torch.stack([c.latent_dist.mean for c in columns], 1)


def train_decoder(args) -> None:
    """Train only the decoder, on fixed latents, with a feature distance in the loss. It makes the pictures sharper."""
    vae = trained(args, "vae", "vae", vae_net())
    styles = ("noto", "noto", "noto", "fluent", "twemoji")  # the other styles too, for style LoRAs
    latents = {style: all_latents(vae, args, style) for style in set(styles)}
    features = trained(args, "features", "net", FeatureNet())
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    stage = Stage("decoder", {"decoder": vae.decoder, "post": vae.post_quant_conv}, 1e-3, args)

    def loss_of(step, share):
        style = styles[step % len(styles)]
        picture, colour, pixels = draw_batch(16, args, style)
        z = latents[style][picture, colour]
        out = vae.decode(z + NOISE * torch.randn_like(z)).sample
        return pixel_loss(out, pixels) | {"features": 0.1 * features.distance(out, pixels).mean()}

    stage.run(loss_of)


@torch.no_grad()
def caption_table(args) -> Tensor:
    """Text states (pictures, colours + 1, name | group, L, D) of every caption, and (1, L, D) of the empty one.

    The last colour means that the caption names none.
    """
    tokenizer, net = load_tokenizer(), trained(args, "text", "net", text_net())
    captions = [caption(i, b, g) for i in range(PICTURES) for b in (*range(COLOURS), None) for g in (False, True)]
    states = torch.cat([net(t.to(args.device)).last_hidden_state for t in tokens_of(tokenizer, captions).split(512)])
    empty = net(tokens_of(tokenizer, [""]).to(args.device)).last_hidden_state
    return states.view(PICTURES, COLOURS + 1, 2, LENGTH, WIDTH), empty


def train_unet(args) -> None:
    """Train the denoiser to predict epsilon, with the weight min(1 / alpha^2, 30), which makes it a capped v loss.

    The unweighted loss hardly counts the high noise levels, where picture and background are decided.
    """
    from fastdiff.diffusion.schedule import NoiseSchedule

    unet = unet_net().to(args.device)
    schedule = NoiseSchedule.from_config(SCHEDULER).to(args.device)
    vae = trained(args, "vae", "vae", vae_net())
    latents = all_latents(vae, args)
    scale = 1 / latents.std()
    states, empty = caption_table(args)
    stage = Stage("unet", {"unet": unet}, args.lr, args, ema=0.9993)

    def loss_of(step, share):
        n = args.batch
        picture, colour = torch.randint(PICTURES, (n,)), torch.randint(COLOURS, (n,))
        z = latents[picture, colour]
        x0 = (z + NOISE * torch.randn_like(z)) * scale
        said, coarse = torch.where(torch.rand(n) < 0.7, colour, COLOURS), (torch.rand(n) < 0.4).long()
        tokens = torch.where((torch.rand(n) < 0.1)[:, None, None].to(args.device), empty, states[picture, said, coarse])
        t = torch.randint(1000, (n,), device=args.device)
        eps = torch.randn_like(x0)
        x_t = schedule.add_noise(x0, eps, t)
        d = (unet(x_t, t, tokens).sample - eps).square().mean((1, 2, 3))
        return {"v": (d * (1 / schedule.alpha[t].square()).clamp(max=30)).mean()}

    stage.run(loss_of)


def export(args) -> None:
    """Write the averaged weights as a stock diffusers pipeline in fp16, with the recogniser beside it."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    vae = trained(args, "vae", "vae", vae_net())
    latents = all_latents(vae, args)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    sharper = torch.load(args.work / "decoder.pt", map_location="cpu")["ema"]
    vae.decoder.load_state_dict(sharper["decoder"])
    vae.post_quant_conv.load_state_dict(sharper["post"])
    pipeline = StableDiffusionPipeline(
        vae.half().cpu(),
        trained(args, "text", "net", text_net()).half().cpu(),
        load_tokenizer(),
        trained(args, "unet", "unet", unet_net()).half().cpu(),
        DDIMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(args.out)
    for name, net in {"features": FeatureNet(), "judge": JudgeNet()}.items():
        export_network(trained(args, name, "net", net), args.out / name)


def export_network(net: nn.Module, folder: Path) -> None:
    """Write a feature network in fp16."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file({k: v.half().cpu().contiguous() for k, v in net.state_dict().items()}, folder / "model.safetensors")


def export_judge(args) -> None:
    """Write the judge alone, beside what is shipped already."""
    export_network(trained(args, "judge", "net", JudgeNet()), args.out / "judge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = {"features": train_features, "text": train_text, "vae": train_vae, "decoder": train_decoder, "unet": train_unet}
    stages |= {"judge": train_judge, "export": export, "export-judge": export_judge}
    parser.add_argument("stage", choices=[*stages])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--work", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--out", type=Path, default=Path("fastdiff/assets/emoji"))
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(rank() + 1000 * int(time.time() % 1000))
    stages[args.stage](args)


if __name__ == "__main__":
    main()
