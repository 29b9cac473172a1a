"""The command line: commands parse, call and print; nothing else."""

from movekd.cli.interrupt import install

install()  # before any command imports slow libraries
