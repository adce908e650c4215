"""The kinds of LoRA: what the tensors of one module do to a weight, W' = W + s Delta(W), computed in fp32.

    lora    (alpha / r) B A                                   Hu et al. 2021, eq. 3; with a core t (r, r, kh, kw): LoCon-Tucker
    loha    (alpha / r) (A1 B1) * (A2 B2)                     Hadamard product: FedPara, Hyeon-Woo et al. 2021, eq. 1
    lokr    (alpha / r) W1 kron W2, each full or low rank     LyCORIS, Yeh et al. 2023, eq. 8
    full    D                                                 differences of weights, biases and norms
    ia3     W * v, v along the outputs or the inputs          Liu et al. 2022, eq. 3
    glora   (alpha / r) (W A1 A2 + B1 B2)                     Chavan et al. 2023, eq. 10
    oft     (R - I) W, R = (I + Q)(I - Q)^-1 in blocks        Qiu et al. 2023, eq. 4; butterfly factors: BOFT, Liu et al. 2023
    dora    m (W + Delta) / |W + Delta| - W                   Liu et al. 2024, eq. 5

The last four need the weight that they change, so they can be baked into a checkpoint but not merged with other LoRAs.
Shapes: r rank; weights (out, in[, kh, kw]).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.runtime.errors import InputRefused

MAX_RANK, MAX_SCALE = 16_384, 10_000.0  # larger ones are signs of a damaged file


class Update(ABC):
    """A change of one parameter."""

    kind = "update"
    needs_weight = False  # whether Delta depends on W

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the parameter; None where the update does not determine it."""
        return None

    @abstractmethod
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Delta(W) in fp32, in the parameter's shape. `weight` is W in fp32, required where `needs_weight`."""

    def reshaped(self, shape: tuple[int, ...]) -> "Update":
        """The same update for a parameter of another shape with as many values, as a matrix (out, in kh kw) for a convolution.

        Updates that do not determine a shape stay as they are.
        """
        return self


@dataclass
class Factors(Update):
    """A low-rank update: down (r, in[, kh, kw]) and up (out, r[, 1, 1]) in fp32. alpha / r is already multiplied into `up`."""

    down: Tensor
    up: Tensor
    kind = "lora"

    @property
    def rank(self) -> int:
        """r, the number of rows of `down`."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return (self.up.flatten(1).float() @ self.down.flatten(1).float()).reshape(self.shape)

    def reshaped(self, shape: tuple[int, ...]) -> "Factors":
        ones = [1] * (len(shape) - 2)
        return Factors(self.down.reshape(self.rank, *shape[1:]), self.up.reshape(shape[0], self.rank, *ones))

    def scaled(self, strength: float) -> "Factors":
        """The update times `strength`."""
        return Factors(strength * self.down, self.up)


@dataclass
class Dense(Update):
    """A full difference of the weights; LoHa and LoKr are multiplied out to one."""

    value: Tensor
    kind: str = "full"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.value

    def reshaped(self, shape: tuple[int, ...]) -> "Dense":
        return Dense(self.value.reshape(shape), self.kind)


@dataclass
class Rescaled(Update):
    """IA3: Delta(W) = W v, where v has a factor for every output (out,), or with `on_input` for every input (in,)."""

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
    """GLoRA: `scale` W a1 a2 plus the low-rank update `b`, with a1 (in, r) and a2 (r, in). `b` holds its own scale already."""

    a1: Tensor
    a2: Tensor
    b: Factors
    scale: float
    kind = "glora"
    needs_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b.shape

    def reshaped(self, shape: tuple[int, ...]) -> "Generalised":
        return replace(self, b=self.b.reshaped(shape))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        assert weight is not None
        mixed = torch.einsum("oi...,ir,rj->oj...", weight, self.a1, self.a2)
        return self.scale * mixed + self.b.delta().reshape(weight.shape)


@dataclass
class Rotated(Update):
    """OFT with `blocks` (n, b, b), or BOFT with (m, n, b, b). Rotations come from the Cayley transform of the blocks."""

    blocks: Tensor
    constraint: float  # largest |Q|, divided by the number of outputs; 0: no limit
    rescale: Tensor | None  # (out, 1[, 1, 1]), a factor for every output after the rotation
    kind = "oft"
    needs_weight = True

    def rotations(self, out: int) -> Tensor:
        """The rotation matrices (I + Q)(I - Q)^-1 in the shape of `blocks`, for a weight of `out` outputs."""
        q = (self.blocks - self.blocks.transpose(-1, -2)).double()  # in fp32 the inverse would lose digits
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
    """DoRA: another update `inner`, then a new norm for every output, or input (kohya with wd_on_out=False)."""

    inner: Update
    magnitude: Tensor  # (out,) or (in,)
    on_input: bool
    kind = "dora"
    needs_weight = True

    @property
    def shape(self) -> tuple[int, ...] | None:
        return self.inner.shape

    def reshaped(self, shape: tuple[int, ...]) -> "Decomposed":
        return replace(self, inner=self.inner.reshaped(shape))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        assert weight is not None
        moved = weight + self.inner.delta(weight).reshape(weight.shape)
        axis = 1 if self.on_input else 0
        norm = torch.linalg.vector_norm(moved.transpose(0, axis).flatten(1), dim=1)
        view = [1] * weight.ndim
        view[axis] = -1
        return moved * (self.magnitude / (norm + torch.finfo(torch.float32).eps)).reshape(view) - weight


@dataclass(frozen=True)
class Scale:
    """What a file says about the scale of one module. It is checked where a kind uses it, and only there."""

    alpha: Tensor | None  # one number; None or 0 mean alpha = r, as in kohya
    fixed: float | None  # the scale itself, from a peft config; alpha has no effect then
    factor: float  # LyCORIS's trained `scalar`, which multiplies the update; 1 in most files
    where: str

    def number(self) -> float:
        """alpha, or 0 where the file has none; InputRefused where it is not one finite number of at least 0."""
        if self.alpha is None:
            return 0.0
        if self.alpha.numel() != 1:
            raise InputRefused(f"{self.where}: alpha must be one number above 0, not {self.alpha.numel()}")
        if not math.isfinite(self.alpha.item()):
            raise InputRefused(f"{self.where}: alpha has NaN or infinite values")
        if self.alpha.item() < 0:
            raise InputRefused(f"{self.where}: alpha must be one number above 0, not {self.alpha.item():g}")
        return self.alpha.item()

    def of_rank(self, rank: int) -> float:
        """The scale alpha / r of a module of rank `rank`; InputRefused where it is so large that the file must be damaged."""
        alpha = (self.number() or rank) if self.fixed is None else self.fixed * rank
        if rank > MAX_RANK or abs(alpha) / rank > MAX_SCALE:
            raise InputRefused(f"{self.where}: rank {rank} with alpha {alpha:g} is far too large; the file is damaged")
        return alpha / rank * self.factor

    def of_full(self) -> float:
        """The scale of a LoKr of two full matrices. As in LyCORIS alpha has no effect; it may be anything."""
        return self.factor if self.fixed is None else self.of_rank(1)


def build(sides: Mapping[str, Tensor], where: str, kernel: int = 1) -> Update:
    """Build the update of a module from the tensors in its file, by `side` (as "down"); they determine its kind.

    No alpha, or alpha 0, means alpha = r as in kohya. `kernel` is the side of the convolution's kernel, for files that have its
    update as a matrix (out, in kh kw). Tensors on the meta device, which have no values, make an update on the meta device.
    InputRefused, whose message begins with `where`, for values that are not finite, ranks that disagree, shapes that do not fit
    a linear or convolution layer, and tensors that make no known update.
    """
    tensors = {side: read(tensor, side, where) for side, tensor in sides.items() if side not in {"alpha", "on_input"}}
    fixed, factor = (tensors.pop(side, None) for side in ("scale", "scalar"))
    for name, tensor in (("scalar", factor), ("on_input", sides.get("on_input"))):
        if tensor is not None and tensor.numel() != 1:
            raise InputRefused(f"{where}: {name} must be one number, not {tensor.numel()}")
    alpha = sides.get("alpha")
    scale = Scale(alpha, None if fixed is None else fixed.item(), 1.0 if factor is None else factor.item(), where)
    magnitude = tensors.pop("magnitude", None)
    on_input = bool(sides["on_input"].any()) if "on_input" in sides else False
    try:
        update = assemble(tensors, scale, on_input, where) if tensors else None
    except InputRefused:
        raise
    except (RuntimeError, KeyError, ValueError, IndexError) as error:  # shapes that cannot be multiplied, a half alone
        shapes = ", ".join(f"{side} {tuple(t.shape)}" for side, t in tensors.items())
        raise InputRefused(f"{where}: tensors are missing or their shapes do not fit together: {shapes}") from error
    if update is None:
        raise InputRefused(f"{where}: {' and '.join(sides)} alone cannot be applied")
    update = unfolded(update, kernel)
    if magnitude is None:
        return update
    if update.shape is None or len(update.shape) < 2:
        raise InputRefused(f"{where}: a DoRA magnitude without a LoRA")
    by_input = magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == update.shape[1]
    if magnitude.numel() != update.shape[1 if by_input else 0]:
        raise InputRefused(f"{where}: DoRA magnitude {tuple(magnitude.shape)} for a weight {update.shape}")
    return Decomposed(update, magnitude.flatten(), by_input)


def read(tensor: Tensor, side: str, where: str) -> Tensor:
    """A copy of a tensor in fp32; InputRefused where it is empty, whole numbers, or has values that are not finite."""
    if not tensor.is_floating_point():
        raise InputRefused(f"{where}: {side} is {tensor.dtype}, not floating point")
    if not tensor.is_meta and not bool(tensor.float().isfinite().all()):
        raise InputRefused(f"{where}: {side} has NaN or infinite values")
    if not tensor.numel():
        raise InputRefused(f"{where}: {side} is empty, shape {tuple(tensor.shape)}")
    return tensor.detach().to("meta" if tensor.is_meta else "cpu", torch.float32, copy=True)


def unfolded(update: Update, kernel: int) -> Update:
    """The update in its convolution's shape (out, in, k, k), where the file has it as a matrix (out, in k k).

    LyCORIS writes LoHa and LoKr of convolutions so, unless they have a Tucker core.
    """
    shape = update.shape
    if kernel == 1 or shape is None or len(shape) != 2 or shape[1] % kernel**2:
        return update
    return update.reshaped((shape[0], shape[1] // kernel**2, kernel, kernel))


def assemble(tensors: dict[str, Tensor], scale: Scale, on_input: bool, where: str) -> Update:
    """The update that a set of tensors makes.

    RuntimeError, KeyError, ValueError or IndexError where shapes do not fit, InputRefused for other sets.
    """
    have = set(tensors)
    if have == {"down", "up"} or have == {"down", "up", "mid"}:
        return low_rank(tensors, scale, where)
    if have == {"w1_a", "w1_b", "w2_a", "w2_b"} or have == {"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}:
        halves = [core(tensors[f"w{i}_a"], tensors[f"w{i}_b"], tensors.get(f"t{i}")) for i in (1, 2)]
        return Dense(halves[0] * halves[1] * scale.of_rank(tensors["w1_b"].shape[0]), "loha")
    if have & {"kron1", "kron1_a"} and have <= {"kron1", "kron1_a", "kron1_b", "kron2", "kron2_a", "kron2_b", "kron_t2"}:
        return kronecker(tensors, scale)
    if have == {"diff"}:
        return Dense(tensors["diff"])
    if have == {"vector"}:
        return Rescaled(tensors["vector"].flatten(), on_input)
    if have == {"a1", "a2", "b1", "b2"} or have == {"a1", "a2", "b1", "b2", "bm"}:
        return generalised(tensors, scale, where)
    if "blocks" in have and have <= {"blocks", "rescale"} and tensors["blocks"].ndim in {3, 4}:
        return rotated(tensors, scale.number())
    missing = {"down", "up"} - have
    if len(missing) == 1:
        raise InputRefused(f"{where}: {missing.pop()} missing")
    raise InputRefused(f"{where}: no known kind of LoRA has these tensors: {', '.join(sorted(have)) or 'alpha alone'}")


def low_rank(tensors: Mapping[str, Tensor], scale: Scale, where: str) -> Factors:
    """LoRA and LoCon. A Tucker core is multiplied into `down`. InputRefused for shapes and ranks that do not fit."""
    down, up = tensors["down"], tensors["up"]
    if "mid" in tensors:
        core = tensors["mid"]
        if core.ndim != 4 or core.shape[0] != up.shape[1] or core.shape[1] != down.shape[0]:
            raise InputRefused(f"{where}: Tucker core {tuple(core.shape)} for ranks {up.shape[1]} and {down.shape[0]}")
        down = torch.einsum("pqhw,qi->pihw", core, down.flatten(1))
        up = up.flatten(1)[..., None, None]
    pair = f"{tuple(down.shape)} and {tuple(up.shape)}"
    if (down.ndim, up.ndim) not in {(2, 2), (4, 4)} or up.shape[2:].numel() != 1:
        raise InputRefused(f"{where}: shapes {pair} are no linear or convolution pair")
    if (rank := down.shape[0]) != up.shape[1]:
        raise InputRefused(f"{where}: down and up differ in rank, shapes {pair}")
    strength = scale.of_rank(rank)
    if not down.is_meta and not math.isfinite(down.abs().amax() * up.abs().amax() * rank * max(abs(strength) * rank, 1.0)):
        raise InputRefused(f"{where}: values so large that their product is infinite; the file is damaged")
    return Factors(down, up * strength)


def generalised(tensors: Mapping[str, Tensor], scale: Scale, where: str) -> Generalised:
    """GLoRA. ValueError where a1 and a2 differ in shape."""
    b = {"up": tensors["b1"], "down": tensors["b2"], **({"mid": tensors["bm"]} if "bm" in tensors else {})}
    a1, a2, plain = tensors["a1"].flatten(1), tensors["a2"].flatten(1), low_rank(b, scale, where)
    if a1.shape != a2.T.shape:
        raise ValueError("a1 is (in, r), a2 (r, in)")
    return Generalised(a1, a2, plain, scale.of_rank(a2.shape[0]))


def rotated(tensors: Mapping[str, Tensor], constraint: float) -> Rotated:
    """OFT and BOFT. ValueError where blocks are not square or cannot be paired, or `rescale` is not one number an output."""
    blocks, rescale = tensors["blocks"], tensors.get("rescale")
    size, out = blocks.shape[-1], blocks.shape[-3:-1].numel()
    if size != blocks.shape[-2] or rescale is not None and rescale.numel() != out:
        raise ValueError("blocks must be square, rescale has a number for every output")
    if blocks.ndim == 4 and (size % 2 or out % (2 ** (blocks.shape[0] - 1) * size)):
        raise ValueError("a butterfly pairs halves of blocks")
    return Rotated(blocks, constraint, rescale)


def core(a: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
    """A B of a (out, r) and b (r, in); with a Tucker core t (r, r, kh, kw), of a (r, out) and b (r, in)."""
    return a @ b if t is None else torch.einsum("ij...,ip,jr->pr...", t, a, b)


def kronecker(tensors: Mapping[str, Tensor], scale: Scale) -> Dense:
    """LoKr. As in LyCORIS, alpha has no effect where both factors are full matrices."""
    first = tensors["kron1"] if "kron1" in tensors else tensors["kron1_a"] @ tensors["kron1_b"]
    rank = None if "kron1" in tensors else tensors["kron1_b"].shape[0]
    if "kron2" in tensors:
        second = tensors["kron2"]
    else:
        a, b, rank = tensors["kron2_a"], tensors["kron2_b"], tensors["kron2_b"].shape[0]
        plain = "kron_t2" not in tensors
        second = (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:]) if plain else core(a, b, tensors["kron_t2"])
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return Dense(torch.kron(first, second.contiguous()) * (scale.of_full() if rank is None else scale.of_rank(rank)), "lokr")


def low_rank_of(update: Update, rank: int | None = None, energy: float = 1.0) -> tuple[Factors, float, float]:
    """The best low-rank approximation of an update (Eckart & Young 1936), the energy that it keeps and the whole energy.

    `rank` None takes the smallest rank that keeps the share `energy`. The energy is the sum of squared singular values.
    """
    shape = update.shape
    assert shape is not None
    assert not update.needs_weight
    if isinstance(update, Factors):  # QR of each side, then an SVD of r x r: exact, and a thousand times less work
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
    """The number of modules of each kind, and the smallest and largest rank (None without low-rank modules)."""
    kinds: dict[str, int] = {}
    for update in updates.values():
        kinds[update.kind] = kinds.get(update.kind, 0) + 1
    ranks = sorted({u.rank for u in updates.values() if isinstance(u, Factors)})
    return {"kinds": kinds, "rank_min": ranks[0] if ranks else None, "rank_max": ranks[-1] if ranks else None}
