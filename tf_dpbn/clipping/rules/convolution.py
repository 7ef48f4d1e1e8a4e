"""Convolutions of one to three dimensions: strided, dilated, grouped, depthwise, transposed, in both data formats.

The gradient by the kernel tap (i, j) is sum_t a[t + (i, j)] g[t]^T. Rather than extracting patches of the input for all
taps, the input is unfolded along its last axis only and the output gradient along the others; one matrix product an
example then holds all pairs of shifts. With a stride, taps of equal remainder share a product.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_dpbn._devices import has_accelerator, has_cpu_kernels, has_grouped_filter_gradients
from tf_dpbn.clipping.rows import reshape_rows, widen, window_of
from tf_dpbn.clipping.rules.base import Blocks, Found, Inputs, MatrixRule, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """The geometry of a convolution along one axis: output o sees input o * stride + tap * dilation - before."""

    taps: int
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    inputs: int = 0
    outputs: int = 0


@dataclasses.dataclass(frozen=True)
class _Phase:
    """Taps of one axis with equal remainder: input x * stride + first goes into output x - shift, for each shift.

    Attributes:
      taps: in order of falling shift.
      first: the first of the inputs.
      start, stop: range of x.
      high, step: the largest shift, and the distance of neighbouring ones.
    """

    taps: tuple[int, ...]
    first: int
    start: int
    stop: int
    high: int
    step: int


def _phases(axis: Axis) -> list[_Phase]:
    found = []
    for remainder in range(axis.stride):
        shifts = {
            tap * axis.dilation // axis.stride: tap
            for tap in range(axis.taps)
            if tap * axis.dilation % axis.stride == remainder
        }
        if not shifts:
            continue
        ordered = sorted(shifts, reverse=True)
        first = (remainder - axis.before) % axis.stride
        origin = (first + axis.before - remainder) // axis.stride
        count = max(0, -(-(axis.inputs - first) // axis.stride))
        start = max(origin, ordered[-1])
        stop = max(start, min(origin + count, ordered[0] + axis.outputs))
        first += (start - origin) * axis.stride
        step = ordered[0] - ordered[1] if len(ordered) > 1 else 1
        found.append(_Phase(tuple(shifts[s] for s in ordered), first, start, stop, ordered[0], step))
    return found


# Patches of up to this many numbers are extracted whole (measured on CPUs).
_SHORT_PATCH = 64
# Taps a side of a depthwise filter's gradient that are computed at a time.
_WINDOW = 3
# Windows of up to this many numbers are extracted by a convolution, wider ones by slicing (measured on CPUs).
_NARROW = 64
# With strides slices are slower still, but the kernel of zeros and ones, a constant of the graph, has as many rows and
# columns as a window has numbers: 1 GiB for five by five taps of 672 channels.
_LARGEST_KERNEL = 1024


class ConvolutionRule(MatrixRule):
    """z = convolution of a with K.

    Args:
      shape: of K: [*taps, inputs a group, outputs], or [*taps, inputs, multiplier] if depthwise.
      axes: geometry of the spatial axes, images of one example first.
      groups, inputs, outputs: groups of channels, and the channels of each.
      channels_first: the data format.
      transposed: whether the operation is the gradient of a convolution: its output then takes the place of a.
      depthwise: the layout of K.
      dtype: of a.
    """

    def __init__(
        self,
        shape: Shape,
        axes: Sequence[Axis],
        groups: int,
        inputs: int,
        outputs: int,
        channels_first: bool,
        transposed: bool,
        depthwise: bool,
        dtype: tf.DType,
    ) -> None:
        self._taps = math.prod(axis.taps for axis in axes[:-1]), axes[-1].taps
        positions = math.prod(axis.outputs for axis in axes)
        super().__init__(shape, groups, positions, math.prod(self._taps) * inputs, outputs, not transposed)
        self._axes = tuple(axes)
        self._channels = inputs
        self._channels_first = channels_first
        self._transposed = transposed
        self._depthwise = depthwise
        # A short patch is cheaper to extract whole than its matrix product is to assemble from shifts.
        self._by_patches = self.inputs <= _SHORT_PATCH
        self._phases = list(itertools.product(*[_phases(axis) for axis in axes[:-1]]))
        self._at_once = (
            len(axes) == 3
            and math.prod(self._taps) > 1
            and all(axis.dilation == 1 and min(axis.before, axis.after) >= 0 for axis in axes)
            and has_cpu_kernels()  # XLA takes minutes to compile convolutions in so many groups
            and (depthwise or (dtype != tf.float64 and has_grouped_filter_gradients()))
        )

    @property
    def is_whole(self) -> bool:
        """See `base.Rule`."""
        return self._at_once

    def _operands(self, inputs: Inputs, cotangent: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(a, g), float, [rows, *axes, channels]."""
        with tf.control_dependencies([cotangent]):  # unfolded before it is needed, the input would lie in memory
            data = tf.identity(inputs[0])
        data, cotangent = widen(data), widen(cotangent)
        if self._channels_first:
            data, cotangent = (tf.transpose(t, [0, 1, *range(3, t.shape.rank), 2]) for t in (data, cotangent))
        return (cotangent, data) if self._transposed else (data, cotangent)

    def instantiate(self, inputs: Inputs, cotangent: tf.Tensor) -> Blocks:
        """See `base.Rule`.

        On CPUs one block, the operand itself, if that is a convolution of images. Else either one block [rows, groups,
        other taps, last taps, inputs, outputs], or for each phase of the taps of all axes but the last [rows, groups,
        last taps, inputs, other taps, outputs].
        """
        if self._at_once:
            return (self._of_all_examples(*self._operands(inputs, cotangent)),)
        if self._by_patches:
            product = _product(*self.matrices(inputs, cotangent))
            return (reshape_rows(product, [self.groups, *self._taps, self._channels, self.outputs]),)
        data, cotangent = self._operands(inputs, cotangent)
        return tuple(self._block(data, cotangent, phases) for phases in self._phases)

    def _of_all_examples(self, data: tf.Tensor, cotangent: tf.Tensor) -> tf.Tensor:
        """Every example's gradient, [rows, *shape], as the filter gradient of one convolution.

        Its channels are those of all examples, in groups: example i's channels of the result come from example i's
        channels of the data alone.
        """
        images, *axes = self._axes
        paddings = [[0, 0], [0, 0], *[[axis.before, axis.after] for axis in axes], [0, 0]]
        data = tf.pad(data, paddings) if np.any(paddings) else data
        data, cotangent = (tf.transpose(t, [1, 2, 3, 0, 4]) for t in (data, cotangent))
        rows = data.shape[3] or tf.shape(data)[3]
        data = tf.reshape(data, [images.outputs, *data.shape[1:3], rows * data.shape[4]])
        cotangent = tf.reshape(cotangent, [images.outputs, *cotangent.shape[1:3], rows * cotangent.shape[4]])
        strides = [1, *[axis.stride for axis in axes], 1]
        if self._depthwise:
            gradient = _depthwise_filter_gradient(data, cotangent, self.shape, axes)
            split = tf.reshape(gradient, [*self.shape[:2], rows, *self.shape[2:]])
            return tf.transpose(split, [2, 0, 1, 3, 4])
        gradient = tf.raw_ops.Conv2DBackpropFilter(
            input=data,
            filter_sizes=[*self.shape[:3], rows * self.shape[3]],
            out_backprop=cotangent,
            strides=strides,
            padding="VALID",
        )
        return tf.transpose(tf.reshape(gradient, [*self.shape[:3], rows, self.shape[3]]), [3, 0, 1, 2, 4])

    def _block(self, data: tf.Tensor, cotangent: tf.Tensor, phases: Sequence[_Phase]) -> tf.Tensor:
        # From the last axis to the first, so that the taps of the first vary slowest.
        for position in reversed(range(len(phases))):
            axis, phase = self._axes[position], phases[position]
            after = phase.stop - phase.high + (len(phase.taps) - 1) * phase.step - axis.outputs
            window = Axis(taps=len(phase.taps), dilation=phase.step, before=phase.high - phase.start, after=after)
            cotangent = unfold(cotangent, position + 1, window)
        shifts = math.prod(len(phase.taps) for phase in phases)
        columns = self._taps[1]
        left = self._grouped(self._columns(data, phases), columns, self._channels)
        right = self._grouped(cotangent, shifts, self.outputs)
        return reshape_rows(_product(left, right), [self.groups, columns, self._channels, shifts, self.outputs])

    def _columns(self, data: tf.Tensor, phases: Sequence[_Phase]) -> tf.Tensor:
        """Windows along the last axis, at the positions of a phase along the others."""
        window: list[slice] = [slice(None)]
        *others, last = self._axes
        for position, (axis, phase) in enumerate(zip(others, phases, strict=True)):
            end = phase.first + (phase.stop - phase.start - 1) * axis.stride + 1
            merged = position == len(others) - 1  # the window along the last axis steps over these rows
            window.append(slice(phase.first, max(phase.first, end), 1 if merged else axis.stride))
        whole = all(w == slice(0, n, 1) for w, n in zip(window[1:], data.shape[1:], strict=False))
        data = data if whole else window_of(data, window)
        return unfold(data, len(self._axes), last, others[-1].stride)

    def _grouped(self, data: tf.Tensor, copies: int, channels: int) -> tf.Tensor:
        """Arranges [rows, *positions, copies * groups * channels] as [rows, groups, positions, copies * channels]."""
        positions = math.prod(data.shape[1:-1])
        if self.groups == 1:  # two batch axes would take oneDNN's slow path
            return reshape_rows(data, [positions, copies * channels])
        data = reshape_rows(data, [positions, copies, self.groups, channels])
        return reshape_rows(tf.transpose(data, [0, 3, 1, 2, 4]), [self.groups, positions, copies * channels])

    def split(self, operand: tf.Tensor) -> Blocks:
        """See `base.Rule`."""
        if self._at_once:
            return (operand,)
        if self._by_patches:
            return (tf.transpose(self._canonical(operand), [0, 4, 1, 2, 3, 5]),)
        canonical = tf.transpose(self._canonical(operand), [0, 4, 2, 3, 1, 5])
        if canonical.shape[4] == 1:
            return (canonical,) * len(self._phases)
        return tuple(tf.gather(canonical, self._flat_taps(phases), axis=4) for phases in self._phases)

    def join(self, blocks: Blocks) -> tf.Tensor:
        """See `base.Rule`."""
        if self._at_once:
            return blocks[0]
        if self._by_patches:
            return self.from_matrix(blocks[0])
        order = np.concatenate([self._flat_taps(phases) for phases in self._phases])
        joined = tf.gather(tf.concat(blocks, 4), np.argsort(order), axis=4)
        return reshape_rows(tf.transpose(joined, [0, 4, 2, 3, 1, 5]), self.shape)

    def _flat_taps(self, phases: Sequence[_Phase]) -> np.ndarray:
        """Where the taps of a block lie among those of all axes but the last."""
        sizes = [axis.taps for axis in self._axes[:-1]]
        grids = np.meshgrid(*[phase.taps for phase in phases], indexing="ij")
        return np.ravel_multi_index([grid.ravel() for grid in grids], sizes)

    def _canonical(self, operand: tf.Tensor) -> tf.Tensor:
        """Arranges [rows, *shape] as [rows, other taps, last taps, inputs, groups, outputs], ones kept."""
        *taps, inputs, outputs = operand.shape[1:]
        if self._depthwise:
            channels = [1, inputs, outputs]
        else:
            channels = [inputs, 1, 1] if outputs == 1 else [inputs, self.groups, outputs // self.groups]
        return reshape_rows(operand, [math.prod(taps[:-1]), taps[-1], *channels])

    def matrices(self, inputs: Inputs, cotangent: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See `base.MatrixRule`."""
        data, cotangent = self._operands(inputs, cotangent)
        left = self._grouped(self._patches(data), math.prod(self._taps), self._channels)
        right = self._grouped(cotangent, 1, self.outputs)
        return (left[:, None], right[:, None]) if self.groups == 1 else (left, right)

    def _patches(self, data: tf.Tensor) -> tf.Tensor:
        """[rows, *outputs, taps * channels], the taps of the first axis varying slowest."""
        if len(self._axes) == 3 and self.inputs * self.groups <= _SHORT_PATCH:
            _, height, width = self._axes
            if _convolves_well(data.shape[-1], height.stride, width.stride):
                return _patches_by_convolution(data, self._axes)
        for position in reversed(range(len(self._axes))):
            data = unfold(data, position + 1, self._axes[position])
        return data

    def from_matrix(self, matrix: tf.Tensor) -> tf.Tensor:
        """See `base.MatrixRule`."""
        if self.groups > 1:
            matrix = reshape_rows(matrix, [self.groups, *self._taps, self._channels, self.outputs])
            matrix = tf.transpose(matrix, [0, 2, 3, 4, 1, 5])
        return reshape_rows(matrix, self.shape)

    def to_matrix(self, operand: tf.Tensor) -> tf.Tensor:
        """See `base.MatrixRule`."""
        if self.groups == 1:
            *inner, outputs = operand.shape[1:]
            return reshape_rows(operand, [1, math.prod(inner), outputs])
        canonical = tf.transpose(self._canonical(operand), [0, 4, 1, 2, 3, 5])
        groups, *inner, outputs = canonical.shape[1:]
        return reshape_rows(canonical, [groups, math.prod(inner), outputs])


def _depthwise_filter_gradient(data: tf.Tensor, cotangent: tf.Tensor, shape: Shape, axes: Sequence[Axis]) -> tf.Tensor:
    """The filter gradient of a depthwise convolution of padded images, [*taps, channels, multiplier].

    In windows of at most _WINDOW taps a side: oneDNN is many times slower with larger ones (TensorFlow 2.21).
    """
    strides = [1, *[axis.stride for axis in axes], 1]
    rows = []
    for i, *height in _windows(axes[0]):
        parts = []
        for j, *width in _windows(axes[1]):
            part = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
                input=window_of(data, [slice(None), slice(*height), slice(*width)]),
                filter_sizes=[min(axis.taps, _WINDOW) for axis in axes]
                + [data.shape[3] or tf.shape(data)[3], shape[3]],
                out_backprop=cotangent,
                strides=strides,
                padding="VALID",
            )
            parts.append(part[i:, j:])
        rows.append(tf.concat(parts, 1) if len(parts) > 1 else parts[0])
    return tf.concat(rows, 0) if len(rows) > 1 else rows[0]


def _windows(axis: Axis) -> list[tuple[int, int, int]]:
    """For each window of taps how many of its first ones an earlier one has, and the range of inputs that it sees."""
    size = min(axis.taps, _WINDOW)
    found = []
    for first in range(0, axis.taps, size):
        start = min(first, axis.taps - size)
        found.append((first - start, start, start + (axis.outputs - 1) * axis.stride + size))
    return found


def _product(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """sum_t left_t right_t^T for [..., t, n]; axes of one next to the rows would take oneDNN's slow path."""
    if left.shape.rank == 4 and left.shape[1] == 1:
        return tf.matmul(tf.squeeze(left, 1), tf.squeeze(right, 1), transpose_a=True)[:, None]
    return tf.matmul(left, right, transpose_a=True)


def unfold(data: tf.Tensor, axis: int, window: Axis, step: int = 1) -> tf.Tensor:
    """Windows along one axis, their taps merged into the channels.

    Args:
      data: [..., channels], static but for the first axis.
      axis: which axis to slide along.
      window: its taps, stride and dilation, and how many zeros to add at the ends; negative numbers take away.
      step: for the last axis before the channels: take every step-th entry of the axis before it.

    Returns:
      [..., taps * channels], the taps varying slower than the channels.
    """
    if min(window.before, window.after) < 0:
        kept = slice(max(0, -window.before), data.shape[axis] - max(0, -window.after))
        data = window_of(data, [slice(None)] * axis + [kept])
        window = dataclasses.replace(window, before=max(0, window.before), after=max(0, window.after))
    if window.taps == window.stride == step == 1 and not window.before and not window.after:
        return data
    numbers = window.taps * data.shape[-1]
    wide = numbers > (_NARROW if window.stride * step == 1 else _LARGEST_KERNEL)
    if wide or 0 in data.shape[1:] or not _convolves_well(data.shape[-1], step, window.stride):
        rows = [slice(None)] * (axis - 1) + [slice(None, None, step)]
        return _unfold_by_slices(window_of(data, rows), axis, window)
    return _unfold_by_convolution(data, axis, window, step)


def _convolves_well(channels: int, step: int, stride: int) -> bool:
    """Whether windows may be extracted by a convolution.

    Accelerators round its inputs to fewer bits. And oneDNN convolves images of one channel wrongly if it strides along
    their width only and the result has width one (TensorFlow 2.21).
    """
    return not has_accelerator() and (channels > 1 or step == stride)


def _unfold_by_slices(data: tf.Tensor, axis: int, window: Axis) -> tf.Tensor:
    paddings = [[0, 0]] * data.shape.rank
    paddings[axis] = [window.before, window.after]
    padded = tf.pad(data, paddings)
    length = padded.shape[axis] - (window.taps - 1) * window.dilation  # of the positions of one tap
    starts = [tap * window.dilation for tap in range(window.taps)]
    taken = [[slice(None)] * axis + [slice(first, first + length, window.stride)] for first in starts]
    return tf.concat([window_of(padded, each) for each in taken], -1)


def _unfold_by_convolution(data: tf.Tensor, axis: int, window: Axis, step: int) -> tf.Tensor:
    """Convolves with a kernel of zeros and ones: exact, and on CPUs faster than slicing and concatenating."""
    shape = data.shape.as_list()
    channels = shape[-1]
    kernel = np.eye(window.taps * channels).reshape(window.taps, channels, window.taps * channels)
    other = Axis(taps=1, stride=step)
    if axis == len(shape) - 2:  # slide along the second axis of an image
        leading, height, trailing = shape[1 : axis - 1], shape[axis - 1] if axis > 1 else 1, []
        out = _convolve(tf.reshape(data, [-1, height, shape[axis], channels]), kernel[None], (other, window))
        middle = out.shape[1:3] if axis > 1 else out.shape[2:3]
    else:
        leading, trailing = shape[1:axis], shape[axis + 1 : -1]
        flat = tf.reshape(data, [-1, shape[axis], math.prod(trailing), channels])
        out = _convolve(flat, kernel[:, None], (window, other))
        middle = out.shape[1:2]
    return reshape_rows(out, [*leading, *middle, *trailing, window.taps * channels], data)


def _patches_by_convolution(data: tf.Tensor, axes: Sequence[Axis]) -> tf.Tensor:
    images, height, width = axes
    channels = data.shape[-1]
    taps = height.taps * width.taps
    kernel = np.eye(taps * channels).reshape(height.taps, width.taps, channels, taps * channels)
    out = _convolve(tf.reshape(data, [-1, height.inputs, width.inputs, channels]), kernel, (height, width))
    return reshape_rows(out, [images.outputs, height.outputs, width.outputs, taps * channels], data)


def _convolve(images: tf.Tensor, kernel: np.ndarray, axes: Sequence[Axis]) -> tf.Tensor:
    """Ordinary convolution of [images, height, width, channels]."""
    paddings = [[0, 0], *[[axis.before, axis.after] for axis in axes], [0, 0]]
    strides, dilations = ([1, *[getattr(axis, name) for axis in axes], 1] for name in ("stride", "dilation"))
    return tf.nn.conv2d(images, tf.constant(kernel, images.dtype), strides, paddings, dilations=dilations)


def from_operation(operation: tf.Operation, position: int, shape: tf.TensorShape) -> Found:
    """The rule for convolutions, and for the gradients by their input, which transposed convolutions use."""
    if position != 1:
        return None
    transposed = "Backprop" in operation.type
    kernel, data = operation.inputs[1], operation.inputs[2 if transposed else 0]
    inputs, outputs = data.shape, operation.outputs[0].shape
    if transposed:
        inputs, outputs = outputs, inputs
    if not (inputs.is_fully_defined() and outputs.is_fully_defined() and kernel.shape.is_fully_defined()):
        return None
    channels_first = operation.get_attr("data_format").startswith(b"NC")
    spatial = range(2, inputs.rank) if channels_first else range(1, inputs.rank - 1)
    axes = [Axis(taps=1, inputs=inputs[0], outputs=outputs[0])]
    axes += [_axis(operation, kernel.shape[k], axis, inputs[axis], outputs[axis]) for k, axis in enumerate(spatial)]
    if any(axis.stride > 1 and axis.dilation > 1 for axis in axes):  # Keras has no such layer
        return None
    depthwise = operation.type == "DepthwiseConv2dNative"
    *_, per_group, last = kernel.shape.as_list()
    if depthwise:
        groups, per_group, last = per_group, 1, last * per_group
    else:
        groups = inputs[1 if channels_first else -1] // per_group
    layout = channels_first, transposed, depthwise, data.dtype
    return ConvolutionRule(kernel.shape.as_list(), axes, groups, per_group, last // groups, *layout), (data,)


def _axis(operation: tf.Operation, taps: int, axis: int, inputs: int, outputs: int) -> Axis:
    stride, dilation = operation.get_attr("strides")[axis], operation.get_attr("dilations")[axis]
    padding = operation.get_attr("padding")
    before, after = 0, 0
    if padding == b"SAME":
        total = max(0, (outputs - 1) * stride + (taps - 1) * dilation + 1 - inputs)
        before, after = total // 2, total - total // 2
    elif padding == b"EXPLICIT":
        before, after = operation.get_attr("explicit_paddings")[2 * axis : 2 * axis + 2]
    return Axis(taps=taps, stride=stride, dilation=dilation, before=before, after=after, inputs=inputs, outputs=outputs)
