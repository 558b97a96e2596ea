"""The metric's card, with a form to try it: the Space of this folder."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("pesq.py")), sampling_rate=16_000))
