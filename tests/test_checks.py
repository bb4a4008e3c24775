"""Arguments: which ones a constructor has."""

from inspect import Parameter

from sb3_dreamer.checks import constructor_parameters


class Base:
    def __init__(self, first, second=2, *, third=3) -> None:
        """Passes nothing on, so that what lies below it does not count."""


class Passes(Base):
    def __init__(self, *args, second=20, own=None, **kwargs) -> None:
        super().__init__(*args, second=second, **kwargs)


class Inherits(Passes):
    """Has no constructor of its own."""


class Closed(Base):
    def __init__(self, only=1) -> None:
        super().__init__(0)


def defaults(cls: type) -> dict:
    return {name: parameter.default for name, parameter in constructor_parameters(cls).items()}


def test_arguments_that_are_passed_on_count_and_the_derived_class_decides_their_defaults():
    assert defaults(Passes) == {"first": Parameter.empty, "second": 20, "third": 3, "own": None}
    assert defaults(Inherits) == defaults(Passes)


def test_a_constructor_that_passes_none_on_hides_those_of_its_base():
    assert defaults(Closed) == {"only": 1}
    assert defaults(type("Nothing", (), {})) == {}
