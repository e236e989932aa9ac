"""One shot: a trained model cut to a budget at once, without training, and what reads the cut units fitted anew."""
