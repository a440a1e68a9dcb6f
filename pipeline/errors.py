"""What a user sees when something is wrong: one line that ends in the next action."""

import functools
from typing import Any, NoReturn


class DdkError(Exception):
    """A mistake a user can mend: `message` names what is wrong and where, `hint` says what to do next.

    The command line prints both on one line and exits with status 2, without a traceback.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(f"{message}; {hint}")
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:  # workers send it to the process that shows it
        return functools.partial(DdkError, hint=self.hint), (self.message,)


def fail(message: str, *, hint: str) -> NoReturn:
    """Raise DdkError: for use in expressions and lambdas, where `raise` cannot stand."""
    raise DdkError(message, hint=hint)
