"""The simulated card: its bytes and its backward pass are torch's, and every command runs on it without an error of devices."""

import gc
import json
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from fastdiff import cli
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.cost import rehearsal
from fastdiff.cost.backward import Engine
from fastdiff.cost.footprint import condition
from fastdiff.cost.simulation import Card
from fastdiff.lora import adapters
from fastdiff.runtime.config import resolve

KIB = 2**10
GOLDEN = Path(__file__).parent / "golden" / "peaks.json"
README = Path(__file__).parents[1] / "README.md"


# ---- the card itself


def test_a_block_counts_while_a_tensor_or_a_view_of_it_lives():
    with Card() as card:
        x = torch.zeros(256, 4, device="cuda")
        assert (x.is_cuda, str(x.device), card.live_bytes) == (True, "cuda:0", 4 * KIB)
        view = x[:, 1:].flatten()  # a copy: its strides do not allow a view
        assert card.live_bytes == 4 * KIB + 3 * KIB
        row = x[0]  # a view
        del x
        assert card.live_bytes == 7 * KIB
        del row
        assert card.live_bytes == 3 * KIB
        view += 1
        assert card.live_bytes == 3 * KIB
        del view
        assert (card.live_bytes, card.peak_bytes) == (0, 7 * KIB)
        torch.zeros(1, device="cuda")
    assert not torch.cuda.is_available()


def test_mixed_devices_are_an_error_and_reads_are_counted():
    with Card() as card:
        x = torch.zeros(4, 4, device="cuda")
        with pytest.raises(RuntimeError, match=r"same device.*cpu tensor of \(4, 4\)"):
            x + torch.zeros(4, 4)
        assert (x * torch.tensor(2.0)).is_cuda  # a scalar may come from the CPU
        assert x[torch.tensor([0, 2])].shape == (2, 4)  # and so may indices
        assert not card.syncs
        assert isinstance(x.sum().item(), float)
        assert x.cpu().device.type == "cpu"
        assert bool(x.any())
        assert sum(card.syncs.values()) == 3


def test_autocast_is_torchs_own():
    with Card():
        layer = nn.Linear(8, 8).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(torch.zeros(2, 8, device="cuda"))
            assert (y.dtype, nn.functional.layer_norm(y, (8,)).dtype, y.softmax(-1).dtype) == (
                torch.bfloat16, torch.float32, torch.float32,
            )  # fmt: skip


def test_attention_takes_the_kernel_of_a_card():
    with Card() as card:
        for dtype, width in ((torch.bfloat16, 64), (torch.float32, 64), (torch.bfloat16, 512)):
            q = torch.zeros(1, 2, 256, width, device="cuda", dtype=dtype)
            assert nn.functional.scaled_dot_product_attention(q, q, q).shape == q.shape
    assert card.kernels == {"flash": 1, "efficient": 2}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_backward_pass_is_bit_equal_to_torchs(tiny_sd, checkpointing):
    """On real tensors: an adapter's gradients, two graphs that share a leaf, and a leaf that the loss does not reach."""
    base = checkpoint.load(str(tiny_sd))
    net, cond = base.unet, condition(base, 2)
    if checkpointing:
        adapters.checkpoint_gradients(net)
    params = adapters.attach(net, 4, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in params:
            p.normal_(std=0.05)
    x, unused = torch.randn(2, 4, 8, 8), nn.Parameter(torch.ones(1))

    def gradients():
        for p in params:
            p.grad = None
        for t in (3, 500):
            out = net(x, torch.tensor([t, t]), cond.tokens, return_dict=False)[0]
            (out.square().mean() + out.std()).backward(inputs=[*params, unused])
        return [p.grad for p in params]

    expected = gradients()
    with Engine().watching():
        found = gradients()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert unused.grad is None


def test_a_function_of_ones_own_and_missing_gradients():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 2 * x, 3 * x

        @staticmethod
        def backward(ctx, a, b):
            (x,) = ctx.saved_tensors
            return 2 * a + 3 * b + 0 * x

    x = nn.Parameter(torch.arange(3.0))
    with Engine().watching():
        first, _ = Twice.apply(x)
        (first * x).sum().backward()
        (grad,) = torch.autograd.grad((x**3).sum(), [x])
    assert torch.equal(x.grad, 4 * torch.arange(3.0))
    assert torch.equal(grad, 3 * torch.arange(3.0) ** 2)


def test_what_a_node_saved_is_freed_during_the_backward_pass():
    """A chain of layers holds one output more with each; in the backward pass it never holds more."""
    layers = [nn.Linear(256, 256, bias=False) for _ in range(8)]
    with Card() as card:
        net = nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh()))).to("cuda")
        weights = card.live_bytes
        loss = net(torch.zeros(256, 256, device="cuda", requires_grad=True)).sum()
        graph = card.live_bytes - weights
        x_bytes = 256 * 256 * 4
        assert graph == pytest.approx(9 * x_bytes, abs=2 * KIB)  # tanh keeps its output, which is the next layer's input
        card.reset_peak()
        loss.backward()
        gradients = 8 * x_bytes
        assert card.peak_bytes - weights < graph + 4 * x_bytes  # gradients come as outputs go
        del loss
        gc.collect()
        assert card.live_bytes - weights == gradients


# ---- every command on the card, from its first word to its files


def words(command, base, controlnet, pruned, table=tiny.COMMANDS):
    given = tiny.arguments(command, base, controlnet, pruned, table)
    given[given.index("--device") + 1] = "cuda"
    return given


QUICK = {"train-lcm-lora"}
CASES = [
    *(pytest.param(name, "fp16", tiny.COMMANDS, marks=[] if name in QUICK else pytest.mark.slow) for name in tiny.COMMANDS),
    *(pytest.param(name, "bf16", tiny.WHOLE, marks=pytest.mark.slow) for name in ("train-lcm-lora", "dmd", "lightning", "sdxs")),
    *(pytest.param(name, "bf16", tiny.COMMANDS, marks=pytest.mark.slow) for name in tiny.COMMANDS),
]


@pytest.mark.parametrize(("command", "precision", "table"), CASES)
def test_every_command_runs_on_a_card(fastdiff, tiny_sd, tiny_controlnet, tiny_pruned, command, precision, table):
    """In fp16 with gradient checkpointing; LCM with a contact sheet and a measurement on the way, and a resumed run."""
    base = tiny_pruned if command == "sdxs" else tiny_sd
    given = [*words(command, base, tiny_controlnet, tiny_pruned, table), "--precision", precision, "-o", "run"]
    if precision == "fp16":
        given += ["--gradient-checkpointing"] * (command != "distill-vae")
    if table is tiny.WHOLE:
        given += ["--offload"]
    watched = command == "train-lcm-lora" and table is tiny.COMMANDS
    if watched:
        given += ["--eval-every", 2, "--preview-every", 2]
    steps = {"lightning": 8, "sdxs": 8}.get(command, 4)
    with Card() as card:
        code, result = fastdiff(*given, "--steps", steps, "--save-every", 2)
        assert code == 0, result.get("error")
        if watched:
            code, result = fastdiff(*given, "--steps", steps + 1)  # goes on from the last state
            assert code == 0, result.get("error")
    assert card.peak_bytes > 2**16
    assert Path(result["outputs"][0]["path"]).exists()


@pytest.mark.slow
def test_drawing_and_judging_run_on_a_card(fastdiff, tiny_sd, tiny_sdxl):
    with Card():
        more = ["--precision", "fp16", "--resolution", 64, "--num-images", 2, "--num-steps", 2, "--compile", "off"]
        code, result = fastdiff("sample", "--base", tiny_sdxl, "--prompt", "a cat", "-o", "pictures", *more)
        assert code == 0, result.get("error")
        code, result = fastdiff(
            "evaluate", "--student", tiny_sd, "--base", tiny_sd, "--num-images", 4, "--teacher-steps", 2, "--resolution", 64,
            "--prompts", "prompts.txt", "-o", "report",
        )  # fmt: skip
        assert code == 0, result.get("error")


# ---- what a run takes


def config_of(command, family, **changes):
    """The method and the config of a command for a family, as its preset is."""
    method = next(c for c in cli.COMMANDS if c.name == command).load().method
    values = {"base": family, "precision": "bf16", **changes}
    config = resolve(method.Config, values, presets=method.presets, family_of=lambda _: family, environ={})
    return method, config


def rehearsed(command, family, **changes):
    method, config = config_of(command, family, **changes)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]
    base = checkpoint.load(str(FAMILIES[family].home), dtype=dtype)
    return rehearsal.rehearse(method, config, base)


# Presets of every command, with what a command needs besides: each is rehearsed at every size.
RUNS = {
    "train-lcm-lora": {},
    "train-lcm-lora --full": {"full": True},
    "dmd": {},
    "dmd --recipe dmd2": {"recipe": "dmd2"},
    "sid": {},
    "tdm": {},
    "lightning": {"lora_only": True},
    "sdxs": {},
    "prune": {},
    "distill-vae": {},
    "distill-controlnet": {"controlnet": "owner/canny"},  # not on this machine: one of the usual shape is rehearsed
}
SAME = [("sdxl", "dmd --recipe dmd2")]  # what the preset says without it
CHECKED = [(family, run) for family in FAMILIES for run in RUNS if (family, run) not in SAME]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "run"), CHECKED, ids=lambda value: value)
def test_peaks_are_the_golden_ones(request, family, run):
    """Every part of a run, within 3 %. With --write-golden the figures are written anew."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    rehearsal = rehearsed(run.split()[0], family, **RUNS[run])
    if family == "emoji" and run == "train-lcm-lora":
        waits_once_an_update(rehearsal, cycle=1, turns=1)
    peaks = rehearsal.peaks
    if request.config.getoption("--write-golden"):
        golden.setdefault(family, {})[run] = peaks
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    assert peaks == pytest.approx(golden[family][run], rel=0.03)


WHOLE = [
    "train-lcm-lora",
    "train-lcm-lora --full",
    "dmd",
    "dmd --recipe dmd2",
    "sid",
    "tdm",
    "lightning --stages 4:2,2:1 --phases mse,cond,full --d-warmup 0",
    "prune --layout bk-tiny",
    "distill-vae",
    "distill-controlnet",
    "sdxs --match-steps 2 --gan-steps 2",
]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("run", WHOLE)
def test_a_rehearsal_takes_what_the_whole_command_takes(fastdiff, run, precision):
    """On emoji: the command with its weights, files, sheets, measurements and closing table, against plan's rehearsal."""
    words = [*run.split(), "--precision", precision]
    code, planned = fastdiff("plan", *words, "--memory", "16G")
    assert code == 0, planned.get("error")
    steps = 14 if "phases" in run else 6
    with Card() as card:
        code, result = fastdiff(*words, "--device", "cuda", "--steps", steps, "--pairs", 200, "-o", "run")
    assert code == 0, result.get("error")
    rehearsed_bytes = max(planned["metrics"]["peaks"].values())
    print(f"{run} {precision}: {rehearsed_bytes / 2**20:.0f} MiB rehearsed, {card.peak_bytes / 2**20:.0f} in the whole command")
    assert rehearsed_bytes == pytest.approx(card.peak_bytes, rel=0.1)


def peaks_table():
    """The table of README: GiB at the peak of every command's preset at full size."""
    golden = json.loads(GOLDEN.read_text())
    gib = lambda family, run: f"{max(golden[family][run].values()) / 2**30:.1f}"
    # SDXL's preset of dmd is DMD2.
    row = lambda run: [gib(family, "dmd" if (family, run) in SAME else run) for family in ("sd15", "sd21", "sdxl")]
    return "".join(f"| `{run}` | {' | '.join(row(run))} |\n" for run in RUNS)


def test_the_readme_shows_the_golden_peaks(request):
    """With --write-golden the table is written anew."""
    head = "| preset of | SD1.5, 512 px | SD2.1, 768 px | SDXL, 1024 px |\n| --- | --- | --- | --- |\n"
    before, after = README.read_text().split(head)
    shown, rest = after.split("\n\n", 1)
    if request.config.getoption("--write-golden"):
        README.write_text(f"{before}{head}{peaks_table()}\n{rest}")
        shown = peaks_table().rstrip()
    assert shown + "\n" == peaks_table()


def test_presets_fit_the_cards_that_they_are_made_for():
    golden = json.loads(GOLDEN.read_text())
    most = lambda family, run: max(golden[family][run].values())
    assert most("sdxl", "train-lcm-lora") < 10 * 2**30  # for cards of 12 and 16 GiB
    assert most("sdxl", "lightning") < 10 * 2**30
    assert most("sdxl", "tdm") < 10 * 2**30
    assert most("sdxl", "dmd") < 14 * 2**30
    assert most("sd15", "dmd") < 7 * 2**30


def test_the_rehearsed_lpips_warns_of_nothing(recwarn):
    rehearsal.distance(None)(FAMILIES["sd15"], None)
    assert not recwarn.list


def waits_once_an_update(rehearsal, cycle, turns):
    """All waits of the host for the card in a step: one for the figures of each turn, and none within."""
    assert rehearsal.syncs
    for phase, waits in rehearsal.syncs.items():
        assert sum(waits.values()) == turns * cycle, (phase, waits)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["dmd --recipe dmd2", "distill-vae"])
def test_a_step_reads_the_card_once_an_update(run):
    two = dict(lambda_gan=0.1) if run == "distill-vae" else {}  # the discriminator's turn, and the decoder's
    method, config = config_of(run.split()[0], "emoji", **RUNS[run], **two, eval_every=0, keep="last", patience=0)
    base = checkpoint.load(str(FAMILIES["emoji"].home), dtype=torch.bfloat16)
    waits_once_an_update(rehearsal.rehearse(method, config, base), method.cycle(config), turns=2 if run == "distill-vae" else 1)
