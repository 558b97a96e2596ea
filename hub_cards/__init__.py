"""Model cards, and publishing on the Hub: `python -m hub_cards --help`."""
