"""What only a CUDA card can show: half precision, CUDA graphs, the compiler, memory, and that nothing mixes devices.

FASTDIFF_TEST_GPU=1 python -m pytest -m gpu tests/test_gpu.py      # on a card
FASTDIFF_TEST_GPU=cpu python -m pytest -m gpu tests/test_gpu.py    # the same bodies on the CPU: a rehearsal
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from fastdiff import cli
from fastdiff.checkpoints import checkpoint
from fastdiff.cost import measure, probe
from fastdiff.models import text
from fastdiff.runtime.errors import Result
from fastdiff.sampling import engine
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings
from fastdiff.training import session
from fastdiff.training.player import Player
from fastdiff.training.run import Run
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.gpu

GIB = 2**30
ROW = Path(__file__).parent.parent / "examples" / "gpu" / "row.py"
# A loss that must fall when the same step is taken again and again: a distance, or the discriminator's, which trains first.
FALLS = {
    "train-lcm-lora": "student/consistency",
    "dmd": "fake/denoising",
    "sid": "fake/denoising",
    "tdm": "fake/denoising",
    "lightning": "discriminator/gan",
    "sdxs": "student/features",
    "prune": "student/feat",
    "distill-vae": "decoder/l1",
    "distill-controlnet": "student/feat",
}
# At 64 px the networks' middle is one latent position, whose group norm divides by the spread of a few values.
CLEAR = ["--resolution", "128"]
COSINE = {"bf16": 0.98, "fp16": 0.99}  # of the gradients of half precision to those of fp32, on tiny networks


@pytest.fixture(scope="module")
def card():
    """The device of these tests: CUDA, or in a rehearsal the CPU. Deterministic, so that equal runs can be equal to the bit."""
    if os.environ.get("FASTDIFF_TEST_GPU") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, or FASTDIFF_TEST_GPU=1 is not set")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    return torch.device("cuda")


@pytest.fixture
def trainer(tmp_path, monkeypatch, card, tiny_sd, tiny_controlnet, tiny_pruned):
    """Make a trainer of a command on random latents: trainer(command, precision, **changes of the config)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    made = []

    def make(command, precision, *words, folder=None):
        chosen = []
        with monkeypatch.context() as patch:  # the command line is read as always, but nothing is trained
            nothing = session.Trained(Result(), Run(tmp_path), tmp_path, {})
            patch.setattr(session, "train", lambda *of: chosen.append(of) or nothing)
            line = [*tiny.arguments(command, tiny_sd, tiny_controlnet, tiny_pruned), "--steps", "12", *words]
            assert cli.main([*line, "--device", card.type, "--precision", precision, "--quiet"]) == 0
        ((method_class, config),) = chosen
        run = Run(tmp_path / f"run{len(made)}" if folder is None else folder)
        accelerator = session.open_accelerator(config, run)
        base = session.load_base(config, accelerator)
        torch.manual_seed(config.seed)
        for part in method_class.keeps:
            getattr(base, part).to(card)
        method = method_class(base, config)
        data = probe.latents(base, config, control=method.controlnet is not None)
        made.append(Trainer(method, data, run, config, accelerator))
        return made[-1]

    return make


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("command", tiny.COMMANDS)
def test_steps_in_half_precision_are_finite_and_learn(command, precision, trainer, card):
    one = trainer(command, precision)
    rows = [one.train_step() for _ in range(8)]  # the same step each time: the same pictures, noise and timesteps
    assert all(math.isfinite(value) for row in rows for name, value in row.items() if not name.endswith("grad_norm"))
    assert rows[-1][FALLS[command]] < rows[0][FALLS[command]], [row[FALLS[command]] for row in rows]
    for player in one.players.values():
        assert player.bad_steps == 0
        assert all(torch.isfinite(p).all() and p.device.type == card.type for p in player.params)


@pytest.mark.parametrize("precision", COSINE)
@pytest.mark.parametrize("command", [*tiny.COMMANDS, "train-lcm-lora --full"])
def test_gradients_in_half_precision_point_where_those_of_fp32_do(command, precision, trainer, monkeypatch):
    seen = {}

    def note(player):
        """Instead of an update: both precisions stay at the same weights."""
        who = next(name for name, other in one.players.items() if other is player)
        seen.setdefault(who, torch.cat([p.grad.flatten().double().cpu() for p in player.params]))

    monkeypatch.setattr(Player, "step", note)
    found = {}
    name, *words = command.split()
    # A teacher step of LCM over 2 of 100 points leaves a difference of nearly equal predictions.
    words += ["--skip", "20"] if name == "train-lcm-lora" else []
    for kind in ("fp32", precision):
        one, seen = trainer(name, kind, *words, *CLEAR), {}
        for _ in range(20):  # fp16 looks for its loss scale first
            one.train_step()
            if seen.keys() == one.players.keys():
                break
        found[kind] = seen
    assert found[precision].keys() == found["fp32"].keys()
    for who, exact in found["fp32"].items():
        cosine = torch.cosine_similarity(exact, found[precision][who], dim=0).item()
        norms = (found[precision][who].norm() / exact.norm()).item()
        print(f"{command} {who} {precision}: cosine {cosine:.4f}, norm {norms:.3f}")
        assert cosine >= COSINE[precision], who


def test_a_resumed_run_equals_one_that_was_not_interrupted(trainer):
    def steps(one, until):
        while one.step < until:
            one.train_step()
            one.step += 1
        return [p.detach().cpu() for player in one.players.values() for p in player.params]

    whole = steps(trainer("dmd", "fp32"), 6)
    first = trainer("dmd", "fp32")
    steps(first, 3)
    first.save()
    second = trainer("dmd", "fp32", folder=first.run.folder)
    second.restore(second.run.load_state())
    assert second.step == 3
    assert all(torch.equal(a, b) for a, b in zip(whole, steps(second, 6), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [Settings("lcm", 2, 1.0), Settings("dpm++", 3, 4.0)])
def test_the_graphs_picture_is_the_eager_one(settings, dtype, card, tiny_sd):
    base = checkpoint.load(str(tiny_sd), dtype=dtype)
    prompts, pictures = text.Prompts(base, device=card), []
    jobs = [(prompts([line]), prompts.unconditional(), [seed]) for line, seed in (("a cat", 1), ("a cat", 2), ("a dog", 2))]
    backend = engine.Cuda() if card.type == "cuda" else engine.Plain()
    for captured in (None, backend):
        sampler = Sampler(base, device=card, compile="off")
        sampler.engine = engine.Engine(sampler.denoiser, sampler.engine.decode, card, compile="off", backend=captured)
        pictures.append(list(sampler.stream_batches(jobs, settings, 64)))
        assert len(sampler.engine.captured) == bool(captured)
    eager, graph = pictures
    assert not torch.equal(eager[0], eager[1])
    for a, b in zip(eager, graph, strict=True):
        assert (a.int() - b.int()).abs().max() <= 1


AUTO = """
import sys
from fastdiff import Sampler
sampler = Sampler(sys.argv[1], device=sys.argv[2], compile="auto")
pictures = list(sampler.stream("a cat", seeds=range(int(sys.argv[3])), num_steps=2, batch_size=1, resolution_px=64))
assert len(pictures) == int(sys.argv[3])
"""


@pytest.mark.parametrize("pictures", [9, 40])
def test_a_process_ends_cleanly_while_auto_compiles(pictures, card, tiny_sd):
    done = subprocess.run([sys.executable, "-c", AUTO, str(tiny_sd), card.type, str(pictures)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_too_little_memory_is_exit_code_4_and_the_process_goes_on(fastdiff, card, monkeypatch):
    words = ["train-lcm-lora", "--proof", 0, "--pairs", 8, "--device", card.type, "-o", "run"]
    with monkeypatch.context() as patch:
        if card.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(0.2 * GIB / torch.cuda.mem_get_info()[1])
        else:

            def full(self):
                raise torch.OutOfMemoryError("no card here")

            patch.setattr(Trainer, "train_step", full)
        try:
            code, told = fastdiff(*words, "--batch-size", 512, "--steps", 2)
        finally:
            if card.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0)
    assert (code, told["error"]["kind"]) == (4, "capacity")
    assert fastdiff(*words, "--batch-size", 2, "--steps", 2, "--resume", "never")[0] == 0


def test_a_run_takes_what_plan_says(card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train-lcm-lora", "--device", card.type, "--steps", "4"]
    line = [sys.executable, "-m", "fastdiff", "plan", *words, "--json"]
    told = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    planned = told["metrics"]["settings"][0]["memory_bytes"] / GIB
    monkeypatch.setenv("GPU_ROW", str(tmp_path / "row.json"))
    taken = measure.process([sys.executable, str(ROW), "{}", *words, "--proof", "0", "--json"]).peak_mib / 1024
    if card.type == "cuda":
        taken = json.loads((tmp_path / "row.json").read_text())["reserved_gib"]
    print(f"plan {planned:.2f} GiB, run {taken:.2f} GiB")
    assert 0.6 < taken / planned < 1.5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_evaluate_mixes_neither_devices_nor_precisions(precision, fastdiff, card):
    if card.type == "cpu":  # half precision takes minutes there
        if precision == "fp16":
            pytest.skip("fp32 stands for both in a rehearsal")
        precision = "fp32"
    short = ["--proof", 0, "--steps", 2, "--batch-size", 2, "--device", card.type, "--precision", precision]
    assert fastdiff("train-lcm-lora", *short, "-o", "run")[0] == 0
    how = ["--num-images", 8, "--num-steps", 1, "--device", card.type, "--precision", precision]
    code, told = fastdiff("evaluate", "--student", "run/lcm.safetensors", *how, "-o", "report")
    assert code == 0, told
    figures = [value for row in told["metrics"]["rows"] for value in row.values() if isinstance(value, float)]
    assert figures
    assert all(map(math.isfinite, figures))
