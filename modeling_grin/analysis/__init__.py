"""Studies of a model's routing."""

from .routing import expert_load, plot_expert_load

__all__ = ["expert_load", "plot_expert_load"]
