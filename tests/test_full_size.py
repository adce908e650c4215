"""The real sizes, with random weights made on the spot: what fits, and that every layer of the file is loaded."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from fastdiff import lora

pytestmark = pytest.mark.slow

BUILD = """
    import json, sys, torch
    from pathlib import Path
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder, sd21 = Path(sys.argv[1]), sys.argv[2:] == ["sd21"]

    def write(part, make):
        with torch.device("meta"):
            net = make()
        net = net.half().to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for name, p in net.state_dict().items():
            if "position_ids" in name:
                p.copy_(torch.arange(p.numel()).view_as(p))
            elif p.is_floating_point():
                # Near what a trained net has: unit gains, small weights; so activations stay finite over all layers.
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                if p.ndim > 1:
                    fan_in = p[0].numel()
                    block = torch.randn(2**16, generator=generator).mul_(0.5 / fan_in**0.5).half()
                    p.view(-1).copy_(block.repeat(-(-p.numel() // 2**16))[: p.numel()])
        net.save_pretrained(folder / part)

    symbols = [chr(c) for c in range(33, 127)]
    vocab = {s: i for i, s in enumerate([*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer_2")
    one = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
               projection_dim=768)
    two = dict(vocab_size=49408, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
               projection_dim=1280, hidden_act="gelu")
    if sd21:
        two |= dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, projection_dim=512)
        write("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**two)))
    else:
        write("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**one)))
        write("text_encoder_2", lambda: CLIPTextModelWithProjection(CLIPTextConfig(**two)))
    write("vae", lambda: AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024, scaling_factor=0.13025))
    write("unet", lambda: UNet2DConditionModel(
        sample_size=64, attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
    ) if sd21 else UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816))
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    } if sd21 else {
        "_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
"""

LOAD = """
    import sys, torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(sys.argv[1], subfolder="unet"))
    unet = unet.half().to_empty(device="cpu")
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(sys.argv[2], unet_config=unet.config)
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet)
    print(sum(hasattr(m, "lora_A") for m in unet.modules()))
"""


def python(code, *args):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], check=True, capture_output=True, text=True
    )
    return done.stdout


MEASURE = """
    import resource, runpy
    try:
        runpy.run_module("fastdiff", run_name="__main__")
    finally:
        import sys
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, file=sys.stderr)
"""


def measured(folder, *command):
    """Run a command; its JSON and the peak of its memory in GiB."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), *map(str, command), "--offline", "--json"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "FASTDIFF_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return json.loads(done.stdout), float(done.stderr.split()[-1])


@pytest.mark.parametrize(
    ("train", "file"),
    [
        ("train-lcm-lora", "lcm"),
        ("dmd --fake-steps-per-gen 1", "dmd2"),
        ("dmd --recipe dmd --lpips-weights embedded", "dmd"),
        ("sid", "sid"),
        ("tdm", "tdm"),
        ("lightning --stages 8:4 --phases cond,uncond", "lightning-4step"),
    ],
)
def test_two_steps_on_full_size_sdxl_fit_24_gb_and_the_lora_loads_whole(train, file, tmp_path):
    base, run = tmp_path / "sdxl", tmp_path / "run"
    base.mkdir()
    python(BUILD, base)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    flags = dict(
        base=base,
        output=run,
        steps=2,
        batch_size=1,
        grad_accum=1,
        pairs=1,
        teacher_steps=2,
        resolution=64,
        prompts=tmp_path / "prompts.txt",
    )
    told, peak_gib = measured(tmp_path, *train.split(), *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items()))
    print(f"{train}: peak {peak_gib:.1f} GiB, {told['timings']}")
    assert told["metrics"]["steps"] == 2
    assert peak_gib < 24
    written = run / f"{file}.safetensors"
    assert len(lora.load(written).modules) == 788
    assert int(python(LOAD, base, written).split()[-1]) == 788
    assert list((run / "previews").glob("*.png"))


def test_surgery_on_full_size_sdxl_streams_from_file_to_file(tmp_path):
    from fastdiff.checkpoints import checkpoint

    base, run = tmp_path / "sdxl", tmp_path / "run"
    base.mkdir()
    python(BUILD, base)
    told, peak_gib = measured(tmp_path, "prune", f"--base={base}", "--layout=vega", "--steps=0", f"--output={run}")
    print(f"surgery to vega: peak {peak_gib:.2f} GiB, {told['timings']}")
    assert told["metrics"]["pruned"]["parameters"] == 745_225_604
    assert peak_gib < 4
    small = checkpoint.load(str(run / "model"))
    assert sum(v.numel() for v in small.weights("unet").values()) == 745_225_604


@pytest.mark.parametrize(
    ("family", "layout", "student", "written"),
    [("sd21", "sdxs-512", "full", 318_695_364), ("sdxl", "vega", "lora", 745_225_604)],
)
def test_two_steps_of_sdxs_at_full_size_with_three_networks(family, layout, student, written, tmp_path):
    """The student's features, then its scores; on the CPU all weights are fp32, so Vega trains as a LoRA here."""
    from fastdiff.checkpoints import checkpoint

    base, small, run = tmp_path / "base", tmp_path / "small", tmp_path / "run"
    base.mkdir()
    python(BUILD, base, family)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    measured(tmp_path, "prune", f"--base={base}", f"--layout={layout}", "--steps=0", f"--output={small}")
    told, peak_gib = measured(
        tmp_path, "sdxs", f"--base={base}", f"--init={small / 'model'}", f"--student={student}", f"--output={run}", "--steps=2",
        "--match-steps=1", "--batch-size=1", "--grad-accum=1", "--pairs=1", "--teacher-steps=2", "--resolution=64",
        f"--prompts={tmp_path / 'prompts.txt'}",
    )  # fmt: skip
    print(f"sdxs {family} {layout}: peak {peak_gib:.1f} GiB, {told['timings']}")
    assert told["metrics"]["steps"] == 2
    assert peak_gib < 24
    if student == "full":
        assert sum(v.numel() for v in checkpoint.load(str(run / "model")).weights("unet").values()) == written
    else:
        assert len(lora.load(run / "sdxs.safetensors").modules) == 233
