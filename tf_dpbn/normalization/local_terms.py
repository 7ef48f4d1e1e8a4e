"""The local part of batch normalization's gradient (docs/algorithm.md, section 3a).

A normalization's statistics are functions of the kernel layer that feeds it. With that layer's public inputs held
constant, mean and variance of channel o depend only on the kernel's own channel o, so their whole Jacobian has the
kernel's shape. This file finds the feeding layer and computes the two Jacobians.

The feeding layer is found in the graph of the public pass: from the normalization's input, back through operations that
keep channels apart (bias, activation, pooling), to the first operation that multiplies data by a variable. That works
for functional, sequential and subclassed models alike, and for a layer that is called several times.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_dpbn import _graph
from tf_dpbn.normalization.layer import NormalizationCall
from tf_dpbn.normalization.moments import LocalTerm, widen

# Operations that multiply data by a kernel -> axes of the kernel that enumerate the output's channels.
_KERNEL_OPERATIONS: dict[str, tuple[int, ...]] = {
    "MatMul": (-1,),
    "BatchMatMulV2": (-1,),
    "Conv2D": (-1,),
    "Conv3D": (-1,),
    "Conv2DBackpropInput": (-2,),
    "Conv3DBackpropInputV2": (-2,),
    "DepthwiseConv2dNative": (-2, -1),
}
# Those of them whose first axis of data and output are the examples.
_LINEAR_IN_ROWS = frozenset(["MatMul", "BatchMatMulV2", "Conv2D", "Conv3D", "DepthwiseConv2dNative"])
# Those of the linear ones whose filter gradient is an operation of its own, and which that is; "" for a product.
_FILTER_GRADIENTS = {
    "Conv2D": "Conv2DBackpropFilter",
    "DepthwiseConv2dNative": "DepthwiseConv2dNativeBackpropFilter",
    "MatMul": "",
}
_ADDITIONS = frozenset(["Add", "AddV2", "BiasAdd", "Identity"])
_REARRANGEMENTS = frozenset(["Reshape", "Squeeze", "ExpandDims"])
# Each output channel depends on the same input channel only; the channel axis stays where it is.
_CHANNELWISE_OPERATIONS = frozenset(
    "Add AddV2 AvgPool AvgPool3D BatchToSpaceND BiasAdd Cast Elu Exp Identity LeakyRelu MaxPool MaxPool3D "
    "Mul Neg RealDiv Relu Relu6 Selu Sigmoid Softplus Softsign Sub Tanh".split()
)
# A kernel may pass through these on its way from the variable to the operation; its last two axes survive.
_KERNEL_PASSAGES = frozenset(["Cast", "ExpandDims", "Identity", "ReadVariableOp"])


def with_local_terms(
    calls: Sequence[NormalizationCall],
    inputs: Sequence[tf.Tensor],
    variables: Sequence[tf.Variable],
    input_mean: Callable[[NormalizationCall, int], Any],
) -> list[NormalizationCall]:
    """Adds to each normalization call of a public pass, in the current graph, its local terms.

    There is one for each variable of the kernel layer that feeds the call, and none where that is not one layer (after
    an addition of branches, say).

    Args:
      calls: from `layer.PublicPass`.
      inputs: the tensors through which public data entered the pass.
      variables: the trainable variables.
      input_mean: maps a call whose statistics do not come from this pass ("noised"), and a number of channels, to the
        released mean by channel of what the kernel layer is fed with: a tensor or variable.
    """
    graph = PassGraph(inputs, variables)
    producers = [graph.find_producer(call.inputs, call.layer.channel_axes) for call in calls]
    pairs = zip(producers, calls, strict=True)
    public = {k: pair for k, pair in enumerate(pairs) if pair[0] is not None and pair[1].layer.statistics != "noised"}
    terms = dict(zip(public, _terms_of_public(list(public.values())), strict=True))
    found = []
    for k, (call, producer) in enumerate(zip(calls, producers, strict=True)):
        if k in terms:
            call = dataclasses.replace(call, local_terms=terms[k])
        elif producer is not None and producer.is_linear and not call.masked:
            mean = input_mean(call, math.prod(_channel_shape(producer)))
            call = dataclasses.replace(call, local_terms=_terms_of_released(producer, call, mean), input_mean=mean)
        found.append(call)
    return found


def _terms_of_released(producer: _Producer, call: NormalizationCall, mean: Any) -> tuple[LocalTerm, ...]:
    """Without public patches: pbar from the released mean of the kernel layer's input, V along the kernel itself.

    V_o is 2 v_o K_o / |K_o|^2 plus something orthogonal to K_o, as v_o is a quadratic function of K_o. Keeping only the
    first part takes from an example's gradient what changes the kernel's length, which normalization undoes. Likewise
    pbar's part along K_o is set to what the released mean of the outputs says.
    """
    *biases, kernel = producer.parameters
    d_mean = _d_mean_of_linear(producer, tf.reshape(tf.convert_to_tensor(mean), _channel_shape(producer)))
    d_means = [*[tf.ones_like(bias.read) for bias in biases], d_mean]
    read, rank = kernel.read, kernel.read.shape.rank
    axes = [k for k in range(rank) if k - rank not in kernel.channel_axes]
    squares = tf.reduce_sum(tf.square(read), axes, keepdims=True)
    along = tf.math.divide_no_nan(read, squares)

    def by_channel(values: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.cast(values, read.dtype), squares.shape)

    outputs = by_channel(call.mean) - sum(by_channel(bias.read) for bias in biases)
    d_means[-1] += along * (outputs - tf.reduce_sum(d_means[-1] * read, axes, keepdims=True))
    d_variances = [tf.zeros_like(bias.read) for bias in biases]
    d_variances.append(2.0 * by_channel(call.variance + call.layer.epsilon) * along)
    return _local_terms(producer, d_means, d_variances)


def _channel_shape(producer: _Producer) -> list[int]:
    """The shape of the kernel operation's data with all axes but the channels of size one."""
    data = producer.frozen_input
    is_convolution = "onv" in producer.operation.type
    axis = _channel_axis_of_kernel_operation(producer.operation) if is_convolution else data.shape.rank - 1
    return [size if k == axis else 1 for k, size in enumerate(data.shape.as_list())]


def _terms_of_public(found: Sequence[tuple[Any, NormalizationCall]]) -> list[tuple[LocalTerm, ...]]:
    """Both Jacobians of each call from the public pass; those by anchored statistics by the chain rule."""
    # Mean and variance of channel o involve only channel o of each parameter, so the gradient of their sum over
    # channels holds every entry of the Jacobian.
    jacobians: list[Any] = [_of_linear(*each) if _is_in_closed_form(*each) else None for each in found]
    others = [k for k, each in enumerate(jacobians) if each is None]
    producers = [found[k][0] for k in others]
    d_means = _gradients_by_parameters(producers, [tf.reduce_sum(found[k][1].public_mean) for k in others])
    d_variances = _gradients_by_parameters(producers, [tf.reduce_sum(found[k][1].public_variance) for k in others])
    for k, *of_moments in zip(others, d_means, d_variances, strict=True):
        jacobians[k] = of_moments
    terms = []
    for k, (producer, call) in enumerate(found):
        of_call = _local_terms(producer, *jacobians[k])
        if call.layer.statistics == "anchored":
            of_call = tuple(_anchored_term(term, call) for term in of_call)
        elif k not in others:
            of_call = (*of_call[:-1], dataclasses.replace(of_call[-1], alike=True))
        terms.append(of_call)
    return terms


def _is_in_closed_form(producer: _Producer, call: NormalizationCall) -> bool:
    shapes = call.inputs.shape, producer.operation.outputs[0].shape
    is_linear = producer.is_linear and not call.masked and producer.operation.type in _FILTER_GRADIENTS
    return is_linear and all(shape.is_fully_defined() for shape in shapes)


def _of_linear(producer: _Producer, call: NormalizationCall) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """d mean and d variance where the normalization's input is operation(data) + biases.

    The derivative of the variance by an output is 2 (z - mu) / count.
    """
    *biases, _ = producer.parameters
    operation = producer.operation
    outputs = operation.outputs[0].shape.as_list()
    channel = _channel_axis_of_kernel_operation(operation)
    z = widen(call.inputs)
    shape = [size if k == call.layer.channel_axes[0] % z.shape.rank else 1 for k, size in enumerate(z.shape.as_list())]
    count = z.shape.num_elements() // outputs[channel]
    centered = (z - tf.reshape(tf.cast(call.public_mean, z.dtype), shape)) * (2.0 / count)
    kept = tf.cast(_graph.reshape(centered, outputs), operation.outputs[0].dtype)
    d_mean = _d_mean_of_linear(producer, tf.reduce_mean(producer.frozen_input, 0, keepdims=True))
    d_variance = _filter_gradient(producer, producer.frozen_input, kept)
    of_biases = [bias.read for bias in biases]
    return [*map(tf.ones_like, of_biases), d_mean], [*map(tf.zeros_like, of_biases), d_variance]


def _filter_gradient(producer: _Producer, data: tf.Tensor, cotangent: tf.Tensor) -> tf.Tensor:
    """The gradient by the kernel, for other data of the operation and the given one by its output.

    A convolution of one tap a side that strides only leaves out positions, and they are left out before it: oneDNN's
    kernel for it writes beyond its memory where there are fewer examples than threads, as one (TensorFlow 2.21).
    """
    operation, read = producer.operation, producer.parameters[-1].read
    kernel = next(t for t in operation.inputs if t is not producer.frozen_input)
    if operation.type == "MatMul":
        return tf.cast(tf.reshape(tf.matmul(data, cotangent, transpose_a=True), read.shape), read.dtype)
    names = ("strides", "padding", "explicit_paddings", "data_format", "dilations")
    attributes = {name: operation.get_attr(name) for name in names}
    if kernel.shape[:2] == [1, 1] and operation.get_attr("padding") != b"EXPLICIT":
        strides = attributes["strides"]
        if max(strides) > 1:
            data = data[tuple(slice(None, None, stride) for stride in strides)]
            attributes["strides"] = [1, 1, 1, 1]
    gradient = getattr(tf.raw_ops, _FILTER_GRADIENTS[operation.type])
    found = gradient(input=data, filter_sizes=kernel.shape.as_list(), out_backprop=cotangent, **attributes)
    return tf.cast(_graph.reshape(found, read.shape), read.dtype)


def _gradients_by_parameters(producers: Sequence[_Producer], targets: Sequence[tf.Tensor]) -> list[list[tf.Tensor]]:
    """The gradient of each target, a scalar, by its producer's parameters, the producer's data held constant.

    As few calls of tf.gradients as possible take as many targets at once as do not get in each other's way, as each
    call walks through the whole graph behind a parameter.
    """
    found: dict[int, list[tf.Tensor]] = {}
    while len(found) < len(producers):
        group: list[int] = []
        for k, each in enumerate(producers):
            if k not in found and all(each.is_apart_from(producers[other]) for other in group):
                group.append(k)
        reads = [[parameter.read for parameter in producers[k].parameters] for k in group]
        flat = tf.nest.flatten(reads)
        stop = [producers[k].frozen_input for k in group]
        gradients = tf.gradients([targets[k] for k in group], flat, stop_gradients=stop)
        found.update(zip(group, tf.nest.pack_sequence_as(reads, gradients), strict=True))
    return [found[k] for k in range(len(producers))]


def _anchored_term(term: LocalTerm, call: NormalizationCall) -> LocalTerm:
    """The same Jacobians by anchored statistics, which are linear in the cotangents too."""
    one, zero = (value(tf.reshape(call.public_variance, [-1])) for value in (tf.ones_like, tf.zeros_like))
    d_mean = term.pull_back(*call.public_cotangents(one, zero))
    d_variance = term.pull_back(*call.public_cotangents(zero, one))
    return dataclasses.replace(term, d_mean=d_mean, d_variance=d_variance)


def _local_terms(producer: _Producer, d_means: list[tf.Tensor], d_variances: list[tf.Tensor]) -> tuple[LocalTerm, ...]:
    jacobians = zip(producer.parameters, map(widen, d_means), map(widen, d_variances), strict=True)
    return tuple(LocalTerm(each.index, each.channel_axes, *of_moments) for each, *of_moments in jacobians)


def _d_mean_of_linear(producer: _Producer, mean_input: tf.Tensor) -> tf.Tensor:
    """d mean / d kernel where the normalization's input is operation(data) + biases.

    The mean of the outputs is then that of the mean input, so that one example takes the place of the whole batch.

    Args:
      producer: linear.
      mean_input: of the shape of the operation's data, one example; other axes of one are broadcast.
    """
    operation, kernel = producer.operation, producer.parameters[-1].read
    known = tf.TensorShape([1, *producer.frozen_input.shape[1:]])
    mean_input = tf.cast(mean_input, producer.frozen_input.dtype)
    if not known.is_fully_defined() or mean_input.shape != known:
        shape = tf.concat([[1], tf.shape(producer.frozen_input)[1:]], 0)
        mean_input = tf.ensure_shape(tf.broadcast_to(mean_input, shape), known)
    axis, outputs = _channel_axis_of_kernel_operation(operation), operation.outputs[0].shape
    if operation.type in _FILTER_GRADIENTS and outputs[1:].is_fully_defined():
        share = outputs[axis] / math.prod(outputs[1:])
        cotangent = tf.fill([1, *outputs[1:]], tf.cast(share, operation.outputs[0].dtype))
        return _filter_gradient(producer, mean_input, cotangent)
    output = _graph.call_again(operation, producer.frozen_input, mean_input)
    mean = tf.reduce_mean(output, [k for k in range(output.shape.rank) if k != axis])
    return tf.gradients(tf.reduce_sum(mean), [kernel])[0]


@dataclasses.dataclass(frozen=True)
class _Parameter:
    index: int
    channel_axes: tuple[int, ...]
    read: tf.Tensor


@dataclasses.dataclass(frozen=True)
class _Producer:
    """What feeds a normalization: an operation on public data, and what is applied on the way from it.

    Attributes:
      operation: multiplies data by a kernel.
      parameters: trainable variables on the way, the operation's kernel last.
      frozen_input: the operation's data.
      is_linear: the normalization's input is operation(data) plus biases, up to a rearrangement of positions.
      path: ids of the tensors from the operation to the normalization.
    """

    operation: tf.Operation
    parameters: tuple[_Parameter, ...]
    frozen_input: tf.Tensor
    is_linear: bool
    path: frozenset[int]

    def is_apart_from(self, other: _Producer) -> bool:
        """Whether neither has a parameter of the other, nor is fed from within it."""
        shared = {each.index for each in self.parameters} & {each.index for each in other.parameters}
        return not shared and id(self.frozen_input) not in other.path and id(other.frozen_input) not in self.path


class PassGraph:
    """The graph of a pass: which tensors carry data, which are reads of trainable variables."""

    def __init__(self, inputs: Sequence[tf.Tensor], variables: Sequence[tf.Variable]) -> None:
        graph = inputs[0].graph
        self._data = _graph.data_tensors(graph, inputs)
        index = {id(variable): i for i, variable in enumerate(variables)}
        captured = _graph.captured_variables(graph, variables)
        self._variables = {handle: index[id(variable)] for handle, variable in captured.items()}

    def mean_input(self, z: tf.Tensor, call: NormalizationCall) -> tf.Tensor | None:
        """Mean by channel of what the kernel layer is fed with, [input channels], or None where no such layer is found.

        Args:
          z: a normalization's input in this graph.
          call: the corresponding call of the public pass.
        """
        producer = self.find_producer(z, call.layer.channel_axes)
        if producer is None or not producer.is_linear:
            return None
        axes = [k for k, size in enumerate(_channel_shape(producer)) if size == 1]
        return tf.reshape(tf.reduce_mean(tf.cast(producer.frozen_input, tf.float32), axes), [-1])

    def find_producer(self, z: tf.Tensor, channel_axes: tuple[int, ...]) -> _Producer | None:
        """Walks back from z to the kernel operation that feeds it, or returns None."""
        if len(channel_axes) != 1:
            return None
        axis = channel_axes[0] % z.shape.rank
        channels = z.shape[axis]
        parameters: list[_Parameter] = []
        path = set()
        is_linear = True
        while True:
            path.add(id(z))
            operation = z.op
            data = [tensor for tensor in operation.inputs if id(tensor) in self._data]
            if len(data) != 1:
                return None
            if operation.type in _KERNEL_OPERATIONS:
                kernel = self._kernel(operation, data[0], axis, channels)
                if kernel is None:
                    return None
                is_linear = is_linear and operation.type in _LINEAR_IN_ROWS
                return _Producer(operation, (*parameters, kernel), data[0], is_linear, frozenset(path))
            stacked = _stacked_element(operation)
            if stacked is not None:
                z = stacked
                continue
            moved = _axis_before(operation, data[0], axis)
            if moved is None:
                return None
            added = self._channel_parameters(operation, data[0], axis, channels)
            if added is None:
                return None
            parameters += added
            is_linear = is_linear and operation.type in _ADDITIONS | _REARRANGEMENTS
            axis, z = moved, data[0]

    def _kernel(self, operation: tf.Operation, data: tf.Tensor, axis: int, channels: int) -> _Parameter | None:
        if axis != _channel_axis_of_kernel_operation(operation):
            return None
        found = [(t, self._variable_read(t, _KERNEL_PASSAGES)) for t in operation.inputs if t is not data]
        # The last two axes of the operand must be the variable's own: an axis may have been added behind them.
        reads = [read for t, read in found if read is not None and t.shape[-2:] == read[1].shape[-2:]]
        if len(reads) != 1 or not _is_data_times_kernel(operation, data):
            return None
        index, read = reads[0]
        axes = _KERNEL_OPERATIONS[operation.type]
        size = math.prod(read.shape[each] for each in axes)
        return _Parameter(index, axes, read) if size == channels else None

    def _channel_parameters(
        self, operation: tf.Operation, data: tf.Tensor, axis: int, channels: int
    ) -> list[_Parameter] | None:
        """Trainable vectors, one number a channel, that an operation on the way applies (a bias)."""
        found = []
        for tensor in operation.inputs:
            if tensor is data:
                continue
            variable = self._variable_read(tensor, _KERNEL_PASSAGES | {"Reshape", "Squeeze"})
            if variable is None:
                if self._reads_a_variable(tensor):
                    return None
                continue
            index, read = variable
            aligned = [1] * data.shape.rank
            aligned[axis] = channels
            shape = [1] * (data.shape.rank - tensor.shape.rank) + tensor.shape.as_list()
            is_bias_add = operation.type == "BiasAdd" and axis == data.shape.rank - 1
            if read.shape.as_list() != [channels] or not (is_bias_add or shape == aligned):
                return None
            found.append(_Parameter(index, (-1,), read))
        return found

    def _variable_read(self, tensor: tf.Tensor, passages: frozenset[str]) -> tuple[int, tf.Tensor] | None:
        """Follows a tensor back to the read of a trainable variable: (index, result of the read)."""
        while tensor.op.type in passages:
            if tensor.op.type == "ReadVariableOp":
                index = self._variables.get(id(tensor.op.inputs[0]))
                return None if index is None else (index, tensor)
            tensor = tensor.op.inputs[0]
        return None

    def _reads_a_variable(self, tensor: tf.Tensor) -> bool:
        seen, stack = set(), [tensor]
        while stack:
            tensor = stack.pop()
            if id(tensor) in self._variables:
                return True
            if id(tensor) not in seen:
                seen.add(id(tensor))
                stack.extend(tensor.op.inputs)
        return False


def _is_data_times_kernel(operation: tf.Operation, data: tf.Tensor) -> bool:
    """Whether a matrix product is data @ kernel: only then is the kernel's last axis the channel axis."""
    transposed = {"MatMul": "transpose_b", "BatchMatMulV2": "adj_y"}.get(operation.type)
    return transposed is None or (operation.inputs[0] is data and not operation.get_attr(transposed))


def _channel_axis_of_kernel_operation(operation: tf.Operation) -> int:
    rank: int = operation.outputs[0].shape.rank
    if "Conv" in operation.type and operation.get_attr("data_format").startswith(b"NC"):
        return 1
    return rank - 1


def _axis_before(operation: tf.Operation, data: tf.Tensor, axis: int) -> int | None:
    """Where the channel axis of an operation's output lies in its input, or None if channels are mixed."""
    out: tf.Tensor = operation.outputs[0]
    if operation.type in _CHANNELWISE_OPERATIONS:
        return axis if data.shape.rank == out.shape.rank and data.shape[axis] == out.shape[axis] else None
    last = axis == out.shape.rank - 1
    if operation.type in _REARRANGEMENTS:
        # Leading axes may be merged or split; the last one must be kept whole.
        return data.shape.rank - 1 if last and data.shape[-1] == out.shape[-1] != 1 else None
    if operation.type == "StridedSlice":
        return data.shape.rank - 1 if last and _leaves_last_axis(operation, data) else None
    if operation.type == "Transpose":
        permutation = tf.get_static_value(operation.inputs[1])
        return None if permutation is None else int(permutation[axis])
    return None


def _leaves_last_axis(operation: tf.Operation, data: tf.Tensor) -> bool:
    """Whether an indexing touches leading axes only, as that of one step in time does."""
    indexed = operation.inputs[1].shape[0]
    other = operation.get_attr("ellipsis_mask") or operation.get_attr("new_axis_mask")
    return not other and indexed is not None and data.shape.rank is not None and indexed < data.shape.rank


def _stacked_element(operation: tf.Operation) -> tf.Tensor | None:
    """The i-th of some stacked tensors where the operation is stack(...)[i], transposed there and back or not.

    Two TimeDistributed layers of Keras 3 in a row leave that between them.
    """
    if operation.type != "StridedSlice" or operation.inputs[1].shape[0] != 1:
        return None
    if operation.get_attr("shrink_axis_mask") != 1 or operation.get_attr("new_axis_mask"):
        return None
    stack, index = operation.inputs[0].op, tf.get_static_value(operation.inputs[1])
    order = list(range(len(operation.inputs[0].shape)))
    while stack.type == "Transpose":
        permutation = tf.get_static_value(stack.inputs[1])
        if permutation is None:
            return None
        order, stack = [int(permutation[axis]) for axis in order], stack.inputs[0].op
    if stack.type != "Pack" or index is None or order != sorted(order) or stack.get_attr("axis") != 0:
        return None
    return stack.inputs[int(index[0])]
