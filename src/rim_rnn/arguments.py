"""What constructors are given: defaults, checks whose errors say what was given and what was expected, and how it is told."""

import math
import numbers
import warnings
from typing import Any


def choose_num_units(hidden_size: int, proj_size: int = 0, stacklevel: int = 3) -> int:
    """The default ``num_units``: the divisor that is at most 8 and closest to 6, a tie going to the smaller one."""
    size = math.gcd(hidden_size, proj_size)
    num_units = min((d for d in range(1, 9) if size % d == 0), key=lambda d: (abs(d - 6), d))
    if num_units == 1:
        whose = f"hidden_size={hidden_size} has no"
        if proj_size:
            whose = f"hidden_size={hidden_size} and proj_size={proj_size} have no common"
        warnings.warn(
            f"{whose} divisor from 2 to 8, so num_units=1: a single unit never competes; "
            "choose a size with more divisors, or pass num_units",
            stacklevel=stacklevel,
        )
    return num_units


def choose_k(num_units: int) -> int:
    """The default ``k``: two thirds of the units, rounded up (6 -> 4)."""
    return -(-2 * num_units // 3)


def choose_sizes(unit: int) -> dict[str, int]:
    """The default sizes of keys and values, which go by the state size of a unit: the paper's from its unit of 100 on.

    Below, keys, and values of the communication, are as many eighths of the paper's as the unit is of 100, at least one.
    """
    eighths = min(max(round(8 * unit / 100), 1), 8)
    return {
        "key_size_input": 8 * eighths,
        "value_size_input": 4 * unit,
        "key_size_comm": 4 * eighths,
        "value_size_comm": 4 * eighths,
    }


def plain_int(value: int) -> int:
    """An ``int`` from the integer of another library, such as ``numpy.int64``; anything else as it is."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


def check_int(name: str, value: object, least: int, most: int | None = None) -> None:
    """``TypeError`` unless ``value`` is an int, ``ValueError`` unless it lies from ``least`` to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
    if value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} should be {expected}, got {name}={value}")


def check_bool(name: str, value: object) -> None:
    """``TypeError`` unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def check_probability(name: str, value: object) -> None:
    """Unless ``value`` is a number from 0 to 1: ``TypeError`` where ``float`` takes no such type, else ``ValueError``."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
        error = ValueError if isinstance(value, str) or hasattr(value, "__float__") else TypeError
        raise error(
            f"{name} should be a number in range [0, 1] representing the probability of an element being zeroed, "
            f"got {name}={value!r}"
        )


def check_sizes(rnn_cell: str, input_size: int, hidden_size: int, bias: bool, proj_size: int) -> None:
    """What :class:`torch.nn.LSTM` demands of the arguments that it shares with one cell of ours."""
    if rnn_cell not in ("LSTM", "GRU"):
        raise ValueError(f'rnn_cell should be "LSTM" or "GRU", got rnn_cell={rnn_cell!r}')
    check_bool("bias", bias)
    check_int("input_size", input_size, 1)
    check_int("hidden_size", hidden_size, 1)
    if proj_size and rnn_cell == "GRU":
        raise ValueError(f'proj_size is only supported for rnn_cell="LSTM", got proj_size={proj_size!r} with "GRU"')
    check_int("proj_size", proj_size, 0)
    if proj_size >= hidden_size:
        raise ValueError(
            f"proj_size should be smaller than hidden_size, got proj_size={proj_size} and hidden_size={hidden_size}"
        )


def check_num_units(num_units: int, hidden_size: int, proj_size: int = 0) -> None:
    """``ValueError`` that names the nearest divisors where ``num_units`` does not divide the sizes."""
    check_int("num_units", num_units, 1)
    for name, size in (("hidden_size", hidden_size), ("proj_size", proj_size)):
        if size % num_units:
            common = math.gcd(hidden_size, proj_size)
            divisors = [d for d in range(1, common + 1) if common % d == 0]
            below, above = [d for d in divisors if d < num_units][-1:], [d for d in divisors if d > num_units][:1]
            nearest = " and ".join(map(str, below + above))
            plural = "divisors are" if below and above else "divisor is"
            raise ValueError(f"num_units={num_units} does not divide {name}={size}; nearest {plural} {nearest}")


def check_query_size(which: str, query_size: int | None, key_size: int) -> None:
    """``ValueError`` unless ``query_size`` is ``None`` or the key's: a dot product needs two vectors of one size."""
    if query_size is not None and query_size != key_size:
        raise ValueError(
            f"query_size_{which} should be None or equal to key_size_{which}={key_size}, because queries and keys meet "
            f"in a dot product, got query_size_{which}={query_size}"
        )


def describe(module: Any, **defaults: object) -> str:
    """The ``extra_repr`` of cell and layer: the two sizes, then whatever differs from its default.

    What a stage would tell that another module was put in the place of is left out.
    """
    found = {name: getattr(module, name, value) for name, value in defaults.items()}
    shown = [f"{name}={found[name]!r}" for name, value in defaults.items() if found[name] != value]
    return ", ".join([f"{module.input_size}, {module.hidden_size}", *shown])
