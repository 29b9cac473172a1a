"""`movekd`, `python -m movekd`, and what torchrun starts.

Importing the commands takes part of a second, in which Ctrl-C is no error either.
"""

import sys

from movekd.threads import limit_threads


def main() -> None:
    """Run the command line."""
    limit_threads()
    try:
        from movekd.cli.main import main as run
    except KeyboardInterrupt:
        print("movekd: interrupted before it began.", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
