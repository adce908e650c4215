"""Tiny random checkpoints in the real formats, built once a session; no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "FASTDIFF_TEST_GPU" not in os.environ:  # expected values are the CPU's, also on a machine with a card
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--write-golden", action="store_true", help="write the files of tests/golden anew")


UNET = dict(
    sample_size=8,
    block_out_channels=(16, 32, 32, 32),
    layers_per_block=2,
    norm_num_groups=8,
    attention_head_dim=4,
)
SCHEDULER = dict(
    _class_name="DDIMScheduler",
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


def build(folder, family: str, prediction_type: str):
    """A pipeline of the family's classes and topology with random weights, saved as a diffusers folder.

    sd15 (any other name too), sd21 (its width and linear projections), sdxl, bk-tiny (one layer a block, no mid block).
    """
    import diffusers
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    symbols = [chr(c) for c in range(33, 127)]
    vocab = {s: i for i, s in enumerate([*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=12, pad_token="<|endoftext|>")
    ids = dict(bos_token_id=vocab["<|startoftext|>"], eos_token_id=vocab["<|endoftext|>"], pad_token_id=vocab["<|endoftext|>"])
    width = 1024 if family == "sd21" else 32  # the width tells SD2 from SD1
    text = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=width, intermediate_size=64, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=12, **ids,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16), norm_num_groups=4, sample_size=64,
    )  # fmt: skip
    scheduler = DDIMScheduler.from_config({**SCHEDULER, "prediction_type": prediction_type})
    if family == "sdxl":
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8, attention_head_dim=(2, 4, 4),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2), cross_attention_dim=96, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
        )  # fmt: skip
        wide = CLIPTextConfig(**{**text.to_dict(), "hidden_size": 64})  # diffusers tells the two encoders by their widths
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae, CLIPTextModel(text), CLIPTextModelWithProjection(wide), tokenizer, tokenizer, unet, scheduler,
            add_watermarker=False,
        )  # fmt: skip
    else:
        shape = dict(UNET, cross_attention_dim=width)
        if family == "sd21":
            shape |= dict(use_linear_projection=True, attention_head_dim=(2, 4, 4, 4))
        if family == "bk-tiny":
            shape |= dict(
                layers_per_block=1, mid_block_type=None, block_out_channels=(16, 32, 32),
                down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
            )  # fmt: skip
        unet = UNet2DConditionModel(**shape)
        pipeline = diffusers.StableDiffusionPipeline(
            vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tiny") / "sd", "sd15", "epsilon")


@pytest.fixture(scope="session")
def tiny_v(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tiny") / "v", "v", "v_prediction")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tiny") / "sdxl", "sdxl", "epsilon")


def controlnet_of(base, spread=0.05):
    """A ControlNet of the base whose additions are not zero."""
    from diffusers import ControlNetModel

    torch.manual_seed(5)
    net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "controlnet_" in name:
                p.add_(spread * torch.randn_like(p))
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_controlnet(tiny_sd, tmp_path_factory):
    from fastdiff.checkpoints import checkpoint, write

    path = tmp_path_factory.mktemp("controlnet") / "edges"
    write.network_to_folder(controlnet_of(checkpoint.load(str(tiny_sd))), path)
    return path


@pytest.fixture(scope="session")
def tiny_pruned(tiny_sd, tmp_path_factory):
    from fastdiff.checkpoints import checkpoint
    from fastdiff.methods.shared import cutting

    base, path = checkpoint.load(str(tiny_sd)), tmp_path_factory.mktemp("pruned") / "model"
    cutting.cut(base, cutting.layout_of(base, "bk-tiny"), path)
    return path


@pytest.fixture(autouse=True)
def _few_teacher_steps(monkeypatch):
    """Contact sheets show the teacher of tiny checkpoints too: of 4 steps, not 25, which would be a fifth of the suite's time."""
    from tiny import few_teacher_steps

    from fastdiff.sampling.settings import Settings

    monkeypatch.setattr(Settings, "usual", few_teacher_steps(Settings.usual))


@pytest.fixture
def fastdiff(tmp_path, monkeypatch, capfd):
    """Run a command in an empty folder that holds prompts.txt; returns (exit code, JSON object)."""
    import json

    from fastdiff import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")

    def command(*args):
        code = cli.main([*map(str, args), "--json"])
        return code, json.loads(capfd.readouterr().out)

    return command


class InFp64:
    """torch, for a module of diffusers that shall compute in fp64 where it asks for fp32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def euler_in_fp64(monkeypatch):
    """diffusers' Euler in fp64.

    Where the last timestep is pure noise, it subtracts numbers of 4096 times the picture's. In fp32 that leaves errors of 1e-3,
    as large as the difference between 4096 and infinity, which tests must see.
    """
    from diffusers.schedulers import scheduling_euler_discrete

    monkeypatch.setattr(scheduling_euler_discrete, "torch", InFp64())
