"""The demo: a pretrained network learns new signs, twice: as it is, and held to a budget."""
