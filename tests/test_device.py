"""What depends on the card, its driver and the installed torch: errors, the precision of `auto`, and memory that runs out."""

import pytest
import torch
import toy

import fastdiff as fd
from fastdiff import cli
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.data.batch import Batch
from fastdiff.methods.lcm import LCM, Config, guidance_embedded
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.runtime import requirements
from fastdiff.runtime.errors import DoesNotFit, Failed, device_error
from fastdiff.sampling import assemble
from fastdiff.training import session
from fastdiff.training.exhibit import Exhibit
from fastdiff.training.previews import Preview
from fastdiff.training.run import Run

# ---- errors that libraries raise

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GiB, max allowed: 18.13 GiB)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    MemoryError(),
]
FAULTS = [
    (RuntimeError("CUDA driver version is insufficient for CUDA runtime version"), "the NVIDIA driver is older"),
    (RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."), "the NVIDIA driver is older"),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "this torch has no code for this GPU"),
    (RuntimeError("Found no NVIDIA driver on your system."), "the GPU cannot be used"),
    (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "the GPU cannot be used"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda e: str(e)[:60])
def test_memory_that_ran_out_is_exit_4_and_names_what_takes_less(error):
    failure = cli.explain(error)
    assert (failure.exit_code, failure.kind) == (4, "capacity")
    assert failure.message.startswith("out of memory")
    assert "\n" not in failure.message
    for lever in ("--batch-size", "--resolution", "--gradient-checkpointing", "fastdiff plan"):
        assert lever in failure.hint


@pytest.mark.parametrize(("error", "meaning"), FAULTS, ids=lambda e: str(e)[:60])
def test_a_driver_or_build_that_does_not_fit_is_one_clear_line(error, meaning):
    failure = cli.explain(error)
    assert (failure.exit_code, failure.kind) == (1, "failure")
    assert failure.message.startswith(meaning)
    assert str(error).splitlines()[0] in failure.message
    assert failure.hint


def test_other_errors_stay_what_they_are():
    assert device_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert device_error(ValueError("out of memory")) is None


def test_the_library_raises_the_same_error_in_training_and_sampling(monkeypatch, tmp_path):
    def out(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(session.Session, "open", out)
    with pytest.raises(DoesNotFit, match="out of memory: CUDA out of memory"):
        fd.train("lcm", "emoji", output=tmp_path / "run")
    sampler = fd.Sampler("emoji", device="cpu")
    monkeypatch.setattr(type(sampler), "stream", out)
    with pytest.raises(DoesNotFit, match="out of memory"):
        sampler("a red apple")


# ---- memory that runs out beside the training


def test_a_contact_sheet_that_does_not_fit_is_left_out_and_the_run_goes_on(fastdiff, tiny_sd, monkeypatch, tmp_path):
    def out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Preview, "sheet", out)
    monkeypatch.setattr(Exhibit, "figures", out)
    quick = "--resolution 64 --pairs 4 --teacher-steps 1 --batch-size 1 --lora-rank 2 --device cpu"
    args = f"train-lcm-lora --base {tiny_sd} -o run --steps 2 --preview-every 1 --prompts prompts.txt {quick}"
    code, told = fastdiff(*args.split())
    assert (code, told["metrics"]["steps"]) == (0, 2)
    assert (tmp_path / "run" / "lcm.safetensors").exists()
    assert (tmp_path / "run" / "README.md").exists()
    assert not list((tmp_path / "run" / "previews").iterdir())
    left_out = [line for line in told["warnings"] if "does not fit in memory" in line]
    assert [line.split(" does")[0] for line in left_out] == [
        "step 1: a contact sheet", "step 2: a contact sheet", "step 2: the contact sheet", "step 2: the closing figures",
    ]  # fmt: skip


def test_a_measurement_that_does_not_fit_is_left_out(tmp_path):
    trainer = toy.trainer_of(tmp_path, steps=3, eval_every=1, keep="best", patience=1)
    answers = iter([RuntimeError("CUDA error: out of memory"), {"score": 1.0}, MemoryError()])

    def measure():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    trainer.measure = measure
    trainer.fit()
    assert (trainer.step, trainer.best["step"]) == (3, 2)


def test_an_error_of_another_kind_in_a_contact_sheet_is_raised(tmp_path):
    trainer = toy.trainer_of(tmp_path, steps=3, preview_every=1)

    def preview(step):
        raise RuntimeError("a bug")

    trainer.preview = preview
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.fit()


# ---- the torch that is installed


@pytest.fixture
def unchecked():
    requirements.check_torch.cache_clear()
    yield
    requirements.check_torch.cache_clear()


@pytest.mark.parametrize("version", ["2.6.0", "2.10.1+cu128", "1.13.1", "2.9.0a0+nv25.10"])
def test_an_older_torch_is_one_clear_line(version, unchecked, monkeypatch, capsys):
    monkeypatch.setattr(requirements, "version", lambda name: version)
    assert cli.main(["train-lcm-lora", "--steps", "1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: torch {version} is installed, but fastdiff needs 2.11 or newer")
    assert 'pip install "torch>=2.11"' in line
    with pytest.raises(Failed, match="needs 2.11"):
        fd.__getattr__("train")
    assert cli.main(["train-lcm-lora", "--help"]) == 0  # help needs no torch


@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cu130", "3.0.0", "2.11.0a0+git1234", "unreadable"])
def test_a_torch_that_is_new_enough_passes(version, unchecked, monkeypatch):
    monkeypatch.setattr(requirements, "version", lambda name: version)
    requirements.check_torch()


# ---- precision


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_is_bf16_only_where_the_card_computes_in_it(native, expected, monkeypatch, tmp_path):
    """Turing emulates bf16, and says that it supports it unless asked otherwise."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    cuda = torch.device("cuda")
    assert assemble.pick_precision("auto", cuda) == expected
    assert assemble.pick_dtype("auto", cuda) == {"bf16": torch.bfloat16, "fp16": torch.float16}[expected]
    assert assemble.pick_precision("bf16", cuda) == "bf16"
    assert assemble.pick_precision("auto", torch.device("cpu")) == "fp32"
    monkeypatch.setattr(session, "pick_device", lambda name: cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = []
    monkeypatch.setattr("accelerate.Accelerator", lambda **how: chosen.append(how["mixed_precision"]))
    session.open_accelerator(toy.Config(device="cuda"), Run(tmp_path))
    assert chosen == [expected]


# ---- a guidance embedding, for the config of every family


def embedded(base: Checkpoint, width: int | None, *, key: bool = True) -> torch.nn.Module:
    config = {k: v for k, v in base.config_of("unet").items() if k != "time_cond_proj_dim"}
    return base.shaped("unet", {**config, "time_cond_proj_dim": width} if key else config).skeleton("unet")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_familys_network_gets_a_guidance_embedding(family):
    """A config may leave the field out, have it empty, or have an embedding already, whose width stays."""
    base = Checkpoint(family.name, family.home, family)
    for key, width, expected in ((False, None, 256), (True, None, 256), (True, 32, 32)):
        with torch.device("meta"):
            copy = guidance_embedded(embedded(base, width, key=key))
        assert copy.config.time_cond_proj_dim == expected
        assert copy.time_embedding.cond_proj.weight.shape[1] == expected
        assert all(p.requires_grad and p.dtype == torch.float32 for p in copy.parameters())


@pytest.mark.parametrize("full", [False, True])
def test_a_base_that_embeds_guidance_is_a_teacher_of_one_call(tiny_sd, full):
    base = checkpoint.load(str(tiny_sd))
    base.__dict__["unet"] = guidance_embedded(base.unet, 16).requires_grad_(False)
    torch.nn.init.normal_(base.unet.time_embedding.cond_proj.weight)
    method = LCM(base, Config(full=full, lora_rank=2, batch_size=2))
    cond = Cond(torch.randn(2, 12, 32))
    x, t, w = torch.randn(2, 4, 8, 8), torch.tensor([200, 700]), torch.tensor([3.0, 8.0])
    method.players(None)
    (turn,) = method.losses(Batch(x, cond, cond), None)
    assert turn["student"]["consistency"].isfinite()
    assert method.recipe.guidance == 6.0
    guided = Denoiser.of(base).guided(x, t, cond, cond, w)
    assert torch.equal(guided.eps, Denoiser.of(base)(x, t, cond.with_guidance(w)).eps)
