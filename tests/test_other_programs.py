"""Programs that are not diffusers load what we write: kohya's sd-scripts, stable-diffusion.cpp, ComfyUI; from outside this
repository.

    export FASTDIFF_SD_SCRIPTS=path/to/sd-scripts FASTDIFF_SD_SCRIPTS_PYTHON=its/venv/bin/python
    export FASTDIFF_SD_CPP=path/to/sd-cli
    export FASTDIFF_COMFYUI=path/to/ComfyUI FASTDIFF_COMFYUI_PYTHON=its/venv/bin/python
    pytest -s -m slow tests/test_other_programs.py

Full-size SD1.5, SD2.1 and SDXL with random weights, 16 GB of disk and 16 GB of memory.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKOUT = os.environ.get("FASTDIFF_SD_SCRIPTS")
SD_CPP = os.environ.get("FASTDIFF_SD_CPP")
COMFYUI = os.environ.get("FASTDIFF_COMFYUI")
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


# ---- ComfyUI: programs that run its own functions on the CPU. Each prints its log, and what it found as JSON in the last line.

START = """
import json, logging, sys
from pathlib import Path
checkout, *arguments = sys.argv[1:]
sys.path.insert(0, checkout)
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(levelname)s %(message)s")
sys.argv[1:] = ["--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
import comfy.lora, comfy.sd
from safetensors.torch import load_file, save_file

def opened(path, dtype=torch.float16):
    return comfy.sd.load_checkpoint_guess_config(path, model_options={"dtype": dtype}, te_model_options={"dtype": dtype})[:3]
"""
READ = """
model, clip, vae = opened(arguments[0])
sigmas = model.model.model_sampling.sigmas
found = {"family": type(model.model.model_config).__name__, "predicts": model.model.model_type.name, "last": sigmas[-1].item()}
print(json.dumps(found))
"""
KNOW = """
import comfy.model_detection as detection
found = {}
for path in arguments:  # a network on the meta device takes the names and the shapes of tensors, and no memory
    tensors = {name: torch.zeros(()).expand(shape) for name, shape in json.load(open(path)).items()}
    logging.info(f"FILE {path}")
    prefix = detection.unet_prefix_from_state_dict(tensors)
    config = detection.model_config_from_unet(tensors, prefix)
    config.set_inference_dtype(torch.float16, None)
    model = config.get_model(tensors, prefix, device="meta")
    model.load_model_weights(tensors, prefix)
    found[path] = [type(config).__name__, model.model_type.name, model.model_sampling.sigmas[-1].item()]
print(json.dumps(found))
"""
DRAW = """
file, given, result = arguments
model, clip, vae = opened(file, torch.float32)
x = load_file(given)
with torch.no_grad():
    out = {
        "eps": model.model.diffusion_model(x["latents"], x["t"], context=x["context"]),
        "other": model.model.diffusion_model(x["latents"], x["t"], context=x["context"].flip(1) + 1),
        "pixels": vae.first_stage_model.decode(x["latents"]),
    }
save_file({k: v.contiguous() for k, v in out.items()}, result)
print("{}")
"""
ADD = """
file, result, every, *lora_files = arguments
kron = torch.kron  # which refuses the views that ComfyUI makes of a Tucker core, in torch 2.14
torch.kron = lambda a, b: kron(a.contiguous(), b.contiguous())
model, clip, vae = opened(file)
names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, comfy.lora.model_lora_keys_unet(model.model, {}))
state = model.model.state_dict() | clip.cond_stage_model.state_dict()
found, weights = {"names": {str(k): str(v) for k, v in names.items()}, "changed": [], "skipped": []}, {}
for i, lora_file in enumerate(lora_files):
    tensors = comfy.utils.load_torch_file(lora_file)
    logging.info(f"LORA {i}")
    comfy.sd.load_lora_for_models(model, clip, tensors, 1.0, 1.0)
    logging.info("LORA read")
    patches = comfy.lora.load_lora(tensors, names, log_missing=False)
    found["changed"].append(len(patches))
    for key in sorted(patches)[::int(every)]:
        old = state[key].float()
        weights[f"{i} old {key}"] = old
        parts = [(1.0, patches[key], 1.0, None, None)]
        weights[f"{i} new {key}"] = comfy.lora.calculate_weight(parts, old.clone(), key).contiguous()
save_file(weights, result)
print(json.dumps(found))
"""
SAVE = """
from comfy_extras import nodes_lora_extract as extract
file, folder = arguments
model, clip, vae = opened(file)
made = torch.Generator().manual_seed(0)

def factors(weight, rank):  # of the shapes that its own has, without the singular values of 3000 layers
    ones = [1] * (weight.ndim - 2)
    return torch.randn(weight.shape[0], rank, *ones, generator=made), torch.randn(rank, *weight.shape[1:], generator=made)

extract.extract_lora = factors
kinds = extract.LORAType
found = extract.calc_lora_model(model, 2, "diffusion_model.", "diffusion_model.", {}, kinds.STANDARD, bias_diff=True)
found = extract.calc_lora_model(clip.patcher, 2, "", "text_encoders.", found, kinds.STANDARD, bias_diff=True)
comfy.utils.save_torch_file(found, folder + "/standard.safetensors")
found = extract.calc_lora_model(clip.patcher, 2, "", "text_encoders.", {}, kinds.FULL_DIFF, bias_diff=True)
comfy.utils.save_torch_file(found, folder + "/full.safetensors")
print("{}")
"""
ENCODE = """
folder, result, lines, skip = arguments
parts = sorted(str(path) for path in Path(folder).glob("*.safetensors"))
dtype = {"dtype": torch.float32}
clip = comfy.sd.load_clip(ckpt_paths=parts, clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION, model_options=dtype)
if int(skip):
    clip.clip_layer(-int(skip))
found = {}
for i, line in enumerate(json.loads(lines)):
    states, pooled = clip.encode_from_tokens(clip.tokenize(line), return_pooled=True)
    found |= {f"{i} states": states.float().contiguous(), f"{i} pooled": pooled.float().contiguous()}
save_file(found, result)
print("{}")
"""
TIMES = """
import comfy.model_base, comfy.samplers, comfy.supported_models
from comfy_extras import nodes_model_advanced as nodes_model
config = comfy.supported_models.SD15({})
plain = comfy.model_base.model_sampling(config, comfy.model_base.ModelType.EPS)
lcm = type("Lcm", (nodes_model.ModelSamplingDiscreteDistilled, nodes_model.LCM), {})(config)
found = {}
for table, sampling in (("full", plain), ("lcm", lcm)):
    for name in ("simple", "sgm_uniform", "normal", "ddim_uniform"):
        for n in (1, 2, 3, 4, 6, 8, 25):
            sigmas = comfy.samplers.calculate_sigmas(sampling, name, n)[:-1]
            found[f"{table} {name} {n}"] = sampling.timestep(sigmas).tolist()
print(json.dumps(found))
"""
# ComfyUI misses these in every published file too: CLIP-L's projection is the identity then, and nothing uses the scale.
OWN = r"clip_\w\.(logit_scale|transformer\.text_projection\.weight)"
SAID = re.compile(r"(?i)^(?!warning torchaudio)(warning|error|.*(missing|unexpected|left ?over|not loaded|mismatch|failed))")


def comfyui(program, *arguments):
    """The log and the findings of a program."""
    python = os.environ.get("FASTDIFF_COMFYUI_PYTHON", sys.executable)
    command = [python, "-c", START + program, COMFYUI, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    return lines[:-1], json.loads(lines[-1])


def complaints(log):
    """Lines about keys, without those that ComfyUI writes of every checkpoint of the family."""
    usual = (rf"DEBUG clip missing: \[('{OWN}'(, )?)+\]", r"DEBUG clip unexpected \['clip_l\.[\w.]*\.position_ids'\]:")
    return [line for line in log if SAID.match(line) and not any(re.fullmatch(text, line) for text in usual)]


NETWORKS = [  # family, layout, class, what it predicts, whether it ends in pure noise
    ("sd15", None, "SD15", "epsilon", False),
    *(("sd15", name, "SD15", "epsilon", False) for name in ("bk-base", "bk-small", "bk-tiny", "sdxs-512")),
    ("sd21", None, "SD20", "epsilon", False),
    *(("sd21", name, "SD20", "epsilon", False) for name in ("bk-base", "bk-small", "bk-tiny", "sdxs-512")),
    ("sdxl", None, "SDXL", "epsilon", False),
    ("sdxl", None, "SDXL", "v_prediction", False),
    ("sdxl", None, "SDXL", "v_prediction", True),
    ("sdxl", "ssd-1b", "SSD1B", "epsilon", False),
    ("sdxl", "vega", "Segmind_Vega", "epsilon", False),
    ("sdxl", "vega", "Segmind_Vega", "v_prediction", True),
    ("sdxl", "koala-1b", "KOALA_1B", "epsilon", False),
    ("sdxl", "koala-700m", "KOALA_700M", "epsilon", False),
]


@pytest.mark.skipif(not COMFYUI, reason="FASTDIFF_COMFYUI is not set")
def test_comfyui_knows_every_network_that_is_written_as_a_single_file(tmp_path):
    """By the names and shapes of the tensors that the writer gives, without the values."""
    import torch

    from fastdiff.checkpoints import write
    from fastdiff.checkpoints.checkpoint import Checkpoint
    from fastdiff.checkpoints.family import FAMILIES
    from fastdiff.checkpoints.single_file import Weights
    from fastdiff.models import unet

    paths = []
    for i, (name, layout, _, kind, zero_snr) in enumerate(NETWORKS):
        family = FAMILIES[name]
        base = Checkpoint(name, family.home, family, prediction=kind, zero_snr=zero_snr)
        if layout:
            base = base.shaped("unet", unet.student_config(base.unet_config, layout, family))
        write.refuse_unreadable(base, force=False)
        parts = {}
        for part in base.parts:
            shapes = base.shapes(part)
            parts[part] = Weights(dict.fromkeys(shapes), shapes, dict.fromkeys(shapes))
        paths.append(tmp_path / f"{i}.json")
        paths[-1].write_text(json.dumps({row.name: row.shape for row in write.rows_of(base, parts, torch.float16)}))
    log, found = comfyui(KNOW, *paths)
    for path, (name, layout, wanted, kind, zero_snr) in zip(paths, NETWORKS, strict=True):
        print(name, layout, *found[str(path)])
        own, predicts, last = found[str(path)]
        assert (own, predicts) == (wanted, {"epsilon": "EPS"}.get(kind, kind.upper())), (name, layout)
        assert (last > 1000) == zero_snr, (name, layout)
    assert complaints(log) == []


@pytest.mark.skipif(not COMFYUI, reason="FASTDIFF_COMFYUI is not set")
@pytest.mark.parametrize(("family", "layout", "wanted"), [("sd15", "bk-tiny", "SD15"), ("sdxl", None, "SDXL")])
def test_comfyui_reads_single_files_whole(family, layout, wanted, tmp_path):
    """UNet, VAE and text encoders of the files themselves."""
    sys.path.insert(0, str(ROOT / "examples"))
    from bake_speed import full_size

    from fastdiff import cli

    file, _ = full_size(family, tmp_path)
    if layout:
        command = ["prune", "--base", str(file), "--layout", layout, "--steps", "0", "-o", str(tmp_path / "run"), "-q"]
        assert cli.main(command) == 0
        file = tmp_path / "pruned.safetensors"
        assert cli.main(["export", "--base", str(tmp_path / "run" / "model"), "--single-file", "-o", str(file), "-q"]) == 0
    log, found = comfyui(READ, file)
    assert complaints(log) == []
    assert (found["family"], found["predicts"]) == (wanted, "EPS")


@pytest.mark.skipif(not COMFYUI, reason="FASTDIFF_COMFYUI is not set")
def test_comfyui_tells_the_prediction_of_sd2_as_we_say(tmp_path):
    """It looks at the spread of one bias; our writer says what to set where the guess is wrong."""
    sys.path.insert(0, str(ROOT / "examples"))
    import torch
    from bake_speed import full_size

    from fastdiff.checkpoints import checkpoint, write

    file, _ = full_size("sd21", tmp_path)
    base = checkpoint.load(str(file), dtype=torch.float16)
    for spread, wanted in ((0.02, "EPS"), (0.2, "V_PREDICTION")):
        bias = base.unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias
        bias.data.normal_(0, spread)
        write.to_file(base, file.with_name("one.safetensors"))
        assert write.seen_by_comfyui(base, {}) == {"EPS": "epsilon"}.get(wanted, wanted.lower())
        log, found = comfyui(READ, file.with_name("one.safetensors"))
        print(f"sd21: {found}")
        assert complaints(log) == []
        assert (found["family"], found["predicts"]) == ("SD20", wanted)


@pytest.mark.skipif(not COMFYUI, reason="FASTDIFF_COMFYUI is not set")
def test_comfyui_computes_what_diffusers_computes(tmp_path):
    """The output of SD1.5's UNet and of its decoder, in fp32, with weights as torch begins a network."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import load_file, save_file

    from fastdiff.checkpoints import write
    from fastdiff.checkpoints.checkpoint import Checkpoint
    from fastdiff.checkpoints.family import FAMILIES
    from fastdiff.checkpoints.single_file import Weights

    torch.manual_seed(0)
    base = Checkpoint("sd15", FAMILIES["sd15"].home, FAMILIES["sd15"])
    unet = UNet2DConditionModel.from_config(base.config_of("unet")).eval()
    vae = AutoencoderKL.from_config(base.config_of("vae")).eval()
    parts = {"unet": Weights.of(unet.state_dict()), "vae": Weights.of(vae.state_dict())}
    parts["text_encoder"] = Weights.of({name: torch.randn(shape) * 0.02 for name, shape in base.shapes("text_encoder").items()})
    write.to_file(base, tmp_path / "one.safetensors", changed=parts)
    given = {"latents": torch.randn(2, 4, 24, 16), "t": torch.tensor([999.0, 341.0]), "context": torch.randn(2, 77, 768)}
    save_file(given, tmp_path / "given.safetensors")
    with torch.no_grad():
        eps = unet(given["latents"], given["t"], given["context"]).sample
        pixels = vae.decode(given["latents"]).sample
    log, _ = comfyui(DRAW, tmp_path / "one.safetensors", tmp_path / "given.safetensors", tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    off = {k: ((out[k] - own).norm() / own.norm()).item() for k, own in (("eps", eps), ("pixels", pixels))}
    moved = ((out["other"] - eps).norm() / eps.norm()).item()
    print(f"relative differences {off}; another text moves the output by {moved:.1e}")
    assert complaints(log) == []
    assert off["eps"] < 1e-5
    assert off["pixels"] < 1e-4  # the decoder's attention is summed in another order
    assert moved > 1e-3


@pytest.mark.skipif(not COMFYUI, reason="FASTDIFF_COMFYUI is not set")
def test_comfyui_chooses_the_timesteps_of_our_table():
    """Of the full table it takes the nearest whole timestep, of LCM's the nearest of 50; either where two are equally near."""
    from fastdiff.sampling import other_programs

    found = comfyui(TIMES)[1]
    tables = {"full": other_programs.FULL_TABLE, "lcm": other_programs.LCM_TABLE}
    for row, theirs in found.items():
        table, name, n = row.split()
        ours = other_programs.SCHEDULES[name](tables[table], int(n))
        assert len(ours) == len(theirs), row
        gap = 20 if table == "lcm" else 1
        for k, (own, t) in enumerate(zip(ours, theirs, strict=True)):
            if name in {"simple", "ddim_uniform"}:
                assert own == t, row
            else:
                exact = other_programs.evenly(999, tables[table][0], int(n) + (name == "sgm_uniform"))[k]
                halfway = abs(abs(exact - t) - gap / 2) < 1e-6
                assert abs(own - t) <= (gap if halfway else 0.5), (row, ours, theirs)


def adding(file, folder, every, *lora_files):
    """What ComfyUI makes of LoRAs: its log for each, the findings, and {(LoRA, key): (old weight, new weight)}."""
    from safetensors.torch import load_file

    log, found = comfyui(ADD, file, folder / "weights.safetensors", every, *lora_files)
    text = "\n".join(log)
    logs = [part.split("\nINFO LORA read")[0] for part in re.split(r"INFO LORA \d+\n", text + "\n")[1:]]
    tensors = load_file(folder / "weights.safetensors")
    keys = [name.split(" ", 2)[::2] for name in tensors if " old " in name]
    weights = {(int(i), key): (tensors[f"{i} old {key}"], tensors[f"{i} new {key}"]) for i, key in keys}
    return [[line for line in part.splitlines() if SAID.match(line)] for part in logs], found, weights


def computed_otherwise(update, old):
    """The weight where ComfyUI gives this update another formula than the paper and the programs of its kind; else None.

    DoRA by outputs: it divides by the norm of W, not of W + Delta. OFT: it leaves `rescale` out, and takes the constraint for the
    limit itself, where LyCORIS and sd-scripts multiply it by the number of outputs.
    """
    if update.kind == "dora" and not update.on_input:
        view = [-1] + [1] * (old.ndim - 1)
        return (old + update.inner.delta(old).reshape(old.shape)) * (update.magnitude / old.flatten(1).norm(dim=1)).reshape(view)
    if update.kind == "oft" and update.blocks.ndim == 3 and (update.rescale is not None or update.constraint > 0):
        return old + replace(update, rescale=None, constraint=update.constraint / old.shape[0]).delta(old)
    return None


def differences(item, number, found, weights):
    """The relative difference of ComfyUI's change of a weight and ours, for each key that LoRA `number` changed.

    A change that it computes otherwise is compared with its own formula.
    """
    from fastdiff.lora.apply import updated

    off = {}
    for (i, key), (old, new) in weights.items():
        if i == number:
            module, _, kind = key.rpartition(".")
            ending = ".bias" if kind == "bias" else ""
            names = {name + ending for name, theirs in found["names"].items() if theirs == f"{module}.weight"}
            (ours,) = names & set(item.modules)
            own = computed_otherwise(item.modules[ours], old)
            own = updated(old, [(item.modules[ours], 1.0)]) if own is None else own
            rounding = 1e-7 * old.norm()  # of W itself, in fp32: a constraint may leave a change of a thousandth of it
            off[ours] = (((new - own).norm() - rounding).clamp(min=0) / (own - old).norm()).item()
    return off


@pytest.mark.skipif(not COMFYUI, reason="FASTDIFF_COMFYUI is not set")
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_comfyui_adds_our_loras_whole(family, tmp_path):
    """The published LCM-LoRA's layers and those of the text encoders, in each layout that is one file."""
    sys.path.insert(0, str(ROOT / "examples"))
    import torch
    from bake_speed import full_size

    from fastdiff import lora
    from fastdiff.checkpoints import checkpoint
    from fastdiff.lora import writing
    from fastdiff.lora.kinds import Factors
    from fastdiff.lora.layouts import canonical

    file, lora_file = full_size(family, tmp_path)
    base, item = checkpoint.load(str(file)), lora.load(lora_file)
    first = base.family.lora_text_prefix
    for part, prefix in zip(base.text_parts, (first, "lora_te2_"), strict=False):
        for name, shape in base.shapes(part).items():
            if re.search(r"(_proj|fc1|fc2|text_projection)\.weight$", name):
                factors = Factors(torch.randn(4, shape[1]) * 0.1, torch.randn(shape[0], 4) * 0.1)
                item.modules[canonical(prefix, name.removesuffix(".weight"))] = factors
    files = [tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"]
    for path in files:
        writing.save(item, path, format=path.stem)
    logs, found, weights = adding(file, tmp_path, 25, *files)
    assert logs[0] == []
    assert found["changed"][0] == len(item.modules)
    attention = [key for key in item.modules if re.search(r"lora_unet_.*_(to_[qkv]|to_out_0)$", key)]
    skipped = {line.split(": ")[1].rpartition(".lora_")[0] for line in logs[1]}
    print(f"{family}: kohya {found['changed'][0]} of {len(item.modules)}; diffusers skips {len(skipped)}")
    projection = {"lora_text_encoder_2_text_projection"} if len(base.text_parts) > 1 else set()  # no dotted name there either
    assert {f"lora_{name.replace('.', '_')}" for name in skipped} == {*attention, *projection}
    assert found["changed"][1] == len(item.modules) - len(attention) - len(projection)
    for i, path in enumerate(files):
        off = differences(lora.load(path), i, found, weights)
        print(f"{path.stem}: {len(off)} weights, largest relative difference {max(off.values()):.1e}")
        assert len(off) > 8
        assert max(off.values()) < 1e-5


LAYERS = {  # of SD1.5, of each shape that the kinds treat in another way
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (320, 768),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": (320, 768),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (640, 640),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v": (640, 768),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": (320, 1280),
    "down_blocks.0.resnets.0.conv1": (320, 320, 3, 3),
    "down_blocks.1.resnets.0.conv1": (640, 320, 3, 3),
    "down_blocks.1.resnets.1.conv1": (640, 640, 3, 3),
    "down_blocks.1.resnets.0.conv2": (640, 640, 3, 3),
    "down_blocks.0.resnets.0.norm1": (320,),
    "conv_in": (320, 4, 3, 3),
}
KINDS = ("kohya", "locon", "tucker", "loha", "lokr", "full", "glora", "boft", "oft", "dora", "ia3")


@pytest.mark.skipif(not COMFYUI, reason="FASTDIFF_COMFYUI is not set")
def test_comfyui_computes_other_kinds_as_we_do(tmp_path):
    sys.path.insert(0, str(ROOT / "examples"))
    import test_foreign_loras as foreign
    import test_lora_layouts as layouts
    import torch
    from bake_speed import full_size
    from safetensors.torch import load_file, save_file

    from fastdiff import lora

    file, _ = full_size("sd15", tmp_path)
    makers = {name: getattr(layouts, name) for name in KINDS}  # the functions of that module
    makers["kohya"] = lambda made, sdxl: layouts.kohya(made, sdxl, parts=["unet"])
    makers |= {
        # not flat differences, which ComfyUI refuses by their shape
        f"flat {kind}": lambda made, sdxl, k=kind: foreign.flat_convs(made, sdxl, k)
        for kind in ("loha", "lokr", "lora")
    }
    files = {}
    for name, maker in makers.items():
        made = layouts.Made.__new__(layouts.Made)
        made.generator, made.tensors, made.expected = torch.Generator().manual_seed(0), {}, {}
        weights = {f"{layer}.weight": torch.zeros(shape) for layer, shape in LAYERS.items()}
        biases = {f"{layer}.bias": torch.zeros(shape[0]) for layer, shape in LAYERS.items() if "attn" not in layer}
        made.parameters = {"unet": weights | biases}
        maker(made, False)
        files[name] = tmp_path / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in made.tensors.items()}, files[name])
    logs, found, weights = adding(file, tmp_path, 1, *files.values())
    for i, (name, path) in enumerate(files.items()):
        item = lora.load(path)
        if name == "ia3":  # it knows no IA3, and says so of every key
            assert (found["changed"][i], len(logs[i])) == (0, len(load_file(path)))
            continue
        off = differences(item, i, found, weights)
        print(f"{name}: {len(off)} layers, differences {', '.join(f'{value:.1e}' for value in off.values())}; said {logs[i]}")
        assert (logs[i], len(off)) == ([], len(item.modules)), name
        assert max(off.values()) < 1e-5, name


@pytest.mark.skipif(not COMFYUI, reason="FASTDIFF_COMFYUI is not set")
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_we_read_what_comfyui_saves(family, tmp_path):
    sys.path.insert(0, str(ROOT / "examples"))
    from bake_speed import full_size

    from fastdiff import lora
    from fastdiff.checkpoints import checkpoint
    from fastdiff.lora import apply

    file, _ = full_size(family, tmp_path)
    comfyui(SAVE, file, tmp_path)
    base = checkpoint.load(str(file))
    table = {}
    for part, prefix in zip(("unet", *base.text_parts), apply.prefixes(len(base.text_parts)).values(), strict=True):
        table |= apply.places(base.shapes(part), prefix)
    texts = {key for key in table if not key.startswith("lora_unet_")}
    for name, wanted in (("standard", set(table)), ("full", texts)):
        item = apply.encoders([(lora.load(tmp_path / f"{name}.safetensors"), 1.0)], len(base.text_parts))[0][0]
        # CLIP-L's projection, which ComfyUI alone has: nothing differs there, and an update of zero needs no layer.
        assert item.modules.keys() - table.keys() <= {f"{base.family.lora_text_prefix}text_projection"}
        assert wanted - item.modules.keys() == set()
        assert all(apply.fits(item.modules[key], table[key].shape) for key in wanted)
        print(f"{family} {name}: all {len(wanted)} parameters")


# ---- prompts

WORDS = "a photo of an old wooden house by the lake, autumn leaves, warm light, mist over the water, "
LONG = (WORDS * 9).strip()  # 198 tokens: three windows
LINES = ["a red apple", LONG, f"{WORDS}(a red boat:1.3), (fog:0.6), {WORDS * 4}", "a (very old:1.1) tree (in the rain:-0.5)", ""]


def with_text_encoders(family, layers=None, **how):
    """A checkpoint of the family with full-size text encoders of random weights. With `layers` they have only so many."""
    import torch
    import transformers

    from fastdiff.checkpoints.checkpoint import Checkpoint
    from fastdiff.checkpoints.family import FAMILIES

    base = Checkpoint(family, FAMILIES[family].home, FAMILIES[family], **how)
    encoders = []
    for part in base.text_parts:
        torch.manual_seed(len(encoders))
        config = transformers.CLIPTextConfig(**base.config_of(part) | ({"num_hidden_layers": layers} if layers else {}))
        encoders.append(getattr(transformers, base.index[part][1])(config).eval().requires_grad_(False))
    base.__dict__["text_encoders"] = encoders
    return base


def apart(ours, theirs):
    """The largest difference of two tensors, beside the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.skipif(not COMFYUI, reason="FASTDIFF_COMFYUI is not set")
@pytest.mark.parametrize(("family", "skip"), [("sd15", 0), ("sd15", 2), ("sdxl", 0), ("sdxl", 1)])
def test_comfyui_reads_prompts_as_we_do(family, skip, tmp_path):
    """Long ones, and weights; with the layer that its node CLIP Set Last Layer is set to."""
    from safetensors.torch import load_file, save_file

    from fastdiff.models import text

    base = with_text_encoders(family, clip_skip=skip)
    for name, encoder in zip(("l", "g"), base.text_encoders, strict=False):
        state = {k if k.startswith("text_") else f"text_model.{k}": v for k, v in encoder.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / f"clip_{name}.safetensors")
    layer = base.family.clip_skip_elsewhere + skip if skip else 0
    comfyui(ENCODE, tmp_path, tmp_path / "found", json.dumps(LINES), layer)
    theirs = load_file(tmp_path / "found")
    for i, line in enumerate(LINES):
        ours = text.encode(base, [line])
        assert ours.tokens.shape == theirs[f"{i} states"].shape
        found = {"states": apart(ours.tokens, theirs[f"{i} states"])}
        if ours.pooled is not None:
            found["pooled"] = apart(ours.pooled, theirs[f"{i} pooled"])
        print(f"ComfyUI, {family}, clip skip {skip}, {tuple(ours.tokens.shape)}: {found}")
        assert max(found.values()) < 1e-4


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_compel_reads_long_prompts_as_we_do(family):
    compel = pytest.importorskip("compel")
    from fastdiff.models import text

    base, windows = with_text_encoders(family), compel.SplitLongTextMode.BRUTAL  # else it looks for the ends of sentences
    for encoder in base.text_encoders:  # where compel looks for the last norm; transformers 5 has moved it
        if not hasattr(encoder, "text_model"):
            vars(encoder)["text_model"] = encoder
    if base.family.size_conditioned:
        layer = compel.ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        how = dict(returned_embeddings_type=layer, requires_pooled=[False, True])
        parts = base.tokenizers, base.text_encoders
    else:
        how, parts = {}, (base.tokenizers[0], base.text_encoders[0])
    made = compel.Compel(*parts, truncate_long_prompts=False, split_long_text_mode=windows, **how)
    for line in LINES[:2]:
        theirs, ours = made(line), text.encode(base, [line])
        theirs, pooled = theirs if isinstance(theirs, tuple) else (theirs, None)
        assert ours.tokens.shape == theirs.shape
        found = {"states": apart(ours.tokens, theirs)}
        if pooled is not None:
            found["pooled"] = apart(ours.pooled, pooled)
        print(f"compel, {family}, {tuple(theirs.shape)}: {found}")
        assert max(found.values()) < 1e-4
