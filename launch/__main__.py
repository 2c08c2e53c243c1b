"""`python -m launch` is `flowmill`."""

from launch.cli import main

main()
