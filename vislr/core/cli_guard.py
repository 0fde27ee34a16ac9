"""The one place where a named error becomes a line on stderr and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from vislr.core.errors import Interrupted, VislrError


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)`; a `VislrError` prints one line and gives its exit code.

    Bugs keep their traceback: only errors that vislr raised on purpose are shortened.
    """
    try:
        return main(argv)
    except VislrError as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Interrupted.exit_code
    except BrokenPipeError:
        # `vislr describe ... | head` closed the pipe: nothing is wrong.
        sys.stderr.close()
        return 0
