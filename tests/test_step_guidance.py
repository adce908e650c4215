"""Guidance for each step and explicit timesteps: settings, walks, and the code that draws the same in stock diffusers."""

import json

import diffusers
import pytest
import torch
from test_engine import Fake
from test_samplers import SD, close, network, theirs

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data.teacher import Shards
from fastdiff.diffusion.samplers import SOLVERS
from fastdiff.diffusion.schedule import NoiseSchedule, timesteps_from
from fastdiff.methods.lcm import guidance_embedded
from fastdiff.models import text
from fastdiff.models.denoiser import Denoiser
from fastdiff.quality import emoji as judge
from fastdiff.quality.metrics import Row, title
from fastdiff.quality.report import text_table
from fastdiff.quality.ways import teacher_row, undistilled_ways
from fastdiff.runtime.errors import UsageError
from fastdiff.sampling import compiling, engine
from fastdiff.sampling.sampler import Sampler, SeededNoise
from fastdiff.sampling.settings import Settings
from fastdiff.sampling.stock_code import stock_code

INTERVAL = Settings("dpm++", 5, step_guidance=(1, 3, 3, 3, 1))
THREE = Settings("dpm++", timesteps=(999, 666, 333), step_guidance=(1, 3, 1))


# ---- settings


def test_a_guided_step_costs_two_calls():
    assert (THREE.calls, INTERVAL.calls, THREE.num_steps, THREE.guidance) == (4, 8, 3, 3)
    assert THREE.guided
    assert THREE.weights == (1, 3, 1)
    assert Settings("ddim", timesteps=(749,), guidance=1.0).calls == 1
    assert Settings("ddim", 2, 3.0).weights == (3, 3)
    unguided = Settings("ddim", 2, step_guidance=(1, 0.5))
    assert not unguided.guided
    assert unguided.calls == 2


def test_settings_that_draw_alike_are_equal():
    same = [
        (Settings("dpm++", 3, 1.0, step_guidance=(1, 3, 1)), Settings("dpm++", 3, 7.5, step_guidance=[0.5, 3.0, 0])),
        (Settings("dpm++", 3, 7.5, step_guidance=(3, 3, 3)), Settings("dpm++", 3, 3.0)),
        (Settings("ddim", 25, 1.0, timesteps=[999, 499]), Settings("ddim", 2, 1.0, timesteps=(999, 499))),
    ]
    for a, b in same:
        assert a == b
        assert hash(a) == hash(b)
    different = {THREE, INTERVAL, Settings("dpm++", 3, 3.0), Settings("dpm++", 3, 3.0, timesteps=(999, 666, 333))}
    assert len({title("teacher", settings) for settings in different}) == len(different) == 4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(num_steps=3, step_guidance=(1, 3)), "2 weights for 3 steps"),
        (dict(timesteps=(333, 666)), "descend"),
        (dict(timesteps=(666, 666)), "descend"),
        (dict(timesteps=(666, -1)), "descend"),
        (dict(timesteps=()), "descend"),
    ],
)
def test_wrong_settings_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Settings("ddim", **values)


def test_timesteps_beyond_the_schedule_are_refused():
    with pytest.raises(ValueError, match="must be below 1000, not 1000, 3"):
        Settings("ddim", timesteps=(1000, 3)).grid(NoiseSchedule.from_config(SD), {})


def test_titles_name_all_that_rows_differ_in():
    assert title("teacher", THREE) == "teacher, 3 steps, guidance 1, 3, 1 at 999, 666, 333 (dpm++)"
    assert title("teacher", INTERVAL) == "teacher, 5 steps, guidance 1, 3, 3, 3, 1 (dpm++)"
    assert title("teacher", Settings("ddim", 1, 1.0, timesteps=(749,))) == "teacher, 1 step at 749 (ddim)"
    assert title("lcm", Settings("ddim", 2, 3.0, "trailing")) == "lcm, 2 steps, guidance 3 (ddim)"
    assert title("lcm", Settings("ddim", 2, 3.0, "leading")) == "lcm, 2 steps, guidance 3 (ddim leading)"
    assert title("tcd", Settings("tcd", 4, 1.0, eta=0.3)) == "tcd, 4 steps (tcd, eta 0.3)"


def test_a_row_in_json_holds_what_its_settings_are():
    for settings in (THREE, INTERVAL, Settings("ddim", 1, 1.0, "trailing")):
        entry = json.loads(json.dumps(Row("teacher", settings, {}, 2).described))
        values = [entry[name] for name in ("solver", "num_steps", "guidance", "spacing")]
        assert Settings(*values, timesteps=entry["timesteps"], step_guidance=entry["step_guidance"]) == settings
        assert entry["calls"] == settings.calls
    assert (entry["timesteps"], entry["step_guidance"]) == (None, None)
    _, cells = text_table([{**Row("teacher", s, {}, 2).described, "band": {}} for s in (THREE, INTERVAL)])
    assert [line[2:5] for line in cells] == [["3 at 999, 666, 333", "1, 3, 1", "4"], ["5", "1, 3, 3, 3, 1", "8"]]


def test_what_belongs_to_other_steps_goes_when_settings_are_combined():
    recipe, usual = Recipe(scheduler="lcm", num_steps=2, timesteps=(999, 499), guidance=1.0), FAMILIES["sd15"].sampling
    assert Settings.of(recipe, Settings(*usual)) == Settings("lcm", 2, 1.0, timesteps=(999, 499))
    assert Settings.of(recipe, Settings(*usual), num_steps=1) == Settings("lcm", 1, 1.0)
    assert Settings.of(recipe, Settings(*usual), spacing="trailing") == Settings("lcm", 2, 1.0, "trailing")
    assert Settings.of(recipe, Settings(*usual), timesteps=(749,)) == Settings("lcm", 1, 1.0, timesteps=(749,))
    assert Settings.of(Recipe(), THREE) == THREE
    assert Settings.of(Recipe(), THREE, guidance=2.0) == Settings("dpm++", guidance=2.0, timesteps=(999, 666, 333))
    assert Settings.of(Recipe(), THREE, num_steps=2) == Settings("dpm++", 2, 3.0)
    assert Settings.of(Recipe(), THREE, num_steps=2, step_guidance=(1, 2)) == Settings("dpm++", 2, step_guidance=(1, 2))


def test_cached_teacher_samples_keep_their_names(tiny_sd):
    """The name of the cache holds this text. A new field would make hours of teacher samples be drawn again."""
    before = "Settings(scheduler='ddim', num_steps=25, guidance=3.0, spacing=None, eta=0.0, timesteps=None)"
    assert repr(Settings("ddim", 25, 3.0)) == before
    base = checkpoint.load(str(tiny_sd))
    cond = text.encode(base, ["a cat"])
    folders = [Shards(base, settings, ["a cat"], cond, cond, 0, 64).folder for settings in (INTERVAL, Settings("dpm++", 5, 3.0))]
    assert folders[0] != folders[1]


def test_from_a_start_timesteps_are_spaced_as_from_the_end():
    schedule = NoiseSchedule.from_config(SD)
    for n in (1, 3, 4, 7, 16, 25, 1000):
        assert timesteps_from(999, n) == tuple(schedule.grid(n, "trailing").tolist())
    assert timesteps_from(749, 1) == (749,)
    assert timesteps_from(749, 3) == (749, 499, 249)
    with pytest.raises(ValueError, match="room for 1 to 2 steps, not for 3"):
        timesteps_from(1, 3)


# ---- explicit timesteps, against the schedulers of diffusers that take them


def on_grid(name, kind, timesteps, spacing=None):
    schedule = NoiseSchedule.from_config(SD)
    grid = Settings(name, timesteps=timesteps, spacing=spacing).grid(schedule, {"set_alpha_to_one": False})
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return SOLVERS[name].run(lambda x, t: schedule.predict(network(x, t), x, t, kind), x, grid, None)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timesteps", [(749,), (999, 666, 333), (900, 640, 300, 20)])
def test_an_uneven_grid_is_walked_step_by_step(kind, timesteps):
    """DDIM used to step by T // n wherever the next timestep was, and to end on timestep 0."""

    class Custom:
        """A scheduler whose `set_timesteps` takes these timesteps, whatever number of them is wanted."""

        def __init__(self, scheduler):
            self.scheduler = scheduler
            scheduler.set_timesteps(timesteps=list(timesteps))

        def __getattr__(self, name):
            return getattr(self.scheduler, name)

        def set_timesteps(self, n):
            pass

    def stock(cls, **how):
        scheduler = Custom(cls(**SD, prediction_type=kind, **how))
        return theirs(scheduler, len(timesteps)), float(scheduler.init_noise_sigma)

    unscaled, size = stock(diffusers.EulerDiscreteScheduler, timestep_spacing="leading")
    close(on_grid("ddim", kind, timesteps), unscaled, size)
    close(on_grid("euler", kind, timesteps, "leading"), unscaled, size)
    scaled, size = stock(diffusers.EulerDiscreteScheduler, timestep_spacing="trailing")
    close(on_grid("euler", kind, timesteps), scaled, size)
    second_order, _ = stock(diffusers.DPMSolverMultistepScheduler, final_sigmas_type="zero")
    close(on_grid("dpm++", kind, timesteps), second_order)


# ---- walks


class Counted(Denoiser):
    """Asks the network like any denoiser; `rows` has the batch of every call."""

    rows: list[int]

    def answer(self, x_t, t, cond):
        self.rows.append(len(x_t))
        assert len(cond) == len(x_t)
        return super().answer(x_t, t, cond)


def by_hand(denoiser, cond, uncond, seeds, settings):
    """The solver's own loop with two calls of the denoiser in a guided step."""
    noise, weights = SeededNoise(seeds, (4, 8, 8), "cpu"), iter(settings.step_guidance)

    def denoise(x, t):
        w, c = next(weights), denoiser(x, t, cond)
        return c if w <= 1 else c.guide(denoiser(x, t, uncond.expand(len(cond))), w)

    return SOLVERS[settings.scheduler].run(denoise, noise(), settings.grid(denoiser.schedule, {}), noise)


MIXED = [THREE, INTERVAL, Settings("ddim", 3, step_guidance=(4, 1, 2)), Settings("lcm", 3, step_guidance=(1, 1, 2))]


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_v"])
@pytest.mark.parametrize("settings", MIXED, ids=lambda s: s.scheduler)
def test_each_step_has_its_guidance_and_its_number_of_rows(kind, settings, request):
    base = checkpoint.load(str(request.getfixturevalue(kind)))
    cond, uncond, seeds = text.encode(base, ["a cat", "a dog"]), text.unconditional(base), [3, 4]
    denoiser = Counted(base.unet, base.schedule(), base.prediction_type)
    denoiser.rows = []
    with torch.no_grad():
        expected = by_hand(denoiser, cond, uncond, seeds, settings)
    assert len(denoiser.rows) == settings.calls
    denoiser.rows.clear()
    base.scheduler_config["set_alpha_to_one"] = True  # as by hand
    sampler = Sampler.of_networks(base, denoiser, base.vae)
    found = sampler.latents(cond, uncond, seeds, settings, (8, 8))
    assert denoiser.rows == [4 if w > 1 else 2 for w in settings.step_guidance]
    size = expected.abs().max()
    torch.testing.assert_close(found, expected, atol=2e-5 * size, rtol=0)
    torch.testing.assert_close(sampler.solved(cond, uncond, seeds, settings, (8, 8)), expected, atol=0, rtol=0)
    folded = Sampler(base, device="cpu", compile="off")
    torch.testing.assert_close(folded.latents(cond, uncond, seeds, settings, (8, 8)), expected, atol=2e-5 * size, rtol=0)
    same = folded.latents(cond, uncond, seeds, Settings(settings.scheduler, settings.num_steps, 3.0), (8, 8))
    assert (same - expected).abs().max() > 1e-3 * size


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
def test_captured_and_compiled_walks_draw_what_the_plain_one_does(kind, request):
    """An unguided step runs a compiled form of its own, because it has half of the rows."""
    base = checkpoint.load(str(request.getfixturevalue(kind)))
    prompts, backend, rows = text.Prompts(base), Fake(), []
    backend.go.set()
    compile = backend.compile

    def watched(function, mode):
        seen = []  # of one compiled function: torch.compile refuses another shape

        def form(*args, **inputs):
            shapes = [tuple(v.shape) for v in (*args, *inputs.values())]
            assert not seen or shapes == seen[0]
            seen.append(shapes)
            rows.extend(len(x) for x in args if inputs)
            return compile(function, mode)(*args, **inputs)

        return form

    backend.compile = watched
    jobs = [(prompts(["a cat", "a dog"]), prompts.unconditional(), [1, 2])] * 3

    def drawn(settings, **how):
        sampler = Sampler(base, device="cpu", compile="off")
        sampler.engine = engine.Engine(sampler.denoiser, sampler.engine.decode, "cpu", **how)
        return sampler, list(sampler.stream_batches(jobs, settings, 64))

    _, plain = drawn(INTERVAL)
    sampler, pictures = drawn(INTERVAL, compile="max", backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, pictures, strict=True))
    assert rows == [2, 4] + [2, 4, 4, 4, 2] * 3  # first each form once, to build its kernels
    assert {walk.state for walk in sampler.engine.captured.values()} == {"compiled"}
    list(sampler.stream_batches(jobs, Settings("dpm++", 5, step_guidance=(1, 2, 2, 2, 1)), 64))
    assert len(sampler.engine.captured) == 2  # another guidance is another graph
    assert len(sampler.engine.forms) == 1  # of the same compiled forms


def test_the_first_rows_are_those_of_the_prompts():
    inputs = {"kv": torch.rand(4, 3, 2), "shift": torch.rand(5, 4, 2), "t": torch.arange(5)}
    part = compiling.first_rows(inputs, 2)
    assert torch.equal(part["kv"], inputs["kv"][:2])
    assert torch.equal(part["shift"], inputs["shift"][:, :2])
    assert part["t"] is inputs["t"]
    shared = {"shift": torch.rand(5, 1, 2), "kv": torch.rand(2, 3, 2)}
    assert all(v is shared[k] for k, v in compiling.first_rows(shared, 2).items())


def test_a_network_that_is_told_one_guidance_refuses_several(tiny_sd):
    base = checkpoint.load(str(tiny_sd))
    base.__dict__["unet"] = guidance_embedded(base.unet).requires_grad_(False)
    sampler = Sampler.of_networks(base, Denoiser(base.unet, base.schedule(), base.prediction_type), base.vae)
    cond, uncond = text.encode(base, ["a cat"]), text.unconditional(base)
    with pytest.raises(UsageError, match="step_guidance 1, 3, 1: this network takes one for all steps"):
        sampler.latents(cond, uncond, [1], THREE, (8, 8))
    assert sampler.latents(cond, uncond, [1], Settings("dpm++", 2, 3.0), (8, 8)).isfinite().all()


# ---- the same in stock diffusers


@pytest.fixture(scope="module")
def stock():
    """A sampler of `emoji` and the stock pipeline, which hands out pictures in [-1, 1] unrounded."""
    base = checkpoint.load("emoji")
    return Sampler(base, device="cpu", compile="off"), unrounded(base)


def unrounded(base):
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.image_processor.postprocess = lambda image, **how: image.clamp(-1, 1)
    return pipe


def apart(sampler, pipe, settings, prompt, seed=5):
    """The largest difference between our picture and that of the code, both of values in [-1, 1]."""
    names = dict(pipe=pipe, prompt=prompt, seed=seed)
    exec(stock_code(sampler.base, settings), names)
    cond, uncond = sampler.conds([prompt])
    mine = sampler.pixels(cond, uncond, [seed], settings, resolution_px=64)[0]
    assert mine.std() > 0.2  # a picture
    return (mine - names["image"]).abs().max().item()


UNEVEN = Settings("ddim", timesteps=(900, 640, 300), step_guidance=(3, 1, 2))


@pytest.mark.parametrize(
    "settings",
    [
        Settings("ddim", 1, 1.0, timesteps=(749,)),
        THREE,
        INTERVAL,
        Settings("lcm", 4, 3.0),
        Settings("ddim", 2, 3.0),
        Settings("ddim", 3, 3.0, "leading"),
        UNEVEN,
        Settings("ddim", 3, 1.0, "lcm"),
        Settings("euler", 3, 3.0, "linspace"),
        Settings("euler", 2, 1.0, timesteps=(900, 300)),
        Settings("dpm++", 4, 1.0, "leading"),
        Settings("dpm++sde", timesteps=(999, 600, 300), step_guidance=(1, 3, 1)),
        Settings("tcd", 2, 1.0, eta=0.3),
        Settings("tcd", 2, 1.0),
    ],
    ids=lambda s: title("", s)[2:],
)
def test_the_code_draws_the_same_in_stock_diffusers(stock, settings):
    assert apart(*stock, settings, "fox on red") < 1e-4


def test_the_code_draws_every_shipped_row_of_the_undistilled_teacher(stock):
    for row in judge.shipped().rows:
        assert apart(*stock, row.settings, "bug on red") < 1e-4, row.title


@pytest.mark.parametrize("kind", ["tiny_sdxl", "tiny_v"])
def test_the_code_draws_the_same_for_every_family(kind, request):
    base = checkpoint.load(str(request.getfixturevalue(kind)))
    assert apart(Sampler(base, device="cpu", compile="off"), unrounded(base), UNEVEN, "a cat") < 1e-4


def test_unguided_steps_of_the_code_call_the_network_once(stock):
    sampler, pipe = stock
    rows = []
    handle = pipe.unet.register_forward_pre_hook(lambda net, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    apart(sampler, pipe, THREE, "fox on red")
    handle.remove()
    assert rows == [1, 2, 1]


def test_code_is_refused_where_no_code_can_draw_it(tiny_sd):
    base = checkpoint.load(str(tiny_sd))
    base.unet_config["time_cond_proj_dim"] = 256
    with pytest.raises(UsageError, match="one guidance for all steps"):
        stock_code(base, THREE)


# ---- rows of the undistilled teacher


def test_a_row_as_text():
    sdxl, emoji = FAMILIES["sdxl"], FAMILIES["emoji"]
    assert teacher_row("scheduler=dpm++ steps=5 guidance=1,3,3,3,1", sdxl) == Settings(
        "dpm++", 5, spacing="trailing", step_guidance=(1, 3, 3, 3, 1)
    )
    assert teacher_row("steps=4", sdxl) == Settings("dpm++", 4, 5.0, "trailing")
    assert teacher_row("steps=4", emoji) == Settings("ddim", 4, 3.0, "trailing")
    assert teacher_row("scheduler=ddim start=749 steps=3 guidance=1", sdxl) == Settings(
        "ddim", 3, 1.0, "trailing", timesteps=(749, 499, 249)
    )
    assert teacher_row("timesteps=999,666,333 guidance=1,3,1", sdxl).timesteps == (999, 666, 333)
    assert teacher_row("steps=2 spacing=leading scheduler=lcm guidance=2.5", sdxl) == Settings("lcm", 2, 2.5, "leading")
    assert teacher_row(THREE, sdxl) is THREE


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("steps=4 solver=ddim", "solver=ddim"),
        ("4 steps", "'4'"),
        ("scheduler=heun steps=4", "use one of ddim, euler"),
        ("spacing=even steps=4", "use one of trailing, leading"),
        ("scheduler=ddim", "give steps=N, or timesteps"),
        ("", "give steps=N, or timesteps"),
        ("steps=0", "one whole number from 1 to 1000"),
        ("steps=2.5", "one whole number"),
        ("steps=2,4", "one whole number"),
        ("steps=2 steps=3", "twice"),
        ("steps=3 guidance=1,3", "2 guidances for 3 steps"),
        ("steps=3 guidance=strong", "numbers with commas, each from 0 to 1000"),
        ("steps=3 guidance=nan", "each from 0"),
        ("timesteps=333,666", "do not descend"),
        ("timesteps=1000", "each from 0 to 999"),
        ("timesteps=999,499 steps=3", "leave out start and steps"),
        ("timesteps=999,499 start=999", "leave out start and steps"),
        ("start=749", "give steps=N"),
        ("start=1 steps=3", "only 2 timesteps"),
        ("start=749 steps=3 spacing=leading", "leave out spacing"),
        ("scheduler=lcm steps=51", "lcm spacing has 50 timesteps"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused(row, words):
    with pytest.raises(UsageError, match="teacher_row") as error:
        teacher_row(row, FAMILIES["sdxl"])
    assert words in f"{error.value} {error.value.hint}"


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_the_default_rows_have_exactly_the_calls(family):
    usual = Settings(*FAMILIES[family].sampling)
    for calls in range(1, 17):
        ways = undistilled_ways(FAMILIES[family], calls)
        assert {way.calls for way in ways} == {calls}
        assert len({title("teacher", way) for way in ways}) == len(ways)
    w = usual.guidance
    told = {calls: [way.weights for way in undistilled_ways(FAMILIES[family], calls)] for calls in (1, 2, 4, 8)}
    assert told == {
        1: [(1,), (1,)],
        2: [(1, 1), (w,)],
        4: [(1,) * 4, (w, w), (1, w, 1)],
        8: [(1,) * 8, (w,) * 4, (1, w, w, w, 1)],
    }
    assert [(way.scheduler, way.timesteps) for way in undistilled_ways(FAMILIES[family], 1)] == [("ddim", None), ("ddim", (749,))]
