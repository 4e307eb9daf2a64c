"""How many operations do the matrix products and convolutions of a program take?

Counted from their shapes, 2 for a multiplication and its addition, in the program as JAX traces it (the gradient's
products and convolutions included) and before any compiler rewrites it. Elementwise work, normalisations, softmax, sums
and gathers count nothing: a share of the matmul rate says how much of the time products would take at that rate. A
convolution counts the pairs of an output position and a kernel position that meet a pixel: neither padding nor the
zeros that a strided convolution's gradient puts between pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from mae_align.runtime.errors import InputError


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Operations of the products and convolutions in one call of a function with arguments like these.

    The function is traced, not run. A loop of known length counts its length. A loop whose length depends on data
    cannot be counted: it is refused where it holds products.

    >>> a, b = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 3), (3, 5)))
    >>> count_flops(lambda a, b: a @ b, a, b)
    60
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _of_dot(equation)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    inner = [_of_jaxpr(jaxpr) for jaxpr in _inner(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner)  # one branch runs
    if name == "while" and sum(inner):
        raise InputError("a loop of unknown length holds products: they cannot be counted; use lax.scan")
    return sum(inner)


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The programs that an equation calls: of jit, scan, cond, custom derivatives, ..."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            # Closed programs hold an open one; in newer JAX there is one class of both.
            item = getattr(item, "jaxpr", item)
            if isinstance(item, core.Jaxpr):
                yield item


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _of_dot(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)


def _of_convolution(equation: core.JaxprEqn) -> int:
    params = equation.params
    numbers = params["dimension_numbers"]
    image, kernel = map(_shape, equation.invars[:2])
    out = _shape(equation.outvars[0])
    pairs = 1
    for axis in range(len(image) - 2):
        pairs *= _meetings(
            size=image[numbers.lhs_spec[2 + axis]],
            kernel=kernel[numbers.rhs_spec[2 + axis]],
            out=out[numbers.out_spec[2 + axis]],
            stride=params["window_strides"][axis],
            low=params["padding"][axis][0],
            between=params["lhs_dilation"][axis],
            spread=params["rhs_dilation"][axis],
        )
    # A kernel holds the input channels of one group; every output channel of every image sums over them.
    batch, channels = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return 2 * batch * channels * kernel[numbers.rhs_spec[1]] * pairs


def _meetings(size: int, kernel: int, out: int, stride: int, low: int, between: int, spread: int) -> int:
    """Pairs (output position, kernel position) that meet one of `size` pixels along one axis."""
    return sum(
        1
        for start in range(-low, -low + out * stride, stride)
        for at in range(start, start + kernel * spread, spread)
        if 0 <= at <= (size - 1) * between and at % between == 0
    )
