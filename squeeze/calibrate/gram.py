"""Gram matrices of rows, by onnxruntime.

Its float32 kernel is up to twice as fast as that of numpy's BLAS on processors that
the latter does not know, and its threads don't contend with those of the session that
the rows come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from onnx import TensorProto, helper

from squeeze import session

Array = np.ndarray
BLOCKS = 4  # of columns: 10 of 16 products are computed, the others are their mirrors
NARROW = 256  # columns up to which one product is quicker than ten


def add_product(rows: Array, total: Array) -> None:
    """total += rowsᵀ · rows, on and above its diagonal at least.

    rows (R, D) in float32, total (D, D) in float64.
    """
    width = rows.shape[1]
    blocks = 1 if width <= NARROW else BLOCKS
    step = -(-width // blocks)
    found = _products(blocks).run(None, {"rows": rows})
    for (i, j), block in zip(_pairs(blocks), found, strict=True):
        total[i * step : (i + 1) * step, j * step : (j + 1) * step] += block


def complete(total: Array, left: Array, right: Array) -> None:
    """The whole of a symmetric sum from its upper part, + left rightᵀ + right leftᵀ.

    total (D, D), left and right (D,). In place and block by block: fresh memory of this
    size costs more than the sums.
    """
    for start in range(0, len(total), NARROW):
        part = slice(start, start + NARROW)
        corner = np.triu(total[part, part])
        total[part, part] = corner + np.triu(corner, 1).T
        total[part.stop :, part] = total[part, part.stop :].T
    for start in range(0, len(total), NARROW):
        part = slice(start, start + NARROW)
        total[part] += np.outer(left[part], right)
        total[part] += np.outer(right[part], left)


def _pairs(blocks: int) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(blocks) for j in range(i, blocks))


@cache
def _products(blocks: int) -> session.Session:
    """All products of blocks of columns on and above the diagonal."""
    parts = [f"part{i}" for i in range(blocks)]
    nodes = [helper.make_node("Split", ["rows"], parts, axis=1, num_outputs=blocks)]
    outputs = []
    for i, j in _pairs(blocks):
        name = f"product{i}_{j}"
        nodes.append(helper.make_node("Gemm", [parts[i], parts[j]], [name], transA=1))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["r", "d"])
    graph = helper.make_graph(nodes, "products", [rows], outputs)
    opset = [helper.make_opsetid("", 18)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=8)
    return session.create(made.SerializeToString(), spin=False)
