"""`fastdiff plan`: what a run would take, what fits, and exit 4 where nothing does."""

from dataclasses import replace

import pytest
import torch

from fastdiff import cli
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.commands import plan
from fastdiff.cost import footprint, probe
from fastdiff.cost.estimate import Estimate
from fastdiff.cost.rehearsal import Rehearsal
from fastdiff.lora import adapters
from fastdiff.methods import lcm
from fastdiff.runtime import disk
from fastdiff.sampling.settings import Settings

SMALL = ["--resolution", 64, "--batch-size", 4, "--grad-accum", 2, "--lora-rank", 16, "--no-gradient-checkpointing", "--no-probe"]


walk, walked = footprint.of_unet, {}


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """Each network is walked once for all tests."""

    def cached(base, *given):
        key = base.ref, *given
        walked[key] = walked.get(key) or walk(base, *given)
        return walked[key]

    monkeypatch.setattr(footprint, "of_unet", cached)


def memory(monkeypatch, size):
    monkeypatch.setattr(plan, "memory_bytes", lambda device: size)


def needs(told):
    return [row["memory_bytes"] for row in told["metrics"]["settings"]]


def test_a_probe_measures_the_commands_own_steps(fastdiff, tiny_sd, tmp_path):
    given = ["--base", tiny_sd, "--lora-rank", 4, "--batch-size", 2, "--grad-accum", 1, "--steps", 7, "--prompts", "prompts.txt"]
    code, told = fastdiff("plan", "train-lcm-lora", *given)
    assert code == 0, told
    found = told["metrics"]
    first = found["settings"][0]
    assert (first["measured"], first["fits"], found["probed"]) == (True, True, True)
    assert 2**27 < first["memory_bytes"] < 2**33  # all of a process with torch in it
    assert found["training_h"] == pytest.approx(7 * first["step_s"] / 3600)
    assert found["data_h"] > 0
    assert found["data"]["calls"] == 256 * Settings.usual(FAMILIES["sd15"]).calls  # pairs
    assert found["disk"]["cache"]["bytes"] == 256 * 2 * 4 * 8 * 8 * 2  # noise and latents in fp16
    assert told["next_command"].startswith(f"fastdiff train-lcm-lora --base {tiny_sd} --prompts prompts.txt")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", cli.PLANNED)
def test_every_method_can_be_probed(command):
    """In this process: all its phases, on the embedded checkpoint."""
    method = next(c for c in cli.COMMANDS if c.name == command).load().method
    config = method.Config(**method.presets["emoji"] | {"batch_size": 2, "device": "cpu", "output": "nowhere"})
    found = probe.steps(method, config, False)
    assert found.training_s > 0
    assert found.state_bytes >= 2 * found.trained_bytes > 0
    assert sum(n for n, _ in found.phases.values()) == config.steps


@pytest.fixture
def by_formula(monkeypatch):
    """What a setting takes, as a formula of its options, so that the settings of a tiny network differ."""

    def size(config):
        graph = 2**26 * config.batch_size * (1 if config.gradient_checkpointing else 4)
        kept = 2**24 * (2 - config.offload - (config.quantize_base != "none"))
        return 2**30 + graph + kept + 2**20 * config.lora_rank

    monkeypatch.setattr(plan, "rehearse", lambda method, config, base, report: Rehearsal({"steps": size(config)}))
    monkeypatch.setattr(plan, "estimate", lambda load, shape, config, dtype: Estimate(size(config), 0, 1e9, 1e6, 1e6))


def test_without_a_probe_smaller_settings_are_proposed_until_one_fits(fastdiff, tiny_sd, monkeypatch, by_formula):
    given = ["plan", "train-lcm-lora", "--base", tiny_sd, *SMALL]
    code, told = fastdiff(*given)
    assert code == 0
    sizes = needs(told)
    options = ("batch_size", "grad_accum", "gradient_checkpointing", "lora_rank", "offload", "quantize_base")
    rows = [tuple(row[name] for name in options) for row in told["metrics"]["settings"]]
    assert rows == [(n, 8 // n, again, 16, False, "none") for again in (False, True) for n in (4, 2, 1)] + [
        (1, 8, True, 16, True, "none"),
        *((1, 8, True, rank, True, "int8") for rank in (16, 8, 4)),
    ]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[5] > sizes[6] > sizes[7] > sizes[8] > sizes[9]
    assert [row["rehearsed"] for row in told["metrics"]["settings"]] == [True] + 9 * [False]
    assert "as given" not in str(told["warnings"])
    for index in (1, 5, 6, 7, 9):
        memory(monkeypatch, (sizes[index] + 1) / plan.FREE_PART)
        code, told = fastdiff(*given)
        assert code == 0
        fits = [row["fits"] for row in told["metrics"]["settings"]]
        assert fits.index(True) == index
        assert told["metrics"]["settings"][index]["rehearsed"]
        assert any("the command does not fit as it is" in line for line in told["warnings"])
    assert told["metrics"]["proposal"]["lora_rank"] == 4
    changes = (
        "--batch-size 1 --grad-accum 8 --quantize-base int8 --offload --gradient-checkpointing --lora-rank 4 --lora-alpha 16"
    )
    assert told["next_command"].endswith(changes)


def test_exit_4_where_nothing_fits(fastdiff, tiny_sd, monkeypatch):
    memory(monkeypatch, 10_000)
    code, told = fastdiff("plan", "train-lcm-lora", "--base", tiny_sd, *SMALL)
    assert code == 4
    assert "no setting fits" in told["error"]["message"]
    assert not any(row["fits"] for row in told["metrics"]["settings"])  # the figures are there all the same
    memory(monkeypatch, 2**40)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000)
    code, told = fastdiff("plan", "train-lcm-lora", "--base", tiny_sd, *SMALL)
    assert code == 4
    assert "on the disk of" in told["error"]["message"]


def test_what_does_not_fit_when_probed_is_not_proposed(tiny_sd, monkeypatch):
    """The first setting runs out of memory; so does the first that the arithmetic would take."""
    config = lcm.Config(base=str(tiny_sd), resolution=64, batch_size=4, grad_accum=1, device="cpu", lora_rank=8, lora_alpha=8)
    tried = []

    def measured(method, config, *, pictures):
        tried.append(config.batch_size)
        return None if config.batch_size > 1 else probe.Measured(2**30, {"all": (1000, 0.5)}, 0.1, 0.0, 100, 10)

    monkeypatch.setattr(plan, "measure", measured)
    result = plan.run(lcm.LCM, config, probe=True, typed="fastdiff train-lcm-lora")
    assert tried == [4, 2, 1]
    assert result.metrics["proposal"]["batch_size"] == 1
    assert result.metrics["training_h"] == pytest.approx(1000 * 0.5 / 3600)
    assert result.next_command == "fastdiff train-lcm-lora --batch-size 1 --grad-accum 4"


def test_methods_without_arithmetic_are_only_measured():
    methods = [c.load().method for c in cli.COMMANDS if c.name in cli.PLANNED]
    assert [method.name for method in methods if "load" not in vars(method)] == ["distill-vae"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["smple"], "plan smple: not a training command"),
        (["train-lcm-lora", "--memory", "much"], "--memory much: not a size"),
        (["train-lcm-lora", "--memory", "0G"], "--memory 0G: not a size"),
        (["prune", "--steps", "0", "--no-probe"], "--steps 0: nothing trains"),
        (["train-lcm-lora", "--no-such-flag"], "--no-such-flag"),
        ([], "Missing argument"),
    ],
)
def test_mistakes_are_told(fastdiff, args, message):
    code, told = fastdiff("plan", *args)
    assert code == 2
    assert message in told["error"]["message"]


def test_help_is_the_commands_own(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["plan", "--help"]) == 0
    assert "train-lcm-lora" in capsys.readouterr().out
    assert cli.main(["plan", "dmd", "--help-all"]) == 0
    page = capsys.readouterr().out
    assert "--probe" in page
    assert "--lambda-reg" in page
    assert cli.main(["dmd", "--help-all"]) == 0
    assert "--probe" not in capsys.readouterr().out


def test_a_command_without_arithmetic_is_rehearsed_too(fastdiff, tiny_sd):
    code, told = fastdiff("plan", "distill-vae", "--base", tiny_sd, "--resolution", 64, "--width", 8, "--memory", "8G")
    assert code == 0, told["error"]
    (row,) = told["metrics"]["settings"]
    assert (row["rehearsed"], row["fits"], row["step_s"]) == (True, True, None)
    assert set(told["metrics"]["peaks"]) == {"data", "begin", "steps", "sheet", "figures"}
    assert told["metrics"]["device"] == "a CUDA card"


def test_the_rehearsed_base_has_the_precision_of_the_run(fastdiff, tiny_sd, monkeypatch):
    dtypes = []

    def seen(method, config, base, report):
        dtypes.append((config.precision, base.dtype))
        return Rehearsal({"steps": 2**20})

    monkeypatch.setattr(plan, "rehearse", seen)
    for precision in ("auto", "fp16"):
        code, _ = fastdiff("plan", "train-lcm-lora", "--base", tiny_sd, *SMALL, "--memory", "8G", "--precision", precision)
        assert code == 0
    assert dtypes == [("bf16", torch.bfloat16), ("fp16", torch.float16)]


def test_a_time_that_is_not_known_is_none_and_the_settings_fit_80_columns(fastdiff, tiny_sd, monkeypatch, by_formula, capfd):
    monkeypatch.setenv("COLUMNS", "200")
    given = ["plan", "train-lcm-lora", "--base", tiny_sd, *SMALL]
    code, told = fastdiff(*given, "--memory", "8G")
    assert code == 0
    assert (told["metrics"]["data_h"], told["metrics"]["training_h"]) == (None, None)
    assert cli.main([*map(str, given), "--memory", "1G"]) == 4
    tables = capfd.readouterr().err.partition("error:")[0]
    assert "time and disk of the command as it is" in tables
    assert "not known" in tables
    settings = tables.partition("time and disk")[0]
    assert max(len(line.rstrip()) for line in settings.splitlines() if tiny_sd.name not in line) <= 80
    code, told = fastdiff(*given, "--memory", "8G", "--device", "cpu")
    assert code == 2
    assert "--memory 8G: plans for a CUDA card" in told["error"]["message"]


def test_a_command_without_arithmetic_gets_the_time_of_its_data(fastdiff, tiny_sd):
    code, told = fastdiff("plan", "distill-vae", "--base", tiny_sd, "--resolution", 64, "--width", 8, "--no-probe")
    assert code == 0, told["error"]
    assert told["metrics"]["data_h"] > 0
    assert told["metrics"]["training_h"] is None


def test_sizes_are_read_as_card_makers_write_them():
    assert [plan.size_in_bytes(text) for text in ("16G", "16GB", "16 GiB", "16", "0.5g")] == [2**34] * 4 + [2**29]
    assert plan.size_in_bytes("12000M") == 12000 * 2**20


def test_an_alias_without_weights_is_counted_by_the_published_shapes():
    found = plan.shapes_of(lcm.Config(base="sd15"), torch.bfloat16)
    assert found.unet_config["block_out_channels"] == [320, 640, 1280, 1280]
    with pytest.raises(ValueError, match="no such file or folder"):
        plan.shapes_of(lcm.Config(base="./gone"), torch.bfloat16)


# ---- the arithmetic


def test_a_pass_on_shapes_is_a_pass_on_values(tiny_sdxl):
    """Parameters exactly; what autograd keeps and the operations, as they are counted on a real network."""
    from torch.utils.flop_counter import FlopCounterMode

    base = checkpoint.load(str(tiny_sdxl))
    told = footprint.of_unet(base, 64, torch.float32, 4, adapters.TARGETS)
    net = base.unet
    assert told.parameters == sum(p.numel() for p in net.parameters())
    trained = adapters.attach(net, 4, 4)
    assert told.trained == sum(p.numel() for p in trained)
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    cond = footprint.condition(base, 1)
    extra = {} if cond.pooled is None else {"added_cond_kwargs": {"text_embeds": cond.pooled, "time_ids": cond.time_ids}}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), FlopCounterMode(display=False) as counter:
        net(torch.randn(1, 4, 8, 8), torch.tensor([5]), cond.tokens, return_dict=False, **extra)
    assert told.saved_bytes == pytest.approx(sum(n for n, _ in kept.values()), rel=0.1)
    assert told.flops == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert told.checkpointed_bytes < 0.7 * told.saved_bytes
    full = footprint.of_unet(base, 64, torch.float32, None, adapters.TARGETS)
    assert full.trained == full.parameters == told.parameters
    assert footprint.encoding_flops(base, 64) > 0


def test_the_ladder_keeps_the_batch():
    config = lcm.Config(batch_size=6, grad_accum=2, lora_rank=16, lora_alpha=32, gradient_checkpointing=True)
    found = plan.settings(config, True)
    assert found[0] == config
    assert all(c.batch_size * c.grad_accum == 12 for c in found)
    assert [c.batch_size for c in found[:4]] == [6, 4, 3, 2]
    assert (found[-1].lora_rank, found[-1].lora_alpha) == (4, 8)
    assert [(c.batch_size, c.offload, c.optimizer) for c in plan.settings(replace(config, full=True), False)] == [
        *((n, False, "adamw") for n in (6, 4, 3, 2, 1)), (1, True, "adamw"), (1, True, "adafactor"),
    ]  # fmt: skip


def test_a_start_that_does_not_fit_is_refused_by_plan_too(fastdiff, tiny_sd, tmp_path):
    code, told = fastdiff("plan", "dmd", "--base", tiny_sd, *SMALL, "--init", "gone.safetensors")
    assert code == 2
    assert "gone.safetensors" in told["error"]["message"]
