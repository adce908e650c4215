"""inspect: what a file is, from its header."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora_layouts import ROWS, Made

from fastdiff import cli
from fastdiff.checkpoints import checkpoint, tensors, write
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.checkpoints.locate import EMOJI
from fastdiff.commands import inspect


def told(capfd, *args, code=0):
    capfd.readouterr()
    assert cli.main(["inspect", *map(str, args), "--json"]) == code
    return json.loads(capfd.readouterr().out)


def test_a_lora_with_its_recipe_ranks_and_coverage(capfd, tmp_path):
    found = told(capfd, EMOJI / "style.safetensors", "--base", "emoji")["metrics"]
    assert (found["kind"], found["family"], found["supported"], found["safe"]) == ("LoRA", "emoji", True, True)
    assert (found["modules"], found["kinds"], found["rank_min"], found["rank_max"]) == (277, {"lora": 277}, 16, 16)
    assert (found["layouts"], found["components"], found["scales"]) == (["kohya"], ["unet"], [1.0])
    assert found["coverage"]["applied"] == found["coverage"]["total"] == 277
    assert found["recipe"] == {"family": "emoji"}
    tensors_ = load_file(EMOJI / "style.safetensors")
    renamed = {k.replace("mid_block", "mid_bluck"): v for k, v in tensors_.items()}
    save_file(renamed, tmp_path / "odd.safetensors")
    found = told(capfd, tmp_path / "odd.safetensors", "--base", "emoji")["metrics"]["coverage"]
    assert 0 < found["applied"] < found["total"] == 277
    assert all("mid_bluck" in name for name in found["missing"])


LAYOUT = {
    "K1 kohya, diffusers names": ("kohya", "lora"), "K2 kohya, LDM names": ("kohya, LDM names", "lora"),
    "D0 diffusers oldest": ("diffusers before 0.18", "lora"), "D1 diffusers mid": ("diffusers 0.18", "lora"),
    "D2 diffusers now": ("diffusers", "lora"), "P raw peft": ("peft", "lora"), "L3 LoHa": ("kohya", "loha"),
    "L4 LoKr": ("kohya", "lokr"), "L5 full, norm, bias": ("kohya", "full"), "L6 IA3": ("kohya", "ia3"),
    "L7 GLoRA": ("kohya", "glora"), "L7 OFT": ("kohya", "oft"), "X DoRA kohya": ("kohya", "dora"),
    "X DoRA peft": ("diffusers", "dora"), "S SimpleTuner": ("LyCORIS", "lora"),
}  # fmt: skip


@pytest.mark.parametrize("row", LAYOUT)
def test_layouts_and_kinds_are_named(row, tiny_sd, tmp_path, capfd):
    made = Made(checkpoint.load(str(tiny_sd)))
    ROWS[row](made, False)
    save_file({k: v.contiguous() for k, v in made.tensors.items()}, tmp_path / "x.safetensors")
    found = told(capfd, tmp_path / "x.safetensors", "--base", tiny_sd)["metrics"]
    assert found["supported"], found
    layout, kind = LAYOUT[row]
    assert layout in found["layouts"]
    assert max(found["kinds"], key=found["kinds"].get) == kind
    assert found["coverage"]["applied"] == found["coverage"]["total"] == found["modules"]


def test_checkpoints_folders_and_others(capfd, tmp_path, tiny_sd):
    write.to_file(checkpoint.load("emoji"), tmp_path / "emoji.safetensors")
    found = told(capfd, tmp_path / "emoji.safetensors")["metrics"]
    assert (found["kind"], found["prediction_type"], found["prediction_by"]) == ("checkpoint", "epsilon", "its header")
    assert {part: row["missing_count"] for part, row in found["components"].items()} == {"unet": 0, "vae": 0, "text_encoder": 0}
    tensors_ = load_file(tmp_path / "emoji.safetensors")
    gone = [k for k in tensors_ if k.startswith("first_stage_model.decoder.up.0")]
    save_file({k: v for k, v in tensors_.items() if k not in gone}, tmp_path / "torn.safetensors")
    found = told(capfd, tmp_path / "torn.safetensors")["metrics"]
    assert found["components"]["vae"]["missing_count"] == len(gone) > 0
    assert found["supported"] is False
    found = told(capfd, tiny_sd)["metrics"]
    assert (found["kind"], found["family"], found["supported"]) == ("diffusers folder", "sd15", True)
    save_file({"model.diffusion_model.joint_blocks.0.weight": torch.ones(1)}, tmp_path / "sd3.safetensors")
    found = told(capfd, tmp_path / "sd3.safetensors")["metrics"]
    assert (found["kind"], found["supported"], found["safe"]) == ("other", False, True)
    assert found["why_not"].startswith("a Stable Diffusion 3 checkpoint")
    save_file({"something.else": torch.ones(1)}, tmp_path / "what.safetensors")
    assert "not a Stable Diffusion checkpoint" in told(capfd, tmp_path / "what.safetensors")["metrics"]["why_not"]
    assert told(capfd, tmp_path / "gone.safetensors", code=2)["error"]["kind"] == "usage"
    (tmp_path / "bad.safetensors").write_bytes(b"junk")
    assert told(capfd, tmp_path / "bad.safetensors", code=3)["metrics"]["kind"] == "damaged"


def test_no_weight_is_read(tmp_path, monkeypatch):
    """A 7 GB file, of holes: its header alone is touched."""
    base = checkpoint.Checkpoint("sdxl", FAMILIES["sdxl"].home, FAMILIES["sdxl"])
    entries, offset = {}, 0
    for part in base.parts:
        shapes = base.shapes(part)
        for slot in base.slots(part, shapes):
            first = shapes[slot.parts[0]]
            shape = [first[0] * len(slot.parts), *first[1:]] if slot.form != "transposed" else list(first[::-1])
            size = 2 * torch.Size(shape).numel()
            entries[slot.name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
    text = json.dumps(entries).encode()
    path = tmp_path / "xl.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    assert path.stat().st_size > 6.9e9
    monkeypatch.setattr(tensors.TensorFile, "__getitem__", lambda self, name: pytest.fail(f"{name} was read"))
    metrics = inspect.run(inspect.Config(str(path))).metrics
    assert (metrics["family"], metrics["prediction_type"], metrics["supported"]) == ("sdxl", "epsilon", True)
