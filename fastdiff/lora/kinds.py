"""What the tensors of one adapted module mean: its update of the weight, W' = W + s Delta(W), in fp32.

    lora    (alpha / r) B A                                   Hu et al. 2021, eq. 3; with a core t (r, r, kh, kw): LoCon-Tucker
    loha    (alpha / r) (A1 B1) * (A2 B2)                     Hadamard product: FedPara, Hyeon-Woo et al. 2021, eq. 1
    lokr    (alpha / r) W1 kron W2, each full or low rank     LyCORIS, Yeh et al. 2023, eq. 8
    full    D                                                 differences of weights, biases and norms
    ia3     W * v, v along the outputs or the inputs          Liu et al. 2022, eq. 3
    glora   (alpha / r) (W A1 A2 + B1 B2)                     Chavan et al. 2023, eq. 10
    oft     (R - I) W, R = (I + Q)(I - Q)^-1 in blocks        Qiu et al. 2023, eq. 4; butterfly factors: BOFT, Liu et al. 2023
    dora    m (W + Delta) / |W + Delta| - W                   Liu et al. 2024, eq. 5

The last four need the weight that they change: they can be baked into a checkpoint, never added to another LoRA.
Shapes: r rank; weights (out, in[, kh, kw]).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.runtime.errors import InputRefused


class Update(ABC):
    """An update of one parameter."""

    kind = "update"
    needs_weight = False

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the parameter; None where any shape will do."""
        return None

    @abstractmethod
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Delta(W) in fp32, in the parameter's shape; `weight` is W in fp32 where `needs_weight`."""


@dataclass
class Factors(Update):
    """Low rank: down (r, in[, kh, kw]), up (out, r[, 1, 1]), fp32; alpha / r is already part of `up`."""

    down: Tensor
    up: Tensor
    kind = "lora"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return (self.up.flatten(1).float() @ self.down.flatten(1).float()).reshape(self.shape)

    def scaled(self, strength: float) -> "Factors":
        return Factors(strength * self.down, self.up)


@dataclass
class Dense(Update):
    """The difference itself: full differences, and what LoHa and LoKr multiply out to."""

    value: Tensor
    kind: str = "full"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.value


@dataclass
class Rescaled(Update):
    """IA3: v (out,) or (in,)."""

    vector: Tensor
    on_input: bool
    kind = "ia3"
    needs_weight = True

    def delta(self, weight: Tensor | None = None) -> Tensor:
        assert weight is not None
        axis = 1 if self.on_input else 0
        view = [1] * weight.ndim
        view[axis] = -1
        return weight * self.vector.reshape(view)


@dataclass
class Generalised(Update):
    """GLoRA: a1 (in, r), a2 (r, in), and B's own factors; the scale is part of `scale` and of `bias_free`."""

    a1: Tensor
    a2: Tensor
    b: Factors
    scale: float
    kind = "glora"
    needs_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b.shape

    def delta(self, weight: Tensor | None = None) -> Tensor:
        assert weight is not None
        mixed = torch.einsum("oi...,ir,rj->oj...", weight, self.a1, self.a2)
        return self.scale * mixed + self.b.delta().reshape(weight.shape)


@dataclass
class Rotated(Update):
    """OFT blocks (n, b, b) or BOFT factors (m, n, b, b), Cayley's form; `rescale` (out, 1[, 1, 1]) or None."""

    blocks: Tensor
    constraint: float  # of |Q|, times the outputs; 0 = none
    rescale: Tensor | None
    kind = "oft"
    needs_weight = True

    def rotations(self, out: int) -> Tensor:
        q = (self.blocks - self.blocks.transpose(-1, -2)).double()  # the inverse loses digits
        limit = self.constraint * out
        norm = torch.linalg.vector_norm(q) + 1e-8
        if 0 < limit < norm:
            q = q * (limit / norm)
        eye = torch.eye(q.shape[-1], dtype=q.dtype)
        return ((eye + q) @ torch.linalg.inv(eye - q)).float()

    def delta(self, weight: Tensor | None = None) -> Tensor:
        assert weight is not None
        r, out = self.rotations(weight.shape[0]), weight.shape[0]
        w = weight.flatten(1)
        if r.ndim == 3:  # one block diagonal matrix; LyCORIS multiplies by its transpose
            turned = torch.einsum("knm,kni->kmi", r, w.reshape(r.shape[0], r.shape[1], -1)).reshape(out, -1)
        else:  # butterfly: factor i pairs rows that lie 2^i half blocks apart
            turned, half = w, r.shape[-1] // 2
            for i, factor in enumerate(r):
                k = 2**i * half
                turned = turned.unflatten(0, (-1, 2, k)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, factor.shape[-1]))
                turned = torch.einsum("bij,bjx->bix", factor, turned)
                turned = turned.flatten(0, 1).unflatten(0, (-1, k, 2)).transpose(1, 2).flatten(0, 2)
        turned = turned.reshape(weight.shape)
        if self.rescale is not None:
            turned = turned * self.rescale.reshape(-1, *[1] * (weight.ndim - 1))
        return turned - weight


@dataclass
class Decomposed(Update):
    """DoRA over another update: magnitude along the outputs, or the inputs (kohya with wd_on_out=False)."""

    inner: Update
    magnitude: Tensor  # flat
    on_input: bool
    kind = "dora"
    needs_weight = True

    @property
    def shape(self) -> tuple[int, ...] | None:
        return self.inner.shape

    def delta(self, weight: Tensor | None = None) -> Tensor:
        assert weight is not None
        moved = weight + self.inner.delta(weight).reshape(weight.shape)
        axis = 1 if self.on_input else 0
        norm = torch.linalg.vector_norm(moved.transpose(0, axis).flatten(1), dim=1)
        view = [1] * weight.ndim
        view[axis] = -1
        return moved * (self.magnitude / (norm + torch.finfo(torch.float32).eps)).reshape(view) - weight


def build(sides: Mapping[str, Tensor], where: str) -> Update:
    """A module's checked update, by which tensors it has; `where` begins every message.

    No alpha, or 0, means alpha = r (kohya). Values that are not finite, ranks that disagree and shapes that are no
    linear or convolution pair raise InputRefused.
    """
    held = {}
    for side, tensor in sides.items():
        if not tensor.is_floating_point() and side not in {"alpha", "on_input"}:
            raise InputRefused(f"{where}: {side} is {tensor.dtype}, not floating point")
        if not bool(tensor.float().isfinite().all()):
            raise InputRefused(f"{where}: {side} has NaN or infinite values")
        if not tensor.numel():
            raise InputRefused(f"{where}: {side} is empty, shape {tuple(tensor.shape)}")
        held[side] = tensor.detach().to("cpu", torch.float32, copy=True)
    alpha = held.pop("alpha", torch.tensor(0.0))
    if alpha.numel() != 1 or alpha.item() < 0:
        raise InputRefused(f"{where}: alpha must be one number above 0, not {alpha.tolist()}")
    magnitude = held.pop("magnitude", None)
    on_input = bool(held.pop("on_input", torch.tensor(0.0)).item()) if "on_input" in held else False
    try:
        made = assemble(held, alpha.item(), on_input, where) if held else None
    except (RuntimeError, KeyError) as error:  # shapes that cannot be multiplied, a factor without its other half
        told = ", ".join(f"{side} {tuple(t.shape)}" for side, t in held.items())
        raise InputRefused(f"{where}: these make no update, or their shapes do not fit together: {told}") from error
    if made is None:
        raise InputRefused(f"{where}: {' and '.join(sides)} alone make no update")
    if magnitude is None:
        return made
    if made.shape is None or len(made.shape) < 2:
        raise InputRefused(f"{where}: a DoRA magnitude without a LoRA")
    by_input = magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == made.shape[1]
    if magnitude.numel() != made.shape[1 if by_input else 0]:
        raise InputRefused(f"{where}: DoRA magnitude {tuple(magnitude.shape)} for a weight {made.shape}")
    return Decomposed(made, magnitude.flatten(), by_input)


def assemble(held: dict[str, Tensor], alpha: float, on_input: bool, where: str) -> Update:
    have = set(held)
    scale = lambda rank: (alpha or rank) / rank
    if have == {"down", "up"} or have == {"down", "up", "mid"}:
        return low_rank(held, alpha, where)
    if have == {"w1_a", "w1_b", "w2_a", "w2_b"} or have == {"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}:
        halves = [core(held[f"w{i}_a"], held[f"w{i}_b"], held.get(f"t{i}")) for i in (1, 2)]
        return Dense(halves[0] * halves[1] * scale(held["w1_b"].shape[0]), "loha")
    if have & {"kron1", "kron1_a"} and have <= {"kron1", "kron1_a", "kron1_b", "kron2", "kron2_a", "kron2_b", "kron_t2"}:
        return kronecker(held, alpha)
    if have == {"diff"}:
        return Dense(held["diff"])
    if have == {"vector"}:
        return Rescaled(held["vector"].flatten(), on_input)
    if have == {"a1", "a2", "b1", "b2"} or have == {"a1", "a2", "b1", "b2", "bm"}:
        b = {"up": held["b1"], "down": held["b2"], **({"mid": held["bm"]} if "bm" in held else {})}
        rank = held["a2"].shape[0]
        return Generalised(held["a1"].flatten(1), held["a2"].flatten(1), low_rank(b, alpha, where), scale(rank))
    if "blocks" in have and have <= {"blocks", "rescale"} and held["blocks"].ndim in {3, 4}:
        return Rotated(held["blocks"], alpha, held.get("rescale"))
    missing = {"down", "up"} - have
    if len(missing) == 1:
        raise InputRefused(f"{where}: {missing.pop()} missing")
    raise InputRefused(f"{where}: {', '.join(sorted(have)) or 'alpha alone'} make no update that is known")


def low_rank(held: Mapping[str, Tensor], alpha: float, where: str) -> Factors:
    """LoRA and LoCon; a Tucker core is multiplied into `down`, which keeps the rank."""
    down, up = held["down"], held["up"]
    if "mid" in held:
        core = held["mid"]
        if core.ndim != 4 or core.shape[0] != up.shape[1] or core.shape[1] != down.shape[0]:
            raise InputRefused(f"{where}: Tucker core {tuple(core.shape)} for ranks {up.shape[1]} and {down.shape[0]}")
        down = torch.einsum("pqhw,qi->pihw", core, down.flatten(1))
        up = up.flatten(1)[..., None, None]
    pair = f"{tuple(down.shape)} and {tuple(up.shape)}"
    if (down.ndim, up.ndim) not in {(2, 2), (4, 4)} or up.shape[2:].numel() != 1:
        raise InputRefused(f"{where}: shapes {pair} are no linear or convolution pair")
    if (rank := down.shape[0]) != up.shape[1]:
        raise InputRefused(f"{where}: down and up differ in rank, shapes {pair}")
    if not (down.abs().amax() * up.abs().amax() * rank * max(alpha, 1.0)).isfinite():
        raise InputRefused(f"{where}: values so large that their product is infinite; the file is damaged")
    return Factors(down, up * ((alpha or rank) / rank))


def core(a: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
    """A B, or with a Tucker core t (r, r, kh, kw): a (r, out), b (r, in)."""
    return a @ b if t is None else torch.einsum("ij...,ip,jr->pr...", t, a, b)


def kronecker(held: Mapping[str, Tensor], alpha: float) -> Dense:
    """LoKr; the scale is 1 where both factors are full, whatever alpha says (LyCORIS)."""
    first = held["kron1"] if "kron1" in held else held["kron1_a"] @ held["kron1_b"]
    rank = None if "kron1" in held else held["kron1_b"].shape[0]
    if "kron2" in held:
        second = held["kron2"]
    else:
        a, b, rank = held["kron2_a"], held["kron2_b"], held["kron2_b"].shape[0]
        plain = "kron_t2" not in held
        second = (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:]) if plain else core(a, b, held["kron_t2"])
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return Dense(torch.kron(first, second.contiguous()) * (1.0 if rank is None else (alpha or rank) / rank), "lokr")


def low_rank_of(update: Update, rank: int | None = None, energy: float = 1.0) -> tuple[Factors, float, float]:
    """The best factors of `rank` (None: the fewest that keep `energy` of sum sigma^2), the sum that they keep, the whole sum.

    For factors a QR of each side first, so that the SVD is r x r (exact, and a thousand times less work).
    """
    shape = update.shape
    assert shape is not None
    assert not update.needs_weight
    if isinstance(update, Factors):
        q_up, r_up = torch.linalg.qr(update.up.flatten(1).float())
        q_down, r_down = torch.linalg.qr(update.down.flatten(1).float().T)
        u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        u, vh = q_up @ u, vh @ q_down.T
    else:
        u, s, vh = torch.linalg.svd(update.delta().flatten(1), full_matrices=False)
    sums = s.double().square().cumsum(0)
    kept = min(rank, len(s)) if rank else int((sums < (energy - 1e-12) * sums[-1]).sum()) + 1
    kept = max(1, min(kept, len(s)))
    root = s[:kept].sqrt()
    down, up = root[:, None] * vh[:kept], u[:, :kept] * root
    ones = [1] * (len(shape) - 2)
    factors = Factors(down.reshape(kept, *shape[1:]), up.reshape(shape[0], kept, *ones))
    return factors, sums[kept - 1].item(), sums[-1].item()


def describe(updates: Mapping[str, Update]) -> dict[str, Any]:
    """How many modules of each kind, and the ranks."""
    kinds: dict[str, int] = {}
    for update in updates.values():
        kinds[update.kind] = kinds.get(update.kind, 0) + 1
    ranks = sorted({u.rank for u in updates.values() if isinstance(u, Factors)})
    return {"kinds": kinds, "rank_min": ranks[0] if ranks else None, "rank_max": ranks[-1] if ranks else None}
