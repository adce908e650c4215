"""Half precision: gradients under autocast against those in fp32, for every method, phase and player; and autocast's cache."""

import json
import shutil
from typing import Any

import pytest
import torch
from torch import nn

from fastdiff import cli
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.cost.probe import latents
from fastdiff.lora import adapters, apply
from fastdiff.lora.file import Lora
from fastdiff.lora.kinds import Factors
from fastdiff.models.ema import EMA
from fastdiff.training.run import Run
from fastdiff.training.session import open_accelerator
from fastdiff.training.trainer import Trainer

METHODS = {c.name: c.load().method for c in cli.COMMANDS if c.load().method}
# Conditions under which rounding alone changes a gradient little, so that what remains is a fault. At 64 px the networks' middle
# is one latent position, whose group norm divides by the spread of four values; a teacher step of LCM over 2 of 100 points
# leaves a difference of nearly equal predictions, of which the Huber loss takes the sign.
COMMON = dict(steps=40, batch_size=2, device="cpu", resolution=128, seed=3)
APART = dict(skip=20, batch_size=4)
DMD2 = dict(recipe="dmd2", lambda_reg=0, gan_weight=1e-3, num_steps=2, fake_steps_per_gen=1)
STAGES = dict(d_warmup=0, adversarial_lr=1e-4, full_lr=1e-4, stages="2:1", phases="mse,cond,full", late_detail_at=0)
HEADS = dict(STAGES, stages="4:2", phases="uncond", discriminator="full", d_features="every", gan="paired", r1=1.0)
# {method: {name of a case: options}}. A method that has no row is tested with its defaults.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "train-lcm-lora": {
        "zero": dict(APART, target="zero"),
        "edge": dict(APART, target="edge", num_steps=2),
        "random": dict(APART, target="random"),
        "finetune": dict(APART, finetune=True),
        "full": dict(APART, full=True),
    },
    "dmd": {"dmd": dict(lpips_weights="embedded"), "dmd2": DMD2, "full": dict(DMD2, student="full", fake="full")},
    "lightning": {"lora": STAGES, "heads": HEADS},
    "sdxs": {
        "lora": dict(match_steps=0, gan_steps=0, student="lora", fm_encoder="embedded"),
        "full": dict(match_steps=10, gan_steps=10, fake="full"),
    },
    "prune": {"bk-tiny": dict(layout="bk-tiny", lambda_task=1.0)},
    "distill-vae": {"encoder": dict(encoder=True, gan_from=0, width=8, d_width=8, lpips_weights="embedded", lambda_pixel=1.0)},
    "distill-controlnet": {"steps": dict(), "one-step": dict(one_step=True, match_steps=0)},
}
TABLE = [(name, case) for name in METHODS for case in CASES.get(name, {"defaults": {}})]
# Between `zero` and these only what is computed in fp32 differs: to which timestep the networks' answers are moved.
# DMD's losses are those of `dmd2`, its whole networks train as in SDXS's `full`.
ALIKE = [("train-lcm-lora", "edge"), ("train-lcm-lora", "random"), ("dmd", "full")]


def options_of(name: str, case: str, folders: dict[str, str]) -> dict[str, Any]:
    options = dict(COMMON, **CASES.get(name, {}).get(case, {}))
    if name == "distill-controlnet":
        options |= dict(controlnet=folders["controlnet"], init=folders["one-step" if options.get("one_step") else "pruned"])
    return options


def trainer_of(name: str, case: str, folders: dict[str, str], precision: str, folder: Any, **changes: Any) -> Trainer:
    cls = METHODS[name]
    names = cls.Config.__dataclass_fields__
    small = {k: v for k, v in dict(lora_rank=4, lora_alpha=4.0, guidance=3.0).items() if k in names}
    config = cls.Config(
        **{**small, **options_of(name, case, folders), **changes, "base": folders["base"], "precision": precision}
    )
    config = cls.check(config)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    base, run = checkpoint.load(folders["base"], dtype=dtype), Run(folder, name)
    torch.manual_seed(1)
    method = cls(base, config)
    torch.manual_seed(2)
    data = latents(base, config, control=method.controlnet is not None)
    return Trainer(method, data, run, config, open_accelerator(config, run))


@pytest.fixture(scope="module")
def folders(tiny_sd, tiny_pruned, tiny_controlnet, tmp_path_factory):
    quick = tmp_path_factory.mktemp("one-step") / "model"
    shutil.copytree(tiny_pruned, quick)
    (quick / "fastdiff.json").write_text(json.dumps(Recipe(scheduler="lcm", num_steps=1).to_metadata()))
    return dict(base=str(tiny_sd), pruned=str(tiny_pruned), controlnet=str(tiny_controlnet)) | {"one-step": str(quick)}


def move(trainer: Trainer, already: set[int]) -> None:
    """Put every player some way from where it starts, once: a fresh LoRA is zero, and a copy equals its teacher."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for player in trainer.players.values():
            for p in player.params:
                if id(p) not in already:
                    p.add_(0.5 * p.abs().mean().clamp(min=0.05) * torch.randn(p.shape, generator=g))
            already |= set(map(id, player.params))


def flat(params: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat(
        [torch.zeros(p.numel(), dtype=torch.float64) if p.grad is None else p.grad.double().flatten() for p in params]
    )


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradients {turn and player: flat} of one step as the trainer takes it, without updates."""
    found: dict[str, torch.Tensor] = {}
    torch.manual_seed(11)
    (batch,), _ = trainer.draw(1)
    turns = trainer.method.losses(batch, trainer.now)
    for number in range(9):
        with trainer.accelerator.autocast():
            turn = next(turns, {})
        if not turn:
            break
        for who, terms in turn.items():
            player = trainer.players[who]
            player.backward(sum(terms.values()), trainer.players.values())
            found[f"{number} {who}"] = flat(player.params)
            player.optimizer.zero_grad()
    return found


def compared(name: str, case: str, folders: dict[str, str], half: str, tmp_path: Any) -> list[tuple[str, float, float]]:
    """For every phase, turn and player: (which, cosine of the gradients in half precision and fp32, ratio of their norms)."""
    exact, rounded = (trainer_of(name, case, folders, precision, tmp_path) for precision in ("fp32", half))
    rows, already = [], set()
    for index, phase in enumerate(exact.phases):
        for trainer in (exact, rounded):
            if index:
                trainer.enter(index)
            trainer.step = trainer.start
        move(exact, already)
        for who, player in rounded.players.items():  # full copies start at rounded weights
            with torch.no_grad():
                for p, value in zip(player.params, exact.players[who].params, strict=True):
                    p.copy_(value)
        for part, other in zip(rounded.method.state().values(), exact.method.state().values(), strict=True):
            part.load_state_dict(other.state_dict())
        a, b = gradients(exact), gradients(rounded)
        assert a.keys() == b.keys() != set()
        for key in a:
            cosine = torch.cosine_similarity(a[key], b[key], 0).item()
            rows.append((f"{phase.name} {key}".strip(), cosine, (b[key].norm() / a[key].norm()).item()))
    return rows


def plain(folders: dict[str, str], half: torch.dtype) -> tuple[float, float]:
    """Cosine and norm ratio of the gradients of a plain denoising loss: what the format itself takes."""
    flats = []
    for dtype in (torch.float32, half):
        net = checkpoint.load(folders["base"], dtype=dtype).unet
        params = list(net.requires_grad_(True).parameters())
        torch.manual_seed(5)
        x, eps, t, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([200, 700]), torch.randn(2, 12, 32)
        with torch.autocast("cpu", dtype=half, enabled=dtype != torch.float32):
            out = net(x.to(dtype), t, tokens.to(dtype)).sample
        (out.float() - eps).square().mean().backward()
        flats.append(flat(params))
    return torch.cosine_similarity(*flats, 0).item(), (flats[1].norm() / flats[0].norm()).item()


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(*row, marks=[pytest.mark.slow] if row in ALIKE else []) for row in TABLE]
)
def test_gradients_in_bf16_are_those_of_fp32(name, case, folders, tmp_path):
    rows = compared(name, case, folders, "bf16", tmp_path)
    for which, cosine, ratio in rows:
        print(f"| {name} | {case} | {which} | {cosine:.4f} | {ratio:.3f} |")
    wrong = [row for row in rows if row[1] < 0.98 or not 0.9 < row[2] < 1.1]
    assert not wrong


@pytest.mark.parametrize("precision", ["run", "fp32"])
def test_a_fake_score_in_full_precision_predicts_under_autocast_what_it_predicts_without(precision, folders, tmp_path):
    trainer = trainer_of("dmd", "full", folders, "bf16", tmp_path, fake_precision=precision)
    (batch,), _ = trainer.draw(1)
    fake, t = trainer.method.fake, torch.tensor([100, 600])
    with torch.no_grad():
        plain, features = fake(batch.latents, t, batch.cond), fake.bottleneck(batch.latents, t, batch.cond)
        with trainer.accelerator.autocast():
            run, seen = fake(batch.latents, t, batch.cond), fake.bottleneck(batch.latents, t, batch.cond)
    assert torch.equal(plain.x0, run.x0) == torch.equal(features, seen) == (precision == "fp32")


def test_the_format_itself_takes_this_much_of_a_plain_gradient(folders):
    """Beside the figures above: the same network's denoising loss, without anything of fastdiff."""
    cosine, ratio = plain(folders, torch.bfloat16)
    print(f"| plain | | | {cosine:.4f} | {ratio:.3f} |")
    assert cosine > 0.99


# ---- the consistency loss at its default `skip=1`, where rounding takes more than the bound above allows


def lcm_by_hand(folders: dict[str, str], dtype: torch.dtype, params: list[nn.Parameter], batch: Any) -> torch.Tensor:
    """The gradient of LCM's algorithm 1 in plain torch: no peft, adapters that are hooks, one autocast context per call.

    It draws from torch's generator in the order of `LCM.losses`. `params` are down and up of one layer after the other.
    """
    net = checkpoint.load(folders["base"], dtype=dtype).unet.requires_grad_(False).train()
    layers = [m for n, m in net.named_modules() if n.endswith(tuple(f".{target}" for target in adapters.TARGETS))]
    params = [p.detach().clone().requires_grad_() for p in params]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    alpha, sigma = (x.sqrt().reshape(-1, 1, 1, 1) for x in (alphas_cumprod, 1 - alphas_cumprod))
    per_row = lambda v: v.reshape(-1, 1, 1, 1)

    def adapted(down, up):
        def hook(layer, args, out):
            x = args[0].float()
            if isinstance(layer, nn.Conv2d):
                f = nn.functional.conv2d
                return out + f(f(x, down, None, layer.stride, layer.padding), up)
            return out + nn.functional.linear(nn.functional.linear(x, down), up)

        return hook

    def predict(x, t, tokens, lora):
        pairs = zip(layers, params[::2], params[1::2], strict=True)
        handles = [layer.register_forward_hook(adapted(down, up)) for layer, down, up in pairs] if lora else []
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32, cache_enabled=False):
            eps = net(x.to(dtype), t, tokens.to(dtype)).sample.float()
        for handle in handles:
            handle.remove()
        return (x - sigma[t] * eps) / alpha[t], eps

    def consistency(x, t):
        tau = per_row(10.0 * t.float())
        c_skip, c_out = 0.25 / (tau**2 + 0.25), tau / (tau**2 + 0.25).sqrt()
        return c_skip * x + c_out * predict(x, t, batch.cond.tokens, lora=True)[0]

    n = len(batch.latents)
    place = torch.randint(50, (n,))
    t = 20 * place + 19
    u = torch.where(place > 0, t - 20, 0)
    w = per_row(torch.empty(n).uniform_(6.0, 16.0))
    x_t = alpha[t] * batch.latents + sigma[t] * torch.randn_like(batch.latents)
    with torch.no_grad():
        tokens = torch.cat([batch.cond.tokens, batch.uncond.tokens])
        with_text, without = zip(
            *(part.chunk(2) for part in predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), tokens, False)), strict=True
        )
        x0, eps = (b + w * (a - b) for a, b in zip(with_text, without, strict=True))
        target = consistency(alpha[u] * x0 + sigma[u] * eps, u)
    distance = consistency(x_t, t) - target
    ((distance**2 + 0.001**2).sqrt() - 0.001).mean().backward()
    return flat(params)


def test_what_bf16_takes_of_lcms_gradient_is_not_taken_by_fastdiff(folders, tmp_path, monkeypatch):
    """Beside the paper's loss in plain torch, at the same point with the same numbers: the same gradient in fp32, and no less

    of it left in bf16, where both keep about .97 of it: neighbours on the trajectory differ by little more than their rounding.
    """
    monkeypatch.setitem(CASES["train-lcm-lora"], "default", {})
    exact, rounded = (trainer_of("train-lcm-lora", "default", folders, p, tmp_path) for p in ("fp32", "bf16"))
    move(exact, set())
    params = exact.players["student"].params
    with torch.no_grad():
        for p, value in zip(rounded.players["student"].params, params, strict=True):
            p.copy_(value)
    ours, by_hand = [], []
    for trainer, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):
        ours.append(gradients(trainer)["0 student"])
        (batch,), _ = trainer.draw(1)  # which also seeds, as it did for those
        by_hand.append(lcm_by_hand(folders, dtype, params, batch))
    cosine = lambda pair: torch.cosine_similarity(*pair, 0).item()
    print(f"| skip=1 | {cosine(ours):.4f} | by hand {cosine(by_hand):.4f} |")
    assert cosine((ours[0], by_hand[0])) > 0.99999
    assert cosine(ours) > cosine(by_hand) - 0.005


# ---- autocast keeps the casts of parameters until its context ends


def net_of_one_layer() -> nn.Module:
    net = nn.Linear(4, 4, bias=False)
    nn.init.ones_(net.weight)
    return net


def test_weights_swapped_inside_one_autocast_context_are_the_ones_that_are_used():
    """train-lcm-lora --full swaps its average in and out between two passes of one context."""
    net, x = net_of_one_layer(), torch.ones(1, 4)
    average = EMA(net.parameters(), 0.9)
    with torch.no_grad():
        net.weight.fill_(2.0)
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x)[0, 0].item()
        with torch.no_grad(), average.swapped():
            inside = net(x)[0, 0].item()
        after = net(x)[0, 0].item()
    assert (before, inside, after) == (8.0, 4.0, 8.0)


def test_adapters_and_folded_weights_written_inside_an_autocast_context_are_used(tiny_sd):
    net = checkpoint.load(str(tiny_sd)).unet
    for name in ("student", "teacher"):
        adapters.attach(net, 2, 2.0, name)
    key, layer = "lora_unet_down_blocks_0_attentions_0_proj_in", net.down_blocks[0].attentions[0].proj_in
    student, teacher = (layer.lora_A[name].weight for name in ("student", "teacher"))
    start = Lora({key: Factors(torch.full((2, 16, 1, 1), 0.5), torch.full((16, 2, 1, 1), 0.5))}, {})
    plain = nn.Module()
    plain.proj = nn.Conv2d(16, 16, 1)
    folded = Lora({"lora_unet_proj": Factors(torch.ones(2, 16, 1, 1), torch.ones(16, 2, 1, 1))}, {})
    writers = {
        "copy": (lambda: adapters.copy_adapter(net, "student", "teacher"), layer.lora_A["teacher"]),
        "reset": (lambda: adapters.reset(net, "student"), layer.lora_A["student"]),
        "start": (lambda: adapters.start_from(net, start, "student"), layer.lora_A["student"]),
        "fold": (lambda: apply.fold(plain, [(folded, 1.0)]), plain.proj),
    }
    assert student.requires_grad
    assert teacher.requires_grad
    x = torch.randn(1, 16, 4, 4)
    for name, (write, part) in writers.items():
        with torch.autocast("cpu", torch.bfloat16):
            old = part(x)
            write()
            new = part(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(new, part(x)), name
        assert not torch.equal(new, old), name
