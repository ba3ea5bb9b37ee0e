"""Studies of a model's routing."""

from ..data import batched, token_rows
from .figures import plot_expert_load
from .routing import (
    RoutingComparison,
    RoutingCounts,
    collect_routing,
    compare_routing,
    expert_load,
    token_routing,
)
from .specialization import Specialization, routing_similarity, specialization

__all__ = [
    "RoutingComparison",
    "RoutingCounts",
    "Specialization",
    "batched",
    "collect_routing",
    "compare_routing",
    "expert_load",
    "plot_expert_load",
    "routing_similarity",
    "specialization",
    "token_routing",
    "token_rows",
]
