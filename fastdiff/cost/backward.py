"""The backward pass in Python, for tensors without numbers: torch's own engine asks the driver of the device that they name.

It walks the graph as torch's engine does: nodes in the reverse order of their making, each once all of its gradients are
there, and what a node saved is freed as soon as the node has run. Only nodes that lead to the wanted parameters run.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks

Node = Any  # torch.autograd.graph.Node; C++ and Python nodes share no class with all the parts used here


class Saved:
    """A tensor that a node keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


class Engine:
    """Runs backward passes. `watching` makes torch use it."""

    def __init__(self) -> None:
        self.unpacked: list[Saved] = []  # what the node that runs now has read
        self.passes = count(1)
        self.running = -1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Replace torch's engine during the `with`. Graphs that were made before it cannot be used in it."""
        with (
            saved_tensors_hooks(Saved, self.unpack),
            patch.object(torch.autograd, "backward", self.backward),
            patch.object(torch.autograd, "grad", self.grad),
            patch.object(torch._C, "_current_graph_task_id", lambda: self.running),
        ):
            yield

    def unpack(self, saved: Saved) -> Tensor:
        self.unpacked.append(saved)
        assert saved.tensor is not None, "a second backward pass through the same graph"
        return saved.tensor

    def backward(
        self, tensors: Any, grad_tensors: Any = None, retain_graph: bool | None = None, create_graph: bool = False,
        grad_variables: Any = None, inputs: Any = None,
    ) -> None:  # fmt: skip
        """Stand-in for `torch.autograd.backward`: add the gradients of the tensors' sum to the `grad` of leaves."""
        wanted = None if inputs is None else {id(p) for p in ((inputs,) if isinstance(inputs, Tensor) else inputs)}

        def accumulate(leaf: Tensor, grad: Tensor) -> None:
            if leaf.grad is None:
                leaf.grad = grad
            else:
                leaf.grad.add_(grad)

        self.run(sequence(tensors), sequence(grad_tensors), wanted, accumulate, keep=bool(retain_graph))

    def grad(self, outputs: Any, inputs: Any, grad_outputs: Any = None, retain_graph: bool | None = None, **_: Any) -> Any:
        """Stand-in for `torch.autograd.grad` of leaves."""
        leaves: Sequence[Tensor] = sequence(inputs)
        sums: dict[int, Tensor] = {}

        def collect(leaf: Tensor, grad: Tensor) -> None:
            sums[id(leaf)] = sums[id(leaf)] + grad if id(leaf) in sums else grad

        self.run(sequence(outputs), sequence(grad_outputs), {id(p) for p in leaves}, collect, keep=bool(retain_graph))
        return tuple(sums.get(id(p)) for p in leaves)

    @torch.no_grad()
    def run(
        self, roots: Sequence[Tensor], grads: Sequence[Tensor], wanted: set[int] | None, give: Callable[[Tensor, Tensor], None],
        *, keep: bool,
    ) -> None:  # fmt: skip
        """Walk back from the roots; `give` gets every wanted leaf with its gradient, `keep` keeps what the nodes saved."""
        self.running, before = next(self.passes), self.running
        buffers: dict[Node, list[Tensor | None]] = {}
        first = [edge_of(root) for root in roots]
        needed = leading_to(wanted, [node for node, _ in first])
        waits = dict.fromkeys(needed, 0)
        for node in needed:
            for following, _ in node.next_functions:
                if following in waits:
                    waits[following] += 1
        ready: list[tuple[int, int, Node]] = []
        order = count()

        def push(node: Node) -> None:
            last = "AccumulateGrad" in node.name()  # torch runs these at once, so that no gradient waits
            heapq.heappush(ready, (-(2**62) if last else -node._sequence_nr(), next(order), node))

        given: Sequence[Tensor | None] = grads or [None] * len(roots)
        for (node, index), root, grad in zip(first, roots, given, strict=True):
            if node in needed:
                receive(buffers, node, index, torch.ones_like(root) if grad is None else grad)
        for node in {node for node, _ in first if node in needed and waits[node] == 0}:
            push(node)
        try:
            while ready:
                node = heapq.heappop(ready)[-1]
                nothing: list[Tensor | None] = [None] * inputs_of(node)
                received = buffers.pop(node, nothing)
                if "AccumulateGrad" in node.name():
                    if received[0] is not None:
                        give(node.variable, received[0])
                    continue
                out = self.call(node, received, keep)
                del received
                for i, (following, index) in enumerate(node.next_functions):
                    if following not in waits:
                        continue
                    if i < len(out) and (grad := out[i]) is not None:
                        receive(buffers, following, index, grad)
                        out[i] = grad = None
                    waits[following] -= 1
                    if waits[following] == 0:
                        push(following)
        finally:
            self.running = before

    def call(self, node: Node, grads: list[Tensor | None], keep: bool) -> list[Tensor | None]:
        """Run one node on the gradients of its outputs, free what it saved, and return the gradients of its inputs."""
        outer, self.unpacked = self.unpacked, []
        if not isinstance(node, BackwardCFunction):
            out = node(*grads)
        else:  # a Function written in Python: torch gives it zeros for missing gradients
            metadata = cast(Node, node)._input_metadata
            zeros = lambda m: torch.zeros(m.shape, dtype=m.dtype, device=m.device)
            out = node.apply(*(zeros(m) if g is None else g for g, m in zip(grads, metadata, strict=True)))
        if not keep:
            for saved in self.unpacked:
                saved.tensor = None
        self.unpacked = outer
        return list(out) if isinstance(out, tuple) else [out]


def sequence(tensors: Any) -> Sequence[Tensor]:
    """Return one tensor, several or None as a sequence."""
    return () if tensors is None else (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def edge_of(tensor: Tensor) -> tuple[Node, int]:
    """Return the node that made a tensor, and which of the node's outputs the tensor is."""
    node: Node = tensor.grad_fn
    if node is None:
        node = cast(Node, tensor.expand_as(tensor).grad_fn).next_functions[0][0]  # a leaf: the node that collects its gradient
    return node, tensor.output_nr


def inputs_of(node: Node) -> int:
    """Return of how many tensors a node takes gradients."""
    return len(node._input_metadata)


def receive(buffers: dict[Node, list[Tensor | None]], node: Node, index: int, grad: Tensor) -> None:
    """Add a gradient to what a node has got, in the dtype and shape of the tensor that it belongs to."""
    metadata = node._input_metadata[index]
    if grad.shape != metadata.shape:
        grad = grad.sum_to_size(metadata.shape)
    grad = grad.to(metadata.dtype)
    slots = buffers.setdefault(node, [None] * inputs_of(node))
    held = slots[index]
    slots[index] = grad if held is None else held + grad


def leading_to(wanted: set[int] | None, roots: Iterable[Node]) -> set[Node]:
    """Return the nodes behind the roots from which a wanted leaf can be reached; all nodes if `wanted` is None."""
    needed: dict[Node, bool] = {}
    for root in roots:
        stack = [(root, False)]
        while stack:
            node, expanded = stack.pop()
            if node is None or (node in needed and not expanded):
                continue
            following = [n for n, _ in node.next_functions if n is not None]
            if not expanded:
                needed[node] = wanted is None or ("AccumulateGrad" in node.name() and id(node.variable) in wanted)
                stack.append((node, True))
                stack += [(n, False) for n in following if n not in needed]
            else:
                needed[node] = needed[node] or any(needed.get(n, False) for n in following)
    return {node for node, leads in needed.items() if leads}
