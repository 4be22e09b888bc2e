"""The rules by which variables are exchanged densely, or at another density."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import fnmatch
import math
from typing import NamedTuple
from typing import TypeAlias

import keras
import numpy as np

from tf_regtopk import validation

# Patterns of names, or a function that is True for the variables meant.
Pick: TypeAlias = Sequence[str] | Callable[[keras.Variable], bool]


class Slots(NamedTuple):
    """The places of variables in the list of all of them.

    Args:
        sparse: Tuple of those exchanged sparsely, those with a density of their
            own last.
        own_densities: Tuple of the densities of the last ones.
        dense: Tuple of those exchanged densely.
    """

    sparse: tuple[int, ...]
    own_densities: tuple[float, ...]
    dense: tuple[int, ...]

    @property
    def num_default(self) -> int:
        """Number of sparse variables at the density of the sparsifier."""
        return len(self.sparse) - len(self.own_densities)


@dataclasses.dataclass(frozen=True)
class VariableRules:
    """The variables that are not just exchanged sparsely like all others.

    A pattern, such as `"bias"` or `"*/embedding*"`, is matched with the name
    and with the path of a variable; `*` stands for any characters. A path may
    begin with the name of the model or not, depending on how the model was
    built: `"*/layer/kernel"` matches both.

    Args:
        dense_below: Integer. Variables of fewer entries are exchanged densely.
        dense: Patterns of variables that are exchanged densely, or a function
            that is True for such a `keras.Variable`.
        densities: Dict from pattern to the density of the variables that match
            it. The first pattern that matches counts. Variables that are
            exchanged densely stay so.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> rules = VariableRules(dense=["bias"], densities={"kernel": 0.01})
    >>> layer = keras.layers.Dense(5)
    >>> layer.build((4, 5))
    >>> rules.slots(layer.trainable_variables)
    Slots(sparse=(0,), own_densities=(0.01,), dense=(1,))
    """

    dense_below: int = 0
    dense: Pick = ()
    densities: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        validation.check_integer("dense_below", self.dense_below, minimum=0)
        if not callable(self.dense):
            _check_patterns("dense", self.dense)
        if not isinstance(self.densities, Mapping):
            raise TypeError(
                "`densities` must be a dict from pattern to density such as "
                f'`{{"*/embeddings": 0.0001}}`. Received: {self.densities!r}'
            )
        _check_patterns("densities", list(self.densities))
        for density in self.densities.values():
            validation.check_density("densities", density, "all in (0, 1]")

    def slots(self, variables: Sequence[keras.Variable]) -> Slots:
        """Sorts variables by the way that they are exchanged.

        Args:
            variables: List of the trainable variables.

        Raises:
            TypeError: If a function returns patterns.
            ValueError: If a pattern matches none of them.
        """
        if not callable(self.dense):
            _check_that_all_match("dense", self.dense, variables)
        _check_that_all_match("densities", list(self.densities), variables)
        default: list[int] = []
        own: list[tuple[int, float]] = []
        dense: list[int] = []
        for slot, variable in enumerate(variables):
            if not can_be_summed(variable):
                continue
            density = self._own_density(variable)
            if self._is_dense(variable):
                dense.append(slot)
            elif density is None:
                default.append(slot)
            else:
                own.append((slot, density))
        return Slots(
            (*default, *(slot for slot, _ in own)),
            tuple(density for _, density in own),
            tuple(dense),
        )

    def _is_dense(self, variable: keras.Variable) -> bool:
        if math.prod(variable.shape) < self.dense_below:
            return True
        if callable(self.dense):
            return _is_meant(self.dense, variable)
        return any(_matches(pattern, variable) for pattern in self.dense)

    def _own_density(self, variable: keras.Variable) -> float | None:
        for pattern, density in self.densities.items():
            if _matches(pattern, variable):
                return float(density)
        return None


def can_be_summed(variable: keras.Variable) -> bool:
    """Returns whether the gradients of the replicas are to be summed.

    An empty variable has nothing to exchange. A "gradient" to overwrite with
    (float8 scales) is no summand but the next value, and the inner optimizer
    assigns it.
    """
    return bool(math.prod(variable.shape)) and not getattr(
        variable, "overwrite_with_gradient", False
    )


def summed_slots(variables: Sequence[keras.Variable]) -> list[int]:
    """Lists the places of those variables of which `can_be_summed` is true."""
    return [
        i for i, variable in enumerate(variables) if can_be_summed(variable)
    ]


def path_of(variable: keras.Variable) -> str:
    """Returns the path of a variable, the name of one that has no path."""
    return str(getattr(variable, "path", variable.name))


def _matches(pattern: str, variable: keras.Variable) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in _names(variable))


def _names(variable: keras.Variable) -> tuple[str, str, str]:
    """The name and the path; the latter also as that of a part of a model."""
    path = path_of(variable)
    return variable.name, path, f"/{path}"


def _is_meant(
    function: Callable[[keras.Variable], bool], variable: keras.Variable
) -> bool:
    """Returns what a function of the user's says of a variable."""
    answer = function(variable)
    # Patterns are refused, because any of them would mean "yes" as an answer.
    if isinstance(answer, Sequence | np.ndarray):
        raise TypeError(
            "`dense` must return True or False for each variable, or be a list "
            f"of patterns itself. Received: {answer!r} for the variable "
            f"{path_of(variable)}"
        )
    return bool(answer)


def _check_patterns(name: str, patterns: Sequence[str]) -> None:
    """Raises unless all patterns are strings, and not one string for all."""
    if (
        isinstance(patterns, str)
        or not isinstance(patterns, Iterable)
        or not all(isinstance(pattern, str) for pattern in patterns)
    ):
        raise TypeError(
            f'`{name}` must be given patterns of names such as `["bias"]`. '
            f"Received: {name}={patterns!r}"
        )


def _check_that_all_match(
    name: str, patterns: Sequence[str], variables: Sequence[keras.Variable]
) -> None:
    """Raises if a pattern matches no variable, because it may be mistyped."""
    for pattern in patterns:
        if not any(_matches(pattern, variable) for variable in variables):
            raise ValueError(
                f"Each pattern of `{name}` must match the name or path of a "
                "trainable variable (begin it with `*/`, because a model that "
                "is loaded may lack its own name in the paths). Received: "
                f"{pattern!r} for variables of the paths "
                f"{[path_of(variable) for variable in variables]}"
            )
