"""Capture, compile and swap of the drawing function, with a backend that needs no GPU; streams; nothing read back inside."""

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import toy
from conftest import build
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.checkpoints import checkpoint
from fastdiff.models import autoencoder, text
from fastdiff.models.denoiser import Denoiser
from fastdiff.runtime import console, stop
from fastdiff.runtime.errors import Stopped, UsageError
from fastdiff.sampling import compiling, engine, openvino
from fastdiff.sampling.pictures import uint8
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings

WATCHDOG_S = 300  # ends a test that would hang
LCM, GUIDED = Settings("lcm", 2, 1.0), Settings("dpm++", 3, 4.0)
MIXED = Settings("dpm++", 3, step_guidance=(1, 4, 1))  # its guided step has twice the rows of the others


class Fake(engine.Plain):
    """Compiles when it is told to, and counts."""

    def __init__(self, fails=False):
        self.captured, self.compiled, self.fails, self.go = 0, [], fails, threading.Event()

    def capture(self, function):
        self.captured += 1
        return engine.Plain.capture(function)

    def compile(self, function, mode):
        assert self.go.wait(WATCHDOG_S)
        if self.fails:
            raise RuntimeError("no compiler here")
        self.compiled.append(mode)
        return function


@pytest.fixture
def opened(tiny_sd):
    base = checkpoint.load(str(tiny_sd))
    prompts = text.Prompts(base)
    return base, prompts(["a cat"]), prompts(["a dog"]), prompts.unconditional()


def sampler_of(base, backend=None, compile="auto"):
    sampler = Sampler(base, device="cpu", compile="off")
    sampler.engine = engine.Engine(sampler.denoiser, sampler.engine.decode, "cpu", compile=compile, backend=backend)
    return sampler


@pytest.mark.parametrize("backend", [None, engine.Plain()])
def test_a_sampler_that_is_not_used_any_more_is_gone_at_once(opened, backend):
    """Its folded network takes 5 GiB for SDXL, and the next thing may need them before the garbage collector runs."""
    base, cat, _, uncond = opened
    sampler = sampler_of(base, backend)
    assert len(list(sampler.stream_batches([(cat, uncond, [1]), (cat, uncond, [1, 2])], LCM, 64))) == 2
    parts = [weakref.ref(part) for part in (sampler, sampler.engine, sampler.denoiser.net, sampler.vae)]
    gc.disable()
    try:
        del sampler
        assert not [part() for part in parts if part() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("settings", [LCM, GUIDED, MIXED])
def test_a_captured_walk_draws_what_the_plain_one_does(opened, settings):
    base, cat, dog, uncond = opened
    jobs = [(cat, uncond, [1]), (cat, uncond, [2]), (dog, uncond, [2]), (cat, uncond, [1]), (cat, uncond, [3])]
    backend = Fake()
    plain, captured = (list(sampler_of(base, b).stream_batches(jobs, settings, 64)) for b in (None, backend))
    assert backend.captured == 1
    for a, b in zip(plain, captured, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain[0], plain[3])
    assert not torch.equal(plain[1], plain[2])
    pixels = Sampler(base, device="cpu", compile="off").pixels(dog, uncond, [2], settings, resolution_px=64)
    assert (plain[2].permute(0, 3, 1, 2).int() - uint8(pixels).int()).abs().max() <= 1


def test_the_compiled_form_is_swapped_in_when_it_is_ready(opened):
    base, cat, _, uncond = opened
    backend = Fake()
    sampler = sampler_of(base, backend)
    seen = []
    for i, picture in enumerate(sampler.stream_batches(((cat, uncond, [7]) for _ in itertools.repeat(0, 14)), LCM, 64)):
        seen.append(picture)
        (walk,) = sampler.engine.captured.values()
        if i == 5:
            assert walk.thread is None  # one picture is not worth a compiler
        if i == 9:
            assert (walk.state, backend.captured) == ("graph", 1)
            backend.go.set()
            walk.thread.join(WATCHDOG_S)
    assert (walk.state, backend.captured, backend.compiled) == ("compiled", 2, ["default"] * 2)  # the network and the decoder
    assert all(torch.equal(picture, seen[0]) for picture in seen)


def test_max_compiles_first_and_a_compiler_that_fails_leaves_the_graph(opened, capfd):
    base, cat, _, uncond = opened
    backend = Fake()
    backend.go.set()
    sampler = sampler_of(base, backend, "max")
    next(sampler.stream_batches([(cat, uncond, [1])], LCM, 64))
    assert backend.compiled == ["max-autotune-no-cudagraphs"] * 2
    backend = Fake(fails=True)
    backend.go.set()
    sampler = sampler_of(base, backend)
    jobs = ((cat, uncond, [1]) for _ in range(compiling.WORTH_COMPILING))
    assert len(list(sampler.stream_batches(jobs, LCM, 64))) == compiling.WORTH_COMPILING
    (walk,) = sampler.engine.captured.values()
    walk.thread.join(WATCHDOG_S)
    assert walk.state == "graph"
    assert "no compiler here" in capfd.readouterr().err


def test_walks_of_one_shape_share_what_was_compiled(opened):
    """One network call is compiled, whatever the number of steps and the solver; another number of rows is another shape."""
    base, cat, _, uncond = opened
    backend, calls = Fake(), []
    backend.go.set()
    compile = backend.compile
    backend.compile = lambda function, mode: (
        lambda *args, **inputs: calls.append(inputs) or compile(function, mode)(*args, **inputs)
    )
    sampler = sampler_of(base, backend, "max")
    plain = sampler_of(base)
    for settings in (LCM, Settings("lcm", 5, 1.0), Settings("ddim", 3, 1.0)):
        calls.clear()
        job = [(cat, uncond, [3])]
        picture, expected = (next(s.stream_batches(job, settings, 64)) for s in (sampler, plain))
        assert torch.equal(picture, expected)
        steps = [inputs for inputs in calls if inputs]
        warm = settings is LCM  # the compiled parts run once before they are used
        assert len(steps) == settings.num_steps + warm
        assert all(inputs["shift"].shape == steps[0]["shift"].shape for inputs in steps)
    (forms,) = sampler.engine.forms.values()
    assert len(sampler.engine.captured) == 3
    next(sampler.stream_batches([(cat, uncond, [3])], GUIDED, 64))
    assert len(sampler.engine.forms) == 2
    assert forms.ready is not None


class OutOfMemory(Fake):
    """Captures fail from the first call on, or only those of compiled parts."""

    def __init__(self, *, compiled_only):
        super().__init__()
        self.compiled_only, self.running = compiled_only, False
        self.go.set()

    def compile(self, function, mode):
        def compiled(*args, **inputs):
            self.running = True
            return function(*args, **inputs)

        return compiled

    def capture(self, function):
        self.running = False
        function()
        if self.running or not self.compiled_only:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().capture(function)


@pytest.mark.parametrize("compile", ["auto", "max"])
@pytest.mark.parametrize("compiled_only", [True, False])
def test_without_memory_for_a_graph_pictures_are_drawn_all_the_same(opened, compile, compiled_only, capfd):
    """From the compiled graph to the uncompiled one, and from that to no graph; each fall is told once."""
    console.reset()  # it tells nothing twice
    base, cat, _, uncond = opened
    sampler, seen = sampler_of(base, OutOfMemory(compiled_only=compiled_only), compile), []
    for picture in sampler.stream_batches(((cat, uncond, [7]) for _ in range(compiling.WORTH_COMPILING + 3)), LCM, 64):
        seen.append(picture)
        (walk,) = sampler.engine.captured.values()
        if walk.thread is not None:
            walk.thread.join(WATCHDOG_S)
    expected = next(sampler_of(base).stream_batches([(cat, uncond, [7])], LCM, 64))
    assert len(seen) == compiling.WORTH_COMPILING + 3
    assert all(torch.equal(picture, expected) for picture in seen)
    assert walk.state == ("graph" if compiled_only else "plain")
    told = capfd.readouterr().err
    if compiled_only or compile == "max":
        assert told.count("the compiled networks could not be captured, so pictures are drawn by the uncompiled networks") == 1
    assert told.count("no CUDA graph could be captured, so pictures are drawn without") == (not compiled_only)
    assert "CUDA out of memory" in told


def test_a_walk_without_a_graph_still_honours_a_stop(opened, monkeypatch):
    base, cat, _, uncond = opened
    sampler, checks = sampler_of(base, OutOfMemory(compiled_only=False)), []
    monkeypatch.setattr(stop, "check", lambda: checks.append(1))
    for _ in range(2):
        checks.clear()
        next(sampler.stream_batches([(cat, uncond, [1])], LCM, 64))
    assert len(checks) == 1 + LCM.num_steps


def test_a_compiled_form_is_never_compiled_again():
    """For tensors of another shape it fails at once, in place of minutes in the caller's thread."""
    form = compiling.compiled_once(lambda x: x + 1, "default")
    kept, torch._inductor.compile = torch._inductor.compile, lambda graph, inputs, options: graph.forward
    try:
        assert torch.equal(form(torch.zeros(3)), torch.ones(3))
        with pytest.raises(Exception, match="the inputs are not those that it was compiled for"):
            form(torch.zeros(4))
    finally:
        torch._inductor.compile = kept


def test_a_process_that_ends_while_a_thread_compiles_ends_with_its_own_code():
    """The thread is in C++ that calls Python back, as the compiler is; a daemon thread aborts there (exit code 134)."""
    code = """
import sys, threading, time
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from fastdiff.sampling.compiling import ending_with_process

class Slow(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        time.sleep(0.01)
        return func(*args, **(kwargs or {}))

def work():
    with Slow():
        x = torch.zeros(1)
        while True:
            x = x + 1

start(work)
time.sleep(0.2)
sys.exit(7)
"""
    ours = code.replace("start(work)", "ending_with_process(work)")
    done = subprocess.run([sys.executable, "-c", ours], capture_output=True, text=True, timeout=WATCHDOG_S, check=False)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.slow
@pytest.mark.parametrize("wait_s", [0, 0.5, 1, 2, 4, 8, 16, 32])
def test_a_process_ends_at_any_moment_of_compiling(wait_s, tmp_path):
    script = """
import sys, time, torch
from fastdiff.checkpoints import checkpoint
from fastdiff.models import text
from fastdiff.sampling import engine
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings
base = checkpoint.load("emoji")
sampler = Sampler(base, device="cpu", compile="off")
sampler.engine = engine.Engine(sampler.denoiser, sampler.engine.decode, "cpu", compile="auto", backend=engine.Plain())
prompts = text.Prompts(base)
job = (prompts(["red apple"]), prompts.unconditional(), [1])
list(sampler.stream_batches([job] * 9, Settings("ddim", 1, 1.0), 64))
time.sleep(float(sys.argv[1]))
sys.exit(7)
"""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script, str(wait_s)], env=env, timeout=WATCHDOG_S, check=False)
    assert done.returncode == 7


def test_compile_max_on_the_cpu_compiles_and_draws(opened, monkeypatch):
    """By the backend that a user gets; torch.compile itself, which takes a minute here, is left out."""
    base, cat, _, uncond = opened
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled.append(how) or function)
    job, random = [(cat, uncond, [1])], torch.get_rng_state()
    a, b = (next(Sampler(base, device="cpu", compile=c).stream_batches(job, LCM, 64)) for c in ("off", "max"))
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), random)  # the caller's random numbers stay as they are
    assert len(compiled) == 2  # the network and the decoder
    assert all(how["fullgraph"] and how["dynamic"] is False for how in compiled)


def test_only_the_last_shapes_keep_their_memory(opened):
    base, cat, _, uncond = opened
    sampler = sampler_of(base, Fake())
    for n in range(1, 7):
        next(sampler.stream_batches([(cat.expand(n), uncond, list(range(n)))], LCM, 64))
    assert len(sampler.engine.captured) == engine.Engine.KEPT


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tiny") / "bk", "bk-tiny", "epsilon")


@pytest.mark.parametrize(
    ("kind", "folded", "settings"),
    [
        ("small", True, MIXED),
        ("small", False, LCM),
        pytest.param("tiny_sd", True, LCM, marks=pytest.mark.slow),
        pytest.param("tiny_sdxl", True, MIXED, marks=pytest.mark.slow),
        pytest.param("tiny_sdxl", True, GUIDED, marks=pytest.mark.slow),
        pytest.param("tiny_sdxl", False, GUIDED, marks=pytest.mark.slow),
    ],
)
def test_openvino_draws_what_torch_does(kind, folded, settings, request):
    pytest.importorskip("openvino")
    base = checkpoint.load(str(request.getfixturevalue(kind)))
    prompts = text.Prompts(base)
    cat, pair, uncond = prompts(["a cat"]), prompts(["a dog", "a cat"]), prompts.unconditional()
    jobs = [(cat, uncond, [1]), (pair, uncond, [2, 1]), (prompts(["a dog"]), uncond, [2]), (cat, uncond, [3])]

    def sampler(compile):
        if folded:
            return Sampler(base, compile=compile, device="cpu")
        return Sampler.of_networks(base, Denoiser(base.unet, base.schedule(), base.prediction_type), base.vae, compile=compile)

    plain, other = sampler("off"), sampler("openvino")
    found = [list(s.stream_batches(jobs, settings, 8 * autoencoder.factor(base.vae))) for s in (plain, other)]
    for a, b in zip(*found, strict=True):
        assert (a.int() - b.int()).abs().max() <= 1
    assert not torch.equal(found[1][0], found[1][2])
    a, b = (s.engine.latents(s.walk(pair, uncond, [4, 5], settings, (8, 8), 64)) for s in (plain, other))
    assert (a - b).abs().max() <= 1e-4 * a.abs().max().clamp(min=1)
    forms = other.engine.call.form.forms
    assert len(forms) == len({n * (2 if w > 1 else 1) for n in (1, 2) for w in settings.weights})  # one a number of rows
    assert all(form is not other.engine.call.form.function for form in forms.values())


@pytest.mark.slow
def test_openvino_with_a_controlnet(opened):
    pytest.importorskip("openvino")
    from diffusers import ControlNetModel

    base, cat, _, uncond = opened
    guide = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 32)).requires_grad_(False)
    for parameter in guide.controlnet_down_blocks.parameters():
        parameter.fill_(0.1)  # a new one says nothing
    cond, pictures = cat.with_control(torch.rand(1, 3, 16, 16)), []
    for compile in ("off", "openvino"):
        sampler = Sampler(base, compile=compile, device="cpu")
        sampler.denoiser.controlnet = guide
        pictures.append(next(sampler.stream_batches([(cond, uncond, [1])], LCM, 64)).int())
    assert (pictures[0] - pictures[1]).abs().max() <= 1
    bare = next(Sampler(base, device="cpu", compile="off").stream_batches([(cat, uncond, [1])], LCM, 64))
    assert not torch.equal(bare.int(), pictures[1])


def test_what_openvino_cannot_do_runs_without_it(opened, monkeypatch, capfd):
    base, cat, _, uncond = opened
    monkeypatch.setattr(openvino, "check", lambda device: None)
    monkeypatch.setattr(openvino, "compiled", lambda *args: 1 / 0)
    a, b = (
        next(Sampler(base, compile=c, device="cpu").stream_batches([(cat, uncond, [1])] * 2, LCM, 64))
        for c in ("off", "openvino")
    )
    assert torch.equal(a, b)
    told = capfd.readouterr().err
    assert told.count("the network runs without it (ZeroDivisionError") == told.count("the decoder runs without it") == 1


def test_a_signal_is_survived_when_openvinos_models_are_gone():
    """In a child, which a segmentation fault would end."""
    pytest.importorskip("openvino")
    models = [openvino.Compiled(lambda x: x + 1, "one more") for _ in range(2)]
    assert all(torch.equal(model(x=torch.zeros(2)), torch.ones(2)) for model in models)
    while models:
        models.pop(0)
        gc.collect()

    def signalled():
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.raise_signal(signal.SIGTERM)

    assert toy.child(signalled).wait() == 0


def test_openvino_is_refused_where_it_cannot_run(fastdiff, monkeypatch):
    flags = ["sample", "--prompt", "panda", "--num-steps", 1, "--compile", "openvino"]
    code, told = fastdiff(*flags, "--device", "cpu", "--precision", "bf16")
    assert (code, "--precision" in told["error"]["hint"]) == (2, True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, told = fastdiff(*flags, "--device", "cpu")
    assert (code, told["error"]["message"]) == (2, "--compile openvino: OpenVINO is not installed")
    assert told["error"]["hint"] == 'pip install "fastdiff[openvino]"'
    with pytest.raises(UsageError, match="`compile=openvino`: it runs on the CPU, not on cuda"):
        openvino.check("cuda")


def test_a_stop_is_honoured_between_batches(opened, monkeypatch):
    base, cat, _, uncond = opened
    stream = sampler_of(base, Fake()).stream_batches(((cat, uncond, [i]) for i in itertools.count()), LCM, 64)
    next(stream)
    monkeypatch.setattr(stop.request, "exit_code", 130)
    with pytest.raises(Stopped):
        next(stream)


def test_what_a_machine_can_do_decides():
    assert engine.backend_of("cpu", "auto") is None
    assert isinstance(engine.backend_of("cpu", "max"), engine.Plain)
    assert isinstance(engine.backend_of("cuda", "auto"), engine.Cuda) == torch.cuda.is_available()
    assert engine.backend_of("cuda", "off") is None
    assert engine.backend_of("cpu", "openvino") is None


class NothingLeaves(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}, func
        assert not (func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") is not None), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [LCM, GUIDED, MIXED, Settings("tcd", 2, 1.0, eta=0.3), Settings("euler", 2, 2.0)])
@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
def test_nothing_is_read_back_inside(kind, settings, request):
    base = checkpoint.load(str(request.getfixturevalue(kind)))
    prompts = text.Prompts(base)
    sampler = Sampler(base, device="cpu", compile="off")
    walk = sampler.walk(prompts(["a cat"]), prompts.unconditional(), [1], settings, (8, 8), 64)
    with NothingLeaves():
        found = sampler.engine.bytes(walk)
    assert found.shape == (1, 64, 64, 3) if kind == "tiny_sd" else found.shape[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("settings", [LCM, MIXED])
def test_the_whole_walk_is_one_graph_for_a_compiler(opened, settings):
    base, cat, _, uncond = opened
    sampler = Sampler(base, device="cpu", compile="off")
    walk = sampler.walk(cat, uncond, [1], settings, (8, 8))
    expected = sampler.engine.bytes(walk)

    def draw(noise, **inputs):
        z = engine.latents(sampler.engine.call, walk._replace(noise=noise, inputs=inputs))
        return engine.to_bytes(autoencoder.decode(sampler.vae, z))

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(draw, backend="eager", fullgraph=True)(walk.noise, **walk.inputs)
    assert (found.permute(0, 2, 3, 1).int() - expected.int()).abs().max() <= 1


def test_batches_of_prompts_and_frames_a_second(tmp_path, capfd, monkeypatch):
    from fastdiff import cli

    monkeypatch.chdir(tmp_path)
    flags = ["--num-steps", "1", "--device", "cpu", "--json"]
    many = ["sample", "--prompt", "panda", "--prompt", "a red apple", "--prompt", "robot", "--batch-size", "2", "-o", "many"]
    assert cli.main([*many, *flags]) == 0
    assert len(json.loads(capfd.readouterr().out)["outputs"]) == 4
    one = ["sample", "--prompt", "robot", "-o", "one.png", "--compile", "off"]
    assert cli.main([*one, *flags]) == 0
    capfd.readouterr()
    from PIL import Image

    same = [torch.tensor(list(Image.open(p).tobytes())).int() for p in ("many/0002-seed0.png", "one.png")]
    assert (same[0] - same[1]).abs().max() <= 1
    assert cli.main(["sample", "--prompt", "panda", "--fps", "0.3", "-o", "last.png", *flags]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["metrics"]["images_per_s"] > 0
    assert [o["path"] for o in told["outputs"]] == ["last.png"]
    assert cli.main(["sample", "--prompt", "panda", "--compile", "always", *flags]) == 2


@pytest.mark.parametrize("seed", [20_000_000, 2**31 - 1, 2**63 - 1])
def test_any_seed_draws(seed, opened):
    """Also as the first of several: the seeds after it are larger."""
    base, cat, _, uncond = opened
    sampler = sampler_of(base)
    a, b = (next(sampler.stream_batches([(cat, uncond, [s])], LCM, 64)) for s in (seed, seed + 1))
    assert not torch.equal(a, b)
