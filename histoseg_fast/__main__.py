"""`python -m histoseg_fast` is `histoseg-fast`."""

from histoseg_fast.cli import main

main()
