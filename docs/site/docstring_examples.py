"""An extension of Griffe that shows the examples of docstrings as code."""

import re

import griffe


class Examples(griffe.Extension):
    """Puts fences around doctests, which Markdown would take for quotes.

    And gives named tuples the parameters that they have.
    """

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = with_fences(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: object) -> None:
        if not any(str(base) == "NamedTuple" for base in cls.bases):
            return
        parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    name,
                    annotation=field.annotation,
                    kind=griffe.ParameterKind.positional_or_keyword,
                    default=field.value,
                )
                for name, field in cls.attributes.items()
            )
        )
        cls.set_member(
            "__init__", griffe.Function("__init__", parameters=parameters)
        )


def with_fences(docstring: str) -> str:
    r"""Returns a docstring whose doctests are blocks of code.

    Args:
        docstring: The docstring, without the indentation of its code.

    Example:

    >>> with_fences("Example:\n\n>>> 1 + 1\n2\n\nMore.")
    '**Example**\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore.'
    """
    docstring = re.sub(r"^Example:$", "**Example**", docstring, flags=re.M)
    return re.sub(
        r"^>>> .*(?:\n.+)*", "```pycon\n\\g<0>\n```", docstring, flags=re.M
    )
