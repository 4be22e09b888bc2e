"""The Python logger `tf_regtopk`, by which the library tells users things.

Its lines go to the standard error stream by themselves, at the level INFO,
because a user who is not shown them cannot know that there are any.
`logging.getLogger("tf_regtopk").setLevel("ERROR")` silences them.
"""

import logging
import sys


class _StandardError(logging.Handler):
    """Writes to the standard error stream as it is when a line is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _create() -> logging.Logger:
    created = logging.getLogger("tf_regtopk")
    if created.level == logging.NOTSET:
        created.setLevel(logging.INFO)
    if not created.handlers:
        handler = _StandardError()
        handler.setFormatter(
            logging.Formatter("%(levelname)s:%(name)s: %(message)s")
        )
        created.addHandler(handler)
        # The handlers of the root would show each line once more.
        created.propagate = False
    return created


logger = _create()
