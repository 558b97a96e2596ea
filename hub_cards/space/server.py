"""The server: the page and the live lines, in one process, around one model."""

import os
from pathlib import Path

import gradio as gr
import torch
import uvicorn
from fastapi import FastAPI

from hub_cards.space.live import add_live
from hub_cards.space.page import STATIC, build, scripts, theme
from hub_cards.space.studio import MAX_BYTES, Studio
from modeling_mimi import MimiModel

BUNDLED = Path(__file__).parents[2] / "checkpoints" / "mimi_small"


def create(model: MimiModel, name: str) -> FastAPI:
    """The page of a model, as an application."""
    app = FastAPI()
    add_live(app, model)
    return gr.mount_gradio_app(
        app,
        build(Studio(model, name)),
        path="/",
        theme=theme(),
        head=scripts(),
        css_paths=STATIC / "page.css",
        max_file_size=MAX_BYTES,
        show_error=False,
        footer_links=[],
        ssr_mode=False,
    )


def serve(checkpoint: str | Path | None = None, host: str = "0.0.0.0", port: int = 7860) -> None:
    """Serve the page of a checkpoint until somebody stops it.

    Args:
        checkpoint: Directory or Hub id; by default the environment's `MIMI_MODEL`, or else the bundled one.
        host: Address to listen on; 127.0.0.1 is this machine alone.
        port: Where to listen.
    """
    checkpoint = checkpoint or os.environ.get("MIMI_MODEL") or BUNDLED
    torch.set_num_threads(min(2, torch.get_num_threads()))  # several people, and live lines that must not wait
    model = MimiModel.from_pretrained(checkpoint).eval()
    name = Path(checkpoint).name if Path(checkpoint).exists() else str(checkpoint)
    uvicorn.run(create(model, name), host=host, port=port, log_level="warning")
