"""Configs that say a model's widths: layers of one kind at one width, written where any reader looks."""
