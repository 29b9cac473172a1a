"""`python -m movekd`, and what torchrun starts: the same as `movekd`."""

from movekd.cli.main import main

if __name__ == "__main__":
    main()
