"""What a user sees when something is wrong: one line that ends in the next action."""

import functools
import json
import shlex
from importlib.metadata import distribution
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from pydantic import ValidationError

LONGEST_REASON = 300  # characters of a library's own words in a line of ours


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


def install_hint(extra: str) -> str:
    """The command that adds an extra to this very installation, from the folder, address or index it came from.

    pip leaves a note of a folder or an address (PEP 610, direct_url.json) and none of an index. So the hint is
    right in a clone, for an address of git, and for a package from an index once there is one.
    """
    origin: dict[str, Any] = json.loads(distribution("ddk-pipe").read_text("direct_url.json") or "{}")
    if "dir_info" in origin:
        folder = unquote(urlsplit(origin["url"]).path)
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"pip install {editable}{shlex.quote(f'{folder}[{extra}]')}"
    package = f"ddk-pipe[{extra}]"
    if "vcs_info" in origin:
        source = origin["vcs_info"]
        package += f" @ {source['vcs']}+{origin['url']}@{source['commit_id']}"
    elif "url" in origin:
        package += f" @ {origin['url']}"
    return f"pip install {shlex.quote(package)}"


def first_mistake(problem: "ValidationError") -> str:
    """What pydantic found first, and where: "sampler.cursors.0: Input should be a valid integer"."""
    first = problem.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def reason(problem: BaseException) -> str:
    """What a library says went wrong, as one line of at most 300 characters: some go on with pages, or with a list of
    every class they know."""
    said = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
    line = " ".join(said.split()).rstrip(" :")
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 3]}..."
