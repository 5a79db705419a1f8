"""Proofs that a removal is right: the original with the same channels silenced.

T1 zeroes exactly the elements of constants that removal deletes. T2 also masks every
labelled value after its node, and takes statistics over the kept channels.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from squeeze import model as models
from squeeze import session
from squeeze import shapes as shaping
from squeeze.rewrite.channels import axes_of, prepare, remove, trace


def traced(model, given=None, **options):
    """A trace of a copy of the model."""
    work = model.clone()
    shapes = shaping.infer(work, given or {})
    return trace(prepare(work, shapes), **options)


def silence(found, keep, masks=False):
    """Zero in the traced model, in place, what removal with `keep` would delete."""
    graph = found.model.graph
    plan = [
        (n, i, [found.mask(a, keep) for a in axes])
        for (n, i), axes in found.uses.items()
    ]
    statistics = {s.node for s in found.statistics}
    outputs = {v: [found.mask(a, keep) for a in axes] for v, axes in found.axes.items()}
    inputs = {
        n: [found.mask(a, keep) for a in axes_of(found, n, 0)] for n in statistics
    }
    for node, index, mask in plan:
        if all(m.all() for m in mask):
            continue
        array = node.inputs[index].const_value.numpy()
        if node in statistics:
            for axis, m in enumerate(mask):
                array = array.compress(m, axis)
        else:
            array = np.where(outer(mask), array, np.zeros((), array.dtype))
        add(graph, node, index, array)
    if masks:
        for node in list(graph):
            if node in statistics:
                over_kept(graph, node, inputs[node], outputs[node.outputs[0]])
            else:
                for value in node.outputs:
                    if value in outputs and not all(m.all() for m in outputs[value]):
                        after(graph, node, value, outer(outputs[value]))
    return found.model


def outer(masks):
    """One boolean array from a mask per axis; length 1 where an axis is whole."""
    result = np.ones((1,) * len(masks), bool)
    for axis, m in enumerate(masks):
        if not m.all():
            shape = [1] * len(masks)
            shape[axis] = len(m)
            result = result & m.reshape(shape)
    return result


def add(graph, node, index, array):
    name = f"silenced_{len(graph.initializers)}_{index}"
    node.replace_input_with(
        index, models.add_initializer(graph, ir.Tensor(array, name=name))
    )


def constant(graph, array):
    name = f"proof_{len(graph.initializers)}"
    return models.add_initializer(graph, ir.Tensor(array, name=name))


def after(graph, node, value, mask):
    """Multiply a value by a mask, for all its readers."""
    dtype = value.dtype.numpy() if value.dtype is not None else np.float32
    factor = constant(graph, mask.astype(dtype))
    product = ir.node("Mul", [value, factor])
    product.outputs[0].name = f"{value.name}_masked"
    value.replace_all_uses_with(product.outputs[0])
    product.replace_input_with(0, value)
    graph.insert_after(node, product)


def over_kept(graph, node, before, result):
    """x → kept channels → node → the others back as zeros."""
    source = node.inputs[0]
    for axis, mask in enumerate(before):
        if not mask.all():
            kept = ir.node(
                "Gather",
                [source, constant(graph, np.flatnonzero(mask))],
                {"axis": axis},
            )
            kept.outputs[0].name = f"{node.outputs[0].name}_kept{axis}"
            graph.insert_before(node, kept)
            source = kept.outputs[0]
    node.replace_input_with(0, source)
    value = node.outputs[0]
    for axis, mask in enumerate(result):
        if not mask.all():
            spread = np.eye(len(mask), dtype=np.float32)[mask]  # (kept, all)
            order = [i for i in range(len(result)) if i != axis] + [axis]
            readers = list(value.uses())
            there = ir.node("Transpose", [value], {"perm": order})
            wide = ir.node("MatMul", [there.outputs[0], constant(graph, spread)])
            back = ir.node(
                "Transpose",
                [wide.outputs[0]],
                {"perm": [int(i) for i in np.argsort(order)]},
            )
            for number, made in enumerate((there, wide, back)):
                made.outputs[0].name = f"{value.name}_spread{axis}_{number}"
            graph.insert_after(node, [there, wide, back])
            for user, index in readers:
                user.replace_input_with(index, back.outputs[0])
            node, value = back, back.outputs[0]


def outputs(model, feeds):
    """What onnxruntime computes, without its optimisations."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    proto = ir.to_proto(model)
    for info in proto.graph.output:  # the graph's outputs may be inner values here
        info.type.tensor_type.ClearField("shape")
    runner = session.create(proto.SerializeToString(), optimize=False, threads=1)
    return runner.run(None, feeds)


def difference(one, other):
    """Largest |a − b| over the largest |b|, over all outputs."""
    return max(
        float(
            np.abs(a.astype(float) - b).max()
            / max(1e-30, np.abs(b.astype(float)).max())
        )
        for a, b in zip(one, other, strict=True)
    )


def prove(model, feeds, keep_of, masks=None, given=None, **options):
    """(error of the proof, change against the untouched original, trace, its mask).

    `keep_of` gives the mask for a trace. Masks are used where statistics read channels.
    """
    first = traced(model, given, **options)
    keep = keep_of(first)
    if masks is None:
        masks = bool(first.statistics)
    expected = outputs(silence(traced(model, given, **options), keep, masks), feeds)
    untouched = outputs(first.model, feeds)
    remove(first, keep)
    got = outputs(first.model, feeds)
    return difference(got, expected), difference(got, untouched), first, keep


# -- weights with life in them ---------------------------------------------------------


def liven(model, seed=0):
    """He weights, uneven normalisation and biases, in place: outputs that depend."""
    rng = np.random.default_rng(seed)
    prepare(model, shaping.infer(model, {}))
    done = set()
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is None or value in done or value.const_value is None:
                continue
            tensor = value.const_value
            if not tensor.dtype.is_floating_point() or tensor.size < 2:
                continue
            done.add(value)
            array = lively(rng, node, index, tuple(tensor.shape.numpy()))
            value.const_value = ir.Tensor(array.astype(np.float32), name=value.name)
    return model


def lively(rng, node, index, shape):
    if node.op_type in ("Conv", "ConvTranspose") and index == 1:
        fan = np.prod(shape[1:]) if node.op_type == "Conv" else shape[0]
        return rng.standard_normal(shape) * np.sqrt(2 / fan)
    if node.op_type in ("Gemm", "MatMul") and len(shape) > 1:
        fan = shape[1] if node.attributes.get_int("transB", 0) else shape[-2]
        return rng.standard_normal(shape) * np.sqrt(2 / fan)
    if node.op_type == "BatchNormalization" and index in (1, 4):
        return rng.uniform(0.5, 1.5, shape)
    if node.op_type in ("LayerNormalization", "Mul") and index == 1:
        return rng.uniform(0.5, 1.5, shape)
    return rng.standard_normal(shape) * 0.3


def logits(model):
    """Take the outputs before a final Softmax, which hides differences."""
    for index, value in enumerate(list(model.graph.outputs)):
        node = value.producer()
        while node is not None and node.op_type in ("Softmax", "Reshape", "Identity"):
            value = node.inputs[0]
            node = value.producer()
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs[index] = value
    return model
