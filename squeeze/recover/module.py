"""An ONNX graph as a PyTorch module, and trained values back under their names.

Nothing is converted or exported: `GraphModule` walks the nodes of the onnx_ir graph
and calls one function of `ops.TABLE` for each. Parameters are keyed by initializer
name. What the table lacks runs in onnxruntime, and no gradient passes through it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from squeeze import model as models
from squeeze import shapes as shaping
from squeeze.errors import SqueezeError
from squeeze.recover.island import Island
from squeeze.recover.ops import Function, Op, find
from squeeze.shapes import Shapes

HOST_ELEMENTS = 64  # shapes, axes and pads: integers that functions read as lists
FOLD_ELEMENTS = 2**24

# inputs that are trained whatever their size, and BatchNormalization's statistics
TRAINED: dict[str, tuple[int, ...]] = {
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Einsum": (0, 1, 2, 3),
    "Gemm": (0, 1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "MatMul": (0, 1),
    "PRelu": (1,),
    "RMSNormalization": (1,),
}
STATISTICS: dict[str, tuple[int, ...]] = {"BatchNormalization": (3, 4)}
# ops whose constants are settings, not weights
SETTINGS = frozenset(
    "Clip ConstantOfShape CumSum Mod OneHot Pad Pow Range Resize TopK Upsample".split()
)


@dataclass(frozen=True)
class Step:
    """One node, ready to be called."""

    name: str
    op: Op
    function: Function
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    island: bool = False


class GraphModule(nn.Module):
    """The graph of `model` as a module; `parameters()` are its floating weights.

    Floats of 16 bits are computed and trained in 32. `run` gives any values by name,
    calling the module gives the outputs. Built by `to_torch`.
    """

    def __init__(self, model: ir.Model, shapes: Shapes | None = None) -> None:
        super().__init__()
        graph = model.graph
        self.input_names = tuple(v.name or "" for v in graph.inputs)
        self.output_names = tuple(v.name or "" for v in graph.outputs)
        self.input_sizes = input_sizes(graph)
        self.dtypes: dict[str, ir.DataType] = {}
        self.host: dict[str, Tensor] = {}
        self.norms_key = _free_name("norms", graph.initializers)
        self._modules[self.norms_key] = nn.ModuleList()
        self.norm_at: dict[str, int] = {}
        self._plans: dict[Any, list[tuple[Step, tuple[str, ...]]]] = {}
        self._register(graph)
        self.steps = [_step(node, model, shapes) for node in graph]
        self._freeze_shared_statistics()
        if shapes is not None and shapes.inputs:
            self._fix_targets(graph, shapes)
        self._fold()
        self.producer = {name: step for step in self.steps for name in step.outputs}
        self.reached = self._reached()
        self.train(False)

    @property
    def norms(self) -> nn.ModuleList:
        """Normalisation that training put in (`recover.norms`)."""
        return self._modules[self.norms_key]  # type: ignore[return-value]

    # -- building ---------------------------------------------------------------

    def _register(self, graph: ir.Graph) -> None:
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                raise SqueezeError(f"initializer {name!r} holds no values")
            kind = role(value)
            if kind == "constant" and _for_islands(value):
                continue  # they read it from the model itself
            self._keep(name, kind, tensor)

    def _keep(self, name: str, kind: str, tensor: ir.TensorProtocol) -> None:
        data = as_tensor(tensor)
        self.dtypes[name] = tensor.dtype
        if kind == "parameter":
            # register_parameter refuses the dots that names are full of
            self._parameters[name] = nn.Parameter(data)
        elif kind == "statistics":
            self._buffers[name] = data
        else:
            self._constant(name, data)

    def _freeze_shared_statistics(self) -> None:
        """Statistics that something else reads as well must not follow the batches.

        Exporters store equal initializers once, be they means, scales or offsets.
        """
        uses: dict[str, int] = {}
        for step in self.steps:
            for name in step.inputs:
                uses[name] = uses.get(name, 0) + 1
        for step in self.steps:
            slots = STATISTICS.get(step.op.kind, ())
            names = [step.inputs[i] for i in slots]
            step.op.frozen = any(uses[n] > 1 or n not in self._buffers for n in names)

    def _constant(self, name: str, data: Tensor) -> None:
        if not data.is_floating_point() and data.numel() <= HOST_ELEMENTS:
            self.host[name] = data
        else:
            self._buffers[name] = data
            self._non_persistent_buffers_set.add(name)

    def _fix_targets(self, graph: ir.Graph, shapes: Shapes) -> None:
        """Write out -1 and 0 of constant Reshape targets where the batch is fixed.

        A target without -1 can be scaled to another batch (`ops.layout.rebatched`).
        """
        first = graph.inputs[0].shape if graph.inputs else None
        if first is None or not len(first) or not isinstance(first[0], int):
            return
        for node in graph:
            target = (
                node.inputs[1].name if len(node.inputs) > 1 and node.inputs[1] else ""
            )
            if node.op_type == "Reshape" and target in self.host:
                known = shapes.of(node.outputs[0])
                used_once = len(node.inputs[1].uses()) == 1  # type: ignore[union-attr]
                if known is not None and used_once and 0 not in known:
                    self.host[target] = torch.tensor(known, dtype=torch.int64)

    def _fold(self) -> None:
        """Evaluate once what depends on constants alone."""
        persistent = {
            k for k in self._buffers if k not in self._non_persistent_buffers_set
        }
        known = {k: v for k, v in self._buffers.items() if k not in persistent}
        env: dict[str, Any] = {**known, **self.host}
        kept = []
        for step in self.steps:
            if not step.inputs or not all(n in env or not n for n in step.inputs):
                kept.append(step)
                continue
            with torch.no_grad():
                outputs = self._call(step, env)
            if sum(v.numel() for v in outputs) > FOLD_ELEMENTS:
                kept.append(step)
                continue
            for name, value in zip(step.outputs, outputs, strict=False):
                env[name] = value
                self._constant(name, value)
        self.steps = kept

    def _reached(self) -> frozenset[str]:
        """Values that a gradient can pass through on its way to a parameter."""
        found = set(self._parameters)
        for step in self.steps:
            if not step.island and any(n in found for n in step.inputs):
                found.update(step.outputs)
        return frozenset(found)

    # -- running ----------------------------------------------------------------

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Inputs in the graph's order or by name; one output, or a tuple of them."""
        inputs = {**dict(zip(self.input_names, args, strict=False)), **kwargs}
        values = self.run(inputs)
        outputs = tuple(values[name] for name in self.output_names)
        return outputs[0] if len(outputs) == 1 else outputs

    def run(
        self,
        inputs: Mapping[str, Tensor],
        wanted: Iterable[str] | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The values named `wanted` (default: the outputs).

        A value in `given` replaces the computed one for everything that reads it;
        what is returned for it is still the computed one.
        """
        wanted = tuple(self.output_names if wanted is None else wanted)
        given = given or {}
        env: dict[str, Any] = {**inputs, **self.host}
        found = {name: env[name] for name in wanted if name in env}
        env.update(given)
        for step, finished in self._plan(wanted, frozenset(given)):
            outputs = self._call(step, env)
            for name, value in zip(step.outputs, outputs, strict=False):
                if name in self.norm_at:
                    value = self.norms[self.norm_at[name]](value)
                if name in wanted:
                    found[name] = value
                env[name] = given.get(name, value)
            for name in finished:
                env.pop(name, None)
        for name in wanted:
            if name not in found:
                found[name] = self._weight(name)
        return found

    def _call(self, step: Step, env: Mapping[str, Any]) -> Sequence[Tensor]:
        arguments = [self._value(n, env) if n else None for n in step.inputs]
        try:
            result = step.function(step.op, *arguments)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SqueezeError(
                f"{step.op.kind} {step.name!r} fails: {reason}"
            ) from error
        return [result] if isinstance(result, Tensor) else result

    def _value(self, name: str, env: Mapping[str, Any]) -> Tensor:
        return env[name] if name in env else self._weight(name)

    def _weight(self, name: str) -> Tensor:
        for table in (self._parameters, self._buffers):
            if (found := table.get(name)) is not None:
                return found
        raise SqueezeError(f"value {name!r} was not given and is not in the graph")

    def _plan(
        self, wanted: tuple[str, ...], given: frozenset[str]
    ) -> list[tuple[Step, tuple[str, ...]]]:
        """The steps that `wanted` needs, each with the values nobody reads after it."""
        key = (wanted, given)
        if key not in self._plans:
            self._plans[key] = self._make_plan(wanted, given)
        return self._plans[key]

    def _make_plan(
        self, wanted: tuple[str, ...], given: frozenset[str]
    ) -> list[tuple[Step, tuple[str, ...]]]:
        needed, steps = set(wanted), []
        for step in reversed(self.steps):
            if needed.intersection(step.outputs):
                steps.append(step)
                needed.update(n for n in step.inputs if n and n not in given)
        plan, last = [], set[str]()
        for step in steps:  # from the last to the first
            finished = {n for n in (*step.inputs, *step.outputs) if n} - last
            plan.append((step, tuple(finished)))
            last |= finished
        return plan[::-1]

    def place(self, device: torch.device) -> None:
        """Move to the device, weights as `placed` puts what they meet."""
        self._apply(lambda x: placed(x, device))  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> GraphModule:
        """BatchNormalization uses the batch's statistics while training."""
        super().train(mode)
        for step in getattr(self, "steps", ()):
            step.op.training = mode and not step.op.frozen
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], *args: Any, **kw: Any
    ) -> Any:
        """As in PyTorch, for names with dots."""
        missing = set(self.state_dict()) ^ set(state_dict)
        if missing:
            raise SqueezeError(f"state does not fit the module: {sorted(missing)[0]!r}")
        return super().load_state_dict(state_dict, strict=False)

    # -- what comes out -----------------------------------------------------------

    def initializers(self) -> dict[str, np.ndarray]:
        """Trained values by initializer name, inserted normalisation folded in."""
        from squeeze.recover.norms import folded

        values = {
            name: tensor.detach()
            for table in (self._parameters, self._buffers)
            for name, tensor in table.items()
            if tensor is not None and name not in self._non_persistent_buffers_set
        }
        values.update(folded(self))
        return {
            name: tensor.double().cpu().numpy().astype(self.dtypes[name].numpy())
            for name, tensor in values.items()
        }


def to_torch(model: ir.Model | str | os.PathLike[str]) -> GraphModule:
    """The model as a PyTorch module in evaluation mode; the model is not changed.

    Raises SqueezeError for control flow, which neither PyTorch nor onnxruntime can
    run from the outside.
    """
    if not isinstance(model, ir.Model):
        model = models.load(model)
    return GraphModule(model, known_shapes(model))


def placed(x: Tensor, device: torch.device) -> Tensor:
    """On the device; images with their channels last, as convolutions run faster."""
    if x.dim() == 4:
        return x.to(device, memory_format=torch.channels_last)
    return x.to(device)


def known_shapes(model: ir.Model) -> Shapes | None:
    """The model's shapes, None where its inputs are dynamic."""
    try:
        return shaping.infer(model)
    except SqueezeError:
        return None


def write_back(model: ir.Model, module: GraphModule) -> None:
    """Put the module's values into the model it was made from, under the same names.

    Names, opset, inputs and outputs stay; types too, so a float16 weight is rounded.
    """
    for name, array in module.initializers().items():
        value = model.graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise SqueezeError(
                f"the model has no initializer {name!r}; pass its own module"
            )
        shape = tuple(int(n) for n in value.const_value.shape.numpy())
        if shape != array.shape:
            raise SqueezeError(
                f"initializer {name!r} is {shape}, trained {array.shape}"
            )
        if array.dtype.kind in "fV" and not np.isfinite(array.astype(np.float64)).all():
            raise SqueezeError(f"initializer {name!r} holds infinite or NaN values")
        value.const_value = ir.Tensor(np.ascontiguousarray(array), name=name)


# -- values -------------------------------------------------------------------------


def role(value: ir.Value) -> str:
    """`parameter`, `statistics` or `constant`: what an initializer is for.

    One element is a setting (an epsilon, a scale) unless it stands where weights do.
    """
    tensor = value.const_value
    if tensor is None or not tensor.dtype.is_floating_point():
        return "constant"
    uses = [(use.node.op_type, use.idx) for use in value.uses()]
    if any(index in STATISTICS.get(op, ()) for op, index in uses):
        return "statistics"
    if any(index in TRAINED.get(op, ()) for op, index in uses):
        return "parameter"
    if not uses or tensor.size <= 1 or any(op in SETTINGS for op, _ in uses):
        return "constant"
    return "parameter"


def as_tensor(tensor: ir.TensorProtocol) -> Tensor:
    """A copy in memory: float64 stays, other floats become float32."""
    array = np.asarray(tensor.numpy())
    if tensor.dtype.is_floating_point():
        return torch.tensor(
            array if array.dtype == np.float64 else array.astype(np.float32)
        )
    if array.dtype == np.bool_:
        return torch.tensor(array)
    return torch.tensor(array.astype(np.int64) if array.dtype.kind == "u" else array)


def input_sizes(graph: ir.Graph) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs that fix all but their batch."""
    return {v.name or "": s for v in graph.inputs if (s := _sizes(v))}


def _sizes(value: ir.Value) -> tuple[int, ...]:
    """An input's shape if all but its batch is fixed, else nothing."""
    dims = list(value.shape) if value.shape is not None else []
    if not dims or not all(isinstance(d, int) for d in dims[1:]):
        return ()
    first = dims[0] if isinstance(dims[0], int) else 1
    return (first, *(int(d) for d in dims[1:] if isinstance(d, int)))


def _free_name(name: str, taken: Iterable[str]) -> str:
    """With underscores until no state of an initializer can be mistaken for its own."""
    while any(t == name or t.startswith(f"{name}.") for t in taken):
        name += "_"
    return name


def _for_islands(value: ir.Value) -> bool:
    nodes = [use.node for use in value.uses()]
    return bool(nodes) and all(find(_op(n, 0), n.domain) is None for n in nodes)


def _op(node: ir.Node, opset: int) -> Op:
    attributes = {name: _attribute(a) for name, a in node.attributes.items()}
    return Op(node.op_type, opset, attributes, len(_names(node.outputs)))


def _attribute(attribute: ir.Attr) -> Any:
    value = attribute.value
    if isinstance(value, ir.TensorProtocol):
        return np.array(value.numpy())
    return list(value) if isinstance(value, tuple) else value


def _names(values: Sequence[ir.Value | None]) -> tuple[str, ...]:
    names = [(v.name or "") if v is not None else "" for v in values]
    while names and not names[-1]:
        names.pop()
    return tuple(names)


def _step(node: ir.Node, model: ir.Model, shapes: Shapes | None) -> Step:
    op = _op(node, node.version or models.opset(model))
    function = find(op, node.domain)
    name = models.node_name(node)
    inputs, outputs = _names(node.inputs), _names(node.outputs)
    if function is not None:
        return Step(name, op, function, inputs, outputs)
    if any(
        a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for a in node.attributes.values()
    ):
        raise SqueezeError(
            f"{node.op_type} {name!r}: control flow can't be trained through; "
            "simplify the model, or distil the part without it"
        )
    pairs = zip(inputs, node.inputs, strict=False)  # trailing empty ones have no name
    fed = tuple(name if _is_fed(value) else "" for name, value in pairs)
    return Step(name, op, Island(node, model, shapes, fed), fed, outputs, island=True)


def _is_fed(value: ir.Value | None) -> bool:
    """Whether an island gets it from outside; constants are in its own model."""
    known = value is not None and value.is_initializer() and value.const_value
    return not known or role(value) == "parameter"  # type: ignore[arg-type]
