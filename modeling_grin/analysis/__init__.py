"""Studies of a model's routing."""

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
from .texts import batched, token_rows

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
