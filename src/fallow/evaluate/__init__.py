"""How well a model does: on texts, on tasks, in long documents."""

NEEDLE = "needle"  # what commands call it
TRIALS = 20  # needles at each depth, where nobody says
