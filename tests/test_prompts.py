"""How prompts and captions are read: windows of long ones, weights, BREAK, LoRA tags, and which layer of the text encoder."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data import teacher
from fastdiff.data.open import open_data
from fastdiff.models import prompt, text
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.models.prompt import Part, parse
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused, UsageError
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings

SIZE = 10  # tokens of a window of the tiny text encoders, which read 12 with the two marks
LONG = " ".join("abcdefghijklmnopqrstuvwxy")  # 25 tokens there: three windows
TOO_LONG = " ".join("abcdefghijklmnopqrstuvwxyz" * 2)  # 52 tokens


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request, tmp_path_factory):
    """A small checkpoint whose text encoders have five layers."""
    import transformers

    folder = build(tmp_path_factory.mktemp("deep") / request.param, request.param, "epsilon")
    for part in ("text_encoder", "text_encoder_2"):
        if (path := folder / part / "config.json").exists():
            config = json.loads(path.read_text())
            torch.manual_seed(len(part))
            kind = getattr(transformers, config["architectures"][0])
            kind(transformers.CLIPTextConfig(**config | {"num_hidden_layers": 5})).save_pretrained(folder / part)
    return folder


@pytest.fixture(autouse=True)
def fresh():
    """Every test hears all lines, also those that are told once a command."""
    console.reset()


# ---- reading


@pytest.mark.parametrize(
    ("line", "parts", "kinds"),
    [
        ("a red apple", [("a red apple", 1)], ""),
        ("", [("", 1)], ""),
        ("a (red:1.3) apple", [("a ", 1), ("red", 1.3), (" apple", 1)], "weight"),
        ("(a (red:2) apple:0.5)", [("a ", 0.5), ("red", 1), (" apple", 0.5)], "weight"),
        ("(red apple: .5), x", [("red apple", 0.5), (", x", 1)], "weight"),
        ("(dull:-1)", [("dull", -1)], "weight"),
        ("saber (fate) and (b:1.2)", [("saber (fate) and ", 1), ("b", 1.2)], "weight bare"),
        (r"saber_\(fate\), \[x\]", [("saber_(fate), [x]", 1)], ""),
        ("(a BREAK b:1.2) (c", [("a", 1.2), ("b", 1.2), (" (c", 1)], "weight break bare"),
        ("（a：1.3）", [("（a：1.3）", 1)], "bare"),
        (r"(saber \(fate\):1.5)", [("saber (fate)", 1.5)], "weight"),
        ("at (10:30) in 16:9", [("at (10:30) in 16:9", 1)], "bare"),  # a time, not a weight
        ("(loud:99)", [("(loud:99)", 1)], "bare"),
        ("a ) b ( c", [("a ) b ( c", 1)], "bare"),
        ("((a:1.1)", [("(", 1), ("a", 1.1)], "weight bare"),
        ("cat <lora:anime:0.8> <LYCO:x> dog", [("cat dog", 1)], "lora"),
        ("a\n  red\tapple", [("a red apple", 1)], ""),
        ("caf\udce9 \ufffd\u200bx", [("caf x", 1)], "cleaned"),
        ("<lora:anime:1>", [("", 1)], "lora"),
        ("i <3 you > me", [("i <3 you > me", 1)], ""),
        ("[cat:dog:0.5] [x]", [("[cat:dog:0.5] [x]", 1)], "square"),
        ("cat AND dog", [("cat AND dog", 1)], "and"),
        ("sand and BREAKING", [("sand and BREAKING", 1)], ""),
        ("embedding:easynegative", [("embedding:easynegative", 1)], "embedding"),
        ("a __colour__ {cat|dog}", [("a __colour__ {cat|dog}", 1)], "wildcard"),
    ],
)
def test_what_a_prompt_says(line, parts, kinds):
    read = parse(line)
    assert [(part.text, pytest.approx(part.weight)) for part in read.parts] == parts
    assert read.kinds == set(kinds.split())


def test_break_begins_a_window():
    read = parse("a cat, BREAK, (a dog:1.2) BREAK")
    assert read.sections == ((Part("a cat"),), (Part("a dog", 1.2),))
    assert read.kinds == {"break", "weight"}


def states_by_hand(base, line, layer=-1, windows=3):
    """The states (L, D) of a prompt of words, by transformers alone: its ids in pieces, each between marks and padded."""
    columns = []
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders, strict=True):
        start, *ids, end = tokenizer(line, truncation=False).input_ids
        pieces = [ids[i : i + SIZE] for i in range(0, len(ids), SIZE)][:windows] or [[]]
        rows = [[start, *piece, end] + [tokenizer.pad_token_id] * (SIZE - len(piece)) for piece in pieces]
        out = encoder(torch.tensor(rows), output_hidden_states=True)
        if base.family.name == "sdxl":
            states, pooled = out.hidden_states[layer - 1], out.get("text_embeds")
        else:
            states, pooled = text.norm_of(encoder)(out.hidden_states[layer]), None
        columns.append(states.flatten(0, 1))
    return torch.cat(columns, -1), None if pooled is None else pooled[0]


@pytest.mark.parametrize("line", ["", "a", " ".join("a" * SIZE), " ".join("a" * (SIZE + 1)), LONG, TOO_LONG])
def test_a_long_prompt_is_read_in_windows(line, base):
    opened = checkpoint.load(str(base))
    with torch.no_grad():
        states, pooled = states_by_hand(opened, line)
    for found in (text.encode(opened, [line]), text.Prompts(checkpoint.load(str(base)))([line])):
        torch.testing.assert_close(found.tokens[0], states, atol=1e-5, rtol=1e-5)
        if pooled is not None:
            torch.testing.assert_close(found.pooled[0], pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("max_tokens", "windows"), [(75, 1), (150, 2), (225, 3), (300, 4)])
def test_max_tokens_says_how_many_windows(max_tokens, windows, base):
    opened = checkpoint.load(str(base), max_tokens=max_tokens)
    with torch.no_grad():
        states, _ = states_by_hand(opened, TOO_LONG, windows=windows)
    torch.testing.assert_close(text.encode(opened, [TOO_LONG]).tokens[0], states, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match=r"`max_tokens=100`: not a multiple of 75"):
        checkpoint.load(str(base), max_tokens=100)


def test_a_weight_moves_the_states_of_its_words(base):
    opened = checkpoint.load(str(base))
    plain, empty = (text.encode(opened, [line]).tokens[0] for line in ("a b c d", ""))
    for w in (1.3, 0.5, 0, -1):
        for encode in (lambda lines: text.encode(opened, lines), text.Prompts(checkpoint.load(str(base)))):
            found = encode([f"a (b c:{w}) d"])
            wanted = plain.clone()
            wanted[2:4] = empty[2:4] + w * (plain[2:4] - empty[2:4])  # 0 is the start mark, 1 is "a"
            torch.testing.assert_close(found.tokens[0], wanted, atol=1e-5, rtol=1e-5)
    if plain_pooled := text.encode(opened, ["a b c d"]).pooled is not None:
        assert plain_pooled
        assert torch.equal(text.encode(opened, ["a (b c:2) d"]).pooled, text.encode(opened, ["a b c d"]).pooled)


def test_tags_and_escapes_change_no_state(base):
    opened = checkpoint.load(str(base))
    found = text.encode(opened, ["a cat", "a cat <lora:x:1>", r"a \(cat\)", "a (cat)", "(a cat:1)"]).tokens
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[4], found[0])
    assert torch.equal(found[2], found[3])
    assert not torch.equal(found[2], found[0])


def test_break_is_two_prompts_one_after_the_other(base):
    opened = checkpoint.load(str(base))
    one, two = text.encode(opened, ["a cat", "a dog"]).tokens
    found = text.encode(opened, ["a cat BREAK a dog"])
    torch.testing.assert_close(found.tokens[0], torch.cat([one, two]), atol=1e-6, rtol=1e-5)


def test_a_short_weighted_part_is_not_divided(base):
    reader = text.StockTokens(checkpoint.load(str(base)).tokenizers[0])
    read = lambda line: [len(window) for window in prompt.windows_of([parse(line)], reader, 225)[0].windows]
    assert read("a b c d e f g (h i j k:1.1)") == [7, 4]
    assert read("a b c d e f g (h i j k l m n o:1.1)") == [10, 5]
    assert read("a b c d e f g h i j k") == [10, 1]


# ---- rows of different lengths


def test_repeated_states_change_no_answer(base):
    """So a long prompt and a short one can be drawn together, and training batches mix them."""
    opened = checkpoint.load(str(base))
    torch.manual_seed(0)
    denoiser, x, t = Denoiser.of(opened), torch.randn(1, 4, 8, 8), torch.tensor(500)
    short, long = (c.map(lambda v: v) for c in (text.encode(opened, ["a cat"]), text.encode(opened, [LONG])))
    both = Cond.cat([short, long])
    assert both.tokens.shape[1] == math.lcm(12, 36)
    if opened.family.size_conditioned:
        ids = text.size_ids(64, 64)
        short, long, both = (replace(c, time_ids=ids.expand(len(c), 6)) for c in (short, long, both))
    with torch.no_grad():
        alone = torch.cat([denoiser(x, t, c).x0 for c in (short, long)])
        together = denoiser(x.expand(2, -1, -1, -1), t, both).x0
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


def test_pictures_do_not_depend_on_the_prompts_beside(base):
    sampler = Sampler(str(base), device="cpu", compile="off")
    settings = Settings("ddim", 2, 3.0)
    _, uncond = sampler.conds([""])
    lines = ["a cat", LONG, "a " * 15, "cat"]
    together = sampler.pixels(sampler.conds(lines)[0], uncond, [1, 2, 3, 4], settings, resolution_px=64)
    for i, line in enumerate(lines):
        alone = sampler.pixels(sampler.conds([line])[0], uncond, [i + 1], settings, resolution_px=64)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=0)


# ---- training


def folder_of(tmp_path, captions):
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, caption in enumerate(captions):
        Image.effect_noise((64, 64), 40 + i).convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def test_captions_are_trained_as_prompts_are_drawn(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    lines = ["a cat", LONG, TOO_LONG, "a (b:1.5) c", "a <lora:x:1> b", "saber (fate)", "a BREAK b"]
    folder, opened = folder_of(tmp_path, lines), checkpoint.load(str(base))
    data = open_data(opened, str(folder), resolution_px=64)
    drawn = text.Prompts(checkpoint.load(str(base)))
    for i, line in enumerate(lines):
        row = data.captions[[n == f"{i}.png" for n in data.names].index(True)]
        torch.testing.assert_close(data.texts[row].tokens, drawn([line]).tokens, atol=2e-3, rtol=2e-3)  # stored as fp16
    data.empty_prompts = 0.5
    batch = data.batch(16, torch.Generator().manual_seed(0))
    assert batch.cond.tokens.shape[1] == math.lcm(12, 24, 36)
    told = " ".join(capsys.readouterr().err.split())
    source = f"--data {folder}".replace("--data ", "")
    assert source in told
    for line in (
        "1 of 7 captions do not fit into 3 windows of 10 tokens, and the rest is left out (`max_tokens=225`); of the first, "
        "which has 52 tokens:",
        "4 of 7 captions are read in several windows of 10 tokens",
        "1 of 7 captions weigh words, as (word:1.3): the weights are obeyed",
        "1 of 7 captions name LoRAs",
        "1 of 7 captions have brackets that are read as text",
        "1 of 7 captions have BREAK",
    ):
        assert line in told, line


def test_captions_of_other_rules_are_not_taken_from_the_cache(base, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    folder, lengths = folder_of(tmp_path, [LONG, "a"]), []
    for how in ({}, {"max_tokens": 75}, {"clip_skip": 1}):
        opened = checkpoint.load(str(base), **how)
        data = open_data(opened, str(folder), resolution_px=64)
        wanted = text.encode(checkpoint.load(str(base), **how), [LONG])
        row = data.captions[data.names.index("0.png")]
        torch.testing.assert_close(data.texts[row].tokens, wanted.tokens, atol=2e-3, rtol=2e-3)
        lengths.append(wanted.tokens.shape[1])
    assert lengths == [36, 12, 36]


def test_the_teacher_draws_long_prompts_whole(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    settings, lines = Settings("ddim", 2, 3.0), ["a cat", TOO_LONG]
    folders = set()
    for how in ({}, {"max_tokens": 75}, {"clip_skip": 2}):
        opened = checkpoint.load(str(base), **how)
        data = teacher.encode(opened, lines, 64, settings, pairs=2, seed=0)
        sampler = Sampler(checkpoint.load(str(base), **how), device="cpu", compile="off")
        cond, uncond = sampler.conds(lines)
        if opened.family.size_conditioned:
            cond, uncond = (teacher.with_size(c, 64) for c in (cond, uncond))
        latents = torch.cat([sampler.latents(cond[i : i + 1], uncond, [teacher.rng.PAIRS(i)], settings, (8, 8)) for i in (0, 1)])
        torch.testing.assert_close(data.latents, latents, atol=4e-3, rtol=4e-3)
        assert data.batch(4, torch.Generator().manual_seed(1)).cond.tokens.shape[1] % 12 == 0
        folders |= set((tmp_path / "cache").glob("teacher-*"))
    assert len(folders) == 3
    assert "prompts: 1 of 2 prompts do not fit into 3 windows of 10 tokens" in capsys.readouterr().err.replace("`", "").replace(
        "--", ""
    )


# ---- sampling


def test_a_cut_prompt_is_told_with_what_is_left_out(base, capsys):
    sampler = Sampler(str(base), device="cpu", compile="off")
    sampler.conds([TOO_LONG, "b"], negative=LONG)
    told = " ".join(capsys.readouterr().err.split())
    assert "prompt`: 1 of 2 prompts do not fit into 3 windows of 10 tokens, and the rest is left out" in told
    assert repr("efghijklmnopqrstuvwxyz") in told.replace(" ", "")  # the tiny tokenizer knows no words
    assert "`negative`: 1 of 1 prompts are read in several windows of 10 tokens" in told


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_is_diffusers(skip, base, capsys):
    opened = checkpoint.load(str(base), clip_skip=skip)
    pipeline = checkpoint.load(str(base)).pipeline()
    if not hasattr(pipeline.text_encoder, "text_model"):  # where diffusers looks for the norm; transformers 5 has moved it
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    how = dict(device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, clip_skip=skip)
    wanted = pipeline.encode_prompt("a cat", **how)
    for found in (text.encode(opened, ["a cat"]), text.Prompts(checkpoint.load(str(base), clip_skip=skip))(["a cat"])):
        torch.testing.assert_close(found.tokens, wanted[0], atol=1e-5, rtol=1e-5)
        if found.pooled is not None:
            torch.testing.assert_close(found.pooled, wanted[2], atol=1e-5, rtol=1e-5)
    assert not torch.equal(found.tokens, text.encode(checkpoint.load(str(base)), ["a cat"]).tokens)
    usual = 1 if opened.family.name == "sd15" else 2
    assert f"other programs call this clip skip {usual + skip}" in " ".join(capsys.readouterr().err.split())


def test_clip_skip_leaves_a_layer(base):
    most = 4 if "sd15" in str(base) else 3
    assert checkpoint.load(str(base), clip_skip=most).skipped_layers == most
    with pytest.raises(UsageError, match=rf"`clip_skip={most + 1}`: text_encoder has 5 layers"):
        checkpoint.load(str(base), clip_skip=most + 1)


def test_a_recipe_says_clip_skip_and_the_user_overrules_it(base, tmp_path):
    opened = checkpoint.load(str(base))
    net, name = opened.unet, next(n for n, m in opened.unet.named_modules() if n.endswith("attn2.to_q"))
    width = net.get_submodule(name).weight.shape
    matrices = {f"unet.{name}.lora_A.weight": torch.zeros(1, width[1]), f"unet.{name}.lora_B.weight": torch.zeros(width[0], 1)}
    from safetensors.torch import save_file

    save_file(matrices, tmp_path / "x.safetensors", Recipe(method="lcm", scheduler="lcm", clip_skip=2).to_metadata())
    assert lora.load(tmp_path / "x.safetensors").recipe.clip_skip == 2
    drawn = lambda **how: Sampler(str(base), loras=[str(tmp_path / "x.safetensors")], device="cpu", compile="off", **how)
    wanted = {skip: text.encode(checkpoint.load(str(base), clip_skip=skip), ["a cat"]).tokens for skip in (0, 1, 2)}
    for found, skip in ((drawn(), 2), (drawn(clip_skip=0), 0), (drawn(clip_skip=1), 1), (drawn(recipe="none"), 0)):
        torch.testing.assert_close(found.conds(["a cat"])[0].tokens, wanted[skip], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", ["-1", "x"])
def test_a_malformed_clip_skip_in_a_header_is_refused(value):
    with pytest.raises(ValueError, match=r"fastdiff\.clip_skip is"):
        Recipe.from_metadata({"fastdiff.clip_skip": value})


def lora_file(base, path, **header):
    """A LoRA of one layer that changes nothing, with a header."""
    from safetensors.torch import save_file

    net = base.unet
    name = next(n for n, _ in net.named_modules() if n.endswith("attn2.to_q"))
    outputs, inputs = net.get_submodule(name).weight.shape
    matrices = {f"unet.{name}.lora_A.weight": torch.zeros(1, inputs), f"unet.{name}.lora_B.weight": torch.zeros(outputs, 1)}
    save_file(matrices, path, header)
    return str(path)


@pytest.mark.parametrize(
    ("said", "told"), [("2", "clip skip 2 as sd-scripts counts, which is `clip_skip=1`"), ("1", ""), ("None", "")]
)
def test_a_lora_that_was_trained_with_another_clip_skip_is_told(said, told, base, tmp_path, capsys):
    opened = checkpoint.load(str(base))
    file = lora_file(opened, tmp_path / "style.safetensors", ss_clip_skip=said, ss_network_module="networks.lora")
    Sampler(str(base), loras=[file], device="cpu", compile="off")
    err = " ".join(capsys.readouterr().err.split())
    assert (f"style.safetensors: its header says that it was trained with {told}" in err) == bool(
        told and opened.family.name == "sd15"  # sd-scripts has no clip skip for SDXL
    )
    Sampler(str(base), loras=[file], clip_skip=1, device="cpu", compile="off")
    assert ("its header says" in capsys.readouterr().err) == (said == "1" and opened.family.name == "sd15")


def test_a_trained_lora_carries_clip_skip_in_its_header_and_card(tiny_sd, tmp_path, monkeypatch, capfd):
    from fastdiff import cli

    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a cat\n" + "a " * 40)
    how = ["--base", str(tiny_sd), "--data", "teacher", "--prompts", str(tmp_path / "prompts.txt"), "--pairs", "2"]
    few = ["--teacher-steps", "1", "--steps", "1", "--batch-size", "2", "--clip-skip", "1", "-o", str(tmp_path / "run")]
    assert cli.main(["train-lcm-lora", *how, *few]) == 0
    err = " ".join(capfd.readouterr().err.split())
    assert "--clip-skip 1: 1 layer less of each text encoder than is usual for sd15, as diffusers counts" in err
    assert "1 of 2 prompts do not fit into 3 windows of 10 tokens, and the rest is left out (--max-tokens 225)" in err
    file = tmp_path / "run" / "lcm.safetensors"
    assert lora.load(file).recipe.clip_skip == 1
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| clip skip | 1 as diffusers counts, 2 in other programs |" in card
    assert "num_inference_steps=4, clip_skip=1" in card
    assert 'if not hasattr(pipe.text_encoder, "text_model")' in card
    drawn = ["sample", "--base", str(tiny_sd), "--lora", str(file), "--prompt", "a", "-o", str(tmp_path / "a.png")]
    assert cli.main(drawn) == 0
    assert "other programs call this clip skip 2" in " ".join(capfd.readouterr().err.split())


# ---- around it


def test_our_own_loras_are_not_called_wrong(tmp_path):
    """The embedded checkpoint shares its architecture with SD1; its LoRAs name both."""
    from fastdiff.checkpoints.family import FAMILIES
    from fastdiff.lora import identify

    shapes = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (64, 128)}
    header = {"fastdiff.family": "emoji", "modelspec.architecture": "stable-diffusion-v1/lora"}
    assert identify.wrong_claims(shapes, header) == {}
    assert identify.wrong_claims(shapes, {**header, "fastdiff.family": ""}) == {"modelspec.architecture": FAMILIES["sd15"]}


@pytest.mark.parametrize("data", ["folder", "teacher"])
def test_a_run_that_goes_on_with_other_data_says_so(data, tiny_sd, tmp_path, monkeypatch, capfd):
    from fastdiff import cli

    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    pictures, prompts = folder_of(tmp_path, ["a cat", "a dog", "a cow", "a hen"]), tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    source = ["--data", str(pictures)] if data == "folder" else ["--data", "teacher", "--prompts", str(prompts), "--pairs", "2"]
    how = [*source, "--base", str(tiny_sd), "--teacher-steps", "1", "--batch-size", "2", "-o", str(tmp_path / "run")]
    said = []
    for steps in (1, 2, 3):
        if steps == 3:
            (pictures / "0.txt").write_text("a fox")
            prompts.write_text("a cat\na fox\n")
        assert cli.main(["train-lcm-lora", *how, "--steps", str(steps), "--save-every", "1"]) == 0
        said.append("have changed since the state of this run was saved" in " ".join(capfd.readouterr().err.split()))
    assert said == [False, False, True]


def test_prompt_files_tell_what_is_no_prompt(tmp_path, capsys):
    from fastdiff.data.prompts import read_prompts

    (tmp_path / "a.txt").write_text("# a comment\na cat\n#1 fan of apples\n")
    assert read_prompts(tmp_path / "a.txt") == ["a cat"]
    assert "1 of its lines, as '#1 fan of apples', begin with #" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "b.txt").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    with pytest.raises(UsageError, match="its lines are JSON, not prompts"):
        read_prompts(tmp_path / "b.txt")


# ---- clip skip, once more: where it is lost or doubtful


def header(folder, **entries):
    (folder / "fastdiff.json").write_text(json.dumps({f"fastdiff.{name}": value for name, value in entries.items()}))
    return str(folder)


@pytest.fixture
def skipping(base, tmp_path):
    """The checkpoint, with a header that says clip skip 1."""
    import shutil

    shutil.copytree(base, tmp_path / "skipping")
    return header(tmp_path / "skipping", method="prune", clip_skip="1")


def test_stock_code_draws_the_same_with_clip_skip_and_guidance(base, skipping):
    from fastdiff.sampling.stock_code import stock_code

    sampler = Sampler(skipping, device="cpu", compile="off")
    for settings in (Settings("ddim", 3, 5.0, "leading"), Settings("ddim", 3, 5.0, "leading", step_guidance=(1.0, 5.0, 2.0))):
        ours = sampler.pixels(*sampler.conds(["a cat"]), [3], settings, resolution_px=64) * 127.5 + 127.5
        pipe = checkpoint.load(skipping).pipeline()
        pipe.set_progress_bar_config(disable=True)
        code = stock_code(checkpoint.load(skipping), settings)
        found = {"pipe": pipe, "prompt": "a cat", "seed": 3}
        exec(code.replace("generator=", "height=64, width=64, generator="), found)
        theirs = torch.from_numpy(np.array(found["image"])).permute(2, 0, 1)
        assert (ours[0] - theirs).abs().max() < 2, settings


def test_a_stored_clip_skip_is_told_kept_and_checked(base, skipping, tmp_path, capsys):
    from fastdiff.lora import merging

    opened = checkpoint.load(skipping)
    assert "clip skip 1: 1 layer less" in " ".join(capsys.readouterr().err.split())
    plain = lora_file(opened, tmp_path / "plain.safetensors", **Recipe(method="lcm", scheduler="lcm", num_steps=4).to_metadata())
    merging.bake(skipping, [plain], tmp_path / "baked")
    assert checkpoint.load(str(tmp_path / "baked")).recipe.clip_skip == 1
    saying = [
        lora_file(opened, tmp_path / f"{n}.safetensors", **Recipe(scheduler="lcm", clip_skip=n).to_metadata()) for n in (0, 2)
    ]
    merging.bake(skipping, saying, tmp_path / "both")
    assert checkpoint.load(str(tmp_path / "both")).skipped_layers == 0
    assert "was trained with clip skip 2" in " ".join(capsys.readouterr().err.split())
    console.reset()
    Sampler(str(base), loras=[saying[1]], clip_skip=1, device="cpu", compile="off")
    assert "the weights were trained with clip skip 2, but pictures are drawn with 1" in " ".join(capsys.readouterr().err.split())
    broken = header(Path(skipping), clip_skip="30")
    with pytest.raises(InputRefused, match=r"clip skip 30: text_encoder has 5 layers"):
        checkpoint.load(broken)


@pytest.mark.parametrize(
    "how", [{"clip_skip": -1}, {"clip_skip": "1"}, {"clip_skip": True}, {"max_tokens": 7500}, {"max_tokens": "75"}]
)
def test_values_that_are_none_are_refused(how, base):
    with pytest.raises(UsageError, match=rf"`{next(iter(how))}={next(iter(how.values()))}`: not a"):
        checkpoint.load(str(base), **how)


def test_the_teachers_samples_depend_on_the_text_encoder(base, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    settings, found = Settings("ddim", 2, 7.0), []
    for shift in (0.0, 1.0):
        opened = checkpoint.load(str(base))
        with torch.no_grad():
            text.norm_of(opened.text_encoders[-1]).bias.add_(shift)
            next(iter(opened.text_encoders[-1].parameters())).mul_(1 + shift)
        found.append(teacher.encode(opened, ["a cat"], 64, settings, pairs=1, seed=0).latents)
    assert not torch.equal(*found)


def test_a_prompt_must_be_a_text(base):
    sampler = Sampler(str(base), device="cpu", compile="off")
    for lines, negative in (([], ""), (["a", None], ""), (["a"], ["b"])):
        with pytest.raises(UsageError, match="not a text"):
            sampler.conds(lines, negative=negative)
