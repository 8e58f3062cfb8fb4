"""`python -m edgeward_ctl`."""

from edgeward_ctl.cli import main

main()
