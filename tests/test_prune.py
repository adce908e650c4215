"""Pruning: layouts, inheritance, what moves with the layers, and the distillation's losses."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from playing import play, trained

from fastdiff.checkpoints import checkpoint, locate
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.data.open import open_data
from fastdiff.diffusion import losses
from fastdiff.diffusion.schedule import NoiseSchedule
from fastdiff.lora import apply
from fastdiff.lora.file import Factors, Lora
from fastdiff.methods.prune import Config, Prune
from fastdiff.methods.shared import cutting
from fastdiff.models import controlnet, unet
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.models.remap import is_pruned, remapped
from fastdiff.runtime.errors import InputRefused, UsageError

COUNTS = {  # parameters and tensors, of the published networks
    ("sd15", "bk-base"): (579_384_964, 442),
    ("sd15", "bk-small"): (482_346_884, 396),
    ("sd15", "bk-tiny"): (323_384_964, 358),
    ("sd15", "sdxs-512"): (315_746_244, 280),
    ("sd21", "bk-base"): (583_480_964, 442),
    ("sd21", "bk-small"): (485_787_524, 396),
    ("sd21", "bk-tiny"): (326_825_604, 358),
    ("sd21", "sdxs-512"): (318_695_364, 280),
    ("sd21", "sdxs-512-xattn"): (328_177_284, 358),
    ("sdxl", "bk-base"): (1_717_277_764, 1110),
    ("sdxl", "bk-small"): (1_304_160_324, 884),
    ("sdxl", "ssd-1b"): (1_331_334_404, 944),
    ("sdxl", "vega"): (745_225_604, 564),
    ("sdxl", "koala-1b"): (1_161_184_324, 790),
    ("sdxl", "koala-700m"): (782_822_724, 584),
}
EMOJI = ("bk-base", "bk-small", "bk-tiny", "sdxs-512", "sdxs-512-xattn")


@pytest.mark.parametrize(("family", "layout"), COUNTS)
def test_every_published_layout_has_its_size_and_inherits_every_parameter(family, layout):
    parent = locate.stock_config(FAMILIES[family])
    config = unet.student_config(parent, layout, FAMILIES[family])
    net = unet.unet_of(config)
    shapes = unet.shapes_of(net)
    whole = unet.shapes_of(unet.unet_of(parent))
    assert (sum(p.numel() for p in net.parameters()), len(shapes)) == COUNTS[family, layout]
    names = unet.inherited(parent, config, whole, shapes)
    assert set(names) == set(shapes)
    assert all(whole[its] == shapes[mine] for mine, its in names.items())


def test_the_last_layer_of_an_up_block_comes_from_the_last_and_stages_count_from_the_end():
    parent = locate.stock_config(FAMILIES["sd15"])
    names = unet.inherited_layers(parent, unet.student_config(parent, "bk-tiny", FAMILIES["sd15"]))
    moved = {mine: its for mine, its in names.items() if mine != its}
    assert moved == {
        f"up_blocks.{i}.{kind}": f"up_blocks.{i + 1}.{its}"
        for i in range(3)
        for kind, its in {
            "resnets.0": "resnets.0",
            "resnets.1": "resnets.2",
            "attentions.0": "attentions.0",
            "attentions.1": "attentions.2",
            "upsamplers": "upsamplers",
        }.items()
    }
    assert unet.renamed("up_blocks.2.resnets.1.conv1.weight", names) == "up_blocks.3.resnets.2.conv1.weight"
    assert unet.renamed("conv_in.weight", names) == "conv_in.weight"


def test_wrong_layouts_are_refused_by_name(tmp_path):
    parent = locate.stock_config(FAMILIES["sdxl"])
    for layout, word in (("bk-tiny", "not a layout of sdxl.*"), ("bk-huge", "no such layout"), ("gone.json", "no such layout")):
        with pytest.raises(UsageError, match=word):
            unet.student_config(parent, layout, FAMILIES["sdxl"])
    (tmp_path / "a.json").write_text('{"block_width": 3}')
    with pytest.raises(UsageError, match="unknown field block_width"):
        unet.student_config(parent, str(tmp_path / "a.json"), FAMILIES["sdxl"])
    (tmp_path / "b.json").write_text("no")
    with pytest.raises(UsageError, match="not a JSON object with the config of a UNet"):
        unet.student_config(parent, str(tmp_path / "b.json"), FAMILIES["sdxl"])
    (tmp_path / "c.json").write_text('{"down_block_types": ["NoSuchBlock"]}')
    with pytest.raises(UsageError, match="diffusers cannot build a UNet2DConditionModel"):
        unet.unet_of(unet.student_config(parent, str(tmp_path / "c.json"), FAMILIES["sdxl"]))
    emoji = checkpoint.load("emoji")
    for told, word in (
        ({"block_out_channels": [48, 96, 96, 112]}, "does not fit into the base.*down_blocks.3"),
        ({"layers_per_block": 3}, "does not fit into the base"),
        ({"cross_attention_dim": 64}, "does not fit into the base"),
    ):
        (tmp_path / "d.json").write_text(json.dumps(told))
        config = unet.student_config(emoji.unet_config, str(tmp_path / "d.json"), FAMILIES["emoji"])
        with pytest.raises(UsageError, match=word):
            cutting.pruned(emoji, config)


def test_a_file_names_only_what_changes(tmp_path):
    emoji = checkpoint.load("emoji")
    (tmp_path / "mine.json").write_text('{"layers_per_block": [2, 1, 1, 1], "_class_name": "UNet2DConditionModel"}')
    config = unet.student_config(emoji.unet_config, str(tmp_path / "mine.json"), FAMILIES["emoji"])
    net = unet.inheriting(emoji.unet, config)
    assert [len(block.resnets) for block in net.down_blocks] == [2, 1, 1, 1]
    assert [len(block.resnets) for block in net.up_blocks] == [2, 2, 2, 3]
    own = emoji.unet.state_dict()
    for mine, its in (("up_blocks.0.resnets.1", "up_blocks.0.resnets.2"), ("up_blocks.3.resnets.1", "up_blocks.3.resnets.1")):
        assert torch.equal(net.state_dict()[f"{mine}.conv1.weight"], own[f"{its}.conv1.weight"])


def test_a_file_may_name_fields_that_older_configs_lack(tmp_path):
    parent = {k: v for k, v in checkpoint.load("emoji").unet_config.items() if k != "only_cross_attention"}
    (tmp_path / "cross.json").write_text('{"only_cross_attention": [true, false, false, false]}')
    assert unet.student_config(parent, str(tmp_path / "cross.json"), FAMILIES["emoji"])["only_cross_attention"][0]


def probe(seed=0, n=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, 8, 8, generator=g), torch.tensor([999, 300])[:n], Cond(torch.randn(n, 77, 128, generator=g))


def test_a_network_pruned_of_nothing_is_its_parent():
    emoji = checkpoint.load("emoji")
    net = unet.inheriting(emoji.unet, dict(emoji.unet.config))
    x, t, cond = probe()
    with torch.no_grad():
        assert torch.equal(net(x, t, cond.tokens).sample, emoji.unet(x, t, cond.tokens).sample)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("layout", EMOJI)
def test_features_that_are_compared_have_one_shape(layout):
    emoji = checkpoint.load("emoji")
    config = unet.student_config(emoji.unet_config, layout, FAMILIES["emoji"])
    pairs = unet.feature_pairs(emoji.unet_config, config)
    schedule = emoji.schedule()
    student, teacher = (Denoiser(net, schedule, "epsilon") for net in (unet.inheriting(emoji.unet, config), emoji.unet))
    mine, its = zip(*pairs, strict=True)
    with torch.no_grad(), student.tap(mine) as a, teacher.tap(its) as b:
        student(*probe()), teacher(*probe())
    assert [a[k].shape for k in mine] == [b[k].shape for k in its]
    assert len(pairs) == {"bk-base": 9, "bk-small": 8}.get(layout, 6)
    # Without its middle, or without the stages below, the bottleneck stands for what was there.
    below = {"bk-base": ("mid_block", "mid_block"), "bk-small": ("down_blocks.3", "mid_block")}
    assert below.get(layout, ("down_blocks.2", "up_blocks.0")) in pairs
    assert not student.net._forward_hooks
    assert not any(m._forward_hooks for m in student.net.modules())


@pytest.mark.parametrize("layout", ["bk-base", "bk-small", "vega", "koala-700m"])
def test_sdxl_layouts_on_a_tiny_sdxl(layout, tiny_sdxl):
    """Depths that the tiny network has: 1, 1, 2; a layout takes the first of each."""
    base = checkpoint.load(str(tiny_sdxl))
    config = unet.student_config(base.unet_config, layout, FAMILIES["sdxl"])
    if layout == "koala-700m":
        with pytest.raises(UsageError, match="nothing to inherit"):  # deeper than this one is
            unet.inheriting(base.unet, config)
        return
    net = unet.inheriting(base.unet, config)
    out = cutting.call(net, cutting.probe_of(net, "cpu"))
    assert out.shape == (1, 4, 8, 8)


# ---- what goes with the layers


def touching(key, base):
    """A LoRA of one layer of the emoji UNet."""
    name = apply.names(base.unet)[key]
    out, into = base.unet.get_submodule(name).weight.shape
    g = torch.Generator().manual_seed(1)
    return Lora({key: Factors(torch.randn(2, into, generator=g), torch.randn(out, 2, generator=g))}, {}, "style.safetensors")


def pruned_emoji(layout):
    whole = checkpoint.load("emoji")
    config = unet.student_config(whole.unet_config, layout, FAMILIES["emoji"])
    return whole, whole.shaped("unet", config), config


@pytest.mark.parametrize("layout", EMOJI)
def test_a_lora_folded_in_before_the_cut_is_the_remapped_lora_folded_in_after_it(layout):
    whole, small, config = pruned_emoji(layout)
    g = torch.Generator().manual_seed(0)
    modules = {}
    for key, name in apply.names(whole.unet).items():
        out, into, *kernel = whole.unet.get_submodule(name).weight.shape
        modules[key] = Factors(
            0.1 * torch.randn(2, into, *kernel, generator=g), torch.randn(out, 2, *(1 for _ in kernel), generator=g)
        )
    style = Lora(modules, {"ss_tag": "x"}, "style.safetensors")
    moved = remapped(small, style, wanted=True)
    after = unet.inheriting(whole.unet, config)
    apply.fold(after, [(moved, 0.5)])
    apply.fold(whole.unet, [(style, 0.5)])
    before = unet.inheriting(whole.unet, config)
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert moved.layers == 1
    assert moved.metadata["ss_tag"] == "x"


def test_a_lora_of_the_parent_never_lands_on_a_wrong_layer_by_its_name():
    whole, small, config = pruned_emoji("bk-base")
    cut, kept = (f"lora_unet_up_blocks_1_attentions_{i}_transformer_blocks_0_attn1_to_q" for i in (1, 2))
    # The first was cut, and its name is another layer's now: nothing is left of it.
    assert remapped(small, touching(cut, whole), wanted=True).modules == {}
    assert list(remapped(small, touching(kept, whole), wanted=True).modules) == [cut]
    with pytest.raises(InputRefused, match=r"is for the full network that .* was pruned from") as refused:
        remapped(small, touching(kept, whole), wanted=False)
    assert "`remap=True`" in refused.value.hint
    own = replace(touching(cut, whole), metadata={"fastdiff.layers_per_block": "1"})  # trained on the pruned network
    assert remapped(small, own, wanted=True) is own
    assert remapped(small, own, wanted=False) is own
    texts = Lora({"lora_te_text_model_encoder_layers_0_mlp_fc1": touching(cut, whole).modules[cut]}, {}, "t")
    assert remapped(small, texts, wanted=True).modules == texts.modules


def test_only_a_pruned_base_is_called_pruned(tiny_sd):
    assert not is_pruned(checkpoint.load("emoji"))
    assert not is_pruned(checkpoint.load(str(tiny_sd)))
    assert all(is_pruned(pruned_emoji(layout)[1]) for layout in EMOJI[:4])


@pytest.fixture(scope="module")
def edges(tmp_path_factory):
    """A ControlNet of the emoji UNet whose zero convolutions are not zero."""
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    net = ControlNetModel.from_unet(checkpoint.load("emoji").unet, conditioning_embedding_out_channels=(16, 32))
    for name, p in net.named_parameters():
        if "controlnet_" in name:
            torch.nn.init.normal_(p, std=0.1)
    folder = tmp_path_factory.mktemp("controlnet") / "edges"
    net.save_pretrained(folder)
    return folder, net


@pytest.mark.parametrize("layout", EMOJI)
def test_a_controlnet_is_cut_alike_and_loads_in_stock_diffusers(layout, edges, tmp_path):
    from diffusers import ControlNetModel

    folder, parent = edges
    whole, small, config = pruned_emoji(layout)
    cutting.cut_controlnet(folder, config, tmp_path / "cut")
    net = ControlNetModel.from_pretrained(tmp_path / "cut")
    student = unet.inheriting(whole.unet, config)
    x, t, cond = probe()
    image = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        down, mid = net(x, t, cond.tokens, image, return_dict=False)
        plain, controlled = (
            student(x, t, cond.tokens, **extra).sample
            for extra in ({}, dict(down_block_additional_residuals=down, mid_block_additional_residual=mid))
        )
    assert (plain - controlled).abs().max() > 0.01
    places = controlnet.residuals(parent.config)
    for i, place in enumerate(controlnet.residuals(net.config)):
        its = parent.controlnet_down_blocks[places.index(place)]
        assert torch.equal(net.controlnet_down_blocks[i].weight, its.weight)
    assert torch.equal(net.controlnet_mid_block.weight, parent.controlnet_mid_block.weight)


def test_a_controlnet_for_an_uneven_network_or_of_no_controlnet_is_refused(edges, tmp_path):
    folder, _ = edges
    config = {**checkpoint.load("emoji").unet_config, "layers_per_block": [2, 1, 1, 1]}
    with pytest.raises(InputRefused, match="different numbers of layers"):
        cutting.cut_controlnet(folder, config, tmp_path / "cut")
    with pytest.raises(UsageError, match=r"config\.json is missing"):
        cutting.cut_controlnet(tmp_path, config, tmp_path / "cut")


# ---- the losses


class Batch(SimpleNamespace):
    pass


def losses_of(method, batch=None):
    torch.manual_seed(0)
    x, _, cond = probe(seed=5)
    (turn,) = play(method, batch or Batch(latents=x, cond=cond, uncond=cond), 0)
    return turn["student"]


def prune(**changes):
    return Prune(checkpoint.load("emoji"), Config(**dict(layout="bk-base", device="cpu") | changes))


def test_the_loss_is_zero_for_the_parent_itself(tmp_path):
    (tmp_path / "same.json").write_text("{}")
    found = losses_of(prune(layout=str(tmp_path / "same.json")))
    assert set(found) == {"out", "feat"}
    assert found["out"].item() == 0
    assert found["feat"].item() == 0


def test_features_count_alike_whatever_their_scale():
    a, b = ([torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in seeds] for seeds in ((0, 1), (2, 3)))
    scaled = lambda tensors: [100 * tensors[0], tensors[1]]
    torch.testing.assert_close(losses.features(a, b), losses.features(scaled(a), scaled(b)))
    by_hand = sum((x - y).square().mean() for x, y in zip(a, b, strict=True))
    torch.testing.assert_close(losses.features(a, b, normalised=False), by_hand)
    assert losses.features(scaled(a), scaled(b), normalised=False) > 1000


def test_the_task_is_the_denoising_loss_and_terms_can_be_left_out():
    method = prune(lambda_task=1.0, lambda_feat=0)
    found = losses_of(method)
    assert set(found) == {"out", "task"}
    torch.manual_seed(0)
    x, _, cond = probe(seed=5)
    t = torch.randint(1000, (2,))
    eps = torch.randn_like(x)
    schedule: NoiseSchedule = method.schedule
    with torch.no_grad():
        said = method.student.net(schedule.add_noise(x, eps, t), t, cond.tokens).sample
        goal = method.teacher.net(schedule.add_noise(x, eps, t), t, cond.tokens).sample
    torch.testing.assert_close(found["task"], (said - eps).square().mean())
    torch.testing.assert_close(found["out"], (said - goal).square().mean())


def test_training_brings_the_student_nearer():
    data = open_data(checkpoint.load("emoji"), "emoji", prompts=None, resolution_px=64, pairs=0, seed=0, device="cpu")
    method = prune()
    optimizer = torch.optim.AdamW(trained(method, "student"), lr=1e-3)
    seen = data.batch(6, torch.Generator().manual_seed(99))
    before = losses_of(method, seen)
    for step in range(5):
        (turn,) = play(method, data.batch(6, torch.Generator().manual_seed(step)), step)
        sum(turn["student"].values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = losses_of(method, seen)
    assert all(after[k] < 0.97 * before[k] for k in before)


# ---- chosen by measurement


@pytest.mark.slow
def test_auto_cuts_what_costs_most_for_what_it_is_worth(monkeypatch, tiny_sd):
    """A clock that says one second a layer: then the fewest errors a layer decide."""
    base = checkpoint.load(str(tiny_sd))
    count = lambda net, device: 0.1 + sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in net.modules())
    monkeypatch.setattr(cutting, "latency_s", count)
    config = cutting.choose(base, 1.08, "cpu")
    net = unet.inheriting(base.unet, config)
    assert count(base.unet, "cpu") / count(net, "cpu") >= 1.08
    said, goals = ([cutting.call(n, p) for p in cutting.probes_of(base, "cpu")] for n in (net, base.unet))
    error = lambda tensors: (torch.cat(tensors) - torch.cat(goals)).square().mean()
    random_cut = unet.inheriting(base.unet, unet.student_config(base.unet_config, "bk-tiny", FAMILIES["sd15"]))
    assert error(said) < error([cutting.call(random_cut, p) for p in cutting.probes_of(base, "cpu")])


def test_a_speed_that_no_cut_reaches_is_refused(monkeypatch, tiny_sd):
    monkeypatch.setattr(cutting, "latency_s", lambda net, device: 1.0)
    monkeypatch.setattr(cutting, "candidates", lambda config: iter([("the middle", unet.without_middle)]))
    with pytest.raises(UsageError, match=r"`target_speed=2x`: with all that can be cut, the network is 1x as fast"):
        cutting.choose(checkpoint.load(str(tiny_sd)), 2.0, "cpu")


@pytest.mark.parametrize("told", ["0.5x", "1", "fast", "nan", "inf"])
def test_a_target_speed_that_is_none_is_refused(told):
    with pytest.raises(UsageError, match=f"`target_speed={told}"):
        Config(target_speed=told)
