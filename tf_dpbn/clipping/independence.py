"""Proves of a traced graph that examples stay apart: row i of a tensor depends on example i alone.

A batch can run through a model as it is, in ordinary kernels, if no operation lets one example see another. This file
shows it by abstract interpretation: each tensor is free of examples, or holds one example in each entry of one axis,
and there is one rule for each type of operation that carries this from its inputs to its outputs. What has no rule, or
a form that its rule does not cover, is not proved, and the engine vectorizes over examples instead.

The shapes of a trace are static, so that a reshape is followed exactly: an example's number is a digit of an element's
position, and a reshape keeps positions. The number of rows is a constant of the graph, like any other: it is fixed
before examples are drawn.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dpbn import _graph


class NotProvedError(Exception):
    """Says which operation keeps examples from being seen to stay apart."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """One example in each entry of an axis, or one in each of several entries.

    The axis has outer * rows * inner entries; entry (a * rows + i) * inner + b belongs to example i.

    Attributes:
      axis: from the front, >= 0.
      outer, inner: how often all examples are repeated, and each of them.
    """

    axis: int
    outer: int = 1
    inner: int = 1


# None stands for a tensor that is free of examples: the same whatever they are.
State = Rows | None
_Rule = Callable[["Proof", Any, Sequence[State]], "State | list[Any]"]
_RULES: dict[str, _Rule] = {}


def _rule(*types: str) -> Callable[[_Rule], _Rule]:
    def register(function: _Rule) -> _Rule:
        for each in types:
            for name in each.split():
                _RULES[name] = function
        return function

    return register


class Proof:
    """What is known of the tensors of one traced graph.

    Args:
      examples: the tensors through which examples enter, each [rows, ...]. All others that enter are free of them.
      rows: how many examples there are, at least 2.
      index: differs between the batches of a step; stateless random numbers whose seed has it are drawn anew for each.
    """

    def __init__(self, examples: Iterable[tf.Tensor], rows: int, index: tf.Tensor | None = None) -> None:
        if rows < 2:
            raise NotProvedError("a single row cannot be told from an axis of size one")
        self.rows = rows
        self._index = index
        self._states: dict[int, Any] = {}
        for tensor in examples:
            if not tensor.shape.rank or tensor.shape[0] != rows:
                raise NotProvedError("the number of rows is unknown")
            self._states[id(tensor)] = Rows(0)

    def state(self, tensor: tf.Tensor) -> State:
        """What is known of a tensor.

        Raises:
          NotProvedError: if it is not known that examples stay apart in it.
        """
        # By a stack of its own: networks are deeper than Python's.
        stack = [tensor]
        while stack:
            top = stack[-1]
            if id(top) in self._states:
                stack.pop()
                continue
            missing = [each for each in top.op.inputs if id(each) not in self._states]
            if missing:
                stack += missing
                continue
            self._evaluate(top.op)
        found = self._states[id(tensor)]
        if isinstance(found, str):
            raise NotProvedError(found)
        return found

    def assume(self, tensor: tf.Tensor, state: Rows) -> None:
        """Takes it that examples stay apart in a tensor, by how it was made."""
        self._states[id(tensor)] = state

    def rows_of(self, tensor: tf.Tensor) -> Rows:
        """The state of a tensor that depends on examples.

        Raises:
          NotProvedError: if it does not, or if it is not known that they stay apart in it.
        """
        state = self.state(tensor)
        if state is None:
            raise NotProvedError(f"{_name(tensor.op)} is the same for all examples")
        return state

    def has_fresh_seed(self, operation: tf.Operation) -> bool:
        """Whether a random operation draws other numbers for every batch: by a state, or by a seed with the index."""
        if not operation.type.startswith("Stateless"):
            return True
        seen: set[int] = set()
        stack = list(operation.inputs)
        while stack:
            tensor = stack.pop()
            if tensor is self._index:
                return True
            if id(tensor) not in seen:
                seen.add(id(tensor))
                stack += tensor.op.inputs
        return False

    def repeat_if_alike(self, tensor: tf.Tensor) -> None:
        """Takes a tensor that is free of examples, but has an equal row for each, as one that depends on them."""
        if self.state(tensor) is None and tensor.shape.rank and tensor.shape[0] == self.rows:
            if _is_alike(self, tensor, -tensor.shape.rank):
                self.assume(tensor, Rows(0))

    def is_rows(self, tensor: tf.Tensor) -> bool:
        """Whether a tensor depends on examples, each on its own."""
        return self.state(tensor) is not None

    def by_row(self, tensor: tf.Tensor) -> tf.Tensor:
        """A tensor that depends on examples as [rows, *row_shape]."""
        state = self.rows_of(tensor)
        shape, axis = tensor.shape.as_list(), state.axis
        if axis == 0 and state.outer == 1:
            return tf.reshape(tensor, [self.rows, state.inner, *shape[1:]])
        split = tf.reshape(tensor, [*shape[:axis], state.outer, self.rows, state.inner, *shape[axis + 1 :]])
        order = [axis + 1, *[k for k in range(len(shape) + 2) if k != axis + 1]]
        return tf.reshape(tf.transpose(split, order), [self.rows, *self.row_shape(tensor)])

    def row_shape(self, tensor: tf.Tensor) -> tf.TensorShape:
        """The shape that the tensor would have if there were one example."""
        state = self.rows_of(tensor)
        shape = tensor.shape.as_list()
        shape[state.axis] = state.outer * state.inner
        return tf.TensorShape(shape)

    def _evaluate(self, operation: tf.Operation) -> None:
        states = [self._states[id(tensor)] for tensor in operation.inputs]
        outputs: Any
        unproved = [state for state in states if isinstance(state, str)]
        of_examples = [t for t, state in zip(operation.inputs, states, strict=True) if isinstance(state, Rows)]
        if unproved:
            outputs = unproved[0]
        elif not of_examples:
            outputs = None
        elif operation.type not in _RULES:
            outputs = f"there is no rule for {_name(operation)}"
        elif not all(tensor.shape.is_fully_defined() for tensor in of_examples):
            outputs = f"shapes are unknown at {_name(operation)}"
        else:
            _infer_shape(operation)
            try:
                outputs = _RULES[operation.type](self, operation, states)
            except NotProvedError as error:
                outputs = str(error)
            except (TypeError, ValueError, tf.errors.OpError):  # a form that the rule does not know
                outputs = str(_refuse(operation))
        if not isinstance(outputs, list):
            outputs = [outputs] * len(operation.outputs)
        for tensor, state in zip(operation.outputs, outputs, strict=True):
            size = tensor.shape[state.axis] if isinstance(state, Rows) and tensor.shape.is_fully_defined() else None
            if isinstance(state, Rows) and size != state.outer * self.rows * state.inner:
                state = f"examples cannot be followed through {_name(operation)}"
            self._states[id(tensor)] = state


def check_no_state(proof: Proof, operations: Iterable[tf.Operation]) -> None:
    """Makes sure that nothing of examples is written to state.

    Raises:
      NotProvedError: if it is, or if that is not known.
    """
    for operation in operations:
        if operation.op_def.is_stateful and not _graph.is_random(operation):
            if any(proof.is_rows(tensor) for tensor in operation.inputs) and operation.type != "ResourceGather":
                raise NotProvedError(f"{_name(operation)} may change state")


# Where operations take shapes, or numbers of rows, in which the size of a batch may stand.
_SHAPES = {
    **dict.fromkeys("Reshape BroadcastTo Tile Pad PadV2".split(), (1,)),
    **dict.fromkeys("Slice StridedSlice".split(), (1, 2, 3)),
    **dict.fromkeys("Fill Conv2DBackpropInput Conv3DBackpropInputV2".split(), (0,)),
}


# What makes shapes of shapes.
_ON_SHAPES = frozenset("AddV2 ConcatV2 FloorDiv GatherV2 Identity Mul Pack Prod Slice StridedSlice Sub".split())


def check_same_operations(some: Iterable[tf.Operation], others: Iterable[tf.Operation]) -> None:
    """Makes sure that what a model computes for each example does not depend on how many there are.

    Args:
      some, others: the operations of its passes on two numbers of examples. But for shapes they must be the same.

    Raises:
      NotProvedError: if they are not.
    """
    for one, other in itertools.zip_longest(some, others):
        if one is None or other is None or one.type != other.type:
            raise NotProvedError("the model's operations depend on the number of examples")
        if one.type in ("Shape", "ShapeN", "Size") and not all(_is_shape(each) for each in one.outputs):
            raise _refuse(one, "depends on the number of examples")
        if _numbers(one) != _numbers(other):
            raise _refuse(one, "depends on the number of examples")
        if one.type == "Const":
            first, second = (_distinct(tf.get_static_value(each.outputs[0])) for each in (one, other))
            if not np.array_equal(first, second) and not _is_shape(one.outputs[0]):
                raise _refuse(one, "depends on the number of examples")


def _numbers(operation: tf.Operation) -> dict[str, bytes]:
    """The attributes of an operation that are numbers or words."""
    kinds = ("b", "f", "i", "list", "s")
    attributes = operation.node_def.attr.items()
    return {k: v.SerializeToString() for k, v in attributes if v.WhichOneof("value") in kinds and not k.startswith("_")}


def _is_shape(tensor: tf.Tensor) -> bool:
    """Whether a tensor is used as a shape only."""
    uses = [(c, position) for c in tensor.consumers() for position, each in enumerate(c.inputs) if each is tensor]
    return tensor.dtype.is_integer and all(
        _graph.is_random(consumer)
        or position in _SHAPES.get(consumer.type, ())
        or (consumer.type in _ON_SHAPES and _is_shape(consumer.outputs[0]))
        for consumer, position in uses
    )


def _distinct(value: np.ndarray) -> np.ndarray:
    """The value, or where all its entries are equal one of them."""
    return value.ravel()[:1] if value.size and np.all(value == value.flat[0]) else value


def _name(operation: tf.Operation) -> str:
    return f"{operation.type} {operation.name!r}"


def _refuse(operation: tf.Operation, what: str = "mixes examples, or may") -> NotProvedError:
    return NotProvedError(f"{_name(operation)} {what}")


def _static(operation: tf.Operation, position: int) -> Any:
    value = _constant(operation.inputs[position])
    if value is None:
        raise _refuse(operation, "has an operand that is no constant")
    return value


# What is computed of shapes and axes, and TensorFlow does not fold.
_FOLDED = frozenset(
    "AddV2 BroadcastGradientArgs Cast ConcatV2 ExpandDims FloorMod InvertPermutation Maximum Mul Pack Prod Range "
    "Reshape StridedSlice Sub".split()
)


def _constant(tensor: tf.Tensor) -> Any:
    """The value of a constant tensor, or None."""
    value = tf.get_static_value(tensor)
    operation = tensor.op
    if value is not None or operation.type not in _FOLDED:
        return value
    operands = [_constant(each) for each in operation.inputs]
    if any(each is None for each in operands):
        return None
    if operation.type == "ConcatV2":
        return np.concatenate(operands[:-1], int(operands[-1]))
    if operation.type == "Pack":
        return np.stack(operands, operation.get_attr("axis"))
    if operation.type == "Cast":
        return operands[0].astype(tensor.dtype.as_numpy_dtype)
    attributes = {a.name: operation.get_attr(a.name) for a in operation.op_def.attr if a.type != "type"}
    names = [argument.name for argument in operation.op_def.input_arg]
    with tf.init_scope():
        result = getattr(tf.raw_ops, operation.type)(**dict(zip(names, operands, strict=True)), **attributes)
        results = [result] if isinstance(result, tf.Tensor) else list(result)
        return results[tensor.value_index].numpy()


def _infer_shape(operation: tf.Operation) -> None:
    """Sets the shape of a result that depends on operands which TensorFlow does not fold."""
    out = operation.outputs[0]
    known = out.shape.is_fully_defined() or len(operation.inputs) < 2
    operand = None if known else _constant(operation.inputs[1])
    if operand is None:
        return
    shape, operand = operation.inputs[0].shape.as_list(), np.ravel(operand)
    if operation.type == "Transpose":
        out.set_shape([shape[int(axis)] for axis in operand])
    elif operation.type in _REDUCTIONS.split():
        reduced = {int(axis) % len(shape) for axis in operand}
        kept = operation.get_attr("keep_dims")
        out.set_shape([1 if k in reduced else n for k, n in enumerate(shape) if kept or k not in reduced])


def _only(operation: tf.Operation, states: Sequence[State], position: int) -> Rows:
    """The state of the one input that may depend on examples."""
    if any(state is not None for k, state in enumerate(states) if k != position % len(states)):
        raise _refuse(operation)
    state = states[position]
    if state is None:
        raise _refuse(operation)
    return state


def _moved(state: Rows, axis: int) -> Rows:
    return dataclasses.replace(state, axis=axis)


# Each entry of the result depends on the entries of the inputs at its place, up to broadcasting.
_ELEMENTWISE = """
Abs Acos Acosh Add AddN AddV2 Asin Asinh Atan Atan2 Atanh Cast Ceil CheckNumerics ClipByValue Cos Cosh Digamma Div
DivNoNan Elu EluGrad Equal Erf Erfc Exp Expm1 Floor FloorDiv FloorMod Greater GreaterEqual Identity Imag Inv InvGrad
IsFinite IsInf IsNan LeakyRelu LeakyReluGrad Less LessEqual Lgamma Log Log1p LogicalAnd LogicalNot LogicalOr Maximum
Minimum Mod Mul MulNoNan Neg NotEqual OnesLike Pow PreventGradient Real RealDiv Reciprocal ReciprocalGrad Relu Relu6
Relu6Grad ReluGrad Rint Round Rsqrt RsqrtGrad SelectV2 Selu SeluGrad Sigmoid SigmoidGrad Sign Sin Sinh Softplus
SoftplusGrad Softsign SoftsignGrad Sqrt SqrtGrad Square SquaredDifference StopGradient Sub Tan Tanh TanhGrad
TruncateDiv TruncateMod Xdivy Xlogy ZerosLike
"""


@_rule(_ELEMENTWISE)
def _elementwise(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    rank = operation.outputs[0].shape.rank
    aligned = {
        _moved(state, state.axis + rank - tensor.shape.rank)
        for tensor, state in zip(operation.inputs, states, strict=True)
        if state is not None
    }
    if len(aligned) != 1:
        raise _refuse(operation)
    (found,) = aligned
    for tensor, state in zip(operation.inputs, states, strict=True):
        if state is None and not _is_alike(proof, tensor, found.axis - rank):
            raise _refuse(operation, "treats examples by their place in the batch")
    return found


def _is_alike(proof: Proof, tensor: tf.Tensor, axis: int) -> bool:
    """Whether the entries of a tensor that is free of examples are interchangeable along an axis, counted from the end.

    They are where there is one, where all are equal, and where they are independent draws of one distribution. Then it
    does not matter which of them an example meets.
    """
    if tensor.shape.rank is None or -axis > tensor.shape.rank or tensor.shape[axis] == 1:
        return tensor.shape.rank is not None
    operation = tensor.op
    if operation.type in ("Fill", "ZerosLike", "OnesLike") or (_is_draw(operation) and proof.has_fresh_seed(operation)):
        return True
    if operation.type == "BroadcastTo":
        return _is_alike(proof, operation.inputs[0], axis)
    if operation.type == "MatMul" and axis == -2 and not operation.get_attr("transpose_a"):
        return _is_alike(proof, operation.inputs[0], axis)
    if operation.type in _ELEMENTWISE_TYPES:
        return all(_is_alike(proof, each, axis) for each in operation.inputs)
    value = tf.get_static_value(tensor) if operation.type == "Const" else None
    return value is not None and bool(np.all(value == np.take(value, [0], axis)))


_ELEMENTWISE_TYPES = frozenset(_ELEMENTWISE.split())


def _is_draw(operation: tf.Operation) -> bool:
    """Whether an operation draws independent numbers of one distribution, given by scalars."""
    if not _graph.is_random(operation) or not operation.type.startswith(_INDEPENDENT_DRAWS):
        return False
    arguments = zip(operation.op_def.input_arg, operation.inputs, strict=True)
    return all(tensor.shape.rank == 0 for argument, tensor in arguments if argument.name not in _SEEDS)


_INDEPENDENT_DRAWS = (
    *("RandomUniform", "RandomStandardNormal", "TruncatedNormal", "StatefulUniform", "StatefulStandardNormal"),
    *("StatefulTruncatedNormal", "StatelessRandomUniform", "StatelessRandomNormal", "StatelessTruncatedNormal"),
)
_SEEDS = ("shape", "seed", "key", "counter", "alg", "algorithm", "resource")


@_rule("IdentityN")
def _identities(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> list[State]:
    return list(states)


@_rule("Shape ShapeN Size Rank")
def _of_shape(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> None:
    return None


@_rule("Reshape Squeeze ExpandDims")
def _reshape(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    """The position of an element, in row-major order, is kept, and with it the digit that is the example's number."""
    state = _only(operation, states, 0)
    if not operation.outputs[0].shape.is_fully_defined():
        raise _refuse(operation, "has a shape that is no constant")
    before, after = operation.inputs[0].shape.as_list(), operation.outputs[0].shape.as_list()
    stride = state.inner * math.prod(before[state.axis + 1 :])  # of the digit
    for axis, size in enumerate(after):
        behind = math.prod(after[axis + 1 :])
        inner, remainder = divmod(stride, behind) if behind else (0, 1)
        if inner and not remainder and size and size % (proof.rows * inner) == 0:
            return Rows(axis, size // (proof.rows * inner), inner)
    raise _refuse(operation)


@_rule("Transpose")
def _transpose(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    rank = operation.inputs[0].shape.rank
    return _moved(state, [int(axis) % rank for axis in _static(operation, 1)].index(state.axis))


@_rule("BroadcastTo")
def _broadcast_to(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    return _moved(state, state.axis + operation.outputs[0].shape.rank - operation.inputs[0].shape.rank)


@_rule("Tile")
def _tile(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    return dataclasses.replace(state, outer=state.outer * int(_static(operation, 1)[state.axis]))


def _other_axes(operation: tf.Operation, state: Rows, axes: Any) -> list[int]:
    """The given axes, as numbers >= 0, none of which may be that of the examples."""
    rank = operation.inputs[0].shape.rank
    found = [int(axis) % rank for axis in np.ravel(axes)]
    if state.axis in found:
        raise _refuse(operation)
    return found


_REDUCTIONS = "All Any EuclideanNorm Max Mean Min Prod Sum"


@_rule(_REDUCTIONS)
def _reduction(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    axes = _other_axes(operation, state, _static(operation, 1))
    return state if operation.get_attr("keep_dims") else _moved(state, state.axis - sum(a < state.axis for a in axes))


@_rule("ArgMax ArgMin")
def _arg(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    (axis,) = _other_axes(operation, state, _static(operation, 1))
    return _moved(state, state.axis - (axis < state.axis))


@_rule("Cumprod Cumsum ReverseV2")
def _along_other_axes(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    _other_axes(operation, state, _static(operation, 1))
    return state


@_rule("Roll")
def _roll(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    _other_axes(operation, state, _static(operation, 2))
    return state


def _all_alike(proof: Proof, operation: tf.Operation, tensors: Sequence[tf.Tensor], states: Sequence[State]) -> Rows:
    """The state that all tensors of equal rank have, but for those that are free of examples."""
    found = {state for state in states if state is not None}
    if len(found) != 1:
        raise _refuse(operation)
    (state,) = found
    for tensor, each in zip(tensors, states, strict=True):
        if each is None and not _is_alike(proof, tensor, state.axis - tensor.shape.rank):
            raise _refuse(operation, "treats examples by their place in the batch")
    return state


@_rule("ConcatV2")
def _concat(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _all_alike(proof, operation, list(operation.inputs)[:-1], states[:-1])
    _other_axes(operation, state, _static(operation, len(states) - 1))
    return state


@_rule("Pack")
def _pack(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _all_alike(proof, operation, operation.inputs, states)
    return _moved(state, state.axis + (operation.get_attr("axis") % operation.outputs[0].shape.rank <= state.axis))


@_rule("Unpack")
def _unpack(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    (axis,) = _other_axes(operation, state, operation.get_attr("axis"))
    return _moved(state, state.axis - (axis < state.axis))


@_rule("Split SplitV")
def _split(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    data, axis = (1, 0) if operation.type == "Split" else (0, 2)
    state = _only(operation, states, data)
    if int(_static(operation, axis)) % operation.inputs[data].shape.rank == state.axis:
        raise _refuse(operation)
    return state


@_rule("MirrorPad MirrorPadGrad Pad PadV2")
def _pad(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    if np.any(_static(operation, 1)[state.axis]):
        raise _refuse(operation)
    return state


@_rule("Slice")
def _slice(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)  # the whole axis, as its size is checked to be kept
    return state


@_rule("StridedSlice")
def _strided_slice(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    kept = _kept_axes(operation, operation.inputs[0].shape, 1)
    if kept.get(state.axis) is None:
        raise _refuse(operation)
    return _moved(state, kept[state.axis])


@_rule("StridedSliceGrad")
def _strided_slice_gradient(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 4)
    for axis, kept in _kept_axes(operation, operation.outputs[0].shape, 1).items():
        if kept == state.axis:
            return _moved(state, axis)
    raise _refuse(operation)


def _kept_axes(operation: tf.Operation, shape: tf.TensorShape, first: int) -> dict[int, int]:
    """For each axis of `shape` that an indexing leaves whole and in order, which axis of its result that is."""
    begin, end, strides = (_static(operation, first + k) for k in range(3))
    names = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    masks = {name: operation.get_attr(name) for name in names}

    def is_set(name: str, k: int) -> bool:
        return bool(masks[name] & 1 << k)

    indexed = sum(not is_set("new_axis_mask", k) and not is_set("ellipsis_mask", k) for k in range(len(begin)))
    kept, axis, out = {}, 0, 0

    def keep(number: int) -> None:
        nonlocal axis, out
        for _ in range(number):
            kept[axis] = out
            axis, out = axis + 1, out + 1

    for k in range(len(begin)):
        if is_set("ellipsis_mask", k):
            keep(shape.rank - indexed)
        elif is_set("new_axis_mask", k):
            out += 1
        elif is_set("shrink_axis_mask", k):
            axis += 1
        else:
            starts = is_set("begin_mask", k) or begin[k] == 0
            if starts and strides[k] == 1 and (is_set("end_mask", k) or end[k] >= shape[axis]):
                keep(1)
            else:
                axis, out = axis + 1, out + 1
    keep(shape.rank - axis)
    return kept


@_rule("LogSoftmax Softmax TopKV2")
def _along_the_last_axis(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    _other_axes(operation, state, -1)
    return state


@_rule("MatrixBandPart MatrixDiagPartV3 MatrixInverse Cholesky")
def _of_matrices(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    _other_axes(operation, state, [-1, -2])
    return state


@_rule("MatMul")
def _matmul(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    return _product(proof, operation, states, operation.get_attr("transpose_a"), operation.get_attr("transpose_b"))


@_rule("BatchMatMul BatchMatMulV2 BatchMatMulV3")
def _batch_matmul(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    return _product(proof, operation, states, operation.get_attr("adj_x"), operation.get_attr("adj_y"))


def _product(proof: Proof, operation: tf.Operation, states: Sequence[State], first: bool, second: bool) -> Rows:
    """Products of matrices: examples are rows of the left, columns of the right, or one matrix each."""
    rank = operation.outputs[0].shape.rank
    contracted = (-2 if first else -1, -1 if second else -2)
    places = []
    for tensor, state, summed in zip(operation.inputs, states, contracted, strict=True):
        if state is not None:
            axis = state.axis - tensor.shape.rank
            if axis == summed:
                raise _refuse(operation)
            places.append((axis if axis < -2 else (-2 if tensor is operation.inputs[0] else -1), state))
    if len({(place, state.outer, state.inner) for place, state in places}) != 1:
        raise _refuse(operation)
    place, state = places[0]
    if place < -2:
        for tensor, each in zip(operation.inputs, states, strict=True):
            if each is None and not _is_alike(proof, tensor, place):
                raise _refuse(operation, "treats examples by their place in the batch")
    elif len(places) > 1:
        raise _refuse(operation)
    return _moved(state, place + rank)


@_rule("Einsum")
def _einsum(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    terms, output = operation.get_attr("equation").decode().split("->")
    labels = [_axis_labels(each, t.shape.rank) for each, t in zip(terms.split(","), operation.inputs, strict=True)]
    result = _axis_labels(output, operation.outputs[0].shape.rank)
    found = {(names[s.axis], s.outer, s.inner) for names, s in zip(labels, states, strict=True) if s is not None}
    if len(found) != 1:
        raise _refuse(operation)
    ((label, outer, inner),) = found
    for names, state in zip(labels, states, strict=True):
        if names.count(label) > 1 or (state is None and label in names):
            raise _refuse(operation)
        if state is not None and names[state.axis] != label:
            raise _refuse(operation)
    if result.count(label) != 1:
        raise _refuse(operation)
    return Rows(result.index(label), outer, inner)


def _axis_labels(term: str, rank: int) -> list[Any]:
    """A label for each axis; those of an ellipsis are numbered from its end, as they are broadcast."""
    before, dots, after = term.partition("...")
    ellipsis = range(rank - len(before) - len(after), 0, -1) if dots else ()
    return [*before, *ellipsis, *after]


# Operations on batches, whose first axis is that of both data and result: type -> positions of the data.
_BATCHED = {
    **dict.fromkeys("Conv2D Conv3D DepthwiseConv2dNative MaxPool AvgPool MaxPool3D AvgPool3D LRN".split(), (0,)),
    **dict.fromkeys("ResizeNearestNeighbor ResizeBilinear ResizeBicubic ResizeArea".split(), (0,)),
    **dict.fromkeys("ResizeNearestNeighborGrad SpaceToDepth DepthToSpace ExtractImagePatches".split(), (0,)),
    **dict.fromkeys("Conv2DBackpropInput Conv3DBackpropInputV2 DepthwiseConv2dNativeBackpropInput".split(), (2,)),
    **dict.fromkeys("AvgPoolGrad AvgPool3DGrad".split(), (1,)),
    **dict.fromkeys("MaxPoolGrad MaxPool3DGrad MaxPoolGradGrad LRNGrad".split(), (0, 1, 2)),
    **dict.fromkeys("ResizeBilinearGrad ResizeBicubicGrad".split(), (0, 1)),
}


@_rule(*_BATCHED)
def _batched(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    data = _BATCHED[operation.type]
    found = {state for k, state in enumerate(states) if k in data}
    if len(found) != 1 or any(state is not None for k, state in enumerate(states) if k not in data):
        raise _refuse(operation)
    (state,) = found
    if state is None or state.axis != 0:
        raise _refuse(operation)
    return state


@_rule("BiasAdd")
def _bias_add(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    _other_axes(operation, state, 1 if operation.get_attr("data_format") == b"NCHW" else -1)
    return state


@_rule("FusedBatchNorm FusedBatchNormV2 FusedBatchNormV3 FusedBatchNormGradV2 FusedBatchNormGradV3")
def _fused_normalization(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> list[Any]:
    """By constant statistics; what is summed over the batch is not by example."""
    data = (0, 1) if "Grad" in operation.type else (0,)
    found = {state for k, state in enumerate(states) if k in data}
    rest = any(state is not None for k, state in enumerate(states) if k not in data)
    if operation.get_attr("is_training") or found != {Rows(0)} or rest:
        raise _refuse(operation)
    other = f"{_name(operation)} sums over examples" if "Grad" in operation.type else None
    return [Rows(0), *[other] * (len(operation.outputs) - 1)]


@_rule("GatherV2")
def _gather(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    table, ids, _ = operation.inputs
    axis, shared = int(_static(operation, 2)) % table.shape.rank, operation.get_attr("batch_dims")
    of_table, of_ids, _ = states
    if of_table is None and of_ids is not None and not shared:
        return _moved(of_ids, axis + of_ids.axis)
    if of_table is not None and of_ids is None and not shared and of_table.axis != axis:
        return of_table if of_table.axis < axis else _moved(of_table, of_table.axis + ids.shape.rank - 1)
    if of_table is not None and of_table == of_ids and of_table.axis < shared:
        return of_table
    raise _refuse(operation)


@_rule("ResourceGather")
def _resource_gather(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 1)
    if operation.get_attr("batch_dims"):
        raise _refuse(operation)
    return state


@_rule("OneHot")
def _one_hot(proof: Proof, operation: tf.Operation, states: Sequence[State]) -> Rows:
    state = _only(operation, states, 0)
    axis = operation.get_attr("axis") % operation.outputs[0].shape.rank
    return _moved(state, state.axis + (axis <= state.axis))
