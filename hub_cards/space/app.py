"""What a Space runs."""

from hub_cards.space.server import serve

if __name__ == "__main__":
    serve()
