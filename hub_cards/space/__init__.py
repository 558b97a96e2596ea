"""A page to try the codec: `mimi app` runs it here, and `python -m hub_cards publish` makes it a Space."""
