"""The open Mimi's trainer: `accelerate launch -m training training/recipes/small.yaml [--field=value ...]`."""
