"""Programs that are not diffusers load what we write: kohya's sd-scripts, stable-diffusion.cpp; from outside this repository.

    export FASTDIFF_SD_SCRIPTS=path/to/sd-scripts FASTDIFF_SD_SCRIPTS_PYTHON=its/venv/bin/python
    export FASTDIFF_SD_CPP=path/to/sd-cli
    pytest -s -m slow tests/test_other_programs.py

Full-size SD1.5 and SDXL with random weights, 10 GB of disk.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKOUT = os.environ.get("FASTDIFF_SD_SCRIPTS")
SD_CPP = os.environ.get("FASTDIFF_SD_CPP")
pytestmark = pytest.mark.slow

LOAD = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
checkout, family, file, lora_file = sys.argv[1:]
sys.path.insert(0, checkout)
import torch
from networks import lora
if family == "sd15":
    from library import model_util
    encoder, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(False, file, "cpu", None)
    encoders = encoder
else:
    from library import sdxl_model_util
    one, two, vae, unet, *_ = sdxl_model_util.load_models_from_sdxl_checkpoint("sdxl_base_v1-0", file, "cpu", torch.float16)
    encoders = [one, two]
network, weights = lora.create_network_from_weights(1.0, lora_file, vae, encoders, unet)
network.apply_to(encoders, unet, False, True)
told = network.load_state_dict(weights, False)
print("lora", len(network.unet_loras), len(told.missing_keys), len(told.unexpected_keys))
"""


@pytest.mark.skipif(not CHECKOUT, reason="FASTDIFF_SD_SCRIPTS is not set")
@pytest.mark.parametrize(("family", "nets", "modules"), [("sd15", 3, 278), ("sdxl", 4, 788)])
def test_sd_scripts_matches_every_key(family, nets, modules, tmp_path):
    sys.path.insert(0, str(ROOT / "examples"))
    from bake_speed import full_size

    file, lora_file = full_size(family, tmp_path)
    python = os.environ.get("FASTDIFF_SD_SCRIPTS_PYTHON", sys.executable)
    command = [python, "-c", LOAD, CHECKOUT, family, str(file), str(lora_file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.count("All keys matched successfully") == nets
    found = re.search(r"^lora (\d+) (\d+) (\d+)$", done.stdout, re.MULTILINE)
    print(f"{family}: {nets} networks whole; LoRA modules, missing, unexpected: {found.groups()}")
    assert found.groups() == (str(modules), "0", "0")


@pytest.mark.skipif(not SD_CPP, reason="FASTDIFF_SD_CPP is not set")
@pytest.mark.parametrize(("layout", "called"), [("bk-tiny", "SD 1.x Tiny UNet"), ("sdxs-512", "SDXS (512-DS)")])
def test_stable_diffusion_cpp_draws_with_a_pruned_folder_and_a_tiny_decoder(layout, called, tmp_path):
    sys.path.insert(0, str(ROOT / "examples"))
    from bake_speed import full_size
    from PIL import Image

    from fastdiff import cli
    from fastdiff.models import autoencoder

    file, _ = full_size("sd15", tmp_path)
    assert cli.main(["prune", "--base", str(file), "--layout", layout, "--steps", "0", "-o", str(tmp_path / "run"), "-q"]) == 0
    autoencoder.tiny(64, (3, 3, 3, 1)).save_pretrained(tmp_path / "tiny-vae")
    weights = tmp_path / "tiny-vae" / "diffusion_pytorch_model.safetensors"
    how = ["-p", "a cat", "--steps", "1", "--cfg-scale", "1", "-W", "128", "-H", "128", "-o", str(tmp_path / "cat.png"), "-v"]
    command = [str(SD_CPP), "-m", str(tmp_path / "run" / "model"), "--taesd", str(weights), *how]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-3000:]
    assert called in told
    assert not re.search(r"unknown tensor|not in model file|wrong shape", told)
    assert Image.open(tmp_path / "cat.png").size == (128, 128)
