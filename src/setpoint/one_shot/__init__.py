"""One shot: a trained model cut to a budget at once, and the layers that read the cut units refitted."""
