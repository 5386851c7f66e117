"""`python -m dspark_hf.cli`, which launchers of several processes can start."""

from . import main

main()
