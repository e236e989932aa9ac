"""Tables of README.md and docs/, made from the files in results/."""
