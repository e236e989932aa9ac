"""The demo: a pretrained network learns new letters, twice: as it is, and held to a budget."""
