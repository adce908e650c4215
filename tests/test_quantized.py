"""A frozen base in 8 bits under adapters: what it computes, what it keeps, and where plain weights are still read."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.lora import adapters
from fastdiff.methods.sdxs import SDXS
from fastdiff.models import quantized
from fastdiff.options import dmd, lcm, lightning, prune, sdxs, vae
from fastdiff.runtime.errors import UsageError

KINDS = ["fp8", "int8"]


def layers():
    torch.manual_seed(0)
    linear, bare = nn.Linear(24, 16), nn.Linear(24, 16, bias=False)
    conv, strided = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
    rows, picture = torch.randn(5, 7, 24), torch.randn(2, 6, 9, 9)
    return {"linear": (linear, rows), "bare": (bare, rows), "conv": (conv, picture), "strided": (strided, picture)}


def quantized_copy(layer, kind):
    net = nn.Sequential(copy.deepcopy(layer)).requires_grad_(False)
    quantized.quantize(net, kind)
    return net


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", layers())
def test_a_layer_computes_and_pulls_back_as_the_plain_one_with_its_rounded_weight(name, kind):
    layer, x = layers()[name]
    net = quantized_copy(layer, kind)
    exact, rounded = layer.weight.detach(), net[0].weight
    assert net[0].stored.element_size() == 1
    assert 0 < (rounded - exact).norm() / exact.norm() < {"fp8": 0.04, "int8": 0.01}[kind]
    layer.weight.data.copy_(rounded)
    mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = net(mine), layer(plain)
    torch.testing.assert_close(a, b)
    for y, given in ((a, mine), (b, plain)):  # a gradient of a gradient's norm, as R1 has it
        (given.first,) = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        given.first.square().sum().backward()
    torch.testing.assert_close(mine.first, plain.first)
    torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_casts_and_moves_of_a_network_leave_the_stored_form_alone(kind):
    layer, x = layers()["conv"]
    net = quantized_copy(layer, kind)
    stored, weight = net[0].stored.clone(), net[0].weight
    assert net.to(torch.bfloat16)[0].weight.dtype == torch.bfloat16
    assert net.half()(x.half()).dtype == torch.float16
    net = copy.deepcopy(net.to("cpu")).float()
    assert torch.equal(net[0].stored, stored)
    assert torch.equal(net[0].weight, weight)
    assert torch.equal(net.state_dict()["0.weight"], weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_own_precision(kind, dtype):
    """As it does with plain layers: an adapter's output in 32 bits is no reason to compute in 32 bits."""
    layer, x = layers()["linear"]
    net = quantized_copy(layer, kind)
    with torch.autocast("cpu", dtype):
        assert net(x).dtype == dtype
    wide = net(x)
    torch.testing.assert_close(net.to(dtype)(x.to(dtype)).float(), wide, rtol=0.02, atol=0.02)


def test_no_graph_holds_a_restored_weight():
    layer, x = layers()["linear"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        quantized_copy(layer, "int8")(x.requires_grad_()).sum()
        assert torch.Size([16, 24]) not in kept
        layer.requires_grad_(False)(x).sum()
        assert torch.Size([24, 16]) in kept or torch.Size([16, 24]) in kept  # a plain layer does


@pytest.fixture
def base(tiny_sd):
    return checkpoint.load(str(tiny_sd))


def call(net, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, tokens = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 12, 32, generator=g)
    return net(x, torch.tensor([500, 20]), tokens, return_dict=False)[0]


def test_a_unet_under_adapters(base):
    """On and off, output and gradients beside the exact ones, with checkpointing; plain copies for other code."""
    exact = base.unet
    net = copy.deepcopy(exact)
    before = sum(p.nbytes for p in net.parameters())
    quantized.quantize(net, "int8")
    held = sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
    assert held < 0.5 * before
    grads = []
    for one in (exact, net):
        adapters.checkpoint_gradients(one)
        one.train()
        torch.manual_seed(3)
        params = adapters.attach(one, 4, 4)
        off = call(one)
        with torch.no_grad():
            for p in params:
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        with adapters.using(one, "student"):
            out = call(one)
        with adapters.using(one, None):  # while the backward pass recomputes
            torch.testing.assert_close(call(one), off)
            out.square().sum().backward()
        assert (out - off).norm() > 0.01 * off.norm()
        grads.append((out.detach(), torch.cat([p.grad.flatten() for p in params])))
    (out, grad), (rounded_out, rounded_grad) = grads
    assert 0 < (out - rounded_out).norm() / out.norm() < 0.02
    assert torch.cosine_similarity(grad, rounded_grad, dim=0) > 0.98
    whole = adapters.plain(net)
    with adapters.using(net, None):
        torch.testing.assert_close(call(whole), call(net))
    assert whole.state_dict().keys() == checkpoint.load(base.ref).unet.state_dict().keys()
    assert not quantized.is_quantized(whole)


def test_a_run_trains_resumes_and_writes_a_lora_of_the_exact_base(fastdiff, tiny_sd, tmp_path):
    common = "--batch-size 2 --grad-accum 1 --resolution 64 --pairs 2 --num-steps 2 --lora-rank 4 --device cpu --data teacher"
    args = ["train-lcm-lora", "--base", tiny_sd, "--prompts", "prompts.txt", *common.split(), "--teacher-steps", "2"]
    quantizing = [*args, "--quantize-base", "int8"]
    assert (
        fastdiff(*quantizing, "--steps", "2", "-o", "whole", "--offload", "--preview-every", "1")[0] == 0
    )  # --offload: same bits
    assert fastdiff(*quantizing, "--steps", "1", "-o", "parts")[0] == 0
    code, told = fastdiff(*args, "--steps", "2", "-o", "parts")
    assert (code, told["error"]["kind"]) == (2, "usage")
    assert "was begun with --quantize-base int8" in told["error"]["message"]
    assert fastdiff(*quantizing, "--steps", "2", "-o", "parts")[0] == 0
    whole, parts = (load_file(tmp_path / name / "lcm.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert not any("base_layer" in k or "stored" in k for k in whole)
    exact = checkpoint.fingerprint(checkpoint.load(str(tiny_sd)).unet)
    assert lora.load(tmp_path / "whole" / "lcm.safetensors").recipe.parent == exact


def test_the_parent_of_a_student_on_the_base_itself_is_the_exact_one(base):
    """SDXS hashes the network that its student is a LoRA of, which here was quantised just before."""
    exact = checkpoint.fingerprint(base.unet)
    config = sdxs.Config(base=base.ref, student="lora", lora_rank=4, quantize_base="int8", match_steps=1, steps=2)
    assert SDXS(base, config).parent == exact
    assert quantized.is_quantized(base.unet)


@pytest.mark.parametrize(
    ("config", "options", "whole"),
    [
        (lcm.Config, dict(full=True), "`full`"),
        (dmd.Config, dict(student="full"), "`student=full`"),
        (dmd.Config, dict(fake="full"), "`fake=full`"),
        (sdxs.Config, dict(), "`student=full`"),
        (sdxs.Config, dict(student="lora", fake="full"), "`fake=full`"),
        (lightning.Config, dict(), "phase full"),
        (lightning.Config, dict(lora_only=True, discriminator="full"), "`discriminator=full`"),
        (prune.Config, dict(), "pruning"),
        (vae.Config, dict(), "a tiny decoder"),
    ],
)
def test_networks_that_train_whole_refuse_it(config, options, whole):
    with pytest.raises(UsageError, match=f"`quantize_base=int8`: is for LoRAs on a frozen network, but {whole}"):
        config(quantize_base="int8", **options)
    lcm.Config(quantize_base="fp8")
